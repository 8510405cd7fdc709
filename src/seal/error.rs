use std::fmt;

use crate::types::Id128;

/// Which of the two keys an object needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyRole {
    /// Seals footers, preludes and records.
    Meta,
    /// Seals the frames of data.
    Content,
}

impl fmt::Display for KeyRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KeyRole::Meta => "meta key",
            KeyRole::Content => "content key",
        })
    }
}

/// Which part of an object is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The first 96 bytes.
    Header,
    /// The note at the start of a tail.
    Prelude,
    /// A frame, counted from 0.
    Frame(u32),
    /// The index of the frames at the object's end.
    Footer,
    /// The last eight bytes, which say how long the footer is.
    Trailer,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Header => f.write_str("header"),
            Part::Prelude => f.write_str("prelude"),
            Part::Frame(index) => write!(f, "frame {index}"),
            Part::Footer => f.write_str("footer"),
            Part::Trailer => f.write_str("trailer"),
        }
    }
}

/// Why bytes could not be sealed or opened.
///
/// These messages speak of "the object": only the caller knows where the bytes came from, and names it in front.
/// No variant carries a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// The bytes do not begin as a sealed object begins.
    #[error("the object was not written by pgkeep\nhint: does something else write below the repository's root?")]
    NotSealed,
    /// Written by a newer pgkeep.
    #[error("the object has format version {version}; this pgkeep reads version 1\nhint: use a newer pgkeep")]
    UnknownVersion {
        /// What the header says.
        version: u8,
    },
    /// A compression that this version does not know.
    #[error(
        "the object is compressed by a method (number {codec}) that this pgkeep does not know\nhint: use a newer pgkeep"
    )]
    UnknownCodec {
        /// What the header says.
        codec: u8,
    },
    /// A kind, a flag or a purpose that this version does not know.
    #[error("the object has {what} {number}, which this pgkeep does not know\nhint: use a newer pgkeep")]
    Unknown {
        /// `kind`, `flags`, …
        what: &'static str,
        /// What the bytes say.
        number: u32,
    },
    /// The commitment in the header is to another key: nothing is wrong with the object.
    #[error(
        "the object was sealed under another {role} than the one given\nhint: is this the key file of this repository?"
    )]
    WrongKey {
        /// Which key did not fit.
        role: KeyRole,
    },
    /// The frames need a content key, and none was given (a host that may only write has none).
    #[error("the object's data needs content key {key_id}, which was not given")]
    NeedContentKey {
        /// The key's name: the object `keys/<id>`.
        key_id: Id128,
    },
    /// The key is right, the object is intact as far as its header goes, but it is another one.
    #[error(
        "the object is not {expected}: it was sealed under another name, kind, realm or repository\nhint: was it renamed or copied from elsewhere?"
    )]
    NotThisObject {
        /// The name it should have been sealed under.
        expected: String,
    },
    /// The object ends before it says.
    #[error("the object is cut short: its {part} is missing or incomplete")]
    Cut {
        /// The first part that is not whole.
        part: Part,
    },
    /// Authentication failed, or what it authenticated makes no sense.
    #[error("the object is damaged or was altered: its {part} does not open ({detail})")]
    Damaged {
        /// The part that did not open.
        part: Part,
        /// What was seen.
        detail: &'static str,
    },
    /// Not a fault: the end of the object that was handed in does not hold the whole footer.
    #[error("the last {bytes} bytes of the object are needed to read its footer")]
    NeedMore {
        /// How many bytes of the object's end are enough.
        bytes: u64,
    },
    /// A caller asked for more than the format holds.
    #[error("{what} of {len} bytes is more than the {limit} that the format allows")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// How large it is.
        len: u64,
        /// How large it may be.
        limit: u64,
    },
    /// A caller sealed the same number twice, which would give away plaintext.
    #[error("{part} of this object was sealed already; sealing it again under the same key is refused")]
    SealedTwice {
        /// The part.
        part: Part,
    },
    /// Frames handed to a footer are not the frames of an object.
    #[error("the frames of the object are not complete: {detail}")]
    Incomplete {
        /// What is missing.
        detail: &'static str,
    },
    /// The operating system gave no random bytes.
    #[error("the operating system gave no random bytes")]
    NoRandomness,
    /// A key object (`keys/<id>`) that was altered, planted or is for another realm or name.
    #[error(
        "the envelope of key {key_id} is not genuine: {detail}\nhint: was it altered, renamed or copied from another repository?"
    )]
    Envelope {
        /// The name it was read under.
        key_id: Id128,
        /// What was seen.
        detail: &'static str,
    },
    /// The envelope is genuine and is not for the identity of this key file.
    #[error(
        "the envelope of key {key_id} was made for other recipients than this key file\nhint: `pgkeep key list` shows for whom; who opens it can add this one (`pgkeep key add-recipient`)"
    )]
    NotARecipient {
        /// The key that stays closed.
        key_id: Id128,
    },
    /// This key file can only write.
    #[error(
        "this key file can write and cannot read data: it holds no age secret key\nhint: restore with the key file that was made beside it"
    )]
    WriteOnly,
    /// The text of a key file is not what it should be. Never repeats what the line holds.
    #[error("key file{}: {problem}", line.map(|line| format!(", line {line}")).unwrap_or_default())]
    KeyFile {
        /// Counted from 1; `None` when it is about the whole file.
        line: Option<usize>,
        /// What is wrong and what to do.
        problem: &'static str,
    },
    /// The key file is encrypted and no passphrase was given.
    #[error("the key file is protected by a passphrase, and none was given\nhint: set passphrase_file")]
    NeedPassphrase,
    /// The passphrase does not open the key file.
    #[error("the passphrase does not open the key file")]
    WrongPassphrase,
}

impl SealError {
    /// Whether the same call may succeed later. No `_` arm: whoever adds a variant decides here.
    pub fn is_retryable(&self) -> bool {
        match self {
            SealError::NoRandomness => true,
            SealError::NotSealed
            | SealError::UnknownVersion { .. }
            | SealError::UnknownCodec { .. }
            | SealError::Unknown { .. }
            | SealError::WrongKey { .. }
            | SealError::NeedContentKey { .. }
            | SealError::NotThisObject { .. }
            | SealError::Cut { .. }
            | SealError::Damaged { .. }
            | SealError::NeedMore { .. }
            | SealError::TooLarge { .. }
            | SealError::SealedTwice { .. }
            | SealError::Incomplete { .. }
            | SealError::Envelope { .. }
            | SealError::NotARecipient { .. }
            | SealError::WriteOnly
            | SealError::KeyFile { .. }
            | SealError::NeedPassphrase
            | SealError::WrongPassphrase => false,
        }
    }
}
