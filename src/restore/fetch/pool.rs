//! The repositories that are asked, as one: each opened when it is needed, and what kept one from answering.
//!
//! What always holds: what fails is written down, and [`Pool::all_answered`] refuses from then on; a repository that holds
//! nothing of the cluster has answered. Bytes of one segment from two repositories are put together only where the
//! one's are the beginning of the other's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::{FetchError, Local};
use crate::catalog::{CatalogError, Repository};
use crate::types::{Branch, ClusterId, ClusterName, SegmentNumber, SegmentSize, TimelineHistory};

/// While another repository is there to ask, this long is waited for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// Repositories that can be opened.
#[async_trait]
pub trait Places: Sync {
    /// Their names, in the order in which they are asked.
    fn names(&self) -> Vec<String>;

    /// Opens one.
    async fn open(&self, index: usize) -> Result<Repository, FetchError>;
}

/// A single repository, open already.
#[derive(Debug)]
pub struct OnePlace(pub Repository);

#[async_trait]
impl Places for OnePlace {
    fn names(&self) -> Vec<String> {
        vec![self.0.name().to_owned()]
    }

    async fn open(&self, _index: usize) -> Result<Repository, FetchError> {
        Ok(self.0.clone())
    }
}

/// A repository that was asked for the cluster.
#[derive(Debug, Clone)]
enum Known {
    Holds(Repository, ClusterId),
    HoldsNothing,
}

/// A segment as far as any repository holds it.
#[derive(Debug, Default)]
pub(super) struct Read {
    pub bytes: Vec<u8>,
    pub complete: bool,
    /// Something of the branch is there behind `bytes`.
    pub more_behind: bool,
}

/// Repositories that were opened by earlier requests of the same process, and hold the cluster. That one does not hold it,
/// or fails, is not remembered.
#[derive(Default)]
pub(super) struct Opened(Mutex<BTreeMap<usize, (Repository, ClusterId)>>);

/// See the module's head. For one request.
pub(super) struct Pool<'a> {
    places: &'a dyn Places,
    names: Vec<String>,
    cluster: Option<&'a ClusterName>,
    local: Option<Local>,
    known: Mutex<BTreeMap<usize, Known>>,
    failed: Mutex<BTreeMap<usize, FetchError>>,
    /// What the first repository without the cluster said.
    nothing: Mutex<Option<FetchError>>,
    opened: Option<&'a Opened>,
}

impl<'a> Pool<'a> {
    pub fn new(places: &'a dyn Places, cluster: Option<&'a ClusterName>, local: Option<Local>) -> Pool<'a> {
        let names = places.names();
        let (known, failed, nothing) = Default::default();
        Pool { places, names, cluster, local, known, failed, nothing, opened: None }
    }

    /// The same, and what is opened is kept for the next request.
    pub fn remembering(
        places: &'a dyn Places,
        cluster: Option<&'a ClusterName>,
        local: Option<Local>,
        opened: &'a Opened,
    ) -> Pool<'a> {
        let pool = Pool { opened: Some(opened), ..Pool::new(places, cluster, local) };
        let held = |(index, (repository, id)): (&usize, &(Repository, ClusterId))| {
            (*index, Known::Holds(repository.clone(), id.clone()))
        };
        *locked(&pool.known) = locked(&opened.0).iter().map(held).collect();
        pool
    }

    /// Has every repository answered so far? Else what was found may be less than what there is.
    ///
    /// # Errors
    /// [`FetchError::Away`]; where there is one repository alone, what it said.
    pub fn all_answered(&self, name: &str) -> Result<(), FetchError> {
        let mut failed = locked(&self.failed);
        if failed.is_empty() {
            return Ok(());
        }
        if self.names.len() == 1
            && let Some((_, error)) = failed.pop_first()
        {
            return Err(error);
        }
        let said = |(index, error): (&usize, &FetchError)| {
            let name = self.names.get(*index).map_or("", String::as_str);
            format!("repository {name} could not be asked ({error})")
        };
        let missing = failed.iter().map(said).collect::<Vec<_>>().join(", ");
        Err(FetchError::Away { name: name.to_owned(), missing })
    }

    fn fails(&self, index: usize, error: FetchError) {
        let name = self.names.get(index).map_or("", String::as_str);
        if self.names.len() > 1 {
            tracing::warn!(repository = name, %error, "this repository does not answer; asking the next one");
        }
        if let Some(opened) = self.opened {
            locked(&opened.0).remove(&index);
        }
        locked(&self.failed).insert(index, error);
    }

    /// An answer, within a time where another repository is there to ask. `None`: it failed, and that is written down.
    async fn answer<T>(&self, index: usize, answer: impl Future<Output = Result<T, FetchError>>) -> Option<T> {
        let answer = match self.names.len() {
            1 => answer.await,
            _ => tokio::time::timeout(ANSWER_WITHIN, answer).await.unwrap_or_else(|_| {
                Err(FetchError::Open {
                    repository: self.names.get(index).cloned().unwrap_or_default(),
                    why: format!("it gave no answer within {} s", ANSWER_WITHIN.as_secs()),
                    retryable: true,
                })
            }),
        };
        match answer {
            Ok(answer) => Some(answer),
            Err(error) => {
                self.fails(index, error);
                None
            }
        }
    }

    /// The repository, if it answers and holds the cluster.
    async fn get(&self, index: usize) -> Option<(Repository, ClusterId)> {
        if locked(&self.failed).contains_key(&index) {
            return None; // not twice within one request
        }
        let known = locked(&self.known).get(&index).cloned();
        let known = match known {
            Some(known) => known,
            None => {
                let found = self.answer(index, async {
                    let repository = self.places.open(index).await?;
                    match find_cluster(&repository, self.cluster, self.local).await {
                        Ok(id) => Ok(Known::Holds(repository, id)),
                        Err(error @ FetchError::NoCluster { several: false, .. }) => {
                            locked(&self.nothing).get_or_insert(error);
                            Ok(Known::HoldsNothing)
                        }
                        Err(error) => Err(error),
                    }
                });
                let found = found.await?;
                if let (Some(opened), Known::Holds(repository, id)) = (self.opened, &found) {
                    locked(&opened.0).insert(index, (repository.clone(), id.clone()));
                }
                locked(&self.known).insert(index, found.clone());
                found
            }
        };
        match known {
            Known::Holds(repository, id) => Some((repository, id)),
            Known::HoldsNothing => None,
        }
    }

    /// The cluster, by the first repository that holds it.
    ///
    /// # Errors
    /// [`FetchError::NoCluster`] where all answered and none does; [`FetchError::Away`].
    pub async fn find_cluster(&self) -> Result<ClusterId, FetchError> {
        for index in 0..self.names.len() {
            if let Some((_, id)) = self.get(index).await {
                return Ok(id);
            }
        }
        self.all_answered("what was asked for")?;
        let nothing = locked(&self.nothing).take();
        Err(nothing.unwrap_or_else(|| FetchError::Task("there is no repository to ask".to_owned())))
    }

    /// A segment, from the first repository that has all of it; else what reaches furthest of all.
    ///
    /// # Errors
    /// [`CatalogError::Disagreement`] where two repositories hold different bytes.
    pub async fn read(
        &self,
        branch: Branch,
        segment: SegmentNumber,
        size: SegmentSize,
        history: Option<&TimelineHistory>,
    ) -> Result<Read, FetchError> {
        let mut best = Read::default();
        let mut from = String::new();
        let (mut anything_after, mut listed_to) = (false, 0);
        for index in 0..self.names.len() {
            let Some((repository, cluster)) = self.get(index).await else { continue };
            let asked = async {
                let read = repository.read_segment(&cluster, branch, segment, size, history).await?;
                // After the segment was read: what has come since can only make "not there" a hole, which is asked again.
                let after = match read.complete {
                    true => false,
                    false => repository.anything_after(&cluster, branch, segment, size).await?,
                };
                Ok((read, after))
            };
            let Some((read, after)) = self.answer(index, asked).await else { continue };
            if read.complete {
                return Ok(Read { bytes: read.bytes, complete: true, more_behind: false });
            }
            anything_after |= after;
            if read.more_behind {
                listed_to = listed_to.max(read.listed_to);
            }
            let common = best.bytes.len().min(read.bytes.len());
            if best.bytes.get(..common) != read.bytes.get(..common) {
                let (repository, other) = (repository.name().to_owned(), format!("the same in repository {from}"));
                let name = read.sources.join(", ");
                return Err(CatalogError::Disagreement { repository, name, other }.into());
            }
            if read.bytes.len() > best.bytes.len() {
                repository.name().clone_into(&mut from);
                best.bytes = read.bytes;
            }
        }
        let behind = usize::try_from(listed_to).is_ok_and(|listed_to| listed_to > best.bytes.len());
        best.more_behind = anything_after || behind;
        Ok(best)
    }

    /// A branch's history file, of the first repository that has it.
    ///
    /// # Errors
    /// None of its own: who did not answer is written down.
    pub async fn history(&self, branch: Branch) -> Result<Option<Bytes>, FetchError> {
        for index in 0..self.names.len() {
            let Some((repository, cluster)) = self.get(index).await else { continue };
            let asked = async { Ok(repository.get_history(&cluster, branch).await?) };
            if let Some(Some(text)) = self.answer(index, asked).await {
                return Ok(Some(text));
            }
        }
        Ok(None)
    }

    /// The text of every history file that any has.
    ///
    /// # Errors
    /// None of its own: who did not answer is written down.
    pub async fn histories(&self) -> Result<BTreeMap<Branch, Bytes>, FetchError> {
        let mut all = BTreeMap::new();
        for index in 0..self.names.len() {
            let Some((repository, cluster)) = self.get(index).await else { continue };
            let asked = async { Ok(repository.histories(&cluster).await?) };
            for (branch, text) in self.answer(index, asked).await.into_iter().flatten() {
                all.entry(branch).or_insert(text);
            }
        }
        Ok(all)
    }

    /// The branches of which any has WAL.
    ///
    /// # Errors
    /// None of its own: who did not answer is written down.
    pub async fn branches(&self) -> Result<BTreeSet<Branch>, FetchError> {
        let mut all = BTreeSet::new();
        for index in 0..self.names.len() {
            let Some((repository, cluster)) = self.get(index).await else { continue };
            let asked = async { Ok(repository.branches(&cluster).await?) };
            all.extend(self.answer(index, asked).await.into_iter().flatten());
        }
        Ok(all)
    }

    /// The segment size, as a branch's notes say it.
    ///
    /// # Errors
    /// None of its own: who did not answer is written down.
    pub async fn segment_size(&self, branch: Branch) -> Result<Option<SegmentSize>, FetchError> {
        for index in 0..self.names.len() {
            let Some((repository, cluster)) = self.get(index).await else { continue };
            let asked = async { Ok(repository.resume(&cluster, branch).await?) };
            if let Some(Some(resume)) = self.answer(index, asked).await {
                return Ok(Some(resume.segment_size));
            }
        }
        Ok(None)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // whole values only: never half changed
}

async fn find_cluster(
    repository: &Repository,
    name: Option<&ClusterName>,
    local: Option<Local>,
) -> Result<ClusterId, FetchError> {
    let mut found = match name {
        Some(name) => repository.clusters_named(name).await?,
        None => repository.clusters().await?,
    };
    let all = found.clone();
    if let Some(local) = local {
        found.retain(|cluster| cluster.system == local.system);
    }
    match (found.pop(), found.is_empty()) {
        (Some(cluster), true) => Ok(cluster),
        (several, _) => {
            let list =
                |clusters: &[ClusterId]| clusters.iter().map(ClusterId::to_string).collect::<Vec<_>>().join(", ");
            let wanted = match (name, local) {
                (Some(name), Some(local)) => format!("cluster {name} with system identifier {}", local.system),
                (Some(name), None) => format!("cluster {name}"),
                (None, Some(local)) => format!("the cluster with system identifier {}", local.system),
                (None, None) => "any cluster".to_owned(),
            };
            let hint = match several {
                Some(_) => format!("several are there ({}): say which with --cluster", list(&all)),
                None if all.is_empty() => "is this the right repository, and the right --cluster?".to_owned(),
                None => format!("it holds {}: is this the right repository, and the right --cluster?", list(&all)),
            };
            let several = several.is_some();
            let wanted = if several { format!("a single cluster that would be {wanted}") } else { wanted };
            Err(FetchError::NoCluster { repository: repository.name().to_owned(), wanted, hint, several })
        }
    }
}
