//! Requests in the order of recovery, over a repository in memory that fails when told to.

use std::time::Duration;

use super::super::tests::{Doors, cluster, content, holding_in, put, size};
use super::*;
use crate::catalog::Repository;
use crate::store::faulty::{FaultPlan, Faulty};
use crate::store::memory::MemoryStore;
use crate::types::{SegmentNumber, TimelineId};

const LAST: u64 = 12;

struct Scene {
    place: tempfile::TempDir,
    faulty: Faulty,
    repository: Repository,
    prefetch: Prefetch,
}

/// Segments 1 to 12 of timeline 1, and a helper that looks four ahead.
async fn scene(way: Way) -> Scene {
    let faulty = Faulty::new(Arc::new(MemoryStore::new()), FaultPlan::none(), 1);
    let repository = holding_in(Arc::new(faulty.clone()), "r0", 1..LAST + 1, u64::MAX).await;
    let place = tempfile::tempdir().unwrap();
    let local = Local { system: cluster().system, size: size() };
    let bounds = Bounds { segments: 4, leave_free: 0, ..Bounds::USUAL };
    let spool = Spool::create(place.path()).unwrap();
    let doors = Arc::new(Doors(vec![Some(repository.clone())]));
    let prefetch = Prefetch::new(doors, Some(cluster().name), local, way, spool, bounds);
    Scene { place, faulty, repository, prefetch }
}

impl Scene {
    fn way_of_one() -> Way {
        Way { path: vec!["00000001".parse().unwrap()], until: None, standby: None }
    }

    /// What a hook would deliver.
    async fn ask(&self, number: u64) -> Result<Option<Vec<u8>>, FetchError> {
        let answer = self.prefetch.answer(&name(number)).await?;
        Ok(answer.map(|staged| std::fs::read(staged.path()).unwrap()))
    }

    fn fails(&self, fails: bool) {
        self.faulty.set_plan(FaultPlan { before: if fails { 1.0 } else { 0.0 }, ..FaultPlan::none() });
    }

    /// Waits until so many openings have ended since the beginning.
    async fn ended(&self, count: u64) {
        let mut ended = self.prefetch.0.ended.subscribe();
        let waited = tokio::time::timeout(Duration::from_secs(60), ended.wait_for(|ended| *ended >= count)).await;
        waited.expect("openings end").unwrap();
    }

    fn files(&self) -> usize {
        let spools = std::fs::read_dir(self.place.path()).unwrap();
        spools.map(|spool| std::fs::read_dir(spool.unwrap().path()).unwrap().count()).sum()
    }
}

fn name(number: u64) -> String {
    SegmentNumber::new(number).file_name(TimelineId::FIRST, size())
}

#[tokio::test]
async fn what_was_opened_ahead_is_served_though_the_repository_fails() {
    for way in [Way::default(), Scene::way_of_one()] {
        let scene = scene(way).await;
        assert_eq!(scene.ask(1).await.unwrap(), Some(content(1, false)));
        scene.ended(4).await;
        scene.fails(true);
        assert_eq!(scene.files(), 4, "bounded, and the one that was served is gone");
        for number in 2..=5 {
            assert_eq!(scene.ask(number).await.unwrap(), Some(content(number, false)));
        }
        assert!(scene.ask(6).await.is_err(), "a fault is no answer");
        assert!(scene.prefetch.answer("00000002.history").await.is_err());
        scene.fails(false);
        for number in 6..=LAST {
            assert_eq!(scene.ask(number).await.unwrap(), Some(content(number, false)), "{number}");
        }
        assert_eq!(scene.ask(LAST + 1).await.unwrap(), None);
        assert!(scene.prefetch.answer("00000002.history").await.unwrap().is_none());
    }
}

/// What is not there, and the open segment, are asked for anew each time.
#[tokio::test]
async fn nothing_that_may_change_is_remembered() {
    let scene = scene(Way::default()).await;
    assert_eq!(scene.ask(LAST - 1).await.unwrap(), Some(content(LAST - 1, false)));
    scene.ended(2).await; // the last one, and one that is not there
    assert_eq!(scene.ask(LAST).await.unwrap(), Some(content(LAST, false)));
    for _ in 0..2 {
        assert_eq!(scene.ask(LAST + 1).await.unwrap(), None);
    }
    // Comes into being between two requests; while it is open it is nobody's to stage.
    put(&scene.repository, TimelineId::FIRST, LAST + 1, &content(LAST + 1, false)[..1000]).await;
    assert!(!scene.ask(LAST).await.unwrap().unwrap().is_empty());
    let before = *scene.prefetch.0.ended.borrow();
    scene.ended(before.max(4)).await;
    assert_eq!(scene.files(), 0, "an open segment was staged");
    put(&scene.repository, TimelineId::FIRST, LAST + 1, &content(LAST + 1, false)).await;
    assert_eq!(scene.ask(LAST + 1).await.unwrap(), Some(content(LAST + 1, false)));
}

#[tokio::test]
async fn a_spool_serves_nobody_elses_leftovers_and_leaves_none() {
    let place = tempfile::tempdir().unwrap();
    let left = place.path().join("spool-of-another");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join(name(2)), "another restore's").unwrap();
    let spool = Spool::create(place.path()).unwrap();
    assert!(!left.exists());
    let staged = spool.stage(&name(2), b"ours").unwrap();
    assert_eq!(std::fs::read(staged.path()).unwrap(), b"ours");
    // Renamed by a hook, or not: nothing of it stays.
    let dest = place.path().join("RECOVERYXLOG");
    std::fs::rename(staged.path(), &dest).unwrap();
    drop((staged, spool));
    assert_eq!(std::fs::read(&dest).unwrap(), b"ours");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
}

/// Where recovery jumps, what was staged for the other place goes.
#[tokio::test]
async fn a_jump_begins_anew() {
    let scene = scene(Scene::way_of_one()).await;
    assert!(scene.ask(7).await.unwrap().is_some());
    scene.ended(4).await;
    assert_eq!(scene.ask(1).await.unwrap(), Some(content(1, false)));
    scene.ended(8).await;
    assert_eq!(scene.files(), 4);
    for number in 2..=LAST {
        assert_eq!(scene.ask(number).await.unwrap(), Some(content(number, false)));
    }
}
