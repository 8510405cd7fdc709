//! What can be typed: the options every command has, and the values several commands read.

use std::path::PathBuf;

use clap::{ArgAction, Parser, Subcommand};

use super::{
    backup, check, copy, demo, drill, events, expire, hold, index, init, key, list, log, plan, restore, run, verify,
    wal,
};
use crate::plan::TimelineChoice;
use crate::types::BackupLabel;

/// Keeps every committed PostgreSQL transaction, and gives it back as of any instant.
#[derive(Debug, Parser)]
#[command(
    name = "pgkeep",
    version,
    propagate_version = false,
    max_term_width = 110,
    after_help = "\
Exit codes: 0 yes or done; 1 the answer is no; 2 bad usage or configuration; 3 could not, another try may help; \
4 refused to protect data. The hooks (wal push, wal fetch) keep PostgreSQL's rules instead.

Example, from nothing to a protected cluster:
  pgkeep init --pg 'host=/run/postgresql user=postgres' --repo /srv/pgkeep
  pgkeep check && pgkeep run"
)]
pub struct Cli {
    /// Options that stand before or after any command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options that stand before or after any command.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Everywhere")]
pub struct Global {
    /// Configuration file [sought otherwise: $PGKEEP_CONFIG, ./pgkeep.toml, /etc/pgkeep/pgkeep.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Which cluster; needed only where there are several
    #[arg(long, global = true, value_name = "NAME")]
    pub cluster: Option<String>,
    /// Which repository; needed only where there are several
    #[arg(long, global = true, value_name = "NAME")]
    pub repository: Option<String>,
    /// One JSON document on stdout, or one object per line for streams
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress, only errors in the log
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// More in the log; twice for everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

/// Every command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write the configuration and the key; create the repository and the slot
    Init(init::Args),
    /// Look at everything that must be right, one line each
    Check(check::Args),
    /// Archive the WAL of all clusters until stopped
    Run(run::Args),
    /// Take a base backup now
    Backup(backup::Args),
    /// Show clusters, backups, WAL and what can be restored
    List(list::Args),
    /// Show transactions: when, what, and how to stop just before
    Log(log::Args),
    /// Say whether and how a target can be reached; changes nothing
    Plan(plan::Args),
    /// Restore a cluster as of a target into a directory
    Restore(restore::Args),
    /// The hooks: archive_command and restore_command
    Wal(wal::Wal),
    /// Copy from one repository into another: all, one base backup, or a window
    Copy(copy::Args),
    /// See whether all that is kept is there and whole
    Verify(verify::Args),
    /// Restore into scratch space, start a server, look at it, remove it
    Drill(drill::Args),
    /// Remove what no policy asks for, and say why the rest stays
    Expire(expire::Args),
    /// Keep something whatever the policy says
    Hold(hold::Hold),
    /// Keys over time: who can read, recovery sheets
    Key(key::Key),
    /// Show what was done and decided, and whether all of it is still there
    Events(events::Args),
    /// Care for the index that `log` searches
    Index(index::Index),
    /// Show the whole story on a throwaway cluster, in a minute
    Demo(demo::Args),
}

/// Where recovery shall stop: what `plan` and `restore` share.
#[derive(Debug, Clone, clap::Args)]
pub struct TargetArgs {
    /// The target: a time (`2026-11-20 14:03:00+01:00`, `10 minutes ago`), an LSN (`16/B374D848`), a transaction id
    /// (`4711`), a restore point (`name:before-upgrade`), `immediate` or `latest`
    #[arg(long = "to", value_name = "TARGET", allow_hyphen_values = true)]
    pub target: String,
    /// The time zone of a time that is written without one, such as `Europe/Berlin` or `+01:00`
    #[arg(long, value_name = "ZONE", allow_hyphen_values = true)]
    pub tz: Option<String>,
    /// Stop just before the target instead of just after it
    #[arg(long)]
    pub exclusive: bool,
    /// Follow this timeline: its number (`2`), exactly this branch (`00000002`, `00000002.1`), `latest`, or `current`, the one
    /// that the base backup was taken on
    #[arg(long, value_name = "TIMELINE", default_value = "latest")]
    pub timeline: TimelineChoice,
    /// Use this base backup and no other, also one that is flagged [default: the newest that leads to the target]
    #[arg(long, value_name = "LABEL")]
    pub backup: Option<BackupLabel>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }
}
