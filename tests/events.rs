//! What was done is in the repository, chained; and what somebody does to it shows.

mod support;

use std::fs;

use pgkeep::pg::instance::StopMode;
use support::rig::{Rig, flip};
use support::{TestPg, any_major, ok, wait_until};

/// A month of an operator in a minute; then each kind of tampering, named.
#[test]
fn p4_history_is_recorded_and_tampering_shows() {
    let installation = any_major();
    let mut pg = TestPg::start_segmented(installation, 1, "autovacuum = off");
    let mut rig = Rig::new(&pg);
    rig.start_archiver();
    pg.sql("create table t (n int); insert into t select generate_series(1, 1000)");
    let soon = support::rig::SOON;
    wait_until("the stream's beginning to be noted", soon, || rig.log().contains("comes in from"));
    rig.done(&["backup"]);
    let label = rig.json(&["list", "--json"])["clusters"][0]["backups"][0]["label"].as_str().unwrap().to_owned();
    let hold = rig.json(&["hold", "add", &label, "--reason", "audit 2026", "--json"]);
    let hold = hold["holds"][0]["hold"].as_str().unwrap().to_owned();
    rig.done(&["hold", "release", &hold]);
    rig.done(&["key", "rotate"]);
    rig.stop_archiver();
    ok(pg.stop(StopMode::Immediate));
    rig.restore("latest", "restored", &[]).exits(0);

    let kinds = |events: &serde_json::Value| -> Vec<String> {
        let events = events["repositories"][0]["events"].as_array().unwrap().clone();
        events.iter().map(|event| event["event"]["kind"].as_str().unwrap_or("-").to_owned()).collect()
    };
    let all = rig.json(&["events", "--verify", "--json"]);
    let want = [
        "cluster-created",
        "stream-began",
        "backup-finished",
        "hold-added",
        "hold-released",
        "keys-rotated",
        "stream-ended",
        "restore-begun",
        "restore-finished",
    ];
    assert_eq!(kinds(&all), want, "{all:#}");
    assert_eq!(all["repositories"][0]["verified"]["findings"], serde_json::json!([]), "{all:#}");
    rig.done(&["events", "--verify"]).says("nothing is missing").says("audit 2026");
    assert!(kinds(&rig.json(&["events", "--since", "2099-01-01 00:00Z", "--json"])).is_empty());
    rig.run(&["events", "--since", "latest"]).exits(2);

    // A head from the daemon's log, kept elsewhere.
    let log = rig.log();
    let head = log.lines().rfind(|line| line.contains("event: ")).and_then(|line| {
        let (_, rest) = line.split_once("head=")?;
        Some(rest.split_whitespace().next()?.to_owned())
    });
    let head = head.unwrap_or_else(|| panic!("no head is in the log:\n{log}"));
    rig.done(&["events", "--verify", "--head", &head]).says("nothing is missing");
    let heads = all["repositories"][0]["verified"]["heads"].as_array().unwrap().clone();
    let newest = heads[0].as_str().unwrap().to_owned();

    let objects = rig.objects("main", &["/event/"]);
    assert_eq!(objects.len(), want.len());
    let of = |kind: &str| {
        let event = all["repositories"][0]["events"].as_array().unwrap().iter();
        let event = event.clone().find(|event| event["event"]["kind"] == kind).unwrap();
        let name = format!("event/{}/{:06}", event["writer"].as_str().unwrap(), event["number"].as_u64().unwrap());
        objects.iter().find(|path| path.to_string_lossy().ends_with(&name)).unwrap().clone()
    };
    let fails = |words: &str| {
        let ran = rig.run(&["events", "--verify"]).exits(1).says("NOT FIT");
        ran.says(words)
    };
    let removed = |path: &std::path::Path| {
        let bytes = ok(fs::read(path));
        ok(fs::remove_file(path));
        bytes
    };
    let put_back = |path: &std::path::Path, bytes: &[u8]| {
        ok(fs::write(path, bytes));
        ok(pgkeep::pg::instance::give_to_server_user(rig.dir.path()));
    };
    // Removed: the hold was never made, says whoever removes it.
    let added = of("hold-added");
    let bytes = removed(&added);
    fails("REMOVED: event 1");
    put_back(&added, &bytes);
    // Changed.
    let changed = of("backup-finished");
    flip(&changed, |len| len / 2);
    fails("CHANGED: event").says("does not open");
    flip(&changed, |len| len / 2);
    // Reordered: two of one writer exchanged.
    let (one, other) = (of("stream-began"), of("stream-ended"));
    let (first, second) = (removed(&one), removed(&other));
    put_back(&one, &second);
    put_back(&other, &first);
    fails("REORDERED");
    ok(fs::remove_file(&one));
    ok(fs::remove_file(&other));
    put_back(&one, &first);
    put_back(&other, &second);
    rig.done(&["events", "--verify"]);
    // Set back to before the restore: whole in itself, and not against what was kept outside.
    let after = [of("restore-begun"), of("restore-finished")].map(|path| removed(&path));
    assert_eq!(after.len(), 2);
    rig.done(&["events", "--verify"]).says("nothing is missing");
    rig.run(&["events", "--head", &newest]).exits(1).says("ROLLED BACK");
    rig.done(&["events", "--head", &head]);
    rig.run(&["events", "--head", "nonsense"]).exits(2);
    // Expiry and its picture of the repository know them.
    assert!(rig.run(&["list"]).exits(0).all().find("unknown").is_none());
}
