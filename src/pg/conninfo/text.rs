//! The two ways to write a conninfo, as `fe-connect.c` reads them. Pure.

use std::collections::BTreeMap;

use super::environment::is_keyword;
use super::{PgError, bad};

type Settings = BTreeMap<String, String>;

/// Keywords and values of a conninfo in either form. The last of several values of one keyword counts.
pub(super) fn parse(text: &str) -> Result<Settings, PgError> {
    match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
        Some(rest) => parse_uri(rest),
        None => parse_words(text),
    }
}

/// What `isspace` is in the C locale.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

/// `keyword = value keyword='quoted \' value'`.
fn parse_words(text: &str) -> Result<Settings, PgError> {
    let mut settings = Settings::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let end = rest.find(|c| c == '=' || is_space(c)).unwrap_or(rest.len());
        let (keyword, after) = rest.split_at(end);
        // The rest may be a password that was not quoted: only the keyword is shown.
        let after = after.trim_start_matches(is_space).strip_prefix('=').ok_or_else(|| {
            bad(format!(
                "\"=\" is missing after {:?}; a value with spaces needs single quotes",
                known_or_hidden(keyword)
            ))
        })?;
        if !is_keyword(keyword) {
            return Err(unknown(keyword));
        }
        let after = after.trim_start_matches(is_space);
        let (value, after) = match after.strip_prefix('\'') {
            Some(quoted) => {
                take_quoted(quoted).ok_or_else(|| bad(format!("the quoted value of {keyword} does not end")))?
            }
            None => take_plain(after),
        };
        settings.insert(keyword.to_owned(), value);
        rest = after.trim_start_matches(is_space);
    }
    Ok(settings)
}

fn known_or_hidden(keyword: &str) -> &str {
    if is_keyword(keyword) { keyword } else { "…" }
}

fn unknown(keyword: &str) -> PgError {
    bad(format!("{:?} is not a connection setting that libpq knows", keyword.chars().take(40).collect::<String>()))
}

/// A value up to white space; a backslash takes the next character as it is.
fn take_plain(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            c if is_space(c) => return (value, text.get(at..).unwrap_or("")),
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            c => value.push(c),
        }
    }
    (value, "")
}

/// A value up to the closing quote, which is taken too. `None`: it does not close.
fn take_quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\'' => return Some((value, text.get(at + 1..).unwrap_or(""))),
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            c => value.push(c),
        }
    }
    None
}

/// `[user[:password]@][host[:port],…][/dbname][?keyword=value&…]`, what follows the scheme.
fn parse_uri(text: &str) -> Result<Settings, PgError> {
    let mut settings = Settings::new();
    let mut rest = text;
    if let Some(at) = text.find(['@', '/']).filter(|at| text.as_bytes().get(*at) == Some(&b'@')) {
        let (login, after) = text.split_at(at);
        let (user, password) = match login.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (login, None),
        };
        if !user.is_empty() {
            settings.insert("user".to_owned(), decode(user, "the user")?);
        }
        if let Some(password) = password {
            settings.insert("password".to_owned(), decode(password, "the password")?);
        }
        rest = after.get(1..).unwrap_or("");
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, after) = rest.split_at(end);
    let (mut hosts, mut ports) = (Vec::new(), Vec::new());
    for part in authority.split(',') {
        let (host, port) = split_host(part)?;
        hosts.push(decode(host, "the host")?);
        ports.push(decode(port, "the port")?);
    }
    for (keyword, list) in [("host", hosts), ("port", ports)] {
        if list.iter().any(|item| !item.is_empty()) {
            settings.insert(keyword.to_owned(), list.join(","));
        }
    }
    let (path, query) = after.split_once('?').unwrap_or((after, ""));
    let database = path.strip_prefix('/').unwrap_or(path);
    if !database.is_empty() {
        settings.insert("dbname".to_owned(), decode(database, "the database")?);
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (keyword, value) = pair
            .split_once('=')
            .filter(|(_, value)| !value.contains('='))
            .ok_or_else(|| bad("a parameter of the URI is not keyword=value; write `=` in a value as %3D"))?;
        let (keyword, value) = (decode(keyword, "a keyword")?, decode(value, &format!("the value of {keyword}"))?);
        match (keyword.as_str(), value.as_str()) {
            ("ssl", "true") => settings.insert("sslmode".to_owned(), "require".to_owned()), // as JDBC says it
            (keyword, _) if is_keyword(keyword) => settings.insert(keyword.to_owned(), value),
            (keyword, _) => return Err(unknown(keyword)),
        };
    }
    Ok(settings)
}

/// A host and its port, either may be empty.
fn split_host(part: &str) -> Result<(&str, &str), PgError> {
    if let Some(inner) = part.strip_prefix('[') {
        let (address, after) =
            inner.split_once(']').ok_or_else(|| bad("an IPv6 address in the URI lacks its closing `]`"))?;
        return match after.strip_prefix(':') {
            _ if address.is_empty() => Err(bad("an IPv6 address in the URI is empty")),
            Some(port) => Ok((address, port)),
            None if after.is_empty() => Ok((address, "")),
            None => Err(bad("after the `]` of an IPv6 address only a port can follow")),
        };
    }
    Ok(part.split_once(':').unwrap_or((part, "")))
}

/// Undoes percent-encoding. `what` is named in errors instead of the text, which may be a password.
fn decode(text: &str, what: &str) -> Result<String, PgError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
        match (digit(), digit()) {
            (Some(0), Some(0)) => return Err(bad(format!("{what} in the URI contains %00"))),
            (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8), // two hex digits: below 256
            _ => return Err(bad(format!("{what} in the URI has a % without two hex digits; a % itself is %25"))),
        }
    }
    String::from_utf8(bytes).map_err(|_| bad(format!("{what} in the URI is not UTF-8")))
}
