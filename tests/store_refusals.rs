//! What a directory repository says when the file system refuses: full, read-only, not ours.
//!
//! Needs root (to mount a small tmpfs, to become somebody else for whom modes mean something); says loudly when it has to skip.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pgkeep::store::fs::FsStore;
use pgkeep::store::{Key, Store, StoreError, list_all};

const DIRECTORY: &str = "PGKEEP_TEST_DENIED_DIR";
const NOBODY: u32 = 65534;

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

/// A tmpfs that is unmounted on drop.
struct Mount(PathBuf);

impl Mount {
    fn new(at: &Path, options: &str) -> Option<Mount> {
        std::fs::create_dir_all(at).unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).output();
        let mounted = mount.is_ok_and(|output| output.status.success());
        if !mounted {
            eprintln!("SKIPPED: cannot mount a tmpfs here, so a full and a read-only disk were not tried");
        }
        mounted.then(|| Mount(at.to_path_buf()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_disk_is_said_with_its_path_and_leaves_nothing() {
    let dir = tempfile::TempDir::with_prefix("pgkeep-full-").unwrap();
    let Some(mount) = Mount::new(&dir.path().join("small"), "size=2m") else { return };
    let store = FsStore::open(&mount.0).await.unwrap();
    store.put_new(&key("f/a"), vec![1; 1 << 20].into()).await.unwrap();
    let error = store.put_new(&key("f/b"), vec![2; 3 << 20].into()).await.unwrap_err();
    assert!(matches!(&error, StoreError::Full { .. }), "{error}");
    assert!(error.to_string().contains(&format!("{}/f/b", mount.0.display())), "{error}");
    assert!(error.is_retryable() && !error.is_transient());
    // Space for a tail is found missing when it is opened, and no empty tail stays behind.
    let error = store.open_tail(&key("open/t"), 3 << 20).await.unwrap_err();
    assert!(matches!(&error, StoreError::Full { .. }), "{error}");
    let mut tail = store.open_tail(&key("open/u"), 0).await.unwrap();
    let error = tail.append(vec![3; 3 << 20].into()).await.unwrap_err();
    assert!(matches!(&error, StoreError::Full { .. }), "{error}");
    assert!(matches!(tail.append(vec![3].into()).await, Err(StoreError::TailClosed { .. })));
    store.delete(&key("open/u")).await.unwrap();
    drop(tail);
    let names: Vec<_> = list_all(&store, "").await.unwrap().into_iter().map(|object| object.key).collect();
    assert_eq!(names, [key("f/a")]);
    assert_eq!(std::fs::read_dir(mount.0.join(".pgkeep-tmp")).unwrap().count(), 0);
    store.put_new(&key("f/b"), vec![2; 1 << 19].into()).await.unwrap();
}

#[tokio::test]
async fn a_read_only_file_system_is_said_and_can_be_read() {
    let dir = tempfile::TempDir::with_prefix("pgkeep-ro-").unwrap();
    let Some(mount) = Mount::new(&dir.path().join("small"), "size=2m") else { return };
    FsStore::open(&mount.0).await.unwrap().put_new(&key("f/a"), vec![1; 100].into()).await.unwrap();
    let remount = Command::new("mount").args(["-o", "remount,ro"]).arg(&mount.0).status().unwrap();
    assert!(remount.success());
    let store = FsStore::open(&mount.0).await.unwrap();
    assert_eq!(store.get(&key("f/a"), None).await.unwrap().len(), 100);
    let is_read_only = |error: StoreError| assert!(matches!(&error, StoreError::ReadOnly { .. }), "{error}");
    is_read_only(store.put_new(&key("f/b"), vec![1].into()).await.unwrap_err());
    is_read_only(store.put_new(&key("new/b"), vec![1].into()).await.unwrap_err());
    is_read_only(store.delete(&key("f/a")).await.unwrap_err());
    is_read_only(store.open_tail(&key("f/t"), 10).await.unwrap_err());
}

#[tokio::test]
async fn p7_an_unmounted_repository_is_not_continued_below_its_mount_point() {
    let dir = tempfile::TempDir::with_prefix("pgkeep-umount-").unwrap();
    let Some(mount) = Mount::new(&dir.path().join("small"), "size=2m") else { return };
    let store = FsStore::open(&mount.0).await.unwrap();
    store.put_new(&key("f/a"), vec![1; 100].into()).await.unwrap();
    let path = mount.0.clone();
    drop(mount);
    for error in [
        store.put_new(&key("f/b"), vec![1].into()).await.unwrap_err(),
        store.get(&key("f/b"), None).await.unwrap_err(),
        list_all(&store, "").await.unwrap_err(),
    ] {
        assert!(matches!(&error, StoreError::Vanished { .. }), "{error}");
    }
    assert_eq!(std::fs::read_dir(path).unwrap().count(), 0);
}

/// The side without rights, run by the test below as another user.
#[test]
fn somebody_else() {
    let Ok(directory) = std::env::var(DIRECTORY) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = FsStore::open(&directory).await.unwrap();
        for error in [
            store.put_new(&key("f/b"), vec![1].into()).await.unwrap_err(),
            store.open_tail(&key("f/t"), 10).await.unwrap_err(),
            store.delete(&key("f/a")).await.unwrap_err(),
            store.get(&key("f/a"), None).await.unwrap_err(),
            store.get(&key("closed/a"), None).await.unwrap_err(),
            list_all(&store, "").await.unwrap_err(),
        ] {
            assert!(matches!(&error, StoreError::Denied { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(&directory) && text.contains(&format!("user {NOBODY}")), "{text}");
        }
    });
    println!("all was denied");
}

#[test]
fn p7_what_may_not_be_read_is_denied_and_not_missing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root to become a user without rights");
        return;
    }
    let dir = tempfile::TempDir::with_prefix("pgkeep-denied-").unwrap();
    let path = dir.path().join("repository");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = FsStore::create(&path).await.unwrap();
        store.put_new(&key("f/a"), vec![1; 100].into()).await.unwrap();
        store.put_new(&key("closed/a"), vec![1; 100].into()).await.unwrap();
    });
    // Readable from outside but for the objects and one folder.
    for open in [dir.path(), &path, &path.join("f"), &path.join(".pgkeep-tmp")] {
        std::fs::set_permissions(open, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    // A copy of this binary where the other user can run it.
    let binary = dir.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &binary).unwrap();
    let output = Command::new(&binary)
        .args(["--exact", "somebody_else", "--nocapture"])
        .env(DIRECTORY, &path)
        .current_dir("/")
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("all was denied"), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
}
