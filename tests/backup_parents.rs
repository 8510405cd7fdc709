//! Base backups that reference the blocks of earlier ones, from real servers: each is whole, whatever happened in between.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use pgkeep::backup::cut::Counts;
use pgkeep::backup::{BackupOptions, BackupProgress, ParentChoice, backup};
use pgkeep::catalog::Repository;
use pgkeep::catalog::backups::Sharing;
use pgkeep::catalog::layout::{ClusterObject, PartKind};
use pgkeep::catalog::records::{BackupStart, Manifest};
use pgkeep::catalog::table::FileKind;
use pgkeep::pg::instance::Installation;
use pgkeep::store::list_all;
use pgkeep::types::{BackupLabel, ClusterId};
use support::backups::*;
use support::rig::Rig;
use support::{TestPg, any_major, major, ok};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A small generator: what happens is given by the seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

fn seed() -> u64 {
    std::env::var("PGKEEP_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// How many backups a history has.
fn rounds() -> usize {
    std::env::var("PGKEEP_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(3)
}

/// A small cluster: what is read over and over again here costs processor time.
fn begin(pg: &TestPg) {
    for template in ["template0", "template1"] {
        pg.sql(&format!("ALTER DATABASE {template} IS_TEMPLATE false"));
        pg.sql(&format!("DROP DATABASE {template}"));
    }
    pg.sql("CREATE TABLE t (n int PRIMARY KEY, v text) WITH (fillfactor = 70)");
    pg.sql("INSERT INTO t SELECT n, md5(n::text) FROM generate_series(1, 10000) n");
    pg.sql("CREATE TABLE still AS SELECT n, repeat(md5(n::text), 8) AS v FROM generate_series(1, 5000) n");
    pg.sql("CREATE UNLOGGED TABLE u AS SELECT generate_series(1, 2000) AS n");
    pg.sql("CREATE TABLE shrinks AS SELECT n, repeat('x', 200) AS v FROM generate_series(1, 4000) n");
    pg.sql("VACUUM"); // free space and visibility maps
}

/// One thing that happens between two backups, or while one is taken.
fn change(pg: &TestPg, random: &mut Random, round: usize) {
    let sql = |sql: &str| pg.sql(sql); // VACUUM wants to be alone
    let some = random.below(10_000);
    match random.below(9) {
        0 => sql(&format!("UPDATE t SET v = md5(v) WHERE n % 97 = {}", some % 97)),
        1 => {
            sql(&format!("DELETE FROM shrinks WHERE n > {}", some % 4000));
            sql("VACUUM shrinks") // truncates it
        }
        2 => sql("INSERT INTO shrinks SELECT n, repeat('y', 200) FROM generate_series(1, 2000) n"),
        3 => sql("VACUUM FULL t"),
        4 => sql(&format!("DROP TABLE IF EXISTS comes; CREATE TABLE comes AS SELECT generate_series(1, {some}) AS n")),
        5 => sql("TRUNCATE u; INSERT INTO u SELECT generate_series(1, 3000)"),
        6 => {
            sql(&format!("DELETE FROM t WHERE n % 211 = {}", some % 211));
            sql("VACUUM t")
        }
        7 => {
            // Dropped and made again; from 15 on by both strategies.
            sql("DROP DATABASE IF EXISTS d");
            let strategy = ["wal_log", "file_copy"][round % 2];
            let with = if pg.installation().major >= 15 { format!("STRATEGY {strategy}") } else { String::new() };
            sql(&format!("CREATE DATABASE d TEMPLATE postgres {with}"))
        }
        _ => {
            // A file that is none of the server's: grows, shrinks, vanishes and comes again.
            let path = pg.data_dir().join("stray");
            match fs::metadata(&path) {
                Ok(there) if there.len() > 300_000 => ok(fs::remove_file(&path)),
                there => ok(fs::write(
                    &path,
                    vec![7; there.map_or(50_000, |there| there.len() as usize + some as usize * 9)],
                )),
            }
            String::new()
        }
    };
}

/// A backup, and what became of the bytes.
async fn counted(pg: &TestPg, repository: &Repository) -> (Manifest, Counts) {
    let progress = watch::Sender::new(BackupProgress::default());
    let (source, options, name) = (source_of(pg), BackupOptions::default(), name());
    let manifest = soon(backup(&source, repository, &name, &options, &progress, CancellationToken::new())).await;
    let counts = progress.borrow().counts;
    (ok(manifest), counts)
}

const SUM: &str = "SELECT (SELECT md5(string_agg(t::text, ',' ORDER BY n)) FROM t), (SELECT count(*) FROM still), \
                   (SELECT count(*) FROM shrinks)";

/// Deletes a backup by hand: its manifest, its start, and what no other names.
async fn delete(repository: &Repository, id: &ClusterId, label: BackupLabel, others: &[Manifest]) -> u64 {
    let mut named = BTreeSet::new();
    for manifest in others {
        named.extend(manifest.packs.iter().map(|pack| format!("{id}/pack/{}", pack.pack)));
        let parts = [&manifest.tables, &manifest.tags, &manifest.server_manifest].into_iter().flatten();
        named.extend(parts.map(|part| format!("{id}/backup/{}", part.part)));
    }
    let mut freed = 0;
    let store = repository.store();
    for object in ok(list_all(store.as_ref(), &format!("{id}/")).await) {
        let key = object.key.to_string();
        let (pack, its) = (key.contains("/pack/"), key.contains("/pack/") || key.contains("/backup/"));
        // What an earlier deletion left because this one named it goes with it.
        let own = key.contains(&format!("/{label}/")) || pack || key.contains("/files-") || key.contains("/tags-");
        let of_another = key.ends_with("/manifest") || key.ends_with("/start");
        if its && own && !named.contains(&key) && (!of_another || key.contains(&format!("/{label}/"))) {
            freed += if of_another { 0 } else { object.len };
            ok(store.delete(&object.key).await);
        }
    }
    freed
}

fn history(installation: &Installation) {
    let (seed, mut pg) = (seed(), TestPg::start(installation, "autovacuum = off\nmax_wal_size = 1GB"));
    let mut random = Random::new(seed + u64::from(installation.major));
    eprintln!("PostgreSQL {}, PGKEEP_SEED={seed}", installation.version);
    begin(&pg);
    let (id, data, spaces) = (id_of(&pg), ok(pg.scratch_dir("restored")), ok(pg.scratch_dir("spaces")));
    let (want, last) = runtime().block_on(async {
        let repository = in_memory().await;
        let archiver = Archiver::start(&pg, &repository).await;
        let mut kept: Vec<Manifest> = Vec::new();
        let mut want = String::new();
        for round in 0..rounds() {
            for _ in 0..1 + random.below(4) {
                change(&pg, &mut random, round);
            }
            // The last one of a server that is at rest: what it holds is known then. The others while it writes.
            let taking = counted(&pg, &repository);
            let (manifest, counts) = if round + 1 == rounds() {
                want = pg.sql(SUM);
                taking.await
            } else {
                let mut random = Random::new(random.below(u64::MAX));
                let busy = async {
                    tokio::task::block_in_place(|| (0..3).for_each(|_| change(&pg, &mut random, round)));
                };
                tokio::join!(taking, busy).0
            };
            // Files come back from packs, whoever wrote them, as they arrived: compared by their checksums.
            let files = files_of(&repository, &id, &manifest).await;
            contents(&repository, &id, &manifest, &files).await;
            let info = &manifest.backup;
            let foreign = manifest.packs.iter().filter(|pack| pack.pack.label != info.label);
            assert_eq!(foreign.map(|pack| pack.live).sum::<u64>(), counts.referenced);
            assert_eq!(manifest.parents, kept.last().map(|parent| parent.backup.label).into_iter().collect::<Vec<_>>());
            // The whole cluster fits into one pack: where that has become half empty, what is left is stored again.
            let known = counts.referenced + counts.again;
            assert!(round == 0 || known * 8 > info.bytes, "{counts:?} of {} bytes", info.bytes);
            let start: BackupStart = ok(repository.get_record(&id, ClusterObject::Start(info.label)).await);
            assert_eq!(start.parents, manifest.parents);
            kept.push(manifest);
        }
        archiver.stop().await;
        // A full one of the same moment holds the same files, but for those that each backup makes anew.
        let archiver = Archiver::start(&pg, &repository).await;
        let full = BackupOptions { parent: ParentChoice::Full, ..BackupOptions::default() };
        let (child, counts) = counted(&pg, &repository).await;
        let full = ok(take_as(&pg, &repository, full).await);
        archiver.stop().await;
        assert!(full.parents.is_empty() && full.packs.iter().all(|pack| pack.pack.label == full.backup.label));
        assert!(counts.new * 8 < child.backup.bytes, "{counts:?} of {} bytes", child.backup.bytes);
        let mut both: Vec<BTreeMap<String, Vec<u8>>> = Vec::new();
        for manifest in [&child, &full] {
            let files = files_of(&repository, &id, manifest).await;
            assert!(files.iter().any(|file| file.kind == FileKind::Directory));
            both.push(contents(&repository, &id, manifest, &files).await);
        }
        let anew = ["backup_label", "global/pg_control"];
        let (of_child, of_full) = (&both[0], &both[1]);
        let relation = |path: &&String| path.starts_with("base/") && !anew.contains(&path.as_str());
        let differ: Vec<&String> =
            of_full.keys().filter(relation).filter(|path| of_child.get(*path) != of_full.get(*path)).collect();
        assert!(differ.is_empty() && of_full.len() == of_child.len(), "{differ:?}");
        kept.push(child);

        // Those before it deleted in any order: it stays whole, and each gives back what was said.
        while kept.len() > 1 {
            let mut sharing = Sharing::new();
            kept.iter().for_each(|manifest| sharing.add(manifest));
            sharing.add(&full);
            let gone = kept.remove(random.below(kept.len() as u64 - 1) as usize);
            let others: Vec<Manifest> = kept.iter().chain([&full]).cloned().collect();
            let freed = delete(&repository, &id, gone.backup.label, &others).await;
            assert_eq!(Some(freed), sharing.of(gone.backup.label).map(|share| share.alone));
        }
        // Unpacking compares the checksums of all that is left.
        let last = kept.remove(0);
        unpack(&repository, &id, &last, &data, &spaces).await;
        (want, last)
    });
    assert!(last.tags.iter().all(|part| part.part.kind == PartKind::Tags));
    let mut restored = TestPg::attach(installation, &data);
    pg.tool("pg_verifybackup", &["-q", &data.display().to_string()]);
    ok(pg.stop(pgkeep::pg::instance::StopMode::Fast));
    ok(restored.start());
    assert_eq!(restored.sql(SUM), want);
    restored.sql("CREATE EXTENSION IF NOT EXISTS amcheck");
    restored.sql("SELECT bt_index_check('t_pkey', true)");
}

#[test]
fn pitfall_29_a_history_of_backups_is_whole_on_13() {
    major(13).into_iter().for_each(history);
}

/// Where more is asked for: what else is here runs on 15.
#[test]
fn pitfall_29_a_history_of_backups_is_whole_on_the_others() {
    if std::env::var_os("PGKEEP_ROUNDS").is_some() {
        [14, 15, 16, 18].into_iter().filter_map(major).for_each(history);
    }
}

#[test]
fn pitfall_29_a_history_of_backups_is_whole_on_17() {
    major(17).into_iter().for_each(history);
}

/// Killed and stopped at random moments: what was there stays, and the next one is whole.
#[test]
fn a_backup_that_is_killed_at_random_leaves_the_parent_alone() {
    let (seed, pg) = (seed(), TestPg::start(any_major(), "autovacuum = off"));
    let mut random = Random::new(seed);
    eprintln!("PGKEEP_SEED={seed}");
    begin(&pg);
    runtime().block_on(async {
        let (repository, id) = (in_memory().await, id_of(&pg));
        let archiver = Archiver::start(&pg, &repository).await;
        let first = ok(take(&pg, &repository).await);
        for round in 0..2 {
            change(&pg, &mut random, round);
            let progress = watch::Sender::new(BackupProgress::default());
            let (mut seen, cancel, source) = (progress.subscribe(), CancellationToken::new(), source_of(&pg));
            let (name, options) = (name(), BackupOptions { max_rate: Some(80_000), ..BackupOptions::default() });
            let taking = backup(&source, &repository, &name, &options, &progress, cancel.clone());
            let until = random.below(first.backup.bytes);
            let reached = async {
                ok(seen.wait_for(|progress| progress.done >= until).await);
            };
            if round % 2 == 0 {
                // As if it was killed: nothing is tidied.
                tokio::select! {
                    ended = taking => assert!(ended.is_ok(), "round {round}: {ended:?}"),
                    () = soon(reached) => {}
                }
            } else {
                let stop = async {
                    soon(reached).await;
                    cancel.cancel();
                };
                let (_, ()) = soon(async { tokio::join!(taking, stop) }).await;
            }
            let next = ok(take(&pg, &repository).await);
            let files = files_of(&repository, &id, &next).await;
            contents(&repository, &id, &next, &files).await;
        }
        let files = files_of(&repository, &id, &first).await;
        contents(&repository, &id, &first, &files).await;
        archiver.stop().await;
    });
}

/// As it is typed: what the commands say of parents and of what backups share.
#[test]
fn the_commands_tell_what_a_backup_costs() {
    let pg = TestPg::start(any_major(), "autovacuum = off");
    begin(&pg);
    let mut rig = Rig::new(&pg);
    rig.start_archiver();
    let first = rig.json(&["backup", "--json"]);
    assert_eq!((first["cost"]["parent"].is_null(), first["cost"]["referenced"].as_u64()), (true, Some(0)), "{first}");
    let text = rig.done(&["backup"]).stdout;
    assert!(text.contains("referenced of ") && text.contains(" new, "), "{text}");
    let full = rig.json(&["backup", "--full", "--json"]);
    assert!(full["cost"]["parent"].is_null() && full["cost"]["new"].as_u64() > Some(8_000_000), "{full}");
    let named = rig.json(&["backup", "--parent", first["label"].as_str().expect("a label"), "--json"]);
    let cost = |field: &str| named["cost"][field].as_u64().expect("a number");
    assert_eq!(named["cost"]["parent"], first["label"]);
    assert_eq!(cost("read"), cost("new") + cost("again") + cost("referenced") + cost("zeros"));
    assert!(cost("stored") * 10 < cost("read") && named["cost"]["ratio"].as_f64() > Some(10.0), "{named}");
    rig.run(&["backup", "--parent", "20200101T000000Z"]).exits(2).says("--full");
    rig.run(&["backup", "--parent", "20200101T000000Z", "--full"]).exits(2);

    let list = rig.json(&["list", "--json"]);
    let of = |at: usize, field: &str| list["clusters"][0]["backups"][at][field].as_u64().expect("a number");
    assert_eq!(list["clusters"][0]["backups"].as_array().map(Vec::len), Some(4));
    // Nobody else uses what the full one wrote; of the first one all others have most.
    assert_eq!((of(2, "frees"), of(2, "shares")), (of(2, "stored_bytes"), 0));
    assert!(of(0, "frees") * 2 < of(0, "shares") && of(3, "frees") * 2 < of(3, "shares"), "{list}");
    let text = rig.done(&["list"]).stdout;
    assert!(text.contains("Frees") && text.contains("Shares"), "{text}");
    rig.stop_archiver();
}

/// A standby sends the files, the primary the WAL: the load is the standby's, and its blocks are the primary's.
#[test]
fn a_standby_sends_the_files_and_the_primary_the_wal() {
    let installation = any_major();
    let primary = TestPg::start(installation, "wal_keep_size = 64MB\nautovacuum = off");
    begin(&primary);
    let mut rig = Rig::new(&primary);
    rig.start_archiver();
    let first = rig.json(&["backup", "--json"]);
    let standby = support::archiver::standby_of(&primary, installation);
    primary.sql("UPDATE t SET v = md5(v) WHERE n % 50 = 0");
    primary.sql("CHECKPOINT");
    let to = primary.sql("SELECT pg_current_wal_lsn()");
    let caught_up = || standby.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{to}'")) == "t";
    support::wait_until("the standby to catch up", Duration::from_secs(60), caught_up);
    let second = rig.json(&["backup", "--from", &standby.conninfo(), "--json"]);
    assert_eq!(second["cost"]["parent"], first["label"], "{second}");
    let number = |of: &serde_json::Value, field: &str| of["cost"][field].as_u64().expect("a number");
    assert!(number(&second, "referenced") * 2 > number(&second, "read"), "{second}");
    let restored = rig.restored(installation, "latest", "restored", &[]);
    assert_eq!(restored.sql(SUM), primary.sql(SUM));
    rig.run(&["backup", "--from", "host=/nowhere nonsense=1"]).exits(2);
    rig.stop_archiver();
}
