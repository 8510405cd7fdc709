//! Plain values that every room shares: positions in the WAL, names PostgreSQL gives to files, identities.
//!
//! Nothing here does I/O, knows a clock or imports another room. A string or number from outside becomes one of these
//! once, at the edge; no inner function checks it again.

mod cluster;
mod digest;
mod history;
mod lineage;
mod lsn;
mod segment;
mod time;
mod timeline;

pub use cluster::{BackupLabel, ClusterId, ClusterName, SystemId};
pub use digest::{Digest, Id128, SegmentHasher};
pub use history::{HistoryEntry, TimelineHistory};
pub use lineage::Lineage;
pub use lsn::Lsn;
pub use segment::{SegmentNumber, SegmentSize, WalFileName};
pub use time::PgTimestamp;
pub use timeline::{Branch, TimelineId};

/// A text from outside that is not what it should be: what was expected, and what was there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct ParseError {
    /// What the text was meant to be, with an example: `an LSN such as 16/B374D848`.
    pub expected: &'static str,
    /// The text itself, shortened.
    pub text: String,
}

impl ParseError {
    /// Keeps at most 80 characters of `text`: an error is read by a person.
    pub fn new(expected: &'static str, text: &str) -> Self {
        Self { expected, text: text.chars().take(80).collect() }
    }
}

/// Serialises a type by its `Display` and reads it by its `FromStr`, so that records show what people type.
macro_rules! serde_by_text {
    ($type:ty) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(crate) use serde_by_text;
