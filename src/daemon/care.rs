//! What `pgkeep run` does in the background to know that what is kept is whole: verification once a day, drills when they are due.
//!
//! Streaming goes first: an object is read only when little waits to be stored ([`WhileIdle`]), one at a time, at the rate that the
//! configuration allows. Nothing is remembered here: results are in the repository, and a restart goes on by them.
//! Crash and cancellation: as of a verification or a drill; `stop` ends both.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::archive::ClusterStatus;
use crate::retention::due::{Last, wait};
use crate::types::ClusterName;
use crate::verify::Turn;

/// Bytes of WAL that may wait to be stored while something is read.
const BACKLOG: u64 = 16 << 20;
/// How long the oldest of them may have waited.
const BEHIND: Duration = Duration::from_secs(2);
/// From one look at the stream to the next.
const LOOK: Duration = Duration::from_millis(200);
/// One object is held up so long at most: a stream that is always behind must not keep damage from being found.
const PATIENCE: Duration = Duration::from_secs(30);
/// A drill that is not due is asked for so often.
const ASK_EVERY: Duration = Duration::from_secs(3600);

/// Lets reading wait while the stream needs the way.
#[derive(Debug, Clone)]
pub struct WhileIdle(pub watch::Receiver<ClusterStatus>);

impl WhileIdle {
    fn is_busy(&self) -> bool {
        match &*self.0.borrow() {
            ClusterStatus::Streaming(progress) => {
                let waits = progress.received.bytes_since(progress.durable).unwrap_or(0);
                waits > BACKLOG || progress.behind > BEHIND
            }
            ClusterStatus::Connecting | ClusterStatus::Waiting { .. } => false,
        }
    }
}

#[async_trait]
impl Turn for WhileIdle {
    async fn wait(&self) {
        let until = Instant::now() + PATIENCE;
        while self.is_busy() && Instant::now() < until {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Verifies and drills a cluster.
#[async_trait(?Send)]
pub trait Carer {
    /// The cluster, for the log.
    fn cluster(&self) -> &ClusterName;

    /// One verification of each repository; why not, in words. What was found is told by it.
    async fn verify(&self, stop: &CancellationToken) -> Result<(), String>;

    /// How long it is until the next drill; `None`: there are none.
    async fn drill_due(&self) -> Result<Option<Duration>, String>;

    /// One drill; why it was not done, in words. How it went is told by it.
    async fn drill(&self, stop: &CancellationToken) -> Result<(), String>;
}

/// Until `stop`.
pub async fn care(carer: &dyn Carer, stop: CancellationToken) {
    // Differs from process to process, and that is all it has to.
    let share = u8::try_from(std::process::id() % 256).unwrap_or(0);
    let cluster = carer.cluster();
    let verifying = async {
        let mut last = Last::None;
        loop {
            pause(wait(last, share), &stop).await;
            if stop.is_cancelled() {
                return;
            }
            last = match carer.verify(&stop).await {
                Ok(()) => Last::Done,
                Err(why) => {
                    tracing::error!(%cluster, "verification did not come to its end: {why}");
                    Last::Failed
                }
            };
        }
    };
    let drilling = async {
        let mut next = wait(Last::None, share);
        loop {
            pause(next, &stop).await;
            if stop.is_cancelled() {
                return;
            }
            next = match carer.drill_due().await {
                Ok(None) => return,
                Ok(Some(due)) if !due.is_zero() => due.min(ASK_EVERY),
                Ok(Some(_)) => match carer.drill(&stop).await {
                    Ok(()) => ASK_EVERY,
                    Err(why) => {
                        tracing::error!(%cluster, "the drill was not done: {why}");
                        wait(Last::Failed, share)
                    }
                },
                Err(why) => {
                    tracing::warn!(%cluster, "it is not known when the next drill is due: {why}");
                    ASK_EVERY
                }
            };
        }
    };
    futures_util::future::join(verifying, drilling).await;
}

async fn pause(time: Duration, stop: &CancellationToken) {
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = tokio::time::sleep(time) => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    struct Counted {
        name: ClusterName,
        verified: AtomicU32,
        drilled: AtomicU32,
        last_drill: std::sync::Mutex<Option<Instant>>,
    }

    #[async_trait(?Send)]
    impl Carer for Counted {
        fn cluster(&self) -> &ClusterName {
            &self.name
        }

        async fn verify(&self, _stop: &CancellationToken) -> Result<(), String> {
            match self.verified.fetch_add(1, Ordering::Relaxed) {
                0 => Err("the first one fails".to_owned()),
                _ => Ok(()),
            }
        }

        async fn drill_due(&self) -> Result<Option<Duration>, String> {
            let week = Duration::from_secs(7 * 24 * 3600);
            Ok(Some(self.last_drill.lock().unwrap().map_or(Duration::ZERO, |at| week.saturating_sub(at.elapsed()))))
        }

        async fn drill(&self, _stop: &CancellationToken) -> Result<(), String> {
            self.drilled.fetch_add(1, Ordering::Relaxed);
            *self.last_drill.lock().unwrap() = Some(Instant::now());
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn verified_daily_and_drilled_when_due() {
        let (verified, drilled) = (AtomicU32::new(0), AtomicU32::new(0));
        let carer = Counted { name: "main".parse().unwrap(), verified, drilled, last_drill: Default::default() };
        let stop = CancellationToken::new();
        let days = async {
            tokio::time::sleep(Duration::from_secs(3 * 3600)).await;
            assert_eq!(carer.verified.load(Ordering::Relaxed), 2, "a failed one is made up for");
            assert_eq!(carer.drilled.load(Ordering::Relaxed), 1);
            tokio::time::sleep(Duration::from_secs(15 * 24 * 3600)).await;
            assert!((16..=17).contains(&carer.verified.load(Ordering::Relaxed)));
            assert_eq!(carer.drilled.load(Ordering::Relaxed), 3);
            stop.cancel();
        };
        futures_util::future::join(care(&carer, stop.clone()), days).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_object_waits_for_the_stream_but_not_for_ever() {
        let (status, seen) = watch::channel(ClusterStatus::Connecting);
        let turn = WhileIdle(seen);
        let begun = Instant::now();
        turn.wait().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        drop(status);
        turn.wait().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
