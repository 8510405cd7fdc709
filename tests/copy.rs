//! Copying between repositories, by the program as it is typed, and restoring from the copy alone.
//!
//! `PGKEEP_SEED` chooses the seed of what is killed when; a failure prints it.

mod support;

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pgkeep::catalog::records::WalRangeNote;
use pgkeep::pg::instance::{Installation, give_to_server_user};
use pgkeep::types::{Branch, Digest, SegmentNumber, SegmentSize, TimelineId};
use support::rig::{Rig, SOON, dump, flip, next_second};
use support::{TestPg, any_major, for_each_major, ok};

/// What was archived, and what to compare with.
struct Archived {
    rig: Rig,
    /// The labels of the base backups.
    labels: Vec<String>,
    /// Instants: before anything, between the two base backups, after both.
    times: Vec<String>,
    /// The dump at the last of them.
    dump: String,
}

/// Two base backups, commits before, between and after; repository `copy` to be filled.
fn archived(installation: &Installation, mib: u64, same_realm: bool) -> Archived {
    let pg = TestPg::start_segmented(installation, mib, "");
    pg.sql("create table log (id int primary key, filler text)");
    let mut rig = Rig::new(&pg);
    rig.add("copy", same_realm);
    rig.start_archiver();
    let work = |from: u32| {
        pg.sql(&format!("insert into log select n, repeat('x', 200) from generate_series({from}, {from} + 3999) n"));
        pg.sql("select clock_timestamp()")
    };
    let mut times = vec![work(0)];
    let mut labels = Vec::new();
    for round in 1..3 {
        let taken = rig.json(&["backup", "--json"]);
        labels.push(taken["label"].as_str().expect("a label").to_owned());
        next_second(&pg);
        times.push(work(round * 10_000));
        next_second(&pg);
    }
    let xid = pg.sql("insert into log values (-1) returning pg_current_xact_id()");
    times.push(pg.sql("select clock_timestamp()"));
    rig.wait_for(&xid);
    rig.stop_archiver();
    let dump = dump(&pg);
    Archived { rig, labels, times, dump }
}

const COPY: [&str; 5] = ["copy", "--from", "main", "--to", "copy"];

fn copy<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&COPY[..], more].concat()
}

#[test]
fn all_is_copied_and_restored_from_the_copy_alone() {
    for_each_major(|installation| {
        for same_realm in if installation.major == any_major().major { vec![true, false] } else { vec![false] } {
            let Archived { rig, labels, times, dump: want } = archived(installation, 1, same_realm);
            rig.done(&["index", "rebuild", "--repository", "main"]);
            let first = rig.json(&copy(&["--all", "--json"]));
            assert_eq!(first["complete"], true, "{first}");
            assert_eq!(first["same_realm"], same_realm);
            assert_eq!(first["result"]["backups"], 2);
            assert!(first["result"]["segments"].as_u64().unwrap() > 3, "{first}");
            // Again: everything is there, nothing is put.
            let again = rig.json(&copy(&["--all", "--json"]));
            assert_eq!(again["complete"], true, "{again}");
            assert_eq!((&again["result"]["bytes"], &again["result"]["backups"]), (&0.into(), &0.into()), "{again}");
            let there = again["result"]["there"].as_u64().unwrap();
            assert!(there >= first["result"]["segments"].as_u64().unwrap(), "{again}");
            for path in rig.objects("main", &["/wal/"]) {
                let copy = rig.path("copy").join(path.strip_prefix(rig.path("main")).unwrap());
                assert_eq!(ok(fs::read(&path)) == ok(fs::read(copy)), same_realm, "{}", path.display());
            }
            // The index goes with its WAL, and the names: the copy tells the same.
            let log = |name: &str| rig.json(&["log", "--repository", name, "--cluster", "main", "--json"]);
            let (from_main, from_copy) = (log("main"), log("copy"));
            assert!(from_copy["indexed_bytes"].as_u64() > Some(1 << 20), "{from_copy}");
            assert_eq!(from_main["transactions"], from_copy["transactions"]);
            ok(fs::rename(rig.path("main"), rig.path("away")));
            let from_copy = ["--repository", "copy", "--cluster", "main"];
            let restored = rig.restored(installation, "latest", "latest", &from_copy);
            assert_eq!(dump(&restored), want);
            drop(restored);
            let between = [&from_copy[..], &["--backup", &labels[0]]].concat();
            let restored = rig.restored(installation, &times[1], "between", &between);
            assert_eq!(restored.sql("select count(*), max(id) from log"), "8000|13999");
        }
    });
}

#[test]
fn one_backup_with_its_wal_and_no_more() {
    for same_realm in [true, false] {
        let installation = any_major();
        let Archived { rig, labels, .. } = archived(installation, 1, same_realm);
        let dry = rig.run(&copy(&["--backup", &labels[0], "--dry-run"])).exits(0).says(&labels[0]);
        assert!(!dry.stdout.contains(&labels[1]), "{dry:?}");
        assert!(rig.objects("copy", &["/wal/"]).is_empty(), "nothing was copied");
        rig.done(&copy(&["--backup", &labels[0]]));
        assert!(rig.objects("copy", &["/wal/"]).len() < rig.objects("main", &["/wal/"]).len());
        assert!(rig.objects("copy", &[&labels[1]]).is_empty());
        let from_copy = ["--repository", "copy", "--cluster", "main"];
        let restored = rig.restored(installation, "immediate", "data", &from_copy);
        assert_eq!(restored.sql("select count(*), max(id) from log"), "4000|3999");
        // Then the rest, onto what is there.
        rig.done(&copy(&["--all"]));
        let restored = rig.restored(installation, "latest", "rest", &from_copy);
        assert_eq!(restored.sql("select count(*), min(id) from log"), "12001|-1");
        rig.run(&copy(&["--backup", "20200101T000000Z"])).exits(1).says("there is no complete base backup");
    }
}

#[test]
fn a_window_is_copied_and_each_of_its_instants_can_be_restored() {
    let installation = any_major();
    let Archived { rig, labels, times, .. } = archived(installation, 1, true);
    // It begins behind the first base backup, so that one is in it, and the second is not needed.
    let window = copy(&["--since", &times[1], "--until", &times[1]]);
    let plan = rig.json(&[&window[..], &["--dry-run", "--json"]].concat());
    let backups: Vec<&str> =
        plan["plan"]["steps"].as_array().unwrap().iter().filter_map(|s| s["label"].as_str()).collect();
    assert_eq!(backups, [labels[0].as_str()], "{plan}");
    rig.done(&window);
    ok(fs::rename(rig.path("main"), rig.path("away")));
    let restored = rig.restored(installation, &times[1], "data", &["--repository", "copy", "--cluster", "main"]);
    assert_eq!(restored.sql("select count(*), max(id) from log"), "8000|13999");
    ok(fs::rename(rig.path("away"), rig.path("main")));
    // From before the first base backup on: as far back as there is, and said.
    rig.run(&copy(&["--since", "2020-01-01T00:00:00Z"])).exits(1).says("reaches back to");
    rig.done(&copy(&["--all"]));
}

/// A running copy, killed when it has put so many objects.
fn killed_after(rig: &Rig, objects: usize, seed: u64) -> bool {
    let mut child: Child = ok(rig.command(&copy(&["--all", "-q"])).stdout(Stdio::null()).stderr(Stdio::null()).spawn());
    let (before, since) = (rig.objects("copy", &[]).len(), Instant::now());
    loop {
        if let Some(status) = ok(child.try_wait()) {
            assert!(status.success(), "seed {seed}: {status}");
            return false;
        }
        if rig.objects("copy", &[]).len() >= before + objects {
            ok(child.kill());
            ok(child.wait());
            return true;
        }
        assert!(since.elapsed() < SOON, "seed {seed}: the copy does not get on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whenever it is killed: what is listed in the target can be restored, and the next run goes on.
#[test]
fn p2_a_copy_that_is_killed_goes_on_where_it_was() {
    let seed = std::env::var("PGKEEP_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(4);
    for same_realm in [true, false] {
        let installation = any_major();
        let Archived { rig, dump: want, .. } = archived(installation, 1, same_realm);
        let (mut random, mut kills) = (Random(seed), 0);
        while kills < 8 && killed_after(&rig, 1 + usize::try_from(random.next() % 6).unwrap(), seed) {
            kills += 1;
            let list = rig.json(&["list", "--json", "--repository", "copy"]);
            for backup in list["clusters"][0]["backups"].as_array().into_iter().flatten() {
                assert_eq!(backup["usable"], true, "seed {seed}, kill {kills}: {list}");
            }
            assert!(list["clusters"][0]["damaged"].as_array().is_none_or(Vec::is_empty), "seed {seed}: {list}");
        }
        assert!(kills >= 3, "seed {seed}: only {kills} kills");
        let last = rig.json(&copy(&["--all", "--json"]));
        assert_eq!(last["complete"], true, "seed {seed}: {last}");
        ok(fs::rename(rig.path("main"), rig.path("away")));
        let restored = rig.restored(installation, "latest", "data", &["--repository", "copy", "--cluster", "main"]);
        assert_eq!(dump(&restored), want, "seed {seed}");
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

#[test]
fn p4_damage_in_the_source_is_named_and_the_rest_is_copied() {
    for same_realm in [true, false] {
        let installation = any_major();
        let Archived { rig, labels, dump: want, .. } = archived(installation, 1, same_realm);
        // What the second one stored: the first one's packs are in use by both.
        let pack = rig.objects("main", &["/pack/", &labels[1]]).first().expect("a pack").clone();
        // A segment that no base backup needs: the last complete one.
        let segment = rig.objects("main", &["/wal/0"]).last().expect("a segment").clone();
        let name = |path: &std::path::Path| path.file_name().unwrap().to_string_lossy().into_owned();
        flip(&pack, |len| len / 2);
        flip(&segment, |len| len / 2);
        let ran = rig.run(&copy(&["--all"])).exits(1);
        for named in [&format!("pack/{}/{}", labels[1], name(&pack)), &name(&segment)] {
            assert!(ran.stdout.contains(named.as_str()), "{named} is not named in {ran:?}");
        }
        let list = rig.json(&["list", "--json", "--repository", "copy"]);
        let there: Vec<&str> =
            list["clusters"][0]["backups"].as_array().unwrap().iter().filter_map(|b| b["label"].as_str()).collect();
        assert_eq!(there, [labels[0].as_str()], "the sound one alone: {list}");
        assert!(rig.objects("copy", &[&name(&segment)]).is_empty());
        // Mended, the rest follows.
        flip(&pack, |len| len / 2);
        flip(&segment, |len| len / 2);
        rig.done(&copy(&["--all"])).says("Copied 1 base backup, 1 segment");
        ok(fs::rename(rig.path("main"), rig.path("away")));
        let restored = rig.restored(installation, "latest", "data", &["--repository", "copy", "--cluster", "main"]);
        assert_eq!(dump(&restored), want);
    }
}

#[test]
fn p6_another_history_in_the_target_stays_and_nothing_is_mixed() {
    let installation = any_major();
    let Archived { rig, .. } = archived(installation, 1, true);
    let (main, target, cluster) = (rig.open("main"), rig.open("copy"), rig.cluster());
    let size = SegmentSize::new(1 << 20).unwrap();
    let branch = Branch::first(TimelineId::FIRST);
    let number = rig.block_on(async {
        let inventory = ok(main.load(&cluster).await);
        let first = inventory.branches[&branch].pieces[0].segment.get();
        // The second segment, of another server that calls itself the same.
        let segment = SegmentNumber::new(first + 1);
        let bytes = vec![7; 1 << 20];
        let mut sealer = ok(target.seal_wal(&cluster, branch, segment, size, (0, 1 << 20)).await);
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
        ok(target.put_range(&ok(sealer.finish(1 << 20, note))).await);
        segment
    });
    ok(give_to_server_user(&rig.path("copy")));
    let before = rig.objects("copy", &["/wal/"]);
    let ran = rig.run(&copy(&["--all"])).exits(4);
    let name = number.file_name(TimelineId::FIRST, size);
    assert!(ran.stdout.contains(&name) && ran.stdout.contains("stays as it is"), "{ran:?}");
    assert_eq!(rig.objects("copy", &["/wal/"]), before, "nothing of that branch was copied");
    assert!(rig.objects("copy", &["/manifest"]).is_empty(), "and no backup of it");

    // A server of another system identifier under the same name.
    let other = TestPg::start(installation, "");
    let mut strange = Rig::new(&other);
    strange.add("copy", true);
    let id = pgkeep::types::ClusterId { system: cluster.system, ..cluster.clone() };
    let (mine, theirs) = (strange.open("main"), strange.open("copy"));
    strange.block_on(async {
        let branch = Branch::first(TimelineId::new(2).unwrap());
        ok(mine.put_history(&id, branch, b"1\t0/5000000\tx\n").await);
        let elsewhere = pgkeep::types::ClusterId { system: pgkeep::types::SystemId::new(1), ..id.clone() };
        ok(theirs.put_history(&elsewhere, branch, b"1\t0/5000000\tx\n").await);
    });
    ok(give_to_server_user(strange.dir.path()));
    strange.run(&copy(&["--all"])).exits(4).says("another server");
}

#[test]
fn what_cannot_be_meant_is_refused_with_a_hint() {
    let installation = any_major();
    let pg = TestPg::start(installation, "");
    let mut rig = Rig::new(&pg);
    rig.add("copy", true);
    rig.run(&copy(&["--all"])).exits(2); // nothing is archived yet
    rig.run(&["copy", "--from", "main", "--to", "main", "--all"]).exits(2).says("the same repository");
    rig.run(&["copy", "--from", "main", "--to", "nowhere", "--all"]).exits(2).says("nowhere");
    ok(fs::rename(rig.path("copy"), rig.path("away")));
    rig.run(&copy(&["--all"])).exits(3).says("a new repository is made by `pgkeep init`");
    ok(fs::create_dir(rig.path("copy")));
    ok(give_to_server_user(rig.dir.path()));
    rig.run(&copy(&["--all"])).exits(2).says("pgkeep init --repo");
    ok(fs::remove_dir(rig.path("copy")));
    // One place under two names.
    ok(std::os::unix::fs::symlink(rig.path("main"), rig.path("copy")));
    rig.run(&copy(&["--all"])).exits(2);
}
