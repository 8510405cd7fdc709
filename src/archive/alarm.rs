//! WAL that came damaged: an alarm, and a note in every repository, so that no plan leads across it.
//!
//! What always holds: the bytes are archived as they came, and what follows them too; but in each repository the note first:
//! while one is put, nothing new is put there, and so nothing is acknowledged that came after the damage was noticed. Nor is
//! it copied anywhere before its note is. A repository gets a note only when it has compared equal.
//! Crash: a repository that did not get the note ends before the place where the damage was noticed. The next stream
//! begins with that segment and finds it again, where the damaged record began in it. (Of one that began in an earlier
//! segment it sees the pages alone.) Cancellation: a note is there whole or not at all.

use std::sync::Arc;

use super::ArchiveError;
use super::status::DamageSeen;
use crate::catalog::layout::ClusterObject;
use crate::catalog::records::{GapReason, GapRecord};
use crate::catalog::{CatalogError, Repository};
use crate::types::{Branch, ClusterId, Lsn};
use crate::wal::Unsound;

/// Notes of one stream or file that are put, at most; what is damaged beyond that is only told.
pub(super) const NOTES: usize = 1000;

/// `[from, to)` of the streamed branch cannot be replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Note {
    pub branch: Branch,
    pub from: Lsn,
    pub to: Lsn,
}

/// What was found in one stream.
#[derive(Debug, Default)]
pub(super) struct Alarms {
    notes: Vec<Note>,
    seen: Option<Arc<DamageSeen>>,
}

impl Alarms {
    /// Tells of it; what is to be noted.
    pub fn sound(&mut self, id: &ClusterId, branch: Branch, unsound: Unsound) -> Option<Note> {
        let Unsound { from, to, damage, goes_on } = unsound;
        if goes_on {
            tracing::error!(
                cluster = %id, %branch, damaged_to = %to,
                "the damaged WAL reaches to {to}; from there on it is sound again"
            );
        } else {
            tracing::error!(
                cluster = %id, %branch, damaged_from = %from,
                "DAMAGED WAL came from the server: {damage}. It is archived as it came, and archiving goes on; nothing can be \
                 restored across it from a base backup before it. `pgkeep run` takes one behind it by itself, unless there is none at all; \
                 look after the server's disk and memory"
            );
            let count = self.count() + 1;
            self.seen = Some(Arc::new(DamageSeen { branch, at: from, what: damage.to_string(), count }));
        }
        let note = Note { branch, from, to };
        if self.notes.len() >= NOTES {
            return None;
        }
        self.notes.push(note);
        Some(note)
    }

    /// How many stretches were found.
    pub fn count(&self) -> u64 {
        self.seen.as_ref().map_or(0, |seen| seen.count)
    }

    /// For the status.
    pub fn seen(&self) -> Option<Arc<DamageSeen>> {
        self.seen.clone()
    }

    /// Everything that is to be noted.
    pub fn notes(&self) -> Vec<Note> {
        self.notes.clone()
    }
}

/// Puts notes into a repository. One that is there stays as it is.
pub(crate) async fn put_note(
    repository: &Repository,
    id: &ClusterId,
    branch: Branch,
    (from, to): (Lsn, Lsn),
) -> Result<(), CatalogError> {
    let (noticed_at, writer) = (repository.now(), repository.writer());
    let record = GapRecord { branch, from, to, reason: GapReason::Damaged, noticed_at, writer };
    match repository.put_record(id, ClusterObject::Gap(branch, from, to), &record).await {
        Ok(_) | Err(CatalogError::Taken { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Puts these notes.
pub(super) async fn put_notes(repository: Repository, id: ClusterId, notes: Vec<Note>) -> Result<(), ArchiveError> {
    for note in notes {
        put_note(&repository, &id, note.branch, (note.from, note.to)).await?;
    }
    Ok(())
}

/// Puts the notes that `source` has of these branches.
pub(super) async fn copy_notes(
    repository: &Repository,
    id: &ClusterId,
    source: &Repository,
    branches: &[Branch],
) -> Result<(), ArchiveError> {
    for branch in branches {
        for gap in source.damage_of(id, *branch).await? {
            put_note(repository, id, gap.branch, (gap.from, gap.to)).await?;
        }
    }
    Ok(())
}
