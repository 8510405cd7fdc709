//! Retention with a real server: old base backups go and their space comes back, and both ends of the window are restored.
//!
//! Days are made by dates: base backups are taken in this process with a clock in the past, and what was archived
//! meanwhile gets that age.

mod support;

use std::fs::{self, File};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::{SignedDuration, Timestamp};
use pgkeep::backup::{BackupOptions, BackupProgress, backup};
use pgkeep::catalog::{Repository, Usage};
use pgkeep::pg::instance::{StopMode, give_to_server_user};
use pgkeep::seal::KeyFile;
use pgkeep::store::fs::FsStore;
use support::backups::{DEADLINE, name, soon, source_of};
use support::rig::Rig;
use support::{TestPg, any_major, ok, wait_until};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const HOUR: u64 = 3600;

/// Everything that lies there with one of these words and is younger gets this age.
fn age(rig: &Rig, words: &[&str], hours: u64) {
    let then = SystemTime::now() - Duration::from_secs(hours * HOUR);
    for path in rig.objects("main", words) {
        let Ok(file) = File::open(&path) else { continue }; // swept in this moment
        if ok(ok(file.metadata()).modified()) > then {
            ok(file.set_modified(then));
        }
    }
}

/// A base backup as it would have been taken so many hours ago.
fn taken(rig: &Rig, pg: &TestPg, hours: u64) -> String {
    let key = ok(KeyFile::read(&ok(fs::read(rig.path("main.key"))), None));
    let back = SignedDuration::from_hours(hours as i64);
    let usage = Usage { clock: Arc::new(move || Timestamp::now() - back), ..ok(Usage::new()) };
    let manifest = rig.block_on(async {
        let store = ok(FsStore::open(rig.path("main")).await);
        let repository = ok(Repository::open_for("main", Arc::new(store), key, usage).await);
        let progress = watch::Sender::new(BackupProgress::default());
        let (source, options) = (source_of(pg), BackupOptions::default());
        ok(soon(backup(&source, &repository, &name(), &options, &progress, CancellationToken::new())).await)
    });
    ok(give_to_server_user(rig.dir.path()));
    manifest.backup.label.to_string()
}

fn labels(rig: &Rig) -> Vec<String> {
    let list = rig.json(&["list", "--json"]);
    let backups = list["clusters"][0]["backups"].as_array().expect("backups").clone();
    backups.iter().map(|backup| backup["label"].as_str().unwrap().to_owned()).collect()
}

fn bytes(rig: &Rig) -> u64 {
    let of = |words: &[&str]| rig.objects("main", words).iter().map(|path| ok(fs::metadata(path)).len()).sum::<u64>();
    of(&["/pack/"]) + of(&["/wal/"]) + of(&["/backup/"])
}

#[test]
fn p5_old_backups_go_and_both_ends_of_the_window_are_restored() {
    let installation = any_major();
    let mut pg = TestPg::start_segmented(installation, 1, "autovacuum = off");
    let mut rig = Rig::new(&pg);
    let config = ok(fs::read_to_string(rig.path("pgkeep.toml")));
    ok(fs::write(rig.path("pgkeep.toml"), config + "keep = { window = \"3d\", at_least = 1 }\n"));
    pg.sql("create table log (day int, filler text)");
    rig.start_archiver();
    // Days ago: two that go, one of them held, one that goes, the base of the window, and one within it.
    let (mut taken_at, mut xids) = (Vec::new(), Vec::new());
    for days in [20, 12, 6, 4, 2] {
        let xid = pg.sql(&format!(
            "insert into log select {days}, repeat(md5(n::text), 6) from generate_series(1, 3000) n; \
             select pg_current_xact_id()"
        ));
        let xid = xid.lines().last().unwrap_or_default().to_owned();
        pg.sql("select pg_switch_wal()");
        // The archiver's user makes the cluster's folder; this process may be another one.
        wait_until("WAL to be archived", DEADLINE, || !rig.objects("main", &["/wal/"]).is_empty());
        taken_at.push(taken(&rig, &pg, days * 24));
        let xid_after = pg.sql(&format!("insert into log values ({days}, 'after') returning pg_current_xact_id()"));
        pg.sql("select pg_switch_wal()");
        rig.wait_for(xid_after.lines().next().unwrap_or(&xid));
        xids.push(xid_after.lines().next().unwrap_or(&xid).to_owned());
        // What was archived since has that age; the tail gets younger again with the next commit.
        age(&rig, &[], days * 24 - 1);
    }
    let [oldest, held, middle, base, newest] = taken_at.as_slice() else { panic!("{taken_at:?}") };
    rig.done(&["hold", "add", held, "--reason", "audit 2026"]).says(held);
    rig.done(&["hold", "list"]).says("audit 2026");

    let before = bytes(&rig);
    let dry = rig.json(&["expire", "--dry-run", "--json"]);
    let dry = &dry["repositories"][0];
    let goes = |label: &String| {
        let backups = dry["backups"].as_array().unwrap();
        let of = backups.iter().find(|backup| backup["label"].as_str() == Some(label)).expect("a backup");
        of["goes"].as_bool().unwrap()
    };
    assert_eq!(taken_at.iter().map(goes).collect::<Vec<_>>(), [true, false, true, false, false], "{dry:#}");
    assert!(dry["frees"].as_u64() > Some(0) && dry["blocked"].as_array().unwrap().is_empty(), "{dry:#}");
    assert_eq!(bytes(&rig), before, "--dry-run changes nothing");
    rig.done(&["expire", "--explain", base]).says("the window on branch 00000001 is reached from it");
    rig.done(&["expire", "--explain", oldest]).says("no rule keeps it");
    rig.run(&["expire", "--explain", "20200101T000000Z"]).exits(1);

    // Condemned, while a base backup runs.
    let mut running = rig.command(&["backup", "--json"]);
    let running = ok(running.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn());
    rig.done(&["expire"]).says("2 condemned");
    let running = ok(running.wait_with_output());
    assert!(running.status.success(), "{}", String::from_utf8_lossy(&running.stderr));
    rig.done(&["list"]).says("condemned").says("held by");
    assert_eq!(labels(&rig).len(), 6);
    rig.done(&["expire", "--explain", middle]).says("its manifest goes after");
    // A day later the manifests go, and another day later what they named.
    age(&rig, &["/expire/"], 25);
    rig.done(&["expire"]).says("2 manifests of base backups removed");
    assert!(!labels(&rig).contains(oldest) && !labels(&rig).contains(middle));
    assert!(!rig.objects("main", &["/pack/", oldest]).is_empty(), "packs stay another day");
    age(&rig, &["/expire/"], 25);
    let then = bytes(&rig);
    rig.done(&["expire"]);
    let left = bytes(&rig);
    assert!(left + dry["frees"].as_u64().unwrap() / 2 < then, "{left} of {then} bytes are left: {}", dry["frees"]);
    let stays = labels(&rig);
    assert!(stays.contains(held) && stays.contains(base) && stays.contains(newest) && stays.len() == 4, "{stays:?}");
    assert!(rig.objects("main", &["/expire/"]).is_empty(), "the records go last");
    let shared =
        |path: &std::path::PathBuf| ["files-", "tags-"].iter().any(|kind| path.to_string_lossy().contains(kind));
    assert!(rig.objects("main", &["/backup/", oldest]).iter().all(shared), "only what others name is left of it");
    rig.done(&["expire", "--dry-run"]).says("Frees 0");
    rig.done(&["list", "--gaps"]).says("No WAL is missing");

    // The end.
    let last = pg.sql("insert into log values (0, 'last') returning pg_current_xact_id()");
    rig.wait_for(last.lines().next().unwrap_or_default());
    rig.stop_archiver();
    ok(pg.stop(StopMode::Immediate));
    let count = |server: &TestPg, day: i32| server.sql(&format!("select count(*) from log where day = {day}"));
    {
        let server = rig.restored(installation, "latest", "end", &[]);
        assert_eq!((count(&server, 0), count(&server, 20)), ("1".to_owned(), "3001".to_owned()));
    }
    {
        // The first instant behind the window's base, which was taken before the window begins.
        let server = rig.restored(installation, &format!("xid:{}", xids[3]), "begin", &[]);
        assert_eq!((count(&server, 4), count(&server, 2)), ("3001".to_owned(), "0".to_owned()));
    }
    {
        // What is held is a point in time.
        let server = rig.restored(installation, "immediate", "held", &["--backup", held]);
        assert_eq!((count(&server, 12), count(&server, 6)), ("3000".to_owned(), "0".to_owned()));
    }
    // What is gone is refused with the reason, and not reached by something else.
    rig.run(&["plan", "--to", &format!("xid:{}", xids[0])]).exits(1);
    rig.run(&["plan", "--to", &format!("xid:{}", xids[2])]).exits(1);
    assert!(rig.objects("main", &["/lease/"]).len() <= 3, "a lease for each restore at most");
}
