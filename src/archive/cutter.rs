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

/// How many ranges may be under way, and how often one may be cut in synchronous mode: what a put costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Ranges under way at the same time, at most.
    pub at_once: usize,
    /// From one cut to the next, at least, where commits wait for us; elsewhere `max_delay` bounds it.
    pub interval: Duration,
}

impl Pace {
    /// Where one follows the other, and costs nothing but time: a tail.
    pub const ONE: Pace = Pace { at_once: 1, interval: Duration::ZERO };
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
    pace: Pace,
    under_way: usize,
    /// When the newest range was cut.
    last_cut: Option<Instant>,
    /// How long a put takes, smoothed.
    put_takes: Option<Duration>,
    /// Everything up to here was asked for (a keepalive, a stop): it does not wait for `max_delay`.
    wanted: Lsn,
}

impl Cutter {
    /// Everything before `at` is durable already. One range at a time.
    pub fn new(options: CutterOptions, at: Lsn) -> Cutter {
        Cutter {
            options,
            received: at,
            cut: at,
            waiting_since: None,
            pace: Pace::ONE,
            under_way: 0,
            last_cut: None,
            put_takes: None,
            wanted: at,
        }
    }

    /// The same at another pace.
    #[must_use]
    pub fn at_pace(mut self, pace: Pace) -> Cutter {
        self.pace = Pace { at_once: pace.at_once.max(1), ..pace };
        self
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

    /// One of the ranges that were cut is durable, or has failed: another one may go.
    pub fn range_finished(&mut self) {
        self.under_way = self.under_way.saturating_sub(1);
    }

    /// A put took so long: where several are under way they are spread over the time that one takes.
    pub fn put_took(&mut self, took: Duration) {
        self.put_takes = Some(self.put_takes.map_or(took, |known| (known * 3 + took) / 4));
    }

    /// Is everything that was received cut?
    pub fn is_drained(&self) -> bool {
        self.cut == self.received
    }

    /// Pure: see [`Cut`]. The caller that acts on a range says so with [`Cutter::range_started`].
    pub fn decide(&self, now: Instant) -> Cut {
        let Some(since) = self.waiting_since.filter(|_| self.under_way < self.pace.at_once) else {
            return Cut::Nothing;
        };
        let latest = since + self.options.max_delay;
        let due = if self.options.synchronous { latest.min(self.next_of_group(since)) } else { latest };
        if self.cut < self.wanted || due <= now {
            return Cut::Range { from: self.cut, to: self.received };
        }
        Cut::At(due)
    }

    /// When the next group of commits goes: not sooner after the last one than the interval; and where others are under
    /// way, at even distances, so that a commit waits for a part of a put's time and not for a whole one.
    fn next_of_group(&self, since: Instant) -> Instant {
        let Some(last) = self.last_cut else { return since };
        let spread = match (self.under_way, self.put_takes) {
            (0, _) => Duration::ZERO,
            (_, Some(takes)) => takes / u32::try_from(self.pace.at_once).unwrap_or(u32::MAX),
            // Nothing is known yet: the first one is waited for.
            (_, None) => self.options.max_delay,
        };
        last + self.pace.interval.max(spread)
    }

    /// The range up to `to`, as [`Cutter::decide`] gave it at `now`, is on its way.
    pub fn range_started(&mut self, to: Lsn, now: Instant) {
        self.cut = self.cut.max(to).min(self.received);
        self.under_way += 1;
        self.last_cut = Some(now);
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
        /// Ranges and parts together tile the log: in order, nothing twice, nothing left out; no byte waits longer than
        /// max_delay while another range may go; and no more are under way, nor cut more often, than the pace says.
        #[test]
        fn every_byte_is_cut_once_and_in_time(
            steps in steps(),
            synchronous in any::<bool>(),
            at_once in 1usize..5,
            interval in 0u64..300,
        ) {
            let options = CutterOptions { max_delay: Duration::from_millis(1000), synchronous };
            let pace = Pace { at_once, interval: Duration::from_millis(interval) };
            let mut now = Instant::now();
            let mut cutter = Cutter::new(options, Lsn::new(0)).at_pace(pace);
            let (mut received, mut covered, mut under_way) = (0u64, 0u64, 0usize);
            let (mut oldest, mut last_cut, mut flushed) = (None, None, 0u64);
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
                    Step::Finish if under_way > 0 => {
                        cutter.range_finished();
                        cutter.put_took(Duration::from_millis(100));
                        under_way -= 1;
                    }
                    Step::Finish => {}
                    Step::Flush => { cutter.flush(); flushed = received; }
                    Step::Wait(ms) => now += Duration::from_millis(ms),
                }
                match cutter.decide(now) {
                    Cut::Range { from, to } => {
                        prop_assert!(under_way < at_once);
                        prop_assert_eq!(from.get(), covered);
                        prop_assert_eq!(to.get(), received);
                        prop_assert!(to > from);
                        let is_late = oldest.is_some_and(|oldest| now >= oldest + options.max_delay);
                        let paced = last_cut.is_none_or(|last| now >= last + pace.interval);
                        prop_assert!(is_late || covered < flushed || (synchronous && paced), "cut for no reason");
                        cutter.range_started(to, now);
                        (covered, oldest, last_cut) = (received, None, Some(now));
                        under_way += 1;
                    }
                    Cut::At(due) => {
                        prop_assert!(due > now && due <= oldest.unwrap() + options.max_delay);
                        let may_go = last_cut.is_none_or(|last| now >= last + pace.interval);
                        prop_assert!(!(synchronous && under_way == 0 && may_go), "a commit waits for nothing");
                    }
                    Cut::Nothing => prop_assert!(under_way == at_once || covered == received),
                }
                prop_assert_eq!(cutter.is_drained(), covered == received);
            }
        }
    }

    /// Puts that take a while are spread over that time; where one is allowed at a time, the next one waits for it.
    #[test]
    fn several_are_under_way_when_a_put_takes_long() {
        let options = CutterOptions { max_delay: Duration::from_secs(1), synchronous: true };
        let (begin, ms) = (Instant::now(), Duration::from_millis);
        let run = |pace: Pace| {
            let mut cutter = Cutter::new(options, Lsn::ZERO).at_pace(pace);
            let (mut cuts, mut ends) = (Vec::new(), std::collections::VecDeque::new());
            for at in 0..1000_u32 {
                let now = begin + ms(1) * at;
                if ends.front().is_some_and(|end| *end <= now) {
                    ends.pop_front();
                    cutter.range_finished();
                    cutter.put_took(ms(100));
                }
                cutter.received(Lsn::new(u64::from(at) + 1), now);
                if let Cut::Range { to, .. } = cutter.decide(now) {
                    cutter.range_started(to, now);
                    ends.push_back(now + ms(100));
                    cuts.push(at);
                }
            }
            cuts
        };
        assert_eq!(run(Pace::ONE), [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]);
        let four = run(Pace { at_once: 4, interval: Duration::ZERO });
        assert_eq!(four[..6], [0, 100, 125, 150, 175, 200], "the first one shows how long it takes");
        let slower = run(Pace { at_once: 4, interval: ms(60) });
        assert_eq!(slower[..5], [0, 100, 160, 220, 280]);
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
        cutter.range_started(Lsn::new(150), now);
        cutter.received(Lsn::new(160), now);
        cutter.range_finished();
        assert_eq!(cutter.decide(now), Cut::At(now + options.max_delay), "what came after the flush waits its turn");
    }
}
