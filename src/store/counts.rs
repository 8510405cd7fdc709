//! What became of requests to stores, in this process. Counters alone: nothing depends on them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::StoreError;

/// The kinds that are counted. Not there, or there already, is an answer and no error.
const KINDS: [&str; 9] =
    ["unavailable", "timed-out", "full", "read-only", "denied", "vanished", "damaged", "tail-closed", "other"];

static RETRIES: AtomicU64 = AtomicU64::new(0);
static ERRORS: [AtomicU64; KINDS.len()] = [const { AtomicU64::new(0) }; KINDS.len()];

/// Since this process began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Requests that were tried again.
    pub retries: u64,
    /// Requests that failed, each try, by kind.
    pub errors: BTreeMap<&'static str, u64>,
}

/// What was counted.
pub fn counts() -> Counts {
    let errors = KINDS.iter().zip(&ERRORS).map(|(kind, count)| (*kind, count.load(Ordering::Relaxed))).collect();
    Counts { retries: RETRIES.load(Ordering::Relaxed), errors }
}

pub(super) fn tried_again() {
    RETRIES.fetch_add(1, Ordering::Relaxed);
}

pub(super) fn failed(error: &StoreError) {
    let kind = match error {
        StoreError::NotFound { .. } | StoreError::Conflict { .. } => return,
        StoreError::Unavailable { .. } => 0,
        StoreError::TimedOut { .. } => 1,
        StoreError::Full { .. } => 2,
        StoreError::ReadOnly { .. } => 3,
        StoreError::Denied { .. } => 4,
        StoreError::Vanished { .. } => 5,
        StoreError::Damaged { .. } => 6,
        StoreError::TailClosed { .. } => 7,
        StoreError::Unsupported { .. } | StoreError::TooLarge { .. } => 8,
    };
    if let Some(count) = ERRORS.get(kind) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}
