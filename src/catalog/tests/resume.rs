use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::inventory::{gap, lsn, put_gap};
use super::*;
use crate::catalog::layout::{RangeName, SegmentName};
use crate::catalog::repository::name_of;
use crate::catalog::{MAX_RANGE, Resume};
use crate::store::{Created, ListRequest, Listing, ObjectMeta, StoreError, Tail};
use crate::types::Lsn;

async fn resume(repo: &Repository) -> Option<Resume> {
    repo.resume(&cluster(), branch(1)).await.unwrap()
}

/// The end in a segment of 1 MiB, and how much of it whole objects hold.
fn at(number: u64, offset: u32, durable: u32, history: &[u8]) -> Option<Resume> {
    let expected = vec![(lsn(number, offset), Digest::of(&history[..offset as usize]))];
    Some(Resume { at: lsn(number, offset), segment_size: size(), expected, durable: lsn(number, durable) })
}

/// Where nothing can be compared.
fn behind(at: Lsn) -> Option<Resume> {
    Some(Resume { at, segment_size: size(), expected: Vec::new(), durable: at })
}

async fn spoil(world: &World, name: &str) {
    let mut bytes = world.bytes(name).await;
    let last = bytes.len() - 9;
    bytes[97] ^= 1; // behind the header; in a tail the prelude
    bytes[last] ^= 1; // the footer's tag
    world.replace(name, bytes).await;
}

#[tokio::test]
async fn resuming_asks_for_the_end_and_its_digest() {
    let world = World::new().await;
    let repo = &world.repo;
    assert_eq!(resume(repo).await, None);
    drop(put_tail(repo, &wal(1), 1, (0, 0), 1).await);
    assert_eq!(resume(repo).await, behind(lsn(1, 0)));
    put_whole(repo, &wal(1), 1).await;
    assert_eq!(resume(repo).await, at(1, LEN, LEN, &wal(1)));
    put_open(repo, &wal(2), 2, (0, 1000)).await;
    assert_eq!(resume(repo).await, at(2, 1000, 1000, &wal(2)));
    drop(put_tail(repo, &wal(2), 2, (1000, 5000), 700).await);
    assert_eq!(resume(repo).await, at(2, 5000, 1000, &wal(2)));
    // Put out of order, and the one between is missing.
    put_whole(repo, &wal(3), 3).await;
    assert_eq!(resume(repo).await, at(2, 5000, 1000, &wal(2)), "P3: what lies behind a hole does not count");
    put_whole(repo, &wal(2), 2).await;
    assert_eq!(resume(repo).await, at(3, LEN, LEN, &wal(3)));
    put_gap(repo, &gap(lsn(4, 0), lsn(7, 0))).await.unwrap();
    put_gap(repo, &gap(lsn(7, 0), lsn(9, 0))).await.unwrap();
    assert_eq!(resume(repo).await, behind(lsn(9, 0)));
    put_whole(repo, &wal(9), 9).await;
    assert_eq!(resume(repo).await, at(9, LEN, LEN, &wal(9)));
}

#[tokio::test]
async fn p1_what_only_a_tail_holds_is_not_durable() {
    let world = World::new().await;
    put_whole(&world.repo, &wal(1), 1).await;
    drop(put_tail(&world.repo, &wal(2), 2, (0, LEN), 300_000).await);
    assert_eq!(resume(&world.repo).await, at(2, LEN, 0, &wal(2)), "however much of the segment it is");
    put_open(&world.repo, &wal(2), 2, (0, 1000)).await;
    put_open(&world.repo, &wal(2), 2, (1000, 2000)).await;
    assert_eq!(resume(&world.repo).await, at(2, LEN, 2000, &wal(2)), "ranges are, inside of a tail too");
    put_open(&world.repo, &wal(2), 2, (2500, 3000)).await;
    assert_eq!(resume(&world.repo).await, at(2, LEN, 2000, &wal(2)), "not behind a hole between them");
    put_open(&world.repo, &wal(2), 2, (1500, 2600)).await;
    assert_eq!(resume(&world.repo).await, at(2, LEN, 3000, &wal(2)), "overlapping ones");
}

#[tokio::test]
async fn resuming_without_a_reading_key_ends_before_a_tail() {
    let world = World::new().await;
    let repo = Repository::open("main", world.store.clone(), world.keys.write_only()).await.unwrap();
    put_open(&repo, &wal(2), 2, (0, 1000)).await;
    put_open(&repo, &wal(2), 2, (1000, 1500)).await;
    assert_eq!(resume(&repo).await, at(2, 1500, 1500, &wal(2)));
    drop(put_tail(&repo, &wal(2), 2, (1500, 5000), 700).await);
    assert_eq!(resume(&repo).await, at(2, 1500, 1500, &wal(2)));
    put_open(&repo, &wal(3), 2, (1500, 1600)).await;
    assert_eq!(resume(&repo).await, at(2, 1500, 1500, &wal(2)), "P6: a stranger's piece is left out");
}

/// Nothing of the newest segment can be used: the one before it is compared with its own digest.
#[tokio::test]
async fn resuming_steps_back_to_the_last_segment_that_can_be_compared() {
    let world = World::new().await;
    let blind = Repository::open("main", world.store.clone(), world.keys.write_only()).await.unwrap();
    drop(put_tail(&blind, &wal(1), 1, (0, 3000), 700).await);
    assert_eq!(resume(&blind).await, behind(lsn(1, 0)), "there is none before it");
    put_whole(&blind, &wal(1), 1).await;
    drop(put_tail(&blind, &wal(2), 2, (0, 3000), 700).await);
    assert_eq!(resume(&blind).await, at(1, LEN, LEN, &wal(1)));
}

#[tokio::test]
async fn resuming_steps_back_over_a_damaged_segment() {
    let world = World::new().await;
    put_whole(&world.repo, &wal(1), 1).await;
    put_whole(&world.repo, &wal(2), 2).await;
    put_open(&world.repo, &wal(3), 3, (0, 2000)).await;
    put_open(&world.repo, &wal(3), 3, (2000, 4000)).await;
    spoil(&world, &world.named("00000003.00000000-").await).await;
    assert_eq!(resume(&world.repo).await, at(2, LEN, LEN, &wal(2)));
    spoil(&world, &world.named("00000002.00000000-").await).await;
    assert_eq!(resume(&world.repo).await, at(1, LEN, LEN, &wal(1)));
    spoil(&world, &world.named("00000001.00000000-").await).await;
    let got = resume(&world.repo).await;
    assert_eq!(got, behind(lsn(1, 0)));
}

#[tokio::test]
async fn resuming_goes_on_before_what_is_damaged() {
    let world = World::new().await;
    put_open(&world.repo, &wal(2), 2, (0, 1000)).await;
    put_open(&world.repo, &wal(2), 2, (1000, 9000)).await;
    drop(put_tail(&world.repo, &wal(2), 2, (1000, 3000), 500).await);
    let name = world.named("000003E8-0").await;
    let mut bytes = world.bytes(&name).await;
    bytes[300] ^= 1; // a frame
    world.replace(&name, bytes).await;
    assert_eq!(resume(&world.repo).await, at(2, 3000, 1000, &wal(2)));
    assert!(world.read(2).await.is_err(), "for recovery it is an error");
}

#[tokio::test]
async fn a_damaged_gap_counts_by_its_name() {
    let world = World::new().await;
    put_whole(&world.repo, &wal(1), 1).await;
    put_gap(&world.repo, &gap(lsn(2, 0), lsn(5, 0))).await.unwrap();
    let name = world.named("/gap/").await;
    spoil(&world, &name).await;
    assert_eq!(resume(&world.repo).await, behind(lsn(5, 0)));
    let gaps = world.repo.gaps_of(&cluster(), branch(1)).await.unwrap();
    assert_eq!(gaps.iter().map(|gap| (gap.from, gap.to)).collect::<Vec<_>>(), [(lsn(2, 0), lsn(5, 0))]);
}

#[tokio::test]
async fn p6_where_pieces_disagree_what_they_agree_on_counts() {
    let world = World::new().await;
    let mut other = wal(2);
    other[1200..].iter_mut().for_each(|byte| *byte ^= 1);
    put_open(&world.repo, &wal(2), 2, (0, 1000)).await;
    put_open(&world.repo, &wal(2), 2, (1000, 1500)).await;
    drop(put_tail(&world.repo, &wal(2), 2, (1500, 1700), 700).await);
    put_open(&world.repo, &other, 2, (1500, 1600)).await;
    assert_eq!(resume(&world.repo).await, at(2, 1700, 1500, &wal(2)), "written after other bytes than ours");
    drop(put_tail(&world.repo, &other, 2, (1000, 1800), 700).await);
    assert_eq!(resume(&world.repo).await, at(2, 1000, 1000, &wal(2)), "written after the same bytes");
    drop(put_tail(&world.repo, &wal(3), 2, (0, 1800), 700).await);
    let error = world.repo.resume(&cluster(), branch(1)).await.unwrap_err();
    assert!(matches!(error, CatalogError::Disagreement { .. }), "they agree on nothing: {error}");
}

/// A hole far back is not what an archiver looks for: it lies before what was acknowledged. Nor is a piece that was
/// kept under `open/` back then.
#[tokio::test]
async fn resuming_lists_the_newest_logs_only() {
    let world = World::new().await;
    put_open(&world.repo, &wal(5), 1, (0, 1000)).await;
    put_whole(&world.repo, &wal(1), 1).await;
    // 4096 segments of 1 MiB in a log. Only names matter of what lies before the last.
    for number in 8000..8400 {
        let range =
            RangeName::new(SegmentName::new(TimelineId::FIRST, segment(number), size()).unwrap(), 0, LEN).unwrap();
        let name = name_of(&cluster(), ClusterObject::Wal(branch(1), range)).to_string();
        world.store.put_new(&Key::new(name).unwrap(), Body::from(&b"?"[..])).await.unwrap();
    }
    put_whole(&world.repo, &wal(1), 8400).await;
    put_open(&world.repo, &wal(2), 8401, (0, 1000)).await;
    assert_eq!(resume(&world.repo).await.unwrap().at, lsn(8401, 1000));
}

/// Where there are few pieces, all logs are looked at.
#[tokio::test]
async fn p3_resuming_stops_at_a_hole_between_logs() {
    let world = World::new().await;
    for number in [1, 3, 5000, 10_000, 10_001] {
        put_whole(&world.repo, &wal(1), number).await;
    }
    assert_eq!(resume(&world.repo).await.unwrap().at, lsn(2, 0));
}

/// A store that says what was asked of it.
#[derive(Debug, Default)]
struct Watched {
    inner: MemoryStore,
    widest: AtomicU64,
    synced: Mutex<Vec<String>>,
}

#[async_trait]
impl Store for Watched {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn appends(&self) -> bool {
        self.inner.appends()
    }
    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError> {
        self.inner.put_new(key, body).await
    }
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let bytes = self.inner.get(key, range).await?;
        self.widest.fetch_max(bytes.len() as u64, Ordering::SeqCst);
        Ok(bytes)
    }
    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        self.inner.head(key).await
    }
    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        self.inner.list(request).await
    }
    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        self.synced.lock().unwrap().push(key.to_string());
        self.inner.sync(key).await
    }
    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.inner.delete(key).await
    }
    async fn open_tail(&self, key: &Key, capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        self.inner.open_tail(key, capacity).await
    }
}

#[tokio::test]
async fn p8_a_large_segment_is_never_held_in_memory() {
    let store = Arc::new(Watched::default());
    let world = World::over(store.clone()).await;
    let large = SegmentSize::new(256 << 20).unwrap();
    let (part, tail_end, end) = (MAX_RANGE, 2 * MAX_RANGE + 3_000_000, 3 * MAX_RANGE);
    let history: Vec<u8> = (0..tail_end).map(|at| (at / 4096).wrapping_mul(31) as u8).collect();
    let note = |from: u32, to: Option<u32>, writer| WalRangeNote {
        writer,
        segment_size: large,
        digest_to: to.map(|to| Digest::of(&history[..to as usize])),
        ..note_from(&world.repo, &history, from)
    };
    let writer = world.repo.writer();
    let put_part = async |from: u32, to: u32| {
        let mut sealer = world.repo.seal_wal(&cluster(), branch(1), segment(1), large, (from, to)).await.unwrap();
        sealer.push(&history[from as usize..to as usize]).unwrap();
        world.repo.put_range(&sealer.finish(to, note(from, Some(to), writer)).unwrap()).await.unwrap()
    };
    put_part(0, part).await;
    let begin = segment(1).start(large);
    let lsn = |offset: u32| begin.advance(u64::from(offset));
    let digest = |to: u32| (lsn(to), Digest::of(&history[..to as usize]));
    let want = |ends: &[u32], durable: u32| {
        let expected: Vec<_> = ends.iter().map(|end| digest(*end)).collect();
        let at = expected.last().unwrap().0;
        Some(Resume { at, segment_size: large, expected, durable: lsn(durable) })
    };
    store.widest.store(0, Ordering::SeqCst);
    assert_eq!(resume(&world.repo).await, want(&[part], part));
    assert!(store.widest.load(Ordering::SeqCst) < 1 << 20, "notes are enough");
    let from = part - 1_000_000;
    let mut tail = world
        .repo
        .open_wal_tail(&cluster(), branch(1), segment(1), large, from, &note(from, None, writer))
        .await
        .unwrap();
    for chunk in history[from as usize..].chunks(4_000_000) {
        tail.append(tail.to(), chunk).await.unwrap();
    }
    assert!(tail.to() < end);
    store.widest.store(0, Ordering::SeqCst);
    assert_eq!(resume(&world.repo).await, want(&[part, 2 * part, tail_end], part));
    assert!(store.widest.load(Ordering::SeqCst) <= 9 << 20, "{}", store.widest.load(Ordering::SeqCst));
    put_part(part, 2 * part).await;
    assert_eq!(resume(&world.repo).await, want(&[part, 2 * part, tail_end], 2 * part));
}

/// An object may be there that nobody has synced: its writer was killed.
#[tokio::test]
async fn p1_what_is_there_already_is_synced_before_it_counts() {
    let store = Arc::new(Watched::default());
    let world = World::over(store.clone()).await;
    let taken = || std::mem::take(&mut *store.synced.lock().unwrap());
    assert_eq!(put_whole(&world.repo, &wal(1), 1).await, Put::New);
    assert_eq!(taken(), Vec::<String>::new());
    let name = world.named("/wal/").await;
    assert_eq!(put_whole(&world.other().await, &wal(1), 1).await, Put::SameContent);
    assert_eq!(taken(), std::slice::from_ref(&name));
    resume(&world.repo).await;
    assert_eq!(taken(), std::slice::from_ref(&name), "nor does it count for who resumes");
    let record = gap(lsn(2, 0), lsn(3, 0));
    put_gap(&world.repo, &record).await.unwrap();
    put_gap(&world.other().await, &record).await.unwrap();
    assert_eq!(taken(), [world.named("/gap/").await]);
    drop(put_tail(&world.repo, &wal(1), 1, (0, 2000), 500).await);
    world.other().await.remove_open_pieces(&cluster(), branch(1), segment(1), size()).await.unwrap();
    assert_eq!(taken(), [name], "nor for who removes what it covers");
}

#[tokio::test]
async fn a_tail_takes_only_what_continues_it() {
    let world = World::new().await;
    let mut tail = put_tail(&world.repo, &wal(1), 1, (0, 1000), 500).await;
    for from in [0, 999, 1001] {
        let error = tail.append(from, &wal(1)[1000..1100]).await.unwrap_err();
        assert!(matches!(error, CatalogError::Misuse { .. }), "{error}");
    }
    tail.append(1000, &wal(1)[1000..1100]).await.unwrap();
    assert_eq!(tail.to(), 1100);
    same(&world.read(1).await.unwrap().bytes, &wal(1)[..1100]);
}
