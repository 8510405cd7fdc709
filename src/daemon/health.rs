//! What `pgkeep run` knows of itself: one picture, from which the metrics page, `/status.json` and the alerts are made.
//!
//! The picture is plain values, taken when somebody asks; what lies in the repositories is looked at rarely, by another task,
//! and remembered. [`metrics`] is pure. Names and units are those of OpenMetrics: seconds, bytes, `_total` for what only grows.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::alert::Active;
use super::schedule::Scheduled;
use crate::archive::{ClusterStatus, Doing, Progress};
use crate::store::counts::{Counts, counts};
use crate::types::{BackupLabel, ClusterName, Lsn};

/// Gaps that are shown in words.
const GAPS_SHOWN: usize = 5;

/// Everything at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct Picture {
    /// Of this program.
    pub version: &'static str,
    /// When this process began.
    pub started_at: Timestamp,
    /// When this was asked.
    pub at: Timestamp,
    /// Resident memory.
    pub memory_bytes: Option<u64>,
    /// Requests to stores, of this process.
    pub store: Counts,
    /// By name.
    pub clusters: Vec<ClusterPicture>,
    /// What is wrong, as it was told.
    pub alerts: Vec<Active>,
}

/// One cluster.
#[derive(Debug, Clone, Serialize)]
pub struct ClusterPicture {
    /// Its name in the configuration.
    pub cluster: String,
    /// `connecting`, `streaming` or `waiting`.
    pub state: &'static str,
    /// Why it waits.
    pub reason: Option<String>,
    /// Since the stream ended, or since the start; `None` while streaming.
    pub not_streaming_seconds: Option<u64>,
    /// Attempts to archive that ended.
    pub failed_attempts: u64,
    /// While streaming.
    pub stream: Option<StreamPicture>,
    /// In the configuration's order.
    pub repositories: Vec<RepositoryPicture>,
    /// Its schedule.
    pub backup: Scheduled,
    /// The replication slot, as the server says.
    pub slot: Option<SlotFacts>,
    /// Why the server could not be asked about it.
    pub slot_unknown: Option<String>,
}

/// How far the stream is.
#[derive(Debug, Clone, Serialize)]
pub struct StreamPicture {
    /// The history.
    pub branch: String,
    /// End of what the server has.
    pub server_end: Lsn,
    /// End of what has come in.
    pub received: Lsn,
    /// End of what as many repositories hold as are needed.
    pub durable: Lsn,
    /// What would be lost with the server now: WAL that it has and too few repositories hold.
    pub exposure_bytes: u64,
    /// How long the oldest of it that has come in has waited.
    pub exposure_seconds: f64,
    /// From arrival to durable, lately: median and 99th percentile.
    pub latency_seconds: Option<(f64, f64)>,
}

/// One repository of a cluster.
#[derive(Debug, Clone, Serialize)]
pub struct RepositoryPicture {
    /// Its name in the configuration.
    pub repository: String,
    /// `live`, `filling`, `away`, `refused`; `unknown` while nothing streams.
    pub doing: &'static str,
    /// Why it is away, or refused.
    pub reason: Option<String>,
    /// End of what is durable there.
    pub frontier: Option<Lsn>,
    /// What has come in and is not durable there.
    pub lag_bytes: Option<u64>,
    /// How long the oldest of it has waited.
    pub lag_seconds: Option<u64>,
    /// What lies in it, as it was looked at last.
    pub facts: Option<RepositoryFacts>,
}

/// What lies in a repository.
#[derive(Debug, Clone, Serialize)]
pub struct RepositoryFacts {
    /// Its name in the configuration.
    pub repository: String,
    /// When.
    pub looked_at: Timestamp,
    /// The newest base backups, newest first, a few.
    pub backups: Vec<BackupFact>,
    /// All complete ones.
    pub backup_count: usize,
    /// The oldest one of any kind.
    pub oldest_backup: Option<BackupLabel>,
    /// From here on the cluster can be restored without a hole.
    pub window_from: Option<Timestamp>,
    /// Up to here, as far as is known without reading WAL.
    pub window_to: Option<Timestamp>,
    /// How far back `keep` promises, in seconds.
    pub promised_seconds: Option<i64>,
    /// Missing WAL behind the oldest base backup.
    pub gaps: usize,
    /// The first of them in words.
    pub gap_words: Vec<String>,
    /// Objects that do not open.
    pub damaged: usize,
    /// What the newest verification said; `None`: there was none.
    pub verified: Option<VerifiedFact>,
    /// Everything is to be opened once within so long, in seconds.
    pub verify_within_seconds: Option<i64>,
    /// How the newest drill from it went; `None`: there was none.
    pub drill: Option<DrillFact>,
    /// A drill is to be done so often, in seconds.
    pub drill_every_seconds: Option<i64>,
}

/// A verification of a repository.
#[derive(Debug, Clone, Serialize)]
pub struct VerifiedFact {
    /// When it ended.
    pub at: Timestamp,
    /// Every object that was ever opened was found whole since then.
    pub whole_since: Option<Timestamp>,
    /// Objects that were never opened.
    pub unread_objects: u64,
    /// What was wrong.
    pub findings: u64,
}

/// A drill.
#[derive(Debug, Clone, Serialize)]
pub struct DrillFact {
    /// When it began.
    pub at: Timestamp,
    /// It found everything as it should be.
    pub passed: bool,
    /// What it found to be wrong.
    pub failure: Option<String>,
}

impl RepositoryFacts {
    /// Keeps a few of `words`.
    pub fn with_gaps(self, words: impl ExactSizeIterator<Item = String>) -> RepositoryFacts {
        RepositoryFacts { gaps: words.len(), gap_words: words.take(GAPS_SHOWN).collect(), ..self }
    }
}

/// A base backup.
#[derive(Debug, Clone, Serialize)]
pub struct BackupFact {
    /// Its name.
    pub label: BackupLabel,
    /// When it began.
    pub started_at: Timestamp,
    /// How long it took.
    pub took_seconds: f64,
    /// Size of its files.
    pub bytes: u64,
    /// What it added to the repository.
    pub stored_bytes: u64,
    /// Pages had wrong checksums.
    pub flagged: bool,
}

/// The replication slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SlotFacts {
    /// It is there.
    pub exists: bool,
    /// `reserved`, `extended`, `unreserved`, `lost`.
    pub wal_status: Option<String>,
    /// WAL that the server may still write before the slot is lost, where that is limited.
    pub safe_bytes: Option<u64>,
    /// WAL that it keeps for us.
    pub kept_bytes: Option<u64>,
}

/// What is looked at now and then.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Repositories that answered, once at least.
    pub repositories: Vec<RepositoryFacts>,
    /// `None`: not asked yet, or the server does not say.
    pub slot: Option<SlotFacts>,
    /// Why it does not.
    pub slot_unknown: Option<String>,
}

/// What is counted of a cluster while it is archived.
#[derive(Debug)]
pub struct Attempts {
    failed: AtomicU64,
    not_streaming_since: Mutex<Option<Instant>>,
}

impl Default for Attempts {
    fn default() -> Attempts {
        Attempts { failed: AtomicU64::new(0), not_streaming_since: Mutex::new(Some(Instant::now())) }
    }
}

impl Attempts {
    /// Counts until nobody archives any more.
    pub async fn follow(&self, mut status: watch::Receiver<ClusterStatus>) {
        loop {
            let streams = match &*status.borrow_and_update() {
                ClusterStatus::Streaming(_) => Some(true),
                ClusterStatus::Waiting { .. } => Some(false),
                ClusterStatus::Connecting => None,
            };
            {
                let mut since = self.not_streaming_since.lock().unwrap_or_else(PoisonError::into_inner); // one value
                match streams {
                    Some(true) => *since = None,
                    Some(false) => {
                        self.failed.fetch_add(1, Ordering::Relaxed);
                        since.get_or_insert_with(Instant::now);
                    }
                    None => drop(since.get_or_insert_with(Instant::now)),
                }
            }
            if status.changed().await.is_err() {
                return;
            }
        }
    }
}

/// One cluster, as it is watched.
#[derive(Debug, Clone)]
pub struct WatchedCluster {
    /// Its name in the configuration.
    pub cluster: ClusterName,
    /// Its repositories, in the configuration's order.
    pub repositories: Vec<String>,
    /// What the archiver does.
    pub status: watch::Receiver<ClusterStatus>,
    /// What lies in the repositories.
    pub facts: watch::Receiver<Arc<Facts>>,
    /// How the schedule stands.
    pub scheduled: watch::Receiver<Scheduled>,
    /// What is counted.
    pub attempts: Arc<Attempts>,
}

/// Everything that is watched. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Watched {
    /// When this process began.
    pub started_at: Timestamp,
    /// All clusters.
    pub clusters: Vec<WatchedCluster>,
    /// What is wrong.
    pub alerts: watch::Receiver<Arc<Vec<Active>>>,
}

impl Watched {
    /// How it is now.
    pub fn picture(&self, at: Timestamp) -> Picture {
        Picture {
            version: env!("CARGO_PKG_VERSION"),
            started_at: self.started_at,
            at,
            memory_bytes: resident_bytes(),
            store: counts(),
            clusters: self.clusters.iter().map(WatchedCluster::picture).collect(),
            alerts: self.alerts.borrow().as_ref().clone(),
        }
    }

    /// Does every cluster stream?
    pub fn is_ready(&self) -> bool {
        self.clusters.iter().all(|cluster| matches!(&*cluster.status.borrow(), ClusterStatus::Streaming(_)))
    }
}

impl WatchedCluster {
    fn picture(&self) -> ClusterPicture {
        let status = self.status.borrow().clone();
        let facts = Arc::clone(&self.facts.borrow());
        let (state, reason) = match &status {
            ClusterStatus::Connecting => ("connecting", None),
            ClusterStatus::Streaming(_) => ("streaming", None),
            ClusterStatus::Waiting { reason } => ("waiting", Some(reason.clone())),
        };
        let since = *self.attempts.not_streaming_since.lock().unwrap_or_else(PoisonError::into_inner); // one value
        let progress = match &status {
            ClusterStatus::Streaming(progress) => Some(progress),
            _ => None,
        };
        let repositories = self.repositories.iter().map(|name| repository(name, progress, &facts)).collect();
        ClusterPicture {
            cluster: self.cluster.to_string(),
            state,
            reason,
            not_streaming_seconds: since.filter(|_| progress.is_none()).map(|since| since.elapsed().as_secs()),
            failed_attempts: self.attempts.failed.load(Ordering::Relaxed),
            stream: progress.map(stream),
            repositories,
            backup: self.scheduled.borrow().clone(),
            slot: facts.slot.clone(),
            slot_unknown: facts.slot_unknown.clone(),
        }
    }
}

fn stream(progress: &Progress) -> StreamPicture {
    let server_end = progress.server_end.max(progress.received);
    StreamPicture {
        branch: progress.branch.to_string(),
        server_end,
        received: progress.received,
        durable: progress.durable,
        exposure_bytes: server_end.bytes_since(progress.durable).unwrap_or(0),
        exposure_seconds: progress.behind.as_secs_f64(),
        latency_seconds: progress.latency.map(|latency| (latency.p50.as_secs_f64(), latency.p99.as_secs_f64())),
    }
}

fn repository(name: &str, progress: Option<&Progress>, facts: &Facts) -> RepositoryPicture {
    let known = progress.and_then(|progress| progress.repositories.iter().find(|known| *known.name == *name));
    let (doing, reason) = match known.map(|known| &known.doing) {
        None => ("unknown", None),
        Some(Doing::Live) => ("live", None),
        Some(Doing::Filling) => ("filling", None),
        Some(Doing::Away { reason }) => ("away", Some(reason.to_string())),
        Some(Doing::Refused { reason }) => ("refused", Some(reason.to_string())),
    };
    RepositoryPicture {
        repository: name.to_owned(),
        doing,
        reason,
        frontier: known.and_then(|known| known.frontier),
        lag_bytes: known.and_then(|known| known.lag_bytes),
        lag_seconds: known.map(|known| known.lag_seconds),
        facts: facts.repositories.iter().find(|facts| facts.repository == name).cloned(),
    }
}

/// Of this process, by Linux.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// A page of the text format that Prometheus reads.
struct Page(String);

impl Page {
    /// One metric with all of its samples: labels as they are shown, and values. Without any it is left out.
    fn add(&mut self, name: &str, kind: &str, help: &str, samples: impl IntoIterator<Item = (String, f64)>) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}"); // a String takes all
        for (labels, value) in samples {
            let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
            let _ = writeln!(self.0, "{name}{labels} {value}");
        }
    }
}

/// `name="value"`, with what would end the value escaped.
fn label(name: &str, value: &str) -> String {
    format!("{name}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

fn seconds(at: Timestamp) -> f64 {
    at.as_millisecond() as f64 / 1000.0
}

fn seconds_of(length: SignedDuration) -> f64 {
    length.as_millis() as f64 / 1000.0
}

/// The metrics page. Pure.
pub fn metrics(picture: &Picture) -> String {
    let mut page = Page(String::new());
    page.add("pgkeep_build_info", "gauge", "The version that runs.", [(label("version", picture.version), 1.0)]);
    page.add(
        "process_start_time_seconds",
        "gauge",
        "When this process began, since 1970.",
        [(String::new(), seconds(picture.started_at))],
    );
    let memory = picture.memory_bytes.map(|bytes| (String::new(), bytes as f64));
    page.add("process_resident_memory_bytes", "gauge", "Memory of this process.", memory);
    let Counts { retries, errors } = &picture.store;
    page.add(
        "pgkeep_store_retries_total",
        "counter",
        "Requests to stores that were tried again.",
        [(String::new(), *retries as f64)],
    );
    let errors = errors.iter().map(|(kind, count)| (label("kind", kind), *count as f64));
    page.add("pgkeep_store_errors_total", "counter", "Requests to stores that failed, each try, by kind.", errors);
    let alerts = picture.alerts.iter().map(|alert| {
        (
            format!(
                "{},{},{}",
                label("cluster", &alert.cluster),
                label("alert", alert.kind),
                label("about", &alert.about)
            ),
            1.0,
        )
    });
    page.add("pgkeep_alert_active", "gauge", "What is wrong now, as the channels are told.", alerts);
    clusters(&mut page, &picture.clusters);
    repositories(&mut page, picture);
    page.0
}

fn clusters(page: &mut Page, clusters: &[ClusterPicture]) {
    let mut each = |name, kind, help, value: &dyn Fn(&ClusterPicture) -> Option<f64>| {
        let samples = clusters.iter().filter_map(|of| Some((label("cluster", &of.cluster), value(of)?)));
        page.add(name, kind, help, samples);
    };
    each("pgkeep_streaming", "gauge", "1 while WAL is streamed.", &|of| Some(f64::from(u8::from(of.stream.is_some()))));
    each("pgkeep_failed_attempts_total", "counter", "Attempts to archive that ended.", &|of| {
        Some(of.failed_attempts as f64)
    });
    each("pgkeep_exposure_bytes", "gauge", "WAL that the server has and too few repositories hold.", &|of| {
        of.stream.as_ref().map(|stream| stream.exposure_bytes as f64)
    });
    each("pgkeep_exposure_seconds", "gauge", "How long the oldest WAL waits that too few repositories hold.", &|of| {
        match &of.stream {
            Some(stream) => Some(stream.exposure_seconds),
            None => of.not_streaming_seconds.map(|seconds| seconds as f64),
        }
    });
    each("pgkeep_received_lsn_bytes", "gauge", "End of the WAL that has come in, as a number of bytes.", &|of| {
        of.stream.as_ref().map(|stream| stream.received.get() as f64)
    });
    each("pgkeep_durable_lsn_bytes", "gauge", "End of the WAL that as many repositories hold as are needed.", &|of| {
        of.stream.as_ref().map(|stream| stream.durable.get() as f64)
    });
    each("pgkeep_latency_p99_seconds", "gauge", "From arrival to durable, lately.", &|of| {
        of.stream.as_ref()?.latency_seconds.map(|latency| latency.1)
    });
    each("pgkeep_backup_running", "gauge", "1 while this process takes a base backup by schedule.", &|of| {
        Some(f64::from(u8::from(of.backup.running)))
    });
    each("pgkeep_backup_next_timestamp_seconds", "gauge", "When the next base backup is due.", &|of| {
        of.backup.next.map(seconds)
    });
    each("pgkeep_restore_estimated_seconds", "gauge", "What a restore of the newest instant may take.", &|of| {
        of.backup.restore_seconds
    });
    each("pgkeep_slot_kept_bytes", "gauge", "WAL that the server keeps for the slot.", &|of| {
        of.slot.as_ref()?.kept_bytes.map(|bytes| bytes as f64)
    });
    each("pgkeep_slot_safe_bytes", "gauge", "WAL that may still be written before the slot is lost.", &|of| {
        of.slot.as_ref()?.safe_bytes.map(|bytes| bytes as f64)
    });
}

fn repositories(page: &mut Page, picture: &Picture) {
    let all: Vec<(String, &RepositoryPicture)> = picture
        .clusters
        .iter()
        .flat_map(|cluster| cluster.repositories.iter().map(move |repository| (cluster, repository)))
        .map(|(cluster, of)| {
            (format!("{},{}", label("cluster", &cluster.cluster), label("repository", &of.repository)), of)
        })
        .collect();
    let mut each = |name, help, value: &dyn Fn(&RepositoryPicture) -> Option<f64>| {
        page.add(name, "gauge", help, all.iter().filter_map(|(labels, of)| Some((labels.clone(), value(of)?))));
    };
    each("pgkeep_repository_live", "1 while it gets what comes in.", &|of| {
        (of.doing != "unknown").then(|| f64::from(u8::from(of.doing == "live")))
    });
    each("pgkeep_repository_frontier_lsn_bytes", "End of the WAL that is durable there.", &|of| {
        of.frontier.map(|lsn| lsn.get() as f64)
    });
    each("pgkeep_repository_lag_bytes", "WAL that has come in and is not durable there.", &|of| {
        of.lag_bytes.map(|bytes| bytes as f64)
    });
    each("pgkeep_repository_lag_seconds", "How long the oldest of it has waited.", &|of| {
        of.lag_seconds.map(|seconds| seconds as f64)
    });
    let newest = |of: &RepositoryPicture| of.facts.as_ref()?.backups.first().cloned();
    each("pgkeep_backup_last_timestamp_seconds", "When the newest base backup began.", &|of| {
        newest(of).map(|backup| seconds(backup.started_at))
    });
    each("pgkeep_backup_last_duration_seconds", "How long it took.", &|of| {
        newest(of).map(|backup| backup.took_seconds)
    });
    each("pgkeep_backup_last_size_bytes", "Size of its files.", &|of| newest(of).map(|backup| backup.bytes as f64));
    each("pgkeep_backup_last_stored_bytes", "What it added to the repository.", &|of| {
        newest(of).map(|backup| backup.stored_bytes as f64)
    });
    each("pgkeep_backups", "Complete base backups.", &|of| of.facts.as_ref().map(|facts| facts.backup_count as f64));
    each("pgkeep_window_start_timestamp_seconds", "From here on the cluster can be restored without a hole.", &|of| {
        of.facts.as_ref()?.window_from.map(seconds)
    });
    each("pgkeep_window_end_timestamp_seconds", "Up to here, when it was looked at.", &|of| {
        of.facts.as_ref()?.window_to.map(seconds)
    });
    each("pgkeep_window_promised_seconds", "How far back the policy promises every instant.", &|of| {
        of.facts.as_ref()?.promised_seconds.map(|seconds| seconds as f64)
    });
    each("pgkeep_gaps", "Missing WAL behind the oldest base backup.", &|of| {
        of.facts.as_ref().map(|facts| facts.gaps as f64)
    });
    each("pgkeep_damaged_objects", "Objects that cannot be used.", &|of| {
        of.facts.as_ref().map(|facts| facts.damaged as f64)
    });
    let verified = |of: &RepositoryPicture| of.facts.as_ref()?.verified.clone();
    each("pgkeep_verified_timestamp_seconds", "When names, lengths and records were last found to fit.", &|of| {
        verified(of).map(|verified| seconds(verified.at))
    });
    each(
        "pgkeep_verified_whole_since_timestamp_seconds",
        "Each object that was ever opened was whole since then.",
        &|of| verified(of)?.whole_since.map(seconds),
    );
    each("pgkeep_verified_unread_objects", "Objects that were never opened.", &|of| {
        verified(of).map(|verified| verified.unread_objects as f64)
    });
    each("pgkeep_verification_findings", "What the last verification found to be wrong.", &|of| {
        verified(of).map(|verified| verified.findings as f64)
    });
    let drill = |of: &RepositoryPicture| of.facts.as_ref()?.drill.clone();
    each("pgkeep_drill_last_timestamp_seconds", "When the last drill began.", &|of| {
        drill(of).map(|drill| seconds(drill.at))
    });
    each("pgkeep_drill_last_passed", "1 where it found everything as it should be.", &|of| {
        drill(of).map(|drill| f64::from(u8::from(drill.passed)))
    });
    each("pgkeep_looked_age_seconds", "How old what is said of the repository's content is.", &|of| {
        of.facts.as_ref().map(|facts| seconds_of(picture.at.duration_since(facts.looked_at)))
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_cannot_break_out() {
        assert_eq!(label("about", "a\"b\\c\nd"), r#"about="a\"b\\c\nd""#);
        let mut page = Page(String::new());
        page.add("x", "gauge", "Nothing.", Vec::new());
        assert!(page.0.is_empty(), "a metric without samples is left out");
        page.add("x_total", "counter", "Some.", [(String::new(), 3.0), (label("kind", "b"), 0.5)]);
        assert_eq!(page.0, "# HELP x_total Some.\n# TYPE x_total counter\nx_total 3\nx_total{kind=\"b\"} 0.5\n");
    }
}
