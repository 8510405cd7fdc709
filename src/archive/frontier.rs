//! Who has confirmed what, and how far PostgreSQL may be told that its WAL is safe. Pure.
//!
//! Invariant (P1): a frontier moves only over bytes that were reported durable, without a hole, and never back.

use std::collections::BTreeMap;

use super::probe::{Bug, planted};
use crate::types::{Lsn, SegmentSize};

/// The end of the contiguous run of durable bytes of one branch in one repository.
#[derive(Debug, Clone)]
pub struct Frontier {
    contiguous: Lsn,
    /// Durable stretches beyond the first hole, by their start.
    beyond: BTreeMap<Lsn, Lsn>,
}

impl Frontier {
    /// Everything up to `at` is durable.
    pub fn new(at: Lsn) -> Frontier {
        Frontier { contiguous: at, beyond: BTreeMap::new() }
    }

    /// The repository has confirmed `[from, to)`, in whatever order. Says whether the contiguous run grew.
    pub fn confirm(&mut self, from: Lsn, to: Lsn) -> bool {
        let before = self.contiguous;
        if planted(Bug::FrontierOverAHole) {
            self.contiguous = before.max(to);
        }
        if from < to && to > self.contiguous {
            let end = self.beyond.entry(from).or_insert(to);
            *end = (*end).max(to);
        }
        while let Some(first) = self.beyond.first_entry() {
            if *first.key() > self.contiguous {
                break;
            }
            self.contiguous = self.contiguous.max(first.remove());
        }
        self.contiguous > before
    }

    /// The end of the contiguous run.
    pub fn get(&self) -> Lsn {
        self.contiguous
    }
}

/// The position that at least `needed` repositories hold durably without a hole: the `needed`-th best frontier.
/// `None` when there are fewer repositories than needed, or none is needed: nothing may be acknowledged then.
pub fn acknowledged(frontiers: impl IntoIterator<Item = Lsn>, needed: usize) -> Option<Lsn> {
    let mut frontiers: Vec<Lsn> = frontiers.into_iter().collect();
    frontiers.sort_unstable_by(|a, b| b.cmp(a));
    needed.checked_sub(1).and_then(|at| frontiers.get(at).copied())
}

/// What is reported as flushed for the acknowledged position `at`.
///
/// At a segment's border it is one byte less: the slot then keeps the last segment, and after a reconnect there is an
/// overlap to compare. Not when commits wait for us (they would wait for a byte that may never come), and not while the
/// server stops (it waits for the last byte too).
pub fn reported(at: Lsn, size: SegmentSize, waited_for: bool) -> Lsn {
    if !waited_for && at > Lsn::ZERO && at.segment_offset(size) == 0 { Lsn::new(at.get() - 1) } else { at }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Under any order of confirmations the frontier is exactly the first byte that was not confirmed.
        #[test]
        fn pitfall_10_never_past_a_hole(confirmed in proptest::collection::vec((0u64..64, 1u64..12), 0..40)) {
            let mut held = [false; 80];
            let mut frontier = Frontier::new(Lsn::new(0));
            let mut last = Lsn::new(0);
            for (from, len) in confirmed {
                let before = frontier.get();
                let grew = frontier.confirm(Lsn::new(from), Lsn::new(from + len));
                held[from as usize..(from + len) as usize].fill(true);
                let first_hole = held.iter().position(|held| !held).unwrap_or(held.len());
                prop_assert_eq!(frontier.get(), Lsn::new(first_hole as u64));
                prop_assert_eq!(grew, frontier.get() > before);
                prop_assert!(frontier.get() >= last);
                last = frontier.get();
            }
        }

        /// The acknowledged position is held by `needed` repositories, and the next byte is not.
        #[test]
        fn p1_acknowledged_is_held_by_enough(frontiers in proptest::collection::vec(0u64..100, 1..6), needed in 0usize..7) {
            let lsns = frontiers.iter().copied().map(Lsn::new);
            match acknowledged(lsns, needed) {
                Some(at) => {
                    prop_assert!(frontiers.iter().filter(|f| **f >= at.get()).count() >= needed);
                    prop_assert!(frontiers.iter().filter(|f| **f > at.get()).count() < needed);
                }
                None => prop_assert!(needed == 0 || needed > frontiers.len()),
            }
        }
    }

    #[test]
    fn the_last_segment_is_kept_for_comparison() {
        let size = SegmentSize::new(1 << 20).unwrap();
        let border = Lsn::new(5 << 20);
        assert_eq!(reported(border, size, false), Lsn::new((5 << 20) - 1));
        assert_eq!(reported(border, size, true), border);
        assert_eq!(reported(border.advance(1), size, false), border.advance(1));
        assert_eq!(reported(Lsn::ZERO, size, false), Lsn::ZERO);
    }
}
