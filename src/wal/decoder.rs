//! From bytes to records, whatever the slices they come in.
//!
//! A record that lies on one page and in one slice is lent from that slice; only one that spans a page or a slice is
//! assembled, and only if it is wanted. What is kept between two slices is at most the unfinished record (as many bytes
//! of it as arrived, never as many as it claims) and the header of a page.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;

use super::error::WalDamage;
use super::page::{LONG_HEADER, PAGE_SIZE, PageChecker, PageHeader, header_len, u32_at, u64_at};
use super::record::{RECORD_HEADER, Record, rmgr};
use super::transaction::{OVERWRITE_CONTRECORD, SWITCH};
use super::version::WalFormat;
use crate::types::{Lsn, SegmentSize, SystemId, TimelineId};

/// Room for an assembled record that is kept for the next one; a larger one is given back.
const KEPT_ROOM: usize = 1 << 20;

/// Reads records from WAL that is pushed in slices of any size.
///
/// The first record is the first one that *begins* at or after the starting point; what a record from before left there
/// is passed over. After damage every further call repeats the same error.
#[derive(Debug)]
pub struct Decoder {
    walker: Walker,
    front: Bytes,
    used: usize,
    waiting: VecDeque<Bytes>,
    failed: Option<WalDamage>,
}

impl Decoder {
    /// Reads from `at` on, which must be the start of a page (a segment's start is one).
    pub fn new(at: Lsn, size: SegmentSize) -> Decoder {
        let misplaced = !at.get().is_multiple_of(PAGE_SIZE);
        Decoder {
            walker: Walker::new(at, size),
            front: Bytes::new(),
            used: 0,
            waiting: VecDeque::new(),
            failed: misplaced.then_some(WalDamage::NotAPageStart { at }),
        }
    }

    /// Pages must be of this cluster, and of this timeline or an ancestor of it.
    #[must_use]
    pub fn expecting(mut self, system: Option<SystemId>, timeline: Option<TimelineId>) -> Decoder {
        self.walker.pages = PageChecker::new(self.walker.pages.size, system, timeline);
        self
    }

    /// Hands out only records for which `wanted(rmgr, info)`; the others are checked and passed over without being
    /// assembled. With [`super::may_be_fact`] memory stays flat whatever the records' size.
    #[must_use]
    pub fn only(mut self, wanted: fn(u8, u8) -> bool) -> Decoder {
        self.walker.wanted = wanted;
        self
    }

    /// The next bytes of WAL. They are kept, not copied, until [`Decoder::next`] has gone through them: call it
    /// until it returns `None` before pushing more.
    pub fn push(&mut self, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        if !bytes.is_empty() {
            self.waiting.push_back(bytes);
        }
    }

    /// The next whole record; `None` when more bytes are needed, or when the WAL has ended ([`Decoder::ended_at`]).
    #[allow(clippy::should_implement_trait)] // it lends: an `Iterator` cannot
    pub fn next(&mut self) -> Result<Option<Record<'_>>, WalDamage> {
        if let Some(damage) = &self.failed {
            return Err(damage.clone());
        }
        let found = loop {
            if self.used >= self.front.len() {
                self.used = 0;
                self.front = self.waiting.pop_front().unwrap_or_default();
                if self.front.is_empty() {
                    return Ok(None);
                }
            }
            match self.walker.step(&self.front, &mut self.used) {
                Ok(Some(found)) => break found,
                Ok(None) => {}
                Err(damage) => {
                    self.failed = Some(damage.clone());
                    (self.front, self.waiting) = (Bytes::new(), VecDeque::new());
                    return Err(damage);
                }
            }
        };
        Ok(Some(self.walker.lend(found, &self.front)))
    }

    /// The position after the last byte that was gone through.
    pub fn position(&self) -> Lsn {
        self.walker.at
    }

    /// End of the last whole record, aligned as the next one's start; the starting point before there is one. After a
    /// switch it is the start of the next segment.
    pub fn end_of_last_record(&self) -> Lsn {
        self.walker.last_end
    }

    /// Start of the last whole record, handed out or passed over; `None` while none has begun since the starting point.
    pub fn start_of_last_record(&self) -> Option<Lsn> {
        self.walker.last_start
    }

    /// Whether a record has begun (perhaps before the starting point) and not ended.
    pub fn inside_record(&self) -> bool {
        self.walker.inside_record()
    }

    /// Where zeros begin that no record or page can begin with: the end of what was written. Only zeros may follow, so that
    /// a hole in an archive is damage and no end. (A server's own open segment may hold anything behind its end: recycled
    /// pages, or in a timeline's first segment copies of the fork's page. Push no more than its valid bytes.)
    pub fn ended_at(&self) -> Option<Lsn> {
        self.walker.ended_at()
    }

    /// The version that wrote this WAL, once a page was seen.
    pub fn format(&self) -> Option<&'static WalFormat> {
        self.walker.pages.format()
    }

    /// The cluster that wrote this WAL, once a segment's first page was seen.
    pub fn system(&self) -> Option<SystemId> {
        self.walker.pages.system()
    }

    /// The timeline of the newest page.
    pub fn timeline(&self) -> Option<TimelineId> {
        self.walker.pages.timeline()
    }
}

/// What the next byte belongs to, where it is not a page's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing is known: the first page's header will tell.
    Start,
    /// The end of a record that began before the starting point.
    Continuation { left: u32 },
    /// A record may begin here.
    Between,
    /// In `Walker::partial`.
    InRecord,
    /// Padding, or what follows a switch. Page headers in it mean nothing.
    Skip { until: Lsn },
    /// Zeros, to the end of all bytes.
    Ended { at: Lsn },
}

/// A record that did not lie whole in one page of one slice.
#[derive(Debug, Default)]
struct Partial {
    start: Lsn,
    header: [u8; RECORD_HEADER],
    /// Bytes that arrived, the header's included.
    have: u32,
    /// Its length as its header says; 0 while that has not arrived.
    total: u32,
    /// CRC-32C of the body so far.
    crc: u32,
    /// Whether `body` is kept.
    keep: bool,
    body: Vec<u8>,
}

/// A record whose end was found.
#[derive(Debug)]
pub(super) struct Found {
    head: Head,
    end: Lsn,
    body: Body,
}

#[derive(Debug)]
enum Body {
    /// In the slice that was given to the step.
    Slice(Range<usize>),
    Assembled,
}

/// A record's header, checked.
#[derive(Debug, Clone, Copy)]
struct Head {
    start: Lsn,
    total: u32,
    xid: u32,
    prev: Lsn,
    info: u8,
    rmgr: u8,
    crc: u32,
    format: &'static WalFormat,
}

impl Head {
    fn is_xlog(&self, kind: u8) -> bool {
        self.rmgr == rmgr::XLOG && self.info & 0xF0 == kind
    }
}

/// The state machine under [`Decoder`], over borrowed slices.
#[derive(Debug)]
pub(super) struct Walker {
    pub pages: PageChecker,
    pub wanted: fn(u8, u8) -> bool,
    /// Zeros where a record or page should begin are damage, and not the end of what was written.
    pub never_ends: bool,
    pub at: Lsn,
    phase: Phase,
    page_header: [u8; LONG_HEADER],
    partial: Partial,
    /// Start of the first whole record that began here.
    pub first_start: Option<Lsn>,
    pub last_start: Option<Lsn>,
    pub last_end: Lsn,
    /// The next record must say that it replaces an unfinished one: at this position, if we saw it begin.
    overwrites: Option<Option<Lsn>>,
}

impl Walker {
    pub fn new(at: Lsn, size: SegmentSize) -> Walker {
        Walker {
            pages: PageChecker::new(size, None, None),
            wanted: |_, _| true,
            never_ends: false,
            at,
            phase: Phase::Start,
            page_header: [0; LONG_HEADER],
            partial: Partial::default(),
            first_start: None,
            last_start: None,
            last_end: at,
            overwrites: None,
        }
    }

    pub fn inside_record(&self) -> bool {
        matches!(self.phase, Phase::InRecord | Phase::Continuation { .. })
    }

    /// Where what is broken begins, after a step that failed with `damage`: from there on nothing can be replayed.
    pub fn broken_from(&self, damage: &WalDamage, began: Lsn) -> Lsn {
        match self.phase {
            Phase::InRecord => self.partial.start.min(damage.at()),
            Phase::Continuation { .. } => began,
            Phase::Ended { at } => at,
            Phase::Start | Phase::Between | Phase::Skip { .. } => damage.at(),
        }
    }

    /// After a step that failed: the beginning of the page's header that was taken before, if it was the header that failed.
    /// `None` where it was something on the page behind its header.
    pub fn failed_header(&self) -> Option<&[u8]> {
        let in_page = (self.at.get() % PAGE_SIZE) as usize;
        let page = Lsn::new(self.at.get() - in_page as u64);
        match self.phase {
            _ if in_page == 0 => Some(&[]),
            Phase::Ended { .. } | Phase::Skip { .. } => None,
            _ if in_page < header_len(page, self.pages.size) => self.page_header.get(..in_page),
            _ => None,
        }
    }

    /// Where zeros begin that end the WAL.
    pub fn ended_at(&self) -> Option<Lsn> {
        match self.phase {
            Phase::Ended { at } => Some(at),
            _ => None,
        }
    }

    /// The record behind `found`; `slice` is the one that the step was given.
    pub fn lend<'a>(&'a self, found: Found, slice: &'a [u8]) -> Record<'a> {
        let Head { start, xid, prev, info, rmgr, format, .. } = found.head;
        let body = match found.body {
            Body::Slice(range) => slice.get(range).unwrap_or_default(),
            Body::Assembled => &self.partial.body,
        };
        Record { start, end: found.end, prev, xid, rmgr, info, format, body }
    }

    /// Goes on in `slice` from `*used` to the end of the next wanted record. `None`: the slice is used up.
    pub fn step(&mut self, slice: &[u8], used: &mut usize) -> Result<Option<Found>, WalDamage> {
        while let Some(rest) = slice.get(*used..).filter(|rest| !rest.is_empty()) {
            match self.phase {
                Phase::Ended { at } if self.never_ends => return Err(WalDamage::Zeros { at }),
                Phase::Ended { at } => {
                    if let Some(offset) = rest.iter().position(|byte| *byte != 0) {
                        self.advance(offset, used);
                        return Err(WalDamage::DataAfterZeros { zeros_at: at, at: self.at });
                    }
                    self.advance(rest.len(), used);
                    continue;
                }
                Phase::Skip { until } => {
                    let left = until.bytes_since(self.at).unwrap_or(0);
                    self.advance(left.min(rest.len() as u64) as usize, used);
                    if self.at >= until {
                        self.phase = Phase::Between;
                    }
                    continue;
                }
                Phase::Start | Phase::Continuation { .. } | Phase::Between | Phase::InRecord => {}
            }
            let in_page = (self.at.get() % PAGE_SIZE) as usize;
            // Every header is at least 24 bytes long; only up there is it worth asking whether this one is longer.
            if in_page < LONG_HEADER {
                let page = Lsn::new(self.at.get() - in_page as u64);
                let header_len = header_len(page, self.pages.size);
                if in_page < header_len {
                    self.take_page_header(page, header_len, rest, used)?;
                    continue;
                }
            }
            let room = rest.get(..PAGE_SIZE as usize - in_page).unwrap_or(rest);
            let found = match self.phase {
                Phase::Continuation { left } => {
                    self.pass_continuation(left, room, used);
                    None
                }
                Phase::InRecord => self.assemble(room, used)?,
                _ => self.begin(room, used)?,
            };
            if let Some(found) = found {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn advance(&mut self, bytes: usize, used: &mut usize) {
        self.at = self.at.advance(bytes as u64);
        *used += bytes;
    }

    /// Takes the header of a page, or as much of it as there is.
    fn take_page_header(
        &mut self,
        page: Lsn,
        header_len: usize,
        rest: &[u8],
        used: &mut usize,
    ) -> Result<(), WalDamage> {
        let have = (self.at.get() - page.get()) as usize;
        let taken = (header_len - have).min(rest.len());
        for (to, from) in self.page_header.iter_mut().skip(have).zip(rest.iter().take(taken)) {
            *to = *from;
        }
        if have + taken == header_len {
            let copy = self.page_header;
            let header = copy.get(..header_len).unwrap_or_default();
            if header.iter().all(|byte| *byte == 0) {
                // Zeros on the very first page may be what follows a switch, unless a segment begins with them.
                let segment_end = page.segment(self.pages.size).end(self.pages.size);
                let may_follow_a_switch = page.segment_offset(self.pages.size) != 0 && !self.never_ends;
                self.phase = if self.phase == Phase::Start && may_follow_a_switch {
                    Phase::Skip { until: segment_end }
                } else {
                    Phase::Ended { at: page }
                };
            } else {
                let header = self.pages.check(page, header)?;
                self.enter_page(page, header)?;
            }
        }
        self.advance(taken, used);
        Ok(())
    }

    /// Checks that the page goes on with what the page before left unfinished.
    fn enter_page(&mut self, page: Lsn, header: PageHeader) -> Result<(), WalDamage> {
        let missing = match self.phase {
            Phase::Continuation { left } => Some(left),
            Phase::InRecord => Some(self.partial.total.saturating_sub(self.partial.have)),
            Phase::Start | Phase::Between | Phase::Skip { .. } | Phase::Ended { .. } => None,
        };
        match (header.continues, missing) {
            (Some(left), _) if left > header.format.max_record => Err(WalDamage::PageHeader {
                at: page,
                what: "it continues a record that is longer than records can be",
            }),
            (Some(left), None) if self.phase == Phase::Start => {
                self.phase = Phase::Continuation { left };
                Ok(())
            }
            (Some(found), missing) if missing != Some(found) => Err(WalDamage::Continuation {
                at: page,
                expected: missing.map_or(0, u64::from),
                found: u64::from(found),
            }),
            (Some(_), _) => Ok(()),
            (None, None) if !header.overwrites || self.phase == Phase::Start => {
                self.overwrites = header.overwrites.then_some(None);
                self.phase = Phase::Between;
                Ok(())
            }
            (None, None) => {
                Err(WalDamage::PageHeader { at: page, what: "it abandons a record, but none is unfinished before it" })
            }
            (None, Some(_)) if header.overwrites => {
                self.overwrites = Some((self.phase == Phase::InRecord).then_some(self.partial.start));
                self.phase = Phase::Between;
                Ok(())
            }
            (None, Some(missing)) => Err(WalDamage::Continuation { at: page, expected: u64::from(missing), found: 0 }),
        }
    }

    fn pass_continuation(&mut self, left: u32, room: &[u8], used: &mut usize) {
        let taken = (left as usize).min(room.len());
        self.advance(taken, used);
        let left = left - taken as u32; // invariant: taken <= left
        self.phase = Phase::Continuation { left };
        if left == 0 {
            self.last_end = aligned(self.at);
            self.phase = Phase::Skip { until: self.last_end };
            if self.at == self.last_end {
                self.phase = Phase::Between;
            }
        }
    }

    /// At the start of a record. `room` is what is there of this page.
    fn begin(&mut self, room: &[u8], used: &mut usize) -> Result<Option<Found>, WalDamage> {
        let total = u32_at(room, 0).unwrap_or(0);
        if room.len() >= RECORD_HEADER && total as usize <= room.len() && total != 0 {
            let head = self.head(self.at, room)?;
            let total = head.total as usize;
            let body = room.get(RECORD_HEADER..total).unwrap_or_default();
            if head.crc != checksum(crc32c::crc32c(body), room) {
                return Err(WalDamage::Checksum { at: head.start });
            }
            let range = *used + RECORD_HEADER..*used + total;
            self.advance(total, used);
            return self.complete(head, Body::Slice(range), body);
        }
        let mut body = std::mem::take(&mut self.partial.body);
        body.clear();
        body.shrink_to(KEPT_ROOM);
        self.partial = Partial { start: self.at, body, ..Partial::default() };
        self.phase = Phase::InRecord;
        self.assemble(room, used)
    }

    /// Inside `self.partial`. `room` is what is there of this page.
    fn assemble(&mut self, room: &[u8], used: &mut usize) -> Result<Option<Found>, WalDamage> {
        let partial = &mut self.partial;
        let have = partial.have as usize;
        if have < RECORD_HEADER {
            let taken = (RECORD_HEADER - have).min(room.len());
            for (to, from) in partial.header.iter_mut().skip(have).zip(room.iter().take(taken)) {
                *to = *from;
            }
            partial.have += taken as u32;
            let start = partial.start;
            if have < 4 && partial.have >= 4 {
                partial.total = u32_at(&partial.header, 0).unwrap_or(0);
                let total = partial.total;
                if total == 0 {
                    self.phase = Phase::Ended { at: start };
                    // What arrived of this "header" is looked at again as what follows the end.
                    if let Some(offset) = self.partial.header.iter().take(have + taken).position(|byte| *byte != 0) {
                        return Err(WalDamage::DataAfterZeros { zeros_at: start, at: start.advance(offset as u64) });
                    }
                } else {
                    self.check_total(start, total)?;
                }
            }
            if self.phase == Phase::InRecord && self.partial.have as usize == RECORD_HEADER {
                let header = self.partial.header;
                let head = self.head(start, &header)?;
                self.partial.keep = (self.wanted)(head.rmgr, head.info) || self.overwrites.is_some();
            }
            self.advance(taken, used);
        } else {
            let left = partial.total.saturating_sub(partial.have) as usize;
            let taken = room.get(..left).unwrap_or(room);
            partial.crc = crc32c::crc32c_append(partial.crc, taken);
            if partial.keep {
                partial.body.extend_from_slice(taken);
            }
            partial.have += taken.len() as u32;
            let taken = taken.len();
            self.advance(taken, used);
        }
        if self.phase != Phase::InRecord || self.partial.have < self.partial.total.max(RECORD_HEADER as u32) {
            return Ok(None);
        }
        let header = self.partial.header;
        let head = self.head(self.partial.start, &header)?;
        if head.crc != checksum(self.partial.crc, &header) {
            return Err(WalDamage::Checksum { at: head.start });
        }
        let body = std::mem::take(&mut self.partial.body);
        let found = self.complete(head, Body::Assembled, &body);
        self.partial.body = body;
        found
    }

    fn check_total(&self, at: Lsn, total: u32) -> Result<(), WalDamage> {
        if (total as usize) < RECORD_HEADER {
            return Err(WalDamage::RecordHeader { at, what: "its length is shorter than its header" });
        }
        if self.pages.format().is_none_or(|format| total > format.max_record) {
            return Err(WalDamage::RecordHeader { at, what: "its length is more than records can have" });
        }
        Ok(())
    }

    /// Reads and checks a record's header: `bytes` are at least that.
    fn head(&self, start: Lsn, bytes: &[u8]) -> Result<Head, WalDamage> {
        let fault = |what| WalDamage::RecordHeader { at: start, what };
        let header: &[u8; RECORD_HEADER] = bytes.first_chunk().ok_or_else(|| fault("its header is cut off"))?;
        let format = self.pages.format().ok_or_else(|| fault("it lies on no page"))?;
        let total = u32_at(header, 0).unwrap_or(0);
        let xid = u32_at(header, 4).unwrap_or(0);
        let prev = Lsn::new(u64_at(header, 8).unwrap_or(0));
        let crc = u32_at(header, 20).unwrap_or(0);
        let [.., info, rmgr, _, _, _, _, _, _] = *header;
        self.check_total(start, total)?;
        if rmgr > rmgr::LAST_BUILTIN && !(format.custom_rmgrs && rmgr >= rmgr::FIRST_CUSTOM) {
            return Err(fault("its resource manager is unknown"));
        }
        match self.last_start {
            Some(expected) if expected != prev => return Err(WalDamage::PrevLink { at: start, expected, found: prev }),
            None if prev >= start => return Err(fault("it says that it follows a later record")),
            _ => {}
        }
        let head = Head { start, total, xid, prev, info, rmgr, crc, format };
        if head.is_xlog(SWITCH) && total as usize != RECORD_HEADER {
            return Err(fault("a switch has no content, this one has"));
        }
        Ok(head)
    }

    /// A record ended at `self.at`; its checksum is right.
    fn complete(&mut self, head: Head, body: Body, bytes: &[u8]) -> Result<Option<Found>, WalDamage> {
        if let Some(dropped) = self.overwrites.take() {
            self.check_overwrite(head, bytes, dropped)?;
        }
        let mut end = aligned(self.at);
        if head.is_xlog(SWITCH) && end.segment_offset(self.pages.size) != 0 {
            end = end.segment(self.pages.size).end(self.pages.size);
        }
        self.first_start.get_or_insert(head.start);
        (self.last_start, self.last_end) = (Some(head.start), end);
        self.phase = if self.at < end { Phase::Skip { until: end } } else { Phase::Between };
        Ok((self.wanted)(head.rmgr, head.info).then_some(Found { head, end, body }))
    }

    /// The first record after an abandoned one must say so, and name it.
    fn check_overwrite(&self, head: Head, body: &[u8], dropped: Option<Lsn>) -> Result<(), WalDamage> {
        let Head { start, xid, prev, info, rmgr, format, .. } = head;
        if !head.is_xlog(OVERWRITE_CONTRECORD) {
            return Err(WalDamage::RecordHeader {
                at: start,
                what: "it should say which unfinished record it replaces",
            });
        }
        let record = Record { start, end: self.at, prev, xid, rmgr, info, format, body };
        let data = record.main_data()?;
        let found =
            u64_at(data, 0).map(Lsn::new).ok_or(WalDamage::Content { at: start, what: "its data is too short" })?;
        match dropped {
            Some(expected) if expected != found => Err(WalDamage::Overwrite { at: start, expected, found }),
            _ => Ok(()),
        }
    }
}

/// CRC-32C of a record: its body first, then its header up to the checksum itself.
fn checksum(crc_of_body: u32, header: &[u8]) -> u32 {
    crc32c::crc32c_append(crc_of_body, header.get(..20).unwrap_or_default())
}

/// Records begin at multiples of eight bytes.
fn aligned(lsn: Lsn) -> Lsn {
    Lsn::new(lsn.get().saturating_add(7) & !7)
}
