//! WAL that is damaged on the server: archived as it is, told with its position, and never planned across.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use pgkeep::pg::instance::StopMode;
use pgkeep::types::{Lsn, SegmentNumber, SegmentSize, TimelineId};
use support::rig::{Rig, SOON};
use support::{TestPg, any_major, ok, wait_until};

const SIZE: u64 = 1 << 20;

fn lsn(text: &str) -> Lsn {
    ok(text.parse())
}

/// The file that holds a position of timeline 1.
fn segment_of(pg: &TestPg, at: Lsn) -> PathBuf {
    let size = SegmentSize::new(SIZE).expect("a segment size");
    let number: SegmentNumber = at.segment(size);
    pg.data_dir().join("pg_wal").join(number.file_name(TimelineId::FIRST, size))
}

/// Where the recorded damage begins and ends, by position.
fn damage(rig: &Rig) -> Vec<(Lsn, Lsn)> {
    let list = rig.json(&["list", "--json"]);
    let gaps = list
        .pointer("/clusters/0/gaps")
        .and_then(|gaps| gaps.as_array())
        .unwrap_or_else(|| panic!("no gaps in {list}"));
    let end = |gap: &serde_json::Value, key: &str| lsn(gap[key].as_str().expect("a position"));
    gaps.iter()
        .inspect(|gap| assert_eq!(gap["reason"], "damaged"))
        .map(|gap| (end(gap, "from"), end(gap, "to")))
        .collect()
}

/// Also that the archiver comes back to it, and that the base backup it asks for helps; and the same by `wal push`.
#[test]
fn p3_damaged_wal_is_archived_told_and_not_planned_across() {
    let mut pg = TestPg::start_segmented(any_major(), 1, "autovacuum = off\nwal_keep_size = '100MB'\n");
    let (mut rig, pushed) = (Rig::new(&pg), Rig::new(&pg));
    pg.sql("create table t (n int)");
    rig.start_archiver();
    rig.done(&["backup"]);
    let before = pg.sql("insert into t values (0) returning pg_current_xact_id()");
    rig.wait_for(&before);
    rig.stop_archiver();
    let at = lsn(&pg.sql("select pg_current_wal_insert_lsn()"));
    pg.sql("insert into t select generate_series(1, 40000)");
    let after = pg.sql("insert into t values (-1) returning pg_current_xact_id()");
    let behind = lsn(&pg.sql("select pg_current_wal_insert_lsn()"));
    pg.sql("select pg_switch_wal()");
    ok(pg.stop(StopMode::Fast));

    // Two hundred bytes in the middle of a segment that is not streamed yet.
    let harmed = Lsn::new(at.get().next_multiple_of(SIZE) + 300_000);
    assert!(harmed < behind, "not enough WAL was written");
    let file = ok(fs::OpenOptions::new().write(true).open(segment_of(&pg, harmed)));
    ok(file.write_all_at(&[0xA5; 200], harmed.get() % SIZE));
    drop(file);
    ok(pg.start());

    let mut told = Vec::new();
    for round in 0..2 {
        rig.start_archiver();
        // What follows is archived.
        let mark = pg.sql(&format!("insert into t values ({round}) returning pg_current_wal_insert_lsn()"));
        let reached = || {
            let list = rig.run(&["list", "--json"]).stdout;
            let list: serde_json::Value = serde_json::from_str(&list).unwrap_or_default();
            list.pointer("/clusters/0/frontier").and_then(|at| at.as_str()).is_some_and(|at| lsn(at) >= lsn(&mark))
        };
        wait_until("what follows to be archived", SOON, reached);
        rig.stop_archiver();
        let found = damage(&rig);
        let (from, to) = (found[0].0, found.last().expect("damage").1);
        assert!(from <= harmed && harmed.advance(200) <= to && to < harmed.advance(30_000), "{found:?}, {harmed}");
        if round == 0 {
            let log = fs::read_to_string(rig.path("run.log")).unwrap_or_default();
            assert!(log.contains("DAMAGED WAL") && log.contains(&from.to_string()), "{from} in {log}");
            told = found;
        } else {
            assert_eq!(found, told, "another look found something else");
        }
    }
    rig.done(&["list"]).says("DAMAGED WAL on branch 00000001");
    rig.run(&["check"]).exits(1).says("is damaged, as it came from the server");
    rig.done(&["plan", "--to", &format!("xid:{before}")]);
    rig.run(&["plan", "--to", &format!("xid:{after}")]).exits(1).says("is damaged, as it came from the server");
    rig.run(&["restore", "--to", &format!("xid:{after}"), "--pgdata", "no"]).exits(1);
    assert!(!rig.path("no").exists());

    // With a base backup behind it, everything from there on is restorable.
    rig.start_archiver();
    rig.done(&["backup"]);
    let newest = pg.sql("insert into t values (-2) returning pg_current_xact_id()");
    rig.wait_for(&newest);
    rig.stop_archiver();

    // The same file by archive_command: it is taken, told and noted, once and again.
    let file = segment_of(&pg, harmed);
    for file in [&file, &file, &segment_of(&pg, Lsn::new(harmed.get() - SIZE))] {
        let run = pushed.done(&["wal", "push", file.to_str().expect("a path")]);
        assert_eq!(run.all().contains("DAMAGED WAL"), harmed.get() / SIZE == segment_number(file), "{}", run.all());
    }
    assert_eq!(damage(&pushed), told);
}

fn segment_number(file: &std::path::Path) -> u64 {
    let size = SegmentSize::new(SIZE).expect("a segment size");
    let name = file.file_name().and_then(|name| name.to_str()).expect("a name");
    SegmentNumber::from_file_name(name, size).expect("a segment").1.get()
}
