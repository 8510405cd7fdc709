//! A base backup where one is needed and nobody asked: behind a gap, behind WAL that came damaged, and for a history that
//! began.
//!
//! What the repositories hold says whether ([`crate::plan::needs_backup`]), so nothing is remembered: a restart asks again, and
//! one that is there is not taken twice. It is asked for each stream that begins and, in a stream, when damage was noted in
//! the repositories: what is taken then begins behind it. Not more often than [`AT_MOST`]; while each base backup is followed
//! by another reason for one, ever rarer.
//! A cluster without any base backup gets none: its owner has not begun to use it.
//!
//! Streaming does not wait for any of this, and is not disturbed: it is another task, with a connection of its own.
//! Crash and cancellation: as of a base backup; `stop` ends it.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::archive::{ClusterStatus, Progress};
use crate::plan::Need;
use crate::types::{Branch, ClusterName};

/// How long after one look the next one is, at least. A look costs a listing of the cluster's WAL.
const AT_MOST: Duration = Duration::from_secs(60);
/// When too little was there to say.
const SOON: Duration = Duration::from_secs(1);
/// The pause after a base backup that failed, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3600));

/// Looks at a cluster's repositories and takes its base backups.
#[async_trait(?Send)]
pub trait Mender {
    /// The cluster, for the log.
    fn cluster(&self) -> &ClusterName;

    /// Whether this history can be restored up to now, in every repository that answers; else why not, in words.
    async fn look(&self, branch: Branch) -> Result<Need, String>;

    /// Takes a base backup; its name.
    async fn take(&self, stop: CancellationToken) -> Result<String, String>;
}

/// Until `stop`, or until nobody archives any more.
pub async fn mend(mender: &dyn Mender, mut status: watch::Receiver<ClusterStatus>, stop: CancellationToken) {
    let work = async {
        let (mut after_failure, mut at_most) = (PAUSE.0, AT_MOST);
        while let Some(seen) = next_reason(&mut status, None).await {
            let looked = Instant::now();
            let taken = match look_and_take(mender, seen.branch, &stop).await {
                Looked::Fine => false,
                Looked::Taken => true,
                Looked::Failed => {
                    tracing::info!(cluster = %mender.cluster(), "another try in {} s", after_failure.as_secs());
                    tokio::time::sleep(after_failure).await;
                    after_failure = (after_failure * 2).min(PAUSE.1);
                    continue; // asks anew whether it is needed
                }
            };
            after_failure = PAUSE.0;
            // A disk that goes on to spoil what it is given makes each base backup useless in turn.
            let next_look = if taken { Instant::now() } else { looked } + at_most;
            at_most = if taken { (at_most * 2).min(PAUSE.1) } else { AT_MOST };
            let Some(next) = next_reason(&mut status, Some(seen)).await else { return };
            // The first damage of a stream does not wait: until then no more was looked at than its beginning.
            if taken || !next.is_first_damage_of(&seen) {
                tokio::time::sleep_until(next_look).await;
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = work => {}
    }
}

/// A stream, and how much damage is noted of what it brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    branch: Branch,
    since: Instant,
    noted: u64,
}

impl Seen {
    fn of(status: &ClusterStatus) -> Option<Seen> {
        match status {
            ClusterStatus::Streaming(Progress { branch, since, noted, .. }) => {
                Some(Seen { branch: *branch, since: *since, noted: *noted })
            }
            ClusterStatus::Connecting | ClusterStatus::Waiting { .. } => None,
        }
    }

    fn is_same_stream(&self, other: &Seen) -> bool {
        (self.branch, self.since) == (other.branch, other.since)
    }

    fn is_first_damage_of(&self, earlier: &Seen) -> bool {
        self.is_same_stream(earlier) && earlier.noted == 0 && self.noted > 0
    }
}

/// A stream: another one than `last`'s, or one of which more damage was noted since. `None` where there will be none.
async fn next_reason(status: &mut watch::Receiver<ClusterStatus>, last: Option<Seen>) -> Option<Seen> {
    let is_new = |seen: Seen| last.is_none_or(|last| !seen.is_same_stream(&last) || seen.noted > last.noted);
    let found = status.wait_for(|status| Seen::of(status).is_some_and(is_new)).await;
    found.ok().and_then(|status| Seen::of(&status))
}

/// What a look came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Looked {
    /// None is needed.
    Fine,
    /// One was, and is there now.
    Taken,
    /// Nobody could say, or none could be taken.
    Failed,
}

async fn look_and_take(mender: &dyn Mender, branch: Branch, stop: &CancellationToken) -> Looked {
    let cluster = mender.cluster();
    let deadline = Instant::now() + AT_MOST;
    let why = loop {
        match mender.look(branch).await {
            Ok(Need::Nothing) => return Looked::Fine,
            Ok(Need::NotYet) if Instant::now() > deadline => return Looked::Failed,
            Ok(Need::NotYet) => tokio::time::sleep(SOON).await,
            Ok(Need::Gap(hole)) => break format!("{hole}, and no base backup behind it"),
            Ok(Need::Branch(branch)) => break format!("there is none of branch {branch}, which is archived now"),
            Err(why) => {
                tracing::warn!(%cluster, "cannot tell whether a base backup is needed: {why}");
                return Looked::Failed;
            }
        }
    };
    tracing::warn!(%cluster, "a base backup is needed and is taken now: {why}");
    match mender.take(stop.clone()).await {
        Ok(label) => {
            tracing::warn!(%cluster, "base backup {label} was taken because one was needed: {why}");
            // A standby's begins with its last checkpoint, which may lie before the damage.
            if let Ok(Need::Gap(hole)) = mender.look(branch).await {
                tracing::error!(%cluster, "base backup {label} does not lead across it, either: {hole}. Take another one \
                     (`pgkeep backup`) when the server has passed a checkpoint behind it");
            }
            Looked::Taken
        }
        Err(error) => {
            tracing::error!(%cluster, "a base backup is needed and could not be taken: {error}");
            Looked::Failed
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::types::{Lsn, PgTimestamp, TimelineId};

    /// Repositories in which notes of damage need base backups behind them.
    struct Fake {
        cluster: ClusterName,
        begin: Instant,
        /// How much damage is noted, and how much lies before the newest base backup.
        noted: Mutex<(u64, u64)>,
        looks: Mutex<Vec<u64>>,
        taken: Mutex<Vec<u64>>,
        /// That a base backup takes.
        lasts: Duration,
    }

    impl Fake {
        fn new() -> Fake {
            let (cluster, begin) = ("main".parse().unwrap(), Instant::now());
            Fake {
                cluster,
                begin,
                noted: Mutex::default(),
                looks: Mutex::default(),
                taken: Mutex::default(),
                lasts: SOON,
            }
        }

        fn second(&self) -> u64 {
            self.begin.elapsed().as_secs()
        }

        fn spoil(&self, status: &watch::Sender<ClusterStatus>) {
            let count = {
                let mut noted = self.noted.lock().unwrap();
                noted.0 += 1;
                noted.0
            };
            status.send_modify(|status| {
                if let ClusterStatus::Streaming(progress) = status {
                    progress.noted = count;
                }
            });
        }
    }

    #[async_trait(?Send)]
    impl Mender for Fake {
        fn cluster(&self) -> &ClusterName {
            &self.cluster
        }

        async fn look(&self, branch: Branch) -> Result<Need, String> {
            self.looks.lock().unwrap().push(self.second());
            let (noted, mended) = *self.noted.lock().unwrap();
            let hole = crate::catalog::inventory::Hole { branch, from: Lsn::new(9), to: Lsn::new(10), reason: None };
            Ok(if noted > mended { Need::Gap(hole) } else { Need::Nothing })
        }

        async fn take(&self, _stop: CancellationToken) -> Result<String, String> {
            self.taken.lock().unwrap().push(self.second());
            let noted = self.noted.lock().unwrap().0; // it begins behind what was noted by now
            tokio::time::sleep(self.lasts).await;
            self.noted.lock().unwrap().1 = noted;
            Ok("20261120T031500Z".to_owned())
        }
    }

    fn streaming() -> ClusterStatus {
        ClusterStatus::Streaming(Progress {
            branch: Branch::first(TimelineId::FIRST),
            since: Instant::now(),
            received: Lsn::new(1),
            durable: Lsn::new(1),
            durable_in_one: Lsn::new(1),
            needed: 1,
            behind: Duration::ZERO,
            latency: None,
            server_end: Lsn::new(1),
            server_time: PgTimestamp::new(0),
            damage: None,
            noted: 0,
            repositories: Vec::new(),
        })
    }

    async fn watched(fake: &Fake, play: impl AsyncFnOnce(&watch::Sender<ClusterStatus>)) {
        let (status, stop) = (watch::Sender::new(streaming()), CancellationToken::new());
        let played = async {
            play(&status).await;
            stop.cancel();
        };
        tokio::join!(mend(fake, status.subscribe(), stop.clone()), played);
    }

    const MINUTE: Duration = Duration::from_secs(60);

    /// In the middle of a stream, at once, once for each, and by what the repositories hold: not again for what one lies
    /// behind.
    #[tokio::test(start_paused = true)]
    async fn damage_that_was_noted_while_streaming_is_mended_by_one_base_backup() {
        let fake = Fake::new();
        watched(&fake, async |status| {
            tokio::time::sleep(MINUTE * 10).await;
            assert_eq!((fake.looks.lock().unwrap().as_slice(), fake.taken.lock().unwrap().len()), (&[0][..], 0));
            fake.spoil(status);
            tokio::time::sleep(MINUTE * 600).await;
            assert_eq!(*fake.taken.lock().unwrap(), [600], "at once, and once");
            fake.spoil(status);
            tokio::time::sleep(MINUTE * 600).await;
            assert_eq!(*fake.taken.lock().unwrap(), [600, 36_600], "the next damage is another one");
            // A new connection to the same archive.
            status.send_replace(ClusterStatus::Connecting);
            status.send_replace(streaming());
            tokio::time::sleep(MINUTE * 600).await;
            assert_eq!(fake.taken.lock().unwrap().len(), 2, "what lies before a base backup needs none");
        })
        .await;
    }

    /// One that comes while a base backup is taken lies behind its beginning: another one is needed.
    #[tokio::test(start_paused = true)]
    async fn damage_that_comes_while_a_base_backup_is_taken_is_not_forgotten() {
        let fake = Fake { lasts: MINUTE * 30, ..Fake::new() };
        watched(&fake, async |status| {
            tokio::time::sleep(MINUTE).await;
            fake.spoil(status);
            tokio::time::sleep(MINUTE * 5).await;
            fake.spoil(status);
            tokio::time::sleep(MINUTE * 600).await;
            assert_eq!(fake.taken.lock().unwrap().len(), 2);
        })
        .await;
    }

    /// A disk that spoils something every ten seconds for a day.
    #[tokio::test(start_paused = true)]
    async fn damage_without_end_does_not_take_base_backups_without_end() {
        let fake = Fake::new();
        watched(&fake, async |status| {
            for _ in 0..24 * 360 {
                tokio::time::sleep(MINUTE / 6).await;
                fake.spoil(status);
            }
        })
        .await;
        let taken = fake.taken.lock().unwrap().len();
        assert!((10..=30).contains(&taken), "{taken} in a day");
    }
}
