//! A key in its envelope: the bytes of `keys/<id>`.
//!
//! | at  | size | field                                                                              |
//! |-----|------|------------------------------------------------------------------------------------|
//! | 0   | 8    | magic `\x89pgkkey\n`                                                               |
//! | 8   | 4    | version 1, purpose (1 content key, 2 meta key), two zeros                          |
//! | 12  | 4    | length of the age file                                                             |
//! | 16  | …    | the age file (binary), whose plaintext is the 32 bytes of the key                  |
//! | end | 32   | HMAC-SHA-256 under the meta key over realm, id and everything before               |
//!
//! The MAC is checked before age sees a byte: who has only the public key cannot plant a key.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::error::SealError;
use super::keys::{MetaKey, Secret, length_prefixed};
use super::recipient::Recipient;
use crate::types::Id128;

const MAGIC: [u8; 8] = *b"\x89pgkkey\n";
const VERSION: u8 = 1;
const FIXED: usize = 16;
const MAC: usize = 32;
/// Room for some hundred recipients.
const MAX_AGE: usize = 64 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Purpose {
    Content = 1,
    Meta = 2,
}

pub(super) fn wrap(
    meta: &MetaKey,
    realm: Id128,
    purpose: Purpose,
    id: Id128,
    secret: &Secret,
    recipients: &[Recipient],
) -> Result<Vec<u8>, SealError> {
    let envelope = |detail| SealError::Envelope { key_id: id, detail };
    let recipients = recipients.iter().map(|recipient| &recipient.0 as &dyn age::Recipient);
    let encryptor = age::Encryptor::with_recipients(recipients).map_err(|_| envelope("there are no recipients"))?;
    let sealed = encrypt(encryptor, secret.expose()).ok_or_else(|| envelope("age did not encrypt"))?;
    if sealed.len() > MAX_AGE {
        return Err(SealError::TooLarge { what: "the envelope", len: sealed.len() as u64, limit: MAX_AGE as u64 });
    }
    let mut bytes = Vec::with_capacity(FIXED + sealed.len() + MAC);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&[VERSION, purpose as u8, 0, 0]);
    bytes.extend_from_slice(&(sealed.len() as u32).to_le_bytes()); // bounded above
    bytes.extend_from_slice(&sealed);
    let mac = mac(meta, realm, id, &bytes).finalize().into_bytes();
    bytes.extend_from_slice(&mac);
    Ok(bytes)
}

/// Checks everything but the age file; returns that.
pub(super) fn authenticate<'a>(
    meta: &MetaKey,
    realm: Id128,
    purpose: Purpose,
    id: Id128,
    bytes: &'a [u8],
) -> Result<&'a [u8], SealError> {
    let envelope = |detail| SealError::Envelope { key_id: id, detail };
    if !bytes.starts_with(&MAGIC) {
        return Err(envelope("it is not a key of pgkeep"));
    }
    let (covered, tag) = bytes.split_last_chunk::<MAC>().ok_or_else(|| envelope("it is cut short"))?;
    let (fixed, sealed) = covered.split_first_chunk::<FIXED>().ok_or_else(|| envelope("it is cut short"))?;
    let [.., version, found, zero, zero_too, l0, l1, l2, l3] = *fixed;
    if version != VERSION {
        return Err(SealError::UnknownVersion { version });
    }
    mac(meta, realm, id, covered)
        .verify_slice(tag)
        .map_err(|_| envelope("its MAC does not fit the meta key, the realm and the name"))?;
    if [zero, zero_too] != [0, 0] || ![Purpose::Content as u8, Purpose::Meta as u8].contains(&found) {
        return Err(SealError::Unknown { what: "purpose", number: u32::from(found) });
    }
    if found != purpose as u8 {
        return Err(envelope("it holds a key for another purpose"));
    }
    if u32::from_le_bytes([l0, l1, l2, l3]) as usize != sealed.len() || sealed.len() > MAX_AGE {
        return Err(envelope("its length is not what it says"));
    }
    Ok(sealed)
}

/// Opens what [`authenticate`] returned.
pub(super) fn unwrap(id: Id128, sealed: &[u8], identity: &age::x25519::Identity) -> Result<Secret, SealError> {
    let envelope = |detail| SealError::Envelope { key_id: id, detail };
    let mut plaintext = match age::decrypt(identity, sealed) {
        Ok(plaintext) => plaintext,
        Err(age::DecryptError::NoMatchingKeys) => return Err(SealError::NotARecipient { key_id: id }),
        Err(_) => return Err(envelope("age does not open it")),
    };
    let secret = Secret::from_slice(&plaintext);
    zeroize::Zeroize::zeroize(&mut plaintext);
    secret.ok_or_else(|| envelope("it does not hold 32 bytes"))
}

pub(super) fn encrypt(encryptor: age::Encryptor, plaintext: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut writer = encryptor.wrap_output(&mut out).ok()?;
    std::io::Write::write_all(&mut writer, plaintext).ok()?;
    writer.finish().ok()?;
    Some(out)
}

fn mac(meta: &MetaKey, realm: Id128, id: Id128, covered: &[u8]) -> Hmac<Sha256> {
    let key = meta.derive_for(b"key envelope", realm);
    let mut mac = Hmac::<Sha256>::new_from_slice(&key[..]).expect("any length"); // invariant: HMAC takes keys of any length
    mac.update(&length_prefixed(&[b"pgkeep key envelope 1", realm.as_bytes(), id.as_bytes(), covered]));
    mac
}
