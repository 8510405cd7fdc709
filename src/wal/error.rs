use crate::types::{Lsn, SystemId, TimelineId};

/// Bytes that are not the WAL they should be. Every variant says where.
///
/// The end of what was written is no damage: see [`super::Decoder::ended_at`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalDamage {
    /// Reading was to begin in the middle of a page.
    #[error("WAL cannot be read from {at}: this is not the start of a page")]
    NotAPageStart {
        /// Where reading was to begin.
        at: Lsn,
    },
    /// The page's magic belongs to no supported major version.
    #[error(
        "WAL page at {at} has magic {found:04X}, which no PostgreSQL from 13 to 18 writes; \
         hint: either the page is damaged or the server is of another major version"
    )]
    Magic {
        /// Start of the page.
        at: Lsn,
        /// What is there.
        found: u16,
    },
    /// The page belongs to another major version than the pages before it.
    #[error("WAL page at {at} was written by PostgreSQL {found}, the pages before it by {expected}")]
    OtherMajor {
        /// Start of the page.
        at: Lsn,
        /// Major version of the pages before.
        expected: u32,
        /// Major version of this page.
        found: u32,
    },
    /// A field of the page's header has a value that PostgreSQL never writes.
    #[error("WAL page at {at}: {what}")]
    PageHeader {
        /// Start of the page.
        at: Lsn,
        /// What is wrong.
        what: &'static str,
    },
    /// The page says that it belongs elsewhere: usually a recycled segment with its old content.
    #[error("WAL page at {at} says it belongs at {found}")]
    PageAddress {
        /// Start of the page.
        at: Lsn,
        /// The address in its header.
        found: Lsn,
    },
    /// The page was written by another cluster.
    #[error("WAL page at {at} belongs to the cluster with system identifier {found}, not {expected}")]
    System {
        /// Start of the page.
        at: Lsn,
        /// The cluster that was expected.
        expected: SystemId,
        /// The cluster that wrote it.
        found: SystemId,
    },
    /// The cluster's segments have another size.
    #[error("WAL page at {at} says that segments have {found} bytes, not {expected}")]
    SegmentSize {
        /// Start of the page.
        at: Lsn,
        /// What was expected, in bytes.
        expected: u64,
        /// What the page says, in bytes.
        found: u64,
    },
    /// The page is of an older timeline than the pages before it, or of a newer one than the segment.
    #[error("WAL page at {at} is of timeline {found}, where {} {bound} is possible", if *.newer { "at most" } else { "at least" })]
    Timeline {
        /// Start of the page.
        at: Lsn,
        /// The timeline in its header.
        found: TimelineId,
        /// The nearest timeline that would be right.
        bound: TimelineId,
        /// Whether `found` is newer than `bound`.
        newer: bool,
    },
    /// A record goes on on this page, but the page does not continue it.
    #[error("WAL page at {at} continues a record with {found} bytes, where {expected} are missing")]
    Continuation {
        /// Start of the page.
        at: Lsn,
        /// Bytes of the record that are still missing.
        expected: u64,
        /// Bytes that the page says are missing.
        found: u64,
    },
    /// A record with a header that cannot be one.
    #[error("WAL record at {at}: {what}")]
    RecordHeader {
        /// Start of the record.
        at: Lsn,
        /// What is wrong.
        what: &'static str,
    },
    /// The record does not follow the one before it: usually a recycled page with its old content.
    #[error("WAL record at {at} says that it follows {found}, but the record before it is at {expected}")]
    PrevLink {
        /// Start of the record.
        at: Lsn,
        /// Start of the record before it.
        expected: Lsn,
        /// What the record says.
        found: Lsn,
    },
    /// The record's bytes do not have the record's checksum.
    #[error("WAL record at {at} fails its checksum")]
    Checksum {
        /// Start of the record.
        at: Lsn,
    },
    /// A page that overwrites an unfinished record names another one.
    #[error("WAL record at {at} replaces an unfinished record at {found}, but the unfinished one is at {expected}")]
    Overwrite {
        /// Start of the record.
        at: Lsn,
        /// Start of the record that was dropped.
        expected: Lsn,
        /// The record that is said to be replaced.
        found: Lsn,
    },
    /// The record's checksum is right, its content cannot be read.
    #[error(
        "WAL record at {at} cannot be read: {what}; \
         hint: its checksum is right, so this is more likely a version of PostgreSQL that pgkeep does not know"
    )]
    Content {
        /// Start of the record.
        at: Lsn,
        /// What is wrong.
        what: &'static str,
    },
    /// Zeros where a record or a page should begin, in WAL that goes on.
    #[error("WAL is zeros at {at}, where a record should begin")]
    Zeros {
        /// Where the zeros begin.
        at: Lsn,
    },
    /// Zeros where WAL should be, and then WAL again.
    #[error("WAL is zeros from {zeros_at} on, but at {at} there is data again")]
    DataAfterZeros {
        /// Where the zeros begin.
        zeros_at: Lsn,
        /// Where something else follows them.
        at: Lsn,
    },
}

impl WalDamage {
    /// Where the damage is: the start of the page or record concerned.
    pub fn at(&self) -> Lsn {
        match self {
            Self::NotAPageStart { at }
            | Self::Magic { at, .. }
            | Self::OtherMajor { at, .. }
            | Self::PageHeader { at, .. }
            | Self::PageAddress { at, .. }
            | Self::System { at, .. }
            | Self::SegmentSize { at, .. }
            | Self::Timeline { at, .. }
            | Self::Continuation { at, .. }
            | Self::RecordHeader { at, .. }
            | Self::PrevLink { at, .. }
            | Self::Checksum { at }
            | Self::Overwrite { at, .. }
            | Self::Content { at, .. }
            | Self::Zeros { at }
            | Self::DataAfterZeros { at, .. } => *at,
        }
    }

    /// Never: the same bytes stay damaged. Whether reading them anew from their source helps, only the reader knows.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NotAPageStart { .. }
            | Self::Magic { .. }
            | Self::OtherMajor { .. }
            | Self::PageHeader { .. }
            | Self::PageAddress { .. }
            | Self::System { .. }
            | Self::SegmentSize { .. }
            | Self::Timeline { .. }
            | Self::Continuation { .. }
            | Self::RecordHeader { .. }
            | Self::PrevLink { .. }
            | Self::Checksum { .. }
            | Self::Overwrite { .. }
            | Self::Content { .. }
            | Self::Zeros { .. }
            | Self::DataAfterZeros { .. } => false,
        }
    }
}
