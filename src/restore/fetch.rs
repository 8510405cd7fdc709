//! `wal fetch`: what `restore_command` is answered (P7).
//!
//! [`decide`] is the decision, over values: where a request is looked for, and what the answer means. This file asks the
//! repositories and writes the file.
//!
//! Where several repositories hold the cluster they are asked in order, and what any of them has is served. "Not there",
//! and anything less than what is wanted, is said only after every one of them answered: one that is down, or does not
//! open what it has, may hold more.
//!
//! What always holds: "not there" is said only when the repository answered so, nothing later of that branch is there,
//! and recovery does not need the segment to stay on its way. Whatever else happens is an error, which stops recovery:
//! a shorter history is never promoted, and a parent never followed past a fork. Nothing is kept between two requests.
//! Memory: one segment.
//! Crash and cancellation: the destination is there whole, verified and synced, or not at all. What a killed fetch may
//! leave beside it is a file called `.pgkeep-…`, which a later fetch removes.

pub mod ahead;
pub mod decide;
mod pool;
pub mod prefetch;
pub mod spool;
pub mod standby;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use self::decide::{Ask, Branches, Held, Located, Refusal, Step, Verdict};
use self::pool::Pool;
pub use self::pool::{OnePlace, Places};
use crate::catalog::CatalogError;
use crate::pg::control_file::{ControlFile, ControlFileError};
use crate::types::{
    Branch, ClusterId, ClusterName, Lsn, ParseError, SegmentNumber, SegmentSize, SystemId, TimelineHistory, TimelineId,
    WalFileName,
};
use crate::wal::{WalDamage, pad_open_segment};

/// How long the request is repeated while a repository is down that may have the answer.
const AWAY_PATIENCE: Duration = Duration::from_secs(10);
const AWAY_PAUSE: Duration = Duration::from_millis(500);
/// How long a hole is watched before it is called one: while WAL arrives fast, pieces of the next segment may be there a
/// moment before the last of this one.
const HOLE_PATIENCE: Duration = Duration::from_secs(10);
const HOLE_PAUSE: Duration = Duration::from_millis(200);
/// Longer than that a standby is not kept from streaming.
const STANDBY_DEADLINE: Duration = Duration::from_secs(60);
/// PostgreSQL replaces `pg_control` in place: a read may meet it half written.
const CONTROL_FILE_TRIES: u32 = 10;
const CONTROL_FILE_PAUSE: Duration = Duration::from_millis(20);
/// What we write until it is whole.
const TEMPORARY_PREFIX: &str = ".pgkeep-";
/// A temporary file of this age belongs to a fetch that was killed.
const ABANDONED_AFTER: Duration = Duration::from_secs(3600);

/// Which WAL recovery wants, as `restore` wrote it into the command.
#[derive(Debug, Clone, Default)]
pub struct Way {
    /// The branches to the target, oldest first. Empty: the first branch of whatever timeline is asked for.
    pub path: Vec<Step>,
    /// Serve no WAL from this position on.
    pub until: Option<Lsn>,
    /// For a standby that follows the newest timeline: its pg_wal, where its own history files lie.
    pub standby: Option<PathBuf>,
}

/// The answer to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    /// The file is at its destination.
    Served,
    /// The repository does not have it, and nothing that follows it.
    NotThere,
}

/// Why recovery has to stop.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Not a name that PostgreSQL asks for.
    #[error("{0}; hint: restore_command hands over the name as %f and the destination as %p")]
    Name(ParseError),
    /// The answer would be wrong: neither the file nor "not there".
    #[error("{name} is not served: {refusal}")]
    Refused {
        /// What was asked for.
        name: String,
        /// Why.
        refusal: Refusal,
    },
    /// The repository.
    #[error(transparent)]
    Repository(#[from] CatalogError),
    /// A repository that cannot be opened.
    #[error("repository {repository}: {why}")]
    Open {
        /// Its name.
        repository: String,
        /// Why not.
        why: String,
        /// Whether another try may help.
        retryable: bool,
    },
    /// Not every repository could be asked, and the others do not have it.
    #[error(
        "{name} is not served: {missing}, and the other repositories do not have all of it. Recovery stops here, because that \
         is not the end of the WAL; hint: start the server again when all repositories answer"
    )]
    Away {
        /// What was asked for.
        name: String,
        /// Who could not be asked, and why.
        missing: String,
    },
    /// What is archived cannot be read as WAL.
    #[error("{name} as it is archived cannot be read: {source}")]
    Damage {
        /// What was asked for.
        name: String,
        /// What is wrong, and where.
        source: WalDamage,
    },
    /// A history file that opens and is none.
    #[error("{name} as it is archived cannot be read: {source}")]
    History {
        /// What was asked for.
        name: String,
        /// What is wrong.
        source: ParseError,
    },
    /// Nothing of this cluster is in the repository.
    #[error("repository {repository} holds nothing of {wanted}; hint: {hint}")]
    NoCluster {
        /// The repository.
        repository: String,
        /// Which cluster was sought.
        wanted: String,
        /// What to do.
        hint: String,
        /// Several could be meant.
        several: bool,
    },
    /// The segment size is unknown.
    #[error(
        "cannot tell the size of the segments of {cluster}: nothing of timeline {timeline} is archived, and there is no \
         global/pg_control here; hint: restore_command runs in the data directory; by hand, run `pgkeep wal fetch` there, too"
    )]
    NoSegmentSize {
        /// The cluster.
        cluster: ClusterId,
        /// The timeline that was asked for.
        timeline: TimelineId,
    },
    /// The control file is there and cannot be understood.
    #[error("{}: {source}", path.display())]
    ControlFile {
        /// The control file.
        path: PathBuf,
        /// Why.
        source: ControlFileError,
    },
    /// The destination, or the control file, on the server's disk.
    #[error("could not {doing} {}: {source}", path.display())]
    Disk {
        /// A verb.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A task of ours ended abnormally.
    #[error("a task of wal fetch ended abnormally: {0}")]
    Task(String),
}

impl FetchError {
    /// May another attempt succeed without anybody doing anything?
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Repository(error) => error.is_retryable(),
            Self::Disk { .. } | Self::ControlFile { .. } | Self::Task(_) | Self::Away { .. } => true,
            Self::Open { retryable, .. } => *retryable,
            Self::Name(_)
            | Self::Refused { .. }
            | Self::Damage { .. }
            | Self::History { .. }
            | Self::NoCluster { .. }
            | Self::NoSegmentSize { .. } => false,
        }
    }
}

/// What the data directory says of its cluster.
#[derive(Debug, Clone, Copy)]
pub struct Local {
    /// Its system identifier.
    pub system: SystemId,
    /// Its segment size.
    pub size: SegmentSize,
}

/// Reads `global/pg_control` below `data`; `None` where there is none, because a person tries the command by hand.
pub fn local(data: &Path) -> Result<Option<Local>, FetchError> {
    let path = data.join("global/pg_control");
    let mut tries = 0;
    loop {
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(FetchError::Disk { doing: "read", path, source }),
        };
        tries += 1;
        match ControlFile::parse(&bytes) {
            Ok(control) => return Ok(Some(Local { system: control.system, size: control.segment_size })),
            Err(_) if tries < CONTROL_FILE_TRIES => std::thread::sleep(CONTROL_FILE_PAUSE),
            Err(source) => return Err(FetchError::ControlFile { path, source }),
        }
    }
}

/// Answers one request: `name` to `dest`. `cluster`: its name in the repositories, `None` where they hold a single one.
pub async fn fetch(
    places: &dyn Places,
    cluster: Option<&ClusterName>,
    local: Option<Local>,
    way: &Way,
    name: &str,
    dest: &Path,
) -> Result<Fetched, FetchError> {
    let patience = Instant::now() + AWAY_PATIENCE;
    let bytes = loop {
        let pool = Pool::new(places, cluster, local);
        let request = Request { pool: &pool, local, way, name, patience: HOLE_PATIENCE };
        match request.bytes().await {
            Err(error @ FetchError::Away { .. }) if Instant::now() < patience => {
                tracing::info!("{error}; trying again");
                tokio::time::sleep(AWAY_PAUSE).await;
            }
            bytes => break bytes?,
        }
    };
    let Some(bytes) = bytes else { return Ok(Fetched::NotThere) };
    let dest = dest.to_owned();
    let written = tokio::task::spawn_blocking(move || write(&dest, &bytes));
    written.await.map_err(|error| FetchError::Task(error.to_string()))??;
    Ok(Fetched::Served)
}

/// Answers one request of a standby, which follows the newest timeline ([`standby`]): as [`fetch`], but a fault is "not there",
/// for now.
///
/// # Errors
/// Only for a name that is none.
pub async fn fetch_for_standby(
    places: &dyn Places,
    cluster: Option<&ClusterName>,
    local: Option<Local>,
    way: &Way,
    name: &str,
    dest: &Path,
) -> Result<Fetched, FetchError> {
    let answer = tokio::time::timeout(STANDBY_DEADLINE, fetch(places, cluster, local, way, name, dest)).await;
    let fault = match answer {
        Ok(Ok(fetched)) => return Ok(fetched),
        Ok(Err(error @ FetchError::Name(_))) => return Err(error),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("{name}: no answer within {} s", STANDBY_DEADLINE.as_secs()),
    };
    tracing::warn!("{fault}; the standby goes on without {name} for now, and asks again");
    Ok(Fetched::NotThere)
}

struct Request<'a> {
    pool: &'a Pool<'a>,
    local: Option<Local>,
    way: &'a Way,
    name: &'a str,
    /// How long a hole is watched.
    patience: Duration,
}

impl Request<'_> {
    /// What the name asks for; `None`: not there.
    async fn bytes(&self) -> Result<Option<Vec<u8>>, FetchError> {
        match self.name.parse::<WalFileName>().map_err(FetchError::Name)? {
            WalFileName::Segment(_) => self.segment().await,
            WalFileName::History(timeline) => self.history(timeline).await,
            // Recovery never asks for these; whoever does is told that they are no WAL to be replayed.
            WalFileName::Partial(_) | WalFileName::BackupHistory(_) => Ok(None),
        }
    }

    fn refused(&self, refusal: Refusal) -> FetchError {
        FetchError::Refused { name: self.name.to_owned(), refusal }
    }

    // ---- segments

    /// The segment's bytes, whole; `None`: not there.
    async fn segment(&self) -> Result<Option<Vec<u8>>, FetchError> {
        let name = self.name;
        let timeline: TimelineId = name.get(..8).unwrap_or_default().parse().map_err(FetchError::Name)?;
        self.pool.find_cluster().await?;
        let branches = if self.way.path.is_empty() { self.branches().await? } else { Branches::default() };
        let size = self.segment_size(timeline).await?;
        let (_, segment) = SegmentNumber::from_file_name(name, size)
            .ok_or_else(|| FetchError::Name(ParseError::new("the name of a segment of this cluster's size", name)))?;
        if self.way.path.is_empty() {
            return self.without_path(timeline, segment, size, branches).await;
        }
        let history = decide::history_to(&self.way.path, timeline);
        match decide::on_path(timeline, segment, size, &self.way.path, self.way.until) {
            Located::NotThere => Ok(None),
            Located::Refuse(refusal) => Err(self.refused(refusal)),
            Located::Ask(ask) => self.ask(ask, history.as_ref()).await,
        }
    }

    /// The segment, if all of it is there and may be served: what will never change any more. Looks once, and says nothing
    /// about what else there is.
    async fn whole_segment(&self) -> Result<Option<Vec<u8>>, FetchError> {
        let name = self.name;
        let timeline: TimelineId = name.get(..8).unwrap_or_default().parse().map_err(FetchError::Name)?;
        let size = self.segment_size(timeline).await?;
        let Some((_, segment)) = SegmentNumber::from_file_name(name, size) else { return Ok(None) };
        if self.way.until.is_some_and(|until| until < segment.end(size)) {
            return Ok(None);
        }
        let (branch, history) = if self.way.path.is_empty() {
            let several = self.branches().await?.refuse_several(timeline).is_some();
            if several || self.is_left(timeline, segment, size).await? {
                return Ok(None);
            }
            (Branch::first(timeline), None)
        } else {
            match decide::on_path(timeline, segment, size, &self.way.path, self.way.until) {
                Located::Ask(ask) => (ask.branch, decide::history_to(&self.way.path, timeline)),
                Located::NotThere | Located::Refuse(_) => return Ok(None),
            }
        };
        let read = self.pool.read(branch, segment, size, history.as_ref()).await?;
        Ok(read.complete.then_some(read.bytes))
    }

    /// For a server that follows timelines by itself: what is asked for is judged by the archived histories.
    async fn without_path(
        &self,
        timeline: TimelineId,
        segment: SegmentNumber,
        size: SegmentSize,
        branches: Branches,
    ) -> Result<Option<Vec<u8>>, FetchError> {
        if let Some(refusal) = branches.refuse_several(timeline) {
            return Err(self.refused(refusal));
        }
        if self.is_left(timeline, segment, size).await? {
            return Ok(None);
        }
        // The common case first, for which no history has to be read.
        if self.way.until.is_none() {
            let read = self.pool.read(Branch::first(timeline), segment, size, None).await?;
            if read.complete {
                return Ok(Some(read.bytes));
            }
        }
        let histories = self.histories().await?;
        match decide::by_histories(timeline, segment, size, &histories, &branches, self.way.until) {
            // By the histories of those that answered: another may know of one that needs it.
            Located::NotThere => self.pool.all_answered(self.name).map(|()| None),
            Located::Refuse(refusal) => Err(self.refused(refusal)),
            Located::Ask(ask) => self.ask(ask, decide::ancestry(timeline, &histories).as_ref()).await,
        }
    }

    /// Must a standby not be served this timeline's segment, because a newer timeline holds it?
    async fn is_left(
        &self,
        timeline: TimelineId,
        segment: SegmentNumber,
        size: SegmentSize,
    ) -> Result<bool, FetchError> {
        let Some(folder) = &self.way.standby else { return Ok(false) };
        let mut histories = standby::own_histories(folder);
        histories.extend(self.histories().await?);
        Ok(standby::is_left(&histories, timeline, segment, size))
    }

    /// Asks the repositories, and again while the answer looks like a hole.
    async fn ask(&self, ask: Ask, history: Option<&TimelineHistory>) -> Result<Option<Vec<u8>>, FetchError> {
        let patience = Instant::now() + self.patience;
        let start = ask.segment.start(ask.size);
        let wanted_end = ask.until.map_or(ask.segment.end(ask.size), |until| until.min(ask.segment.end(ask.size)));
        loop {
            let read = self.pool.read(ask.branch, ask.segment, ask.size, history).await?;
            let end = start.advance(read.bytes.len() as u64);
            let mut bytes = read.bytes;
            let usable = self.cut(&mut bytes, &ask)?;
            let held = Held { end, usable, more_behind: read.more_behind };
            let verdict = decide::judge(&ask, &held);
            if verdict == Verdict::Serve && held.end >= wanted_end {
                return Ok(Some(bytes));
            }
            // Less than what is wanted: only when nobody is left who may have more.
            self.pool.all_answered(self.name)?;
            match verdict {
                Verdict::Serve => return Ok(Some(bytes)),
                Verdict::NotThere => return Ok(None),
                Verdict::Refuse(Refusal::Hole { .. }) if Instant::now() < patience => {
                    tokio::time::sleep(HOLE_PAUSE).await;
                }
                Verdict::Refuse(refusal) => return Err(self.refused(refusal)),
            }
        }
    }

    /// Makes `bytes` the whole segment as it may be served, and says where its WAL ends then.
    fn cut(&self, bytes: &mut Vec<u8>, ask: &Ask) -> Result<Lsn, FetchError> {
        let start = ask.segment.start(ask.size);
        let allowed = ask.until.and_then(|until| until.bytes_since(start)).unwrap_or(ask.size.bytes());
        bytes.truncate(usize::try_from(allowed).unwrap_or(usize::MAX));
        if bytes.len() as u64 == ask.size.bytes() {
            return Ok(start.advance(ask.size.bytes()));
        }
        let padded = pad_open_segment(bytes, start, ask.size);
        padded.map(|end| end.end).map_err(|source| FetchError::Damage { name: self.name.to_owned(), source })
    }

    async fn segment_size(&self, timeline: TimelineId) -> Result<SegmentSize, FetchError> {
        if let Some(local) = self.local {
            return Ok(local.size);
        }
        let known = self.way.path.iter().find(|step| step.branch.timeline == timeline).map(|step| step.branch);
        let branch = known.unwrap_or(Branch::first(timeline));
        if let Some(size) = self.pool.segment_size(branch).await? {
            return Ok(size);
        }
        self.pool.all_answered(self.name)?;
        let cluster = self.pool.find_cluster().await?;
        Err(FetchError::NoSegmentSize { cluster, timeline })
    }

    async fn branches(&self) -> Result<Branches, FetchError> {
        Ok(Branches(self.pool.branches().await?))
    }

    /// The archived histories of first branches.
    async fn histories(&self) -> Result<BTreeMap<TimelineId, TimelineHistory>, FetchError> {
        let texts = self.pool.histories().await?;
        let first = texts.into_iter().filter(|(branch, _)| branch.ordinal == 0);
        first.map(|(branch, text)| Ok((branch.timeline, parse(branch.timeline, &text)?))).collect()
    }

    // ---- history files

    /// A history file's text; `None`: there is none. Whatever timeline is asked for, on the way or not: the server
    /// chooses the number of its next timeline by what is there.
    async fn history(&self, timeline: TimelineId) -> Result<Option<Vec<u8>>, FetchError> {
        let on_path = self.way.path.iter().find(|step| step.branch.timeline == timeline).map(|step| step.branch);
        let branch = on_path.unwrap_or(Branch::first(timeline));
        self.pool.find_cluster().await?;
        if let Some(text) = self.pool.history(branch).await? {
            parse(timeline, &text)?;
            if self.way.path.is_empty()
                && let Some(refusal) = self.branches().await?.refuse_several(timeline)
            {
                return Err(self.refused(refusal));
            }
            return Ok(Some(text.to_vec()));
        }
        if timeline == TimelineId::FIRST {
            return Ok(None);
        }
        let branches = self.branches().await?;
        let texts = self.pool.histories().await?;
        // Only a second history of this timeline is there. Off the way its number is what matters: it is taken.
        if let Some((_, text)) = texts.iter().find(|(other, _)| other.timeline == timeline) {
            return match self.way.path.is_empty() || on_path.is_some() {
                true => Err(self.refused(Refusal::NoHistory { timeline })),
                false => Ok(Some(text.to_vec())),
            };
        }
        let mut histories = BTreeMap::new();
        for (branch, text) in texts.iter().filter(|(branch, _)| branch.ordinal == 0) {
            histories.insert(branch.timeline, parse(branch.timeline, text)?);
        }
        match decide::missing_history(timeline, on_path, &histories, &branches) {
            decide::MissingHistory::Derived(history) => Ok(Some(history.to_text().into_bytes())),
            decide::MissingHistory::NotThere => self.pool.all_answered(self.name).map(|()| None),
            decide::MissingHistory::Refuse(refusal) => {
                self.pool.all_answered(self.name)?;
                Err(self.refused(refusal))
            }
        }
    }
}

fn parse(timeline: TimelineId, text: &[u8]) -> Result<TimelineHistory, FetchError> {
    TimelineHistory::parse(timeline, text)
        .map_err(|source| FetchError::History { name: format!("{timeline}.history"), source })
}

// ---- the destination

/// Writes the file under a temporary name beside `dest`, syncs it and renames it.
fn write(dest: &Path, bytes: &[u8]) -> Result<(), FetchError> {
    let folder = match dest.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    remove_abandoned(folder);
    let failed = |doing| move |source| FetchError::Disk { doing, path: dest.to_owned(), source };
    let mut file = tempfile::Builder::new()
        .prefix(TEMPORARY_PREFIX)
        .tempfile_in(folder)
        .map_err(failed("create a file beside"))?;
    file.write_all(bytes).map_err(failed("write"))?;
    file.as_file().sync_data().map_err(failed("sync"))?;
    file.persist(dest).map_err(|error| failed("rename a file to")(error.error))?;
    Ok(())
}

/// Removes what killed fetches left; what cannot be removed does no harm.
fn remove_abandoned(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
            continue;
        }
        let age = entry.metadata().and_then(|file| file.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_some_and(|age| age > ABANDONED_AFTER) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests;
