//! The WAL that the simulated server writes: valid, and known to the last byte, timeline by timeline.

use std::sync::OnceLock;

use crate::store::faulty::Random;
use crate::types::{HistoryEntry, Lsn, SegmentSize, TimelineHistory, TimelineId};
use crate::wal::builder::{WalBuilder, main_fragment};

/// The segments' size: the smallest there is.
pub const SIZE: u64 = 1 << 20;

/// Bytes of which records are made, each time behind another number. A copy of that length is what lz4 does best; bytes that
/// do not shrink would be left to AES, which without optimisation takes most of the time.
const NOISE: u64 = 4096;

fn noise() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let mut random = Random::new(0);
        (0..NOISE / 8).flat_map(|_| random.next().to_le_bytes()).collect()
    })
}

pub fn size() -> SegmentSize {
    SegmentSize::new(SIZE).unwrap()
}

/// One timeline, from the first byte of the world on: before the fork it is what its parent is.
pub struct Timeline {
    pub history: TimelineHistory,
    wal: WalBuilder,
    /// Begin and end of each record.
    records: Vec<(Lsn, Lsn)>,
}

impl Timeline {
    /// The first one; its WAL begins at `start`, the start of a segment.
    pub fn first(start: Lsn) -> Timeline {
        let history = TimelineHistory::root(TimelineId::FIRST);
        Timeline { history, wal: WalBuilder::new(17, size(), start), records: Vec::new() }
    }

    /// A child that leaves this one behind the record that ends at `fork`.
    pub fn fork(&self, fork: Lsn, child: TimelineId) -> Timeline {
        let records: Vec<_> = self.records.iter().copied().filter(|(_, end)| *end <= fork).collect();
        let WalBuilder { format, size, start, .. } = self.wal;
        let bytes = self.wal.bytes[..(fork.get() - start.get()) as usize].to_vec();
        let prev = records.last().map_or(Lsn::new(0x28), |record| record.0);
        let wal = WalBuilder { format, size, start, timeline: child.get(), bytes, built: Vec::new(), prev };
        let mut ancestors: Vec<HistoryEntry> = self.history.ancestors().to_vec();
        ancestors.push(HistoryEntry {
            timeline: self.history.timeline(),
            left_at: fork,
            reason: "no recovery target specified".to_owned(),
        });
        let text: String =
            ancestors.iter().map(|e| format!("{}\t{}\t{}\n", e.timeline.get(), e.left_at, e.reason)).collect();
        let history = TimelineHistory::parse(child, text.as_bytes()).unwrap();
        Timeline { history, wal, records }
    }

    /// The end of what is written: of the last record.
    pub fn end(&self) -> Lsn {
        self.wal.at()
    }

    /// The bytes `[from, to)`, cut where it ends.
    pub fn bytes(&self, from: Lsn, to: Lsn) -> &[u8] {
        let offset = |lsn: Lsn| (lsn.get().saturating_sub(self.wal.start.get()) as usize).min(self.wal.bytes.len());
        &self.wal.bytes[offset(from)..offset(to)]
    }

    /// An end of a record, of the last `among`, by chance.
    pub fn some_end(&self, random: &mut Random, among: usize) -> Option<Lsn> {
        let back = random.below(among.min(self.records.len()) as u64) as usize;
        self.records.iter().rev().nth(back).map(|(_, end)| *end)
    }

    /// A record of so many bytes.
    fn record(&mut self, random: &mut Random, bytes: u64) {
        let mut data = Vec::with_capacity(bytes as usize);
        while (data.len() as u64) < bytes {
            let left = bytes as usize - data.len();
            data.extend(random.next().to_le_bytes());
            data.extend_from_slice(&noise()[..left.min(NOISE as usize)]);
        }
        let body = main_fragment(&data);
        let start = self.wal.record(0, 0x20, 0, &body);
        self.records.push((start, self.wal.at()));
        self.wal.built.clear();
    }

    /// A small record.
    pub fn write_little(&mut self, random: &mut Random) {
        let bytes = 20 + random.below(400);
        self.record(random, bytes);
    }

    /// What a moment brings: mostly little, sometimes much, rarely the end of the segment.
    pub fn write(&mut self, random: &mut Random) {
        match random.below(100) {
            0..55 => (0..=random.below(3)).for_each(|_| {
                let bytes = 20 + random.below(400);
                self.record(random, bytes);
            }),
            55..80 => {
                let bytes = 2_000 + random.below(40_000);
                self.record(random, bytes);
            }
            80..94 => {
                let bytes = 40_000 + random.below(300_000);
                self.record(random, bytes);
            }
            _ => {
                let start = self.wal.switch();
                self.records.push((start, self.wal.at()));
                self.wal.built.clear();
            }
        }
    }
}
