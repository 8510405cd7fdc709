//! The tail of a directory repository: one preallocated file, appended to with one fdatasync per append.
//!
//! What always holds: bytes below [`Tail::len`] are durable, under a name that is. The file ends where the last append
//! ended: space is set aside beyond its end (`FALLOC_FL_KEEP_SIZE`), so a reader never meets zeros that nobody wrote, and
//! an append costs the same as into a file that has its full size (p50 166 and 165 µs, in turns). A failed or
//! dropped append closes the tail for good: after a failed fdatasync the kernel may call pages clean that never
//! reached the disk, so a second one that succeeds would prove nothing.
//! Crash: the file is as long as some append reached; its last bytes may be part of one that was never confirmed.

use std::fs::File;
use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::root::Root;
use crate::direct;
use crate::store::{Body, Key, Op, StoreError, Tail};

/// The open file of a tail.
#[derive(Debug)]
pub(super) struct FsTail {
    root: Arc<Root>,
    file: Arc<File>,
    key: Key,
    len: u64,
    /// Why nothing more is appended.
    closed: Option<String>,
}

impl FsTail {
    pub(super) fn create(root: &Arc<Root>, key: &Key, capacity: u64) -> Result<FsTail, StoreError> {
        let file = root.create_tail(key, |file| set_aside(file, capacity))?;
        Ok(FsTail { root: root.clone(), file: Arc::new(file), key: key.clone(), len: 0, closed: None })
    }
}

/// Space now is better than a full disk in the middle of a segment, and appending into it is as fast as it gets.
fn set_aside(file: &File, capacity: u64) -> io::Result<()> {
    if capacity == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, capacity) {
        // Without it a tail only grows as it is written.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
        result => Ok(result?),
    }
}

#[async_trait]
impl Tail for FsTail {
    async fn append(&mut self, bytes: Body) -> Result<(), StoreError> {
        if let Some(reason) = &self.closed {
            return Err(StoreError::TailClosed { key: self.key.clone(), reason: reason.clone() });
        }
        // Stands until the outcome is known: if this future is dropped, nobody knows it.
        self.closed = Some("an append was given up before its outcome was known".into());
        let (root, file, key, len, more) =
            (self.root.clone(), self.file.clone(), self.key.clone(), self.len, bytes.len());
        let at = root.at(&self.key);
        let appended = super::blocking(Op::Append, &at, move || append(&root, &file, &key, len, &bytes)).await;
        match &appended {
            Ok(()) => {
                self.len += more;
                self.closed = None;
            }
            Err(error) => self.closed = Some(error.to_string()),
        }
        appended
    }

    fn len(&self) -> u64 {
        self.len
    }
}

fn append(root: &Root, file: &File, key: &Key, len: u64, bytes: &Body) -> Result<(), StoreError> {
    let fail = |error: io::Error| root.fail_key(Op::Append, key, error);
    root.check_there()?;
    direct::write_all_at(file, bytes.chunks(), len).map_err(fail)?;
    rustix::fs::fdatasync(file).map_err(|errno| fail(errno.into()))?;
    // Durable in a file that has no name any more is lost all the same.
    if rustix::fs::fstat(file).map_err(|errno| fail(errno.into()))?.st_nlink == 0 {
        let detail = "the tail was deleted while it was being written".into();
        return Err(StoreError::Damaged { at: root.at(key), detail });
    }
    Ok(())
}

impl Drop for FsTail {
    /// Gives back the space that was set aside and not used. Not when the outcome of an append is open: a thread may
    /// still be writing.
    fn drop(&mut self) {
        if self.closed.is_none() {
            let (file, len) = (self.file.clone(), self.len);
            let trim = move || {
                let _ = rustix::fs::ftruncate(&*file, len); // only space is at stake
            };
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn_blocking(trim)),
                Err(_) => trim(),
            }
        }
    }
}
