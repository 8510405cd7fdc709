//! Acts on a plan: a base backup becomes a data directory that recovers to the target when its server is started.
//!
//! ```text
//! resolve: target -> plan and manifest      place, delta: directories -> destination      (nothing is changed so far)
//! restore: marker, files, WAL, settings, recovery.signal, sync; then pg_control, last of all
//! into an old state (delta): marker, pg_control aside, strangers away; then the same, but for blocks that are there already
//! ```
//!
//! What always holds: refusals come before the first byte (P2, P6); only bytes that opened are written; until everything
//! else is durable there is no `pg_control`, so no server starts on half a restore, and a file says that it is one.
//! Crash and cancellation leave such a directory: a restore refuses it with the sentence what to do, and one with `delta`
//! finishes it, whichever of the two left it.
//! Where several repositories hold the base backup, the next one takes over when one fails ([`Sources`]).
//! Restoring talks to repositories alone and never needs the source server.

mod compare;
pub mod databases;
pub mod delta;
mod error;
pub mod fetch;
mod files;
mod histories;
mod jobs;
mod marker;
pub mod place;
mod rates;
pub mod resolve;
pub mod running;
mod said;
pub mod settings;
mod sources;
pub mod spent;
mod strangers;
mod table;
mod tags;
mod target;
mod unpack;
mod wal_files;

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

pub use error::RestoreError;
pub use histories::other_history;
pub use marker::UNFINISHED;
pub use place::{Destination, Moved, Occupied, Owner};
pub use rates::measure;
pub use resolve::{Resolved, WalRead, find_cluster, resolve, resolve_in};
pub use settings::{Action, FetchCommand, Recovery};
pub use sources::Sources;

use crate::plan::{RestorePlan, Stop};
use files::NewFiles;
use marker::Marker;
use spent::{Stage, Times};
use target::{CONTROL_FILE, WAITING_CONTROL_FILE};

/// What a restore came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Files of the base backup.
    pub files: u64,
    /// Their sizes.
    pub bytes: u64,
    /// Bytes that were there already and equal.
    pub equal: u64,
    /// Bytes that were fetched and written.
    pub fetched: u64,
    /// Files, links and directories that were removed, because the backup does not have them.
    pub removed: u64,
    /// Segments put into `pg_wal`.
    pub segments: u64,
    /// Where the time went.
    pub times: Times,
    /// What a person should know before the server is started.
    pub notes: Vec<String>,
}

/// How far recovery needs WAL, whether or not it is replayed: what `wal fetch` is told.
pub fn needed_to(plan: &RestorePlan) -> crate::types::Lsn {
    match plan.stop {
        Stop::At(stop) => stop.needed_to,
        Stop::Immediate => plan.wal.iter().map(|need| need.to).max().unwrap_or(plan.base.stop).max(plan.base.stop),
    }
}

/// Restores what was resolved to where [`place::look`] or [`delta::look`] said it may go. `progress` gets bytes as they are
/// written, or found to be there; [`Sources::spent`] tells the rest.
///
/// `restore_command` is [`FetchCommand::command`]'s.
///
/// # Errors
/// [`RestoreError`]. The directory then holds what was written so far, cannot be started, and says so.
pub async fn restore(
    sources: &Arc<Sources>,
    resolved: &Resolved,
    destination: &Destination,
    action: Action,
    restore_command: &str,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Restored, RestoreError> {
    let Resolved { plan, manifest } = resolved;
    let (pgdata, owner) = (destination.pgdata.as_path(), destination.owner);
    // All of it, before anything is changed: a table that does not open costs an old state nothing.
    let known = if destination.delta { Some(strangers::Known::read(sources, manifest).await?) } else { None };
    unpack::make_dir(pgdata, 0o700, owner)?;
    let title = format!("base backup {}, {}", plan.base.label, plan.target);
    let mut marker = Marker::take(pgdata, &title, plan.base.system, owner)?;
    let mut swept = strangers::Swept::default();
    if let Some(known) = known {
        let place = destination.clone();
        let sweep = move || Ok((set_aside(&place.pgdata, marker)?, strangers::sweep(&place, known)?));
        (marker, swept) = blocking(sweep).await?;
    }

    let done = unpack::unpack(sources, manifest, destination, progress).await?;
    let own = NewFiles { mode: if done.group_access { 0o640 } else { 0o600 }, owner };
    unpack::make_dir(&wal_files::folder(pgdata), if done.group_access { 0o750 } else { 0o700 }, owner)?;
    let segments = wal_files::write(sources, plan, pgdata, own).await?;
    server_manifest(sources, resolved, pgdata, own).await?;
    let recovery = Recovery {
        major: plan.base.server_version / 10_000,
        stop: plan.stop,
        timeline: plan.target_timeline,
        action,
        parameters: plan.parameters,
        restore_command,
        title: &title,
    };
    let mut notes = swept.notes;
    notes.extend(settle(destination, &recovery, own)?);
    if done.group_access {
        unpack::make_dir(pgdata, 0o750, owner)?;
    }
    let begun = Instant::now();
    let destination = destination.clone();
    blocking(move || make_whole(&destination, marker)).await?;
    let spent = sources.spent();
    spent.since(Stage::Sync, begun);
    notes.extend(sources.notes());
    Ok(Restored {
        files: done.files,
        bytes: done.bytes,
        equal: spent.equal(),
        fetched: spent.fetched(),
        removed: swept.removed,
        segments,
        times: spent.times(),
        notes,
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RestoreError> + Send + 'static,
) -> Result<T, RestoreError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| RestoreError::Task(error.to_string()))?
}

/// Takes `pg_control` away, durably, so that no server starts on what is changed from now on. It waits under the name under
/// which the backup's is written, and is compared with that like any other file.
fn set_aside(pgdata: &Path, marker: Marker) -> Result<Marker, RestoreError> {
    let (control, waiting) = (pgdata.join(CONTROL_FILE), pgdata.join(WAITING_CONTROL_FILE));
    match fs::rename(&control, &waiting) {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(marker);
        }
        Err(source) => return Err(RestoreError::io("rename", &control, source)),
    }
    if let Some(pid) = running::server_on(pgdata) {
        // It was started after we had looked: nothing but the name was changed.
        files::rename(&waiting, &control)?;
        marker.remove()?;
        return Err(RestoreError::Occupied { dir: pgdata.to_owned(), what: Occupied::Running { pid } });
    }
    files::sync(&pgdata.join("global"))?;
    Ok(marker)
}

/// PostgreSQL's `backup_manifest`, joined from its pieces.
async fn server_manifest(
    sources: &Sources,
    resolved: &Resolved,
    pgdata: &Path,
    own: NewFiles,
) -> Result<(), RestoreError> {
    use std::io::Write;
    let pieces = &resolved.manifest.server_manifest;
    if pieces.is_empty() {
        return Ok(());
    }
    let path = pgdata.join("backup_manifest");
    let mut file = own.create(&path)?;
    for piece in pieces {
        let mut reader = sources.part(piece);
        while let Some(chunk) = reader.next_chunk().await? {
            file.write_all(&chunk).map_err(|source| RestoreError::io("write", &path, source))?;
        }
    }
    Ok(())
}

/// Settings and `recovery.signal`; a configuration where there was none. What was added, in words.
fn settle(destination: &Destination, recovery: &Recovery<'_>, own: NewFiles) -> Result<Vec<String>, RestoreError> {
    let pgdata = destination.pgdata.as_path();
    let read = |path: &Path| match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(RestoreError::io("read", path, source)),
    };
    let mut notes = Vec::new();
    let auto_conf = pgdata.join("postgresql.auto.conf");
    let old = read(&auto_conf)?.unwrap_or_default();
    let mut settings = recovery.auto_conf(&old);
    if destination.only.is_some() {
        settings.push_str(databases::SETTINGS);
    }
    own.write(&auto_conf, settings.as_bytes())?;
    let mut added = Vec::new();
    for (name, text) in [("postgresql.conf", settings::MINIMAL_CONF), ("pg_hba.conf", settings::MINIMAL_HBA)] {
        match read(&pgdata.join(name))? {
            Some(conf) if name == "postgresql.conf" => notes.extend(settings::leads_elsewhere(&conf)),
            Some(_) => {}
            None => {
                own.write(&pgdata.join(name), text.as_bytes())?;
                added.push(name);
            }
        }
    }
    if !added.is_empty() {
        let ignored: Vec<String> = added.iter().map(|name| format!("-i {name}")).collect();
        notes.push(format!(
            "the backup has no {}, because the server's configuration lies elsewhere: a minimal one was added; look at it, and \
             check the files with pg_verifybackup {}",
            added.join(" and no "),
            ignored.join(" ")
        ));
    }
    own.write(&pgdata.join("recovery.signal"), b"")?;
    Ok(notes)
}

/// Makes everything durable, and only then a data directory.
fn make_whole(destination: &Destination, marker: Marker) -> Result<(), RestoreError> {
    let pgdata = &destination.pgdata;
    files::sync_file_system(pgdata)?;
    for dir in destination.tablespaces.values() {
        files::sync_file_system(dir)?;
    }
    if let Some(above) = pgdata.parent() {
        files::sync(above)?;
    }
    files::rename(&pgdata.join(WAITING_CONTROL_FILE), &pgdata.join(CONTROL_FILE))?;
    marker.remove()?;
    files::sync(pgdata)
}
