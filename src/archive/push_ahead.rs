//! Acts on [`super::push_plan`]: answers the server's calls, and puts ahead what else is ready.
//!
//! What always holds: a call is answered with success only after a push of its file, as it is now, has succeeded. A push ahead
//! that failed answers nobody.
//! Cancellation: a call that is dropped leaves its push undone. [`PushAhead::finish`] ends what runs ahead: objects are whole or
//! not there, and PostgreSQL offers the files again. Crash: nothing of ours is on disk.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::part::MAX_PART;
use super::push_plan::{Ahead, Asked, Turn, WAITING};

/// What pushes hold in memory, at most, all together: each a part as it is and sealed.
const MEMORY: u64 = 256 << 20;
/// How often it is looked whether a push has ended that a call waits for, should its word get lost.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Pushes one file.
#[async_trait]
pub trait PushFile: Send + Sync + 'static {
    /// Tells a file from what it was before.
    type Identity: Copy + Eq + Send + Sync + 'static;
    /// Why a file is not durable.
    type Error: Send + 'static;

    /// What the file is now, and its length in bytes.
    fn identity(&self, path: &Path) -> io::Result<(Self::Identity, u64)>;

    /// The same, once any later change would show in it.
    async fn settled(&self, path: &Path) -> io::Result<Self::Identity>;

    /// Returns when the file is durable in enough repositories. Has a deadline of its own.
    async fn push(&self, path: &Path) -> Result<(), Self::Error>;
}

/// Looks ahead in a server's `archive_status`. Clones are the same.
pub struct PushAhead<P: PushFile>(Arc<Inner<P>>);

impl<P: PushFile> Clone for PushAhead<P> {
    fn clone(&self) -> Self {
        PushAhead(Arc::clone(&self.0))
    }
}

struct Inner<P: PushFile> {
    files: P,
    /// As the server names it in %p.
    wal: PathBuf,
    /// Most pushes at once, whatever their size.
    jobs: usize,
    state: Mutex<State<P::Identity>>,
    /// Counts pushes ahead that have ended.
    ended: watch::Sender<u64>,
    tasks: TaskTracker,
    cancel: CancellationToken,
}

struct State<I> {
    ahead: Ahead<I>,
    was_asked: bool,
    is_looking: bool,
}

impl<P: PushFile> PushAhead<P> {
    /// For the files in `wal`, at most `jobs` at once.
    pub fn new(files: P, wal: impl Into<PathBuf>, jobs: usize) -> PushAhead<P> {
        let state = State { ahead: Ahead::new(jobs), was_asked: false, is_looking: false };
        PushAhead(Arc::new(Inner {
            files,
            wal: wal.into(),
            jobs,
            state: Mutex::new(state),
            ended: watch::Sender::new(0),
            tasks: TaskTracker::new(),
            cancel: CancellationToken::new(),
        }))
    }

    /// The server asks for the file at `path`: returns when it is durable.
    pub async fn push(&self, path: &Path) -> Result<(), P::Error> {
        let inner = &self.0;
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let (Some(turn), true) = (Turn::of(name), path.parent() == Some(inner.wal.as_path())) else {
            return inner.files.push(path).await; // from elsewhere, by hand
        };
        let mut ended = inner.ended.subscribe();
        loop {
            let Ok((identity, len)) = inner.files.identity(path) else {
                return inner.files.push(path).await; // it says what is wrong
            };
            let asked = {
                let mut state = inner.state();
                state.was_asked = true;
                state.ahead.set_jobs(at_once(inner.jobs, len));
                state.ahead.asked(&turn, identity)
            };
            self.look_ahead();
            match asked {
                Asked::Durable => return Ok(()),
                Asked::Running => {
                    // The sender lives as long as we do; a word that came in between is seen at once.
                    let _ = timeout(LOOK_AGAIN, ended.changed()).await;
                }
                Asked::Push => break,
            }
        }
        let answer = Answering { inner, turn: &turn, is_durable: false };
        let pushed = inner.files.push(path).await;
        answer.end(pushed.is_ok());
        self.look_ahead();
        pushed
    }

    /// Ends what runs ahead. Nothing is begun any more.
    pub async fn finish(&self) {
        self.0.cancel.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// Begins what may run, and looks for more.
    fn look_ahead(&self) {
        let inner = &self.0;
        if inner.cancel.is_cancelled() {
            return;
        }
        let (mut begin, look) = (Vec::new(), {
            let mut state = inner.state();
            let look = !state.is_looking && state.ahead.wants_to_look(state.was_asked);
            if look {
                (state.is_looking, state.was_asked) = (true, false);
            }
            look
        });
        while let Some(turn) = { inner.state().ahead.begin_next() } {
            begin.push(turn);
        }
        for turn in begin {
            let (this, running) = (self.clone(), Running { inner: Arc::clone(inner), turn, durable: None });
            let cancel = inner.cancel.clone();
            inner.tasks.spawn(async move {
                cancel.run_until_cancelled(running.push()).await;
                this.look_ahead();
            });
        }
        if look {
            let this = self.clone();
            inner.tasks.spawn(async move {
                let wal = this.0.wal.clone();
                // What cannot be looked at is not put ahead; the server asks for it all the same.
                let ready = tokio::task::spawn_blocking(move || ready(&wal)).await.ok().and_then(Result::ok);
                {
                    let mut state = this.0.state();
                    state.is_looking = false;
                    state.ahead.seen(ready.unwrap_or_default());
                }
                this.look_ahead();
            });
        }
    }
}

impl<P: PushFile> Inner<P> {
    fn state(&self) -> MutexGuard<'_, State<P::Identity>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner) // each change is one call
    }
}

/// A push that a call waits for. Dropped before its end, it has failed.
struct Answering<'a, P: PushFile> {
    inner: &'a Inner<P>,
    turn: &'a Turn,
    is_durable: bool,
}

impl<P: PushFile> Answering<'_, P> {
    fn end(mut self, is_durable: bool) {
        self.is_durable = is_durable;
    }
}

impl<P: PushFile> Drop for Answering<'_, P> {
    fn drop(&mut self) {
        self.inner.state().ahead.answered(self.turn, self.is_durable);
        self.inner.ended.send_modify(|count| *count = count.wrapping_add(1));
    }
}

/// A push ahead. However it ends, a panic included, who waits for it hears of it.
struct Running<P: PushFile> {
    inner: Arc<Inner<P>>,
    turn: Turn,
    durable: Option<P::Identity>,
}

impl<P: PushFile> Running<P> {
    async fn push(mut self) {
        let path = self.inner.wal.join(self.turn.name());
        let files = &self.inner.files;
        let Ok(before) = files.settled(&path).await else { return };
        let pushed = files.push(&path).await.is_ok();
        let is_same = files.identity(&path).is_ok_and(|(after, _)| after == before);
        self.durable = (pushed && is_same).then_some(before);
        tracing::debug!(file = self.turn.name(), durable = self.durable.is_some(), "put ahead");
    }
}

impl<P: PushFile> Drop for Running<P> {
    fn drop(&mut self) {
        self.inner.state().ahead.done(&self.turn, self.durable);
        self.inner.ended.send_modify(|count| *count = count.wrapping_add(1));
    }
}

/// How many files of this length may be pushed at once.
fn at_once(jobs: usize, len: u64) -> usize {
    let each = 2 * len.clamp(1, MAX_PART);
    usize::try_from(MEMORY / each).unwrap_or(jobs).clamp(1, jobs)
}

/// What the server has marked as ready, the first [`WAITING`] and a few, in order.
fn ready(wal: &Path) -> io::Result<Vec<Turn>> {
    let mut first = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(wal.join("archive_status"))? {
        let name = entry?.file_name();
        let turn = name.to_str().and_then(|name| name.strip_suffix(".ready")).and_then(Turn::of);
        first.extend(turn);
        if first.len() > 8 * WAITING {
            first.pop_last();
        }
    }
    Ok(first.into_iter().collect())
}
