//! What something that is wrong costs: the base backups that need it, and the instants that cannot be reached without it, with
//! all else whole. Pure.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::catalog::inventory::{BranchInventory, ClusterInventory, Run};
use crate::catalog::layout::ClusterObject;
use crate::catalog::survey::{Survey, condensed, runs_of};
use crate::catalog::verification::{Finding, Lost, Row};
use crate::plan::Path;
use crate::plan::chain::Chain;
use crate::types::{BackupLabel, Branch, Lsn};

/// Each costs a look at every base backup; of more than so many findings only the base backups are named.
const COSTED: usize = 100;

pub(super) type Reach = BTreeMap<Branch, Vec<Run>>;

/// Which positions of each branch can be reached from a sound base backup.
pub(super) fn reach(inventory: &ClusterInventory, lost: &BTreeSet<BackupLabel>) -> Reach {
    let mut reach = Reach::new();
    for branch in inventory.branches.keys() {
        let Some(path) = Path::of(inventory, *branch) else { continue };
        let begins = path.branches().last().map_or(Lsn::ZERO, |(_, from, _)| *from);
        let mut runs: Vec<Run> = Vec::new();
        for backup in inventory.backups.iter().filter(|known| known.flagged.is_none() && !lost.contains(&known.label)) {
            let Ok(chain) = Chain::build(inventory, backup, &path) else { continue };
            let run = Run { from: backup.stop.max(begins), to: chain.held_to };
            if chain.path.tip == *branch && run.from < run.to {
                runs.push(run);
            }
        }
        runs.sort_by_key(|run| (run.from, run.to));
        reach.insert(*branch, runs);
    }
    reach
}

/// What is in `whole` and not in `harmed`; both are in order of their beginnings.
fn lost(whole: &[Run], harmed: &[Run]) -> Vec<Run> {
    let mut lost: Vec<Run> = Vec::new();
    for run in whole {
        let mut at = run.from.max(lost.last().map_or(Lsn::ZERO, |last| last.to));
        for held in harmed {
            if held.from > at && at < run.to {
                lost.push(Run { from: at, to: held.from.min(run.to) });
            }
            at = at.max(held.to);
        }
        if at < run.to {
            lost.push(Run { from: at, to: run.to });
        }
    }
    lost
}

/// A branch's WAL without `[from, to)`, but for what other objects hold of it.
fn without(survey: &Survey, branch: Branch, from: Lsn, to: Lsn) -> ClusterInventory {
    let mut inventory = survey.inventory.clone();
    let Some(size) = inventory.segment_size else { return inventory };
    let begins = |segment: crate::types::SegmentNumber, offset: u32| segment.start(size).advance(u64::from(offset));
    let objects = survey.wal.get(&branch).map(Vec::as_slice).unwrap_or_default();
    let first = objects.partition_point(|object| object.segment < from.segment(size));
    let others = objects.iter().skip(first).take_while(|object| object.segment.start(size) < to);
    let others =
        others.filter(|object| (begins(object.segment, object.from), begins(object.segment, object.to)) != (from, to));
    let held = runs_of(others, size);
    if let Some(known) = inventory.branches.get_mut(&branch) {
        let mut left = Vec::new();
        for run in known.runs(size) {
            left.push(Run { from: run.from, to: run.to.min(from) });
            left.push(Run { from: run.from.max(to), to: run.to });
        }
        left.extend(held);
        left.retain(|run| run.from < run.to);
        left.sort_by_key(|run| (run.from, run.to));
        known.pieces = condensed(left, size);
    }
    inventory
}

/// A branch's WAL with `[from, to)`.
fn with(survey: &Survey, branch: Branch, from: Lsn, to: Lsn) -> ClusterInventory {
    let mut inventory = survey.inventory.clone();
    let Some(size) = inventory.segment_size else { return inventory };
    let known = inventory.branches.entry(branch).or_insert_with(|| BranchInventory::new(branch));
    let mut runs = known.runs(size);
    runs.push(Run { from, to });
    runs.sort_by_key(|run| (run.from, run.to));
    known.pieces = condensed(runs, size);
    inventory.gaps.retain(|gap| gap.branch != branch || gap.to <= from || to <= gap.from);
    inventory
}

/// Base backups that name a pack or a piece.
pub fn backups_of(survey: &Survey, object: &ClusterObject) -> Vec<BackupLabel> {
    let (packs, place) = match object {
        ClusterObject::Pack(name) => (true, survey.places_of_pack(*name)),
        ClusterObject::Part(name) => (false, survey.places_of_part(*name)),
        _ => return Vec::new(),
    };
    let names = |label: &&BackupLabel| {
        let Some(references) = survey.manifests.get(label) else { return false };
        let listed = if packs { &references.packs } else { &references.parts };
        let is_listed = u32::try_from(place.start).is_ok_and(|at| listed.binary_search(&at).is_ok());
        !place.is_empty() && is_listed || references.absent.iter().any(|absent| absent.object == *object)
    };
    survey.manifests.keys().filter(names).copied().collect()
}

/// When the WAL at a position was put.
fn about(survey: &Survey, branch: Branch, at: Lsn, last: bool) -> Option<Timestamp> {
    let size = survey.inventory.segment_size?;
    let objects = survey.wal.get(&branch)?;
    let next = objects.partition_point(|object| object.segment.start(size) <= at);
    let near = if last { next.checked_sub(1) } else { next.checked_sub(1).or(Some(0)) };
    Timestamp::from_second(objects.get(near?)?.put_at).ok()
}

/// Fills in what findings cost.
pub fn cost(survey: &Survey, findings: &mut [Finding]) {
    let none = BTreeSet::new();
    let whole = reach(&survey.inventory, &none);
    for (number, finding) in findings.iter_mut().enumerate() {
        let object = crate::catalog::layout::Name::parse(&finding.object).ok().map(|name| name.object);
        let object = match object {
            Some(crate::catalog::layout::Object::Of(_, object)) => Some(object),
            _ => None,
        };
        if let Some(object) = &object {
            finding.backups.extend(backups_of(survey, object));
        }
        finding.backups.sort_unstable();
        finding.backups.dedup();
        if number >= COSTED {
            continue;
        }
        let row = object.as_ref().and_then(|object| Row::of(object, survey.inventory.segment_size));
        let (before, after) = match (finding.hole, row) {
            (Some((branch, from, to)), _) => (Some(reach(&with(survey, branch, from, to), &none)), whole.clone()),
            (None, Some((Row::Wal(branch), from, to))) => {
                (None, reach(&without(survey, branch, Lsn::new(from), Lsn::new(to)), &none))
            }
            _ if !finding.backups.is_empty() => {
                (None, reach(&survey.inventory, &finding.backups.iter().copied().collect()))
            }
            _ => continue,
        };
        for (branch, runs) in before.as_ref().unwrap_or(&whole) {
            for run in lost(runs, after.get(branch).map(Vec::as_slice).unwrap_or_default()) {
                let Run { from, to } = run;
                let (from_about, to_about) = (about(survey, *branch, from, false), about(survey, *branch, to, true));
                finding.instants.push(Lost { branch: *branch, from, to, from_about, to_about });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Position by position.
        #[test]
        fn what_is_lost_was_there_and_is_not_any_more(
            whole in proptest::collection::vec((0u64..60, 1u64..20), 0..6),
            harmed in proptest::collection::vec((0u64..60, 1u64..20), 0..6),
        ) {
            let runs = |of: &[(u64, u64)]| {
                let mut runs: Vec<Run> =
                    of.iter().map(|(from, len)| Run { from: Lsn::new(*from), to: Lsn::new(from + len) }).collect();
                runs.sort_by_key(|run| (run.from, run.to));
                runs
            };
            let (whole, harmed) = (runs(&whole), runs(&harmed));
            let found = lost(&whole, &harmed);
            let holds = |of: &[Run], at: u64| of.iter().filter(|run| run.from.get() <= at && at < run.to.get()).count();
            for at in 0..90 {
                let want = usize::from(holds(&whole, at) > 0 && holds(&harmed, at) == 0);
                prop_assert_eq!(holds(&found, at), want, "at {}: {:?}", at, found);
            }
        }
    }
}
