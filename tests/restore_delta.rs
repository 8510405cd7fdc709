//! Restores into directories that are not empty: an old state of the cluster, and what a killed restore left. And restores
//! of one database. By the program as it is typed; what comes out is compared, file by file, with a full restore.

mod support;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use pgkeep::pg::instance::{Installation, StopMode, give_to_server_user};
use support::rig::{Rig, next_second};
use support::{TestPg, any_major, major, majors, ok, wait_until};

const SOON: Duration = Duration::from_secs(60);

/// Splitmix64, so that a seed says everything.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}

/// The seeds of this run: `PGKEEP_SEEDS` of them, or so many.
fn seeds(default: u64) -> impl Iterator<Item = u64> {
    let wanted = std::env::var("PGKEEP_SEEDS").ok().map(|seeds| seeds.parse().expect("PGKEEP_SEEDS is a number"));
    1..=wanted.unwrap_or(default)
}

/// Says the seed when a test fails.
struct OnPanic(u64);

impl Drop for OnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this was seed {}", self.0);
        }
    }
}

/// A cluster with a tablespace and some 8 MB of its own, backed up; its server is gone. The tablespace's OID.
fn archived(installation: &Installation) -> (Rig, String) {
    let pg = TestPg::start(installation, "autovacuum = off\n");
    let space = ok(pg.scratch_dir("space"));
    pg.sql(&format!("create tablespace space location '{}'", space.display()));
    pg.sql("create table in_space tablespace space as select n, repeat('y', 100) as filler from generate_series(1, 9000) n");
    pg.sql("create table bulk as select n, repeat(md5(n::text), 5) as filler from generate_series(1, 30000) n");
    pg.sql("create table log (id int primary key)");
    let oid = pg.sql("select oid from pg_tablespace where spcname = 'space'");
    let mut rig = Rig::new(&pg);
    rig.start_archiver();
    rig.done(&["backup"]);
    next_second(&pg);
    let xid = pg.sql("insert into log values (1) returning pg_current_xact_id()");
    rig.wait_for(&xid);
    rig.stop_archiver();
    (rig, oid)
}

/// Where a restore called `name` puts the tablespace.
fn space(rig: &Rig, name: &str) -> PathBuf {
    rig.path(&format!("{name}_space"))
}

fn arguments(rig: &Rig, oid: &str, name: &str, more: &[&str]) -> Vec<String> {
    let moved = format!("{oid}={}", space(rig, name).display());
    let dir = rig.path(name).display().to_string();
    let words = ["restore", "--to", "latest", "--pgdata", &dir, "--tablespace", &moved];
    words.iter().chain(more).map(|word| (*word).to_owned()).collect()
}

/// Everything below a data directory and its tablespace but for the links of tablespaces: kind, mode, owner and content.
fn contents(rig: &Rig, name: &str) -> BTreeMap<String, (char, u32, u32, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut pending = vec![(rig.path(name), String::new()), (space(rig, name), "space/".to_owned())];
    while let Some((dir, below)) = pending.pop() {
        for entry in ok(fs::read_dir(&dir)).map(|entry| ok(entry)) {
            let (path, place) = (format!("{below}{}", entry.file_name().to_string_lossy()), entry.path());
            let seen = ok(fs::symlink_metadata(&place));
            let (kind, content) = match () {
                () if seen.is_dir() => {
                    pending.push((place, format!("{path}/")));
                    ('d', Vec::new())
                }
                () if seen.is_symlink() && path.starts_with("pg_tblspc/") => ('l', Vec::new()),
                () if seen.is_symlink() => ('l', ok(fs::read_link(&place)).into_os_string().into_encoded_bytes()),
                () => ('f', ok(fs::read(&place))),
            };
            all.insert(path, (kind, seen.mode() & 0o7777, seen.uid(), content));
        }
    }
    all
}

#[track_caller]
fn assert_equal_to_full(rig: &Rig, name: &str) {
    let (got, want) = (contents(rig, name), contents(rig, "full"));
    let differ = |path: &&String| got.get(*path) != want.get(*path);
    let differing: Vec<&String> = got.keys().chain(want.keys()).filter(differ).collect();
    assert!(differing.is_empty(), "{name} is not the full restore: {differing:?}");
    assert!(want.len() > 900, "only {} files were compared", want.len());
}

/// Does to files of a stopped cluster what no server would.
fn ruin(rig: &Rig, name: &str, random: &mut Random) {
    let all = contents(rig, name);
    let place =
        |path: &str| path.strip_prefix("space/").map_or(rig.path(name).join(path), |path| space(rig, name).join(path));
    let relation =
        |path: &&String| path.starts_with("base/") || path.starts_with("space/") || path.starts_with("pg_xact/");
    let files: Vec<PathBuf> =
        all.iter().filter(|(path, (kind, ..))| *kind == 'f' && relation(path)).map(|(path, _)| place(path)).collect();
    for _ in 0..60 {
        let file = &files[random.below(files.len())];
        if !file.exists() {
            continue;
        }
        let open = ok(OpenOptions::new().write(true).open(file));
        let len = ok(open.metadata()).len() as usize;
        match random.below(7) {
            0..3 if len > 0 => ok(open.write_all_at(&[random.below(256) as u8; 9], random.below(len) as u64)),
            3 => ok(open.set_len(random.below(len + 1) as u64)),
            4 => ok(open.write_all_at(b"more", (len + random.below(100_000)) as u64)),
            5 => ok(fs::remove_file(file)),
            6 => ok(fs::set_permissions(file, Permissions::from_mode(0o400 + random.below(2) as u32 * 0o240))),
            _ => {}
        }
    }
    // A file with a second name, whose other name keeps what it has; a file where a directory was and the other way round.
    let (twin, precious) = (&files[0], rig.path("precious"));
    let _ = fs::remove_file(twin);
    ok(fs::write(&precious, "precious"));
    ok(fs::hard_link(&precious, twin));
    let _ = fs::remove_file(&files[1]);
    ok(fs::create_dir_all(files[1].join("in/it")));
    let dir = rig.path(name);
    for stranger in ["stranger", "base/4711/1", "base/1/99999.1", "pg_wal/archive_status/x.ready", "standby.signal"] {
        let stranger = dir.join(stranger);
        ok(fs::create_dir_all(stranger.parent().unwrap()));
        ok(fs::write(stranger, "stranger"));
    }
    // Tablespaces that the backup does not have, and links that lead out: what they lead to stays.
    let away = rig.path("away");
    ok(fs::create_dir_all(away.join("PG_15_1/1")));
    ok(fs::write(away.join("PG_15_1/1/1"), "away"));
    ok(symlink(&away, dir.join("pg_tblspc/4712")));
    ok(fs::remove_dir_all(dir.join("pg_wal")));
    ok(symlink(&away, dir.join("pg_wal")));
    ok(give_to_server_user(rig.dir.path()));
}

/// A promoted copy lives on and is ruined; brought up again it is the full restore. What is no old state of the cluster is
/// not touched.
#[test]
fn p6_only_an_old_state_of_the_same_cluster_is_brought_up_and_becomes_a_full_restore() {
    let installation = any_major();
    let (rig, oid) = archived(installation);
    rig.run(&arguments(&rig, &oid, "full", &[])).exits(0);
    rig.run(&arguments(&rig, &oid, "old", &["--action", "promote"])).exits(0);

    // While a server runs on it, and on its tablespace.
    let mut pg = TestPg::attach(installation, &rig.path("old"));
    pg.set("fsync=off");
    ok(pg.start());
    wait_until("the promotion", SOON, || pg.sql("select pg_is_in_recovery()") == "f");
    rig.run(&arguments(&rig, &oid, "old", &["--delta"])).exits(4).says("a server that runs");
    ok(fs::create_dir(rig.path("copy")));
    ok(fs::create_dir_all(rig.path("copy/global")));
    ok(fs::copy(rig.path("old/global/pg_control"), rig.path("copy/global/pg_control")));
    ok(fs::create_dir(rig.path("copy/pg_tblspc")));
    ok(symlink(space(&rig, "old"), rig.path("copy/pg_tblspc").join(&oid)));
    ok(give_to_server_user(&rig.path("copy")));
    let copy = rig.path("copy").display().to_string();
    let onto_its_space = ["restore", "--to", "latest", "--pgdata", &copy, "--delta"];
    rig.run(&onto_its_space).exits(4).says("holds a tablespace of the server that runs");
    pg.sql("update bulk set filler = 'changed' where n % 100 = 7");
    pg.sql("create table later as select * from bulk; truncate in_space; drop table log");
    pg.sql("create database extra");
    pg.sql("vacuum full pg_class");
    pg.sql("checkpoint");
    ok(pg.stop(StopMode::Immediate));
    drop(pg);

    for seed in seeds(1) {
        let _named = OnPanic(seed);
        let mut random = Random(seed);
        ruin(&rig, "old", &mut random);
        // Where the link leads it stays, if nothing else is said.
        let dir = rig.path("old").display().to_string();
        let ran = rig.run(&["restore", "--to", "latest", "--pgdata", &dir, "--delta", "--json"]).exits(0);
        assert_equal_to_full(&rig, "old");
        let answer: serde_json::Value = serde_json::from_str(&ran.stdout).expect("a document");
        let [equal, fetched, removed] =
            ["equal_bytes", "fetched_bytes", "removed"].map(|field| answer[field].as_u64().expect("a number"));
        assert!(
            removed >= 7 && fetched > 0 && fetched * 2 < equal,
            "{equal} equal, {fetched} fetched, {removed} removed"
        );
        assert_eq!(ok(fs::read_to_string(rig.path("precious"))), "precious");
        assert_eq!(ok(fs::read_to_string(rig.path("away/PG_15_1/1/1"))), "away");
        assert!(answer["spent"]["compare"].as_f64().is_some_and(|spent| spent > 0.0), "{answer}");
        ok(fs::remove_dir_all(rig.path("away")));
    }
    // Nothing to do: nothing is fetched.
    let again = rig.run(&arguments(&rig, &oid, "old", &["--delta", "--json"])).exits(0);
    let answer: serde_json::Value = serde_json::from_str(&again.stdout).expect("a document");
    assert_eq!((&answer["delta"], answer["fetched_bytes"].as_u64()), (&true.into(), Some(0)), "{answer}");
    refusals(installation, &rig, &oid);
    let pg = rig.started(installation, "old");
    assert_eq!(pg.sql("select count(*), count(distinct filler) from bulk"), "30000|30000");
    assert_eq!(pg.sql("select (select count(*) from in_space), (select count(*) from log)"), "9000|1");
}

/// Directories that are refused, with nothing in them changed.
fn refusals(installation: &Installation, rig: &Rig, oid: &str) {
    let control = rig.path("full/global/pg_control");
    let kept = ok(fs::read(&control));
    let refused = |why: &str| {
        let before = contents(rig, "full");
        rig.run(&arguments(rig, oid, "full", &["--delta"])).exits(4).says(why).says("nothing was changed");
        assert!(contents(rig, "full") == before, "{why}");
    };
    // Another cluster: the same but for the system identifier, and the checksum that goes with it.
    let mut other = kept.clone();
    other[0] ^= 1;
    let end = if installation.major >= 18 { 292 } else { 288 };
    let crc = crc32c::crc32c(&other[..end]);
    other[end..end + 4].copy_from_slice(&crc.to_le_bytes());
    ok(fs::write(&control, &other));
    refused("another cluster");
    ok(fs::write(&control, &kept[..100]));
    refused("cut short");
    ok(fs::remove_file(&control));
    refused("has no pg_control");
    // The marker of a stopped restore says whose it is.
    let marker = rig.path("full").join(pgkeep::restore::UNFINISHED);
    ok(fs::write(&marker, "system identifier 12\n"));
    refused("another cluster");
    ok(fs::write(&marker, ""));
    refused("was not finished");
    ok(fs::remove_file(&marker));
    ok(fs::write(&control, &kept));
    // A tablespace's directory that is not this one's.
    let strange = rig.path("strange");
    ok(fs::create_dir(&strange));
    ok(fs::write(strange.join("file"), "x"));
    let moved = format!("{oid}={}", strange.display());
    let dir = rig.path("full").display().to_string();
    let ran = rig.run(&["restore", "--to", "latest", "--pgdata", &dir, "--delta", "--tablespace", &moved]);
    ran.exits(4).says("has no link to it");
    assert!(strange.join("file").exists());
    // Without --delta it is as it was.
    rig.run(&arguments(rig, oid, "full", &[])).exits(4).says("is not empty");
}

/// Killed at random, into an empty directory or into an old state: no server starts on it, and the next one finishes it.
#[test]
fn a_killed_restore_is_finished_by_the_next_one() {
    let installation = any_major();
    let (rig, oid) = archived(installation);
    rig.run(&arguments(&rig, &oid, "full", &[])).exits(0);
    let entries = contents(&rig, "full").len();
    let mut killed = 0;
    for seed in seeds(2) {
        let _named = OnPanic(seed);
        let mut random = Random(seed);
        let name = format!("data{seed}");
        // An odd one begins in an empty directory, an even one in a ruined state of which many files are gone.
        if seed % 2 == 0 {
            rig.run(&arguments(&rig, &oid, &name, &[])).exits(0);
            ruin(&rig, &name, &mut random);
            ok(fs::remove_dir_all(rig.path(&name).join("base/1")));
        }
        let control = rig.path(&name).join("global/pg_control");
        for _ in 0..2 {
            let more: &[&str] = if rig.path(&name).exists() { &["--delta"] } else { &[] };
            let mut child = rig.command(&arguments(&rig, &oid, &name, more));
            let mut child = ok(child.stdout(Stdio::null()).stderr(Stdio::null()).spawn());
            // By how much is there, or by the time since it began to change anything: an old state has all its files.
            let (enough, patience) = (random.below(entries), Duration::from_micros(random.below(400_000) as u64));
            let (begun, mut marked) = (Instant::now(), None);
            while ok(child.try_wait()).is_none() {
                if marked.is_none() && rig.path(&name).join(pgkeep::restore::UNFINISHED).exists() {
                    marked = Some(Instant::now());
                }
                let far = more.is_empty() && count(&rig.path(&name)) >= enough;
                if marked.is_some_and(|marked| far || marked.elapsed() > patience) {
                    break;
                }
                assert!(begun.elapsed() < SOON, "the restore neither ends nor gets anywhere");
            }
            ok(child.kill());
            killed += usize::from(!ok(child.wait()).success());
        }
        if !control.exists() {
            let mut pg = TestPg::attach(installation, &rig.path(&name));
            assert!(pg.start().is_err(), "a server started on half a restore");
            rig.run(&arguments(&rig, &oid, &name, &[])).exits(4).says("finish it with --delta");
        }
        rig.run(&arguments(&rig, &oid, &name, &["--delta"])).exits(0);
        assert_equal_to_full(&rig, &name);
        ok(fs::remove_dir_all(rig.path(&name)));
        ok(fs::remove_dir_all(space(&rig, &name)));
        let _ = fs::remove_dir_all(rig.path("away"));
    }
    assert!(killed > 0, "every restore had ended before it was killed");
}

/// Directory entries below.
fn count(dir: &Path) -> usize {
    let mut pending = vec![dir.to_owned()];
    let mut found = 0;
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            found += 1;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                pending.push(entry.path());
            }
        }
    }
    found
}

/// One database with its content, the other without: recovery goes through both, and the first can be dumped.
#[test]
fn one_database_is_restored_alone() {
    let newest = majors().last().map(|newest| newest.major);
    for installation in [major(13), newest.and_then(major)].into_iter().flatten() {
        let pg = TestPg::start(installation, "autovacuum = off\n");
        for name in ["wanted", "other"] {
            pg.sql(&format!("create database {name}"));
        }
        let run = |database: &str, sql: &str| query(&pg, database, sql);
        for database in ["wanted", "other"] {
            run(
                database,
                "create table t as select n, repeat(md5(n::text), 9) as filler from generate_series(1, 9000) n",
            );
        }
        let mut rig = Rig::new(&pg);
        rig.start_archiver();
        rig.done(&["backup"]);
        next_second(&pg);
        // WAL for pages of both that recovery meets without an image of them: the visibility map's, and what follows an image.
        for database in ["wanted", "other"] {
            run(database, "vacuum freeze t");
            run(
                database,
                "update t set filler = 'new' where n <= 500; create index on t (n); delete from t where n = 501",
            );
        }
        pg.sql("create table last (n int)");
        let xid = pg.sql("insert into last values (1) returning pg_current_xact_id()");
        rig.wait_for(&xid);
        rig.stop_archiver();
        drop(pg);

        rig.restore("latest", "no", &["--database", "absent"]).exits(2).says("wanted (").says("other (");
        assert!(!rig.path("no").exists());
        let ran = rig.restore("latest", "one", &["--database", "wanted", "--json"]).exits(0);
        let answer: serde_json::Value = serde_json::from_str(&ran.stdout).expect("a document");
        assert!(answer["notes"].to_string().contains("never go on with it"), "{answer}");
        let [fetched, bytes] = ["fetched_bytes", "bytes"].map(|field| answer[field].as_u64().expect("a number"));
        assert!(fetched + 8_000_000 < bytes, "{fetched} of {bytes} bytes were fetched");
        let wanted = files_of(&rig, "one", answer["notes"].to_string().split_once("wanted (").expect("its OID").1);
        let empty = files_of(&rig, "one", answer["notes"].to_string().split_once("other (").expect("its OID").1);
        let relation =
            |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().parse::<u32>().is_ok());
        let (mut size, mut blocks) = (0, 0);
        for path in empty.iter().filter(relation) {
            let seen = ok(fs::metadata(path));
            (size, blocks) = (size + seen.len(), blocks + seen.blocks());
        }
        assert!(size > 8_000_000 && blocks == 0, "{size} bytes take {blocks} blocks");

        let before: Vec<Vec<u8>> = wanted.iter().map(|path| ok(fs::read(path))).collect();
        let restored = rig.recovered(installation, "one");
        let seen = query(&restored, "wanted", "select count(*), count(*) filter (where filler = 'new') from t");
        assert_eq!(seen.trim(), "8999|500");
        let dump = restored.tool("pg_dump", &["--no-sync", "--dbname", &in_database(&restored, "wanted")]);
        assert!(dump.lines().count() > 8999, "{}", dump.lines().count());
        drop(restored);
        // Again, over what recovery has changed.
        rig.restore("latest", "one", &["--database", "wanted", "--delta"]).exits(0);
        assert!(wanted.iter().zip(before).all(|(path, before)| ok(fs::read(path)) == before));
    }
}

/// The files of the database whose OID these words begin with.
fn files_of(rig: &Rig, name: &str, words: &str) -> Vec<PathBuf> {
    let oid: String = words.chars().take_while(char::is_ascii_digit).collect();
    let mut files: Vec<PathBuf> =
        ok(fs::read_dir(rig.path(name).join("base").join(oid))).map(|entry| ok(entry).path()).collect();
    files.sort();
    files
}

fn in_database(pg: &TestPg, database: &str) -> String {
    pg.conninfo().replace("dbname=postgres", &format!("dbname={database}"))
}

fn query(pg: &TestPg, database: &str, sql: &str) -> String {
    pg.tool("psql", &["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", &in_database(pg, database), "-c", sql])
}
