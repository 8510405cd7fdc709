//! One repository's side of a stream: what it is being given, and how that ends. What may be acknowledged is decided in
//! [`super::lanes`].
//!
//! Invariant: at most [`RANGES_UNDER_WAY`] puts of the open segment (one append, where the repository appends) and
//! [`PARTS_UNDER_WAY`] puts of complete parts are under way; what waits is shared with the other lanes.
//! Crash and cancellation: dropping a lane drops its puts; each leaves a whole object or none, and a tail of whole frames.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::ArchiveError;
use super::cutter::{Cut, Cutter, CutterOptions, Pace};
use super::filler::Filled;
use super::part::{Part, WholePart};
use super::receivers::Member;
use super::sweeper::Sweeper;
use super::uploader::{OpenTail, RangeBytes, Uploader};
use crate::catalog::Repository;
use crate::types::{Digest, Lsn, PgTimestamp, SegmentNumber, SegmentSize};
use crate::wal::receiver::{Expected, Overlap, ReceiveError, Receiver};

/// Parts that are sealed and put at the same time, at most.
pub(super) const PARTS_UNDER_WAY: usize = 4;
/// Ranges of the open segment that are put at the same time, at most.
const RANGES_UNDER_WAY: usize = 4;
/// The pause before a repository that is away is tried again, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// One that holds another history is looked at again after this.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);
/// Live for this long, and it begins with the shortest pause again.
const STEADY: Duration = Duration::from_secs(60);

/// A repository, whether it takes part or not, and the tasks that work for it.
#[derive(Debug)]
pub(super) struct Side {
    pub member: Member,
    pub name: Arc<str>,
    /// It takes part.
    pub live: Option<Live>,
    /// Of the live lane, or of its filler. Dropping a side ends them.
    pub tasks: JoinSet<Done>,
    /// Tells a filler from an earlier one.
    pub run: u64,
    /// Why it takes no part, and when it is tried again; `None` while somebody fills it.
    pub reason: Option<Arc<str>>,
    pub retry_at: Option<Instant>,
    /// Tasks that put notes of damage: until they have, nothing else is put.
    pub notes_under_way: usize,
    pause: Duration,
    live_since: Option<Instant>,
}

/// What a task did.
#[derive(Debug)]
pub(super) enum Done {
    /// A part was put.
    Part(Result<(Lsn, Lsn), ArchiveError>),
    /// Bytes of the open segment were made durable.
    Open(Result<OpenDone, ArchiveError>),
    /// Notes of damage were put.
    Noted(Result<(), ArchiveError>),
    /// Another repository's notes were copied, or could not be.
    Copied,
    /// The repository has been filled, or cannot be.
    Filled(Result<Box<Filled>, ArchiveError>),
}

/// Bytes of the open segment that are durable.
#[derive(Debug)]
pub(super) struct OpenDone {
    /// The tail to go on with.
    pub tail: Option<Box<OpenTail>>,
    /// The first byte.
    pub from: Lsn,
    /// The first byte after them.
    pub to: Lsn,
    /// How long that took.
    pub took: Duration,
}

impl Side {
    /// Nothing is known of it yet.
    pub fn new(member: Member, now: Instant) -> Side {
        Side {
            name: Arc::from(member.name()),
            member,
            live: None,
            tasks: JoinSet::new(),
            run: 0,
            reason: None,
            retry_at: Some(now),
            notes_under_way: 0,
            pause: PAUSE.0,
            live_since: None,
        }
    }

    /// It takes part from now on.
    pub fn join(&mut self, live: Live, now: Instant) {
        (self.live, self.live_since) = (Some(live), Some(now));
        (self.reason, self.retry_at, self.notes_under_way) = (None, None, 0);
    }

    /// No note of damage is on its way to it, or waits for it to have compared equal. One that takes no part gets them with
    /// what it missed.
    pub fn has_notes(&self) -> bool {
        self.live.as_ref().is_none_or(|live| live.is_compared() && self.notes_under_way == 0)
    }

    /// It takes part no more: what it had under way is dropped, and it is opened anew after a pause.
    pub fn lose(&mut self, reason: &ArchiveError, now: Instant) {
        if self.live_since.take().is_some_and(|since| now.saturating_duration_since(since) > STEADY) {
            self.pause = PAUSE.0;
        }
        self.member.close();
        if reason.protects_data() {
            self.member.refuse(Some(reason.to_string()));
        }
        self.run += 1; // letters that are still on their way are an earlier run's
        (self.live, self.tasks, self.notes_under_way) = (None, JoinSet::new(), 0);
        self.reason = Some(Arc::from(reason.to_string()));
        let pause = if reason.refuses_repository() { REFUSED_PAUSE } else { self.pause };
        self.retry_at = Some(now + pause);
        self.pause = (self.pause * 2).min(PAUSE.1);
    }
}

/// Waits for the next task of any repository. A task that panicked is that repository's fault alone.
pub(super) async fn next_done(sides: &mut [Side]) -> (usize, Done) {
    std::future::poll_fn(|context| {
        for (lane, side) in sides.iter_mut().enumerate() {
            match side.tasks.poll_join_next(context) {
                Poll::Ready(Some(Ok(done))) => return Poll::Ready((lane, done)),
                Poll::Ready(Some(Err(error))) => {
                    return Poll::Ready((lane, Done::Part(Err(ArchiveError::task(error)))));
                }
                Poll::Ready(None) | Poll::Pending => {}
            }
        }
        Poll::Pending
    })
    .await
}

/// A lane that takes part.
#[derive(Debug)]
pub(super) struct Live {
    uploader: Uploader,
    cutter: Cutter,
    /// The cutter's first range begins here.
    cut_from: Lsn,
    /// Digest of the segment up to where the next range begins.
    cut_digest: Digest,
    /// What it holds and must come again, equal, before anything counts.
    overlap: Overlap,
    /// Parts that wait for their turn.
    waiting: VecDeque<Arc<WholePart>>,
    parts_under_way: usize,
    ranges_under_way: usize,
    tail: Option<OpenTail>,
    sweeper: Sweeper,
}

/// What a lane begins with.
#[derive(Debug)]
pub(super) struct Entry {
    pub uploader: Uploader,
    /// Digests of what it holds; those that are not in memory any more were compared.
    pub expected: Vec<Expected>,
    /// The first record must name one of these. Only at the very beginning of a stream.
    pub follows: Vec<Lsn>,
    /// Everything before is durable there.
    pub durable_to: Lsn,
    /// Segments that have pieces under `open/` already.
    pub open_segments: BTreeSet<SegmentNumber>,
    /// How long open pieces stay when their segment is there as a whole.
    pub open_grace: Duration,
    /// From one range of the open segment to the next, at least, where commits wait for us and every range is an object.
    pub range_interval: Duration,
}

/// What the stream has of the WAL.
#[derive(Debug, Clone, Copy)]
pub(super) struct InMemory<'a> {
    pub recent: &'a VecDeque<Arc<WholePart>>,
    pub part: &'a Part,
    pub received: Lsn,
    pub size: SegmentSize,
}

impl InMemory<'_> {
    /// First byte of it.
    fn from(&self) -> Lsn {
        self.recent.front().map_or(self.part.from, |part| part.place().0)
    }

    /// The digest of the segment's bytes before `at`, of which the last one is in memory.
    fn digest_at(&self, at: Lsn) -> Digest {
        let within = |part: &&Arc<WholePart>| part.place().0 < at && at <= part.place().1;
        match self.recent.iter().find(within) {
            Some(part) => part.digest_at(at),
            None => self.part.digest_at(at),
        }
    }
}

impl Live {
    /// Gives the lane everything that is in memory. `receiver` will stop where the lane wants to look.
    pub fn new(
        entry: Entry,
        options: CutterOptions,
        memory: InMemory<'_>,
        receiver: &mut Receiver,
        now: Instant,
    ) -> Result<Live, ReceiveError> {
        let InMemory { part, received, size, .. } = memory;
        let expected = entry.expected.into_iter().filter(|expected| expected.at > memory.from());
        let mut overlap = Overlap::new(expected, entry.follows);
        for at in overlap.positions().collect::<Vec<_>>() {
            if at <= received {
                overlap.passed(at, at.segment_before(size).start(size), || memory.digest_at(at))?;
            } else {
                receiver.stop_at(at);
            }
        }
        let cut_from = entry.durable_to.max(part.from);
        let cut_digest = if cut_from <= received { part.digest_at(cut_from) } else { part.digest_from() };
        receiver.stop_at(cut_from);
        let mut cutter = Cutter::new(options, cut_from).at_pace(match entry.uploader.appends() {
            true => Pace::ONE,
            false => Pace { at_once: RANGES_UNDER_WAY, interval: entry.range_interval },
        });
        if overlap.is_compared() {
            cutter.received(received, now);
        }
        Ok(Live {
            uploader: entry.uploader,
            cutter,
            cut_from,
            cut_digest,
            overlap,
            waiting: memory.recent.clone(),
            parts_under_way: 0,
            ranges_under_way: 0,
            tail: None,
            sweeper: Sweeper::new(entry.open_grace, entry.open_segments, part.from.segment(size), now),
        })
    }

    pub fn repository(&self) -> &Repository {
        self.uploader.repository()
    }

    pub fn is_compared(&self) -> bool {
        self.overlap.is_compared()
    }

    /// The receiver is at `position`, a place where it stops, or behind new bytes.
    pub fn received(&mut self, receiver: &Receiver, size: SegmentSize, now: Instant) -> Result<(), ReceiveError> {
        let position = receiver.position();
        if position == self.cut_from {
            self.cut_digest = receiver.digest();
        }
        if !self.overlap.is_compared() {
            self.overlap.passed(position, position.segment_before(size).start(size), || receiver.digest())?;
            if let Some((at, prev)) = receiver.first_record() {
                self.overlap.first_record(at, prev)?;
            }
        }
        if self.overlap.is_compared() {
            self.cutter.received(position, now);
        }
        Ok(())
    }

    /// The part that has just filled up; `next` is the segment's digest where the next one begins.
    pub fn part_completed(&mut self, part: Arc<WholePart>, next: Digest, segment_ended: bool, now: Instant) {
        let (_, end) = part.place();
        // Also before the comparison is over: up to here it was equal (there is an expected digest at every border).
        if self.cut_from <= end {
            self.cut_digest = next;
        }
        self.cutter.part_completed(end, now);
        if segment_ended {
            self.tail = None; // it belongs to the segment that ended; a tail under way is dropped when it comes back
        }
        self.waiting.push_back(part);
    }

    /// Starts what is due: parts, and the open segment's newest bytes.
    /// `held` is what the repository holds without a hole.
    pub fn start_due(&mut self, tasks: &mut JoinSet<Done>, newest: Newest<'_>, held: Lsn, now: Instant) {
        while self.parts_under_way < PARTS_UNDER_WAY
            && let Some(part) = self.waiting.pop_front()
        {
            let uploader = self.uploader.clone();
            self.parts_under_way += 1;
            tasks.spawn(async move { Done::Part(uploader.put_part(&part).await.map(|()| part.place())) });
        }
        if !self.may_cut() {
            return;
        }
        let Cut::Range { from, to } = self.cutter.decide(now) else { return };
        let digest_to = newest.receiver.digest();
        let range = RangeBytes {
            segment: newest.part.segment,
            from,
            to,
            digest_from: self.cut_digest,
            digest_to,
            server_time: newest.server_time,
            server_end: newest.server_end,
            durable_to: held,
            pieces: newest.part.slice(from, to),
        };
        self.cutter.range_started(to, now);
        self.cut_digest = digest_to;
        self.sweeper.opened(range.segment);
        self.ranges_under_way += 1;
        let (uploader, tail) = (self.uploader.clone(), self.tail.take());
        tasks.spawn(async move {
            let begun = Instant::now();
            let put = uploader.put_open(tail, range).await;
            let done = |tail: Option<OpenTail>| OpenDone { tail: tail.map(Box::new), from, to, took: begun.elapsed() };
            Done::Open(put.map(done))
        });
    }

    /// A tail is not begun behind a part that is still under way: nothing in it would count before that is there, and a
    /// tail, which is long, could not say that what a kill left missing before it never counted (`durable_to`).
    fn may_cut(&self) -> bool {
        let parts_are_there = self.parts_under_way == 0 && self.waiting.is_empty();
        self.overlap.is_compared() && (parts_are_there || !self.uploader.appends())
    }

    /// A part is durable.
    pub fn part_done(&mut self, (from, to): (Lsn, Lsn), size: SegmentSize, now: Instant) {
        self.parts_under_way = self.parts_under_way.saturating_sub(1);
        if to.segment_offset(size) == 0 {
            self.sweeper.completed(from.segment(size), now);
        }
    }

    /// A range that was under way is durable; `open` is the open segment.
    pub fn range_done(&mut self, done: OpenDone, open: SegmentNumber) {
        self.ranges_under_way = self.ranges_under_way.saturating_sub(1);
        self.cutter.range_finished();
        self.cutter.put_took(done.took);
        // The tail goes on only while its own segment is the open one.
        self.tail = done.tail.filter(|tail| tail.segment() == open).map(|tail| *tail);
    }

    /// Somebody waits for everything received so far.
    pub fn flush(&mut self) {
        self.cutter.flush();
    }

    /// Has it everything that came in?
    pub fn is_drained(&self) -> bool {
        self.cutter.is_drained() && self.ranges_under_way == 0 && self.parts_under_way == 0 && self.waiting.is_empty()
    }

    /// Starts a removal of open pieces that is due. When to look again: for removals, and for the next cut.
    pub fn sweep(&mut self, now: Instant) -> Option<Instant> {
        self.sweeper.start_due(now, &self.uploader)
    }

    /// When the next range is due.
    pub fn cut_due(&self, now: Instant) -> Option<Instant> {
        if !self.may_cut() {
            return None;
        }
        match self.cutter.decide(now) {
            Cut::At(due) => Some(due),
            Cut::Range { .. } => Some(now),
            Cut::Nothing => None,
        }
    }
}

/// The open part, and what is known of its newest byte.
#[derive(Debug, Clone, Copy)]
pub(super) struct Newest<'a> {
    pub part: &'a Part,
    pub receiver: &'a Receiver,
    pub server_time: PgTimestamp,
    pub server_end: Lsn,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Repository;
    use crate::seal::KeyFile;
    use crate::store::memory::MemoryStore;
    use crate::types::{Branch, ClusterId, SegmentHasher, SystemId, TimelineId};

    const MIB: u64 = 1 << 20;

    /// The segment that begins at `from` MiB, of 1 MiB.
    fn part(from: u64, size: SegmentSize) -> Arc<WholePart> {
        let (from, to) = (Lsn::new(from * MIB), Lsn::new((from + 1) * MIB));
        let (digest_from, digest_to) = (Digest::of(b""), Digest::of(b"not looked at"));
        let (segment, server_time) = (from.segment(size), PgTimestamp::new(0));
        let range = RangeBytes {
            segment,
            from,
            to,
            digest_from,
            digest_to,
            server_time,
            server_end: to,
            durable_to: from,
            pieces: Vec::new(),
        };
        Arc::new(WholePart::new(range, SegmentHasher::new(), false))
    }

    /// Who joins gets each part that is in memory, whether or not it began before what the repository holds: nothing brings
    /// them later, and what is claimed to be durable ends before them.
    #[tokio::test]
    async fn p1_who_joins_gets_all_that_is_in_memory() {
        let size = SegmentSize::new(MIB).unwrap();
        let keys = KeyFile::generate().unwrap();
        let repository = Repository::create("one", Arc::new(MemoryStore::new()), &keys).await.unwrap();
        let cluster = ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) };
        let branch = Branch::first(TimelineId::FIRST);
        let recent: VecDeque<Arc<WholePart>> = (3..6).map(|number| part(number, size)).collect();
        let open = Part::new(Lsn::new(6 * MIB), size, SegmentHasher::new());
        let begin = open.from;
        let mut receiver = Receiver::new(begin, size, MIB, cluster.system, branch.timeline).unwrap();
        let entry = Entry {
            uploader: Uploader::new(repository, cluster, branch, size, 180_000, Vec::new()),
            expected: Vec::new(),
            follows: Vec::new(),
            durable_to: Lsn::new(3 * MIB),
            open_segments: BTreeSet::new(),
            open_grace: Duration::from_secs(60),
            range_interval: Duration::ZERO,
        };
        let options = CutterOptions { max_delay: Duration::from_secs(1), synchronous: false };
        let memory = InMemory { recent: &recent, part: &open, received: begin, size };
        let live = Live::new(entry, options, memory, &mut receiver, Instant::now()).unwrap();
        let waiting: Vec<Lsn> = live.waiting.iter().map(|part| part.place().0).collect();
        assert_eq!(waiting, [3, 4, 5].map(|number| Lsn::new(number * MIB)));
        assert!(!live.is_drained() && live.cut_from == begin);
    }
}
