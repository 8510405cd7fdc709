use super::*;
use crate::catalog::layout::{Name, Object};
use crate::store::fs::FsStore;

#[tokio::test]
async fn creating_again_is_the_same_repository() {
    let world = World::new().await;
    let before = world.names().await;
    let again = Repository::create("main", world.store.clone(), &world.keys).await.unwrap();
    assert_eq!(again.format(), world.repo.format());
    assert_eq!(world.names().await, before);
    assert!(before.iter().all(|name| Name::parse(name).is_ok()), "{before:?}");
}

#[tokio::test]
async fn a_directory_is_a_repository_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(FsStore::create(dir.path().join("repo")).await.unwrap());
    let world = World::over(store).await;
    assert_eq!(put_whole(&world.repo, &wal(1), 1).await, Put::New);
    drop(put_tail(&world.repo, &wal(2), 2, (0, 300_000), 8192).await);
    put_open(&world.repo, &wal(3), 3, (0, 1000)).await;
    let repo = world.other().await;
    let read = |number| {
        let repo = repo.clone();
        async move { repo.read_segment(&cluster(), branch(1), segment(number), size(), None).await.unwrap() }
    };
    same(&read(1).await.bytes, &wal(1));
    same(&read(2).await.bytes, &wal(2)[..300_000]);
    same(&read(3).await.bytes, &wal(3)[..1000]);
    assert_eq!(repo.clusters().await.unwrap(), [cluster()]);
    let inventory = repo.load(&cluster()).await.unwrap();
    assert!(inventory.damaged.is_empty() && inventory.unknown.is_empty(), "{inventory:?}");
}

#[tokio::test]
async fn an_empty_place_is_no_repository() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let error = Repository::open("main", store.clone(), KeyFile::generate().unwrap()).await.unwrap_err();
    assert!(matches!(error, CatalogError::NotARepository { .. }), "{error}");
    assert!(list_all(store.as_ref(), "").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_wrong_key_gets_a_sentence_and_changes_nothing() {
    let world = World::new().await;
    let before = world.names().await;
    let stranger = KeyFile::generate().unwrap();
    for error in [
        Repository::open("main", world.store.clone(), stranger.clone()).await.unwrap_err(),
        Repository::create("main", world.store.clone(), &stranger).await.unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(
            matches!(error, CatalogError::WrongKey { .. }) && error.is_refusal() && !error.is_retryable(),
            "{text}"
        );
        assert!(text.contains(&world.repo.realm().to_string()) && text.contains("nothing was changed"), "{text}");
    }
    assert_eq!(world.names().await, before);
}

/// The key fits by its id, but the realm was exchanged: the meta key's envelope says so.
#[tokio::test]
async fn p4_a_foreign_realm_in_the_format_file_is_noticed() {
    let world = World::new().await;
    let text = String::from_utf8(world.bytes("format/0001.json").await).unwrap();
    let realm = world.repo.realm().to_string();
    let forged = text.replacen(&realm, "000102030405060708090a0b0c0d0e0f", 1);
    assert_ne!(text, forged);
    world.replace("format/0001.json", forged.into_bytes()).await;
    let error = Repository::open("main", world.store.clone(), world.keys.clone()).await.unwrap_err();
    assert!(matches!(error, CatalogError::Sealed { .. }) && error.to_string().contains("keys/"), "{error}");
}

#[tokio::test]
async fn a_newer_format_is_refused() {
    let world = World::new().await;
    let format = world.bytes("format/0001.json").await;
    let newer = String::from_utf8(format.clone()).unwrap().replacen("\"format\": 1", "\"format\": 2", 1);
    world.replace("format/0001.json", newer.into_bytes()).await;
    let open = || Repository::open("main", world.store.clone(), world.keys.clone());
    assert!(matches!(open().await.unwrap_err(), CatalogError::NewerFormat { found: 2, .. }));

    world.replace("format/0001.json", format).await;
    world.store.put_new(&Key::new("format/0003.json").unwrap(), Body::from(&b"?"[..])).await.unwrap();
    let error = open().await.unwrap_err();
    assert!(matches!(error, CatalogError::NewerFormat { found: 3, .. }) && error.is_refusal(), "{error}");
}

#[tokio::test]
async fn unknown_features_are_refused_for_what_they_are_needed_for() {
    let world = World::new().await;
    let format = String::from_utf8(world.bytes("format/0001.json").await).unwrap();
    let with =
        |list: &str| format.replacen(&format!("\"{list}\": []"), &format!("\"{list}\": [\"zstd\"]"), 1).into_bytes();
    let open = || Repository::open("main", world.store.clone(), world.keys.clone());

    world.replace("format/0001.json", with("needed_to_read")).await;
    let error = open().await.unwrap_err();
    assert!(matches!(error, CatalogError::UnknownFeature { doing: "read", .. }), "{error}");

    put_history_of(&world).await;
    world.replace("format/0001.json", with("needed_to_write")).await;
    let repo = open().await.unwrap();
    assert!(repo.get_history(&cluster(), branch(2)).await.unwrap().is_some(), "reading is not what needs it");
    let before = world.names().await;
    let error = repo.put_history(&cluster(), branch(3), b"").await.unwrap_err();
    assert!(matches!(error, CatalogError::UnknownFeature { doing: "written", .. }), "{error}");
    assert_eq!(world.names().await, before);
}

async fn put_history_of(world: &World) {
    world.repo.put_history(&cluster(), branch(2), b"1\t0/3000060\tno recovery target specified\n").await.unwrap();
}

#[tokio::test]
async fn a_creation_that_was_cut_off_is_completed() {
    let world = World::new().await;
    let meta = world.named("keys/ffffffff").await;
    world.store.delete(&Key::new(meta.clone()).unwrap()).await.unwrap();
    let error = Repository::open("main", world.store.clone(), world.keys.clone()).await.unwrap_err();
    assert!(matches!(error, CatalogError::NoMetaKey { .. }) && error.to_string().contains("pgkeep init"), "{error}");
    let repo = Repository::create("main", world.store.clone(), &world.keys).await.unwrap();
    assert_eq!(repo.format(), world.repo.format());
}

#[tokio::test]
async fn garbage_as_format_is_a_sentence() {
    let world = World::new().await;
    for bytes in ["", "{}", "null", "{\"format\": \"one\"}", "{\"format\": 1}"] {
        world.replace("format/0001.json", bytes.into()).await;
        let error = Repository::open("main", world.store.clone(), world.keys.clone()).await.unwrap_err();
        assert!(matches!(error, CatalogError::BadFormat { .. }), "{bytes}: {error}");
    }
}

#[tokio::test]
async fn a_content_key_serves_one_run_and_one_day() {
    let world = World::new().await;
    let keys = |names: Vec<String>| names.into_iter().filter(|name| name.starts_with("keys/0")).count();
    put_whole(&world.repo, &wal(1), 1).await;
    put_whole(&world.repo, &wal(1), 2).await;
    assert_eq!(keys(world.names().await), 1, "one run, one key");
    put_whole(&world.other().await, &wal(1), 3).await;
    assert_eq!(keys(world.names().await), 2, "another run, another key");

    let now = Arc::new(std::sync::Mutex::new("2026-11-20T23:59:59Z".parse::<Timestamp>().unwrap()));
    let clock = now.clone();
    let usage = Usage { clock: Arc::new(move || *clock.lock().unwrap()), ..usage_at("2026-11-20T00:00:00Z") };
    let repo = Repository::open_for("main", world.store.clone(), world.keys.clone(), usage).await.unwrap();
    let first = repo.writing_key().await.unwrap().key.id();
    assert_eq!(repo.writing_key().await.unwrap().key.id(), first);
    *now.lock().unwrap() = "2026-11-21T00:00:00Z".parse().unwrap();
    assert_ne!(repo.writing_key().await.unwrap().key.id(), first, "a new day, a new key");
}

#[tokio::test]
async fn a_short_lived_writer_takes_a_key_of_the_day_that_it_can_open() {
    let world = World::new().await;
    let keys = |names: Vec<String>| names.into_iter().filter(|name| name.starts_with("keys/0")).count();
    for number in 0..3 {
        let usage = Usage { short_lived: true, ..usage_at("2026-11-20T12:00:00Z") };
        let repo = Repository::open_for("main", world.store.clone(), world.keys.clone(), usage).await.unwrap();
        put_whole(&repo, &wal(1), number).await;
        assert_eq!(keys(world.names().await), 1);
        same(&world.read(number).await.unwrap().bytes, &wal(1));
    }
    // One that is damaged is no reason not to write.
    let name = world.named("keys/0").await;
    world.replace(&name, b"broken".to_vec()).await;
    let usage = Usage { short_lived: true, ..usage_at("2026-11-20T12:00:00Z") };
    let repo = Repository::open_for("main", world.store.clone(), world.keys.clone(), usage).await.unwrap();
    assert_eq!(put_whole(&repo, &wal(1), 9).await, Put::New);
    let usage = Usage { short_lived: true, ..usage_at("2026-11-21T12:00:00Z") };
    let repo = Repository::open_for("main", world.store.clone(), world.keys.clone(), usage).await.unwrap();
    put_whole(&repo, &wal(1), 10).await;
    assert_eq!(keys(world.names().await), 3, "the next day has its own");
}

#[tokio::test]
async fn p4_a_planted_or_damaged_content_key_is_named() {
    let world = World::new().await;
    put_whole(&world.repo, &wal(1), 1).await;
    let name = world.named("keys/0").await;
    let mut bytes = world.bytes(&name).await;
    bytes[20] ^= 1;
    world.replace(&name, bytes).await;
    let repo = world.other().await;
    let error = repo.read_segment(&cluster(), branch(1), segment(1), size(), None).await.unwrap_err();
    assert!(error.to_string().contains(&name), "{error}");
    world.store.delete(&Key::new(name.clone()).unwrap()).await.unwrap();
    let error = world.other().await.read_segment(&cluster(), branch(1), segment(1), size(), None).await.unwrap_err();
    assert!(error.to_string().contains(&name), "{error}");
    assert!(!error.is_retryable() && !error.is_not_found(), "a lost key is no missing segment: {error}");
}

#[tokio::test]
async fn a_write_only_key_writes_and_cannot_read() {
    let world = World::new().await;
    let repo = Repository::open("main", world.store.clone(), world.keys.write_only()).await.unwrap();
    assert_eq!(put_whole(&repo, &wal(1), 1).await, Put::New);
    put_history_of(&World { repo: repo.clone(), store: world.store.clone(), keys: world.keys.clone() }).await;
    same(&world.read(1).await.unwrap().bytes, &wal(1));
    let own = Repository::open("main", world.store.clone(), world.keys.write_only()).await.unwrap();
    let error = own.read_segment(&cluster(), branch(1), segment(1), size(), None).await.unwrap_err();
    assert!(error.to_string().contains("can write and cannot read"), "{error}");
    assert_eq!(put_whole(&own, &wal(1), 1).await, Put::SameContent, "comparing needs notes only");
    assert!(own.get_history(&cluster(), branch(2)).await.unwrap().is_some());
}

#[test]
fn secrets_are_not_in_debug() {
    let name = Name::new(Object::Of(cluster(), ClusterObject::History(branch(2))));
    let usage = usage_at("2026-11-20T12:00:00Z");
    assert!(!format!("{usage:?} {name:?}").contains("AGE-SECRET"));
}
