//! One seed: repositories, a server and an archiver, what befalls them, and what must be true all the while.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::depot::Depot;
use super::history::{SIZE, Timeline};
use super::judge::{Lack, Seen};
use super::server::{Listener, MESSAGE, Server};
use super::trace::Trace;
use crate::archive::probe::{self, Bug};
use crate::archive::{ArchiveOptions, ClusterStatus, Doing, OpenError, Opener, Progress, Receivers, Source, archive};
use crate::catalog::{ON_THE_SPOT, Repository, Usage};
use crate::pg::conninfo::Environment;
use crate::pg::{ConnInfo, ConnectOptions};
use crate::seal::{KeyFile, SEED};
use crate::store::Store;
use crate::store::faulty::{FaultPlan, Faulty, Random};
use crate::store::memory::{MemoryOptions, MemoryStore};
use crate::store::retry::{Retry, RetryPolicy};
use crate::types::{ClusterId, ClusterName, Digest, Id128, Lsn, SystemId, TimelineId};
use crate::wal::builder::SYSTEM;

/// What a stream may hold: so little that it matters.
const MEMORY: u64 = 3 << 20;
/// When nothing fails any more, everything has arrived after this long.
const SOON: Duration = Duration::from_secs(1800);

/// What became of a seed.
#[derive(Debug)]
pub struct Outcome {
    /// What must not be and was.
    pub violation: Option<String>,
    /// Of the whole trace.
    pub digest: Digest,
    /// Steps of the trace.
    pub steps: u64,
    /// What happened, for those who count.
    pub lives: u64,
    pub timelines: usize,
}

/// Runs a seed; two runs of one are the same.
pub fn run(seed: u64, bug: Option<Bug>, shown: bool) -> Outcome {
    probe::begin(bug, Some(MEMORY));
    ON_THE_SPOT.set(true);
    SEED.set(Some(0));
    keys(0); // made once, for all seeds
    SEED.set(Some(seed << 32));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let outcome = runtime.block_on(async { World::new(seed, shown).await.run().await });
    drop(runtime);
    ON_THE_SPOT.set(false);
    SEED.set(None);
    probe::begin(None, None);
    outcome
}

/// Keys of two realms: making them takes longer than a seed.
fn keys(realm: usize) -> &'static KeyFile {
    static KEYS: OnceLock<[KeyFile; 2]> = OnceLock::new();
    &KEYS.get_or_init(|| [(); 2].map(|()| KeyFile::generate().unwrap()))[realm]
}

/// A repository as the archiver comes to it.
#[derive(Debug)]
struct Door {
    name: String,
    realm: usize,
    depot: Depot,
    faults: Faulty,
    /// Asks again by itself, as the stores of `pgkeep run` do.
    retries: bool,
    seed: u64,
}

#[derive(Debug)]
struct Handle {
    door: Arc<Door>,
    writer: Id128,
    began: Instant,
}

fn usage(began: Instant, writer: Id128) -> Usage {
    // Making and opening keys would take most of a seed's time: lives of one day share theirs.
    Usage { clock: Arc::new(move || clock(began)), writer, short_lived: true }
}

fn clock(began: Instant) -> Timestamp {
    Timestamp::from_second(1_790_000_000).unwrap() + began.elapsed()
}

#[async_trait]
impl Opener for Handle {
    fn name(&self) -> &str {
        &self.door.name
    }

    async fn open(&self) -> Result<Repository, OpenError> {
        let Door { name, realm, faults, retries, seed, .. } = self.door.as_ref();
        let policy = RetryPolicy {
            attempts: 4,
            budget: Duration::from_secs(20),
            attempt: Duration::from_secs(5),
            ..RetryPolicy::default()
        };
        let store: Arc<dyn Store> = match retries {
            true => Arc::new(Retry::with_seed(Arc::new(faults.clone()), policy, *seed)),
            false => Arc::new(faults.clone()),
        };
        Ok(Repository::open_for(name, store, keys(*realm).clone(), usage(self.began, self.writer)).await?)
    }
}

/// Who looks at every acknowledgement.
#[derive(Clone)]
struct Judge(Arc<JudgeInner>);

struct JudgeInner {
    seen: tokio::sync::Mutex<Vec<Seen>>,
    needed: usize,
    id: ClusterId,
    trace: Trace,
}

#[async_trait]
impl Listener for Judge {
    async fn acknowledged(&self, timelines: Vec<Arc<Timeline>>, timeline: TimelineId, flush: Lsn, begins: Lsn) {
        let JudgeInner { seen, needed, id, trace } = self.0.as_ref();
        let (mut holders, mut reasons) = (0, Vec::new());
        for (index, one) in seen.lock().await.iter_mut().enumerate() {
            match one.holds(id, &timelines, timeline, flush, begins).await {
                Ok(()) => holders += 1,
                Err(Lack::Missing(reason)) => reasons.push(format!("r{index}: {reason}")),
                Err(Lack::Wrong(reason)) => trace.wrong(format!("r{index}: {reason}")),
            }
        }
        if holders < *needed {
            let reasons = reasons.join("; ");
            trace.wrong(format!(
                "{flush} on timeline {timeline} is acknowledged, {holders} of {needed} hold it: {reasons}"
            ));
        }
    }
}

struct World {
    random: Random,
    trace: Trace,
    began: Instant,
    doors: Vec<Arc<Door>>,
    judge: Judge,
    server: Server,
    needed: usize,
    options: ArchiveOptions,
    /// WAL beyond this comes in drops.
    most: Lsn,
    /// The archiver that runs: how to stop it, and what it is doing.
    life: Mutex<Option<(CancellationToken, watch::Receiver<ClusterStatus>)>>,
    lives: Mutex<u64>,
}

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

impl World {
    async fn new(seed: u64, shown: bool) -> World {
        let mut random = Random::new(seed);
        let (trace, began) = (Trace::new(shown), Instant::now());
        let repositories = [1, 2, 2, 3][random.below(4) as usize];
        let needed = 1 + random.below(repositories as u64) as usize;
        let synchronous = random.below(2) == 0;
        let id = ClusterId { name: cluster(), system: SystemId::new(SYSTEM) };
        let (mut doors, mut seen) = (Vec::new(), Vec::new());
        for index in 0..repositories {
            let (name, realm, appends) = (format!("r{index}"), random.below(2) as usize, random.below(2) == 0);
            let options = MemoryOptions { clock: Box::new(move || clock(began)), appends, ..MemoryOptions::default() };
            let memory = MemoryStore::with(options);
            let usage = usage(began, Id128::new([index as u8; 16]));
            let plain = Repository::create_for(&name, Arc::new(memory.clone()), keys(realm), usage).await.unwrap();
            let depot = Depot::new(index, memory, trace.clone(), random.next());
            let faults = Faulty::new(Arc::new(depot.clone()), FaultPlan::none(), random.next());
            seen.push(Seen::new(plain, depot.clone()));
            let (retries, seed) = (random.below(2) == 0, random.next());
            doors.push(Arc::new(Door { name, realm, depot, faults, retries, seed }));
        }
        let judge = Judge(Arc::new(JudgeInner { seen: seen.into(), needed, id, trace: trace.clone() }));
        let start = Lsn::new((3 + random.below(300)) * SIZE);
        let most = start.advance(SIZE / 4 + random.below(3 * SIZE / 2));
        let first = Timeline::first(start);
        let server = Server::new(first, random.next(), synchronous, trace.clone(), Box::new(judge.clone()));
        server.write(2, most);
        let options = ArchiveOptions {
            max_delay: Duration::from_millis(20 + random.below(2_000)),
            synchronous,
            range_interval: Duration::from_millis(25 * random.below(3)),
            shutdown_deadline: Duration::from_secs(1 + random.below(10)),
            fill_rate: None,
        };
        trace.note(format!("seed {seed}: {repositories} repositories, {needed} needed, {options:?}"));
        let (life, lives) = (Mutex::default(), Mutex::default());
        World { random, trace, began, doors, judge, server, needed, options, most, life, lives }
    }

    async fn run(mut self) -> Outcome {
        let mut random = self.random.clone();
        let trace = self.trace.clone();
        let seeds_of_lives = self.random.next();
        tokio::select! {
            biased;
            () = trace.is_wrong() => {}
            () = self.live(seeds_of_lives) => {}
            () = self.befall(&mut random) => {}
        }
        let held = probe::most_held();
        if held > MEMORY + MESSAGE {
            trace.wrong(format!("{held} bytes were held, {MEMORY} are the most"));
        }
        let lives = *self.lives.lock().unwrap_or_else(PoisonError::into_inner);
        Outcome {
            violation: trace.violation(),
            digest: trace.digest(),
            steps: trace.steps(),
            lives,
            timelines: self.server.timelines().len(),
        }
    }

    // ---- the archiver

    /// One life after the other.
    async fn live(&self, seed: u64) {
        let name = cluster();
        let mut random = Random::new(seed);
        let source = Source {
            conninfo: ConnInfo::resolve("host=/simulated user=pgkeep", &Environment::new([], None, None)).unwrap(),
            connect: ConnectOptions {
                timeout: Duration::from_secs(10),
                dial: Some(Arc::new(self.server.clone())),
                ..ConnectOptions::default()
            },
            slot: "pgkeep".to_owned(),
        };
        loop {
            let life = {
                let mut lives = self.lives.lock().unwrap_or_else(PoisonError::into_inner);
                *lives += 1;
                *lives
            };
            self.trace.note(format!("life {life}"));
            let mut writer = [0xEE; 16];
            writer[..8].copy_from_slice(&life.to_be_bytes());
            let handle = |door: &Arc<Door>| {
                let (door, writer, began) = (Arc::clone(door), Id128::new(writer), self.began);
                Arc::new(Handle { door, writer, began }) as Arc<dyn Opener>
            };
            let receivers = Receivers::new(self.doors.iter().map(handle), self.needed).without_index();
            let (status, seen) = watch::channel(ClusterStatus::default());
            let stop = CancellationToken::new();
            *self.life.lock().unwrap_or_else(PoisonError::into_inner) = Some((stop.clone(), seen));
            tokio::select! {
                biased;
                () = self.trace.crash() => self.trace.note("killed"),
                ended = archive(&source, &receivers, &name, &self.options, &status, stop.clone()) => match ended {
                    Ok(()) => self.trace.note("stopped"),
                    Err(_) if stop.is_cancelled() => self.trace.note("stopped badly"),
                    Err(error) => self.trace.wrong(format!("the archiver gave up: {error}")),
                },
            }
            self.again().await;
            sleep(Duration::from_millis(random.below(1_500))).await;
        }
    }

    /// What was acknowledged still holds.
    async fn again(&self) {
        let (timeline, flush, begins) = self.server.flushed();
        if flush > Lsn::ZERO {
            self.judge.acknowledged(self.server.timelines(), timeline, flush, begins).await;
        }
    }

    fn progress(&self) -> Option<Progress> {
        let life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
        match &*life.as_ref()?.1.borrow() {
            ClusterStatus::Streaming(progress) => Some(progress.clone()),
            ClusterStatus::Connecting | ClusterStatus::Waiting { .. } => None,
        }
    }

    // ---- what befalls them

    async fn befall(&self, random: &mut Random) {
        for _ in 0..8 + random.below(14) {
            self.event(random).await;
            let pause = match random.below(40) {
                0 => 70_000,
                1..4 => random.below(8_000),
                _ => random.below(300),
            };
            sleep(Duration::from_millis(pause)).await;
        }
        self.heal().await;
    }

    async fn event(&self, random: &mut Random) {
        let door = &self.doors[random.below(self.doors.len() as u64) as usize];
        let name = &door.name;
        match random.below(100) {
            0..38 => self.server.write(1 + random.below(5), self.most),
            38..44 => self.server.cut(),
            44..50 => self.trace.crash_in(1 + random.below(60)),
            50..54 => {
                let life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
                self.trace.note("stop");
                life.iter().for_each(|(stop, _)| stop.cancel());
            }
            54..64 => {
                let plan = match random.below(5) {
                    0 | 1 => FaultPlan { before: 1.0, tails: true, ..FaultPlan::none() },
                    2 => FaultPlan { after: 0.5, tails: true, ..FaultPlan::none() },
                    3 => FaultPlan { tails: true, ..FaultPlan::network(0.15) },
                    _ if door.retries => {
                        let hour = Duration::from_secs(3600);
                        FaultPlan { delay: 1.0, delay_from: hour, delay_to: hour, ..FaultPlan::none() }
                    }
                    _ => FaultPlan { tails: true, ..FaultPlan::network(0.4) },
                };
                self.trace.note(format!("{name}: {plan:?}"));
                door.faults.set_plan(plan);
            }
            64..72 => {
                self.trace.note(format!("{name} is well"));
                door.faults.set_plan(FaultPlan::none());
            }
            72..80 => {
                let most = [0, 4, 60, 600, 4_000][random.below(5) as usize];
                self.trace.note(format!("{name} takes up to {most} ms"));
                door.depot.set_latency(most);
            }
            80..86 => self.server.promote(),
            86..93 => self.server.checkpoint(),
            93..95 => self.server.trouble(1 + random.below(2) as u32),
            95..97 => {
                self.server.stop();
                let until = Instant::now() + Duration::from_secs(20);
                while self.server.is_streaming() && Instant::now() < until {
                    sleep(Duration::from_millis(200)).await;
                }
                self.be_down(random).await;
            }
            _ => self.be_down(random).await,
        }
    }

    async fn be_down(&self, random: &mut Random) {
        self.server.set_down(true);
        sleep(Duration::from_millis(random.below(3_000))).await;
        self.server.set_down(false);
    }

    /// Nothing fails any more: everything arrives.
    async fn heal(&self) {
        self.trace.note("all is well");
        for door in &self.doors {
            door.faults.set_plan(FaultPlan::none());
            door.depot.set_latency(4);
        }
        self.server.trouble(0);
        self.server.write(2, self.most);
        let until = Instant::now() + SOON;
        while let Err(reason) = self.has_arrived() {
            if Instant::now() > until {
                return self.trace.wrong(format!("after {SOON:?} not everything has arrived: {reason}"));
            }
            sleep(Duration::from_millis(500)).await;
        }
        self.trace.note("everything has arrived");
        // Until open pieces of complete segments have been removed.
        sleep(Duration::from_secs(90)).await;
        self.again().await;
        let (timelines, end) = (self.server.timelines(), self.server.end());
        let truth = timelines.last().expect("there is one");
        let (_, _, begins) = self.server.flushed();
        let JudgeInner { seen, id, .. } = self.judge.0.as_ref();
        for (index, one) in seen.lock().await.iter_mut().enumerate() {
            let holds = one.holds(id, &timelines, truth.history.timeline(), end, begins).await;
            if let Err(Lack::Missing(reason) | Lack::Wrong(reason)) = holds {
                self.trace.wrong(format!("r{index} at the end: {reason}"));
            }
            let is_whole = one.is_whole(id, truth, end).await;
            for checked in [is_whole, one.depot.check_contents().await] {
                if let Err(reason) = checked {
                    self.trace.wrong(format!("r{index} at the end: {reason}"));
                }
            }
        }
    }

    fn has_arrived(&self) -> Result<(), String> {
        let (end, (_, flushed, _)) = (self.server.end(), self.server.flushed());
        let progress = self.progress().ok_or("nothing is streamed")?;
        for of in &progress.repositories {
            if of.doing != Doing::Live || of.frontier.is_none_or(|frontier| frontier < end) {
                return Err(format!("{of:?}, {end} is the end"));
            }
        }
        // At a segment's border one byte less is reported.
        if flushed.advance(1) < end {
            return Err(format!("{flushed} of {end} is reported"));
        }
        Ok(())
    }
}
