//! Which bytes of the open segment are to be made durable next, before the segment is complete. Pure.
//!
//! Invariant: `cut <= received`; what is cut is cut once, in order, and never beyond what was received.
//! Bytes of a part that is complete are not cut here: the part is put whole (`part_completed`).

use std::time::Duration;

use tokio::time::Instant;

use crate::types::Lsn;

/// How long bytes may wait.
#[derive(Debug, Clone, Copy)]
pub struct CutterOptions {
    /// The oldest byte that is not yet on its way to a repository is never older than this.
    pub max_delay: Duration,
    /// The server's commits wait for us: cut as soon as nothing is under way (group commit: while one range is being
    /// made durable, the next one grows).
    pub synchronous: bool,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Nothing waits, or what waits follows when the range under way is durable.
    Nothing,
    /// Nothing is due before this instant.
    At(Instant),
    /// Make `[from, to)` durable.
    Range { from: Lsn, to: Lsn },
}

/// Remembers what was received and what was cut of it.
#[derive(Debug)]
pub struct Cutter {
    options: CutterOptions,
    received: Lsn,
    cut: Lsn,
    /// When the oldest byte that is not cut arrived.
    waiting_since: Option<Instant>,
    under_way: bool,
    /// Everything up to here was asked for (a keepalive, a stop): it does not wait for `max_delay`.
    wanted: Lsn,
}

impl Cutter {
    /// Everything before `at` is durable already.
    pub fn new(options: CutterOptions, at: Lsn) -> Cutter {
        Cutter { options, received: at, cut: at, waiting_since: None, under_way: false, wanted: at }
    }

    /// Bytes up to `to` have arrived.
    pub fn received(&mut self, to: Lsn, now: Instant) {
        if to > self.received {
            self.received = to;
            if self.cut < to {
                self.waiting_since.get_or_insert(now);
            }
        }
    }

    /// The part that ends at `end` is complete and goes to the repository whole: its bytes need no cut any more.
    pub fn part_completed(&mut self, end: Lsn, now: Instant) {
        self.cut = self.cut.max(end).min(self.received.max(end));
        self.received = self.received.max(end);
        self.waiting_since = (self.cut < self.received).then_some(now);
    }

    /// Somebody waits for everything received so far: the server asked for a reply, or we are about to stop.
    pub fn flush(&mut self) {
        self.wanted = self.received;
    }

    /// The range that was cut last is durable, or has failed: the next one may go.
    pub fn range_finished(&mut self) {
        self.under_way = false;
    }

    /// Is everything that was received cut?
    pub fn is_drained(&self) -> bool {
        self.cut == self.received
    }

    /// Pure: see [`Cut`]. The caller that acts on a range says so with [`Cutter::range_started`].
    pub fn decide(&self, now: Instant) -> Cut {
        let Some(since) = self.waiting_since.filter(|_| !self.under_way) else { return Cut::Nothing };
        let due = since + self.options.max_delay;
        if self.options.synchronous || self.cut < self.wanted || due <= now {
            return Cut::Range { from: self.cut, to: self.received };
        }
        Cut::At(due)
    }

    /// The range up to `to`, as [`Cutter::decide`] gave it, is on its way.
    pub fn range_started(&mut self, to: Lsn) {
        self.cut = self.cut.max(to).min(self.received);
        self.under_way = true;
        self.waiting_since = None; // `decide` always takes everything received
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Receive(u64),
        Finish,
        Flush,
        Wait(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (1u64..300).prop_map(Step::Receive),
            2 => Just(Step::Finish),
            1 => Just(Step::Flush),
            3 => (0u64..1500).prop_map(Step::Wait),
        ];
        proptest::collection::vec(step, 0..200)
    }

    const PART: u64 = 1000;

    proptest! {
        /// Ranges and parts together tile the log: in order, nothing twice, nothing left out; and no byte waits longer
        /// than max_delay while nothing is under way.
        #[test]
        fn every_byte_is_cut_once_and_in_time(steps in steps(), synchronous in any::<bool>()) {
            let options = CutterOptions { max_delay: Duration::from_millis(1000), synchronous };
            let mut now = Instant::now();
            let mut cutter = Cutter::new(options, Lsn::new(0));
            let (mut received, mut covered, mut under_way) = (0u64, 0u64, false);
            let mut oldest: Option<Instant> = None;
            for step in steps {
                match step {
                    Step::Receive(mut bytes) => {
                        while bytes > 0 {
                            let end = (received / PART + 1) * PART;
                            let piece = bytes.min(end - received);
                            received += piece;
                            bytes -= piece;
                            cutter.received(Lsn::new(received), now);
                            oldest.get_or_insert(now);
                            if received == end {
                                cutter.part_completed(Lsn::new(end), now);
                                covered = end;
                                oldest = None;
                            }
                        }
                    }
                    Step::Finish => { cutter.range_finished(); under_way = false; }
                    Step::Flush => cutter.flush(),
                    Step::Wait(ms) => now += Duration::from_millis(ms),
                }
                match cutter.decide(now) {
                    Cut::Range { from, to } => {
                        prop_assert!(!under_way);
                        prop_assert_eq!(from.get(), covered);
                        prop_assert_eq!(to.get(), received);
                        prop_assert!(to > from);
                        cutter.range_started(to);
                        covered = received;
                        under_way = true;
                        oldest = None;
                    }
                    Cut::At(due) => {
                        prop_assert!(due > now && !synchronous);
                        prop_assert!(due <= oldest.unwrap() + options.max_delay);
                    }
                    Cut::Nothing => prop_assert!(under_way || covered == received),
                }
                prop_assert_eq!(cutter.is_drained(), covered == received);
            }
        }
    }

    #[test]
    fn a_flush_does_not_wait() {
        let now = Instant::now();
        let options = CutterOptions { max_delay: Duration::from_secs(3600), synchronous: false };
        let mut cutter = Cutter::new(options, Lsn::new(100));
        cutter.received(Lsn::new(150), now);
        assert_eq!(cutter.decide(now), Cut::At(now + options.max_delay));
        cutter.flush();
        assert_eq!(cutter.decide(now), Cut::Range { from: Lsn::new(100), to: Lsn::new(150) });
        cutter.range_started(Lsn::new(150));
        cutter.received(Lsn::new(160), now);
        cutter.range_finished();
        assert_eq!(cutter.decide(now), Cut::At(now + options.max_delay), "what came after the flush waits its turn");
    }
}
