//! What to copy next into a repository that fell behind. Pure.
//!
//! Invariant: segments are copied in order along the server's own path (a parent up to the fork's segment, then its child,
//! whose copy of that segment holds the parent's bytes too), never beyond what the stream keeps in memory; so what is there
//! never has a hole, wherever a fill-up is cut off.

use super::resume::ServerState;
use crate::types::{Branch, Lineage, Lsn, SegmentNumber, SegmentSize, TimelineId};

/// The server's path: its timelines, oldest first, each with its first position and the first one after it.
#[derive(Debug, Clone)]
pub struct Path {
    stretches: Vec<(TimelineId, Lsn, Option<Lsn>)>,
    lineage: Lineage,
    size: SegmentSize,
}

/// How far a repository holds the path: everything before `to`, which is on the timeline `on`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The newest timeline of the path that it holds anything of.
    pub on: TimelineId,
    /// First byte that it lacks.
    pub to: Lsn,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Copy a complete segment; then it holds everything before `to`.
    Segment {
        /// Of which branch.
        branch: Branch,
        /// Which.
        segment: SegmentNumber,
        /// Its end, or where its branch was left within it.
        to: Lsn,
    },
    /// Copy the complete parts of the segment that is being streamed, up to `to`.
    Parts {
        /// Of which branch.
        branch: Branch,
        /// Which.
        segment: SegmentNumber,
        /// A border of parts.
        to: Lsn,
    },
    /// Everything that is not in memory is there: it can take part.
    Join,
    /// It holds a newer timeline than the one that is streamed: it takes part when that is streamed.
    Ahead,
}

impl Path {
    /// The path of a server.
    pub fn of(server: &ServerState, size: SegmentSize) -> Path {
        Path { stretches: server.history.path(), lineage: server.lineage.clone(), size }
    }

    fn index(&self, timeline: TimelineId) -> Option<usize> {
        self.stretches.iter().position(|stretch| stretch.0 == timeline)
    }

    /// A position as the timeline that goes on from it has it: where a branch was left within the segment that comes next,
    /// that is the child's.
    pub fn settle(&self, mut position: Position) -> Position {
        while let Some((index, fork)) = self.index(position.on).and_then(|at| Some((at, self.stretches.get(at)?.2?))) {
            let begin = fork.segment_start(self.size);
            let Some(child) = self.stretches.get(index + 1).filter(|_| position.to >= begin) else { break };
            position = Position { on: child.0, to: begin };
        }
        position
    }

    /// Which of two positions is further on.
    pub fn is_before(&self, one: Position, other: Position) -> bool {
        let place = |position: Position| (self.index(position.on), position.to);
        place(one) < place(other)
    }

    /// What comes next for a repository at `position`, while `streamed` is streamed and everything from `kept_from` on is
    /// in memory.
    pub fn next(&self, position: Position, streamed: TimelineId, kept_from: Lsn) -> Step {
        let at = self.settle(position);
        let branch = self.lineage.branch(at.on);
        let segment = at.to.segment(self.size);
        match self.index(at.on).cmp(&self.index(streamed)) {
            std::cmp::Ordering::Greater => Step::Ahead,
            std::cmp::Ordering::Equal if at.to >= kept_from => Step::Join,
            std::cmp::Ordering::Equal if segment == kept_from.segment(self.size) => {
                Step::Parts { branch, segment, to: kept_from }
            }
            _ => Step::Segment { branch, segment, to: segment.end(self.size) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn path(forks: &[u64], size: u64) -> Path {
        let mut stretches = Vec::new();
        let mut begin = Lsn::ZERO;
        for (index, fork) in forks.iter().enumerate() {
            stretches.push((timeline(index as u32 + 1), begin, Some(Lsn::new(*fork))));
            begin = Lsn::new(*fork);
        }
        stretches.push((timeline(forks.len() as u32 + 1), begin, None));
        Path { stretches, lineage: Lineage::default(), size: SegmentSize::new(size).unwrap() }
    }

    fn at(on: u32, to: u64) -> Position {
        Position { on: timeline(on), to: Lsn::new(to) }
    }

    fn segment(on: u32, number: u64) -> Step {
        let segment = SegmentNumber::new(number);
        let to = segment.end(SegmentSize::new(MIB).unwrap());
        Step::Segment { branch: Branch::first(timeline(on)), segment, to }
    }

    #[test]
    fn a_parent_up_to_the_forks_segment_and_then_its_child() {
        let path = path(&[5 * MIB + 77], MIB);
        let next = |position| path.next(position, timeline(2), Lsn::new(7 * MIB));
        assert_eq!(next(at(1, 3 * MIB + 5)), segment(1, 3));
        assert_eq!(next(at(1, 4 * MIB)), segment(1, 4));
        assert_eq!(next(at(1, 5 * MIB)), segment(2, 5), "the child's copy of the fork's segment");
        assert_eq!(next(at(1, 5 * MIB + 70)), segment(2, 5));
        assert_eq!(next(at(2, 6 * MIB)), segment(2, 6));
        assert_eq!(next(at(2, 7 * MIB)), Step::Join);
        assert_eq!(next(at(2, 7 * MIB + 9)), Step::Join, "it is ahead of what is kept");
        assert_eq!(path.next(at(2, 6 * MIB), timeline(1), Lsn::new(4 * MIB)), Step::Ahead);
        // While the fork's segment itself is being streamed.
        assert_eq!(path.next(at(1, 5 * MIB + 70), timeline(2), Lsn::new(5 * MIB)), Step::Join);
    }

    #[test]
    fn several_forks_within_one_segment() {
        let path = path(&[5 * MIB + 7, 5 * MIB + 9], MIB);
        assert_eq!(path.next(at(1, 5 * MIB), timeline(3), Lsn::new(9 * MIB)), segment(3, 5));
    }

    #[test]
    fn parts_of_the_segment_that_is_streamed() {
        let path = path(&[], 256 * MIB);
        let next = |to| path.next(at(1, to), timeline(1), Lsn::new((512 + 128) * MIB));
        assert!(matches!(next(100 * MIB), Step::Segment { segment, .. } if segment == SegmentNumber::new(0)));
        let parts =
            Step::Parts { branch: Branch::first(timeline(1)), segment: SegmentNumber::new(2), to: Lsn::new(640 * MIB) };
        assert_eq!([next(512 * MIB), next(600 * MIB), next(640 * MIB)], [parts, parts, Step::Join]);
    }

    proptest! {
        /// From anywhere, each step takes it further, no segment is left out, and it ends where it can join.
        #[test]
        fn it_goes_on_without_a_hole_until_it_can_join(
            mut forks in proptest::collection::vec(0u64..40 * MIB, 0..4),
            on in 1u32..6,
            to in 0u64..60 * MIB,
            kept in 40u64..60,
        ) {
            forks.sort_unstable();
            let newest = forks.len() as u32 + 1;
            let on = on.min(newest);
            let begin = if on == 1 { 0 } else { forks[on as usize - 2] };
            let end = forks.get(on as usize - 1).copied().unwrap_or(kept * MIB);
            let path = path(&forks, MIB);
            let mut position = at(on, to.clamp(begin, end.max(begin)));
            let mut steps = 0;
            loop {
                let before = path.settle(position);
                match path.next(position, timeline(newest), Lsn::new(kept * MIB)) {
                    Step::Join => break,
                    Step::Segment { branch, segment, to } => {
                        prop_assert_eq!(branch, Branch::first(before.on));
                        prop_assert_eq!(segment, before.to.segment(SegmentSize::new(MIB).unwrap()));
                        // A parent's segment is never copied beyond the fork's, where it is incomplete.
                        if let Some(fork) = forks.get(branch.timeline.get() as usize - 1) {
                            prop_assert!(to.get() <= fork / MIB * MIB);
                        }
                        position = Position { on: branch.timeline, to };
                        prop_assert!(path.is_before(before, position));
                    }
                    other => prop_assert!(false, "{other:?}"),
                }
                steps += 1;
                prop_assert!(steps < 200);
            }
        }
    }
}
