//! Indexes a segment that `archive_command` brought, once it is durable.
//!
//! What always holds: the push has succeeded already and does not fail any more. The record that goes on beyond the segment
//! is read from the server's next file, beside it; where that is not written far enough yet, the index is left out, and
//! `pgkeep index rebuild` makes it.
//! While more is waiting to be archived, that comes first: a helper keeps a [`Backlog`] of names, and indexes them when no push
//! is under way, after [`PATIENCE`] in any case. The server keeps a file until its next checkpoint; one that is gone before, or is
//! left behind by a crash, is `index rebuild`'s, too.
//! Memory: 1 MiB of WAL, one index; a backlog holds names alone, and [`WAITING`] of them.
//! Cancellation: what is left of a backlog is not indexed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use crate::catalog::Repository;
use crate::catalog::index::{IndexWal, Indexed};
use crate::types::{Branch, ClusterId, SegmentNumber, SegmentSize};

const PIECE: usize = 1 << 20;
/// PostgreSQL waits for us.
const DEADLINE: Duration = Duration::from_secs(10);

/// Segments that wait for their index. One more is indexed at once.
const WAITING: usize = 4096;
/// How long one waits for a moment without pushes.
const PATIENCE: Duration = Duration::from_secs(30);

/// What becomes of the index of a segment that is new.
#[derive(Debug, Clone, Copy)]
pub enum Indexing<'a> {
    /// None is made.
    No,
    /// It is made before the push returns.
    Now,
    /// It is made later, by who [works](Backlog::work) on this.
    Later(&'a Backlog),
}

/// Segments that are durable and have no index yet. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Backlog(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    waiting: Mutex<VecDeque<Waiting>>,
    /// Pushes under way.
    pushes: watch::Sender<usize>,
    /// Segments that wait.
    count: watch::Sender<usize>,
}

#[derive(Debug)]
struct Waiting {
    repository: Repository,
    cluster: ClusterId,
    branch: Branch,
    segment: (SegmentNumber, SegmentSize),
    path: PathBuf,
    until: Instant,
}

/// A push is under way until this is dropped.
#[derive(Debug)]
pub(super) struct Pushing<'a>(&'a Inner);

impl Drop for Pushing<'_> {
    fn drop(&mut self) {
        self.0.pushes.send_modify(|count| *count = count.saturating_sub(1));
    }
}

impl Backlog {
    /// Notes that a push begins.
    pub(super) fn pushing(&self) -> Pushing<'_> {
        self.0.pushes.send_modify(|count| *count += 1);
        Pushing(&self.0)
    }

    /// Indexes what waits, one after the other, for ever.
    pub async fn work(&self) {
        let (mut pushes, mut count) = (self.0.pushes.subscribe(), self.0.count.subscribe());
        loop {
            // invariant: the senders live in `self`
            let _ = count.wait_for(|count| *count > 0).await;
            let Some(until) = self.waiting().front().map(|oldest| oldest.until) else { continue };
            let _ = timeout_at(until, pushes.wait_for(|pushes| *pushes == 0)).await;
            self.index_oldest().await;
        }
    }

    /// Indexes all that waits, for `within` at most.
    pub async fn finish(&self, within: Duration) {
        let _ = timeout(within, async { while self.index_oldest().await {} }).await; // `index rebuild` makes the rest
    }

    async fn index_oldest(&self) -> bool {
        let oldest = self.waiting().pop_front();
        let Some(Waiting { repository, cluster, branch, segment, path, .. }) = oldest else { return false };
        self.0.count.send_modify(|count| *count = count.saturating_sub(1));
        index_segment(&repository, &cluster, branch, segment, (&path, Vec::new())).await;
        true
    }

    fn add(&self, waiting: Waiting) -> Result<(), Waiting> {
        let mut all = self.waiting();
        if all.len() >= WAITING {
            return Err(waiting);
        }
        all.push_back(waiting);
        drop(all);
        self.0.count.send_modify(|count| *count += 1);
        Ok(())
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner) // each change is one call
    }
}

/// Has a segment indexed as `indexing` says. `file`: where it is, and all its bytes or none.
pub(super) async fn index(
    indexing: Indexing<'_>,
    repository: &Repository,
    cluster: &ClusterId,
    branch: Branch,
    segment: (SegmentNumber, SegmentSize),
    (path, pieces): (&Path, Vec<Bytes>),
) {
    let later = match indexing {
        Indexing::No => return,
        Indexing::Now => None,
        Indexing::Later(backlog) => Some(backlog),
    };
    let waits = later.is_some_and(|backlog| {
        let (repository, cluster, path) = (repository.clone(), cluster.clone(), path.to_owned());
        backlog.add(Waiting { repository, cluster, branch, segment, path, until: Instant::now() + PATIENCE }).is_ok()
    });
    if !waits {
        index_segment(repository, cluster, branch, segment, (path, pieces)).await;
    }
}

/// Indexes the segment in the file at `path`. `pieces`: all its bytes, or none: then they are read.
async fn index_segment(
    repository: &Repository,
    cluster: &ClusterId,
    branch: Branch,
    (segment, size): (SegmentNumber, SegmentSize),
    (path, pieces): (&Path, Vec<Bytes>),
) {
    let (path, system) = (path.to_owned(), cluster.system);
    let indexed = tokio::task::spawn_blocking(move || {
        let mut index =
            IndexWal::new(segment.start(size), segment.end(size), size, Some(system), Some(branch.timeline));
        let next = SegmentNumber::new(segment.get().saturating_add(1)).file_name(branch.timeline, size);
        let next = path.with_file_name(next);
        let files = if pieces.is_empty() { vec![path.as_path(), &next] } else { vec![next.as_path()] };
        for piece in pieces {
            if let Some(indexed) = index.push(piece).ok()?.into_iter().next() {
                return Some(indexed);
            }
        }
        read(index, &files)
    });
    let put = async {
        let Ok(Some((bytes, note))) = indexed.await else {
            tracing::debug!(%branch, segment = segment.get(), "the segment is not indexed: its last record goes on, or its file is gone");
            return;
        };
        match repository.put_index(cluster, branch, &bytes, &note).await {
            Ok(_) => {
                tracing::debug!(%branch, from = %note.from, transactions = note.transactions, "the segment is indexed")
            }
            Err(error) => tracing::debug!(%branch, %error, "the segment is not indexed"),
        }
    };
    if timeout(DEADLINE, put).await.is_err() {
        tracing::debug!(%branch, segment = segment.get(), "the segment is not indexed in time");
    }
}

/// The first range of the files, one after the other; `None` where they end before it does.
fn read(mut index: IndexWal, files: &[&Path]) -> Option<Indexed> {
    for path in files {
        let mut file = File::open(path).ok()?;
        loop {
            let mut piece = vec![0; PIECE];
            let len = file.read(&mut piece).ok()?;
            if len == 0 {
                break;
            }
            piece.truncate(len);
            // Behind its end the server's open file holds what it was before: that is no damage of ours.
            if let Some(indexed) = index.push(piece).ok()?.into_iter().next() {
                return Some(indexed);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::KeyFile;
    use crate::store::memory::MemoryStore;
    use crate::types::{Lsn, SystemId, TimelineId};
    use crate::wal::builder::{SYSTEM, WalBuilder};

    struct World {
        repository: Repository,
        cluster: ClusterId,
        branch: Branch,
        size: SegmentSize,
        pg_wal: tempfile::TempDir,
    }

    impl World {
        /// A `pg_wal` with three segments in it.
        async fn new() -> World {
            let size = SegmentSize::new(1 << 20).unwrap();
            let store = Arc::new(MemoryStore::new());
            let repository = Repository::create("main", store, &KeyFile::generate().unwrap()).await.unwrap();
            let cluster = ClusterId { name: "main".parse().unwrap(), system: SystemId::new(SYSTEM) };
            let branch = Branch::first(TimelineId::new(1).unwrap());
            let mut wal = WalBuilder::new(17, size, Lsn::new(1 << 20));
            for xid in 1000..1003 {
                wal.record(1, 0, xid, &crate::wal::builder::main_fragment(&[0; 8]));
                wal.switch();
            }
            let pg_wal = tempfile::tempdir().unwrap();
            for (number, bytes) in (1..).zip(wal.bytes.chunks(1 << 20)) {
                let name = SegmentNumber::new(number).file_name(branch.timeline, size);
                std::fs::write(pg_wal.path().join(name), bytes).unwrap();
            }
            World { repository, cluster, branch, size, pg_wal }
        }

        async fn index(&self, indexing: Indexing<'_>, number: u64) {
            let segment = SegmentNumber::new(number);
            let path = self.pg_wal.path().join(segment.file_name(self.branch.timeline, self.size));
            index(indexing, &self.repository, &self.cluster, self.branch, (segment, self.size), (&path, Vec::new()))
                .await;
        }

        async fn indexed(&self) -> usize {
            self.repository.list_indexes(&self.cluster, self.branch).await.unwrap().len()
        }

        /// Lets `backlog` work until so many are indexed, or for `within`; says how long it took.
        async fn works(&self, backlog: &Backlog, many: usize, within: Duration) -> Duration {
            let began = Instant::now();
            let enough = async {
                while self.indexed().await < many {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::select! {
                () = backlog.work() => {}
                _ = timeout(within, enough) => {}
            }
            began.elapsed()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pushes_come_first_and_indexes_come_in_the_end() {
        let (world, backlog) = (World::new().await, Backlog::default());
        let (one, two) = (backlog.pushing(), backlog.pushing());
        world.index(Indexing::Later(&backlog), 1).await;
        world.index(Indexing::Later(&backlog), 2).await;
        drop(one);
        world.works(&backlog, 1, PATIENCE / 2).await;
        assert_eq!(world.indexed().await, 0, "a push is under way");
        drop(two);
        assert!(world.works(&backlog, 2, PATIENCE).await < PATIENCE / 2);
        assert_eq!(world.indexed().await, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_backlog_that_never_ends_is_indexed_all_the_same() {
        let (world, backlog) = (World::new().await, Backlog::default());
        let _pushing = backlog.pushing();
        world.index(Indexing::Later(&backlog), 1).await;
        assert!(world.works(&backlog, 1, 10 * PATIENCE).await >= PATIENCE);
        assert_eq!(world.indexed().await, 1);
    }

    #[tokio::test]
    async fn who_leaves_indexes_what_waits_and_a_file_that_is_gone_holds_nothing_up() {
        let (world, backlog) = (World::new().await, Backlog::default());
        let _pushing = backlog.pushing();
        for number in [1, 9, 2] {
            world.index(Indexing::Later(&backlog), number).await;
        }
        backlog.finish(Duration::from_secs(60)).await;
        assert_eq!(world.indexed().await, 2);
        assert_eq!(backlog.waiting().len(), 0);
    }

    #[tokio::test]
    async fn without_a_helper_it_is_made_at_once_or_not_at_all() {
        let world = World::new().await;
        world.index(Indexing::No, 1).await;
        assert_eq!(world.indexed().await, 0);
        world.index(Indexing::Now, 1).await;
        assert_eq!(world.indexed().await, 1);
    }
}
