//! The tags of a base backup's blocks, streamed beside its file table.
//!
//! What always holds: tags are only ever a reason to fetch less. Where they are missing, do not open, or come in an order
//! that is not the table's, the answer is "not known", and the blocks are fetched. Two pieces are in memory at most.

use super::RestoreError;
use super::sources::Sources;
use crate::catalog::records::{Manifest, PartRef};
use crate::catalog::tags::entry_at;

/// A piece that is longer is not read: ours have some MiB.
const MAX_PIECE: usize = 64 << 20;
/// So many files in a row without tags, and no more are sought: the order is another.
const MAX_MISSES: u32 = 1000;

/// Tags in the order of the table.
pub struct Tags<'a> {
    sources: &'a Sources,
    parts: std::slice::Iter<'a, PartRef>,
    piece: Vec<u8>,
    at: usize,
    /// The piece after it, where it had to be looked into.
    ahead: Option<Vec<u8>>,
    misses: u32,
    /// No more are sought.
    over: bool,
}

impl<'a> Tags<'a> {
    /// From the first tag on.
    pub fn new(sources: &'a Sources, manifest: &'a Manifest) -> Tags<'a> {
        let (parts, over) = (manifest.tags.iter(), manifest.tags.is_empty());
        Tags { sources, parts, piece: Vec::new(), at: 0, ahead: None, misses: 0, over }
    }

    /// The tags of the blocks of `path` from the `first` on: of some of them, at least one; `None` where they are not
    /// known. Ask for files in the order of the table, for those too whose tags are of no use.
    pub async fn of(&mut self, path: &str, first: u64) -> Option<Vec<u8>> {
        if self.over {
            return None;
        }
        match self.find(path, first).await {
            Ok(Some(tags)) => {
                self.misses = 0;
                return Some(tags);
            }
            Ok(None) => {
                self.misses += 1;
                if self.misses < MAX_MISSES {
                    return None;
                }
                tracing::warn!("the block tags are in another order than the files: the rest is fetched whole");
            }
            Err(error) => tracing::warn!(%error, "the block tags cannot be read: the rest is fetched whole"),
        }
        self.over = true;
        (self.piece, self.ahead) = (Vec::new(), None);
        None
    }

    async fn find(&mut self, path: &str, first: u64) -> Result<Option<Vec<u8>>, RestoreError> {
        if let Some((tags, next)) = find_in(&self.piece, self.at, path, first) {
            self.at = next;
            return Ok(Some(tags));
        }
        if self.ahead.is_none() {
            self.ahead = self.load().await?;
        }
        let Some(ahead) = &self.ahead else { return Ok(None) };
        let Some((tags, next)) = find_in(ahead, 0, path, first) else { return Ok(None) };
        (self.piece, self.at) = (self.ahead.take().unwrap_or_default(), next);
        Ok(Some(tags))
    }

    async fn load(&mut self) -> Result<Option<Vec<u8>>, RestoreError> {
        let Some(part) = self.parts.next() else { return Ok(None) };
        let mut reader = self.sources.part(part);
        let mut piece = Vec::new();
        while let Some(chunk) = reader.next_chunk().await? {
            piece.extend_from_slice(&chunk);
            if piece.len() > MAX_PIECE {
                return Err(self.sources.contradiction(format!("{} is longer than any of ours", reader.name())));
            }
        }
        Ok(Some(piece))
    }
}

/// The tags of the entry that is sought, and where the next one begins. Usually it is the first that is looked at.
fn find_in(piece: &[u8], mut at: usize, path: &str, first: u64) -> Option<(Vec<u8>, usize)> {
    while at < piece.len() {
        let (entry, next) = entry_at(piece, at)?;
        if entry.path == path && entry.first == first {
            return Some((entry.tags.to_vec(), next)); // never empty: the writer leaves such entries out
        }
        at = next;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::tags::{TAG, TagsWriter};

    #[test]
    fn an_entry_is_found_behind_others_and_never_before() {
        let mut writer = TagsWriter::new();
        for (number, path) in ["a", "b", "c"].into_iter().enumerate() {
            writer.push(path, 0, &[number as u8; 2 * TAG]);
            writer.push(path, 2, &[number as u8 + 10; TAG]);
        }
        let piece = writer.finish();
        let (tags, next) = find_in(&piece, 0, "b", 0).unwrap();
        assert_eq!(tags, [1; 2 * TAG]);
        assert_eq!(find_in(&piece, next, "b", 2).unwrap().0, [11; TAG]);
        assert_eq!(find_in(&piece, next, "a", 0), None);
        assert_eq!(find_in(&piece, 0, "b", 1), None);
        assert_eq!(find_in(&piece[..piece.len() - 1], 0, "c", 2), None);
    }
}
