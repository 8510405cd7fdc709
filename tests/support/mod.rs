//! Servers for tests: every major that is found on this machine, each cluster in a temporary directory of its own.
//!
//! A test against servers begins with [`for_each_major`] or [`majors`], and so leaves a note which majors it met; at the
//! end `testenv/test.sh` counts the notes, and fails when too few majors were covered. A test that finds no server of the
//! major it needs passes, and says so: what was not covered is seen in the count.

#![allow(dead_code, unreachable_pub)] // each test binary uses a part of it

pub mod archiver;
pub mod backups;
pub mod rig;
pub mod several;

use std::fs::OpenOptions;
use std::io::Write;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

pub use pgkeep::pg::instance::{InitOptions, Installation, Instance};
use pgkeep::types::SegmentSize;

/// A running server of its own, stopped and removed on drop. Everything else is [`Instance`]'s.
pub struct TestPg(Instance);

impl TestPg {
    /// A new cluster with replication on (the default since 10) and these lines in postgresql.conf, started.
    #[track_caller]
    pub fn start(installation: &Installation, conf: &str) -> TestPg {
        TestPg::start_with(InitOptions { extra_conf: conf.to_owned(), ..InitOptions::new(installation.clone()) })
    }

    /// The same with segments of `mib` MiB.
    #[track_caller]
    pub fn start_segmented(installation: &Installation, mib: u64, conf: &str) -> TestPg {
        let segment_size = Some(SegmentSize::new(mib << 20).expect("a segment size"));
        let options = InitOptions::new(installation.clone());
        TestPg::start_with(InitOptions { segment_size, extra_conf: conf.to_owned(), ..options })
    }

    /// A new cluster made as `options` say, started.
    #[track_caller]
    pub fn start_with(mut options: InitOptions) -> TestPg {
        covered(&options.installation);
        options.templates.get_or_insert_with(templates);
        let mut instance = ok(Instance::init(options));
        ok(instance.start());
        TestPg(instance)
    }

    /// A data directory that is there (a restored one), not started yet.
    #[track_caller]
    pub fn attach(installation: &Installation, data: &std::path::Path) -> TestPg {
        covered(installation);
        TestPg(ok(Instance::attach(installation.clone(), data)))
    }

    /// Runs SQL in database `postgres`; rows as lines, columns separated by `|`. Panics with psql's message.
    #[track_caller]
    pub fn sql(&self, sql: &str) -> String {
        ok(self.0.sql(sql))
    }

    /// The same; `None` when the server does not run.
    #[track_caller]
    pub fn sql_if_running(&self, sql: &str) -> Option<String> {
        self.0.pid().map(|_| self.sql(sql))
    }

    /// Runs a tool of this installation against this server; panics when it fails.
    #[track_caller]
    pub fn tool(&self, program: &str, arguments: &[&str]) -> String {
        ok(ok(self.0.tool(program, arguments, Duration::from_secs(300))).checked()).stdout_text()
    }
}

impl Deref for TestPg {
    type Target = Instance;
    fn deref(&self) -> &Instance {
        &self.0
    }
}

impl DerefMut for TestPg {
    fn deref_mut(&mut self) -> &mut Instance {
        &mut self.0
    }
}

/// Where clusters as initdb made them are kept. It may be removed at any time.
fn templates() -> PathBuf {
    PathBuf::from(format!("/var/tmp/pgkeep-templates-{}", rustix::process::getuid().as_raw()))
}

/// The newest minor of every major that is found, oldest first. Looked for once.
pub fn majors() -> &'static [Installation] {
    static FOUND: OnceLock<Vec<Installation>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let majors = Installation::find_majors();
        let versions: Vec<&str> = majors.iter().map(|found| found.version.as_str()).collect();
        eprintln!("PostgreSQL servers found: {}", versions.join(", "));
        assert!(!majors.is_empty(), "no PostgreSQL server is found: run testenv/servers.sh, or set PGKEEP_PG_BINDIRS");
        majors
    })
}

/// The server of this major, if it is found; says so if not.
pub fn major(wanted: u32) -> Option<&'static Installation> {
    let found = majors().iter().find(|installation| installation.major == wanted);
    if found.is_none() {
        eprintln!("NOT COVERED: no PostgreSQL {wanted} on this machine");
    }
    found
}

/// The server that tests use when one major is enough: 15, which Debian stable has, else the newest.
pub fn any_major() -> &'static Installation {
    let newest = majors().last().expect("majors() is never empty");
    majors().iter().find(|installation| installation.major == 15).unwrap_or(newest)
}

/// Runs `test` against every major, one after the other; says which one it was when it panics.
pub fn for_each_major(test: impl Fn(&Installation)) {
    for installation in majors() {
        let named = OnPanic(format!("this was PostgreSQL {}", installation.version));
        covered(installation);
        test(installation);
        drop(named);
    }
}

struct OnPanic(String);

impl Drop for OnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

/// Notes that the running test met this server: a line `<major> <version> <test>` in a file of this process under
/// $PGKEEP_COVERAGE_DIR, or nothing when that is not set.
pub fn covered(installation: &Installation) {
    note(&installation.major.to_string(), &installation.version);
}

/// Notes that the running test met this kind of server, in this version; neither has a space in it.
pub fn note(server: &str, version: &str) {
    let Some(dir) = std::env::var_os("PGKEEP_COVERAGE_DIR").map(PathBuf::from) else { return };
    let thread = std::thread::current();
    let binary = std::env::current_exe().ok();
    let binary = binary.as_deref().and_then(|path| path.file_stem()).unwrap_or_default().to_string_lossy().into_owned();
    let binary = binary.rsplit_once('-').map_or(binary.as_str(), |(name, _hash)| name);
    let line = format!("{server} {version} {binary}::{}\n", thread.name().unwrap_or("unnamed"));
    let path = dir.join(format!("{}.txt", std::process::id()));
    let file = OpenOptions::new().create(true).append(true).open(&path);
    file.and_then(|mut file| file.write_all(line.as_bytes())).expect("write the note of coverage");
}

/// Asks `ready` again and again until it says yes; panics after `deadline`.
#[track_caller]
pub fn wait_until(what: &str, deadline: Duration, mut ready: impl FnMut() -> bool) {
    let since = Instant::now();
    while !ready() {
        assert!(since.elapsed() < deadline, "waited {deadline:?} for {what}, in vain");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The value, or a panic that shows the error as a person would read it.
#[track_caller]
pub fn ok<T, E: std::fmt::Display>(result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    }
}
