//! Our reading of `global/pg_control` against `pg_controldata` of every major that is found.

mod support;

use std::collections::HashMap;

use pgkeep::pg::control_file::{ClusterState, ControlFile, WalLevel};
use pgkeep::pg::instance::{InitOptions, StopMode};
use pgkeep::types::SegmentSize;
use support::{TestPg, for_each_major, ok};

/// What pg_controldata says, as the lines that we can say too.
fn check(pg: &TestPg) -> ControlFile {
    let said = pg.tool("pg_controldata", &["-D", &pg.data_dir().display().to_string()]);
    let said: HashMap<&str, &str> = said.lines().filter_map(|line| line.split_once(':')).collect();
    let control = ok(ControlFile::parse(&ok(std::fs::read(pg.data_dir().join("global/pg_control")))));
    let on = |value: bool| if value { "on" } else { "off" }.to_owned();
    let parameters = &control.parameters;
    let ours = [
        ("Database system identifier", control.system.to_string()),
        ("Catalog version number", control.catalog_version.to_string()),
        (
            "Database cluster state",
            match control.state {
                ClusterState::Startup => "starting up",
                ClusterState::ShutDown => "shut down",
                ClusterState::ShutDownInRecovery => "shut down in recovery",
                ClusterState::ShuttingDown => "shutting down",
                ClusterState::CrashRecovery => "in crash recovery",
                ClusterState::ArchiveRecovery => "in archive recovery",
                ClusterState::InProduction => "in production",
            }
            .to_owned(),
        ),
        ("Latest checkpoint location", control.checkpoint.to_string()),
        ("Latest checkpoint's REDO location", control.redo.to_string()),
        ("Latest checkpoint's TimeLineID", control.timeline.get().to_string()),
        ("Latest checkpoint's PrevTimeLineID", control.previous_timeline.get().to_string()),
        ("Latest checkpoint's full_page_writes", on(control.full_page_writes)),
        ("Latest checkpoint's NextXID", format!("{}:{}", control.next_xid >> 32, control.next_xid & 0xFFFF_FFFF)),
        ("Latest checkpoint's oldestXID", control.oldest_xid.to_string()),
        ("Latest checkpoint's oldestActiveXID", control.oldest_active_xid.to_string()),
        ("Minimum recovery ending location", control.min_recovery_point.to_string()),
        (
            "Min recovery ending loc's timeline",
            control.min_recovery_timeline.map_or(0, pgkeep::types::TimelineId::get).to_string(),
        ),
        ("Backup start location", control.backup_start.to_string()),
        ("Backup end location", control.backup_end.to_string()),
        ("End-of-backup record required", if control.backup_end_required { "yes" } else { "no" }.to_owned()),
        (
            "wal_level setting",
            match parameters.wal_level {
                WalLevel::Minimal => "minimal",
                WalLevel::Replica => "replica",
                WalLevel::Logical => "logical",
            }
            .to_owned(),
        ),
        ("wal_log_hints setting", on(parameters.wal_log_hints)),
        ("max_connections setting", parameters.max_connections.to_string()),
        ("max_worker_processes setting", parameters.max_worker_processes.to_string()),
        ("max_wal_senders setting", parameters.max_wal_senders.to_string()),
        ("max_prepared_xacts setting", parameters.max_prepared_transactions.to_string()),
        ("max_locks_per_xact setting", parameters.max_locks_per_transaction.to_string()),
        ("track_commit_timestamp setting", on(parameters.track_commit_timestamp)),
        ("Database block size", control.block_size.to_string()),
        ("Blocks per segment of large relation", control.blocks_per_file.to_string()),
        ("WAL block size", control.wal_block_size.to_string()),
        ("Bytes per WAL segment", control.segment_size.bytes().to_string()),
        ("Data page checksum version", u32::from(control.data_checksums).to_string()),
    ];
    for (name, ours) in ours {
        assert_eq!(Some(ours.as_str()), said.get(name).map(|value| value.trim()), "{name}");
    }
    assert_eq!(control.major, pg.installation().major);
    let version = pg.sql_if_running(
        "SELECT checkpoint_lsn || ' ' || extract(epoch FROM checkpoint_time)::bigint FROM pg_control_checkpoint()",
    );
    if let Some(version) = version {
        assert_eq!(version, format!("{} {}", control.checkpoint, control.checkpoint_time));
    }
    control
}

#[test]
fn the_control_file_reads_as_pg_controldata_reads_it() {
    for_each_major(|installation| {
        let options = InitOptions {
            segment_size: SegmentSize::new(64 << 20),
            data_checksums: installation.major % 2 == 0,
            extra_conf: "wal_level = logical\nmax_prepared_transactions = 3\nmax_wal_senders = 7\n\
                         max_worker_processes = 9\nmax_locks_per_transaction = 77\nwal_log_hints = on\n\
                         track_commit_timestamp = on"
                .to_owned(),
            // 18 makes checksums unless told otherwise; the others do not know the word.
            initdb_args: if installation.major >= 18 && installation.major % 2 != 0 {
                vec!["--no-data-checksums".to_owned()]
            } else {
                Vec::new()
            },
            ..InitOptions::new(installation.clone())
        };
        let mut pg = TestPg::start_with(options);
        pg.sql("CREATE TABLE t AS SELECT generate_series(1, 10)");
        pg.sql("CHECKPOINT");
        assert_eq!(check(&pg).state, ClusterState::InProduction);
        ok(pg.stop(StopMode::Fast));
        assert_eq!(check(&pg).state, ClusterState::ShutDown);
    });
}

#[test]
fn the_control_file_of_a_standby_holds_its_recovery() {
    for_each_major(|installation| {
        let primary = TestPg::start(installation, "");
        let dir = ok(primary.scratch_dir("standby"));
        let into = dir.display().to_string();
        primary.tool("pg_basebackup", &["-D", &into, "-c", "fast", "-R", "--no-sync"]);
        let mut standby = TestPg::attach(installation, &dir);
        ok(standby.start());
        let control = check(&standby);
        assert_eq!(control.state, ClusterState::ArchiveRecovery);
        assert!(control.min_recovery_timeline.is_some() && control.min_recovery_point >= control.redo);
        ok(standby.stop(StopMode::Fast));
        assert_eq!(check(&standby).state, ClusterState::ShutDownInRecovery);
    });
}
