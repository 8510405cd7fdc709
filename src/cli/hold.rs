//! `pgkeep hold`: what is not to be expired, whatever the policy says.

use anyhow::anyhow;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;

use super::output::{Align, Table, time};
use super::several::{Away, open_all};
use super::{CliError, Context, Exit, open};
use crate::catalog::Repository;
use crate::catalog::events::Happened;
use crate::catalog::retention::{Held, Hold as Recorded, HoldRecord};
use crate::plan::{Point, Target, TargetReading};
use crate::restore::{RestoreError, find_cluster};
use crate::types::{BackupLabel, ClusterId};

/// `pgkeep hold`: what is not to be expired, whatever the policy says.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example:
  pgkeep hold add 20261120T031500Z --reason 'audit 2026'")]
pub struct Hold {
    /// What to do.
    #[command(subcommand)]
    pub what: Command,
}

/// What can be done with holds.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Keep a base backup, or an instant restorable
    Add(AddArgs),
    /// Show all holds, released ones too
    List(ListArgs),
    /// End a hold
    Release(ReleaseArgs),
}

/// `pgkeep hold add`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
A base backup is kept with the WAL that makes it consistent; an instant with the newest base backup before it and the WAL up to \
it. The hold is put into every repository of the cluster that answers and holds it.

Example:
  pgkeep hold add 20261120T031500Z --reason 'audit 2026' --until 2027-12-31
  pgkeep hold add '2026-11-20 14:03:00+01:00' --reason 'before the migration'")]
pub struct AddArgs {
    /// A base backup's label, or a time
    #[arg(value_name = "LABEL-or-TIME", allow_hyphen_values = true)]
    pub what: String,
    /// Why, for whoever reads it later
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
    /// Until when [default: until it is released]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub until: Option<String>,
    /// The time zone of times that are written without one, such as `Europe/Berlin` or `+01:00`
    #[arg(long, value_name = "ZONE", allow_hyphen_values = true)]
    pub tz: Option<String>,
}

/// `pgkeep hold list`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example:
  pgkeep hold list --json | jq '.holds[] | select(.in_force)'")]
pub struct ListArgs {}

/// `pgkeep hold release`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
In every repository that answers and has it. Exit code 1: none has it.

Example:
  pgkeep hold release 20261121T093000Z")]
pub struct ReleaseArgs {
    /// The hold's name, as `hold list` shows it
    #[arg(value_name = "HOLD")]
    pub hold: BackupLabel,
}

#[derive(Debug, Serialize)]
struct Document {
    holds: Vec<Line>,
    /// Repositories that do not answer.
    away: Vec<Away>,
}

#[derive(Debug, Serialize)]
struct Line {
    repository: String,
    cluster: String,
    hold: BackupLabel,
    in_force: bool,
    /// What is held: `null` if the record does not open.
    held: Option<Held>,
    reason: Option<String>,
    until: Option<Timestamp>,
    made_at: Option<Timestamp>,
    released_at: Option<Timestamp>,
}

/// The holds of one repository, for `list`.
pub(super) fn in_force(holds: &[Recorded], now: Timestamp) -> Vec<(BackupLabel, Held, String)> {
    let in_force = holds.iter().filter(|hold| hold.is_in_force(now));
    in_force.filter_map(|hold| hold.record.as_ref().map(|r| (hold.name, r.held, r.reason.clone()))).collect()
}

/// Runs the command.
pub async fn run(context: &Context, command: Command) -> Result<Exit, CliError> {
    let config = context.config()?;
    let from = config.read_from_any(context.cluster_name(), context.repository_name())?;
    // Said before anything is opened.
    let added = match &command {
        Command::Add(args) => Some(record(args)?),
        Command::List(_) | Command::Release(_) => None,
    };
    let several = open_all(&from.repositories).await?;
    let mut document = Document { holds: Vec::new(), away: several.away };
    let alone = from.repositories.len() == 1;
    let mut done = 0;
    for (repository, _) in several.open {
        let id = match find_cluster(&repository, from.cluster.as_ref()).await {
            Err(RestoreError::NoCluster { .. }) if !alone => continue,
            found => found.map_err(super::plan::restore_error)?,
        };
        let work = Work { context, repository: &repository, id: &id };
        done += u64::from(match &command {
            Command::Add(_) => work.add(added.as_ref()).await?,
            Command::List(_) => true,
            Command::Release(args) => work.release(args.hold).await?,
        });
        let holds = repository.holds(&id).await.map_err(open::repository_error)?;
        let now = repository.now();
        document.holds.extend(holds.into_iter().map(|hold| Line {
            repository: repository.name().to_owned(),
            cluster: id.to_string(),
            hold: hold.name,
            in_force: hold.is_in_force(now),
            held: hold.record.as_ref().map(|record| record.held),
            until: hold.record.as_ref().and_then(|record| record.until),
            made_at: hold.record.as_ref().map(|record| record.made_at),
            reason: hold.record.map(|record| record.reason),
            released_at: hold.released,
        }));
    }
    context.output.document(&document);
    if matches!(command, Command::List(_)) {
        show(context, &document);
    }
    for away in &document.away {
        context.output.line(format!("Repository {} is left out: {}", away.repository, away.why));
    }
    match command {
        Command::List(_) => Ok(Exit::Done),
        // A hold that is not everywhere is less than was asked for.
        _ if !document.away.is_empty() => Ok(Exit::Failed),
        _ => Ok(if done > 0 { Exit::Done } else { Exit::No }),
    }
}

/// What was asked for; when it was made is filled in later.
fn record(args: &AddArgs) -> Result<(Held, String, Option<Timestamp>), CliError> {
    let tz = args.tz.as_deref().map(crate::plan::target::parse_zone).transpose().map_err(CliError::usage)?;
    let reading = TargetReading { now: Timestamp::now(), local: TimeZone::system(), tz };
    let instant = |text: &str| match Target::parse(text, false, &reading).map_err(CliError::usage)?.point {
        Point::Time(instant) => Ok(instant),
        _ => Err(CliError::usage(anyhow!("{text:?} is neither a base backup's label nor a time"))),
    };
    let held = match args.what.parse() {
        Ok(label) => Held::Backup(label),
        Err(_) => Held::Time(instant(&args.what)?),
    };
    if args.reason.trim().is_empty() {
        return Err(CliError::usage(anyhow!("--reason is empty: whoever finds the hold has to know why it is there")));
    }
    let until = args.until.as_deref().map(instant).transpose()?;
    if until.is_some_and(|until| until <= Timestamp::now()) {
        return Err(CliError::usage(anyhow!("--until lies in the past: nothing would be held")));
    }
    Ok((held, args.reason.trim().to_owned(), until))
}

struct Work<'a> {
    context: &'a Context,
    repository: &'a Repository,
    id: &'a ClusterId,
}

impl Work<'_> {
    /// `false`: it is not there.
    async fn add(&self, added: Option<&(Held, String, Option<Timestamp>)>) -> Result<bool, CliError> {
        let Some((held, reason, until)) = added else { return Ok(false) };
        let (output, name) = (&self.context.output, self.repository.name());
        if let Held::Backup(label) = held {
            match self.repository.get_manifest(self.id, *label).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => {
                    output
                        .line(format!("Repository {name} has no complete base backup {label}: nothing is held there"));
                    return Ok(false);
                }
                Err(error) => return Err(open::repository_error(error)),
            }
        }
        let (made_at, writer) = (self.repository.now(), self.repository.writer());
        let record = HoldRecord { held: *held, reason: reason.clone(), until: *until, made_at, writer };
        let hold = self.repository.put_hold(self.id, &record).await.map_err(open::repository_error)?;
        let event = Happened::HoldAdded { hold, held: *held, reason: reason.clone(), until: *until };
        self.repository.note_event(self.id, event).await;
        let until = until.map(|until| format!(" until {}", time(until))).unwrap_or_default();
        output.line(format!("Hold {hold} in repository {name}: {}{until}", what(held)));
        Ok(true)
    }

    async fn release(&self, hold: BackupLabel) -> Result<bool, CliError> {
        let (output, name) = (&self.context.output, self.repository.name());
        let holds = self.repository.holds(self.id).await.map_err(open::repository_error)?;
        if !holds.iter().any(|known| known.name == hold) {
            output.line(format!("Repository {name} has no hold {hold}"));
            return Ok(false);
        }
        self.repository.release_hold(self.id, hold).await.map_err(open::repository_error)?;
        self.repository.note_event(self.id, Happened::HoldReleased { hold }).await;
        output.line(format!("Hold {hold} in repository {name} is released"));
        Ok(true)
    }
}

fn what(held: &Held) -> String {
    match held {
        Held::Backup(label) => format!("base backup {label}"),
        Held::Time(instant) => format!("the instant {}", time(*instant)),
    }
}

fn show(context: &Context, document: &Document) {
    if document.holds.is_empty() {
        context.output.line("There are no holds.");
        return;
    }
    let mut table = Table::new([
        ("Hold", Align::Left),
        ("Repository", Align::Left),
        ("Holds", Align::Left),
        ("Until", Align::Left),
        ("Reason", Align::Left),
    ]);
    for line in &document.holds {
        let until = match (line.released_at, line.until) {
            (Some(at), _) => format!("released {}", time(at)),
            (None, Some(until)) if !line.in_force => format!("over since {}", time(until)),
            (None, Some(until)) => time(until),
            (None, None) => "it is released".to_owned(),
        };
        table.row([
            line.hold.to_string(),
            line.repository.clone(),
            line.held.as_ref().map_or_else(|| "DOES NOT OPEN, so nothing is expired".to_owned(), what),
            until,
            line.reason.clone().unwrap_or_default(),
        ]);
    }
    context.output.line(table);
}
