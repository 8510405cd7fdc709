//! The fixed parts of format version 1: header, frame header, nonce, trailer. `docs/format.md` is the same in prose.
//!
//! | at | size | field of the header                                                            |
//! |----|------|--------------------------------------------------------------------------------|
//! | 0  | 8    | magic `\x89pgkeep\n`                                                           |
//! | 8  | 4    | version 1, codec, kind, flags (bit 0: frames by a content key)                  |
//! | 12 | 4    | CRC-32C of the other 92 bytes: tells a flipped bit from a wrong key            |
//! | 16 | 16   | id of the content key, zeros if none                                           |
//! | 32 | 16   | commitment to the meta key                                                     |
//! | 48 | 16   | commitment to the content key, zeros if none                                   |
//! | 64 | 16   | binding tag: realm, repository, kind and name under the meta key               |
//! | 80 | 16   | random salt                                                                    |

use bytes::Bytes;

use super::error::{Part, SealError};
use super::{MAX_EXTRA, MAX_FRAME};
use crate::types::Id128;

pub(super) const MAGIC: [u8; 8] = *b"\x89pgkeep\n";
pub(super) const VERSION: u8 = 1;
/// AES-GCM's tag.
pub(super) const TAG: usize = 16;
/// The header in front of every frame and of a prelude.
pub(super) const FRAME_HEADER: usize = 4;
/// A compressed frame begins with the length of its plaintext.
pub(super) const COMPRESSED_PREFIX: usize = 4;
/// Length of the sealed footer (4 bytes), then [`TRAILER_MAGIC`].
pub(super) const TRAILER: usize = 8;
pub(super) const TRAILER_MAGIC: [u8; 4] = *b"pgk\n";

const FLAG_CONTENT_KEY: u8 = 1;

/// What an object is. Part of its key, so that one kind never passes for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A record of the catalog, in JSON.
    Record = 1,
    /// Bytes `[from, to)` of a WAL segment.
    WalRange = 2,
    /// The open segment's file that is appended to. The only kind without a footer.
    WalTail = 3,
    /// A `.partial` or `.backup` file that PostgreSQL handed over.
    WalFile = 4,
    /// A timeline's history file.
    History = 5,
    /// Extents of a base backup.
    Pack = 6,
    /// A piece of a base backup's table of files.
    FileTable = 7,
    /// A piece of a base backup's block tags.
    BlockTags = 8,
    /// PostgreSQL's own `backup_manifest`.
    ServerManifest = 9,
    /// What a stretch of WAL holds: commits, restore points, parameter changes.
    Index = 10,
    /// A message of a writer's event log.
    Event = 11,
    /// A beat of a lease.
    Lease = 12,
    /// The result of a verification or a drill.
    Verification = 13,
}

impl Kind {
    const ALL: [Kind; 13] = [
        Kind::Record,
        Kind::WalRange,
        Kind::WalTail,
        Kind::WalFile,
        Kind::History,
        Kind::Pack,
        Kind::FileTable,
        Kind::BlockTags,
        Kind::ServerManifest,
        Kind::Index,
        Kind::Event,
        Kind::Lease,
        Kind::Verification,
    ];

    fn from_code(code: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.code() == code)
    }

    pub(super) const fn code(self) -> u8 {
        self as u8
    }
}

/// How the frames of an object are compressed. A frame that does not shrink is stored under any codec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// Not at all.
    Stored = 0,
    /// One lz4 block per frame.
    Lz4 = 1,
}

impl Codec {
    fn from_code(code: u8) -> Option<Codec> {
        [Codec::Stored, Codec::Lz4].into_iter().find(|codec| *codec as u8 == code)
    }
}

/// What an object is bound to: it opens only where all of this is the same as when it was sealed.
#[derive(Debug, Clone, Copy)]
pub struct Binding<'a> {
    /// The repositories that share keys.
    pub realm: Id128,
    /// The one repository; only for what must not be copied to another: leases, events, verification results.
    pub repository: Option<Id128>,
    /// What the object is.
    pub kind: Kind,
    /// Its full key below the repository's root.
    pub name: &'a str,
}

/// The first [`Header::LEN`] bytes of an object, understood but not yet authenticated ([`super::Opener::new`] does that).
#[derive(Clone, PartialEq, Eq)]
pub struct Header {
    bytes: [u8; Header::LEN],
    codec: Codec,
    kind: Kind,
    key_id: Option<Id128>,
}

/// What a writer puts into a header.
pub(super) struct HeaderFields {
    pub codec: Codec,
    pub kind: Kind,
    /// The content key's id and the commitment to it.
    pub content: Option<(Id128, [u8; 16])>,
    pub meta_commitment: [u8; 16],
    pub binding_tag: [u8; 16],
    pub salt: [u8; 16],
}

impl Header {
    /// Bytes in a header.
    pub const LEN: usize = 96;

    /// Reads the start of an object; bytes beyond the header are not looked at.
    ///
    /// # Errors
    /// [`SealError::Cut`], [`SealError::NotSealed`], an unknown version, codec or kind, or a flipped bit.
    pub fn parse(bytes: &[u8]) -> Result<Header, SealError> {
        let magic_seen = bytes.len().min(MAGIC.len());
        if bytes.iter().zip(MAGIC.iter()).take(magic_seen).any(|(a, b)| a != b) {
            return Err(SealError::NotSealed);
        }
        let bytes: [u8; Header::LEN] = match bytes.first_chunk() {
            Some(header) => *header,
            None => return Err(SealError::Cut { part: Part::Header }),
        };
        let [.., version, codec, kind, flags] = field::<12>(&bytes, 0);
        // Version and checksum first: what a newer version put elsewhere must not be reported as damage.
        if version != VERSION {
            return Err(SealError::UnknownVersion { version });
        }
        if u32::from_le_bytes(field(&bytes, 12)) != checksum(&bytes) {
            return Err(SealError::Damaged { part: Part::Header, detail: "its checksum does not fit" });
        }
        let codec = Codec::from_code(codec).ok_or(SealError::UnknownCodec { codec })?;
        let kind = Kind::from_code(kind).ok_or(SealError::Unknown { what: "kind", number: u32::from(kind) })?;
        if flags & !FLAG_CONTENT_KEY != 0 {
            return Err(SealError::Unknown { what: "flags", number: u32::from(flags) });
        }
        let by_content_key = flags & FLAG_CONTENT_KEY != 0;
        let key_id = Id128::new(field(&bytes, 16));
        if !by_content_key && (field(&bytes, 16) != [0; 16] || field(&bytes, 48) != [0; 16]) {
            return Err(SealError::Damaged { part: Part::Header, detail: "it names a content key and needs none" });
        }
        Ok(Header { bytes, codec, kind, key_id: by_content_key.then_some(key_id) })
    }

    pub(super) fn build(fields: &HeaderFields) -> Header {
        let mut bytes = [0; Header::LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8] = VERSION;
        bytes[9] = fields.codec as u8;
        bytes[10] = fields.kind.code();
        if let Some((id, commitment)) = &fields.content {
            bytes[11] = FLAG_CONTENT_KEY;
            bytes[16..32].copy_from_slice(id.as_bytes());
            bytes[48..64].copy_from_slice(commitment);
        }
        bytes[32..48].copy_from_slice(&fields.meta_commitment);
        bytes[64..80].copy_from_slice(&fields.binding_tag);
        bytes[80..96].copy_from_slice(&fields.salt);
        let crc = checksum(&bytes);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        Header { bytes, codec: fields.codec, kind: fields.kind, key_id: fields.content.map(|(id, _)| id) }
    }

    /// The header as it stands in the object.
    pub fn as_bytes(&self) -> &[u8; Header::LEN] {
        &self.bytes
    }

    /// The same, to be sent.
    pub fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.bytes)
    }

    /// The content key that the frames need; `None`: they are sealed by the meta key.
    pub fn key_id(&self) -> Option<Id128> {
        self.key_id
    }

    /// The salt: random per object, so an object under our name with our salt is the one we sealed.
    pub fn salt(&self) -> [u8; 16] {
        field(&self.bytes, 80)
    }

    /// What the object says it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How compressed frames are compressed.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    pub(super) fn meta_commitment(&self) -> [u8; 16] {
        field(&self.bytes, 32)
    }

    pub(super) fn content_commitment(&self) -> [u8; 16] {
        field(&self.bytes, 48)
    }

    pub(super) fn binding_tag(&self) -> [u8; 16] {
        field(&self.bytes, 64)
    }
}

impl std::fmt::Debug for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Header")
            .field("kind", &self.kind)
            .field("codec", &self.codec)
            .field("key_id", &self.key_id)
            .field("salt", &Id128::new(self.salt()))
            .finish()
    }
}

/// `N` bytes of a header at `at`. Every caller passes constants below [`Header::LEN`].
fn field<const N: usize>(bytes: &[u8; Header::LEN], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]); // invariant: constants, `at + N <= 96`
    out
}

fn checksum(header: &[u8; Header::LEN]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[..12]), &header[16..])
}

/// The four bytes in front of a frame: bits 0 to 23 the sealed length, then flags. Authenticated with the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameHeader {
    /// Bytes that follow, with the tag.
    pub sealed_len: usize,
    /// Tails: the first frame of an append. When it was written, everything before it was durable.
    pub begins_append: bool,
    pub compressed: bool,
    pub last: bool,
}

impl FrameHeader {
    const LENGTH: u32 = (1 << 24) - 1;
    const BEGINS_APPEND: u32 = 1 << 29;
    const COMPRESSED: u32 = 1 << 30;
    const LAST: u32 = 1 << 31;

    pub fn to_bytes(self) -> [u8; FRAME_HEADER] {
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        let flags = flag(self.begins_append, Self::BEGINS_APPEND)
            | flag(self.compressed, Self::COMPRESSED)
            | flag(self.last, Self::LAST);
        (self.sealed_len as u32 & Self::LENGTH | flags).to_le_bytes() // sealed lengths stay below 2^21
    }

    /// `None`: no frame or prelude has such a header.
    pub fn parse(bytes: [u8; FRAME_HEADER]) -> Option<FrameHeader> {
        let number = u32::from_le_bytes(bytes);
        let sealed_len = (number & Self::LENGTH) as usize;
        let known = Self::LENGTH | Self::BEGINS_APPEND | Self::COMPRESSED | Self::LAST;
        let header = FrameHeader {
            sealed_len,
            begins_append: number & Self::BEGINS_APPEND != 0,
            compressed: number & Self::COMPRESSED != 0,
            last: number & Self::LAST != 0,
        };
        let least = if header.compressed { TAG + COMPRESSED_PREFIX } else { TAG };
        // A compressed frame is one that shrank, so the limit is the same for both.
        (number & !known == 0 && (least..=MAX_FRAME + TAG).contains(&sealed_len)).then_some(header)
    }

    /// Whether a prelude may have this header.
    pub fn fits_prelude(&self) -> bool {
        !self.compressed && !self.last && !self.begins_append && self.sealed_len <= MAX_EXTRA + TAG
    }
}

/// What a nonce is for. Its first byte; the counter follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum NonceType {
    Frame = 1,
    LastFrame = 2,
    Footer = 3,
    Prelude = 4,
}

pub(super) fn nonce(kind: NonceType, counter: u32) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[0] = kind as u8;
    nonce[4..8].copy_from_slice(&counter.to_le_bytes());
    nonce
}

/// Header and frame header: what a frame or a prelude is authenticated with.
pub(super) fn frame_aad(header: &Header, frame: [u8; FRAME_HEADER]) -> [u8; Header::LEN + FRAME_HEADER] {
    let mut aad = [0; Header::LEN + FRAME_HEADER];
    aad[..Header::LEN].copy_from_slice(header.as_bytes());
    aad[Header::LEN..].copy_from_slice(&frame);
    aad
}

/// Header and trailer: what a footer is authenticated with.
pub(super) fn footer_aad(header: &Header, trailer: [u8; TRAILER]) -> [u8; Header::LEN + TRAILER] {
    let mut aad = [0; Header::LEN + TRAILER];
    aad[..Header::LEN].copy_from_slice(header.as_bytes());
    aad[Header::LEN..].copy_from_slice(&trailer);
    aad
}

pub(super) fn trailer(sealed_footer_len: u32) -> [u8; TRAILER] {
    let mut trailer = [0; TRAILER];
    trailer[..4].copy_from_slice(&sealed_footer_len.to_le_bytes());
    trailer[4..].copy_from_slice(&TRAILER_MAGIC);
    trailer
}
