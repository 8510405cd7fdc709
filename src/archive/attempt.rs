//! One connection: from asking who the server is to the end of its stream.
//!
//! Invariant: nothing changes at the server or in a repository before it is decided which of the archived histories is the
//! server's, or that it is a new one; and no WAL, nor the history files it needs, before the overlap was equal.
//! A repository that does not answer, or that holds another history, does not keep the others from going on.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ArchiveError;
use super::begin::{Begin, StreamOptions};
use super::branching::Choice;
use super::cutter::CutterOptions;
use super::fill::Path;
use super::filler::Filled;
use super::identify::{Identity, identify};
use super::load::{Archived, Prepared, Served, last_records, load};
use super::receivers::Receivers;
use super::resume::{DeadTail, Refusal};
use super::source::{Connected, SlotState, Source};
use super::status::ClusterStatus;
use super::stream::{Arrival, Stream, StreamEnd};
use crate::catalog::Repository;
use crate::catalog::layout::ClusterObject;
use crate::catalog::records::{GapReason, GapRecord};
use crate::pg::{PgError, Replication, ServerErrorKind, Started};
use crate::types::{Branch, ClusterId, ClusterName, Lsn};

/// How long the open pieces of a complete segment stay: longer than any reader needs between listing and reading.
const OPEN_GRACE: Duration = Duration::from_secs(60);
/// Of several repositories one that answers is waited for no longer than this.
const ANSWER: Duration = Duration::from_secs(300);

/// How to archive a cluster.
#[derive(Debug, Clone, Copy)]
pub struct ArchiveOptions {
    /// The newest byte of the open segment is durable after this long, plus one put.
    pub max_delay: Duration,
    /// Commits wait for us: write, flush and apply are all the durable position.
    pub synchronous: bool,
    /// In synchronous mode, where every range is an object (a bucket): from one range to the next at least this long.
    pub range_interval: Duration,
    /// How long a stopping server, or our own stop, waits for the repository.
    pub shutdown_deadline: Duration,
    /// Bytes of WAL a second with which a repository that was away is filled up at most; `None`: as fast as it goes.
    pub fill_rate: Option<NonZeroU64>,
}

/// A repository at the beginning of an attempt.
type Answer<T> = Result<T, ArchiveError>;

/// See the module. When one repository has answered, the others get `patience` to do so, too. `compare_all`: the last
/// attempt found the server to be another than was taken for granted.
#[expect(
    clippy::too_many_arguments,
    reason = "one call, of a function that would otherwise be a struct of the same fields"
)]
pub(super) async fn attempt(
    source: &Source,
    receivers: &Receivers,
    cluster: &ClusterName,
    options: &ArchiveOptions,
    patience: Duration,
    compare_all: bool,
    status: &watch::Sender<ClusterStatus>,
    stop: CancellationToken,
) -> Result<StreamEnd, ArchiveError> {
    status.send_replace(ClusterStatus::Connecting);
    let mut connected = source.connect().await?;
    let id = ClusterId { name: cluster.clone(), system: connected.system };
    if options.synchronous && source.is_standby().await == Some(true) {
        return Err(ArchiveError::SynchronousStandby { cluster: id, server: source.conninfo.describe() });
    }
    let mut served = Served::new(&connected, id, source.conninfo.describe());

    let loads = receivers.each().iter().map(|member| async {
        if let Some(reason) = member.refused() {
            return Err(ArchiveError::StillRefused { reason });
        }
        let repository = member.open().await?;
        load(repository, &served).await
    });
    let loaded = gather(receivers, patience, loads.collect()).await;
    let usable: Vec<&Archived> = loaded.iter().flatten().collect();
    if !usable.is_empty() {
        let Identity { choice, differs } = identify(source, &served, &usable, compare_all).await?;
        let root = served.state.history.path().first().map(|stretch| stretch.0);
        served.state.differs_from =
            differs.iter().filter(|(branch, _)| Some(branch.timeline) == root).map(|(_, from)| *from).min();
        if !choice.begun.is_empty() {
            may_begin(receivers, &loaded)?;
            tell_begun(&served, &choice, &differs);
        }
        served.state.lineage = choice.lineage;
    }
    let slot_was = connected.slot;
    let (flushed, decided) = decide(source, &mut connected, &served, loaded, compare_all).await?;
    served.state.flushed = flushed;
    let decided = some_usable(receivers, decided, compare_all)?;
    if !matches!(connected.slot, SlotState::BeginsAt(_)) {
        source.make_slot(&mut connected).await?;
        served.state.slot_begins_at = connected.state().slot_begins_at;
    }
    let (mut archived, mut prepares, mut away) = (Vec::new(), Vec::new(), Vec::new());
    for (member, answer) in receivers.each().iter().zip(decided) {
        if answer.as_ref().is_err_and(|error| !error.refuses_repository()) {
            away.push(member.name());
        }
        let (kept, error) = match answer {
            Ok(kept) => (Some(Arc::new(kept)), None),
            Err(error) => (None, Some(error)),
        };
        let (of, served) = (kept.clone(), &served);
        prepares.push(async move {
            match (of, error) {
                (Some(archived), _) => archived.prepare(served, &served.state).await,
                (None, error) => Err(error.unwrap_or_else(|| ArchiveError::Task("no answer".to_owned()))),
            }
        });
        archived.push(kept);
    }
    let prepared = some_usable(receivers, gather(receivers, patience, prepares).await, compare_all)?;

    let away = away.join(", ");
    let served = Arc::new(served);
    let attempt = Attempt { source, receivers, served, archived, away, slot_was, options, status, stop };
    attempt.stream(prepared, connected.replication).await
}

/// A new name is given only when everybody was asked who has it already.
fn may_begin(receivers: &Receivers, loaded: &[Answer<Archived>]) -> Result<(), ArchiveError> {
    let away = receivers.each().iter().zip(loaded).filter_map(|(member, answer)| {
        let error = answer.as_ref().err().filter(|error| !error.refuses_repository())?;
        Some(format!("{}: {error}", member.name()))
    });
    let away: Vec<String> = away.collect();
    if away.is_empty() { Ok(()) } else { Err(ArchiveError::NewWhileAway { away: away.join("; ") }) }
}

/// A history that nothing is archived of, under a number that others have already: somebody should know.
fn tell_begun(served: &Served, choice: &Choice, differs: &BTreeMap<Branch, Lsn>) {
    let (cluster, server, now) = (&served.id, &served.server, served.branch_of(&choice.lineage));
    for branch in &choice.begun {
        let same_number = differs.iter().filter(|(other, _)| other.timeline == branch.timeline);
        let seen: Vec<String> = same_number
            .map(|(other, from)| format!("from {other} in the segment that begins at {from}, or before"))
            .collect();
        let seen = if seen.is_empty() { "by its history file".to_owned() } else { seen.join(", ") };
        tracing::error!(
            %cluster, %branch,
            "the server at {server} writes a history of timeline {} that is not archived: it differs {seen}. It is archived \
             as branch {branch}, from what the server still has; what is archived stays as it is and is not mixed with it. \
             Another server of this cluster (a restored copy, or this one before it was rolled back) wrote that: is it still \
             running? A base backup of branch {now} is needed, `pgkeep run` takes one by itself",
            branch.timeline.get()
        );
    }
}

/// Asks all at once. When one has answered the others get `patience` more; without any, [`ANSWER`]. A single repository
/// has the time that its store gives it.
async fn gather<T>(
    receivers: &Receivers,
    patience: Duration,
    asked: Vec<impl Future<Output = Answer<T>>>,
) -> Vec<Answer<T>> {
    let names = receivers.each().iter().map(|member| member.name().to_owned());
    let late = |repository| Err(ArchiveError::NoAnswer { repository, after: patience });
    let mut answers: Vec<Answer<T>> = names.map(late).collect();
    let alone = asked.len() == 1;
    let mut pending: FuturesUnordered<_> =
        asked.into_iter().enumerate().map(|(index, work)| async move { (index, work.await) }).collect();
    let mut deadline = Instant::now() + ANSWER;
    while !pending.is_empty() {
        let next = pending.next();
        let next = if alone { Ok(next.await) } else { tokio::time::timeout_at(deadline, next).await };
        let Ok(Some((index, answer))) = next else { break };
        if answer.is_ok() {
            deadline = deadline.min(Instant::now() + patience);
        }
        if let Some(slot) = answers.get_mut(index) {
            *slot = answer;
        }
    }
    answers
}

/// Who of those that answered may go on with this server, and how far it has flushed. A standby that has not replayed as
/// far as one of them is waited for.
async fn decide(
    source: &Source,
    connected: &mut Connected,
    served: &Served,
    loaded: Vec<Answer<Archived>>,
    compared: bool,
) -> Result<(Lsn, Vec<Answer<Archived>>), ArchiveError> {
    let mut state = served.state.clone();
    let behind = |state: &_| {
        loaded.iter().flatten().find_map(|archived| match archived.decide(served, state) {
            Err(Refusal::ServerBehindArchive { archived, .. }) => Some(archived),
            _ => None,
        })
    };
    if let Some(archived) = behind(&state) {
        // Between the two answers another archiver may have gone on; and a standby replays on.
        state.flushed = connected.replication.identify_system().await?.flushed;
        if state.flushed < archived && source.is_standby().await == Some(true) {
            return Err(ArchiveError::StandbyBehind { archived, replayed: state.flushed });
        }
        // One that holds another history under this name is refused, and keeps nobody from going on.
        let all_behind = loaded.iter().flatten().all(|known| known.decide(served, &state).is_err());
        if state.flushed < archived && compared && all_behind {
            let (cluster, flushed) = (served.id.clone(), state.flushed);
            return Err(ArchiveError::ServerBehind { cluster, archived, flushed });
        }
    }
    let refused = |source| ArchiveError::Refused { cluster: served.id.clone(), source };
    let decided = loaded.into_iter().map(|answer| {
        let archived = answer?;
        archived.compare_histories(served)?;
        archived.decide(served, &state).map_err(refused)?;
        Ok(archived)
    });
    Ok((state.flushed, decided.collect()))
}

/// Where none can be used there is no stream: the only repository's reason, a refusal that holds for all, or all reasons.
/// Who is not the server's while others are away is compared first (`compared`: it was): whether this is a history that
/// begins is to be known, and said, before they come back.
fn some_usable<T>(
    receivers: &Receivers,
    answers: Vec<Answer<T>>,
    compared: bool,
) -> Result<Vec<Answer<T>>, ArchiveError> {
    if answers.iter().any(Result::is_ok) {
        return Ok(answers);
    }
    let mut errors: Vec<ArchiveError> = answers.into_iter().filter_map(Result::err).collect();
    if errors.len() == 1 || errors.iter().all(ArchiveError::refuses_repository) {
        return Err(errors.swap_remove(0)); // invariant: there is at least one repository
    }
    if let Some(other) = errors.iter().position(ArchiveError::asks_who_it_is).filter(|_| !compared) {
        return Err(errors.swap_remove(other)); // invariant: found there
    }
    let names = receivers.each().iter().map(|member| member.name());
    let reasons: Vec<String> = names.zip(&errors).map(|(name, error)| format!("{name}: {error}")).collect();
    Err(ArchiveError::NoRepository { reasons: reasons.join("; ") })
}

/// What a stream needs besides a connection and a place to begin.
struct Attempt<'a> {
    source: &'a Source,
    receivers: &'a Receivers,
    served: Arc<Served>,
    /// What each repository holds, where it answered.
    archived: Vec<Option<Arc<Archived>>>,
    /// The names of those that did not, and may hold anything.
    away: String,
    /// How the slot was found, before it was made anew.
    slot_was: SlotState,
    options: &'a ArchiveOptions,
    status: &'a watch::Sender<ClusterStatus>,
    stop: CancellationToken,
}

impl Attempt<'_> {
    async fn stream(
        &self,
        mut prepared: Vec<Answer<Prepared>>,
        replication: Replication,
    ) -> Result<StreamEnd, ArchiveError> {
        let (id, size) = (&self.served.id, self.served.size);
        let begin = self.begin(&mut prepared);
        let (at, branch) = (begin.at, self.served.branch(begin.timeline));
        let border = at.segment(size).end(size);
        // Who would go on behind the segment that begins there, if it is gone from the server.
        let complete: Vec<Option<Repository>> = prepared
            .iter()
            .map(|answer| answer.as_ref().ok().filter(|p| p.compares == branch && p.until() == Some(border)))
            .map(|prepared| prepared.map(|prepared| prepared.repository.clone()))
            .collect();
        let ended = match self.run(replication, begin, prepared).await {
            // The segment that should have been compared is complete here and gone from the server.
            Err(ArchiveError::Server(error)) if is_removed(&error) && complete.iter().any(Option::is_some) => {
                let mut answers = Vec::new();
                for (index, repository) in complete.into_iter().enumerate() {
                    answers.push(self.behind_border(index, repository, branch, border).await);
                }
                if !answers.iter().any(|answer| matches!(answer, Ok(prepared) if !prepared.follows.is_empty())) {
                    return Err(error.into());
                }
                tracing::info!(cluster = %id, %border, "the last archived segment is gone from the server; what follows must name its last record");
                let connected = self.source.connect().await?;
                self.run(connected.replication, Begin { at: border, ..begin }, answers).await
            }
            ended => ended,
        };
        match ended {
            // Only where nothing has come in: what did is in the repository, and the next attempt asks it.
            Err(ArchiveError::Server(error)) if is_removed(&error) && !self.has_come_in(at) => {
                self.record_gaps(branch, at).await?.map_or_else(|| Err(error.into()), Err)
            }
            ended => ended,
        }
    }

    /// The place of whoever is furthest on. What holds nothing yet begins where the server's slot does: everything before was
    /// acknowledged because others held it.
    fn begin(&self, prepared: &mut [Answer<Prepared>]) -> Begin {
        let path = Path::of(&self.served.state, self.served.size);
        let position =
            |prepared: &Prepared| super::fill::Position { on: prepared.place.timeline, to: prepared.place.at };
        let furthest = |empty: bool| {
            let those = prepared.iter().flatten().filter(|prepared| prepared.is_empty == empty);
            those.map(position).reduce(|one, other| if path.is_before(one, other) { other } else { one })
        };
        let best = furthest(false).or_else(|| furthest(true));
        let best = best.unwrap_or(super::fill::Position { on: self.served.state.history.timeline(), to: Lsn::ZERO });
        for prepared in prepared.iter_mut().flatten() {
            // A slot that begins beyond what is archived: an empty repository begins with the others.
            if prepared.is_empty && path.is_before(best, position(prepared)) {
                (prepared.place.timeline, prepared.place.at, prepared.durable_to) = (best.on, best.to, best.to);
            }
        }
        let floor = self.served.state.slot_begins_at.unwrap_or(best.to);
        Begin { timeline: best.on, at: best.to, floor, needed: self.receivers.needed() }
    }

    async fn run(
        &self,
        replication: Replication,
        begin: Begin,
        prepared: Vec<Answer<Prepared>>,
    ) -> Result<StreamEnd, ArchiveError> {
        let id = &self.served.id;
        let mut arrivals = Vec::new();
        for (member, answer) in self.receivers.each().iter().zip(prepared) {
            let arrival = match answer {
                Ok(prepared) => {
                    if let Some(DeadTail { branch, from, to }) = prepared.place.dead_tail {
                        tracing::warn!(cluster = %id, repository = member.name(), %branch, %from, %to, "archived WAL beyond the fork belongs to nobody's future; it is kept");
                    }
                    let is_there = (prepared.place.timeline, prepared.place.at) == (begin.timeline, begin.at);
                    let filled = Box::new(Filled::from(prepared));
                    if is_there { Arrival::Live(filled) } else { Arrival::Behind(filled) }
                }
                Err(error) => Arrival::Away(error),
            };
            arrivals.push((member.clone(), arrival));
        }
        tracing::info!(cluster = %id, timeline = %begin.timeline, at = %begin.at, "streaming");
        let options = StreamOptions {
            cutter: CutterOptions { max_delay: self.options.max_delay, synchronous: self.options.synchronous },
            range_interval: self.options.range_interval,
            shutdown_deadline: self.options.shutdown_deadline,
            open_grace: OPEN_GRACE,
            fill_rate: self.options.fill_rate,
        };
        match replication.start(Some(&self.source.slot), begin.at, begin.timeline).await? {
            Started::TimelineEnded(_, end) => Ok(StreamEnd::TimelineEnded(end)),
            Started::Streaming(wal) => {
                let served = Arc::clone(&self.served);
                let indexer = self.receivers.indexer();
                indexer.asks(self.source);
                let stream = Stream::new(wal, served, begin, options, arrivals, self.status.clone(), indexer.clone())?;
                stream.run(self.stop.clone()).await
            }
        }
    }

    /// A repository whose last segment ends at `border`, ready to go on behind it; another one as it is.
    async fn behind_border(
        &self,
        index: usize,
        complete: Option<Repository>,
        branch: Branch,
        border: Lsn,
    ) -> Answer<Prepared> {
        let served = &self.served;
        let known = self.archived.get(index).and_then(Option::as_ref);
        let known = known.ok_or_else(|| ArchiveError::Task("this repository did not answer".to_owned()))?;
        let mut prepared = known.prepare(served, &served.state).await?;
        let Some(repository) = complete else { return Ok(prepared) };
        prepared.follows = last_records(&repository, &served.id, branch, border, served.size).await?;
        if !prepared.follows.is_empty() {
            prepared.expected.clear();
            (prepared.place.timeline, prepared.place.at, prepared.durable_to) = (branch.timeline, border, border);
        }
        Ok(prepared)
    }

    fn has_come_in(&self, at: Lsn) -> bool {
        matches!(&*self.status.borrow(), ClusterStatus::Streaming(progress) if progress.received > at)
    }

    /// The server has removed WAL that no repository holds: from the end of `branch` there to where its slot begins, over
    /// every timeline on the way. `None` where that cannot be the reason. While a repository is away nobody knows whether
    /// it holds that WAL.
    async fn record_gaps(&self, branch: Branch, at: Lsn) -> Result<Option<ArchiveError>, ArchiveError> {
        let (id, size, state) = (&self.served.id, self.served.size, &self.served.state);
        let Some(to) = state.slot_begins_at.map(|at| at.segment_start(size)) else { return Ok(None) };
        let known = || self.archived.iter().flatten();
        let ends = known().filter_map(|archived| archived.end_of(branch));
        let from = ends.max().unwrap_or(at);
        let mut gaps = Vec::new();
        for (timeline, begins_at, left_at) in state.history.path() {
            let on = self.served.branch(timeline);
            let begin = if on == branch { from } else { begins_at.segment_start(size) };
            let end = left_at.unwrap_or(Lsn::new(u64::MAX)).min(to);
            if timeline >= branch.timeline && begin < end {
                let reason = match (left_at, self.slot_was) {
                    // Its primary is gone, or went on without us.
                    (Some(left_at), _) if end == left_at => GapReason::Failover,
                    (_, SlotState::Missing | SlotState::Lost) => GapReason::SlotLost,
                    _ => GapReason::Recycled,
                };
                gaps.push((on, begin, end, reason));
            }
        }
        if gaps.is_empty() {
            return Ok(None);
        }
        if !self.away.is_empty() {
            return Err(ArchiveError::HeldElsewhere { cluster: id.clone(), from, away: self.away.clone() });
        }
        for archived in known().filter(|archived| !archived.is_empty()) {
            let repository = &archived.repository;
            for (branch, from, to, reason) in &gaps {
                let gap = GapRecord {
                    branch: *branch,
                    from: *from,
                    to: *to,
                    reason: *reason,
                    noticed_at: repository.now(),
                    writer: repository.writer(),
                };
                repository.put_record(id, ClusterObject::Gap(*branch, *from, *to), &gap).await?;
            }
        }
        Ok(Some(ArchiveError::WalRemoved { cluster: id.clone(), branch, from, to }))
    }
}

fn is_removed(error: &PgError) -> bool {
    error.server_kind() == Some(ServerErrorKind::FileMissing)
}
