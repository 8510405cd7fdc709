//! The tags of a backup's blocks, by which a later backup tells which of its blocks it need not store, and a restore which
//! blocks of an old directory it need not fetch. Pure.
//!
//! A piece is entries one after the other, little-endian: length of the path in bytes (u32), path, number of the first
//! block (u64), number of blocks (u32), and of each block its 16-byte tag. Blocks have 8 KiB, a file's last one may have
//! less; a block of zeros has the tag of all zeros. A file's entries are in the order of the file table, and an entry
//! never leaves its piece, so that a piece stands on its own. A file without blocks has no entry.

use super::repository::Repository;
use crate::seal::{BlockTagger, TAGGED_AT_ONCE, TAGGED_BLOCK};

/// Bytes of a tag.
pub const TAG: usize = 16;
/// What has a tag of its own: 8 KiB of a file.
pub const BLOCK: usize = TAGGED_BLOCK;
/// The tag of a block of zeros, which nothing else has.
pub const ZERO_TAG: [u8; TAG] = [0; TAG];

/// Writes one piece.
#[derive(Debug, Default)]
pub struct TagsWriter {
    out: Vec<u8>,
    blocks: u64,
}

impl TagsWriter {
    /// An empty piece.
    pub fn new() -> TagsWriter {
        TagsWriter::default()
    }

    /// Adds the tags of the blocks of `path` from `first` on.
    pub fn push(&mut self, path: &str, first: u64, tags: &[u8]) {
        // invariant: paths have at most some hundred bytes (tar), and the tags of one call are of a few MiB of file
        let (path_len, blocks) = (path.len() as u32, (tags.len() / TAG) as u32);
        if blocks == 0 {
            return;
        }
        self.out.extend_from_slice(&path_len.to_le_bytes());
        self.out.extend_from_slice(path.as_bytes());
        self.out.extend_from_slice(&first.to_le_bytes());
        self.out.extend_from_slice(&blocks.to_le_bytes());
        self.out.extend_from_slice(tags);
        self.blocks += u64::from(blocks);
    }

    /// Bytes so far: a piece is ended by its size.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// Nothing yet.
    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// Blocks so far.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The piece.
    pub fn finish(self) -> Vec<u8> {
        self.out
    }
}

/// The tags of some blocks of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TagsEntry<'a> {
    /// The file.
    pub path: &'a str,
    /// Number of the first block.
    pub first: u64,
    /// Tags, 16 bytes each.
    pub tags: &'a [u8],
}

/// The entry that begins at byte `at` of a piece, and where the next one begins; `None` where it is not understood.
pub fn entry_at(piece: &[u8], at: usize) -> Option<(TagsEntry<'_>, usize)> {
    let rest = piece.get(at..)?;
    let (path_len, rest) = rest.split_first_chunk::<4>()?;
    let (path, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*path_len)).ok()?)?;
    let (first, rest) = rest.split_first_chunk::<8>()?;
    let (blocks, rest) = rest.split_first_chunk::<4>()?;
    let bytes = usize::try_from(u32::from_le_bytes(*blocks)).ok()?.checked_mul(TAG)?;
    let (tags, rest) = rest.split_at_checked(bytes)?;
    let entry = TagsEntry { path: std::str::from_utf8(path).ok()?, first: u64::from_le_bytes(*first), tags };
    Some((entry, piece.len() - rest.len()))
}

/// Reads one piece; `None` where it is not understood.
pub fn entries(piece: &[u8]) -> Option<Vec<TagsEntry<'_>>> {
    let (mut entries, mut at) = (Vec::new(), 0);
    while at < piece.len() {
        let (entry, next) = entry_at(piece, at)?;
        entries.push(entry);
        at = next;
    }
    Some(entries)
}

/// Makes the tags of blocks as they are in the tables of one realm.
#[derive(Debug, Clone)]
pub struct Tagger(BlockTagger);

impl Tagger {
    /// The tagger of a realm.
    pub fn new(tagger: BlockTagger) -> Tagger {
        Tagger(tagger)
    }

    /// Appends the tag of every block of `bytes`, which begin at a block's border; the last block may be shorter.
    pub fn push(&self, bytes: &[u8], tags: &mut Vec<u8>) {
        let (blocks, rest) = bytes.as_chunks::<BLOCK>();
        // Blocks that are not zeros wait until there are enough to be hashed side by side.
        let mut waiting: Vec<(usize, &[u8; BLOCK])> = Vec::with_capacity(TAGGED_AT_ONCE);
        for block in blocks {
            if !is_zero(block) {
                waiting.push((tags.len(), block));
            }
            tags.extend_from_slice(&ZERO_TAG);
            if let Ok(many) = <[(usize, &[u8; BLOCK]); TAGGED_AT_ONCE]>::try_from(waiting.as_slice()) {
                let found = self.0.tag_many(many.map(|(_, block)| block));
                many.iter().zip(found).for_each(|((slot, _), tag)| set(tags, *slot, tag));
                waiting.clear();
            }
        }
        waiting.iter().for_each(|(slot, block)| set(tags, *slot, self.0.tag(*block)));
        if !rest.is_empty() {
            tags.extend_from_slice(&if is_zero(rest) { ZERO_TAG } else { self.0.tag(rest) });
        }
    }
}

impl Repository {
    /// The tagger of this repository's realm.
    pub fn tagger(&self) -> Tagger {
        Tagger::new(BlockTagger::new(self.meta_key(), self.realm()))
    }
}

fn set(tags: &mut [u8], slot: usize, tag: [u8; TAG]) {
    if let Some(place) = tags.get_mut(slot..slot + TAG) {
        place.copy_from_slice(&tag); // invariant: the slot was made for it
    }
}

/// Few blocks that are not zeros begin with zeros, so the first word decides almost always.
pub fn is_zero(block: &[u8]) -> bool {
    let (words, rest) = block.as_chunks::<64>();
    words.iter().all(|word| word.iter().fold(0, |any, byte| any | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::KeyFile;
    use crate::types::Id128;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// However many blocks there are, zeros among them: each has the tag that it has alone.
        #[test]
        fn blocks_in_a_row_have_the_tags_that_they_have_alone(
            blocks in vec(prop_oneof![Just(0u8), any::<u8>()], 0..40),
            rest in vec(prop_oneof![9 => Just(0u8), 1 => any::<u8>()], 0..30),
        ) {
            let key = KeyFile::generate().unwrap();
            let alone = BlockTagger::new(key.meta_key(), Id128::new([1; 16]));
            let mut bytes: Vec<u8> = blocks.iter().flat_map(|byte| [*byte; BLOCK]).collect();
            bytes.extend(&rest);
            let (mut tags, mut want) = (vec![7], vec![7]);
            Tagger::new(alone.clone()).push(&bytes, &mut tags);
            for block in bytes.chunks(BLOCK) {
                want.extend(if block.iter().all(|byte| *byte == 0) { ZERO_TAG } else { alone.tag(block) });
            }
            prop_assert_eq!(tags, want);
        }

        #[test]
        fn tags_read_back_as_written(files in vec((".{0,20}", any::<u64>(), vec(any::<[u8; TAG]>(), 1..5)), 0..8)) {
            let mut writer = TagsWriter::new();
            for (path, first, tags) in &files {
                writer.push(path, *first, tags.as_flattened());
            }
            prop_assert_eq!(writer.blocks(), files.iter().map(|(_, _, tags)| tags.len() as u64).sum::<u64>());
            let piece = writer.finish();
            let want = files.iter();
            let want: Vec<TagsEntry<'_>> =
                want.map(|(path, first, tags)| TagsEntry { path, first: *first, tags: tags.as_flattened() }).collect();
            prop_assert_eq!(entries(&piece), Some(want));
        }

        #[test]
        fn a_piece_that_was_cut_is_refused(bytes in vec(any::<u8>(), 0..100), cut in 1usize..20) {
            let _ = entries(&bytes); // never a panic
            let mut writer = TagsWriter::new();
            writer.push("base/1/112", 7, &[1; TAG]);
            let piece = writer.finish();
            prop_assert_eq!(entries(&piece[..piece.len() - cut]), None);
        }
    }
}
