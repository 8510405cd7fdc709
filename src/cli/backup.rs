//! `pgkeep backup`: one base backup now.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use serde::Serialize;

use super::copy::{copy_error, copy_with_progress, exit_of, note_copied};
use super::output::{Progress, bytes, bytes_per_second, count, duration};
use super::several::{self, Away};
use super::{CliError, Context, Exit, bucket, open, stop_on_signal};
use crate::archive::Source;
use crate::archive::names::{NamesError, names_of};
use crate::archive::{ClusterStatus, archive};
use crate::backup::cut::Counts;
use crate::backup::{BackupError, BackupOptions, BackupPhase, BackupProgress, BackupSource, ParentChoice, backup};
use crate::catalog::Repository;
use crate::catalog::events::Happened;
use crate::catalog::records::{BackupInfo, Manifest};
use crate::catalog::relations::RelationNames;
use crate::config::{ClusterConfig, Config, RepositoryConfig};
use crate::copy;
use crate::daemon::Job;
use crate::pg::CheckpointSpeed;
use crate::types::{BackupLabel, ClusterId, ClusterName};

/// How often the progress is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(100);

/// `pgkeep backup`: one base backup now.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Complete on its own, and it costs what changed: blocks that an earlier base backup of the cluster has are not stored again. Complete only when the WAL up to its end is in the repository; it streams that itself when no `pgkeep run` does. Where the cluster has several repositories it is taken into the first one that answers, or --repository, and copied from there to the others: the server is read once. Exit code 1: it is there, but flagged, or not in all of them.

Example:
  pgkeep backup
  pgkeep backup --cluster main --checkpoint spread --rate 50000
  pgkeep backup --from 'host=standby user=postgres'
  pgkeep backup --full
  pgkeep backup --repository second --only")]
pub struct Args {
    /// The checkpoint it begins with: at once, or spread over minutes to spare the server's disks
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Checkpoint::Fast)]
    pub checkpoint: Checkpoint,
    /// Most kB (1024 bytes) that the server sends in a second, 32 to 1048576 [default: no limit]
    #[arg(long, visible_alias = "rate", value_name = "KB")]
    pub max_rate: Option<u32>,
    /// Compare with this base backup [default: the newest sound one of the cluster]
    #[arg(long, value_name = "LABEL", conflicts_with = "full")]
    pub parent: Option<BackupLabel>,
    /// Compare with none: store everything
    #[arg(long)]
    pub full: bool,
    /// Read the files from this server instead, a standby of the same cluster; WAL comes from the configured one
    #[arg(long, value_name = "CONNINFO")]
    pub from: Option<String>,
    /// Do not copy it to the cluster's other repositories
    #[arg(long)]
    pub only: bool,
}

/// How the server's checkpoint at the start of a base backup is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Checkpoint {
    /// At once.
    Fast,
    /// Over `checkpoint_completion_target` of `checkpoint_timeout`.
    Spread,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.config()?;
    let cluster = config.cluster(context.cluster_name())?;
    let _cleaning = bucket::clean_stale_uploads(bucket::repositories_of(&config, [cluster]));
    // It goes into one repository first, its WAL into all of the cluster's: as many must hold what is acknowledged.
    let (repository, place, mut copies) = first_that_answers(context, &config, cluster).await?;
    let job = open::job(&config, cluster).await?;
    let stop = stop_on_signal()?;
    let checkpoint = match args.checkpoint {
        Checkpoint::Fast => CheckpointSpeed::Fast,
        Checkpoint::Spread => CheckpointSpeed::Spread,
    };
    let parent = match args.parent {
        _ if args.full => ParentChoice::Full,
        Some(label) => ParentChoice::Label(label),
        None => ParentChoice::Newest,
    };
    let options = BackupOptions { checkpoint, max_rate: args.max_rate, parent, ..BackupOptions::default() };
    let files_from = match &args.from {
        Some(text) => text.parse().map_err(|error| CliError::usage(anyhow::Error::new(error)).context("--from"))?,
        None => job.source.conninfo.clone(),
    };
    let source = BackupSource { conninfo: files_from, connect: job.source.connect.clone() };
    let watched = watch::Sender::new(BackupProgress::default());
    let bar = context.output.progress("backup", None);
    let manifest = {
        let taken = take_while_archiving(&job, &source, &repository, &options, &watched, stop.clone());
        let mut shown = watched.subscribe();
        let draw = async {
            loop {
                draw(&bar, &shown.borrow_and_update());
                tokio::time::sleep(DRAW_EVERY).await;
            }
        };
        tokio::select! {
            biased;
            taken = taken => taken,
            () = draw => Err(CliError::failed(anyhow::anyhow!("the progress ended"))), // invariant: it never does
        }
    };
    let took = bar.finish();
    note(&repository, &cluster.name_in_repository, &manifest).await;
    let manifest = manifest.map_err(|error| error.context(format!("back up cluster {}", cluster.name)))?;
    let info = &manifest.backup;
    if let Some(reason) = &info.flagged {
        tracing::error!(
            label = %info.label,
            "pages on the server have wrong checksums: the backup is kept, flagged, and not used unless asked for by name. {reason}"
        );
    }
    let names = note_names(&job.source, &job.cluster, &repository, info).await;
    if !args.only {
        let others: Vec<&RepositoryConfig> = config
            .repositories_of(cluster)?
            .into_iter()
            .filter(|other| other.name != place && copies.iter().all(|copy| copy.repository != other.name))
            .collect();
        for other in others {
            let copied = tokio::select! {
                biased;
                () = stop.cancelled() => Err((Exit::No, "stopped before it was copied".to_owned())),
                copied = copy_to(context, &repository, other, &manifest, names.as_ref(), &cluster.name_in_repository) => copied,
            };
            copies.push(CopyOf::new(&other.name, copied));
        }
    } else {
        copies.clear();
    }
    let mut exit = if info.flagged.is_some() { Exit::No } else { Exit::Done };
    let cost = Cost::of(&manifest, watched.borrow().counts);
    let mut lines = vec![text(info, took), cost.text()];
    for copy in &copies {
        let (name, label) = (&copy.repository, info.label);
        lines.push(match &copy.why {
            None => format!("copied to repository {name}"),
            Some(why) => format!(
                "NOT in repository {name}: {why}; to copy it there: pgkeep copy --from {place} --to {name} --backup {label}"
            ),
        });
        exit = exit.max(copy.exit);
    }
    context.output.result(&Taken { backup: info, cost, repository: &place, copies: &copies }, lines.join("\n"));
    Ok(exit)
}

/// What `--json` says.
#[derive(Serialize)]
struct Taken<'a> {
    #[serde(flatten)]
    backup: &'a BackupInfo,
    cost: Cost,
    /// Where it was taken into.
    repository: &'a str,
    /// The cluster's other repositories.
    copies: &'a [CopyOf],
}

/// What was read, and what became of it. In bytes.
#[derive(Debug, Serialize)]
struct Cost {
    /// The backup that it was compared with.
    parent: Option<BackupLabel>,
    /// Of files.
    read: u64,
    /// Not in the parent.
    new: u64,
    /// In the parent, in packs that are to become empty: stored again.
    again: u64,
    /// In the parent, and not stored.
    referenced: u64,
    /// Blocks of zeros, of which nothing is stored.
    zeros: u64,
    /// Sealed objects that were put.
    stored: u64,
    /// Bytes read for each byte stored.
    ratio: f64,
}

impl Cost {
    fn of(manifest: &Manifest, counts: Counts) -> Cost {
        let Counts { new, again, referenced } = counts;
        let (read, stored) = (manifest.backup.bytes, manifest.backup.stored_bytes);
        let zeros = read.saturating_sub(new + again + referenced);
        let ratio = read as f64 / stored.max(1) as f64;
        Cost { parent: manifest.parents.first().copied(), read, new, again, referenced, zeros, stored, ratio }
    }

    fn text(&self) -> String {
        let Cost { parent, read, new, again, referenced, zeros, stored, ratio } = self;
        let of = parent.map(|parent| format!(" of {parent}")).unwrap_or_default();
        let again = match again {
            0 => String::new(),
            again => format!(", {} stored again so that old packs become empty", bytes(*again)),
        };
        format!(
            "read {}: {} new, {} referenced{of}{again}, {} zeros; stored {}, 1 byte of {ratio:.1}",
            bytes(*read),
            bytes(*new),
            bytes(*referenced),
            bytes(*zeros),
            bytes(*stored),
        )
    }
}

/// Whether the backup is in another repository of the cluster.
#[derive(Debug, Serialize)]
pub(super) struct CopyOf {
    pub(super) repository: String,
    copied: bool,
    /// Why not.
    why: Option<String>,
    #[serde(skip)]
    exit: Exit,
}

impl CopyOf {
    fn new(repository: &str, copied: Result<(), (Exit, String)>) -> CopyOf {
        let (exit, why) = copied.map_or_else(|(exit, why)| (exit, Some(why)), |()| (Exit::Done, None));
        // Taking another one would not help: so it is never "another try may help".
        let exit = if exit == Exit::Done || exit == Exit::Refused { exit } else { Exit::No };
        CopyOf { repository: repository.to_owned(), copied: why.is_none(), why, exit }
    }
}

/// Where a backup goes: `--repository`, or the first of the cluster's repositories that answers. Those before it that do
/// not are said.
pub(super) async fn first_that_answers(
    context: &Context,
    config: &Config,
    cluster: &ClusterConfig,
) -> Result<(Repository, String, Vec<CopyOf>), CliError> {
    if let Some(name) = context.repository_name() {
        let place = config.repository(Some(name))?;
        if !cluster.repositories.contains(&place.name) {
            let error = anyhow::anyhow!("repository {name} does not receive the WAL of cluster {}", cluster.name);
            let hint = format!("take it into one that does, and `pgkeep copy --to {name}` brings it there");
            return Err(CliError::usage(error).hint(hint));
        }
        return Ok((open::repository(place).await?, place.name.clone(), Vec::new()));
    }
    let mut away: Vec<Away> = Vec::new();
    for place in config.repositories_of(cluster)? {
        match several::open_one(place).await? {
            Ok(repository) => {
                let copies = away.into_iter().map(|away| CopyOf::new(&away.repository, Err((Exit::No, away.why))));
                return Ok((repository, place.name.clone(), copies.collect()));
            }
            Err(missing) => {
                tracing::warn!("repository {} is away, the backup goes elsewhere: {}", missing.repository, missing.why);
                away.push(missing);
            }
        }
    }
    Err(CliError::failed(several::none_answers(&away)))
}

/// Copies the backup, and the WAL that it needs, to another repository; or says why not.
pub(super) async fn copy_to(
    context: &Context,
    from: &Repository,
    to: &RepositoryConfig,
    manifest: &Manifest,
    names: Option<&RelationNames>,
    cluster: &ClusterName,
) -> Result<(), (Exit, String)> {
    let told = |error: CliError| (error.exit(), error.sentence());
    let to = match several::open_one(to).await.map_err(told)? {
        Ok(to) => to,
        Err(away) => return Err((Exit::No, away.why)),
    };
    let BackupInfo { label, system, .. } = manifest.backup;
    let id = ClusterId { name: cluster.clone(), system };
    if let Some(names) = names
        && let Err(error) = to.put_relations(&id, names).await
    {
        tracing::warn!("the names of relations were not noted in repository {}: {error}", to.name());
    }
    let (source, target) = copy::survey(from, &to, &id).await.map_err(|error| told(copy_error(error)))?;
    let plan = copy::plan(&source, &target, &copy::Selection::Backup(label));
    let what = format!("copying to {}", to.name());
    let copied = copy_with_progress(context, from, &to, &source, &plan, &what).await.map_err(told)?;
    note_copied(from, &to, &id, &copied).await;
    let problems = copied.problems.iter().map(|problem| format!("{}: {}", problem.what, problem.why));
    let why: Vec<String> = plan.missing.iter().cloned().chain(problems).collect();
    match exit_of(&plan, &copied) {
        Exit::Done => Ok(()),
        exit => Err((exit, why.join("; "))),
    }
}

/// Notes among the events how a base backup ended.
pub(super) async fn note(repository: &Repository, cluster: &ClusterName, manifest: &Result<Manifest, CliError>) {
    let event = match manifest {
        Ok(Manifest { backup, .. }) => {
            let BackupInfo { label, bytes, stored_bytes, .. } = *backup;
            Happened::BackupFinished { label, bytes, stored_bytes, flagged: backup.flagged.clone() }
        }
        Err(error) => Happened::BackupFailed { reason: error.sentence() },
    };
    let ids = match manifest {
        Ok(manifest) => vec![ClusterId { name: cluster.clone(), system: manifest.backup.system }],
        // Whose it would have been is not known: the cluster's that is there. One of which nothing is there has no history.
        Err(_) => repository.clusters_named(cluster).await.unwrap_or_default(),
    };
    if let [id] = ids.as_slice() {
        repository.note_event(id, event).await;
    }
}

/// Notes what the relations are called, for `pgkeep log`; a backup without that is as good.
pub(super) async fn note_names(
    source: &Source,
    cluster: &ClusterName,
    repository: &Repository,
    info: &BackupInfo,
) -> Option<RelationNames> {
    let id = ClusterId { name: cluster.clone(), system: info.system };
    let noted = async {
        let names = names_of(&source.conninfo, &source.connect, info.label).await?;
        repository.put_relations(&id, &names).await?;
        Ok::<_, NamesError>(names)
    };
    match noted.await {
        Ok(names) => Some(names),
        Err(error) => {
            tracing::warn!("the names of relations were not noted, `pgkeep log` will show numbers: {error}");
            None
        }
    }
}

/// Takes the backup while WAL is archived beside it: by us, unless another pgkeep holds the slot, which then does it.
async fn take_while_archiving(
    job: &Job,
    files: &BackupSource,
    repository: &Repository,
    options: &BackupOptions,
    progress: &watch::Sender<BackupProgress>,
    stop: CancellationToken,
) -> Result<Manifest, CliError> {
    let status = watch::Sender::new(ClusterStatus::default());
    let mut watched = status.subscribe();
    let archived = CancellationToken::new();
    let (Job { cluster, source, receivers, options: archive_options }, until) = (job.clone(), archived.clone());
    // A task of its own: it does not wait while a backup is cut and sealed, nor the other way round.
    let mut archiver = AbortOnDropHandle::new(tokio::spawn(async move {
        archive(&source, &receivers, &cluster, &archive_options, &status, until).await
    }));
    let backup = async {
        // The slot comes first: it keeps the WAL that the backup will need. Once the archiver has connected it is there;
        // whether it streams or waits for another that does is the same to us.
        let connected = |status: &ClusterStatus| !matches!(status, ClusterStatus::Connecting);
        let connected = tokio::select! {
            biased;
            () = stop.cancelled() => return Err(BackupError::Cancelled),
            connected = watched.wait_for(connected) => connected.is_ok(),
        };
        if !connected {
            std::future::pending::<()>().await; // the archiver ended: why, is told below
        }
        backup(files, repository, &job.cluster, options, progress, stop.clone()).await
    };
    tokio::select! {
        biased;
        manifest = backup => {
            archived.cancel();
            // What it received is made durable; if that fails the slot keeps it, and the backup stands all the same.
            match archiver.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!("archiving stopped after the backup: {error}"),
                Err(error) => tracing::warn!("archiving ended abnormally after the backup: {error}"),
            }
            manifest.map_err(backup_error)
        }
        ended = &mut archiver => Err(match ended {
            Ok(Err(error)) => open::archive_error(error),
            Ok(Ok(())) => CliError::failed(BackupError::Cancelled), // invariant: it was not told to stop
            Err(error) => CliError::failed(error).context("archive beside the backup"),
        }),
    }
}

pub(super) fn backup_error(error: BackupError) -> CliError {
    match error {
        BackupError::Server(error) => open::server_error(error),
        BackupError::Repository(error) => open::repository_error(error),
        error if error.is_refusal() => CliError::refused(error),
        BackupError::NoParent { .. } => CliError::usage(error),
        BackupError::ParentUnreadable { .. } => CliError::no(error),
        error => CliError::failed(error),
    }
}

fn draw(bar: &Progress, progress: &BackupProgress) {
    match progress.phase {
        BackupPhase::Connecting => bar.message("connecting"),
        BackupPhase::Checkpoint => bar.message("waiting for the server's checkpoint"),
        BackupPhase::Receiving => bar.message(""),
        BackupPhase::Storing => bar.message("storing the rest"),
        BackupPhase::WaitingForWal { stop, reached: Some(reached) } => {
            bar.message(format!("waiting for the WAL up to {stop}, there is {reached}"));
        }
        BackupPhase::WaitingForWal { stop, reached: None } => bar.message(format!("waiting for the WAL up to {stop}")),
        BackupPhase::Done => bar.message("done"),
    }
    if let Some(total) = progress.total {
        bar.set_total(Some(total.max(progress.done)));
        bar.set(progress.done);
    }
}

fn text(info: &BackupInfo, took: Duration) -> String {
    let tablespaces = match info.tablespaces.len() {
        0 => String::new(),
        number => format!(", {number} tablespaces"),
    };
    format!(
        "base backup {} is complete in {}: {} in {}{tablespaces}, {} stored, {}\nrestorable from {} on, timeline {}{}",
        info.label,
        duration(took),
        bytes(info.bytes),
        count(info.files, "file"),
        bytes(info.stored_bytes),
        bytes_per_second(info.bytes, took),
        info.stop,
        info.timeline,
        if info.flagged.is_some() { "; FLAGGED: pages have wrong checksums" } else { "" },
    )
}
