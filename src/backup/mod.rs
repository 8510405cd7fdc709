//! Base backups: tar in, extents out, packs, tables, and last of all the manifest that makes a backup exist.
//!
//! [`backup`] asks the server for BASE_BACKUP and takes its tar archives apart as they stream by ([`cut`] lays blocks
//! into packs, `objects` seals and puts them while more arrives), compares every file with the server's own manifest
//! ([`server_manifest`]), waits until the WAL that the backup needs is durable in the same repository, and puts the
//! manifest. It needs no access to the server's host and keeps nothing on ours.
//!
//! What always holds:
//! - A manifest is put only after everything it names is durable, every file's size and CRC-32C were those that the
//!   server says it sent, and every byte of WAL from the first of the start position's segment to the stop position
//!   lies in that repository, on the backup's own history (P2).
//! - Memory is bounded whatever the repository's pace and the cluster's size (P8), except for 24 bytes per file.
//! - Somebody else archives: a `pgkeep run`, or the command's own archiver beside this. Here WAL is only waited for.
//!
//! Crash and cancellation: [`backup`] may be dropped at any await. What is left is a `start` without a manifest and
//! objects that nothing references; the server has nothing to clean up. A name is never used again.
//! Protocol: <https://www.postgresql.org/docs/current/protocol-replication.html>

pub mod cut;
mod error;
mod objects;
mod receive;
pub mod server_manifest;
pub mod tags;
mod wal;

use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

pub use error::BackupError;

use self::cut::Cutter;
use self::objects::{LIMITS, Objects};
use self::receive::{Received, Receiver};
use self::wal::Needed;
use crate::catalog::layout::ClusterObject;
use crate::catalog::records::{BackupInfo, BackupStart, Manifest, ServerParameters};
use crate::catalog::{CatalogError, Repository};
use crate::pg::control_file::ControlFile;
use crate::pg::{
    BackupEvent, BaseBackup, BaseBackupOptions, CheckpointSpeed, ConnInfo, ConnectOptions, Replication, segment_digest,
};
use crate::seal::BlockTagger;
use crate::types::{BackupLabel, ClusterId, ClusterName, Digest, Lsn, SegmentSize, TimelineId};

/// How many names are tried, one a second, before we give up.
const LABELS: u32 = 10;
/// How many bytes arrive between two reports of progress.
const REPORT_EVERY: u64 = 4 << 20;
/// How long the server has for sending the segment that the backup ends in.
const DIGEST_DEADLINE: Duration = Duration::from_secs(300);
/// What is kept of the server's words about damaged pages.
const MAX_REASON_CHARS: usize = 2000;

/// Where a backup comes from.
#[derive(Debug, Clone)]
pub struct BackupSource {
    /// libpq's words. The role needs `REPLICATION`.
    pub conninfo: ConnInfo,
    /// How to connect.
    pub connect: ConnectOptions,
}

/// How a backup is taken.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// The checkpoint it begins with.
    pub checkpoint: CheckpointSpeed,
    /// Most kB (1024 bytes) per second that the server sends, 32 to 1048576; `None`: as fast as it goes.
    pub max_rate: Option<u32>,
    /// Should the server check page checksums, where the cluster has them?
    pub verify_checksums: bool,
    /// How long the server may send nothing, once data flows. Not for the checkpoint.
    pub silence: Duration,
}

impl Default for BackupOptions {
    fn default() -> Self {
        BackupOptions {
            checkpoint: CheckpointSpeed::Fast,
            max_rate: None,
            verify_checksums: true,
            silence: Duration::from_secs(300),
        }
    }
}

/// What a backup is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BackupPhase {
    /// Asking the server and the repository.
    #[default]
    Connecting,
    /// The server makes its checkpoint; nothing is sent meanwhile.
    Checkpoint,
    /// Files arrive.
    Receiving,
    /// All arrived; the last objects are being put.
    Storing,
    /// All is durable, but for the WAL up to this position.
    WaitingForWal {
        /// Where the backup is consistent.
        stop: Lsn,
        /// How far the repository's WAL goes; `None`: there is none yet.
        reached: Option<Lsn>,
    },
    /// The manifest is put.
    Done,
}

/// How far a backup is; the newest value counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BackupProgress {
    /// What it is doing.
    pub phase: BackupPhase,
    /// Its name, once it has one.
    pub label: Option<BackupLabel>,
    /// Bytes of files that have arrived.
    pub done: u64,
    /// Bytes in all by the server's estimate, once it said so.
    pub total: Option<u64>,
    /// Bytes of sealed objects that are durable.
    pub stored: u64,
}

/// Takes a base backup of the server and puts it into the repository under the cluster's name there.
///
/// Returns when its manifest is durable, which is after the WAL that it needs is: see that somebody archives it. A backup
/// of a server whose pages have wrong checksums is kept, and flagged in [`BackupInfo::flagged`].
///
/// # Errors
/// [`BackupError`]; there is no backup then. After a lost answer to its last put alone it may exist all the same.
pub async fn backup(
    source: &BackupSource,
    repository: &Repository,
    cluster: &ClusterName,
    options: &BackupOptions,
    progress: &watch::Sender<BackupProgress>,
    cancel: CancellationToken,
) -> Result<Manifest, BackupError> {
    // A task of its own, whoever calls: the thread that waits for the socket then is the one that reads it. Handed to
    // another thread for every 32 KiB, a fast server waits for us half of the time.
    let (source, cluster, options) = (source.clone(), cluster.clone(), options.clone());
    let (to, watched) = (repository.clone(), progress.clone());
    let prepared = async move { prepare(&source, &to, &cluster, &options, &watched).await };
    let (cluster, manifest) = tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(BackupError::Cancelled),
        prepared = AbortOnDropHandle::new(tokio::spawn(prepared)) => prepared.map_err(BackupError::task)??,
    };
    // From here on nothing stops it: it is one put, and then the backup is there.
    repository.put_manifest(&cluster, &manifest).await?;
    progress.send_modify(|progress| progress.phase = BackupPhase::Done);
    let BackupInfo { label, start, stop, bytes, stored_bytes, .. } = &manifest.backup;
    tracing::info!(cluster = %cluster, %label, %start, %stop, bytes, stored_bytes, "the base backup is complete");
    Ok(manifest)
}

/// Everything but the manifest's put: all that it names is durable, and so is the WAL.
async fn prepare(
    source: &BackupSource,
    repository: &Repository,
    cluster: &ClusterName,
    options: &BackupOptions,
    progress: &watch::Sender<BackupProgress>,
) -> Result<(ClusterId, Manifest), BackupError> {
    let Begun { cluster, start: record, server } = begin(source, repository, cluster, options).await?;
    let label = record.label;
    progress.send_modify(|progress| {
        (progress.label, progress.phase) = (Some(label), BackupPhase::Checkpoint);
    });
    tracing::info!(cluster = %cluster, %label, "taking a base backup");

    let taken = take(server, repository, &cluster, label, progress).await?;
    let Taken { start, stop, timeline, received, flagged, server_version } = taken;
    let stopped_at = repository.now();
    let segment_size = received.control.segment_size;
    // Now, while the server certainly has it.
    let digest = digest_before(source, &cluster, timeline, stop, segment_size).await;
    let needed = Needed { cluster: cluster.clone(), label, timeline, digest, start, stop, segment_size };
    let tell = |reached| {
        progress.send_modify(|progress| progress.phase = BackupPhase::WaitingForWal { stop, reached });
    };
    let branch = wal::wait(repository, &needed, tell).await?;

    let Received { stored, control, tablespaces, files, bytes } = received;
    let backup = BackupInfo {
        label,
        system: cluster.system,
        branch,
        timeline,
        start,
        stop,
        started_at: record.started_at,
        stopped_at,
        server_version,
        segment_size,
        bytes,
        stored_bytes: stored.bytes,
        files,
        tablespaces,
        flagged,
        parameters: parameters(&control),
    };
    let manifest = Manifest {
        backup,
        packs: stored.packs,
        tables: stored.tables,
        tags: stored.tags,
        server_manifest: stored.server_manifest,
        parents: Vec::new(),
    };
    Ok((cluster, manifest))
}

struct Begun {
    cluster: ClusterId,
    start: BackupStart,
    server: BaseBackup,
}

/// Everything up to the command: who the server is, whether it may be stored here, and under which name.
async fn begin(
    source: &BackupSource,
    repository: &Repository,
    cluster: &ClusterName,
    options: &BackupOptions,
) -> Result<Begun, BackupError> {
    repository.check_writable()?;
    let mut replication = Replication::connect(&source.conninfo, &source.connect).await?;
    let identity = replication.identify_system().await?;
    let cluster = ClusterId { name: cluster.clone(), system: identity.system };
    let systems = repository.clusters_named(&cluster.name).await?;
    match systems.first() {
        Some(archived) if !systems.contains(&cluster) => {
            return Err(BackupError::ForeignCluster {
                name: cluster.name.to_string(),
                repository: repository.name().to_owned(),
                archived: archived.system,
                got: cluster.system,
                server: replication.server().to_owned(),
            });
        }
        _ => {}
    }
    let start = put_start(repository, &cluster).await?;
    let options = BaseBackupOptions {
        label: format!("pgkeep {}", start.label),
        checkpoint: options.checkpoint,
        max_rate: options.max_rate,
        verify_checksums: options.verify_checksums,
        silence: options.silence,
    };
    let server = replication.base_backup(&options).await?;
    Ok(Begun { cluster, start, server })
}

/// What the server has before `stop`, in that segment: by it its history is known among those that are archived.
async fn digest_before(
    source: &BackupSource,
    cluster: &ClusterId,
    timeline: TimelineId,
    stop: Lsn,
    size: SegmentSize,
) -> Option<Digest> {
    let start = stop.segment_before(size).start(size);
    let asked = segment_digest(&source.conninfo, &source.connect, timeline, start, stop);
    match tokio::time::timeout(DIGEST_DEADLINE, asked).await {
        Ok(Ok((identity, digest))) => digest.filter(|_| identity.system == cluster.system),
        Ok(Err(error)) => {
            tracing::warn!(%cluster, %error, "the server was asked for its newest WAL, to compare it with the archive");
            None
        }
        Err(_) => None,
    }
}

/// Finds a name that nobody has and takes it.
async fn put_start(repository: &Repository, cluster: &ClusterId) -> Result<BackupStart, BackupError> {
    let mut label = BackupLabel::at(repository.now());
    for _ in 0..LABELS {
        let now = repository.now();
        label = BackupLabel::at(now);
        let start = BackupStart { label, writer: repository.writer(), started_at: now, parents: Vec::new() };
        match repository.put_record(cluster, ClusterObject::Start(label), &start).await {
            Ok(_) => return Ok(start),
            Err(CatalogError::Taken { .. }) => tokio::time::sleep(until_next_second(now)).await,
            Err(error) => return Err(error.into()),
        }
    }
    Err(BackupError::NoLabel { label })
}

/// How long until the clock shows another second.
fn until_next_second(now: Timestamp) -> Duration {
    let nanos = now.as_nanosecond().rem_euclid(1_000_000_000);
    Duration::from_nanos(u64::try_from(1_000_000_000 - nanos).unwrap_or(1_000_000_000))
}

/// What BASE_BACKUP came to.
struct Taken {
    start: Lsn,
    stop: Lsn,
    timeline: TimelineId,
    received: Received,
    flagged: Option<String>,
    server_version: u32,
}

async fn take(
    mut server: BaseBackup,
    repository: &Repository,
    cluster: &ClusterId,
    label: BackupLabel,
    progress: &watch::Sender<BackupProgress>,
) -> Result<Taken, BackupError> {
    let warn = |warning: String| tracing::warn!(cluster = %cluster, %label, "the server says: {warning}");
    let (start, timeline, tablespaces) = loop {
        match next(&mut server).await? {
            BackupEvent::Started { start, timeline, tablespaces } => break (start, timeline, tablespaces),
            BackupEvent::Warning(warning) => warn(warning),
            _ => return Err(BackupError::unexpected("data came before the start position")),
        }
    };
    let sizes: Option<Vec<u64>> = tablespaces.iter().map(|tablespace| tablespace.size_bytes).collect();
    progress.send_modify(|progress| {
        (progress.phase, progress.total) = (BackupPhase::Receiving, sizes.map(|sizes| sizes.iter().sum()));
    });
    let tagger = BlockTagger::new(repository.meta_key(), repository.realm());
    let cutter = Cutter::new(label, tagger, LIMITS.pack_bytes, LIMITS.chunk_bytes);
    let mut receiver = Receiver::new(Objects::new(repository, cluster, label), cutter, tablespaces);
    let mut reported = 0;
    let (stop, stop_timeline, flagged) = loop {
        match next(&mut server).await? {
            BackupEvent::Data(bytes) => receiver.data(bytes).await?,
            BackupEvent::Archive { tablespace } => receiver.archive(tablespace)?,
            BackupEvent::Manifest(bytes) => receiver.manifest(&bytes).await?,
            BackupEvent::Warning(warning) => warn(warning),
            BackupEvent::Progress(_) => {} // we count what arrived
            BackupEvent::Finished { end, timeline } => break (end, timeline, None),
            BackupEvent::Damaged { end, timeline, reason, warnings } => {
                break (end, timeline, Some(flag(reason, &warnings)));
            }
            BackupEvent::Started { .. } => return Err(BackupError::unexpected("it started twice")),
        }
        let (done, stored) = receiver.progress();
        if done >= reported + REPORT_EVERY {
            reported = done;
            progress.send_modify(|progress| (progress.done, progress.stored) = (done, stored));
        }
    };
    if stop_timeline != timeline {
        return Err(BackupError::TimelineChanged { from: timeline, to: stop_timeline });
    }
    let (done, stored) = receiver.progress();
    progress.send_modify(|progress| {
        (progress.phase, progress.done, progress.stored) = (BackupPhase::Storing, done, stored);
    });
    let server_version = server.server_version_num();
    drop(server); // one of max_wal_senders, and no longer needed
    let received = receiver.finish(cluster.system, timeline, (start, stop)).await?;
    progress.send_modify(|progress| progress.stored = received.stored.bytes);
    Ok(Taken { start, stop, timeline, received, flagged, server_version })
}

async fn next(server: &mut BaseBackup) -> Result<BackupEvent, BackupError> {
    server.next().await?.ok_or_else(|| BackupError::unexpected("it ended without saying so"))
}

/// What is written down about pages with wrong checksums.
fn flag(reason: String, warnings: &[String]) -> String {
    let all = std::iter::once(reason).chain(warnings.iter().cloned()).collect::<Vec<_>>().join("; ");
    all.chars().take(MAX_REASON_CHARS).collect()
}

fn parameters(control: &ControlFile) -> ServerParameters {
    let number = |value: i32| u32::try_from(value).unwrap_or(0);
    let parameters = &control.parameters;
    ServerParameters {
        max_connections: number(parameters.max_connections),
        max_worker_processes: number(parameters.max_worker_processes),
        max_wal_senders: number(parameters.max_wal_senders),
        max_prepared_transactions: number(parameters.max_prepared_transactions),
        max_locks_per_transaction: number(parameters.max_locks_per_transaction),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_name_is_tried_again_in_the_next_second() {
        for (now, millis) in [("2026-11-20T03:15:00.25Z", 750), ("2026-11-20T03:15:00Z", 1000)] {
            let now: Timestamp = now.parse().unwrap();
            let wait = until_next_second(now);
            assert_eq!(wait, Duration::from_millis(millis));
            let then = now.checked_add(jiff::SignedDuration::try_from(wait).unwrap()).unwrap();
            assert_ne!(BackupLabel::at(then), BackupLabel::at(now));
        }
    }

    #[test]
    fn a_flag_is_bounded() {
        assert_eq!(flag("a".to_owned(), &["b".to_owned()]), "a; b");
        assert_eq!(flag("ü".repeat(9000), &[]).chars().count(), MAX_REASON_CHARS);
    }
}
