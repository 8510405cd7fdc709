//! Buckets and a directory as the repositories of one cluster, end to end, by the program as it is typed: buckets fail by
//! seed while clients commit and the archiver is killed; a bucket is down for long under load; a bucket goes down in the
//! middle of a restore; copies to and from a bucket that overwrites. The S3 servers are in this process.
//!
//! `PGKEEP_SEED` chooses the seed; a failure prints it.

#[path = "support/s3/mod.rs"]
mod s3;
#[path = "support/stores.rs"]
mod stores;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgkeep::catalog::records::WalRangeNote;
use pgkeep::pg::instance::StopMode;
use pgkeep::types::{Branch, Digest, Lsn, SegmentNumber, SegmentSize, TimelineId};
use s3::{Conditional, S3Faults, TestS3, TestS3Options};
use stores::{At, Clients, Random, SOON, Stores};
use support::rig::dump;
use support::{TestPg, any_major, ok, wait_until};

const MIB: u64 = 1 << 20;
/// Segments of 1 MiB, and the server keeps nothing that no slot asks for: what a repository missed comes from another one.
const FORGETFUL: &str = "wal_keep_size = 0\nmin_wal_size = 2MB\nmax_wal_size = 8MB\n";

fn server(conditional: Conditional) -> TestS3 {
    TestS3::start(TestS3Options { conditional, multipart_conditional: conditional, ..TestS3Options::default() })
}

fn flushed(pg: &TestPg) -> Lsn {
    pg.sql("SELECT pg_current_wal_flush_lsn()").parse().unwrap()
}

fn slot(pg: &TestPg) -> Lsn {
    pg.sql("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'pgkeep'").parse().unwrap()
}

/// How a repository fails.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Down,
    Frozen,
    Throttled,
    AnswersLost,
    Slow,
}

impl Fault {
    fn any(random: &mut Random) -> Fault {
        [Fault::Down, Fault::Frozen, Fault::Throttled, Fault::AnswersLost, Fault::Slow][random.below(5) as usize]
    }

    fn set(self, s3: &TestS3, on: bool, seed: u64) {
        match self {
            Fault::Down => s3.down(on),
            Fault::Frozen => s3.freeze(on),
            Fault::Throttled => s3.refuse(on.then_some((503, "SlowDown"))),
            Fault::AnswersLost => s3.lose_answers_of(on.then_some("PutObject")),
            Fault::Slow => {
                let slow = S3Faults { slow: 1.0, longest: Duration::from_millis(800), ..S3Faults::network(0.1) };
                s3.set_faults(if on { slow } else { S3Faults::none() }, seed);
            }
        }
    }
}

const ALL: [&str; 3] = ["one", "two", "dir"];

/// Clients commit; one of three repositories after the other fails; the archiver is killed in the middle of it. What the
/// server was told, and what clients were told where they wait for it, is in two of the three, at every kill. In the end
/// each of them alone gives the cluster back.
#[test]
fn p1_two_buckets_and_a_directory_fail_by_seed_and_each_alone_gives_everything_back() {
    let (seed, mut random) = Random::seeded();
    let synchronous = seed % 2 == 1;
    let second = [Conditional::Atomic, Conditional::Ignored][random.below(2) as usize];
    let realm = random.below(2) as usize;
    eprintln!("synchronous: {synchronous}; conditional create at the second: {second:?}; its realm: {realm}");
    let installation = any_major();
    let mut pg = TestPg::start_segmented(installation, 1, FORGETFUL);
    pg.sql("CREATE TABLE judged (id bigint, filler text)");
    let (one, two) = (server(Conditional::Atomic), server(second));
    let places = [("one", At::Bucket(&one), 0), ("two", At::Bucket(&two), realm), ("dir", At::Directory, 0)];
    let mut stores = Stores::new(&pg, &places);
    stores.receives(&ALL, &format!("acknowledge = 2\nmax_delay = \"100ms\"\nsynchronous = {synchronous}"));
    stores.start();
    stores.done(&["backup"]);
    stores.assert_whole(&ALL, 1);
    if synchronous {
        pg.sql("ALTER SYSTEM SET synchronous_standby_names = 'pgkeep'");
        ok(pg.reload());
        wait_until("commits to wait", SOON, || pg.sql("SELECT sync_state FROM pg_stat_replication") == "sync");
    }
    let began = Instant::now();
    let clients = Clients::start(&pg, 4);
    let mut told = Lsn::ZERO;
    for round in 0..4 {
        let (victim, fault) = (ALL[random.below(3) as usize], Fault::any(&mut random));
        let set = |stores: &Stores<'_>, on: bool| match victim {
            "one" => fault.set(&one, on, seed),
            "two" => fault.set(&two, on, seed),
            directory => stores.away(directory, on),
        };
        set(&stores, true);
        random.pause(200, 2500);
        if random.below(2) == 0 {
            pg.sql("SELECT pg_switch_wal()");
        }
        stores.kill();
        // While nobody is there to notice, all three can be asked what they hold.
        set(&stores, false);
        let (now, noted) = (slot(&pg), clients.noted());
        let held = stores.frontiers();
        let mut ends: Vec<Lsn> = held.values().copied().collect();
        ends.sort();
        assert_eq!(ends.len(), 3, "seed {seed}: {held:?}");
        eprintln!("{:?}: {victim} {fault:?}, slot {now}, {held:?}, {} commits", began.elapsed(), noted.len());
        assert!(ends[1] >= now, "seed {seed}, round {round}: the server was told {now}, {held:?}");
        assert!(now >= told, "seed {seed}, round {round}: the slot went back from {told} to {now}");
        told = now;
        if synchronous && let Some(newest) = noted.values().max() {
            assert!(ends[1] >= *newest, "seed {seed}, round {round}: clients were told {newest}, {held:?}");
        }
        let goes_on = random.below(2) == 0;
        if goes_on {
            set(&stores, true);
        }
        stores.start();
        random.pause(100, 2500);
        if goes_on {
            set(&stores, false);
        }
        random.pause(0, 500);
        stores.assert_runs();
    }
    let noted = clients.finish();
    assert!(noted.len() > 100, "seed {seed}: only {} commits: nothing was shown", noted.len());
    pg.sql("SELECT pg_switch_wal()");
    let end = flushed(&pg);
    eprintln!("{:?}: the load is over at {end}, {} commits", began.elapsed(), noted.len());
    stores.wait_held(&ALL, end);
    eprintln!("{:?}: all hold everything", began.elapsed());
    stores.stop();
    stores.assert_whole(&ALL, 1);
    let source = dump(&pg);
    for name in ALL {
        let restored = stores.restored_alone(installation, name);
        assert!(dump(&restored) == source, "seed {seed}: what {name} gives back is not the source");
        let ids = restored.sql("SELECT id FROM judged");
        let ids: BTreeSet<u64> = ids.lines().map(|id| id.parse().unwrap()).collect();
        let lost: Vec<&u64> = noted.keys().filter(|id| !ids.contains(id)).collect();
        assert!(lost.is_empty(), "seed {seed}: {name} lost {lost:?}");
        eprintln!("{:?}: {name} gives the cluster back", began.elapsed());
    }
}

/// WAL that does not compress: some 8 MB with each call, or less.
struct Load<'a>(&'a TestPg);

impl<'a> Load<'a> {
    fn new(pg: &'a TestPg) -> Load<'a> {
        pg.sql(
            "CREATE TABLE pool AS SELECT g, (SELECT string_agg(md5(random()::text || s), '') \
             FROM generate_series(1, 50) s WHERE g > 0) AS filler FROM generate_series(1, 5000) g; CREATE TABLE t (LIKE pool)",
        );
        Load(pg)
    }

    fn write(&self, rows: u32) {
        self.0.sql(&format!("INSERT INTO t SELECT * FROM pool WHERE g <= {rows}; TRUNCATE t"));
    }
}

/// How much WAL the server has that the slot does not know to be archived.
fn distance(pg: &TestPg) -> u64 {
    pg.sql("SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), restart_lsn)::bigint FROM pg_replication_slots")
        .parse()
        .unwrap()
}

#[test]
fn p8_a_bucket_that_is_down_under_load_costs_no_memory_and_is_caught_up_with() {
    const DEADLINE: Duration = Duration::from_secs(3);
    let s3 = server(Conditional::Atomic);
    let mut pg = TestPg::start(any_major(), "wal_keep_size = 8GB\nmax_wal_size = 4GB\nfull_page_writes = off\n");
    let load = Load::new(&pg);
    let mut stores = Stores::new(&pg, &[("main", At::Bucket(&s3), 0)]);
    stores.receives(&["main"], &format!("max_delay = \"200ms\"\nshutdown_deadline = \"{}s\"", DEADLINE.as_secs()));
    stores.start();
    load.write(5000);
    let to = flushed(&pg);
    stores.wait_held(&["main"], to);
    let usual = stores.memory("VmHWM");

    // Half a minute of it, eight seconds of each kind.
    let (began, from) = (Instant::now(), flushed(&pg));
    let (kinds, mut writes) = ([Fault::Down, Fault::Frozen, Fault::Throttled], 0);
    for (number, kind) in kinds.into_iter().enumerate() {
        kind.set(&s3, true, 0);
        while began.elapsed() < Duration::from_secs(8) * (number as u32 + 1) {
            load.write(5000);
            writes += 1;
            // As much as an unoptimised build archives again in a bearable time.
            std::thread::sleep((Duration::from_millis(560) * writes).saturating_sub(began.elapsed()));
        }
        if number + 1 < kinds.len() {
            kinds[number + 1].set(&s3, true, 0);
            kind.set(&s3, false, 0);
        }
    }
    stores.assert_runs();
    let written = flushed(&pg).bytes_since(from).unwrap();
    let (peak, now) = (stores.memory("VmHWM"), stores.memory("VmRSS"));
    eprintln!(
        "{} MiB of WAL in {:?}; memory {usual} MiB before, {now} now, {peak} at most",
        written / MIB,
        began.elapsed()
    );
    assert!(written > 15 * 16 * MIB, "too little WAL to show anything: {written} bytes");
    assert!(peak < 200, "{peak} MiB of memory");
    assert!(distance(&pg) + 64 * MIB > written, "the server keeps what is not archived");

    // A fast shutdown in the middle of it.
    let stopping = Instant::now();
    ok(pg.stop(StopMode::Fast));
    let took = stopping.elapsed();
    assert!(took < DEADLINE + Duration::from_secs(25), "the shutdown took {took:?}");
    ok(pg.start());
    eprintln!("the shutdown took {took:?}");

    // It is back, and the load goes on.
    let load = Load(&pg);
    let (behind, back, at_back) = (distance(&pg), Instant::now(), flushed(&pg));
    kinds[2].set(&s3, false, 0);
    let caught_up = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            while !caught_up.load(Ordering::Relaxed) && back.elapsed() < 2 * SOON {
                load.write(250);
                std::thread::sleep(Duration::from_millis(300));
            }
        });
        while distance(&pg) > 32 * MIB && back.elapsed() < 2 * SOON {
            std::thread::sleep(Duration::from_millis(20));
        }
        caught_up.store(true, Ordering::Relaxed);
        writing.join().unwrap();
    });
    let (left, meanwhile) = (distance(&pg), flushed(&pg).bytes_since(at_back).unwrap());
    let archived = behind + meanwhile - left;
    eprintln!(
        "{} MiB behind, {} MiB more came in, {} MiB archived in {:?}; {} MiB of memory at most",
        behind / MIB,
        meanwhile / MIB,
        archived / MIB,
        back.elapsed(),
        stores.memory("VmHWM")
    );
    assert!(left < 64 * MIB && meanwhile > 0 && archived > meanwhile, "{left} bytes behind, {meanwhile} more came");
    // Four segments under way, as they came and sealed, and the one that comes in.
    assert!(stores.memory("VmHWM") < 256, "{} MiB of memory while catching up", stores.memory("VmHWM"));

    // Nothing is lost: every byte is the server's.
    let end = flushed(&pg);
    stores.wait_held(&["main"], end);
    stores.stop();
    stores.assert_whole(&["main"], 0);
    let size = SegmentSize::new(16 * MIB).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let main = stores.open("main").await;
        let id = ok(main.clusters().await).remove(0);
        let branch = Branch::first(TimelineId::FIRST);
        let (mut segment, mut compared) = (from.segment(size), 0);
        while segment.start(size) < end {
            let name = segment.file_name(TimelineId::FIRST, size);
            let theirs = ok(std::fs::read(pg.data_dir().join("pg_wal").join(&name)));
            let ours = ok(main.read_segment(&id, branch, segment, size, None).await).bytes;
            let wanted = end.bytes_since(segment.start(size)).unwrap().min(size.bytes()) as usize;
            assert!(ours.len() >= wanted && ours[..wanted] == theirs[..wanted], "{name} is archived with other bytes");
            (segment, compared) = (segment.next(), compared + 1);
        }
        assert!(compared > 15, "only {compared} segments");
    });
}

/// Whenever the bucket that was planned with goes down, the restore ends well; recovery then takes its WAL from whoever has
/// it, and waits for one that is down rather than ending without what only that one has.
#[test]
fn p2_p7_a_bucket_that_goes_down_in_the_middle_of_a_restore_is_replaced() {
    let (seed, mut random) = Random::seeded();
    let installation = any_major();
    let pg = TestPg::start_segmented(installation, 1, "");
    pg.sql("CREATE TABLE log (id int PRIMARY KEY, filler text)");
    let (one, two) = (server(Conditional::Atomic), server(Conditional::Atomic));
    let places = [("one", At::Bucket(&one), 0), ("two", At::Bucket(&two), 1), ("dir", At::Directory, 0)];
    let mut stores = Stores::new(&pg, &places);
    stores.receives(&ALL, "acknowledge = 2\nmax_delay = \"100ms\"");
    stores.start();
    let work = |from: u32| {
        pg.sql(&format!(
            "INSERT INTO log SELECT n, md5(n::text) || repeat('x', 200) FROM generate_series({from}, {from} + 9999) n"
        ));
        flushed(&pg)
    };
    work(0);
    stores.done(&["backup"]);
    let shared = work(10_000);
    stores.wait_held(&ALL, shared);
    // The directory lacks the end: it is cheaper, and never chosen for `latest`.
    stores.away("dir", true);
    let end = work(20_000);
    stores.wait_held(&["one", "two"], end);
    stores.stop();
    stores.away("dir", false);
    let source = dump(&pg);
    drop(pg);
    let plan = stores.json(&["plan", "--to", "latest"]);
    assert_eq!(plan["from"]["repository"], "one", "{plan}");

    let before = one.count("GetObject");
    stores.restore("latest", "quiet", &[]).exits(0);
    let all = one.count("GetObject") - before;
    assert!(all > 6, "only {all} requests: nothing can be shown");
    // From the reading of names on, to almost the end; no two restores ask exactly the same.
    let moments = [all / 4, all / 2, all * 3 / 4, random.below(all), all - all / 8 - 1];
    let mut taken_over = 0;
    for (number, after) in moments.into_iter().enumerate() {
        one.down(false); // since the restore before
        one.go_down_after("GetObject", after);
        let restored = stores.restore("latest", &format!("moment-{number}"), &[]).exits(0);
        taken_over += u32::from(restored.all().contains("another took over"));
    }
    assert!(taken_over > 0, "seed {seed}: of {all} requests none was one of the restore itself: {moments:?}");
    // Down it is from here on. The newest WAL is in the other bucket alone.
    one.down(true);
    let restored = stores.started(installation, &format!("moment-{}", moments.len() - 1));
    assert!(dump(&restored) == source, "seed {seed}");
    drop(restored);

    // Nobody who has the end answers: recovery stops, and goes on when one does.
    two.down(true);
    let quiet = stores.path("quiet");
    let mut stopped = TestPg::attach(installation, &quiet);
    let _ = stopped.start(); // whether it is noticed in time that it ends
    wait_until("recovery to stop", SOON, || !stopped.is_running());
    let said = stopped.log();
    assert!(!said.contains("recovery stopping"), "seed {seed}: it went without its end:\n{said}");
    drop(stopped);
    two.down(false);
    let restored = stores.started_again(installation, "quiet");
    assert!(dump(&restored) == source, "seed {seed}");
}

/// Names as they would be where nothing is overwritten, and how often each is there.
fn copies(s3: &TestS3) -> BTreeMap<String, usize> {
    let mut copies = BTreeMap::new();
    for name in s3.objects().into_keys().filter(|name| !name.contains("/open/")) {
        let plain = name.split_once('~').map_or(name.as_str(), |(plain, _)| plain);
        *copies.entry(plain.to_owned()).or_default() += 1;
    }
    copies
}

#[test]
fn p6_copies_to_and_from_a_bucket_that_overwrites() {
    for realm in [0, 1] {
        copies_with_realm(realm);
    }
}

fn copies_with_realm(realm: usize) {
    let installation = any_major();
    let pg = TestPg::start_segmented(installation, 1, FORGETFUL);
    pg.sql("CREATE TABLE log (id int PRIMARY KEY, filler text)");
    let (weak, taken) = (server(Conditional::Ignored), server(Conditional::Ignored));
    let places = [
        ("main", At::Directory, 0),
        ("weak", At::Bucket(&weak), realm),
        ("back", At::Directory, 0),
        ("taken", At::Bucket(&taken), realm),
    ];
    let mut stores = Stores::new(&pg, &places);
    stores.receives(&["main"], "max_delay = \"100ms\"");
    stores.start();
    let work = |from: u32| {
        pg.sql(&format!("INSERT INTO log SELECT n, repeat('x', 300) FROM generate_series({from}, {from} + 9999) n"));
        pg.sql("CHECKPOINT");
        flushed(&pg)
    };
    work(0);
    stores.done(&["backup"]);
    let to = work(10_000);
    stores.wait_held(&["main"], to);

    // Copied, and again and again: what is found again is not stored again.
    stores.assert_whole(&["main"], 1);
    stores.stop();
    let copy = |stores: &Stores<'_>, from: &str, to: &str| stores.json(&["copy", "--from", from, "--to", to, "--all"]);
    let first = copy(&stores, "main", "weak");
    assert_eq!((&first["complete"], &first["result"]["backups"]), (&true.into(), &1.into()), "{first}");
    let names: Vec<String> = weak.objects().into_keys().collect();
    assert!(names.iter().filter(|name| name.contains("/wal/")).all(|name| name.contains('~')), "{names:?}");
    for _ in 0..2 {
        let again = copy(&stores, "main", "weak");
        assert_eq!((&again["complete"], &again["result"]["bytes"]), (&true.into(), &0.into()), "{again}");
        assert_eq!(weak.objects().into_keys().collect::<Vec<_>>(), names, "what is there is not stored again");
    }

    // Filled up by `run` after it was away, across kills.
    stores.receives(&["main", "weak"], "acknowledge = 1\nmax_delay = \"100ms\"");
    weak.down(true);
    stores.start();
    for from in [20_000, 30_000] {
        let to = work(from);
        stores.wait_held(&["main"], to);
        stores.kill();
        stores.start();
    }
    weak.down(false);
    let to = work(40_000);
    stores.wait_held(&["main", "weak"], to);
    for _ in 0..2 {
        stores.kill();
        stores.start();
        stores.wait_held(&["main", "weak"], work_one(&pg));
    }
    stores.stop();
    let several: Vec<_> =
        copies(&weak).into_iter().filter(|(name, count)| *count > 1 && name.contains("/wal/")).collect();
    assert!(several.is_empty(), "stored more than once: {several:?}");
    assert!(!copies(&weak).keys().any(|name| name.contains("/conflict/")), "{:?}", copies(&weak));
    stores.assert_whole(&["main", "weak"], 1);

    // And back; each of them alone gives the cluster back.
    assert_eq!(copy(&stores, "weak", "back")["complete"], true);
    let source = dump(&pg);
    for name in ["weak", "back"] {
        let restored = stores.restored_alone(installation, name);
        assert!(dump(&restored) == source, "realm {realm}: what {name} gives back is not the source");
    }
    another_history_is_refused(&mut stores, &taken, &pg);
}

fn work_one(pg: &TestPg) -> Lsn {
    pg.sql("UPDATE log SET filler = 'y' WHERE id = 1");
    flushed(pg)
}

/// A bucket that overwrites holds other bytes for a segment: neither a copy nor filling up puts anything there.
fn another_history_is_refused(stores: &mut Stores<'_>, taken: &TestS3, pg: &TestPg) {
    let size = SegmentSize::new(MIB).unwrap();
    let branch = Branch::first(TimelineId::FIRST);
    let strange = tokio::runtime::Runtime::new().unwrap().block_on(async {
        let (main, target) = (stores.open("main").await, stores.open("taken").await);
        let cluster = ok(main.clusters().await).remove(0);
        let inventory = ok(main.load(&cluster).await);
        let segment = SegmentNumber::new(inventory.branches[&branch].pieces[0].segment.get() + 1);
        let bytes = vec![7; MIB as usize];
        let mut sealer = ok(target.seal_wal(&cluster, branch, segment, size, (0, MIB as u32)).await);
        ok(sealer.push(&bytes));
        let note = WalRangeNote {
            writer: target.writer(),
            server_version: 150_000,
            segment_size: size,
            digest_from: Digest::of(b""),
            digest_to: Some(Digest::of(&bytes)),
            server_time: None,
            server_end: None,
            durable_to: None,
            conflict: None,
        };
        ok(target.put_range(&ok(sealer.finish(MIB as u32, note))).await);
        segment.file_name(TimelineId::FIRST, size)
    });
    let wal = || taken.objects().into_iter().filter(|(name, _)| name.contains("/wal/") || name.contains("/backup/"));
    let before: Vec<_> = wal().collect();
    assert_eq!(before.len(), 1, "{before:?}");
    let refused = stores.ran(&["copy", "--from", "main", "--to", "taken", "--all"]).exits(4);
    assert!(refused.all().contains(&strange) && refused.all().contains("stays as it is"), "{}", refused.all());
    assert_eq!(wal().collect::<Vec<_>>(), before, "nothing of that branch was copied");

    stores.receives(&["main", "taken"], "acknowledge = 1\nmax_delay = \"100ms\"");
    stores.start();
    let to = work_one(pg);
    stores.wait_held(&["main"], to);
    wait_until("the other history to be noticed", SOON, || {
        stores.log().contains("nothing is put into this repository")
    });
    stores.stop();
    assert_eq!(wal().collect::<Vec<_>>(), before, "nothing was put beside the other history");
}
