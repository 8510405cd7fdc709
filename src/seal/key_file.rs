use std::fmt;
use std::io::Read;

use age::secrecy::{ExposeSecret, SecretString};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::envelope::{self, Purpose};
use super::error::{KeyRole, SealError};
use super::keys::{ContentKey, MetaKey, Secret};
use super::recipient::Recipient;
use crate::types::Id128;

pub(super) const META_PREFIX: &str = "PGKEEP-META-KEY-1-";
const META_FORM: &str =
    "the meta key is PGKEEP-META-KEY-1-, 64 hex digits, - and 8 check digits; copy the line again, whole";
/// A key file is about 1 KiB; a larger one is something else.
const MAX_LEN: usize = 64 << 10;
/// What every binary age file begins with.
const AGE_MAGIC: &[u8] = b"age-encryption.org/v1";
/// scrypt's work factor when we encrypt (about a second), and the most that we accept (some 4 GiB of memory).
const WORK_FACTOR: u8 = 18;
const MAX_WORK_FACTOR: u8 = 22;

/// What the operator keeps: an age identity, which opens data, and the meta key, which opens what an archiver reads back.
///
/// A *write-only* key file holds the identity's public half instead of the identity: enough to archive, not to read a row.
#[derive(Clone)]
pub struct KeyFile {
    meta: MetaKey,
    identity: Option<age::x25519::Identity>,
    recipients: Vec<Recipient>,
}

impl KeyFile {
    /// A new identity and a new meta key.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn generate() -> Result<KeyFile, SealError> {
        let identity = age::x25519::Identity::generate();
        let recipients = vec![Recipient(identity.to_public())];
        Ok(KeyFile { meta: MetaKey::generate()?, identity: Some(identity), recipients })
    }

    /// A new meta key, and no identity: data is sealed for these recipients, whose identities were made elsewhere. At
    /// least one.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`]; [`SealError::KeyFile`] without any.
    pub fn generate_for(recipients: Vec<Recipient>) -> Result<KeyFile, SealError> {
        if recipients.is_empty() {
            return Err(SealError::KeyFile { line: None, problem: "a key that only writes needs a recipient" });
        }
        Ok(KeyFile { meta: MetaKey::generate()?, identity: None, recipients })
    }

    /// The same meta key with a new identity.
    pub fn with_new_identity(&self) -> KeyFile {
        let identity = age::x25519::Identity::generate();
        let recipients = vec![Recipient(identity.to_public())];
        KeyFile { meta: self.meta.clone(), identity: Some(identity), recipients }
    }

    /// The same realm's key file for a host that may write and not read.
    pub fn write_only(&self) -> KeyFile {
        KeyFile { identity: None, ..self.clone() }
    }

    /// Whether data can be read with it.
    pub fn can_read(&self) -> bool {
        self.identity.is_some()
    }

    /// The key that seals what an archiver reads back.
    pub fn meta_key(&self) -> &MetaKey {
        &self.meta
    }

    /// For whom content keys are wrapped: `age1…`, public.
    pub fn recipients(&self) -> Vec<String> {
        self.recipients.iter().map(ToString::to_string).collect()
    }

    /// The same, as they are used.
    pub fn recipient_list(&self) -> &[Recipient] {
        &self.recipients
    }

    /// The public half of its own identity, if it has one.
    pub fn own_recipient(&self) -> Option<Recipient> {
        self.identity.as_ref().map(|identity| Recipient(identity.to_public()))
    }

    /// What tells the envelopes that were made for this recipient alone apart from others. Without the meta key nobody can
    /// tell from it who that is.
    pub fn recipient_tag(&self, realm: Id128, recipient: &Recipient) -> Id128 {
        let derived = self.meta.derive_for(format!("recipient {recipient}").as_bytes(), realm);
        let mut tag = [0; 16];
        tag.iter_mut().zip(derived.iter()).for_each(|(to, from)| *to = *from);
        Id128::new(tag)
    }

    /// The file's text.
    pub fn render(&self) -> SecretString {
        let recipients: String = self.recipients.iter().map(|recipient| format!("{recipient}\n")).collect();
        let meta = Zeroizing::new(hex(self.meta.secret().expose()));
        let checksum = hex(&checksum(&self.meta));
        let meta_line = Zeroizing::new(format!("{META_PREFIX}{}-{checksum}\n", *meta));
        let mut text = Zeroizing::new(String::with_capacity(2048)); // enough: growing would leave a copy behind
        match &self.identity {
            Some(identity) => {
                text.push_str(
                    "# The key to backups made by pgkeep.\n\
                     #\n\
                     # Whoever has this file and the repository can read every database in it.\n\
                     # Whoever loses this file loses every backup sealed with it: there is no other way in, and nobody\n\
                     # can make a second one. Keep a copy where a fire, a thief or a mistake that takes the database\n\
                     # host or the repository does not take it too: printed, in a password manager, in a safe.\n\
                     #\n\
                     # The first line opens the data. Its public half, which can only seal, is\n",
                );
                text.push_str(&recipients.lines().map(|line| format!("#   {line}\n")).collect::<String>());
                text.push_str(identity.to_string().expose_secret());
                text.push_str("\n# The second line opens and seals what pgkeep keeps about the data.\n");
            }
            None => {
                text.push_str(
                    "# A write-only key to backups made by pgkeep.\n\
                     #\n\
                     # A host that has this file can archive and take backups, and cannot read a row of them.\n\
                     # Restoring needs the key file that it was made from: this one does not replace it.\n\
                     #\n\
                     # Content is sealed for these recipients:\n",
                );
                text.push_str(&recipients);
                text.push_str("# This line opens and seals what pgkeep keeps about the data.\n");
            }
        }
        text.push_str(&meta_line);
        SecretString::from(text.as_str())
    }

    /// Reads the file's text: comments, blank lines, and in any order one meta key, and one age secret key or, in a
    /// write-only file, age recipients.
    ///
    /// # Errors
    /// [`SealError::KeyFile`] with the line; it never repeats what the line holds.
    pub fn parse(text: &str) -> Result<KeyFile, SealError> {
        let whole = |problem| SealError::KeyFile { line: None, problem };
        if text.len() > MAX_LEN {
            return Err(whole("it is too large to be a key file"));
        }
        let (mut meta, mut identity, mut recipients) = (None, None, Vec::new());
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            let problem = |problem| SealError::KeyFile { line: Some(number), problem };
            let upper = Zeroizing::new(line.to_ascii_uppercase());
            if line.is_empty() || line.starts_with('#') {
                continue;
            } else if upper.starts_with(META_PREFIX) {
                let key = parse_meta(&upper).map_err(problem)?;
                if meta.replace(key).is_some() {
                    return Err(problem("there is a second meta key; a key file holds one"));
                }
            } else if upper.starts_with("AGE-SECRET-KEY-PQ-") || upper.starts_with("AGE-PLUGIN-") {
                return Err(problem("this kind of age identity is not supported yet; use an AGE-SECRET-KEY-1"));
            } else if upper.starts_with("AGE-SECRET-KEY-") {
                let key = upper.parse::<age::x25519::Identity>();
                let key =
                    key.map_err(|_| problem("the age secret key has a typo or is cut; copy the line again, whole"))?;
                if identity.replace(key).is_some() {
                    return Err(problem("there is a second age secret key; a key file holds one"));
                }
            } else if upper.starts_with("AGE1") {
                let recipient = line.parse::<Recipient>();
                recipients
                    .push(recipient.map_err(|_| problem("the age recipient has a typo or is of an unknown kind"))?);
            } else {
                return Err(problem("expected AGE-SECRET-KEY-…, PGKEEP-META-KEY-1-… or a comment after #"));
            }
        }
        let meta = meta.ok_or_else(|| whole("there is no meta key (PGKEEP-META-KEY-1-…); is the file cut short?"))?;
        if let Some(identity) = &identity {
            let own = Recipient(identity.to_public());
            if !recipients.contains(&own) {
                recipients.insert(0, own);
            }
        }
        if recipients.is_empty() {
            return Err(whole("there is no age secret key (AGE-SECRET-KEY-1…); is the file cut short?"));
        }
        Ok(KeyFile { meta, identity, recipients })
    }

    /// Reads a file that may be protected by a passphrase.
    ///
    /// # Errors
    /// [`SealError::NeedPassphrase`], [`SealError::WrongPassphrase`], [`SealError::KeyFile`].
    pub fn read(bytes: &[u8], passphrase: Option<&SecretString>) -> Result<KeyFile, SealError> {
        if KeyFile::is_encrypted(bytes) {
            return KeyFile::decrypt(bytes, passphrase.ok_or(SealError::NeedPassphrase)?);
        }
        let text = std::str::from_utf8(bytes);
        KeyFile::parse(text.map_err(|_| SealError::KeyFile { line: None, problem: "it is not a text file" })?)
    }

    /// Whether a file is one that [`KeyFile::encrypt_with_passphrase`] made.
    pub fn is_encrypted(bytes: &[u8]) -> bool {
        bytes.starts_with(AGE_MAGIC)
    }

    /// The file's text in an age file (binary, scrypt) under a passphrase. Takes about a second, by intent.
    ///
    /// # Errors
    /// [`SealError::KeyFile`] if age fails.
    pub fn encrypt_with_passphrase(&self, passphrase: &SecretString) -> Result<Vec<u8>, SealError> {
        self.encrypt_with_work_factor(passphrase, WORK_FACTOR)
    }

    pub(super) fn encrypt_with_work_factor(
        &self,
        passphrase: &SecretString,
        work_factor: u8,
    ) -> Result<Vec<u8>, SealError> {
        let failed = || SealError::KeyFile { line: None, problem: "age did not encrypt it" };
        let mut recipient = age::scrypt::Recipient::new(passphrase.clone());
        recipient.set_work_factor(work_factor); // invariant: callers pass 1 to 63
        let recipients = std::iter::once(&recipient as &dyn age::Recipient);
        let encryptor = age::Encryptor::with_recipients(recipients).map_err(|_| failed())?;
        envelope::encrypt(encryptor, self.render().expose_secret().as_bytes()).ok_or_else(failed)
    }

    /// Opens what [`KeyFile::encrypt_with_passphrase`] made.
    ///
    /// # Errors
    /// [`SealError::WrongPassphrase`], [`SealError::KeyFile`].
    pub fn decrypt(bytes: &[u8], passphrase: &SecretString) -> Result<KeyFile, SealError> {
        let whole = |problem| SealError::KeyFile { line: None, problem };
        if bytes.len() > MAX_LEN {
            return Err(whole("it is too large to be a key file"));
        }
        let mut identity = age::scrypt::Identity::new(passphrase.clone());
        identity.set_max_work_factor(MAX_WORK_FACTOR);
        let decryptor = age::Decryptor::new_buffered(bytes).map_err(|_| whole("it is damaged or cut short"))?;
        if !decryptor.is_scrypt() {
            return Err(whole("it is an age file for recipients, not one under a passphrase"));
        }
        let reader =
            decryptor.decrypt(std::iter::once(&identity as &dyn age::Identity)).map_err(|error| match error {
                age::DecryptError::ExcessiveWork { .. } => whole("its scrypt work factor is above 22"),
                age::DecryptError::DecryptionFailed
                | age::DecryptError::KeyDecryptionFailed
                | age::DecryptError::NoMatchingKeys => SealError::WrongPassphrase,
                _ => whole("it is damaged or cut short"), // age's enum is open
            })?;
        let mut text = Zeroizing::new(String::with_capacity(MAX_LEN));
        let limited = reader.take(MAX_LEN as u64).read_to_string(&mut text);
        limited.map_err(|_| whole("it is damaged or cut short"))?;
        KeyFile::parse(&text)
    }

    /// The bytes of `keys/<id>` for a content key.
    ///
    /// # Errors
    /// [`SealError::TooLarge`] with some hundred recipients.
    pub fn wrap_content_key(&self, realm: Id128, key: &ContentKey) -> Result<Vec<u8>, SealError> {
        self.wrap_content_key_for(realm, key, &self.recipients)
    }

    /// The same for these recipients instead of the key file's own.
    ///
    /// # Errors
    /// As [`KeyFile::wrap_content_key`]; [`SealError::Envelope`] without any recipient.
    pub fn wrap_content_key_for(
        &self,
        realm: Id128,
        key: &ContentKey,
        recipients: &[Recipient],
    ) -> Result<Vec<u8>, SealError> {
        envelope::wrap(&self.meta, realm, Purpose::Content, key.id(), key.secret(), recipients)
    }

    /// The content key in the bytes of `keys/<id>`.
    ///
    /// # Errors
    /// [`SealError::Envelope`] when it is not genuine, [`SealError::NotARecipient`], [`SealError::WriteOnly`].
    pub fn unwrap_content_key(&self, realm: Id128, id: Id128, bytes: &[u8]) -> Result<ContentKey, SealError> {
        let sealed = envelope::authenticate(&self.meta, realm, Purpose::Content, id, bytes)?;
        let identity = self.identity.as_ref().ok_or(SealError::WriteOnly)?;
        Ok(ContentKey::new(id, envelope::unwrap(id, sealed, identity)?))
    }

    /// The bytes of `keys/<id>` for the meta key, where `<id>` is [`MetaKey::id`].
    ///
    /// # Errors
    /// As [`KeyFile::wrap_content_key`].
    pub fn wrap_meta_key(&self, realm: Id128) -> Result<Vec<u8>, SealError> {
        self.wrap_meta_key_for(realm, &self.recipients)
    }

    /// The same for these recipients instead of the key file's own.
    ///
    /// # Errors
    /// As [`KeyFile::wrap_content_key_for`].
    pub fn wrap_meta_key_for(&self, realm: Id128, recipients: &[Recipient]) -> Result<Vec<u8>, SealError> {
        envelope::wrap(&self.meta, realm, Purpose::Meta, self.meta.id(), self.meta.secret(), recipients)
    }

    /// Checks that the bytes of `keys/<id>`, `<id>` being [`MetaKey::id`], are our meta key's for this realm.
    ///
    /// # Errors
    /// [`SealError::Envelope`] when they are not; [`SealError::WrongKey`] when another key is inside.
    pub fn check_meta_key(&self, realm: Id128, bytes: &[u8]) -> Result<(), SealError> {
        let sealed = envelope::authenticate(&self.meta, realm, Purpose::Meta, self.meta.id(), bytes)?;
        let Some(identity) = &self.identity else { return Ok(()) }; // the MAC has said it already
        let inside = match envelope::unwrap(self.meta.id(), sealed, identity) {
            Err(SealError::NotARecipient { .. }) => return Ok(()), // made before this identity was; likewise
            inside => inside?,
        };
        if inside.expose() != self.meta.secret().expose() {
            return Err(SealError::WrongKey { role: KeyRole::Meta });
        }
        Ok(())
    }
}

impl fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.can_read() { "" } else { ", write-only" };
        write!(f, "KeyFile({:?}, {}{kind})", self.meta, self.recipients().join(", "))
    }
}

/// `line` in upper case, [`META_PREFIX`] in front.
fn parse_meta(line: &str) -> Result<MetaKey, &'static str> {
    let digits = line.strip_prefix(META_PREFIX).ok_or(META_FORM)?;
    let (key, check) = digits.split_once('-').ok_or(META_FORM)?;
    let secret = Secret::from_slice(&unhex(key).ok_or(META_FORM)?).ok_or(META_FORM)?;
    let check = unhex(check).filter(|check| check.len() == 4).ok_or(META_FORM)?;
    let meta = MetaKey::new(secret);
    if checksum(&meta)[..] != check[..] {
        return Err("the meta key has a typo: its check digits do not fit; copy the line again, whole");
    }
    Ok(meta)
}

/// Tells a typo. Four bytes of a hash of the secret, beside the secret itself.
fn checksum(meta: &MetaKey) -> [u8; 4] {
    let mut hash = Sha256::new();
    hash.update(b"pgkeep meta key 1");
    hash.update(meta.secret().expose());
    let [a, b, c, d, ..] = <[u8; 32]>::from(hash.finalize());
    [a, b, c, d]
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        for half in [byte >> 4, byte & 15] {
            text.extend(char::from_digit(u32::from(half), 16).map(|digit| digit.to_ascii_uppercase()));
        }
    }
    text
}

fn unhex(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(digits.len() / 2));
    for pair in digits.as_chunks::<2>().0 {
        let [high, low] = pair.map(|digit| char::from(digit).to_digit(16));
        bytes.push((high? << 4 | low?) as u8); // two digits
    }
    Some(bytes)
}
