//! A lease of a fixed name, which one holder at a time has: `backup`, for whoever takes base backups by schedule.
//!
//! A holder puts beats; a reader that has seen no new one for [`EXPIRES`] of its own monotonic clock takes the next epoch by
//! creating its first beat, which of several only one can. No host's clock is compared with another's. A lease saves work
//! and guards nothing: where a store has no conditional create two may hold it, and a holder that was stopped for long finds
//! out only at its next beat that there is another one.
//! Crash: the beats stay and expire. Cancellation: a beat is put or not.

use std::time::Duration;

use super::CatalogError;
use super::layout::{ClusterObject, LeaseName, Name, Object, folder};
use super::repository::Repository;
use super::retention::LeaseRecord;
use crate::types::ClusterId;

/// From one beat of a holder to the next.
pub const BEAT: Duration = Duration::from_secs(20);
/// A reader that has seen no new beat for so long takes the lease for expired: several beats, and the time that a slow
/// store may take for one.
pub const EXPIRES: Duration = Duration::from_secs(120);

/// The newest beat of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beat {
    /// Its name.
    pub name: LeaseName,
    /// What it says; `None`: it does not open.
    pub record: Option<LeaseRecord>,
}

impl Beat {
    fn is_released(&self) -> bool {
        self.record.as_ref().is_some_and(|record| record.released)
    }
}

/// What a reader may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Somebody holds it.
    Held,
    /// Nobody does: it may be taken as this epoch.
    Free {
        /// The next one.
        epoch: u32,
    },
}

/// What a reader has seen of a lease. Pure: beats and its own clock are handed in.
#[derive(Debug, Default)]
pub struct Watcher {
    seen: Option<(LeaseName, Duration)>,
    highest: u32,
}

impl Watcher {
    /// Judges by the newest beat at `now`, a reading of a clock that only goes forward.
    pub fn judge(&mut self, newest: Option<&Beat>, now: Duration) -> Verdict {
        let Some(beat) = newest else {
            self.seen = None;
            return self.free();
        };
        self.highest = self.highest.max(beat.name.epoch);
        if beat.is_released() {
            return self.free();
        }
        match &self.seen {
            Some((name, since)) if *name == beat.name => {
                if now.saturating_sub(*since) >= EXPIRES {
                    self.free()
                } else {
                    Verdict::Held
                }
            }
            _ => {
                self.seen = Some((beat.name.clone(), now));
                Verdict::Held
            }
        }
    }

    fn free(&self) -> Verdict {
        Verdict::Free { epoch: self.highest.saturating_add(1) }
    }
}

impl Repository {
    /// The newest beat of a lease; `None` where there is none.
    ///
    /// # Errors
    /// What the store says.
    pub async fn newest_beat(&self, cluster: &ClusterId, lease: &str) -> Result<Option<Beat>, CatalogError> {
        let named = |key: &str| match Name::parse(key).ok()?.object {
            Object::Of(_, ClusterObject::Lease(name)) => Some(name),
            _ => None,
        };
        let listed = self.list_under(&folder::lease(cluster, lease)).await?;
        let newest =
            listed.iter().filter_map(|meta| named(meta.key.as_str())).max_by_key(|name| (name.epoch, name.beat));
        let Some(name) = newest else { return Ok(None) };
        match self.get_record::<LeaseRecord>(cluster, ClusterObject::Lease(name.clone())).await {
            Ok(record) => Ok(Some(Beat { name, record: Some(record) })),
            // Removed by the next beat: it is held.
            Err(error) if error.is_damage() || error.is_not_found() => Ok(Some(Beat { name, record: None })),
            Err(error) => Err(error),
        }
    }

    /// Takes a lease as `epoch`; `None`: somebody else was first.
    ///
    /// # Errors
    /// What the store says; a name that no lease can have.
    pub async fn take_lease(
        &self,
        cluster: &ClusterId,
        lease: &str,
        epoch: u32,
        record: &LeaseRecord,
    ) -> Result<Option<LeaseName>, CatalogError> {
        let name = LeaseName::new(lease, epoch, 1).ok_or_else(|| CatalogError::Misuse {
            name: lease.to_owned(),
            reason: "a lease is called by small letters and digits".to_owned(),
        })?;
        match self.put_record(cluster, ClusterObject::Lease(name.clone()), record).await {
            Ok(_) => {}
            Err(CatalogError::Taken { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
        // What earlier holders left. A later epoch is not ours to remove.
        for meta in self.list_under(&folder::lease(cluster, lease)).await? {
            if let Ok(Name { object: Object::Of(_, ClusterObject::Lease(old)), .. }) = Name::parse(meta.key.as_str())
                && old.epoch < epoch
            {
                self.end_lease(cluster, &old).await?;
            }
        }
        Ok(self.still_holds(cluster, &name).await?.then_some(name))
    }

    /// Is this beat of ours the newest one?
    ///
    /// # Errors
    /// What the store says.
    pub async fn still_holds(&self, cluster: &ClusterId, own: &LeaseName) -> Result<bool, CatalogError> {
        let newest = self.newest_beat(cluster, own.name()).await?;
        Ok(newest
            .is_some_and(|beat| beat.name == *own && beat.record.is_none_or(|record| record.writer == self.writer())))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::catalog::repository::Usage;
    use crate::seal::KeyFile;
    use crate::store::memory::MemoryStore;
    use crate::types::{Id128, SystemId};

    fn beat(epoch: u32, number: u32, released: bool) -> Beat {
        let empty = LeaseRecord::new("backup", Id128::new([0; 16]), jiff::Timestamp::UNIX_EPOCH);
        Beat { name: LeaseName::new("backup", epoch, number).unwrap(), record: Some(LeaseRecord { released, ..empty }) }
    }

    #[test]
    fn a_lease_expires_for_who_saw_no_new_beat() {
        let (mut watcher, second) = (Watcher::default(), Duration::from_secs(1));
        assert_eq!(watcher.judge(None, second), Verdict::Free { epoch: 1 });
        let held = beat(4, 7, false);
        assert_eq!(watcher.judge(Some(&held), second * 2), Verdict::Held);
        assert_eq!(watcher.judge(Some(&held), EXPIRES + second), Verdict::Held);
        assert_eq!(watcher.judge(Some(&beat(4, 8, false)), EXPIRES + second * 2), Verdict::Held, "a new beat");
        assert_eq!(watcher.judge(Some(&beat(4, 8, false)), EXPIRES * 2 + second * 2), Verdict::Free { epoch: 5 });
        assert_eq!(watcher.judge(Some(&beat(6, 2, true)), EXPIRES * 2), Verdict::Free { epoch: 7 });
        assert_eq!(watcher.judge(None, EXPIRES * 3), Verdict::Free { epoch: 7 }, "epochs grow");
    }

    /// Hosts whose clocks begin anywhere, that are stopped and that crash: a host works only after it took an epoch that
    /// nobody had, epochs grow, and while all beat in time at most one works.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// A host looks, and takes it if it may.
        Look(usize),
        /// The holder lets go.
        Release,
        /// The holder stops without a word.
        Crash,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![6 => (0usize..3).prop_map(Step::Look), 1 => Just(Step::Release), 1 => Just(Step::Crash)]
    }

    proptest! {
        #[test]
        fn one_holds_and_epochs_grow(steps in proptest::collection::vec((step(), 1u64..90), 1..200)) {
            let mut watchers: [Watcher; 3] = Default::default();
            let offsets = [Duration::ZERO, Duration::from_secs(1_000_000), Duration::from_secs(77)];
            let (mut now, mut newest, mut holder, mut epochs) = (Duration::ZERO, None::<Beat>, None, vec![0]);
            let mut next_beat = Duration::ZERO;
            for (step, pause) in steps {
                // While the holder lives it beats.
                let until = now + Duration::from_secs(pause);
                while holder.is_some() && next_beat <= until {
                    let last = newest.as_ref().unwrap();
                    newest = Some(beat(last.name.epoch, last.name.beat + 1, false));
                    next_beat += BEAT;
                }
                now = until;
                match step {
                    Step::Look(host) if holder != Some(host) => {
                        if let Verdict::Free { epoch } = watchers[host].judge(newest.as_ref(), now + offsets[host]) {
                            prop_assert_eq!(holder, None, "taken from one that beats");
                            prop_assert!(epoch > *epochs.last().unwrap());
                            epochs.push(epoch);
                            (newest, holder, next_beat) = (Some(beat(epoch, 1, false)), Some(host), now + BEAT);
                        }
                    }
                    Step::Release if holder.is_some() => {
                        let last = newest.as_ref().unwrap();
                        newest = Some(beat(last.name.epoch, last.name.beat + 1, true));
                        holder = None;
                    }
                    Step::Crash => holder = None,
                    _ => {}
                }
            }
            // Nobody waits for ever for one that crashed.
            if holder.is_none() {
                watchers[0].judge(newest.as_ref(), now + offsets[0]);
                let verdict = watchers[0].judge(newest.as_ref(), now + offsets[0] + EXPIRES);
                prop_assert!(matches!(verdict, Verdict::Free { .. }), "{:?}", verdict);
            }
        }
    }

    #[tokio::test]
    async fn of_two_who_take_it_one_has_it() {
        let (store, key) = (Arc::new(MemoryStore::new()), KeyFile::generate().unwrap());
        let cluster = ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7) };
        let one = Repository::create("a", store.clone(), &key).await.unwrap();
        let two = Repository::open_for("a", store, key, Usage::new().unwrap()).await.unwrap();
        let record = |of: &Repository| LeaseRecord::new("backup", of.writer(), of.now());
        assert_eq!(one.newest_beat(&cluster, "backup").await.unwrap(), None);
        let first = one.take_lease(&cluster, "backup", 1, &record(&one)).await.unwrap().unwrap();
        assert_eq!(two.take_lease(&cluster, "backup", 1, &record(&two)).await.unwrap(), None);
        let second = one.beat(&cluster, &first, &record(&one)).await.unwrap();
        assert!(one.still_holds(&cluster, &second).await.unwrap());
        assert!(!one.still_holds(&cluster, &first).await.unwrap());
        // It expired for the other one: the first holder finds out.
        let third = two.take_lease(&cluster, "backup", 2, &record(&two)).await.unwrap().unwrap();
        assert_eq!((third.epoch, one.still_holds(&cluster, &second).await.unwrap()), (2, false));
        assert_eq!(two.newest_beat(&cluster, "backup").await.unwrap().unwrap().name, third);
        let all = two.list_under(&folder::lease(&cluster, "backup")).await.unwrap();
        assert_eq!(all.len(), 1, "what earlier holders left is removed");
    }
}
