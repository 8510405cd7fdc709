//! How fast a base backup goes: the sealed objects in a directory, against `pg_basebackup --compress=client-lz4`.
//!
//! `cargo run --release --example backup_speed -- CONNINFO DIRECTORY`
//!
//! Takes one base backup into a new repository under DIRECTORY and prints the time until its files are durable. The WAL
//! it needs is archived by nobody: the time that is measured ends when the backup begins to wait for it.

use std::sync::Arc;
use std::time::Instant;

use pgkeep::backup::{BackupOptions, BackupPhase, BackupProgress, BackupSource, backup};
use pgkeep::catalog::Repository;
use pgkeep::pg::ConnectOptions;
use pgkeep::seal::KeyFile;
use pgkeep::store::fs::FsStore;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(conninfo), Some(directory)) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: backup_speed CONNINFO DIRECTORY");
    };
    let source = BackupSource { conninfo: conninfo.parse()?, connect: ConnectOptions::default() };
    let store = Arc::new(FsStore::create(&directory).await?);
    let repository = Repository::create("speed", store, &KeyFile::generate()?).await?;
    let (name, options) = ("main".parse()?, BackupOptions::default());
    let watched = watch::Sender::new(BackupProgress::default());
    let mut seen = watched.subscribe();
    let since = Instant::now();
    let durable = async {
        let mut phase = BackupPhase::Connecting;
        loop {
            let progress = *seen.wait_for(|progress| progress.phase != phase).await?;
            phase = progress.phase;
            println!("  {:.2} s {phase:?}", since.elapsed().as_secs_f64());
            if matches!(phase, BackupPhase::WaitingForWal { .. }) {
                return anyhow::Ok(progress);
            }
        }
    };
    tokio::select! {
        done = backup(&source, &repository, &name, &options, &watched, CancellationToken::new()) => {
            done?;
        }
        progress = durable => {
            let progress = progress?;
            let seconds = since.elapsed().as_secs_f64();
            let mb = |bytes: u64| bytes as f64 / 1e6;
            println!("{seconds:.2} s, {:.0} MB, {:.0} MB/s, {:.0} MB stored", mb(progress.done), mb(progress.done) / seconds, mb(progress.stored));
        }
    }
    Ok(())
}
