//! What the buckets hold, and the operations on them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use s3s::dto::*;
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use sha2::{Digest as _, Sha256};

use super::{Conditional, Shared, locked};

/// Set on a request whose listing shall be out of date.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stale(pub(super) bool);

/// One version of an object.
#[derive(Debug, Clone)]
pub struct Version {
    pub id: String,
    /// `None`: the object was deleted here.
    pub bytes: Option<Bytes>,
    pub modified: SystemTime,
    pub storage_class: Option<String>,
    pub kms_key: Option<String>,
    pub locked: Option<LockedUntil>,
    etag: String,
}

/// Until when a version cannot be deleted.
#[derive(Debug, Clone)]
pub struct LockedUntil {
    /// `GOVERNANCE` or `COMPLIANCE`.
    pub mode: String,
    pub until: SystemTime,
}

#[derive(Default)]
pub(super) struct Buckets(Mutex<BTreeMap<String, Bucket>>);

#[derive(Default)]
struct Bucket {
    objects: BTreeMap<String, Vec<Version>>,
    uploads: BTreeMap<(String, String), Upload>,
    counter: u64,
    /// What the last true listing had to show.
    shown: Option<Names>,
}

type Names = BTreeMap<String, (u64, SystemTime, String)>;

struct Upload {
    begun: SystemTime,
    parts: BTreeMap<i32, Part>,
    storage_class: Option<String>,
    kms_key: Option<String>,
    locked: Option<LockedUntil>,
}

struct Part {
    bytes: Bytes,
    etag: String,
    crc32c: Option<String>,
    sha256: Option<String>,
}

impl Bucket {
    fn now(&self, key: &str) -> Option<&Version> {
        self.objects.get(key)?.last().filter(|version| version.bytes.is_some())
    }

    fn names(&self) -> Names {
        let shown = |(key, versions): (&String, &Vec<Version>)| {
            let version = versions.last()?;
            let len = version.bytes.as_ref()?.len() as u64;
            Some((key.clone(), (len, version.modified, version.etag.clone())))
        };
        self.objects.iter().filter_map(shown).collect()
    }

    fn add(&mut self, key: &str, keeps_versions: bool, mut version: Version) -> Option<String> {
        self.counter += 1;
        let versions = self.objects.entry(key.to_owned()).or_default();
        if keeps_versions {
            version.id = format!("v{}", self.counter);
        } else {
            versions.clear();
        }
        let id = keeps_versions.then(|| version.id.clone());
        versions.push(version);
        id
    }
}

fn version(bytes: Option<Bytes>) -> Version {
    let etag = bytes.as_ref().map(|bytes| etag(bytes)).unwrap_or_default();
    Version {
        id: "null".into(),
        bytes,
        modified: SystemTime::now(),
        storage_class: None,
        kms_key: None,
        locked: None,
        etag,
    }
}

fn etag(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..32].to_owned()
}

impl Buckets {
    pub(super) fn create(&self, name: &str) {
        locked(&self.0).entry(name.to_owned()).or_default();
    }

    pub(super) fn delete(&self, name: &str) {
        locked(&self.0).remove(name);
    }

    fn with<T>(&self, name: &str, work: impl FnOnce(&mut Bucket) -> S3Result<T>) -> S3Result<T> {
        match locked(&self.0).get_mut(name) {
            Some(bucket) => work(bucket),
            None => Err(s3_error!(NoSuchBucket, "The specified bucket does not exist")),
        }
    }

    fn look<T: Default>(&self, name: &str, work: impl FnOnce(&mut Bucket) -> T) -> T {
        self.with(name, |bucket| Ok(work(bucket))).unwrap_or_default()
    }

    pub(super) fn objects(&self, name: &str) -> BTreeMap<String, Bytes> {
        let current = |(key, versions): (&String, &Vec<Version>)| Some((key.clone(), versions.last()?.bytes.clone()?));
        self.look(name, |bucket| bucket.objects.iter().filter_map(current).collect())
    }

    pub(super) fn versions(&self, name: &str, key: &str) -> Vec<Version> {
        self.look(name, |bucket| bucket.objects.get(key).cloned().unwrap_or_default())
    }

    pub(super) fn plant(&self, name: &str, key: &str, bytes: Bytes) {
        self.look(name, |bucket| {
            bucket.objects.insert(key.to_owned(), vec![version(Some(bytes))]);
        });
    }

    pub(super) fn remove(&self, name: &str, key: &str) {
        self.look(name, |bucket| {
            bucket.objects.remove(key);
        });
    }

    pub(super) fn uploads(&self, name: &str) -> Vec<String> {
        self.look(name, |bucket| bucket.uploads.keys().map(|(key, _)| key.clone()).collect())
    }

    pub(super) fn age_uploads(&self, name: &str, by: Duration) {
        self.look(name, |bucket| bucket.uploads.values_mut().for_each(|upload| upload.begun -= by));
    }
}

pub(super) struct Server(pub(super) Arc<Shared>);

/// What a put says about locking, where the bucket can do it.
fn lock(shared: &Shared, mode: Option<ObjectLockMode>, until: Option<Timestamp>) -> S3Result<Option<LockedUntil>> {
    let (mode, until) = match (mode, until) {
        (None, None) => return Ok(None),
        (Some(mode), Some(until)) => {
            let mut text = Vec::new();
            until.format(TimestampFormat::DateTime, &mut text).map_err(S3Error::internal_error)?;
            let until = String::from_utf8_lossy(&text).parse::<jiff::Timestamp>().map_err(S3Error::internal_error)?;
            (mode.as_str().to_owned(), until)
        }
        _ => return Err(s3_error!(InvalidRequest, "mode and date of a lock belong together")),
    };
    if !shared.options.object_lock {
        return Err(s3_error!(InvalidRequest, "Bucket is missing Object Lock Configuration"));
    }
    Ok(Some(LockedUntil { mode, until: until.into() }))
}

fn storage_class(class: Option<StorageClass>) -> S3Result<Option<String>> {
    let known = ["STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR"];
    match class {
        Some(class) if !known.contains(&class.as_str()) => Err(s3_error!(InvalidStorageClass)),
        class => Ok(class.map(|class| class.as_str().to_owned())),
    }
}

impl Server {
    fn keeps_versions(&self) -> bool {
        self.0.options.versions || self.0.options.object_lock
    }

    /// Reads a body and compares it with the checksums that came with it.
    async fn body(
        &self,
        body: Option<StreamingBlob>,
        len: Option<i64>,
        crc32c: Option<&str>,
        sha256: Option<&str>,
    ) -> S3Result<Bytes> {
        if !self.0.options.takes_checksums && (crc32c.is_some() || sha256.is_some()) {
            return Err(s3_error!(InvalidArgument, "x-amz-checksum is not supported"));
        }
        let mut bytes = BytesMut::new();
        if let Some(mut body) = body {
            while let Some(piece) = body.next().await {
                bytes.extend_from_slice(&piece.map_err(|_| s3_error!(IncompleteBody))?);
            }
        }
        if len.is_some_and(|len| len != bytes.len() as i64) {
            return Err(s3_error!(IncompleteBody));
        }
        let is = |sum: Option<&str>, bytes: &[u8]| sum.is_none_or(|sum| sum == BASE64.encode(bytes));
        if !is(crc32c, &crc32c::crc32c(&bytes).to_be_bytes())
            || (sha256.is_some() && !is(sha256, &Sha256::digest(&bytes)))
        {
            return Err(s3_error!(BadDigest, "the checksum does not match"));
        }
        Ok(bytes.freeze())
    }

    /// Puts `version` where nothing is, or anywhere, as the server does it.
    async fn create(
        &self,
        (bucket, key): (&str, &str),
        create: bool,
        conditional: Conditional,
        version: Version,
    ) -> S3Result<Option<String>> {
        let taken = || {
            S3Error::with_message(S3ErrorCode::PreconditionFailed, "At least one of the pre-conditions did not hold")
        };
        let buckets = &self.0.buckets;
        match conditional {
            Conditional::Unsupported if create => {
                return Err(s3_error!(NotImplemented, "If-None-Match is not implemented"));
            }
            Conditional::Racy if create => {
                buckets.with(bucket, |bucket| bucket.now(key).map_or(Ok(()), |_| Err(taken())))?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            _ => {}
        }
        let keeps = self.keeps_versions();
        buckets.with(bucket, |bucket| {
            if create && conditional == Conditional::Atomic && bucket.now(key).is_some() {
                return Err(taken());
            }
            Ok(bucket.add(key, keeps, version))
        })
    }
}

fn is_any(condition: Option<&IfNoneMatch>) -> bool {
    condition.is_some_and(|condition| condition.is_any())
}

#[async_trait::async_trait]
impl S3 for Server {
    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let names_its_checksum = request.headers.contains_key("x-amz-sdk-checksum-algorithm");
        let input = request.input;
        let (crc32c, sha256) = (input.checksum_crc32c.as_deref(), input.checksum_sha256.as_deref());
        let locked = lock(&self.0, input.object_lock_mode, input.object_lock_retain_until_date)?;
        if locked.is_some() && (!names_its_checksum || (crc32c.is_none() && sha256.is_none())) {
            return Err(s3_error!(
                InvalidRequest,
                "Content-MD5 OR x-amz-checksum- HTTP header is required with Object Lock"
            ));
        }
        let storage_class = storage_class(input.storage_class)?;
        let bytes = self.body(input.body, input.content_length, crc32c, sha256).await?;
        let version = Version { locked, storage_class, kms_key: input.ssekms_key_id, ..version(Some(bytes)) };
        let etag = ETag::Strong(version.etag.clone());
        let create = is_any(input.if_none_match.as_ref());
        let at = (input.bucket.as_str(), input.key.as_str());
        let version_id = self.create(at, create, self.0.options.conditional, version).await?;
        Ok(S3Response::new(PutObjectOutput { e_tag: Some(etag), version_id, ..Default::default() }))
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        let found = self.0.buckets.with(&input.bucket, |bucket| {
            bucket.now(&input.key).cloned().ok_or_else(|| s3_error!(NoSuchKey, "The specified key does not exist."))
        })?;
        let whole = found.bytes.unwrap_or_default();
        let total = whole.len() as u64;
        let (bytes, content_range) = match input.range {
            None => (whole, None),
            Some(range) => {
                let span = range.check(total).map_err(|_| s3_error!(InvalidRange))?;
                let text = format!("bytes {}-{}/{total}", span.start, span.end - 1);
                (whole.slice(span.start as usize..span.end as usize), Some(text))
            }
        };
        Ok(S3Response::new(GetObjectOutput {
            content_length: Some(bytes.len() as i64),
            content_range,
            e_tag: Some(ETag::Strong(found.etag)),
            last_modified: Some(found.modified.into()),
            body: Some(StreamingBlob::from(s3s::Body::from(bytes))),
            ..Default::default()
        }))
    }

    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = request.input;
        let found = self
            .0
            .buckets
            .with(&input.bucket, |bucket| bucket.now(&input.key).cloned().ok_or_else(|| s3_error!(NoSuchKey)))?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: Some(found.bytes.map_or(0, |bytes| bytes.len() as i64)),
            e_tag: Some(ETag::Strong(found.etag)),
            last_modified: Some(found.modified.into()),
            storage_class: found.storage_class.map(StorageClass::from),
            ..Default::default()
        }))
    }

    async fn delete_object(&self, request: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = request.input;
        let keeps = self.keeps_versions();
        self.0.buckets.with(&input.bucket, |bucket| {
            match input.version_id {
                Some(id) => {
                    let Some(versions) = bucket.objects.get_mut(input.key.as_str()) else { return Ok(()) };
                    let bypass = input.bypass_governance_retention.unwrap_or(false);
                    let holds = |locked: &LockedUntil| {
                        locked.until > SystemTime::now() && !(bypass && locked.mode == "GOVERNANCE")
                    };
                    if versions.iter().any(|version| version.id == id && version.locked.as_ref().is_some_and(holds)) {
                        return Err(s3_error!(AccessDenied, "Access Denied because object protected by object lock."));
                    }
                    versions.retain(|version| version.id != id);
                    if versions.is_empty() {
                        bucket.objects.remove(input.key.as_str());
                    }
                }
                None if keeps => {
                    bucket.add(&input.key, true, version(None));
                }
                None => {
                    bucket.objects.remove(input.key.as_str());
                }
            }
            Ok(())
        })?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let is_stale = request.extensions.get::<Stale>().is_some_and(|stale| stale.0);
        let input = request.input;
        let names = self.0.buckets.with(&input.bucket, |bucket| {
            let earlier = bucket.shown.clone().filter(|_| is_stale);
            Ok(earlier.unwrap_or_else(|| bucket.shown.insert(bucket.names()).clone()))
        })?;
        let prefix = input.prefix.unwrap_or_default();
        let delimiter = input.delimiter.filter(|delimiter| !delimiter.is_empty());
        let limit = input.max_keys.unwrap_or(1000).clamp(0, 1000) as usize;
        let (mut contents, mut folders) = (Vec::new(), Vec::<String>::new());
        let (mut last, mut is_truncated) = (String::new(), false);
        for (name, (len, modified, etag)) in names.range(prefix.clone()..) {
            let Some(rest) = name.strip_prefix(&prefix) else { break };
            // By S3's rule: a start is a key, so that the folder it lies in is shown again; a token is a shown name.
            if input.start_after.as_deref().is_some_and(|after| name.as_str() <= after) {
                continue;
            }
            let folder = delimiter.as_deref().and_then(|delimiter| {
                rest.find(delimiter).map(|at| format!("{prefix}{}", &rest[..at + delimiter.len()]))
            });
            let shown = folder.clone().unwrap_or_else(|| name.clone());
            if input.continuation_token.as_deref().is_some_and(|token| shown.as_str() <= token) || shown == last {
                continue;
            }
            if contents.len() + folders.len() == limit {
                is_truncated = true;
                break;
            }
            last.clone_from(&shown);
            match folder {
                Some(folder) => folders.push(folder),
                None => contents.push(Object {
                    key: Some(name.clone()),
                    size: Some(*len as i64),
                    last_modified: Some((*modified).into()),
                    e_tag: Some(ETag::Strong(etag.clone())),
                    ..Default::default()
                }),
            }
        }
        let folders = folders.into_iter().map(|folder| CommonPrefix { prefix: Some(folder) }).collect();
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            key_count: Some(contents.len() as i32),
            contents: Some(contents),
            common_prefixes: Some(folders),
            is_truncated: Some(is_truncated),
            next_continuation_token: is_truncated.then_some(last),
            ..Default::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = request.input;
        if !self.0.options.takes_checksums && input.checksum_algorithm.is_some() {
            return Err(s3_error!(InvalidArgument, "x-amz-checksum is not supported"));
        }
        let upload = Upload {
            begun: SystemTime::now(),
            parts: BTreeMap::new(),
            storage_class: storage_class(input.storage_class)?,
            kms_key: input.ssekms_key_id,
            locked: lock(&self.0, input.object_lock_mode, input.object_lock_retain_until_date)?,
        };
        let id = self.0.buckets.with(&input.bucket, |bucket| {
            bucket.counter += 1;
            let id = format!("upload-{}", bucket.counter);
            bucket.uploads.insert((input.key.clone(), id.clone()), upload);
            Ok(id)
        })?;
        let (bucket, key) = (Some(input.bucket), Some(input.key));
        Ok(S3Response::new(CreateMultipartUploadOutput { bucket, key, upload_id: Some(id), ..Default::default() }))
    }

    async fn upload_part(&self, request: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        let input = request.input;
        let (crc32c, sha256) = (input.checksum_crc32c, input.checksum_sha256);
        let bytes = self.body(input.body, input.content_length, crc32c.as_deref(), sha256.as_deref()).await?;
        let part = Part { etag: etag(&bytes), bytes, crc32c, sha256 };
        let etag = ETag::Strong(part.etag.clone());
        self.0.buckets.with(&input.bucket, |bucket| match bucket.uploads.get_mut(&(input.key, input.upload_id)) {
            Some(upload) => Ok(upload.parts.insert(input.part_number, part)),
            None => Err(s3_error!(NoSuchUpload)),
        })?;
        Ok(S3Response::new(UploadPartOutput { e_tag: Some(etag), ..Default::default() }))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = request.input;
        let id = (input.key.clone(), input.upload_id);
        let asked = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let version = self.0.buckets.with(&input.bucket, |bucket| {
            let upload = bucket.uploads.get(&id).ok_or_else(|| s3_error!(NoSuchUpload))?;
            let mut bytes = BytesMut::new();
            for (index, asked_for) in asked.iter().enumerate() {
                let part = asked_for.part_number.and_then(|number| upload.parts.get(&number));
                let part = part.ok_or_else(|| s3_error!(InvalidPart))?;
                let fits = asked_for.e_tag.as_ref().is_some_and(|etag| etag.value() == part.etag)
                    && asked_for.checksum_crc32c == part.crc32c
                    && asked_for.checksum_sha256 == part.sha256;
                if !fits {
                    return Err(s3_error!(InvalidPart));
                }
                if index + 1 < asked.len() && part.bytes.len() < 5 << 20 {
                    return Err(s3_error!(EntityTooSmall));
                }
                bytes.extend_from_slice(&part.bytes);
            }
            Ok(Version {
                etag: format!("{}-{}", etag(&bytes), asked.len()),
                storage_class: upload.storage_class.clone(),
                kms_key: upload.kms_key.clone(),
                locked: upload.locked.clone(),
                ..version(Some(bytes.freeze()))
            })
        })?;
        let etag = ETag::Strong(version.etag.clone());
        let create = is_any(input.if_none_match.as_ref());
        let at = (input.bucket.as_str(), input.key.as_str());
        let version_id = self.create(at, create, self.0.options.multipart_conditional, version).await?;
        self.0.buckets.with(&input.bucket, |bucket| Ok(bucket.uploads.remove(&id)))?;
        let (bucket, key) = (Some(input.bucket), Some(input.key));
        let output = CompleteMultipartUploadOutput { bucket, key, version_id, e_tag: Some(etag), ..Default::default() };
        Ok(S3Response::new(output))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = request.input;
        self.0.buckets.with(&input.bucket, |bucket| match bucket.uploads.remove(&(input.key, input.upload_id)) {
            Some(_) => Ok(S3Response::new(AbortMultipartUploadOutput::default())),
            None => Err(s3_error!(NoSuchUpload)),
        })
    }

    async fn list_multipart_uploads(
        &self,
        request: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        if !self.0.options.lists_uploads {
            return Err(s3_error!(NotImplemented));
        }
        let input = request.input;
        let prefix = input.prefix.unwrap_or_default();
        // Two on a page, so that whoever reads them has to turn it.
        let limit = input.max_uploads.unwrap_or(2).clamp(1, 2) as usize;
        let after = input.key_marker.map(|key| (key, input.upload_id_marker.unwrap_or_default()));
        let mut found: Vec<_> = self.0.buckets.with(&input.bucket, |bucket| {
            let all = bucket.uploads.iter().filter(|((key, _), _)| key.starts_with(&prefix));
            let rest = all.filter(|(id, _)| after.as_ref().is_none_or(|after| *id > after));
            Ok(rest.map(|(id, upload)| (id.clone(), upload.begun)).collect())
        })?;
        let is_truncated = found.len() > limit;
        found.truncate(limit);
        let next = found.last().map(|(id, _)| id.clone()).filter(|_| is_truncated);
        let uploads = found.into_iter().map(|((key, id), begun)| MultipartUpload {
            key: Some(key),
            upload_id: Some(id),
            initiated: Some(begun.into()),
            ..Default::default()
        });
        Ok(S3Response::new(ListMultipartUploadsOutput {
            bucket: Some(input.bucket),
            is_truncated: Some(is_truncated),
            next_key_marker: next.as_ref().map(|(key, _)| key.clone()),
            next_upload_id_marker: next.map(|(_, id)| id),
            uploads: Some(uploads.collect()),
            ..Default::default()
        }))
    }

    async fn get_object_lock_configuration(
        &self,
        request: S3Request<GetObjectLockConfigurationInput>,
    ) -> S3Result<S3Response<GetObjectLockConfigurationOutput>> {
        self.0.buckets.with(&request.input.bucket, |_| Ok(()))?;
        if !self.0.options.object_lock {
            return Err(s3_error!(ObjectLockConfigurationNotFoundError));
        }
        let enabled = Some(ObjectLockEnabled::from_static(ObjectLockEnabled::ENABLED));
        let object_lock_configuration = Some(ObjectLockConfiguration { object_lock_enabled: enabled, rule: None });
        Ok(S3Response::new(GetObjectLockConfigurationOutput { object_lock_configuration }))
    }
}
