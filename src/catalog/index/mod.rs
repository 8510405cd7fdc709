//! An index of transactions, restore points and parameters beside the WAL: what it holds, so that a moment is found without
//! reading it.
//!
//! What always holds: an index is a function of the WAL of its range alone (the records that begin in it), so whoever makes
//! it makes the same one, and one that is missing or damaged is made again. No restore trusts it. Transactions that span
//! ranges are joined by the reader: nothing has to be carried from one writer to the next, and ranges can be indexed in any
//! order, by several, after any crash.
//! Crash and cancellation: an object is there whole or not at all.

mod build;
mod codec;
mod search;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use build::{IndexWal, Indexed, Missing, Rebuilt};
pub use codec::{Entries, Entry, IndexError, IndexFile, IndexWriter, Pattern};
pub use search::{Found, Logged, Passed, Query};

use super::CatalogError;
use super::kinds::kind_of;
use super::layout::{ClusterObject, CopyToken, Name, Object, folder};
use super::records::{self, Record};
use super::repository::{Repository, name_of, random_id};
use crate::store::list_all;
use crate::types::{Branch, ClusterId, Lsn, PgTimestamp, SegmentSize};

/// An index covers at most this much WAL, or one segment where that is larger. The more, the fewer objects; the less, the
/// sooner it is there and the less has to be read for the newest transactions.
pub const MAX_RANGE: u64 = 128 << 20;

/// What an index object says about itself, in its footer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexNote {
    /// First byte of the indexed WAL.
    pub from: Lsn,
    /// First byte after it.
    pub to: Lsn,
    /// Transactions that ended in it.
    pub transactions: u64,
    /// Those that wrote in it and went on.
    pub open: u64,
    /// The earliest time in it: of an end or a restore point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_time: Option<PgTimestamp>,
    /// The latest one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_time: Option<PgTimestamp>,
    /// The smallest number of a transaction or subtransaction in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lowest_xid: Option<u32>,
    /// The greatest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub highest_xid: Option<u32>,
    /// The one that was begun last; numbers wrap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest_xid: Option<u32>,
    /// Restore points in it. `None`: an index of version 1, which tells none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_points: Option<u64>,
    /// Changes of parameters in it. `None`: as above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameter_changes: Option<u64>,
}

impl Record for IndexNote {
    const NAME: &'static str = "index";
}

/// An index object as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexRange {
    /// The history.
    pub branch: Branch,
    /// First byte of the indexed WAL.
    pub from: Lsn,
    /// First byte after it.
    pub to: Lsn,
    /// Length of the sealed object, in bytes.
    pub object_len: u64,
    /// The object, and its copies with their lengths.
    names: Vec<(Name, u64)>,
}

impl IndexRange {
    /// One that is nowhere, for tests of plans.
    #[cfg(test)]
    pub(crate) fn listed(branch: Branch, from: Lsn, to: Lsn, object_len: u64) -> IndexRange {
        IndexRange { branch, from, to, object_len, names: Vec::new() }
    }
}

/// The end of the range of an index that begins at `from`: ranges are aligned, so that those of several writers nest.
pub fn range_end(from: Lsn, size: SegmentSize) -> Lsn {
    let range = MAX_RANGE.max(size.bytes());
    Lsn::new((from.get() / range).saturating_add(1).saturating_mul(range))
}

impl Repository {
    /// Puts an index. One that is there already says the same: it stays, and the answer is `false`.
    ///
    /// # Errors
    /// What the store says.
    pub async fn put_index(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        bytes: &[u8],
        note: &IndexNote,
    ) -> Result<bool, CatalogError> {
        let object = ClusterObject::Index(branch, note.from, note.to);
        let name = name_of(cluster, object.clone());
        let mut writer = self.seal_object(cluster, object).await?;
        writer.push(bytes)?;
        let json = records::to_json(note).map_err(|source| self.record(&name, source))?;
        match self.put_object(&writer.finish(&json)?).await {
            Ok(_) => Ok(true),
            Err(CatalogError::Taken { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Puts what another repository has as an index; `false` where one is here. Its frames are sealed under the meta key,
    /// so a key that cannot read WAL is enough.
    ///
    /// # Errors
    /// Damage that names the object; what the stores say.
    pub async fn copy_index(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        range: &IndexRange,
    ) -> Result<bool, CatalogError> {
        let note = from.index_note(range).await?;
        let file = from.get_index(range).await?;
        self.put_index(cluster, range.branch, file.bytes(), &note).await
    }

    /// The indexes of a branch, by position; of copies one.
    ///
    /// # Errors
    /// What the store says.
    pub async fn list_indexes(&self, cluster: &ClusterId, branch: Branch) -> Result<Vec<IndexRange>, CatalogError> {
        let listed = list_all(self.store().as_ref(), &folder::index_of(cluster, branch)).await;
        let listed = listed.map_err(|source| self.in_store(source))?;
        let mut ranges: BTreeMap<(Lsn, Lsn), IndexRange> = BTreeMap::new();
        for object in &listed {
            let Ok(name) = Name::parse(object.key.as_str()) else { continue };
            let Object::Of(_, ClusterObject::Index(branch, from, to)) = name.object else { continue };
            let new = || IndexRange { branch, from, to, object_len: object.len, names: Vec::new() };
            ranges.entry((from, to)).or_insert_with(new).names.push((name, object.len));
        }
        Ok(ranges.into_values().collect())
    }

    /// What an index says about itself.
    ///
    /// # Errors
    /// Damage that names the object; what the store says.
    pub async fn index_note(&self, range: &IndexRange) -> Result<IndexNote, CatalogError> {
        let kind = kind_of(&ClusterObject::Index(range.branch, range.from, range.to));
        let (mut first, mut old) = (None, None);
        for (name, len) in &range.names {
            let read = self.get_footer(name, kind, *len).await;
            let note: Result<IndexNote, CatalogError> = read
                .and_then(|(_, footer)| records::from_json(&footer.extra).map_err(|source| self.record(name, source)));
            match note {
                Ok(note) if note.restore_points.is_none() => old = old.or(Some(note)),
                Err(error) if error.is_damage() || error.is_not_found() => first = first.or(Some(error)),
                answer => return answer,
            }
        }
        old.ok_or_else(|| first.unwrap_or_else(|| self.no_index(range)))
    }

    /// Reads an index; of copies the first one of this version, else one of the version before.
    ///
    /// # Errors
    /// Damage that names the object; what the store says.
    pub async fn get_index(&self, range: &IndexRange) -> Result<IndexFile, CatalogError> {
        let kind = kind_of(&ClusterObject::Index(range.branch, range.from, range.to));
        let (mut first, mut old) = (None, None);
        for (name, _) in &range.names {
            let file = self.get_one(name, kind).await.and_then(|opened| {
                let file = IndexFile::read(opened.plaintext);
                let file = file.map_err(|error| self.inconsistent(name, error.to_string()))?;
                match (file.from, file.to) == (range.from, range.to) {
                    true => Ok(file),
                    false => Err(self.inconsistent(name, format!("it indexes {} to {}", file.from, file.to))),
                }
            });
            match file {
                Ok(file) if file.landmarks.is_none() => old = old.or(Some(file)),
                Err(error) if error.is_damage() || error.is_not_found() => first = first.or(Some(error)),
                answer => return answer,
            }
        }
        old.ok_or_else(|| first.unwrap_or_else(|| self.no_index(range)))
    }

    fn no_index(&self, range: &IndexRange) -> CatalogError {
        let name = format!("the index of branch {} from {} to {}", range.branch, range.from, range.to);
        CatalogError::Vanished { repository: self.name().to_owned(), name }
    }

    /// Puts an index beside one that does not open.
    async fn put_index_copy(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        bytes: &[u8],
        note: &IndexNote,
    ) -> Result<(), CatalogError> {
        let object = ClusterObject::Index(branch, note.from, note.to);
        let name = name_of(cluster, object.clone());
        let json = records::to_json(note).map_err(|source| self.record(&name, source))?;
        let body = self.seal_whole(&name, kind_of(&object), bytes.to_vec(), json).await?;
        self.put_bytes(&name.copy(CopyToken::of(random_id()?)), body).await.map(|_| ())
    }
}
