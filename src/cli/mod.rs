//! The command line: parse, build what a command needs, call it, print, exit.
//!
//! One thin file per command: its `Args`, and `run`, which reads options, calls the rooms and prints. Nothing is decided
//! here. Results go to stdout (text, or with `--json` one document, or one object per line); progress, logs and errors
//! go to stderr. Exit codes are those of [`exit`]; the hooks keep PostgreSQL's whatever happens, a panic included.

mod advice;
pub mod args;
mod bucket;
mod care;
mod chronicle;
mod context;
mod error;
pub mod exit;
mod ladder;
mod lease;
mod logging;
mod mend;
pub mod open;
pub mod output;
mod place;
mod reread;
mod scheduled;
mod several;
mod signal;
mod standing;
mod watching;

mod backup;
mod check;
mod copy;
mod demo;
mod drill;
mod events;
mod expire;
mod hold;
mod index;
mod init;
mod key;
mod list;
mod log;
mod plan;
mod restore;
mod run;
mod verify;
mod wal;

use std::ffi::OsString;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};

pub use args::{Cli, Command, Global};
pub use context::Context;
pub use error::CliError;
pub use exit::{Exit, Hook};
pub use signal::stop_on_signal;

/// The whole program: everything between the arguments and the exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    // Most calls of a hook end here, before anything is set up.
    if let Some(code) = wal::quick::push(&args).or_else(|| wal::ahead::quick(&args)) {
        return ExitCode::from(code);
    }
    match Cli::try_parse_from(&args) {
        Ok(cli) => {
            let hook = hook_of(&cli.command);
            let code = exit_code(hook, AssertUnwindSafe(|| run_command(cli)));
            if hook == Some(Hook::Fetch) {
                wal::ahead::after(&args, code);
            }
            ExitCode::from(code)
        }
        Err(answer) => {
            ExitCode::from(exit_code(Hook::meant_by(&args), AssertUnwindSafe(|| not_parsed(&answer, &args))))
        }
    }
}

/// A hook's code is PostgreSQL's even when `run` panics: the panic's message is on stderr already, and what `run` held
/// is never looked at again.
fn exit_code(hook: Option<Hook>, run: AssertUnwindSafe<impl FnOnce() -> Exit>) -> u8 {
    match hook {
        Some(hook) => hook.code(std::panic::catch_unwind(run).ok()),
        None => run.0().code(),
    }
}

fn hook_of(command: &Command) -> Option<Hook> {
    match command {
        Command::Wal(wal::Wal { hook: wal::Command::Push(_) }) => Some(Hook::Push),
        Command::Wal(wal::Wal { hook: wal::Command::Fetch(_) }) => Some(Hook::Fetch),
        _ => None,
    }
}

/// The command line's definition: what the reference is checked against.
pub fn command() -> clap::Command {
    Cli::command()
}

fn run_command(cli: Cli) -> Exit {
    let context = Context::new(cli.global);
    logging::start(&context, &cli.command);
    let result = runtime(&cli.command).and_then(|runtime| {
        let result = runtime.block_on(dispatch(&context, cli.command));
        // Blocking work that is left (a read that hangs) must not hold the exit.
        runtime.shutdown_timeout(Duration::from_secs(1));
        result
    });
    result.unwrap_or_else(|error| {
        context.output.error(&error);
        error.exit()
    })
}

/// `--help` and `--version` are answers; anything else is bad usage.
fn not_parsed(answer: &clap::Error, args: &[OsString]) -> Exit {
    if !answer.use_stderr() {
        let _ = answer.print(); // nobody may be reading
        return Exit::Done;
    }
    if args.iter().any(|arg| arg == "--json") {
        let text = answer.render().to_string();
        let message = text.trim_start_matches("error: ").trim_end().to_owned();
        output::Output::new(true, false).error(&CliError::usage(anyhow::Error::msg(message)));
    } else {
        let _ = answer.print();
    }
    Exit::Usage
}

/// The hooks are started for every segment: no threads for them that they do not need.
fn runtime(command: &Command) -> Result<tokio::runtime::Runtime, CliError> {
    let mut builder = match command {
        Command::Wal(_) => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    builder.enable_all().build().map_err(|error| CliError::failed(error).context("start the runtime"))
}

async fn dispatch(context: &Context, command: Command) -> Result<Exit, CliError> {
    match command {
        Command::Init(args) => init::run(context, args).await,
        Command::Check(args) => check::run(context, args).await,
        Command::Run(args) => run::run(context, args).await,
        Command::Backup(args) => backup::run(context, args).await,
        Command::List(args) => list::run(context, args).await,
        Command::Log(args) => log::run(context, args).await,
        Command::Plan(args) => plan::run(context, args).await,
        Command::Restore(args) => restore::run(context, args).await,
        Command::Wal(wal::Wal { hook: wal::Command::Push(args) }) => wal::push::run(context, args).await,
        Command::Wal(wal::Wal { hook: wal::Command::Fetch(args) }) => wal::fetch::run(context, args).await,
        Command::Copy(args) => copy::run(context, args).await,
        Command::Verify(args) => verify::run(context, args).await,
        Command::Drill(args) => drill::run(context, args).await,
        Command::Expire(args) => expire::run(context, args).await,
        Command::Hold(hold::Hold { what }) => hold::run(context, what).await,
        Command::Key(key::Key { what }) => key::run(context, what).await,
        Command::Events(args) => events::run(context, args).await,
        Command::Index(index::Index { what: index::Command::Rebuild(args) }) => index::rebuild(context, args).await,
        Command::Demo(args) => demo::run(context, args).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pitfall_22_a_panic_keeps_postgresqls_exit_codes() {
        let bug = || -> Exit { panic!("a bug") };
        assert_eq!(exit_code(Some(Hook::Push), AssertUnwindSafe(bug)), 1);
        assert_eq!(exit_code(Some(Hook::Fetch), AssertUnwindSafe(bug)), 200);
        assert_eq!(exit_code(Some(Hook::Fetch), AssertUnwindSafe(|| Exit::No)), 1);
        assert_eq!(exit_code(None, AssertUnwindSafe(|| Exit::Refused)), 4);
    }
}
