//! The base backups that `pgkeep run` takes by itself: where `pgkeep backup` would put them, and copied as it would.

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::backup::{CopyOf, copy_to, first_that_answers, note, note_names};
use super::several::open_all;
use super::{CliError, Context};
use crate::archive::Source;
use crate::backup::{BackupOptions, BackupProgress, BackupSource, backup};
use crate::catalog::Repository;
use crate::config::{ClusterConfig, Config};
use crate::daemon::mend::Mender;
use crate::pg::Session;
use crate::plan::{Need, needs_backup};
use crate::types::{Branch, ClusterName};

/// Of one cluster.
pub struct Backups<'a> {
    pub(super) context: &'a Context,
    pub(super) config: &'a Config,
    pub(super) cluster: &'a ClusterConfig,
    pub(super) source: Source,
}

impl<'a> Backups<'a> {
    /// `source` is where the cluster's WAL comes from.
    pub fn new(context: &'a Context, config: &'a Config, cluster: &'a ClusterConfig, source: Source) -> Backups<'a> {
        Backups { context, config, cluster, source }
    }

    async fn needed(&self, branch: Branch) -> Result<Need, CliError> {
        let several = open_all(&self.config.repositories_of(self.cluster)?).await?;
        let mut found = Need::NotYet;
        for (repository, _) in several.open {
            let in_store = super::open::repository_error;
            for id in repository.clusters_named(&self.cluster.name_in_repository).await.map_err(in_store)? {
                match needs_backup(&repository.load(&id).await.map_err(in_store)?, branch) {
                    need @ (Need::Gap(_) | Need::Branch(_)) => return Ok(need),
                    Need::Nothing => found = Need::Nothing,
                    Need::NotYet => {} // it may be on its way to being filled up
                }
            }
        }
        Ok(found)
    }

    /// Whoever takes one by hand, or makes a standby: two at a time only slow each other. A role that may not ask goes on.
    pub(super) async fn is_under_way(&self) -> bool {
        let asked = async {
            let mut session = Session::connect(&self.source.conninfo, &self.source.connect).await.ok()?;
            let rows = session.query("SELECT count(*) FROM pg_catalog.pg_stat_progress_basebackup").await;
            session.close().await;
            rows.ok()?.first()?.get(0)?.parse::<u64>().ok()
        };
        asked.await.is_some_and(|count| count > 0)
    }

    async fn take_one(&self, stop: CancellationToken) -> Result<String, CliError> {
        let (repository, _, away) = first_that_answers(self.context, self.config, self.cluster).await?;
        self.take_into(&repository, &away, &watch::Sender::new(BackupProgress::default()), stop).await
    }

    /// Takes one into this repository and copies it to the others, but those that are away.
    pub(super) async fn take_into(
        &self,
        repository: &Repository,
        away: &[CopyOf],
        progress: &watch::Sender<BackupProgress>,
        stop: CancellationToken,
    ) -> Result<String, CliError> {
        let source = BackupSource { conninfo: self.source.conninfo.clone(), connect: self.source.connect.clone() };
        let (cluster, options) = (&self.cluster.name_in_repository, BackupOptions::default());
        let manifest = backup(&source, repository, cluster, &options, progress, stop).await;
        let manifest = manifest.map_err(super::backup::backup_error);
        note(repository, cluster, &manifest).await;
        let manifest = manifest?;
        let names = note_names(&self.source, cluster, repository, &manifest.backup).await;
        for other in self.config.repositories_of(self.cluster)? {
            if other.name == repository.name() || away.iter().any(|away| away.repository == other.name) {
                continue;
            }
            if let Err((_, why)) = copy_to(self.context, repository, other, &manifest, names.as_ref(), cluster).await {
                let label = manifest.backup.label;
                tracing::warn!(cluster = %self.cluster.name, "base backup {label} is not in repository {}: {why}", other.name);
            }
        }
        Ok(manifest.backup.label.to_string())
    }
}

#[async_trait(?Send)]
impl Mender for Backups<'_> {
    fn cluster(&self) -> &ClusterName {
        &self.cluster.name
    }

    async fn look(&self, branch: Branch) -> Result<Need, String> {
        self.needed(branch).await.map_err(|error| error.sentence())
    }

    async fn take(&self, stop: CancellationToken) -> Result<String, String> {
        if self.is_under_way().await {
            return Err("another base backup of this server is under way".to_owned());
        }
        self.take_one(stop).await.map_err(|error| error.sentence())
    }
}
