//! Every kind of fact in every version, field by field; what PostgreSQL never writes is damage.

use super::builder::{WalBuilder, main_fragment};
use super::transaction::*;
use super::*;
use crate::types::{Lsn, PgTimestamp, SegmentSize, TimelineId};

const TIME: i64 = 817_000_000_123_456;

/// The fact in a record with this main data.
fn read(major: u32, rmgr: u8, info: u8, xid: u32, data: &[u8]) -> Result<Option<Fact>, WalDamage> {
    let size = SegmentSize::new(1 << 20).unwrap();
    let mut wal = WalBuilder::new(major, size, Lsn::new(1 << 20));
    let body = if data.is_empty() { vec![] } else { main_fragment(data) };
    wal.record(rmgr, info, xid, &body);
    let mut decoder = Decoder::new(wal.start, size);
    decoder.push(wal.bytes);
    fact(&decoder.next().unwrap().unwrap())
}

fn time() -> PgTimestamp {
    PgTimestamp::new(TIME)
}

/// A commit's or abort's data with everything that `version` can write.
fn full_end(major: u32, two_phase: bool, commits: bool) -> Vec<u8> {
    let mut xinfo = XINFO_DBINFO | XINFO_SUBXACTS | XINFO_RELATIONS | 1 << 5;
    let mut rest: Vec<u8> = Vec::new();
    let word = |rest: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|word| rest.extend(word.to_le_bytes()));
    word(&mut rest, &[16384, 1663]);
    word(&mut rest, &[3, 501, 502, 503]);
    word(&mut rest, &[2, 1663, 16384, 16400, 1663, 16384, 16401]);
    let stats = match major {
        13 | 14 => 0,
        15..=17 => 12,
        _ => 16,
    };
    if stats > 0 {
        xinfo |= XINFO_DROPPED_STATS;
        word(&mut rest, &[2]);
        rest.extend(vec![0xEE; 2 * stats]);
    }
    if commits {
        xinfo |= XINFO_INVALIDATIONS;
        word(&mut rest, &[1]);
        rest.extend([0xDD; 16]);
    }
    if two_phase {
        xinfo |= XINFO_TWOPHASE | 1 << 7;
        word(&mut rest, &[777]);
        rest.extend(b"a gid\0");
    }
    rest.extend([0xCC; 16]);
    let mut data = TIME.to_le_bytes().to_vec();
    data.extend(xinfo.to_le_bytes());
    data.extend(rest);
    data
}

#[test]
fn pitfall_30_commit_prepared_has_its_xid_in_the_two_phase_part() {
    for major in 13..=18 {
        let subxids = vec![501, 502, 503];
        let cases = [
            (COMMIT, 42, Fact::Commit { xid: 42, time: time(), subxids: subxids.clone(), prepared: false }),
            (ABORT, 42, Fact::Abort { xid: 42, time: time(), subxids: subxids.clone(), prepared: false }),
            (COMMIT_PREPARED, 0, Fact::Commit { xid: 777, time: time(), subxids: subxids.clone(), prepared: true }),
            (ABORT_PREPARED, 0, Fact::Abort { xid: 777, time: time(), subxids, prepared: true }),
        ];
        for (opcode, xid, want) in cases {
            let prepared = matches!(opcode, COMMIT_PREPARED | ABORT_PREPARED);
            let data = full_end(major, prepared, matches!(opcode, COMMIT | COMMIT_PREPARED));
            assert_eq!(read(major, 1, opcode | HAS_XINFO, xid, &data), Ok(Some(want)), "{major}");
            // Cut off anywhere before what is needed, it is damage and nothing else.
            let needed = if prepared { data.len() - 22 } else { 8 + 4 + 8 + 16 };
            for len in 1..needed {
                assert!(read(major, 1, opcode | HAS_XINFO, xid, &data[..len]).is_err(), "{major}: {len} bytes");
            }
        }
    }
    let plain = TIME.to_le_bytes();
    let want = Fact::Commit { xid: 9, time: time(), subxids: vec![], prepared: false };
    assert_eq!(read(15, 1, COMMIT, 9, &plain), Ok(Some(want)));
    assert!(read(15, 1, COMMIT_PREPARED, 0, &plain).is_err(), "which one?");
    assert!(read(14, 1, COMMIT_PREPARED | HAS_XINFO, 0, &full_end(15, true, true)).is_err(), "14 drops no statistics");
    for (name, opcode) in [("PREPARE", 0x10), ("ASSIGNMENT", 0x50), ("INVALIDATIONS", 0x60)] {
        assert_eq!(read(15, 1, opcode, 9, &plain), Ok(None), "{name}");
    }
    let negative = [&TIME.to_le_bytes()[..], &XINFO_SUBXACTS.to_le_bytes(), &(-1i32).to_le_bytes()].concat();
    assert!(read(15, 1, COMMIT | HAS_XINFO, 9, &negative).is_err());
    let huge = [&TIME.to_le_bytes()[..], &XINFO_SUBXACTS.to_le_bytes(), &i32::MAX.to_le_bytes()].concat();
    assert!(read(15, 1, COMMIT | HAS_XINFO, 9, &huge).is_err());
}

#[test]
fn restore_points_end_at_their_nul() {
    let point = |name: &[u8]| {
        let mut data = TIME.to_le_bytes().to_vec();
        data.extend(name);
        data.resize(72, 0x7F); // garbage behind the NUL
        match read(16, 0, RESTORE_POINT, 0, &data) {
            Ok(Some(Fact::RestorePoint { name, time: at })) if at == time() => name,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(point(b"before upgrade\0"), "before upgrade");
    assert_eq!(point(b"\0"), "");
    assert_eq!(point("größer\0".as_bytes()), "größer");
    assert_eq!(point(b"gr\xF6\xDFer\0"), "gr\u{FFFD}\u{FFFD}er");
    assert_eq!(point(&[b'n'; 64]), "n".repeat(64));
}

#[test]
fn parameters_are_all_told() {
    let numbers = [100i32, 8, 10, 2, 64, 1];
    let mut data: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    data.extend([1, 0, 0, 0]);
    let want = Parameters {
        max_connections: 100,
        max_worker_processes: 8,
        max_wal_senders: 10,
        max_prepared_transactions: 2,
        max_locks_per_transaction: 64,
        wal_level: WalLevel::Replica,
        wal_log_hints: true,
        track_commit_timestamp: false,
    };
    assert_eq!(read(13, 0, PARAMETER_CHANGE, 0, &data), Ok(Some(Fact::ParameterChange(want))));
    data[20] = 3;
    assert!(read(13, 0, PARAMETER_CHANGE, 0, &data).is_err());
}

#[test]
fn checkpoints_and_ends() {
    let mut data = vec![0u8; 88];
    data[..8].copy_from_slice(&0x5_0000_0028u64.to_le_bytes());
    data[8..12].copy_from_slice(&3u32.to_le_bytes());
    data[12..16].copy_from_slice(&2u32.to_le_bytes());
    data[16] = 1;
    data[20..24].copy_from_slice(&2u32.to_le_bytes());
    data[24..32].copy_from_slice(&0x1_0000_0200u64.to_le_bytes());
    data[64..72].copy_from_slice(&946_684_801i64.to_le_bytes());
    let (two, three) = (TimelineId::new(2).unwrap(), TimelineId::new(3).unwrap());
    for major in 13..=18 {
        for (info, shutdown) in [(CHECKPOINT_SHUTDOWN, true), (CHECKPOINT_ONLINE, false)] {
            let want = Checkpoint {
                shutdown,
                redo: Lsn::new(0x5_0000_0028),
                timeline: three,
                previous_timeline: two,
                next_xid: 0x1_0000_0200,
                time: PgTimestamp::new(1_000_000),
                full_page_writes: true,
                wal_level: (major >= 17).then_some(WalLevel::Logical),
            };
            assert_eq!(read(major, 0, info, 0, &data), Ok(Some(Fact::Checkpoint(want))));
        }
    }
    assert!(read(15, 0, CHECKPOINT_ONLINE, 0, &data[..71]).is_err());
    data[8..12].fill(0);
    assert!(read(15, 0, CHECKPOINT_ONLINE, 0, &data).is_err(), "timeline 0");

    let end = [&TIME.to_le_bytes()[..], &3u32.to_le_bytes(), &2u32.to_le_bytes()].concat();
    let want = Fact::EndOfRecovery { time: time(), timeline: three, previous_timeline: two };
    assert_eq!(read(13, 0, END_OF_RECOVERY, 0, &end), Ok(Some(want)));
    let backup = 0x28u64.to_le_bytes();
    assert_eq!(read(13, 0, BACKUP_END, 0, &backup), Ok(Some(Fact::BackupEnd { start: Lsn::new(0x28) })));
    assert_eq!(read(13, 0, SWITCH, 0, &[]), Ok(Some(Fact::Switch)));
    let lost = [0x28u64.to_le_bytes(), TIME.to_le_bytes()].concat();
    let want = Fact::OverwrittenRecord { start: Lsn::new(0x28), time: time() };
    assert_eq!(read(13, 0, OVERWRITE_CONTRECORD, 0, &lost), Ok(Some(want)));
    for info in [0x20, 0x30, 0x80, 0xA0, 0xB0, 0xE0] {
        assert_eq!(read(18, 0, info, 0, &backup), Ok(None));
    }
    assert_eq!(read(18, 10, COMMIT, 0, &backup), Ok(None));
}
