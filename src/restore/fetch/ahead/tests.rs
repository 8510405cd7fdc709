use super::*;
use crate::restore::fetch::decide::{self, Located, Step};
use crate::types::{Branch, Lsn};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const PLENTY: u64 = 1 << 40;

fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn wanted(timeline_number: u32, segment: u64) -> Wanted {
    Wanted { timeline: timeline(timeline_number), segment: SegmentNumber::new(segment) }
}

fn bounds(segments: u64, at_once: usize) -> Bounds {
    Bounds { segments, bytes: PLENTY, at_once, leave_free: 10 * MIB }
}

/// Forks at these positions, in sixteenths of a segment, so that borders are met.
fn way(mut forks: Vec<u64>, until: Option<u64>) -> Way {
    forks.sort_unstable();
    let at = |sixteenth: u64| Lsn::new(sixteenth * (MIB / 16));
    let last = forks.len();
    let step = |index: usize| Step {
        branch: Branch::first(timeline(index as u32 + 1)),
        left_at: forks.get(index).copied().map(at),
    };
    Way { path: (0..=last).map(step).collect(), until: until.map(at), standby: None }
}

/// What a server asks first of a segment: its newest timeline that has begun by then.
fn newest_begun(way: &Way, segment: SegmentNumber) -> TimelineId {
    let begins = std::iter::once(Lsn::ZERO).chain(way.path.iter().filter_map(|step| step.left_at));
    let begun = way.path.iter().zip(begins).filter(|(_, begin)| begin.segment(size()) <= segment);
    begun.last().unwrap().0.branch.timeline
}

proptest! {
    /// The order in which segments are opened is the one in which a server asks, across every fork; all of it may be served
    /// whole, and the way's end is never opened ahead.
    #[test]
    fn what_follows_is_what_a_server_asks_next(
        forks in prop::collection::vec(1_u64..320, 0..4),
        until in prop::option::of(1_u64..400),
    ) {
        let way = way(forks, until);
        let mut at = wanted(1, 0);
        at.timeline = newest_begun(&way, at.segment);
        for _ in 0..30 {
            let next = follows(&way, size(), at);
            let segment = at.segment.next();
            if way.until.is_some_and(|until| until < segment.end(size())) {
                prop_assert_eq!(next, None);
                break;
            }
            prop_assert_eq!(next, Some(Wanted { timeline: newest_begun(&way, segment), segment }));
            at = next.unwrap();
            let located = decide::on_path(at.timeline, at.segment, size(), &way.path, way.until);
            prop_assert!(matches!(located, Located::Ask(_)), "{:?}: {:?}", at, located);
        }
    }

    /// Whatever is asked, opened and lost, in whatever order: bounds hold, what is served was opened for exactly that
    /// timeline and number, and what could not be opened is asked for anew.
    #[test]
    fn a_shelf_serves_only_what_was_opened_for_the_request(
        forks in prop::collection::vec(1_u64..320, 0..3),
        segments in 0_u64..8,
        at_once in 1_usize..4,
        steps in prop::collection::vec((0_u8..8, any::<prop::sample::Index>(), 0_u64..20), 1..120),
    ) {
        let way = way(forks, None);
        let mut shelf = Shelf::new(way.clone(), size(), bounds(segments, at_once));
        // What is in files, as their owner counts it: an opening's, until the shelf lets go of it.
        let mut opening: Vec<Wanted> = Vec::new();
        let mut staged: Vec<Wanted> = Vec::new();
        let forget = |staged: &mut Vec<Wanted>, gone: Wanted| staged.retain(|kept| *kept != gone);
        let mut asked = wanted(1, 0);
        for (kind, index, number) in steps {
            match kind {
                0..=2 => {
                    asked = match kind {
                        // As recovery asks; anything else; on a timeline that does not hold it.
                        0 => follows(&way, size(), asked).unwrap(),
                        1 => Wanted { timeline: newest_begun(&way, SegmentNumber::new(number)), segment: SegmentNumber::new(number) },
                        _ => wanted(1, number),
                    };
                    let (answer, stale) = shelf.request(asked);
                    for gone in stale {
                        prop_assert!(staged.contains(&gone));
                        forget(&mut staged, gone);
                    }
                    match answer {
                        Answer::Shelf(given) => {
                            prop_assert_eq!(given, asked);
                            prop_assert!(staged.contains(&given));
                            forget(&mut staged, given);
                        }
                        Answer::Opening => prop_assert!(opening.contains(&asked)),
                        Answer::Repositories => {
                            prop_assert!(!opening.contains(&asked) && !staged.contains(&asked));
                        }
                    }
                }
                3..=4 => {
                    if let Some(next) = shelf.next(PLENTY) {
                        prop_assert!(!opening.contains(&next) && !staged.contains(&next));
                        let distance = next.segment.get().saturating_sub(asked.segment.get());
                        prop_assert!((1..=segments).contains(&distance), "{:?} behind {:?}", next, asked);
                        opening.push(next);
                    }
                }
                _ if opening.is_empty() => {}
                _ => {
                    let done = opening.remove(index.index(opening.len()));
                    let succeeds = kind != 5;
                    match shelf.opened(done, succeeds.then_some(done)) {
                        Some(unwanted) => prop_assert_eq!(unwanted, done),
                        None if succeeds => staged.push(done),
                        None => {}
                    }
                }
            }
            prop_assert!(opening.len() <= at_once);
            // One more: a request that waits for an opening keeps what comes of it.
            prop_assert!(staged.len() as u64 <= segments + 1, "{} staged", staged.len());
        }
        for gone in shelf.clear() {
            prop_assert!(staged.contains(&gone));
            forget(&mut staged, gone);
        }
        prop_assert!(staged.is_empty(), "{:?} left behind", staged);
    }
}

#[test]
fn one_that_comes_to_nothing_ends_the_looking_until_the_next_request() {
    let mut shelf = Shelf::new(Way::default(), size(), bounds(4, 2));
    assert_eq!(shelf.request(wanted(1, 10)).0, Answer::Repositories);
    assert_eq!(shelf.next(PLENTY), Some(wanted(1, 11)));
    assert_eq!(shelf.next(PLENTY), Some(wanted(1, 12)));
    assert_eq!(shelf.next(PLENTY), None, "two at a time");
    assert_eq!(shelf.opened(wanted(1, 11), None), None);
    assert_eq!(shelf.next(PLENTY), None, "what is behind it is not looked for");
    assert_eq!(shelf.request(wanted(1, 11)).0, Answer::Repositories, "no negative answer is remembered");
    assert_eq!(shelf.request(wanted(1, 12)).0, Answer::Opening);
    assert_eq!(shelf.opened(wanted(1, 12), Some(12)), None);
    assert_eq!(shelf.request(wanted(1, 12)).0, Answer::Shelf(12));
    assert_eq!(shelf.request(wanted(1, 12)).0, Answer::Repositories, "it was handed over");
    assert_eq!(shelf.next(PLENTY), Some(wanted(1, 13)));
}

#[test]
fn another_timelines_segment_of_the_same_number_is_not_served() {
    let mut shelf = Shelf::new(Way::default(), size(), bounds(4, 2));
    shelf.request(wanted(1, 10));
    assert_eq!(shelf.next(PLENTY), Some(wanted(1, 11)));
    shelf.opened(wanted(1, 11), Some("of timeline 1"));
    let (answer, stale) = shelf.request(wanted(2, 11));
    assert_eq!((answer, stale), (Answer::Repositories, vec!["of timeline 1"]));
    assert_eq!(shelf.next(PLENTY), Some(wanted(2, 12)), "and from here on that timeline is looked ahead on");
}

#[test]
fn space_and_large_segments_bound_it() {
    let mut shelf: Shelf<()> = Shelf::new(Way::default(), size(), bounds(4, 2));
    shelf.request(wanted(1, 10));
    assert_eq!(shelf.next(11 * MIB - 1), None, "the server's room");
    assert_eq!(shelf.next(11 * MIB), Some(wanted(1, 11)));
    assert_eq!(shelf.next(12 * MIB - 1), None, "the one that is being opened is not written yet");
    assert_eq!(shelf.next(12 * MIB), Some(wanted(1, 12)));
    for (mib, want) in [(1, 16), (16, 16), (64, 4), (256, 1), (512, 0), (1024, 0)] {
        assert_eq!(Bounds::USUAL.window(SegmentSize::new(mib * MIB).unwrap()), want, "{mib} MiB");
    }
}
