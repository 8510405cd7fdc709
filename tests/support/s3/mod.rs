//! An S3 server in the test's own process: real HTTP on 127.0.0.1, real signatures, objects in memory. It does what S3 does
//! (conditional create, versions, object lock, multipart uploads, checksums), and what S3 does on bad days, by seed.
//!
//! It has threads of its own: whoever starts it may block, and a child process may speak to it. Not a part of `support`, so
//! that only the tests that need it are built with it:
//!
//! ```ignore
//! #[path = "support/s3/mod.rs"]
//! mod s3;
//!
//! let s3 = TestS3::start(TestS3Options::default());
//! s3.set_faults(S3Faults::network(0.1), seed);
//! s3.down(true);
//! ```

#![allow(dead_code, unreachable_pub, unused_imports)] // each test binary uses a part of it

mod bucket;
mod faults;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use pgkeep::store::s3::{S3Credentials, S3Options};
use rustls::pki_types::PrivateKeyDer;
use s3s::auth::{S3Auth, SecretKey};
use s3s::config::{HotReloadConfigProvider, S3Config};
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use bucket::Buckets;
pub use bucket::{LockedUntil, Version};
pub use faults::S3Faults;
use faults::{Cut, Dealer};

/// What a conditional create does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conditional {
    /// As S3 does it.
    Atomic,
    /// Checked, and written a moment later.
    Racy,
    /// What is there is replaced.
    Ignored,
    /// Answered with 501.
    Unsupported,
}

/// How a [`TestS3`] behaves.
#[derive(Debug, Clone)]
pub struct TestS3Options {
    /// The bucket that is there from the start.
    pub bucket: String,
    /// A put where something is.
    pub conditional: Conditional,
    /// An upload that is completed where something is.
    pub multipart_conditional: Conditional,
    /// The bucket has object lock, and so versions.
    pub object_lock: bool,
    /// Every version of an object is kept.
    pub versions: bool,
    /// `false`: headers with checksums are answered with 400, as older servers do.
    pub takes_checksums: bool,
    /// `false`: 501 to whoever lists uploads.
    pub lists_uploads: bool,
    /// HTTPS, with a certificate of its own: [`TestS3::ca_pem`].
    pub tls: bool,
    /// Where it listens, and on which port; 0 is a free one.
    pub listen: SocketAddr,
}

impl Default for TestS3Options {
    fn default() -> Self {
        TestS3Options {
            bucket: "archive".into(),
            conditional: Conditional::Atomic,
            multipart_conditional: Conditional::Atomic,
            object_lock: false,
            versions: false,
            takes_checksums: true,
            lists_uploads: true,
            tls: false,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        }
    }
}

/// A running server; gone when dropped.
pub struct TestS3 {
    shared: Arc<Shared>,
    ca_pem: String,
    address: SocketAddr,
    runtime: Option<Runtime>,
}

struct Shared {
    options: TestS3Options,
    buckets: Buckets,
    dealer: Dealer,
    refusal: Mutex<Option<(u16, String)>>,
    /// What happens to requests of a kind.
    picked: Mutex<Picked>,
    down: AtomicBool,
    frozen: watch::Sender<bool>,
    held: watch::Sender<Option<String>>,
    /// How many more requests of which kind are answered before it goes down.
    countdown: Mutex<Option<(String, u64)>>,
    config: Arc<HotReloadConfigProvider>,
    /// By kind: how many there were, how many are under way, how many were at once.
    requests: Mutex<BTreeMap<&'static str, Counts>>,
    connections: AtomicU64,
}

#[derive(Debug, Default, Clone)]
struct Picked {
    lost: Option<String>,
    stalled: bool,
    answers: BTreeMap<String, (u16, String)>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    total: u64,
    now: u64,
    most: u64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // a test that failed elsewhere
}

const ACCESS_KEY: &str = "PGKEEPTESTACCESSKEY1";
const SECRET_KEY: &str = "a-secret/that+opens=nothing";

/// The keys that every one of these servers knows: access and secret.
pub fn keys() -> (&'static str, &'static str) {
    (ACCESS_KEY, SECRET_KEY)
}

impl TestS3 {
    /// Starts one where the options say: on a port of its own.
    pub fn start(options: TestS3Options) -> TestS3 {
        let listener = std::net::TcpListener::bind(options.listen).expect("a port");
        let address = listener.local_addr().expect("an address");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("test-s3")
            .enable_all()
            .build()
            .expect("a runtime");
        let shared = Arc::new(Shared {
            buckets: Buckets::default(),
            dealer: Dealer::default(),
            refusal: Mutex::default(),
            picked: Mutex::default(),
            down: AtomicBool::new(false),
            frozen: watch::Sender::new(false),
            held: watch::Sender::new(None),
            countdown: Mutex::default(),
            config: Arc::new(HotReloadConfigProvider::default()),
            requests: Mutex::default(),
            connections: AtomicU64::new(0),
            options,
        });
        shared.buckets.create(&shared.options.bucket);
        let mut service = S3ServiceBuilder::new(bucket::Server(shared.clone()));
        service.set_auth(Keys);
        service.set_config(shared.config.clone());
        let service = service.build();
        let certified = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
        let ca_pem = certified.cert.pem();
        let acceptor = shared.options.tls.then(|| acceptor(&certified));
        runtime.spawn(accept(listener, acceptor, shared.clone(), service));
        TestS3 { shared, ca_pem, address, runtime: Some(runtime) }
    }

    /// `http://127.0.0.1:…`
    pub fn endpoint(&self) -> String {
        let scheme = if self.shared.options.tls { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// The certificate to trust where there is TLS.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    pub fn bucket(&self) -> &str {
        &self.shared.options.bucket
    }

    pub fn access_key(&self) -> &'static str {
        ACCESS_KEY
    }

    pub fn secret_key(&self) -> &'static str {
        SECRET_KEY
    }

    /// What opens the bucket, with this prefix.
    pub fn options(&self, prefix: &str) -> S3Options {
        S3Options {
            endpoint: Some(self.endpoint()),
            credentials: S3Credentials::Static {
                access_key: ACCESS_KEY.into(),
                secret_key: SECRET_KEY.into(),
                session_token: None,
            },
            ..S3Options::new(self.bucket(), prefix)
        }
    }

    /// Another bucket.
    pub fn create_bucket(&self, name: &str) {
        self.shared.buckets.create(name);
    }

    /// The server forgets the bucket and all that is in it.
    pub fn delete_bucket(&self, name: &str) {
        self.shared.buckets.delete(name);
    }

    /// Other faults from now on, as `seed` deals them.
    pub fn set_faults(&self, faults: S3Faults, seed: u64) {
        self.shared.dealer.set(faults, seed);
    }

    /// How many faults there were: a test that met none has shown nothing.
    pub fn faults(&self) -> u64 {
        self.shared.dealer.faults()
    }

    /// Connections are closed at once, requests get no answer; until it is up again.
    pub fn down(&self, down: bool) {
        self.shared.down.store(down, Ordering::SeqCst);
    }

    /// Goes down after so many more requests of this kind, and stays down until [`TestS3::down`] says otherwise.
    pub fn go_down_after(&self, kind: &str, requests: u64) {
        *locked(&self.shared.countdown) = Some((kind.to_owned(), requests));
    }

    /// Is it down?
    pub fn is_down(&self) -> bool {
        self.shared.down.load(Ordering::SeqCst)
    }

    /// Requests are taken and not answered, until it thaws.
    pub fn freeze(&self, frozen: bool) {
        self.shared.frozen.send_replace(frozen);
    }

    /// Every request is answered with this status and code, until it is `None`.
    pub fn refuse(&self, refusal: Option<(u16, &str)>) {
        *locked(&self.shared.refusal) = refusal.map(|(status, code)| (status, code.to_owned()));
    }

    /// Requests of this kind are done, and their answers lost.
    pub fn lose_answers_of(&self, kind: Option<&str>) {
        locked(&self.shared.picked).lost = kind.map(str::to_owned);
    }

    /// Objects are sent as far as their first 1000 bytes, and the rest never comes.
    pub fn stall_bodies(&self, stalled: bool) {
        locked(&self.shared.picked).stalled = stalled;
    }

    /// Requests of this kind are answered with this status and code instead of being done, until it is `None`.
    pub fn answer_requests_of(&self, kind: &str, answer: Option<(u16, &str)>) {
        let answers = &mut locked(&self.shared.picked).answers;
        match answer {
            Some((status, code)) => answers.insert(kind.to_owned(), (status, code.to_owned())),
            None => answers.remove(kind),
        };
    }

    /// Requests of this kind are taken and not answered, until another kind is held, or none.
    pub fn hold_requests_of(&self, kind: Option<&str>) {
        self.shared.held.send_replace(kind.map(str::to_owned));
    }

    /// The server's clock is so far from everybody's that it takes no signature.
    pub fn set_clock_wrong(&self, wrong: bool) {
        let mut config = S3Config::default();
        if wrong {
            config.presigned_url_max_skew_time_secs = 0;
        }
        self.shared.config.update(Arc::new(config));
    }

    /// The objects of the bucket, by their full names.
    pub fn objects(&self) -> BTreeMap<String, Bytes> {
        self.shared.buckets.objects(self.bucket())
    }

    /// All versions of an object, oldest first; the last is what is read.
    pub fn versions(&self, key: &str) -> Vec<Version> {
        self.shared.buckets.versions(self.bucket(), key)
    }

    /// Replaces an object's bytes, or puts one there, behind everybody's back.
    pub fn plant(&self, key: &str, bytes: impl Into<Bytes>) {
        self.shared.buckets.plant(self.bucket(), key, bytes.into());
    }

    /// Removes an object with its versions, behind everybody's back.
    pub fn remove(&self, key: &str) {
        self.shared.buckets.remove(self.bucket(), key);
    }

    /// The keys of uploads that were begun and neither completed nor aborted.
    pub fn uploads(&self) -> Vec<String> {
        self.shared.buckets.uploads(self.bucket())
    }

    /// All unfinished uploads were begun so much earlier.
    pub fn age_uploads(&self, by: Duration) {
        self.shared.buckets.age_uploads(self.bucket(), by);
    }

    /// How many requests there were, by kind: `PutObject`, `GetObject`, …
    pub fn requests(&self) -> BTreeMap<&'static str, u64> {
        locked(&self.shared.requests).iter().map(|(kind, counts)| (*kind, counts.total)).collect()
    }

    /// How many of this kind.
    pub fn count(&self, kind: &str) -> u64 {
        locked(&self.shared.requests).get(kind).map_or(0, |counts| counts.total)
    }

    /// The most of this kind that were under way at once.
    pub fn most_at_once(&self, kind: &str) -> u64 {
        locked(&self.shared.requests).get(kind).map_or(0, |counts| counts.most)
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }
}

impl Drop for TestS3 {
    fn drop(&mut self) {
        // Not by drop: that waits, which an asynchronous test may not.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The keys that the server knows.
struct Keys;

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> s3s::S3Result<SecretKey> {
        match access_key {
            ACCESS_KEY => Ok(SecretKey::from(SECRET_KEY)),
            _ => Err(s3s::s3_error!(InvalidAccessKeyId)),
        }
    }
}

fn acceptor(certified: &rcgen::CertifiedKey<rcgen::KeyPair>) -> TlsAcceptor {
    let key = PrivateKeyDer::Pkcs8(certified.signing_key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("protocol versions")
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key)
        .expect("a certificate and its key");
    TlsAcceptor::from(Arc::new(config))
}

async fn accept(
    listener: std::net::TcpListener,
    acceptor: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    service: S3Service,
) -> io::Result<Infallible> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let Ok((socket, _)) = listener.accept().await else { continue };
        shared.connections.fetch_add(1, Ordering::SeqCst);
        if shared.down.load(Ordering::SeqCst) {
            continue;
        }
        let _ = socket.set_nodelay(true);
        let (shared, service) = (shared.clone(), service.clone());
        match acceptor.clone() {
            None => tokio::spawn(serve(socket, shared, service)),
            Some(acceptor) => tokio::spawn(async move {
                if let Ok(socket) = acceptor.accept(socket).await {
                    serve(socket, shared, service).await;
                }
            }),
        };
    }
}

async fn serve(socket: impl AsyncRead + AsyncWrite + Unpin, shared: Arc<Shared>, service: S3Service) {
    let answer = service_fn(|request| answer(shared.clone(), service.clone(), request));
    let mut server = http1::Builder::new();
    let _ = server.timer(TokioTimer::new()).serve_connection(TokioIo::new(socket), answer).await;
}

/// An answer, or the end of the connection without one.
async fn answer(
    shared: Arc<Shared>,
    service: S3Service,
    request: Request<hyper::body::Incoming>,
) -> Result<Response<s3s::Body>, io::Error> {
    let closed = |why: &str| Err(io::Error::other(why.to_owned()));
    let kind = kind(&request);
    let _counted = Counted::new(&shared, kind);
    let mut frozen = shared.frozen.subscribe();
    let _ = frozen.wait_for(|frozen| !frozen).await;
    let mut held = shared.held.subscribe();
    let _ = held.wait_for(|held| held.as_deref() != Some(kind)).await;
    count_down(&shared, kind);
    if shared.down.load(Ordering::SeqCst) {
        return closed("down");
    }
    let refusal = locked(&shared.refusal).clone();
    if let Some((status, code)) = refusal {
        return Ok(error(status, &code));
    }
    let picked = locked(&shared.picked).clone();
    if let Some((status, code)) = picked.answers.get(kind) {
        return Ok(error(*status, code));
    }
    let mut dealt = shared.dealer.deal();
    if let Some(slow) = dealt.slow {
        tokio::time::sleep(slow).await;
    }
    if dealt.reset {
        return closed("reset");
    }
    if dealt.error {
        return Ok(error(500, "InternalError"));
    }
    if dealt.throttle {
        return Ok(error(503, "SlowDown"));
    }
    let mut request = request.map(s3s::Body::from);
    request.extensions_mut().insert(bucket::Stale(dealt.stale));
    let response = match service.call(request).await {
        Ok(response) => response,
        Err(_) => return closed("not HTTP"),
    };
    if dealt.lost || picked.lost.as_deref() == Some(kind) {
        return closed("the answer is lost");
    }
    if picked.stalled && kind == "GetObject" && response.status().is_success() {
        return Ok(response.map(|body| s3s::Body::http_body_unsync(Cut::new(body, 1000, Duration::from_secs(3600)))));
    }
    if dealt.cut && kind == "GetObject" && response.status().is_success() {
        let len = response.headers().get("content-length").and_then(|len| len.to_str().ok()?.parse().ok());
        let after = dealt.random.below(len.unwrap_or(1));
        return Ok(response.map(|body| s3s::Body::http_body_unsync(Cut::new(body, after, Duration::from_millis(20)))));
    }
    Ok(response)
}

/// See [`TestS3::go_down_after`].
fn count_down(shared: &Shared, kind: &str) {
    let mut countdown = locked(&shared.countdown);
    match &mut *countdown {
        Some((of, left)) if of == kind && *left > 0 => *left -= 1,
        Some((of, _)) if of == kind => {
            shared.down.store(true, Ordering::SeqCst);
            *countdown = None;
        }
        _ => {}
    }
}

fn error(status: u16, code: &str) -> Response<s3s::Body> {
    let text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code><Message>made to fail</Message></Error>"
    );
    let mut response = Response::new(s3s::Body::from(text));
    *response.status_mut() = hyper::StatusCode::from_u16(status).expect("a status");
    response
}

/// What is asked, by what S3 calls it.
fn kind<B>(request: &Request<B>) -> &'static str {
    let query = request.uri().query().unwrap_or_default();
    let has = |name: &str| query.split('&').any(|one| one.split('=').next() == Some(name));
    let of_object = request.uri().path().trim_matches('/').contains('/');
    match (request.method().clone(), of_object) {
        (Method::PUT, true) if has("partNumber") => "UploadPart",
        (Method::PUT, true) => "PutObject",
        (Method::GET, true) => "GetObject",
        (Method::HEAD, true) => "HeadObject",
        (Method::DELETE, true) if has("uploadId") => "AbortMultipartUpload",
        (Method::DELETE, true) => "DeleteObject",
        (Method::POST, true) if has("uploads") => "CreateMultipartUpload",
        (Method::POST, true) => "CompleteMultipartUpload",
        (Method::GET, false) if has("uploads") => "ListMultipartUploads",
        (Method::GET, false) if has("list-type") => "ListObjectsV2",
        _ => "other",
    }
}

struct Counted<'a> {
    shared: &'a Shared,
    kind: &'static str,
}

impl<'a> Counted<'a> {
    fn new(shared: &'a Shared, kind: &'static str) -> Counted<'a> {
        let mut requests = locked(&shared.requests);
        let counts = requests.entry(kind).or_default();
        counts.total += 1;
        counts.now += 1;
        counts.most = counts.most.max(counts.now);
        drop(requests);
        Counted { shared, kind }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        if let Some(counts) = locked(&self.shared.requests).get_mut(self.kind) {
            counts.now -= 1;
        }
    }
}
