//! Local servers of every major that is found: start, stop, crash, promote, and what an error says.

mod support;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use pgkeep::pg::instance::{InitOptions, Installation, Instance, InstanceError, Started, StopMode};
use pgkeep::types::SegmentSize;
use support::{TestPg, any_major, for_each_major, ok, wait_until};

#[test]
fn every_major_boots_takes_rows_and_stops() {
    for_each_major(|installation| {
        let mut pg = TestPg::start(installation, "work_mem = 7MB");
        assert_eq!(pg.sql("SHOW server_version_num"), format!("{}", installation.major * 10_000 + installation.minor));
        assert_eq!(pg.sql("SHOW work_mem"), "7MB");
        assert_eq!(pg.sql("SHOW listen_addresses"), "");
        pg.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n");
        ok(pg.stop(StopMode::Fast));
        assert!(!pg.is_running());
        ok(pg.stop(StopMode::Fast)); // again is no error
        ok(pg.start());
        assert_eq!(pg.sql("SELECT sum(n) FROM t"), "500500");
        assert!(pg.log().contains("database system is ready to accept connections"));
    });
}

#[test]
fn a_killed_server_recovers_and_leaves_no_process() {
    for_each_major(|installation| {
        let mut pg = TestPg::start(installation, "");
        pg.sql("CREATE TABLE t AS SELECT 1 AS n");
        let postmaster = pg.pid().expect("it runs");
        ok(pg.kill());
        assert!(!pg.is_running());
        assert!(!std::path::Path::new(&format!("/proc/{postmaster}")).exists());
        assert!(pg.data_dir().join("postmaster.pid").exists(), "a crash leaves the file");
        assert_eq!(ok(pg.start()), Started::AcceptsConnections); // the stale file does not pass for ready
        assert_eq!(pg.sql("SELECT n FROM t"), "1");
        assert!(pg.log().contains("was not properly shut down"));
    });
}

#[test]
fn drop_ends_the_server_and_removes_its_files() {
    let pg = TestPg::start(any_major(), "");
    let (data, sockets, pid) = (pg.data_dir().to_owned(), pg.socket_dir().to_owned(), pg.pid().expect("it runs"));
    drop(pg);
    assert!(!data.exists() && !sockets.exists());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn segment_sizes_checksums_and_tcp_are_as_asked() {
    let installation = any_major();
    for mib in [1, 64] {
        let pg = TestPg::start_segmented(installation, mib, "");
        assert_eq!(pg.sql("SHOW wal_segment_size"), format!("{mib}MB"));
        assert_eq!(pg.sql("SHOW data_checksums"), "on");
    }
    let size = SegmentSize::new(1 << 20);
    let options = InitOptions { segment_size: size, tcp: true, ..InitOptions::new(installation.clone()) };
    let pg = TestPg::start_with(options);
    assert_ne!(pg.port(), 5432);
    let over_tcp = ["-X", "-A", "-t", "-d", &pg.tcp_conninfo(), "-c", "SELECT inet_server_addr() IS NOT NULL"];
    let output = ok(ok(Instance::tool(&pg, "psql", &over_tcp, Duration::from_secs(30))).checked());
    assert_eq!(output.stdout_text().trim(), "t");
}

#[test]
fn a_start_that_fails_shows_the_log() {
    let mut pg = TestPg::start(any_major(), "");
    ok(pg.stop(StopMode::Fast));
    ok(pg.append_conf("no_such_setting = on"));
    let error = pg.start().expect_err("the setting is unknown");
    assert!(matches!(error, InstanceError::StartFailed { .. }), "{error}");
    assert!(error.to_string().contains("no_such_setting"), "{error}");
    assert!(!error.is_retryable());
}

#[test]
fn a_second_start_is_refused_and_a_stopped_server_cannot_be_signalled() {
    let mut pg = TestPg::start(any_major(), "");
    assert!(matches!(pg.start(), Err(InstanceError::AlreadyRunning { .. })));
    ok(pg.reload());
    ok(pg.stop(StopMode::Immediate));
    assert!(matches!(pg.reload(), Err(InstanceError::NotRunning { .. })));
}

#[test]
fn a_smart_stop_waits_for_clients_until_the_deadline() {
    let mut pg = TestPg::start(any_major(), "");
    let mut client = ok(pg.client("psql"));
    let mut client = client.args(["-X", "-d", "postgres", "-c", "SELECT pg_sleep(60)"]).spawn().expect("psql starts");
    wait_until("the client to sleep", Duration::from_secs(20), || {
        pg.sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'") == "1"
    });
    let error = pg.stop_within(StopMode::Smart, Duration::from_millis(500)).expect_err("a client is there");
    assert!(matches!(error, InstanceError::Deadline { .. }) && error.is_retryable(), "{error}");
    ok(pg.stop(StopMode::Fast));
    client.wait().expect("psql ends");
}

#[test]
fn a_standby_follows_and_is_promoted() {
    for_each_major(|installation| {
        let primary = TestPg::start(installation, "");
        primary.sql("CREATE TABLE t AS SELECT generate_series(1, 100) AS n");
        let dir = ok(primary.scratch_dir("standby"));
        let into = dir.display().to_string();
        primary.tool("pg_basebackup", &["-D", &into, "-c", "fast", "-R", "--no-sync"]);
        let mut standby = TestPg::attach(installation, &dir);
        standby.set("fsync=off");
        assert_eq!(ok(standby.start()), Started::AcceptsConnections);
        assert_eq!(standby.sql("SELECT pg_is_in_recovery(), count(*) FROM t"), "t|100");
        ok(standby.promote());
        assert_eq!(standby.sql("SELECT pg_is_in_recovery()"), "f");
    });
}

#[test]
fn a_server_that_stops_at_its_target_has_started_well() {
    for_each_major(|installation| {
        let primary = TestPg::start(installation, "");
        let dir = ok(primary.scratch_dir("restored"));
        let into = dir.display().to_string();
        primary.tool("pg_basebackup", &["-D", &into, "-c", "fast", "-X", "fetch", "--no-sync"]);
        let mut restored = TestPg::attach(installation, &dir);
        std::fs::write(dir.join("recovery.signal"), "").expect("recovery.signal");
        for setting in ["recovery_target=immediate", "recovery_target_action=shutdown", "restore_command=false"] {
            restored.set(setting);
        }
        if ok(restored.start()) == Started::AcceptsConnections {
            // For a moment it was a hot standby at its target; we happened to look just then.
            assert!(ok(restored.wait_until_exit(Duration::from_secs(30))).success());
        }
        assert!(restored.log().contains("shutdown at recovery target"), "{}", restored.log());
    });
}

#[test]
fn a_tool_that_hangs_is_killed_and_one_that_fails_is_quoted() {
    let pg = TestPg::start(any_major(), "");
    let sleep = ["-X", "-d", "postgres", "-c", "SELECT pg_sleep(60)"];
    let error = Instance::tool(&pg, "psql", &sleep, Duration::from_millis(300)).expect_err("too slow");
    assert!(matches!(error, InstanceError::Deadline { .. }), "{error}");
    let error = Instance::sql(&pg, "SELECT nonsense").expect_err("no such column");
    assert!(error.to_string().contains("column \"nonsense\" does not exist"), "{error}");
}

#[test]
fn a_directory_without_a_server_is_refused_by_name() {
    let error = Installation::at(std::path::Path::new("/usr/bin/nowhere")).expect_err("nothing is there");
    assert!(error.to_string().contains("/usr/bin/nowhere holds no usable PostgreSQL server: postgres is missing"));
    assert!(matches!(Installation::find(Some(7)), Err(InstanceError::NoInstallation { .. })));
}

#[test]
fn attaching_below_a_closed_directory_says_which_one() {
    if !rustix::process::geteuid().is_root() {
        return; // an ordinary user runs the server as itself
    }
    let closed = tempfile::tempdir().expect("a directory of root's");
    std::fs::set_permissions(closed.path(), Permissions::from_mode(0o700)).expect("chmod");
    let error = Instance::attach(any_major().clone(), &closed.path().join("data")).expect_err("closed");
    assert!(matches!(&error, InstanceError::Unreachable { dir, .. } if dir == closed.path()), "{error}");
}
