//! The repositories of one stream: who takes part, who has confirmed what, what may be acknowledged. Pure.
//!
//! A lane is one repository's side of a stream. It is *live* while it gets what comes in; *away* when it cannot take it;
//! *filling* while what it missed is copied to it from a live one; *refused* when it holds another history.
//! Invariant (P1): a lane's frontier moves only over bytes that were confirmed there, without a hole; it counts only after
//! what the repository held before has compared equal; and the acknowledged position is that of the `needed`-th best,
//! and never goes back.
//! Invariant (P8): a part is kept in memory only while a live lane has not confirmed it.

use std::collections::BTreeMap;

use super::frontier::{Frontier, acknowledged};
use crate::types::Lsn;

/// How a lane stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It gets what comes in.
    Live,
    /// What it missed is copied to it, or is about to be.
    Filling,
    /// It cannot take anything now; it is tried again.
    Away,
    /// It holds another history, or another cluster: nothing is put there.
    Refused,
}

/// See the module.
#[derive(Debug)]
pub struct Lanes {
    lanes: Vec<Lane>,
    needed: usize,
    acknowledged: Option<Lsn>,
}

#[derive(Debug)]
struct Lane {
    standing: Standing,
    frontier: Frontier,
    /// What the repository held before has come again, or has come from another repository, and was equal.
    compared: bool,
    /// Completed parts that it has not confirmed, by their first byte. Empty unless live.
    pending: BTreeMap<Lsn, Lsn>,
}

impl Lanes {
    /// `count` repositories that are away and of which nothing is known; `needed` of them are to confirm.
    pub fn new(count: usize, needed: usize) -> Lanes {
        let away = || Lane {
            standing: Standing::Away,
            frontier: Frontier::new(Lsn::ZERO),
            compared: false,
            pending: BTreeMap::new(),
        };
        Lanes { lanes: (0..count).map(|_| away()).collect(), needed, acknowledged: None }
    }

    /// How the lane stands.
    pub fn standing(&self, lane: usize) -> Standing {
        self.lanes.get(lane).map_or(Standing::Away, |lane| lane.standing)
    }

    /// The lanes that stand so.
    pub fn that_are(&self, standing: Standing) -> impl Iterator<Item = usize> {
        self.lanes.iter().enumerate().filter(move |(_, lane)| lane.standing == standing).map(|(index, _)| index)
    }

    /// What the repository is known to hold of this history, whether it counts or not; 0/0 where that is not known.
    pub fn held(&self, lane: usize) -> Lsn {
        self.lanes.get(lane).map_or(Lsn::ZERO, |lane| lane.frontier.get())
    }

    /// What counts of a lane; `None` before its overlap was equal.
    pub fn frontier(&self, lane: usize) -> Option<Lsn> {
        self.lanes.get(lane).filter(|lane| lane.compared).map(|lane| lane.frontier.get())
    }

    /// Begins to fill a lane that holds everything before `held`; that does not count before [`Lanes::compared`].
    pub fn fill(&mut self, lane: usize, held: Lsn) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            (lane.standing, lane.compared) = (Standing::Filling, false);
            (lane.frontier, lane.pending) = (Frontier::new(held), BTreeMap::new());
        }
    }

    /// The lane's overlap has compared equal.
    pub fn compared(&mut self, lane: usize) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            lane.compared = true;
        }
        self.count();
    }

    /// The lane takes part from now on. It holds everything before `durable`, and gets the parts of `recent`, oldest
    /// first, and all that follow.
    pub fn join(&mut self, lane: usize, durable: Lsn, recent: impl IntoIterator<Item = (Lsn, Lsn)>) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            let compared = lane.compared && lane.standing == Standing::Filling;
            let durable = if compared { durable.max(lane.frontier.get()) } else { durable };
            let pending = recent.into_iter().collect();
            *lane = Lane { standing: Standing::Live, frontier: Frontier::new(durable), compared, pending };
        }
    }

    /// The lane takes part no more. What it has confirmed without a hole it still holds.
    pub fn lose(&mut self, lane: usize, standing: Standing) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            lane.standing = standing;
            lane.compared &= standing != Standing::Refused; // what it holds is not this history
            (lane.frontier, lane.pending) = (Frontier::new(lane.frontier.get()), BTreeMap::new());
        }
        self.count();
    }

    /// A part is complete: every live lane is to put it.
    pub fn part_completed(&mut self, from: Lsn, to: Lsn) {
        for lane in self.lanes.iter_mut().filter(|lane| lane.standing == Standing::Live) {
            lane.pending.insert(from, to);
        }
    }

    /// The lane has confirmed `[from, to)`: a part or a range, in whatever order.
    pub fn confirmed(&mut self, lane: usize, from: Lsn, to: Lsn) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            lane.frontier.confirm(from, to);
            if lane.pending.get(&from) == Some(&to) {
                lane.pending.remove(&from);
            }
        }
        self.count();
    }

    fn count(&mut self) {
        let frontiers = self.lanes.iter().filter(|lane| lane.compared).map(|lane| lane.frontier.get());
        self.acknowledged = self.acknowledged.max(acknowledged(frontiers, self.needed));
    }

    /// What `needed` repositories hold durably and without a hole; `None` before so many have compared equal.
    pub fn acknowledged(&self) -> Option<Lsn> {
        self.acknowledged
    }

    /// What a single repository holds durably and without a hole, the best one; `None` before one has compared equal.
    pub fn best(&self) -> Option<Lsn> {
        self.lanes.iter().filter(|lane| lane.compared).map(|lane| lane.frontier.get()).max()
    }

    /// Have as many lanes as are needed, or all live ones where these are fewer, confirmed everything before `to`?
    pub fn is_held(&self, to: Lsn) -> bool {
        self.acknowledged.is_some_and(|acknowledged| acknowledged >= to)
    }

    /// The first byte of the oldest part that a live lane has not confirmed: from there on everything is in memory.
    /// `part` is where the part begins that is filling up.
    pub fn kept_from(&self, part: Lsn) -> Lsn {
        self.lanes.iter().filter_map(|lane| lane.pending.keys().next()).min().copied().unwrap_or(part)
    }

    /// Whether the lane's repository may hold what those know nothing of that are live and have compared equal. One that
    /// holds another history does not count.
    pub fn may_hold_more(&self, lane: usize) -> bool {
        match self.standing(lane) {
            Standing::Live => self.frontier(lane).is_none(),
            Standing::Filling | Standing::Away => true,
            Standing::Refused => false,
        }
    }

    /// How many completed parts the fastest live lane has not confirmed.
    pub fn fastest_backlog(&self) -> usize {
        self.live().map(|lane| lane.pending.len()).min().unwrap_or(0)
    }

    /// The live lane that the others wait for: it holds the oldest part, and another has nothing left to do. `None`
    /// where all are slow alike, and where there is no other.
    pub fn holds_others_up(&self) -> Option<usize> {
        let live = self.lanes.iter().enumerate().filter(|(_, lane)| lane.standing == Standing::Live);
        let slowest = live.filter_map(|(index, lane)| Some((*lane.pending.keys().next()?, index))).min()?;
        self.live().any(|lane| lane.pending.is_empty()).then_some(slowest.1)
    }

    fn live(&self) -> impl Iterator<Item = &Lane> {
        self.lanes.iter().filter(|lane| lane.standing == Standing::Live)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes of the log, and of a part.
    const LOG: u64 = 120;
    const PART: u64 = 10;

    #[derive(Debug, Clone)]
    enum Event {
        /// Some bytes come in.
        Receive(u64),
        /// One of a lane's puts that are under way ends, well or not.
        PutEnds { lane: usize, which: usize, well: bool },
        /// The open segment's newest bytes go out as a range.
        Cut { lane: usize },
        /// A lane is lost; what it had under way may or may not have got there.
        Lost { lane: usize, landed: u64 },
        /// It answers again, and its own end is loaded.
        Back { lane: usize },
        /// The next part is copied to it from a live one.
        Copy { lane: usize },
        /// The process is killed and starts again; these repositories answer.
        Restart { answering: u64, landed: u64 },
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            6 => (1u64..9).prop_map(Event::Receive),
            8 => (0usize..4, 0usize..4, prop::bool::weighted(0.9)).prop_map(|(lane, which, well)| Event::PutEnds { lane, which, well }),
            4 => (0usize..4).prop_map(|lane| Event::Cut { lane }),
            1 => (0usize..4, any::<u64>()).prop_map(|(lane, landed)| Event::Lost { lane, landed }),
            3 => (0usize..4).prop_map(|lane| Event::Back { lane }),
            6 => (0usize..4).prop_map(|lane| Event::Copy { lane }),
            1 => (any::<u64>(), any::<u64>()).prop_map(|(answering, landed)| Event::Restart { answering, landed }),
        ];
        proptest::collection::vec(event, 1..160)
    }

    /// A repository as a set of bytes, and what is on its way to it.
    #[derive(Debug, Clone, Default)]
    struct Model {
        held: Vec<bool>,
        under_way: Vec<(u64, u64)>,
    }

    impl Model {
        fn put(&mut self, (from, to): (u64, u64)) {
            self.held[from as usize..to as usize].fill(true);
        }

        /// Some of what was under way got there all the same; nobody was told.
        fn land(&mut self, landed: u64) {
            for (index, range) in std::mem::take(&mut self.under_way).into_iter().enumerate() {
                if landed >> (index % 64) & 1 == 1 {
                    self.put(range);
                }
            }
        }

        fn end(&self) -> u64 {
            self.held.iter().position(|held| !held).unwrap_or(self.held.len()) as u64
        }

        fn holds(&self, to: u64) -> bool {
            self.end() >= to
        }
    }

    struct World {
        lanes: Lanes,
        models: Vec<Model>,
        needed: usize,
        /// Where this stream began, what came in, and where each lane's next range begins.
        begin: u64,
        received: u64,
        cut: Vec<u64>,
        /// A live lane's own bytes up to here must come again before it counts.
        overlap: Vec<u64>,
        /// What the server was told.
        told: u64,
        /// The bytes of this repository are another server's: it never compares equal, and counts for nothing.
        foreign: Option<usize>,
    }

    impl World {
        fn new(count: usize, needed: usize, foreign: Option<usize>) -> World {
            let models = vec![Model { held: vec![false; LOG as usize], under_way: Vec::new() }; count];
            let lanes = Lanes::new(count, needed);
            let (cut, overlap) = (vec![0; count], vec![0; count]);
            let mut world = World { lanes, models, needed, begin: 0, received: 0, cut, overlap, told: 0, foreign };
            world.restart(u64::MAX, 0);
            world
        }

        fn at(lsn: u64) -> Lsn {
            Lsn::new(lsn)
        }

        /// As `attempt` does: the best of those that answer decides where the stream begins; who is as far is live.
        fn restart(&mut self, answering: u64, landed: u64) {
            self.models.iter_mut().for_each(|model| model.land(landed));
            let answers = |lane: usize| answering >> lane & 1 == 1;
            // What a foreign one seems to hold: some of the open part.
            let end = |lane: usize| if self.foreign == Some(lane) { 3 } else { self.models[lane].end() };
            let ends: Vec<(usize, u64)> =
                (0..self.models.len()).filter(|lane| answers(*lane)).map(|lane| (lane, end(lane))).collect();
            self.lanes = Lanes::new(self.models.len(), self.needed);
            let best = ends.iter().map(|(_, end)| *end).max().unwrap_or(0);
            self.begin = best / PART * PART;
            self.received = self.begin;
            for (lane, end) in ends {
                if end >= self.begin {
                    self.lanes.join(lane, World::at(end), []);
                    (self.cut[lane], self.overlap[lane]) = (end, end);
                } else {
                    self.lanes.fill(lane, World::at(end));
                }
            }
            self.compare();
        }

        fn compare(&mut self) {
            for lane in 0..self.models.len() {
                if self.lanes.standing(lane) != Standing::Live || self.overlap[lane] > self.received {
                    continue;
                }
                match self.foreign == Some(lane) {
                    true => self.lanes.lose(lane, Standing::Refused),
                    false => self.lanes.compared(lane),
                }
            }
        }

        fn part(&self) -> u64 {
            self.received / PART * PART
        }

        fn apply(&mut self, event: Event) {
            let count = self.models.len();
            match event {
                Event::Receive(bytes) => {
                    let to = (self.received + bytes).min(LOG);
                    while self.received < to {
                        let end = self.part() + PART;
                        self.received = to.min(end);
                        self.compare();
                        if self.received == end {
                            self.lanes.part_completed(World::at(end - PART), World::at(end));
                            for lane in self.lanes.that_are(Standing::Live).collect::<Vec<_>>() {
                                self.models[lane].under_way.push((end - PART, end));
                                self.cut[lane] = self.cut[lane].max(end);
                            }
                        }
                    }
                }
                Event::PutEnds { lane, which, well } => {
                    let lane = lane % count;
                    if self.models[lane].under_way.is_empty() || self.lanes.standing(lane) != Standing::Live {
                        return;
                    }
                    let which = which % self.models[lane].under_way.len();
                    let (from, to) = self.models[lane].under_way.remove(which);
                    if well {
                        self.models[lane].put((from, to));
                        self.lanes.confirmed(lane, World::at(from), World::at(to));
                    } else {
                        self.lanes.lose(lane, Standing::Away);
                    }
                }
                Event::Cut { lane } => {
                    let lane = lane % count;
                    let counts = self.lanes.frontier(lane).is_some();
                    if self.lanes.standing(lane) == Standing::Live && counts && self.cut[lane] < self.received {
                        self.models[lane].under_way.push((self.cut[lane], self.received));
                        self.cut[lane] = self.received;
                    }
                }
                Event::Lost { lane, landed } => {
                    let lane = lane % count;
                    self.models[lane].land(landed);
                    self.lanes.lose(lane, Standing::Away);
                }
                Event::Back { lane } => {
                    let lane = lane % count;
                    if self.lanes.standing(lane) == Standing::Away && self.lanes.that_are(Standing::Live).count() > 0 {
                        self.models[lane].land(0);
                        self.lanes.fill(lane, World::at(self.models[lane].end()));
                    }
                }
                Event::Copy { lane } => {
                    let lane = lane % count;
                    if self.lanes.standing(lane) != Standing::Filling {
                        return;
                    }
                    let kept = self.lanes.kept_from(World::at(self.part())).get();
                    let from = self.lanes.held(lane).get();
                    let source = self.lanes.that_are(Standing::Live).find(|l| self.lanes.frontier(*l).is_some());
                    let Some(source) = source else { return };
                    if self.foreign == Some(lane) {
                        return self.lanes.lose(lane, Standing::Refused);
                    }
                    if from < kept {
                        let end = (from / PART + 1) * PART;
                        assert!(self.models[source].holds(end), "a live lane holds everything that is not in memory");
                        self.models[lane].put((from, end));
                        self.lanes.compared(lane);
                        self.lanes.confirmed(lane, World::at(from), World::at(end));
                    } else {
                        let parts = (kept / PART..self.part() / PART).map(|part| (part * PART, (part + 1) * PART));
                        let parts: Vec<(u64, u64)> = parts.collect();
                        let recent = parts.iter().map(|(from, to)| (World::at(*from), World::at(*to)));
                        self.lanes.join(lane, World::at(from), recent);
                        self.models[lane].under_way.extend(parts);
                        self.cut[lane] = from.max(self.part());
                        self.overlap[lane] = from;
                        self.compare();
                    }
                }
                Event::Restart { answering, landed } => self.restart(answering, landed),
            }
        }

        /// The promise.
        fn judge(&mut self) -> Result<(), TestCaseError> {
            if let Some(told) = self.lanes.acknowledged().map(Lsn::get) {
                // As the stream does: never less than before, of whichever attempt.
                let told = told.max(self.told);
                let ours = self.models.iter().enumerate().filter(|(lane, _)| self.foreign != Some(*lane));
                let holders = ours.filter(|(_, model)| model.holds(told)).count();
                prop_assert!(holders >= self.needed, "{told} was acknowledged and {holders} hold it: {self:?}");
                self.told = told;
            }
            for lane in (0..self.models.len()).filter(|lane| self.foreign != Some(*lane)) {
                let held = self.lanes.held(lane).get();
                prop_assert!(self.models[lane].holds(held), "lane {lane} counts for {held}: {self:?}");
            }
            Ok(())
        }
    }

    impl std::fmt::Debug for World {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            let ends: Vec<u64> = self.models.iter().map(Model::end).collect();
            write!(f, "{} of {ends:?} needed, received {}, {:?}", self.needed, self.received, self.lanes)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        /// Under any order of completions, failures, losses, fill-ups and restarts, one of them perhaps not ours.
        #[test]
        fn p1_acknowledged_is_held_by_enough_repositories_and_never_goes_back(
            count in 1usize..5,
            needed in 1usize..5,
            foreign in proptest::option::of(0usize..5),
            events in events(),
        ) {
            let mut world = World::new(count, needed.min(count), foreign.filter(|lane| *lane < count));
            world.judge()?;
            let mut before = world.lanes.acknowledged();
            for event in events {
                let restart = matches!(event, Event::Restart { .. });
                world.apply(event);
                world.judge()?;
                prop_assert!(restart || world.lanes.acknowledged() >= before, "it went back: {world:?}");
                before = world.lanes.acknowledged();
            }
        }

        /// The model is not trivial: where everything works, everything is acknowledged, fill-ups included.
        #[test]
        fn what_all_take_is_acknowledged(count in 1usize..5, lost in 0usize..4, chunks in proptest::collection::vec(1u64..9, 40)) {
            let mut world = World::new(count, count, None);
            for (index, bytes) in chunks.into_iter().enumerate() {
                if index == 5 && count > 1 {
                    world.apply(Event::Lost { lane: lost, landed: 0 });
                }
                world.apply(Event::Receive(bytes));
                for lane in 0..count {
                    if index > 20 {
                        world.apply(Event::Back { lane });
                        (0..12).for_each(|_| world.apply(Event::Copy { lane }));
                    }
                    world.apply(Event::Cut { lane });
                    while !world.models[lane].under_way.is_empty() && world.lanes.standing(lane) == Standing::Live {
                        world.apply(Event::PutEnds { lane, which: 0, well: true });
                    }
                }
                world.judge()?;
            }
            prop_assert_eq!(world.lanes.acknowledged(), Some(Lsn::new(world.received)));
        }
    }

    #[test]
    fn p3_who_has_not_compared_equal_may_hold_what_the_others_lack() {
        let mut lanes = Lanes::new(3, 1);
        assert!((0..3).all(|lane| lanes.may_hold_more(lane)), "nothing is known");
        lanes.join(0, Lsn::ZERO, []);
        lanes.fill(1, Lsn::ZERO);
        lanes.lose(2, Standing::Refused);
        assert!(lanes.may_hold_more(0), "it is no source before its overlap was equal");
        lanes.compared(0);
        assert_eq!([0, 1, 2].map(|lane| lanes.may_hold_more(lane)), [false, true, false]);
    }

    #[test]
    fn only_who_holds_others_up_is_told() {
        let mut lanes = Lanes::new(3, 2);
        assert_eq!(lanes.holds_others_up(), None);
        (0..2).for_each(|lane| lanes.join(lane, Lsn::ZERO, []));
        lanes.part_completed(Lsn::new(0), Lsn::new(10));
        lanes.part_completed(Lsn::new(10), Lsn::new(20));
        assert_eq!((lanes.holds_others_up(), lanes.kept_from(Lsn::new(20))), (None, Lsn::new(0)));
        lanes.confirmed(1, Lsn::new(0), Lsn::new(10));
        assert_eq!(lanes.holds_others_up(), None, "the other has still something to do");
        lanes.confirmed(1, Lsn::new(10), Lsn::new(20));
        assert_eq!((lanes.holds_others_up(), lanes.fastest_backlog()), (Some(0), 0));
        lanes.lose(0, Standing::Away);
        assert_eq!((lanes.holds_others_up(), lanes.kept_from(Lsn::new(20))), (None, Lsn::new(20)));
    }
}
