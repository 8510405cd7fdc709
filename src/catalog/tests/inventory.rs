use super::*;
use crate::catalog::inventory::{Place, Run, Stretch};
use crate::catalog::layout::KeptFile;
use crate::catalog::records::{
    BackupInfo, BackupStart, GapReason, GapRecord, Manifest, Record, RecordError, ServerParameters, TablespaceInfo,
    from_json, to_json,
};
use crate::store::Created;
use crate::types::{BackupLabel, Lsn};

pub(super) fn lsn(number: u64, offset: u32) -> Lsn {
    segment(number).start(size()).advance(u64::from(offset))
}

pub(super) fn manifest(label: BackupLabel) -> Manifest {
    let backup = BackupInfo {
        label,
        system: cluster().system,
        branch: branch(1),
        timeline: TimelineId::FIRST,
        start: lsn(1, 40),
        stop: lsn(1, 5000),
        started_at: label.start(),
        stopped_at: label.start(),
        server_version: 150018,
        segment_size: size(),
        bytes: 30 << 20,
        stored_bytes: 4 << 20,
        files: 960,
        tablespaces: vec![TablespaceInfo { oid: 16385, location: "/srv/space".to_owned() }],
        flagged: None,
        parameters: ServerParameters { max_connections: 100, ..ServerParameters::default() },
    };
    let (packs, tables, tags, server_manifest, parents) = (vec![], vec![], vec![], vec![], vec![]);
    Manifest { backup, packs, tables, tags, server_manifest, parents }
}

pub(super) fn gap(from: Lsn, to: Lsn) -> GapRecord {
    let noticed_at = Timestamp::UNIX_EPOCH;
    let writer = random_id().unwrap();
    GapRecord { branch: branch(1), from, to, reason: GapReason::SlotLost, noticed_at, writer }
}

pub(super) async fn put_gap(repo: &Repository, gap: &GapRecord) -> Result<Created, CatalogError> {
    repo.put_record(&cluster(), ClusterObject::Gap(gap.branch, gap.from, gap.to), gap).await
}

#[tokio::test]
async fn an_inventory_is_what_lies_there() {
    let world = World::new().await;
    let repo = &world.repo;
    let empty = repo.load(&cluster()).await.unwrap();
    assert!(empty.branches.is_empty() && empty.segment_size.is_none());

    put_whole(repo, &wal(1), 1).await;
    drop(put_tail(repo, &wal(1), 1, (0, 2000), 500).await); // not yet removed
    put_whole(repo, &wal(2), 2).await;
    put_open(repo, &wal(3), 3, (0, 1000)).await;
    drop(put_tail(repo, &wal(3), 3, (1000, 9000), 500).await);
    put_whole(repo, &wal(6), 6).await;
    put_gap(repo, &gap(lsn(3, 9000), lsn(6, 0))).await.unwrap();
    repo.put_history(&cluster(), branch(2), b"1\t0/300100\tno recovery target specified\n").await.unwrap();
    let (done, begun) =
        (BackupLabel::at("2026-11-20T03:15:00Z".parse().unwrap()), BackupLabel::at(Timestamp::UNIX_EPOCH));
    for label in [done, begun] {
        let start = BackupStart { label, writer: repo.writer(), started_at: label.start(), parents: vec![] };
        repo.put_record(&cluster(), ClusterObject::Start(label), &start).await.unwrap();
    }
    repo.put_manifest(&cluster(), &manifest(done)).await.unwrap();
    let kept: KeptFile = "000000010000000000000003.partial".parse().unwrap();
    repo.put_wal_file(&cluster(), branch(1), &kept, &wal(3)).await.unwrap();
    let unknown = format!("{}/wal/00000001/README", cluster());
    world.replace(&unknown, b"hello".to_vec()).await;

    let inventory = repo.load(&cluster()).await.unwrap();
    assert_eq!(inventory.segment_size, Some(size()));
    assert_eq!(inventory.unknown, [unknown]);
    assert!(inventory.damaged.is_empty(), "{:?}", inventory.damaged);
    assert_eq!(inventory.backups, [manifest(done).backup]);
    assert_eq!(inventory.unfinished_backups, [begun]);
    assert_eq!(inventory.gaps.len(), 1);
    let one = &inventory.branches[&branch(1)];
    let want = [Run { from: lsn(1, 0), to: lsn(3, 9000) }, Run { from: lsn(6, 0), to: lsn(7, 0) }];
    assert_eq!(one.runs(size()), want);
    assert_eq!(one.note_of_newest.as_ref().unwrap().digest_to, Some(Digest::of(&wal(6))));
    assert!(one.pieces.iter().any(|piece| piece.place == Place::Tail && (piece.from, piece.to) == (1000, 9000)));
    assert_eq!(inventory.frontier(branch(1)), Some(lsn(7, 0)), "the gap was recorded");
    let path = inventory.path_of(branch(1)).unwrap();
    let stretches = inventory.covers(&path, lsn(1, 40), lsn(3, 9000)).unwrap();
    assert_eq!(stretches, [Stretch { branch: branch(1), from: lsn(1, 40), to: lsn(3, 9000) }]);
    assert!(inventory.covers(&path, lsn(1, 40), lsn(6, 1)).is_err(), "P3: never across one");
    assert_eq!(inventory.branches[&branch(2)].path().begins_at().to_string(), "0/300100");
    assert_eq!(repo.get_manifest(&cluster(), done).await.unwrap(), manifest(done));
}

#[tokio::test]
async fn p4_damaged_objects_are_named_and_do_not_spoil_the_picture() {
    let world = World::new().await;
    put_whole(&world.repo, &wal(1), 1).await;
    drop(put_tail(&world.repo, &wal(2), 2, (0, 9000), 3000).await);
    world.repo.put_history(&cluster(), branch(2), b"1\t0/300100\tx\n").await.unwrap();
    let label = BackupLabel::at(Timestamp::UNIX_EPOCH);
    world.repo.put_manifest(&cluster(), &manifest(label)).await.unwrap();
    put_gap(&world.repo, &gap(lsn(3, 0), lsn(4, 0))).await.unwrap();
    let mut names = Vec::new();
    for part in ["/open/", ".history", "/manifest", "/gap/"] {
        let name = world.named(part).await;
        let mut bytes = world.bytes(&name).await;
        bytes[97] ^= 1; // behind the header; in a tail the prelude
        let last = bytes.len() - 9;
        bytes[last] ^= 1; // the footer's tag
        world.replace(&name, bytes).await;
        names.push(name);
    }
    let inventory = world.repo.load(&cluster()).await.unwrap();
    let damaged: Vec<&String> = inventory.damaged.iter().map(|object| &object.name).collect();
    assert!(names.iter().all(|name| damaged.contains(&name)), "{damaged:?}");
    assert_eq!(inventory.branches[&branch(1)].runs(size()), [Run { from: lsn(1, 0), to: lsn(2, 0) }]);
    assert!(inventory.backups.is_empty());
}

#[tokio::test]
async fn p6_records_are_not_replaced() {
    let world = World::new().await;
    let record = gap(lsn(1, 0), lsn(2, 0));
    assert_eq!(put_gap(&world.repo, &record).await.unwrap(), Created::New);
    assert_eq!(put_gap(&world.other().await, &record).await.unwrap(), Created::AlreadyThere);
    let other = GapRecord { reason: GapReason::Recycled, ..record.clone() };
    assert!(matches!(put_gap(&world.repo, &other).await.unwrap_err(), CatalogError::Taken { .. }));
    let read: GapRecord =
        world.repo.get_record(&cluster(), ClusterObject::Gap(branch(1), record.from, record.to)).await.unwrap();
    assert_eq!(read, record);
}

#[test]
fn unknown_fields_are_ignored_unless_they_are_critical() {
    let record = gap(lsn(1, 0), lsn(2, 0));
    let json = String::from_utf8(to_json(&record).unwrap()).unwrap();
    let with = |field: &str| json.replacen('{', &format!("{{{field},"), 1).into_bytes();
    assert_eq!(from_json::<GapRecord>(&with(r#""moon":"full""#)).unwrap(), record);
    let error = from_json::<GapRecord>(&with(r#""moon":"full","critical":["moon"]"#)).unwrap_err();
    assert!(matches!(&error, RecordError::Critical { field } if field == "moon"), "{error}");
    assert!(matches!(from_json::<BackupStart>(json.as_bytes()), Err(RecordError::Other { .. })));
    assert!(matches!(from_json::<GapRecord>(b"[]"), Err(RecordError::Shape { .. })));
    assert_eq!(from_json::<GapRecord>(&with(r#""critical":[]"#)).unwrap(), record);
    let newer = json.replacen("slot-lost", "eaten-by-a-grue", 1);
    assert_eq!(from_json::<GapRecord>(newer.as_bytes()).unwrap().reason, GapReason::Other);
    assert_eq!(GapRecord::NAME, "gap");
}
