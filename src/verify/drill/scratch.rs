//! The directory in which drills are done: judged before the first byte, ours alone while one is at work, empty afterwards.
//!
//! What always holds: only a directory that was empty, or that a drill has marked as its own, is written to or emptied; never one
//! within a data directory or a repository. While a drill is at work it holds a lock on the marker.
//! Crash: marker, data and a server that may still run stay; the lock does not. The next drill stops that server, and empties.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock, statvfs};
use rustix::process::{Pid, Signal, kill_process};

use super::DrillError;
use super::settings::{CONF, CONF_TEXT, HBA, HBA_TEXT, IDENT};
use crate::pg::instance::give_to_server_user;
use crate::plan::RestorePlan;
use crate::restore::running::process_on;

/// In a scratch directory: it is a drill's.
const MARKER: &str = "pgkeep-drill";
const MARKER_TEXT: &str = "A drill of pgkeep is at work here, or was stopped in the middle. The next drill removes everything in this directory.\n";
const DATA: &str = "data";
const SPACES: &str = "tablespaces";
/// What a drill makes, besides the marker.
const OURS: [&str; 5] = [DATA, SPACES, CONF, HBA, IDENT];
/// How long a server that a killed drill left may take to stop.
const PATIENCE: Duration = Duration::from_secs(20);
/// Segments that are restored ahead, and what the server itself keeps, at most.
const WAL_AHEAD: u64 = 2 << 30;
/// Besides: logs, temporary files, what recovery adds to relations.
const MARGIN: u64 = 64 << 20;

/// Bytes of disk space that a plan needs.
pub fn needs(base_bytes: u64, wal_bytes: u64) -> u64 {
    base_bytes.saturating_add(base_bytes / 20).saturating_add(wal_bytes.min(WAL_AHEAD)).saturating_add(MARGIN)
}

/// Whether so much may be written. Pure.
///
/// # Errors
/// Why not, in words.
pub fn enough(needs: u64, free: u64, most: Option<u64>) -> Result<(), String> {
    let mb = |bytes: u64| bytes.div_ceil(1_000_000);
    if let Some(most) = most.filter(|most| needs > *most) {
        return Err(format!("the plan needs {} MB, and max_bytes allows {} MB", mb(needs), mb(most)));
    }
    if needs > free {
        return Err(format!("the plan needs {} MB, and {} MB are free", mb(needs), mb(free)));
    }
    Ok(())
}

/// A scratch directory that is ours.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    /// We made the directory.
    made: bool,
    /// Its lock is held as long as it is open.
    _marker: File,
    /// Dropped without [`Scratch::leave`]: emptied all the same.
    left: bool,
}

impl Scratch {
    /// Looks at a directory, makes it ours and empties it of what a killed drill left. `repositories`: directories that are
    /// repositories. Blocks.
    ///
    /// # Errors
    /// [`DrillError::Scratch`], [`DrillError::Busy`], what the system says; nothing was changed then.
    pub fn take(dir: &Path, repositories: &[&Path]) -> Result<Scratch, DrillError> {
        let absolute = std::path::absolute(dir).map_err(|source| DrillError::io("find", dir, source))?;
        let dir: PathBuf = real(&absolute.components().collect::<PathBuf>());
        let refuse = |reason: String| DrillError::Scratch { dir: dir.clone(), reason };
        judge_place(&dir, repositories).map_err(refuse)?;
        let made = match fs::read_dir(&dir) {
            Ok(entries) => {
                let names: Vec<String> =
                    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
                judge_entries(&names).map_err(refuse)?;
                false
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let made = DirBuilder::new().mode(0o700).create(&dir);
                made.map_err(|source| DrillError::io("make", &dir, source))?;
                true
            }
            Err(source) => return Err(DrillError::io("look into", &dir, source)),
        };
        let path = dir.join(MARKER);
        let failed = |action| {
            let path = path.clone();
            move |source| DrillError::io(action, &path, source)
        };
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags(i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0));
        let marker = options.open(&path).map_err(failed("create"))?;
        if let Err(rustix::io::Errno::WOULDBLOCK) = flock(&marker, FlockOperation::NonBlockingLockExclusive) {
            return Err(DrillError::Busy { dir });
        }
        // Whoever held the lock may have finished and removed the file in between.
        let ours = marker.metadata().map(|seen| (seen.dev(), seen.ino())).map_err(failed("look at"))?;
        if !fs::symlink_metadata(&path).is_ok_and(|there| (there.dev(), there.ino()) == ours) {
            return Err(DrillError::Busy { dir });
        }
        fs::write(&path, MARKER_TEXT).map_err(failed("write"))?;
        let scratch = Scratch { dir, made, _marker: marker, left: false };
        scratch.empty()?;
        for (name, text) in [(CONF, CONF_TEXT), (HBA, HBA_TEXT), (IDENT, "")] {
            let file = scratch.dir.join(name);
            fs::write(&file, text).map_err(|source| DrillError::io("write", &file, source))?;
        }
        give_to_server_user(&scratch.dir)?;
        Ok(scratch)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the data directory goes.
    pub fn data(&self) -> PathBuf {
        self.dir.join(DATA)
    }

    /// Where the directories of tablespaces go; made.
    ///
    /// # Errors
    /// What the system says.
    pub fn tablespaces(&self) -> Result<PathBuf, DrillError> {
        let dir = self.dir.join(SPACES);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(|source| DrillError::io("make", &dir, source))?;
        give_to_server_user(&dir)?;
        Ok(dir)
    }

    /// Whether what a plan needs may be written here.
    ///
    /// # Errors
    /// [`DrillError::Space`].
    pub fn has_room(&self, plan: &RestorePlan, most: Option<u64>) -> Result<(), DrillError> {
        let space = |reason| DrillError::Space { dir: self.dir.clone(), reason };
        enough(needs(plan.base.bytes, plan.fetch.wal_bytes), self.free()?, most).map_err(space)
    }

    fn free(&self) -> Result<u64, DrillError> {
        let seen =
            statvfs(&self.dir).map_err(|source| DrillError::io("look at the space of", &self.dir, source.into()))?;
        Ok(seen.f_bavail.saturating_mul(seen.f_frsize))
    }

    /// Removes everything, and the directory if it was made for this. Blocks.
    ///
    /// # Errors
    /// What the system says; the next drill tries again.
    pub fn leave(mut self) -> Result<(), DrillError> {
        self.left = true;
        self.clean()
    }

    fn clean(&self) -> Result<(), DrillError> {
        self.empty()?;
        let marker = self.dir.join(MARKER);
        fs::remove_file(&marker).map_err(|source| DrillError::io("remove", &marker, source))?;
        if self.made {
            fs::remove_dir(&self.dir).map_err(|source| DrillError::io("remove", &self.dir, source))?;
        }
        Ok(())
    }

    /// Stops what runs here, and removes what a drill makes.
    fn empty(&self) -> Result<(), DrillError> {
        let data = self.data();
        let socket_dir = socket_dir(&data);
        stop_server(&data)?;
        // What a killed server leaves beside its socket; its name is one that we give.
        if let Some(dir) = socket_dir {
            fs::remove_dir_all(&dir).ok(); // in a directory for temporary files: others see to it, too
        }
        for name in OURS {
            let path = self.dir.join(name);
            let removed = match fs::symlink_metadata(&path) {
                Ok(seen) if seen.is_dir() => remove(&path),
                Ok(_) => fs::remove_file(&path),
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => Err(error),
            };
            removed.map_err(|source| DrillError::io("remove", &path, source))?;
        }
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.left
            && let Err(error) = self.clean()
        {
            tracing::warn!(%error, "what a drill has written is not all removed; the next one removes it");
        }
    }
}

/// The path without links, as far as it is there.
fn real(path: &Path) -> PathBuf {
    for above in path.ancestors() {
        if let (Ok(real), Ok(rest)) = (fs::canonicalize(above), path.strip_prefix(above)) {
            return real.join(rest).components().collect();
        }
    }
    path.to_owned()
}

/// Whether a drill may be done at this place at all.
fn judge_place(dir: &Path, repositories: &[&Path]) -> Result<(), String> {
    for above in dir.ancestors() {
        if above.join("PG_VERSION").is_file() {
            return Err(format!("it lies in {}, a data directory of PostgreSQL", above.display()));
        }
        if above.join("format/0001.json").is_file() || repositories.iter().any(|known| real(known) == above) {
            return Err(format!("it lies in {}, a repository", above.display()));
        }
    }
    match dir.parent().map(fs::metadata) {
        Some(Ok(parent)) if parent.is_dir() => Ok(()),
        None => Err("it is the root directory".to_owned()),
        _ => Err("the directory above it is not there; make it first".to_owned()),
    }
}

/// Whether what lies in the directory is ours.
fn judge_entries(names: &[String]) -> Result<(), String> {
    let tolerated = |name: &&String| *name != "lost+found" && *name != MARKER;
    let is_ours = names.iter().any(|name| name == MARKER);
    let foreign = names.iter().filter(tolerated).find(|name| !is_ours || !OURS.contains(&name.as_str()));
    match foreign {
        None => Ok(()),
        Some(name) => {
            Err(format!("it is not empty, and no drill made what is in it ({name:?}); give another directory"))
        }
    }
}

/// Where the server that ran on a data directory had its socket, if that is a directory that we made.
fn socket_dir(data: &Path) -> Option<PathBuf> {
    let file = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    let dir = PathBuf::from(file.lines().nth(4)?);
    let is_ours = dir.file_name()?.to_str()?.starts_with("pgk") && dir.is_dir() && dir.join("server.log").is_file();
    is_ours.then_some(dir)
}

/// Removes a directory in which a helper of `restore_command` may still be at work for a moment.
fn remove(dir: &Path) -> io::Result<()> {
    let since = Instant::now();
    loop {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && since.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(100));
            }
            removed => return removed,
        }
    }
}

/// Stops the server on a data directory, and waits for its processes.
fn stop_server(data: &Path) -> Result<(), DrillError> {
    let since = Instant::now();
    while let Some(pid) = process_on(data) {
        let waited = since.elapsed();
        if waited > PATIENCE {
            let source = io::Error::other(format!("process {pid} of a server does not end"));
            return Err(DrillError::io("empty", data, source));
        }
        let signal = if waited < PATIENCE / 2 { Signal::QUIT } else { Signal::KILL };
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            kill_process(pid, signal).ok(); // gone already: fine
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_needed_has_to_be_free_and_allowed(base in any::<u64>(), wal in any::<u64>(), free in any::<u64>(), most in any::<Option<u64>>()) {
            let needs = needs(base, wal);
            prop_assert!(needs > base || needs == u64::MAX);
            let allowed = most.is_none_or(|most| needs <= most) && needs <= free;
            prop_assert_eq!(enough(needs, free, most).is_ok(), allowed);
        }
    }

    fn refused(dir: &Path, repositories: &[&Path]) -> String {
        Scratch::take(dir, repositories).expect_err("it should be refused").to_string()
    }

    #[test]
    fn only_an_empty_place_of_its_own_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("pg/base/1")).unwrap();
        fs::write(at("pg/PG_VERSION"), "15\n").unwrap();
        fs::create_dir_all(at("repo/format")).unwrap();
        fs::write(at("repo/format/0001.json"), "{}").unwrap();
        fs::create_dir_all(at("other")).unwrap();
        fs::create_dir_all(at("full")).unwrap();
        fs::write(at("full/precious"), "x").unwrap();
        std::os::unix::fs::symlink(at("pg/base"), at("link")).unwrap();
        assert!(refused(&at("pg/base/1/scratch"), &[]).contains("data directory"));
        assert!(refused(&at("link/scratch"), &[]).contains("data directory"), "a link leads there");
        assert!(refused(&at("repo/scratch"), &[]).contains("a repository"));
        assert!(refused(&at("other/scratch"), &[&at("other")]).contains("a repository"));
        assert!(refused(&at("full"), &[]).contains("precious"));
        assert!(refused(&at("none/scratch"), &[]).contains("above it"));
        assert!(at("full/precious").exists());
    }

    #[test]
    fn it_is_held_by_one_emptied_by_the_next_and_gone_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("scratch");
        let scratch = Scratch::take(&place, &[]).unwrap();
        fs::create_dir_all(scratch.data().join("base")).unwrap();
        assert!(matches!(Scratch::take(&place, &[]), Err(DrillError::Busy { .. })));
        // As a kill leaves it: the lock goes with the process.
        let Scratch { dir: left, .. } = &scratch;
        let left = left.clone();
        scratch.leave().unwrap();
        assert!(!left.exists(), "it was made for this");
        fs::create_dir_all(place.join("data/base")).unwrap();
        fs::write(place.join(MARKER), "").unwrap();
        let scratch = Scratch::take(&place, &[]).unwrap();
        assert!(!scratch.data().exists());
        drop(scratch);
        assert_eq!(fs::read_dir(&place).unwrap().count(), 0, "emptied, also when nobody says so");
        // A stranger's file beside ours keeps everything.
        fs::create_dir_all(place.join("data")).unwrap();
        fs::write(place.join(MARKER), "").unwrap();
        fs::write(place.join("precious"), "x").unwrap();
        assert!(refused(&place, &[]).contains("precious"));
        assert!(place.join("data").exists());
    }
}
