//! What `wal push` puts ahead of being asked for it: a pure value.
//!
//! What always holds: a file counts as durable only when a push of it has succeeded, and only as long as it is the file that was
//! pushed (`I`: what tells a file from what it was). A failure is no answer: the call that asks tries anew. After one nothing
//! is put ahead until a call has succeeded.
//! Memory: [`WAITING`] and [`KNOWN`] names; [`Ahead::begin_next`] stops at the bound on jobs, asked ones counted.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use crate::types::WalFileName;

/// Files that are known to wait, at most; the rest is found by looking again.
pub const WAITING: usize = 256;
/// Files that were put ahead and not yet asked for, at most. Then looking ahead pauses: the server is that far behind.
pub const KNOWN: usize = 1024;

/// A file's place in the order in which the server offers them: histories first, then by name, which is WAL order within a
/// timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn(String);

impl Turn {
    /// `None` for a name that is none of PostgreSQL's.
    pub fn of(name: &str) -> Option<Turn> {
        name.parse::<WalFileName>().is_ok().then(|| Turn(name.to_owned()))
    }

    /// The file's name.
    pub fn name(&self) -> &str {
        &self.0
    }

    fn key(&self) -> (bool, &str) {
        (!self.0.ends_with(".history"), &self.0)
    }
}

impl Ord for Turn {
    fn cmp(&self, other: &Turn) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Turn) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// What to do for a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Nothing: it was put ahead.
    Durable,
    /// Wait: it is being put, and then ask again.
    Running,
    /// Push it, and say so with [`Ahead::answered`].
    Push,
}

/// What waits, what is being put, what is durable.
#[derive(Debug)]
pub struct Ahead<I> {
    /// Most pushes at once, those that were asked for counted.
    jobs: usize,
    waiting: BTreeSet<Turn>,
    /// More was ready than fits into `waiting`.
    is_more: bool,
    running: BTreeSet<Turn>,
    durable: BTreeMap<Turn, I>,
    last: Option<Turn>,
    /// A push failed since the last one that succeeded for a call.
    is_troubled: bool,
}

impl<I: Copy + Eq> Ahead<I> {
    /// Nothing known.
    pub fn new(jobs: usize) -> Ahead<I> {
        Ahead {
            jobs: jobs.max(1),
            waiting: BTreeSet::new(),
            is_more: false,
            running: BTreeSet::new(),
            durable: BTreeMap::new(),
            last: None,
            is_troubled: false,
        }
    }

    /// Bounds the pushes at once from now on.
    pub fn set_jobs(&mut self, jobs: usize) {
        self.jobs = jobs.max(1);
    }

    /// The server asks for a file, which is `now`.
    pub fn asked(&mut self, turn: &Turn, now: I) -> Asked {
        self.last = Some(turn.clone());
        self.waiting.remove(turn);
        if self.running.contains(turn) {
            return Asked::Running;
        }
        match self.durable.remove(turn) {
            Some(pushed) if pushed == now => Asked::Durable,
            _ => {
                self.running.insert(turn.clone());
                Asked::Push
            }
        }
    }

    /// A push that was [asked](Asked::Push) for is over.
    pub fn answered(&mut self, turn: &Turn, is_durable: bool) {
        self.running.remove(turn);
        self.is_troubled = !is_durable;
    }

    /// What is ready now, in any order; what is being put or durable is left out.
    pub fn seen(&mut self, ready: impl IntoIterator<Item = Turn>) {
        self.waiting.clear();
        self.is_more = false;
        for turn in ready {
            if self.running.contains(&turn) || self.durable.contains_key(&turn) {
                continue;
            }
            self.waiting.insert(turn);
            if self.waiting.len() > WAITING {
                self.waiting.pop_last();
                self.is_more = true;
            }
        }
    }

    /// Is there anything to be won by looking for what is ready? `was_asked`: the server has come again since the last look.
    pub fn wants_to_look(&self, was_asked: bool) -> bool {
        self.waiting.is_empty() && (was_asked || self.is_more) && !self.is_troubled && self.running.len() < self.jobs
    }

    /// The next file to put ahead; it is running from now on, and ends with [`Ahead::done`].
    pub fn begin_next(&mut self) -> Option<Turn> {
        if self.is_troubled || self.running.len() >= self.jobs {
            return None;
        }
        if self.durable.len() + self.running.len() >= KNOWN {
            // What lies behind the server is not asked for any more: it was done in another way.
            let last = self.last.clone()?;
            self.durable.retain(|turn, _| *turn > last);
            if self.durable.len() + self.running.len() >= KNOWN {
                return None;
            }
        }
        // What lies behind the server was answered since it was seen, or is asked for out of order: no need to be ahead of that.
        let turn = loop {
            let turn = self.waiting.pop_first()?;
            if self.last.as_ref().is_none_or(|last| turn > *last) {
                break turn;
            }
        };
        self.running.insert(turn.clone());
        Some(turn)
    }

    /// A push ahead is over; `Some` when the file is durable, as what it was from before to after the push.
    pub fn done(&mut self, turn: &Turn, durable: Option<I>) {
        self.running.remove(turn);
        match durable {
            Some(identity) => {
                self.durable.insert(turn.clone(), identity);
            }
            None => self.is_troubled = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn turn(number: u32) -> Turn {
        Turn::of(&format!("00000001000000000000{number:04X}")).unwrap()
    }

    #[test]
    fn histories_go_first_and_strangers_not_at_all() {
        let names =
            ["000000010000000000000002", "00000002.history", "000000010000000000000001", "xyz", "00000001.sock"];
        let mut turns: Vec<Turn> = names.iter().filter_map(|name| Turn::of(name)).collect();
        turns.sort();
        let sorted: Vec<&str> = turns.iter().map(Turn::name).collect();
        assert_eq!(sorted, ["00000002.history", "000000010000000000000001", "000000010000000000000002"]);
    }

    #[test]
    fn what_was_put_ahead_is_answered_once_and_only_unchanged() {
        let mut ahead = Ahead::new(2);
        ahead.seen([turn(3), turn(2), turn(1)]);
        assert_eq!(ahead.asked(&turn(1), 10), Asked::Push);
        assert_eq!(ahead.begin_next(), Some(turn(2)));
        assert_eq!(ahead.begin_next(), None, "two at once, the asked one counted");
        assert_eq!(ahead.asked(&turn(2), 20), Asked::Running);
        ahead.answered(&turn(1), true);
        ahead.done(&turn(2), Some(20));
        assert_eq!(ahead.begin_next(), Some(turn(3)));
        ahead.done(&turn(3), Some(30));
        assert_eq!(ahead.asked(&turn(2), 20), Asked::Durable);
        assert_eq!(ahead.asked(&turn(3), 31), Asked::Push, "it has changed since");
    }

    #[test]
    fn a_failure_ahead_is_no_answer_and_stops_looking_ahead_until_a_call_succeeds() {
        let mut ahead = Ahead::new(4);
        ahead.seen([turn(2), turn(3)]);
        assert_eq!(ahead.begin_next(), Some(turn(2)));
        ahead.done(&turn(2), None);
        assert_eq!(ahead.begin_next(), None);
        assert!(!ahead.wants_to_look(true));
        assert_eq!(ahead.asked(&turn(2), 20), Asked::Push);
        ahead.answered(&turn(2), false);
        assert_eq!(ahead.begin_next(), None);
        assert_eq!(ahead.asked(&turn(2), 20), Asked::Push);
        ahead.answered(&turn(2), true);
        assert_eq!(ahead.begin_next(), Some(turn(3)));
    }

    /// The server marks a file as done only after it was answered: until then it still looks ready.
    #[test]
    fn what_was_answered_is_not_put_again() {
        let mut ahead = Ahead::new(4);
        ahead.done(&turn(5), Some(50));
        assert_eq!(ahead.asked(&turn(5), 50), Asked::Durable);
        ahead.seen([turn(4), turn(5), turn(6)]);
        assert_eq!((ahead.begin_next(), ahead.begin_next()), (Some(turn(6)), None));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Change(u32),
        Ask(u32),
        Look,
        Next,
        End { which: usize, works: bool },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..12u32).prop_map(Step::Change),
            (0..12u32).prop_map(Step::Ask),
            Just(Step::Look),
            Just(Step::Next),
            (0..8usize, prop::bool::weighted(0.8)).prop_map(|(which, works)| Step::End { which, works }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        /// Against what is really in the repository: `Durable` is said of nothing else.
        #[test]
        fn durable_is_said_of_what_is_durable(jobs in 1..5usize, steps in prop::collection::vec(step(), 1..120)) {
            let mut ahead: Ahead<u32> = Ahead::new(jobs);
            let mut content = [0u32; 12];
            let mut archived: Vec<(u32, u32)> = Vec::new();
            // What runs: file, its content at the beginning, whether a call waits for it.
            let mut runs: Vec<(u32, u32, bool)> = Vec::new();
            for step in steps {
                match step {
                    Step::Change(file) => content[file as usize] += 1,
                    Step::Ask(file) => match ahead.asked(&turn(file), content[file as usize]) {
                        Asked::Durable => prop_assert!(archived.contains(&(file, content[file as usize]))),
                        Asked::Running => prop_assert!(runs.iter().any(|run| run.0 == file)),
                        Asked::Push => {
                            prop_assert!(!runs.iter().any(|run| run.0 == file), "twice at once");
                            runs.push((file, content[file as usize], true));
                        }
                    },
                    Step::Look => ahead.seen((0..12).map(turn)),
                    Step::Next => {
                        let before = runs.len();
                        if let Some(next) = ahead.begin_next() {
                            prop_assert!(before < jobs);
                            let file = (0..12).find(|file| turn(*file) == next).unwrap();
                            prop_assert!(!runs.iter().any(|run| run.0 == file), "twice at once");
                            runs.push((file, content[file as usize], false));
                        }
                    }
                    Step::End { which, works } if which < runs.len() => {
                        let (file, began, asked) = runs.remove(which);
                        let unchanged = content[file as usize] == began;
                        if works && unchanged {
                            archived.push((file, began));
                        }
                        match asked {
                            true => ahead.answered(&turn(file), works && unchanged),
                            false => ahead.done(&turn(file), (works && unchanged).then_some(began)),
                        }
                    }
                    Step::End { .. } => {}
                }
            }
        }

        #[test]
        fn names_are_bounded_and_in_order(count in 0..2000u32) {
            let mut ahead: Ahead<u32> = Ahead::new(1);
            ahead.seen((0..count).rev().map(turn));
            prop_assert!(ahead.waiting.len() <= WAITING);
            let mut expected = 0;
            while let Some(next) = ahead.begin_next() {
                prop_assert_eq!(&next, &turn(expected));
                expected += 1;
                ahead.done(&next, Some(0));
            }
            prop_assert_eq!(expected as usize, (count as usize).min(WAITING));
            while ahead.durable.len() < KNOWN {
                let more = turn(10_000 + ahead.durable.len() as u32);
                ahead.done(&more, Some(0));
            }
            ahead.seen([turn(9_999)]);
            prop_assert_eq!(ahead.begin_next(), None, "far enough ahead");
        }
    }
}
