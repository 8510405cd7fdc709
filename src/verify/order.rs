//! Which objects there are to read, and which are read next. Pure.
//!
//! First what belongs to the open segment and what nobody has read yet, then what was read longest ago. An object and its copies
//! are one: it is whole when one of them opens. What belongs to the open segment changes and goes: it is read each time, and
//! never remembered.

use std::collections::BTreeMap;

use jiff::SignedDuration;

use super::known::Known;
use crate::catalog::inventory::Place;
use crate::catalog::layout::{ClusterObject, Name, Object};
use crate::catalog::survey::{Survey, WalObject};
use crate::catalog::verification::Row;
use crate::types::{Branch, ClusterId};

const DAY: i64 = 86_400;

/// An object and its copies, by the place of the first of them in the survey.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    which: Which,
    copies: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Which {
    Wal(Branch, u32),
    Part(u32),
    Pack(u32),
    Index(u32),
}

/// How much is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Everything is read once within so long, a share each day; `None`: everything now.
    pub within: Option<SignedDuration>,
    /// Bytes at most; one object is read in any case.
    pub budget: Option<u64>,
}

/// What is known of all that is there, the open segment aside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those that were never found whole.
    pub unread_objects: u64,
    /// Their bytes.
    pub unread_bytes: u64,
    /// When the one was read that was read longest ago, in seconds since 1970.
    pub oldest_read: Option<i64>,
}

fn grouped<T>(all: &[T], same: impl Fn(&T, &T) -> bool, which: impl Fn(u32) -> Which) -> Vec<Item> {
    let (mut items, mut at) = (Vec::new(), 0u32);
    for group in all.chunk_by(|a, b| same(a, b)) {
        let copies = u32::try_from(group.len()).unwrap_or(u32::MAX);
        items.push(Item { which: which(at), copies });
        at = at.saturating_add(copies);
    }
    items
}

/// All there is.
pub fn items(survey: &Survey) -> Vec<Item> {
    let mut items = Vec::new();
    for (branch, objects) in &survey.wal {
        let of = |wal: &WalObject| (wal.segment, wal.from, wal.to, wal.place);
        // Tails that begin alike are pieces of their own.
        let same = |a: &WalObject, b: &WalObject| a.place != Place::Tail && of(a) == of(b);
        items.extend(grouped(objects, same, |at| Which::Wal(*branch, at)));
    }
    items.extend(grouped(&survey.parts, |a, b| a.name == b.name, Which::Part));
    items.extend(grouped(&survey.packs, |a, b| a.name == b.name, Which::Pack));
    let of_index = |a: &crate::catalog::survey::IndexObject| (a.branch, a.from, a.to);
    items.extend(grouped(&survey.indexes, |a, b| of_index(a) == of_index(b), Which::Index));
    items
}

impl Item {
    fn range(at: u32, copies: u32) -> std::ops::Range<usize> {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        at..at.saturating_add(usize::try_from(copies).unwrap_or(usize::MAX))
    }

    /// Its name and those of its copies, with their lengths.
    pub fn names(&self, survey: &Survey, cluster: &ClusterId) -> Vec<(Name, u64)> {
        let of = |object, token: &Option<_>| Name { object: Object::Of(cluster.clone(), object), copy: token.clone() };
        match self.which {
            Which::Wal(branch, at) => {
                let Some(size) = survey.inventory.segment_size else { return Vec::new() };
                let objects = survey.wal.get(&branch).and_then(|all| all.get(Item::range(at, self.copies)));
                let named = |wal: &WalObject| Some((wal.name(cluster, branch, size)?, wal.len));
                objects.unwrap_or_default().iter().filter_map(named).collect()
            }
            Which::Part(at) => {
                let parts = survey.parts.get(Item::range(at, self.copies)).unwrap_or_default();
                parts.iter().map(|part| (of(ClusterObject::Part(part.name), &part.token), part.len)).collect()
            }
            Which::Pack(at) => {
                let packs = survey.packs.get(Item::range(at, self.copies)).unwrap_or_default();
                packs.iter().map(|pack| (of(ClusterObject::Pack(pack.name), &pack.token), pack.len)).collect()
            }
            Which::Index(at) => {
                let indexes = survey.indexes.get(Item::range(at, self.copies)).unwrap_or_default();
                indexes.iter().map(|index| (index.name(cluster), index.len)).collect()
            }
        }
    }

    /// Where it is remembered; `None` for what belongs to the open segment.
    pub fn place(&self, survey: &Survey) -> Option<(Row, u64, u64)> {
        let size = survey.inventory.segment_size;
        match self.which {
            Which::Wal(branch, at) => {
                let wal = survey.wal.get(&branch)?.get(usize::try_from(at).ok()?)?;
                let start = wal.segment.start(size?).get();
                let row = (wal.place == Place::Wal).then_some(Row::Wal(branch))?;
                Some((row, start + u64::from(wal.from), start + u64::from(wal.to)))
            }
            Which::Part(at) => Row::of(&ClusterObject::Part(survey.parts.get(usize::try_from(at).ok()?)?.name), size),
            Which::Pack(at) => Row::of(&ClusterObject::Pack(survey.packs.get(usize::try_from(at).ok()?)?.name), size),
            Which::Index(at) => {
                let index = survey.indexes.get(usize::try_from(at).ok()?)?;
                Row::of(&ClusterObject::Index(index.branch, index.from, index.to), size)
            }
        }
    }

    /// Bytes of it and its copies, and when the newest of them was put.
    fn size(&self, survey: &Survey) -> (u64, i64) {
        let sum = |all: &mut dyn Iterator<Item = (u64, i64)>| {
            all.fold((0u64, i64::MIN), |(len, at), (more, put)| (len.saturating_add(more), at.max(put)))
        };
        match self.which {
            Which::Wal(branch, at) => {
                let objects = survey.wal.get(&branch).and_then(|all| all.get(Item::range(at, self.copies)));
                sum(&mut objects.unwrap_or_default().iter().map(|wal| (wal.len, wal.put_at)))
            }
            Which::Part(at) => {
                let parts = survey.parts.get(Item::range(at, self.copies)).unwrap_or_default();
                sum(&mut parts.iter().map(|part| (part.len, part.put_at)))
            }
            Which::Pack(at) => {
                let packs = survey.packs.get(Item::range(at, self.copies)).unwrap_or_default();
                sum(&mut packs.iter().map(|pack| (pack.len, pack.put_at)))
            }
            Which::Index(at) => {
                let indexes = survey.indexes.get(Item::range(at, self.copies)).unwrap_or_default();
                sum(&mut indexes.iter().map(|index| (index.len, i64::MIN)))
            }
        }
    }

    /// Bytes of it and its copies.
    pub fn len(&self, survey: &Survey) -> u64 {
        self.size(survey).0
    }

    /// When it was found whole, unless it, or a copy of it, was put since.
    fn read_at(&self, survey: &Survey, known: &Known) -> Option<i64> {
        let (row, from, to) = self.place(survey)?;
        known.read_at(row, from, to).filter(|at| *at >= self.size(survey).1)
    }
}

/// What is known of all of these.
pub fn coverage(survey: &Survey, items: &[Item], known: &Known) -> Coverage {
    let mut coverage = Coverage::default();
    for item in items.iter().filter(|item| item.place(survey).is_some()) {
        let len = item.len(survey);
        coverage.objects += 1;
        coverage.bytes = coverage.bytes.saturating_add(len);
        match item.read_at(survey, known) {
            Some(at) => coverage.oldest_read = Some(coverage.oldest_read.map_or(at, |oldest| oldest.min(at))),
            None => {
                coverage.unread_objects += 1;
                coverage.unread_bytes = coverage.unread_bytes.saturating_add(len);
            }
        }
    }
    coverage
}

/// What is to be read now, in that order. `failed`: what did not open, and when that was seen: it takes its turn like the others.
pub fn choose(
    survey: &Survey,
    items: &[Item],
    known: &Known,
    failed: &BTreeMap<(Row, u64), i64>,
    now: i64,
    wanted: Wanted,
) -> Vec<Item> {
    let read_at = |item: &Item| {
        let failed = item.place(survey).and_then(|(row, from, _)| failed.get(&(row, from)).copied());
        item.read_at(survey, known).or(failed).unwrap_or(i64::MIN)
    };
    let mut all: Vec<(i64, Item)> = items.iter().map(|item| (read_at(item), *item)).collect();
    all.sort_unstable();
    let total = items.iter().fold(0u64, |sum, item| sum.saturating_add(item.len(survey)));
    let within = wanted.within.map(|within| within.as_secs().max(1));
    // Due a little before its time, and each day a little more than a day's share: a day that is missed is made up for.
    let due_before = within.map(|within| now.saturating_sub(within).saturating_add((2 * DAY).min(within / 2)));
    let share = within.map(|within| {
        let share = u128::from(total) * u128::from(DAY.unsigned_abs()) * 11 / 10 / u128::from(within.unsigned_abs());
        u64::try_from(share).unwrap_or(u64::MAX)
    });
    let (mut chosen, mut bytes, mut remembered) = (Vec::new(), 0u64, 0u64);
    for (read_at, item) in all {
        let is_wanted = match (due_before, share) {
            (Some(due), Some(share)) => read_at <= due || bytes < share && now.saturating_sub(read_at) >= DAY,
            _ => true,
        };
        let len = item.len(survey);
        // What belongs to the open segment is read each time, and is no progress: one object more is, however large.
        let is_remembered = item.place(survey).is_some();
        let fits =
            wanted.budget.is_none_or(|budget| bytes.saturating_add(len) <= budget) || is_remembered && remembered == 0;
        if !is_wanted || !fits {
            break;
        }
        bytes = bytes.saturating_add(len);
        remembered += u64::from(is_remembered);
        chosen.push(item);
    }
    chosen
}

/// From where to where each row reaches.
pub fn bounds(survey: &Survey, items: &[Item]) -> BTreeMap<Row, (u64, u64)> {
    let mut bounds: BTreeMap<Row, (u64, u64)> = BTreeMap::new();
    for (row, from, to) in items.iter().filter_map(|item| item.place(survey)) {
        let known = bounds.entry(row).or_insert((from, to));
        *known = (known.0.min(from), known.1.max(to));
    }
    bounds
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::layout::PackName;
    use crate::catalog::survey::Stored;
    use crate::types::{ClusterId, SystemId};
    use proptest::prelude::*;

    fn survey(lens: &[u64]) -> Survey {
        let mut survey = Survey::new(ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) });
        let label = "20261120T031500Z".parse().unwrap();
        for (number, len) in (1..).zip(lens) {
            survey.packs.push(Stored { name: PackName { label, number }, token: None, len: *len, put_at: 0 });
        }
        survey
    }

    proptest! {
        /// Day by day, with a share each day, nothing is ever older than asked for, whatever the sizes, and no day has much
        /// more to do than another one.
        #[test]
        fn a_share_each_day_keeps_everything_young(lens in proptest::collection::vec(1u64..50, 1..60), days in 5i64..40) {
            let survey = survey(&lens);
            let all = items(&survey);
            let total: u64 = lens.iter().sum();
            let wanted = Wanted { within: Some(SignedDuration::from_hours(days * 24)), budget: None };
            let mut known = Known::default();
            for day in 1..days * 4 {
                let now = day * DAY;
                let chosen = choose(&survey, &all, &known, &BTreeMap::new(), now, wanted);
                let bytes: u64 = chosen.iter().map(|item| item.len(&survey)).sum();
                for item in chosen {
                    let (row, from, to) = item.place(&survey).unwrap();
                    known.whole(row, from, to, now);
                }
                let covered = coverage(&survey, &all, &known);
                prop_assert_eq!(covered.unread_objects, 0);
                prop_assert!(now - covered.oldest_read.unwrap() < days * DAY);
                if day > days * 2 {
                    prop_assert!(bytes <= total * 3 / days.unsigned_abs() + 100, "{bytes} of {total} on day {day}");
                }
            }
        }

        /// Never-read first, then the oldest; a budget is kept to, but for a single object.
        #[test]
        fn the_oldest_come_first(lens in proptest::collection::vec(1u64..50, 1..30), read in proptest::collection::vec(0i64..5, 30), budget in 1u64..300) {
            let survey = survey(&lens);
            let all = items(&survey);
            let mut known = Known::default();
            let when = |item: &Item| item.place(&survey).map(|(_, from, _)| read[usize::try_from(from).unwrap() - 1]).unwrap();
            for item in all.iter().filter(|item| when(item) > 0) {
                let (row, from, to) = item.place(&survey).unwrap();
                known.whole(row, from, to, when(item) * DAY);
            }
            let chosen = choose(&survey, &all, &known, &BTreeMap::new(), 9 * DAY, Wanted { within: None, budget: Some(budget) });
            prop_assert!(chosen.windows(2).all(|two| when(&two[0]) <= when(&two[1])));
            let last = chosen.iter().map(when).max().unwrap();
            prop_assert!(all.iter().filter(|item| when(item) < last).all(|item| chosen.contains(item)));
            let bytes: u64 = chosen.iter().map(|item| item.len(&survey)).sum();
            prop_assert!(bytes <= budget || chosen.len() == 1);
        }
    }

    #[test]
    fn what_failed_takes_its_turn_and_what_was_put_again_is_new() {
        let mut survey = survey(&[10, 10, 10]);
        let (all, mut known) = (items(&survey), Known::default());
        let (row, ..) = all[0].place(&survey).unwrap();
        known.whole(row, 2, 4, 3 * DAY);
        let failed = BTreeMap::from([((row, 1), 4 * DAY)]);
        let wanted = Wanted { within: None, budget: Some(10) };
        let first = |survey: &Survey, known: &Known| {
            let all = items(survey);
            choose(survey, &all, known, &failed, 5 * DAY, wanted)[0].place(survey).unwrap().1
        };
        assert_eq!(first(&survey, &known), 2);
        survey.packs[2].put_at = 4 * DAY;
        assert_eq!(first(&survey, &known), 3);
        assert_eq!(coverage(&survey, &all, &known).unread_objects, 2);
    }
}
