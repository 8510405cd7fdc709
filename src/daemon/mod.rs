//! `pgkeep run`: archives all configured clusters until a signal.
//!
//! Invariant: each cluster has one task of its own with a name; one that ends does not end the others. What ended a task
//! is told when it happens and again at the end.
//! Stop: every task makes what it received durable and reports it (`shutdown_deadline`), and is awaited.

pub mod alert;
pub mod care;
pub mod events;
pub mod expire;
pub mod health;
pub mod http;
pub mod ladder;
pub mod mend;
pub mod notify;
pub mod schedule;

use std::collections::HashMap;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::archive::{ArchiveError, ArchiveOptions, ClusterStatus, Receivers, Source, archive};
use crate::types::ClusterName;

/// A cluster to archive.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its name in the repositories.
    pub cluster: ClusterName,
    /// Where its WAL comes from.
    pub source: Source,
    /// Where it goes, and how many of them must hold what is acknowledged.
    pub receivers: Receivers,
    /// How.
    pub options: ArchiveOptions,
}

/// How the archiving of a cluster ended.
#[derive(Debug)]
pub struct Ended {
    /// Which.
    pub cluster: ClusterName,
    /// `Ok` after a stop.
    pub result: Result<(), ArchiveError>,
}

/// Runs all jobs until `stop`, or until none is left that could go on. Watchers see each cluster's status.
pub async fn run(jobs: Vec<(Job, watch::Sender<ClusterStatus>)>, stop: CancellationToken) -> Vec<Ended> {
    let mut tasks = JoinSet::new();
    let mut names = HashMap::new();
    for (job, status) in jobs {
        let (stop, name) = (stop.clone(), job.cluster.clone());
        let task = tasks.spawn(async move {
            let Job { cluster, source, receivers, options } = job;
            let result = archive(&source, &receivers, &cluster, &options, &status, stop).await;
            match &result {
                Ok(()) => tracing::info!(%cluster, "archiving stopped"),
                Err(error) => tracing::error!(%cluster, "archiving ended: {error}"),
            }
            Ended { cluster, result }
        });
        names.insert(task.id(), name);
    }
    let mut ended = Vec::new();
    while let Some(task) = tasks.join_next().await {
        match task {
            Ok(end) => ended.push(end),
            // A panic is a bug of ours; the cluster is not archived any more, and the exit code has to say so.
            Err(error) => {
                let cluster = names.get(&error.id()).cloned();
                tracing::error!(?cluster, "an archiver task ended abnormally: {error}");
                ended.extend(cluster.map(|cluster| Ended { cluster, result: Err(ArchiveError::task(error)) }));
            }
        }
    }
    ended
}
