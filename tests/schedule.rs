//! Base backups by schedule with a real server: two daemons take one, a missed run is made up for, and `list` tells the next.

mod support;

use std::fs::{self, File};
use std::process::{Child, Stdio};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use pgkeep::backup::{BackupOptions, BackupProgress, backup};
use pgkeep::catalog::{Repository, Usage};
use pgkeep::pg::instance::give_to_server_user;
use pgkeep::seal::KeyFile;
use pgkeep::store::fs::FsStore;
use pgkeep::types::BackupLabel;
use support::backups::{name, soon, source_of};
use support::rig::{Rig, SOON};
use support::{TestPg, any_major, ok, wait_until};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

fn labels(rig: &Rig) -> Vec<BackupLabel> {
    let list = rig.json(&["list", "--json"]);
    let backups = list["clusters"][0]["backups"].as_array().cloned().unwrap_or_default();
    backups.iter().map(|backup| backup["label"].as_str().unwrap().parse().unwrap()).collect()
}

fn configure(rig: &Rig, lines: &str) {
    let config = ok(fs::read_to_string(rig.path("pgkeep.toml")));
    ok(fs::write(rig.path("pgkeep.toml"), config + lines));
}

/// A daemon beside others, ended when it goes.
struct Daemon(Child);

impl Daemon {
    fn start(rig: &Rig, log: &str) -> Daemon {
        let log = ok(File::create(rig.path(log)));
        Daemon(ok(rig.command(&["run"]).stdout(Stdio::null()).stderr(log).spawn()))
    }

    fn stop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        ok(rustix::process::kill_process(pid, rustix::process::Signal::TERM));
        assert!(ok(self.0.wait()).success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Each run is taken once, by the one or by the other, and none while another one goes on.
#[test]
fn two_daemons_on_one_repository_take_each_base_backup_once() {
    const EVERY: i64 = 6;
    let pg = TestPg::start_segmented(any_major(), 1, "autovacuum = off");
    let rig = Rig::new(&pg);
    configure(&rig, &format!("backup_every = \"{EVERY}s\"\n"));
    pg.sql("create table t as select generate_series(1, 1000) n");
    let (mut one, mut two) = (Daemon::start(&rig, "one.log"), Daemon::start(&rig, "two.log"));
    wait_until("three base backups", SOON, || labels(&rig).len() >= 3);
    one.stop();
    two.stop();
    let taken = labels(&rig);
    let list = rig.json(&["list", "--json"]);
    for pair in taken.windows(2) {
        let seconds = pair[1].start().duration_since(pair[0].start()).as_secs();
        assert!(seconds >= EVERY - 1, "{seconds} s from {} to {}\n{list:#}", pair[0], pair[1]);
    }
    let time = |value: &serde_json::Value| value.as_str().unwrap().parse::<Timestamp>().unwrap();
    for pair in list["clusters"][0]["backups"].as_array().unwrap().windows(2) {
        assert!(time(&pair[1]["started_at"]) >= time(&pair[0]["stopped_at"]), "they overlap\n{list:#}");
    }
    let logs = ["one.log", "two.log"].map(|log| ok(fs::read_to_string(rig.path(log))));
    let said = logs.iter().map(|log| log.matches("was taken by schedule").count()).sum::<usize>();
    // One that was complete when it was told to stop may not have said so.
    assert!(said <= taken.len() && said + 1 >= taken.len(), "{}\n{}", logs[0], logs[1]);
    // Stopped in the middle of one or not: the lease was let go, and nobody waits for it.
    assert_eq!(list["clusters"][0]["under_way"], serde_json::Value::Null, "{list:#}");
    assert_eq!(rig.objects("main", &["/lease/backup/"]).len(), 1, "only the newest beat stays");
}

#[test]
fn a_missed_run_is_made_up_for_once_and_list_tells_the_next() {
    let pg = TestPg::start_segmented(any_major(), 1, "autovacuum = off");
    let mut rig = Rig::new(&pg);
    pg.sql("create table t as select generate_series(1, 1000) n");
    rig.start_archiver();
    wait_until("WAL to be archived", SOON, || !rig.objects("main", &["/open/"]).is_empty());
    // As of five hours ago.
    let key = ok(KeyFile::read(&ok(fs::read(rig.path("main.key"))), None));
    let back = SignedDuration::from_hours(5);
    let usage = Usage { clock: Arc::new(move || Timestamp::now() - back), ..ok(Usage::new()) };
    rig.block_on(async {
        let store = ok(FsStore::open(rig.path("main")).await);
        let repository = ok(Repository::open_for("main", Arc::new(store), key, usage).await);
        let (progress, options) = (watch::Sender::new(BackupProgress::default()), BackupOptions::default());
        ok(soon(backup(&source_of(&pg), &repository, &name(), &options, &progress, CancellationToken::new())).await)
    });
    ok(give_to_server_user(rig.dir.path()));
    rig.stop_archiver();
    assert_eq!(labels(&rig).len(), 1);
    configure(&rig, "backup_every = \"1h\"\n");
    let due =
        rig.json(&["list", "--json"])["clusters"][0]["next_backup"].as_str().unwrap().parse::<Timestamp>().unwrap();
    assert!(due < Timestamp::now(), "it was missed: {due}");
    rig.start_archiver();
    wait_until("the missed run", SOON, || labels(&rig).len() == 2);
    let list = rig.json(&["list", "--json"]);
    let next = list["clusters"][0]["next_backup"].as_str().unwrap().parse::<Timestamp>().unwrap();
    let ahead = next.duration_since(Timestamp::now());
    assert!(ahead > SignedDuration::from_mins(50) && ahead <= SignedDuration::from_hours(1), "{next}");
    rig.done(&["list"]).says("Next backup");
    // It has looked again after that one.
    wait_until("the log", SOON, || rig.log().contains("was taken by schedule"));
    rig.stop_archiver();
    assert_eq!(labels(&rig).len(), 2, "made up for once: {}", rig.log());
}
