//! Acts on a decision: records it, waits, and removes. Decides nothing.
//!
//! ```text
//! run 1        expire/<second>         what is condemned. Backups avoid it from now on; a person has a day to disagree
//! a day later  expire/<second>.going   what of that is still to go, after looking again; then the manifests
//! a day later  gap records, WAL, indexes; packs and pieces; the starts; last of all both records
//! ```
//!
//! What always holds:
//! - A manifest that exists can be restored: it goes before anything that it names and before its WAL.
//! - Nothing is removed that is not in a record that has been there for [`GRACE`] by the store's clock, and that is not
//!   found superfluous once more, by a picture taken after that record was put.
//! - WAL goes only after the hole that it leaves is recorded, so that a hole without a record is always a fault.
//! - What the store does not let us remove (an object lock, no permission) stays, is named, and stops nothing else.
//!
//! Crash, cancellation: whatever was done is done; the next run goes on from the records. Two runs at a time do the same
//! things twice.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::policy::{Decision, Garbage, LEASE_LASTS, LEFTOVER_AFTER, Policy, decide, freed_by};
use crate::catalog::inventory::Place;
use crate::catalog::layout::{ClusterObject, Name, Object};
use crate::catalog::records::{GapReason, GapRecord};
use crate::catalog::retention::{Deleted, Expiry, RecordedExpiry, WalRange};
use crate::catalog::survey::{Survey, WalObject};
use crate::catalog::{CatalogError, Repository};
use crate::types::{BackupLabel, Branch, ClusterId, Lsn, SegmentNumber};

/// From a record to what it allows, by the store's clock: longer than the longest restore without a lease.
pub const GRACE: SignedDuration = SignedDuration::from_hours(24);
/// A backup that was given up never becomes complete as long as its tombstone is there.
const TOMBSTONES_STAY: SignedDuration = SignedDuration::from_hours(90 * 24);
/// Objects that are removed at the same time.
const AT_ONCE: usize = 16;
/// After so many refusals without a success nothing more is tried: it will not go better.
const REFUSALS: usize = 16;
/// How many refusals are named.
const NAMED: usize = 20;

/// What a run did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Swept {
    /// The record of what is condemned since now.
    pub plan: Option<BackupLabel>,
    /// Base backups that are condemned since now.
    pub condemned: Vec<BackupLabel>,
    /// Base backups whose manifests were removed.
    pub manifests: Vec<BackupLabel>,
    /// Base backups that were given up.
    pub given_up: Vec<BackupLabel>,
    /// Objects that were removed, of every kind.
    pub objects: u64,
    /// Their length, as far as it matters: WAL, packs, pieces, indexes.
    pub bytes: u64,
    /// Segments' ranges and tails that were removed because the whole segment is there.
    pub open_pieces: u64,
    /// What the store keeps, and why: some of it.
    pub refused: Vec<(String, String)>,
    /// How many the store keeps.
    pub refusals: u64,
}

impl Swept {
    /// The store did not let us.
    fn refuse(&mut self, name: &Name, why: String) {
        self.refusals += 1;
        if self.refused.len() < NAMED {
            self.refused.push((name.to_string(), why));
        }
    }
}

/// What would be decided now. Changes nothing, and takes our clock for the store's.
///
/// # Errors
/// What the store says.
pub async fn look(
    repository: &Repository,
    cluster: &ClusterId,
    policy: &Policy,
) -> Result<(Survey, Decision), CatalogError> {
    let survey = repository.survey(cluster).await?;
    let decision = decide(&survey, policy, repository.now());
    Ok((survey, decision))
}

/// One run: records what is condemned, and removes what has been for long enough.
///
/// # Errors
/// What the store says, if it does not say no: what was done until then is done.
pub async fn sweep(
    repository: &Repository,
    cluster: &ClusterId,
    policy: &Policy,
) -> Result<(Decision, Swept), CatalogError> {
    repository.check_writable()?;
    // The earlier clock keeps more.
    let store_now = repository.ask_store_time(cluster).await?;
    let now = store_now.min(repository.now());
    // After every record that this run may act on was put, and before the one that it puts.
    let survey = repository.survey(cluster).await?;
    let decision = decide(&survey, policy, now);
    let run = Run { repository, cluster, survey: &survey, decision: &decision, now };
    let mut swept = Swept::default();
    run.remove_what_is_due(&mut swept).await?;
    run.let_go(&mut swept).await?;
    run.give_up(&mut swept).await?;
    run.condemn(&mut swept).await?;
    run.tidy(&mut swept).await?;
    Ok((decision, swept))
}

struct Run<'a> {
    repository: &'a Repository,
    cluster: &'a ClusterId,
    survey: &'a Survey,
    decision: &'a Decision,
    /// The earlier one of our clock and the store's.
    now: Timestamp,
}

impl Run<'_> {
    fn is_older(&self, put_at: Timestamp, than: SignedDuration) -> bool {
        self.now.duration_since(put_at) >= than
    }

    fn plans(&self, going: bool) -> impl Iterator<Item = &RecordedExpiry> {
        self.survey.expiries.iter().filter(move |plan| plan.going == going)
    }

    fn goings(&self) -> BTreeSet<BackupLabel> {
        self.plans(true).map(|plan| plan.name).collect()
    }

    // ---- the first day: condemned

    /// Records what no earlier record has.
    async fn condemn(&self, swept: &mut Swept) -> Result<(), CatalogError> {
        // Of a plan of which it was recorded what goes, only that counts: the rest was let off.
        let gone = self.goings();
        let counts = self.survey.expiries.iter().filter(|plan| plan.going || !gone.contains(&plan.name));
        let recorded: Vec<&Expiry> = counts.map(|plan| &plan.expiry).collect();
        let goes = self.decision.goes();
        let backups: Vec<BackupLabel> =
            goes.into_iter().filter(|label| !recorded.iter().any(|plan| plan.backups.contains(label))).collect();
        let known = |range: &WalRange| {
            let holds =
                |known: &WalRange| known.branch == range.branch && known.from <= range.from && range.to <= known.to;
            recorded.iter().any(|plan| plan.wal.iter().any(holds))
        };
        let wal = self.decision.wal.iter().map(|wal| wal.range).filter(|range| !known(range)).collect();
        let (packs, parts) = self.leftovers();
        let packs = packs.into_iter().filter(|pack| !recorded.iter().any(|plan| plan.packs.contains(pack))).collect();
        let parts = parts.into_iter().filter(|part| !recorded.iter().any(|plan| plan.parts.contains(part))).collect();
        let (writer, made_at) = (self.repository.writer(), self.repository.now());
        let plan = Expiry { writer, made_at, backups, wal, packs, parts };
        if plan.is_empty() {
            return Ok(());
        }
        swept.plan = Some(self.repository.put_expiry_plan(self.cluster, &plan).await?);
        swept.condemned = plan.backups;
        Ok(())
    }

    /// Packs and pieces that no record knows and that are old enough.
    fn leftovers(&self) -> super::policy::Named {
        let labels: BTreeSet<BackupLabel> =
            self.decision.leftovers.iter().filter(|leftover| leftover.goes).map(|leftover| leftover.label).collect();
        let Garbage { packs, parts, .. } = &self.decision.garbage;
        let packs = packs.iter().copied().filter(|pack| labels.contains(&pack.label)).collect();
        (packs, parts.iter().copied().filter(|part| labels.contains(&part.label)).collect())
    }

    // ---- the second day: going

    /// Of the plans that are old enough, records what is still to go, and removes the manifests.
    async fn let_go(&self, swept: &mut Swept) -> Result<(), CatalogError> {
        let (done, goes) = (self.goings(), self.decision.goes());
        for plan in self.plans(false).filter(|plan| !done.contains(&plan.name)) {
            let backups: Vec<BackupLabel> =
                plan.expiry.backups.iter().copied().filter(|label| goes.contains(label)).collect();
            let (packs, parts) = self.leftovers();
            let mut packs: Vec<_> = packs.into_iter().filter(|pack| plan.expiry.packs.contains(pack)).collect();
            let mut parts: Vec<_> = parts.into_iter().filter(|part| plan.expiry.parts.contains(part)).collect();
            // Of all that go now or went already together: what two of them share goes, too.
            let together = self.plans(true).flat_map(|plan| plan.expiry.backups.iter());
            let together: BTreeSet<BackupLabel> = backups.iter().chain(together).copied().collect();
            if self.survey.unreadable.is_empty() {
                let open = self.decision.open.iter().copied().collect();
                let freed = freed_by(self.survey, &together, &open);
                packs.extend(freed.packs);
                parts.extend(freed.parts);
            }
            let wal = self.still_going(&plan.expiry.wal);
            let (writer, made_at) = (self.repository.writer(), self.repository.now());
            let going = Expiry { writer, made_at, backups, wal, packs, parts };
            if going.is_empty() {
                // Nothing of it is to go any more.
                self.remove(ClusterObject::ExpiryPlan(plan.name), swept).await?;
                continue;
            }
            if !self.is_older(plan.put_at, GRACE) {
                continue;
            }
            let object = ClusterObject::ExpiryGoing(plan.name);
            match self.repository.put_record(self.cluster, object, &going).await {
                Ok(_) => {}
                Err(CatalogError::Taken { .. }) => continue, // another run, in this moment: the next one reads it
                Err(error) => return Err(error),
            }
            self.remove_manifests(&going.backups, swept).await?;
        }
        // Those that a run before was cut off from removing.
        for plan in self.plans(true) {
            let left = plan.expiry.backups.iter().copied();
            let left: Vec<BackupLabel> =
                left.filter(|label| goes.contains(label) && self.survey.manifests.contains_key(label)).collect();
            self.remove_manifests(&left, swept).await?;
        }
        Ok(())
    }

    async fn remove_manifests(&self, labels: &[BackupLabel], swept: &mut Swept) -> Result<(), CatalogError> {
        for label in labels {
            if self.remove(ClusterObject::Manifest(*label), swept).await? {
                swept.manifests.push(*label);
            }
        }
        Ok(())
    }

    /// What of these ranges is still to go by the decision.
    fn still_going(&self, ranges: &[WalRange]) -> Vec<WalRange> {
        let mut still = Vec::new();
        for range in ranges {
            for goes in self.decision.wal.iter().map(|wal| wal.range).filter(|goes| goes.branch == range.branch) {
                let (from, to) = (goes.from.max(range.from), goes.to.min(range.to));
                if from < to {
                    still.push(WalRange { branch: range.branch, from, to });
                }
            }
        }
        still
    }

    // ---- the third day: gone

    async fn remove_what_is_due(&self, swept: &mut Swept) -> Result<(), CatalogError> {
        let goes = self.decision.goes();
        for plan in self.plans(true).filter(|plan| self.is_older(plan.put_at, GRACE)) {
            let expiry = &plan.expiry;
            // One whose manifest is still there has what it names, and its WAL. Where it is to stay after all, that is that.
            let is_there = |label: &&BackupLabel| self.survey.manifests.contains_key(*label);
            let left = expiry.backups.iter().filter(is_there).any(|label| goes.contains(label));
            let before = swept.refusals;
            self.remove_wal(&expiry.wal, swept).await?;
            self.remove_garbage(expiry, swept).await?;
            if left || swept.refusals > before {
                continue;
            }
            // Once nothing of it is left, nothing has to be known of it.
            for label in expiry.backups.iter().filter(|label| !is_there(label)) {
                self.remove(ClusterObject::Start(*label), swept).await?;
            }
            self.remove(ClusterObject::ExpiryPlan(plan.name), swept).await?;
            self.remove(ClusterObject::ExpiryGoing(plan.name), swept).await?;
        }
        Ok(())
    }

    async fn remove_wal(&self, ranges: &[WalRange], swept: &mut Swept) -> Result<(), CatalogError> {
        let Some(size) = self.survey.inventory.segment_size else { return Ok(()) };
        let mut by_branch: BTreeMap<Branch, Vec<WalRange>> = BTreeMap::new();
        for range in self.still_going(ranges) {
            by_branch.entry(range.branch).or_default().push(range);
        }
        for (branch, ranges) in by_branch {
            let objects = self.survey.wal.get(&branch).map_or(&[][..], Vec::as_slice);
            let goes = |object: &WalObject| {
                let start = object.segment.start(size);
                ranges.iter().any(|range| range.from <= start && start < range.to)
            };
            // All that stay of the branch, for the holes; those of other plans are there, too, as yet.
            let first = objects.iter().find(|object| !goes(object)).map(|object| object.segment.start(size));
            for range in &ranges {
                if first.is_some_and(|first| first < range.from) {
                    self.record_hole(*range).await?;
                }
            }
            let names = objects.iter().filter(|object| goes(object));
            let names = names.filter_map(|object| Some((object.name(self.cluster, branch, size)?, object.len)));
            self.remove_all(names.collect(), swept).await?;
            let stays: Vec<(Lsn, Lsn)> = objects
                .iter()
                .filter(|object| !goes(object))
                .map(|object| (object.segment.start(size), object.segment.end(size)))
                .collect();
            let is_needed = |from: Lsn, to: Lsn| {
                let at = stays.partition_point(|(_, end)| *end <= from);
                stays.get(at).is_some_and(|(start, _)| *start < to)
            };
            let last = ranges.iter().map(|range| range.to).max().unwrap_or_default();
            let indexes = self
                .survey
                .indexes
                .iter()
                .filter(|index| index.branch == branch && index.to <= last && !is_needed(index.from, index.to));
            self.remove_all(indexes.map(|index| (index.name(self.cluster), index.len)).collect(), swept).await?;
        }
        Ok(())
    }

    /// That WAL is missing here from now on, and why.
    async fn record_hole(&self, range: WalRange) -> Result<(), CatalogError> {
        let WalRange { branch, from, to } = range;
        let known = self.survey.inventory.gaps.iter();
        if known.clone().any(|gap| gap.branch == branch && gap.from <= from && to <= gap.to) {
            return Ok(());
        }
        let (noticed_at, writer) = (self.repository.now(), self.repository.writer());
        let gap = GapRecord { branch, from, to, reason: GapReason::Expired, noticed_at, writer };
        match self.repository.put_record(self.cluster, ClusterObject::Gap(branch, from, to), &gap).await {
            Ok(_) | Err(CatalogError::Taken { .. }) => Ok(()), // recorded is recorded, whoever did it
            Err(error) => Err(error),
        }
    }

    async fn remove_garbage(&self, expiry: &Expiry, swept: &mut Swept) -> Result<(), CatalogError> {
        if !self.survey.unreadable.is_empty() {
            return Ok(());
        }
        // Nothing that a manifest names now, nothing of a base backup that is being taken.
        let named = |places: &dyn Fn(&crate::catalog::survey::References) -> &Vec<u32>, first: usize| {
            let first = u32::try_from(first).unwrap_or(u32::MAX);
            self.survey.manifests.values().any(|references| places(references).binary_search(&first).is_ok())
        };
        let open = |label: BackupLabel| self.decision.open.contains(&label);
        let mut names = Vec::new();
        for pack in expiry.packs.iter().filter(|pack| !open(pack.label)) {
            let places = self.survey.places_of_pack(*pack);
            if !named(&|references| &references.packs, places.start) {
                let object = Object::Of(self.cluster.clone(), ClusterObject::Pack(*pack));
                let copies = self.survey.packs.get(places).unwrap_or_default();
                let name = |token| Name { object: object.clone(), copy: token };
                names.extend(copies.iter().map(|copy| (name(copy.token.clone()), copy.len)));
            }
        }
        for part in expiry.parts.iter().filter(|part| !open(part.label)) {
            let places = self.survey.places_of_part(*part);
            if !named(&|references| &references.parts, places.start) {
                let object = Object::Of(self.cluster.clone(), ClusterObject::Part(*part));
                let copies = self.survey.parts.get(places).unwrap_or_default();
                let name = |token| Name { object: object.clone(), copy: token };
                names.extend(copies.iter().map(|copy| (name(copy.token.clone()), copy.len)));
            }
        }
        self.remove_all(names, swept).await
    }

    // ---- what never becomes complete

    async fn give_up(&self, swept: &mut Swept) -> Result<(), CatalogError> {
        for label in &self.decision.give_up {
            if self.repository.give_up_backup(self.cluster, *label).await? {
                swept.given_up.push(*label);
            }
        }
        for (label, put_at) in &self.survey.tombstones {
            if !self.is_older(*put_at, GRACE) {
                continue;
            }
            let expiry = Expiry {
                writer: self.repository.writer(),
                made_at: self.repository.now(),
                backups: Vec::new(),
                wal: Vec::new(),
                packs: self.survey.packs.iter().map(|pack| pack.name).filter(|pack| pack.label == *label).collect(),
                parts: self.survey.parts.iter().map(|part| part.name).filter(|part| part.label == *label).collect(),
            };
            let before = swept.refusals;
            self.remove_garbage(&expiry, swept).await?;
            if self.is_older(*put_at, TOMBSTONES_STAY) && swept.refusals == before {
                self.remove(ClusterObject::Start(*label), swept).await?;
                self.remove(ClusterObject::Manifest(*label), swept).await?;
            }
        }
        Ok(())
    }

    // ---- small things

    /// Leases that ended, records of holes before which nothing is left, and pieces of segments that are there as a whole.
    async fn tidy(&self, swept: &mut Swept) -> Result<(), CatalogError> {
        for lease in &self.survey.leases {
            if self.is_older(lease.beat_at, LEASE_LASTS) {
                self.remove(ClusterObject::Lease(lease.name.clone()), swept).await?;
            }
        }
        let Some(size) = self.survey.inventory.segment_size else { return Ok(()) };
        for gap in self.survey.inventory.gaps.iter().filter(|gap| gap.reason == GapReason::Expired) {
            let objects = self.survey.wal.get(&gap.branch).and_then(|objects| objects.first());
            if objects.is_none_or(|first| first.segment.start(size) >= gap.to) {
                self.remove(ClusterObject::Gap(gap.branch, gap.from, gap.to), swept).await?;
            }
        }
        let oldest = self.now.as_second().saturating_sub(LEFTOVER_AFTER.as_secs());
        let mut whole: BTreeSet<(Branch, SegmentNumber)> = BTreeSet::new();
        for (branch, objects) in &self.survey.wal {
            for of in objects.chunk_by(|a, b| a.segment == b.segment) {
                let complete: u64 = of
                    .iter()
                    .filter(|object| object.place == Place::Wal && object.token.is_none())
                    .map(|object| u64::from(object.to.saturating_sub(object.from)))
                    .sum();
                let old = |object: &&WalObject| object.place != Place::Wal && object.put_at <= oldest;
                if let Some(object) = of.iter().find(old).filter(|_| complete == size.bytes()) {
                    whole.insert((*branch, object.segment));
                }
            }
        }
        for (branch, segment) in whole {
            match self.repository.remove_open_pieces(self.cluster, branch, segment, size).await {
                Ok(removed) => swept.open_pieces += removed.removed.len() as u64,
                Err(error) if error.is_retryable() => return Err(error),
                Err(error) => tracing::warn!(%branch, segment = segment.get(), %error, "open pieces stay"),
            }
        }
        Ok(())
    }

    /// Removes an object and its copies; `false` where the store keeps one.
    async fn remove(&self, object: ClusterObject, swept: &mut Swept) -> Result<bool, CatalogError> {
        let mut all = true;
        for (name, deleted) in self.repository.delete_all_copies(self.cluster, object).await? {
            match deleted {
                Deleted::Gone => swept.objects += 1,
                Deleted::Refused(why) => {
                    all = false;
                    swept.refuse(&name, why);
                }
            }
        }
        Ok(all)
    }

    async fn remove_all(&self, names: Vec<(Name, u64)>, swept: &mut Swept) -> Result<(), CatalogError> {
        let mut deletions = stream::iter(names)
            .map(|(name, len)| async move {
                let deleted = self.repository.delete(&name).await;
                (name, len, deleted)
            })
            .buffered(AT_ONCE);
        let (mut gone, mut refused) = (false, 0);
        while let Some((name, len, deleted)) = deletions.next().await {
            match deleted? {
                Deleted::Gone => {
                    (swept.objects, swept.bytes, gone) = (swept.objects + 1, swept.bytes + len, true);
                }
                Deleted::Refused(why) => {
                    refused += 1;
                    swept.refuse(&name, why);
                    if !gone && refused >= REFUSALS {
                        break;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
