//! What a hook does before anything is set up: asks the helper.
//!
//! No runtime, no command-line parser, no configuration read, no key: a few `stat`s and one conversation over a socket. Only
//! the plain form of a command line is understood here; any other goes the whole way, as does whatever the helper does not
//! answer.
//!
//! `wal push` never does the whole work in the process that PostgreSQL waits for, but in a child: where that runs out of memory,
//! is killed or panics, the exit code is 1 all the same. Above 125 PostgreSQL's archiver itself would end.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use crate::archive::push::deadline;
use crate::config;
use crate::helper::{self, Call, NoAnswer, Patience, Place};

/// What a process of a hook is that outlives the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Waits for the helper, and exits 0 however that ended.
    Keep,
    /// The helper.
    Serve,
}

/// The helper has a deadline of its own, which ends before this is over.
const LONGER: Duration = Duration::from_secs(10);

/// Options that a hook may have and that its helper has to have in common with it; the second half of each has a value.
pub(in crate::cli) struct Options {
    flags: &'static [&'static str],
    valued: &'static [&'static str],
}

/// Those of every command.
const GLOBAL: Options =
    Options { flags: &["-q", "--quiet", "-v", "-vv", "--verbose"], valued: &["--config", "--cluster", "--repository"] };
/// Those of `wal push`.
pub(in crate::cli) const PUSH: Options = Options { flags: &[], valued: &[] };
/// Those of `wal fetch`.
pub(in crate::cli) const FETCH: Options = Options { flags: &["--standby"], valued: &["--from", "--path", "--until"] };

/// A hook's command line in its plain form.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::cli) struct Plain {
    /// Every option as it was typed, without `named`: what two calls have in common.
    pub options: Vec<OsString>,
    /// The flags of this hook that decide who does the work.
    pub named: Vec<String>,
    /// `--helper`, if given.
    pub role: Option<Role>,
    /// What is no option.
    pub words: Vec<OsString>,
    config: Option<PathBuf>,
}

impl Plain {
    /// Reads `pgkeep [options] wal HOOK [options] words`. `own`: the hook's options. `None`: anything that is not plain, which the
    /// parser proper shall judge.
    pub(in crate::cli) fn read(args: &[OsString], hook: &str, own: &Options) -> Option<Plain> {
        let (mut plain, mut command) = (Plain::default(), ["wal", hook].into_iter());
        let mut args = args.iter().skip(1);
        while let Some(arg) = args.next() {
            let text = arg.to_str()?;
            let (name, value) = match text.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name, Some(OsString::from(value))),
                _ => (text, None),
            };
            match name {
                "--no-helper" | "--here" if value.is_none() => plain.named.push(name.to_owned()),
                "--helper" => {
                    let value = value.or_else(|| args.next().cloned())?;
                    plain.role = Some(match value.to_str()? {
                        "keep" => Role::Keep,
                        "serve" => Role::Serve,
                        _ => return None,
                    });
                }
                name if GLOBAL.valued.contains(&name) || own.valued.contains(&name) => {
                    let has_value = value.is_some();
                    let value = value.or_else(|| args.next().cloned())?;
                    if name == "--config" {
                        plain.config = Some(PathBuf::from(&value));
                    }
                    plain.options.push(arg.clone());
                    plain.options.extend((!has_value).then_some(value));
                }
                name if (GLOBAL.flags.contains(&name) || own.flags.contains(&name)) && value.is_none() => {
                    plain.options.push(arg.clone());
                }
                name if name.starts_with('-') || name.is_empty() => return None,
                name => match command.next() {
                    Some(word) if word == name => {}
                    Some(_) => return None,
                    None => plain.words.push(arg.clone()),
                },
            }
        }
        command.next().is_none().then_some(plain)
    }

    /// What the helper has to have in common with this call; `None` where no configuration file is found.
    pub(in crate::cli) fn call(&self) -> Option<Call> {
        let environment = std::env::var_os(config::ENVIRONMENT_VARIABLE);
        let configuration = config::locate(self.config.as_deref(), environment, Path::exists).ok()?;
        Some(Call { configuration, options: self.options.clone() })
    }

    /// The command line `pgkeep wal HOOK OPTIONS REST`: behind the hook both its own options and those of every command are taken.
    pub(in crate::cli) fn command<'a>(&'a self, hook: &'a str, rest: &[&'a OsStr]) -> Vec<&'a OsStr> {
        let options = self.options.iter().map(OsString::as_os_str);
        ["wal", hook].map(OsStr::new).into_iter().chain(options).chain(rest.iter().copied()).collect()
    }
}

/// The whole of a plain `wal push`, but for the helper itself and for the child that does the work here; its exit code.
pub(in crate::cli) fn push(args: &[OsString]) -> Option<u8> {
    let plain = Plain::read(args, "push", &PUSH)?;
    match plain.role {
        Some(Role::Keep) => {
            let serve = plain.command("push", &["--helper", "serve"].map(OsStr::new));
            return Some(u8::from(helper::keep(&serve).is_err()));
        }
        Some(Role::Serve) => return None,
        None => {}
    }
    let has = |name: &str| plain.named.iter().any(|named| named == name);
    let ([path], false) = (plain.words.as_slice(), has("--here")) else { return None };
    let place = Place::new("", super::push::HELPER);
    let mut is_wanted = false;
    if !has("--no-helper") && path.to_str().is_some() {
        match ask(&plain, &place, Path::new(path)) {
            Ok((code, text)) => {
                let _ = std::io::stderr().write_all(text.as_bytes()); // nobody may be reading
                return Some(code.min(1));
            }
            Err(why) => {
                is_wanted = matches!(why, NoAnswer::NoHelper | NoAnswer::NotForMe | NoAnswer::BrokeOff);
            }
        }
    }
    let here = plain.command("push", &[OsStr::new("--here"), path.as_os_str()]);
    let child = work_in_child(&here);
    if is_wanted {
        // For the next call. Why there is none is said by whoever looks: this one works without.
        let _ = helper::start(&place, &plain.command("push", &["--helper", "keep"].map(OsStr::new)));
    }
    Some(match child.and_then(|mut child| child.wait()) {
        Ok(status) => push_code(status),
        Err(error) => say(&format!("could not start the work: {error}; the file is offered again")),
    })
}

fn ask(plain: &Plain, place: &Place, path: &Path) -> Result<(u8, String), NoAnswer> {
    let fingerprint = plain.call().and_then(|call| call.fingerprint(place).ok()).ok_or(NoAnswer::Request)?;
    let request = path.to_str().ok_or(NoAnswer::Request)?;
    helper::ask(place, &fingerprint, request, Patience::of(deadline(path) + LONGER))
        .map(|answer| (answer.code, answer.text))
}

fn work_in_child(args: &[&OsStr]) -> std::io::Result<Child> {
    Command::new(std::env::current_exe()?).args(args).spawn()
}

/// 0 for 0, 1 for anything else.
fn push_code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(0), _) => 0,
        (None, Some(signal)) => {
            say(&format!("the process that was to archive the file was ended by signal {signal}; it is offered again"))
        }
        _ => 1,
    }
}

fn say(text: &str) -> u8 {
    let _ = writeln!(std::io::stderr(), "error: {text}"); // nobody may be reading
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Option<Plain> {
        let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        Plain::read(&args, "push", &PUSH)
    }

    #[test]
    fn the_plain_form_is_understood_and_nothing_else() {
        let plain =
            read("pgkeep --config /etc/x.toml -q wal push --repository=a --cluster c pg_wal/00000002.history").unwrap();
        assert_eq!(plain.options, ["--config", "/etc/x.toml", "-q", "--repository=a", "--cluster", "c"]);
        assert_eq!(plain.words, ["pg_wal/00000002.history"]);
        assert_eq!(plain.config.as_deref(), Some(Path::new("/etc/x.toml")));
        assert_eq!(read("pgkeep wal push --no-helper x").unwrap().named, ["--no-helper"]);
        assert_eq!(read("pgkeep wal push --helper serve").unwrap().role, Some(Role::Serve));
        for other in [
            "pgkeep",
            "pgkeep wal",
            "pgkeep wal fetch a b",
            "pgkeep push wal x",
            "pgkeep --json wal push x",
            "pgkeep --confg x wal push y",
            "pgkeep wal push -x",
            "pgkeep wal push --help",
            "pgkeep wal push x --config",
            "pgkeep wal push --helper nonsense",
            "pgkeep wal push --here=1 x",
            "pgkeep wal push --standby x",
            "pgkeep wal push --from a x",
            "pgkeep -q=1 wal push x",
            "pgkeep list",
        ] {
            assert_eq!(read(other), None, "{other}");
        }
    }

    /// What a helper is started with is what the call that starts it had: otherwise it would never be for that call.
    #[test]
    fn a_helper_has_its_callers_options() {
        let call = read("pgkeep --config=/x.toml wal -v push --cluster c pg_wal/x").unwrap();
        let started = call.command("push", &["--helper", "serve"].map(OsStr::new));
        let args: Vec<OsString> = [OsStr::new("pgkeep")].into_iter().chain(started).map(OsString::from).collect();
        let helper = Plain::read(&args, "push", &PUSH).unwrap();
        assert_eq!((&helper.options, helper.role), (&call.options, Some(Role::Serve)));
    }

    #[test]
    fn pitfall_22_however_the_work_ends_the_code_is_0_or_1() {
        // As wait(2) reports them: an exit code in the second byte, or a signal in the first, perhaps with a core.
        for code in 0..=255 {
            assert_eq!(push_code(ExitStatus::from_raw(code << 8)), u8::from(code != 0), "exit {code}");
        }
        for signal in [1, 6, 9, 11, 15, 25, 6 | 0x80] {
            assert_eq!(push_code(ExitStatus::from_raw(signal)), 1, "signal {signal}");
        }
    }
}
