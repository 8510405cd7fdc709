//! The events of `pgkeep run`: what the archiver of a cluster goes through, noted in each of its repositories.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;

use super::several::open_all;
use super::{CliError, open};
use crate::catalog::Repository;
use crate::catalog::events::Happened;
use crate::config::{ClusterConfig, Config};
use crate::daemon::events::Chronicler;
use crate::types::{Branch, ClusterId, Lsn};

/// A cluster of which nothing is there yet gets its first object within some seconds.
const FIRST_OBJECT: (u32, Duration) = (30, Duration::from_secs(2));

/// Of one cluster.
pub(super) struct Chronicle<'a> {
    config: &'a Config,
    cluster: &'a ClusterConfig,
    /// By repository: gaps and conflicts that are known.
    known: Mutex<BTreeMap<String, BTreeSet<String>>>,
}

impl<'a> Chronicle<'a> {
    pub(super) fn new(config: &'a Config, cluster: &'a ClusterConfig) -> Chronicle<'a> {
        Chronicle { config, cluster, known: Mutex::default() }
    }

    /// The cluster in every repository that answers. One that was made anew under the same name has several identities, and
    /// which one is streamed is not known here: of those nothing is noted.
    async fn places(&self, tries: u32) -> Result<Vec<(Repository, ClusterId)>, CliError> {
        for left in (0..tries).rev() {
            let several = open_all(&self.config.repositories_of(self.cluster)?).await?;
            let mut places = Vec::new();
            for (repository, _) in several.open {
                let ids = repository.clusters_named(&self.cluster.name_in_repository).await;
                if let [id] = ids.map_err(open::repository_error)?.as_slice() {
                    places.push((repository, id.clone()));
                }
            }
            if !places.is_empty() || left == 0 {
                return Ok(places);
            }
            tokio::time::sleep(FIRST_OBJECT.1).await;
        }
        Ok(Vec::new())
    }

    async fn note(&self, tries: u32, event: Happened) -> Result<(), CliError> {
        for (repository, id) in self.places(tries).await? {
            if !repository.has_events(&id).await.map_err(open::repository_error)? {
                repository.note_event(&id, Happened::ClusterCreated { system: id.system }).await;
            }
            repository.note_event(&id, event.clone()).await;
        }
        Ok(())
    }

    /// Gaps and conflicts that came up. Conflicts that are there at the first look were told by whoever met them.
    async fn noticed(&self) -> Result<(), CliError> {
        for (repository, id) in self.places(1).await? {
            let mut known = self.known.lock().await;
            let first = !known.contains_key(repository.name());
            let known = known.entry(repository.name().to_owned()).or_default();
            let noticed = repository.newly_noticed(&id, known).await.map_err(open::repository_error)?;
            for event in noticed.into_iter().filter(|event| !(first && matches!(event, Happened::Conflict { .. }))) {
                repository.note_event(&id, event).await;
            }
        }
        Ok(())
    }

    fn tell(&self, done: Result<(), CliError>) {
        if let Err(error) = done {
            tracing::warn!(cluster = %self.cluster.name, "not noted among the events: {}", error.sentence());
        }
    }
}

#[async_trait(?Send)]
impl Chronicler for Chronicle<'_> {
    async fn began(&self, branch: Branch, at: Lsn) {
        self.tell(self.note(FIRST_OBJECT.0, Happened::StreamBegan { branch, at }).await);
        self.tell(self.noticed().await);
    }

    async fn ended(&self, branch: Branch, durable: Lsn, reason: &str) {
        self.tell(self.note(1, Happened::StreamEnded { branch, durable, reason: reason.to_owned() }).await);
    }

    async fn look(&self) {
        self.tell(self.noticed().await);
    }
}
