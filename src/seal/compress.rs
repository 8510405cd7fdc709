//! One frame to one lz4 block and back. The table (16 KiB) and the output buffer are kept per thread: making them anew
//! for each frame costs more than compressing a small one.

use std::cell::RefCell;

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use super::MAX_FRAME;
use super::format::{COMPRESSED_PREFIX, Codec};

struct Scratch {
    /// 16-bit entries: only for small frames, where clearing the larger table would show.
    small: CompressTable,
    large: CompressTable,
    out: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        small: CompressTable::small(),
        large: CompressTable::large(),
        out: Vec::new(),
    });
}

/// Calls `done` with what is to be sealed and whether it is compressed: the length of the plaintext and an lz4 block, or
/// the plaintext itself where that is not smaller.
pub(super) fn compressed<T>(codec: Codec, plaintext: &[u8], done: impl FnOnce(&[u8], bool) -> T) -> T {
    match codec {
        Codec::Stored => done(plaintext, false),
        Codec::Lz4 => SCRATCH.with_borrow_mut(|scratch| {
            let room = COMPRESSED_PREFIX + get_maximum_output_size(plaintext.len());
            if scratch.out.len() < room {
                scratch.out.resize(room, 0);
            }
            let table = if plaintext.len() < usize::from(u16::MAX) { &mut scratch.small } else { &mut scratch.large };
            let (prefix, block) = scratch.out.split_at_mut(COMPRESSED_PREFIX);
            prefix.copy_from_slice(&(plaintext.len() as u32).to_le_bytes()); // at most MAX_FRAME
            match compress_into_with_table(plaintext, block, table) {
                Ok(len) if COMPRESSED_PREFIX + len < plaintext.len() => {
                    done(scratch.out.get(..COMPRESSED_PREFIX + len).unwrap_or_default(), true)
                }
                _ => done(plaintext, false),
            }
        }),
    }
}

/// The plaintext of a compressed frame; `None` if it is not one of at most [`MAX_FRAME`] bytes.
pub(super) fn decompressed(codec: Codec, compressed: &[u8]) -> Option<Vec<u8>> {
    match codec {
        Codec::Stored => None,
        Codec::Lz4 => {
            let (prefix, block) = compressed.split_first_chunk::<COMPRESSED_PREFIX>()?;
            let len = usize::try_from(u32::from_le_bytes(*prefix)).ok().filter(|len| *len <= MAX_FRAME)?;
            let mut plaintext = vec![0; len];
            let written = decompress_into(block, &mut plaintext).ok()?;
            (written == len).then_some(plaintext)
        }
    }
}
