//! New clusters by copying one that initdb made: a tenth of initdb's time, which is most of what a small test costs.
//!
//! A copy gets a system identifier of its own, so that it is as foreign to its siblings as initdb would have made it.
//! A crash leaves a half-made template under a temporary name that nobody reads.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::{INIT_DEADLINE, Installation, InstanceError, give_to_server_user, user};
use crate::pg::control_file;

/// Where the identifier stands in the long header of a segment's first page (POSTGRES.md 3).
const IDENTIFIER_IN_PAGE: u64 = 24;
/// What is looked at for zeros, which are not written.
const HOLE_BYTES: usize = 64 << 10;

/// Fills `data`, which is there and empty, with what initdb makes of `arguments`, by way of a template in `templates`.
pub(super) fn copy(
    installation: &Installation,
    arguments: &[String],
    templates: &Path,
    data: &Path,
) -> Result<(), InstanceError> {
    let key =
        blake3::hash(format!("{:?}", (&installation.version, &installation.bindir, arguments)).as_bytes()).to_hex();
    let template = templates.join(&key.as_str()[..16]);
    if !template.exists() {
        make(installation, arguments, templates, &template)?;
    }
    copy_into(&template, data)?;
    identify(data)?;
    give_to_server_user(data)
}

fn make(
    installation: &Installation,
    arguments: &[String],
    templates: &Path,
    template: &Path,
) -> Result<(), InstanceError> {
    user::make_dir(templates)?;
    let unfinished = templates.join(format!(".{}", std::process::id()));
    let _ = fs::remove_dir_all(&unfinished); // of a process that had our number
    user::make_dir(&unfinished)?;
    let mut arguments = arguments.to_vec();
    arguments.extend(["-D".to_owned(), unfinished.display().to_string()]);
    installation.run("initdb", &arguments, INIT_DEADLINE)?.checked()?;
    // Fails when another process was first: theirs is as good.
    if fs::rename(&unfinished, template).is_err() {
        let _ = fs::remove_dir_all(&unfinished); // only space
    }
    Ok(())
}

fn copy_into(from: &Path, to: &Path) -> Result<(), InstanceError> {
    let list = |source| InstanceError::io("list", from, source);
    for entry in fs::read_dir(from).map_err(list)? {
        let entry = entry.map_err(list)?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().map_err(|source| InstanceError::io("look at", &from, source))?;
        if kind.is_dir() {
            user::make_dir(&to)?;
            copy_into(&from, &to)?;
        } else {
            copy_file(&from, &to).map_err(|source| InstanceError::io("copy", &from, source))?;
        }
    }
    Ok(())
}

/// Most of a new segment is zeros.
fn copy_file(from: &Path, to: &Path) -> std::io::Result<()> {
    let mut from = File::open(from)?;
    let to = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    let (mut buffer, mut at) = (vec![0; HOLE_BYTES], 0);
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return to.set_len(at);
        }
        if buffer[..read].iter().any(|byte| *byte != 0) {
            to.write_all_at(&buffer[..read], at)?;
        }
        at += read as u64;
    }
}

/// Writes a new system identifier where it stands: in the control file, and in the WAL's first page.
fn identify(data: &Path) -> Result<(), InstanceError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random)
        .map_err(|error| InstanceError::io("identify", data, std::io::Error::other(error.to_string())))?;
    let identifier = u64::from_le_bytes(random) >> 1; // as initdb's: positive as a number of SQL, too
    let path = data.join("global/pg_control");
    let failed = |source| InstanceError::io("identify", &path, source);
    let mut bytes = fs::read(&path).map_err(failed)?;
    control_file::set_system_identifier(&mut bytes, identifier)
        .map_err(|error| failed(std::io::Error::other(error)))?;
    let control = File::options().write(true).open(&path).map_err(failed)?;
    (&control).write_all(&bytes).map_err(failed)?;
    let wal = data.join("pg_wal");
    for entry in fs::read_dir(&wal).map_err(|source| InstanceError::io("list", &wal, source))? {
        let path = entry.map_err(|source| InstanceError::io("list", &wal, source))?.path();
        if path.is_file() {
            let segment = File::options().write(true).open(&path);
            let written = segment.and_then(|file| file.write_all_at(&identifier.to_le_bytes(), IDENTIFIER_IN_PAGE));
            written.map_err(|source| InstanceError::io("identify", &path, source))?;
        }
    }
    Ok(())
}
