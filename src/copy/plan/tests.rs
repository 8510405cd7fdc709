use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use super::*;
use crate::catalog::inventory::{BranchInventory, WalPiece};
use crate::catalog::records::{GapReason, GapRecord, ServerParameters};
use crate::types::{ClusterId, Id128, SystemId, TimelineHistory, TimelineId};

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

const LEN: u32 = 1 << 20;

fn branch(timeline: u32) -> Branch {
    Branch::first(TimelineId::new(timeline).unwrap())
}

fn at(segment: u64, offset: u64) -> Lsn {
    SegmentNumber::new(segment).start(size()).advance(offset)
}

fn second(number: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + number).unwrap()
}

fn empty() -> Holding {
    let id = ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) };
    let mut inventory = ClusterInventory::new(id);
    inventory.segment_size = Some(size());
    Holding { inventory, kept: BTreeMap::new(), indexes: BTreeMap::new(), names: BTreeSet::new() }
}

fn history(timeline: u32, fork: Lsn) -> TimelineHistory {
    TimelineHistory::parse(TimelineId::new(timeline).unwrap(), format!("1\t{fork}\tx\n").as_bytes()).unwrap()
}

/// Adds `[from, to)` of a segment.
fn add(holding: &mut Holding, on: Branch, segment: u64, (from, to): (u32, u32), place: Place) {
    let entry = holding.inventory.branches.entry(on).or_insert_with(|| BranchInventory::new(on));
    let segment = SegmentNumber::new(segment);
    let piece = WalPiece { segment, from, to, place, token: None, object_len: u64::from(to - from) / 2 };
    if !entry.pieces.contains(&piece) {
        entry.pieces.push(piece);
        entry.pieces.sort();
    }
}

fn backup(on: Branch, start: Lsn, stop: Lsn, seconds: i64) -> BackupInfo {
    BackupInfo {
        label: BackupLabel::at(second(seconds)),
        system: SystemId::new(7),
        branch: on,
        timeline: on.timeline,
        start,
        stop,
        started_at: second(seconds),
        stopped_at: second(seconds + 5),
        server_version: 150018,
        segment_size: size(),
        bytes: 1000,
        stored_bytes: 500,
        files: 10,
        tablespaces: Vec::new(),
        flagged: None,
        parameters: ServerParameters::default(),
    }
}

/// Two timelines, the second forked off in segment 5; any segments, backups anywhere, a gap.
fn a_source() -> impl Strategy<Value = Holding> {
    let wal = (btree_set(0u64..10, 0..10), btree_set(5u64..10, 0..5), any::<bool>());
    let backups = vec((1u32..3, 0u64..9, 0u64..3, any::<bool>()), 0..4);
    (wal, backups, 0u32..LEN, btree_set(0u64..10, 0..2)).prop_map(|((one, two, forked), backups, open, gaps)| {
        let mut source = empty();
        for segment in one {
            add(&mut source, branch(1), segment, (0, LEN), Place::Wal);
        }
        if forked {
            let own = source.inventory.branches.entry(branch(2)).or_insert_with(|| BranchInventory::new(branch(2)));
            own.history = Some(history(2, at(5, 1000)));
            for segment in two {
                add(&mut source, branch(2), segment, (0, LEN), Place::Wal);
            }
            if open > 0 {
                add(&mut source, branch(2), 10, (0, open), Place::Open);
            }
        } else if open > 0 {
            add(&mut source, branch(1), 10, (0, open), Place::Tail);
        }
        for (number, (timeline, segment, more, flagged)) in (0..).zip(backups) {
            let mut info = backup(branch(timeline), at(segment, 40), at(segment + more, 500), number * 100);
            info.flagged = flagged.then(|| "checksums".to_owned());
            source.inventory.backups.push(info);
        }
        for segment in gaps {
            let (noticed_at, writer) = (Timestamp::UNIX_EPOCH, Id128::new([0; 16]));
            let (from, to) = (at(segment, 0), at(segment + 1, 0));
            let gap = GapRecord { branch: branch(1), from, to, reason: GapReason::SlotLost, noticed_at, writer };
            source.inventory.gaps.push(gap);
        }
        for (on, from, to) in [(1, 0, 3), (1, 3, 4), (1, 4, 10), (2, 5, 8)] {
            let (from, to) = (at(from, 0), at(to, 0));
            source.indexes.insert((branch(on), from, to), IndexRange::listed(branch(on), from, to, 55));
        }
        source.names.extend([0, 100].map(|seconds| BackupLabel::at(second(seconds))));
        source.kept.insert((branch(1), "000000010000000000000003.partial".parse().unwrap()), 77);
        source
    })
}

/// A part of it, as an earlier copy or a slow archiver has left it.
fn a_part_of(source: &Holding, keep: &[bool]) -> Holding {
    let mut keep = keep.iter().copied().cycle();
    let mut next = || keep.next().unwrap_or(false);
    let mut part = empty();
    for (branch, wal) in &source.inventory.branches {
        for piece in &wal.pieces {
            if !next() {
                continue;
            }
            let number = piece.segment.get();
            match next() {
                true => add(&mut part, *branch, number, (piece.from, piece.to), piece.place),
                false => add(&mut part, *branch, number, (0, piece.to.div_ceil(2)), Place::Open),
            }
        }
        if let (Some(kept), true) = (part.inventory.branches.get_mut(branch), next()) {
            kept.history.clone_from(&wal.history);
        }
    }
    part
}

/// What the target holds when the plan was carried out.
fn carried_out(plan: &CopyPlan, source: &Holding, target: &Holding) -> Holding {
    let mut after = target.clone();
    for step in &plan.steps {
        match step {
            Step::History { branch } => {
                let new = || BranchInventory::new(*branch);
                let entry = after.inventory.branches.entry(*branch).or_insert_with(new);
                entry.history.clone_from(&source.inventory.branches[branch].history);
            }
            Step::Gap { branch, from, to } => {
                let is = |gap: &&GapRecord| (gap.branch, gap.from, gap.to) == (*branch, *from, *to);
                after.inventory.gaps.extend(source.inventory.gaps.iter().find(is).cloned());
            }
            Step::Segment { branch, segment, .. } => add(&mut after, *branch, *segment, (0, LEN), Place::Wal),
            Step::Open { branch, segment, .. } => {
                let held = segments(&source.inventory)[&(*branch, SegmentNumber::new(*segment))];
                add(&mut after, *branch, *segment, (0, held.end), Place::Open);
            }
            Step::File { branch, file, bytes } => {
                after.kept.insert((*branch, file.parse().unwrap()), *bytes);
            }
            Step::Index { branch, from, to, .. } => {
                let key = (*branch, *from, *to);
                after.indexes.insert(key, source.indexes[&key].clone());
            }
            Step::Names { noted } => {
                after.names.insert(*noted);
            }
            Step::Backup { label, .. } => {
                if after.inventory.backups.iter().all(|there| there.label != *label) {
                    let info = source.inventory.backups.iter().find(|backup| backup.label == *label);
                    after.inventory.backups.extend(info.cloned());
                }
            }
        }
    }
    after.inventory.backups.sort_by_key(|backup| backup.label);
    after
}

/// As `list` judges it.
fn is_consistent(holding: &Holding, backup: &BackupInfo) -> bool {
    let Some(path) = holding.inventory.path_of(backup.branch) else { return false };
    let from = backup.start.segment_start(size());
    holding.inventory.covers_on(backup.branch, &path, from, backup.stop).is_ok()
}

fn a_selection() -> impl Strategy<Value = Selection> {
    prop_oneof![
        2 => Just(Selection::All),
        1 => (0i64..5).prop_map(|number| Selection::Backup(BackupLabel::at(second(number * 100)))),
        2 => (0i64..400, 0i64..400, prop::option::of(0u64..10)).prop_map(|(one, other, end)| Selection::Window {
            since: second(one.min(other)),
            until: second(one.max(other)),
            ends: end.into_iter().map(|segment| (branch(1), at(segment, 77))).collect(),
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever is there, wherever it stops: a base backup is never in the target without its WAL, history files come
    /// before WAL, nothing comes twice, and copying again copies nothing.
    #[test]
    fn p2_a_copied_backup_has_its_wal_at_every_moment(
        source in a_source(), keep in vec(any::<bool>(), 1..20), selection in a_selection(),
    ) {
        let target = a_part_of(&source, &keep);
        let plan = plan(&source, &target, &selection);
        prop_assert_eq!(plan.bytes, plan.steps.iter().map(Step::bytes).sum::<u64>());
        let mut seen = BTreeSet::new();
        for number in 0..=plan.steps.len() {
            let begun = CopyPlan { steps: plan.steps[..number].to_vec(), ..plan.clone() };
            let after = carried_out(&begun, &source, &target);
            for backup in &after.inventory.backups {
                prop_assert!(is_consistent(&after, backup), "{} after {} steps of {:?}", backup.label, number, plan);
            }
            let held = segments(&after.inventory);
            for (on, from, to) in after.indexes.keys() {
                let segments = from.segment(size())..=to.segment_before(size());
                let is_whole = |at| held.get(&(*on, at)).is_some_and(|held| held.whole == LEN);
                let all = (segments.start().get()..=segments.end().get()).all(|at| is_whole(SegmentNumber::new(at)));
                prop_assert!(all, "an index of {} to {} without its WAL after {} steps", from, to, number);
            }
            let Some(step) = plan.steps.get(number) else { continue };
            prop_assert!(seen.insert(format!("{step:?}")), "twice: {:?}", step);
            if let Step::Segment { branch, .. } | Step::Open { branch, .. } = step {
                let known = source.inventory.branches[branch].history.is_some();
                let known_there = after.inventory.branches.get(branch).is_some_and(|wal| wal.history.is_some());
                prop_assert!(!known || known_there, "WAL of {} before its history", branch);
            }
        }
        let after = carried_out(&plan, &source, &target);
        let again = super::plan(&source, &after, &selection);
        prop_assert_eq!(again.bytes, 0, "{:?}", again.steps);
        let compares = |step: &Step| matches!(step, Step::History { .. } | Step::Backup { .. });
        prop_assert!(again.steps.iter().all(compares), "{:?}", again.steps);
        for (branch, segment) in &again.compare {
            let key = (*branch, SegmentNumber::new(*segment));
            prop_assert_eq!(segments(&source.inventory)[&key].whole, LEN);
        }
    }

    /// After copying all, the target restores what the source restores.
    #[test]
    fn all_is_all(source in a_source(), keep in vec(any::<bool>(), 1..20)) {
        let target = a_part_of(&source, &keep);
        let plan = plan(&source, &target, &Selection::All);
        let after = carried_out(&plan, &source, &target);
        for (key, held) in segments(&source.inventory) {
            let there = segments(&after.inventory).get(&key).copied().unwrap_or_default();
            prop_assert!(there.end >= held.end && there.whole >= held.whole, "{:?}", key);
        }
        for backup in &source.inventory.backups {
            let copied = after.inventory.backups.iter().any(|there| there.label == backup.label);
            prop_assert_eq!(copied, is_consistent(&source, backup));
        }
        prop_assert_eq!(after.inventory.gaps.len(), source.inventory.gaps.len());
        prop_assert_eq!(after.kept, source.kept);
        prop_assert_eq!(after.names, source.names);
        let held = segments(&source.inventory);
        for (on, from, to) in source.indexes.keys() {
            let numbers = from.segment(size()).get()..=to.segment_before(size()).get();
            let is_whole = |at| held.get(&(*on, SegmentNumber::new(at))).is_some_and(|held| held.whole == LEN);
            prop_assert!(!numbers.clone().all(is_whole) || after.indexes.contains_key(&(*on, *from, *to)), "{}", from);
        }
    }

    /// Every unflagged base backup of the window, what follows it, and a beginning before it.
    #[test]
    fn a_window_reaches_back_to_its_beginning(source in a_source(), one in 0i64..400, other in 0i64..400) {
        let (since, until) = (second(one.min(other)), second(one.max(other)));
        let selection = Selection::Window { since, until, ends: BTreeMap::new() };
        let plan = plan(&source, &empty(), &selection);
        let after = carried_out(&plan, &source, &empty());
        let usable = |backup: &&BackupInfo| backup.flagged.is_none() && is_consistent(&source, backup);
        let before = source.inventory.backups.iter().filter(usable).rfind(|backup| backup.stopped_at <= since);
        if let Some(before) = before {
            prop_assert!(after.inventory.backups.contains(before));
            prop_assert!(plan.missing.is_empty(), "{:?}", plan.missing);
            // Everything of its branch that follows it.
            for ((branch, segment), held) in segments(&source.inventory) {
                if branch == before.branch && segment >= before.start.segment(size()) {
                    let there = segments(&after.inventory).get(&(branch, segment)).copied().unwrap_or_default();
                    prop_assert!(there.end >= held.end, "{:?} {:?}", branch, segment);
                }
            }
        } else {
            prop_assert!(!plan.missing.is_empty());
        }
        for backup in source.inventory.backups.iter().filter(usable) {
            if backup.started_at > since && backup.started_at <= until {
                prop_assert!(after.inventory.backups.contains(backup), "{}", backup.label);
            }
        }
    }
}

#[test]
fn a_backup_whose_wal_is_nowhere_is_left_out_and_said() {
    let mut source = empty();
    add(&mut source, branch(1), 3, (0, LEN), Place::Wal);
    source.inventory.backups.push(backup(branch(1), at(3, 40), at(4, 500), 0));
    let all = plan(&source, &empty(), &Selection::All);
    assert!(all.steps.iter().all(|step| !matches!(step, Step::Backup { .. })), "{:?}", all.steps);
    assert!(all.missing[0].contains("00000001") && all.missing[0].contains("0/400000"), "{:?}", all.missing);
    // The target has what the source lacks.
    let mut target = empty();
    for segment in [3, 4] {
        add(&mut target, branch(1), segment, (0, LEN), Place::Wal);
    }
    let all = plan(&source, &target, &Selection::All);
    assert!(matches!(all.steps[..], [Step::Backup { .. }]), "{:?}", all.steps);
    assert_eq!(all.compare, [(branch(1), 3)]);
    let none = plan(&source, &target, &Selection::Backup(BackupLabel::at(second(1))));
    assert_eq!((none.steps.len(), none.missing.len()), (0, 1));
}

#[test]
fn a_window_ends_where_it_is_known_to_end() {
    let mut source = empty();
    for segment in 0..10 {
        add(&mut source, branch(1), segment, (0, LEN), Place::Wal);
    }
    for (segment, seconds) in [(1, 0), (4, 100), (7, 200)] {
        source.inventory.backups.push(backup(branch(1), at(segment, 40), at(segment, 500), seconds));
    }
    let window = |since, until, end: Option<u64>| {
        let ends = end.into_iter().map(|segment| (branch(1), at(segment, 77))).collect();
        let plan = plan(&source, &empty(), &Selection::Window { since: second(since), until: second(until), ends });
        let segments = plan.steps.iter().filter_map(|step| match step {
            Step::Segment { segment, .. } => Some(*segment),
            _ => None,
        });
        let backups = plan.steps.iter().filter(|step| matches!(step, Step::Backup { .. })).count();
        (segments.collect::<Vec<_>>(), backups, plan.missing.len())
    };
    assert_eq!(window(110, 150, Some(5)), (vec![4, 5], 1, 0));
    assert_eq!(window(50, 150, Some(5)), (vec![1, 2, 3, 4, 5], 2, 0));
    assert_eq!(window(110, 150, None), ((4..10).collect(), 1, 0));
    assert_eq!(window(-50, 50, Some(3)), (vec![1, 2, 3], 1, 1), "said: nothing is as old");
    assert_eq!(window(-50, -40, None), (vec![], 0, 1));
}
