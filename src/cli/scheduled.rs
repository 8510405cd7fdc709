//! Base backups by schedule: what the repositories hold, the lease of who takes one, and what `pgkeep list` shows of both.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::backup::first_that_answers;
use super::mend::Backups;
use super::plan::replayed;
use super::several::open_all;
use super::{CliError, open, output};
use crate::backup::BackupProgress;
use crate::catalog::layout::LeaseName;
use crate::catalog::lease::{BEAT, EXPIRES, Verdict, Watcher};
use crate::catalog::retention::LeaseRecord;
use crate::catalog::{CatalogError, Repository};
use crate::config::Schedule;
use crate::daemon::schedule::{Held, Known, Newest, Taker, due};
use crate::plan::Sample;
use crate::restore::measure;
use crate::types::{BackupLabel, ClusterId, ClusterName, Id128};

/// What the lease is called.
const LEASE: &str = "backup";
/// A repository that does not take a beat, or let one go, within so long is left.
const DEADLINE: Duration = Duration::from_secs(30);

/// Of one cluster.
pub struct Scheduling<'a> {
    backups: &'a Backups<'a>,
    began: Instant,
    watcher: Mutex<Watcher>,
    /// What was there when it was looked at last.
    seen: Mutex<BTreeSet<BackupLabel>>,
    /// Measured once for each base backup.
    sample: Mutex<Option<(BackupLabel, Option<Sample>)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // whole values alone
}

impl<'a> Scheduling<'a> {
    /// By means of `backups`.
    pub fn new(backups: &'a Backups<'a>) -> Scheduling<'a> {
        let (watcher, seen, sample) = (Mutex::default(), Mutex::default(), Mutex::default());
        Scheduling { backups, began: Instant::now(), watcher, seen, sample }
    }

    async fn id_in(&self, repository: &Repository) -> Result<Option<ClusterId>, CatalogError> {
        let ids = repository.clusters_named(&self.backups.cluster.name_in_repository).await?;
        Ok(ids.into_iter().next_back())
    }

    async fn held(&self, newest: bool) -> Result<Option<Held>, CliError> {
        let several = open_all(&self.backups.config.repositories_of(self.backups.cluster)?).await?;
        let (mut all, mut is_archived, mut best) = (BTreeSet::new(), false, None);
        for (repository, _) in several.open {
            let Some(id) = self.id_in(&repository).await.map_err(open::repository_error)? else { continue };
            let labels = repository.backup_labels(&id).await.map_err(open::repository_error)?;
            if let Some(last) = labels.last()
                && best.as_ref().is_none_or(|(_, _, best)| best < last)
            {
                best = Some((repository, id, *last));
            }
            is_archived = true;
            all.extend(labels);
        }
        lock(&self.seen).clone_from(&all);
        let newest = match best.filter(|_| newest) {
            Some((repository, id, label)) => self.newest(&repository, &id, label).await,
            None => None,
        };
        Ok(is_archived.then(|| Held { labels: all.into_iter().collect(), newest }))
    }

    /// `None` where it cannot be read: then only the clock says when.
    async fn newest(&self, repository: &Repository, id: &ClusterId, label: BackupLabel) -> Option<Newest> {
        let manifest = match repository.get_manifest(id, label).await {
            Ok(manifest) => manifest,
            Err(error) => {
                tracing::warn!("how long a restore takes is not known: {error}");
                return None;
            }
        };
        let known = *lock(&self.sample);
        let sample = match known.filter(|(of, _)| *of == label) {
            Some((_, sample)) => sample,
            None if repository.can_read() => measure(repository, id, &manifest).await.ok(),
            None => None,
        };
        *lock(&self.sample) = Some((label, sample));
        let info = &manifest.backup;
        let took = Duration::try_from(info.stopped_at.duration_since(info.started_at)).unwrap_or_default();
        let replayed = replayed(repository, id).await;
        Some(Newest { label, branch: info.branch, start: info.start, bytes: info.bytes, took, sample, replayed })
    }

    async fn take_one(&self, stop: CancellationToken) -> Result<Option<String>, CliError> {
        let in_store = open::repository_error;
        if self.backups.is_under_way().await {
            return Ok(None);
        }
        let (context, config, cluster) = (self.backups.context, self.backups.config, self.backups.cluster);
        let (repository, _, away) = first_that_answers(context, config, cluster).await?;
        let Some(id) = self.id_in(&repository).await.map_err(in_store)? else {
            let error =
                anyhow::anyhow!("repository {} holds nothing of cluster {} yet", repository.name(), cluster.name);
            return Err(CliError::failed(error));
        };
        let newest = repository.newest_beat(&id, LEASE).await.map_err(in_store)?;
        let Verdict::Free { epoch } = lock(&self.watcher).judge(newest.as_ref(), self.began.elapsed()) else {
            return Ok(None);
        };
        let record = LeaseRecord::new(LEASE, repository.writer(), repository.now());
        let Some(lease) = repository.take_lease(&id, LEASE, epoch, &record).await.map_err(in_store)? else {
            return Ok(None);
        };
        if let Some(stale) = newest.filter(|beat| beat.record.as_ref().is_none_or(|record| !record.released)) {
            let name = &stale.name;
            tracing::warn!(
                cluster = %cluster.name,
                "the lease of who takes base backups is taken over as epoch {epoch}: its holder (epoch {}) has not been heard of",
                name.epoch
            );
        }
        let progress = watch::Sender::new(BackupProgress::default());
        let mut holding = Holding { repository: &repository, id: &id, lease, record, heard: Instant::now() };
        // Somebody may have taken one between the look and the lease.
        let now = repository.backup_labels(&id).await.map_err(in_store)?;
        let is_new = {
            let seen = lock(&self.seen);
            now.iter().any(|label| !seen.contains(label))
        };
        if is_new {
            holding.release().await;
            return Ok(None);
        }
        let cancel = stop.child_token();
        let mut lost = None;
        let taken = {
            let mut work = Box::pin(self.backups.take_into(&repository, &away, &progress, cancel.clone()));
            let mut beating = Box::pin(holding.keep(&progress));
            loop {
                tokio::select! {
                    biased;
                    taken = &mut work => break taken,
                    why = &mut beating, if lost.is_none() => {
                        // What it has put is removed by itself; the other holder takes its own.
                        cancel.cancel();
                        lost = Some(why);
                    }
                }
            }
        };
        match lost {
            Some(why) => Err(CliError::failed(anyhow::anyhow!("{why}: the base backup was given up"))),
            None => {
                holding.release().await;
                taken.map(Some)
            }
        }
    }
}

/// A lease that is ours.
struct Holding<'a> {
    repository: &'a Repository,
    id: &'a ClusterId,
    lease: LeaseName,
    record: LeaseRecord,
    /// When the newest beat was put, by our own clock.
    heard: Instant,
}

impl Holding<'_> {
    /// Beats. Returns why it is ours no longer.
    async fn keep(&mut self, progress: &watch::Sender<BackupProgress>) -> String {
        loop {
            tokio::time::sleep(BEAT).await;
            {
                let progress = progress.borrow();
                self.record.progress = Some((progress.done, progress.total));
                self.record.backup = None; // what is not complete is nobody's to protect by a lease
            }
            match tokio::time::timeout(DEADLINE, self.beat()).await {
                Ok(Ok(true)) => self.heard = Instant::now(),
                Ok(Ok(false)) => return "another host has taken over the lease".to_owned(),
                Ok(Err(error)) => tracing::debug!(%error, "no beat of the lease"),
                Err(_) => tracing::debug!("no beat of the lease within {} s", DEADLINE.as_secs()),
            }
            // By now another host may take it for expired.
            if self.heard.elapsed() >= EXPIRES {
                return format!("the lease could not be kept for {} s", EXPIRES.as_secs());
            }
        }
    }

    async fn beat(&mut self) -> Result<bool, CatalogError> {
        if !self.repository.still_holds(self.id, &self.lease).await? {
            return Ok(false);
        }
        self.lease = self.repository.beat(self.id, &self.lease, &self.record).await?;
        Ok(true)
    }

    async fn release(&mut self) {
        self.record.released = true;
        match tokio::time::timeout(DEADLINE, self.beat()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the lease was not let go; it expires"),
            Err(_) => tracing::debug!("the lease was not let go; it expires"),
        }
    }
}

#[async_trait(?Send)]
impl Taker for Scheduling<'_> {
    fn cluster(&self) -> &ClusterName {
        &self.backups.cluster.name
    }

    async fn look(&self, newest: bool) -> Result<Option<Held>, String> {
        self.held(newest).await.map_err(|error| error.sentence())
    }

    async fn take(&self, stop: CancellationToken) -> Result<Option<String>, String> {
        self.take_one(stop).await.map_err(|error| error.sentence())
    }
}

/// What `pgkeep list` shows of a cluster's schedule.
#[derive(Debug, Default, Serialize)]
pub(super) struct ScheduleLine {
    /// When the next base backup is due; in the past: a running `pgkeep run` takes it now.
    pub next_backup: Option<Timestamp>,
    /// One is being taken by schedule.
    pub under_way: Option<UnderWay>,
}

/// A base backup that is being taken.
#[derive(Debug, Serialize)]
pub(super) struct UnderWay {
    /// The run of pgkeep that takes it.
    writer: Id128,
    /// Since when, by its clock.
    since: Timestamp,
    /// How often this lease has changed hands.
    epoch: u32,
    /// Bytes of files that had arrived at its last beat.
    done: Option<u64>,
    /// Bytes in all, by the server's estimate.
    total: Option<u64>,
}

impl ScheduleLine {
    /// Of what a repository holds.
    pub async fn of(
        repository: &Repository,
        id: &ClusterId,
        schedule: Option<&Schedule>,
        labels: &[BackupLabel],
    ) -> Result<ScheduleLine, CatalogError> {
        let (mut known, now) = (Known::default(), repository.now());
        known.observe(labels, now);
        let last = known.last(now);
        let when = schedule.and_then(|schedule| schedule.when.as_ref());
        let next_backup = when.and_then(|when| due(when, last, now));
        let beat = repository.newest_beat(id, LEASE).await?;
        let under_way = beat.and_then(|beat| {
            let record = beat.record.filter(|record| !record.released)?;
            let (done, total) = record.progress.unzip();
            let (writer, since, epoch) = (record.writer, record.began_at, beat.name.epoch);
            Some(UnderWay { writer, since, epoch, done, total: total.flatten() })
        });
        Ok(ScheduleLine { next_backup, under_way })
    }

    /// As lines for a person.
    pub fn lines(&self) -> Vec<String> {
        let next = self.next_backup.map(|next| format!("  Next backup      {}", output::time(next)));
        let under_way = self.under_way.as_ref().map(|of| {
            let how_far = match (of.done, of.total) {
                (Some(done), Some(total)) => format!(", {} of {}", output::bytes(done), output::bytes(total.max(done))),
                (Some(done), None) => format!(", {}", output::bytes(done)),
                (None, _) => String::new(),
            };
            format!("  Backup under way since {}{how_far}, by run {}", output::time(of.since), of.writer)
        });
        next.into_iter().chain(under_way).collect()
    }
}
