//! The files of a base backup as they are written: made, taken over, filled.
//!
//! What always holds: a file has its size, mode and owner as soon as anybody has it open, and is written only within its
//! size, so that ranges may be written in any order and by several. What lies behind a link, and what another name leads
//! to as well, is never written to.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, OFlags, fallocate};
use rustix::io::Errno;

use super::RestoreError;
use super::jobs::{Job, Slice};
use super::place::Owner;
use crate::direct;

/// Where the server looks for it.
pub const CONTROL_FILE: &str = "global/pg_control";
/// Where `pg_control` waits until everything else is durable.
pub const WAITING_CONTROL_FILE: &str = "global/pg_control.pgkeep-restore";

/// A file that is being written.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    size: u64,
    mode: u32,
    owner: Option<Owner>,
    /// Somebody has given it its size, mode and owner, or is about to.
    begun: AtomicBool,
}

impl Target {
    /// A file that is not there yet, or, for [`Target::take_over`], one that may be.
    pub fn new(path: PathBuf, size: u64, mode: u32, owner: Option<Owner>) -> Target {
        Target { path, size, mode, owner, begun: AtomicBool::new(false) }
    }

    /// Opens it for writing; who comes first makes it. `whole`: all of its bytes are written now, which gives it its size.
    fn open(&self, whole: bool) -> Result<File, RestoreError> {
        let first = !self.begun.swap(true, Ordering::Relaxed);
        // Another may have it open before it has its size: writing makes it longer then, and the size makes it no shorter.
        let file = self.options().create(true).truncate(false).open(&self.path).map_err(self.failed("create"))?;
        if first {
            if !whole {
                file.set_len(self.size).map_err(self.failed("set the size of"))?;
            }
            self.dress(&file, 0o600)?;
        }
        Ok(file)
    }

    /// Makes it with nothing but zeros in it; what was there goes.
    pub fn make_empty(&self) -> Result<(), RestoreError> {
        self.begun.store(true, Ordering::Relaxed);
        let file = self.options().create(true).truncate(true).open(&self.path).map_err(self.failed("create"))?;
        if self.size > 0 {
            file.set_len(self.size).map_err(self.failed("set the size of"))?;
        }
        self.dress(&file, 0o600)
    }

    /// Opens what is there for reading and writing and gives it its size, mode and owner; makes it where it is not there,
    /// or where changing it would change something else. `true`: it is new, and holds zeros.
    pub fn take_over(&self) -> Result<(File, bool), RestoreError> {
        self.begun.store(true, Ordering::Relaxed);
        let mut options = self.options();
        options.read(true);
        let opened = match options.open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                // Its mode denies us our own file: PostgreSQL and its users keep some read-only.
                let is_file = fs::symlink_metadata(&self.path).is_ok_and(|seen| seen.is_file());
                if is_file {
                    let _ = fs::set_permissions(&self.path, Permissions::from_mode(0o600)); // opening tells
                }
                options.open(&self.path)
            }
            opened => opened,
        };
        match opened {
            Ok(file) => {
                let seen = file.metadata().map_err(self.failed("look at"))?;
                if seen.is_file() && seen.nlink() == 1 {
                    if seen.len() != self.size {
                        file.set_len(self.size).map_err(self.failed("set the size of"))?;
                    }
                    let owned = self.owner.is_none_or(|owner| (seen.uid(), seen.gid()) == (owner.uid, owner.gid));
                    if !owned || seen.mode() & 0o7777 != self.mode {
                        self.give(&file)?;
                        file.set_permissions(Permissions::from_mode(self.mode))
                            .map_err(self.failed("set the mode of"))?;
                    }
                    return Ok((file, false));
                }
                fs::remove_file(&self.path).map_err(self.failed("remove"))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A link, and not what it leads to; or a file of somebody else in a directory of ours.
            Err(error)
                if error.raw_os_error() == Some(Errno::LOOP.raw_os_error())
                    || error.kind() == io::ErrorKind::PermissionDenied =>
            {
                fs::remove_file(&self.path).map_err(self.failed("remove"))?;
            }
            Err(source) => return Err(self.failed("open")(source)),
        }
        let file = options.create_new(true).open(&self.path).map_err(self.failed("create"))?;
        file.set_len(self.size).map_err(self.failed("set the size of"))?;
        self.dress(&file, 0o600)?;
        Ok((file, true))
    }

    /// Reads bytes that lie within it.
    pub fn read(&self, file: &File, bytes: &mut [u8], offset: u64) -> Result<(), RestoreError> {
        file.read_exact_at(bytes, offset).map_err(self.failed("read"))
    }

    /// Makes bytes zeros: a hole, where the file system has them.
    pub fn clear(&self, file: &File, from: u64, to: u64) -> Result<(), RestoreError> {
        if to <= from
            || fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, from, to - from).is_ok()
        {
            return Ok(());
        }
        let zeros = [0; 64 << 10];
        let mut at = from;
        while at < to {
            let len = usize::try_from(to - at).unwrap_or(usize::MAX).min(zeros.len());
            let bytes = zeros.get(..len).unwrap_or(&zeros); // invariant: len is at most that
            file.write_all_at(bytes, at).map_err(self.failed("write"))?;
            at += len as u64;
        }
        Ok(())
    }

    fn options(&self) -> OpenOptions {
        let mut options = OpenOptions::new();
        options.write(true).mode(self.mode & 0o700 | 0o600);
        options.custom_flags(i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0));
        options
    }

    /// Gives a new file, which has `made` for its mode, its mode and owner.
    fn dress(&self, file: &File, made: u32) -> Result<(), RestoreError> {
        if self.mode != made {
            file.set_permissions(Permissions::from_mode(self.mode)).map_err(self.failed("set the mode of"))?;
        }
        self.give(file)
    }

    fn give(&self, file: &File) -> Result<(), RestoreError> {
        let Some(Owner { uid, gid }) = self.owner else { return Ok(()) };
        fchown(file, Some(uid), Some(gid)).map_err(self.failed("change the owner of"))
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> RestoreError {
        let path: &Path = &self.path;
        move |source| RestoreError::io(action, path, source)
    }
}

/// Writes the bytes of one range to where they go. One file is open at a time. Returns how many were written.
pub fn write(job: &Job<Target>, bytes: &[u8]) -> Result<u64, RestoreError> {
    let mut written = 0;
    let mut open: Option<(&Arc<Target>, File)> = None;
    for slice in &job.slices {
        let Slice { file: target, offset, len, at } = slice;
        let file = match &open {
            Some((known, file)) if Arc::ptr_eq(known, target) => file,
            _ => &open.insert((target, target.open(*len == target.size)?)).1,
        };
        let from = usize::try_from(at - job.from).unwrap_or(usize::MAX);
        let to = from.saturating_add(usize::try_from(*len).unwrap_or(usize::MAX));
        // invariant: the job's range covers its slices, and exactly that range was read
        let bytes = bytes.get(from..to).ok_or_else(|| RestoreError::Task(format!("{}: short read", job.pack)))?;
        direct::write_all_at(file, &[bytes], *offset).map_err(target.failed("write"))?;
        written += len;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn target(path: &Path, size: u64) -> Target {
        Target::new(path.to_owned(), size, 0o640, None)
    }

    fn of(path: &Path) -> (Vec<u8>, u32) {
        (fs::read(path).unwrap(), fs::symlink_metadata(path).unwrap().mode() & 0o7777)
    }

    #[test]
    fn a_file_is_taken_over_with_its_size_and_mode_and_nothing_else_changes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (_, new) = target(&at("new"), 3).take_over().unwrap();
        assert_eq!((new, of(&at("new"))), (true, (vec![0; 3], 0o640)));
        fs::write(at("longer"), "12345").unwrap();
        let (_, new) = target(&at("longer"), 3).take_over().unwrap();
        assert_eq!((new, of(&at("longer"))), (false, (b"123".to_vec(), 0o640)));
        fs::write(at("shorter"), "1").unwrap();
        let (_, new) = target(&at("shorter"), 3).take_over().unwrap();
        assert_eq!((new, of(&at("shorter"))), (false, (b"1\0\0".to_vec(), 0o640)));
        fs::write(at("readonly"), "123").unwrap();
        fs::set_permissions(at("readonly"), Permissions::from_mode(0o400)).unwrap();
        let (_, new) = target(&at("readonly"), 3).take_over().unwrap();
        assert_eq!((new, of(&at("readonly"))), (false, (b"123".to_vec(), 0o640)));
        // Another name, a link: what they lead to stays as it is.
        fs::write(at("precious"), "123").unwrap();
        fs::hard_link(at("precious"), at("twin")).unwrap();
        symlink(at("precious"), at("link")).unwrap();
        for name in ["twin", "link"] {
            let (_, new) = target(&at(name), 2).take_over().unwrap();
            assert_eq!((new, of(&at(name))), (true, (vec![0; 2], 0o640)), "{name}");
        }
        assert_eq!(of(&at("precious")).0, b"123");
    }

    #[test]
    fn bytes_become_zeros_and_their_neighbours_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, vec![7; 200_000]).unwrap();
        let target = target(&path, 200_000);
        let (file, _) = target.take_over().unwrap();
        target.clear(&file, 10, 150_000).unwrap();
        target.clear(&file, 199_999, 200_000).unwrap();
        target.clear(&file, 5, 5).unwrap();
        let want = [vec![7; 10], vec![0; 149_990], vec![7; 49_999], vec![0]].concat();
        assert!(fs::read(&path).unwrap() == want);
    }
}
