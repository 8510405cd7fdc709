//! What the archiver of a cluster is doing, as it is handed to whoever watches it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::latency::{Latencies, Latency};
use crate::types::{Branch, Lsn, PgTimestamp};

/// What is known while streaming; the newest value counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The history that is streamed.
    pub branch: Branch,
    /// When this stream began: tells one from the next.
    pub since: Instant,
    /// End of what has come in.
    pub received: Lsn,
    /// End of what is durable without a hole, in as many repositories as are needed.
    pub durable: Lsn,
    /// End of what is durable without a hole in the best repository that counts.
    pub durable_in_one: Lsn,
    /// How many repositories are needed.
    pub needed: usize,
    /// How long ago the oldest byte that is not durable in as many came in; zero when all is.
    pub behind: Duration,
    /// From arrival to durable in as many as are needed, lately.
    pub latency: Option<Latency>,
    /// The server's own end of WAL, as it said last.
    pub server_end: Lsn,
    /// When the server said so, by its clock.
    pub server_time: PgTimestamp,
    /// The newest damage among what has come in on this connection.
    pub damage: Option<Arc<DamageSeen>>,
    /// How many damaged stretches have come in on this connection, once every repository that takes part has a note of
    /// each (or they are too many to be noted); 0 before.
    pub noted: u64,
    /// Each repository, in the configuration's order.
    pub repositories: Vec<RepositoryProgress>,
}

/// WAL that came damaged from the server, and was archived as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamageSeen {
    /// The history that was streamed.
    pub branch: Branch,
    /// Where recovery would stop.
    pub at: Lsn,
    /// What is wrong, as a sentence.
    pub what: String,
    /// How many such stretches have come in on this connection, this one included.
    pub count: u64,
}

/// How one repository stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryProgress {
    /// Its name in the configuration.
    pub name: Arc<str>,
    /// What it is doing.
    pub doing: Doing,
    /// Everything before is known to be durable there; `None` where nothing is known.
    pub frontier: Option<Lsn>,
    /// Bytes that have come in and are not durable there; `None` where nothing is known of it.
    pub lag_bytes: Option<u64>,
    /// How long ago the oldest of them came in, in whole seconds; at least that, where it is longer than is remembered.
    pub lag_seconds: u64,
}

/// What a repository is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doing {
    /// It gets what comes in.
    Live,
    /// What it missed is copied to it from another repository.
    Filling,
    /// It cannot be used now, and is tried again.
    Away {
        /// Why.
        reason: Arc<str>,
    },
    /// It holds another history, or another cluster; nothing is put there.
    Refused {
        /// Why.
        reason: Arc<str>,
    },
}

/// What the archiver of a cluster is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ClusterStatus {
    /// Asking the server and the repositories.
    #[default]
    Connecting,
    /// WAL comes in.
    Streaming(Progress),
    /// Another attempt follows.
    Waiting {
        /// Why the last one ended.
        reason: String,
    },
}

/// When which position came in: a sample a second, and rarer ones the longer it goes on; and how long it took until it was
/// durable.
#[derive(Debug)]
pub(super) struct Arrivals {
    pub latencies: Latencies,
    samples: VecDeque<(Lsn, Instant)>,
    every: Duration,
}

/// Samples that are kept; of more, every second one goes.
const SAMPLES: usize = 512;

impl Default for Arrivals {
    fn default() -> Arrivals {
        Arrivals { latencies: Latencies::default(), samples: VecDeque::new(), every: Duration::from_secs(1) }
    }
}

impl Arrivals {
    /// Everything before `held` needs no age any more.
    pub fn forget(&mut self, held: Lsn) {
        while self.samples.front().is_some_and(|(arrived, _)| *arrived <= held) {
            self.samples.pop_front();
        }
        if self.samples.is_empty() {
            self.every = Duration::from_secs(1);
        }
    }

    /// Everything before `position` has come in.
    pub fn at(&mut self, position: Lsn, now: Instant) {
        self.latencies.arrived(position, now);
        if self.samples.back().is_some_and(|(last, at)| *last == position || now < *at + self.every) {
            return;
        }
        if self.samples.len() >= SAMPLES {
            let mut keep = false;
            self.samples.retain(|_| {
                keep = !keep;
                keep
            });
            self.every *= 2;
        }
        self.samples.push_back((position, now));
    }

    /// How long ago the byte at `position` came in, at least.
    pub fn age(&self, position: Lsn, now: Instant) -> Duration {
        let after = self.samples.iter().find(|(arrived, _)| *arrived > position);
        after.map_or(Duration::ZERO, |(_, at)| now.saturating_duration_since(*at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_remembered_and_memory_is_bounded() {
        let (mut arrivals, begin) = (Arrivals::default(), Instant::now());
        let second = Duration::from_secs(1);
        for number in 0..5000_u32 {
            arrivals.at(Lsn::new(u64::from(number) * 10), begin + second * number);
            arrivals.at(Lsn::new(u64::from(number) * 10 + 1), begin + second * number); // too soon for a sample
        }
        assert!(arrivals.samples.len() <= SAMPLES);
        let now = begin + second * 5000;
        assert_eq!(arrivals.age(Lsn::new(60_000), now), Duration::ZERO, "nothing beyond it has come in");
        let age = arrivals.age(Lsn::new(20_000), now).as_secs();
        assert!((2900..=3000).contains(&age), "{age}");
        arrivals.forget(Lsn::new(49_000));
        assert!(arrivals.samples.len() < 20);
    }
}
