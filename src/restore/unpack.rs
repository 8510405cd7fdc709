//! Writes the files of a base backup: the table piece by piece, the packs' ranges in parallel.
//!
//! What always holds: a byte is written only after its frame opened; no path leads out of the data directory and the
//! tablespaces' directories; memory and open files are bounded whatever the backup's size (P8). `pg_control` is written
//! under another name, so that no server starts on what is not finished.
//! Cancellation: dropping the future stops it; a range that is being written then is written to its end.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt, fchown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::task::{JoinHandle, JoinSet};

use super::RestoreError;
use super::files;
use super::jobs::{Job, Jobs, Slice};
use super::place::{Destination, Owner};
use super::sources::{OpenPacks, Sources};
use crate::catalog::records::Manifest;
use crate::catalog::table::{FileEntry, FileKind, TableReader};
use crate::types::BackupLabel;

/// Ranges under way at a time; each holds some 12 MiB.
const WORKERS: usize = 4;
/// After so many bytes the disks are told to begin, while more is written.
const SYNC_EVERY: u64 = 128 << 20;
/// Where `pg_control` waits until everything else is durable.
pub const CONTROL_FILE: &str = "global/pg_control";
pub const WAITING_CONTROL_FILE: &str = "global/pg_control.pgkeep-restore";
/// Files of the old server's life: never restored. Signal files of a standby would win over `recovery.signal`.
const LEFT_OUT: &[&str] =
    &["standby.signal", "recovery.signal", "postmaster.pid", "postmaster.opts", "backup_manifest", "tablespace_map"];

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Files.
    pub files: u64,
    /// Their sizes.
    pub bytes: u64,
    /// The server's group may read its files (`initdb -g`).
    pub group_access: bool,
}

/// A file that is being written.
#[derive(Debug)]
struct Target {
    path: PathBuf,
    size: u64,
    mode: u32,
    /// The offset of its first extent: who writes it sets mode and owner.
    first: u64,
    owner: Option<Owner>,
}

/// Where packs are read from, and those that are open.
struct Packs {
    sources: Arc<Sources>,
    open: OpenPacks,
}

/// Sees to it that the disks work while more is written: nobody else would tell them to before the end.
struct EarlySync {
    dirs: Vec<PathBuf>,
    unsynced: u64,
    running: Option<JoinHandle<Result<(), RestoreError>>>,
}

impl EarlySync {
    fn new(destination: &Destination) -> EarlySync {
        let dirs = std::iter::once(&destination.pgdata).chain(destination.tablespaces.values()).cloned().collect();
        EarlySync { dirs, unsynced: 0, running: None }
    }

    /// So many bytes were written.
    async fn written(&mut self, bytes: u64) -> Result<(), RestoreError> {
        self.unsynced += bytes;
        if self.unsynced < SYNC_EVERY || self.running.as_ref().is_some_and(|running| !running.is_finished()) {
            return Ok(());
        }
        self.finish().await?;
        self.unsynced = 0;
        let dirs = self.dirs.clone();
        let sync = move || dirs.iter().try_for_each(|dir| files::sync_file_system(dir));
        self.running = Some(tokio::task::spawn_blocking(sync));
        Ok(())
    }

    /// What the system says about a failed write it says once: to this sync, and not to the last one.
    async fn finish(&mut self) -> Result<(), RestoreError> {
        let Some(running) = self.running.take() else { return Ok(()) };
        running.await.map_err(|error| RestoreError::Task(error.to_string()))?
    }
}

/// Unpacks everything a manifest names. `progress` gets the number of bytes that were just written.
pub async fn unpack(
    sources: &Arc<Sources>,
    manifest: &Manifest,
    destination: &Destination,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Unpacked, RestoreError> {
    let label = manifest.backup.label;
    let packs = Arc::new(Packs { sources: sources.clone(), open: OpenPacks::default() });
    let mut feeder = Feeder { label, destination, made: HashSet::new(), done: Unpacked::default() };
    feeder.links()?;
    let mut jobs = Jobs::default();
    let mut running: JoinSet<Result<u64, RestoreError>> = JoinSet::new();
    let mut sync = EarlySync::new(destination);
    for part in &manifest.tables {
        let mut table = sources.part(part);
        let name = table.name();
        let unread = |source| RestoreError::Table { name: name.clone(), source };
        let (mut lines, mut entries) = (TableReader::new(), 0);
        while let Some(chunk) = table.next_chunk().await? {
            lines.push(&chunk);
            while let Some(entry) = lines.next_file().map_err(unread)? {
                entries += 1;
                let Some(target) = feeder.entry(&entry)? else { continue };
                for extent in &entry.extents {
                    for job in jobs.push(&target, extent) {
                        sync.written(start(&mut running, &packs, job, progress).await?).await?;
                    }
                }
            }
        }
        lines.finish().map_err(unread)?;
        if entries != part.entries {
            let reason = format!("{name} lists {entries} files, and its manifest says {}", part.entries);
            return Err(RestoreError::Contradiction { label, reason });
        }
    }
    for job in jobs.finish() {
        sync.written(start(&mut running, &packs, job, progress).await?).await?;
    }
    while let Some(written) = running.join_next().await {
        progress(finished(written)?);
    }
    sync.finish().await?;
    feeder.finish(manifest)
}

type Finished = Result<Result<u64, RestoreError>, tokio::task::JoinError>;

fn finished(task: Finished) -> Result<u64, RestoreError> {
    task.map_err(|error| RestoreError::Task(error.to_string()))?
}

/// Starts a job as soon as there is room for it. Returns how many bytes others have written meanwhile.
async fn start(
    running: &mut JoinSet<Result<u64, RestoreError>>,
    packs: &Arc<Packs>,
    job: Job<Target>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<u64, RestoreError> {
    let mut meanwhile = 0;
    while running.len() >= WORKERS {
        let Some(written) = running.join_next().await else { break };
        let written = finished(written)?;
        progress(written);
        meanwhile += written;
    }
    let packs = packs.clone();
    running.spawn(async move {
        let bytes = packs.sources.read_pack(job.pack, job.from, job.to, &packs.open).await?;
        let write = tokio::task::spawn_blocking(move || write(&job, &bytes));
        write.await.map_err(|error| RestoreError::Task(error.to_string()))?
    });
    Ok(meanwhile)
}

/// Writes the bytes of one range to where they go.
fn write(job: &Job<Target>, bytes: &[u8]) -> Result<u64, RestoreError> {
    let mut written = 0;
    let mut open: Option<(&Arc<Target>, File)> = None;
    for slice in &job.slices {
        let Slice { file: target, offset, len, at } = slice;
        let file = match &open {
            Some((known, file)) if Arc::ptr_eq(known, target) => file,
            _ => &open.insert((target, open_file(target, *offset == target.first, *len == target.size)?)).1,
        };
        let from = usize::try_from(at - job.from).unwrap_or(usize::MAX);
        let to = from.saturating_add(usize::try_from(*len).unwrap_or(usize::MAX));
        // invariant: the job's range covers its slices, and exactly that range was read
        let bytes = bytes.get(from..to).ok_or_else(|| RestoreError::Task(format!("{}: short read", job.pack)))?;
        file.write_all_at(bytes, *offset).map_err(|source| RestoreError::io("write", &target.path, source))?;
        written += len;
    }
    Ok(written)
}

/// Opens a file, which another range may have made already. All agree on its size, so its order does not matter.
fn open_file(target: &Target, first: bool, whole: bool) -> Result<File, RestoreError> {
    let failed = |action| move |source| RestoreError::io(action, &target.path, source);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(target.mode & 0o700 | 0o600);
    options.custom_flags(i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0));
    let file = options.open(&target.path).map_err(failed("create"))?;
    if !whole {
        file.set_len(target.size).map_err(failed("set the size of"))?;
    }
    if first {
        if target.mode != 0o600 {
            file.set_permissions(Permissions::from_mode(target.mode)).map_err(failed("set the mode of"))?;
        }
        if let Some(Owner { uid, gid }) = target.owner {
            fchown(&file, Some(uid), Some(gid)).map_err(failed("change the owner of"))?;
        }
    }
    Ok(file)
}

/// Goes through the table: makes directories, and says where files go.
struct Feeder<'a> {
    label: BackupLabel,
    destination: &'a Destination,
    /// Directories that are there, below the data directory as the table has them.
    made: HashSet<String>,
    done: Unpacked,
}

impl Feeder<'_> {
    fn contradiction(&self, reason: String) -> RestoreError {
        RestoreError::Contradiction { label: self.label, reason }
    }

    /// The links of tablespaces, and their directories.
    fn links(&mut self) -> Result<(), RestoreError> {
        let owner = self.destination.owner;
        self.make("pg_tblspc", 0o700)?;
        for (oid, dir) in &self.destination.tablespaces {
            make_dir(dir, 0o700, owner)?;
            let link = self.destination.pgdata.join(format!("pg_tblspc/{oid}"));
            symlink(dir, &link).map_err(|source| RestoreError::io("make the link", &link, source))?;
            give(&link, owner)?;
            self.made.insert(format!("pg_tblspc/{oid}"));
        }
        Ok(())
    }

    /// Where a path of the table lies; refuses one that could lead elsewhere.
    fn path(&self, path: &str) -> Result<PathBuf, RestoreError> {
        let bad = |part: &str| part.is_empty() || part == "." || part == ".." || part.contains('\0');
        if path.split('/').any(bad) {
            return Err(
                self.contradiction(format!("its table names {path:?}, which is no path within a data directory"))
            );
        }
        if let Some((oid, rest)) = path.strip_prefix("pg_tblspc/").and_then(|rest| rest.split_once('/'))
            && let Some(dir) = oid.parse().ok().and_then(|oid: u32| self.destination.tablespaces.get(&oid))
        {
            return Ok(dir.join(rest));
        }
        Ok(self.destination.pgdata.join(path))
    }

    /// Makes a directory and those above it.
    fn make(&mut self, path: &str, mode: u32) -> Result<PathBuf, RestoreError> {
        let place = self.path(path)?;
        if self.made.contains(path) {
            return Ok(place);
        }
        if let Some((above, _)) = path.rsplit_once('/') {
            self.make(above, mode)?;
        }
        make_dir(&place, mode, self.destination.owner)?;
        self.made.insert(path.to_owned());
        Ok(place)
    }

    /// Does what an entry says, but for bytes: those of the file it returns are still to come.
    fn entry(&mut self, entry: &FileEntry) -> Result<Option<Arc<Target>>, RestoreError> {
        let FileEntry { path, kind, size, mode, link, extents, .. } = entry;
        let mode = mode & 0o777;
        if path == "global" {
            self.done.group_access = mode & 0o050 == 0o050;
        }
        match (kind, link) {
            (FileKind::Directory, _) => {
                let place = self.make(path, mode)?;
                // It may have been made for a file in it, before its own mode was known.
                let set = fs::set_permissions(&place, Permissions::from_mode(mode));
                set.map_err(|source| RestoreError::io("set the mode of", &place, source))?;
                return Ok(None);
            }
            (FileKind::Link, Some(to)) => {
                let place = self.path(path)?;
                if let Some((above, _)) = path.rsplit_once('/') {
                    self.make(above, 0o700)?;
                }
                symlink(to, &place).map_err(|source| RestoreError::io("make the link", &place, source))?;
                give(&place, self.destination.owner)?;
                return Ok(None);
            }
            (FileKind::Link, None) => return Err(self.contradiction(format!("its link {path:?} points nowhere"))),
            (FileKind::File, _) => {}
        }
        self.done.files += 1;
        self.done.bytes += size;
        if LEFT_OUT.contains(&path.as_str()) {
            return Ok(None);
        }
        let mut end = 0;
        for extent in extents {
            let to = extent
                .offset
                .checked_add(extent.len)
                .filter(|to| *to <= *size && extent.at.checked_add(extent.len).is_some());
            let (true, Some(to)) = (extent.offset >= end, to) else {
                return Err(self.contradiction(format!("the extents of {path:?} overlap or go beyond its end")));
            };
            end = to;
        }
        let place = self.path(if path == CONTROL_FILE { WAITING_CONTROL_FILE } else { path })?;
        if let Some((above, _)) = path.rsplit_once('/') {
            self.make(above, 0o700)?;
        }
        let first = extents.first().map_or(0, |extent| extent.offset);
        let target = Target { path: place, size: *size, mode, first, owner: self.destination.owner };
        if extents.is_empty() {
            open_file(&target, true, false)?;
            return Ok(None);
        }
        Ok(Some(Arc::new(target)))
    }

    fn finish(self, manifest: &Manifest) -> Result<Unpacked, RestoreError> {
        let info = &manifest.backup;
        if (self.done.files, self.done.bytes) != (info.files, info.bytes) {
            let Unpacked { files, bytes, .. } = self.done;
            return Err(self.contradiction(format!(
                "its tables list {files} files of {bytes} bytes, and its manifest says {} of {}",
                info.files, info.bytes
            )));
        }
        Ok(self.done)
    }
}

/// Makes a directory, or takes the one that is there.
pub(super) fn make_dir(path: &Path, mode: u32, owner: Option<Owner>) -> Result<(), RestoreError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(source) => return Err(RestoreError::io("make the directory", path, source)),
    }
    let set = fs::set_permissions(path, Permissions::from_mode(mode));
    set.map_err(|source| RestoreError::io("set the mode of", path, source))?;
    give(path, owner)
}

/// Gives a file, directory or link to its owner.
pub(super) fn give(path: &Path, owner: Option<Owner>) -> Result<(), RestoreError> {
    let Some(Owner { uid, gid }) = owner else { return Ok(()) };
    lchown(path, Some(uid), Some(gid)).map_err(|source| RestoreError::io("change the owner of", path, source))
}
