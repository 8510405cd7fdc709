//! Keys over time, by the program as it is typed: a host that only writes, recipients that come and go, a key on paper.

mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use pgkeep::pg::instance::{ServerUser, StopMode, give_to_server_user};
use support::rig::{Rig, SOON};
use support::{TestPg, any_major, ok, wait_until};

/// The configuration of a host that restores: the same repository, another key file, no server.
fn restorer(rig: &Rig, key: &str, file: &str) {
    let text = format!("[repository.main]\npath = {:?}\nkey_file = {:?}\n", rig.path("main"), rig.path(key));
    ok(fs::write(rig.path(file), text));
    ok(give_to_server_user(rig.dir.path()));
}

/// As [`Rig::run`], with this configuration.
fn run_with(rig: &Rig, file: &str, args: &[&str]) -> support::rig::Ran {
    let mut command = Command::new(rig.path("pgkeep"));
    command.arg("--config").arg(rig.path(file)).args(args).current_dir(rig.dir.path());
    command.env_remove("PGKEEP_LOG").stdin(Stdio::null());
    if let Some(user) = ok(ServerUser::find()) {
        command.uid(user.uid).gid(user.gid);
    }
    support::rig::ran(command)
}

fn rows(pg: &TestPg) -> String {
    pg.sql("select count(*) from t")
}

/// Archives, resumes, takes backups that cost what changed, compares, plans to expire; and cannot read a row.
#[test]
fn a_write_only_host_does_its_work_and_restores_nothing() {
    let installation = any_major();
    let mut pg = TestPg::start_segmented(installation, 1, "autovacuum = off");
    let mut rig = Rig::new(&pg);
    // Another start: the rig's own key reads. This host never holds the identity but in the file that is taken away.
    ok(fs::remove_dir_all(rig.path("main")));
    ok(fs::remove_file(rig.path("main.key")));
    ok(fs::remove_file(rig.path("pgkeep.toml")));
    let (repo, key) = (rig.path("main"), rig.path("main.key"));
    let conninfo = pg.conninfo();
    let init = [
        "init",
        "--pg",
        &conninfo,
        "--repo",
        repo.to_str().unwrap(),
        "--key-file",
        key.to_str().unwrap(),
        "--yes",
        "--write-only",
    ];
    let identity = rig.path("main.identity.key");
    rig.done(&init).says("Take that file away").says(identity.to_str().unwrap());
    rig.done(&init).says("kept  key");
    let mode = |path: &std::path::Path| ok(fs::metadata(path)).permissions().mode() & 0o777;
    assert_eq!((mode(&identity), mode(&key)), (0o600, 0o600));
    let (whole, host) = (ok(fs::read_to_string(&identity)), ok(fs::read_to_string(&key)));
    assert!(whole.contains("AGE-SECRET-KEY-1") && !host.contains("AGE-SECRET-KEY-1"), "the host can write and no more");
    ok(fs::rename(&identity, rig.path("elsewhere.key")));
    let config = ok(fs::read_to_string(rig.path("pgkeep.toml")));
    ok(fs::write(rig.path("pgkeep.toml"), config + "keep = { window = \"1d\", at_least = 1 }\n"));
    ok(give_to_server_user(rig.dir.path()));

    pg.sql("create table t (n int, filler text)");
    rig.start_archiver();
    pg.sql("insert into t select n, repeat('secret', 20) from generate_series(1, 5000) n; checkpoint");
    rig.done(&["backup"]).says("is complete");
    // Resumed in the middle of a segment, and again; the second backup is compared with the first.
    rig.stop_archiver();
    pg.sql("insert into t select n, 'while away' from generate_series(1, 100) n");
    rig.start_archiver();
    let second = rig.json(&["backup", "--json"]);
    assert!(second["cost"]["referenced"].as_u64() > second["cost"]["new"].as_u64(), "{second:#}");
    pg.sql("insert into t values (0, 'the last')");
    let last = pg.sql("select pg_current_wal_flush_lsn()");
    let durable = format!("select count(*) > 0 from pg_stat_replication where flush_lsn >= '{last}'");
    wait_until("the last row to be archived", SOON, || pg.sql(&durable) == "t");
    rig.stop_archiver(); // all that it received is durable
    let log = rig.log();
    assert!(!log.contains("Z ERROR "), "{log}");

    rig.done(&["list"]).says("00000001");
    rig.done(&["expire", "--dry-run"]).says("stays");
    rig.done(&["events", "--verify"]).says("nothing is missing");
    rig.done(&["key", "list"]).says("writes only");
    let check = rig.run(&["check"]);
    check.says("for writing only; restoring needs").says("key age");
    // What it may not do, and which file that takes.
    let pgdata = rig.path("no");
    let restore = ["restore", "--to", "latest", "--pgdata", pgdata.to_str().unwrap()];
    rig.run(&restore).exits(2).says("can only write: restoring needs the one with the identity");
    assert!(!pgdata.exists());
    let fetched = rig.path("fetched");
    let fetch = rig.run(&["wal", "fetch", "000000010000000000000001", fetched.to_str().unwrap()]);
    assert!(fetch.code > Some(125) && !fetched.exists(), "{fetch:?}");
    rig.run(&["key", "export"]).exits(4).says("would restore nothing");
    let recipient = host.lines().find(|line| line.starts_with("age1")).unwrap();
    rig.run(&["key", "add-recipient", recipient]).exits(4).says("can only write");
    rig.run(&["key", "add-recipient", "age1nonsense"]).exits(2);
    for object in rig.objects("main", &[]) {
        assert!(!String::from_utf8_lossy(&ok(fs::read(&object))).contains("secretsecret"), "{}", object.display());
    }

    ok(pg.stop(StopMode::Immediate));
    restorer(&rig, "elsewhere.key", "elsewhere.toml");
    let pgdata = rig.path("restored");
    run_with(&rig, "elsewhere.toml", &["restore", "--to", "latest", "--pgdata", pgdata.to_str().unwrap()]).exits(0);
    let restored = rig.started(installation, "restored");
    assert_eq!(rows(&restored), "5101");
}

/// A recipient is added, a sheet is printed and typed in, the first key is removed: what each of them reads.
#[test]
fn recipients_come_and_go_and_paper_is_a_key() {
    let installation = any_major();
    let mut pg = TestPg::start_segmented(installation, 1, "autovacuum = off");
    let mut rig = Rig::new(&pg);
    pg.sql("create table t (n int)");
    rig.start_archiver();
    pg.sql("insert into t select generate_series(1, 1000)");
    rig.done(&["backup"]);
    // What it needs is archived whole, under a key of today: a segment that is open is sealed anew when it is complete.
    let segment = pg.sql("select pg_walfile_name(pg_current_wal_lsn())");
    pg.sql("insert into t select where false; select pg_switch_wal()");
    wait_until("the backup's WAL to be whole", SOON, || !rig.objects("main", &["/wal/", &segment]).is_empty());

    // While it archives: another key file, under a passphrase.
    let (next, secret) = (rig.path("next.key"), rig.path("passphrase"));
    ok(fs::write(&secret, " a passphrase \n"));
    ok(fs::set_permissions(&secret, Permissions::from_mode(0o600)));
    ok(give_to_server_user(rig.dir.path()));
    let add = [
        "key",
        "add",
        "--key-file",
        next.to_str().unwrap(),
        "--name",
        "next",
        "--passphrase-file",
        secret.to_str().unwrap(),
    ];
    let said = rig.done(&add).says("made  key");
    let recipient = said.stdout.split_whitespace().find(|word| word.starts_with("age1")).unwrap().to_owned();
    rig.done(&add).says("kept  key").says("0 opened to it now");
    assert!(ok(fs::read(&next)).starts_with(b"age-encryption.org/v1"));
    let list = rig.json(&["key", "list", "--open", "--json"]);
    let main = &list["repositories"][0];
    assert_eq!((main["list"].as_u64(), main["recipients"].as_array().unwrap().len()), (Some(1), 2), "{list:#}");
    assert_eq!(main["opened"], main["content_keys"], "{list:#}");
    assert!(main["recipients"][1]["added_envelopes"].as_u64() > Some(0), "{list:#}");
    let text = format!(
        "[repository.main]\npath = {:?}\nkey_file = {next:?}\npassphrase_file = {secret:?}\n",
        rig.path("main")
    );
    ok(fs::write(rig.path("next.toml"), text));
    ok(give_to_server_user(rig.dir.path()));

    // On paper, and typed in by somebody who writes small.
    let sheet = rig.path("sheet.txt");
    rig.done(&["key", "export", "--output", sheet.to_str().unwrap()]).says("holds the secret");
    assert_eq!(ok(fs::metadata(&sheet)).permissions().mode() & 0o777, 0o600);
    let page = ok(fs::read_to_string(&sheet));
    assert!(page.contains("RECOVERY SHEET") && page.contains(rig.path("main").to_str().unwrap()), "{page}");
    assert!(!page.contains("AGE-SECRET-KEY-1Q"), "in groups, with check digits");
    rig.run(&["key", "export", "--output", sheet.to_str().unwrap()]).exits(4).says("not replaced");
    let typed = page.to_lowercase();
    let wrong = typed.replacen("m2 ", "m2 0", 1);
    for (name, text) in [("typed", &typed), ("wrong", &wrong)] {
        ok(fs::write(rig.path(name), text));
    }
    ok(give_to_server_user(rig.dir.path()));
    let paper = rig.path("paper.key");
    let import = |sheet: &str| {
        rig.run(&["key", "import", rig.path(sheet).to_str().unwrap(), "--key-file", paper.to_str().unwrap()])
    };
    let bad = import("wrong").exits(2).says("check digits");
    assert!(
        !bad.all().contains(typed.lines().find(|line| line.contains("m2 ")).unwrap().trim()),
        "nothing is repeated"
    );
    import("typed").exits(0).says("made");
    assert_eq!(ok(fs::read_to_string(&paper)), ok(fs::read_to_string(rig.path("main.key"))), "the same key file");
    restorer(&rig, "paper.key", "paper.toml");
    let early = rig.path("early");
    run_with(&rig, "paper.toml", &["restore", "--to", "immediate", "--pgdata", early.to_str().unwrap()]).exits(0);
    assert_eq!(rows(&rig.started(installation, "early")), "1000");

    // Removed: not while this configuration uses it, and then by the next one.
    let key = ok(fs::read_to_string(rig.path("main.key")));
    let first = key.lines().find_map(|line| line.strip_prefix("#   ")).unwrap().trim().to_owned();
    rig.run(&["key", "remove-recipient", &first]).exits(4).says("that this configuration uses");
    rig.done(&["key", "rotate"]).says("The meta key stays");
    rig.stop_archiver();
    run_with(&rig, "next.toml", &["key", "remove-recipient", &first]).exits(0).says("What this does not undo");
    run_with(&rig, "next.toml", &["key", "remove-recipient", &first]).exits(1);
    rig.run(&["check"]).says("this key file is no recipient any more");
    let chained = rig.done(&["events", "--verify"]).says("nothing is missing");
    for event in ["sealed for", "exchanged", "not sealed for", "is complete"] {
        assert!(chained.all().contains(event), "{event}: {}", chained.all());
    }

    // What came before is open to all of them; what is archived from now on is not to the removed one.
    ok(pg.stop(StopMode::Immediate));
    ok(pg.start());
    let config = ok(fs::read_to_string(rig.path("pgkeep.toml")));
    let config = config.replace(rig.path("main.key").to_str().unwrap(), next.to_str().unwrap());
    let config = config.replace("[cluster.main]", &format!("passphrase_file = {secret:?}\n[cluster.main]"));
    ok(fs::write(rig.path("pgkeep.toml"), config));
    ok(give_to_server_user(rig.dir.path()));
    rig.start_archiver();
    pg.sql("insert into t select generate_series(1, 20000); select pg_switch_wal()");
    let xid = pg.sql("insert into t values (0) returning pg_current_xact_id()");
    rig.wait_for(xid.lines().next().unwrap());
    rig.stop_archiver();
    ok(pg.stop(StopMode::Immediate));
    let latest = rig.path("latest");
    run_with(&rig, "next.toml", &["restore", "--to", "latest", "--pgdata", latest.to_str().unwrap()]).exits(0);
    assert_eq!(rows(&rig.started(installation, "latest")), "21001");
    let never = rig.path("never");
    let refused = run_with(&rig, "paper.toml", &["restore", "--to", "latest", "--pgdata", never.to_str().unwrap()]);
    assert!(refused.code != Some(0) && refused.all().contains("other recipients"), "{refused:?}");
    assert!(!never.exists());
    assert_eq!(recipient.len(), 62);
}
