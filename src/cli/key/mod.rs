//! `pgkeep key`: keys over time. Who can read, what is sealed with what, and the key on paper.
//!
//! The meta key is not exchanged: every object of the realm is bound to it. What can be done about it is said by `rotate`.

mod list;
mod recipients;
mod sheet;

use std::path::PathBuf;

use super::several::{Several, open_all};
use super::{CliError, Context, Exit, open};
use crate::catalog::Repository;
use crate::catalog::events::Happened;
use crate::config::{Config, KeyOrigin, KeySource, RepositoryConfig};
use crate::seal::{KeyFile, Recipient};

pub(super) use list::age;

/// `pgkeep key`: keys over time.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example:
  pgkeep key list
  pgkeep key export --output recovery-sheet.txt")]
pub struct Key {
    /// What to do.
    #[command(subcommand)]
    pub what: Command,
}

/// What can be done with keys.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Show keys, their age, and for whom they are wrapped
    List(ListArgs),
    /// Make a further key file that opens everything
    Add(AddArgs),
    /// Use new content keys from now on
    Rotate(RotateArgs),
    /// Let the holder of another age identity read: what is there, and what comes
    AddRecipient(AddRecipientArgs),
    /// Stop sealing for a recipient
    RemoveRecipient(RemoveRecipientArgs),
    /// Print a recovery sheet: the key in a form that can be typed in again
    Export(ExportArgs),
    /// Make a key file from a recovery sheet
    Import(ImportArgs),
}

/// `pgkeep key list`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Which of the envelopes that were made with a content key somebody can open is only known to his identity: of other \
recipients the list says since when they are wrapped for, and how many envelopes were made for them afterwards. With --open \
every content key is tried with this key file.

Example:
  pgkeep key list
  pgkeep key list --open --json")]
pub struct ListArgs {
    /// Fetch every content key and try to open it with this key file
    #[arg(long)]
    pub open: bool,
}

/// `pgkeep key add`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Writes a key file with an identity of its own and the same meta key, and makes it a recipient: it opens what is there and what \
comes. The one that is used now goes on to work until it is removed (`remove-recipient`). With --passphrase-file the new \
file is sealed under that passphrase; set passphrase_file beside key_file to use it. Again is safe: a file that is there is \
made a recipient, if it belongs to the same realm.

Example:
  pgkeep key add --key-file /media/safe/second.key --name 'safe in the office'
  pgkeep key add --key-file next.key --passphrase-file /root/passphrase")]
pub struct AddArgs {
    /// Where the new key file goes
    #[arg(long, value_name = "FILE")]
    pub key_file: PathBuf,
    /// What a person calls it, for `key list`
    #[arg(long, value_name = "TEXT")]
    pub name: Option<String>,
    /// A file with the passphrase under which the new key file is sealed (mode 0600)
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
}

/// `pgkeep key rotate`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Content keys, which seal WAL and base backups, are new for each run of pgkeep and each day by themselves. This exchanges those of \
today: who begins to write takes a new one at once, a run that is under way within ten minutes. What is there stays sealed \
as it is.

The meta key is not exchanged: the names and places of all objects are bound to it. Where it was lost to somebody, make a new \
repository with a new key (`pgkeep init` with another --key-file), bring everything there with `pgkeep copy --all`, which \
seals it anew, and remove the old one. An identity is exchanged with `key add` and `key remove-recipient`.

Example:
  pgkeep key rotate")]
pub struct RotateArgs {}

/// `pgkeep key add-recipient`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
RECIPIENT is the public half of an age identity (X25519), as age-keygen prints it. Content keys are wrapped for it from now \
on, and envelopes for those that are there are added; for that this key file has to open them. Again makes what is missing. To \
read, its holder needs the meta key besides: put the AGE-SECRET-KEY-1… line into a copy of a key file of this realm, a \
write-only one will do.

Exit code 1: some keys could not be opened, so that they stay closed to it.

Example:
  pgkeep key add-recipient age1… --name 'recovery, in the safe'")]
pub struct AddRecipientArgs {
    /// Who: `age1…`
    #[arg(value_name = "RECIPIENT")]
    pub recipient: Recipient,
    /// What a person calls it, for `key list`
    #[arg(long, value_name = "TEXT")]
    pub name: Option<String>,
}

/// `pgkeep key remove-recipient`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
What is sealed from now on is not sealed for RECIPIENT any more: who begins to write takes a new content key at once, a run \
that is under way within ten minutes. What cannot be undone: everything sealed before stays open to whoever has that identity \
and the objects; and who has a key file keeps the meta key, which opens names, sizes, file lists and records, and lets him write. \
To end that, too, see `pgkeep key rotate --help`. The recipient of the key file in use is not removed: use another one first.

Exit code 1: it is no recipient.

Example:
  pgkeep key remove-recipient age1…")]
pub struct RemoveRecipientArgs {
    /// Who: `age1…`, as `key list` shows it
    #[arg(value_name = "RECIPIENT")]
    pub recipient: Recipient,
}

/// `pgkeep key export`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The sheet holds the secret: who has it and the repository reads everything. Print it, put it where fire, thieves and mistakes \
do not take it together with the database host or the repository, and remove the file. Each line has check digits of its own, \
so that a typo is found where it is. A key that only writes is not exported: it restores nothing.

Example:
  pgkeep key export | lp
  pgkeep key export --output sheet.txt")]
pub struct ExportArgs {
    /// Write it into this file (mode 0600) instead of to stdout
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `pgkeep key import`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The lines of the sheet that begin with I and M, in any order; whatever else stands there is passed over. Needs no configuration. A \
file that is there is never replaced.

Example:
  pgkeep key import sheet.txt --key-file /etc/pgkeep/main.key
  pgkeep key import - --key-file main.key")]
pub struct ImportArgs {
    /// What was typed; `-` for stdin
    #[arg(value_name = "SHEET")]
    pub sheet: PathBuf,
    /// Where the key file goes
    #[arg(long, value_name = "FILE")]
    pub key_file: PathBuf,
}

/// Runs the command.
pub async fn run(context: &Context, command: Command) -> Result<Exit, CliError> {
    match command {
        Command::List(args) => list::run(context, args).await,
        Command::Add(args) => recipients::add(context, args).await,
        Command::Rotate(RotateArgs {}) => recipients::rotate(context).await,
        Command::AddRecipient(args) => recipients::add_recipient(context, args).await,
        Command::RemoveRecipient(args) => recipients::remove_recipient(context, args).await,
        Command::Export(args) => sheet::export(context, args).await,
        Command::Import(args) => sheet::import(context, args),
    }
}

/// The repositories that are meant: `--repository`, else all of the file.
fn wanted<'a>(context: &Context, config: &'a Config) -> Result<Vec<&'a RepositoryConfig>, CliError> {
    match context.repository_name() {
        Some(name) => Ok(vec![config.repository(Some(name))?]),
        None => Ok(config.repositories.iter().collect()),
    }
}

async fn opened(context: &Context) -> Result<Several, CliError> {
    let config = context.config()?;
    open_all(&wanted(context, &config)?).await
}

/// The key of the repositories that are meant, which have to share one.
async fn the_key(context: &Context) -> Result<KeyFile, CliError> {
    let config = context.config()?;
    let mut found: Option<KeyFile> = None;
    for place in wanted(context, &config)? {
        let key = open::key(&place.key, &place.name).await?;
        match &found {
            Some(other) if other.meta_key().id() != key.meta_key().id() => {
                let error = anyhow::anyhow!("the repositories of {} have different keys", config.file.display());
                return Err(CliError::usage(error).hint("say which one is meant with --repository"));
            }
            // One that can read says more than one that cannot.
            Some(other) if other.can_read() || !key.can_read() => {}
            _ => found = Some(key),
        }
    }
    found.ok_or_else(|| CliError::usage(anyhow::anyhow!("{} has no repository", config.file.display())))
}

/// Reads a key file that is no setting of the configuration.
async fn key_at(path: &std::path::Path, passphrase_file: Option<PathBuf>) -> Result<KeyFile, CliError> {
    let source = KeySource { origin: KeyOrigin::File(path.to_owned()), passphrase_file };
    open::key(&source, &path.display().to_string()).await
}

/// A change of keys is an event of every cluster in the repository.
async fn note(repository: &Repository, event: Happened) {
    match repository.clusters().await {
        Ok(clusters) => {
            for cluster in clusters {
                repository.note_event(&cluster, event.clone()).await;
            }
        }
        Err(error) => tracing::warn!(repository = repository.name(), %error, "not noted among the events: {event}"),
    }
}
