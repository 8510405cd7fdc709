//! Being told: what is wrong ([`conditions`], pure), since when ([`Book`], pure), who has been told ([`channel`], pure) and
//! how they are told ([`send`]).
//!
//! What always holds: of one alert a channel hears once that it was raised, as often as it asked to that it still is, and once
//! that it was resolved. Each channel is a task of its own with a deadline for everything: one that hangs holds up itself alone.
//! Nothing is remembered: after a restart what is still wrong is told again. Crash and cancellation: a notice was sent or not.

pub mod channel;
pub mod conditions;
pub mod send;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::health::Watched;
use crate::config::Config;

pub use conditions::{Condition, Limits, conditions};

/// How often is looked whether anything is wrong: at values that are at hand.
const TICK: Duration = Duration::from_secs(1);

/// An alert is over when its reason has been away for so long: what comes and goes is one alert.
const SETTLES: Duration = Duration::from_secs(5);

/// What tells one alert from another.
pub type Id = (String, &'static str, String);

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Active {
    /// The cluster in the configuration.
    pub cluster: String,
    /// What kind of thing: `behind`, `gap`, `slot`, …
    pub kind: &'static str,
    /// The repository, or whatever else it is about; may be empty.
    pub about: String,
    /// What is wrong, and what to do: sentences.
    pub what: String,
    /// Since when it is known.
    pub since: Timestamp,
}

impl Active {
    /// What tells it from others.
    pub fn id(&self) -> Id {
        (self.cluster.clone(), self.kind, self.about.clone())
    }
}

/// What is wrong, and since when. Pure.
#[derive(Debug, Default)]
pub struct Book {
    active: BTreeMap<Id, (Active, Duration)>,
}

impl Book {
    /// Takes what is wrong now. `clock` is a reading of a clock that only goes forward, `at` the time on the wall.
    pub fn update(&mut self, found: Vec<Condition>, clock: Duration, at: Timestamp) -> Vec<Active> {
        for Condition { cluster, kind, about, what } in found {
            let fresh = Active { cluster, kind, about, what, since: at };
            let known = self.active.entry(fresh.id()).or_insert_with(|| (fresh.clone(), clock));
            (known.0.what, known.1) = (fresh.what, clock);
        }
        self.active.retain(|_, (_, seen)| clock.saturating_sub(*seen) < SETTLES);
        self.active.values().map(|(active, _)| active.clone()).collect()
    }
}

/// Looks, hands on what is wrong, keeps the channels running, and says in the log what begins and ends. Until it is dropped,
/// which ends the channels too.
pub async fn watch_over(
    watched: &Watched,
    config: watch::Receiver<Arc<Config>>,
    active: &watch::Sender<Arc<Vec<Active>>>,
) {
    let (begin, mut book, mut channels) = (Instant::now(), Book::default(), send::Channels::default());
    let receiver = active.subscribe();
    loop {
        let now = Arc::clone(&config.borrow());
        channels.run(&now.alerts, &receiver);
        let limits = Limits { behind: now.daemon.behind, behind_bytes: now.daemon.behind_bytes };
        let at = Timestamp::now();
        let found = book.update(conditions(&watched.picture(at), limits), begin.elapsed(), at);
        active.send_if_modified(|known| {
            let is_in = |all: &[Active], one: &Active| all.iter().any(|other| other.id() == one.id());
            for Active { cluster, kind, about, what, .. } in found.iter().filter(|alert| !is_in(known, alert)) {
                tracing::warn!(%cluster, about, "alert {kind}: {what}");
            }
            for Active { cluster, kind, about, .. } in known.iter().filter(|alert| !is_in(&found, alert)) {
                tracing::info!(%cluster, about, "alert {kind} is over");
            }
            let differs = **known != found;
            if differs {
                *known = Arc::new(found);
            }
            differs
        });
        tokio::time::sleep(TICK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(what: &str) -> Condition {
        Condition { cluster: "main".to_owned(), kind: "behind", about: "far".to_owned(), what: what.to_owned() }
    }

    #[test]
    fn what_comes_and_goes_is_one_alert() {
        let (mut book, second) = (Book::default(), Duration::from_secs(1));
        let at = |seconds: i64| Timestamp::from_second(seconds).unwrap();
        let first = book.update(vec![condition("3 s")], second, at(100));
        assert_eq!((first.len(), first[0].since, first[0].what.as_str()), (1, at(100), "3 s"));
        assert_eq!(book.update(Vec::new(), second * 3, at(102)).len(), 1, "away for a moment");
        let again = book.update(vec![condition("9 s"), condition("10 s")], second * 4, at(103));
        assert_eq!((again.len(), again[0].since, again[0].what.as_str()), (1, at(100), "10 s"));
        assert!(book.update(Vec::new(), second * 4 + SETTLES, at(120)).is_empty());
        assert_eq!(book.update(vec![condition("1 s")], second * 60, at(160))[0].since, at(160), "another one");
    }
}
