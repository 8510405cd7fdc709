//! The tags of a backup's blocks, by which a later backup tells which of its blocks it need not store. Pure.
//!
//! A piece is entries one after the other, little-endian: length of the path in bytes (u32), path, number of the first
//! block (u64), number of blocks (u32), and of each block its 16-byte tag. Blocks have 8 KiB, a file's last one may have
//! less; a block of zeros has the tag of all zeros. A file's entries are in the order of the file table, and an entry
//! never leaves its piece, so that a piece stands on its own. A file without blocks has no entry.

/// Bytes of a tag.
pub const TAG: usize = 16;

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

/// Reads one piece; `None` where it is not understood.
pub fn entries(piece: &[u8]) -> Option<Vec<TagsEntry<'_>>> {
    let mut entries = Vec::new();
    let mut rest = piece;
    while !rest.is_empty() {
        let (path_len, after) = rest.split_first_chunk::<4>()?;
        let (path, after) = after.split_at_checked(usize::try_from(u32::from_le_bytes(*path_len)).ok()?)?;
        let (first, after) = after.split_first_chunk::<8>()?;
        let (blocks, after) = after.split_first_chunk::<4>()?;
        let bytes = usize::try_from(u32::from_le_bytes(*blocks)).ok()?.checked_mul(TAG)?;
        let (tags, after) = after.split_at_checked(bytes)?;
        entries.push(TagsEntry { path: std::str::from_utf8(path).ok()?, first: u64::from_le_bytes(*first), tags });
        rest = after;
    }
    Some(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
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
