//! Commits that wait for the archive, as the user meets them: every level returns, what returned is in the repository, `check`
//! says whether the server really waits, a standby is refused as a source, and the emergency exit of the guide frees who waits.
//! And where commits do not wait: `max_delay`, measured.

#[path = "support/s3/mod.rs"]
mod s3;
#[path = "support/stores.rs"]
mod stores;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgkeep::archive::ArchiveOptions;
use pgkeep::catalog::Repository;
use pgkeep::seal::KeyFile;
use pgkeep::store::faulty::{FaultPlan, Faulty};
use pgkeep::store::memory::{MemoryOptions, MemoryStore};
use pgkeep::store::{Store, list_all};
use pgkeep::types::{Branch, Lsn, TimelineId};
use secrecy::ExposeSecret;
use serde_json::Value;
use stores::{At, SOON, Stores};
use support::archiver::{Archive, Archiver, cluster, flushed, options, standby_of};
use support::{TestPg, any_major, ok, wait_until};

/// As the guide says it.
const NAME_US: &str = "ALTER SYSTEM SET synchronous_standby_names = 'pgkeep'";
const SWITCH_OFF: &str = "ALTER SYSTEM SET synchronous_standby_names = ''";

/// What `check` says of an item: its state and its sentence.
fn checked(stores: &Stores<'_>, item: &str) -> (String, String) {
    let report = stores.json(&["check"]);
    let text = |of: &Value, name: &str| of[name].as_str().unwrap_or_default().to_owned();
    let items = report["items"].as_array().expect("items");
    let found = items.iter().find(|of| of["item"] == item).unwrap_or_else(|| panic!("no {item} in {report}"));
    (text(found, "state"), format!("{} {}", text(found, "found"), text(found, "todo")))
}

fn is_counted(pg: &TestPg) -> bool {
    pg.sql("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") == "1"
}

#[test]
fn p1_commits_wait_for_the_archive_under_every_level_and_check_knows() {
    let installation = any_major();
    let mut pg = TestPg::start_segmented(installation, 1, "");
    pg.sql("CREATE TABLE t (g int)");
    let mut stores = Stores::new(&pg, &[("main", At::Directory, 0)]);
    stores.receives(&["main"], "synchronous = true");
    let (state, said) = checked(&stores, "synchronous");
    assert!(state == "warn" && said.contains("does not name us"), "{state}: {said}");
    stores.start();
    pg.sql(NAME_US);
    ok(pg.reload());
    wait_until("commits to wait", SOON, || is_counted(&pg));
    let (state, said) = checked(&stores, "synchronous");
    assert!(state == "ok" && said.contains("counts pgkeep as sync"), "{state}: {said}");

    // What returned is held by the repository itself, whoever asks it, and whatever is done to the archiver.
    for (round, level) in ["remote_write", "on", "remote_apply"].into_iter().enumerate() {
        pg.sql(&format!("SET synchronous_commit = {level}; INSERT INTO t VALUES ({round})"));
        let at = flushed(&pg);
        stores.kill();
        let held = stores.frontiers()["main"];
        assert!(held >= at, "{level}: a commit at {at} returned, and {held} is in the repository");
        stores.start();
        wait_until("commits to wait again", SOON, || is_counted(&pg));
    }
    let safe = &stores.json(&["list"])["safe"][0];
    assert_eq!((safe["behind_bytes"].as_u64(), safe["behind_seconds_at_most"].as_u64()), (Some(0), Some(0)), "{safe}");
    assert_eq!((&safe["server"]["sync_state"], &safe["needed"]), (&"sync".into(), &1.into()), "{safe}");
    assert_eq!(safe["durable"], safe["durable_in_one"], "{safe}");
    stores.done(&["list"]).says("the server counts pgkeep as sync").says("all that the server had flushed");

    // The archive is away: commits wait. The guide's exit lets them go.
    stores.kill();
    wait_until("nobody to stream", SOON, || pg.sql("SELECT count(*) FROM pg_stat_replication") == "0");
    let (state, said) = checked(&stores, "synchronous");
    assert!(state == "not-ok" && said.contains("hang") && said.contains(SWITCH_OFF), "{state}: {said}");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| pg.sql("INSERT INTO t VALUES (100)"));
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        wait_until("the commit to wait", SOON, || pg.sql(waits) == "1");
        pg.sql(SWITCH_OFF);
        pg.sql("SELECT pg_reload_conf()");
        waiting.join().expect("it is let go");
    });

    // A standby as the source: said by both, before anything is done.
    let standby = standby_of(&pg, installation);
    let text = ok(fs::read_to_string(stores.path("pgkeep.toml")));
    ok(fs::write(stores.path("pgkeep.toml"), text.replace(&pg.conninfo(), &standby.conninfo())));
    let (state, said) = checked(&stores, "synchronous");
    assert!(state == "not-ok" && said.contains("the server is a standby"), "{state}: {said}");
    stores.ran(&["run"]).exits(2).says("no commit ever waits for who streams from a standby");
}

/// One commit a second, and how old the oldest of them gets that could not be restored.
fn oldest_of_a_trickle(
    pg: &TestPg,
    archive: &Archive,
    archiver: &Archiver,
    reader: &Repository,
    commits: u32,
) -> Duration {
    let branch = Branch::first(TimelineId::FIRST);
    let id = || ok(archive.runtime.block_on(reader.clusters_named(&cluster()))).first().cloned();
    let restorable = || {
        let inventory = id().map(|id| ok(archive.runtime.block_on(reader.load(&id))));
        inventory.and_then(|inventory| inventory.frontier(branch)).unwrap_or(Lsn::ZERO)
    };
    archiver.wait_durable(flushed(pg));
    let (begin, mut pending, mut oldest) = (Instant::now(), BTreeMap::new(), Duration::ZERO);
    let mut made = 0;
    while made < commits || !pending.is_empty() {
        if made < commits && begin.elapsed() >= Duration::from_secs(1) * made {
            let at = Instant::now();
            pg.sql("INSERT INTO t VALUES (1)");
            pending.insert(flushed(pg), at); // behind the commit's record
            made += 1;
        }
        let held = restorable();
        let seen = Instant::now();
        let still = pending.split_off(&held.advance(1));
        for at in std::mem::replace(&mut pending, still).into_values() {
            oldest = oldest.max(seen - at);
        }
        assert!(begin.elapsed() < SOON, "{pending:?} are not restorable, {held} is");
        std::thread::sleep(Duration::from_millis(20));
    }
    oldest
}

/// Names and lengths of all there is.
fn objects(archive: &Archive, store: &dyn Store) -> Vec<(String, u64)> {
    let all = ok(archive.runtime.block_on(list_all(store, "")));
    all.into_iter().map(|object| (object.key.to_string(), object.len)).collect()
}

/// Whoever writes nothing has nothing written. The server writes a little by itself now and then: such a span is not judged.
fn assert_rest_writes_nothing(pg: &TestPg, archive: &Archive, archiver: &Archiver, store: &dyn Store) {
    for _ in 0..20 {
        let before = flushed(pg);
        archiver.wait_durable(before);
        let there = objects(archive, store);
        std::thread::sleep(Duration::from_millis(2500)); // the span itself: more than two max_delays
        let after = objects(archive, store);
        if flushed(pg) == before {
            assert_eq!(there, after, "a cluster at rest wrote something");
            return;
        }
    }
    panic!("the server never was at rest");
}

/// A machine that stands still for a second is not judged: what is wrong is wrong each time.
fn assert_within(bound: Duration, what: &str, measure: impl Fn() -> Duration) {
    let mut ages = Vec::new();
    while ages.len() < 4 {
        ages.push(measure());
        eprintln!("{what}: the oldest commit that could not be restored was {:?} old", ages[ages.len() - 1]);
        if ages[ages.len() - 1] <= bound + SLACK {
            return;
        }
    }
    panic!("{what}: {ages:?}");
}

const SLACK: Duration = Duration::from_millis(450);

#[test]
fn a_trickle_is_restorable_within_max_delay_and_one_put_and_rest_writes_nothing() {
    let pg = TestPg::start_segmented(any_major(), 1, "autovacuum = off\n");
    pg.sql("CREATE TABLE t (g int)");
    let second = Duration::from_secs(1);
    let options = ArchiveOptions { max_delay: second, ..options() };

    let archive = Archive::new();
    let archiver = archive.start_with(&pg, options);
    let reader = archive.reopened();
    assert_within(second, "a directory, max_delay 1 s", || oldest_of_a_trickle(&pg, &archive, &archiver, &reader, 5));
    assert_rest_writes_nothing(&pg, &archive, &archiver, reader.store().as_ref());
    archiver.stop(&archive);

    // Every put takes longer than max_delay: the next one does not wait for it.
    let put = Duration::from_millis(1500);
    let inner = Arc::new(MemoryStore::with(MemoryOptions { appends: false, ..MemoryOptions::default() }));
    let slow = FaultPlan { delay: 1.0, delay_from: put, delay_to: put, ..FaultPlan::none() };
    let faults = Arc::new(Faulty::new(Arc::clone(&inner) as Arc<dyn Store>, FaultPlan::none(), 1));
    let archive = Archive::over(|_| Arc::clone(&faults) as Arc<dyn Store>);
    let key = ok(KeyFile::read(archive.key.render().expose_secret().as_bytes(), None));
    let reader = ok(archive.runtime.block_on(Repository::open("main", inner, key)));
    let archiver = archive.start_with(&pg, options);
    pg.sql("INSERT INTO t VALUES (1)");
    archiver.wait_durable(flushed(&pg));
    faults.set_plan(slow);
    assert_within(second + put, "puts of 1.5 s, max_delay 1 s", || {
        oldest_of_a_trickle(&pg, &archive, &archiver, &reader, 5)
    });
    faults.set_plan(FaultPlan::none());
    assert_rest_writes_nothing(&pg, &archive, &archiver, reader.store().as_ref());
    archiver.stop(&archive);
}
