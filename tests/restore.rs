//! The whole way: archive, back up, work, restore to every kind of target, start the server, compare with what was noted
//! while the work was done. By the program as it is typed, run as the user that runs the servers.

mod support;

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgkeep::pg::instance::{Installation, ServerUser, StopMode, give_to_server_user};
use support::{TestPg, any_major, for_each_major, ok, wait_until};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(90);

/// A place that the server's user can enter, with the program, its configuration and a repository.
struct Rig {
    dir: TempDir,
    archiver: Option<Child>,
}

#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Rig {
    fn new(pg: &TestPg) -> Rig {
        let dir =
            ok(tempfile::Builder::new().prefix("pgr").permissions(Permissions::from_mode(0o755)).tempdir_in("/tmp"));
        ok(fs::copy(env!("CARGO_BIN_EXE_pgkeep"), dir.path().join("pgkeep")));
        ok(give_to_server_user(dir.path()));
        let rig = Rig { dir, archiver: None };
        let (repo, key) = (rig.path("repo"), rig.path("main.key"));
        let (repo, key) = (repo.to_str().unwrap(), key.to_str().unwrap());
        rig.done(&["init", "--pg", &pg.conninfo(), "--repo", repo, "--key-file", key, "--yes"]);
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command<A: AsRef<OsStr>>(&self, args: &[A]) -> Command {
        let mut command = Command::new(self.path("pgkeep"));
        command.arg("--config").arg(self.path("pgkeep.toml")).args(args).current_dir(self.dir.path());
        command.env_remove("PGKEEP_LOG").stdin(Stdio::null());
        if let Some(user) = ok(ServerUser::find()) {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    fn run<A: AsRef<OsStr>>(&self, args: &[A]) -> Ran {
        ran(self.command(args))
    }

    #[track_caller]
    fn done<A: AsRef<OsStr> + std::fmt::Debug>(&self, args: &[A]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.code, Some(0), "{args:?}\n{}\n{}", ran.stdout, ran.stderr);
        ran
    }

    #[track_caller]
    fn json<A: AsRef<OsStr> + std::fmt::Debug>(&self, args: &[A]) -> serde_json::Value {
        serde_json::from_str(&self.run(args).stdout).unwrap_or_else(|error| panic!("{args:?}: {error}"))
    }

    fn start_archiver(&mut self) {
        let log = ok(fs::File::create(self.path("run.log")));
        self.archiver = Some(ok(self.command(&["run"]).stdout(Stdio::null()).stderr(log).spawn()));
    }

    fn stop_archiver(&mut self) {
        let Some(mut child) = self.archiver.take() else { return };
        let pid = rustix::process::Pid::from_child(&child);
        ok(rustix::process::kill_process(pid, rustix::process::Signal::TERM));
        assert!(ok(child.wait()).success(), "{}", fs::read_to_string(self.path("run.log")).unwrap_or_default());
    }

    /// Waits until a transaction's end is archived.
    fn wait_for(&self, xid: &str) {
        let to = format!("xid:{xid}");
        let since = Instant::now();
        loop {
            let plan = self.run(&["plan", "--to", &to]);
            if plan.code == Some(0) {
                return;
            }
            let log = fs::read_to_string(self.path("run.log")).unwrap_or_default();
            assert!(since.elapsed() < SOON, "{to} is not archived: {plan:?}\n{log}");
        }
    }

    fn restore(&self, to: &[&str], name: &str, more: &[&str]) -> Ran {
        let dir = self.path(name);
        let mut args = vec!["restore", "--pgdata", dir.to_str().unwrap()];
        args.extend(["--to"].iter().chain(to));
        args.extend(more);
        self.run(&args)
    }

    /// Restores, checks with PostgreSQL's own tool, starts, and waits until the target is reached: a server that pauses
    /// there lets queries in before.
    #[track_caller]
    fn restored(&self, installation: &Installation, to: &[&str], name: &str, more: &[&str]) -> TestPg {
        let ran = self.restore(to, name, more);
        assert_eq!(ran.code, Some(0), "{to:?}\n{}\n{}", ran.stdout, ran.stderr);
        let dir = self.path(name);
        verify(installation, &dir);
        let mut pg = TestPg::attach(installation, &dir);
        pg.set("fsync=off"); // else the server syncs every file when it starts
        ok(pg.start());
        let (reached, want) = if more.contains(&"promote") {
            ("select pg_is_in_recovery()", "f")
        } else {
            ("select pg_is_wal_replay_paused()", "t")
        };
        wait_until("the target to be reached", SOON, || pg.sql(reached) == want);
        pg
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(child) = &mut self.archiver {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn ran(mut command: Command) -> Ran {
    let output = ok(command.output());
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// PostgreSQL's own opinion of the files and of the WAL beside them.
#[track_caller]
fn verify(installation: &Installation, dir: &Path) {
    let arguments = [OsStr::new("-e"), dir.as_os_str()];
    let checked = ok(installation.run("pg_verifybackup", &arguments, SOON)).checked();
    ok(checked);
}

/// A commit as the client saw it.
#[derive(Debug, Clone)]
struct Commit {
    id: usize,
    xid: String,
    /// The server's clock and end of WAL after it.
    time: String,
    lsn: String,
}

/// Waits for the next second. Checkpoints tell their time to the second: a target in the second of a backup's checkpoint
/// may lie before the backup, and is refused.
fn next_second(pg: &TestPg) {
    let now = || pg.sql("select floor(extract(epoch from clock_timestamp()))::bigint");
    let second = now();
    wait_until("the next second", SOON, || now() != second);
}

fn commit(pg: &TestPg, id: usize) -> Commit {
    let xid = pg.sql(&format!("insert into log values ({id}) returning pg_current_xact_id()"));
    let seen = pg.sql("select clock_timestamp(), pg_current_wal_lsn()");
    let (time, lsn) = seen.split_once('|').expect("two columns");
    std::thread::sleep(Duration::from_millis(5));
    Commit { id, xid, time: time.to_owned(), lsn: lsn.to_owned() }
}

fn rows(pg: &TestPg) -> String {
    pg.sql("select string_agg(id::text, ',' order by id) from log")
}

fn up_to(last: usize) -> String {
    (1..=last).map(|id| id.to_string()).collect::<Vec<_>>().join(",")
}

#[test]
fn p2_every_kind_of_target_is_reached() {
    for_each_major(|installation| {
        let pg = TestPg::start(installation, "timezone = 'Asia/Kolkata'\n");
        let mut rig = Rig::new(&pg);
        rig.start_archiver();
        pg.sql("create table log (id int primary key)");
        let mut log: Vec<Commit> = (1..=3).map(|id| commit(&pg, id)).collect();
        rig.done(&["backup"]);
        next_second(&pg);
        log.extend((4..=9).map(|id| commit(&pg, id)));
        pg.sql("select pg_create_restore_point('before the release')");
        log.extend((10..=12).map(|id| commit(&pg, id)));
        let at = |id: usize| log.iter().find(|commit| commit.id == id).expect("a commit").clone();
        rig.wait_for(&at(12).xid);
        rig.stop_archiver();
        drop(pg); // restoring needs no server

        let by_xid = rig.json(&["plan", "--json", "--to", &format!("xid:{}", at(7).xid)]);
        let commit_record = by_xid["plan"]["stop"]["record"].as_str().expect("a position").to_owned();
        let cases: [(&str, Vec<String>, usize); 9] = [
            ("latest", vec!["latest".into()], 12),
            ("immediate", vec!["immediate".into()], 3),
            ("time", vec![at(5).time], 5),
            ("xid", vec![format!("xid:{}", at(6).xid)], 6),
            ("before xid", vec![format!("xid:{}", at(6).xid), "--exclusive".into()], 5),
            ("name", vec!["name:before the release".into()], 9),
            // What pg_current_wal_lsn() said after a commit: the next record's start, which is no commit.
            ("pitfall_27 lsn", vec![at(8).lsn], 8),
            ("lsn of a commit", vec![commit_record.clone()], 7),
            ("before lsn", vec![commit_record, "--exclusive".into()], 6),
        ];
        for (name, to, last) in cases {
            let to: Vec<&str> = to.iter().map(String::as_str).collect();
            let restored = rig.restored(installation, &to, &name.replace(' ', "_"), &[]);
            assert_eq!(rows(&restored), up_to(last), "{name}: {to:?}");
        }
        // After a promotion it is a primary like any other, on a timeline of its own.
        let mut promoted = rig.restored(installation, &["latest"], "promoted", &["--action", "promote"]);
        assert_eq!(promoted.sql("select timeline_id from pg_control_checkpoint()"), "2");
        commit(&promoted, 13);
        assert_eq!(rows(&promoted), up_to(13));
        assert!(!promoted.data_dir().join("recovery.signal").exists());
        ok(promoted.stop(StopMode::Fast));
    });
}

#[test]
fn tablespaces_go_where_they_are_sent() {
    for_each_major(|installation| {
        let pg = TestPg::start(installation, "");
        let spaces = [ok(pg.scratch_dir("one")), ok(pg.scratch_dir("two"))];
        for (name, dir) in ["one", "two"].iter().zip(&spaces) {
            pg.sql(&format!("create tablespace {name} location '{}'", dir.display()));
            pg.sql(&format!("create table in_{name} tablespace {name} as select generate_series(1, 5000) as n"));
        }
        pg.sql("create table log (id int primary key)");
        let mut rig = Rig::new(&pg);
        rig.start_archiver();
        rig.done(&["backup"]);
        pg.sql("insert into in_one values (5001)");
        let last = commit(&pg, 1);
        rig.wait_for(&last.xid);
        rig.stop_archiver();
        let oid = pg.sql("select oid from pg_tablespace where spcname = 'two'");
        let moved = |old: &str, new: &str| format!("{old}={}", rig.path(new).display());

        // The originals are in use.
        let refused = rig.restore(&["latest"], "data", &[]);
        assert_eq!(refused.code, Some(4), "{refused:?}");
        assert!(refused.stderr.contains(spaces[0].to_str().unwrap()), "{refused:?}");
        assert!(!rig.path("data").exists());
        let unknown = rig.restore(&["latest"], "data", &["--tablespace", &moved("/no/such", "x")]);
        assert_eq!(unknown.code, Some(2), "{unknown:?}");

        let (one, two) = (moved(spaces[0].to_str().unwrap(), "one"), moved(&oid, "two"));
        let more = ["--tablespace", &one, "--tablespace", &two];
        let restored = rig.restored(installation, &["latest"], "data", &more);
        assert_eq!(restored.sql("select count(*), max(n) from in_one"), "5001|5001");
        assert_eq!(restored.sql("select count(*) from in_two"), "5000");
        let link = ok(fs::read_link(rig.path("data").join(format!("pg_tblspc/{oid}"))));
        assert_eq!(link, rig.path("two"));
    });
}

/// A small cluster with one backup and some commits after it, whose server is gone.
fn archived(installation: &Installation, mib: u64) -> (Rig, Vec<Commit>) {
    let pg = TestPg::start_segmented(installation, mib, "");
    pg.sql("create table log (id int primary key)");
    let mut rig = Rig::new(&pg);
    rig.start_archiver();
    let mut log = vec![commit(&pg, 1)];
    rig.done(&["backup"]);
    next_second(&pg);
    pg.sql("create table bulk as select n, repeat('x', 200) as filler from generate_series(1, 20000) n");
    log.push(commit(&pg, 2));
    log.push(commit(&pg, 3));
    rig.wait_for(&log[2].xid);
    rig.stop_archiver();
    (rig, log)
}

#[test]
fn pitfall_13_segments_of_1_and_64_mb() {
    for mib in [1, 64] {
        let installation = any_major();
        let (rig, log) = archived(installation, mib);
        for (name, to, last) in [("latest", "latest", 3), ("time", log[1].time.as_str(), 2), ("now", "immediate", 1)] {
            let restored = rig.restored(installation, &[to], name, &[]);
            assert_eq!(rows(&restored), up_to(last), "{mib} MB, {to}");
            let bulk = restored.sql("select to_regclass('bulk') is not null");
            assert_eq!(bulk, if last > 1 { "t" } else { "f" });
        }
    }
}

/// Everything in a directory, with what changes when something is written.
fn picture(dir: &Path) -> Vec<(PathBuf, u64, i64)> {
    let mut all = Vec::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(path) = pending.pop() {
        let seen = ok(fs::symlink_metadata(&path));
        if seen.is_dir() {
            pending.extend(ok(fs::read_dir(&path)).map(|entry| ok(entry).path()));
        }
        all.push((path, seen.len(), seen.mtime_nsec() + seen.mtime() * 1_000_000_000));
    }
    all.sort();
    all
}

#[test]
fn p2_refusals_come_before_the_first_byte() {
    let installation = any_major();
    let (rig, log) = archived(installation, 16);

    // A target that lies beyond what is archived, or before it: no, with both bounds, and nothing written.
    for (to, why) in [("2100-01-01T00:00:00Z", "AfterNewest"), ("2001-01-01T00:00:00Z", "BeforeFirst")] {
        for command in [vec!["plan", "--to", to], vec!["restore", "--pgdata", "new", "--to", to]] {
            let ran = rig.run(&command);
            assert_eq!(ran.code, Some(1), "{why} {ran:?}");
            assert!(ran.stdout.contains("earliest ") && ran.stdout.contains("newest "), "{why} {ran:?}");
            assert!(!rig.path("new").exists());
        }
        let answer = rig.json(&["plan", "--json", "--to", to]);
        assert_eq!(answer["reachable"], false);
        assert!(answer["earliest"]["lsn"].is_string() && answer["newest"]["lsn"].is_string(), "{answer}");
    }
    assert_eq!(rig.run(&["plan", "--to", "name:nobody-made-it"]).code, Some(1));
    assert_eq!(rig.run(&["plan", "--to", "soonish"]).code, Some(2));

    // A directory that holds anything.
    let full = rig.path("full");
    ok(fs::create_dir(&full));
    ok(fs::write(full.join("postgresql.conf"), "port = 1\n"));
    ok(give_to_server_user(&full));
    let before = picture(&full);
    let ran = rig.restore(&["latest"], "full", &[]);
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("is not empty"), "{ran:?}");
    assert_eq!(picture(&full), before);

    // --dry-run says the same as the restore, and does nothing.
    let dry = rig.restore(&["latest"], "dry", &["--dry-run"]);
    assert_eq!(dry.code, Some(0), "{dry:?}");
    assert!(dry.stdout.contains("stop      after the record at") && !rig.path("dry").exists(), "{dry:?}");

    // Another realm's key.
    let key = rig.path("main.key");
    let kept = ok(fs::read(&key));
    let strange = pgkeep::seal::KeyFile::generate().expect("a key");
    ok(fs::write(&key, secrecy::ExposeSecret::expose_secret(&strange.render())));
    let ran = rig.restore(&["latest"], "new", &[]);
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("does not open it") && !rig.path("new").exists(), "{ran:?}");
    ok(fs::write(&key, kept));
    assert_eq!(rows(&rig.restored(installation, &[&log[1].time], "new", &[])), up_to(2));
}

/// Objects below the repository whose path has these words.
fn objects(rig: &Rig, words: &[&str]) -> Vec<PathBuf> {
    let all = picture(&rig.path("repo")).into_iter().map(|(path, ..)| path);
    all.filter(|path| path.is_file() && words.iter().all(|word| path.to_string_lossy().contains(word))).collect()
}

fn flip(path: &Path, at: impl Fn(usize) -> usize) {
    let mut bytes = ok(fs::read(path));
    let at = at(bytes.len());
    bytes[at] ^= 1;
    ok(fs::set_permissions(path, Permissions::from_mode(0o600)));
    ok(fs::write(path, bytes));
    ok(give_to_server_user(path));
}

#[test]
fn p4_damage_is_named_and_nothing_starts_on_it() {
    let installation = any_major();
    let (rig, _) = archived(installation, 16);
    let pack = objects(&rig, &["/pack/"]).first().expect("a pack").clone();
    let number = pack.file_name().unwrap().to_string_lossy().into_owned();

    // In the middle: found while it is unpacked.
    flip(&pack, |len| len / 2);
    let ran = rig.restore(&["latest"], "half", &[]);
    assert!(ran.code.is_some_and(|code| code > 1), "{ran:?}");
    assert!(ran.stderr.contains(&format!("/{number}")) && ran.stderr.contains("cannot be started"), "{ran:?}");
    assert!(!rig.path("half").join("global/pg_control").exists());
    let mut half = TestPg::attach(installation, &rig.path("half"));
    assert!(half.start().is_err());
    let again = rig.restore(&["latest"], "half", &[]);
    assert_eq!(again.code, Some(4), "{again:?}");
    assert!(again.stderr.contains("was not finished"), "{again:?}");
    flip(&pack, |len| len / 2);

    // At its end, or gone: found by the plan.
    flip(&pack, |len| len - 20);
    let ran = rig.run(&["plan", "--to", "latest"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.contains(&format!("/{number}")), "{ran:?}");
    flip(&pack, |len| len - 20);
    let aside = rig.path("aside");
    ok(fs::rename(&pack, &aside));
    let ran = rig.restore(&["latest"], "none", &[]);
    assert_eq!((ran.code, rig.path("none").exists()), (Some(1), false), "{ran:?}");
    assert!(ran.stdout.contains(&format!("/{number}")), "{ran:?}");
    ok(fs::rename(&aside, &pack));
}

#[test]
fn p4_damaged_wal_is_named_and_what_lies_before_it_is_there() {
    let installation = any_major();
    let (rig, log) = archived(installation, 1);
    let whole = objects(&rig, &["/wal/0"]);
    let damaged = whole.get(whole.len() - 2).expect("some whole segments");
    let name = damaged.file_name().unwrap().to_string_lossy().into_owned();
    flip(damaged, |len| len / 2);
    let last = format!("xid:{}", log[2].xid);
    for to in ["latest", &log[1].time, &log[2].lsn, &last] {
        let ran = rig.restore(&[to], "no", &[]);
        assert_eq!((ran.code, rig.path("no").exists()), (Some(1), false), "{to}: {ran:?}");
        assert!(ran.stdout.contains(&name), "{to}: {name} is not named: {ran:?}");
    }
    let restored = rig.restored(installation, &["immediate"], "yes", &[]);
    assert_eq!(rows(&restored), up_to(1));
}

#[test]
fn pitfall_28_a_restored_server_leaves_production_alone() {
    for_each_major(|installation| {
        let kept = ok(tempfile::Builder::new().permissions(Permissions::from_mode(0o755)).tempdir_in("/tmp"));
        ok(give_to_server_user(kept.path()));
        let kept_path = kept.path().display();
        let conf = format!(
            "archive_mode = on\narchive_command = 'cp %p {kept_path}/%f'\nsynchronous_commit = local\nmax_connections = 37\n\
             archive_cleanup_command = 'touch {kept_path}/cleaned'\nrecovery_end_command = 'touch {kept_path}/ended'\n"
        );
        let pg = TestPg::start(installation, &conf);
        // Written by ALTER SYSTEM, so it comes back in postgresql.auto.conf and would win.
        pg.sql("alter system set synchronous_standby_names = '*'");
        pg.sql(&format!(
            "alter system set primary_conninfo = 'host={} port=54321 user=postgres'",
            pg.socket_dir().display()
        ));
        pg.sql("alter system set primary_slot_name = 'pgkeep'");
        pg.sql("alter system set recovery_target_name = 'of another restore'");
        pg.sql("create table log (id int primary key)");
        let mut rig = Rig::new(&pg);
        rig.start_archiver();
        rig.done(&["backup"]);
        let last = commit(&pg, 1);
        rig.wait_for(&last.xid);
        let mut restored = rig.restored(installation, &["latest"], "data", &["--action", "promote"]);
        let archived = || ok(fs::read_dir(kept.path())).count();
        let before = archived();
        // A synchronous commit does not wait for production's standbys, and a switched segment goes nowhere.
        restored.sql("set synchronous_commit = on; insert into log values (2)");
        restored.sql("select pg_switch_wal()");
        restored.sql("insert into log values (3)");
        restored.sql("checkpoint");
        assert_eq!(
            restored.sql("select current_setting('archive_mode'), current_setting('synchronous_standby_names')"),
            "off|"
        );
        assert_eq!(
            restored.sql("select current_setting('primary_conninfo') || current_setting('primary_slot_name')"),
            ""
        );
        assert_eq!(restored.sql("show max_connections"), "37");
        assert_eq!(restored.sql("select count(*) from pg_stat_wal_receiver"), "0");
        ok(restored.stop(StopMode::Fast));
        assert_eq!(archived(), before);
        assert!(!kept.path().join("cleaned").exists() && !kept.path().join("ended").exists());
        assert_eq!(pg.sql("select count(*) from pg_stat_replication where application_name <> 'pgkeep'"), "0");
        rig.stop_archiver();
    });
}

#[test]
fn a_promoted_primary_is_restored_across_the_fork() {
    let installation = any_major();
    let (mut rig, log) = archived(installation, 16);
    let mut second = rig.restored(installation, &[&log[1].time], "second", &["--action", "promote"]);
    assert_eq!(rows(&second), up_to(2));
    // It takes over the archive.
    let config = ok(fs::read_to_string(rig.path("pgkeep.toml")));
    let conninfo = config.lines().find(|line| line.starts_with("conninfo")).expect("conninfo").to_owned();
    let config = config.replace(&conninfo, &format!("conninfo = {:?}", second.conninfo()));
    ok(fs::write(rig.path("pgkeep.toml"), config));
    rig.start_archiver();
    let last = commit(&second, 4);
    rig.wait_for(&last.xid);
    rig.stop_archiver();
    ok(second.stop(StopMode::Fast));
    // From the old base backup over the fork to the new end; and to the old end when told so.
    for (name, more, want) in [("new", vec![], "1,2,4"), ("old", vec!["--timeline", "1"], "1,2,3")] {
        let restored = rig.restored(installation, &["latest"], name, &more);
        assert_eq!(rows(&restored), want, "{name}");
    }
}

/// Root restores for the server's user, whom it finds by the directory above.
#[test]
fn as_root_files_belong_to_who_owns_the_place() {
    let Some(user) = ok(ServerUser::find()) else { return }; // not root: they are ours
    let installation = any_major();
    let (rig, _) = archived(installation, 1);
    let dir = rig.path("data");
    let mut command = Command::new(rig.path("pgkeep"));
    command.arg("--config").arg(rig.path("pgkeep.toml")).args(["restore", "--to", "latest", "--pgdata"]).arg(&dir);
    let ran = ran(command);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains(&format!("belong to user {}", user.uid)), "{ran:?}");
    for (path, ..) in picture(&dir) {
        let seen = ok(fs::symlink_metadata(&path));
        assert_eq!((seen.uid(), seen.gid()), (user.uid, user.gid), "{}", path.display());
        let open = seen.mode() & 0o077;
        assert!(seen.is_symlink() || open == 0, "{} has mode {:o}", path.display(), seen.mode());
    }
    verify(installation, &dir);
}
