//! A synchronous archive in a world of its own: PostgreSQL, an S3 server and pgkeep in a container each, which are cut off,
//! paused, moved, filled up and destroyed while clients commit. Whatever happened: each commit that returned to its client
//! is in the cluster that is restored in the end.
//!
//! Needs a Docker engine and `PGKEEP_CONTAINERS` (`testenv/containers.sh`); without it the tests pass and say that they were skipped.

mod support;

#[path = "support/containers.rs"]
mod containers;
#[path = "support/s3/mod.rs"]
mod s3;

use std::collections::BTreeSet;

use containers::{CONFIG, Load, S3_PORT, Wanted, World, wait_for};
use pgkeep::seal::KeyFile;
use s3::{TestS3, TestS3Options};
use secrecy::ExposeSecret;
use support::ok;

/// The S3 server's container runs this binary again, with `PGKEEP_TEST_S3_LISTEN` set. Else nothing.
#[test]
fn s3_server() {
    let Ok(listen) = std::env::var("PGKEEP_TEST_S3_LISTEN") else { return };
    let _server = TestS3::start(TestS3Options { listen: ok(listen.parse()), ..TestS3Options::default() });
    loop {
        std::thread::park();
    }
}

/// What all containers are given: the configuration and the key. Nothing else moves with pgkeep.
fn hand_out(world: &mut World, place: &str, servers: &[&str]) {
    let hosts: Vec<String> = servers.iter().map(|name| world.full(name)).collect();
    let attributes = if hosts.len() > 1 { " target_session_attrs=read-write" } else { "" };
    let conninfo = format!("host={} user=postgres connect_timeout=3{attributes}", hosts.join(","));
    let config = format!(
        "[repository.main]\n{place}\nkey_file = \"/etc/pgkeep/main.key\"\n\n[cluster.main]\nconninfo = {conninfo:?}\n\
         repositories = [\"main\"]\nsynchronous = true\n"
    );
    let key = KeyFile::generate().expect("a key").render();
    world.handed.insert("pgkeep.toml".to_owned(), config);
    world.handed.insert("main.key".to_owned(), key.expose_secret().to_owned());
    world.handed.insert("conninfo".to_owned(), conninfo);
}

/// `pgkeep run`. The first one makes repository and slot.
fn keeper(world: &mut World, name: &str, networks: &[&str], volumes: &[(&str, &str)], init: Option<&str>) {
    let run = format!("exec $as_postgres pgkeep --config {CONFIG} run");
    let script = match init {
        None => run,
        Some(repo) => format!(
            "conninfo=$(cat /etc/pgkeep/conninfo)
             $as_postgres pgkeep --config {CONFIG} init --pg \"$conninfo\" {repo} --key-file /etc/pgkeep/main.key --yes
             {run}"
        ),
    };
    world.start(Wanted { name, networks, volumes, script, ..Wanted::default() });
}

/// An S3 server, and its bucket as the place of the repository: lines of the configuration, and what `init` is told.
fn bucket(world: &mut World, networks: &[&str]) -> (String, String) {
    let (access, secret) = s3::keys();
    for (name, value) in [("AWS_ACCESS_KEY_ID", access), ("AWS_SECRET_ACCESS_KEY", secret), ("AWS_REGION", "us-east-1")]
    {
        world.environment.insert(name.to_owned(), value.to_owned());
    }
    world.environment.insert("AWS_EC2_METADATA_DISABLED".to_owned(), "true".to_owned());
    world.s3("s3", networks, "s3_server");
    let (url, endpoint) = ("s3://archive/of", format!("http://{}:{S3_PORT}", world.full("s3")));
    let place = format!("url = {url:?}\nendpoint = {endpoint:?}\nregion = \"us-east-1\"");
    (place, format!("--repo {url} --endpoint {endpoint}"))
}

/// Restores to latest on another host, starts a server there, and judges: everything that was noted is in it.
fn judge(world: &mut World, networks: &[&str], repository: &[(&str, &str)], noted: &BTreeSet<u64>) {
    world.volume("restored", None);
    let restore =
        format!("$as_postgres pgkeep --config {CONFIG} restore --to latest --pgdata /data/pg --action promote");
    let volumes = [&[("restored", "/data")], repository].concat();
    world.postgres("restored", networks, &volumes, Some(&restore));
    world.wait_ready("restored", true);
    let there = world.sql("restored", "SELECT id::text FROM judged");
    let there: BTreeSet<u64> = there.lines().map(|id| ok(id.parse())).collect();
    let lost: Vec<_> = noted.difference(&there).collect();
    eprintln!("{} commits returned, {} are restored", noted.len(), there.len());
    assert!(lost.is_empty(), "{} of {} commits that returned are lost: {lost:?}", lost.len(), noted.len());
}

/// Commits wait while it lasts, none returns, and they go on afterwards.
#[track_caller]
fn while_waiting(world: &World, load: &Load, server: &str, what: &str, lasts: impl FnOnce(&World)) {
    let since = std::time::Instant::now();
    let returned = load.wait_all_wait(world, server);
    lasts(world);
    assert_eq!(load.noted(), returned, "{what}: a commit returned that nobody could have stored");
    eprintln!("{what}: {returned} commits so far; waited for {:.1} s", since.elapsed().as_secs_f32());
}

#[test]
fn p1_cut_off_paused_and_moved_and_then_the_primary_is_lost_with_its_volume() {
    let Some(mut world) = World::new("cut", &[15]) else { return };
    world.network("db");
    world.network("store");
    let (place, repo) = bucket(&mut world, &["store"]);
    hand_out(&mut world, &place, &["a"]);
    world.volume("a", None);
    world.postgres("a", &["db"], &[("a", "/data")], None);
    world.wait_ready("a", true);
    keeper(&mut world, "keeper", &["db", "store"], &[], Some(&repo));
    world.sql("a", "CREATE TABLE judged (id bigint, filler text)"); // returns when it is archived
    world.pgkeep("keeper", "backup");
    let load = Load::start(world.conninfo(&["a"]), 4);
    load.more(100);

    // From the server, for a moment.
    let walsender =
        "SELECT pid::text FROM pg_stat_replication WHERE application_name = 'pgkeep' AND state = 'streaming'";
    world.cut("keeper", "db");
    while_waiting(&world, &load, "a", "server cut off", |_| ());
    world.heal("keeper", "db");
    load.more(50);

    // Until the server has given the connection up.
    world.cut("keeper", "db");
    while_waiting(&world, &load, "a", "server cut off for long", |world| {
        wait_for("the server to give up", || world.sql("a", walsender).is_empty());
    });
    world.heal("keeper", "db");
    load.more(50);

    // From the store: the connection to the server stays.
    let before = world.sql("a", walsender);
    world.cut("keeper", "store");
    while_waiting(&world, &load, "a", "store cut off", |_| ());
    world.heal("keeper", "store");
    load.more(50);
    world.pause("s3");
    while_waiting(&world, &load, "a", "store paused", |_| ());
    world.go_on("s3");
    load.more(50);
    assert_eq!(world.sql("a", walsender), before, "the connection to the server was given up for the store's sake");

    // Until pgkeep has given the store up.
    world.cut("keeper", "store");
    while_waiting(&world, &load, "a", "store cut off for long", |world| {
        world.wait_log("keeper", "this repository is away");
    });
    world.heal("keeper", "store");
    load.more(50);

    // Another host: the configuration and the key are all that comes along.
    world.destroy("keeper");
    while_waiting(&world, &load, "a", "pgkeep moved", |_| ());
    keeper(&mut world, "elsewhere", &["store", "db"], &[], None);
    load.more(100);

    world.destroy("a");
    world.remove_volume("a");
    world.destroy("elsewhere");
    judge(&mut world, &["store"], &[], &load.finish());
}

#[test]
fn p1_a_standby_is_promoted_comes_back_under_another_address_and_is_lost() {
    let Some(mut world) = World::new("failover", &[17, 18, 16, 14]) else { return };
    world.network("net");
    let (place, repo) = bucket(&mut world, &["net"]);
    hand_out(&mut world, &place, &["a", "b"]);
    world.volume("a", None);
    world.volume("b", None);
    world.postgres("a", &["net"], &[("a", "/data")], None);
    world.wait_ready("a", true);
    keeper(&mut world, "keeper", &["net"], &[], Some(&repo));
    world.sql("a", "CREATE TABLE judged (id bigint, filler text)");
    world.pgkeep("keeper", "backup");

    // A standby as docs/standby.md has it: it streams, and what it did not get that way is in the archive.
    let standby = format!(
        "restore_command = 'exec pgkeep --config {CONFIG} wal fetch --standby %f %p'\nrecovery_target_lsn = ''\n\
         recovery_target_timeline = 'latest'\nprimary_conninfo = 'host={} user=postgres application_name=b'\n\
         synchronous_standby_names = 'pgkeep'\n",
        world.full("a")
    );
    world.handed.insert("standby.conf".to_owned(), standby);
    let restore = format!(
        "$as_postgres pgkeep --config {CONFIG} restore --to latest --pgdata /data/pg
         cat /etc/pgkeep/standby.conf >> /data/pg/postgresql.auto.conf
         mv /data/pg/recovery.signal /data/pg/standby.signal"
    );
    world.postgres("b", &["net"], &[("b", "/data")], Some(&restore));
    world.wait_ready("b", false);
    let streams = "SELECT count(*)::text FROM pg_stat_replication WHERE application_name = 'b'";
    wait_for("the standby to stream", || world.sql("a", streams) == "1");
    let load = Load::start(world.conninfo(&["a"]), 4);
    load.more(100);

    // The standby does not get the last commits by streaming: only the archive has them.
    world.pause("b");
    load.more(50);
    world.destroy("a");
    world.remove_volume("a");
    world.go_on("b");
    assert_eq!(world.sql("b", "SELECT pg_promote()::text"), "true");
    load.redirect(world.conninfo(&["b"]));
    load.more(100);
    assert_eq!(world.sql("b", "SELECT timeline_id::text FROM pg_control_checkpoint()"), "2");

    // Made again under its name, with another address: somebody else has the old one.
    let old = world.address("b", "net");
    world.destroy("b");
    for name in ["squatter", "and-another"] {
        // The first may get the address of `a`.
        world.start(Wanted { name, networks: &["net"], script: "exec sleep 600".into(), ..Wanted::default() });
        if world.address(name, "net") == old {
            break;
        }
    }
    world.postgres("b", &["net"], &[("b", "/data")], None);
    assert_ne!(world.address("b", "net"), old);
    world.wait_ready("b", true);
    load.redirect(world.conninfo(&["b"]));
    load.more(50);

    world.destroy("b");
    world.remove_volume("b");
    world.destroy("keeper");
    judge(&mut world, &["net"], &[], &load.finish());
}

#[test]
fn p1_a_full_disk_is_said_and_loses_nothing() {
    let Some(mut world) = World::new("full", &[13, 14, 16]) else { return };
    world.network("net");
    world.volume("small", Some(48));
    hand_out(&mut world, "path = \"/small/repository\"", &["a"]);
    world.volume("a", None);
    world.postgres("a", &["net"], &[("a", "/data")], None);
    world.wait_ready("a", true);
    let small = [("small", "/small")];
    keeper(&mut world, "keeper", &["net"], &small, Some("--repo /small/repository"));
    world.sql("a", "CREATE TABLE judged (id bigint, filler text)");
    world.pgkeep("keeper", "backup");
    let load = Load::start(world.conninfo(&["a"]), 4);
    load.more(100);

    let (_, said) = world.ran("keeper", "cat /dev/zero > /small/filler");
    assert!(said.contains("No space left"), "{said}");
    // What is preallocated may still be filled; this is more. Not in a transaction: nobody waits for it.
    let random = "SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 400000)";
    world.sql("a", &format!("SELECT pg_logical_emit_message(false, 'fill', ({random}))::text"));
    world.wait_log("keeper", "No space left");
    while_waiting(&world, &load, "a", "disk full", |_| ());
    world.done("keeper", "rm /small/filler");
    load.more(100);

    world.destroy("a");
    world.remove_volume("a");
    judge(&mut world, &["net"], &small, &load.finish());
}
