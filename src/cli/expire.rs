//! `pgkeep expire`: removes what no policy asks for, and says why the rest stays.

use std::collections::BTreeMap;

use anyhow::anyhow;
use async_trait::async_trait;
use jiff::Timestamp;
use serde::Serialize;

use super::output::{bytes, count, time};
use super::several::{Away, open_all};
use super::{CliError, Context, Exit, open};
use crate::catalog::Repository;
use crate::catalog::events::Happened;
use crate::catalog::retention::RecordedExpiry;
use crate::config::{ClusterConfig, Config, Keep as KeepConfig};
use crate::daemon::expire::Expirer;
use crate::retention::policy::{Leftover, Promise, Verdict, WalGoes};
use crate::retention::sweep::GRACE;
use crate::retention::{Decision, Policy, Swept, look, sweep};
use crate::types::{BackupLabel, ClusterId, ClusterName};

/// `pgkeep expire`: removes what no policy asks for.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
What `keep` in the configuration does not ask for is recorded as condemned, goes a day later if it is still to go (base \
backups first), and its packs and WAL a day after that: so run it every day, or let `pgkeep run` do it. Times are those of \
the repository's own clock. Whatever it is stopped in, the next run goes on.

Exit code 1: with --explain, there is no such base backup. 3: a repository could not be asked.

Example:
  pgkeep expire --dry-run
  pgkeep expire --explain 20261120T031500Z
  pgkeep expire")]
pub struct Args {
    /// Say what would go, what that frees, and what can be restored before and afterwards; change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Say which rule keeps this base backup, or when it goes; change nothing
    #[arg(long, value_name = "LABEL", conflicts_with = "dry_run")]
    pub explain: Option<BackupLabel>,
}

#[derive(Debug, Serialize)]
struct Document {
    /// `false` with --dry-run and --explain.
    acted: bool,
    repositories: Vec<Line>,
    /// Repositories that do not answer.
    away: Vec<Away>,
}

#[derive(Debug, Serialize)]
struct Line {
    repository: String,
    cluster: String,
    now: Timestamp,
    window_from: Timestamp,
    backups: Vec<BackupLine>,
    /// Base backups that are not coming any more.
    give_up: Vec<BackupLabel>,
    wal: Vec<WalGoes>,
    packs: u64,
    parts: u64,
    /// Bytes that are freed by all that goes.
    frees: u64,
    leftovers: Vec<Leftover>,
    blocked: Vec<String>,
    before: Vec<Promise>,
    after: Vec<Promise>,
    /// What was done.
    done: Option<Swept>,
}

#[derive(Debug, Serialize)]
struct BackupLine {
    #[serde(flatten)]
    verdict: Verdict,
    goes: bool,
    /// The words of the rules.
    why: Vec<String>,
    /// When its manifest goes at the earliest; only of one that is condemned by a record.
    goes_after: Option<Timestamp>,
}

/// The policy of a repository.
pub(super) fn policy(keep: &KeepConfig) -> Policy {
    let KeepConfig { window, daily, weekly, monthly, yearly, at_least } = *keep;
    Policy { window, daily, weekly, monthly, yearly, at_least }
}

/// The cluster that is meant, and those of its repositories that have a policy, with it.
fn with_policies<'a>(
    context: &Context,
    config: &'a Config,
) -> Result<(&'a ClusterConfig, BTreeMap<&'a str, Policy>), CliError> {
    let cluster = config.cluster(context.cluster_name())?;
    let wanted = |name: &str| context.repository_name().is_none_or(|wanted| wanted == name);
    let policies: BTreeMap<&str, Policy> = cluster
        .keep
        .iter()
        .filter(|(name, _)| wanted(name))
        .map(|(name, keep)| (name.as_str(), policy(keep)))
        .collect();
    if policies.is_empty() {
        let of = context.repository_name().map(|name| format!(" in repository {name}")).unwrap_or_default();
        let error = anyhow!("cluster {} has no policy{of}, so everything is kept", cluster.name);
        let hint =
            format!("write into [cluster.{}]: keep = {{ window = \"7d\", daily = 14, weekly = 8 }}", cluster.name);
        return Err(CliError::usage(error).hint(hint));
    }
    Ok((cluster, policies))
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.config()?;
    let (cluster, policies) = with_policies(context, &config)?;
    let places = config.repositories_of(cluster)?;
    let places: Vec<_> = places.into_iter().filter(|place| policies.contains_key(place.name.as_str())).collect();
    let several = open_all(&places).await?;
    let acts = !args.dry_run && args.explain.is_none();
    let mut document = Document { acted: acts, repositories: Vec::new(), away: several.away };
    let (mut found, mut worst) = (false, None);
    for (repository, _) in several.open {
        let Some(policy) = policies.get(repository.name()) else { continue };
        let ids = repository.clusters_named(&cluster.name_in_repository).await.map_err(open::repository_error)?;
        for id in ids {
            match one(context, &repository, &id, policy, &args).await {
                Ok((line, explained)) => {
                    found |= explained;
                    document.repositories.push(line);
                }
                // The others have policies of their own.
                Err(error) => {
                    let error = error.context(format!("expire in repository {}", repository.name()));
                    context.output.note(format!("error: {error}"));
                    worst = Some(error);
                }
            }
        }
    }
    context.output.document(&document);
    for away in &document.away {
        context.output.line(format!("Repository {} is left out: {}", away.repository, away.why));
    }
    match (worst, args.explain) {
        (Some(error), _) => Err(error),
        (None, Some(label)) if !found => {
            context.output.line(format!("There is no complete base backup {label}."));
            Ok(Exit::No)
        }
        (None, _) if !document.away.is_empty() => Ok(Exit::Failed),
        (None, _) => Ok(Exit::Done),
    }
}

async fn one(
    context: &Context,
    repository: &Repository,
    id: &ClusterId,
    policy: &Policy,
    args: &Args,
) -> Result<(Line, bool), CliError> {
    let (decision, done, recorded) = if args.dry_run || args.explain.is_some() {
        let (survey, decision) = look(repository, id, policy).await.map_err(open::repository_error)?;
        (decision, None, survey.expiries)
    } else {
        let (decision, swept) = sweep(repository, id, policy).await.map_err(open::repository_error)?;
        note(repository, id, &swept).await;
        let recorded = repository.expiries(id).await.map_err(open::repository_error)?.0;
        (decision, Some(swept), recorded)
    };
    let line = line(repository, id, decision, done, &recorded);
    let mut explained = false;
    match args.explain {
        Some(label) => {
            if let Some(backup) = line.backups.iter().find(|backup| backup.verdict.label == label) {
                explained = true;
                explain(context, &line, backup);
            }
        }
        None => show(context, &line),
    }
    Ok((line, explained))
}

fn line(
    repository: &Repository,
    id: &ClusterId,
    decision: Decision,
    done: Option<Swept>,
    recorded: &[RecordedExpiry],
) -> Line {
    let frees = decision.frees();
    let condemned = |label: BackupLabel| {
        let plans = recorded.iter().filter(|plan| !plan.going && plan.expiry.backups.contains(&label));
        plans.map(|plan| plan.put_at).min().and_then(|put_at| put_at.checked_add(GRACE).ok())
    };
    let backups = decision.backups.into_iter().map(|verdict| BackupLine {
        goes: verdict.keeps.is_empty(),
        why: verdict.keeps.iter().map(ToString::to_string).collect(),
        goes_after: condemned(verdict.label).filter(|_| verdict.keeps.is_empty()),
        verdict,
    });
    Line {
        repository: repository.name().to_owned(),
        cluster: id.to_string(),
        now: decision.now,
        window_from: decision.window_from,
        backups: backups.collect(),
        give_up: decision.give_up,
        wal: decision.wal,
        packs: decision.garbage.packs.len() as u64,
        parts: decision.garbage.parts.len() as u64,
        frees,
        leftovers: decision.leftovers,
        blocked: decision.blocked,
        before: decision.before,
        after: decision.after,
        done,
    }
}

fn explain(context: &Context, line: &Line, backup: &BackupLine) {
    let output = &context.output;
    let label = backup.verdict.label;
    if let Some(why) = &backup.verdict.unsound {
        output.line(format!("{label} keeps nothing else from going: {why}"));
    }
    match (backup.why.as_slice(), backup.goes_after) {
        ([], Some(at)) => output.line(format!(
            "{label} goes from {}: condemned, its manifest goes after {}, what only it names a day later",
            line.repository,
            time(at)
        )),
        ([], None) => output.line(format!(
            "{label} goes from {}: no rule keeps it; the next run records it, and it goes a day later",
            line.repository
        )),
        (rules, _) => {
            output.line(format!("{label} stays in {}:", line.repository));
            rules.iter().for_each(|rule| output.line(format!("  {rule}")));
        }
    }
}

fn show(context: &Context, line: &Line) {
    let output = &context.output;
    output.line(format!("Cluster {} in repository {}", line.cluster, line.repository));
    output.line(format!("  Window from   {}", time(line.window_from)));
    for backup in &line.backups {
        let what = match (backup.goes, backup.goes_after) {
            (true, Some(at)) => format!("GOES   condemned, not before {}", time(at)),
            (true, None) => "GOES   no rule keeps it".to_owned(),
            (false, _) => format!("stays  {}", backup.why.join("; ")),
        };
        let unsound = backup.verdict.unsound.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        output.line(format!("  {}  {what}{unsound}", backup.verdict.label));
    }
    for label in &line.give_up {
        output.line(format!("  {label}  GIVEN UP: it was begun, and has put nothing for days"));
    }
    for wal in &line.wal {
        let range = wal.range;
        let (objects, size) = (count(wal.objects, "object"), bytes(wal.bytes));
        output.line(format!("  WAL of {} from {} to {} GOES: {objects}, {size}", range.branch, range.from, range.to));
    }
    for left in &line.leftovers {
        let what = if left.goes { "GO" } else { "wait until they are older" };
        let (objects, size) = (count(left.objects, "object"), bytes(left.bytes));
        output.line(format!("  {objects} ({size}) of {} that no record knows {what}", left.label));
    }
    line.blocked.iter().for_each(|why| output.line(format!("  KEPT   {why}")));
    for (name, promises) in [("before", &line.before), ("after", &line.after)] {
        for promise in promises {
            let from = match (promise.from_time, promise.from, promise.to) {
                (Some(at), Some(from), Some(to)) => format!("from {} ({from}) to {to}", time(at)),
                _ => "nothing yet".to_owned(),
            };
            output.line(format!("  Every instant on {}, {name}: {from}", promise.branch));
        }
    }
    output.line(format!("  Frees {} in all", bytes(line.frees)));
    match &line.done {
        None => output.line("  Nothing was changed (--dry-run)."),
        Some(done) => {
            let (removed, size) = (count(done.objects, "object"), bytes(done.bytes));
            output.line(format!(
                "  Done: {} condemned, {} of base backups removed, {removed} removed in all ({size})",
                done.condemned.len(),
                count(done.manifests.len() as u64, "manifest"),
            ));
            for (name, why) in &done.refused {
                output.line(format!("  NOT REMOVED {name}: {why}"));
            }
            if done.refusals > done.refused.len() as u64 {
                output.line(format!("  NOT REMOVED: {} in all", count(done.refusals, "object")));
            }
        }
    }
}

/// The expiry of `pgkeep run`, of one cluster.
pub(super) struct Expiring<'a> {
    /// Where the policies are.
    pub config: &'a Config,
    /// Which.
    pub cluster: &'a ClusterConfig,
}

#[async_trait(?Send)]
impl Expirer for Expiring<'_> {
    fn cluster(&self) -> &ClusterName {
        &self.cluster.name
    }

    async fn expire(&self) -> Result<(), String> {
        let Expiring { config, cluster } = self;
        let places = config.repositories_of(cluster).map_err(|error| error.to_string())?;
        let mut failed = Vec::new();
        for place in places {
            let Some(policy) = cluster.keep.get(&place.name).map(policy) else { continue };
            // Opened for this alone: a connection of its own, which nothing else waits for.
            let all = async {
                let repository = open::repository(place).await?;
                let ids = repository.clusters_named(&cluster.name_in_repository).await;
                for id in ids.map_err(open::repository_error)? {
                    let (decision, done) = sweep(&repository, &id, &policy).await.map_err(open::repository_error)?;
                    tell(&repository, &id, &decision, &done);
                    note(&repository, &id, &done).await;
                }
                Ok::<(), CliError>(())
            };
            if let Err(error) = all.await {
                failed.push(format!("repository {}: {}", place.name, error.sentence()));
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
    }
}

/// Among the events, if anything was done.
async fn note(repository: &Repository, id: &ClusterId, done: &Swept) {
    let Swept { condemned, manifests, given_up, objects, bytes, .. } = done;
    if *objects > 0 || [condemned, manifests, given_up].into_iter().any(|labels| !labels.is_empty()) {
        let (condemned, removed, given_up) = (condemned.clone(), manifests.clone(), given_up.clone());
        let event = Happened::Expired { condemned, removed, given_up, objects: *objects, bytes: *bytes };
        repository.note_event(id, event).await;
    }
}

fn tell(repository: &Repository, id: &ClusterId, decision: &Decision, done: &Swept) {
    let (repository, condemned, manifests) = (repository.name(), done.condemned.len(), done.manifests.len());
    let (objects, bytes) = (done.objects, done.bytes);
    tracing::info!(cluster = %id, repository, condemned, manifests, objects, bytes, "expired what no policy asks for");
    for why in &decision.blocked {
        tracing::warn!(cluster = %id, repository, "less is expired than might be: {why}");
    }
    if let Some((name, why)) = done.refused.first() {
        let refusals = done.refusals;
        tracing::warn!(cluster = %id, repository, object = %name, refusals, "not removed: {why}");
    }
}
