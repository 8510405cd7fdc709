//! Everything of a cluster that retention judges, in little memory: WAL, packs and pieces one by one with their ages, and who
//! names what.
//!
//! Listed by prefix, the WAL of a branch in several stretches at the same time; read are manifests and records, never an
//! object of data. What lies in memory: 64 bytes for a WAL object, a pack or a piece, 4 for each time that a manifest names
//! one. Names that are not understood are counted and otherwise left alone.
//!
//! Order: backups' folders are listed before packs, so that an object whose manifest came in between only seems to be
//! nobody's; who removes such ones asks twice, with a long time in between.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use jiff::Timestamp;

use super::CatalogError;
use super::inventory::{BranchInventory, ClusterInventory, Place, Run, WalPiece};
use super::layout::{ClusterObject, CopyToken, Name, Object, PackName, PartName, RangeName, SegmentName, folder};
use super::load::{Listed, listed};
use super::records::{BackupStart, Manifest, Record, RecordError};
use super::repository::{Repository, name_of};
use super::retention::{Hold, Lease, RecordedExpiry, Tombstone};
use crate::store::{ListRequest, ObjectMeta, list_folders};
use crate::types::{BackupLabel, Branch, ClusterId, Lsn, SegmentNumber, SegmentSize};

/// Stretches of a branch's WAL that are listed at the same time.
const STRETCHES: usize = 12;
/// Manifests that are read at the same time: one of a large cluster has some MiB.
const MANIFESTS: usize = 6;

/// A WAL object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalObject {
    /// The segment.
    pub segment: SegmentNumber,
    /// Offset of the first byte in the segment.
    pub from: u32,
    /// Offset of the first byte after it; of a tail the same as `from`.
    pub to: u32,
    /// Where it lies.
    pub place: Place,
    /// A copy's token.
    pub token: Option<CopyToken>,
    /// Length of the sealed object.
    pub len: u64,
    /// When it was put, by the store's clock, in seconds.
    pub put_at: i64,
}

impl WalObject {
    /// Its name.
    pub fn name(&self, cluster: &ClusterId, branch: Branch, size: SegmentSize) -> Option<Name> {
        let segment = SegmentName::new(branch.timeline, self.segment, size)?;
        let object = match self.place {
            Place::Wal => ClusterObject::Wal(branch, RangeName::new(segment, self.from, self.to)?),
            Place::Open => ClusterObject::Open(branch, RangeName::new(segment, self.from, self.to)?),
            Place::Tail => ClusterObject::Tail(branch, segment, self.from),
        };
        let mut name = name_of(cluster, object);
        name.copy = self.token.clone();
        Some(name)
    }
}

/// A pack or a piece of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored<N> {
    /// Its name.
    pub name: N,
    /// A copy's token.
    pub token: Option<CopyToken>,
    /// Length of the sealed object.
    pub len: u64,
    /// When it was put, by the store's clock, in seconds.
    pub put_at: i64,
}

/// An index of WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexObject {
    /// Of which branch.
    pub branch: Branch,
    /// First byte.
    pub from: Lsn,
    /// First byte after it.
    pub to: Lsn,
    /// A copy's token.
    pub token: Option<CopyToken>,
    /// Length of the sealed object.
    pub len: u64,
}

impl IndexObject {
    /// Its name.
    pub fn name(&self, cluster: &ClusterId) -> Name {
        let mut name = name_of(cluster, ClusterObject::Index(self.branch, self.from, self.to));
        name.copy = self.token.clone();
        name
    }
}

/// So many objects that are missing are named of one manifest.
pub const ABSENT: usize = 1000;

/// Something that a manifest names and that is not there, or of another length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Absent {
    /// What.
    pub object: ClusterObject,
    /// The length that the manifest says.
    pub len: u64,
    /// The lengths that are there: of it, and of its copies.
    pub found: Vec<u64>,
}

/// What a manifest names, by place in [`Survey::packs`] and [`Survey::parts`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// Packs.
    pub packs: Vec<u32>,
    /// Pieces of tables.
    pub parts: Vec<u32>,
    /// One that is not there, or of another length.
    pub missing: Option<String>,
    /// All of those, [`ABSENT`] at most.
    pub absent: Vec<Absent>,
    /// Backups it was compared with.
    pub parents: Vec<BackupLabel>,
}

impl References {
    fn lacks(&mut self, object: ClusterObject, len: u64, found: impl Iterator<Item = u64>) {
        if self.absent.len() < ABSENT {
            self.absent.push(Absent { object, len, found: found.collect() });
        }
    }
}

/// A base backup that was begun.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Started {
    /// Backups whose packs it may name. `None`: its record does not open, so any.
    pub parents: Option<Vec<BackupLabel>>,
    /// When the newest of its objects was put, by the store's clock, in seconds.
    pub newest: i64,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Survey {
    /// Histories, backups, gaps, and WAL joined into long pieces: good for asking what can be restored.
    pub inventory: ClusterInventory,
    /// WAL objects, by position.
    pub wal: BTreeMap<Branch, Vec<WalObject>>,
    /// Indexes.
    pub indexes: Vec<IndexObject>,
    /// Packs, sorted by name; copies follow each other.
    pub packs: Vec<Stored<PackName>>,
    /// Pieces of tables, likewise.
    pub parts: Vec<Stored<PartName>>,
    /// What each manifest names.
    pub manifests: BTreeMap<BackupLabel, References>,
    /// Every `start`, whatever became of it.
    pub starts: BTreeMap<BackupLabel, Started>,
    /// Backups that were given up, and when, by the store's clock.
    pub tombstones: BTreeMap<BackupLabel, Timestamp>,
    /// Plans of expiry.
    pub expiries: Vec<RecordedExpiry>,
    /// Holds.
    pub holds: Vec<Hold>,
    /// Leases.
    pub leases: Vec<Lease>,
    /// Manifests that do not open: nobody knows what they name.
    pub unreadable: Vec<String>,
    /// Other records of retention that do not open.
    pub odd: Vec<String>,
}

impl Survey {
    /// Nothing yet.
    pub fn new(id: ClusterId) -> Survey {
        Survey {
            inventory: ClusterInventory::new(id),
            wal: BTreeMap::new(),
            indexes: Vec::new(),
            packs: Vec::new(),
            parts: Vec::new(),
            manifests: BTreeMap::new(),
            starts: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            expiries: Vec::new(),
            holds: Vec::new(),
            leases: Vec::new(),
            unreadable: Vec::new(),
            odd: Vec::new(),
        }
    }

    /// Places of a pack and its copies in [`Survey::packs`].
    pub fn places_of_pack(&self, name: PackName) -> std::ops::Range<usize> {
        places(&self.packs, &name)
    }

    /// Places of a piece and its copies in [`Survey::parts`].
    pub fn places_of_part(&self, name: PartName) -> std::ops::Range<usize> {
        places(&self.parts, &name)
    }
}

fn places<N: Ord>(stored: &[Stored<N>], name: &N) -> std::ops::Range<usize> {
    stored.partition_point(|one| one.name < *name)..stored.partition_point(|one| one.name <= *name)
}

/// `[from, to)` as pieces, few and long: what matters is what is there.
pub fn condensed(runs: impl IntoIterator<Item = Run>, size: SegmentSize) -> Vec<WalPiece> {
    let longest = u64::from(u32::MAX) / size.bytes() * size.bytes();
    let mut pieces = Vec::new();
    for run in runs {
        let mut at = run.from;
        while at < run.to {
            let segment = at.segment(size);
            let start = segment.start(size);
            let end = start.advance(longest).min(run.to);
            let offset = |lsn: Lsn| u32::try_from(lsn.bytes_since(start).unwrap_or(0)).unwrap_or(u32::MAX);
            let (from, to) = (offset(at), offset(end));
            pieces.push(WalPiece { segment, from, to, place: Place::Wal, token: None, object_len: 0 });
            at = end;
        }
    }
    pieces
}

/// What of these objects, sorted by position, is there without holes.
pub fn runs_of<'a>(objects: impl IntoIterator<Item = &'a WalObject>, size: SegmentSize) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for object in objects {
        let start = object.segment.start(size);
        let (from, to) = (start.advance(u64::from(object.from)), start.advance(u64::from(object.to)));
        match runs.last_mut() {
            _ if from >= to => {}
            Some(last) if from <= last.to => last.to = last.to.max(to),
            _ => runs.push(Run { from, to }),
        }
    }
    runs
}

impl Repository {
    /// Takes the picture.
    ///
    /// # Errors
    /// What the store says. What does not open is named in the picture.
    pub async fn survey(&self, cluster: &ClusterId) -> Result<Survey, CatalogError> {
        let mut survey = Survey::new(cluster.clone());
        // First of all: what is condemned while this goes on is not known to this picture, and whoever acts on it has put
        // his own plan before.
        let (expiries, odd) = self.expiries(cluster).await?;
        (survey.expiries, survey.odd) = (expiries, odd);
        (survey.holds, survey.leases) = (self.holds(cluster).await?, self.leases(cluster).await?);
        let backups = self.list_under(&folder::backups(cluster)).await?;
        let manifests = self.sort_backups(cluster, &backups, &mut survey).await?;
        let packs = self.list_under(&folder::all_packs(cluster)).await?;
        for meta in packs {
            match Name::parse(meta.key.as_str()) {
                Ok(Name { object: Object::Of(_, ClusterObject::Pack(name)), copy: token }) => {
                    let put_at = meta.modified.as_second();
                    survey.packs.push(Stored { name, token, len: meta.len, put_at });
                    if let Some(started) = survey.starts.get_mut(&name.label) {
                        started.newest = started.newest.max(put_at);
                    }
                }
                _ => survey.inventory.unknown.push(meta.key.to_string()),
            }
        }
        survey.packs.sort_by(|a, b| (a.name, &a.token).cmp(&(b.name, &b.token)));
        survey.parts.sort_by(|a, b| (a.name, &a.token).cmp(&(b.name, &b.token)));
        self.read_manifests(cluster, manifests, &mut survey).await?;
        survey.inventory.segment_size = survey.inventory.backups.last().map(|backup| backup.segment_size);

        let (histories, gaps) = (folder::histories(cluster), folder::gaps(cluster));
        let (histories, gaps) = futures_util::try_join!(self.list_under(&histories), self.list_under(&gaps))?;
        self.load_histories(cluster, &histories, &mut survey.inventory).await?;
        self.load_gaps(cluster, &gaps, &mut survey.inventory).await?;
        for meta in self.list_under(&folder::indexes(cluster)).await? {
            match Name::parse(meta.key.as_str()) {
                Ok(Name { object: Object::Of(_, ClusterObject::Index(branch, from, to)), copy: token }) => {
                    survey.indexes.push(IndexObject { branch, from, to, token, len: meta.len });
                }
                _ => survey.inventory.unknown.push(meta.key.to_string()),
            }
        }
        if let Some(size) = survey.inventory.segment_size {
            self.survey_wal(cluster, size, &mut survey).await?;
        }
        Ok(survey)
    }

    async fn sort_backups(
        &self,
        cluster: &ClusterId,
        objects: &[ObjectMeta],
        survey: &mut Survey,
    ) -> Result<BTreeMap<BackupLabel, Timestamp>, CatalogError> {
        let mut manifests: BTreeMap<BackupLabel, Timestamp> = BTreeMap::new();
        let mut newest: BTreeMap<BackupLabel, i64> = BTreeMap::new();
        for meta in objects {
            let put_at = meta.modified.as_second();
            let label = match Name::parse(meta.key.as_str()) {
                Ok(Name { object: Object::Of(_, ClusterObject::Manifest(label)), .. }) => {
                    manifests.insert(label, meta.modified);
                    label
                }
                Ok(Name { object: Object::Of(_, ClusterObject::Start(label)), .. }) => {
                    survey.starts.entry(label).or_default();
                    label
                }
                Ok(Name { object: Object::Of(_, ClusterObject::Part(name)), copy: token }) => {
                    survey.parts.push(Stored { name, token, len: meta.len, put_at });
                    name.label
                }
                _ => {
                    survey.inventory.unknown.push(meta.key.to_string());
                    continue;
                }
            };
            let newest = newest.entry(label).or_insert(put_at);
            *newest = put_at.max(*newest);
        }
        for (label, started) in &mut survey.starts {
            started.newest = newest.get(label).copied().unwrap_or_default();
        }
        // Those without a manifest: whose packs do they pin?
        let open: Vec<BackupLabel> =
            survey.starts.keys().copied().filter(|label| !manifests.contains_key(label)).collect();
        let mut read =
            stream::iter(open)
                .map(|label| async move {
                    (label, self.get_record::<BackupStart>(cluster, ClusterObject::Start(label)).await)
                })
                .buffered(MANIFESTS);
        while let Some((label, start)) = read.next().await {
            let parents = match start {
                Ok(start) => Some(start.parents),
                Err(error) if error.is_damage() || error.is_not_found() => None,
                Err(error) => return Err(error),
            };
            survey.starts.entry(label).or_default().parents = parents;
        }
        Ok(manifests)
    }

    async fn read_manifests(
        &self,
        cluster: &ClusterId,
        manifests: BTreeMap<BackupLabel, Timestamp>,
        survey: &mut Survey,
    ) -> Result<(), CatalogError> {
        let mut read = stream::iter(manifests)
            .map(|(label, put_at)| async move { (label, put_at, self.get_manifest(cluster, label).await) })
            .buffered(MANIFESTS);
        while let Some((label, put_at, manifest)) = read.next().await {
            match manifest {
                Ok(manifest) => {
                    let references = refer(survey, &manifest);
                    survey.manifests.insert(label, references);
                    survey.inventory.backups.push(manifest.backup);
                }
                Err(CatalogError::Record { source: RecordError::Other { found, .. }, .. })
                    if found == Tombstone::NAME =>
                {
                    survey.tombstones.insert(label, put_at);
                }
                Err(error) if error.is_not_found() => {}
                Err(error) if error.is_damage() || error.is_refusal() => {
                    let name = name_of(cluster, ClusterObject::Manifest(label)).to_string();
                    tracing::warn!(object = %name, %error, "this manifest does not open");
                    survey.unreadable.push(name);
                }
                Err(error) => return Err(error),
            }
        }
        drop(read);
        survey.inventory.backups.sort_by_key(|backup| backup.label);
        Ok(())
    }

    async fn survey_wal(
        &self,
        cluster: &ClusterId,
        size: SegmentSize,
        survey: &mut Survey,
    ) -> Result<(), CatalogError> {
        // Open pieces before complete segments: what is removed in between shows in the second listing.
        let open = self.list_under(&folder::open(cluster)).await?;
        let unknown = open.iter().filter(|meta| Name::parse(meta.key.as_str()).is_err());
        survey.inventory.unknown.extend(unknown.map(|meta| meta.key.to_string()));
        let ages: BTreeMap<String, i64> =
            open.iter().map(|meta| (meta.key.to_string(), meta.modified.as_second())).collect();
        let mut pieces: Vec<Listed> = open.iter().filter_map(listed).collect();

        let branches = list_folders(self.store().as_ref(), &folder::wal(cluster)).await;
        let branches = branches.map_err(|source| self.in_store(source))?;
        for branch in branches.iter().filter_map(|folder| folder::read_branch(folder)) {
            let stretches = self.stretches(cluster, branch).await?;
            let listed = stream::iter(stretches.into_iter().map(|(after, end)| {
                let prefix = folder::wal_logs(cluster, branch);
                async move { self.list_wal(prefix, after, end, size).await }
            }));
            let parts: Vec<(Vec<WalObject>, Vec<String>)> = listed.buffered(STRETCHES).try_collect().await?;
            let objects = survey.wal.entry(branch).or_default();
            for (found, unknown) in parts {
                objects.extend(found);
                survey.inventory.unknown.extend(unknown);
            }
        }
        // The few tails whose length nothing else tells are opened, as everywhere.
        let whole = |listed: &Listed| {
            let number = listed.segment.number(size);
            let objects = survey.wal.get(&listed.branch).map_or(&[][..], Vec::as_slice);
            number.is_some_and(|number| {
                let at = objects.partition_point(|object| object.segment < number);
                let of = objects.iter().skip(at).take_while(|object| object.segment == number);
                of.map(|object| u64::from(object.to - object.from)).sum::<u64>() >= size.bytes() // invariant: from <= to
            })
        };
        let mut superfluous = Vec::new();
        pieces.retain(|listed| {
            let is = listed.piece.is_tail() && whole(listed);
            if is {
                superfluous.push(listed.clone());
            }
            !is
        });
        let mut by_branch: BTreeMap<Branch, Vec<Listed>> = BTreeMap::new();
        pieces.into_iter().for_each(|listed| by_branch.entry(listed.branch).or_default().push(listed));
        let mut lengths: BTreeMap<Branch, Vec<WalPiece>> = BTreeMap::new();
        for (branch, pieces) in by_branch {
            let (pieces, damaged) = self.resolve(pieces, size).await?;
            survey.inventory.damaged.extend(damaged);
            lengths.insert(branch, pieces);
        }
        for listed in superfluous {
            let Some(segment) = listed.segment.number(size) else { continue };
            let (from, token, object_len) = (listed.piece.from, listed.piece.name.copy.clone(), listed.piece.len);
            let piece = WalPiece { segment, from, to: from, place: Place::Tail, token, object_len };
            lengths.entry(listed.branch).or_default().push(piece);
        }
        let disputed = self.disputed(cluster, size, survey).await?;
        let branches: BTreeSet<Branch> = survey.wal.keys().chain(lengths.keys()).copied().collect();
        for branch in branches {
            let objects = survey.wal.entry(branch).or_default();
            let believed = objects.iter().filter(|object| !disputed.contains(&(branch, object.segment)));
            let mut there = runs_of(believed, size);
            for piece in lengths.remove(&branch).unwrap_or_default() {
                there.push(Run { from: piece.begins_at(size), to: piece.ends_at(size) });
                let to = if piece.place == Place::Tail { piece.from } else { piece.to };
                let (segment, from, place, token) = (piece.segment, piece.from, piece.place, piece.token);
                let mut object = WalObject { segment, from, to, place, token, len: piece.object_len, put_at: 0 };
                let name = object.name(cluster, branch, size).map(|name| name.to_string()).unwrap_or_default();
                // One whose age is not known is young.
                object.put_at = ages.get(&name).copied().unwrap_or(i64::MAX);
                objects.push(object);
            }
            objects.sort_by(|a, b| {
                (a.segment, a.from, a.to, a.place, &a.token).cmp(&(b.segment, b.from, b.to, b.place, &b.token))
            });
            there.sort_by_key(|run| (run.from, run.to));
            let entry = survey.inventory.branches.entry(branch);
            let entry = entry.or_insert_with(|| BranchInventory::new(branch));
            entry.pieces = condensed(joined(there), size);
        }
        Ok(())
    }

    /// Where to begin and end listing, so that several listings together show a branch's WAL once.
    async fn stretches(
        &self,
        cluster: &ClusterId,
        branch: Branch,
    ) -> Result<Vec<(Option<String>, Option<String>)>, CatalogError> {
        let folders = self.pages_of(ListRequest::delimited(folder::wal_logs(cluster, branch))).await?.folders;
        let each = folders.len().div_ceil(STRETCHES).max(1);
        let mut begins: Vec<String> = folders.into_iter().step_by(each).collect();
        let mut stretches = Vec::new();
        let mut end: Option<String> = None;
        while let Some(begin) = begins.pop() {
            let first = begins.is_empty();
            stretches.push(((!first).then(|| begin.clone()), end.replace(begin)));
        }
        if stretches.is_empty() {
            stretches.push((None, None));
        }
        stretches.reverse();
        Ok(stretches)
    }

    async fn list_wal(
        &self,
        prefix: String,
        after: Option<String>,
        end: Option<String>,
        size: SegmentSize,
    ) -> Result<(Vec<WalObject>, Vec<String>), CatalogError> {
        let mut request = ListRequest { after, ..ListRequest::flat(prefix) };
        let (mut objects, mut unknown) = (Vec::new(), Vec::new());
        loop {
            let page = self.store().list(&request).await.map_err(|source| self.in_store(source))?;
            for meta in page.objects {
                if end.as_deref().is_some_and(|end| meta.key.as_str() > end) {
                    return Ok((objects, unknown));
                }
                match wal_object(&meta, size) {
                    Some(object) => objects.push(object),
                    None => unknown.push(meta.key.to_string()),
                }
            }
            match page.next {
                Some(next) if request.after.as_ref().is_none_or(|after| *after < next) => request.after = Some(next),
                _ => return Ok((objects, unknown)),
            }
        }
    }

    /// Segments of which copies hold different contents: nobody can read those.
    async fn disputed(
        &self,
        cluster: &ClusterId,
        size: SegmentSize,
        survey: &Survey,
    ) -> Result<BTreeSet<(Branch, SegmentNumber)>, CatalogError> {
        let mut disputed = BTreeSet::new();
        for (branch, objects) in &survey.wal {
            let same = |a: &WalObject, b: &WalObject| (a.segment, a.from, a.to) == (b.segment, b.from, b.to);
            for copies in objects.chunk_by(same).filter(|copies| copies.len() > 1) {
                let to_listed = |object: &WalObject| {
                    let name = object.name(cluster, *branch, size)?;
                    let (from, to, len) = (object.from, Some(object.to), object.len);
                    let segment = SegmentName::new(branch.timeline, object.segment, size)?;
                    let piece = super::reader::Piece { name, from, to, len };
                    Some(Listed { branch: *branch, segment, piece, in_wal: true })
                };
                let listed: Vec<Listed> = copies.iter().filter_map(to_listed).collect();
                let (_, damaged) = self.without_disputes(listed).await?;
                if let (false, Some(first)) = (damaged.is_empty(), copies.first()) {
                    disputed.insert((*branch, first.segment));
                }
            }
        }
        Ok(disputed)
    }
}

fn wal_object(meta: &ObjectMeta, size: SegmentSize) -> Option<WalObject> {
    let Ok(Name { object: Object::Of(_, ClusterObject::Wal(_, range)), copy: token }) = Name::parse(meta.key.as_str())
    else {
        return None;
    };
    let segment = range.segment.number(size).filter(|_| u64::from(range.to()) <= size.bytes())?;
    let (from, to, len, put_at) = (range.from(), range.to(), meta.len, meta.modified.as_second());
    Some(WalObject { segment, from, to, place: Place::Wal, token, len, put_at })
}

/// Runs in order of their first byte, joined where they touch.
fn joined(runs: Vec<Run>) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::new();
    for run in runs.into_iter().filter(|run| run.from < run.to) {
        match joined.last_mut() {
            Some(last) if run.from <= last.to => last.to = last.to.max(run.to),
            _ => joined.push(run),
        }
    }
    joined
}

/// What a manifest names, as places in the sorted lists.
fn refer(survey: &Survey, manifest: &Manifest) -> References {
    let mut references = References { parents: manifest.parents.clone(), ..References::default() };
    for pack in &manifest.packs {
        let places = survey.places_of_pack(pack.pack);
        let stored = survey.packs.get(places.clone()).unwrap_or_default();
        if !stored.iter().any(|stored| stored.len == pack.len) {
            references.missing = Some(format!("pack/{}", pack.pack));
            references.lacks(ClusterObject::Pack(pack.pack), pack.len, stored.iter().map(|stored| stored.len));
        }
        if !places.is_empty() {
            references.packs.extend(u32::try_from(places.start));
        }
    }
    for part in [&manifest.tables, &manifest.tags, &manifest.server_manifest].into_iter().flatten() {
        let places = survey.places_of_part(part.part);
        let stored = survey.parts.get(places.clone()).unwrap_or_default();
        if !stored.iter().any(|stored| stored.len == part.len) {
            references.missing = Some(format!("backup/{}", part.part));
            references.lacks(ClusterObject::Part(part.part), part.len, stored.iter().map(|stored| stored.len));
        }
        if !places.is_empty() {
            references.parts.extend(u32::try_from(places.start));
        }
    }
    references.packs.sort_unstable();
    references.parts.sort_unstable();
    references
}
