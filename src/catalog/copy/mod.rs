//! Copies what one repository holds into another: segments, history files, kept files, gap records, base backups.
//!
//! Within one realm a finished object has the same bytes everywhere, so it is put as it lies there, and the key that
//! sealed it first. Across realms the content is opened and sealed anew, for the same name, with the target's keys.
//! What always holds: nothing is put that did not open before (where the key may not read: whose header, footer and
//! lengths did not fit); what is there with the same content is left alone and synced, because whoever put it may have
//! died before his sync; what is there with other content stays, and is named (P6). A base backup's manifest goes last.
//! Crash, cancellation: every object is there whole or not at all. Copy again: what is there already is not read again.
//! Memory: one object as it is (at most 64 MiB and its seals), or one that is sealed anew while it arrives.

mod backup;
mod check;
mod object;
mod open;
mod parts;

use super::CatalogError;
use super::kinds::kind_of;
use super::layout::{ClusterObject, KeptFile, Name, RangeName};
use super::reader::{Piece, SegmentPieces, group, range_of};
use super::records::{self, FileNote, GapRecord, WalRangeNote};
use super::repository::{Repository, name_of};
use super::writer::{Identity, MAX_RANGE, Put, SealedObject, SealedRange};
use crate::seal::Kind;
use crate::store::StoreError;
use crate::types::{Branch, ClusterId, Digest, Lsn, SegmentNumber, SegmentSize};

pub use backup::{CopiedBackup, same_backup};
pub use open::CopiedEnd;

use object::Hashing;

/// What copying a complete segment did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiedSegment {
    /// Bytes of the objects that were put.
    pub bytes: u64,
    /// [`Put::New`] when any part of it is new here.
    pub put: Put,
}

impl Repository {
    /// Copies a complete segment (all its parts) from another repository: as it is within one realm, opened and sealed
    /// anew across realms. Verified before it is put: its objects open, and its bytes have the digests that their notes
    /// say. Where the same segment is here already, nothing of it is read but the notes.
    ///
    /// A conflict is an answer ([`Put::Conflict`]): other bytes are here. They stay, nothing is put.
    ///
    /// # Errors
    /// [`CatalogError::is_not_found`] where the source lacks the segment or holds only a part of it; damage that names
    /// the object; [`CatalogError::TwoContents`]; what the stores say.
    pub async fn copy_segment(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
    ) -> Result<CopiedSegment, CatalogError> {
        self.check_writable()?;
        let theirs = from.list_segment(cluster, branch, segment, size).await?;
        let Some(parts) = theirs.complete(size) else { return Err(from.lacks(cluster, branch, segment, size)?) };
        let ours = self.list_segment(cluster, branch, segment, size).await?;
        self.agree_all(&ours).await?;
        if let Some(put) = self.is_here(from, &ours, &parts, size).await? {
            return Ok(CopiedSegment { bytes: 0, put });
        }
        let mut done = CopiedSegment { bytes: 0, put: Put::SameContent };
        let borders = ours.open.iter().flat_map(|piece| [Some(piece.from), piece.to]).flatten();
        let mut hashing = Some(Hashing::new(borders.collect()));
        let mut before = Digest::of(b"");
        for part in &parts {
            let same_range = |piece: &&Piece| piece.from == part.from && piece.to == part.to;
            let mut copies: Vec<Piece> = theirs.wal.iter().filter(same_range).cloned().collect();
            copies.sort_by(|a, b| a.name.cmp(&b.name));
            from.agree(&copies).await?;
            if let Some(ours) = ours.wal.iter().find(same_range) {
                // A copy that was cut off, or an archiver that was: this part need not be read again.
                if let Some((put, end)) = self.is_here_too(from, ours, &copies).await? {
                    if matches!(put, Put::Conflict(_)) {
                        return Ok(CopiedSegment { put, ..done });
                    }
                    (before, hashing) = (end, None);
                    continue;
                }
            }
            let Some(range) = range_of(&part.name) else { continue };
            let (ready, note) = if self.same_realm(from) {
                let names: Vec<Name> = copies.into_iter().map(|piece| piece.name).collect();
                let (checked, hashed) = from.fetch_first(&names, Kind::WalRange, hashing.as_ref()).await?;
                hashing = hashed;
                let note: WalRangeNote =
                    records::from_json(&checked.note).map_err(|source| from.record(&part.name, source))?;
                let object = self.as_it_is(from, part.name.clone(), Kind::WalRange, &checked).await?;
                if object.plaintext_len() != u64::from(range.bytes()) {
                    return Err(from.inconsistent(&part.name, "it does not hold what its name says"));
                }
                (Ready::AsItIs(Box::new(object)), note)
            } else {
                let (sealed, hashed) = self.seal_anew(from, cluster, branch, size, &copies, hashing.as_ref()).await?;
                hashing = hashed;
                let note = sealed.note().clone();
                (Ready::Anew(Box::new(sealed)), note)
            };
            let end = note.digest_to.filter(|end| hashing.as_ref().is_none_or(|hashing| hashing.digest() == *end));
            let Some(end) = end.filter(|_| note.digest_from == before && note.segment_size == size) else {
                return Err(from.inconsistent(&part.name, "it does not hold what its note says"));
            };
            before = end;
            if let Some(put) = self.contradiction(from, &ours, hashing.as_ref(), part).await? {
                return Ok(CopiedSegment { put, ..done });
            }
            let (put, bytes) = match ready {
                Ready::AsItIs(object) => {
                    let identity = Identity { before: Some(note.digest_from), content: end };
                    (self.put_copied(&object, identity, from).await?, object.len())
                }
                Ready::Anew(sealed) => (self.put_range(&sealed).await?, sealed.object().len()),
            };
            match put {
                Put::Conflict(_) => return Ok(CopiedSegment { put, ..done }),
                Put::SameContent => {}
                Put::New | Put::BesideDamaged { .. } => done = CopiedSegment { bytes: done.bytes + bytes, put },
            }
        }
        Ok(done)
    }

    /// Of two contents under one name neither is a reason to copy nothing.
    async fn agree_all(&self, pieces: &SegmentPieces) -> Result<(), CatalogError> {
        for copies in group(pieces.wal.iter().cloned()) {
            self.agree(&copies).await?;
        }
        Ok(())
    }

    /// The complete segment is not here.
    fn lacks(
        &self,
        cluster: &ClusterId,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
    ) -> Result<CatalogError, CatalogError> {
        let range = super::writer::segment_name(branch, segment, size)?;
        let range = RangeName::new(range, 0, u32::try_from(size.bytes()).unwrap_or(MAX_RANGE));
        let name = range.map(|range| name_of(cluster, ClusterObject::Wal(branch, range)));
        let key = name.as_ref().map(|name| self.key_of(name)).transpose()?;
        Ok(match key {
            Some(key) => self.in_store(StoreError::NotFound { key }),
            None => CatalogError::Misuse { name: self.name().to_owned(), reason: "an empty segment".to_owned() },
        })
    }

    /// Where the complete segment is here: whether it is the same, by the digests of its end; it lasts then.
    async fn is_here(
        &self,
        from: &Repository,
        ours: &SegmentPieces,
        theirs: &[Piece],
        size: SegmentSize,
    ) -> Result<Option<Put>, CatalogError> {
        let Some(whole) = ours.complete(size) else { return Ok(None) };
        let (Some(our_last), Some(their_last)) = (whole.last(), theirs.last()) else { return Ok(None) };
        let our_note = match self.note_of(our_last).await {
            Ok(note) => note,
            Err(error) if error.is_damage() || error.is_not_found() => return Ok(None), // put beside it
            Err(error) => return Err(error),
        };
        let their_note = match from.note_of(their_last).await {
            Ok(note) => note,
            Err(error) if error.is_damage() => return Ok(None), // a copy of it may open
            Err(error) => return Err(error),
        };
        let (Some(our_end), Some(their_end)) = (our_note.digest_to, their_note.digest_to) else { return Ok(None) };
        if our_end != their_end {
            return Ok(Some(self.differs(&our_last.name, our_end, our_note.writer, their_end, from)));
        }
        for piece in &whole {
            self.sync_object(&piece.name).await?;
        }
        Ok(Some(Put::SameContent))
    }

    /// Where a part is here under the same name: whether it is the same, and the digest of its end.
    async fn is_here_too(
        &self,
        from: &Repository,
        ours: &Piece,
        theirs: &[Piece],
    ) -> Result<Option<(Put, Digest)>, CatalogError> {
        let Some(their_piece) = theirs.first() else { return Ok(None) };
        let notes = (self.note_of(ours).await, from.note_of(their_piece).await);
        let (our_note, their_note) = match notes {
            (Ok(ours), Ok(theirs)) => (ours, theirs),
            (Err(error), _) | (_, Err(error)) if error.is_damage() || error.is_not_found() => return Ok(None),
            (Err(error), _) | (_, Err(error)) => return Err(error),
        };
        let (Some(our_end), Some(their_end)) = (our_note.digest_to, their_note.digest_to) else { return Ok(None) };
        if (our_note.digest_from, our_end) != (their_note.digest_from, their_end) {
            let put = self.differs(&ours.name, our_end, our_note.writer, their_end, from);
            return Ok(Some((put, our_end)));
        }
        self.sync_object(&ours.name).await?;
        Ok(Some((Put::SameContent, our_end)))
    }

    /// Ranges of this segment that are still open here and whose end has gone by, but with other bytes.
    async fn contradiction(
        &self,
        from: &Repository,
        ours: &SegmentPieces,
        hashing: Option<&Hashing>,
        part: &Piece,
    ) -> Result<Option<Put>, CatalogError> {
        let Some(hashing) = hashing else { return Ok(None) };
        for piece in ours.open.iter().filter(|piece| piece.to.is_some_and(|to| to > part.from)) {
            let Some(passed) = piece.to.and_then(|to| hashing.digest_at(to)) else { continue };
            match self.note_of(piece).await {
                Ok(note) => {
                    if let Some(end) = note.digest_to.filter(|end| *end != passed) {
                        return Ok(Some(self.differs(&piece.name, end, note.writer, passed, from)));
                    }
                }
                Err(error) if error.is_damage() || error.is_not_found() => {} // it counts for nothing, or is gone
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Opens a part of a complete segment there, and seals it for the same name with this repository's keys.
    async fn seal_anew(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        branch: Branch,
        size: SegmentSize,
        copies: &[Piece],
        hashing: Option<&Hashing>,
    ) -> Result<(SealedRange, Option<Hashing>), CatalogError> {
        let mut first = None;
        for piece in copies {
            match self.seal_one_anew(from, cluster, branch, size, piece, hashing.cloned()).await {
                Err(error) if error.is_damage() || error.is_not_found() => first = first.or(Some(error)),
                result => return result,
            }
        }
        Err(first.unwrap_or_else(|| CatalogError::Misuse {
            name: from.name().to_owned(),
            reason: "no object was named".to_owned(),
        }))
    }

    async fn seal_one_anew(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        branch: Branch,
        size: SegmentSize,
        piece: &Piece,
        mut hashing: Option<Hashing>,
    ) -> Result<(SealedRange, Option<Hashing>), CatalogError> {
        let range = range_of(&piece.name);
        let range = range.and_then(|range| Some((range.segment.number(size)?, range)));
        let Some((segment, range)) = range else {
            return Err(from.inconsistent(&piece.name, format!("it cannot be WAL in segments of {size}")));
        };
        let mut reader = from.open_reader_at(piece.name.clone(), Kind::WalRange, piece.len, None).await?;
        let note = records::from_json(reader.note()).map_err(|source| from.record(&piece.name, source))?;
        if reader.plaintext_len() != u64::from(range.bytes()) {
            return Err(from.inconsistent(&piece.name, "it does not hold what its name says"));
        }
        let mut sealer = self.seal_wal(cluster, branch, segment, size, (range.from(), range.to())).await?;
        while let Some(chunk) = reader.next_chunk().await? {
            (sealer, hashing) = self
                .off_thread(move || {
                    let mut hashing = hashing;
                    hashing.iter_mut().for_each(|hashing| hashing.update(&chunk));
                    sealer.push(&chunk).map(|()| (sealer, hashing))
                })
                .await??;
        }
        Ok((sealer.finish(range.to(), note)?, hashing))
    }

    /// Copies a branch's history file. It has to be there before the branch's first WAL.
    ///
    /// # Errors
    /// [`CatalogError::is_not_found`] where the source has none; damage that names the object; what the stores say.
    pub async fn copy_history(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        branch: Branch,
    ) -> Result<Put, CatalogError> {
        self.copy_file(from, cluster, ClusterObject::History(branch)).await
    }

    /// Copies a kept `.partial` or `.backup` file.
    ///
    /// # Errors
    /// [`CatalogError::is_not_found`] where the source has none; damage that names the object; what the stores say.
    pub async fn copy_wal_file(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        branch: Branch,
        file: &KeptFile,
    ) -> Result<Put, CatalogError> {
        self.copy_file(from, cluster, ClusterObject::WalFile(branch, file.clone())).await
    }

    /// Copies the record of a gap. A record of the same gap here is as good, whoever noticed it.
    ///
    /// # Errors
    /// [`CatalogError::is_not_found`] where the source has none; damage that names the object; what the stores say.
    pub async fn copy_gap(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        branch: Branch,
        (begin, end): (Lsn, Lsn),
    ) -> Result<Put, CatalogError> {
        self.check_writable()?;
        let object = ClusterObject::Gap(branch, begin, end);
        let name = name_of(cluster, object.clone());
        let theirs: GapRecord = from.get_record(cluster, object.clone()).await?;
        match self.get_record::<GapRecord>(cluster, object.clone()).await {
            Ok(_) => match self.sync_object(&name).await {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => return Ok(Put::SameContent), // it was read from a copy, or is durable now
            },
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        // Where names are shared, records are compared by what they say.
        if self.same_realm(from) && !self.names_are_shared() {
            let (checked, _) = from.fetch_any(&name, Kind::Record).await?;
            let sealed = self.as_it_is(from, name, Kind::Record, &checked).await?;
            self.put_object(&sealed).await?;
        } else {
            self.put_record(cluster, object, &theirs).await?;
        }
        Ok(Put::New)
    }

    async fn copy_file(
        &self,
        from: &Repository,
        cluster: &ClusterId,
        object: ClusterObject,
    ) -> Result<Put, CatalogError> {
        self.check_writable()?;
        let (kind, name) = (kind_of(&object), name_of(cluster, object.clone()));
        let (checked, _) = from.fetch_any(&name, kind).await?;
        let note: FileNote = records::from_json(&checked.note).map_err(|source| from.record(&name, source))?;
        let sealed = if self.same_realm(from) {
            self.as_it_is(from, name, kind, &checked).await?
        } else {
            let (plaintext, json) = from.open_bytes(&name, kind, checked.bytes).await?;
            if Digest::of(&plaintext) != note.digest {
                return Err(from.inconsistent(&name, "it does not hold what its note says"));
            }
            let mut writer = self.seal_object(cluster, object).await?;
            writer.push(&plaintext)?;
            writer.finish(&json)?
        };
        self.put_copied(&sealed, Identity { before: None, content: note.digest }, from).await
    }
}

/// A part that may be put.
enum Ready {
    AsItIs(Box<SealedObject>),
    Anew(Box<SealedRange>),
}
