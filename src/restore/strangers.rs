//! What the old directory has and the base backup has not: it goes away.
//!
//! What always holds: only what lies in the data directory, and in the server's own directories within those of its
//! tablespaces, is removed. Of a link the link goes, never what it leads to. Afterwards no path below leads elsewhere but
//! by the links of tablespaces. Memory: some 16 bytes per file of the backup.
//! Crash: some strangers are gone; the next restore removes the rest.

use std::collections::HashSet;
use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher;
use std::io;
use std::path::Path;

use super::RestoreError;
use super::marker::UNFINISHED;
use super::place::Destination;
use super::sources::Sources;
use super::table::Table;
use super::target::{CONTROL_FILE, WAITING_CONTROL_FILE};
use super::unpack::is_left_out;
use crate::catalog::records::Manifest;
use crate::catalog::table::{FileEntry, FileKind};

/// What a base backup has, by path and kind. Paths are kept as hashes under a key of this process: two that meet would
/// let a stranger stay.
#[derive(Debug, Default)]
pub struct Known {
    seen: HashSet<u64>,
    hasher: RandomState,
    /// The directory of the file before.
    above: String,
}

impl Known {
    /// Goes through the tables: they are read to their end before anything is changed.
    pub async fn read(sources: &Sources, manifest: &Manifest) -> Result<Known, RestoreError> {
        let mut known = Known::default();
        known.add(FileKind::Directory, "pg_tblspc");
        known.add(FileKind::Directory, "pg_wal");
        known.add(FileKind::File, UNFINISHED);
        let mut table = Table::new(sources, manifest);
        while let Some(entry) = table.next().await? {
            known.entry(&entry);
        }
        Ok(known)
    }

    fn entry(&mut self, entry: &FileEntry) {
        let path = entry.path.as_str();
        // pg_wal is emptied, whatever the backup has there; a file that is left out is not a part of it.
        if entry.kind != FileKind::Directory && (path.starts_with("pg_wal/") || is_left_out(path)) {
            return;
        }
        self.add(entry.kind, if path == CONTROL_FILE { WAITING_CONTROL_FILE } else { path });
        let above = path.rsplit_once('/').map_or("", |(above, _)| above);
        if above == self.above {
            return;
        }
        self.above = above.to_owned();
        let mut above = above;
        while !above.is_empty() {
            self.add(FileKind::Directory, above);
            above = above.rsplit_once('/').map_or("", |(above, _)| above);
        }
    }

    fn add(&mut self, kind: FileKind, path: &str) {
        self.seen.insert(self.key(kind, path));
    }

    fn has(&self, kind: FileKind, path: &str) -> bool {
        self.seen.contains(&self.key(kind, path))
    }

    fn key(&self, kind: FileKind, path: &str) -> u64 {
        self.hasher.hash_one((kind as u8, path))
    }
}

/// What was removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Files, links, and directories with all that was in them.
    pub removed: u64,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Removes what the backup does not have.
pub fn sweep(destination: &Destination, mut known: Known) -> Result<Swept, RestoreError> {
    let mut swept = Swept::default();
    for oid in destination.tablespaces.keys() {
        known.add(FileKind::Link, &format!("pg_tblspc/{oid}"));
    }
    walk(&destination.pgdata, "", &known, &mut swept)?;
    for (oid, dir) in &destination.tablespaces {
        let below = format!("pg_tblspc/{oid}/");
        for entry in entries(dir)? {
            let (name, kind) = entry?;
            let Some(path) = name.to_str().map(|name| format!("{below}{name}")) else { continue };
            match kind {
                Some(FileKind::Directory) if known.has(FileKind::Directory, &path) => {
                    walk(&dir.join(&name), &format!("{path}/"), &known, &mut swept)?;
                }
                // It would lead, or stand in the way, where the server's own directory goes.
                kind if known.has(FileKind::Directory, &path) => remove(&dir.join(&name), kind, &mut swept)?,
                // Another server's directory, `lost+found`: no server of this cluster looks at it.
                _ => {}
            }
        }
    }
    Ok(swept)
}

fn walk(dir: &Path, below: &str, known: &Known, swept: &mut Swept) -> Result<(), RestoreError> {
    for entry in entries(dir)? {
        let (name, kind) = entry?;
        let place = dir.join(&name);
        let path = name.to_str().map(|name| format!("{below}{name}"));
        match (path, kind) {
            (Some(path), Some(kind)) if known.has(kind, &path) => {
                if kind == FileKind::Directory {
                    walk(&place, &format!("{path}/"), known, swept)?;
                }
            }
            (path, kind) => {
                if kind == Some(FileKind::Link) && path.is_some_and(|path| path == "pg_wal" || below == "pg_tblspc/") {
                    let to = fs::read_link(&place).unwrap_or_default();
                    swept.notes.push(format!(
                        "the link {} was removed; {}, to which it led, was left as it was",
                        place.display(),
                        to.display()
                    ));
                }
                remove(&place, kind, swept)?;
            }
        }
    }
    Ok(())
}

/// A name in a directory, and what it is; `None`: neither file nor directory nor link.
type Found = (std::ffi::OsString, Option<FileKind>);

/// What is in a directory; nothing where it is not there.
fn entries(dir: &Path) -> Result<impl Iterator<Item = Result<Found, RestoreError>> + '_, RestoreError> {
    let failed = move |source| RestoreError::io("look into", dir, source);
    let entries = match fs::read_dir(dir) {
        Ok(entries) => Some(entries),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(failed(source)),
    };
    Ok(entries.into_iter().flatten().map(move |entry| {
        let entry = entry.map_err(failed)?;
        let kind = entry.file_type().map_err(failed)?;
        let kind = match () {
            () if kind.is_dir() => Some(FileKind::Directory),
            () if kind.is_symlink() => Some(FileKind::Link),
            () if kind.is_file() => Some(FileKind::File),
            () => None,
        };
        Ok((entry.file_name(), kind))
    }))
}

fn remove(place: &Path, kind: Option<FileKind>, swept: &mut Swept) -> Result<(), RestoreError> {
    let removed = match kind {
        Some(FileKind::Directory) => fs::remove_dir_all(place),
        _ => fs::remove_file(place),
    };
    removed.map_err(|source| RestoreError::io("remove", place, source))?;
    tracing::debug!(path = %place.display(), "removed: the base backup does not have it");
    swept.removed += 1;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    fn everything(dir: &Path) -> Vec<String> {
        let mut all = Vec::new();
        let mut pending = vec![dir.to_owned()];
        while let Some(path) = pending.pop() {
            for entry in fs::read_dir(&path).unwrap().map(Result::unwrap) {
                all.push(entry.path().strip_prefix(dir).unwrap().to_str().unwrap().to_owned());
                if entry.file_type().unwrap().is_dir() {
                    pending.push(entry.path());
                }
            }
        }
        all.sort();
        all
    }

    fn put(place: PathBuf) {
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::write(place, "x").unwrap();
    }

    #[test]
    fn what_the_backup_has_stays_and_the_rest_goes_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut known = Known::default();
        let entry = |path: &str, kind| FileEntry {
            path: path.to_owned(),
            kind,
            size: 0,
            mode: 0,
            mtime: 0,
            crc32c: None,
            link: None,
            extents: Vec::new(),
        };
        for path in [
            "base/1/2619",
            "global/pg_control",
            "PG_VERSION",
            "pg_tblspc/9/PG_15/5/1",
            "pg_wal/kept",
            "postmaster.pid",
            "a",
        ] {
            known.entry(&entry(path, FileKind::File));
        }
        for path in ["pg_wal", "pg_wal/archive_status", "pg_tblspc", "empty", "was_a_file"] {
            known.entry(&entry(path, FileKind::Directory));
        }
        known.add(FileKind::File, UNFINISHED);
        for path in [
            "base/1/2619",
            "base/1/2620",
            "base/7/1",
            "global/pg_control",
            "global/pg_control.pgkeep-restore",
            "PG_VERSION",
            "pg_wal/000000010000000000000001",
            "pg_wal/kept",
            "pg_wal/archive_status/x.ready",
            "postmaster.pid",
            "was_a_file/x",
            "empty/x",
            "a/is/a/directory",
            UNFINISHED,
        ] {
            put(at("data").join(path));
        }
        fs::remove_dir_all(at("data/was_a_file")).unwrap();
        put(at("data/was_a_file"));
        for path in
            ["space/PG_15/5/1", "space/PG_15/5/2", "space/PG_14/5/1", "space/note", "old_space/PG_15/5/1", "away/1"]
        {
            put(at(path));
        }
        fs::create_dir(at("data/pg_tblspc")).unwrap();
        symlink(at("space"), at("data/pg_tblspc/9")).unwrap();
        symlink(at("old_space"), at("data/pg_tblspc/10")).unwrap();
        symlink(at("away"), at("data/base/8")).unwrap();
        symlink(at("away"), at("data/PG_LINK")).unwrap();

        let tablespaces = BTreeMap::from([(9, at("space"))]);
        let destination =
            Destination { pgdata: at("data"), tablespaces, owner: None, delta: true, only: None, notes: Vec::new() };
        let swept = sweep(&destination, known).unwrap();
        assert_eq!(
            everything(&at("data")),
            [
                "PG_VERSION",
                "base",
                "base/1",
                "base/1/2619",
                "empty",
                "global",
                "global/pg_control.pgkeep-restore",
                "pg_tblspc",
                "pg_tblspc/9",
                UNFINISHED,
                "pg_wal",
                "pg_wal/archive_status"
            ]
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect::<Vec<_>>()
        );
        assert_eq!(
            everything(&at("space")),
            ["PG_14", "PG_14/5", "PG_14/5/1", "PG_15", "PG_15/5", "PG_15/5/1", "note"]
        );
        assert!(at("old_space/PG_15/5/1").exists() && at("away/1").exists(), "what links lead to stays");
        assert!(swept.removed > 8 && swept.notes.len() == 1 && swept.notes[0].contains("old_space"), "{swept:?}");
    }
}
