//! Summaries of WAL that was built for it: any slices, what is bounded, what is joined.

use proptest::collection::vec;
use proptest::prelude::*;

use super::builder::{WalBuilder, main_fragment};
use super::summary::{OPEN_MAX, TOUCHED_MAX};
use super::*;
use crate::types::{Lsn, SegmentSize};

const HEAP: u8 = rmgr::HEAP;

fn file(number: u32) -> Touched {
    Touched::File(RelFile { tablespace: 1663, database: 5, number })
}

/// A record of the heap that touches one block.
fn heap(number: u32, len: usize) -> Vec<u8> {
    let mut body = vec![0, 0, 0, 0];
    [1663, 5, number, 7].iter().for_each(|word: &u32| body.extend(word.to_le_bytes()));
    body.extend(main_fragment(&vec![1; len]));
    body
}

fn commit(wal: &mut WalBuilder, xid: u32, subxids: &[u32]) {
    let mut data = 5i64.to_le_bytes().to_vec();
    let info = if subxids.is_empty() { 0 } else { 0x80 };
    if !subxids.is_empty() {
        data.extend(2u32.to_le_bytes());
        data.extend((subxids.len() as u32).to_le_bytes());
        subxids.iter().for_each(|sub| data.extend(sub.to_le_bytes()));
    }
    wal.record(rmgr::XACT, info, xid, &main_fragment(&data));
}

fn builder() -> WalBuilder {
    WalBuilder::new(17, SegmentSize::new(1 << 20).unwrap(), Lsn::new(1 << 20))
}

/// What ended, and what goes on.
fn summarize(wal: &WalBuilder, slices: &[usize]) -> (Vec<Part>, Vec<Part>) {
    let mut decoder = Decoder::new(wal.start, wal.size).only(may_be_summarized);
    let (mut summarizer, mut ended) = (Summarizer::new(), Vec::new());
    let (mut rest, mut slices) = (wal.bytes.as_slice(), slices.iter().cycle());
    while !rest.is_empty() {
        let (now, later) = rest.split_at(slices.next().map_or(rest.len(), |len| (*len).min(rest.len())));
        decoder.push(now.to_vec());
        while let Some(record) = decoder.next().unwrap() {
            summarizer.push(&record).unwrap();
        }
        ended.extend(summarizer.take_ended());
        rest = later;
    }
    (ended, summarizer.take_open())
}

/// Landmarks lie between transactions, whatever has an xid.
#[test]
fn restore_points_and_parameters_are_landmarks() {
    for major in 13..=18 {
        let mut wal = WalBuilder::new(major, SegmentSize::new(1 << 20).unwrap(), Lsn::new(1 << 20));
        wal.record(HEAP, 0, 7, &heap(16384, 10));
        let mut named = 77i64.to_le_bytes().to_vec();
        named.extend(b"before release\0");
        named.resize(72, 0xEE); // what lay on the server's stack
        let point = wal.record(rmgr::XLOG, 0x70, 0, &main_fragment(&named));
        let mut settings: Vec<u8> = [100, 8, 10, 2, 64, 1].iter().flat_map(|n: &i32| n.to_le_bytes()).collect();
        settings.extend([1, 0]);
        let change = wal.record(rmgr::XLOG, 0x60, 0, &main_fragment(&settings));
        commit(&mut wal, 7, &[]);
        let (mut decoder, mut summarizer) =
            (Decoder::new(wal.start, wal.size).only(may_be_summarized), Summarizer::new());
        decoder.push(wal.bytes.clone());
        while let Some(record) = decoder.next().unwrap() {
            summarizer.push(&record).unwrap();
        }
        let found = summarizer.take_landmarks();
        assert_eq!(found.iter().map(|landmark| landmark.start).collect::<Vec<_>>(), [point, change], "{major}");
        let time = crate::types::PgTimestamp::new(77);
        assert_eq!(found[0].what, LandmarkKind::RestorePoint { name: "before release".to_owned(), time });
        let LandmarkKind::Parameters(parameters) = &found[1].what else { panic!("{found:?}") };
        assert_eq!((parameters.max_connections, parameters.wal_level), (100, WalLevel::Replica));
        assert!(parameters.wal_log_hints && !parameters.track_commit_timestamp);
        assert_eq!((summarizer.take_ended().len(), summarizer.take_landmarks()), (1, Vec::new()));
    }
}

proptest! {
    #[test]
    fn any_slices_give_the_same_summaries(
        records in vec((0u8..7, 3u32..9, 16380u32..16390, 0usize..9000), 1..40),
        slices in vec(1usize..9000, 1..6),
    ) {
        let mut wal = builder();
        for (kind, xid, number, len) in records {
            match kind {
                0 => commit(&mut wal, xid, &[xid + 10]),
                1 => { wal.record(HEAP, 0x10, xid + 10, &heap(number, len));
                }
                2 => { wal.record(HEAP, 0x40, xid, &heap(number, len)); }
                _ => { wal.record(HEAP, 0, xid, &heap(number, len)); }
            }
        }
        prop_assert_eq!(summarize(&wal, &slices), summarize(&wal, &[wal.bytes.len()]));
    }

    /// Its checksum is right and what it says is not: an error, and the records around it count.
    #[test]
    fn garbage_in_a_record_is_no_panic(rmgr in 0u8..22, info in any::<u8>(), body in vec(any::<u8>(), 0..60)) {
        let mut wal = builder();
        wal.record(HEAP, 0, 7, &heap(16384, 3));
        wal.record(rmgr, info, 7, &body);
        commit(&mut wal, 7, &[]);
        let mut decoder = Decoder::new(wal.start, wal.size);
        decoder.push(wal.bytes);
        let mut summarizer = Summarizer::new();
        while let Ok(Some(record)) = decoder.next() {
            let _ = summarizer.push(&record);
        }
    }
}

#[test]
fn a_subtransaction_counts_for_its_parent_and_a_cut_is_joined() {
    let mut wal = builder();
    wal.record(HEAP, 0, 7, &heap(16384, 3));
    wal.record(HEAP, 0, 8, &heap(16384, 3));
    wal.record(HEAP, 0x10, 8, &heap(16390, 3));
    let (_, open) = summarize(&wal, &[]);
    assert_eq!(open.iter().map(|part| part.xid).collect::<Vec<_>>(), [7, 8]);
    commit(&mut wal, 7, &[8]);
    let (whole, open_then) = summarize(&wal, &[]);
    assert!(open_then.is_empty());
    let what: Vec<_> = whole[0].touched.iter().map(|(what, is)| (*what, is.inserts, is.deletes)).collect();
    assert_eq!(what, [(file(16384), 2, 0), (file(16390), 0, 1)]);
    let mut end = Part::of(Vec::new());
    (end.xid, end.first, end.end) = (7, whole[0].end.as_ref().unwrap().start, whole[0].end.clone());
    join(&mut end, &open);
    assert_eq!((end.touched, end.first), (whole[0].touched.clone(), whole[0].first));
}

#[test]
fn p8_what_is_too_much_is_counted_and_said() {
    let mut wal = builder();
    for number in 0..TOUCHED_MAX as u32 + 5 {
        wal.record(HEAP, 0, 7, &heap(20_000 + number, 3));
    }
    commit(&mut wal, 7, &[]);
    let (ended, _) = summarize(&wal, &[]);
    assert_eq!((ended[0].touched.len(), ended[0].others), (TOUCHED_MAX, 5));

    let mut wal = builder();
    for xid in 10..OPEN_MAX as u32 + 12 {
        wal.record(HEAP, 0, xid, &heap(20_000, 3));
    }
    commit(&mut wal, OPEN_MAX as u32 + 11, &[]);
    let (ended, open) = summarize(&wal, &[]);
    assert!(ended[0].incomplete && open.len() == OPEN_MAX);
}
