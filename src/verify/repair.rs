//! Where else a damaged or missing object is, and bringing it back from there.
//!
//! What always holds: as [`Repository::repair_object`] says: nothing is replaced, and only what opened is put. A hole in the WAL is
//! filled segment by segment, as when a repository is filled up.

use serde::Serialize;

use crate::catalog::layout::{Name, Object};
use crate::catalog::verification::Finding;
use crate::catalog::{CatalogError, Put, Repository};
use crate::types::{ClusterId, SegmentSize};

/// Segments of one hole that are brought back at a time: 16 GiB of the usual size.
const SEGMENTS: u64 = 1024;

/// What was brought back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Repaired {
    /// What was found.
    pub object: String,
    /// From which repository.
    pub from: String,
    /// The names under which it is now; of a hole how many segments.
    pub now: String,
}

fn object_of(finding: &Finding) -> Option<Object> {
    Name::parse(&finding.object).ok().map(|name| name.object)
}

/// The segments of a hole.
fn segments(
    finding: &Finding,
    size: SegmentSize,
) -> impl Iterator<Item = (crate::types::Branch, crate::types::SegmentNumber)> {
    let range =
        finding.hole.map(|(branch, from, to)| (branch, from.segment(size).get(), to.get().div_ceil(size.bytes())));
    let numbers = range.into_iter().flat_map(|(branch, from, to)| (from..to).map(move |number| (branch, number)));
    numbers.map(|(branch, number)| (branch, crate::types::SegmentNumber::new(number)))
}

/// Whether another repository lists what is damaged or missing here: of a hole, its first segment.
///
/// # Errors
/// What the store says.
pub async fn is_in(
    other: &Repository,
    cluster: &ClusterId,
    finding: &Finding,
    size: Option<SegmentSize>,
) -> Result<bool, CatalogError> {
    if let (Some(_), Some(size)) = (finding.hole, size) {
        let Some((branch, segment)) = segments(finding, size).next() else { return Ok(false) };
        return other.lists_segment(cluster, branch, segment, size).await;
    }
    match object_of(finding) {
        Some(object) => other.lists_object(&object).await,
        None => Ok(false),
    }
}

/// Brings it back.
///
/// # Errors
/// As [`Repository::repair_object`] and [`Repository::copy_segment`]; what was brought back until then is there.
pub async fn repair(
    repository: &Repository,
    from: &Repository,
    cluster: &ClusterId,
    finding: &Finding,
    size: Option<SegmentSize>,
) -> Result<Repaired, CatalogError> {
    let done = |now: String| Repaired { object: finding.object.clone(), from: from.name().to_owned(), now };
    if let (Some(_), Some(size)) = (finding.hole, size) {
        let mut count = 0u64;
        for (branch, segment) in segments(finding, size).take(usize::try_from(SEGMENTS).unwrap_or(usize::MAX)) {
            let copied = repository.copy_segment(from, cluster, branch, segment, size).await?;
            if let Put::Conflict(conflict) = copied.put {
                let (repository, name) = (repository.name().to_owned(), conflict.existing);
                return Err(CatalogError::Taken { repository, name });
            }
            count += 1;
        }
        return Ok(done(format!("{count} segments")));
    }
    let Some(object) = object_of(finding) else {
        let (name, reason) = (finding.object.clone(), "its name is not understood".to_owned());
        return Err(CatalogError::Misuse { name, reason });
    };
    let name = repository.repair_object(from, &object).await?;
    Ok(done(name.to_string()))
}
