//! A repository in a bucket: Amazon's S3, or a server that speaks it.
//!
//! An object is one PUT with `If-None-Match: *`, or, from [`MULTIPART`] on, a multipart upload that is completed under the
//! same condition. Every put carries a checksum in a header, computed by us, so that bodies go out as they are: no
//! aws-chunked trailers, which some servers refuse, and no SHA-256 over bulk data.
//!
//! What always holds: objects are there whole or not at all (S3 sees to it), and what `put_new` called ours has our bytes. Servers
//! differ in whether they *keep* what is there: some ignore the condition. What the one at hand does is found out by
//! [`probe`](S3Store::probe) and handed in as a [`Verdict`]; without one, and where it says so, a put looks first, writes, and
//! reads back all of it, and [`creates_exclusively`](Store::creates_exclusively) is no. A key that is taken is read and
//! compared: the same bytes are success, so that an answer lost after the server committed is no conflict with ourselves.
//! "There is no such object" is believed only in those words (`NoSuchKey`), never from a bare 404.
//! Crash: leaves multipart uploads that were begun, which no listing of objects shows and which cost money;
//! [`clean_stale_uploads`](S3Store::clean_stale_uploads) finds them. A probe leaves keys under `.pgkeep-probe/`, which is no key of ours.
//! Cancellation: a request that is on its way may still be done. A multipart upload is then aborted in the background.
//!
//! Nothing is tried again here: that is [`Retry`](super::retry::Retry)'s, and only its budget counts. Every request has a
//! deadline. When one passes, or is dropped after a while without an answer, the connections are dropped with it: with
//! HTTP/2 all requests share one, and a dead one would take them all with it until the kernel notices.
//! Memory: a body's chunks are shared and never copied together; of a multipart upload [`PARTS_AT_ONCE`] parts are on
//! their way at once. A read holds what was asked for, at most [`MAX_READ`](super::MAX_READ).

mod body;
mod errors;
mod multipart;
mod options;
mod probe;
mod read;

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::DateTime;
use aws_sdk_s3::types::{ObjectLockMode, ServerSideEncryption, StorageClass};
use aws_smithy_http_client::tls::TlsContext;
use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use self::body::Sum;
use self::errors::Failed;
pub use self::multipart::{MULTIPART, PART, PARTS_AT_ONCE};
pub use self::options::{Checksum, Deadlines, LockMode, LockRule, S3Credentials, S3Options, StorageRule};
pub use self::probe::{ConditionalCreate, Finding, LockSupport, PutChecksum, Verdict};
use super::{Body, Created, Key, ListRequest, Listing, MAX_BODY, ObjectMeta, Op, Store, StoreError, Tail};

/// A request that is dropped after so long without an answer takes its connections with it.
const PATIENCE: Duration = Duration::from_secs(5);

/// See the module's head. Clones are the same store.
#[derive(Clone)]
pub struct S3Store {
    shared: Arc<Shared>,
}

struct Shared {
    options: S3Options,
    /// `bucket/prefix` and the endpoint, for messages.
    name: String,
    config: aws_sdk_s3::Config,
    tls: TlsContext,
    /// Replaced when a connection was found dead.
    client: Mutex<Client>,
}

impl S3Store {
    /// A store in a bucket that is there. Asks nothing of the server: the first operation does.
    pub async fn open(options: S3Options) -> Result<S3Store, StoreError> {
        let slash = if options.prefix.is_empty() { "" } else { "/" };
        let mut name = format!("s3://{}{slash}{}", options.bucket, options.prefix);
        if let Some(endpoint) = &options.endpoint {
            name.push_str(&format!(" at {}", without_password(endpoint)));
        }
        let tls = options::tls(&options, &name)?;
        let config = options::config(&options, &name, &tls).await?;
        let client = Mutex::new(Client::from_conf(config.clone()));
        Ok(S3Store { shared: Arc::new(Shared { options, name, config, tls, client }) })
    }

    /// The same store, with what was found out about its server.
    pub fn with_verdict(&self, verdict: Verdict) -> S3Store {
        self.with_options(S3Options { verdict: Some(verdict), ..self.options().clone() })
    }

    /// The same bucket, reached in the same way, with other wishes.
    fn with_options(&self, options: S3Options) -> S3Store {
        let (name, config, tls) = (self.shared.name.clone(), self.shared.config.clone(), self.shared.tls.clone());
        let client = Mutex::new(self.client());
        S3Store { shared: Arc::new(Shared { options, name, config, tls, client }) }
    }

    /// How it was opened.
    pub fn options(&self) -> &S3Options {
        &self.shared.options
    }

    /// What is known about the server.
    pub fn verdict(&self) -> Option<&Verdict> {
        self.shared.options.verdict.as_ref()
    }

    fn client(&self) -> Client {
        self.shared.client.lock().unwrap_or_else(PoisonError::into_inner).clone() // one value, whole after any panic
    }

    /// The name in the bucket of what is called `key` here.
    fn full(&self, key: &str) -> String {
        match self.options().prefix.as_str() {
            "" => key.to_owned(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    /// Where `key` lies, for messages.
    fn at(&self, key: &str) -> String {
        format!("{key} in {}", self.shared.name)
    }

    fn failed(&self, op: Op, key: &str, failed: Failed) -> StoreError {
        failed.into_error(op, &self.at(key), &self.shared.name)
    }

    /// Sends `request`, which moves `bytes`, and waits as long as that may take.
    async fn ask<T, E>(
        &self,
        bytes: u64,
        request: impl Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    ) -> Result<T, Failed>
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        self.within(bytes, async { request.await.map_err(Failed::from_sdk) }).await
    }

    /// Waits for `work`, which moves `bytes`, as long as that may take.
    async fn within<T>(&self, bytes: u64, work: impl Future<Output = Result<T, Failed>>) -> Result<T, Failed> {
        let after = self.options().deadlines.of(bytes);
        let mut unanswered = Unanswered { shared: &self.shared, since: Instant::now(), answered: false };
        match tokio::time::timeout(after, work).await {
            Ok(answer) => {
                unanswered.answered = true;
                answer
            }
            Err(_) => Err(Failed::Late(after)),
        }
    }

    /// What a put of `key` carries besides its bytes.
    fn manner(&self, key: &str) -> Manner {
        let options = self.options();
        let lock = options.object_lock.as_ref().filter(|rule| !(rule.short_lived)(key));
        let checksum = match options.put_checksum() {
            // S3 refuses to lock what comes without.
            PutChecksum::None if lock.is_some() => PutChecksum::Crc32c,
            checksum => checksum,
        };
        Manner {
            checksum,
            storage_class: options
                .storage_class
                .as_ref()
                .filter(|rule| (rule.applies)(key))
                .map(|rule| StorageClass::from(rule.class.as_str())),
            encryption: options.kms_key.as_ref().map(|_| ServerSideEncryption::AwsKms),
            kms_key: options.kms_key.clone(),
            lock_mode: lock.map(|rule| match rule.mode {
                LockMode::Governance => ObjectLockMode::Governance,
                LockMode::Compliance => ObjectLockMode::Compliance,
            }),
            locked_until: lock.map(|rule| {
                let days = SignedDuration::from_hours(24 * i64::from(rule.days));
                DateTime::from_secs(Timestamp::now().saturating_add(days).unwrap_or(Timestamp::MAX).as_second())
            }),
        }
    }

    /// One PUT. `create`: only where nothing is.
    async fn put_object(&self, key: &str, body: &Body, create: bool) -> Result<Option<String>, Failed> {
        let manner = self.manner(key);
        let sum = Sum::of(manner.checksum, body.chunks()).await;
        let request = self
            .client()
            .put_object()
            .bucket(&self.options().bucket)
            .key(self.full(key))
            .set_if_none_match(create.then(|| "*".to_owned()))
            .set_checksum_algorithm(sum.algorithm())
            .set_checksum_crc32_c(sum.crc32c)
            .set_checksum_sha256(sum.sha256)
            .set_storage_class(manner.storage_class)
            .set_server_side_encryption(manner.encryption)
            .set_ssekms_key_id(manner.kms_key)
            .set_object_lock_mode(manner.lock_mode)
            .set_object_lock_retain_until_date(manner.locked_until)
            .body(body::stream(body.chunks().to_vec()))
            .customize()
            .disable_payload_signing();
        Ok(self.ask(body.len(), request.send()).await?.version_id)
    }

    /// Puts what was not there when somebody looked, and says whether the server refused because it is there now.
    async fn put(&self, key: &Key, body: &Body) -> Result<bool, Failed> {
        let verdict = self.options().verdict.as_ref();
        let honoured = |create: ConditionalCreate| create != ConditionalCreate::Unsupported;
        // Without a verdict too: the condition does no harm where it is ignored.
        let create = verdict.is_none_or(|verdict| honoured(verdict.conditional_create));
        let sent = if self.goes_in_parts(body) {
            let create = verdict.is_none_or(|verdict| honoured(verdict.multipart_conditional));
            self.put_in_parts(key.as_str(), body, create).await
        } else {
            self.put_object(key.as_str(), body, create).await.map(drop)
        };
        match sent {
            Ok(()) => Ok(true),
            Err(failed) if failed.is_taken() => Ok(false),
            Err(failed) => Err(failed),
        }
    }

    /// Whether `body` is uploaded in parts. Where a single put is exclusive and an upload is not, it is the single put.
    fn goes_in_parts(&self, body: &Body) -> bool {
        let weaker = self.verdict().is_some_and(|verdict| {
            verdict.conditional_create == ConditionalCreate::Atomic
                && verdict.multipart_conditional != ConditionalCreate::Atomic
        });
        body.len() > MULTIPART && !weaker
    }

    /// What an object that is there means for a put of `body`.
    async fn compared(&self, key: &Key, body: &Body) -> Result<Created, StoreError> {
        match self.same(key.as_str(), body).await {
            Ok(Some(true)) => Ok(Created::AlreadyThere),
            Ok(Some(false)) => Err(StoreError::Conflict { key: key.clone() }),
            // Deleted since: the next attempt creates it.
            Ok(None) => {
                let gone = Failed::broken("the object was there, and was deleted before it could be compared");
                Err(self.failed(Op::Put, key.as_str(), gone))
            }
            Err(failed) => Err(self.failed(Op::Put, key.as_str(), failed)),
        }
    }
}

/// What a put carries besides its bytes.
struct Manner {
    checksum: PutChecksum,
    storage_class: Option<StorageClass>,
    encryption: Option<ServerSideEncryption>,
    kms_key: Option<String>,
    lock_mode: Option<ObjectLockMode>,
    locked_until: Option<DateTime>,
}

/// Watches over a request: one that got no answer in time gives up its connections.
struct Unanswered<'a> {
    shared: &'a Shared,
    since: Instant,
    answered: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if self.answered || self.since.elapsed() < PATIENCE.min(self.shared.options.deadlines.request) {
            return;
        }
        let connections = self.shared.options.connections(&self.shared.tls);
        let config = self.shared.config.to_builder().http_client(connections).build();
        tracing::debug!(store = %self.shared.name, "no answer: the connections are made anew");
        *self.shared.client.lock().unwrap_or_else(PoisonError::into_inner) = Client::from_conf(config);
    }
}

/// `endpoint` as it may be shown.
fn without_password(endpoint: &str) -> String {
    match (endpoint.split_once("://"), endpoint.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{host}"),
        _ => endpoint.to_owned(),
    }
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S3Store({})", self.shared.name)
    }
}

#[async_trait]
impl Store for S3Store {
    fn describe(&self) -> String {
        self.shared.name.clone()
    }

    fn appends(&self) -> bool {
        false
    }

    /// Only where somebody looked and saw it. Without a verdict the answer is no: the condition may be ignored, and whoever
    /// relies on it loses data, whereas whoever does without needs a longer name.
    fn creates_exclusively(&self) -> bool {
        self.verdict().is_some_and(|verdict| verdict.conditional_create == ConditionalCreate::Atomic)
    }

    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError> {
        if body.len() > MAX_BODY {
            let at = self.at(key.as_str());
            return Err(StoreError::TooLarge { op: Op::Put, at, len: body.len(), limit: MAX_BODY });
        }
        let fault = |failed| self.failed(Op::Put, key.as_str(), failed);
        let exclusive = self.creates_exclusively();
        // An upload in parts is not begun for nothing, as after an answer that was lost.
        if !exclusive || self.goes_in_parts(&body) {
            match self.look(key.as_str()).await.map_err(fault)? {
                Some(there) if there.len != body.len() => return Err(StoreError::Conflict { key: key.clone() }),
                Some(_) => return self.compared(key, &body).await,
                None => {}
            }
        }
        if !self.put(key, &body).await.map_err(fault)? {
            return self.compared(key, &body).await;
        }
        if !exclusive {
            self.compared(key, &body).await?;
        }
        Ok(Created::New)
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        self.read(key, range).await
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        self.look_well(Op::Head, key).await
    }

    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        self.page(request).await
    }

    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        // What a server shows is durable there.
        self.look_well(Op::Sync, key).await.map(drop)
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let request = self.client().delete_object().bucket(&self.options().bucket).key(self.full(key.as_str()));
        match self.ask(0, request.send()).await {
            Ok(_) => Ok(()),
            Err(failed) if failed.is_no_key() => Ok(()),
            Err(failed) => Err(self.failed(Op::Delete, key.as_str(), failed)),
        }
    }

    async fn open_tail(&self, key: &Key, _capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        let reason = "an object store cannot append to an object; what arrives goes there as ranges".into();
        Err(StoreError::Unsupported { op: Op::OpenTail, at: self.at(key.as_str()), reason })
    }
}
