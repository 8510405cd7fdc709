//! The file that says that a restore is not finished, and of which cluster it is.
//!
//! What always holds: it is durable before anything else in the directory is changed, and goes when all is durable. While
//! a restore runs it holds a lock on it, so that no second one works in the same directory.
//! Crash: the file stays, the lock does not. By the system identifier in it the next `restore --delta` knows that what is
//! there is of its cluster, although there is no `pg_control`.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::place::{Occupied, Owner};
use super::{RestoreError, files};
use crate::types::SystemId;

/// In a directory whose restore is not finished: says what happened and what to do.
pub const UNFINISHED: &str = "pgkeep-restore-unfinished";
/// What its last line begins with.
const SYSTEM: &str = "system identifier ";
/// It is never longer.
const MAX_BYTES: u64 = 4096;

/// What a directory's marker says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marked {
    /// There is none.
    No,
    /// There is one that does not tell the cluster: it was being written when all stopped.
    Unreadable,
    /// A restore of this cluster was stopped.
    Of(SystemId),
}

/// What the marker in a directory says.
pub fn marked(pgdata: &Path) -> Result<Marked, RestoreError> {
    let path = pgdata.join(UNFINISHED);
    let seen = match fs::symlink_metadata(&path) {
        Ok(seen) => seen,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Marked::No),
        Err(source) => return Err(RestoreError::io("look at", &path, source)),
    };
    if !seen.is_file() || seen.len() > MAX_BYTES {
        return Ok(Marked::Unreadable);
    }
    let text = fs::read(&path).map_err(|source| RestoreError::io("read", &path, source))?;
    let text = String::from_utf8_lossy(&text);
    let system = text.lines().rev().find_map(|line| line.strip_prefix(SYSTEM)?.parse().ok());
    Ok(system.map_or(Marked::Unreadable, |system: u64| Marked::Of(SystemId::new(system))))
}

/// The marker of the restore that is at work here.
#[derive(Debug)]
pub struct Marker {
    path: PathBuf,
    /// Its lock is held as long as it is open.
    _file: File,
}

impl Marker {
    /// Makes the marker, or takes over the one that another restore left, and makes it durable.
    ///
    /// # Errors
    /// [`Occupied::Busy`] while another restore holds it; what the system says.
    pub fn take(pgdata: &Path, title: &str, system: SystemId, owner: Option<Owner>) -> Result<Marker, RestoreError> {
        let path = pgdata.join(UNFINISHED);
        let failed = |action| move |source| RestoreError::io(action, &pgdata.join(UNFINISHED), source);
        let busy = || RestoreError::Occupied { dir: pgdata.to_owned(), what: Occupied::Busy };
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags(i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0));
        let file = options.open(&path).map_err(failed("create"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(errno) if errno == Errno::WOULDBLOCK => return Err(busy()),
            Ok(()) | Err(_) => {} // a file system without locks: the user sees to it
        }
        // Whoever held the lock may have finished and removed the file in between.
        let ours = file.metadata().map_err(failed("look at"))?;
        let there = fs::symlink_metadata(&path).map(|seen| (seen.dev(), seen.ino()));
        if !there.is_ok_and(|there| there == (ours.dev(), ours.ino())) {
            return Err(busy());
        }
        let text = format!(
            "pgkeep restore of {title}, is at work here or was stopped in the middle. If it is not running any more, finish it\n\
             with the same command and --delta; or remove everything in this directory and in the directories of its\n\
             tablespaces, and restore again.\n\n{SYSTEM}{}\n",
            system.get()
        );
        file.write_all_at(text.as_bytes(), 0).map_err(failed("write"))?;
        file.set_len(text.len() as u64).map_err(failed("write"))?;
        if let Some(Owner { uid, gid }) = owner {
            fchown(&file, Some(uid), Some(gid)).map_err(failed("change the owner of"))?;
        }
        file.sync_all().map_err(failed("sync"))?;
        files::sync(pgdata)?;
        Ok(Marker { path, _file: file })
    }

    /// Takes the marker away, durably once the directory is synced.
    pub fn remove(self) -> Result<(), RestoreError> {
        fs::remove_file(&self.path).map_err(|source| RestoreError::io("remove", &self.path, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_held_by_one_and_found_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(marked(dir.path()).unwrap(), Marked::No);
        fs::write(dir.path().join(UNFINISHED), "pgkeep resto").unwrap();
        assert_eq!(marked(dir.path()).unwrap(), Marked::Unreadable);
        let system = SystemId::new(7_412_345_678_901_234_567);
        let title = "base backup 20261120T031500Z, a target with a very long name";
        let marker = Marker::take(dir.path(), title, system, None).unwrap();
        assert_eq!(marked(dir.path()).unwrap(), Marked::Of(system));
        let second = Marker::take(dir.path(), "another", system, None).unwrap_err();
        assert!(matches!(second, RestoreError::Occupied { what: Occupied::Busy, .. }), "{second}");
        drop(marker); // as a kill does
        let marker = Marker::take(dir.path(), "short", SystemId::new(8), None).unwrap();
        assert_eq!(marked(dir.path()).unwrap(), Marked::Of(SystemId::new(8)), "nothing is left of a longer text");
        marker.remove().unwrap();
        assert_eq!(marked(dir.path()).unwrap(), Marked::No);
    }
}
