//! The password file: `host:port:database:user:password`, the first line that fits.

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use secrecy::SecretString;
use zeroize::Zeroizing;

/// Larger than any password file, in bytes (P8).
const MAX_FILE: u64 = 1 << 20;

/// The file's text. As in libpq a file that is missing, not a plain file or open to others is passed over; the latter two
/// with a warning, because somebody believes to have given a password.
pub(super) fn read(path: &Path) -> Option<Zeroizing<String>> {
    let metadata = std::fs::metadata(path).ok()?;
    if !metadata.is_file() {
        tracing::warn!(path = %path.display(), "the password file is not a plain file and is not used");
        return None;
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(path = %path.display(), "the password file can be read by others and is not used; chmod 0600");
        return None;
    }
    let mut text = Zeroizing::new(String::new());
    match std::fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text)) {
        Ok(_) => Some(text),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the password file cannot be read and is not used");
            None
        }
    }
}

/// The password of the first line that fits. Pure.
pub(super) fn find(text: &str, host: &str, port: u16, database: &str, user: &str) -> Option<SecretString> {
    let port = port.to_string();
    let wanted = [host, &port, database, user];
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut rest = line.trim_end_matches('\r');
        for value in wanted {
            rest = match_field(rest, value)?;
        }
        Some(SecretString::from(unescape(rest)))
    })
}

/// What follows the field and its colon if the field is `*` or, with `\` taking the next character as it is, `value`.
fn match_field<'a>(text: &'a str, value: &str) -> Option<&'a str> {
    if let Some(rest) = text.strip_prefix("*:") {
        return Some(rest);
    }
    let mut wanted = value.chars();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        let c = match c {
            ':' => return if wanted.next().is_none() { text.get(at + 1..) } else { None },
            '\\' => chars.next().map_or('\\', |(_, c)| c),
            c => c,
        };
        if wanted.next() != Some(c) {
            return None;
        }
    }
    None
}

/// The password: up to the end or the next plain colon, as libpq reads it.
fn unescape(text: &str) -> String {
    let mut password = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next().filter(|c| *c != ':') {
        password.push(if c == '\\' { chars.next().unwrap_or('\\') } else { c });
    }
    password
}
