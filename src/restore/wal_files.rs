//! The WAL that makes a base backup consistent, as files in `pg_wal`: recovery asks the archive first and would do without,
//! `pg_verifybackup` would not.

use std::path::{Path, PathBuf};

use super::RestoreError;
use super::files::NewFiles;
use super::sources::Sources;
use crate::catalog::records::BackupInfo;
use crate::catalog::{CatalogError, Repository};
use crate::plan::RestorePlan;
use crate::types::{Lsn, SegmentNumber};
use crate::wal::pad_open_segment;

/// Writes the segments from the backup's start to its stop; their number.
pub async fn write(sources: &Sources, plan: &RestorePlan, pgdata: &Path, files: NewFiles) -> Result<u64, RestoreError> {
    let base = &plan.base;
    let (first, last) =
        (base.start.segment(base.segment_size).get(), base.stop.segment_before(base.segment_size).get());
    let mut written = 0;
    for segment in (first..=last).map(SegmentNumber::new) {
        let mut asking = sources.asking();
        let bytes = loop {
            let source = asking.next()?;
            let read = asking.timed(source, segment_bytes(&source.repository, plan, segment)).await;
            if let Some(bytes) = asking.judge(source, read)? {
                break bytes;
            }
        };
        let path = pgdata.join("pg_wal").join(segment.file_name(base.timeline, base.segment_size));
        let put = tokio::task::spawn_blocking(move || files.write(&path, &bytes));
        put.await.map_err(|error| RestoreError::Task(error.to_string()))??;
        written += 1;
    }
    Ok(written)
}

/// A segment of the backup's timeline: whole where nothing of it lies behind the backup, else up to there, and zeros.
async fn segment_bytes(
    repository: &Repository,
    plan: &RestorePlan,
    segment: SegmentNumber,
) -> Result<Vec<u8>, RestoreError> {
    let BackupInfo { branch, segment_size: size, stop, label, .. } = plan.base;
    let begins = segment.start(size);
    let until = stop.min(segment.end(size));
    let wanted = usize::try_from(until.bytes_since(begins).unwrap_or(0)).unwrap_or(usize::MAX);
    // The backup's own branch; where that was left within this segment, a child's copy holds the same bytes.
    let holds = |need: &&crate::plan::WalNeed| need.from < until && begins < need.to && need.branch != branch;
    let others = plan.wal.iter().filter(holds).map(|need| need.branch);
    let mut failed = None;
    for branch in std::iter::once(branch).chain(others) {
        let read = repository.read_segment(&plan.cluster, branch, segment, size, Some(&plan.history)).await;
        match read {
            Ok(read) if read.bytes.len() >= wanted => {
                let mut bytes = read.bytes;
                bytes.truncate(wanted);
                if (bytes.len() as u64) < size.bytes() {
                    pad_open_segment(&mut bytes, begins, size).map_err(|source| RestoreError::Wal { label, source })?;
                }
                return Ok(bytes);
            }
            Ok(read) => {
                let at = begins.advance(read.bytes.len() as u64);
                failed.get_or_insert(missing(repository, plan, at, until));
            }
            Err(error) => failed = Some(error),
        }
    }
    Err(failed.unwrap_or_else(|| missing(repository, plan, begins, until)).into())
}

fn missing(repository: &Repository, plan: &RestorePlan, from: Lsn, to: Lsn) -> CatalogError {
    CatalogError::Inconsistent {
        repository: repository.name().to_owned(),
        name: format!("branch {} of {}", plan.base.branch, plan.cluster),
        reason: format!("its WAL from {from} to {to}, which base backup {} needs, is not there", plan.base.label),
    }
}

/// Where `pg_wal` lies.
pub fn folder(pgdata: &Path) -> PathBuf {
    pgdata.join("pg_wal")
}
