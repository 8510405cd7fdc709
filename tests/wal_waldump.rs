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
    Decoder, Fact, Fork, PAGE_SIZE, PageWatch, Record, WalLevel, fact, may_be_fact, pad_open_segment, rmgr, wal_end,
};
use support::{TestPg, for_each_major, ok};

/// Everything that writes a kind of record we know, in a few seconds.
fn workload(pg: &mut TestPg, mib: u64) {
    let psql = |statements: &[&str]| {
        let mut arguments = vec!["-X", "-q", "-d", "postgres"];
        statements.iter().for_each(|statement| arguments.extend(["-c", statement]));
        pg.tool("psql", &arguments);
    };
    pg.tool("pgbench", &["-i", "-q", "-s", "2", "postgres"]);
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
        let mut watch = PageWatch::new(segment_start, size, None, *timeline).expect("a segment's start");
        watch.push(&bytes).unwrap_or_else(|damage| panic!("{}: {damage}", path.display()));
        assert_eq!(watch.major(), Some(pg.installation().major));
        bytes.resize(size.bytes() as usize, 0);
        files.insert(*number, Bytes::from(bytes));
    }
    let slices: Vec<Bytes> = files.values().cloned().collect();

    // All records, in network-sized slices; the facts alone, in others.
    let (mut ours, mut facts) = (Vec::new(), BTreeMap::new());
    let mut decoder = Decoder::new(start, size);
    for slice in slices.iter().flat_map(|slice| (0..slice.len()).step_by(100_003).map(move |at| (slice, at))) {
        decoder.push(slice.0.slice(slice.1..slice.0.len().min(slice.1 + 100_003)));
        while let Some(record) = decoder.next().unwrap_or_else(|damage| panic!("{damage}")) {
            if let Some(fact) = fact(&record).unwrap_or_else(|damage| panic!("{damage}")) {
                facts.insert(record.start, fact);
            }
            ours.push(our_line(&record));
        }
    }
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
    let mut seen = Seen { records: 0, facts: BTreeMap::new() };
    let mut theirs = text.lines();
    for our in &ours {
        let (their, desc) = parse_line(theirs.next().unwrap_or_else(|| panic!("pg_waldump ends before {our:?}")));
        assert_eq!(*our, their);
        seen.records += 1;
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
    seen
}

/// Reading may begin at any page, and the end of WAL cut off anywhere is the last whole record.
fn any_start_and_any_end(start: Lsn, size: SegmentSize, slices: &[Bytes], ours: &[Line]) {
    let all = slices.concat();
    for page in (0..all.len() as u64 / PAGE_SIZE).step_by(37) {
        let offset = (page * PAGE_SIZE) as usize;
        let mut decoder = Decoder::new(start.advance(page * PAGE_SIZE), size);
        decoder.push(Bytes::copy_from_slice(&all[offset..(offset + 20 * PAGE_SIZE as usize).min(all.len())]));
        let at = start.advance(page * PAGE_SIZE);
        let found = decoder.next().unwrap_or_else(|damage| panic!("from {at}: {damage}")).map(|record| record.start);
        let expected = ours.iter().map(|line| line.start).find(|lsn| *lsn >= at);
        assert!(found.is_none() || found == expected, "from {at}: {found:?}, {expected:?}");
    }
    for (index, slice) in slices.iter().enumerate().skip(1) {
        for len in [100, 50_001, 777_777, slice.len() - 1] {
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
        for (mib, wal_level) in [(1, "logical"), (16, "replica")] {
            let conf = format!(
                "wal_level = {wal_level}\nwal_keep_size = 4GB\nwal_recycle = off\nmax_prepared_transactions = 10\n\
                 track_commit_timestamp = on\nautovacuum_naptime = 1s\nmax_wal_size = 1GB\n"
            );
            let mut pg = TestPg::start_segmented(installation, mib, &conf);
            workload(&mut pg, mib);
            let seen = compare(&pg, SegmentSize::new(mib << 20).expect("a segment size"));
            println!("{} with {mib} MiB: {} records, {:?}", installation.version, seen.records, seen.facts);
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
        }
    });
}
