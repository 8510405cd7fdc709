//! What each transaction did, folded from records as they come: which relations it touched and how, how much WAL it wrote,
//! when and how it ended; and [`Landmark`]s: restore points and changes of parameters, which belong to no transaction.
//!
//! What always holds: a summary depends on the records alone, not on how their bytes were sliced. A transaction that began
//! before the first record, or goes on after the last one, has a [`Part`] on either side; [`join`] makes one of them.
//! Counts are those of records: rows that were inserted, updated, deleted. What only cleans up (pruning, freezing, hint
//! bits) or maintains indexes is counted as bytes and nothing else, because it is stamped with the xid of whoever came by.
//! Memory: at most [`OPEN_MAX`] open transactions, subtransactions among them, with at most [`TOUCHED_MAX`] relations
//! each; what is beyond is counted and said ([`Part::others`], [`Part::incomplete`]).

use std::collections::HashMap;

use super::error::WalDamage;
use super::page::{u16_at, u32_at};
use super::record::{Fork, Record, RelFile, rmgr};
use super::transaction::{Fact, PARAMETER_CHANGE, Parameters, RESTORE_POINT, dropped_relations, fact};
use crate::types::{Lsn, PgTimestamp};

/// Relations that are told apart within one transaction.
pub const TOUCHED_MAX: usize = 256;
/// Transactions and subtransactions that are followed at the same time.
pub const OPEN_MAX: usize = 1 << 16;

/// The first OID that `initdb` does not give: relations below are PostgreSQL's own, unless they were rewritten.
pub const FIRST_USER_OID: u32 = 16_384;
/// `pg_class`, by the number its file has until somebody rewrites it.
const PG_CLASS: u32 = 1259;
/// Catalogs that change without anybody defining anything: large objects, and what ANALYZE writes, with their TOAST.
const NO_DDL: [u32; 7] = [2613, 2995, 2619, 2840, 3429, 3430, 6106];

/// What a transaction touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Touched {
    /// A relation's files.
    File(RelFile),
    /// A relation by its OID, which stays when its files change. Told by exclusive locks, and by TRUNCATE at
    /// `wal_level = logical`.
    Relation {
        /// OID of its database.
        database: u32,
        /// Its own.
        oid: u32,
    },
    /// A database, by its OID.
    Database(u32),
    /// A tablespace, by its OID.
    Tablespace(u32),
}

/// Bits of [`Changes::marks`].
pub mod marks {
    /// Its files were created.
    pub const CREATED: u8 = 1;
    /// Its files went with the commit.
    pub const DROPPED: u8 = 2;
    /// Pages were written that are no rows: what building an index or rewriting a table does.
    pub const PAGES: u8 = 4;
    /// It was truncated, as the record of logical decoding says.
    pub const TRUNCATED: u8 = 8;
    /// It was locked so that nobody could even read it.
    pub const LOCKED: u8 = 16;
}

/// What was done to a relation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Changes {
    /// Rows.
    pub inserts: u64,
    /// Rows.
    pub updates: u64,
    /// Rows.
    pub deletes: u64,
    /// Bits of [`marks`].
    pub marks: u8,
}

impl Changes {
    fn add(&mut self, other: &Changes) {
        self.inserts = self.inserts.saturating_add(other.inserts);
        self.updates = self.updates.saturating_add(other.updates);
        self.deletes = self.deletes.saturating_add(other.deletes);
        self.marks |= other.marks;
    }

    /// Whether all these marks are set.
    pub fn is(&self, marks: u8) -> bool {
        self.marks & marks == marks
    }

    /// Rows that were changed.
    pub fn rows(&self) -> u64 {
        self.inserts.saturating_add(self.updates).saturating_add(self.deletes)
    }
}

/// How and where a transaction ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Start of the record that ended it.
    pub start: Lsn,
    /// Where the next record may begin.
    pub end: Lsn,
    /// When, by the server's clock.
    pub time: PgTimestamp,
    /// Rolled back: a subtransaction that was rolled back has a record of its own, too.
    pub aborted: bool,
    /// It was a prepared transaction.
    pub prepared: bool,
    /// Subtransactions that ended with it.
    pub subxids: Vec<u32>,
}

impl End {
    /// A rollback of which nothing else is known.
    pub fn aborted() -> End {
        let time = PgTimestamp::new(0);
        End { start: Lsn::ZERO, end: Lsn::ZERO, time, aborted: true, prepared: false, subxids: Vec::new() }
    }
}

/// What one transaction did within a stretch of WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The transaction; in a part without an end perhaps a subtransaction.
    pub xid: u32,
    /// Start of its first record here.
    pub first: Lsn,
    /// Bytes of its records here, without padding and page headers.
    pub bytes: u64,
    /// What it touched, in order.
    pub touched: Vec<(Touched, Changes)>,
    /// Changes to relations that were too many to tell apart.
    pub others: u64,
    /// Records before its end could not be followed: too much went on at once.
    pub incomplete: bool,
    /// Its first record whose effect does not wait for the commit: files of a database or tablespace that are gone.
    pub early: Option<Lsn>,
    /// `None`: it goes on.
    pub end: Option<End>,
}

impl Part {
    fn new(xid: u32, first: Lsn) -> Part {
        Part { xid, first, bytes: 0, touched: Vec::new(), others: 0, incomplete: false, early: None, end: None }
    }

    /// A part of which only what it touched is known.
    pub fn of(touched: Vec<(Touched, Changes)>) -> Part {
        Part { touched, ..Part::new(0, Lsn::ZERO) }
    }

    fn touch(&mut self, what: Touched, changes: &Changes) {
        let is_full = self.touched.len() >= TOUCHED_MAX;
        match self.touched.iter_mut().rev().find(|(known, _)| *known == what) {
            Some((_, sum)) => sum.add(changes),
            None if !is_full => self.touched.push((what, *changes)),
            None => self.others = self.others.saturating_add(1),
        }
    }

    fn mark(&mut self, what: Touched, marks: u8) {
        self.touch(what, &Changes { marks, ..Changes::default() });
    }

    fn take_over(&mut self, other: &Part) {
        self.first = self.first.min(other.first);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.others = self.others.saturating_add(other.others);
        self.incomplete |= other.incomplete;
        self.early = match (self.early, other.early) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        for (what, changes) in &other.touched {
            self.touch(*what, changes);
        }
    }

    /// Where replay has to stop so that nothing of it is seen: before the record that ends it, or before the first one whose
    /// effect does not wait for that. `None`: it has not ended.
    pub fn stop_before(&self) -> Option<Lsn> {
        let end = self.end.as_ref()?;
        Some(self.early.map_or(end.start, |early| early.min(end.start)))
    }
}

/// Adds to a part with an end what earlier stretches of WAL tell of the same transaction and its subtransactions.
pub fn join<'a>(ended: &mut Part, earlier: impl IntoIterator<Item = &'a Part>) {
    for part in earlier {
        ended.take_over(part);
    }
    ended.touched.sort_unstable_by_key(|(what, _)| *what);
}

/// Whether a summary wants records of this kind: the filter for [`super::Decoder::only`]. Messages to logical decoding
/// can be a gigabyte long and say nothing of relations: they are passed over, and their bytes are not counted.
pub fn may_be_summarized(rmgr: u8, _info: u8) -> bool {
    rmgr != rmgr::LOGICALMSG
}

/// A record that ends no transaction, and that people and plans look for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Landmark {
    /// Its first byte.
    pub start: Lsn,
    /// Where the next record may begin.
    pub end: Lsn,
    /// What it says.
    pub what: LandmarkKind,
}

/// What a landmark says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LandmarkKind {
    /// `pg_create_restore_point`. Names may repeat.
    RestorePoint {
        /// As in [`Fact::RestorePoint`].
        name: String,
        /// When, by the server's clock.
        time: PgTimestamp,
    },
    /// Settings that a restored server must not have lower. The record has no time.
    Parameters(Parameters),
}

/// Folds records into parts of transactions.
#[derive(Debug, Default)]
pub struct Summarizer {
    open: HashMap<u32, Part>,
    ended: Vec<Part>,
    landmarks: Vec<Landmark>,
    /// The greatest xid in the order in which they are given, which wraps.
    newest: Option<u32>,
}

/// Whether `xid` was given after `other`: numbers wrap.
pub fn is_newer(xid: u32, other: u32) -> bool {
    xid != other && xid.wrapping_sub(other) < 1 << 31
}

// HEAP and HEAP2 records: `info & 0x70`.
const HEAP_MASK: u8 = 0x70;
const HEAP_INSERT: u8 = 0x00;
const HEAP_DELETE: u8 = 0x10;
const HEAP_UPDATE: u8 = 0x20;
const HEAP_TRUNCATE: u8 = 0x30;
const HEAP_HOT_UPDATE: u8 = 0x40;
const HEAP2_MULTI_INSERT: u8 = 0x50;
const SMGR_CREATE: u8 = 0x10;
const TBLSPC_CREATE: u8 = 0x00;
const TBLSPC_DROP: u8 = 0x10;
const STANDBY_LOCK: u8 = 0x00;
const XLOG_FPI: u8 = 0xB0;
const INFO_MASK: u8 = 0xF0;

impl Summarizer {
    /// Nothing yet.
    pub fn new() -> Summarizer {
        Summarizer::default()
    }

    /// The next record, in order.
    ///
    /// # Errors
    /// A record whose checksum was right and whose content is not: nothing of it was taken.
    pub fn push(&mut self, record: &Record<'_>) -> Result<(), WalDamage> {
        if record.rmgr == rmgr::XACT
            && let Some(fact) = fact(record)?
        {
            return self.push_end(record, fact);
        }
        if record.rmgr == rmgr::XLOG && matches!(record.info & INFO_MASK, RESTORE_POINT | PARAMETER_CHANGE) {
            let what = match fact(record)? {
                Some(Fact::RestorePoint { name, time }) => Some(LandmarkKind::RestorePoint { name, time }),
                Some(Fact::ParameterChange(parameters)) => Some(LandmarkKind::Parameters(parameters)),
                _ => None,
            };
            self.landmarks.extend(what.map(|what| Landmark { start: record.start, end: record.end, what }));
        }
        if record.xid == 0 {
            return Ok(());
        }
        let mut seen = Seen::default();
        seen.read(record)?;
        self.saw(record.xid);
        let Some(part) = self.part(record) else { return Ok(()) };
        part.bytes = part.bytes.saturating_add(record.total_len() as u64);
        if let Some((what, changes)) = &seen.touched {
            part.touch(*what, changes);
        }
        for what in seen.more {
            part.mark(what, seen.more_mark);
        }
        if let Some(file) = seen.pages {
            let created = |(what, changes): &(Touched, Changes)| {
                *what == Touched::File(file) && (changes.is(marks::CREATED) || changes.is(marks::PAGES))
            };
            if seen.is_full_page || part.touched.iter().any(created) {
                part.mark(Touched::File(file), marks::PAGES);
            }
        }
        if seen.is_early {
            part.early.get_or_insert(record.start);
        }
        Ok(())
    }

    /// Transactions that ended since they were last taken, in the order of their ends.
    pub fn take_ended(&mut self) -> Vec<Part> {
        std::mem::take(&mut self.ended)
    }

    /// Landmarks since they were last taken, in order.
    pub fn take_landmarks(&mut self) -> Vec<Landmark> {
        std::mem::take(&mut self.landmarks)
    }

    /// The transactions that go on, by xid; forgets them, and everything else.
    pub fn take_open(&mut self) -> Vec<Part> {
        let mut open: Vec<Part> = std::mem::take(&mut self.open).into_values().collect();
        open.iter_mut().for_each(|part| part.touched.sort_unstable_by_key(|(what, _)| *what));
        open.sort_unstable_by_key(|part| part.xid);
        self.newest = None;
        open
    }

    /// The newest xid seen since [`Summarizer::take_open`]: whatever is newer wrote nothing here.
    pub fn newest_xid(&self) -> Option<u32> {
        self.newest
    }

    fn saw(&mut self, xid: u32) {
        if xid != 0 && self.newest.is_none_or(|newest| is_newer(xid, newest)) {
            self.newest = Some(xid);
        }
    }

    /// The part of a record's transaction; `None` where there are too many.
    fn part(&mut self, record: &Record<'_>) -> Option<&mut Part> {
        if self.open.len() >= OPEN_MAX && !self.open.contains_key(&record.xid) {
            return None;
        }
        Some(self.open.entry(record.xid).or_insert_with(|| Part::new(record.xid, record.start)))
    }

    fn push_end(&mut self, record: &Record<'_>, fact: Fact) -> Result<(), WalDamage> {
        let (xid, time, subxids, prepared, aborted) = match fact {
            Fact::Commit { xid, time, subxids, prepared } => (xid, time, subxids, prepared, false),
            Fact::Abort { xid, time, subxids, prepared } => (xid, time, subxids, prepared, true),
            _ => return Ok(()),
        };
        let dropped = dropped_relations(record)?;
        self.saw(xid);
        subxids.iter().for_each(|sub| self.saw(*sub));
        let crowded = self.open.len() >= OPEN_MAX;
        let known = self.open.remove(&xid);
        let mut part = known.unwrap_or_else(|| Part { incomplete: crowded, ..Part::new(xid, record.start) });
        for sub in &subxids {
            if let Some(sub) = self.open.remove(sub) {
                part.take_over(&sub);
            }
        }
        part.bytes = part.bytes.saturating_add(record.total_len() as u64);
        for file in dropped {
            part.mark(Touched::File(file), marks::DROPPED);
        }
        part.touched.sort_unstable_by_key(|(what, _)| *what);
        part.end = Some(End { start: record.start, end: record.end, time, aborted, prepared, subxids });
        self.ended.push(part);
        Ok(())
    }
}

/// What one record tells of its transaction.
#[derive(Default)]
struct Seen {
    touched: Option<(Touched, Changes)>,
    /// Locked or truncated, by OID.
    more: Vec<Touched>,
    more_mark: u8,
    /// A file of which a page was written by something that is no row.
    pages: Option<RelFile>,
    is_full_page: bool,
    is_early: bool,
}

impl Seen {
    fn read(&mut self, record: &Record<'_>) -> Result<(), WalDamage> {
        let mut first = None;
        let data = record.each_relation(|_, relation, fork| {
            if first.is_none() && fork == Fork::Main {
                first = Some(relation);
            }
        })?;
        let fault = |what| WalDamage::Content { at: record.start, what };
        let short = || fault("its data is too short");
        let oid = |at: usize| u32_at(data, at).ok_or_else(short);
        let one = |changes: Changes| first.map(|relation| (Touched::File(relation), changes));
        let marked = |what, marks| Some((what, Changes { marks, ..Changes::default() }));
        match (record.rmgr, record.info & INFO_MASK) {
            (rmgr::HEAP, info) => match info & HEAP_MASK {
                HEAP_INSERT => self.touched = one(Changes { inserts: 1, ..Changes::default() }),
                HEAP_DELETE => self.touched = one(Changes { deletes: 1, ..Changes::default() }),
                HEAP_UPDATE | HEAP_HOT_UPDATE => self.touched = one(Changes { updates: 1, ..Changes::default() }),
                HEAP_TRUNCATE => {
                    let (database, relations) = (oid(0)?, oid(4)? as usize);
                    let list = data.get(12..).unwrap_or_default().chunks_exact(4).take(relations);
                    let oids = list.filter_map(|entry| u32_at(entry, 0));
                    self.more = oids.map(|oid| Touched::Relation { database, oid }).collect();
                    self.more_mark = marks::TRUNCATED;
                }
                _ => {}
            },
            (rmgr::HEAP2, info) if info & HEAP_MASK == HEAP2_MULTI_INSERT => {
                let inserts = u64::from(u16_at(data, 2).ok_or_else(short)?);
                self.touched = one(Changes { inserts, ..Changes::default() });
            }
            (rmgr::SMGR, SMGR_CREATE) if oid(12)? == 0 => {
                let file = RelFile { tablespace: oid(0)?, database: oid(4)?, number: oid(8)? };
                self.touched = marked(Touched::File(file), marks::CREATED);
            }
            (rmgr::DBASE, info) if info == record.format.drop_database => {
                self.touched = marked(Touched::Database(oid(0)?), marks::DROPPED);
                self.is_early = true;
            }
            (rmgr::DBASE, info) if info < record.format.drop_database => {
                self.touched = marked(Touched::Database(oid(0)?), marks::CREATED);
            }
            (rmgr::TBLSPC, TBLSPC_CREATE) => self.touched = marked(Touched::Tablespace(oid(0)?), marks::CREATED),
            (rmgr::TBLSPC, TBLSPC_DROP) => {
                self.touched = marked(Touched::Tablespace(oid(0)?), marks::DROPPED);
                self.is_early = true;
            }
            (rmgr::STANDBY, STANDBY_LOCK) => {
                let list = data.get(4..).unwrap_or_default().chunks_exact(12).take(oid(0)? as usize);
                let lock = |entry| Some(Touched::Relation { database: u32_at(entry, 4)?, oid: u32_at(entry, 8)? });
                self.more = list.filter_map(lock).collect();
                self.more_mark = marks::LOCKED;
            }
            (rmgr::HEAP2 | rmgr::XACT, _) => {}
            (other, info) => {
                self.pages = first;
                self.is_full_page = other == rmgr::XLOG && info == XLOG_FPI;
                if other == rmgr::XLOG && !self.is_full_page {
                    self.pages = None; // a hint bit, written by whoever read the page
                }
            }
        }
        Ok(())
    }
}

/// What a transaction was, or what a landmark is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Kinds(u16);

impl Kinds {
    /// Every kind with its name, in the order in which they are shown.
    pub const ALL: [(&'static str, Kinds); 11] = [
        ("drop", Kinds(1)),
        ("truncate", Kinds(2)),
        ("rewrite", Kinds(4)),
        ("create", Kinds(8)),
        ("ddl", Kinds(16)),
        ("insert", Kinds(32)),
        ("update", Kinds(64)),
        ("delete", Kinds(128)),
        ("aborted", Kinds(256)),
        ("restore-point", Kinds(512)),
        ("parameters", Kinds(1024)),
    ];
    /// Those of transactions.
    pub const OF_TRANSACTIONS: Kinds = Kinds(511);
    /// Files or a database are gone.
    pub const DROP: Kinds = Kinds(1);
    /// A table was emptied by TRUNCATE.
    pub const TRUNCATE: Kinds = Kinds(2);
    /// A table was written anew.
    pub const REWRITE: Kinds = Kinds(4);
    /// Something was made.
    pub const CREATE: Kinds = Kinds(8);
    /// Definitions changed.
    pub const DDL: Kinds = Kinds(16);
    /// Rows were inserted.
    pub const INSERT: Kinds = Kinds(32);
    /// Rows were updated.
    pub const UPDATE: Kinds = Kinds(64);
    /// Rows were deleted.
    pub const DELETE: Kinds = Kinds(128);
    /// Rolled back.
    pub const ABORTED: Kinds = Kinds(256);
    /// No transaction: a restore point.
    pub const RESTORE_POINT: Kinds = Kinds(512);
    /// No transaction: a change of parameters.
    pub const PARAMETERS: Kinds = Kinds(1024);

    /// The kind of this name.
    pub fn named(name: &str) -> Option<Kinds> {
        Kinds::ALL.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind)
    }

    /// Both.
    #[must_use]
    pub fn and(self, other: Kinds) -> Kinds {
        Kinds(self.0 | other.0)
    }

    /// Whether they share a kind.
    pub fn meets(self, other: Kinds) -> bool {
        self.0 & other.0 != 0
    }

    /// The names of what it was.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Kinds::ALL.iter().filter(move |(_, kind)| self.meets(*kind)).map(|(name, _)| *name)
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn set(&mut self, kind: Kinds, if_so: bool) {
        if if_so {
            self.0 |= kind.0;
        }
    }
}

impl Touched {
    /// PostgreSQL's own catalogs. Of a relation that is known by its OID the same holds.
    pub fn is_catalog(&self) -> bool {
        match self {
            Touched::File(file) => file.number < FIRST_USER_OID,
            Touched::Relation { oid, .. } => *oid < FIRST_USER_OID,
            Touched::Database(_) | Touched::Tablespace(_) => false,
        }
    }
}

/// What a transaction was, as far as its records tell.
///
/// TRUNCATE, a rewriting ALTER TABLE or VACUUM FULL, and DROP all end with files that go. What tells them apart is what
/// happened to `pg_class`: a rewrite makes and removes a row for its new table beside swapping two, TRUNCATE and REINDEX
/// only update, and only TRUNCATE leaves a new file empty.
pub fn kinds(part: &Part) -> Kinds {
    let mut kinds = Kinds::default();
    let (mut created, mut empty, mut dropped) = (0u64, 0u64, 0u64);
    let mut class = Changes::default();
    let mut definitions = false;
    for (what, changes) in &part.touched {
        match what {
            Touched::File(file) if file.number < FIRST_USER_OID => {
                if file.number == PG_CLASS {
                    class.add(changes);
                }
                definitions |= !NO_DDL.contains(&file.number) && changes.rows() > 0;
            }
            Touched::File(_) => {
                kinds.set(Kinds::INSERT, changes.inserts > 0);
                kinds.set(Kinds::UPDATE, changes.updates > 0);
                kinds.set(Kinds::DELETE, changes.deletes > 0);
            }
            Touched::Relation { .. } => kinds.set(Kinds::TRUNCATE, changes.is(marks::TRUNCATED)),
            Touched::Database(_) | Touched::Tablespace(_) => {
                kinds.set(Kinds::DROP, changes.is(marks::DROPPED));
                kinds.set(Kinds::CREATE, changes.is(marks::CREATED));
            }
        }
        if matches!(what, Touched::File(_)) {
            let is_new = changes.is(marks::CREATED) && !changes.is(marks::DROPPED);
            created += u64::from(is_new);
            empty += u64::from(is_new && !changes.is(marks::PAGES) && changes.rows() == 0);
            dropped += u64::from(changes.is(marks::DROPPED) && !changes.is(marks::CREATED));
        }
    }
    kinds.set(Kinds::DDL, definitions);
    if part.end.as_ref().is_some_and(|end| end.aborted) {
        kinds.set(Kinds::ABORTED, true);
        return kinds;
    }
    let rewrite = created > 0 && dropped > 0 && class.inserts > 0 && class.deletes > 0 && class.updates > 1;
    kinds.set(Kinds::REWRITE, rewrite);
    kinds.set(Kinds::CREATE, class.inserts > 0 && !rewrite);
    kinds.set(Kinds::DROP, !rewrite && ((dropped > 0 && created == 0) || class.deletes > 0));
    kinds.set(Kinds::TRUNCATE, !rewrite && dropped > 0 && empty > 0 && class.updates > 0 && class.inserts == 0);
    kinds
}
