//! Real recoveries through `wal fetch` and its helper, while repositories and helpers fail by seed: each reaches what was
//! planned or stops loudly, and none promotes a shorter history.
//!
//! `PGKEEP_SEEDS` says how many seeds (6 where it is not set), `PGKEEP_SEED` which one is the first.

mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pgkeep::pg::instance::{Installation, StopMode, give_to_server_user};
use rustix::process::{Pid, Signal, kill_process};
use support::rig::{Ran, Rig, SOON, next_second};
use support::{TestPg, any_major, ok, wait_until};

/// The same numbers for the same seed, everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }
}

fn from_environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect(name))
}

/// Writes so many segments of 1 MiB, each closed early; the number of rows and the last transaction.
fn write(pg: &TestPg, segments: usize) -> String {
    for _ in 0..segments {
        pg.sql("insert into log select n, repeat('x', 100) from generate_series(1, 100) n; select pg_switch_wal()");
    }
    pg.sql("insert into log values (0) returning pg_current_xact_id()").lines().next().expect("an xid").to_owned()
}

fn rows(pg: &TestPg) -> String {
    pg.sql("select count(*) from log")
}

/// An archived cluster whose server is gone: a base backup, and segments behind it on one timeline.
fn archived(installation: &Installation, segments: usize) -> (Rig, String) {
    let pg = TestPg::start_segmented(installation, 1, "");
    pg.sql("create table log (id int, filler text)");
    let mut rig = Rig::new(&pg);
    rig.start_archiver();
    rig.done(&["backup"]);
    next_second(&pg);
    let xid = write(&pg, segments);
    rig.wait_for(&xid);
    rig.stop_archiver();
    let rows = rows(&pg);
    (rig, rows)
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    assert!(ok(Command::new("cp").arg("-a").arg(from).arg(to).status()).success());
}

/// Adds lines to a stopped server's settings.
fn set(data: &Path, lines: &str) {
    let auto = data.join("postgresql.auto.conf");
    let text = ok(fs::read_to_string(&auto));
    ok(fs::write(&auto, text + lines));
}

/// The helper of a data directory, if one runs.
fn helper_of(data: &Path) -> Option<Pid> {
    let holder = fs::read_to_string(data.join("pg_wal/.pgkeep/fetch.lock")).ok()?;
    let pid: i32 = holder.trim().parse().ok()?;
    // Only what works in this very directory is ours to kill.
    let works_in = fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
    (works_in == ok(data.canonicalize())).then(|| Pid::from_raw(pid))?
}

fn spools(data: &Path) -> usize {
    let entries = fs::read_dir(data.join("pg_wal/.pgkeep")).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("spool-")).count()
}

/// The inode of a segment of 1 MiB that waits whole in a spool.
fn staged(data: &Path, name: &str) -> Option<u64> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let files = entries(&data.join("pg_wal/.pgkeep")).flat_map(|spool| entries(&spool).collect::<Vec<_>>());
    let mut of_name =
        files.filter(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)));
    let found = fs::metadata(of_name.next()?).ok()?;
    (found.len() == 1 << 20).then(|| found.ino())
}

/// How a recovery ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Promoted,
    Stopped,
}

/// Starts a server and waits until its recovery has ended, in one way or the other.
fn recover(pg: &mut TestPg) -> End {
    let started = pg.start();
    let since = Instant::now();
    loop {
        if !pg.is_running() {
            return End::Stopped;
        }
        let answer = support::Instance::sql(pg, "select pg_is_in_recovery()");
        if answer.is_ok_and(|answer| answer == "f") {
            return End::Promoted;
        }
        assert!(since.elapsed() < SOON, "recovery does not end: {started:?}\n{}", pg.log());
        std::thread::park_timeout(Duration::from_millis(100)); // a psql each time
    }
}

/// A repository of its own for one thread of runs.
struct Bench<'a> {
    rig: &'a Rig,
    number: usize,
    want: &'a str,
}

impl Bench<'_> {
    fn path(&self, what: &str) -> PathBuf {
        self.rig.path(&format!("{what}-{}", self.number))
    }

    /// The template, with this bench's repository; `bare`: without a target, as one would write it by hand.
    fn data(&self, bare: bool) -> PathBuf {
        let data = self.path("data");
        copy(&self.rig.path("template"), &data);
        let config = self.path("pgkeep.toml").display().to_string();
        let auto = data.join("postgresql.auto.conf");
        let text = ok(fs::read_to_string(&auto)).replace(&self.rig.path("pgkeep.toml").display().to_string(), &config);
        ok(fs::write(&auto, text));
        if bare {
            let program = self.rig.path("pgkeep");
            set(
                &data,
                &format!(
                    "recovery_target_lsn = ''\nrecovery_target_timeline = 'latest'\n\
                     restore_command = 'exec {} --config {config} wal fetch %f %p'\n",
                    program.display()
                ),
            );
        }
        data
    }

    /// One run. What goes wrong, and when, is in the seed.
    fn run(&self, installation: &Installation, seed: u64) -> End {
        let mut random = Random(seed);
        copy(&self.rig.path("main"), &self.path("main"));
        let repository = self.path("main");
        let bare = random.chance(2);
        let data = self.data(bare);
        let mut segments: Vec<PathBuf> = self.rig.objects(&format!("main-{}", self.number), &["/wal/0"]);
        // Without a target nobody can know that there was more behind the end.
        let ends: Vec<PathBuf> = segments.split_off(segments.len() - 1);
        if !bare {
            segments.extend(ends);
        }
        let object = random.of(&segments).clone();
        let kind = random.below(7);
        let mut away_at = None;
        match kind {
            0 => {
                let at = random.below(1 << 40);
                support::rig::flip(&object, |len| at as usize % len);
            }
            1 => ok(fs::remove_file(&object)),
            2 => ok(fs::set_permissions(&object, Permissions::from_mode(0o000))),
            3 => {
                let len = ok(fs::metadata(&object)).len();
                ok(ok(fs::OpenOptions::new().write(true).open(&object)).set_len(random.below(len)));
            }
            // The whole repository goes in the middle, for good or for a while; helpers are killed.
            _ => away_at = Some(Duration::from_millis(random.below(1500))),
        }
        let back_after = random.chance(2).then(|| Duration::from_millis(random.below(3000)));
        let kills = kind == 6 || random.chance(2);
        let since = Instant::now();
        let mut pg = TestPg::attach(installation, &data);
        pg.set("fsync=off");
        let mut gone_since = None;
        let mut next_kill = Duration::from_millis(random.below(500));
        let done = AtomicBool::new(false);
        let end = std::thread::scope(|scope| {
            let _end = Ends(&done);
            scope.spawn(|| {
                let aside = self.path("aside");
                while !done.load(Ordering::Relaxed) {
                    if kills && since.elapsed() > next_kill {
                        if let Some(pid) = helper_of(&data) {
                            let _ = kill_process(pid, Signal::KILL); // it may have left by itself
                        }
                        next_kill = since.elapsed() + Duration::from_millis(random.below(300));
                    }
                    if kind < 6 && gone_since.is_none() && away_at.is_some_and(|at| since.elapsed() > at) {
                        ok(fs::rename(&repository, &aside));
                        gone_since = Some(Instant::now());
                    }
                    let is_due = |gone: Instant| back_after.is_some_and(|after| gone.elapsed() > after);
                    if gone_since.is_some_and(is_due) && !repository.exists() {
                        ok(fs::rename(&aside, &repository));
                    }
                    std::thread::park_timeout(Duration::from_millis(5));
                }
                if aside.exists() {
                    ok(fs::rename(&aside, &repository));
                }
            });
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| recover(&mut pg)))
        });
        let end = end.unwrap_or_else(|_| panic!("seed {seed}"));
        let log = pg.log();
        match end {
            End::Promoted => {
                assert_eq!(rows(&pg), self.want, "seed {seed}, bare {bare}, kind {kind}: promoted early\n{log}")
            }
            End::Stopped => {
                assert!(!log.contains("selected new timeline"), "seed {seed}, bare {bare}, kind {kind}\n{log}");
                assert!(log.contains("FATAL"), "seed {seed}: it stopped without a word\n{log}");
                assert!(data.join("recovery.signal").exists(), "seed {seed}");
                // Mended, it goes on to where it was meant to go.
                if random.chance(3) {
                    let _ = fs::remove_dir_all(&repository);
                    copy(&self.rig.path("main"), &repository);
                    let again = recover(&mut pg);
                    assert_eq!(again, End::Promoted, "seed {seed}: mended, and\n{}", pg.log());
                    assert_eq!(rows(&pg), self.want, "seed {seed}: mended");
                }
            }
        }
        if pg.is_running() {
            ok(pg.stop(StopMode::Immediate));
        }
        end
    }
}

#[test]
fn p7_under_faults_by_seed_recovery_reaches_its_target_or_stops() {
    let installation = any_major();
    let (rig, want) = archived(installation, 8);
    rig.restore("latest", "template", &["--action", "promote"]).exits(0);
    let (first, seeds) = (from_environment("PGKEEP_SEED", 1), from_environment("PGKEEP_SEEDS", 6));
    let next = AtomicU64::new(first);
    let ends = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for number in 0..3 {
            let (rig, want, next, ends) = (&rig, want.as_str(), &next, &ends);
            scope.spawn(move || {
                let bench = Bench { rig, number, want };
                let config = ok(fs::read_to_string(rig.path("pgkeep.toml")));
                let (main, own) = (rig.path("main"), bench.path("main"));
                let path = |path: &Path| format!("path = {:?}", path.display().to_string());
                assert!(config.contains(&path(&main)), "{config}");
                ok(fs::write(bench.path("pgkeep.toml"), config.replace(&path(&main), &path(&own))));
                ok(give_to_server_user(&bench.path("pgkeep.toml")));
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + seeds {
                        break;
                    }
                    let end = bench.run(installation, seed);
                    ends.lock().unwrap().push((seed, end));
                }
            });
        }
    });
    let ends = ends.into_inner().unwrap();
    let count = |wanted: End| ends.iter().filter(|(_, end)| *end == wanted).count();
    println!("{} promoted at the target, {} stopped", count(End::Promoted), count(End::Stopped));
    assert_eq!(ends.len() as u64, seeds);
    if seeds >= 6 {
        assert!(count(End::Promoted) > 0 && count(End::Stopped) > 0, "one-sided: {ends:?}");
    }
}

/// Two restores of one archive recover across a fork at once on one host while their helpers are killed; each has its
/// own spool, and none is left when recovery has ended.
#[test]
fn two_recoveries_at_once_switch_timelines_while_helpers_are_killed() {
    let installation = any_major();
    let mut pg = TestPg::start_segmented(installation, 1, "");
    pg.sql("create table log (id int, filler text)");
    let mut rig = Rig::new(&pg);
    rig.start_archiver();
    rig.done(&["backup"]);
    next_second(&pg);
    let xid = write(&pg, 5);
    rig.wait_for(&xid);
    rig.stop_archiver();
    drop(pg);
    rig.restore("latest", "second", &["--action", "promote"]).exits(0);
    pg = TestPg::attach(installation, &rig.path("second"));
    pg.set("fsync=off");
    assert_eq!(recover(&mut pg), End::Promoted, "{}", pg.log());
    rig.served_by(&pg);
    rig.start_archiver();
    let xid = write(&pg, 5);
    rig.wait_for(&xid);
    rig.stop_archiver();
    let want = rows(&pg);
    drop(pg);
    let names = ["one", "two"];
    for name in names {
        rig.restore("latest", name, &["--action", "promote"]).exits(0);
    }
    let killed = AtomicU64::new(0);
    let mut servers: Vec<TestPg> = names.iter().map(|name| TestPg::attach(installation, &rig.path(name))).collect();
    std::thread::scope(|scope| {
        for (seed, pg) in servers.iter_mut().enumerate() {
            let killed = &killed;
            scope.spawn(move || {
                pg.set("fsync=off");
                let data = pg.data_dir().to_owned();
                let done = AtomicBool::new(false);
                std::thread::scope(|scope| {
                    let _end = Ends(&done);
                    scope.spawn(|| {
                        let (mut random, mut last) = (Random(seed as u64), Instant::now());
                        while !done.load(Ordering::Relaxed) {
                            let due = last.elapsed() > Duration::from_millis(100 + random.below(300));
                            if let Some(pid) = helper_of(&data).filter(|_| due) {
                                killed.fetch_add(u64::from(kill_process(pid, Signal::KILL).is_ok()), Ordering::Relaxed);
                                last = Instant::now();
                            }
                            std::thread::park_timeout(Duration::from_millis(2));
                        }
                    });
                    let end = recover(pg);
                    assert_eq!(end, End::Promoted, "{}", pg.log());
                });
            });
        }
    });
    assert!(killed.load(Ordering::Relaxed) > 0, "no helper was met");
    for pg in &servers {
        assert_eq!(rows(pg), want);
        assert_eq!(pg.sql("select timeline_id from pg_control_checkpoint()"), "3");
        let data = pg.data_dir();
        // The one that was killed last could not clean up; the one that was not, has.
        wait_until("the helper to leave when recovery has ended", SOON, || helper_of(data).is_none());
        assert!(spools(data) <= 1);
    }
}

/// A standby that reads the archive alone follows the primary; while the repository is away it stays, and does not promote.
#[test]
fn a_standby_follows_the_archive_through_an_outage() {
    let installation = any_major();
    let pg = TestPg::start_segmented(installation, 1, "");
    pg.sql("create table log (id int, filler text)");
    let mut rig = Rig::new(&pg);
    rig.start_archiver();
    rig.done(&["backup"]);
    next_second(&pg);
    let xid = write(&pg, 2);
    rig.wait_for(&xid);
    rig.restore("immediate", "standby", &[]).exits(0);
    let data = rig.path("standby");
    ok(fs::rename(data.join("recovery.signal"), data.join("standby.signal")));
    let command = format!(
        "exec {} --config {} wal fetch --standby %f %p",
        rig.path("pgkeep").display(),
        rig.path("pgkeep.toml").display()
    );
    let conf = format!(
        "restore_command = '{command}'\nrecovery_target_lsn = ''\nrecovery_target_timeline = 'latest'\n\
         recovery_target_action = 'pause'\nhot_standby = on\nwal_retrieve_retry_interval = '200ms'\n"
    );
    set(&data, &conf);
    let mut standby = TestPg::attach(installation, &data);
    standby.set("fsync=off");
    ok(standby.start());
    let follows = |want: &str| {
        wait_until("the standby to follow", SOON, || {
            standby.sql_if_running("select count(*) from log").as_deref() == Some(want)
        });
    };
    for _ in 0..2 {
        let xid = write(&pg, 2);
        rig.wait_for(&xid);
        follows(&rows(&pg));
    }
    // The repository goes, under the standby alone: what is archived meanwhile comes when it is back.
    let text = ok(fs::read_to_string(rig.path("pgkeep.toml")));
    ok(fs::write(rig.path("pgkeep.toml"), text.replace("/main\"", "/nowhere\"")));
    wait_until("a fault to be met", SOON, || standby.log().contains("for now, and asks again"));
    assert_eq!(standby.sql("select pg_is_in_recovery()"), "t");
    ok(fs::write(rig.path("pgkeep.toml"), text));
    let xid = write(&pg, 2);
    rig.wait_for(&xid);
    follows(&rows(&pg));
    assert_eq!(standby.sql("select pg_is_in_recovery()"), "t", "{}", standby.log());
    rig.stop_archiver();
}

/// The hook as the server runs it, in a data directory that pretends to be recovering.
fn hook(rig: &Rig, data: &Path, before: &str, name: &str) -> Ran {
    let line = format!(
        "{before} exec {} --config {} wal fetch {name} pg_wal/RECOVERYXLOG",
        rig.path("pgkeep").display(),
        rig.path("pgkeep.toml").display()
    );
    let mut command = Command::new("sh");
    command.arg("-c").arg(line).current_dir(data).env_remove("PGKEEP_LOG");
    if let Some(user) = ok(pgkeep::pg::instance::ServerUser::find()) {
        use std::os::unix::process::CommandExt;
        command.uid(user.uid).gid(user.gid);
    }
    support::rig::ran(command)
}

/// Ends who watches, also when what is watched for fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What another restore left behind is never served; the helper is used, and cleans up behind itself.
fn recovers_with_a_helper(installation: &Installation, data: &Path, want: &str) {
    let left = data.join("pg_wal/.pgkeep/spool-of-another");
    ok(fs::create_dir_all(&left));
    ok(fs::write(left.join("000000010000000000000005.0"), vec![0; 1 << 20]));
    ok(fs::set_permissions(data.join("pg_wal/.pgkeep"), Permissions::from_mode(0o700)));
    ok(give_to_server_user(&data.join("pg_wal/.pgkeep")));
    let mut pg = TestPg::attach(installation, data);
    pg.set("fsync=off");
    let (seen, done) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let _end = Ends(&done);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                seen.fetch_or(helper_of(data).is_some() && spools(data) > 0 && !left.exists(), Ordering::Relaxed);
                std::thread::park_timeout(Duration::from_millis(2));
            }
        });
        let end = recover(&mut pg);
        wait_until("the spool to go when recovery has ended", SOON, || spools(data) == 0);
        assert_eq!(end, End::Promoted, "{}", pg.log());
    });
    assert!(seen.load(Ordering::Relaxed), "no helper was met");
    assert_eq!(rows(&pg), want);
    wait_until("the helper to leave", SOON, || helper_of(data).is_none());
}

/// P7 at the edges: a helper that dies or hangs, a disk that is full, a configuration that cannot be read.
#[test]
fn p7_the_hooks_exit_code_is_right_or_above_125() {
    let installation = any_major();
    let (rig, want) = archived(installation, 8);
    rig.restore("latest", "whole", &["--action", "promote"]).exits(0);
    recovers_with_a_helper(installation, &rig.path("whole"), &want);
    rig.restore("latest", "data", &[]).exits(0);
    let data = rig.path("data");
    // A server that is starting.
    ok(fs::write(data.join("postmaster.pid"), ""));
    let objects = rig.objects("main", &["/wal/0"]);
    let names: Vec<String> = objects
        .iter()
        .map(|path| path.file_name().unwrap().to_string_lossy().split('.').next().unwrap().to_owned())
        .collect();
    let dest = data.join("pg_wal/RECOVERYXLOG");
    let beyond = "0000000100000000000000FF";
    let served = |name: &str| {
        let _ = fs::remove_file(&dest);
        hook(&rig, &data, "", name).exits(0);
        assert_eq!(ok(fs::metadata(&dest)).len(), 1 << 20);
    };
    served(&names[0]);
    wait_until("the helper", SOON, || spools(&data) == 1);
    let first = helper_of(&data).expect("a helper");
    wait_until("the next segment to be staged", SOON, || staged(&data, &names[1]).is_some());
    let opened_ahead = staged(&data, &names[1]);
    served(&names[1]);
    assert_eq!(Some(ok(fs::metadata(&dest)).ino()), opened_ahead, "the hook renames what was opened ahead");
    hook(&rig, &data, "", beyond).exits(1);
    // It hangs: the hook does the work. It is killed: likewise, and another one is started.
    ok(kill_process(first, Signal::STOP));
    served(&names[2]);
    hook(&rig, &data, "", beyond).exits(1);
    ok(kill_process(first, Signal::KILL));
    wait_until("it to be gone", SOON, || helper_of(&data) != Some(first));
    served(&names[3]);
    // A full disk, as near as any user can get to it: files may not grow beyond 100 kB.
    let _ = fs::remove_file(&dest);
    let full = hook(&rig, &data, "ulimit -f 200;", &format!("--no-helper {}", names[4]));
    assert!(full.code.is_none_or(|code| code > 125), "{full:?}");
    assert!(!dest.exists());
    let config = rig.path("pgkeep.toml");
    ok(fs::set_permissions(&config, Permissions::from_mode(0o000)));
    for name in [names[4].as_str(), beyond, "00000002.history"] {
        hook(&rig, &data, "", name).exits(200);
    }
    assert!(!dest.exists());
    ok(fs::remove_file(data.join("postmaster.pid")));
    wait_until("no helper without a server", SOON, || helper_of(&data).is_none());
}
