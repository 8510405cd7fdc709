//! What the server at hand can do, found out by trying.
//!
//! What always holds: nothing of the repository is read, written or deleted; all keys lie under `.pgkeep-probe/`, which no
//! listing shows, because no key of ours begins with a dot. Crash and cancellation: such keys stay, a few bytes each. On a
//! bucket with object lock and a default retention they stay until that has passed.

use std::fmt;
use std::time::Duration;

use aws_sdk_s3::types::{CompletedPart, ObjectLockEnabled};
use bytes::Bytes;
use futures_util::future::join_all;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::super::{Body, Op, StoreError};
use super::errors::Failed;
use super::multipart::Upload;
use super::options::{Checksum, S3Options};
use super::{S3Store, body};

/// Those who try to create one key at once.
const RACERS: usize = 8;
/// Races that are run: a server that checks and writes in two steps may win one by luck.
const RACES: usize = 4;
/// How often one request is tried.
const ATTEMPTS: u32 = 5;

/// What [`S3Store::probe`] found out. Kept as JSON, so that not every start has to find out again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// What a single put does where something is.
    pub conditional_create: ConditionalCreate,
    /// What a multipart upload does where something is.
    pub multipart_conditional: ConditionalCreate,
    /// What a put may carry for the server to check.
    pub checksum: PutChecksum,
    /// Whether the server checked it: it refused a put whose checksum was wrong.
    pub checksum_verified: bool,
    /// Whether objects can be locked in this bucket.
    pub object_lock: LockSupport,
    /// When this was found out.
    pub probed_at: Timestamp,
}

/// What "create this only where nothing is" comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConditionalCreate {
    /// Of all who try at once, one creates it.
    Atomic,
    /// It is refused where something is, but of several who try at once more than one succeeds.
    NotAtomic,
    /// What was there is replaced.
    Ignored,
    /// The server refuses such a request.
    Unsupported,
}

/// What a put carries for the server to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PutChecksum {
    /// CRC-32C.
    Crc32c,
    /// SHA-256.
    Sha256,
    /// Nothing.
    None,
}

/// Whether objects can be locked in a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockSupport {
    /// The bucket was made with object lock.
    Enabled,
    /// The server knows object lock; this bucket was made without.
    NotInThisBucket,
    /// The server does not know object lock.
    Unsupported,
    /// These credentials may not ask.
    Unknown,
}

/// One line about a store, for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Nothing follows from it. Where this is false, something is weaker than it could be.
    pub good: bool,
    /// What was found, and what follows.
    pub text: String,
}

impl Verdict {
    /// What was found and what follows, in plain words, for a repository with these options.
    pub fn in_words(&self, options: &S3Options) -> Vec<Finding> {
        let finding = |good: bool, text: &str| Finding { good, text: text.to_owned() };
        let create = match self.conditional_create {
            ConditionalCreate::Atomic => {
                finding(true, "conditional create works: of two who write the same object, one is refused")
            }
            ConditionalCreate::NotAtomic => finding(
                false,
                "conditional create is not atomic: two who write the same object at the same moment both succeed. Objects get \
                 names with the writer's token and every put is read back and compared, which costs a read per write",
            ),
            ConditionalCreate::Ignored => finding(
                false,
                "conditional create is ignored: the server replaces what is there. Objects get names with the writer's token \
                 and every put is read back and compared, which costs a read per write; whoever holds these credentials can \
                 overwrite by mistake, so use them for one archiver alone",
            ),
            ConditionalCreate::Unsupported => finding(
                false,
                "conditional create is refused by the server. pgkeep looks before it writes, gives objects names with the \
                 writer's token and reads back what it wrote, which costs a read per write",
            ),
        };
        let mut findings = vec![create];
        if self.conditional_create == ConditionalCreate::Atomic
            && self.multipart_conditional != ConditionalCreate::Atomic
        {
            findings.push(finding(
                true,
                "conditional create does not work for multipart uploads: large objects go as one put each",
            ));
        }
        findings.push(match (self.checksum, self.checksum_verified) {
            (PutChecksum::None, _) => finding(
                false,
                "the server takes no checksum with a put: damage on the way shows when the object is read, not at once",
            ),
            (checksum, true) => finding(true, &format!("the server checks what arrives, by {checksum}")),
            (checksum, false) => finding(
                false,
                &format!(
                    "the server takes {checksum} with a put and does not check it: damage on the way shows when the object is \
                     read, not at once"
                ),
            ),
        });
        findings.push(match (self.object_lock, &options.object_lock) {
            (LockSupport::Enabled, Some(rule)) => {
                finding(true, &format!("object lock is on: what is kept is locked for {} days", rule.days))
            }
            (LockSupport::Enabled, None) => {
                finding(true, "the bucket has object lock; set object_lock and object_lock_days to use it")
            }
            (LockSupport::NotInThisBucket, Some(_)) => finding(
                false,
                "object_lock is set, but the bucket was made without it: every put will be refused. Make a bucket with object \
                 lock, or leave object_lock away",
            ),
            (LockSupport::Unsupported, Some(_)) => finding(
                false,
                "object_lock is set, but the server does not know it: nothing is locked. Leave object_lock away",
            ),
            (LockSupport::Unknown, Some(_)) => finding(
                false,
                "object_lock is set; whether the bucket has it cannot be seen without s3:GetBucketObjectLockConfiguration",
            ),
            (LockSupport::NotInThisBucket, None) => finding(true, "the bucket has no object lock"),
            (LockSupport::Unsupported, None) => finding(true, "the server does not know object lock"),
            (LockSupport::Unknown, None) => {
                finding(true, "whether the bucket has object lock is not known: these credentials may not ask")
            }
        });
        findings
    }
}

impl fmt::Display for PutChecksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PutChecksum::Crc32c => "CRC-32C",
            PutChecksum::Sha256 => "SHA-256",
            PutChecksum::None => "no checksum",
        })
    }
}

impl S3Store {
    /// Finds out what the server and the bucket can do, with some eighty small requests. Needs to be allowed to write and
    /// delete.
    pub async fn probe(&self) -> Result<Verdict, StoreError> {
        let token = getrandom::u64().map_err(|error| StoreError::Unavailable {
            op: Op::Open,
            at: self.shared.name.clone(),
            source: error.to_string().into(),
        })?;
        let mut probe = Probe { store: self.clone(), root: format!(".pgkeep-probe/{token:016x}"), wrote: Vec::new() };
        let verdict = probe.run().await;
        probe.clean_up().await;
        verdict.map_err(|failed| self.failed(Op::Open, &probe.root, failed))
    }
}

/// A probe under way.
struct Probe {
    store: S3Store,
    root: String,
    /// Keys, and versions where the server names them.
    wrote: Vec<(String, Option<String>)>,
}

impl Probe {
    async fn run(&mut self) -> Result<Verdict, Failed> {
        let checksum = self.checksum().await?;
        let settled = S3Options {
            checksum: match checksum {
                PutChecksum::Crc32c => Checksum::Crc32c,
                PutChecksum::Sha256 => Checksum::Sha256,
                PutChecksum::None => Checksum::None,
            },
            object_lock: None,
            storage_class: None,
            ..self.store.options().clone()
        };
        self.store = self.store.with_options(settled);
        let checksum_verified = self.is_verified(checksum).await?;
        let conditional_create = self.conditional_create().await?;
        let multipart_conditional = match conditional_create {
            // It is not asked for then.
            ConditionalCreate::Ignored | ConditionalCreate::Unsupported => conditional_create,
            ConditionalCreate::Atomic | ConditionalCreate::NotAtomic => self.multipart_conditional().await?,
        };
        let object_lock = self.object_lock().await?;
        let probed_at = Timestamp::now();
        Ok(Verdict { conditional_create, multipart_conditional, checksum, checksum_verified, object_lock, probed_at })
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.root)
    }

    async fn put(&mut self, name: &str, text: &str, create: bool) -> Result<(), Failed> {
        let (store, key, body) = (self.store.clone(), self.key(name), Body::from(text.as_bytes().to_vec()));
        let version = patiently(async || store.put_object(&key, &body, create).await).await?;
        self.wrote.push((key, version));
        Ok(())
    }

    /// The first checksum that the server takes, of those that are asked for.
    async fn checksum(&mut self) -> Result<PutChecksum, Failed> {
        let asked = self.store.options().checksum;
        let candidates: &[(Checksum, PutChecksum)] = match asked {
            Checksum::Auto => &[
                (Checksum::Crc32c, PutChecksum::Crc32c),
                (Checksum::Sha256, PutChecksum::Sha256),
                (Checksum::None, PutChecksum::None),
            ],
            Checksum::Crc32c => &[(Checksum::Crc32c, PutChecksum::Crc32c)],
            Checksum::Sha256 => &[(Checksum::Sha256, PutChecksum::Sha256)],
            Checksum::None => &[(Checksum::None, PutChecksum::None)],
        };
        let mut refused = Failed::broken("no checksum to try");
        for (setting, checksum) in candidates {
            let plain = S3Options {
                checksum: *setting,
                object_lock: None,
                storage_class: None,
                ..self.store.options().clone()
            };
            self.store = self.store.with_options(plain);
            match self.put("checksum", "something to check", false).await {
                Ok(()) => return Ok(*checksum),
                // Whoever may not write at all is told so, not that checksums are the matter.
                Err(failed) if matches!(failed.status(), 400 | 501) && !failed.is_transient() => refused = failed,
                Err(failed) => return Err(failed),
            }
        }
        Err(refused)
    }

    /// Whether a put with a wrong checksum is refused.
    async fn is_verified(&mut self, checksum: PutChecksum) -> Result<bool, Failed> {
        if checksum == PutChecksum::None {
            return Ok(false);
        }
        let (store, key) = (self.store.clone(), self.key("damaged"));
        let sum = body::Sum::of(checksum, &[Bytes::from_static(b"what was meant")]).await;
        let sent = patiently(async || {
            let request = store
                .client()
                .put_object()
                .bucket(&store.options().bucket)
                .key(store.full(&key))
                .set_checksum_algorithm(sum.algorithm())
                .set_checksum_crc32_c(sum.crc32c.clone())
                .set_checksum_sha256(sum.sha256.clone())
                .body(body::stream(vec![Bytes::from_static(b"what came out.")]))
                .customize()
                .disable_payload_signing();
            match store.ask(0, request.send()).await {
                Ok(answer) => Ok(Some(answer.version_id)),
                Err(failed) if failed.status() == 400 => Ok(None),
                Err(failed) => Err(failed),
            }
        })
        .await?;
        match sent {
            None => Ok(true),
            Some(version) => {
                self.wrote.push((key, version));
                Ok(false)
            }
        }
    }

    async fn conditional_create(&mut self) -> Result<ConditionalCreate, Failed> {
        match self.put("create", "first", true).await {
            // An attempt whose answer was lost.
            Ok(()) => {}
            Err(failed) if failed.is_taken() => {}
            Err(failed) if is_refused_as_such(&failed) => return Ok(ConditionalCreate::Unsupported),
            Err(failed) => return Err(failed),
        }
        match self.put("create", "second", true).await {
            Ok(()) => return Ok(ConditionalCreate::Ignored),
            Err(failed) if failed.is_taken() => {}
            Err(failed) => return Err(failed),
        }
        for race in 0..RACES {
            let key = self.key(&format!("race-{race}"));
            let racers = (0..RACERS).map(|racer| {
                let (store, key, body) = (self.store.clone(), key.clone(), Body::from(vec![racer as u8; 1000]));
                async move { store.put_object(&key, &body, true).await }
            });
            if self.winners(&key, join_all(racers).await) > 1 {
                return Ok(ConditionalCreate::NotAtomic);
            }
        }
        Ok(ConditionalCreate::Atomic)
    }

    async fn multipart_conditional(&mut self) -> Result<ConditionalCreate, Failed> {
        let key = self.key("parts");
        let checksum = self.store.options().put_checksum();
        let store = self.store.clone();
        let prepare = async || {
            let upload = store.begin_upload(&key).await?;
            let part = store.put_part(&upload, checksum, 1, vec![Bytes::from_static(b"a part")]).await?;
            Ok((upload, vec![part]))
        };
        let mut ready = Vec::new();
        for _ in 0..RACERS {
            match patiently(&prepare).await {
                Ok(upload) => ready.push(upload),
                Err(failed) if is_refused_as_such(&failed) => return Ok(ConditionalCreate::Unsupported),
                Err(failed) => return Err(failed),
            }
        }
        let late = ready.pop();
        let racers = ready.into_iter().map(|(upload, parts)| complete(&store, upload, parts));
        let results = join_all(racers).await;
        if results.iter().all(|result| result.as_ref().is_err_and(is_refused_as_such)) {
            return Ok(ConditionalCreate::Unsupported);
        }
        let winners = self.winners(&key, results);
        let Some((upload, parts)) = late else { return Ok(ConditionalCreate::Unsupported) };
        // Something is there now, whoever won, unless faults hit them all.
        match complete(&store, upload, parts).await {
            Err(failed) if failed.is_taken() && winners > 1 => Ok(ConditionalCreate::NotAtomic),
            Err(failed) if failed.is_taken() => Ok(ConditionalCreate::Atomic),
            Ok(_) if winners > 0 => Ok(ConditionalCreate::Ignored),
            Ok(_) => Err(Failed::broken("no upload could be completed")),
            Err(failed) => Err(failed),
        }
    }

    /// How many of those who raced for `key` created it. Notes what they wrote.
    fn winners(&mut self, key: &str, results: Vec<Result<Option<String>, Failed>>) -> usize {
        let versions: Vec<_> = results.into_iter().filter_map(Result::ok).collect();
        let winners = versions.len();
        self.wrote.extend(versions.into_iter().map(|version| (key.to_owned(), version)));
        self.wrote.push((key.to_owned(), None)); // and one whose answer was lost
        winners
    }

    async fn object_lock(&mut self) -> Result<LockSupport, Failed> {
        let store = self.store.clone();
        let asked = patiently(async || {
            let request = store.client().get_object_lock_configuration().bucket(&store.options().bucket);
            store.ask(0, request.send()).await
        });
        match asked.await {
            Ok(answer) => {
                let enabled = answer.object_lock_configuration.and_then(|found| found.object_lock_enabled);
                let is_enabled = enabled == Some(ObjectLockEnabled::Enabled);
                Ok(if is_enabled { LockSupport::Enabled } else { LockSupport::NotInThisBucket })
            }
            Err(failed) if failed.code() == "ObjectLockConfigurationNotFoundError" => Ok(LockSupport::NotInThisBucket),
            Err(failed) if matches!(failed.status(), 401 | 403) => Ok(LockSupport::Unknown),
            Err(failed) if matches!(failed.status(), 400 | 404 | 405 | 501) => Ok(LockSupport::Unsupported),
            Err(failed) => Err(failed),
        }
    }

    /// Deletes what was written, with its versions. What cannot be deleted stays: a few bytes that no listing shows.
    async fn clean_up(&mut self) {
        for (key, version) in std::mem::take(&mut self.wrote) {
            let store = &self.store;
            let request = store.client().delete_object().bucket(&store.options().bucket).key(store.full(&key));
            if let Err(failed) = store.ask(0, request.set_version_id(version).send()).await {
                let error = store.failed(Op::Delete, &key, failed);
                tracing::debug!(%error, "what a probe wrote stays");
            }
        }
    }
}

/// The server does not take such a request; nothing is wrong with who asks or when.
fn is_refused_as_such(failed: &Failed) -> bool {
    failed.is_not_implemented() || (failed.status() == 400 && !failed.is_transient())
}

/// Completes `upload` where nothing is, or aborts it before we are gone.
async fn complete(store: &S3Store, mut upload: Upload, parts: Vec<CompletedPart>) -> Result<Option<String>, Failed> {
    let completed = store.complete_upload(&mut upload, parts, 0, true).await;
    if completed.is_err() {
        // What cannot be aborted now is tried again in the background.
        let _ = upload.abort().await;
    }
    completed.map(|()| None)
}

/// `request`, a few times, while its failures may pass by themselves.
async fn patiently<T>(request: impl AsyncFn() -> Result<T, Failed>) -> Result<T, Failed> {
    let mut attempt = 1;
    loop {
        match request().await {
            Err(failed) if failed.is_transient() && attempt < ATTEMPTS => {
                tokio::time::sleep(Duration::from_millis(100 << attempt)).await;
                attempt += 1;
            }
            done => return done,
        }
    }
}
