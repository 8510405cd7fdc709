use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::catalog::kinds::kind_of;
use crate::catalog::layout::{KeptFile, Name, Object, PackName};
use crate::catalog::records::{FileNote, PackRef, from_json};
use crate::store::faulty::{FaultPlan, Faulty};
use crate::store::{Created, ListRequest, Listing, ObjectMeta, StoreError, Tail};
use crate::types::{BackupLabel, TimelineHistory};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[tokio::test]
async fn pitfall_21_the_same_content_is_success_whatever_the_nonces() {
    let world = World::new().await;
    let range = sealed(&world.repo, &wal(1), branch(1), 1, (0, LEN), false).await;
    assert_eq!(world.repo.put_range(&range).await.unwrap(), Put::New);
    assert_eq!(world.repo.put_range(&range).await.unwrap(), Put::SameContent, "the same bytes again");
    let other = world.other().await;
    assert_eq!(put_whole(&other, &wal(1), 1).await, Put::SameContent, "sealed anew by another run");
    same(&world.read(1).await.unwrap().bytes, &wal(1));
    for (text, put) in [(&b"1\t0/5000000\tx\n"[..], Put::New), (b"1\t0/5000000\tx\n", Put::SameContent)] {
        assert_eq!(other.put_history(&cluster(), branch(2), text).await.unwrap(), put);
    }
}

#[tokio::test]
async fn p6_a_second_writer_with_other_bytes_cannot_replace() {
    let world = World::new().await;
    put_whole(&world.repo, &wal(1), 1).await;
    let before = world.bytes(&world.named("/wal/").await).await;
    let other = world.other().await;
    for _ in 0..2 {
        let Put::Conflict(conflict) = put_whole(&other, &wal(2), 1).await else { panic!("no conflict") };
        assert_eq!(conflict.existing, world.named("/wal/").await);
        assert_eq!(conflict.note.their_writer, world.repo.writer());
        assert_eq!(conflict.kept, world.named("/conflict/").await, "reported twice, kept once");
        // What came second is not lost, and opens where it lies.
        let name = Name::parse(&conflict.kept).unwrap();
        let Object::Of(_, object) = &name.object else { panic!() };
        let kept = world.repo.get_object(&name, kind_of(object)).await.unwrap();
        same(&kept.plaintext, &wal(2));
        let note: WalRangeNote = from_json(&kept.note).unwrap();
        assert_eq!(note.conflict.map(|note| note.ours), Some(Digest::of(&wal(2))));
    }
    assert_eq!(world.bytes(&world.named("/wal/").await).await, before, "what was there stays as it is");
    same(&world.read(1).await.unwrap().bytes, &wal(1));
}

/// The same bytes after another beginning are another history.
#[tokio::test]
async fn p6_what_came_before_belongs_to_a_ranges_identity() {
    let world = World::new().await;
    let (one, mut two) = (wal(1), wal(1));
    two[0] ^= 1;
    assert_eq!(put_open(&world.repo, &one, 1, (1000, 2000)).await, Put::New);
    assert!(matches!(put_open(&world.other().await, &two, 1, (1000, 2000)).await, Put::Conflict(_)));
}

#[tokio::test]
async fn p6_histories_and_kept_files_are_not_replaced() {
    let world = World::new().await;
    world.repo.put_history(&cluster(), branch(2), b"1\t0/5000000\tx\n").await.unwrap();
    let put = world.other().await.put_history(&cluster(), branch(2), b"1\t0/6000000\tx\n").await.unwrap();
    let Put::Conflict(conflict) = put else { panic!("{put:?}") };
    assert_eq!(world.repo.get_history(&cluster(), branch(2)).await.unwrap().unwrap(), &b"1\t0/5000000\tx\n"[..]);
    let name = Name::parse(&conflict.kept).unwrap();
    let Object::Of(_, object) = &name.object else { panic!() };
    let kept = world.repo.get_object(&name, kind_of(object)).await.unwrap();
    assert_eq!(kept.plaintext, b"1\t0/6000000\tx\n");
    assert!(from_json::<FileNote>(&kept.note).unwrap().conflict.is_some());

    let file: KeptFile = "000000010000000000000003.partial".parse().unwrap();
    assert_eq!(world.repo.put_wal_file(&cluster(), branch(1), &file, &wal(1)).await.unwrap(), Put::New);
    assert_eq!(world.repo.put_wal_file(&cluster(), branch(1), &file, &wal(1)).await.unwrap(), Put::SameContent);
    let put = world.repo.put_wal_file(&cluster(), branch(1), &file, &wal(2)).await.unwrap();
    assert!(matches!(put, Put::Conflict(_)), "{put:?}");
    assert_eq!(world.repo.get_wal_file(&cluster(), branch(1), &file).await.unwrap().unwrap(), wal(1));
    assert!(world.read(3).await.unwrap().bytes.is_empty(), "a .partial is never read as a segment");
}

#[tokio::test]
async fn p6_ranges_of_two_histories_are_not_mixed() {
    let world = World::new().await;
    put_open(&world.repo, &wal(1), 1, (0, 1000)).await;
    put_open(&world.other().await, &wal(2), 1, (1000, 5000)).await;
    let error = world.read(1).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, CatalogError::Disagreement { .. }) && error.is_refusal(), "{text}");
    for range in ["00000000-000003E8", "000003E8-00001388"] {
        assert!(text.contains(range), "both are named: {text}");
    }
    // A complete segment decides: whoever put it compared.
    put_whole(&world.repo, &wal(1), 1).await;
    same(&world.read(1).await.unwrap().bytes, &wal(1));
}

#[tokio::test]
async fn p6_a_range_within_another_is_compared_by_its_note() {
    let world = World::new().await;
    put_open(&world.repo, &wal(1), 1, (0, 5000)).await;
    put_open(&world.other().await, &wal(1), 1, (500, 900)).await;
    same(&world.read(1).await.unwrap().bytes, &wal(1)[..5000]);
    put_open(&world.other().await, &wal(2), 1, (500, 1000)).await;
    assert!(matches!(world.read(1).await.unwrap_err(), CatalogError::Disagreement { .. }));
}

#[tokio::test]
async fn p4_a_swapped_or_renamed_object_does_not_open() {
    let world = World::new().await;
    put_whole(&world.repo, &wal(1), 1).await;
    put_whole(&world.repo, &wal(2), 2).await;
    let one = world.named("000000010000000000000001.").await;
    let two = world.named("000000010000000000000002.").await;
    let bytes = world.bytes(&two).await;
    world.replace(&one, bytes.clone()).await;
    let error = world.read(1).await.unwrap_err();
    assert!(error.to_string().contains(&one) && error.is_damage() && !error.is_not_found(), "{error}");
    // Under a name where nothing was
    let three = two.replace("0002.", "0003.");
    world.replace(&three, bytes).await;
    let error = world.read(3).await.unwrap_err();
    assert!(error.to_string().contains(&three), "{error}");
    // Another realm's object under the same name
    let stranger = World::new().await;
    put_whole(&stranger.repo, &wal(1), 1).await;
    world.replace(&one, stranger.bytes(&one).await).await;
    assert!(world.read(1).await.unwrap_err().to_string().contains(&one));
}

#[tokio::test]
async fn p4_an_object_cut_short_or_altered_does_not_open() {
    let world = World::new().await;
    put_whole(&world.repo, &wal(1), 1).await;
    let name = world.named("/wal/").await;
    let bytes = world.bytes(&name).await;
    let step = bytes.len() / 23;
    for cut in [0, 1, 95, 96, 100, bytes.len() - 1, bytes.len() - 8].into_iter().chain((0..23).map(|n| n * step)) {
        world.replace(&name, bytes[..cut].to_vec()).await;
        let error = world.read(1).await.unwrap_err();
        assert!(error.to_string().contains(&name), "cut at {cut}: {error}");
    }
    for at in (0..bytes.len()).step_by(step).chain([0, 8, 10, 20, bytes.len() - 1, bytes.len() - 8]) {
        let mut altered = bytes.clone();
        altered[at] ^= 0x20;
        world.replace(&name, altered).await;
        let error = world.read(1).await.unwrap_err();
        assert!(error.to_string().contains(&name), "altered at {at}: {error}");
    }
}

#[tokio::test]
async fn a_copy_or_the_ranges_stand_in_for_a_damaged_object() {
    let world = World::new().await;
    put_whole(&world.repo, &wal(1), 1).await;
    let name = world.named("/wal/").await;
    let good = world.bytes(&name).await;
    let mut bad = good.clone();
    bad[5000] ^= 1;
    world.replace(&name, bad.clone()).await;
    // ranges that were not removed yet
    put_open(&world.repo, &wal(1), 1, (0, 700_000)).await;
    put_open(&world.repo, &wal(1), 1, (700_000, LEN)).await;
    let read = world.read(1).await.unwrap();
    assert!(read.complete && read.bytes == wal(1) && read.damaged[0].name == name, "{:?}", read.damaged);
    for open in ["00000000-000AAE60", "000AAE60-00100000"] {
        let open = world.named(open).await;
        world.store.delete(&Key::new(open).unwrap()).await.unwrap();
    }
    assert!(world.read(1).await.is_err());
    // a repair
    world.replace(&format!("{name}~repair1"), bad).await;
    world.replace(&format!("{name}~repair2"), good).await;
    let read = world.read(1).await.unwrap();
    assert_eq!((read.bytes == wal(1), read.sources), (true, vec![format!("{name}~repair2")]));
}

#[tokio::test]
async fn p6_a_put_beside_a_damaged_object_is_a_copy() {
    let world = World::new().await;
    put_whole(&world.repo, &wal(1), 1).await;
    let name = world.named("/wal/").await;
    world.replace(&name, b"not ours".to_vec()).await;
    for _ in 0..2 {
        let put = put_whole(&world.repo, &wal(1), 1).await;
        let Put::BesideDamaged { damaged, copy } = put else { panic!("{put:?}") };
        assert!(damaged.contains(&name) && copy.starts_with(&format!("{name}~")), "{damaged} {copy}");
    }
    assert_eq!(world.bytes(&name).await, b"not ours", "nothing is replaced");
    same(&world.read(1).await.unwrap().bytes, &wal(1));
    let two = wal(2);
    let range = sealed(&world.repo, &two, branch(1), 1, (0, LEN), false).await;
    assert!(world.repo.put_range(&range).await.is_err(), "other bytes do not become a copy");
}

#[tokio::test]
async fn p7_nothing_there_is_an_answer_and_a_hole_is_told() {
    let world = World::new().await;
    assert_eq!(world.read(1).await.unwrap(), super::super::SegmentBytes::default());
    put_open(&world.repo, &wal(1), 1, (1000, 2000)).await;
    let read = world.read(1).await.unwrap();
    assert!(read.bytes.is_empty() && read.more_behind && !read.complete);
    put_open(&world.repo, &wal(1), 1, (0, 500)).await;
    let read = world.read(1).await.unwrap();
    assert!(read.bytes.len() == 500 && read.more_behind);
}

#[tokio::test]
async fn p7_is_anything_behind() {
    let world = World::new().await;
    let after = |number| {
        let repo = world.repo.clone();
        async move { repo.anything_after(&cluster(), branch(1), segment(number), size()).await.unwrap() }
    };
    assert!(!after(0).await);
    put_whole(&world.repo, &wal(1), 5).await;
    assert_eq!([after(4).await, after(5).await, after(6).await], [true, false, false]);
    put_open(&world.repo, &wal(1), 6, (0, 1000)).await;
    assert_eq!([after(5).await, after(6).await], [true, false]);
    put_whole(&world.repo, &wal(1), 5000).await; // in the next log: 4096 segments of 1 MiB a log
    assert_eq!([after(6).await, after(4999).await, after(5000).await, after(9000).await], [true, true, false, false]);
}

#[tokio::test]
async fn what_does_not_fit_together_is_a_callers_mistake() {
    let world = World::new().await;
    let history = wal(1);
    let main = cluster();
    let begin = || world.repo.seal_wal(&main, branch(1), segment(1), size(), (0, 1000));
    let misuse = |result: Result<SealedRange, CatalogError>| matches!(result, Err(CatalogError::Misuse { .. }));
    let mut sealer = begin().await.unwrap();
    sealer.push(&history[..999]).unwrap();
    assert!(misuse(sealer.finish(1000, note(&world.repo, &history, 0, 1000))), "a byte is missing");
    let mut sealer = begin().await.unwrap();
    sealer.push(&history[..900]).unwrap();
    assert!(misuse(sealer.finish(900, note(&world.repo, &history, 0, 900))), "it was begun to end elsewhere");
    let mut sealer = begin().await.unwrap();
    sealer.push(&history[..1000]).unwrap();
    assert!(misuse(sealer.finish(1000, note_from(&world.repo, &history, 0))), "no digest of its end");
    let big = SegmentSize::new(1 << 30).unwrap();
    assert!(world.repo.seal_wal(&cluster(), branch(1), segment(1), big, (0, 65 << 20)).await.is_err());
    let mut tail = put_tail(&world.repo, &history, 1, (0, 1000), 1000).await;
    assert!(tail.append(tail.to(), &vec![0; LEN as usize]).await.is_err(), "beyond the segment's end");
}

// ---- tails

#[tokio::test]
async fn a_tail_is_what_was_appended_and_is_never_continued() {
    let world = World::new().await;
    let tail = put_tail(&world.repo, &wal(1), 1, (0, 100_000), 8192).await;
    drop(tail);
    same(&world.read(1).await.unwrap().bytes, &wal(1)[..100_000]);
    // After a restart another begins beside it.
    let other = world.other().await;
    let second = put_tail(&other, &wal(1), 1, (0, 150_000), 50_000).await;
    assert!(second.name().copy.is_some(), "{}", second.name());
    same(&world.read(1).await.unwrap().bytes, &wal(1)[..150_000]);
    // and one that goes on where they end
    let third = put_tail(&other, &wal(1), 1, (150_000, 160_000), 5000).await;
    same(&world.read(1).await.unwrap().bytes, &wal(1)[..160_000]);
    drop((second, third));
    // a tail of another history is refused
    put_tail(&other, &wal(2), 1, (0, 170_000), 50_000).await;
    assert!(matches!(world.read(1).await.unwrap_err(), CatalogError::Disagreement { .. }));
}

#[tokio::test]
async fn a_torn_tail_ends_where_it_was_torn_and_a_damaged_one_is_named() {
    let world = World::new().await;
    drop(put_tail(&world.repo, &wal(1), 1, (0, 40_000), 10_000).await);
    let name = world.named("/open/").await;
    let whole = world.bytes(&name).await;
    world.replace(&name, whole[..whole.len() - 5].to_vec()).await;
    same(&world.read(1).await.unwrap().bytes, &wal(1)[..30_000]);
    let mut zeros = whole.clone();
    zeros.extend_from_slice(&[0; 10_000]);
    world.replace(&name, zeros).await;
    same(&world.read(1).await.unwrap().bytes, &wal(1)[..40_000]);
    let mut damaged = whole.clone();
    let middle = whole.len() / 2;
    damaged[middle] ^= 1;
    world.replace(&name, damaged).await;
    let error = world.read(1).await.unwrap_err();
    assert!(error.to_string().contains(&name) && error.is_damage(), "{error}");
    let mut headless = whole.clone();
    headless[..96].fill(0);
    world.replace(&name, headless).await;
    let error = world.read(1).await.unwrap_err();
    assert!(error.to_string().contains(&name), "what was confirmed is not nothing: {error}");
}

#[tokio::test]
async fn a_tail_that_a_crash_left_before_its_first_append_is_nothing() {
    let world = World::new().await;
    drop(put_tail(&world.repo, &wal(1), 1, (0, 0), 1).await);
    let name = world.named("/open/").await;
    let start = world.bytes(&name).await;
    for cut in [0, 1, 50, 96, 98, 100, 200, start.len() - 1, start.len()] {
        let mut torn = start[..cut].to_vec();
        torn.resize(64 << 10, 0);
        world.replace(&name, torn).await;
        let read = world.read(1).await.unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        assert!(read.bytes.is_empty());
    }
}

// ---- forks

#[tokio::test]
async fn a_childs_segment_begins_with_its_parents_bytes_where_they_agree() {
    let world = World::new().await;
    let (parent, mut child) = (wal(1), wal(1));
    let fork = 300_000;
    child[fork as usize..].iter_mut().for_each(|byte| *byte ^= 0x55);
    put_whole(&world.repo, &parent, 1).await;
    let text = format!("1\t0/{:X}\tx\n", LEN + fork);
    let path = TimelineHistory::parse(TimelineId::new(2).unwrap(), text.as_bytes()).unwrap();
    let range = sealed(&world.repo, &child, branch(2), 1, (fork, 500_000), true).await;
    world.repo.put_range(&range).await.unwrap();
    let read = |path| {
        let repo = world.repo.clone();
        async move { repo.read_segment(&cluster(), branch(2), segment(1), size(), path).await }
    };
    same(&read(Some(&path)).await.unwrap().bytes, &child[..500_000]);
    assert!(read(None).await.unwrap().bytes.is_empty());
    let mut stranger = child.clone();
    stranger[7] ^= 1;
    let range = sealed(&world.repo, &stranger, branch(2), 1, (fork, 600_000), true).await;
    world.repo.put_range(&range).await.unwrap();
    assert!(matches!(read(Some(&path)).await.unwrap_err(), CatalogError::Disagreement { .. }));
}

// ---- joins

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Any set of ranges and tails that covers [0, n), by any writers, gives the same bytes.
    #[test]
    fn joins_of_random_splits(
        end in 1u32..200_000,
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        extra in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()), 0..4),
        tails in any::<u8>(), writers in any::<u8>(),
    ) {
        runtime().block_on(async {
            let world = World::new().await;
            let (history, other) = (wal(1), world.other().await);
            let mut borders: Vec<u32> = cuts.iter().map(|cut| cut.index(end as usize) as u32).chain([0, end]).collect();
            borders.sort();
            borders.dedup();
            let mut pieces: Vec<(u32, u32, bool)> =
                borders.windows(2).zip(0..).map(|(pair, n)| (pair[0], pair[1], tails >> n & 1 == 1)).collect();
            pieces.extend(extra.iter().map(|(a, b, tail)| {
                let (a, b) = (a.index(end as usize) as u32, b.index(end as usize) as u32);
                (a.min(b), a.max(b) + 1, *tail)
            }));
            for (n, (from, to, tail)) in pieces.into_iter().enumerate() {
                let repo = if writers >> (n % 8) & 1 == 1 { &world.repo } else { &other };
                if tail {
                    drop(put_tail(repo, &history, 1, (from, to), 30_000).await);
                } else {
                    let put = put_open(repo, &history, 1, (from, to)).await;
                    assert!(matches!(put, Put::New | Put::SameContent));
                }
            }
            let read = world.read(1).await.unwrap();
            assert_eq!(read.bytes, history[..end as usize]);
            assert!(!read.more_behind && read.damaged.is_empty());
        });
    }
}

// ---- what was listed and is gone

/// Removes the open pieces, and shows the whole, the moment one of them is read: what an archiver does meanwhile.
#[derive(Debug)]
struct Swept {
    inner: MemoryStore,
    swept: AtomicBool,
    for_ever: bool,
    listings: AtomicUsize,
}

#[async_trait]
impl Store for Swept {
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
        if key.as_str().contains("/open/") {
            self.swept.store(true, Ordering::SeqCst);
            return Err(StoreError::NotFound { key: key.clone() });
        }
        self.inner.get(key, range).await
    }
    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        self.inner.head(key).await
    }
    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        self.listings.fetch_add(1, Ordering::SeqCst);
        let hidden = if self.swept.load(Ordering::SeqCst) && !self.for_ever { "/open/" } else { "/wal/" };
        let mut listing = self.inner.list(request).await?;
        listing.objects.retain(|object| !object.key.as_str().contains(hidden));
        Ok(listing)
    }
    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
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
async fn p7_a_range_that_vanished_means_list_again() {
    let swept = |for_ever| Swept {
        inner: MemoryStore::new(),
        swept: AtomicBool::new(false),
        for_ever,
        listings: AtomicUsize::new(0),
    };
    let world = World::over(Arc::new(swept(false))).await;
    put_open(&world.repo, &wal(1), 1, (0, 1000)).await;
    put_whole(&world.repo, &wal(1), 1).await;
    same(&world.read(1).await.unwrap().bytes, &wal(1));

    let store = Arc::new(swept(true));
    let world = World::over(store.clone()).await;
    put_open(&world.repo, &wal(1), 1, (0, 1000)).await;
    let before = store.listings.load(Ordering::SeqCst);
    let error = world.read(1).await.unwrap_err();
    assert!(matches!(error, CatalogError::Vanished { .. }) && error.is_retryable(), "{error}");
    assert!(store.listings.load(Ordering::SeqCst) - before <= 10, "bounded");
}

// ---- a store that fails

/// Lost answers, errors, cut and flipped bodies: a put that is repeated succeeds, and what is read is right or an error.
#[tokio::test(start_paused = true)]
async fn p6_p7_faults_neither_lose_nor_shorten() {
    let mut faults = 0;
    for seed in 0..40 {
        let memory = MemoryStore::new();
        let faulty = Faulty::new(Arc::new(memory.clone()), FaultPlan::none(), seed);
        let world = World::over(Arc::new(faulty.clone())).await;
        let range = sealed(&world.repo, &wal(1), branch(1), 1, (0, LEN), false).await;
        let open = sealed(&world.repo, &wal(2), branch(1), 2, (0, 70_000), true).await;
        faulty.set_plan(FaultPlan { before: 0.3, after: 0.3, ..FaultPlan::none() });
        for range in [&range, &open] {
            let put = loop {
                match world.repo.put_range(range).await {
                    Ok(put) => break put,
                    Err(error) => assert!(error.is_retryable(), "seed {seed}: {error}"),
                }
            };
            assert!(matches!(put, Put::New | Put::SameContent), "seed {seed}: {put:?}");
        }
        faulty.set_plan(FaultPlan { before: 0.1, cut: 0.2, flip: 0.2, ..FaultPlan::none() });
        let repo = loop {
            if let Ok(repo) = Repository::open("main", world.store.clone(), world.keys.clone()).await {
                break repo;
            }
        };
        for (number, want) in [(1, &wal(1)[..]), (2, &wal(2)[..70_000])] {
            match repo.read_segment(&cluster(), branch(1), segment(number), size(), None).await {
                Ok(read) => same(&read.bytes, want),
                Err(error) => assert!(error.is_retryable() || error.is_damage(), "seed {seed}: {error}"),
            }
        }
        faults += faulty.faults();
    }
    assert!(faults > 100, "only {faults} faults");
}

// ---- the open segment's pieces

#[tokio::test]
async fn open_pieces_go_only_when_the_whole_holds_their_bytes() {
    let world = World::new().await;
    let main = cluster();
    let remove = || world.repo.remove_open_pieces(&main, branch(1), segment(1), size());
    assert_eq!(remove().await.unwrap(), super::super::Removed::default());
    put_open(&world.repo, &wal(1), 1, (0, 1000)).await;
    drop(put_tail(&world.repo, &wal(1), 1, (1000, 5000), 1000).await);
    assert!(matches!(remove().await, Err(CatalogError::Misuse { .. })), "the whole is not there");
    let other = world.other().await;
    put_open(&other, &wal(1), 1, (5000, 6000)).await; // another run, the same bytes
    drop(put_tail(&other, &wal(1), 1, (6000, 7000), 1000).await);
    put_open(&other, &wal(2), 1, (7000, 8000)).await; // another history
    drop(put_tail(&other, &wal(2), 1, (7000, 8000), 1000).await);
    put_open(&other, &wal(1), 2, (0, 1000)).await; // another segment
    put_whole(&world.repo, &wal(1), 1).await;
    let done = remove().await.unwrap();
    assert_eq!((done.removed.len(), done.kept.len()), (4, 2), "{done:?}");
    assert!(done.kept.iter().all(|(name, why)| name.contains("00001B58") && why.contains("other bytes")), "{done:?}");
    let open: Vec<String> = world.names().await.into_iter().filter(|name| name.contains("/open/")).collect();
    assert_eq!(open.len(), 3, "{open:?}");
}

// ---- packs

#[tokio::test]
async fn packs_are_read_by_range() {
    let world = World::new().await;
    let label = BackupLabel::at(Timestamp::UNIX_EPOCH);
    let pack = PackName { label, number: 1 };
    let plaintext: Vec<u8> = [wal(1), wal(2), wal(3)[..777].to_vec()].concat();
    let mut writer = world.repo.seal_object(&cluster(), ClusterObject::Pack(pack)).await.unwrap();
    plaintext.chunks(70_000).for_each(|chunk| writer.push(chunk).unwrap());
    let object = writer.finish(b"").unwrap();
    assert_eq!(world.repo.put_object(&object).await.unwrap(), Created::New);
    assert_eq!(world.repo.put_object(&object).await.unwrap(), Created::AlreadyThere);
    let (len, plaintext_len) = (object.len(), object.plaintext_len());
    let reference = PackRef { pack, len, header: object.header().clone(), plaintext_len, live: plaintext_len };
    let mut reader = world.repo.open_pack(&cluster(), &reference).await.unwrap();
    for range in [0..1, 5..1_048_577, 1_048_576..2_097_929, 2_097_928..2_097_929, 9..9] {
        let want = &plaintext[range.start as usize..range.end as usize];
        assert_eq!(reader.read(range).await.unwrap(), want);
    }
    assert!(reader.read(0..plaintext_len + 1).await.is_err());
    let mut all = Vec::new();
    while let Some(chunk) = reader.next_chunk().await.unwrap() {
        all.extend(chunk);
    }
    assert_eq!(all, plaintext);

    // P4: another pack of ours under this name does not open by the reference's header.
    let mut writer = world.repo.seal_object(&cluster(), ClusterObject::Pack(pack)).await.unwrap();
    writer.push(&plaintext).unwrap();
    let name = world.named("/pack/").await;
    let other = writer.finish(b"").unwrap();
    assert!(matches!(world.repo.put_object(&other).await.unwrap_err(), CatalogError::Taken { .. }));
    world.store.delete(&Key::new(name.clone()).unwrap()).await.unwrap();
    world.repo.put_object(&other).await.unwrap();
    let error = world.repo.open_pack(&cluster(), &PackRef { len: other.len(), ..reference }).await.unwrap_err();
    assert!(error.to_string().contains(&name), "{error}");
}
