//! Page headers: read, checked, and watched as a stream of WAL passes.

use super::error::WalDamage;
use super::version::{WalFormat, format_of_magic};
use crate::types::{Lsn, SegmentSize, SystemId, TimelineId};

/// Bytes of a WAL page (`XLOG_BLCKSZ` as everybody builds it).
pub const PAGE_SIZE: u64 = 8192;

/// Bytes of a page's header, and of the header of a segment's first page.
pub(super) const SHORT_HEADER: usize = 24;
pub(super) const LONG_HEADER: usize = 40;

const FIRST_IS_CONTRECORD: u16 = 0x1;
const LONG: u16 = 0x2;
const BKP_REMOVABLE: u16 = 0x4;
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x8;

/// Bytes of the header of the page at `page`.
pub(super) fn header_len(page: Lsn, size: SegmentSize) -> usize {
    if page.segment_offset(size) == 0 { LONG_HEADER } else { SHORT_HEADER }
}

/// What the header of one page says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// The major version that wrote the page.
    pub format: &'static WalFormat,
    /// The timeline on which it was written: that of the segment's file or an ancestor's.
    pub timeline: TimelineId,
    /// Bytes of a record from earlier pages that this page goes on with; `None` if it begins with a record of its own.
    pub continues: Option<u32>,
    /// The record that did not end on the page before was abandoned after a crash; this page begins with the record that
    /// says so.
    pub overwrites: bool,
    /// The cluster, on the first page of a segment.
    pub system: Option<SystemId>,
}

/// Little-endian integers at fixed offsets; `None` beyond the end.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Checks headers one after the other: what they say alone, and that they fit those before.
#[derive(Debug, Clone)]
pub(super) struct PageChecker {
    pub size: SegmentSize,
    system: Option<SystemId>,
    /// The newest timeline that pages may be of.
    newest: Option<TimelineId>,
    format: Option<&'static WalFormat>,
    timeline: Option<TimelineId>,
}

impl PageChecker {
    pub fn new(size: SegmentSize, system: Option<SystemId>, newest: Option<TimelineId>) -> PageChecker {
        PageChecker { size, system, newest, format: None, timeline: None }
    }

    pub fn format(&self) -> Option<&'static WalFormat> {
        self.format
    }

    pub fn system(&self) -> Option<SystemId> {
        self.system
    }

    pub fn timeline(&self) -> Option<TimelineId> {
        self.timeline
    }

    /// Checks the header of the page at `at`; `bytes` are at least the page's [`header_len`].
    pub fn check(&mut self, at: Lsn, bytes: &[u8]) -> Result<PageHeader, WalDamage> {
        let short = || WalDamage::PageHeader { at, what: "its header is cut off" };
        let fault = |what| WalDamage::PageHeader { at, what };
        let magic = u16_at(bytes, 0).ok_or_else(short)?;
        let info = u16_at(bytes, 2).ok_or_else(short)?;
        let timeline = u32_at(bytes, 4).ok_or_else(short)?;
        let address = Lsn::new(u64_at(bytes, 8).ok_or_else(short)?);
        let rem_len = u32_at(bytes, 16).ok_or_else(short)?;

        let format = format_of_magic(magic).ok_or(WalDamage::Magic { at, found: magic })?;
        if let Some(expected) = self.format.filter(|expected| expected.major != format.major) {
            return Err(WalDamage::OtherMajor { at, expected: expected.major, found: format.major });
        }
        if address != at {
            return Err(WalDamage::PageAddress { at, found: address });
        }
        if info & !(FIRST_IS_CONTRECORD | LONG | BKP_REMOVABLE | FIRST_IS_OVERWRITE_CONTRECORD) != 0 {
            return Err(fault("its header has flags that no PostgreSQL from 13 to 18 knows"));
        }
        let first_of_segment = at.segment_offset(self.size) == 0;
        if first_of_segment != (info & LONG != 0) {
            return Err(fault("a long header belongs on the first page of a segment and nowhere else"));
        }
        let continues = match (info & FIRST_IS_CONTRECORD != 0, rem_len) {
            (false, 0) => None,
            (true, 1..) => Some(rem_len),
            (true, 0) | (false, 1..) => {
                return Err(fault("its header does not say clearly whether it continues a record"));
            }
        };
        let overwrites = info & FIRST_IS_OVERWRITE_CONTRECORD != 0;
        if overwrites && continues.is_some() {
            return Err(fault("its header says both that it continues a record and that it abandons one"));
        }
        let timeline = TimelineId::new(timeline).ok_or_else(|| fault("its header has timeline 0"))?;
        if let Some(bound) = self.timeline.filter(|earlier| timeline < *earlier) {
            return Err(WalDamage::Timeline { at, found: timeline, bound, newer: false });
        }
        if let Some(bound) = self.newest.filter(|newest| timeline > *newest) {
            return Err(WalDamage::Timeline { at, found: timeline, bound, newer: true });
        }
        let mut system = None;
        if first_of_segment {
            let found = SystemId::new(u64_at(bytes, 24).ok_or_else(short)?);
            if let Some(expected) = self.system.filter(|expected| *expected != found) {
                return Err(WalDamage::System { at, expected, found });
            }
            let segment_size = u64::from(u32_at(bytes, 32).ok_or_else(short)?);
            if segment_size != self.size.bytes() {
                return Err(WalDamage::SegmentSize { at, expected: self.size.bytes(), found: segment_size });
            }
            if u64::from(u32_at(bytes, 36).ok_or_else(short)?) != PAGE_SIZE {
                return Err(fault("the server was built with WAL pages of another size than 8192 bytes"));
            }
            system = Some(found);
            self.system = system;
        }
        self.format = Some(format);
        self.timeline = Some(timeline);
        Ok(PageHeader { format, timeline, continues, overwrites, system })
    }
}

/// Is the page at `at` one that belongs there, in WAL of `timeline` or of its ancestors; or zeros?
///
/// # Errors
/// What is wrong with its header, among others that it is a page of another place.
pub fn check_page(at: Lsn, bytes: &[u8], size: SegmentSize, timeline: TimelineId) -> Result<(), WalDamage> {
    let header = bytes.get(..header_len(at, size)).unwrap_or(bytes);
    if !header.is_empty() && header.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    PageChecker::new(size, None, Some(timeline)).check(at, bytes).map(drop)
}

/// Checks every page header of a stream of WAL as it passes, without keeping the stream.
///
/// Cheap enough for every byte that is archived: it looks at 24 of 8192. What lies between the headers is not looked at, save
/// that a page whose header is zeros (the rest of a segment after a switch) must be zeros, to the end of its segment.
#[derive(Debug)]
pub struct PageWatch {
    checker: PageChecker,
    at: Lsn,
    header: [u8; LONG_HEADER],
    header_have: usize,
    zeros_from: Option<Lsn>,
}

impl PageWatch {
    /// Watches from `segment_start` on, the first byte of a segment. Pages may be of `timeline`, the segment's, or of an
    /// older one: the first segment of a timeline begins with its parent's pages. `system` is taken from the first
    /// page when it is not known.
    pub fn new(
        segment_start: Lsn,
        size: SegmentSize,
        system: Option<SystemId>,
        timeline: TimelineId,
    ) -> Result<PageWatch, WalDamage> {
        if segment_start.segment_offset(size) != 0 {
            return Err(WalDamage::NotAPageStart { at: segment_start });
        }
        let checker = PageChecker::new(size, system, Some(timeline));
        Ok(PageWatch { checker, at: segment_start, header: [0; LONG_HEADER], header_have: 0, zeros_from: None })
    }

    /// The next bytes. After an error the watch is of no more use.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), WalDamage> {
        while !bytes.is_empty() {
            let in_page = self.at.get() % PAGE_SIZE;
            let page = Lsn::new(self.at.get() - in_page);
            let header_len = header_len(page, self.checker.size);
            let taken = if (in_page as usize) < header_len {
                let wanted = header_len - self.header_have;
                let taken = wanted.min(bytes.len());
                for (to, from) in self.header.iter_mut().skip(self.header_have).zip(bytes.iter().take(taken)) {
                    *to = *from;
                }
                self.header_have += taken;
                if self.header_have == header_len {
                    self.header_have = 0;
                    self.check_page(page, header_len)?;
                }
                taken
            } else {
                let left = (PAGE_SIZE - in_page).min(bytes.len() as u64) as usize;
                if let Some(zeros_at) = self.zeros_from
                    && let Some(offset) = bytes.iter().take(left).position(|byte| *byte != 0)
                {
                    return Err(WalDamage::DataAfterZeros { zeros_at, at: self.at.advance(offset as u64) });
                }
                left
            };
            self.at = self.at.advance(taken as u64);
            bytes = bytes.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    fn check_page(&mut self, page: Lsn, header_len: usize) -> Result<(), WalDamage> {
        let first_of_segment = page.segment_offset(self.checker.size) == 0;
        if first_of_segment {
            self.zeros_from = None;
        }
        let header = self.header.get(..header_len).unwrap_or_default();
        let zeros = header.iter().all(|byte| *byte == 0);
        match self.zeros_from {
            Some(_) if zeros => Ok(()),
            Some(zeros_at) => Err(WalDamage::DataAfterZeros { zeros_at, at: page }),
            // A segment is never zeros from its first byte on: a switch at a segment's start changes nothing.
            None if zeros && !first_of_segment => {
                self.zeros_from = Some(page);
                Ok(())
            }
            None => self.checker.check(page, header).map(|_| ()),
        }
    }

    /// The position after the last byte pushed.
    pub fn position(&self) -> Lsn {
        self.at
    }

    /// The major version that wrote the pages, once one was seen.
    pub fn major(&self) -> Option<u32> {
        self.checker.format().map(|format| format.major)
    }

    /// The cluster that wrote the pages, once a segment's first page was seen.
    pub fn system(&self) -> Option<SystemId> {
        self.checker.system()
    }

    /// The timeline of the newest page.
    pub fn timeline(&self) -> Option<TimelineId> {
        self.checker.timeline()
    }

    /// Start of the first page of the current segment that is zeros: a switch or the end of what was written lies before it.
    pub fn zeros_from(&self) -> Option<Lsn> {
        self.zeros_from
    }
}
