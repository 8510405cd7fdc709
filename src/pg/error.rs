//! What can go wrong between us and a PostgreSQL server, sorted by what the caller does next.

use std::fmt;
use std::io;
use std::time::Duration;

/// A failure of a connection or of a command on it. Never holds a password.
#[derive(Debug, thiserror::Error)]
pub enum PgError {
    /// The connection string, a service file or a `PG*` variable says something that cannot be meant.
    #[error("connection settings: {reason}")]
    Settings {
        /// What is wrong and what to write instead.
        reason: String,
    },
    /// No connection came about: refused, no route, no such socket, name not found.
    #[error("cannot connect to {server}: {source}{}", unreachable_hint(.source))]
    Unreachable {
        /// Host and port, or the socket's path.
        server: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The connection broke while in use. The server may or may not have done what it was asked.
    #[error("lost the connection to {server} while {doing}: {source}")]
    Lost {
        /// Host and port, or the socket's path.
        server: String,
        /// What we were about to do.
        doing: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The server closed the connection without a word: crash, `kill -9`, `wal_sender_timeout`, a proxy.
    #[error("{server} closed the connection while {doing}; the server's log says why")]
    Closed {
        /// Host and port, or the socket's path.
        server: String,
        /// What we were about to do.
        doing: String,
    },
    /// No answer in time. The connection is not used again.
    #[error("{server} did not answer within {} s while {doing}", .after.as_secs_f64())]
    Timeout {
        /// Host and port, or the socket's path.
        server: String,
        /// What we were waiting for.
        doing: String,
        /// How long we waited.
        after: Duration,
    },
    /// TLS could not be set up as `sslmode` wants it.
    #[error("TLS with {server}: {reason}")]
    Tls {
        /// Host and port.
        server: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// We refuse to authenticate the way the server asks, or have nothing to do it with, or it did not prove itself.
    #[error("cannot authenticate to {server}: {reason}")]
    Authentication {
        /// Host and port, or the socket's path.
        server: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The server answered with an error.
    #[error("{0}")]
    Server(Box<ServerError>),
    /// The server is there, but is not what `target_session_attrs` wants.
    #[error("{server} is not what target_session_attrs={wanted} asks for")]
    WrongRole {
        /// Host and port, or the socket's path.
        server: String,
        /// The value of `target_session_attrs`.
        wanted: &'static str,
    },
    /// None of several hosts or addresses would do; one error for each, in the order of trying.
    #[error("no host would do: {}", join(.failures))]
    NoHost {
        /// At least one.
        failures: Vec<PgError>,
    },
    /// The server sent what the protocol does not allow here, or what we cannot read. Not PostgreSQL, or a bug of ours.
    #[error("unexpected answer from {server}: {reason}")]
    Protocol {
        /// Host and port, or the socket's path.
        server: String,
        /// What came, and what should have.
        reason: String,
    },
}

impl PgError {
    /// The five characters that say what the server means (`55006`); `None` where no server spoke.
    pub fn sqlstate(&self) -> Option<&str> {
        self.server_error().map(|error| error.sqlstate.as_str())
    }

    /// The server's own words, if it spoke. Of several hosts the last that did.
    pub fn server_error(&self) -> Option<&ServerError> {
        match self {
            Self::Server(error) => Some(error),
            Self::NoHost { failures } => failures.iter().rev().find_map(PgError::server_error),
            _ => None,
        }
    }

    /// What kind of server error this is; `None` where no server spoke.
    pub fn server_kind(&self) -> Option<ServerErrorKind> {
        self.server_error().map(ServerError::kind)
    }

    /// The only place that decides whether the same may work later. No `_` arm: whoever adds a variant decides here.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Lost { .. }
            | Self::Closed { .. }
            | Self::Timeout { .. }
            | Self::WrongRole { .. } => true,
            Self::Server(error) => error.kind().is_retryable(),
            Self::NoHost { failures } => failures.iter().any(PgError::is_retryable),
            Self::Settings { .. } | Self::Tls { .. } | Self::Authentication { .. } | Self::Protocol { .. } => false,
        }
    }
}

/// What an ErrorResponse or a NoticeResponse says. Texts are the server's, in its language.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct ServerError {
    /// `ERROR`, `FATAL`, `PANIC`, `WARNING`, `NOTICE`, …: not translated.
    pub severity: String,
    /// The five characters of SQLSTATE.
    pub sqlstate: String,
    /// The message.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// What the server advises.
    pub hint: Option<String>,
    /// Which server; empty until the connection fills it in.
    pub server: String,
    /// What it was asked to do, without secrets; empty until the connection fills it in.
    pub doing: String,
}

impl ServerError {
    /// What the caller can do about it.
    pub fn kind(&self) -> ServerErrorKind {
        ServerErrorKind::of(&self.sqlstate)
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.server.is_empty() {
            write!(f, "{} answered {}: ", self.server, self.doing)?;
        }
        write!(f, "{}: {} (SQLSTATE {})", self.severity, self.message, self.sqlstate)?;
        if let Some(detail) = &self.detail {
            write!(f, "; detail: {detail}")?;
        }
        if let Some(hint) = self.hint.as_deref().or(self.kind().hint()) {
            write!(f, "; hint: {hint}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for ServerError {}

/// Server errors sorted by what an archiver does about them
/// (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerErrorKind {
    /// 55006: the slot (or another object) is held by another connection; often our own, dead one.
    SlotActive,
    /// 58P01: a file is not there: WAL that was removed, or a history file that is missing.
    FileMissing,
    /// 55000: not in a state to do that: slot invalidated (18 and later), server in recovery.
    WrongState,
    /// 42704: no such slot, role or setting.
    NoSuchObject,
    /// 42710: a slot of this name exists already.
    AlreadyExists,
    /// Class 28 (28P01 wrong password, 28000 no pg_hba.conf entry, …).
    AuthenticationFailed,
    /// 42501: the role lacks a privilege.
    NotAllowed,
    /// 3D000: the database does not exist.
    NoSuchDatabase,
    /// 57P03: starting up, shutting down or in crash recovery.
    NotReadyYet,
    /// 57P01, 57P02, 57P05: the server, or somebody, ended this connection.
    Terminated,
    /// Class 53: too many connections, out of memory, disk full.
    OutOfResources,
    /// Class 08 and 40, 55P03, 57014, 58030: may well work next time.
    Passing,
    /// 0A000: this server cannot do that at all.
    NotSupported,
    /// Anything else.
    Other,
}

impl ServerErrorKind {
    /// The kind of an SQLSTATE.
    pub fn of(sqlstate: &str) -> ServerErrorKind {
        match sqlstate {
            "55006" => Self::SlotActive,
            "58P01" => Self::FileMissing,
            "55000" => Self::WrongState,
            "42704" => Self::NoSuchObject,
            "42710" => Self::AlreadyExists,
            "42501" => Self::NotAllowed,
            "3D000" => Self::NoSuchDatabase,
            "57P03" => Self::NotReadyYet,
            "57P01" | "57P02" | "57P05" => Self::Terminated,
            "55P03" | "57014" | "58030" => Self::Passing,
            "0A000" => Self::NotSupported,
            other => match other.get(..2) {
                Some("28") => Self::AuthenticationFailed,
                Some("53") => Self::OutOfResources,
                Some("08" | "40") => Self::Passing,
                _ => Self::Other,
            },
        }
    }

    fn is_retryable(self) -> bool {
        match self {
            Self::SlotActive | Self::NotReadyYet | Self::Terminated | Self::OutOfResources | Self::Passing => true,
            Self::FileMissing
            | Self::WrongState
            | Self::NoSuchObject
            | Self::AlreadyExists
            | Self::AuthenticationFailed
            | Self::NotAllowed
            | Self::NoSuchDatabase
            | Self::NotSupported
            | Self::Other => false,
        }
    }

    fn hint(self) -> Option<&'static str> {
        match self {
            Self::AuthenticationFailed => Some(
                "check user, password (PGPASSFILE) and pg_hba.conf; replication needs a line whose database is `replication`",
            ),
            Self::SlotActive => {
                Some("does another pgkeep use this slot? A dead connection gives it up within wal_sender_timeout")
            }
            Self::FileMissing
            | Self::WrongState
            | Self::NoSuchObject
            | Self::AlreadyExists
            | Self::NotAllowed
            | Self::NoSuchDatabase
            | Self::NotReadyYet
            | Self::Terminated
            | Self::OutOfResources
            | Self::Passing
            | Self::NotSupported
            | Self::Other => None,
        }
    }
}

fn unreachable_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; hint: is the server running, and is this its unix_socket_directories?",
        io::ErrorKind::ConnectionRefused => {
            "; hint: is the server running there, and does listen_addresses include it?"
        }
        io::ErrorKind::PermissionDenied => "; hint: may this user open the socket's directory?",
        _ => "",
    }
}

fn join(failures: &[PgError]) -> String {
    failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(sqlstate: &str) -> PgError {
        PgError::Server(Box::new(ServerError { sqlstate: sqlstate.to_owned(), ..ServerError::default() }))
    }

    #[test]
    fn what_is_tried_again() {
        for (sqlstate, again) in [
            ("55006", true),
            ("57P03", true),
            ("57P01", true),
            ("53300", true),
            ("08006", true),
            ("58P01", false),
            ("55000", false),
            ("28P01", false),
            ("28000", false),
            ("XX000", false),
            ("", false),
            ("é", false),
        ] {
            assert_eq!(server(sqlstate).is_retryable(), again, "{sqlstate}");
        }
        let refused = || PgError::Unreachable {
            server: "a:1".to_owned(),
            source: io::Error::from(io::ErrorKind::ConnectionRefused),
        };
        assert!(refused().is_retryable());
        let both = PgError::NoHost { failures: vec![refused(), server("28P01")] };
        assert!(both.is_retryable(), "the other host may come back");
        assert_eq!(both.sqlstate(), Some("28P01"));
    }

    #[test]
    fn a_message_says_who_what_and_what_to_do() {
        let error = ServerError {
            severity: "FATAL".to_owned(),
            sqlstate: "28P01".to_owned(),
            message: "password authentication failed for user \"keeper\"".to_owned(),
            server: "db1:5433".to_owned(),
            doing: "the login".to_owned(),
            ..ServerError::default()
        };
        let text = error.to_string();
        for part in ["db1:5433", "the login", "keeper", "28P01", "PGPASSFILE"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
