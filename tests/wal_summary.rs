//! What summaries say of transactions, against what was done and against PostgreSQL's own `pg_waldump`, for every major that
//! is found.

mod support;

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;
use pgkeep::catalog::index::{IndexFile, IndexWal};
use pgkeep::pg::instance::Installation;
use pgkeep::types::{Lsn, SegmentNumber, SegmentSize};
use pgkeep::wal::{Decoder, Part, Summarizer, Touched, join, kinds, marks, may_be_summarized};
use support::{TestPg, for_each_major, ok};

const MIB: u64 = 1 << 20;

/// What was done, and where in the WAL.
struct Step {
    name: &'static str,
    from: Lsn,
    to: Lsn,
}

struct Work<'a> {
    pg: &'a TestPg,
    steps: Vec<Step>,
}

impl Work<'_> {
    fn position(&self) -> Lsn {
        self.pg.sql("SELECT pg_current_wal_insert_lsn()").parse().expect("an LSN")
    }

    /// Each statement by itself.
    fn step(&mut self, name: &'static str, statements: &[&str]) {
        let from = self.position();
        let mut arguments = vec!["-X", "-q", "-d", "postgres"];
        statements.iter().for_each(|statement| arguments.extend(["-c", statement]));
        self.pg.tool("psql", &arguments);
        self.steps.push(Step { name, from, to: self.position() });
    }
}

fn work(pg: &TestPg) -> Vec<Step> {
    let mut work = Work { pg, steps: Vec::new() };
    work.step("create", &["CREATE TABLE t (n int PRIMARY KEY, b text)"]);
    work.step("insert", &["INSERT INTO t SELECT i, '' FROM generate_series(1, 100) i"]);
    work.step("copy", &["COPY t (n) FROM PROGRAM 'seq 101 150'"]);
    work.step("update", &["UPDATE t SET b = 'x' WHERE n <= 30"]);
    work.step("delete", &["DELETE FROM t WHERE n > 140"]);
    work.step("reindex", &["REINDEX TABLE t"]);
    work.step("analyze", &["ANALYZE t"]);
    work.step("vacuum", &["VACUUM t"]);
    work.step("vacuum full", &["VACUUM FULL t"]);
    work.step("rewrite", &["ALTER TABLE t ALTER n TYPE bigint"]);
    work.step("alter", &["ALTER TABLE t ADD c int"]);
    work.step("truncate", &["TRUNCATE t"]);
    work.step("truncate together", &["BEGIN", "INSERT INTO t VALUES (1)", "TRUNCATE t", "COMMIT"]);
    work.step("drop", &["DROP TABLE t"]);
    work.step(
        "",
        &["CREATE TABLE a (n int)", "CREATE VIEW v AS SELECT 1", "CREATE TABLE s (n int)", "CREATE SEQUENCE q"],
    );
    work.step("exchange", &["BEGIN", "DROP TABLE a", "CREATE TABLE a (n int)", "COMMIT"]);
    work.step("drop view", &["DROP VIEW v"]);
    work.step("sequence", &["SELECT nextval('q')"]);
    work.step("large object", &["SELECT lo_from_bytea(0, 'abc')"]);
    work.step("rollback", &["BEGIN", "INSERT INTO s VALUES (1), (2)", "ROLLBACK"]);
    work.step(
        "prepared",
        &[
            "BEGIN",
            "INSERT INTO s VALUES (1), (2), (3)",
            "PREPARE TRANSACTION 'one'",
            "INSERT INTO s VALUES (1)",
            "COMMIT PREPARED 'one'",
        ],
    );
    work.step(
        "subtransactions",
        &["DO $$ BEGIN FOR i IN 1..9 LOOP BEGIN INSERT INTO s VALUES (i); IF i % 3 = 0 THEN RAISE EXCEPTION 'no'; \
         END IF; EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$"],
    );
    work.step("create database", &["CREATE DATABASE d"]);
    work.step("drop database", &["DROP DATABASE d"]);
    pg.sql("SELECT pg_switch_wal()");
    pg.sql("CREATE TABLE after (n int)");
    work.steps
}

/// The WAL from the first position on, in slices of one segment.
fn read(pg: &TestPg, size: SegmentSize, from: Lsn, to: Lsn) -> Vec<Bytes> {
    let first = from.segment(size).get();
    (first..=to.segment_before(size).get())
        .map(|number| {
            let name = SegmentNumber::new(number).file_name(pgkeep::types::TimelineId::FIRST, size);
            let mut bytes = ok(std::fs::read(pg.data_dir().join("pg_wal").join(name)));
            let wanted = to.bytes_since(SegmentNumber::new(number).start(size)).unwrap_or(0);
            bytes.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
            Bytes::from(bytes)
        })
        .collect()
}

fn summarize(slices: &[Bytes], begin: Lsn, size: SegmentSize, cuts: &BTreeSet<Lsn>) -> Vec<Part> {
    let mut decoder = Decoder::new(begin, size).only(may_be_summarized);
    let mut summarizer = Summarizer::new();
    let (mut ended, mut open): (Vec<Part>, Vec<Part>) = (Vec::new(), Vec::new());
    let mut cuts = cuts.iter().peekable();
    for slice in slices {
        decoder.push(slice.clone());
        while let Some(record) = ok(decoder.next()) {
            while cuts.peek().is_some_and(|cut| record.start >= **cut) {
                cuts.next();
                open.extend(summarizer.take_open());
            }
            ok(summarizer.push(&record));
            for mut part in summarizer.take_ended() {
                let end = part.end.clone().expect("an end");
                let mine = |other: &&Part| other.xid == part.xid || end.subxids.contains(&other.xid);
                let earlier: Vec<Part> = open.iter().filter(mine).cloned().collect();
                open.retain(|other| !(other.xid == part.xid || end.subxids.contains(&other.xid)));
                join(&mut part, &earlier);
                ended.push(part);
            }
        }
    }
    ended
}

/// Without what depends on where a stretch begins: pages of a file that was created in it.
fn masked(mut parts: Vec<Part>) -> Vec<Part> {
    for part in &mut parts {
        part.touched.iter_mut().for_each(|(_, changes)| changes.marks &= !marks::PAGES);
        part.touched.retain(|(_, changes)| *changes != pgkeep::wal::Changes::default());
    }
    parts
}

/// xid, position and time of every commit, as `pg_waldump` tells them.
fn waldump(installation: &Installation, pg: &TestPg, from: Lsn, to: Lsn) -> Vec<(u32, Lsn, String)> {
    let mut command = ok(installation.command("pg_waldump"));
    command.env("TZ", "UTC").arg("-p").arg(pg.data_dir().join("pg_wal"));
    command.args(["-r", "Transaction", "-s", &from.to_string(), "-e", &to.to_string()]);
    let output = ok(command.output());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut commits = Vec::new();
    for line in text.lines() {
        let field =
            |before: &str| line.split_once(before).expect(before).1.split([',', ' ']).find(|word| !word.is_empty());
        let desc = line.split_once("desc: ").expect("a description").1;
        let (kind, rest) = desc.split_once(' ').unwrap_or((desc, ""));
        let (xid, rest) = match kind {
            "COMMIT" => (field("tx:").expect("an xid"), rest),
            "COMMIT_PREPARED" => rest.split_once(": ").expect("an xid"),
            _ => continue,
        };
        let time = rest.split(" UTC").next().expect("a time").to_owned();
        commits.push((ok(xid.parse()), ok(field("lsn:").expect("an LSN").parse()), time));
    }
    commits
}

#[test]
fn transactions_are_what_was_done() {
    for_each_major(|installation| {
        let size = ok(SegmentSize::new(MIB).ok_or("a segment size"));
        let conf = "autovacuum = off\nmax_prepared_transactions = 4\nwal_keep_size = 1GB\nfull_page_writes = off\n";
        let pg = TestPg::start_segmented(installation, 1, conf);
        let steps = work(&pg);
        let (from, to) = (steps[0].from, ok(pg.sql("SELECT pg_current_wal_flush_lsn()").parse::<Lsn>()));
        let begin = from.segment_start(size);
        let slices = read(&pg, size, from, to);
        let whole = summarize(&slices, begin, size, &BTreeSet::new());

        // Each commit, with its time, as pg_waldump has it.
        let ours: Vec<(u32, Lsn, String)> = whole
            .iter()
            .filter_map(|part| Some((part.xid, part.end.as_ref().filter(|end| !end.aborted && end.start >= from)?)))
            .map(|(xid, end)| (xid, end.start, end.time.to_string().replace('T', " ").trim_end_matches('Z').to_owned()))
            .collect();
        assert_eq!(ours, waldump(installation, &pg, from, to));
        eprintln!("{}: {} commits are the same", installation.version, ours.len());

        // What each step was.
        let of = |name: &str| -> Vec<&Part> {
            let step = steps.iter().find(|step| step.name == name).expect(name);
            let within =
                |part: &&Part| part.end.as_ref().is_some_and(|end| step.from <= end.start && end.start < step.to);
            whole.iter().filter(within).collect()
        };
        let was = |name: &str| {
            of(name).iter().map(|part| kinds(part)).flat_map(|kinds| kinds.names()).collect::<BTreeSet<_>>()
        };
        let rows = |part: &Part| {
            let user = part.touched.iter().filter(|(what, _)| !what.is_catalog());
            user.fold((0, 0, 0), |sum, (_, is)| (sum.0 + is.inserts, sum.1 + is.updates, sum.2 + is.deletes))
        };
        for (name, expected) in [
            ("create", vec!["create", "ddl"]),
            ("insert", vec!["insert"]),
            ("copy", vec!["insert"]),
            ("update", vec!["update"]),
            ("delete", vec!["delete"]),
            ("reindex", vec!["ddl"]),
            ("analyze", vec![]),
            ("vacuum", vec![]),
            ("alter", vec!["ddl"]),
            ("truncate", vec!["truncate", "ddl"]),
            ("truncate together", vec!["truncate", "ddl", "insert"]),
            ("drop", vec!["drop", "ddl"]),
            ("exchange", vec!["drop", "create", "ddl"]),
            ("drop view", vec!["drop", "ddl"]),
            ("sequence", vec![]),
            ("large object", vec![]),
            ("rollback", vec!["aborted", "insert"]),
            ("prepared", vec!["insert"]),
            ("subtransactions", vec!["aborted", "insert"]),
        ] {
            assert_eq!(was(name), expected.into_iter().collect(), "{name}: {:#?}", of(name));
        }
        for name in ["vacuum full", "rewrite"] {
            let was = was(name);
            assert!(was.contains("rewrite") && !was.contains("drop") && !was.contains("truncate"), "{name}: {was:?}");
        }
        assert!(was("create database").contains("create") && was("drop database").contains("drop"));
        assert_eq!(rows(of("insert")[0]), (100, 0, 0));
        assert_eq!(rows(of("copy")[0]), (50, 0, 0));
        assert_eq!(rows(of("update")[0]), (0, 30, 0));
        assert_eq!(rows(of("delete")[0]), (0, 0, 10));
        assert_eq!(rows(of("rollback")[0]), (2, 0, 0));
        let prepared =
            *of("prepared").iter().find(|part| part.end.as_ref().is_some_and(|end| end.prepared)).expect("one");
        assert_eq!(rows(prepared), (3, 0, 0));
        let subs = of("subtransactions");
        assert_eq!(subs.iter().map(|part| rows(part).0).collect::<Vec<_>>(), [1, 1, 1, 6]);
        assert_eq!(subs[3].end.as_ref().map(|end| end.subxids.len()), Some(6));
        // Its files are gone before it commits: who wants the database back has to stop earlier.
        let gone = of("drop database").into_iter().find(|part| part.early.is_some()).expect("one");
        assert!(gone.stop_before() < gone.end.as_ref().map(|end| end.start));
        // A table that went is told by its file and by its OID, by which it was locked.
        let dropped = of("drop")[0];
        assert!(dropped.touched.iter().any(|(what, is)| matches!(what, Touched::File(_)) && is.is(marks::DROPPED)));
        assert!(
            dropped.touched.iter().any(|(what, is)| matches!(what, Touched::Relation { .. }) && is.is(marks::LOCKED))
        );

        // Cut anywhere and joined, it is the same.
        let starts: Vec<Lsn> =
            whole.iter().flat_map(|part| [part.first, part.end.as_ref().expect("an end").start]).collect();
        for step in [3, 7, 11] {
            let cuts = starts.iter().step_by(step).copied().collect();
            assert_eq!(masked(summarize(&slices, begin, size, &cuts)), masked(whole.clone()), "cut at every {step}th");
        }
        // However it is sliced, the index has the same bytes; and it says what the summaries say.
        let index = |slice: usize| {
            let mut index = IndexWal::new(begin, to, size, None, None);
            let mut made = Vec::new();
            for bytes in slices.concat().chunks(slice) {
                made.extend(ok(index.push(bytes.to_vec())));
            }
            made.into_iter().next().unwrap_or_else(|| index.rest())
        };
        let (bytes, note) = index(1 << 20);
        assert_eq!((&bytes, &note), (&index(4099).0, &index(4099).1));
        let file = ok(IndexFile::read(bytes));
        let read: Vec<Part> = file.ended().map(|entry| file.part(&ok(entry))).collect();
        assert_eq!(read, whole);
        let by_xid: HashMap<u32, &Part> = whole.iter().map(|part| (part.xid, part)).collect();
        assert_eq!(by_xid.len() as u64, note.transactions);
    });
}
