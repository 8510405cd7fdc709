//! Builds valid WAL of any supported version, for tests.

use super::page::{LONG_HEADER, PAGE_SIZE, SHORT_HEADER};
use super::record::RECORD_HEADER;
use super::version::{WalFormat, format_of_major};
use crate::types::{Lsn, SegmentSize};

pub const SYSTEM: u64 = 7_312_345_678_901_234_567;

/// A record as it was built: what the decoder must find again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    pub start: Lsn,
    pub end: Lsn,
    pub prev: Lsn,
    pub xid: u32,
    pub rmgr: u8,
    pub info: u8,
    pub body: Vec<u8>,
}

pub struct WalBuilder {
    pub format: &'static WalFormat,
    pub size: SegmentSize,
    pub start: Lsn,
    pub timeline: u32,
    pub bytes: Vec<u8>,
    pub built: Vec<Built>,
    pub prev: Lsn,
}

/// Main data as a fragment.
pub fn main_fragment(data: &[u8]) -> Vec<u8> {
    let mut body = match u8::try_from(data.len()) {
        Ok(len) => vec![255, len],
        Err(_) => [&[254][..], &(data.len() as u32).to_le_bytes()].concat(),
    };
    body.extend_from_slice(data);
    body
}

/// A record's bytes without padding.
pub fn record_bytes(prev: Lsn, xid: u32, rmgr: u8, info: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(RECORD_HEADER + body.len());
    bytes.extend(((RECORD_HEADER + body.len()) as u32).to_le_bytes());
    bytes.extend(xid.to_le_bytes());
    bytes.extend(prev.get().to_le_bytes());
    bytes.extend([info, rmgr, 0, 0]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(body), &bytes);
    bytes.extend(crc.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

impl WalBuilder {
    /// Begins at `start`, the start of a page.
    pub fn new(major: u32, size: SegmentSize, start: Lsn) -> WalBuilder {
        let format = format_of_major(major).unwrap();
        assert!(start.get().is_multiple_of(PAGE_SIZE));
        WalBuilder { format, size, start, timeline: 1, bytes: Vec::new(), built: Vec::new(), prev: Lsn::new(0x28) }
    }

    pub fn at(&self) -> Lsn {
        self.start.advance(self.bytes.len() as u64)
    }

    /// The header of the page at the current position.
    fn page_header(&mut self, rem_len: u32, info: u16) {
        let at = self.at();
        let long = at.segment_offset(self.size) == 0;
        let info = info | u16::from(rem_len > 0) | if long { 2 } else { 0 };
        self.bytes.extend(self.format.magic.to_le_bytes());
        self.bytes.extend(info.to_le_bytes());
        self.bytes.extend(self.timeline.to_le_bytes());
        self.bytes.extend(at.get().to_le_bytes());
        self.bytes.extend(rem_len.to_le_bytes());
        self.bytes.extend([0; 4]);
        if long {
            self.bytes.extend(SYSTEM.to_le_bytes());
            self.bytes.extend((self.size.bytes() as u32).to_le_bytes());
            self.bytes.extend((PAGE_SIZE as u32).to_le_bytes());
        }
    }

    fn page_left(&self) -> usize {
        (PAGE_SIZE - self.at().get() % PAGE_SIZE) as usize
    }

    fn on_page_start(&self) -> bool {
        self.at().get().is_multiple_of(PAGE_SIZE)
    }

    /// Writes `bytes` with page headers where they fall; stops after `pages` pages were begun.
    fn write(&mut self, mut bytes: &[u8], mut pages: usize) {
        while !bytes.is_empty() {
            if self.on_page_start() {
                if pages == 0 {
                    return;
                }
                pages -= 1;
                self.page_header(bytes.len() as u32, 0);
            }
            let (now, later) = bytes.split_at(bytes.len().min(self.page_left()));
            self.bytes.extend_from_slice(now);
            bytes = later;
        }
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    /// Appends a record; returns its start.
    pub fn record(&mut self, rmgr: u8, info: u8, xid: u32, body: &[u8]) -> Lsn {
        self.record_with(rmgr, info, xid, body, 0)
    }

    fn record_with(&mut self, rmgr: u8, info: u8, xid: u32, body: &[u8], page_info: u16) -> Lsn {
        if self.on_page_start() {
            self.page_header(0, page_info);
        }
        let (start, prev) = (self.at(), self.prev);
        self.write(&record_bytes(prev, xid, rmgr, info, body), usize::MAX);
        self.pad();
        self.prev = start;
        let end = self.at();
        self.built.push(Built { start, end, prev, xid, rmgr, info, body: body.to_vec() });
        start
    }

    /// Appends XLOG_SWITCH and the zeros to the segment's end.
    pub fn switch(&mut self) -> Lsn {
        let start = self.record(0, 0x40, 0, &[]);
        let size = self.size.bytes() as usize;
        // The builder may begin within a segment: count from the segment's start.
        let offset = self.at().segment_offset(self.size) as usize;
        if offset > 0 {
            self.bytes.resize(self.bytes.len() + size - offset, 0);
        }
        let end = self.at();
        self.built.last_mut().unwrap().end = end;
        start
    }

    /// Begins a record that a crash cuts off `pages` pages later (at least where its first page ends), then what
    /// PostgreSQL writes instead. `claimed` is what that says it replaces; `None`: the truth.
    pub fn overwritten(&mut self, body: &[u8], pages: usize, claimed: Option<Lsn>) {
        if self.on_page_start() {
            self.page_header(0, 0);
        }
        let start = self.at();
        self.write(&record_bytes(self.prev, 7, 10, 0, body), pages);
        assert!(self.on_page_start(), "the record ended before it could be cut off");
        let mut data = claimed.unwrap_or(start).get().to_le_bytes().to_vec();
        data.extend(5i64.to_le_bytes());
        self.record_with(0, 0xD0, 0, &main_fragment(&data), 0x8);
    }
}

#[test]
fn headers_have_their_lengths() {
    let size = SegmentSize::new(1 << 20).unwrap();
    let mut wal = WalBuilder::new(15, size, Lsn::new(3 << 20));
    wal.record(10, 0, 7, &[1; 100]);
    assert_eq!(wal.built.first().unwrap().start, Lsn::new((3 << 20) + LONG_HEADER as u64));
    wal.record(10, 0, 7, &[1; 10_000]);
    assert_eq!(wal.bytes.len(), (LONG_HEADER + 128 + SHORT_HEADER + 10_024).next_multiple_of(8));
}
