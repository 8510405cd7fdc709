//! What `pgkeep run` shows and whom it tells, with a real server, a webhook that the test serves, and one that hangs.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pgkeep::pg::instance::give_to_server_user;
use pgkeep::types::Lsn;
use rustix::process::Signal;
use serde_json::Value;
use support::rig::{Rig, SOON};
use support::{TestPg, any_major, ok, wait_until};

/// Debian's package `prometheus` has it; `testenv/promtool.sh` gets it.
fn promtool() -> Option<PathBuf> {
    let named = std::env::var_os("PGKEEP_PROMTOOL").map(PathBuf::from);
    let found = named.or_else(|| {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|dir| dir.join("promtool")).find(|file| file.exists())
    });
    if found.is_none() {
        eprintln!("NOT COVERED: no promtool on this machine (testenv/promtool.sh gets it, PGKEEP_PROMTOOL names it)");
    }
    found
}

fn configure(rig: &Rig, lines: &str) {
    let config = ok(fs::read_to_string(rig.path("pgkeep.toml")));
    ok(fs::write(rig.path("pgkeep.toml"), config + lines));
}

/// An address that nobody listens at.
fn free_address() -> SocketAddr {
    ok(ok(TcpListener::bind("127.0.0.1:0")).local_addr())
}

/// Waits until all that the server has written is archived.
fn archived(rig: &Rig, pg: &TestPg) {
    let end: Lsn = pg.sql("select pg_current_wal_flush_lsn()").parse().unwrap();
    wait_until("the WAL to be archived", SOON, || {
        let list = rig.json(&["list", "--json"]);
        list["clusters"][0]["frontier"].as_str().is_some_and(|lsn| lsn.parse::<Lsn>().is_ok_and(|lsn| lsn >= end))
    });
}

/// Status and body.
fn get(at: SocketAddr, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(at).ok()?;
    stream.set_read_timeout(Some(SOON)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

/// Serves a webhook; what it was sent, as JSON with the path.
struct Hook {
    at: SocketAddr,
    got: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Hook {
    fn serve() -> Hook {
        let listener = ok(TcpListener::bind("127.0.0.1:0"));
        let (at, got) = (ok(listener.local_addr()), Arc::<Mutex<Vec<(String, Value)>>>::default());
        let to = Arc::clone(&got);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let request = request(&mut stream);
                let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                to.lock().unwrap().extend(request);
            }
        });
        Hook { at, got }
    }

    /// `(state, kind)` of what came to this path, in order.
    fn notices(&self, path: &str) -> Vec<(String, String)> {
        let word = |value: &Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
        let got = self.got.lock().unwrap();
        got.iter().filter(|(to, _)| to == path).map(|(_, body)| (word(body, "state"), word(body, "kind"))).collect()
    }

    fn count(&self, path: &str) -> usize {
        self.got.lock().unwrap().iter().filter(|(to, _)| to == path).count()
    }
}

fn request(stream: &mut TcpStream) -> Option<(String, Value)> {
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
            });
            if body.len() >= length.unwrap_or(0) {
                let path = head.split(' ').nth(1)?.to_owned();
                return Some((path, serde_json::from_str(body).unwrap_or_default()));
            }
        }
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return None,
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
        }
    }
}

#[test]
fn metrics_health_and_status() {
    let pg = TestPg::start_segmented(any_major(), 1, "autovacuum = off");
    let (mut rig, at) = (Rig::new(&pg), free_address());
    configure(&rig, &format!("keep = {{ window = \"7d\" }}\nbackup_every = \"24h\"\n[daemon]\nlisten = \"{at}\"\n"));
    rig.start_archiver();
    wait_until("the daemon to be alive", SOON, || get(at, "/livez").is_some_and(|(status, _)| status == 200));
    wait_until("the daemon to be ready", SOON, || get(at, "/readyz").is_some_and(|(status, _)| status == 200));
    let has = |words: &str| get(at, "/metrics").is_some_and(|(status, page)| status == 200 && page.contains(words));
    wait_until("the base backup to be shown", SOON, || has("pgkeep_backups{cluster=\"main\",repository=\"main\"} 1\n"));
    let (_, page) = get(at, "/metrics").unwrap();
    for name in [
        "pgkeep_streaming{cluster=\"main\"} 1\n",
        "pgkeep_exposure_bytes",
        "pgkeep_exposure_seconds",
        "pgkeep_repository_frontier_lsn_bytes",
        "pgkeep_repository_lag_seconds",
        "pgkeep_backup_next_timestamp_seconds",
        "pgkeep_backup_last_size_bytes",
        "pgkeep_window_start_timestamp_seconds",
        "pgkeep_window_promised_seconds{cluster=\"main\",repository=\"main\"} 604800\n",
        "pgkeep_gaps{cluster=\"main\",repository=\"main\"} 0\n",
        "pgkeep_slot_kept_bytes",
        "pgkeep_store_retries_total",
        "pgkeep_store_errors_total{kind=\"unavailable\"}",
        "process_resident_memory_bytes",
    ] {
        assert!(page.contains(name), "{name} is not in:\n{page}");
    }
    let (status, json) = get(at, "/status.json").unwrap();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((status, json["clusters"][0]["state"].as_str()), (200, Some("streaming")));
    assert_eq!(json["clusters"][0]["repositories"][0]["facts"]["backups"].as_array().unwrap().len(), 1, "{json:#}");
    assert_eq!(json["clusters"][0]["slot"]["exists"], true, "{json:#}");
    assert_eq!(get(at, "/other").unwrap().0, 404);
    if let Some(promtool) = promtool() {
        let mut child = ok(Command::new(promtool)
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn());
        ok(child.stdin.take().unwrap().write_all(page.as_bytes()));
        let output = ok(child.wait_with_output());
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && said.trim().is_empty(), "{said}\n{page}");
    }
    // More connections than it has room for, that say nothing: others get their answer all the same.
    let idle: Vec<TcpStream> = (0..40).map(|_| ok(TcpStream::connect(at))).collect();
    let since = Instant::now();
    assert_eq!(get(at, "/livez").unwrap().0, 200);
    assert!(since.elapsed() < Duration::from_secs(60), "{:?}", since.elapsed());
    drop(idle);
    pg.sql("create table t as select 1 n");
    archived(&rig, &pg);
    rig.stop_archiver();
}

#[test]
fn who_is_told_what_and_a_channel_that_hangs_disturbs_nobody() {
    let pg = TestPg::start_segmented(any_major(), 1, "autovacuum = off");
    let (mut rig, hook) = (Rig::new(&pg), Hook::serve());
    let hangs = ok(TcpListener::bind("127.0.0.1:0")); // takes connections, and that is all
    let (at, hanging) = (hook.at, ok(hangs.local_addr()));
    let said = rig.path("said.json");
    configure(
        &rig,
        &format!(
            "[daemon]\nbehind = \"3s\"\n\
             [alert.ops]\nwebhook = \"http://{at}/ops/hunter2\"\n\
             [alert.chat]\nwebhook = \"http://{at}/chat\"\nformat = \"slack\"\n\
             [alert.hangs]\nwebhook = \"http://{hanging}/hunter2\"\n\
             [alert.page]\ncommand = [\"/bin/sh\", \"-c\", \"cat >> {}\"]\n\
             [alert.pulse]\nheartbeat = \"http://{at}/pulse\"\nevery = \"1s\"\n",
            said.display()
        ),
    );
    // What is tried by hand: all but one take it.
    rig.run(&["check", "--alerts"]).exits(1).says("webhook http://").says("took no notice within 10 s");
    assert_eq!(hook.notices("/ops/hunter2"), [("test".to_owned(), "test".to_owned())]);
    rig.start_archiver();
    pg.sql("create table t (n int)");
    archived(&rig, &pg);
    wait_until("the heart to beat", SOON, || hook.count("/pulse") >= 3);
    // The repository goes away, and WAL waits.
    ok(fs::rename(rig.path("main"), rig.path("away")));
    pg.sql("insert into t values (1)");
    let of_behind = || -> Vec<String> {
        let notices = hook.notices("/ops/hunter2").into_iter();
        notices.filter(|(_, kind)| kind == "behind").map(|(state, _)| state).collect()
    };
    let ends_with = |state: &str| of_behind().last().is_some_and(|last| last == state);
    wait_until("the alert", SOON, || ends_with("raised"));
    let beats = hook.count("/pulse");
    ok(fs::rename(rig.path("away"), rig.path("main")));
    wait_until("its end", SOON, || ends_with("resolved"));
    wait_until("the heart to beat again", SOON, || hook.count("/pulse") > beats + 1);
    pg.sql("insert into t values (2)");
    archived(&rig, &pg);
    assert!(of_behind().chunks(2).all(|pair| pair == ["raised", "resolved"]), "each once: {:?}", of_behind());
    wait_until("the command", SOON, || {
        fs::read_to_string(&said).is_ok_and(|text| text.contains("\"raised\"") && text.contains("\"resolved\""))
    });
    let is_text = |(to, body): &(String, Value)| {
        to == "/chat" && body["text"].as_str().is_some_and(|text| text.contains("behind, cluster main"))
    };
    assert!(hook.got.lock().unwrap().iter().any(is_text));
    wait_until("the log", SOON, || rig.log().contains("[alert.hangs] was not told"));
    rig.stop_archiver();
    let log = rig.log();
    assert!(!log.contains("hunter2") && log.contains("alert behind"), "{log}");
    drop(hangs);
}

#[test]
fn sighup_reads_again_and_says_what_counts() {
    let pg = TestPg::start_segmented(any_major(), 1, "autovacuum = off");
    let (mut rig, at) = (Rig::new(&pg), free_address());
    let before = ok(fs::read_to_string(rig.path("pgkeep.toml")));
    rig.start_archiver();
    pg.sql("create table t (n int)");
    archived(&rig, &pg);
    // What does not hold together changes nothing.
    configure(&rig, "backup = \"often\"\n");
    rig.signal_archiver(Signal::HUP);
    wait_until("the mistake to be said", SOON, || rig.log().contains("stays as it was before"));
    assert!(rig.log().contains("is not five fields as in crontab"), "{}", rig.log());
    // What counts at once, and what does not.
    ok(fs::write(rig.path("pgkeep.toml"), &before));
    configure(&rig, &format!("backup_every = \"24h\"\nslot = \"other\"\n[daemon]\nlisten = \"{at}\"\n"));
    ok(give_to_server_user(rig.dir.path()));
    rig.signal_archiver(Signal::HUP);
    wait_until("metrics", SOON, || get(at, "/livez").is_some());
    assert!(rig.log().contains("when base backups of [cluster.main] are taken"), "{}", rig.log());
    assert!(rig.log().contains("needs a restart: slot of [cluster.main]"), "{}", rig.log());
    wait_until("a base backup by the new schedule", SOON, || rig.log().contains("was taken by schedule"));
    // And nothing any more.
    ok(fs::write(rig.path("pgkeep.toml"), &before));
    rig.signal_archiver(Signal::HUP);
    wait_until("nobody to listen", SOON, || get(at, "/livez").is_none());
    rig.stop_archiver();
}

#[test]
fn the_service_manager_is_told() {
    let pg = TestPg::start_segmented(any_major(), 1, "autovacuum = off");
    let rig = Rig::new(&pg);
    let socket = ok(UnixDatagram::bind(rig.path("notify")));
    ok(socket.set_read_timeout(Some(SOON)));
    ok(give_to_server_user(rig.dir.path()));
    let mut command = rig.command(&["run"]);
    command.env("NOTIFY_SOCKET", rig.path("notify")).env("WATCHDOG_USEC", "300000").env_remove("WATCHDOG_PID");
    let mut daemon = ok(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn());
    let mut said = Vec::new();
    let mut until = |words: &str| {
        while said.last().is_none_or(|last: &String| last != words) {
            let mut buffer = [0; 256];
            let read = ok(socket.recv(&mut buffer));
            said.push(String::from_utf8_lossy(&buffer[..read]).into_owned());
        }
    };
    until("READY=1");
    until("WATCHDOG=1");
    ok(rustix::process::kill_process(rustix::process::Pid::from_child(&daemon), Signal::TERM));
    until("STOPPING=1");
    assert!(ok(daemon.wait()).success(), "{said:?}");
}

/// The rules and the dashboard that the guide offers speak of metrics that there are.
#[test]
fn the_rules_and_the_dashboard_know_the_metrics() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let rules = root.join("docs/monitoring/alerts.yml");
    let known = ok(fs::read_to_string(root.join("src/daemon/health.rs")));
    for file in [rules.clone(), root.join("docs/monitoring/dashboard.json")] {
        let text = ok(fs::read_to_string(&file));
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words = text.split(|c: char| !is_name(c)).filter(|word| word.starts_with("pgkeep_"));
        let mut count = 0;
        for word in words {
            assert!(known.contains(&format!("\"{word}\"")), "{word} of {} is no metric", file.display());
            count += 1;
        }
        assert!(count > 5, "{}", file.display());
    }
    let dashboard = ok(fs::read_to_string(root.join("docs/monitoring/dashboard.json")));
    assert!(serde_json::from_str::<Value>(&dashboard).is_ok());
    if let Some(promtool) = promtool() {
        let output = ok(Command::new(promtool).args(["check", "rules"]).arg(&rules).output());
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{said}");
    }
}
