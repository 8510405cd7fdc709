//! How a stream is to go, and where it begins: plain values, decided before it starts.

use std::num::NonZeroU64;
use std::time::Duration;

use super::cutter::CutterOptions;
use crate::types::{Lsn, TimelineId};

/// How to stream.
#[derive(Debug, Clone, Copy)]
pub struct StreamOptions {
    /// When ranges of the open segment are cut.
    pub cutter: CutterOptions,
    /// From one range of the open segment to the next, at least, where commits wait for us and every range is an object.
    pub range_interval: Duration,
    /// How long a stopping server, or our own stop, waits for the repositories.
    pub shutdown_deadline: Duration,
    /// How long the open pieces of a segment stay when it is there as a whole.
    pub open_grace: Duration,
    /// Bytes of WAL a second that fill up a repository at most.
    pub fill_rate: Option<NonZeroU64>,
}

/// Where a stream begins, as was decided by what the repositories hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begin {
    /// The timeline that is streamed.
    pub timeline: TimelineId,
    /// Start of a segment.
    pub at: Lsn,
    /// What the server knows already: nothing before it is reported, so that its slot never goes back.
    pub floor: Lsn,
    /// How many repositories must hold what is acknowledged.
    pub needed: usize,
}
