//! What retention writes down: what is condemned, what goes, tombstones, holds, leases.
//!
//! What always holds: a backup that avoids what [`Repository::condemned`] names, after it has put its `start`, cannot lose
//! its parent's blocks: either it sees the plan, or whoever made the plan sees the start. `docs/format.md` lists the fields.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::CatalogError;
use super::layout::{ClusterObject, LeaseName, Name, Object, PackName, PartName, folder};
use super::records::{self, Record};
use super::repository::{Repository, name_of, random_id};
use crate::store::{ListRequest, ObjectMeta, StoreError, list_all, pages};
use crate::types::{BackupLabel, Branch, ClusterId, Id128, Lsn};

/// Records that are fetched at the same time.
const AT_ONCE: usize = 8;
/// How many seconds are tried for a name that nobody has.
const NAMES: usize = 20;

/// Bytes `[from, to)` of a branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WalRange {
    /// Whose.
    pub branch: Branch,
    /// First byte: that of a segment.
    pub from: Lsn,
    /// First byte after it: that of a segment.
    pub to: Lsn,
}

/// What is condemned, or goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expiry {
    /// The run of pgkeep that decided.
    pub writer: Id128,
    /// When, by our clock.
    pub made_at: Timestamp,
    /// Base backups.
    #[serde(default)]
    pub backups: Vec<BackupLabel>,
    /// WAL.
    #[serde(default)]
    pub wal: Vec<WalRange>,
    /// Packs: in a plan those that no record knows, in what goes also those that nobody names any more.
    #[serde(default)]
    pub packs: Vec<PackName>,
    /// Pieces of tables, likewise.
    #[serde(default)]
    pub parts: Vec<PartName>,
}

impl Expiry {
    /// Nothing at all.
    pub fn is_empty(&self) -> bool {
        self.backups.is_empty() && self.wal.is_empty() && self.packs.is_empty() && self.parts.is_empty()
    }
}

impl Record for Expiry {
    const NAME: &'static str = "expiry";
}

/// Stands where the manifest would: this base backup was given up, and never becomes complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// Which.
    pub label: BackupLabel,
    /// Who gave it up.
    pub writer: Id128,
    /// When, by our clock.
    pub given_up_at: Timestamp,
}

impl Record for Tombstone {
    const NAME: &'static str = "tombstone";
}

/// What a hold is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Held {
    /// This base backup, and the WAL that makes it consistent.
    Backup(BackupLabel),
    /// This instant stays restorable.
    Time(Timestamp),
}

/// Something is not to be expired.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldRecord {
    /// What.
    pub held: Held,
    /// Why, in a person's words.
    pub reason: String,
    /// Until when; absent: until it is released.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// When it was made, by our clock.
    pub made_at: Timestamp,
    /// The run of pgkeep that made it.
    pub writer: Id128,
}

impl Record for HoldRecord {
    const NAME: &'static str = "hold";
}

/// A hold is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseRecord {
    /// When, by our clock.
    pub released_at: Timestamp,
    /// The run of pgkeep that released it.
    pub writer: Id128,
}

impl Record for ReleaseRecord {
    const NAME: &'static str = "hold-released";
}

/// A hold as it is in the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// Its name.
    pub name: BackupLabel,
    /// What it says; `None`: it does not open, so nobody knows what it holds.
    pub record: Option<HoldRecord>,
    /// When it was released. A release that does not open counts as none.
    pub released: Option<Timestamp>,
}

impl Hold {
    /// Does it hold at this moment?
    pub fn is_in_force(&self, now: Timestamp) -> bool {
        let until = self.record.as_ref().and_then(|record| record.until);
        self.released.is_none() && until.is_none_or(|until| now < until)
    }
}

/// Somebody restores from here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// What for: `restore`.
    pub purpose: String,
    /// The run of pgkeep that holds it.
    pub writer: Id128,
    /// When it began, by our clock.
    pub began_at: Timestamp,
    /// The base backup that is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupLabel>,
    /// The WAL that recovery needs.
    #[serde(default)]
    pub wal: Vec<WalRange>,
    /// How far the work is: bytes done, and in all where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<(u64, Option<u64>)>,
    /// The holder has let go: the next one need not wait.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub released: bool,
}

impl LeaseRecord {
    /// Of somebody who has begun just now, and names nothing yet.
    pub fn new(purpose: &str, writer: Id128, began_at: Timestamp) -> LeaseRecord {
        let (purpose, wal) = (purpose.to_owned(), Vec::new());
        LeaseRecord { purpose, writer, began_at, backup: None, wal, progress: None, released: false }
    }
}

impl Record for LeaseRecord {
    const NAME: &'static str = "lease";
}

/// A lease as it is in the repository: its newest beat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The newest beat's name.
    pub name: LeaseName,
    /// When that was put, by the store's clock.
    pub beat_at: Timestamp,
    /// What it says; `None`: it does not open.
    pub record: Option<LeaseRecord>,
}

/// A plan of expiry, or what goes of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedExpiry {
    /// The plan's name.
    pub name: BackupLabel,
    /// What goes, and no longer only what is condemned.
    pub going: bool,
    /// When it was put, by the store's clock.
    pub put_at: Timestamp,
    /// What it says.
    pub expiry: Expiry,
}

/// What plans of expiry condemn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condemned {
    /// These base backups.
    These(BTreeSet<BackupLabel>),
    /// There is something that cannot be read: it may condemn any.
    Unknown(String),
}

/// What became of a deletion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deleted {
    /// It is not there any more.
    Gone,
    /// The store keeps it: an object lock, or no permission. Why, in its words.
    Refused(String),
}

impl Repository {
    /// Which base backups are condemned. Asked after one's own `start` was put, it says what to avoid.
    ///
    /// # Errors
    /// What the store says.
    pub async fn condemned(&self, cluster: &ClusterId) -> Result<Condemned, CatalogError> {
        let (plans, unreadable) = self.expiries(cluster).await?;
        Ok(match unreadable.into_iter().next() {
            Some(name) => Condemned::Unknown(name),
            None => Condemned::These(plans.into_iter().flat_map(|plan| plan.expiry.backups).collect()),
        })
    }

    /// All plans of expiry by name, those that go after those that only condemn; and the names of what is not understood.
    ///
    /// # Errors
    /// What the store says.
    pub async fn expiries(&self, cluster: &ClusterId) -> Result<(Vec<RecordedExpiry>, Vec<String>), CatalogError> {
        let listed = self.list_under(&folder::expiry_plans(cluster)).await?;
        let (mut names, mut unreadable) = (BTreeMap::new(), Vec::new());
        for meta in listed {
            match Name::parse(meta.key.as_str()).map(|name| name.object) {
                Ok(Object::Of(_, object @ (ClusterObject::ExpiryPlan(_) | ClusterObject::ExpiryGoing(_)))) => {
                    // The latest copy: what was put again is younger.
                    let put_at = names.entry(object).or_insert(meta.modified);
                    *put_at = meta.modified.max(*put_at);
                }
                _ => unreadable.push(meta.key.to_string()),
            }
        }
        let mut read = stream::iter(names)
            .map(|(object, put_at)| async move {
                (self.get_record::<Expiry>(cluster, object.clone()).await, object, put_at)
            })
            .buffered(AT_ONCE);
        let mut plans = Vec::new();
        while let Some((expiry, object, put_at)) = read.next().await {
            let (name, going) = match &object {
                ClusterObject::ExpiryPlan(name) => (*name, false),
                ClusterObject::ExpiryGoing(name) => (*name, true),
                _ => continue,
            };
            match expiry {
                Ok(expiry) => plans.push(RecordedExpiry { name, going, put_at, expiry }),
                Err(error) if error.is_not_found() => {}
                Err(error) if error.is_damage() => unreadable.push(name_of(cluster, object).to_string()),
                Err(error) => return Err(error),
            }
        }
        drop(read);
        plans.sort_by_key(|plan| (plan.name, plan.going));
        Ok((plans, unreadable))
    }

    /// Puts a record under a second that nobody has; its name.
    pub(super) async fn put_by_second<T: Record + PartialEq>(
        &self,
        cluster: &ClusterId,
        object: impl Fn(BackupLabel) -> ClusterObject,
        record: &T,
    ) -> Result<BackupLabel, CatalogError> {
        let mut at = self.now();
        for _ in 0..NAMES {
            let name = BackupLabel::at(at);
            match self.put_record(cluster, object(name), record).await {
                Ok(_) => return Ok(name),
                // A name only has to be new; a little ahead of the clock is as good.
                Err(CatalogError::Taken { .. }) => at += jiff::SignedDuration::from_secs(1),
                Err(error) => return Err(error),
            }
        }
        Err(self.taken(&name_of(cluster, object(BackupLabel::at(at)))))
    }

    /// Records what is condemned; the plan's name.
    ///
    /// # Errors
    /// What the store says.
    pub async fn put_expiry_plan(&self, cluster: &ClusterId, plan: &Expiry) -> Result<BackupLabel, CatalogError> {
        self.put_by_second(cluster, ClusterObject::ExpiryPlan, plan).await
    }

    /// Gives up a base backup that will not become complete. `false`: it has, in this moment.
    ///
    /// # Errors
    /// What the store says.
    pub async fn give_up_backup(&self, cluster: &ClusterId, label: BackupLabel) -> Result<bool, CatalogError> {
        let tombstone = Tombstone { label, writer: self.writer(), given_up_at: self.now() };
        let object = ClusterObject::Manifest(label);
        // Also where a manifest has its head: lists read no more than that.
        let note = records::to_json(&tombstone);
        let note = note.map_err(|source| self.record(&name_of(cluster, object.clone()), source))?;
        match self.put_record_with_note(cluster, object, &tombstone, note).await {
            Ok(_) => Ok(true),
            Err(CatalogError::Taken { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    // ---- holds

    /// Makes a hold; its name.
    ///
    /// # Errors
    /// What the store says.
    pub async fn put_hold(&self, cluster: &ClusterId, hold: &HoldRecord) -> Result<BackupLabel, CatalogError> {
        self.put_by_second(cluster, ClusterObject::Hold, hold).await
    }

    /// Ends a hold. Releasing it again is fine.
    ///
    /// # Errors
    /// What the store says.
    pub async fn release_hold(&self, cluster: &ClusterId, name: BackupLabel) -> Result<(), CatalogError> {
        let release = ReleaseRecord { released_at: self.now(), writer: self.writer() };
        match self.put_record(cluster, ClusterObject::HoldReleased(name), &release).await {
            Ok(_) | Err(CatalogError::Taken { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// All holds, oldest first, released ones too.
    ///
    /// # Errors
    /// What the store says.
    pub async fn holds(&self, cluster: &ClusterId) -> Result<Vec<Hold>, CatalogError> {
        let mut holds: BTreeMap<BackupLabel, Hold> = BTreeMap::new();
        let objects: BTreeSet<ClusterObject> = self.named_under(&folder::holds(cluster)).await?;
        for object in objects {
            let (name, is_release) = match object {
                ClusterObject::Hold(name) => (name, false),
                ClusterObject::HoldReleased(name) => (name, true),
                _ => continue,
            };
            let hold = holds.entry(name).or_insert(Hold { name, record: None, released: None });
            let unless_damaged = |error: CatalogError| match error.is_damage() || error.is_not_found() {
                true => Ok(()),
                false => Err(error),
            };
            if is_release {
                match self.get_record::<ReleaseRecord>(cluster, object).await {
                    Ok(release) => hold.released = Some(release.released_at),
                    Err(error) => unless_damaged(error)?,
                }
            } else {
                match self.get_record::<HoldRecord>(cluster, object).await {
                    Ok(record) => hold.record = Some(record),
                    Err(error) => unless_damaged(error)?,
                }
            }
        }
        Ok(holds.into_values().collect())
    }

    // ---- leases

    /// Begins a lease of a name that nobody has.
    ///
    /// # Errors
    /// What the store says.
    pub async fn begin_lease(&self, cluster: &ClusterId, record: &LeaseRecord) -> Result<LeaseName, CatalogError> {
        let name = format!("{}-{}", record.purpose, random_id()?);
        let lease = LeaseName::new(&name, 1, 1).ok_or_else(|| CatalogError::Misuse {
            name: name.clone(),
            reason: "a lease's purpose is a short word of small letters".to_owned(),
        })?;
        self.put_record(cluster, ClusterObject::Lease(lease.clone()), record).await?;
        Ok(lease)
    }

    /// Says that one is still at work: the next beat. The one before is removed, if the store lets us.
    ///
    /// # Errors
    /// What the store says.
    pub async fn beat(
        &self,
        cluster: &ClusterId,
        lease: &LeaseName,
        record: &LeaseRecord,
    ) -> Result<LeaseName, CatalogError> {
        let next = lease.next();
        self.put_record(cluster, ClusterObject::Lease(next.clone()), record).await?;
        self.end_lease(cluster, lease).await?;
        Ok(next)
    }

    /// Removes a beat, if the store lets us.
    ///
    /// # Errors
    /// What the store says.
    pub async fn end_lease(&self, cluster: &ClusterId, lease: &LeaseName) -> Result<(), CatalogError> {
        for (name, _) in self.names_of(&Object::Of(cluster.clone(), ClusterObject::Lease(lease.clone()))).await? {
            self.delete(&name).await?;
        }
        Ok(())
    }

    /// What time it is by the store's clock: a small object is put and looked at.
    ///
    /// # Errors
    /// What the store says.
    pub async fn ask_store_time(&self, cluster: &ClusterId) -> Result<Timestamp, CatalogError> {
        let record = LeaseRecord::new("clock", self.writer(), self.now());
        let lease = self.begin_lease(cluster, &record).await?;
        let object = Object::Of(cluster.clone(), ClusterObject::Lease(lease.clone()));
        let seen = self.names_of(&object).await?.into_iter().map(|(_, put_at)| put_at).max();
        self.end_lease(cluster, &lease).await?;
        seen.ok_or_else(|| self.inconsistent(&Name::new(object), "it was put, and a listing does not show it"))
    }

    /// The newest beat of every lease.
    ///
    /// # Errors
    /// What the store says.
    pub async fn leases(&self, cluster: &ClusterId) -> Result<Vec<Lease>, CatalogError> {
        let mut newest: BTreeMap<String, (LeaseName, Timestamp)> = BTreeMap::new();
        for meta in self.list_under(&folder::leases(cluster)).await? {
            let Ok(Name { object: Object::Of(_, ClusterObject::Lease(lease)), .. }) = Name::parse(meta.key.as_str())
            else {
                continue;
            };
            let known = newest.entry(lease.name().to_owned()).or_insert((lease.clone(), meta.modified));
            if (lease.epoch, lease.beat) >= (known.0.epoch, known.0.beat) {
                *known = (lease, meta.modified.max(known.1));
            }
        }
        let mut leases = Vec::new();
        for (name, beat_at) in newest.into_values() {
            match self.get_record::<LeaseRecord>(cluster, ClusterObject::Lease(name.clone())).await {
                Ok(record) => leases.push(Lease { name, beat_at, record: Some(record) }),
                Err(error) if error.is_not_found() => {}
                Err(error) if error.is_damage() => leases.push(Lease { name, beat_at, record: None }),
                Err(error) => return Err(error),
            }
        }
        Ok(leases)
    }

    // ---- objects

    /// Removes an object. One that is locked, or that we may not delete, is no error.
    ///
    /// # Errors
    /// What the store says, if it does not say no.
    pub async fn delete(&self, name: &Name) -> Result<Deleted, CatalogError> {
        match self.store().delete(&self.key_of(name)?).await {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(Deleted::Gone),
            Err(error @ (StoreError::Denied { .. } | StoreError::ReadOnly { .. } | StoreError::Unsupported { .. })) => {
                Ok(Deleted::Refused(error.to_string()))
            }
            Err(source) => Err(self.in_store(source)),
        }
    }

    /// Removes an object of a cluster and all its copies.
    ///
    /// # Errors
    /// As [`Repository::delete`].
    pub async fn delete_all_copies(
        &self,
        cluster: &ClusterId,
        object: ClusterObject,
    ) -> Result<Vec<(Name, Deleted)>, CatalogError> {
        let mut done = Vec::new();
        for (name, _) in self.names_of(&Object::Of(cluster.clone(), object)).await? {
            let deleted = self.delete(&name).await?;
            done.push((name, deleted));
        }
        Ok(done)
    }

    pub(super) async fn list_under(&self, folder: &str) -> Result<Vec<ObjectMeta>, CatalogError> {
        list_all(self.store().as_ref(), folder).await.map_err(|source| self.in_store(source))
    }

    pub(super) async fn pages_of(&self, request: ListRequest) -> Result<crate::store::Listing, CatalogError> {
        pages(self.store().as_ref(), request).await.map_err(|source| self.in_store(source))
    }

    async fn named_under<T: FromIterator<ClusterObject>>(&self, folder: &str) -> Result<T, CatalogError> {
        let listed = self.list_under(folder).await?;
        let named = |meta: ObjectMeta| match Name::parse(meta.key.as_str()).ok()?.object {
            Object::Of(_, object) => Some(object),
            _ => None,
        };
        Ok(listed.into_iter().filter_map(named).collect())
    }
}
