//! Indexes a segment that `archive_command` brought, once it is durable.
//!
//! What always holds: the push has succeeded already and does not fail any more. The record that goes on beyond the segment
//! is read from the server's next file, beside it; where that is not written far enough yet, the index is left out, and
//! `pgkeep index rebuild` makes it.
//! Memory: 1 MiB of WAL, one index.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use crate::catalog::Repository;
use crate::catalog::index::{IndexWal, Indexed};
use crate::types::{Branch, ClusterId, SegmentNumber, SegmentSize};

const PIECE: usize = 1 << 20;
/// PostgreSQL waits for us.
const DEADLINE: Duration = Duration::from_secs(10);

/// Indexes the segment in the file at `path`. `pieces`: all its bytes, or none: then they are read.
pub(super) async fn index_segment(
    repository: &Repository,
    cluster: &ClusterId,
    branch: Branch,
    (segment, size): (SegmentNumber, SegmentSize),
    (path, pieces): (&Path, Vec<Bytes>),
) {
    let (path, system) = (path.to_owned(), cluster.system);
    let indexed = tokio::task::spawn_blocking(move || {
        let mut index =
            IndexWal::new(segment.start(size), segment.end(size), size, Some(system), Some(branch.timeline));
        let next = SegmentNumber::new(segment.get().saturating_add(1)).file_name(branch.timeline, size);
        let next = path.with_file_name(next);
        let files = if pieces.is_empty() { vec![path.as_path(), &next] } else { vec![next.as_path()] };
        for piece in pieces {
            if let Some(indexed) = index.push(piece).ok()?.into_iter().next() {
                return Some(indexed);
            }
        }
        read(index, &files)
    });
    let put = async {
        let Ok(Some((bytes, note))) = indexed.await else {
            tracing::debug!(%branch, segment = segment.get(), "the segment is not indexed: its last record goes on");
            return;
        };
        match repository.put_index(cluster, branch, &bytes, &note).await {
            Ok(_) => {
                tracing::debug!(%branch, from = %note.from, transactions = note.transactions, "the segment is indexed")
            }
            Err(error) => tracing::debug!(%branch, %error, "the segment is not indexed"),
        }
    };
    if timeout(DEADLINE, put).await.is_err() {
        tracing::debug!(%branch, segment = segment.get(), "the segment is not indexed in time");
    }
}

/// The first range of the files, one after the other; `None` where they end before it does.
fn read(mut index: IndexWal, files: &[&Path]) -> Option<Indexed> {
    for path in files {
        let mut file = File::open(path).ok()?;
        loop {
            let mut piece = vec![0; PIECE];
            let len = file.read(&mut piece).ok()?;
            if len == 0 {
                break;
            }
            piece.truncate(len);
            // Behind its end the server's open file holds what it was before: that is no damage of ours.
            if let Some(indexed) = index.push(piece).ok()?.into_iter().next() {
                return Some(indexed);
            }
        }
    }
    None
}
