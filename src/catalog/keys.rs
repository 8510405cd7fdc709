//! A repository's keys over time: content keys in their envelopes, and for whom those are made.
//!
//! What always holds:
//! - An object whose content key is not durable in the same repository is never put.
//! - Envelopes are never replaced. Who comes later gets envelopes beside them, `keys/<id>~<tag>`, under a tag that the meta
//!   key and the recipient give: so whoever adds him twice makes none twice, and he finds his with one request.
//! - For whom content keys are wrapped is said by the newest list, `keys/recipients/<number>`, sealed under the meta key;
//!   before the first list by the key file. Numbers are never used twice, and a process never goes back to an older list.
//! - A recipient misses no key: who adds him puts the list and then looks which keys are there; who makes a key puts its
//!   envelope and then looks which list is there. One of the two sees the other.
//!
//! Crash: a content key may be left unused; a recipient may be in the list and lack envelopes: adding him again makes the rest.
//! Cancellation: likewise; every future may be dropped.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::CatalogError;
use super::layout::{CopyToken, Name, Object, folder};
use super::records::Record;
use super::repository::{Repository, guard, random_id};
use crate::seal::{ContentKey, KeyFile, Kind, Recipient, SealError};
use crate::store::{Body, ListRequest, StoreError};
use crate::types::Id128;

/// How old what is known of the list may be before somebody who writes looks again.
const LOOK_EVERY: SignedDuration = SignedDuration::from_secs(600);
/// That look is on the way of what is being sealed: a store that is slow is asked later.
const LOOK_DEADLINE: Duration = Duration::from_secs(2);
/// Envelopes that are fetched or put at the same time.
const AT_ONCE: usize = 8;
/// How often a list is put anew when somebody else put one at the same time.
const TRIES: usize = 5;
/// Envelopes that could not be opened, by name.
const NAMED: usize = 20;

/// What is known of a repository's keys in this process.
pub(super) struct KeyRing {
    pub file: KeyFile,
    short_lived: bool,
    /// Held across the search for a key of the day, so that two tasks do not make two.
    writing: tokio::sync::Mutex<Option<Writing>>,
    reading: Mutex<HashMap<Id128, ContentKey>>,
    /// Content keys that are known to be durable here.
    durable: Mutex<HashSet<Id128>>,
    /// The newest list that was seen.
    recipients: Mutex<Option<Arc<RecipientList>>>,
}

struct Writing {
    key: WritingKey,
    /// When the list was looked at last.
    looked_at: Timestamp,
}

impl KeyRing {
    pub fn new(file: KeyFile, short_lived: bool) -> KeyRing {
        KeyRing {
            file,
            short_lived,
            writing: tokio::sync::Mutex::default(),
            reading: Mutex::default(),
            durable: Mutex::default(),
            recipients: Mutex::default(),
        }
    }
}

/// A content key to write with, and its envelope, which has to be durable before anything that it sealed.
#[derive(Clone)]
pub struct WritingKey {
    pub(super) key: ContentKey,
    envelope: Bytes,
    /// For whom the envelope is; `None`: it was found.
    recipients: Option<Arc<[Recipient]>>,
}

impl fmt::Debug for WritingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WritingKey({})", self.key.id())
    }
}

/// Somebody for whom content keys are wrapped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownRecipient {
    /// Who.
    pub recipient: Recipient,
    /// What a person calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Since when, by the clock of whoever added it.
    pub added_at: Timestamp,
}

/// For whom content keys are wrapped, from some moment on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecipientList {
    /// Its name, from 1.
    pub number: u32,
    /// The repository that it is for: lists are not exchanged between the repositories of a realm.
    pub repository: Id128,
    /// Never empty.
    pub recipients: Vec<KnownRecipient>,
    /// Content keys that nothing is sealed with any more, though their day is not over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retired: Vec<Id128>,
    /// When content keys were exchanged last, on request or because a recipient was removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotated_at: Option<Timestamp>,
    /// When it was made, by our clock.
    pub made_at: Timestamp,
    /// The run of pgkeep that made it.
    pub writer: Id128,
}

impl Record for RecipientList {
    const NAME: &'static str = "recipients";
}

impl RecipientList {
    fn has(&self, recipient: &Recipient) -> bool {
        self.recipients.iter().any(|known| known.recipient == *recipient)
    }

    /// Whether something may still be sealed with this key.
    fn allows(&self, key: &WritingKey) -> bool {
        let for_others = |recipients: &Arc<[Recipient]>| recipients.iter().any(|recipient| !self.has(recipient));
        !self.retired.contains(&key.key.id()) && !key.recipients.as_ref().is_some_and(for_others)
    }
}

/// What is to become of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecipientChange {
    /// Content keys are wrapped for this one, too.
    Add(Recipient, Option<String>),
    /// For this one no more.
    Remove(Recipient),
    /// For the same ones; the content keys of today are not used any more.
    Rotate,
}

/// The list after a change; `None`: nothing changes. Pure. `today` are the content keys that may be in use.
fn changed(list: &RecipientList, change: &RecipientChange, today: &[Id128], now: Timestamp) -> Option<RecipientList> {
    let mut next = RecipientList { number: list.number.saturating_add(1), made_at: now, ..list.clone() };
    match change {
        RecipientChange::Add(recipient, _) if list.has(recipient) => return None,
        RecipientChange::Add(recipient, name) => {
            let (recipient, name) = (recipient.clone(), name.clone());
            next.recipients.push(KnownRecipient { recipient, name, added_at: now });
            return Some(next);
        }
        RecipientChange::Remove(recipient) if !list.has(recipient) => return None,
        RecipientChange::Remove(recipient) => next.recipients.retain(|known| known.recipient != *recipient),
        RecipientChange::Rotate => {}
    }
    (next.retired, next.rotated_at) = (today.to_vec(), Some(now));
    (!next.recipients.is_empty()).then_some(next)
}

/// What became of making envelopes for a recipient.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Envelopes {
    /// Keys that are there, the meta key among them.
    pub keys: u64,
    /// Envelopes that were made.
    pub made: u64,
    /// That were there.
    pub there: u64,
    /// Keys that this key file cannot open, so that nobody got an envelope: how many.
    pub closed: u64,
    /// Some of their names, and why.
    pub which: Vec<String>,
}

/// The keys that are in a repository.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyCounts {
    /// Content keys by their day, in days since 1970-01-01.
    pub content: BTreeMap<u32, u64>,
    /// Envelopes that were made later for one recipient.
    pub copies: BTreeMap<String, u64>,
}

impl Repository {
    // ---- for whom

    /// The list in force; `None` before there is one: the key file says it.
    ///
    /// # Errors
    /// What the store says. A list that does not open is told in the log, and the one before it counts.
    pub async fn recipients(&self) -> Result<Option<Arc<RecipientList>>, CatalogError> {
        let listed = self.list_under(folder::recipients()).await?;
        let number = |name: Name| match name.object {
            Object::Recipients(number) => Some(number),
            _ => None,
        };
        let numbers: BTreeSet<u32> =
            listed.iter().filter_map(|meta| Name::parse(meta.key.as_str()).ok()).filter_map(number).collect();
        let known = guard(&self.keys().recipients).clone();
        let at_least = known.as_ref().map_or(0, |known| known.number);
        if numbers.last().copied().unwrap_or(0) < at_least {
            let repository = self.name();
            tracing::error!(
                repository,
                number = at_least,
                "the list of recipients that was in force is gone from the repository: somebody removed it. It stays in force here"
            );
        }
        for number in numbers.into_iter().rev().take_while(|number| *number > at_least) {
            let name = Name::new(Object::Recipients(number));
            match self.get_named_record::<RecipientList>(&name, Kind::Record).await {
                Ok(list) if list.number == number && list.repository == self.format().repository => {
                    let list = Arc::new(list);
                    if let Some(known) = &known {
                        self.tell_difference(known, &list);
                    }
                    *guard(&self.keys().recipients) = Some(Arc::clone(&list));
                    return Ok(Some(list));
                }
                Ok(_) => {
                    tracing::error!(object = %name, "is a list of recipients for another repository or number; it is left aside")
                }
                Err(error) if error.is_not_found() => {}
                Err(error) if error.is_damage() => {
                    tracing::error!(object = %name, %error, "this list of recipients does not open; the one before it counts");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(known)
    }

    fn tell_difference(&self, old: &RecipientList, new: &RecipientList) {
        let repository = self.name();
        for known in new.recipients.iter().filter(|known| !old.has(&known.recipient)) {
            tracing::warn!(repository, recipient = %known.recipient, writer = %new.writer, "content is sealed for another recipient from now on");
        }
        for known in old.recipients.iter().filter(|known| !new.has(&known.recipient)) {
            tracing::warn!(repository, recipient = %known.recipient, writer = %new.writer, "content is not sealed for this recipient any more");
        }
    }

    /// Changes for whom content keys are wrapped. `false`: nothing had to be changed, or nobody would be left.
    ///
    /// # Errors
    /// What the store says.
    pub async fn change_recipients(
        &self,
        change: &RecipientChange,
    ) -> Result<(Arc<RecipientList>, bool), CatalogError> {
        for _ in 0..TRIES {
            let now = self.now();
            let list = match self.recipients().await? {
                Some(list) => list,
                None => Arc::new(self.list_of_key_file(now)),
            };
            let today = match change {
                RecipientChange::Add(..) => Vec::new(),
                RecipientChange::Remove(_) | RecipientChange::Rotate => self.keys_from_day(day_of(now)).await?,
            };
            let Some(mut next) = changed(&list, change, &today, now) else { return Ok((list, false)) };
            next.writer = self.writer();
            match self
                .put_named_record(&Name::new(Object::Recipients(next.number)), Kind::Record, &next, Vec::new())
                .await
            {
                Ok(_) => {
                    let next = Arc::new(next);
                    *guard(&self.keys().recipients) = Some(Arc::clone(&next));
                    *self.keys().writing.lock().await = None;
                    return Ok((next, true));
                }
                Err(CatalogError::Taken { .. }) => {} // another change, in this moment
                Err(error) => return Err(error),
            }
        }
        Err(self.taken(&Name::new(Object::Recipients(1))))
    }

    /// What the key file says, before there is a list.
    fn list_of_key_file(&self, now: Timestamp) -> RecipientList {
        let since = self.format().created_at;
        let known =
            |recipient: &Recipient| KnownRecipient { recipient: recipient.clone(), name: None, added_at: since };
        RecipientList {
            number: 0,
            repository: self.format().repository,
            recipients: self.keys().file.recipient_list().iter().map(known).collect(),
            retired: Vec::new(),
            rotated_at: None,
            made_at: now,
            writer: self.writer(),
        }
    }

    /// Content keys of this day and later ones.
    async fn keys_from_day(&self, day: u32) -> Result<Vec<Id128>, CatalogError> {
        let ids = self.key_names().await?.into_keys();
        Ok(ids.filter(|id| content_day(*id).is_some_and(|of| of >= day)).collect())
    }

    /// Every key that is here, and the tokens of its copies.
    async fn key_names(&self) -> Result<BTreeMap<Id128, Vec<Option<CopyToken>>>, CatalogError> {
        let mut names: BTreeMap<Id128, Vec<Option<CopyToken>>> = BTreeMap::new();
        for meta in self.list_under(folder::keys()).await? {
            if let Ok(Name { object: Object::Key(id), copy }) = Name::parse(meta.key.as_str()) {
                names.entry(id).or_default().push(copy);
            }
        }
        Ok(names)
    }

    /// How many keys are here, and how many envelopes of each recipient's own.
    ///
    /// # Errors
    /// What the store says.
    pub async fn count_keys(&self, recipients: &[Recipient]) -> Result<KeyCounts, CatalogError> {
        let mut counts = KeyCounts::default();
        let tags: Vec<(CopyToken, &Recipient)> = recipients.iter().map(|one| (self.tag_of(one), one)).collect();
        for (id, copies) in self.key_names().await? {
            if let Some(day) = content_day(id) {
                *counts.content.entry(day).or_default() += 1;
            }
            for (_, recipient) in tags.iter().filter(|(tag, _)| copies.iter().flatten().any(|copy| copy == tag)) {
                *counts.copies.entry(recipient.to_string()).or_default() += 1;
            }
        }
        Ok(counts)
    }

    /// Tries to open every content key with this key file: how many there are, how many it opens.
    ///
    /// # Errors
    /// What the store says.
    pub async fn try_keys(&self) -> Result<(u64, u64), CatalogError> {
        let ids = self.key_names().await?.into_keys().filter(|id| content_day(*id).is_some());
        let mut tried = stream::iter(ids).map(|id| self.open_key(id)).buffer_unordered(AT_ONCE);
        let (mut keys, mut opened) = (0, 0);
        while let Some(key) = tried.next().await {
            keys += 1;
            match key {
                Ok(_) => opened += 1,
                Err(CatalogError::Sealed { .. } | CatalogError::Inconsistent { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok((keys, opened))
    }

    /// Makes envelopes for a recipient of all keys that this key file opens. Again makes what is missing.
    ///
    /// # Errors
    /// [`SealError::WriteOnly`] within, where the key file opens none; what the store says.
    pub async fn open_to(&self, recipient: &Recipient) -> Result<Envelopes, CatalogError> {
        if !self.can_read() {
            let name = Name::new(Object::Key(self.format().meta_key));
            return Err(self.sealed(&name, SealError::WriteOnly));
        }
        let (names, tag) = (self.key_names().await?, self.tag_of(recipient));
        let mut envelopes = Envelopes { keys: names.len() as u64, ..Envelopes::default() };
        let is_listed = |copies: &[Option<CopyToken>]| copies.iter().flatten().any(|copy| *copy == tag);
        let keys = names.into_iter().map(|(id, copies)| (id, is_listed(&copies)));
        let mut work = stream::iter(keys)
            .map(|(id, is_listed)| self.envelope_for(id, recipient, is_listed))
            .buffer_unordered(AT_ONCE);
        while let Some(done) = work.next().await {
            match done {
                Ok(true) => envelopes.made += 1,
                Ok(false) => envelopes.there += 1,
                Err(error @ (CatalogError::Sealed { .. } | CatalogError::Inconsistent { .. })) => {
                    envelopes.closed += 1;
                    if envelopes.which.len() < NAMED {
                        envelopes.which.push(error.to_string());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        drop(work);
        Ok(envelopes)
    }

    /// `false`: it was there, and is genuine.
    async fn envelope_for(&self, id: Id128, recipient: &Recipient, is_listed: bool) -> Result<bool, CatalogError> {
        if is_listed {
            let name = Name::new(Object::Key(id)).copy(self.tag_of(recipient));
            match self.get_bytes(&name, None).await {
                Ok(theirs) if self.genuine(&name, id, &theirs).is_ok() => return Ok(false),
                Err(error) if !error.is_not_found() => return Err(error),
                Ok(_) | Err(_) => {} // planted there, or withdrawn in this moment
            }
        }
        if id == self.format().meta_key {
            let one = std::slice::from_ref(recipient);
            let envelope = self.keys().file.wrap_meta_key_for(self.realm(), one);
            return self.put_envelope_for(id, recipient, envelope).await.map(|()| true);
        }
        let key = self.open_key(id).await?;
        self.put_content_key_for(&key, recipient).await.map(|()| true)
    }

    async fn put_content_key_for(&self, key: &ContentKey, recipient: &Recipient) -> Result<(), CatalogError> {
        let envelope = self.keys().file.wrap_content_key_for(self.realm(), key, std::slice::from_ref(recipient));
        self.put_envelope_for(key.id(), recipient, envelope).await
    }

    async fn put_envelope_for(
        &self,
        id: Id128,
        recipient: &Recipient,
        envelope: Result<Vec<u8>, SealError>,
    ) -> Result<(), CatalogError> {
        let name = Name::new(Object::Key(id)).copy(self.tag_of(recipient));
        let envelope: Bytes =
            envelope.map_err(|source| CatalogError::Sealing { name: name.to_string(), source })?.into();
        match self.put_bytes(&name, Body::from(envelope.clone())).await {
            Ok(_) => Ok(()),
            Err(CatalogError::Store { source: StoreError::Conflict { .. }, .. }) => {
                // Made by somebody else in this moment; or put there so that this one cannot be.
                let theirs = self.get_bytes(&name, None).await?;
                match self.genuine(&name, id, &theirs) {
                    Ok(()) => self.sync_object(&name).await,
                    Err(error) => {
                        tracing::error!(object = %name, %error, "is no envelope; one is put beside it");
                        let beside = Name::new(Object::Key(id)).copy(CopyToken::of(random_id()?));
                        self.put_bytes(&beside, Body::from(envelope)).await.map(|_| ())
                    }
                }
            }
            Err(error) => Err(error),
        }
    }

    fn tag_of(&self, recipient: &Recipient) -> CopyToken {
        CopyToken::of(self.keys().file.recipient_tag(self.realm(), recipient))
    }

    // ---- writing

    /// The content key to write with: made for this run and day when first asked for, and anew when the list says that it
    /// is not to be used any more. A [`Usage::short_lived`](super::Usage) process takes one of the day that it can open, if there is
    /// one.
    ///
    /// # Errors
    /// [`CatalogError::UnknownFeature`] where this version must not write; [`CatalogError::Sealing`]; what the store says.
    pub async fn writing_key(&self) -> Result<WritingKey, CatalogError> {
        self.check_writable()?;
        let (now, ring) = (self.now(), self.keys());
        let day = day_of(now);
        let mut writing = ring.writing.lock().await;
        if let Some(current) = writing.as_mut().filter(|current| current.key.key.day() == day) {
            if now.duration_since(current.looked_at).abs() < LOOK_EVERY {
                return Ok(current.key.clone());
            }
            current.looked_at = now;
            match tokio::time::timeout(LOOK_DEADLINE, self.recipients()).await {
                Ok(Ok(Some(list))) if !list.allows(&current.key) => {}
                // A store that does not answer in time is asked again later; until then this key is as good as it was.
                _ => return Ok(current.key.clone()),
            }
        }
        let list = self.recipients().await?;
        let found = match ring.short_lived && self.can_read() {
            true => self.key_of_day(day, list.as_deref()).await?,
            false => None,
        };
        let key = match found {
            Some(key) => key,
            None => {
                let recipients: Arc<[Recipient]> = match &list {
                    Some(list) => list.recipients.iter().map(|known| known.recipient.clone()).collect(),
                    None => ring.file.recipient_list().into(),
                };
                let sealing = |source| CatalogError::Sealing { name: "a content key".to_owned(), source };
                let key = ContentKey::generate(day).map_err(sealing)?;
                let envelope = ring.file.wrap_content_key_for(self.realm(), &key, &recipients).map_err(sealing)?;
                WritingKey { key, envelope: envelope.into(), recipients: Some(recipients) }
            }
        };
        guard(&ring.reading).insert(key.key.id(), key.key.clone());
        *writing = Some(Writing { key: key.clone(), looked_at: now });
        Ok(key)
    }

    async fn key_of_day(&self, day: u32, list: Option<&RecipientList>) -> Result<Option<WritingKey>, CatalogError> {
        let listed = self.pages_of(ListRequest::flat(folder::keys_of_day(day))).await?;
        for object in listed.objects {
            let Ok(Name { object: Object::Key(id), copy: None }) = Name::parse(object.key.as_str()) else { continue };
            if list.is_some_and(|list| list.retired.contains(&id)) {
                continue;
            }
            let Ok(envelope) = self.store().get(&object.key, None).await else { continue };
            // One that is damaged or for other recipients is no reason not to write.
            if let Ok(key) = self.keys().file.unwrap_content_key(self.realm(), id, &envelope) {
                guard(&self.keys().durable).insert(id);
                return Ok(Some(WritingKey { key, envelope, recipients: None }));
            }
        }
        Ok(None)
    }

    /// Makes a content key's envelope durable here, before the first object that it sealed; and those of recipients that
    /// were added since it was made, or that only this repository has.
    ///
    /// # Errors
    /// What the store says.
    pub async fn ensure_key(&self, key: &WritingKey) -> Result<(), CatalogError> {
        let id = key.key.id();
        if guard(&self.keys().durable).contains(&id) {
            return Ok(());
        }
        self.put_bytes(&Name::new(Object::Key(id)), Body::from(key.envelope.clone())).await?;
        if let (Some(recipients), Some(list)) = (&key.recipients, self.recipients().await?) {
            for known in list.recipients.iter().filter(|known| !recipients.contains(&known.recipient)) {
                self.put_content_key_for(&key.key, &known.recipient).await?;
            }
        }
        guard(&self.keys().durable).insert(id);
        Ok(())
    }

    /// Whether the bytes of `keys/<id>` were made by somebody who has the meta key.
    fn genuine(&self, name: &Name, id: Id128, envelope: &Bytes) -> Result<(), CatalogError> {
        let file = &self.keys().file;
        let opened = match id == self.format().meta_key {
            true => file.check_meta_key(self.realm(), envelope),
            false => file.unwrap_content_key(self.realm(), id, envelope).map(|_| ()),
        };
        match opened {
            // The MAC was checked before; who may read it is another matter.
            Ok(()) | Err(SealError::WriteOnly | SealError::NotARecipient { .. }) => Ok(()),
            Err(source) => Err(self.sealed(name, source)),
        }
    }

    /// Makes the envelopes of a content key of the same realm durable here, before the first object that it sealed is
    /// copied. They are genuine, or nothing is put.
    pub(super) async fn copy_key(&self, from: &Repository, id: Id128) -> Result<(), CatalogError> {
        if guard(&self.keys().durable).contains(&id) {
            return Ok(());
        }
        let object = Object::Key(id);
        let mut names: Vec<Name> = from.names_of(&object).await?.into_iter().map(|(name, _)| name).collect();
        names.sort_by_key(|name| name.copy.is_some());
        let (mut copied, mut first) = (false, None);
        for name in names {
            match self.copy_envelope(from, id, &name).await {
                Ok(()) => copied = true,
                Err(error) if error.is_damage() || error.is_not_found() => first = first.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        if !copied {
            let missing = "this content key is missing; what it sealed cannot be read";
            return Err(first.unwrap_or_else(|| from.inconsistent(&Name::new(object), missing)));
        }
        guard(&self.keys().durable).insert(id);
        Ok(())
    }

    async fn copy_envelope(&self, from: &Repository, id: Id128, name: &Name) -> Result<(), CatalogError> {
        let envelope = from.get_bytes(name, None).await?;
        from.genuine(name, id, &envelope)?;
        match self.put_bytes(name, Body::from(envelope)).await {
            Ok(_) => Ok(()),
            // Wrapped another time, for other recipients: as good, if it is one.
            Err(CatalogError::Store { source: StoreError::Conflict { .. }, .. }) => {
                self.genuine(name, id, &self.get_bytes(name, None).await?)?;
                self.sync_object(name).await
            }
            Err(error) => Err(error),
        }
    }

    // ---- reading

    /// A content key to read with; kept, so that it is fetched and opened once.
    ///
    /// # Errors
    /// [`CatalogError::Sealed`] naming the key's object; [`SealError::WriteOnly`] within, where the key file cannot read.
    pub async fn reading_key(&self, id: Id128) -> Result<ContentKey, CatalogError> {
        if let Some(key) = guard(&self.keys().reading).get(&id) {
            return Ok(key.clone());
        }
        let key = self.open_key(id).await?;
        guard(&self.keys().reading).insert(id, key.clone());
        Ok(key)
    }

    /// Opens one of a content key's envelopes: the first one, the one that was made for us, any other.
    async fn open_key(&self, id: Id128) -> Result<ContentKey, CatalogError> {
        let object = Object::Key(id);
        let name = Name::new(object.clone());
        let first = match self.open_envelope(id, &name).await {
            Ok(key) => return Ok(key),
            Err(error @ CatalogError::Sealed { source: SealError::WriteOnly, .. }) => return Err(error),
            Err(error @ CatalogError::Sealed { .. }) => error,
            Err(error) if error.is_not_found() => {
                // Not "the object is not there": the object is, and its key is lost.
                self.inconsistent(&name, "this content key is missing; what it sealed cannot be read")
            }
            Err(error) => return Err(error),
        };
        let ours = self.keys().file.own_recipient().map(|own| name.copy(self.tag_of(&own)));
        if let Some(ours) = &ours
            && let Ok(key) = self.open_envelope(id, ours).await
        {
            return Ok(key);
        }
        for (copy, _) in self.names_of(&object).await? {
            if copy != name && Some(&copy) != ours.as_ref() {
                match self.open_envelope(id, &copy).await {
                    Ok(key) => return Ok(key),
                    Err(error @ CatalogError::Store { .. }) if !error.is_not_found() => return Err(error),
                    Err(_) => {} // the first one says best what is wrong
                }
            }
        }
        Err(first)
    }

    async fn open_envelope(&self, id: Id128, name: &Name) -> Result<ContentKey, CatalogError> {
        let envelope = self.get_bytes(name, None).await?;
        let key = self.keys().file.unwrap_content_key(self.realm(), id, &envelope);
        key.map_err(|source| self.sealed(name, source))
    }
}

/// Days since 1970-01-01, UTC.
fn day_of(moment: Timestamp) -> u32 {
    let day = moment.as_second().div_euclid(86_400);
    u32::try_from(day.max(0)).unwrap_or(u32::MAX - 1) // a clock before 1970 or beyond reason
}

/// The day that a content key's id begins with; `None` of the meta key's.
fn content_day(id: Id128) -> Option<u32> {
    let [a, b, c, d, ..] = *id.as_bytes();
    Some(u32::from_be_bytes([a, b, c, d])).filter(|day| *day != u32::MAX)
}
