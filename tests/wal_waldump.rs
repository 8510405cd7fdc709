//! Our reading of real WAL against that of PostgreSQL's own `pg_waldump`, record by record, for every major that is found.

mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use pgkeep::pg::instance::{Installation, StopMode};
use pgkeep::types::{Lsn, PgTimestamp, SegmentNumber, SegmentSize, TimelineId};
use pgkeep::wal::{
    Decoder, Fact, Fork, PAGE_SIZE, Record, WalAudit, WalLevel, fact, may_be_fact, pad_open_segment, rmgr, wal_end,
};
use support::{TestPg, for_each_major, ok};

/// Everything that writes a kind of record we know, in a few seconds.
fn workload(pg: &mut TestPg, mib: u64) {
    let psql = |statements: &[&str]| {
        let mut arguments = vec!["-X", "-q", "-d", "postgres"];
        statements.iter().for_each(|statement| arguments.extend(["-c", statement]));
        pg.tool("psql", &arguments);
    };
    pg.tool("pgbench", &["-i", "-q", "-s", "1", "postgres"]);
    psql(&["CREATE DATABASE other", "SELECT pg_create_restore_point('before the work')", "CHECKPOINT"]);
    pg.tool("pgbench", &["-n", "-c", "4", "-t", "250", "postgres"]);

    // Full-page images of every kind that this server can write.
    let methods =
        "SELECT coalesce(array_to_string(enumvals, ' '), 'on') FROM pg_settings WHERE name = 'wal_compression'";
    for method in pg.sql(methods).split(' ') {
        let set = format!("SET wal_compression = {method}");
        psql(&["CHECKPOINT", &set, "UPDATE pgbench_accounts SET filler = aid::text WHERE aid % 50 = 0"]);
    }
    let check = "SET wal_consistency_checking = 'heap, btree'";
    psql(&[check, "UPDATE pgbench_branches SET bbalance = 0", "INSERT INTO pgbench_tellers VALUES (1000, 1, 1, '')"]);

    // Subtransactions, more than 64 of them too, that commit and that do not; rollbacks.
    psql(&[
        "CREATE TABLE s (n int)",
        "DO $$ BEGIN FOR i IN 1..100 LOOP BEGIN INSERT INTO s VALUES (i); IF i % 3 = 0 THEN RAISE EXCEPTION 'no'; END IF; \
         EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$",
        "BEGIN",
        "INSERT INTO s VALUES (1)",
        "SAVEPOINT a",
        "CREATE TABLE gone (n int)",
        "SAVEPOINT b",
        "INSERT INTO s VALUES (2)",
        "ROLLBACK",
        "BEGIN",
        "SAVEPOINT a",
        "DROP TABLE s",
        "COMMIT",
    ]);
    // Prepared transactions, with subtransactions, dropped and created files.
    psql(&[
        "CREATE TABLE p (n int)",
        "CREATE TABLE dropped (n int PRIMARY KEY)",
        "BEGIN",
        "INSERT INTO p VALUES (1)",
        "SAVEPOINT a",
        "DROP TABLE dropped",
        "PREPARE TRANSACTION 'to commit'",
        "BEGIN",
        "INSERT INTO p VALUES (1)",
        "SAVEPOINT a",
        "CREATE TABLE never (n int PRIMARY KEY)",
        "PREPARE TRANSACTION 'to roll back'",
        "COMMIT PREPARED 'to commit'",
        "ROLLBACK PREPARED 'to roll back'",
    ]);
    // DDL, all index methods, sequences, large values and very large records.
    psql(&[
        "CREATE TABLE d (a int, b text, c point, j jsonb)",
        "INSERT INTO d SELECT i, repeat(md5(i::text), i % 200), point(i, i), jsonb_build_object('k', i) FROM generate_series(1, 3000) i",
        "CREATE INDEX ON d USING btree (a)",
        "CREATE INDEX ON d USING hash (a)",
        "CREATE INDEX ON d USING gin (j)",
        "CREATE INDEX ON d USING gist (c)",
        "CREATE INDEX ON d USING spgist (c)",
        "CREATE INDEX ON d USING brin (a)",
        "INSERT INTO d SELECT i, '', point(i, -i), jsonb_build_object('l', i) FROM generate_series(1, 2000) i",
        "DELETE FROM d WHERE a % 2 = 0",
        "VACUUM (FREEZE) d",
        "VACUUM FULL d",
        "TRUNCATE d",
        "CREATE SEQUENCE q",
        "SELECT nextval('q')",
        "SELECT pg_logical_emit_message(true, 'large', repeat('0123456789abcdef', 200000))",
        "SELECT pg_logical_emit_message(false, '', '')",
        "SELECT pg_switch_wal()",
        "SELECT pg_switch_wal()", // does nothing
        "INSERT INTO p VALUES (2)",
        "SELECT pg_switch_wal()",
        "SELECT pg_create_restore_point(repeat('n', 63))",
        "SELECT pg_create_restore_point('twice')",
        "SELECT pg_create_restore_point('twice')",
        "DROP DATABASE other",
    ]);
    the_rest(pg);
    let backup = ok(pg.scratch_dir("backup"));
    let backup = backup.join("base");
    pg.tool("pg_basebackup", &["-X", "none", "-c", "fast", "-D", &backup.to_string_lossy()]);

    // A crash that leaves a record unfinished: the segment that holds its end is gone.
    pg.sql("CHECKPOINT");
    let size = SegmentSize::new(mib << 20).expect("a segment size");
    let start: Lsn = pg.sql("SELECT pg_current_wal_insert_lsn()").parse().expect("an LSN");
    let message = format!("SELECT pg_logical_emit_message(true, '', repeat('x', {}))", (mib << 20) * 3 / 2);
    pg.sql(&message);
    ok(pg.kill());
    for segment in segments(&pg.data_dir().join("pg_wal"), size) {
        if segment.1 > start.segment(size) {
            std::fs::remove_file(segment.2).expect("remove a segment");
        }
    }
    ok(pg.append_conf("max_connections = 33\nmax_locks_per_transaction = 77\nwal_log_hints = on\n"));
    ok(pg.start());
    pg.tool("pgbench", &["-n", "-c", "2", "-t", "50", "postgres"]);

    // A promotion.
    ok(pg.stop(StopMode::Fast));
    std::fs::write(pg.data_dir().join("standby.signal"), "").expect("write standby.signal");
    ok(pg.start());
    ok(pg.promote());
    support::wait_until("the promotion", std::time::Duration::from_secs(60), || {
        pg.sql("SELECT pg_is_in_recovery()") == "f"
    });
    pg.sql("CREATE TABLE after_promotion (n int)");
    ok(pg.stop(StopMode::Fast));
}

/// What else a database does in its life.
fn the_rest(pg: &TestPg) {
    let space = ok(pg.scratch_dir("space"));
    let space = format!("CREATE TABLESPACE sp LOCATION '{}'", space.display());
    let statements = [
        // Large objects, unlogged tables, partitions, views that are kept, rewrites.
        "SELECT lo_from_bytea(7000, decode(repeat('ab', 20000), 'hex'))",
        "SELECT lo_put(7000, 5000, 'changed')",
        "SELECT lo_unlink(7000)",
        "CREATE UNLOGGED TABLE u (n int PRIMARY KEY)",
        "INSERT INTO u VALUES (1)",
        "ALTER TABLE u SET LOGGED",
        &space,
        "CREATE TABLE part (k int, v text) PARTITION BY RANGE (k)",
        "CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (500) TABLESPACE sp",
        "CREATE TABLE part_2 PARTITION OF part FOR VALUES FROM (500) TO (1000)",
        "INSERT INTO part SELECT i, repeat('v', i % 50) FROM generate_series(0, 999) i",
        "CREATE INDEX part_k ON part (k)",
        "CREATE MATERIALIZED VIEW mv AS SELECT k, v FROM part",
        "REFRESH MATERIALIZED VIEW mv",
        "CLUSTER part_1 USING part_1_k_idx",
        "ALTER TABLE part ALTER COLUMN k TYPE bigint",
        "REINDEX TABLE part_2",
        "ALTER TABLE part DETACH PARTITION part_1",
        "DROP TABLE part_1",
        "DROP TABLESPACE sp",
        "VACUUM FULL pg_class",
        // Updates that stay on their page, and locks that two transactions hold on a row.
        "CREATE TABLE hot (id int PRIMARY KEY, n int) WITH (fillfactor = 50)",
        "INSERT INTO hot SELECT i, 0 FROM generate_series(1, 200) i",
        "UPDATE hot SET n = n + 1",
        "UPDATE hot SET n = n + 1",
        "BEGIN",
        "SELECT count(*) FROM (SELECT * FROM hot WHERE id < 20 FOR KEY SHARE) locked",
        "SAVEPOINT a",
        "UPDATE hot SET n = n + 1 WHERE id < 20",
        "COMMIT",
        "VACUUM hot",
        "BEGIN",
        "DELETE FROM hot",
        "TRUNCATE part",
        "ROLLBACK",
        "SELECT setval('q', 5000)",
        "ALTER SEQUENCE q RESTART",
        // Changes that came from elsewhere.
        "SELECT pg_replication_origin_create('elsewhere')",
        "SELECT pg_replication_origin_session_setup('elsewhere')",
        "INSERT INTO hot VALUES (1001, 1)",
        "SELECT pg_replication_origin_session_reset()",
        "SELECT pg_replication_origin_advance('elsewhere', '0/ABC')",
        "SELECT pg_replication_origin_drop('elsewhere')",
    ];
    let mut arguments = vec!["-X", "-q", "-d", "postgres"];
    statements.iter().for_each(|statement| arguments.extend(["-c", statement]));
    pg.tool("psql", &arguments);
}

/// The segments of a pg_wal: timeline, number, path, in order.
fn segments(dir: &Path, size: SegmentSize) -> Vec<(TimelineId, SegmentNumber, std::path::PathBuf)> {
    let mut found: Vec<_> = std::fs::read_dir(dir)
        .expect("list pg_wal")
        .filter_map(|entry| {
            let path = entry.expect("list pg_wal").path();
            let (timeline, number) = SegmentNumber::from_file_name(path.file_name()?.to_str()?, size)?;
            Some((timeline, number, path))
        })
        .collect();
    found.sort();
    found
}

/// One record as both sides tell it.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    rmgr: String,
    len: usize,
    len_without_images: usize,
    xid: u32,
    start: Lsn,
    prev: Lsn,
    blocks: String,
}

impl Line {
    /// Where the record's last byte lies, counted over the page headers in between.
    fn last_byte(&self, size: SegmentSize) -> Lsn {
        let (mut at, mut left) = (self.start, self.len as u64);
        loop {
            let room = PAGE_SIZE - at.get() % PAGE_SIZE;
            if left <= room {
                return at.advance(left - 1);
            }
            (at, left) = (at.advance(room), left - room);
            at = at.advance(if at.segment_offset(size) == 0 { 40 } else { 24 });
        }
    }
}

/// A line of `pg_waldump`, and its description.
fn parse_line(line: &str) -> (Line, &str) {
    let field = |before: &str, after: &str| {
        let rest = line.split_once(before).unwrap_or_else(|| panic!("{before:?} in {line}")).1;
        rest.split_once(after).unwrap_or_else(|| panic!("{after:?} in {line}")).0.trim()
    };
    let desc = line.split_once("desc: ").expect("a description").1;
    let (desc, blocks) = desc.find(", blkref #").map_or((desc, ""), |at| desc.split_at(at));
    let parsed = Line {
        rmgr: field("rmgr: ", " len ").to_owned(),
        len_without_images: field("(rec/tot): ", "/").parse().expect("a length"),
        len: field("/", ", tx:").rsplit('/').next().and_then(|len| len.trim().parse().ok()).expect("a length"),
        xid: field("tx: ", ",").parse().expect("an xid"),
        start: field("lsn: ", ",").parse().expect("an LSN"),
        prev: field("prev ", ",").parse().expect("an LSN"),
        blocks: blocks.to_owned(),
    };
    (parsed, desc)
}

fn our_line(record: &Record<'_>) -> Line {
    let fragments = record.fragments().unwrap_or_else(|damage| panic!("{damage}"));
    assert_eq!(record.main_data().as_ref(), Ok(&fragments.main_data));
    let (mut blocks, mut images) = (String::new(), 0);
    for block in &fragments.blocks {
        let fork = match block.fork {
            Fork::Main => "",
            Fork::FreeSpaceMap => " fork fsm",
            Fork::VisibilityMap => " fork vm",
            Fork::Init => " fork init",
        };
        let image = match block.image {
            None => "",
            Some(image) if image.apply => " FPW",
            Some(_) => " FPW for WAL verification",
        };
        images += block.image.map_or(0, |image| image.bytes.len());
        let (id, rel) = (block.id, block.relation);
        let (tablespace, database, number) = (rel.tablespace, rel.database, rel.number);
        write!(blocks, ", blkref #{id}: rel {tablespace}/{database}/{number}{fork} blk {}{image}", block.block)
            .expect("write to a string");
    }
    Line {
        rmgr: rmgr::name(record.rmgr).unwrap_or("?").to_owned(),
        len: record.total_len(),
        len_without_images: record.total_len() - images,
        xid: record.xid,
        start: record.start,
        prev: record.prev,
        blocks,
    }
}

fn show_time(time: PgTimestamp) -> String {
    time.to_string().replace('T', " ").replace('Z', " UTC")
}

fn show_level(level: WalLevel) -> &'static str {
    match level {
        WalLevel::Minimal => "minimal",
        WalLevel::Replica => "replica",
        WalLevel::Logical => "logical",
    }
}

fn on_off(value: bool) -> &'static str {
    if value { "on" } else { "off" }
}

/// What a fact must look like in `pg_waldump`'s description: its beginning, and what else must be in it.
fn describe(fact: &Fact) -> (&'static str, String, Vec<String>) {
    let end_of = |xid: &u32, time: &PgTimestamp, subxids: &[u32], prepared: bool| {
        let xid = if prepared { format!("{xid}: ") } else { String::new() };
        let list: Vec<String> = subxids.iter().map(u32::to_string).collect();
        let list = if list.is_empty() { vec![] } else { vec![format!("; subxacts: {}", list.join(" "))] };
        (format!("{xid}{}", show_time(*time)), list)
    };
    match fact {
        Fact::Commit { xid, time, subxids, prepared } => {
            let (text, list) = end_of(xid, time, subxids, *prepared);
            if *prepared {
                ("COMMIT PREPARED", format!("COMMIT_PREPARED {text}"), list)
            } else {
                ("COMMIT", format!("COMMIT {text}"), list)
            }
        }
        Fact::Abort { xid, time, subxids, prepared } => {
            let (text, list) = end_of(xid, time, subxids, *prepared);
            if *prepared {
                ("ROLLBACK PREPARED", format!("ABORT_PREPARED {text}"), list)
            } else {
                ("ABORT", format!("ABORT {text}"), list)
            }
        }
        Fact::RestorePoint { name, .. } => ("RESTORE_POINT", format!("RESTORE_POINT {name}"), vec![]),
        Fact::ParameterChange(p) => (
            "PARAMETER_CHANGE",
            format!(
                "PARAMETER_CHANGE max_connections={} max_worker_processes={} max_wal_senders={} max_prepared_xacts={} \
                 max_locks_per_xact={} wal_level={} wal_log_hints={} track_commit_timestamp={}",
                p.max_connections,
                p.max_worker_processes,
                p.max_wal_senders,
                p.max_prepared_transactions,
                p.max_locks_per_transaction,
                show_level(p.wal_level),
                on_off(p.wal_log_hints),
                on_off(p.track_commit_timestamp),
            ),
            vec![],
        ),
        Fact::Checkpoint(c) => {
            let kind = if c.shutdown { "shutdown" } else { "online" };
            let mut rest =
                vec![format!(" xid {}:{};", c.next_xid >> 32, c.next_xid & 0xFFFF_FFFF), format!("; {kind}")];
            rest.extend(c.wal_level.map(|level| format!(" wal_level {};", show_level(level))));
            let name = if c.shutdown { "CHECKPOINT_SHUTDOWN" } else { "CHECKPOINT_ONLINE" };
            let (redo, tli, prev) = (c.redo, c.timeline.get(), c.previous_timeline.get());
            (name, format!("{name} redo {redo}; tli {tli}; prev tli {prev}; fpw {};", c.full_page_writes), rest)
        }
        Fact::EndOfRecovery { time, timeline, previous_timeline } => {
            let (tli, prev) = (timeline.get(), previous_timeline.get());
            let time = show_time(*time);
            ("END_OF_RECOVERY", format!("END_OF_RECOVERY tli {tli}; prev tli {prev}; time {time}"), vec![])
        }
        Fact::BackupEnd { start } => ("BACKUP_END", format!("BACKUP_END {start}"), vec![]),
        Fact::Switch => ("SWITCH", "SWITCH".to_owned(), vec![]),
        Fact::OverwrittenRecord { start, time } => {
            let time = show_time(*time);
            ("OVERWRITE_CONTRECORD", format!("OVERWRITE_CONTRECORD lsn {start}; time {time}"), vec![])
        }
    }
}

/// The lines of `pg_waldump` for one timeline, from `start` to `end` or to the end of what there is.
fn waldump(installation: &Installation, dir: &Path, timeline: TimelineId, start: Lsn, end: Option<Lsn>) -> String {
    let mut command = installation.command("pg_waldump").unwrap_or_else(|error| panic!("{error}"));
    command.env("TZ", "UTC").arg("-p").arg(dir).args(["-t", &timeline.get().to_string(), "-s", &start.to_string()]);
    if let Some(end) = end {
        command.args(["-e", &end.to_string()]);
    }
    let mut run = || {
        let output = command.output().expect("run pg_waldump");
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        (output, complaint)
    };
    let (mut output, mut complaint) = run();
    // It learns the segment size from any file; one that the server is just making has no size yet.
    support::wait_until("the server to have made its next segment", Duration::from_secs(20), || {
        let made = !complaint.contains("(0 bytes)");
        if !made {
            (output, complaint) = run();
        }
        made
    });
    // Without an end it stops at the zeros behind the last record, and calls that an error.
    assert!(output.status.success() || (end.is_none() && complaint.contains("invalid record length")), "{complaint}");
    let text = String::from_utf8(output.stdout).expect("UTF-8 from pg_waldump");
    // It begins with a remark where it had to look for the first record.
    text.lines().filter(|line| line.starts_with("rmgr: ")).map(|line| format!("{line}\n")).collect()
}

/// What was seen of one cluster's WAL.
struct Seen {
    records: usize,
    facts: BTreeMap<&'static str, usize>,
    /// Records of each resource manager.
    managers: BTreeMap<String, usize>,
}

fn compare(pg: &TestPg, size: SegmentSize) -> Seen {
    let dir = pg.data_dir().join("pg_wal");
    let all = segments(&dir, size);
    let newest = all.last().expect("segments").0;
    assert_eq!(newest.get(), 2, "it was promoted");
    let fork = std::fs::read(dir.join(format!("{newest}.history"))).expect("read the history file");
    let fork = pgkeep::types::TimelineHistory::parse(newest, &fork).expect("a history file").begins_at();

    // PostgreSQL's reading, from the first record on.
    let (_, first_segment, _) = all.first().expect("segments");
    let start = first_segment.start(size);
    let first = start.advance(40);
    let mut text = waldump(pg.installation(), &dir, TimelineId::FIRST, first, Some(fork));
    text.push_str(&waldump(pg.installation(), &dir, newest, fork, None));
    let last = parse_line(text.lines().last().expect("records")).0;
    let valid_end = Lsn::new(last.last_byte(size).advance(1).get().next_multiple_of(8));

    // The newest timeline's copy of each segment; their pages, one by one. Behind the end of the WAL the segment in which a
    // timeline begins holds copies of the fork's page, not zeros: nothing from there on is WAL.
    let mut files: BTreeMap<SegmentNumber, Bytes> = BTreeMap::new();
    for (timeline, number, path) in &all {
        let segment_start = number.start(size);
        let end = if *timeline == newest { valid_end } else { fork };
        let Some(valid) = end.bytes_since(segment_start).filter(|valid| *valid > 0) else { continue };
        let mut bytes = std::fs::read(path).expect("read a segment");
        assert_eq!(bytes.len() as u64, size.bytes());
        bytes.truncate(valid as usize);
        // Each file alone raises no alarm, whatever record it begins or ends in.
        let mut audit = WalAudit::new(segment_start, size, None, *timeline).expect("a segment's start");
        audit.push(&bytes);
        assert_eq!(audit.take(), None, "{}", path.display());
        bytes.resize(size.bytes() as usize, 0);
        files.insert(*number, Bytes::from(bytes));
    }
    let slices: Vec<Bytes> = files.values().cloned().collect();
    let mut audit = WalAudit::new(start, size, None, newest).expect("a segment's start").that_may_end();
    slices.iter().flat_map(|slice| slice.chunks(131_072)).for_each(|message| audit.push(message));
    assert_eq!(audit.take(), None, "an alarm in sound WAL");

    // All records, in network-sized slices; the facts alone, in others.
    let (mut ours, mut bodies, mut facts) = (Vec::new(), Vec::new(), BTreeMap::new());
    let mut decoder = Decoder::new(start, size);
    for slice in slices.iter().flat_map(|slice| (0..slice.len()).step_by(100_003).map(move |at| (slice, at))) {
        decoder.push(slice.0.slice(slice.1..slice.0.len().min(slice.1 + 100_003)));
        while let Some(record) = decoder.next().unwrap_or_else(|damage| panic!("{damage}")) {
            if let Some(fact) = fact(&record).unwrap_or_else(|damage| panic!("{damage}")) {
                facts.insert(record.start, fact);
            }
            ours.push(our_line(&record));
            bodies.push(crc32c::crc32c(record.body()));
        }
    }
    assert_eq!(decoder.format().map(|format| format.major), Some(pg.installation().major));
    let end = decoder.end_of_last_record();
    assert_eq!(decoder.ended_at(), Some(end), "zeros follow the shutdown checkpoint");
    let mut filtered = Decoder::new(start, size).only(may_be_fact);
    let mut again = BTreeMap::new();
    for slice in &slices {
        filtered.push(slice.clone());
        while let Some(record) = filtered.next().unwrap_or_else(|damage| panic!("{damage}")) {
            again.extend(fact(&record).expect("a fact that was read before").map(|fact| (record.start, fact)));
        }
    }
    assert_eq!(again, facts);

    // One by one, the same.
    let mut seen = Seen { records: 0, facts: BTreeMap::new(), managers: BTreeMap::new() };
    let mut theirs = text.lines();
    for our in &ours {
        let (their, desc) = parse_line(theirs.next().unwrap_or_else(|| panic!("pg_waldump ends before {our:?}")));
        assert_eq!(*our, their);
        seen.records += 1;
        *seen.managers.entry(our.rmgr.clone()).or_default() += 1;
        let known = ["Transaction", "XLOG"].contains(&our.rmgr.as_str());
        let Some(fact) = facts.get(&our.start) else {
            let kinds = ["COMMIT", "ABORT", "CHECKPOINT_S", "CHECKPOINT_O", "SWITCH", "BACKUP_END", "PARAMETER_CHANGE"];
            let more = ["RESTORE_POINT", "END_OF_RECOVERY", "OVERWRITE"];
            assert!(!known || !kinds.iter().chain(&more).any(|kind| desc.starts_with(kind)), "no fact for {desc}");
            continue;
        };
        let (name, begins, contains) = describe(fact);
        let rest = desc.strip_prefix(begins.as_str()).unwrap_or_else(|| panic!("{begins:?}, pg_waldump: {desc:?}"));
        assert!(rest.trim().is_empty() || rest.starts_with([';', ' ']), "{begins:?}, pg_waldump: {desc:?}");
        assert!(contains.iter().all(|part| rest.contains(part.as_str())), "{contains:?}, pg_waldump: {desc:?}");
        *seen.facts.entry(name).or_default() += 1;
    }
    assert_eq!(theirs.next(), None, "pg_waldump has a record more");

    any_start_and_any_end(start, size, &slices, &ours);
    any_slices(start, size, &slices, &ours, &bodies);
    any_damage(start, size, &slices, &ours);
    seen
}

/// A number below `below`, by a seed that the failing test prints.
fn next(seed: &mut u64, below: usize) -> usize {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    ((*seed >> 33) as usize) % below.max(1)
}

/// Some MiB of it, sliced by chance, from single bytes on: the same records.
fn any_slices(start: Lsn, size: SegmentSize, slices: &[Bytes], ours: &[Line], bodies: &[u32]) {
    for mut seed in 1..=3 {
        let which = seed;
        let mut decoder = Decoder::new(start, size);
        let mut expected = ours.iter().zip(bodies);
        for slice in slices.iter().take((4 << 20) / size.bytes() as usize + 1) {
            let mut rest = slice.slice(..slice.len().min(4 << 20));
            let whole = rest.len() == slice.len();
            while !rest.is_empty() {
                let most = [3, 200, 9000, 140_000][next(&mut seed, 4)];
                decoder.push(rest.split_to(rest.len().min(1 + next(&mut seed, most))));
                while let Some(record) = decoder.next().unwrap_or_else(|damage| panic!("seed {which}: {damage}")) {
                    let (line, body) = expected.next().expect("as many records as before");
                    let seen = (record.start, record.xid, record.total_len(), crc32c::crc32c(record.body()));
                    assert_eq!(seen, (line.start, line.xid, line.len, *body), "seed {which}");
                }
            }
            if !whole {
                break;
            }
        }
    }
}

/// One changed byte in a record: an alarm that begins with that record, and what follows is sound again.
fn any_damage(start: Lsn, size: SegmentSize, slices: &[Bytes], ours: &[Line]) {
    let first = &slices[0][..slices[0].len().min(1 << 20)];
    let on_one_page = |line: &&Line| {
        let in_page = line.start.get() % PAGE_SIZE;
        let end = line.start.advance(line.len as u64);
        in_page + line.len as u64 <= PAGE_SIZE && end.get() + 8 * PAGE_SIZE < start.get() + first.len() as u64
    };
    let lines: Vec<&Line> = ours.iter().filter(on_one_page).collect();
    let mut seed = 7;
    for _ in 0..20 {
        let line = lines[next(&mut seed, lines.len())];
        let mut bytes = first.to_vec();
        let at = match next(&mut seed, line.len) {
            18 | 19 => 0, // padding of the header
            at => at,
        };
        bytes[line.start.bytes_since(start).expect("behind the start") as usize + at] ^= 0x21;
        let mut audit = WalAudit::new(start, size, None, TimelineId::FIRST).expect("a segment's start");
        audit.push(&bytes);
        let found = audit.take().unwrap_or_else(|| panic!("byte {at} of {line:?} went unnoticed"));
        assert_eq!(found.from, line.start, "byte {at} of {line:?}: {found:?}");
        assert_eq!(audit.is_lost(), None, "byte {at} of {line:?}: {found:?}");
    }
}

/// Reading may begin at any page, and the end of WAL cut off anywhere is the last whole record.
fn any_start_and_any_end(start: Lsn, size: SegmentSize, slices: &[Bytes], ours: &[Line]) {
    let all = slices.concat();
    let pages = all.len() as u64 / PAGE_SIZE;
    for page in (0..pages).step_by((pages as usize / 150).max(37)) {
        let offset = (page * PAGE_SIZE) as usize;
        let mut decoder = Decoder::new(start.advance(page * PAGE_SIZE), size);
        decoder.push(Bytes::copy_from_slice(&all[offset..(offset + 20 * PAGE_SIZE as usize).min(all.len())]));
        let at = start.advance(page * PAGE_SIZE);
        let found = decoder.next().unwrap_or_else(|damage| panic!("from {at}: {damage}")).map(|record| record.start);
        let expected = ours.iter().map(|line| line.start).find(|lsn| *lsn >= at);
        assert!(found.is_none() || found == expected, "from {at}: {found:?}, {expected:?}");
    }
    let some = (slices.len() / 8).max(1);
    for (index, slice) in slices.iter().enumerate().skip(1).step_by(some) {
        for len in [100, 50_001, 777_777, slice.len().min(16 << 20) - 1] {
            let segment_start = start.advance(index as u64 * size.bytes());
            let valid = segment_start.advance(len as u64);
            let end = wal_end(segment_start, size, [&slice[..len]]).unwrap_or_else(|damage| panic!("{damage}"));
            let mut padded = slice[..len].to_vec();
            assert_eq!(pad_open_segment(&mut padded, segment_start, size), Ok(end));
            let whole = ours.iter().rev().find(|line| line.start >= segment_start && line.last_byte(size) < valid);
            assert_eq!(end.last_record, whole.map(|line| line.start), "{segment_start} cut at {valid}");
        }
    }
}

/// Also POSTGRES.md 10, number 30: what is hard to read is in the workload, the result is equal on every major.
#[test]
fn pitfall_30_we_read_what_pg_waldump_reads() {
    for_each_major(|installation| {
        // Every size and level with some major: what is read differently by size is not by major.
        let mib = [16, 1, 64][installation.major as usize % 3];
        let wal_level = ["logical", "replica"][installation.major as usize / 2 % 2];
        let conf = format!(
            "wal_level = {wal_level}\nwal_keep_size = 4GB\nwal_recycle = off\nmax_prepared_transactions = 10\n\
             track_commit_timestamp = on\nautovacuum_naptime = 1s\nmax_wal_size = 1GB\n"
        );
        let mut pg = TestPg::start_segmented(installation, mib, &conf);
        workload(&mut pg, mib);
        let seen = compare(&pg, SegmentSize::new(mib << 20).expect("a segment size"));
        println!("{} with {mib} MiB, {wal_level}: {} records", installation.version, seen.records);
        println!("  {:?}\n  {:?}", seen.facts, seen.managers);
        for manager in [
            "XLOG",
            "Transaction",
            "Storage",
            "Database",
            "Tablespace",
            "MultiXact",
            "RelMap",
            "Standby",
            "Heap2",
            "Heap",
            "Btree",
            "Hash",
            "Gin",
            "Gist",
            "Sequence",
            "SPGist",
            "BRIN",
            "ReplicationOrigin",
            "LogicalMessage",
        ] {
            assert!(seen.managers.contains_key(manager), "the workload wrote nothing of {manager}");
        }
        for kind in [
            "COMMIT",
            "ABORT",
            "COMMIT PREPARED",
            "ROLLBACK PREPARED",
            "RESTORE_POINT",
            "PARAMETER_CHANGE",
            "CHECKPOINT_ONLINE",
            "CHECKPOINT_SHUTDOWN",
            "END_OF_RECOVERY",
            "BACKUP_END",
            "SWITCH",
            "OVERWRITE_CONTRECORD",
        ] {
            assert!(seen.facts.contains_key(kind), "the workload wrote no {kind}");
        }
    });
}
