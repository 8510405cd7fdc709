//! The archiver against real servers: what is archived is what the server wrote, whatever happens on the way.

mod support;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgkeep::archive::{ArchiveError, ArchiveOptions, ClusterStatus};
use pgkeep::pg::instance::StopMode;
use pgkeep::store::faulty::{FaultPlan, Faulty};
use pgkeep::types::{Branch, Lsn, SegmentSize, TimelineId};
use support::archiver::*;
use support::{TestPg, any_major, for_each_major, ok, wait_until};

#[test]
fn what_is_archived_is_what_the_server_wrote() {
    for_each_major(|installation| {
        for mib in [1, 16] {
            let size = SegmentSize::new(mib << 20).unwrap();
            let archive = Archive::new();
            let pg = TestPg::start_segmented(installation, mib, "wal_keep_size = 1GB\n");
            let archiver = archive.start(&pg);
            pg.sql("CREATE TABLE t AS SELECT g, repeat('x', 100) FROM generate_series(1, 40000) g");
            pg.sql("SELECT pg_switch_wal()");
            pg.sql("UPDATE t SET g = g + 1; CHECKPOINT");
            let to = flushed(&pg);
            archiver.wait_durable(to);
            let from = archive.runtime.block_on(archive.repository.load(&archive.id())).unwrap();
            let from = from.branches.values().next().unwrap().runs(size)[0].from;
            assert_same_as_pg_wal(&archive, &pg, 1, from, to, size);
            archiver.stop(&archive);
            assert!(archive.frontier(1).unwrap() >= to);
            // The slot was told, but never more than is durable.
            let slot = lsn(&pg.sql("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'pgkeep'"));
            assert!(
                slot <= archive.frontier(1).unwrap()
                    && slot.segment(size) == archive.frontier(1).unwrap().segment_before(size)
            );
        }
    });
}

/// A cluster at rest whose newest commit is durable within max_delay, and that writes no ranges while it rests.
#[test]
fn a_commit_is_durable_after_max_delay() {
    let archive = Archive::new();
    let pg = TestPg::start(any_major(), "");
    let archiver = archive.start(&pg);
    pg.sql("CREATE TABLE t (g int)");
    archiver.wait_durable(flushed(&pg));
    for _ in 0..5 {
        pg.sql("INSERT INTO t VALUES (1)");
        let since = Instant::now();
        archiver.wait_durable(flushed(&pg));
        assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    }
    archiver.stop(&archive);
}

#[test]
fn pitfall_01_fast_shutdown_is_not_held_up() {
    for_each_major(|installation| {
        let archive = Archive::new();
        let mut pg = TestPg::start(installation, "");
        // Nothing would be cut by itself within the test.
        let slow = ArchiveOptions { max_delay: Duration::from_secs(600), ..options() };
        let archiver = archive.start_with(&pg, slow);
        wait_until("the stream", SOON, || matches!(*archiver.seen.borrow(), ClusterStatus::Streaming(_)));
        pg.sql("CREATE TABLE t AS SELECT generate_series(1, 1000)");
        let since = Instant::now();
        ok(pg.stop(StopMode::Fast));
        assert!(since.elapsed() < Duration::from_secs(5), "the shutdown took {:?}", since.elapsed());
        // Including the shutdown checkpoint: everything is there.
        let control = std::fs::read(pg.data_dir().join("global/pg_control")).unwrap();
        let control = pgkeep::pg::control_file::ControlFile::parse(&control).unwrap();
        assert!(archive.frontier(1).unwrap() > control.checkpoint, "the shutdown checkpoint is archived");
        // It comes back, and streaming goes on by itself.
        ok(pg.start());
        pg.sql("INSERT INTO t VALUES (0)");
        archiver.wait_durable(lsn("0/1"));
        archiver.stop(&archive);
        assert!(archive.frontier(1).unwrap() >= flushed(&pg) || pg.sql("SELECT 1") == "1");
    });
}

#[test]
fn pitfall_02_fast_shutdown_with_the_storage_down() {
    let mut faults = None;
    let archive = Archive::over(|store| {
        let faulty = Arc::new(Faulty::new(store, FaultPlan::none(), 7));
        faults = Some(Arc::clone(&faulty));
        faulty
    });
    let faults = faults.unwrap();
    let mut pg = TestPg::start(any_major(), "");
    let deadline = ArchiveOptions { shutdown_deadline: Duration::from_secs(3), ..options() };
    let archiver = archive.start_with(&pg, deadline);
    pg.sql("CREATE TABLE t (g int)");
    archiver.wait_durable(flushed(&pg));
    faults.set_plan(FaultPlan { tails: true, before: 1.0, ..FaultPlan::none() });
    pg.sql("INSERT INTO t SELECT generate_series(1, 1000)");
    let wanted = flushed(&pg);
    let since = Instant::now();
    ok(pg.stop(StopMode::Fast));
    assert!(since.elapsed() < Duration::from_secs(10), "the shutdown took {:?}", since.elapsed());
    faults.set_plan(FaultPlan::none());
    ok(pg.start());
    archiver.wait_durable(wanted);
    assert_same_as_pg_wal(&archive, &pg, 1, wanted.segment_start(SegmentSize::DEFAULT), wanted, SegmentSize::DEFAULT);
    archiver.stop(&archive);
}

/// While the repository takes nothing, WAL is received and not a byte more is reported as flushed.
#[test]
fn p1_what_was_only_received_is_not_acknowledged() {
    for synchronous in [false, true] {
        let mut faults = None;
        let archive = Archive::over(|store| {
            let faulty = Arc::new(Faulty::new(store, FaultPlan::none(), 11));
            faults = Some(Arc::clone(&faulty));
            faulty
        });
        let faults = faults.unwrap();
        let pg = TestPg::start(any_major(), "");
        let archiver = archive.start_with(&pg, ArchiveOptions { synchronous, ..options() });
        pg.sql("CREATE TABLE t (g int)");
        archiver.wait_durable(flushed(&pg));
        faults.set_plan(FaultPlan { tails: true, before: 1.0, ..FaultPlan::none() });
        pg.sql("INSERT INTO t SELECT generate_series(1, 1000)");
        let wanted = flushed(&pg);
        wait_until("the archiver to give up this connection", SOON, || {
            matches!(&*archiver.seen.borrow(), ClusterStatus::Waiting { .. })
        });
        let held = archive.frontier(1).unwrap();
        assert!(held < wanted, "nothing was shown: {held} is durable, {wanted} was written");
        let slot = lsn(&pg.sql("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'pgkeep'"));
        assert!(slot <= held, "the server was told {slot}, and only {held} is durable");
        faults.set_plan(FaultPlan::none());
        archiver.wait_durable(wanted);
        archiver.stop(&archive);
    }
}

#[test]
fn pitfall_05_a_second_archiver_waits_and_takes_over() {
    let archive = Archive::new();
    let pg = TestPg::start(any_major(), "");
    let first = archive.start(&pg);
    pg.sql("CREATE TABLE t (g int)");
    first.wait_durable(flushed(&pg));
    let second = archive.start(&pg);
    wait_until(
        "the second to say why it waits",
        SOON,
        || matches!(&*second.seen.borrow(), ClusterStatus::Waiting { reason } if reason.contains("active for PID")),
    );
    first.stop(&archive);
    pg.sql("INSERT INTO t VALUES (1)");
    second.wait_durable(flushed(&pg));
    second.stop(&archive);
}

/// Where the archive ends with a complete segment, the next segment's tail begins with a digest of its own.
#[test]
fn goes_on_at_a_segments_border() {
    let archive = Archive::new();
    let pg = TestPg::start(any_major(), "");
    // Only complete segments: the open one is not cut.
    let archiver = archive.start_with(&pg, ArchiveOptions { max_delay: Duration::from_secs(600), ..options() });
    pg.sql("CREATE TABLE t (g int)");
    pg.sql("SELECT pg_switch_wal()");
    let size = SegmentSize::DEFAULT;
    let border = lsn(&pg.sql("SELECT pg_current_wal_lsn()")).segment_start(size);
    archiver.wait_durable(border);
    archiver.kill(&archive);
    assert_eq!(archive.frontier(1), Some(border));
    let archiver = archive.start(&pg);
    pg.sql("INSERT INTO t VALUES (1)");
    let to = flushed(&pg);
    archiver.wait_durable(to);
    assert_same_as_pg_wal(&archive, &pg, 1, border, to, size);
    archiver.stop(&archive);
}

/// Killed at any moment, it goes on where the repository ends: no hole, and nothing stored twice for ever.
#[test]
fn pitfall_11_resumes_from_the_repository() {
    let archive = Archive::new();
    let size = SegmentSize::new(1 << 20).unwrap();
    let mut pg = TestPg::start_segmented(any_major(), 1, "wal_keep_size = 1GB\n");
    pg.sql("CREATE TABLE t (g int, filler text)");
    for round in 0..12 {
        let archiver = archive.start(&pg);
        pg.sql("INSERT INTO t SELECT g, repeat('x', 200) FROM generate_series(1, 9000) g");
        if round % 3 == 0 {
            archiver.wait_durable(flushed(&pg));
        } else {
            wait_until("the stream", SOON, || matches!(*archiver.seen.borrow(), ClusterStatus::Streaming(_)));
        }
        archiver.kill(&archive);
        if round % 4 == 3 {
            ok(pg.kill());
            ok(pg.start());
        }
    }
    let archiver = archive.start(&pg);
    let to = flushed(&pg);
    archiver.wait_durable(to);
    archiver.stop(&archive);
    let inventory = ok(archive.runtime.block_on(archive.repository.load(&archive.id())));
    let branch = inventory.branches.values().next().unwrap();
    let runs = branch.runs(size);
    assert_eq!(runs.len(), 1, "one run without a hole: {runs:?}");
    assert!(runs[0].to >= to);
    assert_same_as_pg_wal(&archive, &pg, 1, runs[0].from, to, size);
    let mut whole: Vec<_> = archive.objects().into_iter().filter(|(name, _)| name.contains("/wal/")).collect();
    let all = whole.len();
    whole.dedup_by_key(|(name, _)| name.split('~').next().map(str::to_owned));
    assert_eq!(whole.len(), all, "no complete segment is stored twice");
}

/// The archive ends with a segment that the server has removed: its records must follow the archived ones.
#[test]
fn p1_goes_on_behind_a_removed_segment_only_where_records_follow() {
    let archive = Archive::new();
    let pg = TestPg::start_segmented(any_major(), 1, "min_wal_size = 2MB\nmax_wal_size = 4MB\n");
    pg.sql("CREATE TABLE t (g int)");
    // Only complete segments: the open one is not cut.
    let archiver = archive.start_with(&pg, ArchiveOptions { max_delay: Duration::from_secs(600), ..options() });
    pg.sql("INSERT INTO t VALUES (1)");
    pg.sql("SELECT pg_switch_wal()");
    let size = SegmentSize::new(1 << 20).unwrap();
    archiver.wait_durable(lsn(&pg.sql("SELECT pg_current_wal_lsn()")).segment_start(size));
    archiver.kill(&archive);
    wait_until("the slot to be free", SOON, || pg.sql("SELECT active FROM pg_replication_slots") == "f");
    let held = archive.frontier(1).unwrap();
    pg.sql("SELECT pg_drop_replication_slot('pgkeep')");
    pg.sql("INSERT INTO t VALUES (2); CHECKPOINT");
    pg.sql("INSERT INTO t VALUES (3); CHECKPOINT");
    let name = held.segment_before(size).file_name(TimelineId::FIRST, size);
    let removed = !pg.data_dir().join("pg_wal").join(&name).exists();
    assert!(removed, "{name} should be gone: the test shows nothing otherwise");
    let archiver = archive.start(&pg);
    archiver.wait_durable(flushed(&pg));
    archiver.stop(&archive);
    let inventory = ok(archive.runtime.block_on(archive.repository.load(&archive.id())));
    assert!(inventory.gaps.is_empty(), "{:?}", inventory.gaps);
    assert_eq!(inventory.branches.values().next().unwrap().runs(size).len(), 1);
}

/// A rolled-back server whose WAL behind a segment's border is the same as what is archived there, byte by byte, for a page's
/// header and one record, and another in the segment before: that little overlap is not believed.
#[test]
fn p6_a_short_overlap_behind_a_border_is_not_believed_alone() {
    let size = SegmentSize::new(1 << 20).unwrap();
    let archive = Archive::new();
    // Nobody else writes anything meanwhile.
    let conf = "wal_keep_size = 1GB\nautovacuum = off\nbgwriter_delay = 10s\ncheckpoint_timeout = 1h\n";
    let mut pg = TestPg::start_segmented(any_major(), 1, conf);
    pg.sql("CREATE TABLE t (v text)");
    let archiver = archive.start(&pg);
    archiver.wait_durable(flushed(&pg));
    archiver.stop(&archive);
    ok(pg.stop(StopMode::Fast));
    let copy = copy_of(&pg, "copy");
    let writes = |pg: &TestPg, row: &str| {
        pg.sql("SELECT pg_switch_wal()");
        pg.sql(&format!("INSERT INTO t VALUES ('{row}')"));
        pg.sql("SELECT pg_switch_wal()");
        // Tells no time, and is of no transaction.
        let to = lsn(&pg.sql("SELECT pg_logical_emit_message(false, 'p', 'the same')"));
        wait_until("it to be flushed", SOON, || flushed(pg) >= to);
        to
    };
    let behind = |pg: &TestPg, to: Lsn| {
        let name = to.segment(size).file_name(TimelineId::FIRST, size);
        let file = std::fs::read(pg.data_dir().join("pg_wal").join(name)).unwrap();
        file[..to.segment_offset(size) as usize].to_vec()
    };
    ok(pg.start());
    let to = writes(&pg, "first");
    let bytes = behind(&pg, to);
    let archiver = archive.start(&pg);
    archiver.wait_durable(to);
    archiver.stop(&archive);
    ok(pg.stop(StopMode::Immediate));

    let mut rolled_back = TestPg::attach(any_major(), &copy);
    ok(rolled_back.start());
    assert_eq!(writes(&rolled_back, "other"), to, "the scene is not what it should be");
    assert!(bytes.len() < 8192, "the scene is not what it should be");
    // Servers leave a few bytes of such a record to chance: here it is the very same.
    ok(rolled_back.stop(StopMode::Fast));
    let name = to.segment(size).file_name(TimelineId::FIRST, size);
    let file = std::fs::OpenOptions::new().write(true).open(rolled_back.data_dir().join("pg_wal").join(name)).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    ok(rolled_back.start());
    let archiver = archive.start(&rolled_back);
    rolled_back.sql("INSERT INTO t VALUES ('more')");
    archiver.wait_durable(flushed(&rolled_back));
    archiver.stop(&archive);
    let branches = ok(archive.runtime.block_on(archive.reopened().branches(&archive.id())));
    let branches: Vec<String> = branches.iter().map(ToString::to_string).collect();
    assert_eq!(branches, ["00000001", "00000001.1"]);
    assert_eq!(archive.frontier(1), Some(to), "what is archived stays as it is");
}

#[test]
fn a_foreign_cluster_is_refused() {
    let archive = Archive::new();
    let pg = TestPg::start(any_major(), "");
    let archiver = archive.start(&pg);
    archiver.wait_durable(lsn("0/1"));
    archiver.stop(&archive);
    let before = archive.objects();
    let other = TestPg::start(any_major(), "");
    let error = archive.start(&other).error(&archive);
    assert!(matches!(&error, ArchiveError::ForeignCluster { .. }), "{error}");
    assert_eq!(archive.objects(), before);
}

/// A standby is promoted while it is streamed from: its new timeline is followed, history file first, and the old one's
/// open segment exists only as what it was (pitfalls 7 and 8).
#[test]
fn pitfall_07_a_promotion_is_followed() {
    for_each_major(|installation| {
        let archive = Archive::new();
        let size = SegmentSize::new(1 << 20).unwrap();
        let pg = TestPg::start_segmented(installation, 1, "wal_keep_size = 1GB\n");
        pg.sql("CREATE TABLE t (g int)");
        let mut standby = standby_of(&pg, installation);
        let archiver = archive.start(&standby);
        pg.sql("INSERT INTO t SELECT generate_series(1, 50000)");
        archiver.wait_durable(flushed(&pg));
        ok(standby.promote());
        standby.sql("INSERT INTO t SELECT generate_series(1, 50000)");
        let to = flushed(&standby);
        archiver.wait_durable(to);
        archiver.stop(&archive);
        let inventory = ok(archive.runtime.block_on(archive.repository.load(&archive.id())));
        let two = Branch::first(TimelineId::new(2).unwrap());
        let history = inventory.path_of(two).expect("the history file is archived");
        let fork = history.begins_at();
        assert!(inventory.covers(&history, fork.segment_start(size), to).is_ok());
        assert_same_as_pg_wal(&archive, &standby, 2, fork, to, size);
        let old_whole = format!("/wal/00000001/{:08X}/{}.", 0, fork.segment(size).file_name(TimelineId::FIRST, size));
        assert!(!archive.objects().iter().any(|(name, _)| name.contains(&old_whole)), "never under the full name");
    });
}

/// The slot is gone, and with it WAL that was not archived: a gap with a name, and archiving goes on behind it.
#[test]
fn pitfall_12_p3_lost_wal_is_a_recorded_gap() {
    for_each_major(|installation| {
        let archive = Archive::new();
        let pg = TestPg::start_segmented(
            installation,
            1,
            "max_slot_wal_keep_size = 2MB\nmin_wal_size = 2MB\nmax_wal_size = 8MB\n",
        );
        pg.sql("CREATE TABLE t (g int, filler text)");
        let archiver = archive.start(&pg);
        archiver.wait_durable(flushed(&pg));
        archiver.stop(&archive);
        let held = archive.frontier(1).unwrap();
        for _ in 0..6 {
            pg.sql("INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(1, 9000) g");
            pg.sql("CHECKPOINT");
        }
        let status = pg.sql("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'pgkeep'");
        assert!(status == "lost" || status == "unreserved", "the slot should have lost WAL: {status}");
        let archiver = archive.start(&pg);
        pg.sql("INSERT INTO t VALUES (1, '')");
        archiver.wait_durable(flushed(&pg));
        archiver.stop(&archive);
        let inventory = ok(archive.runtime.block_on(archive.repository.load(&archive.id())));
        assert_eq!(inventory.gaps.len(), 1, "{:?}", inventory.gaps);
        assert_eq!(inventory.gaps[0].from, held);
        let status = pg.sql("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'pgkeep'");
        assert_eq!(status, "reserved", "the slot keeps WAL again");
    });
}

/// 64 MB segments are put whole, 1 GB segments in parts of 64 MB.
#[test]
fn pitfall_13_large_segments() {
    let archive = Archive::new();
    let size = SegmentSize::new(1 << 30).unwrap();
    let pg = TestPg::start_segmented(any_major(), 1024, "max_wal_size = 4GB\nmin_wal_size = 2GB\n");
    let archiver = archive.start(&pg);
    pg.sql("CREATE TABLE t AS SELECT g, repeat('x', 300) FROM generate_series(1, 250000) g");
    let to = flushed(&pg);
    archiver.wait_durable(to);
    archiver.kill(&archive);
    let archiver = archive.start(&pg);
    pg.sql("INSERT INTO t SELECT g, '' FROM generate_series(1, 10) g");
    let to = flushed(&pg);
    archiver.wait_durable(to);
    archiver.stop(&archive);
    assert_same_as_pg_wal(&archive, &pg, 1, Lsn::ZERO, to, size);
    let parts = archive.objects().iter().filter(|(name, _)| name.contains("/wal/")).count();
    assert!(parts >= 1, "the first part of 64 MB is complete");
}
