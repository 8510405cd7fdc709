//! A store in memory: for tests, simulations and dry runs. Keeps every promise but the one about power.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Bound, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use super::{
    Body, Created, Key, ListRequest, Listing, MAX_BODY, MAX_READ, ObjectMeta, Op, Shown, Store, StoreError, Tail,
};

/// Objects in a map. Clones are the same store, so that a test can "restart" what uses it.
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

struct Shared {
    objects: Mutex<BTreeMap<String, Object>>,
    clock: Box<dyn Fn() -> Timestamp + Send + Sync>,
    appends: bool,
    capacity: u64,
}

struct Object {
    content: Content,
    modified: Timestamp,
}

enum Content {
    Whole(Bytes),
    Tail(Vec<u8>),
}

impl Content {
    fn bytes(&self) -> &[u8] {
        match self {
            Content::Whole(bytes) => bytes,
            Content::Tail(bytes) => bytes,
        }
    }
}

/// How a [`MemoryStore`] behaves.
pub struct MemoryOptions {
    /// The store's clock.
    pub clock: Box<dyn Fn() -> Timestamp + Send + Sync>,
    /// Whether there are tails.
    pub appends: bool,
    /// Bytes that fit before it is [`StoreError::Full`].
    pub capacity: u64,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        MemoryOptions { clock: Box::new(Timestamp::now), appends: true, capacity: u64::MAX }
    }
}

impl MemoryStore {
    /// An empty store with tails, the system's clock and no bound on its size.
    pub fn new() -> MemoryStore {
        MemoryStore::with(MemoryOptions::default())
    }

    /// An empty store that behaves as `options` say.
    pub fn with(options: MemoryOptions) -> MemoryStore {
        let MemoryOptions { clock, appends, capacity } = options;
        MemoryStore { shared: Arc::new(Shared { objects: Mutex::default(), clock, appends, capacity }) }
    }

    /// A panic elsewhere cannot leave the map half changed: every change is a single insert, remove or extend.
    fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Object>> {
        self.shared.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, key: &Key) -> String {
        format!("{key} in memory")
    }

    /// Puts over whatever is there, as no store of ours does: for tests of stores that forget to look.
    #[cfg(test)]
    pub(crate) fn overwrite(&self, key: &Key, body: &Body) {
        let object = Object { content: Content::Whole(body.to_bytes()), modified: (self.shared.clock)() };
        self.objects().insert(key.to_string(), object);
    }

    /// Whether `more` bytes fit beside what is there.
    fn room(&self, objects: &BTreeMap<String, Object>, op: Op, key: &Key, more: u64) -> Result<(), StoreError> {
        if self.shared.capacity == u64::MAX {
            return Ok(()); // do not count where there is no bound
        }
        let used: u64 = objects.values().map(|object| object.content.bytes().len() as u64).sum();
        if used.saturating_add(more) <= self.shared.capacity {
            return Ok(());
        }
        let source = format!("{} bytes is all this store may hold", self.shared.capacity).into();
        Err(StoreError::Full { op, at: self.at(key), source })
    }

    /// A directory cannot hold both `a` and `a/b`, so that nothing does that here and fails there.
    fn clashes(objects: &BTreeMap<String, Object>, key: &Key) -> bool {
        let below = format!("{key}/");
        let mut inside = objects.range::<str, _>((Bound::Included(below.as_str()), Bound::Unbounded));
        inside.next().is_some_and(|(name, _)| name.starts_with(&below))
            || key.as_str().match_indices('/').any(|(at, _)| objects.contains_key(&key.as_str()[..at])) // invariant: match_indices is in bounds
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        MemoryStore::new()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryStore({} objects)", self.objects().len())
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn describe(&self) -> String {
        "memory".into()
    }

    fn appends(&self) -> bool {
        self.shared.appends
    }

    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError> {
        if body.len() > MAX_BODY {
            return Err(StoreError::TooLarge { op: Op::Put, at: self.at(key), len: body.len(), limit: MAX_BODY });
        }
        let mut objects = self.objects();
        match objects.get(key.as_str()) {
            Some(there) if body.same_as(there.content.bytes()) => return Ok(Created::AlreadyThere),
            Some(_) => return Err(StoreError::Conflict { key: key.clone() }),
            None if Self::clashes(&objects, key) => return Err(StoreError::Conflict { key: key.clone() }),
            None => {}
        }
        self.room(&objects, Op::Put, key, body.len())?;
        let object = Object { content: Content::Whole(body.to_bytes()), modified: (self.shared.clock)() };
        objects.insert(key.to_string(), object);
        Ok(Created::New)
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let objects = self.objects();
        let Some(object) = objects.get(key.as_str()) else { return Err(StoreError::NotFound { key: key.clone() }) };
        let len = object.content.bytes().len() as u64;
        let range = super::cut(range, len);
        let (from, to) = (range.start as usize, range.end as usize);
        if range.end - range.start > MAX_READ {
            let len = range.end - range.start;
            return Err(StoreError::TooLarge { op: Op::Get, at: self.at(key), len, limit: MAX_READ });
        }
        Ok(match &object.content {
            Content::Whole(bytes) => bytes.slice(from..to),
            Content::Tail(bytes) => Bytes::copy_from_slice(&bytes[from..to]), // invariant: cut() keeps within len
        })
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        match self.objects().get(key.as_str()) {
            Some(object) => Ok(object.meta(key.clone())),
            None => Err(StoreError::NotFound { key: key.clone() }),
        }
    }

    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        let objects = self.objects();
        let (mut listing, limit) = (Listing::default(), request.page());
        let start = request.after.as_deref().unwrap_or_default().max(request.prefix.as_str());
        let mut last = "";
        for (name, object) in objects.range::<str, _>((Bound::Included(start), Bound::Unbounded)) {
            if !name.starts_with(&request.prefix) {
                break;
            }
            let Some(shown) = request.shown(name) else { continue };
            if shown.name() == last {
                continue; // the folder of the key before
            }
            if listing.objects.len() + listing.folders.len() == limit {
                listing.next = Some(last.to_string());
                break;
            }
            last = shown.name();
            match shown {
                Shown::Folder(folder) => listing.folders.push(folder.to_string()),
                Shown::Object(name) => {
                    if let Ok(key) = Key::new(name) {
                        listing.objects.push(object.meta(key));
                    }
                }
            }
        }
        Ok(listing)
    }

    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        self.head(key).await.map(drop)
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.objects().remove(key.as_str());
        Ok(())
    }

    async fn open_tail(&self, key: &Key, _capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        if !self.shared.appends {
            let reason = "this store cannot append to an object".into();
            return Err(StoreError::Unsupported { op: Op::OpenTail, at: self.at(key), reason });
        }
        let mut objects = self.objects();
        if objects.contains_key(key.as_str()) || Self::clashes(&objects, key) {
            return Err(StoreError::Conflict { key: key.clone() });
        }
        let object = Object { content: Content::Tail(Vec::new()), modified: (self.shared.clock)() };
        objects.insert(key.to_string(), object);
        Ok(Box::new(MemoryTail { store: self.clone(), key: key.clone(), len: 0, closed: None }))
    }
}

impl Object {
    fn meta(&self, key: Key) -> ObjectMeta {
        ObjectMeta { key, len: self.content.bytes().len() as u64, modified: self.modified }
    }
}

/// A tail in memory.
#[derive(Debug)]
struct MemoryTail {
    store: MemoryStore,
    key: Key,
    len: u64,
    closed: Option<String>,
}

#[async_trait]
impl Tail for MemoryTail {
    async fn append(&mut self, bytes: Body) -> Result<(), StoreError> {
        if let Some(reason) = self.closed.clone() {
            return Err(StoreError::TailClosed { key: self.key.clone(), reason });
        }
        let result = self.try_append(&bytes);
        match &result {
            Ok(()) => self.len += bytes.len(),
            Err(error) => self.closed = Some(error.to_string()),
        }
        result
    }

    fn len(&self) -> u64 {
        self.len
    }
}

impl MemoryTail {
    fn try_append(&self, bytes: &Body) -> Result<(), StoreError> {
        let now = (self.store.shared.clock)();
        let mut objects = self.store.objects();
        self.store.room(&objects, Op::Append, &self.key, bytes.len())?;
        match objects.get_mut(self.key.as_str()) {
            Some(Object { content: Content::Tail(content), modified }) if content.len() as u64 == self.len => {
                bytes.chunks().iter().for_each(|chunk| content.extend_from_slice(chunk));
                *modified = now;
                Ok(())
            }
            _ => {
                let detail = "it was deleted or replaced while it was being written".into();
                Err(StoreError::Damaged { at: self.store.at(&self.key), detail })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance;

    #[tokio::test(flavor = "multi_thread")]
    async fn keeps_the_promises_of_a_store() -> Result<(), conformance::Broken> {
        conformance::run(async || Ok(Arc::new(MemoryStore::new()) as Arc<dyn Store>)).await?;
        let no_tails =
            async || Ok(Arc::new(MemoryStore::with(MemoryOptions { appends: false, ..Default::default() })) as _);
        conformance::run(no_tails).await
    }

    #[tokio::test]
    async fn a_full_store_says_so_and_keeps_nothing() {
        let store = MemoryStore::with(MemoryOptions { capacity: 10, ..Default::default() });
        let key = |text| Key::new(text).unwrap();
        store.put_new(&key("a"), b"12345"[..].into()).await.unwrap();
        assert!(matches!(store.put_new(&key("b"), b"123456"[..].into()).await, Err(StoreError::Full { .. })));
        assert!(store.head(&key("b")).await.unwrap_err().is_not_found());
        let mut tail = store.open_tail(&key("t"), 0).await.unwrap();
        tail.append(b"12345"[..].into()).await.unwrap();
        assert!(matches!(tail.append(b"1"[..].into()).await, Err(StoreError::Full { .. })));
        assert!(matches!(tail.append(Body::default()).await, Err(StoreError::TailClosed { .. })));
    }
}
