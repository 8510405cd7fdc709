//! Archives one cluster until it is told to stop: connects, finds where to go on, streams, and does so again after
//! whatever ended the stream.
//!
//! Invariant: each attempt asks the server who it is and the repositories where their bytes end; nothing is carried over in
//! memory from one to the next. A change of timeline, a restart of the server, a cut connection and our own restart are
//! therefore one and the same path.
//! Crash and cancellation: as in [`super::stream`].

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::ArchiveError;
use super::attempt::{ArchiveOptions, attempt};
use super::receivers::Receivers;
use super::source::Source;
use super::status::ClusterStatus;
use super::stream::StreamEnd;
use crate::pg::ServerErrorKind;
use crate::types::ClusterName;

/// The pause before another attempt, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// An attempt that lasted longer has found out who the server is.
const STEADY: Duration = Duration::from_secs(60);
/// When one repository has answered, how long the others get: usually, and where only one of them can have what is needed.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// Archives `cluster` into its repositories until `stop`, or until an error that no further attempt mends.
pub async fn archive(
    source: &Source,
    receivers: &Receivers,
    cluster: &ClusterName,
    options: &ArchiveOptions,
    status: &watch::Sender<ClusterStatus>,
    stop: CancellationToken,
) -> Result<(), ArchiveError> {
    let mut pause = PAUSE.0;
    let mut told = String::new();
    let mut has_streamed = false;
    let mut patience = PATIENCE.0;
    let mut compare_all = false;
    loop {
        let before = tokio::time::Instant::now();
        let attempt = attempt(source, receivers, cluster, options, patience, compare_all, status, stop.clone());
        let ended = tokio::select! {
            biased;
            ended = attempt => ended,
            // An attempt that streams ends by itself; one that still connects has nothing to lose.
            () = stopped_while_connecting(&stop, status) => return Ok(()),
        };
        let elsewhere = matches!(ended, Err(ArchiveError::HeldElsewhere { .. }));
        patience = if elsewhere { PATIENCE.1 } else { PATIENCE.0 };
        let compared_all = std::mem::take(&mut compare_all) && before.elapsed() < STEADY;
        has_streamed |= matches!(*status.borrow(), ClusterStatus::Streaming(_));
        let mut is_usual = false;
        let reason = match ended {
            Ok(StreamEnd::Stopped) => return Ok(()),
            Ok(StreamEnd::TimelineEnded(end)) => {
                tracing::info!(%cluster, timeline = %end.next, fork = %end.begins_at, "the server went on to a new timeline");
                tokio::time::sleep(if before.elapsed() < PAUSE.0 { PAUSE.0 } else { Duration::ZERO }).await;
                continue;
            }
            Ok(StreamEnd::ServerStopped) => "the server has shut down".to_owned(),
            // Another pgkeep streams from the slot (a hot spare, or `pgkeep backup` beside `pgkeep run`), or the server has
            // not noticed yet that our last connection is gone.
            Err(ArchiveError::Server(error)) if error.server_kind() == Some(ServerErrorKind::SlotActive) => {
                is_usual = true;
                error.to_string()
            }
            // Not the history that it was taken for: perhaps it is another one that is archived, or a new one.
            Err(error) if error.asks_who_it_is() && !compared_all && !stop.is_cancelled() => {
                tracing::debug!(%cluster, "{error}; comparing everything with the server");
                receivers.each().iter().for_each(|member| member.refuse(None));
                compare_all = true;
                continue;
            }
            // A stop that failed has failed, even where another attempt would have helped.
            Err(error) if stop.is_cancelled() => return Err(error),
            // What worked once is tried again whatever it says: passwords are changed, file systems come back. But never
            // against an archive that holds another history.
            Err(error) if !error.protects_data() && (has_streamed || error.is_retryable()) => error.to_string(),
            Err(error) => return Err(error),
        };
        if before.elapsed() > PAUSE.1 {
            (pause, told) = (PAUSE.0, String::new());
        }
        if told != reason {
            if is_usual {
                tracing::info!(%cluster, "{reason}; waiting until the slot is free");
            } else {
                tracing::warn!(%cluster, "{reason}; trying again until it works");
            }
            told.clone_from(&reason);
        }
        status.send_replace(ClusterStatus::Waiting { reason });
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

async fn stopped_while_connecting(stop: &CancellationToken, status: &watch::Sender<ClusterStatus>) {
    stop.cancelled().await;
    let mut status = status.subscribe();
    // invariant: `status` outlives this future, so waiting cannot fail
    let _ = status.wait_for(|status| !matches!(status, ClusterStatus::Streaming(_))).await;
}
