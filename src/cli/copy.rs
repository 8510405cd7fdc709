//! `pgkeep copy`: from one repository into another.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use tokio::sync::watch;

use super::output::{bytes, count};
use super::{CliError, Context, Exit, open, stop_on_signal};
use crate::catalog::Repository;
use crate::catalog::events::Happened;
use crate::config::RepositoryConfig;
use crate::copy::{
    self, Copied, CopyError, CopyPlan, CopyProgress, Holding, ProblemKind, Selection, Step, ends_of_window,
};
use crate::plan::{Point, Target, TargetReading};
use crate::restore::find_cluster;
use crate::types::{BackupLabel, ClusterId};

/// How often the progress is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(100);

/// `pgkeep copy`: from one repository into another.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Everything is verified before it is put, and what is there already is compared and not copied: stopped in the middle, run \
it again. Repositories that share a key hold the same objects; into one of another key everything is sealed anew. The \
target must exist: `pgkeep init` creates one.

Exit code 1: something in the source is damaged; it is named, and the rest was copied. 4: the target holds something \
else under a name; that stays as it is.

Example:
  pgkeep copy --from main --to elsewhere --all
  pgkeep copy --from main --to elsewhere --backup 20261120T031500Z
  pgkeep copy --from main --to elsewhere --since 2026-11-01 --until 2026-11-08 --dry-run")]
#[command(group(clap::ArgGroup::new("what").required(true).args(["all", "backup", "since"])))]
pub struct Args {
    /// The repository to copy from, by its name in the configuration
    #[arg(long, value_name = "NAME")]
    pub from: String,
    /// The repository to copy to
    #[arg(long, value_name = "NAME")]
    pub to: String,
    /// Everything that can be restored from
    #[arg(long)]
    pub all: bool,
    /// This base backup, and the WAL that makes it consistent
    #[arg(long, value_name = "LABEL")]
    pub backup: Option<BackupLabel>,
    /// What reaches every instant from this time on
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub since: Option<String>,
    /// Up to this time [default: now]
    #[arg(long, value_name = "TIME", requires = "since", allow_hyphen_values = true)]
    pub until: Option<String>,
    /// The time zone of times that are written without one, such as `Europe/Berlin` or `+01:00`
    #[arg(long, value_name = "ZONE", allow_hyphen_values = true)]
    pub tz: Option<String>,
    /// Say what would be copied, and copy nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// What `--json` says.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    /// All that was asked for is in the target, and is the same there.
    complete: bool,
    /// `false` after `--dry-run`.
    copied: bool,
    cluster: String,
    from: &'a str,
    to: &'a str,
    /// Both repositories hold the same objects under the same key.
    same_realm: bool,
    plan: &'a CopyPlan,
    result: Option<&'a Copied>,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.config()?;
    let (from_config, to_config) = (config.repository(Some(&args.from))?, config.repository(Some(&args.to))?);
    if from_config.name == to_config.name {
        return Err(CliError::usage(anyhow::anyhow!("--from and --to name the same repository, {}", args.from)));
    }
    let window = window(&args)?;
    let from = open::repository(from_config).await?;
    let to = target(to_config).await?;
    // Several configured clusters, or none: whatever single one the source holds.
    let name = match (context.cluster_name(), config.clusters.as_slice()) {
        (None, [only]) => Some(only.name_in_repository.clone()),
        (None, _) => None,
        (Some(name), _) => config.read_from(Some(name), Some(&args.from))?.cluster,
    };
    let cluster = find_cluster(&from, name.as_ref()).await.map_err(super::plan::restore_error)?;
    let (source, there) = copy::survey(&from, &to, &cluster).await.map_err(copy_error)?;
    let selection = match (args.backup, window) {
        (Some(label), _) => Selection::Backup(label),
        (None, Some((since, until))) => {
            let ends = ends_of_window(&from, &source.inventory, until).await.map_err(open::repository_error)?;
            Selection::Window { since, until, ends }
        }
        (None, None) => Selection::All,
    };
    let plan = copy::plan(&source, &there, &selection);
    let work = Work { context, from: &from, to: &to, cluster: &cluster, source: &source, plan: &plan };
    work.announce();
    if args.dry_run {
        work.answer(None, "Nothing was copied (--dry-run).".to_owned());
        return Ok(if plan.missing.is_empty() { Exit::Done } else { Exit::No });
    }
    let stop = stop_on_signal()?;
    let copied = tokio::select! {
        biased;
        () = stop.cancelled() => {
            let error = anyhow::anyhow!("stopped; what was copied so far is there, whole");
            return Err(CliError::failed(error).hint("run the same command again: it goes on where it was"));
        }
        copied = copy_with_progress(context, &from, &to, &source, &plan, "copying") => copied?,
    };
    note_copied(&from, &to, &cluster, &copied).await;
    for problem in &copied.problems {
        context.output.line(format!("NOT COPIED {}: {}", problem.what, problem.why));
    }
    plan.missing.iter().for_each(|missing| context.output.line(format!("MISSING    {missing}")));
    let exit = exit_of(&plan, &copied);
    work.answer(Some(&copied), summary(&copied, &to));
    Ok(exit)
}

/// The target, which has to be there.
async fn target(config: &RepositoryConfig) -> Result<Repository, CliError> {
    open::repository(config).await.map_err(|error| {
        let hint = format!("the target has to exist: `pgkeep init --repo {}` creates a repository there", config.place);
        match error.exit() {
            Exit::Usage => error.hint(hint),
            _ => error,
        }
    })
}

/// Which exit code an error of copying means.
pub(super) fn copy_error(error: CopyError) -> CliError {
    match error {
        CopyError::Repository(error) => open::repository_error(error),
        error if error.is_refusal() => CliError::refused(error),
        error if error.is_retryable() => CliError::failed(error),
        error => CliError::usage(error),
    }
}

pub(super) fn exit_of(plan: &CopyPlan, copied: &Copied) -> Exit {
    let any = |kind: ProblemKind| copied.problems.iter().any(|problem| problem.kind == kind);
    if any(ProblemKind::Conflict) {
        return Exit::Refused;
    }
    if copied.problems.is_empty() && plan.missing.is_empty() { Exit::Done } else { Exit::No }
}

/// The instants of `--since` and `--until`.
fn window(args: &Args) -> Result<Option<(Timestamp, Timestamp)>, CliError> {
    let Some(since) = &args.since else { return Ok(None) };
    let tz = args.tz.as_deref().map(crate::plan::target::parse_zone).transpose().map_err(CliError::usage)?;
    let now = Timestamp::now();
    let reading = TargetReading { now, local: TimeZone::system(), tz };
    let instant = |text: &str, option: &str| match Target::parse(text, false, &reading).map_err(CliError::usage)?.point
    {
        Point::Time(instant) => Ok(instant),
        _ => Err(CliError::usage(anyhow::anyhow!("{option} {text:?} is no time"))),
    };
    let since = instant(since, "--since")?;
    let until = args.until.as_deref().map(|text| instant(text, "--until")).transpose()?.unwrap_or(now);
    if until < since {
        return Err(CliError::usage(anyhow::anyhow!("--until {until} lies before --since {since}")));
    }
    Ok(Some((since, until)))
}

/// Copies, and shows how far it is.
pub(super) async fn copy_with_progress(
    context: &Context,
    from: &Repository,
    to: &Repository,
    source: &Holding,
    plan: &CopyPlan,
    what: &str,
) -> Result<Copied, CliError> {
    let watched = watch::Sender::new(CopyProgress::default());
    let bar = context.output.progress(what, Some(plan.bytes));
    let mut shown = watched.subscribe();
    let draw = async {
        loop {
            {
                let progress = shown.borrow_and_update();
                bar.message(progress.doing.clone());
                bar.set(progress.done);
            }
            tokio::time::sleep(DRAW_EVERY).await;
        }
    };
    let copied = tokio::select! {
        biased;
        copied = copy::copy(from, to, source, plan, &watched) => copied,
        () = draw => return Err(CliError::failed(anyhow::anyhow!("the progress ended"))), // invariant: it never does
    };
    bar.finish();
    copied.map_err(|error| {
        let again = error.is_retryable();
        let error = copy_error(error);
        if again { error.hint("run the same command again: it goes on where it was") } else { error }
    })
}

/// Among the events of the target, if anything was copied.
pub(super) async fn note_copied(from: &Repository, to: &Repository, cluster: &ClusterId, copied: &Copied) {
    let Copied { segments, backups, others, bytes, .. } = *copied;
    if segments + backups + others > 0 {
        to.note_event(cluster, Happened::Copied { from: from.name().to_owned(), backups, bytes }).await;
    }
}

/// What was copied, in a sentence.
pub(super) fn summary(copied: &Copied, to: &Repository) -> String {
    let mut parts = Vec::new();
    if copied.backups > 0 {
        parts.push(count(copied.backups, "base backup"));
    }
    if copied.segments > 0 {
        parts.push(count(copied.segments, "segment"));
    }
    if copied.others > 0 {
        parts.push(count(copied.others, "small object"));
    }
    let what = match parts.is_empty() {
        true => format!("Nothing was missing in repository {}", to.name()),
        false => format!("Copied {} to repository {} ({})", parts.join(", "), to.name(), bytes(copied.bytes)),
    };
    match copied.problems.len() as u64 {
        0 => format!("{what}."),
        problems => format!("{what}; {} not copied, see above.", count(problems, "thing")),
    }
}

struct Work<'a> {
    context: &'a Context,
    from: &'a Repository,
    to: &'a Repository,
    cluster: &'a ClusterId,
    source: &'a Holding,
    plan: &'a CopyPlan,
}

impl Work<'_> {
    /// What is going to happen.
    fn announce(&self) {
        let Work { context, from, to, cluster, plan, .. } = self;
        let (same, anew) =
            ("the same realm: objects are copied as they are", "another realm: everything is sealed anew");
        let realm = if to.same_realm(from) { same } else { anew };
        context.output.line(format!("Cluster {cluster} from {} to {}, {realm}.", from.name(), to.name()));
        let (mut backups, mut wal, mut others) = (0, 0, 0);
        for step in &plan.steps {
            match step {
                Step::Backup { label, .. } if plan.backups_there.contains(label) => {}
                Step::Backup { label, .. } => {
                    let info = self.source.inventory.backups.iter().find(|backup| backup.label == *label);
                    let stop = info.map(|info| info.stop.to_string()).unwrap_or_default();
                    context.output.line(format!("  base backup {label}, consistent at {stop}"));
                    backups += 1;
                }
                Step::Segment { .. } | Step::Open { .. } => wal += 1,
                Step::History { .. }
                | Step::Gap { .. }
                | Step::File { .. }
                | Step::Index { .. }
                | Step::Names { .. } => others += 1,
            }
        }
        context.output.line(format!(
            "  to copy: {}, {}, {}, about {}; there already, to be compared: {}",
            count(backups, "base backup"),
            count(wal, "segment"),
            count(others, "small object"),
            bytes(plan.bytes),
            plan.compare.len() + plan.backups_there.len(),
        ));
        plan.missing.iter().for_each(|missing| context.output.line(format!("  missing: {missing}")));
    }

    fn answer(&self, copied: Option<&Copied>, text: String) {
        let Work { context, from, to, cluster, plan, .. } = self;
        let answer = Answer {
            complete: plan.missing.is_empty() && copied.is_some_and(|copied| copied.problems.is_empty()),
            copied: copied.is_some(),
            cluster: cluster.to_string(),
            from: from.name(),
            to: to.name(),
            same_realm: to.same_realm(from),
            plan,
            result: copied,
        };
        context.output.result(&answer, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn one_of_all_backup_and_a_window() {
        let parse = |words: &str| {
            let words = ["copy", "--from", "a", "--to", "b"].into_iter().chain(words.split_whitespace());
            Alone::try_parse_from(words).ok().map(|alone| alone.args)
        };
        assert!(parse("").is_none() && parse("--all --backup 20261120T031500Z").is_none());
        assert!(parse("--until 2026-11-01").is_none(), "an end needs a beginning");
        let args = parse("--since 2026-11-01T00:00:00Z --until 2026-11-08T00:00:00Z").unwrap();
        let (since, until) = window(&args).unwrap().unwrap();
        assert_eq!(until.as_second() - since.as_second(), 7 * 86_400);
        assert!(window(&parse("--since 2026-11-08T00:00:00Z --until 2026-11-01T00:00:00Z").unwrap()).is_err());
        assert!(window(&parse("--since latest").unwrap()).is_err());
        assert_eq!(window(&parse("--all").unwrap()).unwrap(), None);
    }
}
