//! Properties of the decoder over WAL that was built for them.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::builder::{Built, SYSTEM, WalBuilder, main_fragment, record_bytes};
use super::*;
use crate::types::{Lsn, SegmentSize, SystemId, TimelineId};

pub(super) const MIB: u64 = 1 << 20;

pub(super) fn mib() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

fn to_built(record: &Record<'_>) -> Built {
    let Record { start, end, prev, xid, rmgr, info, .. } = *record;
    Built { start, end, prev, xid, rmgr, info, body: record.body().to_vec() }
}

/// Pushes `slices` one by one and takes the records as they come.
fn decode(mut decoder: Decoder, slices: impl IntoIterator<Item = Bytes>) -> (Vec<Built>, Decoder, Option<WalDamage>) {
    let mut records = Vec::new();
    for slice in slices {
        decoder.push(slice);
        loop {
            match decoder.next() {
                Ok(Some(record)) => records.push(to_built(&record)),
                Ok(None) => break,
                Err(damage) => return (records, decoder, Some(damage)),
            }
        }
    }
    (records, decoder, None)
}

fn decode_whole(wal: &WalBuilder) -> (Vec<Built>, Decoder, Option<WalDamage>) {
    decode(Decoder::new(wal.start, wal.size), [Bytes::copy_from_slice(&wal.bytes)])
}

pub(super) fn cut(bytes: &[u8], cuts: &[Index]) -> Vec<Bytes> {
    let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    at.extend([0, bytes.len()]);
    at.sort_unstable();
    at.windows(2).map(|pair| Bytes::copy_from_slice(&bytes[pair[0]..pair[1]])).collect()
}

/// What to put into the WAL.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Record { rmgr: u8, info: u8, xid: u32, len: usize, fill: u8 },
    Switch,
    Overwritten { pages: usize },
}

fn a_step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![8 => 0usize..300, 3 => 7000usize..9000, 1 => 0usize..60_000];
    let record = (prop_oneof![Just(1u8), 9u8..=21], any::<u8>(), any::<u32>(), len, any::<u8>())
        .prop_map(|(rmgr, info, xid, len, fill)| Step::Record { rmgr, info, xid, len, fill });
    prop_oneof![20 => record, 1 => Just(Step::Switch), 2 => (0usize..4).prop_map(|pages| Step::Overwritten { pages })]
}

/// Begins a few pages before a segment's end, so that borders are met.
pub(super) fn build(major: u32, pages_before_border: u64, steps: &[Step]) -> WalBuilder {
    let mut wal = WalBuilder::new(major, mib(), Lsn::new(9 * MIB - pages_before_border * PAGE_SIZE));
    for step in steps {
        match *step {
            Step::Record { rmgr, info, xid, len, fill } => {
                let body: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(31) ^ fill).collect();
                wal.record(rmgr, info, xid, &body);
            }
            Step::Switch => {
                wal.switch();
            }
            Step::Overwritten { pages } => wal.overwritten(&vec![0xAB; 60_000], pages, None),
        }
    }
    wal
}

pub(super) fn some_wal() -> impl Strategy<Value = WalBuilder> {
    (13u32..=18, 1u64..5, vec(a_step(), 1..40)).prop_map(|(major, pages, steps)| build(major, pages, &steps))
}

impl std::fmt::Debug for WalBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes of {} from {}", self.bytes.len(), self.format.major, self.start)?;
        self.built.iter().try_for_each(|r| write!(f, "\n {} {} {} {}", r.start, r.end, r.rmgr, r.body.len()))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However the network slices the stream, the same records come out.
    #[test]
    fn slicing_does_not_matter(wal in some_wal(), cuts in vec(any::<Index>(), 0..60)) {
        let (records, decoder, damage) = decode(Decoder::new(wal.start, wal.size), cut(&wal.bytes, &cuts));
        prop_assert_eq!(damage, None);
        prop_assert_eq!(&records, &wal.built);
        let last = wal.built.last().unwrap();
        prop_assert_eq!(decoder.start_of_last_record(), Some(last.start));
        prop_assert_eq!(decoder.end_of_last_record(), last.end);
        prop_assert_eq!(decoder.position(), wal.at());
        prop_assert_eq!(decoder.ended_at(), None);
        prop_assert!(!decoder.inside_record());
        prop_assert_eq!(decoder.format().map(|format| format.major), Some(wal.format.major));
    }

    /// A decoder that hands out few records passes the others by without losing its place.
    #[test]
    fn unwanted_records_are_checked_and_passed_over(wal in some_wal(), cuts in vec(any::<Index>(), 0..60)) {
        fn wanted(rmgr: u8, info: u8) -> bool {
            rmgr.is_multiple_of(2) && info & 0x80 == 0
        }
        let decoder = Decoder::new(wal.start, wal.size).only(wanted);
        let (records, decoder, damage) = decode(decoder, cut(&wal.bytes, &cuts));
        prop_assert_eq!(damage, None);
        let expected: Vec<_> = wal.built.iter().filter(|r| wanted(r.rmgr, r.info)).cloned().collect();
        prop_assert_eq!(records, expected);
        prop_assert_eq!(decoder.start_of_last_record(), wal.built.last().map(|last| last.start));
    }

    /// From any page on, the records that begin there come out, and no other.
    #[test]
    fn reading_may_begin_at_any_page(wal in some_wal(), page in any::<Index>()) {
        let page = page.index(wal.bytes.len().div_ceil(PAGE_SIZE as usize)) * PAGE_SIZE as usize;
        let at = wal.start.advance(page as u64);
        let bytes = Bytes::copy_from_slice(&wal.bytes[page..]);
        let (records, decoder, damage) = decode(Decoder::new(at, wal.size), [bytes]);
        prop_assert_eq!(damage, None);
        let expected: Vec<_> = wal.built.iter().filter(|r| r.start >= at).cloned().collect();
        if at < wal.built.last().unwrap().end && !expected.is_empty() {
            prop_assert_eq!(decoder.end_of_last_record(), wal.built.last().unwrap().end);
        }
        prop_assert_eq!(records, expected);
    }

    /// Cut anywhere, the last whole record is told, and the padded segment holds exactly the whole records.
    #[test]
    fn the_end_of_open_wal_is_found(wal in some_wal(), cut in any::<Index>()) {
        let len = cut.index(wal.bytes.len() + 1);
        let end = wal_end(wal.start, wal.size, [&wal.bytes[..len / 2], &wal.bytes[len / 2..len]]).unwrap();
        let whole = |r: &&Built| {
            let (records, _, _) =
                decode(Decoder::new(wal.start, wal.size), [Bytes::copy_from_slice(&wal.bytes[..len])]);
            records.iter().any(|found| found.start == r.start)
        };
        let last = wal.built.iter().rev().find(whole);
        prop_assert_eq!(end.last_record, last.map(|r| r.start));
        prop_assert_eq!(end.end, last.map_or(wal.start, |r| r.end));
    }

    /// Bytes that are no WAL at all.
    #[test]
    fn garbage_never_panics(bytes in vec(any::<u8>(), 0..20_000), cuts in vec(any::<Index>(), 0..5)) {
        let _ = decode(Decoder::new(Lsn::new(MIB), mib()), cut(&bytes, &cuts));
        let mut watch = PageWatch::new(Lsn::new(MIB), mib(), None, TimelineId::FIRST).unwrap();
        let _ = watch.push(&bytes);
        let _ = pad_open_segment(&mut bytes.clone(), Lsn::new(MIB), mib());
    }

    /// Whatever a body holds, taking it apart ends in fragments or in damage; a fact that is read was really there.
    #[test]
    fn garbage_in_a_body_never_panics(
        major in 13u32..=18,
        kind in prop_oneof![Just((1u8, 0x80u8)), Just((1, 0xB0)), (0u8..=1, any::<u8>())],
        body in prop_oneof![
            vec(any::<u8>(), 0..300),
            vec(any::<u8>(), 0..200).prop_map(|data| main_fragment(&data)),
            vec(prop_oneof![3 => Just(0u8), 2 => any::<u8>()], 0..300),
        ],
    ) {
        let mut wal = WalBuilder::new(major, mib(), Lsn::new(MIB));
        if kind.0 == 0 && kind.1 & 0xF0 == 0x40 {
            return Ok(());
        }
        wal.record(kind.0, kind.1, 5, &body);
        let mut decoder = Decoder::new(wal.start, wal.size);
        decoder.push(wal.bytes);
        let record = decoder.next().unwrap().unwrap();
        let _ = fact(&record);
        if let Ok(fragments) = record.fragments() {
            prop_assert_eq!(record.main_data().unwrap(), fragments.main_data);
        }
    }
}

/// Flip every byte of some WAL, one at a time: it is noticed, or it was padding and the records are the same.
#[test]
fn any_flipped_byte_is_noticed() {
    for major in 13..=18 {
        let steps = [
            Step::Record { rmgr: 10, info: 0, xid: 1, len: 77, fill: 1 },
            Step::Record { rmgr: 1, info: 0, xid: 1, len: 9, fill: 2 },
            Step::Overwritten { pages: 0 },
            Step::Record { rmgr: 11, info: 0, xid: 1, len: 9000, fill: 3 },
            Step::Record { rmgr: 11, info: 0, xid: 1, len: 50, fill: 3 },
        ];
        // The border comes after the overwritten record: its page is the first of a segment.
        let wal = build(major, 1, &steps);
        let mut padding = std::collections::HashSet::new();
        for pair in wal.built.iter() {
            let body_end = pair.end.get() - (8 - (pair.body.len() as u64 % 8)) % 8;
            padding.extend(body_end..pair.end.get());
        }
        let mut unnoticed = 0;
        for index in 0..wal.bytes.len() {
            let mut bytes = wal.bytes.clone();
            bytes[index] ^= 0x10;
            let decoder = Decoder::new(wal.start, wal.size).expecting(Some(SystemId::new(SYSTEM)), TimelineId::new(1));
            let (records, _, damage) = decode(decoder, [Bytes::from(bytes)]);
            if damage.is_none() && records == wal.built {
                let at = wal.start.get() + index as u64;
                // Bytes of a record that was abandoned are covered by no checksum, nor are a page header's last four.
                let abandoned = wal.built[1].end.get() <= at && at < 9 * MIB;
                let header_padding = (20..24).contains(&(at % PAGE_SIZE));
                assert!(padding.contains(&at) || abandoned || header_padding, "major {major}: {at:X} went unnoticed");
                unnoticed += 1;
            } else {
                // Noticed: the records before it came out as they were, and none that is not there. (Where the last one's
                // length grew it is unfinished and no damage is known yet.)
                assert_eq!(records, wal.built[..records.len()], "major {major}: {index}");
            }
        }
        assert!(unnoticed < wal.bytes.len() / 2, "major {major}: {unnoticed} of {}", wal.bytes.len());
    }
}

#[test]
fn pitfall_30_a_record_that_spans_three_segments() {
    for major in 13..=18 {
        let mut wal = WalBuilder::new(major, mib(), Lsn::new(5 * MIB - PAGE_SIZE));
        wal.record(10, 0, 1, &[1; 50]);
        let big: Vec<u8> = (0..2 * MIB + 5000).map(|i| (i % 251) as u8).collect();
        let big_at = wal.record(10, 0, 2, &big);
        wal.record(10, 0, 3, &[3; 50]);
        assert_eq!(wal.built[1].end.segment(mib()).get() - big_at.segment(mib()).get(), 3);
        let slices: Vec<_> = wal.bytes.chunks(100_000).map(Bytes::copy_from_slice).collect();
        let (records, _, damage) = decode(Decoder::new(wal.start, mib()), slices.clone());
        assert_eq!((records, damage), (wal.built.clone(), None));

        // Nothing of it is kept by a decoder that does not want it.
        let mut decoder = Decoder::new(wal.start, mib()).only(may_be_fact);
        for slice in &slices {
            decoder.push(slice.clone());
            assert_eq!(decoder.next(), Ok(None));
        }
        assert_eq!(decoder.end_of_last_record(), wal.at());

        // From the second of the segments: wholly a continuation, like the third.
        let skipped = (6 * MIB - wal.start.get()) as usize;
        let mut decoder = Decoder::new(Lsn::new(6 * MIB), mib());
        decoder.push(Bytes::copy_from_slice(&wal.bytes[skipped..skipped + MIB as usize]));
        assert_eq!(decoder.next(), Ok(None));
        assert!(decoder.inside_record());
        assert_eq!((decoder.start_of_last_record(), decoder.end_of_last_record()), (None, Lsn::new(6 * MIB)));
        decoder.push(Bytes::copy_from_slice(&wal.bytes[skipped + MIB as usize..]));
        assert_eq!(decoder.next().unwrap().map(|r| to_built(&r)), Some(wal.built[2].clone()));

        // The open segment in its middle has nothing to serve; the last record is in the segment before.
        let mut open = wal.bytes[skipped..skipped + 300_000].to_vec();
        let end = pad_open_segment(&mut open, Lsn::new(6 * MIB), mib()).unwrap();
        assert_eq!(end, WalEnd { last_record: None, end: Lsn::new(6 * MIB), unfinished: true });
        assert_eq!(
            wal_end(wal.start, mib(), [&wal.bytes[..skipped + 300_000]]).unwrap().last_record,
            Some(wal.built[0].start)
        );
    }
}

#[test]
fn a_page_that_does_not_continue_what_it_should() {
    let mut wal = WalBuilder::new(17, mib(), Lsn::new(2 * MIB));
    wal.record(10, 0, 1, &[7; 20_000]);
    let page = PAGE_SIZE as usize;
    let case = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = wal.bytes.clone();
        edit(&mut bytes);
        decode(Decoder::new(wal.start, wal.size), [Bytes::from(bytes)]).2
    };
    let at = wal.start.advance(PAGE_SIZE);
    let missing = 24 + 20_000 - (PAGE_SIZE - 40);
    assert_eq!(case(&|_| ()), None);
    assert_eq!(
        case(&|b| b[page + 16] ^= 1),
        Some(WalDamage::Continuation { at, expected: missing, found: missing ^ 1 })
    );
    assert_eq!(
        case(&|b| {
            b[page + 2] = 0;
            b[page + 16..page + 20].fill(0);
        }),
        Some(WalDamage::Continuation { at, expected: missing, found: 0 })
    );
    assert_eq!(case(&|b| b[page + 9] ^= 1), Some(WalDamage::PageAddress { at, found: Lsn::new(at.get() ^ 0x100) }));
    assert_eq!(case(&|b| b[page] = 0x13), Some(WalDamage::OtherMajor { at, expected: 17, found: 16 }));
    assert_eq!(case(&|b| b[page] = 0x99), Some(WalDamage::Magic { at, found: 0xD199 }));
    assert_eq!(case(&|b| b[3000] ^= 1), Some(WalDamage::Checksum { at: wal.built[0].start }));
}

#[test]
fn an_abandoned_record_must_be_named_by_what_replaces_it() {
    for pages in 0..4 {
        let mut wal = WalBuilder::new(14, mib(), Lsn::new(5 * MIB - 2 * PAGE_SIZE));
        wal.record(10, 0, 1, &[1; 50]);
        wal.overwritten(&[0xAB; 60_000], pages, None);
        wal.record(10, 0, 1, &[1; 50]);
        let (records, _, damage) = decode_whole(&wal);
        assert_eq!((records, damage), (wal.built.clone(), None));

        let mut wal = WalBuilder::new(14, mib(), Lsn::new(5 * MIB - 2 * PAGE_SIZE));
        wal.record(10, 0, 1, &[1; 50]);
        wal.overwritten(&[0xAB; 60_000], pages, Some(Lsn::new(0x77)));
        let expected = wal.built[0].end;
        let at = wal.built[1].start;
        assert_eq!(decode_whole(&wal).2, Some(WalDamage::Overwrite { at, expected, found: Lsn::new(0x77) }));
    }
    // Where the unfinished record began before the starting point, it cannot be compared.
    let mut wal = WalBuilder::new(14, mib(), Lsn::new(5 * MIB - 2 * PAGE_SIZE));
    wal.overwritten(&[0xAB; 60_000], 1, None);
    let page = PAGE_SIZE as usize;
    let (records, _, damage) =
        decode(Decoder::new(wal.start.advance(PAGE_SIZE), mib()), [Bytes::copy_from_slice(&wal.bytes[page..])]);
    assert_eq!((records, damage), (wal.built.clone(), None));
}

#[test]
fn a_stale_record_is_told_by_its_prev_link() {
    let mut wal = WalBuilder::new(16, mib(), Lsn::new(2 * MIB));
    wal.record(10, 0, 1, &[1; 50]);
    wal.prev = Lsn::new(MIB + 4096);
    let at = wal.record(10, 0, 1, &[1; 50]);
    let expected = wal.built[0].start;
    assert_eq!(decode_whole(&wal).2, Some(WalDamage::PrevLink { at, expected, found: Lsn::new(MIB + 4096) }));
}

#[test]
fn impossible_headers() {
    let first = Lsn::new(2 * MIB + 40);
    let case = |major, bytes: Vec<u8>| {
        let mut wal = WalBuilder::new(major, mib(), Lsn::new(2 * MIB));
        wal.record(10, 0, 1, &[]);
        wal.bytes.truncate(40);
        wal.bytes.extend(bytes);
        let damage = decode_whole(&wal).2;
        if let Some(damage) = &damage {
            assert_eq!(damage.at(), first, "{damage}");
        }
        damage.is_some()
    };
    let record = |rmgr, info, body: &[u8]| record_bytes(Lsn::new(0x28), 1, rmgr, info, body);
    assert!(!case(15, record(10, 0, &[1; 9])));
    assert!(case(15, record(22, 0, &[])), "no such resource manager");
    assert!(!case(15, record(128, 0, &[])), "an extension's");
    assert!(case(14, record(128, 0, &[])), "extensions have none before 15");
    assert!(case(15, record(0, 0x40, &[1])), "a switch with content");
    assert!(case(15, record_bytes(first, 1, 10, 0, &[])), "follows itself");
    assert!(case(15, vec![23, 0, 0, 0, 0, 0, 0, 0]), "shorter than its header");
    assert!(!case(16, ((1020u32 << 20) - 1).to_le_bytes().to_vec()));
    assert!(case(16, ((1020u32 << 20) + 1).to_le_bytes().to_vec()));
    assert!(!case(15, ((1020u32 << 20) + 1).to_le_bytes().to_vec()));
    assert!(case(15, 0x4000_0000u32.to_le_bytes().to_vec()));
}

#[test]
fn zeros_are_the_end_and_nothing_may_follow_them() {
    let mut wal = WalBuilder::new(15, mib(), Lsn::new(2 * MIB));
    wal.record(10, 0, 1, &[1; 60]);
    let end = wal.at();
    for len in [0, 1, 3, 4, 8, 23, 24, 500, 8191, 8192, 9000, 100_000] {
        for cuts in [100_000, 1, 7] {
            let bytes = [&wal.bytes[..], &vec![0; len]].concat();
            let slices: Vec<_> = bytes.chunks(cuts).map(Bytes::copy_from_slice).collect();
            let (records, decoder, damage) = decode(Decoder::new(wal.start, mib()), slices);
            assert_eq!((records, damage), (wal.built.clone(), None), "{len} zeros");
            assert_eq!(decoder.ended_at(), (len >= 4).then_some(end), "{len} zeros");
            assert_eq!(decoder.end_of_last_record(), end);

            let bytes = [&bytes[..], &[0, 0, 9]].concat();
            let slices: Vec<_> = bytes.chunks(cuts).map(Bytes::copy_from_slice).collect();
            let (_, _, damage) = decode(Decoder::new(wal.start, mib()), slices);
            if len >= 4 {
                let at = end.advance(len as u64 + 2);
                assert_eq!(damage, Some(WalDamage::DataAfterZeros { zeros_at: end, at }), "{len} zeros");
            }
        }
    }
}

#[test]
fn damage_stays() {
    let mut decoder = Decoder::new(Lsn::new(MIB), mib());
    decoder.push(vec![1; 9000]);
    let damage = decoder.next().unwrap_err();
    decoder.push(vec![0; 9000]);
    assert_eq!(decoder.next(), Err(damage));
    assert_eq!(Decoder::new(Lsn::new(MIB + 8), mib()).next(), Err(WalDamage::NotAPageStart { at: Lsn::new(MIB + 8) }));
}

#[test]
fn a_padded_open_segment_reads_to_its_last_record() {
    let mut wal = WalBuilder::new(18, mib(), Lsn::new(3 * MIB));
    for i in 0..500 {
        wal.record(10, 0, i, &vec![i as u8; 30 + (i as usize * 37) % 900]);
    }
    for len in [40, 41, 64, 100, 8192, 8200, 8216, 20_000, 100_001, wal.bytes.len() - 1, wal.bytes.len()] {
        let mut segment = wal.bytes[..len].to_vec();
        let end = pad_open_segment(&mut segment, wal.start, mib()).unwrap();
        assert_eq!(segment.len() as u64, MIB);
        let (records, decoder, damage) = decode(Decoder::new(wal.start, mib()), [Bytes::from(segment)]);
        assert_eq!(damage, None);
        assert_eq!(decoder.end_of_last_record(), end.end);
        assert_eq!(records.last().map(|r| r.start), end.last_record);
        assert_eq!(records, wal.built[..records.len()]);
        // No whole record was thrown away.
        let next = &wal.built.get(records.len());
        assert!(next.is_none_or(|next| next.end.get() > wal.start.get() + len as u64));
    }
}

#[test]
fn a_watch_sees_what_is_wrong_with_pages() {
    let mut wal = WalBuilder::new(15, mib(), Lsn::new(3 * MIB));
    for i in 0..200 {
        wal.record(10, 0, i, &[i as u8; 1000]);
    }
    wal.switch();
    wal.record(10, 0, 1, &[1; 1000]);
    let two = TimelineId::new(2).unwrap();
    let watch = |bytes: &[u8], system, timeline, cut: usize| {
        let mut watch = PageWatch::new(wal.start, mib(), system, timeline).unwrap();
        bytes.chunks(cut).try_for_each(|slice| watch.push(slice)).map(|()| watch)
    };
    let ours = Some(SystemId::new(SYSTEM));
    for cut in [1, 13, 8192, 100_000, 10_000_000] {
        let seen = watch(&wal.bytes, None, two, cut).unwrap();
        assert_eq!((seen.major(), seen.system(), seen.position()), (Some(15), ours, wal.at()));
        assert_eq!((seen.timeline(), seen.zeros_from()), (TimelineId::new(1), None));
        let first_segment = watch(&wal.bytes[..MIB as usize], ours, two, cut).unwrap();
        let switch_end = wal.built[200].start.advance(24).get().next_multiple_of(PAGE_SIZE);
        assert_eq!(first_segment.zeros_from(), Some(Lsn::new(switch_end)));
    }
    let other = Some(SystemId::new(5));
    assert!(matches!(watch(&wal.bytes, other, two, 100), Err(WalDamage::System { .. })));
    let broken = |index: usize, value: u8| {
        let mut bytes = wal.bytes.clone();
        bytes[index] = value;
        watch(&bytes, ours, two, 1000).map(|_| ()).unwrap_err()
    };
    let second = wal.start.advance(PAGE_SIZE);
    assert_eq!(broken(8192, 0), WalDamage::Magic { at: second, found: 0xD100 });
    assert!(matches!(broken(8192 + 2, 0x13), WalDamage::PageHeader { .. }));
    assert!(matches!(broken(8192 + 2, 0x03), WalDamage::PageHeader { .. }), "a long header within a segment");
    assert!(matches!(broken(8192 + 4, 0), WalDamage::PageHeader { .. }), "timeline 0");
    assert!(matches!(broken(8192 + 4, 3), WalDamage::Timeline { newer: true, .. }));
    assert!(matches!(broken(4, 2), WalDamage::Timeline { newer: false, .. }), "page 2 is older than page 1");
    assert!(matches!(broken(8192 + 8, 1), WalDamage::PageAddress { .. }));
    assert!(matches!(broken(24, 1), WalDamage::System { .. }));
    assert!(matches!(broken(34, 0x20), WalDamage::SegmentSize { found: 0x20_0000, .. }));
    assert!(matches!(broken(37, 0x10), WalDamage::PageHeader { .. }));
    let zeros = MIB as usize - 5;
    assert!(matches!(broken(zeros, 1), WalDamage::DataAfterZeros { .. }));
    assert!(PageWatch::new(second, mib(), None, two).is_err());
}
