//! Removes what a complete segment has made superfluous: the ranges and tails under `open/`.
//!
//! What always holds: a piece goes only when its bytes are durable elsewhere in the same repository and were found
//! equal there, or when the same run of pgkeep wrote both. Whatever is not understood, does not open or differs stays.
//! Crash, cancellation: some pieces are gone, the rest stays for the next time.

use super::CatalogError;
use super::prefix::{Fit, Prefix};
use super::reader::{Piece, group};
use super::records::WalRangeNote;
use super::repository::Repository;
use crate::types::{Branch, ClusterId, SegmentNumber, SegmentSize};

/// What removing the pieces of a complete segment did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// What is gone.
    pub removed: Vec<String>,
    /// What stays, and why.
    pub kept: Vec<(String, String)>,
}

impl Repository {
    /// Removes the ranges and tails of a segment whose whole is durable here. A piece that another run of pgkeep wrote
    /// is removed only when its content was found in the whole; whatever else stays is named with the reason.
    /// When to call it is the archiver's policy.
    ///
    /// # Errors
    /// [`CatalogError::Misuse`] when the whole segment is not here; [`CatalogError::TwoContents`]; what the store says.
    pub async fn remove_open_pieces(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
    ) -> Result<Removed, CatalogError> {
        let pieces = self.list_segment(cluster, branch, segment, size).await?;
        let mut done = Removed::default();
        if pieces.open.is_empty() {
            return Ok(done);
        }
        let whole = pieces.complete(size).ok_or_else(|| CatalogError::Misuse {
            name: format!("the segment at {} of {cluster}, branch {branch}", segment.start(size)),
            reason: "its pieces cannot be removed before it is there whole".to_owned(),
        })?;
        let mut whole_is_ours = true;
        for group in group(pieces.wal.iter().cloned()) {
            self.agree(&group).await?; // of two contents under one name neither is a reason to remove anything
        }
        for piece in &whole {
            let note: WalRangeNote = self.note_of(piece).await?;
            whole_is_ours &= note.writer == self.writer();
            self.sync_object(&piece.name).await?; // whoever put it may have died before his sync
        }
        let mut joined: Option<Prefix> = None;
        for piece in &pieces.open {
            let note = match self.note_of(piece).await {
                Ok(note) => note,
                Err(error) if error.is_not_found() => continue, // gone already
                // A tail that a crash left before its first append never confirmed a byte.
                Err(error) if error.is_damage() && piece.is_tail() && self.never_began(piece).await? => {
                    self.store().delete(&self.key_of(&piece.name)?).await.map_err(|source| self.in_store(source))?;
                    done.removed.push(piece.name.to_string());
                    continue;
                }
                Err(error) if error.is_damage() => {
                    done.kept.push((piece.name.to_string(), error.to_string()));
                    continue;
                }
                Err(error) => return Err(error),
            };
            if !(whole_is_ours && note.writer == self.writer()) {
                if !self.can_read() {
                    let reason = "another writer's, and this key cannot read it to compare".to_owned();
                    done.kept.push((piece.name.to_string(), reason));
                    continue;
                }
                let whole = match &mut joined {
                    Some(joined) => joined,
                    none => none.insert(self.join_whole(&whole, &pieces.open).await?),
                };
                if !self.is_within(whole, piece, &note).await? {
                    let reason = "it holds other bytes than the complete segment".to_owned();
                    done.kept.push((piece.name.to_string(), reason));
                    continue;
                }
            }
            self.store().delete(&self.key_of(&piece.name)?).await.map_err(|source| self.in_store(source))?;
            done.removed.push(piece.name.to_string());
        }
        Ok(done)
    }

    async fn never_began(&self, tail: &Piece) -> Result<bool, CatalogError> {
        match self.open_tail_piece(tail).await {
            Ok(content) => Ok(content.is_none()),
            Err(error) if error.is_damage() || error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The complete segment as digests, at the borders of the open pieces.
    async fn join_whole(&self, whole: &[Piece], open: &[Piece]) -> Result<Prefix, CatalogError> {
        let mut borders: Vec<u32> = open.iter().flat_map(|piece| [Some(piece.from), piece.to]).flatten().collect();
        for tail in open.iter().filter(|piece| piece.is_tail()) {
            match self.tail_end(tail).await {
                Ok((end, _)) => borders.push(end),
                Err(error) if error.is_damage() || error.is_not_found() => {} // is kept, or gone
                Err(error) => return Err(error),
            }
        }
        borders.extend(whole.iter().map(|piece| piece.from));
        let mut joined = Prefix::new(borders);
        for piece in whole {
            if self.join_piece(&mut joined, piece).await? != Fit::Fits {
                let (repository, name) = (self.name().to_owned(), piece.name.to_string());
                let other = "the parts of the segment before it".to_owned();
                return Err(CatalogError::Disagreement { repository, name, other });
            }
        }
        Ok(joined)
    }

    /// Are a piece's bytes those of the complete segment?
    async fn is_within(&self, whole: &mut Prefix, piece: &Piece, note: &WalRangeNote) -> Result<bool, CatalogError> {
        if let Some(to) = piece.to {
            return Ok(note.digest_to.is_some() && whole.digest(to) == note.digest_to);
        }
        let end = match self.tail_end(piece).await {
            Ok((end, None)) => end,
            Ok((_, Some(_))) => return Ok(false), // damage
            Err(error) if error.is_damage() => return Ok(false),
            Err(error) => return Err(error),
        };
        // The digest at its end proves all of it; one that grew in this moment has another end.
        let known = whole.digest(end).is_some();
        Ok(known && self.join_piece(whole, piece).await? == Fit::Fits)
    }
}
