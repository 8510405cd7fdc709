//! Answers requests from what was opened ahead, and opens ahead: what the helper of `wal fetch` does.
//!
//! [`Shelf`] decides; this acts. Every answer is one that a request of its own would have got: what is not staged is looked for
//! anew, and the staged segments were read by the same rules. Faults are not judged here: [`Prefetch::answer`] hands them to
//! the caller, who lets the hook do the whole work itself, with its patience and its words.
//!
//! Cancellation: an answer may be dropped at any await. Crash: leaves the spool's directory, which the next one removes.
//! Memory: a segment per opening, and one for the request.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::ahead::{Answer, Bounds, Shelf, Wanted};
use super::pool::{Opened, Places, Pool};
use super::spool::{Spool, Staged, is_full};
use super::{FetchError, Local, Request, Way};
use crate::types::ClusterName;

/// See the module's head. Clones share everything.
#[derive(Clone)]
pub struct Prefetch(Arc<Shared>);

struct Shared {
    places: Arc<dyn Places + Send>,
    cluster: Option<ClusterName>,
    local: Local,
    way: Way,
    opened: Opened,
    spool: Arc<Spool>,
    shelf: Mutex<Shelf<Staged>>,
    /// Counts openings that have ended.
    ended: watch::Sender<u64>,
}

impl Prefetch {
    /// For one way, cluster and data directory.
    pub fn new(
        places: Arc<dyn Places + Send>,
        cluster: Option<ClusterName>,
        local: Local,
        way: Way,
        spool: Arc<Spool>,
        bounds: Bounds,
    ) -> Prefetch {
        let shelf = Mutex::new(Shelf::new(way.clone(), local.size, bounds));
        let (opened, ended) = (Opened::default(), watch::Sender::new(0));
        Prefetch(Arc::new(Shared { places, cluster, local, way, opened, spool, shelf, ended }))
    }

    /// The file that answers a request, for the hook to rename; `None`: it is not there, by the rules of `wal fetch`.
    ///
    /// # Errors
    /// [`FetchError`]: no answer. The hook has to find one itself.
    pub async fn answer(&self, name: &str) -> Result<Option<Staged>, FetchError> {
        let Some(wanted) = self.shelf().wanted(name) else { return self.now(name).await };
        let mut ended = self.0.ended.subscribe();
        let staged = loop {
            ended.mark_unchanged();
            let (answer, stale) = self.shelf().request(wanted);
            drop(stale);
            match answer {
                Answer::Shelf(staged) => break Some(staged),
                Answer::Repositories => break None,
                Answer::Opening => {
                    self.look_ahead();
                    // invariant: the sender lives in `self`
                    let _ = ended.changed().await;
                }
            }
        };
        if staged.is_some() {
            self.look_ahead();
            return Ok(staged);
        }
        let answer = self.now(name).await;
        // Behind a request that was not answered with a file there is nothing to be had, either.
        if let Ok(Some(_)) = answer {
            self.look_ahead();
        }
        answer
    }

    /// Opens what follows `name`, which the hook was served by other means.
    pub fn begin_behind(&self, name: &str) {
        let Some(wanted) = self.shelf().wanted(name) else { return };
        let (_, stale) = self.shelf().request(wanted);
        drop(stale);
        self.look_ahead();
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf<Staged>> {
        self.0.shelf.lock().unwrap_or_else(PoisonError::into_inner) // each step of it leaves it whole
    }

    /// Starts what the shelf says is next.
    fn look_ahead(&self) {
        loop {
            let free_bytes = self.0.spool.free_bytes();
            let Some(wanted) = self.shelf().next(free_bytes) else { return };
            let this = self.clone();
            let opening = Opening { prefetch: self.clone(), wanted, staged: None };
            tokio::spawn(async move {
                let mut opening = opening;
                match this.stage(wanted).await {
                    Ok(staged) => opening.staged = staged,
                    Err(error) => tracing::debug!(%error, "nothing opened ahead"),
                }
            });
        }
    }

    /// Reads a whole segment into the spool; `None`: it is not there whole.
    async fn stage(&self, wanted: Wanted) -> Result<Option<Staged>, FetchError> {
        let name = wanted.segment.file_name(wanted.timeline, self.0.local.size);
        let pool = self.pool();
        let Some(bytes) = self.request(&pool, &name).whole_segment().await? else { return Ok(None) };
        self.write(name.clone(), bytes).await.map(Some)
    }

    /// A request without anything ahead.
    async fn now(&self, name: &str) -> Result<Option<Staged>, FetchError> {
        let bytes = {
            let pool = self.pool();
            self.request(&pool, name).bytes().await?
        };
        let Some(bytes) = bytes else { return Ok(None) };
        match self.write(name.to_owned(), bytes).await {
            // What waits for later is worth less than what recovery stands still for; the hook tries once more.
            Err(error) if is_full(&error) => {
                drop(self.shelf().clear());
                Err(error)
            }
            written => written.map(Some),
        }
    }

    fn pool(&self) -> Pool<'_> {
        Pool::remembering(&*self.0.places, self.0.cluster.as_ref(), Some(self.0.local), &self.0.opened)
    }

    fn request<'a>(&'a self, pool: &'a Pool<'a>, name: &'a str) -> Request<'a> {
        Request { pool, local: Some(self.0.local), way: &self.0.way, name, patience: Duration::ZERO }
    }

    async fn write(&self, name: String, bytes: Vec<u8>) -> Result<Staged, FetchError> {
        let spool = Arc::clone(&self.0.spool);
        let written = tokio::task::spawn_blocking(move || spool.stage(&name, &bytes));
        written.await.map_err(|error| FetchError::Task(error.to_string()))?
    }
}

/// An opening under way: whatever becomes of it, the shelf learns that it has ended.
struct Opening {
    prefetch: Prefetch,
    wanted: Wanted,
    staged: Option<Staged>,
}

impl Drop for Opening {
    fn drop(&mut self) {
        let staged = self.staged.take();
        let succeeded = staged.is_some();
        let unwanted = self.prefetch.shelf().opened(self.wanted, staged);
        drop(unwanted);
        self.prefetch.0.ended.send_modify(|ended| *ended = ended.wrapping_add(1));
        if succeeded && tokio::runtime::Handle::try_current().is_ok() {
            self.prefetch.look_ahead();
        }
    }
}

#[cfg(test)]
mod tests;
