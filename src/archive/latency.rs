//! How long WAL takes from its arrival here to being durable in as many repositories as are needed: what a synchronous commit
//! waits for, less its way to us and back. Pure.
//!
//! Invariant (P8): memory is fixed: [`WAITING`] arrivals and two times [`BUCKETS`] counters, however much comes in.
//! A percentile is never told as less than it was, and as at most a fifth more.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::types::Lsn;

/// Arrivals that are remembered until they are durable; of more, every second one goes.
const WAITING: usize = 1024;
/// Four to the doubling, from [`LEAST`] on: up to five hours.
const BUCKETS: usize = 112;
const PER_DOUBLING: f64 = 4.0;
/// What is shorter counts as this.
const LEAST: Duration = Duration::from_micros(64);
/// Percentiles tell of the last one to two of these.
const WINDOW: Duration = Duration::from_secs(60);
/// They are made anew not more often than this.
const EVERY: Duration = Duration::from_secs(1);

/// From arrival to durable, lately.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latency {
    /// Half of what came in was durable within this.
    pub p50: Duration,
    /// All but a hundredth.
    pub p99: Duration,
    /// How many arrivals that tells of.
    pub count: u64,
}

/// Counts durations by their magnitude.
#[derive(Debug, Clone)]
struct Histogram {
    counts: [u64; BUCKETS],
}

impl Histogram {
    const EMPTY: Histogram = Histogram { counts: [0; BUCKETS] };

    fn add(&mut self, duration: Duration) {
        let doublings = (duration.as_secs_f64() / LEAST.as_secs_f64()).max(1.0).log2();
        // `as`: saturates, and is not negative
        let bucket = ((doublings * PER_DOUBLING).ceil() as usize).min(BUCKETS - 1);
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
    }

    fn with(&self, other: &Histogram) -> Histogram {
        let mut sum = self.clone();
        sum.counts.iter_mut().zip(&other.counts).for_each(|(count, more)| *count += more);
        sum
    }

    fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The upper end of the bucket in which so many hundredths are reached; `None` of nothing.
    fn percentile(&self, hundredths: u64) -> Option<Duration> {
        let wanted = (self.count() * hundredths).div_ceil(100).max(1);
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        Some(LEAST.mul_f64((bucket as f64 / PER_DOUBLING).exp2()))
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Latencies {
    waiting: VecDeque<(Lsn, Instant)>,
    now: Histogram,
    before: Histogram,
    turned: Option<Instant>,
    told: Option<Latency>,
    told_at: Option<Instant>,
}

impl Default for Latencies {
    fn default() -> Latencies {
        let (now, before) = (Histogram::EMPTY, Histogram::EMPTY);
        Latencies { waiting: VecDeque::new(), now, before, turned: None, told: None, told_at: None }
    }
}

impl Latencies {
    /// Everything before `position` has come in.
    pub fn arrived(&mut self, position: Lsn, now: Instant) {
        if self.waiting.back().is_some_and(|(last, _)| *last >= position) {
            return;
        }
        if self.waiting.len() >= WAITING {
            let mut drop = true; // never the oldest
            self.waiting.retain(|_| {
                drop = !drop;
                !drop
            });
        }
        self.waiting.push_back((position, now));
    }

    /// Everything before `position` is durable in as many repositories as are needed.
    pub fn durable(&mut self, position: Lsn, now: Instant) {
        let since = *self.turned.get_or_insert(now);
        if now >= since + WINDOW {
            let fresh = if now >= since + 2 * WINDOW { Histogram::EMPTY } else { self.now.clone() };
            (self.before, self.now, self.turned) = (fresh, Histogram::EMPTY, Some(now));
        }
        while let Some((_, arrived)) = self.waiting.front().filter(|(arrived, _)| *arrived <= position).copied() {
            self.waiting.pop_front();
            self.now.add(now.saturating_duration_since(arrived));
        }
        if self.told_at.is_none_or(|told| now >= told + EVERY) {
            let all = self.now.with(&self.before);
            let percentiles = all.percentile(50).zip(all.percentile(99));
            self.told = percentiles.map(|(p50, p99)| Latency { p50, p99, count: all.count() });
            self.told_at = Some(now);
        }
    }

    /// How long ago the oldest came in that is not durable; zero when all is.
    pub fn waiting(&self, now: Instant) -> Duration {
        self.waiting.front().map_or(Duration::ZERO, |(_, arrived)| now.saturating_duration_since(*arrived))
    }

    /// Of the last minute or two; `None` while nothing has become durable.
    pub fn lately(&self) -> Option<Latency> {
        self.told
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a sorted list: not less, and at most a fifth more.
        #[test]
        fn a_percentile_is_never_told_as_less(micros in proptest::collection::vec(64u64..3_600_000_000, 1..300), of in 1u64..100) {
            let mut histogram = Histogram::EMPTY;
            micros.iter().for_each(|micros| histogram.add(Duration::from_micros(*micros)));
            let mut sorted = micros.clone();
            sorted.sort_unstable();
            let rank = (micros.len() as u64 * of).div_ceil(100).max(1);
            let exact = Duration::from_micros(sorted[rank as usize - 1]).as_secs_f64();
            let told = histogram.percentile(of).unwrap().as_secs_f64();
            prop_assert!(told >= exact * 0.999_999 && told <= exact * 1.2, "{told} for {exact}");
            prop_assert_eq!(histogram.count(), micros.len() as u64);
        }
    }

    #[test]
    fn what_is_beyond_the_buckets_counts_in_the_last_one() {
        let mut histogram = Histogram::EMPTY;
        assert_eq!(histogram.percentile(50), None);
        histogram.add(Duration::ZERO);
        assert_eq!(histogram.percentile(50), Some(LEAST));
        histogram.add(Duration::from_secs(1 << 40));
        assert!(histogram.percentile(99).unwrap() > Duration::from_secs(4 * 3600));
    }

    #[test]
    fn the_last_minutes_count_and_memory_is_bounded() {
        let (mut latencies, begin, ms) = (Latencies::default(), Instant::now(), Duration::from_millis);
        assert_eq!(latencies.lately(), None);
        let mut at = 0;
        let mut play = |latencies: &mut Latencies, from: Duration, takes: Duration| {
            for second in 0..200_u32 {
                at += 10;
                let now = begin + from + Duration::from_secs(1) * second;
                latencies.arrived(Lsn::new(at), now);
                latencies.durable(Lsn::new(at - 1), now); // not yet
                latencies.durable(Lsn::new(at), now + takes);
            }
        };
        play(&mut latencies, Duration::ZERO, ms(10));
        let slow = latencies.lately().unwrap();
        assert!(slow.p50 >= ms(10) && slow.p99 <= ms(12) && (50..=130).contains(&slow.count), "{slow:?}");
        play(&mut latencies, Duration::from_secs(200), ms(1));
        let fast = latencies.lately().unwrap();
        assert!(fast.p99 <= ms(2), "what is older than two minutes is forgotten: {fast:?}");
        for number in 0..100_000 {
            latencies.arrived(Lsn::new(at + 1000 + number), begin + Duration::from_secs(500));
        }
        assert!(latencies.waiting.len() <= WAITING);
        assert_eq!(latencies.waiting(begin + Duration::from_secs(505)), Duration::from_secs(5), "the oldest is kept");
        latencies.durable(Lsn::new(at + 200_000), begin + Duration::from_secs(507));
        assert!(latencies.lately().unwrap().p50 >= Duration::from_secs(7));
    }
}
