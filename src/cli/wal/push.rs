//! `pgkeep wal push`: PostgreSQL's archive_command.

use std::path::{Path, PathBuf};

use tokio::sync::Mutex;

use super::{Role, push_helper};
use crate::archive::push::{self, PushError, Pushed};
use crate::archive::push_all::push_all;
use crate::archive::push_index::{Backlog, Indexing};
use crate::catalog::{Repository, Usage};
use crate::cli::{CliError, Context, Exit, open};
use crate::config::RepositoryConfig;
use crate::types::ClusterName;

/// What its helper is called.
pub(super) const HELPER: &str = "push";

/// `pgkeep wal push`: PostgreSQL's archive_command.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Exit code 0: the file is durable, in as many of the cluster's repositories as `acknowledge` says. 1: it is not; PostgreSQL \
asks again. What the others miss `pgkeep run` fills up. A helper that outlives the call puts what else is ready; it ends \
by itself soon after the last call.

Example, in postgresql.conf:
  archive_command = 'exec pgkeep --config /etc/pgkeep/pgkeep.toml wal push %p'")]
pub struct Args {
    /// The file to archive: %p
    #[arg(value_name = "PATH", required_unless_present = "helper")]
    pub path: Option<PathBuf>,
    /// Ask no helper and start none: push this file alone
    #[arg(long)]
    pub no_helper: bool,
    /// Do the work in this very process: for pgkeep's own use
    #[arg(long, hide = true)]
    pub here: bool,
    /// Be the helper, or who waits for it: for pgkeep's own use
    #[arg(long, hide = true, value_name = "ROLE", conflicts_with = "path")]
    pub helper: Option<Role>,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    match (&args.path, args.helper) {
        (_, Some(_)) => push_helper::run(context).await,
        (Some(path), None) => Pusher::new(context)?.push(path).await.map(|()| Exit::Done),
        (None, None) => Err(CliError::usage(anyhow::anyhow!("no file was named"))),
    }
}

/// Where a cluster's files go. Repositories are opened when they are first needed, and stay open until one fails.
pub(super) struct Pusher {
    places: Vec<(RepositoryConfig, Mutex<Option<Repository>>)>,
    needed: usize,
    cluster: ClusterName,
    /// Is an index made of what is pushed?
    index: bool,
    /// Of a helper: what it indexes when nothing else is to be done.
    later: Option<Backlog>,
    usage: Usage,
}

impl Pusher {
    /// As the configuration and the options say.
    pub(super) fn new(context: &Context) -> Result<Pusher, CliError> {
        let config = context.config()?;
        let cluster = config.cluster(context.cluster_name())?;
        let (places, needed) = match context.repository_name() {
            Some(name) => (vec![config.repository(Some(name))?], 1),
            None => (config.repositories_of(cluster)?, cluster.acknowledge),
        };
        let places = places.into_iter().map(|place| (place.clone(), Mutex::default())).collect();
        let usage = Usage { short_lived: true, ..Usage::new().map_err(open::repository_error)? };
        let (name, index) = (cluster.name_in_repository.clone(), cluster.index);
        Ok(Pusher { places, needed, cluster: name, index, later: None, usage })
    }

    /// Leaves indexes to who works on the backlog.
    pub(super) fn indexing_later(self, backlog: Backlog) -> Pusher {
        Pusher { later: Some(backlog), ..self }
    }

    /// Returns when the file is durable in enough repositories, or when it is too late.
    pub(super) async fn push(&self, path: &Path) -> Result<(), CliError> {
        let within = push::deadline(path);
        let pushes = self.places.iter().map(|(place, opened)| self.push_into(place, opened, path));
        let done = push_all(pushes, self.needed, within).await;
        let mut failed = None;
        for ((place, _), answer) in self.places.iter().zip(done.answers) {
            let (file, repository) = (path.display(), &place.name);
            let error = match answer {
                Some(Ok(Pushed::Stored)) => {
                    tracing::info!(%file, repository, "archived");
                    continue;
                }
                Some(Ok(Pushed::AlreadyThere | Pushed::HeldAlready)) => {
                    tracing::info!(%file, repository, "was archived before");
                    continue;
                }
                Some(Err(error)) => error,
                None => CliError::failed(anyhow::anyhow!(
                    "{file} was not durable in repository {repository} within {} s; PostgreSQL offers it again",
                    within.as_secs()
                )),
            };
            if done.is_held {
                // A conflict is more than a repository that is away: somebody has to know of it.
                match error.exit() {
                    Exit::Refused => tracing::error!(%file, repository, "{error}"),
                    _ => tracing::warn!(%file, repository, "not archived there, and enough others hold it: {error}"),
                }
            }
            let is_worse = failed.as_ref().is_none_or(|known: &CliError| error.exit().code() > known.exit().code());
            failed = if is_worse { Some(error) } else { failed };
        }
        match failed {
            Some(error) if !done.is_held => Err(error),
            _ => Ok(()),
        }
    }

    async fn push_into(
        &self,
        place: &RepositoryConfig,
        opened: &Mutex<Option<Repository>>,
        path: &Path,
    ) -> Result<Pushed, CliError> {
        let repository = {
            // Held while it is opened: the others wait for the same.
            let mut opened = opened.lock().await;
            match &*opened {
                Some(repository) => repository.clone(),
                None => opened.insert(open::repository_for(place, self.usage.clone()).await?).clone(),
            }
        };
        let index = match &self.later {
            _ if !self.index => Indexing::No,
            None => Indexing::Now,
            Some(backlog) => Indexing::Later(backlog),
        };
        let pushed = push::push(&repository, &self.cluster, path, index).await.map_err(push_error);
        if pushed.is_err() {
            *opened.lock().await = None; // whatever it was, the next attempt begins from the beginning
        }
        pushed
    }
}

/// The code is 1 whatever this says; the words of `--json` differ.
fn push_error(error: PushError) -> CliError {
    match error {
        PushError::Repository(error) => open::repository_error(error),
        error if error.protects_data() => CliError::refused(error),
        error if error.is_retryable() => CliError::failed(error),
        error => CliError::usage(error),
    }
}
