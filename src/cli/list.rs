//! `pgkeep list`: clusters, base backups, WAL per timeline, and the newest instant that can be restored.
//!
//! Reads the repository's inventory and, for the time of the newest commit, the last few segments; asks the servers of the
//! configured clusters how far they are ([`super::ladder`]), and does without one that does not answer. Changes nothing. The `--json` document grows; its names stay.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use jiff::Timestamp;
use serde::Serialize;

use super::hold::in_force;
use super::ladder::{Ladder, ask, ladder};
use super::output::{self, Align, Table};
use super::scheduled::ScheduleLine;
use super::several::{Away, open_all};
use super::standing::{Standing, lags, missing};
use super::{CliError, Context, Exit, open};
use crate::catalog::backups::Sharing;
use crate::catalog::inventory::{BranchInventory, ClusterInventory, DamagedObject, Hole};
use crate::catalog::records::{BackupInfo, GapReason};
use crate::catalog::retention::{Condemned, Held};
use crate::catalog::verification::Outcome;
use crate::catalog::{CatalogError, Repository};
use crate::config::{ClusterConfig, Config};
use crate::types::{BackupLabel, Branch, ClusterName, Lsn, PgTimestamp, SegmentSize, SystemId};
use crate::wal::{Decoder, Fact, fact, may_be_fact};

/// How many segments are read back from the end to find the newest commit. A cluster that committed nothing in so much
/// WAL has its time shown as unknown.
const LOOK_BACK: usize = 4;

/// `pgkeep list`: clusters, base backups, WAL per timeline, and the newest instant that can be restored.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Of each base backup: Stored is what it added to the repository, Frees what deleting it would give back now, Shares what it uses together with others.
With --gaps: what is missing of the WAL behind the oldest base backup, on every branch, and why.

Example:
  pgkeep list
  pgkeep list --gaps
  pgkeep list --json | jq '.clusters[].backups[].label'")]
pub struct Args {
    /// Show only what is missing of the WAL behind the oldest base backup
    #[arg(long)]
    pub gaps: bool,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.config()?;
    // Without any choice: every repository, and all that is in each.
    let (places, cluster) = match (context.cluster_name(), context.repository_name()) {
        (None, None) => (config.repositories.iter().collect(), None),
        (cluster, repository) => {
            let from = config.read_from_any(cluster, repository)?;
            (from.repositories, cluster.and(from.cluster))
        }
    };
    // The servers first: what the repositories hold afterwards was at least as much then.
    let asks = config.clusters.iter().filter(|of| {
        context.repository_name().is_none() && !args.gaps && {
            cluster.as_ref().is_none_or(|name| of.name_in_repository == *name)
        }
    });
    let asked = join_all(asks.map(async |of| (of, ask(of).await))).await;
    let several = open_all(&places).await?;
    let mut document = Document { clusters: Vec::new(), safe: Vec::new(), away: several.away };
    let (alone, mut standings) = (places.len() == 1, Vec::new());
    for (repository, _) in several.open {
        // One that fails now does not hide what the others hold.
        let (lines, result) = held(&config, &repository, cluster.as_ref()).await;
        for (line, standing) in lines {
            document.clusters.push(line);
            standings.push(standing);
        }
        match result {
            Ok(()) => {}
            Err(error) if alone => return Err(error),
            Err(error) => {
                let (repository, why) = (repository.name().to_owned(), error.sentence());
                document.away.push(Away { repository, why });
            }
        }
    }
    compare(&mut document.clusters, &standings);
    for (of, side) in asked {
        let is_named = |line: &&Cluster| line.cluster == of.name_in_repository.to_string();
        // Two systems under one name are two clusters: the newest is meant, as everywhere.
        let system = document.clusters.iter().rfind(is_named).map(|line| line.system);
        let is_its = |(line, standing): &(&Cluster, &Standing)| {
            is_named(line) && Some(line.system) == system && of.repositories.contains(&standing.repository)
        };
        let held: Vec<&Standing> = document.clusters.iter().zip(&standings).filter(is_its).map(|(_, of)| of).collect();
        document.safe.push(ladder(of, side, &held));
    }
    context.output.document(&document);
    for (number, cluster) in document.clusters.iter().enumerate() {
        if number > 0 {
            context.output.line("");
        }
        if args.gaps {
            show_holes(context, cluster);
        } else {
            show(context, cluster);
        }
    }
    for ladder in document.safe.iter().filter(|_| !document.clusters.is_empty()) {
        context.output.line("");
        ladder.lines().into_iter().for_each(|line| context.output.line(line));
    }
    for away in &document.away {
        context.output.line(format!("Repository {} is left out: {}", away.repository, away.why));
    }
    if document.clusters.is_empty() && document.away.is_empty() {
        context.output.line("Nothing is archived yet: `pgkeep run` archives, `pgkeep backup` takes a base backup.");
    }
    Ok(Exit::Done)
}

/// What a repository holds, and how far it is; as much as could be read, and why not more.
async fn held(
    config: &Config,
    repository: &Repository,
    cluster: Option<&ClusterName>,
) -> (Vec<(Cluster, Standing)>, Result<(), CliError>) {
    let mut lines = Vec::new();
    let read = async {
        let ids = match cluster {
            Some(name) => repository.clusters_named(name).await?,
            None => repository.clusters().await?,
        };
        for id in ids {
            let (inventory, holes) = missing(repository, &id).await?;
            let mut standing = Standing::of(repository.name(), &inventory);
            let mut line = summary(repository, &inventory, holes, &mut standing).await?;
            let labels: Vec<BackupLabel> = inventory.backups.iter().map(|backup| backup.label).collect();
            let its = |of: &&ClusterConfig| {
                of.name_in_repository == inventory.id.name
                    && of.repositories.iter().any(|name| name == repository.name())
            };
            let schedule = config.clusters.iter().find(its).map(|of| &of.schedule);
            line.schedule = ScheduleLine::of(repository, &inventory.id, schedule, &labels).await?;
            lines.push((line, standing));
        }
        Ok(())
    };
    let result: Result<(), CatalogError> = read.await;
    (lines, result.map_err(open::repository_error))
}

/// Tells of each cluster in each repository how far it is behind the best repository that holds it.
fn compare(clusters: &mut [Cluster], standings: &[Standing]) {
    let of = |cluster: &Cluster| (cluster.cluster.clone(), cluster.system);
    let mut groups: BTreeMap<(String, SystemId), Vec<usize>> = BTreeMap::new();
    for (index, cluster) in clusters.iter().enumerate() {
        groups.entry(of(cluster)).or_default().push(index);
    }
    for group in groups.into_values() {
        let those: Vec<Standing> = group.iter().filter_map(|index| standings.get(*index).cloned()).collect();
        for (index, lag) in group.into_iter().zip(lags(&those)) {
            if let Some(cluster) = clusters.get_mut(index) {
                cluster.behind = lag.map(|lag| Behind {
                    text: lag.text(),
                    best: lag.best,
                    bytes: lag.bytes,
                    seconds: lag.seconds,
                    filling: lag.lacks_segments,
                });
            }
        }
    }
}

#[derive(Debug, Serialize)]
struct Document {
    clusters: Vec<Cluster>,
    /// Of each configured cluster: how far its server is, and how much of that is safe.
    safe: Vec<Ladder>,
    /// Repositories that do not answer.
    away: Vec<Away>,
}

/// How far a repository is behind the best one that holds the cluster.
#[derive(Debug, Serialize)]
struct Behind {
    best: String,
    bytes: u64,
    seconds: Option<u64>,
    /// It lacks whole segments, which `pgkeep run` copies to it from another repository.
    filling: bool,
    #[serde(skip)]
    text: String,
}

#[derive(Debug, Serialize)]
struct Cluster {
    repository: String,
    /// Its name in the repository.
    cluster: String,
    #[serde(serialize_with = "as_text")]
    system: SystemId,
    segment_size: Option<u64>,
    /// The end of the contiguous WAL on the newest branch, and when the server had written it.
    frontier: Option<Lsn>,
    frontier_branch: Option<Branch>,
    frontier_time: Option<Timestamp>,
    /// Only where another repository is further.
    behind: Option<Behind>,
    restorable: Restorable,
    backups: Vec<BackupLine>,
    unfinished_backups: Vec<BackupLabel>,
    #[serde(flatten)]
    schedule: ScheduleLine,
    /// In force now.
    holds: Vec<HoldLine>,
    branches: Vec<BranchLine>,
    /// Recorded gaps, whether or not anything is promised there.
    gaps: Vec<GapLine>,
    /// What is missing behind the oldest base backup.
    holes: Vec<HoleLine>,
    damaged: Vec<Damaged>,
    /// What the newest verification said; `null`: there was none.
    verified: Option<Verified>,
    /// How the newest drill went; `null`: there was none.
    drill: Option<LastDrill>,
    /// Names that this version does not understand.
    unknown: Vec<String>,
}

/// What the newest verification said.
#[derive(Debug, Serialize)]
struct Verified {
    at: Timestamp,
    objects: u64,
    /// Never found whole.
    unread_objects: u64,
    /// Since when every other one was.
    whole_since: Option<Timestamp>,
    findings: u64,
}

/// How the newest drill went.
#[derive(Debug, Serialize)]
struct LastDrill {
    at: Timestamp,
    target: String,
    verdict: Outcome,
    /// What failed.
    failure: Option<String>,
}

/// Between which instants the cluster can be restored; empty while there is no usable base backup.
#[derive(Debug, Default, Serialize)]
pub(super) struct Restorable {
    branch: Option<Branch>,
    /// Where the oldest usable base backup is consistent, and when that was.
    from: Option<Lsn>,
    pub(super) from_time: Option<Timestamp>,
    /// The end of the WAL that follows the newest usable base backup without a hole.
    to: Option<Lsn>,
    /// When the newest transaction before `to` ended.
    to_time: Option<Timestamp>,
    /// The archive is known to have been complete at this moment of the server's clock.
    pub(super) complete_at: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
struct BackupLine {
    label: BackupLabel,
    branch: Branch,
    start: Lsn,
    stop: Lsn,
    started_at: Timestamp,
    stopped_at: Timestamp,
    server_version: u32,
    bytes: u64,
    stored_bytes: u64,
    /// What deleting it would free: bytes of objects that no other base backup names. `null` if its manifest does not open.
    frees: Option<u64>,
    /// Bytes of objects that it shares with others.
    shares: Option<u64>,
    files: u64,
    /// All the WAL that makes it consistent is there.
    usable: bool,
    flagged: Option<String>,
    /// Holds in force that name it.
    holds: Vec<BackupLabel>,
    /// Expiry has condemned it.
    condemned: bool,
}

#[derive(Debug, Serialize)]
struct HoldLine {
    hold: BackupLabel,
    held: Held,
    reason: String,
}

#[derive(Debug, Serialize)]
struct BranchLine {
    branch: Branch,
    runs: Vec<RunLine>,
    stored_bytes: u64,
}

#[derive(Debug, Serialize)]
struct RunLine {
    from: Lsn,
    to: Lsn,
}

#[derive(Debug, Serialize)]
struct GapLine {
    branch: Branch,
    from: Lsn,
    to: Lsn,
    reason: GapReason,
    noticed_at: Timestamp,
}

#[derive(Debug, Serialize)]
struct HoleLine {
    branch: Branch,
    from: Lsn,
    to: Lsn,
    /// `null` where nobody recorded it.
    reason: Option<GapReason>,
    #[serde(skip)]
    text: String,
}

#[derive(Debug, Serialize)]
struct Damaged {
    name: String,
    reason: String,
}

fn as_text<S: serde::Serializer>(system: &SystemId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(system) // beyond what JSON readers keep of a number
}

async fn summary(
    repository: &Repository,
    inventory: &ClusterInventory,
    holes: Vec<Hole>,
    standing: &mut Standing,
) -> Result<Cluster, CatalogError> {
    let size = inventory.segment_size;
    let branches = inventory.branches.values().map(|branch| branch_line(branch, size)).collect();
    let mut restorable = restorable(inventory);
    if let (Some(branch), Some(to), Some(size)) = (restorable.branch, restorable.to, size) {
        let newest = newest_commit(repository, inventory, branch, to, size).await?;
        restorable.to_time = newest.map(PgTimestamp::to_timestamp);
        // A note is as old as the range that it belongs to: of a tail, as its beginning.
        restorable.complete_at = restorable.complete_at.max(restorable.to_time);
    }
    // As above: the newest commit tells more of a tail than its beginning.
    let newest = match (standing.frontier, size) {
        (Some((branch, to)), Some(_)) if (restorable.branch, restorable.to) == (Some(branch), Some(to)) => {
            restorable.to_time
        }
        (Some((branch, to)), Some(size)) => {
            newest_commit(repository, inventory, branch, to, size).await?.map(PgTimestamp::to_timestamp)
        }
        _ => None,
    };
    standing.as_of = standing.as_of.max(newest);
    let sharing = sharing(repository, inventory).await?;
    let holds = in_force(&repository.holds(&inventory.id).await?, repository.now());
    let condemned = match repository.condemned(&inventory.id).await? {
        Condemned::These(labels) => labels,
        Condemned::Unknown(_) => BTreeSet::new(),
    };
    let mut backups: Vec<BackupLine> =
        inventory.backups.iter().map(|backup| backup_line(inventory, backup, &sharing)).collect();
    for line in &mut backups {
        let its = holds.iter().filter(|(_, held, _)| *held == Held::Backup(line.label));
        (line.holds, line.condemned) = (its.map(|(hold, ..)| *hold).collect(), condemned.contains(&line.label));
    }
    let verified = repository.newest_verification(&inventory.id).await?.map(|newest| Verified {
        at: newest.ended_at,
        objects: newest.objects,
        unread_objects: newest.unread_objects,
        whole_since: newest.oldest_read,
        findings: newest.findings.len() as u64 + newest.more_findings,
    });
    let drill = repository.drills(&inventory.id, 1).await?.pop().map(|(_, drill)| LastDrill {
        at: drill.began_at,
        failure: drill.failure().map(|check| format!("{}: {}", check.check, check.found)),
        verdict: drill.verdict,
        target: drill.target,
    });
    Ok(Cluster {
        repository: repository.name().to_owned(),
        cluster: inventory.id.name.to_string(),
        system: inventory.id.system,
        segment_size: size.map(SegmentSize::bytes),
        frontier: standing.frontier.map(|(_, frontier)| frontier),
        frontier_branch: standing.frontier.map(|(branch, _)| branch),
        frontier_time: standing.as_of,
        behind: None,
        restorable,
        backups,
        holds: holds.into_iter().map(|(hold, held, reason)| HoldLine { hold, held, reason }).collect(),
        unfinished_backups: inventory.unfinished_backups.clone(),
        schedule: ScheduleLine::default(),
        branches,
        gaps: inventory
            .gaps
            .iter()
            .map(|gap| {
                let (branch, from, to, reason, noticed_at) = (gap.branch, gap.from, gap.to, gap.reason, gap.noticed_at);
                GapLine { branch, from, to, reason, noticed_at }
            })
            .collect(),
        holes: holes
            .into_iter()
            .map(|hole| {
                let Hole { branch, from, to, reason } = hole;
                HoleLine { branch, from, to, reason, text: hole.to_string() }
            })
            .collect(),
        damaged: inventory
            .damaged
            .iter()
            .map(|DamagedObject { name, reason }| Damaged { name: name.clone(), reason: reason.clone() })
            .collect(),
        verified,
        drill,
        unknown: inventory.unknown.clone(),
    })
}

fn branch_line(branch: &BranchInventory, size: Option<SegmentSize>) -> BranchLine {
    let runs = size.map(|size| branch.runs(size)).unwrap_or_default();
    BranchLine {
        branch: branch.branch,
        runs: runs.iter().map(|run| RunLine { from: run.from, to: run.to }).collect(),
        stored_bytes: branch.pieces.iter().map(|piece| piece.object_len).sum(),
    }
}

/// What the base backups share, by their manifests.
async fn sharing(repository: &Repository, inventory: &ClusterInventory) -> Result<Sharing, CatalogError> {
    let mut sharing = Sharing::new();
    for backup in &inventory.backups {
        match repository.get_manifest(&inventory.id, backup.label).await {
            Ok(manifest) => sharing.add(&manifest),
            Err(error) if error.is_damage() || error.is_not_found() => {
                tracing::warn!(label = %backup.label, %error, "what this base backup shares is not known");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(sharing)
}

fn backup_line(inventory: &ClusterInventory, backup: &BackupInfo, sharing: &Sharing) -> BackupLine {
    let share = sharing.of(backup.label);
    BackupLine {
        label: backup.label,
        branch: backup.branch,
        start: backup.start,
        stop: backup.stop,
        started_at: backup.started_at,
        stopped_at: backup.stopped_at,
        server_version: backup.server_version,
        bytes: backup.bytes,
        stored_bytes: backup.stored_bytes,
        frees: share.map(|share| share.alone),
        shares: share.map(|share| share.shared),
        files: backup.files,
        usable: is_usable(inventory, backup),
        flagged: backup.flagged.clone(),
        holds: Vec::new(),
        condemned: false,
    }
}

/// Is the WAL there that makes this backup consistent?
fn is_usable(inventory: &ClusterInventory, backup: &BackupInfo) -> bool {
    let Some(path) = inventory.path_of(backup.branch) else { return false };
    let from = backup.start.segment_start(backup.segment_size);
    inventory.covers_on(backup.branch, &path, from, backup.stop).is_ok()
}

/// The instants between the oldest usable backup and the end of what follows the newest one, on the branch that reaches
/// furthest. `pgkeep plan` answers for a single instant in between: a hole may lie there.
pub(super) fn restorable(inventory: &ClusterInventory) -> Restorable {
    let usable = |backup: &&BackupInfo| backup.flagged.is_none() && is_usable(inventory, backup);
    let backups: Vec<&BackupInfo> = inventory.backups.iter().filter(usable).collect();
    let Some(newest) = backups.last() else { return Restorable::default() };
    let (mut best, mut to) = (newest.branch, newest.stop);
    for branch in inventory.branches.keys() {
        let Some(path) = inventory.path_of(*branch) else { continue };
        let descends = inventory.lineage_of(*branch).branch(newest.timeline) == newest.branch;
        let continues = *branch == newest.branch
            || (descends && path.left_at(newest.timeline).is_some_and(|fork| fork >= newest.stop));
        // Contiguous from the backup on: the end of the first hole is found by asking for more than there can be.
        let end = match inventory.covers_on(*branch, &path, newest.stop, Lsn::new(u64::MAX)) {
            Err(hole) => hole.from,
            Ok(_) => continue, // cannot be: nobody archived all positions
        };
        if continues && (end, *branch) >= (to, best) {
            (best, to) = (*branch, end);
        }
    }
    // Between base backups that are kept beside the window, WAL was expired: it begins behind the last of such holes.
    let expired = inventory.gaps.iter().any(|gap| gap.reason == GapReason::Expired);
    let goes_on = |backup: &&&BackupInfo| {
        let path = inventory.path_of(best);
        !expired || path.is_some_and(|path| inventory.covers_on(best, &path, backup.stop, to).is_ok())
    };
    let oldest = backups.iter().find(goes_on).unwrap_or(newest);
    let note = inventory.branches.get(&best).and_then(|branch| branch.note_of_newest.as_ref());
    let complete = note.filter(|note| note.server_end.is_some_and(|end| end <= to)).and_then(|note| note.server_time);
    Restorable {
        branch: Some(best),
        from: Some(oldest.stop),
        from_time: Some(oldest.stopped_at),
        to: Some(to),
        to_time: None,
        complete_at: complete.map(PgTimestamp::to_timestamp),
    }
}

/// The time of the last transaction that ended before `to`, as far back as [`LOOK_BACK`] segments.
async fn newest_commit(
    repository: &Repository,
    inventory: &ClusterInventory,
    branch: Branch,
    to: Lsn,
    size: SegmentSize,
) -> Result<Option<PgTimestamp>, CatalogError> {
    if !repository.can_read() {
        return Ok(None);
    }
    let path = inventory.path_of(branch);
    // Decoded from the oldest of them on, so that a record that crosses into the next segment is seen: as many segments
    // more as it takes, one after the other.
    let mut segments: BTreeMap<Lsn, Vec<u8>> = BTreeMap::new();
    let mut segment = to.segment_before(size);
    for _ in 0..LOOK_BACK {
        let read = match repository.read_segment(&inventory.id, branch, segment, size, path.as_ref()).await {
            Ok(read) => read,
            Err(error) if error.is_damage() || error.is_not_found() => break,
            Err(error) => return Err(error),
        };
        let start = segment.start(size);
        let wanted = to.bytes_since(start).and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0);
        let mut bytes = read.bytes;
        bytes.truncate(wanted);
        if bytes.is_empty() {
            break;
        }
        segments.insert(start, bytes);
        if let Some(time) = last_end_of_transaction(&segments, size) {
            return Ok(Some(time));
        }
        if start == Lsn::ZERO {
            break;
        }
        segment = start.segment_before(size);
    }
    Ok(None)
}

/// Segments in order, from a segment's start on.
fn last_end_of_transaction(segments: &BTreeMap<Lsn, Vec<u8>>, size: SegmentSize) -> Option<PgTimestamp> {
    let mut decoder = Decoder::new(*segments.keys().next()?, size).only(may_be_fact);
    let mut newest = None;
    for bytes in segments.values() {
        decoder.push(bytes.clone());
        // Where it does not decode, what came before still counts.
        while let Ok(Some(record)) = decoder.next() {
            if let Ok(Some(Fact::Commit { time, .. } | Fact::Abort { time, .. })) = fact(&record) {
                newest = Some(time);
            }
        }
    }
    newest
}

fn show(context: &Context, cluster: &Cluster) {
    let output = &context.output;
    let (name, repository, system) = (&cluster.cluster, &cluster.repository, cluster.system);
    output.line(format!("Cluster {name} in repository {repository}, system identifier {system}"));
    if let (Some(frontier), Some(branch)) = (cluster.frontier, cluster.frontier_branch) {
        let at = cluster.frontier_time.map(|at| format!("  {}", output::time(at))).unwrap_or_default();
        output.line(format!("  Archived up to   {frontier} on branch {branch}{at}"));
    }
    if let Some(behind) = &cluster.behind {
        let filling = if behind.filling { "; `pgkeep run` fills it up from there" } else { "" };
        output.line(format!("  Behind           {}{filling}", behind.text));
    }
    match &cluster.restorable {
        Restorable { from: Some(from), from_time: Some(from_time), to: Some(to), to_time, complete_at, .. } => {
            output.line(format!("  Restorable from  {}  {from}", output::time(*from_time)));
            let until = to_time.map_or_else(|| "(no commit in the newest WAL)".to_owned(), output::time);
            output.line(format!("             to    {until}  {to}"));
            if let Some(at) = complete_at.filter(|_| complete_at > to_time) {
                output.line(format!("  Complete at      {}", output::time(at)));
            }
        }
        _ => output.line("  Nothing can be restored yet: there is no base backup with all of its WAL."),
    }
    proofs(cluster).into_iter().for_each(|line| output.line(line));
    cluster.schedule.lines().into_iter().for_each(|line| output.line(line));

    if !cluster.backups.is_empty() {
        output.line("");
        let mut table = Table::new([
            ("  Backup", Align::Left),
            ("Branch", Align::Left),
            ("Took", Align::Right),
            ("Size", Align::Right),
            ("Stored", Align::Right),
            ("Frees", Align::Right),
            ("Shares", Align::Right),
            ("Stop", Align::Left),
            ("", Align::Left),
        ]);
        for backup in &cluster.backups {
            let took = backup.stopped_at.duration_since(backup.started_at);
            let remark = match (&backup.flagged, backup.usable) {
                (Some(reason), _) => format!("FLAGGED: {reason}"),
                (None, false) => "NOT USABLE: WAL is missing".to_owned(),
                (None, true) => String::new(),
            };
            let held = backup.holds.iter().map(|hold| format!("held by {hold}"));
            let condemned = backup.condemned.then(|| "condemned".to_owned());
            let remarks = Some(remark).filter(|remark| !remark.is_empty()).into_iter().chain(held).chain(condemned);
            let remark = remarks.collect::<Vec<_>>().join("; ");
            table.row([
                format!("  {}", backup.label),
                backup.branch.to_string(),
                output::duration(took.try_into().unwrap_or_default()),
                output::bytes(backup.bytes),
                output::bytes(backup.stored_bytes),
                backup.frees.map_or_else(|| "?".to_owned(), output::bytes),
                backup.shares.map_or_else(|| "?".to_owned(), output::bytes),
                backup.stop.to_string(),
                remark,
            ]);
        }
        output.line(table);
    }
    for hold in &cluster.holds {
        if let Held::Time(instant) = hold.held {
            output.line(format!("  Hold {} keeps the instant {}: {}", hold.hold, output::time(instant), hold.reason));
        }
    }
    for label in &cluster.unfinished_backups {
        output.line(format!("  {label} is unfinished: it is being taken, or it was cut off"));
    }

    if !cluster.branches.is_empty() {
        output.line("");
        let mut table = Table::new([
            ("  WAL of branch", Align::Left),
            ("From", Align::Left),
            ("To", Align::Left),
            ("Size", Align::Right),
            ("", Align::Left),
        ]);
        for branch in &cluster.branches {
            for (number, run) in branch.runs.iter().enumerate() {
                let bytes = run.to.bytes_since(run.from).unwrap_or(0);
                let remark = if number > 0 { "behind a hole" } else { "" };
                let (from, to) = (run.from.to_string(), run.to.to_string());
                table.row([format!("  {}", branch.branch), from, to, output::bytes(bytes), remark.to_owned()]);
            }
        }
        output.line(table);
    }
    // What was expired was meant to go; --json has it.
    for gap in cluster.gaps.iter().filter(|gap| gap.reason != GapReason::Expired) {
        let (branch, from, to) = (gap.branch, gap.from, gap.to);
        let noticed = output::time(gap.noticed_at);
        let what = if gap.reason == GapReason::Damaged { "DAMAGED WAL" } else { "GAP" };
        output.line(format!(
            "  {what} on branch {branch} from {from} to {to}, noticed {noticed}: {}",
            reason(gap.reason)
        ));
    }
    for damaged in &cluster.damaged {
        output.line(format!("  DAMAGED {}: {}", damaged.name, damaged.reason));
    }
    if let Some(first) = cluster.unknown.first() {
        let count = output::count(cluster.unknown.len() as u64, "object");
        output.line(format!("  {count} of unknown names, left alone; the first is {first}"));
    }
}

/// Since when what is kept is known to be whole.
fn proofs(cluster: &Cluster) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(Verified { at, objects, unread_objects, whole_since, findings }) = &cluster.verified {
        let read = match (unread_objects, whole_since) {
            (0, Some(since)) => format!("every object was found whole since {}", output::time(*since)),
            (_, None) => "names and lengths alone".to_owned(),
            (unread, Some(since)) => {
                format!(
                    "{unread} of {objects} objects not yet, every other one was found whole since {}",
                    output::time(*since)
                )
            }
        };
        lines.push(format!("  Verified         {}: {read}", output::time(*at)));
        if *findings > 0 {
            lines.push(format!(
                "  DAMAGE           {}: `pgkeep verify` lists them",
                output::count(*findings, "finding")
            ));
        }
    }
    if let Some(LastDrill { at, target, verdict, failure }) = &cluster.drill {
        let went = match (verdict, failure) {
            (Outcome::Passed, _) => "passed".to_owned(),
            (_, failure) => format!("FAILED at {}", failure.as_deref().unwrap_or("a step that is not known")),
        };
        lines.push(format!("  Last drill       {} to {target}: {went}", output::time(*at)));
    }
    lines
}

fn show_holes(context: &Context, cluster: &Cluster) {
    let output = &context.output;
    output.line(format!("Cluster {} in repository {}", cluster.cluster, cluster.repository));
    match (cluster.holes.as_slice(), cluster.backups.first()) {
        (_, None) => output.line("  There is no base backup yet, so nothing is promised."),
        ([], Some(oldest)) => {
            output.line(format!("  No WAL is missing behind the oldest base backup, {}.", oldest.label))
        }
        (holes, Some(oldest)) => {
            output.line(format!("  Missing behind the oldest base backup, {}:", oldest.label));
            for hole in holes {
                let unknown = if hole.reason.is_none() { "; no cause was recorded" } else { "" };
                output.line(format!("  {}{unknown}", hole.text));
            }
        }
    }
}

fn reason(reason: GapReason) -> &'static str {
    match reason {
        GapReason::SlotLost => "the replication slot was lost",
        GapReason::Recycled => "the server had removed that WAL",
        GapReason::Failover => "it was written before a failover and never streamed",
        GapReason::MissingHistory => "the timeline's history file is missing",
        GapReason::Damaged => "the WAL came damaged from the server",
        GapReason::Differs => "the server's WAL was not the archived one",
        GapReason::Expired => "it was expired: no policy asked for it",
        GapReason::Other => "a newer pgkeep knows why",
    }
}
