//! The log: on stderr, text or JSON, never between the lines of a progress bar. A helper has no stderr that anybody reads: what
//! it logs is collected for the next hook.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use super::output::Bars;
use super::{Command, Context};

/// Says what is logged, in the words of tracing's `EnvFilter` (`info`, `pgkeep::archive=debug`); stronger than `-q`, `-v`.
pub const FILTER_VARIABLE: &str = "PGKEEP_LOG";
/// `text` or `json`.
pub const FORMAT_VARIABLE: &str = "PGKEEP_LOG_FORMAT";

/// Starts the log once per process. A daemon tells what it does; other commands only what went wrong.
pub(super) fn start(context: &Context, command: &Command) {
    let daemon = matches!(command, Command::Run(_));
    let from_options = match (context.global.quiet, context.global.verbose, daemon) {
        (true, _, _) => "error",
        (false, 0, false) => "warn",
        (false, 0, true) => "info",
        (false, 1, false) => "pgkeep=info,warn",
        (false, 1, true) => "pgkeep=debug,info",
        (false, 2, false) => "pgkeep=debug,info",
        (false, _, _) => "trace",
    };
    let written = std::env::var(FILTER_VARIABLE).unwrap_or_default();
    let (filter, misread) = match EnvFilter::builder().parse(if written.is_empty() { from_options } else { &written }) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(from_options), Some(error)),
    };
    let json = std::env::var(FORMAT_VARIABLE).is_ok_and(|format| format == "json");
    let writer = match command {
        Command::Wal(wal) if wal.hook.is_helper() => BoxMakeWriter::new(context.log.clone()),
        _ => BoxMakeWriter::new(AroundBars(context.output.bars())),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    // The second call of a process (a test) keeps the first log.
    let _ = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_ansi(context.output.stderr_is_terminal()).with_target(false).try_init()
    };
    if let Some(error) = misread {
        tracing::warn!("{FILTER_VARIABLE} is not understood ({error}); going on without it");
    }
}

/// Takes the progress bars off the terminal while a line is written.
#[derive(Clone)]
struct AroundBars(Bars);

impl Write for AroundBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.around(|| io::stderr().lock().write_all(bytes)).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for AroundBars {
    type Writer = AroundBars;

    fn make_writer(&'a self) -> AroundBars {
        self.clone()
    }
}

/// What was logged and not yet taken; bounded: what is too much is counted. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Collected(Arc<Mutex<Lines>>);

#[derive(Debug, Default)]
struct Lines {
    text: String,
    dropped: u64,
}

/// Fits into an answer with room for an error.
const MAX_COLLECTED: usize = 32 << 10;

impl Collected {
    /// Everything since the last time.
    pub fn take(&self) -> String {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner); // each change is one line
        let Lines { mut text, dropped } = std::mem::take(&mut *lines);
        if dropped > 0 {
            text.push_str(&format!("{dropped} more lines of the log were dropped\n"));
        }
        text
    }
}

impl Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.text.len() + bytes.len() > MAX_COLLECTED {
            lines.dropped += 1;
        } else {
            lines.text.push_str(&String::from_utf8_lossy(bytes));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Collected {
    type Writer = Collected;

    fn make_writer(&'a self) -> Collected {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_collected_is_taken_once_and_bounded() {
        let log = Collected::default();
        for number in 0..2000 {
            writeln!(log.clone(), "line {number} {}", "x".repeat(40)).unwrap();
        }
        let taken = log.take();
        assert!(taken.len() < MAX_COLLECTED + 100 && taken.starts_with("line 0 "));
        assert!(taken.contains("more lines of the log were dropped"));
        assert_eq!(log.take(), "");
    }
}
