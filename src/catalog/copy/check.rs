//! One object, read and opened from its first byte to its last where it lies; and brought back from another repository.
//!
//! What always holds: nothing is replaced. What is damaged stays, and a copy `~token` with the same bytes goes beside it, which
//! readers take because it opens; what is missing gets its own name. Nothing is put that was not opened just before, and what
//! was put is read back.
//! Crash, cancellation: a copy is there or not. One that is there twice does no harm.

use super::object::Hashing;
use crate::catalog::CatalogError;
use crate::catalog::kinds::kind_of;
use crate::catalog::layout::{ClusterObject, CopyToken, Name, Object};
use crate::catalog::reader::Piece;
use crate::catalog::records::{self, WalRangeNote};
use crate::catalog::repository::{Repository, random_id};
use crate::catalog::weak::own_name;
use crate::store::StoreError;
use crate::types::{Branch, ClusterId, SegmentNumber, SegmentSize};

/// Why an object cannot be handled here.
fn misuse(name: &Name, reason: &str) -> CatalogError {
    CatalogError::Misuse { name: name.to_string(), reason: reason.to_owned() }
}

impl Repository {
    /// Reads all of an object of a cluster and opens it: header, binding, footer, every frame; of WAL from a segment's first byte
    /// on the digest of its bytes as well. What does not open is read again before it is called damaged.
    ///
    /// # Errors
    /// [`CatalogError::is_not_found`]; damage that names the object; an error that is no damage where the key cannot open it;
    /// what the store says.
    pub async fn check_object(&self, name: &Name, len: u64) -> Result<(), CatalogError> {
        let Object::Of(_, object) = &name.object else { return Err(misuse(name, "it is no object of a cluster")) };
        if let ClusterObject::Tail(_, _, from) = object {
            let piece = Piece { name: name.clone(), from: *from, to: None, len };
            let damage = self.open_tail_piece(&piece).await?.and_then(|(_, tail, _)| tail.damage);
            return damage.map_or(Ok(()), |reason| Err(self.inconsistent(name, reason)));
        }
        let (checked, hashing) = self.fetch_checked(name, kind_of(object), Some(Hashing::new(Vec::new()))).await?;
        let Some(hashing) = hashing else {
            // The frames were not opened: the key says why.
            return match self.key_for(&checked.header).await {
                Err(error) => Err(error),
                Ok(_) => Err(misuse(name, "its frames were not opened")),
            };
        };
        if checked.bytes.len() as u64 != len {
            return Err(
                self.inconsistent(name, format!("it has {} bytes, and was listed with {len}", checked.bytes.len()))
            );
        }
        if let ClusterObject::Wal(_, range) | ClusterObject::Open(_, range) = object {
            let note: WalRangeNote = records::from_json(&checked.note).map_err(|source| self.record(name, source))?;
            let fits = checked.plaintext_len == u64::from(range.bytes());
            let is_said = range.from() > 0 || note.digest_to.is_none_or(|end| end == hashing.digest());
            if !fits || !is_said {
                return Err(self.inconsistent(name, "it does not hold what its name and its note say"));
            }
        }
        Ok(())
    }

    /// Whether an object, or a copy of it, is listed here.
    ///
    /// # Errors
    /// What the store says.
    pub async fn lists_object(&self, object: &Object) -> Result<bool, CatalogError> {
        Ok(!self.names_of(object).await?.is_empty())
    }

    /// Whether a complete segment is listed here.
    ///
    /// # Errors
    /// What the store says.
    pub async fn lists_segment(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
    ) -> Result<bool, CatalogError> {
        Ok(self.list_segment(cluster, branch, segment, size).await?.complete(size).is_some())
    }

    /// Puts an object here as it is in another repository of the realm: under its own name where it is missing, as a copy
    /// beside what is damaged. The name under which it is now.
    ///
    /// # Errors
    /// [`CatalogError::is_not_found`] where the other repository lacks it, damage where it does not open there either;
    /// [`CatalogError::Misuse`] across realms and for the open segment's tail; what the stores say.
    pub async fn repair_object(&self, from: &Repository, object: &Object) -> Result<Name, CatalogError> {
        self.check_writable()?;
        let name = Name::new(object.clone());
        let of_cluster = match object {
            Object::Of(_, ClusterObject::Tail(..)) => {
                return Err(misuse(&name, "a tail is put again by the archiver alone"));
            }
            Object::Of(_, of_cluster) => of_cluster,
            _ => return Err(misuse(&name, "it is no object of a cluster")),
        };
        if !self.same_realm(from) {
            return Err(misuse(&name, "the other repository has another key: its objects have other bytes"));
        }
        let kind = kind_of(of_cluster);
        let theirs: Vec<Name> = from.names_of(object).await?.into_iter().map(|(name, _)| name).collect();
        if theirs.is_empty() {
            return Err(from.in_store(StoreError::NotFound { key: from.key_of(&name)? }));
        }
        let (checked, opened) = from.fetch_first(&theirs, kind, Some(&Hashing::new(Vec::new()))).await?;
        if opened.is_none() {
            return Err(misuse(&name, "this key cannot open it, so nobody would know whether it is whole"));
        }
        let sealed = self.as_it_is(from, name, kind, &checked).await?;
        let put_as = match () {
            // A token of its own: the name that the header gives may be the damaged one's.
            () if self.lists_object(object).await? => sealed.name.copy(CopyToken::of(random_id()?)),
            () if self.names_are_shared() => own_name(&sealed.name, &sealed.header),
            () => sealed.name.clone(),
        };
        self.put_bytes(&put_as, sealed.body.clone()).await?;
        self.check_object(&put_as, sealed.len()).await?;
        Ok(put_as)
    }
}
