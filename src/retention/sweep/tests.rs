//! The sweep over a store in memory, with its clock in our hands: days go by, and it is cut off at every step.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::*;
use crate::catalog::Usage;
use crate::catalog::layout::{PackName, PartKind, PartName, RangeName, SegmentName};
use crate::catalog::records::{BackupInfo, BackupStart, Manifest, PackRef, PartRef, ServerParameters};
use crate::catalog::retention::{Condemned, Held, HoldRecord, LeaseRecord};
use crate::seal::KeyFile;
use crate::store::memory::{MemoryOptions, MemoryStore};
use crate::store::{Body, Created, Key, ListRequest, Listing, ObjectMeta, Op, Store, StoreError, Tail, list_all};
use crate::types::{SegmentSize, SystemId, TimelineId};

const MIB: u64 = 1 << 20;
const DAY: i64 = 24 * 3600;
const NEVER: i64 = i64::MAX;

/// A store that dies: from the `left`-th change on everything fails. Or one that lets nobody delete.
#[derive(Debug)]
struct Mortal {
    inner: MemoryStore,
    left: AtomicI64,
    /// The change on which it dies happens, and its answer is lost.
    after: bool,
    denies: bool,
}

impl Mortal {
    fn dead(at: &Key) -> StoreError {
        StoreError::Unavailable { op: Op::Put, at: at.to_string(), source: "it has died".into() }
    }

    fn is_dead(&self) -> bool {
        self.left.load(Ordering::Relaxed) < 0
    }

    /// Whether this change happens, and whether its answer arrives.
    fn change(&self) -> (bool, bool) {
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            left if left > 0 => (true, true),
            0 => (self.after, false),
            _ => (false, false),
        }
    }
}

#[async_trait]
impl Store for Mortal {
    fn describe(&self) -> String {
        "mortal".into()
    }

    fn appends(&self) -> bool {
        self.inner.appends()
    }

    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError> {
        let (happens, answers) = self.change();
        let done = if happens { self.inner.put_new(key, body).await } else { Err(Self::dead(key)) };
        if answers { done } else { Err(Self::dead(key)) }
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        if self.is_dead() { Err(Self::dead(key)) } else { self.inner.get(key, range).await }
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        if self.is_dead() { Err(Self::dead(key)) } else { self.inner.head(key).await }
    }

    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        self.inner.list(request).await
    }

    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        self.inner.sync(key).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        if self.denies {
            let (at, source, hint) = (key.to_string(), "locked".into(), "wait".to_owned());
            return Err(StoreError::Denied { op: Op::Delete, at, source, hint });
        }
        let (happens, answers) = self.change();
        let done = if happens { self.inner.delete(key).await } else { Ok(()) };
        if answers { done } else { Err(Self::dead(key)) }
    }

    async fn open_tail(&self, key: &Key, capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        self.inner.open_tail(key, capacity).await
    }
}

struct World {
    store: MemoryStore,
    keys: KeyFile,
    clock: Arc<AtomicI64>,
    repository: Repository,
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_760_054_400 + seconds).unwrap() // 2025-10-10 00:00 UTC
}

fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

fn id() -> ClusterId {
    ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) }
}

fn branch() -> Branch {
    Branch::first(TimelineId::FIRST)
}

fn label(day: i64) -> BackupLabel {
    BackupLabel::at(at(day * DAY + 3 * 3600))
}

impl World {
    async fn new() -> World {
        let clock = Arc::new(AtomicI64::new(0));
        let read = clock.clone();
        let options =
            MemoryOptions { clock: Box::new(move || at(read.load(Ordering::Relaxed))), ..MemoryOptions::default() };
        let (store, keys) = (MemoryStore::with(options), KeyFile::generate().unwrap());
        let usage = World::usage(&clock);
        let repository = Repository::create_for("main", Arc::new(store.clone()), &keys, usage).await.unwrap();
        World { store, keys, clock, repository }
    }

    fn usage(clock: &Arc<AtomicI64>) -> Usage {
        let clock = clock.clone();
        let clock = Arc::new(move || at(clock.load(Ordering::Relaxed)));
        Usage { clock, ..Usage::new().unwrap() }
    }

    /// Two days at the tenth day, and as many more as went by since: the window's beginning stands still.
    fn policy(&self) -> Policy {
        let since = self.clock.load(Ordering::Relaxed) - (9 * DAY + 6 * 3600);
        let window = SignedDuration::from_secs(2 * DAY + since.max(0));
        Policy { window, daily: 0, weekly: 2, monthly: 0, yearly: 0, at_least: 1 }
    }

    /// The same repository, through a store that fails.
    async fn through(&self, left: i64, after: bool, denies: bool) -> Repository {
        let store = Mortal { inner: self.store.clone(), left: AtomicI64::new(left), after, denies };
        let usage = World::usage(&self.clock);
        Repository::open_for("main", Arc::new(store), self.keys.clone(), usage).await.unwrap()
    }

    fn set(&self, seconds: i64) {
        self.clock.store(seconds, Ordering::Relaxed);
    }

    async fn put(&self, object: ClusterObject, len: usize) {
        let key = Key::new(Name::new(Object::Of(id(), object)).to_string()).unwrap();
        self.store.put_new(&key, vec![1; len].into()).await.unwrap();
    }

    async fn wal(&self, segments: Range<u64>) {
        for number in segments {
            let name = SegmentName::new(TimelineId::FIRST, SegmentNumber::new(number), size()).unwrap();
            self.put(ClusterObject::Wal(branch(), RangeName::new(name, 0, MIB as u32).unwrap()), 50).await;
        }
    }

    async fn start(&self, day: i64, parents: &[BackupLabel]) {
        let (label, writer, started_at) = (label(day), self.repository.writer(), at(day * DAY + 3 * 3600));
        let start = BackupStart { label, writer, started_at, parents: parents.to_vec() };
        self.repository.put_record(&id(), ClusterObject::Start(label), &start).await.unwrap();
    }

    /// A day: WAL, and a base backup that names a pack of the day before.
    async fn day(&self, day: i64) {
        self.try_day(day).await.unwrap();
    }

    async fn try_day(&self, day: i64) -> Result<Created, CatalogError> {
        let first = day as u64 * 6;
        self.set(day * DAY);
        self.wal(first..first + 3).await;
        self.set(day * DAY + 3 * 3600);
        let before: Vec<BackupLabel> = (day > 0).then(|| label(day - 1)).into_iter().collect();
        self.start(day, &before).await;
        let own = PackName { label: label(day), number: 1 };
        let shared = PackName { label: label(day), number: 2 };
        for pack in [own, shared] {
            self.put(ClusterObject::Pack(pack), 100).await;
        }
        let part = PartName { label: label(day), kind: PartKind::Files, number: 1 };
        self.put(ClusterObject::Part(part), 10).await;
        self.wal(first + 3..first + 6).await;
        let mut packs = vec![own, shared];
        packs.extend(before.iter().map(|label| PackName { label: *label, number: 2 }));
        let pack = |pack| PackRef { pack, len: 100, header: Bytes::new(), plaintext_len: 100, live: 50 };
        let backup = BackupInfo {
            label: label(day),
            system: SystemId::new(7),
            branch: branch(),
            timeline: TimelineId::FIRST,
            start: Lsn::new((first + 2) * MIB + 40),
            stop: Lsn::new((first + 4) * MIB + 40),
            started_at: at(day * DAY + 3 * 3600),
            stopped_at: at(day * DAY + 4 * 3600),
            server_version: 150_000,
            segment_size: size(),
            bytes: 1,
            stored_bytes: 1,
            files: 1,
            tablespaces: Vec::new(),
            flagged: None,
            parameters: ServerParameters::default(),
        };
        let manifest = Manifest {
            backup,
            packs: packs.into_iter().map(pack).collect(),
            tables: vec![PartRef { part, len: 10, entries: 1 }],
            tags: Vec::new(),
            server_manifest: Vec::new(),
            parents: before,
        };
        self.repository.put_manifest(&id(), &manifest).await
    }

    /// Ten days of backups (the first a Friday), what a crash left, and a backup that never came to its end.
    async fn ten_days() -> World {
        let world = World::new().await;
        for day in 0..10 {
            world.day(day).await;
            if day == 1 {
                let cut_off = BackupLabel::at(at(DAY + 5 * 3600));
                world.put(ClusterObject::Pack(PackName { label: cut_off, number: 1 }), 100).await;
            }
            if day == 2 {
                world.set(2 * DAY + 8 * 3600);
                let given_up = BackupLabel::at(at(2 * DAY + 8 * 3600));
                let (writer, started_at) = (world.repository.writer(), at(2 * DAY + 8 * 3600));
                let start = BackupStart { label: given_up, writer, started_at, parents: vec![label(0)] };
                world.repository.put_record(&id(), ClusterObject::Start(given_up), &start).await.unwrap();
                world.put(ClusterObject::Pack(PackName { label: given_up, number: 1 }), 100).await;
            }
        }
        world.set(9 * DAY + 6 * 3600);
        world
    }

    async fn names(&self) -> Vec<String> {
        let all = list_all(&self.store, &format!("{}/", id())).await.unwrap();
        all.into_iter().map(|meta| meta.key.to_string().replace(&format!("{}/", id()), "")).collect()
    }

    async fn labels(&self) -> Vec<BackupLabel> {
        self.repository.load(&id()).await.unwrap().backups.iter().map(|backup| backup.label).collect()
    }

    /// Whatever is there can be restored, and so can the window.
    async fn is_true(&self, window_from: Lsn, when: &str) {
        let survey = self.repository.survey(&id()).await.unwrap();
        let now = at(self.clock.load(Ordering::Relaxed));
        let decision = decide(&survey, &self.policy(), now);
        for verdict in &decision.backups {
            assert_eq!(verdict.unsound, None, "{} {when}", verdict.label);
        }
        let promise = decision.before.first().unwrap();
        assert!(promise.from.unwrap() <= window_from, "the window is shorter {when}: {promise:?}");
        assert_eq!(promise.to, Some(Lsn::new(60 * MIB)), "{when}");
    }
}

/// What stays of the ten days, with a window of two days, and two weeks: Sunday of the first, and all of the window with the
/// base before it.
fn stays() -> Vec<BackupLabel> {
    [2, 7, 8, 9].map(label).to_vec()
}

/// Days go by until nothing more happens.
async fn days_go_by(world: &World, days: Range<i64>) {
    for day in days {
        world.set(day * DAY + 7 * 3600);
        sweep(&world.repository, &id(), &world.policy()).await.unwrap();
    }
}

#[tokio::test]
async fn p5_condemned_first_then_manifests_then_objects() {
    let world = World::ten_days().await;
    let all = world.names().await;
    let (decision, first) = sweep(&world.repository, &id(), &world.policy()).await.unwrap();
    assert_eq!(first.condemned, [0, 1, 3, 4, 5, 6].map(label));
    assert_eq!((first.manifests.len(), first.given_up.len()), (0, 1));
    assert_eq!(decision.leftovers.len(), 1);
    // Nothing is gone, and nobody takes a condemned one for a parent.
    let now = world.names().await;
    assert!(all.iter().all(|name| now.contains(name)));
    let Condemned::These(condemned) = world.repository.condemned(&id()).await.unwrap() else { panic!() };
    assert_eq!(condemned.into_iter().collect::<Vec<_>>(), first.condemned);
    // Half a day later: as before.
    world.set(9 * DAY + 20 * 3600);
    let (_, again) = sweep(&world.repository, &id(), &world.policy()).await.unwrap();
    assert_eq!((again.plan, again.manifests.len(), again.bytes), (None, 0, 0));
    world.set(10 * DAY + 7 * 3600);
    let (_, second) = sweep(&world.repository, &id(), &world.policy()).await.unwrap();
    assert_eq!(second.manifests, first.condemned);
    let wal = |names: &[String]| names.iter().filter(|name| name.starts_with("wal/")).count();
    assert_eq!(wal(&world.names().await), 60, "WAL waits another day");
    world.set(11 * DAY + 8 * 3600);
    let (_, third) = sweep(&world.repository, &id(), &world.policy()).await.unwrap();
    assert!(third.bytes > 0 && third.refusals == 0);
    let left = world.names().await;
    // Of the kept day 2: segments 14 to 16, and all from 44 on, where the window's base begins.
    assert_eq!(wal(&left), 3 + 16, "{left:#?}");
    let packs: Vec<&String> = left.iter().filter(|name| name.starts_with("pack/")).collect();
    // Their own two each, and those that days 2 and 7 name of the days before.
    assert_eq!(packs.len(), 2 * 4 + 2, "{packs:?}");
    assert_eq!(world.labels().await, stays());
    // The hole behind day 2 is recorded, the beginning of everything is none.
    let gaps: Vec<_> = world.repository.load(&id()).await.unwrap().gaps;
    let gaps: Vec<_> = gaps.iter().map(|gap| (gap.from.get() / MIB, gap.to.get() / MIB, gap.reason)).collect();
    assert_eq!(gaps, [(17, 44, GapReason::Expired)]);
    let inventory = world.repository.load(&id()).await.unwrap();
    assert_eq!(inventory.frontier(branch()), Some(Lsn::new(60 * MIB)), "frontiers step over what was expired");
    assert!(crate::plan::holes(&inventory).is_empty(), "and it is not missing");
    assert!(!left.iter().any(|name| name.starts_with("expire/")), "the records go last: {left:?}");
    assert!(
        !left.iter().any(|name| name.ends_with("/start")
            && !stays().iter().any(|label| { name.contains(&label.to_string()) })
            && !name.contains("20251012T080000Z")),
        "{left:?}"
    );
}

#[tokio::test]
async fn p5_cut_off_at_every_step_nothing_is_ever_a_lie() {
    let window_from = Lsn::new(46 * MIB + 40);
    let reference = World::ten_days().await;
    days_go_by(&reference, 9..13).await;
    let settled = |names: Vec<String>| -> Vec<String> {
        names.into_iter().filter(|name| !name.starts_with("lease/") && !name.starts_with("expire/")).collect()
    };
    let want = settled(reference.names().await);
    // Every second step, once before and once after it happened. Each day has a store of its own that lives as long, so the
    // days after the one on which it died are whole ones.
    for left in (0..).step_by(2) {
        let world = World::ten_days().await;
        let mut died = false;
        for day in 9..13 {
            world.set(day * DAY + 7 * 3600);
            if !died {
                let mortal = world.through(left, left % 4 == 0, false).await;
                died = sweep(&mortal, &id(), &world.policy()).await.is_err();
                world.is_true(window_from, &format!("cut off at change {left} on day {day}")).await;
                if died {
                    // Again at once, by somebody else.
                    sweep(&world.repository, &id(), &world.policy()).await.unwrap();
                }
            } else {
                sweep(&world.repository, &id(), &world.policy()).await.unwrap();
            }
            world.is_true(window_from, &format!("after change {left} failed, day {day}")).await;
        }
        days_go_by(&world, 13..15).await;
        assert_eq!(settled(world.names().await), want, "after change {left} failed");
        if !died {
            assert!(left > 40, "only {left} changes");
            return;
        }
    }
}

#[tokio::test]
async fn p5_what_may_not_be_removed_is_named_and_stops_nothing() {
    let world = World::ten_days().await;
    days_go_by(&world, 9..10).await;
    world.set(10 * DAY + 8 * 3600);
    let denied = world.through(NEVER, false, true).await;
    let (_, swept) = sweep(&denied, &id(), &world.policy()).await.unwrap();
    assert!(swept.manifests.is_empty() && swept.refusals >= 6, "{swept:?}");
    assert!(swept.refused.iter().any(|(name, why)| name.ends_with("/manifest") && why.contains("locked")));
    // When the lock has passed, it goes on.
    days_go_by(&world, 11..14).await;
    assert_eq!(world.labels().await, stays());
}

#[tokio::test]
async fn p5_a_day_to_disagree() {
    let world = World::ten_days().await;
    days_go_by(&world, 9..10).await;
    let (reason, made_at, writer) = ("audit".to_owned(), at(9 * DAY), world.repository.writer());
    let hold = |held| HoldRecord { held, reason: reason.clone(), until: None, made_at, writer };
    let name = world.repository.put_hold(&id(), &hold(Held::Backup(label(4)))).await.unwrap();
    world.repository.put_hold(&id(), &hold(Held::Time(at(6 * DAY)))).await.unwrap();
    // Somebody restores an old one, and a backup begins that saw no plan yet.
    let lease = LeaseRecord { backup: Some(label(1)), ..LeaseRecord::new("restore", writer, at(9 * DAY)) };
    world.set(10 * DAY);
    world.put(ClusterObject::Start(label(10)), 3).await; // does not open: its parents are any
    days_go_by(&world, 10..11).await;
    assert_eq!(world.labels().await.len(), 10, "a start that does not open keeps all");
    world.store.delete(&Key::new(format!("{}/backup/{}/start", id(), label(10))).unwrap()).await.unwrap();
    world.start(10, &[label(3)]).await;
    // Nothing of the plan was to go then, so it was let off: another one.
    world.set(10 * DAY + 8 * 3600);
    let (_, swept) = sweep(&world.repository, &id(), &world.policy()).await.unwrap();
    assert_eq!(swept.condemned, [0, 1, 6].map(label));
    world.set(11 * DAY);
    world.repository.begin_lease(&id(), &lease).await.unwrap();
    world.set(11 * DAY + 9 * 3600);
    sweep(&world.repository, &id(), &world.policy()).await.unwrap();
    // 1 is leased, 3 a parent, 4 held, 5 the base of the held instant.
    assert_eq!(world.labels().await, [1, 2, 3, 4, 5, 7, 8, 9].map(label));
    world.repository.release_hold(&id(), name).await.unwrap();
    days_go_by(&world, 15..19).await;
    let labels = world.labels().await;
    assert!(labels.contains(&label(5)) && !labels.contains(&label(4)) && !labels.contains(&label(1)), "{labels:?}");
    // The backup that never came back was given up, and cannot become complete.
    let survey = world.repository.survey(&id()).await.unwrap();
    assert!(survey.tombstones.contains_key(&label(10)));
}

#[tokio::test]
async fn a_late_manifest_meets_the_tombstone() {
    let world = World::new().await;
    world.start(0, &[]).await;
    assert!(world.repository.give_up_backup(&id(), label(0)).await.unwrap());
    let inventory = world.repository.load(&id()).await.unwrap();
    assert!(inventory.backups.is_empty() && inventory.unfinished_backups.is_empty() && inventory.damaged.is_empty());
    let put = world.try_day(0).await;
    assert!(matches!(put, Err(CatalogError::Taken { .. })), "it became complete over its tombstone: {put:?}");
    assert!(world.labels().await.is_empty());
}
