//! Who may import whom. The table below is the house plan of `docs/architecture.md`; an arrow that is not in it fails
//! here, with the line that draws it. To add one, change the table and say in the commit what made it necessary.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// A room, the rooms it may know, and why not more.
struct Room {
    name: &'static str,
    may_import: &'static [&'static str],
    because: &'static str,
}

const fn room(name: &'static str, may_import: &'static [&'static str], because: &'static str) -> Room {
    Room { name, may_import, because }
}

const ROOMS: &[Room] = &[
    room("types", &[], "plain values know nobody"),
    room("pg", &["types"], "PostgreSQL from outside knows nothing of archives"),
    room("wal", &["types"], "what WAL means does not depend on where it comes from or goes"),
    room("seal", &["types"], "sealing knows no WAL, no store and no meaning"),
    room("direct", &[], "it brings bytes into a file and knows nothing of them"),
    room("store", &["types", "direct"], "a store keeps bytes under keys and knows neither crypto nor meaning"),
    room(
        "catalog",
        &["types", "wal", "seal", "store"],
        "both sides meet here; it knows neither of them, and no server",
    ),
    room("archive", &["types", "pg", "wal", "catalog", "store"], "archiving needs neither planner nor restore"),
    room("backup", &["types", "pg", "wal", "catalog", "seal"], "a backup needs neither planner nor restore"),
    room("copy", &["types", "catalog"], "copying is between repositories; it needs no server and no target in time"),
    room("plan", &["types", "wal", "catalog"], "planning is pure: values in, a plan out"),
    room("restore", &["types", "direct", "pg", "wal", "catalog", "plan"], "restoring never needs the archiving side"),
    room("retention", &["types", "catalog", "plan"], "what may go is judged by what can be restored, and by no server"),
    room(
        "verify",
        &["types", "pg", "catalog", "plan", "restore"],
        "what is kept is proved by reading and restoring it, never by the source server",
    ),
    room("config", &["types"], "configuration is values; it stops at daemon and cli"),
    room("helper", &["types"], "it carries requests and answers, and knows no meaning"),
    room(
        "daemon",
        &[
            "types",
            "pg",
            "wal",
            "seal",
            "store",
            "catalog",
            "archive",
            "backup",
            "plan",
            "restore",
            "retention",
            "verify",
            "config",
        ],
        "the daemon does not know the command line",
    ),
    room(
        "cli",
        &[
            "types",
            "pg",
            "wal",
            "seal",
            "store",
            "catalog",
            "archive",
            "backup",
            "copy",
            "plan",
            "restore",
            "retention",
            "verify",
            "config",
            "helper",
            "daemon",
        ],
        "",
    ),
    room("testing", &["pg"], "it runs the program, as its users do, and knows nothing of what is in it"),
    // The crate's root: `main.rs` knows the command line alone, `lib.rs` only declares.
    room("", &["cli"], "main.rs parses, calls and exits; everything else is cli's"),
];

/// Files that may know more than their room does: (path below `src`, room, reason).
const EXCEPTIONS: &[(&str, &str, &str)] =
    &[("wal/receiver", "pg", "the state machine of the stream drives a replication session")];

/// What must not be spoken of in a room, tests excepted.
const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    ("plan", &["tokio", "async fn", ".await"], "a plan is computed, not awaited"),
    (
        "plan",
        &["SystemTime", "Instant::now", "Timestamp::now", "Zoned::now", "TimeZone::system"],
        "the clock is handed in",
    ),
    ("plan", &["std::fs", "std::net", "std::env", "std::process"], "a plan touches no disk, network or environment"),
    ("plan", &["Repository", "dyn Store"], "a plan reads the inventory's values, never a repository"),
    ("types", &["tokio", "std::fs", "std::net", "Timestamp::now"], "values do no I/O and know no clock"),
    ("seal", &["tokio", "std::fs", "std::net"], "sealing is from bytes to bytes"),
    ("config", &["tokio"], "the file is read once, before anything runs"),
];

/// A file that is longer usually holds a second noun.
const MAX_LINES: usize = 800;

struct Offence {
    file: String,
    line: usize,
    what: String,
}

impl fmt::Display for Offence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.what)
    }
}

#[test]
fn nobody_imports_what_the_table_does_not_allow() {
    let offences: Vec<_> =
        sources().iter().flat_map(|(path, text)| check(path, text)).map(|offence| offence.to_string()).collect();
    assert!(offences.is_empty(), "\n{}", offences.join("\n"));
}

#[test]
fn no_file_is_too_long() {
    let long: Vec<_> = sources()
        .into_iter()
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > MAX_LINES)
        .map(|(path, lines)| {
            format!("src/{path} has {lines} lines, {MAX_LINES} are the most: what is its second noun?")
        })
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn the_table_holds_together() {
    for room in ROOMS {
        for other in room.may_import {
            let known = ROOMS.iter().find(|candidate| candidate.name == *other);
            let other = known.unwrap_or_else(|| panic!("{} may import {other}, which is no room", room.name));
            assert!(!other.may_import.contains(&room.name), "{} and {} know each other", room.name, other.name);
        }
    }
    let knows = |one: &str, other: &str| ROOMS.iter().any(|room| room.name == one && room.may_import.contains(&other));
    for (one, other) in [("seal", "store"), ("store", "seal"), ("archive", "plan"), ("restore", "archive")] {
        assert!(!knows(one, other), "{one} must not know {other}");
    }
    assert!(ROOMS.iter().filter(|room| knows(room.name, "config")).all(|room| ["daemon", "cli"].contains(&room.name)));
}

/// The page that explains the house shows the same arrows.
#[test]
fn the_page_shows_the_table() {
    let page = include_str!("../docs/architecture.md");
    for room in ROOMS.iter().filter(|room| !room.name.is_empty()) {
        let knows = if room.may_import.is_empty() { "nobody".to_owned() } else { room.may_import.join(", ") };
        let row = format!("| `{}` | {knows} |", room.name);
        assert!(page.contains(&row), "docs/architecture.md lacks the row {row}");
    }
}

/// A dependency is a decision: `docs/decisions.md` says why this one.
#[test]
fn every_dependency_has_its_reason() {
    let page = include_str!("../docs/decisions.md");
    // The first column of a table: `| rustls, tokio-rustls |`, `| proptest (tests) |`.
    let named: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next()).collect();
    let has_reason =
        |name: &str| named.iter().any(|cell| cell.split(", ").any(|one| one.trim_end_matches(" (tests)") == name));
    for manifest in [include_str!("../Cargo.toml"), include_str!("../crypto/Cargo.toml")] {
        let manifest: toml::Table = manifest.parse().unwrap();
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for name in manifest.get(kind).and_then(|table| table.as_table()).into_iter().flat_map(|table| table.keys())
            {
                assert!(has_reason(name), "docs/decisions.md does not say why {name}");
            }
        }
    }
}

/// The checker itself: that it sees what it should, and nothing else.
#[test]
fn forbidden_arrows_are_seen() {
    let seen = |path: &str, text: &str| check(path, text).iter().map(|offence| offence.line).collect::<Vec<_>>();
    assert_eq!(seen("seal/mod.rs", "use crate::types::Lsn;\nuse crate::store::Store;\n"), [2]);
    assert_eq!(seen("store/fs.rs", "use crate::{\n    types::Lsn,\n    seal::{self, Header},\n};\n"), [1]);
    assert_eq!(seen("seal/format.rs", "fn f() { super::super::store::list(); super::keys::x(); }"), [1]);
    assert_eq!(seen("seal/mod.rs", "fn f() { super::store::list(); }"), [1]);
    assert_eq!(seen("seal/mod.rs", "use pgkeep::store::Store;"), [1]);
    assert_eq!(seen("main.rs", "fn main() { pgkeep::daemon::run() }"), [1]);
    assert_eq!(seen("plan/target.rs", "let now = Timestamp::now();"), [1]);
    assert_eq!(seen("wal/decoder.rs", "use crate::pg::WalStream;"), [1]);
    assert_eq!(seen("cellar/mod.rs", "use crate::types::Lsn;"), [1], "a room that is not in the table");
    // Not imports: comments, strings, macros, tests, exceptions, one's own room.
    assert!(seen("seal/mod.rs", "//! See crate::store.\nlet x = \"crate::store::\"; /* crate::store:: */").is_empty());
    assert!(seen("seal/mod.rs", "crate::some_macro!(1);\ncrate::seal::f();").is_empty());
    assert!(
        seen("seal/mod.rs", "#[cfg(test)]\nmod tests {\n    use crate::store::memory;\n    fn f() {}\n}\n").is_empty()
    );
    assert_eq!(seen("seal/mod.rs", "#[cfg(test)]\nmod tests {\n    fn f() { g('}') }\n}\nuse crate::store;\n"), [5]);
    assert!(seen("wal/receiver.rs", "use crate::pg::WalStream;").is_empty());
    assert!(seen("seal/tests.rs", "use crate::store::memory;").is_empty());
}

/// Every file below `src`, by its path there.
fn sources() -> Vec<(String, String)> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    files.sort();
    let name = |path: &Path| path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
    files.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

/// What is wrong with the imports of one file; `path` is below `src`.
fn check(path: &str, text: &str) -> Vec<Offence> {
    let parts: Vec<&str> = path.split('/').collect();
    if parts.iter().any(|part| matches!(*part, "tests" | "tests.rs")) {
        return Vec::new();
    }
    let own = match parts.as_slice() {
        ["main.rs" | "lib.rs"] | [] => "",
        [file] => file.trim_end_matches(".rs"),
        [folder, ..] => *folder,
    };
    let offence = |line, what| Offence { file: format!("src/{path}"), line, what };
    let Some(room) = ROOMS.iter().find(|room| room.name == own) else {
        return vec![offence(1, format!("`{own}` is not in the table of rooms"))];
    };
    let code = without_tests(&blank_comments_and_strings(text));
    let line_of = |offset: usize| 1 + code[..offset].matches('\n').count();
    let mut offences = Vec::new();
    for (offset, other) in imports(&code, depth(&parts)) {
        let allowed = other == own || room.may_import.contains(&other.as_str());
        let excepted = EXCEPTIONS.iter().any(|(file, room, _)| path.starts_with(file) && *room == other);
        if !allowed && !excepted && ROOMS.iter().any(|room| room.name == other) {
            offences.push(offence(line_of(offset), format!("`{own}` must not know `{other}`: {}", room.because)));
        }
    }
    for (_, words, because) in FORBIDDEN.iter().filter(|(name, ..)| *name == own) {
        for word in *words {
            let hits = code.match_indices(word).filter(|(at, _)| !continues_a_name(&code, *at, word));
            offences.extend(hits.map(|(at, _)| offence(line_of(at), format!("`{word}` in `{own}`: {because}"))));
        }
    }
    offences
}

/// How many `super::` lead from this file to the crate's root.
fn depth(parts: &[&str]) -> usize {
    if parts.last() == Some(&"mod.rs") { parts.len() - 1 } else { parts.len() }
}

fn is_name(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

fn continues_a_name(code: &str, at: usize, word: &str) -> bool {
    (word.starts_with(is_name) && code[..at].ends_with(is_name))
        || (word.ends_with(is_name) && code[at + word.len()..].starts_with(is_name))
}

/// The first name after each path to the crate's root, with its offset; of `{…}` every first name.
fn imports(code: &str, depth: usize) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for root in ["crate::".to_owned(), "pgkeep::".to_owned(), "super::".repeat(depth)] {
        for (at, _) in code.match_indices(&root) {
            let before = &code[..at];
            // `$crate::` and longer names are none; of `super::super::` only the whole chain counts.
            if before.ends_with(|c: char| is_name(c) || c == '$') || before.ends_with("super::") {
                continue;
            }
            let rest = code[at + root.len()..].trim_start();
            match rest.strip_prefix('{') {
                Some(group) => found.extend(first_names(group).into_iter().map(|name| (at, name))),
                None => found.extend(first_name(rest).map(|name| (at, name))),
            }
        }
    }
    found
}

fn first_name(code: &str) -> Option<String> {
    let end = code.find(|c: char| !is_name(c)).unwrap_or(code.len());
    let is_macro = code[end..].starts_with('!');
    (end > 0 && !is_macro).then(|| code[..end].to_owned())
}

/// Of `a::b, c::{d, e}, f}…` the names a, c and f.
fn first_names(group: &str) -> Vec<String> {
    let (mut names, mut nested, mut at_start) = (Vec::new(), 0, true);
    for (at, letter) in group.char_indices() {
        match letter {
            '{' => nested += 1,
            '}' if nested == 0 => break,
            '}' => nested -= 1,
            ',' if nested == 0 => at_start = true,
            c if at_start && !c.is_whitespace() => {
                names.extend(first_name(&group[at..]));
                at_start = false;
            }
            _ => {}
        }
    }
    names
}

/// Comments and strings become spaces, so that offsets and lines stay.
fn blank_comments_and_strings(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let find = |needle: &str, from: usize| text.get(from..).and_then(|rest| rest.find(needle)).map(|at| from + at);
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let end = if rest.starts_with(b"//") {
            find("\n", at).unwrap_or(bytes.len())
        } else if rest.starts_with(b"/*") {
            find("*/", at).map_or(bytes.len(), |end| end + 2)
        } else if rest.starts_with(b"r\"") || rest.starts_with(b"r#") {
            let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
            if rest.get(1 + hashes) != Some(&b'"') {
                at += 1; // a raw identifier
                continue;
            }
            let close = format!("\"{}", "#".repeat(hashes));
            find(&close, at + 2 + hashes).map_or(bytes.len(), |end| end + close.len())
        } else if rest.starts_with(b"\"") {
            let mut end = at + 1;
            while end < bytes.len() && bytes[end] != b'"' {
                end += if bytes[end] == b'\\' { 2 } else { 1 };
            }
            end + 1
        } else if rest.starts_with(b"'\\") {
            find("'", at + 3).map_or(bytes.len(), |end| end + 1)
        } else if rest.starts_with(b"'") {
            match text[at + 1..].char_indices().nth(1) {
                Some((width, '\'')) => at + 1 + width + 1,
                _ => at + 1, // a lifetime
            }
        } else {
            at += 1;
            continue;
        };
        let end = end.min(bytes.len());
        blank(&mut code[at..end]);
        at = end;
    }
    String::from_utf8(code).unwrap()
}

fn blank(code: &mut [u8]) {
    code.iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
}

/// Blanks what follows `#[cfg(test)]`: one item, up to its `;` or its closing brace.
fn without_tests(code: &str) -> String {
    const MARK: &[u8] = b"#[cfg(test)]";
    let mut code = code.as_bytes().to_vec();
    let mut from = 0;
    while let Some(at) = code[from..].windows(MARK.len()).position(|window| window == MARK).map(|at| from + at) {
        let mut end = at + MARK.len();
        let mut nested = 0;
        while end < code.len() {
            match code[end] {
                b'{' => nested += 1,
                b'}' => nested -= 1,
                _ => {}
            }
            end += 1;
            if nested == 0 && matches!(code[end - 1], b'}' | b';') {
                break;
            }
        }
        blank(&mut code[at..end]);
        from = end;
    }
    String::from_utf8(code).unwrap()
}

/// Each test that is named after a promise or a pitfall stands in the tables of `docs/architecture.md`, and none that is
/// not there any more.
#[test]
fn the_page_lists_the_tests_of_promises_and_pitfalls() {
    let page = std::fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let tables = page.split_once("## Promises and their tests").expect("the page has the tables").1;
    let named = |name: &str| {
        let promise = name.strip_prefix('p').and_then(|rest| rest.split_once('_')).map(|(number, _)| number);
        let promise = promise.is_some_and(|number| number.len() == 1 && ("1"..="8").contains(&number));
        promise || name.starts_with("pitfall_")
    };
    let words = |text: &str| -> std::collections::BTreeSet<String> {
        let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
        text.split(word).filter(|word| word.len() > 4 && named(word)).map(str::to_owned).collect()
    };
    let mut tests = std::collections::BTreeSet::new();
    for file in rust_files(&root().join("src")).into_iter().chain(rust_files(&root().join("tests"))) {
        for line in std::fs::read_to_string(&file).unwrap().lines() {
            let name = line.trim_start().trim_start_matches("async ").strip_prefix("fn ");
            let name = name.and_then(|rest| rest.split_once('(')).map(|(name, _)| name);
            tests.extend(name.filter(|name| named(name)).map(str::to_owned));
        }
    }
    let listed = words(tables);
    assert!(tests.len() > 50, "only {} tests are named after a promise or a pitfall", tests.len());
    let missing: Vec<_> = tests.difference(&listed).collect();
    assert!(missing.is_empty(), "docs/architecture.md does not list {missing:?}");
    let gone: Vec<_> = listed.difference(&tests).collect();
    assert!(gone.is_empty(), "docs/architecture.md lists tests that are not there: {gone:?}");
}

fn root() -> std::path::PathBuf {
    std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files
}
