use crate::catalog::CatalogError;
use crate::catalog::inventory::Hole;
use crate::pg::PgError;
use crate::pg::control_file::ControlFileError;
use crate::pg::tar::TarError;
use crate::types::{BackupLabel, SystemId, TimelineId};

use super::server_manifest::ManifestError;

/// Why there is no base backup. Whatever was put by then is referenced by nothing and harmless.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The server, or the way to it.
    #[error(transparent)]
    Server(#[from] PgError),
    /// The repository.
    #[error(transparent)]
    Repository(#[from] CatalogError),
    /// The name belongs to another cluster.
    #[error(
        "{name:?} in repository {repository} is the cluster with system identifier {archived}, but the server at \
         {server} has {got}; nothing was written.\n\
         hint: is this the right server? After initdb or pg_upgrade, give the cluster a new name (name_in_repository)"
    )]
    ForeignCluster {
        /// The cluster's name in the repository.
        name: String,
        /// The repository.
        repository: String,
        /// What the name stands for there.
        archived: SystemId,
        /// What the server says.
        got: SystemId,
        /// The server.
        server: String,
    },
    /// Every name that was tried belonged to another backup.
    #[error(
        "the name {label} and those of the seconds before it are taken by other backups: does something start a backup \
         every second, or was the clock set back?"
    )]
    NoLabel {
        /// The last that was tried.
        label: BackupLabel,
    },
    /// An archive of the server is not one.
    #[error("{archive}: {source}")]
    Archive {
        /// Which.
        archive: String,
        /// What is wrong with it.
        source: TarError,
    },
    /// What the server sent does not fit together.
    #[error("the server's base backup is not as it should be: {reason}")]
    Unexpected {
        /// What does not fit.
        reason: String,
    },
    /// A file whose name cannot be written down.
    #[error(
        "the data directory holds a file whose name is not UTF-8: {path}.\n\
         hint: PostgreSQL makes none such; move it elsewhere, or remove it"
    )]
    Name {
        /// The name, as far as it can be shown.
        path: String,
    },
    /// What arrived is not what the server's own manifest says was sent.
    #[error(
        "the files that arrived are not those of the server's backup_manifest: {source}.\n\
         hint: try again; if it happens again, suspect the network or the memory of one of the two machines"
    )]
    Manifest {
        /// The first difference.
        #[from]
        source: ManifestError,
    },
    /// `global/pg_control` as it was sent is not readable.
    #[error("global/pg_control as the server sent it: {source}")]
    Control {
        /// What is wrong with it.
        #[from]
        source: ControlFileError,
    },
    /// The server went on to another timeline.
    #[error(
        "the server changed from timeline {from} to {to} while the backup was taken (a standby was promoted, or followed \
         one that was): such a backup cannot be restored and was given up.\n\
         hint: take another one"
    )]
    TimelineChanged {
        /// Where it began.
        from: TimelineId,
        /// Where it ended.
        to: TimelineId,
    },
    /// WAL that the backup needs is not in the repository, and never will be.
    #[error(
        "base backup {label} cannot be completed: {hole}, and archiving is past it.\n\
         hint: the server's slot did not keep it when the backup began; take another backup, while `pgkeep run` streams"
    )]
    WalMissing {
        /// The backup.
        label: BackupLabel,
        /// What is missing.
        hole: Hole,
    },
    /// Several histories of the timeline are archived, and which of them the server writes cannot be told.
    #[error(
        "base backup {label} cannot be completed: several histories of timeline {timeline} are archived, and this key, or \
         what the server still has, does not tell which one the backup is of.\n\
         hint: take it where the key of the repository can read"
    )]
    WhichHistory {
        /// The backup.
        label: BackupLabel,
        /// The timeline.
        timeline: TimelineId,
    },
    /// The parent that was asked for is not there.
    #[error(
        "there is no base backup {label} to compare with.\n\
         hint: `pgkeep list` shows those that there are; with --full it is compared with none"
    )]
    NoParent {
        /// What was asked for.
        label: BackupLabel,
    },
    /// The parent that was asked for cannot be read.
    #[error(
        "base backup {label} cannot be compared with: {source}.\n\
         hint: name another one with --parent, or none with --full"
    )]
    ParentUnreadable {
        /// What was asked for.
        label: BackupLabel,
        /// Why not.
        source: CatalogError,
    },
    /// What the backup references of others was removed while it was taken.
    #[error(
        "base backup {label} cannot be completed: it references {object}, which is not there any more.\n\
         hint: somebody removed it meanwhile; take the backup again, what is gone is stored again then"
    )]
    ParentGone {
        /// The backup.
        label: BackupLabel,
        /// One of what is gone.
        object: String,
    },
    /// Every block of a file has the tag of the parent's, and the file is another.
    #[error(
        "{path} has the blocks that base backup {parent} has, by their tags, and another checksum: this backup was given \
         up.\n\
         hint: nothing of this kind should ever happen; take it with --full, and verify {parent} by restoring it"
    )]
    Belief {
        /// The file.
        path: String,
        /// Whose tags were believed.
        parent: BackupLabel,
    },
    /// The caller said stop.
    #[error(
        "stopped before the base backup was complete; what it had stored is removed as far as possible, and is used by nothing"
    )]
    Cancelled,
    /// A mistake of ours.
    #[error("a task of the base backup ended abnormally: {0}")]
    Task(String),
}

impl BackupError {
    /// May another attempt, a little later, succeed without anybody doing anything? No `_` arm: whoever adds a variant
    /// decides here.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Server(error) => error.is_retryable(),
            Self::Repository(error) => error.is_retryable(),
            Self::NoLabel { .. }
            | Self::Archive { .. }
            | Self::Unexpected { .. }
            | Self::Manifest { .. }
            | Self::Control { .. }
            | Self::TimelineChanged { .. }
            | Self::WalMissing { .. }
            | Self::ParentGone { .. }
            | Self::Cancelled
            | Self::Task(_) => true,
            Self::ForeignCluster { .. }
            | Self::Name { .. }
            | Self::WhichHistory { .. }
            | Self::NoParent { .. }
            | Self::ParentUnreadable { .. }
            | Self::Belief { .. } => false,
        }
    }

    /// Whether this protects data and a person has to decide (exit code 4).
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::ForeignCluster { .. } => true,
            Self::Repository(error) => error.is_refusal(),
            _ => false,
        }
    }

    pub(super) fn unexpected(reason: impl Into<String>) -> BackupError {
        BackupError::Unexpected { reason: reason.into() }
    }

    /// A panic in a task of ours.
    pub(super) fn task(error: tokio::task::JoinError) -> BackupError {
        BackupError::Task(error.to_string())
    }
}
