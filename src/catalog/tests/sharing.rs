use std::collections::BTreeSet;

use super::inventory::manifest;
use crate::catalog::backups::Sharing;
use crate::catalog::layout::{PackName, PartKind, PartName};
use crate::catalog::records::{Manifest, PackRef, PartRef};
use crate::types::BackupLabel;
use bytes::Bytes;
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

fn label(at: usize) -> BackupLabel {
    BackupLabel::at(jiff::Timestamp::from_second(at as i64 * 60).unwrap())
}

/// An object: some are packs, some are pieces. Its length is given by what it is.
fn len(object: usize) -> u64 {
    1 << object
}

fn names(at: usize, objects: &BTreeSet<usize>) -> Manifest {
    let mut manifest = manifest(label(at));
    for object in objects {
        let (number, label, len) = (*object as u32 + 1, label(object / 3), len(*object));
        if object % 2 == 0 {
            let pack = PackName { label, number };
            manifest.packs.push(PackRef { pack, len, header: Bytes::new(), plaintext_len: 1, live: 1 });
        } else {
            let part = PartName { label, kind: PartKind::Tags, number };
            manifest.tags.push(PartRef { part, len, entries: 1 });
        }
    }
    manifest
}

proptest! {
    #[test]
    fn what_deleting_frees_is_what_no_other_names(backups in vec(btree_set(0usize..12, 0..8), 0..6)) {
        let mut sharing = Sharing::new();
        backups.iter().enumerate().for_each(|(at, objects)| sharing.add(&names(at, objects)));
        for (at, objects) in backups.iter().enumerate() {
            let all_with: BTreeSet<&usize> = backups.iter().flatten().collect();
            let others = backups.iter().enumerate().filter(|(other, _)| *other != at);
            let all_without: BTreeSet<&usize> = others.flat_map(|(_, objects)| objects).collect();
            let sum = |objects: BTreeSet<&usize>| objects.into_iter().map(|object| len(*object)).sum::<u64>();
            let alone = sum(all_with) - sum(all_without);
            let share = sharing.of(label(at)).unwrap_or_default();
            prop_assert_eq!(share.alone, alone);
            prop_assert_eq!(share.alone + share.shared, sum(objects.iter().collect()));
        }
    }
}
