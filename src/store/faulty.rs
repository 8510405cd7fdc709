//! A store that fails on purpose, by seed. **For tests and simulations only**; compiled always so that tests outside of the
//! crate can use it.
//!
//! The faults are those that real stores have: an error before anything happened, an error after everything happened
//! (a lost answer), slowness, bodies that arrive cut or with a flipped bit, listings that are out of date, appends of which a part
//! was written. Which call meets which fault depends on the seed and on how many calls came before, on nothing else.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::{Body, Created, Key, ListRequest, Listing, ObjectMeta, Op, Store, StoreError, Tail};

/// Listings remembered so that an old one can be shown again.
const REMEMBERED: usize = 1000;

/// How often which fault happens; each a probability between 0 and 1.
#[derive(Debug, Clone, PartialEq)]
pub struct FaultPlan {
    /// An error, and nothing happened.
    pub before: f64,
    /// It happened, and an error all the same.
    pub after: f64,
    /// The call takes `delay_from` to `delay_to` longer.
    pub delay: f64,
    /// The shortest delay.
    pub delay_from: Duration,
    /// The longest delay.
    pub delay_to: Duration,
    /// `get` returns less than there is.
    pub cut: f64,
    /// `get` returns one bit that is different.
    pub flip: f64,
    /// `list` shows what it showed when the same was asked before.
    pub stale_list: f64,
    /// Opening tails and appending to them fail too (`before`, `after`); an append that fails "after" may also have
    /// written only a part.
    pub tails: bool,
}

impl FaultPlan {
    /// No faults.
    pub const fn none() -> FaultPlan {
        FaultPlan {
            before: 0.0,
            after: 0.0,
            delay: 0.0,
            delay_from: Duration::ZERO,
            delay_to: Duration::ZERO,
            cut: 0.0,
            flip: 0.0,
            stale_list: 0.0,
            tails: false,
        }
    }

    /// A bad network: each call fails before or after its effect, or is up to two seconds late, with `probability` each. Nothing
    /// that trying again would not heal.
    pub const fn network(probability: f64) -> FaultPlan {
        FaultPlan {
            before: probability,
            after: probability,
            delay: probability,
            delay_to: Duration::from_secs(2),
            ..FaultPlan::none()
        }
    }
}

/// See the module's head. Clones share the plan and the sequence.
#[derive(Debug, Clone)]
pub struct Faulty {
    inner: Arc<dyn Store>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    plan: Mutex<FaultPlan>,
    seed: u64,
    calls: AtomicU64,
    faults: AtomicU64,
    on: AtomicBool,
    listings: Mutex<HashMap<ListKey, Listing>>,
}

type ListKey = (String, Option<String>, bool, usize);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // plain values, whole after any panic
}

impl Faulty {
    /// `inner`, with the faults of `plan` as `seed` deals them.
    pub fn new(inner: Arc<dyn Store>, plan: FaultPlan, seed: u64) -> Faulty {
        let shared = Shared {
            plan: Mutex::new(plan),
            seed,
            calls: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            on: AtomicBool::new(true),
            listings: Mutex::default(),
        };
        Faulty { inner, shared: Arc::new(shared) }
    }

    /// Stops or resumes all faults; for what a test wants to look at undisturbed.
    pub fn switch(&self, on: bool) {
        self.shared.on.store(on, Ordering::Relaxed);
    }

    /// Other faults from now on.
    pub fn set_plan(&self, plan: FaultPlan) {
        *locked(&self.shared.plan) = plan;
    }

    /// How many faults there were: a test that met none has shown nothing.
    pub fn faults(&self) -> u64 {
        self.shared.faults.load(Ordering::Relaxed)
    }

    /// What the next call meets.
    fn deal(&self) -> Dealt {
        let call = self.shared.calls.fetch_add(1, Ordering::Relaxed);
        let mut random = Random::new(self.shared.seed ^ call.wrapping_mul(0xD1B5_4A32_D192_ED03));
        let on = self.shared.on.load(Ordering::Relaxed);
        let plan = if on { locked(&self.shared.plan).clone() } else { FaultPlan::none() };
        let spread = plan.delay_to.saturating_sub(plan.delay_from).mul_f64(random.fraction());
        // Every draw is made in every call, so that one probability does not shift the others.
        let mut chance = |probability: f64| random.fraction() < probability;
        Dealt {
            before: chance(plan.before),
            after: chance(plan.after),
            delay: chance(plan.delay).then_some(plan.delay_from + spread),
            cut: chance(plan.cut),
            flip: chance(plan.flip),
            stale: chance(plan.stale_list),
            tails: plan.tails,
            call,
            seed: self.shared.seed,
            random,
        }
    }

    fn count(&self) {
        self.shared.faults.fetch_add(1, Ordering::Relaxed);
    }

    /// Runs `call` as dealt.
    async fn run<T>(
        &self,
        op: Op,
        at: &str,
        dealt: &Dealt,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        if let Some(delay) = dealt.delay {
            self.count();
            tokio::time::sleep(delay).await;
        }
        if dealt.before {
            self.count();
            return Err(dealt.error(op, at, "before it happened"));
        }
        let result = call.await;
        if dealt.after {
            self.count();
            return Err(dealt.error(op, at, "after it happened"));
        }
        result
    }
}

/// The faults of one call.
#[derive(Debug)]
struct Dealt {
    before: bool,
    after: bool,
    delay: Option<Duration>,
    cut: bool,
    flip: bool,
    stale: bool,
    tails: bool,
    call: u64,
    seed: u64,
    random: Random,
}

impl Dealt {
    fn error(&self, op: Op, at: &str, when: &str) -> StoreError {
        let source = format!("made to fail {when} (seed {}, call {})", self.seed, self.call).into();
        StoreError::Unavailable { op, at: at.into(), source }
    }

    /// Nothing fails about tails unless the plan says so; slow they may be.
    fn for_tails(mut self) -> Dealt {
        self.before &= self.tails;
        self.after &= self.tails;
        self
    }
}

#[async_trait]
impl Store for Faulty {
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
        self.run(Op::Put, key.as_str(), &self.deal(), self.inner.put_new(key, body)).await
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let mut dealt = self.deal();
        let mut bytes = self.run(Op::Get, key.as_str(), &dealt, self.inner.get(key, range)).await?;
        if dealt.cut && !bytes.is_empty() {
            self.count();
            bytes.truncate(dealt.random.below(bytes.len() as u64) as usize);
        }
        if dealt.flip && !bytes.is_empty() {
            self.count();
            let mut copy = bytes.to_vec();
            let at = dealt.random.below(copy.len() as u64) as usize;
            if let Some(byte) = copy.get_mut(at) {
                *byte ^= 1 << dealt.random.below(8);
            }
            bytes = copy.into();
        }
        Ok(bytes)
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        self.run(Op::Head, key.as_str(), &self.deal(), self.inner.head(key)).await
    }

    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        let dealt = self.deal();
        let listing = self.run(Op::List, &request.prefix, &dealt, self.inner.list(request)).await?;
        let asked = (request.prefix.clone(), request.after.clone(), request.delimited, request.limit);
        let mut listings = locked(&self.shared.listings);
        if dealt.stale
            && let Some(old) = listings.get(&asked)
        {
            self.count();
            return Ok(old.clone());
        }
        if listings.len() < REMEMBERED {
            listings.insert(asked, listing.clone());
        }
        Ok(listing)
    }

    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        self.run(Op::Sync, key.as_str(), &self.deal(), self.inner.sync(key)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.run(Op::Delete, key.as_str(), &self.deal(), self.inner.delete(key)).await
    }

    async fn open_tail(&self, key: &Key, capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        let dealt = self.deal().for_tails();
        let inner = self.run(Op::OpenTail, key.as_str(), &dealt, self.inner.open_tail(key, capacity)).await?;
        Ok(Box::new(FaultyTail { faulty: self.clone(), inner, key: key.clone(), closed: None }))
    }
}

/// A tail whose appends fail as the plan says.
#[derive(Debug)]
struct FaultyTail {
    faulty: Faulty,
    inner: Box<dyn Tail>,
    key: Key,
    closed: Option<String>,
}

#[async_trait]
impl Tail for FaultyTail {
    async fn append(&mut self, bytes: Body) -> Result<(), StoreError> {
        if let Some(reason) = self.closed.clone() {
            return Err(StoreError::TailClosed { key: self.key.clone(), reason });
        }
        self.closed = Some("an append was given up before its outcome was known".into());
        let mut dealt = self.faulty.deal().for_tails();
        let written = if dealt.after && dealt.random.below(2) == 0 {
            // A torn append: some of it arrived.
            let part = dealt.random.below(bytes.len().max(1)) as usize;
            Body::from(bytes.to_bytes().slice(..part.min(bytes.len() as usize)))
        } else {
            bytes
        };
        let append = self.inner.append(written);
        let result = self.faulty.run(Op::Append, self.key.as_str(), &dealt, append).await;
        self.closed = result.as_ref().err().map(ToString::to_string);
        result
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }
}

/// SplitMix64: small, and the same everywhere for ever, which a seed in a failure report needs.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// At least 0, less than 1.
    pub(crate) fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Less than `bound`; 0 if that is 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    fn key(text: &str) -> Key {
        Key::new(text).unwrap()
    }

    async fn outcomes(seed: u64) -> Vec<bool> {
        let store = Faulty::new(Arc::new(MemoryStore::new()), FaultPlan::network(0.3), seed);
        let mut outcomes = Vec::new();
        for n in 0..100 {
            outcomes.push(store.put_new(&key(&format!("k{n}")), Body::default()).await.is_ok());
        }
        assert!(store.faults() > 20);
        outcomes
    }

    #[tokio::test(start_paused = true)]
    async fn the_seed_decides() {
        assert_eq!(outcomes(7).await, outcomes(7).await);
        assert_ne!(outcomes(7).await, outcomes(8).await);
    }

    #[tokio::test]
    async fn faults_do_what_they_say_and_stop_when_switched_off() {
        let memory = MemoryStore::new();
        let store = Faulty::new(Arc::new(memory.clone()), FaultPlan { before: 1.0, ..FaultPlan::none() }, 1);
        assert!(store.put_new(&key("a"), b"abc"[..].into()).await.unwrap_err().is_transient());
        assert!(memory.head(&key("a")).await.unwrap_err().is_not_found());

        store.set_plan(FaultPlan { after: 1.0, ..FaultPlan::none() });
        assert!(store.put_new(&key("a"), b"abc"[..].into()).await.unwrap_err().is_transient());
        assert_eq!(memory.get(&key("a"), None).await.unwrap(), "abc");

        store.set_plan(FaultPlan { cut: 1.0, ..FaultPlan::none() });
        assert!(store.get(&key("a"), None).await.unwrap().len() < 3);
        store.set_plan(FaultPlan { flip: 1.0, ..FaultPlan::none() });
        let flipped = store.get(&key("a"), None).await.unwrap();
        let bits: u32 = flipped.iter().zip(b"abc").map(|(a, b)| (a ^ b).count_ones()).sum();
        assert_eq!(bits, 1);

        store.set_plan(FaultPlan { stale_list: 1.0, ..FaultPlan::none() });
        let all = ListRequest::flat("");
        assert_eq!(store.list(&all).await.unwrap().objects.len(), 1);
        memory.delete(&key("a")).await.unwrap();
        assert_eq!(store.list(&all).await.unwrap().objects.len(), 1);
        store.switch(false);
        assert_eq!(store.list(&all).await.unwrap().objects.len(), 0);
    }

    #[tokio::test]
    async fn a_tail_that_failed_is_closed() {
        let store = Faulty::new(Arc::new(MemoryStore::new()), FaultPlan { tails: true, ..FaultPlan::none() }, 3);
        let mut tail = store.open_tail(&key("t"), 100).await.unwrap();
        tail.append(b"one"[..].into()).await.unwrap();
        store.set_plan(FaultPlan { after: 1.0, tails: true, ..FaultPlan::none() });
        assert!(tail.append(b"two"[..].into()).await.unwrap_err().is_transient());
        store.switch(false);
        assert!(matches!(tail.append(b"three"[..].into()).await, Err(StoreError::TailClosed { .. })));
        let there = store.get(&key("t"), None).await.unwrap();
        assert!(b"onetwo".starts_with(&there) && there.starts_with(b"one"), "{there:?}");
    }
}
