use super::layout::UnknownName;
use super::records::RecordError;
use crate::seal::SealError;
use crate::store::StoreError;
use crate::types::Id128;

/// Why a repository could not be opened, written or read. Every message names the repository or the object.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The store failed; its message names the object.
    #[error("repository {repository}: {source}")]
    Store {
        /// The repository's name in the configuration.
        repository: String,
        /// What the store said.
        source: StoreError,
    },
    /// No `format/0001.json`.
    #[error("{place} holds no pgkeep repository; hint: is the path right, is it mounted? `pgkeep init` creates one")]
    NotARepository {
        /// Where it was sought.
        place: String,
    },
    /// `format/0001.json` is not understood.
    #[error("repository {repository}: format/0001.json is not what pgkeep wrote there: {reason}; nothing was changed")]
    BadFormat {
        /// The repository's name.
        repository: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Made by a newer pgkeep.
    #[error(
        "repository {repository} has format {found}, and this version of pgkeep knows format 1; \
         nothing was changed; hint: use a newer pgkeep"
    )]
    NewerFormat {
        /// The repository's name.
        repository: String,
        /// Its format.
        found: u32,
    },
    /// Needs something that this version cannot do.
    #[error(
        "repository {repository} needs the feature {feature:?} to be {doing}, which this version of pgkeep does not have; \
         nothing was changed; hint: use a newer pgkeep"
    )]
    UnknownFeature {
        /// The repository's name.
        repository: String,
        /// The feature.
        feature: String,
        /// `read` or `written`.
        doing: &'static str,
    },
    /// The key file is another realm's.
    #[error(
        "the key given for repository {repository} does not open it: the repository belongs to realm {realm}, the key to \
         realm {key_realm}; nothing was changed; hint: point key_file at the key that was made with this repository"
    )]
    WrongKey {
        /// The repository's name.
        repository: String,
        /// The repository's realm.
        realm: Id128,
        /// The realm that the key would have made.
        key_realm: Id128,
    },
    /// The meta key's envelope is missing, because `init` was cut off or somebody removed it.
    #[error("repository {repository} is not complete: {name} is missing; hint: run `pgkeep init` again")]
    NoMetaKey {
        /// The repository's name.
        repository: String,
        /// The missing object.
        name: String,
    },
    /// An object does not open: altered, cut short, swapped, renamed, or sealed under a key that is not here.
    #[error("repository {repository}: {name} does not open: {source}")]
    Sealed {
        /// The repository's name.
        repository: String,
        /// The object.
        name: String,
        /// Why.
        source: SealError,
    },
    /// Sealing failed, before anything was written.
    #[error("could not seal {name}: {source}")]
    Sealing {
        /// What was to be written.
        name: String,
        /// Why.
        source: SealError,
    },
    /// An object opens and is not understood.
    #[error("repository {repository}: {name} opens, but {source}")]
    Record {
        /// The repository's name.
        repository: String,
        /// The object.
        name: String,
        /// Why.
        source: RecordError,
    },
    /// An object opens, and contradicts its own name or another object.
    #[error("repository {repository}: {name}: {reason}")]
    Inconsistent {
        /// The repository's name.
        repository: String,
        /// The object.
        name: String,
        /// What does not fit.
        reason: String,
    },
    /// Two objects hold different bytes for the same positions of one branch: two servers wrote this history.
    #[error(
        "repository {repository}: {name} and {other} hold different WAL for the same positions; neither is used, nothing \
         is mixed; hint: did two servers archive under this name? `pgkeep list` shows both"
    )]
    Disagreement {
        /// The repository's name.
        repository: String,
        /// The object that does not fit.
        name: String,
        /// What it does not fit to.
        other: String,
    },
    /// Copies of one object hold different contents: a store that does not create exclusively let two writers in, and one
    /// of them was cut off before it could withdraw.
    #[error(
        "repository {repository}: {name} and {other} are copies of one object and hold different contents; neither is used; \
         hint: two wrote here at the same time; find out which one is right, and move the other one away"
    )]
    TwoContents {
        /// The repository's name.
        repository: String,
        /// One copy.
        name: String,
        /// The other one.
        other: String,
    },
    /// Listed objects were gone when they were read, again and again.
    #[error("repository {repository}: {name} was listed and then gone, several times over; hint: try again")]
    Vanished {
        /// The repository's name.
        repository: String,
        /// The object.
        name: String,
    },
    /// The name holds something else already; it stays as it is.
    #[error("repository {repository}: {name} is there already, with other content; it was left as it is")]
    Taken {
        /// The repository's name.
        repository: String,
        /// The object.
        name: String,
    },
    /// WAL whose segment size is not the cluster's.
    #[error("repository {repository}: {name} cannot be WAL of {size}: was the segment size changed by pg_resetwal?")]
    SegmentSize {
        /// The repository's name.
        repository: String,
        /// The object.
        name: String,
        /// The cluster's segment size.
        size: crate::types::SegmentSize,
    },
    /// A caller's mistake: what was pushed is not what was announced.
    #[error("{name}: {reason}")]
    Misuse {
        /// What was to be written or read.
        name: String,
        /// What does not fit.
        reason: String,
    },
}

impl CatalogError {
    /// Whether the same call may succeed later. No `_` arm: whoever adds a variant decides here.
    pub fn is_retryable(&self) -> bool {
        match self {
            CatalogError::Store { source, .. } => source.is_retryable(),
            CatalogError::Vanished { .. } => true,
            CatalogError::Sealed { source, .. } | CatalogError::Sealing { source, .. } => source.is_retryable(),
            CatalogError::NotARepository { .. }
            | CatalogError::BadFormat { .. }
            | CatalogError::NewerFormat { .. }
            | CatalogError::UnknownFeature { .. }
            | CatalogError::WrongKey { .. }
            | CatalogError::NoMetaKey { .. }
            | CatalogError::Record { .. }
            | CatalogError::Inconsistent { .. }
            | CatalogError::Disagreement { .. }
            | CatalogError::TwoContents { .. }
            | CatalogError::Taken { .. }
            | CatalogError::SegmentSize { .. }
            | CatalogError::Misuse { .. } => false,
        }
    }

    /// The object is not there: an answer, not a fault.
    pub fn is_not_found(&self) -> bool {
        matches!(self, CatalogError::Store { source: StoreError::NotFound { .. }, .. })
    }

    /// An object is there and its content cannot be trusted or understood; another copy may help.
    /// A missing key is not the object's fault, and no copy would help.
    pub fn is_damage(&self) -> bool {
        match self {
            CatalogError::Sealed { source, .. } => !matches!(
                source,
                SealError::NeedContentKey { .. } | SealError::WriteOnly | SealError::NotARecipient { .. }
            ),
            CatalogError::Record { .. } | CatalogError::Inconsistent { .. } => true,
            _ => false,
        }
    }

    /// Whether this protects data and a person has to decide (exit code 4), rather than being a fault.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            CatalogError::WrongKey { .. }
                | CatalogError::NewerFormat { .. }
                | CatalogError::UnknownFeature { .. }
                | CatalogError::Disagreement { .. }
                | CatalogError::TwoContents { .. }
                | CatalogError::Taken { .. }
        )
    }
}

impl From<UnknownName> for CatalogError {
    fn from(unknown: UnknownName) -> CatalogError {
        let reason = unknown.to_string();
        CatalogError::Misuse { name: unknown.0, reason }
    }
}
