//! A base backup where one is needed and nobody asked: behind a gap, and for a history that began.
//!
//! What the repositories hold says whether ([`crate::plan::needs_backup`]), so nothing is remembered: a restart asks again, and
//! one that is there is not taken twice. Once for each stream that begins, and not more often than [`AT_MOST`].
//! A cluster without any base backup gets none: its owner has not begun to use it.
//!
//! Streaming does not wait for any of this, and is not disturbed: it is another task, with a connection of its own.
//! Crash and cancellation: as of a base backup; `stop` ends it.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::archive::ClusterStatus;
use crate::plan::Need;
use crate::types::{Branch, ClusterName};

/// How long after one look the next one is, at least. A look costs a listing of the cluster's WAL.
const AT_MOST: Duration = Duration::from_secs(60);
/// When too little was there to say.
const SOON: Duration = Duration::from_secs(1);
/// The pause after a base backup that failed, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3600));

/// Looks at a cluster's repositories and takes its base backups.
#[async_trait(?Send)]
pub trait Mender {
    /// The cluster, for the log.
    fn cluster(&self) -> &ClusterName;

    /// Whether this history can be restored up to now, in every repository that answers; else why not, in words.
    async fn look(&self, branch: Branch) -> Result<Need, String>;

    /// Takes a base backup; its name.
    async fn take(&self, stop: CancellationToken) -> Result<String, String>;
}

/// Until `stop`, or until nobody archives any more.
pub async fn mend(mender: &dyn Mender, mut status: watch::Receiver<ClusterStatus>, stop: CancellationToken) {
    let work = async {
        let mut pause = PAUSE.0;
        while let Some(stream) = next_stream(&mut status, None).await {
            let looked = Instant::now();
            if !look_and_take(mender, stream.0, &stop).await {
                tracing::info!(cluster = %mender.cluster(), "another try in {} s", pause.as_secs());
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE.1);
                continue; // asks anew whether it is needed
            }
            pause = PAUSE.0;
            if next_stream(&mut status, Some(stream)).await.is_none() {
                return;
            }
            tokio::time::sleep_until(looked + AT_MOST).await;
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = work => {}
    }
}

/// A stream, by its branch and its beginning; another one than `last`. `None` where there will be none.
async fn next_stream(
    status: &mut watch::Receiver<ClusterStatus>,
    last: Option<(Branch, std::time::Instant)>,
) -> Option<(Branch, std::time::Instant)> {
    let stream = |status: &ClusterStatus| match status {
        ClusterStatus::Streaming(progress) => Some((progress.branch, progress.since)),
        ClusterStatus::Connecting | ClusterStatus::Waiting { .. } => None,
    };
    let found = status.wait_for(|status| stream(status).is_some_and(|found| last != Some(found))).await;
    found.ok().and_then(|status| stream(&status))
}

/// Whether all is well now.
async fn look_and_take(mender: &dyn Mender, branch: Branch, stop: &CancellationToken) -> bool {
    let cluster = mender.cluster();
    let deadline = Instant::now() + AT_MOST;
    let why = loop {
        match mender.look(branch).await {
            Ok(Need::Nothing) => return true,
            Ok(Need::NotYet) if Instant::now() > deadline => return false,
            Ok(Need::NotYet) => tokio::time::sleep(SOON).await,
            Ok(Need::Gap(hole)) => break format!("{hole}, and no base backup behind it"),
            Ok(Need::Branch(branch)) => break format!("there is none of branch {branch}, which is archived now"),
            Err(why) => {
                tracing::warn!(%cluster, "cannot tell whether a base backup is needed: {why}");
                return false;
            }
        }
    };
    tracing::warn!(%cluster, "a base backup is needed and is taken now: {why}");
    match mender.take(stop.clone()).await {
        Ok(label) => {
            tracing::warn!(%cluster, "base backup {label} was taken because one was needed: {why}");
            true
        }
        Err(error) => {
            tracing::error!(%cluster, "a base backup is needed and could not be taken: {error}");
            false
        }
    }
}
