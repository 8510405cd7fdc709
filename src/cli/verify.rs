//! `pgkeep verify`: whether all that is kept is there and whole, and what it costs where it is not.

use std::num::NonZeroU64;

use anyhow::anyhow;
use serde::Serialize;

use super::output::{bytes, count, time};
use super::several::{Away, open_all};
use super::{CliError, Context, Exit, open, stop_on_signal};
use crate::catalog::Repository;
use crate::catalog::events::Happened;
use crate::catalog::verification::{Fault, Finding, Lost};
use crate::types::{ClusterId, SegmentSize};
use crate::verify::{Manner, NoTurn, Options, Report, Wanted, repair, verify};

/// Objects that are read at the same time; each has at most 64 MiB.
const AT_ONCE: usize = 4;

/// `pgkeep verify`: whether all that is kept is there and whole.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Without --objects names, lengths and records are compared: every piece of WAL, history file, manifest, and what manifests name. \
With it objects are opened, those first that nobody has read yet, then those that were read longest ago. What was found is \
remembered in the repository, and `pgkeep list` shows it; `pgkeep run` does the same in the background.

Exit code 0: all of it is whole. 1: something is damaged or missing; it is named, with the instants that it costs and where \
else it is. 3: a repository could not be asked, or the reading was cut off.

Example:
  pgkeep verify
  pgkeep verify --objects --rate 50MB --budget 200GB
  pgkeep verify --objects --repair")]
pub struct Args {
    /// Open objects, too, and not only list them
    #[arg(long)]
    pub objects: bool,
    /// Read at most so many bytes a second: 50MB
    #[arg(long, value_name = "BYTES", value_parser = size, requires = "objects")]
    pub rate: Option<NonZeroU64>,
    /// Read at most so many bytes in all: 200GB
    #[arg(long, value_name = "BYTES", value_parser = size, requires = "objects")]
    pub budget: Option<NonZeroU64>,
    /// Bring back what is damaged or missing from another repository of the cluster; nothing is replaced
    #[arg(long)]
    pub repair: bool,
}

/// A number of bytes: `200GB`, `50MB/s`, `1000000`.
fn size(text: &str) -> Result<NonZeroU64, String> {
    let text = text.strip_suffix("/s").unwrap_or(text);
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim_start() {
        "" => Some(1),
        "kB" => Some(1000),
        "MB" => Some(1_000_000),
        "GB" => Some(1_000_000_000),
        "TB" => Some(1_000_000_000_000),
        _ => None,
    };
    let bytes = unit.and_then(|unit: u64| number.parse::<u64>().ok()?.checked_mul(unit)).and_then(NonZeroU64::new);
    bytes.ok_or_else(|| "write a number of bytes, such as 50MB or 200GB".to_owned())
}

#[derive(Debug, Serialize)]
struct Document {
    repositories: Vec<Line>,
    /// Repositories that do not answer.
    away: Vec<Away>,
}

#[derive(Debug, Serialize)]
struct Line {
    repository: String,
    cluster: String,
    #[serde(flatten)]
    report: Report,
    /// For each finding, the repositories that list the same object.
    elsewhere: Vec<Vec<String>>,
    /// What could not be brought back, and why.
    not_repaired: Vec<String>,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.config()?;
    let from = config.read_from_any(context.cluster_name(), context.repository_name())?;
    // The others may have what is missing here.
    let all = config.read_from_any(context.cluster_name(), None).map(|all| all.repositories);
    let several = open_all(&all.unwrap_or_else(|_| from.repositories.clone())).await?;
    let meant = |name: &str| from.repositories.iter().any(|place| place.name == name);
    let mut document = Document { repositories: Vec::new(), away: several.away };
    let (stop, mut worst) = (stop_on_signal()?, None);
    let repositories: Vec<Repository> = several.open.into_iter().map(|(repository, _)| repository).collect();
    for repository in repositories.iter().filter(|repository| meant(repository.name())) {
        if args.objects && !repository.can_read() {
            let error =
                anyhow!("the key of repository {} can only write, so it cannot open objects", repository.name());
            return Err(CliError::usage(error).hint("verify without --objects here, and with it where the identity is"));
        }
        let ids = match &from.cluster {
            Some(name) => repository.clusters_named(name).await,
            None => repository.clusters().await,
        };
        for id in ids.map_err(open::repository_error)? {
            match one(context, repository, &repositories, &id, &args, &stop).await {
                Ok(line) => document.repositories.push(line),
                Err(error) => {
                    let error = error.context(format!("verify repository {}", repository.name()));
                    context.output.note(format!("error: {error}"));
                    worst = Some(error);
                }
            }
        }
    }
    document.away.retain(|away| meant(&away.repository));
    context.output.document(&document);
    document.away.iter().for_each(|away| {
        context.output.line(format!("Repository {} is left out: {}", away.repository, away.why));
    });
    if document.repositories.is_empty() && document.away.is_empty() && worst.is_none() {
        context.output.line("Nothing is archived yet: `pgkeep run` archives, `pgkeep backup` takes a base backup.");
    }
    let is_damaged = |line: &Line| !line.report.findings.is_empty();
    let is_cut_off = |line: &Line| line.report.unfinished.is_some();
    match worst {
        _ if document.repositories.iter().any(is_damaged) => Ok(Exit::No),
        Some(error) => Err(error),
        None if !document.away.is_empty() || document.repositories.iter().any(is_cut_off) => Ok(Exit::Failed),
        None => Ok(Exit::Done),
    }
}

async fn one(
    context: &Context,
    repository: &Repository,
    all: &[Repository],
    id: &ClusterId,
    args: &Args,
    stop: &tokio_util::sync::CancellationToken,
) -> Result<Line, CliError> {
    let wanted = Wanted { within: None, budget: args.budget.map(NonZeroU64::get) };
    let options = Options { objects: args.objects.then_some(wanted) };
    let progress = context.output.progress(&format!("verifying {}", repository.name()), None);
    let add = |done: u64| progress.add(done);
    let manner = Manner { at_once: AT_ONCE, rate: args.rate, turn: &NoTurn, progress: &add };
    let verified = verify(repository, id, options, manner, stop).await;
    progress.finish();
    let (survey, mut report) = verified.map_err(open::repository_error)?;
    let size = survey.inventory.segment_size;
    let others: Vec<&Repository> = all.iter().filter(|other| other.name() != repository.name()).collect();
    let (mut elsewhere, mut not_repaired, mut left) = (Vec::new(), Vec::new(), Vec::new());
    for finding in std::mem::take(&mut report.findings) {
        let found = listed_in(&others, id, &finding, size).await;
        if args.repair && !stop.is_cancelled() {
            match bring_back(repository, &found, id, &finding, size).await {
                Ok(done) => {
                    let (object, from) = (done.object.clone(), done.from.clone());
                    repository.note_event(id, Happened::Repaired { object, from }).await;
                    report.repaired.push(done);
                    continue;
                }
                Err(why) => not_repaired.push(format!("{}: {why}", finding.object)),
            }
        }
        elsewhere.push(found.into_iter().map(|other| other.name().to_owned()).collect());
        left.push(finding);
    }
    report.findings = left;
    if let Err(error) = crate::verify::forget(repository, id, &report.repaired).await {
        report.remarks.push(format!("that it was repaired is not remembered: {error}"));
    }
    let (repository, cluster) = (repository.name().to_owned(), id.to_string());
    let line = Line { repository, cluster, report, elsewhere, not_repaired };
    show(context, &line, args.objects);
    Ok(line)
}

/// Which of these list what was found to be damaged or missing.
async fn listed_in<'a>(
    others: &[&'a Repository],
    id: &ClusterId,
    finding: &Finding,
    size: Option<SegmentSize>,
) -> Vec<&'a Repository> {
    let mut found = Vec::new();
    for other in others {
        match repair::is_in(other, id, finding, size).await {
            Ok(true) => found.push(*other),
            Ok(false) => {}
            Err(error) => tracing::warn!("repository {} was not asked for {}: {error}", other.name(), finding.object),
        }
    }
    found
}

async fn bring_back(
    repository: &Repository,
    others: &[&Repository],
    id: &ClusterId,
    finding: &Finding,
    size: Option<SegmentSize>,
) -> Result<repair::Repaired, String> {
    let mut why = "no other repository of the cluster has it".to_owned();
    for other in others {
        match repair::repair(repository, other, id, finding, size).await {
            Ok(done) => return Ok(done),
            Err(error) => why = error.to_string(),
        }
    }
    Err(why)
}

/// What a finding costs, in words.
pub(super) fn costs(finding: &Finding) -> Vec<String> {
    let mut lines = Vec::new();
    if !finding.backups.is_empty() {
        let labels: Vec<String> = finding.backups.iter().map(ToString::to_string).collect();
        lines.push(format!("base backups that need it: {}", labels.join(", ")));
    }
    for Lost { branch, from, to, from_about, to_about } in &finding.instants {
        let about = match (from_about, to_about) {
            (Some(from), Some(to)) => format!(" (about {} to {})", time(*from), time(*to)),
            _ => String::new(),
        };
        lines.push(format!("cannot be restored: branch {branch} from {from} to {to}{about}"));
    }
    if lines.is_empty() {
        lines.push("every instant can be restored without it".to_owned());
    }
    lines
}

fn show(context: &Context, line: &Line, objects: bool) {
    let output = &context.output;
    let report = &line.report;
    output.line(format!("Cluster {} in repository {}", line.cluster, line.repository));
    let (there, backups) = (count(report.objects, "object"), count(report.backups, "base backup"));
    output.line(format!("  {there}, {}, {backups}", bytes(report.bytes)));
    if objects {
        let read = count(report.read_objects, "object");
        output.line(format!("  Opened now: {read}, {}", bytes(report.read_bytes)));
    }
    match (report.unread_objects, report.whole_since) {
        (_, None) if report.objects > 0 => output.line("  No object was ever opened: --objects does"),
        (0, Some(since)) => output.line(format!("  Every object was read and found whole since {}", time(since))),
        (unread, Some(since)) => output.line(format!(
            "  {} ({}) were never found whole, every other one since {}",
            count(unread, "object"),
            bytes(report.unread_bytes),
            time(since)
        )),
        (_, None) => {}
    }
    for (finding, elsewhere) in report.findings.iter().zip(&line.elsewhere) {
        let word = match finding.fault {
            Fault::Missing => "MISSING",
            Fault::Length => "WRONG LENGTH",
            Fault::Hole => "HOLE",
            Fault::Damaged | Fault::Other => "DAMAGED",
        };
        output.line(format!("  {word} {}", finding.object));
        output.line(format!("    {}", finding.why));
        costs(finding).into_iter().for_each(|cost| output.line(format!("    {cost}")));
        match elsewhere.as_slice() {
            [] => output.line("    no other repository of the cluster that was asked has it"),
            names => output.line(format!("    it is also in {}; --repair brings it back", names.join(", "))),
        }
    }
    if report.more_findings > 0 {
        output.line(format!("  And {} more", count(report.more_findings, "finding")));
    }
    for done in &report.repaired {
        output.line(format!("  REPAIRED {} from {}: {}", done.object, done.from, done.now));
    }
    line.not_repaired.iter().for_each(|why| output.line(format!("  NOT REPAIRED {why}")));
    report.remarks.iter().for_each(|remark| output.line(format!("  note: {remark}")));
    if let Some(why) = &report.unfinished {
        output.line(format!("  Not finished: {why}"));
    }
    if report.findings.is_empty() && report.more_findings == 0 {
        output.line("  Nothing is missing, and nothing that was opened is damaged.");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_they_are_typed() {
        let cases =
            [("1", 1), ("50MB", 50_000_000), ("50MB/s", 50_000_000), ("200 GB", 200_000_000_000), ("3kB", 3000)];
        for (text, want) in cases {
            assert_eq!(size(text).map(NonZeroU64::get), Ok(want), "{text}");
        }
        for text in ["", "0", "MB", "1.5GB", "50MiB", "-1"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
