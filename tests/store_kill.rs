//! A writer is killed at random moments, by seed. What a directory repository lists afterwards is whole, and
//! everything that was confirmed before the kill is there.
//!
//! The writer is this test binary itself, run again with `PGKEEP_TEST_KILL_DIR` set.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use pgkeep::store::fs::{FsOptions, FsStore};
use pgkeep::store::{Body, Key, Store, list_all};

const DIRECTORY: &str = "PGKEEP_TEST_KILL_DIR";

/// The bytes that belong under a name: each of them follows from it.
fn content(name: &str, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn object_len(number: usize) -> usize {
    (number * 791_911) % 3_000_000
}

/// In one write: a kill between two of them would leave a line that says less than the truth.
fn say(name: &str, len: u64) {
    std::io::stderr().write_all(format!("confirmed {name} {len}\n").as_bytes()).unwrap();
}

/// The killed side. Says on stderr (unbuffered) what was confirmed.
#[test]
fn writer() {
    let Ok(directory) = std::env::var(DIRECTORY) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let store = FsStore::open(&directory).await.unwrap();
        let run = std::process::id();
        let tails = tokio::spawn({
            let store = store.clone();
            async move {
                for number in 0.. {
                    let name = format!("open/{run}/{number}-");
                    let bytes = content(&name, 100_000);
                    let mut tail = store.open_tail(&Key::new(name.as_str()).unwrap(), 100_000).await.unwrap();
                    for piece in bytes.chunks(7000) {
                        tail.append(Bytes::copy_from_slice(piece).into()).await.unwrap();
                        say(&name, tail.len());
                    }
                }
            }
        });
        let mut number = 0;
        while !tails.is_finished() {
            number += 1;
            let name = format!("wal/{run}/{}/{number}", number % 5);
            let bytes = content(&name, object_len(number));
            let body: Body = bytes.chunks(10_000).map(Bytes::copy_from_slice).collect::<Vec<_>>().into();
            store.put_new(&Key::new(name.as_str()).unwrap(), body).await.unwrap();
            say(&name, bytes.len() as u64);
        }
    });
}

#[test]
fn p1_what_was_confirmed_survives_a_kill_and_what_is_listed_is_whole() {
    let seed = 20_261_121_u64;
    println!("seed {seed}");
    // In memory where there is such a place: syncs cost nothing there, so the kills fall into the writing. What a kill
    // leaves is the same: it takes the process, not the kernel.
    let parent = Some(PathBuf::from("/dev/shm")).filter(|shm| shm.is_dir()).unwrap_or_else(std::env::temp_dir);
    let directory = tempfile::TempDir::with_prefix_in("pgkeep-kill-", parent).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let path = directory.path().join("repository");
    runtime.block_on(FsStore::create(&path)).unwrap();
    let mut confirmed = BTreeMap::new();
    // A machine that is busy starts the writer late: then there are more rounds, until enough was written.
    for round in 0.. {
        if round >= 12 && (confirmed.len() > 20 || round >= 100) {
            break;
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer", "--nocapture"])
            .env(DIRECTORY, &path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let millis = u64::from(content(&format!("{seed} {round}"), 1)[0]);
        std::thread::sleep(Duration::from_millis(20 + millis));
        child.kill().unwrap(); // SIGKILL
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        child.wait().unwrap();
        assert!(!said.contains("panicked"), "{said}");
        for line in said.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            if let [_, name, len] = line.split(' ').collect::<Vec<_>>()[..] {
                confirmed.insert(name.to_string(), len.parse::<usize>().unwrap());
            }
        }
    }
    assert!(confirmed.len() > 20, "too little was written to show anything: {}", confirmed.len());

    // Now, and again after what the dead left behind has been removed.
    for grace in [3600, 0] {
        let options = FsOptions { grace: Duration::from_secs(grace), ..FsOptions::default() };
        runtime.block_on(async {
            let store = FsStore::open_with(&path, options).await.unwrap();
            let mut listed = BTreeMap::new();
            for object in list_all(&store, "").await.unwrap() {
                let name = object.key.to_string();
                let there = store.get(&object.key, None).await.unwrap();
                assert_eq!(there.len() as u64, object.len);
                assert!(there == content(&name, there.len()), "{name} holds other bytes (seed {seed})");
                if let Some(number) = name.strip_prefix("wal/").and_then(|rest| rest.rsplit('/').next()) {
                    assert_eq!(there.len(), object_len(number.parse().unwrap()), "{name} is not whole (seed {seed})");
                }
                listed.insert(name, there.len());
            }
            for (name, len) in &confirmed {
                assert!(listed.get(name).is_some_and(|there| there >= len), "{name} was confirmed with {len} bytes");
            }
        });
    }
    assert_eq!(std::fs::read_dir(path.join(".pgkeep-tmp")).unwrap().count(), 0);
}
