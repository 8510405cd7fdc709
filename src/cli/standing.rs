//! How far each repository of a cluster is, how far behind the best one, and what it lacks.

use std::time::Duration;

use jiff::Timestamp;

use super::output;
use crate::archive::ServedPath;
use crate::catalog::inventory::{ClusterInventory, Hole};
use crate::catalog::{CatalogError, Repository};
use crate::plan::holes;
use crate::types::{Branch, ClusterId, Lsn, PgTimestamp, SegmentSize};

/// A hole that nobody recorded is looked at again after this: while WAL arrives, pieces overtake each other.
const AGAIN: Duration = Duration::from_secs(1);

/// A picture of what a repository holds, and the holes behind the oldest base backup.
pub(super) async fn missing(
    repository: &Repository,
    id: &ClusterId,
) -> Result<(ClusterInventory, Vec<Hole>), CatalogError> {
    let inventory = repository.load(id).await?;
    let found = holes(&inventory);
    if found.iter().all(|hole| hole.reason.is_some()) {
        return Ok((inventory, found));
    }
    tokio::time::sleep(AGAIN).await;
    let inventory = repository.load(id).await?;
    let was_there =
        |hole: &Hole| found.iter().any(|earlier| (earlier.branch, earlier.from) == (hole.branch, hole.from));
    let mut holes = holes(&inventory);
    holes.retain(|hole| hole.reason.is_some() || was_there(hole));
    Ok((inventory, holes))
}

/// What a repository holds of a cluster, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Standing {
    /// Its name in the configuration.
    pub repository: String,
    /// The newest branch of which anything counts, and the end of its contiguous WAL.
    pub frontier: Option<(Branch, Lsn)>,
    /// When the server had written that, by its clock, as far as the repository tells.
    pub as_of: Option<Timestamp>,
    /// The cluster's segment size.
    pub segment_size: Option<SegmentSize>,
}

/// How far a repository is behind the best one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lag {
    /// The best one.
    pub best: String,
    /// Bytes of WAL that the best one holds and this one does not.
    pub bytes: u64,
    /// How much older its newest WAL is, in seconds.
    pub seconds: Option<u64>,
    /// It lacks a whole segment: it is being filled up, or is away.
    pub lacks_segments: bool,
}

impl Standing {
    /// From a picture of the repository.
    pub fn of(repository: &str, inventory: &ClusterInventory) -> Standing {
        let newest = inventory.branches.keys().rev().find_map(|branch| Some((*branch, inventory.frontier(*branch)?)));
        Standing::at(repository, inventory, newest)
    }

    /// On the way that the server has come, whatever else is archived: the newest branch may be another server's.
    pub fn on(repository: &str, inventory: &ClusterInventory, served: &ServedPath) -> Standing {
        let newest = served.history.path().into_iter().rev().find_map(|(timeline, _, left_at)| {
            let branch = served.lineage.branch(timeline);
            let held = inventory.frontier(branch)?;
            Some((branch, left_at.map_or(held, |left| held.min(left)))) // what lies beyond is nobody's future
        });
        Standing::at(repository, inventory, newest)
    }

    fn at(repository: &str, inventory: &ClusterInventory, newest: Option<(Branch, Lsn)>) -> Standing {
        let note = newest.and_then(|(branch, _)| inventory.branches.get(&branch)?.note_of_newest.as_ref());
        Standing {
            repository: repository.to_owned(),
            frontier: newest,
            as_of: note.and_then(|note| note.server_time).map(PgTimestamp::to_timestamp),
            segment_size: inventory.segment_size,
        }
    }
}

/// How far each is behind the best of them; `None` for the best and its equals.
pub(super) fn lags(standings: &[Standing]) -> Vec<Option<Lag>> {
    let best = standings.iter().filter(|standing| standing.frontier.is_some()).max_by_key(|standing| standing.frontier);
    let lag = |standing: &Standing| {
        let (best, end) = best.and_then(|best| Some((best, best.frontier?)))?;
        let held = standing.frontier.map_or(Lsn::ZERO, |(_, held)| held);
        if standing.frontier == best.frontier || best.repository == standing.repository {
            return None;
        }
        let seconds = best.as_of.zip(standing.as_of).map(|(best, own)| best.duration_since(own).as_secs());
        Some(Lag {
            best: best.repository.clone(),
            bytes: end.1.bytes_since(held).unwrap_or(0),
            seconds: seconds.map(|seconds| u64::try_from(seconds).unwrap_or(0)),
            lacks_segments: best.segment_size.is_some_and(|size| held < end.1.segment_start(size)),
        })
    };
    standings.iter().map(lag).collect()
}

impl Lag {
    /// `33.6 MB and 12 s behind main`.
    pub fn text(&self) -> String {
        let bytes = output::bytes(self.bytes);
        match self.seconds {
            Some(seconds) => format!("{bytes} and {seconds} s behind {}", self.best),
            None => format!("{bytes} behind {}", self.best),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::inventory::{BranchInventory, Place, WalPiece};
    use crate::types::{Lineage, TimelineId};

    fn standing(name: &str, frontier: Option<(u32, u64)>, at: i64) -> Standing {
        Standing {
            repository: name.to_owned(),
            frontier: frontier
                .map(|(timeline, lsn)| (Branch::first(TimelineId::new(timeline).unwrap()), Lsn::new(lsn))),
            as_of: frontier.map(|_| Timestamp::from_second(at).unwrap()),
            segment_size: SegmentSize::new(1 << 20),
        }
    }

    #[test]
    fn the_best_is_the_newest_timelines() {
        let all = [
            standing("a", Some((1, 9 << 20)), 100),
            standing("b", Some((2, (8 << 20) + 5)), 160),
            standing("c", Some((2, (8 << 20) + 1)), 159),
            standing("d", None, 0),
        ];
        let lags = lags(&all);
        assert_eq!(lags[1], None);
        let of = |index: usize| lags[index].clone().unwrap();
        assert_eq!((of(0).best.as_str(), of(0).bytes, of(0).seconds), ("b", 0, Some(60)));
        assert_eq!(
            (of(2).bytes, of(2).lacks_segments, of(2).text()),
            (4, false, "4 bytes and 1 s behind b".to_owned())
        );
        assert_eq!((of(3).bytes, of(3).lacks_segments, of(3).seconds), ((8 << 20) + 5, true, None));
    }

    /// A server on the first history of timeline 2, and another one's second history beside it; and one that was promoted
    /// just now.
    #[test]
    fn a_server_stands_on_its_own_way() {
        let size = SegmentSize::new(1 << 20).unwrap();
        let system = crate::types::SystemId::new(7);
        let mut inventory = ClusterInventory::new(ClusterId { name: "main".parse().unwrap(), system });
        inventory.segment_size = Some(size);
        let history = |number: u32, text: &str| {
            crate::types::TimelineHistory::parse(TimelineId::new(number).unwrap(), text.as_bytes()).unwrap()
        };
        let forked = "1\t0/300010\tx\n";
        for (name, segments) in [("00000001", 0..5), ("00000002", 3..6), ("00000002.1", 3..9)] {
            let branch: Branch = name.parse().unwrap();
            let piece = |segment| WalPiece {
                segment: crate::types::SegmentNumber::new(segment),
                from: 0,
                to: 1 << 20,
                place: Place::Wal,
                token: None,
                object_len: 0,
            };
            let history = (branch.timeline > TimelineId::FIRST).then(|| history(2, forked));
            let entry =
                BranchInventory { history, pieces: segments.map(piece).collect(), ..BranchInventory::new(branch) };
            inventory.branches.insert(branch, entry);
        }
        let on = |history: &crate::types::TimelineHistory, second: &str| {
            let lineage = Lineage::default().with(second.parse().unwrap());
            let (branch, lsn) =
                Standing::on("a", &inventory, &ServedPath { history: history.clone(), lineage }).frontier.unwrap();
            (branch.to_string(), lsn.get())
        };
        assert_eq!(on(&history(2, forked), "00000002"), ("00000002".to_owned(), 6 << 20));
        assert_eq!(on(&history(2, forked), "00000002.1"), ("00000002.1".to_owned(), 9 << 20));
        let newest = Standing::of("a", &inventory).frontier.unwrap();
        assert_eq!(newest.0.to_string(), "00000002.1", "without a server nobody can say more");
        // Nothing is archived of timeline 3 yet, which left the first timeline 2 where it is archived, or before.
        let third = history(3, "1\t0/300010\tx\n2\t0/480000\tx\n");
        assert_eq!(on(&third, "00000002"), ("00000002".to_owned(), 0x48_0000));
    }

    #[test]
    fn without_any_wal_nobody_is_behind() {
        assert_eq!(lags(&[standing("a", None, 0), standing("b", None, 0)]), [None, None]);
    }
}
