//! Bytes under keys: what a repository is made of. Knows no cryptography, no PostgreSQL.
//!
//! [`Store`] is a promise that a directory ([`fs`]), a bucket ([`s3`], and [`cloud`] for Google's and Azure's) and memory
//! ([`memory`]) keep, and that [`conformance`] checks in words. [`retry`], [`limit`] and [`faulty`] are decorators over any
//! store.
//!
//! What always holds: an object is there whole or not at all, and once there it never changes. The one thing that
//! grows is a [`Tail`], and only where [`Store::appends`] says so.
//! Crash: a put or delete has happened or has not. What a crash leaves besides (temporaries) no listing shows.
//! Cancellation: any future here may be dropped. What it was doing is then done completely or not at all, perhaps
//! after the drop; the same call again finds out which.

pub mod cloud;
pub mod conformance;
pub mod counts;
mod error;
pub mod faulty;
pub mod fs;
mod key;
pub mod limit;
pub mod memory;
pub mod retry;
pub mod s3;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use jiff::Timestamp;

pub use error::{BoxError, Op, StoreError};
pub use key::Key;

/// Most bytes that [`Store::put_new`] takes. Objects are held in memory; the largest are packs and parts of large
/// segments of 64 MiB, and their seals.
pub const MAX_BODY: u64 = 128 << 20;

/// Most bytes that [`Store::get`] returns: room for the tail of a segment of 1 GiB, which is the longest object there is.
pub const MAX_READ: u64 = 1280 << 20;

/// Most names on one page of a listing, whatever was asked for.
pub const MAX_PAGE: usize = 10_000;

/// The bytes of an object to be written, in pieces so that sealed frames need not be copied together. Clones share them.
#[derive(Clone, Default)]
pub struct Body {
    chunks: Arc<[Bytes]>,
    len: u64,
}

impl Body {
    /// All bytes of all chunks.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// No bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, in order; some may be empty.
    pub fn chunks(&self) -> &[Bytes] {
        &self.chunks
    }

    /// The bytes in one piece: copied, unless they are already.
    pub fn to_bytes(&self) -> Bytes {
        if let [only] = &*self.chunks {
            return only.clone();
        }
        let mut whole = BytesMut::new();
        self.chunks.iter().for_each(|chunk| whole.extend_from_slice(chunk));
        whole.freeze()
    }

    /// Whether `bytes` are exactly these.
    pub fn same_as(&self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        for chunk in self.chunks.iter() {
            match rest.strip_prefix(&chunk[..]) {
                Some(tail) => rest = tail,
                None => return false,
            }
        }
        rest.is_empty()
    }
}

impl Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Body({} bytes in {} chunks)", self.len, self.chunks.len())
    }
}

impl From<Vec<Bytes>> for Body {
    fn from(chunks: Vec<Bytes>) -> Body {
        let len = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        Body { chunks: chunks.into(), len }
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Body {
        Body::from(vec![bytes])
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Body {
        Body::from(Bytes::from(bytes))
    }
}

impl From<&'static [u8]> for Body {
    fn from(bytes: &'static [u8]) -> Body {
        Body::from(Bytes::from_static(bytes))
    }
}

/// What is known of an object without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectMeta {
    /// Its name.
    pub key: Key,
    /// Its length in bytes. A tail's is what it held when it was looked at.
    pub len: u64,
    /// When it was created (a tail: last appended to), by the store's clock, which need not agree with ours.
    pub modified: Timestamp,
}

/// Which names to list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListRequest {
    /// Only keys that begin with this text. It need not end at a `/`.
    pub prefix: String,
    /// Only names (keys, and folders with their `/`) that sort after this text: [`Listing::next`] of the page before.
    pub after: Option<String>,
    /// Fold keys that have a `/` after the prefix into folders, as `ls` does.
    pub delimited: bool,
    /// Most names on the page, at least 1, at most [`MAX_PAGE`]. A page may be shorter; only `next` tells the end.
    pub limit: usize,
}

impl ListRequest {
    /// All keys under `prefix`.
    pub fn flat(prefix: impl Into<String>) -> ListRequest {
        ListRequest { prefix: prefix.into(), after: None, delimited: false, limit: MAX_PAGE }
    }

    /// The keys and folders right under `prefix`, which usually ends in `/` or is empty.
    pub fn delimited(prefix: impl Into<String>) -> ListRequest {
        ListRequest { delimited: true, ..ListRequest::flat(prefix) }
    }

    /// `limit`, within its bounds.
    pub fn page(&self) -> usize {
        self.limit.clamp(1, MAX_PAGE)
    }

    /// The name under which `key` shows on this listing: itself or its folder. `None` if it does not.
    pub(crate) fn shown<'k>(&self, key: &'k str) -> Option<Shown<'k>> {
        let rest = key.strip_prefix(self.prefix.as_str())?;
        let shown = match rest.find('/') {
            Some(slash) if self.delimited => Shown::Folder(&key[..self.prefix.len() + slash + 1]), // invariant: find() is in bounds, '/' is one byte
            _ => Shown::Object(key),
        };
        self.after.as_deref().is_none_or(|after| shown.name() > after).then_some(shown)
    }
}

/// A name on a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown<'k> {
    /// The whole key.
    Object(&'k str),
    /// Up to and with the first `/` after the prefix.
    Folder(&'k str),
}

impl<'k> Shown<'k> {
    pub(crate) fn name(&self) -> &'k str {
        match self {
            Shown::Object(name) | Shown::Folder(name) => name,
        }
    }
}

/// One page of names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Sorted by the bytes of the key.
    pub objects: Vec<ObjectMeta>,
    /// Sorted, each a full prefix that ends in `/` and holds at least one object. Empty unless `delimited`.
    pub folders: Vec<String>,
    /// There may be more: pass it as `after`. `None` at the end.
    pub next: Option<String>,
}

/// What [`Store::put_new`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// The object is there because of this call.
    New,
    /// It was there with the same bytes: an earlier call whose answer was lost, or somebody who wrote the same.
    AlreadyThere,
}

/// A place for objects. See the module's head for what always holds, and [`conformance`] for the promises as tests.
///
/// No key may be a folder of another (`a` beside `a/b`): a store that cannot hold both answers [`StoreError::Conflict`].
#[async_trait]
pub trait Store: Send + Sync + Debug + 'static {
    /// A path or URL for messages. Holds no secret.
    fn describe(&self) -> String;

    /// Whether [`open_tail`](Store::open_tail) works here.
    fn appends(&self) -> bool;

    /// Of two who create the same key at the same time, does one lose? Where a server ignores conditional writes
    /// ([`put_new`](Store::put_new) then looks, writes and reads back, which two may do at once), this says no, and
    /// whoever needs P6 puts under names of its own.
    fn creates_exclusively(&self) -> bool {
        true
    }

    /// Creates the object whole or not at all. When this returns `Ok` it survives the loss of power. Where the same
    /// bytes are under this key already, that is success too, so a put may be repeated after any error;
    /// other bytes are a [`StoreError::Conflict`] and stay as they are.
    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError>;

    /// The bytes of an object, or of a range of it. The range is cut at the end of the object; one that starts beyond
    /// the end is empty.
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError>;

    /// Length and age of an object.
    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError>;

    /// One page of names. Never shows what a crash left behind, or an object that is being written.
    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError>;

    /// Makes durable what is under this key, whoever put it: after a crash or a lost answer an object may be there that
    /// nobody has synced. [`StoreError::NotFound`] where nothing is. Of a tail it proves nothing: after a failed sync of
    /// its writer the kernel may call pages clean that never reached the disk.
    async fn sync(&self, key: &Key) -> Result<(), StoreError>;

    /// Removes an object; one that is not there is `Ok`. After a loss of power it may be back: delete again.
    async fn delete(&self, key: &Key) -> Result<(), StoreError>;

    /// Creates an empty object that can be appended to, and sets `capacity` bytes of space aside for it; more may be
    /// appended. A key that is taken is a [`StoreError::Conflict`], even by an empty tail: none is ever continued.
    async fn open_tail(&self, key: &Key, capacity: u64) -> Result<Box<dyn Tail>, StoreError>;
}

/// The writing end of an object that grows. Dropping it ends the object where it is.
#[async_trait]
pub trait Tail: Send + Debug {
    /// Adds `bytes` at the end; durable when this returns `Ok`. After an error, or after the future was dropped, the
    /// object may hold any part of `bytes` beyond [`len`](Tail::len), and every further append is a
    /// [`StoreError::TailClosed`].
    async fn append(&mut self, bytes: Body) -> Result<(), StoreError>;

    /// How many bytes are durable.
    fn len(&self) -> u64;

    /// Nothing is durable yet.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Every object under `prefix`, page by page, sorted.
pub async fn list_all(store: &dyn Store, prefix: &str) -> Result<Vec<ObjectMeta>, StoreError> {
    Ok(pages(store, ListRequest::flat(prefix)).await?.objects)
}

/// The folders right under `prefix` (which ends in `/` or is empty), as full prefixes, sorted.
pub async fn list_folders(store: &dyn Store, prefix: &str) -> Result<Vec<String>, StoreError> {
    Ok(pages(store, ListRequest::delimited(prefix)).await?.folders)
}

/// All pages of `request` as one; `next` is `None`.
pub async fn pages(store: &dyn Store, mut request: ListRequest) -> Result<Listing, StoreError> {
    let mut all = Listing::default();
    loop {
        let page = store.list(&request).await?;
        all.objects.extend(page.objects);
        all.folders.extend(page.folders);
        let Some(next) = page.next else { return Ok(all) };
        // A store that does not move on would keep us here for ever.
        if request.after.as_ref().is_some_and(|after| *after >= next) {
            let source = format!("page after {next:?} does not follow the one before").into();
            return Err(StoreError::Unavailable {
                op: Op::List,
                at: format!("{} {}", store.describe(), request.prefix),
                source,
            });
        }
        request.after = Some(next);
    }
}

/// `range`, or everything, within an object of `len` bytes; never reversed.
pub(crate) fn cut(range: Option<Range<u64>>, len: u64) -> Range<u64> {
    let range = range.unwrap_or(0..len);
    let start = range.start.min(len);
    start..range.end.clamp(start, len)
}
