//! Reads WAL, history files and what base backups are made of.
//!
//! A segment is read from its whole object, or joined from parts, ranges and tails by their digests ([`super::join`]).
//! What always holds: bytes of two histories are never mixed; an object that does not open is named, after its copies
//! were tried and only if nothing else holds its bytes; what was listed and is gone by the time it is read means
//! "list again". Empty bytes mean that the repository was asked and has nothing there (P7).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;

use super::CatalogError;
use super::inventory::DamagedObject;
use super::join::Joiner;
use super::kinds::kind_of;
use super::layout::{ClusterObject, KeptFile, Name, Object, RangeName, folder};
use super::records::{self, Manifest, PackRef, PartRef, WalRangeNote};
use super::repository::{Repository, name_of};
use super::weak::own_name;
use super::writer::segment_name;
use crate::seal::{
    Binding, Footer, Header, Kind, MAX_EXTRA, MAX_FRAME, Opener, Part, SealError, Span, TailContent, open_tail,
    peek_tail_prelude,
};
use crate::store::{ObjectMeta, list_all};
use crate::types::{Branch, ClusterId, Digest, Id128, Lsn, PgTimestamp, SegmentNumber, SegmentSize, TimelineHistory};

/// How often a segment is listed anew when something listed was gone.
const TRIES: usize = 4;
/// Pieces that are fetched ahead while a segment is joined; each is at most 64 MiB and usually far smaller.
const AHEAD: usize = 4;
/// Enough of a tail to read its note.
pub(super) const PRELUDE_GUESS: u64 = 8 << 10;
/// Frames that a sequential reader fetches with one request.
const FRAMES_AT_ONCE: u32 = 8;

/// A segment as far as the repository holds it from its first byte on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SegmentBytes {
    /// The bytes `[0, end)`. Empty: nothing of this segment is there from its first byte on.
    pub bytes: Vec<u8>,
    /// All of the segment.
    pub complete: bool,
    /// The objects that were read.
    pub sources: Vec<String>,
    /// Objects that do not open, and were not needed.
    pub damaged: Vec<DamagedObject>,
    /// Pieces lie behind a hole: there is more of this segment than `bytes`.
    pub more_behind: bool,
    /// Offset in the segment up to which any piece reaches by its name.
    pub listed_to: u32,
    /// The content keys that opened what was read.
    pub keys: BTreeSet<Id128>,
}

/// A piece of WAL as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub name: Name,
    pub from: u32,
    /// `None`: a tail, whose end only opening tells.
    pub to: Option<u32>,
    pub len: u64,
}

impl Piece {
    pub fn is_tail(&self) -> bool {
        self.to.is_none()
    }

    pub fn from_listed(object: &ObjectMeta) -> Option<Piece> {
        let name = Name::parse(object.key.as_str()).ok()?;
        let (from, to) = match &name.object {
            Object::Of(_, ClusterObject::Wal(_, range) | ClusterObject::Open(_, range)) => {
                (range.from(), Some(range.to()))
            }
            Object::Of(_, ClusterObject::Tail(_, _, from)) => (*from, None),
            _ => return None,
        };
        Some(Piece { name, from, to, len: object.len })
    }
}

/// What is listed of one segment.
#[derive(Debug, Clone, Default)]
pub(super) struct SegmentPieces {
    pub wal: Vec<Piece>,
    pub open: Vec<Piece>,
}

impl SegmentPieces {
    /// The objects that make up the complete segment, in order; originals before copies.
    pub fn complete(&self, size: SegmentSize) -> Option<Vec<Piece>> {
        let (mut at, mut whole) = (0, Vec::new());
        while u64::from(at) < size.bytes() {
            let next = self.wal.iter().filter(|piece| piece.from == at);
            let next = next.max_by_key(|piece| (piece.to, Reverse(piece.name.copy.clone())))?;
            at = next.to?;
            whole.push(next.clone());
        }
        (u64::from(at) == size.bytes()).then_some(whole)
    }
}

/// Copies of one object, the original first.
pub(super) type Group = Vec<Piece>;

pub(super) fn group(pieces: impl IntoIterator<Item = Piece>) -> Vec<Group> {
    let mut groups: BTreeMap<Name, Group> = BTreeMap::new();
    for piece in pieces {
        // Tails that share a beginning were written by several runs and end in several places: each counts.
        let copy = piece.name.copy.clone().filter(|_| piece.is_tail());
        groups.entry(Name { object: piece.name.object.clone(), copy }).or_default().push(piece);
    }
    let mut groups: Vec<Group> = groups.into_values().collect();
    groups.iter_mut().for_each(|group| group.sort_by(|a, b| a.name.cmp(&b.name)));
    // By first byte; the longest first, so that what it contains needs no reading. Tails last: ranges can be checked whole.
    groups.sort_by_key(|group| group.first().map(|piece| (piece.from, Reverse(piece.to.unwrap_or(0)))));
    groups
}

/// A piece that was read.
struct Content {
    name: Name,
    note: WalRangeNote,
    key: Option<Id128>,
    /// `None`: contained in another by its name, so only the note was read.
    bytes: Option<Vec<u8>>,
    /// A tail in which something that was durable does not open; its bytes are what lies before.
    damage: Option<String>,
}

/// What reading one group of copies gave.
enum Fetched {
    Content(Box<Content>),
    /// A tail that a crash left before its first append.
    Nothing,
    /// No copy opens.
    Damaged {
        name: Name,
        error: CatalogError,
    },
}

struct Joined {
    joiner: Joiner,
    sources: Vec<Name>,
    keys: BTreeSet<Id128>,
    damaged: Vec<(Name, Option<u32>, CatalogError)>,
    more_behind: bool,
}

/// What was read of an ancestor, up to the fork.
struct Base {
    bytes: Vec<u8>,
    sources: Vec<String>,
    keys: BTreeSet<Id128>,
}

impl Repository {
    // ---- WAL

    pub(super) async fn list_segment(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
    ) -> Result<SegmentPieces, CatalogError> {
        let segment = segment_name(branch, segment, size)?;
        let (wal, open) =
            (folder::wal_segment(cluster, branch, segment), folder::open_segment(cluster, branch, segment));
        let store = self.store().as_ref();
        // Open first: a piece that is removed in between has its whole in the second listing.
        let open = list_all(store, &open).await.map_err(|source| self.in_store(source))?;
        let wal = list_all(store, &wal).await.map_err(|source| self.in_store(source))?;
        let pieces = SegmentPieces {
            wal: wal.iter().filter_map(Piece::from_listed).collect(),
            open: open.iter().filter_map(Piece::from_listed).collect(),
        };
        let beyond = |piece: &&Piece| u64::from(piece.to.unwrap_or(piece.from)) > size.bytes();
        if let Some(piece) = pieces.wal.iter().chain(&pieces.open).find(beyond) {
            let (repository, name) = (self.name().to_owned(), piece.name.to_string());
            return Err(CatalogError::SegmentSize { repository, name, size });
        }
        Ok(pieces)
    }

    /// Reads a segment of a branch from its first byte on, as far as it goes without a hole. Holds it in memory.
    ///
    /// `path` is the branch's ancestry, if it is known: where the branch forked off within this segment and its own
    /// pieces begin behind the segment's start, the ancestor's bytes before the fork are put in front, if digests agree.
    ///
    /// # Errors
    /// [`CatalogError::Disagreement`]; [`CatalogError::Sealed`] naming an object that is needed and does not open;
    /// [`CatalogError::Vanished`]; what the store says.
    pub async fn read_segment(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
        path: Option<&TimelineHistory>,
    ) -> Result<SegmentBytes, CatalogError> {
        let mut vanished = None;
        for _ in 0..TRIES {
            match self.try_read_segment(cluster, branch, segment, size, path).await {
                Err(error) if error.is_not_found() => vanished = Some(error),
                result => return result,
            }
        }
        let name = vanished.map_or_else(String::new, |error| error.to_string());
        Err(CatalogError::Vanished { repository: self.name().to_owned(), name })
    }

    async fn try_read_segment(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
        path: Option<&TimelineHistory>,
    ) -> Result<SegmentBytes, CatalogError> {
        let pieces = self.list_segment(cluster, branch, segment, size).await?;
        let listed = pieces.wal.iter().chain(&pieces.open).map(|piece| piece.to.unwrap_or(piece.from));
        let listed_to = listed.max().unwrap_or(0);
        if pieces.complete(size).is_some() {
            // Whoever put it whole has compared: what is left under `open/` is not asked, unless the whole is damaged.
            let joined = self.join(group(pieces.wal.clone()), None, size).await?;
            if u64::from(joined.joiner.at()) == size.bytes() {
                return self.finish(joined, None, size, listed_to);
            }
        }
        let all: Vec<Piece> = pieces.wal.into_iter().chain(pieces.open).collect();
        let base = match path {
            Some(path) if !all.is_empty() && all.iter().all(|piece| piece.from > 0) => {
                self.read_base(cluster, branch, segment, size, path).await?
            }
            _ => None,
        };
        let joined = self.join(group(all), base.as_ref(), size).await?;
        self.finish(joined, base, size, listed_to)
    }

    /// The bytes before the fork from the branch that was left there, if the fork lies within this segment.
    async fn read_base(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
        path: &TimelineHistory,
    ) -> Result<Option<Base>, CatalogError> {
        let Some(fork) = path.ancestors().last() else { return Ok(None) };
        let offset = fork.left_at.segment_offset(size);
        if path.timeline() != branch.timeline || fork.left_at.segment(size) != segment || offset == 0 {
            return Ok(None);
        }
        let ancestors = self.get_history_of(cluster, branch).await?.map(|(_, ancestors)| ancestors);
        let parent = ancestors.unwrap_or_default().branch(fork.timeline);
        let its_path = path.ancestor_history(fork.timeline);
        let read = Box::pin(self.read_segment(cluster, parent, segment, size, its_path.as_ref())).await?;
        let mut bytes = read.bytes;
        bytes.truncate(usize::try_from(offset).unwrap_or(usize::MAX));
        Ok(Some(Base { bytes, sources: read.sources, keys: read.keys }))
    }

    fn finish(
        &self,
        joined: Joined,
        base: Option<Base>,
        size: SegmentSize,
        listed_to: u32,
    ) -> Result<SegmentBytes, CatalogError> {
        let at = joined.joiner.at();
        let complete = u64::from(at) == size.bytes();
        let mut damaged = Vec::new();
        for (name, to, error) in joined.damaged {
            // Bytes that only a damaged object holds are not "not there".
            if !complete && to.is_none_or(|to| to > at) {
                return Err(error);
            }
            tracing::warn!(object = %name, error = %error, "an object does not open; reading goes on without it");
            damaged.push(DamagedObject { name: name.to_string(), reason: error.to_string() });
        }
        let (mut sources, mut keys) = base.map(|base| (base.sources, base.keys)).unwrap_or_default();
        keys.extend(joined.keys);
        sources.extend(joined.sources.iter().map(Name::to_string));
        let (more_behind, bytes) = (joined.more_behind, joined.joiner.into_bytes());
        Ok(SegmentBytes { bytes, complete, sources, damaged, more_behind, listed_to, keys })
    }

    async fn join(&self, groups: Vec<Group>, base: Option<&Base>, size: SegmentSize) -> Result<Joined, CatalogError> {
        let borders = groups.iter().flatten().flat_map(|piece| [Some(piece.from), piece.to]).flatten();
        let joiner = Joiner::new(borders);
        let (sources, keys, damaged) = (Vec::new(), BTreeSet::new(), Vec::new());
        let mut joined = Joined { joiner, sources, keys, damaged, more_behind: false };
        if let Some(base) = base {
            // invariant: an empty joiner takes anything at 0 whose digest before is that of nothing
            let _ = joined.joiner.take(0, &base.bytes, &Digest::of(b""), None);
        }
        // What a range before it contains by name is checked by its note and not read.
        let mut reach = 0;
        let planned = groups.into_iter().map(|group| {
            let to = group.first().and_then(|piece| piece.to);
            let contained = to.is_some_and(|to| to <= reach);
            reach = reach.max(to.unwrap_or(0));
            (group, contained)
        });
        let planned: Vec<(Group, bool)> = planned.collect();
        let mut rest = stream::iter(planned)
            .map(|(group, contained)| async move {
                let (from, to) = group.first().map_or((0, None), |piece| (piece.from, piece.to));
                let fetched = self.fetch(&group, contained).await;
                (from, to, group, fetched)
            })
            .buffered(AHEAD);
        while u64::from(joined.joiner.at()) < size.bytes() {
            let Some((from, to, group, mut fetched)) = rest.next().await else { break };
            if from > joined.joiner.at() {
                joined.more_behind = true;
                break;
            }
            if to.is_some_and(|to| to > joined.joiner.at())
                && matches!(&fetched, Ok(Fetched::Content(c)) if c.bytes.is_none())
            {
                fetched = self.fetch(&group, false).await; // what contains it did not open
            }
            let content = match fetched? {
                Fetched::Content(content) => *content,
                Fetched::Nothing => continue,
                Fetched::Damaged { name, error } => {
                    joined.damaged.push((name, to, error));
                    continue;
                }
            };
            self.take(&mut joined, from, to, content)?;
        }
        drop(rest);
        Ok(joined)
    }

    fn take(&self, joined: &mut Joined, from: u32, to: Option<u32>, content: Content) -> Result<(), CatalogError> {
        let Content { name, note, key, bytes, damage } = content;
        let agrees = match (&bytes, to, &note.digest_to) {
            (Some(bytes), _, digest_to) => {
                let longer = joined.joiner.at() < from.saturating_add(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
                let taken = joined.joiner.take(from, bytes, &note.digest_from, digest_to.as_ref()).is_ok();
                if taken && longer {
                    joined.sources.push(name.clone());
                    joined.keys.extend(key);
                }
                taken
            }
            (None, Some(to), Some(digest_to)) => {
                joined.joiner.is_digest_at(from, &note.digest_from) == Some(true)
                    && joined.joiner.is_digest_at(to, digest_to) == Some(true)
            }
            (None, ..) => return Err(self.inconsistent(&name, "its note lacks the digest of its end")),
        };
        if !agrees {
            let other = joined.sources.last().map_or_else(|| "its ancestor's WAL".to_owned(), Name::to_string);
            let (repository, name) = (self.name().to_owned(), name.to_string());
            return Err(CatalogError::Disagreement { repository, name, other });
        }
        if let Some(reason) = damage {
            let error = self.inconsistent(&name, reason);
            joined.damaged.push((name, None, error));
        }
        Ok(())
    }

    /// Reads the first copy that opens.
    async fn fetch(&self, group: &[Piece], contained: bool) -> Result<Fetched, CatalogError> {
        self.agree(group).await?;
        let mut damaged = None;
        for piece in group {
            let read = if contained {
                let note = self.note_of(piece).await;
                note.map(|note| Content { name: piece.name.clone(), note, key: None, bytes: None, damage: None })
            } else if piece.is_tail() {
                match self.open_tail_piece(piece).await {
                    Ok(None) => return Ok(Fetched::Nothing),
                    Ok(Some((note, tail, key))) => {
                        let (bytes, damage) = (Some(tail.plaintext), tail.damage);
                        Ok(Content { name: piece.name.clone(), note, key, bytes, damage })
                    }
                    Err(error) => Err(error),
                }
            } else {
                self.open_range_piece(piece).await
            };
            match read {
                Ok(content) => return Ok(Fetched::Content(Box::new(content))),
                Err(error) if error.is_damage() => damaged = damaged.or(Some((piece.name.clone(), error))),
                Err(error) => return Err(error),
            }
        }
        Ok(damaged.map_or(Fetched::Nothing, |(name, error)| Fetched::Damaged { name, error }))
    }

    async fn open_range_piece(&self, piece: &Piece) -> Result<Content, CatalogError> {
        let bytes = self.get_bytes(&piece.name, None).await?;
        let key = Header::parse(&bytes).ok().and_then(|header| header.key_id());
        let (plaintext, note) = self.open_bytes(&piece.name, Kind::WalRange, bytes).await?;
        let note: WalRangeNote = records::from_json(&note).map_err(|source| self.record(&piece.name, source))?;
        let named = u64::from(piece.to.unwrap_or(piece.from).saturating_sub(piece.from));
        if plaintext.len() as u64 != named {
            let reason = format!("it holds {} bytes and its name says {named}", plaintext.len());
            return Err(self.inconsistent(&piece.name, reason));
        }
        Ok(Content { name: piece.name.clone(), note, key, bytes: Some(plaintext), damage: None })
    }

    /// A tail's note and content, and the content key that opened it; `None` for one that a crash left before its first append.
    pub(super) async fn open_tail_piece(
        &self,
        piece: &Piece,
    ) -> Result<Option<(WalRangeNote, TailContent, Option<Id128>)>, CatalogError> {
        let bytes = self.get_bytes(&piece.name, None).await?;
        if !holds_frames(&bytes) {
            // Nothing was ever confirmed of it, so a start that does not open is what a crash left, and no damage.
            return match self.open_tail_bytes(piece, bytes).await {
                Ok(opened) => Ok(Some(opened)),
                Err(CatalogError::Sealed { source, .. }) if is_torn_start(&source) => Ok(None),
                Err(error) => Err(error),
            };
        }
        self.open_tail_bytes(piece, bytes).await.map(Some)
    }

    async fn open_tail_bytes(
        &self,
        piece: &Piece,
        bytes: Bytes,
    ) -> Result<(WalRangeNote, TailContent, Option<Id128>), CatalogError> {
        let sealed = |source| self.sealed(&piece.name, source);
        let header = Header::parse(&bytes).map_err(sealed)?;
        let bound = piece.name.object.to_string();
        Opener::new(&header, self.meta_key(), None, &self.binding(Kind::WalTail, &bound)).map_err(sealed)?;
        let content = self.key_for(&header).await?;
        let (meta, realm) = (self.meta_key().clone(), self.realm());
        let open = move || {
            let binding = Binding { realm, repository: None, kind: Kind::WalTail, name: &bound };
            open_tail(&meta, content.as_ref(), &binding, &bytes)
        };
        let tail = self.off_thread(open).await?.map_err(sealed)?;
        let note = records::from_json(&tail.prelude).map_err(|source| self.record(&piece.name, source))?;
        Ok((note, tail, header.key_id()))
    }

    /// The note of a piece of WAL, without its frames.
    pub(super) async fn note_of(&self, piece: &Piece) -> Result<WalRangeNote, CatalogError> {
        let json = if piece.is_tail() {
            let bound = piece.name.object.to_string();
            let binding = self.binding(Kind::WalTail, &bound);
            let mut start = self.get_bytes(&piece.name, Some(0..PRELUDE_GUESS)).await?;
            if let Err(SealError::Cut { .. }) = peek_tail_prelude(self.meta_key(), &binding, &start) {
                let most = (Header::LEN + MAX_EXTRA + 64) as u64;
                start = self.get_bytes(&piece.name, Some(0..most)).await?;
            }
            peek_tail_prelude(self.meta_key(), &binding, &start).map_err(|source| self.sealed(&piece.name, source))?
        } else {
            self.get_footer(&piece.name, Kind::WalRange, piece.len).await?.1.extra
        };
        records::from_json(&json).map_err(|source| self.record(&piece.name, source))
    }

    /// What the archiver noted of a complete segment: the server's clock when its last byte was sent, and how far the
    /// server's WAL reached then. `None` where it is not complete, does not open, or was not streamed.
    ///
    /// # Errors
    /// What the store says.
    pub async fn noted_of(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
    ) -> Result<Option<(PgTimestamp, Lsn)>, CatalogError> {
        let pieces = self.list_segment(cluster, branch, segment, size).await?;
        let last = pieces.complete(size).and_then(|whole| whole.last().cloned());
        let Some(last) = last else { return Ok(None) };
        match self.note_of(&last).await {
            Ok(note) => Ok(note.server_time.zip(note.server_end)),
            Err(error) if error.is_damage() || error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    // ---- files and records

    /// A branch's history file; `None` where there is none.
    ///
    /// # Errors
    /// Damage that names the object; what the store says.
    pub async fn get_history(&self, cluster: &ClusterId, branch: Branch) -> Result<Option<Bytes>, CatalogError> {
        self.get_file(cluster, ClusterObject::History(branch)).await
    }

    /// A kept `.partial` or `.backup` file; `None` where there is none.
    ///
    /// # Errors
    /// Damage that names the object; what the store says.
    pub async fn get_wal_file(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        file: &KeptFile,
    ) -> Result<Option<Bytes>, CatalogError> {
        self.get_file(cluster, ClusterObject::WalFile(branch, file.clone())).await
    }

    async fn get_file(&self, cluster: &ClusterId, object: ClusterObject) -> Result<Option<Bytes>, CatalogError> {
        let kind = kind_of(&object);
        match self.get_object(&name_of(cluster, object), kind).await {
            Ok(opened) => Ok(Some(opened.plaintext.into())),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The text of every history file.
    ///
    /// # Errors
    /// Damage that names the object; what the store says.
    pub async fn histories(&self, cluster: &ClusterId) -> Result<BTreeMap<Branch, Bytes>, CatalogError> {
        let listed = list_all(self.store().as_ref(), &folder::histories(cluster)).await;
        let mut texts = BTreeMap::new();
        for object in listed.map_err(|source| self.in_store(source))? {
            let Ok(name) = Name::parse(object.key.as_str()) else { continue };
            let Object::Of(_, ClusterObject::History(branch)) = name.object else { continue };
            if texts.contains_key(&branch) {
                continue; // a copy of one that was read
            }
            if let Some(text) = self.get_history(cluster, branch).await? {
                texts.insert(branch, text);
            }
        }
        Ok(texts)
    }

    /// A base backup's manifest, whole.
    ///
    /// # Errors
    /// [`CatalogError::is_not_found`]: no such backup; damage that names the object.
    pub async fn get_manifest(
        &self,
        cluster: &ClusterId,
        label: crate::types::BackupLabel,
    ) -> Result<Manifest, CatalogError> {
        let manifest: Manifest = self.get_record(cluster, ClusterObject::Manifest(label)).await?;
        if manifest.backup.label != label {
            let name = name_of(cluster, ClusterObject::Manifest(label));
            return Err(self.inconsistent(&name, format!("it is the manifest of {}", manifest.backup.label)));
        }
        Ok(manifest)
    }

    // ---- frames by range

    /// Opens a pack that a manifest references: one request for its footer, then one per range.
    ///
    /// # Errors
    /// Damage that names the object; what the store says.
    pub async fn open_pack(&self, cluster: &ClusterId, pack: &PackRef) -> Result<ObjectReader, CatalogError> {
        let name = name_of(cluster, ClusterObject::Pack(pack.pack));
        let header = Header::parse(&pack.header).map_err(|source| self.sealed(&name, source))?;
        // The header tells the name that it has where names are shared.
        let own = self.names_are_shared().then(|| own_name(&name, &pack.header));
        let reader = self.open_reader(name, own, Kind::Pack, pack.len, Some(header)).await?;
        if reader.plaintext_len() != pack.plaintext_len {
            return Err(self.inconsistent(&reader.name, "it does not hold what the manifest says"));
        }
        Ok(reader)
    }

    /// Opens a piece of a table, to be read from its start on.
    ///
    /// # Errors
    /// Damage that names the object; what the store says.
    pub async fn open_part(&self, cluster: &ClusterId, part: &PartRef) -> Result<ObjectReader, CatalogError> {
        let object = ClusterObject::Part(part.part);
        let kind = kind_of(&object);
        self.open_reader(name_of(cluster, object), None, kind, part.len, None).await
    }

    /// The first of an object and its copies whose header and footer open. `own`: the copy to try first.
    pub(super) async fn open_reader(
        &self,
        name: Name,
        own: Option<Name>,
        kind: Kind,
        len: u64,
        header: Option<Header>,
    ) -> Result<ObjectReader, CatalogError> {
        let tried = own.unwrap_or_else(|| name.clone());
        let mut first = match self.open_reader_at(tried.clone(), kind, len, header.clone()).await {
            Err(error) if error.is_damage() || error.is_not_found() => error,
            result => return result,
        };
        for (copy, _) in self.names_of(&name.object).await?.into_iter().filter(|(copy, _)| *copy != tried) {
            match self.open_reader_at(copy, kind, len, header.clone()).await {
                // An object of which only a broken copy is there is not missing.
                Err(error) if error.is_damage() && first.is_not_found() => first = error,
                Err(error) if error.is_damage() || error.is_not_found() => {}
                result => return result,
            }
        }
        Err(first)
    }

    pub(super) async fn open_reader_at(
        &self,
        name: Name,
        kind: Kind,
        len: u64,
        header: Option<Header>,
    ) -> Result<ObjectReader, CatalogError> {
        let (header, footer) = match header {
            None => self.get_footer(&name, kind, len).await?,
            Some(header) => {
                let footer = self.get_footer_under(&name, kind, &header, len).await?;
                (header, footer)
            }
        };
        let content = self.key_for(&header).await?;
        let bound = name.object.to_string();
        let opener = Opener::new(&header, self.meta_key(), content.as_ref(), &self.binding(kind, &bound));
        let opener = std::sync::Arc::new(opener.map_err(|source| self.sealed(&name, source))?);
        Ok(ObjectReader { repository: self.clone(), name, opener, footer: footer.into(), next_frame: 0 })
    }
}

/// Where the time of a read went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadTimes {
    /// Waiting for the store.
    pub fetch: Duration,
    /// Opening what came.
    pub open: Duration,
}

/// Reads an object's plaintext by range, or from its start on. Every range is one request.
#[derive(Debug, Clone)]
pub struct ObjectReader {
    repository: Repository,
    name: Name,
    opener: std::sync::Arc<Opener>,
    footer: std::sync::Arc<Footer>,
    next_frame: u32,
}

impl ObjectReader {
    /// Its name below the repository's root.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Bytes of plaintext.
    pub fn plaintext_len(&self) -> u64 {
        self.footer.plaintext_len
    }

    /// The object's header.
    /// Id of the content key that opens it.
    pub fn key_id(&self) -> Option<Id128> {
        self.header().key_id()
    }

    pub(super) fn header(&self) -> &Header {
        self.opener.header()
    }

    /// What the footer says besides.
    pub fn note(&self) -> &Bytes {
        &self.footer.extra
    }

    /// The plaintext of a range. Frames are opened whole, so ask for ranges that share frames together.
    ///
    /// # Errors
    /// Damage that names the object; [`CatalogError::Misuse`] beyond its end; what the store says.
    pub async fn read(&self, range: Range<u64>) -> Result<Vec<u8>, CatalogError> {
        self.read_timed(range).await.map(|(bytes, _)| bytes)
    }

    /// [`ObjectReader::read`], and where its time went.
    ///
    /// # Errors
    /// As [`ObjectReader::read`].
    pub async fn read_timed(&self, range: Range<u64>) -> Result<(Vec<u8>, ReadTimes), CatalogError> {
        let span = self.footer.span(range.clone()).ok_or_else(|| CatalogError::Misuse {
            name: self.name.to_string(),
            reason: format!("bytes {} to {} of {} were asked for", range.start, range.end, self.footer.plaintext_len),
        })?;
        let damage = match self.read_at(&self.name, &span).await {
            Err(error) if error.is_damage() => error,
            read => return read,
        };
        // A copy has the same bytes: the same header and footer serve for it.
        for copy in self.repository.copies_of(&self.name).await? {
            match self.read_at(&copy, &span).await {
                Ok(read) => {
                    tracing::warn!(object = %self.name, %copy, error = %damage, "read from a copy");
                    return Ok(read);
                }
                Err(error) if error.is_damage() || error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Err(damage)
    }

    async fn read_at(&self, name: &Name, span: &Span) -> Result<(Vec<u8>, ReadTimes), CatalogError> {
        let begun = Instant::now();
        let bytes = self.repository.get_bytes(name, Some(span.bytes.clone())).await?;
        let fetched = Instant::now();
        let (opener, footer, span) = (self.opener.clone(), self.footer.clone(), span.clone());
        let opened = self.repository.off_thread(move || opener.open_span(&footer, &span, &bytes)).await?;
        let bytes = opened.map_err(|source| self.repository.sealed(name, source))?;
        Ok((bytes, ReadTimes { fetch: fetched - begun, open: fetched.elapsed() }))
    }

    /// The next bytes from the start on, some MiB at a time; `None` at the end.
    ///
    /// # Errors
    /// As [`ObjectReader::read`].
    pub async fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, CatalogError> {
        let frame = MAX_FRAME as u64;
        let from = u64::from(self.next_frame) * frame;
        if from >= self.footer.plaintext_len {
            return Ok(None);
        }
        let to = (from + u64::from(FRAMES_AT_ONCE) * frame).min(self.footer.plaintext_len);
        let chunk = self.read(from..to).await?;
        self.next_frame = self.next_frame.saturating_add(FRAMES_AT_ONCE);
        Ok(Some(chunk))
    }
}

/// Whether anything but zeros follows a tail's header and prelude: what an append may have confirmed.
fn holds_frames(bytes: &[u8]) -> bool {
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let prelude = bytes.get(Header::LEN..).and_then(|rest| rest.first_chunk::<4>());
    // The prelude's frame header: bits 0 to 23 are its sealed length. Where the header itself is torn it reads 0.
    let sealed_len = prelude.map_or(0, |header| u32::from_le_bytes(*header) & 0x00FF_FFFF);
    used > (Header::LEN + 4).saturating_add(usize::try_from(sealed_len).unwrap_or(usize::MAX))
}

/// What a crash during a tail's very first write leaves.
fn is_torn_start(error: &SealError) -> bool {
    matches!(
        error,
        SealError::NotSealed
            | SealError::Cut { .. }
            | SealError::Damaged { part: Part::Header | Part::Prelude, .. }
            | SealError::UnknownVersion { version: 0 }
    )
}

/// The range that a piece's name tells.
pub(super) fn range_of(name: &Name) -> Option<RangeName> {
    match &name.object {
        Object::Of(_, ClusterObject::Wal(_, range) | ClusterObject::Open(_, range)) => Some(*range),
        _ => None,
    }
}
