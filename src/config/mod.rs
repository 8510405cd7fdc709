//! The configuration file: sought, read as written, checked once into a [`Config`].
//!
//! Invariant: a [`Config`] holds only values that are in range and references that resolve; no room behind it checks a
//! setting again. Nothing here connects, creates or changes anything: loading reads one file, and a key is only read
//! when [`KeySource::read`] is called. What may be secret (conninfo, keys, passphrases) is in no `Debug` and no message.
//!
//! Configuration stops at `daemon` and `cli`: they hand each room its own small options.

mod alert;
mod care;
mod changes;
mod check;
mod error;
mod file;
mod keep;
mod key;
mod locate;
mod place;
mod schedule;
mod template;

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::SecretString;

pub use alert::{AlertConfig, AlertUrl, AlertWay, DaemonConfig, QuietTimes, WebhookFormat};
pub use care::{DRILL_SETTINGS, Drill, Verify};
pub use changes::Changes;
pub use error::{ConfigError, Problem};
pub use file::{ALERT_SETTINGS, CLUSTER_SETTINGS, DAEMON_SETTINGS, REPOSITORY_SETTINGS, Setting};
pub use keep::{KEEP_SETTINGS, Keep};
pub use key::{KeyMaterial, KeyOrigin, KeySource, read_passphrase, read_secret};
pub use locate::{ENVIRONMENT_VARIABLE, SOUGHT, locate};
pub use place::{Checksum, CloudPlace, LockMode, ObjectLock, Place, S3Credentials, S3Place};
pub use schedule::{CronTimes, Schedule, When};
pub use template::{NewPlace, Template};

use crate::types::ClusterName;

/// A configuration file, read and checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file itself, absolute: what `restore` writes into `restore_command`.
    pub file: PathBuf,
    /// `[cluster.NAME]`, sorted by name.
    pub clusters: Vec<ClusterConfig>,
    /// `[repository.NAME]`, sorted by name.
    pub repositories: Vec<RepositoryConfig>,
    /// `[alert.NAME]`, sorted by name.
    pub alerts: Vec<AlertConfig>,
    /// `[daemon]`.
    pub daemon: DaemonConfig,
}

/// One `[cluster.NAME]`.
#[derive(Clone)]
pub struct ClusterConfig {
    /// Its name in the file.
    pub name: ClusterName,
    /// libpq's connection string or URI, not parsed yet; it may hold a password.
    pub conninfo: SecretString,
    /// The repositories that receive it, as listed: at least one, each in [`Config::repositories`], none twice.
    pub repositories: Vec<String>,
    /// How many of them must hold WAL durably before it is acknowledged: 1 to all.
    pub acknowledge: usize,
    /// Its name in the repository: `name_in_repository`, else its name here.
    pub name_in_repository: ClusterName,
    /// The physical replication slot, `[a-z0-9_]{1,63}`.
    pub slot: String,
    /// `application_name` of our connections: what `synchronous_standby_names` matches.
    pub application_name: String,
    /// How long a byte of WAL may wait before it is sealed.
    pub max_delay: Duration,
    /// Report write, flush and apply as the durable position, and put WAL at once.
    pub synchronous: bool,
    /// In synchronous mode, where every range is an object (a bucket): the least time from one range to the next, and so
    /// how many puts a second there can be.
    pub range_interval: Duration,
    /// How long a stopping PostgreSQL, or our own exit, may wait for the repository.
    pub shutdown_deadline: Duration,
    /// A repository that was away is filled up from another with at most so many bytes of WAL a second; `None`: as fast as
    /// the two go.
    pub fill_rate: Option<NonZeroU64>,
    /// Make the index that `pgkeep log` searches while WAL is archived.
    pub index: bool,
    /// What retention leaves in each repository, by its name: those without a policy keep everything.
    pub keep: BTreeMap<String, Keep>,
    /// How much is read in the background to see that it is whole.
    pub verify: Verify,
    /// How drills are done; `None`: nothing is said.
    pub drill: Option<Drill>,
    /// When base backups are taken without being asked for.
    pub schedule: Schedule,
}

/// One `[repository.NAME]`.
#[derive(Debug, Clone)]
pub struct RepositoryConfig {
    /// Its name in the file.
    pub name: String,
    /// Where its objects are.
    pub place: Place,
    /// Where its key is.
    pub key: KeySource,
}

impl fmt::Debug for ClusterConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, conninfo: _, repositories, acknowledge, name_in_repository, slot, .. } = self;
        f.debug_struct("ClusterConfig")
            .field("name", name)
            .field("repositories", repositories)
            .field("acknowledge", acknowledge)
            .field("name_in_repository", name_in_repository)
            .field("slot", slot)
            .finish_non_exhaustive()
    }
}

/// What a command that only reads a repository works on: no server is needed for it.
#[derive(Debug, Clone)]
pub struct ReadFrom<'a> {
    /// The repository.
    pub repository: &'a RepositoryConfig,
    /// The cluster's name in the repository; `None`: whatever single cluster it holds.
    pub cluster: Option<ClusterName>,
}

impl Config {
    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let file = std::path::absolute(path).map_err(|source| ConfigError::read(path, source))?;
        let text = std::fs::read_to_string(&file).map_err(|source| ConfigError::read(&file, source))?;
        Config::parse(&text, &file)
    }

    /// Checks the `text` of a configuration file; relative paths in it are relative to the folder of `file`.
    pub fn parse(text: &str, file: &Path) -> Result<Config, ConfigError> {
        check::check(file::read(text, file)?, text, file)
    }

    /// The cluster called `name`, or the only one there is.
    pub fn cluster(&self, name: Option<&str>) -> Result<&ClusterConfig, ConfigError> {
        pick("cluster", "--cluster", name, &self.clusters, |cluster| cluster.name.as_str(), &self.file)
    }

    /// The clusters a daemon serves: the one called `name`, or all of them.
    pub fn clusters(&self, name: Option<&str>) -> Result<Vec<&ClusterConfig>, ConfigError> {
        match name {
            None if !self.clusters.is_empty() => Ok(self.clusters.iter().collect()),
            name => self.cluster(name).map(|cluster| vec![cluster]),
        }
    }

    /// The repository called `name`, or the only one there is.
    pub fn repository(&self, name: Option<&str>) -> Result<&RepositoryConfig, ConfigError> {
        pick("repository", "--repository", name, &self.repositories, |repository| repository.name.as_str(), &self.file)
    }

    /// The repositories that receive `cluster`, as listed.
    pub fn repositories_of(&self, cluster: &ClusterConfig) -> Result<Vec<&RepositoryConfig>, ConfigError> {
        cluster.repositories.iter().map(|name| self.repository(Some(name))).collect()
    }

    /// The first repository that receives `cluster`.
    pub fn repository_of(&self, cluster: &ClusterConfig) -> Result<&RepositoryConfig, ConfigError> {
        self.repository(cluster.repositories.first().map(String::as_str))
    }

    /// What `list`, `plan`, `restore` and `wal fetch` read. On a host that only restores, the file may hold no cluster;
    /// then `cluster` is its name in the repository.
    pub fn read_from(&self, cluster: Option<&str>, repository: Option<&str>) -> Result<ReadFrom<'_>, ConfigError> {
        let configured = match cluster {
            Some(name) => self.clusters.iter().find(|candidate| candidate.name.as_str() == name),
            None if self.clusters.is_empty() || repository.is_some() => None,
            None => Some(self.cluster(None)?),
        };
        if let Some(configured) = configured {
            let cluster = Some(configured.name_in_repository.clone());
            let repository = match repository {
                Some(name) => self.repository(Some(name))?,
                None => self.repository_of(configured)?,
            };
            return Ok(ReadFrom { repository, cluster });
        }
        let Some(name) = cluster else {
            return Ok(ReadFrom { repository: self.repository(repository)?, cluster: None });
        };
        // A name that is not in the file is one in the repository, but only where that was clearly meant.
        if !self.clusters.is_empty() && repository.is_none() {
            return self.cluster(Some(name)).and_then(|cluster| {
                let repository = self.repository_of(cluster)?;
                Ok(ReadFrom { repository, cluster: Some(cluster.name_in_repository.clone()) })
            });
        }
        let in_repository = name.parse().map_err(|source| ConfigError::Name { source })?;
        Ok(ReadFrom { repository: self.repository(repository)?, cluster: Some(in_repository) })
    }
}

/// What a command that restores may read from.
#[derive(Debug, Clone)]
pub struct ReadFromAny<'a> {
    /// The repositories that may hold the cluster, as listed: at least one.
    pub repositories: Vec<&'a RepositoryConfig>,
    /// The cluster's name in them; `None`: whatever single cluster they hold.
    pub cluster: Option<ClusterName>,
}

impl Config {
    /// As [`Config::read_from`], but without `repository` every repository of the cluster; where the file holds no
    /// cluster, every repository there is.
    pub fn read_from_any(
        &self,
        cluster: Option<&str>,
        repository: Option<&str>,
    ) -> Result<ReadFromAny<'_>, ConfigError> {
        if repository.is_none() && self.clusters.is_empty() && self.repositories.len() > 1 {
            let named = cluster.map(str::parse).transpose().map_err(|source| ConfigError::Name { source })?;
            return Ok(ReadFromAny { repositories: self.repositories.iter().collect(), cluster: named });
        }
        let one = self.read_from(cluster, repository)?;
        let configured = one.cluster.as_ref().filter(|_| repository.is_none()).and_then(|name| {
            // By its name in the file, where that was given.
            let named = |known: &&ClusterConfig| match cluster {
                Some(cluster) => known.name.as_str() == cluster,
                None => known.name_in_repository == *name,
            };
            self.clusters.iter().find(named)
        });
        let repositories = match configured {
            Some(configured) => self.repositories_of(configured)?,
            None => vec![one.repository],
        };
        Ok(ReadFromAny { repositories, cluster: one.cluster })
    }
}

fn pick<'a, T>(
    what: &'static str,
    option: &'static str,
    name: Option<&str>,
    all: &'a [T],
    name_of: impl Fn(&T) -> &str,
    file: &Path,
) -> Result<&'a T, ConfigError> {
    let names = || all.iter().map(|one| name_of(one).to_owned()).collect::<Vec<_>>();
    match (name, all) {
        (Some(name), all) => all.iter().find(|one| name_of(one) == name).ok_or_else(|| ConfigError::Unknown {
            what,
            name: name.to_owned(),
            names: names(),
            file: file.to_owned(),
        }),
        (None, [only]) => Ok(only),
        (None, []) => Err(ConfigError::None { what, file: file.to_owned() }),
        (None, _) => Err(ConfigError::Several { what, option, names: names() }),
    }
}
