//! Removes ranges and tails of segments that are there as a whole, a while later.
//!
//! The while is for readers that have listed a piece and not yet read it. What is left over by a crash is taken up by the
//! next stream of the branch. Nothing depends on it: a piece that stays costs only its space.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::uploader::Uploader;
use crate::types::SegmentNumber;

/// See the module.
#[derive(Debug)]
pub struct Sweeper {
    grace: Duration,
    /// Segments that have open pieces and are not complete yet.
    open: BTreeSet<SegmentNumber>,
    /// Complete segments, and when their open pieces may go.
    due: BTreeMap<SegmentNumber, Instant>,
    /// At most one removal at a time.
    under_way: JoinSet<()>,
}

impl Sweeper {
    /// `left` are segments with open pieces from before, `current` is where the stream begins: what lies before it is
    /// complete, or will never be.
    pub fn new(grace: Duration, left: BTreeSet<SegmentNumber>, current: SegmentNumber, now: Instant) -> Sweeper {
        let (old, open) = left.into_iter().partition::<BTreeSet<_>, _>(|segment| *segment < current);
        let due = old.into_iter().map(|segment| (segment, now + grace)).collect();
        Sweeper { grace, open, due, under_way: JoinSet::new() }
    }

    /// The segment has got an open piece.
    pub fn opened(&mut self, segment: SegmentNumber) {
        self.open.insert(segment);
    }

    /// The segment is durable as a whole.
    pub fn completed(&mut self, segment: SegmentNumber, now: Instant) {
        if self.open.remove(&segment) {
            self.due.insert(segment, now + self.grace);
        }
    }

    /// Starts the next removal that is due; says when to call again.
    pub fn start_due(&mut self, now: Instant, uploader: &Uploader) -> Option<Instant> {
        while self.under_way.try_join_next().is_some() {}
        let (segment, due) = self.due.iter().min_by_key(|(_, due)| **due).map(|(segment, due)| (*segment, *due))?;
        if due > now {
            return Some(due);
        }
        if self.under_way.is_empty() {
            self.due.remove(&segment);
            let uploader = uploader.clone();
            self.under_way.spawn(async move {
                if let Err(error) = uploader.remove_open_pieces(segment).await {
                    tracing::debug!(segment = segment.get(), %error, "open pieces stay");
                }
            });
        }
        Some(now + Duration::from_millis(200))
    }
}
