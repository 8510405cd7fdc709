//! The S3 store against a server in this process that can be told to fail. Servers that others wrote: `s3_servers.rs`.

mod support;

#[path = "support/s3/mod.rs"]
mod s3;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use pgkeep::store::conformance::{self, Broken, Expect};
use pgkeep::store::retry::{Retry, RetryPolicy};
use pgkeep::store::s3::{
    Checksum, ConditionalCreate, Deadlines, LockMode, LockRule, LockSupport, MULTIPART, PART, PARTS_AT_ONCE,
    PutChecksum, S3Credentials, S3Options, S3Store, StorageRule, Verdict,
};
use pgkeep::store::{Body, Created, Key, ListRequest, Store, StoreError, list_all, list_folders};

use s3::{Conditional, S3Faults, TestS3, TestS3Options};

type Checked = Result<(), Broken>;

/// A prefix that nobody had yet.
fn fresh() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("run/{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn start(options: TestS3Options) -> TestS3 {
    support::note("s3-in-process", env!("CARGO_PKG_VERSION"));
    TestS3::start(options)
}

fn plain() -> TestS3 {
    start(TestS3Options::default())
}

async fn open(options: S3Options) -> S3Store {
    S3Store::open(options).await.unwrap()
}

async fn probed(s3: &TestS3) -> Verdict {
    open(s3.options("probed")).await.probe().await.unwrap()
}

/// A store with what a probe found.
async fn known(s3: &TestS3) -> S3Store {
    let verdict = probed(s3).await;
    open(s3.options("repo")).await.with_verdict(verdict)
}

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn body(len: u64) -> Body {
    let mut bytes = vec![0; len as usize];
    blake3::Hasher::new().update(b"body").finalize_xof().fill(&mut bytes);
    // Cut as sealed frames are: a little more than a MiB, so that parts begin in the middle of chunks.
    Bytes::from(bytes).chunks(1_050_000).map(Bytes::copy_from_slice).collect::<Vec<_>>().into()
}

/// Many quick attempts.
fn stubborn() -> RetryPolicy {
    RetryPolicy {
        attempts: 100,
        first_wait: Duration::from_millis(1),
        longest_wait: Duration::from_millis(20),
        ..RetryPolicy::default()
    }
}

async fn wait_until(what: &str, ready: impl Fn() -> bool) {
    let since = Instant::now();
    while !ready() {
        assert!(since.elapsed() < Duration::from_secs(60), "waited for {what}, in vain");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Every check on a prefix of its own, with what a probe found.
async fn keeps_the_promises(s3: &TestS3) -> Checked {
    let verdict = probed(s3).await;
    conformance::run(async || Ok(Arc::new(open(s3.options(&fresh())).await.with_verdict(verdict.clone())) as _)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_promises_of_a_store() -> Checked {
    keeps_the_promises(&plain()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_promises_before_anybody_has_probed() -> Checked {
    let s3 = plain();
    conformance::run(async || Ok(Arc::new(open(s3.options(&fresh())).await) as Arc<dyn Store>)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_promises_on_a_bucket_with_versions_and_locks() -> Checked {
    keeps_the_promises(&start(TestS3Options { object_lock: true, ..TestS3Options::default() })).await
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_promises_of_a_store_over_a_bad_network() -> Checked {
    for (seed, conditional) in (0..).zip([Conditional::Atomic, Conditional::Ignored, Conditional::Atomic]) {
        let s3 = start(TestS3Options { conditional, multipart_conditional: conditional, ..TestS3Options::default() });
        let verdict = probed(&s3).await;
        s3.set_faults(S3Faults::network(0.08), seed);
        let make = async || {
            let store = open(s3.options(&fresh())).await.with_verdict(verdict.clone());
            Ok(Arc::new(Retry::with_seed(Arc::new(store), stubborn(), seed)) as Arc<dyn Store>)
        };
        let expect = Expect { answers_get_lost: true };
        conformance::run_with(make, expect).await.inspect_err(|_| eprintln!("seed {seed}, {conditional:?}"))?;
        assert!(s3.faults() > 100, "seed {seed}: only {} faults", s3.faults());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_promises_where_conditional_create_is_weak() -> Checked {
    for (conditional, found) in [
        (Conditional::Ignored, ConditionalCreate::Ignored),
        (Conditional::Racy, ConditionalCreate::NotAtomic),
        (Conditional::Unsupported, ConditionalCreate::Unsupported),
    ] {
        let s3 = start(TestS3Options { conditional, multipart_conditional: conditional, ..TestS3Options::default() });
        let verdict = probed(&s3).await;
        assert_eq!((verdict.conditional_create, verdict.multipart_conditional), (found, found));
        let words = verdict.in_words(&s3.options("repo"));
        assert!(words.iter().any(|finding| !finding.good && finding.text.contains("conditional create")), "{words:?}");
        assert!(!known(&s3).await.creates_exclusively());
        keeps_the_promises(&s3).await.inspect_err(|_| eprintln!("{conditional:?}"))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_finds_out_and_cleans_up_over_a_bad_network() {
    let s3 = plain();
    for seed in 0..5 {
        s3.set_faults(S3Faults { cut: 0.0, ..S3Faults::network(0.03) }, seed);
        let store = open(s3.options("repo")).await;
        // Patient with single requests; whoever asks may have to ask again.
        let mut verdict = store.probe().await;
        for _ in 0..20 {
            if verdict.is_ok() {
                break;
            }
            verdict = store.probe().await;
        }
        let verdict = verdict.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_eq!(verdict.conditional_create, ConditionalCreate::Atomic, "seed {seed}");
        assert_eq!(verdict.multipart_conditional, ConditionalCreate::Atomic, "seed {seed}");
        assert_eq!((verdict.checksum, verdict.checksum_verified), (PutChecksum::Crc32c, true), "seed {seed}");
        assert_eq!(verdict.object_lock, LockSupport::NotInThisBucket);
        let json = serde_json::to_string(&verdict).unwrap();
        assert_eq!(serde_json::from_str::<Verdict>(&json).unwrap(), verdict, "{json}");
    }
    // A fresh one, because faults may hit deletes and aborts too.
    let s3 = plain();
    probed(&s3).await;
    assert!(s3.objects().is_empty(), "{:?}", s3.objects().keys());
    assert!(s3.uploads().is_empty(), "{:?}", s3.uploads());
    // What stays all the same is on no listing.
    s3.plant("repo/.pgkeep-probe/00/create", "left behind");
    let store = known(&s3).await;
    assert!(list_all(&store, "").await.unwrap().is_empty());
    assert!(list_folders(&store, "").await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn checksums_are_those_that_the_server_takes() {
    let s3 = start(TestS3Options { takes_checksums: false, ..TestS3Options::default() });
    let verdict = probed(&s3).await;
    assert_eq!((verdict.checksum, verdict.checksum_verified), (PutChecksum::None, false));
    let store = known(&s3).await;
    store.put_new(&key("a"), body(1000)).await.unwrap();
    store.put_new(&key("b"), body(MULTIPART + 1)).await.unwrap();
    assert!(verdict.in_words(store.options()).iter().any(|finding| finding.text.contains("checksum")));

    let s3 = plain();
    for checksum in [Checksum::Crc32c, Checksum::Sha256, Checksum::None] {
        let store = open(S3Options { checksum, ..s3.options(&fresh()) }).await;
        let store = store.with_verdict(store.probe().await.unwrap());
        store.put_new(&key("a"), body(1000)).await.unwrap();
        store.put_new(&key("b"), body(MULTIPART + 1)).await.unwrap();
        assert_eq!(store.get(&key("b"), None).await.unwrap(), body(MULTIPART + 1).to_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_lost_after_the_commit_is_no_conflict() {
    let s3 = plain();
    let verdict = probed(&s3).await;
    for (name, len) in [("small", 1000), ("large", MULTIPART + 1)] {
        let store = open(s3.options("repo")).await.with_verdict(verdict.clone());
        let full = format!("repo/{name}");
        let name = key(name);
        s3.lose_answers_of(Some(if len > MULTIPART { "CompleteMultipartUpload" } else { "PutObject" }));
        let error = store.put_new(&name, body(len)).await.unwrap_err();
        s3.lose_answers_of(None);
        assert!(error.is_transient(), "{error}");
        assert_eq!(s3.objects()[&full], body(len).to_bytes(), "it was committed");
        assert_eq!(store.put_new(&name, body(len)).await.unwrap(), Created::AlreadyThere);
        // Other bytes are a conflict all the same.
        let other = store.put_new(&name, body(len - 1)).await;
        assert!(matches!(other, Err(StoreError::Conflict { .. })), "{other:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_off_is_read_again_and_then_reported_by_name() {
    let s3 = plain();
    let store = known(&s3).await;
    store.put_new(&key("wal/a"), body(3_000_000)).await.unwrap();
    s3.set_faults(S3Faults { cut: 0.7, ..S3Faults::none() }, 5);
    let retry = Retry::new(Arc::new(store.clone()), stubborn());
    assert_eq!(retry.get(&key("wal/a"), None).await.unwrap(), body(3_000_000).to_bytes());
    assert!(s3.faults() > 0);

    s3.set_faults(S3Faults { cut: 1.0, ..S3Faults::none() }, 5);
    let before = s3.count("GetObject");
    let policy = RetryPolicy { attempts: 3, ..stubborn() };
    let error = Retry::new(Arc::new(store), policy).get(&key("wal/a"), Some(5..100_000)).await.unwrap_err();
    assert_eq!(s3.count("GetObject") - before, 3);
    let words = error.to_string();
    assert!(words.contains("wal/a") && words.contains("broke off") && words.contains("s3://archive/repo"), "{words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn throttling_backs_off() {
    let s3 = plain();
    let store = Arc::new(known(&s3).await);
    s3.set_faults(S3Faults { throttle: 1.0, ..S3Faults::none() }, 1);
    let policy = RetryPolicy {
        attempts: 5,
        first_wait: Duration::from_millis(40),
        longest_wait: Duration::from_millis(160),
        ..RetryPolicy::default()
    };
    let (before, began) = (s3.count("PutObject"), Instant::now());
    let retry = Retry::new(store.clone(), policy);
    let error = retry.put_new(&key("a"), body(100)).await.unwrap_err();
    assert!(error.to_string().contains("503 SlowDown"), "{error}");
    // As many requests as attempts: nobody below tries again. At least half of 40, 80, 160 and 160 ms between them.
    assert_eq!(s3.count("PutObject") - before, 5);
    assert!(began.elapsed() >= Duration::from_millis(220), "{:?}", began.elapsed());
    let retry = Retry::new(store, RetryPolicy { attempts: 10_000, ..stubborn() });
    let put = tokio::spawn(async move { retry.put_new(&key("a"), body(100)).await });
    wait_until("the next attempt", || s3.count("PutObject") - before > 5).await;
    s3.set_faults(S3Faults::none(), 1);
    assert_eq!(put.await.unwrap().unwrap(), Created::New);
}

/// The message, of an operation that may not be tried again.
fn refused<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    let error = result.unwrap_err();
    assert!(matches!(error, StoreError::Denied { .. }), "{error:?}");
    error.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_say_what_to_do() {
    let s3 = plain();
    let with = |access_key: &str, secret_key: &str| S3Options {
        credentials: S3Credentials::Static {
            access_key: access_key.into(),
            secret_key: secret_key.into(),
            session_token: None,
        },
        ..s3.options("repo")
    };
    // The signature is computed for real: one letter of the secret matters.
    let almost = s3.secret_key().replace("nothing", "nothinG");
    let store = open(with(s3.access_key(), &almost)).await;
    for words in [
        refused(store.put_new(&key("a"), body(10)).await),
        refused(store.get(&key("a"), None).await),
        refused(store.list(&ListRequest::flat("")).await),
        refused(store.delete(&key("a")).await),
    ] {
        assert!(words.contains("secret_key_file"), "{words}");
        assert!(!words.contains(&almost), "{words}");
    }
    assert!(!format!("{store:?} {:?}", store.options()).contains(&almost));
    let words = refused(open(with("SOMEBODYELSE", s3.secret_key())).await.get(&key("a"), None).await);
    assert!(words.contains("access_key_file"), "{words}");

    let store = open(s3.options("repo")).await;
    s3.set_clock_wrong(true);
    let words = refused(store.get(&key("a"), None).await);
    assert!(words.contains("clock"), "{words}");
    s3.set_clock_wrong(false);

    s3.refuse(Some((301, "PermanentRedirect")));
    let words = refused(store.get(&key("a"), None).await);
    assert!(words.contains("region"), "{words}");
    s3.refuse(None);
    let words = refused(
        open(S3Options {
            storage_class: Some(StorageRule { class: "FROZEN".into(), applies: |_| true }),
            ..s3.options("repo")
        })
        .await
        .put_new(&key("a"), body(10))
        .await,
    );
    assert!(words.contains("storage_class"), "{words}");
    let lock = LockRule { mode: LockMode::Governance, days: 1, short_lived: |_| false };
    let store = open(S3Options { object_lock: Some(lock), ..s3.options("repo") }).await;
    let words = refused(store.put_new(&key("a"), body(10)).await);
    assert!(words.contains("object lock"), "{words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_a_bucket_that_is_not_there_is_no_missing_object() {
    let s3 = plain();
    let store = known(&s3).await;
    s3.delete_bucket("archive");
    let name = key("a");
    for error in [
        store.put_new(&name, body(10)).await.unwrap_err(),
        store.put_new(&name, body(MULTIPART + 1)).await.unwrap_err(),
        store.get(&name, None).await.unwrap_err(),
        store.get(&name, Some(0..0)).await.unwrap_err(),
        store.head(&name).await.unwrap_err(),
        store.sync(&name).await.unwrap_err(),
        store.list(&ListRequest::flat("")).await.unwrap_err(),
        store.delete(&name).await.unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::Vanished { .. }), "{error:?}");
        assert!(
            error.to_string().contains("s3://archive/repo") && error.to_string().contains("NoSuchBucket"),
            "{error}"
        );
    }
    // Nor is what a proxy says in the server's place.
    s3.create_bucket("archive");
    for code in ["", "NotFound"] {
        s3.refuse(Some((404, code)));
        for error in [store.get(&name, None).await.unwrap_err(), store.head(&name).await.unwrap_err()] {
            assert!(error.is_transient(), "{error:?}");
        }
    }
    s3.refuse(None);
    assert!(store.head(&name).await.unwrap_err().is_not_found());
}

#[tokio::test(flavor = "multi_thread")]
async fn p8_large_objects_go_in_a_bounded_number_of_parts() {
    let s3 = plain();
    let store = known(&s3).await;
    s3.set_faults(S3Faults { slow: 1.0, longest: Duration::from_millis(300), ..S3Faults::none() }, 3);
    let len = 7 * PART + 5;
    let before = (s3.count("UploadPart"), s3.count("PutObject"));
    assert_eq!(store.put_new(&key("large"), body(len)).await.unwrap(), Created::New);
    assert_eq!((s3.count("UploadPart") - before.0, s3.count("PutObject") - before.1), (8, 0));
    assert!(s3.most_at_once("UploadPart") <= PARTS_AT_ONCE as u64, "{}", s3.most_at_once("UploadPart"));
    assert!(s3.most_at_once("UploadPart") > 1);
    s3.set_faults(S3Faults::none(), 3);
    assert_eq!(store.get(&key("large"), None).await.unwrap(), body(len).to_bytes());
    assert_eq!(store.head(&key("large")).await.unwrap().len, len);
    assert!(s3.uploads().is_empty());
    // What is there already is not uploaded again.
    assert_eq!(store.put_new(&key("large"), body(len)).await.unwrap(), Created::AlreadyThere);
    assert_eq!(s3.count("UploadPart") - before.0, 8);
    // As much as fits in one goes in one.
    store.put_new(&key("small"), body(MULTIPART)).await.unwrap();
    assert_eq!((s3.count("UploadPart") - before.0, s3.count("PutObject") - before.1), (8, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn large_objects_go_as_one_where_only_that_is_exclusive() {
    let s3 = start(TestS3Options { multipart_conditional: Conditional::Ignored, ..TestS3Options::default() });
    let store = known(&s3).await;
    assert_eq!(store.verdict().unwrap().multipart_conditional, ConditionalCreate::Ignored);
    assert!(store.creates_exclusively());
    let before = s3.count("UploadPart");
    store.put_new(&key("large"), body(MULTIPART + 1)).await.unwrap();
    assert_eq!(s3.count("UploadPart"), before);
    let other = store.put_new(&key("large"), body(MULTIPART + 2)).await;
    assert!(matches!(other, Err(StoreError::Conflict { .. })), "{other:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_fails_or_is_dropped_is_aborted() {
    let s3 = plain();
    let store = known(&s3).await;
    s3.answer_requests_of("UploadPart", Some((500, "InternalError")));
    let error = store.put_new(&key("a"), body(MULTIPART + 1)).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    s3.answer_requests_of("UploadPart", None);
    wait_until("the failed upload to be aborted", || s3.uploads().is_empty()).await;
    assert!(s3.count("AbortMultipartUpload") > 0);

    s3.answer_requests_of("CompleteMultipartUpload", Some((500, "InternalError")));
    store.put_new(&key("a"), body(MULTIPART + 1)).await.unwrap_err();
    s3.answer_requests_of("CompleteMultipartUpload", None);
    wait_until("the upload that was not completed to be aborted", || s3.uploads().is_empty()).await;

    // S3 says 200 before it is done, and may say in the body that it could not.
    s3.answer_requests_of("CompleteMultipartUpload", Some((200, "InternalError")));
    let error = store.put_new(&key("a"), body(MULTIPART + 1)).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("InternalError"), "{error}");
    s3.answer_requests_of("CompleteMultipartUpload", None);
    wait_until("the upload that broke at its end to be aborted", || s3.uploads().is_empty()).await;

    s3.hold_requests_of(Some("UploadPart"));
    let parts = s3.count("UploadPart");
    let put = tokio::spawn({
        let store = store.clone();
        async move { store.put_new(&key("a"), body(MULTIPART + 1)).await }
    });
    wait_until("a part to be on its way", || s3.count("UploadPart") > parts).await;
    put.abort();
    assert!(put.await.unwrap_err().is_cancelled());
    s3.hold_requests_of(None);
    wait_until("the dropped upload to be aborted", || s3.uploads().is_empty()).await;
    assert!(list_all(&store, "").await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_uploads_are_found_and_cleaned() {
    let day = Duration::from_secs(24 * 3600);
    let s3 = plain();
    let store = known(&s3).await;
    let elsewhere = known(&s3).await.options().clone();
    let elsewhere = open(S3Options { prefix: "repository".into(), ..elsewhere }).await;
    // Aborts do not come through, as when the process dies.
    s3.answer_requests_of("UploadPart", Some((500, "InternalError")));
    s3.answer_requests_of("AbortMultipartUpload", Some((403, "AccessDenied")));
    let aborts = s3.count("AbortMultipartUpload");
    for name in ["a", "b", "c", "d", "e"] {
        store.put_new(&key(name), body(MULTIPART + 1)).await.unwrap_err();
    }
    elsewhere.put_new(&key("a"), body(MULTIPART + 1)).await.unwrap_err();
    wait_until("the aborts", || s3.count("AbortMultipartUpload") - aborts == 6).await;
    s3.answer_requests_of("UploadPart", None);
    s3.answer_requests_of("AbortMultipartUpload", None);
    assert_eq!(s3.uploads().len(), 6);

    assert_eq!(store.clean_stale_uploads(day).await.unwrap(), 0, "they are young");
    s3.age_uploads(2 * day);
    assert_eq!(store.clean_stale_uploads(day).await.unwrap(), 5);
    assert_eq!(s3.uploads(), ["repository/a"], "what lies beside the prefix is somebody else's");

    let s3 = start(TestS3Options { lists_uploads: false, ..TestS3Options::default() });
    assert_eq!(known(&s3).await.clean_stale_uploads(day).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_is_locked_and_what_is_not_is_not() {
    let s3 = start(TestS3Options { object_lock: true, ..TestS3Options::default() });
    let verdict = probed(&s3).await;
    assert_eq!(verdict.object_lock, LockSupport::Enabled);
    let lock = LockRule { mode: LockMode::Compliance, days: 7, short_lived: |key| key.starts_with("open/") };
    // No checksum is asked for, but a lock demands one.
    let options = S3Options { object_lock: Some(lock), checksum: Checksum::None, ..s3.options("repo") };
    let store = open(options).await.with_verdict(verdict.clone());
    let words = verdict.in_words(store.options());
    assert!(words.iter().any(|finding| finding.good && finding.text.contains("locked for 7 days")), "{words:?}");
    store.put_new(&key("wal/a"), body(100)).await.unwrap();
    store.put_new(&key("wal/large"), body(MULTIPART + 1)).await.unwrap();
    store.put_new(&key("open/a"), body(100)).await.unwrap();
    let day = Duration::from_secs(24 * 3600);
    for name in ["repo/wal/a", "repo/wal/large"] {
        let versions = s3.versions(name);
        let locked = versions[0].locked.as_ref().expect("a lock");
        assert_eq!(locked.mode, "COMPLIANCE");
        let left = locked.until.duration_since(SystemTime::now()).unwrap();
        assert!(left > 7 * day - Duration::from_secs(600) && left <= 7 * day, "{left:?}");
    }
    assert!(s3.versions("repo/open/a")[0].locked.is_none());

    // Deleting hides it; what is locked stays.
    store.delete(&key("wal/a")).await.unwrap();
    assert!(store.head(&key("wal/a")).await.unwrap_err().is_not_found());
    let versions = s3.versions("repo/wal/a");
    assert_eq!(versions[0].bytes.as_ref().unwrap(), &body(100).to_bytes());
    let sdk = sdk(&s3.endpoint(), s3.access_key(), s3.secret_key());
    let delete = sdk.delete_object().bucket("archive").key("repo/wal/a").version_id(&versions[0].id);
    let refused = delete.bypass_governance_retention(true).send().await.unwrap_err();
    assert!(format!("{refused:?}").contains("AccessDenied"), "{refused:?}");
    // It may be put again, and that is locked as well.
    store.put_new(&key("wal/a"), body(50)).await.unwrap();
    assert_eq!(s3.versions("repo/wal/a").len(), 3);
}

/// A client of our own, for what the store does not do.
fn sdk(endpoint: &str, access_key: &str, secret_key: &str) -> aws_sdk_s3::Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(aws_sdk_s3::config::BehaviorVersion::v2026_01_12())
        .region(aws_sdk_s3::config::Region::from_static("us-east-1"))
        .endpoint_url(endpoint)
        .force_path_style(true)
        .credentials_provider(aws_sdk_s3::config::Credentials::new(access_key, secret_key, None, None, "test"));
    aws_sdk_s3::Client::from_conf(config.build())
}

/// The server is what it says it is: with the SDK's own defaults, checksums in trailers of an aws-chunked body.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_takes_what_others_send() {
    let s3 = plain();
    let sdk = sdk(&s3.endpoint(), s3.access_key(), s3.secret_key());
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), body(200_000).to_bytes()).unwrap();
    let stream = aws_sdk_s3::primitives::ByteStream::from_path(path.path()).await.unwrap();
    sdk.put_object().bucket("archive").key("repo/a").body(stream).send().await.unwrap();
    assert_eq!(known(&s3).await.get(&key("a"), None).await.unwrap(), body(200_000).to_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_storage_class_is_for_packs_and_the_kms_key_for_all() {
    let s3 = plain();
    let class = StorageRule { class: "STANDARD_IA".into(), applies: |key| key.contains("/pack/") };
    let options = S3Options { storage_class: Some(class), kms_key: Some("our-key".into()), ..s3.options("repo") };
    let store = open(options).await.with_verdict(probed(&s3).await);
    for (name, len, class) in [
        ("main/pack/1", 100, Some("STANDARD_IA")),
        ("main/pack/2", MULTIPART + 1, Some("STANDARD_IA")),
        ("main/wal/1", 100, None),
        ("main/wal/2", MULTIPART + 1, None),
    ] {
        store.put_new(&key(name), body(len)).await.unwrap();
        let version = s3.versions(&format!("repo/{name}")).remove(0);
        assert_eq!(version.storage_class.as_deref(), class, "{name}");
        assert_eq!(version.kms_key.as_deref(), Some("our-key"), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_is_given_up_and_left_for_a_new_connection() {
    let s3 = plain();
    let verdict = probed(&s3).await;
    let deadlines = Deadlines { request: Duration::from_millis(500), ..Deadlines::default() };
    let store = open(S3Options { deadlines, ..s3.options("repo") }).await.with_verdict(verdict);
    store.put_new(&key("a"), body(10)).await.unwrap();
    s3.freeze(true);
    let began = Instant::now();
    for error in [
        store.get(&key("a"), None).await.unwrap_err(),
        store.put_new(&key("b"), body(10)).await.unwrap_err(),
        store.list(&ListRequest::flat("")).await.unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::TimedOut { .. }), "{error:?}");
    }
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    // A store whose own deadlines are longer is given up by the decorator's.
    let patient = open(s3.options("repo")).await;
    let policy = RetryPolicy { attempts: 2, attempt: Duration::from_millis(300), ..stubborn() };
    let error = Retry::new(Arc::new(patient), policy).head(&key("a")).await.unwrap_err();
    assert!(matches!(error, StoreError::TimedOut { .. }), "{error:?}");
    s3.freeze(false);
    let before = s3.connections();
    assert_eq!(store.get(&key("a"), None).await.unwrap(), body(10).to_bytes());
    assert!(s3.connections() > before, "the connections on which nothing came are not used again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_stalls_is_given_up_long_before_its_deadline() {
    let s3 = plain();
    let deadlines =
        Deadlines { request: Duration::from_secs(600), stalled: Duration::from_millis(500), ..Deadlines::default() };
    let store = open(S3Options { deadlines, ..s3.options("repo") }).await;
    store.put_new(&key("wal/a"), body(3_000_000)).await.unwrap();
    s3.stall_bodies(true);
    let error = store.get(&key("wal/a"), None).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("wal/a"), "{error}");
    s3.stall_bodies(false);
    assert_eq!(store.get(&key("wal/a"), None).await.unwrap(), body(3_000_000).to_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_down_is_a_fault_that_passes() {
    let s3 = plain();
    let store = known(&s3).await;
    store.put_new(&key("a"), body(10)).await.unwrap();
    s3.down(true);
    for error in [store.get(&key("a"), None).await.unwrap_err(), store.head(&key("b")).await.unwrap_err()] {
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
    }
    s3.down(false);
    assert_eq!(store.get(&key("a"), None).await.unwrap(), body(10).to_bytes());
    // And one that nobody listens for.
    let endpoint = s3.endpoint();
    let options = s3.options("repo");
    drop(s3);
    let error = open(options).await.get(&key("a"), None).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains(&endpoint), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_a_certificate_of_ones_own() {
    let s3 = start(TestS3Options { tls: true, ..TestS3Options::default() });
    let words = refused(open(s3.options("repo")).await.get(&key("a"), None).await);
    assert!(words.contains("ca_file"), "{words}");
    let trusting = S3Options { ca_pem: Some(s3.ca_pem().into()), ..s3.options("repo") };
    let store = open(trusting.clone()).await;
    store.put_new(&key("a"), body(MULTIPART + 1)).await.unwrap();
    assert_eq!(store.get(&key("a"), Some(10..20)).await.unwrap(), body(100).to_bytes().slice(10..20));
    for pem in ["", "no PEM at all", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        let bad = S3Options { ca_pem: Some(pem.into()), ..trusting.clone() };
        let words = refused(S3Store::open(bad).await);
        assert!(words.contains("ca_file"), "{words}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_go_over_many_pages_and_show_only_ours() {
    let s3 = plain();
    let mut want = Vec::new();
    for number in 0..2500 {
        let name = format!("wal/{:02}/{number:04}", number % 40);
        s3.plant(&format!("repo/{name}"), "x");
        want.push(name);
    }
    want.sort();
    // A console's folder, other people's names, what lies beside the prefix.
    for strange in
        ["repo/wal/", "repo/wal/00/", "repo/wal/00/a b", "repo/wal/.hidden/a", "repo/ä", "repository/a", "repo"]
    {
        s3.plant(strange, "x");
    }
    let store = open(s3.options("repo")).await;
    let names: Vec<String> = list_all(&store, "").await.unwrap().iter().map(|found| found.key.to_string()).collect();
    assert_eq!(names, want);
    assert_eq!(list_folders(&store, "").await.unwrap(), ["wal/"]);
    assert_eq!(list_folders(&store, "wal/").await.unwrap().len(), 40);
    // Pages of nothing but strangers are passed over.
    for number in 0..1500 {
        s3.plant(&format!("repo/a {number:04}"), "x");
    }
    assert_eq!(list_all(&store, "").await.unwrap().len(), want.len());
    let first = store.list(&ListRequest { limit: 3, ..ListRequest::flat("") }).await;
    assert_eq!(first.unwrap().objects.len(), 3);
    // Without a prefix the bucket is the repository.
    let all = open(s3.options("")).await;
    assert_eq!(list_folders(&all, "").await.unwrap(), ["repo/", "repository/"]);
}

/// What a listing shows may be old: that is the server's way, and whoever reads lists again.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_can_show_old_listings() {
    let s3 = plain();
    let store = open(s3.options("repo")).await;
    assert!(list_all(&store, "").await.unwrap().is_empty());
    store.put_new(&key("a"), body(10)).await.unwrap();
    s3.set_faults(S3Faults { stale: 1.0, ..S3Faults::none() }, 1);
    assert!(list_all(&store, "").await.unwrap().is_empty());
    s3.set_faults(S3Faults::none(), 1);
    assert_eq!(list_all(&store, "").await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_replaced_an_object_behind_our_back_is_noticed_where_the_server_allows_it() {
    let s3 = start(TestS3Options { conditional: Conditional::Ignored, ..TestS3Options::default() });
    let store = known(&s3).await;
    store.put_new(&key("a"), body(1000)).await.unwrap();
    s3.plant("repo/a", body(1001).to_bytes());
    let again = store.put_new(&key("a"), body(1000)).await;
    assert!(matches!(again, Err(StoreError::Conflict { .. })), "{again:?}");
    assert_eq!(s3.objects()["repo/a"], body(1001).to_bytes(), "and is as it was");
}

const CHAIN: &str = "PGKEEP_TEST_S3_CHAIN";

/// Run again by [`credentials_are_found_as_every_aws_tool_finds_them`], in an environment of its own.
#[tokio::test(flavor = "multi_thread")]
async fn chain() {
    let Ok(endpoint) = std::env::var(CHAIN) else { return };
    let endpoint = Some(endpoint).filter(|endpoint| !endpoint.is_empty());
    let result = match S3Store::open(S3Options { endpoint, ..S3Options::new("archive", "repo") }).await {
        Ok(store) => store.put_new(&key("a"), body(10)).await.map(drop),
        Err(error) => Err(error),
    };
    match result {
        Ok(()) => println!("CHAIN: done"),
        Err(error) => println!("CHAIN: {error}"),
    }
}

#[test]
fn credentials_are_found_as_every_aws_tool_finds_them() {
    let s3 = plain();
    let home = tempfile::tempdir().unwrap();
    let said = |endpoint: &str, variables: &[(&str, &str)]| {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "chain", "--nocapture"]).env_clear();
        child.env("HOME", home.path()).env("AWS_EC2_METADATA_DISABLED", "true").env(CHAIN, endpoint);
        let output = child.envs(variables.iter().copied()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().find_map(|line| line.split_once("CHAIN: ").map(|(_, said)| said.to_owned())).unwrap_or(text)
    };
    let endpoint = s3.endpoint();
    let said_without = said(&endpoint, &[]);
    assert!(said_without.contains("access_key_file") && said_without.contains("AWS_ACCESS_KEY_ID"), "{said_without}");
    let keys = [("AWS_ACCESS_KEY_ID", s3.access_key()), ("AWS_SECRET_ACCESS_KEY", s3.secret_key())];
    assert_eq!(said(&endpoint, &keys), "done");
    assert!(said("", &keys).contains("set region"), "{}", said("", &keys));
    std::fs::create_dir(home.path().join(".aws")).unwrap();
    let profile =
        format!("[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n", s3.access_key(), s3.secret_key());
    std::fs::write(home.path().join(".aws/credentials"), profile).unwrap();
    assert_eq!(said(&endpoint, &[]), "done");
}
