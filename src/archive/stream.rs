//! One stream of WAL into the repositories of a cluster, until something ends it.
//!
//! Invariant, for each repository: `durable <= cut <= received`, and each only grows. What PostgreSQL is told is flushed is
//! what as many repositories as are needed hold: it is computed from completed puts and appends, never from what was sent
//! (P1), and a repository counts only after the bytes that it held before have compared equal.
//! A repository that fails is away; one that keeps the others waiting is, too. It is filled up from another one
//! ([`super::filler`]) and takes part again. The stream goes on while one of them takes what comes.
//!
//! Memory: what is received and not yet durable as a whole part in every live repository, at most [`MEMORY`]; with several
//! repositories the same again in sealed form for each realm, since parts are sealed once for all. Beyond it the socket is
//! left alone and PostgreSQL keeps the WAL (P8). Besides, what [`super::indexer`] has not read yet.
//! Crash: nothing of ours is on disk. The next start asks the repositories where their bytes end.
//! Cancellation: `stop` makes what was received durable, reports it, and ends; dropping the future leaves whole objects
//! or none, and a tail of whole frames.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ArchiveError;
use super::alarm::{Alarms, Note, copy_notes, put_notes};
use super::begin::{Begin, StreamOptions};
use super::fill::{Path, Position, Step};
use super::filler::{Filled, Filler, Horizon, Letter, News, Pace};
use super::frontier::{acknowledged, reported};
use super::indexer::{Indexer, Streamed};
use super::lane::{Done, Entry, InMemory, Live, Newest, PARTS_UNDER_WAY, Side, next_done};
use super::lanes::{Lanes, Standing};
use super::load::Served;
use super::part::{MAX_PART, Part, WholePart};
use super::probe::{self, Bug};
use super::status::{Arrivals, ClusterStatus, Doing, Progress, RepositoryProgress};
use super::uploader::{RangeBytes, Uploader};
use crate::catalog::Repository;
use crate::pg::{PgError, Status, StreamEvent, TimelineEnd, WalStream};
use crate::types::{Lsn, PgTimestamp};
use crate::wal::receiver::{ReceiveError, Receiver};

/// Bytes received and not yet durable as a whole part, at most: two parts of the largest size.
const MEMORY: u64 = 128 << 20;
/// A status is sent at least this often; the server's `wal_sender_timeout` is a minute unless set.
const STATUS_EVERY: Duration = Duration::from_secs(10);
/// A server that stops asks again after each answer: not more than twenty a second.
const REPLY_PAUSE: Duration = Duration::from_millis(50);
/// A request for a status that follows our last one this soon is a stopping server's.
const ASKS_AGAIN: Duration = Duration::from_secs(1);
/// One repository may keep the stream waiting for this long while another has nothing to do.
const PATIENCE: Duration = Duration::from_secs(2);
/// At the end, when enough repositories have everything, the others get this much longer.
const LINGER: Duration = Duration::from_secs(2);
/// Letters of fillers that wait to be read.
const LETTERS: usize = 64;

/// How a repository comes to a stream that begins.
#[derive(Debug)]
pub(super) enum Arrival {
    /// It is as far as the stream: it takes part from the first byte on.
    Live(Box<Filled>),
    /// It is behind.
    Behind(Box<Filled>),
    /// It could not be opened or loaded, or must not be used.
    Away(ArchiveError),
}

/// How a stream ended.
#[derive(Debug)]
pub enum StreamEnd {
    /// `stop` was asked for, and what had been received is durable and reported.
    Stopped,
    /// The server left this timeline; what was received of it is durable.
    TimelineEnded(TimelineEnd),
    /// The server shuts down.
    ServerStopped,
}

/// See the module.
pub(super) struct Stream {
    wal: WalStream,
    served: Arc<Served>,
    begin: Begin,
    options: StreamOptions,
    receiver: Receiver,
    part: Part,
    /// Complete parts that a live repository has not confirmed, in order.
    recent: VecDeque<Arc<WholePart>>,
    recent_bytes: u64,
    lanes: Lanes,
    /// As in `lanes`.
    sides: Vec<Side>,
    path: Path,
    horizon: watch::Sender<Horizon>,
    letters: (mpsc::Sender<Letter>, mpsc::Receiver<Letter>),
    /// Since when there is no room because of one repository.
    stalled_since: Option<Instant>,
    /// It was said that too few repositories take part.
    told_too_few: bool,
    since: Instant,
    arrivals: Arrivals,
    alarms: Alarms,
    status: watch::Sender<ClusterStatus>,
    indexer: Indexer,
    server_end: Lsn,
    server_time: PgTimestamp,
    last_status: Option<Instant>,
    last_reported: Lsn,
    /// The server asked for a status.
    reply_wanted: bool,
    /// The position that the server waits for.
    asked: Option<Asked>,
}

/// The server asked for a status before its newest WAL was durable.
#[derive(Debug, Clone, Copy)]
struct Asked {
    since: Instant,
    /// What it had sent by then.
    position: Lsn,
    /// It has asked again at once: it stops, and waits for us.
    again: bool,
}

/// What is left to do at the end.
struct Ending {
    deadline: Instant,
    /// Since when enough repositories have everything.
    enough_since: Option<Instant>,
    end: Result<StreamEnd, ArchiveError>,
}

impl Stream {
    /// A stream that the server has just begun to send. `arrivals` are the members, in order, and how they come.
    pub fn new(
        wal: WalStream,
        served: Arc<Served>,
        begin: Begin,
        options: StreamOptions,
        members: Vec<(super::receivers::Member, Arrival)>,
        status: watch::Sender<ClusterStatus>,
        indexer: Indexer,
    ) -> Result<Stream, ArchiveError> {
        let (size, system, now) = (served.size, served.id.system, Instant::now());
        let mut receiver =
            Receiver::new(begin.at, size, MAX_PART, system, begin.timeline).map_err(ReceiveError::from)?;
        let follows =
            |(_, arrival): &(_, Arrival)| matches!(arrival, Arrival::Live(live) if !live.prepared.follows.is_empty());
        if members.iter().any(follows) {
            receiver = receiver.finding_first_record();
        }
        let (part, path) = (Part::new(begin.at, size, receiver.hasher()), Path::of(&served.state, size));
        let (streamed, end, missing) = (begin.timeline, served.state.flushed, members.len());
        let begins = Position { on: begin.timeline, to: begin.at };
        let horizon = Horizon { streamed, begins, kept_from: begin.at, end, sources: Vec::new(), missing };
        let mut stream = Stream {
            lanes: Lanes::new(members.len(), begin.needed),
            sides: Vec::new(),
            recent: VecDeque::new(),
            recent_bytes: 0,
            horizon: watch::Sender::new(horizon),
            letters: mpsc::channel(LETTERS),
            stalled_since: None,
            told_too_few: false,
            since: now,
            arrivals: Arrivals::default(),
            alarms: Alarms::default(),
            server_end: begin.at,
            server_time: PgTimestamp::new(0),
            last_status: None,
            last_reported: Lsn::ZERO,
            reply_wanted: false,
            asked: None,
            wal,
            served,
            begin,
            options,
            receiver,
            part,
            path,
            status,
            indexer,
        };
        for (member, _) in &members {
            stream.sides.push(Side::new(member.clone(), now));
        }
        for (lane, (_, arrival)) in members.into_iter().enumerate() {
            match arrival {
                Arrival::Live(filled) => stream.join(lane, *filled, now)?,
                Arrival::Behind(filled) => stream.spawn_filler(lane, Some(*filled)),
                Arrival::Away(error) => stream.set_away(lane, &error, now),
            }
        }
        Ok(stream)
    }

    /// Streams until `stop`, the end of the timeline, the server's shutdown, or an error.
    pub async fn run(mut self, stop: CancellationToken) -> Result<StreamEnd, ArchiveError> {
        let mut ending: Option<Ending> = None;
        self.tell_if_too_few();
        loop {
            let now = Instant::now();
            self.start_due(now, ending.is_some());
            self.check_pace(now)?;
            if ending.is_none() {
                if let Err(error) = self.report(now, false).await {
                    ending = Some(self.end(now, Err(error.into())));
                }
                self.check_shutdown(now)?;
            }
            if let Some(ending) = &mut ending
                && self.is_over(ending, now)
            {
                break;
            }
            let wake = self.wake(now, ending.as_ref());
            tokio::select! {
                biased;
                () = stop.cancelled(), if ending.is_none() => ending = Some(self.end(now, Ok(StreamEnd::Stopped))),
                (lane, done) = next_done(&mut self.sides) => self.done(lane, done, Instant::now())?,
                Some(letter) = self.letters.1.recv() => self.read(letter),
                event = self.wal.next(), if ending.is_none() && self.has_room() => {
                    // What has come in is made durable whatever happened to the connection: the server may be gone.
                    match event.map_err(ArchiveError::from).and_then(|event| self.take(event, Instant::now())) {
                        Ok(None) => {}
                        Ok(Some(end)) => ending = Some(self.end(Instant::now(), Ok(end))),
                        Err(error @ ArchiveError::Server(_)) => ending = Some(self.end(Instant::now(), Err(error))),
                        Err(error) => return Err(error),
                    }
                }
                () = tokio::time::sleep_until(wake) => {}
            }
        }
        let received = self.receiver.position();
        let live = self.lanes.that_are(Standing::Live).count();
        let held = self.lanes.is_held(received) || (self.is_drained() && live >= self.begin.needed);
        match ending.map(|ending| ending.end) {
            Some(Ok(StreamEnd::Stopped)) => {
                self.report(Instant::now(), true).await?;
                let durable = self.durable();
                // The positions are with the server; whether it says goodbye is its own affair.
                let _ = self.wal.stop().await;
                if held { Ok(StreamEnd::Stopped) } else { Err(ArchiveError::StopDeadline { received, durable }) }
            }
            Some(end) => end,
            None => Ok(StreamEnd::Stopped), // not reached: the loop ends only with an ending
        }
    }

    // ---- the end

    /// From now on nothing more is read, and everything that came in is made durable until the deadline.
    fn end(&mut self, now: Instant, end: Result<StreamEnd, ArchiveError>) -> Ending {
        self.each_live(Live::flush);
        Ending { deadline: now + self.options.shutdown_deadline, enough_since: None, end }
    }

    fn is_over(&self, ending: &mut Ending, now: Instant) -> bool {
        if self.lanes.is_held(self.receiver.position()) {
            ending.enough_since.get_or_insert(now);
        }
        self.is_drained() || now >= ending.deadline || ending.enough_since.is_some_and(|since| now >= since + LINGER)
    }

    fn is_drained(&self) -> bool {
        let drained = |side: &Side| side.notes_under_way == 0 && side.live.as_ref().is_none_or(Live::is_drained);
        self.sides.iter().all(drained)
    }

    // ---- what comes in

    fn has_room(&self) -> bool {
        self.lanes.fastest_backlog() < PARTS_UNDER_WAY && self.recent_bytes + self.part.len() < probe::memory(MEMORY)
    }

    fn take(&mut self, event: StreamEvent, now: Instant) -> Result<Option<StreamEnd>, ArchiveError> {
        match event {
            StreamEvent::Wal { start, server_end, sent_at, data } => {
                (self.server_end, self.server_time) = (server_end, sent_at);
                self.receiver.expect(start)?;
                let mut rest = data.as_ref();
                while !rest.is_empty() {
                    let (now_bytes, later) = rest.split_at(self.receiver.accept(rest)?);
                    self.accepted(now_bytes, now)?;
                    self.sound_alarms();
                    rest = later;
                }
                Ok(None)
            }
            StreamEvent::Keepalive { server_end, sent_at, reply_requested } => {
                (self.server_end, self.server_time) = (server_end, sent_at);
                if reply_requested {
                    self.reply_wanted = true;
                    // A server that stops asks again right after each answer; one that only wonders does not.
                    let again = self.last_status.is_some_and(|last| now < last + ASKS_AGAIN);
                    match &mut self.asked {
                        Some(asked) => asked.again |= again,
                        None => {
                            self.asked = Some(Asked { since: now, position: self.receiver.position(), again: false })
                        }
                    }
                    self.each_live(Live::flush);
                }
                self.publish(now);
                Ok(None)
            }
            StreamEvent::TimelineEnded(end) => Ok(Some(StreamEnd::TimelineEnded(end))),
            StreamEvent::ServerStopped => Ok(Some(StreamEnd::ServerStopped)),
        }
    }

    /// `bytes` are the receiver's newest; they cross no border.
    fn accepted(&mut self, bytes: &[u8], now: Instant) -> Result<(), ArchiveError> {
        self.part.push(bytes);
        probe::held(self.recent_bytes + self.part.len());
        let position = self.receiver.position();
        self.arrivals.forget((0..self.sides.len()).map(|lane| self.lanes.held(lane)).min().unwrap_or(position));
        self.arrivals.at(position, now);
        for lane in 0..self.sides.len() {
            let Some(live) = self.sides.get_mut(lane).and_then(|side| side.live.as_mut()) else { continue };
            let before = live.is_compared();
            match live.received(&self.receiver, self.served.size, now) {
                Ok(()) if !before && live.is_compared() => self.compared(lane),
                Ok(()) => {}
                Err(source) => self.lose(lane, self.other_history(source), now)?,
            }
        }
        if self.part.room() == 0 {
            self.part_completed(now);
        }
        self.publish(now);
        Ok(())
    }

    fn other_history(&self, source: ReceiveError) -> ArchiveError {
        match source.is_other_history() {
            true => ArchiveError::OtherHistory { cluster: self.served.id.clone(), source },
            false => source.into(),
        }
    }

    fn compared(&mut self, lane: usize) {
        self.lanes.compared(lane);
        self.sides.iter().skip(lane).take(1).for_each(|side| side.member.refuse(None));
        self.look_ahead();
        let notes = self.alarms.notes();
        if !notes.is_empty() {
            self.put_notes(lane, notes);
        }
        self.copy_notes(lane);
    }

    /// What came damaged is told, and noted in the repositories.
    fn sound_alarms(&mut self) {
        while let Some(unsound) = self.receiver.unsound() {
            let note = self.alarms.sound(&self.served.id, self.served.branch(self.begin.timeline), unsound);
            let Some(note) = note else { continue };
            for lane in 0..self.sides.len() {
                let live = self.sides.get(lane).and_then(|side| side.live.as_ref());
                if live.is_some_and(Live::is_compared) {
                    self.put_notes(lane, vec![note]);
                }
            }
        }
    }

    /// Nothing else is put there until they are.
    fn put_notes(&mut self, lane: usize, notes: Vec<Note>) {
        let id = self.served.id.clone();
        let Some(side) = self.sides.get_mut(lane) else { return };
        let Some(repository) = side.live.as_ref().map(|live| live.repository().clone()) else { return };
        side.notes_under_way += 1;
        side.tasks.spawn(async move { Done::Noted(put_notes(repository, id, notes).await) });
    }

    /// One that was away may have missed a note of what it holds. Nothing waits for that: the others have it.
    fn copy_notes(&mut self, lane: usize) {
        let (id, sources, branches) = (self.served.id.clone(), self.sources(), self.served.branches());
        let Some(side) = self.sides.get_mut(lane).filter(|side| side.run > 0) else { return };
        let Some(repository) = side.live.as_ref().map(|live| live.repository().clone()) else { return };
        side.tasks.spawn(async move {
            for source in sources.iter().filter(|source| source.name() != repository.name()) {
                // What it does not tell now, it tells the next time this one comes back.
                if let Err(error) = copy_notes(&repository, &id, source, &branches).await {
                    tracing::debug!(repository = source.name(), %error, "its notes of damage are not copied");
                }
            }
            Done::Copied
        });
    }

    /// The repositories that hold everything before what is in memory.
    fn sources(&self) -> Vec<Repository> {
        let live = self.sides.iter().filter_map(|side| side.live.as_ref()).filter(|live| live.is_compared());
        live.map(|live| live.repository().clone()).collect()
    }

    /// The part that has just filled up goes to every live repository, and the next one begins.
    fn part_completed(&mut self, now: Instant) {
        let (end, size) = (self.part.end(), self.served.size);
        let digest_to = self.receiver.digest();
        let hasher = self.receiver.hasher();
        let (segment_ended, next_digest) = (hasher.offset() == 0, hasher.digest());
        let part = std::mem::replace(&mut self.part, Part::new(end, size, hasher));
        let (segment, from, digest_from) = (part.segment, part.from, part.digest_from());
        let (pieces, before) = part.into_pieces();
        self.index(from, end, pieces.clone());
        let (server_time, server_end) = (self.server_time, self.server_end);
        // One object for all: what it says must not be less than any of them holds.
        let durable_to = (0..self.sides.len()).map(|lane| self.lanes.held(lane)).max().unwrap_or(end);
        let range =
            RangeBytes { segment, from, to: end, digest_from, digest_to, server_time, server_end, durable_to, pieces };
        self.recent_bytes += range.len();
        let part = Arc::new(WholePart::new(range, before, self.sides.len() == 1));
        self.lanes.part_completed(from, end);
        self.recent.push_back(Arc::clone(&part));
        for live in self.sides.iter_mut().filter_map(|side| side.live.as_mut()) {
            live.part_completed(Arc::clone(&part), next_digest, segment_ended, now);
        }
        self.forget();
    }

    fn index(&self, from: Lsn, to: Lsn, pieces: Vec<Bytes>) {
        let repositories = self.sides.iter().filter_map(|side| side.live.as_ref());
        let repositories = repositories.map(|live| live.repository().clone()).collect();
        let (cluster, size, branch) =
            (self.served.id.clone(), self.served.size, self.served.branch(self.begin.timeline));
        self.indexer.push(Streamed { cluster, branch, size, from, to, pieces, repositories });
    }

    /// Parts that every live repository has confirmed need not be kept.
    fn forget(&mut self) {
        let kept_from = self.lanes.kept_from(self.part.from);
        while let Some((from, to)) = self.recent.front().map(|part| part.place()).filter(|(from, _)| *from < kept_from)
        {
            self.recent_bytes = self.recent_bytes.saturating_sub(to.bytes_since(from).unwrap_or(0));
            self.recent.pop_front();
        }
        self.look_ahead();
    }

    /// Tells the fillers where they can join, and from where to copy.
    fn look_ahead(&self) {
        let kept_from = self.lanes.kept_from(self.part.from);
        let sources = self.sources();
        let end = self.server_end.max(self.receiver.position());
        let missing = (0..self.sides.len()).filter(|lane| self.lanes.may_hold_more(*lane)).count();
        self.horizon.send_if_modified(|horizon| {
            let changed = horizon.kept_from != kept_from || horizon.sources.len() != sources.len();
            *horizon = Horizon { kept_from, sources, end, missing, ..*horizon };
            changed
        });
    }

    // ---- the repositories

    fn each_live(&mut self, each: impl Fn(&mut Live)) {
        self.sides.iter_mut().filter_map(|side| side.live.as_mut()).for_each(each);
    }

    /// Puts that are due, and repositories that are due to be tried again.
    fn start_due(&mut self, now: Instant, ending: bool) {
        let (part, receiver) = (&self.part, &self.receiver);
        let newest = Newest { part, receiver, server_time: self.server_time, server_end: self.server_end };
        for (lane, side) in self.sides.iter_mut().enumerate() {
            if let Some(live) = side.live.as_mut().filter(|_| side.notes_under_way == 0) {
                live.start_due(&mut side.tasks, newest, self.lanes.held(lane), now);
            }
        }
        if ending {
            return;
        }
        let due =
            |side: &Side| side.live.is_none() && side.tasks.is_empty() && side.retry_at.is_some_and(|at| at <= now);
        let due: Vec<usize> =
            self.sides.iter().enumerate().filter(|(_, side)| due(side)).map(|(lane, _)| lane).collect();
        due.into_iter().for_each(|lane| self.spawn_filler(lane, None));
    }

    fn spawn_filler(&mut self, lane: usize, known: Option<Filled>) {
        let Some(side) = self.sides.get_mut(lane) else { return };
        side.run += 1;
        side.retry_at = None;
        let filler = Filler {
            lane,
            run: side.run,
            member: side.member.clone(),
            served: Arc::clone(&self.served),
            horizon: self.horizon.subscribe(),
            letters: self.letters.0.clone(),
            pace: Pace::new(self.options.fill_rate),
        };
        side.tasks.spawn(async move { Done::Filled(filler.run(known).await.map(Box::new)) });
    }

    fn read(&mut self, Letter { lane, run, news }: Letter) {
        let Some(side) = self.sides.get_mut(lane).filter(|side| side.run == run && side.live.is_none()) else { return };
        match news {
            News::Holds(held) => {
                if self.lanes.standing(lane) != Standing::Filling || self.lanes.held(lane) != held {
                    tracing::info!(repository = %side.name, from = %held, "filling up from another repository");
                    self.lanes.fill(lane, held);
                }
            }
            News::Compared => self.lanes.compared(lane),
            News::Copied { from, to } => self.lanes.confirmed(lane, from, to),
        }
        self.publish(Instant::now());
    }

    fn done(&mut self, lane: usize, done: Done, now: Instant) -> Result<(), ArchiveError> {
        let size = self.served.size;
        let Some(side) = self.sides.get_mut(lane) else { return Ok(()) };
        match (done, &mut side.live) {
            (Done::Part(Ok((from, to))), Some(live)) => {
                live.part_done((from, to), size, now);
                self.lanes.confirmed(lane, from, to);
                self.forget();
            }
            (Done::Open(Ok(done)), Some(live)) => {
                let (from, to) = (done.from, done.to);
                live.range_done(done, self.part.segment);
                self.lanes.confirmed(lane, from, to);
            }
            (Done::Noted(Ok(())), _) => side.notes_under_way = side.notes_under_way.saturating_sub(1),
            (Done::Filled(Ok(filled)), None) => self.join_or_go_on(lane, *filled, now)?,
            (
                Done::Part(Err(error)) | Done::Open(Err(error)) | Done::Noted(Err(error)) | Done::Filled(Err(error)),
                _,
            ) => self.lose(lane, error, now)?,
            // Nobody fills what takes part, and nothing is put into what does not.
            (Done::Part(Ok(_)) | Done::Open(Ok(_)), None) | (Done::Filled(Ok(_)), Some(_)) | (Done::Copied, _) => {}
        }
        self.arrivals.latencies.durable(self.durable(), now);
        self.publish(now);
        Ok(())
    }

    fn join_or_go_on(&mut self, lane: usize, filled: Filled, now: Instant) -> Result<(), ArchiveError> {
        let kept_from = self.lanes.kept_from(self.part.from);
        // What it was to compare with may have left memory since the filler looked.
        let joins = filled.is_compared_from(kept_from);
        if joins && self.path.next(filled.position, self.begin.timeline, kept_from) == Step::Join {
            return match self.join(lane, filled, now) {
                Err(error) => self.lose(lane, error, now),
                joined => joined,
            };
        }
        self.spawn_filler(lane, Some(filled)); // the stream has gone on meanwhile
        Ok(())
    }

    /// The repository takes part from now on: it gets everything that is in memory.
    fn join(&mut self, lane: usize, mut filled: Filled, now: Instant) -> Result<(), ArchiveError> {
        let (expected, follows) = filled.left_to_compare();
        let Filled { prepared, position, .. } = filled;
        let durable_to = self.path.settle(position).to;
        let Served { id, size, version, .. } = self.served.as_ref();
        let branch = self.served.branch(self.begin.timeline);
        let uploader = Uploader::new(
            prepared.repository,
            id.clone(),
            branch,
            *size,
            *version,
            self.served.histories_for(self.begin.timeline),
        );
        let entry = Entry {
            uploader,
            expected,
            follows,
            durable_to,
            open_segments: prepared.open_segments,
            open_grace: self.options.open_grace,
            range_interval: self.options.range_interval,
        };
        let memory =
            InMemory { recent: &self.recent, part: &self.part, received: self.receiver.position(), size: *size };
        let live = Live::new(entry, self.options.cutter, memory, &mut self.receiver, now);
        let live = live.map_err(|source| self.other_history(source))?;
        let is_compared = live.is_compared();
        self.lanes.join(lane, durable_to, self.recent.iter().map(|part| part.place()));
        if let Some(side) = self.sides.get_mut(lane) {
            if side.run > 0 {
                tracing::info!(repository = %side.name, at = %durable_to, "takes part again");
            }
            side.join(live, now);
        }
        if is_compared {
            self.compared(lane);
        }
        self.tell_if_too_few();
        self.look_ahead();
        Ok(())
    }

    /// The repository takes no part any more. The others go on; where there is none, the stream ends with the error.
    fn lose(&mut self, lane: usize, error: ArchiveError, now: Instant) -> Result<(), ArchiveError> {
        self.set_away(lane, &error, now);
        if self.lanes.that_are(Standing::Live).next().is_none() {
            // Another one may go on: the next attempt asks those that are not refused.
            let all_refused = self.sides.iter().all(|side| side.member.refused().is_some());
            let reasons = || format!("{}: {error}", self.sides.get(lane).map(|side| &*side.name).unwrap_or_default());
            return Err(match error.protects_data() && !all_refused {
                true => ArchiveError::NoRepository { reasons: reasons() },
                false => error,
            });
        }
        self.tell_if_too_few();
        self.forget();
        Ok(())
    }

    fn set_away(&mut self, lane: usize, error: &ArchiveError, now: Instant) {
        let refused = error.refuses_repository();
        self.lanes.lose(lane, if refused { Standing::Refused } else { Standing::Away });
        let Some(side) = self.sides.get_mut(lane) else { return };
        let told = side.reason.as_deref() == Some(error.to_string().as_str());
        side.lose(error, now);
        match (told, refused) {
            (true, _) => {}
            (false, true) => {
                tracing::error!(cluster = %self.served.id, repository = %side.name, "nothing is put into this repository: {error}");
            }
            (false, false) => {
                tracing::warn!(cluster = %self.served.id, repository = %side.name, "this repository is away and will be filled up: {error}");
            }
        }
    }

    fn tell_if_too_few(&mut self) {
        let (live, needed) = (self.lanes.that_are(Standing::Live).count(), self.begin.needed);
        if live < needed && !self.told_too_few {
            tracing::warn!(
                cluster = %self.served.id,
                "of {} repositories {live} take WAL, and {needed} are needed: nothing more is acknowledged, the server keeps its WAL",
                self.sides.len()
            );
        } else if live >= needed && self.told_too_few {
            tracing::info!(cluster = %self.served.id, "as many repositories take WAL as are needed");
        }
        self.told_too_few = live < needed;
    }

    /// One repository that keeps all others waiting is filled up later instead.
    fn check_pace(&mut self, now: Instant) -> Result<(), ArchiveError> {
        let slowest = if self.has_room() { None } else { self.lanes.holds_others_up() };
        let Some(lane) = slowest else {
            self.stalled_since = None;
            return Ok(());
        };
        let since = *self.stalled_since.get_or_insert(now);
        if now < since + PATIENCE {
            return Ok(());
        }
        self.stalled_since = None;
        let repository = self.sides.get(lane).map(|side| side.name.to_string()).unwrap_or_default();
        self.lose(lane, ArchiveError::FellBehind { repository }, now)
    }

    // ---- what is reported

    /// What as many repositories as are needed hold; before they have compared equal, what they are known to hold.
    fn durable(&self) -> Lsn {
        let held = || acknowledged((0..self.sides.len()).map(|lane| self.lanes.held(lane)), self.begin.needed);
        self.lanes.acknowledged().or_else(held).unwrap_or(Lsn::ZERO)
    }

    /// The position that may be reported as flushed; `0/0`, which PostgreSQL takes for "none", until enough have compared
    /// equal.
    fn reportable(&self) -> Lsn {
        let Some(mut held) = self.lanes.acknowledged() else { return Lsn::ZERO };
        if probe::planted(Bug::AcknowledgeOnSend) {
            held = self.receiver.position();
        }
        let held = held.min(self.receiver.position());
        let reported = reported(held, self.served.size, self.options.cutter.synchronous || self.asked.is_some());
        // At the floor itself, too: a server at rest would not count us among its synchronous standbys before that. But the
        // stream's very beginning says nothing: an empty repository "holds" it.
        if reported < self.begin.floor || held <= self.begin.at { Lsn::ZERO } else { reported }
    }

    async fn report(&mut self, now: Instant, always: bool) -> Result<(), PgError> {
        let flush = self.reportable().max(self.last_reported);
        let pause = |pause| self.last_status.is_none_or(|last| now >= last + pause);
        if !(always || flush > self.last_reported || pause(STATUS_EVERY) || (self.reply_wanted && pause(REPLY_PAUSE))) {
            return Ok(());
        }
        // Who waits for `remote_write` or `remote_apply` waits for durability too; otherwise `write` tells the lag.
        let received = if flush == Lsn::ZERO { Lsn::ZERO } else { self.receiver.position() };
        let write = if self.options.cutter.synchronous { flush } else { received };
        self.wal.send_status(Status { write, flush, apply: flush, reply_requested: false }).await?;
        self.last_status = Some(now);
        self.last_reported = flush;
        self.reply_wanted = false;
        if self.asked.is_some_and(|asked| flush >= asked.position) {
            self.asked = None;
        }
        Ok(())
    }

    /// A server that stops waits for our position. When the repositories cannot give it in time, let the server go: the
    /// slot keeps the WAL, and nothing is lost.
    fn check_shutdown(&self, now: Instant) -> Result<(), ArchiveError> {
        match self.asked {
            Some(Asked { since, position, again: true }) if now >= since + self.options.shutdown_deadline => {
                Err(ArchiveError::HeldUp { position, durable: self.durable() })
            }
            _ => Ok(()),
        }
    }

    /// When to look again although nothing happened.
    fn wake(&mut self, now: Instant, ending: Option<&Ending>) -> Instant {
        let mut wake = match ending {
            // When we are ending, statuses no longer count.
            Some(ending) => ending.enough_since.map_or(ending.deadline, |since| ending.deadline.min(since + LINGER)),
            None => self.last_status.map_or(now, |last| last + STATUS_EVERY),
        };
        for side in &mut self.sides {
            let Some(live) = &mut side.live else {
                wake = side.retry_at.filter(|_| ending.is_none()).map_or(wake, |at| wake.min(at));
                continue;
            };
            let due = live.cut_due(now).filter(|_| side.notes_under_way == 0).into_iter();
            wake = if ending.is_none() {
                due.chain(live.sweep(now)).fold(wake, Instant::min)
            } else {
                due.fold(wake, Instant::min)
            };
        }
        if let Some(since) = self.stalled_since {
            wake = wake.min(since + PATIENCE);
        }
        if ending.is_some() {
            return wake;
        }
        if self.reply_wanted
            && let Some(last) = self.last_status
        {
            wake = wake.min(last + REPLY_PAUSE);
        }
        if let Some(Asked { since, again: true, .. }) = self.asked {
            wake = wake.min(since + self.options.shutdown_deadline);
        }
        wake
    }

    fn publish(&self, now: Instant) {
        let (received, durable) = (self.receiver.position(), self.durable());
        let repositories = self.sides.iter().enumerate().map(|(lane, side)| {
            let frontier = Some(self.lanes.held(lane)).filter(|held| *held > Lsn::ZERO);
            let reason = || side.reason.clone().unwrap_or_else(|| Arc::from("it is being opened"));
            RepositoryProgress {
                name: Arc::clone(&side.name),
                doing: match self.lanes.standing(lane) {
                    Standing::Live => Doing::Live,
                    Standing::Filling => Doing::Filling,
                    Standing::Away => Doing::Away { reason: reason() },
                    Standing::Refused => Doing::Refused { reason: reason() },
                },
                frontier,
                lag_bytes: frontier.map(|frontier| received.bytes_since(frontier).unwrap_or(0)),
                lag_seconds: frontier.map_or(0, |frontier| self.arrivals.age(frontier, now).as_secs()),
            }
        });
        let progress = Progress {
            branch: self.served.branch(self.begin.timeline),
            since: self.since,
            received,
            durable,
            durable_in_one: self.lanes.best().unwrap_or(durable),
            needed: self.begin.needed,
            behind: self.arrivals.latencies.waiting(now),
            latency: self.arrivals.latencies.lately(),
            server_end: self.server_end.max(received),
            server_time: self.server_time,
            damage: self.alarms.seen(),
            noted: if self.sides.iter().all(Side::has_notes) { self.alarms.count() } else { 0 },
            repositories: repositories.collect(),
        };
        self.status.send_if_modified(|status| {
            let new = ClusterStatus::Streaming(progress);
            let changed = *status != new;
            *status = new;
            changed
        });
    }
}
