//! From files with extents to ranges of packs: what is read with one request, and which files it goes to. Pure.
//!
//! A pack's plaintext is cut into groups of whole frames, so that no frame is fetched or opened twice while its
//! neighbours in the table are near each other in the pack. Only a few groups are held open.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::catalog::layout::PackName;
use crate::catalog::table::Extent;

/// Bytes of plaintext that are read at once: four frames. Memory that is touched for the first time is what a restore
/// mostly waits for, so there is little of it.
pub const GROUP_BYTES: u64 = 4 << 20;
/// Groups that wait for more of their bytes. A backup's own packs are in the table's order, so two would do.
const OPEN_GROUPS: usize = 16;
/// Slices in a group before it goes: bounds memory where extents are tiny.
const MAX_SLICES: usize = 4096;

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
    group: u64,
}

/// Collects extents in the table's order.
#[derive(Debug)]
pub struct Jobs<F> {
    open: VecDeque<Job<F>>,
}

impl<F> Default for Jobs<F> {
    fn default() -> Self {
        Jobs { open: VecDeque::new() }
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
            let index = match self.open.iter().position(|job| job.pack == extent.pack && job.group == group) {
                Some(index) => index,
                None => {
                    let (pack, from, to) = (extent.pack, at, at);
                    self.open.push_back(Job { pack, from, to, slices: Vec::new(), group });
                    self.open.len() - 1
                }
            };
            if let Some(job) = self.open.get_mut(index) {
                job.from = job.from.min(at);
                job.to = job.to.max(at + len);
                job.slices.push(Slice { file: file.clone(), offset, len, at });
                if job.to == (group + 1) * GROUP_BYTES || job.slices.len() >= MAX_SLICES {
                    ready.extend(self.open.remove(index));
                }
            }
            (offset, at, left) = (offset + len, at + len, left - len);
        }
        while self.open.len() > OPEN_GROUPS {
            ready.extend(self.open.pop_front());
        }
        ready
    }

    /// What is left.
    pub fn finish(self) -> impl Iterator<Item = Job<F>> {
        self.open.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::BackupLabel;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        /// Whatever the extents, each byte arrives exactly once, in bounded jobs that do not cross groups.
        #[test]
        fn every_byte_goes_where_its_extent_says(
            extents in vec((0u64..4, 0u64..40 << 20, 1u64..20 << 20), 0..60),
        ) {
            let label = BackupLabel::at(jiff::Timestamp::UNIX_EPOCH);
            let mut jobs = Jobs::default();
            let mut all = Vec::new();
            for (number, (pack, at, len)) in extents.iter().enumerate() {
                let pack = PackName { label, number: u32::try_from(*pack).unwrap() + 1 };
                let extent = Extent { offset: 7, len: *len, pack, at: *at };
                all.extend(jobs.push(&Arc::new(number), &extent));
                prop_assert!(jobs.open.len() <= OPEN_GROUPS);
            }
            all.extend(jobs.finish());
            let mut got = vec![0; extents.len()];
            for job in &all {
                prop_assert!(job.from < job.to && job.from / GROUP_BYTES == (job.to - 1) / GROUP_BYTES);
                for slice in &job.slices {
                    prop_assert!(job.from <= slice.at && slice.at + slice.len <= job.to);
                    let (pack, at, _) = extents[*slice.file];
                    prop_assert_eq!(slice.offset - 7, slice.at - at);
                    prop_assert_eq!(job.pack.number, u32::try_from(pack).unwrap() + 1);
                    got[*slice.file] += slice.len;
                }
            }
            prop_assert_eq!(got, extents.iter().map(|(_, _, len)| *len).collect::<Vec<_>>());
        }
    }
}
