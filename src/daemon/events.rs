//! What the archiver of a cluster goes through, as events: a stream begins, ends, brings gaps and conflicts.
//!
//! Bounded: a stream that ends and begins again and again is noted once a minute at most, and then as it stands. Streaming does
//! not wait for any of this: it is another task, with repositories of its own.
//! Crash: what was not noted is not made up for; the next run notes that its own stream began.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::archive::{ClusterStatus, Progress};
use crate::types::{Branch, Lsn};

/// From one event to the next, at least.
const AT_MOST: Duration = Duration::from_secs(60);
/// What a stream brought besides WAL is looked for soon after it began, and then at this distance.
const LOOK: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(3600));

/// How long a stopping archiver is watched, and how long its end may take to be noted.
const CLOSES: Duration = Duration::from_secs(60);
const LAST: Duration = Duration::from_secs(3);

/// Notes what happened, in each of a cluster's repositories that answers.
#[async_trait(?Send)]
pub trait Chronicler {
    /// A stream of this history began at a position.
    async fn began(&self, branch: Branch, at: Lsn);

    /// It ended: how far it was durable, and why.
    async fn ended(&self, branch: Branch, durable: Lsn, reason: &str);

    /// Whether gaps or conflicts came up since this was asked last.
    async fn look(&self);
}

/// The stream that is noted as begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    branch: Branch,
    since: Instant,
    durable: Lsn,
    noted: u64,
}

impl Seen {
    fn of(status: &ClusterStatus) -> Option<Seen> {
        match status {
            ClusterStatus::Streaming(Progress { branch, since, durable, noted, .. }) => {
                Some(Seen { branch: *branch, since: *since, durable: *durable, noted: *noted })
            }
            ClusterStatus::Connecting | ClusterStatus::Waiting { .. } => None,
        }
    }

    fn is_same_stream(&self, other: &Seen) -> bool {
        (self.branch, self.since) == (other.branch, other.since)
    }
}

/// Until `stop`, or until nobody archives any more.
pub async fn chronicle(
    chronicler: &dyn Chronicler,
    mut status: watch::Receiver<ClusterStatus>,
    stop: CancellationToken,
) {
    let mut current: Option<Seen> = None;
    let work = async {
        loop {
            let Ok(began) = status.wait_for(|status| Seen::of(status).is_some()).await.map(|status| Seen::of(&status))
            else {
                return;
            };
            let Some(began) = began else { continue }; // invariant: that is what was waited for
            current = Some(began);
            chronicler.began(began.branch, began.durable).await;
            let pause = Instant::now() + AT_MOST;
            let mut next_look = Instant::now() + LOOK.0;
            // Until this stream is over.
            let reason = loop {
                tokio::select! {
                    changed = status.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep_until(next_look) => {
                        chronicler.look().await;
                        next_look = Instant::now() + LOOK.1;
                    }
                }
                match &*status.borrow_and_update() {
                    ClusterStatus::Waiting { reason } => break reason.clone(),
                    status => match Seen::of(status) {
                        Some(seen) if seen.is_same_stream(&began) => {
                            if current.is_some_and(|current| seen.noted > current.noted) {
                                next_look = next_look.min(Instant::now() + LOOK.0);
                            }
                            current = Some(seen);
                        }
                        Some(_) => break "another stream began".to_owned(),
                        None => {} // connecting anew; what comes next says why
                    },
                }
            };
            if let Some(last) = current.take() {
                chronicler.ended(last.branch, last.durable, &reason).await;
            }
            chronicler.look().await;
            tokio::time::sleep_until(pause).await;
        }
    };
    let stopped = tokio::select! {
        biased;
        () = stop.cancelled() => true,
        () = work => false,
    };
    let Some(mut last) = current else { return };
    // The archiver makes durable what it has, and then nobody says anything any more.
    let until_closed = async {
        while status.changed().await.is_ok() {
            if let Some(seen) = Seen::of(&status.borrow_and_update()).filter(|seen| seen.is_same_stream(&last)) {
                last = seen;
            }
        }
    };
    let _ = tokio::time::timeout(CLOSES, until_closed).await; // what is known is told all the same
    let reason = if stopped { "pgkeep was stopped" } else { "archiving ended" };
    let told = chronicler.ended(last.branch, last.durable, reason);
    if tokio::time::timeout(LAST, told).await.is_err() {
        tracing::warn!(branch = %last.branch, "the end of the stream was not noted among the events in time");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::types::{PgTimestamp, TimelineId};

    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);

    #[async_trait(?Send)]
    impl Chronicler for Heard {
        async fn began(&self, branch: Branch, at: Lsn) {
            self.0.lock().unwrap().push(format!("{branch} began at {at}"));
        }

        async fn ended(&self, branch: Branch, durable: Lsn, reason: &str) {
            self.0.lock().unwrap().push(format!("{branch} ended at {durable}: {reason}"));
        }

        async fn look(&self) {}
    }

    fn streaming(since: Instant, durable: u64) -> ClusterStatus {
        ClusterStatus::Streaming(Progress {
            branch: Branch::first(TimelineId::FIRST),
            since,
            received: Lsn::new(durable),
            durable: Lsn::new(durable),
            durable_in_one: Lsn::new(durable),
            needed: 1,
            behind: Duration::ZERO,
            latency: None,
            server_end: Lsn::new(durable),
            server_time: PgTimestamp::new(0),
            damage: None,
            noted: 0,
            repositories: Vec::new(),
        })
    }

    /// Begin, end, stop are told; a stream that flaps is told once a minute.
    #[tokio::test(start_paused = true)]
    async fn streams_are_told_and_flapping_is_bounded() {
        let (heard, status, stop) =
            (Heard::default(), watch::Sender::new(ClusterStatus::Connecting), CancellationToken::new());
        let second = Duration::from_secs(1);
        let play = async {
            tokio::time::sleep(second).await;
            status.send_replace(streaming(Instant::now(), 16));
            tokio::time::sleep(second).await;
            status.send_modify(|status| {
                if let ClusterStatus::Streaming(progress) = status {
                    progress.durable = Lsn::new(32);
                }
            });
            tokio::time::sleep(second).await;
            for _ in 0..300 {
                status.send_replace(ClusterStatus::Waiting { reason: "cut".to_owned() });
                tokio::time::sleep(second / 2).await;
                status.send_replace(streaming(Instant::now(), 64));
                tokio::time::sleep(second / 2).await;
            }
            tokio::time::sleep(second * 120).await;
            stop.cancel();
        };
        tokio::join!(chronicle(&heard, status.subscribe(), stop.clone()), play);
        let heard = heard.0.into_inner().unwrap();
        assert_eq!(heard[0], "00000001 began at 0/10", "{heard:?}");
        assert_eq!(heard[1], "00000001 ended at 0/20: cut", "{heard:?}");
        assert!((8..=16).contains(&heard.len()), "{heard:?}");
        assert_eq!(heard.last().unwrap(), "00000001 ended at 0/40: pgkeep was stopped", "{heard:?}");
    }
}
