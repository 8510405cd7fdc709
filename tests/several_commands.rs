//! The commands over several repositories: run, list, check, wal push; and restores from each repository alone after one
//! was away and the archiver was killed again and again.
//!
//! `PGKEEP_SEED` chooses the seed; a failure prints it.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use pgkeep::catalog::Repository;
use pgkeep::pg::instance::give_to_server_user;
use pgkeep::seal::KeyFile;
use pgkeep::store::fs::FsStore;
use pgkeep::types::Lsn;
use secrecy::ExposeSecret;
use serde_json::Value;
use support::{Installation, TestPg, any_major, ok, wait_until};

const SOON: Duration = Duration::from_secs(120);

/// `pgkeep` with a configuration of repositories r0, r1, …: directories that can be moved away.
struct Keeper {
    dir: tempfile::TempDir,
    repositories: usize,
}

impl Keeper {
    /// Repositories with equal numbers in `realms` share a key.
    fn new(pg: &TestPg, realms: &[usize], acknowledge: usize) -> Keeper {
        let dir = tempfile::Builder::new().prefix("pgkeep-several").tempdir().unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_pgkeep"), dir.path().join("pgkeep")).unwrap();
        let keys: Vec<KeyFile> = realms.iter().map(|_| KeyFile::generate().unwrap()).collect();
        let mut config = String::new();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        for (index, realm) in realms.iter().enumerate() {
            let (name, key) = (format!("r{index}"), &keys[*realm]);
            std::fs::write(dir.path().join(format!("{name}.key")), key.render().expose_secret()).unwrap();
            let chmod = Command::new("chmod").arg("600").arg(dir.path().join(format!("{name}.key"))).status();
            assert!(chmod.unwrap().success());
            runtime.block_on(async {
                let store = Arc::new(ok(FsStore::create(&dir.path().join(&name)).await));
                ok(Repository::create(&name, store, key).await);
            });
            config += &format!("[repository.{name}]\npath = \"{name}\"\nkey_file = \"{name}.key\"\n");
        }
        let names: Vec<String> = (0..realms.len()).map(|index| format!("\"r{index}\"")).collect();
        config += &format!(
            "[cluster.main]\nconninfo = \"{}\"\nrepositories = [{}]\nacknowledge = {acknowledge}\nmax_delay = \"100ms\"\n",
            pg.conninfo(),
            names.join(", ")
        );
        std::fs::write(dir.path().join("pgkeep.toml"), config).unwrap();
        let keeper = Keeper { dir, repositories: realms.len() };
        keeper.own();
        keeper
    }

    /// What was written as root is the server user's too.
    fn own(&self) {
        ok(give_to_server_user(self.dir.path()));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.path("pgkeep"));
        command.arg("--config").arg(self.path("pgkeep.toml")).args(args).stdin(Stdio::null());
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    #[track_caller]
    fn checked(&self, args: &[&str]) -> String {
        let output = self.output(args);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "pgkeep {args:?}: {}\n{out}\n{err}", output.status);
        out.into_owned()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.output(args);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {output:?}"))
    }

    fn run(&self) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(self.path("run.log")).unwrap();
        self.command(&["run"]).stdout(Stdio::null()).stderr(log).spawn().unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("run.log")).unwrap_or_default()
    }

    fn take_away(&self, index: usize) {
        std::fs::rename(self.path(&format!("r{index}")), self.path(&format!("r{index}.away"))).unwrap();
    }

    fn bring_back(&self, index: usize) {
        std::fs::rename(self.path(&format!("r{index}.away")), self.path(&format!("r{index}"))).unwrap();
    }

    /// Where the WAL of a repository ends, as `list` says.
    fn frontier(&self, index: usize) -> Lsn {
        let list = self.json(&["list", "--json", "--repository", &format!("r{index}")]);
        let frontier = list["clusters"][0]["frontier"].as_str().unwrap_or("0/0");
        frontier.parse().unwrap()
    }

    /// Restores to the newest instant from one repository alone, lets the server replay and promote; gives the server.
    #[track_caller]
    fn restored(&self, installation: &Installation, index: usize) -> TestPg {
        // The others cannot help.
        let others: Vec<usize> = (0..self.repositories).filter(|other| *other != index).collect();
        others.iter().for_each(|other| self.take_away(*other));
        let pgdata = self.path(&format!("restored{index}"));
        let (to, repository) = (pgdata.to_str().unwrap(), format!("r{index}"));
        self.checked(&[
            "restore",
            "--repository",
            &repository,
            "--to",
            "latest",
            "--pgdata",
            to,
            "--action",
            "promote",
        ]);
        self.own();
        let mut restored = TestPg::attach(installation, Path::new(&pgdata));
        ok(restored.start());
        wait_until("the end of recovery", SOON, || restored.sql("SELECT pg_is_in_recovery()") == "f");
        others.iter().for_each(|other| self.bring_back(*other));
        restored
    }
}

/// The whole cluster as SQL, without what pg_dump makes up anew each time (newer minors: a random word).
fn dump(pg: &TestPg) -> String {
    let text = pg.tool("pg_dump", &["--no-sync", "postgres"]);
    let lines = text.lines().filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"));
    lines.map(|line| format!("{line}\n")).collect()
}

fn flushed(pg: &TestPg) -> Lsn {
    pg.sql("SELECT pg_current_wal_flush_lsn()").parse().unwrap()
}

fn terminate(run: &mut Child) -> std::process::ExitStatus {
    let killed = Command::new("kill").args(["-TERM", &run.id().to_string()]).status().unwrap();
    assert!(killed.success());
    run.wait().unwrap()
}

/// SplitMix64.
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[test]
fn p1_killed_while_one_is_away_each_repository_alone_gives_the_cluster_back() {
    let seed = std::env::var("PGKEEP_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed
        .unwrap_or_else(|| u64::from(std::process::id()) << 16 ^ std::time::UNIX_EPOCH.elapsed().unwrap().as_secs());
    eprintln!("seed {seed}: repeat with PGKEEP_SEED={seed}");
    let mut chance = seed;
    let installation = any_major();
    let pg = TestPg::start_segmented(installation, 1, "wal_keep_size = 0\nmin_wal_size = 2MB\nmax_wal_size = 8MB\n");
    pg.tool("pgbench", &["-i", "-q", "-s", "1", "postgres"]);
    let keeper = Keeper::new(&pg, &[0, 0, 2], 2);
    let mut run = keeper.run();
    for index in 0..3 {
        keeper.checked(&["backup", "--repository", &format!("r{index}")]);
    }
    let mut bench = ok(pg.client("pgbench"));
    let mut bench = bench.args(["-n", "-c", "2", "-T", "20", "postgres"]).stdout(Stdio::null()).spawn().unwrap();
    let began = std::time::Instant::now();
    let mut away: Option<usize> = None;
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(300 + random(&mut chance) % 1500)); // the random moment itself
        match (away, random(&mut chance) % 3) {
            (None, 0 | 1) => {
                let index = (random(&mut chance) % 3) as usize;
                keeper.take_away(index);
                away = Some(index);
            }
            (Some(index), 0) => {
                keeper.bring_back(index);
                away = None;
            }
            _ => {
                ok(run.kill());
                ok(run.wait());
                run = keeper.run();
            }
        }
        if let Some(status) = run.try_wait().unwrap() {
            panic!("seed {seed}: run ended: {status}\n{}", keeper.log());
        }
    }
    assert!(bench.wait().unwrap().success());
    eprintln!("{:?}: the load is over, {away:?} is away", began.elapsed());
    if let Some(index) = away {
        keeper.bring_back(index);
    }
    pg.sql("SELECT pg_switch_wal()");
    let end = flushed(&pg);
    let ends = || [0, 1, 2].map(|index| keeper.frontier(index));
    wait_until("all repositories to hold everything", SOON, || {
        assert!(run.try_wait().unwrap().is_none(), "seed {seed}: run ended\n{}", keeper.log());
        ends().iter().all(|held| held.advance(1) >= end)
    });
    eprintln!("{:?}: all hold everything", began.elapsed());
    assert!(terminate(&mut run).success(), "seed {seed}: {}", keeper.log());
    eprintln!("{}", keeper.log());
    for line in keeper.json(&["list", "--json"])["clusters"].as_array().unwrap() {
        assert_eq!(line["gaps"].as_array().map(Vec::len), Some(0), "seed {seed}: {line}");
        let runs = line["branches"][0]["runs"].as_array().unwrap();
        assert_eq!(runs.len(), 1, "seed {seed}: a hole in {}: {runs:?}", line["repository"]);
    }
    let source = dump(&pg);
    for index in 0..3 {
        let restored = keeper.restored(installation, index);
        assert!(dump(&restored) == source, "seed {seed}: what r{index} gives back is not the source");
        eprintln!("{:?}: r{index} gives the cluster back", began.elapsed());
    }
}

#[test]
fn run_list_and_check_with_one_away() {
    let pg = TestPg::start_segmented(any_major(), 1, "");
    pg.sql("CREATE TABLE t (g int, filler text)");
    let keeper = Keeper::new(&pg, &[0, 1], 1);
    keeper.take_away(1);
    // Down at the start: the cluster is archived all the same.
    let mut run = keeper.run();
    pg.sql("INSERT INTO t SELECT g, repeat('x', 300) FROM generate_series(1, 20000) g");
    let to = flushed(&pg);
    wait_until("r0 to hold it", SOON, || keeper.frontier(0) >= to);
    wait_until("the slot to move on", SOON, || {
        pg.sql(&format!("SELECT restart_lsn + 1048576 >= '{to}' FROM pg_replication_slots")) == "t"
    });
    assert!(keeper.log().contains("repository=r1") || keeper.log().contains("r1"), "{}", keeper.log());
    let check = keeper.json(&["check", "--json"]);
    let item = |check: &Value, of: &str, item: &str| {
        let items = check["items"].as_array().unwrap();
        let found = items.iter().find(|line| line["of"] == of && line["item"] == item);
        found.map(|line| (line["state"].as_str().unwrap().to_owned(), line["found"].as_str().unwrap().to_owned()))
    };
    let (state, found) = item(&check, "cluster main", "acknowledge").expect("whether enough answer");
    assert_eq!(state, "warn", "{found}");
    assert!(found.contains("1 of 2 repositories answer, 1 must hold WAL"), "{found}");
    assert_eq!(item(&check, "cluster main in repository r0", "archived").unwrap().0, "ok");
    let list = keeper.output(&["list"]);
    let text = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(text.contains("in repository r0") && text.contains("Repository r1 is left out"), "{text}");

    // Back, while the archiver looks elsewhere: seen to be behind, then filled up.
    assert!(terminate(&mut run).success(), "{}", keeper.log());
    keeper.bring_back(1);
    let mut run = keeper.run();
    let to = flushed(&pg);
    wait_until("r1 to hold it", SOON, || keeper.frontier(1) >= to);
    assert!(terminate(&mut run).success(), "{}", keeper.log());
    keeper.take_away(1);
    let mut run = keeper.run();
    pg.sql("INSERT INTO t SELECT g, repeat('x', 300) FROM generate_series(1, 20000) g");
    let to = flushed(&pg);
    wait_until("r0 to hold it", SOON, || keeper.frontier(0) >= to);
    assert!(terminate(&mut run).success(), "{}", keeper.log());
    keeper.bring_back(1);
    let list = keeper.json(&["list", "--json"]);
    let behind = &list["clusters"][1]["behind"];
    assert_eq!(list["clusters"][0]["behind"], Value::Null);
    assert_eq!((behind["best"].as_str(), behind["filling"].as_bool()), (Some("r0"), Some(true)), "{behind}");
    assert!(behind["bytes"].as_u64().unwrap() > 1 << 20 && behind["seconds"].is_u64(), "{behind}");
    let text = keeper.checked(&["list"]);
    assert!(text.contains("behind r0; `pgkeep run` fills it up"), "{text}");
    let check = keeper.json(&["check", "--json"]);
    let (state, found) = item(&check, "cluster main in repository r1", "archived").unwrap();
    assert!(state == "warn" && found.contains("behind r0: it is being filled up, or away"), "{found}");
    assert_eq!(item(&check, "cluster main", "acknowledge").unwrap().0, "ok");
}

/// A repository that cannot be meant is refused when `run` starts; where none can be opened, that is said.
#[test]
fn run_refuses_a_wrong_key_at_once() {
    let pg = TestPg::start(any_major(), "");
    let keeper = Keeper::new(&pg, &[0, 1], 1);
    std::fs::copy(keeper.path("r0.key"), keeper.path("r1.key")).unwrap();
    let output = keeper.output(&["run"]);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{err}");
    assert!(err.contains("r1"), "{err}");
    assert_eq!(pg.sql("SELECT count(*) FROM pg_replication_slots"), "0", "nothing was changed");
    let keeper = Keeper::new(&pg, &[0, 1], 1);
    (0..2).for_each(|index| keeper.take_away(index));
    let output = keeper.output(&["run"]);
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn wal_push_into_several() {
    let pg = TestPg::start_segmented(any_major(), 1, "wal_keep_size = 1GB\n");
    pg.sql("CREATE TABLE t (g int); INSERT INTO t VALUES (1)");
    let file = pg.sql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    pg.sql("SELECT pg_switch_wal()");
    pg.sql("CHECKPOINT");
    let push = |keeper: &Keeper| {
        let path = format!("pg_wal/{file}");
        let output = keeper.command(&["wal", "push", &path]).current_dir(pg.data_dir()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let has = |keeper: &Keeper, index: usize| {
        let listed = Command::new("find").arg(keeper.path(&format!("r{index}"))).output().unwrap();
        String::from_utf8_lossy(&listed.stdout).contains(&format!("/{file}."))
    };
    let both = Keeper::new(&pg, &[0, 1], 2);
    let (code, err) = push(&both);
    assert_eq!(code, Some(0), "{err}");
    assert!(has(&both, 0) && has(&both, 1));
    assert_eq!(push(&both).0, Some(0), "again is fine");

    for (acknowledge, want) in [(1, 0), (2, 1)] {
        let keeper = Keeper::new(&pg, &[0, 1], acknowledge);
        keeper.take_away(0);
        let (code, err) = push(&keeper);
        assert_eq!(code, Some(want), "acknowledge = {acknowledge}: {err}");
        assert!(has(&keeper, 1) && err.contains("r0"), "{err}");
        keeper.bring_back(0);
        assert_eq!(push(&keeper).0, Some(0));
        assert!(has(&keeper, 0));
    }
}
