//! Seals and puts what a backup is made of, while more of it arrives.
//!
//! What always holds: at most [`LIMITS`] are in memory, whatever the repository's pace (P8): whoever hands in more waits.
//! A failure of a put or of a seal is reported by the next call, or by [`Objects::finish`] at the latest; only what
//! [`Objects::finish`] returns is durable.
//! Cancellation: dropping [`Objects`] stops its tasks; what was being put is there whole or not at all, and unreferenced.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::BackupError;
use super::cut::Chunk;
use crate::catalog::Repository;
use crate::catalog::layout::{ClusterObject, PackName, PartKind, PartName};
use crate::catalog::records::{PackRef, PartRef};
use crate::types::{BackupLabel, ClusterId};

/// What is held in memory at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Plaintext in a pack, at most.
    pub pack_bytes: u64,
    /// Plaintext that is handed over at a time.
    pub chunk_bytes: usize,
    /// Chunks that wait to be sealed.
    pub chunks: usize,
    /// Packs that are being sealed and put, the one that still grows among them.
    pub packs: usize,
    /// Plaintext in a piece of the server's manifest, about. Where other pieces end, `pieces` says.
    pub part_bytes: usize,
    /// Pieces that are being sealed and put.
    pub parts: usize,
}

/// Together about 130 MB where nothing compresses. A chunk is a frame, which is sealed where it lies, without a copy; few
/// and small, they stay in the processor's cache.
pub(super) const LIMITS: Limits =
    Limits { pack_bytes: 32 << 20, chunk_bytes: 1 << 20, chunks: 6, packs: 3, part_bytes: 4 << 20, parts: 3 };

/// What was put, durable.
#[derive(Debug, Default)]
pub(super) struct Stored {
    pub packs: Vec<PackRef>,
    pub tables: Vec<PartRef>,
    pub tags: Vec<PartRef>,
    pub server_manifest: Vec<PartRef>,
    pub bytes: u64,
}

type Task<T> = AbortOnDropHandle<Result<T, BackupError>>;

/// A chunk, and its place in memory until it is dropped.
type Waiting = (Chunk, OwnedSemaphorePermit);

pub(super) struct Objects {
    repository: Repository,
    cluster: ClusterId,
    label: BackupLabel,
    room: Arc<Semaphore>,
    spare: Arc<Mutex<Vec<Vec<u8>>>>,
    growing: Option<mpsc::Sender<Waiting>>,
    packs: VecDeque<Task<PackRef>>,
    parts: VecDeque<Task<PartRef>>,
    /// Pieces handed in so far, by kind.
    numbers: [u32; 3],
    stored: Stored,
    /// Bytes of objects that were put, as soon as they were.
    put: Arc<AtomicU64>,
}

impl Objects {
    pub fn new(repository: &Repository, cluster: &ClusterId, label: BackupLabel) -> Objects {
        Objects {
            repository: repository.clone(),
            cluster: cluster.clone(),
            label,
            room: Arc::new(Semaphore::new(LIMITS.chunks)),
            spare: Arc::default(),
            growing: None,
            packs: VecDeque::new(),
            parts: VecDeque::new(),
            numbers: [0; 3],
            stored: Stored::default(),
            put: Arc::default(),
        }
    }

    /// Room that a chunk has left, to be used again.
    pub fn spare(&self) -> Option<Vec<u8>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop() // whole values only: never half changed
    }

    /// Bytes of sealed objects that are durable by now.
    pub fn stored_bytes(&self) -> u64 {
        self.put.load(Ordering::Relaxed)
    }

    /// The next chunk of a pack.
    pub async fn chunk(&mut self, chunk: Chunk) -> Result<(), BackupError> {
        if self.growing.is_none() {
            while self.packs.len() >= LIMITS.packs {
                self.wait_for_pack().await?;
            }
            self.begin_pack(chunk.pack).await?;
        }
        let ends_pack = chunk.ends_pack;
        let permit = self.room.clone().acquire_owned().await;
        let permit = permit.map_err(|_| BackupError::Task("nobody closes the semaphore".to_owned()))?;
        let taken = match &self.growing {
            Some(growing) => growing.send((chunk, permit)).await.is_ok(),
            None => false,
        };
        if !taken {
            // The task has ended by itself: it knows why.
            self.growing = None;
            while !self.packs.is_empty() {
                self.wait_for_pack().await?;
            }
            return Err(BackupError::Task("a pack was closed too early".to_owned()));
        }
        if ends_pack {
            self.growing = None;
        }
        Ok(())
    }

    async fn begin_pack(&mut self, number: u32) -> Result<(), BackupError> {
        let pack = PackName { label: self.label, number };
        let mut writer = self.repository.seal_object(&self.cluster, ClusterObject::Pack(pack)).await?;
        let (growing, mut chunks) = mpsc::channel::<Waiting>(LIMITS.chunks);
        let (repository, spare, put) = (self.repository.clone(), self.spare.clone(), self.put.clone());
        let seal = move || {
            while let Some((chunk, permit)) = chunks.blocking_recv() {
                if chunk.ends_pack { writer.push(&chunk.bytes) } else { writer.push_followed(&chunk.bytes) }?;
                drop(permit);
                spare.lock().unwrap_or_else(PoisonError::into_inner).push(chunk.bytes);
            }
            writer.finish(&[])
        };
        let task = tokio::spawn(async move {
            let sealed = tokio::task::spawn_blocking(seal).await.map_err(BackupError::task)??;
            repository.put_object(&sealed).await?;
            put.fetch_add(sealed.len(), Ordering::Relaxed);
            let (len, header, plaintext_len) = (sealed.len(), sealed.header().clone(), sealed.plaintext_len());
            Ok(PackRef { pack, len, header, plaintext_len, live: plaintext_len })
        });
        self.packs.push_back(AbortOnDropHandle::new(task));
        self.growing = Some(growing);
        Ok(())
    }

    async fn wait_for_pack(&mut self) -> Result<(), BackupError> {
        // Looked at where it stands: a caller that is dropped here loses nothing.
        let Some(task) = self.packs.front_mut() else { return Ok(()) };
        let done = task.await.map_err(BackupError::task);
        self.packs.pop_front();
        let pack = done??;
        self.stored.bytes += pack.len;
        self.stored.packs.push(pack);
        Ok(())
    }

    /// The next piece of a table, with so many files or blocks in it.
    pub async fn part(&mut self, kind: PartKind, plaintext: Vec<u8>, entries: u64) -> Result<(), BackupError> {
        while self.parts.len() >= LIMITS.parts {
            self.wait_for_part().await?;
        }
        let number = match kind {
            PartKind::Files => &mut self.numbers[0],
            PartKind::Tags => &mut self.numbers[1],
            PartKind::ServerManifest => &mut self.numbers[2],
        };
        *number += 1;
        let part = PartName { label: self.label, kind, number: *number };
        let mut writer = self.repository.seal_object(&self.cluster, ClusterObject::Part(part)).await?;
        let (repository, put) = (self.repository.clone(), self.put.clone());
        let seal = move || {
            writer.push(&plaintext)?;
            writer.finish(&[])
        };
        let task = tokio::spawn(async move {
            let sealed = tokio::task::spawn_blocking(seal).await.map_err(BackupError::task)??;
            repository.put_object(&sealed).await?;
            put.fetch_add(sealed.len(), Ordering::Relaxed);
            Ok(PartRef { part, len: sealed.len(), entries })
        });
        self.parts.push_back(AbortOnDropHandle::new(task));
        Ok(())
    }

    /// The next piece of a table is one that is there already, as another backup wrote it.
    pub async fn shared_part(&mut self, part: PartRef) -> Result<(), BackupError> {
        while self.parts.len() >= LIMITS.parts {
            self.wait_for_part().await?;
        }
        // In its turn, behind those that are being put.
        self.parts.push_back(AbortOnDropHandle::new(tokio::spawn(std::future::ready(Ok(part)))));
        Ok(())
    }

    async fn wait_for_part(&mut self) -> Result<(), BackupError> {
        let Some(task) = self.parts.front_mut() else { return Ok(()) };
        let done = task.await.map_err(BackupError::task);
        self.parts.pop_front();
        let part = done??;
        if part.part.label == self.label {
            self.stored.bytes += part.len;
        }
        match part.part.kind {
            PartKind::Files => self.stored.tables.push(part),
            PartKind::Tags => self.stored.tags.push(part),
            PartKind::ServerManifest => self.stored.server_manifest.push(part),
        }
        Ok(())
    }

    /// Waits until everything is durable.
    pub async fn finish(mut self) -> Result<Stored, BackupError> {
        self.growing = None;
        while !self.packs.is_empty() {
            self.wait_for_pack().await?;
        }
        while !self.parts.is_empty() {
            self.wait_for_part().await?;
        }
        Ok(self.stored)
    }
}
