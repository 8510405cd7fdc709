//! Which WAL is needed, and which goes.

use std::collections::BTreeMap;

use super::{BEFORE_A_START, Facts, WalGoes};
use crate::catalog::inventory::{ClusterInventory, Run};
use crate::catalog::records::BackupInfo;
use crate::catalog::retention::WalRange;
use crate::catalog::survey::WalObject;
use crate::plan::Path;
use crate::types::{Branch, Lsn, SegmentNumber, SegmentSize};

const FAR: Lsn = Lsn::new(u64::MAX);

/// Positions of branches that are needed, as they are found.
#[derive(Debug, Default)]
pub(super) struct Needs(BTreeMap<Branch, Vec<Run>>);

impl Needs {
    fn add(&mut self, branch: Branch, from: Lsn, to: Lsn) {
        if from < to {
            self.0.entry(branch).or_default().push(Run { from, to });
        }
    }

    /// `[from, to)` of a way; a branch is needed to the end of the segment in which it is left, and from the beginning of the
    /// one in which it began: that segment is a file of either.
    pub fn way(&mut self, path: &Path, from: Lsn, to: Option<Lsn>, size: SegmentSize) {
        let (from, to) = (from.segment_start(size), to.unwrap_or(FAR));
        for (branch, begin, left) in path.branches() {
            let begin =
                if branch == path.tip && path.branches().len() == 1 { begin } else { begin.segment_start(size) };
            let end = left.map_or(FAR, |left| end_of_segment(left, size));
            self.add(branch, from.max(begin), to.min(end));
        }
    }

    pub fn range(&mut self, range: WalRange) {
        self.add(range.branch, range.from, range.to);
    }

    /// The WAL that makes a base backup consistent.
    pub fn backup(&mut self, inventory: &ClusterInventory, backup: &BackupInfo) {
        let size = backup.segment_size;
        match Path::of(inventory, backup.branch) {
            Some(path) => self.way(&path, backup.start, Some(backup.stop), size),
            None => self.add(backup.branch, backup.start.segment_start(size), backup.stop),
        }
        // Also of a branch that the way does not name: what was archived under the backup's own name.
        self.add(backup.branch, backup.start.segment_start(size), backup.stop);
    }

    /// In whole segments, sorted, joined.
    pub fn finish(self, size: Option<SegmentSize>) -> BTreeMap<Branch, Vec<Run>> {
        let Some(size) = size else { return self.0 };
        let mut all = self.0;
        for runs in all.values_mut() {
            for run in runs.iter_mut() {
                (run.from, run.to) = (run.from.segment_start(size), end_of_segment(run.to, size));
            }
            runs.sort_by_key(|run| (run.from, run.to));
            let mut joined: Vec<Run> = Vec::new();
            for run in runs.drain(..) {
                match joined.last_mut() {
                    Some(last) if run.from <= last.to => last.to = last.to.max(run.to),
                    _ => joined.push(run),
                }
            }
            *runs = joined;
        }
        all
    }
}

/// The end of the segment that holds the byte before `at`; a border stays.
fn end_of_segment(at: Lsn, size: SegmentSize) -> Lsn {
    match at.segment_offset(size) {
        0 => at,
        offset => at.advance(size.bytes() - offset),
    }
}

/// Whether a segment lies in one of these sorted runs.
pub(super) fn is_in(runs: &[Run], start: Lsn) -> bool {
    let behind = runs.partition_point(|run| run.from <= start);
    behind.checked_sub(1).and_then(|at| runs.get(at)).is_some_and(|run| start < run.to)
}

impl Facts<'_> {
    /// Segments that nobody needs and all of whose objects are older than the window.
    pub(super) fn wal_that_goes(&self, needed: &BTreeMap<Branch, Vec<Run>>) -> Vec<WalGoes> {
        let Some(size) = self.survey.inventory.segment_size.filter(|_| !self.keep_all_wal) else { return Vec::new() };
        let began = self.open.iter().map(|label| label.start());
        let young = began.filter_map(|start| start.checked_sub(BEFORE_A_START).ok()).chain([self.from]).min();
        let young = young.unwrap_or(self.from).as_second();
        let mut goes = Vec::new();
        for (branch, objects) in &self.survey.wal {
            let needed = needed.get(branch).map_or(&[][..], Vec::as_slice);
            goes.extend(of_branch(*branch, objects, size, |segment, of| {
                is_in(needed, segment.start(size)) || of.iter().any(|object| object.put_at >= young)
            }));
        }
        goes
    }
}

/// Segments in a row, as objects, of which `stays` is not true.
fn of_branch(
    branch: Branch,
    objects: &[WalObject],
    size: SegmentSize,
    stays: impl Fn(SegmentNumber, &[WalObject]) -> bool,
) -> Vec<WalGoes> {
    let mut goes: Vec<WalGoes> = Vec::new();
    let mut in_a_row = false;
    for of in objects.chunk_by(|a, b| a.segment == b.segment) {
        let Some(segment) = of.first().map(|object| object.segment) else { continue };
        if stays(segment, of) {
            in_a_row = false;
            continue;
        }
        let (from, to) = (segment.start(size), segment.end(size));
        let (count, bytes) = (of.len() as u64, of.iter().map(|object| object.len).sum::<u64>());
        match goes.last_mut().filter(|_| in_a_row) {
            Some(last) => {
                last.range.to = to;
                (last.objects, last.bytes) = (last.objects + count, last.bytes + bytes);
            }
            None => goes.push(WalGoes { range: WalRange { branch, from, to }, objects: count, bytes }),
        }
        in_a_row = true;
    }
    goes
}
