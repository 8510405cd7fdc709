use std::fs::{self, DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Which helper, of which data directory, and so where it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    data: PathBuf,
    kind: &'static str,
}

impl Place {
    /// The helper called `kind` of the data directory at `data`. A hook is run in the data directory: for it `data` is
    /// empty, and the socket's path short enough wherever the directory lies.
    pub fn new(data: impl Into<PathBuf>, kind: &'static str) -> Place {
        Place { data: data.into(), kind }
    }

    /// The data directory, as a path that can be opened.
    pub fn data(&self) -> &Path {
        if self.data.as_os_str().is_empty() { Path::new(".") } else { &self.data }
    }

    /// `push`, say.
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// Where everything of the helpers lies.
    pub fn folder(&self) -> PathBuf {
        self.data.join("pg_wal/.pgkeep")
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.file("sock")
    }

    /// Locked as long as a helper runs; holds its process id.
    pub fn lock(&self) -> PathBuf {
        self.file("lock")
    }

    /// What a helper had to say and nobody asked for. Begun anew by each.
    pub fn log(&self) -> PathBuf {
        self.file("log")
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.folder().join(format!("{}.{extension}", self.kind))
    }

    /// Does the server of the data directory run, or is it being started or stopped?
    pub(super) fn has_server(&self) -> bool {
        self.data.join("postmaster.pid").exists()
    }

    /// Makes the folder, if the data directory is ours.
    pub(super) fn make_folder(&self) -> io::Result<bool> {
        if fs::metadata(self.data())?.uid() != user() {
            return Ok(false);
        }
        match DirBuilder::new().mode(0o700).create(self.folder()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.is_private(),
            Err(error) => Err(error),
        }
    }

    /// Nobody else can have put anything into the folder.
    pub(super) fn is_private(&self) -> io::Result<bool> {
        Ok(is_private(&fs::symlink_metadata(self.folder())?))
    }
}

fn is_private(folder: &Metadata) -> bool {
    folder.is_dir() && folder.uid() == user() && folder.mode() & 0o077 == 0
}

/// Who we are to the file system.
pub(super) fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}
