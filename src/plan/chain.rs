//! From a base backup along the timelines: which WAL leads to where, and how far it is there.
//!
//! A [`Chain`] is the proof that a base backup can be made consistent: every byte of WAL from the start of its start
//! position's segment to its stop position is there, on one path of timelines, and so is every further byte up to
//! `held_to`. Whole segments come from one branch each, the newest of the path that has begun by then, because that is
//! the file PostgreSQL asks for first; a child's copy of the segment in which it forked off covers its parent's bytes.
//! Recovery never leaves a chain: where it ends, a plan ends.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::catalog::inventory::{ClusterInventory, Hole, Stretch};
use crate::catalog::records::{BackupInfo, GapReason};
use crate::types::{BackupLabel, Branch, Lineage, Lsn, ParseError, SegmentSize, TimelineHistory, TimelineId};

/// Which timeline to follow: `recovery_target_timeline`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimelineChoice {
    /// The newest one that shares a history with the newest base backup.
    #[default]
    Latest,
    /// The one that the newest base backup (or the one asked for) was taken on.
    Current,
    /// This one, by its number; refused where two histories have it and the target lies after they parted.
    Number(TimelineId),
    /// Exactly this history.
    Branch(Branch),
}

impl FromStr for TimelineChoice {
    type Err = ParseError;

    /// `latest`, `current`, a decimal number as PostgreSQL takes it (`2`), or a branch as we show it (`00000002`,
    /// `00000002.1`), which means exactly that one; `2.1` is short for it.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::new("a timeline: latest, current, a number, or a branch such as 00000002.1", text);
        match text {
            "latest" => return Ok(Self::Latest),
            "current" => return Ok(Self::Current),
            _ => {}
        }
        if text.len() >= 8 {
            return text.parse().map(Self::Branch).map_err(|_| error());
        }
        if let Some((timeline, ordinal)) = text.split_once('.') {
            let timeline = timeline.parse().ok().and_then(TimelineId::new).ok_or_else(error)?;
            return format!("{timeline}.{ordinal}").parse().map(Self::Branch).map_err(|_| error());
        }
        let plain = text.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| text.parse().ok().and_then(TimelineId::new)).flatten().map(Self::Number).ok_or_else(error)
    }
}

/// What a plan may use besides the target.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Which timeline.
    pub timeline: TimelineChoice,
    /// This base backup and no other; a flagged one is taken too, since it was asked for by name.
    pub backup: Option<BackupLabel>,
    /// Also base backups whose pages failed their checksums.
    pub allow_flagged: bool,
}

/// A way through the timelines: a branch and its ancestors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// The newest branch of the path.
    pub tip: Branch,
    /// Its ancestry.
    pub history: TimelineHistory,
    /// Which branches these timelines are.
    pub lineage: Lineage,
}

impl Path {
    /// The path to a branch; `None` if its history file is missing (and none of its descendants' tells it).
    pub fn of(inventory: &ClusterInventory, tip: Branch) -> Option<Path> {
        Some(Path { tip, history: inventory.path_of(tip)?, lineage: inventory.lineage_of(tip) })
    }

    /// The branch of this path that has this timeline number.
    pub fn branch_of(&self, timeline: TimelineId) -> Option<Branch> {
        self.history.contains(timeline).then(|| self.lineage.branch(timeline))
    }

    /// The branch whose bytes lie at a position.
    pub fn branch_at(&self, lsn: Lsn) -> Branch {
        self.branch_of(self.history.timeline_at(lsn)).unwrap_or(self.tip)
    }

    /// Its branches with where each begins and is left, oldest first.
    pub fn branches(&self) -> Vec<(Branch, Lsn, Option<Lsn>)> {
        let stretches = self.history.path().into_iter();
        stretches.filter_map(|(timeline, from, to)| Some((self.branch_of(timeline)?, from, to))).collect()
    }

    /// The path's beginning, up to one of its timelines.
    pub fn up_to(&self, timeline: TimelineId) -> Option<Path> {
        let (tip, history) = (self.branch_of(timeline)?, self.history.ancestor_history(timeline)?);
        Some(Path { tip, history, lineage: self.lineage.before(timeline).with(tip) })
    }

    /// Does it use this branch?
    pub fn contains(&self, branch: Branch) -> bool {
        self.branch_of(branch.timeline) == Some(branch)
    }
}

/// Why a chain goes no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Nothing later is archived on this path.
    End,
    /// WAL is missing, and later WAL is there.
    Hole(Hole),
    /// A child is known to begin here, and its own WAL is not archived across the fork yet.
    Fork {
        /// The child.
        child: Branch,
        /// Where it begins.
        at: Lsn,
    },
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End => f.write_str("no later WAL is archived"),
            Self::Hole(hole) => write!(f, "{hole}"),
            Self::Fork { child, at } => {
                write!(f, "branch {child} began at {at}, and its WAL from there on is not archived")
            }
        }
    }
}

/// A base backup and the WAL that follows it without a hole.
#[derive(Debug, Clone)]
pub struct Chain {
    /// Where recovery begins.
    pub base: BackupInfo,
    /// The timelines it follows.
    pub path: Path,
    /// Where to read `[start of the base's first segment, held_to)`, in order. Borders between two stretches are borders
    /// of segments.
    pub wal: Vec<Stretch>,
    /// First byte that is not there.
    pub held_to: Lsn,
    /// Why it is not.
    pub limit: Limit,
}

/// The first fork behind `from` whose segment cannot be served: the branch that has it on this path is not archived across
/// the fork. The parent's place among the path's branches, the child and where it begins.
fn uncrossed(inventory: &ClusterInventory, path: &Path, from: Lsn, size: SegmentSize) -> Option<(usize, Branch, Lsn)> {
    let branches = path.branches();
    let runs = |branch: &Branch| inventory.branches.get(branch).map(|known| known.runs(size)).unwrap_or_default();
    let forks = branches.iter().enumerate().skip(1).filter(|(_, (_, fork, _))| from < *fork);
    for (index, (child, fork, _)) in forks {
        let first = fork.segment_start(size).max(from);
        // Of several forks in one segment, the newest branch has the file.
        let server = branches.iter().rev().find(|(_, begin, _)| begin.segment(size) <= fork.segment(size));
        let held = server.map(|(branch, _, _)| runs(branch)).unwrap_or_default();
        if !held.iter().any(|run| run.from <= first && *fork < run.to) {
            return Some((index - 1, *child, *fork));
        }
    }
    None
}

/// How far the WAL of a path reaches from the start of a base backup's first segment. The path is shortened where a fork on
/// it cannot be crossed.
fn reach(inventory: &ClusterInventory, path: Path, base: &BackupInfo) -> (Path, Vec<Stretch>, Lsn, Limit) {
    let size = base.segment_size;
    let from = base.start.segment_start(size);
    if let Some((parent, child, fork)) = uncrossed(inventory, &path, from, size) {
        let branches = path.branches();
        let later = branches.iter().skip(parent + 1).filter_map(|(branch, _, _)| inventory.branches.get(branch));
        let later =
            later.flat_map(|known| known.runs(size)).filter(|run| run.to > fork).map(|run| run.from.max(fork)).min();
        let beyond = match later {
            Some(to) => Limit::Hole(Hole { branch: child, from: fork.segment_start(size), to, reason: None }),
            None => Limit::Fork { child, at: fork },
        };
        let shorter = branches.get(parent).and_then(|(branch, _, _)| path.up_to(branch.timeline));
        let Some(shorter) = shorter else { return (path, Vec::new(), from, beyond) };
        // Forks before this one can be crossed, so this goes no deeper, unless the tip's file served for them too.
        let (path, wal, held_to, limit) = reach(inventory, shorter, base);
        let limit = match (limit, beyond) {
            // Not even the parent's own WAL leads to the fork: that is the first thing missing.
            (Limit::Hole(_), _) | (Limit::Fork { .. }, Limit::Fork { .. }) if held_to < fork => limit,
            _ => beyond,
        };
        return (path, cut(wal, fork), held_to.min(fork), limit);
    }
    let far = Lsn::new(u64::MAX);
    let (mut held_to, mut limit) = match inventory.covers_on(path.tip, &path.history, from, far) {
        Ok(_) => (far, Limit::End),
        Err(hole) if hole.to < far => (hole.from, Limit::Hole(hole)),
        Err(hole) => (hole.from, Limit::End),
    };
    let mut wal = inventory.covers_on(path.tip, &path.history, from, held_to).unwrap_or_default();
    let missing = |at: Lsn, to: Lsn, reason| Limit::Hole(Hole { branch: path.branch_at(at), from: at, to, reason });
    // A segment is one file to recovery: one that would have to be put together from two histories counts as missing.
    if let Some(torn) = wal.iter().skip(1).find(|stretch| stretch.from.segment_offset(size) != 0) {
        let at = torn.from.segment_start(size).max(from);
        (held_to, limit) = (at, missing(at, torn.from, None));
    }
    // Bytes that differ from the server's lead nowhere, even where something was stored behind them, nor do damaged ones.
    // Other gaps end a chain by the bytes that are missing, and no longer do once those were brought in.
    let ends = |reason| matches!(reason, GapReason::Differs | GapReason::Damaged);
    let ending = inventory.gaps.iter().filter(|gap| ends(gap.reason) && path.branch_at(gap.from) == gap.branch);
    // Recovery reads nothing before the base backup's start, though its segment is fetched from the first byte on.
    if let Some(gap) = ending.filter(|gap| base.start < gap.to && gap.from < held_to).min_by_key(|gap| gap.from) {
        (held_to, limit) = (gap.from.max(from), missing(gap.from, gap.to, Some(gap.reason)));
    }
    wal = cut(wal, held_to);
    (path, wal, held_to, limit)
}

/// Stretches up to `end`.
fn cut(mut wal: Vec<Stretch>, end: Lsn) -> Vec<Stretch> {
    wal.retain(|stretch| stretch.from < end);
    if let Some(last) = wal.last_mut() {
        last.to = last.to.min(end);
    }
    wal
}

impl Chain {
    /// The chain from a base backup along a path, or why it cannot be made consistent there.
    pub fn build(inventory: &ClusterInventory, base: &BackupInfo, path: &Path) -> Result<Chain, String> {
        let label = base.label;
        if !path.contains(base.branch) {
            return Err(format!(
                "base backup {label} is of branch {}, which is not on the way to {}",
                base.branch, path.tip
            ));
        }
        if let Some(left) = path.history.left_at(base.timeline).filter(|left| *left < base.stop) {
            let (branch, stop, tip) = (base.branch, base.stop, path.tip);
            return Err(format!(
                "base backup {label} ends at {stop}, after the way to {tip} left branch {branch} at {left}"
            ));
        }
        let (path, wal, held_to, limit) = reach(inventory, path.clone(), base);
        if held_to < base.stop {
            return Err(format!("base backup {label} needs WAL up to {}: {limit}", base.stop));
        }
        if !path.contains(base.branch) {
            // Only a base that ends where a child begins, and the child has no WAL.
            return Err(format!("base backup {label} is of branch {}: {limit}", base.branch));
        }
        Ok(Chain { base: base.clone(), path, wal, held_to, limit })
    }

    /// The shortest beginning of this chain's path that leads to `record_start` and holds everything up to `record_end`,
    /// and where to read it. A stop before a fork is reached on the parent, whose own copy of that segment may be missing.
    pub fn shortest(&self, inventory: &ClusterInventory, record_start: Lsn, record_end: Lsn) -> (Path, Vec<Stretch>) {
        let first = self.path.history.timeline_at(record_start).max(self.base.timeline);
        for (branch, _, _) in self.path.branches() {
            if branch.timeline < first || branch == self.path.tip {
                continue;
            }
            let Some(path) = self.path.up_to(branch.timeline) else { continue };
            let (path, wal, held_to, _) = reach(inventory, path, &self.base);
            if held_to >= record_end && path.contains(branch) {
                return (path, cut(wal, record_end));
            }
        }
        (self.path.clone(), cut(self.wal.clone(), record_end))
    }
}

/// A branch as an answer to "which timelines are there": for refusals and `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KnownBranch {
    /// The branch.
    pub branch: Branch,
    /// Where it begins.
    pub begins_at: Lsn,
    /// The end of its WAL; `None` where there is none.
    pub reaches: Option<Lsn>,
}

/// Every branch of a cluster.
pub fn known_branches(inventory: &ClusterInventory) -> Vec<KnownBranch> {
    let describe = |branch: &Branch| KnownBranch {
        branch: *branch,
        begins_at: inventory.path_of(*branch).map(|history| history.begins_at()).unwrap_or_default(),
        reaches: inventory.segment_size.and_then(|size| {
            let runs = inventory.branches.get(branch)?.runs(size);
            runs.last().map(|run| run.to)
        }),
    };
    inventory.branches.keys().map(describe).collect()
}

/// Why there is no path to follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoPath {
    /// No branch of this number or name.
    Unknown(String),
    /// WAL of this branch is there, and its history file is not.
    NoHistory(Branch),
}

/// The path that `latest` means, and the other histories of the same timeline number.
///
/// The newest timeline that has an ancestor in common with `base`: after going back in time, the live server is on a
/// sibling of the timeline that the newest backup was taken on.
pub fn latest_path(inventory: &ClusterInventory, base: Branch) -> Result<(Path, Vec<Branch>), NoPath> {
    let own = Path::of(inventory, base).ok_or(NoPath::NoHistory(base))?;
    let root = own.branches().first().map(|(branch, _, _)| *branch);
    let mut tip = own;
    for branch in inventory.branches.keys() {
        let Some(path) = Path::of(inventory, *branch) else {
            // Following an older timeline instead would bring an abandoned history back without a word.
            let has_wal = inventory.branches.get(branch).is_some_and(|branch| !branch.pieces.is_empty());
            if has_wal && branch.timeline > base.timeline && branch.ordinal == 0 {
                return Err(NoPath::NoHistory(*branch));
            }
            continue;
        };
        let related = path.branches().first().map(|(branch, _, _)| *branch) == root;
        if related && branch.timeline > tip.tip.timeline {
            tip = path;
        }
    }
    let rivals = rivals(inventory, tip.tip);
    Ok((tip, rivals))
}

/// Other histories under the same timeline number.
pub fn rivals(inventory: &ClusterInventory, tip: Branch) -> Vec<Branch> {
    let same = |branch: &&Branch| branch.timeline == tip.timeline && **branch != tip;
    inventory.branches.keys().filter(same).copied().collect()
}

/// The path to a timeline that was named.
pub fn named_path(inventory: &ClusterInventory, branch: Branch) -> Result<Path, NoPath> {
    let is_ancestor = inventory.branches.values().any(|other| {
        let is_meant = other.ancestors.clone().with(other.branch).branch(branch.timeline) == branch;
        other.history.as_ref().is_some_and(|history| is_meant && history.contains(branch.timeline))
    });
    if !inventory.branches.contains_key(&branch) && !is_ancestor {
        return Err(NoPath::Unknown(branch.to_string()));
    }
    Path::of(inventory, branch).ok_or(NoPath::NoHistory(branch))
}
