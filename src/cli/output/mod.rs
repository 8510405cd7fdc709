//! What the user sees: results on stdout as text or JSON, progress and errors on stderr.

mod human;
mod progress;
mod table;

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

pub use human::{bytes, bytes_per_second, count, duration, time, time_in};
pub use progress::{Bars, Progress};
pub use table::{Align, Table};

use super::CliError;

/// Where results and progress of a command go. Cheap to clone.
///
/// Nobody reading any more (`pgkeep list | head`) is no error: the rest is dropped.
#[derive(Debug, Clone)]
pub struct Output {
    json: bool,
    quiet: bool,
    bars: Bars,
}

impl Output {
    /// `json` for documents instead of text on stdout; `quiet` for no progress.
    pub fn new(json: bool, quiet: bool) -> Output {
        Output { json, quiet, bars: Bars::new(!quiet && io::stderr().is_terminal()) }
    }

    /// Whether results are JSON: a command then prints nothing but documents.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// A line of text for a person; nothing with `--json`.
    pub fn line(&self, text: impl std::fmt::Display) {
        if !self.json {
            self.to_stdout(&format!("{text}\n"));
        }
    }

    /// The one document of a command that answers once; nothing without `--json`.
    pub fn document(&self, document: &impl Serialize) {
        if self.json {
            self.print_json(document, true);
        }
    }

    /// One object of a stream, on a line of its own; nothing without `--json`.
    pub fn event(&self, event: &impl Serialize) {
        if self.json {
            self.print_json(event, false);
        }
    }

    /// The result of a command: `document` with `--json`, else `text`.
    pub fn result(&self, document: &impl Serialize, text: impl std::fmt::Display) {
        self.document(document);
        self.line(text);
    }

    /// A remark on stderr, for a person; not with `-q`.
    pub fn note(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            self.to_stderr(&format!("{text}\n"));
        }
    }

    /// Why a command failed: a sentence on stderr, and with `--json` a document on stdout as well.
    pub fn error(&self, error: &CliError) {
        self.to_stderr(&format!("error: {error}\n"));
        if self.json {
            self.print_json(&error.document(), false);
        }
    }

    /// Shows how far a long work is; `total` in bytes, if it is known.
    pub fn progress(&self, what: &str, total: Option<u64>) -> Progress {
        Progress::start(what, total, &self.bars, self.quiet)
    }

    /// Whether stderr is a terminal: colours and bars make sense there.
    pub fn stderr_is_terminal(&self) -> bool {
        io::stderr().is_terminal()
    }

    pub(super) fn bars(&self) -> Bars {
        self.bars.clone()
    }

    fn print_json(&self, document: &impl Serialize, pretty: bool) {
        let text = if pretty { serde_json::to_string_pretty(document) } else { serde_json::to_string(document) };
        match text {
            Ok(text) => self.to_stdout(&format!("{text}\n")),
            Err(error) => tracing::error!("a result cannot be written as JSON: {error}"),
        }
    }

    fn to_stdout(&self, text: &str) {
        self.bars.around(|| {
            let mut stdout = io::stdout().lock();
            let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()); // nobody may be reading
        });
    }

    fn to_stderr(&self, text: &str) {
        self.bars.around(|| {
            let _ = io::stderr().lock().write_all(text.as_bytes());
        });
    }
}
