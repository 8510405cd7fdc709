//! The repositories that receive a cluster: opened when they are wanted, and again after they were away.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::indexer::Indexer;
use crate::catalog::{CatalogError, Repository};

/// Why a repository could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct OpenError {
    /// What to tell.
    pub message: String,
    /// It must not be used (another key, another format): a person has to decide. Otherwise it is tried again.
    pub is_refusal: bool,
}

impl From<CatalogError> for OpenError {
    fn from(error: CatalogError) -> OpenError {
        OpenError { message: error.to_string(), is_refusal: error.is_refusal() }
    }
}

/// Something that opens a repository, as often as it is asked to.
#[async_trait]
pub trait Opener: Send + Sync + Debug {
    /// The repository's name in the configuration.
    fn name(&self) -> &str;

    /// Opens it. Changes nothing there.
    async fn open(&self) -> Result<Repository, OpenError>;
}

#[async_trait]
impl Opener for Repository {
    fn name(&self) -> &str {
        Repository::name(self)
    }

    async fn open(&self) -> Result<Repository, OpenError> {
        Ok(self.clone())
    }
}

/// One of them.
#[derive(Debug, Clone)]
pub struct Member {
    opener: Arc<dyn Opener>,
    /// What was opened and has not failed since: keys need not be made anew for every connection to the server.
    opened: Arc<Mutex<Option<Repository>>>,
    /// Why nothing must be put there, since that was found and until it takes part again.
    refused: Arc<Mutex<Option<String>>>,
}

impl Member {
    /// Not opened yet.
    pub fn new(opener: Arc<dyn Opener>) -> Member {
        Member { opener, opened: Arc::default(), refused: Arc::default() }
    }

    /// The repository's name in the configuration.
    pub fn name(&self) -> &str {
        self.opener.name()
    }

    /// The repository, opened if it is not.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(&self) -> Result<Repository, OpenError> {
        let known = self.opened().clone();
        if let Some(repository) = known {
            return Ok(repository);
        }
        let repository = self.opener.open().await?;
        *self.opened() = Some(repository.clone());
        Ok(repository)
    }

    /// It has failed: the next one who wants it opens it anew.
    pub fn close(&self) {
        *self.opened() = None;
    }

    /// It holds another history: what it holds decides nothing until it has been found to be the server's.
    pub(super) fn refuse(&self, reason: Option<String>) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = reason; // as below
    }

    /// Why nothing must be put there.
    pub(super) fn refused(&self) -> Option<String> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone() // as below
    }

    fn opened(&self) -> std::sync::MutexGuard<'_, Option<Repository>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner) // one value, replaced as a whole
    }
}

/// The repositories that receive a cluster, and how many of them must hold WAL before it is acknowledged.
#[derive(Debug, Clone)]
pub struct Receivers {
    receivers: Vec<Member>,
    needed: usize,
    indexer: Indexer,
}

impl Receivers {
    /// `needed` is at least 1 and at most their number.
    pub fn new(openers: impl IntoIterator<Item = Arc<dyn Opener>>, needed: usize) -> Receivers {
        let receivers: Vec<Member> = openers.into_iter().map(Member::new).collect();
        let needed = needed.clamp(1, receivers.len().max(1));
        Receivers { receivers, needed, indexer: Indexer::default() }
    }

    /// WAL that goes there is not indexed while it streams by.
    #[must_use]
    pub fn without_index(self) -> Receivers {
        Receivers { indexer: Indexer::off(), ..self }
    }

    /// How many must hold WAL before it is acknowledged.
    pub fn needed(&self) -> usize {
        self.needed
    }

    /// What indexes the WAL that goes there: one for all connections.
    pub(super) fn indexer(&self) -> &Indexer {
        &self.indexer
    }

    /// Each of them, in the configuration's order.
    pub fn each(&self) -> &[Member] {
        &self.receivers
    }
}

impl From<Repository> for Receivers {
    fn from(repository: Repository) -> Receivers {
        Receivers::new([Arc::new(repository) as Arc<dyn Opener>], 1)
    }
}
