//! The repositories that a restore reads from: the one that was planned with, and those that take over when it fails.
//!
//! What always holds: every source has the same base backup, by label and by everything in its manifest that sealing anew
//! does not change; within a realm it has the very same objects. Whatever is read is verified by the source's own keys
//! and manifest, so it does not matter which one a byte comes from. An object that one source cannot give is asked of the
//! next; a source that does not answer at all is asked last from then on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::RestoreError;
use super::spent::{Spent, Stage};
use crate::catalog::copy::same_backup;
use crate::catalog::layout::PackName;
use crate::catalog::reader::ReadTimes;
use crate::catalog::records::{Manifest, PackRef, PartRef};
use crate::catalog::tags::Tagger;
use crate::catalog::{CatalogError, ObjectReader, Repository};
use crate::types::{BackupLabel, ClusterId};

/// While there is another source, one that takes longer for a request is taken to be down.
const TAKEN_OVER_AFTER: Duration = Duration::from_secs(60);

/// A repository that holds the base backup.
#[derive(Debug)]
pub struct Source {
    /// The repository.
    pub repository: Repository,
    /// The base backup as it is there: across realms packs have other lengths and headers.
    manifest: Manifest,
    packs: BTreeMap<PackName, PackRef>,
    down: AtomicBool,
}

/// Where a restore reads from.
#[derive(Debug)]
pub struct Sources {
    cluster: ClusterId,
    all: Vec<Source>,
    /// Why a source was left, by its name.
    left: Mutex<BTreeMap<String, String>>,
    spent: Spent,
}

impl Sources {
    /// One repository, with the manifest that the plan was made with.
    pub fn new(repository: Repository, cluster: ClusterId, manifest: Manifest) -> Sources {
        let all = vec![Source::new(repository, manifest)];
        Sources { cluster, all, left: Mutex::default(), spent: Spent::default() }
    }

    /// Adds a repository that takes over, if it has the same base backup; `false` if it does not.
    ///
    /// # Errors
    /// What the repository says.
    pub async fn add(&mut self, repository: Repository) -> Result<bool, CatalogError> {
        let Some(first) = self.all.first() else { return Ok(false) };
        if !repository.can_read() {
            return Ok(false);
        }
        match repository.get_manifest(&self.cluster, first.manifest.backup.label).await {
            Ok(manifest) if same_backup(&manifest, &first.manifest) => {
                self.all.push(Source::new(repository, manifest));
                Ok(true)
            }
            Ok(_) => Ok(false),
            Err(error) if error.is_not_found() || error.is_damage() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Which cluster.
    pub fn cluster(&self) -> &ClusterId {
        &self.cluster
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// Their names, in the order in which they are asked at first.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.all.iter().map(|source| source.repository.name())
    }

    /// How far the restore from here is, and where its time goes.
    pub fn spent(&self) -> &Spent {
        &self.spent
    }

    /// The tagger of the realm in which the plan's manifest lies: of its tags, where it names any. Copies in other realms have
    /// none.
    pub(super) fn tagger(&self) -> Option<Tagger> {
        self.all.first().map(|source| source.repository.tagger())
    }

    /// What happened, a sentence for each source that was left.
    pub fn notes(&self) -> Vec<String> {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner); // inserts of whole values only
        let note = |(name, why): (&String, &String)| format!("repository {name} failed, and another took over: {why}");
        left.iter().map(note).collect()
    }

    /// The sources, those that do not answer last.
    fn in_order(&self) -> impl Iterator<Item = &Source> {
        let is_down = |source: &&Source| source.down.load(Ordering::Relaxed);
        let up = self.all.iter().filter(move |source| !is_down(source));
        up.chain(self.all.iter().filter(is_down))
    }

    fn leaves(&self, source: &Source, error: &RestoreError) {
        let name = source.repository.name();
        tracing::warn!(repository = name, %error, "this repository failed; another takes over");
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.entry(name.to_owned()).or_insert_with(|| error.to_string());
    }

    /// Begins to ask: one source after the other, until one gives what is wanted.
    pub(super) fn asking(&self) -> Asking<'_> {
        Asking { sources: self, rest: self.in_order().collect(), first: None }
    }

    fn label(&self) -> Option<BackupLabel> {
        self.all.first().map(|source| source.manifest.backup.label)
    }

    /// Bytes of a pack's plaintext.
    pub(super) async fn read_pack(
        &self,
        pack: PackName,
        from: u64,
        to: u64,
        open: &OpenPacks,
    ) -> Result<Vec<u8>, RestoreError> {
        let mut asking = self.asking();
        loop {
            let source = asking.next()?;
            let read = async {
                let reader = open.reader(self, source, pack).await?;
                if to > reader.plaintext_len() {
                    let len = reader.plaintext_len();
                    return Err(
                        self.contradiction(format!("its table wants byte {to} of pack {pack}, which has {len}"))
                    );
                }
                read_twice(&reader, from, to).await
            };
            let read = asking.timed(source, read).await;
            if let Some((bytes, times)) = asking.judge(source, read)? {
                self.spent.add(Stage::Fetch, times.fetch);
                self.spent.add(Stage::Open, times.open);
                return Ok(bytes);
            }
        }
    }

    /// A piece of a table or of the server's manifest, from its first byte on.
    pub(super) fn part(&self, part: &PartRef) -> PartReader<'_> {
        PartReader { sources: self, part: part.clone(), at: 0, open: None, len: None }
    }

    pub(super) fn contradiction(&self, reason: String) -> RestoreError {
        let label = self.label().unwrap_or_else(|| BackupLabel::at(jiff::Timestamp::UNIX_EPOCH));
        RestoreError::Contradiction { label, reason }
    }
}

/// What does not open may have been spoilt on the way: what is spoilt at its place fails again.
async fn read_twice(reader: &ObjectReader, from: u64, to: u64) -> Result<(Vec<u8>, ReadTimes), RestoreError> {
    match reader.read_timed(from..to).await {
        Err(error) if error.is_damage() => Ok(reader.read_timed(from..to).await?),
        read => Ok(read?),
    }
}

/// A question that goes from source to source.
#[derive(Debug)]
pub(super) struct Asking<'a> {
    sources: &'a Sources,
    rest: VecDeque<&'a Source>,
    first: Option<RestoreError>,
}

impl<'a> Asking<'a> {
    /// The next source.
    ///
    /// # Errors
    /// What the first source said, when all were asked.
    pub fn next(&mut self) -> Result<&'a Source, RestoreError> {
        let first = &mut self.first;
        let none = || RestoreError::Task("there is no repository to read from".to_owned());
        self.rest.pop_front().ok_or_else(|| first.take().unwrap_or_else(none))
    }

    /// What it answers, within a time if there is another one to ask.
    pub async fn timed<T>(
        &self,
        source: &Source,
        answer: impl Future<Output = Result<T, RestoreError>>,
    ) -> Result<T, RestoreError> {
        if self.rest.is_empty() {
            return answer.await;
        }
        let (repository, seconds) = (source.repository.name().to_owned(), TAKEN_OVER_AFTER.as_secs());
        let silent = |_| Err(RestoreError::Silent { repository, seconds });
        tokio::time::timeout(TAKEN_OVER_AFTER, answer).await.unwrap_or_else(silent)
    }

    /// The answer; `None`: ask the next one.
    ///
    /// # Errors
    /// What no other repository would do better.
    pub fn judge<T>(&mut self, source: &Source, answer: Result<T, RestoreError>) -> Result<Option<T>, RestoreError> {
        let error = match answer {
            Ok(answer) => return Ok(Some(answer)),
            Err(error) if !error.is_of_a_repository() => return Err(error),
            Err(error) => error,
        };
        if error.is_retryable() {
            source.down.store(true, Ordering::Relaxed);
        }
        if !self.rest.is_empty() {
            self.sources.leaves(source, &error);
        }
        self.first.get_or_insert(error);
        Ok(None)
    }
}

impl Source {
    fn new(repository: Repository, manifest: Manifest) -> Source {
        let packs = manifest.packs.iter().map(|pack| (pack.pack, pack.clone())).collect();
        Source { repository, manifest, packs, down: AtomicBool::new(false) }
    }

    /// The piece as this source has it.
    fn part(&self, part: &PartRef) -> Option<&PartRef> {
        let all = self.manifest.tables.iter().chain(&self.manifest.tags).chain(&self.manifest.server_manifest);
        all.into_iter().find(|own| own.part == part.part)
    }
}

/// Readers of packs, the latest few, of whatever source they are.
#[derive(Debug, Default)]
pub(super) struct OpenPacks(tokio::sync::Mutex<VecDeque<(String, PackName, ObjectReader)>>);

/// Packs that stay opened.
const OPEN_PACKS: usize = 16;

impl OpenPacks {
    async fn reader(&self, sources: &Sources, source: &Source, pack: PackName) -> Result<ObjectReader, RestoreError> {
        // Held while a footer is fetched, so that it is fetched once.
        let mut open = self.0.lock().await;
        let name = source.repository.name();
        if let Some((.., reader)) = open.iter().find(|(of, known, _)| of == name && *known == pack) {
            return Ok(reader.clone());
        }
        let known = source.packs.get(&pack);
        let known = known.ok_or_else(|| {
            sources.contradiction(format!("its table names pack {pack}, which its manifest does not"))
        })?;
        let reader = source.repository.open_pack(&sources.cluster, known).await?;
        if open.len() >= OPEN_PACKS {
            open.pop_front();
        }
        open.push_back((name.to_owned(), pack, reader.clone()));
        Ok(reader)
    }
}

/// Reads a piece of a table some MiB at a time; what one source does not give from a byte on, the next one does.
#[derive(Debug)]
pub(super) struct PartReader<'a> {
    sources: &'a Sources,
    part: PartRef,
    at: u64,
    /// Of which source it was opened, and the reader.
    open: Option<(String, ObjectReader)>,
    len: Option<u64>,
}

/// Plaintext of a piece that is read with one request.
const CHUNK: u64 = 8 << 20;

impl PartReader<'_> {
    /// Its name, below a repository's root.
    pub fn name(&self) -> String {
        self.part.part.to_string()
    }

    /// The next bytes; `None` at the end.
    pub async fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, RestoreError> {
        let PartReader { sources, part, at, open, len } = &*self;
        let (sources, part, at, len) = (*sources, part, *at, *len);
        let mut asking = sources.asking();
        let (reader, bytes) = loop {
            let source = asking.next()?;
            let name = source.repository.name();
            let read = async {
                let reader = match open {
                    Some((of, reader)) if of == name => reader.clone(),
                    _ => {
                        let lacks = || format!("the manifest in repository {name} lacks {}", part.part);
                        let own = source.part(part).ok_or_else(|| sources.contradiction(lacks()))?;
                        source.repository.open_part(&sources.cluster, own).await?
                    }
                };
                // Copies hold the same plaintext: another length is another content.
                if len.is_some_and(|len| len != reader.plaintext_len()) {
                    let (repository, name) = (name.to_owned(), part.part.to_string());
                    let reason = "it is not as long as in the repository that was read before".to_owned();
                    return Err(CatalogError::Inconsistent { repository, name, reason }.into());
                }
                let to = reader.plaintext_len().min(at.saturating_add(CHUNK));
                let bytes = if at < to { Some(read_twice(&reader, at, to).await?.0) } else { None };
                Ok(((name.to_owned(), reader), bytes))
            };
            let read = asking.timed(source, read).await;
            if let Some(read) = asking.judge(source, read)? {
                break read;
            }
        };
        self.len = Some(reader.1.plaintext_len());
        self.open = Some(reader);
        if let Some(bytes) = &bytes {
            self.at += bytes.len() as u64;
        }
        Ok(bytes)
    }
}
