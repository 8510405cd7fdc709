//! What is to be copied, and in which order. Pure: two pictures in, a list of steps out.
//!
//! What always holds: a branch's history file comes before its WAL; a base backup comes after all WAL that makes it
//! consistent, and is left out, with the reason, where that WAL is neither in the source nor in the target (P2); what the
//! target has is compared, not copied; no segment comes twice; an index comes after the WAL that it tells of, all of it.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::Serialize;

use crate::catalog::index::IndexRange;
use crate::catalog::inventory::{ClusterInventory, Place};
use crate::catalog::layout::KeptFile;
use crate::catalog::records::BackupInfo;
use crate::types::{BackupLabel, Branch, Lsn, SegmentNumber, SegmentSize};

/// What a person wants to have copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// Everything that can be restored from.
    All,
    /// One base backup, and the WAL that makes it consistent.
    Backup(BackupLabel),
    /// What reaches every instant of a window.
    Window {
        /// The first instant: the newest base backup that was complete before it is where the copy begins.
        since: Timestamp,
        /// The last one.
        until: Timestamp,
        /// Per branch, a position behind everything that was committed until then. Absent: not known, so all is copied.
        ends: BTreeMap<Branch, Lsn>,
    },
}

/// What one repository holds.
#[derive(Debug, Clone)]
pub struct Holding {
    /// WAL, histories, backups.
    pub inventory: ClusterInventory,
    /// Kept files, with the lengths of their objects.
    pub kept: BTreeMap<(Branch, KeptFile), u64>,
    /// Indexes of its WAL.
    pub indexes: BTreeMap<(Branch, Lsn, Lsn), IndexRange>,
    /// When names of relations were noted.
    pub names: BTreeSet<BackupLabel>,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "copy")]
pub enum Step {
    /// A history file.
    History {
        /// Whose.
        branch: Branch,
    },
    /// The record of a gap.
    Gap {
        /// Where.
        branch: Branch,
        /// First missing byte.
        from: Lsn,
        /// First byte behind it.
        to: Lsn,
    },
    /// A complete segment.
    Segment {
        /// Of which branch.
        branch: Branch,
        /// Which.
        segment: u64,
        /// Length of its objects.
        bytes: u64,
    },
    /// What there is of a segment that is not complete.
    Open {
        /// Of which branch.
        branch: Branch,
        /// Which.
        segment: u64,
        /// Length of its objects.
        bytes: u64,
    },
    /// A `.partial` or `.backup` file.
    File {
        /// Of which branch.
        branch: Branch,
        /// Its name.
        file: String,
        /// Length of its object.
        bytes: u64,
    },
    /// The index of WAL that the target has by then.
    Index {
        /// Of which branch.
        branch: Branch,
        /// First byte of that WAL.
        from: Lsn,
        /// First byte after it.
        to: Lsn,
        /// Length of its object.
        bytes: u64,
    },
    /// Names of relations.
    Names {
        /// When.
        noted: BackupLabel,
    },
    /// A base backup.
    Backup {
        /// Which.
        label: BackupLabel,
        /// The history its WAL belongs to.
        branch: Branch,
        /// What it stored when it was taken; what it shares with others comes on top.
        bytes: u64,
    },
}

impl Step {
    /// Bytes of the source's objects, as far as known beforehand.
    pub fn bytes(&self) -> u64 {
        match self {
            Step::History { .. } | Step::Gap { .. } | Step::Names { .. } => 0,
            Step::Segment { bytes, .. }
            | Step::Open { bytes, .. }
            | Step::File { bytes, .. }
            | Step::Index { bytes, .. }
            | Step::Backup { bytes, .. } => *bytes,
        }
    }
}

/// What has to be done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CopyPlan {
    /// Complete segments that the target has, too: compared before anything is copied, so that histories are not mixed.
    pub compare: Vec<(Branch, u64)>,
    /// In order.
    pub steps: Vec<Step>,
    /// Bytes of the objects to be copied, as far as known beforehand.
    pub bytes: u64,
    /// Base backups that the target has, too.
    pub backups_there: Vec<BackupLabel>,
    /// What was asked for and cannot be copied, and why.
    pub missing: Vec<String>,
}

/// What a repository holds of one segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    /// The end of what is there from the first byte on, without a hole.
    end: u32,
    /// The same, of complete segments' objects alone.
    whole: u32,
    bytes: u64,
}

type Segments = BTreeMap<(Branch, SegmentNumber), Held>;

fn segments(inventory: &ClusterInventory) -> Segments {
    let mut held: Segments = BTreeMap::new();
    for (branch, wal) in &inventory.branches {
        // Sorted by position, so that each piece is joined to those before it.
        for piece in &wal.pieces {
            let held = held.entry((*branch, piece.segment)).or_default();
            if piece.from <= held.end {
                held.end = held.end.max(piece.to);
            }
            if piece.place == Place::Wal && piece.from <= held.whole {
                held.whole = held.whole.max(piece.to);
            }
            if piece.token.is_none() && piece.place != Place::Tail {
                held.bytes += piece.object_len;
            } else if piece.place == Place::Tail {
                held.bytes += u64::from(piece.to.saturating_sub(piece.from));
            }
        }
    }
    held
}

/// A plan in the making.
struct Planner<'a> {
    source: &'a Holding,
    target: &'a Holding,
    size: Option<SegmentSize>,
    theirs: Segments,
    ours: Segments,
    done: BTreeSet<(Branch, SegmentNumber)>,
    plan: CopyPlan,
}

/// Decides what is copied from `source` to `target`.
pub fn plan(source: &Holding, target: &Holding, selection: &Selection) -> CopyPlan {
    let mut planner = Planner {
        source,
        target,
        size: source.inventory.segment_size,
        theirs: segments(&source.inventory),
        ours: segments(&target.inventory),
        done: BTreeSet::new(),
        plan: CopyPlan::default(),
    };
    match selection {
        Selection::All => planner.all(),
        Selection::Backup(label) => planner.one(*label),
        Selection::Window { since, until, ends } => planner.window(*since, *until, ends),
    }
    planner.indexes();
    planner.names(selection);
    let mut plan = planner.plan;
    plan.bytes = plan.steps.iter().map(Step::bytes).sum();
    plan
}

impl Planner<'_> {
    fn all(&mut self) {
        let source = self.source;
        self.histories(|_| true);
        let gaps = source.inventory.gaps.iter().filter(|gap| !self.target.inventory.gaps.contains(gap));
        let gaps = gaps.map(|gap| Step::Gap { branch: gap.branch, from: gap.from, to: gap.to });
        self.plan.steps.extend(gaps);
        for backup in &source.inventory.backups {
            // Everything up to it first: the WAL in the target then goes on without a hole.
            self.wal_of(backup.branch, |begins| begins < backup.stop);
            self.backup(backup);
        }
        for branch in source.inventory.branches.keys() {
            self.wal_of(*branch, |_| true);
        }
        let kept = source.kept.iter().filter(|(file, _)| !self.target.kept.contains_key(*file));
        let kept = kept.map(|((branch, file), bytes)| Step::File {
            branch: *branch,
            file: file.as_str().to_owned(),
            bytes: *bytes,
        });
        self.plan.steps.extend(kept);
    }

    fn one(&mut self, label: BackupLabel) {
        let Some(backup) = self.source.inventory.backups.iter().find(|backup| backup.label == label) else {
            self.plan.missing.push(format!("there is no complete base backup {label}"));
            return;
        };
        let path = self.source.inventory.path_of(backup.branch);
        let passes = |branch: Branch| {
            let on_path = path.as_ref().is_some_and(|path| path.contains(branch.timeline) && branch.ordinal == 0);
            branch == backup.branch || on_path
        };
        self.histories(passes);
        self.backup(backup);
    }

    fn window(&mut self, since: Timestamp, until: Timestamp, ends: &BTreeMap<Branch, Lsn>) {
        let source = self.source;
        let usable = |backup: &&BackupInfo| backup.flagged.is_none() && self.wal_there(backup).is_ok();
        let backups: Vec<&BackupInfo> = source.inventory.backups.iter().filter(usable).collect();
        let before = backups.iter().rev().find(|backup| backup.stopped_at <= since);
        let Some(first) = before.or(backups.first()).filter(|first| first.started_at <= until) else {
            self.plan.missing.push(format!("no usable base backup was taken before {until}"));
            return;
        };
        if before.is_none() {
            let (label, stopped) = (first.label, first.stopped_at);
            self.plan.missing.push(format!(
                "no usable base backup was complete at {since}: what is copied reaches back to {stopped} ({label})"
            ));
        }
        let first_label = first.label;
        let wanted: Vec<&BackupInfo> =
            backups.into_iter().filter(|backup| backup.label >= first_label && backup.started_at <= until).collect();
        self.histories(|_| true); // a server chooses its next timeline by them
        // A branch is followed from the oldest of these backups that leads to it.
        let from = |branch: Branch| {
            let (path, lineage) = (source.inventory.path_of(branch)?, source.inventory.lineage_of(branch));
            let leads = |backup: &&&BackupInfo| {
                backup.branch == branch
                    || path
                        .left_at(backup.timeline)
                        .is_some_and(|left| backup.branch == lineage.branch(backup.timeline) && backup.stop <= left)
            };
            wanted.iter().find(leads).map(|backup| backup.start)
        };
        let branches: BTreeSet<Branch> = source.inventory.branches.keys().copied().collect();
        let ranges: Vec<(Branch, Lsn, Lsn)> = branches
            .iter()
            .filter_map(|branch| {
                let size = self.size?;
                // An ancestor's WAL is needed from the backup on; positions do not go back from parent to child.
                let leads_to = branches.iter().filter(|other| {
                    let path = source.inventory.path_of(**other);
                    let is_meant = source.inventory.lineage_of(**other).branch(branch.timeline) == *branch;
                    *other == branch || (is_meant && path.is_some_and(|path| path.contains(branch.timeline)))
                });
                let begin = leads_to.filter_map(|other| from(*other)).min()?.segment_start(size);
                Some((*branch, begin, ends.get(branch).copied().unwrap_or(Lsn::new(u64::MAX))))
            })
            .collect();
        for gap in &source.inventory.gaps {
            let wanted = ranges.iter().any(|(branch, begin, _)| *branch == gap.branch && gap.to > *begin);
            if wanted && !self.target.inventory.gaps.contains(gap) {
                self.plan.steps.push(Step::Gap { branch: gap.branch, from: gap.from, to: gap.to });
            }
        }
        for backup in wanted {
            if let Some((branch, begin, end)) = ranges.iter().find(|(branch, ..)| *branch == backup.branch).copied() {
                let stop = backup.stop;
                self.wal_of(branch, |begins| begins >= begin && begins < stop && begins < end.max(stop));
            }
            self.backup(backup);
        }
        for (branch, begin, end) in ranges {
            self.wal_of(branch, |begins| begins >= begin && begins < end);
        }
    }

    fn histories(&mut self, wanted: impl Fn(Branch) -> bool) {
        for (branch, theirs) in &self.source.inventory.branches {
            if theirs.history.is_some() && wanted(*branch) {
                // Also where the target has one: it is compared, before any WAL of the branch.
                self.plan.steps.push(Step::History { branch: *branch });
            }
        }
    }

    /// The segments of a branch of which `wanted` is true of the first byte's position, in order.
    fn wal_of(&mut self, branch: Branch, wanted: impl Fn(Lsn) -> bool) {
        let Some(size) = self.size else { return };
        let first = (branch, SegmentNumber::new(0));
        let of_branch = self.theirs.range(first..).take_while(|((other, _), _)| *other == branch);
        let segments: Vec<SegmentNumber> =
            of_branch.map(|((_, segment), _)| *segment).filter(|segment| wanted(segment.start(size))).collect();
        for segment in segments {
            self.segment(branch, segment, size);
        }
    }

    fn segment(&mut self, branch: Branch, segment: SegmentNumber, size: SegmentSize) {
        let Some(theirs) = self.theirs.get(&(branch, segment)).copied() else { return };
        if !self.done.insert((branch, segment)) {
            return;
        }
        let ours = self.ours.get(&(branch, segment)).copied().unwrap_or_default();
        let is_whole = |held: Held| u64::from(held.whole) == size.bytes();
        match (is_whole(theirs), is_whole(ours)) {
            (true, true) => self.plan.compare.push((branch, segment.get())),
            (true, false) => {
                self.plan.steps.push(Step::Segment { branch, segment: segment.get(), bytes: theirs.bytes });
            }
            (false, true) => {}
            // What the target has of it is compared there.
            (false, false) if theirs.end > ours.end => {
                self.plan.steps.push(Step::Open { branch, segment: segment.get(), bytes: theirs.bytes });
            }
            (false, false) => {}
        }
    }

    /// Indexes of complete segments that are in the target then.
    fn indexes(&mut self) {
        let Some(size) = self.size else { return };
        let is_whole = |held: Option<&Held>| held.is_some_and(|held| u64::from(held.whole) == size.bytes());
        let missing = self.source.indexes.iter().filter(|(range, _)| !self.target.indexes.contains_key(*range));
        for ((branch, from, to), range) in missing {
            let (first, last) = (from.segment(size).get(), to.segment_before(size).get());
            let is_there = |number: u64| {
                let key = (*branch, SegmentNumber::new(number));
                is_whole(self.ours.get(&key)) || (self.done.contains(&key) && is_whole(self.theirs.get(&key)))
            };
            if from < to && (first..=last).all(is_there) {
                let (branch, from, to, bytes) = (*branch, *from, *to, range.object_len);
                self.plan.steps.push(Step::Index { branch, from, to, bytes });
            }
        }
    }

    /// What relations were called: small, and nobody knows of which WAL somebody asks later. With one base backup its own.
    fn names(&mut self, selection: &Selection) {
        let is_wanted = |label: &BackupLabel| match selection {
            Selection::Backup(only) => only == label,
            Selection::All | Selection::Window { .. } => true,
        };
        let missing = self.source.names.difference(&self.target.names).filter(|label| is_wanted(label));
        self.plan.steps.extend(missing.map(|label| Step::Names { noted: *label }));
    }

    /// Where the WAL lies that makes a base backup consistent; or why it is not there.
    fn wal_there(&self, backup: &BackupInfo) -> Result<Vec<(Branch, SegmentNumber)>, String> {
        let (source, target) = (&self.source.inventory, &self.target.inventory);
        let size = backup.segment_size;
        let from = backup.start.segment_start(size);
        let no_history = || format!("the history file of branch {} is missing", backup.branch);
        let path = source.path_of(backup.branch).ok_or_else(no_history)?;
        match source.covers_on(backup.branch, &path, from, backup.stop) {
            Ok(stretches) => Ok(stretches
                .iter()
                .filter(|stretch| stretch.from < stretch.to)
                .flat_map(|stretch| {
                    let (first, last) = (stretch.from.segment(size).get(), stretch.to.segment_before(size).get());
                    (first..=last).map(|number| (stretch.branch, SegmentNumber::new(number)))
                })
                .collect()),
            Err(hole) => match target.covers_on(backup.branch, &path, from, backup.stop) {
                Ok(_) => Ok(Vec::new()),
                Err(_) => Err(hole.to_string()),
            },
        }
    }

    /// A base backup, after its WAL.
    fn backup(&mut self, backup: &BackupInfo) {
        let size = backup.segment_size;
        match self.wal_there(backup) {
            Ok(segments) => segments.into_iter().for_each(|(branch, segment)| self.segment(branch, segment, size)),
            Err(why) => {
                self.plan.missing.push(format!("base backup {} is left out: {why}", backup.label));
                return;
            }
        }
        if self.target.inventory.backups.iter().any(|there| there.label == backup.label) {
            self.plan.backups_there.push(backup.label);
        }
        let there = self.plan.backups_there.contains(&backup.label);
        let bytes = if there { 0 } else { backup.stored_bytes };
        self.plan.steps.push(Step::Backup { label: backup.label, branch: backup.branch, bytes });
    }
}

#[cfg(test)]
mod tests;
