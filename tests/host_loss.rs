//! The database host is lost, by seed: clients commit, each by its own level of `synchronous_commit`; the server is killed with
//! SIGKILL at a random moment and its data directory is deleted, sometimes together with the archiver; what is archived is
//! restored to its newest instant. A synchronous archive gives back every commit whose client got its answer, out of a
//! directory and out of a bucket that fails meanwhile.
//!
//! `PGKEEP_SEEDS` says how many seeds for each kind of repository (2 where it is not set), `PGKEEP_SEED` which one is the first.
//! `PGKEEP_HOST_LOSS=ROUNDS` prints what an asynchronous archive loses; without it nothing is measured.

#[path = "support/s3/mod.rs"]
mod s3;
#[path = "support/stores.rs"]
mod stores;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pgkeep::pg::conninfo::Environment;
use pgkeep::pg::instance::StopMode;
use pgkeep::pg::{ConnInfo, ConnectOptions, Session};
use s3::{S3Faults, TestS3, TestS3Options};
use stores::{At, Random, SOON, Stores};
use support::{Installation, TestPg, any_major, ok, wait_until};
use tempfile::TempDir;

/// What commits may wait for, where they wait for the archive.
const LEVELS: [&str; 3] = ["remote_write", "on", "remote_apply"];
const CLIENTS: usize = 12;
/// Rows that all clients update.
const ACCOUNTS: u64 = 50;

/// A data directory that every seed begins with a copy of: `initdb` takes longer than all the rest.
struct Template {
    dir: TempDir,
    installation: &'static Installation,
}

impl Template {
    fn new(mib: u64) -> Template {
        let installation = any_major();
        let mut pg = TestPg::start_segmented(installation, mib, "max_connections = 40\n");
        pg.sql(&format!(
            "CREATE TABLE judged (id bigint, delta bigint); CREATE TABLE accounts (id bigint PRIMARY KEY, balance bigint); \
             INSERT INTO accounts SELECT n, 0 FROM generate_series(0, {}) n",
            ACCOUNTS - 1
        ));
        ok(pg.stop(StopMode::Fast));
        let dir = tempfile::Builder::new().prefix("pgh").permissions(Permissions::from_mode(0o755)).tempdir_in("/tmp");
        let template = Template { dir: ok(dir), installation };
        template.copy(pg.data_dir(), "template");
        template
    }

    fn copy(&self, from: &std::path::Path, name: &str) -> PathBuf {
        let to = self.dir.path().join(name);
        assert!(ok(Command::new("cp").arg("-a").arg("--").arg(from).arg(&to).status()).success());
        to
    }

    /// A host: a data directory of its own, and its server.
    fn host(&self, name: &str, conf: &str) -> TestPg {
        let data = self.copy(&self.dir.path().join("template"), name);
        let mut pg = TestPg::attach(self.installation, &data);
        ok(pg.append_conf(conf));
        pg.set("fsync=off"); // the machine does not crash
        ok(pg.start());
        pg
    }
}

/// Commits that have returned: when, and under which level.
type Noted = BTreeMap<u64, (Instant, usize)>;

/// Clients that move money to an account and note it, in one transaction each, until the server is gone.
struct Load {
    stop: Arc<AtomicBool>,
    noted: Arc<Mutex<Noted>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(pg: &TestPg, pause: Duration) -> Load {
        let (stop, noted, next) = (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::new(AtomicU64::new(1)));
        let client = |number: usize| {
            let (stop, noted, next) = (Arc::clone(&stop), Arc::clone(&noted), Arc::clone(&next));
            let info = ok(ConnInfo::resolve(&pg.conninfo(), &Environment::default()));
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                // It ends when the server does.
                let _ = runtime.block_on(commit(&info, number % LEVELS.len(), &stop, &noted, &next, pause));
            })
        };
        Load { threads: (0..CLIENTS).map(client).collect(), stop, noted }
    }

    fn count(&self) -> usize {
        self.noted.lock().expect("clients do not panic").len()
    }

    fn finish(self) -> Noted {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().expect("clients do not panic"));
        self.noted.lock().expect("clients do not panic").clone()
    }
}

async fn commit(
    info: &ConnInfo,
    level: usize,
    stop: &AtomicBool,
    noted: &Mutex<Noted>,
    next: &AtomicU64,
    pause: Duration,
) -> Result<(), pgkeep::pg::PgError> {
    let options = ConnectOptions { timeout: Duration::from_secs(60), ..ConnectOptions::default() };
    let mut session = Session::connect(info, &options).await?;
    session.query(&format!("SET synchronous_commit = {}", LEVELS[level])).await?;
    while !stop.load(Ordering::Relaxed) {
        let id = next.fetch_add(1, Ordering::Relaxed);
        let (account, delta) = (id.wrapping_mul(7919) % ACCOUNTS, id % 100);
        let sql = format!(
            "WITH moved AS (UPDATE accounts SET balance = balance + {delta} WHERE id = {account}) \
             INSERT INTO judged VALUES ({id}, {delta})"
        );
        session.query(&sql).await?;
        noted.lock().expect("clients do not panic").insert(id, (Instant::now(), level));
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

/// What a restore gave back of what was noted.
struct Loss {
    noted: usize,
    /// Noted, and not there.
    missing: Vec<u64>,
    /// From the answer to the newest commit that is there until the loss.
    age: Duration,
}

/// Restores to the newest instant and looks.
fn restored(stores: &Stores<'_>, template: &Template, noted: &Noted, lost_at: Instant) -> Loss {
    stores.restore("latest", "restored", &["--action", "promote"]).exits(0);
    let pg = stores.started_again(template.installation, "restored");
    let there: BTreeSet<u64> = pg.sql("SELECT id FROM judged").lines().map(|id| id.parse().expect("an id")).collect();
    let sums = pg.sql("SELECT (SELECT sum(balance) FROM accounts) = (SELECT coalesce(sum(delta), 0) FROM judged)");
    assert_eq!(sums, "t", "a transaction was restored in part");
    drop(pg);
    ok(fs::remove_dir_all(stores.path("restored")));
    let newest = noted.iter().filter(|(id, _)| there.contains(id)).map(|(_, (at, _))| *at).max();
    Loss {
        noted: noted.len(),
        missing: noted.keys().filter(|id| !there.contains(id)).copied().collect(),
        age: newest.map_or(Duration::MAX, |newest| lost_at.saturating_duration_since(newest)),
    }
}

/// The host is gone: its processes and its disk.
fn lose(mut pg: TestPg) -> Instant {
    let at = Instant::now();
    ok(pg.kill());
    let data = pg.data_dir().to_owned();
    drop(pg);
    ok(fs::remove_dir_all(data));
    at
}

/// What a bucket does to the load: a bad network all the time, and sometimes worse for a while.
fn fail(s3: &TestS3, random: &mut Random, seed: u64) -> String {
    let often = 0.01 + random.below(8) as f64 / 100.0;
    s3.set_faults(S3Faults::network(often), seed);
    match random.below(6) {
        0 => s3.down(true),
        1 => s3.freeze(true),
        2 => s3.refuse(Some((503, "SlowDown"))),
        3 => s3.lose_answers_of(Some("PutObject")),
        _ => return format!("faults {often:.2}"),
    }
    random.pause(100, 1500);
    mend(s3);
    s3.set_faults(S3Faults::network(often), seed);
    format!("faults {often:.2} and worse")
}

fn mend(s3: &TestS3) {
    s3.down(false);
    s3.freeze(false);
    s3.refuse(None);
    s3.lose_answers_of(None);
    s3.set_faults(S3Faults::none(), 0);
}

/// One host, from its beginning to its loss, and what is given back.
fn host_is_lost(template: &Template, seed: u64, bucket: bool) {
    let began = Instant::now();
    let mut random = Random(seed);
    let s3 = bucket.then(|| TestS3::start(TestS3Options::default()));
    let place = s3.as_ref().map_or(At::Directory, At::Bucket);
    let mut pg = template.host("host", "");
    let mut stores = Stores::new(&pg, &[("main", place, 0)]);
    let interval = ["0s", "5ms", "25ms"][random.below(3) as usize];
    stores.receives(&["main"], &format!("synchronous = true\nrange_interval = {interval:?}"));
    stores.start();
    wait_until("the archiver to stream", SOON, || pg.sql("SELECT count(*) FROM pg_stat_replication") == "1");
    stores.done(&["backup"]);
    pg.sql("ALTER SYSTEM SET synchronous_standby_names = 'pgkeep'");
    ok(pg.reload());
    wait_until("commits to wait", SOON, || {
        pg.sql("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") == "1"
    });
    let load = Load::start(&pg, Duration::ZERO);
    wait_until("the first commits", SOON, || load.count() > 20);
    let mut said = s3.as_ref().map_or_else(String::new, |s3| fail(s3, &mut random, seed));
    if random.below(2) == 0 {
        random.pause(0, 500);
        stores.kill();
        stores.start();
        said += ", archiver killed before";
    }
    if random.below(3) == 0 {
        pg.sql("SELECT pg_switch_wal()");
    }
    random.pause(50, 1500); // the random moment itself
    let order = random.below(3);
    if order == 1 {
        stores.kill();
        random.pause(0, 50);
    }
    let lost_at = lose(pg);
    if order == 2 {
        stores.kill();
    }
    let noted = load.finish();
    s3.as_ref().map(mend);
    let loss = restored(&stores, template, &noted, lost_at);
    let kind = if bucket { "bucket" } else { "directory" };
    let archiver = ["archiver goes on", "archiver dies before", "archiver dies with it"][order as usize];
    eprintln!(
        "seed {seed}, {kind}, {archiver}, {interval} {said}: {} commits, {} missing, {:.1} s",
        loss.noted,
        loss.missing.len(),
        began.elapsed().as_secs_f64()
    );
    assert!(loss.noted > 20, "seed {seed}: nothing was shown");
    let (count, first) = (loss.missing.len(), loss.missing.first());
    assert!(count == 0, "seed {seed}: {count} commits that were answered are missing, the first is {first:?}");
    // Each level got answers, and so none of them hangs.
    for (level, name) in LEVELS.iter().enumerate() {
        let answered = noted.values().filter(|(_, of)| *of == level).count();
        assert!(answered > 0, "seed {seed}: no commit returned under synchronous_commit = {name}");
    }
}

/// The seeds of this run.
fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
    };
    let first = number("PGKEEP_SEED", 1);
    first..first + number("PGKEEP_SEEDS", 2)
}

#[test]
fn p1_host_loss_every_answered_commit_is_in_the_directory() {
    let template = Template::new(1);
    seeds().for_each(|seed| host_is_lost(&template, seed, false));
}

#[test]
fn p1_host_loss_every_answered_commit_is_in_the_bucket() {
    let template = Template::new(1);
    seeds().for_each(|seed| host_is_lost(&template, seed, true));
}

/// How WAL gets into the repository where commits do not wait for it.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// `max_delay = "1s"`, and the archiver is lost with the host.
    MaxDelay,
    /// The same, and the archiver runs elsewhere: what it has received it still puts.
    MaxDelayElsewhere,
}

/// Not in CI: ten seconds for each round. A few hundred commits a second.
#[test]
fn what_is_lost_where_commits_do_not_wait() {
    let Ok(rounds) = std::env::var("PGKEEP_HOST_LOSS") else { return };
    let rounds: u64 = rounds.parse().expect("PGKEEP_HOST_LOSS is a number of rounds");
    let template = Template::new(16);
    for way in [Way::MaxDelay, Way::MaxDelayElsewhere] {
        let (mut ages, mut commits, mut all) = (Vec::new(), Vec::new(), 0);
        for seed in 1..=rounds {
            let loss = asynchronous(&template, seed, way);
            eprintln!("{way:?}, seed {seed}: {} commits, {} lost, {:?}", loss.noted, loss.missing.len(), loss.age);
            ages.push(loss.age);
            commits.push(loss.missing.len());
            all += loss.noted;
        }
        ages.sort();
        commits.sort_unstable();
        let middle = ages.len() / 2;
        eprintln!(
            "{way:?}: {rounds} losses, {all} commits; lost: median {} commits and {:?}, most {} commits and {:?}",
            commits[middle],
            ages[middle],
            commits.last().expect("rounds"),
            ages.last().expect("rounds")
        );
    }
}

fn asynchronous(template: &Template, seed: u64, way: Way) -> Loss {
    let mut random = Random(seed);
    let pg = template.host("host", "");
    let mut stores = Stores::new(&pg, &[("main", At::Directory, 0)]);
    stores.receives(&["main"], "max_delay = \"1s\"");
    stores.start();
    wait_until("the archiver to stream", SOON, || pg.sql("SELECT count(*) FROM pg_stat_replication") == "1");
    stores.done(&["backup"]);
    let load = Load::start(&pg, Duration::from_millis(30));
    random.pause(3_000, 6_000);
    let lost_at = Instant::now();
    if matches!(way, Way::MaxDelay) {
        stores.kill();
    }
    lose(pg);
    let noted = load.finish();
    if matches!(way, Way::MaxDelayElsewhere) {
        stores.stop(); // it has put what it had
    }
    restored(&stores, template, &noted, lost_at)
}
