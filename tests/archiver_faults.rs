//! The archiver when something is wrong around it: each of these once made it lose, repeat or stop.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pgkeep::archive::{ArchiveOptions, ClusterStatus};
use pgkeep::catalog::Repository;
use pgkeep::pg::instance::StopMode;
use pgkeep::store::Store;
use pgkeep::store::faulty::{FaultPlan, Faulty};
use pgkeep::store::fs::FsStore;
use pgkeep::types::{Branch, Lsn, SegmentSize, TimelineId};
use support::archiver::*;
use support::{TestPg, any_major, ok, wait_until};

#[derive(Debug)]
struct SyncFails {
    inner: Arc<dyn Store>,
    armed: Arc<std::sync::atomic::AtomicBool>,
    confirmed: Arc<std::sync::Mutex<std::collections::BTreeMap<String, u64>>>,
}
#[derive(Debug)]
struct SyncFailsTail {
    inner: Box<dyn pgkeep::store::Tail>,
    key: String,
    armed: Arc<std::sync::atomic::AtomicBool>,
    confirmed: Arc<std::sync::Mutex<std::collections::BTreeMap<String, u64>>>,
}
#[async_trait::async_trait]
impl pgkeep::store::Tail for SyncFailsTail {
    async fn append(&mut self, bytes: pgkeep::store::Body) -> Result<(), pgkeep::store::StoreError> {
        self.inner.append(bytes).await?; // pwritev
        if self.armed.swap(false, std::sync::atomic::Ordering::SeqCst) {
            return Err(pgkeep::store::StoreError::Unavailable {
                op: pgkeep::store::Op::Append,
                at: self.key.clone(),
                source: "fdatasync: EIO".into(),
            });
        }
        self.confirmed.lock().unwrap().insert(self.key.clone(), self.inner.len());
        Ok(())
    }
    fn len(&self) -> u64 {
        self.inner.len()
    }
}
#[async_trait::async_trait]
impl Store for SyncFails {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn appends(&self) -> bool {
        true
    }
    async fn put_new(
        &self,
        key: &pgkeep::store::Key,
        body: pgkeep::store::Body,
    ) -> Result<pgkeep::store::Created, pgkeep::store::StoreError> {
        self.inner.put_new(key, body).await
    }
    async fn get(
        &self,
        key: &pgkeep::store::Key,
        range: Option<std::ops::Range<u64>>,
    ) -> Result<bytes::Bytes, pgkeep::store::StoreError> {
        self.inner.get(key, range).await
    }
    async fn sync(&self, key: &pgkeep::store::Key) -> Result<(), pgkeep::store::StoreError> {
        self.inner.sync(key).await
    }
    async fn head(&self, key: &pgkeep::store::Key) -> Result<pgkeep::store::ObjectMeta, pgkeep::store::StoreError> {
        self.inner.head(key).await
    }
    async fn list(
        &self,
        request: &pgkeep::store::ListRequest,
    ) -> Result<pgkeep::store::Listing, pgkeep::store::StoreError> {
        self.inner.list(request).await
    }
    async fn delete(&self, key: &pgkeep::store::Key) -> Result<(), pgkeep::store::StoreError> {
        self.inner.delete(key).await
    }
    async fn open_tail(
        &self,
        key: &pgkeep::store::Key,
        capacity: u64,
    ) -> Result<Box<dyn pgkeep::store::Tail>, pgkeep::store::StoreError> {
        let inner = self.inner.open_tail(key, capacity).await?;
        Ok(Box::new(SyncFailsTail {
            inner,
            key: key.to_string(),
            armed: self.armed.clone(),
            confirmed: self.confirmed.clone(),
        }))
    }
}

#[test]
fn p1_what_only_a_tail_holds_is_not_acknowledged() {
    let armed = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let confirmed = Arc::new(std::sync::Mutex::new(std::collections::BTreeMap::new()));
    let (a, c) = (armed.clone(), confirmed.clone());
    let archive = Archive::over(move |inner| Arc::new(SyncFails { inner, armed: a, confirmed: c }));
    let pg = TestPg::start(any_major(), "");
    let archiver = archive.start_with(&pg, ArchiveOptions { synchronous: true, ..options() });
    pg.sql("CREATE TABLE t (g int)");
    archiver.wait_durable(flushed(&pg));
    armed.store(true, std::sync::atomic::Ordering::SeqCst);
    pg.sql("INSERT INTO t SELECT generate_series(1, 1000)");
    let to = flushed(&pg);
    wait_until("ack", SOON, || lsn(&pg.sql("SELECT coalesce(max(flush_lsn),'0/0') FROM pg_stat_replication")) >= to);
    archiver.kill(&archive);
    let acked = lsn(&pg.sql("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'pgkeep'"));
    // The bytes whose fdatasync failed are gone (power failure, or the kernel dropped the pages).
    let root = archive.dir.path().join("repository");
    for (name, len) in archive.objects() {
        if !name.contains("/open/") {
            continue;
        }
        let keep = confirmed.lock().unwrap().get(&name).copied().unwrap_or(0);
        println!("{name}: {len} bytes, confirmed {keep}");
        std::fs::OpenOptions::new().write(true).open(root.join(&name)).unwrap().set_len(keep).unwrap();
    }
    let frontier = archive.frontier(1).unwrap();
    println!(
        "acknowledged {acked} (commit at {to}), after the loss of what was never synced the archive ends at {frontier}"
    );
    assert!(frontier >= acked, "P1 violated");
}

#[test]
fn p1_a_fork_behind_the_first_part_of_a_large_segment() {
    let archive = Archive::new();
    let size = SegmentSize::new(128 << 20).unwrap();
    let pg = TestPg::start_segmented(any_major(), 128, "wal_keep_size = 2GB\nmax_wal_size=4GB\n");
    pg.sql("CREATE TABLE t (g int, f text)");
    let mut standby = standby_of(&pg, any_major());
    let archiver = archive.start(&standby);
    pg.sql("SELECT pg_switch_wal()");
    pg.sql("INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(1, 180000) g");
    println!("primary at {}", flushed(&pg));
    archiver.wait_durable(flushed(&pg));
    ok(standby.promote());
    standby.sql("INSERT INTO t SELECT g, repeat('y', 100) FROM generate_series(1, 1000) g");
    let to = flushed(&standby);
    println!("T2 to {to}");
    archiver.wait_durable(to);
    archiver.stop(&archive);
    for (name, len) in archive.objects() {
        println!("{name} {len}");
    }
    let two = Branch::first(TimelineId::new(2).unwrap());
    let read =
        archive.runtime.block_on(archive.reopened().read_segment(&archive.id(), two, to.segment(size), size, None));
    println!("read: {:?}", read.as_ref().map(|r| r.bytes.len()).map_err(|e| e.to_string()));
    println!(
        "resume: {:?}",
        archive.runtime.block_on(archive.reopened().resume(&archive.id(), two)).map_err(|e| e.to_string())
    );
    assert_same_as_pg_wal(&archive, &standby, 2, to.segment_start(size), to, size);
}

fn write_only_archive() -> Archive {
    let mut archive = Archive::new();
    let store = ok(archive.runtime.block_on(FsStore::open(archive.dir.path().join("repository"))));
    archive.repository =
        ok(archive.runtime.block_on(Repository::open("main", Arc::new(store), archive.key.write_only())));
    archive
}

#[test]
fn a_write_only_archiver_restarts_after_a_checkpoint() {
    let mut archive = write_only_archive();
    let pg = TestPg::start_segmented(any_major(), 1, "min_wal_size = 2MB\nmax_wal_size = 4MB\n");
    pg.sql("CREATE TABLE t (g int, f text)");
    let archiver = archive.start(&pg);
    for _ in 0..4 {
        pg.sql("INSERT INTO t SELECT g, repeat('x', 200) FROM generate_series(1, 6000) g; CHECKPOINT");
    }
    archiver.wait_durable(flushed(&pg));
    archiver.stop(&archive);
    for _ in 0..4 {
        pg.sql("INSERT INTO t VALUES (1); CHECKPOINT");
    }
    println!(
        "slot {} wal {}",
        pg.sql("SELECT restart_lsn FROM pg_replication_slots"),
        pg.sql("SELECT string_agg(name, ' ' order by name) FROM pg_ls_waldir()")
    );
    println!(
        "frontier for a key that reads: {:?}; without: {:?}",
        archive.frontier(1),
        archive
            .runtime
            .block_on(archive.repository.resume(&archive.id(), Branch::first(TimelineId::FIRST)))
            .unwrap()
            .map(|r| r.at)
    );
    let store = ok(archive.runtime.block_on(FsStore::open(archive.dir.path().join("repository")))); // another process
    archive.repository =
        ok(archive.runtime.block_on(Repository::open("main", Arc::new(store), archive.key.write_only())));
    let archiver = archive.start(&pg);
    let to = flushed(&pg);
    let mut last = String::new();
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(15) && archiver.durable() < to && !archiver.task.is_finished() {
        let now = format!("{:?}", *archiver.seen.borrow());
        if now != last {
            println!("{now}");
            last = now;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("finished: {}, durable {} of {to}", archiver.task.is_finished(), archiver.durable());
    if archiver.task.is_finished() {
        println!("{}", archiver.error(&archive));
        panic!("died");
    }
    assert!(archiver.durable() >= to);
}

#[test]
fn a_write_only_archiver_follows_a_promotion() {
    let archive = write_only_archive();
    let pg = TestPg::start_segmented(any_major(), 1, "wal_keep_size = 1GB\n");
    pg.sql("CREATE TABLE t (g int)");
    let mut standby = standby_of(&pg, any_major());
    let archiver = archive.start(&standby);
    pg.sql("INSERT INTO t SELECT generate_series(1, 50000)");
    archiver.wait_durable(flushed(&pg));
    ok(standby.promote());
    standby.sql("INSERT INTO t SELECT generate_series(1, 50)");
    let since = Instant::now();
    let (mut last, mut changes) = (String::new(), 0);
    while since.elapsed() < Duration::from_secs(15) {
        let now = match &*archiver.seen.borrow() {
            ClusterStatus::Streaming(p) => format!("streaming {}", p.branch),
            other => format!("{other:?}"),
        };
        if now != last {
            changes += 1;
            if changes < 12 {
                println!("{now}");
            }
            last = now;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    for (name, len) in archive.objects() {
        println!("{name} {len}");
    }
    println!("{changes} changes of status; finished {}", archiver.task.is_finished());
    if archiver.task.is_finished() {
        println!("ERROR {}", archiver.error(&archive));
        panic!();
    }
    let n = archive.objects().iter().filter(|(name, _)| name.contains("/open/")).count();
    println!("after 15 s: {:?}, {n} open pieces", *archiver.seen.borrow());
    assert!(
        archive.objects().iter().any(|(name, _)| name.contains("/00000002/")),
        "never followed the promotion; {n} open pieces"
    );
}

#[test]
fn p3_wal_lost_across_a_failover_is_a_gap_on_both_timelines() {
    let archive = Archive::new();
    let pg = TestPg::start_segmented(any_major(), 1, "wal_keep_size = 0\nmin_wal_size = 2MB\nmax_wal_size = 4MB\n");
    pg.sql("CREATE TABLE t (g int, f text)");
    let mut standby = standby_of(&pg, any_major());
    let archiver = archive.start(&pg);
    archiver.wait_durable(flushed(&pg));
    archiver.stop(&archive);
    pg.sql("INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(1, 9000) g");
    let at = flushed(&pg);
    wait_until("replay", SOON, || lsn(&standby.sql("SELECT pg_last_wal_replay_lsn()")) >= at);
    ok(standby.promote());
    for _ in 0..5 {
        standby.sql("INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(1, 9000) g");
        standby.sql("CHECKPOINT");
    }
    // a daemon that had streamed before would go on trying; a fresh one:
    for round in 0..3 {
        let archiver = archive.start(&standby);
        let to = flushed(&standby);
        let since = Instant::now();
        let mut last = String::new();
        while since.elapsed() < Duration::from_secs(6) && archiver.durable() < to && !archiver.task.is_finished() {
            let now = format!("{:?}", *archiver.seen.borrow());
            if now != last && now.contains("Wait") {
                println!("{round}: {now}");
                last = now;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let done = archiver.durable() >= to;
        println!("round {round}: finished {}, durable {} of {to}", archiver.task.is_finished(), archiver.durable());
        if archiver.task.is_finished() {
            println!("   error: {}", archiver.error(&archive));
        } else {
            archiver.kill(&archive);
            std::thread::sleep(Duration::from_millis(300));
        }
        let inventory = ok(archive.runtime.block_on(archive.repository.load(&archive.id())));
        println!("   gaps {:?}", inventory.gaps.iter().map(|g| (g.branch, g.from, g.to)).collect::<Vec<_>>());
        if done {
            return;
        }
    }
    panic!("archiving never goes on after the failover");
}

#[test]
fn a_second_archiver_is_not_refused_because_the_first_goes_on() {
    let archive = Archive::new();
    let pg = TestPg::start(any_major(), "");
    pg.sql("CREATE TABLE t (g int, f text)");
    let sync = ArchiveOptions { synchronous: true, ..options() };
    let first = archive.start_with(&pg, sync);
    first.wait_durable(flushed(&pg));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (stop, pg) = (&stop, &pg);
    std::thread::scope(|scope| {
        scope.spawn(move || while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            pg.sql("DO $$BEGIN FOR i IN 1..2000 LOOP INSERT INTO t VALUES (i, repeat('x', 300)); COMMIT; END LOOP; END$$");
        });
        std::thread::sleep(Duration::from_secs(1));
        let second = archive.start_with(pg, sync);
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(20) && !second.task.is_finished() {
            std::thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        if second.task.is_finished() {
            panic!("the second archiver ended for good after {:?}: {}", since.elapsed(), second.error(&archive));
        }
        println!("{:?}", *second.seen.borrow());
    });
}

#[test]
fn a_standby_behind_the_archive_is_waited_for() {
    let archive = Archive::new();
    let mut pg = TestPg::start(any_major(), "");
    pg.sql("CREATE TABLE t (g int)");
    let mut standby = standby_of(&pg, any_major());
    let archiver = archive.start(&pg);
    ok(standby.stop(StopMode::Fast));
    pg.sql("INSERT INTO t SELECT generate_series(1, 1000)");
    archiver.wait_durable(flushed(&pg));
    archiver.stop(&archive);
    ok(pg.kill()); // the primary is lost
    ok(standby.start());
    let archiver = archive.start(&standby);
    std::thread::sleep(Duration::from_secs(5));
    println!("{:?}", *archiver.seen.borrow());
    if archiver.task.is_finished() {
        panic!("ended for good before the promotion: {}", archiver.error(&archive));
    }
    ok(standby.promote());
    archiver.wait_durable(flushed(&standby));
}

#[test]
fn what_worked_once_is_tried_again() {
    let archive = Archive::new();
    let pg = TestPg::start(any_major(), "");
    pg.sql("CREATE TABLE t (g int)");
    let archiver = archive.start(&pg);
    archiver.wait_durable(flushed(&pg));
    for (name, _) in archive.objects() {
        if name.contains("/open/") {
            std::fs::remove_file(archive.dir.path().join("repository").join(name)).unwrap();
        }
    }
    pg.sql("INSERT INTO t SELECT generate_series(1, 1000)");
    std::thread::sleep(Duration::from_secs(4));
    if archiver.task.is_finished() {
        panic!("ended for good though it had streamed: {}", archiver.error(&archive));
    }
    archiver.wait_durable(flushed(&pg));
}

#[test]
fn an_ancestors_history_file_that_the_server_lost_is_derived() {
    let archive = Archive::new();
    let mut pg = TestPg::start(any_major(), "");
    pg.sql("CREATE TABLE t (g int)");
    for _ in 0..3 {
        ok(pg.stop(StopMode::Fast));
        std::fs::write(pg.data_dir().join("standby.signal"), "").unwrap();
        ok(pg.start());
        ok(pg.promote());
        pg.sql("INSERT INTO t VALUES (1)");
    }
    let archiver = archive.start(&pg);
    archiver.wait_durable(flushed(&pg));
    archiver.stop(&archive);
    // As on a node that was made with pg_basebackup on timeline 4.
    for old in ["00000002.history", "00000003.history"] {
        std::fs::remove_file(pg.data_dir().join("pg_wal").join(old)).unwrap();
    }
    let archiver = archive.start(&pg);
    pg.sql("INSERT INTO t VALUES (1)");
    std::thread::sleep(Duration::from_secs(3));
    if archiver.task.is_finished() {
        panic!("{}", archiver.error(&archive));
    }
    archiver.wait_durable(flushed(&pg));
}

#[test]
fn a_refused_server_gets_no_slot() {
    let archive = Archive::new();
    let pg = TestPg::start(any_major(), "");
    let archiver = archive.start(&pg);
    archiver.wait_durable(lsn("0/1"));
    archiver.stop(&archive);
    let other = TestPg::start(any_major(), "");
    let error = archive.start(&other).error(&archive);
    println!("{error}");
    assert_eq!(other.sql("SELECT slot_name, restart_lsn, active FROM pg_replication_slots"), "");
}

#[test]
fn p3_two_gaps_in_a_row() {
    use pgkeep::catalog::inventory::{Run, frontier};
    use pgkeep::catalog::records::{GapReason, GapRecord};
    let branch = Branch::first(TimelineId::FIRST);
    let gap = |from, to| GapRecord {
        branch,
        from: Lsn::new(from),
        to: Lsn::new(to),
        reason: GapReason::Recycled,
        noticed_at: jiff::Timestamp::UNIX_EPOCH,
        writer: pgkeep::types::Id128::new([0; 16]),
    };
    let runs = [Run { from: Lsn::new(0), to: Lsn::new(40) }, Run { from: Lsn::new(60), to: Lsn::new(90) }];
    assert_eq!(frontier(branch, &runs, &[gap(40, 50), gap(50, 60)]), Some(Lsn::new(90)));
}

#[test]
fn a_stop_with_the_storage_down_is_no_success() {
    let mut faults = None;
    let archive = Archive::over(|store| {
        let faulty = Arc::new(Faulty::new(store, FaultPlan::none(), 7));
        faults = Some(Arc::clone(&faulty));
        faulty
    });
    let faults = faults.unwrap();
    let pg = TestPg::start(any_major(), "");
    let archiver = archive.start_with(&pg, ArchiveOptions { max_delay: Duration::from_secs(600), ..options() });
    pg.sql("CREATE TABLE t (g int)");
    wait_until(
        "stream",
        SOON,
        || matches!(&*archiver.seen.borrow(), ClusterStatus::Streaming(p) if p.received > lsn("0/1")),
    );
    std::thread::sleep(Duration::from_secs(1));
    faults.set_plan(FaultPlan { tails: true, before: 1.0, ..FaultPlan::none() });
    archiver.stop.cancel();
    let ended = archive.runtime.block_on(archiver.task).unwrap();
    println!("{ended:?}");
    assert!(ended.is_err(), "what was received is not durable, and the stop is called a success");
}

#[test]
fn a_damaged_history_file_does_not_stop_archiving() {
    let archive = Archive::new();
    let mut pg = TestPg::start(any_major(), "");
    pg.sql("CREATE TABLE t (g int)");
    ok(pg.stop(StopMode::Fast));
    std::fs::write(pg.data_dir().join("standby.signal"), "").unwrap();
    ok(pg.start());
    ok(pg.promote());
    let archiver = archive.start(&pg);
    archiver.wait_durable(flushed(&pg));
    archiver.stop(&archive);
    let (name, _) = archive.objects().into_iter().find(|(name, _)| name.ends_with(".history")).unwrap();
    let path = archive.dir.path().join("repository").join(name);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let archiver = archive.start(&pg);
    std::thread::sleep(Duration::from_secs(3));
    if archiver.task.is_finished() {
        panic!("{}", archiver.error(&archive));
    }
}

#[test]
fn a_repository_that_comes_back_is_used_again() {
    let archive = Archive::new();
    let pg = TestPg::start(any_major(), "");
    pg.sql("CREATE TABLE t (g int)");
    let archiver = archive.start(&pg);
    archiver.wait_durable(flushed(&pg));
    let root = archive.dir.path().join("repository");
    let away = archive.dir.path().join("away");
    std::fs::rename(&root, &away).unwrap();
    pg.sql("INSERT INTO t VALUES (1)");
    std::thread::sleep(Duration::from_secs(3));
    assert!(std::process::Command::new("cp").arg("-a").arg(&away).arg(&root).status().unwrap().success());
    let to = flushed(&pg);
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(25) && archiver.durable() < to {
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("{:?}", *archiver.seen.borrow());
    assert!(
        archiver.durable() >= to,
        "the same repository on another file system (NFS, replaced disk) is never taken again without a restart"
    );
}

#[test]
fn a_write_only_archiver_survives_a_server_restart() {
    let archive = write_only_archive();
    let mut pg = TestPg::start(any_major(), "");
    let archiver = archive.start(&pg);
    pg.sql("CREATE TABLE t (g int)");
    archiver.wait_durable(flushed(&pg));
    ok(pg.kill());
    ok(pg.start());
    pg.sql("INSERT INTO t VALUES (1)");
    let (to, since) = (flushed(&pg), Instant::now());
    while since.elapsed() < Duration::from_secs(15) && archiver.durable() < to && !archiver.task.is_finished() {
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("{:?}", *archiver.seen.borrow());
    if archiver.task.is_finished() {
        panic!("ended for good: {}", archiver.error(&archive));
    }
    assert!(archiver.durable() >= to);
}

/// A record that goes on over a whole segment behind the removed one: is anything acknowledged before it is durable?
#[test]
fn a_fork_before_the_archive_begins() {
    let archive = Archive::new();
    let mut pg = TestPg::start_segmented(any_major(), 1, "wal_keep_size = 1GB\n");
    pg.sql("CREATE TABLE t (g int, f text)");
    let mut standby = standby_of(&pg, any_major());
    pg.sql("INSERT INTO t VALUES (7)");
    let at = flushed(&pg);
    wait_until("replay", SOON, || lsn(&standby.sql("SELECT pg_last_wal_replay_lsn()")) >= at);
    ok(standby.stop(StopMode::Fast));
    pg.sql("INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(1, 9000) g");
    pg.sql("CHECKPOINT");
    let archiver = archive.start(&pg);
    pg.sql("INSERT INTO t VALUES (1)");
    archiver.wait_durable(flushed(&pg));
    archiver.stop(&archive);
    ok(pg.kill());
    ok(standby.start());
    ok(standby.promote());
    standby.sql("INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(1, 20000) g");
    println!("fork {}", std::fs::read_to_string(standby.data_dir().join("pg_wal/00000002.history")).unwrap());
    let i = ok(archive.runtime.block_on(archive.repository.load(&archive.id())));
    println!("T1 {:?}", i.branches.values().next().unwrap().runs(SegmentSize::new(1 << 20).unwrap()));
    let archiver = archive.start(&standby);
    let (to, since) = (flushed(&standby), Instant::now());
    while since.elapsed() < Duration::from_secs(15) && archiver.durable() < to && !archiver.task.is_finished() {
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("{:?}", *archiver.seen.borrow());
    if archiver.task.is_finished() {
        panic!("ended for good: {}", archiver.error(&archive));
    }
    assert!(archiver.durable() >= to);
}

/// Memory of a restart in the middle of a segment of 1 GB.
#[test]
fn p8_memory_of_a_resume_in_a_large_segment() {
    let archive = Archive::new();
    let pg =
        TestPg::start_segmented(any_major(), 1024, "max_wal_size = 4GB\nmin_wal_size = 2GB\nfull_page_writes=off\n");
    let archiver = archive.start(&pg);
    for _ in 0..6 {
        pg.sql("CREATE TABLE IF NOT EXISTS t (g int, f text); INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(1, 280000) g; TRUNCATE t");
    }
    let to = flushed(&pg);
    wait_until("durable", Duration::from_secs(120), || archiver.durable() >= to);
    archiver.kill(&archive);
    let hwm = || {
        std::fs::read_to_string("/proc/self/status")
            .unwrap()
            .lines()
            .find(|l| l.starts_with("VmHWM"))
            .unwrap()
            .to_owned()
    };
    println!("at {to}; archiving: {}", hwm());
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let since = Instant::now();
    println!("resume {:?} in {:?}: {}", archive.frontier(1), since.elapsed(), hwm());
    let archiver = archive.start(&pg);
    pg.sql("INSERT INTO t VALUES (1)");
    let to = flushed(&pg);
    wait_until("durable", Duration::from_secs(120), || archiver.durable() >= to);
    println!("caught up after {:?}: {}", since.elapsed(), hwm());
}
