//! Whether a history of events is whole: what was removed, changed, exchanged or rolled back. Pure.
//!
//! It is judged by what events say of each other, and by heads that somebody kept outside of the repository. What nobody names,
//! here or outside, may be gone without a trace: that is the newest event of each writer at most.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use super::{Content, EventHead, Listed};
use crate::types::{Digest, Id128};

/// Something that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "finding", rename_all = "kebab-case")]
pub enum Finding {
    /// Numbers of a writer are missing, though there are later ones.
    Missing {
        /// Whose.
        writer: Id128,
        /// The first one.
        from: u32,
        /// The last one.
        to: u32,
    },
    /// An event is there and does not open.
    Unreadable {
        /// Whose.
        writer: Id128,
        /// Which.
        number: u32,
        /// Why.
        why: String,
    },
    /// An event stands under another's name.
    Moved {
        /// Whose name.
        writer: Id128,
        /// Which.
        number: u32,
    },
    /// There are two of one number.
    SecondHead {
        /// Whose.
        writer: Id128,
        /// Which.
        number: u32,
    },
    /// It opens, and is not what another event names.
    Changed {
        /// Whose.
        writer: Id128,
        /// Which.
        number: u32,
        /// The event that names another content.
        by: Named,
    },
    /// Another event names it, and it is gone.
    Gone {
        /// Whose.
        writer: Id128,
        /// Which.
        number: u32,
        /// The event that names it.
        by: Named,
    },
    /// A head that was kept outside is not there any more.
    RolledBack {
        /// Whose.
        writer: Id128,
        /// Which.
        number: u32,
        /// The last one of this writer that is there.
        last: Option<u32>,
    },
    /// Where a head that was kept outside should be is another content.
    Replaced {
        /// Whose.
        writer: Id128,
        /// Which.
        number: u32,
    },
}

/// An event that names another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Named {
    /// Whose.
    pub writer: Id128,
    /// Which.
    pub number: u32,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::Missing { writer, from, to } if from == to => {
                write!(f, "REMOVED: event {from} of writer {writer} is missing, and later ones are there")
            }
            Finding::Missing { writer, from, to } => {
                write!(f, "REMOVED: events {from} to {to} of writer {writer} are missing, and later ones are there")
            }
            Finding::Unreadable { writer, number, why } => {
                write!(f, "CHANGED: event {number} of writer {writer} does not open: {why}")
            }
            Finding::Moved { writer, number } => {
                write!(f, "REORDERED: under the name of event {number} of writer {writer} stands another object")
            }
            Finding::SecondHead { writer, number } => {
                write!(f, "SECOND HEAD: there are two contents of event {number} of writer {writer}")
            }
            Finding::Changed { writer, number, by } => {
                write!(f, "CHANGED: event {number} of writer {writer} is not the one that event {by} names")
            }
            Finding::Gone { writer, number, by } => {
                write!(f, "REMOVED: event {number} of writer {writer} is gone; event {by} names it")
            }
            Finding::RolledBack { writer, number, last } => {
                write!(f, "ROLLED BACK: event {number} of writer {writer} was there, ")?;
                match last {
                    Some(last) => write!(f, "and the last one now is {last}"),
                    None => f.write_str("and now none of this writer is"),
                }
            }
            Finding::Replaced { writer, number } => {
                write!(f, "CHANGED: event {number} of writer {writer} is not the one whose head was given")
            }
        }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of writer {}", self.number, self.writer)
    }
}

/// Everything that does not fit, without repeats. `outside` are heads that were kept elsewhere.
pub fn verify(events: &[Listed], outside: &[EventHead]) -> Vec<Finding> {
    let mut findings = BTreeSet::new();
    // What is there, and its digest where that is known.
    let mut there: BTreeMap<(Id128, u32), Option<Digest>> = BTreeMap::new();
    for Listed { writer, number, content } in events {
        let (writer, number) = (*writer, *number);
        let digest = match content {
            Content::Opened { record, .. } if (record.writer, record.number) != (writer, number) => {
                findings.insert(Finding::Moved { writer, number });
                None
            }
            Content::Opened { digest, .. } => Some(*digest),
            Content::OfAnotherName => {
                findings.insert(Finding::Moved { writer, number });
                None
            }
            Content::TwoContents => {
                findings.insert(Finding::SecondHead { writer, number });
                None
            }
            Content::Unreadable(why) => {
                findings.insert(Finding::Unreadable { writer, number, why: why.clone() });
                None
            }
        };
        match there.insert((writer, number), digest) {
            Some(Some(other)) if digest.is_some_and(|digest| digest != other) => {
                findings.insert(Finding::SecondHead { writer, number });
            }
            _ => {}
        }
    }
    let mut expected: BTreeMap<Id128, u32> = BTreeMap::new();
    for (writer, number) in there.keys().copied() {
        let next = expected.entry(writer).or_insert(1);
        if *next < number {
            findings.insert(Finding::Missing { writer, from: *next, to: number - 1 });
        }
        *next = number.saturating_add(1);
    }
    let last = |writer: Id128| expected.get(&writer).map(|next| next - 1); // invariant: next is a number and one
    for Listed { writer, number, content } in events {
        let Content::Opened { record, .. } = content else { continue };
        let by = Named { writer: *writer, number: *number };
        if (record.writer, record.number) != (*writer, *number) {
            continue;
        }
        let before = number.checked_sub(1).filter(|before| *before > 0).zip(record.previous);
        let before = before.map(|(number, digest)| EventHead { writer: *writer, number, digest });
        for EventHead { writer, number, digest } in before.iter().chain(&record.heads).copied() {
            match there.get(&(writer, number)) {
                Some(Some(found)) if *found != digest => {
                    findings.insert(Finding::Changed { writer, number, by });
                }
                Some(_) => {} // fits; or does not open, which is said already
                None if last(writer).is_some_and(|last| last > number) => {} // missing among later ones
                None => {
                    findings.insert(Finding::Gone { writer, number, by });
                }
            }
        }
    }
    for EventHead { writer, number, digest } in outside.iter().copied() {
        match there.get(&(writer, number)) {
            Some(Some(found)) if *found != digest => {
                findings.insert(Finding::Replaced { writer, number });
            }
            Some(_) => {}
            None => {
                findings.insert(Finding::RolledBack { writer, number, last: last(writer) });
            }
        }
    }
    findings.into_iter().collect()
}

/// The newest event of each writer that opens, by when it was written: what to keep outside.
pub fn heads(events: &[Listed]) -> Vec<EventHead> {
    let mut heads: BTreeMap<Id128, (jiff::Timestamp, EventHead)> = BTreeMap::new();
    for Listed { writer, number, content } in events {
        if let Content::Opened { digest, record } = content {
            let head = EventHead { writer: *writer, number: *number, digest: *digest };
            let known = heads.entry(*writer).or_insert((record.at, head));
            if known.1.number <= *number {
                *known = (record.at, head);
            }
        }
    }
    let mut heads: Vec<_> = heads.into_values().collect();
    heads.sort_by_key(|(at, head)| (std::cmp::Reverse(*at), head.writer));
    heads.into_iter().map(|(_, head)| head).collect()
}

/// Heads that no event names: with these outside, nothing can be removed or changed unseen.
pub fn unnamed_heads(events: &[Listed]) -> Vec<EventHead> {
    let mut named = BTreeSet::new();
    for Listed { content, .. } in events {
        if let Content::Opened { record, .. } = content {
            named.extend(record.heads.iter().map(|head| (head.writer, head.number)));
        }
    }
    heads(events).into_iter().filter(|head| !named.contains(&(head.writer, head.number))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::catalog::events::{EventRecord, HEADS, Happened};
    use crate::catalog::records;
    use crate::types::SystemId;

    fn writer(number: u8) -> Id128 {
        Id128::new([number; 16])
    }

    fn digest(record: &EventRecord) -> Digest {
        Digest::of(&records::to_json(record).unwrap())
    }

    fn listed(record: EventRecord) -> Listed {
        let (writer, number, digest) = (record.writer, record.number, digest(&record));
        Listed { writer, number, content: Content::Opened { digest, record: Box::new(record) } }
    }

    /// What these writers write, one after the other; each sees all that is there.
    fn history(by: &[u8]) -> Vec<Listed> {
        let mut events: Vec<Listed> = Vec::new();
        for (at, by) in (0..).zip(by) {
            let own = writer(*by);
            let heads = heads(&events);
            let last = heads.iter().find(|head| head.writer == own);
            let record = EventRecord {
                writer: own,
                number: last.map_or(0, |last| last.number) + 1,
                at: jiff::Timestamp::from_second(at).unwrap(),
                previous: last.map(|last| last.digest),
                heads: heads.iter().filter(|head| head.writer != own).take(HEADS).copied().collect(),
                event: Happened::ClusterCreated { system: SystemId::new(7) },
            };
            events.push(listed(record));
        }
        events
    }

    fn place(event: &Listed) -> (Id128, u32) {
        (event.writer, event.number)
    }

    fn about(finding: &Finding, (whose, which): (Id128, u32)) -> bool {
        match finding {
            Finding::Missing { writer, from, to } => *writer == whose && (*from..=*to).contains(&which),
            Finding::Unreadable { writer, number, .. }
            | Finding::Moved { writer, number }
            | Finding::SecondHead { writer, number }
            | Finding::Changed { writer, number, .. }
            | Finding::Gone { writer, number, .. }
            | Finding::RolledBack { writer, number, .. }
            | Finding::Replaced { writer, number } => (*writer, *number) == (whose, which),
        }
    }

    proptest! {
        #[test]
        fn a_whole_history_has_no_findings(by in prop::collection::vec(0u8..4, 0..20)) {
            let events = history(&by);
            prop_assert_eq!(verify(&events, &heads(&events)), []);
        }

        /// P4: whichever is removed, it shows: in the repository itself, or, of the newest, against its head outside.
        #[test]
        fn p4_a_removed_event_is_named(by in prop::collection::vec(0u8..4, 1..20), which in any::<prop::sample::Index>()) {
            let mut events = history(&by);
            let outside = unnamed_heads(&events);
            let gone = events.remove(which.index(by.len()));
            let findings = verify(&events, &outside);
            prop_assert!(findings.iter().any(|finding| about(finding, place(&gone))), "{findings:?}");
            prop_assert!(findings.iter().all(|finding| about(finding, place(&gone))), "{findings:?}");
        }

        /// Whoever has the meta key can write another event in an event's place; and it shows all the same.
        #[test]
        fn p4_a_changed_event_is_named(by in prop::collection::vec(0u8..4, 1..20), which in any::<prop::sample::Index>()) {
            let mut events = history(&by);
            let outside = unnamed_heads(&events);
            let at = which.index(by.len());
            let Content::Opened { record, .. } = events[at].content.clone() else { panic!() };
            let changed = place(&events[at]);
            events[at] = listed(EventRecord { event: Happened::ClusterCreated { system: SystemId::new(8) }, ..*record });
            let findings = verify(&events, &outside);
            prop_assert!(!findings.is_empty() && findings.iter().all(|finding| about(finding, changed)), "{findings:?}");
        }

        #[test]
        fn p4_a_flipped_or_moved_event_is_named(by in prop::collection::vec(0u8..4, 1..20), which in any::<prop::sample::Index>()) {
            let events = history(&by);
            let at = which.index(by.len());
            let contents = [Content::Unreadable("its tag".to_owned()), Content::OfAnotherName, Content::TwoContents];
            for content in contents {
                let mut events = events.clone();
                events[at].content = content;
                let findings = verify(&events, &heads(&events));
                prop_assert_eq!(findings.len(), 1, "{:?}", &findings);
                prop_assert!(about(&findings[0], place(&events[at])), "{findings:?}");
            }
        }

        /// A repository that was set back to an earlier state is whole in itself. Heads that were kept tell.
        #[test]
        fn p4_a_rolled_back_tail_shows_against_heads_from_outside(
            by in prop::collection::vec(0u8..4, 2..20), left in any::<prop::sample::Index>(),
        ) {
            let mut events = history(&by);
            let last = place(&events[by.len() - 1]);
            let outside = heads(&events);
            events.truncate(left.index(by.len()));
            prop_assert_eq!(verify(&events, &[]), []);
            let findings = verify(&events, &outside);
            prop_assert!(findings.iter().any(|finding| about(finding, last)), "{findings:?}");
            prop_assert!(findings.iter().all(|finding| matches!(finding, Finding::RolledBack { .. })), "{findings:?}");
        }
    }

    #[test]
    fn two_that_exchanged_their_names_are_both_named() {
        let mut events = history(&[1, 1, 1]);
        let (first, second) = (events[0].content.clone(), events[1].content.clone());
        (events[0].content, events[1].content) = (second, first);
        let moved = |number| Finding::Moved { writer: writer(1), number };
        assert_eq!(verify(&events, &[]), [moved(1), moved(2)]);
    }

    #[test]
    fn two_of_one_number_are_a_second_head() {
        let mut events = history(&[1, 2]);
        let Content::Opened { record, .. } = events[0].content.clone() else { panic!() };
        events.push(listed(EventRecord { at: jiff::Timestamp::MAX, ..*record }));
        let findings = verify(&events, &[]);
        assert!(findings.contains(&Finding::SecondHead { writer: writer(1), number: 1 }), "{findings:?}");
    }

    #[test]
    fn heads_read_back_as_they_are_shown() {
        let head = heads(&history(&[3]))[0];
        assert_eq!(head.to_string().parse(), Ok(head));
        for bad in ["", "1:2:3", &head.to_string()[1..], &format!("{head}:1"), &head.to_string().replace(":1:", ":0:")]
        {
            assert!(bad.parse::<EventHead>().is_err(), "{bad}");
        }
    }
}
