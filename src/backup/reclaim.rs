//! Which packs are worth storing again, so that space comes back without a repacking job. Pure.
//!
//! A pack takes its whole space for as long as any kept backup uses one byte of it. So of packs less than half of which
//! the parent uses, the blocks that are left are stored again as they stream by; once the backups before are gone,
//! nothing names such a pack any more. Emptiest first: they give most space for a byte; whole packs only, because a
//! pack of which a few blocks stay frees nothing. A backup stores at most a tenth of the parent's bytes again, and 64 MiB.

use std::collections::BTreeSet;

use crate::catalog::layout::PackName;
use crate::catalog::records::PackRef;

/// What is stored again at most: this, and a share of the parent's bytes.
const AT_LEAST: u64 = 64 << 20;
/// One part in so many.
const SHARE: u64 = 10;

/// Those of the parent's packs whose blocks are not referenced but stored again. `bytes`: the size of the parent's files.
pub fn stored_again(packs: &[PackRef], bytes: u64) -> BTreeSet<PackName> {
    chosen(packs, AT_LEAST.saturating_add(bytes / SHARE))
}

fn chosen(packs: &[PackRef], mut budget: u64) -> BTreeSet<PackName> {
    let mut few: Vec<&PackRef> = packs.iter().filter(|pack| pack.live < pack.plaintext_len.div_ceil(2)).collect();
    // In thousandths: near enough to order them, and by name where they are alike, so that the order is one.
    let alive = |pack: &PackRef| u128::from(pack.live) * 1000 / u128::from(pack.plaintext_len.max(1));
    few.sort_by_key(|pack| (alive(pack), pack.pack));
    let mut again = BTreeSet::new();
    for pack in few {
        if let Some(left) = budget.checked_sub(pack.live) {
            budget = left;
            again.insert(pack.pack);
        }
    }
    again
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};

    use super::*;
    use crate::types::BackupLabel;
    use bytes::Bytes;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn pack(backup: i64, number: u32, plaintext_len: u64, live: u64) -> PackRef {
        let label = BackupLabel::at(jiff::Timestamp::from_second(backup * 3600).unwrap());
        PackRef { pack: PackName { label, number }, len: plaintext_len, header: Bytes::new(), plaintext_len, live }
    }

    proptest! {
        #[test]
        fn only_packs_that_are_half_empty_within_the_budget(
            sizes in vec((1u64..100, 0u64..100), 0..40),
            budget in 0u64..500,
        ) {
            let packs = sizes.iter().enumerate();
            let packs: Vec<PackRef> =
                packs.map(|(at, (len, live))| pack(0, at as u32 + 1, *len, *live.min(len))).collect();
            let again = chosen(&packs, budget);
            let (taken, left): (Vec<&PackRef>, Vec<_>) = packs.iter().partition(|pack| again.contains(&pack.pack));
            prop_assert!(taken.iter().all(|pack| 2 * pack.live < pack.plaintext_len));
            let used: u64 = taken.iter().map(|pack| pack.live).sum();
            prop_assert!(used <= budget);
            // Nothing that fits is left.
            let fits = |pack: &&PackRef| 2 * pack.live < pack.plaintext_len && used + pack.live <= budget;
            prop_assert!(!left.into_iter().any(|pack| fits(&pack)));
        }
    }

    /// A pack here: the backup that wrote it, and its number.
    type Pack = (usize, u32);

    /// A cluster of blocks, of which each backup finds a share changed at random.
    struct Simulation {
        random: u64,
        /// Of each block: version, pack and place in it.
        blocks: Vec<(u32, Pack, u32)>,
        /// Blocks in each pack.
        packs: BTreeMap<Pack, u64>,
        /// Of each kept backup: the version of each block, and the packs.
        backups: VecDeque<(Vec<u32>, BTreeSet<Pack>)>,
        taken: usize,
    }

    /// Blocks of a pack here; the real ones have 4096, and a cluster has more of them.
    const PACK: u32 = 32;
    const BLOCKS: usize = 4 << 10;

    impl Simulation {
        fn new() -> Simulation {
            let (blocks, packs, backups) = (vec![(0, (0, 0), 0); BLOCKS], BTreeMap::new(), VecDeque::new());
            Simulation { random: 0x9E37_79B9_7F4A_7C15, blocks, packs, backups, taken: 0 }
        }

        fn next(&mut self) -> u64 {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            self.random
        }

        fn live(&self) -> BTreeMap<Pack, u64> {
            let mut live = BTreeMap::new();
            self.blocks.iter().for_each(|(_, pack, _)| *live.entry(*pack).or_default() += 1);
            live
        }

        /// The next backup; how many blocks were stored again.
        fn backup(&mut self, changed: usize, keep: usize) -> usize {
            let mut fresh = vec![self.taken == 0; BLOCKS];
            let mut again = BTreeSet::new();
            if self.taken > 0 {
                let live = self.live();
                let of = |(name, live): (&Pack, &u64)| pack(name.0 as i64, name.1, self.packs[name], *live);
                let refs: Vec<PackRef> = live.iter().map(of).collect();
                // The same share as in earnest, without the floor, which would be more than all of this cluster.
                let chosen = chosen(&refs, BLOCKS as u64 / SHARE);
                again.extend(live.keys().zip(&refs).filter(|(_, r)| chosen.contains(&r.pack)).map(|(name, _)| *name));
                for _ in 0..changed {
                    let at = self.next() as usize % BLOCKS;
                    fresh[at] = true;
                }
            }
            let (mut number, mut at, mut stored_again) = (1, 0, 0);
            for (block, fresh) in self.blocks.iter_mut().zip(fresh) {
                if !fresh && !again.contains(&block.1) {
                    continue;
                }
                stored_again += usize::from(!fresh);
                if at == PACK {
                    (number, at) = (number + 1, 0);
                }
                *block = (block.0 + u32::from(fresh), (self.taken, number), at);
                at += 1;
                *self.packs.entry(block.1).or_default() += 1;
            }
            self.taken += 1;
            let versions = self.blocks.iter().map(|block| block.0).collect();
            self.backups.push_back((versions, self.live().into_keys().collect()));
            while self.backups.len() > keep {
                self.backups.pop_front();
            }
            stored_again
        }

        /// Blocks in the packs that kept backups name; and different blocks that they need.
        fn stored_and_needed(&self) -> (u64, u64) {
            let packs: BTreeSet<&Pack> = self.backups.iter().flat_map(|(_, packs)| packs).collect();
            let differ =
                |(before, after): (&Vec<u32>, &Vec<u32>)| before.iter().zip(after).filter(|(a, b)| a != b).count();
            let versions = self.backups.iter().map(|(versions, _)| versions);
            let changes: usize = versions.clone().zip(versions.skip(1)).map(differ).sum();
            (packs.into_iter().map(|pack| self.packs[pack]).sum(), (BLOCKS + changes) as u64)
        }

        /// Runs of blocks that follow each other in the cluster and in a pack, of the newest backup.
        fn extents(&self) -> usize {
            let follows = |two: &[(u32, Pack, u32)]| two[0].1 == two[1].1 && two[0].2 + 1 == two[1].2;
            1 + self.blocks.windows(2).filter(|two| !follows(two)).count()
        }
    }

    /// Sixty backups, and more where the first one's blocks run out later, with one and with ten blocks in a hundred changed
    /// in between: what the newest ones need is never stored 2.2 times.
    #[test]
    fn space_comes_back() {
        for (percent, keep, backups) in [(1, 7, 100), (10, 7, 60), (10, 1, 60), (1, 30, 100)] {
            let mut simulation = Simulation::new();
            let (mut worst, mut again, mut most_again) = ((0.0, 0), 0, 0);
            for number in 0..=backups {
                let stored_again = simulation.backup(BLOCKS * percent / 100, keep);
                (again, most_again) = (again + stored_again, most_again.max(stored_again));
                assert!(stored_again <= BLOCKS / SHARE as usize);
                let (stored, needed) = simulation.stored_and_needed();
                let ratio = stored as f64 / needed as f64;
                worst = if ratio > worst.0 { (ratio, number) } else { worst };
                if number == 60 || number == backups {
                    println!(
                        "{percent} % of the blocks change, {keep} backups kept: after {number} backups {ratio:.2} times \
                         what they need is stored; worst {:.2} after {}; stored again {:.1} % of the cluster per backup, \
                         {:.1} % at most; {:.2} extents per block",
                        worst.0,
                        worst.1,
                        100.0 * again as f64 / BLOCKS as f64 / f64::from(number),
                        100.0 * most_again as f64 / BLOCKS as f64,
                        simulation.extents() as f64 / BLOCKS as f64,
                    );
                }
                assert!(ratio < 2.2, "{percent} %, {keep} kept: {ratio:.2} after {number}");
            }
        }
    }
}
