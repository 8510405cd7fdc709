//! One archiver over several repositories that go away, hang and come back when a test says so.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use pgkeep::archive::{ArchiveOptions, ClusterStatus, Doing, OpenError, Opener, Progress, Receivers, archive};
use pgkeep::catalog::Repository;
use pgkeep::seal::KeyFile;
use pgkeep::store::faulty::{FaultPlan, Faulty};
use pgkeep::store::fs::FsStore;
use pgkeep::store::list_all;
use pgkeep::store::retry::{Retry, RetryPolicy};
use pgkeep::types::{Branch, ClusterId, Lsn, SegmentNumber, SegmentSize, TimelineId};
use secrecy::ExposeSecret;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::archiver::{Archiver, SOON, cluster, source};
use super::{TestPg, ok, wait_until};

/// Every call fails.
pub fn down() -> FaultPlan {
    FaultPlan { tails: true, before: 1.0, ..FaultPlan::none() }
}

/// No call ever ends.
pub fn hanging() -> FaultPlan {
    let hour = Duration::from_secs(3600);
    FaultPlan { delay: 1.0, delay_from: hour, delay_to: hour, ..FaultPlan::none() }
}

/// A directory repository behind a store that fails when it is told to.
#[derive(Debug)]
pub struct Door {
    pub name: String,
    pub path: PathBuf,
    pub key: String,
    pub faults: Faulty,
    pub opened: AtomicUsize,
    retries: bool,
}

impl Door {
    /// What every test sees of the repository, past all faults.
    async fn behind(&self) -> Repository {
        let store = ok(FsStore::open(&self.path).await);
        let key = ok(KeyFile::read(self.key.as_bytes(), None));
        ok(Repository::open(&self.name, Arc::new(store), key).await)
    }
}

/// Hands out repositories of a door.
#[derive(Debug)]
struct Handle(Arc<Door>);

#[async_trait]
impl Opener for Handle {
    fn name(&self) -> &str {
        &self.0.name
    }

    async fn open(&self) -> Result<Repository, OpenError> {
        let Door { name, key, faults, opened, retries, .. } = self.0.as_ref();
        let key = ok(KeyFile::read(key.as_bytes(), None));
        opened.fetch_add(1, Ordering::Relaxed);
        let policy = RetryPolicy { first_wait: Duration::from_millis(5), ..RetryPolicy::default() };
        let store: Arc<dyn pgkeep::store::Store> = match retries {
            true => Arc::new(Retry::with_seed(Arc::new(faults.clone()), policy, 1)),
            false => Arc::new(faults.clone()),
        };
        Ok(Repository::open(name, store, key).await?)
    }
}

/// The repositories of one cluster.
pub struct Several {
    pub runtime: Runtime,
    pub doors: Vec<Arc<Door>>,
    pub needed: usize,
    pub dir: tempfile::TempDir,
}

impl Several {
    /// As many repositories as there are `realms`; equal numbers share their keys. `needed` must hold what is acknowledged.
    pub fn new(realms: &[usize], needed: usize) -> Several {
        Several::with_faults(realms, needed, false, 1)
    }

    /// The same; their stores are tried again as in production, and deal faults by `seed`.
    pub fn with_faults(realms: &[usize], needed: usize, retries: bool, seed: u64) -> Several {
        let runtime = Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let keys: Vec<KeyFile> = (0..=*realms.iter().max().unwrap()).map(|_| KeyFile::generate().unwrap()).collect();
        let doors = realms.iter().enumerate().map(|(index, realm)| {
            let (name, key) = (format!("r{index}"), &keys[*realm]);
            let path = dir.path().join(&name);
            let store = Arc::new(ok(runtime.block_on(FsStore::create(&path))));
            ok(runtime.block_on(Repository::create(&name, store.clone(), key)));
            let faults = Faulty::new(store, FaultPlan::none(), seed ^ (index as u64) << 32);
            let key = key.render().expose_secret().to_owned();
            Arc::new(Door { name, path, key, faults, opened: AtomicUsize::new(0), retries })
        });
        let doors = doors.collect();
        Several { runtime, doors, needed, dir }
    }

    pub fn start(&self, pg: &TestPg, options: ArchiveOptions) -> Archiver {
        let openers = self.doors.iter().map(|door| Arc::new(Handle(Arc::clone(door))) as Arc<dyn Opener>);
        let receivers = Receivers::new(openers, self.needed);
        let (status, seen) = watch::channel(ClusterStatus::default());
        let stop = CancellationToken::new();
        let (source, stopping) = (source(pg), stop.clone());
        let task = self
            .runtime
            .spawn(async move { archive(&source, &receivers, &cluster(), &options, &status, stopping).await });
        Archiver { task, seen, stop }
    }

    #[track_caller]
    pub fn stop(&self, archiver: Archiver) {
        archiver.stop.cancel();
        ok(self.runtime.block_on(archiver.task).unwrap());
    }

    /// As if the process were killed: nothing is finished, nothing reported.
    pub fn kill(&self, archiver: Archiver) {
        archiver.task.abort();
        let _ = self.runtime.block_on(archiver.task);
    }

    pub fn repository(&self, index: usize) -> Repository {
        self.runtime.block_on(self.doors[index].behind())
    }

    pub fn id(&self, index: usize) -> ClusterId {
        let found = ok(self.runtime.block_on(self.repository(index).clusters_named(&cluster())));
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].clone()
    }

    pub fn segment(&self, index: usize, timeline: u32, segment: SegmentNumber, size: SegmentSize) -> Vec<u8> {
        let branch = Branch::first(TimelineId::new(timeline).unwrap());
        let read = self.repository(index);
        ok(self.runtime.block_on(read.read_segment(&self.id(index), branch, segment, size, None))).bytes
    }

    /// The end of the contiguous WAL that whole objects hold, as an archiver would find it.
    pub fn durable(&self, index: usize, timeline: u32) -> Lsn {
        let branch = Branch::first(TimelineId::new(timeline).unwrap());
        let ids = ok(self.runtime.block_on(self.repository(index).clusters_named(&cluster())));
        let Some(id) = ids.first() else { return Lsn::ZERO };
        ok(self.runtime.block_on(self.repository(index).resume(id, branch))).map_or(Lsn::ZERO, |resume| resume.at)
    }

    /// Names of all objects, and their lengths.
    pub fn objects(&self, index: usize) -> Vec<(String, u64)> {
        let repository = self.repository(index);
        let all = ok(self.runtime.block_on(list_all(repository.store().as_ref(), "")));
        all.into_iter().map(|object| (object.key.to_string(), object.len)).collect()
    }

    /// All that this repository holds from `from` on is what lies in the server's pg_wal.
    #[track_caller]
    pub fn assert_same_as_pg_wal(
        &self,
        index: usize,
        pg: &TestPg,
        timeline: u32,
        from: Lsn,
        to: Lsn,
        size: SegmentSize,
    ) {
        let mut compared = 0;
        let mut segment = from.segment(size);
        while segment.start(size) < to {
            let name = segment.file_name(TimelineId::new(timeline).unwrap(), size);
            if let Ok(theirs) = std::fs::read(pg.data_dir().join("pg_wal").join(&name)) {
                let ours = self.segment(index, timeline, segment, size);
                let wanted = to.bytes_since(segment.start(size)).unwrap().min(size.bytes()) as usize;
                assert!(ours.len() >= wanted, "r{index}: {name}: {} bytes archived, {wanted} wanted", ours.len());
                assert!(ours[..wanted] == theirs[..wanted], "r{index}: {name} is archived with other bytes");
                compared += 1;
            }
            segment = segment.next();
        }
        assert!(compared > 0, "nothing was compared");
    }

    /// Complete segments of one repository against those of another.
    #[track_caller]
    pub fn assert_same_segments(&self, one: usize, other: usize, timeline: u32, from: Lsn, to: Lsn, size: SegmentSize) {
        let mut segment = from.segment(size);
        while segment.end(size) <= to {
            let (a, b) = (self.segment(one, timeline, segment, size), self.segment(other, timeline, segment, size));
            let (held, name) = (a.len() as u64, segment.file_name(TimelineId::new(timeline).unwrap(), size));
            assert!(held == size.bytes() && a == b, "{name}: r{one} holds {held} bytes, r{other} {}", b.len());
            segment = segment.next();
        }
    }
}

/// What an archiver shows of a repository.
pub fn doing(archiver: &Archiver, index: usize) -> Option<Doing> {
    match &*archiver.seen.borrow() {
        ClusterStatus::Streaming(progress) => progress.repositories.get(index).map(|of| of.doing.clone()),
        _ => None,
    }
}

pub fn progress(archiver: &Archiver) -> Option<Progress> {
    match &*archiver.seen.borrow() {
        ClusterStatus::Streaming(progress) => Some(progress.clone()),
        _ => None,
    }
}

/// What a repository is known to hold.
pub fn held(archiver: &Archiver, index: usize) -> Lsn {
    progress(archiver).and_then(|progress| progress.repositories.get(index)?.frontier).unwrap_or(Lsn::ZERO)
}

#[track_caller]
pub fn wait_held(archiver: &Archiver, index: usize, to: Lsn) {
    wait_until(&format!("r{index} to hold {to}"), SOON * 2, || {
        assert!(!archiver.task.is_finished(), "the archiver has ended");
        held(archiver, index) >= to
    });
}

#[track_caller]
pub fn wait_doing(archiver: &Archiver, index: usize, what: &str, is: impl Fn(&Doing) -> bool) {
    wait_until(&format!("r{index} to be {what}"), SOON * 2, || {
        assert!(!archiver.task.is_finished(), "the archiver has ended");
        doing(archiver, index).is_some_and(|doing| is(&doing))
    });
}

pub fn is_live(doing: &Doing) -> bool {
    matches!(doing, Doing::Live)
}

pub fn is_away(doing: &Doing) -> bool {
    matches!(doing, Doing::Away { .. })
}

pub fn is_refused(doing: &Doing) -> bool {
    matches!(doing, Doing::Refused { .. })
}

/// Collects each status from now on, until it is dropped: what happened in between two looks.
pub struct Watched {
    seen: Arc<Mutex<BTreeSet<&'static str>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Watched {
    pub fn new(several: &Several, archiver: &Archiver) -> Watched {
        let seen: Arc<Mutex<BTreeSet<&'static str>>> = Arc::default();
        let (mut status, all) = (archiver.seen.clone(), Arc::clone(&seen));
        let task = several.runtime.spawn(async move {
            loop {
                let word = match &*status.borrow_and_update() {
                    ClusterStatus::Connecting => "connecting",
                    ClusterStatus::Streaming(_) => "streaming",
                    ClusterStatus::Waiting { .. } => "waiting",
                };
                all.lock().unwrap().insert(word);
                if status.changed().await.is_err() {
                    return;
                }
            }
        });
        Watched { seen, task }
    }

    /// The stream was never interrupted: what a repository got meanwhile beyond it did not come from the server.
    #[track_caller]
    pub fn assert_one_stream(self) {
        self.task.abort();
        let seen = self.seen.lock().unwrap().clone();
        assert_eq!(seen, BTreeSet::from(["streaming"]), "the stream was interrupted");
    }
}
