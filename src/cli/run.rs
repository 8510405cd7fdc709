//! `pgkeep run`: the daemon. Archives the WAL of all clusters until a signal.

use tokio::sync::watch;

use futures_util::FutureExt;
use futures_util::future::join_all;

use super::care::Caring;
use super::chronicle::Chronicle;
use super::expire::Expiring;
use super::mend::Backups;
use super::{CliError, Context, Exit, bucket, open, stop_on_signal};
use crate::archive::ClusterStatus;
use crate::daemon;
use crate::daemon::care::care;
use crate::daemon::events::chronicle;
use crate::daemon::expire::expire_daily;
use crate::daemon::ladder::ladder;
use crate::daemon::mend::mend;

/// `pgkeep run`: the daemon. Archives the WAL of all clusters until a signal.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Streams until SIGTERM or SIGINT, then seals what it has and exits. Where WAL was lost or came damaged, or another history \
begins, it takes a base backup by itself. Once a day it expires what the configuration's `keep` does not ask for, and verifies what is kept; it does drills where `drill` says how often. It keeps no state of its own: stopped or killed at \
any moment, it goes on where the repository ends. With --cluster it serves that cluster alone.

Example:
  pgkeep run --config /etc/pgkeep/pgkeep.toml")]
pub struct Args {}

/// Runs the command.
pub async fn run(context: &Context, _args: Args) -> Result<Exit, CliError> {
    let config = context.config()?;
    let stop = stop_on_signal()?;
    let (mut jobs, mut menders, mut watched, mut expirers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut chronicles = Vec::new();
    let mut carers = Vec::new();
    let clusters = config.clusters(context.cluster_name())?;
    let _cleaning = bucket::clean_stale_uploads(bucket::repositories_of(&config, clusters.iter().copied()));
    for cluster in clusters {
        let (job, status) = (open::job(&config, cluster).await?, watch::Sender::new(ClusterStatus::default()));
        watched.push((cluster.name_in_repository.clone(), status.subscribe()));
        menders.push((Backups::new(context, &config, cluster, job.source.clone()), status.subscribe()));
        chronicles.push((Chronicle::new(&config, cluster), status.subscribe()));
        expirers.extend((!cluster.keep.is_empty()).then(|| Expiring { config: &config, cluster }));
        carers.push(Caring { context, config: &config, cluster, status: status.subscribe() });
        jobs.push((job, status));
    }
    let mending = menders.iter().map(|(backups, status)| mend(backups, status.clone(), stop.clone()));
    let telling = watched.iter().map(|(cluster, status)| ladder(cluster, status.clone(), stop.clone()));
    let noting = join_all(chronicles.iter().map(|(events, status)| chronicle(events, status.clone(), stop.clone())));
    let expiring = expirers.iter().map(|expirer| expire_daily(expirer, stop.clone()));
    let caring = carers.iter().map(|carer| care(carer, stop.clone()));
    let mending = async {
        tokio::join!(join_all(mending), join_all(telling), join_all(expiring), join_all(caring));
        std::future::pending::<()>().await;
    };
    let archiving = async {
        tokio::select! {
            ended = daemon::run(jobs, stop.clone()) => ended,
            // A base backup that is under way when nobody archives any more is given up.
            () = mending.boxed_local() => Vec::new(), // not reached
        }
    };
    // The end of a stream is noted when it has ended.
    let (ended, _) = tokio::join!(archiving, noting);
    let mut worst = None;
    for ended in ended {
        if let Err(error) = ended.result {
            let error = open::archive_error(error).context(format!("archive cluster {}", ended.cluster));
            let is_worse = worst.as_ref().is_none_or(|worst: &CliError| error.exit().code() > worst.exit().code());
            if is_worse {
                worst = Some(error);
            }
        }
    }
    worst.map_or(Ok(Exit::Done), Err)
}
