//! Whether a server runs on a directory. Looks, and changes nothing.
//!
//! `postmaster.pid` tells by PostgreSQL's own rule: its process lives. Where there is a `/proc`, processes of a server that
//! work in the directory are found as well: those that a killed postmaster left, and those of a container, whose numbers
//! in `postmaster.pid` mean nothing here.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, test_kill_process};

/// The process of a server that runs on this data directory.
pub fn server_on(data: &Path) -> Option<u32> {
    let said = fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
    let said = said.lines().next().and_then(|line| line.trim().parse::<i32>().ok());
    let said = said.map(i32::unsigned_abs); // a server without clients writes -pid
    if let Some(pid) = said.filter(|pid| is_alive(*pid) && !is_elsewhere(*pid, data)) {
        return Some(pid);
    }
    servers().into_iter().find(|server| same_file(&server.data, data)).map(|server| server.pid)
}

/// A process that is PostgreSQL's and works in this data directory, for who is to stop it: the postmaster, where it lives. What
/// `postmaster.pid` says alone is not believed: after a crash its number may be anybody's.
pub fn process_on(data: &Path) -> Option<u32> {
    let said = fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
    let said = said.lines().next().and_then(|line| line.trim().parse::<i32>().ok()).map(i32::unsigned_abs);
    let here: Vec<u32> =
        servers().into_iter().filter(|server| same_file(&server.data, data)).map(|server| server.pid).collect();
    said.filter(|pid| here.contains(pid)).or(here.first().copied())
}

/// A server elsewhere than on `data` that has a tablespace in this directory: its process and its data directory.
pub fn server_with_tablespace(dir: &Path, data: &Path) -> Option<(u32, PathBuf)> {
    let others = servers().into_iter().filter(|server| !same_file(&server.data, data));
    others.into_iter().find_map(|Server { pid, data }| {
        let links = fs::read_dir(data.join("pg_tblspc")).ok()?;
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let leads_here = |link: &Path| {
            let Ok(to) = fs::read_link(link) else { return false };
            // As that process sees it: it may have another root.
            let seen = to.strip_prefix("/").map_or_else(|_| to.clone(), |below| root.join(below));
            same_file(&seen, dir) || same_file(&to, dir)
        };
        let found = links.flatten().any(|entry| leads_here(&entry.path()));
        found.then(|| (pid, fs::read_link(&data).unwrap_or(data)))
    })
}

struct Server {
    pid: u32,
    /// Its working directory, as a path that leads there whatever its root is.
    data: PathBuf,
}

/// Processes of PostgreSQL that we may look at; each works in its data directory.
fn servers() -> Vec<Server> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_server = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.contains("postgres") || name.trim() == "postmaster"
    };
    pids.filter(is_server).map(|pid| Server { pid, data: PathBuf::from(format!("/proc/{pid}/cwd")) }).collect()
}

fn is_alive(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return false };
    // "Not allowed" is an answer of somebody who is there.
    !matches!(test_kill_process(pid), Err(rustix::io::Errno::SRCH))
}

/// Whether it is known that this process works in another directory: its number was given to somebody else.
fn is_elsewhere(pid: u32, data: &Path) -> bool {
    let cwd = PathBuf::from(format!("/proc/{pid}/cwd"));
    fs::metadata(&cwd).is_ok() && !same_file(&cwd, data)
}

fn same_file(one: &Path, other: &Path) -> bool {
    let which = |path: &Path| fs::metadata(path).map(|seen| (seen.dev(), seen.ino())).ok();
    which(one).is_some_and(|one| which(other) == Some(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_counts_only_while_its_process_lives_and_works_here() {
        let dir = tempfile::tempdir().unwrap();
        let say = |pid: &str| fs::write(dir.path().join("postmaster.pid"), format!("{pid}\n/somewhere\n")).unwrap();
        assert_eq!(server_on(dir.path()), None);
        say("2147483600"); // beyond any pid_max
        assert_eq!(server_on(dir.path()), None);
        say("nonsense");
        assert_eq!(server_on(dir.path()), None);
        let mut child = std::process::Command::new("sleep").arg("60").current_dir(dir.path()).spawn().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("postmaster.pid"), child.id().to_string()).unwrap();
        say(&child.id().to_string());
        let (here, there) = (server_on(dir.path()), server_on(elsewhere.path()));
        say(&format!("-{}", child.id()));
        let alone = server_on(dir.path());
        let to_stop = process_on(dir.path());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((here, there, alone), (Some(child.id()), None, Some(child.id())));
        assert_eq!(to_stop, None, "it is none of PostgreSQL's, whatever postmaster.pid says");
        assert_eq!(server_on(dir.path()), None, "it has ended");
    }
}
