//! Requests over several repositories in memory, of which some are down.

use std::sync::Arc;

use async_trait::async_trait;

use super::*;
use crate::catalog::Repository;
use crate::catalog::records::WalRangeNote;
use crate::plan::WalNeed;
use crate::restore::other_history;
use crate::seal::KeyFile;
use crate::store::Store;
use crate::store::memory::MemoryStore;
use crate::types::Digest;

const LEN: u32 = 1 << 20;

pub(super) fn size() -> SegmentSize {
    SegmentSize::new(u64::from(LEN)).unwrap()
}

pub(super) fn cluster() -> ClusterId {
    ClusterId { name: "main".parse().unwrap(), system: SystemId::new(7_312_345_678_901_234_567) }
}

/// Segments of timeline 1; those from the second index on are of another history.
pub(super) async fn holding(name: &str, segments: std::ops::Range<u64>, other_from: u64) -> Repository {
    holding_in(Arc::new(MemoryStore::new()), name, segments, other_from).await
}

pub(super) async fn holding_in(
    store: Arc<dyn Store>,
    name: &str,
    segments: std::ops::Range<u64>,
    other_from: u64,
) -> Repository {
    let keys = KeyFile::generate().unwrap();
    let repository = Repository::create(name, store, &keys).await.unwrap();
    for number in segments {
        put(&repository, TimelineId::FIRST, number, &content(number, number >= other_from)).await;
    }
    repository
}

/// The beginning of a segment, or all of it, as a range.
pub(super) async fn put(repository: &Repository, timeline: TimelineId, number: u64, bytes: &[u8]) {
    let (segment, branch, len) = (SegmentNumber::new(number), Branch::first(timeline), bytes.len() as u32);
    let mut sealer = repository.seal_wal(&cluster(), branch, segment, size(), (0, len)).await.unwrap();
    sealer.push(bytes).unwrap();
    let note = WalRangeNote {
        writer: repository.writer(),
        server_version: 150_000,
        segment_size: size(),
        digest_from: Digest::of(b""),
        digest_to: Some(Digest::of(bytes)),
        server_time: None,
        server_end: None,
        durable_to: None,
        conflict: None,
    };
    repository.put_range(&sealer.finish(len, note).unwrap()).await.unwrap();
}

pub(super) fn content(number: u64, other: bool) -> Vec<u8> {
    (0..LEN).map(|at| (at as u8) ^ (number as u8) ^ if other { 0x80 } else { 0 }).collect()
}

/// `None`: it is down.
pub(super) struct Doors(pub Vec<Option<Repository>>);

#[async_trait]
impl Places for Doors {
    fn names(&self) -> Vec<String> {
        (0..self.0.len()).map(|index| format!("r{index}")).collect()
    }

    async fn open(&self, index: usize) -> Result<Repository, FetchError> {
        let down =
            || FetchError::Open { repository: format!("r{index}"), why: "it is down".to_owned(), retryable: true };
        self.0[index].clone().ok_or_else(down)
    }
}

/// What a request comes to, and what was written.
async fn ask(places: &Doors, way: &Way, number: u64) -> (Result<Fetched, FetchError>, Option<Vec<u8>>) {
    let folder = tempfile::tempdir().unwrap();
    let dest = folder.path().join("RECOVERYXLOG");
    let name = SegmentNumber::new(number).file_name(TimelineId::FIRST, size());
    let local = Some(Local { system: cluster().system, size: size() });
    let fetched = fetch(places, Some(&cluster().name), local, way, &name, &dest).await;
    (fetched, std::fs::read(&dest).ok())
}

fn ways() -> [Way; 2] {
    [Way::default(), Way { path: vec!["00000001".parse().unwrap()], until: None, standby: None }]
}

#[tokio::test(start_paused = true)]
async fn p7_not_there_is_said_only_when_all_answered() {
    let held = holding("r0", 1..3, u64::MAX).await;
    for way in ways() {
        for down_first in [false, true] {
            let mut places = vec![Some(held.clone()), None];
            if down_first {
                places.reverse();
            }
            let places = Doors(places);
            let (served, bytes) = ask(&places, &way, 2).await;
            assert_eq!((served.unwrap(), bytes), (Fetched::Served, Some(content(2, false))), "one has it");
            let (beyond, bytes) = ask(&places, &way, 3).await;
            assert!(matches!(beyond, Err(FetchError::Away { .. })) && bytes.is_none(), "{beyond:?}");
        }
        let all = Doors(vec![Some(held.clone()), Some(holding("r1", 1..2, u64::MAX).await)]);
        assert_eq!(ask(&all, &way, 3).await.0.unwrap(), Fetched::NotThere);
        assert_eq!(ask(&all, &way, 2).await.0.unwrap(), Fetched::Served);
    }
}

#[tokio::test(start_paused = true)]
async fn p7_a_history_file_is_not_there_only_when_all_answered() {
    let held = holding("r0", 1..3, u64::MAX).await;
    let folder = tempfile::tempdir().unwrap();
    let local = Some(Local { system: cluster().system, size: size() });
    let asked = async |places: &Doors| {
        fetch(places, None, local, &Way::default(), "00000002.history", &folder.path().join("RECOVERYHISTORY")).await
    };
    let away = asked(&Doors(vec![Some(held.clone()), None])).await;
    assert!(matches!(away, Err(FetchError::Away { .. })), "{away:?}");
    assert_eq!(asked(&Doors(vec![Some(held)])).await.unwrap(), Fetched::NotThere);
}

/// Two servers have archived under one name: whoever restores from the one must not be served the other's WAL.
#[tokio::test(start_paused = true)]
async fn p6_another_history_on_the_way_is_noticed() {
    let (branch, id) = (Branch::first(TimelineId::FIRST), cluster());
    let at = |number: u64| SegmentNumber::new(number).start(size());
    let wal = [WalNeed { branch, from: at(1), to: at(4), segments: 3 }];
    let one = holding("one", 1..4, u64::MAX).await;
    for (other, want) in [
        (holding("the same", 1..4, u64::MAX).await, None),
        (holding("longer", 1..6, 4).await, None),
        (holding("shorter", 1..3, u64::MAX).await, None),
        (holding("another", 1..4, 3).await, Some((branch, at(4)))),
        (holding("another, shorter", 1..3, 2).await, Some((branch, at(3)))),
        (holding("another, longer", 1..9, 2).await, Some((branch, at(4)))),
        (holding("later", 7..9, 7).await, None),
    ] {
        let theirs = other.load(&id).await.unwrap();
        let found = other_history(&one, (&other, &theirs), &id, &wal, size()).await.unwrap();
        assert_eq!(found, want, "{}", other.name());
    }
}

/// Errors, lost answers, delays, bodies cut and with flipped bits, by seed: a request gets the right bytes or an error; "not
/// there" only what is not there. `PGKEEP_SEEDS` says how many seeds.
#[tokio::test(start_paused = true)]
async fn p7_under_faults_by_seed_not_there_is_never_a_lie() {
    use crate::store::faulty::{FaultPlan, Faulty};
    let seeds = std::env::var("PGKEEP_SEEDS").map_or(4, |text| text.parse().unwrap());
    let (mut served, mut failed) = (0, 0);
    for seed in 0..seeds {
        let faulty = Faulty::new(Arc::new(MemoryStore::new()), FaultPlan::none(), seed);
        let repository = holding_in(Arc::new(faulty.clone()), "r0", 1..4, u64::MAX).await;
        let places = Doors(vec![Some(repository)]);
        faulty.set_plan(FaultPlan {
            before: 0.1,
            after: 0.05,
            delay: 0.2,
            delay_to: Duration::from_secs(120),
            cut: 0.1,
            flip: 0.1,
            ..FaultPlan::none()
        });
        for way in ways() {
            for number in [1, 2, 3, 4, 9] {
                let (answer, bytes) = ask(&places, &way, number).await;
                match answer {
                    Ok(Fetched::Served) => {
                        assert!(bytes == Some(content(number, false)), "seed {seed}: segment {number}");
                        served += 1;
                    }
                    Ok(Fetched::NotThere) => assert!(number > 3 && bytes.is_none(), "seed {seed}: {number} is there"),
                    Err(_) => {
                        assert!(bytes.is_none(), "seed {seed}: an error, and a file");
                        failed += 1;
                    }
                }
            }
        }
    }
    assert!(served > 0 && failed > 0, "{served} served, {failed} failed: nothing was shown");
}
