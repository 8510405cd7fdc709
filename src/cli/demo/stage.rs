//! Where the demo plays: a directory, a server in it, and this binary run beside it.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::cli::output::Output;
use crate::cli::{CliError, open};
use crate::config::Config;
use crate::pg::instance::{
    InitOptions, Installation, Instance, InstanceError, ServerUser, StopMode, give_to_server_user,
};
use crate::store::{ObjectMeta, Store, list_all};

/// How long one command of ours may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(120);
/// `pgkeep run` stops within its shutdown_deadline, which is 10 s unless set.
const STOP_DEADLINE: Duration = Duration::from_secs(15);
/// Between two looks at a child.
const POLL: Duration = Duration::from_millis(10);

/// Lines with the time since the beginning.
pub(super) struct Story {
    output: Output,
    begun: Instant,
}

impl Story {
    pub(super) fn new(output: Output) -> Story {
        Story { output, begun: Instant::now() }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    pub(super) fn plain(&self, text: impl std::fmt::Display) {
        self.output.line(text);
    }

    pub(super) fn blank(&self) {
        self.output.line("");
    }

    /// What happened, and when.
    pub(super) fn line(&self, text: impl std::fmt::Display) {
        self.output.line(format!("{:>5.1} s  {text}", self.seconds()));
    }

    /// A command as a person would type it.
    pub(super) fn command(&self, text: &str) {
        self.output.line(format!("         $ {text}"));
    }

    /// What a command said.
    pub(super) fn quote(&self, text: &str) {
        self.output.line(format!("         | {text}"));
    }
}

/// A bucket for the repository, below a prefix that nobody else has.
pub(super) struct Bucket {
    /// What follows `--repo`.
    arguments: Vec<String>,
}

impl Bucket {
    pub(super) fn new(url: &str, endpoint: Option<&str>, region: Option<&str>) -> Result<Bucket, CliError> {
        if !url.contains("://") {
            return Err(CliError::usage(anyhow::anyhow!("--repo {url} is no bucket, such as s3://scratch")));
        }
        let token = getrandom::u32().map_err(|error| CliError::failed(anyhow::anyhow!("no random number: {error}")))?;
        let mut arguments = vec![format!("{}/pgkeep-demo-{token:08x}", url.trim_end_matches('/'))];
        for (option, value) in [("--endpoint", endpoint), ("--region", region)] {
            arguments.extend(value.into_iter().flat_map(|value| [option.to_owned(), value.to_owned()]));
        }
        Ok(Bucket { arguments })
    }
}

/// The directory and all that runs in it. Dropped, it stops what it started and is gone.
pub(super) struct Stage {
    // Dropped in this order: who writes into the directory goes before it.
    archiver: Option<Process>,
    restored: Option<Instance>,
    server: Instance,
    binary: PathBuf,
    user: Option<ServerUser>,
    bucket: Option<Bucket>,
    stop: CancellationToken,
    dir: TempDir,
}

impl Stage {
    /// Makes the directory where the server's user can reach it, and a cluster in it.
    pub(super) async fn new(
        installation: Installation,
        bucket: Option<Bucket>,
        stop: CancellationToken,
    ) -> Result<Stage, CliError> {
        let user = ServerUser::find().map_err(CliError::usage)?;
        let mut refused = None;
        for place in [std::env::temp_dir(), PathBuf::from("/tmp"), PathBuf::from("/var/tmp")] {
            let dir = match tempfile::Builder::new().prefix("pgkeep-demo-").tempdir_in(&place) {
                Ok(dir) => dir,
                Err(error) => {
                    let error = CliError::failed(error).context(format!("make a directory in {}", place.display()));
                    refused.get_or_insert(error);
                    continue;
                }
            };
            give_to_server_user(dir.path()).map_err(CliError::failed)?;
            let options = InitOptions {
                dir: Some(dir.path().join("data")),
                // The judge asks when each row was committed.
                extra_conf: "track_commit_timestamp = on\n".to_owned(),
                ..InitOptions::new(installation.clone())
            };
            match tokio::task::block_in_place(|| Instance::init(options)) {
                Ok(server) => {
                    let binary = reachable_binary(user.is_some(), dir.path())?;
                    return Ok(Stage { archiver: None, restored: None, server, binary, user, bucket, stop, dir });
                }
                Err(error @ InstanceError::Unreachable { .. }) => {
                    refused.get_or_insert(CliError::usage(error));
                }
                Err(error) => return Err(CliError::failed(error).context("make a cluster")),
            }
        }
        // invariant: every round that did not return has left its reason
        Err(refused.unwrap_or_else(|| CliError::failed(anyhow::anyhow!("no place for a cluster was found"))))
    }

    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The user that runs everything, if we are root.
    pub(super) fn user(&self) -> Option<&str> {
        self.user.as_ref().map(|user| user.name.as_str())
    }

    pub(super) fn version(&self) -> String {
        self.server.installation().version.clone()
    }

    pub(super) fn conninfo(&self) -> String {
        self.server.conninfo()
    }

    pub(super) fn boot(&mut self) -> Result<(), CliError> {
        tokio::task::block_in_place(|| self.server.start()).map_err(CliError::failed).map(drop)
    }

    pub(super) fn stop_server(&mut self, mode: StopMode) -> Result<(), CliError> {
        tokio::task::block_in_place(|| self.server.stop(mode)).map_err(CliError::failed)
    }

    /// Runs SQL on the cluster that is protected.
    pub(super) fn sql(&self, sql: &str) -> Result<String, CliError> {
        tokio::task::block_in_place(|| self.server.sql(sql)).map_err(CliError::failed)
    }

    /// Runs SQL on the restored one.
    pub(super) fn restored_sql(&self, sql: &str) -> Result<String, CliError> {
        let restored =
            self.restored.as_ref().ok_or_else(|| CliError::failed(anyhow::anyhow!("nothing is restored")))?;
        tokio::task::block_in_place(|| restored.sql(sql)).map_err(CliError::failed)
    }

    /// This binary, as the server's user, in the demo's directory, without the caller's settings.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(args).current_dir(self.dir()).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            // Our own variables would name another configuration, libpq's another server.
            if text.starts_with("PG") {
                command.env_remove(&name);
            }
        }
        if let Some(user) = &self.user {
            command.uid(user.uid).gid(user.gid).env("HOME", self.dir()).env("USER", &user.name);
        }
        command
    }

    /// Runs one of our commands to its end; what it printed.
    pub(super) async fn pgkeep(&self, args: &[&str]) -> Result<String, CliError> {
        let io = |error| CliError::failed(error).context(format!("run pgkeep {}", args.join(" ")));
        let (out, err) = (self.dir().join("out.txt"), self.dir().join("err.txt"));
        let mut command = self.command(args);
        command.stdout(File::create(&out).map_err(io)?).stderr(File::create(&err).map_err(io)?);
        let mut child = Process(command.spawn().map_err(io)?);
        let status = tokio::time::timeout(COMMAND_DEADLINE, child.ended(&self.stop)).await;
        let status = status.map_err(|_| {
            CliError::failed(anyhow::anyhow!(
                "pgkeep {} took more than {} s",
                args.join(" "),
                COMMAND_DEADLINE.as_secs()
            ))
        })??;
        let text = |path: &Path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let (out, err) = (text(&out).map_err(io)?, text(&err).map_err(io)?);
        if status.success() {
            return Ok(out);
        }
        Err(CliError::failed(anyhow::anyhow!("pgkeep {} failed ({status}):\n{out}{err}", args.join(" "))))
    }

    /// The same with `--json`.
    pub(super) async fn pgkeep_json(&self, args: &[&str]) -> Result<Value, CliError> {
        let text = self.pgkeep(&[args, &["--json"]].concat()).await?;
        serde_json::from_str(&text).map_err(|error| CliError::failed(error).context("read the answer of pgkeep"))
    }

    /// Starts `pgkeep run`; its log lies in the directory.
    pub(super) fn start_archiver(&mut self) -> Result<(), CliError> {
        let io = |error| CliError::failed(error).context("run pgkeep run");
        let log = File::create(self.dir().join("run.log")).map_err(io)?;
        let mut command = self.command(&["run"]);
        command.stdout(log.try_clone().map_err(io)?).stderr(log);
        command.process_group(0); // Ctrl-C is ours; we stop it in good order
        self.archiver = Some(Process(command.spawn().map_err(io)?));
        Ok(())
    }

    /// SIGTERM, and how long it took.
    pub(super) async fn stop_archiver(&mut self) -> Result<Duration, CliError> {
        let Some(mut archiver) = self.archiver.take() else { return Ok(Duration::ZERO) };
        let begun = Instant::now();
        archiver.signal(Signal::TERM);
        let ended = tokio::time::timeout(STOP_DEADLINE, archiver.ended(&self.stop)).await;
        let status = ended.map_err(|_| CliError::failed(anyhow::anyhow!("pgkeep run does not stop")))??;
        if !status.success() {
            let log = fs::read_to_string(self.dir().join("run.log")).unwrap_or_default();
            return Err(CliError::failed(anyhow::anyhow!("pgkeep run failed ({status}):\n{log}")));
        }
        Ok(begun.elapsed())
    }

    fn restored_dir(&self) -> PathBuf {
        self.dir().join("restored")
    }

    /// What PostgreSQL's own tool says of the restored directory; `None` where there is no such tool.
    pub(super) fn verify_backup(&self) -> Result<Option<String>, CliError> {
        let installation = self.server.installation();
        if !installation.program("pg_verifybackup").is_file() {
            return Ok(None);
        }
        let dir = self.restored_dir().display().to_string();
        let run = || installation.run("pg_verifybackup", &[dir], COMMAND_DEADLINE)?.checked();
        let said = tokio::task::block_in_place(run).map_err(CliError::failed)?;
        Ok(Some(said.stdout_text().trim().to_owned()))
    }

    /// Starts the restored cluster, and waits until it has been promoted.
    pub(super) fn start_restored(&mut self, patience: Duration) -> Result<(), CliError> {
        tokio::task::block_in_place(|| {
            let mut restored = Instance::attach(self.server.installation().clone(), &self.restored_dir())?;
            restored.start_within(patience)?;
            let since = Instant::now();
            while restored.sql("SELECT pg_is_in_recovery()")? != "f" && since.elapsed() < patience {
                std::thread::sleep(Duration::from_millis(50));
            }
            self.restored = Some(restored);
            Ok(())
        })
        .map_err(|error: InstanceError| CliError::failed(error).context("start the restored cluster"))
    }

    /// What `--repo` is told, and what follows it.
    pub(super) fn repository(&self) -> Vec<String> {
        match &self.bucket {
            None => vec!["repository".to_owned()],
            Some(bucket) => bucket.arguments.clone(),
        }
    }

    /// The bucket's objects and a store to reach them with; `None` where the repository is a directory, or was never made.
    async fn in_bucket(&self) -> Result<Option<(Arc<dyn Store>, Vec<ObjectMeta>)>, CliError> {
        let file = self.dir().join("pgkeep.toml");
        if self.bucket.is_none() || !file.exists() {
            return Ok(None);
        }
        let config = Config::load(&file)?;
        let store = open::store(&config.repository(None)?.place).await?;
        let objects = list_all(store.as_ref(), "").await.map_err(open::store_error)?;
        Ok(Some((store, objects)))
    }

    /// Removes what the demo has put into a bucket.
    pub(super) async fn empty_bucket(&mut self) -> Result<(), CliError> {
        drop(self.archiver.take()); // nobody may put any more
        let Some((store, objects)) = self.in_bucket().await? else { return Ok(()) };
        for object in objects {
            store.delete(&object.key).await.map_err(open::store_error)?;
        }
        Ok(())
    }

    /// What the repository takes. Reads all of it: that `secret` is nowhere in it is looked at too.
    pub(super) async fn repository_bytes(&self, secret: &str) -> Result<u64, CliError> {
        let is_in = |content: &[u8]| content.windows(secret.len()).any(|window| window == secret.as_bytes());
        let found = |shown: String| CliError::failed(anyhow::anyhow!("{shown} holds {secret:?} in the clear"));
        if let Some((store, objects)) = self.in_bucket().await? {
            let mut bytes = 0;
            for ObjectMeta { key, .. } in objects {
                let content = store.get(&key, None).await.map_err(open::store_error)?;
                if is_in(&content) {
                    return Err(found(key.to_string()));
                }
                bytes += content.len() as u64;
            }
            return Ok(bytes);
        }
        let mut pending = vec![self.dir().join("repository")];
        let mut bytes = 0;
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(&dir).map_err(CliError::failed)? {
                let entry = entry.map_err(CliError::failed)?;
                if entry.file_type().map_err(CliError::failed)?.is_dir() {
                    pending.push(entry.path());
                    continue;
                }
                let content = fs::read(entry.path()).map_err(CliError::failed)?;
                if is_in(&content) {
                    return Err(found(entry.path().display().to_string()));
                }
                bytes += content.len() as u64;
            }
        }
        Ok(bytes)
    }

    /// Stops everything; removes the directory unless it is kept.
    pub(super) fn leave(mut self, keep: bool) -> Result<(), CliError> {
        self.dir.disable_cleanup(keep);
        drop(self.archiver.take());
        let path = self.dir().to_path_buf();
        tokio::task::block_in_place(|| {
            // A kept cluster is left as a clean one.
            for server in self.restored.iter_mut().chain([&mut self.server]) {
                let mode = if keep { StopMode::Fast } else { StopMode::Immediate };
                server.stop_within(mode, STOP_DEADLINE).ok(); // dropping it is the second try
            }
            drop(self);
        });
        match !keep && path.exists() {
            true => Err(CliError::failed(anyhow::anyhow!("{} could not be removed", path.display()))),
            false => Ok(()),
        }
    }
}

/// The server's user may not reach our binary when we are root: in a home directory, say. It gets a copy then.
fn reachable_binary(is_root: bool, dir: &Path) -> Result<PathBuf, CliError> {
    let own = std::env::current_exe().map_err(|error| CliError::failed(error).context("find this program"))?;
    if !is_root {
        return Ok(own);
    }
    let copy = dir.join("pgkeep");
    let copied = fs::copy(&own, &copy).and_then(|_| fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)));
    copied.map_err(|error| CliError::failed(error).context(format!("copy {} to {}", own.display(), copy.display())))?;
    give_to_server_user(&copy).map_err(CliError::failed)?;
    Ok(copy)
}

/// A process of this binary. Dropped, it is ended: with SIGTERM first, and killed when that does not help.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            kill_process(pid, signal).ok(); // not reaped yet: the number is its own; gone already is fine
        }
    }

    /// Waits for its end.
    async fn ended(&mut self, stop: &CancellationToken) -> Result<std::process::ExitStatus, CliError> {
        loop {
            if let Some(status) = self.0.try_wait().map_err(CliError::failed)? {
                return Ok(status);
            }
            tokio::select! {
                () = stop.cancelled() => return Err(CliError::failed(anyhow::anyhow!("the demo was interrupted"))),
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(Some(_)) | Err(_)) {
            return;
        }
        self.signal(Signal::TERM);
        let since = Instant::now();
        while since.elapsed() < STOP_DEADLINE {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(POLL);
        }
        let _ = self.0.kill().and_then(|()| self.0.wait()); // nobody is left to tell
    }
}
