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
//! - Whatever it names of other backups was there when the manifest was put, and it names it directly: deleting another
//!   backup takes nothing from it that it names itself.
//! - Memory is bounded whatever the repository's pace and the cluster's size (P8), except for 24 bytes per file, and some
//!   50 more per file of the parent ([`parent`]).
//! - Somebody else archives: a `pgkeep run`, or the command's own archiver beside this. Here WAL is only waited for.
//!
//! Crash and cancellation: [`backup`] may be dropped at any await. What is left is a `start` without a manifest and
//! objects that nothing references; the server has nothing to clean up. A name is never used again. A backup that fails, or
//! is told to stop, removes its objects itself, as far as the repository lets it: nothing can have referenced them.
//! Protocol: <https://www.postgresql.org/docs/current/protocol-replication.html>

pub mod cut;
mod error;
mod objects;
mod parent;
mod pieces;
mod receive;
mod reclaim;
pub mod server_manifest;
pub mod tags;
mod wal;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

pub use error::BackupError;
pub use parent::ParentChoice;

use self::cut::{Counts, Cutter};
use self::objects::{LIMITS, Objects, Stored};
use self::parent::Parent;
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
/// How long a backup that was given up may take to remove what it put.
const TIDYING: Duration = Duration::from_secs(20);
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
    /// With which earlier backup blocks are compared.
    pub parent: ParentChoice,
}

impl Default for BackupOptions {
    fn default() -> Self {
        BackupOptions {
            checkpoint: CheckpointSpeed::Fast,
            max_rate: None,
            verify_checksums: true,
            silence: Duration::from_secs(300),
            parent: ParentChoice::Newest,
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
    /// With which backup its blocks are compared.
    pub parent: Option<BackupLabel>,
    /// What became of the bytes that are not zeros, of files that have arrived whole.
    pub counts: Counts,
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
    let begun = Arc::new(OnceLock::new());
    let noted = begun.clone();
    let prepared = async move { prepare(&source, &to, &cluster, &options, &watched, &noted).await };
    let mut prepared = AbortOnDropHandle::new(tokio::spawn(prepared));
    let ended = tokio::select! {
        biased;
        () = cancel.cancelled() => {
            prepared.abort();
            let _ = (&mut prepared).await; // nothing of it runs any more
            Err(BackupError::Cancelled)
        }
        ended = &mut prepared => ended.map_err(BackupError::task).flatten(),
    };
    let (cluster, manifest) = match ended {
        Ok(prepared) => prepared,
        Err(error) => {
            if let Some((cluster, label)) = begun.get() {
                tidy(repository, cluster, *label).await;
            }
            return Err(error);
        }
    };
    // From here on nothing stops it: it is one put, and then the backup is there.
    repository.put_manifest(&cluster, &manifest).await?;
    progress.send_modify(|progress| progress.phase = BackupPhase::Done);
    let BackupInfo { label, start, stop, bytes, stored_bytes, .. } = &manifest.backup;
    tracing::info!(cluster = %cluster, %label, %start, %stop, bytes, stored_bytes, "the base backup is complete");
    Ok(manifest)
}

/// Removes what a backup put that was given up: it costs, and nothing names it. What stays is harmless.
async fn tidy(repository: &Repository, cluster: &ClusterId, label: BackupLabel) {
    let remove = async {
        let mut removed = 0;
        loop {
            // Once more, until there is nothing: a put that was under way may have come to its end meanwhile.
            match repository.remove_unfinished(cluster, label).await? {
                0 => return Ok::<u64, CatalogError>(removed),
                more => removed += more,
            }
        }
    };
    match tokio::time::timeout(TIDYING, remove).await {
        Ok(Ok(removed)) => {
            tracing::info!(%cluster, %label, removed, "the backup was given up; its objects are removed")
        }
        Ok(Err(error)) => tracing::warn!(%cluster, %label, %error, "the backup was given up; some of its objects stay"),
        Err(_) => tracing::warn!(%cluster, %label, "the backup was given up; some of its objects stay, unused"),
    }
}

/// Everything but the manifest's put: all that it names is durable, and so is the WAL. `begun` gets the backup's name.
async fn prepare(
    source: &BackupSource,
    repository: &Repository,
    cluster: &ClusterName,
    options: &BackupOptions,
    progress: &watch::Sender<BackupProgress>,
    begun: &OnceLock<(ClusterId, BackupLabel)>,
) -> Result<(ClusterId, Manifest), BackupError> {
    let Begun { cluster, start: record, server, parent } = begin(source, repository, cluster, options, begun).await?;
    let label = record.label;
    let parents: Vec<BackupLabel> = parent.iter().map(Parent::label).collect();
    progress.send_modify(|progress| {
        (progress.label, progress.phase) = (Some(label), BackupPhase::Checkpoint);
        progress.parent = parents.first().copied();
    });
    match parents.first() {
        Some(parent) => tracing::info!(cluster = %cluster, %label, %parent, "taking a base backup"),
        None => tracing::info!(cluster = %cluster, %label, "taking a base backup, compared with none"),
    }

    let taken = take(server, repository, &cluster, label, parent, progress).await?;
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

    let Received { stored, control, tablespaces, files, bytes, referenced: mut packs, .. } = received;
    packs.extend(stored.packs);
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
    let Stored { tables, tags, server_manifest, .. } = stored;
    let manifest = Manifest { backup, packs, tables, tags, server_manifest, parents };
    // It was there at the beginning, and the start pins it; but a person may have removed it.
    if let Some(object) = repository.not_there(&cluster, &manifest, Some(label)).await?.first() {
        return Err(BackupError::ParentGone { label, object });
    }
    Ok((cluster, manifest))
}

struct Begun {
    cluster: ClusterId,
    start: BackupStart,
    server: BaseBackup,
    parent: Option<Parent>,
}

/// Everything up to the command: who the server is, whether it may be stored here, and under which name.
async fn begin(
    source: &BackupSource,
    repository: &Repository,
    cluster: &ClusterName,
    options: &BackupOptions,
    begun: &OnceLock<(ClusterId, BackupLabel)>,
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
    let parent = parent::choose(repository, &cluster, options.parent).await?;
    let start = put_start(repository, &cluster, parent.as_ref().map(|parent| parent.backup.label)).await?;
    let _ = begun.set((cluster.clone(), start.label)); // once
    // After the start, which pins it: what is there now stays.
    let parent = match &parent {
        Some(manifest) => Parent::open(repository, &cluster, manifest).await.map(Some).inspect_err(|error| {
            let parent = manifest.backup.label;
            tracing::warn!(%cluster, %parent, %error, "the parent is left aside: everything is stored");
        }),
        None => Ok(None),
    };
    let parent = parent.unwrap_or_default();
    let options = BaseBackupOptions {
        label: format!("pgkeep {}", start.label),
        checkpoint: options.checkpoint,
        max_rate: options.max_rate,
        verify_checksums: options.verify_checksums,
        silence: options.silence,
    };
    let server = replication.base_backup(&options).await?;
    Ok(Begun { cluster, start, server, parent })
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
async fn put_start(
    repository: &Repository,
    cluster: &ClusterId,
    parent: Option<BackupLabel>,
) -> Result<BackupStart, BackupError> {
    let mut label = BackupLabel::at(repository.now());
    let parents: Vec<BackupLabel> = parent.into_iter().collect();
    for _ in 0..LABELS {
        let now = repository.now();
        label = BackupLabel::at(now);
        let start = BackupStart { label, writer: repository.writer(), started_at: now, parents: parents.clone() };
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
    parent: Option<Parent>,
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
    let mut receiver = Receiver::new(Objects::new(repository, cluster, label), cutter, parent, tablespaces);
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
        let (done, stored, counts) = receiver.progress();
        if done >= reported + REPORT_EVERY {
            reported = done;
            progress.send_modify(|progress| {
                (progress.done, progress.stored, progress.counts) = (done, stored, counts);
            });
        }
    };
    if stop_timeline != timeline {
        return Err(BackupError::TimelineChanged { from: timeline, to: stop_timeline });
    }
    let (done, stored, _) = receiver.progress();
    progress.send_modify(|progress| {
        (progress.phase, progress.done, progress.stored) = (BackupPhase::Storing, done, stored);
    });
    let server_version = server.server_version_num();
    drop(server); // one of max_wal_senders, and no longer needed
    let received = receiver.finish(cluster.system, timeline, (start, stop)).await?;
    progress.send_modify(|progress| (progress.stored, progress.counts) = (received.stored.bytes, received.counts));
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
