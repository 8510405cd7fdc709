//! A key file on paper: lines that a person can type in again.
//!
//! Each line is a letter and a number, up to 32 characters of the key in groups of four, and four check digits: the first
//! two bytes of SHA-256("pgkeep sheet 1" || the letter and number || the characters in upper case), in hex. `I` lines are the
//! age secret key without `AGE-SECRET-KEY-1`, `M` lines the meta key's 64 hex digits and its check digits. Whatever else
//! stands on the page is passed over, so the whole page may be typed or scanned.

use age::secrecy::{ExposeSecret, SecretString};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::error::SealError;
use super::key_file::{KeyFile, META_PREFIX};

const IDENTITY_PREFIX: &str = "AGE-SECRET-KEY-1";
/// Characters of a key in a line.
const IN_A_LINE: usize = 32;
/// Lines of a kind, at most.
const LINES: usize = 9;
/// A page is a few KiB.
const MAX_LEN: usize = 64 << 10;

impl KeyFile {
    /// The lines that hold the key, for paper. `None` of a key file that can only write: it would restore nothing.
    pub fn to_sheet(&self) -> Option<SecretString> {
        let text = self.render();
        let mut sheet = Zeroizing::new(String::with_capacity(1024)); // enough: growing would leave a copy behind
        let lines = || text.expose_secret().lines().filter(|line| !line.starts_with('#'));
        let identity = lines().find_map(|line| line.strip_prefix(IDENTITY_PREFIX))?;
        let meta = lines().find_map(|line| line.strip_prefix(META_PREFIX))?;
        let meta = Zeroizing::new(meta.replace('-', ""));
        for (letter, key) in [('I', identity), ('M', meta.as_str())] {
            for (number, part) in (1..).zip(key.as_bytes().chunks(IN_A_LINE)) {
                let tag = format!("{letter}{number}");
                sheet.push_str(&tag);
                for group in part.chunks(4) {
                    sheet.push(' ');
                    sheet.extend(group.iter().map(|byte| char::from(*byte)));
                }
                sheet.push_str("  ");
                sheet.push_str(&check_digits(&tag, part));
                sheet.push('\n');
            }
        }
        Some(SecretString::from(sheet.as_str()))
    }

    /// Reads what was typed from a sheet: in any order, in upper or lower case, with any spaces.
    ///
    /// # Errors
    /// [`SealError::KeyFile`] with the line of the text; it never repeats what the line holds.
    pub fn from_sheet(text: &str) -> Result<KeyFile, SealError> {
        let problem = |line, problem| SealError::KeyFile { line, problem };
        if text.len() > MAX_LEN {
            return Err(problem(None, "it is too long to be a recovery sheet"));
        }
        let mut parts: [[Option<Zeroizing<String>>; LINES]; 2] = Default::default();
        for (at, line) in (1..).zip(text.lines()) {
            let line = Zeroizing::new(line.trim().to_ascii_uppercase());
            let Some((letter, number)) = tag(&line) else { continue };
            let rest = line.get(2..).unwrap_or_default();
            let characters = rest.chars().filter(|letter| !letter.is_whitespace()).collect::<String>();
            let characters = Zeroizing::new(characters);
            let Some((key, check)) = characters.split_at_checked(characters.len().saturating_sub(4)) else {
                return Err(problem(Some(at), "only letters and digits stand in this line of a sheet"));
            };
            let name = line.get(..2).unwrap_or_default();
            if key.is_empty() || check_digits(name, key.as_bytes()) != check {
                return Err(problem(Some(at), "there is a typo: the check digits at the end of the line do not fit"));
            }
            let of = parts.get_mut(usize::from(letter == 'M')).and_then(|of| of.get_mut(number - 1));
            if of.and_then(|place| place.replace(Zeroizing::new(key.to_owned()))).is_some() {
                return Err(problem(Some(at), "a line of this name stood there before; one sheet holds one key"));
            }
        }
        let joined = |of: &[Option<Zeroizing<String>>; LINES]| {
            let mut key = Zeroizing::new(String::with_capacity(LINES * IN_A_LINE));
            of.iter().map_while(Option::as_ref).for_each(|part| key.push_str(part));
            key
        };
        let [identity, meta] = parts.each_ref().map(joined);
        let Some((digits, check)) = meta.split_at_checked(64) else {
            return Err(problem(None, "a line that begins with M is missing"));
        };
        if identity.is_empty() {
            return Err(problem(None, "a line that begins with I is missing"));
        }
        let text = Zeroizing::new(format!("{IDENTITY_PREFIX}{}\n{META_PREFIX}{digits}-{check}\n", *identity));
        KeyFile::parse(&text).map_err(|error| match error {
            SealError::KeyFile { .. } => problem(None, "a line of the sheet is missing: type all I and all M lines"),
            other => other,
        })
    }
}

/// `I1`, `M3`: what a line of the key begins with, followed by a space.
fn tag(line: &str) -> Option<(char, usize)> {
    let mut letters = line.chars();
    let (letter, number, space) = (letters.next()?, letters.next()?.to_digit(10)?, letters.next()?);
    let is_tag = matches!(letter, 'I' | 'M') && (1..=LINES as u32).contains(&number) && space.is_whitespace();
    is_tag.then_some((letter, number as usize))
}

fn check_digits(tag: &str, key: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(b"pgkeep sheet 1");
    hash.update(tag.as_bytes());
    hash.update(key);
    let [a, b, ..] = <[u8; 32]>::from(hash.finalize());
    format!("{a:02X}{b:02X}")
}
