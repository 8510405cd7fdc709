//! From files with extents to ranges of packs: what is read with one request, and which files it goes to. Pure.
//!
//! A pack's plaintext is cut into groups of whole frames, so that no frame is fetched or opened twice while its
//! neighbours in the table are near each other in the pack. What lies in a group and is wanted goes with one request;
//! frames between that nobody wants are left out.
//!
//! What always holds: every byte of every extent is in exactly one slice of one job. The packs of one backup are in the
//! order of its own table, so a table that refers to many backups goes through each of their packs from begin to end,
//! by turns: of each backup a few groups are held open, and of all together a bounded number with a bounded number of
//! slices. A table in another order costs frames that are read twice, never more memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::catalog::layout::PackName;
use crate::catalog::table::Extent;
use crate::types::BackupLabel;

/// Bytes of plaintext that are read at once: four frames. Memory that is touched for the first time is what a restore
/// mostly waits for, so there is little of it.
pub const GROUP_BYTES: u64 = 4 << 20;
/// What is opened as one: all frames of a pack but its last have so many bytes.
pub const FRAME_BYTES: u64 = 1 << 20;
/// Groups of one backup's packs that wait for more of their bytes. Two would do where its files come in its own order.
const OPEN_OF_BACKUP: usize = 8;
/// Groups that wait, of all backups.
const OPEN_GROUPS: usize = 256;
/// Slices in a group before it goes: bounds memory where extents are tiny.
const MAX_SLICES: usize = 4096;
/// Slices that wait, in all groups.
const WAITING_SLICES: usize = 64 << 10;

/// Some bytes of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice<F> {
    /// Which file.
    pub file: Arc<F>,
    /// Offset in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Offset in the pack's plaintext.
    pub at: u64,
}

impl<F> Slice<F> {
    fn end(&self) -> u64 {
        self.at + self.len
    }
}

/// What one request gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job<F> {
    /// The pack.
    pub pack: PackName,
    /// First byte of its plaintext.
    pub from: u64,
    /// First byte after it.
    pub to: u64,
    /// Where the bytes go.
    pub slices: Vec<Slice<F>>,
}

/// A pack, and which of its groups.
type Group = (PackName, u64);

#[derive(Debug)]
struct Waiting<F> {
    slices: Vec<Slice<F>>,
    /// First byte after the last that is wanted so far.
    to: u64,
    touched: u64,
}

/// Collects extents in the table's order.
#[derive(Debug)]
pub struct Jobs<F> {
    open: HashMap<Group, Waiting<F>>,
    /// The open groups, by when something came to them last.
    order: BTreeMap<u64, Group>,
    of_backup: HashMap<BackupLabel, usize>,
    touches: u64,
    slices: usize,
}

impl<F> Default for Jobs<F> {
    fn default() -> Self {
        let (open, order, of_backup) = (HashMap::new(), BTreeMap::new(), HashMap::new());
        Jobs { open, order, of_backup, touches: 0, slices: 0 }
    }
}

impl<F> Jobs<F> {
    /// Adds an extent of a file; hands out what is complete, or has waited long enough.
    pub fn push(&mut self, file: &Arc<F>, extent: &Extent) -> Vec<Job<F>> {
        let mut ready = Vec::new();
        let (mut offset, mut at, mut left) = (extent.offset, extent.at, extent.len);
        while left > 0 {
            let group = at / GROUP_BYTES;
            let len = left.min((group + 1) * GROUP_BYTES - at);
            let slice = Slice { file: file.clone(), offset, len, at };
            self.slice((extent.pack, group), slice, &mut ready);
            (offset, at, left) = (offset + len, at + len, left - len);
        }
        ready
    }

    fn slice(&mut self, group: Group, slice: Slice<F>, ready: &mut Vec<Job<F>>) {
        self.touches += 1;
        let end = (group.1 + 1) * GROUP_BYTES;
        let of_backup = self.of_backup.entry(group.0.label).or_default();
        let waiting = self.open.entry(group).or_insert_with(|| {
            *of_backup += 1;
            Waiting { slices: Vec::new(), to: 0, touched: 0 }
        });
        let too_many_of_backup = *of_backup > OPEN_OF_BACKUP;
        self.order.remove(&waiting.touched);
        self.order.insert(self.touches, group);
        waiting.touched = self.touches;
        waiting.to = waiting.to.max(slice.end());
        waiting.slices.push(slice);
        self.slices += 1;
        if waiting.to == end || waiting.slices.len() >= MAX_SLICES {
            self.take(group, ready);
        } else if too_many_of_backup {
            let oldest = self.order.values().find(|(pack, _)| pack.label == group.0.label).copied();
            oldest.into_iter().for_each(|oldest| self.take(oldest, ready));
        }
        while self.open.len() > OPEN_GROUPS || self.slices > WAITING_SLICES {
            let Some(oldest) = self.order.values().next().copied() else { break };
            self.take(oldest, ready);
        }
    }

    /// Closes a group: a job for each run of frames in which something is wanted.
    fn take(&mut self, group: Group, ready: &mut Vec<Job<F>>) {
        let Some(Waiting { mut slices, touched, .. }) = self.open.remove(&group) else { return };
        self.order.remove(&touched);
        self.slices -= slices.len();
        if let Some(open) = self.of_backup.get_mut(&group.0.label) {
            *open -= 1;
        }
        slices.sort_by_key(|slice| slice.at);
        let mut job: Option<Job<F>> = None;
        for slice in slices {
            match &mut job {
                Some(job) if slice.at / FRAME_BYTES <= job.to.saturating_sub(1) / FRAME_BYTES + 1 => {
                    job.to = job.to.max(slice.end());
                    job.slices.push(slice);
                }
                _ => {
                    let (from, to) = (slice.at, slice.end());
                    ready.extend(job.replace(Job { pack: group.0, from, to, slices: vec![slice] }));
                }
            }
        }
        ready.extend(job);
    }

    /// What is left, in the order in which it was touched.
    pub fn finish(mut self) -> Vec<Job<F>> {
        let mut ready = Vec::new();
        while let Some(group) = self.order.values().next().copied() {
            self.take(group, &mut ready);
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn label(number: i64) -> BackupLabel {
        BackupLabel::at(jiff::Timestamp::from_second(number * 1000).unwrap())
    }

    proptest! {
        /// Whatever the extents, each byte arrives exactly once, in bounded jobs that do not cross groups.
        #[test]
        fn every_byte_goes_where_its_extent_says(
            extents in vec((0u64..4, 0u64..40 << 20, 1u64..20 << 20), 0..60),
        ) {
            let mut jobs = Jobs::default();
            let mut all = Vec::new();
            for (number, (pack, at, len)) in extents.iter().enumerate() {
                let pack = PackName { label: label(0), number: u32::try_from(*pack).unwrap() + 1 };
                let extent = Extent { offset: 7, len: *len, pack, at: *at };
                all.extend(jobs.push(&Arc::new(number), &extent));
                prop_assert!(jobs.open.len() <= OPEN_OF_BACKUP);
            }
            all.extend(jobs.finish());
            // Of each extent, the pieces of the pack that arrived: they join without a hole and without an overlap.
            let mut got: Vec<Vec<(u64, u64)>> = vec![Vec::new(); extents.len()];
            for job in &all {
                prop_assert!(job.from < job.to && job.from / GROUP_BYTES == (job.to - 1) / GROUP_BYTES);
                for slice in &job.slices {
                    prop_assert!(job.from <= slice.at && slice.end() <= job.to);
                    let (pack, at, _) = extents[*slice.file];
                    prop_assert_eq!(slice.offset - 7, slice.at - at);
                    prop_assert_eq!(job.pack.number, u32::try_from(pack).unwrap() + 1);
                    got[*slice.file].push((slice.at, slice.end()));
                }
            }
            for ((_, at, len), mut pieces) in extents.into_iter().zip(got) {
                pieces.sort_unstable();
                let end = pieces.into_iter().try_fold(at, |end, (from, to)| (end == from).then_some(to));
                prop_assert_eq!(end, Some(at + len));
            }
        }

        /// A table that takes turns among the packs of several backups, each in its order: every frame of which something
        /// is wanted is read once, and no other.
        #[test]
        fn wanted_frames_are_read_once_and_no_others(
            extents in vec((0usize..12, prop_oneof![4 => Just(0u64), 1 => 0u64..3 << 20], 1u64..2 << 20), 0..300),
        ) {
            const PACK: u64 = 32 << 20;
            let (mut jobs, mut all) = (Jobs::default(), Vec::new());
            let (mut ends, mut wanted) = ([0u64; 12], HashSet::new());
            for (backup, gap, len) in extents {
                // Places in a backup's packs only grow; no extent crosses a pack.
                let mut at = ends[backup] + gap;
                if at / PACK != (at + len - 1) / PACK {
                    at = (at / PACK + 1) * PACK;
                }
                ends[backup] = at + len;
                let pack = PackName { label: label(backup as i64), number: u32::try_from(at / PACK).unwrap() + 1 };
                let extent = Extent { offset: 0, len, pack, at: at % PACK };
                wanted.extend((extent.at / FRAME_BYTES..=(extent.at + len - 1) / FRAME_BYTES).map(|frame| (pack, frame)));
                all.extend(jobs.push(&Arc::new(()), &extent));
                prop_assert!(jobs.open.len() <= OPEN_GROUPS && jobs.slices <= WAITING_SLICES);
            }
            all.extend(jobs.finish());
            let mut read = HashSet::new();
            for job in &all {
                for frame in job.from / FRAME_BYTES..=(job.to - 1) / FRAME_BYTES {
                    prop_assert!(read.insert((job.pack, frame)), "frame {} of {} is read twice", frame, job.pack);
                }
            }
            prop_assert_eq!(read, wanted);
        }
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut jobs = Jobs::default();
        let mut slices = 0;
        for number in 0..2 * WAITING_SLICES as u64 {
            // A block here and a block there: no group is ever complete.
            let pack = PackName { label: label((number % 200) as i64), number: 1 };
            let extent = Extent { offset: 0, len: 8, pack, at: number / 200 * 16 };
            slices += jobs.push(&Arc::new(()), &extent).iter().map(|job| job.slices.len()).sum::<usize>();
            assert!(jobs.open.len() <= OPEN_GROUPS && jobs.slices <= WAITING_SLICES);
        }
        slices += jobs.finish().iter().map(|job| job.slices.len()).sum::<usize>();
        assert_eq!(slices, 2 * WAITING_SLICES);
    }
}
