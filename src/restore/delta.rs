//! What a directory has to be, so that a restore may bring it up to the backup instead of writing all of it.
//!
//! What always holds: only an old state of the very same cluster is taken, told by the system identifier in its
//! `pg_control`, or in the marker of a restore that was stopped; never while a server runs on it. A tablespace's directory
//! is taken only where this data directory's own link leads to it. Looking changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::RestoreError;
use super::marker::{Marked, UNFINISHED, marked};
use super::place::{self, Destination, Moved, Occupied};
use super::running::{server_on, server_with_tablespace};
use super::target::{CONTROL_FILE, WAITING_CONTROL_FILE};
use crate::catalog::records::BackupInfo;
use crate::pg::control_file::ControlFile;
use crate::types::SystemId;

/// Looks at a place that is empty, or holds an old state of the cluster. Changes nothing.
///
/// # Errors
/// [`RestoreError::Occupied`], [`RestoreError::Place`], [`RestoreError::Tablespace`], [`RestoreError::Io`].
pub fn look(pgdata: &Path, moved: &[Moved], backup: &BackupInfo) -> Result<Destination, RestoreError> {
    let pgdata = place::absolute(pgdata)?;
    let mut entries = match fs::read_dir(&pgdata) {
        Ok(entries) => entries.filter_map(Result::ok).map(|entry| entry.file_name()).peekable(),
        Err(_) => return place::look(&pgdata, moved, backup), // it says best what is wrong, or that nothing is there
    };
    if entries.peek().is_none() {
        return place::look(&pgdata, moved, backup);
    }
    let seen = Seen {
        server: server_on(&pgdata),
        marked: marked(&pgdata)?,
        control: control(&pgdata)?,
        alone: entries.all(|name| name == UNFINISHED),
    };
    judge(&seen, backup.system).map_err(|what| RestoreError::Occupied { dir: pgdata.clone(), what })?;

    let links = links(&pgdata)?;
    let tablespaces = place::tablespaces(&pgdata, moved, &links, backup)?;
    let mut notes = vec![format!(
        "{} is brought up to the backup: what differs is written anew, what the backup does not have is removed",
        pgdata.display()
    )];
    for (oid, dir) in &tablespaces {
        let linked = links.get(oid).is_some_and(|link| is_same(link, dir));
        if !linked {
            place::must_be_empty(dir).map_err(|error| match error {
                RestoreError::Occupied { dir, .. } => {
                    RestoreError::Occupied { dir, what: Occupied::NotLinked { oid: *oid } }
                }
                other => other,
            })?;
        }
        if let Some((pid, data)) = server_with_tablespace(dir, &pgdata) {
            return Err(RestoreError::Occupied { dir: dir.clone(), what: Occupied::InUse { pid, data } });
        }
        let stays = if linked { "stays in" } else { "goes to" };
        notes.push(format!("tablespace {oid} {stays} {}", dir.display()));
    }
    let owner = place::owner(&pgdata, true, &mut notes)?;
    Ok(Destination { pgdata, tablespaces, owner, delta: true, only: None, notes })
}

/// What a directory that is not empty shows.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    /// The process of a server.
    server: Option<u32>,
    marked: Marked,
    control: Control,
    /// There is a marker and nothing else.
    alone: bool,
}

/// What `pg_control` says.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Control {
    No,
    Unreadable(String),
    Of(SystemId),
}

/// Whether what is there may be changed.
fn judge(seen: &Seen, wanted: SystemId) -> Result<(), Occupied> {
    if let Some(pid) = seen.server {
        return Err(Occupied::Running { pid });
    }
    let no = |reason: &str| Err(Occupied::NoCluster { reason: reason.to_owned() });
    match (seen.marked, &seen.control) {
        (Marked::Of(found), _) if found != wanted => Err(Occupied::OtherCluster { found, wanted }),
        (_, Control::Of(found)) if *found != wanted => Err(Occupied::OtherCluster { found: *found, wanted }),
        (Marked::Of(_), _) | (_, Control::Of(_)) => Ok(()),
        (Marked::Unreadable, _) if seen.alone => Ok(()),
        (Marked::Unreadable, _) => {
            no("it holds a restore that was not finished, and nothing that tells of which cluster")
        }
        (Marked::No, Control::No) => no("it has no pg_control, and no restore of ours was stopped in it"),
        (Marked::No, Control::Unreadable(why)) => no(why),
    }
}

/// `pg_control`, also where it waits for the end of a restore.
fn control(pgdata: &Path) -> Result<Control, RestoreError> {
    let mut found = Control::No;
    for name in [CONTROL_FILE, WAITING_CONTROL_FILE] {
        let path = pgdata.join(name);
        match fs::read(&path) {
            Ok(bytes) => match ControlFile::parse(&bytes) {
                Ok(control) => return Ok(Control::Of(control.system)),
                Err(error) => found = Control::Unreadable(error.to_string()),
            },
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(source) => return Err(RestoreError::io("read", &path, source)),
        }
    }
    Ok(found)
}

/// Where the links of tablespaces lead, by oid.
fn links(pgdata: &Path) -> Result<BTreeMap<u32, PathBuf>, RestoreError> {
    let folder = pgdata.join("pg_tblspc");
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(BTreeMap::new());
        }
        Err(source) => return Err(RestoreError::io("look into", &folder, source)),
    };
    let mut links = BTreeMap::new();
    for entry in entries {
        let entry = entry.map_err(|source| RestoreError::io("look into", &folder, source))?;
        let oid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // A directory is a tablespace in its place: no link.
        if let (Some(oid), Ok(to)) = (oid, fs::read_link(entry.path()))
            && to.is_absolute()
        {
            links.insert(oid, to.components().collect());
        }
    }
    Ok(links)
}

fn is_same(one: &Path, other: &Path) -> bool {
    one == other || fs::canonicalize(one).is_ok_and(|one| fs::canonicalize(other).is_ok_and(|other| one == other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_old_state_of_the_same_cluster_is_taken() {
        let (ours, theirs) = (SystemId::new(7), SystemId::new(8));
        let broken = || Control::Unreadable("torn".to_owned());
        let other = Err("another cluster");
        let unknown = Err("cannot be told");
        let cases = [
            (Marked::No, Control::Of(ours), false, Ok(())),
            (Marked::No, Control::Of(theirs), false, other),
            (Marked::No, Control::No, false, unknown),
            (Marked::No, broken(), false, unknown),
            // A restore was stopped: before or after pg_control came, or while it was written.
            (Marked::Of(ours), Control::No, false, Ok(())),
            (Marked::Of(ours), Control::Of(ours), false, Ok(())),
            (Marked::Of(ours), broken(), false, Ok(())),
            (Marked::Of(ours), Control::Of(theirs), false, other),
            (Marked::Of(theirs), Control::No, false, other),
            (Marked::Of(theirs), Control::Of(ours), false, other),
            // The marker itself was torn.
            (Marked::Unreadable, Control::No, true, Ok(())),
            (Marked::Unreadable, Control::No, false, unknown),
            (Marked::Unreadable, broken(), false, unknown),
            (Marked::Unreadable, Control::Of(ours), false, Ok(())),
            (Marked::Unreadable, Control::Of(theirs), false, other),
        ];
        for (marked, control, alone, want) in cases {
            let seen = Seen { server: None, marked, control, alone };
            match (judge(&seen, ours), want) {
                (Ok(()), Ok(())) => {}
                (Err(what), Err(words)) if what.to_string().contains(words) => {}
                (got, _) => panic!("{seen:?}: {got:?}, not {want:?}"),
            }
            let running = Seen { server: Some(9), ..seen };
            assert_eq!(judge(&running, ours), Err(Occupied::Running { pid: 9 }));
        }
    }
}
