//! An instant to drill, drawn by a seed. Pure.

use crate::catalog::inventory::ClusterInventory;
use crate::types::{Branch, Lsn};
use crate::verify::cost::reach;

/// Anything but the same number again (SplitMix64).
fn mixed(seed: u64) -> u64 {
    let mut mixed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// A position that can be reached, each byte of WAL alike; `None` where there is none.
pub fn pick(inventory: &ClusterInventory, seed: u64) -> Option<(Branch, Lsn)> {
    let reach = reach(inventory, &std::collections::BTreeSet::new());
    let mut runs = Vec::new();
    for (branch, of) in &reach {
        let mut at = Lsn::ZERO;
        for run in of {
            let from = run.from.max(at); // base backups lead to the same positions
            if from < run.to {
                runs.push((*branch, from, run.to.bytes_since(from).unwrap_or(0)));
                at = run.to;
            }
        }
    }
    let total: u64 = runs.iter().map(|(.., bytes)| bytes).sum();
    let mut at = mixed(seed).checked_rem(total)?;
    for (branch, from, bytes) in runs {
        if at < bytes {
            return Some((branch, from.advance(at)));
        }
        at -= bytes;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::inventory::{BranchInventory, Run};
    use crate::catalog::survey::condensed;
    use crate::types::{ClusterId, SystemId};
    use crate::verify::sample::{at, backup, size};

    #[test]
    fn every_seed_is_a_position_that_can_be_reached_and_the_same_one_again() {
        let size = size();
        let branch: Branch = "00000001".parse().unwrap();
        let mut inventory =
            ClusterInventory::new(ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) });
        inventory.segment_size = Some(size);
        assert_eq!(pick(&inventory, 1), None);
        let runs = [Run { from: at(1), to: at(5) }, Run { from: at(7), to: at(9) }];
        inventory
            .branches
            .insert(branch, BranchInventory { pieces: condensed(runs, size), ..BranchInventory::new(branch) });
        assert_eq!(pick(&inventory, 1), None, "there is no base backup");
        inventory.backups.push(backup(branch, at(1), at(2)));
        inventory.backups.push(backup(branch, at(3), at(4)));
        let mut met = [false; 9];
        for seed in 0..200 {
            let (on, lsn) = pick(&inventory, seed).unwrap();
            assert_eq!((on, Some((on, lsn))), (branch, pick(&inventory, seed)));
            assert!((at(2)..at(5)).contains(&lsn), "{lsn}");
            met[(lsn.get() >> 20) as usize] = true;
        }
        assert!(met[2] && met[3] && met[4]);
    }
}
