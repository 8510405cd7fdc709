//! A store of the simulation: memory behind a network. What it does it does after a while, whether or not the caller still
//! waits, and the answer takes a while too. Every effect is a step of the trace; nothing is ever overwritten, and nothing but
//! pieces of open segments is removed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::sleep;

use super::trace::Trace;
use crate::store::faulty::Random;
use crate::store::memory::MemoryStore;
use crate::store::{Body, Created, Key, ListRequest, Listing, ObjectMeta, Op, Store, StoreError, Tail};

/// Calls that one store has to bear at a time, at most: parts, the open range, notes, a filler's copies and listings.
const AT_ONCE: usize = 64;

/// See the module. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Depot {
    index: usize,
    memory: MemoryStore,
    trace: Trace,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    random: Random,
    /// How long a call and its answer take at most, in milliseconds.
    latency: u64,
    /// What was created, as it was created.
    created: BTreeMap<String, Body>,
    removed: u64,
    under_way: usize,
}

/// A name without what is random in it.
fn plain(key: &Key) -> &str {
    let text = key.as_str();
    let text = if text.starts_with("keys/") { "keys/" } else { text };
    text.split('~').next().unwrap_or(text)
}

impl Depot {
    pub fn new(index: usize, memory: MemoryStore, trace: Trace, seed: u64) -> Depot {
        let random = Random::new(seed);
        let shared = Shared { random, latency: 4, created: BTreeMap::new(), removed: 0, under_way: 0 };
        Depot { index, memory, trace, shared: Arc::new(Mutex::new(shared)) }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls and answers take up to so many milliseconds from now on.
    pub fn set_latency(&self, most: u64) {
        self.shared().latency = most;
    }

    /// How many objects were removed: what was verified before has to be verified again.
    pub fn removed(&self) -> u64 {
        self.shared().removed
    }

    /// Whether everything that was created and not removed is as it was created.
    pub async fn check_contents(&self) -> Result<(), String> {
        let created = self.shared().created.clone();
        for (name, body) in created {
            let key = Key::new(&name).map_err(|error| error.to_string())?;
            let there = self.memory.get(&key, None).await.map_err(|error| format!("r{}: {error}", self.index))?;
            if !body.same_as(&there) {
                return Err(format!("r{}: {} was overwritten", self.index, plain(&key)));
            }
        }
        Ok(())
    }

    fn draw(&self) -> (Duration, Duration) {
        let mut shared = self.shared();
        let most = shared.latency;
        let mut one = || match shared.random.below(4) {
            0 => 0,
            _ => shared.random.below(most + 1),
        };
        (Duration::from_millis(one()), Duration::from_millis(one()))
    }

    fn begin(&self) {
        let mut shared = self.shared();
        shared.under_way += 1;
        let many = shared.under_way > AT_ONCE;
        drop(shared);
        if many {
            self.trace.wrong(format!("r{}: more than {AT_ONCE} calls at once", self.index));
        }
    }

    /// `call`, after a while and all alone; its answer after another.
    async fn late<T: Send + 'static>(
        &self,
        what: String,
        call: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (before, after) = self.draw();
        let (trace, index, depot) = (self.trace.clone(), self.index, self.clone());
        self.begin();
        let task = tokio::spawn(async move {
            sleep(before).await;
            let result = call.await;
            trace.note(format!("r{index} {what}{}", if result.is_ok() { "" } else { " no" }));
            depot.shared().under_way -= 1;
            sleep(after).await;
            result
        });
        task.await.map_err(|error| StoreError::Unavailable {
            op: Op::Put,
            at: "the simulation".to_owned(),
            source: error.to_string().into(),
        })?
    }
}

#[async_trait]
impl Store for Depot {
    fn describe(&self) -> String {
        format!("depot {}", self.index)
    }

    fn appends(&self) -> bool {
        self.memory.appends()
    }

    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError> {
        let (depot, key) = (self.clone(), key.clone());
        self.late(format!("put {}", plain(&key)), async move {
            let created = depot.memory.put_new(&key, body.clone()).await?;
            if created == Created::New {
                depot.shared().created.insert(key.to_string(), body);
            }
            Ok(created)
        })
        .await
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let (depot, key) = (self.clone(), key.clone());
        self.late(format!("get {}", plain(&key)), async move { depot.memory.get(&key, range).await }).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        let (depot, key) = (self.clone(), key.clone());
        self.late(format!("head {}", plain(&key)), async move { depot.memory.head(&key).await }).await
    }

    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        let (depot, request) = (self.clone(), request.clone());
        self.late(format!("list {}", request.prefix), async move { depot.memory.list(&request).await }).await
    }

    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        let (depot, key) = (self.clone(), key.clone());
        self.late(format!("sync {}", plain(&key)), async move { depot.memory.sync(&key).await }).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let (depot, key) = (self.clone(), key.clone());
        if !key.as_str().contains("/open/") {
            self.trace.wrong(format!("r{}: {} is removed", self.index, plain(&key)));
        }
        self.late(format!("delete {}", plain(&key)), async move {
            depot.memory.delete(&key).await?;
            let mut shared = depot.shared();
            shared.created.remove(key.as_str());
            shared.removed += 1;
            Ok(())
        })
        .await
    }

    async fn open_tail(&self, key: &Key, capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        let (depot, at) = (self.clone(), key.clone());
        let inner = self
            .late(format!("open {}", plain(key)), async move { depot.memory.open_tail(&at, capacity).await })
            .await?;
        Ok(Box::new(DepotTail { depot: self.clone(), key: key.clone(), inner }))
    }
}

#[derive(Debug)]
struct DepotTail {
    depot: Depot,
    key: Key,
    inner: Box<dyn Tail>,
}

#[async_trait]
impl Tail for DepotTail {
    async fn append(&mut self, bytes: Body) -> Result<(), StoreError> {
        let (before, after) = self.depot.draw();
        sleep(before).await;
        let appended = self.inner.append(bytes).await;
        self.depot.trace.note(format!("r{} append {} to {}", self.depot.index, plain(&self.key), appended.is_ok()));
        sleep(after).await;
        appended
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }
}
