//! Whom a channel has told what. Pure: what is active, both clocks and how sending went are handed in.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::{Active, Id};
use crate::config::AlertConfig;

/// The pause after a notice that could not be sent, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));

/// What is said of an alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It was not there before.
    Raised,
    /// It is still there.
    Still,
    /// It is over.
    Resolved,
    /// Nothing is wrong: `pgkeep check --alerts`.
    Test,
}

/// What a channel is to send.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Notice {
    /// What is said.
    pub state: State,
    /// Of what; of one that is resolved as it was last.
    #[serde(flatten)]
    pub alert: Active,
    /// When it is said.
    pub at: Timestamp,
}

/// What one channel has told.
#[derive(Debug, Default)]
pub struct Told {
    told: BTreeMap<Id, (Active, Duration)>,
    pause: Option<Duration>,
    not_before: Duration,
}

impl Told {
    /// The next notice to send, if there is one now. `clock` only goes forward.
    pub fn next(&self, active: &[Active], channel: &AlertConfig, clock: Duration, at: Timestamp) -> Option<Notice> {
        if clock < self.not_before || channel.quiet.as_ref().is_some_and(|quiet| quiet.hold(at)) {
            return None;
        }
        let notice = |state, alert: &Active| Some(Notice { state, alert: alert.clone(), at });
        let is_active = |id: &Id| active.iter().any(|alert| alert.id() == *id);
        if let Some((_, (alert, _))) = self.told.iter().find(|(id, _)| !is_active(id)) {
            return notice(State::Resolved, alert);
        }
        for alert in active {
            match self.told.get(&alert.id()) {
                None => return notice(State::Raised, alert),
                Some((_, when)) if channel.repeat.is_some_and(|repeat| clock.saturating_sub(*when) >= repeat) => {
                    return notice(State::Still, alert);
                }
                Some(_) => {}
            }
        }
        None
    }

    /// It was sent.
    pub fn sent(&mut self, notice: &Notice, clock: Duration) {
        (self.pause, self.not_before) = (None, Duration::ZERO);
        match notice.state {
            State::Resolved => drop(self.told.remove(&notice.alert.id())),
            State::Raised | State::Still => drop(self.told.insert(notice.alert.id(), (notice.alert.clone(), clock))),
            State::Test => {}
        }
    }

    /// How long it is until another try is allowed, one millisecond at least.
    pub fn wait(&self, clock: Duration) -> Duration {
        match self.not_before.saturating_sub(clock) {
            Duration::ZERO => Duration::MAX,
            wait => wait.max(Duration::from_millis(1)),
        }
    }

    /// It could not be sent: how long to wait before another try.
    pub fn failed(&mut self, clock: Duration) -> Duration {
        let pause = self.pause.map_or(PAUSE.0, |pause| (pause * 2).min(PAUSE.1));
        (self.pause, self.not_before) = (Some(pause), clock + pause);
        pause
    }
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;
    use proptest::prelude::*;

    use super::*;
    use crate::config::{AlertWay, QuietTimes};

    fn alert(number: usize) -> Active {
        let (cluster, about, what) = ("main".to_owned(), number.to_string(), "it is wrong".to_owned());
        Active { cluster, kind: "gap", about, what, since: Timestamp::UNIX_EPOCH }
    }

    fn channel(quiet: Option<&str>, repeat: Option<u64>) -> AlertConfig {
        AlertConfig {
            name: "ops".to_owned(),
            way: AlertWay::Command(vec!["x".to_owned()]),
            quiet: quiet.map(|text| QuietTimes::new(text, TimeZone::UTC).unwrap()),
            repeat: repeat.map(Duration::from_secs),
        }
    }

    fn at(seconds: u64) -> (Duration, Timestamp) {
        (Duration::from_secs(seconds), Timestamp::from_second(seconds as i64).unwrap())
    }

    /// What is sent at this moment, all of it.
    fn sent(told: &mut Told, active: &[Active], channel: &AlertConfig, seconds: u64) -> Vec<(State, String)> {
        let (clock, at) = at(seconds);
        let mut all = Vec::new();
        while let Some(notice) = told.next(active, channel, clock, at) {
            told.sent(&notice, clock);
            all.push((notice.state, notice.alert.about));
        }
        all
    }

    #[test]
    fn raised_still_resolved() {
        let (mut told, channel) = (Told::default(), channel(None, Some(60)));
        let name = |number: usize| number.to_string();
        assert_eq!(sent(&mut told, &[alert(1)], &channel, 0), [(State::Raised, name(1))]);
        assert_eq!(sent(&mut told, &[alert(1)], &channel, 59), []);
        assert_eq!(
            sent(&mut told, &[alert(1), alert(2)], &channel, 61),
            [(State::Still, name(1)), (State::Raised, name(2))]
        );
        assert_eq!(sent(&mut told, &[alert(2)], &channel, 62), [(State::Resolved, name(1))]);
    }

    #[test]
    fn quiet_times_put_off_and_do_not_lose() {
        let (mut told, channel) = (Told::default(), channel(Some("22:00-06:00"), None));
        let hour = |hour: u64| hour * 3600;
        assert_eq!(sent(&mut told, &[alert(1)], &channel, hour(21)), [(State::Raised, "1".to_owned())]);
        // In the night one ends, one comes and goes, and one comes and stays.
        assert_eq!(sent(&mut told, &[alert(2), alert(3)], &channel, hour(23)), []);
        let morning = sent(&mut told, &[alert(3)], &channel, hour(30));
        assert_eq!(morning, [(State::Resolved, "1".to_owned()), (State::Raised, "3".to_owned())]);
    }

    #[test]
    fn what_could_not_be_sent_is_sent_later() {
        let (mut told, channel) = (Told::default(), channel(None, None));
        let (clock, now) = at(10);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            pauses.push(told.failed(clock).as_secs());
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 64, 128, 256, 300]);
        assert_eq!(told.next(&[alert(1)], &channel, clock, now), None);
        assert_eq!(sent(&mut told, &[alert(1)], &channel, 310).len(), 1);
    }

    proptest! {
        /// Whatever happens: each alert is raised, then perhaps still there, then resolved, and nothing is told twice.
        #[test]
        fn the_states_follow_each_other(
            steps in proptest::collection::vec((0u64..50_000, 0u8..8, any::<bool>()), 1..60),
        ) {
            let channel = channel(Some("20:00-06:00"), Some(20_000));
            let (mut told, mut seconds) = (Told::default(), 0);
            let mut open = std::collections::BTreeSet::new();
            for (pause, set, fails) in steps {
                seconds += pause;
                let active: Vec<Active> = (0..3).filter(|bit| set >> bit & 1 == 1).map(alert).collect();
                let (clock, now) = at(seconds);
                while let Some(notice) = told.next(&active, &channel, clock, now) {
                    if fails {
                        told.failed(clock);
                        break;
                    }
                    let name = notice.alert.about.clone();
                    match notice.state {
                        State::Raised => prop_assert!(open.insert(name)),
                        State::Still => prop_assert!(open.contains(&name)),
                        State::Resolved => prop_assert!(open.remove(&name)),
                        State::Test => prop_assert!(false),
                    }
                    told.sent(&notice, clock);
                }
            }
        }
    }
}
