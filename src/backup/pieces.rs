//! Where pieces of the file table and of the tags end. Pure.
//!
//! By what is in them and not by what came before: so after a file that is new or gone pieces soon end where the
//! parent's do, and those that did not change have the same bytes as the parent's, whose pieces are then shared.

use super::cut::BLOCK;
use super::tags::TAG;

/// How large pieces are, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// No piece is longer, but for its last entry.
    pub max: usize,
    /// No piece is shorter, except where a long entry follows, and at the end.
    pub min: usize,
    /// An entry of so many bytes ends a piece; a shorter one does so with as much chance.
    pub target: u64,
    /// Of one file so many bytes of tags make an entry at most. Entries end there, so that the tags of a file that did not
    /// change are the same however it arrives.
    pub tags_at_once: usize,
}

impl Limits {
    /// For earnest: entries of tags are of at most 64 MiB of a file.
    pub const OURS: Limits =
        Limits { max: 4 << 20, min: 256 << 10, target: 1 << 20, tags_at_once: (64 << 20) / BLOCK * TAG };

    /// Does a piece of `len` bytes end behind the entry of `path`, which is `entry` bytes of it?
    pub fn ends_behind(&self, path: &str, entry: usize, len: usize) -> bool {
        // The chance is drawn from the path: the same one each time.
        let draw = u64::from(crc32c::crc32c(path.as_bytes()));
        len >= self.max || (len >= self.min && draw.saturating_mul(self.target) < (entry as u64) << 32)
    }

    /// Do the tags of a file of this size deserve a piece of their own?
    pub fn begins_before(&self, size: u64) -> bool {
        size / BLOCK as u64 * TAG as u64 >= self.target
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const FILES: usize = 60_000;

    /// Pieces of a table, as the paths in them.
    fn pieces(files: &[(String, usize)]) -> Vec<Vec<&str>> {
        let (mut pieces, mut piece, mut len) = (Vec::new(), Vec::new(), 0);
        for (path, entry) in files {
            piece.push(path.as_str());
            len += entry;
            if Limits::OURS.ends_behind(path, *entry, len) {
                pieces.push(std::mem::take(&mut piece));
                len = 0;
            }
        }
        pieces.push(piece);
        pieces
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4))]

        /// Files that come and go at three places cost a few pieces each, not all that follow.
        #[test]
        fn pieces_are_found_again(gone in 0..FILES, fresh in 0..FILES, grown in 0..FILES - 1) {
            let before: Vec<(String, usize)> = (0..FILES).map(|n| (format!("base/5/{n}"), 1000 + n % 50)).collect();
            let mut after = before.clone();
            after.remove(gone);
            after.insert(fresh.min(after.len()), ("base/5/new".to_owned(), 1200));
            after[grown].1 += 3000;
            let old: BTreeSet<Vec<&str>> = pieces(&before).into_iter().collect();
            let new = pieces(&after);
            let changed = new.iter().filter(|piece| !old.contains(*piece)).count();
            prop_assert!((30..120).contains(&new.len()), "{} pieces of 60 MB", new.len());
            prop_assert!(changed <= 12, "{changed} of {} pieces changed", new.len());
        }
    }

    #[test]
    fn a_large_file_has_pieces_of_its_own() {
        let ours = Limits::OURS;
        assert!(ours.begins_before(1 << 30) && !ours.begins_before(100 << 20));
        assert!(ours.ends_behind("base/5/16384", 2 << 20, 2 << 20));
        assert!(ours.ends_behind("x", 1, ours.max) && !ours.ends_behind("x", 1 << 20, ours.min - 1));
    }
}
