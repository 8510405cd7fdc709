//! The program as it is typed, with buckets and directories as the repositories of one cluster, run as the user that runs
//! the servers. For tests that are built with `s3`, too:
//!
//! ```ignore
//! #[path = "support/s3/mod.rs"]
//! mod s3;
//! #[path = "support/stores.rs"]
//! mod stores;
//! mod support;
//! ```

#![allow(dead_code, unreachable_pub)] // each test binary uses a part of it

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use pgkeep::catalog::Repository;
use pgkeep::pg::conninfo::Environment;
use pgkeep::pg::instance::{ServerUser, give_to_server_user};
use pgkeep::pg::{ConnInfo, ConnectOptions, Session};
use pgkeep::seal::KeyFile;
use pgkeep::store::fs::FsStore;
use pgkeep::store::s3::S3Store;
use pgkeep::types::Lsn;
use serde_json::Value;
use tempfile::TempDir;

use crate::s3::TestS3;
use crate::support::rig::{Ran, ran};
use crate::support::{Installation, TestPg, ok, wait_until};

pub const SOON: Duration = Duration::from_secs(120);
/// What a bucket's repository lies under.
const PREFIX: &str = "archive/one";

/// Where a repository is.
#[derive(Clone, Copy)]
pub enum At<'a> {
    Bucket(&'a TestS3),
    Directory,
}

/// A configuration with several repositories, and the program.
pub struct Stores<'a> {
    pub dir: TempDir,
    places: Vec<(&'static str, At<'a>, usize)>,
    texts: BTreeMap<&'static str, String>,
    conninfo: String,
    run: Option<Child>,
}

impl<'a> Stores<'a> {
    /// Repositories by `pgkeep init`: name, place, realm (equal numbers share a key). The cluster receives none of them
    /// yet.
    pub fn new(pg: &TestPg, places: &[(&'static str, At<'a>, usize)]) -> Stores<'a> {
        let dir = tempfile::Builder::new().prefix("pgs").permissions(Permissions::from_mode(0o755)).tempdir_in("/tmp");
        let mut stores =
            Stores { dir: ok(dir), places: Vec::new(), texts: BTreeMap::new(), conninfo: pg.conninfo(), run: None };
        ok(fs::copy(env!("CARGO_BIN_EXE_pgkeep"), stores.path("pgkeep")));
        for (name, at, realm) in places {
            stores.add(name, *at, *realm);
        }
        stores
    }

    /// One more.
    pub fn add(&mut self, name: &'static str, at: At<'a>, realm: usize) {
        let (file, key) = (self.path(&format!("{name}.toml")), self.path(&format!("realm{realm}.key")));
        let mut init = vec!["init".to_owned(), "--yes".into(), "--repository".into(), name.into()];
        init.extend(["--pg".into(), self.conninfo.clone(), "--key-file".into(), key.display().to_string()]);
        match at {
            At::Directory => init.extend(["--repo".into(), self.path(name).display().to_string()]),
            At::Bucket(s3) => {
                for (what, text) in [("access", s3.access_key()), ("secret", s3.secret_key())] {
                    ok(fs::write(self.path(what), text));
                    ok(fs::set_permissions(self.path(what), Permissions::from_mode(0o600)));
                    init.extend([format!("--{what}-key-file"), self.path(what).display().to_string()]);
                }
                init.extend(["--repo".into(), format!("s3://{}/{PREFIX}", s3.bucket())]);
                init.extend(["--endpoint".into(), s3.endpoint()]);
            }
        }
        ok(give_to_server_user(self.dir.path()));
        ran(self.program(&file, &init)).exits(0);
        let text = ok(fs::read_to_string(&file));
        let (repository, _) = text.split_once("[cluster.").expect("init writes the repository first");
        self.texts.insert(name, repository.to_owned());
        self.places.push((name, at, realm));
    }

    /// Which repositories the cluster's WAL goes to, in this order, and its other settings, as they are written.
    pub fn receives(&self, names: &[&str], settings: &str) {
        let mut text: String = self.texts.values().map(String::as_str).collect();
        let conninfo = &self.conninfo;
        text += &format!("[cluster.main]\nconninfo = {conninfo:?}\nrepositories = {names:?}\n{settings}\n");
        ok(fs::write(self.path("pgkeep.toml"), text));
        ok(give_to_server_user(&self.path("pgkeep.toml")));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn program<A: AsRef<OsStr>>(&self, config: &std::path::Path, args: &[A]) -> Command {
        let mut command = Command::new(self.path("pgkeep"));
        command.arg("--config").arg(config).args(args).current_dir(self.dir.path());
        command.env_remove("PGKEEP_LOG").stdin(Stdio::null());
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("AWS_")) {
            command.env_remove(name);
        }
        if let Some(user) = ok(ServerUser::find()) {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    pub fn command(&self, args: &[&str]) -> Command {
        self.program(&self.path("pgkeep.toml"), args)
    }

    pub fn ran(&self, args: &[&str]) -> Ran {
        ran(self.command(args))
    }

    #[track_caller]
    pub fn done(&self, args: &[&str]) -> Ran {
        self.ran(args).exits(0)
    }

    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let ran = self.ran(&[args, &["--json"]].concat());
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {}", ran.all()))
    }

    // ---- the archiver

    pub fn start(&mut self) {
        let log = ok(fs::File::options().create(true).append(true).open(self.path("run.log")));
        self.run = Some(ok(self.command(&["run"]).stdout(Stdio::null()).stderr(log).spawn()));
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("run.log")).unwrap_or_default()
    }

    /// SIGKILL.
    #[track_caller]
    pub fn kill(&mut self) {
        self.assert_runs();
        let mut child = self.run.take().expect("it runs");
        ok(child.kill());
        ok(child.wait());
    }

    #[track_caller]
    pub fn assert_runs(&mut self) {
        let ended: Option<ExitStatus> = ok(self.run.as_mut().expect("it was started").try_wait());
        assert!(ended.is_none(), "run has ended: {ended:?}\n{}", self.log());
    }

    /// SIGTERM; it must end well.
    #[track_caller]
    pub fn stop(&mut self) {
        let mut child = self.run.take().expect("it runs");
        let pid = rustix::process::Pid::from_child(&child);
        ok(rustix::process::kill_process(pid, rustix::process::Signal::TERM));
        assert!(ok(child.wait()).success(), "{}", self.log());
    }

    /// A line of the archiver's `/proc/<pid>/status`, in MiB: `VmHWM` is the most memory it ever had.
    #[track_caller]
    pub fn memory(&self, what: &str) -> u64 {
        let pid = self.run.as_ref().expect("it runs").id();
        let status = ok(fs::read_to_string(format!("/proc/{pid}/status")));
        let line = status.lines().find(|line| line.starts_with(what)).expect("the line");
        line.split_whitespace().nth(1).expect("a number").parse::<u64>().expect("kB") >> 10
    }

    // ---- what is there

    /// What `list` says of each repository that answers, by its name; 0/0 where it holds no WAL.
    pub fn frontiers(&self) -> BTreeMap<String, Lsn> {
        let list = self.json(&["list"]);
        let all = list["clusters"].as_array().expect("clusters").iter();
        let frontier = |of: &Value| of["frontier"].as_str().map_or(Lsn::ZERO, |text| text.parse().expect("a position"));
        all.map(|of| (of["repository"].as_str().expect("a name").to_owned(), frontier(of))).collect()
    }

    /// Waits until each of these holds everything before `to`.
    #[track_caller]
    pub fn wait_held(&mut self, names: &[&str], to: Lsn) {
        let what = format!("{names:?} to hold {to}");
        wait_until(&what, SOON, || {
            self.assert_runs();
            let held = self.frontiers();
            names.iter().all(|name| held.get(*name).is_some_and(|held| held.advance(1) >= to))
        });
    }

    /// One run of WAL without a hole, no gap, nothing damaged, nothing strange, and so many usable backups; in each.
    #[track_caller]
    pub fn assert_whole(&self, names: &[&str], backups: usize) {
        let list = self.json(&["list"]);
        for name in names {
            let mut all = list["clusters"].as_array().expect("clusters").iter();
            let of = all.find(|of| of["repository"] == *name).unwrap_or_else(|| panic!("{name} is not in {list}"));
            let count = |what: &str| of[what].as_array().map(Vec::len);
            assert_eq!((count("gaps"), count("damaged"), count("unknown")), (Some(0), Some(0), Some(0)), "{of}");
            assert_eq!(of["branches"][0]["runs"].as_array().map(Vec::len), Some(1), "a hole in {name}: {of}");
            let usable = |backup: &&Value| backup["usable"] == true;
            assert_eq!(of["backups"].as_array().map(|all| all.iter().filter(usable).count()), Some(backups), "{of}");
        }
    }

    /// A repository, opened in this process.
    pub async fn open(&self, name: &str) -> Repository {
        let (_, at, realm) = self.places.iter().find(|(known, ..)| *known == name).expect("a repository");
        let key = ok(KeyFile::read(&ok(fs::read(self.path(&format!("realm{realm}.key")))), None));
        let store: Arc<dyn pgkeep::store::Store> = match at {
            At::Directory => Arc::new(ok(FsStore::open(self.path(name)).await)),
            At::Bucket(s3) => {
                let bucket = ok(S3Store::open(s3.options(PREFIX)).await);
                let verdict = ok(pgkeep::catalog::verdict::remembered(&bucket).await);
                Arc::new(verdict.map_or(bucket.clone(), |verdict| bucket.with_verdict(verdict)))
            }
        };
        ok(Repository::open(name, store, key).await)
    }

    /// Nobody can reach it, or everybody again.
    pub fn away(&self, name: &str, away: bool) {
        let (_, at, _) = self.places.iter().find(|(known, ..)| *known == name).expect("a repository");
        match at {
            At::Bucket(s3) => s3.down(away),
            At::Directory => {
                let (here, gone) = (self.path(name), self.path(&format!("{name}.away")));
                let (from, to) = if away { (here, gone) } else { (gone, here) };
                ok(fs::rename(from, to));
            }
        }
    }

    // ---- restoring

    /// `restore --to TO --pgdata NAME`, and more.
    pub fn restore(&self, to: &str, name: &str, more: &[&str]) -> Ran {
        let dir = self.path(name);
        let args = ["restore", "--to", to, "--pgdata", dir.to_str().expect("UTF-8")];
        self.ran(&[&args[..], more].concat())
    }

    /// Checks what was restored with PostgreSQL's own tool, starts it and waits until the target is reached.
    #[track_caller]
    pub fn started(&self, installation: &Installation, name: &str) -> TestPg {
        let dir = self.path(name);
        let arguments = [OsStr::new("-e"), dir.as_os_str()];
        ok(ok(installation.run("pg_verifybackup", &arguments, SOON)).checked());
        self.started_again(installation, name)
    }

    /// Starts what was started before, and waits until the target is reached.
    #[track_caller]
    pub fn started_again(&self, installation: &Installation, name: &str) -> TestPg {
        let mut pg = TestPg::attach(installation, &self.path(name));
        pg.set("fsync=off"); // else the server syncs every file when it starts
        ok(pg.start());
        let reached = "SELECT NOT pg_is_in_recovery() OR pg_is_wal_replay_paused()";
        wait_until("the target to be reached", SOON, || pg.sql(reached) == "t");
        pg
    }

    /// Restores from one repository while all others are away.
    #[track_caller]
    pub fn restored_alone(&self, installation: &Installation, name: &str) -> TestPg {
        let others: Vec<&str> = self.places.iter().map(|(known, ..)| *known).filter(|known| *known != name).collect();
        others.iter().for_each(|other| self.away(other, true));
        let to = format!("from-{name}");
        self.restore("latest", &to, &["--action", "promote", "--repository", name, "--cluster", "main"]).exits(0);
        let pg = self.started(installation, &to);
        others.iter().for_each(|other| self.away(other, false));
        pg
    }
}

impl Drop for Stores<'_> {
    fn drop(&mut self) {
        if let Some(child) = &mut self.run {
            let _ = child.kill().and_then(|()| child.wait());
            if std::thread::panicking() {
                eprintln!("---- run.log\n{}", self.log());
            }
        }
    }
}

/// Commits after which [`Clients`] take their time.
const MANY: u64 = 3000;

/// Clients that insert rows into `judged (id bigint, filler text)`, ten of one id per transaction, and note each commit that has
/// returned: the id, and a position before its commit record.
pub struct Clients {
    stop: Arc<AtomicBool>,
    noted: Arc<Mutex<BTreeMap<u64, Lsn>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    /// So many, each as fast as it gets answers; slower behind [`MANY`] commits, so that a fast machine has no more to
    /// compare in the end than a slow one.
    pub fn start(pg: &TestPg, count: usize) -> Clients {
        let (stop, noted, next) = (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::new(AtomicU64::new(1)));
        let client = |_| {
            let info = ok(ConnInfo::resolve(&pg.conninfo(), &Environment::default()));
            let (stop, noted, next) = (Arc::clone(&stop), Arc::clone(&noted), Arc::clone(&next));
            std::thread::spawn(move || commit(&info, &stop, &noted, &next))
        };
        let threads = (0..count).map(client).collect();
        Clients { stop, noted, threads }
    }

    /// Commits that have returned so far.
    pub fn noted(&self) -> BTreeMap<u64, Lsn> {
        self.noted.lock().expect("clients do not panic").clone()
    }

    /// Ends them; a commit under way is waited for.
    #[track_caller]
    pub fn finish(self) -> BTreeMap<u64, Lsn> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().expect("clients do not panic"));
        self.noted.lock().expect("clients do not panic").clone()
    }
}

fn commit(info: &ConnInfo, stop: &AtomicBool, noted: &Mutex<BTreeMap<u64, Lsn>>, next: &AtomicU64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let options = ConnectOptions { timeout: Duration::from_secs(180), ..ConnectOptions::default() };
        let mut session = ok(Session::connect(info, &options).await);
        while !stop.load(Ordering::Relaxed) {
            let id = next.fetch_add(1, Ordering::Relaxed);
            let filler = id % 1500;
            let sql = format!(
                "INSERT INTO judged SELECT {id}, repeat('x', {filler}) FROM generate_series(1, 10) \
                 RETURNING pg_current_wal_insert_lsn()::text"
            );
            let rows = ok(session.query(&sql).await);
            let at: String = ok(rows[0].parse(0));
            noted.lock().expect("clients do not panic").insert(id, at.parse().expect("a position"));
            if id > MANY {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
}

/// SplitMix64: a seed, and numbers that follow from it.
pub struct Random(pub u64);

impl Random {
    /// `PGKEEP_SEED`, or another one each time; said, so that a failure can be had again.
    pub fn seeded() -> (u64, Random) {
        let given = std::env::var("PGKEEP_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = || std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_secs());
        let seed: u64 = given.unwrap_or_else(|| u64::from(std::process::id()) << 16 ^ now());
        eprintln!("seed {seed}: repeat with PGKEEP_SEED={seed}");
        (seed, Random(seed))
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % limit
    }

    /// Waits for so many milliseconds: the random moment itself.
    pub fn pause(&mut self, from: u64, to: u64) {
        std::thread::sleep(Duration::from_millis(from + self.below(to - from)));
    }
}
