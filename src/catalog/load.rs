//! Takes the picture of [`super::inventory`] from a repository; and, much cheaper, answers what an archiver asks when
//! it connects and `wal fetch` asks when it is asked for a segment.
//!
//! Only names and notes are read; frames only of tails, whose length nothing else tells. An object that does not open
//! is listed as damaged and counts as not there: the picture stays usable while one object is broken.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::StreamExt;
use futures_util::stream;

use super::CatalogError;
use super::inventory::{BranchInventory, ClusterInventory, DamagedObject, Place, WalPiece};
use super::kinds::kind_of;
use super::layout::{ClusterObject, Name, Object, SegmentName, folder};
use super::reader::{Piece, range_of};
use super::records::{BackupInfo, GapReason, GapRecord, Record, RecordError};
use super::repository::{Repository, name_of};
use super::retention::Tombstone;
use super::writer::{head_of, segment_name};
use crate::seal::SealError;
use crate::store::{ListRequest, ObjectMeta, StoreError, list_all, list_folders, pages};
use crate::types::{BackupLabel, Branch, ClusterId, Id128, SegmentNumber, SegmentSize, TimelineHistory};

/// Notes and records that are fetched at the same time.
const AT_ONCE: usize = 16;
/// A resuming archiver looks at the newest logs, until it has seen this many pieces: more than are ever under way at once.
const RECENT_PIECES: usize = 256;
/// And at least at this many logs, because a new one may just have begun.
const RECENT_LOGS: usize = 2;

/// A listed piece of WAL with what its name says.
#[derive(Debug, Clone)]
pub(super) struct Listed {
    pub branch: Branch,
    pub segment: SegmentName,
    pub piece: Piece,
    pub in_wal: bool,
}

pub(super) fn listed(object: &ObjectMeta) -> Option<Listed> {
    let piece = Piece::from_listed(object)?;
    let (branch, segment, in_wal) = match &piece.name.object {
        Object::Of(_, ClusterObject::Wal(branch, range)) => (*branch, range.segment, true),
        Object::Of(_, ClusterObject::Open(branch, range)) => (*branch, range.segment, false),
        Object::Of(_, ClusterObject::Tail(branch, segment, _)) => (*branch, *segment, false),
        _ => return None,
    };
    Some(Listed { branch, segment, piece, in_wal })
}

impl Repository {
    /// Everything that is here of a cluster. Costs a listing of its WAL, and a request per history file, backup, gap
    /// and open tail.
    ///
    /// # Errors
    /// What the store says. Objects that do not open are listed in the inventory.
    pub async fn load(&self, cluster: &ClusterId) -> Result<ClusterInventory, CatalogError> {
        let store = self.store().as_ref();
        let (histories, backups, gaps) = (folder::histories(cluster), folder::backups(cluster), folder::gaps(cluster));
        let (open, wal) = (folder::open(cluster), folder::wal(cluster));
        // Open pieces before complete segments: what is removed in between shows in the second listing.
        let open = list_all(store, &open).await.map_err(|source| self.in_store(source))?;
        let (wal, histories, backups, gaps) = futures_util::try_join!(
            list_all(store, &wal),
            list_all(store, &histories),
            list_all(store, &backups),
            list_all(store, &gaps),
        )
        .map_err(|source| self.in_store(source))?;

        let mut inventory = ClusterInventory::new(cluster.clone());
        let all = [&open, &wal, &histories, &backups, &gaps];
        let unknown = all.into_iter().flatten().filter(|object| Name::parse(object.key.as_str()).is_err());
        inventory.unknown.extend(unknown.map(|object| object.key.to_string()));

        self.load_histories(cluster, &histories, &mut inventory).await?;
        self.load_backups(&backups, &mut inventory).await?;
        self.load_gaps(cluster, &gaps, &mut inventory).await?;
        let pieces: Vec<Listed> = wal.iter().chain(&open).filter_map(listed).collect();
        self.load_pieces(pieces, &mut inventory).await?;
        Ok(inventory)
    }

    pub(super) async fn load_histories(
        &self,
        cluster: &ClusterId,
        objects: &[ObjectMeta],
        inventory: &mut ClusterInventory,
    ) -> Result<(), CatalogError> {
        for object in objects {
            let Ok(Name { object: Object::Of(_, ClusterObject::History(branch)), .. }) =
                Name::parse(object.key.as_str())
            else {
                continue;
            };
            if inventory.branches.get(&branch).is_some_and(|known| known.history.is_some()) {
                continue; // a copy of one that was read
            }
            let (text, ancestors) = match self.get_history_of(cluster, branch).await {
                Ok(Some(history)) => history,
                Ok(None) => continue,
                Err(error) => {
                    self.note_damage(inventory, object.key.as_str(), error)?;
                    continue;
                }
            };
            match TimelineHistory::parse(branch.timeline, &text) {
                Ok(history) => {
                    let entry = inventory.branches.entry(branch).or_insert_with(|| BranchInventory::new(branch));
                    (entry.history, entry.ancestors) = (Some(history), ancestors);
                }
                Err(error) => {
                    let (name, reason) = (object.key.to_string(), error.to_string());
                    inventory.damaged.push(DamagedObject { name, reason });
                }
            }
        }
        Ok(())
    }

    async fn load_backups(&self, objects: &[ObjectMeta], inventory: &mut ClusterInventory) -> Result<(), CatalogError> {
        let mut manifests: BTreeMap<BackupLabel, Vec<(Name, u64)>> = BTreeMap::new();
        let mut started = Vec::new();
        for object in objects {
            let Ok(name) = Name::parse(object.key.as_str()) else { continue };
            match name.object {
                Object::Of(_, ClusterObject::Manifest(label)) => {
                    manifests.entry(label).or_default().push((name, object.len));
                }
                Object::Of(_, ClusterObject::Start(label)) if !started.contains(&label) => started.push(label),
                _ => {}
            }
        }
        started.retain(|label| !manifests.contains_key(label));
        inventory.unfinished_backups = started;
        let mut heads = stream::iter(manifests)
            .map(|(label, copies)| async move { (label, self.read_head(label, copies).await) })
            .buffered(AT_ONCE);
        while let Some((label, head)) = heads.next().await {
            match head {
                Ok(Some(head)) => inventory.backups.push(head),
                Ok(None) => {}
                Err(error) => {
                    let name = name_of(&inventory.id, ClusterObject::Manifest(label)).to_string();
                    self.note_damage(inventory, &name, error)?;
                }
            }
        }
        drop(heads);
        inventory.backups.sort_by_key(|backup| backup.label);
        inventory.segment_size = inventory.backups.last().map(|backup| backup.segment_size);
        Ok(())
    }

    /// The head of a manifest, from the footer of the first copy that opens.
    async fn read_head(
        &self,
        label: BackupLabel,
        copies: Vec<(Name, u64)>,
    ) -> Result<Option<BackupInfo>, CatalogError> {
        let (mut found, mut first): (Option<(Name, BackupInfo)>, _) = (None, None);
        for (name, len) in copies {
            let read = async {
                let (_, footer) = self.get_footer(&name, kind_of(&ClusterObject::Manifest(label)), len).await?;
                let head = head_of(&footer.extra).map_err(|source| self.record(&name, source))?;
                if head.label != label {
                    return Err(self.inconsistent(&name, format!("it is the manifest of {}", head.label)));
                }
                Ok(head)
            };
            match read.await {
                // A tombstone: this backup was given up.
                Err(CatalogError::Record { source: RecordError::Other { found, .. }, .. })
                    if found == Tombstone::NAME =>
                {
                    return Ok(None);
                }
                Ok(head) => match &found {
                    Some((other, known)) if *known != head => {
                        return Err(
                            self.inconsistent(&name, format!("{other} is a manifest of the same label, and differs"))
                        );
                    }
                    Some(_) => {}
                    None => found = Some((name, head)),
                },
                Err(error) if error.is_not_found() => {}
                Err(error) if error.is_damage() => first = first.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        match (found, first) {
            (Some((_, head)), _) => Ok(Some(head)),
            (None, Some(error)) => Err(error),
            (None, None) => Ok(None),
        }
    }

    pub(super) async fn load_gaps(
        &self,
        cluster: &ClusterId,
        objects: &[ObjectMeta],
        inventory: &mut ClusterInventory,
    ) -> Result<(), CatalogError> {
        for (name, gap) in self.read_gaps(cluster, objects).await {
            match gap {
                Ok(gap) if !inventory.gaps.contains(&gap) => inventory.gaps.push(gap),
                Ok(_) => {}
                Err(error) if error.is_not_found() => {}
                Err(error) => {
                    self.note_damage(inventory, &name, error)?;
                    inventory.gaps.extend(gap_by_name(&name));
                }
            }
        }
        inventory.gaps.sort_by_key(|gap| (gap.branch, gap.from));
        Ok(())
    }

    async fn read_gaps(
        &self,
        cluster: &ClusterId,
        objects: &[ObjectMeta],
    ) -> Vec<(String, Result<GapRecord, CatalogError>)> {
        let gap_of = |object: &ObjectMeta| match Name::parse(object.key.as_str()).ok()?.object {
            Object::Of(_, object @ ClusterObject::Gap(..)) => Some(object),
            _ => None,
        };
        let names: BTreeSet<ClusterObject> = objects.iter().filter_map(gap_of).collect(); // copies are read with the first
        let gaps = stream::iter(names).map(|object| async move {
            let name = name_of(cluster, object.clone());
            let gap = self.get_record::<GapRecord>(cluster, object.clone()).await;
            let gap = gap.and_then(|gap| {
                let same = ClusterObject::Gap(gap.branch, gap.from, gap.to) == object;
                if same { Ok(gap) } else { Err(self.inconsistent(&name, "it records another gap than its name")) }
            });
            (name.to_string(), gap)
        });
        gaps.buffered(AT_ONCE).collect().await
    }

    async fn load_pieces(&self, pieces: Vec<Listed>, inventory: &mut ClusterInventory) -> Result<(), CatalogError> {
        let cluster = inventory.id.clone();
        if inventory.segment_size.is_none() {
            // The newest note says it; an older one will do when that does not open.
            let mut newest: Vec<&Listed> = pieces.iter().collect();
            newest.sort_by_key(|listed| std::cmp::Reverse((listed.segment, listed.piece.from)));
            for listed in newest {
                match self.note_of(&listed.piece).await {
                    Ok(note) => {
                        inventory.segment_size = Some(note.segment_size);
                        break;
                    }
                    Err(error) if error.is_damage() || error.is_not_found() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        let Some(size) = inventory.segment_size else {
            let reason = "no note of any WAL of this cluster opens";
            let damaged = pieces.iter().map(|listed| listed.piece.name.to_string());
            inventory.damaged.extend(damaged.map(|name| DamagedObject { name, reason: reason.to_owned() }));
            return Ok(());
        };
        let mut by_branch: BTreeMap<Branch, Vec<Listed>> = BTreeMap::new();
        for listed in pieces {
            by_branch.entry(listed.branch).or_default().push(listed);
        }
        for (branch, pieces) in by_branch {
            let (pieces, damaged) = self.resolve(pieces, size).await?;
            inventory.damaged.extend(damaged);
            let entry = inventory.branches.entry(branch).or_insert_with(|| BranchInventory::new(branch));
            entry.pieces = pieces;
            let mut newest: Vec<&WalPiece> = entry.pieces.iter().collect();
            newest.sort_by_key(|piece| std::cmp::Reverse(piece.ends_at(size)));
            for piece in newest.into_iter().take(RECENT_LOGS) {
                let Some(piece) = to_listed(&cluster, branch, piece, size) else { continue };
                match self.note_of(&piece).await {
                    Ok(note) => {
                        entry.note_of_newest = Some(note);
                        break;
                    }
                    Err(error) if error.is_not_found() => {}
                    Err(error) if error.is_damage() => {
                        // A tail that a crash left before its first append is nothing, and no damage.
                        if piece.is_tail() && matches!(self.open_tail_piece(&piece).await, Ok(None)) {
                            continue;
                        }
                        let (name, reason) = (piece.name.to_string(), error.to_string());
                        inventory.damaged.push(DamagedObject { name, reason });
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Listed pieces of one branch as values; tails that matter are opened.
    pub(super) async fn resolve(
        &self,
        pieces: Vec<Listed>,
        size: SegmentSize,
    ) -> Result<(Vec<WalPiece>, Vec<DamagedObject>), CatalogError> {
        let (pieces, mut damaged) = self.without_disputes(pieces).await?;
        let (mut complete, mut counted): (BTreeMap<SegmentName, u64>, BTreeSet<&Object>) = Default::default();
        for listed in pieces.iter().filter(|listed| listed.in_wal) {
            if counted.insert(&listed.piece.name.object) {
                let bytes = range_of(&listed.piece.name).map_or(0, |range| u64::from(range.bytes()));
                *complete.entry(listed.segment).or_default() += bytes;
            }
        }
        let mut found = Vec::with_capacity(pieces.len());
        for Listed { segment, piece, in_wal, .. } in pieces {
            let number = segment.number(size).filter(|_| u64::from(piece.to.unwrap_or(piece.from)) <= size.bytes());
            let Some(number) = number else {
                let reason = format!("it cannot be WAL in segments of {size}");
                damaged.push(DamagedObject { name: piece.name.to_string(), reason });
                continue;
            };
            let whole_is_there = complete.get(&segment).is_some_and(|bytes| *bytes >= size.bytes());
            let to = match piece.to {
                Some(to) => to,
                None if whole_is_there => piece.from,
                None => match self.tail_end(&piece).await {
                    Ok((to, damage)) => {
                        let name = piece.name.to_string();
                        damaged.extend(damage.map(|reason| DamagedObject { name, reason }));
                        to
                    }
                    Err(error) if error.is_not_found() => continue,
                    Err(error) if error.is_damage() || is_unreadable(&error) => {
                        let (name, reason) = (piece.name.to_string(), error.to_string());
                        damaged.push(DamagedObject { name, reason });
                        piece.from
                    }
                    Err(error) => return Err(error),
                },
            };
            let place = match (in_wal, piece.to) {
                (true, _) => Place::Wal,
                (false, Some(_)) => Place::Open,
                (false, None) => Place::Tail,
            };
            let (from, token, object_len) = (piece.from, piece.name.copy.clone(), piece.len);
            found.push(WalPiece { segment: number, from, to, place, token, object_len });
        }
        found.sort();
        Ok((found, damaged))
    }

    /// Without the ranges whose copies hold different contents: nobody can read those.
    pub(super) async fn without_disputes(
        &self,
        mut pieces: Vec<Listed>,
    ) -> Result<(Vec<Listed>, Vec<DamagedObject>), CatalogError> {
        let mut copies: BTreeMap<&Object, Vec<Piece>> = BTreeMap::new();
        for listed in pieces.iter().filter(|listed| !listed.piece.is_tail()) {
            copies.entry(&listed.piece.name.object).or_default().push(listed.piece.clone());
        }
        copies.retain(|_, copies| copies.len() > 1);
        let copies: Vec<Vec<Piece>> = copies.into_values().collect();
        let mut agreed =
            stream::iter(copies).map(|copies| async move { (self.agree(&copies).await, copies) }).buffered(AT_ONCE);
        let (mut disputed, mut damaged) = (BTreeSet::new(), Vec::new());
        while let Some((agreed, copies)) = agreed.next().await {
            match agreed {
                Ok(()) => {}
                Err(error @ CatalogError::TwoContents { .. }) => {
                    let reason = error.to_string();
                    damaged.extend(
                        copies
                            .iter()
                            .map(|piece| DamagedObject { name: piece.name.to_string(), reason: reason.clone() }),
                    );
                    disputed.extend(copies.into_iter().map(|piece| piece.name.object));
                }
                Err(error) => return Err(error),
            }
        }
        drop(agreed);
        pieces.retain(|listed| !disputed.contains(&listed.piece.name.object));
        Ok((pieces, damaged))
    }

    pub(super) async fn tail_end(&self, piece: &Piece) -> Result<(u32, Option<String>), CatalogError> {
        let Some(mut tail) = self.open_tail_reader(piece).await? else { return Ok((piece.from, None)) };
        let mut len: u64 = 0;
        while let Some(chunk) = tail.next_chunk().await? {
            len += chunk.len() as u64;
        }
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        Ok((piece.from.saturating_add(len), tail.damage().map(str::to_owned)))
    }

    fn note_damage(
        &self,
        inventory: &mut ClusterInventory,
        name: &str,
        error: CatalogError,
    ) -> Result<(), CatalogError> {
        if !error.is_damage() {
            return Err(error);
        }
        inventory.damaged.push(DamagedObject { name: name.to_owned(), reason: error.to_string() });
        Ok(())
    }

    // ---- the cheap questions

    /// The newest logs' complete segments and everything under `open/` of a branch.
    pub(super) async fn newest_pieces(&self, cluster: &ClusterId, branch: Branch) -> Result<Vec<Listed>, CatalogError> {
        let store = self.store().as_ref();
        let in_store = |source: StoreError| self.in_store(source);
        let open = list_all(store, &folder::open_branch(cluster, branch)).await.map_err(in_store)?;
        let mut pieces: Vec<Listed> = open.iter().filter_map(listed).collect();
        let folders = list_folders(store, &folder::wal_logs(cluster, branch)).await.map_err(in_store)?;
        let logs = folders.iter().rev().filter_map(|folder| folder::read_log(folder));
        let (mut seen, mut oldest, mut all) = (0, None, true);
        for (index, log) in logs.enumerate() {
            if index >= RECENT_LOGS && seen >= RECENT_PIECES {
                all = false;
                break;
            }
            let objects = list_all(store, &folder::wal_log(cluster, branch, log)).await.map_err(in_store)?;
            seen += objects.len();
            let found: Vec<Listed> = objects.iter().filter_map(listed).collect();
            oldest = found.iter().map(|listed| listed.segment).min().or(oldest);
            pieces.extend(found);
        }
        if !all {
            // An open piece of an older segment was kept for a reason (see `sweep`); its whole is in a log that was not
            // listed, so it must not look like the beginning of everything.
            pieces.retain(|listed| oldest.is_none_or(|oldest| oldest <= listed.segment));
        }
        Ok(pieces)
    }

    /// The gaps that are recorded of a branch. A record that does not open counts by its name, which says all that
    /// matters of it: it was made for a gap, and whoever steps over one only asks the server for what follows.
    ///
    /// # Errors
    /// What the store says.
    pub async fn gaps_of(&self, cluster: &ClusterId, branch: Branch) -> Result<Vec<GapRecord>, CatalogError> {
        let mut recorded = self.recorded_of(cluster, branch).await?;
        recorded.retain(|gap| gap.reason != GapReason::Damaged);
        Ok(recorded)
    }

    /// What is noted of a branch's WAL that came damaged, and is there.
    ///
    /// # Errors
    /// What the store says.
    pub async fn damage_of(&self, cluster: &ClusterId, branch: Branch) -> Result<Vec<GapRecord>, CatalogError> {
        let mut recorded = self.recorded_of(cluster, branch).await?;
        recorded.retain(|gap| gap.reason == GapReason::Damaged);
        Ok(recorded)
    }

    async fn recorded_of(&self, cluster: &ClusterId, branch: Branch) -> Result<Vec<GapRecord>, CatalogError> {
        let objects = list_all(self.store().as_ref(), &folder::gaps_of(cluster, branch)).await;
        let objects = objects.map_err(|source| self.in_store(source))?;
        let mut gaps = Vec::new();
        for (name, gap) in self.read_gaps(cluster, &objects).await {
            match gap {
                Ok(gap) => gaps.push(gap),
                Err(error) if error.is_not_found() => {}
                Err(error) if error.is_damage() => {
                    tracing::error!(object = %name, %error, "the record of a gap does not open; its name is believed");
                    gaps.extend(gap_by_name(&name));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(gaps)
    }

    /// Is there anything of this branch behind this segment? "Not there" may be said of a segment only where not (P7).
    ///
    /// # Errors
    /// What the store says.
    pub async fn anything_after(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
    ) -> Result<bool, CatalogError> {
        let name = segment_name(branch, segment, size)?;
        let store = self.store().as_ref();
        let open = list_all(store, &folder::open_branch(cluster, branch)).await;
        let open = open.map_err(|source| self.in_store(source))?;
        if open.iter().filter_map(listed).any(|listed| listed.segment > name) {
            return Ok(true);
        }
        let folders = list_folders(store, &folder::wal_logs(cluster, branch)).await;
        let folders = folders.map_err(|source| self.in_store(source))?;
        let logs: Vec<u32> = folders.iter().filter_map(|folder| folder::read_log(folder)).collect();
        if logs.iter().any(|log| *log > name.log) {
            return Ok(true);
        }
        if !logs.contains(&name.log) {
            return Ok(false);
        }
        let request = ListRequest {
            // `~` sorts behind everything that a range of this segment can be called
            after: Some(format!("{}~", folder::wal_segment(cluster, branch, name))),
            ..ListRequest::flat(folder::wal_log(cluster, branch, name.log))
        };
        let behind = pages(store, request).await.map_err(|source| self.in_store(source))?;
        Ok(behind.objects.iter().filter_map(listed).any(|listed| listed.segment > name))
    }
}

/// A gap as its record's name tells it.
fn gap_by_name(name: &str) -> Option<GapRecord> {
    let Ok(Name { object: Object::Of(_, ClusterObject::Gap(branch, from, to)), .. }) = Name::parse(name) else {
        return None;
    };
    let (noticed_at, writer) = (jiff::Timestamp::UNIX_EPOCH, Id128::new([0; 16]));
    Some(GapRecord { branch, from, to, reason: GapReason::Other, noticed_at, writer })
}

/// Not damage, but this key cannot open it.
pub(super) fn is_unreadable(error: &CatalogError) -> bool {
    let CatalogError::Sealed { source, .. } = error else { return false };
    matches!(source, SealError::WriteOnly | SealError::NeedContentKey { .. } | SealError::NotARecipient { .. })
}

/// A piece of the inventory as it is named.
fn to_listed(cluster: &ClusterId, branch: Branch, piece: &WalPiece, size: SegmentSize) -> Option<Piece> {
    let segment = SegmentName::new(branch.timeline, piece.segment, size)?;
    let range = || super::layout::RangeName::new(segment, piece.from, piece.to);
    let (object, to) = match piece.place {
        Place::Wal => (ClusterObject::Wal(branch, range()?), Some(piece.to)),
        Place::Open => (ClusterObject::Open(branch, range()?), Some(piece.to)),
        Place::Tail => (ClusterObject::Tail(branch, segment, piece.from), None),
    };
    let mut name = name_of(cluster, object);
    name.copy = piece.token.clone();
    Some(Piece { name, from: piece.from, to, len: piece.object_len })
}
