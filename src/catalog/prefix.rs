//! How far one segment's pieces go from its first byte on, known by hashes alone: nothing of the segment stays in memory
//! but the hasher's state at the borders of pieces, some 2 KiB each.
//!
//! What always holds: two pieces count together only where their digests agree. A piece that does not open is named and
//! counts as not there. What is durable is what whole objects hold; a tail's bytes are only held.

use std::collections::BTreeMap;

use super::CatalogError;
use super::layout::Name;
use super::load::is_unreadable;
use super::reader::{ObjectReader, Piece};
use super::records::{self, WalRangeNote};
use super::repository::Repository;
use super::tail::TailReader;
use super::writer::MAX_RANGE;
use crate::seal::Kind;
use crate::types::{Digest, SegmentHasher};

/// What was joined of a segment's bytes, from the first on.
#[derive(Debug)]
pub(super) struct Prefix {
    /// The hasher as it was at each border, as far as it has been passed.
    borders: BTreeMap<u32, Option<SegmentHasher>>,
    at: u32,
    durable: u32,
    /// The objects that hold `[0, durable)`.
    durable_in: Vec<Name>,
}

/// How a piece relates to what was joined before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fit {
    /// Its bytes are these, or go on behind them.
    Fits,
    /// It was written after other bytes than these.
    Stranger,
    /// It was written after the same bytes, and then differs.
    Contender,
}

impl Prefix {
    /// `borders`: where else the digest will be asked for, besides the multiples of [`MAX_RANGE`].
    pub fn new(borders: impl IntoIterator<Item = u32>) -> Prefix {
        let borders = borders.into_iter().chain((1..16).map(|part| part * MAX_RANGE));
        let mut borders: BTreeMap<u32, Option<SegmentHasher>> = borders.map(|border| (border, None)).collect();
        borders.insert(0, Some(SegmentHasher::new()));
        Prefix { borders, at: 0, durable: 0, durable_in: Vec::new() }
    }

    /// `[0, at)` was joined.
    pub fn at(&self) -> u32 {
        self.at
    }

    /// `[0, durable)` is held by whole objects.
    pub fn durable(&self) -> u32 {
        self.durable
    }

    /// Which objects those are.
    pub fn durable_in(&self) -> &[Name] {
        &self.durable_in
    }

    fn hasher(&self, border: u32) -> Option<&SegmentHasher> {
        self.borders.get(&border)?.as_ref()
    }

    /// The digest of `[0, border)`, where that was joined and is a border.
    pub fn digest(&self, border: u32) -> Option<Digest> {
        self.hasher(border).map(SegmentHasher::digest)
    }

    /// The digests at the multiples of [`MAX_RANGE`] before the end, and at the end.
    pub fn digests(&self) -> Vec<(u32, Digest)> {
        let marks =
            self.borders.range(..=self.at).filter(|(at, _)| **at > 0 && (**at == self.at || **at % MAX_RANGE == 0));
        marks.filter_map(|(at, hasher)| Some((*at, hasher.as_ref()?.digest()))).collect()
    }

    /// Forgets what lies behind a border.
    pub fn cut(&mut self, border: u32) {
        self.borders.iter_mut().filter(|(at, _)| **at > border).for_each(|(_, hasher)| *hasher = None);
        (self.at, self.durable) = (self.at.min(border), self.durable.min(border));
    }

    fn is_durable(&mut self, name: &Name, from: u32, to: u32) {
        if from <= self.durable && to > self.durable {
            self.durable = to;
            self.durable_in.push(name.clone());
        }
    }

    fn take(&mut self, passed: Passing) {
        for (at, hasher) in passed.borders {
            self.borders.insert(at, Some(hasher));
        }
        self.at = self.at.max(passed.at);
        self.borders.insert(passed.at, Some(passed.hasher));
    }
}

/// A piece's bytes going by.
struct Passing {
    at: u32,
    hasher: SegmentHasher,
    /// New borders, behind what was joined before.
    borders: Vec<(u32, SegmentHasher)>,
}

impl Passing {
    /// Hashes the next bytes; `false` where they are not those that were joined before.
    fn pass(&mut self, prefix: &Prefix, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let next = prefix.borders.range(self.at.saturating_add(1)..).next().map(|(border, _)| *border);
            let step = next.map_or(bytes.len(), |border| bytes.len().min((border - self.at) as usize)); // border > at
            let (now, rest) = bytes.split_at(step); // invariant: step <= bytes.len()
            self.hasher.update(now);
            self.at = self.at.saturating_add(u32::try_from(now.len()).unwrap_or(u32::MAX));
            bytes = rest;
            match prefix.borders.get(&self.at) {
                Some(Some(known)) if known.digest() != self.hasher.digest() => return false,
                Some(None) => self.borders.push((self.at, self.hasher.clone())),
                Some(Some(_)) | None => {}
            }
        }
        true
    }
}

enum Bytes {
    Range(ObjectReader),
    Tail(Box<TailReader>),
}

impl Bytes {
    async fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, CatalogError> {
        match self {
            Bytes::Range(reader) => reader.next_chunk().await,
            Bytes::Tail(reader) => reader.next_chunk().await,
        }
    }
}

impl Repository {
    /// Compares a piece that begins at a border which was joined with what was joined, and takes what it adds. Holds some
    /// MiB of it at a time.
    ///
    /// # Errors
    /// Damage of the piece: nothing of it was taken, but of a tail what lies before the damage.
    pub(super) async fn join_piece(&self, prefix: &mut Prefix, piece: &Piece) -> Result<Fit, CatalogError> {
        let Some(before) = prefix.hasher(piece.from).cloned() else { return Ok(Fit::Stranger) };
        let mut bytes = match piece.to {
            Some(to) if to <= prefix.at() => {
                let note = self.note_of(piece).await?;
                let fit = match (note.digest_from == before.digest(), prefix.digest(to), note.digest_to) {
                    (false, ..) => Fit::Stranger,
                    (true, Some(ours), Some(theirs)) if ours == theirs => Fit::Fits,
                    (true, ..) => Fit::Contender,
                };
                if fit == Fit::Fits {
                    prefix.is_durable(&piece.name, piece.from, to);
                }
                return Ok(fit);
            }
            Some(_) => Bytes::Range(self.open_reader_at(piece.name.clone(), Kind::WalRange, piece.len, None).await?),
            None => match self.open_tail_reader(piece).await? {
                Some(tail) => Bytes::Tail(Box::new(tail)),
                None => return Ok(Fit::Fits), // nothing is in it
            },
        };
        let note: WalRangeNote = match &bytes {
            Bytes::Range(reader) => {
                records::from_json(reader.note()).map_err(|source| self.record(&piece.name, source))?
            }
            Bytes::Tail(tail) => tail.note().clone(),
        };
        if note.digest_from != before.digest() {
            return Ok(Fit::Stranger);
        }
        let mut passing = Passing { at: piece.from, hasher: before, borders: Vec::new() };
        while let Some(chunk) = bytes.next_chunk().await? {
            if !passing.pass(prefix, &chunk) {
                return Ok(Fit::Contender);
            }
            if u64::from(passing.at) > note.segment_size.bytes() {
                return Err(self.inconsistent(&piece.name, "it goes on beyond the end of its segment"));
            }
        }
        if let Some(to) = piece.to {
            if passing.at != to || note.digest_to != Some(passing.hasher.digest()) {
                return Err(self.inconsistent(&piece.name, "it does not hold what its note says"));
            }
            prefix.take(passing);
            prefix.is_durable(&piece.name, piece.from, to);
            return Ok(Fit::Fits);
        }
        if passing.at > prefix.at() {
            prefix.take(passing);
        }
        match &bytes {
            Bytes::Tail(tail) => match tail.damage() {
                Some(damage) => Err(self.inconsistent(&piece.name, damage)),
                None => Ok(Fit::Fits),
            },
            Bytes::Range(_) => Ok(Fit::Fits),
        }
    }

    /// [`Repository::join_piece`] where what does not open is not there: the alarm is given, and `None`.
    pub(super) async fn join_if_it_opens(
        &self,
        prefix: &mut Prefix,
        piece: &Piece,
    ) -> Result<Option<Fit>, CatalogError> {
        match self.join_piece(prefix, piece).await {
            Ok(fit) => Ok(Some(fit)),
            Err(error) if error.is_damage() || is_unreadable(&error) => {
                tracing::error!(object = %piece.name, %error, "does not open; resuming without it");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
