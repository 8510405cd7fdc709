//! Which of the archived histories a server continues, and what a new one is called. Pure.
//!
//! System identifier and timeline number do not tell histories apart: two restores of one archive, or a server that was
//! rolled back to an older copy, write other WAL under the same numbers. What is compared is bytes.
//!
//! Invariant (P6): a server continues a branch only where its bytes were equal, or where there was nothing to compare and
//! no other history of that number to mistake it for. Everything else begins a branch with a number that nothing was ever
//! archived under, and what is there stays as it is.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::{Branch, Lineage, TimelineId};

/// A history of one timeline number that a repository holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// What it is called.
    pub branch: Branch,
    /// Which branches its ancestors are.
    pub ancestors: Lineage,
    /// Its history file tells of other forks than the server's.
    pub forked_elsewhere: bool,
}

/// How the bytes of a candidate compare with the server's. The best of several repositories' counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Other bytes.
    Differs,
    /// The server has removed what could have been compared.
    Unknown,
    /// No WAL is held: nothing contradicts.
    Empty,
    /// All that the server has is equal, and the candidate holds more: the server has not gone as far, or not yet.
    Ahead,
    /// All that is held is equal.
    Same,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Compare this branch with the server.
    Compare(Branch),
    /// This is who the server is.
    Decided(Choice),
}

/// Which branch each timeline of the server's path is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// The branches.
    pub lineage: Lineage,
    /// Those that begin now although other histories of their number are archived, oldest first.
    pub begun: Vec<Branch>,
}

/// Decides for a server whose timelines are `path`, oldest first. `candidates` are those of all timelines, of every
/// repository; `named` are all branches that anything was archived of, or that a history file names as an ancestor.
pub fn next(
    path: &[TimelineId],
    candidates: &[Candidate],
    named: &BTreeSet<Branch>,
    verdicts: &BTreeMap<Branch, Verdict>,
) -> Next {
    // The newest timeline of the path that is known decides: it tells its ancestors.
    for (index, timeline) in path.iter().enumerate().rev() {
        let mut best: BTreeMap<Branch, (Verdict, &Lineage)> = BTreeMap::new();
        for candidate in candidates.iter().filter(|candidate| candidate.branch.timeline == *timeline) {
            let verdict = match (candidate.forked_elsewhere, verdicts.get(&candidate.branch)) {
                (true, _) => Verdict::Differs,
                (false, Some(verdict)) => *verdict,
                (false, None) => return Next::Compare(candidate.branch),
            };
            let entry = best.entry(candidate.branch).or_insert((verdict, &candidate.ancestors));
            if verdict > entry.0 {
                *entry = (verdict, &candidate.ancestors);
            }
        }
        let unknown = best.values().filter(|(verdict, _)| *verdict == Verdict::Unknown).count();
        // The first of the best ones; one that cannot be compared only where it is the only such one.
        let found = best.iter().rev().max_by_key(|(_, (verdict, _))| *verdict);
        let found = found.filter(|(_, (verdict, _))| match verdict {
            Verdict::Same | Verdict::Ahead | Verdict::Empty => true,
            Verdict::Unknown => unknown == 1,
            Verdict::Differs => false,
        });
        if let Some((branch, (_, ancestors))) = found {
            let known = ancestors.before(*timeline).with(*branch);
            return Next::Decided(begin(known, path.get(index + 1..).unwrap_or_default(), named));
        }
    }
    Next::Decided(begin(Lineage::default(), path, named))
}

/// The timelines behind those that are known begin branches of their own.
fn begin(mut lineage: Lineage, rest: &[TimelineId], named: &BTreeSet<Branch>) -> Choice {
    let mut begun = Vec::new();
    for timeline in rest {
        let taken = named.iter().filter(|branch| branch.timeline == *timeline).map(|branch| branch.ordinal).max();
        let ordinal = taken.map_or(0, |taken| taken.saturating_add(1));
        let branch = Branch { timeline: *timeline, ordinal };
        lineage.set(branch);
        if ordinal > 0 {
            begun.push(branch);
        }
    }
    Choice { lineage, begun }
}

#[cfg(test)]
mod tests {
    use std::collections::btree_map::Entry;

    use super::*;
    use proptest::prelude::*;

    fn branch(text: &str) -> Branch {
        text.parse().unwrap()
    }

    fn path(numbers: &[u32]) -> Vec<TimelineId> {
        numbers.iter().map(|number| TimelineId::new(*number).unwrap()).collect()
    }

    fn candidate(text: &str, ancestors: &[&str]) -> Candidate {
        let ancestors = ancestors.iter().map(|text| branch(text)).collect();
        Candidate { branch: branch(text), ancestors, forked_elsewhere: false }
    }

    /// Asks until it is decided, with these answers.
    fn decide(numbers: &[u32], candidates: &[Candidate], answers: &[(&str, Verdict)]) -> Choice {
        let named: BTreeSet<Branch> = candidates.iter().map(|candidate| candidate.branch).collect();
        let answers: BTreeMap<Branch, Verdict> = answers.iter().map(|(text, said)| (branch(text), *said)).collect();
        let mut verdicts = BTreeMap::new();
        loop {
            match next(&path(numbers), candidates, &named, &verdicts) {
                Next::Decided(choice) => return choice,
                Next::Compare(branch) => {
                    assert!(verdicts.insert(branch, answers[&branch]).is_none(), "{branch} was asked twice");
                }
            }
        }
    }

    fn chosen(numbers: &[u32], candidates: &[Candidate], answers: &[(&str, Verdict)]) -> Vec<String> {
        let choice = decide(numbers, candidates, answers);
        path(numbers).into_iter().map(|timeline| choice.lineage.branch(timeline).to_string()).collect()
    }

    #[test]
    fn who_is_equal_goes_on_and_who_differs_begins() {
        use Verdict::*;
        let one = [candidate("00000001", &[])];
        assert_eq!(chosen(&[1], &[], &[]), ["00000001"], "an empty repository");
        assert_eq!(chosen(&[1], &one, &[("00000001", Same)]), ["00000001"]);
        assert_eq!(chosen(&[1], &one, &[("00000001", Unknown)]), ["00000001"], "there is nobody to mistake it for");
        assert_eq!(chosen(&[1], &one, &[("00000001", Differs)]), ["00000001.1"]);
        assert_eq!(decide(&[1], &one, &[("00000001", Differs)]).begun, [branch("00000001.1")]);
        let two = [candidate("00000001", &[]), candidate("00000001.1", &[])];
        let both = |first, second| chosen(&[1], &two, &[("00000001", first), ("00000001.1", second)]);
        assert_eq!(both(Differs, Same), ["00000001.1"]);
        assert_eq!(both(Same, Differs), ["00000001"]);
        assert_eq!(both(Differs, Differs), ["00000001.2"]);
        assert_eq!(both(Unknown, Unknown), ["00000001.2"], "either could be meant: neither is");
        assert_eq!(both(Unknown, Empty), ["00000001.1"], "what holds nothing contradicts nothing");
        assert_eq!(both(Ahead, Same), ["00000001.1"]);
        assert_eq!(both(Ahead, Differs), ["00000001"]);
    }

    #[test]
    fn a_child_tells_its_ancestors() {
        use Verdict::*;
        let all = [
            candidate("00000001", &[]),
            candidate("00000002", &[]),
            candidate("00000002.1", &[]),
            candidate("00000003", &["00000002.1"]),
        ];
        assert_eq!(chosen(&[1, 2, 3], &all, &[("00000003", Same)]), ["00000001", "00000002.1", "00000003"]);
        // A second timeline 3, promoted from the first timeline 2.
        let answers = [("00000003", Differs), ("00000002", Same), ("00000002.1", Differs)];
        assert_eq!(chosen(&[1, 2, 3], &all, &answers), ["00000001", "00000002", "00000003.1"]);
        assert_eq!(decide(&[1, 2, 3], &all, &answers).begun, [branch("00000003.1")]);
        // Its history file says so without a comparison.
        let mut elsewhere = all.clone();
        elsewhere[3].forked_elsewhere = true;
        assert_eq!(chosen(&[1, 2, 3], &elsewhere, &answers[1..]), ["00000001", "00000002", "00000003.1"]);
    }

    #[test]
    fn a_number_that_only_a_descendant_names_is_taken() {
        let named = BTreeSet::from([branch("00000001"), branch("00000002")]);
        let Next::Decided(choice) = next(&path(&[1]), &[], &named, &BTreeMap::new()) else { panic!("a question") };
        assert_eq!(choice.lineage.branch(TimelineId::FIRST), branch("00000001.1"));
    }

    proptest! {
        /// Whoever comes: a branch that differs is never continued, a number that is taken never begun, and the same
        /// server is found again.
        #[test]
        fn p6_never_continues_what_differs_and_finds_itself_again(
            said in proptest::collection::vec(0u8..5, 0..6),
            numbers in proptest::collection::vec(1u32..4, 6),
        ) {
            let verdict = |said: u8| [Verdict::Differs, Verdict::Unknown, Verdict::Empty, Verdict::Ahead, Verdict::Same][said as usize];
            let mut ordinals = [0u16; 4];
            let mut candidates = Vec::new();
            let mut verdicts = BTreeMap::new();
            for (said, number) in said.into_iter().zip(numbers) {
                let branch = Branch { timeline: TimelineId::new(number).unwrap(), ordinal: ordinals[number as usize] };
                ordinals[number as usize] += 1;
                candidates.push(Candidate { branch, ancestors: Lineage::default(), forked_elsewhere: false });
                verdicts.insert(branch, verdict(said));
            }
            let mut named: BTreeSet<Branch> = candidates.iter().map(|candidate| candidate.branch).collect();
            let path = path(&[1, 2, 3]);
            let Next::Decided(choice) = next(&path, &candidates, &named, &verdicts) else { panic!("all was answered") };
            let tip = choice.lineage.branch(path[2]);
            prop_assert_ne!(verdicts.get(&tip), Some(&Verdict::Differs));
            for begun in &choice.begun {
                prop_assert!(!named.contains(begun) && begun.ordinal > 0);
            }
            // Its first bytes are archived now.
            if let Entry::Vacant(unknown) = verdicts.entry(tip) {
                candidates.push(Candidate { branch: tip, ancestors: choice.lineage.before(tip.timeline), forked_elsewhere: false });
                unknown.insert(Verdict::Same);
                named.insert(tip);
                let again = next(&path, &candidates, &named, &verdicts);
                prop_assert_eq!(again, Next::Decided(Choice { lineage: choice.lineage, begun: Vec::new() }));
            }
        }
    }
}
