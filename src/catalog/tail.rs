//! Reads a tail from its start on, some MiB at a time: a tail may be as long as a segment, which is not held in memory.
//!
//! What always holds: only whole frames that open, in their order, come out. Who reads for recovery opens the tail as a
//! whole instead (`reader`), because only that tells damage from a torn end in every case; here the search behind the
//! last frame that opens looks at the next [`LOOK_BEHIND`].

use std::sync::Arc;

use super::CatalogError;
use super::layout::Name;
use super::reader::{PRELUDE_GUESS, Piece};
use super::records::{self, WalRangeNote};
use super::repository::Repository;
use crate::seal::{Header, Kind, MAX_EXTRA, Opener, SealError, TailFrames};

/// What is fetched at once: at least one whole frame, which holds at most 1 MiB. Not much more: WAL shrinks to a seventh,
/// and what a window holds lies in memory.
const WINDOW: u64 = 3 << 19;
/// Where something that was durable is sought behind the last frame that opens.
const LOOK_BEHIND: u64 = 8 << 20;

/// A tail that is being read.
#[derive(Debug)]
pub(super) struct TailReader {
    repository: Repository,
    name: Name,
    note: WalRangeNote,
    frames: Arc<TailFrames>,
    next_frame: u32,
    /// Where in the object the next frame begins.
    at: u64,
    ended: bool,
    damage: Option<String>,
}

impl Repository {
    /// Opens a tail to be read; `None` for one that a crash left before its first append.
    pub(super) async fn open_tail_reader(&self, piece: &Piece) -> Result<Option<TailReader>, CatalogError> {
        let mut start = self.get_bytes(&piece.name, Some(0..PRELUDE_GUESS)).await?;
        let reader = match self.begin_tail(piece, &start).await {
            Err(CatalogError::Sealed { source: SealError::Cut { .. }, .. }) if start.len() as u64 == PRELUDE_GUESS => {
                start = self.get_bytes(&piece.name, Some(0..(Header::LEN + MAX_EXTRA + 64) as u64)).await?;
                self.begin_tail(piece, &start).await
            }
            reader => reader,
        };
        match reader {
            Ok(reader) => Ok(Some(reader)),
            // Torn at its first write, which is nothing; or damaged. All of it tells.
            Err(error @ CatalogError::Sealed { .. }) if error.is_damage() => match self.open_tail_piece(piece).await? {
                None => Ok(None),
                Some(_) => Err(error), // it grew in this moment
            },
            Err(error) => Err(error),
        }
    }

    async fn begin_tail(&self, piece: &Piece, start: &[u8]) -> Result<TailReader, CatalogError> {
        let sealed = |source| self.sealed(&piece.name, source);
        let header = Header::parse(start).map_err(sealed)?;
        let bound = piece.name.object.to_string();
        let binding = self.binding(Kind::WalTail, &bound);
        // Whose it is comes first: a stranger's object must not be reported as a lost key.
        Opener::new(&header, self.meta_key(), None, &binding).map_err(sealed)?;
        let content = self.key_for(&header).await?;
        let (frames, prelude, at) =
            TailFrames::begin(self.meta_key(), content.as_ref(), &binding, start).map_err(sealed)?;
        let note = records::from_json(&prelude).map_err(|source| self.record(&piece.name, source))?;
        let (repository, name, frames) = (self.clone(), piece.name.clone(), Arc::new(frames));
        Ok(TailReader { repository, name, note, frames, next_frame: 0, at, ended: false, damage: None })
    }
}

impl TailReader {
    /// What its prelude says.
    pub fn note(&self) -> &WalRangeNote {
        &self.note
    }

    /// Something that was durable does not open; known at the end.
    pub fn damage(&self) -> Option<&str> {
        self.damage.as_deref()
    }

    /// The next bytes; `None` at the end.
    pub async fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, CatalogError> {
        if self.ended {
            return Ok(None);
        }
        let bytes = self.repository.get_bytes(&self.name, Some(self.at..self.at + WINDOW)).await?;
        let is_end = (bytes.len() as u64) < WINDOW;
        let (frames, first) = (self.frames.clone(), self.next_frame);
        let opened = self.repository.off_thread(move || frames.open(first, &bytes)).await?;
        let opened = opened.map_err(|source| self.repository.sealed(&self.name, source))?;
        self.at += opened.used as u64;
        self.next_frame = self.next_frame.saturating_add(opened.frames);
        // A window holds at least one frame, so one that shows none whole is the end.
        self.ended = is_end || opened.ended || opened.used == 0;
        if self.ended {
            self.look_behind().await?;
        }
        Ok((!opened.plaintext.is_empty()).then_some(opened.plaintext))
    }

    async fn look_behind(&mut self) -> Result<(), CatalogError> {
        let limit = self.at + LOOK_BEHIND;
        let mut from = self.at;
        while from < limit {
            let bytes = self.repository.get_bytes(&self.name, Some(from..from + WINDOW)).await?;
            from += WINDOW;
            if bytes.iter().any(|byte| *byte != 0) {
                break;
            }
            if (bytes.len() as u64) < WINDOW || from >= limit {
                return Ok(()); // the end, perhaps of preallocated space
            }
        }
        let bytes = self.repository.get_bytes(&self.name, Some(self.at..limit)).await?;
        let (frames, bad) = (self.frames.clone(), self.next_frame);
        if self.repository.off_thread(move || frames.is_damage(bad, &bytes)).await? {
            self.damage = Some(format!(
                "frame {bad} at byte {} does not open, but one behind it does, which was written after it was durable",
                self.at
            ));
        }
        Ok(())
    }
}
