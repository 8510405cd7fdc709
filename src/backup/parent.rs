//! The parent of a base backup: an earlier one of the same cluster, with whose blocks those that arrive are compared.
//!
//! The parent's file table is read through once before the backup begins, and of each file it is remembered where its
//! line and its tags are. When a file arrives, its line and its tags are read again, piece by piece as it streams by: the
//! server sends files in the order of its directories, which is the parent's order mostly, so mostly each piece is read
//! once and in turn, and the next one is fetched ahead. Where it is not (another server, another file system), files are
//! looked up in any order; what that costs is bounded: pieces of at most half the bytes that arrived are read in
//! all, and a file for which that does not suffice is stored whole.
//!
//! What always holds:
//! - Memory: about 50 bytes for each file of the parent, 250 for each of its packs (which are of 32 MiB) and pieces,
//!   [`CACHED`] bytes of pieces, and the extents of the one file that arrives (P8).
//! - Only packs are referenced that the parent's manifest names and that were listed, with their length, after the
//!   `start` that pins them was put.
//! - What does not fit together is no reason to guess: the parent is left aside then, from there on, by [`Parent::leave`].
//!   What was referenced by then stays right: it was compared by its tag, and its pack is there.
//!
//! Cancellation: nothing is written here.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use futures_util::stream::{self, StreamExt};
use tokio_util::task::AbortOnDropHandle;

use super::BackupError;
use super::cut::{BLOCK, KnownExtent};
use super::reclaim;
use super::tags::{self, TAG};
use crate::catalog::layout::{PackName, PartKind};
use crate::catalog::records::{Manifest, PackRef, PartRef};
use crate::catalog::retention::Condemned;
use crate::catalog::table::{FileEntry, FileKind, ListedFile, TableError, TablePiece};
use crate::catalog::{CatalogError, Repository};
use crate::types::{BackupLabel, ClusterId, Digest};

/// Pieces of the table that are read at a time, before the backup begins.
const AT_ONCE: usize = 4;
/// Bytes of pieces that are kept, the latest.
const CACHED: usize = 24 << 20;
/// No piece is longer: one holds at most a line of 32 MiB besides its own 4.
const MAX_PIECE: u64 = 64 << 20;
/// Bytes of pieces that may be read whatever arrived.
const FREE: u64 = 64 << 20;
/// How many of the newest backups are looked at for a sound one.
const CANDIDATES: usize = 8;

/// With which backup blocks are compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ParentChoice {
    /// The newest sound one of the cluster, of whatever branch.
    #[default]
    Newest,
    /// This one.
    Label(BackupLabel),
    /// With none: everything is stored.
    Full,
}

/// Why a parent is of no use, or no longer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ParentError {
    #[error(transparent)]
    Repository(#[from] CatalogError),
    #[error("{name}: {source}")]
    Table { name: String, source: TableError },
    #[error("{name}: {reason}")]
    Unfit { name: String, reason: String },
}

impl ParentError {
    fn unfit(part: &PartRef, reason: impl Into<String>) -> ParentError {
        ParentError::Unfit { name: part.part.to_string(), reason: reason.into() }
    }
}

/// The manifest of the parent that is asked for. `None`: there is none, or none is wanted.
///
/// # Errors
/// [`BackupError::NoParent`], [`BackupError::ParentUnreadable`]: only of one that was asked for by name. What the
/// repository says.
pub(super) async fn choose(
    repository: &Repository,
    cluster: &ClusterId,
    choice: ParentChoice,
) -> Result<Option<Manifest>, BackupError> {
    match choice {
        ParentChoice::Full => return Ok(None),
        ParentChoice::Label(label) => {
            return match repository.get_manifest(cluster, label).await {
                Ok(manifest) => Ok(Some(manifest)),
                Err(error) if error.is_not_found() => Err(BackupError::NoParent { label }),
                Err(source) if source.is_damage() => Err(BackupError::ParentUnreadable { label, source }),
                Err(error) => Err(error.into()),
            };
        }
        ParentChoice::Newest => {}
    }
    // What is condemned by now is no parent; after the start was put, `Parent::open` asks again.
    let condemned = match repository.condemned(cluster).await? {
        Condemned::These(labels) => labels,
        Condemned::Unknown(name) => {
            tracing::warn!(%cluster, "{name} is not understood, and may condemn any backup: there is no parent");
            return Ok(None);
        }
    };
    let labels = repository.backup_labels(cluster).await?.into_iter().rev();
    for label in labels.filter(|label| !condemned.contains(label)).take(CANDIDATES) {
        match repository.get_manifest(cluster, label).await {
            // One without tags came from another realm: nothing can be compared with it.
            Ok(manifest) if manifest.backup.flagged.is_none() && !manifest.tags.is_empty() => {
                return Ok(Some(manifest));
            }
            Ok(_) => {}
            Err(error) if error.is_not_found() => {} // removed in this moment, or never there: its copies are not it
            Err(error) if error.is_damage() || !error.is_retryable() => {
                tracing::warn!(%cluster, %label, %error, "this base backup is left aside as a parent");
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// A pack that the parent names.
#[derive(Debug)]
struct Pack {
    named: PackRef,
    standing: Standing,
    /// Bytes of it that this backup references.
    live: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Is referenced.
    Good,
    /// Is to become empty: what is left in it is stored again.
    Again,
    /// Is not there.
    Gone,
}

/// Where a file's line and tags are.
#[derive(Debug, Clone, Copy)]
struct Place {
    piece: u32,
    at: u32,
    /// Number of its first block, counted through all of the parent's tags.
    first: u64,
}

/// A file of the parent.
#[derive(Debug)]
pub(super) struct ParentFile {
    pub path: String,
    pub size: u64,
    pub crc32c: Option<u32>,
    /// By offset; only bytes in packs that are there.
    pub extents: Vec<KnownExtent>,
    first: u64,
}

impl ParentFile {
    /// Blocks, each of which has a tag.
    pub fn blocks(&self) -> u64 {
        blocks(self.size)
    }
}

fn blocks(size: u64) -> u64 {
    size.div_ceil(BLOCK as u64)
}

/// A piece in memory.
#[derive(Debug, Clone)]
enum Piece {
    Table(Arc<TablePiece>),
    Tags(Arc<TagsPiece>),
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Piece::Table(piece) => piece.len(),
            Piece::Tags(piece) => piece.text.len(),
        }
    }
}

#[derive(Debug)]
struct TagsPiece {
    text: Vec<u8>,
    /// Of each entry: its first block, counted in the piece, and where it begins.
    entries: Vec<(u64, usize)>,
}

/// What was loaded: the piece, what it lists if it is of the table, and the digest of all of it.
type Loaded = (Piece, Vec<ListedFile>, Digest);

pub(super) struct Parent {
    repository: Repository,
    cluster: ClusterId,
    label: BackupLabel,
    /// By name.
    packs: Vec<Pack>,
    tables: Vec<PartRef>,
    /// With the number of the first block in each.
    tags: Vec<(u64, PartRef)>,
    files: HashMap<u64, Place>,
    hasher: RandomState,
    /// Pieces that were read, by what is in them.
    pieces: HashMap<Digest, PartRef>,
    /// The latest last.
    cached: VecDeque<(PartKind, usize, Piece)>,
    /// The tags that probably come next.
    ahead: Option<(usize, AbortOnDropHandle<Result<Loaded, ParentError>>)>,
    /// Bytes of pieces that were read for files that arrived.
    loaded: u64,
    /// How many may be whatever arrived.
    pub(super) free: u64,
    left: bool,
}

impl Parent {
    /// Reads through the parent's table. The `start` that names it must be there.
    pub async fn open(
        repository: &Repository,
        cluster: &ClusterId,
        manifest: &Manifest,
    ) -> Result<Parent, ParentError> {
        let label = manifest.backup.label;
        let unfit =
            |reason: &str| ParentError::Unfit { name: format!("base backup {label}"), reason: reason.to_owned() };
        if manifest.tags.is_empty() {
            return Err(unfit("it has no tags of its blocks: it was copied from a repository with another key"));
        }
        match repository.condemned(cluster).await? {
            Condemned::These(labels) if labels.contains(&label) => return Err(unfit("it is condemned by expiry")),
            Condemned::These(_) => {}
            Condemned::Unknown(name) => {
                return Err(unfit(&format!(
                    "{name} is not understood, and may condemn it; a newer pgkeep may read it"
                )));
            }
        }
        let gone = repository.not_there(cluster, manifest, None).await?;
        if let Some(first) = gone.first() {
            let lacks = gone.packs.len() + gone.parts.len();
            tracing::warn!(%cluster, parent = %label, lacks, first, "the parent is not whole: what it lacks is stored again");
        }
        let again = reclaim::stored_again(&manifest.packs, manifest.backup.bytes);
        let standing = |pack: &PackName| match () {
            () if gone.packs.contains(pack) => Standing::Gone,
            () if again.contains(pack) => Standing::Again,
            () => Standing::Good,
        };
        let pack = |named: &PackRef| Pack { named: named.clone(), standing: standing(&named.pack), live: 0 };
        let mut packs: Vec<Pack> = manifest.packs.iter().map(pack).collect();
        packs.sort_by_key(|pack| pack.named.pack);

        let mut first = 0;
        let mut tags = Vec::with_capacity(manifest.tags.len());
        for part in &manifest.tags {
            tags.push((first, part.clone()));
            first += part.entries;
        }
        let mut parent = Parent {
            repository: repository.clone(),
            cluster: cluster.clone(),
            label,
            packs,
            tables: manifest.tables.clone(),
            tags,
            files: HashMap::with_capacity(usize::try_from(manifest.backup.files).unwrap_or(0).min(1 << 24)),
            hasher: RandomState::new(),
            pieces: HashMap::new(),
            cached: VecDeque::new(),
            ahead: None,
            loaded: 0,
            free: FREE,
            left: false,
        };
        let tagged = first;
        let (mut first, tables) = (0, parent.tables.clone());
        let (from, of) = (repository.clone(), cluster.clone());
        let loads = tables.clone().into_iter().map(move |part| load(from.clone(), of.clone(), part));
        let mut loads = stream::iter(loads).buffered(AT_ONCE);
        for (number, part) in tables.iter().enumerate() {
            let Some(loaded) = loads.next().await else { break };
            let (piece, listed, digest) = loaded?;
            if listed.len() as u64 != part.entries {
                return Err(ParentError::unfit(
                    part,
                    format!("lists {} files, and not {}", listed.len(), part.entries),
                ));
            }
            for file in listed {
                let (Ok(piece), Ok(at)) = (u32::try_from(number), u32::try_from(file.at)) else { continue };
                let place = Place { piece, at, first };
                parent.files.entry(parent.hasher.hash_one(&file.path)).or_insert(place);
                first += blocks(file.size);
            }
            parent.pieces.insert(digest, part.clone());
            parent.keep(PartKind::Files, number, piece);
        }
        if first != tagged {
            return Err(unfit(&format!("its table has {first} blocks, and {tagged} have tags")));
        }
        Ok(parent)
    }

    /// Its name.
    pub fn label(&self) -> BackupLabel {
        self.label
    }

    /// From here on nothing is compared with it any more.
    pub fn leave(&mut self, error: &ParentError) {
        let (cluster, label) = (&self.cluster, self.label);
        tracing::warn!(
            %cluster, parent = %label, %error,
            "the parent is left aside from here on: the rest is stored in full, and the backup is as good"
        );
        self.left = true;
        self.ahead = None;
        self.cached.clear();
    }

    /// What it has of a file; `None`: nothing, or looking it up would cost more than storing it. `arrived`: bytes of
    /// files so far, this one's among them.
    pub async fn file(&mut self, path: &str, arrived: u64) -> Result<Option<ParentFile>, ParentError> {
        let Some(Place { piece, at, first }) =
            self.files.get(&self.hasher.hash_one(path)).copied().filter(|_| !self.left)
        else {
            return Ok(None);
        };
        let (piece, at) = (piece as usize, at as usize);
        let at_hand = self.is_cached(PartKind::Files, piece) && self.is_cached(PartKind::Tags, self.tags_with(first));
        if !at_hand && self.loaded > self.free.saturating_add(arrived / 2) {
            return Ok(None);
        }
        let part = self.part(PartKind::Files, piece)?;
        let Piece::Table(table) = self.piece(PartKind::Files, piece).await? else { return Ok(None) };
        let table_error = |source| ParentError::Table { name: part.part.to_string(), source };
        let Some(entry) = table.file_at(at).map_err(table_error)? else { return Ok(None) };
        // Two paths may share a hash; the second of them is not remembered.
        if entry.path != path || entry.kind != FileKind::File {
            return Ok(None);
        }
        let extents = self.usable(&part, &entry)?;
        let FileEntry { path, size, crc32c, .. } = entry;
        Ok(Some(ParentFile { path, size, crc32c, extents, first }))
    }

    /// The extents in packs that are there; refuses a table that does not fit its manifest.
    fn usable(&self, part: &PartRef, entry: &FileEntry) -> Result<Vec<KnownExtent>, ParentError> {
        let mut usable = Vec::with_capacity(entry.extents.len());
        let mut end = 0;
        for extent in &entry.extents {
            let to = extent.offset.checked_add(extent.len).filter(|to| extent.offset >= end && *to <= entry.size);
            let pack = self.packs.binary_search_by_key(&extent.pack, |pack| pack.named.pack).ok();
            let pack = pack.and_then(|index| self.packs.get(index));
            let within =
                |pack: &&Pack| extent.at.checked_add(extent.len).is_some_and(|to| to <= pack.named.plaintext_len);
            let (Some(to), Some(pack)) = (to, pack.filter(within)) else {
                return Err(ParentError::unfit(part, format!("the extents of {:?} are not of its packs", entry.path)));
            };
            end = to;
            if pack.standing != Standing::Gone {
                usable.push(KnownExtent { extent: *extent, again: pack.standing == Standing::Again });
            }
        }
        Ok(usable)
    }

    /// The tags of a file's blocks from `from` on, which is one of its blocks: at least one, 16 bytes each.
    pub async fn tags(&mut self, file: &ParentFile, from: u64) -> Result<Vec<u8>, ParentError> {
        let block = file.first + from;
        let number = self.tags_with(block);
        let part = self.part(PartKind::Tags, number)?;
        let starts = self.tags.get(number).map_or(0, |(first, _)| *first);
        let Piece::Tags(piece) = self.piece(PartKind::Tags, number).await? else { return Ok(Vec::new()) };
        let within = block - starts; // invariant: `tags_with`
        let index = piece.entries.partition_point(|(first, _)| *first <= within).checked_sub(1);
        let entry = index.and_then(|index| {
            let (first, begin) = *piece.entries.get(index)?;
            let end = piece.entries.get(index + 1).map_or(piece.text.len(), |(_, at)| *at);
            let entry = tags::entries(piece.text.get(begin..end)?)?.first().copied()?;
            let skip = within - first;
            let fits = entry.path == file.path && entry.first + skip == from;
            let skip = usize::try_from(skip).ok()?.checked_mul(TAG)?;
            Some(entry.tags.get(skip..)?.to_vec()).filter(|tags| fits && !tags.is_empty())
        });
        entry.ok_or_else(|| {
            ParentError::unfit(&part, format!("block {from} of {:?} is not where it should be", file.path))
        })
    }

    /// Its piece with just this content, if it has been read.
    pub fn same_piece(&self, kind: PartKind, content: &[u8]) -> Option<&PartRef> {
        self.pieces.get(&Digest::of(content)).filter(|part| part.part.kind == kind)
    }

    /// So much of a pack is referenced.
    pub fn reference(&mut self, pack: PackName, bytes: u64) {
        let index = self.packs.binary_search_by_key(&pack, |pack| pack.named.pack).ok();
        if let Some(pack) = index.and_then(|index| self.packs.get_mut(index)) {
            pack.live += bytes;
        }
    }

    /// The packs that are referenced, by name.
    pub fn into_referenced(self) -> Vec<PackRef> {
        let referenced = self.packs.into_iter().filter(|pack| pack.live > 0);
        referenced.map(|pack| PackRef { live: pack.live, ..pack.named }).collect()
    }

    /// The piece of tags that holds this block.
    fn tags_with(&self, block: u64) -> usize {
        self.tags.partition_point(|(first, _)| *first <= block).saturating_sub(1)
    }

    fn part(&self, kind: PartKind, number: usize) -> Result<PartRef, ParentError> {
        let part = match kind {
            PartKind::Tags => self.tags.get(number).map(|(_, part)| part),
            _ => self.tables.get(number),
        };
        let missing = || ParentError::Unfit {
            name: format!("base backup {}", self.label),
            reason: format!("has no piece {number}"),
        };
        part.cloned().ok_or_else(missing)
    }

    fn is_cached(&self, kind: PartKind, number: usize) -> bool {
        self.cached.iter().any(|(of, at, _)| (*of, *at) == (kind, number))
    }

    fn keep(&mut self, kind: PartKind, number: usize, piece: Piece) {
        let mut bytes = piece.len();
        self.cached.push_back((kind, number, piece));
        // From the latest on, as many as there is room for; that one in any case.
        let keep = self.cached.iter().rev().skip(1).take_while(|(_, _, piece)| {
            bytes += piece.len();
            bytes <= CACHED
        });
        let keep = keep.count() + 1;
        self.cached.drain(..self.cached.len() - keep); // invariant: at most all
    }

    async fn piece(&mut self, kind: PartKind, number: usize) -> Result<Piece, ParentError> {
        if let Some(index) = self.cached.iter().position(|(of, at, _)| (*of, *at) == (kind, number))
            && let Some(found) = self.cached.remove(index)
        {
            let piece = found.2.clone();
            self.cached.push_back(found);
            return Ok(piece);
        }
        let part = self.part(kind, number)?;
        let in_turn = number == 0 || self.is_cached(kind, number - 1);
        let ahead = self.ahead.take_if(|(at, _)| kind == PartKind::Tags && *at == number);
        let loaded = match ahead {
            Some((_, ahead)) => ahead
                .await
                .map_err(|error| ParentError::unfit(&part, format!("reading it ended abnormally: {error}")))?,
            None => load(self.repository.clone(), self.cluster.clone(), part.clone()).await,
        };
        let (piece, _, digest) = loaded?;
        if kind == PartKind::Tags {
            if tagged(&piece) != part.entries {
                return Err(ParentError::unfit(
                    &part,
                    format!("has {} tags, and not {}", tagged(&piece), part.entries),
                ));
            }
            if let Some((_, next)) = self.tags.get(number + 1).filter(|_| in_turn) {
                let next = load(self.repository.clone(), self.cluster.clone(), next.clone());
                self.ahead = Some((number + 1, AbortOnDropHandle::new(tokio::spawn(next))));
            }
        }
        self.loaded += piece.len() as u64;
        self.pieces.insert(digest, part);
        self.keep(kind, number, piece.clone());
        Ok(piece)
    }
}

/// Tags in a piece.
fn tagged(piece: &Piece) -> u64 {
    match piece {
        Piece::Tags(piece) => piece.entries.last().map_or(0, |(first, begin)| {
            let last = piece.text.get(*begin..).and_then(tags::entries);
            first + last.and_then(|last| last.first().map(|entry| entry.tags.len() / TAG)).unwrap_or(0) as u64
        }),
        Piece::Table(_) => 0,
    }
}

/// Reads a piece and takes it apart.
async fn load(repository: Repository, cluster: ClusterId, part: PartRef) -> Result<Loaded, ParentError> {
    let mut reader = repository.open_part(&cluster, &part).await?;
    if reader.plaintext_len() > MAX_PIECE {
        return Err(ParentError::unfit(&part, format!("is larger than {MAX_PIECE} bytes")));
    }
    let mut text = Vec::with_capacity(usize::try_from(reader.plaintext_len()).unwrap_or(0));
    while let Some(chunk) = reader.next_chunk().await? {
        text.extend_from_slice(&chunk);
    }
    let name = part.part.to_string();
    let parse = move || {
        let digest = Digest::of(&text);
        if part.part.kind == PartKind::Files {
            let (piece, listed) = TablePiece::parse(text).map_err(|source| ParentError::Table { name, source })?;
            return Ok((Piece::Table(Arc::new(piece)), listed, digest));
        }
        let not_read = || ParentError::unfit(&part, "its entries are not understood");
        let (mut entries, mut first, mut begin) = (Vec::new(), 0, 0);
        for entry in tags::entries(&text).ok_or_else(not_read)? {
            entries.push((first, begin));
            first += (entry.tags.len() / TAG) as u64;
            begin += 4 + entry.path.len() + 8 + 4 + entry.tags.len(); // as `TagsWriter` writes it
        }
        Ok((Piece::Tags(Arc::new(TagsPiece { text, entries })), Vec::new(), digest))
    };
    let parsed = tokio::task::spawn_blocking(parse).await;
    parsed.map_err(|error| ParentError::Unfit { name: "a piece".to_owned(), reason: error.to_string() })?
}
