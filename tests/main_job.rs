//! The commands a person meets first, against real servers: init, check, run, list.

mod support;

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use pgkeep::pg::instance::StopMode;
use serde_json::Value;
use support::{TestPg, any_major, for_each_major, wait_until};

/// A directory with a configuration, a key and a repository, and pgkeep run in it.
struct Home(tempfile::TempDir);

struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Ran {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    #[track_caller]
    fn says(self, words: &str) -> Ran {
        let all = format!("{}{}", self.stdout, self.stderr);
        assert!(all.contains(words), "{words:?} is not in:\n{all}");
        self
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in:\n{}", self.stdout))
    }
}

impl Home {
    fn new() -> Home {
        Home(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgkeep"));
        command.args(args).current_dir(&self.0).stdin(Stdio::null());
        for name in ["PGKEEP_CONFIG", "PGKEEP_LOG", "PGHOST", "PGPORT", "PGUSER", "PGDATABASE"] {
            command.env_remove(name);
        }
        command.env("AWS_EC2_METADATA_DISABLED", "true"); // nobody is asked who is not on this machine
        command
    }

    fn pgkeep(&self, args: &[&str]) -> Ran {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
    }

    fn init(&self, conninfo: &str, more: &[&str]) -> Ran {
        self.pgkeep(&[&["init", "--pg", conninfo, "--repo", "repository"], more].concat())
    }

    /// `pgkeep run`, logging into a file.
    fn run(&self, log: &str) -> Running {
        let log = self.path(log);
        let file = fs::File::create(&log).unwrap();
        let child = self.command(&["run"]).stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        Running { child, log }
    }

    /// The items of `check --json`, as `item: state`.
    fn check(&self) -> Vec<(String, String, String)> {
        let items = self.pgkeep(&["check", "--json"]).json()["items"].clone();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let items = items.as_array().unwrap().iter();
        items.map(|item| (text(&item["item"]), text(&item["state"]), text(&item["found"]))).collect()
    }

    #[track_caller]
    fn state(&self, wanted: &str) -> String {
        let items = self.check();
        let found = items.iter().find(|(item, ..)| item == wanted);
        found.unwrap_or_else(|| panic!("no item {wanted}: {items:?}")).1.clone()
    }

    /// Where the archived WAL of the only branch ends.
    fn archived_to(&self) -> Option<String> {
        let list = self.pgkeep(&["list", "--json"]).exits(0).json();
        let runs = list["clusters"][0]["branches"][0]["runs"].as_array()?.clone();
        Some(runs.last()?["to"].as_str()?.to_owned())
    }
}

struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    #[track_caller]
    fn says(&self, words: &str) {
        let since = Instant::now();
        while !self.log().contains(words) {
            assert!(since.elapsed() < Duration::from_secs(30), "{words:?} is not in its log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[track_caller]
    fn ends_within(&mut self, deadline: Duration) -> ExitStatus {
        let since = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(since.elapsed() < deadline, "still runs after {deadline:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[track_caller]
    fn terminate(&mut self) -> ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.ends_within(Duration::from_secs(5))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Everything below, with its bytes.
fn snapshot(dir: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    let mut found = Vec::new();
    let mut pending = vec![dir.to_path_buf()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.push((path.clone(), None));
                pending.push(path);
            } else {
                found.push((path.clone(), Some(fs::read(&path).unwrap())));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn from_nothing_to_a_protected_cluster_on_every_major() {
    for_each_major(|installation| {
        let pg = TestPg::start(installation, "");
        let home = Home::new();
        home.init(&pg.conninfo(), &[]).exits(0).says("Keep a copy of").says("made  slot");
        assert_eq!(mode(&home.path("main.key")), 0o600);
        assert_eq!(pg.sql("SELECT slot_type, restart_lsn IS NOT NULL FROM pg_replication_slots"), "physical|t");

        // Again is safe: nothing changes, and it says so.
        let before = snapshot(home.0.path());
        let again = home.init(&pg.conninfo(), &["--json"]).exits(0).json();
        for part in ["config_made", "key_made", "repository_made"] {
            assert_eq!(again[part], Value::Bool(false), "{part}");
        }
        assert_eq!(again["slot_state"], "kept");
        assert_eq!(snapshot(home.0.path()), before);

        home.pgkeep(&["check"]).exits(0).says("warn").says("start `pgkeep run`");
        home.pgkeep(&["list"]).exits(0).says("Nothing is archived yet");

        let mut run = home.run("run.log");
        pg.sql("CREATE TABLE t (n int); INSERT INTO t SELECT generate_series(1, 10000)");
        run.says("streaming");
        wait_until("pgkeep to stream", Duration::from_secs(20), || home.state("slot") == "ok");
        let at = pg.sql("SELECT pg_current_wal_flush_lsn()");
        wait_until("all of it to arrive", Duration::from_secs(30), || {
            pg.sql(&format!("SELECT write_lsn >= '{at}' FROM pg_stat_replication")) == "t"
        });
        let status = run.terminate();
        assert!(status.success(), "{status}:\n{}", run.log());
        let archived = home.archived_to().unwrap();
        assert_eq!(pg.sql(&format!("SELECT '{archived}'::pg_lsn >= '{at}'::pg_lsn")), "t", "{archived} of {at}");
        home.pgkeep(&["list"]).exits(0).says("WAL of branch").says("no base backup");
        assert_eq!(home.state("archived"), "ok");
        assert_eq!(home.state("system identifier"), "ok");
    });
}

#[test]
fn init_goes_on_where_a_run_was_cut_off() {
    let pg = TestPg::start(any_major(), "");
    let home = Home::new();
    home.init(&pg.conninfo(), &[]).exits(0);
    let key = fs::read(home.path("main.key")).unwrap();
    // Cut off before the slot, the configuration, the end of the repository.
    pg.sql("SELECT pg_drop_replication_slot('pgkeep')");
    fs::remove_file(home.path("pgkeep.toml")).unwrap();
    fs::remove_dir_all(home.path("repository/keys")).unwrap();
    home.init(&pg.conninfo(), &[]).exits(0).says("kept  key").says("made  configuration").says("made  slot");
    assert_eq!(fs::read(home.path("main.key")).unwrap(), key);
    // Cut off after the key.
    fs::remove_file(home.path("pgkeep.toml")).unwrap();
    fs::remove_dir_all(home.path("repository")).unwrap();
    home.init(&pg.conninfo(), &[]).exits(0).says("kept  key").says("made  repository");
    assert_eq!(home.state("key"), "ok");
}

#[test]
fn a_second_repository_is_added() {
    let pg = TestPg::start(any_major(), "");
    let home = Home::new();
    home.init(&pg.conninfo(), &[]).exits(0);
    let conninfo = pg.conninfo();
    let second = ["--repository", "second", "init", "--pg", &conninfo, "--repo", "elsewhere", "--key-file", "main.key"];
    let refused = home.pgkeep(&second).exits(4);
    let lines = refused.stderr.split_once("same command again:\n").expect("the lines to add").1;
    assert!(lines.starts_with("[repository.second]") && !lines.contains("[cluster."), "{lines}");
    assert!(!home.path("elsewhere").exists());
    let file = home.path("pgkeep.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, format!("{text}\n{lines}")).unwrap();
    home.pgkeep(&second).exits(0).says("kept  key").says("made  repository").says("kept  configuration");
    // It receives nothing before the cluster names it.
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("repositories = [\"main\"]", "repositories = [\"main\", \"second\"]")).unwrap();
    home.pgkeep(&["check"]).says("ok      cluster main: acknowledge");
}

#[test]
fn init_refuses_what_does_not_fit_and_changes_nothing() {
    let pg = TestPg::start(any_major(), "");
    let home = Home::new();
    let inside = pg.data_dir().join("backups").display().to_string();
    home.pgkeep(&["init", "--pg", &pg.conninfo(), "--repo", &inside]).exits(4).says("data directory of PostgreSQL");
    home.pgkeep(&["init", "--pg", &pg.conninfo(), "--repo", "s3://bucket/prefix"]).exits(2).says("s3://");
    fs::create_dir(home.path("photos")).unwrap();
    fs::write(home.path("photos/cat.jpg"), "meow").unwrap();
    home.pgkeep(&["init", "--pg", &pg.conninfo(), "--repo", "photos"]).exits(4).says("cat.jpg");
    assert!(!home.path("main.key").exists() && !home.path("pgkeep.toml").exists());
    assert_eq!(pg.sql("SELECT count(*) FROM pg_replication_slots"), "0");

    home.init(&pg.conninfo(), &[]).exits(0);
    let before = snapshot(home.0.path());
    home.init(&pg.conninfo(), &["--slot", "another"]).exits(4).says("slot of cluster main");
    home.init("host=/elsewhere user=postgres", &[]).exits(4).says("conninfo of cluster main");
    home.init(&pg.conninfo(), &["--config", "other.toml", "--key-file", "other.key"]).exits(4).says("no key at");
    assert_eq!(snapshot(home.0.path()), before);

    pg.sql("ALTER SYSTEM SET wal_level = 'logical'");
    let logical = Home::new();
    let mut pg = pg;
    pg.stop(StopMode::Fast).unwrap();
    pg.start().unwrap();
    pg.sql("SELECT pg_create_logical_replication_slot('taken', 'test_decoding')");
    logical.init(&pg.conninfo(), &["--slot", "taken"]).exits(4).says("logical");
}

#[test]
fn init_says_what_the_server_lacks_and_goes_on_when_it_is_there() {
    for_each_major(|installation| {
        let mut pg = TestPg::start(installation, "");
        pg.sql("CREATE ROLE keeper LOGIN");
        let home = Home::new();
        let conninfo = pg.conninfo().replace("user=postgres", "user=keeper");
        home.init(&conninfo, &[])
            .exits(3)
            .says("ALTER ROLE \"keeper\" REPLICATION;")
            .says("run the same command again");
        assert!(home.path("pgkeep.toml").exists(), "what can be made is made");
        home.pgkeep(&["check"]).exits(1).says("not ok").says("ALTER ROLE \"keeper\" REPLICATION;");
        pg.sql("ALTER ROLE keeper REPLICATION");
        home.init(&conninfo, &[]).exits(0).says("kept  key").says("made  slot");

        let hba = pg.data_dir().join("pg_hba.conf");
        let open = fs::read_to_string(&hba).unwrap();
        fs::write(&hba, "local all all trust\n").unwrap();
        pg.reload().unwrap();
        wait_until("the entry to go", Duration::from_secs(10), || home.state("replication") == "not-ok");
        home.pgkeep(&["check"]).exits(1).says("local  replication  keeper").says("pg_reload_conf");
        fs::write(&hba, "local replication all trust\n").unwrap();
        pg.reload().unwrap();
        wait_until("SQL to go", Duration::from_secs(10), || home.state("SQL") == "warn");
        assert_eq!(home.state("replication"), "ok", "a role that may only replicate will do");
        fs::write(&hba, open).unwrap();
        pg.reload().unwrap();
        wait_until("SQL to be back", Duration::from_secs(10), || home.state("SQL") == "ok");

        pg.sql("ALTER SYSTEM SET max_wal_senders = 0; ");
        pg.sql("ALTER SYSTEM SET wal_level = 'minimal'");
        pg.sql("SELECT pg_drop_replication_slot('pgkeep')");
        pg.stop(StopMode::Fast).unwrap();
        pg.start().unwrap();
        home.init(&conninfo, &[]).exits(3).says("max_wal_senders = 10").says("restart");
    });
}

#[test]
fn check_sees_each_thing_that_is_wrong() {
    let pg = TestPg::start(any_major(), "");
    let home = Home::new();
    home.init(&pg.conninfo(), &[]).exits(0);
    let set = |setting: &str, wanted: &str, item: &str| {
        pg.sql(&format!("ALTER SYSTEM SET {setting}"));
        pg.sql("SELECT pg_reload_conf()");
        wait_until(&format!("{setting} to be {wanted}"), Duration::from_secs(10), || home.state(item) == wanted);
        pg.sql(&format!("ALTER SYSTEM RESET {}", setting.split_whitespace().next().unwrap()));
        pg.sql("SELECT pg_reload_conf()");
        wait_until(&format!("{setting} to be ok"), Duration::from_secs(10), || home.state(item) == "ok");
    };
    set("synchronous_standby_names = '*'", "not-ok", "synchronous");
    set("full_page_writes = off", "warn", "full_page_writes");

    pg.sql("SELECT pg_drop_replication_slot('pgkeep')");
    assert_eq!(home.state("slot"), "not-ok");
    home.init(&pg.conninfo(), &[]).exits(0);
    assert_eq!(home.state("slot"), "warn", "nobody streams");

    // The repository: another key, no key, gone.
    let other = Home::new();
    other.init(&pg.conninfo(), &["--slot", "other"]).exits(0);
    let key = fs::read(home.path("main.key")).unwrap();
    fs::write(home.path("main.key"), fs::read(other.path("main.key")).unwrap()).unwrap();
    home.pgkeep(&["check"]).exits(1).says("does not open it");
    for command in ["run", "list"] {
        home.pgkeep(&[command]).exits(4).says("does not open it");
    }
    fs::write(home.path("main.key"), key).unwrap();
    fs::set_permissions(home.path("main.key"), fs::Permissions::from_mode(0o644)).unwrap();
    home.pgkeep(&["check"]).exits(1).says("chmod 600");
    fs::set_permissions(home.path("main.key"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(home.state("key"), "ok");
    fs::rename(home.path("repository"), home.path("moved")).unwrap();
    assert_eq!(home.state("store"), "not-ok");
    // An empty directory there (a disk that is not mounted) is no repository.
    fs::DirBuilder::new().mode(0o700).create(home.path("repository")).unwrap();
    home.pgkeep(&["check"]).exits(1).says("holds no pgkeep repository");
    home.pgkeep(&["run"]).exits(2).says("holds no pgkeep repository");
    fs::remove_dir(home.path("repository")).unwrap();
    fs::rename(home.path("moved"), home.path("repository")).unwrap();
    assert_eq!(home.state("write"), "ok");
    let left = fs::read_dir(home.path("repository")).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with("check")).collect();
    assert!(left.is_empty(), "the trial object is removed: {left:?}");

    // A setting nobody knows: with the nearest that is one.
    let file = home.path("pgkeep.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("slot = ", "max_dely = \"1s\"\nslot = ")).unwrap();
    for command in ["check", "run", "list"] {
        home.pgkeep(&[command]).exits(2).says("max_delay");
    }
}

#[test]
fn p3_check_says_that_a_slot_was_invalidated() {
    let pg =
        TestPg::start_segmented(any_major(), 1, "max_slot_wal_keep_size = 2MB\nmax_wal_size = 2MB\nmin_wal_size = 2MB");
    let home = Home::new();
    home.init(&pg.conninfo(), &[]).exits(0);
    pg.sql("CREATE TABLE t (n int)");
    for _ in 0..6 {
        pg.sql("INSERT INTO t SELECT generate_series(1, 10000)");
        pg.sql("SELECT pg_switch_wal()");
        pg.sql("CHECKPOINT");
    }
    assert_eq!(pg.sql("SELECT wal_status FROM pg_replication_slots"), "lost");
    home.pgkeep(&["check"]).exits(1).says("invalidated").says("max_slot_wal_keep_size");
}

#[test]
fn p6_a_foreign_cluster_is_refused() {
    let (one, two) = (TestPg::start(any_major(), ""), TestPg::start(any_major(), ""));
    let home = Home::new();
    home.init(&one.conninfo(), &[]).exits(0);
    let mut run = home.run("run.log");
    run.says("streaming");
    wait_until("WAL", Duration::from_secs(20), || home.archived_to().is_some());
    run.terminate();
    let before = home.archived_to();

    // The same name now leads to another server.
    let file = home.path("pgkeep.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace(&one.conninfo(), &two.conninfo())).unwrap();
    home.pgkeep(&["check"]).exits(1).says("is this the right server?");
    assert_eq!(home.state("system identifier"), "not-ok");
    home.pgkeep(&["run"]).exits(4).says("is this the right server?");
    home.init(&two.conninfo(), &[]).exits(4).says("is this the right server?");
    assert_eq!(home.archived_to(), before);
    assert_eq!(two.sql("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'x'"), "0");
}

#[test]
fn the_second_run_waits_says_so_and_takes_over() {
    let pg = TestPg::start(any_major(), "");
    let home = Home::new();
    home.init(&pg.conninfo(), &[]).exits(0);
    let mut first = home.run("first.log");
    first.says("streaming");
    wait_until("pgkeep to stream", Duration::from_secs(20), || home.state("slot") == "ok");
    let mut second = home.run("second.log");
    second.says("is active");
    pg.sql("CREATE TABLE t (n int); INSERT INTO t SELECT generate_series(1, 1000)");
    assert!(second.child.try_wait().unwrap().is_none(), "it waits:\n{}", second.log());
    assert!(first.terminate().success());
    let at = pg.sql("SELECT pg_current_wal_flush_lsn()");
    pg.sql("INSERT INTO t SELECT generate_series(1, 1000)");
    wait_until("the second to take over", Duration::from_secs(40), || {
        home.archived_to().is_some_and(|to| pg.sql(&format!("SELECT '{to}'::pg_lsn > '{at}'::pg_lsn")) == "t")
    });
    assert!(second.terminate().success(), "{}", second.log());
}

#[test]
fn p1_a_run_that_is_stopped_has_made_everything_durable() {
    let pg = TestPg::start(any_major(), "");
    let home = Home::new();
    home.init(&pg.conninfo(), &[]).exits(0);
    // A delay that does not pass meanwhile: only the stop can have sealed it.
    let file = home.path("pgkeep.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("# max_delay = \"1s\"", "max_delay = \"10m\"")).unwrap();
    let mut run = home.run("run.log");
    run.says("streaming");
    pg.sql("CREATE TABLE t (n int); INSERT INTO t VALUES (1)");
    let at = pg.sql("SELECT pg_current_wal_flush_lsn()");
    wait_until("it to be sent", Duration::from_secs(20), || {
        pg.sql(&format!("SELECT sent_lsn >= '{at}' FROM pg_stat_replication")) == "t"
    });
    std::thread::sleep(Duration::from_secs(1)); // it is not reported before it is durable: nothing else says it arrived
    assert!(home.archived_to().is_none(), "the delay has not passed");
    assert!(run.terminate().success());
    let archived = home.archived_to().unwrap();
    assert_eq!(pg.sql(&format!("SELECT '{archived}'::pg_lsn >= '{at}'::pg_lsn")), "t", "{archived} of {at}");
}
