//! What goes wrong, by seed: which request meets which fault depends on the seed and on how many came before.

use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame};
use s3s::StdError;

use super::locked;

/// How often which fault happens; each a probability between 0 and 1.
#[derive(Debug, Clone, PartialEq)]
pub struct S3Faults {
    /// 500, and nothing happened.
    pub error: f64,
    /// 503 SlowDown, and nothing happened.
    pub throttle: f64,
    /// The connection ends, and nothing happened.
    pub reset: f64,
    /// It happened, and the connection ends without an answer.
    pub lost: f64,
    /// The body of an object ends too early.
    pub cut: f64,
    /// A listing shows what there was at an earlier listing.
    pub stale: f64,
    /// The answer takes up to `longest` longer.
    pub slow: f64,
    /// See `slow`.
    pub longest: Duration,
}

impl S3Faults {
    /// None.
    pub const fn none() -> S3Faults {
        S3Faults {
            error: 0.0,
            throttle: 0.0,
            reset: 0.0,
            lost: 0.0,
            cut: 0.0,
            stale: 0.0,
            slow: 0.0,
            longest: Duration::ZERO,
        }
    }

    /// A bad network and a busy server: nothing that trying again would not heal. About one request in three is hit
    /// with a `probability` of 0.1.
    pub const fn network(probability: f64) -> S3Faults {
        S3Faults {
            error: probability / 2.0,
            throttle: probability / 2.0,
            reset: probability,
            lost: probability,
            cut: probability,
            slow: probability,
            longest: Duration::from_millis(50),
            ..S3Faults::none()
        }
    }
}

pub(super) struct Dealer {
    plan: Mutex<(S3Faults, u64)>,
    calls: AtomicU64,
    faults: AtomicU64,
}

impl Default for Dealer {
    fn default() -> Self {
        Dealer { plan: Mutex::new((S3Faults::none(), 0)), calls: AtomicU64::new(0), faults: AtomicU64::new(0) }
    }
}

/// What one request meets.
pub(super) struct Dealt {
    pub(super) error: bool,
    pub(super) throttle: bool,
    pub(super) reset: bool,
    pub(super) lost: bool,
    pub(super) cut: bool,
    pub(super) stale: bool,
    pub(super) slow: Option<Duration>,
    pub(super) random: Random,
}

impl Dealer {
    pub(super) fn set(&self, faults: S3Faults, seed: u64) {
        *locked(&self.plan) = (faults, seed);
    }

    pub(super) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    pub(super) fn deal(&self) -> Dealt {
        let (plan, seed) = locked(&self.plan).clone();
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut random = Random(seed ^ call.wrapping_mul(0xD1B5_4A32_D192_ED03));
        let slow_for = plan.longest.mul_f64(random.fraction());
        let mut hits = 0;
        let mut chance = |probability: f64| {
            let hit = random.fraction() < probability;
            hits += u64::from(hit);
            hit
        };
        let dealt = Dealt {
            error: chance(plan.error),
            throttle: chance(plan.throttle),
            reset: chance(plan.reset),
            lost: chance(plan.lost),
            cut: chance(plan.cut),
            stale: chance(plan.stale),
            slow: chance(plan.slow).then_some(slow_for),
            random: Random(0),
        };
        self.faults.fetch_add(hits, Ordering::Relaxed);
        Dealt { random, ..dealt }
    }
}

/// SplitMix64.
pub(super) struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }
}

/// A body that breaks off.
pub(super) struct Cut {
    body: s3s::Body,
    left: u64,
    /// What came before goes out first: an error at once would take it along.
    end: Pin<Box<tokio::time::Sleep>>,
}

impl Cut {
    /// Ends `pause` after the first `after` bytes.
    pub(super) fn new(body: s3s::Body, after: u64, pause: Duration) -> Cut {
        Cut { body, left: after, end: Box::pin(tokio::time::sleep(pause)) }
    }
}

impl Body for Cut {
    type Data = Bytes;
    type Error = StdError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, StdError>>> {
        if self.left == 0 {
            return self.end.as_mut().poll(cx).map(|()| Some(Err("cut".into())));
        }
        let left = self.left as usize;
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(mut data) => {
                    data.truncate(left);
                    self.left -= data.len() as u64;
                    Poll::Ready(Some(Ok(Frame::data(data))))
                }
                Err(other) => Poll::Ready(Some(Ok(other))),
            },
            other => other,
        }
    }
}
