//! Which of several repositories a restore reads from. Pure.
//!
//! What always holds (P2): a repository that is merely cheaper is never chosen over one that holds more of what was asked
//! for. `latest` is the newest of all repositories; and one that does not know of a timeline by which the others leave the
//! way before the target answers for another history, so it is not asked, unless it is named.

use std::collections::BTreeSet;

use super::chain::{Options, TimelineChoice};
use super::outcome::{RestorePlan, Stop};
use super::target::{Point, Target};
use crate::catalog::inventory::ClusterInventory;
use crate::types::{Branch, Lsn};

/// A repository that holds the cluster.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Beside us: reading costs neither money nor a network.
    pub local: bool,
    /// What it holds.
    pub inventory: &'a ClusterInventory,
}

/// A repository from which the target can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Its place in the configuration's order.
    pub index: usize,
    /// Beside us.
    pub local: bool,
    /// Sealed bytes that a restore reads.
    pub bytes: u64,
    /// How far it gets, where more is better.
    pub reach: Option<Lsn>,
}

/// In which order the repositories are asked (by index): those that hold most of what was asked for first; then what is
/// beside us; then the newest base backup that comes into question, because the less WAL follows it the cheaper it is; then
/// the configuration's order.
pub fn order(candidates: &[Candidate<'_>], target: &Target, options: &Options) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    let rank = |index: &usize| {
        let candidate = candidates.get(*index)?;
        let inventory = candidate.inventory;
        let reach = match target.point {
            Point::Latest => newest_end(inventory),
            Point::Immediate => inventory.backups.last().map(|newest| newest.stop),
            // The first restore point of a name counts: whoever goes back furthest sees it.
            Point::Name(_) => inventory.backups.first().map(|oldest| later(oldest.start)),
            Point::Time(_) | Point::Lsn(_) | Point::Xid(_) => None,
        };
        let base = inventory.backups.iter().rev().find(|backup| {
            let named = options.backup.is_none_or(|label| label == backup.label);
            let before = match &target.point {
                Point::Time(instant) => backup.stopped_at <= *instant,
                Point::Lsn(lsn) => backup.stop <= *lsn,
                Point::Xid(_) | Point::Name(_) | Point::Immediate | Point::Latest => true,
            };
            named && before && (backup.flagged.is_none() || options.allow_flagged || options.backup.is_some())
        });
        Some((reach, candidate.local, base.map(|base| base.label)))
    };
    // Stable: the configuration's order where nothing else decides.
    order.sort_by_key(|index| std::cmp::Reverse(rank(index)));
    order
}

/// Turns the order of positions around.
fn later(lsn: Lsn) -> Lsn {
    Lsn::new(u64::MAX - lsn.get())
}

/// How far a plan gets, where repositories may differ in that and more is better.
pub fn reach(plan: &RestorePlan) -> Option<Lsn> {
    let (record, needed_to) = match plan.stop {
        Stop::At(stop) => (stop.record, stop.needed_to),
        Stop::Immediate => (plan.base.stop, plan.base.stop),
    };
    match plan.target.point {
        Point::Latest => Some(needed_to),
        Point::Immediate => Some(plan.base.stop),
        Point::Name(_) => Some(later(record)),
        Point::Time(_) | Point::Lsn(_) | Point::Xid(_) => None,
    }
}

/// The end of the WAL that goes on without a hole on the branch that reaches furthest, on the newest timeline.
fn newest_end(inventory: &ClusterInventory) -> Option<Lsn> {
    let ends = inventory.branches.keys().filter_map(|branch| Some((branch.timeline, inventory.frontier(*branch)?)));
    ends.max().map(|(_, end)| end)
}

/// The branch by which other repositories leave a plan's way before its stop, and which its own repository does not know.
/// Who named a timeline or a position has said what is meant.
pub fn outdated(
    plan: &RestorePlan,
    options: &Options,
    own: &ClusterInventory,
    others: &[&ClusterInventory],
) -> Option<Branch> {
    if options.timeline != TimelineChoice::Latest {
        return None;
    }
    let stop = match plan.stop {
        Stop::At(stop) => stop.record,
        Stop::Immediate => plan.base.stop,
    };
    let tip = plan.path.last().map(|part| part.branch)?;
    let known: BTreeSet<Branch> = own.branches.keys().copied().collect();
    let unknown = others
        .iter()
        .flat_map(|other| other.branches.values())
        .filter(|branch| !known.contains(&branch.branch) && branch.branch.ordinal == 0 && !branch.pieces.is_empty());
    unknown
        .filter(|branch| {
            branch.history.as_ref().and_then(|path| path.left_at(tip.timeline)).is_some_and(|left| left <= stop)
        })
        .map(|branch| branch.branch)
        .max()
}

/// What a restore by this plan reads: sealed bytes.
pub fn bytes(plan: &RestorePlan) -> u64 {
    let base = plan.fetch.base_stored_bytes.unwrap_or(plan.base.stored_bytes);
    base.saturating_add(plan.fetch.wal_stored_bytes)
}

/// What reaching the same place would cost from another repository, as far as its names tell: `None` where it lacks
/// something.
pub fn estimate(inventory: &ClusterInventory, plan: &RestorePlan) -> Option<u64> {
    let needed_to = match plan.stop {
        Stop::At(stop) => stop.needed_to,
        Stop::Immediate => plan.base.stop,
    };
    let tip = plan.path.last()?.branch;
    let path = inventory.path_of(tip)?;
    let on_way = |branch: Branch| branch == tip || path.left_at(branch.timeline).is_some();
    let bases = inventory
        .backups
        .iter()
        .rev()
        .filter(|backup| backup.flagged.is_none() && backup.stop <= needed_to && on_way(backup.branch));
    let mut costs = bases.filter_map(|base| {
        let from = base.start.segment_start(base.segment_size);
        let stretches = inventory.covers_on(tip, &path, from, needed_to).ok()?;
        let stored = |stretch: &crate::catalog::inventory::Stretch| -> u64 {
            let wal = inventory.branches.get(&stretch.branch);
            let pieces = wal.into_iter().flat_map(|wal| &wal.pieces);
            let size = base.segment_size;
            let touched =
                pieces.filter(|piece| piece.ends_at(size) > stretch.from && piece.begins_at(size) < stretch.to);
            touched.map(|piece| piece.object_len).sum()
        };
        Some(base.stored_bytes.saturating_add(stretches.iter().map(stored).sum()))
    });
    costs.next() // of the newest base backup that does
}

/// Whether one has to read noticeably less than the other: a tenth, because sealing anew makes small differences.
fn is_less(one: u64, other: u64) -> bool {
    one.saturating_add(one / 10) < other
}

/// Whether another repository would be chosen over `best`, if it gets as far.
pub fn beats(best: Offer, local: bool, bytes: u64) -> bool {
    (local && !best.local) || (local == best.local && is_less(bytes, best.bytes))
}

/// The cheapest of those that get as far as any: beside us before elsewhere, then noticeably fewer bytes, then the
/// configuration's order.
pub fn best(offers: &[Offer]) -> Option<Offer> {
    let furthest = offers.iter().map(|offer| offer.reach).max()?;
    let near = offers.iter().any(|offer| offer.reach == furthest && offer.local);
    let alike = offers.iter().filter(|offer| offer.reach == furthest && offer.local == near);
    let least = alike.clone().map(|offer| offer.bytes).min()?;
    alike.filter(|offer| !is_less(least, offer.bytes)).min_by_key(|offer| offer.index).copied()
}

/// Why this one, in words.
pub fn because(chosen: Offer, offers: &[Offer]) -> &'static str {
    let others: Vec<&Offer> = offers.iter().filter(|offer| offer.index != chosen.index).collect();
    if others.is_empty() && chosen.reach.is_none() {
        return "the only one that reaches the target";
    }
    let equal: Vec<&&Offer> = others.iter().filter(|other| other.reach == chosen.reach).collect();
    if equal.is_empty() {
        return "no other that answers gets as far";
    }
    let same: Vec<&&&Offer> = equal.iter().filter(|other| other.local == chosen.local).collect();
    let reads_least = !same.is_empty() && same.iter().all(|other| is_less(chosen.bytes, other.bytes));
    match (same.len() == equal.len(), reads_least) {
        (false, false) => "it is a local directory",
        (false, true) => "it is local, and has to read least",
        (true, true) => "it has to read least",
        (true, false) => "the first of several that are alike",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::inventory::{BranchInventory, Place, WalPiece};
    use crate::catalog::records::{BackupInfo, ServerParameters};
    use crate::types::{BackupLabel, ClusterId, SegmentNumber, SegmentSize, SystemId, TimelineHistory, TimelineId};
    use jiff::Timestamp;
    use proptest::prelude::*;

    fn an_offer() -> impl Strategy<Value = Offer> {
        (any::<bool>(), 90u64..130, 0u64..3).prop_map(|(local, bytes, reach)| Offer {
            index: 0,
            local,
            bytes,
            reach: Some(Lsn::new(reach)),
        })
    }

    proptest! {
        /// More reach beats everything, then nearness, then bytes.
        #[test]
        fn p2_cheaper_never_beats_more(mut offers in prop::collection::vec(an_offer(), 1..6)) {
            offers.iter_mut().enumerate().for_each(|(index, offer)| offer.index = index);
            let chosen = best(&offers).unwrap();
            for other in &offers {
                prop_assert!(other.reach <= chosen.reach);
                if other.reach == chosen.reach {
                    prop_assert!(chosen.local || !other.local);
                    prop_assert!(!beats(chosen, other.local, other.bytes));
                    if other.local == chosen.local && other.bytes <= chosen.bytes {
                        prop_assert!(chosen.index <= other.index);
                    }
                }
            }
            prop_assert!(!because(chosen, &offers).is_empty());
        }
    }

    #[test]
    fn the_choice_is_said_in_words() {
        let offer = |index, local, bytes, reach: Option<u64>| Offer { index, local, bytes, reach: reach.map(Lsn::new) };
        let say = |offers: &[Offer]| {
            let chosen = best(offers).unwrap();
            (chosen.index, because(chosen, offers))
        };
        assert_eq!(say(&[offer(0, false, 5, None)]), (0, "the only one that reaches the target"));
        assert_eq!(say(&[offer(0, false, 1, None), offer(1, true, 9, None)]), (1, "it is a local directory"));
        assert_eq!(say(&[offer(0, false, 9, None), offer(1, false, 5, None)]), (1, "it has to read least"));
        assert_eq!(
            say(&[offer(0, true, 5, None), offer(1, true, 5, None)]),
            (0, "the first of several that are alike")
        );
        assert_eq!(
            say(&[offer(0, true, 1, Some(5)), offer(1, false, 9, Some(6))]),
            (1, "no other that answers gets as far")
        );
        let three = [offer(0, true, 9, None), offer(1, true, 5, None), offer(2, false, 1, None)];
        assert_eq!(say(&three), (1, "it is local, and has to read least"));
        assert_eq!(best(&[]), None);
    }

    fn size() -> SegmentSize {
        SegmentSize::new(1 << 20).unwrap()
    }

    fn branch(timeline: u32) -> Branch {
        Branch::first(TimelineId::new(timeline).unwrap())
    }

    /// Segments `[0, end)` of timeline 1, and base backups that start in these.
    fn holding(end: u64, bases: &[u64]) -> ClusterInventory {
        let id = ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) };
        let mut inventory = ClusterInventory::new(id);
        inventory.segment_size = Some(size());
        let mut wal = BranchInventory::new(branch(1));
        for segment in 0..end {
            let segment = SegmentNumber::new(segment);
            wal.pieces.push(WalPiece {
                segment,
                from: 0,
                to: 1 << 20,
                place: Place::Wal,
                token: None,
                object_len: 100,
            });
        }
        inventory.branches.insert(branch(1), wal);
        for base in bases {
            let at = Timestamp::from_second(i64::try_from(*base).unwrap() * 100).unwrap();
            inventory.backups.push(BackupInfo {
                label: BackupLabel::at(at),
                system: SystemId::new(7),
                branch: branch(1),
                timeline: TimelineId::FIRST,
                start: SegmentNumber::new(*base).start(size()).advance(40),
                stop: SegmentNumber::new(*base).start(size()).advance(500),
                started_at: at,
                stopped_at: at,
                server_version: 150018,
                segment_size: size(),
                bytes: 1000,
                stored_bytes: 500,
                files: 1,
                tablespaces: Vec::new(),
                flagged: None,
                parameters: ServerParameters::default(),
            });
        }
        inventory
    }

    fn asked(candidates: &[(bool, &ClusterInventory)], point: Point) -> Vec<usize> {
        let candidates: Vec<Candidate<'_>> =
            candidates.iter().map(|(local, inventory)| Candidate { local: *local, inventory }).collect();
        let target = Target { point, exclusive: false, ..a_target() };
        order(&candidates, &target, &options())
    }

    fn a_target() -> Target {
        let reading =
            crate::plan::TargetReading { now: Timestamp::UNIX_EPOCH, local: jiff::tz::TimeZone::UTC, tz: None };
        Target::parse("latest", false, &reading).unwrap()
    }

    fn options() -> Options {
        Options { timeline: TimelineChoice::Latest, backup: None, allow_flagged: false }
    }

    #[test]
    fn who_is_asked_first() {
        let (short, long, fresh) = (holding(5, &[1]), holding(9, &[1]), holding(9, &[1, 7]));
        // The newest WAL counts for `latest`, whatever it costs.
        assert_eq!(asked(&[(true, &short), (false, &long)], Point::Latest), [1, 0]);
        // Else what is local; else what has the newer base backup; else the order they have.
        let at = |segment: u64| Point::Lsn(SegmentNumber::new(segment).start(size()).advance(600));
        assert_eq!(asked(&[(false, &fresh), (true, &short)], at(4)), [1, 0]);
        assert_eq!(asked(&[(false, &long), (false, &fresh)], at(8)), [1, 0]);
        assert_eq!(asked(&[(false, &long), (false, &fresh)], at(4)), [0, 1]);
    }

    /// A plan as far as choosing reads it.
    fn a_plan(inventory: &ClusterInventory, stop: Lsn) -> RestorePlan {
        use crate::plan::{EndOfWal, Outcome, Planning};
        let target = Target { point: Point::Immediate, ..a_target() };
        let planning = Planning::begin(inventory, &target, &options()).unwrap();
        let base = &inventory.backups[0];
        let end = EndOfWal { last_record: Some((base.stop, base.stop.advance(50))), damage: None };
        let mut plan = match planning.finish(&end) {
            Outcome::Yes(plan) => plan,
            other => panic!("no plan: {other:?}"),
        };
        plan.stop = Stop::At(crate::plan::StopAt { record: stop, inclusive: true, needed_to: stop.advance(50) });
        *plan
    }

    #[test]
    fn p2_a_repository_that_missed_a_failover_does_not_answer_for_it() {
        let old = holding(9, &[1]);
        let mut new = holding(4, &[1]);
        let fork = SegmentNumber::new(3).start(size()).advance(1000);
        let mut child = BranchInventory::new(branch(2));
        child.history = TimelineHistory::parse(TimelineId::new(2).unwrap(), format!("1\t{fork}\tx\n").as_bytes()).ok();
        let segment = SegmentNumber::new(3);
        child.pieces.push(WalPiece { segment, from: 0, to: 1 << 20, place: Place::Wal, token: None, object_len: 9 });
        new.branches.insert(branch(2), child);
        let behind = a_plan(&old, SegmentNumber::new(5).start(size()));
        assert_eq!(outdated(&behind, &options(), &old, &[&new]), Some(branch(2)));
        assert_eq!(outdated(&behind, &options(), &new, &[&old]), None, "who knows the timeline has considered it");
        let before = a_plan(&old, SegmentNumber::new(2).start(size()));
        assert_eq!(outdated(&before, &options(), &old, &[&new]), None, "before the fork both are the same");
        let named = Options { timeline: TimelineChoice::Number(TimelineId::FIRST), ..options() };
        assert_eq!(outdated(&behind, &named, &old, &[&new]), None, "who names it gets it");
    }

    #[test]
    fn what_another_repository_would_cost_is_known_by_its_names() {
        let long = holding(9, &[1]);
        let plan = a_plan(&long, SegmentNumber::new(8).start(size()).advance(700));
        assert_eq!(estimate(&long, &plan), Some(500 + 8 * 100));
        assert_eq!(estimate(&holding(9, &[1, 7]), &plan), Some(500 + 2 * 100));
        assert_eq!(estimate(&holding(8, &[1]), &plan), None, "it does not get there");
        assert_eq!(estimate(&holding(9, &[]), &plan), None);
    }
}
