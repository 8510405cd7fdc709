//! Histories of backups of files that change in every way that files can, and parents that are damaged: without a server.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use super::*;
use crate::backup::parent::ParentChoice;
use crate::backup::{cut, parent, tags};
use crate::catalog::layout::PackName;
use crate::catalog::records::{BackupInfo, Manifest, PartRef, ServerParameters};
use crate::catalog::table::TableReader;
use crate::catalog::{CatalogError, Repository};
use crate::seal::{BlockTagger, KeyFile};
use crate::store::memory::MemoryStore;
use crate::store::{Body, Store, list_all};
use crate::types::{BackupLabel, Branch, ClusterId, SegmentSize};

const PIECES: pieces::Limits = pieces::Limits { max: 2048, min: 128, target: 384, tags_at_once: 10 * TAG };
const PACK: u64 = 6 * BLOCK as u64;

/// A cluster's files in the order in which its server sends them.
type Files = Vec<(String, Vec<u8>)>;

struct World {
    store: Arc<MemoryStore>,
    repository: Repository,
    cluster: ClusterId,
    random: u64,
    taken: i64,
}

/// A backup that was taken: what its manifest says, and what became of the bytes.
struct Taken {
    manifest: Manifest,
    counts: Counts,
}

impl World {
    async fn new(seed: u64) -> World {
        let store = Arc::new(MemoryStore::new());
        let repository = Repository::create("test", store.clone(), &KeyFile::generate().unwrap()).await.unwrap();
        let cluster = ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) };
        World { store, repository, cluster, random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1, taken: 0 }
    }

    fn below(&mut self, end: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as usize % end.max(1)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new_keyed(blake3::hash(&self.below(1 << 40).to_le_bytes()).as_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    }

    fn files(&mut self) -> Files {
        let path = |n: usize| format!("base/{}/{}{}", 1 + n % 3, 16384 + n / 2, ["", ".1", "_fsm", "_vm"][n % 4]);
        let mut file = |n: usize| {
            let len = self.below(14) * BLOCK + [0, 0, 77][n % 3];
            (path(n), self.bytes(len))
        };
        (0..16).map(&mut file).collect()
    }

    /// One thing that happens to files.
    fn change(&mut self, files: &mut Files, gone: &mut Files) {
        let (which, what) = (self.below(files.len()), self.below(9));
        let some = {
            let len = self.below(9 * BLOCK);
            self.bytes(len)
        };
        let at = self.below(100);
        let Some((_, bytes)) = files.get_mut(which) else { return };
        let offset = bytes.len() * at / 100;
        match what {
            0 | 1 => bytes.iter_mut().skip(offset).take(100).for_each(|byte| *byte ^= 1),
            2 => bytes.iter_mut().skip(offset).take(3 * BLOCK).for_each(|byte| *byte = 0),
            3 => bytes.extend(some),                                       // grows
            4 => bytes.truncate(offset),                                   // shrinks
            5 => bytes.truncate(offset / BLOCK * BLOCK),                   // a relation does so by whole blocks
            6 => bytes.clone_from(&some),                                  // dropped and made again under its name
            7 => gone.push(files.remove(which)),                           // vanishes
            _ => files.extend((!gone.is_empty()).then(|| gone.remove(0))), // and comes again
        }
    }

    fn next_label(&mut self) -> BackupLabel {
        self.taken += 1;
        BackupLabel::at(jiff::Timestamp::from_second(self.taken * 60).unwrap())
    }

    async fn parent(&self, manifest: Option<&Manifest>) -> Option<Parent> {
        let opened = Parent::open(&self.repository, &self.cluster, manifest?).await;
        opened.ok()
    }

    /// A backup, compared with a parent, up to its manifest.
    async fn take(&mut self, parent: Option<Parent>, files: &Files) -> Result<Taken, BackupError> {
        let label = self.next_label();
        let parents = parent.iter().map(Parent::label).collect();
        let slice = 1 + self.below(40_000);
        let tagger = BlockTagger::new(self.repository.meta_key(), self.repository.realm());
        let objects = Objects::new(&self.repository, &self.cluster, label);
        let mut receiver = Receiver::new(objects, Cutter::new(label, tagger, PACK, BLOCK), parent, Vec::new());
        receiver.pieces = PIECES;
        for (path, bytes) in files {
            let kind = EntryKind::File { size: bytes.len() as u64 };
            receiver.entry(None, TarEntry { path: PathBuf::from(path), kind, mode: 0o600, mtime: 0 }).await?;
            for piece in bytes.chunks(slice) {
                receiver.file_data(piece).await?;
            }
        }
        let (files, bytes, counts) = (receiver.files, receiver.bytes, receiver.counts);
        let (stored, mut packs) = receiver.store_rest().await?;
        packs.extend(stored.packs);
        let at = label.start();
        let backup = BackupInfo {
            label,
            system: self.cluster.system,
            branch: Branch::first(TimelineId::FIRST),
            timeline: TimelineId::FIRST,
            start: Lsn::new(16 << 20),
            stop: Lsn::new(17 << 20),
            started_at: at,
            stopped_at: at,
            server_version: 150_000,
            segment_size: SegmentSize::DEFAULT,
            bytes,
            stored_bytes: stored.bytes,
            files,
            tablespaces: Vec::new(),
            flagged: None,
            parameters: ServerParameters::default(),
        };
        let Stored { tables, tags, server_manifest, .. } = stored;
        let manifest = Manifest { backup, packs, tables, tags, server_manifest, parents };
        self.repository.put_manifest(&self.cluster, &manifest).await?;
        Ok(Taken { manifest, counts })
    }

    async fn part(&self, part: &PartRef) -> Result<Vec<u8>, CatalogError> {
        let mut reader = self.repository.open_part(&self.cluster, part).await?;
        let mut piece = Vec::new();
        while let Some(chunk) = reader.next_chunk().await? {
            piece.extend(chunk);
        }
        Ok(piece)
    }

    /// All files of a backup, read by its manifest alone; checks what the manifest says of packs and tags, too.
    async fn read(&self, manifest: &Manifest) -> Result<Files, CatalogError> {
        let mut packs = BTreeMap::new();
        for pack in &manifest.packs {
            let reader = self.repository.open_pack(&self.cluster, pack).await?;
            packs.insert(pack.pack, reader.read(0..pack.plaintext_len).await?);
        }
        let (mut files, mut live, mut tagged) = (Files::new(), BTreeMap::<PackName, u64>::new(), Vec::new());
        let tagger = BlockTagger::new(self.repository.meta_key(), self.repository.realm());
        for part in &manifest.tables {
            let mut reader = TableReader::new();
            reader.push(&self.part(part).await?);
            let before = files.len();
            while let Some(file) = reader.next_file().unwrap() {
                let mut bytes = vec![0; file.size as usize];
                for extent in &file.extents {
                    let from = extent.at as usize..(extent.at + extent.len) as usize;
                    let to = extent.offset as usize..(extent.offset + extent.len) as usize;
                    bytes[to].copy_from_slice(&packs[&extent.pack][from]);
                    *live.entry(extent.pack).or_default() += extent.len;
                }
                assert_eq!(file.crc32c, Some(crc32c::crc32c(&bytes)), "{}", file.path);
                for (number, block) in bytes.chunks(BLOCK).enumerate() {
                    let zero = block.iter().all(|byte| *byte == 0);
                    let tag = if zero { cut::ZERO_TAG } else { tagger.tag(block) };
                    tagged.push((file.path.clone(), number as u64, tag));
                }
                files.push((file.path, bytes));
            }
            assert_eq!((files.len() - before) as u64, part.entries);
        }
        let named: BTreeMap<PackName, u64> = manifest.packs.iter().map(|pack| (pack.pack, pack.live)).collect();
        assert_eq!(named, live);
        let mut tags = Vec::new();
        for part in &manifest.tags {
            let piece = self.part(part).await?;
            let before = tags.len();
            for entry in tags::entries(&piece).unwrap() {
                let of =
                    |(number, tag): (usize, &[u8; TAG])| (entry.path.to_owned(), entry.first + number as u64, *tag);
                tags.extend(entry.tags.as_chunks::<TAG>().0.iter().enumerate().map(of));
            }
            assert_eq!((tags.len() - before) as u64, part.entries);
        }
        assert!(tags == tagged, "the tags are those of the blocks, in the order of the table");
        Ok(files)
    }

    async fn keys(&self, of: &str) -> Vec<crate::store::Key> {
        let all = list_all(self.store.as_ref(), "").await.unwrap();
        all.into_iter().map(|object| object.key).filter(|key| key.as_str().contains(of)).collect()
    }

    async fn flip(&mut self, key: &crate::store::Key) {
        let mut bytes = self.store.get(key, None).await.unwrap().to_vec();
        let at = self.below(bytes.len());
        bytes[at] ^= 1 << self.below(8);
        self.store.delete(key).await.unwrap();
        self.store.put_new(key, Body::from(bytes::Bytes::from(bytes))).await.unwrap();
    }

    /// Deletes a backup by hand: its start and manifest, and what no other names.
    async fn delete(&self, label: BackupLabel, others: &[Taken]) {
        let mut named = BTreeSet::new();
        for Taken { manifest, .. } in others {
            named.extend(manifest.packs.iter().map(|pack| format!("pack/{}", pack.pack)));
            let parts = [&manifest.tables, &manifest.tags, &manifest.server_manifest].into_iter().flatten();
            named.extend(parts.map(|part| format!("backup/{}", part.part)));
        }
        for key in self.keys(&format!("/{label}/")).await {
            if !named.iter().any(|name| key.as_str().ends_with(name)) {
                self.store.delete(&key).await.unwrap();
            }
        }
    }
}

fn seeds() -> std::ops::Range<u64> {
    let count = std::env::var("PGKEEP_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(2);
    1..count + 1
}

/// Whatever happens to files, in whatever order they come, and whatever happens to the parent: each backup is what
/// arrived, by its own manifest alone, also after backups before it were deleted.
#[tokio::test]
async fn pitfall_29_backups_in_a_row_are_each_whole() {
    for seed in seeds() {
        let mut world = World::new(seed).await;
        let (mut files, mut gone) = (world.files(), Files::new());
        let mut kept: Vec<(Taken, Files)> = Vec::new();
        for round in 0..8 {
            for _ in 0..world.below(12) {
                world.change(&mut files, &mut gone);
            }
            let shuffled = world.below(4) == 0;
            for _ in 0..if shuffled { files.len() } else { 0 } {
                let (one, other) = (world.below(files.len()), world.below(files.len()));
                files.swap(one, other);
            }
            // Any of those that are kept, the newest mostly.
            let which = if world.below(4) == 0 { world.below(kept.len()) } else { kept.len().saturating_sub(1) };
            let manifest = kept.get(which).map(|(taken, _)| taken.manifest.clone());
            let mut parent = world.parent(manifest.as_ref()).await;
            if let Some(parent) = &mut parent
                && world.below(4) == 0
            {
                parent.free = 0;
            }
            let taken = world.take(parent, &files).await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            kept.push((taken, files.clone()));
            if kept.len() > 4 {
                let at = world.below(kept.len() - 1);
                let (deleted, _) = kept.remove(at);
                let (others, contents): (Vec<Taken>, Vec<Files>) = kept.into_iter().unzip();
                world.delete(deleted.manifest.backup.label, &others).await;
                kept = others.into_iter().zip(contents).collect();
            }
            // The newest, and whatever was compared with what was deleted; at the end all.
            let rest = kept.len().saturating_sub(if round == 7 { kept.len() } else { 2 });
            for (taken, files) in kept.iter().skip(rest) {
                let read = world.read(&taken.manifest).await;
                let read = read.unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error}"));
                assert!(read == *files, "seed {seed}, round {round}: not what arrived");
            }
        }
    }
}

#[tokio::test]
async fn what_did_not_change_is_not_stored_and_its_pieces_are_shared() {
    let mut world = World::new(1).await;
    let mut files = world.files();
    let full = world.take(None, &files).await.unwrap();
    let bytes: u64 = files.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    assert_eq!(full.counts, Counts { new: bytes, ..Counts::default() }, "noise: no block is zeros");
    assert!(full.manifest.tables.len() > 3 && full.manifest.tags.len() > 3 && full.manifest.packs.len() > 10);

    let parent = world.parent(Some(&full.manifest)).await;
    let same = world.take(parent, &files).await.unwrap();
    assert_eq!(same.counts, Counts { referenced: bytes, ..Counts::default() });
    assert_eq!((&same.manifest.packs, &same.manifest.tables), (&full.manifest.packs, &full.manifest.tables));
    assert_eq!((&same.manifest.tags, same.manifest.backup.stored_bytes), (&full.manifest.tags, 0));

    // One block, of the largest file.
    let largest = files.iter_mut().max_by_key(|(_, bytes)| bytes.len()).unwrap();
    let middle = largest.1.len() / 2;
    largest.1[middle] ^= 1;
    let parent = world.parent(Some(&same.manifest)).await;
    let child = world.take(parent, &files).await.unwrap();
    assert_eq!(child.counts, Counts { new: BLOCK as u64, referenced: bytes - BLOCK as u64, again: 0 });
    let own = |parts: &[PartRef]| parts.iter().filter(|part| part.part.label == child.manifest.backup.label).count();
    assert_eq!((own(&child.manifest.tables), own(&child.manifest.tags)), (1, 1));
    // Named directly, never through the parent.
    let named: BTreeSet<BackupLabel> = child.manifest.packs.iter().map(|pack| pack.pack.label).collect();
    assert_eq!(named, [full.manifest.backup.label, child.manifest.backup.label].into());
    assert_eq!(child.manifest.parents, [same.manifest.backup.label]);
}

/// Every object of the parent in turn, damaged or gone: the backup is right, and where nothing can be known, full.
#[tokio::test]
async fn a_parent_that_is_damaged_is_left_aside() {
    let mut world = World::new(3).await;
    let files = world.files();
    let bytes: u64 = files.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    let full = world.take(None, &files).await.unwrap();
    let label = full.manifest.backup.label;
    let mut seen = BTreeSet::new();
    let (mut keys, kinds) = (Vec::new(), ["/pack/", "/files-", "/tags-", "/manifest"]);
    for kind in kinds {
        // The first and the last of each kind.
        let of_kind: Vec<_> = world.keys(&format!("/{label}/")).await;
        let of_kind: Vec<_> = of_kind.into_iter().filter(|key| key.as_str().contains(kind)).collect();
        keys.extend(of_kind.first().cloned());
        keys.extend(of_kind.last().cloned());
    }
    for key in keys {
        let kind = kinds.into_iter().find(|kind| key.as_str().contains(kind));
        let whole = world.store.get(&key, None).await.unwrap();
        for flipped in [true, false] {
            match flipped {
                true => world.flip(&key).await,
                false => world.store.delete(&key).await.unwrap(),
            }
            let chosen = parent::choose(&world.repository, &world.cluster, ParentChoice::Label(label)).await;
            let by_name = chosen.as_ref().err().map(ToString::to_string).unwrap_or_default();
            let parent = world.parent(chosen.ok().flatten().as_ref()).await;
            let taken = world.take(parent, &files).await.unwrap();
            let stored = taken.counts.new;
            match (kind, flipped) {
                // A bit in a pack is not seen: nobody reads it. Restoring names it.
                (Some("/pack/"), true) => {
                    assert_eq!(stored, 0);
                    let error = world.read(&taken.manifest).await.unwrap_err().to_string();
                    assert!(error.contains(key.as_str()), "{error} does not name {key}");
                }
                (Some("/pack/"), false) => assert!(stored > 0 && stored <= PACK, "{stored}"),
                (Some("/files-"), _) => assert_eq!(stored, bytes),
                (Some("/tags-"), _) => assert!(stored > 0 && stored <= bytes, "from there on: {stored}"),
                _ => {
                    assert!(by_name.contains(&label.to_string()) && by_name.contains("--full"), "{by_name}");
                    assert_eq!(stored, bytes);
                }
            }
            seen.insert((kind, flipped));
            if (kind, flipped) != (Some("/pack/"), true) {
                assert!(world.read(&taken.manifest).await.unwrap() == files, "{key}");
            }
            // As it was, and without the child.
            world.delete(taken.manifest.backup.label, &[]).await;
            world.store.delete(&key).await.unwrap();
            world.store.put_new(&key, Body::from(whole.clone())).await.unwrap();
        }
    }
    assert_eq!(seen.len(), 8, "{seen:?}");
}

/// The belief in tags is tested: a parent whose table says another checksum for the same blocks is not believed.
#[tokio::test]
async fn equal_tags_with_another_checksum_are_no_backup() {
    let mut world = World::new(5).await;
    let files = world.files();
    let mut full = world.take(None, &files).await.unwrap().manifest;
    // The same table, of one piece, with another checksum for one file.
    let (mut table, mut entries) = (String::new(), 0);
    let mut packs = 0;
    for part in &full.tables {
        let piece = String::from_utf8(world.part(part).await.unwrap()).unwrap();
        let mut reader = TableReader::new();
        reader.push(piece.as_bytes());
        let mut writer = TableWriter::new();
        while let Some(mut file) = reader.next_file().unwrap() {
            if file.size > 0 {
                file.crc32c = file.crc32c.map(|crc| crc ^ u32::from(packs == 0));
                packs += 1;
            }
            writer.push(&file).unwrap();
        }
        entries += writer.entries();
        // Pieces stand on their own: the numbers of packs begin anew in each.
        if table.is_empty() {
            table = String::from_utf8(writer.finish()).unwrap();
            break;
        }
    }
    let label = world.next_label();
    let mut objects = Objects::new(&world.repository, &world.cluster, label);
    objects.part(PartKind::Files, table.into_bytes(), entries).await.unwrap();
    let mut stored = objects.finish().await.unwrap();
    full.tables[0] = stored.tables.remove(0);
    let parent = world.parent(Some(&full)).await;
    assert!(parent.is_some());
    let error = world.take(parent, &files).await.err().expect("it is not believed");
    assert!(matches!(&error, BackupError::Belief { .. }), "{error}");
}

#[tokio::test]
async fn the_newest_sound_backup_is_the_parent() {
    let mut world = World::new(6).await;
    let files: Files = vec![("base/1/1".to_owned(), world.bytes(3 * BLOCK))];
    let choose = async |world: &World, choice| {
        let chosen = parent::choose(&world.repository, &world.cluster, choice).await;
        chosen.map(|manifest| manifest.map(|manifest| manifest.backup.label))
    };
    assert_eq!(choose(&world, ParentChoice::Newest).await.unwrap(), None);
    let mut labels = Vec::new();
    for _ in 0..4 {
        labels.push(world.take(None, &files).await.unwrap().manifest.backup.label);
    }
    assert_eq!(choose(&world, ParentChoice::Newest).await.unwrap(), Some(labels[3]));
    assert_eq!(choose(&world, ParentChoice::Label(labels[1])).await.unwrap(), Some(labels[1]));
    assert_eq!(choose(&world, ParentChoice::Full).await.unwrap(), None);
    // The newest does not open, the one before is flagged: then the one before that.
    let key = world.keys(&format!("/{}/manifest", labels[3])).await.remove(0);
    world.flip(&key).await;
    let mut flagged = world.repository.get_manifest(&world.cluster, labels[2]).await.unwrap();
    flagged.backup.flagged = Some("pages".to_owned());
    let key = world.keys(&format!("/{}/manifest", labels[2])).await.remove(0);
    world.store.delete(&key).await.unwrap();
    world.repository.put_manifest(&world.cluster, &flagged).await.unwrap();
    assert_eq!(choose(&world, ParentChoice::Newest).await.unwrap(), Some(labels[1]));
    let missing = choose(&world, ParentChoice::Label(BackupLabel::at(jiff::Timestamp::UNIX_EPOCH))).await;
    assert!(matches!(missing, Err(BackupError::NoParent { .. })));

    // Plans that this version cannot read may condemn it.
    let manifest = world.repository.get_manifest(&world.cluster, labels[1]).await.unwrap();
    assert!(world.parent(Some(&manifest)).await.is_some());
    let plan = crate::store::Key::new(format!("{}/expire/00000001", world.cluster)).unwrap();
    world.store.put_new(&plan, Body::from(bytes::Bytes::from_static(b"?"))).await.unwrap();
    assert!(world.parent(Some(&manifest)).await.is_none());
}

/// What is left in packs that are less than half in use is stored again, and then nothing names them.
#[tokio::test]
async fn packs_that_are_half_empty_become_empty() {
    let mut world = World::new(7).await;
    let mut files: Files = vec![("base/1/1".to_owned(), world.bytes(120 * BLOCK))];
    let first = world.take(None, &files).await.unwrap().manifest;
    // Four of the six blocks of each pack.
    let noise = world.bytes(120 * BLOCK);
    for number in (0..120).filter(|number| number % 3 != 0) {
        let range = number * BLOCK..(number + 1) * BLOCK;
        files[0].1[range.clone()].copy_from_slice(&noise[range]);
    }
    let parent = world.parent(Some(&first)).await;
    let second = world.take(parent, &files).await.unwrap();
    assert_eq!(second.counts, Counts { new: 80 * BLOCK as u64, referenced: 40 * BLOCK as u64, again: 0 });
    let parent = world.parent(Some(&second.manifest)).await;
    let third = world.take(parent, &files).await.unwrap();
    assert_eq!(third.counts, Counts { new: 0, referenced: 80 * BLOCK as u64, again: 40 * BLOCK as u64 });
    assert!(third.manifest.packs.iter().all(|pack| pack.pack.label != first.backup.label));
    assert!(world.read(&third.manifest).await.unwrap() == files);
}
