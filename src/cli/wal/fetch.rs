//! `pgkeep wal fetch`: PostgreSQL's restore_command.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;

use crate::catalog::Repository;
use crate::cli::{CliError, Context, Exit, open};
use crate::config::{Config, RepositoryConfig};
use crate::restore::fetch::{self, FetchError, Fetched, Places, Way};
use crate::types::{ClusterName, Lsn, WalFileName};

pub use crate::restore::fetch::decide::Step;

/// The end of it all, retries included. A fault that lasts longer stops recovery.
pub(super) const DEADLINE: Duration = Duration::from_secs(300);

/// `pgkeep wal fetch`: PostgreSQL's restore_command.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
`pgkeep restore` writes this command, with its options, into the restored cluster. By hand it serves a standby, too. \
Exit code 0: the file is there. 1: no repository of the cluster has it, and every one of them said so. 200: anything else; \
recovery stops instead of taking a fault for the end of the WAL.

Example, in postgresql.conf:
  restore_command = 'exec pgkeep --config /etc/pgkeep/pgkeep.toml wal fetch %f %p'")]
pub struct Args {
    /// The file the server asks for: %f
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Where it goes: %p
    #[arg(value_name = "DEST")]
    pub dest: PathBuf,
    /// The branches recovery follows, oldest first, each but the last with the position where it is left:
    /// `00000001@0/5000148,00000002` [default: the first branch of each timeline]
    #[arg(long, value_name = "BRANCH@LSN,…", value_delimiter = ',')]
    pub path: Vec<Step>,
    /// Ask these of the cluster's repositories alone: `restore` names those whose history it has compared
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub from: Vec<String>,
    /// Serve no WAL from this position on
    #[arg(long, value_name = "LSN")]
    pub until: Option<Lsn>,
    /// For a standby that follows the newest timeline: a fault does not stop the server, which asks again
    #[arg(long, conflicts_with = "path")]
    pub standby: bool,
    /// Do the work in this process, and start none that opens ahead what will be asked for next
    #[arg(long)]
    pub no_helper: bool,
    /// Be the helper that begins behind NAME, or who waits for it: for pgkeep's own use
    #[arg(long, hide = true, value_name = "ROLE")]
    pub helper: Option<super::Role>,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    if args.helper.is_some() {
        // It writes nothing that a server asked for: that call was answered long ago.
        return Err(CliError::usage(anyhow::anyhow!("a helper is started by `wal fetch`, not by hand")));
    }
    if args.standby {
        let is_request = args.name.parse::<WalFileName>().is_ok();
        return match serve(context, &args).await {
            // A configuration that is being written, say: a standby asks again.
            Err(error) if is_request => {
                tracing::warn!("{error}; the standby goes on without {} for now, and asks again", args.name);
                Ok(Exit::No)
            }
            answer => answer,
        };
    }
    match tokio::time::timeout(DEADLINE, serve(context, &args)).await {
        Ok(result) => result,
        Err(_) => Err(CliError::failed(anyhow::anyhow!(
            "{} could not be had within {} s; recovery stops",
            args.name,
            DEADLINE.as_secs()
        ))),
    }
}

/// Which WAL is wanted.
pub(super) fn way(args: &Args) -> Way {
    let folder = args.dest.parent().unwrap_or(Path::new("")).to_owned();
    Way { path: args.path.clone(), until: args.until, standby: args.standby.then_some(folder) }
}

/// The repositories that are asked, local ones first, and the cluster's name in them.
pub(super) fn asked<'a>(
    config: &'a Config,
    context: &Context,
    args: &Args,
) -> Result<(Vec<&'a RepositoryConfig>, Option<ClusterName>), CliError> {
    let from = config.read_from_any(context.cluster_name(), context.repository_name())?;
    let mut configs = from.repositories;
    if let Some(unknown) = args.from.iter().find(|name| !configs.iter().any(|config| config.name == **name)) {
        let error =
            anyhow::anyhow!("--from names {unknown}, which is none of the repositories in {}", config.file.display());
        return Err(CliError::usage(error));
    }
    configs.retain(|config| args.from.is_empty() || args.from.contains(&config.name));
    configs.sort_by_key(|config| !config.place.is_local()); // stable: the configuration's order within
    Ok((configs, from.cluster))
}

async fn serve(context: &Context, args: &Args) -> Result<Exit, CliError> {
    let config = context.config()?;
    let (configs, cluster) = asked(&config, context, args)?;
    // PostgreSQL runs us in the data directory.
    let local = fetch::local(Path::new("")).map_err(fetch_error)?;
    let way = way(args);
    let places = Configured { configs };
    let answer = match args.standby {
        true => fetch::fetch_for_standby(&places, cluster.as_ref(), local, &way, &args.name, &args.dest).await,
        false => fetch::fetch(&places, cluster.as_ref(), local, &way, &args.name, &args.dest).await,
    };
    match answer.map_err(fetch_error)? {
        Fetched::Served => {
            tracing::info!(file = %args.name, "served");
            Ok(Exit::Done)
        }
        Fetched::NotThere => {
            tracing::info!(file = %args.name, "not in the repository");
            Ok(Exit::No)
        }
    }
}

/// The cluster's repositories, opened as far as they are needed.
pub(super) struct Configured<'a> {
    pub configs: Vec<&'a RepositoryConfig>,
}

#[async_trait]
impl Places for Configured<'_> {
    fn names(&self) -> Vec<String> {
        self.configs.iter().map(|config| config.name.clone()).collect()
    }

    async fn open(&self, index: usize) -> Result<Repository, FetchError> {
        let Some(config) = self.configs.get(index) else {
            return Err(FetchError::Task(format!("there is no repository number {index}")));
        };
        open::repository(config).await.map_err(|error| FetchError::Open {
            repository: config.name.clone(),
            why: error.to_string(),
            retryable: error.exit() == Exit::Failed,
        })
    }
}

/// Every one of them stops recovery; the words of `--json` differ.
pub(super) fn fetch_error(error: FetchError) -> CliError {
    match error {
        FetchError::Repository(error) => open::repository_error(error),
        error @ FetchError::Refused { .. } => CliError::refused(error),
        error if error.is_retryable() => CliError::failed(error),
        error => CliError::usage(error),
    }
}
