//! What the configuration names, opened: repositories with their keys, servers.
//!
//! The only place that puts the parts of a repository together: directory or bucket, limit, retry, keys.

use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use secrecy::ExposeSecret;

use super::{CliError, Exit, bucket};
use crate::archive::{ArchiveError, ArchiveOptions, OpenError, Opener, Receivers, Source};
use crate::catalog::{CatalogError, Repository, Usage};
use crate::config::{ClusterConfig, Config, KeySource, Place, RepositoryConfig};
use crate::daemon::Job;
use crate::pg::{ConnInfo, ConnectOptions, PgError};
use crate::seal::KeyFile;
use crate::store::fs::FsStore;
use crate::store::limit::Limit;
use crate::store::retry::{Retry, RetryPolicy};
use crate::store::{Store, StoreError};
use crate::types::Id128;

/// Requests to one repository at the same time, at most.
const AT_ONCE: usize = 16;
/// One of several repositories that takes longer to open at the start is away.
const OPEN_DEADLINE: Duration = Duration::from_secs(30);

/// Which exit code an error of a repository means.
pub fn repository_error(error: CatalogError) -> CliError {
    let exit = match () {
        () if error.is_refusal() => Exit::Refused,
        () if error.is_retryable() => Exit::Failed,
        () => Exit::Usage,
    };
    CliError::new(exit, error)
}

/// Which exit code an error of a directory or bucket means.
pub fn store_error(error: StoreError) -> CliError {
    if error.is_retryable() { CliError::failed(error) } else { CliError::usage(error) }
}

/// Which exit code an error of a server means.
pub fn server_error(error: PgError) -> CliError {
    if error.is_retryable() { CliError::failed(error) } else { CliError::usage(error) }
}

/// Which exit code an error of the archiver means.
pub fn archive_error(error: ArchiveError) -> CliError {
    match error {
        ArchiveError::Server(error) => server_error(error),
        ArchiveError::Repository(error) => repository_error(error),
        ArchiveError::Open(error) if error.is_refusal => CliError::refused(error),
        error if error.protects_data() => CliError::refused(error),
        error @ ArchiveError::SynchronousStandby { .. } => CliError::usage(error),
        error => CliError::failed(error),
    }
}

/// The store behind a repository, with its limits and retries. A directory must exist, a bucket, too. What was found out
/// about a bucket's server is read first: it says how puts behave.
pub async fn store(place: &Place) -> Result<Arc<dyn Store>, CliError> {
    match place {
        Place::Directory(path) => {
            let directory = FsStore::open(path).await.map_err(|error| {
                store_error(error).hint("does the directory exist? `pgkeep init` makes it; is its file system mounted?")
            })?;
            Ok(with_limits(directory))
        }
        Place::S3(place) => {
            let bucket = bucket::s3(place).await?;
            Ok(with_limits(bucket::with_remembered(bucket).await.map_err(store_error)?))
        }
        Place::Google(place) => Ok(with_limits(bucket::cloud(place, false).await?)),
        Place::Azure(place) => Ok(with_limits(bucket::cloud(place, true).await?)),
    }
}

/// A store as every command uses it: bounded requests, retried with a deadline.
pub fn with_limits(store: impl Store) -> Arc<dyn Store> {
    let limited = Limit::new(Arc::new(store), AT_ONCE);
    Arc::new(Retry::new(Arc::new(limited), RetryPolicy::default()))
}

/// Reads a repository's key.
pub async fn key(source: &KeySource, repository: &str) -> Result<KeyFile, CliError> {
    let (source, name) = (source.clone(), repository.to_owned());
    // `key_command` may take its time.
    let read = tokio::task::spawn_blocking(move || source.read(&name));
    let material = read.await.map_err(|error| CliError::failed(error).context("read the key"))??;
    KeyFile::read(material.bytes.expose_secret(), material.passphrase.as_ref())
        .map_err(|error| CliError::usage(error).context(format!("read the key of repository {repository}")))
}

/// This run of pgkeep as a writer: one identity, however many repositories are opened and how often, so that its events
/// are one chain in each.
fn usage() -> Result<Usage, CliError> {
    static WRITER: OnceLock<Id128> = OnceLock::new();
    let usage = Usage::new().map_err(repository_error)?;
    Ok(Usage { writer: *WRITER.get_or_init(|| usage.writer), ..usage })
}

/// Opens a repository with its key.
pub async fn repository(config: &RepositoryConfig) -> Result<Repository, CliError> {
    repository_for(config, usage()?).await
}

/// Opens a repository with its key, for a writer that is known already.
pub async fn repository_for(config: &RepositoryConfig, usage: Usage) -> Result<Repository, CliError> {
    let key = key(&config.key, &config.name).await?;
    let store = store(&config.place).await?;
    Repository::open_for(&config.name, store, key, usage).await.map_err(repository_error)
}

/// Opens a repository of the configuration whenever it is wanted.
#[derive(Debug)]
struct Configured {
    config: RepositoryConfig,
    usage: Usage,
    /// What was opened at the start.
    opened: Mutex<Option<Repository>>,
}

#[async_trait]
impl Opener for Configured {
    fn name(&self) -> &str {
        &self.config.name
    }

    async fn open(&self) -> Result<Repository, OpenError> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner).take(); // one value
        match opened {
            Some(repository) => Ok(repository),
            None => repository_for(&self.config, self.usage.clone())
                .await
                .map_err(|error| OpenError { is_refusal: error.exit() == Exit::Refused, message: error.to_string() }),
        }
    }
}

/// The repositories of a cluster. One that is down is tried again later, as long as another one can be opened; a key that
/// cannot be had, or one that does not fit, is a mistake that is said now.
async fn receivers(config: &Config, cluster: &ClusterConfig) -> Result<Receivers, CliError> {
    let usage = usage()?;
    let places = config.repositories_of(cluster)?;
    let opened = futures_util::future::join_all(places.iter().map(|place| async {
        key(&place.key, &place.name).await?;
        let late = || anyhow::anyhow!("repository {} gave no answer within {} s", place.name, OPEN_DEADLINE.as_secs());
        let opened = tokio::time::timeout(OPEN_DEADLINE, repository_for(place, usage.clone())).await;
        Ok::<_, CliError>(opened.unwrap_or_else(|_| Err(CliError::failed(late()))))
    }));
    let (mut openers, mut errors) = (Vec::new(), Vec::new());
    for (place, opened) in places.into_iter().zip(opened.await) {
        let opened = match opened? {
            Ok(repository) => Some(repository),
            Err(error) if error.exit() == Exit::Refused => return Err(error),
            Err(error) => {
                errors.push((place.name.clone(), error));
                None
            }
        };
        let (config, usage) = (place.clone(), usage.clone());
        openers.push(Arc::new(Configured { config, usage, opened: Mutex::new(opened) }) as Arc<dyn Opener>);
    }
    if errors.len() == openers.len()
        && let Some((_, error)) = errors.into_iter().next()
    {
        return Err(error);
    }
    let receivers = Receivers::new(openers, cluster.acknowledge);
    Ok(if cluster.index { receivers } else { receivers.without_index() })
}

/// The server of a cluster.
pub fn source(config: &ClusterConfig) -> Result<Source, CliError> {
    let conninfo = ConnInfo::from_str(config.conninfo.expose_secret())
        .map_err(|error| server_error(error).context(format!("conninfo of cluster {}", config.name)))?;
    let connect = ConnectOptions { application_name: config.application_name.clone(), ..ConnectOptions::default() };
    Ok(Source { conninfo, connect, slot: config.slot.clone() })
}

/// How a cluster is archived.
pub fn archive_options(config: &ClusterConfig) -> ArchiveOptions {
    ArchiveOptions {
        max_delay: config.max_delay,
        synchronous: config.synchronous,
        range_interval: config.range_interval,
        shutdown_deadline: config.shutdown_deadline,
        fill_rate: config.fill_rate,
    }
}

/// Everything that is needed to archive a cluster.
pub async fn job(config: &Config, cluster: &ClusterConfig) -> Result<Job, CliError> {
    Ok(Job {
        cluster: cluster.name_in_repository.clone(),
        source: source(cluster)?,
        receivers: receivers(config, cluster).await?,
        options: archive_options(cluster),
    })
}
