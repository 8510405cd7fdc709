//! From a target to the record at which recovery stops: the rules of `recoveryStopsBefore` and `recoveryStopsAfter`
//! (POSTGRES.md 9.3), applied to the records of a chain in order.
//!
//! A fold: whoever reads the WAL pushes what it finds and is told when it has seen enough; [`Search::finish`] says what was
//! found. The target is resolved to one record, and recovery is told that record's position, so that what was planned
//! and what the server does cannot differ by a time zone, a clock or a record that arrived meanwhile.
//!
//! A backup's clock: a backup is of an instant not after `t` if the *server's* clock at its checkpoint says so, and no
//! transaction that ended while it was taken is later than `t`. Its `started_at` is the archiver's clock and only counts
//! where the checkpoint record was not seen.

use jiff::Timestamp;
use serde::Serialize;

use super::chain::Chain;
use super::target::{Point, Target};
use crate::types::{Lsn, PgTimestamp};
use crate::wal::{Fact, Parameters, Record, WalDamage, WalLevel, fact};

/// WAL read beyond the stop, only to tell which commit comes next: as a rule a few records.
const LOOK_BEYOND: u64 = 256 << 20;
/// Largest header of a WAL page: what may lie between the end of a record and the start of the next.
const PAGE_HEADER_MAX: u64 = 40;
/// How many restore points inside the backup are remembered for the explanation.
const PASSED_OVER_MAX: usize = 16;
/// Pages of WAL, which `pg_current_wal_lsn()` may name by their start.
const PAGE: u64 = 8192;

/// A record as the search needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its first byte.
    pub start: Lsn,
    /// Where the next one may begin.
    pub end: Lsn,
    /// What it says, where that concerns a restore.
    pub fact: Option<Fact>,
}

impl Seen {
    /// From a record that the decoder found.
    pub fn of(record: &Record<'_>) -> Result<Seen, WalDamage> {
        Ok(Seen { start: record.start, end: record.end, fact: fact(record)? })
    }
}

/// What the reader does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// Push the next record.
    Continue,
    /// Nothing further can change the answer.
    Enough,
}

/// How reading ended when the search did not end it.
#[derive(Debug, Clone, Default)]
pub struct EndOfWal {
    /// Start and end of the last whole record, whether it was pushed or passed over (the decoder's `start_of_last_record` and
    /// `end_of_last_record`); `None` if there was none.
    pub last_record: Option<(Lsn, Lsn)>,
    /// What kept the reader from the rest of the chain: an object that does not open, WAL that does not check out or ends
    /// before the chain does. It has to be said: without it the WAL counts as read to the chain's end.
    pub damage: Option<String>,
}

/// The record at which recovery stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct StopAt {
    /// Its start: `recovery_target_lsn`.
    pub record: Lsn,
    /// `recovery_target_inclusive`: the record itself is still replayed.
    pub inclusive: bool,
    /// The end of that record: WAL is needed up to here, also where it is not replayed.
    pub needed_to: Lsn,
}

/// The end of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TransactionEnd {
    /// The top-level transaction.
    pub xid: u32,
    /// The server's clock, in the record.
    pub time: PgTimestamp,
    /// Start of the record.
    pub lsn: Lsn,
    /// Rolled back.
    pub aborted: bool,
}

/// Where in the WAL what was asked for by its number or name is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Located {
    /// The end of the transaction.
    Transaction(TransactionEnd),
    /// The restore point.
    RestorePoint {
        /// Its name.
        name: String,
        /// The server's clock, in the record.
        time: PgTimestamp,
        /// Start of the record.
        lsn: Lsn,
    },
}

/// What a chain's WAL says about the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// Recovery stops there.
    Stop(StopAt),
    /// Recovery stops at the backup's own end.
    Immediate {
        /// End of the record that makes it consistent.
        needed_to: Lsn,
    },
    /// The target lies before the backup is consistent.
    BeforeConsistent {
        /// The record that would be the stop, or the backup's checkpoint.
        at: Lsn,
    },
    /// No such transaction or restore point.
    NotHere,
    /// The transaction is a part of another one, and recovery can only stop at whole ones.
    Subtransaction {
        /// The transaction it belongs to.
        parent: TransactionEnd,
    },
    /// It lies beyond what is there.
    Beyond,
    /// The backup cannot be made consistent: its own WAL is not whole.
    Incomplete,
}

/// Looks for one target in one chain.
#[derive(Debug, Clone)]
pub struct Search {
    point: Point,
    exclusive: bool,
    base_start: Lsn,
    base_stop: Lsn,
    base_started_at: Timestamp,
    /// Known not to be there from here on: a newer base's search has seen it all.
    absent_from: Option<Lsn>,
    held_to: Lsn,
    clock_seen: bool,
    stop: Option<Stop>,
    parent: Option<TransactionEnd>,
    last: Option<(Lsn, Lsn)>,
    last_is_switch: bool,
    pub(super) story: Story,
}

#[derive(Debug, Clone, Copy)]
enum Stop {
    At(StopAt),
    Immediate { needed_to: Lsn },
    Early { at: Lsn },
}

/// What was met on the way: for the explanation, the settings and the bounds.
#[derive(Debug, Clone, Default)]
pub(super) struct Story {
    /// The last commit that is replayed.
    pub last_included: Option<TransactionEnd>,
    /// The first commit that is not.
    pub first_excluded: Option<TransactionEnd>,
    /// Changes of parameters that are replayed, with their records.
    pub parameters: Vec<(Lsn, Parameters)>,
    /// First record written with `wal_level = minimal` that is replayed.
    pub minimal: Option<Lsn>,
    /// The newest time of a transaction's end, replayed or not.
    pub newest_end: Option<PgTimestamp>,
    /// The server's newest clock in a record that is no transaction's end.
    pub clock: Option<PgTimestamp>,
    /// Restore points of the name that lie inside the backup.
    pub passed_over: Vec<Lsn>,
    /// The transaction or restore point that was asked for.
    pub located: Option<Located>,
}

impl Search {
    /// For a chain; `absent_from`: a position from which on the target is known not to be.
    pub fn new(target: &Target, chain: &Chain, absent_from: Option<Lsn>) -> Search {
        Search {
            point: target.point.clone(),
            exclusive: target.exclusive,
            base_start: chain.base.start,
            base_stop: chain.base.stop,
            base_started_at: chain.base.started_at,
            absent_from,
            held_to: chain.held_to,
            clock_seen: false,
            stop: None,
            parent: None,
            last: None,
            last_is_switch: false,
            story: Story::default(),
        }
    }

    /// Whether every record has to be pushed, not only those that may have a [`Fact`].
    pub fn wants_every_record(&self) -> bool {
        matches!(self.point, Point::Lsn(_))
    }

    /// The next record of the chain, in order. Records before the base's start are passed over.
    pub fn push(&mut self, seen: Seen) -> Reading {
        if seen.start < self.base_start {
            return Reading::Continue;
        }
        let held = self.holds(seen.start, seen.end) || (seen.fact == Some(Fact::Switch) && seen.start < self.held_to);
        if !held || self.absent_from.is_some_and(|absent| seen.start >= absent) {
            return Reading::Enough;
        }
        // A switch goes to the end of its segment, but what follows its record is zeros, and need not be there.
        let needed_to = seen.end.min(self.held_to);
        let end = transaction_end(&seen);
        self.newest(&seen, end.as_ref());
        self.locate(&seen, end.as_ref());
        if self.stop.is_some() {
            return self.beyond(&seen, end.as_ref());
        }
        if self.stops_before(&seen, end.as_ref()) {
            let at = StopAt { record: seen.start, inclusive: false, needed_to };
            self.stop = Some(if seen.start < self.base_stop { Stop::Early { at: seen.start } } else { Stop::At(at) });
            return self.beyond(&seen, end.as_ref());
        }
        if self.too_new(&seen) {
            self.stop = Some(Stop::Early { at: seen.start });
            return Reading::Enough;
        }
        self.replay(&seen, end);
        if self.parent.is_some() {
            return Reading::Enough;
        }
        if self.stops_after(&seen, end.as_ref()) {
            let at = StopAt { record: seen.start, inclusive: true, needed_to };
            self.stop = Some(match self.point {
                _ if seen.end < self.base_stop => Stop::Early { at: seen.start },
                Point::Immediate => Stop::Immediate { needed_to },
                _ => Stop::At(at),
            });
        }
        if matches!(self.stop, Some(Stop::Early { .. })) { Reading::Enough } else { Reading::Continue }
    }

    /// The target's place, once everything was pushed or enough was.
    pub fn finish(&mut self, end: &EndOfWal, complete_until: Option<Timestamp>) -> Finding {
        if matches!(self.stop, Some(Stop::At(_))) && self.too_new_by_our_clock() {
            return Finding::BeforeConsistent { at: self.base_start };
        }
        match self.stop {
            Some(Stop::At(stop)) => return Finding::Stop(stop),
            Some(Stop::Immediate { needed_to }) => return Finding::Immediate { needed_to },
            Some(Stop::Early { at }) => return Finding::BeforeConsistent { at },
            None => {}
        }
        if let Some(parent) = self.parent {
            return Finding::Subtransaction { parent };
        }
        let last = self.last_record(end);
        let Some((start, last_end)) = last.filter(|(_, end)| *end >= self.base_stop) else {
            return if self.absent_from.is_some() { Finding::NotHere } else { Finding::Incomplete };
        };
        let all = Finding::Stop(StopAt { record: start, inclusive: true, needed_to: last_end.min(self.held_to) });
        match &self.point {
            Point::Latest => all,
            Point::Time(_) if self.too_new_by_our_clock() => Finding::BeforeConsistent { at: self.base_start },
            Point::Time(instant) if self.complete_until(complete_until).is_some_and(|until| *instant <= until) => all,
            Point::Lsn(lsn) if self.is_end(*lsn, start, last_end) => all,
            Point::Time(_) | Point::Lsn(_) => Finding::Beyond,
            Point::Xid(_) | Point::Name(_) => Finding::NotHere,
            // The record that makes the backup consistent was passed over by a reader of facts.
            Point::Immediate => Finding::Immediate { needed_to: self.base_stop },
        }
    }

    /// The last whole record: what was pushed last, or passed over after that.
    pub(super) fn last_record(&self, end: &EndOfWal) -> Option<(Lsn, Lsn)> {
        let whole = end.last_record.filter(|(start, end)| *start >= self.base_start && self.holds(*start, *end));
        whole.max(self.last)
    }

    /// Whether a record lies in the chain. Its end is rounded up to eight bytes, which need not be there.
    fn holds(&self, start: Lsn, end: Lsn) -> bool {
        start < self.held_to && end.get() <= self.held_to.get().saturating_add(7)
    }

    /// The instant up to which every commit is known to be in the chain.
    pub(super) fn complete_until(&self, known: Option<Timestamp>) -> Option<Timestamp> {
        known.max(self.story.clock.map(PgTimestamp::to_timestamp))
    }

    /// The server stops before this record.
    fn stops_before(&self, seen: &Seen, end: Option<&TransactionEnd>) -> bool {
        match (&self.point, end) {
            (Point::Time(instant), Some(end)) => self.is_after(end.time, *instant),
            (Point::Xid(xid), Some(end)) => self.exclusive && end.xid == *xid,
            (Point::Lsn(lsn), _) => self.exclusive && seen.start >= *lsn,
            _ => false,
        }
    }

    /// The server stops after having replayed this record.
    fn stops_after(&mut self, seen: &Seen, end: Option<&TransactionEnd>) -> bool {
        match (&self.point, end, &seen.fact) {
            (Point::Xid(xid), Some(end), _) => !self.exclusive && end.xid == *xid,
            (Point::Lsn(lsn), _, _) => !self.exclusive && seen.start >= *lsn,
            (Point::Name(name), _, Some(Fact::RestorePoint { name: found, .. })) if found == name => {
                let inside = seen.end < self.base_stop;
                if inside && self.story.passed_over.len() < PASSED_OVER_MAX {
                    self.story.passed_over.push(seen.start);
                }
                !inside
            }
            (Point::Immediate, _, _) => seen.end >= self.base_stop,
            _ => false,
        }
    }

    fn is_after(&self, time: PgTimestamp, instant: Timestamp) -> bool {
        let time = time.to_timestamp();
        if self.exclusive { time >= instant } else { time > instant }
    }

    /// The backup's own checkpoint says that it began after the instant asked for.
    fn too_new(&mut self, seen: &Seen) -> bool {
        let (Point::Time(instant), Some(Fact::Checkpoint(checkpoint))) = (&self.point, &seen.fact) else {
            return false;
        };
        if checkpoint.redo != self.base_start {
            return false;
        }
        self.clock_seen = true;
        // To the second: what ended within that second may be in the backup already.
        checkpoint.time.to_timestamp().as_second() >= instant.as_second()
    }

    fn too_new_by_our_clock(&self) -> bool {
        !self.clock_seen && matches!(self.point, Point::Time(instant) if self.base_started_at > instant)
    }

    /// Takes a record as replayed.
    fn replay(&mut self, seen: &Seen, end: Option<TransactionEnd>) {
        self.last = Some((seen.start, seen.end));
        self.last_is_switch = seen.fact == Some(Fact::Switch);
        if let Some(end) = end.filter(|end| !end.aborted) {
            self.story.last_included = Some(end);
        }
        match &seen.fact {
            Some(Fact::ParameterChange(parameters)) => {
                if self.story.parameters.last().is_none_or(|(_, last)| last != parameters) {
                    self.story.parameters.push((seen.start, *parameters));
                }
                self.minimal(parameters.wal_level, seen.start);
            }
            Some(Fact::Checkpoint(checkpoint)) => {
                self.minimal(checkpoint.wal_level.unwrap_or(WalLevel::Replica), seen.start);
            }
            Some(Fact::Commit { subxids, .. } | Fact::Abort { subxids, .. }) => {
                let asked = matches!(&self.point, Point::Xid(xid) if subxids.contains(xid));
                self.parent = if asked { end } else { None };
            }
            _ => {}
        }
    }

    fn minimal(&mut self, level: WalLevel, at: Lsn) {
        if level == WalLevel::Minimal && self.story.minimal.is_none() {
            self.story.minimal = Some(at);
        }
    }

    /// A record behind the stop: only the first commit there is of interest.
    fn beyond(&mut self, seen: &Seen, end: Option<&TransactionEnd>) -> Reading {
        let from = match self.stop {
            Some(Stop::At(stop)) => stop.record,
            Some(Stop::Immediate { needed_to }) => needed_to,
            Some(Stop::Early { .. }) | None => return Reading::Enough,
        };
        if let Some(end) = end.filter(|end| !end.aborted) {
            self.story.first_excluded = Some(*end);
        }
        let far = seen.start.bytes_since(from).is_some_and(|bytes| bytes > LOOK_BEYOND);
        if far || self.story.first_excluded.is_some() { Reading::Enough } else { Reading::Continue }
    }

    fn locate(&mut self, seen: &Seen, end: Option<&TransactionEnd>) {
        if self.story.located.is_some() {
            return;
        }
        self.story.located = match (&self.point, end, &seen.fact) {
            (Point::Xid(xid), Some(end), _) if end.xid == *xid => Some(Located::Transaction(*end)),
            (Point::Name(name), _, Some(Fact::RestorePoint { name: found, time }))
                if found == name && seen.end >= self.base_stop =>
            {
                Some(Located::RestorePoint { name: name.clone(), time: *time, lsn: seen.start })
            }
            _ => None,
        };
    }

    fn newest(&mut self, seen: &Seen, end: Option<&TransactionEnd>) {
        if let Some(end) = end {
            self.story.newest_end = self.story.newest_end.max(Some(end.time));
        }
        // Whatever was committed by such a time was in the WAL before this record.
        let clock = match &seen.fact {
            Some(Fact::Checkpoint(checkpoint)) => Some(checkpoint.time),
            Some(Fact::RestorePoint { time, .. } | Fact::EndOfRecovery { time, .. }) => Some(*time),
            _ => None,
        };
        self.story.clock = self.story.clock.max(clock);
    }

    /// Whether a position means "everything up to the last whole record".
    fn is_end(&self, lsn: Lsn, start: Lsn, end: Lsn) -> bool {
        if lsn <= start || lsn > end {
            return false;
        }
        // Exclusive: the next record, whatever it is, begins at `end` or later, so the server would stop before it.
        // `pg_current_wal_lsn()` at the border of two pages names the page, the next record begins behind its header;
        // `pg_switch_wal()` returns the end of the switch record, and the rest of its segment holds nothing.
        let page = lsn.get().is_multiple_of(PAGE) && end.bytes_since(lsn).is_some_and(|bytes| bytes <= PAGE_HEADER_MAX);
        self.exclusive || lsn == end || page || self.last_is_switch
    }
}

fn transaction_end(seen: &Seen) -> Option<TransactionEnd> {
    match &seen.fact {
        Some(Fact::Commit { xid, time, .. }) => {
            Some(TransactionEnd { xid: *xid, time: *time, lsn: seen.start, aborted: false })
        }
        Some(Fact::Abort { xid, time, .. }) => {
            Some(TransactionEnd { xid: *xid, time: *time, lsn: seen.start, aborted: true })
        }
        _ => None,
    }
}
