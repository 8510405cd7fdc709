//! Where streaming goes on after a start, a cut connection or a change of timeline. Pure.
//!
//! Invariant (P1, P6): the stream begins at the start of a segment whose first bytes are archived wherever anything is
//! archived, so that there is an overlap; [`Resume::Stream`] says where it ends, and nothing is acknowledged before it
//! has compared equal. A history that the repository does not know as the server's is never continued.

use super::probe::{Bug, planted};
use crate::types::{Branch, Lineage, Lsn, SegmentSize, TimelineHistory, TimelineId};

/// What the server says of itself, and what its slot keeps.
#[derive(Debug, Clone)]
pub struct ServerState {
    /// The history of the timeline that the server is on.
    pub history: TimelineHistory,
    /// How far it has flushed its own WAL.
    pub flushed: Lsn,
    /// Where the slot begins to keep WAL; `None` where that cannot be known.
    pub slot_begins_at: Option<Lsn>,
    /// Which branch each timeline of its history is.
    pub lineage: Lineage,
    /// Where a history that nothing is archived of should begin, if the server still has that: the start of the segment in
    /// which it was seen to differ from another.
    pub differs_from: Option<Lsn>,
}

/// What a repository holds of one branch: the end of its contiguous run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The branch.
    pub branch: Branch,
    /// First byte that is missing, or first byte after a recorded gap.
    pub to: Lsn,
    /// Are the bytes before `to` there? Not behind a gap: nothing can be compared then.
    pub comparable: bool,
}

/// Where to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// Stream `timeline` from `at`, which is the start of a segment.
    Stream {
        /// The timeline to ask for.
        timeline: TimelineId,
        /// Start of a segment.
        at: Lsn,
        /// What the repository holds and the server must send again, equal, before anything else counts.
        overlap: Option<Overlap>,
        /// Where the fork lies on a segment's border, no byte of the parent comes again: the first record must name the
        /// last one of this branch as its predecessor.
        follows: Option<Branch>,
        /// Bytes that the repository holds of `timeline`'s parent beyond the fork: nothing continues them.
        dead_tail: Option<DeadTail>,
    },
    /// The server has lost what is archived, or writes another history.
    Refused(Refusal),
}

/// The bytes `[segment start, until)` of `branch`'s segment, archived already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overlap {
    /// The branch in the repository that holds them; on a fork it is the parent's.
    pub branch: Branch,
    /// First byte after them.
    pub until: Lsn,
}

/// What is archived of a timeline beyond the point where its child left it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeadTail {
    /// The branch that was left.
    pub branch: Branch,
    /// The fork.
    pub from: Lsn,
    /// End of what is archived.
    pub to: Lsn,
}

/// Why the server's WAL must not be mixed with the archived.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The archive is ahead of the server.
    #[error(
        "timeline {timeline} is archived up to {archived}, but the server has written only up to {flushed}: it was rolled \
         back to an older copy, or it is another server with the same system identifier"
    )]
    ServerBehindArchive {
        /// The timeline in question.
        timeline: TimelineId,
        /// End of what is archived.
        archived: Lsn,
        /// The server's own flush position.
        flushed: Lsn,
    },
}

/// Decides where to go on; `held` has the contiguous run of every branch that holds any WAL.
pub fn resume(server: &ServerState, held: &[Held], size: SegmentSize) -> Resume {
    let known = |timeline| held.iter().find(|held| held.branch == server.lineage.branch(timeline));
    let path = server.history.path();
    // The newest timeline of the server's path of which anything is archived.
    let Some((index, newest)) = path.iter().enumerate().rev().find_map(|(i, s)| known(s.0).map(|h| (i, *h))) else {
        return from_the_slot(server, size);
    };
    let (timeline, _, left_at) = path[index]; // invariant: index comes from enumerate over `path`
    match left_at {
        // The server is on this very timeline.
        None if newest.to > server.flushed => {
            Resume::Refused(Refusal::ServerBehindArchive { timeline, archived: newest.to, flushed: server.flushed })
        }
        // The timeline was left, and everything of it up to the fork is archived: on with the child, from the start of
        // the fork's segment, whose first bytes are the parent's.
        Some(fork) if newest.to >= fork || planted(Bug::ForgetTheLastRange) => {
            let child = path.get(index + 1).map_or(server.history.timeline(), |stretch| stretch.0);
            let at = fork.segment_start(size);
            // A fork at a segment's border leaves the child's first segment without anything of the parent's.
            let comparable = fork > at && newest.comparable;
            let overlap = comparable.then_some(Overlap { branch: newest.branch, until: fork });
            let dead_tail = (newest.to > fork).then_some(DeadTail { branch: newest.branch, from: fork, to: newest.to });
            let follows = (fork == at && newest.comparable && newest.to == fork).then_some(newest.branch);
            Resume::Stream { timeline: child, at, overlap, follows, dead_tail }
        }
        _ if newest.comparable => Resume::Stream {
            timeline,
            at: newest.to.segment_before(size).start(size),
            overlap: Some(Overlap { branch: newest.branch, until: newest.to }),
            follows: None,
            dead_tail: None,
        },
        _ => Resume::Stream {
            timeline,
            at: newest.to.segment_start(size),
            overlap: None,
            follows: None,
            dead_tail: None,
        },
    }
}

/// Nothing of this history is archived: everything that the slot keeps, or from where it differs from another one.
fn from_the_slot(server: &ServerState, size: SegmentSize) -> Resume {
    let slot = server.slot_begins_at.filter(|at| *at > Lsn::ZERO && *at <= server.flushed);
    let begin = slot.map_or(server.flushed, |at| server.differs_from.map_or(at, |differs| at.min(differs)));
    let at = begin.segment_start(size);
    Resume::Stream { timeline: server.history.timeline_at(begin), at, overlap: None, follows: None, dead_tail: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn size() -> SegmentSize {
        SegmentSize::new(MIB).unwrap()
    }

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn server(number: u32, forks: &str, flushed: u64) -> ServerState {
        let history = TimelineHistory::parse(timeline(number), forks.as_bytes()).unwrap();
        let slot_begins_at = Some(Lsn::new(3 * MIB + 40));
        let (flushed, lineage) = (Lsn::new(flushed), Lineage::default());
        ServerState { history, flushed, slot_begins_at, lineage, differs_from: None }
    }

    fn held(number: u32, to: u64) -> Held {
        Held { branch: Branch::first(timeline(number)), to: Lsn::new(to), comparable: true }
    }

    fn stream(number: u32, at: u64, overlap: Option<(u32, u64)>) -> Resume {
        let overlap =
            overlap.map(|(of, until)| Overlap { branch: Branch::first(timeline(of)), until: Lsn::new(until) });
        Resume::Stream { timeline: timeline(number), at: Lsn::new(at), overlap, follows: None, dead_tail: None }
    }

    #[test]
    fn an_empty_repository_takes_all_that_the_slot_keeps() {
        assert_eq!(resume(&server(1, "", 9 * MIB), &[], size()), stream(1, 3 * MIB, None));
        // The slot begins on the parent: the parent's WAL first.
        assert_eq!(resume(&server(2, "1\t0/500000\t", 9 * MIB), &[], size()), stream(1, 3 * MIB, None));
    }

    #[test]
    fn on_the_same_timeline_from_the_start_of_the_frontiers_segment() {
        let from = |to| resume(&server(1, "", 9 * MIB), &[held(1, to)], size());
        assert_eq!(from(5 * MIB + 77), stream(1, 5 * MIB, Some((1, 5 * MIB + 77))));
        // At a border the last whole segment comes again: there is always something to compare.
        assert_eq!(from(5 * MIB), stream(1, 4 * MIB, Some((1, 5 * MIB))));
        assert_eq!(from(9 * MIB), stream(1, 8 * MIB, Some((1, 9 * MIB))));
    }

    #[test]
    fn a_server_that_is_behind_the_archive_is_refused() {
        let got = resume(&server(1, "", 5 * MIB), &[held(1, 5 * MIB + 1)], size());
        assert!(matches!(got, Resume::Refused(Refusal::ServerBehindArchive { .. })), "{got:?}");
    }

    #[test]
    fn pitfall_08_a_fork_below_what_was_received_goes_on_from_the_forks_segment() {
        let server = server(2, "1\t0/500123\t", 9 * MIB); // the fork is inside segment 5
        let fork = 5 * MIB + 0x123;
        let before = resume(&server, &[held(1, 5 * MIB + 1)], size());
        assert_eq!(before, stream(1, 5 * MIB, Some((1, 5 * MIB + 1))), "the parent is finished first");
        assert_eq!(resume(&server, &[held(1, fork)], size()), stream(2, 5 * MIB, Some((1, fork))));
        let beyond = resume(&server, &[held(1, 6 * MIB)], size());
        let Resume::Stream { timeline: on, at, overlap, dead_tail, .. } = beyond else { panic!("{beyond:?}") };
        assert_eq!((on, at, overlap.unwrap().until), (timeline(2), Lsn::new(5 * MIB), Lsn::new(fork)));
        assert_eq!(dead_tail.map(|tail| (tail.from, tail.to)), Some((Lsn::new(fork), Lsn::new(6 * MIB))));
        // Once the child holds anything, its own frontier counts.
        let child = resume(&server, &[held(1, 6 * MIB), held(2, 7 * MIB + 5)], size());
        assert_eq!(child, stream(2, 7 * MIB, Some((2, 7 * MIB + 5))));
    }

    #[test]
    fn a_fork_on_a_border_must_follow_the_parents_last_record() {
        let got = resume(&server(2, "1\t0/500000\t", 9 * MIB), &[held(1, 5 * MIB)], size());
        let Resume::Stream { timeline: on, at, overlap, follows, .. } = got else { panic!("{got:?}") };
        assert_eq!((on, at, overlap), (timeline(2), Lsn::new(5 * MIB), None));
        assert_eq!(follows, Some(Branch::first(timeline(1))));
    }

    #[test]
    fn behind_a_gap_there_is_nothing_to_compare() {
        let after_gap = Held { comparable: false, ..held(1, 5 * MIB) };
        assert_eq!(resume(&server(1, "", 9 * MIB), &[after_gap], size()), stream(1, 5 * MIB, None));
    }

    /// What other histories hold, under whatever number, decides nothing for one of which nothing is archived.
    #[test]
    fn p6_a_second_history_goes_on_from_its_own_bytes() {
        let second = |timeline_number| Branch { timeline: timeline(timeline_number), ordinal: 1 };
        let mut rolled_back = server(1, "", 9 * MIB);
        rolled_back.lineage.set(second(1));
        assert_eq!(resume(&rolled_back, &[held(1, 8 * MIB)], size()), stream(1, 3 * MIB, None));
        rolled_back.differs_from = Some(Lsn::new(2 * MIB));
        assert_eq!(resume(&rolled_back, &[held(1, 8 * MIB)], size()), stream(1, 2 * MIB, None));
        let own = Held { branch: second(1), ..held(1, 6 * MIB + 5) };
        let got = resume(&rolled_back, &[held(1, 8 * MIB), own], size());
        let overlap = Some(Overlap { branch: second(1), until: Lsn::new(6 * MIB + 5) });
        let expected =
            Resume::Stream { timeline: timeline(1), at: Lsn::new(6 * MIB), overlap, follows: None, dead_tail: None };
        assert_eq!(got, expected);
        // A second timeline 2 goes on from the fork in the parent that both have.
        let mut promoted = server(2, "1\t0/500123\t", 9 * MIB);
        promoted.lineage.set(second(2));
        let fork = 5 * MIB + 0x123;
        let got = resume(&promoted, &[held(1, fork), held(2, 8 * MIB)], size());
        assert_eq!(got, stream(2, 5 * MIB, Some((1, fork))));
    }
}
