//! What `wal fetch --standby` answers differently: pure.
//!
//! A standby that is told "not there" does not promote: it streams, or waits, and asks again. So a fault is answered so. One
//! thing must not come of it: the server asks for a segment on every timeline that it knows, the newest first, and goes on
//! with the next older one; and it looks for newer timelines only when the archive has no more for it. Told wrongly that the
//! child is not there it would replay the parent, past the fork. So what a parent wrote behind the fork is not
//! served at all, by the newest history that is archived or that the standby has itself.
//!
//! This is for a standby that follows the newest timeline, PostgreSQL's default.

use std::collections::BTreeMap;
use std::path::Path;

use crate::types::{SegmentNumber, SegmentSize, TimelineHistory, TimelineId, WalFileName};

/// The histories in `folder` that can be read: of the timelines that the standby has chosen so far.
pub fn own_histories(folder: &Path) -> BTreeMap<TimelineId, TimelineHistory> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(WalFileName::History(timeline)) = entry.file_name().to_string_lossy().parse() else { continue };
        let text = std::fs::read(entry.path()).unwrap_or_default();
        if let Ok(history) = TimelineHistory::parse(timeline, &text) {
            found.insert(timeline, history);
        }
    }
    found
}

/// Does the newest timeline leave this one before the segment's end? Then a later one holds the segment.
pub fn is_left(
    histories: &BTreeMap<TimelineId, TimelineHistory>,
    timeline: TimelineId,
    segment: SegmentNumber,
    size: SegmentSize,
) -> bool {
    let left = histories.values().next_back().and_then(|newest| newest.left_at(timeline));
    left.is_some_and(|left| left < segment.end(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p7_a_standby_is_not_led_past_a_fork() {
        let size = SegmentSize::new(1 << 20).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let own = |files: &[(&str, &str)]| {
            for (name, text) in files {
                std::fs::write(folder.path().join(name), text).unwrap();
            }
            own_histories(folder.path())
        };
        let left = |histories: &BTreeMap<_, _>, number, segment| {
            is_left(histories, TimelineId::new(number).unwrap(), SegmentNumber::new(segment), size)
        };
        assert!(!left(&own(&[("00000003.history", "no history")]), 1, 5));
        // Left within segment 5, and on the border of segment 8.
        let two = own(&[("00000002.history", "1\t0/500100\tx\n")]);
        assert_eq!([4, 5, 6].map(|segment| left(&two, 1, segment)), [false, true, true]);
        assert!(!left(&two, 2, 5));
        let three = own(&[("00000003.history", "1\t0/500100\tx\n2\t0/800000\tx\n")]);
        assert_eq!([5, 7, 8].map(|segment| left(&three, 2, segment)), [false, false, true]);
        // Timeline 4 went off timeline 1 later than 2 did: what lies between is on its way.
        let four = own(&[("00000004.history", "1\t0/900100\tx\n")]);
        assert_eq!([8, 9].map(|segment| left(&four, 1, segment)), [false, true]);
        assert!(!left(&four, 3, 9), "it has no part in it");
    }
}
