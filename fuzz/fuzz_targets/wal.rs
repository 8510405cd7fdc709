//! Whatever bytes come in as WAL: nothing panics, slices do not matter, and the audit tells of what stops the decoder.
#![no_main]
#![allow(dead_code, unused_imports, unreachable_pub, missing_docs)] // the rooms hold more than is fuzzed

// The two rooms alone, by their source: with the whole of pgkeep each build takes minutes.
#[path = "../../src/types/mod.rs"]
mod types;
#[path = "../../src/wal/mod.rs"]
mod wal;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use types::{Lsn, SegmentSize, TimelineId};
use wal::{Decoder, PageWatch, WalAudit, fact, format_of_major, pad_open_segment, wal_end};

const SEGMENT: u64 = 1 << 20;
/// Where the WAL begins unless its first page says otherwise.
const START: Lsn = Lsn::new(16 * SEGMENT);

fn size() -> SegmentSize {
    SegmentSize::new(SEGMENT).expect("a segment size")
}

/// The place that the first page claims, if it is the start of a segment.
fn start_of(bytes: &[u8]) -> Lsn {
    let claimed = bytes.get(8..16).and_then(|bytes| bytes.first_chunk()).map(|bytes| u64::from_le_bytes(*bytes));
    claimed.filter(|at| *at > 0 && *at < 1 << 60 && at % SEGMENT == 0).map_or(START, Lsn::new)
}

/// The records as the decoder finds them, and whether it stopped at damage.
fn records(start: Lsn, slices: &[Bytes]) -> (Vec<(Lsn, Lsn, u32, u32)>, bool) {
    let (mut decoder, mut found) = (Decoder::new(start, size()), Vec::new());
    for slice in slices {
        decoder.push(slice.clone());
        loop {
            match decoder.next() {
                Ok(Some(record)) => {
                    let parts = record.fragments();
                    if let Ok(parts) = &parts {
                        assert_eq!(record.main_data().as_ref().ok(), Some(&parts.main_data));
                    }
                    let _ = fact(&record);
                    found.push((record.start, record.end, record.xid, crc32c::crc32c(record.body())));
                }
                Ok(None) => break,
                Err(_) => return (found, true),
            }
        }
    }
    (found, false)
}

fn slices(bytes: &[u8], seed: u8) -> Vec<Bytes> {
    let len = [1, 7, 24, 1000, 8191, 8192, 100_000, usize::MAX][usize::from(seed % 8)];
    bytes.chunks(len).map(Bytes::copy_from_slice).collect()
}

/// Bytes that are WAL, or not.
fn stream(bytes: &[u8], seed: u8) {
    let start = start_of(bytes);
    let (whole, damaged) = records(start, &slices(bytes, 7));
    assert_eq!(records(start, &slices(bytes, seed)).0, whole);
    let audit = || WalAudit::new(start, size(), None, TimelineId::FIRST).expect("a segment's start");
    for mut audit in [audit(), audit().that_may_end()] {
        slices(bytes, seed).iter().for_each(|slice| audit.push(slice));
        assert_eq!(audit.position(), start.advance(bytes.len() as u64));
        let mut told = Vec::new();
        while let Some(unsound) = audit.take() {
            assert!(unsound.from < unsound.to);
            told.push(unsound);
        }
        assert!(told.len() <= 2 + bytes.len() / 4096);
        // Pages of a newer timeline than the first are damage to the audit alone.
        assert!(!damaged || !told.is_empty(), "the decoder stopped, and nothing was told");
    }
    let _ = wal_end(start, size(), [bytes]);
    let _ = pad_open_segment(&mut bytes.to_vec(), start, size());
    let mut watch = PageWatch::new(start, size(), None, TimelineId::FIRST).expect("a segment's start");
    let _ = watch.push(bytes);
}

/// A record with these contents and a right checksum: what lies behind the checksum is read, too.
fn record(major: u8, rmgr: u8, info: u8, body: &[u8]) {
    let format = format_of_major(13 + u32::from(major % 6)).expect("a major version");
    let body = &body[..body.len().min(8000)];
    let mut page = Vec::new();
    page.extend(format.magic.to_le_bytes());
    page.extend(2u16.to_le_bytes());
    page.extend(1u32.to_le_bytes());
    page.extend(START.get().to_le_bytes());
    page.extend([0; 8]);
    page.extend(7u64.to_le_bytes());
    page.extend((SEGMENT as u32).to_le_bytes());
    page.extend(8192u32.to_le_bytes());
    let mut head = (24 + body.len() as u32).to_le_bytes().to_vec();
    head.extend(5u32.to_le_bytes());
    head.extend(0x28u64.to_le_bytes());
    head.extend([info, rmgr, 0, 0]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(body), &head);
    head.extend(crc.to_le_bytes());
    page.extend(head);
    page.extend(body);
    stream(&page, rmgr);
}

fuzz_target!(|input: &[u8]| {
    match input {
        [seed, bytes @ ..] if seed & 0x80 == 0 => stream(bytes, *seed),
        [seed, rmgr, info, body @ ..] => record(*seed, *rmgr, *info, body),
        _ => {}
    }
});
