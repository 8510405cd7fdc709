//! Days and weeks of a schedule, with the clock on the wall handed in.

use std::sync::Mutex;

use jiff::tz::TimeZone;
use proptest::prelude::*;

use super::*;
use crate::config::CronTimes;
use crate::types::TimelineId;

const HOUR: Duration = Duration::from_secs(3600);

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn nightly() -> When {
    When::Cron(CronTimes::new("0 3 * * *", TimeZone::UTC).unwrap())
}

/// Repositories and a clock on the wall that may be set.
struct Fake {
    cluster: ClusterName,
    begin: Instant,
    /// What the clock shows less what it should.
    wrong: Mutex<SignedDuration>,
    labels: Mutex<Vec<BackupLabel>>,
    /// In hours since the beginning, by a clock that nobody sets.
    taken: Mutex<Vec<f64>>,
    lasts: Duration,
    fails: Mutex<u32>,
}

impl Fake {
    fn new() -> Fake {
        Fake {
            cluster: "main".parse().unwrap(),
            begin: Instant::now(),
            wrong: Mutex::default(),
            labels: Mutex::default(),
            taken: Mutex::default(),
            lasts: Duration::from_secs(600),
            fails: Mutex::default(),
        }
    }

    fn now(&self) -> Timestamp {
        at("2026-03-01T00:00:00Z") + self.begin.elapsed() + *self.wrong.lock().unwrap()
    }

    fn hours(&self) -> Vec<i64> {
        self.taken.lock().unwrap().iter().map(|hours| hours.floor() as i64).collect()
    }

    async fn run(&self, schedule_is: Schedule, play: impl AsyncFnOnce(&watch::Sender<Schedule>)) {
        let (plan, told) = (watch::Sender::new(schedule_is), watch::Sender::new(Scheduled::default()));
        let (status, stop) = (watch::Sender::new(ClusterStatus::Connecting), CancellationToken::new());
        let played = async {
            play(&plan).await;
            stop.cancel();
        };
        let clock = || self.now();
        let task = schedule(self, plan.subscribe(), status.subscribe(), &told, &clock, 100, stop.clone());
        tokio::join!(task, played);
    }
}

#[async_trait(?Send)]
impl Taker for Fake {
    fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    async fn look(&self, _newest: bool) -> Result<Option<Held>, String> {
        Ok(Some(Held { labels: self.labels.lock().unwrap().clone(), newest: None }))
    }

    async fn take(&self, stop: CancellationToken) -> Result<Option<String>, String> {
        if *self.fails.lock().unwrap() > 0 {
            *self.fails.lock().unwrap() -= 1;
            return Err("a fault".to_owned());
        }
        // As of a real one: a name that nobody has.
        let is_taken = |label: &BackupLabel| self.labels.lock().unwrap().contains(label);
        let free = (0..).map(|second| BackupLabel::at(self.now() + SignedDuration::from_secs(second)));
        let label = free.into_iter().find(|label| !is_taken(label)).unwrap();
        self.taken.lock().unwrap().push(self.begin.elapsed().as_secs_f64() / 3600.0);
        tokio::select! {
            () = stop.cancelled() => return Err("stopped".to_owned()),
            () = tokio::time::sleep(self.lasts) => {}
        }
        self.labels.lock().unwrap().push(label);
        Ok(Some(label.to_string()))
    }
}

fn by(when: When) -> Schedule {
    Schedule { when: Some(when), restore_within: None }
}

#[tokio::test(start_paused = true)]
async fn at_once_when_there_is_none_and_then_every_night() {
    let fake = Fake::new();
    fake.run(by(nightly()), async |_| tokio::time::sleep(HOUR * 24 * 4).await).await;
    assert_eq!(fake.hours(), [0, 3, 27, 51, 75]);
}

#[tokio::test(start_paused = true)]
async fn a_missed_run_is_made_up_for_once() {
    let fake = Fake::new();
    fake.labels.lock().unwrap().push(BackupLabel::at(at("2026-02-20T03:00:00Z"))); // nine nights ago
    fake.run(by(nightly()), async |_| tokio::time::sleep(HOUR * 24 * 2).await).await;
    assert_eq!(fake.hours(), [0, 3, 27]);
    assert!(fake.taken.lock().unwrap()[0] > 0.0, "with jitter");
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_back_by_a_day_neither_repeats_nor_stops() {
    for when in [nightly(), When::Every(HOUR * 24)] {
        let fake = Fake::new();
        fake.run(by(when.clone()), async |_| {
            tokio::time::sleep(HOUR * 76).await;
            let before = fake.hours().len();
            *fake.wrong.lock().unwrap() = SignedDuration::from_hours(-24);
            tokio::time::sleep(HOUR * 20).await;
            assert_eq!(fake.hours().len(), before, "repeated");
            tokio::time::sleep(HOUR * 24 * 7).await;
            let taken = fake.hours();
            assert!((6..=8).contains(&(taken.len() - before)), "{when:?}: {taken:?}");
            assert!(taken.windows(2).all(|pair| pair[1] - pair[0] <= 25 + 24), "{when:?}: {taken:?}");
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_ahead_makes_up_for_one_run() {
    let fake = Fake::new();
    fake.run(by(nightly()), async |_| {
        tokio::time::sleep(HOUR * 5).await;
        *fake.wrong.lock().unwrap() = SignedDuration::from_hours(24 * 10);
        tokio::time::sleep(HOUR * 6).await;
    })
    .await;
    assert_eq!(fake.hours(), [0, 3, 5]);
}

#[tokio::test(start_paused = true)]
async fn one_after_the_other_however_long_they_take() {
    let fake = Fake { lasts: HOUR * 5, ..Fake::new() };
    fake.run(by(When::Every(HOUR)), async |_| tokio::time::sleep(HOUR * 21).await).await;
    let taken = fake.taken.lock().unwrap().clone();
    assert!(taken.len() >= 4 && taken.windows(2).all(|pair| pair[1] - pair[0] >= 5.0), "{taken:?}");
}

#[tokio::test(start_paused = true)]
async fn failures_are_tried_again_ever_more_rarely_and_a_new_schedule_counts_at_once() {
    let fake = Fake::new();
    *fake.fails.lock().unwrap() = 4;
    fake.run(Schedule::default(), async |plan| {
        tokio::time::sleep(HOUR * 50).await;
        assert!(fake.hours().is_empty(), "no schedule, no base backup");
        plan.send_replace(by(When::Every(HOUR * 24)));
        tokio::time::sleep(HOUR).await;
        assert_eq!(fake.hours(), [50]);
        let minutes = (fake.taken.lock().unwrap()[0] - 50.0) * 60.0;
        assert!((2.0..10.0).contains(&minutes), "after 10, 20, 40 and 80 s: {minutes}");
    })
    .await;
}

#[test]
fn what_restore_within_asks_for() {
    let newest = Newest {
        label: BackupLabel::at(Timestamp::UNIX_EPOCH),
        branch: Branch::first(TimelineId::FIRST),
        start: Lsn::new(0),
        bytes: 60_000_000_000, // 600 s at what is assumed
        took: Duration::from_secs(300),
        sample: None,
        replayed: None,
    };
    let hour = SignedDuration::from_hours(1);
    let judged = |limit: u64, wal: u64, age| within(Duration::from_secs(limit), &newest, Lsn::new(wal), age);
    assert!(matches!(judged(1000, 10_000_000_000, hour), Within::Yes(_)));
    assert!(matches!(judged(1000, 25_000_000_000, hour), Within::Longer(_)));
    assert!(matches!(judged(1000, 25_000_000_000, SignedDuration::from_secs(500)), Within::Yes(_)), "it took 300 s");
    assert!(matches!(judged(500, 25_000_000_000, hour), Within::Never(_)));
}

proptest! {
    /// Whatever the clock does, what counts as last is never in the future, and is never forgotten.
    #[test]
    fn the_last_one_is_never_in_the_future(steps in proptest::collection::vec((0i64..1_000_000, any::<bool>()), 1..50)) {
        let (mut known, mut labels) = (Known::default(), Vec::new());
        for (second, takes) in steps {
            let now = Timestamp::from_second(second).unwrap();
            if takes {
                labels.push(BackupLabel::at(now));
            }
            known.observe(&labels, now);
            let last = known.last(now);
            prop_assert_eq!(last.is_some(), !labels.is_empty());
            prop_assert!(last.is_none_or(|last| last <= now));
            if takes {
                prop_assert_eq!(last, Some(now), "the one that was just taken is the last one");
            }
        }
    }
}
