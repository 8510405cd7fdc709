//! Who the server runs as, and which places that user can reach.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use super::InstanceError;

/// Names the user that runs servers when we are root.
const USER_VARIABLE: &str = "PGKEEP_PG_USER";

/// The unprivileged user that runs the server when we are root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerUser {
    /// Its name.
    pub name: String,
    /// Its number.
    pub uid: u32,
    /// The number of its group.
    pub gid: u32,
}

impl ServerUser {
    /// `None`: we are not root, and the server runs as we do.
    /// As root: $PGKEEP_PG_USER if set, else `postgres`, else `nobody`.
    pub fn find() -> Result<Option<ServerUser>, InstanceError> {
        // Asked for every program that is run: look it up once. A failure is asked again, it is the end anyway.
        static FOUND: OnceLock<ServerUser> = OnceLock::new();
        if !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        if let Some(user) = FOUND.get() {
            return Ok(Some(user.clone()));
        }
        let names = match std::env::var(USER_VARIABLE) {
            Ok(name) if !name.is_empty() => vec![name],
            _ => vec!["postgres".to_owned(), "nobody".to_owned()],
        };
        let number = |option: &str, name: &str| -> Option<u32> {
            // `id` asks every source of names that the system has; /etc/passwd is only one of them.
            let output = Command::new("id").args([option, "--", name]).output().ok()?;
            String::from_utf8_lossy(&output.stdout).trim().parse().ok()
        };
        for name in &names {
            if let (Some(uid), Some(gid)) = (number("-u", name), number("-g", name))
                && uid != 0
            {
                return Ok(Some(FOUND.get_or_init(|| ServerUser { name: name.clone(), uid, gid }).clone()));
            }
        }
        Err(InstanceError::NoUser { tried: names.join(", ") })
    }

    fn may_enter(&self, metadata: &fs::Metadata) -> bool {
        let bit = match () {
            () if metadata.uid() == self.uid => 0o100,
            () if metadata.gid() == self.gid => 0o010,
            () => 0o001,
        };
        metadata.mode() & bit != 0
    }
}

/// Gives a file, or a directory and everything in it, to the server's user. Does nothing unless we are root. Links are
/// not followed.
pub fn give_to_server_user(path: &Path) -> Result<(), InstanceError> {
    let Some(user) = ServerUser::find()? else { return Ok(()) };
    let mut pending = vec![path.to_owned()];
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path).map_err(|source| InstanceError::io("look at", &path, source))?;
        if (metadata.uid(), metadata.gid()) != (user.uid, user.gid) {
            let given = lchown(&path, Some(user.uid), Some(user.gid));
            given.map_err(|source| InstanceError::io("change the owner of", &path, source))?;
        }
        if metadata.is_dir() {
            let entries = fs::read_dir(&path).map_err(|source| InstanceError::io("list", &path, source))?;
            for entry in entries {
                pending.push(entry.map_err(|source| InstanceError::io("list", &path, source))?.path());
            }
        }
    }
    Ok(())
}

/// Makes a directory of mode 0700 that belongs to the server's user; one that is there is only given to that user.
pub(super) fn make_dir(path: &Path) -> Result<(), InstanceError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| InstanceError::io("make", path, source))?;
    give_to_server_user(path)
}

/// A temporary directory of mode 0700 that belongs to the server's user, whose path is at most `longest` bytes: it holds
/// a socket. $TMPDIR may be too long for that, or closed to the server's user.
pub(super) fn workspace(longest: usize) -> Result<TempDir, InstanceError> {
    let places = [std::env::temp_dir(), PathBuf::from("/tmp"), PathBuf::from("/var/tmp")];
    let mut refused = None;
    for place in &places {
        let made = tempfile::Builder::new().prefix("pgk").permissions(Permissions::from_mode(0o700)).tempdir_in(place);
        let dir = match made {
            Ok(dir) => dir,
            Err(source) => {
                refused.get_or_insert(InstanceError::io("make a directory in", place, source));
                continue;
            }
        };
        if dir.path().as_os_str().len() > longest {
            let source = io::Error::new(io::ErrorKind::InvalidFilename, "its name is too long for a Unix socket");
            refused.get_or_insert(InstanceError::io("make a socket in", place, source));
            continue;
        }
        match check_reachable(dir.path()).and_then(|()| give_to_server_user(dir.path())) {
            Ok(()) => return Ok(dir),
            Err(error) => refused.get_or_insert(error),
        };
    }
    // invariant: every round that did not return has left its reason
    Err(refused.unwrap_or_else(|| InstanceError::io("use", Path::new("/tmp"), io::ErrorKind::NotFound.into())))
}

/// May the server's user walk down to `path`? The directory itself is not looked at: it is given to that user.
pub(super) fn check_reachable(path: &Path) -> Result<(), InstanceError> {
    let Some(user) = ServerUser::find()? else { return Ok(()) };
    for dir in path.ancestors().skip(1).filter(|dir| !dir.as_os_str().is_empty()) {
        // What is not there yet will be made by us, open to that user.
        if let Ok(metadata) = fs::metadata(dir)
            && !user.may_enter(&metadata)
        {
            return Err(InstanceError::Unreachable { user: user.name, dir: dir.to_owned() });
        }
    }
    Ok(())
}
