//! What is sound is never told of, what is damaged always is, however the bytes are sliced.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::builder::{SYSTEM, WalBuilder};
use super::decoder_tests::{MIB, Step, build, cut, mib, some_wal};
use super::*;
use crate::types::{Lsn, SystemId, TimelineId};

fn audit(at: Lsn) -> WalAudit {
    WalAudit::new(at, mib(), Some(SystemId::new(SYSTEM)), TimelineId::FIRST).unwrap()
}

fn run(mut audit: WalAudit, slices: &[Bytes]) -> (Vec<Unsound>, WalAudit) {
    slices.iter().for_each(|slice| audit.push(slice));
    let found = std::iter::from_fn(|| audit.take()).collect();
    (found, audit)
}

fn whole(audit: WalAudit, bytes: &[u8]) -> (Vec<Unsound>, WalAudit) {
    run(audit, &[Bytes::copy_from_slice(bytes)])
}

/// What bad memory, bad disks and bad luck do to bytes.
#[derive(Debug, Clone)]
enum Harm {
    Flip {
        at: Index,
        mask: u8,
    },
    Zeros {
        at: Index,
        len: usize,
    },
    Noise {
        at: Index,
        len: usize,
        seed: u64,
    },
    /// A page of another place.
    Page {
        from: Index,
        to: Index,
    },
}

fn harm() -> impl Strategy<Value = Harm> {
    let len = || prop_oneof![1usize..64, Just(512), Just(4096), Just(8192), Just(24_576)];
    prop_oneof![
        4 => (any::<Index>(), 1u8..).prop_map(|(at, mask)| Harm::Flip { at, mask }),
        2 => (any::<Index>(), len()).prop_map(|(at, len)| Harm::Zeros { at, len }),
        2 => (any::<Index>(), len(), any::<u64>()).prop_map(|(at, len, seed)| Harm::Noise { at, len, seed }),
        1 => (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Harm::Page { from, to }),
    ]
}

fn inflict(bytes: &mut [u8], harm: &Harm) {
    let (len_of_all, page) = (bytes.len(), PAGE_SIZE as usize);
    match *harm {
        Harm::Flip { at, mask } => bytes[at.index(len_of_all)] ^= mask,
        Harm::Zeros { at, len } => {
            let at = at.index(len_of_all);
            bytes[at..(at + len).min(len_of_all)].fill(0);
        }
        Harm::Noise { at, len, mut seed } => {
            let at = at.index(len_of_all);
            for byte in &mut bytes[at..(at + len).min(len_of_all)] {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *byte = (seed >> 56) as u8;
            }
        }
        Harm::Page { from, to } => {
            let pages = len_of_all / page;
            if pages > 0 {
                let (from, to) = (from.index(pages) * page, to.index(pages) * page);
                bytes.copy_within(from..from + page, to);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Switches, unfinished records and their pages, segment borders, an end anywhere: no alarm.
    #[test]
    fn sound_wal_raises_no_alarm(wal in some_wal(), cuts in vec(any::<Index>(), 0..30), end in any::<Index>(), zeros in 0usize..20_000) {
        let len = end.index(wal.bytes.len() + 1);
        let (found, seen) = run(audit(wal.start), &cut(&wal.bytes[..len], &cuts));
        prop_assert_eq!(found, vec![]);
        prop_assert_eq!(seen.position(), wal.start.advance(len as u64));
        // A file whose WAL ends somewhere.
        let mut file = wal.bytes.clone();
        file.resize(file.len() + zeros, 0);
        let (found, seen) = whole(audit(wal.start).that_may_end(), &file);
        prop_assert_eq!(found, vec![]);
        prop_assert!(zeros < 64 || seen.ended_at() == Some(wal.at()), "{:?}", seen.ended_at());
        // Reading may begin at any page.
        let page = end.index(wal.bytes.len().div_ceil(PAGE_SIZE as usize)) * PAGE_SIZE as usize;
        let (found, _) = whole(audit(wal.start.advance(page as u64)).that_may_end(), &wal.bytes[page..]);
        prop_assert_eq!(found, vec![]);
    }

    /// The first alarm begins where reading stops; slices do not matter; what is not told of is there unharmed, and what is
    /// read again was really written.
    #[test]
    fn damage_is_told_and_nothing_else(wal in some_wal(), harms in vec(harm(), 1..4), cuts in vec(any::<Index>(), 0..30)) {
        let mut bytes = wal.bytes.clone();
        harms.iter().for_each(|harm| inflict(&mut bytes, harm));
        let (found, seen) = whole(audit(wal.start), &bytes);
        let (sliced, _) = run(audit(wal.start), &cut(&bytes, &cuts));
        // Zeros in the place of the last header of all are told of when more follows.
        let before_the_end = |one: &&Unsound| one.from.advance(64) <= wal.at();
        let places = |found: &[Unsound]| {
            found.iter().filter(before_the_end).map(|one| (one.from, one.to, one.goes_on)).collect::<Vec<_>>()
        };
        prop_assert_eq!(places(&found), places(&sliced));

        // The judge: a decoder that stops at the first damage.
        let mut decoder = Decoder::new(wal.start, mib()).expecting(Some(SystemId::new(SYSTEM)), Some(TimelineId::FIRST));
        decoder.push(bytes.clone());
        let mut intact = wal.start;
        // Zeros are damage in a stream, once something follows the header that they stand for.
        let (may_tell, must_tell) = loop {
            match decoder.next() {
                Ok(Some(record)) => intact = record.end,
                Ok(None) => {
                    let ended = decoder.ended_at();
                    break (ended.is_some(), ended.is_some_and(|at| at.advance(40) < wal.at()));
                }
                Err(_) => break (true, true),
            }
        };
        match found.first() {
            // A decoder may begin behind a switch, where pages are zeros; a stream begins with a segment.
            Some(first) if first.damage == (WalDamage::Zeros { at: wal.start }) => {}
            Some(first) => {
                prop_assert!(may_tell, "{first:?}");
                prop_assert!(intact <= first.from.advance(40) && !first.goes_on, "{intact} and {first:?}");
            }
            None => prop_assert!(!must_tell, "nothing was told"),
        }
        for pair in found.windows(2) {
            prop_assert!(pair[0].from < pair[0].to && pair[0].to <= pair[1].from, "{found:?}");
        }
        // Whatever record was harmed lies in what was told, or behind it where it was never sound again.
        let lost_from = seen.is_lost().and_then(|_| found.iter().rev().find(|one| !one.goes_on)).map(|one| one.from);
        for record in &wal.built {
            let from = record.start.bytes_since(wal.start).unwrap() as usize;
            let body_ends = wal.bytes.len().min(from + 24 + record.body.len());
            let on_one_page = record.start.get() % PAGE_SIZE + 24 + record.body.len() as u64 <= PAGE_SIZE;
            // A length that grew is noticed where the next page does not go on with the record.
            let next_page = (record.start.get() / PAGE_SIZE + 1) * PAGE_SIZE;
            let on_one_page = on_one_page && next_page + 64 <= wal.at().get();
            if on_one_page && wal.bytes[from..body_ends] != bytes[from..body_ends] && wal.bytes[from..from + 18] != bytes[from..from + 18] {
                let told = found.iter().any(|one| one.from <= record.start && record.start < one.to);
                prop_assert!(told || lost_from.is_some_and(|lost| lost <= record.start), "{} of {found:?}", record.start);
            }
        }
    }
}

/// Damage in the middle, and everything behind the next page is watched again.
#[test]
fn what_follows_damage_is_watched_again() {
    for major in 13..=18 {
        let record = |len| Step::Record { rmgr: 10, info: 0, xid: 1, len, fill: 7 };
        let steps: Vec<Step> = (0..200).map(|_| record(1000)).chain([record(30_000), record(500)]).collect();
        let wal: WalBuilder = build(major, 3, &steps);
        let start_of = |index: usize| wal.built[index].start;
        let offset = |lsn: Lsn| lsn.bytes_since(wal.start).unwrap() as usize;
        let next_page = |lsn: Lsn| Lsn::new(lsn.get().next_multiple_of(PAGE_SIZE));
        let first_from = |lsn: Lsn| wal.built.iter().find(|record| record.start >= lsn).unwrap().start;
        let alarms = |harm: &dyn Fn(&mut [u8])| {
            let mut bytes = wal.bytes.clone();
            harm(&mut bytes);
            let (found, seen) = whole(audit(wal.start), &bytes);
            assert_eq!(seen.is_lost(), None, "{found:?}");
            found
        };
        // A byte of a body, twice, far apart: two alarms, each to the next page, or on to the first record behind it.
        let (a, b) = (start_of(20), start_of(150));
        let found = alarms(&|bytes| [a, b].iter().for_each(|at| bytes[offset(*at) + 100] ^= 1));
        let mut expected = Vec::new();
        for at in [a, b] {
            let to = next_page(at);
            expected.push(Unsound { from: at, to, damage: WalDamage::Checksum { at }, goes_on: false });
            let sound = first_from(to);
            expected.push(Unsound { from: to, to: sound, damage: WalDamage::Checksum { at }, goes_on: true });
        }
        assert_eq!(found, expected, "{major}");
        // A page's header, within a record that goes on there.
        let page = next_page(start_of(200)).advance(PAGE_SIZE);
        let found = alarms(&|bytes| bytes[offset(page)] ^= 1);
        assert_eq!(found.first().map(|one| (one.from, one.to)), Some((start_of(200), page)), "{major}");
        assert_eq!(found.last().map(|one| one.to), Some(start_of(201)));
        // A whole page of zeros, as a lost write leaves it.
        let page = next_page(start_of(60));
        let found = alarms(&|bytes| bytes[offset(page)..offset(page) + 8192].fill(0));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].from <= page && found[1].to >= page.advance(PAGE_SIZE), "{found:?}");
    }
}

/// Seeded, and quick enough for every run: no mutation of anything that looks like WAL makes any reader panic.
#[test]
fn mutated_wal_never_panics() {
    let mut seed = 20_261_121_u64;
    let mut next = move |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((seed >> 33) as usize) % below.max(1)
    };
    for round in 0..400 {
        let major = 13 + round % 6;
        let steps: Vec<Step> = (0..30)
            .map(|_| match next(12) {
                0 => Step::Overwritten { pages: next(3) },
                1 => Step::Record { rmgr: 10, info: 0, xid: 3, len: next(30_000), fill: 1 },
                _ => Step::Record {
                    rmgr: next(22) as u8,
                    info: (next(16) << 4) as u8 & 0xB0,
                    xid: 1,
                    len: next(300),
                    fill: next(256) as u8,
                },
            })
            .collect();
        let wal = build(major as u32, 1 + next(4) as u64, &steps);
        let mut bytes = wal.bytes.clone();
        for _ in 0..1 + next(6) {
            let (at, len) = (next(bytes.len()), 1 + next(40));
            match next(4) {
                0 => bytes[at] = next(256) as u8,
                1 => bytes.truncate(at.max(1)),
                2 => bytes.iter_mut().skip(at).take(len).for_each(|byte| *byte = 0xFF),
                _ => {
                    let from = next(bytes.len());
                    let piece: Vec<u8> = bytes.iter().skip(from).take(len * 30).copied().collect();
                    bytes.iter_mut().skip(at).zip(piece).for_each(|(to, from)| *to = from);
                }
            }
        }
        everything(wal.start, &bytes, 1 + next(20_000));
    }
}

/// Every reader of WAL there is.
fn everything(at: Lsn, bytes: &[u8], slice: usize) {
    let mut decoder = Decoder::new(at, mib());
    for slice in bytes.chunks(slice) {
        decoder.push(Bytes::copy_from_slice(slice));
        while let Ok(Some(record)) = decoder.next() {
            let _ = (fact(&record), record.fragments(), record.main_data());
        }
    }
    for audit in [audit(at), audit(at).that_may_end()] {
        let (found, seen) = run(audit, &bytes.chunks(slice).map(Bytes::copy_from_slice).collect::<Vec<_>>());
        assert!(found.len() <= 2 + 2 * bytes.len() / PAGE_SIZE as usize, "more alarms than pages");
        assert_eq!(seen.position(), at.advance(bytes.len() as u64));
    }
    let _ = wal_end(at, mib(), bytes.chunks(slice));
    let start = at.segment_start(mib());
    let _ = pad_open_segment(&mut bytes.to_vec(), start, mib());
    let mut watch = PageWatch::new(start, mib(), None, TimelineId::FIRST).unwrap();
    let _ = watch.push(bytes);
    assert!(WalAudit::new(Lsn::new(MIB + 1), mib(), None, TimelineId::FIRST).is_err());
}
