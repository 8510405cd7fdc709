//! Base backups into a repository, from real servers of every major that is found.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pgkeep::backup::{BackupError, BackupOptions, BackupPhase, BackupProgress, backup, tags};
use pgkeep::catalog::Repository;
use pgkeep::catalog::layout::PartKind;
use pgkeep::catalog::table::FileKind;
use pgkeep::pg::instance::{InitOptions, Installation, StopMode};
use pgkeep::seal::{BlockTagger, KeyFile};
use pgkeep::store::faulty::{FaultPlan, Faulty};
use pgkeep::store::memory::MemoryStore;
use pgkeep::store::retry::{Retry, RetryPolicy};
use pgkeep::types::Branch;
use support::backups::*;
use support::{TestPg, any_major, for_each_major, ok};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

fn with_everything(installation: &Installation) -> TestPg {
    let pg = TestPg::start(installation, "autovacuum = off");
    for space in ["one", "two"] {
        let dir = ok(pg.scratch_dir(space));
        pg.sql(&format!("CREATE TABLESPACE {space} LOCATION '{}'", dir.display()));
    }
    pg.sql("CREATE TABLE a TABLESPACE one AS SELECT n, repeat('x', 100) AS t FROM generate_series(1, 20000) n");
    pg.sql("CREATE TABLE b TABLESPACE two AS SELECT n FROM generate_series(1, 500) n");
    pg.sql("CREATE TABLE c AS SELECT n, md5(n::text) AS m FROM generate_series(1, 30000) n");
    pg.sql("CREATE TABLE empty (n int)");
    pg.sql("CREATE UNLOGGED TABLE u AS SELECT 1 AS n");
    pg
}

/// 44 MB, more than a pack: noise, a hole of 8 MB, noise, and a last block that is not whole.
fn large_file() -> Vec<u8> {
    let mut state = 1u64;
    let mut bytes = Vec::with_capacity(44 << 20);
    while bytes.len() < 44 << 20 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        bytes.extend_from_slice(blake3::hash(&state.to_le_bytes()).as_bytes());
    }
    bytes.extend_from_slice(&[7; 4711]);
    bytes[HOLE].fill(0);
    bytes
}

const HOLE: std::ops::Range<usize> = 10 << 20..18 << 20;

#[test]
fn p2_a_backup_of_every_major_is_what_the_server_sent_and_starts() {
    for_each_major(|installation| {
        let pg = with_everything(installation);
        let large = large_file();
        ok(fs::write(pg.data_dir().join("large"), &large));
        ok(fs::write(pg.data_dir().join("nothing"), b""));
        let (id, sum) = (id_of(&pg), "SELECT (SELECT sum(n) FROM a), (SELECT sum(n) FROM b), (SELECT count(m) FROM c)");
        let want = pg.sql(sum);
        let (data, spaces) = (ok(pg.scratch_dir("restored")), ok(pg.scratch_dir("spaces")));
        let manifest = runtime().block_on(async {
            let repository = in_memory().await;
            let manifest = ok(take_archived(&pg, &repository).await);

            let files = files_of(&repository, &id, &manifest).await;
            let contents = contents(&repository, &id, &manifest, &files).await;
            assert!(contents["large"] == large && contents["nothing"].is_empty());
            let of = |path: &str| files.iter().find(|file| file.path == path).unwrap_or_else(|| panic!("{path}"));
            let stored: u64 = of("large").extents.iter().map(|extent| extent.len).sum();
            assert_eq!(stored, (large.len() - HOLE.len()) as u64, "zeros are not stored");
            assert_eq!(of("pg_wal").kind, FileKind::Directory);
            assert_eq!(of("PG_VERSION").mode & 0o777, 0o600);
            // What the manifest says of itself.
            let info = &manifest.backup;
            let only_files = files.iter().filter(|file| file.kind == FileKind::File);
            assert_eq!((info.files, info.bytes), (contents.len() as u64, only_files.map(|file| file.size).sum()));
            assert_eq!(
                (info.system, info.branch, info.timeline),
                (id.system, Branch::first(info.timeline), info.timeline)
            );
            assert!(info.start < info.stop && info.flagged.is_none() && info.parameters.max_connections == 20);
            assert_eq!(info.server_version / 10_000, installation.major);
            let places: Vec<&str> = info.tablespaces.iter().map(|space| space.location.as_str()).collect();
            let dirs = ["one", "two"].map(|space| pg.socket_dir().join(space).display().to_string());
            assert_eq!(places, dirs);
            let live: u64 = manifest.packs.iter().map(|pack| pack.live).sum();
            assert_eq!(live, files.iter().flat_map(|file| &file.extents).map(|extent| extent.len).sum::<u64>());
            let parts = [&manifest.tables, &manifest.tags, &manifest.server_manifest].into_iter().flatten();
            let len = manifest.packs.iter().map(|pack| pack.len).sum::<u64>() + parts.map(|part| part.len).sum::<u64>();
            assert_eq!((info.stored_bytes, manifest.packs.len() > 1), (len, true));
            assert_eq!(inventory(&repository, &id).await.backups, std::slice::from_ref(info));
            // The tags are those of the blocks.
            let tagger = BlockTagger::new(repository.meta_key(), repository.realm());
            let mut tagged: BTreeMap<String, u64> = BTreeMap::new();
            for piece in read_parts(&repository, &id, &manifest.tags).await {
                for entry in tags::entries(&piece).expect("a piece of tags") {
                    let from = entry.first as usize * 8192;
                    let blocks = contents[entry.path][from..].chunks(8192);
                    for (tag, block) in entry.tags.as_chunks::<16>().0.iter().zip(blocks) {
                        let zero = block.iter().all(|byte| *byte == 0);
                        assert_eq!(*tag, if zero { [0; 16] } else { tagger.tag(block) });
                    }
                    *tagged.entry(entry.path.to_owned()).or_default() += entry.tags.len() as u64 / 16;
                }
            }
            let blocks = |(_, bytes): &(&String, &Vec<u8>)| bytes.len().div_ceil(8192) as u64;
            assert_eq!(tagged.values().sum::<u64>(), contents.iter().map(|file| blocks(&file)).sum::<u64>());

            unpack(&repository, &id, &manifest, &data, &spaces).await;
            manifest
        });

        // PostgreSQL's own judge, and a start.
        assert!(!manifest.backup.label.to_string().is_empty());
        let mut restored = TestPg::attach(installation, &data);
        pg.tool("pg_verifybackup", &["-q", &data.display().to_string()]);
        ok(restored.start());
        assert_eq!(restored.sql(sum), want);
        assert_eq!(restored.sql("SELECT (SELECT count(*) FROM u), (SELECT count(*) FROM empty)"), "0|0");
    });
}

#[test]
fn pitfall_15_a_corrupt_page_is_kept_and_flagged() {
    for_each_major(|installation| {
        let mut pg = TestPg::start(installation, "autovacuum = off");
        pg.sql("CREATE TABLE t AS SELECT n FROM generate_series(1, 10000) n");
        let file = pg.data_dir().join(pg.sql("SELECT pg_relation_filepath('t')"));
        ok(pg.stop(StopMode::Fast)); // nothing of it stays in memory
        let mut bytes = ok(fs::read(&file));
        bytes[3 * 8192 + 5000] ^= 0xFF;
        ok(fs::write(&file, &bytes));
        ok(pg.start());
        runtime().block_on(async {
            let repository = in_memory().await;
            let manifest = ok(take_archived(&pg, &repository).await);
            let flagged = manifest.backup.flagged.as_deref().expect("it is flagged");
            let name = file.file_name().expect("a name").to_string_lossy().into_owned();
            assert!(flagged.contains("checksum") && flagged.contains(&name), "{flagged}");
            let inventory = inventory(&repository, &id_of(&pg)).await;
            assert!(inventory.backups[0].flagged.is_some(), "the list says so too");
        });
    });
}

#[test]
fn a_foreign_cluster_is_refused_and_nothing_is_written() {
    let (one, other) = (TestPg::start(any_major(), ""), TestPg::start(any_major(), ""));
    runtime().block_on(async {
        let repository = in_memory().await;
        ok(take_archived(&one, &repository).await);
        let error = take(&other, &repository).await.expect_err("it is another cluster");
        assert!(matches!(error, BackupError::ForeignCluster { .. }) && error.is_refusal(), "{error}");
        assert!(!error.is_retryable() && error.to_string().contains("hint:"), "{error}");
        assert_eq!(ok(repository.clusters_named(&name()).await), [id_of(&one)]);
    });
}

/// Starts a backup, waits until its progress is as wanted, and says stop.
async fn cancelled_when(
    pg: &TestPg,
    repository: &Repository,
    options: BackupOptions,
    when: impl Fn(&BackupProgress) -> bool,
) -> BackupProgress {
    let progress = watch::Sender::new(BackupProgress::default());
    let (mut seen, cancel, source) = (progress.subscribe(), CancellationToken::new(), source_of(pg));
    let name = name();
    let taking = backup(&source, repository, &name, &options, &progress, cancel.clone());
    let stop = async {
        ok(seen.wait_for(|progress| when(progress)).await);
        cancel.cancel();
    };
    let (ended, ()) = soon(async { tokio::join!(taking, stop) }).await;
    assert!(matches!(ended, Err(BackupError::Cancelled)), "{ended:?}");
    *progress.borrow()
}

#[test]
fn stopped_in_the_middle_it_leaves_no_manifest_and_the_next_one_works() {
    let pg = TestPg::start(any_major(), "");
    ok(fs::write(pg.data_dir().join("large"), large_file()));
    runtime().block_on(async {
        let repository = in_memory().await;
        let slow = BackupOptions { max_rate: Some(50_000), ..BackupOptions::default() };
        let progress = cancelled_when(&pg, &repository, slow, |progress| progress.done > 8 << 20).await;
        assert_eq!(progress.phase, BackupPhase::Receiving);
        assert!(progress.total.is_some_and(|total| total > progress.done), "{progress:?}");
        let inventory_then = inventory(&repository, &id_of(&pg)).await;
        assert_eq!(inventory_then.backups, []);
        assert_eq!(inventory_then.unfinished_backups, [progress.label.expect("it had a name")]);
        let manifest = ok(take_archived(&pg, &repository).await);
        let inventory = inventory(&repository, &id_of(&pg)).await;
        assert_eq!(inventory.backups, [manifest.backup]);
        assert_eq!(inventory.unfinished_backups, inventory_then.unfinished_backups);
        // What it had put is removed, but for its start.
        let label = progress.label.expect("it had a name").to_string();
        let left = ok(pgkeep::store::list_all(repository.store().as_ref(), "").await);
        let left: Vec<String> = left.into_iter().map(|object| object.key.to_string()).collect();
        let left: Vec<&String> = left.iter().filter(|key| key.contains(&format!("/{label}/"))).collect();
        assert!(left.len() == 1 && left[0].ends_with("/start"), "{left:?}");
    });
}

#[test]
fn p2_a_backup_is_not_listed_before_its_wal_is_durable() {
    let pg = TestPg::start(any_major(), "");
    pg.sql("SELECT pg_create_physical_replication_slot('pgkeep', true)");
    runtime().block_on(async {
        let repository = in_memory().await;
        let progress = watch::Sender::new(BackupProgress::default());
        let (mut seen, source, name, id) = (progress.subscribe(), source_of(&pg), name(), id_of(&pg));
        let options = BackupOptions::default();
        let taking = backup(&source, &repository, &name, &options, &progress, CancellationToken::new());
        let archiver = async {
            let waits = |progress: &BackupProgress| matches!(progress.phase, BackupPhase::WaitingForWal { .. });
            let label = ok(seen.wait_for(waits).await).label.expect("it has a name");
            tokio::time::sleep(Duration::from_millis(500)).await; // it asks several times
            let inventory = inventory(&repository, &id).await;
            assert_eq!((inventory.backups, inventory.unfinished_backups), (Vec::new(), vec![label]));
            Archiver::start(&pg, &repository).await
        };
        let (manifest, archiver) = soon(async { tokio::join!(taking, archiver) }).await;
        archiver.stop().await;
        let manifest = ok(manifest);
        let inventory = inventory(&repository, &id).await;
        let path = inventory.path_of(manifest.backup.branch).expect("a path");
        let from = manifest.backup.start.segment_start(manifest.backup.segment_size);
        assert!(inventory.covers(&path, from, manifest.backup.stop).is_ok());
        assert_eq!(inventory.backups, [manifest.backup]);
    });
}

#[test]
fn p3_a_backup_whose_wal_was_not_kept_says_so_and_is_not_listed() {
    let pg = TestPg::start_segmented(any_major(), 1, "");
    runtime().block_on(async {
        let repository = in_memory().await;
        let progress = watch::Sender::new(BackupProgress::default());
        let (mut seen, source, name) = (progress.subscribe(), source_of(&pg), name());
        let options = BackupOptions::default();
        let taking = backup(&source, &repository, &name, &options, &progress, CancellationToken::new());
        let archiver = async {
            let waits = |progress: &BackupProgress| matches!(progress.phase, BackupPhase::WaitingForWal { .. });
            ok(seen.wait_for(waits).await);
            // The slot comes too late: it begins at a checkpoint after the backup.
            pg.sql("SELECT pg_switch_wal()");
            pg.sql("CHECKPOINT");
            Archiver::start(&pg, &repository).await
        };
        let (ended, archiver) = soon(async { tokio::join!(taking, archiver) }).await;
        archiver.stop().await;
        let error = ended.expect_err("its WAL is missing");
        assert!(matches!(error, BackupError::WalMissing { .. }), "{error}");
        assert_eq!(inventory(&repository, &id_of(&pg)).await.backups, []);
    });
}

#[test]
fn pitfall_19_a_standby_is_backed_up_and_promoted_in_the_middle_it_fails_cleanly() {
    for_each_major(|installation| {
        let primary = TestPg::start_with(InitOptions {
            extra_conf: "wal_keep_size = 64MB".to_owned(),
            ..InitOptions::new(installation.clone())
        });
        let dir = ok(primary.scratch_dir("standby"));
        primary.tool("pg_basebackup", &["-D", &dir.display().to_string(), "-c", "fast", "-R", "--no-sync"]);
        let mut standby = TestPg::attach(installation, &dir);
        standby.set("fsync=off");
        ok(standby.start());
        ok(fs::write(dir.join("large"), large_file()));
        runtime().block_on(async {
            let (repository, id) = (in_memory().await, id_of(&primary));
            let manifest = ok(take_archived(&standby, &repository).await);
            assert_eq!(inventory(&repository, &id).await.backups, std::slice::from_ref(&manifest.backup));

            let progress = watch::Sender::new(BackupProgress::default());
            let (mut seen, source, name) = (progress.subscribe(), source_of(&standby), name());
            let options = BackupOptions { max_rate: Some(30_000), ..BackupOptions::default() };
            let taking = backup(&source, &repository, &name, &options, &progress, CancellationToken::new());
            let promote = async {
                ok(seen.wait_for(|progress| progress.done > 4 << 20).await);
                ok(standby.promote());
            };
            let (ended, ()) = soon(async { tokio::join!(taking, promote) }).await;
            let error = ended.expect_err("the standby was promoted");
            assert!(error.to_string().contains("promoted"), "{error}");
            let inventory = inventory(&repository, &id).await;
            assert_eq!((inventory.backups, inventory.unfinished_backups.len()), (vec![manifest.backup], 1));
        });
    });
}

#[test]
fn two_backups_at_once_have_names_of_their_own() {
    let pg = TestPg::start(any_major(), "");
    runtime().block_on(async {
        let repository = in_memory().await;
        let archiver = Archiver::start(&pg, &repository).await;
        let taken = tokio::join!(take(&pg, &repository), take(&pg, &repository), take(&pg, &repository));
        archiver.stop().await;
        let mut labels = [ok(taken.0), ok(taken.1), ok(taken.2)].map(|manifest| manifest.backup.label);
        labels.sort();
        assert!(labels[0] < labels[1] && labels[1] < labels[2], "{labels:?}");
        assert_eq!(inventory(&repository, &id_of(&pg)).await.backups.len(), 3);
    });
}

#[test]
fn p8_a_bad_network_to_the_repository_costs_time_and_a_dead_one_the_backup() {
    let pg = TestPg::start(any_major(), "");
    ok(fs::write(pg.data_dir().join("large"), large_file()));
    let memory = Arc::new(MemoryStore::new());
    let seed = 4711;
    runtime().block_on(async {
        let faulty = Faulty::new(memory, FaultPlan::network(0.1), seed);
        let policy = RetryPolicy { budget: Duration::from_secs(10), ..RetryPolicy::default() };
        let repository = repository(Arc::new(Retry::new(Arc::new(faulty.clone()), policy))).await;
        let (id, archiver) = (id_of(&pg), Archiver::start(&pg, &repository).await);
        let manifest = ok(take(&pg, &repository).await);
        assert!(faulty.faults() > 0, "seed {seed}: no fault was met");
        let files = files_of(&repository, &id, &manifest).await;
        contents(&repository, &id, &manifest, &files).await; // compares the checksums

        archiver.stop().await;
        faulty.set_plan(FaultPlan::none());
        let progress = watch::Sender::new(BackupProgress::default());
        let (mut seen, source, name) = (progress.subscribe(), source_of(&pg), name());
        let options = BackupOptions { max_rate: Some(50_000), ..BackupOptions::default() };
        let taking = backup(&source, &repository, &name, &options, &progress, CancellationToken::new());
        let cut = async {
            ok(seen.wait_for(|progress| progress.done > 8 << 20).await);
            faulty.set_plan(FaultPlan { before: 1.0, ..FaultPlan::none() });
        };
        let (ended, ()) = soon(async { tokio::join!(taking, cut) }).await;
        let error = ended.expect_err("nothing can be put");
        assert!(matches!(error, BackupError::Repository(_)) && error.is_retryable(), "{error}");
        faulty.set_plan(FaultPlan::none());
        assert_eq!(inventory(&repository, &id).await.backups, [manifest.backup]);
    });
}

/// `pgkeep backup` as a user runs it: with no `pgkeep run` beside, it streams the WAL itself.
#[test]
fn the_command_archives_the_wal_it_needs_and_prints_what_it_made() {
    let pg = TestPg::start(any_major(), "");
    pg.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n");
    let dir = ok(tempfile::tempdir());
    let (repository_dir, key_file, config): (PathBuf, PathBuf, PathBuf) =
        (dir.path().join("repository"), dir.path().join("main.key"), dir.path().join("pgkeep.toml"));
    let key = ok(KeyFile::generate());
    write_private(&key_file, secrecy::ExposeSecret::expose_secret(&key.render()));
    let template = pgkeep::config::Template {
        cluster: "main",
        conninfo: &pg.conninfo(),
        slot: "pgkeep",
        repository: "main",
        place: pgkeep::config::NewPlace::Directory(&repository_dir),
        key_file: &key_file,
        write_only: false,
    };
    ok(fs::write(&config, ok(template.render(&config))));
    runtime().block_on(async {
        let store = ok(pgkeep::store::fs::FsStore::create(&repository_dir).await);
        ok(Repository::create("main", Arc::new(store), &key).await)
    });
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_pgkeep"));
        let output = ok(command.arg("--config").arg(&config).args(arguments).output());
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.code(), text.into_owned(), errors.into_owned())
    };
    let (code, text, errors) = run(&["backup", "--json", "-q"]);
    assert_eq!(code, Some(0), "{text}{errors}");
    let info: pgkeep::catalog::records::BackupInfo = ok(serde_json::from_str(&text));
    let (code, text, errors) = run(&["backup", "-q"]);
    assert!(code == Some(0) && text.contains("is complete") && text.contains("restorable from"), "{text}{errors}");
    runtime().block_on(async {
        let store = ok(pgkeep::store::fs::FsStore::open(&repository_dir).await);
        let repository = ok(Repository::open("main", Arc::new(store), key).await);
        let inventory = inventory(&repository, &id_of(&pg)).await;
        assert_eq!((inventory.backups.len(), &inventory.backups[0]), (2, &info));
        let manifest = ok(repository.get_manifest(&id_of(&pg), info.label).await);
        assert!(manifest.tables.iter().all(|part| part.part.kind == PartKind::Files));
    });
    assert_eq!(pg.sql("SELECT active FROM pg_replication_slots WHERE slot_name = 'pgkeep'"), "f");
}

fn write_private(path: &Path, text: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = ok(fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path));
    ok(file.write_all(text.as_bytes()));
}
