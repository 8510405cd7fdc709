//! Where a restore goes: what is looked at, and refused, before the first byte is written.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::RestoreError;
use super::databases::Only;
use super::marker::UNFINISHED;
use crate::catalog::records::BackupInfo;
use crate::types::SystemId;

/// What is in a directory that should be empty, or the old state of the same cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Occupied {
    /// Files of whoever.
    Files,
    /// A data directory with a `postmaster.pid`.
    Server,
    /// What a restore left that was stopped in the middle.
    Unfinished,
    /// A restore that is at work.
    Busy,
    /// A data directory on which a server runs.
    Running {
        /// Its process.
        pid: u32,
    },
    /// A directory of a tablespace that a server has in use.
    InUse {
        /// Its process.
        pid: u32,
        /// Its data directory.
        data: PathBuf,
    },
    /// Another cluster.
    OtherCluster {
        /// Its system identifier.
        found: SystemId,
        /// The one that is restored.
        wanted: SystemId,
    },
    /// Nothing that tells which cluster it was.
    NoCluster {
        /// What was found instead.
        reason: String,
    },
    /// Files in a tablespace's directory to which the data directory has no link.
    NotLinked {
        /// The tablespace.
        oid: u32,
    },
}

impl fmt::Display for Occupied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files => f.write_str(
                "is not empty; give another directory, or empty this one if nobody needs what is in it, or bring it up to \
                 the backup with --delta if it is an old state of the same cluster",
            ),
            Self::Server => f.write_str("is a data directory in which a server seems to run (postmaster.pid is there)"),
            Self::Unfinished => f.write_str(
                "holds a restore that was not finished; finish it with --delta, or remove what is in it (and in its \
                 tablespaces' directories) and restore again",
            ),
            Self::Busy => f.write_str("is being restored into by another pgkeep restore"),
            Self::Running { pid } => {
                write!(f, "is the data directory of a server that runs (process {pid}); stop it first")
            }
            Self::InUse { pid, data } => write!(
                f,
                "holds a tablespace of the server that runs on {} (process {pid}); send the tablespace elsewhere with \
                 --tablespace",
                data.display()
            ),
            Self::OtherCluster { found, wanted } => write!(
                f,
                "is the data directory of another cluster: its system identifier is {found}, and that of the backup is \
                 {wanted}"
            ),
            Self::NoCluster { reason } => write!(
                f,
                "is not empty and cannot be told to be an old state of this cluster: {reason}; give another directory, or \
                 empty this one if nobody needs what is in it"
            ),
            Self::NotLinked { oid } => write!(
                f,
                "is not empty, and the data directory has no link to it as tablespace {oid}: whose files these are is not \
                 known; empty it, or send the tablespace elsewhere with --tablespace"
            ),
        }
    }
}

/// A tablespace's new place, as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// The old directory, or the tablespace's oid.
    pub old: String,
    /// The new directory.
    pub new: PathBuf,
}

/// Whom the restored files shall belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Where everything goes. Every directory in it is absent or empty, or with `delta` an old state of the same cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// The data directory, absolute.
    pub pgdata: PathBuf,
    /// The directories of tablespaces, by oid.
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// Set where files have to be given to somebody else, which only root can.
    pub owner: Option<Owner>,
    /// What is there is brought up to the backup: [`super::delta::look`].
    pub delta: bool,
    /// Restore only some databases' files.
    pub only: Option<Only>,
    /// What a person should know before it begins.
    pub notes: Vec<String>,
}

/// Looks at a place that should be empty. Changes nothing.
///
/// # Errors
/// [`RestoreError::Occupied`], [`RestoreError::Place`], [`RestoreError::Tablespace`], [`RestoreError::Io`].
pub fn look(pgdata: &Path, moved: &[Moved], backup: &BackupInfo) -> Result<Destination, RestoreError> {
    let pgdata = absolute(pgdata)?;
    let tablespaces = tablespaces(&pgdata, moved, &BTreeMap::new(), backup)?;
    let data_there = must_be_empty(&pgdata)?;
    let mut notes = Vec::new();
    for (oid, dir) in &tablespaces {
        if !moved.iter().any(|moved| moved.new == *dir) {
            notes.push(format!("tablespace {oid} goes to its original directory, {}", dir.display()));
        }
        must_be_empty(dir)?;
    }
    let owner = owner(&pgdata, data_there, &mut notes)?;
    let places: Vec<&Path> =
        std::iter::once(pgdata.as_path()).chain(tablespaces.values().map(PathBuf::as_path)).collect();
    notes.extend(too_little_space(backup.bytes, &places));
    Ok(Destination { pgdata, tablespaces, owner, delta: false, only: None, notes })
}

/// The data directory as an absolute path, without `.` and a slash at the end.
pub(super) fn absolute(pgdata: &Path) -> Result<PathBuf, RestoreError> {
    let absolute = std::path::absolute(pgdata).map_err(|source| RestoreError::io("find", pgdata, source))?;
    Ok(absolute.components().collect())
}

/// Where each tablespace goes: where it was sent, or else where the data directory's link leads, or else where it was.
pub(super) fn tablespaces(
    pgdata: &Path,
    moved: &[Moved],
    links: &BTreeMap<u32, PathBuf>,
    backup: &BackupInfo,
) -> Result<BTreeMap<u32, PathBuf>, RestoreError> {
    let refuse = |given: &Moved, reason: &str| {
        let list = backup.tablespaces.iter().map(|known| format!("{} at {}", known.oid, known.location));
        let known = match backup.tablespaces.as_slice() {
            [] => "no tablespaces of its own".to_owned(),
            _ => format!("the tablespaces {}", list.collect::<Vec<_>>().join(", ")),
        };
        let given = format!("{}={}", given.old, given.new.display());
        RestoreError::Tablespace { given, reason: reason.to_owned(), label: backup.label, known }
    };
    let place = |oid: u32, was: &str| links.get(&oid).cloned().unwrap_or_else(|| PathBuf::from(was));
    let mut places: BTreeMap<u32, PathBuf> =
        backup.tablespaces.iter().map(|known| (known.oid, place(known.oid, &known.location))).collect();
    let mut given: BTreeMap<u32, &Moved> = BTreeMap::new();
    for moved in moved {
        let plain = |path: &str| path.trim_end_matches('/').to_owned();
        let same = |location: &str| plain(location) == plain(&moved.old);
        let known = backup.tablespaces.iter().find(|known| known.oid.to_string() == moved.old || same(&known.location));
        let known = known.ok_or_else(|| refuse(moved, "there is no such tablespace"))?;
        if given.insert(known.oid, moved).is_some() {
            return Err(refuse(moved, "it was given a place already"));
        }
        if !moved.new.is_absolute() {
            return Err(refuse(moved, "its new directory has to be an absolute path"));
        }
        places.insert(known.oid, moved.new.components().collect());
    }
    for (oid, dir) in &places {
        if !dir.is_absolute() {
            return Err(RestoreError::place(dir, format!("tablespace {oid} was there; say --tablespace {oid}=NEW")));
        }
        let within = |one: &Path, other: &Path| one.starts_with(other) || other.starts_with(one);
        if within(dir, pgdata) {
            return Err(RestoreError::place(dir, format!("tablespace {oid} must lie outside of the data directory")));
        }
        if let Some((other, _)) = places.iter().find(|(other, place)| *other != oid && within(dir, place)) {
            let reason = format!("tablespaces {oid} and {other} would lie in one another; say --tablespace {oid}=NEW");
            return Err(RestoreError::place(dir, reason));
        }
    }
    Ok(places)
}

/// Whether the directory is there; refuses one that holds anything, and one that could not be made.
pub(super) fn must_be_empty(dir: &Path) -> Result<bool, RestoreError> {
    let mut entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if fs::symlink_metadata(dir).is_ok() {
                return Err(RestoreError::place(dir, "it is a link that points nowhere"));
            }
            return match dir.parent().map(fs::metadata) {
                Some(Ok(parent)) if parent.is_dir() => Ok(false),
                _ => Err(RestoreError::place(dir, "the directory above it is not there; make it first")),
            };
        }
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(RestoreError::place(dir, "it is not a directory"));
        }
        Err(source) => return Err(RestoreError::io("look into", dir, source)),
    };
    if entries.next().is_none() {
        return Ok(true);
    }
    let holds = |name: &str| fs::symlink_metadata(dir.join(name)).is_ok();
    let what = match () {
        () if holds(UNFINISHED) => Occupied::Unfinished,
        () if holds("postmaster.pid") => Occupied::Server,
        () => Occupied::Files,
    };
    Err(RestoreError::Occupied { dir: dir.to_owned(), what })
}

/// Said and not refused: a file system that compresses takes less than files are long.
fn too_little_space(needed: u64, places: &[&Path]) -> Option<String> {
    let mut free = BTreeMap::new();
    for place in places {
        let there = place.ancestors().find(|above| above.exists())?;
        let device = fs::metadata(there).ok()?.dev();
        let found = rustix::fs::statvfs(there).ok()?;
        free.insert(device, found.f_bavail.saturating_mul(found.f_frsize));
    }
    let free = free.values().fold(0_u64, |sum, free| sum.saturating_add(*free));
    let megabytes = |bytes: u64| bytes.div_ceil(1_000_000);
    (free < needed).then(|| {
        format!(
            "the files are {} MB and only {} MB are free there: unless the file system compresses, the restore will stop \
             in the middle",
            megabytes(needed),
            megabytes(free)
        )
    })
}

/// As root: the owner of the directory, or else of the one above it, since the server refuses to run as root.
pub(super) fn owner(pgdata: &Path, there: bool, notes: &mut Vec<String>) -> Result<Option<Owner>, RestoreError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let model = if there { Some(pgdata) } else { pgdata.parent() };
    let model = model.ok_or_else(|| RestoreError::place(pgdata, "it is the root of the file system"))?;
    let metadata = fs::metadata(model).map_err(|source| RestoreError::io("look at", model, source))?;
    let owner = Owner { uid: metadata.uid(), gid: metadata.gid() };
    if owner.uid == 0 {
        notes.push(format!(
            "the files will belong to root, as {} does; the server does not run as root: \
             chown -R them to the server's user before it starts",
            model.display()
        ));
        return Ok(None);
    }
    notes.push(format!(
        "the files will belong to user {} and group {}, as {} does",
        owner.uid,
        owner.gid,
        model.display()
    ));
    Ok(Some(owner))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::records::{ServerParameters, TablespaceInfo};
    use crate::types::{BackupLabel, Branch, Lsn, SegmentSize, SystemId, TimelineId};

    pub(crate) fn backup(tablespaces: &[(u32, &str)]) -> BackupInfo {
        let at = jiff::Timestamp::UNIX_EPOCH;
        BackupInfo {
            label: BackupLabel::at(at),
            system: SystemId::new(7),
            branch: Branch::first(TimelineId::FIRST),
            timeline: TimelineId::FIRST,
            start: Lsn::new(16 << 20),
            stop: Lsn::new(17 << 20),
            started_at: at,
            stopped_at: at,
            server_version: 150_000,
            segment_size: SegmentSize::DEFAULT,
            bytes: 0,
            stored_bytes: 0,
            files: 0,
            tablespaces: tablespaces
                .iter()
                .map(|(oid, location)| TablespaceInfo { oid: *oid, location: (*location).to_owned() })
                .collect(),
            flagged: None,
            parameters: ServerParameters::default(),
        }
    }

    #[test]
    fn a_directory_that_holds_anything_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |name: &str| {
            fs::write(dir.path().join(name), "x").unwrap();
            let error = look(dir.path(), &[], &backup(&[])).unwrap_err();
            assert!(error.is_refusal());
            let RestoreError::Occupied { what, .. } = error else { panic!("{error}") };
            what
        };
        assert_eq!(look(dir.path(), &[], &backup(&[])).unwrap().pgdata, dir.path());
        assert!(look(&dir.path().join("new"), &[], &backup(&[])).is_ok());
        assert!(matches!(look(&dir.path().join("a/b"), &[], &backup(&[])), Err(RestoreError::Place { .. })));
        assert_eq!(refused(".hidden"), Occupied::Files);
        assert_eq!(refused("postmaster.pid"), Occupied::Server);
        assert_eq!(refused(UNFINISHED), Occupied::Unfinished);
        assert!(matches!(look(&dir.path().join(".hidden"), &[], &backup(&[])), Err(RestoreError::Place { .. })));
    }

    #[test]
    fn too_little_space_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let absent = dir.path().join("not/there/yet");
        let notes = |bytes| too_little_space(bytes, &[dir.path(), &absent]);
        assert_eq!(notes(1), None);
        assert!(notes(u64::MAX).is_some_and(|note| note.contains("18446744073710 MB and only ")));
        let backup = BackupInfo { bytes: u64::MAX, ..backup(&[]) };
        let found = look(dir.path(), &[], &backup).unwrap();
        assert!(found.notes.iter().any(|note| note.contains("only")), "{:?}", found.notes);
    }

    #[test]
    fn tablespaces_are_known_by_directory_or_oid() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        let (data, new) = (base.join("data"), base.join("new"));
        let backup = backup(&[(16385, "/ssd/one")]);
        let moved = |old: &str, new: &Path| Moved { old: old.to_owned(), new: new.to_owned() };
        for old in ["/ssd/one", "/ssd/one/", "16385"] {
            let found = look(&data, &[moved(old, &new)], &backup).unwrap();
            assert_eq!(found.tablespaces.get(&16385), Some(&new), "{old}");
        }
        let bad: [Vec<Moved>; 4] = [
            vec![moved("/ssd/two", &new)],
            vec![moved("16385", &new), moved("/ssd/one", &new)],
            vec![moved("16385", Path::new("relative"))],
            vec![moved("16385", &data.join("inside"))],
        ];
        for moved in bad {
            assert!(look(&data, &moved, &backup).unwrap_err().is_usage(), "{moved:?}");
        }
        fs::create_dir(&new).unwrap();
        fs::write(new.join("x"), "x").unwrap();
        assert!(look(&data, &[moved("16385", &new)], &backup).unwrap_err().is_refusal());
    }
}
