//! What a repository holds of a cluster, as plain values: who plans, lists or resumes asks these and no store.
//!
//! Pieces are taken at their names' word: that two neighbours agree (their notes' digests) is checked where bytes are
//! read, and for the end of the WAL where an archiver resumes. A value here is a picture of one moment: what it lists
//! may have been replaced since (ranges by their whole segment), which means "list again", never "not there".

use std::collections::BTreeMap;
use std::fmt;

use super::layout::CopyToken;
use super::records::{BackupInfo, GapReason, GapRecord, WalRangeNote};
use crate::types::{
    BackupLabel, Branch, ClusterId, Lineage, Lsn, SegmentNumber, SegmentSize, TimelineHistory, TimelineId,
};

/// Everything that one repository holds of one cluster.
#[derive(Debug, Clone)]
pub struct ClusterInventory {
    /// Which cluster.
    pub id: ClusterId,
    /// Its segment size; `None` while there is neither WAL nor a backup.
    pub segment_size: Option<SegmentSize>,
    /// Its histories, by branch.
    pub branches: BTreeMap<Branch, BranchInventory>,
    /// Complete base backups, oldest first.
    pub backups: Vec<BackupInfo>,
    /// Backups that were started and have no manifest, oldest first.
    pub unfinished_backups: Vec<BackupLabel>,
    /// Recorded gaps, by branch and position.
    pub gaps: Vec<GapRecord>,
    /// Objects that do not open or are not understood: name and why. They are not counted above.
    pub damaged: Vec<DamagedObject>,
    /// Names that this version does not understand. Left alone.
    pub unknown: Vec<String>,
}

/// An object that is there and cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedObject {
    /// Its full name.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

/// One history of one timeline.
#[derive(Debug, Clone)]
pub struct BranchInventory {
    /// Which.
    pub branch: Branch,
    /// Its history file; `None` for timeline 1, which has none, and where it is missing.
    pub history: Option<TimelineHistory>,
    /// Which branches its ancestors are.
    pub ancestors: Lineage,
    /// Its WAL, sorted by position. Copies of one range are listed each.
    pub pieces: Vec<WalPiece>,
    /// The note of the piece that reaches furthest.
    pub note_of_newest: Option<WalRangeNote>,
}

/// Where a piece of WAL lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// Under `wal/`: a complete segment or a part of one.
    Wal,
    /// Under `open/`: a range of the open segment.
    Open,
    /// Under `open/`: a tail.
    Tail,
}

/// The bytes `[from, to)` of a segment, as one object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct WalPiece {
    /// The segment.
    pub segment: SegmentNumber,
    /// Offset of the first byte in the segment.
    pub from: u32,
    /// Offset of the first byte after it. Of a tail: what opened when it was listed, `from` if it was not opened.
    pub to: u32,
    /// Where it lies.
    pub place: Place,
    /// A copy's token.
    pub token: Option<CopyToken>,
    /// Length of the sealed object, in bytes. Of a tail: its file's, which is preallocated.
    pub object_len: u64,
}

impl WalPiece {
    /// First byte.
    pub fn begins_at(&self, size: SegmentSize) -> Lsn {
        self.segment.start(size).advance(u64::from(self.from))
    }

    /// First byte after it.
    pub fn ends_at(&self, size: SegmentSize) -> Lsn {
        self.segment.start(size).advance(u64::from(self.to))
    }
}

/// Bytes `[from, to)` of one branch without a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte.
    pub from: Lsn,
    /// First byte after it.
    pub to: Lsn,
}

/// Bytes `[from, to)` of a path, and the branch whose objects hold them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Where to read. At a fork this may be the child for bytes that belong to its parent: the child's copy of the
    /// segment holds them too, and it is the file that PostgreSQL asks for first.
    pub branch: Branch,
    /// First byte.
    pub from: Lsn,
    /// First byte after it.
    pub to: Lsn,
}

/// WAL that a path needs and that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub struct Hole {
    /// The branch that the missing bytes belong to.
    pub branch: Branch,
    /// First missing byte.
    pub from: Lsn,
    /// The next position that is there, or the end of what was asked for.
    pub to: Lsn,
    /// Why, if a gap was recorded here.
    pub reason: Option<GapReason>,
}

impl fmt::Display for Hole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.reason == Some(GapReason::Damaged) {
            let Hole { branch, from, to, .. } = self;
            return write!(f, "the WAL of branch {branch} from {from} to {to} is damaged, as it came from the server");
        }
        write!(f, "the WAL of branch {} from {} to {} is not in the repository", self.branch, self.from, self.to)?;
        match self.reason {
            None | Some(GapReason::Damaged) => Ok(()),
            Some(GapReason::SlotLost) => f.write_str(" (the replication slot was lost)"),
            Some(GapReason::Recycled) => f.write_str(" (the server had recycled it)"),
            Some(GapReason::Failover) => f.write_str(" (it was written before a failover and never streamed)"),
            Some(GapReason::MissingHistory) => f.write_str(" (the timeline's history file is missing)"),
            Some(GapReason::Differs) => f.write_str(" (the server's WAL differed from the archive's)"),
            Some(GapReason::Expired) => f.write_str(" (it was expired)"),
            Some(GapReason::Other) => f.write_str(" (a gap was recorded)"),
        }
    }
}

/// Joins sorted `[from, to)` into runs without holes.
fn join(pieces: impl Iterator<Item = (Lsn, Lsn)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (from, to) in pieces.filter(|(from, to)| from < to) {
        match runs.last_mut() {
            Some(last) if from <= last.to => last.to = last.to.max(to),
            _ => runs.push(Run { from, to }),
        }
    }
    runs
}

impl BranchInventory {
    /// A branch of which nothing is known yet.
    pub fn new(branch: Branch) -> BranchInventory {
        let ancestors = Lineage::default();
        BranchInventory { branch, history: None, ancestors, pieces: Vec::new(), note_of_newest: None }
    }

    /// The branch's ancestry; that of a root where there is no history file.
    pub fn path(&self) -> TimelineHistory {
        self.history.clone().unwrap_or_else(|| TimelineHistory::root(self.branch.timeline))
    }

    /// What is there, without holes, by position.
    pub fn runs(&self, size: SegmentSize) -> Vec<Run> {
        join(self.pieces.iter().map(|piece| (piece.begins_at(size), piece.ends_at(size))))
    }

    /// The end of the contiguous WAL: from the first piece on, across recorded gaps and across nothing else.
    /// `None` while there is no piece.
    pub fn frontier(&self, size: SegmentSize, gaps: &[GapRecord]) -> Option<Lsn> {
        frontier(self.branch, &self.runs(size), gaps)
    }
}

/// [`BranchInventory::frontier`] over runs in order of position.
pub fn frontier(branch: Branch, runs: &[Run], gaps: &[GapRecord]) -> Option<Lsn> {
    let mut runs = runs.iter();
    let mut end = runs.next()?.to;
    for run in runs {
        if after_gaps(branch, end, gaps) < run.from {
            break;
        }
        end = run.to; // runs are in order and do not touch
    }
    Some(end)
}

/// Where an archiver goes on after `frontier`: there, or after a gap that was recorded there and not yet filled. What is
/// damaged is archived, so nobody steps over it.
pub fn after_gaps(branch: Branch, mut frontier: Lsn, gaps: &[GapRecord]) -> Lsn {
    let beyond = |at: Lsn| {
        let here = |gap: &&GapRecord| gap.branch == branch && gap.from <= at && at < gap.to;
        gaps.iter().filter(here).filter(|gap| gap.reason != GapReason::Damaged).map(|gap| gap.to).max()
    };
    while let Some(next) = beyond(frontier) {
        frontier = next; // grows, so this ends
    }
    frontier
}

impl ClusterInventory {
    /// A cluster of which nothing is known yet.
    pub fn new(id: ClusterId) -> ClusterInventory {
        ClusterInventory {
            id,
            segment_size: None,
            branches: BTreeMap::new(),
            backups: Vec::new(),
            unfinished_backups: Vec::new(),
            gaps: Vec::new(),
            damaged: Vec::new(),
            unknown: Vec::new(),
        }
    }

    /// The ancestry of a branch: its history file's, or derived from a descendant's where it was lost.
    /// `None` if neither is there; timeline 1 is a root without a file.
    pub fn path_of(&self, branch: Branch) -> Option<TimelineHistory> {
        if let Some(history) = self.branches.get(&branch).and_then(|branch| branch.history.clone()) {
            return Some(history);
        }
        if branch.timeline == TimelineId::FIRST {
            return Some(TimelineHistory::root(branch.timeline));
        }
        let descends = |other: &&BranchInventory| other.ancestors.branch(branch.timeline) == branch;
        let histories = self.branches.values().filter(descends).filter_map(|branch| branch.history.as_ref());
        histories
            .filter(|history| history.timeline() != branch.timeline)
            .find_map(|history| history.ancestor_history(branch.timeline))
    }

    /// Which branches the way to `tip` uses: its ancestors, and itself.
    pub fn lineage_of(&self, tip: Branch) -> Lineage {
        if let Some(known) = self.branches.get(&tip).filter(|known| known.history.is_some()) {
            return known.ancestors.clone().with(tip);
        }
        // A lost history file: as its descendants tell.
        let descends =
            |other: &&BranchInventory| other.history.is_some() && other.ancestors.branch(tip.timeline) == tip;
        let named = self.branches.values().filter(|other| other.branch.timeline > tip.timeline).find(descends);
        named.map(|other| other.ancestors.before(tip.timeline)).unwrap_or_default().with(tip)
    }

    /// The frontier of a branch: the end of its contiguous WAL, `None` where there is none that counts. A child counts
    /// only where its history is known and its parent is there up to the fork's segment (where the child's copy takes
    /// over), unless nothing of the parent was ever archived.
    pub fn frontier(&self, branch: Branch) -> Option<Lsn> {
        let size = self.segment_size?;
        let own = self.branches.get(&branch)?.frontier(size, &self.gaps)?;
        let path = self.path_of(branch)?;
        let Some(parent) = path.ancestors().last() else { return Some(own) };
        let parent_branch = self.lineage_of(branch).branch(parent.timeline);
        let has_wal = self.branches.get(&parent_branch).is_some_and(|parent| !parent.pieces.is_empty());
        if !has_wal {
            return Some(own);
        }
        let reached = after_gaps(parent_branch, self.frontier(parent_branch)?, &self.gaps);
        (reached >= parent.left_at.segment_start(size)).then_some(own)
    }

    /// Is every byte of `[from, to)` on this path there? Where to read it, in order; or the first hole.
    ///
    /// `path` is the history of a timeline's first branch. See [`Self::covers_on`].
    pub fn covers(&self, path: &TimelineHistory, from: Lsn, to: Lsn) -> Result<Vec<Stretch>, Hole> {
        self.covers_on(Branch::first(path.timeline()), path, from, to)
    }

    /// [`Self::covers`] for a tip that may be a second history of its timeline, as may its ancestors.
    ///
    /// A byte of a timeline counts as there when its own branch holds it, or when a later timeline of the path that
    /// forked off within the same segment does: PostgreSQL copies what came before the fork into the child's segment.
    pub fn covers_on(&self, tip: Branch, path: &TimelineHistory, from: Lsn, to: Lsn) -> Result<Vec<Stretch>, Hole> {
        let lineage = self.lineage_of(tip);
        let hole = |at: Lsn, next: Lsn| {
            let branch = lineage.branch(path.timeline_at(at));
            let recorded = self.gaps.iter().find(|gap| gap.branch == branch && gap.from <= at && at < gap.to);
            Hole { branch, from: at, to: next, reason: recorded.map(|gap| gap.reason) }
        };
        let Some(size) = self.segment_size else {
            return if from < to { Err(hole(from, to)) } else { Ok(Vec::new()) };
        };
        // What each timeline of the path may serve, newest first.
        let mut servers: Vec<(Branch, Vec<Run>)> = Vec::new();
        for (timeline, begin, end) in path.path().into_iter().rev() {
            let branch = lineage.branch(timeline);
            let (first, end) = (begin.segment_start(size), end.unwrap_or(Lsn::new(u64::MAX)));
            let runs = self.branches.get(&branch).map(|branch| branch.runs(size)).unwrap_or_default();
            let within = runs.into_iter().map(|run| Run { from: run.from.max(first), to: run.to.min(end) });
            servers.push((branch, within.filter(|run| run.from < run.to).collect()));
        }
        let mut stretches: Vec<Stretch> = Vec::new();
        let mut at = from;
        while at < to {
            let holder = servers.iter().enumerate().find_map(|(index, (branch, runs))| {
                let run = runs.iter().find(|run| run.from <= at && at < run.to)?;
                Some((index, *branch, run.to.min(to)))
            });
            let starts = |servers: &[(Branch, Vec<Run>)]| {
                servers.iter().flat_map(|(_, runs)| runs).map(|run| run.from).filter(|start| *start > at).min()
            };
            let Some((index, branch, mut end)) = holder else {
                let next = starts(&servers).filter(|next| *next < to).unwrap_or(to);
                return Err(hole(at, next));
            };
            // A newer timeline that begins to serve further on is asked first from there.
            if let Some(newer) = servers.get(..index).and_then(starts) {
                end = end.min(newer);
            }
            match stretches.last_mut() {
                Some(last) if last.branch == branch => last.to = end,
                _ => stretches.push(Stretch { branch, from: at, to: end }),
            }
            at = end;
        }
        Ok(stretches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Id128, SystemId};
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Segments of 1 MiB in units of 64 KiB: sixteen units a segment.
    const UNIT: u64 = 64 << 10;
    const UNITS: u64 = 16;

    fn size() -> SegmentSize {
        SegmentSize::new(UNIT * UNITS).unwrap()
    }

    fn at(unit: u64) -> Lsn {
        Lsn::new(unit * UNIT)
    }

    fn first(timeline: u32) -> Branch {
        Branch::first(TimelineId::new(timeline).unwrap())
    }

    fn gap(branch: Branch, from: u64, to: u64) -> GapRecord {
        let noticed_at = jiff::Timestamp::UNIX_EPOCH;
        let (from, to, writer) = (at(from), at(to), Id128::new([0; 16]));
        GapRecord { branch, from, to, reason: GapReason::SlotLost, noticed_at, writer }
    }

    /// Cuts `[from, to)` in units into pieces that do not cross a segment's end.
    fn pieces(ranges: &[(u64, u64)]) -> Vec<WalPiece> {
        let mut pieces = Vec::new();
        for (from, to) in ranges {
            let mut unit = *from;
            while unit < *to {
                let end = (*to).min((unit / UNITS + 1) * UNITS);
                let offset = |unit: u64| u32::try_from(unit * UNIT).unwrap();
                let (begin, len) = (offset(unit % UNITS), offset(end - unit));
                let segment = SegmentNumber::new(unit / UNITS);
                let (to, place) = (begin + len, Place::Open);
                pieces.push(WalPiece { segment, from: begin, to, place, token: None, object_len: 0 });
                unit = end;
            }
        }
        pieces.sort();
        pieces
    }

    fn inventory(branches: &[(u32, &[(u64, u64)])], history: &TimelineHistory) -> ClusterInventory {
        let id = ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) };
        let mut inventory = ClusterInventory::new(id);
        inventory.segment_size = Some(size());
        for (timeline, ranges) in branches {
            let branch = first(*timeline);
            let entry = BranchInventory {
                history: history.ancestor_history(branch.timeline),
                pieces: pieces(ranges),
                ..BranchInventory::new(branch)
            };
            inventory.branches.insert(branch, entry);
        }
        inventory
    }

    fn history(forks: &[u64]) -> TimelineHistory {
        let tip = TimelineId::new(u32::try_from(forks.len()).unwrap() + 1).unwrap();
        let lines: String = (1..).zip(forks).map(|(t, fork)| format!("{t}\t{}\tx\n", at(*fork))).collect();
        TimelineHistory::parse(tip, lines.as_bytes()).unwrap()
    }

    #[test]
    fn p3_gaps_in_a_row_are_stepped_over_together() {
        let runs = [Run { from: at(0), to: at(40) }, Run { from: at(60), to: at(90) }];
        let two = [gap(first(1), 40, 50), gap(first(1), 50, 60)];
        assert_eq!(frontier(first(1), &runs, &two), Some(at(90)));
        assert_eq!(frontier(first(1), &runs, &two[..1]), Some(at(40)));
        assert_eq!(frontier(first(1), &runs, &[gap(first(1), 40, 50), gap(first(2), 50, 60)]), Some(at(40)));
    }

    proptest! {
        /// Against a model that goes unit by unit: the frontier ends where a unit is neither held nor in a gap.
        #[test]
        fn p3_the_frontier_crosses_recorded_gaps_and_nothing_else(
            // Stretches in a row: how long, and held, in a gap, in a gap of another branch, or nothing.
            stretches in vec((1u64..6, 0u8..8), 1..12),
            wider in 0u64..3,
        ) {
            let (mut unit, mut ranges, mut gaps) = (0, Vec::new(), Vec::new());
            for (index, (len, kind)) in stretches.into_iter().enumerate() {
                match kind {
                    _ if index == 0 => ranges.push((unit, unit + len)),
                    0..3 => ranges.push((unit, unit + len)),
                    3..6 => gaps.push((1, unit.saturating_sub(wider), unit + len)), // begins before what was held ends
                    6 => gaps.push((2, unit, unit + len)),
                    _ => {}
                }
                unit += len;
            }
            let recorded: Vec<GapRecord> = gaps.iter().map(|(on, from, to)| gap(first(*on), *from, *to)).collect();
            let branch = BranchInventory { pieces: pieces(&ranges), ..BranchInventory::new(first(1)) };
            let held = |unit: u64| ranges.iter().any(|(from, to)| (*from..*to).contains(&unit));
            let lost = |unit: u64| gaps.iter().any(|(on, from, to)| *on == 1 && (*from..*to).contains(&unit));
            let (mut unit, mut end) = (0, 0);
            while held(unit) || lost(unit) {
                unit += 1;
                end = if held(unit - 1) { unit } else { end };
            }
            prop_assert_eq!(frontier(first(1), &branch.runs(size()), &recorded), Some(at(end)));
        }
    }

    #[test]
    fn runs_join_what_touches_and_what_overlaps() {
        let runs = |ranges: &[(u64, u64)]| {
            let branch = BranchInventory { pieces: pieces(ranges), ..BranchInventory::new(first(1)) };
            branch.runs(size()).iter().map(|run| (run.from.get() / UNIT, run.to.get() / UNIT)).collect::<Vec<_>>()
        };
        assert_eq!(runs(&[(0, 4), (4, 8), (6, 20)]), [(0, 20)]);
        assert_eq!(runs(&[(16, 64), (20, 22), (65, 66)]), [(16, 64), (65, 66)]);
        assert_eq!(runs(&[]), []);
    }

    #[test]
    fn p3_the_frontier_stops_at_a_hole_that_nobody_recorded() {
        let history = history(&[]);
        let mut inventory = inventory(&[(1, &[(16, 40), (48, 60), (70, 80)])], &history);
        let frontier = |inventory: &ClusterInventory| inventory.frontier(first(1)).map(|lsn| lsn.get() / UNIT);
        assert_eq!(frontier(&inventory), Some(40));
        inventory.gaps.push(gap(first(2), 40, 48)); // another branch's
        inventory.gaps.push(gap(first(1), 40, 47)); // not all of it
        assert_eq!(frontier(&inventory), Some(40));
        inventory.gaps.push(gap(first(1), 40, 48));
        assert_eq!(frontier(&inventory), Some(60));
        assert_eq!(after_gaps(first(1), at(60), &inventory.gaps), at(60));
        inventory.gaps.push(gap(first(1), 60, 90));
        assert_eq!(after_gaps(first(1), at(60), &inventory.gaps), at(90));
        assert_eq!(frontier(&inventory), Some(80));
    }

    #[test]
    fn a_child_counts_only_when_its_parent_reaches_the_forks_segment() {
        let path = history(&[40]); // in the segment [32, 48)
        let count = |parent: &[(u64, u64)]| {
            let inventory = inventory(&[(1, parent), (2, &[(32, 60)])], &path);
            inventory.frontier(first(2)).map(|lsn| lsn.get() / UNIT)
        };
        assert_eq!(count(&[(0, 40)]), Some(60));
        assert_eq!(count(&[(0, 32)]), Some(60));
        assert_eq!(count(&[(0, 31)]), None);
        assert_eq!(count(&[]), Some(60), "archiving began on the child");
        let mut lost = inventory(&[(1, &[(0, 40)]), (2, &[(32, 60)])], &path);
        lost.branches.get_mut(&first(2)).unwrap().history = None;
        assert_eq!(lost.frontier(first(2)), None, "a child without its history file belongs nowhere");
    }

    #[test]
    fn an_ancestor_that_lost_its_history_has_it_from_a_descendant() {
        let path = history(&[10, 20]);
        let mut inventory = inventory(&[(1, &[(0, 10)]), (2, &[(0, 20)]), (3, &[(16, 30)])], &path);
        inventory.branches.get_mut(&first(2)).unwrap().history = None;
        assert_eq!(inventory.path_of(first(2)).unwrap().begins_at(), at(10));
        assert_eq!(inventory.frontier(first(3)), Some(at(30)));
    }

    #[test]
    fn p3_a_hole_is_named_with_its_branch_and_reason() {
        let path = history(&[40]);
        let mut inventory = inventory(&[(1, &[(0, 20), (24, 40)]), (2, &[(32, 60)])], &path);
        let hole = inventory.covers(&path, at(4), at(50)).unwrap_err();
        assert_eq!((hole.branch, hole.from, hole.to, hole.reason), (first(1), at(20), at(24), None));
        inventory.gaps.push(gap(first(1), 20, 24));
        let hole = inventory.covers(&path, at(4), at(50)).unwrap_err();
        assert!(hole.to_string().contains("slot was lost"), "{hole}");
        let hole = inventory.covers(&path, at(30), at(70)).unwrap_err();
        assert_eq!((hole.branch, hole.from, hole.to), (first(2), at(60), at(70)));
        let stretches = inventory.covers(&path, at(24), at(60)).unwrap();
        let want = [
            Stretch { branch: first(1), from: at(24), to: at(32) },
            Stretch { branch: first(2), from: at(32), to: at(60) },
        ];
        assert_eq!(stretches, want, "from the fork's segment on the child is read");
        assert_eq!(inventory.covers(&path, at(7), at(7)), Ok(Vec::new()));
    }

    proptest! {
        /// Against a model that asks for every unit on its own.
        #[test]
        fn coverage_is_that_of_every_byte(
            forks in (0u64..80, 0u64..80),
            ranges in vec((0usize..3, 0u64..96, 1u64..40), 0..12),
            from in 0u64..96, len in 0u64..96,
        ) {
            let path = history(&[forks.0.min(forks.1), forks.0.max(forks.1)]);
            let mut held: Vec<Vec<(u64, u64)>> = vec![Vec::new(); 3];
            for (timeline, begin, len) in ranges {
                held[timeline].push((begin, begin + len));
            }
            let inventory = inventory(&[(1, &held[0]), (2, &held[1]), (3, &held[2])], &path);
            let has = |branch: Branch, unit: u64| {
                held[branch.timeline.get() as usize - 1].iter().any(|(a, b)| (*a..*b).contains(&unit))
            };
            // A timeline may serve a unit from the first byte of the segment it begins in until it is left.
            let may = |branch: Branch, unit: u64| {
                let own = path.ancestor_history(branch.timeline).unwrap();
                let left = path.left_at(branch.timeline).is_none_or(|left| at(unit) < left);
                left && own.begins_at().segment_start(size()) <= at(unit)
            };
            let there = |unit: u64| [1, 2, 3].into_iter().any(|t| may(first(t), unit) && has(first(t), unit));
            let missing = (from..from + len).find(|unit| !there(*unit));
            match (inventory.covers(&path, at(from), at(from + len)), missing) {
                (Ok(stretches), None) => {
                    let mut next = at(from);
                    for stretch in stretches {
                        prop_assert_eq!(stretch.from, next);
                        prop_assert!(stretch.from < stretch.to);
                        for unit in stretch.from.get() / UNIT..stretch.to.get() / UNIT {
                            prop_assert!(may(stretch.branch, unit) && has(stretch.branch, unit));
                        }
                        next = stretch.to;
                    }
                    prop_assert_eq!(next, at(from + len));
                }
                (Err(hole), Some(unit)) => {
                    prop_assert_eq!(hole.from, at(unit));
                    prop_assert_eq!(hole.branch.timeline, path.timeline_at(at(unit)));
                    let next = (unit..from + len).find(|unit| there(*unit)).unwrap_or(from + len);
                    prop_assert_eq!(hole.to, at(next));
                }
                (found, missing) => prop_assert!(false, "{:?}, but first missing {:?}", found, missing),
            }
        }
    }
}
