//! The S3 store against servers that others wrote. Each is found by its variable, which `testenv/test.sh` sets; a test that
//! finds none passes and says so, and is missed in the count at the end of that script.
//!
//! `PGKEEP_MOTO`: the program `moto_server`. It takes any key and checks no checksum.
//! `PGKEEP_GARAGE`: the program `garage`, which takes eight minutes to build. It ignores conditional create.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use aws_sdk_s3::types::{CreateBucketConfiguration, VersioningConfiguration};
use bytes::Bytes;
use pgkeep::store::conformance::{self, Broken};
use pgkeep::store::s3::{
    ConditionalCreate, LockMode, LockRule, LockSupport, MULTIPART, PutChecksum, S3Credentials, S3Options, S3Store,
    StorageRule, Verdict,
};
use pgkeep::store::{Body, Key, Store};

/// A server in a process of its own, and what its keys are.
struct Server {
    process: Child,
    endpoint: String,
    region: &'static str,
    access_key: String,
    secret_key: String,
    _home: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn found(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_file());
    if path.is_none() {
        eprintln!("NOT COVERED: {variable} names no program");
    }
    path
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn moto() -> Option<Server> {
    let program = found("PGKEEP_MOTO")?;
    let python = program.with_file_name("python");
    let version = output(Command::new(python).args(["-c", "import moto; print(moto.__version__)"]));
    support::note("s3-moto", &version);
    let home = tempfile::tempdir().unwrap();
    let mut process = Command::new(program)
        .args(["-H", "127.0.0.1", "-p", "0"])
        .current_dir(home.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It says its port on stderr, and has to be read for as long as it runs, or it stops at a full pipe.
    let stderr = process.stderr.take().unwrap();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if let Some((_, port)) = line.split_once("http://127.0.0.1:") {
                let _ = sender.send(port.chars().take_while(char::is_ascii_digit).collect::<String>());
            }
        }
    });
    let port = receiver.recv_timeout(Duration::from_secs(120)).expect("moto says its port");
    Some(Server {
        process,
        endpoint: format!("http://127.0.0.1:{port}"),
        region: "us-east-1",
        access_key: "any".into(),
        secret_key: "any".into(),
        _home: home,
    })
}

/// A port that nobody has right now.
fn port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn garage() -> Option<Server> {
    let program = found("PGKEEP_GARAGE")?;
    let version = output(Command::new(&program).arg("--version"));
    let version = version.split_whitespace().find(|word| word.trim_start_matches('v').starts_with(char::is_numeric));
    support::note("s3-garage", version.unwrap_or("unknown"));
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("garage.toml");
    let (api, rpc, admin) = (port(), port(), port());
    let (meta, data) = (home.path().join("meta"), home.path().join("data"));
    let secret = "0123456789abcdef".repeat(4);
    write!(
        std::fs::File::create(&file).unwrap(),
        "metadata_dir = {meta:?}\ndata_dir = {data:?}\ndb_engine = \"sqlite\"\nreplication_factor = 1\n\
         rpc_bind_addr = \"127.0.0.1:{rpc}\"\nrpc_public_addr = \"127.0.0.1:{rpc}\"\nrpc_secret = \"{secret}\"\n\
         [s3_api]\napi_bind_addr = \"127.0.0.1:{api}\"\ns3_region = \"garage\"\n\
         [admin]\napi_bind_addr = \"127.0.0.1:{admin}\"\n"
    )
    .unwrap();
    let process = Command::new(&program)
        .arg("-c")
        .arg(&file)
        .arg("server")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let garage = |arguments: &[&str]| output(Command::new(&program).arg("-c").arg(&file).args(arguments));
    let ready = || Command::new(&program).arg("-c").arg(&file).arg("status").output();
    let access_key = format!("GK{}", "a".repeat(24));
    let server = Server {
        process,
        endpoint: format!("http://127.0.0.1:{api}"),
        region: "garage",
        secret_key: "b".repeat(64),
        access_key,
        _home: home,
    };
    let since = Instant::now();
    let node = loop {
        let answer = ready().unwrap();
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        let is_id = |word: &&str| word.len() == 16 && word.chars().all(|c| c.is_ascii_hexdigit());
        if let (true, Some(node)) = (answer.status.success(), text.split_whitespace().find(is_id)) {
            break node.to_owned();
        }
        assert!(since.elapsed() < Duration::from_secs(120), "garage does not start");
        std::thread::sleep(Duration::from_millis(100));
    };
    garage(&["layout", "assign", "-z", "dc1", "-c", "4G", &node]);
    garage(&["layout", "apply", "--version", "1"]);
    garage(&["key", "import", "--yes", "-n", "test", &server.access_key, &server.secret_key]);
    garage(&["key", "allow", "--create-bucket", &server.access_key]);
    Some(server)
}

impl Server {
    fn sdk(&self) -> aws_sdk_s3::Client {
        let credentials = aws_sdk_s3::config::Credentials::new(&self.access_key, &self.secret_key, None, None, "test");
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(aws_sdk_s3::config::BehaviorVersion::v2026_01_12())
            .region(aws_sdk_s3::config::Region::new(self.region))
            .endpoint_url(&self.endpoint)
            .force_path_style(true)
            .credentials_provider(credentials);
        aws_sdk_s3::Client::from_conf(config.build())
    }

    /// A bucket that nobody had yet.
    async fn bucket(&self, object_lock: bool) -> String {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("archive-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let place = (self.region != "us-east-1")
            .then(|| CreateBucketConfiguration::builder().location_constraint(self.region.into()).build());
        let create = self.sdk().create_bucket().bucket(&name).set_create_bucket_configuration(place);
        create.set_object_lock_enabled_for_bucket(object_lock.then_some(true)).send().await.unwrap();
        name
    }

    fn options(&self, bucket: &str, prefix: &str) -> S3Options {
        S3Options {
            endpoint: Some(self.endpoint.clone()),
            region: Some(self.region.into()),
            credentials: S3Credentials::Static {
                access_key: self.access_key.as_str().into(),
                secret_key: self.secret_key.as_str().into(),
                session_token: None,
            },
            ..S3Options::new(bucket, prefix)
        }
    }

    async fn known(&self, options: S3Options) -> S3Store {
        let store = S3Store::open(options).await.unwrap();
        let verdict = store.probe().await.unwrap();
        store.with_verdict(verdict)
    }

    /// All of the conformance suite, each check in a folder of one bucket.
    async fn conforms(&self, store: &S3Store) -> Result<(), Broken> {
        let next = AtomicUsize::new(0);
        let verdict = store.verdict().unwrap();
        let bucket = &store.options().bucket;
        conformance::run(async || {
            let prefix = format!("deep/run{}", next.fetch_add(1, Ordering::Relaxed));
            let options = S3Options { verdict: Some(verdict.clone()), ..self.options(bucket, &prefix) };
            Ok(Arc::new(S3Store::open(options).await?) as Arc<dyn Store>)
        })
        .await
    }
}

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn body(len: u64) -> Body {
    let mut bytes = vec![0; len as usize];
    blake3::Hasher::new().update(b"body").finalize_xof().fill(&mut bytes);
    Bytes::from(bytes).into()
}

/// Large objects in parts, and uploads that nobody finished.
/// `knows_times`: the server says when an upload was begun, and not some day of its own.
async fn goes_in_parts(server: &Server, store: &S3Store, knows_times: bool) {
    store.put_new(&key("large"), body(MULTIPART + 1)).await.unwrap();
    assert_eq!(store.get(&key("large"), None).await.unwrap(), body(MULTIPART + 1).to_bytes());
    let bucket = &store.options().bucket;
    let sdk = server.sdk();
    sdk.create_multipart_upload().bucket(bucket).key("r/left").send().await.unwrap();
    sdk.create_multipart_upload().bucket(bucket).key("elsewhere").send().await.unwrap();
    if knows_times {
        assert_eq!(store.clean_stale_uploads(Duration::from_secs(24 * 3600)).await.unwrap(), 0);
    }
    let since = Instant::now();
    // Its times are whole seconds.
    while store.clean_stale_uploads(Duration::ZERO).await.unwrap() == 0 {
        assert!(since.elapsed() < Duration::from_secs(60), "the upload is never old");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let left = sdk.list_multipart_uploads().bucket(bucket).send().await.unwrap();
    let left: Vec<_> = left.uploads().iter().filter_map(|upload| upload.key()).collect();
    assert_eq!(left, ["elsewhere"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn moto_keeps_the_promises_of_a_store() -> Result<(), Broken> {
    let Some(server) = moto() else { return Ok(()) };
    let bucket = server.bucket(false).await;
    let store = server.known(server.options(&bucket, "r")).await;
    let verdict = store.verdict().unwrap().clone();
    // It looks and then writes, in threads: whether a race shows that is luck.
    let refused = [ConditionalCreate::Atomic, ConditionalCreate::NotAtomic];
    assert!(refused.contains(&verdict.conditional_create), "{verdict:?}");
    assert_eq!((verdict.checksum, verdict.checksum_verified), (PutChecksum::Crc32c, false));
    assert_eq!(verdict.object_lock, LockSupport::NotInThisBucket);
    goes_in_parts(&server, &store, false).await;
    server.conforms(&store.with_verdict(Verdict { conditional_create: ConditionalCreate::NotAtomic, ..verdict })).await
}

#[tokio::test(flavor = "multi_thread")]
async fn moto_locks_and_classes() {
    let Some(server) = moto() else { return };
    let bucket = server.bucket(true).await;
    let sdk = server.sdk();
    let versions = VersioningConfiguration::builder().status("Enabled".into()).build();
    sdk.put_bucket_versioning().bucket(&bucket).versioning_configuration(versions).send().await.unwrap();
    let options = S3Options {
        object_lock: Some(LockRule {
            mode: LockMode::Governance,
            days: 3,
            short_lived: |key| key.starts_with("open/"),
        }),
        storage_class: Some(StorageRule { class: "STANDARD_IA".into(), applies: |key| key.starts_with("pack/") }),
        ..server.options(&bucket, "r")
    };
    let store = server.known(options).await;
    assert_eq!(store.verdict().unwrap().object_lock, LockSupport::Enabled);
    for (name, is_locked, class) in
        [("pack/1", true, Some("STANDARD_IA")), ("wal/1", true, None), ("open/1", false, None)]
    {
        store.put_new(&key(name), body(100)).await.unwrap();
        let head = sdk.head_object().bucket(&bucket).key(format!("r/{name}")).send().await.unwrap();
        assert_eq!(head.object_lock_mode().is_some(), is_locked, "{name}: {head:?}");
        assert_eq!(head.storage_class().map(|class| class.as_str()), class, "{name}");
        let version = head.version_id().unwrap().to_owned();
        let delete = sdk.delete_object().bucket(&bucket).key(format!("r/{name}")).version_id(version).send().await;
        assert_eq!(delete.is_err(), is_locked, "{name}: {delete:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garage_keeps_the_promises_of_a_store() -> Result<(), Broken> {
    let Some(server) = garage() else { return Ok(()) };
    let bucket = server.bucket(false).await;
    let store = server.known(server.options(&bucket, "r")).await;
    let verdict = store.verdict().unwrap();
    assert_eq!(verdict.conditional_create, ConditionalCreate::Ignored);
    assert_eq!((verdict.checksum, verdict.checksum_verified), (PutChecksum::Crc32c, true));
    assert_eq!(verdict.object_lock, LockSupport::Unsupported);
    assert!(!store.creates_exclusively());
    goes_in_parts(&server, &store, true).await;
    server.conforms(&store).await
}

/// The signature matters to a server that checks it.
#[tokio::test(flavor = "multi_thread")]
async fn garage_refuses_a_wrong_secret() {
    let Some(server) = garage() else { return };
    let bucket = server.bucket(false).await;
    let mut options = server.options(&bucket, "r");
    options.credentials = S3Credentials::Static {
        access_key: server.access_key.as_str().into(),
        secret_key: "c".repeat(64).into(),
        session_token: None,
    };
    let store = S3Store::open(options).await.unwrap();
    let error = store.put_new(&key("a"), body(10)).await.unwrap_err();
    assert!(!error.is_retryable(), "{error}");
}
