use std::io;
use std::path::{Path, PathBuf};

use crate::pg::instance::InstanceError;
use crate::restore::RestoreError;

/// Why a drill was not done. That something is wrong with the archive is no error: it is what a drill is for.
#[derive(Debug, thiserror::Error)]
pub enum DrillError {
    /// The scratch directory cannot be used.
    #[error("{dir} cannot be used for a drill: {reason}; nothing was changed", dir = .dir.display())]
    Scratch {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Another drill is at work there.
    #[error("another drill is at work in {dir}; nothing was changed", dir = .dir.display())]
    Busy {
        /// The directory.
        dir: PathBuf,
    },
    /// Too little space.
    #[error("{dir} is too small for this drill: {reason}; nothing was written", dir = .dir.display())]
    Space {
        /// The directory.
        dir: PathBuf,
        /// What is needed, and what there is.
        reason: String,
    },
    /// Programs of another major.
    #[error(
        "the base backup is of PostgreSQL {needed} and needs the programs of that major, and those in {at} are of {found}; \
         nothing was written; hint: give the bindir of a PostgreSQL {needed}",
        at = .at.display()
    )]
    Major {
        /// The base backup's.
        needed: u32,
        /// What is there.
        found: String,
        /// Where.
        at: PathBuf,
    },
    /// No programs of the major.
    #[error(
        "the base backup is of PostgreSQL {needed}, and no programs of that major were found on this host; nothing was written; \
         hint: install PostgreSQL {needed}, or say where it is with bindir"
    )]
    NoMajor {
        /// The base backup's.
        needed: u32,
    },
    /// The server could not be run at all.
    #[error(transparent)]
    Server(#[from] InstanceError),
    /// The restore was refused before its first byte, or failed for a reason on this host.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A file or directory.
    #[error("{action} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried: a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// It was stopped, and removed.
    #[error("the drill was stopped; what it had written is removed")]
    Stopped,
    /// A worker ended without an answer.
    #[error("a worker ended without an answer: {0}")]
    Task(String),
}

impl DrillError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> DrillError {
        DrillError::Io { action, path: path.to_owned(), source }
    }

    /// Whether the same call may succeed later. No `_` arm: whoever adds a variant decides here.
    pub fn is_retryable(&self) -> bool {
        match self {
            DrillError::Busy { .. }
            | DrillError::Space { .. }
            | DrillError::Io { .. }
            | DrillError::Server(_)
            | DrillError::Stopped
            | DrillError::Task(_) => true,
            DrillError::Restore(error) => error.is_retryable(),
            DrillError::Scratch { .. } | DrillError::Major { .. } | DrillError::NoMajor { .. } => false,
        }
    }

    /// Whether it protects what is there (exit code 4).
    pub fn is_refusal(&self) -> bool {
        match self {
            DrillError::Scratch { .. } | DrillError::Busy { .. } => true,
            DrillError::Restore(error) => error.is_refusal(),
            _ => false,
        }
    }
}
