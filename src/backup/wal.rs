//! Waits until a repository holds the WAL without which a base backup cannot be restored.
//!
//! What always holds: the answer is yes only when every byte from the first of the start position's segment to the stop
//! position was listed in that repository, on the history whose bytes are the server's: a number does not tell one. Whoever archives (a `pgkeep run`, or
//! the command itself) works beside; here the repository is only asked.

use std::time::Duration;

use super::BackupError;
use crate::catalog::{CatalogError, Repository};
use crate::types::{BackupLabel, Branch, ClusterId, Digest, Lsn, SegmentSize, TimelineId};

/// How often the repository is asked, at first and at most.
const EVERY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(2));

/// The WAL of a base backup.
#[derive(Debug, Clone)]
pub(super) struct Needed {
    pub cluster: ClusterId,
    pub label: BackupLabel,
    pub timeline: TimelineId,
    /// Digest of the bytes before `stop` in the segment that holds the last of them, as the server has them; `None` where it
    /// did not tell.
    pub digest: Option<Digest>,
    pub start: Lsn,
    pub stop: Lsn,
    pub segment_size: SegmentSize,
}

/// Waits for as long as it takes, and says on which branch the WAL is; `reached` is told how far the repository's goes.
pub(super) async fn wait(
    repository: &Repository,
    needed: &Needed,
    mut reached: impl FnMut(Option<Lsn>),
) -> Result<Branch, BackupError> {
    let (mut every, mut told) = (EVERY.0, String::new());
    loop {
        match ask(repository, needed, &mut reached).await {
            Ok(Some(branch)) => return Ok(branch),
            Ok(None) => {}
            Err(BackupError::Repository(error)) if error.is_retryable() => {
                if told != error.to_string() {
                    told = error.to_string();
                    tracing::warn!(%error, "the repository was asked for the backup's WAL; asking again");
                }
            }
            Err(error) => return Err(error),
        }
        tokio::time::sleep(every).await;
        every = (every * 2).min(EVERY.1);
    }
}

async fn ask(
    repository: &Repository,
    needed: &Needed,
    reached: &mut impl FnMut(Option<Lsn>),
) -> Result<Option<Branch>, BackupError> {
    let Needed { cluster, timeline, stop, .. } = needed;
    let branches = repository.branches(cluster).await?;
    let branches: Vec<Branch> = branches.into_iter().filter(|branch| branch.timeline == *timeline).collect();
    let mut far = Vec::new();
    let mut furthest = None;
    for branch in &branches {
        // Cheap, and asked often: where the newest WAL ends.
        let frontier = repository.resume(cluster, *branch).await?.map(|resume| resume.at);
        furthest = furthest.max(frontier);
        if frontier.is_some_and(|frontier| frontier >= *stop) {
            far.push(*branch);
        }
    }
    reached(furthest);
    for branch in far {
        if is_servers(repository, needed, branch, branches.len()).await? && holds(repository, needed, branch).await? {
            return Ok(Some(branch));
        }
    }
    Ok(None)
}

/// Is this the history that the server writes? Where it cannot be compared, the only one of its number is.
async fn is_servers(
    repository: &Repository,
    needed: &Needed,
    branch: Branch,
    of_number: usize,
) -> Result<bool, BackupError> {
    let Needed { cluster, stop, segment_size: size, .. } = needed;
    let segment = stop.segment_before(*size);
    // invariant: a segment is at most 1 GiB
    let offset = u32::try_from(stop.bytes_since(segment.start(*size)).unwrap_or(0)).unwrap_or(u32::MAX);
    let archived = match needed.digest {
        Some(_) => repository.digest_at(cluster, branch, segment, *size, offset).await?,
        None => None,
    };
    match (archived, needed.digest) {
        (Some(archived), Some(servers)) => Ok(archived == servers),
        _ if of_number == 1 => Ok(true),
        _ => Err(BackupError::WhichHistory { label: needed.label, timeline: needed.timeline }),
    }
}

/// Dear, and asked once: whether all of it is there.
async fn holds(repository: &Repository, needed: &Needed, branch: Branch) -> Result<bool, BackupError> {
    let Needed { cluster, start, stop, segment_size, .. } = needed;
    let inventory = repository.load(cluster).await?;
    let Some(path) = inventory.path_of(branch) else { return Ok(false) }; // the history file is on its way
    match inventory.covers_on(branch, &path, start.segment_start(*segment_size), *stop) {
        Ok(_) => Ok(true),
        // What the newest pieces lack may be on its way; what lies before them is not coming any more.
        Err(hole) if inventory.frontier(branch).is_none_or(|frontier| frontier <= hole.from) => Ok(false),
        Err(hole) => match inventory.damaged.first() {
            Some(damaged) => {
                let (repository, name) = (repository.name().to_owned(), damaged.name.clone());
                Err(CatalogError::Inconsistent { repository, name, reason: damaged.reason.clone() }.into())
            }
            None => Err(BackupError::WalMissing { label: needed.label, hole }),
        },
    }
}
