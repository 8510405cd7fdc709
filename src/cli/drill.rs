//! `pgkeep drill`: a restore that nobody needed, done to prove that it works; and how earlier ones went.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use jiff::Timestamp;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::args::TargetArgs;
use super::lease::leased;
use super::output::{Align, Table, bytes, duration, time};
use super::plan::Asked;
use super::restore::{restore_command, sources};
use super::several::{Away, open_all};
use super::{CliError, Context, Exit, open, stop_on_signal};
use crate::catalog::Repository;
use crate::catalog::events::Happened;
use crate::catalog::verification::{Drill, Outcome};
use crate::config::{self, Place};
use crate::plan::{NoKind, PlanError, Point, Stop, Target, TimelineChoice};
use crate::types::BackupLabel;
use crate::verify::drill::{DrillError, Scratch, Seen, Setup, drill, installation, pick::pick};

/// Drills that a report shows.
const REPORTED: usize = 100;

/// `pgkeep drill`: restores into scratch space, starts a server, looks at it, removes it.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The server listens on a private socket alone, archives nothing, loads no library and has no jobs. It is looked at whether recovery \
ended where the plan had said; whether tables and indexes are whole (amcheck, where it is installed); whether every page has \
its checksum; and whether the assertions of the configuration hold. Then everything is removed, and the result recorded in the \
repository. `pgkeep run` does drills by itself where the configuration says `every`.

Exit code 0: all of it was as it should be. 1: it was not; the answer says what. 2: the programs of the right major are not here. 3: \
it could not be done, another try may help. 4: the scratch directory is not one to write to.

Example:
  pgkeep drill --random --scratch /var/tmp/pgkeep-drill
  pgkeep drill --to '2 hours ago'
  pgkeep drill --report")]
pub struct Args {
    /// What to restore, as for `plan` [default: latest]
    #[arg(long = "to", value_name = "TARGET", allow_hyphen_values = true, conflicts_with = "random")]
    pub target: Option<String>,
    /// An instant of the window, drawn by a seed that is shown
    #[arg(long, conflicts_with_all = ["tz", "timeline", "backup"])]
    pub random: bool,
    /// Draw by this seed: the same instant, as long as the repository is the same
    #[arg(long, value_name = "NUMBER", requires = "random")]
    pub seed: Option<u64>,
    /// The time zone of a time that is written without one, such as `Europe/Berlin` or `+01:00`
    #[arg(long, value_name = "ZONE", allow_hyphen_values = true)]
    pub tz: Option<String>,
    /// Follow this timeline, as for `plan`
    #[arg(long, value_name = "TIMELINE", default_value = "latest")]
    pub timeline: TimelineChoice,
    /// Use this base backup and no other
    #[arg(long, value_name = "LABEL")]
    pub backup: Option<BackupLabel>,
    /// Where: empty, or not there yet [default: `scratch` of the configuration's `drill`]
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// The server's programs [default: `bindir` of the configuration's `drill`, or those that are found]
    #[arg(long, value_name = "DIR")]
    pub bindir: Option<PathBuf>,
    /// Show how earlier drills went, and do none
    #[arg(long, conflicts_with_all = ["target", "random", "scratch", "bindir", "backup"])]
    pub report: bool,
}

/// What is to be drilled.
pub(super) enum Aim {
    /// This.
    Target(TargetArgs),
    /// An instant drawn by this seed.
    Random(u64),
}

/// With what, and where.
pub(super) struct Means {
    pub scratch: PathBuf,
    pub max_bytes: Option<u64>,
    pub bindir: Option<PathBuf>,
    pub user: String,
    pub database: String,
    pub assertions: Vec<String>,
}

impl Means {
    pub fn of(drill: &config::Drill) -> Means {
        let config::Drill { scratch, max_bytes, bindir, user, database, assertions, every: _ } = drill.clone();
        Means { scratch, max_bytes, bindir, user, database, assertions }
    }
}

/// A drill that was done.
#[derive(Debug, Serialize)]
pub(super) struct Done {
    pub repository: String,
    pub cluster: String,
    #[serde(flatten)]
    pub drill: Drill,
    /// Why its result is not in the repository.
    pub not_recorded: Option<String>,
}

/// A number that nobody chose.
pub(super) fn any_seed() -> u64 {
    // Where there is no randomness the clock will do: nothing depends on it.
    getrandom::u64().unwrap_or_else(|_| Timestamp::now().as_nanosecond().unsigned_abs() as u64) % 1_000_000_000
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    if args.report {
        return report(context).await;
    }
    let config = context.config()?;
    let of_file = match config.clusters.as_slice() {
        [] => None,
        _ => config.cluster(context.cluster_name()).ok().and_then(|cluster| cluster.drill.as_ref()),
    };
    let mut means = match (of_file, &args.scratch) {
        (Some(drill), _) => Means::of(drill),
        (None, Some(scratch)) => Means {
            scratch: scratch.clone(),
            max_bytes: None,
            bindir: None,
            user: "postgres".to_owned(),
            database: "postgres".to_owned(),
            assertions: Vec::new(),
        },
        (None, None) => {
            let error = anyhow!("it is not said where a drill may write");
            return Err(CliError::usage(error)
                .hint("give --scratch DIR, or write drill = { scratch = \"…\" } below [cluster.NAME]"));
        }
    };
    means.scratch = args.scratch.unwrap_or(means.scratch);
    means.bindir = args.bindir.or(means.bindir);
    let aim = match args.random {
        true => Aim::Random(args.seed.unwrap_or_else(any_seed)),
        false => Aim::Target(TargetArgs {
            target: args.target.unwrap_or_else(|| "latest".to_owned()),
            tz: args.tz,
            exclusive: false,
            timeline: args.timeline,
            backup: args.backup,
        }),
    };
    let stop = stop_on_signal()?;
    match once(context, context.cluster_name(), aim, means, &stop).await? {
        Ok(done) => {
            show(context, &done);
            Ok(if done.drill.verdict == Outcome::Passed { Exit::Done } else { Exit::No })
        }
        Err((asked, no)) => Ok(asked.refuse(context, &no)),
    }
}

/// Which exit code an error of a drill means.
fn drill_error(error: DrillError) -> CliError {
    match error {
        DrillError::Restore(error) => super::plan::restore_error(error),
        error if error.is_refusal() => CliError::refused(error),
        error if error.is_retryable() => CliError::failed(error),
        error => CliError::usage(error),
    }
}

/// Whether a "no" says something about the archive, and not only about the target.
fn is_failure(no: &PlanError) -> bool {
    matches!(no.kind, NoKind::NoBackup | NoKind::MissingHistory | NoKind::MissingWal | NoKind::MinimalWal)
}

/// One drill. The inner error: the target cannot be reached, and that is nobody's fault.
pub(super) async fn once(
    context: &Context,
    cluster: Option<&str>,
    aim: Aim,
    means: Means,
    stop: &CancellationToken,
) -> Result<Result<Done, (Asked, Box<PlanError>)>, CliError> {
    let config = context.config()?;
    let began_at = Timestamp::now();
    let directories: Vec<PathBuf> = config
        .repositories
        .iter()
        .filter_map(|place| match &place.place {
            Place::Directory(path) => Some(path.clone()),
            _ => None,
        })
        .collect();
    // The cheapest refusal first.
    let place = means.scratch.clone();
    let taken = blocking(move || {
        let directories: Vec<&std::path::Path> = directories.iter().map(PathBuf::as_path).collect();
        Scratch::take(&place, &directories)
    });
    let scratch = taken.await?;
    let (args, seed) = match aim {
        Aim::Target(args) => (args, None),
        Aim::Random(seed) => {
            let (target, timeline) = ("latest".to_owned(), TimelineChoice::Latest);
            (TargetArgs { target, tz: None, exclusive: false, timeline, backup: None }, Some(seed))
        }
    };
    let mut asked = Asked::of_named(context, &args, cluster, context.repository_name()).await?;
    if let Some(seed) = seed {
        let drawn = asked.known().find_map(|(_, inventory)| pick(inventory, seed));
        let Some((branch, lsn)) = drawn else {
            let error = anyhow!("there is no base backup with its WAL, so no instant can be drawn");
            return Err(CliError::no(error).hint("`pgkeep verify` says what is missing"));
        };
        let point = Point::Lsn(lsn);
        asked.aim(Target { point, exclusive: false, given: lsn.to_string() }, branch);
        context.output.line(format!("seed      {seed}: {lsn} on branch {branch}"));
    }
    let planning = Instant::now();
    let mut resolved = asked.resolve(context).await?;
    if let (Some(_), Err(no)) = (seed, &resolved)
        && no.kind == NoKind::AfterNewest
    {
        // Behind the beginning of the last record.
        let branch = asked
            .known()
            .find_map(|(_, inventory)| pick(inventory, seed.unwrap_or_default()))
            .map(|(branch, _)| branch);
        if let Some(branch) = branch {
            drop(resolved);
            asked.aim(Target::latest(), branch);
            resolved = asked.resolve(context).await?;
        }
    }
    let id = asked.cluster.clone();
    let mut result = Drill {
        writer: crate::catalog::repository::random_id().map_err(open::repository_error)?,
        began_at,
        ended_at: began_at,
        target: asked.target().to_owned(),
        seed,
        backup: None,
        branch: None,
        stop: None,
        server: None,
        verdict: Outcome::Failed,
        checks: Vec::new(),
        phases: Vec::new(),
    };
    let mut seen = Seen::default();
    let repository: Repository = match resolved {
        Err(no) if seed.is_none() && !is_failure(&no) => {
            blocking(move || scratch.leave()).await?;
            return Ok(Err((asked, no)));
        }
        Err(no) => {
            seen.phase("plan", planning, 0);
            seen.check("plan", Outcome::Failed, no.to_string());
            blocking(move || scratch.leave()).await?;
            let Some((first, _)) = asked.known().next() else { return Ok(Err((asked, no))) };
            first.clone()
        }
        Ok(found) => {
            asked.explain(context, &found);
            let plan = &found.resolved.plan;
            seen.phase("plan", planning, plan.fetch.wal_bytes);
            let installation = installation(plan.base.server_version, means.bindir.as_deref()).map_err(drill_error)?;
            scratch.has_room(plan, means.max_bytes).map_err(drill_error)?;
            (result.backup, result.branch) = (Some(plan.base.label), plan.path.last().map(|part| part.branch));
            result.stop = match plan.stop {
                Stop::At(stop) => Some(stop.record),
                Stop::Immediate => None,
            };
            result.server = Some(installation.version.clone());
            let command = restore_command(context, &asked, found.repository, plan)?;
            let sources = sources(context, &asked, &found).await?;
            let Means { user, database, assertions, .. } = means;
            let setup = Setup { installation, user, database, assertions };
            let progress = context.output.progress("restoring", Some(plan.base.bytes));
            let add = |written: u64| progress.add(written);
            let repositories = std::iter::once(found.repository).chain(found.others.iter().copied());
            let drilling = drill(&sources, &found.resolved, &scratch, setup, &command, &add, stop);
            let drilled = leased(repositories.cloned().collect(), &id, plan, drilling).await;
            progress.finish();
            let repository = found.repository.clone();
            // Also when it failed: nothing of it stays.
            let left = blocking(move || scratch.leave()).await;
            let drilled = drilled.map_err(drill_error)?;
            left?;
            seen.checks.extend(drilled.checks);
            seen.phases.extend(drilled.phases);
            repository
        }
    };
    (result.verdict, result.ended_at) = (seen.verdict(), Timestamp::now());
    (result.checks, result.phases) = (seen.checks, seen.phases);
    let recorded = repository.put_drill(&id, &result).await;
    let not_recorded = recorded.err().map(|error| error.to_string());
    let failure = result.failure().map(|check| format!("{}: {}", check.check, check.found));
    let (target, passed) = (result.target.clone(), result.verdict == Outcome::Passed);
    repository.note_event(&id, Happened::Drilled { target, passed, failure }).await;
    let (repository, cluster) = (repository.name().to_owned(), id.to_string());
    Ok(Ok(Done { repository, cluster, drill: result, not_recorded }))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DrillError> + Send + 'static,
) -> Result<T, CliError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| CliError::failed(error).context("look after the scratch directory"))?.map_err(drill_error)
}

fn show(context: &Context, done: &Done) {
    let output = &context.output;
    output.document(done);
    for check in &done.drill.checks {
        let word = match check.outcome {
            Outcome::Passed => "ok",
            Outcome::Failed => "FAILED",
            Outcome::Skipped | Outcome::Other => "skipped",
        };
        output.line(format!("{:<9} {}: {}", word, check.check, check.found));
    }
    let times = done.drill.phases.iter().map(|phase| {
        let took = Duration::try_from_secs_f64(phase.seconds).unwrap_or_default();
        let size = if phase.bytes > 0 { format!(" ({})", bytes(phase.bytes)) } else { String::new() };
        format!("{} {}{size}", phase.phase, duration(took))
    });
    output.line(format!("time      {}", times.collect::<Vec<_>>().join(", ")));
    if let Some(why) = &done.not_recorded {
        output.line(format!("note      the result is not recorded: {why}"));
    }
    output.line(match done.drill.failure() {
        None => format!("The drill passed: {} can be restored from {}.", done.drill.target, done.repository),
        Some(check) => format!("The drill FAILED at {}: {}", check.check, check.found),
    });
}

#[derive(Debug, Serialize)]
struct Report {
    drills: Vec<Reported>,
    /// Repositories that do not answer.
    away: Vec<Away>,
}

#[derive(Debug, Serialize)]
struct Reported {
    repository: String,
    cluster: String,
    /// Its name there.
    name: BackupLabel,
    #[serde(flatten)]
    drill: Drill,
}

async fn report(context: &Context) -> Result<Exit, CliError> {
    let config = context.config()?;
    let from = config.read_from_any(context.cluster_name(), context.repository_name())?;
    let several = open_all(&from.repositories).await?;
    let mut report = Report { drills: Vec::new(), away: several.away };
    for (repository, _) in several.open {
        let ids = match &from.cluster {
            Some(name) => repository.clusters_named(name).await,
            None => repository.clusters().await,
        };
        for id in ids.map_err(open::repository_error)? {
            for (name, drill) in repository.drills(&id, REPORTED).await.map_err(open::repository_error)? {
                let (repository, cluster) = (repository.name().to_owned(), id.to_string());
                report.drills.push(Reported { repository, cluster, name, drill });
            }
        }
    }
    report.drills.sort_by_key(|reported| std::cmp::Reverse(reported.drill.began_at));
    context.output.document(&report);
    if report.drills.is_empty() {
        context.output.line("No drill was done yet: `pgkeep drill --random` does one.");
    } else {
        let mut table = Table::new([
            ("When", Align::Left),
            ("From", Align::Left),
            ("Target", Align::Left),
            ("Took", Align::Right),
            ("Size", Align::Right),
            ("Verdict", Align::Left),
        ]);
        for Reported { repository, drill, .. } in &report.drills {
            let took = drill.ended_at.duration_since(drill.began_at).try_into().unwrap_or_default();
            let restored = drill.phases.iter().find(|phase| phase.phase == "restore");
            let verdict = match drill.failure() {
                None if drill.verdict == Outcome::Passed => "passed".to_owned(),
                None => "FAILED".to_owned(),
                Some(check) => format!("FAILED at {}: {}", check.check, check.found),
            };
            table.row([
                time(drill.began_at),
                repository.clone(),
                drill.target.clone(),
                duration(took),
                restored.map(|phase| bytes(phase.bytes)).unwrap_or_default(),
                verdict,
            ]);
        }
        context.output.line(table);
    }
    report.away.iter().for_each(|away| {
        context.output.line(format!("Repository {} is left out: {}", away.repository, away.why));
    });
    Ok(Exit::Done)
}

/// When the newest drill of a cluster began, in any of these.
pub(super) async fn last_drill(
    repositories: &[Repository],
    name: &crate::types::ClusterName,
) -> Result<Option<Timestamp>, CliError> {
    let mut newest: Option<Timestamp> = None;
    for repository in repositories {
        for id in repository.clusters_named(name).await.map_err(open::repository_error)? {
            let drills = repository.drills(&id, 1).await.map_err(open::repository_error)?;
            newest = newest.max(drills.first().map(|(_, drill)| drill.began_at));
        }
    }
    Ok(newest)
}
