//! The tags of a backup's blocks: their format is the catalog's, because restoring compares with them, too.

pub use crate::catalog::tags::{TAG, TagsEntry, TagsWriter, entries};
