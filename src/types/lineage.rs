use std::collections::BTreeMap;

use super::{Branch, TimelineId};

/// Which history of each timeline number is meant along one path. A timeline that is not mentioned means its first
/// history: so it is where no number was ever used twice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Lineage {
    /// Those that are not first ones.
    ordinals: BTreeMap<TimelineId, u16>,
}

impl Lineage {
    /// The history of this timeline that is meant.
    pub fn branch(&self, timeline: TimelineId) -> Branch {
        Branch { timeline, ordinal: self.ordinals.get(&timeline).copied().unwrap_or(0) }
    }

    /// From now on `branch` is the history of its timeline.
    pub fn set(&mut self, branch: Branch) {
        match branch.ordinal {
            0 => self.ordinals.remove(&branch.timeline),
            ordinal => self.ordinals.insert(branch.timeline, ordinal),
        };
    }

    /// The same, and `branch`.
    #[must_use]
    pub fn with(mut self, branch: Branch) -> Lineage {
        self.set(branch);
        self
    }

    /// What it says of the timelines before this one: of its ancestors.
    #[must_use]
    pub fn before(&self, timeline: TimelineId) -> Lineage {
        let ordinals = self.ordinals.range(..timeline).map(|(timeline, ordinal)| (*timeline, *ordinal)).collect();
        Lineage { ordinals }
    }

    /// The branches that are not their timeline's first history, oldest first.
    pub fn second_histories(&self) -> impl Iterator<Item = Branch> {
        self.ordinals.iter().map(|(timeline, ordinal)| Branch { timeline: *timeline, ordinal: *ordinal })
    }
}

impl FromIterator<Branch> for Lineage {
    fn from_iter<I: IntoIterator<Item = Branch>>(branches: I) -> Lineage {
        branches.into_iter().fold(Lineage::default(), Lineage::with)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_that_is_not_mentioned_is_its_first_history() {
        let branch = |text: &str| text.parse::<Branch>().unwrap();
        let lineage: Lineage = [branch("00000001"), branch("00000002.1"), branch("00000004.3")].into_iter().collect();
        let on = |number| lineage.branch(TimelineId::new(number).unwrap()).to_string();
        assert_eq!([on(1), on(2), on(3), on(4)], ["00000001", "00000002.1", "00000003", "00000004.3"]);
        let before = lineage.before(TimelineId::new(4).unwrap());
        assert_eq!(before.second_histories().collect::<Vec<_>>(), [branch("00000002.1")]);
        assert_eq!(before.with(branch("00000002")), Lineage::default());
    }
}
