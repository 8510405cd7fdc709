//! Base backups in this process, into a repository of its own, and read back by the manifest alone.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pgkeep::archive::{ArchiveOptions, ClusterStatus, Source, archive};
use pgkeep::backup::{BackupError, BackupOptions, BackupProgress, BackupSource, backup};
use pgkeep::catalog::Repository;
use pgkeep::catalog::inventory::ClusterInventory;
use pgkeep::catalog::layout::PackName;
use pgkeep::catalog::records::{Manifest, PartRef};
use pgkeep::catalog::table::{FileEntry, FileKind, TableReader};
use pgkeep::pg::ConnectOptions;
use pgkeep::pg::instance::give_to_server_user;
use pgkeep::seal::KeyFile;
use pgkeep::store::Store;
use pgkeep::store::memory::MemoryStore;
use pgkeep::types::{ClusterId, ClusterName};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{TestPg, ok};

/// What a wait in these tests may take at most.
pub const DEADLINE: Duration = Duration::from_secs(120);

pub fn runtime() -> tokio::runtime::Runtime {
    ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build())
}

/// Waits, but not for ever.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("it took too long")
}

pub fn name() -> ClusterName {
    ok("main".parse())
}

pub async fn repository(store: Arc<dyn Store>) -> Repository {
    ok(Repository::create("test", store, &ok(KeyFile::generate())).await)
}

pub async fn in_memory() -> Repository {
    repository(Arc::new(MemoryStore::new())).await
}

pub fn source_of(pg: &TestPg) -> BackupSource {
    BackupSource { conninfo: ok(pg.conninfo().parse()), connect: ConnectOptions::default() }
}

pub fn id_of(pg: &TestPg) -> ClusterId {
    let system = pg.sql("SELECT system_identifier FROM pg_control_system()");
    ClusterId { name: name(), system: ok(system.parse()) }
}

/// An archiver that streams.
pub struct Archiver {
    task: JoinHandle<()>,
    stop: CancellationToken,
}

impl Archiver {
    pub async fn start(pg: &TestPg, repository: &Repository) -> Archiver {
        let BackupSource { conninfo, connect } = source_of(pg);
        let source = Source { conninfo, connect, slot: "pgkeep".to_owned() };
        let options = ArchiveOptions {
            max_delay: Duration::from_millis(100),
            synchronous: false,
            range_interval: Duration::ZERO,
            shutdown_deadline: Duration::from_secs(10),
            fill_rate: None,
        };
        let (repository, stop) = (repository.clone(), CancellationToken::new());
        let status = watch::Sender::new(ClusterStatus::default());
        let mut seen = status.subscribe();
        let until = stop.clone();
        let task = tokio::spawn(async move {
            ok(archive(&source, &repository.into(), &name(), &options, &status, until).await);
        });
        ok(soon(seen.wait_for(|status| matches!(status, ClusterStatus::Streaming(_)))).await);
        Archiver { task, stop }
    }

    pub async fn stop(self) {
        self.stop.cancel();
        ok(soon(self.task).await);
    }
}

pub async fn take(pg: &TestPg, repository: &Repository) -> Result<Manifest, BackupError> {
    take_as(pg, repository, BackupOptions::default()).await
}

pub async fn take_as(pg: &TestPg, repository: &Repository, options: BackupOptions) -> Result<Manifest, BackupError> {
    let progress = watch::Sender::new(BackupProgress::default());
    let source = source_of(pg);
    soon(backup(&source, repository, &name(), &options, &progress, CancellationToken::new())).await
}

/// A backup while an archiver streams.
pub async fn take_archived(pg: &TestPg, repository: &Repository) -> Result<Manifest, BackupError> {
    let archiver = Archiver::start(pg, repository).await;
    let manifest = take(pg, repository).await;
    archiver.stop().await;
    manifest
}

pub async fn read_parts(repository: &Repository, id: &ClusterId, parts: &[PartRef]) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    for part in parts {
        let mut reader = ok(repository.open_part(id, part).await);
        let mut piece = Vec::new();
        while let Some(chunk) = ok(reader.next_chunk().await) {
            piece.extend(chunk);
        }
        pieces.push(piece);
    }
    pieces
}

pub async fn files_of(repository: &Repository, id: &ClusterId, manifest: &Manifest) -> Vec<FileEntry> {
    let mut files = Vec::new();
    for (part, piece) in manifest.tables.iter().zip(read_parts(repository, id, &manifest.tables).await) {
        let mut reader = TableReader::new();
        reader.push(&piece);
        let before = files.len();
        while let Some(file) = ok(reader.next_file()) {
            files.push(file);
        }
        ok(reader.finish());
        assert_eq!((files.len() - before) as u64, part.entries);
    }
    files
}

/// The files' contents, put together from the packs.
pub async fn contents(
    repository: &Repository,
    id: &ClusterId,
    manifest: &Manifest,
    files: &[FileEntry],
) -> BTreeMap<String, Vec<u8>> {
    let mut packs: BTreeMap<PackName, Vec<u8>> = BTreeMap::new();
    for pack in &manifest.packs {
        let reader = ok(repository.open_pack(id, pack).await);
        packs.insert(pack.pack, ok(reader.read(0..pack.plaintext_len).await));
    }
    let mut contents = BTreeMap::new();
    for file in files.iter().filter(|file| file.kind == FileKind::File) {
        let mut bytes = vec![0; file.size as usize];
        for extent in &file.extents {
            let from = extent.at as usize..(extent.at + extent.len) as usize;
            bytes[extent.offset as usize..(extent.offset + extent.len) as usize]
                .copy_from_slice(&packs[&extent.pack][from]);
        }
        assert_eq!(file.crc32c, Some(crc32c::crc32c(&bytes)), "{}", file.path);
        contents.insert(file.path.clone(), bytes);
    }
    contents
}

/// Writes everything into `data`, tablespaces into `spaces`, and the WAL that is needed into pg_wal.
pub async fn unpack(repository: &Repository, id: &ClusterId, manifest: &Manifest, data: &Path, spaces: &Path) {
    let files = files_of(repository, id, manifest).await;
    let contents = contents(repository, id, manifest, &files).await;
    ok(fs::create_dir_all(data.join("pg_tblspc")));
    for space in &manifest.backup.tablespaces {
        let target = spaces.join(space.oid.to_string());
        ok(fs::create_dir_all(&target));
        ok(symlink(&target, data.join("pg_tblspc").join(space.oid.to_string())));
    }
    for file in files.iter().filter(|file| file.kind == FileKind::Directory) {
        ok(fs::create_dir_all(data.join(&file.path)));
    }
    for (path, bytes) in &contents {
        ok(fs::write(data.join(path), bytes));
    }
    let server_manifest = read_parts(repository, id, &manifest.server_manifest).await.concat();
    ok(fs::write(data.join("backup_manifest"), server_manifest));
    let info = &manifest.backup;
    let mut segment = info.start.segment(info.segment_size);
    while segment.start(info.segment_size) < info.stop {
        let read = ok(repository.read_segment(id, info.branch, segment, info.segment_size, None).await);
        let mut bytes = read.bytes;
        bytes.resize(info.segment_size.bytes() as usize, 0);
        ok(fs::write(data.join("pg_wal").join(segment.file_name(info.timeline, info.segment_size)), bytes));
        segment = segment.next();
    }
    ok(give_to_server_user(data));
    ok(give_to_server_user(spaces));
}

pub async fn inventory(repository: &Repository, id: &ClusterId) -> ClusterInventory {
    ok(repository.load(id).await)
}
