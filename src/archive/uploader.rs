//! Seals ranges of WAL and puts them into a repository. Decides nothing: what to put, and when, is the stream's affair.
//!
//! Invariant: a function returns `Ok` only when the bytes are durable in the repository, under their own digests.
//! A complete part is sealed once for each realm: repositories of one realm receive the same object.
//! Crash and cancellation: a put that was cut off leaves no object; an append that was cut off leaves a tail that ends
//! with whole frames. Either is repeated after the next start.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::OnceCell;

use super::ArchiveError;
use super::part::WholePart;
use crate::catalog::records::WalRangeNote;
use crate::catalog::{CatalogError, Put, RangeSealer, Repository, SealedRange, WalTail, off_thread};
use crate::types::{Branch, ClusterId, Digest, Lineage, Lsn, PgTimestamp, SegmentNumber, SegmentSize};

/// The bytes `[from, to)` of one segment, and what is known of them.
#[derive(Debug, Clone)]
pub struct RangeBytes {
    /// The segment.
    pub segment: SegmentNumber,
    /// First byte.
    pub from: Lsn,
    /// First byte after them.
    pub to: Lsn,
    /// Digest of the segment's bytes before `from`.
    pub digest_from: Digest,
    /// Digest of the segment's bytes before `to`.
    pub digest_to: Digest,
    /// The server's clock when it sent the last of them.
    pub server_time: PgTimestamp,
    /// The server's end of WAL at that time.
    pub server_end: Lsn,
    /// What the repository held without a hole when they were cut; of several the best one.
    pub durable_to: Lsn,
    /// The bytes, in order.
    pub pieces: Vec<Bytes>,
}

impl RangeBytes {
    /// Number of bytes.
    pub fn len(&self) -> u64 {
        self.to.bytes_since(self.from).unwrap_or(0)
    }
}

/// The open segment's tail, where the repository can append.
#[derive(Debug)]
pub struct OpenTail {
    tail: WalTail,
    segment: SegmentNumber,
}

impl OpenTail {
    /// The segment it belongs to.
    pub fn segment(&self) -> SegmentNumber {
        self.segment
    }
}

/// Puts WAL of one branch of one cluster.
#[derive(Debug, Clone)]
pub struct Uploader {
    repository: Repository,
    cluster: ClusterId,
    branch: Branch,
    size: SegmentSize,
    server_version: u32,
    histories: Arc<Histories>,
}

/// A history file, and where it belongs.
#[derive(Debug, Clone)]
pub struct HistoryFile {
    /// Whose it is.
    pub branch: Branch,
    /// The branches that its ancestors are.
    pub ancestors: Lineage,
    /// As the server has it.
    pub text: Bytes,
}

/// History files that are to be there before any WAL is, and whether they are.
#[derive(Debug)]
struct Histories {
    files: Vec<HistoryFile>,
    stored: OnceCell<()>,
}

impl Uploader {
    /// For one stream. `histories` are put before the first WAL is: WAL of a timeline without its history cannot be
    /// restored; and not earlier, because a history that turns out to be another's must leave no trace.
    pub fn new(
        repository: Repository,
        cluster: ClusterId,
        branch: Branch,
        size: SegmentSize,
        server_version: u32,
        histories: Vec<HistoryFile>,
    ) -> Uploader {
        let histories = Arc::new(Histories { files: histories, stored: OnceCell::new() });
        Uploader { repository, cluster, branch, size, server_version, histories }
    }

    /// Where it goes.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The open segment's ranges are appended to one file, one after the other. A writer that may not read could not tell
    /// the end of a tail of its own when it comes back, and makes objects.
    pub fn appends(&self) -> bool {
        self.repository.store().appends() && self.repository.can_read()
    }

    async fn histories_first(&self) -> Result<(), ArchiveError> {
        let put_all = || async {
            for HistoryFile { branch, ancestors, text } in &self.histories.files {
                // One that is there was compared; written otherwise it may be, if the server's was derived.
                if let Ok(Some(_)) = self.repository.get_history(&self.cluster, *branch).await {
                    self.repository.sync_history(&self.cluster, *branch).await?;
                    continue;
                }
                match self.repository.put_history_of(&self.cluster, *branch, text, ancestors).await? {
                    Put::New | Put::SameContent | Put::BesideDamaged { .. } => {}
                    Put::Conflict(_) => {
                        let cluster = self.cluster.clone();
                        return Err(ArchiveError::OtherHistoryFile { cluster, timeline: branch.timeline });
                    }
                }
            }
            Ok(())
        };
        self.histories.stored.get_or_try_init(put_all).await.map(|_| ())
    }

    /// Makes the history files durable that WAL of this timeline needs.
    pub async fn put_histories(&self) -> Result<(), ArchiveError> {
        self.histories_first().await
    }

    /// Puts a complete segment, or a complete part of one.
    pub async fn put_part(&self, part: &WholePart) -> Result<(), ArchiveError> {
        self.histories_first().await?;
        let cell = part.sealed_for(self.repository.realm());
        let seal = || async {
            let range = part.range();
            let offsets = (self.offset(range.from), self.end_offset(&range));
            let sealer =
                self.repository.seal_wal(&self.cluster, self.branch, range.segment, self.size, offsets).await?;
            self.seal(sealer, range).await
        };
        let sealed = cell.get_or_try_init(seal).await?;
        self.put(sealed).await
    }

    /// Makes bytes of the open segment durable: appended to `tail`, or to a new one; as a range of their own where the
    /// repository cannot append. Gives back the tail to go on with.
    pub async fn put_open(&self, tail: Option<OpenTail>, range: RangeBytes) -> Result<Option<OpenTail>, ArchiveError> {
        self.histories_first().await?;
        let from = self.offset(range.from);
        if !self.appends() {
            let sealer = self.repository.seal_open(&self.cluster, self.branch, range.segment, self.size, from).await?;
            self.seal_and_put(sealer, range).await?;
            return Ok(None);
        }
        let bytes = match range.pieces.as_slice() {
            [one] => one.clone(),
            many => Bytes::from(many.concat()),
        };
        if bytes.len() as u64 != range.len() {
            let (from, to) = (range.from, range.to);
            return Err(ArchiveError::Task(format!("{} bytes for {from} to {to}", bytes.len())));
        }
        if let Some(mut open) = tail.filter(|open| open.segment == range.segment && open.tail.to() == from) {
            match open.tail.append(from, &bytes).await {
                Ok(()) => return Ok(Some(open)),
                // A tail whose append failed is never written again (nobody knows what was synced), and one may have been
                // removed by another archiver that has the whole segment: begin another.
                Err(error) => tracing::warn!(cluster = %self.cluster, %error, "an append failed; a new tail is begun"),
            }
        }
        let note = WalRangeNote { digest_to: None, ..self.note(&range) };
        let tail =
            self.repository.open_wal_tail(&self.cluster, self.branch, range.segment, self.size, from, &note).await?;
        let mut open = OpenTail { tail, segment: range.segment };
        open.tail.append(from, &bytes).await?;
        Ok(Some(open))
    }

    /// Removes the open pieces of a segment that is there as a whole.
    pub async fn remove_open_pieces(&self, segment: SegmentNumber) -> Result<(), ArchiveError> {
        let removed = self.repository.remove_open_pieces(&self.cluster, self.branch, segment, self.size).await?;
        tracing::debug!(segment = segment.get(), ?removed, "open pieces of a complete segment");
        Ok(())
    }

    fn offset(&self, lsn: Lsn) -> u32 {
        // invariant: a segment is at most 1 GiB, so an offset within it fits
        u32::try_from(lsn.segment_offset(self.size)).unwrap_or(u32::MAX)
    }

    fn end_offset(&self, range: &RangeBytes) -> u32 {
        let end = range.to.bytes_since(range.segment.start(self.size)).unwrap_or(0);
        u32::try_from(end).unwrap_or(u32::MAX) // invariant: as above
    }

    fn note(&self, range: &RangeBytes) -> WalRangeNote {
        WalRangeNote {
            writer: self.repository.writer(),
            server_version: self.server_version,
            segment_size: self.size,
            digest_from: range.digest_from,
            digest_to: Some(range.digest_to),
            server_time: Some(range.server_time),
            server_end: Some(range.server_end),
            durable_to: Some(range.durable_to),
            conflict: None,
        }
    }

    async fn seal_and_put(&self, sealer: RangeSealer, range: RangeBytes) -> Result<(), ArchiveError> {
        self.put(&self.seal(sealer, range).await?).await
    }

    async fn seal(&self, mut sealer: RangeSealer, range: RangeBytes) -> Result<SealedRange, ArchiveError> {
        let (note, to) = (self.note(&range), self.end_offset(&range));
        // Compression and encryption are work for a thread of their own.
        let sealed = off_thread(move || -> Result<SealedRange, CatalogError> {
            for piece in range.pieces {
                sealer.push_shared(piece)?;
            }
            sealer.finish(to, note)
        });
        Ok(sealed.await.map_err(ArchiveError::task)??)
    }

    async fn put(&self, sealed: &SealedRange) -> Result<(), ArchiveError> {
        accept(self.repository.put_range(sealed).await?)
    }
}

/// Whether what was put is there now.
pub(super) fn accept(put: Put) -> Result<(), ArchiveError> {
    match put {
        Put::New | Put::SameContent => Ok(()),
        Put::BesideDamaged { damaged, copy } => {
            tracing::error!(%damaged, %copy, "an archived object does not open; its content was archived again beside it");
            Ok(())
        }
        Put::Conflict(conflict) => {
            Err(ArchiveError::Conflict { existing: conflict.existing.clone(), kept: conflict.kept.clone() })
        }
    }
}
