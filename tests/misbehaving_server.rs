//! The archiver against a server that does what none should: garbage, positions that make no sense, silence, errors in the middle,
//! ends of timelines at the worst moment, another identity. Nothing wrong is acknowledged or archived, the reason is said, and when
//! the server behaves again the archiver goes on. The clock is tokio's, paused: deadlines pass at once.

#[path = "support/server_wire.rs"]
mod server_wire;
#[path = "support/walsender.rs"]
mod walsender;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgkeep::archive::{ArchiveError, ArchiveOptions, ClusterStatus, Receivers, Source, archive};
use pgkeep::catalog::Repository;
use pgkeep::pg::conninfo::Environment;
use pgkeep::pg::{ConnInfo, ConnectOptions};
use pgkeep::seal::KeyFile;
use pgkeep::store::memory::MemoryStore;
use pgkeep::types::{Branch, ClusterId, ClusterName, Lsn, SegmentNumber, SegmentSize, SystemId, TimelineId};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use walsender::{Mood, SEGMENT, SYSTEM, Walsender};

/// How long a server may say nothing.
const TIMEOUT: Duration = Duration::from_secs(10);
/// By tokio's clock.
const SOON: Duration = Duration::from_secs(120);

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

/// An archiver, the server that it streams from and the repository that it fills.
struct Stage {
    server: Walsender,
    repository: Repository,
    stop: CancellationToken,
    task: JoinHandle<Result<(), ArchiveError>>,
    /// Everything that was said to be wrong.
    reasons: Arc<Mutex<Vec<String>>>,
    began: u64,
}

impl Stage {
    async fn new() -> Stage {
        let server = Walsender::new(Lsn::new(3 * SEGMENT));
        let keys = KeyFile::generate().unwrap();
        let repository = Repository::create("main", Arc::new(MemoryStore::new()), &keys).await.unwrap();
        let (stop, task, reasons) = start(&server, &repository);
        Stage { server, repository, stop, task, reasons, began: 3 * SEGMENT }
    }

    /// As `pgkeep run` does after a restart.
    fn again(&mut self) {
        (self.stop, self.task, self.reasons) = start(&self.server, &self.repository);
    }

    async fn until(&self, what: &str, is: impl Fn(&walsender::State) -> bool) {
        let begin = Instant::now();
        while !is(&self.server.state()) {
            assert!(!self.task.is_finished(), "waiting for {what}, but the archiver has ended");
            let reasons = self.reasons.lock().unwrap().clone();
            assert!(begin.elapsed() < SOON, "waited {SOON:?} for {what}: {reasons:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Everything up to `end` is acknowledged.
    async fn acknowledged(&self, end: Lsn) {
        // At a segment's border one byte is kept back.
        let reached = |state: &walsender::State| state.flushed.last().is_some_and(|(flush, _)| flush.advance(1) >= end);
        self.until(&format!("{end} to be acknowledged"), reached).await;
    }

    async fn read(&self, timeline: u32, segment: u64) -> Vec<u8> {
        let id = ClusterId { name: cluster(), system: SystemId::new(SYSTEM) };
        let branch = Branch::first(TimelineId::new(timeline).unwrap());
        let (segment, size) = (SegmentNumber::new(segment), SegmentSize::new(SEGMENT).unwrap());
        self.repository.read_segment(&id, branch, segment, size, None).await.unwrap().bytes
    }

    /// What is archived is what the server wrote, and no more was ever acknowledged than was sent in order. `to` is the end
    /// of each timeline, of which the first one's may have been left earlier.
    async fn check(&self) {
        let (wal, timeline, fork, flushed) = {
            let state = self.server.state();
            (state.wal.clone(), state.timeline, state.fork, state.flushed.clone())
        };
        for (flush, sent) in flushed {
            assert!(flush <= sent, "{flush} was acknowledged when {sent} had been sent");
        }
        let last = &wal[timeline as usize - 1];
        for number in self.began / SEGMENT..=(last.end().get() - 1) / SEGMENT {
            let start = Lsn::new(number * SEGMENT);
            // The child's copy of the fork's segment holds the parent's bytes.
            let on = if timeline == 2 && start.advance(SEGMENT) <= fork { 1 } else { timeline };
            let archived = self.read(on, number).await;
            let theirs = wal[on as usize - 1].from(start);
            let wanted = theirs.len().min(SEGMENT as usize);
            assert!(theirs.starts_with(&archived), "segment {number} of timeline {on} is archived with other bytes");
            assert_eq!(archived.len(), wanted, "segment {number} of timeline {on}");
        }
        let id = ClusterId { name: cluster(), system: SystemId::new(SYSTEM) };
        let inventory = self.repository.load(&id).await.unwrap();
        assert!(inventory.gaps.is_empty() && inventory.damaged.is_empty() && inventory.unknown.is_empty());
        assert!(inventory.branches.keys().all(|branch| *branch == Branch::first(branch.timeline)));
        assert_eq!(self.repository.clusters_named(&cluster()).await.unwrap(), [id]);
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }

    /// While the server is in this mood, twice over, `said` is what the archiver says of it.
    async fn suffers(&self, mood: Mood, said: &str) {
        let before = self.server.state().wal[0].end();
        self.server.set(mood);
        self.server.write(20, 7);
        self.until(&format!("{mood:?} twice"), |state| state.misbehaved >= 2).await;
        let began = Instant::now();
        while !self.reasons.lock().unwrap().iter().any(|reason| reason.contains(said)) {
            let reasons = self.reasons.lock().unwrap().clone();
            assert!(began.elapsed() < SOON, "{mood:?}: nobody said {said:?} but {reasons:?}");
            sleep(Duration::from_millis(20)).await;
        }
        let most = self.server.state().flushed.iter().map(|(flush, _)| *flush).max();
        assert!(most <= Some(before), "{mood:?}: {most:?} was acknowledged, {before} was sent before");
        self.server.set(Mood::Well);
    }
}

/// Why the archiver waited, in order.
type Reasons = Arc<Mutex<Vec<String>>>;

fn start(
    server: &Walsender,
    repository: &Repository,
) -> (CancellationToken, JoinHandle<Result<(), ArchiveError>>, Reasons) {
    let source = Source {
        conninfo: ConnInfo::resolve("host=/scripted user=pgkeep", &Environment::new([], None, None)).unwrap(),
        connect: ConnectOptions { timeout: TIMEOUT, dial: Some(Arc::new(server.clone())), ..ConnectOptions::default() },
        slot: "pgkeep".to_owned(),
    };
    let options = ArchiveOptions {
        max_delay: Duration::from_millis(100),
        synchronous: false,
        range_interval: Duration::ZERO,
        shutdown_deadline: Duration::from_secs(5),
        fill_rate: None,
    };
    let (receivers, stop) = (Receivers::from(repository.clone()), CancellationToken::new());
    let (status, mut seen) = watch::channel(ClusterStatus::default());
    let reasons = Arc::new(Mutex::new(Vec::new()));
    let (told, stopping) = (Arc::clone(&reasons), stop.clone());
    tokio::spawn(async move {
        while seen.changed().await.is_ok() {
            if let ClusterStatus::Waiting { reason } = &*seen.borrow_and_update() {
                told.lock().unwrap().push(reason.clone());
            }
        }
    });
    let task = tokio::spawn(async move { archive(&source, &receivers, &cluster(), &options, &status, stopping).await });
    (stop, task, reasons)
}

#[tokio::test(start_paused = true)]
async fn nothing_wrong_is_acknowledged_or_archived_and_it_goes_on() {
    for (mood, said) in [
        (Mood::Garbage, "unexpected answer"),
        (Mood::NoLength, "unexpected answer"),
        (Mood::Huge, "unexpected answer"),
        (Mood::Short, "unexpected answer"),
        (Mood::UnknownKind, "unexpected answer"),
        (Mood::CutInAMessage, "closed the connection"),
        (Mood::Backwards, "comes next"),
        (Mood::Ahead, "comes next"),
        (Mood::Overflow, "comes next"),
        (Mood::Silent, "did not answer"),
        (Mood::ErrorAfterCopyBoth, "could not read from WAL segment"),
        (Mood::ErrorInTheMiddle, "could not read from WAL segment"),
        (Mood::EndsWithoutAWord, "without a word"),
        (Mood::EndsForAnOlderTimeline, "is followed by 00000001"),
        (Mood::EndsWithNonsense, "column 1"),
        (Mood::NonsenseIdentity, "column 0"),
        (Mood::NonsenseSegmentSize, "wal_segment_size"),
    ] {
        let stage = Stage::new().await;
        let end = stage.server.write(150, 1);
        stage.acknowledged(end).await;
        stage.suffers(mood, said).await;
        stage.acknowledged(stage.server.write(130, 2)).await;
        stage.check().await;
        stage.stop().await;
    }
}

/// Keepalives that ask are answered, though not each; their end of WAL is nobody's position.
#[tokio::test(start_paused = true)]
async fn a_server_that_pesters_gets_few_answers() {
    let stage = Stage::new().await;
    let end = stage.server.write(150, 1);
    stage.acknowledged(end).await;
    stage.server.state().flushed.clear();
    stage.server.set(Mood::Pesters);
    stage.until("it to pester", |state| state.misbehaved >= 1).await;
    sleep(Duration::from_secs(3)).await;
    let answers = stage.server.state().flushed.clone();
    // Not more than twenty a second.
    assert!((1..=100).contains(&answers.len()), "{} answers", answers.len());
    assert!(answers.iter().all(|(flush, _)| *flush <= end), "{answers:?}");
    stage.server.set(Mood::Well);
    stage.acknowledged(stage.server.write(130, 2)).await;
    stage.check().await;
    stage.stop().await;
}

/// The worst moment: the stream was told more of the parent than its child left of it, and the history of the child is nonsense at
/// first.
#[tokio::test(start_paused = true)]
async fn a_timeline_that_ends_below_what_was_sent() {
    for pages_back in [1, 3, 140] {
        let stage = Stage::new().await;
        let end = stage.server.write(300, 1);
        stage.acknowledged(end).await;
        let fork = Lsn::new(end.get() - pages_back * 8192);
        stage.server.set(Mood::NonsenseHistory);
        stage.server.promote(fork);
        stage.until("nonsense twice", |state| state.misbehaved >= 2).await;
        assert!(stage.reasons.lock().unwrap().iter().any(|reason| reason.contains("history")));
        assert_eq!(stage.read(2, fork.get() / SEGMENT).await.len(), 0, "nothing of it before its history is known");
        stage.server.set(Mood::Well);
        stage.server.write(pages_back + 40, 9);
        let end = stage.server.write(200, 8);
        stage.acknowledged(end).await;
        stage.check().await;
        stage.stop().await;
    }
}

/// Another cluster under the same address: refused for good, and nothing of it is archived; the right one is welcome again.
#[tokio::test(start_paused = true)]
async fn another_system_identifier_on_reconnect() {
    let mut stage = Stage::new().await;
    stage.acknowledged(stage.server.write(150, 1)).await;
    let before = stage.server.state().flushed.len();
    stage.server.set(Mood::AnotherSystem);
    stage.server.write(30, 6);
    let ended = (&mut stage.task).await.unwrap();
    assert!(matches!(ended, Err(ArchiveError::ForeignCluster { .. })), "{ended:?}");
    assert_eq!(stage.server.state().flushed.len(), before, "nothing is reported to it");
    assert_eq!(stage.repository.clusters_named(&cluster()).await.unwrap().len(), 1);
    stage.server.set(Mood::Well);
    stage.again();
    stage.acknowledged(stage.server.write(130, 2)).await;
    stage.check().await;
    stage.stop().await;
}
