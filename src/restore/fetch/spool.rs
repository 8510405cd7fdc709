//! Where what was opened ahead waits: whole, verified and synced, on pg_wal's file system, so that a rename delivers it.
//!
//! What always holds: under a spool lies only what its own process wrote, in a directory whose name is random: nobody serves
//! what another process, restore or timeline left. A file is complete and durable before anybody learns its name.
//! Crash: leaves the directory, which the next [`Spool::create`] in the same place removes. There is one spool in a place
//! at a time; whoever makes one sees to that.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;

use super::FetchError;

const PREFIX: &str = "spool-";

/// A directory of its own; removed on drop.
#[derive(Debug)]
pub struct Spool {
    dir: TempDir,
    written: AtomicU64,
}

/// A file that waits in a spool; removed on drop unless somebody has renamed it.
#[derive(Debug)]
pub struct Staged {
    path: PathBuf,
    /// The directory stays as long as anything in it is needed.
    _spool: Arc<Spool>,
}

impl Staged {
    /// Where it lies, as the process sees it that made the spool.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // gone already where it was delivered
    }
}

impl Spool {
    /// Makes a spool in `place`, a directory that is there, and removes what others left in it.
    ///
    /// # Errors
    /// [`FetchError::Disk`].
    pub fn create(place: &Path) -> Result<Arc<Spool>, FetchError> {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                let _ = fs::remove_dir_all(entry.path()); // what stays takes room, and is never served
            }
        }
        let made = tempfile::Builder::new().prefix(PREFIX).tempdir_in(place); // 0700
        let dir =
            made.map_err(|source| FetchError::Disk { doing: "make a directory in", path: place.to_owned(), source })?;
        Ok(Arc::new(Spool { dir, written: AtomicU64::new(0) }))
    }

    /// Writes and syncs a file; blocks.
    ///
    /// # Errors
    /// [`FetchError::Disk`]; nothing is left then.
    pub fn stage(self: &Arc<Spool>, name: &str, bytes: &[u8]) -> Result<Staged, FetchError> {
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        let staged = Staged { path: self.dir.path().join(format!("{name}.{number}")), _spool: Arc::clone(self) };
        let failed = |doing| {
            let path = staged.path.clone();
            move |source| FetchError::Disk { doing, path, source }
        };
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&staged.path).map_err(failed("create"))?;
        file.write_all(bytes).map_err(failed("write"))?;
        // Off the server's way: what it syncs after the rename is clean already.
        file.sync_data().map_err(failed("sync"))?;
        Ok(staged)
    }

    /// Bytes that are free to us on its file system; 0 where that cannot be known.
    pub fn free_bytes(&self) -> u64 {
        let file_system = rustix::fs::statvfs(self.dir.path());
        file_system.map_or(0, |file_system| file_system.f_bavail.saturating_mul(file_system.f_frsize))
    }

    /// Is it still there? Not after somebody emptied pg_wal.
    pub fn is_there(&self) -> bool {
        self.dir.path().is_dir()
    }
}

/// Is it that there is no room left?
pub fn is_full(error: &FetchError) -> bool {
    let FetchError::Disk { source, .. } = error else { return false };
    matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
