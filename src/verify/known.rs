//! What was found whole, and when: rows of stretches. Pure.
//!
//! What always holds: a stretch says of each object in it that it was found whole at its time or later, never more. So joining
//! takes the older time, and what is not known is not read.

use std::collections::BTreeMap;

use crate::catalog::verification::{ReadRow, Row};

/// Stretches that are kept at most: some 30 bytes each in a result.
const STRETCHES: usize = 20_000;
const DAY: i64 = 86_400;

/// See the module. Times are seconds since 1970.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known(BTreeMap<Row, BTreeMap<u64, (u64, i64)>>);

impl Known {
    /// As a result says. What overlaps is a mistake of whoever wrote it; the first one counts.
    pub fn of(rows: &[ReadRow]) -> Known {
        let mut known = Known::default();
        for row in rows {
            let mut end = 0;
            for (from, to, at) in &row.read {
                if *from >= end && from < to {
                    known.0.entry(row.row).or_default().insert(*from, (*to, *at));
                    end = *to;
                }
            }
        }
        known
    }

    /// As a result says it.
    pub fn rows(&self) -> Vec<ReadRow> {
        let stretches = |of: &BTreeMap<u64, (u64, i64)>| of.iter().map(|(from, (to, at))| (*from, *to, *at)).collect();
        self.0.iter().map(|(row, of)| ReadRow { row: *row, read: stretches(of) }).collect()
    }

    /// Since when all of `[from, to)` was found whole; `None`: not all of it was.
    pub fn read_at(&self, row: Row, from: u64, to: u64) -> Option<i64> {
        let of = self.0.get(&row)?;
        let (mut at, mut oldest) = (from, i64::MAX);
        while at < to {
            let (_, (end, read)) = of.range(..=at).next_back().filter(|(_, (end, _))| *end > at)?;
            (at, oldest) = (*end, oldest.min(*read));
        }
        (from < to).then_some(oldest)
    }

    /// `[from, to)` was found whole.
    pub fn whole(&mut self, row: Row, mut from: u64, mut to: u64, at: i64) {
        if from >= to {
            return;
        }
        self.forget(row, from, to);
        let of = self.0.entry(row).or_default();
        if let Some((begin, (end, read))) = of.range(..from).next_back().map(|(begin, of)| (*begin, *of))
            && end == from
            && read == at
        {
            of.remove(&begin);
            from = begin;
        }
        if let Some((end, read)) = of.get(&to).copied()
            && read == at
        {
            of.remove(&to);
            to = end;
        }
        of.insert(from, (to, at));
    }

    /// Nothing is known of `[from, to)` any more.
    pub fn forget(&mut self, row: Row, from: u64, to: u64) {
        let Some(of) = self.0.get_mut(&row) else { return };
        let first = of.range(..=from).next_back().map_or(from, |(begin, _)| *begin);
        let touched: Vec<(u64, (u64, i64))> = of.range(first..to).map(|(begin, of)| (*begin, *of)).collect();
        for (begin, (end, at)) in touched.into_iter().filter(|(_, (end, _))| *end > from) {
            of.remove(&begin);
            if begin < from {
                of.insert(begin, (from, at));
            }
            if end > to {
                of.insert(to, (end, at));
            }
        }
        if of.is_empty() {
            self.0.remove(&row);
        }
    }

    /// Leaves what lies within these bounds of each row: what is gone need not be remembered.
    pub fn within(&mut self, bounds: &BTreeMap<Row, (u64, u64)>) {
        let rows: Vec<Row> = self.0.keys().copied().collect();
        for row in rows {
            match bounds.get(&row) {
                None => drop(self.0.remove(&row)),
                Some((from, to)) => {
                    self.forget(row, 0, *from);
                    self.forget(row, *to, u64::MAX);
                }
            }
        }
    }

    /// How many stretches there are.
    pub fn count(&self) -> usize {
        self.0.values().map(BTreeMap::len).sum()
    }

    /// Joins stretches that touch, at the older time, until there are few enough: of a day first, then of a month, then all;
    /// where that is not enough, the rows that have most of them are forgotten.
    pub fn condense(&mut self) {
        self.condense_to(STRETCHES);
    }

    fn condense_to(&mut self, most: usize) {
        for grain in [DAY, 30 * DAY, i64::MAX] {
            if self.count() <= most {
                return;
            }
            for of in self.0.values_mut() {
                let mut joined: Vec<(u64, u64, i64)> = Vec::new();
                for (from, (to, at)) in std::mem::take(of) {
                    match joined.last_mut() {
                        Some((_, end, known)) if *end == from && known.div_euclid(grain) == at.div_euclid(grain) => {
                            (*end, *known) = (to, at.min(*known));
                        }
                        _ => joined.push((from, to, at)),
                    }
                }
                of.extend(joined.into_iter().map(|(from, to, at)| (from, (to, at))));
            }
        }
        while self.count() > most {
            let Some((row, _)) = self.0.iter().max_by_key(|(_, of)| of.len()).map(|(row, of)| (*row, of.len())) else {
                return;
            };
            self.0.remove(&row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Branch;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn row(number: u32) -> Row {
        Row::Wal(Branch::first(crate::types::TimelineId::new(number + 1).unwrap()))
    }

    proptest! {
        /// Against a model that remembers every position on its own.
        #[test]
        fn what_is_known_is_what_was_read(
            steps in vec((0u32..2, 0u64..40, 1u64..12, prop_oneof![3 => Just(true), 1 => Just(false)], 0i64..5), 0..40),
            asks in vec((0u32..2, 0u64..40, 1u64..12), 20),
        ) {
            let mut known = Known::default();
            let mut model = [[None::<i64>; 64]; 2];
            for (of, from, len, whole, at) in steps {
                let at = at * DAY;
                match whole {
                    true => known.whole(row(of), from, from + len, at),
                    false => known.forget(row(of), from, from + len),
                }
                for place in from..from + len {
                    model[of as usize][place as usize] = whole.then_some(at);
                }
            }
            let again = Known::of(&known.rows());
            prop_assert_eq!(&again, &known);
            let mut condensed = known.clone();
            condensed.condense_to(3);
            prop_assert!(condensed.count() <= 3);
            for (of, from, len) in asks {
                let want = model[of as usize][from as usize..(from + len) as usize].iter().copied()
                    .try_fold(i64::MAX, |oldest, at| Some(oldest.min(at?)));
                prop_assert_eq!(known.read_at(row(of), from, from + len), want);
                // Condensed it never says more.
                if let Some(said) = condensed.read_at(row(of), from, from + len) {
                    prop_assert!(want.is_some_and(|want| said <= want));
                }
            }
            let mut less = known.clone();
            less.within(&BTreeMap::from([(row(0), (5, 20))]));
            for place in 0..60 {
                let there = less.read_at(row(0), place, place + 1);
                let want = known.read_at(row(0), place, place + 1).filter(|_| (5..20).contains(&place));
                prop_assert_eq!(there, want);
                prop_assert_eq!(less.read_at(row(1), place, place + 1), None);
            }
        }
    }

    #[test]
    fn what_is_read_in_order_is_one_stretch() {
        let mut known = Known::default();
        for place in 0..100_000 {
            known.whole(row(0), place * 16, place * 16 + 16, 7);
        }
        assert_eq!((known.count(), known.read_at(row(0), 5, 1_000_000)), (1, Some(7)));
    }
}
