//! How far a restore is, and where its time goes.
//!
//! Several work at the same time, so the stages' times together are more than the time that passed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A part of the work that is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Reading the backup's tables.
    Table,
    /// Reading what is in the directory and comparing it.
    Compare,
    /// Waiting for bytes of packs.
    Fetch,
    /// Decrypting, authenticating and decompressing them.
    Open,
    /// Making and writing files.
    Write,
    /// Waiting until all is durable.
    Sync,
}

/// Counts and times that grow while a restore runs. May be read at any moment.
#[derive(Debug, Default)]
pub struct Spent {
    nanos: [AtomicU64; 6],
    files: AtomicU64,
    fetched: AtomicU64,
    equal: AtomicU64,
}

/// Time by stage, of all workers together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times {
    /// [`Stage::Table`]
    pub table: Duration,
    /// [`Stage::Compare`]
    pub compare: Duration,
    /// [`Stage::Fetch`]
    pub fetch: Duration,
    /// [`Stage::Open`]
    pub open: Duration,
    /// [`Stage::Write`]
    pub write: Duration,
    /// [`Stage::Sync`]
    pub sync: Duration,
}

impl Spent {
    pub(super) fn add(&self, stage: Stage, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.of(stage).fetch_add(nanos, Ordering::Relaxed);
    }

    pub(super) fn since(&self, stage: Stage, begun: Instant) {
        self.add(stage, begun.elapsed());
    }

    pub(super) fn file(&self) {
        self.files.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn fetched_more(&self, bytes: u64) {
        self.fetched.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn equal_more(&self, bytes: u64) {
        self.equal.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Files that were begun.
    pub fn files(&self) -> u64 {
        self.files.load(Ordering::Relaxed)
    }

    /// Bytes of packs' plaintext that were wanted and opened.
    pub fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Bytes that were there already and equal.
    pub fn equal(&self) -> u64 {
        self.equal.load(Ordering::Relaxed)
    }

    /// Where the time went.
    pub fn times(&self) -> Times {
        let time = |stage| Duration::from_nanos(self.of(stage).load(Ordering::Relaxed));
        Times {
            table: time(Stage::Table),
            compare: time(Stage::Compare),
            fetch: time(Stage::Fetch),
            open: time(Stage::Open),
            write: time(Stage::Write),
            sync: time(Stage::Sync),
        }
    }

    fn of(&self, stage: Stage) -> &AtomicU64 {
        let [table, compare, fetch, open, write, sync] = &self.nanos;
        match stage {
            Stage::Table => table,
            Stage::Compare => compare,
            Stage::Fetch => fetch,
            Stage::Open => open,
            Stage::Write => write,
            Stage::Sync => sync,
        }
    }
}
