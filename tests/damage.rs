//! WAL that is damaged on the server: archived as it is, told with its position, and never planned across.

mod support;

use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use pgkeep::archive::ClusterStatus;
use pgkeep::pg::instance::StopMode;
use pgkeep::store::{Body, Created, Key, ListRequest, Listing, ObjectMeta, Store, StoreError, Tail};
use pgkeep::types::{Branch, Lsn, SegmentNumber, SegmentSize, TimelineId};
use rustix::process::Signal;
use support::archiver::{Archive, flushed};
use support::rig::{Rig, SOON};
use support::{TestPg, any_major, ok, wait_until};
use tokio::sync::watch;

const SIZE: u64 = 1 << 20;

fn lsn(text: &str) -> Lsn {
    ok(text.parse())
}

/// The file that holds a position of timeline 1.
fn segment_of(pg: &TestPg, at: Lsn) -> PathBuf {
    let size = SegmentSize::new(SIZE).expect("a segment size");
    let number: SegmentNumber = at.segment(size);
    pg.data_dir().join("pg_wal").join(number.file_name(TimelineId::FIRST, size))
}

/// Where the recorded damage begins and ends, by position.
fn damage(rig: &Rig) -> Vec<(Lsn, Lsn)> {
    let list = rig.json(&["list", "--json"]);
    let gaps = list
        .pointer("/clusters/0/gaps")
        .and_then(|gaps| gaps.as_array())
        .unwrap_or_else(|| panic!("no gaps in {list}"));
    let end = |gap: &serde_json::Value, key: &str| lsn(gap[key].as_str().expect("a position"));
    gaps.iter()
        .inspect(|gap| assert_eq!(gap["reason"], "damaged"))
        .map(|gap| (end(gap, "from"), end(gap, "to")))
        .collect()
}

/// Two hundred bytes in a segment that is flushed and not streamed yet are no longer what was written.
fn spoil(pg: &TestPg, at: Lsn) {
    let file = ok(fs::OpenOptions::new().write(true).open(segment_of(pg, at)));
    ok(file.write_all_at(&[0xA5; 200], at.get() % SIZE));
}

fn insert_lsn(pg: &TestPg) -> Lsn {
    lsn(&pg.sql("select pg_current_wal_insert_lsn()"))
}

/// Where the base backups begin, oldest first.
fn backups(rig: &Rig) -> Vec<Lsn> {
    let list = rig.json(&["list", "--json"]);
    let backups = list["clusters"][0]["backups"].as_array().cloned().unwrap_or_default();
    backups.iter().map(|backup| lsn(backup["start"].as_str().expect("a position"))).collect()
}

/// In the middle of a stream: the archiver has been at it for a while, and mends it by itself; once, also when it comes back
/// to it. And the same by `wal push`.
#[test]
fn p3_damaged_wal_is_archived_told_and_not_planned_across() {
    let pg =
        TestPg::start_segmented(any_major(), 1, "autovacuum = off\nwal_keep_size = '100MB'\nwal_buffers = '64kB'\n");
    let (mut rig, pushed) = (Rig::new(&pg), Rig::new(&pg));
    pg.sql("create table t (n int)");
    rig.start_archiver();
    rig.done(&["backup"]);
    let before = pg.sql("insert into t values (0) returning pg_current_xact_id()");
    rig.wait_for(&before);
    // What is on its way already stays sound.
    rig.signal_archiver(Signal::STOP);
    let at = insert_lsn(&pg);
    pg.sql("insert into t select generate_series(1, 80000)");
    let after = pg.sql("insert into t values (-1) returning pg_current_xact_id()");
    let behind = insert_lsn(&pg);
    pg.sql("select pg_switch_wal()");
    let harmed = Lsn::new(at.get().next_multiple_of(SIZE) + 2 * SIZE + 300_000);
    assert!(harmed < behind, "not enough WAL was written");
    spoil(&pg, harmed);
    rig.signal_archiver(Signal::CONT);

    let mut told = Vec::new();
    for round in 0..2 {
        // What follows is archived.
        let mark = pg.sql(&format!("insert into t values ({round}) returning pg_current_wal_insert_lsn()"));
        let reached = || {
            let list = rig.run(&["list", "--json"]).stdout;
            let list: serde_json::Value = serde_json::from_str(&list).unwrap_or_default();
            list.pointer("/clusters/0/frontier").and_then(|at| at.as_str()).is_some_and(|at| lsn(at) >= lsn(&mark))
        };
        wait_until("what follows to be archived", SOON, reached);
        let since = Instant::now();
        while backups(&rig).len() < 2 {
            assert!(since.elapsed() < SOON / 8, "no base backup behind it: {}", rig.log());
        }
        let found = damage(&rig);
        let (from, to) = (found[0].0, found.last().expect("damage").1);
        assert!(from <= harmed && harmed.advance(200) <= to && to < harmed.advance(30_000), "{found:?}, {harmed}");
        if round == 0 {
            assert!(
                rig.log().contains("DAMAGED WAL") && rig.log().contains(&from.to_string()),
                "{from}: {}",
                rig.log()
            );
            assert!(rig.log().contains("was taken because one was needed"), "{}", rig.log());
            told = found;
        } else {
            assert_eq!(found, told, "another look found something else");
        }
        let begin = backups(&rig);
        assert!(begin.len() == 2 && begin[0] < from && to <= begin[1], "{begin:?} with damage from {from} to {to}");
        rig.stop_archiver();
        if round == 0 {
            rig.start_archiver();
        }
    }
    rig.done(&["list"]).says("DAMAGED WAL on branch 00000001");
    rig.run(&["check"]).says("is damaged, as it came from the server");
    rig.done(&["plan", "--to", &format!("xid:{before}")]);
    rig.run(&["plan", "--to", &format!("xid:{after}")]).exits(1).says("is damaged, as it came from the server");
    rig.run(&["restore", "--to", &format!("xid:{after}"), "--pgdata", "no"]).exits(1);
    assert!(!rig.path("no").exists());

    // From there on everything is restorable.
    rig.start_archiver();
    let newest = pg.sql("insert into t values (-2) returning pg_current_xact_id()");
    rig.wait_for(&newest);
    rig.stop_archiver();
    assert_eq!(backups(&rig).len(), 2);

    // The same file by archive_command: it is taken, told and noted, once and again.
    let file = segment_of(&pg, harmed);
    for file in [&file, &file, &segment_of(&pg, Lsn::new(harmed.get() - SIZE))] {
        let run = pushed.done(&["wal", "push", file.to_str().expect("a path")]);
        assert_eq!(run.all().contains("DAMAGED WAL"), harmed.get() / SIZE == segment_number(file), "{}", run.all());
    }
    assert_eq!(damage(&pushed), told);
}

/// A store that takes no notes of gaps and damage until it is told to; how many wait.
#[derive(Debug)]
struct NoNotes {
    inner: Arc<dyn Store>,
    takes: watch::Sender<bool>,
    waiting: AtomicUsize,
}

#[async_trait]
impl Store for NoNotes {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn appends(&self) -> bool {
        self.inner.appends()
    }
    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError> {
        if key.as_str().contains("/gap/") {
            self.waiting.fetch_add(1, Ordering::Relaxed);
            let _ = self.takes.subscribe().wait_for(|takes| *takes).await;
        }
        self.inner.put_new(key, body).await
    }
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        self.inner.get(key, range).await
    }
    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        self.inner.head(key).await
    }
    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        self.inner.list(request).await
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

/// While the note is on its way nothing that comes behind is put or acknowledged; so a kill loses no note.
#[test]
fn p3_nothing_behind_damage_counts_before_its_note() {
    let mut notes = None;
    let archive = Archive::over(|inner| {
        let store = Arc::new(NoNotes { inner, takes: watch::Sender::new(false), waiting: AtomicUsize::new(0) });
        notes = Some(Arc::clone(&store));
        store
    });
    let notes = notes.expect("a store");
    let mut pg = TestPg::start_segmented(any_major(), 1, "autovacuum = off\nwal_keep_size = '100MB'\n");
    pg.sql("create table t (n int)");
    let archiver = archive.start(&pg);
    archiver.wait_durable(flushed(&pg));
    archiver.stop(&archive);
    let at = insert_lsn(&pg);
    pg.sql("insert into t select generate_series(1, 40000)");
    ok(pg.stop(StopMode::Fast));
    let harmed = Lsn::new(at.get().next_multiple_of(SIZE) + 300_000);
    spoil(&pg, harmed);
    ok(pg.start());

    let archiver = archive.start(&pg);
    wait_until("a note to be on its way", SOON, || notes.waiting.load(Ordering::Relaxed) > 0);
    for _ in 0..10 {
        pg.sql("insert into t select generate_series(1, 10)");
        let to = flushed(&pg);
        wait_until(
            "more to come in",
            SOON,
            || matches!(&*archiver.seen.borrow(), ClusterStatus::Streaming(progress) if progress.received >= to && progress.noted == 0),
        );
    }
    let durable = archiver.durable();
    archiver.kill(&archive);
    let slot = lsn(&pg.sql("select restart_lsn from pg_replication_slots where slot_name = 'pgkeep'"));
    let held = archive.frontier(1).expect("something is archived");
    // Up to where it was noticed: the end of its page, or of its record.
    let noticed = harmed.advance(20_000);
    assert!(durable <= noticed && slot <= noticed && held <= noticed, "{durable}, {slot}, {held}; spoilt at {harmed}");
    let gaps =
        || ok(archive.runtime.block_on(archive.reopened().damage_of(&archive.id(), Branch::first(TimelineId::FIRST))));
    assert_eq!(gaps(), []);

    notes.takes.send_replace(true);
    let archiver = archive.start(&pg);
    archiver.wait_durable(flushed(&pg));
    wait_until(
        "it to be shown that it is noted",
        SOON,
        || matches!(&*archiver.seen.borrow(), ClusterStatus::Streaming(progress) if progress.noted > 0),
    );
    archiver.stop(&archive);
    let found = gaps();
    assert!(found.iter().any(|gap| gap.from <= harmed && harmed < gap.to), "{found:?}, spoilt at {harmed}");
}

fn segment_number(file: &std::path::Path) -> u64 {
    let size = SegmentSize::new(SIZE).expect("a segment size");
    let name = file.file_name().and_then(|name| name.to_str()).expect("a name");
    SegmentNumber::from_file_name(name, size).expect("a segment").1.get()
}
