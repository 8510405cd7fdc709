use std::fmt;

use blake3::IncrementCounter;
use blake3::platform::Platform;
use zeroize::Zeroizing;

use super::keys::MetaKey;
use crate::types::Id128;

/// Makes the 16-byte tags by which blocks of a base backup are compared with those of its parent.
///
/// Keyed (BLAKE3, from the meta key and the realm): who only sees the tags learns nothing about well-known blocks, and
/// cannot make a block that passes for another.
#[derive(Clone)]
pub struct BlockTagger {
    key: Zeroizing<[u8; 32]>,
    platform: Platform,
}

/// How many whole blocks [`BlockTagger::tag_many`] takes: as many as the widest vectors have lanes.
pub const TAGGED_AT_ONCE: usize = 16;
/// Bytes of a whole block.
pub const TAGGED_BLOCK: usize = CHUNKS * CHUNK;

// BLAKE3's tree over a whole block: eight chunks, three levels of parents.
const CHUNK: usize = 1024;
const CHUNKS: usize = 8;
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;
const KEYED_HASH: u8 = 16;

impl BlockTagger {
    /// The tagger of a realm. Tags of two realms cannot be compared.
    pub fn new(meta: &MetaKey, realm: Id128) -> BlockTagger {
        BlockTagger { key: meta.derive_for(b"block tags", realm), platform: Platform::detect() }
    }

    /// The tag of a block: of 8 KiB, or less at a file's end.
    pub fn tag(&self, block: &[u8]) -> [u8; 16] {
        let [tag @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] =
            *blake3::keyed_hash(&self.key, block).as_bytes();
        tag
    }

    /// The tags of sixteen whole blocks: what [`BlockTagger::tag`] gives for each, almost twice as fast where there are
    /// vectors of 512 bits. A block alone has eight chunks to hash side by side; here each chunk is hashed with the
    /// same one of the other blocks.
    pub fn tag_many(&self, blocks: [&[u8; TAGGED_BLOCK]; TAGGED_AT_ONCE]) -> [[u8; 16]; TAGGED_AT_ONCE] {
        let mut key = Zeroizing::new([0; 8]);
        key.iter_mut().zip(self.key.as_chunks().0).for_each(|(word, bytes)| *word = u32::from_le_bytes(*bytes));
        let chunks = blocks.map(|block| block.as_chunks::<CHUNK>().0);
        // Chaining values: by chunk (later by parent), and in it by block.
        let mut values = [[[0; 32]; TAGGED_AT_ONCE]; CHUNKS];
        for (index, of_blocks) in values.iter_mut().enumerate() {
            let inputs = chunks.map(|chunks| &chunks[index]); // invariant: a block has CHUNKS chunks
            let (counter, out) = (index as u64, of_blocks.as_flattened_mut());
            let same = IncrementCounter::No;
            self.platform.hash_many(&inputs, &key, counter, same, KEYED_HASH, CHUNK_START, CHUNK_END, out);
        }
        let mut count = CHUNKS;
        while count > 1 {
            let end = if count == 2 { ROOT } else { 0 };
            count /= 2;
            for index in 0..count {
                let (left, right) = (&values[2 * index], &values[2 * index + 1]); // invariant: both are below CHUNKS
                let mut parents = [[0; 64]; TAGGED_AT_ONCE];
                for (parent, halves) in parents.iter_mut().zip(left.iter().zip(right)) {
                    let (begin, rest) = parent.split_at_mut(32);
                    begin.copy_from_slice(halves.0);
                    rest.copy_from_slice(halves.1);
                }
                let (flags, out) = (KEYED_HASH | PARENT, values[index].as_flattened_mut()); // invariant: below CHUNKS
                self.platform.hash_many(&parents.each_ref(), &key, 0, IncrementCounter::No, flags, 0, end, out);
            }
        }
        let [roots, ..] = values;
        roots.map(|[tag @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _]| tag)
    }
}

impl fmt::Debug for BlockTagger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BlockTagger")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Sixteen at once are hashed by our own tree: it has to be BLAKE3's, for ever.
        #[test]
        fn blocks_have_the_same_tag_alone_and_together(key: [u8; 32], seed: [u8; 32]) {
            let tagger = BlockTagger { key: Zeroizing::new(key), platform: Platform::detect() };
            let mut bytes = vec![0; TAGGED_AT_ONCE * TAGGED_BLOCK];
            blake3::Hasher::new_keyed(&seed).finalize_xof().fill(&mut bytes);
            let blocks: [&[u8; TAGGED_BLOCK]; TAGGED_AT_ONCE] = std::array::from_fn(|at| &bytes.as_chunks().0[at]);
            prop_assert_eq!(tagger.tag_many(blocks), blocks.map(|block| tagger.tag(block)));
            let portable = BlockTagger { platform: Platform::Portable, ..tagger.clone() };
            prop_assert_eq!(portable.tag_many(blocks), blocks.map(|block| tagger.tag(block)));
        }
    }
}
