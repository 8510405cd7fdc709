//! Copies a segment that is not whole: what the source holds of it from its first byte on, joined and verified.
//!
//! Ranges and tails are a repository's own way of holding the segment that is open, so they are not copied as they are:
//! their bytes go into ranges of the target. What the target holds of the same segment already is not put again.
//! Memory: one segment, as it is for whoever reads one.

use crate::catalog::CatalogError;
use crate::catalog::records::WalRangeNote;
use crate::catalog::repository::Repository;
use crate::catalog::writer::{MAX_RANGE, Put};
use crate::types::{Branch, ClusterId, Lsn, SegmentHasher, SegmentNumber, SegmentSize};

/// What copying the beginning of a segment did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiedEnd {
    /// The target holds the segment up to here, from its first byte on.
    pub to: Lsn,
    /// Bytes of the objects that were put.
    pub bytes: u64,
    /// [`Put::New`] when anything is new here.
    pub put: Put,
}

impl Repository {
    /// Copies what the source holds of a segment from its first byte on, without a hole; `like`: a note of the branch,
    /// for what only the archiver knew. Needs a key that reads.
    ///
    /// # Errors
    /// As [`Repository::read_segment`], of either; what the stores say. Where the two hold other bytes:
    /// [`CatalogError::Disagreement`], and nothing is put.
    pub async fn copy_open_segment(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        (branch, segment, size): (Branch, SegmentNumber, SegmentSize),
        like: &WalRangeNote,
    ) -> Result<CopiedEnd, CatalogError> {
        self.check_writable()?;
        let theirs = from.read_segment(cluster, branch, segment, size, None).await?;
        let ours = self.read_segment(cluster, branch, segment, size, None).await?;
        let common = ours.bytes.len().min(theirs.bytes.len());
        if ours.bytes.get(..common) != theirs.bytes.get(..common) {
            let other = format!("{} in repository {}", theirs.sources.join(", "), from.name());
            let (repository, name) = (self.name().to_owned(), ours.sources.join(", "));
            return Err(CatalogError::Disagreement { repository, name, other });
        }
        let start = segment.start(size);
        // Put again from the segment's start on where it is whole now: ranges are for the open segment.
        let have = if theirs.complete { 0 } else { ours.bytes.len() };
        drop(ours);
        let len = theirs.bytes.len();
        let mut done = CopiedEnd { to: start.advance(len.max(have) as u64), bytes: 0, put: Put::SameContent };
        let (mut at, mut hasher) = (0, SegmentHasher::new());
        if let Some(before) = theirs.bytes.get(..have.min(len)) {
            hasher.update(before);
            at = before.len();
        }
        while at < len {
            let to = len.min(at + MAX_RANGE as usize);
            let digest_from = hasher.digest();
            let Some(bytes) = theirs.bytes.get(at..to) else { break }; // invariant: at < to <= len
            hasher.update(bytes);
            let reached = |end: &Lsn| *end <= start.advance(to as u64);
            let known = like.server_end.filter(reached);
            let note = WalRangeNote {
                digest_from,
                digest_to: Some(hasher.digest()),
                segment_size: size,
                server_time: like.server_time.filter(|_| known.is_some()),
                server_end: known,
                durable_to: None, // that of another repository
                conflict: None,
                ..like.clone()
            };
            // invariant: a segment has at most 1 GiB
            let (from_offset, to_offset) = (at as u32, to as u32);
            let mut sealer = match theirs.complete {
                true => self.seal_wal(cluster, branch, segment, size, (from_offset, to_offset)).await?,
                false => self.seal_open(cluster, branch, segment, size, from_offset).await?,
            };
            sealer.push(bytes)?;
            let sealed = self.off_thread(move || sealer.finish(to_offset, note)).await??;
            let put = self.put_range(&sealed).await?;
            if matches!(put, Put::Conflict(_)) {
                return Ok(CopiedEnd { put, ..done });
            }
            if put != Put::SameContent {
                done = CopiedEnd { bytes: done.bytes + sealed.object().len(), put, ..done };
            }
            at = to;
        }
        Ok(done)
    }
}
