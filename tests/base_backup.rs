//! Base backups from real servers of every major that is found, in both dialects of the protocol.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use pgkeep::pg::control_file::ControlFile;
use pgkeep::pg::instance::{InitOptions, Installation, StopMode, give_to_server_user};
use pgkeep::pg::tar::{EntryKind, TarEntry, TarEvent, TarReader};
use pgkeep::pg::{
    BackupEvent, BaseBackup, BaseBackupOptions, CheckpointSpeed, ConnInfo, ConnectOptions, PgError, Replication,
    Tablespace,
};
use pgkeep::types::{Lsn, TimelineId};
use support::{TestPg, any_major, for_each_major, major, majors, ok, wait_until};

type Archive = BTreeMap<PathBuf, (TarEntry, Bytes)>;

/// An archive that is being read, and its member whose contents are coming in.
type Open = (Option<u32>, TarReader, Archive, Option<(TarEntry, BytesMut)>);

/// A backup in memory.
#[derive(Default)]
struct Taken {
    start: Option<(Lsn, TimelineId)>,
    tablespaces: Vec<Tablespace>,
    /// By tablespace; `None` is the base directory.
    archives: BTreeMap<Option<u32>, Archive>,
    /// Which archives ended with two zero blocks.
    ended: Vec<Option<u32>>,
    /// In the order they came: where pg_control is matters.
    last_of_base: PathBuf,
    manifest: Vec<u8>,
    warnings: Vec<String>,
    bytes: u64,
    progress: Vec<u64>,
    last: Option<BackupEvent>,
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

async fn begin(pg: &TestPg, options: &BaseBackupOptions, timeout: Duration) -> Result<BaseBackup, PgError> {
    let info: ConnInfo = pg.conninfo().parse()?;
    let connect = ConnectOptions { timeout, ..ConnectOptions::default() };
    Replication::connect(&info, &connect).await?.base_backup(options).await
}

async fn take(mut backup: BaseBackup) -> Result<Taken, PgError> {
    let mut taken = Taken::default();
    let mut current: Option<Open> = None;
    loop {
        let event = backup.next().await?;
        let archive_is_over =
            !matches!(event, Some(BackupEvent::Data(_) | BackupEvent::Progress(_) | BackupEvent::Warning(_)));
        if archive_is_over && let Some((space, reader, mut archive, open)) = current.take() {
            ok(reader.finish());
            if let Some((entry, contents)) = open {
                taken.last_of_base = entry.path.clone();
                archive.insert(entry.path.clone(), (entry, contents.freeze()));
            }
            assert!(taken.archives.insert(space, archive).is_none());
        }
        match event {
            None => return Ok(taken),
            Some(BackupEvent::Started { start, timeline, tablespaces }) => {
                (taken.start, taken.tablespaces) = (Some((start, timeline)), tablespaces);
            }
            Some(BackupEvent::Archive { tablespace }) => {
                current = Some((tablespace, TarReader::new(), Archive::new(), None));
            }
            Some(BackupEvent::Data(data)) => {
                taken.bytes += data.len() as u64;
                let (space, reader, archive, open) = current.as_mut().expect("data belongs to an archive");
                reader.push(data);
                while let Some(event) = ok(reader.next_event()) {
                    match event {
                        TarEvent::Entry(entry) => {
                            if let Some((entry, contents)) = open.replace((entry, BytesMut::new())) {
                                archive.insert(entry.path.clone(), (entry, contents.freeze()));
                            }
                        }
                        TarEvent::Data(data) => open.as_mut().expect("a file").1.extend_from_slice(&data),
                        TarEvent::End => taken.ended.push(*space),
                    }
                }
            }
            Some(BackupEvent::Manifest(data)) => taken.manifest.extend_from_slice(&data),
            Some(BackupEvent::Progress(bytes)) => taken.progress.push(bytes),
            Some(BackupEvent::Warning(warning)) => taken.warnings.push(warning),
            Some(last @ (BackupEvent::Finished { .. } | BackupEvent::Damaged { .. })) => taken.last = Some(last),
        }
    }
}

fn take_now(pg: &TestPg, options: &BaseBackupOptions) -> Taken {
    ok(runtime().block_on(async { take(begin(pg, options, Duration::from_secs(30)).await?).await }))
}

/// Members without what differs between two backups of a cluster at rest.
fn listing(archive: &Archive) -> BTreeMap<PathBuf, (EntryKind, u32)> {
    let comparable = archive.values().filter(|(entry, _)| {
        // pg_basebackup asks for tablespace_map instead of links.
        entry.path != Path::new("tablespace_map") && !matches!(entry.kind, EntryKind::Symlink { .. })
    });
    comparable.map(|(entry, _)| (entry.path.clone(), (entry.kind.clone(), entry.mode))).collect()
}

/// pg_basebackup's tar, read by another implementation than ours.
fn foreign_listing(path: &Path) -> BTreeMap<PathBuf, (EntryKind, u32)> {
    let mut archive = tar::Archive::new(ok(fs::File::open(path)));
    let entries = ok(archive.entries()).map(|entry| {
        let entry = ok(entry);
        let kind = match entry.header().entry_type() {
            tar::EntryType::Directory => EntryKind::Directory,
            tar::EntryType::Regular => EntryKind::File { size: entry.size() },
            other => panic!("{other:?} in pg_basebackup's archive"),
        };
        let path = ok(entry.path()).components().filter(|part| *part != Component::CurDir).collect::<PathBuf>();
        (path, (kind, ok(entry.header().mode()) & 0o7777))
    });
    entries.filter(|(path, _)| path != Path::new("tablespace_map")).collect()
}

/// Writes a backup out as a data directory, with tablespaces under `spaces`.
fn unpack(taken: &Taken, into: &Path, spaces: &Path) {
    let write = |root: &Path, archive: &Archive| {
        for (path, (entry, contents)) in archive {
            let place = root.join(path);
            match &entry.kind {
                EntryKind::Directory => ok(fs::create_dir_all(&place)),
                EntryKind::File { size } => {
                    assert_eq!(*size, contents.len() as u64);
                    ok(ok(fs::File::create(&place)).write_all(contents));
                }
                EntryKind::Symlink { .. } => {
                    ok(symlink(spaces.join(path.file_name().expect("an oid")), &place));
                }
            }
        }
    };
    for (space, archive) in &taken.archives {
        match space {
            None => write(into, archive),
            Some(oid) => {
                let root = spaces.join(oid.to_string());
                ok(fs::create_dir_all(&root));
                write(&root, archive);
            }
        }
    }
    ok(fs::write(into.join("backup_manifest"), &taken.manifest));
    ok(give_to_server_user(spaces));
}

fn with_tablespaces(installation: &Installation) -> TestPg {
    let conf = "autovacuum = off\nwal_keep_size = 512MB"; // the WAL is copied at the end
    let pg = TestPg::start(installation, conf);
    for name in ["one", "two"] {
        let dir = ok(pg.scratch_dir(name));
        pg.sql(&format!("CREATE TABLESPACE {name} LOCATION '{}'", dir.display()));
    }
    pg.sql("CREATE TABLE a TABLESPACE one AS SELECT n, repeat('x', 100) AS t FROM generate_series(1, 20000) n");
    pg.sql("CREATE TABLE b TABLESPACE two AS SELECT n FROM generate_series(1, 500) n");
    pg.sql("CREATE TABLE c AS SELECT n, md5(n::text) AS m FROM generate_series(1, 30000) n");
    pg.sql("CREATE UNLOGGED TABLE u AS SELECT 1 AS n");
    pg
}

#[test]
fn pitfall_14_a_backup_of_every_major_holds_what_pg_basebackup_holds_and_starts() {
    for_each_major(|installation| {
        let pg = with_tablespaces(installation);
        let taken = take_now(&pg, &BaseBackupOptions::new("it's a 'label'"));

        // What was announced came, and ended as this dialect ends it.
        let (start, timeline) = taken.start.expect("it started");
        let Some(BackupEvent::Finished { end, timeline: end_timeline }) = taken.last else {
            panic!("{:?}", taken.last)
        };
        assert!(start < end && timeline == TimelineId::FIRST && end_timeline == timeline);
        assert_eq!(taken.archives.len(), 3);
        assert_eq!(taken.ended.len(), if installation.major >= 15 { 3 } else { 0 });
        assert_eq!(taken.tablespaces.iter().map(|space| space.oid.is_some()).collect::<Vec<_>>(), [true, true, false]);
        let announced: u64 = taken.tablespaces.iter().filter_map(|space| space.size_bytes).sum();
        assert!(announced > 1 << 20 && announced < taken.bytes * 2, "{announced} of {}", taken.bytes);
        if installation.major >= 15 {
            assert!(!taken.progress.is_empty() && taken.progress.is_sorted());
        }
        assert_eq!(taken.warnings, Vec::<String>::new());

        // Its head and its tail.
        let base = &taken.archives[&None];
        let label = String::from_utf8_lossy(&base[Path::new("backup_label")].1).into_owned();
        assert!(label.contains("LABEL: it's a 'label'\n") && label.contains(&format!("START WAL LOCATION: {start}")));
        assert!(!base.contains_key(Path::new("tablespace_map")));
        assert_eq!(taken.last_of_base, Path::new("global/pg_control"));
        let control = ok(ControlFile::parse(&base[Path::new("global/pg_control")].1));
        assert_eq!((control.major, control.redo), (installation.major, start));
        for space in taken.tablespaces.iter().filter(|space| space.oid.is_some()) {
            let link = Path::new("pg_tblspc").join(space.oid.map(|oid| oid.to_string()).unwrap_or_default());
            let target = PathBuf::from(space.location.as_deref().expect("a location"));
            assert_eq!(base[&link].0.kind, EntryKind::Symlink { target });
        }

        // The same members as pg_basebackup's.
        let other = ok(pg.scratch_dir("other"));
        pg.tool(
            "pg_basebackup",
            &["-D", &other.display().to_string(), "-F", "t", "-X", "none", "-c", "fast", "--no-sync"],
        );
        for (space, archive) in &taken.archives {
            let name = space.map_or("base".to_owned(), |oid| oid.to_string());
            let (mut ours, mut theirs) = (listing(archive), foreign_listing(&other.join(format!("{name}.tar"))));
            for listing in [&mut ours, &mut theirs] {
                listing.remove(Path::new("backup_label")); // another label, another length
            }
            assert_eq!(ours, theirs, "{name}");
        }

        // PostgreSQL's own judge, and a start.
        let (data, spaces) = (ok(pg.scratch_dir("restored")), ok(pg.scratch_dir("spaces")));
        unpack(&taken, &data, &spaces);
        for file in ok(fs::read_dir(pg.data_dir().join("pg_wal"))) {
            let file = ok(file);
            if file.file_name().len() == 24 {
                ok(fs::copy(file.path(), data.join("pg_wal").join(file.file_name())));
            }
        }
        let mut restored = TestPg::attach(installation, &data);
        pg.tool("pg_verifybackup", &["-q", &data.display().to_string()]);
        let sum = "SELECT (SELECT sum(n) FROM a), (SELECT sum(n) FROM b), (SELECT count(DISTINCT m) FROM c)";
        let want = pg.sql(sum);
        ok(restored.start());
        assert_eq!(restored.sql(sum), want);
        assert_eq!(restored.sql("SELECT count(*) FROM u"), "0", "unlogged tables come back empty");
    });
}

#[test]
fn pitfall_15_a_corrupt_page_is_an_outcome_of_its_own() {
    for_each_major(|installation| {
        let mut pg = TestPg::start(installation, "autovacuum = off");
        pg.sql("CREATE TABLE t AS SELECT n FROM generate_series(1, 10000) n");
        let file = pg.data_dir().join(pg.sql("SELECT pg_relation_filepath('t')"));
        ok(pg.stop(StopMode::Fast)); // nothing of it stays in memory
        let mut bytes = ok(fs::read(&file));
        for page in [3, 7] {
            bytes[page * 8192 + 5000] ^= 0xFF;
        }
        ok(fs::write(&file, &bytes));
        ok(pg.start());

        let taken = take_now(&pg, &BaseBackupOptions::new("corrupt"));
        let Some(BackupEvent::Damaged { end, reason, warnings, .. }) = &taken.last else { panic!("{:?}", taken.last) };
        assert!(*end > taken.start.expect("it started").0);
        assert!(reason.contains("checksum verification failure"), "{reason}");
        let name = file.file_name().expect("a name").to_string_lossy().into_owned();
        assert!(warnings.iter().any(|warning| warning.contains(&name)), "{warnings:?}");
        assert_eq!(&taken.warnings, warnings);
        assert!(!taken.manifest.is_empty(), "all of it came, and is worth keeping");

        let unchecked = BaseBackupOptions { verify_checksums: false, ..BaseBackupOptions::new("corrupt") };
        assert!(matches!(take_now(&pg, &unchecked).last, Some(BackupEvent::Finished { .. })));
    });
}

#[test]
fn pitfall_16_a_spread_checkpoint_hits_no_deadline() {
    for installation in [Some(any_major()), major(13).or(major(14))].into_iter().flatten() {
        let pg = TestPg::start(
            installation,
            "checkpoint_timeout = 30s\ncheckpoint_completion_target = 0.9\nbgwriter_lru_maxpages = 0\nautovacuum = off",
        );
        pg.sql("CHECKPOINT");
        // Each page that is written is followed by a pause of 100 ms as long as the checkpoint is ahead of its time.
        pg.sql("CREATE TABLE t AS SELECT n, repeat('x', 2000) FROM generate_series(1, 160) n");
        let silence = Duration::from_millis(1500);
        let spread = CheckpointSpeed::Spread;
        let options = BaseBackupOptions { checkpoint: spread, silence, ..BaseBackupOptions::new("spread") };
        let since = Instant::now();
        let (waited, taken) = runtime().block_on(async {
            let mut backup = ok(begin(&pg, &options, silence).await);
            let first = ok(backup.next().await);
            assert!(matches!(first, Some(BackupEvent::Started { .. })), "{first:?}");
            (since.elapsed(), ok(take(backup).await))
        });
        assert!(waited > silence * 2, "the checkpoint took {waited:?}: this test proves nothing");
        assert!(matches!(taken.last, Some(BackupEvent::Finished { .. })));
    }
}

/// A backup that has begun and that the server has not finished sending: what fits into buffers is far less.
async fn under_way(pg: &TestPg, silence: Duration) -> BaseBackup {
    let options = BaseBackupOptions { silence, ..BaseBackupOptions::new("under way") };
    let mut backup = ok(begin(pg, &options, Duration::from_secs(30)).await);
    while !matches!(ok(backup.next().await), Some(BackupEvent::Data(_))) {}
    backup
}

async fn first_error(mut backup: BaseBackup) -> PgError {
    loop {
        match backup.next().await {
            Ok(Some(BackupEvent::Finished { .. } | BackupEvent::Damaged { .. }) | None) => panic!("it finished"),
            Ok(Some(_)) => {}
            Err(error) => {
                assert!(backup.next().await.is_err(), "an error is the end");
                return error;
            }
        }
    }
}

#[test]
fn a_server_that_falls_silent_is_given_up() {
    let pg = TestPg::start(any_major(), "");
    let error = runtime().block_on(async {
        let backup = under_way(&pg, Duration::from_millis(500)).await;
        let walsender = pg.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walsender'");
        let pid = rustix::process::Pid::from_raw(walsender.parse().expect("a pid")).expect("a pid");
        ok(rustix::process::kill_process(pid, rustix::process::Signal::STOP));
        let error = first_error(backup).await;
        ok(rustix::process::kill_process(pid, rustix::process::Signal::CONT));
        error
    });
    assert!(matches!(error, PgError::Timeout { .. }) && error.is_retryable(), "{error}");
}

#[test]
fn a_server_that_crashes_ends_the_backup_and_dropping_one_ends_it_on_the_server() {
    let mut pg = TestPg::start(any_major(), "");
    runtime().block_on(async {
        drop(under_way(&pg, Duration::from_secs(30)).await);
        wait_until("the walsender to end", Duration::from_secs(20), || {
            pg.sql("SELECT count(*) FROM pg_stat_progress_basebackup") == "0"
        });
        let backup = under_way(&pg, Duration::from_secs(30)).await;
        ok(pg.kill());
        let error = first_error(backup).await;
        assert!(matches!(error, PgError::Closed { .. } | PgError::Lost { .. }) && error.is_retryable(), "{error}");
    });
}

#[test]
fn pitfall_19_a_standby_promoted_in_the_middle_fails_the_backup() {
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
        let whole = take_now(&standby, &BaseBackupOptions::new("standby"));
        assert!(matches!(whole.last, Some(BackupEvent::Finished { .. })), "a standby can be backed up");
        let error = runtime().block_on(async {
            let backup = under_way(&standby, Duration::from_secs(30)).await;
            ok(standby.promote());
            first_error(backup).await
        });
        assert_eq!(error.sqlstate(), Some("55000"), "{error}");
    });
}

#[test]
fn a_session_goes_on_after_a_backup_and_a_bad_option_is_refused_before_it() {
    let pg = TestPg::start(majors().last().expect("a server"), "");
    runtime().block_on(async {
        let bad = BaseBackupOptions { max_rate: Some(1), ..BaseBackupOptions::new("x") };
        let error = begin(&pg, &bad, Duration::from_secs(30)).await.expect_err("1 kB/s");
        assert!(matches!(error, PgError::Settings { .. }) && error.to_string().contains("32"), "{error}");
        let mut backup = ok(begin(&pg, &BaseBackupOptions::new("x"), Duration::from_secs(30)).await);
        while ok(backup.next().await).is_some() {}
        let mut replication = backup.into_replication();
        assert_eq!(ok(replication.identify_system().await).timeline, TimelineId::FIRST);
    });
}
