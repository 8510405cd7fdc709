//! A bound on how many operations a store has to do at once.
//!
//! What waits here costs nothing but its own future; dropping that gives its place in the queue away. Places are given in order of
//! asking. Appends to an open tail do not queue: commits wait for them, there are as many tails as clusters, and each
//! has one append under way at most.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Body, Created, Key, ListRequest, Listing, ObjectMeta, Op, Store, StoreError, Tail};

/// See the module's head.
#[derive(Debug, Clone)]
pub struct Limit {
    inner: Arc<dyn Store>,
    places: Arc<Semaphore>,
}

impl Limit {
    /// At most `at_once` (at least one) operations of `inner` at once.
    pub fn new(inner: Arc<dyn Store>, at_once: usize) -> Limit {
        Limit { inner, places: Arc::new(Semaphore::new(at_once.clamp(1, Semaphore::MAX_PERMITS))) }
    }

    async fn place(&self, op: Op, at: &str) -> Result<SemaphorePermit<'_>, StoreError> {
        // Nobody closes the semaphore; if somebody did, it would be an error and no panic.
        self.places.acquire().await.map_err(|closed| StoreError::Unavailable {
            op,
            at: at.into(),
            source: closed.into(),
        })
    }
}

#[async_trait]
impl Store for Limit {
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
        let _place = self.place(Op::Put, key.as_str()).await?;
        self.inner.put_new(key, body).await
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let _place = self.place(Op::Get, key.as_str()).await?;
        self.inner.get(key, range).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        let _place = self.place(Op::Head, key.as_str()).await?;
        self.inner.head(key).await
    }

    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        let _place = self.place(Op::List, &request.prefix).await?;
        self.inner.list(request).await
    }

    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        let _place = self.place(Op::Sync, key.as_str()).await?;
        self.inner.sync(key).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let _place = self.place(Op::Delete, key.as_str()).await?;
        self.inner.delete(key).await
    }

    async fn open_tail(&self, key: &Key, capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        let _place = self.place(Op::OpenTail, key.as_str()).await?;
        self.inner.open_tail(key, capacity).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::store::conformance;
    use crate::store::faulty::{FaultPlan, Faulty};
    use crate::store::memory::MemoryStore;

    #[tokio::test]
    async fn keeps_the_promises_of_a_store() -> Result<(), conformance::Broken> {
        conformance::run(async || Ok(Arc::new(Limit::new(Arc::new(MemoryStore::new()), 2)) as Arc<dyn Store>)).await
    }

    #[tokio::test(start_paused = true)]
    async fn p8_no_more_than_the_bound_at_once() {
        // Each operation takes exactly a second: ten of them, three at a time, take four.
        let slow = FaultPlan {
            delay: 1.0,
            delay_from: Duration::from_secs(1),
            delay_to: Duration::from_secs(1),
            ..FaultPlan::none()
        };
        let store = Limit::new(Arc::new(Faulty::new(Arc::new(MemoryStore::new()), slow, 1)), 3);
        let began = tokio::time::Instant::now();
        let puts = (0..10).map(|n| {
            let store = store.clone();
            async move { store.put_new(&Key::new(format!("k{n}")).unwrap(), Body::default()).await }
        });
        futures_util::future::try_join_all(puts).await.unwrap();
        let took = began.elapsed();
        assert!(took >= Duration::from_secs(4) && took < Duration::from_millis(4100), "{took:?}");
    }
}
