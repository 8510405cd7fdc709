//! The server of the simulation: a walsender over pipes in memory, with a slot, timelines and a will to forget WAL. Behind it the
//! real client of the protocol runs unchanged.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;

use super::history::{Timeline, size};
use super::trace::Trace;
use super::wire::{self, Said};
use crate::pg::Dial;
use crate::store::faulty::Random;
use crate::types::{Lsn, TimelineId};
use crate::wal::builder::SYSTEM;

/// Most bytes of one message, as PostgreSQL has it.
pub const MESSAGE: u64 = 128 << 10;

/// Looks at what is acknowledged.
#[async_trait]
pub trait Listener: Send + Sync {
    /// `flush` was reported, which is not zero; what lies before `begins` nobody needs to hold who came later.
    async fn acknowledged(&self, timelines: Vec<Arc<Timeline>>, timeline: TimelineId, flush: Lsn, begins: Lsn);
}

/// See the module. Clones are the same one.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    changed: Notify,
    trace: Trace,
    listener: Box<dyn Listener>,
    synchronous: bool,
}

struct State {
    random: Random,
    /// By number.
    timelines: Vec<Arc<Timeline>>,
    /// WAL before this is gone; and the latest position of which that was ever true, or could have been.
    kept_from: (Lsn, Lsn),
    /// Where the slot begins, if there is one, and who uses it.
    slot: Option<Lsn>,
    slot_user: Option<u64>,
    sessions: u64,
    streams: BTreeMap<u64, Streaming>,
    /// Sessions that began before this has changed are cut.
    generation: u64,
    down: bool,
    stopping: bool,
    /// So many streams fail right after they began.
    trouble: u32,
    /// The newest position that was reported as flushed, on its timeline.
    flushed: (TimelineId, Lsn),
}

struct Streaming {
    timeline: TimelineId,
    sent: Lsn,
    with_slot: bool,
    /// A stopping server has asked and waits.
    waiting: bool,
    flushed: Lsn,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Server")
    }
}

impl Dial for Server {
    fn dial(&self) -> io::Result<DuplexStream> {
        if self.state().down {
            self.0.trace.note("refused");
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = duplex(64 << 10);
        tokio::spawn(self.clone().serve(theirs));
        Ok(ours)
    }
}

/// What a stream does next.
enum Step {
    Send(Vec<u8>),
    Ended { next: TimelineId, fork: Lsn },
    Ask(Lsn),
    Stopped,
    Idle(Lsn),
}

impl Server {
    pub fn new(first: Timeline, seed: u64, synchronous: bool, trace: Trace, listener: Box<dyn Listener>) -> Server {
        let start = first.end();
        let state = State {
            random: Random::new(seed),
            timelines: vec![Arc::new(first)],
            kept_from: (start, start),
            slot: None,
            slot_user: None,
            sessions: 0,
            streams: BTreeMap::new(),
            generation: 0,
            down: false,
            stopping: false,
            trouble: 0,
            flushed: (TimelineId::FIRST, Lsn::ZERO),
        };
        Server(Arc::new(Inner { state: Mutex::new(state), changed: Notify::new(), trace, listener, synchronous }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.0.changed.notify_waiters();
        result
    }

    // ---- what happens to it

    /// Writes WAL, so many moments of it; only little once `most` is reached.
    pub fn write(&self, moments: u64, most: Lsn) {
        let end = self.change(|state| {
            let State { random, timelines, down, stopping, .. } = state;
            let is_up = !*down && !*stopping;
            // None while somebody compares with it.
            if let Some(last) = timelines.last_mut().and_then(Arc::get_mut).filter(|_| is_up) {
                for _ in 0..moments {
                    if last.end() < most { last.write(random) } else { last.write_little(random) }
                }
            }
            timelines.last().map_or(Lsn::ZERO, |last| last.end())
        });
        self.0.trace.note(format!("written to {end}"));
    }

    /// Every connection breaks.
    pub fn cut(&self) {
        self.0.trace.note("cut");
        self.change(|state| state.generation += 1);
    }

    pub fn set_down(&self, down: bool) {
        self.0.trace.note(format!("down {down}"));
        self.change(|state| {
            state.down = down;
            state.generation += u64::from(down);
            state.stopping &= !down;
        });
    }

    /// It shuts down in order: waits for what it has sent to be flushed.
    pub fn stop(&self) {
        self.0.trace.note("stopping");
        self.change(|state| state.stopping = true);
    }

    pub fn is_streaming(&self) -> bool {
        !self.state().streams.is_empty()
    }

    /// The next streams fail right after they began.
    pub fn trouble(&self, streams: u32) {
        self.state().trouble = streams;
    }

    /// Forgets what the slot does not keep.
    pub fn checkpoint(&self) {
        let kept = self.change(|state| {
            if let Some(slot) = state.slot {
                state.kept_from.0 = state.kept_from.0.max(slot.segment_start(size()));
                state.kept_from.1 = state.kept_from.1.max(state.kept_from.0);
            }
            state.kept_from.0
        });
        self.0.trace.note(format!("kept from {kept}"));
    }

    /// A standby takes over that has not got all, or is this very server; the slot is there or is not.
    pub fn promote(&self) {
        let told = self.change(|state| {
            let State { random, timelines, streams, slot, generation, kept_from, .. } = state;
            let last = timelines.last()?;
            let lag = if random.below(2) == 0 { 1 } else { 16 };
            let fork = last.some_end(random, lag).filter(|fork| *fork > last.history.begins_at())?;
            let next = TimelineId::new(last.history.timeline().get() + 1)?;
            let mut child = last.fork(fork, next);
            child.write_little(random);
            timelines.push(Arc::new(child));
            // Who has got more than the fork was connected to another server.
            let elsewhere = random.below(2) == 0 || streams.values().any(|stream| stream.sent > fork);
            *generation += u64::from(elsewhere);
            if random.below(2) == 0 || slot.is_some_and(|slot| slot > fork) {
                *slot = None;
            }
            kept_from.0 = kept_from.0.min(fork.segment_start(size()));
            Some(format!("timeline {} begins at {fork}, elsewhere: {elsewhere}, slot: {slot:?}", next.get()))
        });
        self.0.trace.note(told.unwrap_or_else(|| "no promotion".to_owned()));
    }

    // ---- what is true of it

    pub fn timelines(&self) -> Vec<Arc<Timeline>> {
        self.state().timelines.clone()
    }

    pub fn end(&self) -> Lsn {
        self.state().timelines.last().map_or(Lsn::ZERO, |last| last.end())
    }

    /// The newest position that was reported as flushed, and on which timeline; and where the oldest WAL may begin that has to
    /// be held.
    pub fn flushed(&self) -> (TimelineId, Lsn, Lsn) {
        let state = self.state();
        (state.flushed.0, state.flushed.1, state.kept_from.1)
    }

    // ---- sessions

    async fn serve(self, pipe: DuplexStream) {
        let (id, generation) = {
            let mut state = self.state();
            state.sessions += 1;
            (state.sessions, state.generation)
        };
        {
            let (mut read, mut write) = split(pipe);
            tokio::select! {
                biased;
                () = self.cut_since(generation) => {}
                _ = self.session(id, &mut read, &mut write) => {}
            }
        }
        // It takes a server a while to notice.
        let linger = self.state().random.below(300);
        self.0.trace.note(format!("session {id} is over"));
        self.change(|state| {
            state.streams.remove(&id);
        });
        sleep(Duration::from_millis(linger)).await;
        self.change(|state| state.slot_user = state.slot_user.filter(|user| *user != id));
    }

    async fn cut_since(&self, generation: u64) {
        loop {
            let mut changed = std::pin::pin!(self.0.changed.notified());
            changed.as_mut().enable();
            if self.state().generation != generation {
                return;
            }
            changed.await;
        }
    }

    async fn session(
        &self,
        id: u64,
        read: &mut (impl AsyncRead + Unpin),
        write: &mut (impl AsyncWrite + Unpin),
    ) -> io::Result<()> {
        let parameters = wire::startup(read).await?;
        let is_walsender = parameters.iter().any(|word| word == "replication");
        self.0.trace.note(format!("session {id} {}", if is_walsender { "walsender" } else { "SQL" }));
        self.think().await;
        write.write_all(&wire::welcome("17.4")).await?;
        let (sender, mut inbox) = mpsc::unbounded_channel();
        let listening = async {
            loop {
                match wire::said(read).await {
                    Ok(Said::Status { write, flush, apply, .. }) => {
                        self.told(id, Lsn::new(write), Lsn::new(flush), Lsn::new(apply)).await;
                    }
                    Ok(said) => drop(sender.send(said)),
                    Err(error) => return Err::<(), io::Error>(error),
                }
            }
        };
        let speaking = async {
            while let Some(said) = inbox.recv().await {
                match said {
                    Said::Query(sql) => {
                        self.think().await;
                        self.answer(id, &sql, write, &mut inbox).await?;
                    }
                    Said::Terminate => break,
                    _ => {}
                }
            }
            Ok::<(), io::Error>(())
        };
        tokio::select! {
            biased;
            heard = listening => heard,
            spoken = speaking => spoken,
        }
    }

    async fn think(&self) {
        let while_ = self.state().random.below(10);
        sleep(Duration::from_millis(while_)).await;
    }

    async fn answer(
        &self,
        id: u64,
        sql: &str,
        write: &mut (impl AsyncWrite + Unpin),
        said: &mut mpsc::UnboundedReceiver<Said>,
    ) -> io::Result<()> {
        let word = sql.split(' ').next().unwrap_or_default();
        self.0.trace.note(format!("session {id} {}", if word == "SELECT" { word } else { sql }));
        if word == "START_REPLICATION" {
            return self.start(id, sql, write, said).await;
        }
        let answer = {
            let mut state = self.state();
            let last = Arc::clone(state.timelines.last().expect("there is one"));
            match word {
                "IDENTIFY_SYSTEM" => {
                    let (system, timeline) = (SYSTEM.to_string(), last.history.timeline().get().to_string());
                    wire::answer(Some(&[Some(&system), Some(&timeline), Some(&last.end().to_string()), None]))
                }
                "SHOW" => wire::answer(Some(&[Some("1MB")])),
                "TIMELINE_HISTORY" => {
                    let number: usize = sql.split(' ').nth(1).and_then(|number| number.parse().ok()).unwrap_or(0);
                    let text = state.timelines.get(number.wrapping_sub(1)).map(|of| of.history.to_text());
                    match text {
                        Some(text) => wire::answer(Some(&[Some("history"), Some(&text)])),
                        None => [wire::error("ERROR", "58P01", "no such history"), wire::ready()].concat(),
                    }
                }
                "CREATE_REPLICATION_SLOT" if state.slot.is_some() => {
                    [wire::error("ERROR", "42710", "it exists"), wire::ready()].concat()
                }
                "CREATE_REPLICATION_SLOT" => {
                    state.slot = Some(state.kept_from.0);
                    wire::answer(Some(&[Some("pgkeep"), Some("0/0"), None, None]))
                }
                "SELECT" if sql.contains("pg_is_in_recovery") => wire::answer(Some(&[Some("f")])),
                "SELECT" => match state.slot {
                    None => wire::answer(None),
                    Some(slot) => {
                        let (slot, active) = (slot.to_string(), if state.slot_user.is_some() { "t" } else { "f" });
                        wire::answer(Some(&[Some(&slot), Some("reserved"), Some(active), None]))
                    }
                },
                "READ_REPLICATION_SLOT" => match state.slot {
                    None => wire::answer(Some(&[None, None, None])),
                    Some(slot) => wire::answer(Some(&[Some("physical"), Some(&slot.to_string()), None])),
                },
                _ => [wire::error("ERROR", "42601", "not understood"), wire::ready()].concat(),
            }
        };
        write.write_all(&answer).await
    }

    async fn start(
        &self,
        id: u64,
        sql: &str,
        write: &mut (impl AsyncWrite + Unpin),
        said: &mut mpsc::UnboundedReceiver<Said>,
    ) -> io::Result<()> {
        let words: Vec<&str> = sql.split(' ').collect();
        let after = |word: &str| words.iter().position(|w| *w == word).and_then(|at| words.get(at + 1).copied());
        let at: Lsn = after("PHYSICAL").and_then(|text| text.parse().ok()).unwrap_or(Lsn::ZERO);
        let timeline = after("TIMELINE").and_then(|text| text.parse().ok()).and_then(TimelineId::new);
        let timeline = timeline.unwrap_or(TimelineId::FIRST);
        let with_slot = after("SLOT").is_some();
        let refusal = {
            let mut state = self.state();
            let ends = state.ends(timeline);
            let refused = |code, reason| Some([wire::error("ERROR", code, reason), wire::ready()].concat());
            match ends {
                _ if with_slot && state.slot_user.is_some() => refused("55006", "the slot is in use"),
                _ if with_slot && state.slot.is_none() => refused("42704", "there is no such slot"),
                None => refused("XX000", "not in this server's history"),
                Some((end, Some(next))) if at == end => Some(wire::timeline_ended(next.get(), &end.to_string())),
                Some((end, Some(_))) if at > end => refused("XX000", "not in this server's history"),
                Some((end, _)) => {
                    let broken = state.trouble > 0;
                    state.trouble = state.trouble.saturating_sub(1);
                    let error = match () {
                        () if at < state.kept_from.0 => Some(("58P01", "it has already been removed")),
                        () if at > end => Some(("XX000", "ahead of the flush position")),
                        () if broken => Some(("57P01", "something is wrong here")),
                        () => None,
                    };
                    if error.is_none() {
                        let stream = Streaming { timeline, sent: at, with_slot, waiting: false, flushed: Lsn::ZERO };
                        state.streams.insert(id, stream);
                        state.slot_user = if with_slot { Some(id) } else { state.slot_user };
                    }
                    error.and_then(|(code, reason)| Some([wire::copy_both(), refused(code, reason)?].concat()))
                }
            }
        };
        if let Some(refusal) = refusal {
            self.0.trace.note(format!("session {id} is refused"));
            return write.write_all(&refusal).await;
        }
        write.write_all(&wire::copy_both()).await?;
        self.stream(id, write, said).await?;
        self.change(|state| {
            state.streams.remove(&id);
            state.slot_user = state.slot_user.filter(|user| *user != id);
        });
        Ok(())
    }

    async fn stream(
        &self,
        id: u64,
        write: &mut (impl AsyncWrite + Unpin),
        said: &mut mpsc::UnboundedReceiver<Said>,
    ) -> io::Result<()> {
        loop {
            let mut changed = std::pin::pin!(self.0.changed.notified());
            changed.as_mut().enable();
            match said.try_recv() {
                Ok(Said::CopyDone) => return write.write_all(&copy_is_over()).await,
                Err(mpsc::error::TryRecvError::Disconnected) => return Err(io::ErrorKind::BrokenPipe.into()),
                Ok(_) | Err(mpsc::error::TryRecvError::Empty) => {}
            }
            let (step, pause, patience) = {
                let mut state = self.state();
                let pause = if state.random.below(4) == 0 { state.random.below(4) } else { 0 };
                let patience = 50 + state.random.below(8_000);
                (state.step(id), pause, patience)
            };
            match step {
                None => return Err(io::ErrorKind::BrokenPipe.into()),
                Some(Step::Send(bytes)) => {
                    write.write_all(&bytes).await?;
                    sleep(Duration::from_millis(pause)).await;
                }
                Some(Step::Ended { next, fork }) => {
                    self.0.trace.note(format!("session {id} the timeline ended"));
                    write.write_all(&wire::copy_done()).await?;
                    while said.recv().await.ok_or(io::ErrorKind::BrokenPipe)? != Said::CopyDone {}
                    return write.write_all(&wire::timeline_ended(next.get(), &fork.to_string())).await;
                }
                Some(Step::Ask(end)) => write.write_all(&wire::keepalive(end.get(), true)).await?,
                Some(Step::Stopped) => {
                    self.0.trace.note(format!("session {id} goodbye"));
                    write.write_all(&wire::complete("COPY 0")).await?;
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                Some(Step::Idle(end)) => {
                    tokio::select! {
                        biased;
                        said = said.recv() => match said {
                            Some(Said::CopyDone) => return write.write_all(&copy_is_over()).await,
                            Some(_) => {}
                            None => return Err(io::ErrorKind::BrokenPipe.into()),
                        },
                        () = changed => {}
                        () = sleep(Duration::from_millis(patience)) => {
                            write.write_all(&wire::keepalive(end.get(), patience % 4 == 0)).await?;
                        }
                    }
                }
            }
        }
    }

    /// A status came in.
    async fn told(&self, id: u64, write: Lsn, flush: Lsn, apply: Lsn) {
        self.0.trace.note(format!("session {id} status {write} {flush} {apply}"));
        let checked = self.change(|state| {
            let stream = state.streams.get_mut(&id)?;
            stream.waiting = false;
            if flush == Lsn::ZERO {
                return None;
            }
            let again = std::mem::replace(&mut stream.flushed, flush) == flush;
            let (timeline, sent, with_slot) = (stream.timeline, stream.sent, stream.with_slot);
            let slot = state.slot.unwrap_or(Lsn::ZERO);
            // One that was empty begins where the slot does.
            let begins = slot.segment_start(size()).max(state.kept_from.1);
            state.kept_from.1 = begins;
            if with_slot && state.slot.is_some() && flush > slot {
                state.slot = Some(flush);
            }
            state.flushed = (timeline, flush);
            let goes_back = with_slot && flush < slot;
            (!again).then(|| (state.timelines.clone(), timeline, sent, begins, goes_back))
        });
        let Some((timelines, timeline, sent, begins, goes_back)) = checked else { return };
        if flush > sent || write > sent || apply > sent {
            self.0.trace.wrong(format!("{write} {flush} {apply} is reported, {sent} was sent"));
        }
        if goes_back {
            self.0.trace.wrong(format!("the slot goes back to {flush}"));
        }
        if apply != flush || (self.0.synchronous && write != flush) || write < flush {
            self.0.trace.wrong(format!("write {write}, flush {flush}, apply {apply} do not go together"));
        }
        self.0.listener.acknowledged(timelines, timeline, flush, begins).await;
    }
}

fn copy_is_over() -> Vec<u8> {
    [wire::copy_done(), wire::complete("COPY 0"), wire::ready()].concat()
}

impl State {
    /// Where a timeline ends on the way to the newest one, and which comes next; `None` where it is not on that way.
    fn ends(&self, timeline: TimelineId) -> Option<(Lsn, Option<TimelineId>)> {
        let last = self.timelines.last()?;
        if last.history.timeline() == timeline {
            return Some((last.end(), None));
        }
        let path = last.history.path();
        let at = path.iter().position(|stretch| stretch.0 == timeline)?;
        Some((path[at].2?, Some(path.get(at + 1)?.0)))
    }

    fn step(&mut self, id: u64) -> Option<Step> {
        let (timeline, sent) = self.streams.get(&id).map(|stream| (stream.timeline, stream.sent))?;
        let (end, next) = self.ends(timeline)?;
        if sent < end {
            let most = if self.random.below(3) == 0 { 3_000 } else { MESSAGE };
            let to = sent.advance((1 + self.random.below(most)).min(end.get() - sent.get()));
            let number = timeline.get() as usize - 1;
            let bytes = wire::wal(sent.get(), end.get(), self.timelines.get(number)?.bytes(sent, to));
            self.streams.get_mut(&id)?.sent = to;
            return Some(Step::Send(bytes));
        }
        if let Some(next) = next {
            return Some(Step::Ended { next, fork: end });
        }
        let stopping = self.stopping;
        let stream = self.streams.get_mut(&id)?;
        Some(match stopping {
            true if stream.flushed >= end => Step::Stopped,
            true if !stream.waiting => {
                stream.waiting = true;
                Step::Ask(end)
            }
            _ => Step::Idle(end),
        })
    }
}
