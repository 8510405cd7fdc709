//! Finds transactions and landmarks: in the indexes, and in the WAL itself where none is there.
//!
//! What always holds: what is found is what a walk through all the WAL would find, in its order. A transaction that wrote
//! in several ranges is put together from them before anything is asked of it; what is too far back is said
//! ([`Logged::reaches_back`]). An index that does not open is passed over and its WAL read instead; so is one of version 1 where
//! landmarks are wanted, which it does not tell.
//! Memory: [`KEPT`] indexes, and as many transactions as were asked for. Nothing is changed anywhere.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tokio::task::JoinSet;

use super::codec::{Entry, IndexFile};
use super::{IndexNote, IndexRange, range_end};
use crate::catalog::CatalogError;
use crate::catalog::inventory::{ClusterInventory, Stretch};
use crate::catalog::repository::Repository;
use crate::types::{Branch, Lsn, PgTimestamp, SegmentSize};
use crate::wal::{Changes, Kinds, Landmark, LandmarkKind, Part, Touched, is_newer, join, kinds};

/// Indexes that are kept in memory.
const KEPT: usize = 16;
/// Indexes that are read at the same time.
const AT_ONCE: usize = 8;
/// Notes that are read at the same time.
const NOTES_AT_ONCE: usize = 16;
/// How many ranges back the beginning of a transaction is sought.
const LOOK_BACK: usize = 64;
/// WAL without an index may hold ends this much outside of what its neighbours tell, in microseconds: commits are not
/// written in the order of their times.
const OUT_OF_ORDER: i64 = 600 * 1_000_000;

/// What is wanted. All that is set has to hold. Landmarks are of no transaction and touch nothing.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Those that ended nearest to this moment.
    pub around: Option<PgTimestamp>,
    /// Not before.
    pub from: Option<PgTimestamp>,
    /// Not after.
    pub to: Option<PgTimestamp>,
    /// This one, or the one that this subtransaction belonged to.
    pub xid: Option<u32>,
    /// Those that touched any of these.
    pub touched: Option<HashSet<Touched>>,
    /// Those that were any of these; `None`: of every kind, landmarks too.
    pub kinds: Option<Kinds>,
    /// Of restore points those of this name.
    pub name: Option<String>,
    /// Only what indexes tell: WAL without one is passed over ([`Found::unindexed`]).
    pub index_only: bool,
    /// Those that were rolled back, too.
    pub aborted: bool,
    /// So many at most: the earliest where `from` is set, the nearest to `around`, else the newest.
    pub limit: usize,
}

/// A transaction that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logged {
    /// What it did; it has an end.
    pub part: Part,
    /// What it was.
    pub kinds: Kinds,
    /// The branch whose objects tell of it.
    pub branch: Branch,
    /// It began further back than was looked: its counts, bytes and relations are those of the rest.
    pub reaches_back: bool,
}

/// A landmark that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// The record.
    pub landmark: Landmark,
    /// The branch whose objects tell of it.
    pub branch: Branch,
    /// Its own time; of a change of parameters, which has none, that of the last transaction that ended before it, if its
    /// index has one.
    pub time: Option<PgTimestamp>,
}

/// What was found.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// In the order of their ends.
    pub transactions: Vec<Logged>,
    /// By position.
    pub landmarks: Vec<Passed>,
    /// There are more than `limit`.
    pub more: bool,
    /// WAL whose index was there, in bytes, whether or not it had to be read.
    pub indexed: u64,
    /// Stretches of WAL on the way without an index that could be used, by position.
    pub unindexed: Vec<(Lsn, Lsn)>,
    /// Bytes of WAL that were read because no index was there.
    pub wal_read: u64,
    /// Bytes of indexes that were read, as they lie in the repository.
    pub index_read: u64,
    /// What could not be read, and why.
    pub remarks: Vec<String>,
}

/// A range of WAL on the way.
#[derive(Debug)]
struct Unit {
    branch: Branch,
    from: Lsn,
    to: Lsn,
    index: Option<IndexRange>,
    /// The stretches that belong together without a hole.
    run: Arc<Vec<Stretch>>,
    /// Whether the unit before it ends where it begins.
    follows: bool,
    note: Option<IndexNote>,
}

/// One thing that was found.
enum Item {
    Transaction(Box<Logged>),
    Landmark(Box<Passed>),
}

impl Item {
    fn at(&self) -> Lsn {
        match self {
            Self::Transaction(logged) => logged.part.end.as_ref().map_or(Lsn::ZERO, |end| end.start),
            Self::Landmark(passed) => passed.landmark.start,
        }
    }

    fn distance(&self, around: PgTimestamp) -> u64 {
        let time = match self {
            Self::Transaction(logged) => logged.part.end.as_ref().map(|end| end.time),
            Self::Landmark(passed) => passed.time,
        };
        time.map_or(u64::MAX, |time| time.micros().abs_diff(around.micros()))
    }
}

struct Search<'a> {
    repository: &'a Repository,
    inventory: &'a ClusterInventory,
    size: SegmentSize,
    query: &'a Query,
    units: Vec<Unit>,
    files: BTreeMap<usize, Arc<IndexFile>>,
    used: Vec<usize>,
    found: Found,
}

/// What an entry is by its pattern alone.
struct Judged {
    touches: bool,
    committed: Kinds,
    aborted: Kinds,
}

impl Repository {
    /// Finds transactions on the way to `tip`.
    ///
    /// # Errors
    /// What the store says. Damage is no error here: it is a remark.
    pub async fn search_log(
        &self,
        inventory: &ClusterInventory,
        tip: Branch,
        query: &Query,
    ) -> Result<Found, CatalogError> {
        let Some(size) = inventory.segment_size else { return Ok(Found::default()) };
        let units = units(self, inventory, tip, size).await?;
        let found =
            Found { indexed: units.iter().filter(|unit| unit.index.is_some()).map(length).sum(), ..Found::default() };
        let search =
            Search { repository: self, inventory, size, query, units, files: BTreeMap::new(), used: Vec::new(), found };
        search.run().await
    }
}

fn length(unit: &Unit) -> u64 {
    unit.to.bytes_since(unit.from).unwrap_or(0)
}

/// The way to `tip` in ranges, indexed where an index is there.
async fn units(
    repository: &Repository,
    inventory: &ClusterInventory,
    tip: Branch,
    size: SegmentSize,
) -> Result<Vec<Unit>, CatalogError> {
    let mut units: Vec<Unit> = Vec::new();
    let mut indexes: BTreeMap<Branch, Vec<IndexRange>> = BTreeMap::new();
    for run in runs(inventory, tip) {
        let run = Arc::new(run);
        for stretch in run.iter() {
            if let std::collections::btree_map::Entry::Vacant(entry) = indexes.entry(stretch.branch) {
                entry.insert(repository.list_indexes(&inventory.id, stretch.branch).await?);
            }
            let listed = indexes.get(&stretch.branch).map(Vec::as_slice).unwrap_or_default();
            let usable = |range: &&IndexRange| stretch.from <= range.from && range.to <= stretch.to;
            let mut at = stretch.from;
            while at < stretch.to {
                let longest =
                    listed.iter().filter(usable).filter(|range| range.from == at).max_by_key(|range| range.to);
                let next = listed.iter().filter(usable).map(|range| range.from).filter(|from| *from > at).min();
                let to = match longest {
                    Some(range) => range.to,
                    None => next.unwrap_or(stretch.to).min(stretch.to).min(range_end(at, size)),
                };
                let follows = units.last().is_some_and(|unit| unit.to == at);
                let (branch, index, run) = (stretch.branch, longest.cloned(), Arc::clone(&run));
                units.push(Unit { branch, from: at, to, index, run, follows, note: None });
                at = to;
            }
        }
    }
    Ok(units)
}

/// The WAL on the way to `tip`, in runs without holes.
fn runs(inventory: &ClusterInventory, tip: Branch) -> Vec<Vec<Stretch>> {
    let (Some(size), Some(path)) = (inventory.segment_size, inventory.path_of(tip)) else { return Vec::new() };
    let lineage = inventory.lineage_of(tip);
    let branches = path.path().into_iter().map(|(timeline, ..)| lineage.branch(timeline));
    let runs: Vec<_> =
        branches.filter_map(|branch| inventory.branches.get(&branch)).map(|held| held.runs(size)).collect();
    let begin = runs.iter().flatten().map(|run| run.from).min();
    let end = inventory.branches.get(&tip).and_then(|held| held.runs(size).last().map(|run| run.to));
    let (Some(mut at), Some(end)) = (begin, end) else { return Vec::new() };
    let mut found = Vec::new();
    while at < end {
        match inventory.covers_on(tip, &path, at, end) {
            Ok(stretches) => {
                found.push(stretches);
                break;
            }
            Err(hole) => {
                if let Ok(stretches) = inventory.covers_on(tip, &path, at, hole.from) {
                    found.push(stretches);
                }
                at = hole.to.max(at.advance(1)); // a hole has a byte at least, so this ends
            }
        }
    }
    found.retain(|stretches| !stretches.is_empty());
    found
}

impl Search<'_> {
    async fn run(mut self) -> Result<Found, CatalogError> {
        let limit = self.query.limit.max(1);
        let needs_times = self.query.around.is_some() || self.query.from.is_some() || self.query.to.is_some();
        if needs_times || self.query.xid.is_some() || !self.wants_transactions() {
            self.read_notes().await?;
        }
        let mut order: Vec<usize> = (0..self.units.len()).filter(|index| self.may_hold(*index)).collect();
        match (self.query.around, self.query.from) {
            (Some(_), _) => order.sort_by_key(|index| (self.distance(*index), *index)),
            (None, Some(_)) => {}
            (None, None) => order.reverse(),
        }
        let mut all: Vec<(u64, Item)> = Vec::new();
        let mut rest = order.as_slice();
        while let Some((index, later)) = rest.split_first() {
            if let Some(around) = self.query.around {
                let worst = all.last().map(|(distance, _)| *distance);
                if all.len() > limit && worst.is_some_and(|worst| self.distance(*index) > worst) {
                    break;
                }
                all.extend(self.matching(*index, rest).await?.into_iter().map(|item| (item.distance(around), item)));
                all.sort_by_key(|(distance, item)| (*distance, item.at()));
            } else {
                if all.len() > limit {
                    break;
                }
                all.extend(self.matching(*index, rest).await?.into_iter().map(|item| (0, item)));
                match self.query.from {
                    Some(_) => all.sort_by_key(|(_, item)| item.at()),
                    None => all.sort_by_key(|(_, item)| Reverse(item.at())),
                }
            }
            all.truncate(limit + 1); // one more tells that there are more
            rest = later;
        }
        self.found.more = all.len() > limit;
        all.truncate(limit);
        let without = self.units.iter().filter(|unit| unit.index.is_none());
        self.found.unindexed = without.map(|unit| (unit.from, unit.to)).collect();
        all.sort_by_key(|(_, item)| item.at());
        for (_, item) in all {
            match item {
                Item::Transaction(logged) => self.found.transactions.push(*logged),
                Item::Landmark(passed) => self.found.landmarks.push(*passed),
            }
        }
        Ok(self.found)
    }

    fn wants_transactions(&self) -> bool {
        self.query.name.is_none() && self.query.kinds.is_none_or(|kinds| kinds.meets(Kinds::OF_TRANSACTIONS))
    }

    /// Whether landmarks of this kind are wanted.
    fn wants(&self, kind: Kinds) -> bool {
        let Query { xid, touched, kinds, name, .. } = self.query;
        let is_named = name.is_none() || kind == Kinds::RESTORE_POINT;
        xid.is_none() && touched.is_none() && is_named && kinds.is_none_or(|kinds| kinds.meets(kind))
    }

    fn wants_landmarks(&self) -> bool {
        self.wants(Kinds::RESTORE_POINT) || self.wants(Kinds::PARAMETERS)
    }

    /// Whether a range may hold a landmark that is wanted.
    fn may_hold_landmark(&self, note: &IndexNote) -> bool {
        let any = |count: Option<u64>| count != Some(0);
        (self.wants(Kinds::RESTORE_POINT) && any(note.restore_points))
            || (self.wants(Kinds::PARAMETERS) && any(note.parameter_changes))
    }

    /// Reads what the indexes say about themselves.
    async fn read_notes(&mut self) -> Result<(), CatalogError> {
        let wanted: Vec<(usize, IndexRange)> =
            self.units.iter().enumerate().filter_map(|(at, unit)| Some((at, unit.index.clone()?))).collect();
        let repository = self.repository;
        for chunk in wanted.chunks(NOTES_AT_ONCE) {
            let notes = chunk.iter().map(|(at, range)| async move { (*at, repository.index_note(range).await) });
            for (at, note) in futures_util::future::join_all(notes).await {
                match note {
                    Ok(note) => {
                        if let Some(unit) = self.units.get_mut(at) {
                            unit.note = Some(note);
                        }
                    }
                    Err(error) => self.without_index(at, error)?,
                }
            }
        }
        Ok(())
    }

    /// An index that does not open: its WAL is read instead.
    fn without_index(&mut self, at: usize, error: CatalogError) -> Result<(), CatalogError> {
        if !error.is_damage() && !error.is_not_found() {
            return Err(error);
        }
        self.found.remarks.push(format!("an index is not used: {error}"));
        self.leave_index(at);
        Ok(())
    }

    fn leave_index(&mut self, at: usize) {
        if let Some(unit) = self.units.get_mut(at) {
            self.found.indexed = self.found.indexed.saturating_sub(length(unit));
            unit.index = None;
        }
    }

    /// An index of version 1 where landmarks are wanted.
    fn without_landmarks(&mut self, at: usize) {
        const REMARK: &str = "an index of an older version does not tell restore points and parameters: its WAL is read instead \
                              (`pgkeep index rebuild --all` makes it anew)";
        if self.found.remarks.iter().all(|remark| remark != REMARK) {
            self.found.remarks.push(REMARK.to_owned());
        }
        self.leave_index(at);
    }

    /// The earliest and the latest end that a unit may hold; `None` for an index in which nothing ended.
    fn times(&self, at: usize) -> Option<(PgTimestamp, PgTimestamp)> {
        let unit = self.units.get(at)?;
        if let Some(note) = unit.note.as_ref().filter(|_| unit.index.is_some()) {
            let times = note.first_time.zip(note.last_time);
            // Parameters alone have no time: it is that of the ranges around.
            if times.is_some() || !(self.wants(Kinds::PARAMETERS) && note.parameter_changes != Some(0)) {
                return times;
            }
        }
        let known = |unit: &Unit| unit.note.as_ref().and_then(|note| note.first_time.zip(note.last_time));
        let before = self.units.get(..at).unwrap_or_default().iter().rev().find_map(known);
        let after = self.units.get(at + 1..).unwrap_or_default().iter().find_map(known);
        let from = before.map_or(i64::MIN, |(_, last)| last.micros().saturating_sub(OUT_OF_ORDER));
        let to = after.map_or(i64::MAX, |(first, _)| first.micros().saturating_add(OUT_OF_ORDER));
        Some((PgTimestamp::new(from), PgTimestamp::new(to)))
    }

    fn may_hold(&self, at: usize) -> bool {
        let Some(unit) = self.units.get(at) else { return false };
        if let (Some(xid), Some(note)) = (self.query.xid, &unit.note) {
            let within = |low: u32, high: u32| low <= xid && xid <= high;
            if !note.lowest_xid.zip(note.highest_xid).is_some_and(|(low, high)| within(low, high)) {
                return false;
            }
        }
        if let (false, Some(note), true) = (self.wants_transactions(), &unit.note, unit.index.is_some())
            && !self.may_hold_landmark(note)
        {
            return false;
        }
        if self.query.from.is_none() && self.query.to.is_none() {
            return true;
        }
        self.times(at).is_some_and(|(first, last)| {
            self.query.from.is_none_or(|from| last >= from) && self.query.to.is_none_or(|to| first <= to)
        })
    }

    fn distance(&self, at: usize) -> u64 {
        let Some(around) = self.query.around else { return 0 };
        match self.times(at) {
            None => u64::MAX,
            Some((first, last)) if first <= around && around <= last => 0,
            Some((first, last)) => {
                first.micros().abs_diff(around.micros()).min(last.micros().abs_diff(around.micros()))
            }
        }
    }

    /// A unit's index. `coming`: the units that will be asked for next.
    async fn load(&mut self, at: usize, coming: &[usize]) -> Result<Arc<IndexFile>, CatalogError> {
        self.used.retain(|used| *used != at);
        self.used.push(at);
        if let Some(file) = self.files.get(&at) {
            return Ok(Arc::clone(file));
        }
        let mut reading = JoinSet::new();
        let ahead =
            coming.iter().copied().filter(|next| *next != at && !self.files.contains_key(next)).take(AT_ONCE - 1);
        let wanted: Vec<usize> = std::iter::once(at).chain(ahead).collect();
        for wanted in wanted {
            let Some(range) = self.units.get(wanted).and_then(|unit| unit.index.clone()) else { continue };
            let repository = self.repository.clone();
            reading.spawn(async move { (wanted, range.object_len, repository.get_index(&range).await) });
        }
        while let Some(read) = reading.join_next().await {
            let Ok((read, len, file)) = read else { continue }; // a task that ended abnormally: the WAL is read instead
            self.found.index_read += len;
            match file {
                Ok(file) if file.landmarks.is_none() && self.wants_landmarks() => self.without_landmarks(read),
                Ok(file) => self.keep(read, Arc::new(file)),
                Err(error) => self.without_index(read, error)?,
            }
        }
        if let Some(file) = self.files.get(&at) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(self.read_wal(at).await?);
        self.keep(at, Arc::clone(&file));
        Ok(file)
    }

    fn keep(&mut self, at: usize, file: Arc<IndexFile>) {
        self.used.retain(|used| *used != at);
        self.used.push(at);
        while self.files.len() >= KEPT {
            let oldest = self.used.iter().copied().find(|used| self.files.contains_key(used));
            match oldest.or_else(|| self.files.keys().next().copied()) {
                Some(oldest) => self.files.remove(&oldest),
                None => break,
            };
            self.used.retain(|used| Some(*used) != oldest);
        }
        self.files.insert(at, file);
    }

    /// The index that a unit would have.
    async fn read_wal(&mut self, at: usize) -> Result<IndexFile, CatalogError> {
        let misuse = |reason: &str| CatalogError::Misuse { name: "an index".to_owned(), reason: reason.to_owned() };
        let (from, to, run) = match self.units.get(at) {
            Some(unit) => (unit.from, unit.to, Arc::clone(&unit.run)),
            None => return Err(misuse("there is no such range")), // invariant: units are not taken away
        };
        if self.query.index_only {
            let (bytes, _) = super::IndexWriter::new(from).finish(to, 0, None);
            return IndexFile::read(bytes).map_err(|error| misuse(&error.to_string()));
        }
        if !self.repository.can_read() {
            let key = "the key of this repository cannot open WAL";
            self.found.remarks.push(format!("from {from} to {to} there is no index, and {key}"));
            let (bytes, _) = super::IndexWriter::new(from).finish(to, 0, None);
            return IndexFile::read(bytes).map_err(|error| misuse(&error.to_string()));
        }
        let made = self.repository.index_from_wal(self.inventory, &run, (from, to), self.size).await?;
        self.found.wal_read += made.read;
        if let Some(lacks) = made.lacks.filter(|_| !made.at_end) {
            self.found.remarks.push(format!("from {from} to {to} not all of the WAL can be read: {lacks}"));
        }
        let (bytes, note) = made.indexed;
        if let Some(unit) = self.units.get_mut(at) {
            unit.note = Some(note);
        }
        IndexFile::read(bytes).map_err(|error| misuse(&error.to_string()))
    }

    /// The newest transaction that wrote before a unit, in what belongs to it without a hole.
    async fn newest_before(&mut self, at: usize) -> Result<Option<u32>, CatalogError> {
        let mut at = at;
        while self.units.get(at).is_some_and(|unit| unit.follows) && at > 0 {
            at -= 1;
            let newest = match self.units.get(at).and_then(|unit| unit.note.as_ref()) {
                Some(note) => note.newest_xid,
                None => {
                    if let Some(range) = self.units.get(at).and_then(|unit| unit.index.clone()) {
                        match self.repository.index_note(&range).await {
                            Ok(note) => {
                                let newest = note.newest_xid;
                                if let Some(unit) = self.units.get_mut(at) {
                                    unit.note = Some(note);
                                }
                                newest
                            }
                            Err(error) => {
                                self.without_index(at, error)?;
                                self.load(at, &[]).await?;
                                self.units.get(at).and_then(|unit| unit.note.as_ref()).and_then(|note| note.newest_xid)
                            }
                        }
                    } else {
                        self.load(at, &[]).await?;
                        self.units.get(at).and_then(|unit| unit.note.as_ref()).and_then(|note| note.newest_xid)
                    }
                }
            };
            if newest.is_some() {
                return Ok(newest);
            }
        }
        Ok(None)
    }

    /// What is wanted of a unit.
    async fn matching(&mut self, at: usize, coming: &[usize]) -> Result<Vec<Item>, CatalogError> {
        let file = self.load(at, coming).await?;
        let Some(branch) = self.units.get(at).map(|unit| unit.branch) else { return Ok(Vec::new()) };
        let mut items: Vec<Item> =
            self.landmarks_of(&file, branch).map(|passed| Item::Landmark(Box::new(passed))).collect();
        if file.landmarks_left_out > 0 && self.wants_landmarks() {
            let (from, to, more) = (file.from, file.to, file.landmarks_left_out);
            self.found.remarks.push(format!("from {from} to {to} there are {more} landmarks more than an index keeps"));
        }
        if self.wants_transactions() {
            let transactions = self.transactions_of(at, &file, branch).await?;
            items.extend(transactions.into_iter().map(|logged| Item::Transaction(Box::new(logged))));
        }
        Ok(items)
    }

    fn landmarks_of<'f>(&self, file: &'f IndexFile, branch: Branch) -> impl Iterator<Item = Passed> + use<'f, '_> {
        let Query { from, to, name, .. } = self.query;
        let (points, parameters) = (self.wants(Kinds::RESTORE_POINT), self.wants(Kinds::PARAMETERS));
        let within = move |time: Option<PgTimestamp>| match time {
            Some(time) => from.is_none_or(|from| time >= from) && to.is_none_or(|to| time <= to),
            None => from.is_none() && to.is_none(),
        };
        file.landmarks.iter().flatten().filter_map(move |landmark| {
            let (is_wanted, time) = match &landmark.what {
                LandmarkKind::RestorePoint { name: its, time } => {
                    (points && name.as_ref().is_none_or(|name| name == its), Some(*time))
                }
                LandmarkKind::Parameters(_) => (parameters, time_before(file, landmark.start)),
            };
            (is_wanted && within(time)).then(|| Passed { landmark: landmark.clone(), branch, time })
        })
    }

    async fn transactions_of(
        &mut self,
        at: usize,
        file: &IndexFile,
        branch: Branch,
    ) -> Result<Vec<Logged>, CatalogError> {
        let newest_before = self.newest_before(at).await?;
        let judged: Vec<Judged> = file.patterns.iter().map(|pattern| self.judge(&pattern.touched)).collect();
        let (mut found, mut split) = (Vec::new(), Vec::new());
        for entry in file.ended() {
            let Ok(entry) = entry else { break };
            if !self.is_asked_for(&entry) {
                continue;
            }
            if newest_before.is_some_and(|newest| !is_newer(entry.part.xid, newest)) {
                split.push(file.part(&entry));
                continue;
            }
            let aborted = entry.part.end.as_ref().is_some_and(|end| end.aborted);
            let is_wanted = judged.get(entry.pattern).is_some_and(|judged| {
                let kinds = if aborted { judged.aborted } else { judged.committed };
                judged.touches && self.query.kinds.is_none_or(|wanted| wanted.meets(kinds))
            });
            if is_wanted {
                let part = file.part(&entry);
                let kinds = kinds(&part);
                found.push(Logged { part, kinds, branch, reaches_back: false });
            }
        }
        for (part, reaches_back) in self.put_together(at, split).await? {
            let (judged, kinds) = (self.judge(&part.touched), kinds(&part));
            if judged.touches && self.query.kinds.is_none_or(|wanted| wanted.meets(kinds)) {
                found.push(Logged { part, kinds, branch, reaches_back });
            }
        }
        Ok(found)
    }

    fn judge(&self, touched: &[(Touched, Changes)]) -> Judged {
        let touches = |wanted: &HashSet<Touched>| touched.iter().any(|(what, _)| wanted.contains(what));
        let mut part = Part::of(touched.to_vec());
        let committed = kinds(&part);
        part.end = Some(crate::wal::End::aborted());
        Judged { touches: self.query.touched.as_ref().is_none_or(touches), committed, aborted: kinds(&part) }
    }

    /// What needs no knowledge of what it touched.
    fn is_asked_for(&self, entry: &Entry) -> bool {
        let Some(end) = &entry.part.end else { return false };
        let Query { from, to, xid, .. } = self.query;
        (self.query.aborted || !end.aborted)
            && from.is_none_or(|from| end.time >= from)
            && to.is_none_or(|to| end.time <= to)
            && xid.is_none_or(|xid| entry.part.xid == xid || end.subxids.contains(&xid))
    }

    /// Adds what transactions did in earlier ranges. Whether each reaches further back than was looked.
    async fn put_together(&mut self, at: usize, parts: Vec<Part>) -> Result<Vec<(Part, bool)>, CatalogError> {
        let mut done = Vec::with_capacity(parts.len());
        let mut open: Vec<(Part, Vec<Part>)> = parts.into_iter().map(|part| (part, Vec::new())).collect();
        let (mut at, mut steps) = (at, 0);
        while !open.is_empty() {
            let newest = self.newest_before(at).await?;
            let goes_on = self.units.get(at).is_some_and(|unit| unit.follows) && at > 0;
            let is_over = |part: &Part| !goes_on || newest.is_none_or(|newest| is_newer(part.xid, newest));
            let (over, pending): (Vec<_>, Vec<_>) = open.into_iter().partition(|(part, _)| is_over(part));
            done.extend(over.into_iter().map(|pair| (pair, false)));
            open = pending;
            if open.is_empty() {
                break;
            }
            if steps == LOOK_BACK {
                done.extend(open.drain(..).map(|pair| (pair, true)));
                break;
            }
            (at, steps) = (at - 1, steps + 1); // invariant: `goes_on`
            let file = self.load(at, &[]).await?;
            for entry in file.open() {
                let Ok(entry) = entry else { break };
                let belongs = |part: &Part| {
                    let subxids = part.end.as_ref().map(|end| end.subxids.as_slice()).unwrap_or_default();
                    part.xid == entry.part.xid || subxids.contains(&entry.part.xid)
                };
                if let Some((_, earlier)) = open.iter_mut().find(|(part, _)| belongs(part)) {
                    earlier.push(file.part(&entry));
                }
            }
        }
        let join = |((mut part, earlier), reaches_back): ((Part, Vec<Part>), bool)| {
            join(&mut part, &earlier);
            (part, reaches_back)
        };
        Ok(done.into_iter().map(join).collect())
    }
}

/// When the last transaction before a position ended; where none did, the first one after it.
fn time_before(file: &IndexFile, at: Lsn) -> Option<PgTimestamp> {
    let ends = || file.ended().filter_map(Result::ok).filter_map(|entry| entry.part.end);
    let before = ends().take_while(|end| end.start < at).last();
    before.or_else(|| ends().next()).map(|end| end.time)
}
