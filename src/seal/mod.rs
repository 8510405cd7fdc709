//! Plaintext to sealed object and back: format version 1, specified byte by byte in `docs/format.md`.
//!
//! Knows no store, no WAL and no clock: bytes go in, bytes come out.
//!
//! What always holds:
//! - Nothing leaves here readable. Every byte of an object is authenticated together with its realm, its kind and its
//!   full name, so an object that was renamed, swapped, altered, reordered or cut short does not open (promise P4).
//! - Every object has keys of its own, derived from a random salt; under one key no nonce is used twice
//!   ([`ObjectSealer`] refuses to seal a frame's number a second time).
//! - Lengths that were read are checked against a limit before anything is allocated; no input makes a reader panic.
//! - Secrets are wiped when dropped and appear in no `Debug`, error or log.
//!
//! Crash: nothing here is on disk. What a crash leaves of a tail that was being appended to, [`open_tail`] sorts out.
//!
//! The pieces: [`ObjectSealer`] seals frames in any order and in parallel, [`SequentialSealer`] is it for a stream,
//! [`seal_whole`] for bytes in memory. [`Opener`] opens frames by range, [`open_whole`] an object in memory, [`open_tail`] the
//! open segment's file. [`KeyFile`] is what the operator keeps; it wraps and unwraps the [`ContentKey`]s.

mod compress;
mod envelope;
mod error;
mod format;
mod key_file;
mod keys;
mod opener;
mod random;
mod recipient;
mod sealer;
mod sheet;
mod tags;
mod tail;
#[cfg(test)]
mod tests;

pub use error::{KeyRole, Part, SealError};
pub use format::{Binding, Codec, Header, Kind};
pub use key_file::KeyFile;
pub use keys::{ContentKey, FrameKey, MetaKey};
pub use opener::{Footer, Opener, Span, open_whole};
#[cfg(test)]
pub(crate) use random::SEED;
pub(crate) use random::fill as fill_randomly;
pub use recipient::Recipient;
pub use sealer::{FrameLengths, ObjectSealer, SequentialSealer, seal_whole};
pub use tags::{BlockTagger, TAGGED_AT_ONCE, TAGGED_BLOCK};
pub use tail::{OpenedFrames, TailContent, TailFrames, open_tail, peek_tail_prelude};

/// Most plaintext in a frame, in bytes. Every frame but the last of an object holds exactly this much (except in tails).
pub const MAX_FRAME: usize = 1 << 20;

/// Most frames in an object that has a footer: 64 GiB of plaintext, far above what the catalog puts into one.
pub const MAX_FRAMES: u32 = 1 << 16;

/// Most bytes that a kind may add to a footer or a prelude.
pub const MAX_EXTRA: usize = 256 << 10;
