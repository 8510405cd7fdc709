//! The main job with a bucket as the only repository: init, check, run, backup, list, plan, restore, and the hooks, by the
//! program as it is typed, run as the user that runs the servers. The S3 server is in this process.

#[path = "support/s3/mod.rs"]
mod s3;
mod support;

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgkeep::pg::instance::{ServerUser, StopMode, give_to_server_user};
use s3::{Conditional, S3Faults, TestS3, TestS3Options};
use serde_json::Value;
use support::{TestPg, any_major, ok, wait_until};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(120);
/// Must not be found in the bucket.
const PLAINTEXT: &str = "Customer No. ";

/// A place that the server's user can enter, with the program and its configuration.
struct Rig {
    dir: TempDir,
    archiver: Option<Child>,
}

#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Ran {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    #[track_caller]
    fn says(self, words: &str) -> Ran {
        let all = format!("{}{}", self.stdout, self.stderr);
        assert!(all.contains(words), "{words:?} is not in:\n{all}");
        self
    }
}

impl Rig {
    fn new(s3: &TestS3) -> Rig {
        let dir = tempfile::Builder::new().prefix("pgb").permissions(Permissions::from_mode(0o755)).tempdir_in("/tmp");
        let rig = Rig { dir: ok(dir), archiver: None };
        ok(fs::copy(env!("CARGO_BIN_EXE_pgkeep"), rig.path("pgkeep")));
        rig.credentials(s3.access_key(), s3.secret_key());
        ok(give_to_server_user(rig.dir.path()));
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// In files that nobody else may read.
    fn credentials(&self, access: &str, secret: &str) {
        for (name, text) in [("access", access), ("secret", secret)] {
            ok(fs::write(self.path(name), format!("{text}\n")));
            ok(fs::set_permissions(self.path(name), Permissions::from_mode(0o600)));
            ok(give_to_server_user(&self.path(name)));
        }
    }

    fn init(&self, pg: &TestPg, s3: &TestS3, bucket: &str) -> Ran {
        let (url, conninfo) = (format!("s3://{bucket}/archive/one"), pg.conninfo());
        let (access, secret) = (self.path("access"), self.path("secret"));
        let files = ["--access-key-file", access.to_str().unwrap(), "--secret-key-file", secret.to_str().unwrap()];
        let args = ["init", "--yes", "--pg", &conninfo, "--repo", &url, "--endpoint", &s3.endpoint()];
        self.run(&[&args[..], &files].concat())
    }

    fn command<A: AsRef<OsStr>>(&self, args: &[A]) -> Command {
        let mut command = Command::new(self.path("pgkeep"));
        command.arg("--config").arg(self.path("pgkeep.toml")).args(args).current_dir(self.dir.path());
        command.env_remove("PGKEEP_LOG").stdin(Stdio::null());
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("AWS_")) {
            command.env_remove(name);
        }
        if let Some(user) = ok(ServerUser::find()) {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    fn run<A: AsRef<OsStr>>(&self, args: &[A]) -> Ran {
        ran(self.command(args))
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let ran = self.run(&[args, &["--json"]].concat());
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {ran:?}"))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("run.log")).unwrap_or_default()
    }

    fn start_archiver(&mut self) {
        let log = ok(fs::File::options().create(true).append(true).open(self.path("run.log")));
        self.archiver = Some(ok(self.command(&["run"]).stdout(Stdio::null()).stderr(log).spawn()));
    }

    #[track_caller]
    fn stop_archiver(&mut self) {
        let Some(mut child) = self.archiver.take() else { return };
        let pid = rustix::process::Pid::from_child(&child);
        ok(rustix::process::kill_process(pid, rustix::process::Signal::TERM));
        assert!(ok(child.wait()).success(), "{}", self.log());
    }

    fn kill_archiver(&mut self) {
        let Some(mut child) = self.archiver.take() else { return };
        ok(child.kill());
        ok(child.wait());
    }

    /// Waits until a transaction's end is archived.
    #[track_caller]
    fn wait_for(&self, xid: &str) {
        let to = format!("xid:{xid}");
        let since = Instant::now();
        loop {
            let plan = self.run(&["plan", "--to", &to]);
            if plan.code == Some(0) {
                return;
            }
            assert!(since.elapsed() < SOON, "{to} is not archived: {plan:?}\n{}", self.log());
        }
    }

    /// Restores, starts, and waits for the end of recovery.
    #[track_caller]
    fn restored(&self, to: &str, name: &str) -> TestPg {
        let dir = self.path(name);
        let ran = self.run(&["restore", "--to", to, "--action", "promote", "--pgdata", dir.to_str().unwrap()]);
        ran.exits(0);
        let mut pg = TestPg::attach(any_major(), &dir);
        pg.set("fsync=off"); // else the server syncs every file when it starts
        ok(pg.start());
        wait_until("the end of recovery", SOON, || pg.sql("SELECT pg_is_in_recovery()") == "f");
        pg
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(child) = &mut self.archiver {
            let _ = child.kill().and_then(|()| child.wait());
        }
    }
}

fn ran(mut command: Command) -> Ran {
    let output = ok(command.output());
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn rows(pg: &TestPg) -> String {
    pg.sql("SELECT count(*), md5(string_agg(n || name, ',' ORDER BY n)) FROM customers")
}

fn insert(pg: &TestPg, from: u32, to: u32) -> String {
    pg.sql(&format!(
        "INSERT INTO customers SELECT n, '{PLAINTEXT}' || md5(n::text) FROM generate_series({from}, {to}) n; \
         SELECT pg_current_xact_id()"
    ));
    pg.sql("SELECT max(xmin::text::bigint) FROM customers")
}

/// All of it, on a server that does as `options` say; gives the names that are in the bucket at the end.
fn main_job(options: TestS3Options) -> Vec<String> {
    let s3 = TestS3::start(options);
    let pg = TestPg::start(any_major(), "track_commit_timestamp = on\n");
    let mut rig = Rig::new(&s3);

    // What is wrong is said before anything is made.
    rig.init(&pg, &s3, "no-such-bucket").exits(2).says("there is no bucket").says("pgkeep does not make buckets");
    rig.credentials(s3.access_key(), "wrong");
    rig.init(&pg, &s3, s3.bucket()).exits(2).says("hint:");
    rig.credentials(s3.access_key(), s3.secret_key());
    assert!(s3.objects().is_empty() && !rig.path("main.key").exists(), "nothing was made");
    assert_eq!(pg.sql("SELECT count(*) FROM pg_replication_slots"), "0");

    rig.init(&pg, &s3, s3.bucket()).exits(0).says("made  repository     s3://").says("conditional create");
    let made: Vec<String> = s3.objects().into_keys().collect();
    rig.init(&pg, &s3, s3.bucket()).exits(0).says("kept  repository");
    assert_eq!(s3.objects().into_keys().collect::<Vec<_>>(), made, "again changes nothing");
    let config = ok(fs::read_to_string(rig.path("pgkeep.toml")));
    assert!(!config.contains(s3.secret_key()) && config.contains(&s3.endpoint()), "{config}");

    rig.run(&["check"]).exits(0).says("an object was written, read and removed").says("the server checks what arrives");
    assert_eq!(s3.objects().into_keys().collect::<Vec<_>>(), made, "what check writes it removes");

    pg.sql("CREATE TABLE customers (n int PRIMARY KEY, name text)");
    rig.start_archiver();
    insert(&pg, 1, 20_000);
    rig.run(&["backup"]).exits(0).says("is complete");
    insert(&pg, 20_001, 21_000);
    let (earlier, then) = (rows(&pg), pg.sql("SELECT clock_timestamp()"));
    let last = insert(&pg, 21_001, 30_000);
    rig.wait_for(&last);
    rig.stop_archiver();
    let newest = rows(&pg);
    let listed = rig.json(&["list"]);
    assert_eq!(listed["clusters"][0]["backups"].as_array().map(Vec::len), Some(1), "{listed}");
    rig.run(&["plan", "--to", "latest"]).exits(0);
    rig.run(&["plan", "--to", "2001-01-01 00:00:00+00"]).exits(1);

    // The hooks, by hand: a segment that nobody streamed is taken, and again; another content under its name is not.
    pg.sql("SELECT pg_switch_wal()");
    let segment = pg.sql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    insert(&pg, 30_001, 30_010);
    pg.sql("SELECT pg_switch_wal()");
    let file = pg.data_dir().join("pg_wal").join(&segment);
    let push = |path: &std::path::Path| {
        let mut command = rig.command(&["wal", "push", path.to_str().unwrap()]);
        command.current_dir(pg.data_dir());
        ran(command)
    };
    push(&file).exits(0);
    push(&file).exits(0);
    let forged = rig.path("forged");
    ok(fs::create_dir(&forged));
    let forged = forged.join(&segment);
    let mut bytes = ok(fs::read(&file));
    let end = bytes.len() - 1;
    bytes[end] ^= 1; // behind the switch, where only zeros lie
    ok(fs::write(&forged, &bytes));
    ok(fs::create_dir_all(rig.path("global")));
    ok(give_to_server_user(&rig.path("forged")));
    push(&forged).exits(1);
    let fetched = rig.path("fetched");
    rig.run(&["wal", "fetch", &segment, fetched.to_str().unwrap()]).exits(0);
    assert!(ok(fs::read(&fetched)) == ok(fs::read(&file)), "what is fetched is what was pushed");

    let at_that_time = rig.restored(&then, "earlier");
    assert_eq!(rows(&at_that_time), earlier);
    drop(at_that_time);
    let latest = rig.restored("latest", "latest");
    assert_eq!(rows(&latest), newest, "what was pushed lies behind a segment that nobody archived whole");

    let objects = s3.objects();
    for (name, bytes) in &objects {
        let found = bytes.windows(PLAINTEXT.len()).any(|window| window == PLAINTEXT.as_bytes());
        assert!(!found, "{name} holds rows in the clear");
    }
    assert!(s3.uploads().is_empty(), "no upload is left: {:?}", s3.uploads());
    objects.into_keys().collect()
}

#[test]
fn the_main_job_in_a_bucket_alone() {
    let names = main_job(TestS3Options::default());
    assert!(
        names.iter().all(|name| !name.contains('~')),
        "names are plain where the server keeps what is there: {names:?}"
    );
}

#[test]
fn p6_the_main_job_where_conditional_create_is_ignored() {
    let names = main_job(TestS3Options {
        conditional: Conditional::Ignored,
        multipart_conditional: Conditional::Ignored,
        ..TestS3Options::default()
    });
    let may_be_plain =
        |name: &&String| name.contains("/keys/") || name.contains("/conflict/") || name.contains("/store-");
    let plain: Vec<_> = names.iter().filter(|name| !name.contains('~') && !may_be_plain(name)).collect();
    assert!(plain.is_empty(), "everything that two could want has a name of its own: {plain:?}");
}

/// What `check` says follows the server: a bucket that moved to another one is noticed, and remembered.
#[test]
fn check_says_what_a_server_does_and_notices_when_that_changes() {
    let s3 = TestS3::start(TestS3Options::default());
    let pg = TestPg::start(any_major(), "");
    let rig = Rig::new(&s3);
    rig.init(&pg, &s3, s3.bucket()).exits(0).says("of two who write the same object, one is refused");
    let weak = TestS3::start(TestS3Options {
        conditional: Conditional::Ignored,
        takes_checksums: false,
        object_lock: false,
        ..TestS3Options::default()
    });
    for (name, bytes) in s3.objects() {
        weak.plant(&name, bytes);
    }
    let config = ok(fs::read_to_string(rig.path("pgkeep.toml"))).replace(&s3.endpoint(), &weak.endpoint());
    ok(fs::write(rig.path("pgkeep.toml"), &config));
    let verdicts = || weak.objects().into_keys().filter(|name| name.contains("/store-")).count();
    rig.run(&["check"])
        .exits(0)
        .says("it behaves otherwise than on")
        .says("conditional create is ignored")
        .says("takes no checksum");
    assert_eq!(verdicts(), 2, "and remembers it");
    let again = rig.run(&["check"]).exits(0);
    assert!(!again.stdout.contains("otherwise"), "{again:?}");
    assert_eq!(verdicts(), 2, "what is known is not written again");
    // What the configuration asks for and the bucket does not have.
    let asks = config.replace("[cluster.main]", "object_lock = \"governance\"\nobject_lock_days = 7\n\n[cluster.main]");
    ok(fs::write(rig.path("pgkeep.toml"), asks));
    rig.run(&["check"]).says("object_lock is set");
    weak.refuse(Some((403, "AccessDenied")));
    rig.run(&["check"]).exits(1).says("not ok").says("store");
    weak.refuse(None);
    weak.delete_bucket(weak.bucket());
    rig.run(&["check"]).exits(1).says("NoSuchBucket");
}

/// Clients commit while requests fail, answers get lost and pgkeep is killed; then the bucket alone gives everything back.
#[test]
fn streaming_over_a_bad_network_loses_nothing() {
    let seed = std::env::var("PGKEEP_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("seed {seed}: repeat with PGKEEP_SEED={seed}");
    let conditional = if seed.is_multiple_of(2) { Conditional::Atomic } else { Conditional::Ignored };
    let s3 =
        TestS3::start(TestS3Options { conditional, multipart_conditional: conditional, ..TestS3Options::default() });
    let pg = TestPg::start_segmented(any_major(), 1, "track_commit_timestamp = on\n");
    let mut rig = Rig::new(&s3);
    rig.init(&pg, &s3, s3.bucket()).exits(0);
    let config =
        ok(fs::read_to_string(rig.path("pgkeep.toml"))).replace("# max_delay = \"1s\"", "max_delay = \"100ms\"");
    ok(fs::write(rig.path("pgkeep.toml"), config));
    pg.sql("CREATE TABLE customers (n int PRIMARY KEY, name text)");
    rig.start_archiver();
    rig.run(&["backup"]).exits(0);
    s3.set_faults(S3Faults::network(0.05), seed);
    let mut last = String::new();
    for batch in 0..40 {
        last = insert(&pg, batch * 500 + 1, batch * 500 + 500);
        match batch {
            10 => {
                rig.kill_archiver();
                rig.start_archiver();
            }
            20 => s3.down(true),
            25 => s3.down(false),
            _ => {}
        }
    }
    rig.wait_for(&last);
    assert!(s3.faults() > 0, "no request met a fault");
    rig.stop_archiver();
    let want = rows(&pg);
    drop(pg);
    s3.set_faults(S3Faults::network(0.02), seed + 1);
    assert_eq!(rows(&rig.restored("latest", "restored")), want, "seed {seed}");
}

/// PostgreSQL's shutdown does not wait for a bucket that does not answer.
#[test]
fn a_server_stops_while_its_bucket_is_down() {
    let s3 = TestS3::start(TestS3Options::default());
    let mut pg = TestPg::start(any_major(), "");
    let mut rig = Rig::new(&s3);
    rig.init(&pg, &s3, s3.bucket()).exits(0);
    let config = ok(fs::read_to_string(rig.path("pgkeep.toml")));
    let config = config.replace("# shutdown_deadline = \"10s\"", "shutdown_deadline = \"2s\"");
    ok(fs::write(rig.path("pgkeep.toml"), config));
    rig.start_archiver();
    wait_until("pgkeep to stream", SOON, || pg.sql("SELECT count(*) FROM pg_stat_replication") == "1");
    s3.freeze(true);
    pg.sql("CREATE TABLE t AS SELECT generate_series(1, 10000)");
    let begun = Instant::now();
    ok(pg.stop(StopMode::Fast));
    assert!(begun.elapsed() < Duration::from_secs(45), "it took {:?}", begun.elapsed());
    s3.freeze(false);
}
