use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use pgkeep_crypto::Cipher;

use super::compress::compressed;
use super::error::{Part, SealError};
use super::format::{
    Binding, Codec, FRAME_HEADER, FrameHeader, Header, HeaderFields, Kind, NonceType, TAG, TRAILER, footer_aad,
    frame_aad, nonce, trailer,
};
use super::keys::{FrameKey, MetaKey, ObjectKeys};
use super::{MAX_EXTRA, MAX_FRAME, MAX_FRAMES};

/// Seals one object, frame by frame, in any order and from several threads.
///
/// An object is header, frames, footer; a tail is header, prelude, frames. Each number is sealed once: a nonce that came
/// twice would give away plaintext, so a repetition is an error. A retry sends the bytes that were sealed.
pub struct ObjectSealer {
    header: Header,
    frames: Cipher,
    footer: Cipher,
    used: Mutex<Used>,
}

/// Which nonces are spent.
#[derive(Default)]
struct Used {
    /// Frames below this number.
    below: u32,
    /// Frames above it: as many as are sealed in parallel.
    ahead: BTreeSet<u32>,
    footer: bool,
    prelude: bool,
}

impl Used {
    fn frame(&mut self, index: u32) -> Result<(), SealError> {
        if index < self.below || !self.ahead.insert(index) {
            return Err(SealError::SealedTwice { part: Part::Frame(index) });
        }
        while self.ahead.remove(&self.below) {
            self.below += 1; // invariant: `u32::MAX` itself is refused by the caller
        }
        Ok(())
    }
}

impl ObjectSealer {
    /// A sealer with a salt of its own.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn new(
        meta: &MetaKey,
        frames: FrameKey<'_>,
        binding: &Binding<'_>,
        codec: Codec,
    ) -> Result<ObjectSealer, SealError> {
        let mut salt = [0; 16];
        super::random::fill(&mut salt).map_err(|_| SealError::NoRandomness)?;
        Ok(ObjectSealer::with_salt(meta, frames, binding, codec, salt))
    }

    fn with_salt(
        meta: &MetaKey,
        frames: FrameKey<'_>,
        binding: &Binding<'_>,
        codec: Codec,
        salt: [u8; 16],
    ) -> ObjectSealer {
        let of_meta = ObjectKeys::new(meta.secret(), &salt);
        let (content, frames) = match frames {
            FrameKey::Meta(key) => (None, ObjectKeys::new(key.secret(), &salt).frames(binding)),
            FrameKey::Content(key) => {
                let of_content = ObjectKeys::new(key.secret(), &salt);
                (Some((key.id(), of_content.commitment())), of_content.frames(binding))
            }
        };
        let header = Header::build(&HeaderFields {
            codec,
            kind: binding.kind,
            content,
            meta_commitment: of_meta.commitment(),
            binding_tag: of_meta.binding_tag(binding),
            salt,
        });
        ObjectSealer { header, frames, footer: of_meta.footer(binding), used: Mutex::default() }
    }

    /// The header: the object's first bytes.
    pub fn header(&self) -> Bytes {
        self.header.to_bytes()
    }

    /// Seals the `index`-th frame; returns it with its frame header. Every frame but the last holds [`MAX_FRAME`] bytes;
    /// in a tail a frame holds what there is, and each frame sealed by this function is an append of its own.
    ///
    /// # Errors
    /// [`SealError::TooLarge`], or [`SealError::SealedTwice`]: both are mistakes of the caller.
    pub fn seal_frame(&self, index: u32, last: bool, plaintext: &[u8]) -> Result<Bytes, SealError> {
        let tail = self.header.kind() == Kind::WalTail;
        if !tail && !last && plaintext.len() != MAX_FRAME {
            return Err(SealError::Incomplete { detail: "only the last frame may be shorter than 1 MiB" });
        }
        self.seal_any_frame(index, last, tail, plaintext)
    }

    /// Seals what one append adds to a tail, in as many frames as needed, numbered from `first`. Only the first is
    /// marked as the beginning of an append: a reader knows by it that everything before was durable, so that damage
    /// there is told from an append that a crash tore apart.
    ///
    /// # Errors
    /// As [`ObjectSealer::seal_frame`].
    pub fn seal_append(&self, first: u32, plaintext: &[u8]) -> Result<Vec<Bytes>, SealError> {
        let mut frames = Vec::with_capacity(plaintext.len().div_ceil(MAX_FRAME));
        for (index, chunk) in (first..).zip(plaintext.chunks(MAX_FRAME)) {
            frames.push(self.seal_any_frame(index, false, index == first, chunk)?);
        }
        Ok(frames)
    }

    fn seal_any_frame(
        &self,
        index: u32,
        last: bool,
        begins_append: bool,
        plaintext: &[u8],
    ) -> Result<Bytes, SealError> {
        within("a frame", plaintext.len(), MAX_FRAME)?;
        within("the number of frames", index as usize, u32::MAX as usize - 1)?;
        self.used().frame(index)?;
        let kind = if last { NonceType::LastFrame } else { NonceType::Frame };
        compressed(self.header.codec(), plaintext, |content, compressed| {
            let frame = FrameHeader { sealed_len: content.len() + TAG, begins_append, compressed, last };
            self.seal_part(&self.frames, kind, index, frame, content)
        })
    }

    /// Seals the note that follows a tail's header: what the footer of a range would say.
    ///
    /// # Errors
    /// [`SealError::TooLarge`] above [`MAX_EXTRA`], or [`SealError::SealedTwice`].
    pub fn seal_prelude(&self, extra: &[u8]) -> Result<Bytes, SealError> {
        within("a prelude", extra.len(), MAX_EXTRA)?;
        if std::mem::replace(&mut self.used().prelude, true) {
            return Err(SealError::SealedTwice { part: Part::Prelude });
        }
        let frame = FrameHeader { sealed_len: extra.len() + TAG, begins_append: false, compressed: false, last: false };
        self.seal_part(&self.footer, NonceType::Prelude, 0, frame, extra)
    }

    fn seal_part(
        &self,
        cipher: &Cipher,
        kind: NonceType,
        counter: u32,
        frame: FrameHeader,
        content: &[u8],
    ) -> Result<Bytes, SealError> {
        let frame = frame.to_bytes();
        let mut out = Vec::with_capacity(FRAME_HEADER + content.len() + TAG);
        out.extend_from_slice(&frame);
        seal_onto(&mut out, cipher, nonce(kind, counter), &frame_aad(&self.header, frame), content)?;
        Ok(out.into())
    }

    /// Seals the footer and puts the plain trailer behind it: the object's last bytes.
    ///
    /// # Errors
    /// [`SealError::TooLarge`] above [`MAX_EXTRA`], [`SealError::SealedTwice`], or [`SealError::Incomplete`] when
    /// `frames` are not those of an object.
    pub fn seal_footer(&self, frames: &FrameLengths, extra: &[u8]) -> Result<Bytes, SealError> {
        within("what a footer says", extra.len(), MAX_EXTRA)?;
        frames.check()?;
        if std::mem::replace(&mut self.used().footer, true) {
            return Err(SealError::SealedTwice { part: Part::Footer });
        }
        let mut content = Vec::with_capacity(12 + FRAME_HEADER * frames.headers.len() + extra.len());
        content.extend_from_slice(&frames.plaintext_len.to_le_bytes());
        content.extend_from_slice(&(frames.headers.len() as u32).to_le_bytes()); // checked: at most MAX_FRAMES
        frames.headers.iter().for_each(|header| content.extend_from_slice(&header.to_bytes()));
        content.extend_from_slice(extra);

        let trailer = trailer((content.len() + TAG) as u32); // about 512 KiB at most
        let mut out = Vec::with_capacity(content.len() + TAG + TRAILER);
        let aad = footer_aad(&self.header, trailer);
        seal_onto(&mut out, &self.footer, nonce(NonceType::Footer, 0), &aad, &content)?;
        out.extend_from_slice(&trailer);
        Ok(out.into())
    }

    fn used(&self) -> std::sync::MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner) // what was spent stays spent
    }
}

impl fmt::Debug for ObjectSealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ObjectSealer").field(&self.header).finish()
    }
}

fn within(what: &'static str, len: usize, limit: usize) -> Result<(), SealError> {
    if len > limit { Err(SealError::TooLarge { what, len: len as u64, limit: limit as u64 }) } else { Ok(()) }
}

/// Appends the sealed `content` and its tag to `out`.
fn seal_onto(out: &mut Vec<u8>, cipher: &Cipher, nonce: [u8; 12], aad: &[u8], content: &[u8]) -> Result<(), SealError> {
    let at = out.len();
    out.extend_from_slice(content);
    let tag = cipher.seal(nonce, aad, out.get_mut(at..).unwrap_or_default()).ok_or(SealError::TooLarge {
        what: "what is sealed at once",
        len: content.len() as u64,
        limit: pgkeep_crypto::MAX_SEALED,
    })?;
    out.extend_from_slice(&tag);
    Ok(())
}

/// The frames of an object in order, as its footer lists them.
#[derive(Debug, Clone, Default)]
pub struct FrameLengths {
    headers: Vec<FrameHeader>,
    plaintext_len: u64,
    stored_len: u64,
}

impl FrameLengths {
    /// No frames yet.
    pub fn new() -> FrameLengths {
        FrameLengths::default()
    }

    /// Notes the next frame: as [`ObjectSealer::seal_frame`] returned it, and how much plaintext went in.
    ///
    /// # Errors
    /// [`SealError::Incomplete`] when `frame` does not begin with a frame header, or follows the last one.
    pub fn push(&mut self, frame: &[u8], plaintext_len: usize) -> Result<(), SealError> {
        let header = frame.first_chunk().copied().and_then(FrameHeader::parse);
        let Some(header) = header.filter(|header| FRAME_HEADER + header.sealed_len == frame.len()) else {
            return Err(SealError::Incomplete { detail: "a frame is not as it was sealed" });
        };
        if self.headers.last().is_some_and(|header| header.last) {
            return Err(SealError::Incomplete { detail: "a frame follows the last one" });
        }
        self.headers.push(header);
        self.plaintext_len += plaintext_len as u64;
        self.stored_len += frame.len() as u64;
        Ok(())
    }

    /// Frames so far.
    pub fn count(&self) -> u32 {
        self.headers.len() as u32 // `check` refuses more than MAX_FRAMES
    }

    /// Bytes of plaintext so far.
    pub fn plaintext_len(&self) -> u64 {
        self.plaintext_len
    }

    /// Bytes of the frames as sealed, so far.
    pub fn stored_len(&self) -> u64 {
        self.stored_len
    }

    fn check(&self) -> Result<(), SealError> {
        within("the number of frames", self.headers.len(), MAX_FRAMES as usize)?;
        if !self.headers.last().is_some_and(|header| header.last) {
            return Err(SealError::Incomplete { detail: "the last frame is missing" });
        }
        let before_last = (self.headers.len() as u64 - 1) * MAX_FRAME as u64;
        let rest = self.plaintext_len.checked_sub(before_last);
        if !rest.is_some_and(|rest| rest <= MAX_FRAME as u64 && (rest > 0 || before_last == 0)) {
            return Err(SealError::Incomplete { detail: "the lengths of its frames do not add up" });
        }
        Ok(())
    }
}

/// Seals a stream: what [`SequentialSealer::push`] and [`SequentialSealer::finish`] return, one after the other, is
/// the object. Holds back at most 1 MiB, because only the end tells which frame is the last.
#[derive(Debug)]
pub struct SequentialSealer {
    sealer: ObjectSealer,
    frames: FrameLengths,
    /// A whole frame that was handed over and may be the last one. Then `waiting` is empty.
    full: Option<Bytes>,
    waiting: Vec<u8>,
    header_sent: bool,
}

impl SequentialSealer {
    /// A sealer with a salt of its own.
    ///
    /// # Errors
    /// As [`ObjectSealer::new`].
    pub fn new(
        meta: &MetaKey,
        frames: FrameKey<'_>,
        binding: &Binding<'_>,
        codec: Codec,
    ) -> Result<SequentialSealer, SealError> {
        Ok(SequentialSealer::from(ObjectSealer::new(meta, frames, binding, codec)?))
    }

    /// The header, which is also the first thing that `push` or `finish` returns.
    pub fn header(&self) -> Bytes {
        self.sealer.header()
    }

    /// Bytes of plaintext taken so far.
    pub fn plaintext_len(&self) -> u64 {
        let full = self.full.as_ref().map_or(0, Bytes::len);
        self.frames.plaintext_len() + (full + self.waiting.len()) as u64
    }

    /// As [`SequentialSealer::push`]; bytes that are just one frame are not copied.
    ///
    /// # Errors
    /// As there.
    pub fn push_shared(&mut self, bytes: Bytes) -> Result<Vec<Bytes>, SealError> {
        if bytes.len() != MAX_FRAME || !self.waiting.is_empty() {
            return self.push(&bytes);
        }
        let mut parts = Vec::new();
        if let Some(full) = self.full.replace(bytes) {
            self.seal(&mut parts, false, &full)?;
        }
        Ok(parts)
    }

    /// As [`SequentialSealer::push`], of bytes behind which more will come: whole frames are sealed where they lie.
    ///
    /// # Errors
    /// As there.
    pub fn push_followed(&mut self, bytes: &[u8]) -> Result<Vec<Bytes>, SealError> {
        if !self.waiting.is_empty() || self.full.is_some() {
            return self.push(bytes);
        }
        let (frames, rest) = bytes.as_chunks::<MAX_FRAME>();
        let mut parts = Vec::with_capacity(frames.len() + 1);
        for frame in frames {
            self.seal(&mut parts, false, frame)?;
        }
        self.waiting.extend_from_slice(rest);
        Ok(parts)
    }

    /// Takes the next bytes; returns the parts of the object that are complete by now (often none).
    ///
    /// # Errors
    /// [`SealError::TooLarge`] when the object has more than [`MAX_FRAMES`] frames.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<Vec<Bytes>, SealError> {
        let mut parts = Vec::new();
        if let Some(full) = self.full.take_if(|_| !bytes.is_empty()) {
            self.seal(&mut parts, false, &full)?;
        }
        while !bytes.is_empty() {
            if self.waiting.len() == MAX_FRAME {
                let mut full = std::mem::take(&mut self.waiting);
                self.seal(&mut parts, false, &full)?;
                full.clear();
                self.waiting = full; // its room is used again
            }
            if self.waiting.is_empty() && bytes.len() > MAX_FRAME {
                let (frame, rest) = bytes.split_at(MAX_FRAME);
                self.seal(&mut parts, false, frame)?;
                bytes = rest;
            } else {
                let (fits, rest) = bytes.split_at(bytes.len().min(MAX_FRAME - self.waiting.len()));
                self.waiting.extend_from_slice(fits);
                bytes = rest;
            }
        }
        Ok(parts)
    }

    /// Seals the last frame and the footer.
    ///
    /// # Errors
    /// [`SealError::TooLarge`] when `extra` is above [`MAX_EXTRA`].
    pub fn finish(mut self, extra: &[u8]) -> Result<Vec<Bytes>, SealError> {
        let mut parts = Vec::new();
        let rest = match self.full.take() {
            Some(full) => full,
            None => Bytes::from(std::mem::take(&mut self.waiting)),
        };
        self.seal(&mut parts, true, &rest)?;
        parts.push(self.sealer.seal_footer(&self.frames, extra)?);
        Ok(parts)
    }

    fn seal(&mut self, parts: &mut Vec<Bytes>, last: bool, plaintext: &[u8]) -> Result<(), SealError> {
        within("the number of frames", self.frames.headers.len() + 1, MAX_FRAMES as usize)?;
        if !std::mem::replace(&mut self.header_sent, true) {
            parts.push(self.sealer.header());
        }
        let frame = self.sealer.seal_frame(self.frames.count(), last, plaintext)?;
        self.frames.push(&frame, plaintext.len())?;
        parts.push(frame);
        Ok(())
    }
}

impl From<ObjectSealer> for SequentialSealer {
    fn from(sealer: ObjectSealer) -> SequentialSealer {
        SequentialSealer { sealer, frames: FrameLengths::new(), full: None, waiting: Vec::new(), header_sent: false }
    }
}

/// Seals bytes in memory; returns the object in parts.
///
/// # Errors
/// As [`SequentialSealer`].
pub fn seal_whole(
    meta: &MetaKey,
    frames: FrameKey<'_>,
    binding: &Binding<'_>,
    codec: Codec,
    plaintext: &[u8],
    extra: &[u8],
) -> Result<Vec<Bytes>, SealError> {
    let mut sealer = SequentialSealer::new(meta, frames, binding, codec)?;
    let mut parts = sealer.push(plaintext)?;
    parts.extend(sealer.finish(extra)?);
    Ok(parts)
}
