//! What a server has in one WAL segment, as the digest of the segment's beginning: enough to tell two histories apart.
//!
//! Nothing is changed at the server: no slot is used, nothing is acknowledged. Memory: one message. Dropping the future
//! closes the connection; the caller has the deadline.

use super::replication::{Replication, Started, StreamEvent, SystemIdentity};
use super::{ConnInfo, ConnectOptions, PgError};
use crate::types::{Digest, Lsn, SegmentHasher, TimelineId};

/// Who answered, and the digest of the bytes `[start, to)` of `timeline`; `None` where the server does not have all of
/// them on it. `start` is the start of a segment, and `to` not behind its end nor behind what the server has flushed.
///
/// # Errors
/// [`super::ServerErrorKind::FileMissing`] where the server has removed the segment.
pub async fn segment_digest(
    info: &ConnInfo,
    options: &ConnectOptions,
    timeline: TimelineId,
    start: Lsn,
    to: Lsn,
) -> Result<(SystemIdentity, Option<Digest>), PgError> {
    let mut replication = Replication::connect(info, options).await?;
    let identity = replication.identify_system().await?;
    let Started::Streaming(mut wal) = replication.start(None, start, timeline).await? else {
        return Ok((identity, None)); // it has nothing of this timeline behind `start`
    };
    let (mut hasher, mut at) = (SegmentHasher::new(), start);
    while at < to {
        match wal.next().await? {
            StreamEvent::Wal { start, data, .. } if start == at => {
                let wanted = usize::try_from(to.bytes_since(at).unwrap_or(0)).unwrap_or(usize::MAX);
                let bytes = data.get(..wanted).unwrap_or(&data);
                hasher.update(bytes);
                at = at.advance(bytes.len() as u64);
            }
            StreamEvent::Keepalive { .. } => {}
            // It skipped, or the timeline or the server ended before: nothing can be said.
            StreamEvent::Wal { .. } | StreamEvent::TimelineEnded(_) | StreamEvent::ServerStopped => {
                return Ok((identity, None));
            }
        }
    }
    Ok((identity, Some(hasher.digest())))
}
