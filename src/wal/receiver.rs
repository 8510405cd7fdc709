//! The state of one stream of WAL: what comes next, whether it continues what is archived, where segments end. Pure.
//!
//! Invariant: bytes are accepted in order, without a hole, within one segment at a time; whether they are sound has been
//! looked at ([`Receiver::unsound`]): what is not is accepted too, being all there is. An [`Overlap`] is one repository's: it is compared only when the bytes that are archived there have
//! come again and were equal (P1, P6).

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;

use super::{Decoder, Unsound, WalAudit, WalDamage};
use crate::types::{Digest, Lsn, SegmentHasher, SegmentSize, SystemId, TimelineId};

/// The digest that the bytes from the start of the segment to `at` must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// First byte after them.
    pub at: Lsn,
    /// BLAKE3 of the archived bytes.
    pub digest: Digest,
}

/// What cannot be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    /// The server skipped or repeated bytes.
    #[error("the server sent WAL at {got} where {expected} comes next")]
    OutOfOrder {
        /// What comes next.
        expected: Lsn,
        /// What came.
        got: Lsn,
    },
    /// The server's bytes are not the archived ones.
    #[error("the server's WAL from {from} to {until} differs from what is archived under the same timeline")]
    Differs {
        /// Start of the segment.
        from: Lsn,
        /// End of the stretch that was compared.
        until: Lsn,
    },
    /// The server's first record does not continue the archived one.
    #[error("the server's WAL at {at} follows a record at {got}, but the last archived record is at {archived}")]
    DoesNotFollow {
        /// The server's first record.
        at: Lsn,
        /// What it names as its predecessor.
        got: Lsn,
        /// What is archived.
        archived: Lsn,
    },
    /// The first record cannot be read.
    #[error(transparent)]
    Damage(#[from] WalDamage),
}

impl ReceiveError {
    /// Is the server's history another than the archived one?
    pub fn is_other_history(&self) -> bool {
        match self {
            Self::Differs { .. } | Self::DoesNotFollow { .. } => true,
            Self::OutOfOrder { .. } | Self::Damage(_) => false,
        }
    }
}

/// What one repository holds already of what comes, until all of it has come again and was equal.
#[derive(Debug, Clone, Default)]
pub struct Overlap {
    /// Ascending.
    expected: VecDeque<Expected>,
    /// Where no byte can be compared: the archived records of which the stream's first record must name one as its
    /// predecessor. Empty: nothing is asked of it.
    follows: Vec<Lsn>,
}

impl Overlap {
    /// `expected` ascend and lie within one segment, its end included. `follows` is for a stream that begins where the
    /// archive ends.
    pub fn new(expected: impl IntoIterator<Item = Expected>, follows: Vec<Lsn>) -> Overlap {
        Overlap { expected: expected.into_iter().collect(), follows }
    }

    /// Where digests are wanted.
    pub fn positions(&self) -> impl Iterator<Item = Lsn> {
        self.expected.iter().map(|expected| expected.at)
    }

    /// Is the stream's first record wanted?
    pub fn wants_first_record(&self) -> bool {
        !self.follows.is_empty()
    }

    /// Has everything that is archived already compared equal?
    pub fn is_compared(&self) -> bool {
        self.expected.is_empty() && self.follows.is_empty()
    }

    /// The stream is at `at`; `digest` is that of the segment that holds the byte before, from `start` to there.
    pub fn passed(&mut self, at: Lsn, start: Lsn, digest: impl FnOnce() -> Digest) -> Result<(), ReceiveError> {
        match self.expected.pop_front_if(|check| check.at == at) {
            Some(check) if check.digest != digest() => Err(ReceiveError::Differs { from: start, until: at }),
            _ => Ok(()),
        }
    }

    /// The stream's first record is at `at` and names `prev` as its predecessor.
    pub fn first_record(&mut self, at: Lsn, prev: Lsn) -> Result<(), ReceiveError> {
        if !self.follows.is_empty() && !self.follows.contains(&prev) {
            let archived = self.follows.first().copied().unwrap_or_default();
            return Err(ReceiveError::DoesNotFollow { at, got: prev, archived });
        }
        self.follows.clear();
        Ok(())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Receiver {
    size: SegmentSize,
    /// [`Receiver::accept`] stops at multiples of this: a divisor of the segment size.
    part: u64,
    position: Lsn,
    /// Over the bytes of the segment that holds `position - 1`, from its start to `position`.
    hasher: SegmentHasher,
    audit: WalAudit,
    /// [`Receiver::accept`] stops here too.
    stops: BTreeSet<Lsn>,
    /// Looks for the first record.
    decoder: Option<Box<Decoder>>,
    first_record: Option<(Lsn, Lsn)>,
}

impl Receiver {
    /// A stream that begins at `at`, the start of a segment. `part` is where the caller wants to stop within a segment: a
    /// power of two of bytes; segments smaller than that are not divided.
    pub fn new(
        at: Lsn,
        size: SegmentSize,
        part: u64,
        system: SystemId,
        timeline: TimelineId,
    ) -> Result<Receiver, WalDamage> {
        Ok(Receiver {
            size,
            part: part.min(size.bytes()),
            position: at,
            hasher: SegmentHasher::new(),
            audit: WalAudit::new(at, size, Some(system), timeline)?,
            stops: BTreeSet::new(),
            decoder: None,
            first_record: None,
        })
    }

    /// [`Receiver::accept`] does not step over `at`.
    pub fn stop_at(&mut self, at: Lsn) {
        if at > self.position {
            self.stops.insert(at);
        }
    }

    /// For a stream that begins where an archive ends: [`Receiver::first_record`] is wanted. Only before the first byte.
    #[must_use]
    pub fn finding_first_record(mut self) -> Receiver {
        self.decoder = Some(Box::new(Decoder::new(self.position, self.size)));
        self
    }

    /// Where the stream's first record begins, and the record that it names as its predecessor; once it has come.
    pub fn first_record(&self) -> Option<(Lsn, Lsn)> {
        self.first_record
    }

    /// What was found damaged among the accepted bytes and was not taken yet, in order.
    pub fn unsound(&mut self) -> Option<Unsound> {
        self.audit.take()
    }

    /// The position of the byte that comes next.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Digest of the current segment up to [`Receiver::position`]; at a segment's end, of the whole segment.
    pub fn digest(&self) -> Digest {
        self.hasher.digest()
    }

    /// The hasher as it is at [`Receiver::position`], fresh at a segment's start.
    pub fn hasher(&self) -> SegmentHasher {
        if self.hasher.offset() == self.size.bytes() { SegmentHasher::new() } else { self.hasher.clone() }
    }

    /// The server's message starts at `start`: must be what comes next.
    pub fn expect(&self, start: Lsn) -> Result<(), ReceiveError> {
        if start == self.position {
            Ok(())
        } else {
            Err(ReceiveError::OutOfOrder { expected: self.position, got: start })
        }
    }

    /// Accepts a beginning of `data` and says how many bytes that is: never beyond the end of a part or segment, nor
    /// beyond a stop, so that the caller sees each border. 0 only for empty `data`.
    pub fn accept(&mut self, data: &[u8]) -> Result<usize, ReceiveError> {
        if data.is_empty() {
            return Ok(0);
        }
        if self.hasher.offset() == self.size.bytes() {
            self.hasher = SegmentHasher::new();
        }
        let part_end = Lsn::new((self.position.get() / self.part + 1).saturating_mul(self.part));
        let border = self.stops.first().map_or(part_end, |stop| part_end.min(*stop));
        let room = border.bytes_since(self.position).unwrap_or(0);
        let used = data.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        let accepted = data.get(..used).unwrap_or(data);
        self.audit.push(accepted);
        if let Some(decoder) = &mut self.decoder {
            decoder.push(Bytes::copy_from_slice(accepted));
            if let Some(record) = decoder.next()? {
                self.first_record = Some((record.start, record.prev));
                self.decoder = None;
            }
        }
        self.hasher.update(accepted);
        self.position = self.position.advance(accepted.len() as u64);
        while self.stops.first().is_some_and(|stop| *stop <= self.position) {
            self.stops.pop_first();
        }
        Ok(accepted.len())
    }
}
