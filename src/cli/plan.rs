//! `pgkeep plan`: whether and how a target can be reached. Changes nothing, needs no server.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;

use super::args::TargetArgs;
use super::several::{Away, none_answers, open_all};
use super::{CliError, Context, Exit, open};
use crate::catalog::Repository;
use crate::catalog::inventory::ClusterInventory;
use crate::plan::choose::{self, Candidate, Offer};
use crate::plan::{Options, PlanError, RestorePlan, Target, TargetReading, TimelineChoice, explain, target};
use crate::restore::{Resolved, RestoreError, WalRead, find_cluster, measure, other_history, resolve_in};
use crate::types::{Branch, ClusterId};

/// `pgkeep plan`: whether and how a target can be reached. Changes nothing, needs no server.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Exit code 0: `pgkeep restore` with the same words reaches it. 1: it cannot be reached; the answer says why, and which \
are the nearest instants that can. 3: no, but a repository is away that may reach it.

A yes is a proof: all WAL from the base backup to the target is read and checked, and every object of the base backup \
is opened as far as its footer. The time that is named is an estimate.

Without --repository all repositories of the cluster are asked, and the cheapest that reaches the target is named: a \
local one before others, then the one that has to read least.

Example:
  pgkeep plan --to '10 minutes ago'
  pgkeep plan --to '2026-11-20 14:03:00+01:00' --exclusive")]
pub struct Args {
    /// The target and how it is meant
    #[command(flatten)]
    pub target: TargetArgs,
}

/// So many of the newest drills are asked how fast a server replays.
const DRILLS: usize = 5;
/// Reading WAL that takes longer is told about.
const QUIET_FOR: Duration = Duration::from_secs(2);

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let asked = Asked::of(context, &args.target).await?;
    match asked.resolve(context).await? {
        Ok(mut found) => {
            found.measure().await;
            asked.show_plan(context, &found);
            Ok(Exit::Done)
        }
        Err(no) => Ok(asked.refuse(context, &no)),
    }
}

impl Found<'_> {
    /// Adds an estimate to the plan, by what a small read of the repository shows.
    async fn measure(&mut self) {
        let Resolved { plan, manifest } = &mut self.resolved;
        let sample = measure(self.repository, &plan.cluster, manifest).await;
        let sample = sample.inspect_err(|error| tracing::debug!(%error, "the repository's speed was not measured"));
        plan.knows_speed(sample.ok(), replayed(self.repository, &plan.cluster).await);
    }
}

/// How fast a server replays, in bytes of WAL a second, as the last drill that was long enough has measured it.
pub(super) async fn replayed(repository: &Repository, cluster: &ClusterId) -> Option<u64> {
    let drills = repository.drills(cluster, DRILLS).await;
    let drills = drills.inspect_err(|error| tracing::debug!(%error, "no drill was looked at")).unwrap_or_default();
    drills.iter().find_map(|(_, drill)| drill.rate("recovery"))
}

/// A repository that holds the cluster.
struct Known {
    repository: Repository,
    local: bool,
    inventory: ClusterInventory,
}

/// A target as it was asked for, and where it is sought.
pub(super) struct Asked {
    known: Vec<Known>,
    away: Vec<Away>,
    /// Repositories that answer and do not hold the cluster, or cannot be restored from.
    left_out: Vec<Away>,
    /// Which cluster.
    pub cluster: ClusterId,
    /// Only this repository was to be asked.
    pub named: bool,
    target: Target,
    options: Options,
    zone: TimeZone,
}

/// A target that can be reached, and from where.
pub(super) struct Found<'a> {
    /// The plan, and the base backup's manifest in the chosen repository.
    pub resolved: Resolved,
    /// The chosen repository.
    pub repository: &'a Repository,
    /// The others, of which some may take over.
    pub others: Vec<&'a Repository>,
    because: &'static str,
}

/// Which repository, for `--json`.
#[derive(Serialize)]
pub(super) struct Origin<'a> {
    repository: &'a str,
    /// Why this one; `null` where there was no choice.
    because: Option<&'static str>,
    /// Those that do not answer.
    away: &'a [Away],
}

#[derive(Serialize)]
struct Yes<'a> {
    reachable: bool,
    from: Origin<'a>,
    plan: &'a RestorePlan,
}

#[derive(Serialize)]
struct No<'a> {
    reachable: bool,
    away: &'a [Away],
    #[serde(flatten)]
    why: &'a PlanError,
}

impl Asked {
    /// Reads the words; opens the repositories.
    pub async fn of(context: &Context, args: &TargetArgs) -> Result<Asked, CliError> {
        Asked::of_named(context, args, context.cluster_name(), context.repository_name()).await
    }

    /// [`Asked::of`] this cluster and this repository, whatever was typed.
    pub async fn of_named(
        context: &Context,
        args: &TargetArgs,
        cluster: Option<&str>,
        repository: Option<&str>,
    ) -> Result<Asked, CliError> {
        let tz = args.tz.as_deref().map(target::parse_zone).transpose().map_err(CliError::usage)?;
        let local = TimeZone::system();
        let zone = tz.clone().unwrap_or_else(|| local.clone());
        let reading = TargetReading { now: Timestamp::now(), local, tz };
        let target = Target::parse(&args.target, args.exclusive, &reading).map_err(CliError::usage)?;
        let options = Options { timeline: args.timeline, backup: args.backup, allow_flagged: false };
        let config = context.config()?;
        let from = config.read_from_any(cluster, repository)?;
        let several = open_all(&from.repositories).await?;
        let named = from.repositories.len() == 1;
        let (mut known, mut away, mut left_out) = (Vec::new(), several.away, Vec::new());
        let mut missing = None;
        let mut cluster: Option<ClusterId> = None;
        for (repository, local) in several.open {
            let name = repository.name().to_owned();
            let out = |why: &RestoreError| Away { repository: name.clone(), why: why.to_string() };
            let id = match find_cluster(&repository, from.cluster.as_ref()).await {
                Ok(id) => id,
                Err(error @ RestoreError::NoCluster { .. }) => {
                    left_out.push(out(&error));
                    missing.get_or_insert(error);
                    continue;
                }
                Err(error) if error.is_retryable() && !named => {
                    away.push(out(&error));
                    missing.get_or_insert(error);
                    continue;
                }
                Err(error) => return Err(restore_error(error)),
            };
            if let Some(other) = cluster.as_ref().filter(|other| **other != id) {
                let error = anyhow::anyhow!("the repositories hold different clusters: {other}, and {id} in {name}");
                return Err(CliError::usage(error).hint("say which one is meant with --repository"));
            }
            if !repository.can_read() {
                let error = RestoreError::WriteOnlyKey { repository: name.clone() };
                left_out.push(out(&error));
                missing = Some(error);
                continue;
            }
            cluster = Some(id.clone());
            match repository.load(&id).await {
                Ok(inventory) => known.push(Known { repository, local, inventory }),
                Err(error) if error.is_retryable() && !named => {
                    let error = RestoreError::Repository(error);
                    away.push(out(&error));
                    missing.get_or_insert(error);
                }
                Err(error) => return Err(open::repository_error(error)),
            }
        }
        let cluster = match (cluster, known.is_empty(), missing) {
            (Some(cluster), false, _) => cluster,
            (_, _, Some(error)) => return Err(restore_error(error)),
            (_, _, None) => return Err(CliError::failed(none_answers(&away))),
        };
        Ok(Asked { known, away, left_out, cluster, named, target, options, zone })
    }

    /// The repositories that hold the cluster, and what each holds.
    pub fn known(&self) -> impl Iterator<Item = (&Repository, &ClusterInventory)> {
        self.known.iter().map(|known| (&known.repository, &known.inventory))
    }

    /// Asks for another target, on exactly this branch.
    pub fn aim(&mut self, target: Target, branch: Branch) {
        self.target = target;
        self.options.timeline = TimelineChoice::Branch(branch);
    }

    /// What is asked for, as it was given.
    pub fn target(&self) -> &str {
        &self.target.given
    }

    /// The plan and the repository to read from, or the answer no.
    pub async fn resolve(&self, context: &Context) -> Result<Result<Found<'_>, Box<PlanError>>, CliError> {
        let (since, shown) = (Instant::now(), std::sync::OnceLock::new());
        let progress = |read: WalRead| {
            if since.elapsed() >= QUIET_FOR {
                let progress = shown.get_or_init(|| context.output.progress("reading WAL", Some(read.total)));
                progress.set_total(Some(read.total));
                progress.set(read.done);
            }
        };
        let candidates: Vec<Candidate<'_>> =
            self.known.iter().map(|known| Candidate { local: known.local, inventory: &known.inventory }).collect();
        let (mut offers, mut plans): (Vec<Offer>, Vec<(usize, Resolved)>) = (Vec::new(), Vec::new());
        let mut passed_over: Vec<Offer> = Vec::new();
        let (mut no, mut remarks, mut failed): (Option<Box<PlanError>>, Vec<String>, _) = (None, Vec::new(), None);
        for index in choose::order(&candidates, &self.target, &self.options) {
            let Some(Known { repository, local, inventory }) = self.known.get(index) else { continue };
            if let Some((best, plan)) = best_of(&offers, &plans) {
                // By its names alone: WAL is not read for a repository that would not be chosen.
                match choose::estimate(inventory, plan) {
                    Some(bytes) if choose::beats(best, *local, bytes) => {}
                    Some(bytes) => {
                        passed_over.push(Offer { index, local: *local, bytes, reach: best.reach });
                        continue;
                    }
                    None => continue,
                }
            }
            let resolved = resolve_in(repository, inventory.clone(), &self.target, &self.options, &progress).await;
            match resolved {
                Ok(Ok(resolved)) => {
                    let others = self.known.iter().map(|known| &known.inventory).collect::<Vec<_>>();
                    match choose::outdated(&resolved.plan, &self.options, inventory, &others) {
                        Some(branch) => remarks.push(format!(
                            "repository {} does not know of branch {branch}, which leaves the way before the target; to \
                             restore from it all the same, name it with --repository",
                            repository.name()
                        )),
                        None => {
                            let bytes = choose::estimate(inventory, &resolved.plan);
                            let bytes = bytes.unwrap_or_else(|| choose::bytes(&resolved.plan));
                            let reach = choose::reach(&resolved.plan);
                            offers.push(Offer { index, local: *local, bytes, reach });
                            plans.push((index, resolved));
                        }
                    }
                }
                Ok(Err(answer)) => {
                    let end = |no: &PlanError| no.newest.as_ref().map(|newest| newest.lsn);
                    if no.as_deref().is_none_or(|known| end(known) < end(&answer)) {
                        no = Some(answer);
                    }
                }
                Err(error) if self.known.len() == 1 => return Err(restore_error(error)),
                Err(error) => {
                    tracing::warn!("repository {} is left out: {error}", repository.name());
                    remarks.push(format!("repository {} is left out: {error}", repository.name()));
                    failed.get_or_insert(error);
                }
            }
        }
        let Some(chosen) = choose::best(&offers) else {
            return match (no, failed) {
                (Some(mut no), _) => {
                    no.hints.append(&mut remarks);
                    Ok(Err(no))
                }
                (None, Some(error)) => Err(restore_error(error)),
                (None, None) => {
                    let error = anyhow::anyhow!("no repository answers for the target");
                    Err(CliError::no(error).hint(remarks.join("; ")))
                }
            };
        };
        passed_over.extend(&offers);
        let because = choose::because(chosen, &passed_over);
        let plan = plans.into_iter().find(|(index, _)| *index == chosen.index).map(|(_, resolved)| resolved);
        let (Some(mut resolved), Some(known)) = (plan, self.known.get(chosen.index)) else {
            return Err(CliError::failed(anyhow::anyhow!("the chosen plan is lost"))); // invariant: each offer has one
        };
        self.compare_histories(known, &resolved.plan, &mut remarks).await?;
        resolved.plan.warnings.append(&mut remarks);
        let others = self.known.iter().enumerate().filter(|(index, _)| *index != chosen.index);
        let others = others.map(|(_, known)| &known.repository).collect();
        Ok(Ok(Found { resolved, repository: &known.repository, others, because }))
    }

    /// Refuses a plan on whose way another repository holds another history: `wal fetch` will ask all of them.
    async fn compare_histories(
        &self,
        chosen: &Known,
        plan: &RestorePlan,
        remarks: &mut Vec<String>,
    ) -> Result<(), CliError> {
        let (one, size) = (&chosen.repository, plan.base.segment_size);
        for other in self.known.iter().filter(|other| other.repository.name() != one.name()) {
            let theirs = (&other.repository, &other.inventory);
            match other_history(one, theirs, &self.cluster, &plan.wal, size).await {
                Ok(None) => {}
                Ok(Some((branch, until))) => {
                    let error = anyhow::anyhow!(
                        "repositories {} and {} hold different WAL of branch {branch} before {until}: two servers have \
                         archived under this name",
                        one.name(),
                        other.repository.name()
                    );
                    return Err(CliError::refused(error).hint("say which one is meant with --repository"));
                }
                Err(error) => remarks.push(format!(
                    "repository {} could not be compared with {}: {error}",
                    other.repository.name(),
                    one.name()
                )),
            }
        }
        Ok(())
    }

    /// The repositories that took part, where others did not: nobody knows what those hold.
    pub fn only(&self) -> Vec<&str> {
        let all = self.named || self.away.is_empty() && self.left_out.is_empty();
        self.known.iter().filter(|_| !all).map(|known| known.repository.name()).collect()
    }

    /// Whether there was any choice.
    fn is_choice(&self) -> bool {
        self.known.len() + self.away.len() > 1
    }

    /// Which repository, for `--json`.
    pub fn from<'a>(&'a self, found: &'a Found<'_>) -> Origin<'a> {
        let because = Some(found.because).filter(|_| self.is_choice());
        Origin { repository: found.repository.name(), because, away: &self.away }
    }

    /// Prints a plan's lines; with `--json`, nothing.
    pub fn explain(&self, context: &Context, found: &Found<'_>) {
        let mut lines = explain::plan(&found.resolved.plan, &self.zone);
        if self.is_choice() {
            lines.push(format!("from      repository {}: {}", found.repository.name(), found.because));
        }
        for out in self.away.iter().chain(&self.left_out) {
            lines.push(format!("left out  repository {}: {}", out.repository, out.why));
        }
        context.output.line(lines.join("\n"));
    }

    fn show_plan(&self, context: &Context, found: &Found<'_>) {
        self.explain(context, found);
        context.output.document(&Yes { reachable: true, from: self.from(found), plan: &found.resolved.plan });
    }

    /// Prints why not. While a repository is away, that is not the last word.
    pub fn refuse(&self, context: &Context, no: &PlanError) -> Exit {
        let mut lines = explain::refusal(no, &self.zone);
        for out in self.away.iter().chain(&self.left_out) {
            lines.push(format!("left out  repository {}: {}", out.repository, out.why));
        }
        context.output.result(&No { reachable: false, away: &self.away, why: no }, lines.join("\n"));
        if self.away.is_empty() {
            return Exit::No;
        }
        context.output.note("a repository is away that may reach it: try again when it is back");
        Exit::Failed
    }
}

fn best_of<'a>(offers: &[Offer], plans: &'a [(usize, Resolved)]) -> Option<(Offer, &'a RestorePlan)> {
    let best = choose::best(offers)?;
    let (_, resolved) = plans.iter().find(|(index, _)| *index == best.index)?;
    Some((best, &resolved.plan))
}

/// Which exit code an error of a restore means.
pub(super) fn restore_error(error: RestoreError) -> CliError {
    match error {
        RestoreError::Repository(error) => open::repository_error(error),
        error if error.is_refusal() => CliError::refused(error),
        error if error.is_usage() => CliError::usage(error),
        error => CliError::failed(error),
    }
}
