use std::fmt;

use serde::Serialize;

use super::exit::Exit;
use crate::config::ConfigError;

/// Why a command did not do what it was asked: one sentence, what to do about it, and the exit code.
///
/// Made by the constructors below, so that every command says which exit code an error of a room means.
#[derive(Debug)]
pub struct CliError {
    exit: Exit,
    source: anyhow::Error,
    hint: Option<String>,
}

impl CliError {
    /// The answer is no (1).
    pub fn no(error: impl Into<anyhow::Error>) -> CliError {
        CliError::new(Exit::No, error)
    }

    /// Bad usage or configuration (2).
    pub fn usage(error: impl Into<anyhow::Error>) -> CliError {
        CliError::new(Exit::Usage, error)
    }

    /// Could not; another try may help (3).
    pub fn failed(error: impl Into<anyhow::Error>) -> CliError {
        CliError::new(Exit::Failed, error)
    }

    /// Refused, to protect data (4).
    pub fn refused(error: impl Into<anyhow::Error>) -> CliError {
        CliError::new(Exit::Refused, error)
    }

    /// With an exit code that was decided elsewhere.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> CliError {
        CliError { exit, source: error.into(), hint: None }
    }

    /// What was being done, verb first, before the rest of the sentence: `read timeline history`.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display + Send + Sync + 'static) -> CliError {
        self.source = self.source.context(context);
        self
    }

    /// What a person can do about it, as a line of its own.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> CliError {
        self.hint = Some(hint.into());
        self
    }

    /// The chain of causes as one sentence. A cause that is told already (many errors say theirs) is not told twice.
    pub fn sentence(&self) -> String {
        let mut sentence = String::new();
        for cause in self.source.chain().map(ToString::to_string) {
            if sentence.is_empty() {
                sentence = cause;
            } else if !sentence.contains(&cause) {
                sentence.push_str(": ");
                sentence.push_str(&cause);
            }
        }
        sentence
    }

    /// The exit code.
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// The `--json` document for this error.
    pub fn document(&self) -> impl Serialize + use<> {
        ErrorDocument {
            error: ErrorBody {
                code: self.exit.code(),
                kind: self.exit.word(),
                message: self.sentence(),
                hint: self.hint.clone(),
            },
        }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence())?;
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> CliError {
        CliError::usage(error)
    }
}

#[derive(Serialize)]
struct ErrorDocument {
    error: ErrorBody,
}

#[derive(Serialize)]
struct ErrorBody {
    code: u8,
    kind: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let cause = std::io::Error::other("disk on fire");
        let error = anyhow::Error::new(cause).context("write x: disk on fire").context("back up");
        assert_eq!(CliError::failed(error).to_string(), "back up: write x: disk on fire");
    }

    #[test]
    fn an_error_reads_as_one_sentence_and_its_hint() {
        let error = CliError::refused(anyhow::anyhow!("other bytes are there"))
            .context("store segment 000000010000000000000003")
            .hint("do two primaries archive here?");
        assert_eq!(
            error.to_string(),
            "store segment 000000010000000000000003: other bytes are there\nhint: do two primaries archive here?"
        );
        let json = serde_json::to_value(error.document()).unwrap();
        assert_eq!((json["error"]["code"].as_u64(), json["error"]["kind"].as_str()), (Some(4), Some("refused")));
    }
}
