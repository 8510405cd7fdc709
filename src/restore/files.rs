//! Small files that a restore makes itself: settings, signals, the server's manifest, WAL.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::Path;

use super::RestoreError;
use super::place::Owner;

/// With which mode and for whom files are made.
#[derive(Debug, Clone, Copy)]
pub struct NewFiles {
    /// Permission bits.
    pub mode: u32,
    /// Whom they are given to.
    pub owner: Option<Owner>,
}

impl NewFiles {
    /// Writes a file, whether it is there or not; not synced.
    pub fn write(self, path: &Path, bytes: &[u8]) -> Result<(), RestoreError> {
        let mut file = self.create(path)?;
        file.write_all(bytes).map_err(|source| RestoreError::io("write", path, source))
    }

    /// Makes an empty file.
    pub fn create(self, path: &Path) -> Result<File, RestoreError> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(self.mode);
        options.custom_flags(i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0));
        let file = options.open(path).map_err(|source| RestoreError::io("create", path, source))?;
        if let Some(Owner { uid, gid }) = self.owner {
            let given = fchown(&file, Some(uid), Some(gid));
            given.map_err(|source| RestoreError::io("change the owner of", path, source))?;
        }
        Ok(file)
    }
}

/// Makes a file or directory itself durable.
pub fn sync(path: &Path) -> Result<(), RestoreError> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|source| RestoreError::io("sync", path, source))
}

/// Makes a whole file system durable: faster than one call per file, and it tells of every write that failed.
pub fn sync_file_system(path: &Path) -> Result<(), RestoreError> {
    let open = File::open(path).map_err(|source| RestoreError::io("open", path, source))?;
    rustix::fs::syncfs(&open).map_err(|errno| RestoreError::io("sync the file system of", path, errno.into()))
}

/// Gives a file its name, durably.
pub fn rename(from: &Path, to: &Path) -> Result<(), RestoreError> {
    fs::rename(from, to).map_err(|source| RestoreError::io("rename", from, source))?;
    to.parent().map_or(Ok(()), sync)
}
