//! From files to packs: blocks in, extents and the packs' plaintext out. Pure.
//!
//! What always holds: a file's extents, in order of offset, do not overlap, do not cross a pack, and hold every byte of it
//! that is not zero; blocks of zeros are in none; neighbours that follow each other in file and pack are one extent. A
//! pack holds at most what [`Cutter::new`] was told, and is never empty.
//!
//! A block whose tag is the one that the parent has for the same block of the same file is not laid into a pack: its
//! extent names the pack in which the parent has it. Everything else is stored, also whatever of the parent is not known.

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
    /// What became of its bytes.
    pub counts: Counts,
    /// Every block has the tag that the parent has for it: if the parent's file is as long, it is this file.
    pub same: bool,
}

/// What became of bytes that are not zeros.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// The parent does not have them: stored.
    pub new: u64,
    /// The parent has them, in packs that are to become empty: stored.
    pub again: u64,
    /// The parent has them: not stored.
    pub referenced: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.new += other.new;
        self.again += other.again;
        self.referenced += other.referenced;
    }
}

/// Bytes of a file that the parent has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownExtent {
    /// Where.
    pub extent: Extent,
    /// They are stored again all the same.
    pub again: bool,
}

/// What the parent has of the file that arrives.
#[derive(Debug)]
struct Known {
    /// By offset.
    extents: Vec<KnownExtent>,
    /// Those before it lie behind us.
    at: usize,
    /// Tags of the blocks that come next: number of the first, and 16 bytes each.
    tags: VecDeque<(u64, Vec<u8>)>,
}

impl Known {
    fn tag(&self, block: u64) -> Option<[u8; 16]> {
        self.tags.iter().find_map(|(first, tags)| {
            let index = usize::try_from(block.checked_sub(*first)?).ok()?;
            tags.as_chunks::<16>().0.get(index).copied()
        })
    }

    /// Where the bytes lie; those asked for come in order.
    fn place(&mut self, offset: u64, len: u64) -> Option<KnownExtent> {
        while self.extents.get(self.at).is_some_and(|known| known.extent.offset + known.extent.len <= offset) {
            self.at += 1;
        }
        let KnownExtent { extent, again } = *self.extents.get(self.at)?;
        let skip = offset.checked_sub(extent.offset)?;
        let holds = skip + len <= extent.len;
        holds.then_some(KnownExtent { extent: Extent { offset, len, pack: extent.pack, at: extent.at + skip }, again })
    }
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
    known: Option<Known>,
    /// With a parent: whole blocks that wait to be compared, and of each where its tag goes in `tags`, and its offset.
    waiting: Vec<u8>,
    waits: Vec<(usize, u64)>,
    counts: Counts,
    /// A block was not as the parent has it, or it is not known.
    differs: bool,
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

    /// A file begins of which the parent has these bytes, by offset. Bring its tags before the blocks that they are of.
    /// A file that begins without this is stored whole.
    pub fn known(&mut self, extents: Vec<KnownExtent>) {
        self.file.known = Some(Known { extents, at: 0, tags: VecDeque::new() });
    }

    /// The parent's tags of the file's blocks from `first` on, 16 bytes each.
    pub fn known_tags(&mut self, first: u64, tags: Vec<u8>) {
        let next = self.file.waits.first().map_or(self.file.offset, |(_, offset)| *offset) / BLOCK as u64;
        if let Some(known) = &mut self.file.known {
            known.tags.retain(|(first, tags)| first + (tags.len() / ZERO_TAG.len()) as u64 > next);
            known.tags.push_back((first, tags));
        }
    }

    /// From here on nothing is known of the parent.
    pub fn forget(&mut self) {
        self.compare_waiting();
        (self.file.known, self.file.differs) = (None, true);
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
        self.compare_waiting();
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
        self.compare_waiting();
        let file = &mut self.file;
        let (known, differs) = (file.known.take(), std::mem::take(&mut file.differs));
        let same = known.is_some() && !differs;
        let (extents, counts) = (std::mem::take(&mut file.extents), std::mem::take(&mut file.counts));
        let cut = CutFile { size: file.offset, crc32c: file.crc, extents, counts, same };
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
        let (slot, offset) = (self.file.tags.len(), self.file.offset);
        self.file.tags.extend_from_slice(&ZERO_TAG);
        self.file.offset += block.len() as u64;
        match &self.file.known {
            known if is_zero(block) => {
                let same = known.as_ref().is_some_and(|known| known.tag(offset / BLOCK as u64) == Some(ZERO_TAG));
                self.file.differs |= !same;
            }
            Some(_) if block.len() == BLOCK => {
                self.file.waiting.extend_from_slice(block);
                self.file.waits.push((slot, offset));
                if self.file.waits.len() >= TAGGED_AT_ONCE {
                    self.compare_waiting();
                }
            }
            Some(_) => {
                self.compare_waiting();
                let tag = self.tagger.tag(block);
                set_tag(&mut self.file.tags, slot, tag);
                self.compared(offset, block, tag);
            }
            None => {
                self.file.counts.new += block.len() as u64;
                self.store(offset, block);
                // A block at the chunk's end waits there for others: tagging many at once is faster.
                match self.chunk.len().checked_sub(block.len()) {
                    Some(at) if block.len() == BLOCK => self.file.untagged.push((slot, at)),
                    _ => set_tag(&mut self.file.tags, slot, self.tagger.tag(block)),
                }
                if self.file.untagged.len() >= TAGGED_AT_ONCE {
                    self.tag_waiting();
                }
            }
        }
    }

    /// Tags the blocks that wait to be compared, and compares them.
    fn compare_waiting(&mut self) {
        if self.file.waits.is_empty() {
            return;
        }
        let (mut waiting, mut waits) = (std::mem::take(&mut self.file.waiting), std::mem::take(&mut self.file.waits));
        let blocks = waiting.as_chunks::<BLOCK>().0;
        let mut tags = [ZERO_TAG; TAGGED_AT_ONCE];
        match <&[[u8; BLOCK]; TAGGED_AT_ONCE]>::try_from(blocks) {
            Ok(whole) => tags = self.tagger.tag_many(whole.each_ref()),
            Err(_) => tags.iter_mut().zip(blocks).for_each(|(tag, block)| *tag = self.tagger.tag(block)),
        }
        for (((slot, offset), block), tag) in waits.iter().zip(blocks).zip(tags) {
            set_tag(&mut self.file.tags, *slot, tag);
            self.compared(*offset, block, tag);
        }
        waiting.clear();
        waits.clear();
        (self.file.waiting, self.file.waits) = (waiting, waits); // their room is used again
    }

    /// A block of this tag: referenced, if the parent has it, or stored.
    fn compared(&mut self, offset: u64, block: &[u8], tag: [u8; 16]) {
        let len = block.len() as u64;
        let known = match &mut self.file.known {
            Some(known) if known.tag(offset / BLOCK as u64) == Some(tag) => known.place(offset, len),
            _ => {
                self.file.differs = true;
                None
            }
        };
        match known {
            Some(KnownExtent { extent, again: false }) => {
                self.file.counts.referenced += len;
                self.lies(extent);
                return;
            }
            Some(_) => self.file.counts.again += len,
            None => self.file.counts.new += len,
        }
        self.store(offset, block);
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

    /// The next bytes of the file that are not zeros lie there.
    fn lies(&mut self, next: Extent) {
        let follows = |last: &&mut Extent| {
            last.pack == next.pack && last.offset + last.len == next.offset && last.at + last.len == next.at
        };
        match self.file.extents.last_mut().filter(follows) {
            Some(last) => last.len += next.len,
            None => self.file.extents.push(next),
        }
    }

    fn store(&mut self, offset: u64, block: &[u8]) {
        let len = block.len() as u64;
        if self.at + len > self.pack_bytes {
            self.give_out(true);
            self.pack += 1;
            self.at = 0;
        }
        let pack = PackName { label: self.label, number: self.pack };
        self.lies(Extent { offset, len, pack, at: self.at });
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

    /// A parent, by the tags that it has and the extents in its packs.
    struct Parent {
        tags: Vec<u8>,
        extents: Vec<Extent>,
        packs: BTreeMap<u32, Vec<u8>>,
    }

    fn parent_of(file: &[u8], pack_bytes: u64, tagger: &BlockTagger) -> Parent {
        let mut cutter = Cutter::new(label(), tagger.clone(), pack_bytes, BLOCK);
        let (mut packs, mut ended) = (BTreeMap::new(), Vec::new());
        cutter.push(file);
        let extents = cutter.end_file().extents;
        let tags = cutter.take_tags();
        cutter.finish();
        drain(&mut cutter, &mut packs, &mut ended);
        Parent { tags, extents, packs }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// Against any parent, known as far as it is: the file comes back from both, only blocks that are equal are
        /// referenced, and only from packs that are to stay.
        #[test]
        fn what_the_parent_has_is_referenced(
            before in a_file(),
            changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            (grown, shrunk) in (0usize..3 * BLOCK, 0usize..3 * BLOCK),
            (slice, at_a_time) in (1usize..40_000, 1usize..5),
            (pack_blocks, again, gone) in (1u64..9, any::<u32>(), any::<u32>()),
            forgets in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let tagger = tagger();
            let parent = parent_of(&before, pack_blocks * BLOCK as u64, &tagger);
            let mut after = before.clone();
            for (at, byte) in &changes {
                if !after.is_empty() {
                    let at = at.index(after.len());
                    after[at] = *byte;
                }
            }
            after.extend(std::iter::repeat_n(7, grown));
            after.truncate(after.len().saturating_sub(shrunk));
            let in_set = |set: u32, pack: u32| set >> (pack % 32) & 1 == 1;
            let known = parent.extents.iter().filter(|extent| !in_set(gone, extent.pack.number));
            let known = known.map(|extent| KnownExtent { extent: *extent, again: in_set(again, extent.pack.number) });

            let own: BackupLabel = "20261121T031500Z".parse().unwrap();
            let mut cutter = Cutter::new(own, tagger.clone(), 3 * BLOCK as u64, BLOCK);
            let (mut packs, mut ended, mut tags) = (BTreeMap::new(), Vec::new(), Vec::new());
            cutter.known(known.clone().collect());
            let (mut brought, mut forgotten) = (0, false);
            let forgets_at = forgets.map(|at| at.index(after.len() + 1)).unwrap_or(usize::MAX);
            for piece in after.chunks(slice) {
                let to = (cutter.file_len() as usize + piece.len()).div_ceil(BLOCK) * 16;
                while !forgotten && brought < to.min(parent.tags.len()) {
                    let end = parent.tags.len().min(brought + at_a_time * 16);
                    cutter.known_tags(brought as u64 / 16, parent.tags[brought..end].to_vec());
                    brought = end;
                }
                if !forgotten && cutter.file_len() as usize >= forgets_at {
                    cutter.forget();
                    forgotten = true;
                }
                cutter.push(piece);
                if piece.len() % 3 == 0 {
                    tags.extend(cutter.take_tags());
                }
                drain(&mut cutter, &mut packs, &mut ended);
            }
            let cut = cutter.end_file();
            tags.extend(cutter.take_tags());
            cutter.push(b"the next file knows nothing of it");
            let next = cutter.end_file();
            cutter.finish();
            drain(&mut cutter, &mut packs, &mut ended);

            let zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
            let want: Vec<u8> =
                after.chunks(BLOCK).flat_map(|block| if zero(block) { ZERO_TAG } else { tagger.tag(block) }).collect();
            prop_assert_eq!(tags, want);
            let mut back = vec![0; after.len()];
            let (mut end, mut referenced) = (0, 0);
            for extent in &cut.extents {
                prop_assert!(extent.offset >= end);
                end = extent.offset + extent.len;
                let of_parent = extent.pack.label == label();
                let pack = if of_parent { &parent.packs } else { &packs }[&extent.pack.number].as_slice();
                let from = &pack[extent.at as usize..(extent.at + extent.len) as usize];
                back[extent.offset as usize..end as usize].copy_from_slice(from);
                if of_parent {
                    referenced += extent.len;
                    prop_assert!(!in_set(again, extent.pack.number) && !in_set(gone, extent.pack.number));
                }
            }
            prop_assert_eq!(&back, &after);
            // Counted from the plain bytes.
            let mut counts = Counts::default();
            for (number, block) in after.chunks(BLOCK).enumerate().filter(|(_, block)| !zero(block)) {
                let at = (number * BLOCK) as u64;
                let equal = before.chunks(BLOCK).nth(number) == Some(block);
                let known = known.clone().find(|known| {
                    known.extent.offset <= at && at < known.extent.offset + known.extent.len
                });
                match known.filter(|_| equal) {
                    Some(KnownExtent { again: false, .. }) => counts.referenced += block.len() as u64,
                    Some(_) => counts.again += block.len() as u64,
                    None => counts.new += block.len() as u64,
                }
            }
            let all = counts.new + counts.again + counts.referenced;
            prop_assert_eq!(cut.counts.new + cut.counts.again + cut.counts.referenced, all);
            prop_assert_eq!(cut.counts.referenced, referenced);
            if !forgotten {
                prop_assert_eq!(cut.counts, counts);
                prop_assert_eq!(cut.same && after.len() == before.len(), after == before);
            }
            prop_assert!(!forgotten || !cut.same);
            prop_assert!(!next.same && next.extents.iter().all(|extent| extent.pack.label == own));
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
