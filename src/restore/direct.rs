//! Large writes that go past the system's cache.
//!
//! What is restored is read once, later, and by somebody else; passing it through the cache costs more than everything else a
//! restore does (docs/decisions.md), and drives out what others on the host need. Small writes stay with the cache, which
//! joins them.
//!
//! What always holds: the same bytes are written as by a plain write, wherever the file system knows no such writes, too. A
//! failed write is told at once.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, pwrite};

/// Fewer bytes are left to the cache.
const FROM: usize = 256 << 10;
/// Places in file and memory are multiples of this, or of the page where that is larger.
const ALIGN: usize = 4 << 10;
/// Bytes that are moved to an aligned place at once.
const SCRATCH: usize = 1 << 20;

thread_local! {
    /// Memory that is touched for the first time costs more than the copy.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Writes all of `bytes` at `offset`. The file must not be open for others by the same description.
pub fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let align = rustix::param::page_size().max(ALIGN);
    let head = offset.next_multiple_of(align as u64) - offset; // less than a page
    let head = usize::try_from(head).unwrap_or(usize::MAX);
    let body = bytes.len().saturating_sub(head) / align * align;
    if body < FROM {
        return file.write_all_at(bytes, offset);
    }
    let (before, rest) = bytes.split_at(head); // invariant: body is not 0, so there is more than the head
    file.write_all_at(before, offset)?;
    let at = offset + head as u64;
    let done = past_the_cache(file, rest.get(..body).unwrap_or_default(), at, align)?;
    file.write_all_at(rest.get(done..).unwrap_or_default(), at + done as u64)
}

/// Writes what it can, and says how much that was: a multiple of `align`.
fn past_the_cache(file: &File, body: &[u8], at: u64, align: usize) -> io::Result<usize> {
    let Ok(flags) = fcntl_getfl(file) else { return Ok(0) };
    if fcntl_setfl(file, flags | OFlags::DIRECT).is_err() {
        return Ok(0);
    }
    let written = BUFFER.with_borrow_mut(|buffer| {
        let mut done = 0;
        while let Some(rest) = body.get(done..).filter(|rest| !rest.is_empty()) {
            let from = if rest.as_ptr().align_offset(align) == 0 { rest } else { aligned(buffer, rest, align) };
            match pwrite(file, from, at + done as u64) {
                Ok(len) if len > 0 && len % align == 0 => done += len,
                Err(Errno::INTR) => {}
                // Not here, or not so: the cache takes the rest. What was written in part is written again.
                Ok(_) | Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(done)
    });
    fcntl_setfl(file, flags)?;
    written
}

/// The first bytes of `rest`, at an aligned place.
fn aligned<'a>(buffer: &'a mut Vec<u8>, rest: &[u8], align: usize) -> &'a [u8] {
    buffer.resize(SCRATCH + align, 0);
    let skip = buffer.as_ptr().align_offset(align).min(align);
    let len = rest.len().min(SCRATCH);
    let place = buffer.get_mut(skip..skip + len).unwrap_or_default(); // invariant: it is longer by `align`
    place.copy_from_slice(rest.get(..place.len()).unwrap_or_default());
    place
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that differ from place to place.
    fn bytes(len: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Wherever it begins, in the file and in memory, and whatever is beside it.
        #[test]
        fn the_same_bytes_are_written_as_by_a_plain_write(
            writes in proptest::collection::vec(
                (prop_oneof![(0u64..200).prop_map(|page| page * 8192), 0u64..1 << 20], 0usize..1 << 20, 0usize..5000),
                1..4,
            ),
            seed: u64,
        ) {
            let (file, mut wanted) = (tempfile::tempfile().unwrap(), Vec::new());
            for (number, (offset, len, skip)) in writes.into_iter().enumerate() {
                let bytes = bytes(len + skip, seed ^ number as u64);
                write_all_at(&file, &bytes[skip..], offset).unwrap();
                if len > 0 {
                    let from = usize::try_from(offset).unwrap();
                    wanted.resize(wanted.len().max(from + len), 0);
                    wanted[from..from + len].copy_from_slice(&bytes[skip..]);
                }
                let mut found = vec![0; wanted.len()];
                prop_assert_eq!(file.metadata().unwrap().len(), wanted.len() as u64);
                file.read_exact_at(&mut found, 0).unwrap();
                prop_assert!(found == wanted);
            }
        }
    }

    #[test]
    fn a_write_that_fails_is_told() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let read_only = File::open(dir.path().join("file")).unwrap();
        assert!(write_all_at(&read_only, &bytes(1 << 20, 0), 0).is_err());
    }
}
