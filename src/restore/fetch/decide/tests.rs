use super::*;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

fn lsn(segment: u64, offset: u64) -> Lsn {
    Lsn::new(segment * MIB + offset)
}

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

/// `1@5.100 2`: the way over timelines; positions are segment.offset.
fn path(text: &str) -> Vec<Step> {
    let step = |word: &str| {
        let (branch, left) = word.split_once('@').map_or((word, None), |(branch, left)| (branch, Some(left)));
        let (number, ordinal) = branch.split_once('/').unwrap_or((branch, "0"));
        let branch = Branch { timeline: timeline(number.parse().unwrap()), ordinal: ordinal.parse().unwrap() };
        let left_at = left.map(|left| {
            let (segment, offset) = left.split_once('.').unwrap();
            lsn(segment.parse().unwrap(), offset.parse().unwrap())
        });
        Step { branch, left_at }
    };
    text.split_whitespace().map(step).collect()
}

fn ask(located: Located) -> Ask {
    match located {
        Located::Ask(ask) => ask,
        other => panic!("{other:?}"),
    }
}

#[test]
fn steps_read_back_as_written() {
    for text in ["00000001@0/5000148", "00000002", "00000002.1@16/B374D848"] {
        assert_eq!(text.parse::<Step>().unwrap().to_string(), text);
    }
    assert!(["", "1@0/1", "00000001@", "00000001@5"].into_iter().all(|text| text.parse::<Step>().is_err()));
}

#[test]
fn a_way_that_is_none_is_refused() {
    for good in ["1", "1@5.0 2", "1@5.100 2@5.100 4", "1@3.0 2/1@4.0 3"] {
        assert_eq!(check_path(&path(good)), Ok(()), "{good}");
    }
    for bad in ["1@5.0", "1 2", "2@5.0 1", "1@5.0 2@4.0 3", "1@5.0 1", "1@5.0 1/1"] {
        assert_eq!(check_path(&path(bad)), Err(Refusal::NotAWay), "{bad}");
        assert!(matches!(
            on_path(timeline(1), SegmentNumber::new(1), size(), &path(bad), None),
            Located::Refuse(Refusal::NotAWay)
        ));
    }
}

/// What recovery asks for on the way 1 → 2 → 3, with a fork within segment 5 and one on a border.
#[test]
fn p7_on_the_way_each_request_has_one_meaning() {
    let way = path("1@5.100 2@8.0 3");
    let at = |tli, segment| on_path(timeline(tli), SegmentNumber::new(segment), size(), &way, None);
    // Before the fork: whole, or it is a fault.
    assert_eq!(ask(at(1, 4)).needed_to, Some(lsn(5, 0)));
    // The parent's copy of the fork's segment is never right.
    assert!(matches!(at(1, 5), Located::Refuse(Refusal::ParentAtFork { .. })));
    assert_eq!(at(1, 6), Located::NotThere);
    // The child does not have what lies before its first segment.
    assert_eq!(at(2, 4), Located::NotThere);
    let first = ask(at(2, 5));
    assert_eq!((first.fork, first.needed_to), (Some(lsn(5, 100)), Some(lsn(6, 0))));
    assert_eq!(ask(at(2, 7)).needed_to, Some(lsn(8, 0)));
    // The fork on a border: the parent's last segment is whole, the child's first begins there.
    assert_eq!(at(2, 8), Located::NotThere);
    let tip = ask(at(3, 8));
    assert_eq!((tip.fork, tip.needed_to), (Some(lsn(8, 0)), Some(lsn(8, 1))));
    assert_eq!((ask(at(3, 9)).fork, ask(at(3, 9)).needed_to), (None, None));
    assert!(matches!(at(4, 9), Located::Refuse(Refusal::OffTheWay { .. })));
    let second = path("1@5.100 2/1");
    let second = ask(on_path(timeline(2), SegmentNumber::new(5), size(), &second, None));
    assert_eq!(second.branch.to_string(), "00000002.1");
}

#[test]
fn pitfall_24_beyond_the_end_of_the_way_nothing_is_asked() {
    let way = path("1");
    let at = |segment| on_path(timeline(1), SegmentNumber::new(segment), size(), &way, Some(lsn(5, 100)));
    assert_eq!(ask(at(5)).needed_to, Some(lsn(5, 100)));
    assert_eq!(ask(at(4)).needed_to, Some(lsn(5, 0)));
    assert_eq!(at(6), Located::NotThere);
    assert_eq!(on_path(timeline(9), SegmentNumber::new(6), size(), &way, Some(lsn(6, 0))), Located::NotThere);
}

fn plain() -> Ask {
    let branch = Branch::first(TimelineId::FIRST);
    let segment = SegmentNumber::new(5);
    Ask { branch, segment, size: size(), until: None, needed_to: None, fork: None, fork_unknown: false }
}

#[test]
fn p7_what_an_answer_comes_to() {
    let held = |end, usable, more_behind| Held { end: lsn(5, end), usable: lsn(5, usable), more_behind };
    let is = |verdict: Verdict| match verdict {
        Verdict::Serve => "serve",
        Verdict::NotThere => "not there",
        Verdict::Refuse(Refusal::Hole { .. }) => "hole",
        Verdict::Refuse(Refusal::Needed { .. }) => "needed",
        Verdict::Refuse(Refusal::EndsBeforeFork { .. }) => "before fork",
        Verdict::Refuse(Refusal::NoHistory { .. }) => "no history",
        Verdict::Refuse(other) => panic!("{other}"),
    };
    let until = Ask { until: Some(lsn(5, 500)), needed_to: Some(lsn(5, 500)), ..plain() };
    let first = Ask { fork: Some(lsn(5, 300)), needed_to: Some(lsn(5, 301)), ..plain() };
    let unknown = Ask { fork_unknown: true, ..plain() };
    let cases = [
        (plain(), held(MIB, MIB, false), "serve"),
        (plain(), held(0, 0, false), "not there"),
        (plain(), held(400, 360, false), "serve"),
        (plain(), held(400, 0, false), "not there"), // within a record: of no use
        (plain(), held(0, 0, true), "hole"),
        (plain(), held(400, 360, true), "hole"),
        (until.clone(), held(400, 360, false), "needed"),
        (until.clone(), held(0, 0, false), "needed"),
        (until.clone(), held(500, 500, true), "serve"), // a hole behind the end of the way is nobody's
        (until.clone(), held(MIB, 500, false), "serve"),
        (until, held(499, 400, true), "hole"),
        (first.clone(), held(0, 0, false), "needed"),
        (first.clone(), held(300, 300, false), "needed"),
        (first.clone(), held(310, 300, false), "before fork"),
        (first.clone(), held(310, 260, false), "before fork"),
        (first.clone(), held(310, 310, false), "serve"),
        (first, held(MIB, MIB, false), "serve"),
        (unknown.clone(), held(400, 360, false), "no history"),
        (unknown.clone(), held(0, 0, false), "not there"),
        (unknown, held(MIB, MIB, false), "serve"),
    ];
    for (ask, held, want) in cases {
        assert_eq!(is(judge(&ask, &held)), want, "{ask:?} {held:?}");
    }
}

fn histories(list: &[(u32, &str)]) -> BTreeMap<TimelineId, TimelineHistory> {
    let parse = |(number, text): &(u32, &str)| {
        (timeline(*number), TimelineHistory::parse(timeline(*number), text.as_bytes()).unwrap())
    };
    list.iter().map(parse).collect()
}

fn branches(list: &[&str]) -> Branches {
    Branches(list.iter().map(|text| text.parse().unwrap()).collect())
}

#[test]
fn p7_without_a_path_the_histories_say_what_is_needed() {
    // Timeline 2 forked off within segment 5 of timeline 1.
    let forked = histories(&[(2, "1\t0/500100\tno reason\n")]);
    let there = branches(&["00000001", "00000002"]);
    let at = |tli, segment, there: &Branches| {
        by_histories(timeline(tli), SegmentNumber::new(segment), size(), &forked, there, None)
    };
    assert_eq!(ask(at(1, 4, &there)).needed_to, Some(lsn(5, 0)), "timeline 2 goes on behind it");
    assert_eq!(ask(at(1, 4, &branches(&["00000001"]))).needed_to, None, "a history alone needs nothing");
    assert_eq!(ask(at(1, 5, &there)).needed_to, None, "the end of timeline 1");
    let first = ask(at(2, 5, &there));
    assert_eq!((first.fork, first.needed_to), (Some(lsn(5, 0x100)), Some(lsn(5, 0x101))));
    assert_eq!(at(2, 4, &there), Located::NotThere);
    assert!(!ask(at(2, 7, &there)).fork_unknown);
    assert!(ask(at(3, 7, &there)).fork_unknown);
    let several = branches(&["00000001", "00000002", "00000002.1"]);
    assert!(matches!(at(2, 5, &several), Located::Refuse(Refusal::SeveralBranches { .. })));
    assert!(matches!(at(1, 5, &several), Located::Ask(_)));
}

#[test]
fn pitfall_25_a_history_is_hidden_only_where_there_is_no_such_timeline() {
    let there = branches(&["00000001", "00000002", "00000003"]);
    let of_three = histories(&[(3, "1\t0/500100\t\n2\t0/700100\t\n")]);
    let missing = |tli, histories: &_, there: &Branches| missing_history(timeline(tli), None, histories, there);
    // Lost by an ancestor, told by a descendant.
    let MissingHistory::Derived(two) = missing(2, &of_three, &there) else { panic!("not derived") };
    assert_eq!((two.timeline(), two.begins_at()), (timeline(2), lsn(5, 0x100)));
    assert_eq!(missing(4, &of_three, &there), MissingHistory::NotThere);
    assert_eq!(missing(1, &of_three, &there), MissingHistory::NotThere);
    assert!(matches!(missing(2, &histories(&[]), &there), MissingHistory::Refuse(Refusal::NoHistory { .. })));
    // On the way it is needed, whatever is there.
    let on_way = missing_history(timeline(2), Some(Branch::first(timeline(2))), &histories(&[]), &branches(&[]));
    assert!(matches!(on_way, MissingHistory::Refuse(Refusal::NoHistory { .. })));
}

#[test]
fn the_ancestry_on_a_way_is_that_of_first_branches() {
    let way = path("1@5.256 2@8.0 3");
    let history = history_to(&way, timeline(3)).unwrap();
    assert_eq!((history.begins_at(), history.left_at(timeline(1))), (lsn(8, 0), Some(lsn(5, 256))));
    assert_eq!(history_to(&way, timeline(1)), Some(TimelineHistory::root(timeline(1))));
    assert_eq!(history_to(&path("1@5.256 2/1@8.0 3"), timeline(3)), None, "a history file does not tell branches");
}

prop_compose! {
    fn a_way()(forks in prop::collection::vec(0u64..8 * MIB, 0..3)) -> Vec<Step> {
        let mut forks = forks;
        forks.sort();
        let lefts = forks.iter().map(|fork| Some(Lsn::new(*fork))).chain([None]);
        lefts.zip(1..).map(|(left_at, number)| Step { branch: Branch::first(timeline(number)), left_at }).collect()
    }
}

proptest! {
    /// Over a model of what a branch holds (bytes without a hole up to `end`, records ending now and then, something
    /// behind a hole or not): "not there" and "serve" keep P7.
    #[test]
    fn p7_never_a_shorter_history(
        way in a_way(), tli in 1u32..5, segment in 0u64..10,
        until in prop::option::of(0u64..9 * MIB),
        held in 0u64..=MIB, in_record in 0u64..200, more_behind in any::<bool>(), whole in any::<bool>(),
    ) {
        let number = SegmentNumber::new(segment);
        let (start, end) = (number.start(size()), number.end(size()));
        let until = until.map(Lsn::new);
        let held_to = if whole { end } else { start.advance(held) };
        let fence = until.map_or(end, |until| until.min(end)).max(start);
        // A whole segment's end counts as usable; an open one's last record may end a little before.
        let cut = held_to.min(fence);
        let usable = if cut == end { end } else { start.max(Lsn::new(cut.get().saturating_sub(in_record))) };
        let more_behind = more_behind && held_to < end;
        let located = on_path(timeline(tli), number, size(), &way, until);
        let verdict = match &located {
            Located::Ask(ask) => judge(ask, &Held { end: held_to, usable, more_behind }),
            Located::NotThere => Verdict::NotThere,
            Located::Refuse(refusal) => Verdict::Refuse(refusal.clone()),
        };
        let index = way.iter().position(|step| step.branch.timeline.get() == tli);
        let begin = index.and_then(|index| index.checked_sub(1)).and_then(|parent| way[parent].left_at).unwrap_or(Lsn::ZERO);
        let left = index.and_then(|index| way[index].left_at);
        match verdict {
            Verdict::Serve => {
                prop_assert!(index.is_some(), "off the way");
                prop_assert!(usable > start && usable > begin, "nothing of this timeline is in it");
                prop_assert!(left.is_none_or(|left| usable <= left), "bytes of a history that was left");
                prop_assert!(until.is_none_or(|until| usable <= until), "beyond the end of the way");
                prop_assert!(usable == fence || !more_behind || held_to >= fence, "cut short before a hole");
                prop_assert!(until.is_none_or(|until| held_to >= until.min(end)), "less than was planned");
            }
            Verdict::NotThere => {
                let beyond = until.is_some_and(|until| until <= start);
                let elsewhere = begin.segment(size()) > number || left.is_some_and(|left| left <= start);
                if !beyond && !elsewhere {
                    prop_assert!(index.is_some());
                    prop_assert!(usable == start, "there was something to serve");
                    prop_assert!(!more_behind || held_to >= fence, "a hole");
                    prop_assert!(left.is_none(), "below a fork");
                    prop_assert!(begin.segment(size()) < number || begin == Lsn::ZERO, "the fork's segment");
                    prop_assert!(until.is_none_or(|until| held_to >= until.min(end)), "what was planned is missing");
                }
            }
            Verdict::Refuse(_) => {
                // Recovery is not stopped where all that is asked for is there, and asked for rightly.
                let right = index.is_some() && end > begin && left.is_none_or(|left| end <= left);
                prop_assert!(!(right && whole && fence == end), "a whole segment was refused");
            }
        }
    }
}
