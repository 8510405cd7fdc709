//! Recovery tests of your own: a PostgreSQL server, a throwaway repository, and pgkeep between them.
//!
//! Behind the feature `testing`, which brings no dependency. `docs/testing-recovery.md` is the guide, and
//! `tests/testing.rs` a test to start from.
//!
//! ```no_run
//! use pgkeep::testing::{Options, Protected};
//!
//! # fn main() -> Result<(), pgkeep::testing::TestingError> {
//! let mut shop = Protected::start(Options { synchronous: true, ..Options::default() })?;
//! shop.sql("CREATE TABLE orders (id int PRIMARY KEY)")?;
//! shop.sql("INSERT INTO orders SELECT generate_series(1, 100)")?;
//! let before = shop.restore_point("before the release")?;
//! shop.sql("DROP TABLE orders")?;
//!
//! let restored = shop.restore(&before)?;
//! assert_eq!(restored.sql("SELECT count(*) FROM orders")?, "100");
//! # Ok(())
//! # }
//! ```
//!
//! Always: everything lies in one temporary directory, and no port is opened unless [`Options::tcp`] says so, so that tests may run side
//! by side. Every wait has a deadline, and an error carries the end of the log that explains it. Calls block: from
//! asynchronous code use `spawn_blocking`.
//! Crash of this process: the server and `pgkeep run` go on, and the directory stays. Dropped, a [`Protected`] kills what it
//! started, that only, and removes its directory as soon as no [`Restored`] needs it any more.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::pg::instance::{InitOptions, Installation, Instance, InstanceError, ServerUser, give_to_server_user};

/// Names the program that is tested with, where [`Options::program`] does not.
pub const PROGRAM_VARIABLE: &str = "PGKEEP_PROGRAM";
/// How long a command, or a wait, may take unless [`Options::patience`] says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks.
const POLL: Duration = Duration::from_millis(10);
/// How much of a log an error shows.
const LOG_TAIL_BYTES: usize = 4096;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum TestingError {
    /// With a server.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// A file or directory.
    #[error("{action} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried: a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A command of pgkeep did not succeed.
    #[error("`pgkeep {arguments}` failed ({status}):\n{output}")]
    Command {
        /// What it was told.
        arguments: String,
        /// How it ended; its code says more (`docs/reference/commands.md`).
        status: ExitStatus,
        /// What it wrote, to stdout first.
        output: String,
    },
    /// `pgkeep run` has ended by itself.
    #[error("`pgkeep run` has ended ({status}); the end of its log:\n{log}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// Its last words.
        log: String,
    },
    /// Something took too long.
    #[error("waited {seconds} s for {what}, in vain:\n{log}")]
    Deadline {
        /// For what.
        what: String,
        /// How long.
        seconds: u64,
        /// What explains it, perhaps.
        log: String,
    },
    /// [`Protected::lose_server`] was called before.
    #[error("the server is lost already: only restoring is left")]
    Lost,
}

impl TestingError {
    /// A deadline alone: everything else will be the same next time.
    pub fn is_retryable(&self) -> bool {
        matches!(self, TestingError::Deadline { .. })
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TestingError {
        let path = path.to_owned();
        move |source| TestingError::Io { action, path, source }
    }
}

/// What is to be tested.
#[derive(Debug, Clone)]
pub struct Options {
    /// The server's programs; the newest that are found unless set (`$PGKEEP_PG_BINDIRS`, Debian's places, `$PATH`).
    pub installation: Option<Installation>,
    /// The program `pgkeep`: `$PGKEEP_PROGRAM`, else the one in `$PATH`, unless set.
    pub program: Option<PathBuf>,
    /// A commit returns when it is in the repository: `synchronous = true`, and the server is told to wait.
    pub synchronous: bool,
    /// Lines of `[cluster.main]`: `max_delay = "100ms"`.
    pub settings: String,
    /// Lines of postgresql.conf.
    pub conf: String,
    /// Listen on 127.0.0.1 too, on a free port, for clients that cannot use a Unix socket.
    pub tcp: bool,
    /// How long a command, or a wait, may take.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            installation: None,
            program: None,
            synchronous: false,
            settings: String::new(),
            conf: String::new(),
            tcp: false,
            patience: PATIENCE,
        }
    }
}

/// A server whose WAL is archived, with one base backup.
#[derive(Debug)]
pub struct Protected {
    // Dropped in this order: who writes into the directory goes before it.
    run: Option<Process>,
    server: Option<Instance>,
    installation: Installation,
    program: PathBuf,
    user: Option<ServerUser>,
    patience: Duration,
    restored: u32,
    dir: Arc<TempDir>,
}

impl Protected {
    /// A new cluster and a new directory repository, `pgkeep run` between them, and a base backup.
    pub fn start(options: Options) -> Result<Protected, TestingError> {
        let installation = match options.installation {
            Some(installation) => installation,
            None => Installation::find(None)?,
        };
        let user = ServerUser::find()?;
        // Open to others: the server's user is one where we are root.
        let made =
            tempfile::Builder::new().prefix("pgkeep-testing-").permissions(Permissions::from_mode(0o755)).tempdir();
        let dir = made.map_err(TestingError::io("make a directory in", &std::env::temp_dir()))?;
        let program = options.program.or_else(|| std::env::var_os(PROGRAM_VARIABLE).map(PathBuf::from));
        let program = reachable(program, user.is_some(), dir.path())?;
        give_to_server_user(dir.path())?;
        let waits = if options.synchronous { "synchronous_standby_names = 'pgkeep'\n" } else { "" };
        let mut server = Instance::init(InitOptions {
            extra_conf: format!("{waits}{}\n", options.conf),
            tcp: options.tcp,
            ..InitOptions::new(installation.clone())
        })?;
        server.start()?;
        let conninfo = server.conninfo();
        let mut protected = Protected {
            run: None,
            server: Some(server),
            installation,
            program,
            user,
            patience: options.patience,
            restored: 0,
            dir: Arc::new(dir),
        };
        protected.pgkeep(&["init", "--pg", &conninfo, "--repo", "repository", "--yes"])?;
        // The cluster's section is the last one.
        let lines = format!("\nsynchronous = {}\n{}\n", options.synchronous, options.settings);
        let file = protected.path("pgkeep.toml");
        let added = OpenOptions::new().append(true).open(&file).and_then(|mut file| file.write_all(lines.as_bytes()));
        added.map_err(TestingError::io("write", &file))?;
        protected.start_pgkeep()?;
        protected.backup()?;
        Ok(protected)
    }

    /// Runs SQL through psql in database `postgres`; rows as lines, columns separated by `|`.
    pub fn sql(&self, sql: &str) -> Result<String, TestingError> {
        Ok(self.server()?.sql(sql)?)
    }

    /// How your own program connects, over the Unix socket.
    pub fn conninfo(&self) -> Result<String, TestingError> {
        Ok(self.server()?.conninfo())
    }

    /// The server itself: to stop, kill and start it, for its log and its tools.
    pub fn server(&self) -> Result<&Instance, TestingError> {
        self.server.as_ref().ok_or(TestingError::Lost)
    }

    /// The same, to change it.
    pub fn server_mut(&mut self) -> Result<&mut Instance, TestingError> {
        self.server.as_mut().ok_or(TestingError::Lost)
    }

    /// A command of pgkeep that must succeed, in the directory of configuration, key and repository; what it wrote to stdout.
    pub fn pgkeep<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<String, TestingError> {
        let words: Vec<_> = arguments.iter().map(|argument| argument.as_ref().to_string_lossy()).collect();
        let words = words.join(" ");
        // Files: a pipe that nobody reads blocks.
        let (out, err) = (self.output()?, self.output()?);
        let (out_too, err_too) = (again(&out, self.dir())?, again(&err, self.dir())?);
        let mut command = self.command();
        command.args(arguments).stdout(out_too).stderr(err_too);
        let mut child = Process(command.spawn().map_err(TestingError::io("run", &self.program))?);
        let status = self.wait(&format!("`pgkeep {words}`"), || child.ended())?;
        let (out, err) = (text(out, self.dir())?, text(err, self.dir())?);
        if status.success() {
            return Ok(out);
        }
        Err(TestingError::Command { arguments: words, status, output: format!("{out}{err}") })
    }

    /// One more base backup.
    pub fn backup(&self) -> Result<(), TestingError> {
        self.pgkeep(&["backup"]).map(drop)
    }

    /// A restore point, archived when this returns, as a target of [`Protected::restore`]: `name:before the release`.
    pub fn restore_point(&mut self, name: &str) -> Result<String, TestingError> {
        self.sql(&format!("SELECT pg_create_restore_point('{}')", name.replace('\'', "''")))?;
        self.wait_archived()?;
        Ok(format!("name:{name}"))
    }

    /// Waits until everything that was committed before this call is in the repository.
    pub fn wait_archived(&mut self) -> Result<(), TestingError> {
        // A commit that wrote something: it and all WAL before it is flushed, and so gets sent.
        self.sql("SELECT pg_logical_emit_message(true, 'pgkeep.testing', '')")?;
        let at = self.sql("SELECT pg_current_wal_flush_lsn()")?;
        // One byte less is reported at the end of a segment.
        let sql = format!(
            "SELECT coalesce(min(pg_wal_lsn_diff('{at}', flush_lsn)) <= 1, false) FROM pg_stat_replication \
             WHERE application_name = 'pgkeep' AND state = 'streaming'"
        );
        let mut run = self.run.take();
        let waited = self.wait(&format!("WAL up to {at} to be archived"), || {
            if let Some(status) = run.as_mut().map(Process::ended).transpose()?.flatten() {
                return Err(TestingError::Ended { status, log: self.log_tail() });
            }
            Ok((self.sql(&sql)? == "t").then_some(()))
        });
        self.run = run;
        waited
    }

    /// SIGKILL to the server, and its data directory is deleted: nothing but the repository is left of it.
    pub fn lose_server(&mut self) -> Result<(), TestingError> {
        let mut server = self.server.take().ok_or(TestingError::Lost)?;
        server.kill()?;
        fs::remove_dir_all(server.data_dir()).map_err(TestingError::io("delete", server.data_dir()))
    }

    /// SIGKILL to `pgkeep run`: commits of a synchronous cluster wait from now on.
    pub fn kill_pgkeep(&mut self) {
        self.run = None; // dropping it kills it
    }

    /// `pgkeep run` again; it goes on where the repository ends.
    pub fn start_pgkeep(&mut self) -> Result<(), TestingError> {
        let path = self.path("run.log");
        let log = OpenOptions::new().create(true).append(true).open(&path).map_err(TestingError::io("open", &path))?;
        let mut command = self.command();
        command.arg("run").stdout(again(&log, &path)?).stderr(log);
        self.run = Some(Process(command.spawn().map_err(TestingError::io("run", &self.program))?));
        Ok(())
    }

    /// All that `pgkeep run` has logged.
    pub fn log(&self) -> String {
        fs::read(self.path("run.log")).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    /// Restores to a target of `pgkeep restore --to` (a time, `latest`, a restore point, …) into a directory of its own, starts
    /// a server on it and waits until it has been promoted there. While the original lives, everything committed is archived
    /// first.
    pub fn restore(&mut self, to: &str) -> Result<Restored, TestingError> {
        if self.server.is_some() && self.run.is_some() {
            self.wait_archived()?;
        }
        self.restored += 1;
        let data = self.path(&format!("restored-{}", self.restored));
        let words = ["restore", "--to", to, "--action", "promote", "--pgdata"].map(OsStr::new);
        self.pgkeep(&[&words[..], &[data.as_os_str()]].concat())?;
        let mut server = Instance::attach(self.installation.clone(), &data)?;
        server.set("fsync=off"); // else the server syncs every file when it starts
        server.start_within(self.patience)?;
        self.wait("the restored server to be promoted", || {
            Ok((server.sql("SELECT pg_is_in_recovery()")? == "f").then_some(()))
        })?;
        Ok(Restored { server, _dir: Arc::clone(&self.dir) })
    }

    /// Where configuration, key and repository lie.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// The program, as the server's user, in the directory, without the caller's settings.
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(self.path("pgkeep.toml")).current_dir(self.dir()).stdin(Stdio::null());
        // Our own variables would name another configuration, libpq's another server.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
            command.env_remove(name);
        }
        if let Some(user) = &self.user {
            command.uid(user.uid).gid(user.gid).env("HOME", self.dir()).env("USER", &user.name);
        }
        command.process_group(0); // Ctrl-C is the test's, which then drops us
        command
    }

    fn output(&self) -> Result<File, TestingError> {
        tempfile::tempfile_in(self.dir()).map_err(TestingError::io("keep output in", self.dir()))
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let from = log.char_indices().rev().nth(LOG_TAIL_BYTES).map_or(0, |(at, _)| at);
        log[from..].to_owned()
    }

    fn wait<T>(
        &self,
        what: &str,
        mut look: impl FnMut() -> Result<Option<T>, TestingError>,
    ) -> Result<T, TestingError> {
        let since = Instant::now();
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            if since.elapsed() > self.patience {
                let (what, seconds) = (what.to_owned(), self.patience.as_secs());
                return Err(TestingError::Deadline { what, seconds, log: self.log_tail() });
            }
            std::thread::sleep(POLL);
        }
    }
}

/// A restored server, promoted at its target. Killed when dropped; everything else is [`Instance`]'s.
#[derive(Debug)]
pub struct Restored {
    server: Instance,
    _dir: Arc<TempDir>,
}

impl Deref for Restored {
    type Target = Instance;
    fn deref(&self) -> &Instance {
        &self.server
    }
}

/// The program as it can be run: the server's user may not reach it when we are root, and gets a copy then.
fn reachable(program: Option<PathBuf>, is_root: bool, dir: &Path) -> Result<PathBuf, TestingError> {
    let in_path = || {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|dir| dir.join("pgkeep")).find(|file| file.is_file())
    };
    let program = program.or_else(in_path).unwrap_or_else(|| PathBuf::from("pgkeep"));
    let program = fs::canonicalize(&program).map_err(TestingError::io("find the program", &program))?;
    if !is_root {
        return Ok(program);
    }
    let copy = dir.join("pgkeep");
    fs::copy(&program, &copy).map_err(TestingError::io("copy", &program))?;
    Ok(copy)
}

fn again(file: &File, path: &Path) -> Result<File, TestingError> {
    file.try_clone().map_err(TestingError::io("keep output in", path))
}

fn text(mut file: File, path: &Path) -> Result<String, TestingError> {
    let mut bytes = Vec::new();
    let read = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    read.map_err(TestingError::io("read output in", path))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A process of the program. Dropped, it is killed: what it leaves then is what a test of recovery is about.
#[derive(Debug)]
struct Process(Child);

impl Process {
    fn ended(&mut self) -> Result<Option<ExitStatus>, TestingError> {
        self.0.try_wait().map_err(TestingError::io("watch", Path::new("pgkeep")))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait()); // gone already is fine
    }
}
