//! Copying between repositories, of one realm and of two.

use super::*;
use crate::catalog::copy::same_backup;
use crate::catalog::layout::{KeptFile, PackName, PartKind, PartName};
use crate::catalog::records::{BackupStart, Manifest, PackRef, PartRef};
use crate::catalog::{CopiedBackup, CopiedSegment};
use crate::store::faulty::{FaultPlan, Faulty};
use crate::types::BackupLabel;

/// A second repository: of the same realm, or of its own.
async fn second(world: &World, same_realm: bool) -> World {
    second_over(Arc::new(MemoryStore::new()), world, same_realm).await
}

async fn second_over(store: Arc<dyn Store>, world: &World, same_realm: bool) -> World {
    let keys = if same_realm { world.keys.clone() } else { KeyFile::generate().unwrap() };
    let repo = Repository::create("second", store.clone(), &keys).await.unwrap();
    World { store, keys, repo }
}

async fn copy(from: &World, to: &World, number: u64) -> Result<CopiedSegment, CatalogError> {
    to.repo.copy_segment(&from.repo, &cluster(), branch(1), segment(number), size()).await
}

const HALF: u32 = LEN / 2;

/// A segment in two parts, as one of more than 64 MiB is.
async fn put_parts(repo: &Repository, history: &[u8], number: u64) {
    for range in [(0, HALF), (HALF, LEN)] {
        repo.put_range(&sealed(repo, history, branch(1), number, range, false).await).await.unwrap();
    }
}

#[tokio::test]
async fn a_segment_is_copied_as_it_is_within_a_realm_and_sealed_anew_across() {
    for same_realm in [true, false] {
        let world = World::new().await;
        put_whole(&world.repo, &wal(1), 1).await;
        put_parts(&world.repo, &wal(2), 2).await;
        let target = second(&world, same_realm).await;
        for number in [1, 2] {
            let copied = copy(&world, &target, number).await.unwrap();
            assert_eq!(copied.put, Put::New);
            assert!(copied.bytes > 1000, "{copied:?}");
            same(&target.read(number).await.unwrap().bytes, &wal(number as u8));
            // By another process, with nothing in its memory.
            let other = Repository::open("second", target.store.clone(), target.keys.clone()).await.unwrap();
            let read = other.read_segment(&cluster(), branch(1), segment(number), size(), None).await.unwrap();
            assert!(read.complete);
            same(&read.bytes, &wal(number as u8));
            let again = copy(&world, &target, number).await.unwrap();
            assert_eq!(again, CopiedSegment { bytes: 0, put: Put::SameContent });
        }
        for name in world.names().await.iter().filter(|name| name.contains("/wal/")) {
            assert_eq!(world.bytes(name).await == target.bytes(name).await, same_realm, "{name}");
        }
    }
}

#[tokio::test]
async fn what_is_not_there_whole_is_not_found() {
    let world = World::new().await;
    put_open(&world.repo, &wal(1), 1, (0, 5000)).await;
    let half = sealed(&world.repo, &wal(2), branch(1), 2, (0, HALF), false).await;
    world.repo.put_range(&half).await.unwrap();
    let target = second(&world, true).await;
    for number in [1, 2, 3] {
        let error = copy(&world, &target, number).await.unwrap_err();
        assert!(error.is_not_found() && !error.is_retryable(), "{error}");
        assert!(error.to_string().contains(&format!("00000001000000000000000{number}")), "{error}");
    }
    assert!(target.repo.copy_history(&world.repo, &cluster(), branch(2)).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn p6_a_copy_replaces_nothing() {
    for same_realm in [true, false] {
        let world = World::new().await;
        put_whole(&world.repo, &wal(1), 1).await;
        put_whole(&world.repo, &wal(2), 2).await;
        let target = second(&world, same_realm).await;
        put_whole(&target.repo, &wal(9), 1).await;
        put_open(&target.repo, &wal(8), 2, (0, 5000)).await;
        let before = target.names().await;
        for number in [1, 2] {
            let copied = copy(&world, &target, number).await.unwrap();
            let Put::Conflict(conflict) = copied.put else { panic!("{copied:?}") };
            assert!(conflict.existing.contains(&format!("00000001000000000000000{number}.")), "{conflict:?}");
            assert!(conflict.kept.contains("repository main"), "{conflict:?}");
            assert_eq!(conflict.note.their_writer, target.repo.writer());
        }
        let after: Vec<String> = target.names().await.into_iter().filter(|name| !name.starts_with("keys/")).collect();
        assert!(after.iter().all(|name| before.contains(name)), "{after:?}");
        same(&target.read(1).await.unwrap().bytes, &wal(9));
        same(&target.read(2).await.unwrap().bytes, &wal(8)[..5000]);
    }
}

#[tokio::test]
async fn p4_what_does_not_open_is_named_and_not_copied() {
    for (same_realm, at) in [(true, 20_000), (false, 20_000), (true, 30), (false, 30)] {
        let world = World::new().await;
        put_whole(&world.repo, &wal(1), 1).await;
        let name = world.named("/wal/").await;
        let whole = world.bytes(&name).await;
        let mut bytes = whole.clone();
        let at = at.min(bytes.len() / 2);
        bytes[at] ^= 1;
        world.replace(&name, bytes).await;
        let target = second(&world, same_realm).await;
        let error = copy(&world, &target, 1).await.unwrap_err();
        assert!(error.is_damage() && error.to_string().contains(&name), "{error}");
        assert!(target.names().await.iter().all(|name| !name.contains("/wal/")));
        // A copy of it that opens is as good, and goes under the name itself.
        let copy_key = Key::new(format!("{name}~repair")).unwrap();
        world.store.put_new(&copy_key, Body::from(whole)).await.unwrap();
        assert_eq!(copy(&world, &target, 1).await.unwrap().put, Put::New);
        assert_eq!(target.named("/wal/").await, name);
        same(&target.read(1).await.unwrap().bytes, &wal(1));
    }
}

#[tokio::test]
async fn a_copy_beside_a_damaged_object_of_the_target() {
    let world = World::new().await;
    put_whole(&world.repo, &wal(1), 1).await;
    let target = second(&world, true).await;
    copy(&world, &target, 1).await.unwrap();
    let name = target.named("/wal/").await;
    let mut bytes = target.bytes(&name).await;
    bytes.truncate(bytes.len() - 1);
    target.replace(&name, bytes).await;
    assert!(matches!(copy(&world, &target, 1).await.unwrap().put, Put::BesideDamaged { .. }));
    same(&target.read(1).await.unwrap().bytes, &wal(1));
}

/// The database host may not read: it copies within the realm, and notices what can be noticed.
#[tokio::test]
async fn a_key_that_cannot_read_copies_within_the_realm() {
    let world = World::new().await;
    put_parts(&world.repo, &wal(1), 1).await;
    let target = second(&world, true).await;
    let write_only = world.keys.write_only();
    let from = Repository::open("main", world.store.clone(), write_only.clone()).await.unwrap();
    let to = Repository::open("second", target.store.clone(), write_only).await.unwrap();
    let copied = to.copy_segment(&from, &cluster(), branch(1), segment(1), size()).await.unwrap();
    assert_eq!(copied.put, Put::New);
    same(&target.read(1).await.unwrap().bytes, &wal(1));
    // Across realms it says that it cannot.
    let strange = second(&world, false).await;
    let error = strange.repo.copy_segment(&from, &cluster(), branch(1), segment(1), size()).await.unwrap_err();
    assert!(!error.is_damage() && !error.is_retryable(), "{error}");
    // A planted key is not handed on.
    let key = world.names().await.into_iter().find(|name| name.starts_with("keys/") && !name.contains("ffffffff"));
    let key = key.unwrap();
    let mut envelope = world.bytes(&key).await;
    envelope[40] ^= 1;
    world.replace(&key, envelope).await;
    let third = second(&world, true).await;
    let error = third.repo.copy_segment(&from, &cluster(), branch(1), segment(1), size()).await.unwrap_err();
    assert!(error.is_damage() && error.to_string().contains(&key), "{error}");
    assert_eq!(third.names().await.len(), 2, "only what makes it a repository: {:?}", third.names().await);
}

#[tokio::test]
async fn histories_and_kept_files_are_copied() {
    for same_realm in [true, false] {
        let world = World::new().await;
        let text = b"1\t0/5000000\tno recovery target specified\n";
        world.repo.put_history(&cluster(), branch(2), text).await.unwrap();
        let file: KeptFile = "000000010000000000000003.partial".parse().unwrap();
        world.repo.put_wal_file(&cluster(), branch(1), &file, &wal(3)).await.unwrap();
        let target = second(&world, same_realm).await;
        for want in [Put::New, Put::SameContent] {
            assert_eq!(target.repo.copy_history(&world.repo, &cluster(), branch(2)).await.unwrap(), want);
            let put = target.repo.copy_wal_file(&world.repo, &cluster(), branch(1), &file).await.unwrap();
            assert_eq!(put, want);
        }
        assert_eq!(target.repo.get_history(&cluster(), branch(2)).await.unwrap().unwrap(), &text[..]);
        same(&target.repo.get_wal_file(&cluster(), branch(1), &file).await.unwrap().unwrap(), &wal(3));
        let other = second(&world, same_realm).await;
        other.repo.put_history(&cluster(), branch(2), b"1\t0/6000000\tx\n").await.unwrap();
        let put = other.repo.copy_history(&world.repo, &cluster(), branch(2)).await.unwrap();
        assert!(matches!(put, Put::Conflict(_)), "{put:?}");
    }
}

// ---- base backups

pub(super) fn label() -> BackupLabel {
    BackupLabel::at("2026-11-20T03:15:00Z".parse().unwrap())
}

/// A backup of two packs, one of them another backup's, with a piece of each table.
pub(super) async fn put_backup(repo: &Repository) -> Manifest {
    let parent = BackupLabel::at("2026-11-19T03:15:00Z".parse().unwrap());
    let id = cluster();
    let start =
        BackupStart { label: label(), writer: repo.writer(), started_at: label().start(), parents: vec![parent] };
    repo.put_record(&id, ClusterObject::Start(label()), &start).await.unwrap();
    let put = async |object: ClusterObject, bytes: &[u8]| {
        let mut writer = repo.seal_object(&id, object).await.unwrap();
        writer.push(bytes).unwrap();
        let sealed = writer.finish(&[]).unwrap();
        repo.put_object(&sealed).await.unwrap();
        sealed
    };
    let mut packs = Vec::new();
    for (label, number, bytes) in [(parent, 1, wal(7)), (label(), 1, [wal(8), wal(9)].concat())] {
        let pack = PackName { label, number };
        let sealed = put(ClusterObject::Pack(pack), &bytes).await;
        let (len, header, plaintext_len) = (sealed.len(), sealed.header().clone(), sealed.plaintext_len());
        packs.push(PackRef { pack, len, header, plaintext_len, live: 5000 });
    }
    let mut parts = Vec::new();
    for kind in [PartKind::Files, PartKind::Tags, PartKind::ServerManifest] {
        let part = PartName { label: label(), kind, number: 1 };
        let sealed = put(ClusterObject::Part(part), format!("{kind:?}\n").as_bytes()).await;
        parts.push(PartRef { part, len: sealed.len(), entries: 1 });
    }
    let mut manifest = super::inventory::manifest(label());
    manifest.packs = packs;
    [manifest.tables, manifest.tags, manifest.server_manifest] =
        [0, 1, 2].map(|index: usize| vec![parts[index].clone()]);
    manifest.parents = vec![parent];
    repo.put_manifest(&id, &manifest).await.unwrap();
    manifest
}

pub(super) async fn copy_backup(from: &Repository, to: &Repository) -> Result<CopiedBackup, CatalogError> {
    to.copy_backup(from, &cluster(), label(), &|_| {}).await
}

/// Everything that a restore reads of it.
async fn content(repo: &Repository) -> Vec<Vec<u8>> {
    let manifest = repo.get_manifest(&cluster(), label()).await.unwrap();
    let mut all = Vec::new();
    for pack in &manifest.packs {
        let reader = repo.open_pack(&cluster(), pack).await.unwrap();
        all.push(reader.read(0..reader.plaintext_len()).await.unwrap());
    }
    for part in manifest.tables.iter().chain(&manifest.server_manifest) {
        let reader = repo.open_part(&cluster(), part).await.unwrap();
        all.push(reader.read(0..reader.plaintext_len()).await.unwrap());
    }
    all
}

#[tokio::test]
async fn a_backup_is_copied_within_a_realm_and_across() {
    for same_realm in [true, false] {
        let world = World::new().await;
        let manifest = put_backup(&world.repo).await;
        let target = second(&world, same_realm).await;
        let seen = std::sync::atomic::AtomicU64::new(0);
        let count = |bytes: u64| {
            seen.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        };
        let copied = target.repo.copy_backup(&world.repo, &cluster(), label(), &count).await.unwrap();
        assert_eq!((copied.objects, &copied.damaged[..]), (if same_realm { 6 } else { 5 }, &[][..]));
        let other = Repository::open("second", target.store.clone(), target.keys.clone()).await.unwrap();
        assert!(content(&other).await == content(&world.repo).await);
        let copy = other.get_manifest(&cluster(), label()).await.unwrap();
        assert!(same_backup(&copy, &manifest));
        assert_eq!(copy == manifest, same_realm);
        assert_eq!(copy.tags.is_empty(), !same_realm, "tags mean nothing in another realm");
        let mut stored: u64 = manifest.packs.iter().map(|pack| pack.len).sum();
        let tags: &[PartRef] = if same_realm { &manifest.tags } else { &[] };
        let parts = manifest.tables.iter().chain(tags).chain(&manifest.server_manifest);
        stored += parts.map(|part| part.len).sum::<u64>();
        assert_eq!(seen.into_inner(), stored);
        if same_realm {
            for name in world.names().await.iter().filter(|name| name.contains("/pack/") || name.contains("/backup/")) {
                assert_eq!(world.bytes(name).await, target.bytes(name).await, "{name}");
            }
        }
        let again = copy_backup(&world.repo, &target.repo).await.unwrap();
        assert_eq!(again, CopiedBackup::default());
    }
}

#[tokio::test]
async fn p4_a_backup_with_a_damaged_object_is_not_copied_and_goes_on_when_it_is_mended() {
    for same_realm in [true, false] {
        for part in ["pack/20261120", "files-000001"] {
            let world = World::new().await;
            put_backup(&world.repo).await;
            let name = world.named(part).await;
            let whole = world.bytes(&name).await;
            let mut bytes = whole.clone();
            bytes[120] ^= 1;
            world.replace(&name, bytes).await;
            let target = second(&world, same_realm).await;
            let copied = copy_backup(&world.repo, &target.repo).await.unwrap();
            let named: Vec<&str> = copied.damaged.iter().map(|object| object.name.as_str()).collect();
            assert_eq!(named, [name.as_str()]);
            assert!(copied.objects >= 3, "the rest was copied: {copied:?}");
            let error = target.repo.get_manifest(&cluster(), label()).await.unwrap_err();
            assert!(error.is_not_found(), "there is no backup: {error}");
            world.replace(&name, whole).await;
            let again = copy_backup(&world.repo, &target.repo).await.unwrap();
            assert_eq!((again.objects, &again.damaged[..]), (2, &[][..]), "{part}: only what was missing");
            assert!(content(&target.repo).await == content(&world.repo).await);
        }
    }
}

#[tokio::test]
async fn p6_another_backup_of_that_name_stays() {
    for same_realm in [true, false] {
        let world = World::new().await;
        put_backup(&world.repo).await;
        let target = second(&world, same_realm).await;
        target.repo.put_manifest(&cluster(), &super::inventory::manifest(label())).await.unwrap();
        let before = target.names().await;
        let error = copy_backup(&world.repo, &target.repo).await.unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains("backup/20261120T031500Z/manifest"), "{error}");
        assert_eq!(target.names().await, before);
    }
}

/// Whatever fails on the way: afterwards the backup is whole, or it is not there; and trying again completes it.
#[tokio::test]
async fn p2_a_copied_backup_is_whole_or_not_there_whatever_fails() {
    let mut faults = 0;
    for seed in 0..24 {
        let world = World::new().await;
        put_backup(&world.repo).await;
        put_whole(&world.repo, &wal(1), 1).await;
        let mut target = second(&world, seed % 2 == 0).await;
        let plain = target.store.clone();
        let faulty = Faulty::new(plain.clone(), FaultPlan::none(), seed);
        target.store = Arc::new(faulty.clone());
        target.repo = Repository::open("second", target.store.clone(), target.keys.clone()).await.unwrap();
        let plan = FaultPlan { before: 0.1, after: 0.1, cut: 0.05, flip: 0.05, ..FaultPlan::none() };
        let from = Faulty::new(world.store.clone(), FaultPlan::none(), seed + 1000);
        let source = Repository::open("main", Arc::new(from.clone()), world.keys.clone()).await.unwrap();
        faulty.set_plan(plan.clone());
        from.set_plan(plan);
        let mut tries = 0;
        loop {
            tries += 1;
            if tries > 40 {
                faulty.switch(false);
                from.switch(false);
            }
            let copied = match copy_backup(&source, &target.repo).await {
                Ok(copied) => copied.damaged.is_empty(),
                Err(error) => {
                    assert!(error.is_retryable() || error.is_damage() || error.is_not_found(), "seed {seed}: {error}");
                    false
                }
            };
            // By who meets no faults: what is listed can be read.
            let calm = Repository::open("second", plain.clone(), target.keys.clone()).await.unwrap();
            match calm.get_manifest(&cluster(), label()).await {
                Ok(_) => assert!(content(&calm).await == content(&world.repo).await, "seed {seed}"),
                Err(error) => assert!(error.is_not_found() && !copied, "seed {seed}: {error}"),
            }
            let segment = target.repo.copy_segment(&source, &cluster(), branch(1), segment(1), size()).await;
            if copied && segment.is_ok() {
                same(
                    &calm.read_segment(&cluster(), branch(1), self::segment(1), size(), None).await.unwrap().bytes,
                    &wal(1),
                );
                break;
            }
        }
        faults += faulty.faults() + from.faults();
    }
    assert!(faults > 100, "only {faults} faults");
}

// ---- gaps, and the segment that is open

#[tokio::test]
async fn gaps_and_open_segments_are_copied() {
    for same_realm in [true, false] {
        let world = World::new().await;
        let (begin, end) = (segment(4).start(size()), segment(5).start(size()));
        super::inventory::put_gap(&world.repo, &super::inventory::gap(begin, end)).await.unwrap();
        put_open(&world.repo, &wal(1), 1, (0, 1000)).await;
        let tail = put_tail(&world.repo, &wal(1), 1, (1000, 5000), 700).await;
        let target = second(&world, same_realm).await;
        for want in [Put::New, Put::SameContent] {
            let put = target.repo.copy_gap(&world.repo, &cluster(), branch(1), (begin, end)).await.unwrap();
            assert_eq!(put, want);
        }
        assert_eq!(target.repo.gaps_of(&cluster(), branch(1)).await.unwrap().len(), 1);
        let like = note(&world.repo, &wal(1), 0, 1000);
        let copy = async || {
            let at = (branch(1), segment(1), size());
            target.repo.copy_open_segment(&world.repo, &cluster(), at, &like).await
        };
        let copied = copy().await.unwrap();
        assert_eq!((copied.to, &copied.put), (segment(1).start(size()).advance(5000), &Put::New));
        same(&target.read(1).await.unwrap().bytes, &wal(1)[..5000]);
        assert_eq!(copy().await.unwrap().put, Put::SameContent);
        drop(tail);
        put_open(&world.repo, &wal(1), 1, (5000, LEN)).await;
        assert_eq!(copy().await.unwrap().put, Put::New);
        let read = target.read(1).await.unwrap();
        assert!(read.complete && read.sources.len() == 1 && read.sources[0].contains("/wal/"), "{:?}", read.sources);
        same(&read.bytes, &wal(1));
        // Another history of the same segment is refused.
        put_open(&world.repo, &wal(1), 2, (0, 1000)).await;
        put_open(&target.repo, &wal(2), 2, (0, 500)).await;
        let at = (branch(1), segment(2), size());
        let error = target.repo.copy_open_segment(&world.repo, &cluster(), at, &like).await.unwrap_err();
        assert!(error.is_refusal(), "{error}");
    }
}

// ---- stores that overwrite

/// Everything there is, once from one to the other.
async fn copy_everything(from: &World, to: &World) -> Result<Vec<Put>, CatalogError> {
    let (begin, end) = (segment(4).start(size()), segment(5).start(size()));
    let mut puts = vec![
        to.repo.copy_history(&from.repo, &cluster(), branch(2)).await?,
        to.repo.copy_gap(&from.repo, &cluster(), branch(1), (begin, end)).await?,
    ];
    for number in [1, 2] {
        puts.push(copy(from, to, number).await?.put);
    }
    let backup = copy_backup(&from.repo, &to.repo).await?;
    assert_eq!(backup.damaged, []);
    puts.push(if backup.objects > 0 { Put::New } else { Put::SameContent });
    Ok(puts)
}

#[tokio::test(start_paused = true)]
async fn p6_copies_go_into_a_store_that_overwrites_and_out_of_it() {
    for (seed, same_realm) in [(1, true), (2, false)] {
        let world = World::new().await;
        world.repo.put_history(&cluster(), branch(2), b"1\t0/5000000\tx\n").await.unwrap();
        let (begin, end) = (segment(4).start(size()), segment(5).start(size()));
        super::inventory::put_gap(&world.repo, &super::inventory::gap(begin, end)).await.unwrap();
        put_whole(&world.repo, &wal(1), 1).await;
        put_parts(&world.repo, &wal(2), 2).await;
        put_backup(&world.repo).await;
        let weak = second_over(super::weak::store(seed), &world, same_realm).await;
        let puts = copy_everything(&world, &weak).await.unwrap();
        assert!(puts.iter().all(|put| *put == Put::New), "{puts:?}");
        assert!(weak.names().await.iter().filter(|name| name.contains("/wal/")).all(|name| name.contains('~')));
        // Again: nothing more is stored. (But for small files that are sealed anew: a name that is young may still be
        // withdrawn, and counts for nothing yet.)
        let stored = async || {
            let names = weak.names().await.into_iter();
            names.filter(|name| same_realm || !name.contains(".history~")).collect::<Vec<_>>()
        };
        let before = stored().await;
        let puts = copy_everything(&world, &weak).await.unwrap();
        assert!(puts.iter().all(|put| *put == Put::SameContent), "{puts:?}");
        assert_eq!(stored().await, before);
        // And out of it.
        let third = second(&weak, same_realm).await;
        copy_everything(&weak, &third).await.unwrap();
        for number in [1, 2] {
            same(&third.read(number).await.unwrap().bytes, &wal(number as u8));
        }
        assert!(content(&third.repo).await == content(&world.repo).await);
        assert!(third.names().await.iter().all(|name| !name.contains('~')), "{:?}", third.names().await);
        // Another history there stays, and ours loses its name.
        put_whole(&world.repo, &wal(3), 3).await;
        put_whole(&weak.repo, &wal(9), 3).await;
        let before = weak.names().await;
        assert!(matches!(copy(&world, &weak, 3).await.unwrap().put, Put::Conflict(_)));
        assert_eq!(weak.names().await, before);
        same(&weak.read(3).await.unwrap().bytes, &wal(9));
        // Two contents under one name are copied to nobody; what does not open is no content.
        let name = weak.named("000000010000000000000003.").await;
        let key = Key::new(format!("{}~planted", name.split('~').next().unwrap())).unwrap();
        let theirs = world.bytes(&world.named("000000010000000000000003.").await).await;
        weak.store.put_new(&key, theirs.into()).await.unwrap();
        match copy(&weak, &third, 3).await {
            Err(error) => assert!(same_realm && matches!(error, CatalogError::TwoContents { .. }), "{error}"),
            Ok(copied) => {
                assert!(!same_realm && copied.put == Put::New, "{copied:?}");
                same(&third.read(3).await.unwrap().bytes, &wal(9));
            }
        }
    }
}
