//! The log: on stderr, text or JSON, never between the lines of a progress bar.

use std::io::{self, Write};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::Context;
use super::output::Bars;

/// Says what is logged, in the words of tracing's `EnvFilter` (`info`, `pgkeep::archive=debug`); stronger than `-q`, `-v`.
pub const FILTER_VARIABLE: &str = "PGKEEP_LOG";
/// `text` or `json`.
pub const FORMAT_VARIABLE: &str = "PGKEEP_LOG_FORMAT";

/// Starts the log once per process. A daemon tells what it does; other commands only what went wrong.
pub(super) fn start(context: &Context, daemon: bool) {
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
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(AroundBars(context.output.bars()));
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
