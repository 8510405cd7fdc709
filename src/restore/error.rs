use std::io;
use std::path::{Path, PathBuf};

use crate::catalog::CatalogError;
use crate::catalog::table::TableError;
use crate::types::{BackupLabel, ClusterId, ClusterName};
use crate::wal::WalDamage;

use super::place::Occupied;

/// Why a restore was not begun or not finished. A directory that was begun has no `pg_control` and says so in a file.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The repository, or an object in it, which the message names.
    #[error(transparent)]
    Repository(#[from] CatalogError),
    /// A repository did not answer, and another one was there to ask.
    #[error("repository {repository} gave no answer within {seconds} s")]
    Silent {
        /// The repository.
        repository: String,
        /// How long it was given.
        seconds: u64,
    },
    /// Nothing is archived under this name.
    #[error("repository {repository} holds nothing of {wanted}{known}; hint: `pgkeep list` shows what is there")]
    NoCluster {
        /// The repository.
        repository: String,
        /// What was sought.
        wanted: String,
        /// What is there, as the end of the sentence.
        known: String,
    },
    /// Several system identifiers, or several names, come into question.
    #[error("repository {repository} holds several clusters that could be meant: {found}; hint: {hint}")]
    SeveralClusters {
        /// The repository.
        repository: String,
        /// All of them.
        found: String,
        /// What to do.
        hint: &'static str,
    },
    /// The key seals and does not open.
    #[error(
        "the key of repository {repository} can only write: restoring needs the one with the identity; nothing was written"
    )]
    WriteOnlyKey {
        /// The repository.
        repository: String,
    },
    /// There is something in the directory.
    #[error("{dir} {what}; nothing was changed", dir = .dir.display())]
    Occupied {
        /// The directory.
        dir: PathBuf,
        /// What it holds.
        what: Occupied,
    },
    /// The place to write to cannot be used.
    #[error("{path} cannot be restored into: {reason}; nothing was changed", path = .path.display())]
    Place {
        /// The directory as understood.
        path: PathBuf,
        /// Why not, or what to do.
        reason: String,
    },
    /// `--tablespace` names one that the backup does not have, or one twice.
    #[error("--tablespace {given}: {reason}; base backup {label} has {known}; nothing was changed")]
    Tablespace {
        /// As given.
        given: String,
        /// What is wrong with it.
        reason: String,
        /// The base backup.
        label: BackupLabel,
        /// Its tablespaces.
        known: String,
    },
    /// `--database` names one that the backup does not have, or one that cannot be told from another.
    #[error("--database {given}: {reason}; base backup {label} has {known}; nothing was changed")]
    Database {
        /// As given.
        given: String,
        /// What is wrong with it.
        reason: &'static str,
        /// The base backup.
        label: BackupLabel,
        /// Its databases.
        known: String,
    },
    /// A path that `restore_command` cannot hold.
    #[error("restore_command cannot name {what}: {reason}; nothing was changed")]
    Command {
        /// The path.
        what: String,
        /// Why not.
        reason: &'static str,
    },
    /// A file or directory of the target.
    #[error("{action} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried: a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A piece of the file table opens and is not understood.
    #[error("{name} opens, but {source}")]
    Table {
        /// The object.
        name: String,
        /// Why.
        source: TableError,
    },
    /// The base backup's objects open and contradict each other.
    #[error("base backup {label} contradicts itself: {reason}")]
    Contradiction {
        /// The base backup.
        label: BackupLabel,
        /// What does not fit.
        reason: String,
    },
    /// The backup's own WAL does not check out.
    #[error("the WAL of base backup {label} is damaged: {source}")]
    Wal {
        /// The base backup.
        label: BackupLabel,
        /// Where and how.
        source: WalDamage,
    },
    /// A worker ended without an answer.
    #[error("a worker ended without an answer: {0}")]
    Task(String),
}

impl RestoreError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> RestoreError {
        RestoreError::Io { action, path: path.to_owned(), source }
    }

    pub(super) fn place(path: &Path, reason: impl Into<String>) -> RestoreError {
        RestoreError::Place { path: path.to_owned(), reason: reason.into() }
    }

    pub(super) fn no_cluster(repository: &str, wanted: Option<&ClusterName>, known: &[ClusterId]) -> RestoreError {
        let wanted = wanted.map_or_else(|| "any cluster".to_owned(), |name| format!("cluster {name}"));
        let names: Vec<String> = known.iter().map(ClusterId::to_string).collect();
        let known = if names.is_empty() { String::new() } else { format!(" (it holds {})", names.join(", ")) };
        RestoreError::NoCluster { repository: repository.to_owned(), wanted, known }
    }

    /// Whether the same call may succeed later. No `_` arm: whoever adds a variant decides here.
    pub fn is_retryable(&self) -> bool {
        match self {
            RestoreError::Repository(error) => error.is_retryable(),
            RestoreError::Io { .. } | RestoreError::Task(_) | RestoreError::Silent { .. } => true,
            RestoreError::NoCluster { .. }
            | RestoreError::SeveralClusters { .. }
            | RestoreError::WriteOnlyKey { .. }
            | RestoreError::Occupied { .. }
            | RestoreError::Place { .. }
            | RestoreError::Tablespace { .. }
            | RestoreError::Database { .. }
            | RestoreError::Command { .. }
            | RestoreError::Table { .. }
            | RestoreError::Contradiction { .. }
            | RestoreError::Wal { .. } => false,
        }
    }

    /// Whether another repository may do better.
    pub(super) fn is_of_a_repository(&self) -> bool {
        match self {
            RestoreError::Repository(_)
            | RestoreError::Silent { .. }
            | RestoreError::Table { .. }
            | RestoreError::Contradiction { .. }
            | RestoreError::Wal { .. } => true,
            RestoreError::Io { .. }
            | RestoreError::Task(_)
            | RestoreError::NoCluster { .. }
            | RestoreError::SeveralClusters { .. }
            | RestoreError::WriteOnlyKey { .. }
            | RestoreError::Occupied { .. }
            | RestoreError::Place { .. }
            | RestoreError::Tablespace { .. }
            | RestoreError::Database { .. }
            | RestoreError::Command { .. } => false,
        }
    }

    /// Whether it protects data (exit code 4).
    pub fn is_refusal(&self) -> bool {
        match self {
            RestoreError::Repository(error) => error.is_refusal(),
            RestoreError::Occupied { .. } => true,
            _ => false,
        }
    }

    /// Whether something else has to be typed or configured (exit code 2).
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            RestoreError::NoCluster { .. }
                | RestoreError::SeveralClusters { .. }
                | RestoreError::WriteOnlyKey { .. }
                | RestoreError::Place { .. }
                | RestoreError::Tablespace { .. }
                | RestoreError::Database { .. }
                | RestoreError::Command { .. }
        )
    }
}
