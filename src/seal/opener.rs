use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use pgkeep_crypto::Cipher;

use super::compress::decompressed;
use super::error::{KeyRole, Part, SealError};
use super::format::{
    Binding, FRAME_HEADER, FrameHeader, Header, Kind, NonceType, TAG, TRAILER, TRAILER_MAGIC, footer_aad, frame_aad,
    nonce, trailer,
};
use super::keys::{ContentKey, MetaKey, ObjectKeys};
use super::{MAX_EXTRA, MAX_FRAME, MAX_FRAMES};

/// Plaintext length and number of frames, in front of the list of frames in a footer.
const FOOTER_FIXED: usize = 12;
const MAX_SEALED_FOOTER: usize = FOOTER_FIXED + FRAME_HEADER * MAX_FRAMES as usize + MAX_EXTRA + TAG;

/// Opens parts of one object, in any order and from several threads.
///
/// Without the content key (a host that may only write) it opens footers and preludes and no frames of data.
pub struct Opener {
    header: Header,
    /// `Err`: the content key that is missing.
    frames: Result<Cipher, crate::types::Id128>,
    footer: Cipher,
}

impl Opener {
    /// Checks that the keys are those of the object and that it is the object that `binding` says.
    ///
    /// # Errors
    /// [`SealError::WrongKey`] or [`SealError::NotThisObject`].
    pub fn new(
        header: &Header,
        meta: &MetaKey,
        content: Option<&ContentKey>,
        binding: &Binding<'_>,
    ) -> Result<Opener, SealError> {
        let salt = header.salt();
        let of_meta = ObjectKeys::new(meta.secret(), &salt);
        // The key first, then the name: under a wrong key no name fits.
        if of_meta.commitment() != header.meta_commitment() {
            return Err(SealError::WrongKey { role: KeyRole::Meta });
        }
        if header.kind() != binding.kind || of_meta.binding_tag(binding) != header.binding_tag() {
            return Err(SealError::NotThisObject { expected: binding.name.to_owned() });
        }
        let frames = match (header.key_id(), content) {
            (None, _) => Ok(of_meta.frames(binding)),
            (Some(id), None) => Err(id),
            (Some(id), Some(key)) => {
                let of_content = ObjectKeys::new(key.secret(), &salt);
                if key.id() != id || of_content.commitment() != header.content_commitment() {
                    return Err(SealError::WrongKey { role: KeyRole::Content });
                }
                Ok(of_content.frames(binding))
            }
        };
        Ok(Opener { header: header.clone(), frames, footer: of_meta.footer(binding) })
    }

    /// The header that this opener was made for.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Opens the footer, given the last bytes of an object of `object_len` bytes (or all of them).
    ///
    /// # Errors
    /// [`SealError::NeedMore`] says how many of the last bytes are needed; [`SealError::Cut`], [`SealError::Damaged`].
    pub fn open_footer(&self, end_of_object: &[u8], object_len: u64) -> Result<Footer, SealError> {
        let damaged = |detail| SealError::Damaged { part: Part::Footer, detail };
        if object_len < (Header::LEN + TRAILER) as u64 || (end_of_object.len() as u64) > object_len {
            return Err(SealError::Cut { part: Part::Trailer });
        }
        let Some((before, plain)) = end_of_object.split_last_chunk::<TRAILER>() else {
            return Err(SealError::NeedMore { bytes: TRAILER as u64 });
        };
        let [len @ .., m0, m1, m2, m3] = *plain;
        if [m0, m1, m2, m3] != TRAILER_MAGIC {
            return Err(SealError::Cut { part: Part::Trailer }); // whatever stands there instead, it is not the end
        }
        let sealed_len = u32::from_le_bytes(len) as usize;
        if !(FOOTER_FIXED + TAG..=MAX_SEALED_FOOTER).contains(&sealed_len) {
            return Err(SealError::Damaged { part: Part::Trailer, detail: "no footer is that long" });
        }
        let wanted = (sealed_len + TRAILER) as u64;
        if wanted + Header::LEN as u64 > object_len {
            return Err(SealError::Cut { part: Part::Footer });
        }
        let Some(start) = before.len().checked_sub(sealed_len) else {
            return Err(SealError::NeedMore { bytes: wanted });
        };
        let aad = footer_aad(&self.header, trailer(sealed_len as u32)); // bounded above
        let sealed = before.get(start..).unwrap_or_default();
        let content = open(&self.footer, nonce(NonceType::Footer, 0), &aad, sealed)
            .ok_or_else(|| damaged("its tag does not fit"))?;
        let footer = Footer::parse(&self.header, content).ok_or_else(|| damaged("what it says makes no sense"))?;
        if footer.frames_end() + wanted != object_len {
            return Err(damaged("the object is not as long as it says"));
        }
        Ok(footer)
    }

    /// Opens the `index`-th frame, given with its frame header and nothing more. Whether it is the last one is part of
    /// what is authenticated, and is the footer's business to compare ([`Opener::open_span`] does).
    ///
    /// # Errors
    /// [`SealError::Damaged`], [`SealError::Cut`], [`SealError::NeedContentKey`].
    pub fn open_frame(&self, index: u32, frame: &[u8]) -> Result<Bytes, SealError> {
        self.open_frame_with_header(index, frame).map(|(_, plaintext)| Bytes::from(plaintext))
    }

    pub(super) fn open_frame_with_header(&self, index: u32, frame: &[u8]) -> Result<(FrameHeader, Vec<u8>), SealError> {
        let part = Part::Frame(index);
        let damaged = |detail| SealError::Damaged { part, detail };
        let cipher = self.frames.as_ref().map_err(|key_id| SealError::NeedContentKey { key_id: *key_id })?;
        let (plain, sealed) = frame.split_first_chunk::<FRAME_HEADER>().ok_or(SealError::Cut { part })?;
        let header = FrameHeader::parse(*plain).ok_or_else(|| damaged("its header is not one"))?;
        match sealed.len().cmp(&header.sealed_len) {
            std::cmp::Ordering::Less => return Err(SealError::Cut { part }),
            std::cmp::Ordering::Greater => return Err(damaged("it is shorter than the frame that was expected here")),
            std::cmp::Ordering::Equal => {}
        }
        let kind = if header.last { NonceType::LastFrame } else { NonceType::Frame };
        let content = open(cipher, nonce(kind, index), &frame_aad(&self.header, *plain), sealed)
            .ok_or_else(|| damaged("its tag does not fit"))?;
        let plaintext = if header.compressed {
            decompressed(self.header.codec(), &content).ok_or_else(|| damaged("it does not decompress"))?
        } else {
            content
        };
        let tail = self.header.kind() == Kind::WalTail;
        if !tail && (header.begins_append || (!header.last && plaintext.len() != MAX_FRAME)) {
            return Err(damaged("only the last frame may be shorter than 1 MiB"));
        }
        Ok((header, plaintext))
    }

    /// Opens the frames of a [`Span`] from its bytes, and returns exactly the plaintext that the span was asked for.
    ///
    /// # Errors
    /// As [`Opener::open_frame`]; also when a frame's header is not the one that the footer lists.
    pub fn open_span(&self, footer: &Footer, span: &Span, bytes: &[u8]) -> Result<Vec<u8>, SealError> {
        let mut plaintext = Vec::with_capacity(span.frames.len().saturating_mul(MAX_FRAME));
        let mut rest = bytes;
        for index in span.frames.clone() {
            let part = Part::Frame(index);
            let listed = footer.frames.get(index as usize).ok_or(SealError::Cut { part })?;
            let (frame, after) =
                rest.split_at_checked(FRAME_HEADER + listed.sealed_len).ok_or(SealError::Cut { part })?;
            let (header, content) = self.open_frame_with_header(index, frame)?;
            if header != *listed {
                return Err(SealError::Damaged { part, detail: "it is not the frame that the footer lists" });
            }
            plaintext.extend_from_slice(&content);
            rest = after;
        }
        let first = u64::from(span.frames.start) * MAX_FRAME as u64;
        let at = |offset: u64| usize::try_from(offset.saturating_sub(first)).unwrap_or(usize::MAX);
        let (from, to) = (at(span.plaintext.start), at(span.plaintext.end));
        if to < plaintext.len() {
            plaintext.truncate(to);
        }
        if from > 0 {
            plaintext.drain(..from.min(plaintext.len()));
        }
        if plaintext.len() as u64 != span.plaintext.end - span.plaintext.start {
            return Err(SealError::Damaged { part: Part::Footer, detail: "its plaintext length is another" });
        }
        Ok(plaintext)
    }

    /// Goes through every frame of an object that is in memory, in order, and hands their plaintexts to `each`. Without the
    /// content key only the frames' headers can be compared with the footer's; `false` says so.
    ///
    /// # Errors
    /// As [`Opener::open_span`].
    pub fn check_frames(&self, footer: &Footer, object: &[u8], mut each: impl FnMut(&[u8])) -> Result<bool, SealError> {
        for (index, listed) in (0u32..).zip(&footer.frames) {
            let part = Part::Frame(index);
            let range = footer.frame_range(index).ok_or(SealError::Cut { part })?;
            let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
            let frame = object.get(at(range.start)..at(range.end)).ok_or(SealError::Cut { part })?;
            let header = if self.frames.is_ok() {
                let (header, plaintext) = self.open_frame_with_header(index, frame)?;
                each(&plaintext);
                header
            } else {
                let plain = frame.first_chunk::<FRAME_HEADER>().ok_or(SealError::Cut { part })?;
                let detail = "its header is not one";
                FrameHeader::parse(*plain).ok_or(SealError::Damaged { part, detail })?
            };
            if header != *listed {
                return Err(SealError::Damaged { part, detail: "it is not the frame that the footer lists" });
            }
        }
        Ok(self.frames.is_ok())
    }

    pub(super) fn open_prelude(&self, plain: [u8; FRAME_HEADER], sealed: &[u8]) -> Option<Vec<u8>> {
        open(&self.footer, nonce(NonceType::Prelude, 0), &frame_aad(&self.header, plain), sealed)
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Opener").field(&self.header).finish()
    }
}

/// Authenticates and decrypts; `None` if the tag does not fit.
fn open(cipher: &Cipher, nonce: [u8; 12], aad: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
    let (content, tag) = sealed.split_last_chunk::<TAG>()?;
    let mut content = content.to_vec();
    cipher.open(nonce, aad, &mut content, tag).then_some(content)
}

/// What a footer says: where the frames are, how much plaintext they hold, and what the kind of object added.
#[derive(Clone, PartialEq, Eq)]
pub struct Footer {
    /// Bytes of plaintext in the object.
    pub plaintext_len: u64,
    /// What was handed to the sealer as `extra`.
    pub extra: Bytes,
    frames: Vec<FrameHeader>,
    /// Where each frame begins in the object, and where the last one ends.
    offsets: Vec<u64>,
}

/// What to fetch for a range of plaintext, made by [`Footer::span`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The plaintext that was asked for.
    pub plaintext: Range<u64>,
    /// The frames that hold it.
    pub frames: Range<u32>,
    /// Their bytes in the object.
    pub bytes: Range<u64>,
}

impl Footer {
    fn parse(header: &Header, content: Vec<u8>) -> Option<Footer> {
        let content = Bytes::from(content);
        let (fixed, after) = content.split_first_chunk::<FOOTER_FIXED>()?;
        let [p0, p1, p2, p3, p4, p5, p6, p7, c0, c1, c2, c3] = *fixed;
        let plaintext_len = u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7]);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        if !(1..=MAX_FRAMES).contains(&count) {
            return None;
        }
        let list = after.get(..FRAME_HEADER * count as usize)?;
        let extra = content.slice(FOOTER_FIXED + list.len()..);
        let rest = plaintext_len.checked_sub(u64::from(count - 1) * MAX_FRAME as u64)?;
        let fits = rest <= MAX_FRAME as u64 && (rest > 0 || count == 1);
        if !fits || extra.len() > MAX_EXTRA {
            return None;
        }
        let (mut frames, mut offsets) = (Vec::with_capacity(count as usize), Vec::with_capacity(count as usize + 1));
        let mut offset = Header::LEN as u64;
        for (number, bytes) in (1..).zip(list.as_chunks::<FRAME_HEADER>().0) {
            let frame = FrameHeader::parse(*bytes)?;
            let holds = if number == count { rest } else { MAX_FRAME as u64 };
            let stored_fits = frame.compressed || frame.sealed_len as u64 == holds + TAG as u64;
            if frame.last != (number == count) || frame.begins_append || !stored_fits {
                return None;
            }
            if frame.compressed && header.codec() == super::Codec::Stored {
                return None;
            }
            frames.push(frame);
            offsets.push(offset);
            offset += (FRAME_HEADER + frame.sealed_len) as u64;
        }
        offsets.push(offset);
        Some(Footer { plaintext_len, extra, frames, offsets })
    }

    /// How many frames the object has: at least one.
    pub fn frame_count(&self) -> u32 {
        self.frames.len() as u32 // at most MAX_FRAMES
    }

    /// Where frame `index` lies in the object, with its frame header; `None` if there is no such frame.
    pub fn frame_range(&self, index: u32) -> Option<Range<u64>> {
        let index = index as usize;
        Some(*self.offsets.get(index)?..*self.offsets.get(index + 1)?)
    }

    /// What to fetch for these bytes of plaintext; `None` if the object does not hold all of them.
    pub fn span(&self, plaintext: Range<u64>) -> Option<Span> {
        if plaintext.start > plaintext.end || plaintext.end > self.plaintext_len {
            return None;
        }
        let frame = MAX_FRAME as u64;
        let frames = if plaintext.is_empty() {
            0..0
        } else {
            // `plaintext_len` fits MAX_FRAMES frames
            (plaintext.start / frame) as u32..plaintext.end.div_ceil(frame) as u32
        };
        let at = |index: u32| self.offsets.get(index as usize).copied();
        let bytes = at(frames.start)?..at(frames.end)?;
        Some(Span { plaintext, frames, bytes })
    }

    fn frames_end(&self) -> u64 {
        self.offsets.last().copied().unwrap_or(Header::LEN as u64)
    }
}

impl fmt::Debug for Footer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Footer({} bytes in {} frames, {} bytes of extra)",
            self.plaintext_len,
            self.frames.len(),
            self.extra.len()
        )
    }
}

/// Opens an object that is in memory: its plaintext, and what its kind added to the footer.
///
/// # Errors
/// Everything that [`Header::parse`], [`Opener::new`], [`Opener::open_footer`] and [`Opener::open_frame`] say.
pub fn open_whole(
    meta: &MetaKey,
    content: Option<&ContentKey>,
    binding: &Binding<'_>,
    object: &[u8],
) -> Result<(Vec<u8>, Bytes), SealError> {
    let opener = Opener::new(&Header::parse(object)?, meta, content, binding)?;
    let footer = match opener.open_footer(object, object.len() as u64) {
        Err(SealError::NeedMore { .. }) => return Err(SealError::Cut { part: Part::Trailer }), // there is no more
        footer => footer?,
    };
    let span = footer.span(0..footer.plaintext_len).ok_or(SealError::Cut { part: Part::Footer })?;
    // invariant: `open_footer` has compared the frames' end with the object's length, so both ends fit usize
    let frames = object.get(span.bytes.start as usize..).unwrap_or_default();
    let whole = if footer.plaintext_len == 0 {
        Span { frames: 0..1, ..span } // the empty frame is opened too: it is what says that nothing was cut off
    } else {
        span
    };
    Ok((opener.open_span(&footer, &whole, frames)?, footer.extra))
}
