//! Expiry, once a day, of clusters that have a policy.
//!
//! When is said by [`crate::retention::due`]; nothing is remembered, so a restart begins to count anew: expiry is recorded in
//! the repository and goes on from there. Streaming does not wait for it.
//! Crash and cancellation: as of a run of expiry; `stop` ends it.

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::retention::due::{Last, wait};
use crate::types::ClusterName;

/// Expires in all repositories of a cluster.
#[async_trait(?Send)]
pub trait Expirer {
    /// The cluster, for the log.
    fn cluster(&self) -> &ClusterName;

    /// One run; why not, in words.
    async fn expire(&self) -> Result<(), String>;
}

/// Until `stop`.
pub async fn expire_daily(expirer: &dyn Expirer, stop: CancellationToken) {
    // Differs from process to process, and that is all it has to.
    let share = u8::try_from(std::process::id() % 256).unwrap_or(0);
    let work = async {
        let mut last = Last::None;
        loop {
            tokio::time::sleep(wait(last, share)).await;
            last = match expirer.expire().await {
                Ok(()) => Last::Done,
                Err(why) => {
                    tracing::error!(cluster = %expirer.cluster(), "expiry did not come to its end: {why}");
                    Last::Failed
                }
            };
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = work => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    struct Counted {
        name: ClusterName,
        runs: AtomicU32,
    }

    #[async_trait(?Send)]
    impl Expirer for Counted {
        fn cluster(&self) -> &ClusterName {
            &self.name
        }

        async fn expire(&self) -> Result<(), String> {
            match self.runs.fetch_add(1, Ordering::Relaxed) {
                0 => Err("the first one fails".to_owned()),
                _ => Ok(()),
            }
        }
    }

    /// A failed run is made up for within the next hours; then once a day, until stopped.
    #[tokio::test(start_paused = true)]
    async fn once_a_day_until_stopped() {
        let expirer = Counted { name: "main".parse().unwrap(), runs: AtomicU32::new(0) };
        let stop = CancellationToken::new();
        let days = async {
            tokio::time::sleep(Duration::from_secs(21 * 60)).await;
            assert_eq!(expirer.runs.load(Ordering::Relaxed), 1);
            tokio::time::sleep(Duration::from_secs(2 * 3600)).await;
            assert_eq!(expirer.runs.load(Ordering::Relaxed), 2);
            tokio::time::sleep(Duration::from_secs(3 * 24 * 3600)).await;
            assert!((4..=5).contains(&expirer.runs.load(Ordering::Relaxed)));
            stop.cancel();
        };
        futures_util::future::join(expire_daily(&expirer, stop.clone()), days).await;
    }
}
