//! The helper of `wal push`: holds repositories open, and puts ahead what else is ready.
//!
//! An answer is 0 only after the file, as it is now, became durable in enough repositories; what the work logged goes with it, to
//! the server's log. After a failure that another process might not have (its keys, its connections) it answers and leaves.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;

use super::push::{HELPER, Pusher};
use super::quick::{PUSH, Plain};
use crate::archive::push_ahead::{PushAhead, PushFile};
use crate::archive::push_index::Backlog;
use crate::cli::logging::Collected;
use crate::cli::{CliError, Context, Exit};
use crate::helper::{self, Answer, FileIdentity, HelperError, NotStarted, Place, Rules, Serve};

/// Longer than the minute that PostgreSQL waits after three failures, or between segments with `archive_timeout = 60`.
const IDLE: Duration = Duration::from_secs(90);
/// Two changes of a file within one tick of the kernel's clock have one time.
const TICK: Duration = Duration::from_millis(20);
/// What is left to be indexed may take so long when it leaves.
const INDEXING: Duration = Duration::from_secs(10);
/// Pushes at once: one more than processors, for who waits for a disk.
const JOBS: (usize, usize) = (2, 4);

/// Runs the helper until it leaves.
pub(super) async fn run(context: &Context) -> Result<Exit, CliError> {
    let args: Vec<_> = std::env::args_os().collect();
    let not_plain = || CliError::usage(anyhow::anyhow!("a helper is started by `wal push`, not by hand"));
    let call = Plain::read(&args, "push", &PUSH).and_then(|plain| plain.call()).ok_or_else(not_plain)?;
    let place = Place::new("", HELPER);
    // Before the configuration is read: what changes from now on is another call.
    let failed = |error: io::Error| CliError::failed(error).context("look at the configuration and the data directory");
    let fingerprint = call.fingerprint(&place).map_err(failed)?;
    let jobs = available_parallelism().map_or(1, usize::from).saturating_add(1).clamp(JOBS.0, JOBS.1);
    let backlog = Backlog::default();
    let service = Arc::new(Pushes {
        ahead: PushAhead::new(Files(Pusher::new(context)?.indexing_later(backlog.clone())), "pg_wal", jobs),
        log: context.log.clone(),
        has_failed: AtomicBool::new(false),
    });
    let serving = Arc::clone(&service) as Arc<dyn Serve>;
    let left = tokio::select! {
        biased;
        left = helper::serve(&place, &call, fingerprint, Rules::of(IDLE), serving) => left,
        () = backlog.work() => return Ok(Exit::Done), // not reached: it goes on for ever
    };
    let left = match left {
        Err(HelperError::NotStarted(NotStarted::Running)) => return Ok(Exit::Done),
        left => left.map_err(CliError::failed)?,
    };
    service.ahead.finish().await;
    backlog.finish(INDEXING).await;
    // To the helper's own log: no hook came for it.
    context.output.note(format_args!("{}left: {left:?}", context.log.take()));
    Ok(Exit::Done)
}

struct Pushes {
    ahead: PushAhead<Files>,
    log: Collected,
    has_failed: AtomicBool,
}

#[async_trait]
impl Serve for Pushes {
    async fn answer(&self, request: &str) -> Option<Answer> {
        let pushed = self.ahead.push(Path::new(request)).await;
        let mut text = self.log.take();
        let code = match pushed {
            Ok(()) => 0,
            Err(error) => {
                // What is refused is refused by everybody.
                if error.exit() != Exit::Refused {
                    self.has_failed.store(true, Ordering::Relaxed);
                }
                text.push_str(&format!("error: {error}\n"));
                1
            }
        };
        Some(Answer { code, text })
    }

    fn wants_to_leave(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed)
    }
}

struct Files(Pusher);

#[async_trait]
impl PushFile for Files {
    type Identity = FileIdentity;
    type Error = CliError;

    fn identity(&self, path: &Path) -> io::Result<(FileIdentity, u64)> {
        FileIdentity::of(path).map(|identity| (identity, identity.len()))
    }

    async fn settled(&self, path: &Path) -> io::Result<FileIdentity> {
        let identity = FileIdentity::of(path)?;
        let (seconds, nanoseconds) = identity.modified();
        let modified = Duration::new(seconds.try_into().unwrap_or(0), nanoseconds.try_into().unwrap_or(0));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if now < modified + TICK {
            tokio::time::sleep(TICK).await;
            return FileIdentity::of(path);
        }
        Ok(identity)
    }

    async fn push(&self, path: &Path) -> Result<(), CliError> {
        self.0.push(path).await
    }
}
