//! The settings that make a restored server recover to its target, alone: pure text in, text out.
//!
//! All of them go into `postgresql.auto.conf`, which is read last and which `pg_verifybackup` does not compare. Lines that
//! were there and that they replace stay, as comments.
//!
//! What always holds: exactly one target is set, a record's position or `immediate`, on a timeline given by its number
//! (a missing file can then never shorten a history, MEASURED.md 1); and nothing leads back to the production server:
//! no archiving, no streaming, no waiting for standbys, no cleaning up (pitfall 28).

use std::fmt::Write as _;
use std::path::Path;

use super::RestoreError;
use crate::catalog::records::ServerParameters;
use crate::plan::{PathPart, Stop};
use crate::types::{Lsn, TimelineId};

/// What the server does at the target: PostgreSQL's `recovery_target_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Stays in recovery, readable.
    Pause,
    /// Becomes a primary on a new timeline.
    Promote,
    /// Stops.
    Shutdown,
}

impl Action {
    fn word(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Promote => "promote",
            Self::Shutdown => "shutdown",
        }
    }
}

/// What `restore_command` is told.
#[derive(Debug, Clone)]
pub struct FetchCommand<'a> {
    /// This program, absolute.
    pub program: &'a Path,
    /// The configuration file, absolute.
    pub config: &'a Path,
    /// The repository's name in it; `None`: all that the cluster has.
    pub repository: Option<&'a str>,
    /// Of those, the only ones that may be asked; empty: any.
    pub from: &'a [&'a str],
    /// The cluster's name.
    pub cluster: &'a str,
    /// The branches that recovery follows.
    pub path: &'a [PathPart],
    /// WAL is needed up to here.
    pub until: Lsn,
}

/// Everything the settings are made of.
#[derive(Debug, Clone)]
pub struct Recovery<'a> {
    /// The server's major version.
    pub major: u32,
    /// Where recovery stops.
    pub stop: Stop,
    /// On which timeline.
    pub timeline: TimelineId,
    /// What then.
    pub action: Action,
    /// What must not be lower.
    pub parameters: ServerParameters,
    /// `restore_command`, as [`FetchCommand::command`] made it.
    pub restore_command: &'a str,
    /// What was restored, for the comment.
    pub title: &'a str,
}

/// A word for `sh`: in quotes where it needs them.
fn shell_word(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./:@,+=".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl FetchCommand<'_> {
    /// The command as `sh` and the server's `%` rules want it.
    ///
    /// # Errors
    /// [`RestoreError::Command`] for a path that is no text or has several lines.
    pub fn command(&self) -> Result<String, RestoreError> {
        let path = |path: &Path| match path.to_str() {
            Some(text) if !text.contains(['\n', '\r']) => Ok(text.to_owned()),
            text => {
                let reason = if text.is_some() { "its name has a line break" } else { "its name is not UTF-8" };
                Err(RestoreError::Command { what: path.display().to_string(), reason })
            }
        };
        let steps = self.path.iter().map(|part| match part.to {
            Some(left) => format!("{}@{left}", part.branch),
            None => part.branch.to_string(),
        });
        let (program, config) = (path(self.program)?, path(self.config)?);
        let (steps, until) = (steps.collect::<Vec<_>>().join(","), self.until.to_string());
        let mut words = vec![program.as_str(), "--config", &config];
        words.extend(self.repository.iter().flat_map(|repository| ["--repository", repository]));
        words.extend(["--cluster", self.cluster, "wal", "fetch"]);
        let from = self.from.join(",");
        words.extend(Some(["--from", &from]).filter(|_| !self.from.is_empty()).into_iter().flatten());
        words.extend(["--path", &steps, "--until", &until]);
        let words: Vec<String> = words.into_iter().map(|word| shell_word(word).replace('%', "%%")).collect();
        Ok(format!("exec {} %f %p", words.join(" ")))
    }
}

impl Recovery<'_> {
    /// Name and value of every setting, in the order in which they have to stand: the server refuses a second target, and
    /// counts an emptied one that follows the real one as that.
    fn settings(&self, old: &str) -> Vec<(&'static str, String)> {
        let mut all: Vec<(&'static str, String)> = Vec::new();
        let off = ["primary_conninfo", "primary_slot_name", "synchronous_standby_names"];
        let commands = ["archive_cleanup_command", "recovery_end_command"];
        let targets = [
            "recovery_target",
            "recovery_target_name",
            "recovery_target_time",
            "recovery_target_xid",
            "recovery_target_lsn",
        ];
        all.push(("archive_mode", "off".to_owned()));
        all.extend(off.into_iter().chain(commands).map(|name| (name, String::new())));
        if self.major < 16 {
            all.push(("promote_trigger_file", String::new()));
        }
        if self.major >= 17 {
            all.push(("synchronized_standby_slots", String::new()));
            all.push(("sync_replication_slots", "off".to_owned()));
        }
        all.push(("recovery_min_apply_delay", "0".to_owned()));
        if self.action == Action::Pause {
            all.push(("hot_standby", "on".to_owned())); // else the server stops at the target instead of pausing
        }
        let ServerParameters {
            max_connections,
            max_worker_processes,
            max_wal_senders,
            max_prepared_transactions,
            max_locks_per_transaction,
        } = self.parameters;
        for (name, least) in [
            ("max_connections", max_connections),
            ("max_worker_processes", max_worker_processes),
            ("max_wal_senders", max_wal_senders),
            ("max_prepared_transactions", max_prepared_transactions),
            ("max_locks_per_transaction", max_locks_per_transaction),
        ] {
            // No server has 0 connections: then they are not known.
            let enough = value_in(old, name).and_then(|value| value.parse().ok()).is_some_and(|had: u32| had >= least);
            if max_connections > 0 && !enough {
                all.push((name, least.to_string()));
            }
        }
        all.push(("restore_command", self.restore_command.to_owned()));
        all.push(("recovery_target_timeline", self.timeline.get().to_string()));
        all.push(("recovery_target_action", self.action.word().to_owned()));
        let (target, value, inclusive) = match self.stop {
            Stop::At(stop) => ("recovery_target_lsn", stop.record.to_string(), stop.inclusive),
            Stop::Immediate => ("recovery_target", "immediate".to_owned(), true),
        };
        all.push(("recovery_target_inclusive", if inclusive { "on" } else { "off" }.to_owned()));
        all.extend(targets.into_iter().filter(|name| *name != target).map(|name| (name, String::new())));
        all.push((target, value));
        all
    }

    /// The new `postgresql.auto.conf`, from the one in the backup.
    pub fn auto_conf(&self, old: &str) -> String {
        let settings = self.settings(old);
        let mut text = String::with_capacity(old.len() + 2048);
        for line in old.lines() {
            let replaced =
                name_in(line).is_some_and(|name| settings.iter().any(|(set, _)| name.eq_ignore_ascii_case(set)));
            let _ = writeln!(text, "{}{line}", if replaced { "# before the restore: " } else { "" });
        }
        let _ = writeln!(text, "\n# Written by pgkeep restore: {}.", self.title.replace(['\n', '\r'], " "));
        text.push_str(
            "# Not needed any more once recovery has ended, except to undo them: archive_mode and whom to stream to.\n",
        );
        for (name, value) in settings {
            let _ = writeln!(text, "{name} = {}", quoted(&value));
        }
        text
    }
}

/// A value as the configuration file wants it.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', r"\\").replace('\'', "''"))
}

/// The setting that a line of a configuration file sets.
fn name_in(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let end = line
        .find(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_' || letter == '.'))
        .unwrap_or(line.len());
    let name = line.get(..end)?;
    name.starts_with(|letter: char| letter.is_ascii_alphabetic() || letter == '_').then_some(name)
}

/// The value of a setting as the last line that sets it has it, without quotes.
fn value_in<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text.lines().rev().find(|line| name_in(line).is_some_and(|found| found.eq_ignore_ascii_case(name)))?;
    let rest = line.trim_start().get(name.len()..)?.trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    Some(match rest.strip_prefix('\'') {
        Some(quoted) => quoted.split('\'').next().unwrap_or_default(),
        None => rest.split(|letter: char| letter.is_whitespace() || letter == '#').next().unwrap_or_default(),
    })
}

/// Settings in a restored `postgresql.conf` that point out of the data directory.
pub fn leads_elsewhere(conf: &str) -> Vec<String> {
    ["data_directory", "hba_file", "ident_file", "external_pid_file"]
        .into_iter()
        .filter_map(|name| {
            let value = value_in(conf, name).filter(|value| !value.is_empty())?;
            Some(format!(
                "postgresql.conf sets {name} = {}: take that line out before the server starts, or it uses the other \
                 server's",
                quoted(value)
            ))
        })
        .collect()
}

/// A `postgresql.conf` for a cluster that had its own elsewhere.
pub const MINIMAL_CONF: &str = "\
# Written by pgkeep restore: the server's postgresql.conf lay outside of its data directory and is not in the backup.
# What recovery needs is in postgresql.auto.conf.
";

/// A `pg_hba.conf` for a cluster that had its own elsewhere: only who is the same user here.
pub const MINIMAL_HBA: &str = "\
# Written by pgkeep restore: the server's pg_hba.conf lay outside of its data directory and is not in the backup.
local all all peer
local replication all peer
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::StopAt;
    use crate::types::Branch;
    use proptest::prelude::*;

    fn recovery(stop: Stop) -> Recovery<'static> {
        Recovery {
            major: 15,
            stop,
            timeline: TimelineId::new(10).unwrap(),
            action: Action::Pause,
            parameters: ServerParameters {
                max_connections: 100,
                max_worker_processes: 8,
                max_wal_senders: 10,
                max_prepared_transactions: 0,
                max_locks_per_transaction: 64,
            },
            restore_command: "exec x %f %p",
            title: "a test",
        }
    }

    fn at(inclusive: bool) -> Stop {
        let record = "16/B374D848".parse().unwrap();
        Stop::At(StopAt { record, inclusive, needed_to: Lsn::new(u64::MAX) })
    }

    /// What the server would take: the last value of each name, and the order of the names.
    fn read(text: &str) -> Vec<(String, String)> {
        let lines = text.lines().filter_map(|line| Some((name_in(line)?.to_owned(), line)));
        lines.map(|(name, line)| (name.clone(), value_in(line, &name).unwrap().to_owned())).collect()
    }

    #[test]
    fn exactly_one_target_and_it_stands_last() {
        for (stop, name, value, inclusive) in [
            (at(true), "recovery_target_lsn", "16/B374D848", "on"),
            (at(false), "recovery_target_lsn", "16/B374D848", "off"),
            (Stop::Immediate, "recovery_target", "immediate", "on"),
        ] {
            let settings = read(&recovery(stop).auto_conf("recovery_target_time = '2020-01-01'\n"));
            let is_target = |name: &str| {
                name.starts_with("recovery_target")
                    && !["recovery_target_action", "recovery_target_inclusive", "recovery_target_timeline"]
                        .contains(&name)
            };
            let targets: Vec<_> =
                settings.iter().filter(|(name, value)| is_target(name) && !value.is_empty()).collect();
            assert_eq!(targets, [&(name.to_owned(), value.to_owned())]);
            assert_eq!(settings.last().map(|(name, _)| name.as_str()), Some(name));
            assert!(settings.contains(&("recovery_target_inclusive".to_owned(), inclusive.to_owned())));
            assert!(settings.contains(&("recovery_target_timeline".to_owned(), "10".to_owned())));
        }
    }

    #[test]
    fn pitfall_28_nothing_leads_back_to_production() {
        let old = "# Do not edit this file manually!\nprimary_conninfo = 'host=prod password=x'\nARCHIVE_MODE = 'on'\n\
                   work_mem = '4MB'\nmax_connections = '500'\nmax_worker_processes = 2\n";
        let text = recovery(at(true)).auto_conf(old);
        let settings = read(&text);
        let value = |name: &str| settings.iter().rev().find(|(set, _)| set == name).map(|(_, value)| value.as_str());
        assert_eq!(value("archive_mode"), Some("off"));
        let empty = ["primary_conninfo", "primary_slot_name", "synchronous_standby_names", "archive_cleanup_command"];
        assert!(empty.into_iter().all(|name| value(name) == Some("")));
        assert_eq!(value("work_mem"), Some("4MB"));
        assert_eq!(value("max_connections"), Some("500"), "it was enough");
        assert_eq!(value("max_worker_processes"), Some("8"), "it was too low");
        assert!(text.contains("# before the restore: primary_conninfo = 'host=prod password=x'"));
        assert!(text.contains("# before the restore: ARCHIVE_MODE = 'on'"));
        let names: std::collections::HashSet<_> = settings.iter().map(|(name, _)| name.to_ascii_lowercase()).collect();
        assert_eq!(names.len(), settings.len(), "nothing is set twice");
    }

    #[test]
    fn the_command_survives_any_path() {
        let branch: Branch = "00000001".parse().unwrap();
        let path = [
            PathPart { branch, from: Lsn::ZERO, to: Some("0/5000148".parse().unwrap()) },
            PathPart { branch: "00000002".parse().unwrap(), from: Lsn::ZERO, to: None },
        ];
        let command = |program: &str, repository: Option<&str>, from: &[&str]| {
            FetchCommand {
                program: Path::new(program),
                config: Path::new("/etc/pgkeep/pgkeep.toml"),
                repository,
                from,
                cluster: "c",
                path: &path,
                until: "0/6000000".parse().unwrap(),
            }
            .command()
        };
        assert_eq!(
            command("/usr/bin/pgkeep", Some("main"), &[]).unwrap(),
            "exec /usr/bin/pgkeep --config /etc/pgkeep/pgkeep.toml --repository main --cluster c \
             wal fetch --path 00000001@0/5000148,00000002 --until 0/6000000 %f %p"
        );
        assert!(
            command("/p", None, &["near", "far"])
                .unwrap()
                .contains(" --cluster c wal fetch --from near,far --path 00000001@0/5000148")
        );
        assert!(
            command("/opt/a b's 100%/pgkeep", None, &[])
                .unwrap()
                .starts_with(r"exec '/opt/a b'\''s 100%%/pgkeep' --config")
        );
        assert!(command("/opt/a\nb", None, &[]).is_err());
    }

    proptest! {
        #[test]
        fn sh_gives_back_the_word(word in "[^\\x00\\n\\r]{0,30}") {
            let output = std::process::Command::new("sh").args(["-c", &format!("printf %s {}", shell_word(&word))]).output();
            prop_assert_eq!(String::from_utf8(output.unwrap().stdout).unwrap(), word);
        }
    }

    #[test]
    fn a_configuration_that_leads_elsewhere_is_told() {
        let conf = "data_directory = '/var/lib/postgresql/15/main'  # x\n#hba_file = 'x'\nport = 5433\n";
        let told = leads_elsewhere(conf);
        assert!(matches!(told.as_slice(), [one] if one.contains("'/var/lib/postgresql/15/main'")), "{told:?}");
    }
}
