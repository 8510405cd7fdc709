//! Buckets as the configuration names them, made ready to be opened; what was found out about them.
//!
//! Credentials are read from files that only their owner may read, and go nowhere but into the store.

use std::path::Path;
use std::time::Duration;

use secrecy::SecretString;
use tokio_util::task::AbortOnDropHandle;

use super::{CliError, open};
use crate::catalog::layout::rule;
use crate::catalog::verdict;
use crate::config::{self, CloudPlace, Config, Place, RepositoryConfig, S3Place};
use crate::store::StoreError;
use crate::store::cloud::{CloudOptions, CloudService, CloudStore};
use crate::store::s3::{Checksum, LockMode, LockRule, S3Credentials, S3Options, S3Store, StorageRule, Verdict};

/// Longer than any upload of ours can take, and than clocks differ.
const STALE: Duration = Duration::from_secs(24 * 3600);
/// How long cleaning at start-up may take; what is left is found the next time.
const CLEANING: Duration = Duration::from_secs(600);
/// Room for a bundle of certificates.
const MAX_CERTIFICATES: u64 = 4 << 20;

async fn secret(path: &Path) -> Result<SecretString, CliError> {
    let path = path.to_owned();
    let read = tokio::task::spawn_blocking(move || config::read_secret(&path)).await;
    let read = read.map_err(|error| CliError::failed(error).context("read credentials"))?;
    read.map_err(|sentence| CliError::usage(anyhow::Error::msg(sentence)))
}

async fn certificates(path: &Path) -> Result<Vec<u8>, CliError> {
    let shown = path.display().to_string();
    let path = path.to_owned();
    let read = tokio::task::spawn_blocking(move || -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::Read::take(std::fs::File::open(path)?, MAX_CERTIFICATES), &mut bytes)?;
        Ok(bytes)
    });
    let read = read.await.map_err(|error| CliError::failed(error).context("read ca_file"))?;
    read.map_err(|error| CliError::usage(error).context(format!("read ca_file {shown}")))
}

/// A bucket by the S3 protocol. Asks nothing of the server yet, and knows nothing about it.
pub async fn s3(place: &S3Place) -> Result<S3Store, CliError> {
    let credentials = match &place.credentials {
        None => S3Credentials::Chain,
        Some(files) => S3Credentials::Static {
            access_key: secret(&files.access_key_file).await?,
            secret_key: secret(&files.secret_key_file).await?,
            session_token: match &files.session_token_file {
                Some(path) => Some(secret(path).await?),
                None => None,
            },
        },
    };
    let ca_pem = match &place.ca_file {
        Some(path) => Some(certificates(path).await?),
        None => None,
    };
    let storage_class = place.storage_class.clone().map(|class| StorageRule { class, applies: rule::is_pack });
    let object_lock = place.object_lock.map(|lock| LockRule {
        mode: match lock.mode {
            config::LockMode::Governance => LockMode::Governance,
            config::LockMode::Compliance => LockMode::Compliance,
        },
        days: lock.days,
        short_lived: rule::is_short_lived,
    });
    let options = S3Options {
        region: place.region.clone(),
        endpoint: place.endpoint.clone(),
        path_style: place.path_style,
        checksum: match place.checksum {
            config::Checksum::Auto => Checksum::Auto,
            config::Checksum::Crc32c => Checksum::Crc32c,
            config::Checksum::Sha256 => Checksum::Sha256,
            config::Checksum::None => Checksum::None,
        },
        storage_class,
        kms_key: place.kms_key.clone(),
        object_lock,
        credentials,
        ca_pem,
        ..S3Options::new(&place.bucket, &place.prefix)
    };
    S3Store::open(options).await.map_err(open::store_error)
}

/// A bucket of Google's, or a container of Azure's. Asks nothing of the service yet.
pub async fn cloud(place: &CloudPlace, is_azure: bool) -> Result<CloudStore, CliError> {
    let credentials = match &place.credentials_file {
        Some(path) => Some(secret(path).await?),
        None => None,
    };
    let service = match is_azure {
        true => CloudService::Azure { account: place.account.clone(), access_key: credentials },
        false => CloudService::Google { credentials },
    };
    let (bucket, prefix, endpoint) = (place.bucket.clone(), place.prefix.clone(), place.endpoint.clone());
    CloudStore::open(CloudOptions { bucket, prefix, endpoint, service }).map_err(open::store_error)
}

/// The same bucket with what was remembered about its server, if anything was.
pub async fn with_remembered(bucket: S3Store) -> Result<S3Store, StoreError> {
    let remembered = verdict::remembered(open::with_limits(bucket.clone()).as_ref()).await?;
    Ok(match remembered {
        Some(verdict) => bucket.with_verdict(verdict),
        None => bucket,
    })
}

/// What was found out about a bucket's server.
pub struct Probed {
    /// The bucket, with it.
    pub bucket: S3Store,
    /// Now.
    pub verdict: Verdict,
    /// What was remembered until now, where it says something else.
    pub differs_from: Option<Verdict>,
}

/// Finds out what a bucket's server does, and remembers it where that is news. `bucket` knows what was remembered.
pub async fn probe(bucket: &S3Store) -> Result<Probed, StoreError> {
    let found = bucket.probe().await?;
    let known = bucket.verdict().cloned();
    let is_news = known.as_ref().is_none_or(|known| !verdict::agree(known, &found));
    let probed = bucket.with_verdict(found.clone());
    if is_news {
        verdict::remember(open::with_limits(probed.clone()).as_ref(), &found).await?;
    }
    Ok(Probed { bucket: probed, verdict: found, differs_from: known.filter(|_| is_news) })
}

/// Gives up uploads that an earlier run began and never finished: they show in no listing, and cost. In the background,
/// until the handle is dropped; what fails is told, and found again at the next start.
pub fn clean_stale_uploads<'a>(
    places: impl IntoIterator<Item = &'a RepositoryConfig>,
) -> Option<AbortOnDropHandle<()>> {
    let buckets: Vec<(String, S3Place)> = places
        .into_iter()
        .filter_map(|config| match &config.place {
            // Without a prefix an upload in the bucket may be anybody's.
            Place::S3(place) if !place.prefix.is_empty() => Some((config.name.clone(), S3Place::clone(place))),
            Place::S3(_) | Place::Directory(_) | Place::Google(_) | Place::Azure(_) => None,
        })
        .collect();
    if buckets.is_empty() {
        return None;
    }
    let clean = async move {
        for (repository, place) in buckets {
            let Ok(bucket) = s3(&place).await else { continue }; // whoever opens it tells why not
            match tokio::time::timeout(CLEANING, bucket.clean_stale_uploads(STALE)).await {
                Ok(Ok(0)) => {}
                Ok(Ok(given_up)) => {
                    tracing::info!(repository, given_up, "unfinished uploads of earlier runs were given up")
                }
                Ok(Err(error)) => tracing::warn!(repository, %error, "unfinished uploads could not be looked for"),
                Err(_) => tracing::warn!(repository, "looking for unfinished uploads took too long"),
            }
        }
    };
    Some(AbortOnDropHandle::new(tokio::spawn(clean)))
}

/// The repositories of some clusters, each once.
pub fn repositories_of<'a>(
    config: &'a Config,
    clusters: impl IntoIterator<Item = &'a config::ClusterConfig>,
) -> Vec<&'a RepositoryConfig> {
    let names: std::collections::BTreeSet<&String> =
        clusters.into_iter().flat_map(|cluster| &cluster.repositories).collect();
    config.repositories.iter().filter(|repository| names.contains(&repository.name)).collect()
}
