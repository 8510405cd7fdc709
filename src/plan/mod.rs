//! Whether a target can be reached, and how. Pure: values in, values out; no store, no clock, no runtime.
//!
//! ```text
//! Planning::begin(inventory, target, options)      which base backups and paths come into question
//!   loop: read the WAL of planning.chain(), push what is found until it says Enough
//!         planning.finish(how the WAL ended)  ->  Yes(plan) | No(reason) | Again(with another base backup)
//! ```
//!
//! What always holds (promise P2): a [`RestorePlan`] names a base backup that is complete, a path of timelines whose
//! history is known, every byte of WAL from the base backup's first segment to the end of the record at which recovery
//! stops, and that record itself, which was seen whole. Recovery is given that record's position and a timeline number,
//! never a time, an xid or "latest": so it stops there or fails, and nothing in between. Everything else is a
//! [`PlanError`] that says why and what can be reached instead.
//!
//! The rules of the server's own targets are kept (`search`), with three additions: a position that is the end of
//! the last archived record means "everything up to there"; `latest` is the last whole archived record; a time after
//! the last commit is reached when the archive is known to have been complete until then.

pub mod chain;
pub mod choose;
pub mod estimate;
pub mod explain;
pub mod holes;
#[cfg(test)]
mod model;
pub mod outcome;
#[cfg(test)]
mod proof_tests;
pub mod search;
pub mod target;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use jiff::{SignedDuration, Timestamp};

pub use chain::{Chain, Options, Path, TimelineChoice};
pub use estimate::{Estimate, Sample};
pub use holes::{Need, holes, needs_backup};
pub use outcome::{Fetch, HistoryFile, NoKind, PathPart, PlanError, Proof, Reachable, RestorePlan, Stop, WalNeed};
pub use search::{EndOfWal, Located, Reading, Seen, StopAt, TransactionEnd};
pub use target::{Point, Reading as TargetReading, Target, TargetError};

use crate::catalog::inventory::{ClusterInventory, Hole, Stretch, WalPiece};
use crate::catalog::records::{BackupInfo, ServerParameters};
use crate::types::{BackupLabel, Branch, Lsn, PgTimestamp, SegmentSize, TimelineId};
use crate::wal::Parameters;
use chain::{Limit, NoPath};
use search::{Finding, Search};

/// Base backups that the archiver's clock puts after a target are still looked at when they are off by less than this: the
/// server's clock, which decides, may be behind.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_hours(1);

/// A plan in the making: which chain has to be read, and what was found in it so far.
#[derive(Debug, Clone)]
pub struct Planning<'a> {
    inventory: &'a ClusterInventory,
    target: Target,
    options: Options,
    /// Every base backup that can be made consistent on the path, oldest first.
    usable: Vec<Chain>,
    /// The one being read.
    chain: Chain,
    /// What is tried after it.
    rest: VecDeque<Chain>,
    search: Search,
    /// Reading ended before the chain did.
    enough: bool,
    /// The nearest place after the target, as far as known.
    after: Option<Reachable>,
    /// The tip that was chosen, and other histories of its timeline.
    tip: Option<Branch>,
    rivals: Vec<Branch>,
    warnings: Vec<String>,
    rejected: Vec<String>,
    /// Base backups left out because they are flagged.
    flagged: Vec<(BackupLabel, String)>,
    /// What was asked for, where a chain before this one has shown it.
    located: Option<Located>,
}

/// What a reading of WAL led to.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// The target can be reached.
    Yes(Box<RestorePlan>),
    /// It can not.
    No(Box<PlanError>),
    /// Not from this base backup: read the WAL of this one.
    Again(Box<Planning<'a>>),
}

impl<'a> Planning<'a> {
    /// Looks for base backups and paths. A target that no reading of WAL could reach is refused here.
    pub fn begin(
        inventory: &'a ClusterInventory,
        target: &Target,
        options: &Options,
    ) -> Result<Planning<'a>, Box<PlanError>> {
        let mut warnings = Vec::new();
        let mut rejected = Vec::new();
        let (backups, flagged) = allowed_backups(inventory, options)?;
        let (tip, rivals) = choose_path(inventory, options, &backups)?;
        let mut usable = Vec::new();
        for base in &backups {
            let path = match &tip {
                Some(tip) => Some(tip.clone()),
                None => Path::of(inventory, base.branch),
            };
            let built = path.ok_or_else(|| format!("the history file of branch {} is missing", base.branch));
            match built.and_then(|path| Chain::build(inventory, base, &path)) {
                Ok(chain) => usable.push(chain),
                Err(why) => rejected.push(why),
            }
        }
        if let (Some(tip), Some(newest)) = (&tip, backups.last())
            && !tip.contains(newest.branch)
        {
            warnings.push(format!(
                "the newest base backup, {}, is of branch {}, which is not on the way to {}: take a new one there",
                newest.label, newest.branch, tip.tip
            ));
        }
        let order = order(&usable, target);
        let mut rest: VecDeque<Chain> =
            order.tried.into_iter().filter_map(|index| usable.get(index).cloned()).collect();
        let after = order.nearest_after.and_then(|index| usable.get(index)).map(consistent_point);
        let Some(chain) = rest.pop_front() else {
            let mut error = match usable.first() {
                None => no_chain(&tip, rejected),
                Some(_) => before_first(target, rejected),
            };
            error.after = after;
            error.earliest = usable.first().map(consistent_point);
            error.newest = usable.last().map(|chain| held(inventory, chain));
            error.branches = chain::known_branches(inventory);
            return Err(Box::new(error));
        };
        Ok(Planning {
            inventory,
            target: target.clone(),
            options: options.clone(),
            search: Search::new(target, &chain, None),
            enough: false,
            usable,
            chain,
            rest,
            after,
            tip: tip.map(|path| path.tip),
            rivals,
            warnings,
            rejected,
            flagged,
            located: None,
        })
    }

    /// The same question, asked of the base backup that is nearest before `lsn` and of no other: an index says that the
    /// target is there. `None`: that one is asked anyway, or there is none. The WAL decides all the same; where it does not
    /// say yes, this planning has told nothing, and the one it was made from goes on.
    pub fn near(&self, lsn: Lsn) -> Option<Planning<'a>> {
        let leads_there = |chain: &&Chain| chain.base.stop <= lsn && lsn < chain.held_to;
        let chain = self.usable.iter().rev().find(leads_there)?.clone();
        if chain.base.label == self.chain.base.label {
            return None;
        }
        let search = Search::new(&self.target, &chain, None);
        Some(Planning { search, chain, rest: VecDeque::new(), ..self.clone() })
    }

    /// The oldest base backup that comes into question.
    pub fn oldest(&self) -> &BackupInfo {
        self.usable.first().map_or(&self.chain.base, |chain| &chain.base)
    }

    /// The base backup in question and the WAL to be read: `wal`, in order, from its start.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Whether [`Planning::push`] wants every record, or only those of which [`crate::wal::may_be_fact`] is true.
    pub fn wants_every_record(&self) -> bool {
        self.search.wants_every_record()
    }

    /// The next record of the chain.
    pub fn push(&mut self, seen: Seen) -> Reading {
        let reading = self.search.push(seen);
        self.enough |= reading == Reading::Enough;
        reading
    }

    /// The answer, once [`Planning::push`] said that it has seen enough or the WAL has ended.
    pub fn finish(mut self, end: &EndOfWal) -> Outcome<'a> {
        let finding = self.search.finish(end, self.known_complete(end));
        self.located = self.located.or_else(|| self.search.story.located.clone());
        match finding {
            Finding::Stop(stop) => match self.refuses(stop, end) {
                Some(error) => self.no(error, end),
                None => Outcome::Yes(Box::new(self.plan(Stop::At(stop), stop.record, stop.needed_to, end))),
            },
            Finding::Immediate { needed_to } => {
                let record = Lsn::new(needed_to.get().saturating_sub(1));
                Outcome::Yes(Box::new(self.plan(Stop::Immediate, record, needed_to, end)))
            }
            Finding::BeforeConsistent { .. } => {
                let (label, stop) = (self.chain.base.label, self.chain.base.stop);
                self.rejected.push(match self.target.point {
                    Point::Time(_) => format!(
                        "base backup {label} is consistent at {stop}: after the target, or in the same second (its checkpoint \
                         tells no more)"
                    ),
                    _ => format!("base backup {label} is consistent at {stop}, after the target"),
                });
                self.after = Some(consistent_point(&self.chain));
                let error = before_first(&self.target, std::mem::take(&mut self.rejected));
                self.again(None, error, end)
            }
            Finding::NotHere if matches!(self.target.point, Point::Name(_)) => {
                let (held_to, tip) = (self.chain.held_to, self.chain.path.tip);
                self.rest.retain(|chain| chain.path.tip != tip || chain.base.start >= held_to);
                let error = self.not_found();
                self.again(None, error, end)
            }
            Finding::NotHere => {
                let error = self.not_found();
                let absent = (self.chain.path.tip, self.chain.base.start);
                self.again(Some(absent), error, end)
            }
            Finding::Subtransaction { parent } => {
                let what = if parent.aborted { "rolled back" } else { "committed" };
                let reason = format!(
                    "{} is a subtransaction of transaction {}, which {what} at {} (LSN {}); recovery can only stop at \
                     whole transactions: --to xid:{}",
                    self.target, parent.xid, parent.time, parent.lsn, parent.xid
                );
                self.no(PlanError::new(NoKind::Subtransaction, reason), end)
            }
            Finding::Beyond => {
                let error = self.beyond(end);
                self.no(error, end)
            }
            Finding::Incomplete => {
                let why = end.damage.clone().unwrap_or_else(|| "its WAL ends before it is consistent".to_owned());
                self.rejected.push(format!("base backup {} cannot be used: {why}", self.chain.base.label));
                let error = no_chain(&None, self.rejected.clone());
                self.again(None, error, end)
            }
        }
    }

    /// Goes on with the next chain, or says no.
    fn again(mut self, absent: Option<(Branch, Lsn)>, error: PlanError, end: &EndOfWal) -> Outcome<'a> {
        let Some(chain) = self.rest.pop_front() else { return self.no(error, end) };
        let absent_from = absent.filter(|(tip, _)| chain.path.tip == *tip).map(|(_, from)| from);
        self.search = Search::new(&self.target, &chain, absent_from);
        self.chain = chain;
        self.enough = false;
        Outcome::Again(Box::new(self))
    }

    fn no(&self, mut error: PlanError, end: &EndOfWal) -> Outcome<'a> {
        error.earliest = self.usable.first().map(consistent_point);
        error.newest = self.newest(end);
        error.after = error.after.or_else(|| self.after.clone());
        error.located = error.located.or_else(|| self.located.clone());
        if let Some(damage) = &end.damage {
            error.hints.push(format!("not all WAL could be read: {damage}"));
        }
        let others: Vec<String> =
            self.inventory.branches.keys().filter(|b| !self.chain.path.contains(**b)).map(|b| b.to_string()).collect();
        let elsewhere = matches!(
            error.kind,
            NoKind::NotFound | NoKind::AfterNewest | NoKind::MissingWal | NoKind::BeforeFirstBackup
        );
        if elsewhere && !others.is_empty() {
            error.hints.push(format!("branches not on this way: {}; ask for one with --timeline", others.join(", ")));
        }
        error.branches = chain::known_branches(self.inventory);
        Outcome::No(Box::new(error))
    }

    /// A stop that was found and still must not be planned.
    fn refuses(&self, stop: StopAt, end: &EndOfWal) -> Option<PlanError> {
        let here = || Reachable {
            time: self.newest_time(end),
            lsn: stop.record,
            branch: self.chain.path.branch_at(stop.record),
            to: stop.record.to_string(),
        };
        if self.target.point == Point::Latest {
            let why = match (&end.damage, self.chain.limit) {
                (Some(damage), _) => Some(damage.clone()),
                (None, Limit::Hole(hole)) => (!self.was_under_way(&hole)).then(|| hole.to_string()),
                (None, limit @ Limit::Fork { .. }) if self.names_timeline() => Some(limit.to_string()),
                (None, Limit::Fork { .. } | Limit::End) => None,
            };
            if let Some(why) = why {
                let reason = format!("the last archived record cannot be reached: {why}");
                let mut error = PlanError::new(NoKind::MissingWal, reason);
                error.before = Some(here());
                return Some(error);
            }
        }
        if let Some(at) = self.search.story.minimal {
            let reason = format!(
                "the WAL at {at} was written with wal_level = minimal, and recovery cannot pass it: choose a target before it, \
                 or a base backup taken after it"
            );
            return Some(PlanError::new(NoKind::MinimalWal, reason));
        }
        let tip = self.chain.path.tip;
        if !self.rivals.is_empty() && Some(tip) == self.tip && self.chain.path.branch_at(stop.record) == tip {
            let rivals: Vec<String> = self.rivals.iter().map(Branch::to_string).collect();
            let reason = format!(
                "timeline {} has more than one history, and the target lies after they parted: say --timeline {tip} \
                 for the first one, or --timeline {}",
                tip.timeline.get(),
                rivals.join(" or ")
            );
            return Some(PlanError::new(NoKind::AmbiguousTimeline, reason));
        }
        None
    }

    /// What lies behind the hole says that nothing of it had been confirmed when it was cut: the archiver was killed with
    /// several puts under way, and the WAL ends where the first of them did not arrive.
    fn was_under_way(&self, hole: &Hole) -> bool {
        let note = self.inventory.branches.get(&hole.branch).and_then(|branch| branch.note_of_newest.as_ref());
        // Of a tail only its beginning tells, which may be long ago.
        let note = note.filter(|note| note.digest_to.is_some() && hole.reason.is_none());
        self.chain.path.tip == hole.branch
            && note.and_then(|note| note.durable_to).is_some_and(|held| held <= hole.from)
    }

    fn names_timeline(&self) -> bool {
        matches!(self.options.timeline, TimelineChoice::Number(_) | TimelineChoice::Branch(_))
    }

    fn not_found(&self) -> PlanError {
        let reason = match &self.target.point {
            Point::Name(_) => {
                format!("{} is not in the archived WAL on the way to {}", self.target, self.chain.path.tip)
            }
            _ => format!(
                "{} did not end in the archived WAL on the way to {}: it is older than the first base backup, still running, or \
                 never had that number",
                self.target, self.chain.path.tip
            ),
        };
        let mut error = PlanError::new(NoKind::NotFound, reason);
        if self.chain.limit != Limit::End {
            error
                .hints
                .push(format!("the WAL that could be searched ends at {}: {}", self.chain.held_to, self.chain.limit));
        }
        let passed_over = &self.search.story.passed_over;
        if let Some(at) = passed_over.first() {
            error.hints.push(format!("a restore point of that name at {at} was made while the base backup was taken"));
        }
        error
    }

    fn beyond(&self, end: &EndOfWal) -> PlanError {
        let last = match self.search.story.last_included {
            Some(commit) => {
                format!("the last commit there is transaction {} at {} (LSN {})", commit.xid, commit.time, commit.lsn)
            }
            None => "no commit follows the base backup there".to_owned(),
        };
        let known = match self.search.complete_until(self.known_complete(end)) {
            Some(until) => format!("and it is known to be complete until {until}"),
            None => "and until when it is complete is not known".to_owned(),
        };
        let (kind, why) = match (&end.damage, self.chain.limit) {
            (Some(damage), _) => (NoKind::MissingWal, damage.clone()),
            (None, limit @ Limit::Hole(_)) => (NoKind::MissingWal, limit.to_string()),
            (None, limit) => (NoKind::AfterNewest, limit.to_string()),
        };
        let at = self.search.last_record(end).map_or(self.chain.base.stop, |(_, end)| end);
        let reason = format!(
            "{} lies after the WAL that can be reached, which ends at {at} ({why}); {last}, {known}",
            self.target
        );
        let mut error = PlanError::new(kind, reason);
        error.before = self.newest_here(end);
        error
    }

    /// What the newest range's note says, unless some of the WAL before it could not be read.
    fn known_complete(&self, end: &EndOfWal) -> Option<Timestamp> {
        if end.damage.is_some() { None } else { complete_until(self.inventory, &self.chain) }
    }

    /// The newest instant that a time target can name in this chain.
    fn newest_time(&self, end: &EndOfWal) -> Option<Timestamp> {
        // The very last end of a transaction would need one after it to be told from a later one with the same time.
        let before = |time: PgTimestamp| PgTimestamp::new(time.micros().saturating_sub(1)).to_timestamp();
        let until = self.search.complete_until(self.known_complete(end));
        until.max(self.search.story.newest_end.map(before))
    }

    /// The newest place of this chain, whose WAL was read to the end.
    fn newest_here(&self, end: &EndOfWal) -> Option<Reachable> {
        let (record, _) = self.search.last_record(end)?;
        let whole = self.chain.limit == Limit::End && end.damage.is_none();
        let to = if whole { "latest".to_owned() } else { record.to_string() };
        Some(Reachable { time: self.newest_time(end), lsn: record, branch: self.chain.path.branch_at(record), to })
    }

    /// The newest place that can be reached at all: of what was read, or as far as the inventory tells it.
    fn newest(&self, end: &EndOfWal) -> Option<Reachable> {
        let newest = self.usable.last()?;
        if self.enough || newest.held_to > self.chain.held_to {
            return Some(held(self.inventory, newest));
        }
        self.newest_here(end)
    }

    fn plan(&self, stop: Stop, record: Lsn, needed_to: Lsn, end: &EndOfWal) -> RestorePlan {
        let chain = self.rebased(record, needed_to);
        let (path, wal) = chain.shortest(self.inventory, record, needed_to);
        let story = &self.search.story;
        let mut warnings = self.warnings.clone();
        if let Some(why) = &chain.base.flagged {
            warnings.push(format!("base backup {} is flagged: {why}", chain.base.label));
        }
        if let Limit::Fork { .. } = chain.limit
            && self.target.point == Point::Latest
        {
            warnings.push(format!("{}: this is the newest that can be reached", chain.limit));
        }
        let newer = self.flagged.iter().filter(|(label, _)| *label > chain.base.label);
        warnings.extend(newer.map(|(_, why)| format!("not used: {why}")));
        if !story.passed_over.is_empty() {
            warnings.push(
                "an earlier restore point of that name was made while the base backup was taken; this is the next one"
                    .to_owned(),
            );
        }
        for (branch, _, _) in path.branches().iter().take(path.branches().len().saturating_sub(1)) {
            let rivals = chain::rivals(self.inventory, *branch);
            if branch.timeline >= chain.base.timeline && !rivals.is_empty() {
                warnings.push(format!(
                    "timeline {} has more than one history; {branch} is followed",
                    branch.timeline.get()
                ));
            }
        }
        let size = chain.base.segment_size;
        let wal: Vec<WalNeed> = wal.iter().map(|stretch| need(stretch, size)).collect();
        let mut fetch = Fetch { base_bytes: chain.base.bytes, ..Fetch::default() };
        for need in &wal {
            let pieces = self.inventory.branches.get(&need.branch).map_or(&[][..], |branch| &branch.pieces);
            let (objects, stored) = cost(pieces, need, size);
            fetch.wal_objects += objects;
            fetch.wal_stored_bytes = fetch.wal_stored_bytes.saturating_add(stored);
            fetch.wal_bytes = fetch.wal_bytes.saturating_add(need.to.bytes_since(need.from).unwrap_or(0));
        }
        fetch.requests = fetch.wal_objects + 1;
        let branches = path.branches();
        let has_file = |branch: Branch| self.inventory.branches.get(&branch).is_some_and(|b| b.history.is_some());
        let histories = branches.iter().filter(|(branch, ..)| branch.timeline != TimelineId::FIRST);
        let histories =
            histories.map(|(branch, ..)| HistoryFile { branch: *branch, is_there: has_file(*branch) }).collect();
        let proof = Proof { wal_bytes_checked: fetch.wal_bytes, base_objects_opened: 0, histories };
        let changes =
            story.parameters.iter().filter(|(at, _)| *at >= chain.base.start).map(|(_, parameters)| parameters);
        RestorePlan {
            cluster: self.inventory.id.clone(),
            target: self.target.clone(),
            stop,
            located: story.located.clone(),
            target_timeline: path.tip.timeline,
            path: branches.into_iter().map(|(branch, from, to)| PathPart { branch, from, to }).collect(),
            parameters: changes.fold(chain.base.parameters, maximum),
            history: path.history,
            wal,
            fetch,
            keys: Vec::new(),
            proof,
            estimate: None,
            last_included: story.last_included,
            first_excluded: story.first_excluded,
            earliest: self.usable.first().map(consistent_point),
            newest: self.newest(end),
            base: chain.base.clone(),
            warnings,
        }
    }

    /// The chain to restore from. A restore point is sought from the oldest base backup; the newest before it is used.
    fn rebased(&self, record: Lsn, needed_to: Lsn) -> &Chain {
        if !matches!(self.target.point, Point::Name(_)) {
            return &self.chain;
        }
        let fits = |chain: &&Chain| {
            chain.path == self.chain.path
                && chain.base.start >= self.chain.base.start
                && chain.base.stop <= record
                && needed_to <= chain.held_to
        };
        self.usable.iter().rev().find(fits).unwrap_or(&self.chain)
    }
}

/// Base backups with the reason why they are left out.
type LeftOut = Vec<(BackupLabel, String)>;

/// The base backups that may be used, oldest first, and the flagged ones.
fn allowed_backups<'i>(
    inventory: &'i ClusterInventory,
    options: &Options,
) -> Result<(Vec<&'i BackupInfo>, LeftOut), Box<PlanError>> {
    let (mut backups, mut flagged): (Vec<&BackupInfo>, LeftOut) = (Vec::new(), Vec::new());
    for backup in &inventory.backups {
        match (options.backup, &backup.flagged) {
            (Some(label), _) if label != backup.label => {}
            (None, Some(why)) if !options.allow_flagged => {
                flagged.push((backup.label, format!("base backup {} is flagged: {why}", backup.label)));
            }
            _ => backups.push(backup),
        }
    }
    backups.sort_by_key(|backup| backup.label);
    if backups.is_empty() {
        let reason = match options.backup {
            Some(label) => format!("there is no complete base backup {label} of {}", inventory.id),
            None => format!("there is no complete base backup of {}", inventory.id),
        };
        let mut error = PlanError::new(NoKind::NoBackup, reason);
        error.hints.extend(flagged.into_iter().map(|(_, why)| why));
        if !inventory.unfinished_backups.is_empty() {
            let labels: Vec<String> = inventory.unfinished_backups.iter().map(|label| label.to_string()).collect();
            error.hints.push(format!("never finished: {}", labels.join(", ")));
        }
        return Err(Box::new(error));
    }
    Ok((backups, flagged))
}

/// The path to follow (`None`: every base backup's own), and other histories of its newest timeline.
fn choose_path(
    inventory: &ClusterInventory,
    options: &Options,
    backups: &[&BackupInfo],
) -> Result<(Option<Path>, Vec<Branch>), Box<PlanError>> {
    let chosen = match (options.timeline, backups.last()) {
        (TimelineChoice::Current | TimelineChoice::Latest, None) => return Ok((None, Vec::new())),
        (TimelineChoice::Current, Some(newest)) => {
            chain::named_path(inventory, newest.branch).map(|path| (path, Vec::new()))
        }
        (TimelineChoice::Latest, Some(newest)) => chain::latest_path(inventory, newest.branch),
        (TimelineChoice::Branch(branch), _) => chain::named_path(inventory, branch).map(|path| (path, Vec::new())),
        (TimelineChoice::Number(timeline), _) => {
            let branch = Branch::first(timeline);
            chain::named_path(inventory, branch).map(|path| (path, chain::rivals(inventory, branch)))
        }
    };
    let (path, rivals) = chosen.map_err(|why| {
        let (kind, reason) = match why {
            NoPath::Unknown(name) => (NoKind::UnknownTimeline, format!("there is no timeline {name} of {}", inventory.id)),
            NoPath::NoHistory(branch) => (
                NoKind::MissingHistory,
                format!(
                    "the history file of branch {branch} is not in the repository, so where it began is not known; name \
                     another one with --timeline"
                ),
            ),
        };
        let mut error = PlanError::new(kind, reason);
        error.branches = chain::known_branches(inventory);
        Box::new(error)
    })?;
    Ok((Some(path), rivals))
}

/// Which of the chains (by index, oldest first) are tried for a target, and in which order.
struct Order {
    tried: Vec<usize>,
    /// The oldest of those that lie wholly behind the target.
    nearest_after: Option<usize>,
}

fn order(usable: &[Chain], target: &Target) -> Order {
    let in_question = |chain: &Chain| match &target.point {
        Point::Time(instant) => {
            let latest = instant.checked_add(CLOCK_SKEW).unwrap_or(Timestamp::MAX);
            chain.base.started_at <= latest
        }
        Point::Lsn(lsn) => chain.base.start <= *lsn,
        Point::Xid(_) | Point::Name(_) | Point::Immediate | Point::Latest => true,
    };
    let mut tried: Vec<usize> = Vec::new();
    let mut nearest_after = None;
    for (index, chain) in usable.iter().enumerate() {
        match in_question(chain) {
            true => tried.push(index),
            false => nearest_after = nearest_after.or(Some(index)),
        }
    }
    if !matches!(target.point, Point::Name(_)) {
        tried.reverse();
    }
    Order { tried, nearest_after }
}

fn before_first(target: &Target, rejected: Vec<String>) -> PlanError {
    let reason = format!("{target} lies before the first base backup that leads there is consistent");
    let mut error = PlanError::new(NoKind::BeforeFirstBackup, reason);
    error.hints = rejected;
    error
}

fn no_chain(tip: &Option<Path>, rejected: Vec<String>) -> PlanError {
    let way = tip.as_ref().map(|path| format!(" on the way to {}", path.tip)).unwrap_or_default();
    let mut error = PlanError::new(NoKind::MissingWal, format!("no base backup{way} can be made consistent"));
    if let Some(last) = rejected.last() {
        error.reason.push_str(&format!(": {last}"));
    }
    error.hints = rejected;
    error
}

/// The place where a base backup is consistent.
fn consistent_point(chain: &Chain) -> Reachable {
    let BackupInfo { stopped_at, stop, branch, .. } = chain.base;
    Reachable { time: Some(stopped_at), lsn: stop, branch, to: stop.to_string() }
}

/// The end of a chain, as far as the inventory tells it.
fn held(inventory: &ClusterInventory, chain: &Chain) -> Reachable {
    let time = complete_until(inventory, chain);
    let to = if chain.limit == Limit::End { "latest".to_owned() } else { chain.held_to.to_string() };
    Reachable { time, lsn: chain.held_to, branch: chain.path.tip, to }
}

/// The server's clock when the newest range was received, if all that the server had written by then is in the chain.
fn complete_until(inventory: &ClusterInventory, chain: &Chain) -> Option<Timestamp> {
    let note = inventory.branches.get(&chain.path.tip)?.note_of_newest.as_ref()?;
    let (time, end) = (note.server_time?, note.server_end?);
    (end <= chain.held_to).then(|| time.to_timestamp())
}

fn need(stretch: &Stretch, size: SegmentSize) -> WalNeed {
    let segments = stretch.to.segment_before(size).get() + 1 - stretch.from.segment(size).get();
    WalNeed { branch: stretch.branch, from: stretch.from, to: stretch.to, segments }
}

/// How many objects hold the bytes of `need`, and their size: always the piece that reaches furthest.
fn cost(pieces: &[WalPiece], need: &WalNeed, size: SegmentSize) -> (u64, u64) {
    let (mut at, mut objects, mut stored) = (need.from, 0, 0u64);
    let mut best: Option<&WalPiece> = None;
    let mut pieces =
        pieces.iter().filter(|piece| piece.ends_at(size) > need.from && piece.begins_at(size) < need.to).peekable();
    while at < need.to {
        while let Some(piece) = pieces.next_if(|piece| piece.begins_at(size) <= at) {
            let further = |best: &WalPiece| (piece.ends_at(size), best.place) > (best.ends_at(size), piece.place);
            if best.is_none_or(further) {
                best = Some(piece);
            }
        }
        let Some(piece) = best.filter(|piece| piece.ends_at(size) > at) else { break };
        objects += 1;
        // A tail's file is preallocated: only what was written into it is read.
        stored = stored.saturating_add(piece.object_len.min(u64::from(piece.to).saturating_add(1 << 20)));
        at = piece.ends_at(size);
    }
    (objects, stored)
}

fn maximum(mut have: ServerParameters, met: &Parameters) -> ServerParameters {
    let at_least = |have: &mut u32, met: i32| *have = (*have).max(u32::try_from(met).unwrap_or(0));
    at_least(&mut have.max_connections, met.max_connections);
    at_least(&mut have.max_worker_processes, met.max_worker_processes);
    at_least(&mut have.max_wal_senders, met.max_wal_senders);
    at_least(&mut have.max_prepared_transactions, met.max_prepared_transactions);
    at_least(&mut have.max_locks_per_transaction, met.max_locks_per_transaction);
    have
}
