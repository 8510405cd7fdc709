use std::fmt;
use std::str::FromStr;

use super::ParseError;

/// BLAKE3 over plaintext: the identity of content.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(*blake3::hash(bytes).as_bytes())
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Hashes a segment from its first byte on; the digest at any offset can be asked for on the way.
#[derive(Clone, Default)]
pub struct SegmentHasher(blake3::Hasher);

impl SegmentHasher {
    /// At offset 0.
    pub fn new() -> SegmentHasher {
        SegmentHasher::default()
    }

    /// The next bytes of the segment.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// How many bytes went in.
    pub fn offset(&self) -> u64 {
        self.0.count()
    }

    /// The digest of the segment's bytes `[0, offset)`.
    pub fn digest(&self) -> Digest {
        Digest(*self.0.finalize().as_bytes())
    }
}

impl fmt::Debug for SegmentHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SegmentHasher(at {})", self.offset())
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn read_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0[..6])?;
        f.write_str("…")
    }
}

impl FromStr for Digest {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        read_hex(text).map(Digest).ok_or_else(|| ParseError::new("a BLAKE3 digest in 64 hex digits", text))
    }
}

super::serde_by_text!(Digest);

/// 128 bits that name something: a realm, a repository, a key, a writer. Text form is 32 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id128([u8; 16]);

impl Id128 {
    /// An identity made elsewhere.
    pub const fn new(bytes: [u8; 16]) -> Id128 {
        Id128(bytes)
    }

    /// The 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Id128 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for Id128 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Id128 {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        read_hex(text).map(Id128).ok_or_else(|| ParseError::new("an identity in 32 hex digits", text))
    }
}

super::serde_by_text!(Id128);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_hashed_in_pieces_is_the_segment() {
        let mut hasher = SegmentHasher::new();
        hasher.update(b"write-");
        assert_eq!(hasher.digest(), Digest::of(b"write-"));
        hasher.update(b"ahead");
        assert_eq!((hasher.digest(), hasher.offset()), (Digest::of(b"write-ahead"), 11));
        assert_eq!(hasher.digest().to_string().parse(), Ok(hasher.digest()));
    }
}
