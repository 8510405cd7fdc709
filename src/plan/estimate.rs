//! How long a restore may take: an estimate, and said to be one. Pure: what was measured is handed in.
//!
//! Two things are counted. The base backup is read, opened and unsealed at a rate that was just measured in the
//! repository itself, or at [`READ_ASSUMED`] where there was nothing to measure by. Then the server replays the WAL, while it
//! is read ahead: the slower of the two counts. How fast a server replays depends on its disks, its memory and what was done,
//! and nothing here can measure it: the last drill tells, or it is
//! [`REPLAY_ASSUMED`]. What the disks take to write the files is not counted.

use std::time::Duration;

use serde::{Serialize, Serializer};

/// Bytes a second that are read and opened where nothing was measured.
pub const READ_ASSUMED: u64 = 100_000_000;
/// Bytes of WAL a second that a server is taken to replay: a careful figure, from one core that waits for pages now and then.
pub const REPLAY_ASSUMED: u64 = 50_000_000;

/// What was read to measure a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// Bytes of plaintext that came out.
    pub bytes: u64,
    /// How long that took.
    #[serde(rename = "seconds", serialize_with = "seconds")]
    pub took: Duration,
}

impl Sample {
    /// Bytes a second; `None` where too little was read to tell.
    fn bytes_per_second(&self) -> Option<u64> {
        let seconds = self.took.as_secs_f64();
        let rate = if seconds > 0.0 { self.bytes as f64 / seconds } else { 0.0 };
        (self.bytes >= SAMPLE_MIN && rate >= 1.0).then_some(rate as u64) // saturates
    }
}

/// Less than this says more about one request than about a rate.
const SAMPLE_MIN: u64 = 1 << 20;

/// How long a restore may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// In all.
    #[serde(rename = "seconds", serialize_with = "seconds")]
    pub total: Duration,
    /// Reading the base backup.
    #[serde(rename = "base_seconds", serialize_with = "seconds")]
    pub base: Duration,
    /// Replaying the WAL, read ahead.
    #[serde(rename = "wal_seconds", serialize_with = "seconds")]
    pub wal: Duration,
    /// Bytes of the base backup's content.
    pub base_bytes: u64,
    /// Bytes of WAL.
    pub wal_bytes: u64,
    /// Bytes a second that are read and opened.
    pub read_bytes_per_second: u64,
    /// What that was measured by; `None`: it is assumed.
    pub measured: Option<Sample>,
    /// Bytes of WAL a second that the server is taken to replay.
    pub replay_bytes_per_second: u64,
    /// That was measured by a drill; else it is assumed.
    pub replay_measured: bool,
}

/// The estimate for so much of both. `replayed`: bytes of WAL a second, as a drill has measured them.
pub fn estimate(base_bytes: u64, wal_bytes: u64, sample: Option<Sample>, replayed: Option<u64>) -> Estimate {
    let rate = sample.as_ref().and_then(Sample::bytes_per_second);
    let (read_bytes_per_second, measured) = match rate {
        Some(rate) => (rate, sample),
        None => (READ_ASSUMED, None),
    };
    let at = |bytes: u64, rate: u64| Duration::from_millis(bytes.saturating_mul(1000) / rate.max(1));
    let base = at(base_bytes, read_bytes_per_second);
    let replay = replayed.unwrap_or(REPLAY_ASSUMED);
    let wal = at(wal_bytes, read_bytes_per_second.min(replay));
    Estimate {
        total: base + wal,
        base,
        wal,
        base_bytes,
        wal_bytes,
        read_bytes_per_second,
        measured,
        replay_bytes_per_second: replay,
        replay_measured: replayed.is_some(),
    }
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GB: u64 = 1_000_000_000;

    #[test]
    fn what_was_measured_counts_and_else_what_is_assumed() {
        let sample = Sample { bytes: 32_000_000, took: Duration::from_millis(100) };
        let fast = estimate(32 * GB, 5 * GB, Some(sample), None);
        assert_eq!((fast.base.as_secs(), fast.wal.as_secs(), fast.total.as_secs()), (100, 100, 200));
        assert_eq!((fast.read_bytes_per_second, fast.measured), (320_000_000, Some(sample)));
        // A repository that is slower than a server replays.
        let slow = estimate(GB, GB, Some(Sample { bytes: 10_000_000, took: Duration::from_secs(1) }), None);
        assert_eq!((slow.base.as_secs(), slow.wal.as_secs()), (100, 100));
        for nothing in [None, Some(Sample { bytes: 5000, took: Duration::from_millis(1) })] {
            let assumed = estimate(GB, 0, nothing, None);
            assert_eq!((assumed.read_bytes_per_second, assumed.measured), (READ_ASSUMED, None));
            assert_eq!(assumed.total.as_secs(), 10);
        }
        // What a drill has measured counts, as far as the repository gives it.
        let drilled = estimate(0, 2 * GB, Some(sample), Some(100_000_000));
        assert_eq!((drilled.wal.as_secs(), drilled.replay_measured), (20, true));
        let held_up = estimate(0, GB, Some(Sample { bytes: 10_000_000, took: Duration::from_secs(1) }), Some(GB));
        assert_eq!(held_up.wal.as_secs(), 100);
    }

    proptest! {
        /// More never takes less time, and nothing overflows.
        #[test]
        fn more_never_takes_less(
            base in any::<u64>(), wal in any::<u64>(), less in any::<(u64, u64)>(),
            bytes in any::<u64>(), micros in 0u64..1 << 40,
        ) {
            let sample = Some(Sample { bytes, took: Duration::from_micros(micros) });
            let more = estimate(base, wal, sample, None);
            let part = estimate(base.min(less.0), wal.min(less.1), sample, None);
            prop_assert!(part.base <= more.base && part.wal <= more.wal && part.total <= more.total);
        }
    }
}
