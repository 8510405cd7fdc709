//! The open segment's file in a directory repository: header, prelude, then frames that are appended one by one.
//!
//! A crash leaves the last append whole, in part, or not at all, and the file's preallocated rest full of zeros. So a
//! reader takes the longest prefix of frames that open. An append is only begun when the one before is durable, and its
//! first frame says that it begins one: where such a frame opens *behind* one that does not, something that was durable
//! has been lost, and that is damage, not a crash.

use bytes::Bytes;

use super::error::{Part, SealError};
use super::format::{Binding, FRAME_HEADER, FrameHeader, Header, Kind, TAG};
use super::keys::{ContentKey, MetaKey};
use super::opener::Opener;
use super::{MAX_EXTRA, MAX_FRAME};

/// Bytes that are authenticated at most in the search behind a frame that does not open.
const SEARCH_BUDGET: usize = 256 << 20;
/// How many lost frames in a row the search bridges when their headers are gone too: more than a page holds.
const SEARCH_LOST: u32 = 512;
/// Frames up to this size are looked for behind several lost ones: they are what synchronous commits make.
const SMALL: usize = 64 << 10;

/// What a tail holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TailContent {
    /// What was handed to the sealer as the prelude.
    pub prelude: Bytes,
    /// The plaintext of the frames that open, up to the first that does not.
    pub plaintext: Vec<u8>,
    /// How many frames that is.
    pub frames: u32,
    /// Bytes of the object up to the end of the last frame that opens.
    pub valid_len: u64,
    /// Something that had been durable does not open. `None`: the end is an end, or a torn append.
    pub damage: Option<String>,
}

/// Opens a tail: the longest prefix of frames that open.
///
/// # Errors
/// As [`super::open_whole`], for header and prelude; frames that do not open are no error.
/// A tail without a whole prelude holds nothing yet: [`SealError::Cut`].
pub fn open_tail(
    meta: &MetaKey,
    content: Option<&ContentKey>,
    binding: &Binding<'_>,
    object: &[u8],
) -> Result<TailContent, SealError> {
    let (opener, prelude, start) = open_start(meta, content, binding, object)?;
    let mut tail = TailContent { prelude, plaintext: Vec::new(), frames: 0, valid_len: start as u64, damage: None };
    let mut rest = object.get(start..).unwrap_or_default();
    while let Some(frame) = frame_at(rest) {
        match opener.open_frame_with_header(tail.frames, frame) {
            Ok((header, plaintext)) => {
                tail.plaintext.extend_from_slice(&plaintext);
                tail.frames += 1;
                tail.valid_len += frame.len() as u64;
                rest = rest.get(frame.len()..).unwrap_or_default();
                if header.last {
                    break;
                }
            }
            Err(error @ SealError::NeedContentKey { .. }) => return Err(error),
            Err(_) => break,
        }
    }
    if let Some((frame, at)) = found_behind(&opener, tail.frames, rest) {
        let at = tail.valid_len + at as u64;
        tail.damage = Some(format!(
            "frame {} at byte {} does not open, but frame {frame} at byte {at} does, which was written after it was durable",
            tail.frames, tail.valid_len
        ));
    }
    Ok(tail)
}

/// Opens a tail piece by piece, for who must not hold all of it.
#[derive(Debug)]
pub struct TailFrames {
    opener: Opener,
}

/// What [`TailFrames::open`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenedFrames {
    /// The plaintext of the frames that open.
    pub plaintext: Vec<u8>,
    /// How many frames that is.
    pub frames: u32,
    /// How many of the bytes they take.
    pub used: usize,
    /// Nothing can follow: a frame that is there whole does not open, or is no frame, or was the last one. Otherwise the
    /// given bytes end within a frame, or with one.
    pub ended: bool,
}

impl TailFrames {
    /// The opener, the prelude, and where the frames begin. `start_of_object` as for [`peek_tail_prelude`].
    ///
    /// # Errors
    /// As [`open_tail`].
    pub fn begin(
        meta: &MetaKey,
        content: Option<&ContentKey>,
        binding: &Binding<'_>,
        start_of_object: &[u8],
    ) -> Result<(TailFrames, Bytes, u64), SealError> {
        let (opener, prelude, start) = open_start(meta, content, binding, start_of_object)?;
        Ok((TailFrames { opener }, prelude, start as u64))
    }

    /// Opens what `bytes`, which begin with frame `first`, hold of whole frames.
    ///
    /// # Errors
    /// [`SealError::NeedContentKey`]; frames that do not open are no error.
    pub fn open(&self, first: u32, bytes: &[u8]) -> Result<OpenedFrames, SealError> {
        let mut opened = OpenedFrames { plaintext: Vec::new(), frames: 0, used: 0, ended: false };
        while let Some(rest) = bytes.get(opened.used..)
            && let Some(plain) = rest.first_chunk::<FRAME_HEADER>()
        {
            let Some(header) = FrameHeader::parse(*plain) else {
                opened.ended = true;
                break;
            };
            let Some(frame) = rest.get(..FRAME_HEADER + header.sealed_len) else { break };
            match self.opener.open_frame_with_header(first.saturating_add(opened.frames), frame) {
                Ok((header, plaintext)) => {
                    opened.plaintext.extend_from_slice(&plaintext);
                    opened.frames += 1;
                    opened.used += frame.len();
                    opened.ended = header.last;
                }
                Err(error @ SealError::NeedContentKey { .. }) => return Err(error),
                Err(_) => opened.ended = true,
            }
            if opened.ended {
                break;
            }
        }
        Ok(opened)
    }

    /// Whether `bytes`, which should begin with frame `bad` and do not, hold a frame that proves that it was durable once:
    /// damage, as [`open_tail`] tells it, within these bytes.
    pub fn is_damage(&self, bad: u32, bytes: &[u8]) -> bool {
        found_behind(&self.opener, bad, bytes).is_some()
    }
}

/// Opens a tail's prelude, given its first bytes; needs no content key.
///
/// # Errors
/// As [`open_tail`]. The first `96 + 4 + 16 +` [`MAX_EXTRA`] bytes are always enough.
pub fn peek_tail_prelude(meta: &MetaKey, binding: &Binding<'_>, start_of_object: &[u8]) -> Result<Bytes, SealError> {
    open_start(meta, None, binding, start_of_object).map(|(_, prelude, _)| prelude)
}

/// Header and prelude, and where the frames begin.
fn open_start(
    meta: &MetaKey,
    content: Option<&ContentKey>,
    binding: &Binding<'_>,
    object: &[u8],
) -> Result<(Opener, Bytes, usize), SealError> {
    let part = Part::Prelude;
    let header = Header::parse(object)?;
    if header.kind() != Kind::WalTail {
        return Err(SealError::NotThisObject { expected: binding.name.to_owned() });
    }
    let opener = Opener::new(&header, meta, content, binding)?;
    let rest = object.get(Header::LEN..).unwrap_or_default();
    let (plain, rest) = rest.split_first_chunk::<FRAME_HEADER>().ok_or(SealError::Cut { part })?;
    if *plain == [0; FRAME_HEADER] {
        return Err(SealError::Cut { part }); // preallocated, and a crash came before the first append
    }
    let frame = FrameHeader::parse(*plain).filter(FrameHeader::fits_prelude);
    let frame = frame.ok_or(SealError::Damaged { part, detail: "its header is not one" })?;
    let sealed = rest.get(..frame.sealed_len).ok_or(SealError::Cut { part })?;
    let prelude =
        opener.open_prelude(*plain, sealed).ok_or(SealError::Damaged { part, detail: "its tag does not fit" })?;
    Ok((opener, prelude.into(), Header::LEN + FRAME_HEADER + frame.sealed_len))
}

/// The frame that `bytes` begin with, as far as its header can be believed.
fn frame_at(bytes: &[u8]) -> Option<&[u8]> {
    let header = FrameHeader::parse(*bytes.first_chunk()?)?;
    bytes.get(..FRAME_HEADER + header.sealed_len)
}

/// Looks for a frame behind frame `bad`, which `bytes` should begin with and which does not open, that proves that it
/// was durable once. Returns its number and where in `bytes` it begins.
///
/// Finds it for certain where the headers of the frames between are intact; where they are not, it tries every place
/// that could be a frame within the next MiB, within [`SEARCH_BUDGET`].
fn found_behind(opener: &Opener, bad: u32, bytes: &[u8]) -> Option<(u32, usize)> {
    // A frame may end in zeros, so `bytes` stay as long as they are; no frame begins behind the last other byte.
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let mut budget = SEARCH_BUDGET;
    let mut begins_append = |index: u32, frame: &[u8]| {
        let affordable = budget.checked_sub(frame.len());
        budget = affordable.unwrap_or(0);
        affordable.is_some()
            && opener.open_frame_with_header(index, frame).is_ok_and(|(header, _)| header.begins_append)
    };

    let (mut index, mut at) = (bad, 0);
    while let Some(frame) = bytes.get(at..).and_then(frame_at) {
        if index > bad && begins_append(index, frame) {
            return Some((index, at));
        }
        at += frame.len();
        index = index.checked_add(1)?;
    }

    // Headers are gone too. The next frame may be any that fits; a page that was lost may have held many small ones, so a
    // small frame is tried under many numbers. False candidates are few: one place in some ten thousand looks so.
    let window = end.min(FRAME_HEADER + MAX_FRAME + TAG + 1);
    for at in 1..window {
        let candidate = bytes.get(at..).and_then(frame_at).filter(|frame| frame_begins_append(frame));
        let Some(frame) = candidate else { continue };
        let most = if frame.len() <= SMALL { SEARCH_LOST } else { 1 };
        for index in (1..=most).filter_map(|lost| bad.checked_add(lost)) {
            if begins_append(index, frame) {
                return Some((index, at));
            }
        }
    }
    None
}

fn frame_begins_append(frame: &[u8]) -> bool {
    frame.first_chunk().copied().and_then(FrameHeader::parse).is_some_and(|header| header.begins_append)
}

const _: () = assert!(MAX_EXTRA + TAG < 1 << 24, "a prelude's length fits its header");
