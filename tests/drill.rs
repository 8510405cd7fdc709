//! Drills against a real server: what is sound passes, what is not is caught and named, and nothing is left behind.

mod support;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;
use support::rig::{Rig, SOON, flip, ran};
use support::{Installation, TestPg, any_major, majors, ok, wait_until};

/// A cluster with a base backup, commits behind it, and a table that an assertion can ask.
fn archived(installation: &Installation) -> (TestPg, Rig) {
    let pg = TestPg::start_segmented(installation, 1, "autovacuum = off");
    let mut rig = Rig::new(&pg);
    pg.sql("create table orders (n int primary key, filler text)");
    // What must not happen in a drill: its file would appear.
    let trace = rig.path("archived");
    pg.sql(&format!("alter system set archive_command = 'touch {}'", trace.display()));
    pg.sql("alter system set archive_mode = 'always'");
    rig.start_archiver();
    pg.sql("insert into orders select n, repeat(md5(n::text), 4) from generate_series(1, 3000) n");
    rig.done(&["backup"]);
    pg.sql("insert into orders select n, repeat(md5(n::text), 4) from generate_series(3001, 6000) n");
    pg.sql("select pg_switch_wal()");
    let last = pg.sql("insert into orders values (0, 'last') returning pg_current_xact_id()");
    rig.wait_for(last.lines().next().unwrap_or_default());
    rig.stop_archiver();
    (pg, rig)
}

fn settings(rig: &Rig, installation: &Installation, more: &str) {
    let text = ok(fs::read_to_string(rig.path("pgkeep.toml")));
    let text = text.lines().filter(|line| !line.starts_with("drill")).collect::<Vec<_>>().join("\n");
    let (scratch, bindir) = (rig.path("scratch"), &installation.bindir);
    let drill = format!("\ndrill = {{ scratch = {scratch:?}, bindir = {bindir:?}{more} }}\n");
    ok(fs::write(rig.path("pgkeep.toml"), text + &drill));
}

fn drilled(rig: &Rig, code: i32, args: &[&str]) -> Value {
    let ran = rig.run(&[&["drill", "--json"], args].concat()).exits(code);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.all()))
}

/// How a check ended, and what it found.
fn check(drill: &Value, name: &str) -> (String, String) {
    let all = drill["checks"].as_array().expect("checks");
    let one = all.iter().find(|check| check["check"] == name).unwrap_or_else(|| panic!("no {name} in {drill:#}"));
    (one["outcome"].as_str().unwrap_or_default().to_owned(), one["found"].as_str().unwrap_or_default().to_owned())
}

fn nothing_is_left(rig: &Rig) {
    // The directory stays where a drill found it.
    let left: Vec<_> = fs::read_dir(rig.path("scratch")).into_iter().flatten().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!rig.path("archived").exists(), "the drill's server has archived");
}

#[test]
fn a_drill_passes_catches_what_is_wrong_and_leaves_nothing() {
    let installation = any_major();
    let (_pg, rig) = archived(installation);
    rig.run(&["drill"]).exits(2).says("--scratch");

    // Sound: everything is looked at.
    settings(&rig, installation, ", assertions = [\"select count(*) = 6001 from orders\"]");
    let sound = drilled(&rig, 0, &["--to", "latest"]);
    assert_eq!(sound["verdict"], "passed", "{sound:#}");
    for name in ["restore", "recovery", "stop", "commit", "assertion 1", "checksums"] {
        assert_eq!(check(&sound, name).0, "passed", "{name}: {sound:#}");
    }
    let amcheck = check(&sound, "amcheck");
    assert!(amcheck.0 == "passed" || amcheck.1.contains("not installed"), "{amcheck:?}");
    let phases: Vec<&str> =
        sound["phases"].as_array().unwrap().iter().map(|phase| phase["phase"].as_str().unwrap()).collect();
    assert!(["plan", "restore", "recovery", "promote"].iter().all(|phase| phases.contains(phase)), "{phases:?}");
    nothing_is_left(&rig);

    // A drawn instant.
    settings(&rig, installation, "");
    let random = drilled(&rig, 0, &["--random", "--seed", "42"]);
    assert_eq!((&random["verdict"], &random["seed"]), (&Value::from("passed"), &Value::from(42)), "{random:#}");

    // An assertion that does not hold, and one that is no SQL.
    settings(&rig, installation, ", assertions = [\"select count(*) = 1 from orders\", \"select nonsense\"]");
    let wrong = drilled(&rig, 1, &[]);
    assert_eq!(check(&wrong, "assertion 1").0, "failed", "{wrong:#}");
    let (outcome, found) = check(&wrong, "assertion 2");
    assert!(outcome == "failed" && found.contains("nonsense"), "{found}");
    nothing_is_left(&rig);

    // Too small: refused before anything is written.
    settings(&rig, installation, ", max_bytes = \"1MB\"");
    rig.run(&["drill"]).exits(3).says("max_bytes allows 1 MB");
    nothing_is_left(&rig);

    // Places that are not ours.
    settings(&rig, installation, "");
    ok(fs::create_dir(rig.path("full")));
    ok(fs::write(rig.path("full/precious"), "x"));
    let at = |name: &str| rig.path(name).to_str().unwrap().to_owned();
    rig.run(&["drill", "--scratch", &at("full")]).exits(4).says("precious");
    rig.run(&["drill", "--scratch", &at("main/scratch")]).exits(4).says("a repository");
    assert!(rig.path("full/precious").exists() && !rig.path("main/scratch").exists());

    // The wrong major: named with the one that is needed.
    if let Some(other) = majors().iter().find(|other| other.major != installation.major) {
        let needed = format!("needs the programs of that major, and those in {} are of", other.bindir.display());
        rig.run(&["drill", "--bindir", other.bindir.to_str().unwrap()])
            .exits(2)
            .says(&format!("PostgreSQL {}", installation.major))
            .says(&needed);
        nothing_is_left(&rig);
    }
    // A target that was never there is the asker's mistake, and no drill.
    rig.run(&["drill", "--to", "xid:999999"]).exits(1);

    // One byte in a pack.
    let pack = rig.objects("main", &["/pack/"]).first().expect("a pack").clone();
    flip(&pack, |len| len / 2);
    let damaged = drilled(&rig, 1, &[]);
    let (outcome, found) = check(&damaged, "restore");
    assert!(outcome == "failed" && found.contains(pack.file_name().unwrap().to_str().unwrap()), "{damaged:#}");
    nothing_is_left(&rig);
    flip(&pack, |len| len / 2);

    // A segment that is missing.
    let segments = rig.objects("main", &["/wal/0"]);
    let lost = segments.last().expect("a segment").clone();
    ok(fs::rename(&lost, rig.path("aside")));
    let missing = drilled(&rig, 1, &[]);
    let (outcome, found) = check(&missing, "plan");
    assert!(outcome == "failed" && found.contains("not in the repository"), "{missing:#}");
    ok(fs::rename(rig.path("aside"), &lost));
    nothing_is_left(&rig);

    // All of it is remembered.
    let report = rig.json(&["drill", "--report", "--json"]);
    let verdicts: Vec<&str> =
        report["drills"].as_array().unwrap().iter().map(|drill| drill["verdict"].as_str().unwrap()).collect();
    assert_eq!(verdicts, ["failed", "failed", "failed", "passed", "passed"]);
    rig.done(&["drill", "--report"]).says("FAILED at restore").says("passed");
    rig.done(&["list"]).says("Last drill").says("FAILED at plan");
}

/// A process of a server whose data directory this is.
fn server_on(data: &Path) -> Option<i32> {
    let pid = fs::read_to_string(data.join("postmaster.pid")).ok()?.lines().next()?.trim().parse().ok()?;
    rustix::process::test_kill_process(rustix::process::Pid::from_raw(pid)?).ok()?;
    Some(pid)
}

#[test]
fn what_a_killed_drill_leaves_the_next_one_removes_and_a_stopped_one_leaves_nothing() {
    let installation = any_major();
    let (_pg, rig) = archived(installation);
    let data = rig.path("scratch").join("data");
    settings(&rig, installation, ", assertions = [\"select pg_sleep(60) is null\"]");
    let begin = || {
        let mut drill = rig.command(&["drill"]);
        ok(drill.stdout(Stdio::null()).stderr(Stdio::null()).spawn())
    };
    let started = || wait_until("the drill's server", SOON, || server_on(&data).is_some());

    let mut killed = begin();
    started();
    // Only one at a time.
    let busy = ran(rig.command(&["drill"]));
    assert!(busy.code == Some(4) && busy.all().contains("another drill is at work"), "{busy:?}");
    ok(killed.kill());
    ok(killed.wait());
    let left = server_on(&data).expect("the server of the killed drill runs on");
    settings(&rig, installation, "");
    let next = drilled(&rig, 0, &[]);
    assert_eq!(next["verdict"], "passed", "{next:#}");
    // A process that has ended works nowhere, buried or not.
    wait_until("the left server's end", SOON, || fs::read_link(format!("/proc/{left}/cwd")).is_err());
    nothing_is_left(&rig);

    settings(&rig, installation, ", assertions = [\"select pg_sleep(60) is null\"]");
    let mut stopped = begin();
    started();
    ok(rustix::process::kill_process(rustix::process::Pid::from_child(&stopped), rustix::process::Signal::INT));
    assert_eq!(ok(stopped.wait()).code(), Some(3));
    nothing_is_left(&rig);
    let report = rig.json(&["drill", "--report", "--json"]);
    assert_eq!(report["drills"].as_array().map(Vec::len), Some(1), "neither of the two has a result: {report:#}");
}
