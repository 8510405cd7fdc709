//! Until where the WAL of a window reaches, by what the archiver noted beside it.

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::catalog::inventory::{BranchInventory, ClusterInventory, Place};
use crate::catalog::{CatalogError, Repository};
use crate::types::{Branch, ClusterId, Lsn, SegmentNumber, SegmentSize};

/// Per branch, a position behind everything that was committed until `until`: how far the server's WAL reached at the
/// first noted moment after it. Branches where nobody noted one that late are absent.
///
/// What was sent at a moment may have been written long before, never after; so the end of the server's WAL at that
/// moment is what counts, not the segment beside which it is noted. A segment is added: a commit's time is taken a little
/// before its record is written.
///
/// # Errors
/// What the repository says. Damage is not one: what does not open notes nothing.
pub async fn ends_of_window(
    repository: &Repository,
    inventory: &ClusterInventory,
    until: Timestamp,
) -> Result<BTreeMap<Branch, Lsn>, CatalogError> {
    let mut ends = BTreeMap::new();
    let Some(size) = inventory.segment_size else { return Ok(ends) };
    for (branch, wal) in &inventory.branches {
        if let Some(end) = end_of(repository, &inventory.id, wal, size, until).await? {
            ends.insert(*branch, end.advance(size.bytes()));
        }
    }
    Ok(ends)
}

async fn end_of(
    repository: &Repository,
    cluster: &ClusterId,
    wal: &BranchInventory,
    size: SegmentSize,
    until: Timestamp,
) -> Result<Option<Lsn>, CatalogError> {
    let mut segments: Vec<SegmentNumber> =
        wal.pieces.iter().filter(|piece| piece.place == Place::Wal).map(|piece| piece.segment).collect();
    segments.dedup();
    // Moments only grow along a branch: the first segment that was noted late enough is found by halving.
    let (mut low, mut high, mut found) = (0, segments.len(), None);
    while low < high {
        let mut at = low + (high - low) / 2;
        let middle = at;
        // One that was pushed and not streamed has no moment: the next one that has decides.
        let noted = loop {
            let Some(segment) = segments.get(at).filter(|_| at < high) else { break None };
            match repository.noted_of(cluster, wal.branch, *segment, size).await? {
                Some(noted) => break Some(noted),
                None => at += 1,
            }
        };
        match noted {
            Some((time, end)) if time.to_timestamp() >= until => {
                found = Some(end);
                high = middle;
            }
            Some(_) => low = at + 1,
            None => high = middle, // nothing is noted from the middle on
        }
    }
    Ok(found)
}
