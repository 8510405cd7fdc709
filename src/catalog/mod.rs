//! What the objects of a repository mean. The only room where WAL, sealing and the store meet.
//!
//! - [`layout`] builds and reads every object's name;
//! - [`records`] is what we write down, as JSON under the meta key, [`table`] the files of a base backup, [`tags`] its blocks;
//! - [`Repository`] is a repository opened with its key; [`writer`] puts objects into it, [`reader`] gets them out;
//! - [`backups`] tells what the base backups share, and whether all that one names is there;
//! - [`keys`] are its content keys and for whom they are wrapped; [`events`] what was done, chained by digest;
//! - [`survey`] is everything of a cluster that retention judges; [`retention`] what it writes down;
//! - [`verification`] is what verifications and drills leave;
//! - [`lease`] is what one holder at a time has;
//! - [`copy`] brings them from one repository into another;
//! - [`inventory`] is a picture of what is there, in plain values; [`load`] takes it.
//!
//! What always holds: an object is created and not replaced (P6); it opens only under the realm, kind and name that it
//! was sealed for (P4); a name that is not understood is left alone; "not there" is said only when the store said so (P7).

pub mod backups;
mod branches;
pub mod copy;
mod error;
pub mod events;
pub mod index;
pub mod inventory;
mod join;
pub mod keys;
mod kinds;
pub mod layout;
pub mod lease;
pub mod load;
mod off_thread;
mod prefix;
pub mod reader;
pub mod records;
pub mod relations;
pub mod repository;
mod resume;
pub mod retention;
pub mod survey;
pub mod sweep;
pub mod table;
pub mod tags;
mod tail;
#[cfg(test)]
mod tests;
pub mod verdict;
pub mod verification;
mod weak;
pub mod writer;

pub use copy::{CopiedBackup, CopiedEnd, CopiedSegment};
pub use error::CatalogError;

#[cfg(test)]
pub(crate) use off_thread::ON_THE_SPOT;
pub(crate) use off_thread::off_thread;
pub use reader::{ObjectReader, SegmentBytes};
pub use repository::{Repository, Usage};
pub use resume::Resume;
pub use sweep::Removed;
pub use writer::{Conflict, MAX_RANGE, ObjectWriter, Put, RangeSealer, SealedObject, SealedRange, WalTail};
