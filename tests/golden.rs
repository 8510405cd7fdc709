//! Opens an object of every version of the format ever written, whole ones and ones broken in every way, and checks the
//! exact outcome. A change of the format that makes these fail has to be a new version instead.
//!
//! `tests/golden/v1/` was written once, by [`write_golden_objects`]; it is not written again, only added to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pgkeep::catalog::index::{IndexFile, IndexWriter};
use pgkeep::seal::{
    Binding, BlockTagger, Codec, ContentKey, FrameKey, Header, KeyFile, KeyRole, Kind, MAX_FRAME, ObjectSealer, Part,
    SealError, open_tail, open_whole, peek_tail_prelude, seal_whole,
};
use pgkeep::types::{Id128, Lsn, PgTimestamp};
use pgkeep::wal::{
    Changes, End, Landmark, LandmarkKind, Parameters, Part as Transaction, RelFile, Touched, WalLevel, marks,
};
use sha2::{Digest as _, Sha256};

const REALM: Id128 = Id128::new(*b"golden realm v1.");
const REPOSITORY: Id128 = Id128::new(*b"golden repo. v1.");
const WAL: &str = "main/7312345678901234567/wal/00000001/00000000/000000010000000000000001.00000000-00280000";
const OPEN: &str = "main/7312345678901234567/open/00000001/000000010000000000000002.00000000-";
const PACK: &str = "main/7312345678901234567/pack/20261120T031500Z/000001";
const MANIFEST: &str = "main/7312345678901234567/backup/20261120T031500Z/manifest";
const HISTORY: &str = "main/7312345678901234567/timeline/00000002.history";
const EVENT: &str = "main/7312345678901234567/event/writer/1";
const INDEX: &str = "main/7312345678901234567/index/00000001/0000000008000000-0000000010000000";
const NOTE: &str = r#"{"note":"what the kind adds"}"#;

/// What an object holds when it opens.
enum Holds {
    /// A small text, in frames.
    Text,
    /// 2.5 MiB.
    Large,
    Nothing,
    Record,
    /// The index of this version.
    Index(u8),
    /// This many of the tail's frames, and whether damage is reported.
    Tail(usize, bool),
}
use Holds::*;

struct Case {
    file: &'static str,
    kind: Kind,
    name: &'static str,
    key: &'static str,
    want: Result<Holds, SealError>,
}

fn case(file: &'static str, kind: Kind, name: &'static str, want: Result<Holds, SealError>) -> Case {
    Case { file, kind, name, key: "golden.key", want }
}

fn cases() -> Vec<Case> {
    use Kind::*;
    let damaged = |part, detail| Err(SealError::Damaged { part, detail });
    let cut = |part| Err(SealError::Cut { part });
    let other = |name: &str| Err(SealError::NotThisObject { expected: name.to_owned() });
    let (tag, checksum) = ("its tag does not fit", "its checksum does not fit");
    let frame = Part::Frame;
    vec![
        case("stored", Pack, PACK, Ok(Text)),
        case("lz4", WalRange, WAL, Ok(Text)),
        case("several_frames", WalRange, WAL, Ok(Large)),
        case("empty", History, HISTORY, Ok(Nothing)),
        case("record", Record, MANIFEST, Ok(Holds::Record)),
        case("event", Event, EVENT, Ok(Holds::Record)),
        case("index_1", Kind::Index, INDEX, Ok(Holds::Index(1))),
        case("index_2", Kind::Index, INDEX, Ok(Holds::Index(2))),
        case("tail", WalTail, OPEN, Ok(Tail(4, false))),
        case("tail_preallocated", WalTail, OPEN, Ok(Tail(4, false))),
        case("cut_after_frame_0", WalRange, WAL, cut(Part::Trailer)),
        case("cut_after_frame_1", WalRange, WAL, cut(Part::Trailer)),
        case("cut_after_frame_2", WalRange, WAL, cut(Part::Trailer)),
        case("cut_in_header", WalRange, WAL, cut(Part::Header)),
        case("stripped_last_frame", WalRange, WAL, damaged(Part::Footer, "the object is not as long as it says")),
        case("swapped_frames", WalRange, WAL, damaged(frame(0), tag)),
        case("frame_of_another_object", WalRange, WAL, damaged(frame(1), tag)),
        case("flipped_tag", WalRange, WAL, damaged(frame(0), tag)),
        case("flipped_footer", WalRange, WAL, damaged(Part::Footer, tag)),
        case("flipped_last_mark", WalRange, WAL, damaged(frame(0), tag)),
        case("flipped_header", WalRange, WAL, damaged(Part::Header, checksum)),
        case("forged_header", WalRange, WAL, damaged(Part::Footer, tag)),
        case("unknown_version", WalRange, WAL, Err(SealError::UnknownVersion { version: 2 })),
        case("unknown_codec", WalRange, WAL, Err(SealError::UnknownCodec { codec: 9 })),
        case("unknown_kind", WalRange, WAL, Err(SealError::Unknown { what: "kind", number: 99 })),
        case("not_sealed", WalRange, WAL, Err(SealError::NotSealed)),
        case("lz4", WalRange, OPEN, other(OPEN)), // swapped name
        case("lz4", Pack, WAL, other(WAL)),       // swapped kind
        Case { key: "other.key", ..case("lz4", WalRange, WAL, Err(SealError::WrongKey { role: KeyRole::Meta })) },
        case("tail_torn", WalTail, OPEN, Ok(Tail(3, false))),
        case("tail_damaged", WalTail, OPEN, Ok(Tail(1, true))),
        case("tail_hole", WalTail, OPEN, Ok(Tail(1, true))),
        case("tail_swapped_frames", WalTail, OPEN, Ok(Tail(1, true))),
        case("tail_without_prelude", WalTail, OPEN, cut(Part::Prelude)),
    ]
}

fn text() -> Vec<u8> {
    b"every committed transaction, and the proof of it; ".repeat(20)
}

/// Compresses well, so that the golden objects stay small, and differs at every offset.
fn large() -> Vec<u8> {
    (0..(5 * MAX_FRAME / 2) as u32).map(|at| if at % 1024 < 4 { (at >> 10) as u8 } else { 0 }).collect()
}

fn record() -> Vec<u8> {
    br#"{"label":"20261120T031500Z","packs":[]}"#.to_vec()
}

/// A transaction that ended and one that went on.
fn transactions() -> [Transaction; 2] {
    let orders = Touched::File(RelFile { tablespace: 1663, database: 16384, number: 16390 });
    let lock = Touched::Relation { database: 16384, oid: 16385 };
    let dropped = Changes { deletes: 2, marks: marks::DROPPED, ..Changes::default() };
    let locked = Changes { marks: marks::LOCKED, ..Changes::default() };
    let end = End {
        start: Lsn::new(0x9000200),
        end: Lsn::new(0x9000340),
        time: PgTimestamp::new(817_000_000_123_456),
        aborted: false,
        prepared: true,
        subxids: vec![733, 731],
    };
    let ended = Transaction {
        xid: 730,
        first: Lsn::new(0x8fff000),
        bytes: 4711,
        touched: vec![(orders, dropped), (lock, locked)],
        others: 3,
        incomplete: true,
        early: Some(Lsn::new(0x9000100)),
        end: Some(end),
    };
    let touched = vec![(orders, Changes { inserts: 300, ..Changes::default() })];
    let open = Transaction {
        xid: 740,
        first: Lsn::new(0xffff000),
        bytes: 99,
        touched,
        others: 0,
        incomplete: false,
        early: None,
        end: None,
    };
    [ended, open]
}

fn landmarks() -> [Landmark; 2] {
    let what =
        LandmarkKind::RestorePoint { name: "before release".to_owned(), time: PgTimestamp::new(817_000_000_000_000) };
    let parameters = Parameters {
        max_connections: 100,
        max_worker_processes: 8,
        max_wal_senders: 10,
        max_prepared_transactions: 0,
        max_locks_per_transaction: 64,
        wal_level: WalLevel::Logical,
        wal_log_hints: true,
        track_commit_timestamp: false,
    };
    let point = Landmark { start: Lsn::new(0x8000100), end: Lsn::new(0x8000170), what };
    let what = LandmarkKind::Parameters(parameters);
    [point, Landmark { start: Lsn::new(0xa000000), end: Lsn::new(0xa000040), what }]
}

/// An index as that version wrote it: the first one ends behind the transactions.
fn index(version: u8) -> Vec<u8> {
    let write = |landmarks: &[Landmark]| {
        let mut writer = IndexWriter::new(Lsn::new(0x800_0000));
        transactions().iter().for_each(|part| writer.push(part));
        landmarks.iter().for_each(|landmark| writer.push_landmark(landmark));
        writer.finish(Lsn::new(0x1000_0000), 17, Some(740)).0
    };
    match version {
        2 => write(&landmarks()),
        _ => {
            let mut bytes = write(&[]);
            bytes.truncate(bytes.len() - 2); // no landmarks, and none left out
            bytes[0] = version;
            bytes
        }
    }
}

/// What is written today opens as what was written then; and what was written then says the same.
#[test]
fn golden_indexes_of_every_version_are_read() {
    for (case, version) in [("index_1", 1), ("index_2", 2)] {
        let cases = cases();
        let case = cases.iter().find(|one| one.file == case).unwrap();
        let (plaintext, ..) = open(case).unwrap();
        let file = IndexFile::read(plaintext).unwrap();
        assert_eq!((file.major, file.from, file.to), (17, Lsn::new(0x800_0000), Lsn::new(0x1000_0000)));
        let seen: Vec<_> = file.ended().chain(file.open()).map(|entry| file.part(&entry.unwrap())).collect();
        assert_eq!(seen, transactions());
        assert_eq!(file.landmarks, (version == 2).then(|| landmarks().to_vec()), "version {version}");
    }
}

fn appends() -> [Vec<u8>; 4] {
    [b"first commit".to_vec(), text(), b"third commit".repeat(3), text()]
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

fn key_file(name: &str) -> KeyFile {
    KeyFile::read(&fs::read(golden().join(name)).unwrap(), None).unwrap()
}

fn binding(kind: Kind, name: &str) -> Binding<'_> {
    let repository = (kind == Kind::Event).then_some(REPOSITORY);
    Binding { realm: REALM, repository, kind, name }
}

fn content_key(keys: &KeyFile, id: Id128) -> ContentKey {
    let envelope = fs::read(golden().join(format!("keys/{id}"))).unwrap();
    keys.unwrap_content_key(REALM, id, &envelope).unwrap()
}

/// Plaintext, extra, damage.
fn open(case: &Case) -> Result<(Vec<u8>, String, bool), SealError> {
    let keys = key_file(case.key);
    let object = fs::read(golden().join(case.file)).unwrap();
    let binding = binding(case.kind, case.name);
    let header = Header::parse(&object)?;
    // The owner's key file opens the envelope; a stranger's does not even get there.
    let content = header.key_id().map(|id| content_key(&key_file("golden.key"), id));
    if case.kind == Kind::WalTail {
        let tail = open_tail(keys.meta_key(), content.as_ref(), &binding, &object)?;
        assert_eq!(peek_tail_prelude(keys.meta_key(), &binding, &object).unwrap(), tail.prelude);
        return Ok((tail.plaintext, String::from_utf8(tail.prelude.to_vec()).unwrap(), tail.damage.is_some()));
    }
    let (plaintext, extra) = open_whole(keys.meta_key(), content.as_ref(), &binding, &object)?;
    Ok((plaintext, String::from_utf8(extra.to_vec()).unwrap(), false))
}

fn holds(holds: &Holds) -> (Vec<u8>, bool) {
    match holds {
        Text => (text(), false),
        Large => (large(), false),
        Nothing => (Vec::new(), false),
        Holds::Record => (record(), false),
        Holds::Index(version) => (index(*version), false),
        Tail(frames, damage) => (appends()[..*frames].concat(), *damage),
    }
}

#[test]
fn p4_golden_objects_open_and_broken_ones_say_why() {
    for case in cases() {
        let seen = open(&case);
        let at = format!("{} as {:?} {} with {}", case.file, case.kind, case.name, case.key);
        match (&case.want, seen) {
            (Ok(want), Ok((plaintext, extra, damage))) => {
                let (expected, expected_damage) = holds(want);
                assert!(plaintext == expected, "{at}: other plaintext ({} bytes)", plaintext.len());
                assert_eq!((extra.as_str(), damage), (NOTE, expected_damage), "{at}");
            }
            (Err(want), Err(error)) => assert_eq!(&error, want, "{at}"),
            (_, seen) => panic!("{at}: {:?}", seen.map(|(plaintext, extra, damage)| (plaintext.len(), extra, damage))),
        }
    }
}

#[test]
fn every_golden_object_is_tested() {
    let tested: Vec<_> = cases().iter().map(|case| case.file.to_owned()).collect();
    for entry in fs::read_dir(golden()).unwrap() {
        let (name, kind) = entry.map(|e| (e.file_name().into_string().unwrap(), e.file_type().unwrap())).unwrap();
        let other = kind.is_dir() || name.ends_with(".key") || name == "index.json";
        assert!(other || tested.contains(&name), "no case opens tests/golden/v1/{name}");
    }
}

#[test]
fn golden_keys_open_and_are_bound() {
    let (keys, stranger) = (key_file("golden.key"), key_file("other.key"));
    let id = keys.meta_key().id();
    let envelope = fs::read(golden().join(format!("keys/{id}"))).unwrap();
    keys.check_meta_key(REALM, &envelope).unwrap();
    let error = |result: Result<(), SealError>| matches!(result, Err(SealError::Envelope { .. }));
    assert!(error(stranger.check_meta_key(REALM, &envelope)));
    assert!(error(keys.check_meta_key(REPOSITORY, &envelope)), "an envelope of another realm was taken");
    let tag = BlockTagger::new(keys.meta_key(), REALM).tag(&[7; 8192]);
    let pinned = fs::read_to_string(golden().join("index.json")).unwrap();
    assert!(pinned.contains(&Id128::new(tag).to_string()), "the tag of a block is another than it was");
}

/// The page is enough: a reader that was written from `docs/format.md` alone sees the same.
#[test]
fn a_reader_written_from_the_page_agrees() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader.py");
    let python = match python_with_cryptography() {
        Ok(python) => python,
        Err(why) => {
            eprintln!("\n!!! NOT RUN: tests/reader.py, the independent reader of docs/format.md: {why}\n");
            return;
        }
    };
    let output = Command::new(python).arg(script).arg(golden()).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "the reader disagrees:\n{said}");
}

/// A virtual environment under `target/`, made once.
fn python_with_cryptography() -> Result<PathBuf, String> {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("reader-venv");
    let python = venv.join("bin/python3");
    let run = |program: &Path, arguments: &[&str]| -> Result<(), String> {
        let output = Command::new(program).args(arguments).output();
        let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
        let said = || String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned();
        if output.status.success() { Ok(()) } else { Err(format!("{} {arguments:?}: {}", program.display(), said())) }
    };
    let probe = ["-c", "import cryptography.hazmat.primitives.ciphers.aead"];
    if run(&python, &probe).is_ok() {
        return Ok(python);
    }
    if run(Path::new("python3"), &probe).is_ok() {
        return Ok(PathBuf::from("python3"));
    }
    run(Path::new("python3"), &["-m", "venv", &venv.to_string_lossy()])?;
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--timeout", "20", "cryptography"];
    run(&python, &pip)?;
    run(&python, &probe)?;
    Ok(python)
}

/// Writes `tests/golden/v1/` anew, only when `PGKEEP_WRITE_GOLDEN=1` asks for it. The objects that are there were written by
/// the first version that wrote format 1; for a new way to be broken, write into a scratch checkout and add the one file
/// with its key material. Never replace what is there: old repositories look like it.
#[test]
fn write_golden_objects() {
    if std::env::var_os("PGKEEP_WRITE_GOLDEN").is_none_or(|value| value != "1") {
        return;
    }
    fs::create_dir_all(golden().join("keys")).unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(golden().join(name), bytes).unwrap();
    let show = |keys: &KeyFile| age::secrecy::ExposeSecret::expose_secret(&keys.render()).to_owned();
    let (keys, other) = (KeyFile::generate().unwrap(), KeyFile::generate().unwrap());
    let content = ContentKey::generate(20_777).unwrap();
    let meta = keys.meta_key();
    write("golden.key", show(&keys).as_bytes());
    write("other.key", show(&other).as_bytes());
    write(&format!("keys/{}", content.id()), &keys.wrap_content_key(REALM, &content).unwrap());
    write(&format!("keys/{}", meta.id()), &keys.wrap_meta_key(REALM).unwrap());

    let seal = |frames, kind, name, codec, plaintext: &[u8]| {
        seal_whole(meta, frames, &binding(kind, name), codec, plaintext, NOTE.as_bytes()).unwrap()
    };
    let by_content = FrameKey::Content(&content);
    write("stored", &seal(by_content, Kind::Pack, PACK, Codec::Stored, &text()).concat());
    let lz4 = seal(by_content, Kind::WalRange, WAL, Codec::Lz4, &text()).concat();
    write("lz4", &lz4);
    write("empty", &seal(FrameKey::Meta(meta), Kind::History, HISTORY, Codec::Lz4, b"").concat());
    write("record", &seal(FrameKey::Meta(meta), Kind::Record, MANIFEST, Codec::Lz4, &record()).concat());
    for version in [1, 2] {
        let sealed = seal(FrameKey::Meta(meta), Kind::Index, INDEX, Codec::Lz4, &index(version));
        write(&format!("index_{version}"), &sealed.concat());
    }
    write("event", &seal(FrameKey::Meta(meta), Kind::Event, EVENT, Codec::Lz4, &record()).concat());
    let several = seal(by_content, Kind::WalRange, WAL, Codec::Lz4, &large());
    let [header, f0, f1, f2, footer] = several.clone().try_into().unwrap();
    write("several_frames", &several.concat());
    write("cut_after_frame_0", &[&header[..], &f0].concat());
    write("cut_after_frame_1", &[&header[..], &f0, &f1].concat());
    write("cut_after_frame_2", &[&header[..], &f0, &f1, &f2].concat());
    write("cut_in_header", &header[..50]);
    write("stripped_last_frame", &[&header[..], &f0, &f1, &footer].concat());
    assert_eq!(f0.len(), f1.len(), "frames of one length, or the swap is told by its lengths");
    write("swapped_frames", &[&header[..], &f1, &f0, &f2, &footer].concat());
    let [_, _, foreign, _, _] = seal(by_content, Kind::WalRange, WAL, Codec::Lz4, &large()).try_into().unwrap();
    write("frame_of_another_object", &[&header[..], &f0, &foreign, &f2, &footer].concat());

    let flip = |name: &str, at: usize, to: &dyn Fn(u8) -> u8| {
        let mut object = lz4.clone();
        object[at] = to(object[at]);
        if matches!(at, 9 | 10) || name == "forged_header" {
            let crc = crc32c::crc32c_append(crc32c::crc32c(&object[..12]), &object[16..96]);
            object[12..16].copy_from_slice(&crc.to_le_bytes());
        }
        write(name, &object);
    };
    let frame_len = (u32::from_le_bytes(lz4[96..100].try_into().unwrap()) & 0xFF_FFFF) as usize;
    flip("flipped_tag", 96 + 4 + frame_len - 1, &|byte| byte ^ 1);
    flip("flipped_footer", lz4.len() - 20, &|byte| byte ^ 1);
    flip("flipped_last_mark", 99, &|byte| byte ^ 0x80);
    flip("flipped_header", 85, &|byte| byte ^ 1);
    flip("forged_header", 9, &|_| 0); // lz4 passed for stored, with a checksum that fits
    flip("unknown_version", 8, &|_| 2);
    flip("unknown_codec", 9, &|_| 9);
    flip("unknown_kind", 10, &|_| 99);
    flip("not_sealed", 1, &|_| b'x');

    let sealer = ObjectSealer::new(meta, by_content, &binding(Kind::WalTail, OPEN), Codec::Lz4).unwrap();
    let start = [sealer.header(), sealer.seal_prelude(NOTE.as_bytes()).unwrap()].concat();
    let frames: Vec<_> = (0..).zip(appends()).flat_map(|(at, data)| sealer.seal_append(at, &data).unwrap()).collect();
    let tail = |parts: &[&[u8]], zeros: usize| [&start[..], &parts.concat(), &vec![0; zeros]].concat();
    let [a, b, c, d] = [0, 1, 2, 3].map(|at: usize| &frames[at][..]);
    let mut bad = b.to_vec();
    bad[40] ^= 1;
    write("tail", &tail(&[a, b, c, d], 0));
    write("tail_preallocated", &tail(&[a, b, c, d], 4096));
    write("tail_torn", &tail(&[a, b, c, &d[..d.len() - 9]], 512));
    write("tail_damaged", &tail(&[a, &bad, c, d], 512));
    write("tail_hole", &tail(&[a, &vec![0; b.len()], c, d], 512));
    write("tail_swapped_frames", &tail(&[a, c, b, d], 512));
    write("tail_without_prelude", &[&start[..96], &[0; 4096][..]].concat());

    // What tests/reader.py compares with.
    let tag = Id128::new(BlockTagger::new(meta, REALM).tag(&[7; 8192]));
    let objects: Vec<_> = cases().iter().map(index_entry).collect();
    let index = serde_json::json!({ "realm": REALM, "tag_of_8192_sevens": tag, "objects": objects });
    write("index.json", format!("{index:#}\n").as_bytes());
}

fn index_entry(case: &Case) -> serde_json::Value {
    let mut entry = serde_json::json!({
        "file": case.file, "kind": case.kind as u8, "name": case.name, "key": case.key,
    });
    if case.kind == Kind::Event {
        entry["repository"] = serde_json::json!(REPOSITORY);
    }
    if let Ok(Holds::Index(version)) = &case.want {
        let landmarks = [["8000100", "before release"], ["A000000", "max_connections = 100"]];
        entry["index"] = serde_json::json!({
            "major": 17, "ended": [[730, "0/9000200"]], "open": [[740, "0/FFFF000"]],
            "landmarks": if *version == 1 { &[][..] } else { &landmarks[..] },
        });
    }
    match &case.want {
        Ok(want) => {
            let hash: [u8; 32] = Sha256::digest(holds(want).0).into();
            entry["sha256"] = hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
            entry["extra"] = NOTE.into();
        }
        Err(_) => entry["refused"] = true.into(),
    }
    entry
}
