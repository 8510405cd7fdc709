//! Puts WAL, history files and what a base backup makes into a repository.
//!
//! What always holds (P6): objects are created, not replaced. Where a name is taken, contents are compared by the
//! digests in the sealed notes: the same content is success, other content is kept aside under `conflict/` and both are
//! named. Nothing that was there is touched, nothing that came is lost.
//! Crash: an object is there whole or not at all. A content key or a copy kept aside may be left without use.
//! Cancellation: every future may be dropped; repeat the call and it finds its own bytes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::CatalogError;
use super::keys::WritingKey;
use super::kinds::kind_of;
use super::layout::{ClusterObject, ContentTag, CopyToken, Disputed, KeptFile, Name, RangeName, SegmentName};
use super::records::{self, BackupInfo, ConflictNote, FileNote, Manifest, Record, WalRangeNote};
use super::repository::{Repository, is_data, name_of, random_id};
use super::weak::{Puts, own_name};
use crate::seal::{Codec, FrameKey, Kind, ObjectSealer, SequentialSealer, open_whole};
use crate::store::{Body, Created, StoreError, Tail};
use crate::types::{Branch, ClusterId, Digest, Id128, Lineage, SegmentNumber, SegmentSize};

/// Most bytes of WAL in one object: a larger segment is put in parts.
pub const MAX_RANGE: u32 = 64 << 20;

/// How often a put is tried anew when what was in its way is gone by the time it is looked at.
pub(super) const TRIES: usize = 4;

/// What became of an object that was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// It was created.
    New,
    /// It was there with the same content: an earlier try, or another writer of the same history.
    SameContent,
    /// What was there is damaged; the content is now there too, as a copy.
    BesideDamaged {
        /// What does not open, and why.
        damaged: String,
        /// Where the content is.
        copy: String,
    },
    /// Other content is there. It stays; ours was kept aside.
    Conflict(Box<Conflict>),
}

/// Two contents wanted one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The name that is taken.
    pub existing: String,
    /// Where ours was kept.
    pub kept: String,
    /// Who, what, when. Also in the note of what was kept.
    pub note: ConflictNote,
}

/// Seals an object while its bytes arrive. Holds what is sealed so far and less than 1 MiB of plaintext.
/// Synchronous: sealing is work for a thread of its own, not for one that serves the network.
#[derive(Debug)]
pub struct ObjectWriter {
    name: Name,
    kind: Kind,
    sealer: SequentialSealer,
    parts: Vec<Bytes>,
    header: Bytes,
    key: Option<WritingKey>,
}

impl ObjectWriter {
    /// The next bytes of plaintext.
    ///
    /// # Errors
    /// [`CatalogError::Sealing`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), CatalogError> {
        let sealing = |source| CatalogError::Sealing { name: self.name.to_string(), source };
        self.parts.extend(self.sealer.push(bytes).map_err(sealing)?);
        Ok(())
    }

    /// The same, of bytes behind which more will come: nothing is copied of whole frames. An object must not end with them.
    ///
    /// # Errors
    /// [`CatalogError::Sealing`].
    pub fn push_followed(&mut self, bytes: &[u8]) -> Result<(), CatalogError> {
        let sealing = |source| CatalogError::Sealing { name: self.name.to_string(), source };
        self.parts.extend(self.sealer.push_followed(bytes).map_err(sealing)?);
        Ok(())
    }

    /// The same; bytes that are just one frame are not copied.
    ///
    /// # Errors
    /// [`CatalogError::Sealing`].
    pub fn push_shared(&mut self, bytes: Bytes) -> Result<(), CatalogError> {
        let sealing = |source| CatalogError::Sealing { name: self.name.to_string(), source };
        self.parts.extend(self.sealer.push_shared(bytes).map_err(sealing)?);
        Ok(())
    }

    /// Bytes of plaintext so far.
    pub fn plaintext_len(&self) -> u64 {
        self.sealer.plaintext_len()
    }

    /// Bytes of memory that the sealed parts hold so far.
    pub fn sealed_len(&self) -> u64 {
        self.parts.iter().map(|part| part.len() as u64).sum()
    }

    /// Ends the object; `note` goes into its footer.
    ///
    /// # Errors
    /// [`CatalogError::Sealing`].
    pub fn finish(mut self, note: &[u8]) -> Result<SealedObject, CatalogError> {
        let plaintext_len = self.sealer.plaintext_len();
        let rest = self.sealer.finish(note);
        self.parts.extend(rest.map_err(|source| CatalogError::Sealing { name: self.name.to_string(), source })?);
        let (body, puts) = (Body::from(self.parts), Arc::default());
        let ObjectWriter { name, kind, header, key, .. } = self;
        Ok(SealedObject { name, kind, body, header, plaintext_len, key, puts })
    }
}

/// An object ready to be put, into any repository of the realm. Putting it again puts the same bytes.
#[derive(Debug, Clone)]
pub struct SealedObject {
    pub(super) name: Name,
    pub(super) kind: Kind,
    pub(super) body: Body,
    pub(super) header: Bytes,
    pub(super) plaintext_len: u64,
    /// What has to be durable before it is put; `None` also where that was seen to.
    pub(super) key: Option<WritingKey>,
    /// By repository: what is confirmed there is never withdrawn.
    pub(super) puts: Arc<Mutex<BTreeMap<Id128, Puts>>>,
}

impl SealedObject {
    /// Its name below the repository's root.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Bytes of the object.
    pub fn len(&self) -> u64 {
        self.body.len()
    }

    /// Never: it has a header.
    pub fn is_empty(&self) -> bool {
        self.body.is_empty()
    }

    /// Bytes of plaintext in it.
    pub fn plaintext_len(&self) -> u64 {
        self.plaintext_len
    }

    /// The object's header, for whoever references it.
    pub fn header(&self) -> &Bytes {
        &self.header
    }

    /// Has anybody who shares this object begun to put it there?
    pub(super) fn was_begun_in(&self, repository: Id128) -> bool {
        self.puts.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&repository)
    }

    /// Looks at, or changes, what is known of its puts in a repository.
    pub(super) fn puts_in<T>(&self, repository: Id128, look: impl FnOnce(&mut Puts) -> T) -> T {
        look(self.puts.lock().unwrap_or_else(PoisonError::into_inner).entry(repository).or_default())
    }
}

/// Seals a range of WAL while it arrives.
///
/// An object is sealed for its full name. Of a complete segment (or a part of one) the name is known when it begins, so
/// it is sealed on the way. Of a range of the open segment the end is known only when it is cut: it waits as plaintext,
/// bounded by whoever cuts, and is sealed at the end.
#[derive(Debug)]
pub struct RangeSealer {
    repository: Repository,
    cluster: ClusterId,
    branch: Branch,
    segment: SegmentName,
    from: u32,
    key: WritingKey,
    state: Sealing,
}

#[derive(Debug)]
enum Sealing {
    Known { to: u32, writer: Box<ObjectWriter> },
    Open { waiting: Vec<u8> },
}

impl RangeSealer {
    /// The next bytes of the segment.
    ///
    /// # Errors
    /// [`CatalogError::Sealing`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), CatalogError> {
        match &mut self.state {
            Sealing::Known { writer, .. } => writer.push(bytes),
            Sealing::Open { waiting } if waiting.len() + bytes.len() > MAX_RANGE as usize => {
                let (name, bytes) = (self.segment.to_string(), waiting.len() + bytes.len());
                Err(CatalogError::Misuse { name, reason: format!("{bytes} bytes are more than one range may hold") })
            }
            Sealing::Open { waiting } => {
                waiting.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// The same; of a complete segment, bytes that are just one frame are not copied.
    ///
    /// # Errors
    /// [`CatalogError::Sealing`].
    pub fn push_shared(&mut self, bytes: Bytes) -> Result<(), CatalogError> {
        match &mut self.state {
            Sealing::Known { writer, .. } => writer.push_shared(bytes),
            Sealing::Open { .. } => self.push(&bytes),
        }
    }

    /// Offset of the first byte in the segment.
    pub fn from(&self) -> u32 {
        self.from
    }

    /// Bytes of plaintext so far.
    pub fn plaintext_len(&self) -> u64 {
        match &self.state {
            Sealing::Known { writer, .. } => writer.plaintext_len(),
            Sealing::Open { waiting } => waiting.len() as u64,
        }
    }

    /// Ends the range at `to`. `note` must hold the digest of the segment's bytes up to there.
    ///
    /// # Errors
    /// [`CatalogError::Misuse`] when the bytes, the end and the note do not fit together; [`CatalogError::Sealing`].
    pub fn finish(self, to: u32, note: WalRangeNote) -> Result<SealedRange, CatalogError> {
        let pushed = self.plaintext_len();
        let misuse = |name: String, reason: &str| CatalogError::Misuse { name, reason: reason.to_owned() };
        let range = range_name(self.segment, self.from, to)?;
        if pushed != u64::from(range.bytes()) {
            return Err(misuse(range.to_string(), &format!("{pushed} bytes were pushed")));
        }
        if note.digest_to.is_none() {
            return Err(misuse(range.to_string(), "the note of a range needs the digest of its end"));
        }
        let json = records::to_json(&note)
            .map_err(|source| self.repository.record(&name_of(&self.cluster, open(self.branch, range)), source))?;
        let object = match self.state {
            Sealing::Known { to: known, .. } if known != to => {
                return Err(misuse(range.to_string(), &format!("it was begun to end at offset {known}")));
            }
            Sealing::Known { writer, .. } => writer.finish(&json)?,
            Sealing::Open { waiting } => {
                let name = name_of(&self.cluster, open(self.branch, range));
                let mut writer = self.repository.writer_for(name, Kind::WalRange, Some(self.key))?;
                writer.push(&waiting)?;
                writer.finish(&json)?
            }
        };
        Ok(SealedRange { object, branch: self.branch, range, cluster: self.cluster, note })
    }
}

fn open(branch: Branch, range: RangeName) -> ClusterObject {
    ClusterObject::Open(branch, range)
}

fn range_name(segment: SegmentName, from: u32, to: u32) -> Result<RangeName, CatalogError> {
    RangeName::new(segment, from, to).filter(|range| range.bytes() <= MAX_RANGE).ok_or_else(|| CatalogError::Misuse {
        name: segment.to_string(),
        reason: format!("a range from offset {from} to {to} is empty or more than 64 MiB"),
    })
}

pub(super) fn segment_name(
    branch: Branch,
    segment: SegmentNumber,
    size: SegmentSize,
) -> Result<SegmentName, CatalogError> {
    SegmentName::new(branch.timeline, segment, size).ok_or_else(|| CatalogError::Misuse {
        name: format!("segment {}", segment.get()),
        reason: "it is beyond the end of the log".to_owned(),
    })
}

/// A range of WAL ready to be put, into any repository of the realm.
#[derive(Debug, Clone)]
pub struct SealedRange {
    object: SealedObject,
    cluster: ClusterId,
    branch: Branch,
    range: RangeName,
    note: WalRangeNote,
}

impl SealedRange {
    /// The object.
    pub fn object(&self) -> &SealedObject {
        &self.object
    }

    /// Which bytes of which segment.
    pub fn range(&self) -> RangeName {
        self.range
    }

    /// What its footer says.
    pub fn note(&self) -> &WalRangeNote {
        &self.note
    }
}

/// The tail of the open segment, in a repository that can append. What [`WalTail::append`] confirmed is durable.
/// After an error or a dropped append it takes no more: begin another.
#[derive(Debug)]
pub struct WalTail {
    name: Name,
    repository: Repository,
    sealer: ObjectSealer,
    tail: Box<dyn Tail>,
    next_frame: u32,
    to: u32,
    end: u64,
}

impl WalTail {
    /// Its name below the repository's root.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Offset in the segment after the last durable byte.
    pub fn to(&self) -> u32 {
        self.to
    }

    /// Seals the next bytes of the segment and makes them durable: one append, one sync. `from` is the offset of their
    /// first byte, which is [`WalTail::to`], or nothing is written.
    ///
    /// # Errors
    /// What the store says; [`CatalogError::Misuse`] elsewhere in the segment, or beyond its end.
    pub async fn append(&mut self, from: u32, bytes: &[u8]) -> Result<(), CatalogError> {
        if from != self.to {
            let (name, to) = (self.name.to_string(), self.to);
            let reason = format!("bytes from offset {from} do not continue a tail that ends at offset {to}");
            return Err(CatalogError::Misuse { name, reason });
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let to = u64::from(self.to) + bytes.len() as u64;
        let to =
            u32::try_from(to).ok().filter(|to| u64::from(*to) <= self.end).ok_or_else(|| CatalogError::Misuse {
                name: self.name.to_string(),
                reason: format!("offset {to} is beyond the segment's end"),
            })?;
        let frames = self.sealer.seal_append(self.next_frame, bytes);
        let frames = frames.map_err(|source| CatalogError::Sealing { name: self.name.to_string(), source })?;
        // Counted before the append: a number is never used twice, even if the append fails half-way.
        self.next_frame = self.next_frame.saturating_add(u32::try_from(frames.len()).unwrap_or(u32::MAX));
        self.tail.append(Body::from(frames)).await.map_err(|source| self.repository.in_store(source))?;
        self.to = to;
        Ok(())
    }
}

impl Repository {
    /// Seals a complete segment, or a part of one, while it arrives.
    ///
    /// # Errors
    /// As [`Repository::writing_key`]; [`CatalogError::Misuse`].
    pub async fn seal_wal(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
        (from, to): (u32, u32),
    ) -> Result<RangeSealer, CatalogError> {
        let segment = segment_name(branch, segment, size)?;
        let key = self.writing_key().await?;
        let name = name_of(cluster, ClusterObject::Wal(branch, range_name(segment, from, to)?));
        let writer = Box::new(self.writer_for(name, Kind::WalRange, Some(key.clone()))?);
        let (repository, cluster) = (self.clone(), cluster.clone());
        Ok(RangeSealer { repository, cluster, branch, segment, from, key, state: Sealing::Known { to, writer } })
    }

    /// Seals a range of the open segment, which begins at offset `from` and ends where it is cut.
    ///
    /// # Errors
    /// As [`Repository::writing_key`]; [`CatalogError::Misuse`].
    pub async fn seal_open(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
        from: u32,
    ) -> Result<RangeSealer, CatalogError> {
        let segment = segment_name(branch, segment, size)?;
        let key = self.writing_key().await?;
        let (repository, cluster) = (self.clone(), cluster.clone());
        let state = Sealing::Open { waiting: Vec::new() };
        Ok(RangeSealer { repository, cluster, branch, segment, from, key, state })
    }

    /// Seals a pack or a piece of a table while it is made.
    ///
    /// # Errors
    /// As [`Repository::writing_key`].
    pub async fn seal_object(&self, cluster: &ClusterId, object: ClusterObject) -> Result<ObjectWriter, CatalogError> {
        self.check_writable()?;
        let key = if is_data(kind_of(&object)) { Some(self.writing_key().await?) } else { None };
        let kind = kind_of(&object);
        self.writer_for(name_of(cluster, object), kind, key)
    }

    fn writer_for(&self, name: Name, kind: Kind, key: Option<WritingKey>) -> Result<ObjectWriter, CatalogError> {
        let bound = name.object.to_string();
        let frames = key.as_ref().map_or(FrameKey::Meta(self.meta_key()), |key| FrameKey::Content(&key.key));
        let sealer = SequentialSealer::new(self.meta_key(), frames, &self.binding(kind, &bound), Codec::Lz4);
        let sealer = sealer.map_err(|source| CatalogError::Sealing { name: bound, source })?;
        let header = sealer.header();
        Ok(ObjectWriter { name, kind, sealer, parts: Vec::new(), header, key })
    }

    /// Puts a pack or a piece of a table. Its name belongs to one backup, so nobody else can have taken it.
    ///
    /// # Errors
    /// [`CatalogError::Taken`]; what the store says.
    pub async fn put_object(&self, object: &SealedObject) -> Result<Created, CatalogError> {
        if let Some(key) = &object.key {
            self.ensure_key(key).await?;
        }
        let shared = self.names_are_shared();
        let name = if shared { own_name(&object.name, &object.header) } else { object.name.clone() };
        match self.put_bytes(&name, object.body.clone()).await {
            Err(CatalogError::Store { source: StoreError::Conflict { .. }, .. }) => Err(self.taken(&name)),
            created => created,
        }
    }

    pub(super) fn taken(&self, name: &Name) -> CatalogError {
        CatalogError::Taken { repository: self.name().to_owned(), name: name.to_string() }
    }

    /// Puts a range of WAL. See [`Put`] for what may be there already.
    ///
    /// # Errors
    /// What the store says; nothing is changed then, or it was done: repeat the call.
    pub async fn put_range(&self, range: &SealedRange) -> Result<Put, CatalogError> {
        let SealedRange { object, cluster, branch, range: bytes, note } = range;
        let ours = note.digest_to.unwrap_or(note.digest_from);
        let contested = Contested {
            cluster,
            branch: *branch,
            disputed: Disputed::Range(*bytes),
            identity: Identity { before: Some(note.digest_from), content: ours },
        };
        self.put_contested(object, &contested, |conflict| {
            let note = WalRangeNote { conflict: Some(conflict), ..note.clone() };
            records::to_json(&note)
        })
        .await
    }

    /// Puts a branch's history file. It has to be there before the branch's first WAL.
    ///
    /// # Errors
    /// What the store says.
    pub async fn put_history(&self, cluster: &ClusterId, branch: Branch, text: &[u8]) -> Result<Put, CatalogError> {
        self.put_history_of(cluster, branch, text, &Lineage::default()).await
    }

    /// Keeps a `.partial` or `.backup` file under a name of its own, where nothing reads it as a segment.
    ///
    /// # Errors
    /// What the store says.
    pub async fn put_wal_file(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        file: &KeptFile,
        bytes: &[u8],
    ) -> Result<Put, CatalogError> {
        let object = ClusterObject::WalFile(branch, file.clone());
        self.put_file(cluster, branch, object, Disputed::File(file.clone()), bytes, Vec::new()).await
    }

    pub(super) async fn put_file(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        object: ClusterObject,
        disputed: Disputed,
        bytes: &[u8],
        ancestors: Vec<Branch>,
    ) -> Result<Put, CatalogError> {
        let note = FileNote { writer: self.writer(), digest: Digest::of(bytes), ancestors, conflict: None };
        let name = name_of(cluster, object.clone());
        let mut writer = self.seal_object(cluster, object).await?;
        writer.push(bytes)?;
        let json = records::to_json(&note).map_err(|source| self.record(&name, source))?;
        let sealed = writer.finish(&json)?;
        let identity = Identity { before: None, content: note.digest };
        let contested = Contested { cluster, branch, disputed, identity };
        self.put_contested(&sealed, &contested, |conflict| {
            records::to_json(&FileNote { conflict: Some(conflict), ..note.clone() })
        })
        .await
    }

    /// Writes a record under its own name. The same record there is fine; another one is not replaced.
    ///
    /// # Errors
    /// [`CatalogError::Taken`] where the name holds another record; what the store says.
    pub async fn put_record<T: Record + PartialEq>(
        &self,
        cluster: &ClusterId,
        object: ClusterObject,
        record: &T,
    ) -> Result<Created, CatalogError> {
        self.put_record_with_note(cluster, object, record, Vec::new()).await
    }

    pub(super) async fn put_record_with_note<T: Record + PartialEq>(
        &self,
        cluster: &ClusterId,
        object: ClusterObject,
        record: &T,
        note: Vec<u8>,
    ) -> Result<Created, CatalogError> {
        let kind = kind_of(&object);
        self.put_named_record(&name_of(cluster, object), kind, record, note).await
    }

    /// Writes the manifest, which makes a base backup exist. Its head is in the footer too, for lists.
    ///
    /// # Errors
    /// [`CatalogError::Taken`] where the name holds another: expiry gave this backup up.
    pub async fn put_manifest(&self, cluster: &ClusterId, manifest: &Manifest) -> Result<Created, CatalogError> {
        let object = ClusterObject::Manifest(manifest.backup.label);
        let name = name_of(cluster, object.clone());
        let note = records::to_json(&manifest.backup).map_err(|source| self.record(&name, source))?;
        self.put_record_with_note(cluster, object, manifest, note).await
    }

    /// Begins a tail at offset `from` of the open segment. Where its name is taken (a tail is never continued), it
    /// gets a name of its own beside it.
    ///
    /// # Errors
    /// [`StoreError::Unsupported`] within, where the store cannot append; what the store says.
    pub async fn open_wal_tail(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
        from: u32,
        note: &WalRangeNote,
    ) -> Result<WalTail, CatalogError> {
        let key = self.writing_key().await?;
        self.ensure_key(&key).await?;
        let segment = segment_name(branch, segment, size)?;
        let first = name_of(cluster, ClusterObject::Tail(branch, segment, from));
        let bound = first.object.to_string();
        let sealing = |source| CatalogError::Sealing { name: bound.clone(), source };
        let frames = FrameKey::Content(&key.key);
        let binding = self.binding(Kind::WalTail, &bound);
        let sealer = ObjectSealer::new(self.meta_key(), frames, &binding, Codec::Lz4).map_err(sealing)?;
        let json = records::to_json(note).map_err(|source| self.record(&first, source))?;
        let start = vec![sealer.header(), sealer.seal_prelude(&json).map_err(sealing)?];
        let missing = size.bytes().saturating_sub(u64::from(from));
        let capacity = missing + missing / 16 + (64 << 10); // frames that do not shrink, and their tags
        let beside = first.copy(CopyToken::of(random_id()?));
        let (name, mut tail) = match self.store().open_tail(&self.key_of(&first)?, capacity).await {
            Ok(tail) => (first, tail),
            Err(StoreError::Conflict { .. }) => {
                let tail = self.store().open_tail(&self.key_of(&beside)?, capacity).await;
                (beside, tail.map_err(|source| self.in_store(source))?)
            }
            Err(source) => return Err(self.in_store(source)),
        };
        tail.append(Body::from(start)).await.map_err(|source| self.in_store(source))?;
        Ok(WalTail { name, repository: self.clone(), sealer, tail, next_frame: 0, to: from, end: size.bytes() })
    }

    // ---- what is there already

    async fn put_contested<N>(
        &self,
        object: &SealedObject,
        contested: &Contested<'_>,
        conflict_note: N,
    ) -> Result<Put, CatalogError>
    where
        N: Fn(ConflictNote) -> Result<Vec<u8>, records::RecordError>,
    {
        match self.put_or_compare(object, &contested.identity).await? {
            Found::New => Ok(Put::New),
            Found::Same => Ok(Put::SameContent),
            Found::Beside { damaged, copy } => Ok(Put::BesideDamaged { damaged, copy }),
            Found::Other(name, theirs, their_writer) => {
                let put = self.keep_aside(object, contested, &name, theirs, their_writer, conflict_note).await?;
                self.give_up(object, &name).await?;
                Ok(put)
            }
            Found::Damaged(error) => self.put_copy(object, &contested.identity, error).await,
        }
    }

    /// Puts an object; where its name is taken, says what is there by its note.
    pub(super) async fn put_or_compare(
        &self,
        object: &SealedObject,
        identity: &Identity,
    ) -> Result<Found, CatalogError> {
        if let Some(key) = &object.key {
            self.ensure_key(key).await?;
        }
        if self.names_are_shared() {
            return self.put_or_compare_beside(object, identity).await;
        }
        for _ in 0..TRIES {
            match self.put_bytes(&object.name, object.body.clone()).await {
                Ok(Created::New) => return Ok(Found::New),
                Ok(Created::AlreadyThere) => return Ok(Found::Same), // synced by the store
                Err(CatalogError::Store { source: StoreError::Conflict { .. }, .. }) => {}
                Err(error) => return Err(error),
            }
            match self.identity_of(&object.name, object.kind).await {
                Ok((theirs, _)) if theirs == *identity => match self.sync_object(&object.name).await {
                    Err(error) if error.is_not_found() => {} // swept in this moment: the name is free again
                    synced => return synced.map(|()| Found::Same),
                },
                Ok((theirs, their_writer)) => return Ok(Found::Other(object.name.clone(), theirs, their_writer)),
                Err(error) if error.is_not_found() => {} // swept in this moment: the name is free again
                Err(error) if error.is_damage() => return Ok(Found::Damaged(error)),
                Err(error) => return Err(error),
            }
        }
        Err(CatalogError::Vanished { repository: self.name().to_owned(), name: object.name.to_string() })
    }

    /// What an existing object's note says of its content, and who wrote it. Needs no content key.
    pub(super) async fn identity_of(&self, name: &Name, kind: Kind) -> Result<(Identity, Id128), CatalogError> {
        let meta = self.store().head(&self.key_of(name)?).await.map_err(|source| self.in_store(source))?;
        let (_, footer) = self.get_footer(name, kind, meta.len).await?;
        self.identity_in(name, kind, &footer.extra)
    }

    pub(super) fn identity_in(&self, name: &Name, kind: Kind, note: &[u8]) -> Result<(Identity, Id128), CatalogError> {
        if kind == Kind::WalRange {
            let note: WalRangeNote = records::from_json(note).map_err(|source| self.record(name, source))?;
            let content =
                note.digest_to.ok_or_else(|| self.inconsistent(name, "its note lacks the digest of its end"))?;
            return Ok((Identity { before: Some(note.digest_from), content }, note.writer));
        }
        let note: FileNote = records::from_json(note).map_err(|source| self.record(name, source))?;
        Ok((Identity { before: None, content: note.digest }, note.writer))
    }

    /// The name is taken by something that does not open: the content goes beside it, as a copy.
    pub(super) async fn put_copy(
        &self,
        object: &SealedObject,
        identity: &Identity,
        damage: CatalogError,
    ) -> Result<Put, CatalogError> {
        let copy = object.name.copy(CopyToken::of(self.writer()));
        let beside = || Put::BesideDamaged { damaged: damage.to_string(), copy: copy.to_string() };
        match self.put_bytes(&copy, object.body.clone()).await {
            Ok(_) => Ok(beside()),
            Err(CatalogError::Store { source: StoreError::Conflict { .. }, .. }) => {
                let (theirs, _) = self.identity_of(&copy, object.kind).await?;
                if theirs != *identity {
                    return Err(self.taken(&copy));
                }
                self.sync_object(&copy).await.map(|()| beside())
            }
            Err(error) => Err(error),
        }
    }

    /// Other content is there. Ours is sealed anew for a name under `conflict/`, so that it opens there and nowhere else.
    pub(super) async fn keep_aside<N>(
        &self,
        object: &SealedObject,
        contested: &Contested<'_>,
        existing: &Name,
        theirs: Identity,
        their_writer: Id128,
        conflict_note: N,
    ) -> Result<Put, CatalogError>
    where
        N: Fn(ConflictNote) -> Result<Vec<u8>, records::RecordError>,
    {
        let ours = contested.identity.content;
        let aside = ClusterObject::Conflict(contested.branch, contested.disputed.clone(), ContentTag::from(&ours));
        let name = name_of(contested.cluster, aside.clone());
        let note = ConflictNote {
            name: existing.to_string(),
            theirs: theirs.content,
            ours,
            their_writer,
            noticed_at: self.now(),
        };
        let conflict = Conflict { existing: existing.to_string(), kept: name.to_string(), note: note.clone() };
        let put = Put::Conflict(Box::new(conflict));
        match self.identity_of(&name, kind_of(&aside)).await {
            Ok((kept, _)) if kept.content == ours => return Ok(put), // reported before
            Ok(_) => return Err(self.taken(&name)),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        let bound = object.name.object.to_string();
        let (bytes, key) = (object.body.to_bytes(), object.key.as_ref().map(|key| &key.key));
        let opened = open_whole(self.meta_key(), key, &self.binding(object.kind, &bound), &bytes);
        let (plaintext, _) = opened.map_err(|source| self.sealed(&object.name, source))?;
        let json = conflict_note(note).map_err(|source| self.record(&name, source))?;
        let body = self.seal_whole(&name, kind_of(&aside), plaintext, json).await?;
        match self.put_bytes(&name, body).await {
            Ok(_) => Ok(put),
            Err(CatalogError::Store { source: StoreError::Conflict { .. }, .. }) => {
                let (kept, _) = self.identity_of(&name, kind_of(&aside)).await?;
                if kept.content == ours { Ok(put) } else { Err(self.taken(&name)) }
            }
            Err(error) => Err(error),
        }
    }
}

/// What tells contents of one name apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    /// WAL: digest of the segment up to the range. Two ranges are the same only where what came before was too.
    pub before: Option<Digest>,
    pub content: Digest,
}

/// What [`Repository::put_or_compare`] did or found.
pub(super) enum Found {
    /// It was created.
    New,
    /// The same content is there, and lasts.
    Same,
    /// Other content is there, under which name, and who wrote it. Nothing is confirmed; see [`Repository::give_up`].
    Other(Name, Identity, Id128),
    /// What is there does not open. Nothing was put.
    Damaged(CatalogError),
    /// The same, and it was put under a name of its own beside it: what is damaged, and where it is.
    Beside { damaged: String, copy: String },
}

/// An object whose name somebody else may have taken.
pub(super) struct Contested<'a> {
    pub cluster: &'a ClusterId,
    pub branch: Branch,
    pub disputed: Disputed,
    pub identity: Identity,
}

/// The head of a manifest, read from its footer.
pub(super) fn head_of(note: &[u8]) -> Result<BackupInfo, records::RecordError> {
    records::from_json(note)
}
