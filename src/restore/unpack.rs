//! Writes the files of a base backup: the table entry by entry, the packs' ranges in parallel.
//!
//! ```text
//! table ─► feeder (directories, links) ─► compare, with --delta ─► jobs ─► fetch, open, write      (in parallel)
//! ```
//!
//! What always holds: a byte is written only after its frame opened; no path leads out of the data directory and the
//! tablespaces' directories; memory and open files are bounded whatever the backup's size (P8). `pg_control` is written
//! under another name, so that no server starts on what is not finished.
//! Cancellation: dropping the future stops it; a range that is being written then is written to its end.

use std::collections::{HashSet, VecDeque};
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tokio::task::{JoinHandle, JoinSet};

use super::compare::{Compared, Part, compare};
use super::jobs::{Job, Jobs};
use super::marker::UNFINISHED;
use super::place::{Destination, Owner};
use super::sources::{OpenPacks, Sources};
use super::spent::Stage;
use super::table::Table;
use super::tags::Tags;
use super::target::{CONTROL_FILE, Target, WAITING_CONTROL_FILE, write};
use super::{RestoreError, files};
use crate::catalog::records::Manifest;
use crate::catalog::table::{Extent, FileEntry, FileKind};
use crate::catalog::tags::{BLOCK, TAG, Tagger};
use crate::types::BackupLabel;

/// Ranges under way at a time; each holds some 12 MiB.
const WORKERS: usize = 4;
/// Comparisons under way at a time; their results are taken in the table's order.
const COMPARING: usize = 4;
/// Small files are compared together, up to so many bytes and files.
const UNIT_BYTES: u64 = 16 << 20;
const UNIT_FILES: usize = 256;
/// A larger file is compared in parts of so many bytes: its tags are never in memory as a whole.
const PART_BYTES: u64 = 64 << 20;
/// Files without content are made so many at a time.
const MADE_AT_ONCE: usize = 256;
/// After so many bytes the disks are told to begin, while more is written.
const SYNC_EVERY: u64 = 128 << 20;
/// Files of the old server's life, and ours if it was restored once: never restored. Signal files of a standby would win
/// over `recovery.signal`.
const LEFT_OUT: &[&str] = &[
    "standby.signal",
    "recovery.signal",
    "postmaster.pid",
    "postmaster.opts",
    "backup_manifest",
    "tablespace_map",
    UNFINISHED,
    WAITING_CONTROL_FILE,
];

/// Whether a file of the table is not restored.
pub(super) fn is_left_out(path: &str) -> bool {
    LEFT_OUT.contains(&path)
}

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
        joined(running.await)
    }
}

/// Unpacks everything a manifest names. `progress` gets the number of bytes that were just written, or found to be there.
pub async fn unpack(
    sources: &Arc<Sources>,
    manifest: &Manifest,
    destination: &Destination,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Unpacked, RestoreError> {
    let label = manifest.backup.label;
    let mut feeder = Feeder { label, destination, made: HashSet::new(), done: Unpacked::default() };
    feeder.links()?;
    let mut filler = Filler {
        sources,
        jobs: Jobs::default(),
        empty: Vec::new(),
        packs: Arc::new(Packs { sources: sources.clone(), open: OpenPacks::default() }),
        running: JoinSet::new(),
        sync: EarlySync::new(destination),
        progress,
    };
    let mut comparer = match sources.tagger() {
        Some(tagger) if destination.delta => Some(Comparer {
            tags: Tags::new(sources, manifest),
            tagger,
            unit: Vec::new(),
            unit_bytes: 0,
            running: VecDeque::new(),
        }),
        _ => None,
    };
    let mut table = Table::new(sources, manifest);
    while let Some(entry) = table.next().await? {
        let target = feeder.entry(&entry)?;
        let wanted = destination.only.as_ref().is_none_or(|only| only.wants(&entry.path));
        match (&mut comparer, target) {
            (Some(comparer), target) => comparer.file(&entry, target, wanted, &mut filler).await?,
            (None, Some(target)) if wanted => filler.extents(target, &entry.extents).await?,
            (None, Some(target)) => filler.empty(target).await?,
            (None, None) => {}
        }
        if entry.kind == FileKind::File {
            sources.spent().file();
        }
    }
    if let Some(comparer) = comparer {
        comparer.finish(&mut filler).await?;
    }
    filler.finish().await?;
    feeder.finish(manifest)
}

fn joined<T>(task: Result<Result<T, RestoreError>, tokio::task::JoinError>) -> Result<T, RestoreError> {
    task.map_err(|error| RestoreError::Task(error.to_string()))?
}

/// Brings the packs' bytes into the files, and makes those that need none.
struct Filler<'a> {
    sources: &'a Arc<Sources>,
    jobs: Jobs<Target>,
    /// Files without content that wait for others.
    empty: Vec<Arc<Target>>,
    packs: Arc<Packs>,
    /// Each returns how many bytes it wrote.
    running: JoinSet<Result<u64, RestoreError>>,
    sync: EarlySync,
    progress: &'a (dyn Fn(u64) + Sync),
}

impl Filler<'_> {
    /// Fills a file, or the part of it that these extents hold.
    async fn extents(&mut self, target: Arc<Target>, extents: &[Extent]) -> Result<(), RestoreError> {
        if extents.is_empty() {
            return self.empty(target).await;
        }
        self.wanted(&target, extents).await
    }

    async fn wanted(&mut self, target: &Arc<Target>, extents: &[Extent]) -> Result<(), RestoreError> {
        for extent in extents {
            for job in self.jobs.push(target, extent) {
                self.fetch(job).await?;
            }
        }
        Ok(())
    }

    /// Makes a file without content.
    async fn empty(&mut self, target: Arc<Target>) -> Result<(), RestoreError> {
        self.empty.push(target);
        if self.empty.len() >= MADE_AT_ONCE { self.make_empty().await } else { Ok(()) }
    }

    async fn make_empty(&mut self) -> Result<(), RestoreError> {
        self.room().await?;
        let (targets, sources) = (std::mem::take(&mut self.empty), self.sources.clone());
        self.running.spawn_blocking(move || {
            let begun = Instant::now();
            targets.iter().try_for_each(|target| target.make_empty())?;
            sources.spent().since(Stage::Write, begun);
            Ok(0)
        });
        Ok(())
    }

    async fn fetch(&mut self, job: Job<Target>) -> Result<(), RestoreError> {
        self.room().await?;
        let packs = self.packs.clone();
        self.running.spawn(async move {
            let bytes = packs.sources.read_pack(job.pack, job.from, job.to, &packs.open).await?;
            let task = tokio::task::spawn_blocking(move || {
                let begun = Instant::now();
                let written = write(&job, &bytes)?;
                packs.sources.spent().since(Stage::Write, begun);
                packs.sources.spent().fetched_more(written);
                Ok(written)
            });
            joined(task.await)
        });
        Ok(())
    }

    /// Waits until there is room for one more.
    async fn room(&mut self) -> Result<(), RestoreError> {
        while self.running.len() >= WORKERS {
            let Some(written) = self.running.join_next().await else { break };
            let written = joined(written)?;
            (self.progress)(written);
            self.sync.written(written).await?;
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(), RestoreError> {
        for job in std::mem::take(&mut self.jobs).finish() {
            self.fetch(job).await?;
        }
        self.make_empty().await?;
        while let Some(written) = self.running.join_next().await {
            (self.progress)(joined(written)?);
        }
        self.sync.finish().await
    }
}

/// Compares what is there with the backup, some files ahead of what is fetched.
struct Comparer<'a> {
    tags: Tags<'a>,
    tagger: Tagger,
    unit: Vec<Part>,
    unit_bytes: u64,
    running: VecDeque<JoinHandle<Result<Vec<Compared>, RestoreError>>>,
}

impl Comparer<'_> {
    /// Takes a file of the table; without a target it is not restored. One that is not `wanted` gets no content.
    async fn file(
        &mut self,
        entry: &FileEntry,
        target: Option<Arc<Target>>,
        wanted: bool,
        filler: &mut Filler<'_>,
    ) -> Result<(), RestoreError> {
        if entry.kind != FileKind::File {
            return Ok(());
        }
        let extents: Arc<[Extent]> = entry.extents.as_slice().into();
        // Several parts of a file that are compared at a time must find it as it will stay.
        let new = match &target {
            Some(target) if wanted && entry.size > PART_BYTES => {
                let target = target.clone();
                joined(tokio::task::spawn_blocking(move || target.take_over().map(|(_, new)| new)).await)?
            }
            _ => false,
        };
        let mut from = 0;
        loop {
            let tags = if from < entry.size { self.tags.of(&entry.path, from / BLOCK as u64).await } else { None };
            let tags = tags.filter(|tags| tags.len() >= TAG);
            // Tags come for so many blocks at a time; without them the parts are as large as they may be.
            let known = tags.as_ref().map_or(u64::MAX, |tags| (tags.len() / TAG) as u64 * BLOCK as u64);
            let to = entry.size.min(from.saturating_add(known.min(PART_BYTES)));
            if let Some(target) = target.as_ref().filter(|_| wanted) {
                let part = Part { target: target.clone(), extents: extents.clone(), bytes: from..to, tags, new };
                self.part(part, filler).await?;
            }
            from = to;
            if from >= entry.size {
                break;
            }
        }
        match target {
            Some(target) if !wanted => filler.empty(target).await,
            _ => Ok(()),
        }
    }

    async fn part(&mut self, part: Part, filler: &mut Filler<'_>) -> Result<(), RestoreError> {
        self.unit_bytes += part.bytes.end - part.bytes.start;
        self.unit.push(part);
        if self.unit_bytes >= UNIT_BYTES || self.unit.len() >= UNIT_FILES {
            self.start(filler).await?;
        }
        Ok(())
    }

    /// Begins to compare what waits, as soon as there is room.
    async fn start(&mut self, filler: &mut Filler<'_>) -> Result<(), RestoreError> {
        while self.running.len() >= COMPARING {
            self.take(filler).await?;
        }
        let (unit, tagger, sources) = (std::mem::take(&mut self.unit), self.tagger.clone(), filler.sources.clone());
        self.unit_bytes = 0;
        self.running.push_back(tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            let mut buffer = Vec::new();
            let compared: Result<Vec<Compared>, _> =
                unit.into_iter().map(|part| compare(part, &tagger, &mut buffer)).collect();
            sources.spent().since(Stage::Compare, begun);
            compared
        }));
        Ok(())
    }

    /// Waits for the oldest comparison and has fetched what differs.
    async fn take(&mut self, filler: &mut Filler<'_>) -> Result<(), RestoreError> {
        let Some(oldest) = self.running.pop_front() else { return Ok(()) };
        for Compared { target, wanted, settled, equal } in joined(oldest.await)? {
            filler.sources.spent().equal_more(equal);
            (filler.progress)(settled);
            filler.wanted(&target, &wanted).await?;
        }
        Ok(())
    }

    async fn finish(mut self, filler: &mut Filler<'_>) -> Result<(), RestoreError> {
        self.start(filler).await?;
        while !self.running.is_empty() {
            self.take(filler).await?;
        }
        Ok(())
    }
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
            make_link(dir, &self.destination.pgdata.join(format!("pg_tblspc/{oid}")), owner)?;
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
    fn make(&mut self, path: &str, mode: u32) -> Result<(), RestoreError> {
        if self.made.contains(path) {
            return Ok(());
        }
        let place = self.path(path)?;
        if let Some((above, _)) = path.rsplit_once('/') {
            self.make(above, mode)?;
        }
        make_dir(&place, mode, self.destination.owner)?;
        self.made.insert(path.to_owned());
        Ok(())
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
                self.make(path, mode)?;
                // It may have been made for a file in it, before its own mode was known.
                let place = self.path(path)?;
                let set = fs::set_permissions(&place, Permissions::from_mode(mode));
                set.map_err(|source| RestoreError::io("set the mode of", &place, source))?;
                return Ok(None);
            }
            (FileKind::Link, Some(to)) => {
                let place = self.path(path)?;
                if let Some((above, _)) = path.rsplit_once('/') {
                    self.make(above, 0o700)?;
                }
                make_link(Path::new(to), &place, self.destination.owner)?;
                return Ok(None);
            }
            (FileKind::Link, None) => return Err(self.contradiction(format!("its link {path:?} points nowhere"))),
            (FileKind::File, _) => {}
        }
        self.done.files += 1;
        self.done.bytes += size;
        if is_left_out(path) {
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
        Ok(Some(Arc::new(Target::new(place, *size, mode, self.destination.owner))))
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

/// Makes a link, or takes the one that is there if it leads to the same.
fn make_link(to: &Path, link: &Path, owner: Option<Owner>) -> Result<(), RestoreError> {
    match fs::read_link(link) {
        Ok(there) if there == to => return give(link, owner),
        Ok(_) => fs::remove_file(link).map_err(|source| RestoreError::io("remove", link, source))?,
        Err(_) => {}
    }
    symlink(to, link).map_err(|source| RestoreError::io("make the link", link, source))?;
    give(link, owner)
}

/// Gives a file, directory or link to its owner.
pub(super) fn give(path: &Path, owner: Option<Owner>) -> Result<(), RestoreError> {
    let Some(Owner { uid, gid }) = owner else { return Ok(()) };
    lchown(path, Some(uid), Some(gid)).map_err(|source| RestoreError::io("change the owner of", path, source))
}
