use std::fmt;

use pgkeep_crypto::{Cipher, Expander};
use zeroize::{Zeroize, Zeroizing};

use super::error::SealError;
use super::format::Binding;
use crate::types::Id128;

/// First part of every HKDF info of a sealed object.
const OBJECT: &[u8] = b"pgkeep sealed object 1";

/// 32 secret bytes, on the heap so that moving them leaves no copies behind, wiped when dropped.
pub(super) struct Secret(Box<[u8; 32]>);

impl Secret {
    pub fn random() -> Result<Secret, SealError> {
        let mut bytes = Box::new([0; 32]);
        super::random::fill(bytes.as_mut_slice()).map_err(|_| SealError::NoRandomness)?;
        Ok(Secret(bytes))
    }

    /// `None` unless there are 32 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Secret> {
        let mut secret = Box::new([0; 32]);
        secret.copy_from_slice(bytes.get(..32).filter(|_| bytes.len() == 32)?);
        Some(Secret(secret))
    }

    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl Clone for Secret {
    fn clone(&self) -> Secret {
        Secret(self.0.clone())
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// The symmetric key of a realm that seals what an archiver must read back: footers, manifests, file tables, events.
#[derive(Clone)]
pub struct MetaKey {
    secret: Secret,
    id: Id128,
}

impl MetaKey {
    pub(super) fn generate() -> Result<MetaKey, SealError> {
        Ok(MetaKey::new(Secret::random()?))
    }

    pub(super) fn new(secret: Secret) -> MetaKey {
        let mut id = [0xFF; 16]; // such a day never comes: sorts after every content key
        id[4..].copy_from_slice(&derive::<12>(&secret, &[b"pgkeep meta key 1", b"id"])[..]);
        MetaKey { secret, id: Id128::new(id) }
    }

    /// The key's name, made from the key; no secret. It is kept as `keys/<id>`; the first four bytes are `ffffffff`.
    pub fn id(&self) -> Id128 {
        self.id
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.secret
    }

    /// A key for another purpose within a realm.
    pub(super) fn derive_for(&self, purpose: &[u8], realm: Id128) -> Zeroizing<[u8; 32]> {
        derive(&self.secret, &[b"pgkeep meta key 1", purpose, realm.as_bytes()])
    }
}

impl fmt::Debug for MetaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MetaKey({})", self.id)
    }
}

/// A random key that seals frames of data: one per run of a writer, and per day at most.
#[derive(Clone)]
pub struct ContentKey {
    secret: Secret,
    id: Id128,
}

impl ContentKey {
    /// A new key for `day` (days since 1970-01-01, UTC), which begins its id, so that keys of a day sort together.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn generate(day: u32) -> Result<ContentKey, SealError> {
        let mut id = [0; 16];
        super::random::fill(&mut id).map_err(|_| SealError::NoRandomness)?;
        id[..4].copy_from_slice(&day.to_be_bytes());
        Ok(ContentKey { secret: Secret::random()?, id: Id128::new(id) })
    }

    pub(super) fn new(id: Id128, secret: Secret) -> ContentKey {
        ContentKey { secret, id }
    }

    /// The key's name: it is kept as `keys/<id>`.
    pub fn id(&self) -> Id128 {
        self.id
    }

    /// The day that it was made for, in days since 1970-01-01.
    pub fn day(&self) -> u32 {
        let [a, b, c, d, ..] = *self.id.as_bytes();
        u32::from_be_bytes([a, b, c, d])
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.secret
    }
}

impl fmt::Debug for ContentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContentKey({})", self.id)
    }
}

/// What seals an object's frames. Footers and preludes are always sealed by the meta key.
#[derive(Debug, Clone, Copy)]
pub enum FrameKey<'a> {
    /// An archiver may read them back: records, manifests, file tables.
    Meta(&'a MetaKey),
    /// Only who holds an identity may: WAL and blocks.
    Content(&'a ContentKey),
}

/// Everything that one object derives from one key and the object's salt.
pub(super) struct ObjectKeys(Expander);

impl ObjectKeys {
    pub fn new(secret: &Secret, salt: &[u8; 16]) -> ObjectKeys {
        ObjectKeys(Expander::new(Some(salt), secret.expose()))
    }

    /// Says which key it is without the binding: a wrong key is not a wrong name.
    pub fn commitment(&self) -> [u8; 16] {
        *expand(&self.0, &[OBJECT, b"commitment"])
    }

    /// Says what the object is bound to, under the meta key.
    pub fn binding_tag(&self, binding: &Binding<'_>) -> [u8; 16] {
        *expand(&self.0, &bound(b"binding", binding).each_ref().map(|part| part.as_ref()))
    }

    pub fn frames(&self, binding: &Binding<'_>) -> Cipher {
        self.cipher(b"frames", binding)
    }

    pub fn footer(&self, binding: &Binding<'_>) -> Cipher {
        self.cipher(b"footer", binding)
    }

    fn cipher(&self, purpose: &'static [u8], binding: &Binding<'_>) -> Cipher {
        let key: Zeroizing<[u8; 32]> = expand(&self.0, &bound(purpose, binding).each_ref().map(|part| part.as_ref()));
        Cipher::new(&key)
    }
}

/// The parts of the info of a bound key: format, purpose, realm, repository (empty if not bound to one), kind, name.
fn bound<'a>(purpose: &'static [u8], binding: &Binding<'a>) -> [std::borrow::Cow<'a, [u8]>; 6] {
    [
        OBJECT.into(),
        purpose.into(),
        binding.realm.as_bytes().to_vec().into(),
        binding.repository.map(|id| id.as_bytes().to_vec()).unwrap_or_default().into(),
        vec![binding.kind.code()].into(),
        binding.name.as_bytes().into(),
    ]
}

/// HKDF-SHA-256 without salt.
fn derive<const N: usize>(secret: &Secret, parts: &[&[u8]]) -> Zeroizing<[u8; N]> {
    expand(&Expander::new(None, secret.expose()), parts)
}

/// HKDF-Expand; each part of the info goes in with its length in front (4 bytes, little-endian): no two lists of parts
/// make the same info.
fn expand<const N: usize>(hkdf: &Expander, parts: &[&[u8]]) -> Zeroizing<[u8; N]> {
    let mut out = Zeroizing::new([0; N]);
    hkdf.expand(&length_prefixed(parts), &mut out[..]).expect("N is at most 32"); // invariant: HKDF gives up to 8160
    out
}

pub(super) fn length_prefixed(parts: &[&[u8]]) -> Vec<u8> {
    let mut info = Vec::with_capacity(parts.iter().map(|part| part.len() + 4).sum());
    for part in parts {
        info.extend_from_slice(&(part.len() as u32).to_le_bytes()); // names and envelopes are far below 4 GiB
        info.extend_from_slice(part);
    }
    info
}
