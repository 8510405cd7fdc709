//! The file table of a base backup: one line of JSON per file, in pieces that stand on their own.
//!
//! A line is either `{"pack":"<label>/<number>"}`, which gives the next number (from 0) to a pack, or a file, whose
//! extents name packs by those numbers. So a piece that did not change can be shared by another backup as it is.
//! Bytes of a file that no extent covers are zeros.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::layout::PackName;

/// The longest line that is read: a file of 1 GiB whose every block is an extent of its own needs about 6 MiB.
const MAX_LINE: usize = 32 << 20;

/// Why a piece of a file table is not understood.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// Not JSON of a shape that we know.
    #[error("line {line} of the file table is not understood: {source}")]
    Line {
        /// Counted from 1.
        line: u64,
        /// Where JSON and shape part.
        source: serde_json::Error,
    },
    /// An extent names a pack that no line before it introduced.
    #[error("line {line} of the file table names pack {pack}, which it does not introduce")]
    Pack {
        /// Counted from 1.
        line: u64,
        /// The pack's number.
        pack: u32,
    },
    /// No line is that long.
    #[error("line {line} of the file table is longer than {MAX_LINE} bytes")]
    TooLong {
        /// Counted from 1.
        line: u64,
    },
    /// The last line has no end.
    #[error("the file table is cut short after line {line}")]
    Cut {
        /// The last whole line.
        line: u64,
    },
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// With content.
    File,
    /// An empty directory, or any other: all are listed.
    Directory,
    /// A symbolic link that is not a tablespace's.
    Link,
}

/// A run of a file's bytes, and where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The pack that holds them.
    pub pack: PackName,
    /// Offset of the first byte in the pack's plaintext.
    pub at: u64,
}

/// A file of a base backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// Below the data directory, `/` between the parts; `pg_tblspc/<oid>/…` in a tablespace.
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Bytes; 0 unless it is a file.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Seconds since 1970.
    pub mtime: i64,
    /// CRC-32C of its bytes, if it is a file.
    pub crc32c: Option<u32>,
    /// Where a link points.
    pub link: Option<String>,
    /// Its bytes, by offset.
    pub extents: Vec<Extent>,
}

/// A line: a pack, or a file. One flat struct, because serde reads nested ones through a copy of everything.
#[derive(Default, Serialize, Deserialize)]
struct Line {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pack: Option<PackName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kind: Option<FileKind>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mode: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mtime: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crc32c: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    link: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    extents: Vec<(u64, u64, u32, u64)>,
}

/// Writes one piece.
#[derive(Debug, Default)]
pub struct TableWriter {
    out: Vec<u8>,
    packs: HashMap<PackName, u32>,
    entries: u64,
}

impl TableWriter {
    /// An empty piece.
    pub fn new() -> TableWriter {
        TableWriter::default()
    }

    /// Adds a file.
    ///
    /// # Errors
    /// What serde says; it has no reason to.
    pub fn push(&mut self, file: &FileEntry) -> Result<(), serde_json::Error> {
        let mut extents = Vec::with_capacity(file.extents.len());
        for extent in &file.extents {
            let next = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
            let number = match self.packs.get(&extent.pack) {
                Some(number) => *number,
                None => {
                    self.line(&Line { pack: Some(extent.pack), ..Line::default() })?;
                    self.packs.insert(extent.pack, next);
                    next
                }
            };
            extents.push((extent.offset, extent.len, number, extent.at));
        }
        let FileEntry { path, kind, size, mode, mtime, crc32c, link, .. } = file.clone_without_extents();
        let (path, kind, size, mode, mtime) = (Some(path), Some(kind), Some(size), Some(mode), Some(mtime));
        self.line(&Line { pack: None, path, kind, size, mode, mtime, crc32c, link, extents })?;
        self.entries += 1;
        Ok(())
    }

    fn line(&mut self, line: &Line) -> Result<(), serde_json::Error> {
        serde_json::to_writer(&mut self.out, line)?;
        self.out.push(b'\n');
        Ok(())
    }

    /// Bytes so far: a piece is ended by its size.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// Nothing yet.
    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// Files so far.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// The piece.
    pub fn finish(self) -> Vec<u8> {
        self.out
    }
}

impl FileEntry {
    fn clone_without_extents(&self) -> FileEntry {
        FileEntry { path: self.path.clone(), link: self.link.clone(), extents: Vec::new(), ..*self }
    }
}

/// Reads one piece, however it is sliced; holds one line at a time.
#[derive(Debug, Default)]
pub struct TableReader {
    waiting: Vec<u8>,
    read: usize,
    packs: Vec<PackName>,
    line: u64,
}

impl TableReader {
    /// At the start of a piece.
    pub fn new() -> TableReader {
        TableReader::default()
    }

    /// The next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.waiting.drain(..self.read);
        self.read = 0;
        self.waiting.extend_from_slice(bytes);
    }

    /// The next file; `None`: push more, or call [`TableReader::finish`].
    ///
    /// # Errors
    /// [`TableError`]: the piece opened, so a newer version or a mistake of ours wrote it.
    pub fn next_file(&mut self) -> Result<Option<FileEntry>, TableError> {
        loop {
            let rest = self.waiting.get(self.read..).unwrap_or_default();
            let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
                let too_long = rest.len() > MAX_LINE;
                return if too_long { Err(TableError::TooLong { line: self.line + 1 }) } else { Ok(None) };
            };
            self.line += 1;
            let number = self.line;
            let line = rest.get(..end).unwrap_or_default();
            let line = serde_json::from_slice(line).map_err(|source| TableError::Line { line: number, source });
            self.read += end + 1;
            let line: Line = line?;
            self.packs.extend(line.pack);
            if let Some(file) = file_of(line, number, &self.packs)? {
                return Ok(Some(file));
            }
        }
    }

    /// Says that all bytes were pushed and all files taken.
    ///
    /// # Errors
    /// [`TableError::Cut`].
    pub fn finish(self) -> Result<(), TableError> {
        if self.waiting.len() > self.read { Err(TableError::Cut { line: self.line }) } else { Ok(()) }
    }
}

/// What a line says of a file; `None` if it says nothing of one.
fn file_of(line: Line, number: u64, packs: &[PackName]) -> Result<Option<FileEntry>, TableError> {
    let Some(path) = line.path else { return Ok(None) };
    let lacks = |field: &str| {
        let source = <serde_json::Error as serde::de::Error>::custom(format!("a file without {field}"));
        TableError::Line { line: number, source }
    };
    let kind = line.kind.ok_or_else(|| lacks("kind"))?;
    let (mode, mtime) = (line.mode.ok_or_else(|| lacks("mode"))?, line.mtime.ok_or_else(|| lacks("mtime"))?);
    let mut extents = Vec::with_capacity(line.extents.len());
    for (offset, len, pack, at) in line.extents {
        let known = usize::try_from(pack).ok().and_then(|index| packs.get(index));
        let known = *known.ok_or(TableError::Pack { line: number, pack })?;
        extents.push(Extent { offset, len, pack: known, at });
    }
    let (size, crc32c, link) = (line.size.unwrap_or(0), line.crc32c, line.link);
    Ok(Some(FileEntry { path, kind, size, mode, mtime, crc32c, link, extents }))
}

/// A whole piece in memory, in which files are read by where their lines begin.
#[derive(Debug)]
pub struct TablePiece {
    text: Vec<u8>,
    packs: Vec<PackName>,
}

/// A file that a [`TablePiece`] lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedFile {
    /// Where its line begins.
    pub at: usize,
    /// Its path.
    pub path: String,
    /// Bytes; 0 unless it is a file.
    pub size: u64,
}

/// A line as far as a list needs it: the extents, most of it, are stepped over.
#[derive(Deserialize)]
struct BriefLine {
    #[serde(default)]
    pack: Option<PackName>,
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    kind: Option<FileKind>,
    #[serde(default)]
    size: u64,
}

impl TablePiece {
    /// Reads through a piece: what it lists, in order.
    ///
    /// # Errors
    /// As [`TableReader::next_file`] and [`TableReader::finish`].
    pub fn parse(text: Vec<u8>) -> Result<(TablePiece, Vec<ListedFile>), TableError> {
        let (mut packs, mut files, mut at, mut number) = (Vec::new(), Vec::new(), 0, 0);
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let whole = line.strip_suffix(b"\n").ok_or(TableError::Cut { line: number })?;
            number += 1;
            let brief = serde_json::from_slice(whole).map_err(|source| TableError::Line { line: number, source });
            let BriefLine { pack, path, kind, size } = brief?;
            packs.extend(pack);
            let size = if kind == Some(FileKind::File) { size } else { 0 };
            files.extend(path.map(|path| ListedFile { at, path, size }));
            at += line.len();
        }
        Ok((TablePiece { text, packs }, files))
    }

    /// Bytes of the piece.
    pub fn len(&self) -> usize {
        self.text.len()
    }

    /// Nothing is listed.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// The file whose line begins there; `None` if none does.
    ///
    /// # Errors
    /// [`TableError`], with the line counted from there.
    pub fn file_at(&self, at: usize) -> Result<Option<FileEntry>, TableError> {
        let Some(line) = self.text.get(at..).and_then(|rest| rest.split(|byte| *byte == b'\n').next()) else {
            return Ok(None);
        };
        let line = serde_json::from_slice(line).map_err(|source| TableError::Line { line: 1, source })?;
        file_of(line, 1, &self.packs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    fn an_extent() -> impl Strategy<Value = Extent> {
        (any::<u32>(), any::<u32>(), 0i64..3, 1u32..4, any::<u64>()).prop_map(|(offset, len, backup, number, at)| {
            let label = crate::types::BackupLabel::at(jiff::Timestamp::from_second(backup * 1000).unwrap());
            Extent { offset: offset.into(), len: len.into(), pack: PackName { label, number }, at }
        })
    }

    fn a_file() -> impl Strategy<Value = FileEntry> {
        let kind = prop::sample::select(vec![FileKind::File, FileKind::Directory, FileKind::Link]);
        let rest = (any::<u64>(), any::<u32>(), any::<i64>(), option::of(any::<u32>()), option::of(".{0,20}"));
        (".{1,40}", kind, rest, vec(an_extent(), 0..5)).prop_map(|(path, kind, rest, extents)| {
            let (size, mode, mtime, crc32c, link) = rest;
            FileEntry { path, kind, size, mode, mtime, crc32c, link, extents }
        })
    }

    proptest! {
        #[test]
        fn tables_read_back_however_they_are_sliced(files in vec(a_file(), 0..12), slice in 1usize..200) {
            let mut writer = TableWriter::new();
            for file in &files {
                writer.push(file).unwrap();
            }
            prop_assert_eq!(writer.entries(), files.len() as u64);
            let (mut reader, mut read) = (TableReader::new(), Vec::new());
            let text = writer.finish();
            for chunk in text.chunks(slice) {
                reader.push(chunk);
                while let Some(file) = reader.next_file().unwrap() {
                    read.push(file);
                }
            }
            prop_assert!(reader.finish().is_ok());
            prop_assert_eq!(&read, &files);
            let (piece, listed) = TablePiece::parse(text).unwrap();
            prop_assert_eq!(listed.len(), files.len());
            for (listed, file) in listed.iter().zip(&files) {
                let size = if file.kind == FileKind::File { file.size } else { 0 };
                prop_assert_eq!((&listed.path, listed.size), (&file.path, size));
                prop_assert_eq!(&piece.file_at(listed.at).unwrap().unwrap(), file);
            }
        }

        #[test]
        fn garbage_is_an_error_and_never_a_panic(bytes in vec(any::<u8>(), 0..300)) {
            let mut reader = TableReader::new();
            reader.push(&bytes);
            while let Ok(Some(_)) = reader.next_file() {}
            let _ = TablePiece::parse(bytes);
        }
    }

    #[test]
    fn a_table_that_is_cut_or_names_a_strange_pack_is_refused() {
        let mut reader = TableReader::new();
        reader.push(br#"{"path":"a","kind":"file","mode":384,"mtime":0,"extents":[[0,1,0,0]]}"#);
        assert!(matches!(reader.next_file(), Ok(None)));
        reader.push(b"\n{\"path\"");
        assert!(matches!(reader.next_file(), Err(TableError::Pack { line: 1, pack: 0 })));
        assert!(matches!(reader.finish(), Err(TableError::Cut { line: 1 })));
        let cut = TablePiece::parse(b"{\"path\":\"a\"}\n{\"path\"".to_vec());
        assert!(matches!(cut, Err(TableError::Cut { line: 1 })));
        let mut reader = TableReader::new();
        reader.push(b"{\"path\":\"a\"}\n");
        assert!(matches!(reader.next_file(), Err(TableError::Line { line: 1, .. })), "a file without a kind");
    }
}
