//! A local PostgreSQL server that we start and stop: for the demo, for drills and for tests.
//!
//! Always: the server runs as an unprivileged user when we are root (it refuses to run as root); it listens on a Unix
//! socket in a directory of its own, which only that user and root may enter, and on TCP only when asked to. Listening
//! is set on the command line, so a restored directory starts whatever its configuration says, and is not edited.
//! Every wait has a deadline, and an error carries the end of the server's log.
//!
//! Calls block; asynchronous callers use `spawn_blocking`.
//! Crash of this process: the server goes on running, and its temporary directory stays. Dropping an [`Instance`]
//! kills the server that it started, that one only, and removes what it made under a temporary name.

mod error;
mod installation;
mod template;
mod user;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::types::SegmentSize;

pub use error::InstanceError;
pub use installation::{Installation, ToolOutput};
pub use user::{ServerUser, give_to_server_user};

/// How long a start may take unless the caller says otherwise. Recovery of a large backup needs more.
pub const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long a stop may take unless the caller says otherwise.
pub const STOP_DEADLINE: Duration = Duration::from_secs(60);
/// How long psql and the like may take unless the caller says otherwise.
pub const TOOL_DEADLINE: Duration = Duration::from_secs(120);
/// How long initdb may take: about a second, on a busy machine many.
const INIT_DEADLINE: Duration = Duration::from_secs(120);
/// How much of the log an error shows.
const LOG_TAIL_BYTES: u64 = 4096;
/// Longest path of a socket that every system takes (`sun_path` has 104 to 108 bytes).
const SOCKET_PATH_BYTES: usize = 100;
/// The name of the socket holds a port even where no TCP port is open.
const SOCKET_ONLY_PORT: u16 = 54321;
/// The superuser that [`Instance::init`] makes.
const SUPERUSER: &str = "postgres";

/// How a new cluster is made.
#[derive(Debug, Clone)]
pub struct InitOptions {
    /// The server's programs.
    pub installation: Installation,
    /// The data directory: absent or empty. `None`: a temporary one, removed on drop.
    pub dir: Option<PathBuf>,
    /// Size of the WAL segments; `None` leaves it to initdb (16 MiB).
    pub segment_size: Option<SegmentSize>,
    /// Page checksums.
    pub data_checksums: bool,
    /// May the server lose data in a crash of the machine? Then initdb does not sync and `fsync` is off.
    pub unsafe_fast: bool,
    /// Listen on 127.0.0.1 too, on a free port.
    pub tcp: bool,
    /// Lines appended to postgresql.conf.
    pub extra_conf: String,
    /// More arguments of initdb.
    pub initdb_args: Vec<String>,
    /// Where clusters as initdb made them are kept, to be copied; only we may write there. `None`: initdb runs.
    pub templates: Option<PathBuf>,
}

impl InitOptions {
    /// A temporary cluster with page checksums, socket only, that does not care about crashes of the machine.
    pub fn new(installation: Installation) -> InitOptions {
        InitOptions {
            installation,
            dir: None,
            segment_size: None,
            data_checksums: true,
            unsafe_fast: true,
            tcp: false,
            extra_conf: String::new(),
            initdb_args: Vec::new(),
            templates: None,
        }
    }
}

/// How the server is told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// SIGTERM: waits until clients have gone.
    Smart,
    /// SIGINT: clients are sent away, then a checkpoint. Waits for walsenders (POSTGRES.md 1.6).
    Fast,
    /// SIGQUIT: as after a crash.
    Immediate,
}

/// What a start came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    /// The server accepts connections (perhaps as a hot standby).
    AcceptsConnections,
    /// The server came up and stopped by itself with success, as `recovery_target_action = shutdown` wants it.
    StoppedByItself,
}

/// A data directory, its server's programs, and the server while it runs.
#[derive(Debug)]
pub struct Instance {
    installation: Installation,
    data: PathBuf,
    port: u16,
    tcp: bool,
    settings: Vec<String>,
    postmaster: Option<Child>,
    /// Holds the socket, the log and, for a temporary cluster, the data. Last: removed after the server is gone.
    workspace: TempDir,
}

impl Instance {
    /// Makes a cluster: superuser `postgres`, local connections trusted (only we can reach the socket), C locale, UTF-8.
    pub fn init(options: InitOptions) -> Result<Instance, InstanceError> {
        let mut instance = Instance::prepare(options.installation, options.dir, options.tcp)?;
        user::make_dir(&instance.data)?;
        let mut arguments: Vec<String> =
            ["-A", "trust", "-U", SUPERUSER, "--locale=C", "-E", "UTF8"].map(str::to_owned).into();
        if options.data_checksums {
            arguments.push("--data-checksums".to_owned());
        }
        if options.unsafe_fast {
            arguments.push("--no-sync".to_owned());
            instance.settings.push("fsync=off".to_owned());
        }
        if let Some(size) = options.segment_size {
            arguments.push(format!("--wal-segsize={}", size.bytes() >> 20));
        }
        arguments.extend(options.initdb_args);
        if let Some(templates) = options.templates {
            template::copy(&instance.installation, &arguments, &templates, &instance.data)?;
        } else {
            arguments.extend(["-D".to_owned(), instance.data.display().to_string()]);
            instance.installation.run("initdb", &arguments, INIT_DEADLINE)?.checked()?;
        }
        instance.append_conf("lc_messages = 'C'\nshared_buffers = 32MB\nmax_connections = 20\n")?;
        instance.append_conf(&options.extra_conf)?;
        Ok(instance)
    }

    /// Takes a data directory that is there, a restored one say; it stays when the instance is dropped. As root, gives
    /// it to the server's user. Tablespaces outside it are the caller's: [`give_to_server_user`].
    pub fn attach(installation: Installation, data: &Path) -> Result<Instance, InstanceError> {
        let instance = Instance::prepare(installation, Some(data.to_owned()), false)?;
        give_to_server_user(&instance.data)?;
        Ok(instance)
    }

    fn prepare(installation: Installation, data: Option<PathBuf>, tcp: bool) -> Result<Instance, InstanceError> {
        let workspace = user::workspace(SOCKET_PATH_BYTES - socket_name(u16::MAX).len())?;
        let data = match data {
            Some(data) => std::path::absolute(&data).map_err(|source| InstanceError::io("find", &data, source))?,
            None => workspace.path().join("data"),
        };
        user::check_reachable(&data)?;
        let port = if tcp { free_port()? } else { SOCKET_ONLY_PORT };
        Ok(Instance { installation, data, port, tcp, settings: Vec::new(), postmaster: None, workspace })
    }

    /// The programs it runs with.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    /// A directory of the server's user that goes when the instance goes: for tablespaces, archives and the like.
    pub fn scratch_dir(&self, name: &str) -> Result<PathBuf, InstanceError> {
        let dir = self.workspace.path().join(name);
        user::make_dir(&dir)?;
        Ok(dir)
    }

    /// The directory of the socket: libpq's `host`.
    pub fn socket_dir(&self) -> &Path {
        self.workspace.path()
    }

    /// libpq's `port`; a TCP port only when the cluster was made with `tcp`.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How libpq, and we, connect over the socket.
    pub fn conninfo(&self) -> String {
        format!("host={} port={} user={SUPERUSER} dbname=postgres", self.socket_dir().display(), self.port)
    }

    /// The same over TCP; for a cluster made with `tcp`.
    pub fn tcp_conninfo(&self) -> String {
        format!("host=127.0.0.1 port={} user={SUPERUSER} dbname=postgres", self.port)
    }

    /// Appends lines to postgresql.conf; they count from the next start or, where the setting allows, [`Self::reload`].
    pub fn append_conf(&self, lines: &str) -> Result<(), InstanceError> {
        append(&self.data.join("postgresql.conf"), lines)
    }

    /// Appends lines to pg_hba.conf; they count from the next start or [`Self::reload`].
    pub fn append_hba(&self, lines: &str) -> Result<(), InstanceError> {
        append(&self.data.join("pg_hba.conf"), lines)
    }

    /// A setting for the server's command line (`name=value`), from the next start; it overrides every file.
    pub fn set(&mut self, setting: &str) {
        self.settings.push(setting.to_owned());
    }

    /// Starts the server and waits until it accepts connections, or has stopped by itself with success. One that stops
    /// at its target may be seen as a hot standby a moment before: [`Self::wait_until_exit`] then.
    pub fn start(&mut self) -> Result<Started, InstanceError> {
        self.start_within(START_DEADLINE)
    }

    /// As [`Self::start`], with a deadline for recoveries. When it passes, the server goes on running: the caller may
    /// wait again with [`Self::wait_until_ready`], stop it, or drop it.
    pub fn start_within(&mut self, deadline: Duration) -> Result<Started, InstanceError> {
        if self.is_running() {
            return Err(InstanceError::AlreadyRunning { dir: self.data.clone() });
        }
        let log = OpenOptions::new().create(true).append(true).open(self.log_path());
        let log = log.map_err(|source| InstanceError::io("open", &self.log_path(), source))?;
        let log_too = log.try_clone().map_err(|source| InstanceError::io("open", &self.log_path(), source))?;
        let mut command = self.installation.command("postgres")?;
        command.arg("-D").arg(&self.data);
        let listen = if self.tcp { "127.0.0.1" } else { "" };
        for setting in [
            format!("port={}", self.port),
            format!("listen_addresses={listen}"),
            format!("unix_socket_directories={}", self.socket_dir().display()),
            // The log is where we look for it, whatever a restored configuration says.
            "logging_collector=off".to_owned(),
            "log_destination=stderr".to_owned(),
        ]
        .iter()
        .chain(&self.settings)
        {
            command.arg("-c").arg(setting);
        }
        command.stdin(Stdio::null()).stdout(log).stderr(log_too);
        command.process_group(0); // Ctrl-C at our terminal is ours: the server is stopped in good order, by us
        let program = self.installation.program("postgres");
        self.postmaster = Some(command.spawn().map_err(|source| InstanceError::Spawn { program, source })?);
        self.wait_until_ready(deadline)
    }

    /// Waits until the server accepts connections, or has stopped by itself with success.
    ///
    /// A recovery with `hot_standby = off` accepts nobody until it has ended; that is waited for too.
    pub fn wait_until_ready(&mut self, deadline: Duration) -> Result<Started, InstanceError> {
        let waiting = Waiting::new(deadline);
        loop {
            let Some(pid) = self.pid() else { return Err(InstanceError::NotRunning { dir: self.data.clone() }) };
            // The status line says "ready" before the exit is seen, or the exit follows: ask for the exit first.
            if let Some(status) = self.reap()? {
                return match status.success() {
                    true => Ok(Started::StoppedByItself),
                    false => Err(InstanceError::StartFailed { dir: self.data.clone(), status, log: self.log_tail() }),
                };
            }
            if postmaster_status(&self.data, pid).as_deref() == Some("ready") {
                return Ok(Started::AcceptsConnections);
            }
            if !waiting.pause() {
                return Err(self.deadline("the server to accept connections", deadline));
            }
        }
    }

    /// Waits until the server has ended by itself; its exit status.
    pub fn wait_until_exit(&mut self, deadline: Duration) -> Result<ExitStatus, InstanceError> {
        let waiting = Waiting::new(deadline);
        loop {
            if self.postmaster.is_none() {
                return Err(InstanceError::NotRunning { dir: self.data.clone() });
            }
            if let Some(status) = self.reap()? {
                return Ok(status);
            }
            if !waiting.pause() {
                return Err(self.deadline("the server to stop", deadline));
            }
        }
    }

    /// Stops the server and waits for it; one that does not run is no error.
    pub fn stop(&mut self, mode: StopMode) -> Result<(), InstanceError> {
        self.stop_within(mode, STOP_DEADLINE)
    }

    /// As [`Self::stop`]. When the deadline passes the server is still stopping.
    pub fn stop_within(&mut self, mode: StopMode, deadline: Duration) -> Result<(), InstanceError> {
        if !self.is_running() {
            return Ok(());
        }
        self.signal(match mode {
            StopMode::Smart => Signal::TERM,
            StopMode::Fast => Signal::INT,
            StopMode::Immediate => Signal::QUIT,
        })?;
        self.wait_until_exit(deadline).map(drop)
    }

    /// Kills the server and all its processes with SIGKILL, as a crash of the machine would, and waits for their end.
    pub fn kill(&mut self) -> Result<(), InstanceError> {
        let Some(pid) = self.pid() else { return Ok(()) };
        // Asked before: afterwards the children belong to init. Each is a session of its own, a group signal misses it.
        let children = children_of(pid);
        self.signal(Signal::KILL)?;
        self.wait_until_exit(STOP_DEADLINE)?;
        for child in &children {
            signal_process(*child, Signal::KILL).ok(); // gone already: fine
        }
        let waiting = Waiting::new(STOP_DEADLINE);
        // Until the last one has let go of the shared memory a new start would be refused.
        while children.iter().any(|child| is_alive(*child)) {
            if !waiting.pause() {
                return Err(self.deadline("killed processes to end", STOP_DEADLINE));
            }
        }
        Ok(())
    }

    /// Ends recovery; returns when the server accepts writes.
    pub fn promote(&mut self) -> Result<(), InstanceError> {
        let data = self.data.display().to_string();
        let seconds = START_DEADLINE.as_secs().to_string();
        let arguments = ["promote", "-w", "-t", &seconds, "-D", &data];
        self.installation.run("pg_ctl", &arguments, START_DEADLINE + Duration::from_secs(10))?.checked().map(drop)
    }

    /// Makes the server read its configuration files again.
    pub fn reload(&mut self) -> Result<(), InstanceError> {
        self.signal(Signal::HUP)
    }

    /// Runs while the postmaster that we started lives.
    pub fn is_running(&mut self) -> bool {
        matches!(self.reap(), Ok(None)) && self.postmaster.is_some()
    }

    /// The postmaster's process, while it is ours.
    pub fn pid(&self) -> Option<u32> {
        self.postmaster.as_ref().map(Child::id)
    }

    /// Runs SQL through psql in database `postgres`; rows as lines, columns separated by `|`. The first error ends it.
    pub fn sql(&self, sql: &str) -> Result<String, InstanceError> {
        self.sql_in("postgres", sql)
    }

    /// The same in another database.
    pub fn sql_in(&self, database: &str, sql: &str) -> Result<String, InstanceError> {
        let arguments = ["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql];
        let output = self.tool("psql", &arguments, TOOL_DEADLINE)?.checked()?;
        Ok(output.stdout_text().trim_end_matches('\n').to_owned())
    }

    /// Runs a program of this installation as the server's user, with PGHOST, PGPORT and PGUSER set for this server.
    pub fn tool<A: AsRef<std::ffi::OsStr>>(
        &self,
        program: &str,
        arguments: &[A],
        deadline: Duration,
    ) -> Result<ToolOutput, InstanceError> {
        let mut command = self.client(program)?;
        command.args(arguments);
        self.installation.run_command(program, command, deadline)
    }

    /// The command behind [`Self::tool`], for a client that should run beside us (pgbench): the caller spawns it, and
    /// waits for it with a deadline of his own.
    pub fn client(&self, program: &str) -> Result<std::process::Command, InstanceError> {
        let mut command = self.installation.command(program)?;
        command.env("PGHOST", self.socket_dir()).env("PGPORT", self.port.to_string()).env("PGUSER", SUPERUSER);
        Ok(command)
    }

    /// Where the server's log goes, over all starts.
    pub fn log_path(&self) -> PathBuf {
        self.workspace.path().join("server.log")
    }

    /// The whole log.
    pub fn log(&self) -> String {
        fs::read(self.log_path()).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    /// The end of the log, for messages.
    pub fn log_tail(&self) -> String {
        tail(&self.log_path(), LOG_TAIL_BYTES)
    }

    /// Lets the server run on after this process. Its socket and log stay where they are; nobody removes them.
    pub fn leave_running(mut self) {
        self.postmaster = None;
        self.workspace.disable_cleanup(true);
    }

    /// Notes the postmaster's end, if it has ended.
    fn reap(&mut self) -> Result<Option<ExitStatus>, InstanceError> {
        let Some(child) = &mut self.postmaster else { return Ok(None) };
        let status = child.try_wait().map_err(|source| InstanceError::io("watch the server in", &self.data, source))?;
        if status.is_some() {
            self.postmaster = None;
        }
        Ok(status)
    }

    fn signal(&self, signal: Signal) -> Result<(), InstanceError> {
        let pid = self.pid().ok_or_else(|| InstanceError::NotRunning { dir: self.data.clone() })?;
        // The child is not reaped yet, so the number cannot belong to a stranger.
        signal_process(pid, signal)
            .map_err(|source| InstanceError::io("signal the server in", &self.data, source.into()))
    }

    fn deadline(&self, what: &str, deadline: Duration) -> InstanceError {
        InstanceError::Deadline {
            what: format!("{what} in {}", self.data.display()),
            seconds: deadline.as_secs(),
            log: self.log_tail(),
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let patience = Duration::from_secs(5);
        if self.is_running() && self.stop_within(StopMode::Immediate, patience).is_err() {
            self.kill().ok(); // nobody is left to tell
        }
    }
}

/// A deadline, with pauses that start short and grow: a server is often ready within milliseconds.
struct Waiting {
    since: Instant,
    deadline: Duration,
}

impl Waiting {
    fn new(deadline: Duration) -> Waiting {
        Waiting { since: Instant::now(), deadline }
    }

    /// Sleeps a little; `false` when the time is up.
    fn pause(&self) -> bool {
        let waited = self.since.elapsed();
        if waited >= self.deadline {
            return false;
        }
        std::thread::sleep((waited / 8).clamp(Duration::from_millis(1), Duration::from_millis(50)));
        true
    }
}

fn socket_name(port: u16) -> String {
    format!("/.s.PGSQL.{port}")
}

/// A port that was free a moment ago. Another process may take it meanwhile; then the start fails, loudly.
fn free_port() -> Result<u16, InstanceError> {
    let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr()).map(|at| at.port());
    port.map_err(|source| InstanceError::io("find a free port on", Path::new("127.0.0.1"), source))
}

fn append(path: &Path, lines: &str) -> Result<(), InstanceError> {
    let file = OpenOptions::new().append(true).open(path);
    file.and_then(|mut file| writeln!(file, "{lines}")).map_err(|source| InstanceError::io("append to", path, source))
}

/// The last `bytes` of a file, from a line's start; empty when it cannot be read.
fn tail(path: &Path, bytes: u64) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let skipped = file.metadata()?.len().saturating_sub(bytes);
        file.seek(SeekFrom::Start(skipped))?;
        let mut end = Vec::new();
        file.take(bytes).read_to_end(&mut end)?;
        let text = String::from_utf8_lossy(&end).into_owned();
        let whole_lines = if skipped == 0 { 0 } else { text.find('\n').map_or(0, |at| at + 1) };
        Ok(text.get(whole_lines..).unwrap_or_default().to_owned())
    };
    read().unwrap_or_default()
}

/// What `postmaster.pid` says about the postmaster `pid`: `starting`, `stopping`, `ready`, `standby` (recovering, and
/// accepting nobody). `None` while the file is not its own: after a crash the old one is still there.
fn postmaster_status(data: &Path, pid: u32) -> Option<String> {
    let file = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    let mut lines = file.lines();
    let own = lines.next()?.trim().parse() == Ok(pid);
    own.then(|| lines.nth(6).map(|status| status.trim().to_owned())).flatten()
}

fn signal_process(pid: u32, signal: Signal) -> rustix::io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH)?;
    kill_process(pid, signal)
}

/// The parent and the state letter in `/proc/<pid>/stat`, whose second field, the name, may hold anything.
fn parent_and_state(pid: u32) -> Option<(u32, char)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut words = rest.split_whitespace();
    let state = words.next()?.chars().next()?;
    Some((words.next()?.parse().ok()?, state))
}

/// Processes whose parent is `pid`; none where there is no `/proc`.
fn children_of(pid: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(|process| parent_and_state(*process).is_some_and(|(parent, _)| parent == pid)).collect()
}

/// A zombie is dead: it holds no memory, and its new parent may be slow to bury it.
fn is_alive(pid: u32) -> bool {
    parent_and_state(pid).is_some_and(|(_, state)| !matches!(state, 'Z' | 'X'))
}
