//! Indexes WAL as it streams by, beside the way of what is acknowledged.
//!
//! Invariant: the stream never waits for it. What it has no time for it leaves out, and what it cannot put is missing: nothing
//! but the speed of `pgkeep log` depends on an index, and `pgkeep index rebuild` makes what is missing.
//! Memory: [`WAITING`] parts that wait, one that is read, and one index.
//! Crash and cancellation: an index is there whole or not at all. After a start the WAL of the range that was begun is read
//! from a repository, at most one range of it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::names::names_of;
use super::source::Source;
use crate::catalog::index::{IndexFile, IndexWal, Indexed, MAX_RANGE, range_end};
use crate::catalog::{Repository, off_thread};
use crate::types::{BackupLabel, Branch, ClusterId, Lsn, SegmentNumber, SegmentSize};
use crate::wal::{Kinds, Part, WalDamage, kinds};

/// Parts that wait to be read.
const WAITING: usize = 1;
/// A put that takes longer is given up.
const PUT_DEADLINE: Duration = Duration::from_secs(60);
/// Reading what was begun before us takes at most this long.
const SEED_DEADLINE: Duration = Duration::from_secs(60);
/// It is not done more often than this.
const SEED_PAUSE: Duration = Duration::from_secs(600);
/// The server is asked for names at most this often.
const NAMES_PAUSE: Duration = Duration::from_secs(60);

/// A complete part of the WAL, and where its index goes.
#[derive(Debug)]
pub(super) struct Streamed {
    pub cluster: ClusterId,
    pub branch: Branch,
    pub size: SegmentSize,
    pub from: Lsn,
    pub to: Lsn,
    pub pieces: Vec<Bytes>,
    /// Those that take part.
    pub repositories: Vec<Repository>,
}

/// Takes parts of WAL to be indexed. Clones are the same one; it outlives a stream, so that a new connection goes on with what
/// was begun.
#[derive(Debug, Clone, Default)]
pub struct Indexer(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    parts: OnceLock<mpsc::Sender<Streamed>>,
    source: OnceLock<Source>,
    /// Nothing is indexed.
    is_off: bool,
}

impl Indexer {
    /// One that indexes nothing.
    pub(super) fn off() -> Indexer {
        Indexer(Arc::new(Inner { is_off: true, ..Inner::default() }))
    }

    /// Which server to ask for names when the WAL shows that definitions changed.
    pub(super) fn asks(&self, source: &Source) {
        self.0.source.get_or_init(|| source.clone());
    }

    /// The next part. Never waits.
    pub(super) fn push(&self, part: Streamed) {
        if self.0.is_off {
            return;
        }
        let parts = self.0.parts.get_or_init(|| {
            let (sender, receiver) = mpsc::channel(WAITING);
            let worker = Worker {
                source: self.0.source.get().cloned(),
                begun: None,
                seeded: None,
                named: None,
                definitions_changed: false,
            };
            tokio::spawn(worker.run(receiver));
            sender
        });
        if parts.try_send(part).is_err() {
            tracing::debug!("a part of the WAL is not indexed: there is no time for it");
        }
    }
}

/// A range that was begun.
#[derive(Debug)]
struct Begun {
    branch: Branch,
    index: IndexWal,
}

#[derive(Debug)]
struct Worker {
    source: Option<Source>,
    begun: Option<Begun>,
    /// When what was begun before us was last read.
    seeded: Option<Instant>,
    /// When names were last asked for.
    named: Option<Instant>,
    definitions_changed: bool,
}

impl Worker {
    async fn run(mut self, mut parts: mpsc::Receiver<Streamed>) {
        while let Some(part) = parts.recv().await {
            self.take(part).await;
        }
    }

    async fn take(&mut self, part: Streamed) {
        let begun = self.begun.take().filter(|begun| begun.branch == part.branch);
        let begun = match begun {
            // A new connection sends again what the last one sent.
            Some(begun) if part.to <= begun.index.position() => {
                self.begun = Some(begun);
                return;
            }
            Some(begun) if part.from == begun.index.position() => begun,
            _ => self.begin(&part).await,
        };
        let Streamed { cluster, branch, pieces, repositories, .. } = part;
        // Decoding is work for a thread of its own.
        let indexed = off_thread(move || push_all(begun.index, pieces));
        match indexed.await {
            Ok(Ok((index, finished, definitions_changed))) => {
                self.begun = Some(Begun { branch, index });
                self.definitions_changed |= definitions_changed;
                for indexed in finished {
                    put(&cluster, branch, &repositories, &indexed).await;
                }
            }
            Ok(Err(damage)) => tracing::debug!(%branch, %damage, "WAL that cannot be read is not indexed"),
            Err(error) => tracing::debug!(%branch, %error, "indexing ended abnormally"),
        }
        if self.definitions_changed && self.named.is_none_or(|last| last.elapsed() >= NAMES_PAUSE) {
            self.named = Some(Instant::now());
            self.definitions_changed = !self.note_names(&cluster, &repositories).await;
        }
    }

    /// Goes on with the range that `part` lies in: what comes before it is read from a repository, once in a while.
    async fn begin(&mut self, part: &Streamed) -> Begun {
        let (size, system) = (part.size, Some(part.cluster.system));
        let end = range_end(part.from, size);
        let begin = Lsn::new(end.get().saturating_sub(MAX_RANGE.max(size.bytes())));
        let plain = || IndexWal::new(part.from, end, size, system, Some(part.branch.timeline));
        let index = match part.repositories.first() {
            Some(repository)
                if begin < part.from
                    && repository.can_read()
                    && self.seeded.is_none_or(|last| last.elapsed() >= SEED_PAUSE) =>
            {
                self.seeded = Some(Instant::now());
                let seed = seed(repository, part, begin);
                timeout(SEED_DEADLINE, seed).await.ok().flatten().unwrap_or_else(plain)
            }
            _ => plain(),
        };
        Begun { branch: part.branch, index }
    }

    /// Notes what the relations are called now. Whether it is done.
    async fn note_names(&self, cluster: &ClusterId, repositories: &[Repository]) -> bool {
        let (Some(source), Some(first)) = (&self.source, repositories.first()) else { return true };
        let label = BackupLabel::at(first.now());
        let names = match names_of(&source.conninfo, &source.connect, label).await {
            Ok(names) => names,
            Err(error) => {
                tracing::debug!(%cluster, %error, "the names of relations were not noted");
                return !error.is_retryable();
            }
        };
        for repository in repositories {
            match timeout(PUT_DEADLINE, repository.put_relations(cluster, &names)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%cluster, %error, "the names of relations were not noted"),
                Err(_) => tracing::debug!(%cluster, "the names of relations were not noted in time"),
            }
        }
        true
    }
}

/// Reads complete segments from `begin` to the part; what is missing or does not open begins anew behind it.
async fn seed(repository: &Repository, part: &Streamed, begin: Lsn) -> Option<IndexWal> {
    let (size, end) = (part.size, range_end(part.from, part.size));
    let first = begin.segment(size).get();
    let mut index: Option<IndexWal> = None;
    for number in first..part.from.segment(size).get() {
        let number = SegmentNumber::new(number);
        let read = repository.read_segment(&part.cluster, part.branch, number, size, None).await.ok()?;
        if !read.complete {
            index = None;
            continue;
        }
        let going = index.unwrap_or_else(|| {
            IndexWal::new(number.start(size), end, size, Some(part.cluster.system), Some(part.branch.timeline))
        });
        let pushed = off_thread(move || push_all(going, vec![Bytes::from(read.bytes)])).await.ok()?;
        index = pushed.ok().map(|(index, ..)| index);
    }
    // A part of a large segment that does not begin it: its beginning is not there as a whole.
    index.filter(|index| index.position() == part.from)
}

fn push_all(mut index: IndexWal, pieces: Vec<Bytes>) -> Result<(IndexWal, Vec<Indexed>, bool), WalDamage> {
    let mut finished = Vec::new();
    for piece in pieces {
        finished.extend(index.push(piece)?);
    }
    let changed = finished.iter().any(|(bytes, _)| defines(bytes));
    Ok((index, finished, changed))
}

/// Whether any transaction in an index made or changed a definition.
fn defines(bytes: &[u8]) -> bool {
    let Ok(file) = IndexFile::read(bytes.to_vec()) else { return false };
    let changes = Kinds::DDL.and(Kinds::CREATE);
    file.patterns.iter().any(|pattern| kinds(&Part::of(pattern.touched.clone())).meets(changes))
}

async fn put(cluster: &ClusterId, branch: Branch, repositories: &[Repository], (bytes, note): &Indexed) {
    for repository in repositories {
        match timeout(PUT_DEADLINE, repository.put_index(cluster, branch, bytes, note)).await {
            Ok(Ok(_)) => tracing::debug!(
                repository = repository.name(), %branch, from = %note.from, to = %note.to,
                transactions = note.transactions, bytes = bytes.len(), "WAL was indexed"
            ),
            Ok(Err(error)) => tracing::debug!(repository = repository.name(), %branch, %error, "no index was put"),
            Err(_) => tracing::debug!(repository = repository.name(), %branch, "no index was put in time"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ClusterId, SystemId, TimelineId};

    #[tokio::test]
    async fn one_that_is_off_takes_nothing() {
        let part = || Streamed {
            cluster: ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) },
            branch: Branch::first(TimelineId::FIRST),
            size: SegmentSize::DEFAULT,
            from: Lsn::ZERO,
            to: Lsn::ZERO,
            pieces: Vec::new(),
            repositories: Vec::new(),
        };
        for (indexer, works) in [(Indexer::off(), false), (Indexer::default(), true)] {
            indexer.push(part());
            assert_eq!(indexer.0.parts.get().is_some(), works);
        }
    }
}
