//! Our client against real servers: login, replication commands, the WAL stream and its ends.

use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pgkeep::pg::conninfo::Environment;
use pgkeep::pg::{
    ConnInfo, ConnectOptions, PgError, Replication, ServerErrorKind, Session, Started, Status, StreamEvent, WalStream,
};
use pgkeep::types::{Lsn, SegmentSize, TimelineHistory, TimelineId};
use tempfile::TempDir;

const BIN: &str = "/usr/lib/postgresql/15/bin";

/// A cluster of its own in a temporary directory, on a Unix socket in it; stopped and removed on drop.
struct TestPg {
    dir: TempDir,
    port: u16,
}

/// The user that servers run as when we are root: they refuse to run as root.
fn unprivileged() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let entry = passwd.lines().find(|line| line.starts_with("postgres:")).expect("a user `postgres`");
    let number = |index: usize| entry.split(':').nth(index).unwrap().parse().unwrap();
    Some((number(2), number(3)))
}

fn tool(name: &str, args: &[&str]) {
    let mut command = Command::new(format!("{BIN}/{name}"));
    command.args(args).current_dir("/").env_clear().env("LC_ALL", "C").env("PATH", "/usr/bin:/bin");
    if let Some((uid, gid)) = unprivileged() {
        command.uid(uid).gid(gid);
    }
    // Files, not pipes: a server that outlives pg_ctl would hold a pipe open.
    let out = tempfile::NamedTempFile::new().unwrap();
    command.stdin(std::process::Stdio::null()).stdout(out.reopen().unwrap()).stderr(out.reopen().unwrap());
    let status = command.status().unwrap();
    assert!(status.success(), "{name} {args:?}: {}", std::fs::read_to_string(out.path()).unwrap());
}

fn give(path: &Path) {
    if let Some((uid, gid)) = unprivileged() {
        chown(path, Some(uid), Some(gid)).unwrap();
    }
}

fn empty() -> TestPg {
    let dir = TempDir::with_prefix("pgk-").unwrap();
    give(dir.path());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    assert_ne!(port, 5432);
    TestPg { dir, port }
}

impl TestPg {
    fn start(conf: &str) -> TestPg {
        let pg = empty();
        tool("initdb", &["-A", "trust", "-U", "postgres", "--no-sync", "--wal-segsize=1", "-D", &pg.data()]);
        pg.configure(conf);
        pg.up();
        pg
    }

    fn standby_of(primary: &TestPg) -> TestPg {
        let pg = empty();
        let from = primary.conninfo();
        tool("pg_basebackup", &["-D", &pg.data(), "-d", &from, "-R", "-c", "fast", "--no-sync", "-X", "stream"]);
        pg.configure("");
        pg.up();
        pg
    }

    fn configure(&self, conf: &str) {
        let (port, sockets) = (self.port, self.dir.path().display());
        let text = format!(
            "listen_addresses = ''\nport = {port}\nunix_socket_directories = '{sockets}'\nfsync = off\n\
             shared_buffers = 16MB\nmax_connections = 20\nwal_level = replica\nautovacuum = off\n\
             max_wal_size = 64MB\nmin_wal_size = 2MB\nlog_min_messages = warning\nlc_messages = 'C'\n{conf}\n"
        );
        let path = self.path("data/postgresql.auto.conf");
        let old = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(&path, old + &text).unwrap();
    }

    fn up(&self) {
        let log = self.path("log").display().to_string();
        tool("pg_ctl", &["-w", "-t", "60", "-D", &self.data(), "-l", &log, "start"]);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn data(&self) -> String {
        self.path("data").display().to_string()
    }

    fn conninfo(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.dir.path().display(), self.port)
    }

    fn info(&self) -> ConnInfo {
        info(&self.conninfo())
    }

    async fn sql(&self, sql: &str) -> String {
        let mut session = Session::connect(&self.info(), &options()).await.unwrap();
        let rows = session.query(sql).await.unwrap();
        rows.first().and_then(|row| row.get(0)).unwrap_or_default().to_owned()
    }

    async fn replication(&self) -> Replication {
        Replication::connect(&self.info(), &options()).await.unwrap()
    }
}

impl Drop for TestPg {
    fn drop(&mut self) {
        let mut command = Command::new(format!("{BIN}/pg_ctl"));
        command.args(["-w", "-t", "20", "-m", "immediate", "-D", &self.data(), "stop"]).current_dir("/");
        if let Some((uid, gid)) = unprivileged() {
            command.uid(uid).gid(gid);
        }
        let _ = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).status();
    }
}

/// Resolved without this process's own variables and files.
fn info(text: &str) -> ConnInfo {
    ConnInfo::resolve(text, &Environment::new([], None, None)).unwrap()
}

fn options() -> ConnectOptions {
    ConnectOptions {
        application_name: "pgkeep_test".to_owned(),
        gucs: vec![("wal_sender_timeout".to_owned(), "30s".to_owned())],
        timeout: Duration::from_secs(20),
        ..ConnectOptions::default()
    }
}

async fn streaming(pg: &TestPg, slot: Option<&str>, at: Lsn, timeline: TimelineId) -> WalStream {
    let mut replication = pg.replication().await;
    replication.identify_system().await.unwrap();
    match replication.start(slot, at, timeline).await.unwrap() {
        Started::Streaming(stream) => stream,
        other => panic!("{other:?}"),
    }
}

/// Reads WAL up to `end` at least, checking that it comes without a hole; answers what is asked.
async fn read_to(stream: &mut WalStream, from: Lsn, end: Lsn) -> Vec<u8> {
    let mut wal = Vec::new();
    while from.advance(wal.len() as u64) < end {
        match stream.next().await.unwrap() {
            StreamEvent::Wal { start, data, server_end, .. } => {
                assert_eq!(start, from.advance(wal.len() as u64), "a hole");
                assert!(server_end >= start);
                wal.extend_from_slice(&data);
            }
            StreamEvent::Keepalive { .. } => {}
            other => panic!("{other:?} before {end}"),
        }
    }
    wal
}

#[tokio::test]
async fn sql_over_a_socket_and_an_error_leaves_the_session_usable() {
    let pg = TestPg::start("");
    let mut session = Session::connect(&pg.info(), &options()).await.unwrap();
    assert_eq!(session.server_version_num() / 10_000, 15);
    let rows = session.query("SELECT 'ignored'; SELECT n, NULL, 'ä' FROM generate_series(1, 3) n").await.unwrap();
    assert_eq!(rows.len(), 3);
    assert_eq!((rows[2].parse::<u32>(0).unwrap(), rows[2].get(1), rows[2].get(2)), (3, None, Some("ä")));
    let error = session.query("SELECT 1/0").await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("22012"), "{error}");
    let text = session.query("SHOW application_name").await.unwrap()[0].get(0).unwrap().to_owned();
    assert_eq!(text, "pgkeep_test");
    let with_work_mem = info(&format!("{} options='-c work_mem=1234kB'", pg.conninfo()));
    let with_style = ConnectOptions { gucs: vec![("DateStyle".to_owned(), "SQL, DMY".to_owned())], ..options() };
    let mut session = Session::connect(&with_work_mem, &with_style).await.unwrap();
    let rows = session.query("SELECT current_setting('work_mem') || current_setting('DateStyle')").await;
    assert_eq!(rows.unwrap()[0].get(0), Some("1234kBSQL, DMY"));
}

#[tokio::test]
async fn a_query_that_was_given_up_does_not_answer_the_next_one() {
    let pg = TestPg::start("");
    let mut session = Session::connect(&pg.info(), &options()).await.unwrap();
    let slow = session.query("SELECT pg_sleep(0.3), 'old'");
    assert!(tokio::time::timeout(Duration::from_millis(50), slow).await.is_err());
    let error = session.query("SELECT 'new'").await.unwrap_err();
    assert!(matches!(error, PgError::Closed { .. }), "{error}");
    let impatient = ConnectOptions { timeout: Duration::from_millis(300), ..options() };
    let mut session = Session::connect(&pg.info(), &impatient).await.unwrap();
    let error = session.query("SELECT pg_sleep(5)").await.unwrap_err();
    assert!(matches!(error, PgError::Timeout { .. }), "{error}");
}

/// A server with TLS and a role that has to log in by SCRAM, by MD5 or with a password in clear.
async fn with_passwords() -> TestPg {
    let pg = TestPg::start("");
    pg.sql("SET password_encryption = 'scram-sha-256'; CREATE ROLE keeper LOGIN REPLICATION PASSWORD 's3cret pass'; CREATE ROLE clear LOGIN PASSWORD 'clear'; CREATE ROLE certified LOGIN").await;
    pg.sql("SET password_encryption = 'md5'; CREATE ROLE old LOGIN PASSWORD 'old'").await;
    // What `openssl req -x509` makes: its own authority, which rustls alone refuses.
    let mut params = rcgen::CertificateParams::new(vec!["db.example".to_owned()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::from_params(&params, &key);
    let mut client = rcgen::CertificateParams::default();
    client.distinguished_name.push(rcgen::DnType::CommonName, "certified");
    let client_key = rcgen::KeyPair::generate().unwrap();
    let client = client.signed_by(&client_key, &issuer).unwrap();
    for (name, text) in [
        ("server.crt", certificate.pem()),
        ("server.key", key.serialize_pem()),
        ("client.crt", client.pem()),
        ("client.key", client_key.serialize_pem()),
    ] {
        let path = pg.path(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        give(&path);
    }
    std::fs::write(
        pg.path("data/pg_hba.conf"),
        "local all postgres trust\nlocal replication postgres trust\nhost all clear 127.0.0.1/32 password\nhostssl all certified 127.0.0.1/32 cert\n\
         host all old 127.0.0.1/32 md5\nhostssl replication keeper 127.0.0.1/32 scram-sha-256\nhost all keeper 127.0.0.1/32 scram-sha-256\n",
    )
    .unwrap();
    let dir = pg.dir.path().display();
    pg.configure(&format!(
        "listen_addresses = '127.0.0.1'\nssl = on\nssl_cert_file = '{dir}/server.crt'\nssl_key_file = '{dir}/server.key'\nssl_ca_file = '{dir}/server.crt'"
    ));
    tool(
        "pg_ctl",
        &["-w", "-t", "60", "-D", &pg.data(), "-m", "fast", "-l", &pg.path("log").display().to_string(), "restart"],
    );
    pg
}

#[tokio::test]
async fn passwords_with_and_without_tls() {
    let pg = with_passwords().await;
    let base = format!("host=127.0.0.1 port={} dbname=postgres", pg.port);
    let root = pg.path("server.crt").display().to_string();
    let named = format!("host=db.example hostaddr=127.0.0.1 port={} dbname=postgres sslrootcert={root}", pg.port);
    let keeper = "user=keeper password='s3cret pass'";
    let dir = pg.dir.path().display();
    let certificate = format!("sslcert={dir}/client.crt sslkey={dir}/client.key");
    let tls = "SELECT ssl::text FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    for (text, encrypted) in [
        (format!("{base} {keeper} sslmode=disable"), "false"),
        (format!("{base} {keeper} sslmode=allow"), "false"),
        (format!("{base} {keeper}"), "true"), // prefer
        (format!("{base} {keeper} sslmode=require channel_binding=require require_auth=scram-sha-256"), "true"),
        (format!("{base} {keeper} sslmode=require channel_binding=disable"), "true"),
        (format!("{base} {keeper} sslmode=require ssl_max_protocol_version=TLSv1.2"), "true"),
        (format!("{base} {keeper} sslmode=verify-ca sslrootcert={root}"), "true"),
        (format!("{named} {keeper} sslmode=verify-full"), "true"),
        (format!("{base} user=old password=old sslmode=disable"), "false"),
        (format!("{base} user=clear password=clear sslmode=require"), "true"),
        (format!("{base} user=certified sslmode=require {certificate}"), "true"),
    ] {
        let mut session = Session::connect(&info(&text), &options()).await.unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(session.query(tls).await.unwrap()[0].get(0), Some(encrypted), "{text}");
    }
    // Replication is allowed over TLS only: `allow` has to climb, `prefer` begins there.
    for mode in ["allow", "prefer", "require"] {
        let text = format!("{base} {keeper} sslmode={mode}");
        let mut replication =
            Replication::connect(&info(&text), &options()).await.unwrap_or_else(|e| panic!("{text}: {e}"));
        replication.identify_system().await.unwrap();
    }
}

#[tokio::test]
async fn logins_that_must_fail_say_why() {
    let pg = with_passwords().await;
    let base = format!("host=127.0.0.1 port={} dbname=postgres", pg.port);
    let root = pg.path("server.crt").display().to_string();
    let other = rcgen::generate_simple_self_signed(vec!["db.example".to_owned()]).unwrap().cert.pem();
    let stranger = pg.path("stranger.crt");
    std::fs::write(&stranger, other).unwrap();
    for (text, part) in [
        (format!("{base} user=keeper password=wrong"), "password authentication failed for user \"keeper\""),
        (format!("{base} user=keeper"), "asks for a password"),
        (format!("{base} user=clear password=clear sslmode=disable"), "in clear"),
        (format!("{base} user=keeper password='s3cret pass' sslmode=disable channel_binding=require"), "not encrypted"),
        (format!("{base} user=old password=old channel_binding=require"), "asks for less"),
        (format!("{base} user=old password=old require_auth=scram-sha-256"), "require_auth"),
        (format!("{base} user=nobody sslmode=disable"), "no pg_hba.conf entry"),
        (format!("{base} user=certified sslmode=require"), "certificate"),
        (
            format!("{base} user=keeper password=x sslmode=verify-full sslrootcert={root}"),
            "for db.example, not for 127.0.0.1",
        ),
        (format!("{base} user=keeper password=x sslmode=verify-ca sslrootcert={}", stranger.display()), "sslrootcert"),
        (format!("{base} user=keeper password=x sslmode=verify-ca sslrootcert=/nowhere/x"), "does not exist"),
    ] {
        let Err(error) = Session::connect(&info(&text), &options()).await else { panic!("{text} got in") };
        assert!(error.to_string().contains(part), "{text}: {error}");
        assert!(!error.to_string().contains("s3cret"), "{error}");
        assert!(!error.is_retryable(), "{error}");
    }
    let error = Session::connect(&info(&format!("{base} user=keeper password=wrong")), &options()).await.err().unwrap();
    assert_eq!(error.server_kind(), Some(ServerErrorKind::AuthenticationFailed));
}

#[tokio::test]
async fn several_hosts_and_the_one_that_is_wanted() {
    let primary = TestPg::start("");
    let standby = TestPg::standby_of(&primary);
    let hosts = |first: &TestPg, second: &TestPg| {
        let (a, b) = (first.dir.path().display(), second.dir.path().display());
        format!("host={a},{b} port={},{} user=postgres dbname=postgres", first.port, second.port)
    };
    let both = [hosts(&primary, &standby), hosts(&standby, &primary)];
    for (wanted, socket) in [
        ("primary", &primary),
        ("read-write", &primary),
        ("standby", &standby),
        ("read-only", &standby),
        ("prefer-standby", &standby),
    ] {
        for text in &both {
            let info = info(&format!("{text} target_session_attrs={wanted}"));
            let place = socket.dir.path().display().to_string();
            let session = Session::connect(&info, &options()).await.unwrap();
            assert!(session.server().starts_with(&place), "{wanted}: {}", session.server());
            let replication = Replication::connect(&info, &options()).await.unwrap();
            assert!(replication.server().starts_with(&place), "{wanted}: {}", replication.server());
        }
    }
    let alone = info(&format!("{} target_session_attrs=standby", primary.conninfo()));
    let error = Session::connect(&alone, &options()).await.err().unwrap();
    assert!(matches!(error, PgError::WrongRole { wanted: "standby", .. }), "{error}");
    let dead = format!("host=/nonexistent,{} port={} user=postgres", primary.dir.path().display(), primary.port);
    Session::connect(&info(&dead), &options()).await.unwrap();
    let error = Session::connect(&info("host=/nonexistent,/nowhere user=x"), &options()).await.err().unwrap();
    assert!(matches!(&error, PgError::NoHost { failures } if failures.len() == 2) && error.is_retryable(), "{error}");
}

#[tokio::test]
async fn replication_commands() {
    let pg = TestPg::start("");
    let mut replication = pg.replication().await;
    let identity = replication.identify_system().await.unwrap();
    let system = pg.sql("SELECT system_identifier FROM pg_control_system()").await;
    assert_eq!((identity.system.to_string(), identity.timeline), (system, TimelineId::FIRST));
    assert_eq!(replication.segment_size().await.unwrap(), SegmentSize::new(1 << 20).unwrap());
    assert_eq!(replication.show("server_version_num").await.unwrap(), replication.server_version_num().to_string());
    assert!(replication.show("x; DROP_REPLICATION_SLOT y").await.is_err());

    assert_eq!(replication.read_slot("keep").await.unwrap(), None);
    replication.create_slot("keep").await.unwrap();
    let error = replication.create_slot("keep").await.unwrap_err();
    assert_eq!(error.server_kind(), Some(ServerErrorKind::AlreadyExists), "{error}");
    let slot = replication.read_slot("keep").await.unwrap().unwrap();
    assert!(slot.restart_lsn.unwrap() <= identity.flushed && slot.restart_timeline == Some(TimelineId::FIRST));
    replication.drop_slot("keep").await.unwrap();
    let error = replication.drop_slot("keep").await.unwrap_err();
    assert_eq!(error.server_kind(), Some(ServerErrorKind::NoSuchObject), "{error}");

    assert_eq!(replication.timeline_history(TimelineId::FIRST).await.unwrap(), None);
    assert_eq!(replication.timeline_history(TimelineId::new(9).unwrap()).await.unwrap(), None);
    let error = replication.start(Some("keep"), Lsn::new(1 << 20), TimelineId::FIRST).await.unwrap_err();
    assert_eq!(error.server_kind(), Some(ServerErrorKind::NoSuchObject), "{error}");
}

#[tokio::test]
async fn the_stream_is_the_wal_of_the_server() {
    let pg = TestPg::start("");
    let mut replication = pg.replication().await;
    replication.create_slot("keep").await.unwrap();
    let size = replication.segment_size().await.unwrap();
    let from = replication.read_slot("keep").await.unwrap().unwrap().restart_lsn.unwrap().segment_start(size);
    pg.sql("CREATE TABLE t AS SELECT n, repeat('x', 200) FROM generate_series(1, 20000) n").await;
    let end: Lsn = pg.sql("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    let mut stream = streaming(&pg, Some("keep"), from, TimelineId::FIRST).await;
    let wal = read_to(&mut stream, from, end).await;
    assert!(wal.len() > 4 << 20);
    for (index, piece) in wal.chunks(1 << 20).enumerate() {
        let name = from.advance((index as u64) << 20).segment(size).file_name(TimelineId::FIRST, size);
        let file = std::fs::read(pg.path("data/pg_wal").join(&name)).unwrap();
        assert!(file.starts_with(piece), "{name} differs");
    }
    stream.send_status(Status { write: end, flush: end, apply: end, reply_requested: true }).await.unwrap();
    while !matches!(stream.next().await.unwrap(), StreamEvent::Keepalive { .. }) {}
    assert_eq!(pg.sql("SELECT restart_lsn FROM pg_replication_slots").await, end.to_string());
    // The same session goes on with another command.
    let mut replication = stream.stop().await.unwrap();
    replication.identify_system().await.unwrap();
    replication.drop_slot("keep").await.unwrap();
}

#[tokio::test]
async fn pitfall_05_slot_held_by_another_connection_is_55006_and_frees_itself() {
    let pg = TestPg::start("");
    let mut first = pg.replication().await;
    first.create_slot("keep").await.unwrap();
    let at = first.read_slot("keep").await.unwrap().unwrap().restart_lsn.unwrap();
    let holder = streaming(&pg, Some("keep"), at, TimelineId::FIRST).await;
    let error = pg.replication().await.start(Some("keep"), at, TimelineId::FIRST).await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("55006"), "{error}");
    assert!(error.is_retryable() && error.to_string().contains("keep"), "{error}");
    drop(holder);
    for attempt in 0.. {
        match pg.replication().await.start(Some("keep"), at, TimelineId::FIRST).await {
            Ok(_) => break,
            Err(error) => assert!(attempt < 100 && error.is_retryable(), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn pitfall_06_error_after_copy_both() {
    let pg = TestPg::start("");
    let future = Lsn::new(0xFF << 32);
    let error = streaming(&pg, None, future, TimelineId::FIRST).await.next().await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("XX000"), "{error}");
    assert!(error.to_string().contains("ahead of the WAL flush position"), "{error}");
    // Segments that are gone.
    pg.sql("CREATE TABLE t AS SELECT n, repeat('x', 500) FROM generate_series(1, 20000) n").await;
    for _ in 0..2 {
        pg.sql("SELECT pg_switch_wal()").await;
        pg.sql("CHECKPOINT").await;
    }
    let mut stream = streaming(&pg, None, Lsn::new(1 << 20), TimelineId::FIRST).await;
    let error = stream.next().await.unwrap_err();
    assert_eq!(error.server_kind(), Some(ServerErrorKind::FileMissing), "{error}");
    assert!(!error.is_retryable(), "{error}");
    assert!(matches!(stream.next().await, Err(PgError::Closed { .. })), "an ended stream stays ended");
}

#[tokio::test]
async fn pitfall_07_end_of_timeline_and_pitfall_09_start_at_the_fork() {
    let primary = TestPg::start("");
    let standby = TestPg::standby_of(&primary);
    primary.sql("CREATE TABLE t AS SELECT n FROM generate_series(1, 1000) n").await;
    let size = SegmentSize::new(1 << 20).unwrap();
    let end: Lsn = primary.sql("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    let from = end.segment_start(size);
    let mut stream = streaming(&standby, None, from, TimelineId::FIRST).await;
    let received = from.advance(read_to(&mut stream, from, end).await.len() as u64);
    let too_early = streaming(&standby, None, from, TimelineId::FIRST).await;
    assert!(too_early.into_replication().is_err());
    assert_eq!(standby.sql("SELECT pg_promote()").await, "t");
    let ended = loop {
        match stream.next().await.unwrap() {
            StreamEvent::TimelineEnded(ended) => break ended,
            StreamEvent::Wal { .. } | StreamEvent::Keepalive { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    let two = TimelineId::new(2).unwrap();
    assert_eq!(ended.next, two);
    assert!(ended.begins_at >= end && received >= end);
    assert_eq!(stream.next().await.unwrap(), StreamEvent::TimelineEnded(ended), "it stays ended");
    stream.send_status(Status::default()).await.unwrap();
    let mut replication = stream.into_replication().unwrap();

    let history = replication.timeline_history(two).await.unwrap().unwrap();
    assert_eq!(TimelineHistory::parse(two, &history).unwrap().begins_at(), ended.begins_at);

    // Exactly at the fork there is nothing to copy, and the session goes on.
    let started = replication.start(None, ended.begins_at, TimelineId::FIRST).await.unwrap();
    let Started::TimelineEnded(mut replication, again) = started else { panic!("{started:?}") };
    assert_eq!(again, ended);
    assert_eq!(replication.identify_system().await.unwrap().timeline, two);
    // Beyond it the old timeline has no history.
    let error =
        standby.replication().await.start(None, ended.begins_at.advance(8), TimelineId::FIRST).await.unwrap_err();
    assert!(error.sqlstate().is_some() && error.to_string().contains("history"), "{error}");

    // The old timeline can still be read to its end, in one go, and the new one from the same segment.
    let mut old = streaming(&standby, None, from, TimelineId::FIRST).await;
    let mut at = from;
    loop {
        match old.next().await.unwrap() {
            StreamEvent::Wal { start, data, .. } => at = start.advance(data.len() as u64),
            StreamEvent::TimelineEnded(_) => break,
            StreamEvent::Keepalive { .. } => {}
            StreamEvent::ServerStopped => panic!("stopped"),
        }
    }
    assert_eq!(at, ended.begins_at);
    let begin = ended.begins_at.segment_start(size);
    match replication.start(None, begin, two).await.unwrap() {
        Started::Streaming(mut new) => drop(read_to(&mut new, begin, ended.begins_at.advance(1)).await),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_shutdown_in_order_waits_for_our_status_and_is_told_from_a_crash() {
    let pg = TestPg::start("");
    let size = SegmentSize::new(1 << 20).unwrap();
    let from: Lsn = pg.sql("SELECT pg_current_wal_flush_lsn()").await.parse::<Lsn>().unwrap().segment_start(size);
    let mut stream = streaming(&pg, None, from, TimelineId::FIRST).await;
    let data = pg.data();
    let stopped =
        tokio::task::spawn_blocking(move || tool("pg_ctl", &["-w", "-t", "30", "-D", &data, "-m", "fast", "stop"]));
    let mut at = from;
    loop {
        match stream.next().await.unwrap() {
            StreamEvent::Wal { start, data, .. } => at = start.advance(data.len() as u64),
            StreamEvent::Keepalive { reply_requested, .. } => {
                if reply_requested {
                    stream
                        .send_status(Status { write: at, flush: at, apply: at, reply_requested: false })
                        .await
                        .unwrap();
                }
            }
            StreamEvent::ServerStopped => break,
            StreamEvent::TimelineEnded(end) => panic!("{end:?}"),
        }
    }
    stopped.await.unwrap();
    assert_eq!(stream.next().await.unwrap(), StreamEvent::ServerStopped);

    pg.up();
    let mut stream = streaming(&pg, None, from, TimelineId::FIRST).await;
    let data = pg.data();
    tokio::task::spawn_blocking(move || tool("pg_ctl", &["-w", "-D", &data, "-m", "immediate", "stop"])).await.unwrap();
    let error = loop {
        match stream.next().await {
            Ok(StreamEvent::ServerStopped) => panic!("that was no shutdown in order"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(error.is_retryable(), "{error}");
}
