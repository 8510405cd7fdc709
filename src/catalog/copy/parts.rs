//! Copies of a segment that the source does not hold as a complete one: the parts of the segment that is still being
//! written, and a segment whose bytes are all there in ranges and tails.
//!
//! What always holds, crash and cancellation: as in [`super`].
//! Memory: one part of at most 64 MiB; of a segment that is held in ranges and tails, the whole of it.

use super::Ready;
use crate::catalog::CatalogError;
use crate::catalog::layout::Name;
use crate::catalog::reader::range_of;
use crate::catalog::records::{self, WalRangeNote};
use crate::catalog::repository::Repository;
use crate::catalog::writer::{Identity, MAX_RANGE, Put};
use crate::seal::Kind;
use crate::types::{Branch, ClusterId, Digest, SegmentHasher, SegmentNumber, SegmentSize};

impl Repository {
    /// Copies the complete parts of a segment from its first byte to offset `to`, which is a border of parts: what the
    /// segment that is being written has of them.
    ///
    /// # Errors
    /// As [`Repository::copy_segment`]; not found where the source lacks one of them.
    pub async fn copy_parts(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
        to: u32,
    ) -> Result<Put, CatalogError> {
        self.check_writable()?;
        let theirs = from.list_segment(cluster, branch, segment, size).await?;
        let (mut at, mut before, mut done) = (0, Digest::of(b""), Put::SameContent);
        while at < to {
            let next = theirs.wal.iter().filter(|piece| piece.from == at && piece.to.is_some_and(|end| end <= to));
            let mut copies: Vec<_> = next.cloned().collect();
            copies.sort_by(|a, b| a.name.cmp(&b.name));
            from.agree(&copies).await?;
            let first = copies.first().and_then(|piece| Some((piece.name.clone(), range_of(&piece.name)?)));
            let Some((name, range)) = first else { return Err(from.lacks(cluster, branch, segment, size)?) };
            let (ready, note) = if self.same_realm(from) {
                let names: Vec<Name> = copies.iter().map(|piece| piece.name.clone()).collect();
                let (checked, _) = from.fetch_first(&names, Kind::WalRange, None).await?;
                let note: WalRangeNote =
                    records::from_json(&checked.note).map_err(|source| from.record(&name, source))?;
                let object = self.as_it_is(from, name.clone(), Kind::WalRange, &checked).await?;
                (Ready::AsItIs(Box::new(object)), note)
            } else {
                let (sealed, _) = self.seal_anew(from, cluster, branch, size, &copies, None).await?;
                let note = sealed.note().clone();
                (Ready::Anew(Box::new(sealed)), note)
            };
            let end = note.digest_to.filter(|_| note.digest_from == before && note.segment_size == size);
            let Some(end) = end else {
                return Err(from.inconsistent(&name, "its note does not continue the part before it"));
            };
            let put = match ready {
                Ready::AsItIs(object) => {
                    let identity = Identity { before: Some(note.digest_from), content: end };
                    self.put_copied(&object, identity, from).await?
                }
                Ready::Anew(sealed) => self.put_range(&sealed).await?,
            };
            match put {
                Put::Conflict(_) => return Ok(put),
                Put::SameContent => {}
                Put::New | Put::BesideDamaged { .. } => done = put,
            }
            (at, before) = (range.to(), end);
        }
        Ok(done)
    }

    /// Copies a segment of which the source holds every byte, in whatever pieces, as a complete one.
    ///
    /// # Errors
    /// As [`Repository::copy_segment`]; not found where a byte is missing.
    pub async fn copy_joined(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
    ) -> Result<Put, CatalogError> {
        self.check_writable()?;
        let read = from.read_segment(cluster, branch, segment, size, None).await?;
        if !read.complete {
            return Err(from.lacks(cluster, branch, segment, size)?);
        }
        let (mut at, mut hasher, mut done) = (0_u32, SegmentHasher::new(), Put::SameContent);
        for part in read.bytes.chunks(MAX_RANGE as usize) {
            let to = at.saturating_add(u32::try_from(part.len()).unwrap_or(u32::MAX));
            let mut sealer = self.seal_wal(cluster, branch, segment, size, (at, to)).await?;
            let digest_from = hasher.digest();
            hasher.update(part);
            let note = WalRangeNote {
                writer: self.writer(),
                server_version: 0,
                segment_size: size,
                digest_from,
                digest_to: Some(hasher.digest()),
                server_time: None,
                server_end: None,
                durable_to: None,
                conflict: None,
            };
            let part = part.to_vec();
            let sealed = self.off_thread(move || sealer.push(&part).and_then(|()| sealer.finish(to, note))).await??;
            match self.put_range(&sealed).await? {
                put @ Put::Conflict(_) => return Ok(put),
                Put::SameContent => {}
                put @ (Put::New | Put::BesideDamaged { .. }) => done = put,
            }
            at = to;
        }
        Ok(done)
    }
}
