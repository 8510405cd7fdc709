//! Which histories of a cluster are there at all, and which of their segments are open.

use std::collections::{BTreeMap, BTreeSet};

use super::CatalogError;
use super::layout::{ClusterObject, KeptFile, Name, Object, folder};
use super::repository::Repository;
use crate::store::{ObjectMeta, list_all, list_folders};
use crate::types::{Branch, ClusterId, SegmentNumber, SegmentSize};

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
