//! Several repositories of one cluster: one goes away, hangs, lags, holds another history, and comes back.

mod support;

use std::time::{Duration, Instant};

use pgkeep::archive::{ArchiveError, ArchiveOptions, ClusterStatus, Doing};
use pgkeep::pg::instance::StopMode;
use pgkeep::store::faulty::FaultPlan;
use pgkeep::types::{Lsn, SegmentSize, TimelineId};
use support::archiver::*;
use support::several::*;
use support::{TestPg, any_major, ok, wait_until};

const MIB: u64 = 1 << 20;

fn small() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

/// Segments of 1 MiB, and the server keeps nothing that no slot asks for.
fn forgetful() -> TestPg {
    let pg = TestPg::start_segmented(any_major(), 1, "wal_keep_size = 0\nmin_wal_size = 2MB\nmax_wal_size = 4MB\n");
    pg.sql("CREATE TABLE t (g int, filler text)");
    pg
}

/// Some segments of WAL.
fn write(pg: &TestPg) -> Lsn {
    pg.sql("INSERT INTO t SELECT g, repeat('x', 300) FROM generate_series(1, 9000) g");
    flushed(pg)
}

fn slot(pg: &TestPg) -> Lsn {
    lsn(&pg.sql("SELECT coalesce(restart_lsn, '0/0') FROM pg_replication_slots WHERE slot_name = 'pgkeep'"))
}

/// The first segment that r`index` holds.
fn begins(several: &Several, index: usize) -> Lsn {
    let inventory = several.runtime.block_on(several.repository(index).load(&several.id(index)));
    ok(inventory).branches.values().next().unwrap().runs(small())[0].from
}

#[test]
fn all_receive_the_same_and_within_a_realm_the_same_objects() {
    let several = Several::new(&[0, 0, 1], 3);
    let pg = TestPg::start_segmented(any_major(), 1, "wal_keep_size = 1GB\n");
    pg.sql("CREATE TABLE t (g int, filler text)");
    let archiver = several.start(&pg, options());
    archiver.wait_durable(write(&pg));
    let to = write(&pg);
    archiver.wait_durable(to);
    let shown = progress(&archiver).unwrap();
    assert_eq!(shown.durable, shown.repositories.iter().filter_map(|of| of.frontier).min().unwrap());
    several.stop(archiver);
    for index in 0..3 {
        several.assert_same_as_pg_wal(index, &pg, 1, begins(&several, index), to, small());
    }
    let whole = |index: usize| {
        let names = several.objects(index).into_iter().map(|(name, _)| name).filter(|name| name.contains("/wal/"));
        names.map(|name| (std::fs::read(several.doors[index].path.join(&name)).unwrap(), name)).collect::<Vec<_>>()
    };
    let (first, second, third) = (whole(0), whole(1), whole(2));
    assert!(first.len() >= 4 && first == second, "one realm: the same objects, byte for byte");
    assert_eq!(third.len(), first.len());
    assert!(third.iter().zip(&first).all(|(a, b)| a.1 == b.1 && a.0 != b.0), "another realm: its own objects");
}

/// One of two is down while the other takes WAL. With `acknowledge = 1` the slot moves on, and the server removes what the
/// one that is down lacks: what it gets later can only come from the other. With 2 the slot stands still.
#[test]
fn one_goes_away_and_is_filled_up_from_the_other() {
    for (needed, realms) in [(1, [0, 0]), (1, [0, 1]), (2, [0, 1])] {
        let several = Several::new(&realms, needed);
        let pg = forgetful();
        let archiver = several.start(&pg, options());
        archiver.wait_durable(write(&pg));
        (0..2).for_each(|index| wait_held(&archiver, index, flushed(&pg)));
        several.doors[1].faults.set_plan(down());
        let watched = Watched::new(&several, &archiver);
        let lost_at = write(&pg);
        wait_doing(&archiver, 1, "away", is_away);
        for _ in 0..4 {
            write(&pg);
            pg.sql("CHECKPOINT");
        }
        let to = write(&pg);
        wait_held(&archiver, 0, to);
        let kept = lost_at.segment(small()).next().next().file_name(TimelineId::FIRST, small());
        let kept = pg.data_dir().join("pg_wal").join(kept);
        if needed == 1 {
            archiver.wait_durable(to);
            wait_until("the slot to move on", SOON, || slot(&pg) > lost_at.advance(2 * MIB));
            // Its index has to come over with it.
            let main = several.repository(0);
            let made = ok(several.runtime.block_on(main.rebuild_indexes(&several.id(0), false, &|_, _| {})));
            assert_eq!((made.ranges, made.left), (1, Vec::new()));
            wait_until("the server to remove old WAL", SOON, || {
                pg.sql("INSERT INTO t VALUES (0); SELECT pg_switch_wal(); CHECKPOINT");
                !kept.exists()
            });
        } else {
            assert!(slot(&pg) <= lost_at, "the slot moved to {} without the one that is away", slot(&pg));
            assert!(archiver.durable() <= lost_at);
            assert!(kept.exists(), "the server keeps what is not acknowledged");
        }
        let before = several.durable(1, 1);
        several.doors[1].faults.set_plan(FaultPlan::none());
        wait_doing(&archiver, 1, "live", is_live);
        let to = write(&pg);
        (0..2).for_each(|index| wait_held(&archiver, index, to));
        archiver.wait_durable(to);
        watched.assert_one_stream();
        wait_until("the slot to follow", SOON, || slot(&pg) >= to.segment_start(small()));
        several.stop(archiver);
        assert!(before < several.durable(1, 1));
        several.assert_same_segments(0, 1, 1, begins(&several, 0), several.durable(1, 1), small());
        let index_of = |repository: usize| {
            let (branch, id) = (pgkeep::types::Branch::first(TimelineId::FIRST), several.id(repository));
            let ranges = several.runtime.block_on(several.repository(repository).list_indexes(&id, branch));
            ok(ranges).into_iter().map(|range| (range.from, range.to)).collect::<Vec<_>>()
        };
        assert_eq!((index_of(1).len(), index_of(1)), (usize::from(needed == 1), index_of(0)));
    }
}

/// The same across a kill of the archiver: nothing is carried over in memory.
#[test]
fn one_is_behind_when_the_archiver_starts() {
    let several = Several::new(&[0, 1], 1);
    let pg = forgetful();
    let archiver = several.start(&pg, options());
    let to = write(&pg);
    (0..2).for_each(|index| wait_held(&archiver, index, to));
    several.doors[1].faults.set_plan(down());
    write(&pg);
    wait_doing(&archiver, 1, "away", is_away);
    several.kill(archiver);
    // Down at the start: the other one goes on alone.
    let archiver = several.start(&pg, options());
    let to = write(&pg);
    archiver.wait_durable(to);
    assert!(doing(&archiver, 1).is_some_and(|doing| is_away(&doing)));
    several.kill(archiver);
    several.doors[1].faults.set_plan(FaultPlan::none());
    let archiver = several.start(&pg, options());
    wait_doing(&archiver, 1, "live", is_live);
    let to = write(&pg);
    (0..2).for_each(|index| wait_held(&archiver, index, to));
    several.stop(archiver);
    several.assert_same_segments(0, 1, 1, begins(&several, 0), to, small());
}

/// An empty repository in place of one that was lost: with all needed, it counts only when it holds all that the slot
/// was not told.
#[test]
fn p1_an_empty_repository_begins_where_the_slot_does() {
    let several = Several::new(&[0, 1], 2);
    let pg = forgetful();
    let archiver = several.start(&pg, options());
    let first = write(&pg);
    (0..2).for_each(|index| wait_held(&archiver, index, first));
    several.doors[1].faults.set_plan(down());
    for _ in 0..3 {
        write(&pg);
    }
    let to = flushed(&pg);
    wait_held(&archiver, 0, to);
    several.kill(archiver);
    // The disk of r1 is replaced.
    let cluster = several.doors[1].path.join("main");
    std::fs::remove_dir_all(&cluster).unwrap();
    several.doors[1].faults.set_plan(FaultPlan::none());
    let told = slot(&pg);
    assert!(told < to.segment_start(small()), "the slot stood still: {told}");
    let archiver = several.start(&pg, options());
    wait_doing(&archiver, 1, "live", is_live);
    let to = write(&pg);
    archiver.wait_durable(to);
    several.stop(archiver);
    assert_eq!(begins(&several, 1), told.segment_start(small()), "everything that was not acknowledged yet is there");
    several.assert_same_segments(0, 1, 1, told, to, small());
}

#[test]
fn a_timeline_switch_while_one_is_away() {
    let several = Several::new(&[0, 1], 1);
    let pg = TestPg::start_segmented(any_major(), 1, "wal_keep_size = 1GB\n");
    pg.sql("CREATE TABLE t (g int, filler text)");
    let mut standby = standby_of(&pg, any_major());
    let archiver = several.start(&standby, options());
    let to = write(&pg);
    (0..2).for_each(|index| wait_held(&archiver, index, to));
    several.doors[1].faults.set_plan(down());
    write(&pg);
    let fork_after = write(&pg);
    wait_doing(&archiver, 1, "away", is_away);
    wait_held(&archiver, 0, fork_after);
    ok(standby.promote());
    standby.sql("INSERT INTO t SELECT g, repeat('y', 300) FROM generate_series(1, 9000) g");
    wait_held(&archiver, 0, flushed(&standby));
    standby.sql("INSERT INTO t SELECT g, repeat('z', 300) FROM generate_series(1, 9000) g");
    wait_held(&archiver, 0, flushed(&standby));
    let behind = several.durable(1, 1);
    assert!(behind < fork_after && several.durable(1, 2) == Lsn::ZERO, "{behind}");
    several.doors[1].faults.set_plan(FaultPlan::none());
    wait_doing(&archiver, 1, "live", is_live);
    standby.sql("INSERT INTO t VALUES (1)");
    let to = flushed(&standby);
    (0..2).for_each(|index| wait_held(&archiver, index, to));
    several.stop(archiver);
    let inventory = ok(several.runtime.block_on(several.repository(1).load(&several.id(1))));
    let two = pgkeep::types::Branch::first(TimelineId::new(2).unwrap());
    let history = inventory.path_of(two).expect("the history file is there");
    let fork = history.begins_at();
    let first = begins(&several, 1);
    assert!(inventory.covers(&history, first, to).is_ok(), "{:?}", inventory.covers(&history, first, to));
    several.assert_same_segments(0, 1, 1, first, fork.segment_start(small()), small());
    several.assert_same_segments(0, 1, 2, fork.segment_start(small()), to, small());
    several.assert_same_as_pg_wal(1, &standby, 2, fork, to, small());
}

/// Another server wrote into one of the repositories under the same name: that one is refused and named, nothing is put
/// there, and the other goes on.
#[test]
fn p6_another_history_in_one_repository_is_refused_there() {
    // A little other WAL, and more than the right repository holds: then the wrong one is further.
    [500, 12_000].into_iter().for_each(another_history_is_refused);
}

fn another_history_is_refused(rows: u32) {
    let several = Several::new(&[0, 0], 1);
    let mut pg = TestPg::start_segmented(any_major(), 1, "wal_keep_size = 1GB\n");
    pg.sql("CREATE TABLE t (g int, filler text)");
    let archiver = several.start(&pg, options());
    let to = write(&pg);
    (0..2).for_each(|index| wait_held(&archiver, index, to));
    several.stop(archiver);
    ok(pg.stop(StopMode::Fast));
    let copy = copy_of(&pg, "copy");
    let mut other = TestPg::attach(any_major(), &copy);
    ok(other.start());
    ok(pg.start());
    // The copy goes on under the same numbers, into r1 alone.
    several.doors[0].faults.set_plan(down());
    let archiver = several.start(&other, options());
    other.sql(&format!("INSERT INTO t SELECT g, repeat('o', 300) FROM generate_series(1, {rows}) g"));
    wait_held(&archiver, 1, flushed(&other));
    several.kill(archiver);
    ok(other.stop(StopMode::Fast));
    let before = several.objects(1);
    several.doors[0].faults.set_plan(FaultPlan::none());
    for _ in 0..3 {
        write(&pg);
    }
    assert!(rows < 1000 || several.durable(1, 1) > several.durable(0, 1).advance(2 * MIB), "the wrong one is further");
    for round in 0..2 {
        // At the start, and when it comes back while the other one streams.
        if round == 1 {
            several.doors[1].faults.set_plan(down());
        }
        let archiver = several.start(&pg, options());
        let to = write(&pg);
        archiver.wait_durable(to);
        several.doors[1].faults.set_plan(FaultPlan::none());
        wait_doing(&archiver, 1, "refused", is_refused);
        let Some(Doing::Refused { reason }) = doing(&archiver, 1) else { panic!("{:?}", doing(&archiver, 1)) };
        assert!(reason.contains("differs") || reason.contains("archived up to"), "{reason}");
        let to = write(&pg);
        archiver.wait_durable(to);
        several.stop(archiver);
        assert_eq!(several.objects(1), before, "nothing was put into the repository with the other history");
    }
    several.assert_same_as_pg_wal(0, &pg, 1, begins(&several, 0), flushed(&pg), small());
    // Where all of them must hold it, nothing is acknowledged with such a one among them.
    let strict = Several { needed: 2, ..several };
    let told = slot(&pg);
    let archiver = strict.start(&pg, options());
    let to = write(&pg);
    wait_held(&archiver, 0, to);
    wait_doing(&archiver, 1, "refused", is_refused);
    assert!(slot(&pg) <= told && archiver.durable() < to);
    strict.kill(archiver);
}

/// The server is put back to an older copy. What it writes then begins when all repositories answer, and is called the same
/// in each; what they hold already stays as it is.
#[test]
fn p6_a_second_history_has_one_name_in_all_repositories() {
    let several = Several::new(&[0, 1], 1);
    let mut pg = TestPg::start_segmented(any_major(), 1, "wal_keep_size = 1GB\n");
    pg.sql("CREATE TABLE t (g int, filler text)");
    let archive = |pg: &TestPg| {
        let archiver = several.start(pg, options());
        let to = write(pg);
        (0..2).for_each(|index| wait_held(&archiver, index, to));
        several.stop(archiver);
    };
    archive(&pg);
    ok(pg.stop(StopMode::Fast));
    let copy = copy_of(&pg, "copy");
    ok(pg.start());
    archive(&pg);
    ok(pg.stop(StopMode::Immediate));
    let before = [several.objects(0), several.objects(1)];

    let mut rolled_back = TestPg::attach(any_major(), &copy);
    ok(rolled_back.start());
    several.doors[1].faults.set_plan(down());
    // Behind what is archived, and beyond it.
    let mut archiver = None;
    for rows in [500, 15_000] {
        rolled_back.sql(&format!("INSERT INTO t SELECT g, repeat('o', 300) FROM generate_series(1, {rows}) g"));
        assert_eq!(flushed(&rolled_back) > several.durable(0, 1), rows > 500, "the scene is not what it should be");
        if let Some(archiver) = archiver.take() {
            several.kill(archiver);
        }
        let started = archiver.insert(several.start(&rolled_back, options()));
        wait_until(
            "it to wait for the other repository",
            SOON,
            || matches!(&*started.seen.borrow(), ClusterStatus::Waiting { reason } if reason.contains("begins a branch only when all do")),
        );
        assert_eq!(several.objects(0), before[0], "nothing begins while one is away");
    }
    let archiver = archiver.expect("one that runs");
    several.doors[1].faults.set_plan(FaultPlan::none());
    let to = write(&rolled_back);
    (0..2).for_each(|index| wait_held(&archiver, index, to));
    several.stop(archiver);
    for (index, before) in before.iter().enumerate() {
        let names = several.runtime.block_on(several.repository(index).branches(&several.id(index)));
        let names: Vec<String> = ok(names).iter().map(ToString::to_string).collect();
        assert_eq!(names, ["00000001", "00000001.1"], "in repository {index}");
        let now = several.objects(index);
        let whole = before.iter().filter(|(name, _)| name.contains("/wal/"));
        assert!(whole.into_iter().all(|object| now.contains(object)), "what was there stays");
    }
}

#[test]
fn all_that_hold_another_history_end_it() {
    let several = Several::new(&[0, 1], 1);
    let pg = TestPg::start(any_major(), "");
    let archiver = several.start(&pg, options());
    (0..2).for_each(|index| wait_held(&archiver, index, lsn("0/1")));
    several.stop(archiver);
    let other = TestPg::start(any_major(), "");
    let archiver = several.start(&other, options());
    let ended = several.runtime.block_on(async { tokio::time::timeout(SOON, archiver.task).await });
    let error = ended.expect("it should have ended").unwrap().expect_err("it should have refused");
    assert!(matches!(error, ArchiveError::ForeignCluster { .. }) && error.protects_data(), "{error}");
}

/// One hangs for ever while much WAL comes: memory stays bounded, the other one gets everything.
#[test]
fn p8_one_that_hangs_is_left_behind_and_memory_is_bounded() {
    let several = Several::new(&[0, 1], 1);
    let pg = TestPg::start(any_major(), "max_wal_size = 2GB\nfull_page_writes = off\n");
    pg.sql("CREATE TABLE t (g int, filler text)");
    let archiver = several.start(&pg, options());
    archiver.wait_durable(flushed(&pg));
    wait_held(&archiver, 1, flushed(&pg));
    several.doors[1].faults.set_plan(hanging());
    let peak = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
    };
    let before = peak();
    for _ in 0..6 {
        pg.sql("INSERT INTO t SELECT g, repeat('x', 700) FROM generate_series(1, 120000) g");
        pg.sql("TRUNCATE t");
    }
    let to = flushed(&pg);
    assert!(to.get() > 512 * MIB, "too little WAL to show anything: {to}");
    archiver.wait_durable(to);
    wait_doing(&archiver, 1, "away", is_away);
    let Some(Doing::Away { reason }) = doing(&archiver, 1) else { panic!("{:?}", doing(&archiver, 1)) };
    assert!(reason.contains("keep up") || reason.contains("being opened"), "{reason}");
    // Two parts' worth for the stream (128 MiB), the same sealed for two realms, and what sealing takes on the way.
    let grown = peak() - before;
    assert!(grown < 640, "memory grew by {grown} MiB");
    println!("{} MiB of WAL; memory grew by {grown} MiB", to.get() >> 20);
    several.doors[1].faults.set_plan(FaultPlan::none());
    several.stop(archiver);
}

/// PostgreSQL's fast shutdown with one repository hanging: at once where it is not needed, and not beyond the deadline
/// where it is.
#[test]
fn a_shutdown_is_not_held_up_by_one_that_hangs() {
    for needed in [1, 2] {
        let several = Several::new(&[0, 1], needed);
        let mut pg = TestPg::start(any_major(), "");
        let archiver = several.start(&pg, ArchiveOptions { shutdown_deadline: Duration::from_secs(4), ..options() });
        pg.sql("CREATE TABLE t (g int)");
        archiver.wait_durable(flushed(&pg));
        several.doors[1].faults.set_plan(hanging());
        pg.sql("INSERT INTO t SELECT generate_series(1, 1000)");
        wait_held(&archiver, 0, flushed(&pg));
        let since = Instant::now();
        ok(pg.stop(StopMode::Fast));
        let took = since.elapsed();
        assert!(took < Duration::from_secs(15), "with {needed} needed the shutdown took {took:?}");
        if needed == 2 {
            assert!(took > Duration::from_secs(2), "nothing was shown: it took {took:?}");
        }
        several.doors[1].faults.set_plan(FaultPlan::none());
        ok(pg.start());
        pg.sql("INSERT INTO t VALUES (1)");
        let to = flushed(&pg);
        archiver.wait_durable(to);
        several.stop(archiver);
    }
}

/// Our own stop with one that hangs: quick where it is not needed; where it is, it says what is not durable.
#[test]
fn a_stop_with_one_that_hangs() {
    for needed in [1, 2] {
        let several = Several::new(&[0, 1], needed);
        let pg = TestPg::start(any_major(), "");
        pg.sql("CREATE TABLE t (g int)");
        let deadline = Duration::from_secs(if needed == 1 { 60 } else { 5 });
        let archiver = several.start(&pg, ArchiveOptions { shutdown_deadline: deadline, ..options() });
        (0..2).for_each(|index| wait_held(&archiver, index, flushed(&pg)));
        several.doors[1].faults.set_plan(hanging());
        pg.sql("INSERT INTO t SELECT generate_series(1, 1000)");
        wait_held(&archiver, 0, flushed(&pg));
        let since = Instant::now();
        archiver.stop.cancel();
        let ended = several.runtime.block_on(archiver.task).unwrap();
        let took = since.elapsed();
        match needed {
            1 => assert!(ended.is_ok() && took < Duration::from_secs(45), "{ended:?} after {took:?}"),
            _ => assert!(matches!(ended, Err(ArchiveError::StopDeadline { .. })), "{ended:?}"),
        }
    }
}

/// All are down: as with one, the attempt ends and is made again.
#[test]
fn all_go_away_and_come_back() {
    let several = Several::new(&[0, 1], 2);
    let pg = forgetful();
    let archiver = several.start(&pg, options());
    let to = write(&pg);
    archiver.wait_durable(to);
    several.doors.iter().for_each(|door| door.faults.set_plan(down()));
    let wanted = write(&pg);
    wait_until("the archiver to wait", SOON, || matches!(&*archiver.seen.borrow(), ClusterStatus::Waiting { .. }));
    assert!(slot(&pg) < wanted.segment_start(small()));
    several.doors.iter().for_each(|door| door.faults.set_plan(FaultPlan::none()));
    archiver.wait_durable(wanted);
    several.stop(archiver);
    several.assert_same_segments(0, 1, 1, begins(&several, 0), wanted, small());
}

/// A spool: a small one beside the archiver that is acknowledged from, and a slow one behind it. What only the spool holds
/// is not asked of the server again when the spool comes back, and no gap is recorded while it is away.
#[test]
fn p3_no_gap_is_recorded_while_one_that_may_hold_it_is_away() {
    let several = Several::new(&[0, 1], 1);
    let pg = forgetful();
    let archiver = several.start(&pg, options());
    let first = write(&pg);
    (0..2).for_each(|index| wait_held(&archiver, index, first));
    several.doors[1].faults.set_plan(down());
    write(&pg);
    wait_doing(&archiver, 1, "away", is_away);
    let lost_at = several.durable(1, 1);
    for _ in 0..4 {
        write(&pg);
        pg.sql("CHECKPOINT");
    }
    let to = flushed(&pg);
    archiver.wait_durable(to);
    let next = lost_at.segment(small()).file_name(TimelineId::FIRST, small());
    wait_until("the server to remove what only the spool holds", SOON, || {
        pg.sql("INSERT INTO t VALUES (0); SELECT pg_switch_wal(); CHECKPOINT");
        !pg.data_dir().join("pg_wal").join(&next).exists()
    });
    let to = flushed(&pg);
    archiver.wait_durable(to);
    several.kill(archiver);
    // Now the spool is away, and the other one is back.
    several.doors[0].faults.set_plan(down());
    several.doors[1].faults.set_plan(FaultPlan::none());
    let archiver = several.start(&pg, options());
    wait_until(
        "the archiver to wait for the spool",
        SOON,
        || matches!(&*archiver.seen.borrow(), ClusterStatus::Waiting { reason } if reason.contains("r0 may hold")),
    );
    let gaps = |index| ok(several.runtime.block_on(several.repository(index).load(&several.id(index)))).gaps;
    assert_eq!(gaps(1), [], "nobody knows that it is lost");
    several.doors[0].faults.set_plan(FaultPlan::none());
    let to = write(&pg);
    (0..2).for_each(|index| wait_held(&archiver, index, to));
    several.stop(archiver);
    assert_eq!((gaps(0), gaps(1)), (vec![], vec![]));
    several.assert_same_segments(0, 1, 1, begins(&several, 1), to, small());
}

/// The one that held it is lost for good, an empty one is in its place, and the server has removed it: what nobody holds
/// is a gap, recorded where it is missing, and that repository takes part again.
#[test]
fn p3_what_no_repository_holds_is_a_recorded_gap() {
    let several = Several::new(&[0, 1], 1);
    let pg = forgetful();
    let archiver = several.start(&pg, options());
    let first = write(&pg);
    (0..2).for_each(|index| wait_held(&archiver, index, first));
    several.doors[1].faults.set_plan(down());
    write(&pg);
    wait_doing(&archiver, 1, "away", is_away);
    let lost_at = several.durable(1, 1);
    for _ in 0..4 {
        archiver.wait_durable(write(&pg));
        pg.sql("CHECKPOINT");
    }
    several.kill(archiver);
    let next = lost_at.segment(small()).next().file_name(TimelineId::FIRST, small());
    assert!(!pg.data_dir().join("pg_wal").join(&next).exists(), "nothing is shown while the server has it");
    std::fs::remove_dir_all(several.doors[0].path.join("main")).unwrap();
    let archiver = several.start(&pg, options());
    archiver.wait_durable(write(&pg));
    several.doors[1].faults.set_plan(FaultPlan::none());
    wait_doing(&archiver, 1, "live", is_live);
    let to = write(&pg);
    (0..2).for_each(|index| wait_held(&archiver, index, to));
    several.stop(archiver);
    let inventory = ok(several.runtime.block_on(several.repository(1).load(&several.id(1))));
    let gaps: Vec<(Lsn, Lsn)> = inventory.gaps.iter().map(|gap| (gap.from, gap.to)).collect();
    // What only the tail held may never have reached the disk: the gap begins before it.
    assert!(gaps.len() == 1 && gaps[0].1 == begins(&several, 0), "{gaps:?}");
    assert!((lost_at.segment_start(small())..=lost_at).contains(&gaps[0].0), "{gaps:?}, lost at {lost_at}");
    several.assert_same_segments(0, 1, 1, begins(&several, 0), to, small());
}

/// Segments of more than one part: one that was away takes part again in the middle of a segment.
#[test]
fn one_is_filled_up_in_the_middle_of_a_large_segment() {
    let several = Several::new(&[0, 1], 1);
    let size = SegmentSize::new(256 * MIB).unwrap();
    let pg = TestPg::start_segmented(any_major(), 256, "max_wal_size = 4GB\nmin_wal_size = 1GB\n");
    pg.sql("CREATE TABLE t (g int, filler text)");
    let archiver = several.start(&pg, options());
    let first = flushed(&pg);
    (0..2).for_each(|index| wait_held(&archiver, index, first));
    several.doors[1].faults.set_plan(down());
    pg.sql("INSERT INTO t SELECT g, repeat('x', 700) FROM generate_series(1, 200000) g");
    wait_doing(&archiver, 1, "away", is_away);
    let to = flushed(&pg);
    assert!(to.segment_offset(size) > 64 * MIB && to.segment(size) == first.segment(size), "{to}");
    wait_held(&archiver, 0, to);
    several.doors[1].faults.set_plan(FaultPlan::none());
    wait_doing(&archiver, 1, "live", is_live);
    pg.sql("INSERT INTO t VALUES (1)");
    let to = flushed(&pg);
    (0..2).for_each(|index| wait_held(&archiver, index, to));
    several.stop(archiver);
    several.assert_same_as_pg_wal(1, &pg, 1, to.segment_start(size), to, size);
}

/// Random faults by seed in all repositories, kills of the archiver in between: what the server was told is never more
/// than as many repositories hold as are needed.
#[test]
fn p1_under_faults_by_seed_the_slot_is_never_told_more_than_enough_repositories_hold() {
    let seed = std::env::var("PGKEEP_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        u64::from(now.subsec_nanos()) ^ now.as_secs()
    });
    eprintln!("seed {seed}: repeat with PGKEEP_SEED={seed}");
    let needed = 1 + (seed % 2) as usize;
    let several = Several::with_faults(&[0, 0, 1], needed, true, seed);
    let pg = TestPg::start_segmented(any_major(), 1, "wal_keep_size = 1GB\n");
    pg.sql("CREATE TABLE t (g int, filler text)");
    // Where the slot begins is the server's own choice; from then on it is what it was told.
    pg.sql("SELECT pg_create_physical_replication_slot('pgkeep', true)");
    let mut told = slot(&pg);
    for round in 0..8_u64 {
        for (index, door) in several.doors.iter().enumerate() {
            let plan = match (seed >> (round * 3 + index as u64)) % 4 {
                0 => FaultPlan::none(),
                1 => FaultPlan { delay_to: Duration::from_millis(50), tails: true, ..FaultPlan::network(0.2) },
                2 => FaultPlan { tails: true, before: 0.5, after: 0.3, ..FaultPlan::none() },
                _ => FaultPlan { tails: true, before: 0.02, after: 0.02, ..FaultPlan::none() },
            };
            door.faults.set_plan(plan);
        }
        let archiver = several.start(&pg, options());
        for _ in 0..3 {
            write(&pg);
            std::thread::sleep(Duration::from_millis(100 + seed % 200)); // the random moment itself
        }
        if archiver.task.is_finished() {
            let error = several.runtime.block_on(archiver.task).unwrap();
            // Down at the first attempt, with faults that another attempt may not meet: that is said, and ends it.
            assert!(matches!(&error, Err(error) if !error.protects_data()), "seed {seed}: {error:?}");
            continue;
        }
        several.kill(archiver);
        let now = slot(&pg);
        let ends: Vec<Lsn> = (0..3).map(|index| several.durable(index, 1)).collect();
        let holders = ends.iter().filter(|end| **end >= now).count();
        assert!(holders >= needed || now <= told, "seed {seed}: the server was told {now}; {ends:?}, {needed} needed");
        assert!(now >= told, "seed {seed}: the slot went back from {told} to {now}");
        told = now;
    }
    several.doors.iter().for_each(|door| door.faults.set_plan(FaultPlan::none()));
    let archiver = several.start(&pg, options());
    let to = write(&pg);
    (0..3).for_each(|index| wait_held(&archiver, index, to));
    archiver.wait_durable(to);
    several.stop(archiver);
    for index in 0..3 {
        several.assert_same_as_pg_wal(index, &pg, 1, begins(&several, index), to, small());
    }
    assert!(several.doors.iter().any(|door| door.faults.faults() > 0), "seed {seed}: no fault was met");
}
