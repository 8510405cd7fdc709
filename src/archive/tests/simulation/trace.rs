//! What happens, in order: as a digest, so that two runs of one seed can be told apart, and as text where somebody reads it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::types::{Digest, SegmentHasher};

/// Everything that the server and the stores see, and the first thing that must not be. Clones are the same one.
#[derive(Clone)]
pub struct Trace(Arc<Inner>);

struct Inner {
    began: Instant,
    shown: bool,
    state: Mutex<State>,
    /// The step has come at which the archiver is to be killed.
    crash: Notify,
    /// Something that must not be was seen.
    wrong: Notify,
}

struct State {
    hasher: SegmentHasher,
    steps: u64,
    crash_at: Option<u64>,
    violation: Option<String>,
}

impl std::fmt::Debug for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Trace({} steps)", self.steps())
    }
}

impl Trace {
    pub fn new(shown: bool) -> Trace {
        let state = State { hasher: SegmentHasher::new(), steps: 0, crash_at: None, violation: None };
        let (crash, wrong) = (Notify::new(), Notify::new());
        Trace(Arc::new(Inner { began: Instant::now(), shown, state: Mutex::new(state), crash, wrong }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One step further. What is random by nature (keys, tokens) must not be in `what`.
    pub fn note(&self, what: impl AsRef<str>) {
        let at = self.0.began.elapsed();
        let what = what.as_ref();
        let mut state = self.state();
        state.hasher.update(&at.as_micros().to_le_bytes());
        state.hasher.update(what.as_bytes());
        state.steps += 1;
        if self.0.shown {
            eprintln!("{:>12.6} {:>5} {what}", at.as_secs_f64(), state.steps);
        }
        if state.crash_at.is_some_and(|at| state.steps >= at) {
            state.crash_at = None;
            self.0.crash.notify_one();
        }
    }

    pub fn steps(&self) -> u64 {
        self.state().steps
    }

    pub fn digest(&self) -> Digest {
        self.state().hasher.digest()
    }

    /// The archiver is killed so many steps from now.
    pub fn crash_in(&self, steps: u64) {
        let mut state = self.state();
        state.crash_at = Some(state.steps + steps);
    }

    pub async fn crash(&self) {
        self.0.crash.notified().await;
    }

    /// Something that must not be. The first one counts.
    pub fn wrong(&self, what: String) {
        self.note(format!("WRONG: {what}"));
        self.state().violation.get_or_insert(what);
        self.0.wrong.notify_one();
    }

    pub async fn is_wrong(&self) {
        self.0.wrong.notified().await;
    }

    pub fn violation(&self) -> Option<String> {
        self.state().violation.clone()
    }
}
