//! A base backup's file table as one stream of entries, whatever the pieces it comes in.
//!
//! What always holds: when the stream ends well, every piece opened, was understood to its end, and listed as many files
//! as the manifest says. One chunk of a piece is in memory at a time.

use std::time::Instant;

use super::RestoreError;
use super::sources::{PartReader, Sources};
use super::spent::Stage;
use crate::catalog::records::{Manifest, PartRef};
use crate::catalog::table::{FileEntry, TableReader};
use crate::types::BackupLabel;

/// Entries in the order in which the server sent the files.
pub struct Table<'a> {
    sources: &'a Sources,
    label: BackupLabel,
    parts: std::slice::Iter<'a, PartRef>,
    open: Option<Piece<'a>>,
}

struct Piece<'a> {
    part: &'a PartRef,
    chunks: PartReader<'a>,
    lines: TableReader,
    entries: u64,
}

impl<'a> Table<'a> {
    /// From the first entry on.
    pub fn new(sources: &'a Sources, manifest: &'a Manifest) -> Table<'a> {
        Table { sources, label: manifest.backup.label, parts: manifest.tables.iter(), open: None }
    }

    /// The next entry; `None` after the last one of the last piece.
    pub async fn next(&mut self) -> Result<Option<FileEntry>, RestoreError> {
        loop {
            let piece = match &mut self.open {
                Some(piece) => piece,
                None => {
                    let Some(part) = self.parts.next() else { return Ok(None) };
                    let (chunks, lines) = (self.sources.part(part), TableReader::new());
                    self.open.insert(Piece { part, chunks, lines, entries: 0 })
                }
            };
            let unread = |source| RestoreError::Table { name: piece.chunks.name(), source };
            if let Some(entry) = piece.lines.next_file().map_err(unread)? {
                piece.entries += 1;
                return Ok(Some(entry));
            }
            let begun = Instant::now();
            let chunk = piece.chunks.next_chunk().await?;
            self.sources.spent().since(Stage::Table, begun);
            if let Some(chunk) = chunk {
                piece.lines.push(&chunk);
                continue;
            }
            let Some(Piece { part, chunks, lines, entries }) = self.open.take() else { continue };
            lines.finish().map_err(|source| RestoreError::Table { name: chunks.name(), source })?;
            if entries != part.entries {
                let reason = format!("{} lists {entries} files, and its manifest says {}", chunks.name(), part.entries);
                return Err(RestoreError::Contradiction { label: self.label, reason });
            }
        }
    }
}
