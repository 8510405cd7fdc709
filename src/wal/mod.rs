//! What WAL means: pages, records, and the few records that a restore has to know.
//!
//! Everything here is pure and incremental: bytes go in, cut anywhere, and records come out; nothing does I/O, knows a
//! clock or allocates by a length that it was merely told. Integers in WAL are little-endian on every platform that is
//! supported, and a page has 8192 bytes. Where PostgreSQL 13 to 18 differ, the difference is a column of the table in
//! [`version`]; the magic of a page says which line of it applies.
//!
//! What always holds: a [`Record`] that a [`Decoder`] hands out lies whole in the bytes it was given, its CRC-32C and its
//! link to the record before it were checked, and the pages it lies on are where they say they are. Damage is an
//! error ([`WalDamage`]); the end of what was written (zeros, or simply no more bytes) is not. A [`WalAudit`] goes on
//! behind damage, and tells of every stretch that cannot be replayed.
//!
//! Sources: `src/include/access/{xlog_internal,xlogrecord,xact}.h`, `src/backend/access/transam/xlogreader.c`.

mod audit;
#[cfg(test)]
mod audit_tests;
#[cfg(test)]
pub(crate) mod builder;
mod decoder;
#[cfg(test)]
mod decoder_tests;
mod error;
mod page;
pub mod receiver;
mod record;
#[cfg(test)]
mod record_tests;
mod summary;
#[cfg(test)]
mod summary_tests;
mod tail;
mod transaction;
#[cfg(test)]
mod transaction_tests;
mod version;

pub use audit::{Unsound, WalAudit};
pub use decoder::Decoder;
pub use error::WalDamage;
pub use page::{PAGE_SIZE, PageHeader, PageWatch, check_page};
pub use record::{BlockRef, Compression, Fork, Fragments, Image, Record, RelFile, rmgr};
pub use summary::{
    Changes, End, Kinds, Landmark, LandmarkKind, Part, Summarizer, Touched, is_newer, join, kinds, marks,
    may_be_summarized,
};
pub use tail::{WalEnd, pad_open_segment, wal_end};
pub use transaction::{Checkpoint, Fact, Parameters, WalLevel, fact, may_be_fact};
pub use version::{WalFormat, format_of_magic, format_of_major};
