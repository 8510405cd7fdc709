//! Whether WAL that passes is sound, and where it is not. Pure.
//!
//! What always holds: a stretch that is not told of was checked to the last byte that can be: every page header, every
//! record's header, length, link to the one before and CRC-32C (save a record that began before the first byte: only its pages
//! are). What is told of begins where recovery would stop. After damage, reading begins anew with the next page, and counts
//! again from the first whole record with a right checksum.
//! What a server writes and no damage is: the zeros behind a switch, a record that a crash left unfinished and the page
//! that says so, pages of the parent in a timeline's first segment, a last record that is not whole yet.
//!
//! Memory: a page's header; the bytes are borrowed and records are not assembled.

use std::collections::VecDeque;

use super::decoder::Walker;
use super::error::WalDamage;
use super::page::{PAGE_SIZE, PageChecker};
use crate::types::{Lsn, SegmentSize, SystemId, TimelineId};

/// WAL that recovery cannot pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsound {
    /// First byte of what cannot be replayed: the start of a record or page.
    pub from: Lsn,
    /// First byte that may be sound again. What follows is told of later, if it is not.
    pub to: Lsn,
    /// What is wrong at its beginning.
    pub damage: WalDamage,
    /// It was told of before, and was found to reach further than that: `from` is what was `to`.
    pub goes_on: bool,
}

/// See the module.
#[derive(Debug)]
pub struct WalAudit {
    size: SegmentSize,
    system: Option<SystemId>,
    timeline: TimelineId,
    may_end: bool,
    walker: Walker,
    /// Where the walker began.
    began: Lsn,
    at: Lsn,
    /// Bytes before it are not looked at.
    resume: Lsn,
    /// What is wrong, and up to where that was told; until a record is whole again.
    lost: Option<(WalDamage, Lsn)>,
    found: VecDeque<Unsound>,
}

impl WalAudit {
    /// Looks at everything from `at` on, the start of a page. Pages may be of `timeline`, which their segments are named after,
    /// or of an older one; `system` is taken from the first page where it is not known.
    ///
    /// # Errors
    /// [`WalDamage::NotAPageStart`].
    pub fn new(
        at: Lsn,
        size: SegmentSize,
        system: Option<SystemId>,
        timeline: TimelineId,
    ) -> Result<WalAudit, WalDamage> {
        if !at.get().is_multiple_of(PAGE_SIZE) {
            return Err(WalDamage::NotAPageStart { at });
        }
        let (walker, found) = (Walker::new(at, size), VecDeque::new());
        let may_end = false;
        let mut audit =
            WalAudit { size, system, timeline, may_end, walker, began: at, at, resume: at, lost: None, found };
        audit.begin(at);
        Ok(audit)
    }

    /// For a file, which may hold the end of what was written: zeros up to its end are no damage
    /// ([`WalAudit::ended_at`]).
    #[must_use]
    pub fn that_may_end(mut self) -> WalAudit {
        self.may_end = true;
        self.begin(self.at);
        self
    }

    fn begin(&mut self, page: Lsn) {
        let mut walker = Walker::new(page, self.size);
        walker.pages = PageChecker::new(self.size, self.system, Some(self.timeline));
        walker.wanted = |_, _| false;
        // Behind damage nothing tells a switch, after which zeros are what should be there.
        walker.never_ends = !self.may_end || self.lost.is_some();
        (self.walker, self.began) = (walker, page);
    }

    /// The next bytes. What is found is taken with [`WalAudit::take`].
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.at < self.resume {
                let skipped = self.resume.bytes_since(self.at).unwrap_or(0).min(bytes.len() as u64);
                self.at = self.at.advance(skipped);
                bytes = bytes.get(skipped as usize..).unwrap_or_default(); // invariant: skipped <= bytes.len()
                if self.at == self.resume {
                    self.begin(self.at);
                }
                continue;
            }
            let mut used = 0;
            let step = self.walker.step(bytes, &mut used);
            self.at = self.at.advance(used as u64);
            bytes = bytes.get(used..).unwrap_or_default();
            self.trust_again();
            match step {
                // The end of a file, met in the same step as the record that ended what was lost.
                Err(WalDamage::Zeros { .. }) if !self.walker.never_ends => {}
                Err(damage) => self.fail(damage),
                Ok(_) => {}
            }
        }
    }

    /// A whole record ends what was lost.
    fn trust_again(&mut self) {
        let Some(from) = self.walker.first_start else { return };
        let Some((damage, told)) = self.lost.take() else { return };
        if told < from {
            self.found.push_back(Unsound { from: told, to: from, damage, goes_on: true });
        }
        // From here on the end may come again.
        self.walker.never_ends = !self.may_end;
    }

    fn fail(&mut self, damage: WalDamage) {
        let from = self.walker.broken_from(&damage, self.began);
        let page = Lsn::new(self.at.get() - self.at.get() % PAGE_SIZE);
        let next = page.advance(PAGE_SIZE);
        // A page that does not go on with what was before may well be sound, and what was before was not.
        let header = self.walker.failed_header().filter(|_| self.began != page).map(<[u8]>::to_vec);
        if self.lost.is_none() {
            let to = if header.is_some() && from < page { page } else { next };
            self.found.push_back(Unsound { from, to, damage: damage.clone(), goes_on: false });
            self.lost = Some((damage, to));
        }
        match header {
            Some(header) => {
                self.begin(page);
                // The part of a header: nothing is decided before it is whole.
                let _ = self.walker.step(&header, &mut 0);
            }
            None => self.resume = next,
        }
    }

    /// What was found and not taken yet, in order of position.
    pub fn take(&mut self) -> Option<Unsound> {
        self.found.pop_front()
    }

    /// The position after the last byte pushed.
    pub fn position(&self) -> Lsn {
        self.at
    }

    /// What is wrong, while no whole record has followed it.
    pub fn is_lost(&self) -> Option<&WalDamage> {
        self.lost.as_ref().map(|(damage, _)| damage)
    }

    /// Where zeros begin that end the WAL, of a file that may hold its end.
    pub fn ended_at(&self) -> Option<Lsn> {
        self.walker.ended_at()
    }
}
