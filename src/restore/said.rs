//! What the index says of a target: where to look first, and what to tell a person whose target is not there.
//!
//! What always holds: nothing here decides. What an index says is looked up in the WAL, or told as what an index says; one
//! that is missing, damaged or wrong costs time. No WAL is read here, and no failure is one of the plan.

use std::time::Duration;

use tokio::time::timeout;

use crate::catalog::Repository;
use crate::catalog::index::{Found, Query};
use crate::catalog::inventory::ClusterInventory;
use crate::catalog::records::BackupInfo;
use crate::plan::{NoKind, PlanError, Point, Target};
use crate::types::{Branch, Lsn};
use crate::wal::{Kinds, LandmarkKind};

/// Restore points of one name that are looked at.
const SAME_NAME_MAX: usize = 1000;
/// Restore points that are named with an answer.
const NAMED_MAX: usize = 5;
/// An index that takes longer to answer is not waited for: reading the WAL may be faster.
const DEADLINE: Duration = Duration::from_secs(30);
/// Histories that are looked through for what is not on the way.
const TIPS_MAX: usize = 16;

/// Where a target is, by the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Said {
    /// Start of its record.
    pub at: Lsn,
    /// What a person should know.
    pub warning: Option<String>,
}

/// Where on the way to `tip` a transaction or restore point is; `oldest`: the first base backup that comes into question.
pub(super) async fn of(
    repository: &Repository,
    inventory: &ClusterInventory,
    (tip, oldest): (Branch, &BackupInfo),
    target: &Target,
) -> Option<Said> {
    match &target.point {
        Point::Xid(xid) => {
            let query = Query { xid: Some(*xid), aborted: true, limit: 1, index_only: true, ..Query::default() };
            let found = ask(repository, inventory, tip, &query).await?;
            let end = found.transactions.last()?.part.end.as_ref()?;
            Some(Said { at: end.start, warning: None })
        }
        Point::Name(name) => {
            let query = Query { name: Some(name.clone()), limit: SAME_NAME_MAX, index_only: true, ..Query::default() };
            first_of_name(&ask(repository, inventory, tip, &query).await?, oldest)
        }
        Point::Time(_) | Point::Lsn(_) | Point::Immediate | Point::Latest => None,
    }
}

/// The first restore point behind the oldest base backup, if the index knows all that lies before it.
fn first_of_name(found: &Found, oldest: &BackupInfo) -> Option<Said> {
    if found.more {
        return None;
    }
    let points: Vec<_> = found.landmarks.iter().filter(|passed| passed.landmark.start >= oldest.start).collect();
    let first = &points.first()?.landmark;
    let is_unknown = |(from, to): &(Lsn, Lsn)| *to > oldest.start && *from <= first.start;
    // One within the base backup is no target, and that is said by who reads its WAL.
    if first.end < oldest.stop || found.unindexed.iter().any(is_unknown) {
        return None;
    }
    let later: Vec<String> =
        points.iter().skip(1).take(NAMED_MAX).map(|passed| passed.landmark.start.to_string()).collect();
    let warning = (!later.is_empty()).then(|| {
        let more = if points.len() > NAMED_MAX + 1 { ", …" } else { "" };
        format!("later restore points have that name, too, at {}{more}: --to takes these positions", later.join(", "))
    });
    Some(Said { at: first.start, warning })
}

/// What the index knows of a target that cannot be reached on the way to `tip`, a sentence each.
pub(super) async fn elsewhere(
    repository: &Repository,
    inventory: &ClusterInventory,
    tip: Branch,
    target: &Target,
    no: &PlanError,
) -> Vec<String> {
    if no.located.is_some() || !matches!(no.kind, NoKind::NotFound | NoKind::BeforeFirstBackup) {
        return Vec::new();
    }
    let others = inventory.branches.keys().copied().filter(|branch| *branch != tip).take(TIPS_MAX);
    let tips = std::iter::once(tip).chain(others);
    let mut hints = Vec::new();
    match &target.point {
        Point::Xid(xid) => {
            for tip in tips {
                let query = Query { xid: Some(*xid), aborted: true, limit: 1, index_only: true, ..Query::default() };
                let found = ask(repository, inventory, tip, &query).await.unwrap_or_default();
                if let Some((logged, end)) = found.transactions.last().and_then(|l| Some((l, l.part.end.as_ref()?))) {
                    let what = if end.aborted { "was rolled back" } else { "committed" };
                    let (time, lsn, branch) = (end.time, end.start, logged.branch);
                    hints.push(format!(
                        "by the index, transaction {} {what} at {time} (LSN {lsn}) on branch {branch}",
                        logged.part.xid
                    ));
                    break;
                }
            }
        }
        Point::Name(name) => {
            for tip in tips {
                let query = Query { name: Some(name.clone()), limit: 1, index_only: true, ..Query::default() };
                let found = ask(repository, inventory, tip, &query).await.unwrap_or_default();
                if let Some(passed) = found.landmarks.last() {
                    let (lsn, branch) = (passed.landmark.start, passed.branch);
                    hints.push(format!("by the index, a restore point {name:?} is at {lsn} on branch {branch}"));
                    break;
                }
            }
            let query =
                Query { kinds: Some(Kinds::RESTORE_POINT), limit: NAMED_MAX, index_only: true, ..Query::default() };
            let found = ask(repository, inventory, tip, &query).await.unwrap_or_default();
            let known: Vec<String> = found
                .landmarks
                .iter()
                .filter_map(|passed| match &passed.landmark.what {
                    LandmarkKind::RestorePoint { name, time } => Some(format!("{name:?} of {time}")),
                    LandmarkKind::Parameters(_) => None,
                })
                .collect();
            if !known.is_empty() {
                hints.push(format!("the newest restore points on this way are, by the index: {}", known.join(", ")));
            }
        }
        Point::Time(_) | Point::Lsn(_) | Point::Immediate | Point::Latest => {}
    }
    hints
}

async fn ask(repository: &Repository, inventory: &ClusterInventory, tip: Branch, query: &Query) -> Option<Found> {
    match timeout(DEADLINE, repository.search_log(inventory, tip, query)).await {
        Ok(Ok(found)) => Some(found),
        Ok(Err(error)) => {
            tracing::debug!(%tip, %error, "the index was not asked");
            None
        }
        Err(_) => {
            tracing::debug!(%tip, "the index did not answer in time");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::index::Passed;
    use crate::catalog::records::ServerParameters;
    use crate::types::{BackupLabel, PgTimestamp, SegmentSize, SystemId, TimelineId};
    use crate::wal::Landmark;
    use jiff::Timestamp;

    /// A base backup `[100, 200)`.
    fn oldest() -> BackupInfo {
        let branch = Branch::first(TimelineId::FIRST);
        let at = Timestamp::UNIX_EPOCH;
        BackupInfo {
            label: BackupLabel::at(at),
            system: SystemId::new(7),
            branch,
            timeline: branch.timeline,
            start: Lsn::new(100),
            stop: Lsn::new(200),
            started_at: at,
            stopped_at: at,
            server_version: 170_000,
            segment_size: SegmentSize::DEFAULT,
            bytes: 0,
            stored_bytes: 0,
            files: 0,
            tablespaces: Vec::new(),
            flagged: None,
            parameters: ServerParameters::default(),
        }
    }

    fn found(starts: &[u64], unindexed: &[(u64, u64)]) -> Found {
        let point = |start: &u64| {
            let time = PgTimestamp::new(0);
            let what = LandmarkKind::RestorePoint { name: "release".to_owned(), time };
            let landmark = Landmark { start: Lsn::new(*start), end: Lsn::new(*start + 10), what };
            Passed { landmark, branch: Branch::first(TimelineId::FIRST), time: Some(time) }
        };
        let unindexed = unindexed.iter().map(|(from, to)| (Lsn::new(*from), Lsn::new(*to))).collect();
        Found { landmarks: starts.iter().map(point).collect(), unindexed, ..Found::default() }
    }

    #[test]
    fn the_first_of_a_name_is_known_only_where_all_before_it_is() {
        let at = |starts: &[u64], unindexed: &[(u64, u64)]| {
            first_of_name(&found(starts, unindexed), &oldest()).map(|said| (said.at.get(), said.warning.is_some()))
        };
        assert_eq!(at(&[300], &[]), Some((300, false)));
        assert_eq!(at(&[300, 400], &[(310, 900)]), Some((300, true)), "what is not indexed lies behind it");
        assert_eq!(at(&[50, 300], &[(0, 100)]), Some((300, false)), "before the base backup nothing counts");
        assert_eq!(at(&[300], &[(120, 130)]), None, "there may be an earlier one");
        assert_eq!(at(&[150, 300], &[]), None, "within the base backup");
        assert_eq!(at(&[190, 300], &[]), Some((190, true)), "it ends with the base backup");
        assert_eq!(at(&[], &[]), None);
        let many = Found { more: true, ..found(&[300], &[]) };
        assert_eq!(first_of_name(&many, &oldest()), None);
    }
}
