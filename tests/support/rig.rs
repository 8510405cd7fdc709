//! The program as it is typed, with several directory repositories, run as the user that runs the servers.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgkeep::catalog::Repository;
use pgkeep::pg::instance::{Installation, ServerUser, give_to_server_user};
use pgkeep::seal::KeyFile;
use pgkeep::store::fs::FsStore;
use pgkeep::types::ClusterId;
use secrecy::ExposeSecret;
use tempfile::TempDir;

use super::{TestPg, ok, wait_until};

pub const SOON: Duration = Duration::from_secs(120);

/// A place that the server's user can enter, with the program, its configuration and repositories: `main`, and those
/// that were added.
pub struct Rig {
    pub dir: TempDir,
    archiver: Option<Child>,
    repositories: Vec<(String, PathBuf)>,
    receives: Vec<String>,
    conninfo: String,
}

#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Everything it said.
    pub fn all(&self) -> String {
        format!("{}\n{}", self.stdout, self.stderr)
    }

    #[track_caller]
    pub fn exits(self, code: i32) -> Ran {
        assert_eq!(self.code, Some(code), "{}", self.all());
        self
    }

    #[track_caller]
    pub fn says(self, words: &str) -> Ran {
        assert!(self.all().contains(words), "{words:?} is not in:\n{}", self.all());
        self
    }
}

impl Rig {
    pub fn new(pg: &TestPg) -> Rig {
        let dir =
            ok(tempfile::Builder::new().prefix("pgr").permissions(Permissions::from_mode(0o755)).tempdir_in("/tmp"));
        ok(fs::copy(env!("CARGO_BIN_EXE_pgkeep"), dir.path().join("pgkeep")));
        ok(give_to_server_user(dir.path()));
        let mut rig = Rig {
            dir,
            archiver: None,
            repositories: Vec::new(),
            receives: vec!["main".to_owned()],
            conninfo: pg.conninfo(),
        };
        let (repo, key) = (rig.path("main"), rig.path("main.key"));
        let (repo, key) = (repo.to_str().unwrap(), key.to_str().unwrap());
        rig.done(&["init", "--pg", &rig.conninfo.clone(), "--repo", repo, "--key-file", key, "--yes"]);
        rig.repositories.push(("main".to_owned(), rig.path("main.key")));
        rig.write_config();
        rig
    }

    /// Another repository, in the directory of its name: of `main`'s realm, or of its own. The cluster does not
    /// receive it.
    pub fn add(&mut self, name: &str, same_realm: bool) {
        let key_path = if same_realm { self.path("main.key") } else { self.path(&format!("{name}.key")) };
        if !same_realm {
            let key = KeyFile::generate().expect("a key");
            ok(fs::write(&key_path, key.render().expose_secret()));
            ok(fs::set_permissions(&key_path, Permissions::from_mode(0o600)));
        }
        let key = ok(KeyFile::read(&ok(fs::read(&key_path)), None));
        let path = self.path(name);
        self.block_on(async {
            let store = ok(FsStore::create(&path).await);
            ok(Repository::create(name, Arc::new(store), &key).await);
        });
        ok(give_to_server_user(self.dir.path()));
        self.repositories.push((name.to_owned(), key_path));
        self.write_config();
    }

    /// The cluster is served by this server from now on.
    pub fn served_by(&mut self, pg: &TestPg) {
        self.conninfo = pg.conninfo();
        self.write_config();
    }

    /// Which repositories the cluster's WAL goes to, in this order.
    pub fn receives(&mut self, names: &[&str]) {
        self.receives = names.iter().map(|name| (*name).to_owned()).collect();
        self.write_config();
    }

    /// Where the cluster's WAL comes from, from the next command on.
    pub fn follow(&mut self, conninfo: &str) {
        self.conninfo = conninfo.to_owned();
        self.write_config();
    }

    /// What the archiver has logged since it was started.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("run.log")).unwrap_or_default()
    }

    fn write_config(&self) {
        let mut text = String::new();
        for (name, key) in &self.repositories {
            text += &format!("[repository.{name}]\npath = {:?}\nkey_file = {key:?}\n\n", self.path(name));
        }
        text += &format!("[cluster.main]\nconninfo = {:?}\nrepositories = {:?}\n", self.conninfo, self.receives);
        ok(fs::write(self.path("pgkeep.toml"), text));
        ok(give_to_server_user(self.dir.path()));
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        tokio::runtime::Runtime::new().unwrap().block_on(future)
    }

    /// A repository, opened in this process.
    pub fn open(&self, name: &str) -> Repository {
        let (_, key) = self.repositories.iter().find(|(known, _)| known == name).expect("a repository");
        let key = ok(KeyFile::read(&ok(fs::read(key)), None));
        self.block_on(async {
            let store = ok(FsStore::open(self.path(name)).await);
            ok(Repository::open(name, Arc::new(store), key).await)
        })
    }

    pub fn cluster(&self) -> ClusterId {
        let main = self.open("main");
        ok(self.block_on(main.clusters())).first().expect("a cluster").clone()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command<A: AsRef<OsStr>>(&self, args: &[A]) -> Command {
        let mut command = Command::new(self.path("pgkeep"));
        command.arg("--config").arg(self.path("pgkeep.toml")).args(args).current_dir(self.dir.path());
        command.env_remove("PGKEEP_LOG").stdin(Stdio::null());
        if let Some(user) = ok(ServerUser::find()) {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    pub fn run<A: AsRef<OsStr>>(&self, args: &[A]) -> Ran {
        ran(self.command(args))
    }

    #[track_caller]
    pub fn done<A: AsRef<OsStr> + std::fmt::Debug>(&self, args: &[A]) -> Ran {
        self.run(args).exits(0)
    }

    #[track_caller]
    pub fn json<A: AsRef<OsStr> + std::fmt::Debug>(&self, args: &[A]) -> serde_json::Value {
        let ran = self.run(args);
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{args:?}: {error} in {}", ran.all()))
    }

    pub fn start_archiver(&mut self) {
        let log = ok(fs::File::create(self.path("run.log")));
        self.archiver = Some(ok(self.command(&["run"]).stdout(Stdio::null()).stderr(log).spawn()));
    }

    pub fn stop_archiver(&mut self) {
        let Some(mut child) = self.archiver.take() else { return };
        let pid = rustix::process::Pid::from_child(&child);
        ok(rustix::process::kill_process(pid, rustix::process::Signal::TERM));
        assert!(ok(child.wait()).success(), "{}", fs::read_to_string(self.path("run.log")).unwrap_or_default());
    }

    /// STOP: it takes nothing until CONT.
    pub fn signal_archiver(&self, signal: rustix::process::Signal) {
        let child = self.archiver.as_ref().expect("an archiver");
        ok(rustix::process::kill_process(rustix::process::Pid::from_child(child), signal));
    }

    /// Waits until a transaction's end is archived in `main`.
    pub fn wait_for(&self, xid: &str) {
        self.wait_for_on(xid, "latest");
    }

    /// The same, on a timeline.
    pub fn wait_for_on(&self, xid: &str, timeline: &str) {
        let to = format!("xid:{xid}");
        let since = Instant::now();
        loop {
            let of = ["plan", "--repository", "main", "--cluster", "main", "--timeline", timeline, "--to", &to];
            let plan = self.run(&of);
            if plan.code == Some(0) {
                return;
            }
            let log = fs::read_to_string(self.path("run.log")).unwrap_or_default();
            assert!(since.elapsed() < SOON, "{to} is not archived: {plan:?}\n{log}");
        }
    }

    /// `restore --to TO --pgdata NAME`, and more.
    pub fn restore(&self, to: &str, name: &str, more: &[&str]) -> Ran {
        let dir = self.path(name);
        let args = [&["restore", "--pgdata", dir.to_str().unwrap(), "--to", to], more].concat();
        self.run(&args)
    }

    /// Checks what was restored with PostgreSQL's own tool, starts it, and waits until its target is reached.
    #[track_caller]
    pub fn started(&self, installation: &Installation, name: &str) -> TestPg {
        let dir = self.path(name);
        let arguments = [OsStr::new("-e"), dir.as_os_str()];
        ok(ok(installation.run("pg_verifybackup", &arguments, SOON)).checked());
        self.recovered(installation, name)
    }

    /// Starts a server on what was restored, perhaps not for the first time, and waits until its target is reached.
    #[track_caller]
    pub fn recovered(&self, installation: &Installation, name: &str) -> TestPg {
        let dir = self.path(name);
        let mut pg = TestPg::attach(installation, &dir);
        pg.set("fsync=off"); // else the server syncs every file when it starts
        ok(pg.start());
        wait_until("the target to be reached", SOON, || pg.sql("select pg_is_wal_replay_paused()") == "t");
        pg
    }

    #[track_caller]
    pub fn restored(&self, installation: &Installation, to: &str, name: &str, more: &[&str]) -> TestPg {
        self.restore(to, name, more).exits(0);
        self.started(installation, name)
    }

    /// The objects of a repository whose names have all these words, sorted.
    pub fn objects(&self, repository: &str, words: &[&str]) -> Vec<PathBuf> {
        let mut all = Vec::new();
        let mut pending = vec![self.path(repository)];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    pending.push(path);
                } else if words.iter().all(|word| path.to_string_lossy().contains(word)) {
                    all.push(path);
                }
            }
        }
        all.sort();
        all
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

pub fn ran(mut command: Command) -> Ran {
    let output = ok(command.output());
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Flips a bit of a file that nobody is meant to write.
pub fn flip(path: &Path, at: impl Fn(usize) -> usize) {
    let mut bytes = ok(fs::read(path));
    let at = at(bytes.len());
    bytes[at] ^= 1;
    ok(fs::set_permissions(path, Permissions::from_mode(0o600)));
    ok(fs::write(path, bytes));
    ok(give_to_server_user(path));
}

/// Waits for the next second. Checkpoints tell their time to the second: a target in the second of a backup's checkpoint
/// may lie before the backup, and is refused.
pub fn next_second(pg: &TestPg) {
    let now = || pg.sql("select floor(extract(epoch from clock_timestamp()))::bigint");
    let second = now();
    wait_until("the next second", SOON, || now() != second);
}

/// What a cluster holds, as text.
pub fn dump(pg: &TestPg) -> String {
    let text = pg.tool("pg_dump", &["--no-sync", "--dbname", &pg.conninfo()]);
    // Since August 2025 each dump has a random word in it.
    text.lines().filter(|line| !line.contains("restrict")).collect::<Vec<_>>().join("\n")
}
