//! Where an archiver goes on after it connected, and what the server has to send again before anything is acknowledged.

//!
//! What always holds: nothing is said to be durable that only a tail holds; what does not open costs an alarm and is
//! streamed again, it does not end archiving; memory does not grow with the size of a segment.

use std::cmp::Reverse;

use super::CatalogError;
use super::inventory::{BranchInventory, Run, after_gaps, frontier};
use super::layout::Name;
use super::load::Listed;
use super::prefix::{Fit, Prefix};
use super::reader::{Piece, group};
use super::records::WalRangeNote;
use super::repository::Repository;
use super::writer::{MAX_RANGE, TRIES};
use crate::types::{Branch, ClusterId, Digest, Lsn, SegmentNumber, SegmentSize};

/// Where an archiver goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resume {
    /// The end of the contiguous WAL of the branch as far as it can be read: from here on bytes are new. What a tail
    /// holds counts here, though it may never have reached the disk: see `durable`.
    pub at: Lsn,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
    /// What the server has to send again, and nothing is acknowledged until it has compared equal: digests of the bytes
    /// `[segment start, lsn)` of the segment that holds the last byte before `at`, for every multiple of
    /// [`super::MAX_RANGE`] within it below `at`, and for `at`; ascending. A key that cannot read knows those where pieces
    /// end; `at` is always there. Empty where nothing can be compared: behind a recorded gap, or where nothing usable is
    /// held.
    pub expected: Vec<(Lsn, Digest)>,
    /// The end of the contiguous WAL that whole objects hold, at most `at`, at least the start of the segment that holds the
    /// last byte before `at`. What lies between the two is held by a tail alone: after a failed sync, a kill between
    /// write and sync, or an append that was given up, a tail shows bytes that may never reach the disk. They are to be
    /// compared, put again, and not acknowledged before.
    pub durable: Lsn,
}

/// What is there of one segment from its first byte on.
#[derive(Debug, Default)]
struct Held {
    at: u32,
    durable: u32,
    /// The objects that hold `[0, durable)`.
    durable_in: Vec<Name>,
    digests: Vec<(u32, Digest)>,
}

impl Repository {
    /// Where an archiver of this branch goes on; `None` where nothing of it is here yet. Lists the newest logs only:
    /// what lies further back was contiguous when it was acknowledged. Memory does not grow with the segment.
    ///
    /// What does not open counts as not there, with an alarm that names it: the server still has it, or a gap will be
    /// recorded. Where pieces disagree, what they agree on counts, with an alarm: the server is asked to send that
    /// again, whatever it sends behind is put beside what is there and never over it, and the complete segment settles
    /// which piece was right.
    ///
    /// # Errors
    /// [`CatalogError::Disagreement`] when the pieces of the last segment agree on nothing; what the store says.
    pub async fn resume(&self, cluster: &ClusterId, branch: Branch) -> Result<Option<Resume>, CatalogError> {
        let mut vanished = String::new();
        for _ in 0..TRIES {
            match self.try_resume(cluster, branch).await {
                Err(error) if error.is_not_found() => vanished = error.to_string(), // swept in this moment
                result => return result,
            }
        }
        Err(CatalogError::Vanished { repository: self.name().to_owned(), name: vanished })
    }

    async fn try_resume(&self, cluster: &ClusterId, branch: Branch) -> Result<Option<Resume>, CatalogError> {
        let pieces = self.newest_pieces(cluster, branch).await?;
        let gaps = self.gaps_of(cluster, branch).await?;
        let Some(size) = self.size_by_notes(&pieces).await? else { return Ok(None) };
        let (resolved, damaged) = self.resolve(pieces, size).await?;
        for object in damaged {
            match self.can_read() {
                true => {
                    tracing::error!(object = %object.name, reason = %object.reason, "does not open; resuming without it")
                }
                // As a rule tails, which such a key is not meant to read.
                false => tracing::info!(object = %object.name, reason = %object.reason, "resuming without it"),
            }
        }
        let inventory = BranchInventory { pieces: resolved, ..BranchInventory::new(branch) };
        let behind = |at: Lsn| Resume { at, segment_size: size, expected: Vec::new(), durable: at };
        let runs: Vec<Run> = inventory.runs(size);
        let Some(mut end) = frontier(branch, &runs, &gaps) else {
            // Tails without a byte: the branch begins where the first of them does.
            return Ok(inventory.pieces.first().map(|piece| behind(piece.segment.start(size))));
        };
        let beyond = after_gaps(branch, end, &gaps);
        if beyond > end {
            return Ok(Some(behind(beyond)));
        }
        let begins_at = runs.iter().find(|run| run.to == end).map_or(end, |run| run.from);
        loop {
            let segment = end.segment_before(size);
            let start = segment.start(size);
            let held = self.held(cluster, branch, segment, size).await?;
            if held.at == 0 && start > begins_at {
                end = start; // nothing of it is usable: the segment before it is the last one
                continue;
            }
            if held.at == 0 {
                return Ok(Some(behind(start)));
            }
            // Whoever put them may not have come to sync what makes them last.
            for name in &held.durable_in {
                self.sync_object(name).await?;
            }
            let lsn = |offset: u32| start.advance(u64::from(offset));
            let expected = held.digests.into_iter().map(|(offset, digest)| (lsn(offset), digest)).collect();
            return Ok(Some(Resume { at: lsn(held.at), segment_size: size, expected, durable: lsn(held.durable) }));
        }
    }

    /// The segment size that the newest note which opens says.
    async fn size_by_notes(&self, pieces: &[Listed]) -> Result<Option<SegmentSize>, CatalogError> {
        let mut newest: Vec<&Listed> = pieces.iter().collect();
        newest.sort_by_key(|listed| Reverse((listed.segment, listed.piece.from)));
        for listed in newest {
            match self.note_of(&listed.piece).await {
                Ok(note) => return Ok(Some(note.segment_size)),
                Err(error) if error.is_damage() || error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn held(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
    ) -> Result<Held, CatalogError> {
        let pieces = self.list_segment(cluster, branch, segment, size).await?;
        let all: Vec<Piece> = pieces.wal.into_iter().chain(pieces.open).collect();
        let held = self.held_by_notes(&all).await?;
        if !self.can_read() {
            return match held.left_out {
                Some(error) if held.held.at == 0 => Err(error),
                _ => Ok(held.held),
            };
        }
        let known = |mark: &u32| held.held.digests.iter().any(|(at, _)| at == mark);
        let marks_known =
            (1..16).map(|part| part * MAX_RANGE).filter(|mark| *mark < held.held.at).all(|mark| known(&mark));
        let more = |piece: &Piece| piece.from <= held.held.at && piece.to.is_none_or(|to| to > held.held.at);
        let complete = u64::from(held.held.at) == size.bytes();
        if marks_known && held.left_out.is_none() && (complete || !all.iter().any(more)) {
            return Ok(Held { digests: marks(held.held.digests, held.held.at), ..held.held });
        }
        self.held_by_reading(all).await
    }

    /// By hashing what is there from the segment's start on.
    async fn held_by_reading(&self, all: Vec<Piece>) -> Result<Held, CatalogError> {
        let prefix = self.joined_prefix(all, None).await?;
        let (at, durable, durable_in) = (prefix.at(), prefix.durable(), prefix.durable_in().to_vec());
        Ok(Held { at, durable, durable_in, digests: prefix.digests() })
    }

    async fn joined_prefix(&self, all: Vec<Piece>, border: Option<u32>) -> Result<Prefix, CatalogError> {
        let borders = all.iter().flat_map(|piece| [Some(piece.from), piece.to]).chain([border]);
        let mut prefix = Prefix::new(borders.flatten());
        for group in group(all) {
            let Some(from) = group.first().map(|piece| piece.from) else { continue };
            if from > prefix.at() {
                break;
            }
            match self.agree(&group).await {
                Err(error @ CatalogError::TwoContents { .. }) => {
                    group.iter().for_each(|piece| self.tell_left_out(&piece.name));
                    if from == 0 {
                        return Err(error);
                    }
                    prefix.cut(from);
                    continue;
                }
                agreed => agreed?,
            }
            for piece in &group {
                match self.join_if_it_opens(&mut prefix, piece).await? {
                    None => continue, // another copy may open
                    Some(Fit::Fits) => {}
                    Some(Fit::Stranger) => self.tell_left_out(&piece.name),
                    Some(Fit::Contender) if from == 0 => {
                        return Err(self.disagreement(&piece.name, "the other pieces of the segment"));
                    }
                    Some(Fit::Contender) => {
                        self.tell_left_out(&piece.name);
                        prefix.cut(from);
                    }
                }
                break;
            }
        }
        Ok(prefix)
    }

    /// The digest of a segment's bytes `[0, offset)`, as they are here; `None` where not all of them are, or where this
    /// key cannot read them and no note tells. Memory does not grow with the segment.
    ///
    /// # Errors
    /// [`CatalogError::Disagreement`] when the pieces of the segment agree on nothing; what the store says.
    pub async fn digest_at(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
        offset: u32,
    ) -> Result<Option<Digest>, CatalogError> {
        if offset == 0 {
            return Ok(Some(Digest::of(b"")));
        }
        let pieces = self.list_segment(cluster, branch, segment, size).await?;
        let all: Vec<Piece> = pieces.wal.into_iter().chain(pieces.open).collect();
        let by_notes = self.held_by_notes(&all).await?.held.digests;
        if let Some((_, digest)) = by_notes.iter().find(|(at, _)| *at == offset) {
            return Ok(Some(*digest));
        }
        if !self.can_read() {
            return Ok(None);
        }
        Ok(self.joined_prefix(all, Some(offset)).await?.digest(offset))
    }

    /// By notes alone, all that a key that cannot read has. It ends before a tail, whose end only reading tells: that
    /// part is streamed and stored again.
    async fn held_by_notes(&self, all: &[Piece]) -> Result<ByNotes, CatalogError> {
        let (mut held, mut digest, mut left_out) = (Held::default(), Digest::of(b""), None);
        loop {
            let mut next: Vec<&Piece> = all.iter().filter(|piece| piece.from == held.at && !piece.is_tail()).collect();
            // The longest first, complete parts before ranges, originals before copies.
            next.sort_by_key(|piece| (Reverse(piece.to), piece.name.clone()));
            let mut taken = false;
            for piece in next {
                let same_name = |other: &&Piece| other.name.object == piece.name.object;
                let copies: Vec<Piece> = all.iter().filter(same_name).cloned().collect();
                match self.agree(&copies).await {
                    Err(error @ CatalogError::TwoContents { .. }) => {
                        self.tell_left_out(&piece.name);
                        left_out.get_or_insert(error);
                        continue;
                    }
                    agreed => agreed?,
                }
                match self.note_of(piece).await {
                    Ok(WalRangeNote { digest_from, .. }) if digest_from != digest => {
                        self.tell_left_out(&piece.name);
                        left_out.get_or_insert_with(|| self.disagreement(&piece.name, "the pieces before it"));
                    }
                    Ok(WalRangeNote { digest_to: Some(digest_to), .. }) => {
                        (held.at, digest) = (piece.to.unwrap_or(held.at), digest_to); // grows: a range is never empty
                        held.digests.push((held.at, digest));
                        held.durable_in.push(piece.name.clone());
                        taken = true;
                        break;
                    }
                    Ok(_) => {
                        tracing::error!(object = %piece.name, "its note lacks the digest of its end; resuming without it")
                    }
                    Err(error) if error.is_damage() => {
                        tracing::error!(object = %piece.name, %error, "does not open; resuming without it");
                    }
                    Err(error) => return Err(error),
                }
            }
            if !taken {
                break;
            }
        }
        held.durable = held.at;
        if !self.can_read() {
            held.digests = marks(held.digests, held.at);
        }
        Ok(ByNotes { held, left_out })
    }

    fn disagreement(&self, name: &Name, other: &str) -> CatalogError {
        let (repository, name, other) = (self.name().to_owned(), name.to_string(), other.to_owned());
        CatalogError::Disagreement { repository, name, other }
    }

    fn tell_left_out(&self, name: &Name) {
        tracing::error!(
            object = %name,
            "holds other WAL than the pieces beside it; it is left as it is, and archiving goes on before it"
        );
    }
}

/// What notes tell, and the first piece that did not fit.
struct ByNotes {
    held: Held,
    left_out: Option<CatalogError>,
}

/// Of the digests at borders of pieces those that are wanted: at multiples of [`MAX_RANGE`], and at the end.
fn marks(digests: Vec<(u32, Digest)>, end: u32) -> Vec<(u32, Digest)> {
    digests.into_iter().filter(|(at, _)| *at == end || at % MAX_RANGE == 0).collect()
}
