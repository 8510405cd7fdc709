//! Says whether what was acknowledged can be restored: reads it back with the read side's own code, past all faults, and
//! compares it with what the server wrote.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::depot::Depot;
use super::history::{Timeline, size};
use crate::catalog::Repository;
use crate::types::{Branch, ClusterId, Lsn, SegmentNumber, TimelineId};

/// One repository, seen past all faults.
pub struct Seen {
    pub repository: Repository,
    pub depot: Depot,
    /// Where its WAL begins, once it has any.
    begins: Option<Lsn>,
    /// How much of each segment was read back and was what the server wrote.
    verified: BTreeMap<(TimelineId, SegmentNumber), Lsn>,
    /// As of so many removals.
    removed: u64,
}

/// Why a position does not count.
pub enum Lack {
    /// It is not all there.
    Missing(String),
    /// What is there is not what the server wrote.
    Wrong(String),
}

impl Seen {
    pub fn new(repository: Repository, depot: Depot) -> Seen {
        Seen { repository, depot, begins: None, verified: BTreeMap::new(), removed: 0 }
    }

    /// Where its WAL begins.
    async fn begins(&mut self, id: &ClusterId) -> Result<Option<Lsn>, Lack> {
        if self.begins.is_none() {
            let inventory = self.repository.load(id).await.map_err(|error| Lack::Missing(error.to_string()))?;
            let runs = inventory.branches.values().flat_map(|branch| branch.runs(size()));
            self.begins = runs.map(|run| run.from).min();
        }
        Ok(self.begins)
    }

    /// Does it hold the server's `timeline` up to `to`, from its own beginning on, which lies not behind `kept_from`?
    pub async fn holds(
        &mut self,
        id: &ClusterId,
        timelines: &[Arc<Timeline>],
        timeline: TimelineId,
        to: Lsn,
        kept_from: Lsn,
    ) -> Result<(), Lack> {
        // What lies before a fork is the parent's, whoever's stream it was told on; the child's copy of the fork's segment
        // holds it too.
        let parent = timelines[timeline.get() as usize - 1].history.timeline_at(Lsn::new(to.get() - 1));
        match self.holds_on(id, timelines, timeline, to, kept_from).await {
            Err(Lack::Missing(_)) if parent != timeline => self.holds_on(id, timelines, parent, to, kept_from).await,
            answer => answer,
        }
    }

    async fn holds_on(
        &mut self,
        id: &ClusterId,
        timelines: &[Arc<Timeline>],
        timeline: TimelineId,
        to: Lsn,
        kept_from: Lsn,
    ) -> Result<(), Lack> {
        let missing = |what: String| Err(Lack::Missing(what));
        let removed = self.depot.removed();
        if removed != self.removed {
            (self.removed, self.begins) = (removed, None);
            self.verified.clear();
        }
        let Some(from) = self.begins(id).await? else { return missing("it holds nothing".to_owned()) };
        if from > kept_from {
            self.begins = None; // perhaps something before it has landed meanwhile
            return missing(format!("its WAL begins at {from} only"));
        }
        for (on, begins_at, left_at) in &timelines[timeline.get() as usize - 1].history.path() {
            let branch = Branch::first(*on);
            let first = from.max(*begins_at).segment(size());
            // The child's copy of the fork's segment holds the parent's bytes too.
            let end = left_at.map_or(to, |fork| fork.segment_start(size()));
            let mut segment = first;
            while segment.start(size()) < end {
                let wanted = segment.end(size()).min(end);
                if self.verified.get(&(*on, segment)).is_none_or(|verified| *verified < wanted) {
                    let read = self
                        .repository
                        .read_segment(id, branch, segment, size(), Some(&timelines[on.get() as usize - 1].history))
                        .await;
                    let read =
                        read.map_err(|error| Lack::Missing(format!("{branch} {}: {error}", segment.start(size()))))?;
                    let is = timelines[on.get() as usize - 1].bytes(segment.start(size()), segment.end(size()));
                    if !is.starts_with(&read.bytes) {
                        return Err(Lack::Wrong(format!(
                            "{branch} {} holds what the server did not write",
                            segment.start(size())
                        )));
                    }
                    let verified = segment.start(size()).advance(read.bytes.len() as u64);
                    self.verified.insert((*on, segment), verified);
                    if verified < wanted {
                        return missing(format!("{branch} ends at {verified} where {wanted} is needed"));
                    }
                }
                segment = segment.next();
            }
            if *on > TimelineId::FIRST {
                match self.repository.get_history(id, branch).await {
                    Ok(Some(_)) => {}
                    Ok(None) => return missing(format!("the history of {branch} is not there")),
                    Err(error) => return missing(error.to_string()),
                }
            }
        }
        Ok(())
    }

    /// At the very end: everything is there as one picture, without gaps, damage or second histories.
    pub async fn is_whole(&self, id: &ClusterId, truth: &Timeline, to: Lsn) -> Result<(), String> {
        let inventory = self.repository.load(id).await.map_err(|error| error.to_string())?;
        // A tail that was opened and that a kill left before its first append never held a byte.
        let damaged: Vec<_> = inventory.damaged.iter().filter(|object| !object.name.ends_with('-')).collect();
        if !(inventory.gaps.is_empty() && damaged.is_empty() && inventory.unknown.is_empty()) {
            return Err(format!("gaps {:?}, damaged {damaged:?}, unknown {:?}", inventory.gaps, inventory.unknown));
        }
        if let Some(second) = inventory.branches.keys().find(|branch| **branch != Branch::first(branch.timeline)) {
            return Err(format!("a second history {second}"));
        }
        let from = inventory.branches.values().flat_map(|branch| branch.runs(size())).map(|run| run.from).min();
        let Some(from) = from else { return Err("it holds nothing".to_owned()) };
        match inventory.covers(&truth.history, from, to) {
            Ok(_) => Ok(()),
            Err(hole) => Err(hole.to_string()),
        }
    }
}
