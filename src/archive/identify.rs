//! Whose history the server writes: asks it for bytes, and has [`super::branching`] decide. Changes nothing anywhere.
//!
//! Where each number was used once, nothing is asked here: the stream compares the overlap before anything counts, and
//! whoever differs there comes back to have everything compared.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::timeout;

use super::ArchiveError;
use super::branching::{Candidate, Choice, Next, Verdict, next};
use super::load::{Archived, Served};
use super::source::Source;
use crate::pg::{ServerErrorKind, segment_digest};
use crate::types::{Branch, Digest, Lsn, TimelineId};

/// One segment takes no longer.
const DEADLINE: Duration = Duration::from_secs(300);
/// A comparison of fewer bytes than this says little: the segment before is compared, too.
const LITTLE: u64 = 8192;

/// Who the server is.
#[derive(Debug, Default)]
pub(super) struct Identity {
    pub choice: Choice,
    /// Of the branches that differ: the start of the segment where that was seen.
    pub differs: BTreeMap<Branch, Lsn>,
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
        let mut best = Verdict::Differs;
        if everything || candidates.iter().any(is_other) {
            for archived in archived.iter().filter(|archived| archived.knows(branch)) {
                let (verdict, from) = compare(source, served, archived, branch).await?;
                tracing::debug!(cluster = %served.id, %branch, repository = archived.repository.name(), ?verdict, "compared with the server");
                // The last attempt took it for this one, and that was wrong.
                let verdict = if everything && verdict == Verdict::Unknown { Verdict::Differs } else { verdict };
                if verdict == Verdict::Differs {
                    differs.insert(branch, from);
                }
                best = best.max(verdict);
            }
        } else {
            best = Verdict::Same; // the stream will see
        }
        verdicts.insert(branch, best);
    }
}

/// The end of what both have of a branch; and the start of the segment where it was compared.
async fn compare(
    source: &Source,
    served: &Served,
    archived: &Archived,
    branch: Branch,
) -> Result<(Verdict, Lsn), ArchiveError> {
    let (size, state) = (served.size, &served.state);
    let Some(held) = archived.held_to(branch) else { return Ok((Verdict::Empty, Lsn::ZERO)) };
    let left_at = state.history.left_at(branch.timeline);
    let until = held.min(left_at.unwrap_or(state.flushed)).min(state.flushed);
    let start = until.segment_before(size).start(size);
    let mut verdict = at(source, served, archived, branch, until).await?;
    let is_little = until.bytes_since(start).is_none_or(|bytes| bytes < LITTLE);
    if verdict == Verdict::Same && is_little && start > Lsn::ZERO {
        verdict = match at(source, served, archived, branch, start).await? {
            Verdict::Differs => return Ok((Verdict::Differs, start.segment_before(size).start(size))),
            _ => verdict,
        };
    }
    let is_ahead = left_at.is_none() && held > until;
    Ok((if verdict == Verdict::Same && is_ahead { Verdict::Ahead } else { verdict }, start))
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
