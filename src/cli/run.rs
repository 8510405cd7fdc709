//! `pgkeep run`: the daemon. Archives the WAL of all clusters until a signal.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use futures_util::FutureExt;
use futures_util::future::join_all;

use super::care::Caring;
use super::chronicle::Chronicle;
use super::mend::Backups;
use super::reread::{on_hangup, reread};
use super::{CliError, Context, Exit, bucket, open, stop_on_signal, watching};
use crate::archive::ClusterStatus;
use crate::daemon;
use crate::daemon::care::care;
use crate::daemon::events::chronicle;
use crate::daemon::ladder::ladder;
use crate::daemon::mend::mend;
use crate::daemon::notify::Manager;

/// How long what goes on besides archiving may take to let go at the end.
const LET_GO: Duration = Duration::from_secs(20);

/// `pgkeep run`: the daemon. Archives the WAL of all clusters until a signal.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Streams until SIGTERM or SIGINT, then seals what it has and exits. Where WAL was lost or came damaged, or another history \
begins, it takes a base backup by itself, and by schedule where the configuration has one. Once a day it expires what the \
configuration's `keep` does not ask for, and verifies what is kept; it does drills where `drill` says how often. It serves \
metrics and sends alerts as the configuration says. SIGHUP reads the configuration again: schedules, `keep`, [daemon] and \
[alert.NAME] count at once, the rest is told to need a restart. It keeps no state of its own: stopped or killed at any moment, \
it goes on where the repository ends. With --cluster it serves that cluster alone.

Example:
  pgkeep run --config /etc/pgkeep/pgkeep.toml")]
pub struct Args {}

/// Runs the command.
pub async fn run(context: &Context, _args: Args) -> Result<Exit, CliError> {
    let config = context.config()?;
    let (stop, hangup, manager) = (stop_on_signal()?, on_hangup()?, Manager::from_environment());
    let (mut jobs, mut menders, mut watched) = (Vec::new(), Vec::new(), Vec::new());
    let (mut chronicles, mut carers) = (Vec::new(), Vec::new());
    let clusters = config.clusters(context.cluster_name())?;
    let _cleaning = bucket::clean_stale_uploads(bucket::repositories_of(&config, clusters.iter().copied()));
    for cluster in clusters {
        let (job, status) = (open::job(&config, cluster).await?, watch::Sender::new(ClusterStatus::default()));
        watched.push((cluster.name_in_repository.clone(), status.subscribe()));
        menders.push((Backups::new(context, &config, cluster, job.source.clone()), status.subscribe()));
        chronicles.push((Chronicle::new(&config, cluster), status.subscribe()));
        carers.push(Caring { context, config: &config, cluster, status: status.subscribe() });
        jobs.push((job, status));
    }
    let current = watch::Sender::new(Arc::clone(&config));
    let mending = menders.iter().map(|(backups, status)| mend(backups, status.clone(), stop.clone()));
    let telling = watched.iter().map(|(cluster, status)| ladder(cluster, status.clone(), stop.clone()));
    let noting = join_all(chronicles.iter().map(|(events, status)| chronicle(events, status.clone(), stop.clone())));
    let caring = carers.iter().map(|carer| care(carer, stop.clone()));
    let watching = watching::care(&menders, &current, stop.clone());
    // The end of a stream is noted when it has ended.
    let besides = async { tokio::join!(join_all(mending), join_all(telling), join_all(caring), watching, noting) };
    let mut besides = besides.boxed_local().fuse();
    let mut alive = Box::pin(async {
        tokio::join!(reread(hangup, &current), manager.keep_alive());
        std::future::pending::<()>().await;
    });
    manager.tell("READY=1");
    let mut running = Box::pin(daemon::run(jobs, stop.clone()));
    let mut is_told = false;
    let ended = loop {
        tokio::select! {
            ended = &mut running => break ended,
            _ = &mut besides, if !futures_util::future::FusedFuture::is_terminated(&besides) => {}
            () = &mut alive => {} // not reached
            () = stop.cancelled(), if !is_told => {
                manager.tell("STOPPING=1");
                is_told = true;
            }
        }
    };
    if !is_told {
        manager.tell("STOPPING=1"); // it was done before it could be said
    }
    // A base backup that is under way when nobody archives any more is given up.
    stop.cancel();
    if !futures_util::future::FusedFuture::is_terminated(&besides)
        && tokio::time::timeout(LET_GO, besides).await.is_err()
    {
        tracing::warn!("what went on besides archiving did not let go within {} s", LET_GO.as_secs());
    }
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
