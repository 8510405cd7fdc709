//! What `pgkeep run` does besides archiving: base backups by schedule, metrics and health, alerts.
//!
//! What lies in the repositories, and the slot, is looked at rarely, by a connection and by requests of its own, and only
//! where somebody wants to know: where `listen` or a channel is configured. Streaming waits for none of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::expire::Expiring;
use super::list::restorable;
use super::mend::Backups;
use super::scheduled::Scheduling;
use super::standing::missing;
use super::{CliError, open, several};
use crate::archive::{ClusterStatus, Source};
use crate::catalog::Repository;
use crate::catalog::inventory::Hole;
use crate::catalog::verification::Outcome;
use crate::config::{ClusterConfig, Config, Schedule};
use crate::daemon::alert::{Active, watch_over};
use crate::daemon::expire::expire_daily;
use crate::daemon::health::{
    Attempts, BackupFact, DrillFact, Facts, RepositoryFacts, SlotFacts, VerifiedFact, Watched, WatchedCluster,
};
use crate::daemon::http::serve;
use crate::daemon::schedule::{Scheduled, schedule};
use crate::pg::{Session, quote_literal};

/// How often the slot is asked for, at most.
const SLOT: Duration = Duration::from_secs(60);
/// For one look at one repository.
const DEADLINE: Duration = Duration::from_secs(300);
/// For asking the server.
const SERVER: Duration = Duration::from_secs(10);
/// Base backups that are remembered.
const BACKUPS: usize = 8;

/// One cluster that is cared for.
struct Cared<'a> {
    backups: &'a Backups<'a>,
    status: watch::Receiver<ClusterStatus>,
    facts: watch::Sender<Arc<Facts>>,
    scheduled: watch::Sender<Scheduled>,
    attempts: Arc<Attempts>,
}

/// Cares for these clusters until `stop`; a base backup that is under way then is given up, and its lease is let go.
pub(super) async fn care(
    clusters: &[(Backups<'_>, watch::Receiver<ClusterStatus>)],
    current: &watch::Sender<Arc<Config>>,
    stop: CancellationToken,
) {
    let cared: Vec<Cared<'_>> = clusters
        .iter()
        .map(|(backups, status)| Cared {
            backups,
            status: status.clone(),
            facts: watch::Sender::default(),
            scheduled: watch::Sender::default(),
            attempts: Arc::default(),
        })
        .collect();
    let active = watch::Sender::new(Arc::new(Vec::<Active>::new()));
    let watched = Watched {
        started_at: Timestamp::now(),
        clusters: cared.iter().map(Cared::watched).collect(),
        alerts: active.subscribe(),
    };
    let listen = watch::Sender::new(None);
    let _serving = AbortOnDropHandle::new(tokio::spawn(serve(listen.subscribe(), watched.clone())));
    let names: Vec<&ClusterConfig> = cared.iter().map(|of| of.backups.cluster).collect();
    let until_stop = async {
        let listening = async {
            let mut config = current.subscribe();
            loop {
                let wanted = config.borrow_and_update().daemon.listen;
                listen.send_if_modified(|now| std::mem::replace(now, wanted) != wanted);
                if config.changed().await.is_err() {
                    return;
                }
            }
        };
        let looking = join_all(cared.iter().map(|of| of.look(current.subscribe())));
        let following = join_all(cared.iter().map(|of| of.attempts.follow(of.status.clone())));
        let alerting = watch_over(&watched, current.subscribe(), &active);
        let expiring = expiring(&names, current.subscribe(), &stop);
        tokio::join!(listening, looking, following, alerting, expiring);
    };
    let scheduling = join_all(cared.iter().map(|of| of.schedule(current.subscribe(), stop.clone())));
    let besides = async {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = until_stop => {}
        }
    };
    tokio::join!(scheduling, besides);
}

/// Expires by the policies as they are now.
async fn expiring(clusters: &[&ClusterConfig], mut current: watch::Receiver<Arc<Config>>, stop: &CancellationToken) {
    loop {
        let config = Arc::clone(&current.borrow_and_update());
        let is_served = |of: &&ClusterConfig| clusters.iter().any(|served| served.name == of.name);
        let with_policy = config.clusters.iter().filter(is_served).filter(|of| !of.keep.is_empty());
        let expirers: Vec<Expiring<'_>> = with_policy.map(|cluster| Expiring { config: &config, cluster }).collect();
        let expiring = async {
            join_all(expirers.iter().map(|expirer| expire_daily(expirer, stop.clone()))).await;
            stop.cancelled().await;
        };
        tokio::select! {
            () = expiring => return,
            changed = current.changed() => if changed.is_err() { return },
        }
    }
}

/// Of the cluster that `of` is, as it is configured now.
fn now_of<'c>(config: &'c Config, of: &ClusterConfig) -> Option<&'c ClusterConfig> {
    config.clusters.iter().find(|cluster| cluster.name == of.name)
}

impl Cared<'_> {
    fn watched(&self) -> WatchedCluster {
        let cluster = self.backups.cluster;
        WatchedCluster {
            cluster: cluster.name.clone(),
            repositories: cluster.repositories.clone(),
            status: self.status.clone(),
            facts: self.facts.subscribe(),
            scheduled: self.scheduled.subscribe(),
            attempts: Arc::clone(&self.attempts),
        }
    }

    async fn schedule(&self, mut current: watch::Receiver<Arc<Config>>, stop: CancellationToken) {
        let wanted =
            |config: &Config| now_of(config, self.backups.cluster).map(|of| of.schedule.clone()).unwrap_or_default();
        let plan: watch::Sender<Schedule> = watch::Sender::new(wanted(&current.borrow()));
        let following = async {
            loop {
                if current.changed().await.is_err() {
                    return;
                }
                let next = wanted(&current.borrow_and_update());
                plan.send_if_modified(|plan| {
                    let differs = *plan != next;
                    *plan = next;
                    differs
                });
            }
        };
        let scheduling = Scheduling::new(self.backups);
        // Differs from process to process, and that is all it has to.
        let share = u8::try_from(std::process::id() % 256).unwrap_or(0);
        let clock = Timestamp::now;
        let task = schedule(&scheduling, plan.subscribe(), self.status.clone(), &self.scheduled, &clock, share, stop);
        tokio::pin!(task);
        tokio::select! {
            () = &mut task => return,
            () = following => {}
        }
        task.await;
    }

    /// Looks at the repositories and the server now and then, as long as somebody wants to know.
    async fn look(&self, mut current: watch::Receiver<Arc<Config>>) {
        let (mut opened, mut scheduled) = (BTreeMap::new(), self.scheduled.subscribe());
        let mut next_look = Instant::now();
        loop {
            let config = Arc::clone(&current.borrow_and_update());
            let is_wanted = config.daemon.listen.is_some() || !config.alerts.is_empty();
            if is_wanted {
                self.look_at_slot().await;
            }
            if is_wanted && Instant::now() >= next_look {
                self.look_at_repositories(&config, &mut opened).await;
                next_look = Instant::now() + config.daemon.refresh;
            }
            let was_running = scheduled.borrow_and_update().running;
            let pause = config.daemon.refresh.min(SLOT);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                changed = current.changed() => if changed.is_err() { return },
                ended = scheduled.wait_for(|now| was_running && !now.running) => {
                    if ended.is_err() { return }
                    next_look = Instant::now();
                }
                begun = begun(self.scheduled.subscribe()), if !was_running => {
                    if !begun { return }
                }
            }
        }
    }

    async fn look_at_repositories(&self, config: &Config, opened: &mut BTreeMap<String, Repository>) {
        let cluster = now_of(config, self.backups.cluster).unwrap_or(self.backups.cluster);
        for name in &cluster.repositories {
            let looked = tokio::time::timeout(DEADLINE, look_at(config, cluster, name, opened)).await;
            match looked {
                Ok(Ok(Some(facts))) => self.facts.send_modify(|known| {
                    let mut next = known.as_ref().clone();
                    next.repositories.retain(|other| other.repository != *name);
                    next.repositories.push(facts);
                    *known = Arc::new(next);
                }),
                Ok(Ok(None)) => {} // nothing is archived yet
                Ok(Err(error)) => {
                    opened.remove(name);
                    tracing::debug!("what lies in repository {name} is not known: {}", error.sentence());
                }
                Err(_) => {
                    opened.remove(name);
                    tracing::debug!(
                        "what lies in repository {name} is not known: no answer within {} s",
                        DEADLINE.as_secs()
                    );
                }
            }
        }
    }

    async fn look_at_slot(&self) {
        let streams = || matches!(&*self.status.borrow(), ClusterStatus::Streaming(_));
        let before = streams();
        let asked = match tokio::time::timeout(SERVER, slot(&self.backups.source)).await {
            Ok(asked) => asked,
            Err(_) => Err(format!("no answer within {} s", SERVER.as_secs())),
        };
        self.facts.send_modify(|known| {
            let mut next = known.as_ref().clone();
            match asked {
                // One that is not there is made when the archiver connects.
                Ok(slot) if slot.exists || (before && streams()) => (next.slot, next.slot_unknown) = (Some(slot), None),
                Ok(_) => {}
                Err(why) => (next.slot, next.slot_unknown) = (None, Some(why)),
            }
            *known = Arc::new(next);
        });
    }
}

/// Waits until a base backup begins; `false`: none will.
async fn begun(mut scheduled: watch::Receiver<Scheduled>) -> bool {
    scheduled.wait_for(|now| now.running).await.is_ok()
}

async fn slot(source: &Source) -> Result<SlotFacts, String> {
    let text = |error: crate::pg::PgError| error.to_string();
    let mut session = Session::connect(&source.conninfo, &source.connect).await.map_err(text)?;
    let end = "CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_receive_lsn() \
               ELSE pg_catalog.pg_current_wal_lsn() END";
    let rows = session
        .query(&format!(
            "SELECT wal_status, safe_wal_size, pg_catalog.pg_wal_lsn_diff({end}, restart_lsn)::int8 \
             FROM pg_catalog.pg_replication_slots WHERE slot_name = {}",
            quote_literal(&source.slot)
        ))
        .await;
    session.close().await;
    let rows = rows.map_err(text)?;
    let number = |column: usize| -> Option<u64> {
        let value = rows.first()?.get(column)?.parse::<i64>().ok()?;
        Some(u64::try_from(value).unwrap_or(0))
    };
    Ok(SlotFacts {
        exists: !rows.is_empty(),
        wal_status: rows.first().and_then(|row| row.get(0)).map(str::to_owned),
        safe_bytes: number(1),
        kept_bytes: number(2),
    })
}

async fn look_at(
    config: &Config,
    cluster: &ClusterConfig,
    name: &str,
    opened: &mut BTreeMap<String, Repository>,
) -> Result<Option<RepositoryFacts>, CliError> {
    let repository = match opened.get(name) {
        Some(repository) => repository.clone(),
        None => match several::open_one(config.repository(Some(name))?).await? {
            Ok(repository) => {
                opened.insert(name.to_owned(), repository.clone());
                repository
            }
            Err(away) => return Err(CliError::failed(anyhow::anyhow!("{}", away.why))),
        },
    };
    let in_store = open::repository_error;
    let ids = repository.clusters_named(&cluster.name_in_repository).await.map_err(in_store)?;
    let Some(id) = ids.last() else { return Ok(None) };
    let (inventory, holes) = missing(&repository, id).await.map_err(in_store)?;
    let window = restorable(&inventory);
    let frontier_time =
        inventory.branches.values().filter_map(|branch| branch.note_of_newest.as_ref()?.server_time).max();
    let backups = inventory.backups.iter().rev().take(BACKUPS).map(|backup| BackupFact {
        label: backup.label,
        started_at: backup.started_at,
        took_seconds: backup.stopped_at.duration_since(backup.started_at).as_secs_f64(),
        bytes: backup.bytes,
        stored_bytes: backup.stored_bytes,
        flagged: backup.flagged.is_some(),
    });
    let verified = repository.newest_verification(id).await.map_err(in_store)?.map(|newest| VerifiedFact {
        at: newest.ended_at,
        whole_since: newest.oldest_read,
        unread_objects: newest.unread_objects,
        findings: newest.findings.len() as u64 + newest.more_findings,
    });
    let drill = repository.drills(id, 1).await.map_err(in_store)?.pop().map(|(_, drill)| DrillFact {
        at: drill.began_at,
        passed: drill.verdict == Outcome::Passed,
        failure: drill.failure().map(|check| format!("{}: {}", check.check, check.found)),
    });
    let facts = RepositoryFacts {
        repository: name.to_owned(),
        looked_at: repository.now(),
        backups: backups.collect(),
        backup_count: inventory.backups.len(),
        oldest_backup: inventory.backups.first().map(|backup| backup.label),
        window_from: window.from_time,
        window_to: window.from_time.and(window.complete_at.or(frontier_time.map(|time| time.to_timestamp()))),
        promised_seconds: cluster.keep.get(name).map(|keep| keep.window.as_secs()),
        gaps: 0,
        gap_words: Vec::new(),
        damaged: inventory.damaged.len(),
        verified,
        verify_within_seconds: cluster.verify.within.map(|within| within.as_secs()),
        drill,
        drill_every_seconds: cluster.drill.as_ref().and_then(|drill| drill.every).map(|every| every.as_secs()),
    };
    Ok(Some(facts.with_gaps(holes.iter().map(Hole::to_string))))
}
