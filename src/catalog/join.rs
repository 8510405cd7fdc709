//! Joins pieces of one segment by their digests. Pure.
//!
//! Every range says what the segment's bytes `[0, from)` and `[0, to)` were for its writer, every tail what `[0, from)`
//! were. The joiner hashes the bytes as it takes them and compares at every border: pieces of two histories never end up
//! in one segment, whoever wrote them, however they were cut.

use std::collections::BTreeMap;

use crate::types::{Digest, SegmentHasher};

/// A piece whose content or note does not fit what was joined before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Disagrees;

/// Takes pieces of one segment in order of their first byte.
#[derive(Debug)]
pub(super) struct Joiner {
    bytes: Vec<u8>,
    hasher: SegmentHasher,
    /// The hasher as it was at each border of a piece, as far as it has been passed.
    borders: BTreeMap<u32, Option<SegmentHasher>>,
}

impl Joiner {
    /// `borders`: every offset at which a piece begins or ends, as far as names tell.
    pub fn new(borders: impl IntoIterator<Item = u32>) -> Joiner {
        let mut joiner = Joiner {
            bytes: Vec::new(),
            hasher: SegmentHasher::new(),
            borders: borders.into_iter().map(|border| (border, None)).collect(),
        };
        joiner.borders.insert(0, Some(SegmentHasher::new()));
        joiner
    }

    /// The end of what was joined: `[0, at)` is there.
    pub fn at(&self) -> u32 {
        u32::try_from(self.bytes.len()).unwrap_or(u32::MAX) // a segment has at most 1 GiB
    }

    /// What was joined.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Are `[0, border)` the bytes that this digest is of? `None` where that was not joined or is no border.
    pub fn is_digest_at(&self, border: u32, digest: &Digest) -> Option<bool> {
        self.borders.get(&border)?.as_ref().map(|hasher| hasher.digest() == *digest)
    }

    /// Takes the bytes `[from, from + content.len())` of a writer for whom `[0, from)` had `digest_from`, and, if it
    /// says so, `[0, to)` had `digest_to`. `from` must be a border and not beyond [`Joiner::at`].
    pub fn take(
        &mut self,
        from: u32,
        content: &[u8],
        digest_from: &Digest,
        digest_to: Option<&Digest>,
    ) -> Result<(), Disagrees> {
        let Some(before) = self.borders.get(&from).cloned().flatten() else { return Err(Disagrees) };
        if before.digest() != *digest_from {
            return Err(Disagrees);
        }
        let start = from as usize; // u32 fits
        let known = self.bytes.get(start..).unwrap_or_default();
        let common = known.len().min(content.len());
        let (overlap, fresh) = content.split_at(common); // invariant: common <= content.len()
        if known.get(..common) != Some(overlap) {
            return Err(Disagrees);
        }
        if let Some(digest_to) = digest_to {
            // Before anything is taken: a writer's own digest must fit its own bytes, or the note is another's.
            let mut whole = before;
            whole.update(content);
            if whole.digest() != *digest_to {
                return Err(Disagrees);
            }
        }
        self.extend(fresh);
        Ok(())
    }

    fn extend(&mut self, mut fresh: &[u8]) {
        while !fresh.is_empty() {
            let at = self.at();
            let next = self.borders.range(at.saturating_add(1)..).next().map(|(border, _)| *border);
            let step = next.map_or(fresh.len(), |border| fresh.len().min((border - at) as usize)); // border > at
            let (now, rest) = fresh.split_at(step); // invariant: step <= fresh.len()
            self.hasher.update(now);
            self.bytes.extend_from_slice(now);
            fresh = rest;
            if let Some(entry) = self.borders.get_mut(&u32::try_from(self.bytes.len()).unwrap_or(u32::MAX)) {
                *entry = Some(self.hasher.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// A range or a tail as one writer saw it.
    #[derive(Debug, Clone)]
    struct Piece {
        from: u32,
        content: Vec<u8>,
        digest_from: Digest,
        digest_to: Option<Digest>,
    }

    fn piece(history: &[u8], from: usize, to: usize, tail: bool) -> Piece {
        Piece {
            from: from as u32,
            content: history[from..to].to_vec(),
            digest_from: Digest::of(&history[..from]),
            digest_to: (!tail).then(|| Digest::of(&history[..to])),
        }
    }

    fn join(pieces: &mut [Piece]) -> Result<Vec<u8>, Disagrees> {
        pieces.sort_by_key(|piece| (piece.from, std::cmp::Reverse(piece.content.len())));
        let mut joiner =
            Joiner::new(pieces.iter().flat_map(|piece| [piece.from, piece.from + piece.content.len() as u32]));
        for piece in pieces.iter() {
            if piece.from > joiner.at() {
                break;
            }
            joiner.take(piece.from, &piece.content, &piece.digest_from, piece.digest_to.as_ref())?;
        }
        Ok(joiner.into_bytes())
    }

    proptest! {
        /// However writers cut one history, and however their pieces overlap, the same bytes come out.
        #[test]
        fn any_cover_of_one_history_is_that_history(
            history in vec(any::<u8>(), 1..400),
            cuts in vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()), 0..12),
            cover in vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let len = history.len();
            let mut borders: Vec<usize> = cover.iter().map(|cut| cut.index(len)).chain([0, len]).collect();
            borders.sort();
            borders.dedup();
            let mut pieces: Vec<Piece> =
                borders.windows(2).map(|pair| piece(&history, pair[0], pair[1], pair[0] % 2 == 0)).collect();
            pieces.extend(cuts.iter().map(|(a, b, tail)| {
                let (a, b) = (a.index(len), b.index(len));
                piece(&history, a.min(b), a.max(b) + 1, *tail)
            }));
            prop_assert_eq!(join(&mut pieces), Ok(history));
        }

        /// A piece of another history is refused wherever it touches what was joined: bytes are compared, not names.
        #[test]
        fn p6_a_piece_of_another_history_is_refused(
            history in vec(any::<u8>(), 2..300),
            differs in any::<prop::sample::Index>(), by in 1u8..=255,
            cut in any::<prop::sample::Index>(),
            other in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
            tail in any::<bool>(),
        ) {
            let len = history.len();
            let mut second = history.clone();
            let differs = differs.index(len);
            second[differs] ^= by;
            let cut = cut.index(len - 1) + 1;
            let (a, b) = (other.0.index(len), other.1.index(len));
            let (from, to) = (a.min(b), a.max(b) + 1);
            prop_assume!(differs < to); // else the piece says nothing about the difference
            let mut pieces = vec![piece(&history, 0, cut, false), piece(&history, cut, len, true), piece(&second, from, to, tail)];
            prop_assert_eq!(join(&mut pieces), Err(Disagrees));
        }
    }

    #[test]
    fn p4_a_note_that_does_not_fit_its_own_bytes_is_refused() {
        let history = b"write-ahead log";
        let lie = Piece { digest_to: Some(Digest::of(b"write-behind lo")), ..piece(history, 0, 15, false) };
        assert_eq!(join(&mut [lie]), Err(Disagrees));
    }

    #[test]
    fn what_lies_behind_a_hole_is_not_taken() {
        let history = b"write-ahead log";
        let mut pieces = vec![piece(history, 0, 5, false), piece(history, 6, 15, false)];
        assert_eq!(join(&mut pieces), Ok(b"write".to_vec()));
    }
}
