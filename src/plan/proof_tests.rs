//! What a plan tells besides yes: where the target is, what was checked; and that whoever says where to look decides nothing.

use jiff::tz::TimeZone;
use proptest::prelude::*;

use super::model::{at_second, backup, empty_inventory, history, pieces};
use super::*;
use crate::catalog::inventory::BranchInventory;
use crate::types::TimelineId;
use crate::wal::Fact;

const MIB: u64 = 1 << 20;

/// Three base backups in the segments 1, 2 and 3 of a timeline; the transactions 100, 101, … 0x100 bytes apart, every
/// seventh rolled back, and restore points: `often` in each segment, `once` in the second.
fn archive(timeline: u32) -> (ClusterInventory, Vec<Seen>) {
    let mut inventory = empty_inventory();
    let mut branch = BranchInventory::new(Branch::first(TimelineId::new(timeline).unwrap()));
    branch.history = (timeline > 1).then(|| history(timeline, &[(1, MIB)]));
    branch.pieces = pieces(Lsn::new(MIB), Lsn::new(4 * MIB));
    let name = branch.branch;
    inventory.branches.insert(name, branch);
    let mut records = Vec::new();
    for (segment, second) in [(1, 1000), (2, 2000), (3, 3000)] {
        let begin = segment * MIB;
        inventory.backups.push(backup(name, begin + 0x100, begin + 0x200, (second, second + 10)));
        let mut record = |at: u64, fact| {
            let start = Lsn::new(begin + at);
            records.push(Seen { start, end: start.advance(0x100), fact: Some(fact) });
        };
        record(0x100, Fact::BackupEnd { start: Lsn::new(begin + 0x100) });
        for number in 0..50u32 {
            let (xid, time) = (100 + segment as u32 * 50 + number, at_second(second + 20 + i64::from(number)));
            let subxids = vec![xid + 10_000];
            record(
                0x200 + u64::from(number) * 0x100,
                match xid % 7 {
                    0 => Fact::Abort { xid, time, subxids, prepared: false },
                    _ => Fact::Commit { xid, time, subxids, prepared: false },
                },
            );
        }
        let point = |name: &str| Fact::RestorePoint { name: name.to_owned(), time: at_second(second + 90) };
        record(0x8000, point("often"));
        if segment == 2 {
            record(0x8100, point("once"));
        }
    }
    (inventory, records)
}

fn target(point: Point) -> Target {
    Target { point, exclusive: false, given: "as typed".to_owned() }
}

/// Reads one chain.
fn read<'a>(mut planning: Planning<'a>, records: &[Seen]) -> Outcome<'a> {
    let chain = planning.chain().clone();
    let mut end = EndOfWal::default();
    for record in records.iter().filter(|record| record.start >= chain.base.start && record.end <= chain.held_to) {
        end.last_record = Some((record.start, record.end));
        if planning.push(record.clone()) == Reading::Enough {
            break;
        }
    }
    planning.finish(&end)
}

fn ask(inventory: &ClusterInventory, records: &[Seen], point: Point) -> Result<RestorePlan, Box<PlanError>> {
    let mut planning = Planning::begin(inventory, &target(point), &Options::default())?;
    loop {
        match read(planning, records) {
            Outcome::Yes(plan) => return Ok(*plan),
            Outcome::No(no) => return Err(no),
            Outcome::Again(next) => planning = *next,
        }
    }
}

fn stop(plan: &RestorePlan) -> Lsn {
    match plan.stop {
        Stop::At(at) => at.record,
        Stop::Immediate => Lsn::ZERO,
    }
}

proptest! {
    /// Wherever somebody says that the target is: a yes that comes of it is the same yes, of a transaction to the byte, of
    /// a restore point one of that name.
    #[test]
    fn p2_who_says_where_to_look_decides_nothing(
        said in 0u64..5 * MIB, number in 90u32..320, by_name in any::<bool>(), often in any::<bool>(),
    ) {
        let (inventory, records) = archive(1);
        let name = if often { "often" } else { "once" };
        let point = if by_name { Point::Name(name.to_owned()) } else { Point::Xid(number) };
        let planning = Planning::begin(&inventory, &target(point.clone()), &Options::default()).unwrap();
        let first = planning.chain().base.label;
        let Some(near) = planning.near(Lsn::new(said)) else { return Ok(()) };
        prop_assert!(near.chain().base.stop <= Lsn::new(said) && near.chain().base.label != first);
        if let Outcome::Yes(plan) = read(near, &records) {
            let whole = ask(&inventory, &records, point).unwrap();
            match &plan.located {
                Some(Located::Transaction(end)) => prop_assert_eq!((end.xid, stop(&plan)), (number, stop(&whole))),
                Some(Located::RestorePoint { name: found, lsn, .. }) => {
                    prop_assert_eq!((found.as_str(), *lsn), (name, stop(&plan)));
                    prop_assert!(often || stop(&plan) == stop(&whole));
                }
                None => prop_assert!(false, "nothing was located"),
            }
        }
    }
}

#[test]
fn told_where_a_target_is_no_other_wal_is_read() {
    let (inventory, records) = archive(1);
    let near = |point: Point, at: u64| {
        let planning = Planning::begin(&inventory, &target(point), &Options::default()).unwrap();
        planning.near(Lsn::new(at)).map(|near| near.chain().base.start.get() / MIB)
    };
    // The newest base backup is asked first for a transaction, the oldest for a name.
    assert_eq!(near(Point::Xid(205), 2 * MIB + 0x700), Some(2));
    assert_eq!(near(Point::Xid(255), 3 * MIB + 0x700), None, "it is asked anyway");
    assert_eq!(near(Point::Name("once".to_owned()), 2 * MIB + 0x8100), Some(2));
    assert_eq!(near(Point::Xid(205), 0x700), None, "before all of them");
    assert_eq!(near(Point::Xid(205), 9 * MIB), None, "behind all WAL");
    let planning = Planning::begin(&inventory, &target(Point::Xid(205)), &Options::default()).unwrap();
    let Outcome::Yes(plan) = read(planning.near(Lsn::new(2 * MIB + 0x700)).unwrap(), &records) else { panic!("no") };
    assert_eq!((stop(&plan).get(), plan.base.start.get() / MIB), (2 * MIB + 0x700, 2));
    assert!(
        matches!(read(planning.near(Lsn::new(MIB + 0x700)).unwrap(), &records), Outcome::Yes(_)),
        "an older one, too"
    );
}

#[test]
fn a_plan_says_where_the_target_is_and_what_was_checked() {
    let (inventory, records) = archive(2);
    let words = |plan: &RestorePlan| explain::plan(plan, &TimeZone::UTC).join("\n");
    let committed = ask(&inventory, &records, Point::Xid(205)).unwrap();
    let text = words(&committed);
    for part in [
        "found     transaction 205 committed at 2022-",
        "LSN 0/200700",
        "checked   every record of 2.0 kB of WAL; the history file of 00000002 is there",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    assert!(!text.contains("estimate"), "nobody asked for one: {text}");
    let mut timed = committed.clone();
    timed.knows_speed(Some(Sample { bytes: 32_000_000, took: std::time::Duration::from_millis(100) }), None);
    let text = words(&timed);
    assert!(
        text.contains("estimate  about 4 seconds, and no more than an estimate: 1.1 GB of base at 320 MB/s"),
        "{text}"
    );
    assert!(
        text.contains("(measured now, over 32.0 MB)") && text.contains("50.0 MB/s (assumed of a server)"),
        "{text}"
    );
    let json = serde_json::to_value(&timed).unwrap();
    assert_eq!(json["located"]["xid"], 205);
    assert_eq!(json["estimate"]["read_bytes_per_second"], 320_000_000);
    assert_eq!(json["proof"]["histories"][0]["branch"], "00000002");

    let rolled_back = ask(&inventory, &records, Point::Xid(203)).unwrap();
    assert!(words(&rolled_back).contains("found     transaction 203 was rolled back at"), "{}", words(&rolled_back));
    let point = ask(&inventory, &records, Point::Name("once".to_owned())).unwrap();
    assert!(words(&point).contains("found     restore point \"once\" was made at 2022-"), "{}", words(&point));
    // What ended before anything is consistent is told all the same.
    let mut late = inventory.clone();
    late.backups.remove(0);
    late.backups[0].stop = Lsn::new(2 * MIB + 0x1000);
    let no = ask(&late, &records, Point::Xid(205)).unwrap_err();
    assert_eq!(no.kind, NoKind::BeforeFirstBackup);
    let text = explain::refusal(&no, &TimeZone::UTC).join("\n");
    assert!(text.contains("found     transaction 205 committed at"), "{text}");
}
