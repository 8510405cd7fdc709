//! pgkeep and PostgreSQL are killed with SIGKILL at random moments, by seed, while clients commit. Then the archive is
//! restored: to the newest instant, and to earlier commits. The log of acknowledged commits is the judge.
//!
//! `PGKEEP_SEED` chooses the seed; a failure prints it.

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pgkeep::pg::instance::give_to_server_user;
use support::{TestPg, any_major, ok, wait_until};

const CLIENTS: u64 = 4;
const KILLS: usize = 14;

/// SplitMix64: a seed, and numbers that follow from it.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Commits whose clients got their answers: the row's id and its transaction.
type Acknowledged = BTreeMap<u64, u64>;

/// Commits rows, one per transaction, until told to stop; notes an id when its commit has returned.
fn clients(conninfo: &str, stop: &Arc<AtomicBool>, log: &Arc<Mutex<Acknowledged>>) -> Vec<std::thread::JoinHandle<()>> {
    use pgkeep::pg::conninfo::Environment;
    use pgkeep::pg::{ConnInfo, ConnectOptions, Session};
    let next = Arc::new(AtomicU64::new(1));
    let client = |_| {
        let (stop, log, next) = (Arc::clone(stop), Arc::clone(log), Arc::clone(&next));
        let info = ok(ConnInfo::resolve(conninfo, &Environment::default()));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                while !stop.load(Ordering::Relaxed) {
                    let options = ConnectOptions { timeout: Duration::from_secs(5), ..ConnectOptions::default() };
                    let Ok(mut session) = Session::connect(&info, &options).await else {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        continue;
                    };
                    while !stop.load(Ordering::Relaxed) {
                        let id = next.fetch_add(1, Ordering::Relaxed);
                        let sql = format!(
                            "INSERT INTO judged VALUES ({id}, repeat('x', {})) RETURNING xmin::text::bigint",
                            id % 1500
                        );
                        match session.query(&sql).await {
                            Ok(rows) => {
                                let xid = rows[0].parse::<u64>(0).unwrap();
                                log.lock().unwrap().insert(id, xid);
                            }
                            Err(_) => break, // killed: whether it committed is not known
                        }
                    }
                }
            });
        })
    };
    (0..CLIENTS).map(client).collect()
}

/// `pgkeep` as the server's user can run it, and its configuration.
struct Keeper {
    dir: tempfile::TempDir,
}

impl Keeper {
    fn new(pg: &TestPg) -> Keeper {
        let dir = tempfile::Builder::new().prefix("pgkeep-kills").tempdir().unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_pgkeep"), dir.path().join("pgkeep")).unwrap();
        ok(give_to_server_user(dir.path()));
        let keeper = Keeper { dir };
        let init = ["init", "--yes", "--pg", &pg.conninfo(), "--repo", &keeper.path("repository")];
        keeper.checked(&init);
        let config = std::fs::read_to_string(keeper.path("pgkeep.toml")).unwrap();
        let config = config.replace("# max_delay = \"1s\"", "max_delay = \"100ms\"");
        std::fs::write(keeper.path("pgkeep.toml"), config).unwrap();
        keeper.own();
        keeper
    }

    /// What was written as root is the server user's too.
    fn own(&self) {
        ok(give_to_server_user(self.dir.path()));
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.path("pgkeep"));
        command.arg("--config").arg(self.path("pgkeep.toml")).args(args).stdin(Stdio::null());
        command
    }

    #[track_caller]
    fn checked(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "pgkeep {args:?}: {}\n{out}\n{err}", output.status);
        out.into_owned()
    }

    fn run(&self) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(self.path("run.log")).unwrap();
        self.command(&["run"]).stdout(Stdio::null()).stderr(log).spawn().unwrap()
    }

    /// Restores to `target`, lets the server replay and promote; gives the server.
    #[track_caller]
    fn restored(&self, installation: &support::Installation, target: &str, name: &str) -> TestPg {
        let pgdata = self.path(name);
        self.checked(&["restore", "--to", target, "--pgdata", &pgdata, "--action", "promote"]);
        self.own();
        let mut restored = TestPg::attach(installation, Path::new(&pgdata));
        ok(restored.start());
        wait_until("the end of recovery", Duration::from_secs(120), || {
            restored.sql("SELECT pg_is_in_recovery()") == "f"
        });
        restored
    }
}

/// The rows that are there, in order.
fn ids(pg: &TestPg) -> Vec<u64> {
    pg.sql("SELECT id FROM judged ORDER BY id").lines().map(|line| line.parse().unwrap()).collect()
}

/// The whole cluster as SQL, without what pg_dump makes up anew each time (newer minors: a random word).
fn dump(pg: &TestPg) -> String {
    let text = pg.tool("pg_dump", &["--no-sync", "postgres"]);
    text.lines()
        .filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"))
        .map(|line| format!("{line}\n"))
        .collect()
}

#[test]
fn p1_p2_kill_minus_nine_of_both_at_random_moments() {
    let seed = std::env::var("PGKEEP_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| Instant::now().elapsed().as_nanos() as u64 ^ u64::from(std::process::id()) << 16);
    eprintln!("seed {seed}: repeat with PGKEEP_SEED={seed}");
    let mut random = Random(seed);

    let installation = any_major();
    let mib = [1, 16][random.below(2) as usize];
    let mut pg = TestPg::start_segmented(installation, mib, "track_commit_timestamp = on\nfsync = on\n");
    pg.sql("CREATE TABLE judged (id bigint, filler text)");
    let keeper = Keeper::new(&pg);
    let mut run = keeper.run();
    keeper.checked(&["backup"]);

    let (stop, log) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Acknowledged::new())));
    let clients = clients(&pg.conninfo(), &stop, &log);
    for _ in 0..KILLS {
        std::thread::sleep(Duration::from_millis(50 + random.below(900))); // the random moment itself
        if random.below(3) == 0 {
            ok(pg.kill());
            ok(pg.start());
        } else {
            ok(run.kill());
            ok(run.wait());
            run = keeper.run();
        }
        if random.below(6) == 0 {
            pg.sql("SELECT pg_switch_wal()");
        }
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().unwrap();
    }
    let acknowledged = log.lock().unwrap().clone();
    assert!(acknowledged.len() > 100, "only {} commits: nothing was shown", acknowledged.len());

    // Everything reaches the repository, and the end of `run` is orderly.
    let end = pg.sql("SELECT pg_current_wal_flush_lsn()").parse::<pgkeep::types::Lsn>().unwrap();
    wait_until("the slot to reach the end", Duration::from_secs(60), || {
        let slot = pg.sql("SELECT coalesce(restart_lsn, '0/0') FROM pg_replication_slots WHERE slot_name = 'pgkeep'");
        slot.parse::<pgkeep::types::Lsn>().unwrap().advance(1) >= end
    });
    let killed = Command::new("kill").args(["-TERM", &run.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert!(run.wait().unwrap().success(), "{}", std::fs::read_to_string(keeper.path("run.log")).unwrap());

    let source =
        pg.sql("SELECT id || ' ' || extract(epoch FROM pg_xact_commit_timestamp(xmin)) FROM judged ORDER BY id");
    let commit_times: BTreeMap<u64, f64> = source
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(id, time)| (id.parse().unwrap(), time.parse().unwrap()))
        .collect();

    let restored = keeper.restored(installation, "latest", "latest");
    let latest = ids(&restored);
    assert!(dump(&restored) == dump(&pg), "seed {seed}: pg_dump of the restored cluster is not the source's");
    drop(restored);
    let all: Vec<u64> = commit_times.keys().copied().collect();
    assert_eq!(latest, all, "seed {seed}: restored to latest, every row of the source is there and no other");
    assert!(
        acknowledged.keys().all(|id| latest.binary_search(id).is_ok()),
        "seed {seed}: an acknowledged commit is missing"
    );

    // An earlier commit, by its transaction id: it is there; what was committed clearly before is; what came after is not.
    let chosen = acknowledged.iter().nth(random.below(acknowledged.len() as u64) as usize).unwrap();
    let restored = ids(&keeper.restored(installation, &format!("xid:{}", chosen.1), "xid"));
    assert!(restored.binary_search(chosen.0).is_ok(), "seed {seed}: the target itself is missing");
    judge(seed, &restored, &commit_times, commit_times[chosen.0]);

    // And by time: nothing later than the target, everything clearly before.
    let chosen = acknowledged.iter().nth(random.below(acknowledged.len() as u64) as usize).unwrap();
    let time = commit_times[chosen.0];
    let at = jiff::Timestamp::from_microsecond((time * 1e6).round() as i64).unwrap();
    let restored = ids(&keeper.restored(installation, &at.to_string(), "time"));
    assert!(restored.iter().all(|id| commit_times[id] <= time + 1e-6), "seed {seed}: a commit after {at} was restored");
    judge(seed, &restored, &commit_times, time);
}

/// Commit times are taken before the record is written, so rows within a moment of the target may fall on either side.
#[track_caller]
fn judge(seed: u64, restored: &[u64], commit_times: &BTreeMap<u64, f64>, time: f64) {
    let moment = 0.25;
    for (id, committed) in commit_times {
        let there = restored.binary_search(id).is_ok();
        assert!(
            there || *committed > time - moment,
            "seed {seed}: row {id}, committed {}s before the target, is missing",
            time - committed
        );
        assert!(
            !there || *committed < time + moment,
            "seed {seed}: row {id}, committed {}s after the target, is there",
            committed - time
        );
    }
}
