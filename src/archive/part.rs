//! The bytes of one part of a segment as they come in: kept until the part is complete and durable, once for all
//! repositories.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::OnceCell;

use super::uploader::RangeBytes;
use crate::catalog::SealedRange;
use crate::types::{Digest, Id128, Lsn, SegmentHasher, SegmentNumber, SegmentSize};

/// A segment up to this size is put whole; a larger one in parts of this size, so that memory does not grow with it.
pub const MAX_PART: u64 = crate::catalog::MAX_RANGE as u64;

/// Bytes are kept in pieces of this size: the size of a sealed frame.
const PIECE: usize = 1 << 20;

/// A complete segment, or a part of at most [`MAX_PART`] of a larger one, filling up.
#[derive(Debug)]
pub struct Part {
    /// The segment it belongs to.
    pub segment: SegmentNumber,
    /// Its first byte.
    pub from: Lsn,
    /// Over the segment's bytes before it.
    before: SegmentHasher,
    end: Lsn,
    pieces: Vec<Bytes>,
    filling: Vec<u8>,
}

impl Part {
    /// The part that begins at `from`, a border of parts; `before` has hashed the segment up to there.
    pub fn new(from: Lsn, size: SegmentSize, before: SegmentHasher) -> Part {
        let end = from.advance(size.bytes().min(MAX_PART));
        Part { segment: from.segment(size), from, before, end, pieces: Vec::new(), filling: Vec::new() }
    }

    /// Digest of the segment's bytes before the part.
    pub fn digest_from(&self) -> Digest {
        self.before.digest()
    }

    /// Digest of the segment's bytes before `at`, which has come in and lies within the part (its end included).
    pub fn digest_at(&self, at: Lsn) -> Digest {
        let mut hasher = self.before.clone();
        self.slice(self.from, at).iter().for_each(|piece| hasher.update(piece));
        hasher.digest()
    }

    /// First byte after what has come in.
    pub fn received(&self) -> Lsn {
        self.from.advance(self.len())
    }

    /// First byte after the part.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// Bytes that have come in.
    pub fn len(&self) -> u64 {
        (self.pieces.len() * PIECE + self.filling.len()) as u64
    }

    /// Room for how many more bytes?
    pub fn room(&self) -> u64 {
        self.end.bytes_since(self.received()).unwrap_or(0)
    }

    /// Adds bytes; the caller keeps within [`Part::room`].
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.filling.capacity() == 0 {
                let rest = usize::try_from(self.room()).unwrap_or(PIECE);
                self.filling.reserve_exact(PIECE.min(rest.max(bytes.len())));
            }
            let (now, later) = bytes.split_at(bytes.len().min(PIECE - self.filling.len()));
            self.filling.extend_from_slice(now);
            if self.filling.len() == PIECE {
                self.pieces.push(Bytes::from(std::mem::take(&mut self.filling)));
            }
            bytes = later;
        }
    }

    /// The bytes `[from, to)`, which have come in, in pieces.
    pub fn slice(&self, from: Lsn, to: Lsn) -> Vec<Bytes> {
        let offset = |lsn: Lsn| usize::try_from(lsn.bytes_since(self.from).unwrap_or(0)).unwrap_or(usize::MAX);
        let (from, to) = (offset(from), offset(to).min(self.len() as usize));
        let mut slices = Vec::new();
        let last = (!self.filling.is_empty()).then_some(self.filling.as_slice());
        let mut at = 0;
        for piece in &self.pieces {
            let (begin, end) = (from.max(at) - at, to.min(at + piece.len()).saturating_sub(at));
            if begin < end {
                slices.push(piece.slice(begin..end));
            }
            at += piece.len();
        }
        if let Some(piece) = last {
            let (begin, end) = (from.max(at) - at, to.saturating_sub(at).min(piece.len()));
            if let Some(bytes) = piece.get(begin..end).filter(|bytes| !bytes.is_empty()) {
                slices.push(Bytes::copy_from_slice(bytes));
            }
        }
        slices
    }

    /// All bytes, in pieces, and the hasher as it was before them.
    pub fn into_pieces(mut self) -> (Vec<Bytes>, SegmentHasher) {
        if !self.filling.is_empty() {
            self.pieces.push(Bytes::from(self.filling));
        }
        (self.pieces, self.before)
    }
}

/// A complete part, on its way to the repositories. It is sealed once for each realm.
#[derive(Debug)]
pub struct WholePart {
    /// Without its bytes.
    range: RangeBytes,
    pieces: Mutex<Vec<Bytes>>,
    /// Nobody but the first who seals it needs its bytes.
    once: bool,
    before: SegmentHasher,
    sealed: Mutex<HashMap<Id128, Arc<OnceCell<SealedRange>>>>,
}

impl WholePart {
    /// `before` has hashed the segment up to the range. `once`: a single repository takes it, so that its bytes need not
    /// be kept beside the sealed ones.
    pub fn new(mut range: RangeBytes, before: SegmentHasher, once: bool) -> WholePart {
        let pieces = Mutex::new(std::mem::take(&mut range.pieces));
        WholePart { range, pieces, once, before, sealed: Mutex::default() }
    }

    /// First byte, and first byte after it.
    pub fn place(&self) -> (Lsn, Lsn) {
        (self.range.from, self.range.to)
    }

    /// Its bytes, to be sealed.
    pub fn range(&self) -> RangeBytes {
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner); // taken or cloned as a whole
        let pieces = if self.once { std::mem::take(&mut *pieces) } else { pieces.clone() };
        RangeBytes { pieces, ..self.range.clone() }
    }

    /// Digest of the segment's bytes before `at`, which lies within the part (its end included).
    pub fn digest_at(&self, at: Lsn) -> Digest {
        if at == self.range.to {
            return self.range.digest_to;
        }
        let pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner); // as above
        let mut left = usize::try_from(at.bytes_since(self.range.from).unwrap_or(0)).unwrap_or(usize::MAX);
        let mut hasher = self.before.clone();
        for piece in pieces.iter() {
            let now = left.min(piece.len());
            hasher.update(piece.get(..now).unwrap_or_default());
            left -= now;
        }
        hasher.digest()
    }

    /// What it is when it is sealed for a realm.
    pub fn sealed_for(&self, realm: Id128) -> Arc<OnceCell<SealedRange>> {
        let mut sealed = self.sealed.lock().unwrap_or_else(PoisonError::into_inner); // inserts only: never half changed
        Arc::clone(sealed.entry(realm).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_goes_in_comes_out(cuts in proptest::collection::vec(1usize..900_000, 1..8), a in 0usize..4_000_000, b in 0usize..4_000_000) {
            let size = SegmentSize::new(16 << 20).unwrap();
            let mut part = Part::new(Lsn::new(32 << 20), size, SegmentHasher::new());
            let mut all = Vec::new();
            for (i, cut) in cuts.into_iter().enumerate() {
                let bytes: Vec<u8> = (0..cut).map(|n| (n * 7 + i) as u8).collect();
                part.push(&bytes);
                all.extend(bytes);
            }
            prop_assert_eq!(part.len(), all.len() as u64);
            let (from, to) = (a.min(b).min(all.len()), a.max(b).min(all.len()));
            let lsn = |offset: usize| Lsn::new((32 << 20) + offset as u64);
            prop_assert_eq!(part.slice(lsn(from), lsn(to)).concat(), &all[from..to]);
            prop_assert_eq!(part.digest_at(lsn(to)), Digest::of(&all[..to]));
            prop_assert_eq!(part.into_pieces().0.concat(), all);
        }
    }

    #[test]
    fn large_segments_go_in_parts() {
        let end = |size: u64| Part::new(Lsn::ZERO, SegmentSize::new(size << 20).unwrap(), SegmentHasher::new()).end();
        assert_eq!([end(1), end(16), end(64), end(1024)].map(Lsn::get), [1 << 20, 16 << 20, 64 << 20, 64 << 20]);
    }
}
