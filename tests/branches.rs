//! Several histories under one timeline number, failovers, and gaps that mend themselves: `pgkeep run` against real
//! servers, and what is restored of each history.

mod support;

use pgkeep::pg::instance::StopMode;
use serde_json::Value;
use support::archiver::{copy_of, standby_of};
use support::rig::{Rig, SOON, dump, next_second};
use support::{TestPg, any_major, wait_until};

/// Adds a row and says which transaction that was.
fn add(pg: &TestPg, row: &str) -> String {
    pg.sql(&format!("INSERT INTO t VALUES ('{row}') RETURNING txid_current()"))
        .lines()
        .next()
        .unwrap()
        .trim()
        .to_owned()
}

fn rows(pg: &TestPg) -> String {
    pg.sql("SELECT string_agg(v, ' ' ORDER BY v) FROM t")
}

/// The branches of the base backups, oldest first.
fn backups(rig: &Rig) -> Vec<String> {
    let list = rig.json(&["list", "--json"]);
    let backups = list["clusters"][0]["backups"].as_array().cloned().unwrap_or_default();
    backups.iter().filter_map(|backup| Some(backup["branch"].as_str()?.to_owned())).collect()
}

/// The branches that hold WAL.
fn branches(rig: &Rig) -> Vec<String> {
    let list = rig.json(&["list", "--json"]);
    let branches = list["clusters"][0]["branches"].as_array().cloned().unwrap_or_default();
    let with_wal = branches.iter().filter(|branch| branch["runs"].as_array().is_some_and(|runs| !runs.is_empty()));
    with_wal.filter_map(|branch| Some(branch["branch"].as_str()?.to_owned())).collect()
}

#[track_caller]
fn wait_for_backup(rig: &Rig, branch: &str) {
    let there = || backups(rig).iter().any(|of| of == branch);
    let since = std::time::Instant::now();
    while !there() {
        assert!(since.elapsed() < SOON, "no base backup of {branch}: {:?}\n{}", backups(rig), rig.log());
    }
}

/// A server with a table and a base backup, archived and stopped; the archiver is stopped, too.
fn archived(conf: &str) -> (TestPg, Rig) {
    let mut pg = TestPg::start(any_major(), &format!("wal_keep_size = 1GB\n{conf}"));
    let mut rig = Rig::new(&pg);
    pg.sql("CREATE TABLE t (v text)");
    rig.start_archiver();
    rig.done(&["backup"]);
    let xid = add(&pg, "common");
    rig.wait_for(&xid);
    rig.stop_archiver();
    pg.stop(StopMode::Fast).unwrap();
    (pg, rig)
}

/// A server is put back to an older copy of itself and goes on under the same numbers: both histories are archived, kept
/// apart, and restored.
#[test]
fn p6_a_server_that_was_rolled_back_goes_on_as_a_branch_of_its_own() {
    let installation = any_major();
    let (mut pg, mut rig) = archived("");
    let copy = copy_of(&pg, "copy");
    pg.start().unwrap();
    rig.start_archiver();
    let xid = add(&pg, "first");
    rig.wait_for(&xid);
    rig.stop_archiver();
    let first = dump(&pg);
    pg.stop(StopMode::Immediate).unwrap();
    let held = rig.objects("main", &["/wal/00000001/"]);

    let mut rolled_back = TestPg::attach(installation, &copy);
    rolled_back.start().unwrap();
    rig.follow(&rolled_back.conninfo());
    rig.start_archiver();
    add(&rolled_back, "second");
    wait_for_backup(&rig, "00000001.1");
    let xid = add(&rolled_back, "third");
    rig.wait_for_on(&xid, "1.1");
    let second = dump(&rolled_back);
    assert!(rig.log().contains("is archived as branch 00000001.1"), "{}", rig.log());
    rig.stop_archiver();
    assert_eq!(branches(&rig), ["00000001", "00000001.1"]);
    let still = rig.objects("main", &["/wal/00000001/"]);
    assert!(held.iter().all(|object| still.contains(object)), "the old branch stays as it was");

    // Started again it finds itself, and begins nothing.
    rig.start_archiver();
    let xid = add(&rolled_back, "fourth");
    rig.wait_for_on(&xid, "00000001.1");
    rig.stop_archiver();
    assert_eq!(branches(&rig), ["00000001", "00000001.1"]);
    assert!(!rig.log().contains("not archived"), "{}", rig.log());

    // Which one is not guessed.
    rig.run(&["plan", "--to", "latest", "--timeline", "1"]).exits(1).says("--timeline 00000001.1");
    let restored = rig.restored(installation, "latest", "one", &["--timeline", "00000001"]);
    assert_eq!((rows(&restored), dump(&restored)), ("common first".to_owned(), first));
    drop(restored);
    let third = format!("xid:{}", rolled_back.sql("SELECT min(xmin::text::int) FROM t WHERE v = 'third'"));
    let restored = rig.restored(installation, &third, "two", &["--timeline", "1.1"]);
    assert_eq!((rows(&restored), dump(&restored)), ("common second third".to_owned(), second));
}

/// Two copies of one server become timeline 2 each on its own, and the second one has a child. Each is recognised whenever
/// it comes back, and each can be restored through the fork from the parent's base backup or from its own.
#[test]
fn p6_two_restores_under_one_timeline_are_two_branches() {
    let installation = any_major();
    let (pg, mut rig) = archived("");
    let promoted = |name: &str| {
        let copy = copy_of(&pg, name);
        std::fs::write(copy.join("standby.signal"), "").unwrap();
        let mut copy = TestPg::attach(installation, &copy);
        copy.start().unwrap();
        copy.promote().unwrap();
        copy
    };
    let (first, mut second) = (promoted("one"), promoted("another"));
    let archive = |rig: &mut Rig, pg: &TestPg, row: &str, timeline: &str| {
        rig.follow(&pg.conninfo());
        rig.start_archiver();
        let xid = add(pg, row);
        if timeline == "2.1" {
            wait_for_backup(rig, "00000002.1");
        }
        rig.wait_for_on(&xid, timeline);
        rig.stop_archiver();
    };
    archive(&mut rig, &first, "a1", "2");
    archive(&mut rig, &second, "b1", "2.1");
    assert_eq!(branches(&rig), ["00000001", "00000002", "00000002.1"]);
    archive(&mut rig, &first, "a2", "00000002");
    // What the other one wrote, and how far, is no lag of this one.
    let check = rig.json(&["check", "--json"])["items"].clone();
    let archived = check.as_array().and_then(|items| items.iter().find(|item| item["item"] == "archived")).cloned();
    assert!(archived.as_ref().is_some_and(|item| item["state"] == "ok"), "{check}");
    archive(&mut rig, &second, "b2", "2.1");
    assert_eq!(branches(&rig), ["00000001", "00000002", "00000002.1"], "both were recognised");

    // The second one's child knows whose child it is.
    second.stop(StopMode::Fast).unwrap();
    std::fs::write(second.data_dir().join("standby.signal"), "").unwrap();
    second.start().unwrap();
    second.promote().unwrap();
    archive(&mut rig, &second, "b3", "3");
    assert_eq!(branches(&rig), ["00000001", "00000002", "00000002.1", "00000003"]);

    let b = dump(&second);
    rig.run(&["plan", "--to", "latest", "--timeline", "2"]).exits(1).says("--timeline 00000002.1");
    let restored = rig.restored(installation, "latest", "of-child", &[]);
    assert_eq!((rows(&restored), dump(&restored)), ("b1 b2 b3 common".to_owned(), b));
    drop(restored);
    // From the base backup that was taken before they parted.
    let list = rig.json(&["list", "--json"]);
    let oldest = list["clusters"][0]["backups"][0]["label"].as_str().unwrap().to_owned();
    let restored = rig.restored(installation, "latest", "from-parent", &["--timeline", "2.1", "--backup", &oldest]);
    assert_eq!(rows(&restored), "b1 b2 common");
}

/// The slot lost WAL that was not archived: `pgkeep run` says so, makes the slot anew, takes a base backup, and everything
/// behind it can be restored. What lies in the hole is refused, and shown with its cause.
#[test]
fn p3_a_gap_is_recorded_shown_and_mended_by_a_base_backup() {
    let installation = any_major();
    let conf = "max_slot_wal_keep_size = 2MB\nmin_wal_size = 2MB\nmax_wal_size = 8MB\n";
    let pg = TestPg::start_segmented(installation, 1, conf);
    let mut rig = Rig::new(&pg);
    pg.sql("CREATE TABLE t (v text)");
    rig.start_archiver();
    rig.done(&["backup"]);
    let before = add(&pg, "before");
    rig.wait_for(&before);
    rig.done(&["list", "--gaps"]).says("No WAL is missing");
    rig.stop_archiver();
    let lost = add(&pg, "lost");
    for _ in 0..6 {
        pg.sql("CREATE TABLE filler AS SELECT g, repeat('x', 400) FROM generate_series(1, 9000) g");
        pg.sql("DROP TABLE filler; CHECKPOINT");
    }
    let status = pg.sql("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'pgkeep'");
    assert!(status == "lost" || status == "unreserved", "the slot should have lost WAL: {status}");

    rig.start_archiver();
    wait_until("a second base backup", SOON, || backups(&rig).len() == 2);
    let after = add(&pg, "after");
    rig.wait_for(&after);
    rig.done(&["list", "--gaps"]).says("slot was lost");
    let holes = rig.json(&["list", "--gaps", "--json"])["clusters"][0]["holes"].clone();
    assert_eq!(holes.as_array().map(Vec::len), Some(1), "{holes}");
    assert_eq!(holes[0]["reason"], Value::from("slot-lost"));
    assert_eq!(pg.sql("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'pgkeep'"), "reserved");
    let check = rig.json(&["check", "--json"])["items"].clone();
    let state = |item: &str| {
        check.as_array().unwrap().iter().find(|line| line["item"] == item).map(|line| line["state"].clone())
    };
    assert_eq!((state("WAL"), state("older WAL")), (Some("ok".into()), Some("warn".into())), "{check}");
    rig.stop_archiver();

    rig.run(&["plan", "--to", &format!("xid:{lost}")]).exits(1);
    let restored = rig.restored(installation, "latest", "new", &[]);
    assert_eq!(rows(&restored), "after before lost");
    drop(restored);
    let restored = rig.restored(installation, &format!("xid:{before}"), "old", &[]);
    assert_eq!(rows(&restored), "before");
}

/// A connection string with both hosts: the primary is killed, the standby promoted, and archiving goes on there.
#[test]
fn a_failover_is_followed_by_a_connection_string_with_several_hosts() {
    let installation = any_major();
    let mut pg = TestPg::start(installation, "wal_keep_size = 1GB\n");
    let mut standby = standby_of(&pg, installation);
    let mut rig = Rig::new(&pg);
    let part = |pg: &TestPg, word: &str| {
        let conninfo = pg.conninfo();
        let value = conninfo.split_whitespace().find_map(|part| part.strip_prefix(&format!("{word}=")));
        value.unwrap_or_else(|| panic!("no {word} in {conninfo}")).trim_matches('\'').to_owned()
    };
    let both = |word| format!("{word}={},{}", part(&standby, word), part(&pg, word));
    rig.follow(&format!(
        "{} {} user={} target_session_attrs=read-write",
        both("host"),
        both("port"),
        part(&pg, "user")
    ));
    pg.sql("CREATE TABLE t (v text)");
    rig.start_archiver();
    rig.done(&["backup"]);
    let xid = add(&pg, "primary");
    rig.wait_for(&xid);
    let to = pg.sql("SELECT pg_current_wal_flush_lsn()");
    let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{to}'");
    wait_until("the standby to replay", SOON, || standby.sql(&replayed) == "t");
    pg.kill().unwrap();
    standby.promote().unwrap();
    let xid = add(&standby, "standby");
    rig.wait_for(&xid);
    next_second(&standby);
    rig.stop_archiver();
    rig.done(&["list", "--gaps"]).says("No WAL is missing");
    assert_eq!(branches(&rig), ["00000001", "00000002"]);
    assert_eq!(backups(&rig).len(), 1, "the parent's base backup leads there");
    let there = dump(&standby);
    for (number, timeline) in ["latest", "2"].into_iter().enumerate() {
        rig.done(&["plan", "--to", "latest", "--timeline", timeline]);
        if number == 0 {
            let restored = rig.restored(installation, "latest", "both", &["--timeline", timeline]);
            assert_eq!((rows(&restored), dump(&restored)), ("primary standby".to_owned(), there.clone()));
        }
    }
    rig.done(&["plan", "--to", "latest", "--timeline", "current"]);
    let xid = format!("xid:{xid}");
    rig.run(&["plan", "--to", &xid, "--timeline", "current"]).exits(1);
}
