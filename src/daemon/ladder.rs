//! The durability ladder in the log: what has come in, what one repository holds, what as many hold as are needed, how far
//! that is behind, and how long it lately took.
//!
//! Bounded: a line for each cluster soon after a stream begins and once a minute after that; a cluster at rest gets none.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::archive::{ClusterStatus, Progress};
use crate::types::{ClusterName, Lsn};

/// The first line comes so long after a stream began.
const SOON: Duration = Duration::from_secs(10);
/// The next ones follow at this distance.
const EVERY: Duration = Duration::from_secs(60);

/// Until `stop`, or until nobody archives any more.
pub async fn ladder(cluster: &ClusterName, status: watch::Receiver<ClusterStatus>, stop: CancellationToken) {
    let work = told(status, |progress| {
        let received = progress.received;
        let behind = received.bytes_since(progress.durable).unwrap_or(0);
        let ms = |duration: Duration| (duration.as_secs_f64() * 1e4).round() / 10.0;
        let (p50, p99) = progress.latency.map(|latency| (ms(latency.p50), ms(latency.p99))).unzip();
        let shown = |ms: Option<f64>| ms.map_or_else(|| "-".to_owned(), |ms| ms.to_string());
        tracing::info!(
            %cluster, branch = %progress.branch, %received, durable_in_one = %progress.durable_in_one,
            durable = %progress.durable, needed = progress.needed, behind_bytes = behind,
            behind_seconds = progress.behind.as_secs(), p50_ms = shown(p50), p99_ms = shown(p99),
            "archived; p50 and p99 are from arrival to durable, of the last minute or two"
        );
    });
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

/// Calls `tell` when there is something to tell.
async fn told(mut status: watch::Receiver<ClusterStatus>, mut tell: impl FnMut(&Progress)) {
    let mut last: Option<(Lsn, Lsn)> = None;
    let mut next = None;
    loop {
        if status.wait_for(|status| matches!(status, ClusterStatus::Streaming(_))).await.is_err() {
            return;
        }
        let at = *next.get_or_insert_with(|| Instant::now() + SOON);
        tokio::time::sleep_until(at).await;
        next = Some(Instant::now() + EVERY);
        if let ClusterStatus::Streaming(progress) = &*status.borrow_and_update() {
            let seen = (progress.received, progress.durable);
            // What waits is told again: its age has grown.
            if last != Some(seen) || progress.durable < progress.received {
                tell(progress);
                last = Some(seen);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Branch, PgTimestamp, TimelineId};

    fn streaming(received: u64, durable: u64) -> ClusterStatus {
        ClusterStatus::Streaming(Progress {
            branch: Branch::first(TimelineId::FIRST),
            since: tokio::time::Instant::now(),
            received: Lsn::new(received),
            durable: Lsn::new(durable),
            durable_in_one: Lsn::new(durable),
            needed: 1,
            behind: Duration::ZERO,
            latency: None,
            server_end: Lsn::new(received),
            server_time: PgTimestamp::new(0),
            damage: None,
            noted: 0,
            repositories: Vec::new(),
        })
    }

    /// Once soon, then once a minute while something happens or waits, never at rest.
    #[tokio::test(start_paused = true)]
    async fn the_ladder_is_told_once_a_minute_while_something_happens() {
        let status = watch::Sender::new(ClusterStatus::Connecting);
        let (mut lines, begin) = (Vec::new(), Instant::now());
        let work =
            told(status.subscribe(), |progress| lines.push((begin.elapsed().as_secs(), progress.received.get())));
        let play = async {
            let minute = Duration::from_secs(60);
            tokio::time::sleep(minute).await;
            status.send_replace(streaming(5, 5));
            tokio::time::sleep(minute * 10).await; // at rest
            for number in 0..300 {
                status.send_replace(streaming(6 + number, 5));
                tokio::time::sleep(minute / 60).await;
            }
            tokio::time::sleep(minute * 3).await; // it waits
            status.send_replace(ClusterStatus::Connecting);
            tokio::time::sleep(minute * 60).await;
            drop(status);
        };
        tokio::join!(work, play);
        let times: Vec<u64> = lines.iter().map(|line| line.0).collect();
        assert_eq!(times.first(), Some(&70), "{lines:?}");
        assert!((8..=10).contains(&times.len()), "{lines:?}");
        assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= 60), "{lines:?}");
    }
}
