//! Cases that have a name: the pitfalls of POSTGRES.md 10 and the places where a plan is easily wrong.

use jiff::tz::TimeZone;

use super::model::{at_second, backup, empty_inventory, history, note, pieces, size};
use super::*;
use crate::catalog::inventory::BranchInventory;
use crate::catalog::records::{GapReason, GapRecord, WalRangeNote};
use crate::types::{Id128, TimelineId};
use crate::wal::{Fact, WalLevel};

const MIB: u64 = 1 << 20;

fn branch(text: &str) -> Branch {
    text.parse().unwrap()
}

fn known(text: &str, ancestors: &[(u32, u64)], from: u64, to: u64) -> (Branch, BranchInventory) {
    let mut known = BranchInventory::new(branch(text));
    let number = known.branch.timeline.get();
    known.history = (number > 1).then(|| history(number, ancestors));
    known.pieces = pieces(Lsn::new(from), Lsn::new(to));
    (known.branch, known)
}

fn record(start: u64, end: u64, fact: Option<Fact>) -> Seen {
    Seen { start: Lsn::new(MIB + start), end: Lsn::new(MIB + end), fact }
}

fn commit(start: u64, xid: u32, second: i64) -> Seen {
    let fact = Fact::Commit { xid, time: at_second(second), subxids: vec![xid + 1000], prepared: false };
    record(start, start + 0x40, Some(fact))
}

fn restore_point(start: u64, name: &str, second: i64) -> Seen {
    record(start, start + 0x40, Some(Fact::RestorePoint { name: name.to_owned(), time: at_second(second) }))
}

/// One timeline, one base backup `[0x100, 0x200)` taken in the seconds 100 to 110, then commits.
///
/// | xid | record | second |
/// |-----|--------|--------|
/// | 10  | 0x140  | 105    | inside the backup
/// | 11  | 0x200  | 120    |
/// | 12  | 0x240  | 125    | goes ahead
/// | 13  | 0x280  | 122    | and back
/// | 14  | 0x2C0  | 130    | twice the same
/// | 15  | 0x300  | 130    |
fn quiet() -> (ClusterInventory, Vec<Seen>) {
    let mut inventory = empty_inventory();
    inventory.branches.extend([known("00000001", &[], MIB, MIB + 0x340)]);
    inventory.backups.push(backup(branch("00000001"), MIB + 0x100, MIB + 0x200, (100, 110)));
    let records = vec![
        record(0x100, 0x140, None),
        commit(0x140, 10, 105),
        record(0x180, 0x200, Some(Fact::BackupEnd { start: Lsn::new(MIB + 0x100) })),
        commit(0x200, 11, 120),
        commit(0x240, 12, 125),
        commit(0x280, 13, 122),
        commit(0x2C0, 14, 130),
        commit(0x300, 15, 130),
    ];
    (inventory, records)
}

fn complete_until(inventory: &mut ClusterInventory, second: i64, end: u64) {
    let newest = inventory.branches.values_mut().last().unwrap();
    newest.note_of_newest = Some(note(Some(at_second(second)), Some(Lsn::new(MIB + end))));
}

fn at(second: i64) -> Point {
    Point::Time(at_second(second).to_timestamp())
}

fn target(point: Point, exclusive: bool) -> Target {
    Target { point, exclusive, given: "as typed".to_owned() }
}

fn ask(
    inventory: &ClusterInventory,
    records: &[Seen],
    target: &Target,
    options: &Options,
    damage: Option<&str>,
) -> Result<RestorePlan, Box<PlanError>> {
    let mut planning = Planning::begin(inventory, target, options)?;
    loop {
        let held_to = planning.chain().held_to;
        let mut end = EndOfWal { last_record: None, damage: damage.map(str::to_owned) };
        for record in records.iter().filter(|record| record.end <= held_to) {
            end.last_record = Some((record.start, record.end));
            if planning.push(record.clone()) == Reading::Enough {
                break;
            }
        }
        match planning.finish(&end) {
            Outcome::Yes(plan) => return Ok(*plan),
            Outcome::No(error) => return Err(error),
            Outcome::Again(next) => planning = *next,
        }
    }
}

fn simply(
    inventory: &ClusterInventory,
    records: &[Seen],
    point: Point,
    exclusive: bool,
) -> Result<RestorePlan, Box<PlanError>> {
    ask(inventory, records, &target(point, exclusive), &Options::default(), None)
}

/// The stop as offset and inclusive.
fn stop(plan: &RestorePlan) -> (u64, bool) {
    match plan.stop {
        Stop::At(at) => (at.record.get() - MIB, at.inclusive),
        Stop::Immediate => (0, true),
    }
}

#[test]
fn pitfall_27_times_out_of_order_and_equal_stop_as_the_server_does() {
    let (inventory, records) = quiet();
    let cases = [
        // second, exclusive, stops before, last commit that is there
        (119, false, 0x200, None),
        (120, false, 0x240, Some(11)),
        (120, true, 0x200, None),
        (122, false, 0x240, Some(11)), // 13 is of 122, but 12 of 125 comes first
        (125, false, 0x2C0, Some(13)),
        (125, true, 0x240, Some(11)),
        (129, false, 0x2C0, Some(13)),
        (130, true, 0x2C0, Some(13)), // both of 130 are left out
    ];
    for (second, exclusive, before, last) in cases {
        let plan = simply(&inventory, &records, at(second), exclusive).unwrap();
        assert_eq!(stop(&plan), (before, false), "second {second}, exclusive {exclusive}");
        let included = plan.last_included.map(|commit| commit.xid).filter(|xid| *xid != 10);
        assert_eq!(included, last, "second {second}, exclusive {exclusive}");
        assert_eq!(plan.first_excluded.map(|commit| commit.lsn.get() - MIB), Some(before));
    }
}

#[test]
fn pitfall_27_positions_are_those_of_the_servers_comparison() {
    let (inventory, records) = quiet();
    let cases = [
        // `pg_current_wal_lsn()` after 12 is the start of 13: inclusive replays 13 too, exclusive does not.
        (0x280, false, (0x280, true)),
        (0x280, true, (0x280, false)),
        (0x281, false, (0x2C0, true)),
        (0x281, true, (0x2C0, false)),
        (0x300, false, (0x300, true)),
        // The end of the last archived record: everything up to there.
        (0x340, false, (0x300, true)),
        (0x340, true, (0x300, true)),
        // Exclusive within the last record: whatever follows begins behind it.
        (0x308, true, (0x300, true)),
        // The record that ends the backup is the first that can be a stop.
        (0x180, false, (0x180, true)),
        (0x200, true, (0x200, false)),
    ];
    for (lsn, exclusive, want) in cases {
        let plan = simply(&inventory, &records, Point::Lsn(Lsn::new(MIB + lsn)), exclusive).unwrap();
        assert_eq!(stop(&plan), want, "{lsn:X}, exclusive {exclusive}");
    }
    for (lsn, exclusive, kind) in [
        (0x308, false, NoKind::AfterNewest),
        (0x348, false, NoKind::AfterNewest),
        (0x348, true, NoKind::AfterNewest),
        (0x180, true, NoKind::BeforeFirstBackup),
        (0x140, false, NoKind::BeforeFirstBackup),
        (0x80, false, NoKind::BeforeFirstBackup),
    ] {
        let error = simply(&inventory, &records, Point::Lsn(Lsn::new(MIB + lsn)), exclusive).unwrap_err();
        assert_eq!(error.kind, kind, "{lsn:X}, exclusive {exclusive}");
    }
}

#[test]
fn pitfall_26_a_time_after_the_last_commit_is_answered_before_anything_is_touched() {
    let (mut inventory, records) = quiet();
    let error = simply(&inventory, &records, at(131), false).unwrap_err();
    assert_eq!(error.kind, NoKind::AfterNewest);
    assert_eq!(error.before.as_ref().unwrap().time, Some(PgTimestamp::new(at_second(130).micros() - 1).to_timestamp()));
    assert_eq!(error.earliest.as_ref().unwrap().time, Some(at_second(110).to_timestamp()));
    assert!(error.reason.contains("transaction 15"), "{error}");
    // The archive is known to be complete until second 200: yes, up to the last whole record.
    complete_until(&mut inventory, 200, 0x340);
    let plan = simply(&inventory, &records, at(200), false).unwrap();
    assert_eq!((stop(&plan), plan.last_included.unwrap().xid), ((0x300, true), 15));
    let error = simply(&inventory, &records, at(201), false).unwrap_err();
    assert_eq!(error.newest.unwrap().time, Some(at_second(200).to_timestamp()));
    // Not if the server had written more by then, nor if something before could not be read.
    let damaged = ask(&inventory, &records, &target(at(200), false), &Options::default(), Some("it does not open"));
    assert_eq!(damaged.unwrap_err().kind, NoKind::MissingWal);
    complete_until(&mut inventory, 200, 0x348);
    assert_eq!(simply(&inventory, &records, at(200), false).unwrap_err().kind, NoKind::AfterNewest);
}

#[test]
fn p2_planned_is_restorable_inside_and_before_the_first_backup() {
    let (inventory, mut records) = quiet();
    // Taken between 100 and 110; the only commit in it is of 105.
    assert_eq!(stop(&simply(&inventory, &records, at(105), false).unwrap()), (0x200, false));
    for (second, exclusive) in [(104, false), (105, true), (99, false)] {
        let error = simply(&inventory, &records, at(second), exclusive).unwrap_err();
        assert_eq!(error.kind, NoKind::BeforeFirstBackup, "second {second}");
        assert_eq!(error.after.unwrap().lsn, Lsn::new(MIB + 0x200));
    }
    // The archiver's clock was an hour behind: the server's, in a commit of the backup's time, counts.
    records[1] = commit(0x140, 10, 150);
    assert_eq!(simply(&inventory, &records, at(120), false).unwrap_err().kind, NoKind::BeforeFirstBackup);
}

#[test]
fn p2_planned_is_restorable_transactions_and_restore_points() {
    let (mut inventory, mut records) = quiet();
    assert_eq!(stop(&simply(&inventory, &records, Point::Xid(13), false).unwrap()), (0x280, true));
    assert_eq!(stop(&simply(&inventory, &records, Point::Xid(13), true).unwrap()), (0x280, false));
    let error = simply(&inventory, &records, Point::Xid(1013), false).unwrap_err();
    assert_eq!(error.kind, NoKind::Subtransaction);
    assert!(error.reason.contains("transaction 13"), "{error}");
    assert_eq!(simply(&inventory, &records, Point::Xid(99), false).unwrap_err().kind, NoKind::NotFound);
    let aborted = Fact::Abort { xid: 13, time: at_second(122), subxids: Vec::new(), prepared: true };
    records[5].fact = Some(aborted);
    assert_eq!(stop(&simply(&inventory, &records, Point::Xid(13), false).unwrap()), (0x280, true), "aborts match too");

    inventory.branches.extend([known("00000001", &[], MIB, MIB + 0x400)]);
    records.extend([restore_point(0x340, "twice", 140), restore_point(0x380, "twice", 150)]);
    records[0] = restore_point(0x100, "twice", 100);
    let plan = simply(&inventory, &records, Point::Name("twice".to_owned()), false).unwrap();
    assert_eq!(stop(&plan), (0x340, true), "the first one after the backup");
    assert!(plan.warnings.iter().any(|warning| warning.contains("earlier restore point")), "{:?}", plan.warnings);
    // A newer base backup before it saves WAL; it does not change which one is meant.
    inventory.backups.push(backup(branch("00000001"), MIB + 0x240, MIB + 0x2C0, (125, 129)));
    let plan = simply(&inventory, &records, Point::Name("twice".to_owned()), false).unwrap();
    assert_eq!((stop(&plan), plan.base.start.get()), ((0x340, true), MIB + 0x240));
}

/// Timeline 1 was left at 0x2C0 for timeline 2 and went on to 0x340 for nobody.
fn failed_over() -> (ClusterInventory, Vec<Seen>, Vec<Seen>) {
    let (mut inventory, parent) = quiet();
    inventory.branches.extend([known("00000002", &[(1, MIB + 0x2C0)], MIB, MIB + 0x340)]);
    let mut child = parent[..6].to_vec();
    child.extend([commit(0x2C0, 24, 131), commit(0x300, 25, 140)]);
    (inventory, parent, child)
}

#[test]
fn p2_planned_is_restorable_the_abandoned_tail_only_on_its_own_timeline() {
    let (inventory, parent, child) = failed_over();
    let plan = simply(&inventory, &child, Point::Latest, false).unwrap();
    assert_eq!((plan.target_timeline.get(), plan.last_included.unwrap().xid), (2, 25));
    assert_eq!(plan.wal.iter().map(|need| need.branch).collect::<Vec<_>>(), [branch("00000002")], "the child's copy");
    let error = simply(&inventory, &child, Point::Xid(14), false).unwrap_err();
    assert!(error.hints.iter().all(|hint| !hint.contains("00000002")) && error.branches.len() == 2, "{error:?}");
    let first = Options { timeline: "1".parse().unwrap(), ..Options::default() };
    let plan = ask(&inventory, &parent, &target(Point::Xid(14), false), &first, None).unwrap();
    assert_eq!((plan.target_timeline.get(), stop(&plan)), (1, (0x2C0, true)));
    // Before the fork both ways lead there: the parent is enough, unless only the child has that segment.
    let plan = simply(&inventory, &child, Point::Xid(13), false).unwrap();
    assert_eq!((plan.target_timeline.get(), stop(&plan)), (1, (0x280, true)));
    let mut lost = inventory.clone();
    lost.branches.get_mut(&branch("00000001")).unwrap().pieces.clear();
    let plan = simply(&lost, &child, Point::Xid(13), false).unwrap();
    assert_eq!((plan.target_timeline.get(), stop(&plan)), (2, (0x280, true)));
}

#[test]
fn p2_planned_is_restorable_a_child_without_wal_ends_the_parent_at_the_fork() {
    let (mut inventory, parent, _) = failed_over();
    inventory.branches.get_mut(&branch("00000002")).unwrap().pieces.clear();
    let plan = simply(&inventory, &parent, Point::Latest, false).unwrap();
    assert_eq!((plan.target_timeline.get(), stop(&plan)), (1, (0x280, true)));
    assert!(plan.warnings.iter().any(|warning| warning.contains("00000002")), "{:?}", plan.warnings);
    let second = Options { timeline: "2".parse().unwrap(), ..Options::default() };
    let asked = ask(&inventory, &parent, &target(Point::Latest, false), &second, None);
    assert_eq!(asked.unwrap_err().kind, NoKind::MissingWal);
    // WAL behind a hole at the fork is worse than none: it shows that something is lost.
    let (_, torn) = known("00000002", &[(1, MIB + 0x2C0)], MIB + 0x300, MIB + 0x340);
    inventory.branches.insert(branch("00000002"), torn);
    assert_eq!(simply(&inventory, &parent, Point::Latest, false).unwrap_err().kind, NoKind::MissingWal);
}

#[test]
fn p2_planned_is_restorable_a_backup_of_the_abandoned_tail_is_no_base_for_the_child() {
    let (mut inventory, _, child) = failed_over();
    inventory.backups.push(backup(branch("00000001"), MIB + 0x280, MIB + 0x300, (125, 130)));
    let plan = simply(&inventory, &child, Point::Latest, false).unwrap();
    assert_eq!((plan.base.start.get(), plan.target_timeline.get()), (MIB + 0x100, 2));
}

#[test]
fn p2_planned_is_restorable_two_histories_of_one_number_are_not_guessed() {
    let (mut inventory, _, child) = failed_over();
    inventory.branches.extend([known("00000002.1", &[(1, MIB + 0x2C0)], MIB, MIB + 0x380)]);
    assert_eq!(simply(&inventory, &child, Point::Latest, false).unwrap_err().kind, NoKind::AmbiguousTimeline);
    assert_eq!(stop(&simply(&inventory, &child, Point::Xid(13), false).unwrap()), (0x280, true), "before they parted");
    for (text, ordinal) in [("00000002", 0), ("00000002.1", 1)] {
        let options = Options { timeline: text.parse().unwrap(), ..Options::default() };
        let plan = ask(&inventory, &child, &target(Point::Latest, false), &options, None).unwrap();
        assert_eq!(plan.path.last().unwrap().branch.ordinal, ordinal);
    }
}

#[test]
fn a_timeline_that_is_not_known_or_has_no_history_is_refused() {
    let (mut inventory, _, child) = failed_over();
    let options = |text: &str| Options { timeline: text.parse().unwrap(), ..Options::default() };
    let asked = ask(&inventory, &child, &target(Point::Latest, false), &options("7"), None);
    assert_eq!(asked.unwrap_err().kind, NoKind::UnknownTimeline);
    inventory.branches.get_mut(&branch("00000002")).unwrap().history = None;
    assert_eq!(simply(&inventory, &child, Point::Latest, false).unwrap_err().kind, NoKind::MissingHistory);
    assert!(ask(&inventory, &child, &target(Point::Immediate, false), &options("current"), None).is_ok());
    assert!(
        ["", "0", "x", "2.", "2.0", "0.1", "-1", "00000000"]
            .into_iter()
            .all(|text| text.parse::<TimelineChoice>().is_err())
    );
    let two = TimelineChoice::Number(TimelineId::new(2).unwrap());
    assert_eq!("2".parse::<TimelineChoice>().ok(), Some(two));
    assert_eq!("2.1".parse::<TimelineChoice>(), "00000002.1".parse::<TimelineChoice>());
}

#[test]
fn p2_planned_is_restorable_never_across_a_gap() {
    let (mut inventory, mut records) = quiet();
    records.extend([commit(2 * MIB, 30, 200), commit(2 * MIB + 0x40, 31, 210)]);
    let line = inventory.branches.get_mut(&branch("00000001")).unwrap();
    line.pieces.extend(pieces(Lsn::new(3 * MIB), Lsn::new(3 * MIB + 0x80)));
    let error = simply(&inventory, &records[..8], Point::Latest, false).unwrap_err();
    assert_eq!((error.kind, error.before.unwrap().to), (NoKind::MissingWal, "0/100300".to_owned()));
    assert_eq!(simply(&inventory, &records[..8], at(150), false).unwrap_err().kind, NoKind::MissingWal);
    // Bytes that differ from the server's lead nowhere, whatever lies behind them.
    let line = inventory.branches.get_mut(&branch("00000001")).unwrap();
    line.pieces = pieces(Lsn::new(MIB), Lsn::new(3 * MIB + 0x80));
    assert!(simply(&inventory, &records, Point::Latest, false).is_ok());
    inventory.gaps.push(GapRecord {
        branch: branch("00000001"),
        from: Lsn::new(MIB + 0x300),
        to: Lsn::new(2 * MIB),
        reason: GapReason::Differs,
        noticed_at: Timestamp::UNIX_EPOCH,
        writer: Id128::new([0; 16]),
    });
    assert_eq!(simply(&inventory, &records, Point::Latest, false).unwrap_err().kind, NoKind::MissingWal);
    assert_eq!(stop(&simply(&inventory, &records, at(125), false).unwrap()), (0x2C0, false));
    // So does what came damaged; what lies before it is there.
    inventory.gaps.iter_mut().for_each(|gap| gap.reason = GapReason::Damaged);
    let error = simply(&inventory, &records, Point::Latest, false).unwrap_err();
    assert_eq!(error.kind, NoKind::MissingWal);
    assert_eq!(stop(&simply(&inventory, &records, at(125), false).unwrap()), (0x2C0, false));
}

/// A hole of which what lies behind says that it had not been confirmed: the archiver was killed with several puts under way.
#[test]
fn p2_latest_ends_where_a_put_that_was_under_way_did_not_arrive() {
    let (mut inventory, mut records) = quiet();
    records.extend([commit(2 * MIB, 30, 200), commit(2 * MIB + 0x40, 31, 210)]);
    let line = inventory.branches.get_mut(&branch("00000001")).unwrap();
    line.pieces.extend(pieces(Lsn::new(3 * MIB), Lsn::new(3 * MIB + 0x80)));
    let hole = line.runs(size())[0].to;
    let ask = |inventory: &ClusterInventory| simply(inventory, &records[..8], Point::Latest, false);
    let mut says = |held: Option<Lsn>, is_range: bool| {
        let line = inventory.branches.get_mut(&branch("00000001")).unwrap();
        let digest_to = is_range.then(|| crate::types::Digest::of(b""));
        line.note_of_newest = Some(WalRangeNote { durable_to: held, digest_to, ..note(None, None) });
        ask(&inventory)
    };
    let plan = says(Some(hole), true).unwrap();
    assert_eq!(stop(&plan).0, 0x300, "the last whole record before the hole");
    assert!(says(Some(Lsn::new(MIB)), true).is_ok(), "confirmed was even less");
    let lost = says(Some(hole.advance(1)), true).unwrap_err();
    assert_eq!(lost.kind, NoKind::MissingWal, "it had been there, and is lost");
    assert_eq!(says(Some(hole), false).unwrap_err().kind, NoKind::MissingWal, "a tail began long ago");
    assert_eq!(says(None, true).unwrap_err().kind, NoKind::MissingWal, "an older pgkeep does not say");
}

#[test]
fn settings_are_raised_to_what_recovery_meets_and_minimal_wal_is_refused() {
    let (inventory, mut records) = quiet();
    let parameters = |max_connections, wal_level| Parameters {
        max_connections,
        max_worker_processes: 8,
        max_wal_senders: 10,
        max_prepared_transactions: 0,
        max_locks_per_transaction: 64,
        wal_level,
        wal_log_hints: false,
        track_commit_timestamp: false,
    };
    records[5].fact = Some(Fact::ParameterChange(parameters(300, WalLevel::Replica)));
    records[6].fact = Some(Fact::ParameterChange(parameters(50, WalLevel::Minimal)));
    let plan = simply(&inventory, &records, Point::Lsn(Lsn::new(MIB + 0x280)), false).unwrap();
    assert_eq!((plan.parameters.max_connections, plan.parameters.max_wal_senders), (300, 10));
    let before = simply(&inventory, &records, Point::Xid(12), false).unwrap();
    assert_eq!(before.parameters.max_connections, 100, "not what comes after the stop");
    assert_eq!(simply(&inventory, &records, Point::Latest, false).unwrap_err().kind, NoKind::MinimalWal);
}

#[test]
fn flagged_backups_are_used_only_when_asked_for() {
    let (mut inventory, records) = quiet();
    let mut newer = backup(branch("00000001"), MIB + 0x240, MIB + 0x2C0, (125, 129));
    newer.flagged = Some("3 pages failed their checksums".to_owned());
    let label = newer.label;
    inventory.backups.push(newer);
    let plan = simply(&inventory, &records, Point::Latest, false).unwrap();
    assert_ne!(plan.base.label, label);
    assert!(plan.warnings.iter().any(|warning| warning.contains("3 pages")), "{:?}", plan.warnings);
    for options in
        [Options { allow_flagged: true, ..Options::default() }, Options { backup: Some(label), ..Options::default() }]
    {
        let plan = ask(&inventory, &records, &target(Point::Latest, false), &options, None).unwrap();
        assert_eq!(plan.base.label, label);
    }
    let other = Options { backup: Some(BackupLabel::at(Timestamp::UNIX_EPOCH)), ..Options::default() };
    let asked = ask(&inventory, &records, &target(Point::Latest, false), &other, None);
    assert_eq!(asked.unwrap_err().kind, NoKind::NoBackup);
    inventory.backups.clear();
    assert_eq!(simply(&inventory, &records, Point::Latest, false).unwrap_err().kind, NoKind::NoBackup);
}

#[test]
fn a_plan_and_a_refusal_in_words_and_as_json() {
    let (inventory, _, child) = failed_over();
    let zone = TimeZone::fixed(jiff::tz::offset(1));
    let plan = simply(&inventory, &child, at(135), false).unwrap();
    let text = explain::plan(&plan, &zone).join("\n");
    for part in [
        "(2022-03-07T20:",
        "+01:00",
        "stop      before the record at 0/100300",
        "included  up to transaction 24",
        "excluded  from transaction 25",
        "timeline  2, from 00000001 at 0/1002C0",
        "branch 00000002 from 0/100000 to 0/100340, 1 segment",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["stop"]["record"], "0/100300");
    assert_eq!(json["target"]["point"]["kind"], "time");
    assert_eq!(json["fetch"]["wal_objects"], 1);
    let error = simply(&inventory, &child, at(90), false).unwrap_err();
    let text = explain::refusal(&error, &zone).join("\n");
    assert!(text.contains("before the first base backup") && text.contains("--to 0/100200"), "{text}");
    assert_eq!(serde_json::to_value(&error).unwrap()["kind"], "before-first-backup");
}
