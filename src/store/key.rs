//! Names of objects. A [`Key`] is checked once, when it is made; nothing below checks it again.

use std::fmt;
use std::str::FromStr;

use crate::types::{ParseError, serde_by_text};

/// Longest key in bytes: what S3 allows.
const MAX_KEY: usize = 1024;
/// Longest part in bytes: a part is a file name in a directory repository, and `NAME_MAX` is 255.
const MAX_PART: usize = 255;

const EXPECTED: &str = "an object key such as main/7300000000000000001/timeline/00000002.history";

/// The name of an object below the root of its repository: parts of `[A-Za-z0-9._~-]+` joined by `/`.
///
/// No part begins with a dot. That rules out `.` and `..`, and leaves such names to the file system's and our own
/// housekeeping: temporaries, `.nfs…`, `.snapshot`. At most 255 bytes a part, 1024 in all. Order is that of the bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// Checks `text`; the error says what a key looks like.
    pub fn new(text: impl Into<String>) -> Result<Key, ParseError> {
        let text = text.into();
        let valid = text.len() <= MAX_KEY && text.split('/').all(is_part);
        if valid { Ok(Key(text)) } else { Err(ParseError::new(EXPECTED, &text)) }
    }

    /// The key as text, without a leading slash.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The parts between the slashes; never none, never empty.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }
}

/// Whether `name` may be a part of a key. A directory store shows no other names.
pub(super) fn is_part(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_PART
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'~' | b'-'))
}

impl FromStr for Key {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Key, ParseError> {
        Key::new(text)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.0)
    }
}

impl AsRef<str> for Key {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

serde_by_text!(Key);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_and_bad_keys() {
        for good in ["a", "a/b", "wal/00000002.1/00000001/0000000A.00000000-01000000~ab", "-", "~", "a.b", "a..b"] {
            assert_eq!(Key::new(good).map(|k| k.to_string()), Ok(good.to_string()));
        }
        let long_part = "x".repeat(MAX_PART + 1);
        let long_key = vec!["x".repeat(200); 6].join("/");
        let bad = ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.", ".tmp/a", "a b", "a\\b", "ä", "a\0", "a+b"];
        for bad in bad.into_iter().chain([long_part.as_str(), long_key.as_str()]) {
            assert!(Key::new(bad).is_err(), "{bad:?} was taken for a key");
        }
        assert!(Key::new("x".repeat(MAX_PART)).is_ok());
    }
}
