//! What is missing of what was promised: every instant from the oldest base backup on, on every history. Pure.

use crate::catalog::inventory::{ClusterInventory, Hole, after_gaps};
use crate::catalog::records::{BackupInfo, GapReason, GapRecord};
use crate::types::{Branch, Lsn};

use super::chain::{Chain, Limit, Path};

/// The holes in the WAL of every branch from the oldest base backup that leads there on, in order, with the recorded cause
/// where there is one. Where nothing was recorded and WAL is arriving, the piece in between may only be on its way.
pub fn holes(inventory: &ClusterInventory) -> Vec<Hole> {
    let mut holes: Vec<Hole> = Vec::new();
    for branch in inventory.branches.keys() {
        for hole in holes_on(inventory, *branch) {
            let is_known = |known: &Hole| (known.branch, known.from, known.to) == (hole.branch, hole.from, hole.to);
            if !holes.iter().any(is_known) {
                holes.push(hole);
            }
        }
    }
    holes.sort_by_key(|hole| (hole.branch, hole.from, hole.to));
    holes
}

fn holes_on(inventory: &ClusterInventory, branch: Branch) -> Vec<Hole> {
    let (Some(path), Some(size)) = (Path::of(inventory, branch), inventory.segment_size) else { return Vec::new() };
    let leads = |backup: &&BackupInfo| {
        path.contains(backup.branch) && path.history.left_at(backup.timeline).is_none_or(|left| backup.stop <= left)
    };
    let Some(first) = inventory.backups.iter().filter(leads).map(|backup| backup.start).min() else {
        return Vec::new();
    };
    let begin = first.segment_start(size);
    let runs = inventory.branches.get(&branch).map(|known| known.runs(size)).unwrap_or_default();
    let end = runs.last().map_or(begin, |run| run.to);
    let (mut holes, mut at) = (Vec::new(), begin);
    while at < end {
        let Err(hole) = inventory.covers_on(branch, &path.history, at, end) else { break };
        at = hole.to.max(hole.from.advance(1)); // grows, so this ends
        // What no policy asked for is not missing.
        if hole.reason != Some(GapReason::Expired) {
            holes.push(hole);
        }
    }
    // Recorded, and nothing has come behind it yet.
    let last = |to: Lsn, reason| Hole { branch, from: end, to, reason };
    let gap = inventory.gaps.iter().find(|gap| gap.branch == branch && gap.from <= end && end < gap.to);
    let gap = gap.filter(|gap| gap.reason != GapReason::Expired);
    holes.extend(gap.map(|gap| last(after_gaps(branch, end, &inventory.gaps), Some(gap.reason))));
    // Archived as it came, and worth nothing.
    let damaged = inventory.gaps.iter().filter(|gap| gap.reason == GapReason::Damaged);
    let damaged = damaged.filter(|gap| path.branch_at(gap.from) == gap.branch && gap.to > first);
    let hole = |gap: &GapRecord| Hole { branch: gap.branch, from: gap.from, to: gap.to, reason: Some(gap.reason) };
    holes.extend(damaged.map(hole));
    holes
}

/// Whether the history that is being written can be restored up to now, and if not, why a base backup is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Need {
    /// It can; or nothing was ever promised, because there is no base backup at all.
    Nothing,
    /// Too little is archived of it to say.
    NotYet,
    /// No base backup leads across this hole, of which the cause is known.
    Gap(Hole),
    /// There are base backups, and none of this history.
    Branch(Branch),
}

/// Of the history that is being written.
pub fn needs_backup(inventory: &ClusterInventory, branch: Branch) -> Need {
    let Some(path) = Path::of(inventory, branch).filter(|_| inventory.branches.contains_key(&branch)) else {
        return Need::NotYet;
    };
    if inventory.backups.is_empty() {
        return Need::Nothing;
    }
    // Also flagged ones: another one would be flagged, too.
    let good = || inventory.backups.iter();
    // A second history is not left to what it has in common with the first one.
    let own =
        |backup: &BackupInfo| if branch.ordinal > 0 { backup.branch == branch } else { path.contains(backup.branch) };
    if !good().any(own) {
        return Need::Branch(branch);
    }
    let chains: Vec<Chain> = good().filter_map(|backup| Chain::build(inventory, backup, &path).ok()).collect();
    let Some(best) = chains.iter().max_by_key(|chain| chain.held_to) else {
        // Whatever it is that they lack: none of them can be restored.
        let recorded = holes_on(inventory, branch).into_iter().find(|hole| hole.reason.is_some());
        return recorded.map_or(Need::Branch(branch), Need::Gap);
    };
    let on = best.path.branch_at(best.held_to);
    let recorded =
        inventory.gaps.iter().find(|gap| gap.branch == on && gap.from <= best.held_to && best.held_to < gap.to);
    // The note of damage comes before the bytes, which are on their way: what is taken now begins behind them.
    let coming = inventory.gaps.iter().filter(|gap| gap.reason == GapReason::Damaged && gap.from >= best.held_to);
    let coming = coming.filter(|gap| gap.to > best.base.start && best.path.branch_at(gap.from) == gap.branch);
    match (best.limit, recorded.or_else(|| coming.min_by_key(|gap| gap.from))) {
        (Limit::Hole(hole), _) if hole.reason.is_some() => Need::Gap(hole),
        (_, Some(gap)) => Need::Gap(Hole {
            branch: gap.branch,
            from: gap.from.max(best.held_to),
            to: gap.to,
            reason: Some(gap.reason),
        }),
        // A piece may be on its way; a hole that nobody recorded is for `check` to show.
        _ => Need::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::inventory::{BranchInventory, Place, WalPiece};
    use crate::plan::model::backup;
    use crate::types::{ClusterId, Id128, Lineage, SegmentNumber, SegmentSize, SystemId, TimelineHistory, TimelineId};

    const MIB: u64 = 1 << 20;

    fn at(segment: u64) -> Lsn {
        Lsn::new(segment * MIB)
    }

    fn branch(text: &str) -> Branch {
        text.parse().unwrap()
    }

    /// A cluster with whole segments.
    fn cluster(branches: &[(&str, &str, &[std::ops::Range<u64>])]) -> ClusterInventory {
        let id = ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) };
        let mut inventory = ClusterInventory::new(id);
        inventory.segment_size = SegmentSize::new(MIB);
        for (name, history, ranges) in branches {
            let on = branch(name);
            let piece = |segment| {
                let segment = SegmentNumber::new(segment);
                WalPiece { segment, from: 0, to: MIB as u32, place: Place::Wal, token: None, object_len: 0 }
            };
            let history = TimelineHistory::parse(on.timeline, history.as_bytes()).unwrap();
            let entry = BranchInventory {
                history: (on.timeline > TimelineId::FIRST).then_some(history),
                ancestors: Lineage::default(),
                pieces: ranges.iter().cloned().flatten().map(piece).collect(),
                ..BranchInventory::new(on)
            };
            inventory.branches.insert(on, entry);
        }
        inventory
    }

    fn gap(on: &str, from: u64, to: u64) -> GapRecord {
        let (noticed_at, writer) = (jiff::Timestamp::UNIX_EPOCH, Id128::new([0; 16]));
        GapRecord { branch: branch(on), from: at(from), to: at(to), reason: GapReason::SlotLost, noticed_at, writer }
    }

    fn backup_on(on: &str, start: u64, stop: u64) -> BackupInfo {
        let branch = branch(on);
        let size = SegmentSize::new(MIB).unwrap();
        let info = backup(branch, start, stop, (1, 2));
        BackupInfo {
            branch,
            timeline: branch.timeline,
            start: at(start).advance(40),
            stop: at(stop).advance(80),
            segment_size: size,
            ..info
        }
    }

    fn shown(inventory: &ClusterInventory) -> Vec<(String, u64, u64, bool)> {
        let hole =
            |hole: &Hole| (hole.branch.to_string(), hole.from.get() / MIB, hole.to.get() / MIB, hole.reason.is_some());
        holes(inventory).iter().map(hole).collect()
    }

    #[test]
    fn p3_every_hole_behind_the_oldest_base_backup_is_shown_with_its_cause() {
        let mut inventory = cluster(&[("00000001", "", &[0..3, 5..9, 11..12, 15..16])]);
        assert_eq!(shown(&inventory), [], "nothing is promised without a base backup");
        inventory.backups.push(backup_on("00000001", 5, 6));
        inventory.gaps.push(gap("00000001", 9, 11));
        inventory.gaps.push(gap("00000001", 16, 18));
        let one = || "00000001".to_owned();
        assert_eq!(shown(&inventory), [(one(), 9, 11, true), (one(), 12, 15, false), (one(), 16, 18, true)]);
        inventory.backups.insert(0, backup_on("00000001", 1, 2));
        assert_eq!(shown(&inventory)[0], (one(), 3, 5, false));
    }

    #[test]
    fn p3_a_gap_needs_a_base_backup_until_there_is_one_behind_it() {
        let one = branch("00000001");
        let mut inventory = cluster(&[("00000001", "", &[0..4, 6..9])]);
        inventory.gaps.push(gap("00000001", 4, 6));
        assert_eq!(needs_backup(&inventory, one), Need::Nothing, "nothing was promised");
        assert_eq!(needs_backup(&inventory, branch("00000002")), Need::NotYet);
        inventory.backups.push(backup_on("00000001", 1, 2));
        assert!(matches!(needs_backup(&inventory, one), Need::Gap(hole) if (hole.from, hole.to) == (at(4), at(6))));
        inventory.backups.push(backup_on("00000001", 6, 7));
        assert_eq!(needs_backup(&inventory, one), Need::Nothing);
        // The next gap; nothing has come behind it yet.
        inventory.gaps.push(gap("00000001", 9, 12));
        assert!(matches!(needs_backup(&inventory, one), Need::Gap(hole) if (hole.from, hole.to) == (at(9), at(12))));
        // What nobody recorded may be on its way.
        let mut arriving = cluster(&[("00000001", "", &[0..4, 5..6])]);
        arriving.backups.push(backup_on("00000001", 1, 2));
        assert_eq!(needs_backup(&arriving, one), Need::Nothing);
    }

    fn damage(on: &str, from: Lsn, to: Lsn) -> GapRecord {
        GapRecord { from, to, reason: GapReason::Damaged, ..gap(on, 0, 0) }
    }

    /// Whether or not the damaged bytes have arrived behind their note, and wherever in a segment they lie.
    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "one range of segments is meant")]
    fn p3_damage_needs_a_base_backup_that_begins_behind_it() {
        let one = branch("00000001");
        for arrived in [6, 9] {
            let mut inventory = cluster(&[("00000001", "", &[0..arrived])]);
            inventory.backups.push(backup_on("00000001", 1, 2)); // begins 40 bytes behind the segment's start
            inventory.gaps.push(damage("00000001", at(1).advance(8), at(1).advance(40)));
            assert_eq!(needs_backup(&inventory, one), Need::Nothing, "recovery begins behind it");
            assert_eq!(shown(&inventory), []);
            let (from, to) = (at(7).advance(8), at(7).advance(24));
            inventory.gaps.push(damage("00000001", from, to));
            let need = needs_backup(&inventory, one);
            assert!(matches!(need, Need::Gap(hole) if (hole.from, hole.to) == (from, to)), "{arrived}: {need:?}");
            inventory.backups.push(backup_on("00000001", 7, 8));
            // That one's own WAL is not there yet, or it leads on.
            let need = needs_backup(&inventory, one);
            assert_eq!(need == Need::Nothing, arrived == 9, "{need:?}");
        }
        // Damage within what the base backup itself needs.
        let mut inventory = cluster(&[("00000001", "", &[0..9])]);
        inventory.backups.push(backup_on("00000001", 1, 2));
        inventory.gaps.push(damage("00000001", at(1).advance(32), at(1).advance(48)));
        assert!(matches!(needs_backup(&inventory, one), Need::Gap(_)));
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "one range of segments is meant")]
    fn p3_a_second_history_needs_a_base_backup_of_its_own() {
        let fork = format!("1\t{}\tx\n", at(4).advance(8));
        let mut inventory =
            cluster(&[("00000001", "", &[0..4]), ("00000002", &fork, &[4..7]), ("00000002.1", &fork, &[4..6])]);
        assert_eq!(needs_backup(&inventory, branch("00000002.1")), Need::Nothing, "nothing was promised");
        inventory.backups.push(backup_on("00000001", 1, 2));
        assert_eq!(needs_backup(&inventory, branch("00000002")), Need::Nothing, "the parent's base backup leads there");
        assert_eq!(needs_backup(&inventory, branch("00000002.1")), Need::Branch(branch("00000002.1")));
        inventory.backups.push(backup_on("00000002.1", 4, 5));
        assert_eq!(needs_backup(&inventory, branch("00000002.1")), Need::Nothing);
    }
}
