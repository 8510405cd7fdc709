//! From files to packs: blocks in, extents and the packs' plaintext out. Pure.
//!
//! What always holds: a file's extents, in order of offset, do not overlap, do not cross a pack, and hold every byte of it
//! that is not zero; blocks of zeros are in none; neighbours that follow each other in file and pack are one extent. A
//! pack holds at most what [`Cutter::new`] was told, and is never empty.

use std::collections::VecDeque;

use crate::catalog::layout::PackName;
use crate::catalog::table::Extent;
use crate::seal::{BlockTagger, TAGGED_AT_ONCE, TAGGED_BLOCK};
use crate::types::BackupLabel;

/// What files are compared and stored by; a file's last block may be shorter.
pub const BLOCK: usize = TAGGED_BLOCK;

/// The tag of a block of zeros, which nothing else has.
pub const ZERO_TAG: [u8; 16] = [0; 16];

/// A part of a pack's plaintext. Parts of a pack come one after the other.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The pack's number.
    pub pack: u32,
    /// The bytes; never empty.
    pub bytes: Vec<u8>,
    /// The pack is complete with this one.
    pub ends_pack: bool,
}

/// A file after its last byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutFile {
    /// Bytes.
    pub size: u64,
    /// CRC-32C of all of them.
    pub crc32c: u32,
    /// Where they are.
    pub extents: Vec<Extent>,
}

/// Cuts files into blocks and lays those that are not zeros one after the other into packs.
#[derive(Debug)]
pub struct Cutter {
    label: BackupLabel,
    tagger: BlockTagger,
    pack_bytes: u64,
    chunk_bytes: usize,
    pack: u32,
    /// Plaintext in the current pack so far.
    at: u64,
    /// Its end, not given out yet.
    chunk: Vec<u8>,
    ready: VecDeque<Chunk>,
    spare: Vec<Vec<u8>>,
    file: File,
}

#[derive(Debug, Default)]
struct File {
    /// Whole blocks so far, in bytes.
    offset: u64,
    /// The begin of the next block.
    partial: Vec<u8>,
    crc: u32,
    extents: Vec<Extent>,
    tags: Vec<u8>,
    /// Whole blocks whose tags are zeros as yet: where the tag goes in `tags`, and where the block begins in the chunk.
    untagged: Vec<(usize, usize)>,
}

impl Cutter {
    /// For a backup that is called `label`: packs of at most `pack_bytes`, given out in chunks of `chunk_bytes`. Both are
    /// at least a block.
    pub fn new(label: BackupLabel, tagger: BlockTagger, pack_bytes: u64, chunk_bytes: usize) -> Cutter {
        Cutter {
            label,
            tagger,
            pack_bytes: pack_bytes.max(BLOCK as u64),
            chunk_bytes: chunk_bytes.max(BLOCK),
            pack: 1,
            at: 0,
            chunk: Vec::new(),
            ready: VecDeque::new(),
            spare: Vec::new(),
            file: File::default(),
        }
    }

    /// The next bytes of the file, however they are sliced. Take the chunks that are ready before pushing more.
    pub fn push(&mut self, mut bytes: &[u8]) {
        self.file.crc = crc32c::crc32c_append(self.file.crc, bytes);
        if !self.file.partial.is_empty() {
            let (begin, rest) = bytes.split_at(bytes.len().min(BLOCK - self.file.partial.len()));
            self.file.partial.extend_from_slice(begin);
            bytes = rest;
            if self.file.partial.len() < BLOCK {
                return;
            }
            let mut block = std::mem::take(&mut self.file.partial);
            self.block(&block);
            block.clear();
            self.file.partial = block; // its room is used again
        }
        let blocks = bytes.chunks_exact(BLOCK);
        let rest = blocks.remainder();
        blocks.for_each(|block| self.block(block));
        self.file.partial.extend_from_slice(rest);
    }

    /// Bytes of the file so far.
    pub fn file_len(&self) -> u64 {
        self.file.offset + self.file.partial.len() as u64
    }

    /// The tags of the file's blocks since the last call, 16 bytes each. After [`Cutter::end_file`] call it once more
    /// before the next file begins.
    pub fn take_tags(&mut self) -> Vec<u8> {
        self.tag_waiting();
        std::mem::take(&mut self.file.tags)
    }

    /// Bytes that [`Cutter::take_tags`] would give.
    pub fn tags_len(&self) -> usize {
        self.file.tags.len()
    }

    /// Ends the file; the next byte is another's.
    pub fn end_file(&mut self) -> CutFile {
        if !self.file.partial.is_empty() {
            let mut block = std::mem::take(&mut self.file.partial);
            self.block(&block);
            block.clear();
            self.file.partial = block;
        }
        let file = &mut self.file;
        let cut = CutFile { size: file.offset, crc32c: file.crc, extents: std::mem::take(&mut file.extents) };
        (file.offset, file.crc) = (0, 0);
        cut
    }

    /// Ends the last pack; nothing may be pushed after it.
    pub fn finish(&mut self) {
        if !self.chunk.is_empty() {
            self.give_out(true);
        }
    }

    /// The next part of a pack that is ready.
    pub fn take_chunk(&mut self) -> Option<Chunk> {
        self.ready.pop_front()
    }

    /// Gives a chunk's room back, to be used again.
    pub fn recycle(&mut self, mut room: Vec<u8>) {
        room.clear();
        self.spare.push(room);
    }

    fn block(&mut self, block: &[u8]) {
        let slot = self.file.tags.len();
        self.file.tags.extend_from_slice(&ZERO_TAG);
        if !is_zero(block) {
            self.store(block);
            // A block at the chunk's end waits there for others: tagging many at once is faster.
            match self.chunk.len().checked_sub(block.len()) {
                Some(at) if block.len() == BLOCK => self.file.untagged.push((slot, at)),
                _ => set_tag(&mut self.file.tags, slot, self.tagger.tag(block)),
            }
            if self.file.untagged.len() >= TAGGED_AT_ONCE {
                self.tag_waiting();
            }
        }
        self.file.offset += block.len() as u64;
    }

    /// Tags the blocks that wait for it in the chunk.
    fn tag_waiting(&mut self) {
        let File { untagged, tags, .. } = &mut self.file;
        let block =
            |at: usize| self.chunk.get(at..).and_then(|rest| rest.first_chunk::<BLOCK>()).unwrap_or(&[0; BLOCK]); // invariant: it lies there
        if let Ok(whole) = <[(usize, usize); TAGGED_AT_ONCE]>::try_from(untagged.as_slice()) {
            let found = self.tagger.tag_many(whole.map(|(_, at)| block(at)));
            whole.iter().zip(found).for_each(|((slot, _), tag)| set_tag(tags, *slot, tag));
        } else {
            untagged.iter().for_each(|(slot, at)| set_tag(tags, *slot, self.tagger.tag(block(*at))));
        }
        untagged.clear();
    }

    fn store(&mut self, block: &[u8]) {
        let len = block.len() as u64;
        if self.at + len > self.pack_bytes {
            self.give_out(true);
            self.pack += 1;
            self.at = 0;
        }
        let follows = |last: &&mut Extent| {
            last.pack.number == self.pack && last.offset + last.len == self.file.offset && last.at + last.len == self.at
        };
        match self.file.extents.last_mut().filter(follows) {
            Some(last) => last.len += len,
            None => {
                let pack = PackName { label: self.label, number: self.pack };
                self.file.extents.push(Extent { offset: self.file.offset, len, pack, at: self.at });
            }
        }
        self.at += len;
        let mut rest = block;
        while !rest.is_empty() {
            // A full chunk waits for the next byte: only that tells that it is not the pack's last.
            if self.chunk.len() == self.chunk_bytes {
                self.give_out(false);
            }
            if self.chunk.capacity() == 0 {
                self.chunk = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(self.chunk_bytes));
            }
            let (fits, more) = rest.split_at(rest.len().min(self.chunk_bytes - self.chunk.len()));
            self.chunk.extend_from_slice(fits);
            rest = more;
        }
    }

    fn give_out(&mut self, ends_pack: bool) {
        self.tag_waiting();
        let bytes = std::mem::take(&mut self.chunk);
        self.ready.push_back(Chunk { pack: self.pack, bytes, ends_pack });
    }
}

fn set_tag(tags: &mut [u8], slot: usize, tag: [u8; 16]) {
    if let Some(place) = tags.get_mut(slot..slot + tag.len()) {
        place.copy_from_slice(&tag); // invariant: the slot was made for it
    }
}

/// Few blocks that are not zeros begin with zeros, so the first word decides almost always.
fn is_zero(block: &[u8]) -> bool {
    let (words, rest) = block.as_chunks::<64>();
    words.iter().all(|word| word.iter().fold(0, |any, byte| any | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::seal::KeyFile;
    use crate::types::Id128;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn tagger() -> BlockTagger {
        let key = KeyFile::generate().unwrap();
        BlockTagger::new(key.meta_key(), Id128::new([1; 16]))
    }

    fn label() -> BackupLabel {
        "20261120T031500Z".parse().unwrap()
    }

    /// A file as runs of one byte each, which may be 0: (byte, length).
    fn a_file() -> impl Strategy<Value = Vec<u8>> {
        vec((prop_oneof![Just(0u8), any::<u8>()], 1usize..3 * BLOCK), 0..6)
            .prop_map(|runs| runs.into_iter().flat_map(|(byte, len)| std::iter::repeat_n(byte, len)).collect())
    }

    fn drain(cutter: &mut Cutter, packs: &mut BTreeMap<u32, Vec<u8>>, ended: &mut Vec<u32>) {
        while let Some(chunk) = cutter.take_chunk() {
            assert!(!chunk.bytes.is_empty() && !ended.contains(&chunk.pack));
            packs.entry(chunk.pack).or_default().extend_from_slice(&chunk.bytes);
            if chunk.ends_pack {
                ended.push(chunk.pack);
            }
            cutter.recycle(chunk.bytes);
        }
    }

    proptest! {
        /// However the stream is sliced: files come back, zeros are not stored, extents are few and stay in their pack.
        #[test]
        fn extents_and_packs_give_the_files_back(
            files in vec(a_file(), 0..6),
            slice in 1usize..40_000,
            pack_blocks in 1u64..9,
            chunk_bytes in BLOCK..3 * BLOCK,
        ) {
            let pack_bytes = pack_blocks * BLOCK as u64 + 100;
            let tagger = tagger();
            let mut cutter = Cutter::new(label(), tagger.clone(), pack_bytes, chunk_bytes);
            let (mut packs, mut ended, mut cut) = (BTreeMap::new(), Vec::new(), Vec::new());
            for file in &files {
                let mut tags = Vec::new();
                for piece in file.chunks(slice) {
                    cutter.push(piece);
                    tags.extend(cutter.take_tags());
                    drain(&mut cutter, &mut packs, &mut ended);
                }
                prop_assert_eq!(cutter.file_len(), file.len() as u64);
                cut.push(cutter.end_file());
                tags.extend(cutter.take_tags());
                let want: Vec<u8> = file
                    .chunks(BLOCK)
                    .flat_map(|block| if block.iter().all(|b| *b == 0) { ZERO_TAG } else { tagger.tag(block) })
                    .collect();
                prop_assert_eq!(tags, want);
            }
            cutter.finish();
            drain(&mut cutter, &mut packs, &mut ended);
            prop_assert_eq!(&ended, &packs.keys().copied().collect::<Vec<_>>());
            prop_assert!(packs.values().all(|pack| !pack.is_empty() && pack.len() as u64 <= pack_bytes));
            let mut stored = 0;
            for (file, cut) in files.iter().zip(&cut) {
                prop_assert_eq!((cut.size, cut.crc32c), (file.len() as u64, crc32c::crc32c(file)));
                let mut back = vec![0; file.len()];
                let mut end = None;
                for extent in &cut.extents {
                    let at = extent.offset as usize..(extent.offset + extent.len) as usize;
                    let from = extent.at as usize..(extent.at + extent.len) as usize;
                    prop_assert!(end.is_none_or(|(offset, _)| offset <= extent.offset));
                    // What follows in file and pack was merged.
                    prop_assert!(end != Some((extent.offset, (extent.pack.number, extent.at))));
                    end = Some((at.end as u64, (extent.pack.number, from.end as u64)));
                    back[at].copy_from_slice(&packs[&extent.pack.number][from]);
                    stored += extent.len;
                }
                prop_assert_eq!(&back, file);
            }
            let not_zero = |block: &&[u8]| block.iter().any(|byte| *byte != 0);
            let want: usize =
                files.iter().flat_map(|file| file.chunks(BLOCK)).filter(not_zero).map(<[u8]>::len).sum();
            prop_assert_eq!(stored, want as u64);
            prop_assert_eq!(packs.values().map(|pack| pack.len() as u64).sum::<u64>(), stored);
        }
    }

    #[test]
    fn a_block_is_zero_only_if_every_byte_is() {
        let mut block = vec![0; BLOCK];
        assert!(is_zero(&block) && is_zero(&[]) && is_zero(&block[..77]));
        for at in [0, 1, 63, 64, 4095, BLOCK - 1] {
            block[at] = 1;
            assert!(!is_zero(&block), "{at}");
            block[at] = 0;
        }
        assert!(!is_zero(&[0, 0, 1]));
    }
}
