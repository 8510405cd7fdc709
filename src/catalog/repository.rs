//! A repository that was opened with its key: what it is, its keys, and objects as they lie there.
//!
//! What always holds: nothing is written before the repository's format was understood and the key was found to be the
//! realm's; an object whose content key is not durable in the same repository is never put.
//! Crash: a repository whose creation was cut off is completed by creating it again. A content key may be left unused.
//! Cancellation: every future may be dropped; what it was putting is there whole or not at all.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::CatalogError;
use super::keys::KeyRing;
use super::kinds::kind_of;
use super::layout::{ClusterObject, Name, Object, folder};
use super::off_thread::off_thread;
use super::records::{self, Record};
use super::weak;
use crate::seal::{
    Binding, ContentKey, Footer, FrameKey, Header, KeyFile, Kind, MetaKey, Opener, SealError, fill_randomly, open_whole,
};
use crate::store::{Body, Created, Key, ListRequest, Store, StoreError, list_folders, pages};
use crate::types::{ClusterId, ClusterName, Id128};

/// The format that this version writes and reads.
const FORMAT: u16 = 1;
/// `format/0001.json` has some hundred bytes.
const MAX_FORMAT_LEN: u64 = 64 << 10;
/// Features that this version can read, and write.
const READ_FEATURES: &[&str] = &[];
const WRITE_FEATURES: &[&str] = &[];
/// An object up to this length is read whole where its footer is wanted: one request instead of two.
const SMALL_OBJECT: u64 = 64 << 10;
/// What is fetched of a larger object's end: room for the index of a pack's frames and a note.
const FOOTER_GUESS: u64 = 8 << 10;
/// Opening more than this is moved off the threads that serve the network.
const HEAVY: usize = 1 << 20;

/// What `format/0001.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryFormat {
    /// Always 1 in this file; a newer format has a file of its own beside it.
    pub format: u32,
    /// The repositories that share keys.
    pub realm: Id128,
    /// This one.
    pub repository: Id128,
    /// The realm's meta key, by its id, which is no secret.
    pub meta_key: Id128,
    /// Features that a reader must know.
    #[serde(default)]
    pub needed_to_read: Vec<String>,
    /// Features that a writer must know.
    #[serde(default)]
    pub needed_to_write: Vec<String>,
    /// When it was created, by the creator's clock.
    pub created_at: Timestamp,
}

/// Where "now" comes from.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// A repository, opened with its key. Clones are the same one.
#[derive(Clone)]
pub struct Repository(Arc<Inner>);

struct Inner {
    name: String,
    store: Arc<dyn Store>,
    format: RepositoryFormat,
    keys: KeyRing,
    writer: Id128,
    clock: Clock,
    /// The latest moment of the store's own clock that any listing has shown: it is at least as late there now.
    store_time: Mutex<Timestamp>,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Repository({} at {})", self.0.name, self.0.store.describe())
    }
}

/// How a repository is used by this process.
#[derive(Clone)]
pub struct Usage {
    /// Where "now" comes from.
    pub clock: Clock,
    /// Who writes: one identity per run of pgkeep, also over several repositories.
    pub writer: Id128,
    /// A process that writes one object and ends (`wal push`): takes a content key of the same day that it can open,
    /// instead of making one for every object.
    pub short_lived: bool,
}

impl Usage {
    /// The system's clock, and a writer that never was before.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`], as [`CatalogError::Sealing`].
    pub fn new() -> Result<Usage, CatalogError> {
        Ok(Usage { clock: Arc::new(Timestamp::now), writer: random_id()?, short_lived: false })
    }
}

impl fmt::Debug for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Usage(writer {}, short-lived {})", self.writer, self.short_lived)
    }
}

/// A new identity.
///
/// # Errors
/// [`SealError::NoRandomness`], as [`CatalogError::Sealing`].
pub fn random_id() -> Result<Id128, CatalogError> {
    let mut bytes = [0; 16];
    fill_randomly(&mut bytes)
        .map_err(|_| CatalogError::Sealing { name: "an identity".to_owned(), source: SealError::NoRandomness })?;
    Ok(Id128::new(bytes))
}

/// Whether the frames of this kind are data, which only who holds an identity may read, or what an archiver reads back.
pub(super) fn is_data(kind: Kind) -> bool {
    match kind {
        Kind::WalRange | Kind::WalTail | Kind::WalFile | Kind::Pack => true,
        Kind::Record
        | Kind::History
        | Kind::FileTable
        | Kind::BlockTags
        | Kind::ServerManifest
        | Kind::Index
        | Kind::Event
        | Kind::Lease
        | Kind::Verification => false,
    }
}

/// The full name of a cluster's object.
pub(super) fn name_of(cluster: &ClusterId, object: ClusterObject) -> Name {
    Name::new(Object::Of(cluster.clone(), object))
}

impl Repository {
    /// Creates a repository of the key's realm; completes one whose creation was cut off; opens one that is there.
    ///
    /// # Errors
    /// As [`Repository::open`]; a repository of another key is left as it is.
    pub async fn create(name: &str, store: Arc<dyn Store>, keys: &KeyFile) -> Result<Repository, CatalogError> {
        Repository::create_for(name, store, keys, Usage::new()?).await
    }

    /// [`Repository::create`], with the caller's clock and writer.
    ///
    /// # Errors
    /// As [`Repository::create`].
    pub async fn create_for(
        name: &str,
        store: Arc<dyn Store>,
        keys: &KeyFile,
        usage: Usage,
    ) -> Result<Repository, CatalogError> {
        let in_store = |source| CatalogError::Store { repository: name.to_owned(), source };
        let format = match read_format(name, store.as_ref()).await {
            Ok(format) => format,
            Err(CatalogError::NotARepository { .. }) => {
                let format = RepositoryFormat {
                    format: u32::from(FORMAT),
                    // Whoever holds the same key is of the same realm, so a second repository needs no second secret.
                    realm: keys.meta_key().id(),
                    repository: random_id()?,
                    meta_key: keys.meta_key().id(),
                    needed_to_read: Vec::new(),
                    needed_to_write: Vec::new(),
                    created_at: (usage.clock)(),
                };
                let file = Name::new(Object::Format(FORMAT));
                let created = match store.creates_exclusively() {
                    true => create_format(store.as_ref(), &key_of(name, &file)?, &format).await,
                    false => weak::create_format(store.as_ref(), &file, random_id()?, &format).await,
                };
                match created.map_err(in_store)? {
                    true => format,
                    // Somebody else created it in this moment: theirs counts.
                    false => read_format(name, store.as_ref()).await?,
                }
            }
            Err(error) => return Err(error),
        };
        check_realm(name, &format, keys)?;
        let meta = key_of(name, &Name::new(Object::Key(format.meta_key)))?;
        if let Err(StoreError::NotFound { .. }) = store.head(&meta).await {
            let envelope = keys.wrap_meta_key(format.realm);
            let envelope = envelope.map_err(|source| CatalogError::Sealing { name: meta.to_string(), source })?;
            match store.put_new(&meta, envelope.into()).await {
                Ok(_) | Err(StoreError::Conflict { .. }) => {} // the check below says whether theirs is ours
                Err(source) => return Err(in_store(source)),
            }
        }
        Repository::open_for(name, store, keys.clone(), usage).await
    }

    /// Opens a repository: its format, its features, its key. Changes nothing.
    ///
    /// # Errors
    /// [`CatalogError::NotARepository`], [`CatalogError::NewerFormat`], [`CatalogError::UnknownFeature`],
    /// [`CatalogError::WrongKey`], or what the store says.
    pub async fn open(name: &str, store: Arc<dyn Store>, keys: KeyFile) -> Result<Repository, CatalogError> {
        Repository::open_for(name, store, keys, Usage::new()?).await
    }

    /// [`Repository::open`], with the caller's clock and writer.
    ///
    /// # Errors
    /// As [`Repository::open`].
    pub async fn open_for(
        name: &str,
        store: Arc<dyn Store>,
        keys: KeyFile,
        usage: Usage,
    ) -> Result<Repository, CatalogError> {
        let format = read_format(name, store.as_ref()).await?;
        check_realm(name, &format, &keys)?;
        check_meta_key(name, store.as_ref(), &format, &keys).await?;
        Ok(Repository(Arc::new(Inner {
            name: name.to_owned(),
            store,
            format,
            keys: KeyRing::new(keys, usage.short_lived),
            writer: usage.writer,
            clock: usage.clock,
            store_time: Mutex::default(),
        })))
    }

    /// The repository's name in the configuration.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Where its objects lie.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.0.store
    }

    /// What it says about itself.
    pub fn format(&self) -> &RepositoryFormat {
        &self.0.format
    }

    /// The repositories that share its keys.
    pub fn realm(&self) -> Id128 {
        self.0.format.realm
    }

    /// This run of pgkeep, as its notes name it.
    pub fn writer(&self) -> Id128 {
        self.0.writer
    }

    /// Whether the key opens data, or only what an archiver reads back.
    pub fn can_read(&self) -> bool {
        self.0.keys.file.can_read()
    }

    pub(super) fn keys(&self) -> &KeyRing {
        &self.0.keys
    }

    /// Now, by the clock that was handed in.
    pub fn now(&self) -> Timestamp {
        (self.0.clock)()
    }

    pub(super) fn store_time(&self) -> Timestamp {
        *guard(&self.0.store_time)
    }

    pub(super) fn store_was_at(&self, moment: Timestamp) {
        let mut known = guard(&self.0.store_time);
        *known = moment.max(*known);
    }

    /// The key that seals what an archiver reads back.
    pub fn meta_key(&self) -> &MetaKey {
        self.0.keys.file.meta_key()
    }

    /// The clusters that have anything here.
    ///
    /// # Errors
    /// What the store says.
    pub async fn clusters(&self) -> Result<Vec<ClusterId>, CatalogError> {
        let folders = list_folders(self.0.store.as_ref(), "").await.map_err(|source| self.in_store(source))?;
        let mut clusters = Vec::new();
        for name in folders.iter().filter_map(|folder| folder::read_cluster_name(folder)) {
            clusters.extend(self.clusters_named(&name).await?);
        }
        Ok(clusters)
    }

    /// The system identifiers that are archived under a name: more than one after a cluster was made anew.
    ///
    /// # Errors
    /// What the store says.
    pub async fn clusters_named(&self, name: &ClusterName) -> Result<Vec<ClusterId>, CatalogError> {
        let folders = list_folders(self.0.store.as_ref(), &folder::clusters_named(name)).await;
        let systems = folders.map_err(|source| self.in_store(source))?;
        let systems = systems.iter().filter_map(|folder| folder::read_system(folder));
        Ok(systems.map(|system| ClusterId { name: name.clone(), system }).collect())
    }

    // ---- keys

    /// Refuses where the repository needs a writer that this version is not.
    ///
    /// # Errors
    /// [`CatalogError::UnknownFeature`].
    pub fn check_writable(&self) -> Result<(), CatalogError> {
        let unknown = |feature: &&String| !WRITE_FEATURES.contains(&feature.as_str());
        match self.0.format.needed_to_write.iter().find(unknown) {
            None => Ok(()),
            Some(feature) => Err(CatalogError::UnknownFeature {
                repository: self.0.name.clone(),
                feature: feature.clone(),
                doing: "written",
            }),
        }
    }

    // ---- objects

    /// What an object of this name and kind is sealed for.
    pub(super) fn binding<'a>(&self, kind: Kind, object: &'a str) -> Binding<'a> {
        Binding { realm: self.realm(), repository: self.bound_to(kind), kind, name: object }
    }

    /// The one repository, for what says nothing in another one.
    fn bound_to(&self, kind: Kind) -> Option<Id128> {
        matches!(kind, Kind::Event | Kind::Lease | Kind::Verification).then_some(self.0.format.repository)
    }

    pub(super) fn key_of(&self, name: &Name) -> Result<Key, CatalogError> {
        key_of(&self.0.name, name)
    }

    pub(super) async fn put_bytes(&self, name: &Name, body: Body) -> Result<Created, CatalogError> {
        self.check_writable()?;
        self.0.store.put_new(&self.key_of(name)?, body).await.map_err(|source| self.in_store(source))
    }

    /// Makes an object last that somebody put, who may have died before his sync.
    pub(super) async fn sync_object(&self, name: &Name) -> Result<(), CatalogError> {
        self.0.store.sync(&self.key_of(name)?).await.map_err(|source| self.in_store(source))
    }

    pub(super) async fn get_bytes(
        &self,
        name: &Name,
        range: Option<std::ops::Range<u64>>,
    ) -> Result<Bytes, CatalogError> {
        self.0.store.get(&self.key_of(name)?, range).await.map_err(|source| self.in_store(source))
    }

    pub(super) fn in_store(&self, source: StoreError) -> CatalogError {
        CatalogError::Store { repository: self.0.name.clone(), source }
    }

    pub(super) fn sealed(&self, name: &Name, source: SealError) -> CatalogError {
        CatalogError::Sealed { repository: self.0.name.clone(), name: name.to_string(), source }
    }

    pub(super) fn record(&self, name: &Name, source: records::RecordError) -> CatalogError {
        CatalogError::Record { repository: self.0.name.clone(), name: name.to_string(), source }
    }

    pub(super) fn inconsistent(&self, name: &Name, reason: impl Into<String>) -> CatalogError {
        let reason = reason.into();
        CatalogError::Inconsistent { repository: self.0.name.clone(), name: name.to_string(), reason }
    }

    /// The key for an object's frames, if its header names one and it can be had.
    pub(super) async fn key_for(&self, header: &Header) -> Result<Option<ContentKey>, CatalogError> {
        match header.key_id() {
            None => Ok(None),
            Some(id) => self.reading_key(id).await.map(Some),
        }
    }

    /// Opens an object of which all bytes are here: its plaintext and its note.
    pub(super) async fn open_bytes(
        &self,
        name: &Name,
        kind: Kind,
        bytes: Bytes,
    ) -> Result<(Vec<u8>, Bytes), CatalogError> {
        let header = Header::parse(&bytes).map_err(|source| self.sealed(name, source))?;
        // Under which name and key it was sealed comes first: a stranger's object must not be reported as a lost key.
        let bound = name.object.to_string();
        Opener::new(&header, self.meta_key(), None, &self.binding(kind, &bound))
            .map_err(|source| self.sealed(name, source))?;
        let content = self.key_for(&header).await?;
        let (meta, realm, repository) = (self.meta_key().clone(), self.realm(), self.bound_to(kind));
        let heavy = bytes.len() > HEAVY;
        let open = move || {
            let binding = Binding { realm, repository, kind, name: &bound };
            open_whole(&meta, content.as_ref(), &binding, &bytes)
        };
        let opened = if heavy { self.off_thread(open).await? } else { open() };
        opened.map_err(|source| self.sealed(name, source))
    }

    /// Runs what takes long on a thread where it holds nobody up.
    pub(super) async fn off_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, CatalogError> {
        off_thread(work).await.map_err(|error| CatalogError::Misuse {
            name: format!("repository {}", self.0.name),
            reason: format!("a worker thread ended without an answer: {error}"),
        })
    }

    /// An object, or the first copy of it that opens: plaintext, note, and the name that was read.
    ///
    /// # Errors
    /// That of the object itself when no copy opens either: the message names it. [`CatalogError::TwoContents`].
    pub(super) async fn get_object(&self, name: &Name, kind: Kind) -> Result<Opened, CatalogError> {
        if self.names_are_shared() {
            return self.get_shared(name, kind).await;
        }
        let first = match self.get_one(name, kind).await {
            Ok(opened) => return Ok(opened),
            Err(error) if error.is_damage() || error.is_not_found() => error,
            Err(error) => return Err(error),
        };
        match self.first_that_agrees(self.copies_of(name).await?, kind).await {
            Ok(Some(opened)) => {
                if first.is_damage() {
                    tracing::warn!(object = %name, copy = %opened.name, error = %first, "read from a copy");
                }
                Ok(opened)
            }
            Ok(None) => Err(first),
            // An object of which only a broken copy is there is not missing.
            Err(error) if error.is_damage() && first.is_damage() => Err(first),
            Err(error) => Err(error),
        }
    }

    /// Names of other copies of an object, as listed.
    pub(super) async fn copies_of(&self, name: &Name) -> Result<Vec<Name>, CatalogError> {
        let names = self.names_of(&name.object).await?.into_iter().map(|(name, _)| name);
        Ok(names.filter(|copy| copy != name).collect())
    }

    pub(super) async fn get_one(&self, name: &Name, kind: Kind) -> Result<Opened, CatalogError> {
        let bytes = self.get_bytes(name, None).await?;
        let (plaintext, note) = self.open_bytes(name, kind, bytes).await?;
        Ok(Opened { name: name.clone(), plaintext, note })
    }

    /// Header and footer of an object of known length, without its frames; needs no content key.
    pub(super) async fn get_footer(&self, name: &Name, kind: Kind, len: u64) -> Result<(Header, Footer), CatalogError> {
        let sealed = |source| self.sealed(name, source);
        let bound = name.object.to_string();
        let (head, mut end) = if len <= SMALL_OBJECT {
            let whole = self.get_bytes(name, None).await?;
            (whole.clone(), whole)
        } else {
            let head = self.get_bytes(name, Some(0..Header::LEN as u64));
            futures_util::future::try_join(head, self.get_bytes(name, Some(len - FOOTER_GUESS..len))).await?
        };
        let header = Header::parse(&head).map_err(sealed)?;
        let opener = Opener::new(&header, self.meta_key(), None, &self.binding(kind, &bound)).map_err(sealed)?;
        let footer = match opener.open_footer(&end, len) {
            Err(SealError::NeedMore { bytes }) => {
                end = self.get_bytes(name, Some(len.saturating_sub(bytes)..len)).await?;
                opener.open_footer(&end, len)
            }
            footer => footer,
        };
        Ok((header, footer.map_err(sealed)?))
    }

    /// The footer of an object whose header is known; it opens only if the object has that header.
    pub(super) async fn get_footer_under(
        &self,
        name: &Name,
        kind: Kind,
        header: &Header,
        len: u64,
    ) -> Result<Footer, CatalogError> {
        let sealed = |source| self.sealed(name, source);
        let bound = name.object.to_string();
        let opener = Opener::new(header, self.meta_key(), None, &self.binding(kind, &bound)).map_err(sealed)?;
        let end = self.get_bytes(name, Some(len.saturating_sub(FOOTER_GUESS)..len)).await?;
        let footer = match opener.open_footer(&end, len) {
            Err(SealError::NeedMore { bytes }) => {
                let end = self.get_bytes(name, Some(len.saturating_sub(bytes)..len)).await?;
                opener.open_footer(&end, len)
            }
            footer => footer,
        };
        footer.map_err(sealed)
    }

    /// Reads a record of its own name.
    ///
    /// # Errors
    /// [`CatalogError::is_not_found`], or damage that names the object.
    pub async fn get_record<T: Record>(&self, cluster: &ClusterId, object: ClusterObject) -> Result<T, CatalogError> {
        let kind = kind_of(&object);
        self.get_named_record(&name_of(cluster, object), kind).await
    }

    /// The same for any object.
    pub(super) async fn get_named_record<T: Record>(&self, name: &Name, kind: Kind) -> Result<T, CatalogError> {
        let opened = self.get_object(name, kind).await?;
        records::from_json(&opened.plaintext).map_err(|source| self.record(&opened.name, source))
    }

    /// Writes a record under a name that nobody has, or that has the same record.
    ///
    /// # Errors
    /// [`CatalogError::Taken`] where the name holds another.
    pub(super) async fn put_named_record<T: Record + PartialEq>(
        &self,
        name: &Name,
        kind: Kind,
        record: &T,
        note: Vec<u8>,
    ) -> Result<Created, CatalogError> {
        let json = records::to_json(record).map_err(|source| self.record(name, source))?;
        let body = self.seal_whole(name, kind, json, note).await?;
        if self.names_are_shared() {
            return self.put_record_beside(name, kind, body, record).await;
        }
        match self.put_bytes(name, body).await {
            Err(CatalogError::Store { source: StoreError::Conflict { .. }, .. }) => {
                // Sealing is random, so even our own record of an earlier try differs as bytes: compare what it says.
                let theirs: T = match self.get_named_record(name, kind).await {
                    // A record of another kind: a tombstone in a manifest's place.
                    Err(CatalogError::Record { source: records::RecordError::Other { .. }, .. }) => {
                        return Err(self.taken(name));
                    }
                    theirs => theirs?,
                };
                if theirs != *record {
                    return Err(self.taken(name));
                }
                match self.sync_object(name).await {
                    Err(error) if !error.is_not_found() => Err(error),
                    _ => Ok(Created::AlreadyThere), // it was read from a copy, or is durable now
                }
            }
            created => created,
        }
    }

    /// Seals an object that is at hand; the key is what seals its frames if it is data.
    pub(super) async fn seal_whole(
        &self,
        name: &Name,
        kind: Kind,
        plaintext: Vec<u8>,
        note: Vec<u8>,
    ) -> Result<Body, CatalogError> {
        let key = if is_data(kind) { Some(self.writing_key().await?) } else { None };
        if let Some(key) = &key {
            self.ensure_key(key).await?;
        }
        let (meta, realm, bound) = (self.meta_key().clone(), self.realm(), name.object.to_string());
        let (heavy, repository) = (plaintext.len() > HEAVY, self.bound_to(kind));
        let seal = move || {
            let binding = Binding { realm, repository, kind, name: &bound };
            let frames = key.as_ref().map_or(FrameKey::Meta(&meta), |key| FrameKey::Content(&key.key));
            crate::seal::seal_whole(&meta, frames, &binding, crate::seal::Codec::Lz4, &plaintext, &note)
        };
        let parts = if heavy { self.off_thread(seal).await? } else { seal() };
        let parts = parts.map_err(|source| CatalogError::Sealing { name: name.to_string(), source })?;
        Ok(Body::from(parts))
    }
}

/// An object that opened.
#[derive(Debug)]
pub(super) struct Opened {
    pub name: Name,
    pub plaintext: Vec<u8>,
    pub note: Bytes,
}

pub(super) fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // inserts of whole values only: never half changed
}

fn key_of(repository: &str, name: &Name) -> Result<Key, CatalogError> {
    Key::new(name.to_string()).map_err(|error| CatalogError::Misuse {
        name: format!("repository {repository}: {name}"),
        reason: error.to_string(),
    })
}

/// Checks that the meta key is this realm's, by its envelope or another copy of it.
async fn check_meta_key(
    repository: &str,
    store: &dyn Store,
    format: &RepositoryFormat,
    keys: &KeyFile,
) -> Result<(), CatalogError> {
    let in_store = |source| CatalogError::Store { repository: repository.to_owned(), source };
    let object = Object::Key(format.meta_key);
    let meta = key_of(repository, &Name::new(object.clone()))?;
    let sealed = |source| CatalogError::Sealed { repository: repository.to_owned(), name: meta.to_string(), source };
    let first = match store.get(&meta, None).await {
        Ok(envelope) => match keys.check_meta_key(format.realm, &envelope) {
            Ok(()) => return Ok(()),
            Err(source) => sealed(source),
        },
        Err(StoreError::NotFound { .. }) => {
            CatalogError::NoMetaKey { repository: repository.to_owned(), name: meta.to_string() }
        }
        Err(source) => return Err(in_store(source)),
    };
    let listed = pages(store, ListRequest::flat(object.to_string())).await.map_err(in_store)?.objects;
    let is_copy = |key: &Key| Name::parse(key.as_str()).is_ok_and(|name| name.object == object && name.copy.is_some());
    for copy in listed.iter().map(|listed| &listed.key).filter(|key| is_copy(key)) {
        match store.get(copy, None).await {
            Ok(envelope) if keys.check_meta_key(format.realm, &envelope).is_ok() => {
                tracing::warn!(object = %meta, %copy, "read from a copy: {first}");
                return Ok(());
            }
            Ok(_) | Err(StoreError::NotFound { .. }) => {}
            Err(source) => return Err(in_store(source)),
        }
    }
    Err(first)
}

/// Creates the file that says what a repository is; `false` where somebody else did it in this moment.
async fn create_format(store: &dyn Store, key: &Key, format: &RepositoryFormat) -> Result<bool, StoreError> {
    match store.put_new(key, weak::json_of(key, format)?).await {
        Ok(_) => Ok(true),
        Err(StoreError::Conflict { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn read_format(repository: &str, store: &dyn Store) -> Result<RepositoryFormat, CatalogError> {
    let in_store = |source| CatalogError::Store { repository: repository.to_owned(), source };
    let bad = |reason: String| CatalogError::BadFormat { repository: repository.to_owned(), reason };
    let name = Name::new(Object::Format(FORMAT));
    let key = key_of(repository, &name)?;
    let request = ListRequest::delimited("format/");
    let (listed, read) = futures_util::join!(pages(store, request), store.get(&key, Some(0..MAX_FORMAT_LEN)));
    let listed = listed.map_err(in_store)?.objects;
    let listed: Vec<Name> = listed.iter().filter_map(|object| Name::parse(object.key.as_str()).ok()).collect();
    let formats = listed.iter().filter_map(|name| match name.object {
        Object::Format(number) => Some(number),
        _ => None,
    });
    if let Some(newest) = formats.max().filter(|newest| *newest > FORMAT) {
        return Err(CatalogError::NewerFormat { repository: repository.to_owned(), found: u32::from(newest) });
    }
    let copies: Vec<&Name> = listed.iter().filter(|copy| copy.object == name.object && copy.copy.is_some()).collect();
    let json = match (read, copies.as_slice()) {
        (Ok(json), _) => json,
        (Err(StoreError::NotFound { .. }), []) => {
            return Err(CatalogError::NotARepository { place: store.describe() });
        }
        (Err(StoreError::NotFound { .. }), [only]) => {
            store.get(&key_of(repository, only)?, Some(0..MAX_FORMAT_LEN)).await.map_err(in_store)?
        }
        (Err(StoreError::NotFound { .. }), [one, other, ..]) => {
            return Err(bad(format!(
                "there are {one} and {other}: two created it at the same time; remove both, if the \
                                    repository is empty, and run `pgkeep init` again"
            )));
        }
        (Err(source), _) => return Err(in_store(source)),
    };
    #[derive(Deserialize)]
    struct Number {
        format: u32,
    }
    // The number first: of a newer format nothing else is promised.
    let number: Number = serde_json::from_slice(&json).map_err(|error| bad(error.to_string()))?;
    if number.format != u32::from(FORMAT) {
        return Err(CatalogError::NewerFormat { repository: repository.to_owned(), found: number.format });
    }
    let format: RepositoryFormat = serde_json::from_slice(&json).map_err(|error| bad(error.to_string()))?;
    if let Some(feature) = format.needed_to_read.iter().find(|feature| !READ_FEATURES.contains(&feature.as_str())) {
        let (repository, feature) = (repository.to_owned(), feature.clone());
        return Err(CatalogError::UnknownFeature { repository, feature, doing: "read" });
    }
    Ok(format)
}

fn check_realm(repository: &str, format: &RepositoryFormat, keys: &KeyFile) -> Result<(), CatalogError> {
    let key_realm = keys.meta_key().id();
    if format.meta_key == key_realm {
        return Ok(());
    }
    Err(CatalogError::WrongKey { repository: repository.to_owned(), realm: format.realm, key_realm })
}
