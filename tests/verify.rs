//! Verification as it is typed: what is damaged or missing is named with what it costs and where else it is, what was read is
//! remembered, and `--repair` puts back what another repository has.

mod support;

use std::fs;

use serde_json::Value;
use support::rig::{Rig, flip};
use support::{TestPg, any_major, ok};

/// A cluster with two base backups and some segments, in two repositories of one realm.
fn archived() -> (TestPg, Rig) {
    let pg = TestPg::start_segmented(any_major(), 1, "autovacuum = off");
    let mut rig = Rig::new(&pg);
    rig.add("second", true);
    rig.receives(&["main", "second"]);
    pg.sql("create table log (n int, filler text)");
    rig.start_archiver();
    let mut last = String::new();
    for round in 0..2 {
        let fill = format!("insert into log select {round}, repeat(md5(n::text), 6) from generate_series(1, 4000) n");
        pg.sql(&fill);
        rig.done(&["backup"]);
        pg.sql(&fill);
        last = pg.sql(&format!("insert into log values ({round}, 'last') returning pg_current_xact_id()"));
        pg.sql("select pg_switch_wal()");
    }
    rig.wait_for(last.lines().next().unwrap_or_default());
    rig.stop_archiver();
    (pg, rig)
}

fn verified(rig: &Rig, code: i32, more: &[&str]) -> Value {
    let args = [&["verify", "--repository", "main", "--json"], more].concat();
    let ran = rig.run(&args).exits(code);
    let document: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.all()));
    document["repositories"][0].clone()
}

fn findings(line: &Value) -> Vec<(String, String)> {
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let all = line["findings"].as_array().expect("findings");
    all.iter().map(|finding| (text(finding, "fault"), text(finding, "object"))).collect()
}

fn number(line: &Value, key: &str) -> u64 {
    line[key].as_u64().unwrap_or_else(|| panic!("{key} in {line:#}"))
}

#[test]
fn what_is_damaged_or_missing_is_named_remembered_and_brought_back() {
    let (_pg, rig) = archived();
    let name_of = |path: &std::path::Path| ok(path.strip_prefix(rig.path("main"))).to_string_lossy().into_owned();

    // Listings alone: all is there, and nothing was opened.
    let listed = verified(&rig, 0, &[]);
    assert!(number(&listed, "objects") > 6 && number(&listed, "backups") == 2, "{listed:#}");
    assert_eq!(number(&listed, "unread_objects"), number(&listed, "objects"));
    rig.done(&["list"]).says("names and lengths alone");

    // A budget reads a part, and the next run goes on with the rest.
    let total = number(&listed, "bytes");
    let part = verified(&rig, 0, &["--objects", "--budget", &(total / 2).to_string()]);
    assert!(number(&part, "read_bytes") <= total / 2 && number(&part, "unread_objects") > 0, "{part:#}");
    let rest = verified(&rig, 0, &["--objects", "--budget", &(total / 2).to_string()]);
    assert!(number(&rest, "unread_objects") < number(&part, "unread_objects"), "{rest:#}");
    let all = verified(&rig, 0, &["--objects"]);
    assert_eq!(number(&all, "unread_objects"), 0, "{all:#}");
    assert!(all["whole_since"].is_string(), "{all:#}");
    rig.done(&["list"]).says("every object was found whole since");
    let list = rig.json(&["list", "--json", "--repository", "main"]);
    assert_eq!(list["clusters"][0]["verified"]["unread_objects"], 0);

    // One byte in a pack, one in WAL: listings do not show it, opening does.
    let packs = rig.objects("main", &["/pack/"]);
    let segments = rig.objects("main", &["/wal/0"]);
    let (pack, segment) = (packs[0].clone(), segments[segments.len() - 2].clone());
    flip(&pack, |len| len / 2);
    flip(&segment, |len| len / 2);
    verified(&rig, 0, &[]);
    let damaged = verified(&rig, 1, &["--objects"]);
    let mut found = findings(&damaged);
    found.sort();
    let mut want = vec![("damaged".to_owned(), name_of(&pack)), ("damaged".to_owned(), name_of(&segment))];
    want.sort();
    assert_eq!(found, want, "{damaged:#}");
    for (finding, elsewhere) in
        damaged["findings"].as_array().unwrap().iter().zip(damaged["elsewhere"].as_array().unwrap())
    {
        assert!(!finding["instants"].as_array().unwrap().is_empty(), "{finding:#}");
        assert_eq!(elsewhere, &serde_json::json!(["second"]), "{finding:#}");
    }
    let of_pack =
        damaged["findings"].as_array().unwrap().iter().find(|one| one["object"].as_str() == Some(&name_of(&pack)));
    assert!(!of_pack.unwrap()["backups"].as_array().unwrap().is_empty(), "{of_pack:?}");
    // It stays known without being read again, and is said in words.
    let later = rig.run(&["verify", "--repository", "main"]).exits(1);
    let later = later.says("DAMAGED").says("cannot be restored: branch 00000001").says("it is also in second");
    assert!(later.all().contains(&name_of(&segment)));
    rig.done(&["list", "--repository", "main"]).says("DAMAGE").says("2 findings");

    // A segment and a pack that are gone: listings show them.
    let (lost_pack, lost_segment) = (packs[1].clone(), segments[segments.len() - 4].clone());
    ok(fs::remove_file(&lost_pack));
    ok(fs::remove_file(&lost_segment));
    let missing = verified(&rig, 1, &[]);
    let missing = findings(&missing);
    assert!(missing.contains(&("missing".to_owned(), name_of(&lost_pack))), "{missing:?}");
    assert!(missing.contains(&("hole".to_owned(), name_of(&lost_segment))), "{missing:?}");
    assert_eq!(missing.len(), 4, "{missing:?}");

    // Back from the second repository: copies beside what is damaged, nothing replaced.
    let before = fs::read(&pack).expect("the damaged pack");
    let repaired = verified(&rig, 0, &["--repair"]);
    assert_eq!(repaired["repaired"].as_array().map(Vec::len), Some(4), "{repaired:#}");
    assert_eq!(fs::read(&pack).expect("the damaged pack"), before, "nothing is replaced");
    assert!(lost_pack.exists() && lost_segment.exists());
    let copies = rig.objects("main", &["~"]);
    assert_eq!(copies.len(), 2, "{copies:?}");
    let whole = verified(&rig, 0, &["--objects"]);
    assert_eq!(number(&whole, "unread_objects"), 0, "{whole:#}");
    assert_eq!(whole["remarks"].as_array().map(Vec::len), Some(2), "the damaged ones are still told: {whole:#}");
    // Restores read the copies, with the second repository gone.
    ok(fs::rename(rig.path("second"), rig.path("away")));
    drop(rig.restored(any_major(), "latest", "restored", &["--repository", "main"]));
}

#[test]
fn a_repository_of_another_key_is_said_and_not_copied_from() {
    let pg = TestPg::start_segmented(any_major(), 1, "autovacuum = off");
    let mut rig = Rig::new(&pg);
    rig.add("other", false);
    rig.receives(&["main", "other"]);
    rig.start_archiver();
    rig.done(&["backup"]);
    pg.sql("create table t (n int)");
    let xid = pg.sql("insert into t values (1) returning pg_current_xact_id()");
    rig.wait_for(xid.lines().next().unwrap_or_default());
    rig.stop_archiver();
    let pack = rig.objects("main", &["/pack/"]).first().expect("a pack").clone();
    flip(&pack, |len| len / 2);
    let line = verified(&rig, 1, &["--objects", "--repair"]);
    let why = line["not_repaired"][0].as_str().unwrap_or_default().to_owned();
    assert!(why.contains("another key"), "{line:#}");
    assert!(rig.objects("main", &["~"]).is_empty());
    rig.run(&["verify", "--rate", "1MB"]).exits(2); // without --objects there is nothing to slow down
}
