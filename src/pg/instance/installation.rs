//! The programs of one PostgreSQL server: finding them, and running them as the right user with a deadline.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use super::{InstanceError, ServerUser, Waiting};

/// Directories with server programs, separated by colons; they are looked at first.
const BINDIRS_VARIABLE: &str = "PGKEEP_PG_BINDIRS";
/// Where Debian and Ubuntu keep `<major>/bin`.
const DEBIAN_ROOT: &str = "/usr/lib/postgresql";
/// How much of a program's output is kept; a longer one is an error.
const MAX_OUTPUT_BYTES: u64 = 256 << 20;
/// How much of a program's complaint an error shows.
const MAX_COMPLAINT_BYTES: usize = 4096;

/// A directory with the programs of one PostgreSQL server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// The directory that holds `postgres`, `initdb` and the tools.
    pub bindir: PathBuf,
    /// 15 for 15.18.
    pub major: u32,
    /// 18 for 15.18; 0 for a beta.
    pub minor: u32,
    /// As the server says it: `15.18`, `18beta1`.
    pub version: String,
}

impl Installation {
    /// All servers that are found and work, oldest major first and, of one major, newest minor first. Found in
    /// $PGKEEP_PG_BINDIRS, /usr/lib/postgresql/*/bin and $PATH; a directory that does not work is left out.
    pub fn find_all() -> Vec<Installation> {
        let list = |variable| std::env::var_os(variable).unwrap_or_default();
        let mut candidates: Vec<PathBuf> = std::env::split_paths(&list(BINDIRS_VARIABLE)).collect();
        let debian = fs::read_dir(DEBIAN_ROOT).into_iter().flatten().flatten();
        candidates.extend(debian.map(|entry| entry.path().join("bin")));
        candidates.extend(std::env::split_paths(&list("PATH")));
        let mut seen = HashSet::new();
        let mut found = Vec::new();
        for dir in candidates.iter().filter(|dir| !dir.as_os_str().is_empty()) {
            // $PATH often holds links to the programs: where they lie is what counts, the rest is found relative to it.
            let Ok(initdb) = fs::canonicalize(dir.join("initdb")) else { continue };
            let Some(bindir) = initdb.parent() else { continue };
            if seen.insert(bindir.to_owned()) {
                match Installation::at(bindir) {
                    Ok(installation) => found.push(installation),
                    Err(error) => tracing::debug!(%error, "left out a PostgreSQL installation"),
                }
            }
        }
        found.sort_by_key(|installation| (installation.major, std::cmp::Reverse(installation.minor)));
        found
    }

    /// The newest minor of each major that is found, oldest major first.
    pub fn find_majors() -> Vec<Installation> {
        let mut majors = Installation::find_all();
        majors.dedup_by_key(|installation| installation.major); // keeps the first, which is the newest
        majors
    }

    /// The newest server of this major; of any, the newest, when `major` is `None`.
    pub fn find(major: Option<u32>) -> Result<Installation, InstanceError> {
        let mut majors = Installation::find_majors();
        majors.retain(|found| major.is_none_or(|wanted| found.major == wanted));
        let wanted = major.map(|major| format!("of major {major} ")).unwrap_or_default();
        majors.pop().ok_or(InstanceError::NoInstallation { wanted })
    }

    /// The server whose programs lie in `bindir`; asks it for its version, as the user that would run it.
    pub fn at(bindir: &Path) -> Result<Installation, InstanceError> {
        let bad = |reason: String| InstanceError::BadInstallation { bindir: bindir.to_owned(), reason };
        let mut installation = Installation { bindir: bindir.to_owned(), major: 0, minor: 0, version: String::new() };
        for program in ["postgres", "initdb", "pg_ctl", "psql"] {
            if !installation.program(program).is_file() {
                return Err(bad(format!("{program} is missing")));
            }
        }
        let output = installation.run("postgres", &["-V"], Duration::from_secs(20)).map_err(|e| bad(e.to_string()))?;
        let said = output.checked().map_err(|e| bad(e.to_string()))?.stdout_text();
        let (major, minor, version) = parse_version(&said).ok_or_else(|| bad(format!("it calls itself {said:?}")))?;
        (installation.major, installation.minor, installation.version) = (major, minor, version);
        Ok(installation)
    }

    /// The path of one of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bindir.join(name)
    }

    /// A program of this installation, set to run as the server's user, in `/`, without libpq's variables of our own
    /// environment and with untranslated messages.
    pub fn command(&self, program: &str) -> Result<Command, InstanceError> {
        let mut command = Command::new(self.program(program));
        command.current_dir("/").env("LC_ALL", "C");
        for (name, _) in std::env::vars_os() {
            let name_text = name.to_string_lossy();
            if name_text.starts_with("PG") && !name_text.starts_with("PGKEEP_") {
                command.env_remove(&name);
            }
        }
        if let Some(user) = ServerUser::find()? {
            // Drops our supplementary groups too.
            command.uid(user.uid).gid(user.gid).env("HOME", "/").env("USER", &user.name).env("LOGNAME", &user.name);
        }
        Ok(command)
    }

    /// Runs a program to its end; its output is kept.
    pub fn run<A: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: &[A],
        deadline: Duration,
    ) -> Result<ToolOutput, InstanceError> {
        let mut command = self.command(program)?;
        command.args(arguments);
        self.run_command(program, command, deadline)
    }

    /// Runs a command to its end, or kills it at the deadline. Output goes through files: a pipe nobody reads blocks.
    pub(super) fn run_command(
        &self,
        program: &str,
        mut command: Command,
        deadline: Duration,
    ) -> Result<ToolOutput, InstanceError> {
        let path = self.program(program);
        let io = |source| InstanceError::io("keep the output of", &path, source);
        let (mut stdout, mut stderr) = (tempfile::tempfile().map_err(io)?, tempfile::tempfile().map_err(io)?);
        command.stdin(Stdio::null());
        command.stdout(stdout.try_clone().map_err(io)?).stderr(stderr.try_clone().map_err(io)?);
        let spawned = command.spawn();
        let mut child = spawned.map_err(|source| InstanceError::Spawn { program: path.clone(), source })?;
        let waiting = Waiting::new(deadline);
        let status = loop {
            if let Some(status) = child.try_wait().map_err(io)? {
                break status;
            }
            if !waiting.pause() {
                child.kill().and_then(|()| child.wait()).map_err(io)?;
                let log = complaint(&read_back(&mut stderr).map_err(io)?);
                return Err(InstanceError::Deadline { what: program.to_owned(), seconds: deadline.as_secs(), log });
            }
        };
        let (stdout, stderr) = (read_back(&mut stdout).map_err(io)?, read_back(&mut stderr).map_err(io)?);
        Ok(ToolOutput { program: program.to_owned(), status, stdout, stderr })
    }
}

/// What a program left.
#[derive(Debug, Clone)]
pub struct ToolOutput {
    /// The program's name.
    pub program: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Everything it wrote to standard output.
    pub stdout: Vec<u8>,
    /// Everything it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl ToolOutput {
    /// The output, if the program succeeded; else the error that says what it said.
    pub fn checked(self) -> Result<ToolOutput, InstanceError> {
        if self.status.success() {
            return Ok(self);
        }
        Err(InstanceError::Tool { stderr: complaint(&self.stderr), program: self.program, status: self.status })
    }

    /// Standard output as text.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

fn complaint(stderr: &[u8]) -> String {
    let end = stderr.get(stderr.len().saturating_sub(MAX_COMPLAINT_BYTES)..).unwrap_or_default();
    String::from_utf8_lossy(end).trim().to_owned()
}

fn read_back(file: &mut fs::File) -> std::io::Result<Vec<u8>> {
    let len = file.seek(SeekFrom::End(0))?;
    if len > MAX_OUTPUT_BYTES {
        return Err(std::io::Error::other(format!("{len} bytes are more than the {MAX_OUTPUT_BYTES} that are kept")));
    }
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`: major, minor, `15.18`.
fn parse_version(said: &str) -> Option<(u32, u32, String)> {
    let version = said.split_once("(PostgreSQL)")?.1.split_whitespace().next()?;
    let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    let (major, rest) = version.split_at(digits);
    let minor = rest.strip_prefix('.').and_then(|minor| minor.parse().ok()).unwrap_or(0);
    Some((major.parse().ok()?, minor, version.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_servers_say_them() {
        let cases = [
            ("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", Some((15, 18, "15.18"))),
            ("postgres (PostgreSQL) 18.6", Some((18, 6, "18.6"))),
            ("postgres (PostgreSQL) 19beta2", Some((19, 0, "19beta2"))),
            ("postgres (PostgreSQL) ", None),
            ("postgres (PostgreSQL) devel", None),
            ("bash: postgres: not found", None),
        ];
        for (said, want) in cases {
            assert_eq!(parse_version(said), want.map(|(a, b, c)| (a, b, c.to_owned())), "{said}");
        }
    }
}
