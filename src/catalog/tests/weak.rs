//! A store that looks before it writes, and does not notice who came in between.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::inventory::{gap, lsn, put_gap};
use super::*;
use crate::catalog::kinds::kind_of;
use crate::catalog::layout::{KeptFile, Name, Object, PackName, PartKind, PartName};
use crate::catalog::records::{BackupStart, PackRef, PartRef};
use crate::catalog::writer::Conflict;
use crate::store::faulty::{FaultPlan, Faulty, Random};
use crate::store::memory::MemoryOptions;
use crate::store::retry::{Retry, RetryPolicy};
use crate::store::{Created, ListRequest, Listing, ObjectMeta, StoreError, Tail};
use crate::types::BackupLabel;

/// A [`MemoryStore`] whose puts look, write and read back, with time in between.
#[derive(Debug, Clone)]
struct Overwriting {
    inner: MemoryStore,
    random: Arc<Mutex<Random>>,
}

impl Overwriting {
    fn new(seed: u64) -> Overwriting {
        Overwriting::with_clock(seed, Box::new(Timestamp::now))
    }

    fn with_clock(seed: u64, clock: Box<dyn Fn() -> Timestamp + Send + Sync>) -> Overwriting {
        let options = MemoryOptions { appends: false, clock, ..MemoryOptions::default() };
        Overwriting { inner: MemoryStore::with(options), random: Arc::new(Mutex::new(Random::new(seed))) }
    }

    async fn pause(&self) {
        let millis = (self.random.lock().unwrap().fraction() * 50.0) as u64;
        tokio::time::sleep(Duration::from_millis(millis)).await;
    }
}

#[async_trait]
impl Store for Overwriting {
    fn describe(&self) -> String {
        "memory that overwrites".into()
    }

    fn appends(&self) -> bool {
        false
    }

    fn creates_exclusively(&self) -> bool {
        false
    }

    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError> {
        self.pause().await;
        match self.inner.get(key, None).await {
            Ok(there) if body.same_as(&there) => return Ok(Created::AlreadyThere),
            Ok(_) => return Err(StoreError::Conflict { key: key.clone() }),
            Err(_) => {}
        }
        self.pause().await;
        self.inner.overwrite(key, &body);
        self.pause().await;
        match self.inner.get(key, None).await {
            Ok(there) if body.same_as(&there) => Ok(Created::New),
            Ok(_) => Err(StoreError::Conflict { key: key.clone() }),
            Err(error) => Err(error),
        }
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        self.pause().await;
        self.inner.get(key, range).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        self.pause().await;
        self.inner.head(key).await
    }

    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        self.pause().await;
        let listing = self.inner.list(request).await;
        self.pause().await; // what was listed is old when it arrives
        listing
    }

    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        self.inner.sync(key).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.pause().await;
        self.inner.delete(key).await
    }

    async fn open_tail(&self, key: &Key, capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        self.inner.open_tail(key, capacity).await
    }
}

async fn world(seed: u64) -> World {
    World::over(store(seed)).await
}

/// A store that overwrites.
pub(super) fn store(seed: u64) -> Arc<dyn Store> {
    Arc::new(Overwriting::new(seed))
}

/// Everything that is written is found again, though nothing but keys and the format lies under a plain name.
#[tokio::test(start_paused = true)]
async fn names_that_exist_only_as_copies_are_read_everywhere() {
    let world = world(1).await;
    let (repo, other) = (&world.repo, world.other().await);
    assert_eq!(put_whole(repo, &wal(1), 1).await, Put::New);
    assert_eq!(put_whole(&other, &wal(1), 1).await, Put::SameContent, "another run's is found");
    assert_eq!(put_open(repo, &wal(2), 2, (0, 1000)).await, Put::New);
    assert_eq!(put_open(repo, &wal(2), 2, (1000, 5000)).await, Put::New);
    repo.put_history(&cluster(), branch(2), b"1\t0/300100\tx\n").await.unwrap();
    assert_eq!(other.put_history(&cluster(), branch(2), b"1\t0/300100\tx\n").await.unwrap(), Put::SameContent);
    let file: KeptFile = "000000010000000000000003.partial".parse().unwrap();
    repo.put_wal_file(&cluster(), branch(1), &file, &wal(3)).await.unwrap();
    let label = BackupLabel::at("2026-11-20T03:15:00Z".parse().unwrap());
    let start = BackupStart { label, writer: repo.writer(), started_at: label.start(), parents: vec![] };
    let put_start = async |start: &BackupStart| repo.put_record(&cluster(), ClusterObject::Start(label), start).await;
    assert_eq!(put_start(&start).await.unwrap(), Created::New);
    assert_eq!(put_start(&start).await.unwrap(), Created::AlreadyThere);
    let strange = BackupStart { writer: other.writer(), ..start.clone() };
    assert!(matches!(put_start(&strange).await, Err(CatalogError::Taken { .. })));
    put_gap(repo, &gap(lsn(4, 0), lsn(6, 0))).await.unwrap();
    let pack = PackName { label, number: 1 };
    let mut writer = repo.seal_object(&cluster(), ClusterObject::Pack(pack)).await.unwrap();
    writer.push(&wal(9)).unwrap();
    let pack_object = writer.finish(&[]).unwrap();
    repo.put_object(&pack_object).await.unwrap();
    let part = PartName { label, kind: PartKind::Files, number: 1 };
    let mut writer = repo.seal_object(&cluster(), ClusterObject::Part(part)).await.unwrap();
    writer.push(b"{}\n").unwrap();
    let part_object = writer.finish(&[]).unwrap();
    repo.put_object(&part_object).await.unwrap();
    let mut manifest = super::inventory::manifest(label);
    let (len, header) = (pack_object.len(), pack_object.header().clone());
    manifest.packs.push(PackRef { pack, len, header, plaintext_len: u64::from(LEN), live: u64::from(LEN) });
    manifest.tables.push(PartRef { part, len: part_object.len(), entries: 0 });
    repo.put_manifest(&cluster(), &manifest).await.unwrap();

    let plain: Vec<String> = world.names().await.into_iter().filter(|name| !name.contains('~')).collect();
    assert!(plain.iter().all(|name| name.starts_with("keys/")), "{plain:?}");

    // As another process: also one that takes the store for a strong one, as after a change of the store.
    let strong = Repository::open("main", Arc::new(Believes(world.store.clone())), world.keys.clone()).await.unwrap();
    for repo in [&world.other().await, &strong] {
        let read = repo.read_segment(&cluster(), branch(1), segment(1), size(), None).await.unwrap();
        assert!(read.complete);
        same(&read.bytes, &wal(1));
        let resume = repo.resume(&cluster(), branch(1)).await.unwrap().unwrap();
        assert_eq!((resume.at, resume.durable), (lsn(2, 5000), lsn(2, 5000)));
        let history = repo.get_history(&cluster(), branch(2)).await.unwrap().unwrap();
        assert_eq!(history, &b"1\t0/300100\tx\n"[..]);
        assert_eq!(repo.histories(&cluster()).await.unwrap().len(), 1);
        assert_eq!(repo.get_wal_file(&cluster(), branch(1), &file).await.unwrap().unwrap(), wal(3));
        assert_eq!(repo.get_manifest(&cluster(), label).await.unwrap(), manifest);
        let pack = repo.open_pack(&cluster(), &manifest.packs[0]).await.unwrap();
        same(&pack.read(0..u64::from(LEN)).await.unwrap(), &wal(9));
        let mut part = repo.open_part(&cluster(), &manifest.tables[0]).await.unwrap();
        assert_eq!(part.next_chunk().await.unwrap().unwrap(), b"{}\n");
        assert_eq!(repo.gaps_of(&cluster(), branch(1)).await.unwrap().len(), 1);
        assert!(repo.anything_after(&cluster(), branch(1), segment(1), size()).await.unwrap());
        let inventory = repo.load(&cluster()).await.unwrap();
        assert!(inventory.damaged.is_empty() && inventory.unknown.is_empty(), "{inventory:?}");
        assert_eq!(inventory.backups, [manifest.backup.clone()]);
        assert_eq!((inventory.gaps.len(), inventory.unfinished_backups.len()), (1, 0));
        assert_eq!(inventory.frontier(branch(1)), Some(lsn(2, 5000)));
    }
    // A pack is read with the same requests as elsewhere: its name follows from the manifest.
    put_whole(repo, &wal(2), 2).await;
    let removed = repo.remove_open_pieces(&cluster(), branch(1), segment(2), size()).await.unwrap();
    assert_eq!((removed.removed.len(), removed.kept.len()), (2, 0), "{removed:?}");
    same(&world.read(2).await.unwrap().bytes, &wal(2));
}

/// Says that it creates exclusively.
#[derive(Debug)]
struct Believes(Arc<dyn Store>);

#[async_trait]
impl Store for Believes {
    fn describe(&self) -> String {
        self.0.describe()
    }
    fn appends(&self) -> bool {
        self.0.appends()
    }
    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError> {
        self.0.put_new(key, body).await
    }
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        self.0.get(key, range).await
    }
    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        self.0.head(key).await
    }
    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        self.0.list(request).await
    }
    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        self.0.sync(key).await
    }
    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.0.delete(key).await
    }
    async fn open_tail(&self, key: &Key, capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        self.0.open_tail(key, capacity).await
    }
}

/// A put of what the second writer is cut off before he can withdraw: refused by every reader, and both are named.
#[tokio::test(start_paused = true)]
async fn p6_two_contents_under_one_name_are_never_believed() {
    let world = world(2).await;
    put_whole(&world.repo, &wal(1), 1).await;
    put_open(&world.repo, &wal(2), 2, (0, 1000)).await;
    world.repo.put_history(&cluster(), branch(2), b"1\t0/300100\tx\n").await.unwrap();
    // What another writer puts elsewhere is planted under the names above, as a crash would leave it.
    let elsewhere = World { repo: world.repo.clone(), store: Arc::new(Overwriting::new(3)), keys: world.keys.clone() };
    let format = world.named("format/").await;
    elsewhere.store.put_new(&Key::new(&*format).unwrap(), world.bytes(&format).await.into()).await.unwrap();
    let meta = world.named("keys/ffffffff").await;
    elsewhere.store.put_new(&Key::new(&*meta).unwrap(), world.bytes(&meta).await.into()).await.unwrap();
    let second = elsewhere.other().await;
    put_whole(&second, &wal(7), 1).await;
    put_open(&second, &wal(7), 2, (0, 1000)).await;
    second.put_history(&cluster(), branch(2), b"1\t0/400100\tx\n").await.unwrap();
    for name in elsewhere.names().await {
        let (key, bytes) = (Key::new(&*name).unwrap(), elsewhere.bytes(&name).await);
        world.store.put_new(&key, bytes.into()).await.unwrap();
    }
    let named_both = |error: CatalogError, part: &str| {
        let text = error.to_string();
        assert!(matches!(error, CatalogError::TwoContents { .. }) && error.is_refusal(), "{text}");
        assert_eq!(text.matches(part).count(), 2, "{text}");
    };
    named_both(world.read(1).await.unwrap_err(), "/wal/");
    named_both(world.read(2).await.unwrap_err(), "/open/");
    named_both(world.repo.get_history(&cluster(), branch(2)).await.unwrap_err(), "/timeline/");
    // Nor does a copy make one of them believable.
    let keys = world.keys.clone();
    let target = Repository::create("second", Arc::new(MemoryStore::new()), &keys).await.unwrap();
    let copied = target.copy_segment(&world.repo, &cluster(), branch(1), segment(1), size()).await;
    named_both(copied.unwrap_err(), "/wal/");
    let copied = target.copy_parts(&world.repo, &cluster(), branch(1), segment(1), size(), LEN).await;
    named_both(copied.unwrap_err(), "/wal/");
    named_both(target.copy_history(&world.repo, &cluster(), branch(2)).await.unwrap_err(), "/timeline/");
    assert!(target.branches(&cluster()).await.unwrap().is_empty(), "nothing was copied");
    put_whole(&target, &wal(1), 1).await;
    let copied = world.repo.copy_segment(&target, &cluster(), branch(1), segment(1), size()).await;
    named_both(copied.unwrap_err(), "/wal/");
    let inventory = world.repo.load(&cluster()).await;
    named_both(inventory.unwrap_err(), "/timeline/");
    for name in elsewhere.names().await.iter().filter(|name| name.contains("/timeline/")) {
        world.store.delete(&Key::new(&**name).unwrap()).await.unwrap();
    }
    let inventory = world.repo.load(&cluster()).await.unwrap();
    assert_eq!(inventory.damaged.len(), 4, "{:?}", inventory.damaged);
    assert_eq!(inventory.frontier(branch(1)), None, "nobody plans on WAL that cannot be read");
    // Nothing can be compared in the newest segment: it is begun anew.
    let resume = world.repo.resume(&cluster(), branch(1)).await;
    assert!(
        matches!(&resume, Err(CatalogError::TwoContents { .. })) || resume.as_ref().unwrap().is_none(),
        "{resume:?}"
    );
    put_whole(&world.repo, &wal(2), 2).await;
    assert!(world.repo.remove_open_pieces(&cluster(), branch(1), segment(2), size()).await.is_ok());
    // Whoever puts again is told, and nothing that was confirmed is withdrawn.
    let again = put_whole(&world.other().await, &wal(1), 1).await;
    assert!(matches!(again, Put::Conflict(_)), "{again:?}");
    let one: Vec<String> = world.names().await.into_iter().filter(|name| name.contains("0001.0000")).collect();
    assert_eq!(one.iter().filter(|name| name.contains("/wal/")).count(), 2, "{one:?}");
}

/// The same content is stored once, as soon as it is certain that nobody withdraws it any more.
#[tokio::test(start_paused = true)]
async fn an_old_copy_is_relied_on_and_a_young_one_is_not() {
    let minutes = Arc::new(AtomicI64::new(1));
    let clock = minutes.clone();
    let clock = move || Timestamp::from_second(clock.load(Ordering::Relaxed) * 60).unwrap();
    let world = World::over(Arc::new(Overwriting::with_clock(4, Box::new(clock)))).await;
    let copies = async || world.names().await.into_iter().filter(|name| name.contains("/wal/")).count();
    put_whole(&world.repo, &wal(1), 1).await;
    minutes.store(60, Ordering::Relaxed);
    assert_eq!(put_whole(&world.other().await, &wal(1), 1).await, Put::SameContent);
    assert_eq!(copies().await, 2, "whoever put the first may still withdraw it");
    minutes.store(200, Ordering::Relaxed);
    // One who has seen no newer object does not know how late it is there before he has put his own.
    let late = world.other().await;
    assert_eq!(put_whole(&late, &wal(1), 1).await, Put::SameContent);
    assert_eq!(copies().await, 2);
    assert!(matches!(put_whole(&late, &wal(2), 1).await, Put::Conflict(_)));
    assert_eq!(copies().await, 2);
}

/// Within a realm a copy has the same name whoever makes it, so it may have been confirmed before.
#[tokio::test(start_paused = true)]
async fn p6_a_copy_that_is_made_again_withdraws_nothing() {
    let source = World::new().await;
    let (text, strange) = (&b"1\t0/300100\tx\n"[..], &b"1\t0/300200\tx\n"[..]);
    source.repo.put_history(&cluster(), branch(2), text).await.unwrap();
    let create = async |seed| {
        let store: Arc<dyn Store> = Arc::new(Overwriting::new(seed));
        let repo = Repository::create("second", store.clone(), &source.keys).await.unwrap();
        World { store, keys: source.keys.clone(), repo }
    };
    let (target, stranger) = (create(1).await, create(2).await);
    let copy = async || target.other().await.copy_history(&source.repo, &cluster(), branch(2)).await.unwrap();
    assert_eq!(copy().await, Put::New);
    let confirmed = target.named(".history").await;
    // Another writer was killed between his put and his withdrawal.
    stranger.repo.put_history(&cluster(), branch(2), strange).await.unwrap();
    let theirs = stranger.named(".history").await;
    let bytes = stranger.bytes(&theirs).await;
    target.store.put_new(&Key::new(&theirs).unwrap(), Body::from(bytes)).await.unwrap();
    assert!(matches!(copy().await, Put::Conflict(_)));
    let names = target.names().await;
    assert!(names.contains(&confirmed) && names.contains(&theirs), "{names:?}");
}

/// A copy of a base backup that was cut off does not read again what is there.
#[tokio::test(start_paused = true)]
async fn a_copied_backup_is_found_under_its_own_names() {
    let source = World::new().await;
    let manifest = super::copy::put_backup(&source.repo).await;
    let store: Arc<dyn Store> = Arc::new(Overwriting::new(6));
    let target = Repository::create("second", store.clone(), &source.keys).await.unwrap();
    let target = World { store, keys: source.keys.clone(), repo: target };
    let copied = super::copy::copy_backup(&source.repo, &target.repo).await.unwrap();
    assert_eq!((copied.objects, &copied.damaged[..]), (6, &[][..]));
    target.store.delete(&Key::new(&target.named("manifest~").await).unwrap()).await.unwrap();
    // What the source has lost meanwhile does not matter.
    for name in source.names().await.iter().filter(|name| name.contains("/pack/")) {
        source.store.delete(&Key::new(name).unwrap()).await.unwrap();
    }
    let again = super::copy::copy_backup(&source.repo, &target.repo).await.unwrap();
    assert_eq!((again.objects, &again.damaged[..]), (1, &[][..]), "{again:?}");
    assert_eq!(target.repo.get_manifest(&cluster(), super::copy::label()).await.unwrap(), manifest);
}

/// What several writers want to put under the same names.
const NAMES: [&str; 4] = ["segment", "range", "history", "partial"];

/// What a put came to, with the content that was put.
struct Outcome {
    name: &'static str,
    content: u8,
    /// `None`: the writer was cut off.
    put: Option<Put>,
}

async fn put_one(repo: &Repository, name: &str, content: u8) -> Result<Put, CatalogError> {
    let bytes = wal(content);
    let text = [b"1\t0/30010", &[b'0' + content][..], b"\tx\n"].concat();
    let file: KeptFile = "000000010000000000000003.partial".parse().unwrap();
    match name {
        "segment" => repo.put_range(&sealed(repo, &bytes, branch(1), 1, (0, LEN), false).await).await,
        "range" => repo.put_range(&sealed(repo, &bytes, branch(1), 2, (0, 3000), true).await).await,
        "history" => repo.put_history(&cluster(), branch(2), &text).await,
        _ => repo.put_wal_file(&cluster(), branch(1), &file, &text).await,
    }
}

/// Which content a reader finds; `None`: nothing. An error where copies differ.
async fn found(repo: &Repository, name: &str) -> Result<Option<u8>, CatalogError> {
    let which = |bytes: &[u8], of: &dyn Fn(u8) -> Vec<u8>| {
        (!bytes.is_empty()).then(|| (0..3).find(|content| of(*content) == bytes).expect("what nobody wrote"))
    };
    let text = |content: u8| [b"1\t0/30010", &[b'0' + content][..], b"\tx\n"].concat();
    let file: KeptFile = "000000010000000000000003.partial".parse().unwrap();
    let read = |number| repo.read_segment(&MAIN, branch(1), segment(number), size(), None);
    Ok(match name {
        "segment" => which(&read(1).await?.bytes, &wal),
        "range" => which(&read(2).await?.bytes, &|content| wal(content)[..3000].to_vec()),
        "history" => repo.get_history(&cluster(), branch(2)).await?.and_then(|bytes| which(&bytes, &text)),
        _ => repo.get_wal_file(&cluster(), branch(1), &file).await?.and_then(|bytes| which(&bytes, &text)),
    })
}

static MAIN: std::sync::LazyLock<ClusterId> = std::sync::LazyLock::new(cluster);

/// Writers with other and with the same contents, faults of the network, and some that are cut off: whatever the order.
#[test]
fn p6_writers_that_race_in_a_store_that_overwrites() {
    let mut seen = BTreeMap::<&str, u32>::new();
    for seed in 0..40_u64 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        for what in runtime.block_on(race(seed)) {
            *seen.entry(what).or_default() += 1;
        }
    }
    // The test itself: all that may happen did.
    for what in ["new", "same", "conflict", "both withdrew", "cut off", "refused to readers"] {
        assert!(seen.get(what).is_some_and(|count| *count > 0), "never seen in any seed: {what}: {seen:?}");
    }
}

async fn race(seed: u64) -> BTreeSet<&'static str> {
    let mut random = Random::new(seed);
    let mut seen = BTreeSet::new();
    let faults = if seed.is_multiple_of(3) { FaultPlan::network(0.05) } else { FaultPlan::none() };
    let overwriting: Arc<dyn Store> = Arc::new(Overwriting::new(seed));
    let faulty = Faulty::new(overwriting, faults, seed);
    faulty.switch(false);
    let policy = RetryPolicy { attempts: 30, budget: Duration::from_secs(3600), ..RetryPolicy::default() };
    let world = World::over(Arc::new(Retry::with_seed(Arc::new(faulty.clone()), policy, seed))).await;
    faulty.switch(true);
    let cut_off = seed % 4 == 1;
    let mut tasks = Vec::new();
    for writer in 0..3 {
        let repo = world.other().await;
        let content = (random.fraction() * 2.0) as u8 + u8::from(writer == 0);
        for name in NAMES {
            let (begin, end) = (random.fraction() * 300.0, random.fraction() * 600.0);
            let end = if cut_off && random.fraction() < 0.4 { end } else { 1e9 };
            let repo = repo.clone();
            tasks.push(tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(begin as u64)).await;
                let put = tokio::time::timeout(Duration::from_millis(end as u64), put_one(&repo, name, content)).await;
                let put = put.ok().map(|put| put.unwrap_or_else(|error| panic!("seed {seed}, {name}: {error}")));
                Outcome { name, content, put }
            }));
        }
    }
    let mut outcomes = Vec::new();
    for task in tasks {
        outcomes.push(task.await.unwrap());
    }
    faulty.switch(false);
    let reader = world.other().await;
    for name in NAMES {
        let of_name: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.name == name).collect();
        let confirmed: BTreeSet<u8> = of_name
            .iter()
            .filter(|outcome| matches!(outcome.put, Some(Put::New | Put::SameContent)))
            .map(|outcome| outcome.content)
            .collect();
        assert!(confirmed.len() <= 1, "seed {seed}, {name}: two contents were confirmed");
        let ended: BTreeSet<u8> =
            of_name.iter().filter(|outcome| outcome.put.is_some()).map(|outcome| outcome.content).collect();
        let read = found(&reader, name).await;
        let was_cut_off = of_name.iter().any(|outcome| outcome.put.is_none());
        match &read {
            Ok(read) => {
                assert!(confirmed.iter().all(|content| Some(*content) == *read), "seed {seed}, {name}: {read:?}");
                if confirmed.is_empty() && !was_cut_off {
                    assert_eq!(*read, None, "seed {seed}, {name}: what nobody confirmed was withdrawn");
                    seen.insert("both withdrew");
                }
            }
            Err(CatalogError::TwoContents { name: one, other, .. }) => {
                assert!(was_cut_off && one != other, "seed {seed}, {name}: who ends withdraws");
                seen.insert("refused to readers");
            }
            Err(error) => panic!("seed {seed}, {name}: {error}"),
        }
        for outcome in of_name {
            let Outcome { content, put, .. } = outcome;
            match put {
                None => drop(seen.insert("cut off")),
                Some(Put::New) => drop(seen.insert("new")),
                Some(Put::SameContent) => drop(seen.insert("same")),
                Some(Put::BesideDamaged { .. }) => panic!("seed {seed}, {name}: nothing is damaged"),
                Some(Put::Conflict(conflict)) => {
                    seen.insert("conflict");
                    kept_aside(&reader, conflict, name, *content, seed).await;
                }
            }
        }
        // Whoever ended knows: of two contents one was told, or both.
        assert!(ended.len() < 2 || !confirmed.is_superset(&ended), "seed {seed}, {name}: nobody was told");
    }
    seen
}

/// What lost lies under `conflict/`, opens there, and says what it could not stand beside.
async fn kept_aside(reader: &Repository, conflict: &Conflict, name: &str, content: u8, seed: u64) {
    assert_ne!(conflict.existing, conflict.kept);
    let kept = Name::parse(&conflict.kept).unwrap();
    let Object::Of(_, object @ ClusterObject::Conflict(..)) = &kept.object else { panic!("{}", conflict.kept) };
    let opened = reader.get_object(&kept, kind_of(object)).await.unwrap();
    let want = match name {
        "segment" => wal(content),
        "range" => wal(content)[..3000].to_vec(),
        _ => [b"1\t0/30010", &[b'0' + content][..], b"\tx\n"].concat(),
    };
    assert!(opened.plaintext == want, "seed {seed}, {name}: what was kept aside is something else");
    assert_ne!(conflict.note.theirs, conflict.note.ours);
}

/// Of many who take one label for their backup at most one has it, and who was refused has left nothing.
#[test]
fn p6_a_label_is_taken_once_in_a_store_that_overwrites() {
    let mut took = 0;
    for seed in 0..60_u64 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        took += runtime.block_on(async {
            let world = world(seed).await;
            let label = BackupLabel::at("2026-11-20T03:15:00Z".parse().unwrap());
            let puts = (0..4).map(|_| async {
                let repo = world.other().await;
                let start = BackupStart { label, writer: repo.writer(), started_at: label.start(), parents: vec![] };
                let put = repo.put_record(&cluster(), ClusterObject::Start(label), &start).await;
                match put {
                    Ok(_) => 1,
                    Err(CatalogError::Taken { .. }) => 0,
                    Err(error) => panic!("seed {seed}: {error}"),
                }
            });
            let took: u32 = futures_util::future::join_all(puts).await.into_iter().sum();
            assert!(took <= 1, "seed {seed}: {took} have the label");
            let there = world.names().await.into_iter().filter(|name| name.contains("/start")).count();
            assert_eq!(there, took as usize, "seed {seed}");
            took
        });
    }
    assert!(took > 0, "nobody ever takes a label");
}
