//! From the server's slot into the repositories, without a hole.
//!
//! [`branching`], [`cutter`], [`frontier`], [`lanes`], [`fill`] and [`resume`] decide; [`stream`], `lane`, `filler` and `uploader` act;
//! [`cluster`] keeps at it.
//! [`push`] is the other way in: one file at a time, as `archive_command` offers it; [`push_plan`] decides what is put ahead of
//! being asked for, [`push_ahead`] does it.

mod alarm;
mod attempt;
mod begin;
pub mod branching;
pub mod cluster;
pub mod cutter;
mod error;
pub mod fill;
mod filler;
pub mod frontier;
mod identify;
mod indexer;
mod lane;
pub mod lanes;
mod latency;
mod load;
pub mod names;
mod part;
mod probe;
pub mod push;
pub mod push_ahead;
pub mod push_all;
pub mod push_index;
pub mod push_plan;
mod receivers;
pub mod resume;
mod source;
mod status;
pub mod stream;
mod sweeper;
#[cfg(test)]
mod tests;
mod uploader;

pub use attempt::ArchiveOptions;
pub use cluster::archive;
pub use error::ArchiveError;
pub use identify::{ServedPath, served_path};
pub use latency::Latency;
pub use receivers::{Member, OpenError, Opener, Receivers};
pub use source::{Connected, SlotRow, Source};
pub use status::{ClusterStatus, DamageSeen, Doing, Progress, RepositoryProgress};
