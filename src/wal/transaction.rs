//! The records that a restore has to know: ends of transactions, restore points, parameters, checkpoints, timelines.

use super::error::WalDamage;
use super::page::{u32_at, u64_at};
use super::record::{Record, RelFile, rmgr};
use crate::types::{Lsn, PgTimestamp, TimelineId};

/// What a record says that concerns a restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// A transaction committed. Times are taken before the record is written: they may go back from one to the next, and
    /// equal ones are common.
    Commit {
        /// The top-level transaction; of a prepared one, its own xid, not the record's (which is 0).
        xid: u32,
        /// When, by the server's clock.
        time: PgTimestamp,
        /// Its subtransactions that committed with it. They are no recovery targets.
        subxids: Vec<u32>,
        /// `COMMIT PREPARED`.
        prepared: bool,
    },
    /// A transaction was rolled back.
    Abort {
        /// As for a commit.
        xid: u32,
        /// When, by the server's clock.
        time: PgTimestamp,
        /// Its subtransactions.
        subxids: Vec<u32>,
        /// `ROLLBACK PREPARED`.
        prepared: bool,
    },
    /// `pg_create_restore_point`.
    RestorePoint {
        /// The name up to its NUL; bytes that are not UTF-8 (the server's encoding may be another) are replaced.
        name: String,
        /// When, by the server's clock.
        time: PgTimestamp,
    },
    /// Settings that a restored server must not have lower changed.
    ParameterChange(Parameters),
    /// A checkpoint: where recovery may begin, and a clock of an idle server.
    Checkpoint(Checkpoint),
    /// The end of a recovery by promotion: the first record of a new timeline.
    EndOfRecovery {
        /// When, by the server's clock.
        time: PgTimestamp,
        /// The timeline that begins.
        timeline: TimelineId,
        /// The timeline it leaves.
        previous_timeline: TimelineId,
    },
    /// The end of a base backup: what makes a restore of it consistent.
    BackupEnd {
        /// The backup's start position.
        start: Lsn,
    },
    /// The rest of the segment is not used.
    Switch,
    /// A record that a crash left unfinished will never be finished.
    OverwrittenRecord {
        /// Where the unfinished record began.
        start: Lsn,
        /// When the server found out, by its clock.
        time: PgTimestamp,
    },
}

/// `wal_level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WalLevel {
    /// Not enough for an archive.
    Minimal,
    /// What an archive needs.
    Replica,
    /// With what logical decoding needs.
    Logical,
}

/// The settings that [`Fact::ParameterChange`] tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Parameters {
    /// `max_connections`
    pub max_connections: i32,
    /// `max_worker_processes`
    pub max_worker_processes: i32,
    /// `max_wal_senders`
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`
    pub max_prepared_transactions: i32,
    /// `max_locks_per_transaction`
    pub max_locks_per_transaction: i32,
    /// `wal_level`
    pub wal_level: WalLevel,
    /// `wal_log_hints`
    pub wal_log_hints: bool,
    /// `track_commit_timestamp`
    pub track_commit_timestamp: bool,
}

/// What a checkpoint record tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Written by a shutdown or at the end of a recovery, with nothing going on beside it.
    pub shutdown: bool,
    /// Where replay begins from this checkpoint.
    pub redo: Lsn,
    /// The timeline it is on.
    pub timeline: TimelineId,
    /// Differs from `timeline` where a new timeline begins with this record.
    pub previous_timeline: TimelineId,
    /// The next transaction id, with its epoch in the upper half.
    pub next_xid: u64,
    /// When, by the server's clock; to the second.
    pub time: PgTimestamp,
    /// `full_page_writes`
    pub full_page_writes: bool,
    /// `wal_level`, from 17 on.
    pub wal_level: Option<WalLevel>,
}

// XLOG records: high nibble of `info`.
pub(super) const CHECKPOINT_SHUTDOWN: u8 = 0x00;
pub(super) const CHECKPOINT_ONLINE: u8 = 0x10;
pub(super) const SWITCH: u8 = 0x40;
pub(super) const BACKUP_END: u8 = 0x50;
pub(super) const PARAMETER_CHANGE: u8 = 0x60;
pub(super) const RESTORE_POINT: u8 = 0x70;
pub(super) const END_OF_RECOVERY: u8 = 0x90;
pub(super) const OVERWRITE_CONTRECORD: u8 = 0xD0;
const XLOG_MASK: u8 = 0xF0;

// Transaction records: `info & 0x70`.
pub(super) const COMMIT: u8 = 0x00;
pub(super) const ABORT: u8 = 0x20;
pub(super) const COMMIT_PREPARED: u8 = 0x30;
pub(super) const ABORT_PREPARED: u8 = 0x40;
const XACT_MASK: u8 = 0x70;

/// `info` of a commit or abort that has an `xinfo` word.
pub(super) const HAS_XINFO: u8 = 0x80;
// Bits of that word.
pub(super) const XINFO_DBINFO: u32 = 1;
pub(super) const XINFO_SUBXACTS: u32 = 1 << 1;
pub(super) const XINFO_RELATIONS: u32 = 1 << 2;
pub(super) const XINFO_INVALIDATIONS: u32 = 1 << 3;
pub(super) const XINFO_TWOPHASE: u32 = 1 << 4;
pub(super) const XINFO_DROPPED_STATS: u32 = 1 << 8;

/// Seconds between the Unix epoch and PostgreSQL's.
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

/// Whether [`fact`] can find something in a record of this kind: the filter for [`super::Decoder::only`].
pub fn may_be_fact(rmgr: u8, info: u8) -> bool {
    match rmgr {
        rmgr::XACT => matches!(info & XACT_MASK, COMMIT | ABORT | COMMIT_PREPARED | ABORT_PREPARED),
        rmgr::XLOG => matches!(
            info & XLOG_MASK,
            CHECKPOINT_SHUTDOWN
                | CHECKPOINT_ONLINE
                | SWITCH
                | BACKUP_END
                | PARAMETER_CHANGE
                | RESTORE_POINT
                | END_OF_RECOVERY
                | OVERWRITE_CONTRECORD
        ),
        _ => false,
    }
}

/// Reads what a record says that concerns a restore; `None` for all the other records.
pub fn fact(record: &Record<'_>) -> Result<Option<Fact>, WalDamage> {
    if !may_be_fact(record.rmgr, record.info) {
        return Ok(None);
    }
    let data = Reader { bytes: record.main_data()?, record };
    let fact = match record.rmgr {
        rmgr::XACT => transaction_end(data)?,
        _ => match record.info & XLOG_MASK {
            CHECKPOINT_SHUTDOWN => Fact::Checkpoint(checkpoint(&data, true)?),
            CHECKPOINT_ONLINE => Fact::Checkpoint(checkpoint(&data, false)?),
            SWITCH => Fact::Switch,
            BACKUP_END => Fact::BackupEnd { start: Lsn::new(data.u64_at(0)?) },
            PARAMETER_CHANGE => Fact::ParameterChange(parameters(&data)?),
            RESTORE_POINT => restore_point(&data)?,
            END_OF_RECOVERY => Fact::EndOfRecovery {
                time: data.time_at(0)?,
                timeline: data.timeline_at(8)?,
                previous_timeline: data.timeline_at(12)?,
            },
            OVERWRITE_CONTRECORD => {
                Fact::OverwrittenRecord { start: Lsn::new(data.u64_at(0)?), time: data.time_at(8)? }
            }
            _ => return Ok(None), // `may_be_fact` lets nothing else through
        },
    };
    Ok(Some(fact))
}

/// Reads a record's main data, at fixed offsets or front to back.
#[derive(Clone, Copy)]
struct Reader<'a> {
    bytes: &'a [u8],
    record: &'a Record<'a>,
}

impl<'a> Reader<'a> {
    fn fault(&self, what: &'static str) -> WalDamage {
        WalDamage::Content { at: self.record.start, what }
    }

    fn short(&self) -> WalDamage {
        self.fault("its data is too short")
    }

    fn u32_at(&self, at: usize) -> Result<u32, WalDamage> {
        u32_at(self.bytes, at).ok_or_else(|| self.short())
    }

    fn i32_at(&self, at: usize) -> Result<i32, WalDamage> {
        self.u32_at(at).map(u32::cast_signed)
    }

    fn u64_at(&self, at: usize) -> Result<u64, WalDamage> {
        u64_at(self.bytes, at).ok_or_else(|| self.short())
    }

    fn bool_at(&self, at: usize) -> Result<bool, WalDamage> {
        self.bytes.get(at).map(|byte| *byte != 0).ok_or_else(|| self.short())
    }

    fn time_at(&self, at: usize) -> Result<PgTimestamp, WalDamage> {
        self.u64_at(at).map(|micros| PgTimestamp::new(micros.cast_signed()))
    }

    fn timeline_at(&self, at: usize) -> Result<TimelineId, WalDamage> {
        TimelineId::new(self.u32_at(at)?).ok_or_else(|| self.fault("it names timeline 0"))
    }

    fn wal_level_at(&self, at: usize) -> Result<WalLevel, WalDamage> {
        match self.i32_at(at)? {
            0 => Ok(WalLevel::Minimal),
            1 => Ok(WalLevel::Replica),
            2 => Ok(WalLevel::Logical),
            _ => Err(self.fault("it has an unknown wal_level")),
        }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], WalDamage> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or_else(|| self.short())?;
        self.bytes = rest;
        Ok(taken)
    }

    fn take_u32(&mut self) -> Result<u32, WalDamage> {
        let value = self.u32_at(0)?;
        self.take(4)?;
        Ok(value)
    }

    /// A list: its length in entries, then entries of `entry_len` bytes.
    fn take_list(&mut self, entry_len: usize) -> Result<&'a [u8], WalDamage> {
        let entries = usize::try_from(self.i32_at(0)?).map_err(|_| self.fault("it has a list of negative length"))?;
        self.take(4)?;
        self.take(entries.checked_mul(entry_len).ok_or_else(|| self.short())?)
    }
}

/// `ParseCommitRecord` and `ParseAbortRecord`, as far as recovery targets need them.
fn transaction_end(mut data: Reader<'_>) -> Result<Fact, WalDamage> {
    let record = data.record;
    let opcode = record.info & XACT_MASK;
    let commits = matches!(opcode, COMMIT | COMMIT_PREPARED);
    let prepared = matches!(opcode, COMMIT_PREPARED | ABORT_PREPARED);
    let time = data.time_at(0)?;
    data.take(8)?;
    let xinfo = if record.info & HAS_XINFO != 0 { data.take_u32()? } else { 0 };
    if xinfo & XINFO_DBINFO != 0 {
        data.take(8)?;
    }
    let mut subxids = Vec::new();
    if xinfo & XINFO_SUBXACTS != 0 {
        let list = data.take_list(4)?;
        subxids.extend(list.chunks_exact(4).filter_map(|entry| u32_at(entry, 0)));
    }
    // The prepared transaction's own xid lies behind these lists, so they are read only where it is wanted.
    let mut xid = record.xid;
    if prepared {
        if xinfo & XINFO_RELATIONS != 0 {
            data.take_list(12)?;
        }
        if xinfo & XINFO_DROPPED_STATS != 0 {
            let entry_len = record.format.dropped_stats;
            data.take_list(entry_len.ok_or_else(|| data.fault("it drops statistics, which its version cannot"))?)?;
        }
        if xinfo & XINFO_INVALIDATIONS != 0 {
            data.take_list(16)?;
        }
        if xinfo & XINFO_TWOPHASE == 0 {
            return Err(data.fault("it ends a prepared transaction and does not say which"));
        }
        xid = data.take_u32()?;
    }
    if commits {
        Ok(Fact::Commit { xid, time, subxids, prepared })
    } else {
        Ok(Fact::Abort { xid, time, subxids, prepared })
    }
}

/// The relations whose files go with this commit; nothing for any other record.
pub(super) fn dropped_relations(record: &Record<'_>) -> Result<Vec<RelFile>, WalDamage> {
    let commits = matches!(record.info & XACT_MASK, COMMIT | COMMIT_PREPARED);
    if record.rmgr != rmgr::XACT || !commits || record.info & HAS_XINFO == 0 {
        return Ok(Vec::new());
    }
    let mut data = Reader { bytes: record.main_data()?, record };
    data.take(8)?;
    let xinfo = data.take_u32()?;
    if xinfo & XINFO_RELATIONS == 0 {
        return Ok(Vec::new());
    }
    if xinfo & XINFO_DBINFO != 0 {
        data.take(8)?;
    }
    if xinfo & XINFO_SUBXACTS != 0 {
        data.take_list(4)?;
    }
    let list = data.take_list(12)?.chunks_exact(12);
    let relation =
        |entry| Some(RelFile { tablespace: u32_at(entry, 0)?, database: u32_at(entry, 4)?, number: u32_at(entry, 8)? });
    Ok(list.filter_map(relation).collect())
}

fn restore_point(data: &Reader<'_>) -> Result<Fact, WalDamage> {
    let time = data.time_at(0)?;
    // 64 bytes; those after the NUL are whatever lay on the server's stack.
    let name = data.bytes.get(8..).and_then(|rest| rest.split(|byte| *byte == 0).next()).unwrap_or_default();
    Ok(Fact::RestorePoint { name: String::from_utf8_lossy(name).into_owned(), time })
}

fn parameters(data: &Reader<'_>) -> Result<Parameters, WalDamage> {
    Ok(Parameters {
        max_connections: data.i32_at(0)?,
        max_worker_processes: data.i32_at(4)?,
        max_wal_senders: data.i32_at(8)?,
        max_prepared_transactions: data.i32_at(12)?,
        max_locks_per_transaction: data.i32_at(16)?,
        wal_level: data.wal_level_at(20)?,
        wal_log_hints: data.bool_at(24)?,
        track_commit_timestamp: data.bool_at(25)?,
    })
}

/// The struct `CheckPoint`, up to its time.
fn checkpoint(data: &Reader<'_>, shutdown: bool) -> Result<Checkpoint, WalDamage> {
    let seconds = data.u64_at(64)?.cast_signed();
    let wal_level = if data.record.format.tells_wal_level { Some(data.wal_level_at(20)?) } else { None };
    Ok(Checkpoint {
        shutdown,
        redo: Lsn::new(data.u64_at(0)?),
        timeline: data.timeline_at(8)?,
        previous_timeline: data.timeline_at(12)?,
        next_xid: data.u64_at(24)?,
        time: PgTimestamp::new(seconds.saturating_sub(POSTGRES_EPOCH_SECONDS).saturating_mul(1_000_000)),
        full_page_writes: data.bool_at(16)?,
        wal_level,
    })
}
