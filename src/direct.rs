//! Large writes that go past the system's cache.
//!
//! What a restore writes, and what lies in a repository, is read once, later, and by somebody else; passing it through the cache
//! can cost more than everything else on its way (docs/decisions.md), and drives out what others on the host need. Small writes
//! stay with the cache, which joins them.
//!
//! What always holds: the same bytes are written as by a plain write, wherever the file system knows no such writes, too. A
//! failed write is told at once. Durable they are after a sync, as after any write.
//! Crash, cancellation: as with a plain write, any part of the bytes may be there.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::io::IoSlice;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, pwrite, pwritev};

/// Fewer bytes are left to the cache.
const FROM: u64 = 512 << 10;
/// Places in file and memory are multiples of this, or of the page where that is larger.
const ALIGN: usize = 4 << 10;
/// Bytes that are written at once.
const SCRATCH: usize = 1 << 20;

thread_local! {
    /// What is written has to lie at an aligned place. Kept: memory that is touched for the first time costs more than the copy.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Writes all of `chunks`, one behind the other, at `offset`. Nobody else may use this description of the file meanwhile.
pub fn write_all_at<C: AsRef<[u8]>>(file: &File, chunks: &[C], offset: u64) -> io::Result<()> {
    let align = rustix::param::page_size().max(ALIGN);
    let len: u64 = chunks.iter().map(|chunk| chunk.as_ref().len() as u64).sum();
    let done = if len >= FROM && offset.is_multiple_of(align as u64) {
        past_the_cache(file, chunks, offset, align)?
    } else {
        0
    };
    through_the_cache(file, chunks, done, offset)
}

/// Writes what it can, and says how much that was.
fn past_the_cache<C: AsRef<[u8]>>(file: &File, chunks: &[C], offset: u64, align: usize) -> io::Result<u64> {
    let Ok(flags) = fcntl_getfl(file) else { return Ok(0) };
    if fcntl_setfl(file, flags | OFlags::DIRECT).is_err() {
        return Ok(0);
    }
    let written = BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(SCRATCH + align, 0);
        let skip = buffer.as_ptr().align_offset(align).min(align);
        let place = buffer.get_mut(skip..skip + SCRATCH).unwrap_or_default(); // invariant: it is longer by `align`
        let (mut done, mut filled) = (0, 0);
        for mut rest in chunks.iter().map(AsRef::as_ref) {
            while !rest.is_empty() {
                let room = place.get_mut(filled..).unwrap_or_default();
                let (now, later) = rest.split_at(rest.len().min(room.len()));
                room.get_mut(..now.len()).unwrap_or_default().copy_from_slice(now);
                (filled, rest) = (filled + now.len(), later);
                if filled == SCRATCH {
                    if !is_written(file, place, offset + done)? {
                        return Ok(done);
                    }
                    (done, filled) = (done + SCRATCH as u64, 0);
                }
            }
        }
        // What is behind the last whole page goes the other way.
        let last = place.get(..filled / align * align).unwrap_or_default();
        Ok(if !last.is_empty() && is_written(file, last, offset + done)? { done + last.len() as u64 } else { done })
    });
    fcntl_setfl(file, flags)?;
    written
}

/// Writes all of `bytes`; `false`: not here, or not so.
fn is_written(file: &File, bytes: &[u8], at: u64) -> io::Result<bool> {
    loop {
        match pwrite(file, bytes, at) {
            Ok(len) => return Ok(len == bytes.len()),
            Err(Errno::INTR) => {}
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::AGAIN) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Writes all but the first `done` bytes.
fn through_the_cache<C: AsRef<[u8]>>(file: &File, chunks: &[C], done: u64, mut offset: u64) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = chunks.iter().map(|chunk| IoSlice::new(chunk.as_ref())).collect();
    let mut rest = &mut slices[..];
    // Also drops empty ones at the front.
    IoSlice::advance_slices(&mut rest, usize::try_from(done).unwrap_or(usize::MAX)); // invariant: they are in memory
    offset += done;
    while !rest.is_empty() {
        let batch = rest.get(..rest.len().min(512)).unwrap_or_default(); // IOV_MAX is 1024
        match pwritev(file, batch, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as u64;
                IoSlice::advance_slices(&mut rest, written);
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

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
                (
                    prop_oneof![4 => (0u64..200).prop_map(|page| page * 8192), 1 => 0u64..1 << 20],
                    prop_oneof![0usize..3 << 20, (0usize..300).prop_map(|page| page * 8192)],
                    proptest::collection::vec(0usize..1 << 20, 0..5),
                ),
                1..4,
            ),
            seed: u64,
        ) {
            let (file, mut wanted) = (tempfile::tempfile().unwrap(), Vec::new());
            for (number, (offset, len, mut cuts)) in writes.into_iter().enumerate() {
                let bytes = bytes(len, seed ^ number as u64);
                cuts.retain(|cut| *cut <= len);
                cuts.extend([0, len]);
                cuts.sort_unstable();
                let chunks: Vec<&[u8]> = cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]).collect();
                write_all_at(&file, &chunks, offset).unwrap();
                if len > 0 {
                    let from = usize::try_from(offset).unwrap();
                    wanted.resize(wanted.len().max(from + len), 0);
                    wanted[from..from + len].copy_from_slice(&bytes);
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
        assert!(write_all_at(&read_only, &[bytes(1 << 20, 0)], 0).is_err());
    }
}
