//! Where WAL that is still being written ends, and how its open segment is served.

use super::decoder::Walker;
use super::error::WalDamage;
use crate::types::{Lsn, SegmentSize};

/// The end of a run of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalEnd {
    /// Start of the last whole record: the inclusive `recovery_target_lsn` that replays all there is. `None`: no record that
    /// begins in these bytes is whole; ask again with the segment before.
    pub last_record: Option<Lsn>,
    /// Where that record ends, aligned as the next one's start. Also set where the record began before these bytes; their
    /// start if not even that one ends in them.
    pub end: Lsn,
    /// Whether the bytes end within a record, so that some of them are of no use yet.
    pub unfinished: bool,
}

/// Finds the last whole record in `pieces`, consecutive bytes of WAL from `at` on, which is the start of a page.
/// Zeros at their end are no WAL.
pub fn wal_end<'a>(
    at: Lsn,
    size: SegmentSize,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Result<WalEnd, WalDamage> {
    if !at.get().is_multiple_of(super::PAGE_SIZE) {
        return Err(WalDamage::NotAPageStart { at });
    }
    let mut walker = Walker::new(at, size);
    walker.wanted = |_, _| false;
    for piece in pieces {
        let mut used = 0;
        while walker.step(piece, &mut used)?.is_some() {}
    }
    Ok(WalEnd { last_record: walker.last_start, end: walker.last_end, unfinished: walker.inside_record() })
}

/// Makes a whole segment of one that is still being written: what follows the end of its last complete record becomes
/// zeros, which recovery takes for the end of WAL. An unfinished record must go: its pages would promise a rest that is
/// not there.
///
/// `segment` holds the bytes from `segment_start` to where they are valid. Where the result's `end` is `segment_start`, no
/// record ends in it: it is zeros throughout and better not served.
pub fn pad_open_segment(segment: &mut Vec<u8>, segment_start: Lsn, size: SegmentSize) -> Result<WalEnd, WalDamage> {
    if segment_start.segment_offset(size) != 0 {
        return Err(WalDamage::NotAPageStart { at: segment_start });
    }
    segment.truncate(size.bytes() as usize);
    let end = wal_end(segment_start, size, [segment.as_slice()])?;
    let used = end.end.bytes_since(segment_start).unwrap_or(0).min(size.bytes());
    segment.truncate(used as usize);
    segment.resize(size.bytes() as usize, 0);
    Ok(end)
}
