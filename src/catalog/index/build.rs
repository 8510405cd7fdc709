//! Makes indexes from WAL: as it streams by, or from what the repository holds.
//!
//! What always holds: an index is put only for a range of which every record was read, the one that goes on beyond its end
//! included. Memory: one segment and what is read ahead of it, one index.
//! Crash and cancellation: what was put is there; the rest is found missing again.

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;

use super::{IndexNote, IndexRange, IndexWriter, range_end};
use crate::catalog::CatalogError;
use crate::catalog::inventory::{ClusterInventory, Place, Stretch};
use crate::catalog::repository::Repository;
use crate::types::{Branch, ClusterId, Lsn, SegmentNumber, SegmentSize, SystemId, TimelineId};
use crate::wal::{Decoder, Record, Summarizer, WalDamage, may_be_summarized};

/// Segments are read ahead up to this many bytes, and at least one.
const AHEAD_BYTES: u64 = 64 << 20;
const AHEAD_MAX: u64 = 4;

/// The bytes of an index, and what goes into its footer.
pub type Indexed = (Vec<u8>, IndexNote);

/// Indexes WAL that is pushed in order, range after range.
#[derive(Debug)]
pub struct IndexWal {
    decoder: Decoder,
    ranges: Ranges,
}

#[derive(Debug)]
struct Ranges {
    size: SegmentSize,
    /// What begins before is passed over.
    from: Lsn,
    summarizer: Summarizer,
    writer: IndexWriter,
    /// End of the range that is being indexed.
    to: Lsn,
    /// Version of the newest record, 0 before there is one.
    major: u32,
    finished: Vec<Indexed>,
}

impl IndexWal {
    /// Records that begin at or after `from`, the start of a page; the first range ends at `to`, the others are aligned.
    pub fn new(
        from: Lsn,
        to: Lsn,
        size: SegmentSize,
        system: Option<SystemId>,
        timeline: Option<TimelineId>,
    ) -> IndexWal {
        let decoder = Decoder::new(from, size).expecting(system, timeline).only(may_be_summarized);
        let (summarizer, writer) = (Summarizer::new(), IndexWriter::new(from));
        IndexWal { decoder, ranges: Ranges { size, from, summarizer, writer, to, major: 0, finished: Vec::new() } }
    }

    /// Only records that begin at or after `from`, which may lie anywhere.
    #[must_use]
    fn only_from(mut self, from: Lsn) -> IndexWal {
        self.ranges.from = from;
        self.ranges.writer = IndexWriter::new(from);
        self
    }

    /// The next bytes. Gives the ranges of which every record has been read.
    ///
    /// # Errors
    /// [`WalDamage`]: nothing can be indexed with this value any more.
    pub fn push(&mut self, bytes: impl Into<Bytes>) -> Result<Vec<Indexed>, WalDamage> {
        self.decoder.push(bytes);
        while let Some(record) = self.decoder.next()? {
            self.ranges.take(&record)?;
        }
        // Nothing that begins before the border is unfinished behind it.
        while self.decoder.position() >= self.ranges.to && !self.decoder.inside_record() {
            self.ranges.cut();
        }
        Ok(std::mem::take(&mut self.ranges.finished))
    }

    /// Where the next bytes belong.
    pub fn position(&self) -> Lsn {
        self.decoder.position()
    }

    /// What has been read and is not finished.
    pub fn rest(mut self) -> Indexed {
        let to = self.decoder.position().min(self.ranges.to);
        self.ranges.close(to)
    }
}

impl Ranges {
    fn take(&mut self, record: &Record<'_>) -> Result<(), WalDamage> {
        if record.start < self.from {
            return Ok(());
        }
        while record.start >= self.to {
            self.cut();
        }
        self.major = record.format.major;
        self.summarizer.push(record)?;
        for part in self.summarizer.take_ended() {
            self.writer.push(&part);
        }
        for landmark in self.summarizer.take_landmarks() {
            self.writer.push_landmark(&landmark);
        }
        Ok(())
    }

    fn cut(&mut self) {
        let to = self.to;
        self.to = range_end(to, self.size);
        let indexed = self.close(to);
        self.finished.push(indexed);
    }

    fn close(&mut self, to: Lsn) -> Indexed {
        let newest = self.summarizer.newest_xid();
        let mut writer = std::mem::replace(&mut self.writer, IndexWriter::new(to));
        for part in self.summarizer.take_open() {
            writer.push(&part);
        }
        writer.finish(to, self.major, newest)
    }
}

/// WAL that is there and not indexed: `[from, to)` of one branch, at most one range of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// The history.
    pub branch: Branch,
    /// First byte.
    pub from: Lsn,
    /// First byte after it.
    pub to: Lsn,
}

/// What an index was made of, and how well.
#[derive(Debug)]
pub(super) struct FromWal {
    pub indexed: Indexed,
    /// Why not all of the range is in it; `None`: it is all there.
    pub lacks: Option<String>,
    /// All that is there was read: its last record will go on.
    pub at_end: bool,
    /// Bytes of WAL that were read.
    pub read: u64,
}

/// What a rebuild did.
#[derive(Debug, Default, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Rebuilt {
    /// Indexes that were made.
    pub ranges: u64,
    /// Of this much WAL.
    pub wal_bytes: u64,
    /// Their bytes, before they were sealed.
    pub index_bytes: u64,
    /// Transactions in them.
    pub transactions: u64,
    /// Ranges that could not be indexed, and why.
    pub left: Vec<String>,
}

/// A part of a stretch within one segment.
#[derive(Debug, Clone, Copy)]
struct SegmentPart {
    branch: Branch,
    segment: SegmentNumber,
    to: Lsn,
}

/// The segments of `stretches` that hold WAL at or after `from`, in order.
fn segments_from(stretches: &[Stretch], from: Lsn, size: SegmentSize) -> impl Iterator<Item = SegmentPart> {
    stretches.iter().filter(move |stretch| stretch.from < stretch.to && stretch.to > from).flat_map(move |stretch| {
        let (begin, to) = (stretch.from.max(from), stretch.to);
        let numbers = begin.segment(size).get()..=to.segment_before(size).get();
        let branch = stretch.branch;
        numbers.map(SegmentNumber::new).map(move |segment| SegmentPart {
            branch,
            segment,
            to: to.min(segment.end(size)),
        })
    })
}

impl Repository {
    /// Indexes the records of `[from, to)` on the way of these stretches, which have no hole between them.
    pub(super) async fn index_from_wal(
        &self,
        inventory: &ClusterInventory,
        stretches: &[Stretch],
        (from, to): (Lsn, Lsn),
        size: SegmentSize,
    ) -> Result<FromWal, CatalogError> {
        let begin = from.segment_start(size);
        let mut index = IndexWal::new(begin, to, size, Some(inventory.id.system), None).only_from(from);
        let mut read = 0;
        let ahead = usize::try_from((AHEAD_BYTES / size.bytes()).clamp(1, AHEAD_MAX)).unwrap_or(1);
        let parts: Vec<SegmentPart> = segments_from(stretches, begin, size).collect();
        let within = parts.iter().filter(|part| part.segment.start(size) < to).count();
        let fetch = |part: SegmentPart| async move {
            let path = inventory.path_of(part.branch);
            let read = self.read_segment(&inventory.id, part.branch, part.segment, size, path.as_ref()).await;
            (part, read)
        };
        // Beyond the end only what the last record needs: one segment, as a rule none.
        let (head, tail) = parts.split_at(within);
        let mut segments = stream::iter(head.iter().copied())
            .map(fetch)
            .buffered(ahead)
            .chain(stream::iter(tail.iter().copied()).then(fetch))
            .boxed();
        let mut lacks = None;
        while let Some((part, segment)) = segments.next().await {
            let mut segment = match segment {
                Ok(segment) => segment,
                Err(error) if error.is_damage() => {
                    lacks = Some(error.to_string());
                    break;
                }
                Err(error) => return Err(error),
            };
            let wanted = part.to.bytes_since(part.segment.start(size)).unwrap_or(0);
            segment.bytes.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
            read += segment.bytes.len() as u64;
            let at = part.segment.start(size).advance(segment.bytes.len() as u64);
            let short = (segment.bytes.len() as u64) < wanted;
            match index.push(segment.bytes) {
                Ok(finished) => {
                    if let Some(indexed) = finished.into_iter().next() {
                        return Ok(FromWal { indexed, lacks: None, at_end: false, read });
                    }
                }
                Err(damage) => {
                    lacks = Some(damage.to_string());
                    break;
                }
            }
            if short {
                lacks = Some(format!("the WAL of branch {} could only be read up to {at}", part.branch));
                break;
            }
        }
        let at_end = lacks.is_none();
        let lacks =
            lacks.unwrap_or_else(|| format!("the record that begins before {to} ends beyond the WAL that is there"));
        Ok(FromWal { indexed: index.rest(), lacks: Some(lacks), at_end, read })
    }

    /// Complete segments of which no index is there, in ranges. `all`: indexes that are there are read, and what does not
    /// open, or is of an older version, counts as missing.
    ///
    /// # Errors
    /// What the store says.
    pub async fn missing_indexes(&self, inventory: &ClusterInventory, all: bool) -> Result<Vec<Missing>, CatalogError> {
        let Some(size) = inventory.segment_size else { return Ok(Vec::new()) };
        let mut missing = Vec::new();
        for (branch, held) in &inventory.branches {
            let mut ranges = self.list_indexes(&inventory.id, *branch).await?;
            if all {
                let mut good = Vec::new();
                for range in ranges {
                    match self.get_index(&range).await {
                        Ok(file) if file.landmarks.is_none() => {}
                        Ok(_) => good.push(range),
                        Err(error) if error.is_damage() => {
                            tracing::warn!(branch = %range.branch, from = %range.from, %error, "an index does not open");
                        }
                        Err(error) => return Err(error),
                    }
                }
                ranges = good;
            }
            let mut whole = held.clone();
            whole.pieces.retain(|piece| piece.place == Place::Wal);
            for run in whole.runs(size) {
                // A segment of which only some parts are there is not complete.
                let (from, to) = (run.from, run.to.segment_start(size));
                let from = if from.segment_offset(size) == 0 { from } else { from.segment(size).end(size) };
                missing.extend(not_covered(&ranges, *branch, from, to, size));
            }
        }
        Ok(missing)
    }

    /// Makes the indexes that are missing; `done` is told after each how much WAL is behind it.
    ///
    /// # Errors
    /// What the store says; what was made until then is there.
    pub async fn rebuild_indexes(
        &self,
        cluster: &ClusterId,
        all: bool,
        done: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<Rebuilt, CatalogError> {
        let inventory = self.load(cluster).await?;
        let Some(size) = inventory.segment_size else { return Ok(Rebuilt::default()) };
        let missing = self.missing_indexes(&inventory, all).await?;
        let length = |missing: &Missing| missing.to.bytes_since(missing.from).unwrap_or(0);
        let total = missing.iter().map(length).sum();
        let (mut rebuilt, mut behind) = (Rebuilt::default(), 0);
        for range in &missing {
            done(behind, total);
            let runs = inventory.branches.get(&range.branch).map(|branch| branch.runs(size)).unwrap_or_default();
            let run = runs.iter().find(|run| run.from <= range.from && range.from < run.to);
            let to = run.map_or(range.to, |run| run.to);
            let stretch = Stretch { branch: range.branch, from: range.from, to };
            let made = self.index_from_wal(&inventory, &[stretch], (range.from, range.to), size).await?;
            behind += length(range);
            if let Some(lacks) = made.lacks {
                // Of the newest segment the next ones have the rest: it is not time for it.
                if !made.at_end {
                    rebuilt.left.push(format!("branch {}, {} to {}: {lacks}", range.branch, range.from, range.to));
                }
                continue;
            }
            let (bytes, note) = made.indexed;
            if !self.put_index(cluster, range.branch, &bytes, &note).await? && all {
                self.put_index_copy(cluster, range.branch, &bytes, &note).await?;
            }
            rebuilt.ranges += 1;
            rebuilt.wal_bytes += length(range);
            rebuilt.index_bytes += bytes.len() as u64;
            rebuilt.transactions += note.transactions;
        }
        done(behind, total);
        Ok(rebuilt)
    }
}

/// Cuts `[from, to)` into ranges, and leaves out what `ranges` (by position) cover.
fn not_covered(ranges: &[IndexRange], branch: Branch, from: Lsn, to: Lsn, size: SegmentSize) -> Vec<Missing> {
    let (mut at, mut missing) = (from, Vec::new());
    while at < to {
        if let Some(covering) =
            ranges.iter().filter(|range| range.from <= at && at < range.to).map(|range| range.to).max()
        {
            at = covering;
            continue;
        }
        let next = ranges.iter().map(|range| range.from).filter(|from| *from > at).min().unwrap_or(to);
        let end = next.min(to).min(range_end(at, size));
        missing.push(Missing { branch, from: at, to: end });
        at = end;
    }
    missing
}
