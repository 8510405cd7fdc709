//! The server's base backup as it streams by: tar in, files cut, tables written, everything checked.
//!
//! What always holds: of every archive each byte went through the strict reader, each file was cut and its CRC-32C taken
//! as it arrived; nothing of a file is held but the extents of the one that is arriving, and those of the parent's.
//!
//! An equal tag is believed, and the belief is tested where it can be: a file whose every block has the parent's tag has
//! the parent's CRC-32C, too, or there is no backup. What keeps a referenced block where it is: the parent's pack was
//! listed after the `start` that pins it, is listed again before the manifest is put, and opens only under its header.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;

use super::BackupError;
use super::cut::{BLOCK, Counts, Cutter};
use super::objects::{LIMITS, Objects, Stored};
use super::parent::{Parent, ParentFile};
use super::pieces;
use super::server_manifest::ManifestChecker;
use super::tags::{TAG, TagsWriter};
use crate::catalog::layout::PartKind;
use crate::catalog::records::{PackRef, TablespaceInfo};
use crate::catalog::table::{FileEntry, FileKind, TableWriter};
use crate::pg::Tablespace;
use crate::pg::control_file::{CONTROL_FILE_BYTES, ControlFile};
use crate::pg::tar::{EntryKind, TarEntry, TarEvent, TarReader};
use crate::types::{Lsn, SystemId, TimelineId};

const CONTROL_FILE: &str = "global/pg_control";
/// What was received, durable except for the record that says so.
#[derive(Debug)]
pub(super) struct Received {
    pub stored: Stored,
    pub control: ControlFile,
    pub tablespaces: Vec<TablespaceInfo>,
    pub files: u64,
    pub bytes: u64,
    /// The parent's packs that are referenced.
    pub referenced: Vec<PackRef>,
    pub counts: Counts,
}

/// Takes the events of a base backup that carry data.
pub(super) struct Receiver {
    objects: Objects,
    cutter: Cutter,
    parent: Option<Parent>,
    pieces: pieces::Limits,
    checker: ManifestChecker,
    table: TableWriter,
    tags: TagsWriter,
    server_manifest: Vec<u8>,
    announced: Vec<Tablespace>,
    archive: Option<Archive>,
    file: Option<File>,
    control: Vec<u8>,
    /// Where the links of tablespaces point, by oid.
    links: BTreeMap<u32, String>,
    files: u64,
    bytes: u64,
    counts: Counts,
}

struct Archive {
    tablespace: Option<u32>,
    tar: TarReader,
}

impl Archive {
    fn name(&self) -> String {
        match self.tablespace {
            None => "the archive of the data directory".to_owned(),
            Some(oid) => format!("the archive of tablespace {oid}"),
        }
    }
}

/// The file that is arriving.
struct File {
    path: String,
    size: u64,
    mode: u32,
    mtime: i64,
    /// Blocks whose tags were written down.
    tagged: u64,
    /// Tags that were not yet.
    tags: Vec<u8>,
    /// What the parent has of it.
    known: Option<ParentFile>,
    /// Blocks whose tags the parent has given.
    compared: u64,
}

impl Receiver {
    pub fn new(objects: Objects, cutter: Cutter, parent: Option<Parent>, announced: Vec<Tablespace>) -> Receiver {
        Receiver {
            objects,
            cutter,
            parent,
            pieces: pieces::Limits::OURS,
            checker: ManifestChecker::new(),
            table: TableWriter::new(),
            tags: TagsWriter::new(),
            server_manifest: Vec::new(),
            announced,
            archive: None,
            file: None,
            control: Vec::new(),
            links: BTreeMap::new(),
            files: 0,
            bytes: 0,
            counts: Counts::default(),
        }
    }

    /// Bytes of files so far, of sealed objects, and what became of the files that are whole.
    pub fn progress(&self) -> (u64, u64, Counts) {
        (self.bytes, self.objects.stored_bytes(), self.counts)
    }

    /// An archive begins.
    pub fn archive(&mut self, tablespace: Option<u32>) -> Result<(), BackupError> {
        self.end_archive()?;
        self.archive = Some(Archive { tablespace, tar: TarReader::new() });
        Ok(())
    }

    fn end_archive(&mut self) -> Result<(), BackupError> {
        let Some(archive) = self.archive.take() else { return Ok(()) };
        archive.tar.finish().map_err(|source| BackupError::Archive { archive: archive.name(), source })
    }

    /// The next bytes of the archive.
    pub async fn data(&mut self, bytes: Bytes) -> Result<(), BackupError> {
        let Some(archive) = &mut self.archive else {
            return Err(BackupError::unexpected("data came before any archive"));
        };
        archive.tar.push(bytes);
        loop {
            let Some(archive) = &mut self.archive else { return Ok(()) };
            let event = archive.tar.next_event();
            let event = event.map_err(|source| BackupError::Archive { archive: archive.name(), source })?;
            match event {
                None => return Ok(()),
                Some(TarEvent::Entry(entry)) => {
                    let tablespace = archive.tablespace;
                    self.entry(tablespace, entry).await?;
                }
                Some(TarEvent::Data(bytes)) => self.file_data(&bytes).await?,
                Some(TarEvent::End) => {}
            }
        }
    }

    async fn entry(&mut self, tablespace: Option<u32>, entry: TarEntry) -> Result<(), BackupError> {
        let path = match tablespace {
            None => text(&entry.path)?,
            Some(oid) => format!("pg_tblspc/{oid}/{}", text(&entry.path)?),
        };
        let (mode, mtime) = (entry.mode, i64::try_from(entry.mtime).unwrap_or(i64::MAX));
        let plain =
            |path, kind, link| FileEntry { path, kind, size: 0, mode, mtime, crc32c: None, link, extents: Vec::new() };
        match entry.kind {
            EntryKind::Directory => self.listed(&plain(path, FileKind::Directory, None)).await,
            EntryKind::Symlink { target } => {
                let target = text(&target)?;
                match path.strip_prefix("pg_tblspc/").and_then(|oid| oid.parse().ok()) {
                    Some(oid) => {
                        self.links.insert(oid, target);
                        Ok(())
                    }
                    None => self.listed(&plain(path, FileKind::Link, Some(target))).await,
                }
            }
            EntryKind::File { size } => {
                let mut known = if size == 0 { None } else { self.known(&path, size).await };
                if let Some(known) = &mut known {
                    self.cutter.known(std::mem::take(&mut known.extents));
                }
                if self.pieces.begins_before(size) {
                    self.put_tags().await?;
                }
                let (tagged, tags, compared) = (0, Vec::new(), 0);
                self.file = Some(File { path, size, mode, mtime, tagged, tags, known, compared });
                if size == 0 { self.end_file().await } else { Ok(()) }
            }
        }
    }

    /// What the parent has of a file that begins.
    async fn known(&mut self, path: &str, size: u64) -> Option<ParentFile> {
        let parent = self.parent.as_mut()?;
        match parent.file(path, self.bytes.saturating_add(size)).await {
            Ok(known) => known,
            Err(error) => {
                parent.leave(&error);
                None
            }
        }
    }

    /// Brings the parent's tags of the blocks that `coming` bytes are of.
    async fn compare_with(&mut self, coming: usize) {
        let (Some(file), Some(parent)) = (&mut self.file, &mut self.parent) else { return };
        let Some(known) = &file.known else { return };
        let to = (self.cutter.file_len() + coming as u64).div_ceil(BLOCK as u64).min(known.blocks());
        while file.compared < to {
            match parent.tags(known, file.compared).await {
                Ok(tags) => {
                    let count = (tags.len() / TAG) as u64;
                    self.cutter.known_tags(file.compared, tags);
                    file.compared += count; // never 0
                }
                Err(error) => {
                    parent.leave(&error);
                    self.cutter.forget();
                    file.known = None;
                    return;
                }
            }
        }
    }

    async fn file_data(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        while let Some(room) = self.objects.spare() {
            self.cutter.recycle(room);
        }
        self.compare_with(bytes.len()).await;
        self.cutter.push(bytes);
        self.bytes += bytes.len() as u64;
        self.put_chunks().await?;
        let Some(file) = &mut self.file else {
            return Err(BackupError::unexpected("data came outside of any file"));
        };
        if file.path == CONTROL_FILE && self.control.len() < CONTROL_FILE_BYTES {
            self.control.extend_from_slice(bytes);
        }
        let at_once = self.pieces.tags_at_once;
        if file.tags.len() + self.cutter.tags_len() >= at_once {
            file.tags.extend(self.cutter.take_tags());
            while let Some(tags) = file.tags.get(..at_once) {
                self.tags.push(&file.path, file.tagged, tags);
                file.tags.drain(..at_once); // invariant: as many were there
                file.tagged += (at_once / TAG) as u64;
            }
            if self.tags.len() >= self.pieces.max {
                self.put_tags().await?;
            }
        }
        let whole = self.file.as_ref().is_some_and(|file| file.size == self.cutter.file_len());
        if whole { self.end_file().await } else { Ok(()) }
    }

    async fn end_file(&mut self) -> Result<(), BackupError> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        let cut = self.cutter.end_file();
        self.put_chunks().await?;
        if let Some(known) = file.known.filter(|known| cut.same && known.size == cut.size)
            && known.crc32c.is_some_and(|crc| crc != cut.crc32c)
            && let Some(parent) = &self.parent
        {
            return Err(BackupError::Belief { path: file.path, parent: parent.label() });
        }
        if let Some(parent) = &mut self.parent {
            cut.extents.iter().for_each(|extent| parent.reference(extent.pack, extent.len));
        }
        self.counts += cut.counts;
        file.tags.extend(self.cutter.take_tags());
        self.tags.push(&file.path, file.tagged, &file.tags);
        let tags = usize::try_from(cut.size.div_ceil(BLOCK as u64)).unwrap_or(usize::MAX).saturating_mul(TAG);
        if self.pieces.ends_behind(&file.path, tags, self.tags.len()) {
            self.put_tags().await?;
        }
        self.checker.arrived(&file.path, cut.size, cut.crc32c);
        self.files += 1;
        let File { path, mode, mtime, .. } = file;
        let (size, crc32c, extents) = (cut.size, Some(cut.crc32c), cut.extents);
        self.listed(&FileEntry { path, kind: FileKind::File, size, mode, mtime, crc32c, link: None, extents }).await
    }

    async fn listed(&mut self, entry: &FileEntry) -> Result<(), BackupError> {
        let before = self.table.len();
        let pushed = self.table.push(entry);
        pushed.map_err(|error| BackupError::unexpected(format!("{} cannot be listed: {error}", entry.path)))?;
        let len = self.table.len();
        if self.pieces.ends_behind(&entry.path, len - before, len) { self.put_table().await } else { Ok(()) }
    }

    async fn put_chunks(&mut self) -> Result<(), BackupError> {
        while let Some(chunk) = self.cutter.take_chunk() {
            self.objects.chunk(chunk).await?;
        }
        Ok(())
    }

    async fn put_table(&mut self) -> Result<(), BackupError> {
        if self.table.is_empty() {
            return Ok(());
        }
        let table = std::mem::take(&mut self.table);
        let entries = table.entries();
        self.put_piece(PartKind::Files, table.finish(), entries).await
    }

    async fn put_tags(&mut self) -> Result<(), BackupError> {
        if self.tags.is_empty() {
            return Ok(());
        }
        let tags = std::mem::take(&mut self.tags);
        let blocks = tags.blocks();
        self.put_piece(PartKind::Tags, tags.finish(), blocks).await
    }

    /// Puts a piece, unless the parent has the same one.
    async fn put_piece(&mut self, kind: PartKind, piece: Vec<u8>, entries: u64) -> Result<(), BackupError> {
        let same = self.parent.as_ref().and_then(|parent| parent.same_piece(kind, &piece));
        match same.filter(|part| part.entries == entries).cloned() {
            Some(part) => self.objects.shared_part(part).await,
            None => self.objects.part(kind, piece, entries).await,
        }
    }

    /// The next bytes of the server's manifest. All archives are over.
    pub async fn manifest(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        self.end_archive()?; // once: the first piece finds one
        self.checker.push(bytes)?;
        self.server_manifest.extend_from_slice(bytes);
        if self.server_manifest.len() < LIMITS.part_bytes {
            return Ok(());
        }
        let piece = std::mem::take(&mut self.server_manifest);
        self.objects.part(PartKind::ServerManifest, piece, 0).await
    }

    /// All came. Checks it against what the server says and waits until it is durable.
    pub async fn finish(
        mut self,
        system: SystemId,
        timeline: TimelineId,
        (start, stop): (Lsn, Lsn),
    ) -> Result<Received, BackupError> {
        let checker = std::mem::take(&mut self.checker);
        let said = checker.finish()?;
        if said.system.is_some_and(|said| said != system) {
            return Err(BackupError::unexpected("its manifest has another system identifier than the server"));
        }
        let range = said.wal_ranges.as_slice();
        if !matches!(range, [range] if range.timeline == timeline && range.start == start && range.end == stop) {
            return Err(BackupError::unexpected(format!(
                "its manifest needs the WAL {range:?}, and the server said {start} to {stop} on timeline {timeline}"
            )));
        }
        let control = ControlFile::parse(&self.control)?;
        if control.system != system {
            return Err(BackupError::unexpected(format!(
                "its pg_control has system identifier {}, and the server said {system}",
                control.system
            )));
        }
        let tablespaces = self.tablespaces().await?;
        if !self.server_manifest.is_empty() {
            let piece = std::mem::take(&mut self.server_manifest);
            self.objects.part(PartKind::ServerManifest, piece, 0).await?;
        }
        let (files, bytes, counts) = (self.files, self.bytes, self.counts);
        let (stored, referenced) = self.store_rest().await?;
        Ok(Received { stored, control, tablespaces, files, bytes, referenced, counts })
    }

    /// Puts what is left and waits for all of it. What was stored, and the parent's packs that are referenced.
    async fn store_rest(mut self) -> Result<(Stored, Vec<PackRef>), BackupError> {
        self.cutter.finish();
        self.put_chunks().await?;
        self.put_table().await?;
        self.put_tags().await?;
        let stored = self.objects.finish().await?;
        Ok((stored, self.parent.map(Parent::into_referenced).unwrap_or_default()))
    }

    /// The tablespaces that have a link. One without lies in the data directory itself (`allow_in_place_tablespaces`):
    /// its directory is one like any other.
    async fn tablespaces(&mut self) -> Result<Vec<TablespaceInfo>, BackupError> {
        let oids: Vec<u32> = self.announced.iter().filter_map(|tablespace| tablespace.oid).collect();
        for oid in oids.iter().filter(|oid| !self.links.contains_key(oid)) {
            let path = format!("pg_tblspc/{oid}");
            let (kind, mode) = (FileKind::Directory, 0o700);
            let entry =
                FileEntry { path, kind, size: 0, mode, mtime: 0, crc32c: None, link: None, extents: Vec::new() };
            // Behind what lies in it: a reader of the table makes directories first, or as it needs them.
            if let Err(error) = self.table.push(&entry) {
                return Err(BackupError::unexpected(error.to_string()));
            }
        }
        if let Some(oid) = self.links.keys().find(|oid| !oids.contains(oid)) {
            return Err(BackupError::unexpected(format!("there is a link of tablespace {oid}, which was not sent")));
        }
        let links = std::mem::take(&mut self.links);
        Ok(links.into_iter().map(|(oid, location)| TablespaceInfo { oid, location }).collect())
    }
}

fn text(path: &Path) -> Result<String, BackupError> {
    path.to_str().map(str::to_owned).ok_or_else(|| BackupError::Name { path: path.display().to_string() })
}

#[cfg(test)]
mod tests;
