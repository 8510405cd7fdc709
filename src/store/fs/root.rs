//! The file calls of a directory repository, one blocking function per promise.
//!
//! Every path is walked part by part from the descriptor of the root, without following links; so nothing here can
//! leave the root, whatever lies in it.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags, Stat, StatxFlags};
use rustix::io::Errno;

use crate::direct;
use crate::store::{Body, Created, Key, MAX_READ, ObjectMeta, Op, StoreError};

/// Where objects are written before they have their names. Begins with a dot, so no key reaches into it.
const TEMPORARIES: &str = ".pgkeep-tmp";
/// Times that a write begins again because somebody removed the directory it was about to use (it had become empty).
const ROUNDS: usize = 16;
/// Directories remembered as durable. Forgetting them costs one sync each.
const DURABLE_KNOWN: usize = 10_000;

/// The object that tells one repository from any other: plain, small, written first, and with a random identity in it.
const DESCRIPTION: &str = "format/0001.json";
/// Longer is no description.
const DESCRIPTION_LEN: u64 = 64 << 10;

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// NONBLOCK: opening a FIFO that somebody put here must not hang.
const READ: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);
const WRITE_NEW: OFlags =
    OFlags::WRONLY.union(OFlags::CREATE).union(OFlags::EXCL).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
const DIRECTORY_MODE: Mode = Mode::RWXU;

/// A directory, and which one it is: a number may be used again for another after it was removed, a number and a time of
/// birth not (0 where the file system keeps none).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Identity {
    device: (u32, u32),
    inode: u64,
    born: (i64, u32),
}

/// An opened repository directory.
#[derive(Debug)]
pub(super) struct Root {
    path: PathBuf,
    directory: OwnedFd,
    identity: (u64, u64),
    /// Directories whose entry in their parent has been synced since this process began.
    durable: Mutex<HashSet<Identity>>,
    /// The file system has no RENAME_NOREPLACE.
    must_link: AtomicBool,
    /// [`DESCRIPTION`]'s bytes, once they were seen.
    description: OnceLock<Bytes>,
}

/// Makes `path` and what is missing above it, each synced into its parent.
pub(super) fn create_directory(path: &Path) -> Result<(), StoreError> {
    let path = std::path::absolute(path).map_err(|error| fail_at(Op::Open, path.display().to_string(), error))?;
    let mut missing: Vec<&Path> = path.ancestors().take_while(|above| !above.exists()).collect();
    if missing.is_empty() {
        // Perhaps made by one who died before his sync. Whoever may not read the parent did not make it.
        if let Some(parent) = path.parent().and_then(|parent| File::open(parent).ok()) {
            sync_directory(&parent).map_err(|errno| fail_at(Op::Open, path.display().to_string(), errno.into()))?;
        }
    }
    while let Some(directory) = missing.pop() {
        let fail = |error| fail_at(Op::Open, directory.display().to_string(), error);
        match std::fs::DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(fail(error)),
            _ => {}
        }
        if let Some(parent) = directory.parent() {
            let parent =
                rustix::fs::open(parent, DIRECTORY - OFlags::NOFOLLOW, Mode::empty()).map_err(|e| fail(e.into()))?;
            sync_directory(&parent).map_err(|e| fail(e.into()))?;
        }
    }
    Ok(())
}

impl Root {
    pub(super) fn open(path: &Path) -> Result<Root, StoreError> {
        let fail = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => vanished(path, "no such directory"),
            io::ErrorKind::NotADirectory => vanished(path, "that is not a directory"),
            _ => fail_at(Op::Open, path.display().to_string(), error),
        };
        // Absolute, so that a change of the working directory changes nothing. Not resolved: if the path comes to
        // lead elsewhere, we want to see it.
        let path = &std::path::absolute(path).map_err(fail)?;
        // The root itself may be a link; only what lies below may not.
        let directory =
            rustix::fs::open(path, DIRECTORY - OFlags::NOFOLLOW, Mode::empty()).map_err(|errno| fail(errno.into()))?;
        let stat = rustix::fs::fstat(&directory).map_err(|errno| fail(errno.into()))?;
        let root = Root {
            path: path.clone(),
            directory,
            identity: (stat.st_dev, stat.st_ino),
            durable: Mutex::default(),
            must_link: AtomicBool::new(false),
            description: OnceLock::new(),
        };
        root.see_description();
        Ok(root)
    }

    /// Remembers which repository this is, if it is one by now.
    fn see_description(&self) {
        let Ok(key) = Key::new(DESCRIPTION) else { return };
        // What cannot be read now is seen later, or this directory is never taken for another.
        if self.description.get().is_none()
            && let Ok((file, stat)) = self.open_object(Op::Get, &key)
            && stat.len() <= DESCRIPTION_LEN
        {
            let mut bytes = vec![0; stat.len() as usize];
            if !bytes.is_empty() && file.read_exact_at(&mut bytes, 0).is_ok() {
                let _ = self.description.set(bytes.into()); // somebody else was faster, and saw the same
            }
        }
    }

    /// The directory to which the path leads now, if the same repository lies in it. `None`: there is another one, or
    /// nobody knows.
    pub(super) fn open_again(&self) -> Result<Option<Root>, StoreError> {
        let Some(known) = self.description.get() else { return Ok(None) };
        let again = Root::open(&self.path)?;
        Ok((again.description.get() == Some(known)).then_some(again))
    }

    /// As if the file system had no RENAME_NOREPLACE.
    #[cfg(test)]
    pub(super) fn use_links(&self) {
        self.must_link.store(true, Ordering::Relaxed);
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where `key` lies, for messages.
    pub(super) fn at(&self, key: &Key) -> String {
        format!("{}/{key}", self.path.display())
    }

    pub(super) fn fail(&self, op: Op, name: &str, error: impl Into<io::Error>) -> StoreError {
        fail_at(op, format!("{}/{name}", self.path.display()), error.into())
    }

    /// Whether the path still leads to the directory that was opened.
    pub(super) fn check_there(&self) -> Result<(), StoreError> {
        match std::fs::metadata(&self.path) {
            Ok(there) if (there.dev(), there.ino()) == self.identity => Ok(()),
            Ok(_) => Err(vanished(
                &self.path,
                "another directory lies there than when it was opened (unmounted or replaced while in use)",
            )),
            Err(error) => Err(vanished(&self.path, &format!("it was there when it was opened, now: {error}"))),
        }
    }

    /// The answer "there is none", once it is sure that the repository itself is there.
    fn not_found(&self, key: &Key) -> StoreError {
        match self.check_there() {
            Ok(()) => StoreError::NotFound { key: key.clone() },
            Err(vanished) => vanished,
        }
    }

    /// The directory below the root along `parts`; `None` if one is missing or a file. `name` is for messages.
    pub(super) fn walk<'a>(
        &self,
        op: Op,
        name: &str,
        parts: impl Iterator<Item = &'a str>,
    ) -> Result<Option<OwnedFd>, StoreError> {
        let mut here = self.dup(op)?;
        for part in parts {
            here = match rustix::fs::openat(&here, part, DIRECTORY, Mode::empty()) {
                Ok(next) => next,
                Err(Errno::NOENT) => return Ok(None),
                Err(errno @ (Errno::NOTDIR | Errno::LOOP)) => {
                    self.refuse_link(op, &here, part, errno)?;
                    return Ok(None);
                }
                Err(errno) => return Err(self.fail(op, name, errno)),
            };
        }
        Ok(Some(here))
    }

    fn dup(&self, op: Op) -> Result<OwnedFd, StoreError> {
        self.directory.try_clone().map_err(|error| self.fail(op, "", error))
    }

    /// An error if `name` in `directory` is neither a file nor a directory.
    fn refuse_link(&self, op: Op, directory: &OwnedFd, name: &str, seen: Errno) -> Result<(), StoreError> {
        match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => self.refuse_stranger(name, FileType::from_raw_mode(stat.st_mode)),
            Err(Errno::NOENT) => Ok(()),
            Err(_) => Err(self.fail(op, name, seen)),
        }
    }

    /// An error if `kind` is neither a file nor a directory.
    pub(super) fn refuse_stranger(&self, name: &str, kind: FileType) -> Result<(), StoreError> {
        let what = match kind {
            FileType::RegularFile | FileType::Directory => return Ok(()),
            FileType::Symlink => "a symbolic link; pgkeep follows none inside of a repository (mount or bind instead)",
            _ => "neither a file nor a directory",
        };
        Err(StoreError::Damaged { at: format!("{}/…/{name}", self.path.display()), detail: format!("it is {what}") })
    }

    /// The directory for `key`, made where it is missing, with every entry on the way durable.
    fn make_folders(&self, op: Op, key: &Key) -> Result<OwnedFd, StoreError> {
        let (folders, _) = split(key);
        let mut here = self.dup(op)?;
        for part in folders {
            let (next, made) = match rustix::fs::openat(&here, part, DIRECTORY, Mode::empty()) {
                Ok(next) => (next, false),
                Err(Errno::NOENT) => {
                    match rustix::fs::mkdirat(&here, part, DIRECTORY_MODE) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(self.fail_key(op, key, errno)),
                    }
                    let next = rustix::fs::openat(&here, part, DIRECTORY, Mode::empty());
                    (next.map_err(|errno| self.fail_key(op, key, errno))?, true)
                }
                Err(errno @ (Errno::NOTDIR | Errno::LOOP)) => {
                    self.refuse_link(op, &here, part, errno)?;
                    return Err(StoreError::Conflict { key: key.clone() }); // an object has the name of our folder
                }
                Err(errno) => return Err(self.fail_key(op, key, errno)),
            };
            // One that somebody else has just made may not be durable yet, and he need not live to see to it.
            let identity = identity(&next).map_err(|errno| self.fail_key(op, key, errno))?;
            if made || !self.durable().contains(&identity) {
                sync_directory(&here).map_err(|errno| self.fail_key(op, key, errno))?;
                let mut durable = self.durable();
                if durable.len() >= DURABLE_KNOWN {
                    durable.clear();
                }
                durable.insert(identity);
            }
            here = next;
        }
        Ok(here)
    }

    fn durable(&self) -> std::sync::MutexGuard<'_, HashSet<Identity>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner) // a set is whole after any panic
    }

    pub(super) fn fail_key(&self, op: Op, key: &Key, error: impl Into<io::Error>) -> StoreError {
        self.fail(op, key.as_str(), error)
    }

    pub(super) fn put_new(&self, key: &Key, body: &Body) -> Result<Created, StoreError> {
        self.check_there()?;
        let fail = |errno: Errno| self.fail_key(Op::Put, key, errno);
        let (_, name) = split(key);
        let mut temporary = None;
        for _ in 0..ROUNDS {
            let directory = match self.make_folders(Op::Put, key) {
                // Removed by somebody's delete between two of our steps.
                Err(error) if was_removed(&error) => continue,
                directory => directory?,
            };
            // First, so that a put repeated after a lost answer does not write everything again.
            if let Some(created) = self.compare(key, &directory, name, body)? {
                return Ok(created);
            }
            let written = match &mut temporary {
                Some(written) => written,
                empty => empty.insert(self.write_temporary(key, body)?),
            };
            match self.place(key, written, &directory, name)? {
                Placed::Done => {
                    sync_directory(&directory).map_err(fail)?;
                    if key.as_str() == DESCRIPTION {
                        self.see_description();
                    }
                    return Ok(Created::New);
                }
                Placed::Taken | Placed::DirectoryRemoved => {} // look again
            }
        }
        let source = "its directory or the object itself was removed again and again while it was written".into();
        Err(StoreError::Unavailable { op: Op::Put, at: self.at(key), source })
    }

    /// What lies under the name already: `None` if nothing does.
    fn compare(&self, key: &Key, directory: &OwnedFd, name: &str, body: &Body) -> Result<Option<Created>, StoreError> {
        let fail = |error: io::Error| self.fail_key(Op::Put, key, error);
        let Some(file) = self.open_file(Op::Put, key, directory, name)? else {
            return Ok(None);
        };
        let stat = file.metadata().map_err(fail)?;
        if !stat.is_file() || stat.len() != body.len() || !same_bytes(&file, body).map_err(fail)? {
            return Err(StoreError::Conflict { key: key.clone() });
        }
        // Whoever placed it may not have come to its own syncs.
        rustix::fs::fsync(&file).map_err(|errno| fail(errno.into()))?;
        sync_directory(directory).map_err(|errno| fail(errno.into()))?;
        Ok(Some(Created::AlreadyThere))
    }

    /// Opens for reading, without following a link; `None` if there is nothing.
    fn open_file(&self, op: Op, key: &Key, directory: &OwnedFd, name: &str) -> Result<Option<File>, StoreError> {
        match rustix::fs::openat(directory, name, READ, Mode::empty()) {
            Ok(file) => {
                let file = File::from(file);
                let stat = rustix::fs::fstat(&file).map_err(|errno| self.fail_key(op, key, errno))?;
                self.refuse_stranger(name, FileType::from_raw_mode(stat.st_mode))?;
                Ok(Some(file))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno @ (Errno::LOOP | Errno::NXIO)) => {
                self.refuse_link(op, directory, name, errno)?;
                Err(self.fail_key(op, key, errno))
            }
            Err(errno) => Err(self.fail_key(op, key, errno)),
        }
    }

    /// Writes and syncs `body` under a name that nobody else has.
    fn write_temporary(&self, key: &Key, body: &Body) -> Result<Temporary, StoreError> {
        let fail = |error: io::Error| self.fail_key(Op::Put, key, error);
        let directory = match rustix::fs::openat(&self.directory, TEMPORARIES, DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => {
                match rustix::fs::mkdirat(&self.directory, TEMPORARIES, DIRECTORY_MODE) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(fail(errno.into())),
                }
                rustix::fs::openat(&self.directory, TEMPORARIES, DIRECTORY, Mode::empty())
            }
            opened => opened,
        };
        let directory = directory.map_err(|errno| fail(errno.into()))?;
        let random = getrandom::u64().map_err(|error| fail(io::Error::other(error.to_string())))?;
        let name = format!("{}-{random:016x}", std::process::id());
        let file = rustix::fs::openat(&directory, &name, WRITE_NEW, FILE_MODE).map_err(|errno| fail(errno.into()))?;
        let temporary = Temporary { directory, name, file: File::from(file), exists: true };
        // Says "somebody lives here" to whoever cleans. Where there are no locks, age alone has to do.
        let _ = rustix::fs::flock(&temporary.file, FlockOperation::NonBlockingLockExclusive);
        direct::write_all_at(&temporary.file, body.chunks(), 0).map_err(fail)?;
        temporary.file.sync_all().map_err(fail)?;
        Ok(temporary)
    }

    /// Gives a temporary its name, unless the name is taken.
    fn place(
        &self,
        key: &Key,
        temporary: &mut Temporary,
        directory: &OwnedFd,
        name: &str,
    ) -> Result<Placed, StoreError> {
        if !self.must_link.load(Ordering::Relaxed) {
            let from = (&temporary.directory, temporary.name.as_str());
            match rustix::fs::renameat_with(from.0, from.1, directory, name, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    temporary.exists = false;
                    return Ok(Placed::Done);
                }
                Err(Errno::EXIST) => return Ok(Placed::Taken),
                Err(Errno::NOENT) => return Ok(Placed::DirectoryRemoved),
                // NFS and some others do not know the flag.
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.must_link.store(true, Ordering::Relaxed),
                Err(errno) => return Err(self.cannot_place(key, errno)),
            }
        }
        match rustix::fs::linkat(&temporary.directory, &temporary.name, directory, name, AtFlags::empty()) {
            Ok(()) => Ok(Placed::Done), // dropping the temporary removes its other name
            // Also NFS telling us of our own link after its answer was lost: the comparison that follows finds out.
            Err(Errno::EXIST) => Ok(Placed::Taken),
            Err(Errno::NOENT) => Ok(Placed::DirectoryRemoved),
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK) => Err(StoreError::Unsupported {
                op: Op::Put,
                at: self.at(key),
                reason: "this file system can neither rename without replacing nor make hard links, so two writers \
                         could overwrite each other; use another file system or an object store"
                    .into(),
            }),
            Err(errno) => Err(self.cannot_place(key, errno)),
        }
    }

    fn cannot_place(&self, key: &Key, errno: Errno) -> StoreError {
        if errno != Errno::XDEV {
            return self.fail_key(Op::Put, key, errno);
        }
        let reason = "another file system is mounted inside of the repository; a repository lies on one file system";
        StoreError::Unsupported { op: Op::Put, at: self.at(key), reason: reason.into() }
    }

    pub(super) fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        if key.as_str() == DESCRIPTION {
            self.see_description();
        }
        let fail = |error: io::Error| self.fail_key(Op::Get, key, error);
        let (file, stat) = self.open_object(Op::Get, key)?;
        let range = crate::store::cut(range, stat.len());
        let len = range.end - range.start;
        if len > MAX_READ {
            return Err(StoreError::TooLarge { op: Op::Get, at: self.at(key), len, limit: MAX_READ });
        }
        let mut bytes = vec![0; len as usize];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match file.read_at(rest, range.start + filled as u64) {
                Ok(0) => {
                    let detail = "it became shorter while it was read".into();
                    return Err(StoreError::Damaged { at: self.at(key), detail });
                }
                Ok(more) => filled += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(fail(error)),
            }
        }
        Ok(bytes.into())
    }

    fn open_object(&self, op: Op, key: &Key) -> Result<(File, std::fs::Metadata), StoreError> {
        let (folders, name) = split(key);
        let Some(directory) = self.walk(op, key.as_str(), folders)? else { return Err(self.not_found(key)) };
        let Some(file) = self.open_file(op, key, &directory, name)? else { return Err(self.not_found(key)) };
        let stat = file.metadata().map_err(|error| self.fail_key(op, key, error))?;
        if stat.is_file() { Ok((file, stat)) } else { Err(self.not_found(key)) } // a folder of other objects
    }

    pub(super) fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        let (folders, name) = split(key);
        let Some(directory) = self.walk(Op::Head, key.as_str(), folders)? else { return Err(self.not_found(key)) };
        match rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                let kind = FileType::from_raw_mode(stat.st_mode);
                self.refuse_stranger(name, kind)?;
                if kind == FileType::Directory { Err(self.not_found(key)) } else { Ok(meta(key.clone(), &stat)) }
            }
            Err(Errno::NOENT) => Err(self.not_found(key)),
            Err(errno) => Err(self.fail_key(Op::Head, key, errno)),
        }
    }

    /// Syncs an object, its entry and the entries of the folders on the way to it.
    pub(super) fn sync(&self, key: &Key) -> Result<(), StoreError> {
        self.check_there()?;
        let fail = |errno: Errno| self.fail_key(Op::Sync, key, errno);
        let (folders, name) = split(key);
        let mut on_the_way = vec![self.dup(Op::Sync)?];
        for part in folders {
            let Some(here) = on_the_way.last() else { break }; // invariant: begins with the root
            match rustix::fs::openat(here, part, DIRECTORY, Mode::empty()) {
                Ok(next) => on_the_way.push(next),
                Err(Errno::NOENT) => return Err(self.not_found(key)),
                Err(errno @ (Errno::NOTDIR | Errno::LOOP)) => {
                    self.refuse_link(Op::Sync, here, part, errno)?;
                    return Err(self.not_found(key));
                }
                Err(errno) => return Err(fail(errno)),
            }
        }
        let Some(file) = on_the_way.last().map(|last| self.open_file(Op::Sync, key, last, name)).transpose()?.flatten()
        else {
            return Err(self.not_found(key));
        };
        if !file.metadata().map_err(|error| self.fail_key(Op::Sync, key, error))?.is_file() {
            return Err(self.not_found(key)); // a folder of other objects
        }
        let sync = |what: &dyn AsFd| match sync_directory(what) {
            Err(Errno::ROFS) => Ok(()), // nobody has anything to sync here
            synced => synced.map_err(fail),
        };
        sync(&file)?;
        on_the_way.iter().rev().try_for_each(|directory| sync(directory))
    }

    pub(super) fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.check_there()?;
        let (folders, name) = split(key);
        let Some(directory) = self.walk(Op::Delete, key.as_str(), folders)? else { return Ok(()) };
        match rustix::fs::unlinkat(&directory, name, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::NOENT | Errno::ISDIR) => return Ok(()), // a folder is no object
            Err(errno) => return Err(self.fail_key(Op::Delete, key, errno)),
        }
        self.remove_empty_folders(key);
        Ok(())
    }

    /// Removes the folders of `key` that have become empty, from the innermost. The object is gone; what stays is only untidy.
    fn remove_empty_folders(&self, key: &Key) {
        let mut parts: Vec<&str> = split(key).0.collect();
        while let Some(name) = parts.pop() {
            let Ok(Some(above)) = self.walk(Op::Delete, key.as_str(), parts.iter().copied()) else { return };
            if rustix::fs::unlinkat(&above, name, AtFlags::REMOVEDIR).is_err() {
                return; // not empty, as a rule
            }
        }
    }

    /// Creates the empty file of a tail under its final name, with its directory entry durable.
    pub(super) fn create_tail(&self, key: &Key, prepare: impl Fn(&File) -> io::Result<()>) -> Result<File, StoreError> {
        self.check_there()?;
        let fail = |error: io::Error| self.fail_key(Op::OpenTail, key, error);
        let (_, name) = split(key);
        for _ in 0..ROUNDS {
            let directory = match self.make_folders(Op::OpenTail, key) {
                Err(error) if was_removed(&error) => continue,
                directory => directory?,
            };
            let file = match rustix::fs::openat(&directory, name, WRITE_NEW, FILE_MODE) {
                Ok(file) => File::from(file),
                Err(Errno::NOENT) => continue,
                Err(Errno::EXIST) => return Err(StoreError::Conflict { key: key.clone() }),
                Err(errno) => return Err(fail(errno.into())),
            };
            let done = prepare(&file).and_then(|()| file.sync_all()).and_then(|()| Ok(sync_directory(&directory)?));
            if let Err(error) = done {
                // Ours, and empty: nobody can have put anything into it.
                let _ = rustix::fs::unlinkat(&directory, name, AtFlags::empty());
                return Err(fail(error));
            }
            return Ok(file);
        }
        let source = "its directory was removed again and again".into();
        Err(StoreError::Unavailable { op: Op::OpenTail, at: self.at(key), source })
    }

    /// Removes temporaries of writers that died. Never fails: a repository that can only be read has no writer here.
    pub(super) fn remove_leftovers(&self, grace: Duration) {
        let removed = self.try_remove_leftovers(grace);
        match removed {
            Ok(0) => {}
            Ok(count) => {
                tracing::info!(repository = %self.path.display(), count, "removed temporaries of writers that died")
            }
            Err(errno) => {
                tracing::debug!(repository = %self.path.display(), %errno, "left old temporaries where they are")
            }
        }
    }

    fn try_remove_leftovers(&self, grace: Duration) -> Result<u64, Errno> {
        let directory = match rustix::fs::openat(&self.directory, TEMPORARIES, DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(0),
            directory => directory?,
        };
        let (mut now, mut removed) = (None, 0);
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_bytes().starts_with(b".") {
                continue; // "." and ".."; ours begin with a number
            }
            let now = match now {
                Some(now) => now,
                None => *now.insert(self.file_system_now(&directory)?),
            };
            let old = |stat: &Stat| {
                now.duration_since(modified(stat))
                    >= jiff::SignedDuration::try_from(grace).unwrap_or(jiff::SignedDuration::MAX)
            };
            let Ok(file) = rustix::fs::openat(&directory, name, READ, Mode::empty()) else { continue };
            let stat = rustix::fs::fstat(&file)?;
            let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            if is_file && old(&stat) && rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                rustix::fs::unlinkat(&directory, name, AtFlags::empty())?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// The time by the file system's clock, which on a network is not ours: that of a file made now.
    fn file_system_now(&self, temporaries: &OwnedFd) -> Result<Timestamp, Errno> {
        let name = format!("{}-clock-{:016x}", std::process::id(), getrandom::u64().unwrap_or_default());
        let file = rustix::fs::openat(temporaries, &name, WRITE_NEW, FILE_MODE)?;
        let stat = rustix::fs::fstat(&file);
        rustix::fs::unlinkat(temporaries, &name, AtFlags::empty())?;
        Ok(modified(&stat?))
    }
}

/// What became of an attempt to give an object its name.
enum Placed {
    Done,
    Taken,
    DirectoryRemoved,
}

/// A synced file without its final name. Dropping it removes the temporary name, if it still has it.
struct Temporary {
    directory: OwnedFd,
    name: String,
    file: File,
    exists: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.exists {
            let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty()); // else a later open does it
        }
    }
}

/// The folders of a key, and its last part.
fn split(key: &Key) -> (impl Iterator<Item = &str>, &str) {
    let (folders, name) = key.as_str().rsplit_once('/').unwrap_or(("", key.as_str()));
    (folders.split('/').filter(|part| !part.is_empty()), name)
}

/// The directory was removed while we were about to use it.
fn was_removed(error: &StoreError) -> bool {
    match error {
        StoreError::Unavailable { source, .. } => source
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.raw_os_error() == Some(Errno::NOENT.raw_os_error())),
        _ => false,
    }
}

/// Whether `file` holds exactly the bytes of `body`; their lengths are equal already.
fn same_bytes(file: &File, body: &Body) -> io::Result<bool> {
    let (mut buffer, mut offset) = (vec![0; 1 << 20], 0);
    for chunk in body.chunks() {
        for piece in chunk.chunks(buffer.len()) {
            let there = &mut buffer[..piece.len()]; // invariant: chunks() keeps pieces within the buffer
            match file.read_exact_at(there, offset) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                read => read?,
            }
            if there != piece {
                return Ok(false);
            }
            offset += piece.len() as u64;
        }
    }
    Ok(true)
}

/// Makes the entries of a directory durable.
fn sync_directory(directory: impl AsFd) -> Result<(), Errno> {
    match rustix::fs::fsync(directory) {
        // Some network file systems cannot sync a directory and need not; PostgreSQL passes over the same two.
        Err(Errno::BADF | Errno::INVAL) => Ok(()),
        result => result,
    }
}

fn identity(directory: &OwnedFd) -> Result<Identity, Errno> {
    let wanted = StatxFlags::INO | StatxFlags::BTIME;
    match rustix::fs::statx(directory, "", AtFlags::EMPTY_PATH, wanted) {
        Ok(statx) => Ok(Identity {
            device: (statx.stx_dev_major, statx.stx_dev_minor),
            inode: statx.stx_ino,
            born: (statx.stx_btime.tv_sec, statx.stx_btime.tv_nsec),
        }),
        // Kernels and sandboxes without statx.
        Err(Errno::NOSYS | Errno::PERM) => {
            let stat = rustix::fs::fstat(directory)?;
            let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
            Ok(Identity { device, inode: stat.st_ino, born: (0, 0) })
        }
        Err(errno) => Err(errno),
    }
}

pub(super) fn meta(key: Key, stat: &Stat) -> ObjectMeta {
    ObjectMeta { key, len: u64::try_from(stat.st_size).unwrap_or(0), modified: modified(stat) }
}

#[allow(clippy::unnecessary_cast, reason = "the fields of stat have other widths on other processors")]
fn modified(stat: &Stat) -> Timestamp {
    Timestamp::new(stat.st_mtime as i64, stat.st_mtime_nsec as i32).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn vanished(path: &Path, reason: &str) -> StoreError {
    StoreError::Vanished { store: format!("repository directory {}", path.display()), reason: reason.into() }
}

/// Sorts what the kernel said by what a person can do about it.
pub(super) fn fail_at(op: Op, at: String, error: io::Error) -> StoreError {
    let source = error;
    match source.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOSPC | Errno::DQUOT) => StoreError::Full { op, at, source: source.into() },
        Some(Errno::ROFS) => StoreError::ReadOnly { op, at },
        Some(Errno::ACCESS | Errno::PERM) => {
            let user = rustix::process::geteuid().as_raw();
            let hint = format!(
                "pgkeep runs as user {user} here, who needs to own, or to read and write, the repository directory and \
                 everything below it (chown -R, or run pgkeep as its owner)"
            );
            StoreError::Denied { op, at, source: source.into(), hint }
        }
        Some(Errno::LOOP) => {
            StoreError::Damaged { at, detail: "a symbolic link lies in the way; pgkeep follows none there".into() }
        }
        Some(Errno::NAMETOOLONG) => {
            StoreError::Unsupported { op, at, reason: "this file system does not take names that long".into() }
        }
        _ => StoreError::Unavailable { op, at, source: source.into() },
    }
}
