//! Deadlines, and another try where that may help.
//!
//! Every operation ends within [`RetryPolicy::budget`], whatever the store below does: each attempt has a
//! deadline, attempts are counted, and the waits between them grow and are spread by chance so that many writers do not come
//! back at once. Only [`StoreError::is_transient`] is tried again; the last error is returned as it is.
//!
//! A put whose answer was lost finds its own bytes on the next attempt, which is success. An append is never tried again: it has a
//! deadline, and its tail is closed when that passes. Cancellation: as of the store below.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::Instant;

use super::counts;
use super::faulty::Random;
use super::{Body, Created, Key, ListRequest, Listing, MAX_BODY, ObjectMeta, Op, Store, StoreError, Tail};

/// How long and how often to try.
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    /// Most attempts, the first included.
    pub attempts: u32,
    /// The end of it all, measured from the first attempt's begin: also of an attempt that is under way.
    pub budget: Duration,
    /// The deadline of one attempt that moves no bytes.
    pub attempt: Duration,
    /// Bytes per second that the slowest usable store moves; every attempt gets the time for its bytes on top.
    pub slowest_bytes_per_second: u64,
    /// The wait after the first attempt. It doubles with each, and half of it is left to chance.
    pub first_wait: Duration,
    /// The longest wait.
    pub longest_wait: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        RetryPolicy {
            attempts: 6,
            budget: Duration::from_secs(300),
            attempt: Duration::from_secs(30),
            slowest_bytes_per_second: 1 << 20,
            first_wait: Duration::from_millis(100),
            longest_wait: Duration::from_secs(10),
        }
    }
}

impl RetryPolicy {
    /// The wait after attempt `number` (from 1): between half and all of the doubled first wait.
    fn wait(&self, number: u32, chance: f64) -> Duration {
        let doubled = self.first_wait.saturating_mul(1_u32.checked_shl(number.saturating_sub(1)).unwrap_or(u32::MAX));
        doubled.min(self.longest_wait).mul_f64(0.5 + chance / 2.0)
    }

    /// The deadline of one attempt that moves `bytes`.
    fn deadline(&self, bytes: u64) -> Duration {
        self.attempt + Duration::from_secs(bytes / self.slowest_bytes_per_second.max(1))
    }
}

/// See the module's head.
#[derive(Debug, Clone)]
pub struct Retry {
    inner: Arc<dyn Store>,
    policy: RetryPolicy,
    random: Arc<Mutex<Random>>,
}

impl Retry {
    /// `inner`, tried as `policy` says.
    pub fn new(inner: Arc<dyn Store>, policy: RetryPolicy) -> Retry {
        // Without randomness the waits are only less well spread.
        Retry::with_seed(inner, policy, getrandom::u64().unwrap_or_default())
    }

    /// The same, with the spread of the waits by `seed`, for simulations.
    pub fn with_seed(inner: Arc<dyn Store>, policy: RetryPolicy, seed: u64) -> Retry {
        Retry { inner, policy, random: Arc::new(Mutex::new(Random::new(seed))) }
    }

    async fn run<T, F>(&self, op: Op, at: &str, bytes: u64, call: impl FnMut() -> F + Send) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>> + Send,
    {
        self.run_counting(op, at, bytes, call).await.0
    }

    /// The outcome, and whether an earlier attempt may have had an effect.
    async fn run_counting<T, F>(
        &self,
        op: Op,
        at: &str,
        bytes: u64,
        mut call: impl FnMut() -> F + Send,
    ) -> (Result<T, StoreError>, bool)
    where
        F: Future<Output = Result<T, StoreError>> + Send,
    {
        let end = Instant::now() + self.policy.budget;
        let mut number = 1;
        loop {
            let after = self.policy.deadline(bytes).min(end.saturating_duration_since(Instant::now()));
            let result = match tokio::time::timeout(after, call()).await {
                Ok(result) => result,
                Err(_) => Err(StoreError::TimedOut { op, at: format!("{at} in {}", self.describe()), after }),
            };
            if let Err(error) = &result {
                counts::failed(error);
            }
            let error = match result {
                Err(error) if error.is_transient() && number < self.policy.attempts => error,
                done => return (done, number > 1),
            };
            let chance = self.random.lock().unwrap_or_else(PoisonError::into_inner).fraction();
            let wait = self.policy.wait(number, chance);
            if Instant::now() + wait >= end {
                return (Err(error), true);
            }
            tracing::debug!(%op, at, attempt = number, ?wait, %error, "trying again");
            tokio::time::sleep(wait).await;
            counts::tried_again();
            number += 1;
        }
    }
}

#[async_trait]
impl Store for Retry {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn appends(&self) -> bool {
        self.inner.appends()
    }

    fn creates_exclusively(&self) -> bool {
        self.inner.creates_exclusively()
    }

    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError> {
        self.run(Op::Put, key.as_str(), body.len(), || self.inner.put_new(key, body.clone())).await
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let bytes = range.as_ref().map_or(MAX_BODY, |range| range.end.saturating_sub(range.start).min(MAX_BODY));
        self.run(Op::Get, key.as_str(), bytes, || self.inner.get(key, range.clone())).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        self.run(Op::Head, key.as_str(), 0, || self.inner.head(key)).await
    }

    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        self.run(Op::List, &request.prefix, 0, || self.inner.list(request)).await
    }

    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        self.run(Op::Sync, key.as_str(), 0, || self.inner.sync(key)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.run(Op::Delete, key.as_str(), 0, || self.inner.delete(key)).await
    }

    async fn open_tail(&self, key: &Key, capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        let call = || self.inner.open_tail(key, capacity);
        let (opened, tried_before) = self.run_counting(Op::OpenTail, key.as_str(), 0, call).await;
        match opened {
            Ok(inner) => Ok(Box::new(DeadlineTail { inner, key: key.clone(), policy: self.policy.clone() })),
            // Perhaps our own, from an attempt whose answer was lost; perhaps not. No tail is ever continued.
            Err(StoreError::Conflict { .. }) if tried_before => {
                let source = "an earlier attempt may have created it; open one under another name".into();
                Err(StoreError::Unavailable { op: Op::OpenTail, at: key.to_string(), source })
            }
            Err(error) => Err(error),
        }
    }
}

/// A tail whose appends have a deadline. The tail below closes itself when its append is dropped.
#[derive(Debug)]
struct DeadlineTail {
    inner: Box<dyn Tail>,
    key: Key,
    policy: RetryPolicy,
}

#[async_trait]
impl Tail for DeadlineTail {
    async fn append(&mut self, bytes: Body) -> Result<(), StoreError> {
        let after = self.policy.deadline(bytes.len()).min(self.policy.budget);
        match tokio::time::timeout(after, self.inner.append(bytes)).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::TimedOut { op: Op::Append, at: self.key.to_string(), after }),
        }
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::conformance;
    use crate::store::faulty::{FaultPlan, Faulty};
    use crate::store::memory::MemoryStore;

    fn key(text: &str) -> Key {
        Key::new(text).unwrap()
    }

    fn faulty(plan: FaultPlan) -> Faulty {
        Faulty::new(Arc::new(MemoryStore::new()), plan, 11)
    }

    #[tokio::test(start_paused = true)]
    async fn keeps_the_promises_of_a_store_over_a_bad_network() -> Result<(), conformance::Broken> {
        for seed in 0..8 {
            let policy = RetryPolicy { attempts: 30, budget: Duration::from_secs(3600), ..RetryPolicy::default() };
            let make = async || {
                let faulty = Faulty::new(Arc::new(MemoryStore::new()), FaultPlan::network(0.2), seed);
                Ok(Arc::new(Retry::with_seed(Arc::new(faulty), policy.clone(), seed)) as Arc<dyn Store>)
            };
            let expect = conformance::Expect { answers_get_lost: true };
            conformance::run_with(make, expect).await.inspect_err(|_| eprintln!("seed {seed}"))?;
        }
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_answer_is_success_on_the_next_attempt() {
        let faulty = faulty(FaultPlan { after: 1.0, ..FaultPlan::none() });
        let store = Retry::new(Arc::new(faulty.clone()), RetryPolicy::default());
        let put = tokio::spawn(async move { store.put_new(&key("a"), b"abc"[..].into()).await });
        tokio::time::sleep(Duration::from_millis(10)).await;
        faulty.switch(false);
        assert_eq!(put.await.unwrap().unwrap(), Created::AlreadyThere);
    }

    #[tokio::test(start_paused = true)]
    async fn p8_attempts_are_counted_and_the_last_error_comes_back() {
        let faulty = faulty(FaultPlan { before: 1.0, ..FaultPlan::none() });
        let store = Retry::new(Arc::new(faulty.clone()), RetryPolicy { attempts: 4, ..RetryPolicy::default() });
        let error = store.head(&key("a")).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { op: Op::Head, .. }), "{error}");
        assert_eq!(faulty.faults(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn p8_a_store_that_hangs_is_given_up_within_the_budget() {
        let hour = Duration::from_secs(3600);
        let store = faulty(FaultPlan { delay: 1.0, delay_from: hour, delay_to: hour, ..FaultPlan::none() });
        let policy = RetryPolicy { attempts: 100, budget: Duration::from_secs(100), ..RetryPolicy::default() };
        let store = Retry::new(Arc::new(store), policy);
        let began = Instant::now();
        let error = store.get(&key("a"), Some(0..10)).await.unwrap_err();
        assert!(matches!(error, StoreError::TimedOut { .. }), "{error}");
        assert!(began.elapsed() <= Duration::from_secs(101), "{:?}", began.elapsed());
        let mut tail = store.open_tail(&key("t"), 10).await.err();
        assert!(tail.take().is_some_and(|error| error.is_transient()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_append_that_passes_its_deadline_closes_the_tail() {
        let faulty = faulty(FaultPlan::none());
        let store = Retry::new(Arc::new(faulty.clone()), RetryPolicy::default());
        let mut tail = store.open_tail(&key("t"), 10).await.unwrap();
        tail.append(b"one"[..].into()).await.unwrap();
        let hour = Duration::from_secs(3600);
        faulty.set_plan(FaultPlan { delay: 1.0, delay_from: hour, delay_to: hour, ..FaultPlan::none() });
        assert!(matches!(tail.append(b"two"[..].into()).await, Err(StoreError::TimedOut { .. })));
        faulty.switch(false);
        assert!(matches!(tail.append(b"two"[..].into()).await, Err(StoreError::TailClosed { .. })));
        assert_eq!(tail.len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_pass_by_itself_is_tried_once() {
        let faulty = faulty(FaultPlan::none());
        let store = Retry::new(Arc::new(faulty), RetryPolicy::default());
        let began = Instant::now();
        assert!(store.get(&key("a"), None).await.unwrap_err().is_not_found());
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_tail_that_may_be_our_own_is_not_called_a_conflict() {
        let faulty = faulty(FaultPlan { after: 1.0, tails: true, ..FaultPlan::none() });
        let store = Retry::new(Arc::new(faulty.clone()), RetryPolicy::default());
        let opened = tokio::spawn(async move { store.open_tail(&key("t"), 10).await.map(drop) });
        tokio::time::sleep(Duration::from_millis(10)).await;
        faulty.switch(false);
        let error = opened.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("another name"), "{error}");
    }

    proptest! {
        #[test]
        fn waits_grow_within_their_bounds(number in 1_u32..100, chance in 0.0..1.0_f64) {
            let policy = RetryPolicy::default();
            let wait = policy.wait(number, chance);
            prop_assert!(wait >= policy.first_wait / 2 && wait <= policy.longest_wait);
            prop_assert!(policy.wait(number + 1, chance) >= wait);
        }
    }
}
