use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

/// What can go wrong with a local server.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// No programs of a server.
    #[error(
        "no PostgreSQL server {wanted}was found in $PGKEEP_PG_BINDIRS, /usr/lib/postgresql/*/bin or $PATH\n\
         hint: install one, or name the directory that holds `postgres` and `initdb` in PGKEEP_PG_BINDIRS"
    )]
    NoInstallation {
        /// `of major 17 `, or nothing.
        wanted: String,
    },
    /// A directory that does not hold a usable server.
    #[error("{bindir} holds no usable PostgreSQL server: {reason}", bindir = .bindir.display())]
    BadInstallation {
        /// The directory.
        bindir: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// We are root, and there is nobody to run the server as.
    #[error(
        "PostgreSQL refuses to run as root, and no other user is there to run it ({tried})\n\
         hint: make a user `postgres`, or name one in PGKEEP_PG_USER"
    )]
    NoUser {
        /// The names that were tried.
        tried: String,
    },
    /// The server's user cannot get to a path.
    #[error(
        "user {user} runs the server and may not enter {dir}\nhint: choose a place that is open to that user, /var/tmp say",
        dir = .dir.display()
    )]
    Unreachable {
        /// The user.
        user: String,
        /// The first directory that is closed to it.
        dir: PathBuf,
    },
    /// A file or directory.
    #[error("{action} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried: a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A program did not start at all.
    #[error("run {program}: {source}", program = .program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A program ran and failed.
    #[error("{program} failed ({status}): {stderr}")]
    Tool {
        /// The program's name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it said.
        stderr: String,
    },
    /// The server ended while it was starting.
    #[error("the server in {dir} did not start ({status}); its log ends:\n{log}", dir = .dir.display())]
    StartFailed {
        /// The data directory.
        dir: PathBuf,
        /// How the postmaster ended.
        status: ExitStatus,
        /// The end of its log.
        log: String,
    },
    /// Something took too long.
    #[error("waited {seconds} s for {what}, in vain; the log ends:\n{log}")]
    Deadline {
        /// For what.
        what: String,
        /// How long.
        seconds: u64,
        /// The end of the log.
        log: String,
    },
    /// Start of a server that runs.
    #[error("the server in {dir} runs already", dir = .dir.display())]
    AlreadyRunning {
        /// The data directory.
        dir: PathBuf,
    },
    /// A request to a server that does not run.
    #[error("the server in {dir} does not run", dir = .dir.display())]
    NotRunning {
        /// The data directory.
        dir: PathBuf,
    },
}

impl InstanceError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> InstanceError {
        InstanceError::Io { action, path: path.to_owned(), source }
    }

    /// May the same call succeed a little later, without anybody doing something? A machine under load is slow; the
    /// rest needs a person.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Deadline { .. } => true,
            Self::NoInstallation { .. }
            | Self::BadInstallation { .. }
            | Self::NoUser { .. }
            | Self::Unreachable { .. }
            | Self::Io { .. }
            | Self::Spawn { .. }
            | Self::Tool { .. }
            | Self::StartFailed { .. }
            | Self::AlreadyRunning { .. }
            | Self::NotRunning { .. } => false,
        }
    }
}
