//! Base backups by schedule: when one is due is said by pure values; [`schedule`] waits, and asks a [`Taker`] to act.
//!
//! What is remembered is what the repositories hold: the newest base backup says which runs have been, so a missed one is
//! made up for once, after a restart as after an outage. A clock that jumps back finds base backups in its future: they count
//! as taken at the moment of the jump ([`Known`]), so that nothing is repeated and the next run comes within one period.
//! Two never overlap: one process takes one after the other, and a lease in the repository is the taker's.
//!
//! Streaming does not wait for any of this. Crash: as of a base backup; the lease expires. Cancellation: `stop` gives up the
//! base backup that is under way, and lets the lease go.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::archive::ClusterStatus;
use crate::config::{Schedule, When};
use crate::plan::estimate::estimate;
use crate::plan::{Estimate, Sample};
use crate::types::{BackupLabel, Branch, ClusterName, Lsn};

/// The clock on the wall is looked at so often: it may have been set.
const TICK: Duration = Duration::from_secs(15);
/// How often the repositories are asked which base backups there are while none is due.
const LOOK: Duration = Duration::from_secs(600);
/// After somebody else was found taking one, at most.
const HELD: Duration = Duration::from_secs(30);
/// The pause after a base backup that failed, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3600));
/// A run that begins within so long is on time.
const ON_TIME: SignedDuration = SignedDuration::from_secs(60);
/// Most that a run which is made up for waits, so that hosts that come back together do not begin together.
const JITTER: Duration = Duration::from_secs(300);

/// When each base backup counts as taken, by our clock as it goes now.
#[derive(Debug, Default)]
pub struct Known {
    taken: BTreeMap<BackupLabel, Timestamp>,
}

impl Known {
    /// These are there now; those that are not are forgotten.
    pub fn observe(&mut self, labels: &[BackupLabel], now: Timestamp) {
        self.taken.retain(|label, _| labels.contains(label));
        for label in labels {
            self.taken.entry(*label).or_insert_with(|| label.start().min(now));
        }
    }

    /// When the last one counts as taken. What lies in the future was taken before the clock was set back: at this moment
    /// at the latest.
    pub fn last(&mut self, now: Timestamp) -> Option<Timestamp> {
        self.taken.values_mut().for_each(|taken| *taken = (*taken).min(now));
        self.taken.values().copied().max()
    }
}

/// When the next run is due after one at `last`; `None`: never. Without any it is due at once.
pub fn due(when: &When, last: Option<Timestamp>, now: Timestamp) -> Option<Timestamp> {
    match (when, last) {
        (_, None) => Some(now),
        (When::Cron(times), Some(last)) => times.after(last),
        (When::Every(every), Some(last)) => last.saturating_add(*every).ok(),
    }
}

/// From one run to the next, as it is after `due`.
pub fn period(when: &When, due: Timestamp) -> Duration {
    match when {
        When::Every(every) => *every,
        When::Cron(times) => {
            let next = times.after(due).map(|next| next.duration_since(due));
            next.and_then(|length| Duration::try_from(length).ok()).unwrap_or(Duration::from_secs(86_400))
        }
    }
}

/// How long a run that was missed still waits. `share` is a number of 0 to 255 that differs from host to host.
pub fn jitter(period: Duration, late: SignedDuration, share: u8) -> Duration {
    match late > ON_TIME {
        true => (period / 1000).min(JITTER) * u32::from(share) / 256,
        false => Duration::ZERO,
    }
}

/// The newest base backup, for `restore_within`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Newest {
    /// Which.
    pub label: BackupLabel,
    /// The history its WAL belongs to.
    pub branch: Branch,
    /// Where recovery from it starts.
    pub start: Lsn,
    /// Size of its files.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
    /// How fast the repository gave a part of it back.
    pub sample: Option<Sample>,
    /// How many bytes of WAL a second a server has replayed, by the last drill.
    pub replayed: Option<u64>,
}

/// What `restore_within` asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Within {
    /// A restore is fast enough.
    Yes(Estimate),
    /// It would take longer, because of the WAL: a base backup helps.
    Longer(Estimate),
    /// The base backup alone takes longer: no other one helps.
    Never(Estimate),
}

/// Judges a restore to `end`, on the same history. A new base backup is not asked for before twice the time that the last
/// one took has gone by: taking them without a pause would not be faster.
pub fn within(limit: Duration, newest: &Newest, end: Lsn, age: SignedDuration) -> Within {
    let estimate = estimate(newest.bytes, end.bytes_since(newest.start).unwrap_or(0), newest.sample, newest.replayed);
    let rested = Duration::try_from(age).is_ok_and(|age| age >= newest.took * 2);
    match () {
        () if estimate.base > limit => Within::Never(estimate),
        () if estimate.total > limit && rested => Within::Longer(estimate),
        () => Within::Yes(estimate),
    }
}

/// What the repositories hold.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Held {
    /// All complete base backups, in any order.
    pub labels: Vec<BackupLabel>,
    /// The newest; only where it was asked for.
    pub newest: Option<Newest>,
}

/// Asks a cluster's repositories and takes its base backups.
#[async_trait(?Send)]
pub trait Taker {
    /// The cluster, for the log.
    fn cluster(&self) -> &ClusterName;

    /// The base backups that are there, with [`Held::newest`] if `newest`. `None`: nothing of the cluster is archived yet.
    async fn look(&self, newest: bool) -> Result<Option<Held>, String>;

    /// Takes a base backup; its name. `None`: somebody else takes one now.
    async fn take(&self, stop: CancellationToken) -> Result<Option<String>, String>;
}

/// How a cluster's schedule stands, for whoever watches.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Scheduled {
    /// When the next run is due by the clock; in the past: it is under way, or waits to be made up for.
    pub next: Option<Timestamp>,
    /// From one run to the next, in seconds.
    pub period_seconds: Option<u64>,
    /// A base backup is being taken by this process.
    pub running: bool,
    /// Why the last try failed; gone with the next success.
    pub failed: Option<String>,
    /// Seconds that a restore of the newest instant is estimated to take, where `restore_within` is set.
    pub restore_seconds: Option<f64>,
    /// What `restore_within` allows, in seconds.
    pub restore_within_seconds: Option<u64>,
}

/// Until `stop`. `plan` may change; `clock` is the clock on the wall; `share` differs from host to host.
pub async fn schedule(
    taker: &dyn Taker,
    mut plan: watch::Receiver<Schedule>,
    status: watch::Receiver<ClusterStatus>,
    told: &watch::Sender<Scheduled>,
    clock: &(dyn Fn() -> Timestamp + Sync),
    share: u8,
    stop: CancellationToken,
) {
    let mut run = Run {
        taker,
        status,
        told,
        clock,
        share,
        stop: stop.clone(),
        known: Known::default(),
        held: None,
        look_at: Instant::now(),
        not_before: Instant::now(),
        pause: PAUSE.0,
        first_due: None,
        reckoned: None,
        made_up: None,
        warned: None,
    };
    loop {
        let wanted = plan.borrow_and_update().clone();
        let wait = run.step(&wanted).await;
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            changed = plan.changed() => match changed {
                Ok(()) => run.look_at = Instant::now(),
                Err(_) => return,
            },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

struct Run<'a> {
    taker: &'a dyn Taker,
    status: watch::Receiver<ClusterStatus>,
    told: &'a watch::Sender<Scheduled>,
    clock: &'a (dyn Fn() -> Timestamp + Sync),
    share: u8,
    stop: CancellationToken,
    known: Known,
    held: Option<Held>,
    look_at: Instant,
    not_before: Instant,
    pause: Duration,
    /// Since when the very first one is due.
    first_due: Option<Timestamp>,
    /// What was reckoned last.
    reckoned: Option<Reckoned>,
    /// The missed run whose jitter was waited for.
    made_up: Option<Timestamp>,
    /// The base backup of which was said that no other one would be restored in time.
    warned: Option<BackupLabel>,
}

/// When the next run is due, and how long it is to the one after; of which times, after which run.
struct Reckoned {
    when: When,
    last: Option<Timestamp>,
    next: Option<Timestamp>,
    length: Option<Duration>,
}

impl Run<'_> {
    /// Does what is due, and says how long to wait.
    async fn step(&mut self, plan: &Schedule) -> Duration {
        if plan.is_empty() {
            self.tell(|told| *told = Scheduled::default());
            return TICK;
        }
        if Instant::now() >= self.look_at && !self.look(plan).await {
            return PAUSE.0;
        }
        if self.held.is_none() {
            self.look_at = Instant::now() + PAUSE.0; // nothing is archived yet
            return PAUSE.0;
        }
        let now = (self.clock)();
        let last = self.known.last(now);
        let (next, length) = plan.when.as_ref().map(|when| self.reckon(when, last, now)).unwrap_or_default();
        let longer = self.longer(plan, last, now);
        self.tell(|told| {
            (told.next, told.period_seconds) = (next, length.map(|length| length.as_secs()));
        });
        let by_clock = next.is_some_and(|next| next <= now);
        if !by_clock && !longer {
            let left = next.and_then(|next| Duration::try_from(next.duration_since(now)).ok());
            return left.unwrap_or(TICK).min(TICK);
        }
        if let (true, Some(next), Some(length), true) = (by_clock, next, length, last.is_some())
            && self.made_up != Some(next)
        {
            self.made_up = Some(next);
            self.not_before =
                self.not_before.max(Instant::now() + jitter(length, now.duration_since(next), self.share));
        }
        if let Some(wait) = self.not_before.checked_duration_since(Instant::now()).filter(|wait| !wait.is_zero()) {
            return wait.min(TICK);
        }
        // Somebody may have taken one in between.
        let before = self.known.last(now);
        if !self.look(plan).await {
            return PAUSE.0;
        }
        if self.known.last((self.clock)()) != before {
            return Duration::ZERO;
        }
        self.take(length).await
    }

    /// When the next run is due, and how long it is to the one after. Reckoned anew when what it depends on has changed.
    fn reckon(
        &mut self,
        when: &When,
        last: Option<Timestamp>,
        now: Timestamp,
    ) -> (Option<Timestamp>, Option<Duration>) {
        if let Some(known) = &self.reckoned
            && (&known.when, known.last) == (when, last)
            && last.is_some()
        {
            return (known.next, known.length);
        }
        let mut next = due(when, last, now);
        if last.is_none() {
            // Due since it was first missed, so that one which fails for long is seen to be late.
            self.first_due = Some(self.first_due.unwrap_or(now).min(now));
            next = next.and(self.first_due);
        }
        let length = next.map(|next| period(when, next));
        self.reckoned = Some(Reckoned { when: when.clone(), last, next, length });
        (next, length)
    }

    async fn look(&mut self, plan: &Schedule) -> bool {
        let looked = tokio::select! {
            biased;
            () = self.stop.cancelled() => return false,
            looked = self.taker.look(plan.restore_within.is_some()) => looked,
        };
        match looked {
            Ok(held) => {
                if let Some(held) = &held {
                    self.known.observe(&held.labels, (self.clock)());
                }
                (self.held, self.look_at) = (held, Instant::now() + LOOK);
                true
            }
            Err(why) => {
                tracing::warn!(cluster = %self.taker.cluster(), "cannot tell when a base backup is due: {why}");
                self.tell(|told| told.failed = Some(why));
                false
            }
        }
    }

    async fn take(&mut self, length: Option<Duration>) -> Duration {
        let cluster = self.taker.cluster();
        self.tell(|told| told.running = true);
        let taken = self.taker.take(self.stop.child_token()).await;
        self.tell(|told| told.running = false);
        match taken {
            Ok(Some(label)) => {
                tracing::info!(%cluster, "base backup {label} was taken by schedule");
                (self.pause, self.look_at) = (PAUSE.0, Instant::now());
                self.tell(|told| told.failed = None);
                Duration::ZERO
            }
            Ok(None) => {
                let wait = (length.unwrap_or(HELD) / 4).clamp(Duration::from_millis(200), HELD);
                tracing::debug!(%cluster, "somebody else takes a base backup");
                (self.not_before, self.look_at) = (Instant::now() + wait, Instant::now() + wait);
                wait
            }
            Err(_) if self.stop.is_cancelled() => TICK,
            Err(why) => {
                let pause = self.pause;
                tracing::error!(%cluster, "the scheduled base backup failed, another try in {} s: {why}", pause.as_secs());
                (self.not_before, self.pause) = (Instant::now() + pause, (pause * 2).min(PAUSE.1));
                self.tell(|told| told.failed = Some(why));
                pause.min(TICK)
            }
        }
    }

    /// Would a restore take longer than is allowed?
    fn longer(&mut self, plan: &Schedule, last: Option<Timestamp>, now: Timestamp) -> bool {
        let Some(limit) = plan.restore_within else {
            self.tell(|told| (told.restore_seconds, told.restore_within_seconds) = (None, None));
            return false;
        };
        let Some(newest) = self.held.as_ref().and_then(|held| held.newest) else {
            return last.is_none(); // the first one
        };
        let end = match &*self.status.borrow() {
            // Another history is the mender's: it needs a base backup of its own anyway.
            ClusterStatus::Streaming(progress) if progress.branch == newest.branch => progress.durable,
            _ => return false,
        };
        let age = last.map_or(SignedDuration::MAX, |last| now.duration_since(last));
        let judged = within(limit, &newest, end, age);
        let (Within::Yes(estimate) | Within::Longer(estimate) | Within::Never(estimate)) = judged;
        let seconds = estimate.total.as_secs_f64().round();
        self.tell(|told| {
            (told.restore_seconds, told.restore_within_seconds) = (Some(seconds), Some(limit.as_secs()));
        });
        if matches!(judged, Within::Never(_)) && self.warned != Some(newest.label) {
            self.warned = Some(newest.label);
            tracing::warn!(
                cluster = %self.taker.cluster(),
                "restore_within cannot be kept: reading base backup {} alone is estimated to take {} s, and no other one would \
                 be faster. A faster repository would, or a longer restore_within",
                newest.label, estimate.base.as_secs()
            );
        }
        matches!(judged, Within::Longer(_))
    }

    fn tell(&self, change: impl FnOnce(&mut Scheduled)) {
        self.told.send_if_modified(|told| {
            let before = told.clone();
            change(told);
            *told != before
        });
    }
}

#[cfg(test)]
mod tests;
