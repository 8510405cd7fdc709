//! `pgkeep wal push` and `pgkeep wal fetch` as PostgreSQL runs them: real servers, the real program, real recoveries.

#[path = "hooks/push.rs"]
mod push;
mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgkeep::catalog::records::WalRangeNote;
use pgkeep::catalog::{Put, Repository};
use pgkeep::pg::instance::{ServerUser, StopMode, give_to_server_user};
use pgkeep::seal::KeyFile;
use pgkeep::store::fs::FsStore;
use pgkeep::types::{Branch, ClusterId, Digest, SegmentNumber, SegmentSize, TimelineId};
use pgkeep::wal::pad_open_segment;
use secrecy::ExposeSecret;
use support::{Installation, TestPg, any_major, for_each_major, majors, ok, wait_until};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// A place that the server's user can reach: the program, a configuration, a key, a repository.
struct Place {
    dir: TempDir,
    key: KeyFile,
}

struct Run {
    code: Option<i32>,
    stderr: String,
}

impl Place {
    fn new() -> Place {
        let dir = ok(tempfile::Builder::new().prefix("pgkhooks").tempdir_in("/tmp"));
        ok(fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)));
        ok(fs::copy(env!("CARGO_BIN_EXE_pgkeep"), dir.path().join("pgkeep")));
        ok(fs::set_permissions(dir.path().join("pgkeep"), fs::Permissions::from_mode(0o755)));
        let place = Place { dir, key: ok(KeyFile::generate()) };
        place.write_key("main.key", &place.key);
        place.add_repository("main", "main.key");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write_key(&self, name: &str, key: &KeyFile) {
        ok(fs::write(self.path(name), key.render().expose_secret()));
        ok(fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)));
        ok(give_to_server_user(&self.path(name)));
    }

    /// A repository and its configuration file, `<name>.toml`.
    fn add_repository(&self, name: &str, key_file: &str) {
        ok(fs::create_dir(self.path(name)));
        block_on(async {
            let store = Arc::new(ok(FsStore::create(&self.path(name)).await));
            ok(Repository::create(name, store, &self.key).await);
        });
        self.give(name);
        self.write_config(&format!("{name}.toml"), &self.path(name), key_file);
    }

    fn write_config(&self, name: &str, repository: &Path, key_file: &str) {
        let text = format!(
            "[repository.main]\npath = {:?}\nkey_file = {key_file:?}\n\
             [cluster.main]\nconninfo = \"host=/nonexistent\"\nrepositories = [\"main\"]\n",
            repository.display().to_string(),
        );
        ok(fs::write(self.path(name), text));
    }

    /// What we wrote as root becomes the server's.
    fn give(&self, name: &str) {
        ok(give_to_server_user(&self.path(name)));
    }

    fn repository(&self, name: &str) -> Repository {
        block_on(async {
            let store = Arc::new(ok(FsStore::open(&self.path(name)).await));
            ok(Repository::open(name, store, self.key.clone()).await)
        })
    }

    /// Files below a repository whose path contains `part`.
    fn objects(&self, name: &str, part: &str) -> Vec<PathBuf> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in ok(fs::read_dir(dir)) {
                let path = ok(entry).path();
                if path.is_dir() { walk(&path, found) } else { found.push(path) }
            }
        }
        let (root, mut found) = (self.path(name), Vec::new());
        walk(&root, &mut found);
        found.retain(|path| path.strip_prefix(&root).is_ok_and(|below| below.to_string_lossy().contains(part)));
        found.sort();
        found
    }

    /// The one object whose name contains `part`.
    #[track_caller]
    fn object(&self, name: &str, part: &str) -> PathBuf {
        let found = self.objects(name, part);
        assert_eq!(found.len(), 1, "{part}: {found:?}");
        found[0].clone()
    }

    fn command(&self, config: &str, rest: &str) -> String {
        format!("exec {} --config {} {rest}", self.path("pgkeep").display(), self.path(config).display())
    }

    fn archiving(&self, config: &str) -> String {
        format!("archive_mode = on\narchive_command = '{}'\n", self.command(config, "wal push %p"))
    }

    fn restoring(&self, config: &str, options: &str) -> String {
        format!("restore_command = '{}'\n", self.command(config, &format!("wal fetch {options} %f %p")))
    }

    /// The program as the server runs it: its user, in its data directory.
    fn run(&self, config: &str, data: &Path, args: &[&str]) -> Run {
        let mut command = Command::new(self.path("pgkeep"));
        command.arg("--config").arg(self.path(config)).args(args).current_dir(data);
        command.env_remove("PGKEEP_CONFIG").env_remove("PGKEEP_LOG");
        if let Some(user) = ok(ServerUser::find()) {
            command.uid(user.uid).gid(user.gid);
        }
        let output = ok(command.output());
        Run { code: output.status.code(), stderr: String::from_utf8_lossy(&output.stderr).into_owned() }
    }

    fn push(&self, data: &Path, file: &Path) -> Run {
        self.run("main.toml", data, &["wal", "push", &file.display().to_string()])
    }

    fn fetch(&self, data: &Path, options: &[&str], name: &str) -> (Run, Option<Vec<u8>>) {
        let dest = data.join("fetched");
        let _ = fs::remove_file(&dest);
        let run = self.run("main.toml", data, &[&["wal", "fetch"], options, &[name, "fetched"]].concat());
        (run, fs::read(&dest).ok())
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    ok(tokio::runtime::Builder::new_current_thread().enable_all().build()).block_on(work)
}

fn mib() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn number_of(segment: &str) -> SegmentNumber {
    SegmentNumber::from_file_name(segment, mib()).unwrap().1
}

fn system_of(data: &Path) -> ClusterId {
    let control = ok(fs::read(data.join("global/pg_control")));
    let control = ok(pgkeep::pg::control_file::ControlFile::parse(&control));
    ClusterId { name: ok("main".parse()), system: control.system }
}

/// Inserts `rows` rows and closes the segment; waits until it is archived. The segment's name.
#[track_caller]
fn insert_and_switch(pg: &TestPg, rows: u32) -> String {
    pg.sql(&format!("INSERT INTO t SELECT generate_series(1, {rows})"));
    let segment = pg.sql("SELECT pg_walfile_name(pg_switch_wal())");
    wait_until("the segment to be archived", PATIENCE, || {
        pg.sql(&format!("SELECT coalesce(left(last_archived_wal, 24) >= '{segment}', false) FROM pg_stat_archiver"))
            == "t"
    });
    segment
}

/// A primary with segments of 1 MiB that archives through the hook, with an empty table `t`.
fn primary(installation: &Installation, place: &Place) -> TestPg {
    let pg = TestPg::start_segmented(installation, 1, &place.archiving("main.toml"));
    pg.sql("CREATE TABLE t (i int)");
    pg
}

/// A base backup without any WAL: all of it has to come through restore_command.
fn base_backup(pg: &TestPg) -> PathBuf {
    let dir = ok(pg.scratch_dir("base"));
    pg.tool("pg_basebackup", &["-D", &dir.display().to_string(), "-c", "fast", "-X", "none", "--no-sync"]);
    dir
}

/// A copy of the base backup that will recover as `conf` says. Nobody connects before recovery has ended.
fn recovering(place: &Place, installation: &Installation, base: &Path, name: &str, conf: &str) -> TestPg {
    let dir = place.path(name);
    assert!(ok(Command::new("cp").arg("-a").arg(base).arg(&dir).status()).success());
    let auto = dir.join("postgresql.auto.conf");
    let text = format!("{}archive_mode = off\nhot_standby = off\n{conf}", ok(fs::read_to_string(&auto)));
    ok(fs::write(&auto, text));
    ok(fs::write(dir.join("recovery.signal"), ""));
    TestPg::attach(installation, &dir)
}

/// Recovery fails, and the server has not become a primary on a new timeline.
#[track_caller]
fn assert_aborts(mut pg: TestPg, because: &str) {
    let started = pg.start();
    let log = pg.log();
    assert!(started.is_err(), "it started\n{log}");
    assert!(log.contains(because), "no {because:?} in\n{log}");
    assert!(!log.contains("selected new timeline"), "promoted\n{log}");
    let histories = ok(fs::read_dir(pg.data_dir().join("pg_wal")));
    let new = histories.map(|entry| ok(entry).file_name().to_string_lossy().into_owned());
    let new: Vec<String> = new.filter(|name| name.ends_with(".history")).collect();
    assert!(new.iter().all(|name| name.as_str() <= "00000002.history"), "{new:?}");
}

fn rows(pg: &TestPg) -> String {
    pg.sql("SELECT count(*) FROM t")
}

#[test]
fn archive_and_restore_through_the_hooks() {
    for_each_major(|installation| {
        let place = Place::new();
        let mut pg = primary(installation, &place);
        let base = base_backup(&pg);
        let segments: Vec<String> = (0..3).map(|_| insert_and_switch(&pg, 100)).collect();
        assert_eq!(pg.sql("SELECT failed_count FROM pg_stat_archiver"), "0", "{}", pg.log());
        assert_eq!(place.objects("main", "/partial/").len(), 1, "the .backup file");
        for segment in &segments {
            let (run, bytes) = place.fetch(pg.data_dir(), &[], segment);
            assert_eq!(run.code, Some(0), "{}", run.stderr);
            let archived = fs::read(pg.data_dir().join("pg_wal").join(segment));
            assert!(archived.is_err() || archived.is_ok_and(|own| Some(own) == bytes), "{segment}");
        }
        // Without a target, to the end of the archive; the new timeline is archived in its turn.
        let conf = place.restoring("main.toml", "") + &place.archiving("main.toml");
        let mut restored = recovering(&place, installation, &base, "restored", &conf);
        ok(restored.start());
        wait_until("the end of recovery", PATIENCE, || restored.sql("SELECT pg_is_in_recovery()") == "f");
        assert_eq!(rows(&restored), "300");
        let first = insert_and_switch(&restored, 10);
        assert!(first.starts_with("00000002"));
        assert_eq!(restored.sql("SELECT failed_count FROM pg_stat_archiver"), "0", "{}", restored.log());
        let (run, history) = place.fetch(restored.data_dir(), &[], "00000002.history");
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert_eq!(history, fs::read(restored.data_dir().join("pg_wal/00000002.history")).ok());
        ok(pg.stop(StopMode::Fast));
        ok(restored.stop(StopMode::Fast));
    });
}

/// The segment before one.
fn one_before(segment: &str) -> String {
    SegmentNumber::new(number_of(segment).get() - 1).file_name(timeline(1), mib())
}

/// A stopped primary, and two segments that it closed early; the one before the second is full.
fn stopped(place: &Place) -> (TestPg, Vec<String>) {
    let mut pg = primary(any_major(), place);
    pg.append_conf("wal_keep_size = 1GB").unwrap();
    ok(pg.reload());
    // The second time enough for segments that are full, and do not end in zeros.
    let segments = [100, 60_000].map(|rows| insert_and_switch(&pg, rows)).into();
    ok(pg.stop(StopMode::Fast));
    (pg, segments)
}

#[test]
fn pitfall_21_the_same_content_is_success_and_other_content_an_alarm() {
    let place = Place::new();
    let (pg, segments) = stopped(&place);
    let data = pg.data_dir();
    let segment = one_before(&segments[1]);
    let file = data.join("pg_wal").join(&segment);
    let object = place.object("main", &format!("{segment}.0"));
    let sealed = ok(fs::read(&object));
    // Another process, another salt.
    for _ in 0..2 {
        let run = place.push(data, &file);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
    }
    // Under another content key, too: as if it had been archived yesterday.
    ok(fs::remove_file(&object));
    let cluster = system_of(data);
    let bytes = ok(fs::read(&file));
    let put = |bytes: &[u8]| {
        let repository = place.repository("main");
        block_on(async {
            let (branch, number, end) = (Branch::first(timeline(1)), number_of(&segment), 1 << 20);
            let mut sealer = ok(repository.seal_wal(&cluster, branch, number, mib(), (0, end)).await);
            ok(sealer.push(bytes));
            let sealed = ok(sealer.finish(end, note(&repository, bytes)));
            ok(repository.put_range(&sealed).await)
        })
    };
    assert_eq!(put(&bytes), Put::New);
    place.give("main");
    assert_ne!(ok(fs::read(&object)), sealed);
    assert_eq!(place.push(data, &file).code, Some(0));
    let sealed = ok(fs::read(&object));

    // Other content under the same name.
    let mut other = bytes.clone();
    other[5000..5008].copy_from_slice(b"differs!");
    let aside = place.path(&segment);
    ok(fs::write(&aside, &other));
    place.give(&segment);
    for _ in 0..2 {
        let run = place.push(data, &aside);
        assert_eq!(run.code, Some(1), "{}", run.stderr);
        assert!(run.stderr.contains("CONFLICT") && run.stderr.contains("/conflict/"), "{}", run.stderr);
    }
    assert_eq!(ok(fs::read(&object)), sealed, "overwritten");
    assert_eq!(place.objects("main", "/conflict/").len(), 1);
    let (run, served) = place.fetch(data, &[], &segment);
    assert_eq!((run.code, served), (Some(0), Some(bytes)));
}

fn note(repository: &Repository, bytes: &[u8]) -> WalRangeNote {
    WalRangeNote {
        writer: repository.writer(),
        server_version: 150_000,
        segment_size: mib(),
        digest_from: Digest::of(b""),
        digest_to: Some(Digest::of(bytes)),
        server_time: None,
        server_end: None,
        durable_to: None,
        conflict: None,
    }
}

/// The beginning of a segment, as streaming keeps it while the segment is open.
fn keep_open(place: &Place, repository: &str, cluster: &ClusterId, branch: Branch, segment: &str, bytes: &[u8]) {
    let opened = place.repository(repository);
    block_on(async {
        let note = WalRangeNote { digest_to: None, ..note(&opened, b"") };
        let number = number_of(segment);
        let mut tail = ok(opened.open_wal_tail(cluster, branch, number, mib(), 0, &note).await);
        ok(tail.append(tail.to(), bytes).await);
    });
    place.give(repository);
}

#[test]
fn p6_a_segment_that_is_not_what_was_streamed_is_a_conflict() {
    let place = Place::new();
    let (pg, segments) = stopped(&place);
    let (data, cluster, branch) = (pg.data_dir(), system_of(pg.data_dir()), Branch::first(timeline(1)));
    let file = data.join("pg_wal").join(&segments[1]);
    let bytes = ok(fs::read(&file));
    ok(fs::remove_file(place.object("main", &format!("{}.", segments[1]))));
    let mut streamed = bytes[..20_000].to_vec();
    streamed[10_000] ^= 1;
    keep_open(&place, "main", &cluster, branch, &segments[1], &streamed);
    let run = place.push(data, &file);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(run.stderr.contains("CONFLICT"), "{}", run.stderr);
    assert!(place.objects("main", &format!("/wal/00000001/00000000/{}", segments[1])).is_empty());
    ok(fs::remove_file(place.object("main", "/open/")));
    keep_open(&place, "main", &cluster, branch, &segments[1], &bytes[..20_000]);
    let run = place.push(data, &file);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
}

#[test]
fn p6_only_what_its_name_says_is_taken() {
    let place = Place::new();
    let (pg, segments) = stopped(&place);
    let data = pg.data_dir();
    let bytes = ok(fs::read(data.join("pg_wal").join(&segments[0])));
    // A helper indexes what was archived before, by and by.
    let kept = || {
        let mut kept = place.objects("main", "");
        kept.retain(|path| !path.to_string_lossy().contains("/index/"));
        kept
    };
    let before = kept();
    let other = TestPg::start_segmented(any_major(), 1, "");
    let refused = |data: &Path, name: &str, bytes: &[u8], because: &str| {
        let file = place.path(name);
        ok(fs::write(&file, bytes));
        place.give(name);
        let run = place.push(data, &file);
        assert_eq!(run.code, Some(1), "{name}: {}", run.stderr);
        assert!(run.stderr.contains(because), "{name}: no {because:?} in {}", run.stderr);
    };
    refused(data, "000000010000000000000F00", &bytes, "is not what its name says");
    refused(data, &segments[0], &bytes[..bytes.len() / 2], "a power of two");
    refused(data, &segments[0], &[bytes.clone(), bytes.clone()].concat(), "this cluster's segments");
    refused(data, &segments[0], &vec![0; 1 << 20], "is not what its name says");
    refused(data, "00000002.history", b"no history", "is no history file");
    refused(data, "00000002.history", b"", "1 to");
    refused(data, "RECOVERYXLOG", &bytes, "is not a WAL file name");
    // Another cluster's file, and another cluster's server.
    refused(other.data_dir(), &segments[0], &bytes, "system identifier");
    let foreign = other.sql("SELECT pg_walfile_name(pg_switch_wal())");
    let foreign = other.data_dir().join("pg_wal").join(foreign);
    let run = place.push(other.data_dir(), &foreign);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("is the cluster with system identifier"), "{}", run.stderr);
    assert_eq!(kept(), before, "something was stored");
    // The open segment under its full name: what the server had there before follows its end, or zeros do.
    let open = number_of(&segments[1]).next().file_name(timeline(1), mib());
    let run = place.push(data, &data.join("pg_wal").join(&open));
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    let full = one_before(&segments[1]);
    let padded = padded(&ok(fs::read(data.join("pg_wal").join(&full)))[..300_000], &full);
    ok(fs::remove_file(place.object("main", &format!("{full}.0"))));
    refused(data, &full, &padded, "is not complete");
    assert!(place.objects("main", &format!("{full}.0")).is_empty(), "something was stored");
}

/// A segment that is still being written, as `wal fetch` serves it.
fn padded(beginning: &[u8], segment: &str) -> Vec<u8> {
    let mut bytes = beginning.to_vec();
    ok(pad_open_segment(&mut bytes, number_of(segment).start(mib()), mib()));
    bytes
}

#[test]
fn pitfall_22_never_above_125() {
    let place = Place::new();
    let (pg, segments) = stopped(&place);
    let data = pg.data_dir();
    let segment = format!("pg_wal/{}", segments[0]);
    place.write_key("other.key", &ok(KeyFile::generate()));
    place.write_config("wrong-key.toml", &place.path("main"), "other.key");
    place.write_config("nowhere.toml", &place.path("nowhere"), "main.key");
    ok(fs::write(place.path("garbage.toml"), [0xFF; 100]));
    let cases: [(&str, &[&str]); 9] = [
        ("main.toml", &["wal", "push"]),
        ("main.toml", &["wal", "push", "--nonsense", &segment]),
        ("main.toml", &["wal", "push", "pg_wal"]),
        ("main.toml", &["wal", "push", "pg_wal/000000010000000000000FFF"]),
        ("main.toml", &["wal", "push", ""]),
        ("wrong-key.toml", &["wal", "push", &segment]),
        ("nowhere.toml", &["wal", "push", &segment]),
        ("garbage.toml", &["wal", "push", &segment]),
        ("none.toml", &["wal", "push", &segment]),
    ];
    for (config, args) in cases {
        let run = place.run(config, data, args);
        assert_eq!(run.code, Some(1), "{config} {args:?}: {}", run.stderr);
        assert!(!run.stderr.is_empty());
    }
    assert_eq!(place.run("main.toml", data, &["wal", "push", &segment]).code, Some(0));
}

#[test]
fn pitfall_23_a_fault_aborts_recovery() {
    let place = Place::new();
    let installation = any_major();
    let mut pg = primary(installation, &place);
    let base = base_backup(&pg);
    let segments: Vec<String> = (0..3).map(|_| insert_and_switch(&pg, 100)).collect();
    ok(pg.stop(StopMode::Fast));
    place.write_key("other.key", &ok(KeyFile::generate()));
    place.write_config("wrong-key.toml", &place.path("main"), "other.key");
    place.write_config("nowhere.toml", &place.path("nowhere"), "main.key");
    let aborts = |name: &str, config: &str, options: &str, because: &str| {
        let conf = place.restoring(config, options);
        assert_aborts(recovering(&place, installation, &base, name, &conf), because);
    };
    aborts("r1", "nowhere.toml", "", "FATAL:  could not restore file");
    aborts("r2", "wrong-key.toml", "", "FATAL:  could not restore file");
    aborts("r3", "main.toml", "--nonsense", "FATAL:  could not restore file");
    let object = place.object("main", &format!("{}.", segments[1]));
    let mut bytes = ok(fs::read(&object));
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    ok(fs::write(&object, &bytes));
    aborts("r4", "main.toml", "", "does not open");
    // P7: a hole, with the answer that would be wrong: 1.
    ok(fs::remove_file(&object));
    aborts("r5", "main.toml", "", "this is a hole, not the end");
}

#[test]
fn p7_a_hole_never_promotes() {
    // The oldest, and the newest, which asks ahead. Each waits for the hole to be filled, and 15 is seen elsewhere.
    for installation in majors().iter().take(1).chain(majors().last()) {
        let place = Place::new();
        let mut pg = primary(installation, &place);
        let base = base_backup(&pg);
        let segments: Vec<String> = (0..3).map(|_| insert_and_switch(&pg, 100)).collect();
        ok(pg.stop(StopMode::Fast));
        ok(fs::remove_file(place.object("main", &format!("{}.", segments[1]))));
        let conf = place.restoring("main.toml", "");
        assert_aborts(recovering(&place, installation, &base, "restored", &conf), "this is a hole, not the end");
    }
}

#[test]
fn pitfall_24_what_is_not_there_yet_is_said_fast() {
    let place = Place::new();
    let (pg, segments) = stopped(&place);
    let data = pg.data_dir();
    let beyond = number_of(&segments[1]).next().next().next().file_name(timeline(1), mib());
    let partial = format!("{}.partial", segments[0]);
    let backup = format!("{}.00000028.backup", segments[0]);
    let until = number_of(&segments[1]).start(mib()).to_string();
    let way = ["--path", "00000001", "--until", until.as_str()];
    let cases: [(&[&str], &str); 8] = [
        (&[], &beyond),
        (&[], "00000002.history"),
        (&[], "00000001.history"),
        (&[], &partial),
        (&[], &backup),
        (&["--path", "00000001"], "00000002.history"),
        (&["--path", "00000001"], &beyond),
        (&way, &segments[1]),
    ];
    for (options, name) in cases {
        let since = Instant::now();
        let (run, served) = place.fetch(data, options, name);
        let took = since.elapsed();
        assert_eq!((run.code, served), (Some(1), None), "{options:?} {name}: {}", run.stderr);
        assert!(run.stderr.is_empty(), "{}", run.stderr);
        assert!(took < Duration::from_secs(2), "{name} took {took:?}");
    }
    assert_eq!(place.fetch(data, &way, &segments[0]).0.code, Some(0));
    // What is no request at all is a fault.
    for name in ["RECOVERYXLOG", "", "../x", "000000010000000000000zzz"] {
        assert_eq!(place.fetch(data, &[], name).0.code, Some(200), "{name}");
    }
    assert_eq!(place.fetch(data, &["--path", "00000002"], &segments[0]).0.code, Some(200));
    assert!(ok(fs::read_dir(data)).all(|entry| !ok(entry).file_name().to_string_lossy().starts_with(".pgkeep-")));
}

/// A primary, its base backup, and timeline 2, which forked off the end of the archive and is archived too.
struct Forked {
    place: Place,
    pg: TestPg,
    base: PathBuf,
    second: TestPg,
    /// The segments that were closed on timeline 2; the fork lies in the first one.
    on_two: Vec<String>,
}

fn forked() -> Forked {
    let place = Place::new();
    let mut pg = primary(any_major(), &place);
    let base = base_backup(&pg);
    for _ in 0..2 {
        insert_and_switch(&pg, 100);
    }
    // An open end, so that the fork lies within a segment.
    pg.sql("INSERT INTO t SELECT generate_series(1, 50)");
    let open = pg.sql("SELECT pg_walfile_name(pg_current_wal_flush_lsn())");
    let end: pgkeep::types::Lsn = ok(pg.sql("SELECT pg_current_wal_flush_lsn()").parse());
    ok(pg.stop(StopMode::Immediate));
    let (cluster, bytes) = (system_of(pg.data_dir()), ok(fs::read(pg.data_dir().join("pg_wal").join(&open))));
    let used = end.bytes_since(number_of(&open).start(mib())).unwrap() as usize;
    keep_open(&place, "main", &cluster, Branch::first(timeline(1)), &open, &bytes[..used]);
    let conf = place.restoring("main.toml", "") + &place.archiving("main.toml");
    let mut second = recovering(&place, any_major(), &base, "second", &conf);
    ok(second.start());
    wait_until("the end of recovery", PATIENCE, || second.sql("SELECT pg_is_in_recovery()") == "f");
    assert_eq!(rows(&second), "250", "the open segment is served, padded");
    let on_two: Vec<String> = (0..2).map(|_| insert_and_switch(&second, 100)).collect();
    assert_eq!(number_of(&on_two[0]), number_of(&open));
    assert_eq!(second.sql("SELECT failed_count FROM pg_stat_archiver"), "0", "{}", second.log());
    Forked { place, pg, base, second, on_two }
}

impl Forked {
    fn to_two(&self, name: &str, options: &str) -> TestPg {
        let conf = format!("{}recovery_target_timeline = 2\n", self.place.restoring("main.toml", options));
        recovering(&self.place, any_major(), &self.base, name, &conf)
    }

    /// Where timeline 2 begins, from its history file.
    fn fork(&self) -> pgkeep::types::Lsn {
        let text = ok(fs::read(self.second.data_dir().join("pg_wal/00000002.history")));
        ok(pgkeep::types::TimelineHistory::parse(timeline(2), &text)).begins_at()
    }
}

#[test]
fn p7_a_fork_whose_segment_is_missing_stops_recovery() {
    let forked = forked();
    let way = format!("--path 00000001@{},00000002", forked.fork());
    for (name, options) in [("good", ""), ("good-way", way.as_str())] {
        let mut restored = forked.to_two(name, options);
        ok(restored.start());
        assert_eq!(rows(&restored), "450", "{}", restored.log());
    }
    let object = forked.place.object("main", &format!("/wal/00000002/00000000/{}.", forked.on_two[0]));
    ok(fs::remove_file(object));
    assert_aborts(forked.to_two("missing", ""), "this is a hole, not the end");
    assert_aborts(forked.to_two("missing-way", &way), "this is a hole, not the end");
    // Nor when nothing of timeline 2 is there but its history.
    for object in forked.place.objects("main", "/wal/00000002/") {
        ok(fs::remove_file(object));
    }
    assert_aborts(forked.to_two("nothing", ""), "recovery needs it up to");
    assert_aborts(forked.to_two("nothing-way", &way), "recovery needs it up to");
}

#[test]
fn p7_a_timelines_first_segment_that_ends_before_the_fork_is_not_served() {
    let forked = forked();
    let way = format!("--path 00000001@{},00000002", forked.fork());
    let first = &forked.on_two[0];
    let (_, bytes) = forked.place.fetch(forked.second.data_dir(), &[], first);
    let bytes = bytes.unwrap();
    for object in forked.place.objects("main", "/wal/00000002/") {
        ok(fs::remove_file(object));
    }
    let cluster = system_of(forked.pg.data_dir());
    let before = forked.fork().segment_offset(mib()) as usize;
    keep_open(&forked.place, "main", &cluster, Branch::first(timeline(2)), first, &bytes[..before]);
    for (name, options) in [("short", ""), ("short-way", way.as_str())] {
        assert_aborts(forked.to_two(name, options), "recovery needs it up to");
    }
    // Some bytes behind the fork, and no record that ends in them.
    ok(fs::remove_file(forked.place.object("main", "/open/00000002/")));
    keep_open(&forked.place, "main", &cluster, Branch::first(timeline(2)), first, &bytes[..before + 10]);
    for (name, options) in [("cut", ""), ("cut-way", way.as_str())] {
        assert_aborts(forked.to_two(name, options), "not behind the fork");
    }
}

#[test]
fn pitfall_25_a_second_history_of_a_timeline_is_refused() {
    let forked = forked();
    let place = &forked.place;
    let archived: Vec<(PathBuf, Vec<u8>)> =
        place.objects("main", "").into_iter().map(|path| (path.clone(), ok(fs::read(path)))).collect();
    // A restore that does not see timeline 2's history, promoted: an identical history file, and other WAL.
    let hiding = format!(
        "restore_command = 'case %f in *.history) exit 1;; esac; {}'\n",
        place.command("main.toml", "wal fetch %f %p")
    );
    let third = recovering(place, any_major(), &forked.base, "third", &(hiding + &place.archiving("main.toml")));
    let mut third = third;
    ok(third.start());
    wait_until("the end of recovery", PATIENCE, || third.sql("SELECT pg_is_in_recovery()") == "f");
    third.sql("INSERT INTO t SELECT generate_series(1, 7)");
    assert!(third.sql("SELECT pg_walfile_name(pg_switch_wal())").starts_with("00000002"));
    wait_until("the archiver to fail", PATIENCE, || third.sql("SELECT failed_count > 0 FROM pg_stat_archiver") == "t");
    assert!(third.log().contains("CONFLICT"), "{}", third.log());
    for (path, bytes) in &archived {
        assert!(ok(fs::read(path)) == *bytes, "{} was changed", path.display());
    }
    assert!(!place.objects("main", "/conflict/00000002/").is_empty());
    // Another history file under the same number.
    let file = place.path("00000002.history");
    ok(fs::write(&file, "1\t0/2345678\tno recovery target specified\n"));
    place.give("00000002.history");
    let run = place.push(forked.pg.data_dir(), &file);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(run.stderr.contains("CONFLICT"), "{}", run.stderr);
    // Two branches of one timeline: nobody can know which one a bare restore_command means.
    let repository = place.repository("main");
    let second = Branch { timeline: timeline(2), ordinal: 1 };
    let cluster = system_of(forked.pg.data_dir());
    let (_, bytes) = place.fetch(forked.second.data_dir(), &[], &forked.on_two[0]);
    let mut other = bytes.unwrap();
    other[900_000..900_006].copy_from_slice(b"second");
    block_on(async {
        let mut sealer =
            ok(repository.seal_wal(&cluster, second, number_of(&forked.on_two[0]), mib(), (0, 1 << 20)).await);
        ok(sealer.push(&other));
        ok(repository.put_range(&ok(sealer.finish(1 << 20, note(&repository, &other)))).await);
    });
    place.give("main");
    let (run, served) = place.fetch(forked.pg.data_dir(), &[], &forked.on_two[0]);
    assert_eq!((run.code, served), (Some(200), None));
    assert!(run.stderr.contains("00000002, 00000002.1"), "{}", run.stderr);
    let way = format!("00000001@{},00000002.1", forked.fork());
    let (run, served) = place.fetch(forked.pg.data_dir(), &["--path", &way], &forked.on_two[0]);
    assert_eq!((run.code, served), (Some(0), Some(other)), "{}", run.stderr);
}

#[test]
fn p6_a_padded_open_segment_is_not_taken_from_a_standby() {
    let forked = forked();
    let place = &forked.place;
    place.add_repository("elsewhere", "main.key");
    for (name, config, repository) in [("here", "main.toml", "main"), ("there", "elsewhere.toml", "elsewhere")] {
        let before = place.objects(repository, "/wal/00000001/");
        let conf = format!(
            "{}{}archive_mode = always\nrecovery_target_timeline = 1\nhot_standby = on\n",
            place.restoring("main.toml", ""),
            place.archiving(config)
        );
        let mut standby = recovering(place, any_major(), &forked.base, name, &conf);
        ok(fs::rename(standby.data_dir().join("recovery.signal"), standby.data_dir().join("standby.signal")));
        ok(standby.start());
        wait_until("the padded segment to be replayed", PATIENCE, || {
            standby.sql_if_running("SELECT count(*) FROM t").is_some_and(|rows| rows == "250")
        });
        let open = &forked.on_two[0].replacen("00000002", "00000001", 1);
        if repository == "main" {
            // All its WAL is there already: nothing to store, nothing to fail on.
            wait_until("the padded segment to be dealt with", PATIENCE, || {
                standby.data_dir().join(format!("pg_wal/archive_status/{open}.done")).exists()
            });
            assert!(standby.log().contains("not a complete segment"), "{}", standby.log());
            assert_eq!(place.objects(repository, "/wal/00000001/"), before);
        } else {
            wait_until("the padded segment to be refused", PATIENCE, || standby.log().contains("is not complete"));
            assert!(standby.data_dir().join(format!("pg_wal/archive_status/{open}.ready")).exists());
        }
        assert!(place.objects(repository, &format!("/wal/00000001/00000000/{open}")).is_empty());
    }
}
