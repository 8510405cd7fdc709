//! The bytes of an index object: transactions in columns, so that what is alike lies side by side and shrinks.
//!
//! `docs/format.md` specifies it. Numbers are LEB128; signed ones are zigzag. A column is its length in bytes and then its
//! numbers, one for each transaction. What a transaction touched is a *pattern*: many transactions share one. Behind them
//! come the landmarks, restore points and changes of parameters, since version 2.
//! Reading never allocates by a number that it was merely told, and never panics.

use std::collections::HashMap;

use super::IndexNote;
use crate::types::{Lsn, PgTimestamp};
use crate::wal::{Changes, End, Landmark, LandmarkKind, Parameters, Part, RelFile, Touched, WalLevel};

/// The version of these bytes.
const VERSION: u64 = 2;
/// The one before, without landmarks. It is still read.
const WITHOUT_LANDMARKS: u64 = 1;
/// Landmarks that are kept of one range; what is beyond is counted.
pub const LANDMARKS_MAX: u64 = 1 << 16;

const RESTORE_POINT: u64 = 1;
const PARAMETERS: u64 = 2;

const ABORTED: u64 = 1;
const PREPARED: u64 = 2;
const HAS_SUBXIDS: u64 = 4;
const EARLY: u64 = 8;
const INCOMPLETE: u64 = 16;

/// Why the bytes of an index are not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// A newer version wrote it.
    #[error("it is an index of version {0}, and this pgkeep reads version {VERSION}; use a newer pgkeep")]
    Version(u64),
    /// It opened, so a pgkeep wrote it; but it is not an index as this version knows it.
    #[error("it is not an index as this version of pgkeep knows it: {0}")]
    Shape(&'static str),
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_signed(out: &mut Vec<u8>, value: i64) {
    put(out, (value.cast_unsigned() << 1) ^ (value >> 63).cast_unsigned());
}

/// Reads numbers front to back.
#[derive(Debug, Clone, Copy, Default)]
struct Cursor<'a>(&'a [u8]);

const CUT: IndexError = IndexError::Shape("it is cut short");

impl<'a> Cursor<'a> {
    fn get(&mut self) -> Result<u64, IndexError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or(CUT)?;
            self.0 = rest;
            if shift == 63 && *byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(IndexError::Shape("a number is too long"))
    }

    fn signed(&mut self) -> Result<i64, IndexError> {
        let value = self.get()?;
        Ok((value >> 1).cast_signed() ^ -((value & 1).cast_signed()))
    }

    fn u32(&mut self) -> Result<u32, IndexError> {
        u32::try_from(self.get()?).map_err(|_| IndexError::Shape("a number is too large"))
    }

    /// A count of things of which each has at least one byte.
    fn count(&mut self) -> Result<usize, IndexError> {
        let count = usize::try_from(self.get()?).unwrap_or(usize::MAX);
        if count > self.0.len() { Err(CUT) } else { Ok(count) }
    }

    fn bytes(&mut self) -> Result<&'a [u8], IndexError> {
        let len = self.count()?;
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(CUT)?;
        self.0 = rest;
        Ok(bytes)
    }
}

/// One list of transactions, in columns.
#[derive(Debug, Default)]
struct Columns {
    count: u64,
    xids: Vec<u8>,
    /// Of those that ended: the start of the record that did it, from that of the transaction before.
    starts: Vec<u8>,
    ends: Vec<u8>,
    times: Vec<u8>,
    firsts: Vec<u8>,
    bytes: Vec<u8>,
    flags: Vec<u8>,
    patterns: Vec<u8>,
    extras: Vec<u8>,
    last: (u32, u64, i64),
}

impl Columns {
    fn all(&self) -> [&Vec<u8>; 9] {
        [
            &self.xids,
            &self.starts,
            &self.ends,
            &self.times,
            &self.firsts,
            &self.bytes,
            &self.flags,
            &self.patterns,
            &self.extras,
        ]
    }

    fn push(&mut self, part: &Part, pattern: u64) {
        let (last_xid, last_start, last_time) = self.last;
        self.count += 1;
        put_signed(&mut self.xids, i64::from(part.xid.wrapping_sub(last_xid).cast_signed()));
        let mut flags = if part.incomplete { INCOMPLETE } else { 0 };
        let (mut start, mut time) = (part.first.get(), last_time);
        let no_subxids = Vec::new();
        let mut subxids = &no_subxids;
        if let Some(end) = &part.end {
            (start, time, subxids) = (end.start.get(), end.time.micros(), &end.subxids);
            put(&mut self.ends, end.end.get().saturating_sub(start));
            put_signed(&mut self.times, time.wrapping_sub(last_time));
            flags |= if end.aborted { ABORTED } else { 0 } | if end.prepared { PREPARED } else { 0 };
        }
        put_signed(&mut self.starts, start.wrapping_sub(last_start).cast_signed());
        put_signed(&mut self.firsts, start.wrapping_sub(part.first.get()).cast_signed());
        put(&mut self.bytes, part.bytes);
        put(&mut self.patterns, pattern);
        if !subxids.is_empty() {
            flags |= HAS_SUBXIDS;
            put(&mut self.extras, subxids.len() as u64);
            let mut before = part.xid;
            for sub in subxids {
                put_signed(&mut self.extras, i64::from(sub.wrapping_sub(before).cast_signed()));
                before = *sub;
            }
        }
        if let Some(early) = part.early {
            flags |= EARLY;
            put_signed(&mut self.extras, start.wrapping_sub(early.get()).cast_signed());
        }
        put(&mut self.flags, flags);
        self.last = (part.xid, start, time);
    }

    fn write(&self, out: &mut Vec<u8>) {
        put(out, self.count);
        for column in self.all() {
            put(out, column.len() as u64);
            out.extend_from_slice(column);
        }
    }
}

/// Takes parts of transactions in and gives the bytes of an index. Holds what it will write, and no more.
#[derive(Debug)]
pub struct IndexWriter {
    from: Lsn,
    relations: HashMap<Touched, u64>,
    relation_bytes: Vec<u8>,
    patterns: HashMap<Vec<u8>, u64>,
    pattern_bytes: Vec<u8>,
    columns: [Columns; 2],
    landmarks: Landmarks,
    times: Option<(PgTimestamp, PgTimestamp)>,
    xids: Option<(u32, u32)>,
}

/// Landmarks as they are written.
#[derive(Debug, Default)]
struct Landmarks {
    bytes: Vec<u8>,
    last: u64,
    restore_points: u64,
    parameter_changes: u64,
    left_out: u64,
}

impl Landmarks {
    fn push(&mut self, landmark: &Landmark) {
        let (kind, count) = match landmark.what {
            LandmarkKind::RestorePoint { .. } => (RESTORE_POINT, &mut self.restore_points),
            LandmarkKind::Parameters(_) => (PARAMETERS, &mut self.parameter_changes),
        };
        *count += 1;
        if self.restore_points + self.parameter_changes > LANDMARKS_MAX {
            self.left_out += 1;
            return;
        }
        let start = landmark.start.get();
        put(&mut self.bytes, kind);
        put_signed(&mut self.bytes, start.wrapping_sub(self.last).cast_signed());
        put(&mut self.bytes, landmark.end.get().saturating_sub(start));
        let mut body = Vec::new();
        match &landmark.what {
            LandmarkKind::RestorePoint { name, time } => {
                put_signed(&mut body, time.micros());
                body.extend_from_slice(name.as_bytes());
            }
            LandmarkKind::Parameters(parameters) => put_parameters(&mut body, parameters),
        }
        put(&mut self.bytes, body.len() as u64);
        self.bytes.extend_from_slice(&body);
        self.last = start;
    }

    fn write(&self, out: &mut Vec<u8>) {
        put(out, self.restore_points + self.parameter_changes - self.left_out);
        out.extend_from_slice(&self.bytes);
        put(out, self.left_out);
    }
}

fn put_parameters(out: &mut Vec<u8>, parameters: &Parameters) {
    let p = parameters;
    for number in [
        p.max_connections,
        p.max_worker_processes,
        p.max_wal_senders,
        p.max_prepared_transactions,
        p.max_locks_per_transaction,
    ] {
        put_signed(out, i64::from(number));
    }
    let level = match p.wal_level {
        WalLevel::Minimal => 0,
        WalLevel::Replica => 1,
        WalLevel::Logical => 2,
    };
    put(out, level);
    put(out, u64::from(p.wal_log_hints) | u64::from(p.track_commit_timestamp) << 1);
}

impl IndexWriter {
    /// An index of WAL from `from` on.
    pub fn new(from: Lsn) -> IndexWriter {
        IndexWriter {
            from,
            relations: HashMap::new(),
            relation_bytes: Vec::new(),
            patterns: HashMap::new(),
            pattern_bytes: Vec::new(),
            columns: Default::default(),
            landmarks: Landmarks::default(),
            times: None,
            xids: None,
        }
    }

    /// Where the indexed WAL begins.
    pub fn from(&self) -> Lsn {
        self.from
    }

    /// Bytes of memory that what was taken holds, roughly.
    pub fn len(&self) -> usize {
        let columns = self.columns.iter().flat_map(Columns::all).map(Vec::len).sum::<usize>();
        columns + self.relation_bytes.len() * 2 + self.pattern_bytes.len() * 2 + self.landmarks.bytes.len()
    }

    /// Nothing was taken.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next transaction that ended, in the order of their ends; or one that goes on.
    pub fn push(&mut self, part: &Part) {
        let pattern = self.pattern(part);
        let [ended, open] = &mut self.columns;
        let subxids = part.end.as_ref().map(|end| end.subxids.as_slice()).unwrap_or_default();
        for xid in subxids.iter().copied().chain([part.xid]) {
            let (low, high) = self.xids.unwrap_or((xid, xid));
            self.xids = Some((low.min(xid), high.max(xid)));
        }
        match &part.end {
            Some(end) => {
                ended.push(part, pattern);
                self.spans(end.time);
            }
            None => open.push(part, pattern),
        }
    }

    /// The next landmark, in order.
    pub fn push_landmark(&mut self, landmark: &Landmark) {
        if let LandmarkKind::RestorePoint { time, .. } = landmark.what {
            self.spans(time);
        }
        self.landmarks.push(landmark);
    }

    fn spans(&mut self, time: PgTimestamp) {
        let (first, last) = self.times.unwrap_or((time, time));
        self.times = Some((first.min(time), last.max(time)));
    }

    fn pattern(&mut self, part: &Part) -> u64 {
        let mut pattern = Vec::with_capacity(1 + part.touched.len() * 5);
        put(&mut pattern, part.touched.len() as u64);
        for (what, changes) in &part.touched {
            put(&mut pattern, self.relation(*what));
            for count in [changes.inserts, changes.updates, changes.deletes, u64::from(changes.marks)] {
                put(&mut pattern, count);
            }
        }
        put(&mut pattern, part.others);
        let next = self.patterns.len() as u64;
        if let Some(known) = self.patterns.get(&pattern) {
            return *known;
        }
        put(&mut self.pattern_bytes, pattern.len() as u64);
        self.pattern_bytes.extend_from_slice(&pattern);
        self.patterns.insert(pattern, next);
        next
    }

    fn relation(&mut self, what: Touched) -> u64 {
        let next = self.relations.len() as u64;
        *self.relations.entry(what).or_insert_with(|| {
            let numbers: &[u32] = match &what {
                Touched::File(file) => &[0, file.tablespace, file.database, file.number],
                Touched::Relation { database, oid } => &[1, *database, *oid],
                Touched::Database(oid) => &[2, *oid],
                Touched::Tablespace(oid) => &[3, *oid],
            };
            numbers.iter().for_each(|number| put(&mut self.relation_bytes, u64::from(*number)));
            next
        })
    }

    /// The bytes, and what is said about them in the object's footer. `to` is the end of the indexed WAL, `major` the
    /// version that wrote it (0: it held nothing), `newest_xid` the newest transaction that wrote anything in it.
    pub fn finish(self, to: Lsn, major: u32, newest_xid: Option<u32>) -> (Vec<u8>, IndexNote) {
        let mut out = Vec::with_capacity(self.len() + 256);
        let relations = self.relations.len() as u64;
        for number in [VERSION, u64::from(major), self.from.get(), to.get(), relations] {
            put(&mut out, number);
        }
        out.extend_from_slice(&self.relation_bytes);
        put(&mut out, self.patterns.len() as u64);
        out.extend_from_slice(&self.pattern_bytes);
        let [ended, open] = &self.columns;
        ended.write(&mut out);
        open.write(&mut out);
        self.landmarks.write(&mut out);
        let note = IndexNote {
            from: self.from,
            to,
            transactions: ended.count,
            open: open.count,
            first_time: self.times.map(|(first, _)| first),
            last_time: self.times.map(|(_, last)| last),
            lowest_xid: self.xids.map(|(low, _)| low),
            highest_xid: self.xids.map(|(_, high)| high),
            newest_xid,
            restore_points: Some(self.landmarks.restore_points),
            parameter_changes: Some(self.landmarks.parameter_changes),
        };
        (out, note)
    }
}

/// What a pattern says: what was touched, and changes to relations that were too many to tell apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pattern {
    /// What was touched.
    pub touched: Vec<(Touched, Changes)>,
    /// See [`Part::others`].
    pub others: u64,
}

/// An index, read.
#[derive(Debug, Clone)]
pub struct IndexFile {
    /// The major version that wrote the WAL.
    pub major: u32,
    /// First byte of the indexed WAL.
    pub from: Lsn,
    /// First byte after it.
    pub to: Lsn,
    /// By number.
    pub patterns: Vec<Pattern>,
    /// Restore points and changes of parameters, in order; `None` in an index of version 1, which tells none.
    pub landmarks: Option<Vec<Landmark>>,
    /// Landmarks that were too many to keep.
    pub landmarks_left_out: u64,
    bytes: Vec<u8>,
    /// Offset of the columns in `bytes`.
    columns: usize,
}

/// A transaction of an index, what it touched by the number of its pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Without what it touched.
    pub part: Part,
    /// In [`IndexFile::patterns`].
    pub pattern: usize,
}

/// Goes through one list of transactions.
#[derive(Debug, Clone, Default)]
pub struct Entries<'a> {
    left: usize,
    columns: [Cursor<'a>; 9],
    has_end: bool,
    last: (u32, u64, i64),
    patterns: usize,
}

impl IndexFile {
    /// Reads an index.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn read(bytes: Vec<u8>) -> Result<IndexFile, IndexError> {
        let mut cursor = Cursor(&bytes);
        let version = cursor.get()?;
        if !matches!(version, VERSION | WITHOUT_LANDMARKS) {
            return Err(IndexError::Version(version));
        }
        let major = cursor.u32()?;
        let (from, to) = (Lsn::new(cursor.get()?), Lsn::new(cursor.get()?));
        let mut relations = Vec::new();
        for _ in 0..cursor.count()? {
            relations.push(match cursor.get()? {
                0 => {
                    Touched::File(RelFile { tablespace: cursor.u32()?, database: cursor.u32()?, number: cursor.u32()? })
                }
                1 => Touched::Relation { database: cursor.u32()?, oid: cursor.u32()? },
                2 => Touched::Database(cursor.u32()?),
                3 => Touched::Tablespace(cursor.u32()?),
                _ => return Err(IndexError::Shape("something of an unknown kind is touched")),
            });
        }
        let mut patterns = Vec::new();
        for _ in 0..cursor.count()? {
            let mut pattern = Cursor(cursor.bytes()?);
            let mut touched = Vec::new();
            for _ in 0..pattern.count()? {
                let what = usize::try_from(pattern.get()?).ok().and_then(|index| relations.get(index));
                let what = *what.ok_or(IndexError::Shape("a pattern names a relation that is not there"))?;
                let (inserts, updates, deletes) = (pattern.get()?, pattern.get()?, pattern.get()?);
                let marks =
                    u8::try_from(pattern.get()?).map_err(|_| IndexError::Shape("a relation has unknown marks"))?;
                touched.push((what, Changes { inserts, updates, deletes, marks }));
            }
            patterns.push(Pattern { touched, others: pattern.get()? });
        }
        let columns = bytes.len() - cursor.0.len();
        let (landmarks, landmarks_left_out) = (None, 0);
        let mut file = IndexFile { major, from, to, patterns, landmarks, landmarks_left_out, bytes, columns };
        let (_, mut cursor) = file.lists()?;
        if version == VERSION {
            let landmarks = read_landmarks(&mut cursor)?;
            let left_out = cursor.get()?;
            (file.landmarks, file.landmarks_left_out) = (Some(landmarks), left_out);
        }
        Ok(file)
    }

    /// Both lists of transactions, and what lies behind them.
    fn lists(&self) -> Result<([Entries<'_>; 2], Cursor<'_>), IndexError> {
        let mut cursor = Cursor(self.bytes.get(self.columns..).unwrap_or_default());
        let mut lists = [Entries::default(), Entries::default()];
        for (list, has_end) in lists.iter_mut().zip([true, false]) {
            let left = cursor.count()?;
            let mut columns = [Cursor::default(); 9];
            for column in &mut columns {
                *column = Cursor(cursor.bytes()?);
            }
            *list = Entries { left, columns, has_end, last: (0, 0, 0), patterns: self.patterns.len() };
        }
        Ok((lists, cursor))
    }

    /// As it was read.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The transactions that ended in it, in the order of their ends.
    pub fn ended(&self) -> Entries<'_> {
        self.lists().map(|([ended, _], _)| ended).unwrap_or_default() // invariant: looked at when it was read
    }

    /// Those that went on after it.
    pub fn open(&self) -> Entries<'_> {
        self.lists().map(|([_, open], _)| open).unwrap_or_default() // invariant: as above
    }

    /// The whole part of an entry.
    pub fn part(&self, entry: &Entry) -> Part {
        let pattern = self.patterns.get(entry.pattern).cloned().unwrap_or_default();
        Part { touched: pattern.touched, others: pattern.others, ..entry.part.clone() }
    }
}

/// Those of an unknown kind are passed over: a newer pgkeep wrote them.
fn read_landmarks(cursor: &mut Cursor<'_>) -> Result<Vec<Landmark>, IndexError> {
    let (mut landmarks, mut last) = (Vec::new(), 0u64);
    for _ in 0..cursor.count()? {
        let kind = cursor.get()?;
        let start = last.wrapping_add(cursor.signed()?.cast_unsigned());
        let end = Lsn::new(start).advance(cursor.get()?);
        let mut body = Cursor(cursor.bytes()?);
        last = start;
        let what = match kind {
            RESTORE_POINT => {
                let time = PgTimestamp::new(body.signed()?);
                let name = std::str::from_utf8(body.0);
                let name = name.map_err(|_| IndexError::Shape("a restore point's name is no text"))?.to_owned();
                LandmarkKind::RestorePoint { name, time }
            }
            PARAMETERS => LandmarkKind::Parameters(read_parameters(&mut body)?),
            _ => continue,
        };
        landmarks.push(Landmark { start: Lsn::new(start), end, what });
    }
    Ok(landmarks)
}

fn read_parameters(body: &mut Cursor<'_>) -> Result<Parameters, IndexError> {
    let mut number = || i32::try_from(body.signed()?).map_err(|_| IndexError::Shape("a parameter is too large"));
    let (max_connections, max_worker_processes, max_wal_senders) = (number()?, number()?, number()?);
    let (max_prepared_transactions, max_locks_per_transaction) = (number()?, number()?);
    let wal_level = match body.get()? {
        0 => WalLevel::Minimal,
        1 => WalLevel::Replica,
        2 => WalLevel::Logical,
        _ => return Err(IndexError::Shape("a wal_level is not known")),
    };
    let flags = body.get()?;
    Ok(Parameters {
        max_connections,
        max_worker_processes,
        max_wal_senders,
        max_prepared_transactions,
        max_locks_per_transaction,
        wal_level,
        wal_log_hints: flags & 1 != 0,
        track_commit_timestamp: flags & 2 != 0,
    })
}

impl Entries<'_> {
    fn take(&mut self) -> Result<Entry, IndexError> {
        let (last_xid, last_start, last_time) = self.last;
        let [xids, starts, ends, times, firsts, bytes, flags, patterns, extras] = &mut self.columns;
        let xid = last_xid.wrapping_add(xids.signed()? as u32);
        let start = last_start.wrapping_add(starts.signed()?.cast_unsigned());
        let first = start.wrapping_sub(firsts.signed()?.cast_unsigned());
        let (bytes, flags) = (bytes.get()?, flags.get()?);
        let pattern = usize::try_from(patterns.get()?).ok().filter(|pattern| *pattern < self.patterns);
        let pattern = pattern.ok_or(IndexError::Shape("a transaction has a pattern that is not there"))?;
        let (mut end, mut time) = (None, last_time);
        if self.has_end {
            let len = ends.get()?;
            time = last_time.wrapping_add(times.signed()?);
            end = Some(End {
                start: Lsn::new(start),
                end: Lsn::new(start).advance(len),
                time: PgTimestamp::new(time),
                aborted: flags & ABORTED != 0,
                prepared: flags & PREPARED != 0,
                subxids: Vec::new(),
            });
        }
        if flags & HAS_SUBXIDS != 0 {
            let (mut subxids, mut before) = (Vec::new(), xid);
            for _ in 0..extras.count()? {
                before = before.wrapping_add(extras.signed()? as u32);
                subxids.push(before);
            }
            if let Some(end) = &mut end {
                end.subxids = subxids;
            }
        }
        let early = match flags & EARLY {
            0 => None,
            _ => Some(Lsn::new(start.wrapping_sub(extras.signed()?.cast_unsigned()))),
        };
        self.last = (xid, start, time);
        let incomplete = flags & INCOMPLETE != 0;
        let part = Part { xid, first: Lsn::new(first), bytes, touched: Vec::new(), others: 0, incomplete, early, end };
        Ok(Entry { part, pattern })
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<Entry, IndexError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let entry = self.take();
        if entry.is_err() {
            self.left = 0;
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests;
