//! Fills up one repository that fell behind, from the others, until it can take part in the stream again.
//!
//! Invariant: nothing is put into it before what it holds has compared equal with a repository whose bytes are the server's
//! (P6); then history files, then segments in order, [`at_once`] at a time, so that it never has a hole that a crash would
//! leave behind what counts (P1). What it decides by is [`super::fill`]'s.
//! Memory: [`at_once`] segments, each as `Repository::copy_segment` needs it. Speed: no more than [`Pace`] allows, so that
//! the stores and the network are left to the stream.
//! Indexes of what was copied come after it, as far as a source has them; what is left out costs `pgkeep log` time, and no more.
//! Crash and cancellation: objects are there whole or not at all; the next one goes on where the repository ends.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::ArchiveError;
use super::alarm::copy_notes;
use super::fill::{Path, Position, Step};
use super::load::{Prepared, Served, load};
use super::receivers::Member;
use super::uploader::{Uploader, accept};
use crate::catalog::inventory::Run;
use crate::catalog::layout::ClusterObject;
use crate::catalog::records::{GapReason, GapRecord};
use crate::catalog::{CatalogError, Put, Repository};
use crate::types::{Branch, Digest, Lsn, SegmentNumber, SegmentSize, TimelineId};
use crate::wal::receiver::Expected;

/// Bytes of segments that are copied at the same time, and how many segments that is at least and at most: a store that
/// takes long for each answer has to be asked for several.
const BYTES_AT_ONCE: u64 = 64 << 20;
const SEGMENTS_AT_ONCE: (u64, u64) = (2, 8);
/// Segments that are begun before it is looked anew how far the stream is.
const ROUND: usize = 32;
/// Opening and loading what a repository holds takes no longer.
const LOAD_DEADLINE: Duration = Duration::from_secs(300);
/// A segment takes no longer.
const COPY_DEADLINE: Duration = Duration::from_secs(900);
/// The indexes of a round take no longer: the repository is waited for.
const INDEX_DEADLINE: Duration = Duration::from_secs(30);

/// What the stream has, as the fillers see it.
#[derive(Debug, Clone)]
pub(super) struct Horizon {
    /// The timeline that is streamed.
    pub streamed: TimelineId,
    /// Where the stream began.
    pub begins: Position,
    /// From here on everything is in memory.
    pub kept_from: Lsn,
    /// How far the server has written, as far as is known.
    pub end: Lsn,
    /// The live repositories whose overlap was equal: they hold everything that is not in memory, from their own
    /// beginnings on.
    pub sources: Vec<Repository>,
    /// How many repositories are none of the `sources`, this one among them, and may hold what those know nothing of.
    pub missing: usize,
}

/// What a filler tells on its way.
#[derive(Debug, Clone, Copy)]
pub(super) enum News {
    /// The repository was opened; it holds everything before this.
    Holds(Lsn),
    /// What it held is the server's history.
    Compared,
    /// It has confirmed what was copied.
    Copied {
        /// First byte.
        from: Lsn,
        /// First byte after it.
        to: Lsn,
    },
}

/// News of one lane; `run` tells a filler from an earlier one of the same lane.
#[derive(Debug)]
pub(super) struct Letter {
    pub lane: usize,
    pub run: u64,
    pub news: News,
}

/// A repository on its way to the stream.
#[derive(Debug)]
pub(super) struct Filled {
    pub prepared: Prepared,
    /// How far it holds the path.
    pub position: Position,
    /// Its own history was compared, or there is none; where not, the stream has to.
    pub compared: bool,
    has_histories: bool,
}

impl From<Prepared> for Filled {
    fn from(prepared: Prepared) -> Filled {
        let position = prepared.position();
        Filled { prepared, position, compared: false, has_histories: false }
    }
}

impl Filled {
    /// What is empty holds nothing, wherever the server's slot begins by now: it begins no later than the stream does. Else
    /// it would count for what the stream brings it before that position, and may not have put yet.
    fn begin_no_later(&mut self, path: &Path, begin: Position) {
        if self.prepared.is_empty && !self.compared && path.is_before(begin, self.position) {
            self.position = begin;
        }
    }

    /// Whether all that has to be compared was, or comes again to one who joins with the bytes from `kept_from` on.
    pub fn is_compared_from(&self, kept_from: Lsn) -> bool {
        self.compared || self.prepared.until().is_some_and(|until| until > kept_from)
    }

    /// What the stream has to compare: nothing, where that was done with another repository.
    pub fn left_to_compare(&mut self) -> (Vec<Expected>, Vec<Lsn>) {
        let Prepared { expected, follows, .. } = &mut self.prepared;
        let left = (std::mem::take(expected), std::mem::take(follows));
        if self.compared { Default::default() } else { left }
    }
}

/// See the module.
pub(super) struct Filler {
    pub lane: usize,
    pub run: u64,
    pub member: Member,
    pub served: Arc<Served>,
    pub horizon: watch::Receiver<Horizon>,
    pub letters: mpsc::Sender<Letter>,
    pub pace: Pace,
}

/// No more than so many bytes a second, over all copies of one filler.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Option<NonZeroU64>,
    /// Before this nothing more is begun.
    free_at: Mutex<Instant>,
}

impl Pace {
    pub fn new(rate: Option<NonZeroU64>) -> Pace {
        Pace { rate, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` may go. Whoever is dropped while it waits has taken its turn all the same.
    async fn wait(&self, bytes: u64) {
        let Some(rate) = self.rate else { return };
        let begin = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner); // a plain value
            let begin = (*free_at).max(Instant::now());
            *free_at = begin + Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
            begin
        };
        sleep_until(begin).await;
    }
}

/// Segments of this size that are copied at the same time.
fn at_once(size: SegmentSize) -> usize {
    let (least, most) = SEGMENTS_AT_ONCE;
    // invariant: at most 8
    usize::try_from((BYTES_AT_ONCE / size.bytes()).clamp(least, most)).unwrap_or(2)
}

impl Filler {
    /// Fills until the repository can take part. `known` is what was loaded already.
    pub async fn run(mut self, known: Option<Filled>) -> Result<Filled, ArchiveError> {
        let mut filled = match known {
            Some(filled) => filled,
            None => {
                let late = || ArchiveError::NoAnswer { repository: self.name(), after: LOAD_DEADLINE };
                Filled::from(timeout(LOAD_DEADLINE, self.load()).await.map_err(|_| late())??)
            }
        };
        let path = Path::of(&self.served.state, self.served.size);
        filled.begin_no_later(&path, self.horizon.borrow().begins);
        self.tell(News::Holds(filled.position.to)).await;
        let (begun, mut indexed) = (filled.position, BTreeMap::new());
        loop {
            let horizon = self.horizon.borrow_and_update().clone();
            let step = path.next(filled.position, horizon.streamed, horizon.kept_from);
            if step == Step::Join {
                if !filled.is_compared_from(horizon.kept_from) {
                    self.compare(&mut filled, &horizon).await?;
                }
                if filled.position != begun {
                    self.copy_indexes(&filled, &horizon, begun, &mut indexed).await;
                }
                return Ok(filled);
            }
            if step == Step::Ahead || horizon.sources.is_empty() {
                // The stream ends when its timeline does, and begins anew; or somebody is about to compare equal.
                if self.horizon.changed().await.is_err() {
                    return Ok(filled); // the stream has ended
                }
                continue;
            }
            if !filled.compared {
                self.compare(&mut filled, &horizon).await?;
                continue; // a gap may have taken it further
            }
            if !filled.has_histories {
                self.uploader(&filled.prepared.repository, horizon.streamed).put_histories().await?;
                filled.has_histories = true;
            }
            self.copy(&path, &mut filled, step, &horizon).await?;
            self.copy_indexes(&filled, &horizon, begun, &mut indexed).await;
        }
    }

    fn name(&self) -> String {
        self.member.name().to_owned()
    }

    async fn tell(&self, news: News) {
        // A stream that has ended needs no news.
        let _ = self.letters.send(Letter { lane: self.lane, run: self.run, news }).await;
    }

    async fn load(&self) -> Result<Prepared, ArchiveError> {
        let repository = self.member.open().await?;
        let archived = load(repository, &self.served).await?;
        archived.compare_histories(&self.served)?;
        let mut state = self.served.state.clone();
        state.flushed = state.flushed.max(self.horizon.borrow().end);
        archived.prepare(&self.served, &state).await
    }

    fn uploader(&self, repository: &Repository, timeline: TimelineId) -> Uploader {
        let Served { id, size, version, .. } = self.served.as_ref();
        let histories = self.served.histories_for(timeline);
        Uploader::new(repository.clone(), id.clone(), self.served.branch(timeline), *size, *version, histories)
    }

    /// The repository's own last bytes against another's: those before `until` in the segment that holds the last of them.
    async fn compare(&self, filled: &mut Filled, horizon: &Horizon) -> Result<(), ArchiveError> {
        let Prepared { repository, place, compares, expected, .. } = &filled.prepared;
        let (id, size) = (&self.served.id, self.served.size);
        let (branch, until, digest) = match (expected.last(), filled.prepared.left()) {
            (Some(last), _) => (*compares, last.at, Some(last.digest)),
            // The fork lies on a segment's border: the parent's last segment.
            (None, Some(parent)) => (parent, place.at, None),
            (None, None) => return self.is_compared(filled).await, // empty, or behind a gap
        };
        // A tail may reach into what is still in memory; that part comes with the stream.
        let (until, digest) = if until > horizon.kept_from { (horizon.kept_from, None) } else { (until, digest) };
        let segment = until.segment_before(size);
        let ours = match digest {
            Some(digest) => Some(digest),
            None => repository.digest_at(id, branch, segment, size, offset(until, segment, size)).await?,
        };
        let mut asked = vec![(segment, until, ours)];
        if segment.get() > 0 && !repository.can_read() {
            // Without reading, only ends of whole segments can be compared.
            let start = segment.start(size);
            let before = start.segment_before(size);
            let ours = repository.digest_at(id, branch, before, size, offset(start, before, size)).await?;
            asked.push((before, start, ours));
        }
        for (segment, until, ours) in asked {
            let Some(ours) = ours else { continue };
            for source in &horizon.sources {
                let Some(theirs) = self.digest_in(source, branch, segment, until).await? else { continue };
                if theirs == ours {
                    return self.is_compared(filled).await;
                }
                return Err(ArchiveError::DiffersFromOther {
                    cluster: id.clone(),
                    repository: self.name(),
                    other: source.name().to_owned(),
                    from: segment.start(size),
                    until,
                });
            }
        }
        // Nobody holds those bytes any more, nor what follows: as behind a recorded gap, nothing can be compared.
        let from = Path::of(&self.served.state, size).settle(filled.position);
        let to = self.record_gap(&filled.prepared.repository, from, horizon).await?;
        filled.position = to;
        self.is_compared(filled).await?;
        self.tell(News::Copied { from: from.to, to: to.to }).await;
        Ok(())
    }

    async fn is_compared(&self, filled: &mut Filled) -> Result<(), ArchiveError> {
        filled.compared = true;
        self.tell(News::Compared).await;
        Ok(())
    }

    /// The digest of a segment's bytes before `until` in a source; a fork's child holds its parent's bytes too.
    async fn digest_in(
        &self,
        source: &Repository,
        branch: Branch,
        segment: SegmentNumber,
        until: Lsn,
    ) -> Result<Option<Digest>, ArchiveError> {
        let (id, size) = (&self.served.id, self.served.size);
        for (timeline, begins_at, _) in self.served.state.history.path() {
            let holds = timeline == branch.timeline
                || (timeline > branch.timeline && begins_at >= until && begins_at.segment(size) == segment);
            if holds {
                let on = self.served.branch(timeline);
                let digest = source.digest_at(id, on, segment, size, offset(until, segment, size)).await?;
                if digest.is_some() {
                    return Ok(digest);
                }
            }
        }
        Ok(None)
    }

    /// The sources whose notes of damage the target has: what a note is of is not copied before it.
    async fn with_notes(&self, target: &Repository, sources: &[Repository]) -> Result<Vec<Repository>, ArchiveError> {
        let (branches, mut told, mut failed) = (self.served.branches(), Vec::new(), None);
        for source in sources {
            match copy_notes(target, &self.served.id, source, &branches).await {
                Ok(()) => told.push(source.clone()),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.filter(|_| told.is_empty()).map_or(Ok(told), Err)
    }

    /// Copies what `step` says, and the segments after it, some beside each other; what is done counts in order.
    async fn copy(&self, path: &Path, filled: &mut Filled, step: Step, horizon: &Horizon) -> Result<(), ArchiveError> {
        let mut steps = vec![step];
        while let (true, Some(Step::Segment { branch, to, .. })) = (steps.len() < ROUND, steps.last()) {
            let next = path.next(Position { on: branch.timeline, to: *to }, horizon.streamed, horizon.kept_from);
            if !matches!(next, Step::Segment { .. }) {
                break;
            }
            steps.push(next);
        }
        let target = filled.prepared.repository.clone();
        let target = &target;
        let size = self.served.size;
        let late = |_| ArchiveError::NoAnswer { repository: self.name(), after: COPY_DEADLINE };
        let sources = &timeout(COPY_DEADLINE, self.with_notes(target, &horizon.sources)).await.map_err(late)??;
        let copies = stream::iter(steps).map(|step: Step| async move {
            self.pace.wait(size.bytes()).await;
            let late = |_| ArchiveError::NoAnswer { repository: self.name(), after: COPY_DEADLINE };
            let copied = timeout(COPY_DEADLINE, self.copy_step(target, step, sources)).await.map_err(late)?;
            copied.map(|copied| (step, copied))
        });
        let mut copies = std::pin::pin!(copies.buffered(at_once(size)));
        while let Some(copied) = copies.next().await {
            let (step, copied) = copied?;
            let from = path.settle(filled.position);
            let (Step::Segment { branch, to, .. } | Step::Parts { branch, to, .. }) = step else { break };
            match copied {
                true => {
                    filled.position = Position { on: branch.timeline, to };
                    self.tell(News::Copied { from: from.to, to }).await;
                }
                false => {
                    // Nobody has it: where a gap is recorded elsewhere, it is one here, too.
                    let to = match self.copy_gap(target, from, &horizon.sources).await? {
                        Some(to) => to,
                        None => self.record_gap(target, from, horizon).await?,
                    };
                    filled.position = to;
                    self.tell(News::Copied { from: from.to, to: to.to }).await;
                    break;
                }
            }
        }
        Ok(())
    }

    /// The indexes of what was copied since `begun`, from the first source that has any; `indexed`: how far it is, by branch.
    /// What fails is left out.
    async fn copy_indexes(
        &self,
        filled: &Filled,
        horizon: &Horizon,
        begun: Position,
        indexed: &mut BTreeMap<Branch, Lsn>,
    ) {
        let copied = timeout(INDEX_DEADLINE, self.try_copy_indexes(filled, horizon, begun, indexed)).await;
        if let Ok(Err(error)) = &copied {
            tracing::debug!(repository = %self.name(), %error, "an index is not copied");
        }
        if copied.is_err() {
            tracing::debug!(repository = %self.name(), "indexes were not copied in time");
        }
    }

    async fn try_copy_indexes(
        &self,
        filled: &Filled,
        horizon: &Horizon,
        begun: Position,
        indexed: &mut BTreeMap<Branch, Lsn>,
    ) -> Result<(), CatalogError> {
        let (id, target, position) = (&self.served.id, &filled.prepared.repository, filled.position);
        for (timeline, begins_at, _) in self.served.state.history.path() {
            if timeline < begun.on || timeline > position.on {
                continue;
            }
            let branch = self.served.branch(timeline);
            let from = if timeline == begun.on { begun.to } else { begins_at };
            let from = indexed.get(&branch).copied().unwrap_or(from);
            // A parent that was left is there as far as it is needed.
            let to = if timeline == position.on { position.to } else { Lsn::new(u64::MAX) };
            for source in &horizon.sources {
                let ranges = source.list_indexes(id, branch).await?;
                let copied = ranges.iter().filter(|range| range.to > from && range.to <= to);
                let mut any = false;
                for range in copied {
                    target.copy_index(source, id, range).await?;
                    indexed.insert(branch, range.to);
                    any = true;
                }
                if any {
                    break;
                }
            }
        }
        Ok(())
    }

    /// From the first source that has it; `false` where none has.
    async fn copy_step(&self, target: &Repository, step: Step, sources: &[Repository]) -> Result<bool, ArchiveError> {
        let mut failed = None;
        for source in sources {
            match self.copy_from(target, step, source).await {
                Ok(put) => return accept(put).map(|()| true),
                Err(error) if error.is_not_found() => {}
                // Another source does not help against the target's own fault.
                Err(CatalogError::Store { repository, source }) if repository == self.member.name() => {
                    return Err(CatalogError::Store { repository, source }.into());
                }
                Err(error) => failed = failed.or(Some(whose(error, self.member.name(), source.name()))),
            }
        }
        failed.map_or(Ok(false), Err)
    }

    async fn copy_from(&self, target: &Repository, step: Step, source: &Repository) -> Result<Put, CatalogError> {
        let (id, size) = (&self.served.id, self.served.size);
        match step {
            Step::Segment { branch, segment, .. } => {
                match target.copy_segment(source, id, branch, segment, size).await {
                    // A crash may have left it in pieces that were never put together.
                    Err(error) if error.is_not_found() => target.copy_joined(source, id, branch, segment, size).await,
                    copied => copied.map(|copied| copied.put),
                }
            }
            Step::Parts { branch, segment, to } => {
                target.copy_parts(source, id, branch, segment, size, offset(to, segment, size)).await
            }
            Step::Join | Step::Ahead => Ok(Put::SameContent), // not reached: nothing is to be copied
        }
    }

    /// Records in the target the gap that a source has where `from` is; where it goes on.
    async fn copy_gap(
        &self,
        target: &Repository,
        from: Position,
        sources: &[Repository],
    ) -> Result<Option<Position>, ArchiveError> {
        let (id, size, branch) = (&self.served.id, self.served.size, self.served.branch(from.on));
        for source in sources {
            let gaps = source.gaps_of(id, branch).await?;
            let here = |gap: &&GapRecord| gap.from.segment_start(size) <= from.to && from.to < gap.to;
            if let Some(gap) = gaps.iter().filter(here).max_by_key(|gap| gap.to) {
                let (noticed_at, writer) = (target.now(), target.writer());
                // What the other one expired was asked for here: nobody has it any more.
                let expired = gap.reason == GapReason::Expired;
                let reason = if expired { GapReason::Recycled } else { gap.reason };
                let gap = GapRecord { from: from.to, reason, noticed_at, writer, ..gap.clone() };
                target.put_record(id, ClusterObject::Gap(branch, gap.from, gap.to), &gap).await?;
                tracing::warn!(repository = %self.name(), %branch, from = %gap.from, to = %gap.to, "a gap is recorded here as in the other repositories");
                return Ok(Some(Position { on: from.on, to: gap.to }));
            }
        }
        Ok(None)
    }

    /// The stream has gone on beyond `from`, and no repository holds what comes there: a gap, up to where the first of the
    /// others begins (P3). While one is missing nobody knows whether it holds that WAL.
    async fn record_gap(
        &self,
        target: &Repository,
        from: Position,
        horizon: &Horizon,
    ) -> Result<Position, ArchiveError> {
        let Served { id, size, state, .. } = self.served.as_ref();
        let nowhere = || ArchiveError::NowhereHeld {
            repository: self.name(),
            branch: self.served.branch(from.on),
            from: from.to,
        };
        if horizon.missing > 1 {
            return Err(nowhere());
        }
        let mut inventories = Vec::new();
        for source in &horizon.sources {
            inventories.push(source.load(id).await?);
        }
        let mut gaps: Vec<(Branch, Lsn, Lsn)> = Vec::new();
        for (timeline, begins_at, left_at) in state.history.path() {
            if timeline < from.on {
                continue;
            }
            let branch = self.served.branch(timeline);
            let begin = if timeline == from.on { from.to } else { begins_at.segment_start(*size) };
            let branches = inventories.iter().filter_map(|inventory| inventory.branches.get(&branch));
            let runs: Vec<Run> = branches.flat_map(|branch| branch.runs(*size)).collect();
            if runs.iter().any(|run| run.from <= begin && begin < run.to) {
                return Err(nowhere()); // it is there after all: a list was out of date
            }
            let next = runs.iter().map(|run| run.from.segment_start(*size)).filter(|start| *start >= begin).min();
            let end = next.or(left_at);
            gaps.extend(end.filter(|end| *end > begin).map(|end| (branch, begin, end)));
            let Some(to) = next else { continue };
            for (branch, from, to) in gaps {
                let (noticed_at, writer) = (target.now(), target.writer());
                let gap = GapRecord { branch, from, to, reason: GapReason::Recycled, noticed_at, writer };
                target.put_record(id, ClusterObject::Gap(branch, from, to), &gap).await?;
                tracing::error!(repository = %self.name(), %branch, %from, %to, "no repository holds this WAL, and the server has gone on: a gap is recorded here; take a base backup into this repository");
            }
            return Ok(Position { on: timeline, to });
        }
        Err(nowhere())
    }
}

/// What keeps a segment from being copied. A source that is at odds with itself says nothing against the target.
fn whose(error: CatalogError, target: &str, from: &str) -> ArchiveError {
    match &error {
        CatalogError::Disagreement { repository, .. } | CatalogError::TwoContents { repository, .. }
            if repository == from && repository != target =>
        {
            let (repository, other) = (target.to_owned(), from.to_owned());
            ArchiveError::CannotGive { repository, other, source: Box::new(error) }
        }
        _ => error.into(),
    }
}

/// Offset of `at` in `segment`, whose end it may be.
fn offset(at: Lsn, segment: SegmentNumber, size: SegmentSize) -> u32 {
    // invariant: a segment is at most 1 GiB
    u32::try_from(at.bytes_since(segment.start(size)).unwrap_or(0)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::KeyFile;
    use crate::store::memory::MemoryStore;

    const MIB: u64 = 1 << 20;

    async fn empty_at(at: u64) -> Filled {
        let keys = KeyFile::generate().unwrap();
        let repository = Repository::create("one", Arc::new(MemoryStore::new()), &keys).await.unwrap();
        Filled::from(Prepared::empty(repository, TimelineId::FIRST, Lsn::new(at)))
    }

    fn root() -> super::super::resume::ServerState {
        let history = crate::types::TimelineHistory::root(TimelineId::FIRST);
        let (flushed, lineage) = (Lsn::ZERO, crate::types::Lineage::default());
        super::super::resume::ServerState { history, flushed, slot_begins_at: None, lineage, differs_from: None }
    }

    fn at(to: u64) -> Position {
        Position { on: TimelineId::FIRST, to: Lsn::new(to) }
    }

    /// A server that does not tell where its slot begins: an empty repository that comes late was taken to hold everything
    /// before the server's own end, and counted for parts that it was only about to put.
    #[tokio::test]
    async fn p1_an_empty_repository_counts_from_the_streams_beginning_at_most() {
        let path = Path::of(&root(), SegmentSize::new(MIB).unwrap());
        let mut late = empty_at(90 * MIB).await;
        late.begin_no_later(&path, at(7 * MIB));
        assert_eq!(late.position, at(7 * MIB));
        let mut early = empty_at(5 * MIB).await;
        early.begin_no_later(&path, at(7 * MIB));
        assert_eq!(early.position, at(5 * MIB));
        // What was copied to it since counts.
        (early.compared, early.position) = (true, at(9 * MIB));
        early.begin_no_later(&path, at(7 * MIB));
        assert_eq!(early.position, at(9 * MIB));
        // What holds something is believed.
        let mut ahead = empty_at(90 * MIB).await;
        ahead.prepared.is_empty = false;
        ahead.begin_no_later(&path, at(7 * MIB));
        assert_eq!(ahead.position, at(90 * MIB));
    }

    /// Ten segments of 1 MiB at 1 MiB a second take nine seconds: the first goes at once.
    #[tokio::test(start_paused = true)]
    async fn no_faster_than_allowed() {
        let begin = Instant::now();
        let pace = Pace::new(NonZeroU64::new(MIB));
        futures_util::future::join_all((0..10).map(|_| pace.wait(MIB))).await;
        assert_eq!(begin.elapsed().as_secs(), 9);
        Pace::new(None).wait(u64::MAX).await;
        assert_eq!(begin.elapsed().as_secs(), 9);
        for (size, segments) in [(1, 8), (16, 4), (64, 2), (1024, 2)] {
            assert_eq!(at_once(SegmentSize::new(size * MIB).unwrap()), segments);
        }
    }

    /// What lies in the source says nothing against the target: it stays away, and is not refused.
    #[test]
    fn p6_a_source_at_odds_with_itself_is_not_the_targets_fault() {
        let odds = |repository: &str| {
            let (repository, name, other) = (repository.to_owned(), "a".to_owned(), "b".to_owned());
            [
                CatalogError::Disagreement { repository: repository.clone(), name: name.clone(), other: other.clone() },
                CatalogError::TwoContents { repository, name, other },
            ]
        };
        for error in odds("source").map(|error| whose(error, "target", "source")) {
            assert!(error.is_retryable() && !error.refuses_repository() && !error.protects_data(), "{error}");
            assert!(error.to_string().contains("source") && error.to_string().contains("target"), "{error}");
        }
        for error in odds("target").map(|error| whose(error, "target", "source")) {
            assert!(error.refuses_repository(), "{error}");
        }
    }

    /// Between the filler's look and the join the last byte to be compared may leave memory.
    #[tokio::test]
    async fn p6_nobody_joins_uncompared() {
        let mut filled = empty_at(3 * MIB).await;
        filled.prepared.is_empty = false;
        let digest = Digest::of(b"what it holds");
        filled.prepared.expected = vec![Expected { at: Lsn::new(4 * MIB), digest }];
        assert!(filled.is_compared_from(Lsn::new(3 * MIB)), "it comes again");
        assert!(!filled.is_compared_from(Lsn::new(4 * MIB)), "it has gone by");
        filled.compared = true;
        assert!(filled.is_compared_from(Lsn::new(4 * MIB)));
    }

    /// A fork on a segment's border: the first record of the stream has gone by long ago, and who was compared with another
    /// repository does not wait for it.
    #[tokio::test]
    async fn what_another_repository_has_shown_is_not_asked_of_the_stream() {
        let mut filled = empty_at(3 * MIB).await;
        let expected = vec![Expected { at: Lsn::new(4 * MIB), digest: Digest::of(b"") }];
        (filled.prepared.expected, filled.prepared.follows) = (expected.clone(), vec![Lsn::new(MIB)]);
        let mut compared = Filled { compared: true, has_histories: false, ..empty_at(3 * MIB).await };
        (compared.prepared.expected, compared.prepared.follows) = (expected.clone(), vec![Lsn::new(MIB)]);
        assert_eq!(filled.left_to_compare(), (expected, vec![Lsn::new(MIB)]));
        assert_eq!(compared.left_to_compare(), (Vec::new(), Vec::new()));
    }
}
