use std::path::{Path, PathBuf};

use super::{ENVIRONMENT_VARIABLE, SOUGHT};
use crate::types::ParseError;

/// Why there is no configuration to work with. A person has to change something; trying again does not help.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// `--config` and the environment say nothing, and no usual place has a file.
    #[error(
        "no configuration file. Sought: --config, ${ENVIRONMENT_VARIABLE}, {}. Write one with `pgkeep init`",
        SOUGHT.join(", ")
    )]
    NotFound,
    /// The file that was asked for cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file says something that does not hold together. All problems at once.
    #[error("{}", problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Invalid {
        /// In the order of their lines.
        problems: Vec<Problem>,
    },
    /// A `--cluster` or `--repository` that is not in the file.
    #[error("{} has no {what} {name:?}; {}", file.display(), there_are(what, names, name))]
    Unknown {
        /// `cluster` or `repository`.
        what: &'static str,
        /// What was asked for.
        name: String,
        /// What there is.
        names: Vec<String>,
        /// Where.
        file: PathBuf,
    },
    /// The file has none, and the command needs one.
    #[error("{} has no [{what}.NAME]", file.display())]
    None {
        /// `cluster` or `repository`.
        what: &'static str,
        /// Where.
        file: PathBuf,
    },
    /// The command works on one, and the file has several.
    #[error("there are several of them: say which {what} with {option} ({})", names.join(", "))]
    Several {
        /// `cluster` or `repository`.
        what: &'static str,
        /// The option that says which.
        option: &'static str,
        /// What there is.
        names: Vec<String>,
    },
    /// A name from the command line that no cluster can have.
    #[error("{source}")]
    Name {
        /// What is wrong with it.
        source: ParseError,
    },
    /// A key or passphrase cannot be read. The text never holds what was read.
    #[error("the key of repository {repository}: {reason}")]
    Key {
        /// The repository's name in the file.
        repository: String,
        /// What happened and what to do.
        reason: String,
    },
}

impl ConfigError {
    /// Whether another try may succeed with nothing changed. Only the key command depends on something that recovers,
    /// and it cannot be told from a wrong one: none may.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NotFound
            | Self::Read { .. }
            | Self::Invalid { .. }
            | Self::Unknown { .. }
            | Self::None { .. }
            | Self::Several { .. }
            | Self::Name { .. }
            | Self::Key { .. } => false,
        }
    }

    pub(super) fn read(path: &Path, source: std::io::Error) -> ConfigError {
        ConfigError::Read { path: path.to_owned(), source }
    }
}

/// One thing that is wrong with the file, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The configuration file.
    pub file: PathBuf,
    /// From 1; `None` where the problem has no line of its own.
    pub line: Option<usize>,
    /// A sentence, without a full stop.
    pub what: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", self.what)
    }
}

/// The name in `names` that was probably meant by `written`.
pub(super) fn nearest<'a>(written: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let written = written.to_lowercase();
    names
        .into_iter()
        .map(|name| (strsim::jaro_winkler(&written, name), name))
        .filter(|(likeness, _)| *likeness >= 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

fn there_are(what: &str, names: &[String], written: &str) -> String {
    if names.is_empty() {
        return format!("it has no [{what}.NAME] at all");
    }
    match nearest(written, names.iter().map(String::as_str)) {
        Some(name) => format!("did you mean {name:?}?"),
        None => format!("it has {}", names.join(", ")),
    }
}
