//! Which histories of a cluster are there at all, of whom they descend, and which of their segments are open.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::CatalogError;
use super::layout::{ClusterObject, Disputed, KeptFile, Name, Object, folder};
use super::records::{self, FileNote};
use super::repository::{Repository, name_of};
use super::writer::Put;
use crate::seal::Kind;
use crate::store::{ObjectMeta, list_all, list_folders};
use crate::types::{Branch, ClusterId, Lineage, SegmentNumber, SegmentSize};

impl Repository {
    /// The branches of which any WAL is here.
    ///
    /// # Errors
    /// What the store says.
    pub async fn branches(&self, cluster: &ClusterId) -> Result<BTreeSet<Branch>, CatalogError> {
        let mut branches = BTreeSet::new();
        for folder in [folder::wal(cluster), folder::open(cluster)] {
            let found = list_folders(self.store().as_ref(), &folder).await.map_err(|source| self.in_store(source))?;
            branches.extend(found.iter().filter_map(|folder| folder::read_branch(folder)));
        }
        Ok(branches)
    }

    /// The branches of which anything is here: WAL, a history file, or the record of a gap.
    ///
    /// # Errors
    /// What the store says.
    pub async fn all_branches(&self, cluster: &ClusterId) -> Result<BTreeSet<Branch>, CatalogError> {
        let mut branches = self.branches(cluster).await?;
        for folder in [folder::histories(cluster), folder::gaps(cluster)] {
            let objects = list_all(self.store().as_ref(), &folder).await.map_err(|source| self.in_store(source))?;
            let branch = |object: &ObjectMeta| match Name::parse(object.key.as_str()).ok()?.object {
                Object::Of(_, ClusterObject::History(branch) | ClusterObject::Gap(branch, ..)) => Some(branch),
                _ => None,
            };
            branches.extend(objects.iter().filter_map(branch));
        }
        Ok(branches)
    }

    /// Puts a branch's history file, and which branches its ancestors are. It has to be there before the branch's first
    /// WAL.
    ///
    /// # Errors
    /// What the store says.
    pub async fn put_history_of(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        text: &[u8],
        ancestors: &Lineage,
    ) -> Result<Put, CatalogError> {
        let ancestors = ancestors.before(branch.timeline).second_histories().collect();
        self.put_file(cluster, branch, ClusterObject::History(branch), Disputed::History, text, ancestors).await
    }

    /// A branch's history file, and which branches its ancestors are; `None` where there is none.
    ///
    /// # Errors
    /// Damage that names the object; what the store says.
    pub async fn get_history_of(
        &self,
        cluster: &ClusterId,
        branch: Branch,
    ) -> Result<Option<(Bytes, Lineage)>, CatalogError> {
        let name = name_of(cluster, ClusterObject::History(branch));
        let opened = match self.get_object(&name, Kind::History).await {
            Err(error) if error.is_not_found() => return Ok(None),
            opened => opened?,
        };
        let note: FileNote = records::from_json(&opened.note).map_err(|source| self.record(&name, source))?;
        Ok(Some((opened.plaintext.into(), note.ancestors.into_iter().collect())))
    }

    /// Makes a branch's history file last that somebody put, who may have died before his sync.
    ///
    /// # Errors
    /// What the store says.
    pub async fn sync_history(&self, cluster: &ClusterId, branch: Branch) -> Result<(), CatalogError> {
        match self.sync_object(&name_of(cluster, ClusterObject::History(branch))).await {
            Err(error) if error.is_not_found() => Ok(()), // it was read from a copy, which whoever put it has synced
            synced => synced,
        }
    }

    /// The kept `.partial` and `.backup` files, and how long their objects are.
    ///
    /// # Errors
    /// What the store says.
    pub async fn kept_files(&self, cluster: &ClusterId) -> Result<BTreeMap<(Branch, KeptFile), u64>, CatalogError> {
        let objects = list_all(self.store().as_ref(), &folder::kept_files(cluster)).await;
        let objects = objects.map_err(|source| self.in_store(source))?;
        let kept = |object: &ObjectMeta| match Name::parse(object.key.as_str()).ok()?.object {
            Object::Of(_, ClusterObject::WalFile(branch, file)) => Some(((branch, file), object.len)),
            _ => None,
        };
        Ok(objects.iter().filter_map(kept).collect())
    }

    /// The segments of a branch that have ranges or tails under `open/`.
    ///
    /// # Errors
    /// What the store says.
    pub async fn open_segments(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        size: SegmentSize,
    ) -> Result<BTreeSet<SegmentNumber>, CatalogError> {
        let objects = list_all(self.store().as_ref(), &folder::open_branch(cluster, branch)).await;
        let objects = objects.map_err(|source| self.in_store(source))?;
        let segment = |name: Name| match name.object {
            Object::Of(_, ClusterObject::Open(_, range)) => range.segment.number(size),
            Object::Of(_, ClusterObject::Tail(_, segment, _)) => segment.number(size),
            _ => None,
        };
        Ok(objects.iter().filter_map(|object| Name::parse(object.key.as_str()).ok().and_then(segment)).collect())
    }
}
