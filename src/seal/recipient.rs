use std::fmt;
use std::str::FromStr;

use crate::types::ParseError;

/// For whom keys are wrapped: the public half of an age identity, as age writes it (`age1…`, X25519). No secret.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Recipient(pub(super) age::x25519::Recipient);

impl FromStr for Recipient {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let recipient = text.parse().map(Recipient);
        recipient.map_err(|_| ParseError::new("an X25519 recipient as age-keygen prints it (age1…)", text))
    }
}

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

crate::types::serde_by_text!(Recipient);
