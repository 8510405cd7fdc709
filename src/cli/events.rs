//! `pgkeep events`: what was done and decided, and whether all of it is still there.

use std::collections::BTreeSet;

use anyhow::anyhow;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;

use super::output::{count, time};
use super::several::{Away, open_all};
use super::{CliError, Context, Exit, open};
use crate::catalog::Repository;
use crate::catalog::events::verify::{Finding, unnamed_heads, verify};
use crate::catalog::events::{Content, EventHead, Happened, Listed};
use crate::plan::{Point, Target, TargetReading};
use crate::types::{ClusterId, Id128};

/// `pgkeep events`: what was done and decided, and whether all of it is still there.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Every run of pgkeep numbers what it does and chains it by digest; each event also names the newest ones of other runs. With \
--verify the chains are compared: what was removed, changed, exchanged or doubled is named. The newest events of all are named by no \
other one: only their heads, kept outside of the repository (`pgkeep run` logs them; --verify shows them), prove later that \
nothing was cut off at the end.

Exit code 1: with --verify or --head, something does not fit. 3: a repository could not be asked.

Example:
  pgkeep events --since '2026-11-20 00:00Z'
  pgkeep events --verify
  pgkeep events --verify --head 0123456789abcdef0123456789abcdef:12:<64 hex digits>")]
pub struct Args {
    /// Compare the chains, and show the heads that are to be kept outside
    #[arg(long)]
    pub verify: bool,
    /// A head that was kept outside, as the log shows it: the event must still be there; may be said several times
    #[arg(long, value_name = "WRITER:NUMBER:DIGEST")]
    pub head: Vec<EventHead>,
    /// Show only what happened from this time on; all is compared
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub since: Option<String>,
    /// The time zone of a time that is written without one, such as `Europe/Berlin` or `+01:00`
    #[arg(long, value_name = "ZONE", allow_hyphen_values = true)]
    pub tz: Option<String>,
}

#[derive(Debug, Serialize)]
struct Document {
    repositories: Vec<Chronicle>,
    /// Repositories that do not answer.
    away: Vec<Away>,
}

#[derive(Debug, Serialize)]
struct Chronicle {
    repository: String,
    cluster: String,
    events: Vec<Line>,
    /// Only with --verify or --head.
    #[serde(skip_serializing_if = "Option::is_none")]
    verified: Option<Verified>,
}

#[derive(Debug, Serialize)]
struct Verified {
    /// How many events were compared.
    compared: u64,
    findings: Vec<Finding>,
    /// Names in the events' folder that are none of ours.
    unknown: Vec<String>,
    /// What nobody names: to be kept outside. As text.
    heads: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Line {
    writer: Id128,
    number: u32,
    /// Absent of one that does not open.
    at: Option<Timestamp>,
    digest: Option<String>,
    event: Option<Happened>,
    /// What it says, for a person.
    text: String,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let since = since(&args)?;
    let config = context.config()?;
    let from = config.read_from_any(context.cluster_name(), context.repository_name())?;
    let several = open_all(&from.repositories).await?;
    let mut document = Document { repositories: Vec::new(), away: several.away };
    // A head is of one repository: it has to be found in one of those that answer.
    let mut outside: BTreeSet<String> = args.head.iter().map(ToString::to_string).collect();
    let mut fits = true;
    for (repository, _) in &several.open {
        let ids = match &from.cluster {
            Some(name) => repository.clusters_named(name).await,
            None => repository.clusters().await,
        };
        for id in ids.map_err(open::repository_error)? {
            let (events, unknown) = repository.events(&id).await.map_err(open::repository_error)?;
            let writers: BTreeSet<Id128> = events.iter().map(|event| event.writer).collect();
            let ours: Vec<EventHead> =
                args.head.iter().filter(|head| writers.contains(&head.writer)).copied().collect();
            outside.retain(|head| ours.iter().all(|found| found.to_string() != *head));
            let verified = (args.verify || !args.head.is_empty()).then(|| Verified {
                compared: events.len() as u64,
                findings: verify(&events, &ours),
                unknown,
                heads: unnamed_heads(&events).iter().map(ToString::to_string).collect(),
            });
            fits &= verified.as_ref().is_none_or(|verified| verified.findings.is_empty());
            let chronicle = chronicle(repository, &id, events, since, verified);
            show(context, &chronicle);
            document.repositories.push(chronicle);
        }
    }
    context.output.document(&document);
    if document.repositories.is_empty() {
        context.output.line("There are no events: no cluster is archived here.");
    }
    for away in &document.away {
        context.output.line(format!("Repository {} is left out: {}", away.repository, away.why));
    }
    // None of its writer's events is anywhere: all of them are gone, or in a repository that is away.
    for head in &outside {
        context.output.line(format!("ROLLED BACK: no event of the writer of {head} is in any of these repositories"));
    }
    Ok(match (fits && outside.is_empty(), document.away.is_empty()) {
        (false, _) => Exit::No,
        (true, false) => Exit::Failed,
        (true, true) => Exit::Done,
    })
}

fn since(args: &Args) -> Result<Option<Timestamp>, CliError> {
    let Some(text) = &args.since else { return Ok(None) };
    let tz = args.tz.as_deref().map(crate::plan::target::parse_zone).transpose().map_err(CliError::usage)?;
    let reading = TargetReading { now: Timestamp::now(), local: TimeZone::system(), tz };
    match Target::parse(text, false, &reading).map_err(CliError::usage)?.point {
        Point::Time(instant) => Ok(Some(instant)),
        _ => Err(CliError::usage(anyhow!("--since {text:?} is no time"))),
    }
}

/// All writers' events joined by time; those that do not open first, because nobody knows when they were.
fn chronicle(
    repository: &Repository,
    id: &ClusterId,
    events: Vec<Listed>,
    since: Option<Timestamp>,
    verified: Option<Verified>,
) -> Chronicle {
    let line = |Listed { writer, number, content }: Listed| match content {
        Content::Opened { digest, record } => Line {
            writer,
            number,
            at: Some(record.at),
            digest: Some(digest.to_string()),
            text: record.event.to_string(),
            event: Some(record.event),
        },
        Content::OfAnotherName => bare(writer, number, "ANOTHER OBJECT stands under this name".to_owned()),
        Content::TwoContents => bare(writer, number, "TWO CONTENTS under this name".to_owned()),
        Content::Unreadable(why) => bare(writer, number, format!("DOES NOT OPEN: {why}")),
    };
    let mut lines: Vec<Line> = events.into_iter().map(line).collect();
    lines.retain(|line| line.at.zip(since).is_none_or(|(at, since)| at >= since));
    lines.sort_by_key(|line| (line.at, line.writer, line.number));
    Chronicle { repository: repository.name().to_owned(), cluster: id.to_string(), events: lines, verified }
}

fn bare(writer: Id128, number: u32, text: String) -> Line {
    Line { writer, number, at: None, digest: None, event: None, text }
}

fn show(context: &Context, chronicle: &Chronicle) {
    let output = &context.output;
    output.line(format!("Cluster {} in repository {}", chronicle.cluster, chronicle.repository));
    for line in &chronicle.events {
        let at = line.at.map_or_else(|| "at no time that is known".to_owned(), time);
        // Enough of the writer to tell one from another.
        let writer: String = line.writer.to_string().chars().take(8).collect();
        output.line(format!("  {at}  {writer} {}: {}", line.number, line.text));
    }
    let Some(verified) = &chronicle.verified else { return };
    for finding in &verified.findings {
        output.line(format!("  {finding}"));
    }
    for name in &verified.unknown {
        output.line(format!("  note: {name} is not understood and was not compared"));
    }
    let compared = count(verified.compared, "event");
    match verified.findings.len() as u64 {
        0 => output.line(format!("  {compared} compared: nothing is missing, nothing was changed")),
        findings => output.line(format!(
            "  {compared} compared: {} NOT FIT",
            match findings {
                1 => "1 DOES".to_owned(),
                some => format!("{some} DO"),
            }
        )),
    }
    output.line("  Keep outside of the repository, for a later --head:");
    verified.heads.iter().for_each(|head| output.line(format!("    {head}")));
}
