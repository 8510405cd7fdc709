//! Restoring where several repositories hold the cluster: which one is chosen, which one takes over, and what `wal fetch`
//! answers while one of them is down.

mod support;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pgkeep::catalog::Repository;
use pgkeep::pg::instance::{Installation, give_to_server_user};
use pgkeep::plan::{Options, Target, TargetReading};
use pgkeep::restore::{self, Action, FetchCommand, Sources, place};
use pgkeep::seal::KeyFile;
use pgkeep::store::faulty::{FaultPlan, Faulty};
use pgkeep::store::fs::FsStore;
use support::rig::{Rig, SOON, dump, flip, next_second};
use support::{TestPg, any_major, ok, wait_until};

/// A cluster in `main` and, copied, in `copy`; both are the cluster's. The server is gone.
struct Kept {
    rig: Rig,
    /// After the base backup, and before the last commits.
    middle: String,
    dump: String,
}

fn kept(installation: &Installation, same_realm: bool) -> Kept {
    let pg = TestPg::start_segmented(installation, 1, "");
    pg.sql("create table log (id int primary key, filler text)");
    let mut rig = Rig::new(&pg);
    rig.add("copy", same_realm);
    rig.start_archiver();
    pg.sql("insert into log select n, repeat('x', 200) from generate_series(1, 20000) n");
    rig.done(&["backup"]);
    next_second(&pg);
    pg.sql("insert into log select n, repeat('y', 200) from generate_series(20001, 25000) n");
    let middle = pg.sql("select clock_timestamp()");
    next_second(&pg);
    for from in (25_001..30_000).step_by(500) {
        pg.sql(&format!("insert into log select n, repeat('z', 200) from generate_series({from}, {from} + 499) n"));
    }
    let xid = pg.sql("insert into log values (-1) returning pg_current_xact_id()");
    rig.wait_for(&xid);
    rig.stop_archiver();
    let dump = dump(&pg);
    rig.done(&["copy", "--from", "main", "--to", "copy", "--all"]);
    rig.receives(&["main", "copy"]);
    Kept { rig, middle, dump }
}

/// Moves a repository out of the way and back.
fn away(rig: &Rig, name: &str) {
    ok(fs::rename(rig.path(name), rig.path(&format!("{name}.away"))));
}

fn back(rig: &Rig, name: &str) {
    ok(fs::rename(rig.path(&format!("{name}.away")), rig.path(name)));
}

#[test]
fn p2_the_repository_is_chosen_by_what_it_holds_and_those_away_are_said() {
    let installation = any_major();
    let Kept { rig, middle, dump: want } = kept(installation, false);
    let plan = |to: &str| rig.json(&["plan", "--json", "--to", to]);
    let both = plan("latest");
    assert_eq!(both["from"]["repository"], "main", "the configuration's order decides: {both}");
    assert!(both["from"]["because"].as_str().unwrap().contains("alike"), "{both}");

    // The last WAL of `main` is lost: `latest` is what the other has; before that, either will do.
    let newest = both["plan"]["stop"]["record"].as_str().unwrap().to_owned();
    let lost = rig.objects("main", &["/open/"]);
    assert!(!lost.is_empty());
    for path in &lost {
        ok(fs::remove_file(path));
    }
    let latest = plan("latest");
    assert_eq!((&latest["from"]["repository"], &latest["plan"]["stop"]["record"]), (&"copy".into(), &newest.into()));
    assert!(latest["from"]["because"].as_str().unwrap().contains("gets as far"), "{latest}");
    assert_eq!(plan(&middle)["from"]["repository"], "main");
    rig.run(&["plan", "--to", "latest", "--repository", "main"]).exits(0);
    rig.run(&["plan", "--to", "latest"]).exits(0).says("from      repository copy: no other that answers gets as far");

    // One that is away is said. Without it the answer may be no, but that is not the last word.
    let xid = latest["plan"]["last_included"]["xid"].to_string();
    away(&rig, "copy");
    rig.run(&["plan", "--to", &middle]).exits(0).says("left out  repository copy");
    rig.run(&["plan", "--to", &format!("xid:{xid}")]).exits(3).says("left out  repository copy").says("try again");
    rig.run(&["list"]).exits(0).says("Repository copy is left out").says("Cluster main in repository main");
    back(&rig, "copy");
    away(&rig, "main");
    rig.run(&["plan", "--to", &middle]).exits(0).says("from      repository copy").says("left out  repository main");
    // What it holds was compared with nothing: when it is back in the middle of recovery, it is not asked for WAL (P6).
    assert!(fetched_by(&rig, &middle).contains(" --from copy "), "{}", fetched_by(&rig, &middle));
    away(&rig, "copy");
    rig.run(&["plan", "--to", &middle]).exits(3).says("no repository answers");
    back(&rig, "copy");
    let restored = rig.restored(installation, "latest", "data", &[]);
    assert_eq!(dump(&restored), want);
    back(&rig, "main");
    assert!(!fetched_by(&rig, &middle).contains("--from"), "{}", fetched_by(&rig, &middle));
}

/// The `restore_command` of a restore to `to`.
fn fetched_by(rig: &Rig, to: &str) -> String {
    let pgdata = rig.path("nowhere");
    let answer = rig.json(&["restore", "--dry-run", "--json", "--to", to, "--pgdata", pgdata.to_str().unwrap()]);
    answer["restore_command"].as_str().unwrap().to_owned()
}

/// A repository over faults that can be switched on.
fn over_faults(rig: &Rig, name: &str, key: &str) -> (Faulty, Repository) {
    let key = ok(KeyFile::read(&ok(fs::read(rig.path(key))), None));
    rig.block_on(async {
        let faulty = Faulty::new(Arc::new(ok(FsStore::open(rig.path(name)).await)), FaultPlan::none(), 1);
        let repository = ok(Repository::open(name, Arc::new(faulty.clone()), key).await);
        (faulty, repository)
    })
}

/// The first repository stops answering after so many bytes were written: wherever that is, the restore ends well.
#[test]
fn p2_a_repository_that_fails_in_the_middle_of_a_restore_is_replaced() {
    let installation = any_major();
    for same_realm in [true, false] {
        let Kept { rig, .. } = kept(installation, same_realm);
        let (main_key, copy_key) = ("main.key", if same_realm { "main.key" } else { "copy.key" });
        // Nothing at all; in the middle of the packs; when all that is left is WAL and the server's manifest.
        for (number, after) in [0, 1 << 20, u64::MAX].into_iter().enumerate() {
            let (faulty, main) = over_faults(&rig, "main", main_key);
            let (_, copy) = over_faults(&rig, "copy", copy_key);
            let name = format!("data{number}");
            let restored = rig.block_on(async {
                let cluster = rig_cluster(&main).await;
                let now = jiff::Timestamp::now();
                let reading = TargetReading { now, local: jiff::tz::TimeZone::UTC, tz: None };
                let target = Target::parse("latest", false, &reading).unwrap();
                let resolved = ok(restore::resolve(&main, &cluster, &target, &Options::default(), &|_| {}).await);
                let resolved = resolved.unwrap_or_else(|no| panic!("{no}"));
                let destination = ok(place::look(&rig.path(&name), &[], &resolved.plan.base));
                let mut sources = Sources::new(main.clone(), cluster, resolved.manifest.clone());
                assert!(ok(sources.add(copy.clone()).await), "the copy has the same base backup");
                let (program, config) = (rig.path("pgkeep"), rig.path("pgkeep.toml"));
                let command = FetchCommand {
                    program: &program,
                    config: &config,
                    repository: None,
                    from: &[],
                    cluster: "main",
                    path: &resolved.plan.path,
                    until: restore::needed_to(&resolved.plan),
                };
                let command = ok(command.command());
                let fail = || faulty.set_plan(FaultPlan { before: 1.0, ..FaultPlan::none() });
                let (written, total) =
                    (AtomicU64::new(0), resolved.manifest.packs.iter().map(|pack| pack.live).sum::<u64>());
                if after == 0 {
                    fail();
                }
                let progress = |bytes: u64| {
                    if written.fetch_add(bytes, Ordering::Relaxed) + bytes >= after.min(total) {
                        fail();
                    }
                };
                let sources = Arc::new(sources);
                ok(restore::restore(&sources, &resolved, &destination, Action::Pause, &command, &progress).await)
            });
            assert!(faulty.faults() > 0, "{name}: nothing failed");
            let note = restored.notes.iter().find(|note| note.contains("repository main failed"));
            assert!(note.is_some(), "{name}: {:?}", restored.notes);
            // Recovery has to do without it as well.
            away(&rig, "main");
            let pg = rig.started(installation, &name);
            assert_eq!(pg.sql("select count(*), min(id), max(id) from log"), "30001|-1|30000", "{name}");
            back(&rig, "main");
        }
    }
}

async fn rig_cluster(repository: &Repository) -> pgkeep::types::ClusterId {
    ok(repository.clusters().await).first().expect("a cluster").clone()
}

/// By the program: a pack and a segment of the first repository are damaged, and what opens elsewhere is used.
#[test]
fn p4_what_is_damaged_in_one_repository_is_read_from_another() {
    let installation = any_major();
    for same_realm in [true, false] {
        let Kept { rig, dump: want, .. } = kept(installation, same_realm);
        for pack in rig.objects("main", &["/pack/"]) {
            flip(&pack, |len| len / 2); // not seen by a plan, which opens footers
        }
        let ran = rig.restore("latest", "data", &[]).exits(0).says("or from   copy");
        assert!(ran.stdout.contains("another took over") && ran.stdout.contains("/pack/"), "{ran:?}");
        let restored = rig.started(installation, "data");
        assert_eq!(dump(&restored), want);
        drop(restored);
        // Alone it would have failed.
        let alone = rig.restore("latest", "alone", &["--repository", "main"]);
        assert!(alone.code.is_some_and(|code| code > 1), "{alone:?}");
        // What one alone is damaged in at its end is planned around.
        for pack in rig.objects("main", &["/pack/"]) {
            flip(&pack, |len| len / 2);
            flip(&pack, |len| len - 20);
        }
        rig.run(&["plan", "--to", "latest"]).exits(0).says("from      repository copy");
    }
}

/// Another base backup under the same label does not take over.
#[test]
fn p6_only_the_same_base_backup_takes_over() {
    let installation = any_major();
    let Kept { rig, .. } = kept(installation, true);
    let (main, copy) = (rig.open("main"), rig.open("copy"));
    rig.block_on(async {
        let cluster = rig_cluster(&main).await;
        let inventory = ok(main.load(&cluster).await);
        let label = inventory.backups[0].label;
        let manifest = ok(main.get_manifest(&cluster, label).await);
        let mut sources = Sources::new(main.clone(), cluster.clone(), manifest.clone());
        assert!(ok(sources.add(copy.clone()).await));
        let mut other = manifest.clone();
        other.backup.files += 1;
        let mut sources = Sources::new(main.clone(), cluster, other);
        assert!(!ok(sources.add(copy).await), "it is another backup");
        assert_eq!(sources.count(), 1);
    });
}

fn fetch(rig: &Rig, name: &str) -> (Option<i32>, Duration) {
    let (since, dest) = (Instant::now(), rig.path("fetched"));
    let _ = fs::remove_file(&dest);
    let ran = rig.run(&["wal", "fetch", name, dest.to_str().unwrap()]);
    assert_eq!(ran.code == Some(0), dest.exists(), "{name}: {ran:?}");
    (ran.code, since.elapsed())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().split('.').next().unwrap().to_owned()
}

#[test]
fn p7_not_there_is_said_only_when_every_repository_said_so() {
    let installation = any_major();
    let Kept { rig, middle, dump: want } = kept(installation, true);
    let segments = rig.objects("main", &["/wal/0"]);
    let (there, last) = (file_name(&segments[0]), file_name(segments.last().unwrap()));
    let beyond = format!("{}{:08X}", &last[..16], u32::from_str_radix(&last[16..], 16).unwrap() + 100);
    // Both up.
    assert_eq!(fetch(&rig, &there).0, Some(0));
    assert_eq!(fetch(&rig, &beyond).0, Some(1));
    assert_eq!(fetch(&rig, "00000002.history").0, Some(1));
    // In one alone: served, whichever it is.
    ok(fs::rename(&segments[0], rig.path("aside")));
    assert_eq!(fetch(&rig, &there).0, Some(0), "the other one has it");
    for down in ["main", "copy"] {
        away(&rig, down);
        let want_there = if down == "copy" { 200 } else { 0 };
        assert_eq!(fetch(&rig, &there).0, Some(want_there), "{down} is down");
        assert_eq!(fetch(&rig, &last).0, Some(0), "{down} is down, and the other has it");
        assert_eq!(fetch(&rig, &beyond).0, Some(200), "{down} is down, and may have it");
        assert_eq!(fetch(&rig, "00000002.history").0, Some(200), "{down} is down, and may have it");
        back(&rig, down);
    }
    ok(fs::rename(rig.path("aside"), &segments[0]));

    // The open segment: of one that lags, what it has is not the end.
    let open = rig.objects("main", &["/open/"]);
    assert!(!open.is_empty());
    for path in &open {
        ok(fs::remove_file(path));
    }
    let tail = rig.objects("copy", &["/open/"]).first().map(|path| file_name(path)).expect("an open segment");
    assert_eq!(fetch(&rig, &tail).0, Some(0));
    away(&rig, "copy");
    assert_eq!(fetch(&rig, &tail).0, Some(200), "the one that has it is down");
    // A recovery that needs it stops; and goes on when both are back.
    back(&rig, "copy");
    rig.restore("latest", "data", &[]).exits(0);
    away(&rig, "copy");
    let mut pg = TestPg::attach(installation, &rig.path("data"));
    pg.set("fsync=off");
    let _ = pg.start(); // it may let queries in before it gets there
    wait_until("recovery to stop", SOON, || !pg.is_running());
    drop(pg);
    back(&rig, "copy");
    let restored = rig.recovered(installation, "data");
    assert_eq!(dump(&restored), want);
    drop(restored);
    // To a target that either can serve, with the first one down from the start of recovery on.
    rig.restore(&middle, "early", &[]).exits(0);
    away(&rig, "main");
    let restored = rig.started(installation, "early");
    assert_eq!(restored.sql("select count(*) from log"), "25000");
}

#[test]
fn a_backup_goes_into_every_repository_of_the_cluster() {
    let installation = any_major();
    for same_realm in [true, false] {
        let pg = TestPg::start_segmented(installation, 1, "");
        pg.sql("create table log (id int primary key)");
        let mut rig = Rig::new(&pg);
        rig.add("copy", same_realm);
        rig.add("third", true);
        rig.receives(&["main", "copy", "third"]);
        pg.sql("insert into log select generate_series(1, 1000)");
        let taken = rig.json(&["backup", "--json"]);
        let label = taken["label"].as_str().unwrap().to_owned();
        assert_eq!(taken["repository"], "main");
        let copies: Vec<_> = taken["copies"].as_array().unwrap().iter().map(|copy| copy["copied"].clone()).collect();
        assert_eq!(copies, [true, true], "{taken}");
        for name in ["main", "copy", "third"] {
            let data = format!("from-{name}");
            let more = ["--repository", name, "--cluster", "main", "--backup", &label];
            let restored = rig.restored(installation, "immediate", &data, &more);
            assert_eq!(restored.sql("select count(*) from log"), "1000", "{name}");
        }
        // One that is away is said, and with what to do; the backup is there all the same.
        next_second(&pg);
        away(&rig, "copy");
        let ran =
            rig.run(&["backup"]).exits(1).says("NOT in repository copy").says("pgkeep copy --from main --to copy");
        let label = ran.stdout.split("base backup ").nth(1).unwrap()[..16].to_owned();
        back(&rig, "copy");
        rig.done(&["copy", "--from", "main", "--to", "copy", "--backup", &label]);
        // WAL would never come to one that is not the cluster's.
        rig.receives(&["main", "copy"]);
        rig.run(&["backup", "--repository", "third"]).exits(2).says("does not receive the WAL");
        // Not copied when it is not wanted.
        next_second(&pg);
        let only = rig.json(&["backup", "--only", "--json"]);
        assert_eq!(only["copies"].as_array().unwrap().len(), 0, "{only}");
        let list = rig.json(&["list", "--json", "--repository", "copy"]);
        assert_eq!(list["clusters"][0]["backups"].as_array().unwrap().len(), 2, "{list}");
        ok(give_to_server_user(rig.dir.path()));
    }
}
