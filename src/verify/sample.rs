//! Small clusters for the tests of this room.

use jiff::Timestamp;

use crate::catalog::inventory::{BranchInventory, Place};
use crate::catalog::records::{BackupInfo, ServerParameters};
use crate::catalog::survey::{Survey, WalObject, condensed, runs_of};
use crate::types::{Branch, ClusterId, Lsn, SegmentNumber, SegmentSize, SystemId};

pub const MIB: u64 = 1 << 20;

pub fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

pub fn first() -> Branch {
    "00000001".parse().unwrap()
}

/// The first byte of a segment.
pub fn at(segment: u64) -> Lsn {
    Lsn::new(segment * MIB)
}

/// When a segment was put.
pub fn put_at(segment: u64) -> i64 {
    1_790_000_000 + i64::try_from(segment).unwrap() * 60
}

pub fn backup(branch: Branch, start: Lsn, stop: Lsn) -> BackupInfo {
    let started_at = Timestamp::from_second(put_at(start.get() / MIB)).unwrap();
    BackupInfo {
        label: crate::types::BackupLabel::at(started_at),
        system: SystemId::new(7),
        branch,
        timeline: branch.timeline,
        start,
        stop,
        started_at,
        stopped_at: Timestamp::from_second(put_at(stop.get() / MIB)).unwrap(),
        server_version: 150_000,
        segment_size: size(),
        bytes: 1 << 30,
        stored_bytes: 1 << 28,
        files: 1000,
        tablespaces: Vec::new(),
        flagged: None,
        parameters: ServerParameters::default(),
    }
}

/// Whole segments of timeline 1, and base backups that begin in these segments and end in the next.
pub fn survey(segments: impl IntoIterator<Item = u64>, backups: &[u64]) -> Survey {
    let mut survey = Survey::new(ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) });
    let object = |segment: u64| WalObject {
        segment: SegmentNumber::new(segment),
        from: 0,
        to: u32::try_from(MIB).unwrap(),
        place: Place::Wal,
        token: None,
        len: 400_000,
        put_at: put_at(segment),
    };
    let objects: Vec<WalObject> = segments.into_iter().map(object).collect();
    survey.inventory.segment_size = Some(size());
    let pieces = condensed(runs_of(&objects, size()), size());
    survey.inventory.branches.insert(first(), BranchInventory { pieces, ..BranchInventory::new(first()) });
    survey.wal.insert(first(), objects);
    for start in backups {
        let info = backup(first(), at(*start).advance(40), at(start + 1).advance(80));
        survey.manifests.insert(info.label, crate::catalog::survey::References::default());
        survey.inventory.backups.push(info);
    }
    survey
}
