//! What the format promises, as properties over many objects. The exact error of each way to be broken is in
//! `tests/golden.rs`.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::types::Id128;

const REALM: Id128 = Id128::new([1; 16]);
const NAME: &str = "main/1/wal/00000001/00000000/000000010000000000000001.00000000-01000000";

struct Keys {
    file: KeyFile,
    content: ContentKey,
}

fn keys() -> Keys {
    Keys { file: KeyFile::generate().unwrap(), content: ContentKey::generate(20_000).unwrap() }
}

fn bound(kind: Kind) -> Binding<'static> {
    Binding { realm: REALM, repository: None, kind, name: NAME }
}

impl Keys {
    fn seal(&self, codec: Codec, plaintext: &[u8], extra: &[u8]) -> Vec<u8> {
        let frames = FrameKey::Content(&self.content);
        seal_whole(self.file.meta_key(), frames, &bound(Kind::WalRange), codec, plaintext, extra).unwrap().concat()
    }

    fn open(&self, object: &[u8]) -> Result<(Vec<u8>, Bytes), SealError> {
        open_whole(self.file.meta_key(), Some(&self.content), &bound(Kind::WalRange), object)
    }

    fn tail_sealer(&self) -> ObjectSealer {
        let frames = FrameKey::Content(&self.content);
        ObjectSealer::new(self.file.meta_key(), frames, &bound(Kind::WalTail), Codec::Lz4).unwrap()
    }

    /// Header and prelude, then one part per append.
    fn tail(&self, appends: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let sealer = self.tail_sealer();
        let mut parts = vec![[sealer.header(), sealer.seal_prelude(b"note").unwrap()].concat()];
        let mut index = 0;
        for append in appends {
            let frames = sealer.seal_append(index, append).unwrap();
            index += frames.len() as u32;
            parts.push(frames.concat());
        }
        parts
    }

    fn open_tail(&self, object: &[u8]) -> Result<TailContent, SealError> {
        let (meta, content, binding) = (self.file.meta_key(), Some(&self.content), bound(Kind::WalTail));
        let whole = open_tail(meta, content, &binding, object);
        // Read piece by piece it is the same, wherever the pieces end.
        match (&whole, TailFrames::begin(meta, content, &binding, object)) {
            (Ok(whole), Ok((frames, prelude, start))) => {
                assert_eq!(whole.prelude, prelude);
                let rest = &object[start as usize..];
                let (mut plaintext, mut used, mut next, mut window) = (Vec::new(), 0, 0, 0);
                loop {
                    window = (window + rest.len() / 3 + 1).min(rest.len());
                    let opened = frames.open(next, &rest[used..window]).unwrap();
                    plaintext.extend_from_slice(&opened.plaintext);
                    (used, next) = (used + opened.used, next + opened.frames);
                    if opened.ended || window == rest.len() {
                        break;
                    }
                }
                assert!(plaintext == whole.plaintext);
                assert_eq!((start + used as u64, next), (whole.valid_len, whole.frames));
                assert_eq!(frames.is_damage(next, &rest[used..]), whole.damage.is_some());
            }
            (Err(whole), Err(begin)) => assert_eq!(whole.to_string(), begin.to_string()),
            (whole, begin) => panic!("{whole:?}, but {begin:?}"),
        }
        whole
    }
}

/// Bytes that shrink somewhat, like WAL.
fn plaintext(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state
    };
    (0..len).map(|at| if at % 64 < 48 { (at / 64) as u8 } else { (noise() >> 24) as u8 }).collect()
}

/// One way to spoil an object.
#[derive(Debug, Clone)]
enum Spoil {
    Flip(Index, u8),
    Cut(Index),
    Extend(Vec<u8>),
    Overwrite(Index, Vec<u8>),
    Move(Index, Index, Index),
    Remove(Index, Index),
}

fn a_spoil() -> impl Strategy<Value = Spoil> {
    let index = any::<Index>;
    prop_oneof![
        (index(), 1..=255_u8).prop_map(|(at, bits)| Spoil::Flip(at, bits)),
        index().prop_map(Spoil::Cut),
        vec(any::<u8>(), 1..200).prop_map(Spoil::Extend),
        (index(), vec(any::<u8>(), 1..64)).prop_map(|(at, bytes)| Spoil::Overwrite(at, bytes)),
        (index(), index(), index()).prop_map(|(a, b, c)| Spoil::Move(a, b, c)),
        (index(), index()).prop_map(|(a, b)| Spoil::Remove(a, b)),
    ]
}

impl Spoil {
    fn apply(&self, object: &mut Vec<u8>) {
        let len = object.len().max(1);
        if object.is_empty() {
            return;
        }
        match self {
            Spoil::Flip(at, bits) => object[at.index(len)] ^= bits,
            Spoil::Cut(at) => object.truncate(at.index(len)),
            Spoil::Extend(bytes) => object.extend_from_slice(bytes),
            Spoil::Overwrite(at, bytes) => {
                object.iter_mut().skip(at.index(len)).zip(bytes).for_each(|(old, new)| *old = *new)
            }
            Spoil::Move(a, b, c) => {
                let mut at = [a.index(len), b.index(len), c.index(len)];
                at.sort();
                object[at[0]..at[2]].rotate_left(at[1] - at[0]);
            }
            Spoil::Remove(a, b) => {
                let (a, b) = (a.index(len), b.index(len));
                object.drain(a.min(b)..a.max(b));
            }
        }
    }
}

#[test]
fn objects_open_to_what_was_sealed_at_every_border() {
    let keys = keys();
    for codec in [Codec::Stored, Codec::Lz4] {
        for len in [0, 1, 15, 16, 4096, MAX_FRAME - 1, MAX_FRAME, MAX_FRAME + 1, 3 * MAX_FRAME, 3 * MAX_FRAME + 7] {
            let plain = plaintext(len);
            let object = keys.seal(codec, &plain, b"extra");
            let (opened, extra) = keys.open(&object).unwrap();
            assert!(opened == plain, "{len} bytes, {codec:?}");
            assert_eq!(&extra[..], b"extra");
            let start = &object[..object.len().min(1024)];
            assert!(!start.windows(32).any(|window| plain[..len.min(1024)].windows(32).any(|part| part == window)));
            if !(64..=5000).contains(&len) {
                continue;
            }
            assert_eq!(codec == Codec::Lz4, object.len() < len, "compressed exactly where asked for");
        }
    }
}

#[test]
fn a_stream_is_the_same_object_however_it_is_pushed() {
    let keys = keys();
    let plain = plaintext(2 * MAX_FRAME + 100);
    for step in [1000, MAX_FRAME - 1, MAX_FRAME, MAX_FRAME + 1, plain.len()] {
        let frames = FrameKey::Content(&keys.content);
        let binding = bound(Kind::WalRange);
        let mut sealer = SequentialSealer::new(keys.file.meta_key(), frames, &binding, Codec::Lz4).unwrap();
        let header = sealer.header();
        let mut parts = Vec::new();
        for (pushed, chunk) in (1..).zip(plain.chunks(step)) {
            parts.extend(sealer.push(chunk).unwrap());
            assert_eq!(sealer.plaintext_len(), (pushed * step).min(plain.len()) as u64);
        }
        parts.extend(sealer.finish(b"").unwrap());
        assert_eq!((parts.len(), &parts[0]), (5, &header)); // header, three frames, footer
        assert!(keys.open(&parts.concat()).unwrap().0 == plain, "in steps of {step}");
    }
}

#[test]
fn ranges_are_read_by_the_frames_that_hold_them() {
    let keys = keys();
    let plain = plaintext(2 * MAX_FRAME + 500);
    let object = keys.seal(Codec::Lz4, &plain, b"x");
    let opener = Opener::new(
        &Header::parse(&object).unwrap(),
        keys.file.meta_key(),
        Some(&keys.content),
        &bound(Kind::WalRange),
    )
    .unwrap();
    let len = object.len() as u64;
    let Err(SealError::NeedMore { bytes: 8 }) = opener.open_footer(&object[object.len() - 3..], len) else { panic!() };
    let Err(SealError::NeedMore { bytes }) = opener.open_footer(&object[object.len() - 9..], len) else { panic!() };
    let footer = opener.open_footer(&object[object.len() - bytes as usize..], len).unwrap();
    assert_eq!((footer.frame_count(), footer.plaintext_len, &footer.extra[..]), (3, plain.len() as u64, &b"x"[..]));
    assert_eq!(footer.frame_range(3), None);
    let mib = MAX_FRAME as u64;
    for (range, frames) in
        [(0..1, 0..1), (5..mib, 0..1), (mib - 1..mib + 1, 0..2), (mib..mib, 0..0), (mib..2 * mib + 500, 1..3)]
    {
        let span = footer.span(range.clone()).unwrap();
        assert_eq!(span.frames, frames);
        let bytes = &object[span.bytes.start as usize..span.bytes.end as usize];
        let opened = opener.open_span(&footer, &span, bytes).unwrap();
        assert!(opened == plain[range.start as usize..range.end as usize], "{range:?}");
    }
    assert_eq!(footer.span(0..2 * mib + 501), None);
    let one = footer.frame_range(1).unwrap();
    let frame = &object[one.start as usize..one.end as usize];
    assert!(opener.open_frame(1, frame).unwrap() == plain[MAX_FRAME..2 * MAX_FRAME]);
    assert!(opener.open_frame(2, frame).is_err(), "a frame opened under another number");
}

#[test]
fn p4_an_object_opens_only_as_what_it_was_sealed_as() {
    let keys = keys();
    let meta = keys.file.meta_key();
    let sealed = Binding { repository: Some(Id128::new([2; 16])), ..bound(Kind::Lease) };
    let object = seal_whole(meta, FrameKey::Meta(meta), &sealed, Codec::Lz4, b"beat", b"").unwrap().concat();
    assert_eq!(open_whole(meta, None, &sealed, &object).unwrap().0, b"beat");
    let others = [
        Binding { realm: Id128::new([9; 16]), ..sealed },
        Binding { repository: Some(Id128::new([9; 16])), ..sealed },
        Binding { repository: None, ..sealed },
        Binding { kind: Kind::Event, ..sealed },
        Binding { name: "main/1/lease/x/1.2", ..sealed },
        Binding { name: &format!("{NAME}~copy"), ..sealed },
    ];
    for other in others {
        let want = SealError::NotThisObject { expected: other.name.to_owned() };
        assert_eq!(open_whole(meta, None, &other, &object).unwrap_err(), want, "{other:?}");
    }
}

#[test]
fn a_wrong_key_is_told_from_damage() {
    let (ours, theirs) = (keys(), keys());
    let object = ours.seal(Codec::Lz4, b"data", b"");
    let open = |meta: &Keys, content: Option<&ContentKey>| {
        open_whole(meta.file.meta_key(), content, &bound(Kind::WalRange), &object).unwrap_err()
    };
    assert_eq!(open(&theirs, Some(&theirs.content)), SealError::WrongKey { role: KeyRole::Meta });
    assert_eq!(open(&ours, Some(&theirs.content)), SealError::WrongKey { role: KeyRole::Content });
    assert_eq!(open(&ours, None), SealError::NeedContentKey { key_id: ours.content.id() });
    // the same id with other bytes, as a planted key would have
    let planted = keys::ContentKey::new(ours.content.id(), keys::Secret::random().unwrap());
    assert_eq!(open(&ours, Some(&planted)), SealError::WrongKey { role: KeyRole::Content });
    // a host that may only write reads the footer
    let header = Header::parse(&object).unwrap();
    let opener = Opener::new(&header, ours.file.meta_key(), None, &bound(Kind::WalRange)).unwrap();
    assert_eq!(opener.open_footer(&object, object.len() as u64).unwrap().plaintext_len, 4);
}

#[test]
fn no_nonce_is_used_twice() {
    let keys = keys();
    let sealer = keys.tail_sealer();
    for index in [0, 2, 1, 3] {
        sealer.seal_frame(index, false, b"x").unwrap();
    }
    for index in 0..4 {
        let again = sealer.seal_frame(index, true, b"y").unwrap_err();
        assert_eq!(again, SealError::SealedTwice { part: Part::Frame(index) });
    }
    sealer.seal_prelude(b"").unwrap();
    assert_eq!(sealer.seal_prelude(b"").unwrap_err(), SealError::SealedTwice { part: Part::Prelude });
    assert!(sealer.seal_frame(u32::MAX, false, b"x").is_err());
    let mut frames = FrameLengths::new();
    frames.push(&sealer.seal_frame(4, true, b"").unwrap(), 0).unwrap();
    sealer.seal_footer(&frames, b"").unwrap();
    assert_eq!(sealer.seal_footer(&frames, b"").unwrap_err(), SealError::SealedTwice { part: Part::Footer });
    let salts = [keys.tail_sealer(), keys.tail_sealer()].map(|sealer| Header::parse(&sealer.header()).unwrap().salt());
    assert_ne!(salts[0], salts[1]);
}

#[test]
fn the_sealer_refuses_what_no_reader_would_take() {
    let keys = keys();
    let frames = FrameKey::Content(&keys.content);
    let sealer = ObjectSealer::new(keys.file.meta_key(), frames, &bound(Kind::WalRange), Codec::Stored).unwrap();
    assert!(matches!(sealer.seal_frame(0, false, b"short"), Err(SealError::Incomplete { .. })));
    assert!(matches!(sealer.seal_frame(0, true, &[0; MAX_FRAME + 1]), Err(SealError::TooLarge { .. })));
    assert!(matches!(sealer.seal_footer(&FrameLengths::new(), b""), Err(SealError::Incomplete { .. })));
    let mut frames = FrameLengths::new();
    frames.push(&sealer.seal_frame(0, false, &[0; MAX_FRAME]).unwrap(), MAX_FRAME).unwrap();
    assert!(matches!(sealer.seal_footer(&frames, b""), Err(SealError::Incomplete { .. })), "no last frame");
    frames.push(&sealer.seal_frame(1, true, b"end").unwrap(), 3).unwrap();
    assert!(matches!(sealer.seal_footer(&frames, &[0; MAX_EXTRA + 1]), Err(SealError::TooLarge { .. })));
    assert!(sealer.seal_footer(&frames, &[0; MAX_EXTRA]).is_ok());
}

#[test]
fn frames_can_be_sealed_in_parallel() {
    let keys = keys();
    let plain = plaintext(4 * MAX_FRAME);
    let frames = FrameKey::Content(&keys.content);
    let sealer = ObjectSealer::new(keys.file.meta_key(), frames, &bound(Kind::WalRange), Codec::Lz4).unwrap();
    let sealed: Vec<Bytes> = std::thread::scope(|scope| {
        let chunks = (0..4_u32).zip(plain.chunks(MAX_FRAME)).rev();
        let seal = |(index, chunk)| {
            scope.spawn({
                let sealer = &sealer;
                move || (index, sealer.seal_frame(index, index == 3, chunk).unwrap())
            })
        };
        let mut done: Vec<_> = chunks.map(seal).map(|thread| thread.join().unwrap()).collect();
        done.sort_by_key(|(index, _)| *index);
        done.into_iter().map(|(_, frame)| frame).collect()
    });
    let mut lengths = FrameLengths::new();
    sealed.iter().for_each(|frame| lengths.push(frame, MAX_FRAME).unwrap());
    let footer = sealer.seal_footer(&lengths, b"").unwrap();
    let object = [vec![sealer.header()], sealed, vec![footer]].concat().concat();
    assert!(keys.open(&object).unwrap().0 == plain);
}

#[test]
fn a_tail_is_cut_where_a_crash_tore_it() {
    let keys = keys();
    let appends = [b"one".to_vec(), plaintext(3000), plaintext(2 * MAX_FRAME + 5), b"four".to_vec()];
    let parts = keys.tail(&appends);
    let whole = keys.open_tail(&parts.concat()).unwrap();
    assert_eq!((&whole.prelude[..], whole.frames, whole.damage.as_deref()), (&b"note"[..], 6, None));
    assert!(whole.plaintext == appends.concat());
    assert_eq!(whole.valid_len, parts.concat().len() as u64);

    // The third append, of three frames, was under way: its first frame is torn, a later one reached the disk.
    let mut torn = parts[..4].concat();
    let third = parts[..3].concat().len();
    torn[third + 100..third + 200].fill(0);
    torn.extend([0; 5000]);
    let opened = keys.open_tail(&torn).unwrap();
    assert_eq!((opened.frames, opened.valid_len, opened.damage), (2, third as u64, None));
    assert!(opened.plaintext == appends[..2].concat());

    // The fourth had been begun, so the third was durable: now the same is damage.
    let mut damaged = parts.concat();
    damaged[third + 100..third + 200].fill(0);
    let opened = keys.open_tail(&damaged).unwrap();
    assert_eq!(opened.frames, 2);
    assert!(opened.damage.unwrap().contains("frame 2 at byte"));

    // The same when the frame's own header is what was lost.
    let second = parts[..2].concat().len();
    for lost in [second..second + 4, second..third] {
        let mut damaged = parts.concat();
        damaged[lost].fill(0);
        let opened = keys.open_tail(&damaged).unwrap();
        assert_eq!((opened.frames, opened.damage.is_some()), (1, true));
    }
}

#[test]
fn a_tail_of_small_commits_tells_a_lost_page() {
    let keys = keys();
    let parts = keys.tail(&vec![plaintext(300); 200]);
    let mut object = parts.concat();
    let end = object.len();
    object.resize(end + (1 << 20), 0);
    object[8192..12288].fill(0);
    let opened = keys.open_tail(&object).unwrap();
    assert!(opened.damage.is_some(), "a page of lost commits passed for the end");
    object[12288..].fill(0);
    assert!(keys.open_tail(&object).unwrap().damage.is_none());
}

/// A tag ends in zero once in 256 frames: that byte is not the preallocated rest.
#[test]
fn a_good_frame_that_ends_in_zero_is_found_behind_a_bad_one() {
    let keys = keys();
    let ends_in_zero = |parts: &Vec<Vec<u8>>| parts[2].ends_with(&[0]);
    let tails = (0..10_000).map(|_| keys.tail(&[b"one".to_vec(), b"two".to_vec()]));
    let mut parts = tails.into_iter().find(ends_in_zero).unwrap();
    parts[1][10] ^= 1;
    assert!(keys.open_tail(&parts.concat()).unwrap().damage.is_some());
}

#[test]
fn a_tail_needs_the_content_key_and_its_prelude_does_not() {
    let keys = keys();
    let object = keys.tail(&[b"x".to_vec()]).concat();
    let meta = keys.file.meta_key();
    assert_eq!(peek_tail_prelude(meta, &bound(Kind::WalTail), &object[..130]).unwrap(), "note");
    let error = open_tail(meta, None, &bound(Kind::WalTail), &object).unwrap_err();
    assert_eq!(error, SealError::NeedContentKey { key_id: keys.content.id() });
    assert!(matches!(keys.open(&object), Err(SealError::NotThisObject { .. })), "a tail passed for a range");
}

#[test]
fn block_tags_are_keyed() {
    let (ours, theirs) = (keys(), keys());
    let tag = |keys: &Keys, realm, block: &[u8]| BlockTagger::new(keys.file.meta_key(), realm).tag(block);
    let block = plaintext(8192);
    assert_eq!(tag(&ours, REALM, &block), tag(&ours, REALM, &block));
    assert_ne!(tag(&ours, REALM, &block), tag(&theirs, REALM, &block));
    assert_ne!(tag(&ours, REALM, &block), tag(&ours, Id128::new([9; 16]), &block));
    assert_ne!(tag(&ours, REALM, &block), tag(&ours, REALM, &block[..8191]));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// However an object is altered, it does not open; and nothing panics.
    #[test]
    fn p4_an_altered_object_does_not_open(
        len in 0..5000_usize, lz4 in any::<bool>(), spoils in vec(a_spoil(), 1..3),
    ) {
        let keys = keys();
        let whole = keys.seal(if lz4 { Codec::Lz4 } else { Codec::Stored }, &plaintext(len), b"extra");
        let mut object = whole.clone();
        spoils.iter().for_each(|spoil| spoil.apply(&mut object));
        prop_assume!(object != whole);
        prop_assert!(keys.open(&object).is_err());
    }

    /// However a tail is altered, what opens is what was written, up to some frame.
    #[test]
    fn p4_an_altered_tail_opens_to_a_prefix(
        lens in vec(1..2000_usize, 1..6), zeros in 0..5000_usize, spoils in vec(a_spoil(), 1..3),
    ) {
        let keys = keys();
        let appends: Vec<_> = lens.into_iter().map(plaintext).collect();
        let mut object = keys.tail(&appends).concat();
        object.extend(vec![0; zeros]);
        spoils.iter().for_each(|spoil| spoil.apply(&mut object));
        if let Ok(opened) = keys.open_tail(&object) {
            prop_assert_eq!(&opened.prelude[..], b"note");
            prop_assert_eq!(opened.plaintext, appends[..opened.frames as usize].concat());
            prop_assert!(opened.valid_len <= object.len() as u64);
        }
    }

    /// Cut a tail anywhere: everything before the cut is there, and a cut is no damage.
    #[test]
    fn a_cut_tail_is_no_damage(lens in vec(1..2000_usize, 1..6), at in any::<Index>(), zeros in 0..5000_usize) {
        let keys = keys();
        let appends: Vec<_> = lens.into_iter().map(plaintext).collect();
        let parts = keys.tail(&appends);
        let mut object = parts.concat();
        object.truncate(parts[0].len() + at.index(object.len() - parts[0].len() + 1));
        let (mut whole, mut end) = (0, parts[0].len());
        while parts.get(whole + 1).is_some_and(|part| end + part.len() <= object.len()) {
            whole += 1;
            end += parts[whole].len();
        }
        object.extend(vec![0; zeros]);
        let opened = keys.open_tail(&object).unwrap();
        prop_assert_eq!(opened.damage, None);
        // A frame whose cut-off bytes happened to be zeros is whole again under the zeros that follow.
        prop_assert!(opened.frames as usize >= whole);
        prop_assert_eq!(opened.plaintext, appends[..opened.frames as usize].concat());
    }

    /// One altered frame before another is always told.
    #[test]
    fn a_flipped_bit_before_the_last_frame_is_damage(
        lens in vec(1..2000_usize, 2..6), which in any::<Index>(), at in any::<Index>(), bit in 0..8,
    ) {
        let keys = keys();
        let appends: Vec<_> = lens.into_iter().map(plaintext).collect();
        let mut parts = keys.tail(&appends);
        let which = which.index(appends.len() - 1);
        let part = &mut parts[which + 1];
        let at = at.index(part.len());
        part[at] ^= 1_u8 << bit;
        let opened = keys.open_tail(&parts.concat()).unwrap();
        prop_assert_eq!((opened.frames as usize, opened.damage.is_some()), (which, true));
    }

    #[test]
    fn garbage_is_refused(bytes in vec(any::<u8>(), 0..2000), magic in 0..4_usize) {
        let keys = keys();
        let object = keys.seal(Codec::Lz4, b"x", b"");
        let keep = [0, 8, 16, 96][magic];
        let garbage = [&object[..keep], &bytes].concat();
        prop_assume!(!object.starts_with(&garbage) || garbage.len() < object.len());
        prop_assert!(keys.open(&garbage).is_err());
        prop_assert!(keys.open_tail(&garbage).is_err());
        let id = keys.content.id();
        prop_assert!(keys.file.unwrap_content_key(REALM, id, &garbage).is_err());
        prop_assert!(KeyFile::read(&garbage, None).is_err());
    }

    /// What is authenticated can still be nonsense, if a writer of ours was wrong: it is refused, not followed.
    #[test]
    fn decompression_is_bounded(bytes in vec(any::<u8>(), 0..300), len in any::<u32>()) {
        let content = [&len.to_le_bytes()[..], &bytes].concat();
        if let Some(plaintext) = compress::decompressed(Codec::Lz4, &content) {
            prop_assert!(plaintext.len() == len as usize && plaintext.len() <= MAX_FRAME);
        }
    }

    #[test]
    fn compression_reads_back(plain in vec(any::<u8>(), 0..300), repeat in 1..500_usize) {
        let plain = plain.repeat(repeat);
        let (content, shrunk) = compress::compressed(Codec::Lz4, &plain, |content, shrunk| (content.to_vec(), shrunk));
        prop_assert!(content.len() <= plain.len());
        let back = if shrunk { compress::decompressed(Codec::Lz4, &content).unwrap() } else { content };
        prop_assert!(back == plain);
    }
}

mod key_files {
    use age::secrecy::{ExposeSecret, SecretString};

    use super::*;

    fn text(keys: &KeyFile) -> String {
        keys.render().expose_secret().to_owned()
    }

    #[test]
    fn a_key_file_reads_back() {
        let keys = keys();
        let back = KeyFile::parse(&text(&keys.file)).unwrap();
        assert_eq!((back.meta_key().id(), back.recipients()), (keys.file.meta_key().id(), keys.file.recipients()));
        let envelope = keys.file.wrap_content_key(REALM, &keys.content).unwrap();
        let opened = back.unwrap_content_key(REALM, keys.content.id(), &envelope).unwrap();
        assert_eq!(opened.secret().expose(), keys.content.secret().expose());
        assert_eq!((opened.day(), opened.id()), (20_000, keys.content.id()));
        // printed and typed in again: other line ends, indented, lower case
        let typed = text(&keys.file).replace('\n', "\r\n  ").to_lowercase();
        assert_eq!(KeyFile::parse(&typed).unwrap().meta_key().id(), keys.file.meta_key().id());
        assert!(text(&keys.file).contains("loses this file loses every backup"));
    }

    #[test]
    fn a_write_only_key_file_seals_and_does_not_open() {
        let keys = keys();
        let host = KeyFile::parse(&text(&keys.file.write_only())).unwrap();
        assert!(keys.file.can_read() && !host.can_read());
        assert!(!text(&host).contains("AGE-SECRET-KEY"));
        let envelope = host.wrap_content_key(REALM, &keys.content).unwrap();
        let id = keys.content.id();
        assert_eq!(host.unwrap_content_key(REALM, id, &envelope).unwrap_err(), SealError::WriteOnly);
        assert!(keys.file.unwrap_content_key(REALM, id, &envelope).is_ok());
        host.check_meta_key(REALM, &keys.file.wrap_meta_key(REALM).unwrap()).unwrap();
        // another identity with the same meta key is genuine, and not a recipient
        let stranger = text(&super::keys().file).lines().find(|l| l.starts_with("AGE-SECRET")).unwrap().to_owned();
        let meta = text(&keys.file).lines().find(|l| l.starts_with("PGKEEP")).unwrap().to_owned();
        let other = KeyFile::parse(&format!("{stranger}\n{meta}\n")).unwrap();
        let error = other.unwrap_content_key(REALM, id, &envelope).unwrap_err();
        assert_eq!(error, SealError::NotARecipient { key_id: id });
    }

    #[test]
    fn a_sheet_is_typed_in_again() {
        let keys = keys();
        let sheet = keys.file.to_sheet().unwrap();
        let sheet = sheet.expose_secret();
        assert!(keys.file.write_only().to_sheet().is_none(), "it would restore nothing");
        assert_eq!(sheet.lines().count(), 5, "{}", sheet.lines().count());
        let want = text(&keys.file);
        let same = |typed: &str| KeyFile::from_sheet(typed).map(|file| text(&file) == want);
        let mut shuffled: Vec<&str> = sheet.lines().collect();
        shuffled.reverse();
        let forms = [
            sheet.to_owned(),
            sheet.to_lowercase().replace('\n', "\r\n   "),
            shuffled.join("\n"),
            format!("RECOVERY SHEET\nMeta key 7\n{sheet}\nIn 1 step: M 1\n"),
            sheet.lines().map(|line| format!("{} {}\n", &line[..2], line[2..].replace(' ', ""))).collect(),
        ];
        for form in forms {
            assert_eq!(same(&form), Ok(true));
        }
        // Any typo is found, and, but for one in 65,536, in the line in which it is.
        let mut elsewhere = 0;
        for (at, letter) in sheet.char_indices().filter(|(_, letter)| letter.is_ascii_alphanumeric()) {
            let other = if letter == '7' { '8' } else { '7' };
            let typed = format!("{}{other}{}", &sheet[..at], &sheet[at + 1..]);
            let error = KeyFile::from_sheet(&typed).expect_err("a typo");
            assert!(matches!(error, SealError::KeyFile { .. }), "{error}");
            let line = 1 + sheet[..at].matches('\n').count();
            let in_tag = sheet[..at].rsplit('\n').next().unwrap().len() < 2;
            elsewhere += u32::from(!in_tag && !error.to_string().contains(&format!("line {line}:")));
        }
        assert!(elsewhere <= 1, "{elsewhere}");
        for missing in 0..5 {
            let typed: Vec<&str> =
                sheet.lines().enumerate().filter(|(at, _)| *at != missing).map(|(_, line)| line).collect();
            assert!(same(&typed.join("\n")).is_err(), "without line {missing}");
        }
        assert!(same(&format!("{sheet}{sheet}")).is_err(), "twice");
        assert!(same("").is_err() && same("I1").is_err() && same("M1 \u{e4}\u{fc}").is_err());
    }

    #[test]
    fn p4_nobody_plants_a_key_with_the_public_half_alone() {
        let (keys, stranger) = (keys(), super::keys());
        // an attacker knows the recipient, not the meta key
        let recipient = keys.file.recipients().remove(0);
        let meta = text(&stranger.file).lines().find(|l| l.starts_with("PGKEEP")).unwrap().to_owned();
        let forger = KeyFile::parse(&format!("{recipient}\n{meta}\n")).unwrap();
        let forged = forger.wrap_content_key(REALM, &keys.content).unwrap();
        let id = keys.content.id();
        let refused = |result: Result<ContentKey, SealError>| matches!(result, Err(SealError::Envelope { .. }));
        assert!(refused(keys.file.unwrap_content_key(REALM, id, &forged)));
        let genuine = keys.file.wrap_content_key(REALM, &keys.content).unwrap();
        assert!(refused(keys.file.unwrap_content_key(REALM, Id128::new([3; 16]), &genuine)), "under another name");
        assert!(refused(keys.file.unwrap_content_key(Id128::new([3; 16]), id, &genuine)), "in another realm");
        let meta_envelope = keys.file.wrap_meta_key(REALM).unwrap();
        assert!(refused(keys.file.unwrap_content_key(REALM, keys.file.meta_key().id(), &meta_envelope)));
        assert!(keys.file.check_meta_key(REALM, &genuine).is_err());
        for at in 0..genuine.len() {
            let mut altered = genuine.clone();
            altered[at] ^= 4;
            assert!(keys.file.unwrap_content_key(REALM, id, &altered).is_err(), "byte {at}");
            assert!(keys.file.unwrap_content_key(REALM, id, &genuine[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_typo_is_told_with_its_line_and_not_the_secret() {
        let keys = keys();
        let text = text(&keys.file);
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.starts_with('#')) {
            let digits = line.len();
            for at in (20..digits).step_by(7) {
                let mut typo = line.as_bytes().to_vec();
                typo[at] = if typo[at] == b'2' { b'3' } else { b'2' };
                let typo = String::from_utf8(typo).unwrap();
                let error = KeyFile::parse(&text.replace(line, &typo)).unwrap_err();
                let SealError::KeyFile { line: Some(seen), .. } = error else { panic!("{error:?}") };
                assert_eq!(seen, number);
                assert!(!error.to_string().contains(&typo[30..]), "the error shows the key");
            }
            let without = text.replace(line, "");
            let error = KeyFile::parse(&without).unwrap_err().to_string();
            assert!(error.contains("is the file cut short?"), "{error}");
            let twice = format!("{text}{line}\n");
            assert!(KeyFile::parse(&twice).unwrap_err().to_string().contains("second"));
            assert!(KeyFile::parse(&text.replace(line, &line[..digits - 1])).is_err());
        }
        let error = KeyFile::parse(&format!("{text}hello\n")).unwrap_err().to_string();
        assert!(error.contains("expected AGE-SECRET-KEY") && !error.contains("hello"), "{error}");
    }

    #[test]
    fn a_passphrase_protects_a_key_file() {
        let keys = keys();
        let (right, wrong) = (SecretString::from("correct horse"), SecretString::from("battery staple"));
        let sealed = keys.file.encrypt_with_work_factor(&right, 4).unwrap();
        assert!(KeyFile::is_encrypted(&sealed) && !KeyFile::is_encrypted(text(&keys.file).as_bytes()));
        let id = |file: Result<KeyFile, SealError>| file.map(|file| file.meta_key().id());
        assert_eq!(id(KeyFile::read(&sealed, Some(&right))), Ok(keys.file.meta_key().id()));
        assert_eq!(id(KeyFile::read(&sealed, Some(&wrong))), Err(SealError::WrongPassphrase));
        assert_eq!(id(KeyFile::read(&sealed, None)), Err(SealError::NeedPassphrase));
        for at in (0..sealed.len()).step_by(11) {
            let mut altered = sealed.clone();
            altered[at] ^= 1;
            // The work factor is a digit of the header: altered, it asks for other work, within the limit.
            assert!(KeyFile::read(&altered, Some(&right)).is_err(), "byte {at}");
            assert!(KeyFile::read(&sealed[..at], Some(&right)).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let keys = keys();
        let secret_hex = text(&keys.file).lines().last().unwrap()[18..50].to_lowercase();
        let sealer = keys.tail_sealer();
        let tagger = BlockTagger::new(keys.file.meta_key(), REALM);
        let content = keys.content.secret().expose();
        let shown = format!("{:?} {:?} {:?} {sealer:?} {tagger:?}", keys.file, keys.content, keys.file.meta_key());
        assert!(!shown.to_lowercase().contains(&secret_hex) && !shown.contains("SECRET-KEY"));
        assert!(!shown.contains(&format!("{:?}", &content[..4])[1..]));
        assert!(shown.contains(&keys.content.id().to_string()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whether bytes are handed over in whole frames or in pieces, the same plaintext comes out, and every frame but the
    /// last is full.
    #[test]
    fn frames_that_are_not_copied_are_the_same_frames(
        pieces in vec(prop_oneof![Just(MAX_FRAME), Just(2 * MAX_FRAME), 1usize..MAX_FRAME], 0..5),
        followed in any::<bool>(),
    ) {
        let count = pieces.len();
        let keys = keys();
        let frames = FrameKey::Content(&keys.content);
        let mut sealer = SequentialSealer::new(keys.file.meta_key(), frames, &bound(Kind::WalRange), Codec::Lz4).unwrap();
        let (mut object, mut all) = (Vec::new(), Vec::new());
        for (number, len) in pieces.into_iter().enumerate() {
            let piece: Vec<u8> = plaintext(len).into_iter().map(|byte| byte ^ number as u8).collect();
            object.extend(match followed {
                true if number + 1 < count => sealer.push_followed(&piece).unwrap(),
                true => sealer.push(&piece).unwrap(),
                false => sealer.push_shared(Bytes::from(piece.clone())).unwrap(),
            });
            all.extend(piece);
            prop_assert_eq!(sealer.plaintext_len(), all.len() as u64);
        }
        object.extend(sealer.finish(b"note").unwrap());
        let (opened, note) = keys.open(&object.concat()).unwrap();
        prop_assert!(opened == all);
        prop_assert_eq!(&note[..], b"note");
    }
}
