use super::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn touched() -> impl Strategy<Value = Touched> {
    prop_oneof![
        (1u32..4, 0u32..3, any::<u32>()).prop_map(|(tablespace, database, number)| Touched::File(RelFile {
            tablespace,
            database,
            number
        })),
        (0u32..3, any::<u32>()).prop_map(|(database, oid)| Touched::Relation { database, oid }),
        any::<u32>().prop_map(Touched::Database),
        any::<u32>().prop_map(Touched::Tablespace),
    ]
}

fn changes() -> impl Strategy<Value = Changes> {
    (0u64..9, 0u64..9, any::<u64>(), 0u8..32).prop_map(|(inserts, updates, deletes, marks)| Changes {
        inserts,
        updates,
        deletes,
        marks,
    })
}

fn end() -> impl Strategy<Value = End> {
    (any::<u64>(), 0u64..999, any::<i64>(), any::<(bool, bool)>(), vec(any::<u32>(), 0..4)).prop_map(
        |(start, len, time, (aborted, prepared), subxids)| End {
            start: Lsn::new(start),
            end: Lsn::new(start).advance(len),
            time: PgTimestamp::new(time),
            aborted,
            prepared,
            subxids,
        },
    )
}

fn part() -> impl Strategy<Value = Part> {
    let what = vec((touched(), changes()), 0..4);
    let rest = (any::<u64>(), any::<bool>(), option::of(any::<u64>().prop_map(Lsn::new)), option::of(end()));
    (any::<u32>(), any::<u64>(), any::<u64>(), what, rest).prop_map(|(xid, first, bytes, touched, rest)| {
        let (others, incomplete, early, end) = rest;
        Part { xid, first: Lsn::new(first), bytes, touched, others, incomplete, early, end }
    })
}

fn landmark() -> impl Strategy<Value = Landmark> {
    let level = prop_oneof![Just(WalLevel::Minimal), Just(WalLevel::Replica), Just(WalLevel::Logical)];
    let parameters = (any::<[i32; 5]>(), level, any::<(bool, bool)>()).prop_map(|(numbers, wal_level, flags)| {
        let [max_connections, max_worker_processes, max_wal_senders, prepared, locks] = numbers;
        LandmarkKind::Parameters(Parameters {
            max_connections,
            max_worker_processes,
            max_wal_senders,
            max_prepared_transactions: prepared,
            max_locks_per_transaction: locks,
            wal_level,
            wal_log_hints: flags.0,
            track_commit_timestamp: flags.1,
        })
    });
    let restore_point = ("\\PC{0,20}", any::<i64>())
        .prop_map(|(name, time)| LandmarkKind::RestorePoint { name, time: PgTimestamp::new(time) });
    (any::<u64>(), 0u64..200, prop_oneof![restore_point, parameters]).prop_map(|(start, len, what)| Landmark {
        start: Lsn::new(start),
        end: Lsn::new(start).advance(len),
        what,
    })
}

fn written(parts: &[Part], landmarks: &[Landmark], from: u64, to: u64) -> (Vec<u8>, IndexNote) {
    let mut writer = IndexWriter::new(Lsn::new(from));
    parts.iter().for_each(|part| writer.push(part));
    landmarks.iter().for_each(|landmark| writer.push_landmark(landmark));
    writer.finish(Lsn::new(to), 17, Some(7))
}

fn all(file: &IndexFile, entries: Entries<'_>) -> Vec<Part> {
    entries.map(|entry| file.part(&entry.unwrap())).collect()
}

proptest! {
    #[test]
    fn what_was_written_is_read(
        parts in vec(part(), 0..12), landmarks in vec(landmark(), 0..4), from in any::<u64>(), to in any::<u64>(),
    ) {
        let (bytes, note) = written(&parts, &landmarks, from, to);
        let file = IndexFile::read(bytes.clone()).unwrap();
        let (ended, open): (Vec<Part>, Vec<Part>) = parts.into_iter().partition(|part| part.end.is_some());
        prop_assert_eq!((file.major, file.from, file.to), (17, Lsn::new(from), Lsn::new(to)));
        prop_assert_eq!((note.transactions, note.open), (ended.len() as u64, open.len() as u64));
        prop_assert_eq!(all(&file, file.ended()), ended);
        prop_assert_eq!(all(&file, file.open()), open);
        let is_named = |landmark: &&Landmark| matches!(landmark.what, LandmarkKind::RestorePoint { .. });
        let named = landmarks.iter().filter(is_named).count() as u64;
        prop_assert_eq!(note.restore_points.zip(note.parameter_changes), Some((named, landmarks.len() as u64 - named)));
        prop_assert_eq!((file.landmarks, file.landmarks_left_out), (Some(landmarks), 0));
        for cut in 0..bytes.len() {
            prop_assert!(IndexFile::read(bytes[..cut].to_vec()).is_err(), "cut at {}", cut);
        }
    }

    #[test]
    fn garbage_is_an_error_and_never_a_panic(mut bytes in vec(any::<u8>(), 0..400), plausible in any::<bool>()) {
        // A head, then perhaps nothing but landmarks.
        if plausible {
            let empty = [0; 2 + 2 * 10];
            let head = [&[2, 17, 0, 1][..], if bytes.len() % 2 == 0 { &empty } else { &[] }].concat();
            bytes.splice(0..0, head);
        }
        if let Ok(file) = IndexFile::read(bytes) {
            file.ended().chain(file.open()).for_each(drop);
        }
    }

    #[test]
    fn a_flipped_bit_is_no_panic(
        parts in vec(part(), 1..8), landmarks in vec(landmark(), 0..4), at in any::<prop::sample::Index>(), bit in 0u8..8,
    ) {
        let (mut bytes, _) = written(&parts, &landmarks, 0, 1);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(file) = IndexFile::read(bytes) {
            file.ended().chain(file.open()).for_each(drop);
        }
    }
}

#[test]
fn like_transactions_cost_a_few_bytes() {
    let what = |number| Touched::File(RelFile { tablespace: 1663, database: 5, number });
    let one = Changes { updates: 1, ..Changes::default() };
    let mut writer = IndexWriter::new(Lsn::ZERO);
    for number in 0..1000u32 {
        let start = Lsn::new(u64::from(number) * 600 + 500);
        let time = PgTimestamp::new(800_000_000_000_000 + i64::from(number) * 733);
        let end = End { start, end: start.advance(40), time, aborted: false, prepared: false, subxids: Vec::new() };
        writer.push(&Part {
            xid: 7000 + number,
            first: Lsn::new(start.get() - 480),
            bytes: 540,
            touched: vec![(what(16384), one), (what(16390), one)],
            others: 0,
            incomplete: false,
            early: None,
            end: Some(end),
        });
    }
    let (bytes, _) = writer.finish(Lsn::new(700_000), 15, None);
    assert!(bytes.len() < 14_000, "{} bytes for 1000 transactions", bytes.len());
}

#[test]
fn landmarks_that_are_too_many_are_counted_and_said() {
    let mut writer = IndexWriter::new(Lsn::ZERO);
    for number in 0..LANDMARKS_MAX + 5 {
        let (start, time) = (Lsn::new(number * 112), PgTimestamp::new(0));
        let what = LandmarkKind::RestorePoint { name: "again".to_owned(), time };
        writer.push_landmark(&Landmark { start, end: start.advance(112), what });
    }
    let (bytes, note) = writer.finish(Lsn::new(LANDMARKS_MAX * 200), 17, None);
    assert_eq!(note.restore_points, Some(LANDMARKS_MAX + 5));
    let file = IndexFile::read(bytes).unwrap();
    assert_eq!(file.landmarks.map(|kept| kept.len() as u64), Some(LANDMARKS_MAX));
    assert_eq!(file.landmarks_left_out, 5);
}

#[test]
fn an_unknown_landmark_is_passed_over_and_the_version_before_has_none() {
    let empty = [17, 0, 1].into_iter().chain([0; 2 + 2 * 10]);
    let old: Vec<u8> = [1].into_iter().chain(empty.clone()).collect();
    assert_eq!(IndexFile::read(old).unwrap().landmarks, None);
    // Kind 9 of two bytes, then a restore point "a" at 8, whose record takes 112 bytes; none were left out.
    let landmarks = [2, 9, 8, 3, 2, 7, 7, 1, 8, 112, 2, 6, b'a', 0];
    let new: Vec<u8> = [2].into_iter().chain(empty).chain(landmarks).collect();
    let what = LandmarkKind::RestorePoint { name: "a".to_owned(), time: PgTimestamp::new(3) };
    let known = Landmark { start: Lsn::new(8), end: Lsn::new(120), what };
    assert_eq!(IndexFile::read(new.clone()).unwrap().landmarks, Some(vec![known]));
    assert_eq!(IndexFile::read([&[3][..], &new[1..]].concat()).unwrap_err(), IndexError::Version(3));
}
