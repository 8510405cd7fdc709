//! `pgkeep restore`: a cluster as of a target, in a directory.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::args::TargetArgs;
use super::lease::leased;
use super::output::{bytes, bytes_per_second, count, duration};
use super::plan::{Asked, Found, Origin, restore_error};
use super::{CliError, Context, Exit};
use crate::catalog::Repository;
use crate::catalog::events::Happened;
use crate::catalog::relations::Names;
use crate::plan::RestorePlan;
use crate::restore::databases::Only;
use crate::restore::spent::Times;
use crate::restore::{self, FetchCommand, Moved, Restored, Sources, delta, place};

/// `pgkeep restore`: a cluster as of a target, in a directory.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Writes the base backup and the settings of recovery; `pg_ctl start` then replays the WAL up to the target. A target that \
cannot be reached is refused before the first byte is written; so is a directory that is not empty. Where several \
repositories hold the cluster, one that fails in the middle is replaced by the next.

With --delta the directory may hold an old state of the same cluster, or a restore that was stopped: only blocks that \
differ are fetched, and what the backup does not have is removed. A directory on which a server runs is refused, and so \
is one of another cluster.

Example:
  pgkeep restore --to latest --pgdata /srv/restored
  pgkeep restore --to 'name:before-upgrade' --pgdata /srv/restored --action promote \\
      --tablespace /ssd/old=/ssd/restored
  pgkeep restore --to '10 minutes ago' --pgdata /var/lib/postgresql/15/main --delta
  pgkeep restore --to latest --pgdata /srv/dump-from --database shop")]
pub struct Args {
    /// The target and how it is meant
    #[command(flatten)]
    pub target: TargetArgs,
    /// The data directory to write: empty or not there yet; with --delta also an old state of the cluster
    #[arg(long, value_name = "DIR")]
    pub pgdata: PathBuf,
    /// Put the tablespace that was at OLD (its directory or its oid) to NEW; once for each tablespace
    #[arg(long, value_name = "OLD=NEW", value_parser = tablespace)]
    pub tablespace: Vec<Tablespace>,
    /// What the server does at the target: pause (look, then `select pg_wal_replay_resume()`), promote or shutdown
    #[arg(long, value_enum, default_value_t = Action::Pause)]
    pub action: Action,
    /// Bring up what is there: fetch and write only blocks that differ, empty pg_wal, remove what the backup does not have
    #[arg(long)]
    pub delta: bool,
    /// Restore only this database (its name or OID) and what every cluster has, the others as empty files: to dump it
    /// from there, never to go on with; may be said several times
    #[arg(long, value_name = "NAME")]
    pub database: Vec<String>,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let output = &context.output;
    let asked = Asked::of(context, &args.target).await?;
    let found = match asked.resolve(context).await? {
        Ok(found) => found,
        Err(no) => return Ok(asked.refuse(context, &no)),
    };
    let (resolved, plan) = (&found.resolved, &found.resolved.plan);
    asked.explain(context, &found);
    let moved: Vec<Moved> = args.tablespace.into_iter().map(|Tablespace { old, new }| Moved { old, new }).collect();
    let look = if args.delta { delta::look } else { place::look };
    let mut destination = look(&args.pgdata, &moved, &plan.base).map_err(restore_error)?;
    let command = restore_command(context, &asked, found.repository, plan)?;
    let sources = sources(context, &asked, &found).await?;
    if !args.database.is_empty() {
        let only = databases(&asked, &found, &sources, &args.database).await?;
        destination.notes.push(only.note.clone());
        destination.only = Some(only);
    }
    output.line(format!("into      {}", destination.pgdata.display()));
    destination.notes.iter().for_each(|note| output.line(format!("note      {note}")));
    let mut answer = Answer {
        restored: false,
        from: asked.from(&found),
        pgdata: &destination.pgdata,
        plan,
        restore_command: &command,
        delta: destination.delta,
        notes: destination.notes.clone(),
        files: plan.base.files,
        bytes: plan.base.bytes,
        equal_bytes: 0,
        fetched_bytes: 0,
        removed: 0,
        seconds: 0.0,
        spent: Spent::default(),
    };
    if args.dry_run {
        output.result(&answer, "Nothing was written (--dry-run).");
        return Ok(Exit::Done);
    }
    // What is in the packs; where it is compared, all there is; of some databases, theirs.
    let live = resolved.manifest.packs.iter().map(|pack| pack.live).sum();
    let total = if destination.delta { plan.base.bytes } else { live };
    let total = destination.only.as_ref().map_or(total, |only| only.bytes);
    let progress = output.progress("restoring", Some(total));
    let action = match args.action {
        Action::Pause => restore::Action::Pause,
        Action::Promote => restore::Action::Promote,
        Action::Shutdown => restore::Action::Shutdown,
    };
    let since = Instant::now();
    let files = count(plan.base.files, "file");
    let add = |written: u64| {
        progress.message(format!("{} of {files}", sources.spent().files()));
        progress.add(written);
    };
    // Expiry leaves alone what is being read, and for a day what recovery reads then.
    let repositories = std::iter::once(found.repository).chain(found.others.iter().copied());
    let restoring = restore::restore(&sources, resolved, &destination, action, &command, &add);
    let (repository, backup) = (found.repository, plan.base.label);
    let begun = Happened::RestoreBegun { target: args.target.target.clone(), backup };
    repository.note_event(&asked.cluster, begun).await;
    let restored = leased(repositories.cloned().collect(), &asked.cluster, plan, restoring).await;
    let event = match &restored {
        Ok(restored) => Happened::RestoreFinished { backup, bytes: restored.bytes },
        Err(error) => Happened::RestoreFailed { backup, reason: error.to_string() },
    };
    repository.note_event(&asked.cluster, event).await;
    let restored = restored.map_err(|error| {
        let unfinished = destination.pgdata.join(restore::UNFINISHED).exists();
        let error = restore_error(error);
        let hint = format!(
            "{} is not finished and cannot be started; finish it with the same command and --delta, or empty it",
            destination.pgdata.display()
        );
        if unfinished { error.hint(hint) } else { error }
    })?;
    progress.finish();
    restored.notes.iter().for_each(|note| output.line(format!("note      {note}")));
    let took = since.elapsed();
    let Restored { files, bytes: size, equal, fetched, removed, times, notes, .. } = restored;
    answer.restored = true;
    answer.notes.extend(notes);
    (answer.equal_bytes, answer.fetched_bytes, answer.removed) = (equal, fetched, removed);
    (answer.seconds, answer.spent) = (took.as_secs_f64(), Spent::from(times));
    output.line(format!("time      {}", spent(&times, destination.delta)));
    let mut text = format!("Restored {} in {} ({}, {})", bytes(size), count(files, "file"), duration(took), {
        bytes_per_second(equal + fetched, took)
    });
    if destination.delta {
        let removed = count(removed, "stranger");
        text.push_str(&format!(": {} were equal, {} fetched, {removed} removed", bytes(equal), bytes(fetched)));
    }
    text.push_str(&format!(
        ". The server recovers to the target when it is started: pg_ctl -D {} start",
        destination.pgdata.display()
    ));
    output.result(&answer, text);
    Ok(Exit::Done)
}

/// Where the time went. Several work at the same time, so together it is more than what passed.
fn spent(times: &Times, delta: bool) -> String {
    let compare = if delta { format!(", comparing {}", duration(times.compare)) } else { String::new() };
    format!(
        "of all workers: tables {}{compare}, fetching {}, opening {}, writing {}, syncing {}",
        duration(times.table),
        duration(times.fetch),
        duration(times.open),
        duration(times.write),
        duration(times.sync),
    )
}

/// What `--json` says.
#[derive(Serialize)]
struct Answer<'a> {
    /// `false` after `--dry-run`.
    restored: bool,
    from: Origin<'a>,
    pgdata: &'a std::path::Path,
    plan: &'a RestorePlan,
    restore_command: &'a str,
    /// What was there was brought up to the backup.
    delta: bool,
    notes: Vec<String>,
    files: u64,
    bytes: u64,
    /// Found to be there already.
    equal_bytes: u64,
    fetched_bytes: u64,
    /// Files, links and directories that the backup does not have.
    removed: u64,
    seconds: f64,
    spent: Spent,
}

/// Seconds by what they were spent on, of all workers together.
#[derive(Default, Serialize)]
struct Spent {
    table: f64,
    compare: f64,
    fetch: f64,
    open: f64,
    write: f64,
    sync: f64,
}

impl From<Times> for Spent {
    fn from(times: Times) -> Spent {
        Spent {
            table: times.table.as_secs_f64(),
            compare: times.compare.as_secs_f64(),
            fetch: times.fetch.as_secs_f64(),
            open: times.open.as_secs_f64(),
            write: times.write.as_secs_f64(),
            sync: times.sync.as_secs_f64(),
        }
    }
}

/// The databases that were asked for, among those that the backup has.
async fn databases(
    asked: &Asked,
    found: &Found<'_>,
    sources: &Sources,
    databases: &[String],
) -> Result<Only, CliError> {
    let names = match found.repository.relation_names(&asked.cluster).await {
        Ok(names) => names,
        Err(error) => {
            tracing::warn!("the names of databases cannot be read, their OIDs will do: {error}");
            Names::default()
        }
    };
    restore::databases::find(sources, &found.resolved.manifest, &names, databases).await.map_err(restore_error)
}

/// Where the base backup is read from: the chosen repository, and those that have the same one, to take over.
pub(super) async fn sources(context: &Context, asked: &Asked, found: &Found<'_>) -> Result<Arc<Sources>, CliError> {
    let manifest = found.resolved.manifest.clone();
    let mut sources = Sources::new(found.repository.clone(), asked.cluster.clone(), manifest);
    for other in &found.others {
        // What it does not have now it is not asked for.
        if let Err(error) = sources.add((*other).clone()).await {
            tracing::warn!("repository {} will not take over: {error}", other.name());
        }
    }
    if sources.count() > 1 {
        let others: Vec<&str> = sources.names().skip(1).collect();
        context.output.line(format!("or from   {}, if that fails", others.join(", ")));
    }
    Ok(Arc::new(sources))
}

/// The command by which the restored server gets its WAL: this program, this configuration. It names a repository only
/// where there is no other: else `wal fetch` asks all of the cluster's.
pub(super) fn restore_command(
    context: &Context,
    asked: &Asked,
    repository: &Repository,
    plan: &RestorePlan,
) -> Result<String, CliError> {
    let program = std::env::current_exe().map_err(|error| CliError::failed(error).context("find this program"))?;
    let config = context.config()?;
    // The name that the configuration has for it, if it has one: `wal fetch` looks there first.
    let (repository, cluster) = (asked.named.then(|| repository.name()), plan.cluster.name.as_str());
    let named = config.clusters.iter().find(|known| known.name_in_repository.as_str() == cluster);
    let cluster = named.map_or(cluster, |known| known.name.as_str());
    let meant = config.read_from_any(Some(cluster), repository)?.cluster;
    if meant.as_ref() != Some(&plan.cluster.name) {
        let error =
            anyhow::anyhow!("the cluster called {cluster} in {} is not {}", config.file.display(), plan.cluster);
        return Err(CliError::usage(error).hint("give the configured cluster another name"));
    }
    let until = restore::needed_to(plan);
    let path = &plan.path;
    // Those that were away may hold another history when they are back: it was compared with nothing.
    let from = asked.only();
    let command =
        FetchCommand { program: &program, config: &config.file, repository, from: &from, cluster, path, until };
    command.command().map_err(restore_error)
}

/// What the server does when it has reached the target: PostgreSQL's `recovery_target_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Action {
    /// Stays in recovery, readable.
    Pause,
    /// Becomes a primary on a new timeline.
    Promote,
    /// Stops.
    Shutdown,
}

/// Where a tablespace was, and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// Its directory on the source server, or its oid.
    pub old: String,
    /// Its directory now.
    pub new: PathBuf,
}

/// As pg_basebackup writes it: `=` in a path is `\=`.
fn tablespace(text: &str) -> Result<Tablespace, String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let letter = match letter {
            '\\' if letters.peek() == Some(&'=') => letters.next(),
            '=' => {
                parts.push(String::new());
                None
            }
            other => Some(other),
        };
        if let Some(part) = parts.last_mut() {
            part.extend(letter);
        }
    }
    let [old, new] = parts.as_slice() else {
        return Err("write OLD=NEW, two directories".to_owned());
    };
    let is_oid = !old.is_empty() && old.bytes().all(|b| b.is_ascii_digit());
    let new = PathBuf::from(new);
    if !(is_oid || old.starts_with('/')) || !new.is_absolute() {
        return Err("both directories of a tablespace are absolute paths (OLD may be its oid)".to_owned());
    }
    Ok(Tablespace { old: old.clone(), new })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tablespaces_are_two_absolute_paths() {
        let pair = |old: &str, new: &str| Some(Tablespace { old: old.into(), new: new.into() });
        let cases = [
            ("/a=/b", pair("/a", "/b")),
            (r"/a\=1=/b\c", pair("/a=1", r"/b\c")),
            ("/a", None),
            ("/a=", None),
            ("16385=/b", pair("16385", "/b")),
            ("a=/b", None),
            ("/a=/b=/c", None),
        ];
        for (text, want) in cases {
            assert_eq!(tablespace(text).ok(), want, "{text}");
        }
    }
}
