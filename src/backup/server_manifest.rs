//! Reads PostgreSQL's `backup_manifest` as it streams by, and compares it with the files that arrived. Pure.
//!
//! The server adds a file to its manifest when it has sent it, so both have the same order (`backup_manifest.c`). Of each
//! file that arrived 24 bytes are kept, of the manifest one line: a million files cost 24 MB and no table is held.
//! The manifest is one line per file and ends with the SHA-256 of all that came before; whatever else it says that we do
//! not expect is an error, because then we would not know what was checked.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::types::{Lsn, SystemId, TimelineId};

/// No line is that long: it names one file.
const MAX_LINE: usize = 64 << 10;
/// The range of WAL of a backup is one per timeline; a backup has one.
const MAX_RANGES: usize = 1 << 10;

/// Why the manifest does not confirm what arrived.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// It is not a manifest as PostgreSQL 13 to 18 write it.
    #[error("line {line} of the manifest is not understood: {reason}")]
    Line {
        /// Counted from 1.
        line: u64,
        /// What is wrong.
        reason: String,
    },
    /// It ends in the middle.
    #[error("the manifest ends in the middle, after line {line}")]
    Cut {
        /// The last whole line.
        line: u64,
    },
    /// The sum at its end is not that of what came before.
    #[error("the manifest's own checksum does not match: it was damaged on the way")]
    Checksum,
    /// A file of the manifest did not arrive at its turn.
    #[error("the manifest lists {path} as file {number}, and another file arrived there, or none")]
    Order {
        /// The manifest's file.
        path: String,
        /// Counted from 1.
        number: usize,
    },
    /// A file arrived, and not as it was sent.
    #[error(
        "{path} was sent with {sent_size} bytes and CRC-32C {sent_crc:08x}, and arrived with {size} bytes and {crc:08x}"
    )]
    Content {
        /// The file.
        path: String,
        /// What the manifest says.
        sent_size: u64,
        /// What the manifest says.
        sent_crc: u32,
        /// What arrived.
        size: u64,
        /// What arrived.
        crc: u32,
    },
    /// More arrived than it lists.
    #[error("the manifest lists {listed} files, and {arrived} arrived")]
    Missing {
        /// In the manifest.
        listed: usize,
        /// In the archives.
        arrived: usize,
    },
}

/// A range of WAL that a backup needs, as its manifest says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalRange {
    /// On this timeline.
    pub timeline: TimelineId,
    /// From here.
    pub start: Lsn,
    /// To here.
    pub end: Lsn,
}

/// What a manifest says besides its files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerManifest {
    /// Number of files.
    pub files: u64,
    /// The WAL that the backup needs.
    pub wal_ranges: Vec<WalRange>,
    /// The server's identity; 17 and later.
    pub system: Option<SystemId>,
}

#[derive(Debug, Clone, Copy)]
struct Arrived {
    path: u64,
    size: u64,
    crc: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Head,
    Files,
    BetweenLists,
    WalRanges,
    End,
    After,
}

/// Told of every file that arrives, then of the manifest's bytes.
#[derive(Debug)]
pub struct ManifestChecker {
    arrived: Vec<Arrived>,
    place: Place,
    sum: Sha256,
    line: Vec<u8>,
    lines: u64,
    said: ServerManifest,
}

impl Default for ManifestChecker {
    fn default() -> Self {
        ManifestChecker::new()
    }
}

#[derive(Deserialize)]
struct FileLine {
    #[serde(rename = "Path")]
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: String,
    #[serde(rename = "Checksum")]
    checksum: String,
}

#[derive(Deserialize)]
struct RangeLine {
    #[serde(rename = "Timeline")]
    timeline: u32,
    #[serde(rename = "Start-LSN")]
    start: String,
    #[serde(rename = "End-LSN")]
    end: String,
}

impl ManifestChecker {
    /// Before the first file.
    pub fn new() -> ManifestChecker {
        ManifestChecker {
            arrived: Vec::new(),
            place: Place::Head,
            sum: Sha256::new(),
            line: Vec::new(),
            lines: 0,
            said: ServerManifest::default(),
        }
    }

    /// A file arrived, in its turn.
    pub fn arrived(&mut self, path: &str, size: u64, crc32c: u32) {
        self.arrived.push(Arrived { path: hash(path), size, crc: crc32c });
    }

    /// The next bytes of the manifest.
    ///
    /// # Errors
    /// The first difference; the manifest is of no use then.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), ManifestError> {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (head, rest) = bytes.split_at(end + 1);
            bytes = rest;
            let mut line = std::mem::take(&mut self.line);
            line.extend_from_slice(head);
            self.lines += 1;
            self.whole_line(&line)?;
            line.clear();
            self.line = line; // its room is used again
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() > MAX_LINE {
            return Err(self.refuse("it is longer than any file's entry"));
        }
        Ok(())
    }

    /// All bytes were pushed: what it said.
    ///
    /// # Errors
    /// [`ManifestError::Cut`], [`ManifestError::Missing`].
    pub fn finish(self) -> Result<ServerManifest, ManifestError> {
        if self.place != Place::After || !self.line.is_empty() {
            return Err(ManifestError::Cut { line: self.lines });
        }
        let listed = usize::try_from(self.said.files).unwrap_or(usize::MAX);
        if listed != self.arrived.len() {
            return Err(ManifestError::Missing { listed, arrived: self.arrived.len() });
        }
        Ok(self.said)
    }

    fn refuse(&self, reason: impl Into<String>) -> ManifestError {
        ManifestError::Line { line: self.lines, reason: reason.into() }
    }

    fn whole_line(&mut self, line: &[u8]) -> Result<(), ManifestError> {
        let text = std::str::from_utf8(line).map_err(|_| self.refuse("it is not UTF-8"))?.trim_end_matches('\n');
        if let Some(sum) = text.strip_prefix("\"Manifest-Checksum\": \"") {
            if self.place != Place::End {
                return Err(self.refuse("its checksum comes too early"));
            }
            let sum = sum.strip_suffix("\"}").ok_or_else(|| self.refuse("no checksum"))?;
            self.place = Place::After;
            let ours = std::mem::take(&mut self.sum).finalize();
            let same = hex(sum).is_some_and(|sum| sum == ours[..]);
            return if same { Ok(()) } else { Err(ManifestError::Checksum) };
        }
        self.sum.update(line);
        let entry = text.strip_suffix(',').unwrap_or(text);
        match (self.place, entry) {
            (Place::Head, head) if head.starts_with("{ \"PostgreSQL-Backup-Manifest-Version\": ") => Ok(()),
            (Place::Head, "\"Files\": [") => {
                self.place = Place::Files;
                Ok(())
            }
            (Place::Head, head) => {
                let number = head.strip_prefix("\"System-Identifier\": ").and_then(|number| number.parse().ok());
                self.said.system = Some(number.ok_or_else(|| self.refuse("an unknown field"))?);
                Ok(())
            }
            (Place::Files, "]") => {
                self.place = Place::BetweenLists;
                Ok(())
            }
            (Place::Files, entry) => self.file(entry),
            (Place::BetweenLists, "\"WAL-Ranges\": [") => {
                self.place = Place::WalRanges;
                Ok(())
            }
            (Place::WalRanges, "]") => {
                self.place = Place::End;
                Ok(())
            }
            (Place::WalRanges, entry) => self.range(entry),
            (Place::BetweenLists | Place::End | Place::After, _) => Err(self.refuse("an unknown field")),
        }
    }

    fn file(&mut self, entry: &str) -> Result<(), ManifestError> {
        let file: FileLine = serde_json::from_str(entry).map_err(|error| self.refuse(error.to_string()))?;
        let path = match (file.path, file.encoded_path) {
            (Some(path), None) => path,
            (None, Some(encoded)) => {
                let bytes = hex(&encoded).ok_or_else(|| self.refuse("a path that is not hex"))?;
                String::from_utf8(bytes).map_err(|_| self.refuse("a path that is not UTF-8"))?
            }
            _ => return Err(self.refuse("a file without one path")),
        };
        if file.algorithm != "CRC32C" {
            return Err(self.refuse(format!("checksum algorithm {}, and CRC32C was asked for", file.algorithm)));
        }
        // PostgreSQL prints the four bytes as they lie in memory: least significant first.
        let sent_crc = hex(&file.checksum).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
        let sent_crc = sent_crc.ok_or_else(|| self.refuse("a checksum that is not four bytes in hex"))?;
        let index = usize::try_from(self.said.files).unwrap_or(usize::MAX);
        self.said.files += 1;
        match self.arrived.get(index) {
            Some(arrived) if arrived.path == hash(&path) => {
                let Arrived { size, crc, .. } = *arrived;
                if (size, crc) == (file.size, sent_crc) {
                    return Ok(());
                }
                Err(ManifestError::Content { path, sent_size: file.size, sent_crc, size, crc })
            }
            _ => Err(ManifestError::Order { path, number: index + 1 }),
        }
    }

    fn range(&mut self, entry: &str) -> Result<(), ManifestError> {
        let range: RangeLine = serde_json::from_str(entry).map_err(|error| self.refuse(error.to_string()))?;
        let range = TimelineId::new(range.timeline).and_then(|timeline| {
            Some(WalRange { timeline, start: range.start.parse().ok()?, end: range.end.parse().ok()? })
        });
        let range = range.ok_or_else(|| self.refuse("a range of WAL that is none"))?;
        if self.said.wal_ranges.len() == MAX_RANGES {
            return Err(self.refuse("more ranges of WAL than any backup has"));
        }
        self.said.wal_ranges.push(range);
        Ok(())
    }
}

fn hash(path: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    hasher.finish()
}

/// Bytes in hex as PostgreSQL writes it: lower case.
fn hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let bytes: Option<Vec<u8>> = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect();
    bytes.filter(|_| rest.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// As `backup_manifest.c` writes it, checked in `tests/backup.rs` against servers.
    fn manifest(files: &[(&str, u64, u32)], version: u32) -> Vec<u8> {
        let mut text = format!("{{ \"PostgreSQL-Backup-Manifest-Version\": {version},\n");
        if version > 1 {
            text.push_str("\"System-Identifier\": 18446744073709551615,\n");
        }
        text.push_str("\"Files\": [");
        for (index, (path, size, crc)) in files.iter().enumerate() {
            let sum: String = crc.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            let path = serde_json::to_string(path).unwrap();
            text.push_str(if index == 0 { "\n" } else { ",\n" });
            text.push_str(&format!(
                "{{ \"Path\": {path}, \"Size\": {size}, \"Last-Modified\": \"2026-11-20 03:15:00 GMT\", \
                 \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{sum}\" }}"
            ));
        }
        text.push_str("\n],\n\"WAL-Ranges\": [\n");
        text.push_str("{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000100\" }");
        text.push_str("\n],\n");
        let sum: String = Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        text.push_str(&format!("\"Manifest-Checksum\": \"{sum}\"}}\n"));
        text.into_bytes()
    }

    const FILES: &[(&str, u64, u32)] = &[("backup_label", 227, 0x2247_748a), ("base/1/112", 0, 0), ("a \"ü\"", 9, 7)];

    fn check(arrived: &[(&str, u64, u32)], manifest: &[u8], slice: usize) -> Result<ServerManifest, ManifestError> {
        let mut checker = ManifestChecker::new();
        arrived.iter().for_each(|(path, size, crc)| checker.arrived(path, *size, *crc));
        for piece in manifest.chunks(slice) {
            checker.push(piece)?;
        }
        checker.finish()
    }

    #[test]
    fn what_arrived_as_it_was_sent_is_confirmed() {
        let range = WalRange {
            timeline: TimelineId::FIRST,
            start: "0/2000028".parse().unwrap(),
            end: "0/2000100".parse().unwrap(),
        };
        for version in [1, 2] {
            for slice in [1, 7, 10_000] {
                let said = check(FILES, &manifest(FILES, version), slice).unwrap();
                assert_eq!((said.files, said.wal_ranges), (3, vec![range]));
                assert_eq!(said.system, (version == 2).then_some(SystemId::new(u64::MAX)));
            }
        }
        assert_eq!(check(&[], &manifest(&[], 1), 10).unwrap().files, 0);
    }

    #[test]
    fn every_difference_is_named() {
        let text = manifest(FILES, 2);
        let mut size = FILES.to_vec();
        size[0].1 = 228;
        assert!(matches!(check(&size, &text, 99), Err(ManifestError::Content { path, .. }) if path == "backup_label"));
        let mut crc = FILES.to_vec();
        crc[2].2 = 8;
        assert!(matches!(check(&crc, &text, 99), Err(ManifestError::Content { path, .. }) if path == "a \"ü\""));
        assert!(matches!(check(&FILES[..2], &text, 99), Err(ManifestError::Order { number: 3, .. })));
        assert!(matches!(check(&FILES[1..], &text, 99), Err(ManifestError::Order { number: 1, .. })));
        let more = [FILES, &[("x", 0, 0)]].concat();
        assert!(matches!(check(&more, &text, 99), Err(ManifestError::Missing { listed: 3, arrived: 4 })));
    }

    proptest! {
        #[test]
        fn a_manifest_that_was_cut_or_changed_is_refused(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let whole = manifest(FILES, 2);
            let at = at.index(whole.len());
            let mut changed = whole.clone();
            changed[at] ^= 1 << bit;
            prop_assert!(check(FILES, &changed, 50).is_err(), "byte {} changed", at);
            prop_assert!(check(FILES, &whole[..at], 50).is_err(), "cut at {}", at);
        }

        #[test]
        fn garbage_is_an_error_and_never_a_panic(bytes in vec(any::<u8>(), 0..300)) {
            prop_assert!(check(FILES, &bytes, 20).is_err());
        }
    }
}
