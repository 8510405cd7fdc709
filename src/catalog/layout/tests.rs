use super::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn a_segment(timeline: TimelineId) -> impl Strategy<Value = SegmentName> {
    (any::<u32>(), any::<u32>()).prop_map(move |(log, within)| SegmentName { timeline, log, within })
}

fn a_range(timeline: TimelineId) -> impl Strategy<Value = RangeName> {
    (a_segment(timeline), 0..MAX_OFFSET, 1..MAX_OFFSET)
        .prop_filter_map("empty or too long", |(segment, from, len)| RangeName::new(segment, from, from + len))
}

fn a_kept_file(timeline: TimelineId) -> impl Strategy<Value = KeptFile> {
    (a_segment(timeline), option::of(any::<u32>())).prop_map(|(segment, offset)| {
        let name = match offset {
            None => format!("{segment}.partial"),
            Some(offset) => format!("{segment}.{offset:08X}.backup"),
        };
        name.parse().unwrap()
    })
}

fn a_label() -> impl Strategy<Value = BackupLabel> {
    (0i64..4_000_000_000).prop_map(|second| BackupLabel::at(jiff::Timestamp::from_second(second).unwrap()))
}

fn a_cluster_object() -> impl Strategy<Value = ClusterObject> {
    let branch = (1..=u32::MAX, prop_oneof![Just(0), any::<u16>()])
        .prop_map(|(timeline, ordinal)| Branch { timeline: TimelineId::new(timeline).unwrap(), ordinal });
    branch.prop_flat_map(|branch| {
        let timeline = branch.timeline;
        let tag = any::<[u8; 8]>().prop_map(ContentTag);
        let disputed = prop_oneof![
            a_range(timeline).prop_map(Disputed::Range),
            Just(Disputed::History),
            a_kept_file(timeline).prop_map(Disputed::File),
        ];
        let kind = prop::sample::select(PartKind::ALL.to_vec());
        prop_oneof![
            Just(ClusterObject::History(branch)),
            a_range(timeline).prop_map(move |range| ClusterObject::Wal(branch, range)),
            a_range(timeline).prop_map(move |range| ClusterObject::Open(branch, range)),
            (a_segment(timeline), 0..MAX_OFFSET).prop_map(move |(s, from)| ClusterObject::Tail(branch, s, from)),
            a_kept_file(timeline).prop_map(move |file| ClusterObject::WalFile(branch, file)),
            (a_label(), 1..u32::MAX).prop_map(|(label, number)| ClusterObject::Pack(PackName { label, number })),
            a_label().prop_map(ClusterObject::Start),
            a_label().prop_map(ClusterObject::Manifest),
            (a_label(), kind, 1..u32::MAX).prop_map(|(label, kind, number)| ClusterObject::Part(PartName {
                label,
                kind,
                number
            })),
            (any::<u64>(), 1..u64::MAX).prop_map(move |(from, len)| {
                let (from, to) = (from.min(u64::MAX - 1), from.min(u64::MAX - 1).saturating_add(len));
                ClusterObject::Gap(branch, Lsn::new(from), Lsn::new(to))
            }),
            (disputed, tag).prop_map(move |(what, tag)| ClusterObject::Conflict(branch, what, tag)),
            a_label().prop_map(ClusterObject::ExpiryPlan),
            a_label().prop_map(ClusterObject::ExpiryGoing),
            a_label().prop_map(ClusterObject::Hold),
            a_label().prop_map(ClusterObject::HoldReleased),
            (any::<[u8; 16]>(), 1u32..).prop_map(|(writer, number)| ClusterObject::Event(Id128::new(writer), number)),
            a_label().prop_map(ClusterObject::Verification),
            a_label().prop_map(ClusterObject::Drill),
            ("[a-z0-9-]{1,64}", any::<u32>(), any::<u32>())
                .prop_map(|(name, epoch, beat)| ClusterObject::Lease(LeaseName::new(&name, epoch, beat).unwrap())),
        ]
    })
}

fn a_name() -> impl Strategy<Value = Name> {
    let object = prop_oneof![
        1 => any::<u16>().prop_map(Object::Format),
        1 => a_label().prop_map(|label| Object::StoreVerdict(Second(label))),
        1 => any::<[u8; 16]>().prop_map(|id| Object::Key(Id128::new(id))),
        1 => (1u32..).prop_map(Object::Recipients),
        8 => ("[a-z0-9][a-z0-9_-]{0,10}x", 1..u64::MAX, a_cluster_object()).prop_map(|(name, system, object)| {
            Object::Of(ClusterId { name: name.parse().unwrap(), system: SystemId::new(system) }, object)
        }),
    ];
    let token = option::of("[a-z0-9]{1,32}".prop_map(|text| text.parse().unwrap()));
    (object, token).prop_map(|(object, copy)| Name { object, copy })
}

proptest! {
    #[test]
    fn every_name_that_is_built_reads_back_and_is_a_key(name in a_name()) {
        let text = name.to_string();
        prop_assert_eq!(Name::parse(&text), Ok(name));
        prop_assert!(crate::store::Key::new(text).is_ok());
    }

    /// One object has one name: what is not spelled exactly as it would be built is nobody's.
    #[test]
    fn what_reads_is_spelled_as_it_is_built(name in a_name(), at in any::<prop::sample::Index>(), byte in 0x21u8..0x7F) {
        let mut text = name.to_string().into_bytes();
        let at = at.index(text.len());
        text[at] = byte;
        let text = String::from_utf8(text).unwrap();
        if let Ok(other) = Name::parse(&text) {
            prop_assert_eq!(other.to_string(), text);
        }
    }

    #[test]
    fn garbage_is_unknown_and_never_a_panic(text in "[ -~]{0,80}", parts in vec("[0-9A-Fa-z.~-]{0,26}", 0..6)) {
        for text in [text, parts.join("/"), format!("main/7/{}", parts.join("/"))] {
            if let Ok(name) = Name::parse(&text) {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}

#[test]
fn names_as_the_format_shows_them() {
    let cluster = "main/7312345678901234567";
    let known = [
        "format/0001.json".to_owned(),
        "keys/000050c8000000000000000000000001".to_owned(),
        format!("{cluster}/timeline/00000002.history"),
        format!("{cluster}/timeline/00000002.1.history"),
        format!("{cluster}/wal/00000001/0000000A/000000010000000A00000003.00000000-01000000"),
        format!("{cluster}/wal/00000001/0000000A/000000010000000A00000003.00000000-01000000~repair1"),
        format!("{cluster}/open/00000001/000000010000000A00000003.00000100-00000200"),
        format!("{cluster}/open/00000001.2/000000010000000A00000003.00000100-"),
        format!("{cluster}/pack/20261120T031500Z/000001"),
        format!("{cluster}/backup/20261120T031500Z/start"),
        format!("{cluster}/backup/20261120T031500Z/files-000001"),
        format!("{cluster}/backup/20261120T031500Z/server-manifest-000001"),
        format!("{cluster}/backup/20261120T031500Z/manifest"),
        format!("{cluster}/partial/00000001/000000010000000A00000003.partial"),
        format!("{cluster}/gap/00000001/0000000A00000000-0000000B00000000"),
        format!("{cluster}/conflict/00000001/history.0123456789abcdef"),
    ];
    for name in known {
        assert_eq!(Name::parse(&name).map(|n| n.to_string()), Ok(name));
    }
    let unknown = [
        "".to_owned(),
        "format".to_owned(),
        "format/1.json".to_owned(),
        "keys/0".to_owned(),
        "main/07/timeline/00000002.history".to_owned(),
        format!("{cluster}/timeline/00000002.history~"),
        format!("{cluster}/timeline/00000002.history~A"),
        format!("{cluster}/timeline/00000002.history~a~b"),
        // another log's folder, another branch's folder, no bytes, beyond the largest segment, lower case
        format!("{cluster}/wal/00000001/0000000B/000000010000000A00000003.00000000-01000000"),
        format!("{cluster}/wal/00000002/0000000A/000000010000000A00000003.00000000-01000000"),
        format!("{cluster}/wal/00000001/0000000A/000000010000000A00000003.00000100-00000100"),
        format!("{cluster}/wal/00000001/0000000A/000000010000000A00000003.00000000-40000001"),
        format!("{cluster}/wal/00000001/0000000a/000000010000000a00000003.00000000-01000000"),
        format!("{cluster}/wal/00000001/0000000A/000000010000000A00000003.00000000-"),
        format!("{cluster}/pack/20261120T031500Z/1"),
        format!("{cluster}/pack/20261120T031500Z/000000"),
        format!("{cluster}/partial/00000002/000000010000000A00000003.partial"),
        format!("{cluster}/index/00000001/x"),
        format!("{cluster}/lease/archiver/1.1"),
    ];
    for name in unknown {
        assert_eq!(Name::parse(&name), Err(UnknownName(name)));
    }
}

#[test]
fn a_copy_is_the_same_object() {
    let name = Name::parse("main/7/timeline/00000002.history").unwrap();
    let copy = name.copy("again".parse().unwrap());
    assert_eq!(copy.to_string(), "main/7/timeline/00000002.history~again");
    assert_eq!(copy.object.to_string(), name.to_string());
}

#[test]
fn segments_by_name_and_number() {
    for mib in [1, 16, 1024] {
        let size = SegmentSize::new(mib << 20).unwrap();
        for number in [0, 1, 255, 4095, 1 << 20] {
            let number = SegmentNumber::new(number);
            let name = SegmentName::new(TimelineId::FIRST, number, size).unwrap();
            assert_eq!(name.to_string(), number.file_name(TimelineId::FIRST, size));
            assert_eq!(name.number(size), Some(number));
        }
    }
    let name: SegmentName = "000000010000000A00000100".parse().unwrap();
    assert_eq!(name.number(SegmentSize::DEFAULT), None, "a log has 256 segments of 16 MiB");
}
