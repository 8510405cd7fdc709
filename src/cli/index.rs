//! `pgkeep index`: the index of transactions that `pgkeep log` searches.

use serde::Serialize;

use super::output::{bytes, count};
use super::several::{Away, open_all};
use super::{CliError, Context, Exit, open};
use crate::catalog::index::Rebuilt;
use crate::restore::{RestoreError, find_cluster};

/// `pgkeep index`: the index of transactions that `pgkeep log` searches.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example:
  pgkeep index rebuild")]
pub struct Index {
    /// What to do.
    #[command(subcommand)]
    pub what: Command,
}

/// What can be done with an index.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Make what is missing of the index, from the WAL in the repository
    Rebuild(RebuildArgs),
}

/// `pgkeep index rebuild`: makes what is missing of the index.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The index is made while WAL is archived; this is for WAL from before there was one, or that came by another way. It reads \
the WAL that is not indexed, and nothing else. Stopped in the middle, run it again. Exit code 1: some WAL could not be \
indexed; it is named.

Example:
  pgkeep index rebuild
  pgkeep index rebuild --cluster main --all")]
pub struct RebuildArgs {
    /// Read what is there already, too, and make again what does not open
    #[arg(long)]
    pub all: bool,
}

#[derive(Debug, Serialize)]
struct Document {
    repositories: Vec<Line>,
    /// Repositories that do not answer.
    away: Vec<Away>,
}

#[derive(Debug, Serialize)]
struct Line {
    repository: String,
    cluster: String,
    #[serde(flatten)]
    rebuilt: Rebuilt,
}

/// Runs `pgkeep index rebuild`.
pub async fn rebuild(context: &Context, args: RebuildArgs) -> Result<Exit, CliError> {
    let config = context.config()?;
    let from = config.read_from_any(context.cluster_name(), context.repository_name())?;
    let several = open_all(&from.repositories).await?;
    let mut document = Document { repositories: Vec::new(), away: several.away };
    let mut exit = if document.away.is_empty() { Exit::Done } else { Exit::Failed };
    let alone = from.repositories.len() == 1;
    for (repository, _) in several.open {
        let cluster = match find_cluster(&repository, from.cluster.as_ref()).await {
            Err(RestoreError::NoCluster { .. }) if !alone => continue,
            found => found.map_err(super::plan::restore_error)?,
        };
        if !repository.can_read() {
            let error = RestoreError::WriteOnlyKey { repository: repository.name().to_owned() };
            return Err(super::plan::restore_error(error));
        }
        let bar = context.output.progress("indexing", None);
        let progress = |done: u64, total: u64| {
            bar.set_total(Some(total));
            bar.set(done);
        };
        let rebuilt = repository.rebuild_indexes(&cluster, args.all, &progress).await;
        bar.finish();
        let rebuilt = rebuilt.map_err(open::repository_error)?;
        context.output.line(format!(
            "{}: {} of WAL indexed, {}, {} of index",
            repository.name(),
            bytes(rebuilt.wal_bytes),
            count(rebuilt.transactions, "transaction"),
            bytes(rebuilt.index_bytes)
        ));
        for left in &rebuilt.left {
            context.output.line(format!("not indexed: {left}"));
            exit = exit.max(Exit::No);
        }
        let name = repository.name().to_owned();
        document.repositories.push(Line { repository: name, cluster: cluster.to_string(), rebuilt });
    }
    context.output.document(&document);
    Ok(exit)
}
