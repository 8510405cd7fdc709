//! Copies a base backup: its start, packs and pieces, and its manifest last of all.
//!
//! What always holds: the manifest is put only after everything that it names is durable here, so a copy that was cut
//! off is no backup. A pack keeps its name, also where another backup wrote it.
//! Across realms packs and pieces have other bytes: the manifest names theirs, and no block tags, which only mean
//! something within the realm that made them. Each object's note says which object it was made from, so that a copy that
//! goes on need not read it again.

use futures_util::stream::{self, StreamExt};

use crate::catalog::CatalogError;
use crate::catalog::inventory::DamagedObject;
use crate::catalog::kinds::kind_of;
use crate::catalog::layout::{ClusterObject, CopyToken, Name};
use crate::catalog::load::is_unreadable;
use crate::catalog::reader::ObjectReader;
use crate::catalog::records::{self, BackupStart, CopiedNote, Manifest, PackRef, PartRef};
use crate::catalog::repository::{Repository, name_of};
use crate::catalog::weak::own_name;
use crate::catalog::writer::{ObjectWriter, SealedObject};
use crate::seal::{Header, Kind};
use crate::store::{Created, StoreError};
use crate::types::{BackupLabel, ClusterId};

/// Packs under way at a time; each is in memory, with at most 64 MiB of plaintext and its seals.
const PACKS_AT_ONCE: usize = 2;
/// Pieces of tables under way at a time.
const PARTS_AT_ONCE: usize = 4;
/// How often an object is looked for that was not readable here at first, and is there all the same.
const READS: u32 = 3;

/// What copying a base backup did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CopiedBackup {
    /// Objects that were put.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects of the source that do not open or are missing. Unless this is empty there is no manifest, so no backup.
    pub damaged: Vec<DamagedObject>,
}

/// An object that is here now: its length and header, and whether it was put.
#[derive(Debug)]
struct Brought {
    len: u64,
    header: Header,
    put: bool,
}

/// Something that a manifest names.
#[derive(Debug, Clone)]
struct Wanted {
    name: Name,
    kind: Kind,
    object: ClusterObject,
    len: u64,
    /// Known of packs.
    header: Option<Header>,
}

impl Repository {
    /// Copies a base backup. Its WAL is the caller's business, and has to be here before: a backup without it must not
    /// be listed as complete. `progress` gets the lengths of the source's objects as they are done, put or not.
    ///
    /// # Errors
    /// [`CatalogError::is_not_found`]: the source has no such backup. [`CatalogError::Taken`] where another backup has
    /// its name here. What the stores say. Damage of what the manifest names is no error, but an answer.
    pub async fn copy_backup(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        label: BackupLabel,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<CopiedBackup, CatalogError> {
        self.check_writable()?;
        let manifest = from.get_manifest(cluster, label).await?;
        let mut done = CopiedBackup::default();
        match self.get_manifest(cluster, label).await {
            Ok(ours) if same_backup(&ours, &manifest) => {
                match self.sync_object(&name_of(cluster, ClusterObject::Manifest(label))).await {
                    Err(error) if !error.is_not_found() => return Err(error),
                    _ => {} // there, or read from a copy
                }
                progress(stored(&manifest));
                return Ok(done);
            }
            Ok(_) => return Err(self.taken(&name_of(cluster, ClusterObject::Manifest(label)))),
            Err(error) if error.is_not_found() || error.is_damage() => {}
            Err(error) => return Err(error),
        }
        self.copy_start(from, cluster, &manifest).await?;

        let mut copied = Manifest { packs: Vec::new(), tables: Vec::new(), ..manifest.clone() };
        (copied.tags, copied.server_manifest) = (Vec::new(), Vec::new());
        let packs = stream::iter(&manifest.packs).map(|pack| async move {
            let name = name_of(cluster, ClusterObject::Pack(pack.pack));
            let header = Header::parse(&pack.header).map_err(|source| from.sealed(&name, source));
            let brought = match header {
                Ok(header) => {
                    let object = ClusterObject::Pack(pack.pack);
                    let wanted = Wanted { name, kind: Kind::Pack, object, len: pack.len, header: Some(header) };
                    self.bring(from, cluster, &wanted).await
                }
                Err(error) => Err(error),
            };
            (pack, brought)
        });
        let mut packs = packs.buffered(PACKS_AT_ONCE);
        while let Some((pack, brought)) = packs.next().await {
            progress(pack.len);
            let name = name_of(cluster, ClusterObject::Pack(pack.pack));
            let Some(brought) = done.take(&name, brought)? else { continue };
            let Brought { len, header, .. } = brought;
            copied.packs.push(PackRef { len, header: header.to_bytes(), ..pack.clone() });
        }
        drop(packs);

        let tags: &[PartRef] = if self.same_realm(from) { &manifest.tags } else { &[] };
        let lists: [(&[PartRef], &mut Vec<PartRef>); 3] = [
            (&manifest.tables, &mut copied.tables),
            (tags, &mut copied.tags),
            (&manifest.server_manifest, &mut copied.server_manifest),
        ];
        for (theirs, ours) in lists {
            let parts = stream::iter(theirs).map(|part| async move {
                let object = ClusterObject::Part(part.part);
                let (name, kind) = (name_of(cluster, object.clone()), kind_of(&object));
                let wanted = Wanted { name, kind, object, len: part.len, header: None };
                (part, self.bring(from, cluster, &wanted).await)
            });
            let mut parts = parts.buffered(PARTS_AT_ONCE);
            while let Some((part, brought)) = parts.next().await {
                progress(part.len);
                let name = name_of(cluster, ClusterObject::Part(part.part));
                let Some(brought) = done.take(&name, brought)? else { continue };
                ours.push(PartRef { len: brought.len, ..part.clone() });
            }
        }
        if !done.damaged.is_empty() {
            return Ok(done);
        }
        self.copy_manifest(from, cluster, copied, &mut done).await?;
        Ok(done)
    }

    /// The same record, and the same bytes within a realm; made from the manifest where the source has lost its own.
    async fn copy_start(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        manifest: &Manifest,
    ) -> Result<(), CatalogError> {
        let label = manifest.backup.label;
        let object = ClusterObject::Start(label);
        let start: Result<BackupStart, _> = from.get_record(cluster, object.clone()).await;
        let start = match start {
            Ok(start) => start,
            Err(error) if error.is_not_found() || error.is_damage() => BackupStart {
                label,
                writer: from.writer(),
                started_at: manifest.backup.started_at,
                parents: manifest.parents.clone(),
            },
            Err(error) => return Err(error),
        };
        let theirs: Result<BackupStart, _> = self.get_record(cluster, object.clone()).await;
        match theirs {
            // Begun by the same run; or by an earlier copy of a backup whose start was lost.
            Ok(theirs) if theirs.label == label && theirs.started_at == start.started_at => return Ok(()),
            Ok(_) => return Err(self.taken(&name_of(cluster, object))),
            Err(error) if error.is_not_found() => {}
            Err(error) if error.is_damage() => return Ok(()), // its name pins what it has to
            Err(error) => return Err(error),
        }
        let name = name_of(cluster, object.clone());
        if self.same_realm(from)
            && !self.names_are_shared()
            && let Ok((checked, _)) = from.fetch_any(&name, Kind::Record).await
        {
            let sealed = self.as_it_is(from, name, Kind::Record, &checked).await?;
            return self.put_object(&sealed).await.map(drop);
        }
        self.put_record(cluster, object, &start).await.map(drop)
    }

    /// Makes an object of a backup durable here.
    async fn bring(&self, from: &Repository, cluster: &ClusterId, wanted: &Wanted) -> Result<Brought, CatalogError> {
        if self.same_realm(from) {
            self.bring_as_it_is(from, wanted).await
        } else {
            self.bring_anew(from, cluster, wanted).await
        }
    }

    async fn bring_as_it_is(&self, from: &Repository, wanted: &Wanted) -> Result<Brought, CatalogError> {
        let Wanted { name, kind, len, header, .. } = wanted;
        let header = match header {
            Some(header) => Some(header.clone()),
            None => match from.get_bytes(name, Some(0..Header::LEN as u64)).await {
                Ok(start) => Header::parse(&start).ok(),
                Err(error) if error.is_not_found() => None, // a copy of it may be there
                Err(error) => return Err(error),
            },
        };
        // What is here under this header is this object: it is authenticated by it.
        if let Some(header) = &header
            && let Some(here) = self.find_under(name, *kind, header, *len).await?
        {
            self.sync_object(&here).await?;
            return Ok(Brought { len: *len, header: header.clone(), put: false });
        }
        let (checked, _) = from.fetch_any(name, *kind).await?;
        let fits = checked.bytes.len() as u64 == *len
            && wanted.header.as_ref().is_none_or(|header| header.as_bytes() == checked.header.as_bytes());
        if !fits {
            return Err(from.inconsistent(name, "it is not the object that the manifest names"));
        }
        let object = self.as_it_is(from, name.clone(), *kind, &checked).await?;
        let put = self.put_beside_damage(object, from).await? == Created::New;
        Ok(Brought { len: *len, header: checked.header, put })
    }

    /// The name, or a copy's, that holds an object of this header and length.
    async fn find_under(
        &self,
        name: &Name,
        kind: Kind,
        header: &Header,
        len: u64,
    ) -> Result<Option<Name>, CatalogError> {
        let is_it = async |name: &Name| match self.store().head(&self.key_of(name)?).await {
            Ok(meta) if meta.len == len => match self.get_footer_under(name, kind, header, len).await {
                Ok(_) => Ok(Some(true)),
                Err(error) if error.is_damage() || error.is_not_found() => Ok(Some(false)),
                Err(error) => Err(error),
            },
            Ok(_) => Ok(Some(false)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(source) => Err(self.in_store(source)),
        };
        // Where names are told apart by tokens nothing lies under the plain one.
        let own = if self.names_are_shared() { own_name(name, &header.to_bytes()) } else { name.clone() };
        match is_it(&own).await? {
            Some(true) => return Ok(Some(own)),
            None => return Ok(None),
            Some(false) => {}
        }
        for copy in self.copies_of(name).await? {
            if is_it(&copy).await? == Some(true) {
                return Ok(Some(copy));
            }
        }
        Ok(None)
    }

    /// Puts an object whose name belongs to one backup; beside what is there, if that does not open.
    async fn put_beside_damage(&self, object: SealedObject, from: &Repository) -> Result<Created, CatalogError> {
        match self.put_object(&object).await {
            Err(CatalogError::Taken { .. }) => {}
            put => return put,
        }
        match self.fetch_checked(&object.name, object.kind, None).await {
            Ok(_) => return Err(self.taken(&object.name)),
            Err(error) if error.is_damage() || error.is_not_found() => {
                tracing::warn!(object = %object.name, %error, from = from.name(), "does not open; copied beside it");
            }
            Err(error) => return Err(error),
        }
        let name = object.name.copy(CopyToken::of(self.writer()));
        self.put_object(&SealedObject { name, ..object }).await
    }

    async fn bring_anew(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        wanted: &Wanted,
    ) -> Result<Brought, CatalogError> {
        let Wanted { name, kind, object, len, header } = wanted;
        let own = header.as_ref().filter(|_| from.names_are_shared()).map(|header| own_name(name, &header.to_bytes()));
        let reader = from.open_reader(name.clone(), own, *kind, *len, header.clone()).await?;
        let note = CopiedNote { realm: from.realm(), header: reader.header().to_bytes() };
        let json = records::to_json(&note).map_err(|source| self.record(name, source))?;
        for attempt in 1.. {
            if let Some((len, header)) = self.find_copied(name, *kind, &note, &reader).await? {
                return Ok(Brought { len, header, put: false });
            }
            let writer = self.seal_object(cluster, object.clone()).await?;
            let sealed = self.seal_from(reader.clone(), writer, json.clone()).await?;
            let header = Header::parse(sealed.header()).map_err(|source| self.sealed(name, source))?;
            let len = sealed.len();
            match self.put_beside_damage(sealed, from).await {
                // What is there opens now: its reading was spoilt on the way before, and it may be this very object.
                Err(error @ CatalogError::Taken { .. }) if attempt < READS => {
                    tracing::debug!(object = %name, %error, "there after all; looked at again");
                }
                put => return Ok(Brought { len, header, put: put? == Created::New }),
            }
        }
        Err(self.taken(name))
    }

    /// An object here that was made from that one: its note says so, or all of its content does.
    async fn find_copied(
        &self,
        name: &Name,
        kind: Kind,
        note: &CopiedNote,
        theirs: &ObjectReader,
    ) -> Result<Option<(u64, Header)>, CatalogError> {
        let mut names = vec![name.clone()];
        names.extend(self.copies_of(name).await?);
        let mut other = None;
        for name in names {
            let meta = match self.store().head(&self.key_of(&name)?).await {
                Ok(meta) => meta,
                Err(StoreError::NotFound { .. }) => continue,
                Err(source) => return Err(self.in_store(source)),
            };
            let (header, footer) = match self.get_footer(&name, kind, meta.len).await {
                Ok(ours) => ours,
                Err(error) if error.is_damage() || error.is_not_found() => continue,
                Err(error) => return Err(error),
            };
            let made_from: Option<CopiedNote> = records::from_json(&footer.extra).ok();
            let same = if footer.plaintext_len != theirs.plaintext_len() {
                Some(false)
            } else if made_from.as_ref() == Some(note) {
                Some(true)
            } else {
                self.same_content(&name, kind, meta.len, theirs).await?
            };
            match same {
                Some(true) => {
                    self.sync_object(&name).await?;
                    return Ok(Some((meta.len, header)));
                }
                Some(false) => other = Some(name),
                None => {}
            }
        }
        other.map_or(Ok(None), |name| Err(self.taken(&name)))
    }

    /// Whether an object here holds the bytes of that one there; `None` where it is damaged. Reads both to the end.
    async fn same_content(
        &self,
        name: &Name,
        kind: Kind,
        len: u64,
        theirs: &ObjectReader,
    ) -> Result<Option<bool>, CatalogError> {
        let unusable = |error: CatalogError| match error {
            error if error.is_damage() => Ok(None),
            error if is_unreadable(&error) => Ok(Some(false)), // who can say
            error => Err(error),
        };
        let mut ours = match self.open_reader_at(name.clone(), kind, len, None).await {
            Err(error) => return unusable(error),
            Ok(ours) => ours,
        };
        let mut theirs = theirs.clone();
        loop {
            let theirs = theirs.next_chunk().await?;
            let ours = match ours.next_chunk().await {
                Err(error) => return unusable(error),
                Ok(chunk) => chunk,
            };
            match (ours, theirs) {
                (None, None) => return Ok(Some(true)),
                (ours, theirs) if ours != theirs => return Ok(Some(false)),
                _ => {}
            }
        }
    }

    /// Seals an object's content anew, some MiB at a time.
    async fn seal_from(
        &self,
        mut reader: ObjectReader,
        mut writer: ObjectWriter,
        note: Vec<u8>,
    ) -> Result<SealedObject, CatalogError> {
        while let Some(chunk) = reader.next_chunk().await? {
            writer = self.off_thread(move || writer.push(&chunk).map(|()| writer)).await??;
        }
        writer.finish(&note)
    }

    async fn copy_manifest(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        mut copied: Manifest,
        done: &mut CopiedBackup,
    ) -> Result<(), CatalogError> {
        let label = copied.backup.label;
        let name = name_of(cluster, ClusterObject::Manifest(label));
        let (size, created) = if self.same_realm(from) {
            let (checked, _) = from.fetch_any(&name, Kind::Record).await?;
            let sealed = self.as_it_is(from, name, Kind::Record, &checked).await?;
            // Where names are shared, records are compared by what they say.
            let created = match self.names_are_shared() {
                true => self.put_manifest(cluster, &copied).await?,
                false => self.put_beside_damage(sealed.clone(), from).await?,
            };
            (sealed.len(), created)
        } else {
            let own = |named: BackupLabel| named == label;
            let packs = copied.packs.iter().filter(|pack| own(pack.pack.label)).map(|pack| pack.len);
            let parts = copied.tables.iter().chain(&copied.server_manifest);
            let parts = parts.filter(|part| own(part.part.label)).map(|part| part.len);
            copied.backup.stored_bytes = packs.chain(parts).sum();
            let note = records::to_json(&copied.backup).map_err(|source| self.record(&name, source))?;
            let json = records::to_json(&copied).map_err(|source| self.record(&name, source))?;
            let mut writer = self.seal_object(cluster, ClusterObject::Manifest(label)).await?;
            writer.push(&json)?;
            let sealed = writer.finish(&note)?;
            let created = match self.names_are_shared() {
                true => self.put_manifest(cluster, &copied).await?,
                false => self.put_beside_damage(sealed.clone(), from).await?,
            };
            (sealed.len(), created)
        };
        if created == Created::New {
            done.objects += 1;
            done.bytes += size;
        }
        Ok(())
    }
}

impl CopiedBackup {
    /// Counts what was brought; damage of the source is written down, and `None`.
    fn take(&mut self, name: &Name, brought: Result<Brought, CatalogError>) -> Result<Option<Brought>, CatalogError> {
        match brought {
            Ok(brought) => {
                if brought.put {
                    self.objects += 1;
                    self.bytes += brought.len;
                }
                Ok(Some(brought))
            }
            Err(error) if error.is_damage() || error.is_not_found() => {
                self.damaged.push(DamagedObject { name: name.to_string(), reason: error.to_string() });
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Bytes of everything that a manifest names.
fn stored(manifest: &Manifest) -> u64 {
    let parts = manifest.tables.iter().chain(&manifest.tags).chain(&manifest.server_manifest);
    manifest.packs.iter().map(|pack| pack.len).chain(parts.map(|part| part.len)).sum()
}

/// Whether two manifests are of one backup: all but what sealing anew changes.
pub fn same_backup(one: &Manifest, other: &Manifest) -> bool {
    let info = |manifest: &Manifest| records::BackupInfo { stored_bytes: 0, ..manifest.backup.clone() };
    let packs = |manifest: &Manifest| -> Vec<_> {
        manifest.packs.iter().map(|pack| (pack.pack, pack.plaintext_len, pack.live)).collect()
    };
    let parts = |parts: &[PartRef]| -> Vec<_> { parts.iter().map(|part| (part.part, part.entries)).collect() };
    info(one) == info(other)
        && packs(one) == packs(other)
        && parts(&one.tables) == parts(&other.tables)
        && parts(&one.server_manifest) == parts(&other.server_manifest)
        && one.parents == other.parents
}
