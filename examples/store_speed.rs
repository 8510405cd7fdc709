//! Figures of a directory repository: `cargo run --release --example store_speed -- DIRECTORY`.
//! Objects of 4 MB created per second, alone and four at once; an append of 8 KiB to a tail against plain
//! write and fdatasync, in turns so that both meet the same disk; and a listing of 100,000 names.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use pgkeep::store::fs::FsStore;
use pgkeep::store::{Body, Key, Store, list_all};
use rustix::fs::FallocateFlags;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

#[tokio::main]
async fn main() -> Outcome<()> {
    let parent = std::env::args().nth(1).ok_or("say a directory to measure in")?;
    let directory = tempfile::TempDir::with_prefix_in("store-speed-", parent)?;
    let store = FsStore::create(directory.path().join("repository")).await?;
    let body = Body::from(vec![Bytes::from(vec![0x5A; 1 << 20]); 4]);
    for round in 0..3 {
        for at_once in [1, 4] {
            let began = Instant::now();
            let count = 64;
            let keys = (0..count).map(|n| Key::new(format!("put/{round}/{at_once}/{n}")));
            let keys = keys.collect::<Result<Vec<_>, _>>()?;
            stream::iter(keys.iter().map(|key| store.put_new(key, body.clone())))
                .buffer_unordered(at_once)
                .try_for_each(|_| async { Ok(()) })
                .await?;
            let rate = f64::from(count) / began.elapsed().as_secs_f64();
            println!("put_new of 4 MiB, {at_once} at once: {rate:.0} objects/s, {:.0} MB/s", rate * 4.194_304);
        }
    }
    for round in 0..3 {
        let mut tail = store.open_tail(&Key::new(format!("tail{round}"))?, 64 << 20).await?;
        let file = |mode, name: &str| -> Outcome<std::fs::File> {
            let file = std::fs::File::create_new(directory.path().join(format!("{name}{round}")))?;
            if let Some(mode) = mode {
                rustix::fs::fallocate(&file, mode, 0, 64 << 20)?;
            }
            file.sync_all()?;
            Ok(file)
        };
        let plain = [
            (file(None, "growing")?, "plain write, growing file"),
            (file(Some(FallocateFlags::KEEP_SIZE), "keep")?, "plain write, fallocate KEEP_SIZE"),
            (file(Some(FallocateFlags::empty()), "sized")?, "plain write, fallocate with size"),
        ];
        let mut times: [Vec<Duration>; 4] = Default::default();
        let page = Bytes::from(vec![0x5A; 8192]);
        let [tail_times, plain_times @ ..] = &mut times;
        for n in 0..2000 {
            let began = Instant::now();
            tail.append(page.clone().into()).await?;
            tail_times.push(began.elapsed());
            for ((file, _), times) in plain.iter().zip(plain_times.iter_mut()) {
                let began = Instant::now();
                file.write_all_at(&page, n * 8192)?;
                file.sync_data()?;
                times.push(began.elapsed());
            }
        }
        for (times, name) in times.iter_mut().zip(["append to a tail"].into_iter().chain(plain.iter().map(|p| p.1))) {
            times.sort();
            let at = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or_default();
            println!("{name}: p50 {:?}, p99 {:?}", at(50), at(99));
        }
    }
    let many = store.path().join("many");
    std::fs::create_dir(&many)?;
    for n in 0..100_000 {
        std::fs::write(many.join(format!("{n:08X}.00000000-01000000")), "")?;
    }
    let began = Instant::now();
    let listed = list_all(&store, "many/").await?.len();
    println!("listing of {listed} names: {:?}", began.elapsed());
    Ok(())
}
