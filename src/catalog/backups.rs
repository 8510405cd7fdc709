//! Which base backups there are, whether what a manifest names is there, and what one frees.
//!
//! Only names and lengths are read. A name that is not understood is left alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::CatalogError;
use super::layout::{ClusterObject, Name, Object, PackName, PartName, folder};
use super::records::Manifest;
use super::repository::Repository;
use crate::store::{ObjectMeta, list_all};
use crate::types::{BackupLabel, ClusterId};

/// What a manifest names and is not there, or is of another length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NotThere {
    /// Packs.
    pub packs: BTreeSet<PackName>,
    /// Pieces of tables.
    pub parts: BTreeSet<PartName>,
}

impl NotThere {
    /// All is there.
    pub fn is_empty(&self) -> bool {
        self.packs.is_empty() && self.parts.is_empty()
    }

    /// One of them, for a message.
    pub fn first(&self) -> Option<String> {
        let pack = self.packs.first().map(|pack| format!("pack/{pack}"));
        pack.or_else(|| self.parts.first().map(|part| format!("backup/{part}")))
    }
}

impl Repository {
    /// The base backups that have a manifest, oldest first. Whether it opens is not asked.
    ///
    /// # Errors
    /// What the store says.
    pub async fn backup_labels(&self, cluster: &ClusterId) -> Result<Vec<BackupLabel>, CatalogError> {
        let listed = self.named(&folder::backups(cluster)).await?;
        let labels: BTreeSet<BackupLabel> = listed.into_iter().filter_map(|(object, _)| label_of(&object)).collect();
        Ok(labels.into_iter().collect())
    }

    /// Which packs and pieces that a manifest names are not there, or of another length; those of `but` are not looked
    /// for. Costs two listings for each backup that it names.
    ///
    /// # Errors
    /// What the store says.
    pub async fn not_there(
        &self,
        cluster: &ClusterId,
        manifest: &Manifest,
        but: Option<BackupLabel>,
    ) -> Result<NotThere, CatalogError> {
        let mut not_there = NotThere::default();
        let parts = [&manifest.tables, &manifest.tags, &manifest.server_manifest].into_iter().flatten();
        let mut named: BTreeMap<BackupLabel, HashMap<ClusterObject, u64>> = BTreeMap::new();
        for pack in &manifest.packs {
            named.entry(pack.pack.label).or_default().insert(ClusterObject::Pack(pack.pack), pack.len);
        }
        for part in parts {
            named.entry(part.part.label).or_default().insert(ClusterObject::Part(part.part), part.len);
        }
        for (label, mut objects) in named.into_iter().filter(|(label, _)| Some(*label) != but) {
            for folder in [folder::packs(cluster, label), folder::backup(cluster, label)] {
                if objects.is_empty() {
                    break;
                }
                for (object, listed) in self.named(&folder).await? {
                    if objects.get(&object) == Some(&listed.len) {
                        objects.remove(&object);
                    }
                }
            }
            for object in objects.into_keys() {
                match object {
                    ClusterObject::Pack(pack) => not_there.packs.insert(pack),
                    ClusterObject::Part(part) => not_there.parts.insert(part),
                    _ => false, // invariant: nothing else was put in
                };
            }
        }
        Ok(not_there)
    }

    /// Removes the packs and pieces of a base backup that will never have a manifest, because the run that took it says
    /// so. Its start stays: a name is never used again. How many objects were removed.
    ///
    /// # Errors
    /// [`CatalogError::Taken`] if there is a manifest all the same: then nothing is touched. What the store says.
    pub async fn remove_unfinished(&self, cluster: &ClusterId, label: BackupLabel) -> Result<u64, CatalogError> {
        let own = self.named(&folder::backup(cluster, label)).await?;
        if let Some((_, manifest)) = own.iter().find(|(object, _)| matches!(object, ClusterObject::Manifest(_))) {
            let (repository, name) = (self.name().to_owned(), manifest.key.to_string());
            return Err(CatalogError::Taken { repository, name });
        }
        let mut removed = 0;
        for (object, listed) in own.into_iter().chain(self.named(&folder::packs(cluster, label)).await?) {
            let its = match object {
                ClusterObject::Pack(pack) => pack.label == label,
                ClusterObject::Part(part) => part.label == label,
                _ => false,
            };
            if its {
                self.store().delete(&listed.key).await.map_err(|source| self.in_store(source))?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// What lies under a folder of a cluster and has a name that is understood.
    async fn named(&self, folder: &str) -> Result<Vec<(ClusterObject, ObjectMeta)>, CatalogError> {
        let listed = list_all(self.store().as_ref(), folder).await.map_err(|source| self.in_store(source))?;
        let named = |listed: ObjectMeta| match Name::parse(listed.key.as_str()) {
            Ok(Name { object: Object::Of(_, object), .. }) => Some((object, listed)),
            _ => None,
        };
        Ok(listed.into_iter().filter_map(named).collect())
    }
}

fn label_of(object: &ClusterObject) -> Option<BackupLabel> {
    match object {
        ClusterObject::Manifest(label) => Some(*label),
        _ => None,
    }
}

/// What a base backup costs beside the others that are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// Bytes of objects that only this backup names: what deleting it would free.
    pub alone: u64,
    /// Bytes of objects that others name, too.
    pub shared: u64,
}

/// Finds out what each base backup shares with the others, by their manifests alone. Some 60 bytes for each object that
/// any of them names.
#[derive(Debug, Default)]
pub struct Sharing {
    shares: BTreeMap<BackupLabel, Share>,
    /// Who alone names an object; `None`: several do.
    packs: HashMap<PackName, Option<BackupLabel>>,
    parts: HashMap<PartName, Option<BackupLabel>>,
}

impl Sharing {
    /// Nothing yet.
    pub fn new() -> Sharing {
        Sharing::default()
    }

    /// Adds a backup. Each one once.
    pub fn add(&mut self, manifest: &Manifest) {
        let label = manifest.backup.label;
        for pack in &manifest.packs {
            note(&mut self.shares, &mut self.packs, label, pack.pack, pack.len);
        }
        for part in [&manifest.tables, &manifest.tags, &manifest.server_manifest].into_iter().flatten() {
            note(&mut self.shares, &mut self.parts, label, part.part, part.len);
        }
    }

    /// What a backup costs; nothing is known of one that was not added.
    pub fn of(&self, label: BackupLabel) -> Option<Share> {
        self.shares.get(&label).copied()
    }
}

fn note<K: std::hash::Hash + Eq>(
    shares: &mut BTreeMap<BackupLabel, Share>,
    owners: &mut HashMap<K, Option<BackupLabel>>,
    label: BackupLabel,
    object: K,
    len: u64,
) {
    let share = shares.entry(label).or_default();
    match owners.entry(object) {
        std::collections::hash_map::Entry::Vacant(vacant) => {
            vacant.insert(Some(label));
            share.alone += len;
        }
        std::collections::hash_map::Entry::Occupied(mut owner) => {
            match owner.get_mut().take_if(|owner| *owner != label) {
                // The second one: the first has it no longer alone.
                Some(first) => {
                    share.shared += len;
                    let first = shares.entry(first).or_default();
                    (first.alone, first.shared) = (first.alone - len, first.shared + len); // invariant: added there before
                }
                None if owner.get().is_none() => share.shared += len,
                None => {} // named twice by one manifest
            }
        }
    }
}
