use crate::catalog::CatalogError;
use crate::types::{SegmentSize, SystemId};

/// Why nothing, or nothing more, was copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// One of the repositories.
    #[error(transparent)]
    Repository(#[from] CatalogError),
    /// The target archives another server under this name.
    #[error(
        "repository {repository} holds a cluster called {name} with system identifier {archived}, and what was to be copied \
         has {copied}: another server; nothing was changed"
    )]
    ForeignCluster {
        /// The cluster's name.
        name: String,
        /// The target.
        repository: String,
        /// Whose WAL is there.
        archived: SystemId,
        /// Whose was to come.
        copied: SystemId,
    },
    /// The two say different things about the cluster's segments.
    #[error(
        "the segments of the cluster have {one} in the one repository and {other} in the other; nothing was changed"
    )]
    SegmentSize {
        /// In the source.
        one: SegmentSize,
        /// In the target.
        other: SegmentSize,
    },
    /// Both names lead to one place.
    #[error("repositories {from} and {to} are the same one; nothing was changed")]
    SameRepository {
        /// The source.
        from: String,
        /// The target.
        to: String,
    },
}

impl CopyError {
    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            CopyError::Repository(error) => error.is_retryable(),
            CopyError::ForeignCluster { .. } | CopyError::SegmentSize { .. } | CopyError::SameRepository { .. } => {
                false
            }
        }
    }

    /// Whether it protects data (exit code 4).
    pub fn is_refusal(&self) -> bool {
        match self {
            CopyError::Repository(error) => error.is_refusal(),
            CopyError::ForeignCluster { .. } | CopyError::SegmentSize { .. } => true,
            CopyError::SameRepository { .. } => false,
        }
    }
}
