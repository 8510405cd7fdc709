//! `pgkeep wal`: the hooks that PostgreSQL runs. Their exit codes are [`Hook`](super::Hook)'s.

pub mod fetch;
pub mod push;

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
