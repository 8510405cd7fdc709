//! Waits until a repository holds the WAL without which a base backup cannot be restored.
//!
//! What always holds: the answer is yes only when every byte from the first of the start position's segment to the stop
//! position was listed in that repository, on the history of the backup's branch. Whoever archives (a `pgkeep run`, or
//! the command itself) works beside; here the repository is only asked.

use std::time::Duration;

use super::BackupError;
use crate::catalog::{CatalogError, Repository};
use crate::types::{BackupLabel, Branch, ClusterId, Lsn, SegmentSize};

/// How often the repository is asked, at first and at most.
const EVERY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(2));

/// The WAL of a base backup.
#[derive(Debug, Clone)]
pub(super) struct Needed {
    pub cluster: ClusterId,
    pub label: BackupLabel,
    pub branch: Branch,
    pub start: Lsn,
    pub stop: Lsn,
    pub segment_size: SegmentSize,
}

/// Waits for as long as it takes; `reached` is told how far the repository's WAL goes.
pub(super) async fn wait(
    repository: &Repository,
    needed: &Needed,
    mut reached: impl FnMut(Option<Lsn>),
) -> Result<(), BackupError> {
    let (mut every, mut told) = (EVERY.0, String::new());
    loop {
        match ask(repository, needed, &mut reached).await {
            Ok(true) => return Ok(()),
            Ok(false) => {}
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
) -> Result<bool, BackupError> {
    let Needed { cluster, branch, start, stop, segment_size, .. } = needed;
    // Cheap, and asked often: where the newest WAL ends.
    let resume = repository.resume(cluster, *branch).await?;
    let frontier = resume.map(|resume| resume.at);
    reached(frontier);
    if frontier.is_none_or(|frontier| frontier < *stop) {
        return Ok(false);
    }
    // Dear, and asked once: whether all of it is there.
    let inventory = repository.load(cluster).await?;
    let Some(path) = inventory.path_of(*branch) else { return Ok(false) }; // the history file is on its way
    match inventory.covers_on(*branch, &path, start.segment_start(*segment_size), *stop) {
        Ok(_) => Ok(true),
        // What the newest pieces lack may be on its way; what lies before them is not coming any more.
        Err(hole) if inventory.frontier(*branch).is_none_or(|frontier| frontier <= hole.from) => Ok(false),
        Err(hole) => match inventory.damaged.first() {
            Some(damaged) => {
                let (repository, name) = (repository.name().to_owned(), damaged.name.clone());
                Err(CatalogError::Inconsistent { repository, name, reason: damaged.reason.clone() }.into())
            }
            None => Err(BackupError::WalMissing { label: needed.label, hole }),
        },
    }
}
