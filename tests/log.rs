//! `pgkeep log`: a table is dropped, the moment is found, and a restore stops just before it. By the program as it is typed.
//! And what `pgkeep plan` says of a restore point that lies before it.

mod support;

use std::fs;
use std::time::Duration;

use pgkeep::catalog::index::{IndexNote, IndexWriter};
use pgkeep::pg::instance::give_to_server_user;
use pgkeep::types::{Branch, TimelineId};
use serde_json::Value;
use support::rig::{Rig, flip, next_second};
use support::{TestPg, any_major, ok, wait_until};

const SOON: Duration = Duration::from_secs(120);

fn transactions(document: &Value) -> Vec<Value> {
    document["transactions"].as_array().unwrap_or_else(|| panic!("{document:#}")).clone()
}

fn only(rig: &Rig, args: &[&str]) -> Value {
    let document = rig.json(&[&["log", "--repository", "main", "--json"], args].concat());
    let found = transactions(&document);
    assert_eq!(found.len(), 1, "{args:?}: {document:#}");
    found[0].clone()
}

fn names(transaction: &Value) -> Vec<String> {
    let relations = transaction["relations"].as_array().expect("relations").iter();
    relations.filter_map(|relation| Some(relation["name"]["name"].as_str()?.to_owned())).collect()
}

/// Puts in the place of the first index what the version before would have made: it tells no landmarks.
fn put_older(rig: &Rig) {
    let (main, cluster, branch) = (rig.open("main"), rig.cluster(), Branch::first(TimelineId::FIRST));
    rig.block_on(async {
        let range = ok(main.list_indexes(&cluster, branch).await).remove(0);
        let (file, note) = (ok(main.get_index(&range).await), ok(main.index_note(&range).await));
        let mut writer = IndexWriter::new(file.from);
        file.ended().chain(file.open()).for_each(|entry| writer.push(&file.part(&ok(entry))));
        let (mut bytes, _) = writer.finish(file.to, file.major, note.newest_xid);
        bytes.truncate(bytes.len() - 2);
        bytes[0] = 1;
        let range = format!("{:016X}-{:016X}", range.from.get(), range.to.get());
        rig.objects("main", &["index", &range]).into_iter().for_each(|object| ok(fs::remove_file(object)));
        let note = IndexNote { restore_points: None, parameter_changes: None, ..note };
        assert!(ok(main.put_index(&cluster, branch, &bytes, &note).await));
    });
    ok(give_to_server_user(rig.dir.path()));
}

/// Everything that is there, without what depends on how it was found.
fn everything(rig: &Rig, repository: &str) -> (Vec<Value>, Value) {
    let document =
        rig.json(&["log", "--repository", repository, "--cluster", "main", "--json", "--aborted", "--limit", "100000"]);
    (transactions(&document), document)
}

#[test]
fn a_dropped_table_is_found_and_restored() {
    let installation = any_major();
    let conf = "autovacuum = off\nmax_prepared_transactions = 2\n";
    let pg = TestPg::start_segmented(installation, 64, conf);
    let mut rig = Rig::new(&pg);
    rig.start_archiver();
    pg.sql("CREATE TABLE orders (n int PRIMARY KEY, note text); CREATE TABLE lines (n int)");
    pg.sql("INSERT INTO orders SELECT i, repeat('x', 3000) || i FROM generate_series(1, 40) i");
    // A transaction that begins in one range and ends in another: the backup switches to the next segment.
    let session = ["BEGIN", "INSERT INTO lines VALUES (4)", "SAVEPOINT a", "INSERT INTO lines VALUES (5)"];
    let arguments = session.iter().chain(&["PREPARE TRANSACTION 'across'"]).flat_map(|one| ["-c", one]);
    pg.tool("psql", &["-X", "-q", "-d", "postgres"].into_iter().chain(arguments).collect::<Vec<_>>());
    // The backup notes what the relations are called.
    rig.done(&["backup", "--checkpoint", "fast"]);
    next_second(&pg);
    let insert =
        pg.sql("WITH x AS (INSERT INTO lines VALUES (1), (2), (3) RETURNING 1) SELECT txid_current() FROM x LIMIT 1");
    let file = pg.sql(
        "SELECT d.dattablespace || '/' || d.oid || '/' || pg_relation_filenode('orders') FROM pg_database d \
                       WHERE datname = 'postgres'",
    );
    let before = pg.sql("SELECT to_json(clock_timestamp())").replace('"', "");
    pg.sql("SELECT pg_create_restore_point('before drop')");
    pg.sql("DROP TABLE orders");
    let after = pg.sql("SELECT to_json(clock_timestamp())").replace('"', "");
    pg.sql("CREATE TABLE later (n int); INSERT INTO later VALUES (1)");
    pg.sql("SELECT pg_switch_wal()");
    pg.sql("COMMIT PREPARED 'across'");
    let last = pg.sql("WITH x AS (INSERT INTO lines VALUES (6) RETURNING 1) SELECT txid_current() FROM x");
    rig.wait_for(&last);
    // It is made while WAL streams by, beside the way of what is acknowledged.
    wait_until("the index of the first segment", SOON, || !rig.objects("main", &["index"]).is_empty());
    rig.stop_archiver();

    let drop = only(&rig, &["--relation", "public.orders", "--kind", "drop,truncate"]);
    assert!(names(&drop).contains(&"orders".to_owned()), "{drop:#}");
    assert_eq!(drop["kinds"], serde_json::json!(["drop", "ddl"]));
    for args in [
        vec!["--relation", &file, "--kind", "drop"],
        vec!["--from", &before, "--to", &after],
        vec!["--xid", &drop["xid"].to_string()],
        vec!["--around", &before, "--limit", "1", "--kind", "drop"],
        vec!["--relation", "postgres.public.orders", "--from", &before],
    ] {
        assert_eq!(only(&rig, &args), drop, "{args:?}");
    }
    let inserted = only(&rig, &["--xid", &insert]);
    assert_eq!((&inserted["kinds"], names(&inserted)), (&serde_json::json!(["insert"]), vec!["lines".to_owned()]));
    assert_eq!(inserted["relations"][0]["inserts"], 3);
    // Put together from two ranges, with what its subtransaction did.
    let across =
        transactions(&rig.json(&["log", "--repository", "main", "--json", "--relation", "lines", "--limit", "2"]));
    assert_eq!((&across[0]["prepared"], &across[0]["relations"][0]["inserts"]), (&Value::Bool(true), &Value::from(2)));
    let text = rig.done(&["log", "--repository", "main", "--from", &before]).stdout;
    assert!(text.contains("public.orders in postgres: dropped"), "{text}");
    rig.run(&["log", "--repository", "main", "--relation", "public.nowhere"]).exits(1).says("no relation called");
    rig.run(&["log", "--repository", "main", "--xid", "1"]).exits(1).says("Nothing is");
    rig.run(&["log", "--repository", "main", "--timeline", "7"]).exits(2).says("there is no WAL of branch 00000007");

    // A restore point is no transaction; it is found, and `plan` says where it is and what a restore to it takes.
    let landmarks = |kind: &str| rig.json(&["log", "--repository", "main", "--json", "--kind", kind]);
    let points = landmarks("restore-point");
    let point = points["restore_points"][0].clone();
    assert_eq!(
        (&point["name"], &points["transactions"]),
        (&"before drop".into(), &serde_json::json!([])),
        "{points:#}"
    );
    let parameters = landmarks("parameters");
    assert_eq!(parameters["parameter_changes"][0]["parameters"]["max_prepared_transactions"], 2, "{parameters:#}");
    let all = rig.done(&["log", "--repository", "main", "--from", &before, "--timeline", "1"]).stdout;
    let [named, dropped] = ["restore point \"before drop\"", "public.orders in postgres: dropped"].map(|t| all.find(t));
    assert!(named.is_some() && named < dropped, "{all}");
    for to in ["name:before drop", point["restore_arguments"].as_str().and_then(|a| a.strip_prefix("--to ")).unwrap()] {
        let document = rig.json(&["plan", "--repository", "main", "--json", "--to", to]);
        let plan = &document["plan"];
        assert_eq!((&plan["stop"]["record"], &plan["stop"]["inclusive"]), (&point["lsn"], &true.into()), "{plan:#}");
        assert_eq!(plan["located"]["lsn"] == point["lsn"], to.starts_with("name:"), "{plan:#}");
        assert_eq!(plan["first_excluded"]["xid"], drop["xid"]);
        assert!(plan["proof"]["base_objects_opened"].as_u64() > Some(2) && plan["keys"][0].is_string(), "{plan:#}");
        assert_eq!(plan["proof"]["wal_bytes_checked"], plan["fetch"]["wal_bytes"]);
        assert!(plan["estimate"]["measured"]["bytes"].as_u64() > Some(1 << 20), "{plan:#}");
    }
    let told = rig.run(&["plan", "--repository", "main", "--to", "name:never made"]).exits(1);
    assert!(told.all().contains("by the index: \"before drop\""), "{}", told.all());

    // The index says what the WAL says; one that is damaged is passed over and made again.
    let (with_index, document) = everything(&rig, "main");
    assert!(document["indexed_bytes"].as_u64() >= Some(64 << 20), "{}", document["indexed_bytes"]);
    let object = rig.objects("main", &["index"])[0].clone();
    flip(&object, |len| len / 2);
    let (around_damage, document) = everything(&rig, "main");
    assert_eq!(around_damage, with_index);
    assert_eq!(document["remarks"].as_array().map(Vec::len), Some(1), "{}", document["remarks"]);
    let rebuilt = rig.json(&["index", "rebuild", "--repository", "main", "--all", "--json"]);
    assert_eq!(rebuilt["repositories"][0]["ranges"], 1, "{rebuilt:#}");
    let (mended, document) = everything(&rig, "main");
    assert_eq!((mended, &document["remarks"]), (with_index.clone(), &serde_json::json!([])));
    // One of the version before is read, but for what it does not tell; it can be made anew.
    put_older(&rig);
    assert_eq!(everything(&rig, "main").0, with_index);
    let older = landmarks("restore-point");
    assert_eq!(older["restore_points"], points["restore_points"]);
    assert!(older["wal_bytes_read"].as_u64() > Some(0) && older["remarks"][0].is_string(), "{older:#}");
    rig.done(&["index", "rebuild", "--repository", "main", "--all"]);
    let anew = landmarks("restore-point");
    assert_eq!(
        (&anew["restore_points"], &anew["remarks"]),
        (&points["restore_points"], &serde_json::json!([])),
        "{anew:#}"
    );
    for object in rig.objects("main", &["index"]) {
        ok(fs::remove_file(object));
    }
    let (without, document) = everything(&rig, "main");
    assert_eq!((without, &document["indexed_bytes"]), (with_index.clone(), &Value::from(0)));
    let rebuilt = rig.json(&["index", "rebuild", "--repository", "main", "--json"]);
    assert_eq!(rebuilt["repositories"][0]["left"], serde_json::json!([]), "{rebuilt:#}");
    assert_eq!(everything(&rig, "main").0, with_index);
    assert_eq!(rig.json(&["index", "rebuild", "--repository", "main", "--json"])["repositories"][0]["ranges"], 0);

    // `archive_command` indexes what it brings.
    rig.add("second", true);
    rig.receives(&["second"]);
    // The backup switched twice: at its start and at its end.
    for segment in ["000000010000000000000001", "000000010000000000000002", "000000010000000000000003"] {
        let mut push = rig.command(&["wal", "push", &format!("pg_wal/{segment}")]);
        push.current_dir(pg.data_dir());
        support::rig::ran(push).exits(0);
    }
    let indexed = || rig.objects("second", &["index"]).len() == 3;
    wait_until("three segments are indexed", Duration::from_secs(60), indexed);
    let (pushed, _) = everything(&rig, "second");
    assert!(pushed.iter().any(|transaction| transaction["xid"] == drop["xid"]) && pushed.len() < with_index.len());

    // The argument that was shown stops just before it.
    rig.receives(&["main"]);
    let arguments = drop["restore_arguments"].as_str().expect("arguments").split(' ').collect::<Vec<_>>();
    assert_eq!((arguments[0], arguments[2]), ("--to", "--exclusive"));
    // Promoted: a server that pauses there still holds the lock of the transaction that drops the table.
    let more = [arguments[2], "--repository", "main", "--action", "promote"];
    rig.restore(arguments[1], "restored", &more).exits(0);
    let mut restored = TestPg::attach(installation, &rig.path("restored"));
    restored.set("fsync=off"); // else the server syncs every file when it starts
    ok(restored.start());
    wait_until("the promotion", SOON, || restored.sql("SELECT pg_is_in_recovery()") == "f");
    assert_eq!(restored.sql("SELECT count(*) FROM orders"), "40");
    assert_eq!(restored.sql("SELECT count(*) FROM lines"), "3");
}
