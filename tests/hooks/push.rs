//! The helper of `wal push`: that it is fast is measured in `testenv/bench/hooks.sh`; here, that it never lies.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pgkeep::pg::instance::{ServerUser, StopMode};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::support::{TestPg, any_major, ok, wait_until};
use super::{PATIENCE, Place, mib, number_of, timeline};

/// The helper that serves a data directory, if one does.
fn helper(data: &Path) -> Option<Pid> {
    let folder = data.join("pg_wal/.pgkeep");
    let pid = fs::read_to_string(folder.join("push.lock")).ok()?.trim().parse().ok().and_then(Pid::from_raw)?;
    (folder.join("push.sock").exists() && is_alive(pid)).then_some(pid)
}

fn is_alive(pid: Pid) -> bool {
    // A zombie is none: its keeper takes it away in a moment.
    test_kill_process(pid).is_ok()
        && fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).is_ok_and(|stat| !stat.contains(") Z "))
}

#[track_caller]
fn wait_for_helper(data: &Path) -> Pid {
    wait_until("a helper", PATIENCE, || helper(data).is_some());
    helper(data).expect("it was there a moment ago")
}

/// A primary that offers segments of 1 MiB, none of which is taken yet.
fn offering(place: &Place) -> TestPg {
    let conf = "archive_mode = on\narchive_command = 'false'\nwal_keep_size = 1GB\n";
    let pg = TestPg::start_segmented(any_major(), 1, conf);
    pg.sql("CREATE TABLE t (i int)");
    assert!(place.objects("main", "/wal/").is_empty());
    pg
}

/// Closes `count` segments; their names.
fn close_segments(pg: &TestPg, count: u32) -> Vec<String> {
    let close = |_| pg.sql("INSERT INTO t SELECT generate_series(1, 50); SELECT pg_walfile_name(pg_switch_wal())");
    (0..count).map(close).map(|out| out.lines().last().unwrap_or_default().to_owned()).collect()
}

fn archive_with(pg: &mut TestPg, command: &str) {
    ok(pg.append_conf(&format!("archive_command = '{command}'")));
    ok(pg.reload());
}

#[track_caller]
fn wait_archived(pg: &TestPg, last: &str) {
    let log = || pg.log().lines().rev().take(20).collect::<Vec<_>>().join("\n");
    let since = Instant::now();
    while pg.sql(&format!("SELECT coalesce(left(last_archived_wal, 24) >= '{last}', false) FROM pg_stat_archiver"))
        != "t"
    {
        assert!(since.elapsed() < PATIENCE, "{last} was not archived\n{}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Each segment from the first to the last is in the repository once, as the server wrote it.
#[track_caller]
fn assert_archived(place: &Place, repository: &str, pg: &TestPg, (first, last): (&str, &str)) {
    let mut number = number_of(first);
    let mut count = 0;
    loop {
        let name = number.file_name(timeline(1), mib());
        let objects = place.objects(repository, &format!("/{name}."));
        let objects: Vec<&PathBuf> = objects.iter().filter(|path| path.to_string_lossy().contains("/wal/")).collect();
        assert_eq!(objects.len(), 1, "{name}: {objects:?}");
        let config = format!("{repository}.toml");
        if count % 5 == 0 || name == last {
            let dest = pg.data_dir().join("fetched");
            let run = place.run(&config, pg.data_dir(), &["wal", "fetch", &name, "fetched"]);
            assert_eq!(run.code, Some(0), "{name}: {}", run.stderr);
            assert!(fs::read(&dest).ok() == fs::read(pg.data_dir().join("pg_wal").join(&name)).ok(), "{name} differs");
        }
        if name == last {
            return;
        }
        (number, count) = (number.next(), count + 1);
    }
}

/// No archiver process ended because of what a hook answered.
#[track_caller]
fn assert_archiver_lived(pg: &TestPg) {
    let log = pg.log();
    assert!(!log.contains("archiver process") && !log.contains("FATAL"), "{log}");
}

/// `pgkeep run` beside it, until it is dropped.
struct Streaming(std::process::Child);

impl Streaming {
    fn start(place: &Place, repository: &str, pg: &TestPg) -> Streaming {
        pg.sql("SELECT pg_create_physical_replication_slot('pgkeep', true)");
        let text = format!(
            "[repository.main]\npath = {:?}\nkey_file = \"main.key\"\n[cluster.main]\nconninfo = {:?}\nrepositories = [\"main\"]\n",
            place.path(repository).display().to_string(),
            pg.conninfo(),
        );
        let config = place.path(&format!("{repository}.toml"));
        ok(fs::write(&config, text));
        let mut command = Command::new(place.path("pgkeep"));
        command.arg("--config").arg(config).args(["-q", "run"]).env_remove("PGKEEP_CONFIG").env_remove("PGKEEP_LOG");
        if let Some(user) = ok(ServerUser::find()) {
            command.uid(user.uid).gid(user.gid);
        }
        Streaming(ok(command.spawn()))
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended
        let _ = self.0.wait();
    }
}

/// The session of a process, as `/proc` tells it: 0 when its leader is outside of our namespace, as in some containers, which the
/// system call's wrapper takes for an impossible answer.
fn session_of(pid: impl std::fmt::Display) -> i64 {
    let stat = ok(fs::read_to_string(format!("/proc/{pid}/stat")));
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let session = after_name.split_whitespace().nth(3).expect("/proc/PID/stat has a session");
    ok(session.parse())
}

/// Two servers of one host, each with a backlog: a helper each, everything ahead, nothing twice, also where the same WAL is
/// streamed; and gone with the server.
#[test]
fn a_backlog_is_put_ahead_by_a_helper_per_server() {
    let place = Place::new();
    place.add_repository("second", "main.key");
    let mut servers = [("main", offering(&place)), ("second", offering(&place))];
    let streaming = Streaming::start(&place, "second", &servers[1].1);
    let closed: Vec<Vec<String>> = servers.iter().map(|(_, pg)| close_segments(pg, 12)).collect();
    for (repository, pg) in &mut servers {
        archive_with(pg, &place.command(&format!("{repository}.toml"), "wal push %p"));
    }
    let mut helpers = Vec::new();
    for ((repository, pg), closed) in servers.iter().zip(&closed) {
        wait_archived(pg, &closed[11]);
        assert_archived(&place, repository, pg, (&closed[0], &closed[11]));
        helpers.push(wait_for_helper(pg.data_dir()));
        assert!(place.objects(repository, "/conflict/").is_empty());
    }
    let end = "SELECT bool_and(restart_lsn >= pg_current_wal_lsn() - 1) FROM pg_replication_slots";
    wait_until("the stream to be at the end", PATIENCE, || servers[1].1.sql(end) == "t");
    drop(streaming);
    assert_ne!(helpers[0], helpers[1]);
    // Neither the session nor the group of the server, and no file of its.
    for (helper, (_, pg)) in helpers.iter().zip(&servers) {
        let helper = *helper;
        let server = pg.pid().expect("the server runs");
        assert_ne!(session_of(helper.as_raw_nonzero()), session_of(server));
        let open = ok(fs::read_dir(format!("/proc/{}/fd", helper.as_raw_nonzero())));
        let open: Vec<String> = open
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .map(|to| to.display().to_string())
            .collect();
        let log = pg.log_path().display().to_string();
        assert!(open.iter().all(|to| *to != log), "it holds the server's log open: {open:?}");
    }
    for (_, pg) in &mut servers {
        assert_archiver_lived(pg);
        ok(pg.stop(StopMode::Fast));
    }
    for helper in helpers {
        wait_until("the helper to leave with its server", PATIENCE, || !is_alive(helper));
    }
}

/// Whatever happens to the helper while the server archives: every call is answered with the truth.
#[test]
fn pitfall_22_helpers_killed_at_random_lose_nothing() {
    let seed = std::env::var("PGKEEP_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| u64::from(now.subsec_nanos()) | 1)
    });
    eprintln!("seed: PGKEEP_SEED={seed}");
    let rounds: u32 = std::env::var("PGKEEP_SEEDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(4);
    let place = Place::new();
    let mut pg = offering(&place);
    archive_with(&mut pg, &place.command("main.toml", "wal push %p"));
    let mut random = seed;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let first = close_segments(&pg, 1).pop().unwrap();
    let mut last = close_segments(&pg, 1).pop().unwrap();
    wait_archived(&pg, &last);
    pg.sql("SELECT pg_stat_reset_shared('archiver')");
    let mut killed = 0;
    for _ in 0..rounds {
        last = close_segments(&pg, 4 + next(8) as u32).pop().unwrap();
        let until = Instant::now() + Duration::from_millis(next(120));
        while Instant::now() < until {
            std::thread::yield_now();
        }
        if let Some(helper) = helper(pg.data_dir()) {
            let signal = [Signal::KILL, Signal::ABORT, Signal::TERM][next(3) as usize];
            let _ = kill_process(helper, signal); // it may have left by itself
            killed += 1;
        }
        if next(2) == 0 {
            wait_archived(&pg, &last);
        }
    }
    wait_archived(&pg, &last);
    assert!(killed > 0);
    assert_archived(&place, "main", &pg, (&first, &last));
    assert_archiver_lived(&pg);
    assert!(place.objects("main", "/conflict/").is_empty());
    assert_eq!(pg.sql("SELECT failed_count FROM pg_stat_archiver"), "0", "seed {seed}\n{}", pg.log());
    ok(pg.stop(StopMode::Fast));
}

/// What a helper knows is of the file as it was. What it may not read it does not believe it knows. A full disk, or a limit that
/// kills, is 1.
#[test]
fn pitfall_22_a_warm_helper_says_neither_too_much_nor_above_125() {
    let place = Place::new();
    let pg = offering(&place);
    let segments = close_segments(&pg, 6);
    let data = pg.data_dir().to_owned();
    let path = |segment: &str| format!("pg_wal/{segment}");
    let push = |segment: &str| place.run("main.toml", &data, &["wal", "push", &path(segment)]);
    let stored = |segment: &str| !place.objects("main", &format!("/{segment}.")).is_empty();

    // Without a helper by choice, and then with one.
    assert_eq!(place.run("main.toml", &data, &["wal", "push", "--no-helper", &path(&segments[0])]).code, Some(0));
    assert!(!data.join("pg_wal/.pgkeep").exists() && !stored(&segments[1]));
    assert_eq!(push(&segments[0]).code, Some(0));
    let first = wait_for_helper(&data);
    assert_eq!(push(&segments[1]).code, Some(0));
    wait_until("the rest to be put ahead", PATIENCE, || segments.iter().all(|segment| stored(segment)));
    let objects = place.objects("main", "/wal/");

    // One that was put ahead, and is another one now.
    let file = data.join(path(&segments[3]));
    let bytes = ok(fs::read(&file));
    let mut other = bytes.clone();
    other[5000..5008].copy_from_slice(b"differs!");
    ok(fs::write(&file, &other));
    let run = push(&segments[3]);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(run.stderr.contains("CONFLICT"), "{}", run.stderr);
    ok(fs::write(&file, &bytes));
    for segment in &segments {
        let run = push(segment);
        assert_eq!(run.code, Some(0), "{segment}: {}", run.stderr);
    }
    assert_eq!(place.objects("main", "/wal/"), objects, "nothing twice");
    assert_eq!(helper(&data), Some(first), "a conflict is nothing that another helper would see otherwise");

    // A configuration that may not be read any more: not even for what the helper could do.
    let config = place.path("main.toml");
    let mode = |mode| ok(fs::set_permissions(&config, fs::Permissions::from_mode(mode)));
    if ok(ServerUser::find()).is_some() {
        mode(0);
        assert_eq!(push(&segments[4]).code, Some(1));
        wait_until("the helper to leave", PATIENCE, || !is_alive(first));
        mode(0o644);
    }
    assert_eq!(push(&segments[4]).code, Some(0));

    // The repository goes away and comes back.
    let more = close_segments(&pg, 2);
    ok(fs::rename(place.path("main"), place.path("away")));
    for _ in 0..2 {
        let run = push(&more[0]);
        assert_eq!(run.code, Some(1), "{}", run.stderr);
    }
    ok(fs::rename(place.path("away"), place.path("main")));
    for segment in &more {
        let run = push(segment);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
    }

    // Files of at most 32 KiB: the kernel kills whoever writes more, the helper as well as the work without it.
    let full = close_segments(&pg, 1);
    let limited = |segment: &str| {
        let pgkeep = place.path("pgkeep").display().to_string();
        let script = format!("ulimit -f 64; exec {pgkeep} --config {} -q wal push {}", config.display(), path(segment));
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).current_dir(&data).env_remove("PGKEEP_CONFIG").env_remove("PGKEEP_LOG");
        if let Some(user) = ok(ServerUser::find()) {
            shell.uid(user.uid).gid(user.gid);
        }
        let output = ok(shell.output());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let fill = pg.sql("INSERT INTO t SELECT generate_series(1, 40000); SELECT pg_walfile_name(pg_switch_wal())");
    let filled = number_of(fill.lines().last().unwrap_or_default());
    let filled = pgkeep::types::SegmentNumber::new(filled.get() - 1).file_name(timeline(1), mib());
    for _ in 0..3 {
        let (code, stderr) = limited(&filled);
        assert_eq!(code, Some(1), "{stderr}");
    }
    assert!(!stored(&filled));
    assert_eq!(push(&filled).code, Some(0));
    assert_eq!(push(&full[0]).code, Some(0));

    // The data directory goes, and nobody stays for it. After a helper that failed the next one is started by a later call.
    wait_until("a helper", PATIENCE, || {
        assert_eq!(push(&full[0]).code, Some(0));
        helper(&data).is_some()
    });
    let last = wait_for_helper(&data);
    drop(pg);
    assert!(!data.exists());
    wait_until("the helper to leave", PATIENCE, || !is_alive(last));
}
