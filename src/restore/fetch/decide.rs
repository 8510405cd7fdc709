//! The decision of `wal fetch`, over values: which branch a request means, what of it is needed for sure, and what the
//! repository's answer comes to. Pure.
//!
//! PostgreSQL asks for a segment on every timeline of its history, the newest first, skipping those that begin behind the
//! segment; the first one it gets it replays. It takes "not there" for the end of the WAL, and promotes. So three
//! things must never be answered with "not there" or with less than there is: a hole, a fork's first segment (recovery
//! would go on with the parent's), and WAL that the plan has counted on.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use crate::types::{Branch, Lsn, ParseError, SegmentNumber, SegmentSize, TimelineHistory, TimelineId};

/// A branch on the way to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The branch.
    pub branch: Branch,
    /// Where the way leaves it for the next one; `None`: it does not.
    pub left_at: Option<Lsn>,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.left_at {
            Some(lsn) => write!(f, "{}@{lsn}", self.branch),
            None => write!(f, "{}", self.branch),
        }
    }
}

impl FromStr for Step {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Step, ParseError> {
        let (branch, left_at) = match text.split_once('@') {
            Some((branch, lsn)) => (branch, Some(lsn.parse()?)),
            None => (text, None),
        };
        Ok(Step { branch: branch.parse()?, left_at })
    }
}

/// Is this a way: every branch but the last is left, in order, for one of a later timeline?
pub fn check_path(path: &[Step]) -> Result<(), Refusal> {
    let in_order = path.windows(2).all(|pair| match pair {
        [step, next] => {
            step.branch.timeline < next.branch.timeline
                && step.left_at.is_some_and(|left| next.left_at.is_none_or(|later| left <= later))
        }
        _ => false,
    });
    if in_order && path.last().is_none_or(|last| last.left_at.is_none()) { Ok(()) } else { Err(Refusal::NotAWay) }
}

/// Why the answer is neither the file nor "not there".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// `--path` is none.
    #[error(
        "--path is no way: branches go from the oldest to the newest, and each but the last says where it is left; \
         hint: `pgkeep restore` writes it"
    )]
    NotAWay,
    /// The server asks for a timeline that the way does not pass.
    #[error(
        "timeline {timeline} is not on the way to the target ({way}); hint: is recovery_target_timeline still what `pgkeep \
         restore` wrote?"
    )]
    OffTheWay {
        /// What was asked for.
        timeline: TimelineId,
        /// The way.
        way: String,
    },
    /// The parent's copy of the segment in which the fork lies.
    #[error(
        "the way leaves branch {branch} at {fork}, within this segment: what follows there is another history; hint: \
         recovery should have asked for the segment on the next timeline; is recovery_target_timeline still what `pgkeep \
         restore` wrote?"
    )]
    ParentAtFork {
        /// The parent.
        branch: Branch,
        /// Where it is left.
        fork: Lsn,
    },
    /// Missing, and later WAL is there.
    #[error(
        "the WAL of branch {branch} is missing from {from} on, and later WAL is there: this is a hole, not the end. Recovery \
         stops here; hint: `pgkeep list` shows what is there; `pgkeep plan` says what can be reached"
    )]
    Hole {
        /// The branch.
        branch: Branch,
        /// First missing byte.
        from: Lsn,
    },
    /// Missing, and needed to get where recovery goes.
    #[error(
        "the WAL of branch {branch} is missing from {from} on, and recovery needs it up to {needed_to} at least; hint: \
         `pgkeep plan` says what can be reached"
    )]
    Needed {
        /// The branch.
        branch: Branch,
        /// First missing byte.
        from: Lsn,
        /// What is needed.
        needed_to: Lsn,
    },
    /// The first segment of a timeline, of which nothing behind the fork is usable.
    #[error(
        "what is archived of branch {branch} in this segment ends at {ends_at}, not behind the fork at {fork}: recovery \
         would end before the fork, or follow the parent; hint: `pgkeep plan` says what can be reached"
    )]
    EndsBeforeFork {
        /// The branch.
        branch: Branch,
        /// Where it begins.
        fork: Lsn,
        /// The end of its last whole record.
        ends_at: Lsn,
    },
    /// Several servers wrote under one timeline, and nobody says which is meant.
    #[error(
        "timeline {timeline} has several histories in the repository ({branches}); hint: `pgkeep restore --timeline BRANCH` \
         writes a command that says which one is meant"
    )]
    SeveralBranches {
        /// The timeline.
        timeline: TimelineId,
        /// Its branches.
        branches: String,
    },
    /// WAL of a timeline whose history is not there.
    #[error(
        "WAL of timeline {timeline} is archived, but not its history file: recovery would take it for a timeline without \
         parents; hint: put {timeline}.history into the archive with `pgkeep wal push`"
    )]
    NoHistory {
        /// The timeline.
        timeline: TimelineId,
    },
}

/// Where a request is to be looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Located {
    /// Nowhere: it lies beyond what is wanted.
    NotThere,
    /// Nothing that could be found would be right.
    Refuse(Refusal),
    /// In the repository.
    Ask(Ask),
}

/// What to ask the repository for, and what is known of it already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Which branch.
    pub branch: Branch,
    /// Which segment.
    pub segment: SegmentNumber,
    /// The cluster's segment size.
    pub size: SegmentSize,
    /// Serve nothing from here on.
    pub until: Option<Lsn>,
    /// WAL of this segment before this position is missing only by a fault.
    pub needed_to: Option<Lsn>,
    /// The branch begins within this segment, here: less than this is its parent's.
    pub fork: Option<Lsn>,
    /// The branch has a parent, and nobody knows where it was left.
    pub fork_unknown: bool,
}

/// What the repository said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The end of the bytes that are there from the segment's start on, without a hole.
    pub end: Lsn,
    /// Of what may be served, the end of the last whole record; of a whole segment, its end.
    pub usable: Lsn,
    /// Something of this branch is there behind `end`.
    pub more_behind: bool,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The bytes up to [`Held::usable`], and zeros.
    Serve,
    /// The archive ends before.
    NotThere,
    /// Recovery stops.
    Refuse(Refusal),
}

/// The branches of which any WAL is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Branches(pub BTreeSet<Branch>);

impl Branches {
    fn of(&self, timeline: TimelineId) -> impl Iterator<Item = &Branch> {
        self.0.iter().filter(move |branch| branch.timeline == timeline)
    }

    /// Without a path the first branch of a timeline is meant, and only where it is the only one.
    pub fn refuse_several(&self, timeline: TimelineId) -> Option<Refusal> {
        self.of(timeline).any(|branch| branch.ordinal != 0).then(|| {
            let branches = self.of(timeline).map(Branch::to_string).collect::<Vec<_>>().join(", ");
            Refusal::SeveralBranches { timeline, branches }
        })
    }
}

/// Looks for a segment on the way that `restore` planned.
pub fn on_path(
    timeline: TimelineId,
    segment: SegmentNumber,
    size: SegmentSize,
    path: &[Step],
    until: Option<Lsn>,
) -> Located {
    if let Err(refusal) = check_path(path) {
        return Located::Refuse(refusal);
    }
    let (start, end) = (segment.start(size), segment.end(size));
    // Servers from 15 on ask beyond their target.
    if until.is_some_and(|until| until <= start) {
        return Located::NotThere;
    }
    let Some(index) = path.iter().position(|step| step.branch.timeline == timeline) else {
        let way = path.iter().map(Step::to_string).collect::<Vec<_>>().join(",");
        return Located::Refuse(Refusal::OffTheWay { timeline, way });
    };
    let step = path.get(index).copied();
    let parent = index.checked_sub(1).and_then(|parent| path.get(parent));
    let Some(Step { branch, left_at }) = step else { return Located::NotThere }; // not reached: found above
    let begins_at = parent.and_then(|parent| parent.left_at);
    if begins_at.is_some_and(|begin| begin.segment(size) > segment) || left_at.is_some_and(|left| left <= start) {
        return Located::NotThere; // another timeline of the way holds it, and the server asks for it there
    }
    if let Some(fork) = left_at.filter(|left| *left < end) {
        return Located::Refuse(Refusal::ParentAtFork { branch, fork });
    }
    let fork = begins_at.filter(|begin| begin.segment(size) == segment);
    // What lies before the end of the way was there when it was planned.
    let needed_to = match (left_at, until) {
        (Some(_), _) => Some(end),
        (None, Some(until)) => Some(until.min(end)),
        (None, None) => fork.map(|fork| fork.advance(1)),
    };
    Located::Ask(Ask { branch, segment, size, until, needed_to, fork, fork_unknown: false })
}

/// Looks for a segment for a server that chooses its timelines itself.
pub fn by_histories(
    timeline: TimelineId,
    segment: SegmentNumber,
    size: SegmentSize,
    histories: &BTreeMap<TimelineId, TimelineHistory>,
    branches: &Branches,
    until: Option<Lsn>,
) -> Located {
    let (start, end) = (segment.start(size), segment.end(size));
    if until.is_some_and(|until| until <= start) {
        return Located::NotThere;
    }
    if let Some(refusal) = branches.refuse_several(timeline) {
        return Located::Refuse(refusal);
    }
    let history = ancestry(timeline, histories);
    let begins_at = history.as_ref().map(TimelineHistory::begins_at).filter(|begin| *begin > Lsn::ZERO);
    if begins_at.is_some_and(|begin| begin.segment(size) > segment) {
        return Located::NotThere;
    }
    let fork = begins_at.filter(|begin| begin.segment(size) == segment);
    // A timeline that is archived and goes on from a later position needs this segment.
    let descendants = histories.values().filter(|other| branches.of(other.timeline()).next().is_some());
    let passed = descendants.filter_map(|other| other.left_at(timeline)).any(|left| end <= left);
    let needed_to = match (passed, until, fork) {
        (true, ..) => Some(end),
        (false, Some(until), _) => Some(until.min(end)),
        // Else recovery would go on with the parent's copy, past the fork.
        (false, None, Some(fork)) => Some(fork.advance(1)),
        (false, None, None) => None,
    };
    let branch = Branch::first(timeline);
    let fork_unknown = timeline != TimelineId::FIRST && history.is_none();
    Located::Ask(Ask { branch, segment, size, until, needed_to, fork, fork_unknown })
}

/// What the repository's answer comes to.
pub fn judge(ask: &Ask, held: &Held) -> Verdict {
    let (start, end) = (ask.segment.start(ask.size), ask.segment.end(ask.size));
    let branch = ask.branch;
    let wanted_end = ask.until.map_or(end, |until| until.min(end));
    let all_there = held.end >= wanted_end;
    if !all_there && held.more_behind {
        return Verdict::Refuse(Refusal::Hole { branch, from: held.end });
    }
    if let Some(needed_to) = ask.needed_to.filter(|needed| held.end < *needed) {
        return Verdict::Refuse(Refusal::Needed { branch, from: held.end, needed_to });
    }
    if !all_there && held.end > start && ask.fork_unknown {
        return Verdict::Refuse(Refusal::NoHistory { timeline: branch.timeline });
    }
    if let Some(fork) = ask.fork.filter(|fork| held.usable <= *fork) {
        return Verdict::Refuse(Refusal::EndsBeforeFork { branch, fork, ends_at: held.usable });
    }
    // No record ends in what is there: zeros, which recovery takes for the end just as well.
    if held.usable <= start { Verdict::NotThere } else { Verdict::Serve }
}

/// What to say of a history file that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MissingHistory {
    /// A descendant's file tells it.
    Derived(TimelineHistory),
    /// There is no such timeline.
    NotThere,
    /// There is, and nobody knows where it comes from.
    Refuse(Refusal),
}

/// A missing history file changes the way that recovery takes without a word: "not there" only where no such timeline is.
pub fn missing_history(
    timeline: TimelineId,
    on_path: Option<Branch>,
    histories: &BTreeMap<TimelineId, TimelineHistory>,
    branches: &Branches,
) -> MissingHistory {
    let first = on_path.is_none_or(|branch| branch.ordinal == 0);
    if first && let Some(history) = ancestry(timeline, histories) {
        return if timeline == TimelineId::FIRST || history.ancestors().is_empty() {
            MissingHistory::NotThere // a root has no file
        } else {
            MissingHistory::Derived(history)
        };
    }
    if on_path.is_some() || branches.of(timeline).next().is_some() {
        return MissingHistory::Refuse(Refusal::NoHistory { timeline });
    }
    MissingHistory::NotThere
}

/// A timeline's ancestry: its own history's, or derived from a descendant's.
pub fn ancestry(timeline: TimelineId, histories: &BTreeMap<TimelineId, TimelineHistory>) -> Option<TimelineHistory> {
    if timeline == TimelineId::FIRST {
        return Some(TimelineHistory::root(timeline));
    }
    let own = histories.get(&timeline).cloned();
    own.or_else(|| histories.values().find_map(|history| history.ancestor_history(timeline)))
}

/// The ancestry of a timeline on the way, where its parent is that timeline's first branch: what a reader may take the
/// bytes before the fork from.
pub fn history_to(path: &[Step], timeline: TimelineId) -> Option<TimelineHistory> {
    let index = path.iter().position(|step| step.branch.timeline == timeline)?;
    let before = path.get(..index)?;
    if before.iter().any(|step| step.branch.ordinal != 0) {
        return None;
    }
    let lines = before.iter().map(|step| Some(format!("{}\t{}\n", step.branch.timeline.get(), step.left_at?)));
    TimelineHistory::parse(timeline, lines.collect::<Option<String>>()?.as_bytes()).ok()
}

#[cfg(test)]
mod tests;
