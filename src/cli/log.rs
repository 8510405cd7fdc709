//! `pgkeep log`: which transactions and restore points there were, what they did, and how to stop just before or at one.
//! Changes nothing, needs no server.

use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;

use super::output::{bytes, count, time_in};
use super::several::{Away, none_answers, open_all};
use super::{CliError, Context, Exit, open};
use crate::catalog::Repository;
use crate::catalog::index::{Found, Logged, Passed, Query};
use crate::catalog::inventory::ClusterInventory;
use crate::catalog::relations::{Called, Names};
use crate::plan::{Point, Target, TargetReading, TimelineChoice, target};
use crate::restore::{RestoreError, find_cluster};
use crate::types::{Branch, ClusterId, Lsn, PgTimestamp};
use crate::wal::{Changes, Kinds, LandmarkKind, Parameters, RelFile, Touched, WalLevel, marks};

/// `pgkeep log`: which transactions there were, what they did, and how to stop just before one.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Each transaction is shown with the argument of `pgkeep restore` and `pgkeep plan` that stops just before it. Names are \
those that were noted with a base backup; what was created since, or is not known, is shown by its numbers \
(tablespace/database/file). What it was: drop, truncate, rewrite, create, ddl, insert, update, delete, aborted.

Restore points (kind restore-point) and changes of the settings that a restored server must not have lower (kind \
parameters) stand between them, unless --xid or --relation is given.

Exit code 1: nothing is what was asked for.

Example:
  pgkeep log --around '2026-11-20 10:00+01:00'
  pgkeep log --relation public.orders --kind drop,truncate,ddl
  pgkeep log --kind restore-point --timeline 2
  pgkeep log --xid 4711")]
pub struct Args {
    /// The transactions that ended nearest to this time
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, conflicts_with_all = ["from", "to"])]
    pub around: Option<String>,
    /// Those that ended at this time or later
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub from: Option<String>,
    /// Those that ended at this time or earlier
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub to: Option<String>,
    /// The time zone of times that are written without one, such as `Europe/Berlin` or `+01:00`
    #[arg(long, value_name = "ZONE", allow_hyphen_values = true)]
    pub tz: Option<String>,
    /// This transaction, or the one that this subtransaction belonged to
    #[arg(long)]
    pub xid: Option<u32>,
    /// Those that touched this relation: `name`, `schema.name`, `database.schema.name`, or `tablespace/database/file`
    #[arg(long, value_name = "RELATION")]
    pub relation: Vec<String>,
    /// Those that were any of these
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = kind)]
    pub kind: Vec<Kinds>,
    /// Those that were rolled back, too
    #[arg(long)]
    pub aborted: bool,
    /// So many at most: the earliest where --from is given, the nearest to --around, else the newest
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
    /// On the way to this timeline: its number (`2`), exactly this branch (`00000002`, `00000002.1`), `latest`, or `current`, the
    /// one of the newest base backup
    #[arg(long, value_name = "TIMELINE", default_value = "latest")]
    pub timeline: TimelineChoice,
}

fn kind(text: &str) -> Result<Kinds, String> {
    let names = || Kinds::ALL.map(|(name, _)| name).join(", ");
    Kinds::named(text).ok_or_else(|| format!("it is one of {}", names()))
}

/// What `--json` says.
#[derive(Debug, Serialize)]
struct Document<'a> {
    repository: &'a str,
    cluster: String,
    branch: Branch,
    transactions: Vec<Transaction>,
    restore_points: Vec<RestorePoint>,
    parameter_changes: Vec<ParameterChange>,
    /// There are more than `--limit`.
    more: bool,
    /// WAL on the way that has an index; bytes of index and of WAL that were read.
    indexed_bytes: u64,
    index_bytes_read: u64,
    wal_bytes_read: u64,
    /// What could not be read.
    remarks: &'a [String],
    /// Repositories that do not answer.
    away: &'a [Away],
}

#[derive(Debug, Serialize)]
struct Transaction {
    xid: u32,
    time: Option<Timestamp>,
    /// The record that ended it, and its first one.
    lsn: Option<Lsn>,
    first_lsn: Lsn,
    branch: Branch,
    aborted: bool,
    prepared: bool,
    subtransactions: usize,
    bytes: u64,
    kinds: Vec<&'static str>,
    relations: Vec<Relation>,
    /// Changes to relations that were too many to tell apart.
    others: u64,
    /// Not everything it did is here.
    incomplete: bool,
    /// Stop here, exclusively, and nothing of it is seen.
    stop_before: Option<Lsn>,
    /// The same as it is typed.
    restore_arguments: Option<String>,
}

#[derive(Debug, Serialize)]
struct RestorePoint {
    name: String,
    time: Timestamp,
    lsn: Lsn,
    branch: Branch,
    /// What stops at it, whatever else has its name.
    restore_arguments: String,
}

/// The settings from a position on that a restored server must not have lower.
#[derive(Debug, Serialize)]
struct ParameterChange {
    /// Of the transaction that ended before it, if that is known: the record has none.
    time_of_transaction_before: Option<Timestamp>,
    lsn: Lsn,
    branch: Branch,
    parameters: Parameters,
    /// What stops just before it.
    restore_arguments: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Relation {
    /// `None`: not known.
    name: Option<Called>,
    /// Tablespace, database and file, or what else is known by its number.
    number: String,
    inserts: u64,
    updates: u64,
    deletes: u64,
    created: bool,
    dropped: bool,
    truncated: bool,
    locked: bool,
    catalog: bool,
    #[serde(skip)]
    changes: Changes,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let tz = args.tz.as_deref().map(target::parse_zone).transpose().map_err(CliError::usage)?;
    let zone = tz.clone().unwrap_or_else(TimeZone::system);
    let reading = TargetReading { now: Timestamp::now(), local: TimeZone::system(), tz };
    let instant = |text: &Option<String>, option: &str| -> Result<Option<PgTimestamp>, CliError> {
        let Some(text) = text else { return Ok(None) };
        match Target::parse(text, false, &reading).map_err(CliError::usage)?.point {
            Point::Time(instant) => Ok(Some(PgTimestamp::from_timestamp(instant))),
            _ => Err(CliError::usage(anyhow::anyhow!("{option} {text:?} is no time"))),
        }
    };
    let kinds = args.kind.iter().copied().reduce(Kinds::and);
    let mut query = Query {
        around: instant(&args.around, "--around")?,
        from: instant(&args.from, "--from")?,
        to: instant(&args.to, "--to")?,
        xid: args.xid,
        touched: None,
        kinds,
        name: None,
        index_only: false,
        aborted: args.aborted || args.xid.is_some() || kinds.is_some_and(|kinds| kinds.meets(Kinds::ABORTED)),
        limit: usize::try_from(args.limit).unwrap_or(usize::MAX),
    };
    let place = Place::of(context).await?;
    let mut names = place.repository.relation_names(&place.inventory.id).await.map_err(open::repository_error)?;
    if !args.relation.is_empty() {
        query.touched = Some(touched(&args.relation, &names)?);
    }
    let tip = tip(&place.inventory, args.timeline)?;
    let found = place.repository.search_log(&place.inventory, tip, &query).await.map_err(open::repository_error)?;
    for logged in found.transactions.iter().filter(|logged| !logged.kinds.meets(Kinds::ABORTED)) {
        let at = logged.part.end.as_ref().map_or(logged.part.first, |end| end.start);
        let gone = logged.part.touched.iter().filter(|(_, changes)| changes.is(marks::DROPPED));
        gone.for_each(|(what, _)| names.dropped(*what, at));
    }
    let timeline = match args.timeline {
        TimelineChoice::Latest => String::new(), // what `restore` follows by itself
        _ => format!(" --timeline {tip}"),
    };
    let transactions: Vec<Transaction> =
        found.transactions.iter().map(|logged| transaction(logged, &names, &timeline)).collect();
    let (restore_points, parameter_changes) = landmarks(&found.landmarks, &timeline);
    if !context.output.is_json() {
        let mut entries: Vec<(Lsn, Vec<String>)> = Vec::new();
        for (shown, logged) in transactions.iter().zip(&found.transactions) {
            entries.push((shown.lsn.unwrap_or_default(), transaction_lines(shown, logged, &zone)));
        }
        entries.extend(restore_points.iter().map(|point| (point.lsn, restore_point_lines(point, &zone))));
        entries.extend(parameter_changes.iter().map(|change| (change.lsn, parameter_lines(change))));
        entries.sort_by_key(|(lsn, _)| *lsn);
        entries.iter().flat_map(|(_, lines)| lines).for_each(|line| context.output.line(line));
        notes(context, &place, &found, entries.is_empty(), !names.is_empty());
    }
    let is_empty = found.transactions.is_empty() && found.landmarks.is_empty();
    context.output.document(&Document {
        repository: place.repository.name(),
        cluster: place.inventory.id.to_string(),
        branch: tip,
        more: found.more,
        indexed_bytes: found.indexed,
        index_bytes_read: found.index_read,
        wal_bytes_read: found.wal_read,
        remarks: &found.remarks,
        away: &place.away,
        transactions,
        restore_points,
        parameter_changes,
    });
    Ok(if is_empty { Exit::No } else { Exit::Done })
}

/// The branch whose way is searched.
fn tip(inventory: &ClusterInventory, choice: TimelineChoice) -> Result<Branch, CliError> {
    let branch = match choice {
        TimelineChoice::Latest => return newest(inventory),
        TimelineChoice::Current => match inventory.backups.last() {
            Some(newest) => newest.branch,
            None => {
                return Err(CliError::new(Exit::No, anyhow::anyhow!("there is no base backup of this cluster yet")));
            }
        },
        TimelineChoice::Number(timeline) => Branch::first(timeline),
        TimelineChoice::Branch(branch) => branch,
    };
    if inventory.branches.contains_key(&branch) {
        return Ok(branch);
    }
    let known: Vec<String> = inventory.branches.keys().map(Branch::to_string).collect();
    let error = anyhow::anyhow!("there is no WAL of branch {branch}");
    Err(CliError::usage(error).hint(format!("there is WAL of {}", known.join(", "))))
}

/// Where the transactions are sought.
struct Place {
    repository: Repository,
    inventory: ClusterInventory,
    away: Vec<Away>,
}

impl Place {
    /// The first repository that answers and holds the cluster; one beside us before others.
    async fn of(context: &Context) -> Result<Place, CliError> {
        let config = context.config()?;
        let from = config.read_from_any(context.cluster_name(), context.repository_name())?;
        let several = open_all(&from.repositories).await?;
        let (mut open_ones, mut away) = (several.open, several.away);
        open_ones.sort_by_key(|(_, local)| !local);
        let alone = from.repositories.len() == 1;
        let mut missing = None;
        for (repository, _) in open_ones {
            let found: Result<ClusterId, RestoreError> = find_cluster(&repository, from.cluster.as_ref()).await;
            let loaded = match found {
                Ok(id) => repository.load(&id).await.map_err(RestoreError::Repository),
                Err(error) => Err(error),
            };
            match loaded {
                Ok(inventory) => return Ok(Place { repository, inventory, away }),
                Err(error @ RestoreError::NoCluster { .. }) if !alone => missing = Some(error),
                Err(error) if error.is_retryable() && !alone => {
                    away.push(Away { repository: repository.name().to_owned(), why: error.to_string() });
                }
                Err(error) => return Err(super::plan::restore_error(error)),
            }
        }
        Err(missing.map_or_else(|| CliError::failed(none_answers(&away)), super::plan::restore_error))
    }
}

/// The branch of the newest timeline that has any WAL; of several the first.
fn newest(inventory: &ClusterInventory) -> Result<Branch, CliError> {
    let with_wal = inventory.branches.values().filter(|branch| !branch.pieces.is_empty()).map(|branch| branch.branch);
    let newest = with_wal.max_by_key(|branch| (branch.timeline, std::cmp::Reverse(branch.ordinal)));
    newest.ok_or_else(|| CliError::new(Exit::No, anyhow::anyhow!("nothing is archived of this cluster yet")))
}

/// What `--relation` means.
fn touched(texts: &[String], names: &Names) -> Result<HashSet<Touched>, CliError> {
    let mut all = HashSet::new();
    for text in texts {
        let numbers: Vec<u32> = text.split('/').map_while(|number| number.parse().ok()).collect();
        if let ([tablespace, database, number], 2) = (numbers.as_slice(), text.matches('/').count()) {
            let file = RelFile { tablespace: *tablespace, database: *database, number: *number };
            all.insert(Touched::File(file));
            continue;
        }
        let known = names.named(text);
        if known.is_empty() {
            let error = anyhow::anyhow!("no relation called {text:?} is known");
            let hint =
                "names are noted with each base backup; what came later goes by its numbers: tablespace/database/file";
            return Err(CliError::new(Exit::No, error).hint(hint));
        }
        all.extend(known);
    }
    Ok(all)
}

fn number(what: &Touched) -> String {
    match what {
        Touched::File(RelFile { tablespace, database, number }) => format!("{tablespace}/{database}/{number}"),
        Touched::Relation { database, oid } => format!("relation {oid} of database {database}"),
        Touched::Database(oid) => format!("database {oid}"),
        Touched::Tablespace(oid) => format!("tablespace {oid}"),
    }
}

/// `timeline`: what is said besides, to follow the same way.
fn landmarks(found: &[Passed], timeline: &str) -> (Vec<RestorePoint>, Vec<ParameterChange>) {
    let (mut restore_points, mut parameter_changes) = (Vec::new(), Vec::new());
    for Passed { landmark, branch, time } in found {
        let (lsn, branch) = (landmark.start, *branch);
        match &landmark.what {
            LandmarkKind::RestorePoint { name, time } => restore_points.push(RestorePoint {
                name: name.clone(),
                time: time.to_timestamp(),
                lsn,
                branch,
                restore_arguments: format!("--to {lsn}{timeline}"),
            }),
            LandmarkKind::Parameters(parameters) => parameter_changes.push(ParameterChange {
                time_of_transaction_before: time.map(PgTimestamp::to_timestamp),
                lsn,
                branch,
                parameters: *parameters,
                restore_arguments: format!("--to {lsn} --exclusive{timeline}"),
            }),
        }
    }
    (restore_points, parameter_changes)
}

fn restore_point_lines(point: &RestorePoint, zone: &TimeZone) -> Vec<String> {
    let time = time_in(point.time, zone);
    vec![
        format!("{time}  {}  restore point {:?}", point.lsn, point.name),
        format!("    just after it: {}", point.restore_arguments),
    ]
}

fn parameter_lines(change: &ParameterChange) -> Vec<String> {
    let p = &change.parameters;
    let level = match p.wal_level {
        WalLevel::Minimal => "minimal",
        WalLevel::Replica => "replica",
        WalLevel::Logical => "logical",
    };
    vec![
        format!("{}  parameters: wal_level = {level}, max_connections = {}", change.lsn, p.max_connections),
        format!(
            "    max_worker_processes = {}, max_wal_senders = {}, max_prepared_transactions = {}, \
             max_locks_per_transaction = {}",
            p.max_worker_processes, p.max_wal_senders, p.max_prepared_transactions, p.max_locks_per_transaction
        ),
        format!("    just before it: {}", change.restore_arguments),
    ]
}

/// `timeline`: as for [`landmarks`].
fn transaction(logged: &Logged, names: &Names, timeline: &str) -> Transaction {
    let part = &logged.part;
    let end = part.end.as_ref();
    let at = end.map_or(part.first, |end| end.start);
    let stop_before = part.stop_before();
    let relation = |(what, changes): &(Touched, Changes)| Relation {
        name: names.of(what, at).cloned(),
        number: number(what),
        inserts: changes.inserts,
        updates: changes.updates,
        deletes: changes.deletes,
        created: changes.is(marks::CREATED),
        dropped: changes.is(marks::DROPPED),
        truncated: changes.is(marks::TRUNCATED),
        locked: changes.is(marks::LOCKED),
        catalog: what.is_catalog(),
        changes: *changes,
    };
    Transaction {
        xid: part.xid,
        time: end.map(|end| end.time.to_timestamp()),
        lsn: end.map(|end| end.start),
        first_lsn: part.first,
        branch: logged.branch,
        aborted: end.is_some_and(|end| end.aborted),
        prepared: end.is_some_and(|end| end.prepared),
        subtransactions: end.map_or(0, |end| end.subxids.len()),
        bytes: part.bytes,
        kinds: logged.kinds.names().collect(),
        relations: part.touched.iter().map(relation).collect(),
        others: part.others,
        incomplete: part.incomplete || logged.reaches_back || part.others > 0,
        stop_before,
        restore_arguments: stop_before.map(|lsn| format!("--to {lsn} --exclusive{timeline}")),
    }
}

/// What a person wants to know of the relations: tables by name, what was done to each once.
fn relation_lines(transaction: &Transaction, kinds: Kinds) -> Vec<String> {
    let mut lines: BTreeMap<String, Changes> = BTreeMap::new();
    for relation in transaction.relations.iter().filter(|relation| !relation.catalog) {
        let name = match &relation.name {
            Some(Called { kind: 'i' | 'I' | 't', .. }) => continue,
            Some(Called { kind: 'D', name, .. }) => format!("database {name}"),
            Some(Called { database, schema, name, .. }) => format!("{schema}.{name} in {database}"),
            // Of a table that is not known both its lock and its file are told; the file says more.
            None if relation.number.starts_with("relation") => continue,
            None if relation.changes.marks == marks::PAGES && relation.changes.rows() == 0 => continue,
            None => relation.number.clone(),
        };
        let sum = lines.entry(name).or_default();
        sum.inserts += relation.inserts;
        sum.updates += relation.updates;
        sum.deletes += relation.deletes;
        sum.marks |= relation.changes.marks;
    }
    lines.into_iter().map(|(name, changes)| format!("{name}: {}", words(&changes, kinds))).collect()
}

fn words(changes: &Changes, kinds: Kinds) -> String {
    let mut words = Vec::new();
    for (rows, word) in [(changes.inserts, "inserted"), (changes.updates, "updated"), (changes.deletes, "deleted")] {
        if rows > 0 {
            words.push(format!("{rows} {word}"));
        }
    }
    let only = |kind: Kinds| kinds.meets(kind) && !kinds.meets(Kinds::DROP);
    match () {
        () if changes.is(marks::TRUNCATED) => words.push("truncated".to_owned()),
        () if changes.is(marks::CREATED) && changes.is(marks::DROPPED) => words.push("created and dropped".to_owned()),
        () if changes.is(marks::CREATED) => words.push("created".to_owned()),
        () if changes.is(marks::DROPPED) && only(Kinds::TRUNCATE) => words.push("truncated".to_owned()),
        () if changes.is(marks::DROPPED) && only(Kinds::REWRITE) => words.push("rewritten".to_owned()),
        () if changes.is(marks::DROPPED) => words.push("dropped".to_owned()),
        () if changes.is(marks::LOCKED) => words.push("locked".to_owned()),
        () if words.is_empty() => words.push("pages written".to_owned()),
        () => {}
    }
    words.join(", ")
}

fn transaction_lines(shown: &Transaction, logged: &Logged, zone: &TimeZone) -> Vec<String> {
    let time = shown.time.map(|time| time_in(time, zone)).unwrap_or_default();
    let what = if shown.kinds.is_empty() { "no rows".to_owned() } else { shown.kinds.join(", ") };
    let lsn = shown.lsn.unwrap_or_default();
    let mut lines = vec![format!("{time}  {lsn}  xid {}  {}  {what}", shown.xid, bytes(shown.bytes))];
    lines.extend(relation_lines(shown, logged.kinds).into_iter().map(|line| format!("    {line}")));
    if shown.others > 0 {
        lines.push(format!("    and {} to other relations", count(shown.others, "change")));
    }
    if logged.reaches_back || logged.part.incomplete {
        lines.push("    it did more before, which is not counted here".to_owned());
    }
    if let Some(arguments) = &shown.restore_arguments {
        lines.push(format!("    just before it: {arguments}"));
    }
    lines
}

/// What has to be said about the answer as a whole.
fn notes(context: &Context, place: &Place, found: &Found, is_empty: bool, names_known: bool) {
    match (is_empty, found.more) {
        (true, _) => context.output.line("Nothing is what was asked for."),
        (_, true) => context.output.note("There are more: --limit shows more of them."),
        (_, false) => {}
    }
    for remark in &found.remarks {
        context.output.note(format!("warning: {remark}"));
    }
    for away in &place.away {
        context.output.note(format!("Repository {} is left out: {}", away.repository, away.why));
    }
    if !names_known && !found.transactions.is_empty() {
        context.output.note("No names of relations were noted yet: `pgkeep backup` does it.");
    }
    if found.wal_read > found.indexed / 8 + (1 << 30) {
        context.output.note(format!(
            "{} of WAL had to be read for want of an index: `pgkeep index rebuild` makes it.",
            bytes(found.wal_read)
        ));
    }
}
