//! One object as it lies in one repository, checked from its first byte to its last, for another repository of the realm.

use std::sync::Arc;

use bytes::Bytes;

use crate::catalog::CatalogError;
use crate::catalog::layout::Name;
use crate::catalog::load::is_unreadable;
use crate::catalog::records::ConflictNote;
use crate::catalog::repository::Repository;
use crate::catalog::writer::{Conflict, Found, Identity, Put, SealedObject};
use crate::seal::{Binding, Header, Kind, Opener};
use crate::store::Body;
use crate::types::{Digest, Id128, SegmentHasher};

/// How often an object that does not open is read before it is called damaged: it may have been spoilt on the way.
const READS: u32 = 3;

/// A segment's bytes on their way: hashed from the first on, and what the digest was at the borders.
#[derive(Debug, Clone)]
pub(super) struct Hashing {
    hasher: SegmentHasher,
    borders: Vec<u32>,
    digests: Vec<(u32, Digest)>,
}

impl Hashing {
    /// `borders`: offsets at which the digest is asked for later.
    pub fn new(mut borders: Vec<u32>) -> Hashing {
        borders.sort_unstable();
        borders.dedup();
        Hashing { hasher: SegmentHasher::new(), borders, digests: Vec::new() }
    }

    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let at = self.hasher.offset();
            let next = self.borders.iter().map(|border| u64::from(*border)).find(|border| *border > at);
            let step = next.and_then(|next| usize::try_from(next - at).ok()).unwrap_or(usize::MAX).min(bytes.len());
            let (now, rest) = bytes.split_at(step); // invariant: step <= bytes.len()
            self.hasher.update(now);
            if let (true, Ok(at)) = (next == Some(self.hasher.offset()), u32::try_from(self.hasher.offset())) {
                self.digests.push((at, self.hasher.digest()));
            }
            bytes = rest;
        }
    }

    /// The digest of all bytes so far.
    pub fn digest(&self) -> Digest {
        self.hasher.digest()
    }

    /// The digest at a border that was passed.
    pub fn digest_at(&self, border: u32) -> Option<Digest> {
        if border == 0 {
            return Some(Digest::of(b""));
        }
        self.digests.iter().find(|(at, _)| *at == border).map(|(_, digest)| *digest)
    }
}

/// An object that was checked.
#[derive(Debug)]
pub(super) struct Checked {
    pub bytes: Bytes,
    pub header: Header,
    pub plaintext_len: u64,
    pub note: Bytes,
}

impl Repository {
    /// Whether finished objects of the two have the same bytes.
    pub fn same_realm(&self, other: &Repository) -> bool {
        self.realm() == other.realm() && self.meta_key().id() == other.meta_key().id()
    }

    /// An object's bytes after everything in it opened: header, binding, footer, every frame. Where this key cannot open
    /// the frames, what surrounds them: their authenticity is left to who can, their lengths and marks are not.
    ///
    /// # Errors
    /// Damage that names the object; what the store says.
    pub(super) async fn fetch_checked(
        &self,
        name: &Name,
        kind: Kind,
        hashing: Option<Hashing>,
    ) -> Result<(Checked, Option<Hashing>), CatalogError> {
        for _ in 1..READS {
            match self.fetch_once(name, kind, hashing.clone()).await {
                Err(error) if error.is_damage() => {
                    tracing::debug!(object = %name, %error, "does not open; read again, in case it was spoilt on the way");
                }
                result => return result,
            }
        }
        self.fetch_once(name, kind, hashing).await
    }

    async fn fetch_once(
        &self,
        name: &Name,
        kind: Kind,
        hashing: Option<Hashing>,
    ) -> Result<(Checked, Option<Hashing>), CatalogError> {
        let bytes = self.get_bytes(name, None).await?;
        let sealed = |source| self.sealed(name, source);
        let header = Header::parse(&bytes).map_err(sealed)?;
        let bound = name.object.to_string();
        // The name and the key first: a stranger's object must not be reported as a lost key.
        Opener::new(&header, self.meta_key(), None, &self.binding(kind, &bound)).map_err(sealed)?;
        let content = match self.key_for(&header).await {
            Ok(content) => content,
            Err(error) if is_unreadable(&error) => None,
            Err(error) => return Err(error),
        };
        let (meta, realm) = (self.meta_key().clone(), self.realm());
        let checked = self.off_thread(move || {
            let binding = Binding { realm, repository: None, kind, name: &bound };
            let opener = Opener::new(&header, &meta, content.as_ref(), &binding)?;
            let footer = opener.open_footer(&bytes, bytes.len() as u64)?;
            let mut hashing = hashing;
            let opened = opener.check_frames(&footer, &bytes, |plaintext| {
                hashing.iter_mut().for_each(|hashing| hashing.update(plaintext));
            })?;
            let hashing = hashing.filter(|_| opened);
            let (plaintext_len, note) = (footer.plaintext_len, footer.extra);
            Ok((Checked { bytes, header, plaintext_len, note }, hashing))
        });
        checked.await?.map_err(sealed)
    }

    /// [`Repository::fetch_checked`] of the first of these names (an object and its copies) that opens.
    pub(super) async fn fetch_first(
        &self,
        names: &[Name],
        kind: Kind,
        hashing: Option<&Hashing>,
    ) -> Result<(Checked, Option<Hashing>), CatalogError> {
        let mut first = None;
        for name in names {
            match self.fetch_checked(name, kind, hashing.cloned()).await {
                // An object of which only a broken copy is there is not missing.
                Err(error) if error.is_damage() || error.is_not_found() => {
                    first = first.filter(|first: &CatalogError| !first.is_not_found()).or(Some(error));
                }
                result => return result,
            }
        }
        Err(first.unwrap_or_else(|| CatalogError::Misuse {
            name: format!("repository {}", self.name()),
            reason: "no object was named".to_owned(),
        }))
    }

    /// [`Repository::fetch_checked`] of an object, or of the first copy of it that opens. Where names are shared the copies
    /// of what somebody else could have put are compared before one is believed; a pack is named by its header.
    pub(super) async fn fetch_any(&self, name: &Name, kind: Kind) -> Result<(Checked, Option<Hashing>), CatalogError> {
        if self.names_are_shared() && matches!(kind, Kind::Record | Kind::History | Kind::WalFile) {
            let name = self.get_shared(name, kind).await?.name;
            return self.fetch_checked(&name, kind, None).await;
        }
        let mut first = match self.fetch_checked(name, kind, None).await {
            Err(error) if error.is_damage() || error.is_not_found() => error,
            result => return result,
        };
        for copy in self.copies_of(name).await? {
            match self.fetch_checked(&copy, kind, None).await {
                Err(error) if error.is_damage() && first.is_not_found() => first = error,
                Err(error) if error.is_damage() || error.is_not_found() => {}
                result => return result,
            }
        }
        Err(first)
    }

    /// An object of the same realm, ready to be put here as it is; the key that sealed it is durable here.
    pub(super) async fn as_it_is(
        &self,
        from: &Repository,
        name: Name,
        kind: Kind,
        checked: &Checked,
    ) -> Result<SealedObject, CatalogError> {
        if let Some(id) = checked.header.key_id() {
            self.copy_key(from, id).await?;
        }
        let (body, header) = (Body::from(checked.bytes.clone()), checked.header.to_bytes());
        let name = Name::new(name.object); // copies have the bytes of the original, and its name here
        Ok(SealedObject {
            name,
            kind,
            body,
            header,
            plaintext_len: checked.plaintext_len,
            key: None,
            puts: Arc::default(),
        })
    }

    /// Puts what was read from another repository. What is there with other content stays, and nothing is kept aside:
    /// the other repository has it.
    pub(super) async fn put_copied(
        &self,
        object: &SealedObject,
        identity: Identity,
        from: &Repository,
    ) -> Result<Put, CatalogError> {
        Ok(match self.put_or_compare(object, &identity).await? {
            Found::New => Put::New,
            Found::Same => Put::SameContent,
            Found::Beside { damaged, copy } => Put::BesideDamaged { damaged, copy },
            Found::Other(name, theirs, writer) => {
                self.give_up(object, &name).await?;
                self.differs(&name, theirs.content, writer, identity.content, from)
            }
            Found::Damaged(error) => self.put_copy(object, &identity, error).await?,
        })
    }

    /// What is here under `name` has other content than what `from` has there.
    pub(super) fn differs(
        &self,
        name: &Name,
        theirs: Digest,
        their_writer: Id128,
        ours: Digest,
        from: &Repository,
    ) -> Put {
        let existing = name.to_string();
        let kept = format!("{existing} in repository {}", from.name());
        let note = ConflictNote { name: existing.clone(), theirs, ours, their_writer, noticed_at: self.now() };
        Put::Conflict(Box::new(Conflict { existing, kept, note }))
    }
}
