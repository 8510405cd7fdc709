use std::ffi::OsString;
use std::fmt;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Place;
use super::place::user;
use crate::types::Digest;

/// What a shell sets anew for each command; no meaning for us.
const CHANGING: [&str; 4] = ["_", "PWD", "OLDPWD", "SHLVL"];

/// Tells a file, and its content, from what it was: a change moves the times, a replacement the inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    len: u64,
    owner: (u32, u32, u32),
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileIdentity {
    /// Of the file at `path`, links followed.
    pub fn of(path: &Path) -> io::Result<FileIdentity> {
        fs::metadata(path).map(|metadata| FileIdentity::from(&metadata))
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Is it without content?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// When its content was changed: seconds and nanoseconds since 1970.
    pub fn modified(&self) -> (i64, i64) {
        self.modified
    }

    fn bytes(&self) -> Vec<u8> {
        let (mode, uid, gid) = self.owner;
        let numbers = [self.device, self.inode, self.len].map(u64::to_le_bytes);
        let owner = [mode, uid, gid].map(u32::to_le_bytes);
        let times = [self.modified.0, self.modified.1, self.changed.0, self.changed.1].map(i64::to_le_bytes);
        [numbers.concat(), owner.concat(), times.concat()].concat()
    }
}

impl From<&Metadata> for FileIdentity {
    fn from(metadata: &Metadata) -> FileIdentity {
        FileIdentity {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            owner: (metadata.mode(), metadata.uid(), metadata.gid()),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// What was called, apart from the request.
#[derive(Debug, Clone)]
pub struct Call {
    /// The configuration file that it means.
    pub configuration: PathBuf,
    /// Every option, as it was typed.
    pub options: Vec<OsString>,
}

/// Everything that decides what a call does, apart from its request: two processes with one fingerprint would do the same.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(Digest);

impl Call {
    /// Of this call in this process, in the data directory of `place`. Reads no content: a few `stat`s, the user and the
    /// environment.
    pub fn fingerprint(&self, place: &Place) -> io::Result<Fingerprint> {
        let data = fs::metadata(place.data())?;
        let mut parts = Parts::default();
        parts.add(b"pgkeep helper 1");
        parts.add(&program()?.bytes());
        parts.add(self.configuration.as_os_str().as_bytes());
        parts.add(&FileIdentity::of(&self.configuration)?.bytes());
        parts.add(&user().to_le_bytes());
        parts.add(&rustix::process::getegid().as_raw().to_le_bytes());
        // Not its times: they change with every file in it.
        parts.add(&data.dev().to_le_bytes());
        parts.add(&data.ino().to_le_bytes());
        parts.add(&(self.options.len() as u64).to_le_bytes());
        self.options.iter().for_each(|option| parts.add(option.as_bytes()));
        // Credentials and proxies may come by the environment.
        let mut environment: Vec<_> =
            std::env::vars_os().filter(|(name, _)| !CHANGING.iter().any(|changing| name == changing)).collect();
        environment.sort();
        for (name, value) in &environment {
            parts.add(name.as_bytes());
            parts.add(value.as_bytes());
        }
        Ok(Fingerprint(Digest::of(&parts.0)))
    }
}

/// The environment is in it, which may hold secrets; a digest of secrets is not shown without need.
impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fingerprint(…)")
    }
}

/// On the wire: 64 hexadecimal digits.
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Length-prefixed, so that no two lists of parts look alike.
#[derive(Default)]
struct Parts(Vec<u8>);

impl Parts {
    fn add(&mut self, part: &[u8]) {
        self.0.extend_from_slice(&(part.len() as u64).to_le_bytes());
        self.0.extend_from_slice(part);
    }
}

/// The program that runs here, even where another one lies under its name by now.
fn program() -> io::Result<FileIdentity> {
    FileIdentity::of(Path::new("/proc/self/exe")).or_else(|_| FileIdentity::of(&std::env::current_exe()?))
}
