//! The verification and the drills of `pgkeep run`: what a command does by hand, with results in the log.

use std::time::Duration;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::drill::{Aim, Done, Means, any_seed, last_drill, once};
use super::several::open_all;
use super::verify::costs;
use super::{CliError, Context, Global, open};
use crate::archive::ClusterStatus;
use crate::catalog::Repository;
use crate::catalog::verification::Outcome;
use crate::config::{ClusterConfig, Config};
use crate::daemon::care::{Carer, WhileIdle};
use crate::types::{ClusterId, ClusterName};
use crate::verify::{Manner, Options, Report, Wanted, verify};

/// A restart does not begin again what was done so short a time ago.
const RECENT: SignedDuration = SignedDuration::from_hours(20);
/// Findings that are told one by one.
const TOLD: usize = 10;

/// Of one cluster.
pub(super) struct Caring<'a> {
    pub context: &'a Context,
    /// Where its repositories are.
    pub config: &'a Config,
    /// Which.
    pub cluster: &'a ClusterConfig,
    /// How its stream is: it goes first.
    pub status: watch::Receiver<ClusterStatus>,
}

impl Caring<'_> {
    async fn verify_in(
        &self,
        repository: &Repository,
        id: &ClusterId,
        stop: &CancellationToken,
    ) -> Result<(), CliError> {
        let earlier = repository.newest_verification(id).await.map_err(open::repository_error)?;
        if earlier.is_some_and(|earlier| repository.now().duration_since(earlier.began_at) < RECENT) {
            return Ok(());
        }
        let within = self.cluster.verify.within.filter(|_| repository.can_read());
        let options = Options { objects: within.map(|within| Wanted { within: Some(within), budget: None }) };
        let turn = WhileIdle(self.status.clone());
        let manner = Manner { at_once: 1, rate: Some(self.cluster.verify.rate), turn: &turn, progress: &|_| {} };
        let (_, report) = verify(repository, id, options, manner, stop).await.map_err(open::repository_error)?;
        tell(repository, id, &report, within);
        Ok(())
    }
}

#[async_trait(?Send)]
impl Carer for Caring<'_> {
    fn cluster(&self) -> &ClusterName {
        &self.cluster.name
    }

    async fn verify(&self, stop: &CancellationToken) -> Result<(), String> {
        let places = self.config.repositories_of(self.cluster).map_err(|error| error.to_string())?;
        let mut failed = Vec::new();
        for place in places {
            // Opened for this alone: a connection of its own, which nothing else waits for.
            let all = async {
                let repository = open::repository(place).await?;
                let ids = repository.clusters_named(&self.cluster.name_in_repository).await;
                for id in ids.map_err(open::repository_error)? {
                    self.verify_in(&repository, &id, stop).await?;
                }
                Ok::<(), CliError>(())
            };
            if let Err(error) = all.await {
                failed.push(format!("repository {}: {}", place.name, error.sentence()));
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
    }

    async fn drill_due(&self) -> Result<Option<Duration>, String> {
        let Some(every) = self.cluster.drill.as_ref().and_then(|drill| drill.every) else { return Ok(None) };
        let asked = async {
            let several = open_all(&self.config.repositories_of(self.cluster)?).await?;
            let open: Vec<Repository> = several.open.into_iter().map(|(repository, _)| repository).collect();
            last_drill(&open, &self.cluster.name_in_repository).await
        };
        let last = asked.await.map_err(|error: CliError| error.sentence())?;
        let passed = last.map(|last| Timestamp::now().duration_since(last));
        let left = passed.map_or(SignedDuration::ZERO, |passed| every.saturating_sub(passed));
        Ok(Some(left.try_into().unwrap_or(Duration::ZERO)))
    }

    async fn drill(&self, stop: &CancellationToken) -> Result<(), String> {
        let Some(means) = self.cluster.drill.as_ref().map(Means::of) else { return Ok(()) };
        let name = self.cluster.name.as_str();
        // Nobody reads the standard output of a daemon. The file is read as it is now: the drill's restore_command does so, too.
        let context = Context::new(Global { json: true, quiet: true, ..self.context.global.clone() });
        match once(&context, Some(name), Aim::Random(any_seed()), means, stop).await {
            Ok(Ok(done)) => {
                told(&done);
                Ok(())
            }
            Ok(Err((_, no))) => Err(no.to_string()),
            Err(error) => Err(error.sentence()),
        }
    }
}

fn tell(repository: &Repository, id: &ClusterId, report: &Report, within: Option<SignedDuration>) {
    let (repository, objects, read, bytes) =
        (repository.name(), report.objects, report.read_objects, report.read_bytes);
    let unread = report.unread_objects;
    let whole_since = report.whole_since.map(|since| since.to_string()).unwrap_or_default();
    tracing::info!(cluster = %id, repository, objects, read, bytes, unread, whole_since, "verified what is kept");
    for finding in report.findings.iter().take(TOLD) {
        let costs = costs(finding).join("; ");
        tracing::error!(cluster = %id, repository, object = %finding.object, "DAMAGE: {}; {costs}", finding.why);
    }
    let more = report.findings.len().saturating_sub(TOLD) as u64 + report.more_findings;
    if more > 0 {
        tracing::error!(cluster = %id, repository, "DAMAGE: {more} more; `pgkeep verify` lists them");
    }
    if let Some(why) = &report.unfinished {
        tracing::warn!(cluster = %id, repository, "less was read than was to be: {why}");
    }
    report.remarks.iter().for_each(|remark| tracing::warn!(cluster = %id, repository, "{remark}"));
    let late = |since: Timestamp| within.is_some_and(|within| Timestamp::now().duration_since(since) > within);
    if report.whole_since.is_some_and(late) {
        tracing::warn!(cluster = %id, repository, whole_since, "verify_within is not kept: verify_rate is too low for what is there");
    }
}

fn told(done: &Done) {
    let Done { repository, cluster, drill, not_recorded } = done;
    let (target, seed) = (&drill.target, drill.seed.unwrap_or_default());
    match drill.failure() {
        None if drill.verdict == Outcome::Passed => {
            tracing::info!(%cluster, %repository, %target, seed, "the drill passed");
        }
        failure => {
            let why = failure.map(|check| format!("{}: {}", check.check, check.found)).unwrap_or_default();
            tracing::error!(%cluster, %repository, %target, seed, "the drill FAILED: {why}");
        }
    }
    if let Some(why) = not_recorded {
        tracing::warn!(%cluster, %repository, "the result of the drill is not recorded: {why}");
    }
}
