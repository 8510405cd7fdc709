//! What `wal fetch` opens ahead of recovery: which segments, how many, and what a request gets of them. Pure.
//!
//! What always holds: only whole segments are staged, which never change any more. The open segment, history files and what
//! is not there are asked for anew each time. A request is answered from the shelf only with what was opened for its very
//! timeline and number, on the way this shelf was made for; what lies outside of the window behind the last request goes.
//! An opening that came to nothing is forgotten: the request itself finds out why, by the rules of `wal fetch`.
//! Bounds: [`Bounds`]; a shelf never holds or opens more.

use std::collections::BTreeMap;

use super::Way;
use crate::types::{SegmentNumber, SegmentSize, TimelineId};

/// How much is opened ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// So many segments at most,
    pub segments: u64,
    /// and so many bytes. Segments too large for it are not opened ahead.
    pub bytes: u64,
    /// So many are opened at a time; each takes its size of memory.
    pub at_once: usize,
    /// So many bytes are left to the server on pg_wal's file system.
    pub leave_free: u64,
}

impl Bounds {
    /// 16 segments of the usual size, two at a time: on two processors more gain nothing.
    pub const USUAL: Bounds = Bounds { segments: 16, bytes: 256 << 20, at_once: 2, leave_free: 512 << 20 };

    /// How many segments behind the last one that was asked for.
    fn window(self, size: SegmentSize) -> usize {
        usize::try_from(self.segments.min(self.bytes / size.bytes())).unwrap_or(usize::MAX)
    }
}

/// A segment as a server asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wanted {
    /// The timeline in its name.
    pub timeline: TimelineId,
    /// Its number.
    pub segment: SegmentNumber,
}

/// What recovery asks for after `asked`; `None` where the way ends, or nobody knows it. The segment in which the way ends is
/// not named: it is served cut, anew each time.
pub fn follows(way: &Way, size: SegmentSize, asked: Wanted) -> Option<Wanted> {
    let segment = asked.segment.next();
    if way.until.is_some_and(|until| until < segment.end(size)) {
        return None;
    }
    if way.path.is_empty() {
        return Some(Wanted { segment, ..asked }); // where a server changes timelines by itself, it says so by asking
    }
    let at = way.path.iter().position(|step| step.branch.timeline == asked.timeline)?;
    // The child holds the segment in which its parent is left, from its first byte on.
    let mut steps = way.path.get(at..)?.iter();
    let step = steps.find(|step| step.left_at.is_none_or(|left| left >= segment.end(size)))?;
    Some(Wanted { timeline: step.branch.timeline, segment })
}

/// Where a request gets its bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer<T> {
    /// Staged: this. It is not on the shelf any more.
    Shelf(T),
    /// Being opened: wait for it, and ask again.
    Opening,
    /// From the repositories, now.
    Repositories,
}

#[derive(Debug)]
enum Held<T> {
    Opening,
    Staged(T),
}

/// What is staged and being opened on one way; `T` is a staged segment.
#[derive(Debug)]
pub struct Shelf<T> {
    way: Way,
    size: SegmentSize,
    bounds: Bounds,
    /// The last request.
    asked: Option<Wanted>,
    /// The window behind it, in the order in which recovery will ask.
    window: Vec<Wanted>,
    held: BTreeMap<Wanted, Held<T>>,
    /// An opening came to nothing since the last request: what lies behind it is not looked for.
    ended: bool,
}

impl<T> Shelf<T> {
    /// An empty shelf for one way.
    pub fn new(way: Way, size: SegmentSize, bounds: Bounds) -> Shelf<T> {
        Shelf { way, size, bounds, asked: None, window: Vec::new(), held: BTreeMap::new(), ended: false }
    }

    /// The segment a name means.
    pub fn wanted(&self, name: &str) -> Option<Wanted> {
        let (timeline, segment) = SegmentNumber::from_file_name(name, self.size)?;
        Some(Wanted { timeline, segment })
    }

    /// A request. What lies outside of the window now is handed back, to be removed.
    pub fn request(&mut self, wanted: Wanted) -> (Answer<T>, Vec<T>) {
        let window = std::iter::successors(Some(wanted), |last| follows(&self.way, self.size, *last));
        self.window = window.skip(1).take(self.bounds.window(self.size)).collect();
        self.asked = Some(wanted);
        self.ended = false;
        let answer = match self.held.remove(&wanted) {
            Some(Held::Staged(staged)) => Answer::Shelf(staged),
            Some(Held::Opening) => {
                self.held.insert(wanted, Held::Opening);
                Answer::Opening
            }
            None => Answer::Repositories,
        };
        let is_stale = |at: &Wanted, held: &mut Held<T>| matches!(held, Held::Staged(_)) && !self.window.contains(at);
        let stale = self.held.extract_if(.., is_stale);
        let stale = stale.filter_map(|(_, held)| match held {
            Held::Staged(staged) => Some(staged),
            Held::Opening => None,
        });
        (answer, stale.collect())
    }

    /// What to open next, given what is free on pg_wal's file system; it counts as being opened from now on.
    pub fn next(&mut self, free_bytes: u64) -> Option<Wanted> {
        let opening = self.held.values().filter(|held| matches!(held, Held::Opening)).count();
        let claimed = (opening as u64 + 1).saturating_mul(self.size.bytes());
        let room = free_bytes.saturating_sub(claimed) >= self.bounds.leave_free;
        if self.ended || opening >= self.bounds.at_once || !room {
            return None;
        }
        // What was asked for before the window moved, and is still being opened, counts too.
        if self.held.len() >= self.bounds.window(self.size) {
            return None;
        }
        let next = self.window.iter().find(|wanted| !self.held.contains_key(wanted)).copied()?;
        self.held.insert(next, Held::Opening);
        Some(next)
    }

    /// An opening has ended. What nobody wants any more is handed back.
    pub fn opened(&mut self, wanted: Wanted, staged: Option<T>) -> Option<T> {
        self.held.remove(&wanted);
        match staged {
            Some(staged) if self.asked == Some(wanted) || self.window.contains(&wanted) => {
                self.held.insert(wanted, Held::Staged(staged));
                None
            }
            Some(unwanted) => Some(unwanted),
            None => {
                self.ended |= self.window.contains(&wanted);
                None
            }
        }
    }

    /// Everything that is staged, off the shelf.
    pub fn clear(&mut self) -> Vec<T> {
        let staged = self.held.extract_if(.., |_, held| matches!(held, Held::Staged(_)));
        let staged = staged.filter_map(|(_, held)| match held {
            Held::Staged(staged) => Some(staged),
            Held::Opening => None,
        });
        staged.collect()
    }
}

#[cfg(test)]
mod tests;
