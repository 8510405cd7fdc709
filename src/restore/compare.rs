//! What is in the directory beside what the base backup has: which bytes have to be fetched, and which become zeros.
//!
//! What always holds: a block stays as it is only where its tag, made from the bytes as they are read now, is the one that
//! the backup's tables have for it. A block whose tag is not known is fetched. At most [`AT_ONCE`] bytes of a file are in
//! memory for each comparison. Of a file that is compared in several parts at a time, one has to be taken over before.

use std::ops::Range;
use std::sync::Arc;

use super::RestoreError;
use super::target::Target;
use crate::catalog::table::Extent;
use crate::catalog::tags::{BLOCK, TAG, Tagger};

/// Bytes that are read and tagged at a time.
const AT_ONCE: usize = 1 << 20;

/// Some blocks of a file.
#[derive(Debug)]
pub struct Part {
    /// The file.
    pub target: Arc<Target>,
    /// Its content in the packs, by offset.
    pub extents: Arc<[Extent]>,
    /// The bytes in question. They begin at a block's border and end at one, or with the file.
    pub bytes: Range<u64>,
    /// The tags of the blocks; `None`: not known.
    pub tags: Option<Vec<u8>>,
    /// The file was made for this restore and holds zeros.
    pub new: bool,
}

/// What a part came to.
#[derive(Debug)]
pub struct Compared {
    /// The file.
    pub target: Arc<Target>,
    /// What has to be fetched.
    pub wanted: Vec<Extent>,
    /// Bytes that need not be fetched.
    pub settled: u64,
    /// Those of them that were there.
    pub equal: u64,
}

/// Compares a part; zeros are written at once.
pub fn compare(part: Part, tagger: &Tagger, buffer: &mut Vec<u8>) -> Result<Compared, RestoreError> {
    let Part { target, extents, bytes, tags, new } = part;
    let (file, made) = target.take_over()?;
    let new = new || made;
    let len = bytes.end - bytes.start;
    let differing = match &tags {
        None => vec![bytes.clone()],
        Some(_) if new => vec![bytes.clone()],
        Some(tags) => {
            let mut differing: Vec<Range<u64>> = Vec::new();
            let mut own = Vec::with_capacity(AT_ONCE / BLOCK * TAG);
            buffer.resize(AT_ONCE, 0);
            let (mut at, mut rest) = (bytes.start, tags.as_slice());
            while at < bytes.end {
                let now = usize::try_from(bytes.end - at).unwrap_or(usize::MAX).min(AT_ONCE);
                let read = buffer.get_mut(..now).unwrap_or_default();
                target.read(&file, read, at)?;
                own.clear();
                tagger.push(read, &mut own);
                let theirs = rest.split_off(..own.len().min(rest.len())).unwrap_or_default();
                differ(&own, theirs, at..at + now as u64, &mut differing);
                at += now as u64;
            }
            differing
        }
    };
    let (wanted, zeros) = split(&extents, &differing);
    if !new {
        zeros.iter().try_for_each(|zeros| target.clear(&file, zeros.start, zeros.end))?;
    }
    let fetched: u64 = wanted.iter().map(|extent| extent.len).sum();
    let differing: u64 = differing.iter().map(|range| range.end - range.start).sum();
    Ok(Compared { target, wanted, settled: len - fetched, equal: len - differing })
}

/// Adds the blocks of `bytes` whose tags differ; neighbours are one range. A tag that is missing differs.
fn differ(own: &[u8], theirs: &[u8], bytes: Range<u64>, differing: &mut Vec<Range<u64>>) {
    let theirs = theirs.chunks_exact(TAG).map(Some).chain(std::iter::repeat(None));
    let starts = (bytes.start..bytes.end).step_by(BLOCK);
    for ((own, theirs), start) in own.chunks_exact(TAG).zip(theirs).zip(starts) {
        if theirs == Some(own) {
            continue;
        }
        let end = bytes.end.min(start + BLOCK as u64);
        match differing.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => differing.push(start..end),
        }
    }
}

/// Of these ranges of a file, what its extents hold, and what is zeros because none does. Both arguments are in order and
/// without overlaps.
pub fn split(extents: &[Extent], ranges: &[Range<u64>]) -> (Vec<Extent>, Vec<Range<u64>>) {
    let (mut held, mut zeros) = (Vec::new(), Vec::new());
    for range in ranges {
        let mut at = range.start;
        let begin = extents.partition_point(|extent| extent.offset + extent.len <= range.start);
        for extent in extents.get(begin..).unwrap_or_default().iter().take_while(|extent| extent.offset < range.end) {
            let (from, to) = (extent.offset.max(at), (extent.offset + extent.len).min(range.end));
            if at < from {
                zeros.push(at..from);
            }
            held.push(Extent {
                offset: from,
                len: to - from,
                pack: extent.pack,
                at: extent.at + (from - extent.offset),
            });
            at = to;
        }
        if at < range.end {
            zeros.push(at..range.end);
        }
    }
    (held, zeros)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::layout::PackName;
    use crate::seal::{BlockTagger, KeyFile};
    use crate::types::{BackupLabel, Id128};
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn extents(runs: &[(u64, u64)]) -> Vec<Extent> {
        let label = BackupLabel::at(jiff::Timestamp::UNIX_EPOCH);
        let mut end = 0;
        let extent = |(number, (gap, len)): (usize, &(u64, u64))| {
            let offset = end + gap;
            end = offset + len;
            let pack = PackName { label, number: number as u32 + 1 };
            Extent { offset, len: *len, pack, at: 1000 * number as u64 }
        };
        runs.iter().enumerate().map(extent).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Byte by byte: what is in an extent comes from its place, the rest is zeros, nothing else is named.
        #[test]
        fn ranges_are_split_by_extents(runs in vec((0u64..5, 1u64..9), 0..6), cuts in vec((0u64..4, 1u64..9), 0..6)) {
            let extents = extents(&runs);
            let mut end = 0;
            let ranges: Vec<Range<u64>> = cuts.iter().map(|(gap, len)| {
                let from = end + gap;
                end = from + len;
                from..end
            }).collect();
            let (held, zeros) = split(&extents, &ranges);
            for byte in 0..100 {
                let place = |all: &[Extent]| -> Vec<(u32, u64)> {
                    let here = all.iter().filter(|e| e.offset <= byte && byte < e.offset + e.len);
                    here.map(|e| (e.pack.number, e.at + byte - e.offset)).collect()
                };
                let asked = ranges.iter().any(|range| range.contains(&byte));
                let want = if asked { place(&extents) } else { Vec::new() };
                prop_assert_eq!(&place(&held), &want);
                let zero = zeros.iter().filter(|range| range.contains(&byte)).count();
                prop_assert_eq!(zero, usize::from(asked && want.is_empty()));
            }
        }

        /// Whatever is in the old file, and whichever tags are known: after the zeros and the fetched bytes it is the new one,
        /// and with all tags nothing is fetched that was equal.
        #[test]
        fn a_file_becomes_the_backups(
            old in vec(0u8..3, 0..8),
            new in vec(0u8..3, 1..8),
            tail in 0usize..BLOCK,
            known in 0usize..12,
            there in any::<bool>(),
        ) {
            let blocks = |runs: &[u8]| -> Vec<u8> { runs.iter().flat_map(|byte| [*byte; BLOCK]).collect() };
            let (old, mut new) = (blocks(&old), blocks(&new));
            new.truncate(new.len() - tail);
            let size = new.len() as u64;
            let key = KeyFile::generate().unwrap();
            let tagger = Tagger::new(BlockTagger::new(key.meta_key(), Id128::new([1; 16])));
            let mut tags = Vec::new();
            tagger.push(&new, &mut tags);
            let all_known = tags.len() / TAG <= known;
            tags.truncate(known * TAG);
            // The packs' content is the file's, at the same offsets; blocks of zeros are in none.
            let pack = PackName { label: BackupLabel::at(jiff::Timestamp::UNIX_EPOCH), number: 1 };
            let extents: Vec<Extent> = new.chunks(BLOCK).enumerate().filter(|(_, block)| block[0] != 0).map(|(n, block)| {
                let offset = (n * BLOCK) as u64;
                Extent { offset, len: block.len() as u64, pack, at: offset }
            }).collect();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("file");
            if there {
                std::fs::write(&path, &old).unwrap();
            }
            let target = Arc::new(Target::new(path.clone(), size, 0o600, None));
            let part = Part { target, extents: extents.into(), bytes: 0..size, tags: Some(tags), new: false };
            let compared = compare(part, &tagger, &mut Vec::new()).unwrap();
            let mut got = std::fs::read(&path).unwrap();
            let mut fetched = 0;
            for extent in &compared.wanted {
                let range = extent.offset as usize..(extent.offset + extent.len) as usize;
                prop_assert!(!(all_known && there) || got[range.clone()] != new[range.clone()]);
                got[range.clone()].copy_from_slice(&new[range]);
                fetched += extent.len;
            }
            prop_assert!(got == new);
            prop_assert_eq!(compared.settled, size - fetched);
        }
    }
}
