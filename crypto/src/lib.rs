//! AES-256-GCM and HKDF-SHA-256, instantiated.
//!
//! The crates that do the work are generic: their code is compiled where it is used, and as that is. Used from pgkeep itself,
//! a build without optimisation would seal thirty times slower than it need be, and most of what the tests cost would be that.
//! Nothing is decided here; what is sealed, with which nonce and bound to what, is `seal`'s.
//!
//! No function panics; nothing is kept, so a crash and cancellation leave nothing behind.

#![forbid(unsafe_code)]

use aes_gcm::aead::AeadInOut;
use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce, Tag};
use hkdf::Hkdf;
use sha2::Sha256;

/// Bytes that one call seals at most.
pub const MAX_SEALED: u64 = aes_gcm::P_MAX;
/// Bytes of a tag.
pub const TAG: usize = 16;

/// AES-256-GCM under one key. Wiped when it is dropped.
pub struct Cipher(Aes256Gcm);

impl Cipher {
    /// The cipher of this key.
    pub fn new(key: &[u8; 32]) -> Cipher {
        Cipher(Aes256Gcm::new(key.into()))
    }

    /// Seals `content` where it lies, and returns its tag. `None`: there are more than [`MAX_SEALED`] bytes.
    /// A nonce is used once with a key: that is the caller's to see to.
    pub fn seal(&self, nonce: [u8; 12], aad: &[u8], content: &mut [u8]) -> Option<[u8; TAG]> {
        let sealed = self.0.encrypt_inout_detached(&Nonce::from(nonce), aad, InOutBuf::from(content));
        sealed.ok().map(|tag| tag.into())
    }

    /// Opens `content` where it lies. `false`: it is not what was sealed, and holds nothing that may be used.
    #[must_use]
    pub fn open(&self, nonce: [u8; 12], aad: &[u8], content: &mut [u8], tag: &[u8; TAG]) -> bool {
        let tag = Tag::from(*tag);
        self.0.decrypt_inout_detached(&Nonce::from(nonce), aad, InOutBuf::from(content), &tag).is_ok()
    }
}

/// HKDF-SHA-256, extracted from a secret.
pub struct Expander(Hkdf<Sha256>);

/// More was asked for than HKDF gives: 8,160 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooMuch;

impl Expander {
    /// Extracts from `secret`.
    pub fn new(salt: Option<&[u8]>, secret: &[u8]) -> Expander {
        Expander(Hkdf::new(salt, secret))
    }

    /// Fills `out` with what `info` gives.
    ///
    /// # Errors
    /// [`TooMuch`].
    pub fn expand(&self, info: &[u8], out: &mut [u8]) -> Result<(), TooMuch> {
        self.0.expand(info, out).map_err(|_| TooMuch)
    }
}
