//! The archiver in this process, over a directory repository of its own: what the tests of streaming share.

use std::sync::Arc;
use std::time::Duration;

use pgkeep::archive::{ArchiveError, ArchiveOptions, ClusterStatus, Source, archive};
use pgkeep::catalog::Repository;
use pgkeep::pg::conninfo::Environment;
use pgkeep::pg::{ConnInfo, ConnectOptions};
use pgkeep::seal::KeyFile;
use pgkeep::store::fs::FsStore;
use pgkeep::store::{Store, list_all};
use pgkeep::types::{Branch, ClusterId, ClusterName, Lsn, SegmentNumber, SegmentSize, TimelineId};
use secrecy::ExposeSecret;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Installation, TestPg, ok, wait_until};

pub const SOON: Duration = Duration::from_secs(60);

/// A directory repository of its own.
pub struct Archive {
    pub runtime: Runtime,
    pub repository: Repository,
    pub key: KeyFile,
    pub dir: tempfile::TempDir,
}

impl Archive {
    pub fn new() -> Archive {
        Archive::over(|store| store)
    }

    pub fn over(decorate: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store>) -> Archive {
        let runtime = Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let key = KeyFile::generate().unwrap();
        let store = ok(runtime.block_on(FsStore::create(dir.path().join("repository"))));
        let store = decorate(Arc::new(store));
        let repository = ok(runtime.block_on(Repository::create("main", store, &key)));
        Archive { runtime, repository, key, dir }
    }

    /// Opened again, as another process would.
    pub fn reopened(&self) -> Repository {
        let store = ok(self.runtime.block_on(FsStore::open(self.dir.path().join("repository"))));
        let key = KeyFile::read(self.key.render().expose_secret().as_bytes(), None);
        ok(self.runtime.block_on(Repository::open("main", Arc::new(store), ok(key))))
    }

    pub fn start(&self, pg: &TestPg) -> Archiver {
        self.start_with(pg, options())
    }

    pub fn start_with(&self, pg: &TestPg, options: ArchiveOptions) -> Archiver {
        let (status, seen) = watch::channel(ClusterStatus::default());
        let stop = CancellationToken::new();
        let (repository, source, stopping) = (self.repository.clone(), source(pg), stop.clone());
        let task = self
            .runtime
            .spawn(async move { archive(&source, &repository.into(), &cluster(), &options, &status, stopping).await });
        Archiver { task, seen, stop }
    }

    pub fn id(&self) -> ClusterId {
        let found = ok(self.runtime.block_on(self.reopened().clusters_named(&cluster())));
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].clone()
    }

    pub fn segment(&self, timeline: u32, segment: SegmentNumber, size: SegmentSize) -> Vec<u8> {
        let branch = Branch::first(TimelineId::new(timeline).unwrap());
        let read = self.runtime.block_on(self.reopened().read_segment(&self.id(), branch, segment, size, None));
        ok(read).bytes
    }

    pub fn frontier(&self, timeline: u32) -> Option<Lsn> {
        let branch = Branch::first(TimelineId::new(timeline).unwrap());
        ok(self.runtime.block_on(self.reopened().resume(&self.id(), branch))).map(|resume| resume.at)
    }

    /// Every object's name and length: what must not change when something is refused.
    pub fn objects(&self) -> Vec<(String, u64)> {
        let all = ok(self.runtime.block_on(list_all(self.reopened().store().as_ref(), "")));
        all.into_iter().map(|object| (object.key.to_string(), object.len)).collect()
    }
}

/// An archiver that runs.
pub struct Archiver {
    pub task: tokio::task::JoinHandle<Result<(), ArchiveError>>,
    pub seen: watch::Receiver<ClusterStatus>,
    pub stop: CancellationToken,
}

impl Archiver {
    pub fn durable(&self) -> Lsn {
        match &*self.seen.borrow() {
            ClusterStatus::Streaming(progress) => progress.durable,
            _ => Lsn::ZERO,
        }
    }

    #[track_caller]
    pub fn wait_durable(&self, to: Lsn) {
        wait_until(&format!("WAL up to {to} to be durable"), SOON, || {
            assert!(!self.task.is_finished(), "the archiver has ended");
            self.durable() >= to
        });
    }

    #[track_caller]
    pub fn stop(self, archive: &Archive) {
        self.stop.cancel();
        ok(archive.runtime.block_on(self.task).unwrap());
    }

    /// As if the process were killed: nothing is finished, nothing reported.
    pub fn kill(self, archive: &Archive) {
        self.task.abort();
        let _ = archive.runtime.block_on(self.task);
    }

    #[track_caller]
    pub fn error(self, archive: &Archive) -> ArchiveError {
        let ended = archive.runtime.block_on(async { tokio::time::timeout(SOON, self.task).await });
        ended.expect("the archiver should have ended").unwrap().expect_err("the archiver should have refused")
    }
}

pub fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

pub fn options() -> ArchiveOptions {
    ArchiveOptions {
        max_delay: Duration::from_millis(200),
        synchronous: false,
        range_interval: Duration::ZERO,
        shutdown_deadline: Duration::from_secs(5),
        fill_rate: None,
    }
}

pub fn source(pg: &TestPg) -> Source {
    Source {
        conninfo: ok(ConnInfo::resolve(&pg.conninfo(), &Environment::default())),
        connect: ConnectOptions { timeout: Duration::from_secs(10), ..ConnectOptions::default() },
        slot: "pgkeep".to_owned(),
    }
}

pub fn lsn(text: &str) -> Lsn {
    text.trim().parse().unwrap()
}

pub fn flushed(pg: &TestPg) -> Lsn {
    lsn(&pg.sql("SELECT pg_current_wal_flush_lsn()"))
}

/// Everything that is archived from `from` on is what lies in the server's pg_wal.
#[track_caller]
pub fn assert_same_as_pg_wal(archive: &Archive, pg: &TestPg, timeline: u32, from: Lsn, to: Lsn, size: SegmentSize) {
    let mut compared = 0;
    let mut segment = from.segment(size);
    while segment.start(size) < to {
        let name = segment.file_name(TimelineId::new(timeline).unwrap(), size);
        if let Ok(theirs) = std::fs::read(pg.data_dir().join("pg_wal").join(&name)) {
            let ours = archive.segment(timeline, segment, size);
            let wanted = to.bytes_since(segment.start(size)).unwrap().min(size.bytes()) as usize;
            assert!(ours.len() >= wanted, "{name}: {} bytes archived, {wanted} wanted", ours.len());
            assert!(ours[..wanted] == theirs[..wanted], "{name} is archived with other bytes");
            compared += 1;
        }
        segment = segment.next();
    }
    assert!(compared > 0, "nothing was compared");
}

/// A copy of a stopped server's data directory.
pub fn copy_of(pg: &TestPg, name: &str) -> std::path::PathBuf {
    let copy = ok(pg.scratch_dir(name)).join("data");
    let done = std::process::Command::new("cp").arg("-a").arg("--").arg(pg.data_dir()).arg(&copy).status().unwrap();
    assert!(done.success());
    copy
}

pub fn standby_of(pg: &TestPg, installation: &Installation) -> TestPg {
    let dir = ok(pg.scratch_dir("standby")).join("data");
    pg.tool("pg_basebackup", &["-D", dir.to_str().unwrap(), "-R", "-X", "stream", "-c", "fast"]);
    let mut standby = TestPg::attach(installation, &dir);
    ok(standby.start());
    standby
}
