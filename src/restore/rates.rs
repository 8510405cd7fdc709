//! How fast a repository gives back a base backup: a small part of one is read as a restore reads it.
//!
//! Nothing is written anywhere. Bounds: [`SAMPLE_BYTES`], [`DEADLINE`], and the memory of the requests under way.

use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use tokio::time::timeout;

use super::jobs::GROUP_BYTES;
use crate::catalog::records::Manifest;
use crate::catalog::{CatalogError, Repository};
use crate::plan::Sample;
use crate::types::ClusterId;

/// Bytes of plaintext that are read at most.
const SAMPLE_BYTES: u64 = 32 << 20;
/// Requests under way at a time: as many as a restore has.
const AT_ONCE: usize = 4;
/// What has not come by then is not waited for.
const DEADLINE: Duration = Duration::from_secs(5);

/// Reads some of a base backup's packs; what came within the deadline counts.
///
/// # Errors
/// What the repository says.
pub async fn measure(
    repository: &Repository,
    cluster: &ClusterId,
    manifest: &Manifest,
) -> Result<Sample, CatalogError> {
    let (mut ranges, mut left) = (Vec::new(), SAMPLE_BYTES);
    for pack in &manifest.packs {
        let mut at = 0;
        while at < pack.plaintext_len && left > 0 {
            let len = GROUP_BYTES.min(pack.plaintext_len - at).min(left); // invariant: at < plaintext_len
            ranges.push((pack, at, at + len));
            (at, left) = (at + len, left - len);
        }
    }
    let mut sample = Sample { bytes: 0, took: Duration::ZERO };
    let begun = Instant::now();
    let mut reading = stream::iter(ranges)
        .map(|(pack, from, to)| async move { repository.open_pack(cluster, pack).await?.read(from..to).await })
        .buffer_unordered(AT_ONCE);
    while let Some(left) = DEADLINE.checked_sub(begun.elapsed()) {
        match timeout(left, reading.next()).await {
            Ok(Some(read)) => {
                sample.bytes += read?.len() as u64;
                sample.took = begun.elapsed();
            }
            Ok(None) | Err(_) => break,
        }
    }
    Ok(sample)
}
