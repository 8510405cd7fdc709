use std::os::unix::fs::{MetadataExt, PermissionsExt};

use tempfile::TempDir;

use super::*;
use crate::store::{conformance, list_all};

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

async fn store() -> (TempDir, FsStore) {
    let dir = TempDir::with_prefix("pgkeep-store-").unwrap();
    let store = FsStore::create(dir.path().join("made/repository")).await.unwrap();
    (dir, store)
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_promises_of_a_store() -> Result<(), conformance::Broken> {
    let dir = TempDir::with_prefix("pgkeep-store-").unwrap();
    let count = std::sync::atomic::AtomicUsize::new(0);
    let make = async || {
        let n = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(Arc::new(FsStore::create(dir.path().join(n.to_string())).await?) as Arc<dyn Store>)
    };
    conformance::run(make).await
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_promises_with_hard_links_too() -> Result<(), conformance::Broken> {
    let dir = TempDir::with_prefix("pgkeep-store-").unwrap();
    let count = std::sync::atomic::AtomicUsize::new(0);
    let make = async || {
        let n = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let store = FsStore::create(dir.path().join(n.to_string())).await?;
        current(&store.root).use_links();
        Ok(Arc::new(store) as Arc<dyn Store>)
    };
    conformance::run(make).await
}

fn temporaries(store: &FsStore) -> Vec<String> {
    let Ok(names) = std::fs::read_dir(store.path().join(".pgkeep-tmp")) else { return Vec::new() };
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn modes_and_nothing_left_over() {
    let (_dir, store) = store().await;
    store.put_new(&key("f/g/a"), b"abc"[..].into()).await.unwrap();
    store.put_new(&key("f/g/a"), b"other"[..].into()).await.unwrap_err();
    let mode = |path: &str| std::fs::metadata(store.path().join(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(
        (mode(""), mode("f"), mode("f/g"), mode("f/g/a"), mode(".pgkeep-tmp")),
        (0o700, 0o700, 0o700, 0o600, 0o700)
    );
    assert_eq!(temporaries(&store), Vec::<String>::new());
}

#[tokio::test]
async fn temporaries_of_the_dead_are_removed_and_of_the_living_not() {
    let (_dir, store) = store().await;
    store.put_new(&key("a"), b"abc"[..].into()).await.unwrap();
    let folder = store.path().join(".pgkeep-tmp");
    let make = |name: &str, age: u64| {
        let file = std::fs::File::create(folder.join(name)).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(age)).unwrap();
        file
    };
    make("1-dead", 7200);
    make("2-young", 60);
    let living = make("3-living", 7200);
    living.lock().unwrap();
    assert_eq!(list_all(&store, "").await.unwrap().len(), 1, "no temporary is listed");
    FsStore::open(store.path()).await.unwrap();
    let mut left = temporaries(&store);
    left.sort();
    assert_eq!(left, ["2-young", "3-living"]);
    drop(living);
    FsStore::open_with(store.path(), FsOptions { grace: Duration::ZERO, ..Default::default() }).await.unwrap();
    assert_eq!(temporaries(&store), Vec::<String>::new());
    assert_eq!(list_all(&store, "").await.unwrap().len(), 1);
}

#[tokio::test]
async fn symbolic_links_are_not_followed() {
    let (dir, store) = store().await;
    let outside = dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "x").unwrap();
    std::os::unix::fs::symlink(&outside, store.path().join("link")).unwrap();
    std::fs::create_dir(store.path().join("f")).unwrap();
    std::os::unix::fs::symlink(outside.join("secret"), store.path().join("f/secret")).unwrap();
    for name in ["link/secret", "link/new", "f/secret"] {
        let name = key(name);
        let damaged = |error: StoreError| assert!(matches!(&error, StoreError::Damaged { .. }), "{name}: {error}");
        damaged(store.put_new(&name, b"y"[..].into()).await.unwrap_err());
        damaged(store.get(&name, None).await.unwrap_err());
        damaged(store.head(&name).await.unwrap_err());
        if name.as_str() != "f/secret" {
            damaged(store.open_tail(&name, 10).await.unwrap_err());
            damaged(store.delete(&name).await.unwrap_err());
        }
    }
    for prefix in ["", "link/", "f/"] {
        // Passing over a link would be a "not there" that nobody has looked at (P7).
        assert!(matches!(list_all(&store, prefix).await, Err(StoreError::Damaged { .. })), "{prefix:?}");
    }
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(std::fs::read(outside.join("secret")).unwrap(), b"x");
}

#[tokio::test]
async fn a_root_that_is_not_there_is_not_made() {
    let dir = TempDir::with_prefix("pgkeep-store-").unwrap();
    let path = dir.path().join("none");
    let error = FsStore::open(&path).await.unwrap_err();
    assert!(matches!(&error, StoreError::Vanished { .. }), "{error}");
    assert!(error.to_string().contains("none") && !path.exists(), "{error}");
    std::fs::write(&path, "a file").unwrap();
    assert!(matches!(FsStore::open(&path).await, Err(StoreError::Vanished { .. })));
}

#[tokio::test]
async fn p7_a_root_that_vanished_is_not_an_empty_one() {
    let (dir, store) = store().await;
    store.put_new(&key("f/a"), b"abc"[..].into()).await.unwrap();
    let mut tail = store.open_tail(&key("open/t"), 100).await.unwrap();
    let path = store.path().to_path_buf();
    std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
    for round in ["gone", "an empty directory in its place"] {
        let vanished = |error: StoreError| assert!(matches!(&error, StoreError::Vanished { .. }), "{round}: {error}");
        vanished(store.put_new(&key("f/b"), b"x"[..].into()).await.unwrap_err());
        vanished(store.get(&key("f/b"), None).await.unwrap_err());
        vanished(store.head(&key("g/b")).await.unwrap_err());
        vanished(store.list(&ListRequest::flat("x/")).await.unwrap_err());
        vanished(store.delete(&key("f/a")).await.unwrap_err());
        vanished(store.open_tail(&key("open/u"), 100).await.unwrap_err());
        if round == "gone" {
            vanished(tail.append(b"x"[..].into()).await.unwrap_err());
            assert!(!path.exists());
            std::fs::create_dir(&path).unwrap();
        }
    }
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0, "nothing was written into what is not the repository");
    // Mounted again, it goes on by itself.
    std::fs::remove_dir(&path).unwrap();
    std::fs::rename(dir.path().join("elsewhere"), &path).unwrap();
    store.put_new(&key("f/b"), b"x"[..].into()).await.unwrap();
    assert!(matches!(tail.append(b"x"[..].into()).await, Err(StoreError::TailClosed { .. })));
}

/// Mounted anew, or a disk replaced by its copy: the same repository in another directory.
#[tokio::test]
async fn a_repository_that_comes_back_elsewhere_is_used_again() {
    let (dir, store) = store().await;
    store.put_new(&key("format/0001.json"), b"{\"repository\": 7}"[..].into()).await.unwrap();
    let mut tail = store.open_tail(&key("open/t"), 100).await.unwrap();
    let path = store.path().to_path_buf();
    let away = dir.path().join("away");
    std::fs::rename(&path, &away).unwrap();
    let put = async |name: &str| store.put_new(&key(name), b"x"[..].into()).await;
    assert!(matches!(put("a").await, Err(StoreError::Vanished { .. })), "gone");
    for other in [&b"{\"repository\": 8}"[..], b""] {
        std::fs::create_dir_all(path.join("format")).unwrap();
        std::fs::write(path.join("format/0001.json"), other).unwrap();
        assert!(matches!(put("a").await, Err(StoreError::Vanished { .. })), "another repository, or half of one");
    }
    std::fs::copy(away.join("format/0001.json"), path.join("format/0001.json")).unwrap();
    assert_eq!(put("a").await.unwrap(), Created::New);
    assert!(path.join("a").exists() && !away.join("a").exists());
    assert!(tail.append(b"x"[..].into()).await.is_err(), "a tail is never continued");
    assert!(store.open_tail(&key("open/t"), 100).await.is_ok());
}

#[tokio::test]
async fn what_was_no_repository_is_not_taken_for_another() {
    let (dir, store) = store().await;
    let path = store.path().to_path_buf();
    std::fs::rename(&path, dir.path().join("away")).unwrap();
    std::fs::create_dir(&path).unwrap();
    for _ in 0..2 {
        let error = store.put_new(&key("a"), b"x"[..].into()).await.unwrap_err();
        assert!(matches!(error, StoreError::Vanished { .. }), "{error}");
    }
}

#[tokio::test]
async fn what_is_no_object_is_not_listed() {
    let (_dir, store) = store().await;
    store.put_new(&key("f/a"), b"abc"[..].into()).await.unwrap();
    for name in ["lost+found", ".snapshot", "f/.nfs0001", "f/with space"] {
        std::fs::create_dir(store.path().join(name)).unwrap();
        std::fs::write(store.path().join(name).join("x"), "x").unwrap();
    }
    std::fs::create_dir_all(store.path().join("empty/in/empty")).unwrap();
    let names: Vec<_> = list_all(&store, "").await.unwrap().into_iter().map(|o| o.key.to_string()).collect();
    assert_eq!(names, ["f/a"]);
    assert_eq!(crate::store::list_folders(&store, "").await.unwrap(), ["f/"]);
}

#[tokio::test]
async fn a_tail_has_its_space_set_aside_and_gives_it_back() {
    let (_dir, store) = store().await;
    let mut tail = store.open_tail(&key("t"), 1 << 20).await.unwrap();
    let stat = || std::fs::metadata(store.path().join("t")).unwrap();
    assert_eq!(stat().len(), 0, "a reader meets no zeros that nobody wrote");
    let set_aside = stat().blocks() * 512;
    assert!(set_aside >= 1 << 20 || set_aside == 0, "{set_aside}"); // 0: a file system that cannot
    tail.append(vec![1; 5000].into()).await.unwrap();
    assert_eq!(stat().len(), 5000);
    drop(tail);
    for _ in 0..500 {
        if stat().blocks() * 512 <= 64 << 10 {
            assert_eq!(stat().len(), 5000);
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} bytes are still set aside", stat().blocks() * 512);
}

#[tokio::test]
async fn a_dropped_append_closes_the_tail() {
    let (_dir, store) = store().await;
    let mut tail = store.open_tail(&key("t"), 1 << 20).await.unwrap();
    tail.append(b"one"[..].into()).await.unwrap();
    {
        let append = tail.append(vec![2; 100_000].into());
        futures_util::pin_mut!(append);
        assert!(futures_util::poll!(append.as_mut()).is_pending());
    }
    assert!(matches!(tail.append(b"three"[..].into()).await, Err(StoreError::TailClosed { .. })));
    assert_eq!(tail.len(), 3);
}

#[tokio::test]
async fn a_dropped_put_leaves_a_whole_object_or_none() {
    let (_dir, store) = store().await;
    let body = Body::from(vec![7; 1 << 20]);
    for n in 0..20 {
        let name = key(&format!("f{n}/a"));
        {
            let put = store.put_new(&name, body.clone());
            futures_util::pin_mut!(put);
            let _ = futures_util::poll!(put.as_mut());
        }
        tokio::time::sleep(Duration::from_millis(n)).await;
        for object in list_all(&store, "").await.unwrap() {
            assert_eq!(object.len, body.len());
        }
        store.put_new(&name, body.clone()).await.unwrap();
        assert!(body.same_as(&store.get(&name, None).await.unwrap()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_that_come_and_go_under_writers_hurt_nobody() {
    let (_dir, store) = store().await;
    let writers = (0..4).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for n in 0..100 {
                let name = key(&format!("shared/folder/{writer}-{n}"));
                store.put_new(&name, b"x"[..].into()).await.unwrap();
                store.delete(&name).await.unwrap();
            }
        })
    });
    futures_util::future::try_join_all(writers).await.unwrap();
    assert_eq!(list_all(&store, "").await.unwrap(), []);
}

mod properties {
    use proptest::prelude::*;

    use super::*;
    use crate::store::memory::MemoryStore;

    fn a_key() -> impl Strategy<Value = String> {
        // Few letters, around the slash in the order of bytes, so that names collide and share prefixes.
        proptest::collection::vec("[ab.~-]{1,2}", 1..4).prop_map(|parts| parts.join("/"))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..Default::default() })]
        /// A directory lists as the ordered map does, whatever is asked.
        #[test]
        fn listings_are_those_of_a_sorted_map(
            names in proptest::collection::vec(a_key(), 0..25),
            prefix in "[ab.~/-]{0,3}",
            after in proptest::option::of("[ab.~/-]{0,4}"),
            delimited: bool,
            limit in 1_usize..6,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let (_dir, store) = store().await;
                let memory = MemoryStore::new();
                for name in names {
                    let Ok(name) = Key::new(name) else { continue };
                    let body = Body::from(name.to_string().into_bytes());
                    let (here, there) = (store.put_new(&name, body.clone()).await, memory.put_new(&name, body).await);
                    assert_eq!(here.is_ok(), there.is_ok(), "{name}: {here:?}, {there:?}");
                }
                let request = ListRequest { prefix, after, delimited, limit };
                let plain = |listing: Listing| {
                    let objects: Vec<_> = listing.objects.into_iter().map(|o| (o.key, o.len)).collect();
                    (objects, listing.folders, listing.next)
                };
                let here = plain(store.list(&request).await.unwrap());
                assert_eq!(here, plain(memory.list(&request).await.unwrap()), "{request:?}");
            });
        }
    }
}
