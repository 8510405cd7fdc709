//! `pgkeep wal push`: PostgreSQL's archive_command.

use std::path::PathBuf;

use crate::archive::push::{self, PushError, Pushed};
use crate::archive::push_all::push_all;
use crate::catalog::Usage;
use crate::cli::{CliError, Context, Exit, open};
use crate::config::RepositoryConfig;
use crate::types::ClusterName;

/// `pgkeep wal push`: PostgreSQL's archive_command.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Exit code 0: the file is durable, in as many of the cluster's repositories as `acknowledge` says. 1: it is not; PostgreSQL \
asks again. What the others miss `pgkeep run` fills up.

Example, in postgresql.conf:
  archive_command = 'exec pgkeep --config /etc/pgkeep/pgkeep.toml wal push %p'")]
pub struct Args {
    /// The file to archive: %p
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.config()?;
    let cluster = config.cluster(context.cluster_name())?;
    let (places, needed) = match context.repository_name() {
        Some(name) => (vec![config.repository(Some(name))?], 1),
        None => (config.repositories_of(cluster)?, cluster.acknowledge),
    };
    let usage = Usage { short_lived: true, ..Usage::new().map_err(open::repository_error)? };
    let within = push::deadline(&args.path);
    let name = &cluster.name_in_repository;
    let pushes = places.iter().map(|place| archive(place, name, &args, usage.clone()));
    let done = push_all(pushes, needed, within).await;
    let mut failed = None;
    for (place, answer) in places.iter().zip(done.answers) {
        let (file, repository) = (args.path.display(), &place.name);
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
        _ => Ok(Exit::Done),
    }
}

async fn archive(
    place: &RepositoryConfig,
    cluster: &ClusterName,
    args: &Args,
    usage: Usage,
) -> Result<Pushed, CliError> {
    let repository = open::repository_for(place, usage).await?;
    push::push(&repository, cluster, &args.path).await.map_err(push_error)
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
