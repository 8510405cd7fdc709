//! Large objects, in parts.
//!
//! What always holds: the object is there when the upload has been completed, under the same condition as a single put, and
//! not before. Crash: the upload stays and costs money until [`S3Store::clean_stale_uploads`] finds it. Cancellation and
//! failure: the upload is aborted in the background, within a deadline; should it be completed on the server just then,
//! the abort finds nothing.

use std::time::Duration;

use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use jiff::{SignedDuration, Timestamp};

use super::super::{Body, Op, StoreError};
use super::S3Store;
use super::body::{self, Sum};
use super::errors::Failed;
use super::probe::PutChecksum;

/// Bodies of more bytes go in parts.
pub const MULTIPART: u64 = 32 << 20;
/// The length of a part in bytes; the last is shorter. S3 wants at least 5 MiB.
pub const PART: u64 = 16 << 20;
/// Parts on their way at once.
pub const PARTS_AT_ONCE: usize = 4;

/// Most pages of unfinished uploads that are looked at.
const PAGES: usize = 100;

impl S3Store {
    /// Uploads `body` in parts. `create`: completed only where nothing is.
    pub(super) async fn put_in_parts(&self, key: &str, body: &Body, create: bool) -> Result<(), Failed> {
        let checksum = self.manner(key).checksum;
        let mut upload = self.begin_upload(key).await?;
        let starts = (0..body.len().div_ceil(PART)).map(|number| number * PART);
        let parts: Vec<CompletedPart> = stream::iter(starts.zip(1..))
            .map(|(start, number)| {
                let chunks = body::slice(body.chunks(), start, (start + PART).min(body.len()));
                self.put_part(&upload, checksum, number, chunks)
            })
            .buffered(PARTS_AT_ONCE)
            .try_collect()
            .await?;
        self.complete_upload(&mut upload, parts, body.len(), create).await
    }

    /// Begins an upload, which is aborted when it is dropped.
    pub(super) async fn begin_upload(&self, key: &str) -> Result<Upload, Failed> {
        let manner = self.manner(key);
        let request = self
            .client()
            .create_multipart_upload()
            .bucket(&self.options().bucket)
            .key(self.full(key))
            .set_checksum_algorithm(match manner.checksum {
                PutChecksum::Crc32c => Some(ChecksumAlgorithm::Crc32C),
                PutChecksum::Sha256 => Some(ChecksumAlgorithm::Sha256),
                PutChecksum::None => None,
            })
            .set_storage_class(manner.storage_class)
            .set_server_side_encryption(manner.encryption)
            .set_ssekms_key_id(manner.kms_key)
            .set_object_lock_mode(manner.lock_mode)
            .set_object_lock_retain_until_date(manner.locked_until);
        match self.ask(0, request.send()).await?.upload_id {
            Some(id) => Ok(Upload { store: self.clone(), key: key.to_owned(), id, over: false }),
            None => Err(Failed::broken("the server began an upload without a name")),
        }
    }

    pub(super) async fn put_part(
        &self,
        upload: &Upload,
        checksum: PutChecksum,
        number: i32,
        chunks: Vec<bytes::Bytes>,
    ) -> Result<CompletedPart, Failed> {
        let len = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        let sum = Sum::of(checksum, &chunks).await;
        let request = self
            .client()
            .upload_part()
            .bucket(&self.options().bucket)
            .key(self.full(&upload.key))
            .upload_id(&upload.id)
            .part_number(number)
            .set_checksum_algorithm(sum.algorithm())
            .set_checksum_crc32_c(sum.crc32c.clone())
            .set_checksum_sha256(sum.sha256.clone())
            .body(body::stream(chunks))
            .customize()
            .disable_payload_signing();
        let answer = self.ask(len, request.send()).await?;
        Ok(CompletedPart::builder()
            .part_number(number)
            .set_e_tag(answer.e_tag)
            .set_checksum_crc32_c(sum.crc32c)
            .set_checksum_sha256(sum.sha256)
            .build())
    }

    pub(super) async fn complete_upload(
        &self,
        upload: &mut Upload,
        parts: Vec<CompletedPart>,
        len: u64,
        create: bool,
    ) -> Result<(), Failed> {
        let request = self
            .client()
            .complete_multipart_upload()
            .bucket(&self.options().bucket)
            .key(self.full(&upload.key))
            .upload_id(&upload.id)
            .set_if_none_match(create.then(|| "*".to_owned()))
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(parts)).build());
        // The server puts the parts together only now, and some take their time.
        let answer = self.ask(len, request.send()).await?;
        if answer.e_tag.is_none() {
            return Err(Failed::broken("the server completed an upload without saying what came of it"));
        }
        upload.over = true;
        Ok(())
    }

    /// Aborts uploads in this repository that were begun longer ago than `older_than`, by the server's times and our clock:
    /// make it hours more than clocks differ. Returns how many. A server that cannot list uploads has none to clean.
    pub async fn clean_stale_uploads(&self, older_than: Duration) -> Result<u64, StoreError> {
        let failed = |failed| self.failed(Op::Open, "unfinished uploads", failed);
        let age = SignedDuration::try_from(older_than).unwrap_or(SignedDuration::MAX);
        let before = Timestamp::now().saturating_sub(age).unwrap_or(Timestamp::MIN);
        let (mut key_marker, mut id_marker) = (None, None);
        let mut aborted = 0;
        for _ in 0..PAGES {
            let request = self
                .client()
                .list_multipart_uploads()
                .bucket(&self.options().bucket)
                .prefix(self.full(""))
                .set_key_marker(key_marker.clone())
                .set_upload_id_marker(id_marker.clone());
            let page = match self.ask(0, request.send()).await {
                Ok(page) => page,
                Err(refused) if refused.is_not_implemented() => return Ok(aborted),
                Err(other) => return Err(failed(other)),
            };
            for upload in page.uploads.unwrap_or_default() {
                let (Some(key), Some(id), Some(begun)) = (upload.key, upload.upload_id, upload.initiated) else {
                    continue;
                };
                if !key.starts_with(&self.full("")) || begun.secs() >= before.as_second() {
                    continue;
                }
                self.abort_upload(&key, &id).await.map_err(failed)?;
                tracing::info!(store = %self.shared.name, key, "an upload that was never finished is given up");
                aborted += 1;
            }
            if !page.is_truncated.unwrap_or(false) || page.next_key_marker.is_none() {
                break;
            }
            let next = (page.next_key_marker, page.next_upload_id_marker);
            if next == (key_marker.clone(), id_marker.clone()) {
                break; // a server that does not move on
            }
            (key_marker, id_marker) = next;
        }
        Ok(aborted)
    }

    /// Aborts one upload of `full`, a name in the bucket; one that is over is success.
    async fn abort_upload(&self, full: &str, id: &str) -> Result<(), Failed> {
        let request = self.client().abort_multipart_upload().bucket(&self.options().bucket).key(full).upload_id(id);
        match self.ask(0, request.send()).await {
            Ok(_) => Ok(()),
            Err(refused) if refused.code() == "NoSuchUpload" => Ok(()),
            Err(failed) => Err(failed),
        }
    }
}

/// An upload that was begun. Aborted when it is dropped before it is over.
#[derive(Debug)]
pub(super) struct Upload {
    store: S3Store,
    key: String,
    id: String,
    over: bool,
}

impl Upload {
    /// Aborts it, and waits for that; for those who may be gone before the background gets to it.
    pub(super) async fn abort(mut self) -> Result<(), Failed> {
        self.store.abort_upload(&self.store.full(&self.key), &self.id).await?;
        self.over = true;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        // Without a runtime, as at the end of the process, it is left to the next start.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (store, key, id) = (self.store.clone(), self.store.full(&self.key), self.id.clone());
        runtime.spawn(async move {
            if let Err(failed) = store.abort_upload(&key, &id).await {
                let error = store.failed(Op::Put, &key, failed);
                tracing::debug!(%error, "an upload that failed could not be aborted; a later start will");
            }
        });
    }
}
