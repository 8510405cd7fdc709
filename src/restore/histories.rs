//! Whether repositories hold one history on the way of a plan.
//!
//! What always holds (P6): `wal fetch` serves a segment from whichever repository has it, so a restore begins only where
//! those that answer hold the same. What both hold last is compared: whoever went another way earlier differs there, too.
//!
//! Nothing is changed anywhere; every future may be dropped.

use crate::catalog::inventory::ClusterInventory;
use crate::catalog::{CatalogError, Repository};
use crate::plan::WalNeed;
use crate::types::{Branch, ClusterId, Lsn, SegmentSize};

/// Where `other`, which holds `theirs`, has other WAL than `one` on the way; the end of what was compared. `None` where they
/// agree, or have nothing in common.
///
/// # Errors
/// What the repositories say.
pub async fn other_history(
    one: &Repository,
    (other, theirs): (&Repository, &ClusterInventory),
    cluster: &ClusterId,
    wal: &[WalNeed],
    size: SegmentSize,
) -> Result<Option<(Branch, Lsn)>, CatalogError> {
    for need in wal {
        let Some(branch) = theirs.branches.get(&need.branch) else { continue };
        let common = branch.runs(size).into_iter().filter(|run| run.from < need.to && run.to > need.from);
        let Some(at) = common.map(|run| run.to.min(need.to)).max() else { continue };
        let segment = at.segment_before(size);
        // invariant: a segment is at most 1 GiB
        let offset = u32::try_from(at.bytes_since(segment.start(size)).unwrap_or(0)).unwrap_or(u32::MAX);
        let ours = one.digest_at(cluster, need.branch, segment, size, offset).await?;
        let theirs = other.digest_at(cluster, need.branch, segment, size, offset).await?;
        if ours.zip(theirs).is_some_and(|(ours, theirs)| ours != theirs) {
            return Ok(Some((need.branch, at)));
        }
    }
    Ok(None)
}
