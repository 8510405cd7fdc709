//! One archive with three timelines, targets of every kind drawn by seed, each restored for real and compared with the log
//! of the commits that were acknowledged.
//!
//! `PGKEEP_TARGETS` says how many targets (12 where it is not set), `PGKEEP_SEED` which ones.

mod support;

use std::fs;

use pgkeep::pg::instance::{Installation, StopMode};
use support::rig::{Rig, SOON, next_second};
use support::{TestPg, any_major, ok, wait_until};

/// A transaction whose commit its client was told of.
#[derive(Debug, Clone)]
struct Commit {
    id: usize,
    xid: String,
    /// The server's clock and end of WAL after it, before anything else was written.
    time: String,
    lsn: String,
    /// A restore point that was made right after it.
    point: Option<String>,
}

/// One server's commits, in their order.
struct Writer {
    next_id: usize,
    log: Vec<Commit>,
}

impl Writer {
    fn acknowledged(&mut self, pg: &TestPg, id: usize, xid: String) -> &mut Commit {
        let seen = pg.sql("select clock_timestamp(), pg_current_wal_lsn()");
        let (time, lsn) = seen.split_once('|').expect("two columns");
        self.log.push(Commit { id, xid, time: time.to_owned(), lsn: lsn.to_owned(), point: None });
        self.log.last_mut().expect("just pushed")
    }

    fn id(&mut self) -> usize {
        self.next_id += 1;
        self.next_id
    }

    fn plain(&mut self, pg: &TestPg) -> &mut Commit {
        let id = self.id();
        let xid = pg.sql(&format!("insert into log values ({id}) returning pg_current_xact_id()"));
        self.acknowledged(pg, id, xid)
    }

    /// All kinds of transactions: some have subtransactions, some are prepared and end after others that began later, some
    /// come to nothing.
    fn work(&mut self, pg: &TestPg, timeline: u32) {
        self.plain(pg);
        let (prepared, gone) = (self.id(), self.id());
        let gid = format!("t{prepared}");
        pg.sql(&format!("begin; insert into log values ({prepared}); prepare transaction '{gid}'"));
        let xid = pg.sql(&format!("select transaction from pg_prepared_xacts where gid = '{gid}'"));
        self.plain(pg);
        pg.sql(&format!("begin; insert into log values ({gone}); rollback"));
        let name = format!("point {timeline}");
        self.plain(pg).point = Some(name.clone());
        pg.sql(&format!("select pg_create_restore_point('{name}')"));
        pg.sql(&format!("commit prepared '{gid}'"));
        self.acknowledged(pg, prepared, xid);
        let (id, undone) = (self.id(), self.id());
        let sub = format!(
            "begin; insert into log values ({id}); savepoint a; insert into log values ({undone}); rollback to a; \
             select pg_current_xact_id(); commit"
        );
        let xid = pg.sql(&sub).lines().last().expect("an xid").to_owned();
        self.acknowledged(pg, id, xid);
        self.plain(pg);
        // Another segment.
        pg.sql("select pg_switch_wal()");
        self.plain(pg);
        self.plain(pg);
    }
}

/// The commits of one way through the timelines.
struct Way {
    timeline: &'static str,
    log: Vec<Commit>,
    /// How many of them the base backup holds: nothing before can be a target.
    in_backup: usize,
    /// The last of each timeline's: its position is where the next timeline begins, or the end.
    lasts: Vec<usize>,
}

/// A target, and how many commits of its way will be there.
#[derive(Debug)]
struct Target {
    timeline: &'static str,
    to: String,
    exclusive: bool,
    commits: usize,
}

fn draw(ways: &[Way], next: &mut impl FnMut(usize) -> usize) -> Target {
    let way = &ways[next(ways.len())];
    let index = way.in_backup + next(way.log.len() - way.in_backup);
    let commit = &way.log[index];
    let (to, exclusive, commits) = match next(8) {
        0 => ("latest".to_owned(), false, way.log.len()),
        1 | 2 if index + 1 < way.log.len() => (commit.time.clone(), false, index + 1),
        3 if !way.lasts.contains(&index) => (commit.lsn.clone(), false, index + 1),
        4 => (format!("xid:{}", commit.xid), true, index),
        5 | 6 => {
            let points: Vec<(usize, &String)> = way
                .log
                .iter()
                .enumerate()
                .skip(way.in_backup)
                .filter_map(|(index, commit)| Some((index, commit.point.as_ref()?)))
                .collect();
            let (index, name) = points[next(points.len())];
            (format!("name:{name}"), false, index + 1)
        }
        _ => (format!("xid:{}", commit.xid), false, index + 1),
    };
    Target { timeline: way.timeline, to, exclusive, commits }
}

fn rows(pg: &TestPg) -> String {
    pg.sql("select string_agg(id::text, ',' order by id) from log")
}

fn expected(log: &[Commit]) -> String {
    let mut ids: Vec<usize> = log.iter().map(|commit| commit.id).collect();
    ids.sort_unstable();
    ids.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// Restores to a commit, promotes, and lets that server be the cluster.
fn fork(rig: &mut Rig, installation: &Installation, to: &str, timeline: &str, name: &str) -> TestPg {
    rig.restore(to, name, &["--action", "promote", "--timeline", timeline]).exits(0);
    let mut pg = TestPg::attach(installation, &rig.path(name));
    pg.set("fsync=off");
    ok(pg.start());
    wait_until("the promotion", SOON, || pg.sql("select pg_is_in_recovery()") == "f");
    rig.served_by(&pg);
    pg
}

#[test]
fn p2_random_targets_across_three_timelines() {
    let number = |name: &str, or: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(or);
    let (targets, seed) = (number("PGKEEP_TARGETS", 12), number("PGKEEP_SEED", 20_261_121));
    println!("PGKEEP_TARGETS={targets} PGKEEP_SEED={seed}");
    let mut state = seed;
    let mut next = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize) % below.max(1)
    };
    let installation = any_major();
    let mut pg = TestPg::start_segmented(installation, 1, "max_prepared_transactions = 5\nautovacuum = off\n");
    let mut rig = Rig::new(&pg);
    rig.start_archiver();
    pg.sql("create table log (id int primary key)");
    let mut one = Writer { next_id: 0, log: Vec::new() };
    one.plain(&pg);
    one.plain(&pg);
    rig.done(&["backup"]);
    let in_backup = one.log.len();
    next_second(&pg);
    one.work(&pg, 1);
    rig.wait_for(&one.log.last().expect("commits").xid);
    rig.stop_archiver();
    ok(pg.stop(StopMode::Immediate));

    // The second timeline leaves the first in its middle, and the third the second; what the older server wrote behind
    // the fork stays on its own timeline.
    let mut begin = |rig: &mut Rig, from: &[Commit], timeline: &'static str, name: &str| {
        let at = in_backup.max(from.len() - 8) + 3 + next(3);
        let server = fork(rig, installation, &format!("xid:{}", from[at].xid), timeline, name);
        let mut writer =
            Writer { next_id: from.iter().map(|commit| commit.id).max().unwrap_or(0) + 100, log: Vec::new() };
        rig.start_archiver();
        writer.work(&server, if timeline == "1" { 2 } else { 3 });
        // The older timeline may have the same xid.
        let own = if timeline == "1" { "2" } else { "3" };
        let last = format!("xid:{}", writer.log.last().expect("commits").xid);
        wait_until("the last commit to be archived", SOON, || {
            rig.run(&["plan", "--timeline", own, "--to", &last]).code == Some(0)
        });
        rig.stop_archiver();
        let log: Vec<Commit> = from[..=at].iter().chain(&writer.log).cloned().collect();
        (server, at, log)
    };
    let (mut server, first_fork, two) = begin(&mut rig, &one.log, "1", "two");
    ok(server.stop(StopMode::Immediate));
    let (mut server, second_fork, three) = begin(&mut rig, &two, "2", "three");
    ok(server.stop(StopMode::Immediate));
    let ways = [
        Way { timeline: "1", lasts: vec![one.log.len() - 1], log: one.log, in_backup },
        Way { timeline: "2", lasts: vec![first_fork, two.len() - 1], log: two, in_backup },
        Way { timeline: "latest", lasts: vec![first_fork, second_fork, three.len() - 1], log: three, in_backup },
    ];

    let mut kinds = std::collections::BTreeSet::new();
    for number in 0..targets {
        let target = draw(&ways, &mut next);
        let way = ways.iter().find(|way| way.timeline == target.timeline).expect("one of the ways");
        let mut more = vec!["--timeline", target.timeline];
        more.extend(target.exclusive.then_some("--exclusive"));
        let name = format!("target{number}");
        let restored = rig.restore(&target.to, &name, &more);
        assert_eq!(restored.code, Some(0), "seed {seed}, {target:?}: {}", restored.all());
        let pg = rig.recovered(installation, &name);
        assert_eq!(rows(&pg), expected(&way.log[..target.commits]), "seed {seed}, {target:?}");
        kinds.insert((target.timeline, target.to.split(':').next().map_or(0, str::len)));
        drop(pg);
        ok(fs::remove_dir_all(rig.path(&name)));
    }
    println!("{targets} targets of {} kinds and timelines reached", kinds.len());
}
