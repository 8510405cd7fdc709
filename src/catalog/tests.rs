//! The room against real stores: memory, and a directory where it matters.

mod copy;
mod events;
mod inventory;
mod keys;
mod repository;
mod resume;
mod sharing;
mod wal;
mod weak;

use std::sync::Arc;

use jiff::Timestamp;

use super::CatalogError;
use super::layout::ClusterObject;
use super::records::WalRangeNote;
use super::repository::{Repository, Usage, random_id};
use super::writer::{Put, SealedRange, WalTail};
use crate::seal::KeyFile;
use crate::store::memory::MemoryStore;
use crate::store::{Body, Key, Store, list_all};
use crate::types::{Branch, ClusterId, Digest, SegmentNumber, SegmentSize, SystemId, TimelineId};

/// 1 MiB: the smallest segments.
fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

const LEN: u32 = 1 << 20;

fn cluster() -> ClusterId {
    ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7_312_345_678_901_234_567) }
}

fn branch(timeline: u32) -> Branch {
    Branch::first(TimelineId::new(timeline).unwrap())
}

fn segment(number: u64) -> SegmentNumber {
    SegmentNumber::new(number)
}

/// A segment's bytes: neither constant nor incompressible, another for every seed.
fn wal(seed: u8) -> Vec<u8> {
    (0..LEN).map(|at| (at / 64).wrapping_mul(31) as u8 ^ (at as u8 & 7) ^ seed).collect()
}

/// Compares without printing a megabyte.
#[track_caller]
fn same(found: &[u8], want: &[u8]) {
    let differs = found.iter().zip(want).position(|(found, want)| found != want);
    assert!(found == want, "{} bytes, not {}; they differ first at {differs:?}", found.len(), want.len());
}

/// A repository in memory, as one run of pgkeep sees it.
struct World {
    store: Arc<dyn Store>,
    keys: KeyFile,
    repo: Repository,
}

impl World {
    async fn new() -> World {
        World::over(Arc::new(MemoryStore::new())).await
    }

    async fn over(store: Arc<dyn Store>) -> World {
        let keys = KeyFile::generate().unwrap();
        let repo = Repository::create("main", store.clone(), &keys).await.unwrap();
        World { store, keys, repo }
    }

    /// The same repository in another process.
    async fn other(&self) -> Repository {
        Repository::open("main", self.store.clone(), self.keys.clone()).await.unwrap()
    }

    async fn names(&self) -> Vec<String> {
        list_all(self.store.as_ref(), "").await.unwrap().into_iter().map(|object| object.key.to_string()).collect()
    }

    /// The one object whose name holds `part`.
    async fn named(&self, part: &str) -> String {
        let names: Vec<String> = self.names().await.into_iter().filter(|name| name.contains(part)).collect();
        assert_eq!(names.len(), 1, "{part}: {names:?}");
        names[0].clone()
    }

    async fn bytes(&self, name: &str) -> Vec<u8> {
        self.store.get(&Key::new(name).unwrap(), None).await.unwrap().to_vec()
    }

    /// What an attacker or a broken disk does: other bytes under a name that is there.
    async fn replace(&self, name: &str, bytes: Vec<u8>) {
        let key = Key::new(name).unwrap();
        self.store.delete(&key).await.unwrap();
        self.store.put_new(&key, Body::from(bytes)).await.unwrap();
    }

    async fn read(&self, number: u64) -> Result<super::SegmentBytes, CatalogError> {
        self.repo.read_segment(&cluster(), branch(1), segment(number), size(), None).await
    }
}

fn note_from(repo: &Repository, history: &[u8], from: u32) -> WalRangeNote {
    WalRangeNote {
        writer: repo.writer(),
        server_version: 150018,
        segment_size: size(),
        digest_from: Digest::of(&history[..from as usize]),
        digest_to: None,
        server_time: None,
        server_end: None,
        durable_to: None,
        conflict: None,
    }
}

fn note(repo: &Repository, history: &[u8], from: u32, to: u32) -> WalRangeNote {
    WalRangeNote { digest_to: Some(Digest::of(&history[..to as usize])), ..note_from(repo, history, from) }
}

async fn sealed(
    repo: &Repository,
    history: &[u8],
    on: Branch,
    number: u64,
    range: (u32, u32),
    open: bool,
) -> SealedRange {
    let (from, to) = range;
    let mut sealer = if open {
        repo.seal_open(&cluster(), on, segment(number), size(), from).await.unwrap()
    } else {
        repo.seal_wal(&cluster(), on, segment(number), size(), range).await.unwrap()
    };
    for chunk in history[from as usize..to as usize].chunks(100_000) {
        sealer.push(chunk).unwrap();
    }
    sealer.finish(to, note(repo, history, from, to)).unwrap()
}

async fn put_whole(repo: &Repository, history: &[u8], number: u64) -> Put {
    repo.put_range(&sealed(repo, history, branch(1), number, (0, LEN), false).await).await.unwrap()
}

async fn put_open(repo: &Repository, history: &[u8], number: u64, range: (u32, u32)) -> Put {
    repo.put_range(&sealed(repo, history, branch(1), number, range, true).await).await.unwrap()
}

/// A tail that holds `[from, to)`, in appends of at most `step` bytes.
async fn put_tail(repo: &Repository, history: &[u8], number: u64, (from, to): (u32, u32), step: usize) -> WalTail {
    let note = note_from(repo, history, from);
    let mut tail = repo.open_wal_tail(&cluster(), branch(1), segment(number), size(), from, &note).await.unwrap();
    for chunk in history[from as usize..to as usize].chunks(step) {
        tail.append(tail.to(), chunk).await.unwrap();
    }
    assert_eq!(tail.to(), to);
    tail
}

fn usage_at(text: &str) -> Usage {
    let now: Timestamp = text.parse().unwrap();
    Usage { clock: Arc::new(move || now), writer: random_id().unwrap(), short_lived: false }
}
