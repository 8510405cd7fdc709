//! `pgkeep wal`: the hooks that PostgreSQL runs. Their exit codes are [`Hook`](super::Hook)'s.

pub mod ahead;
pub mod fetch;
pub mod push;
mod push_helper;
pub(super) mod quick;

pub use quick::Role;

/// The hooks: archive_command and restore_command.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example, in postgresql.conf:
  archive_command = 'exec pgkeep --config /etc/pgkeep/pgkeep.toml wal push %p'
  restore_command = 'exec pgkeep --config /etc/pgkeep/pgkeep.toml wal fetch %f %p'")]
pub struct Wal {
    /// Which one.
    #[command(subcommand)]
    pub hook: Command,
}

/// The two hooks.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Put a WAL file into the repository (archive_command)
    Push(push::Args),
    /// Get a WAL file out of the repository (restore_command)
    Fetch(fetch::Args),
}

impl Command {
    /// Is this process one that outlives a call, and not the call itself?
    pub(super) fn is_helper(&self) -> bool {
        match self {
            Self::Push(args) => args.helper.is_some(),
            Self::Fetch(_) => false,
        }
    }
}
