//! `wal push`: one file of the server's `pg_wal` into the repository, as `archive_command` offers it.
//!
//! What always holds: success means that the file's WAL is durable in the repository, byte for byte. A file that is not
//! what its name says (another cluster's, another position's, a segment that is still being written) is not taken;
//! where other content is archived under its name, both are kept and nobody is overwritten (P6).
//! What is damaged between the first page and the last is the only copy of what the server wrote: it is taken, and noted as
//! damaged first.
//! Memory: one part of a segment, at most [`MAX_PART`], twice: as it is and sealed. A segment of which pieces lie under
//! `open/` is read from there to be compared, whole.
//! Crash and cancellation: an object is there whole or not at all; PostgreSQL offers the file again, and the push finds
//! what it had put.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;

use super::alarm::{NOTES, put_note};
use super::part::MAX_PART;
use super::push_index::Indexing;
use crate::catalog::layout::{KeptFile, SegmentName, folder};
use crate::catalog::records::WalRangeNote;
use crate::catalog::{CatalogError, Put, Repository, SealedRange};
use crate::pg::control_file::{ControlFile, ControlFileError};
use crate::store::list_all;
use crate::types::{
    Branch, ClusterId, ClusterName, Digest, Lsn, ParseError, SegmentHasher, SegmentNumber, SegmentSize, SystemId,
    TimelineHistory, TimelineId, WalFileName,
};
use crate::wal::{PAGE_SIZE, PageWatch, Unsound, WalAudit, WalDamage, check_page};

/// Files are read in pieces of this size: the size of a sealed frame.
const PIECE: usize = 1 << 20;
/// A history or `.backup` file has some hundred bytes; this is room for ten thousand timelines.
const MAX_TEXT: u64 = 1 << 20;
/// PostgreSQL replaces `pg_control` in place: a read may meet it half written.
const CONTROL_FILE_TRIES: u32 = 10;
const CONTROL_FILE_PAUSE: Duration = Duration::from_millis(20);

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It is there now.
    Stored,
    /// The same content was there.
    AlreadyThere,
    /// It is a segment that is not complete, and the repository holds all the WAL in it already. Nothing was stored: this
    /// is what a standby with `archive_mode = always` offers after it has restored the open segment.
    HeldAlready,
}

/// Why a file was not archived. PostgreSQL keeps it and offers it again.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The file, or something beside it, could not be read.
    #[error("could not read {}: {source}", path.display())]
    Read {
        /// What was to be read.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The path does not end in a name that PostgreSQL gives.
    #[error(
        "{}: {source}; hint: archive_command hands the path over as %p: 'exec pgkeep --config FILE wal push %p'",
        path.display()
    )]
    Name {
        /// What was given.
        path: PathBuf,
        /// What is wrong.
        source: ParseError,
    },
    /// The file's length is none that it can have.
    #[error("{} has {len} bytes, but {expected}; it was not archived", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// What it should have, as the rest of a sentence.
        expected: String,
    },
    /// The file's pages are not what its name says.
    #[error(
        "{} is not what its name says: {source}. It was not archived; hint: was it copied or renamed by hand, or left by \
         another cluster? PostgreSQL keeps offering it; move it out of pg_wal only if you know where the right one is",
        path.display()
    )]
    NotItsName {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: WalDamage,
    },
    /// A history file that cannot be read as one.
    #[error("{} is no history file: {source}; it was not archived", path.display())]
    History {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ParseError,
    },
    /// A full name, and a segment that ends in zeros without a switch.
    #[error(
        "{} is not complete: its WAL ends at {ends_at}, and only zeros follow. It was not archived, and the repository \
         does not hold all of it.\n\
         hint: on a standby with archive_mode = always this is the open segment as it was restored; it is taken once the \
         standby has streamed the rest. If this server was promoted and has left timeline {timeline}, nothing will be added: \
         its WAL is in the new timeline's first segment; rename its .ready file in pg_wal/archive_status to .done",
        path.display()
    )]
    NotComplete {
        /// The file.
        path: PathBuf,
        /// Where its WAL ends.
        ends_at: Lsn,
        /// Its timeline.
        timeline: TimelineId,
    },
    /// It was written to while it was read.
    #[error("{} changed while it was read; it is offered again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Nothing says which cluster the file belongs to.
    #[error(
        "cannot tell which cluster {} belongs to: there is no {}; hint: archive_command runs in the data directory; by \
         hand, run `pgkeep wal push` there, too",
        path.display(), sought.display()
    )]
    NoControlFile {
        /// The file.
        path: PathBuf,
        /// Where the control file was sought.
        sought: PathBuf,
    },
    /// The control file is there and cannot be understood.
    #[error("{}: {source}", path.display())]
    ControlFile {
        /// The control file.
        path: PathBuf,
        /// Why.
        source: ControlFileError,
    },
    /// The name belongs to another cluster.
    #[error(
        "{name:?} in repository {repository} is the cluster with system identifier {archived}, but {} belongs to {got}. \
         It was not archived.\n\
         hint: is this the right configuration? After initdb or pg_upgrade, give the cluster a new name (name_in_repository)",
        path.display()
    )]
    ForeignCluster {
        /// The file.
        path: PathBuf,
        /// The cluster's name in the repository.
        name: String,
        /// The repository.
        repository: String,
        /// What the name stands for there.
        archived: SystemId,
        /// Whose the file is.
        got: SystemId,
    },
    /// Other content is archived under the file's name.
    #[error(
        "CONFLICT: {existing} is archived with other content than {}. What is archived stays; this content was kept aside \
         as {kept}.\n\
         hint: two servers archive under this name: a restored copy that was promoted, or a server rolled back to an older \
         copy. Archive one of them under another cluster name, or in another repository, and take a base backup of it",
        path.display()
    )]
    Conflict {
        /// The file.
        path: PathBuf,
        /// What is archived.
        existing: String,
        /// Where this file's content was kept.
        kept: String,
    },
    /// What is archived of this segment, streamed while it was open say, is not what the file holds.
    #[error(
        "CONFLICT: from {at} on, {} holds other WAL than what is archived as {streamed}. What is archived stays; \
         the file was not archived.\n\
         hint: two servers archive under this name: a restored copy that was promoted, or a server rolled back to an older \
         copy. Archive one of them under another cluster name, or in another repository, and take a base backup of it",
        path.display()
    )]
    DiffersFromStream {
        /// The file.
        path: PathBuf,
        /// The first byte that differs.
        at: Lsn,
        /// What is archived.
        streamed: String,
    },
    /// The repository.
    #[error(transparent)]
    Repository(#[from] CatalogError),
    /// A task of ours ended abnormally.
    #[error("a task of wal push ended abnormally: {0}")]
    Task(String),
}

impl PushError {
    /// May another attempt succeed without anybody doing anything? PostgreSQL tries again either way.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Read { .. } | Self::Changed { .. } | Self::NotComplete { .. } | Self::Task(_) => true,
            Self::Repository(error) => error.is_retryable(),
            Self::ControlFile { .. } => true,
            Self::Name { .. }
            | Self::Length { .. }
            | Self::NotItsName { .. }
            | Self::History { .. }
            | Self::NoControlFile { .. }
            | Self::ForeignCluster { .. }
            | Self::Conflict { .. }
            | Self::DiffersFromStream { .. } => false,
        }
    }

    /// Is this a refusal that protects what is archived?
    pub fn protects_data(&self) -> bool {
        match self {
            Self::NotItsName { .. }
            | Self::NotComplete { .. }
            | Self::ForeignCluster { .. }
            | Self::Conflict { .. }
            | Self::DiffersFromStream { .. } => true,
            Self::Repository(error) => error.is_refusal(),
            Self::Read { .. }
            | Self::Name { .. }
            | Self::Length { .. }
            | Self::History { .. }
            | Self::Changed { .. }
            | Self::NoControlFile { .. }
            | Self::ControlFile { .. }
            | Self::Task(_) => false,
        }
    }
}

/// How long a push may take in all. A server that shuts down waits for its archiver, which waits for us.
pub fn deadline(path: &Path) -> Duration {
    const LEAST: u64 = 20;
    const BYTES_PER_SECOND: u64 = 4 << 20;
    let len = std::fs::metadata(path).map_or(0, |file| file.len().min(1 << 30));
    Duration::from_secs(LEAST + len / BYTES_PER_SECOND)
}

/// Archives the file at `path`. Returns only when it is durable.
pub async fn push(
    repository: &Repository,
    cluster: &ClusterName,
    path: &Path,
    index: Indexing<'_>,
) -> Result<Pushed, PushError> {
    let _pushing = match index {
        Indexing::Later(backlog) => Some(backlog.pushing()),
        Indexing::No | Indexing::Now => None,
    };
    let text = path.file_name().unwrap_or_default().to_string_lossy();
    let name = text.parse::<WalFileName>().map_err(|source| PushError::Name { path: path.to_owned(), source })?;
    let control = blocking({
        let path = path.to_owned();
        move || control_file(&path)
    })
    .await?;
    let push = Push { repository, name: cluster, path, control, index };
    match &name {
        WalFileName::Segment(segment) => push.segment(segment).await,
        WalFileName::History(timeline) => push.history(*timeline).await,
        WalFileName::Partial(_) | WalFileName::BackupHistory(_) => push.kept(&name).await,
    }
}

struct Push<'a> {
    repository: &'a Repository,
    name: &'a ClusterName,
    path: &'a Path,
    control: Option<ControlFile>,
    index: Indexing<'a>,
}

impl Push<'_> {
    async fn segment(&self, text: &str) -> Result<Pushed, PushError> {
        let (path, name, control) = (self.path.to_owned(), text.to_owned(), self.control_says());
        let seen = blocking(move || inspect(&path, &name, control)).await?;
        let cluster = self.cluster(seen.system).await?;
        let branch = Branch::first(seen.timeline);
        if let Some(ends_at) = seen.ends_at {
            return self.not_complete(&cluster, branch, &seen, ends_at).await;
        }
        self.history_of(&cluster, branch).await?;
        self.compare_with_streamed(&cluster, branch, &seen).await?;
        for Unsound { from, to, damage, goes_on } in seen.unsound.iter().take(NOTES) {
            // These bytes are what the server wrote, and the only copy: they are kept, and somebody has to know.
            if !goes_on {
                tracing::error!(
                    file = %self.path.display(),
                    "DAMAGED WAL: {damage}. The segment is archived as it is; nothing can be restored across {from} from a \
                     base backup before it. Take a base backup now, and look after the server's disk and memory"
                );
            }
            put_note(self.repository, &cluster, branch, (*from, *to)).await?;
        }
        let mut new = false;
        let mut hasher = SegmentHasher::new();
        for (index, known) in seen.digests.iter().enumerate() {
            let from = index as u64 * MAX_PART;
            let to = (from + MAX_PART).min(seen.size.bytes());
            let digest_from = hasher.digest();
            let pieces = match (&seen.pieces, seen.digests.len()) {
                // The very bytes that were looked at.
                (pieces, 1) => pieces.clone(),
                _ => {
                    let path = self.path.to_owned();
                    let pieces = blocking(move || read_range(&path, from, to)).await?;
                    pieces.iter().for_each(|piece| hasher.update(piece));
                    if hasher.digest() != *known {
                        return Err(PushError::Changed { path: self.path.to_owned() });
                    }
                    pieces
                }
            };
            new |= self.put_part(&cluster, branch, &seen, (from, to), (digest_from, *known), pieces).await?;
        }
        // What was there already was streamed, and indexed by who streamed it.
        if new && seen.unsound.is_empty() {
            let (segment, file) = ((seen.segment, seen.size), (self.path, seen.pieces));
            super::push_index::index(self.index, self.repository, &cluster, branch, segment, file).await;
        }
        Ok(if new { Pushed::Stored } else { Pushed::AlreadyThere })
    }

    /// Puts the bytes `[from, to)` of a segment; whether they were not there.
    async fn put_part(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        seen: &Inspected,
        (from, to): (u64, u64),
        (digest_from, digest_to): (Digest, Digest),
        pieces: Vec<Bytes>,
    ) -> Result<bool, PushError> {
        // invariant: a segment is at most 1 GiB, so offsets in it fit
        let offset = |at: u64| u32::try_from(at).unwrap_or(u32::MAX);
        let (from, to) = (offset(from), offset(to));
        let mut sealer = self.repository.seal_wal(cluster, branch, seen.segment, seen.size, (from, to)).await?;
        let note = WalRangeNote {
            writer: self.repository.writer(),
            server_version: 0, // the file says the major version only
            segment_size: seen.size,
            digest_from,
            digest_to: Some(digest_to),
            server_time: None,
            server_end: None,
            durable_to: None,
            conflict: None,
        };
        let sealed = blocking(move || -> Result<SealedRange, PushError> {
            for piece in pieces {
                sealer.push(&piece)?;
            }
            Ok(sealer.finish(to, note)?)
        });
        let put = self.repository.put_range(&sealed.await?).await?;
        self.outcome(put)
    }

    /// A padded segment is none. All the WAL in it may be archived already: then there is nothing left to do, and saying so
    /// keeps the server's archiver going.
    async fn not_complete(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        seen: &Inspected,
        ends_at: Lsn,
    ) -> Result<Pushed, PushError> {
        let not_complete = || PushError::NotComplete { path: self.path.to_owned(), ends_at, timeline: seen.timeline };
        if !self.repository.can_read() {
            return Err(not_complete());
        }
        let held = self.repository.read_segment(cluster, branch, seen.segment, seen.size, None).await?;
        let len = ends_at.bytes_since(seen.segment.start(seen.size)).unwrap_or(0);
        let streamed = held.sources.join(", ");
        let Some(covering) = usize::try_from(len).ok().and_then(|len| held.bytes.get(..len)) else {
            self.same_bytes(held.bytes, seen, streamed).await?;
            return Err(not_complete());
        };
        self.same_bytes(covering.to_vec(), seen, streamed).await?;
        tracing::warn!(
            file = %self.path.display(), %ends_at,
            "not a complete segment; it was not stored, and the repository holds all the WAL in it already"
        );
        Ok(Pushed::HeldAlready)
    }

    /// Pieces of the open segment that were streamed must be this file's beginning.
    async fn compare_with_streamed(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        seen: &Inspected,
    ) -> Result<(), PushError> {
        let Some(name) = SegmentName::new(branch.timeline, seen.segment, seen.size) else { return Ok(()) };
        let prefix = folder::open_segment(cluster, branch, name);
        let listed = list_all(self.repository.store().as_ref(), &prefix).await;
        let listed =
            listed.map_err(|source| CatalogError::Store { repository: self.repository.name().to_owned(), source })?;
        if listed.is_empty() || !self.repository.can_read() {
            return Ok(());
        }
        match self.repository.read_segment(cluster, branch, seen.segment, seen.size, None).await {
            Ok(held) => self.same_bytes(held.bytes, seen, held.sources.join(", ")).await,
            // The whole segment is what heals a broken piece of it.
            Err(error) if error.is_damage() => {
                tracing::warn!(%error, "what was streamed of this segment does not open; the segment is archived whole");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn same_bytes(&self, held: Vec<u8>, seen: &Inspected, streamed: String) -> Result<(), PushError> {
        let (path, start) = (self.path.to_owned(), seen.segment.start(seen.size));
        let differs = blocking(move || first_difference(&path, &held)).await?;
        match differs {
            None => Ok(()),
            Some(offset) => {
                let at = start.advance(offset);
                Err(PushError::DiffersFromStream { path: self.path.to_owned(), at, streamed })
            }
        }
    }

    /// WAL of a timeline whose history is not archived cannot be restored, and PostgreSQL may have marked the file as done
    /// before there was an archive.
    async fn history_of(&self, cluster: &ClusterId, branch: Branch) -> Result<(), PushError> {
        if branch.timeline == TimelineId::FIRST || self.repository.get_history(cluster, branch).await?.is_some() {
            return Ok(());
        }
        let beside = self.path.with_file_name(format!("{}.history", branch.timeline));
        match std::fs::exists(&beside) {
            Ok(true) => {
                let history = Push { path: &beside, control: self.control.clone(), ..*self };
                history.put_history(cluster, branch.timeline).await.map(drop)
            }
            _ => {
                tracing::warn!(
                    timeline = %branch.timeline,
                    "its history file is neither archived nor in pg_wal; without it this timeline cannot be restored"
                );
                Ok(())
            }
        }
    }

    async fn history(&self, timeline: TimelineId) -> Result<Pushed, PushError> {
        let cluster = self.cluster(self.system()?).await?;
        self.put_history(&cluster, timeline).await
    }

    async fn put_history(&self, cluster: &ClusterId, timeline: TimelineId) -> Result<Pushed, PushError> {
        let text = self.text().await?;
        TimelineHistory::parse(timeline, &text)
            .map_err(|source| PushError::History { path: self.path.to_owned(), source })?;
        let put = self.repository.put_history(cluster, Branch::first(timeline), &text).await?;
        Ok(if self.outcome(put)? { Pushed::Stored } else { Pushed::AlreadyThere })
    }

    async fn kept(&self, name: &WalFileName) -> Result<Pushed, PushError> {
        let path = self.path.to_owned();
        let (bytes, system) = match name {
            WalFileName::Partial(text) => {
                let (text, control) = (text.clone(), self.control_says());
                blocking(move || read_partial(&path, &text, control)).await?
            }
            _ => (self.text().await?, self.system()?),
        };
        let cluster = self.cluster(system).await?;
        let misnamed = |text: &str| PushError::Name {
            path: self.path.to_owned(),
            source: ParseError::new("a .partial or .backup file", text),
        };
        let text = self.path.file_name().unwrap_or_default().to_string_lossy();
        let file = KeptFile::new(name).ok_or_else(|| misnamed(&text))?;
        let timeline = text.get(..8).and_then(|digits| digits.parse().ok()).ok_or_else(|| misnamed(&text))?;
        let put = self.repository.put_wal_file(&cluster, Branch::first(timeline), &file, &bytes).await?;
        Ok(if self.outcome(put)? { Pushed::Stored } else { Pushed::AlreadyThere })
    }

    async fn text(&self) -> Result<Vec<u8>, PushError> {
        let path = self.path.to_owned();
        blocking(move || {
            let (file, len) = open(&path)?;
            if len == 0 || len > MAX_TEXT {
                let expected = format!("a file of this name has 1 to {MAX_TEXT}");
                return Err(PushError::Length { path, len, expected });
            }
            let mut text = Vec::new();
            let read = file.take(MAX_TEXT).read_to_end(&mut text);
            read.map_err(|source| PushError::Read { path, source })?;
            Ok(text)
        })
        .await
    }

    /// Whether something new was put.
    fn outcome(&self, put: Put) -> Result<bool, PushError> {
        match put {
            Put::New => Ok(true),
            Put::SameContent => Ok(false),
            Put::BesideDamaged { damaged, copy } => {
                tracing::error!(%damaged, %copy, "an archived object does not open; its content was archived again beside it");
                Ok(true)
            }
            Put::Conflict(conflict) => Err(PushError::Conflict {
                path: self.path.to_owned(),
                existing: conflict.existing.clone(),
                kept: conflict.kept.clone(),
            }),
        }
    }

    fn control_says(&self) -> Option<(SystemId, SegmentSize)> {
        self.control.as_ref().map(|control| (control.system, control.segment_size))
    }

    fn system(&self) -> Result<SystemId, PushError> {
        let missing =
            || PushError::NoControlFile { path: self.path.to_owned(), sought: control_file_beside(self.path) };
        self.control.as_ref().map(|control| control.system).ok_or_else(missing)
    }

    /// A name in a repository stands for one cluster.
    async fn cluster(&self, system: SystemId) -> Result<ClusterId, PushError> {
        let id = ClusterId { name: self.name.clone(), system };
        let archived = self.repository.clusters_named(self.name).await?;
        match archived.first() {
            Some(first) if !archived.contains(&id) => Err(PushError::ForeignCluster {
                path: self.path.to_owned(),
                name: self.name.to_string(),
                repository: self.repository.name().to_owned(),
                archived: first.system,
                got: system,
            }),
            _ => Ok(id),
        }
    }
}

// ---- the file

/// What a segment's file was seen to be.
#[derive(Debug)]
struct Inspected {
    size: SegmentSize,
    system: SystemId,
    timeline: TimelineId,
    segment: SegmentNumber,
    /// Digest of the segment up to the end of each of its parts.
    digests: Vec<Digest>,
    /// Its bytes, if it is one part.
    pieces: Vec<Bytes>,
    /// Its WAL ends here and zeros follow without a switch: it is not complete.
    ends_at: Option<Lsn>,
    /// What cannot be replayed.
    unsound: Vec<Unsound>,
}

/// Goes through a segment's file once. `control`: what the server's control file says.
fn inspect(path: &Path, name: &str, control: Option<(SystemId, SegmentSize)>) -> Result<Inspected, PushError> {
    let (mut file, len) = open(path)?;
    let size = segment_size(path, len, control)?;
    let (timeline, segment) = segment_of(path, name, size)?;
    let misnamed = |source| PushError::NotItsName { path: path.to_owned(), source };
    let start = segment.start(size);
    let mut watch = PageWatch::new(start, size, control.map(|(system, _)| system), timeline).map_err(misnamed)?;
    let audit = WalAudit::new(start, size, control.map(|(system, _)| system), timeline).map_err(misnamed)?;
    let (mut audit, mut hasher) = (audit.that_may_end(), SegmentHasher::new());
    let (mut digests, mut pieces, mut zeros_from) = (Vec::new(), Vec::new(), start);
    while hasher.offset() < size.bytes() {
        let piece = read_piece(&mut file, path, size.bytes() - hasher.offset())?;
        if hasher.offset() == 0 {
            // The first page says whose and where the file is.
            watch.push(piece.get(..PAGE_SIZE as usize).unwrap_or(&piece)).map_err(misnamed)?;
        }
        if let Some(last) = piece.iter().rposition(|byte| *byte != 0) {
            zeros_from = start.advance(hasher.offset() + last as u64 + 1);
        }
        hasher.update(&piece);
        audit.push(&piece);
        if hasher.offset() == size.bytes() {
            // What the server had there before lies behind the end of a segment that is still being written.
            let last = Lsn::new(segment.end(size).get() - PAGE_SIZE);
            let page = piece.get(piece.len().saturating_sub(PAGE_SIZE as usize)..).unwrap_or_default();
            check_page(last, page, size, timeline).map_err(misnamed)?;
        }
        if size.bytes() <= MAX_PART {
            pieces.push(piece);
        }
        if hasher.offset() == size.bytes() || hasher.offset().is_multiple_of(MAX_PART) {
            digests.push(hasher.digest());
        }
    }
    // While no whole record has followed damage, nothing tells a switch: then pages of zeros at the end are not trusted.
    let zeros_from = Lsn::new(zeros_from.get().next_multiple_of(PAGE_SIZE));
    let zeros = Some(zeros_from).filter(|from| *from < segment.end(size));
    let ends_at = if audit.is_lost().is_some() { zeros } else { audit.ended_at() };
    let unsound = std::iter::from_fn(|| audit.take()).collect();
    let system = watch.system().ok_or_else(|| misnamed(WalDamage::NotAPageStart { at: start }))?;
    Ok(Inspected { size, system, timeline, segment, digests, pieces, ends_at, unsound })
}

/// A `.partial` file whole, and whose it is. Behind its end lies whatever the server had there before: only the first
/// page tells anything.
fn read_partial(
    path: &Path,
    name: &str,
    control: Option<(SystemId, SegmentSize)>,
) -> Result<(Vec<u8>, SystemId), PushError> {
    let (mut file, len) = open(path)?;
    let size = segment_size(path, len, control)?;
    if len > MAX_PART {
        let expected = format!(
            "a .partial file is kept up to {MAX_PART}; the WAL in it up to the fork is in the new timeline's first \
             segment. Rename its .ready file in pg_wal/archive_status to .done"
        );
        return Err(PushError::Length { path: path.to_owned(), len, expected });
    }
    let (timeline, segment) = segment_of(path, name.strip_suffix(".partial").unwrap_or(name), size)?;
    let misnamed = |source| PushError::NotItsName { path: path.to_owned(), source };
    let start = segment.start(size);
    let mut watch = PageWatch::new(start, size, control.map(|(system, _)| system), timeline).map_err(misnamed)?;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < len {
        bytes.extend_from_slice(&read_piece(&mut file, path, len - bytes.len() as u64)?);
    }
    watch.push(bytes.get(..PAGE_SIZE as usize).unwrap_or(&bytes)).map_err(misnamed)?;
    let system = watch.system().ok_or_else(|| misnamed(WalDamage::NotAPageStart { at: start }))?;
    Ok((bytes, system))
}

fn segment_size(path: &Path, len: u64, control: Option<(SystemId, SegmentSize)>) -> Result<SegmentSize, PushError> {
    let wrong = |expected: String| PushError::Length { path: path.to_owned(), len, expected };
    let size =
        SegmentSize::new(len).ok_or_else(|| wrong("a segment has a power of two from 1 MiB to 1 GiB".to_owned()))?;
    match control {
        Some((_, known)) if known != size => {
            Err(wrong(format!("this cluster's segments have {} bytes", known.bytes())))
        }
        _ => Ok(size),
    }
}

fn segment_of(path: &Path, name: &str, size: SegmentSize) -> Result<(TimelineId, SegmentNumber), PushError> {
    SegmentNumber::from_file_name(name, size).ok_or_else(|| PushError::Name {
        path: path.to_owned(),
        source: ParseError::new("the name of a segment of its size", name),
    })
}

fn open(path: &Path) -> Result<(File, u64), PushError> {
    let read = |source| PushError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(read)?;
    let metadata = file.metadata().map_err(read)?;
    if !metadata.is_file() {
        return Err(read(io::Error::other("it is not a file")));
    }
    Ok((file, metadata.len()))
}

/// The next bytes, at most `left` of them; a file that ends before is being changed.
fn read_piece(file: &mut File, path: &Path, left: u64) -> Result<Bytes, PushError> {
    let wanted = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
    let mut piece = vec![0; wanted];
    match file.read_exact(&mut piece) {
        Ok(()) => Ok(Bytes::from(piece)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(PushError::Changed { path: path.to_owned() }),
        Err(source) => Err(PushError::Read { path: path.to_owned(), source }),
    }
}

fn read_range(path: &Path, from: u64, to: u64) -> Result<Vec<Bytes>, PushError> {
    let (mut file, _) = open(path)?;
    file.seek(SeekFrom::Start(from)).map_err(|source| PushError::Read { path: path.to_owned(), source })?;
    let (mut pieces, mut at) = (Vec::new(), from);
    while at < to {
        let piece = read_piece(&mut file, path, to - at)?;
        at += piece.len() as u64;
        pieces.push(piece);
    }
    Ok(pieces)
}

/// The first offset at which the file does not begin as `expected` does.
fn first_difference(path: &Path, expected: &[u8]) -> Result<Option<u64>, PushError> {
    let (mut file, _) = open(path)?;
    let mut at = 0;
    for part in expected.chunks(PIECE) {
        let piece = read_piece(&mut file, path, part.len() as u64)?;
        if let Some(offset) = piece.iter().zip(part).position(|(a, b)| a != b) {
            return Ok(Some(at + offset as u64));
        }
        at += part.len() as u64;
    }
    Ok(None)
}

/// `global/pg_control` of the data directory whose `pg_wal` holds the file; %p is `pg_wal/…` in the data directory.
fn control_file_beside(path: &Path) -> PathBuf {
    path.parent().and_then(Path::parent).unwrap_or(Path::new("")).join("global/pg_control")
}

fn control_file(path: &Path) -> Result<Option<ControlFile>, PushError> {
    // pg_wal may be a link to another file system, so the path is taken by its words; the server runs us in the data
    // directory.
    let beside = control_file_beside(path);
    for path in [beside.as_path(), Path::new("global/pg_control")] {
        let mut tries = 0;
        loop {
            let bytes = match std::fs::read(path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(source) => return Err(PushError::Read { path: path.to_owned(), source }),
            };
            tries += 1;
            match ControlFile::parse(&bytes) {
                Ok(control) => return Ok(Some(control)),
                Err(_) if tries < CONTROL_FILE_TRIES => std::thread::sleep(CONTROL_FILE_PAUSE),
                Err(source) => return Err(PushError::ControlFile { path: path.to_owned(), source }),
            }
        }
    }
    Ok(None)
}

/// Disk and processor work where it holds no deadline up.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PushError> + Send + 'static,
) -> Result<T, PushError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| PushError::Task(error.to_string()))?
}
