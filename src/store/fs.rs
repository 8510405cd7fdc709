//! A repository in a directory, which writes like a database.
//!
//! An object is written under a temporary name in `.pgkeep-tmp/`, synced, given its own name without replacing what is
//! there (`renameat2(RENAME_NOREPLACE)`, else `link`), and its directory is synced; directories that are new are synced
//! into their parents, up to the root. Only then does `put_new` return.
//!
//! What always holds: under a name that [`list`](Store::list) shows lies a whole object or a tail. Nothing outside of
//! the root is read or written: symbolic links below it are not followed, they are [`StoreError::Damaged`]. The
//! root is never made by anything but [`FsStore::create`]: if its path no longer leads to the directory that was opened
//! (unmounted, moved, another disk), writes and "not found" become [`StoreError::Vanished`]. When it leads to the same
//! repository again, on whatever device (mounted anew, a disk replaced by its copy), that is opened and used: the same is
//! the one that holds the same `format/0001.json`, in which there is an identity that no other repository has. Tails that were
//! open then stay closed.
//! Crash: leaves temporaries, which a later [`FsStore::open`] removes when nobody has them locked and they are older than
//! [`FsOptions::grace`]; and directories that are empty, which no listing shows.
//! Cancellation: file calls run on tokio's blocking pool, at most [`FsOptions::threads`] at once. One that has begun goes
//! on to its end after its future was dropped; a put is then done completely or not at all. Nothing here has a deadline
//! (a file call cannot be stopped): [`Retry`](super::retry::Retry) adds it. A process that stops while a file
//! system hangs has to shut its runtime down with a timeout, or it waits for the file system.
//!
//! Modes: directories 0700 and files 0600, less the umask. Not 0400, though objects never change: the seal protects them, root would not
//! notice, and SMB mounts refuse to delete files that are read-only.

mod list;
mod root;
mod tail;

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Semaphore;

use self::root::Root;
use super::{Body, Created, Key, ListRequest, Listing, MAX_BODY, MAX_READ, ObjectMeta, Op, Store, StoreError, Tail};

/// How a directory store behaves.
#[derive(Debug, Clone)]
pub struct FsOptions {
    /// How old, by the file system's own clock, an unlocked temporary must be before it is removed.
    pub grace: Duration,
    /// Most file calls at once. Calls that hang (a dead NFS server) count until they end, even when nobody waits for
    /// them any more.
    pub threads: usize,
}

impl Default for FsOptions {
    fn default() -> Self {
        // An hour: longer than any deadline for one put, so that even where locks do nothing no living writer is hit.
        FsOptions { grace: Duration::from_secs(3600), threads: 32 }
    }
}

/// A directory repository. See the module's head. Clones are the same store.
#[derive(Clone)]
pub struct FsStore {
    path: Arc<Path>,
    /// The directory as it was opened last.
    root: Arc<Mutex<Arc<Root>>>,
    threads: Arc<Semaphore>,
}

impl FsStore {
    /// Makes the directory `path`, with its parents, durably, and opens it. A directory that is there is opened as it is.
    pub async fn create(path: impl AsRef<Path>) -> Result<FsStore, StoreError> {
        let path = path.as_ref().to_path_buf();
        let made = path.clone();
        blocking(Op::Open, &path.display().to_string(), move || root::create_directory(&made)).await?;
        FsStore::open(path).await
    }

    /// Opens the directory `path`, which must be there, and removes what crashes left behind long ago.
    pub async fn open(path: impl AsRef<Path>) -> Result<FsStore, StoreError> {
        FsStore::open_with(path, FsOptions::default()).await
    }

    /// [`open`](FsStore::open), with options.
    pub async fn open_with(path: impl AsRef<Path>, options: FsOptions) -> Result<FsStore, StoreError> {
        let path = path.as_ref().to_path_buf();
        let at = path.display().to_string();
        let root = blocking(Op::Open, &at, move || {
            let root = Root::open(&path)?;
            root.remove_leftovers(options.grace);
            Ok(root)
        })
        .await?;
        let path = Arc::from(root.path());
        let root = Arc::new(Mutex::new(Arc::new(root)));
        Ok(FsStore { path, root, threads: Arc::new(Semaphore::new(options.threads.max(1))) })
    }

    /// The directory, as an absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where `key` lies, for messages.
    fn at(&self, key: &Key) -> String {
        format!("{}/{key}", self.path.display())
    }

    /// Runs `call` on the blocking pool, within the bound on threads.
    async fn run<T: Send + 'static>(
        &self,
        op: Op,
        at: &str,
        call: impl FnOnce(&Arc<Root>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let at = format!("{}/{at}", self.path.display());
        // Nobody closes the semaphore, but saying so by a panic gains nothing.
        let permit = match self.threads.clone().acquire_owned().await {
            Ok(permit) => permit,
            Err(closed) => return Err(StoreError::Unavailable { op, at, source: closed.into() }),
        };
        let root = self.root.clone();
        blocking(op, &at, move || {
            let _until_done = permit; // moved in: a hanging call keeps its place after its future is gone
            call(&current(&root))
        })
        .await
    }
}

/// The directory to use: the one that is open, or, where the path leads to another one by now, that one if it is the same
/// repository. If it is not, the calls on the old one say that it has vanished.
fn current(shared: &Mutex<Arc<Root>>) -> Arc<Root> {
    let guard = || shared.lock().unwrap_or_else(PoisonError::into_inner); // one value, whole after any panic
    let root = guard().clone();
    if root.check_there().is_ok() {
        return root;
    }
    match root.open_again() {
        Ok(Some(again)) => {
            tracing::warn!(
                repository = %root.path().display(),
                "the repository's directory is another one than before and holds the same repository; going on with it"
            );
            let again = Arc::new(again);
            *guard() = again.clone();
            again
        }
        Ok(None) => root,
        Err(error) => {
            tracing::debug!(repository = %root.path().display(), %error, "not there again yet");
            root
        }
    }
}

/// `call` on tokio's blocking pool; what happens to the thread becomes an error of the call.
async fn blocking<T: Send + 'static>(
    op: Op,
    at: &str,
    call: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result,
        Err(stopped) => Err(StoreError::Unavailable { op, at: at.to_string(), source: stopped.into() }),
    }
}

impl fmt::Debug for FsStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FsStore({})", self.path.display())
    }
}

#[async_trait]
impl Store for FsStore {
    fn describe(&self) -> String {
        self.path.display().to_string()
    }

    fn appends(&self) -> bool {
        true
    }

    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError> {
        if body.len() > MAX_BODY {
            let at = self.at(key);
            return Err(StoreError::TooLarge { op: Op::Put, at, len: body.len(), limit: MAX_BODY });
        }
        let key = key.clone();
        self.run(Op::Put, key.clone().as_str(), move |root| root.put_new(&key, &body)).await
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let key = key.clone();
        self.run(Op::Get, key.clone().as_str(), move |root| root.get(&key, range)).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        let key = key.clone();
        self.run(Op::Head, key.clone().as_str(), move |root| root.head(&key)).await
    }

    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        let request = request.clone();
        self.run(Op::List, request.prefix.clone().as_str(), move |root| root.list(&request)).await
    }

    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        let key = key.clone();
        self.run(Op::Sync, key.clone().as_str(), move |root| root.sync(&key)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let key = key.clone();
        self.run(Op::Delete, key.clone().as_str(), move |root| root.delete(&key)).await
    }

    async fn open_tail(&self, key: &Key, capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        if capacity > MAX_READ {
            let at = self.at(key);
            return Err(StoreError::TooLarge { op: Op::OpenTail, at, len: capacity, limit: MAX_READ });
        }
        let key = key.clone();
        let at = key.to_string();
        let tail = self.run(Op::OpenTail, &at, move |root| tail::FsTail::create(root, &key, capacity)).await?;
        Ok(Box::new(tail))
    }
}

#[cfg(test)]
mod tests;
