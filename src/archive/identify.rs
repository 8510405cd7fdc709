//! Whose history the server writes: asks it for bytes, and has [`super::branching`] decide. Changes nothing anywhere.
//!
//! Where each number was used once, little is asked here: the stream compares the overlap before anything counts, and
//! whoever differs there comes back to have everything compared. Only where that overlap is short the segment before it is
//! compared here: two histories that parted in it may agree on a page's header and a record behind it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::timeout;

use super::ArchiveError;
use super::branching::{Candidate, Choice, Next, Verdict, next};
use super::load::{Archived, Served, load};
use super::source::Source;
use crate::catalog::Repository;
use crate::pg::{ServerErrorKind, segment_digest};
use crate::types::{Branch, ClusterId, ClusterName, Digest, Lineage, Lsn, SegmentSize, TimelineHistory, TimelineId};

/// One segment takes no longer.
const DEADLINE: Duration = Duration::from_secs(300);
/// Where the stream would compare too, it is not waited for longer.
const SHORT: Duration = Duration::from_secs(60);
/// A comparison of fewer bytes than this says little: the segment before is compared, too.
const LITTLE: u64 = 8192;

/// Who the server is.
#[derive(Debug, Default)]
pub(super) struct Identity {
    pub choice: Choice,
    /// Of the branches that differ: the start of the segment where that was seen.
    pub differs: BTreeMap<Branch, Lsn>,
}

/// The way through the archived histories that a server has come.
#[derive(Debug, Clone)]
pub struct ServedPath {
    /// The server's timelines.
    pub history: TimelineHistory,
    /// Which branch each of them is; one of which nothing is archived is called as it would be.
    pub lineage: Lineage,
}

/// Which of the histories in a repository the server continues, as an archiver would find it. Changes nothing.
///
/// # Errors
/// What the server or the repository says; [`ArchiveError::ForeignCluster`] where the name stands for another cluster.
pub async fn served_path(
    source: &Source,
    repository: &Repository,
    cluster: &ClusterName,
) -> Result<ServedPath, ArchiveError> {
    let connected = source.connect().await?;
    let id = ClusterId { name: cluster.clone(), system: connected.system };
    let served = Served::new(&connected, id, source.conninfo.describe());
    let archived = load(repository.clone(), &served).await?;
    let lineage = identify(source, &served, &[&archived], false).await?.choice.lineage;
    Ok(ServedPath { history: served.state.history, lineage })
}

/// Compares the server with what these repositories hold. `everything`: also the only history of a number, and one that
/// cannot be compared is not the server's, because it was taken for that before and was not.
pub(super) async fn identify(
    source: &Source,
    served: &Served,
    archived: &[&Archived],
    everything: bool,
) -> Result<Identity, ArchiveError> {
    let path: Vec<TimelineId> = served.state.history.path().into_iter().map(|stretch| stretch.0).collect();
    let candidates: Vec<Candidate> = archived.iter().flat_map(|archived| archived.candidates(served)).collect();
    let named: BTreeSet<Branch> = archived.iter().flat_map(|archived| archived.named()).collect();
    let (mut verdicts, mut differs) = (BTreeMap::new(), BTreeMap::new());
    loop {
        let branch = match next(&path, &candidates, &named, &verdicts) {
            Next::Decided(choice) => return Ok(Identity { choice, differs }),
            Next::Compare(branch) => branch,
        };
        let is_other = |other: &Candidate| other.branch.timeline == branch.timeline && other.branch != branch;
        let everything_of_it = everything || candidates.iter().any(is_other);
        let mut best = Verdict::Differs;
        for archived in archived.iter().filter(|archived| archived.knows(branch)) {
            let (verdict, from) = match everything_of_it {
                true => compare(source, served, archived, branch).await?,
                false => compare_before_if_possible(source, served, archived, branch).await?,
            };
            tracing::debug!(cluster = %served.id, %branch, repository = archived.repository.name(), ?verdict, "compared with the server");
            // The last attempt took it for this one, and that was wrong.
            let verdict = if everything && verdict == Verdict::Unknown { Verdict::Differs } else { verdict };
            if verdict == Verdict::Differs {
                differs.insert(branch, from);
            }
            best = best.max(verdict);
        }
        verdicts.insert(branch, best);
    }
}

/// What both have of a branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Common {
    /// Its end; the stream compares the bytes before it, from `start` on.
    until: Lsn,
    /// Start of the segment that holds the last byte before `until`.
    start: Lsn,
    /// The repository holds more, of a timeline that the server is on.
    is_ahead: bool,
}

impl Common {
    /// `held` is the end of what is archived, `left_at` where the server's history left the timeline.
    fn of(held: Lsn, left_at: Option<Lsn>, flushed: Lsn, size: SegmentSize) -> Common {
        let until = held.min(left_at.unwrap_or(flushed)).min(flushed);
        let start = until.segment_before(size).start(size);
        Common { until, start, is_ahead: left_at.is_none() && held > until }
    }

    /// The end of the segment before, where it is to be compared, too.
    fn before(&self) -> Option<Lsn> {
        let is_little = self.until.bytes_since(self.start).is_none_or(|bytes| bytes < LITTLE);
        (is_little && self.start > Lsn::ZERO).then_some(self.start)
    }
}

fn common(served: &Served, archived: &Archived, branch: Branch) -> Option<Common> {
    let state = &served.state;
    let held = archived.held_to(branch)?;
    Some(Common::of(held, state.history.left_at(branch.timeline), state.flushed, served.size))
}

/// What both have of a branch, compared; and the start of the segment where it was.
async fn compare(
    source: &Source,
    served: &Served,
    archived: &Archived,
    branch: Branch,
) -> Result<(Verdict, Lsn), ArchiveError> {
    let Some(common) = common(served, archived, branch) else { return Ok((Verdict::Empty, Lsn::ZERO)) };
    match at(source, served, archived, branch, common.until).await? {
        Verdict::Same => {}
        verdict => return Ok((verdict, common.start)),
    }
    let same = if common.is_ahead { Verdict::Ahead } else { Verdict::Same };
    Ok(match compare_before(source, served, archived, branch).await? {
        (Verdict::Differs, from) => (Verdict::Differs, from),
        _ => (same, common.start),
    })
}

/// The segment before the one with which a stream would begin, where the stream has little to compare. All the rest counts
/// as equal: the stream will see.
async fn compare_before(
    source: &Source,
    served: &Served,
    archived: &Archived,
    branch: Branch,
) -> Result<(Verdict, Lsn), ArchiveError> {
    let start = common(served, archived, branch).and_then(|common| common.before());
    let Some(start) = start else { return Ok((Verdict::Same, Lsn::ZERO)) };
    match at(source, served, archived, branch, start).await? {
        Verdict::Differs => Ok((Verdict::Differs, start.segment_before(served.size).start(served.size))),
        _ => Ok((Verdict::Same, Lsn::ZERO)), // gone at the server, or not here: nothing contradicts
    }
}

/// The same, where the stream will compare, too: it needs neither that segment nor another connection, and goes on without.
async fn compare_before_if_possible(
    source: &Source,
    served: &Served,
    archived: &Archived,
    branch: Branch,
) -> Result<(Verdict, Lsn), ArchiveError> {
    let why = match timeout(SHORT, compare_before(source, served, archived, branch)).await {
        Ok(Err(error @ ArchiveError::AnotherServer)) => return Err(error),
        Ok(Ok(compared)) => return Ok(compared),
        Ok(Err(error)) => error,
        Err(_) => ArchiveError::NoDigest { after: SHORT },
    };
    tracing::info!(cluster = %served.id, %branch, "the segment before the last one is not compared: {why}");
    Ok((Verdict::Same, Lsn::ZERO))
}

/// The bytes before `until` in the segment that holds the last of them.
async fn at(
    source: &Source,
    served: &Served,
    archived: &Archived,
    branch: Branch,
    until: Lsn,
) -> Result<Verdict, ArchiveError> {
    if until == Lsn::ZERO {
        return Ok(Verdict::Unknown);
    }
    let Some(ours) = archived.digest_before(served, branch, until).await? else { return Ok(Verdict::Unknown) };
    Ok(match digest_at_server(source, served, branch.timeline, until).await? {
        None => Verdict::Unknown,
        Some(theirs) if theirs == ours => Verdict::Same,
        Some(_) => Verdict::Differs,
    })
}

/// `None` where the server has removed the segment.
async fn digest_at_server(
    source: &Source,
    served: &Served,
    timeline: TimelineId,
    until: Lsn,
) -> Result<Option<Digest>, ArchiveError> {
    let start = until.segment_before(served.size).start(served.size);
    let asked = timeout(DEADLINE, segment_digest(&source.conninfo, &source.connect, timeline, start, until)).await;
    match asked.map_err(|_| ArchiveError::NoDigest { after: DEADLINE })? {
        Ok((identity, digest)) => {
            let is_same = identity.system == served.id.system && identity.timeline == served.state.history.timeline();
            if is_same { Ok(digest) } else { Err(ArchiveError::AnotherServer) }
        }
        Err(error) if error.server_kind() == Some(ServerErrorKind::FileMissing) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn p6_a_short_overlap_is_not_believed_alone() {
        let size = SegmentSize::new(MIB).unwrap();
        let of = |held, left, flushed| Common::of(Lsn::new(held), left, Lsn::new(flushed), size);
        let on = |held, flushed| of(held, None, flushed);
        // Within a segment, far enough from its start.
        let far = on(5 * MIB + LITTLE, 9 * MIB);
        assert_eq!((far.until, far.start, far.before()), (Lsn::new(5 * MIB + LITTLE), Lsn::new(5 * MIB), None));
        // Just behind the border: the segment before as well.
        assert_eq!(on(5 * MIB + LITTLE - 1, 9 * MIB).before(), Some(Lsn::new(5 * MIB)));
        assert_eq!(on(5 * MIB + 1, 9 * MIB).before(), Some(Lsn::new(5 * MIB)));
        // At the border the whole segment comes again.
        assert_eq!((on(5 * MIB, 9 * MIB).start, on(5 * MIB, 9 * MIB).before()), (Lsn::new(4 * MIB), None));
        // Also where the server's end, or a fork, is what both have.
        let server_behind = on(9 * MIB, 5 * MIB + 7);
        assert!(server_behind.is_ahead && server_behind.before() == Some(Lsn::new(5 * MIB)));
        let left = of(9 * MIB, Some(Lsn::new(5 * MIB + 7)), 8 * MIB);
        assert!(!left.is_ahead && left.before() == Some(Lsn::new(5 * MIB)));
        assert_eq!(on(7, 9 * MIB).before(), None, "there is nothing before");
    }
}
