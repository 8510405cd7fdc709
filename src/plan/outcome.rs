//! What planning ends with: a plan, or the reason why there is none. Plain values; [`super::explain`] puts them in words.

use std::fmt;

use jiff::Timestamp;
use serde::{Serialize, Serializer};

use super::chain::KnownBranch;
use super::estimate::{Estimate, Sample, estimate};
use super::search::{Located, StopAt, TransactionEnd};
use super::target::Target;
use crate::catalog::records::{BackupInfo, Manifest, ServerParameters};
use crate::types::{Branch, ClusterId, Id128, Lsn, TimelineHistory, TimelineId};

/// What has to be done to reach a target. Whoever has one can restore: everything it names was there.
#[derive(Debug, Clone, Serialize)]
pub struct RestorePlan {
    /// Which cluster.
    #[serde(serialize_with = "by_text")]
    pub cluster: ClusterId,
    /// The target as it was understood.
    pub target: Target,
    /// The base backup to unpack.
    pub base: BackupInfo,
    /// Where recovery stops.
    pub stop: Stop,
    /// Where the transaction or restore point is that was asked for; `None` for other targets.
    pub located: Option<Located>,
    /// `recovery_target_timeline`, always a number.
    pub target_timeline: TimelineId,
    /// The branches that recovery follows, oldest first: what `wal fetch` is told.
    pub path: Vec<PathPart>,
    /// The ancestry of `target_timeline`; of timeline 1 it is empty, of any other its history file has to be served.
    #[serde(serialize_with = "history_text")]
    pub history: TimelineHistory,
    /// What must not be lower than this in the restored server's configuration: the maximum from the base backup to the stop.
    pub parameters: ServerParameters,
    /// The WAL that recovery reads.
    pub wal: Vec<WalNeed>,
    /// What has to be fetched.
    pub fetch: Fetch,
    /// Ids of the content keys that open it, as far as known: [`RestorePlan::knows_keys`].
    pub keys: Vec<Id128>,
    /// What was looked at so that this is no guess.
    pub proof: Proof,
    /// How long it may take; `None` until it was asked for: [`RestorePlan::knows_speed`].
    pub estimate: Option<Estimate>,
    /// The last commit that will be there. `None`: none lies between the base backup's start and the stop.
    pub last_included: Option<TransactionEnd>,
    /// The first commit that will not. `None`: none is archived shortly behind the stop.
    pub first_excluded: Option<TransactionEnd>,
    /// The oldest place that can be reached on this path.
    pub earliest: Option<Reachable>,
    /// The newest place that can be reached on this path, as far as this search saw.
    pub newest: Option<Reachable>,
    /// What a person should know before saying yes.
    pub warnings: Vec<String>,
}

/// What was seen to be there before a plan was handed out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Proof {
    /// Bytes of WAL of which every record was read and its checksum found right, up to the stop.
    pub wal_bytes_checked: u64,
    /// Objects of the base backup, its manifest among them, that opened: header, length and footer under the content key.
    pub base_objects_opened: u64,
    /// The history files of the way, oldest first.
    pub histories: Vec<HistoryFile>,
}

/// A history file on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct HistoryFile {
    /// Whose.
    pub branch: Branch,
    /// It is in the repository; else a descendant's tells what it said.
    pub is_there: bool,
}

/// Where recovery stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Stop {
    /// `recovery_target_lsn` and `recovery_target_inclusive`.
    At(StopAt),
    /// `recovery_target = 'immediate'`.
    Immediate,
}

/// A branch on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PathPart {
    /// The branch.
    pub branch: Branch,
    /// Where it begins.
    pub from: Lsn,
    /// Where the way leaves it; `None` for the last one.
    pub to: Option<Lsn>,
}

/// WAL to be read from one branch's objects: whole segments, but for the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct WalNeed {
    /// Whose objects. At a fork the child's, whose copy of the segment holds its parent's bytes.
    pub branch: Branch,
    /// First byte.
    pub from: Lsn,
    /// First byte that is not needed.
    pub to: Lsn,
    /// How many segments.
    pub segments: u64,
}

/// Sizes and counts of what a restore fetches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Fetch {
    /// Bytes of the base backup's files.
    pub base_bytes: u64,
    /// Sealed bytes of its packs; `None` until the manifest was read ([`RestorePlan::knows_manifest`]).
    pub base_stored_bytes: Option<u64>,
    /// Bytes of content in its packs that it uses: without blocks of zeros; `None` until the manifest was read.
    pub base_content_bytes: Option<u64>,
    /// Objects of the base backup; `None` until the manifest was read.
    pub base_objects: Option<u64>,
    /// Bytes of WAL.
    pub wal_bytes: u64,
    /// Sealed bytes of the objects that hold it.
    pub wal_stored_bytes: u64,
    /// How many objects hold it.
    pub wal_objects: u64,
    /// Objects in all, at one request each; packs are at least one.
    pub requests: u64,
}

impl RestorePlan {
    /// Adds what only the base backup's manifest tells: sizes and requests.
    pub fn knows_manifest(&mut self, manifest: &Manifest) {
        let parts = manifest.tables.iter().chain(&manifest.server_manifest);
        let lens = manifest.packs.iter().map(|pack| pack.len).chain(parts.map(|part| part.len));
        let (objects, stored) = lens.fold((1, 0u64), |(count, bytes), len| (count + 1, bytes.saturating_add(len)));
        self.fetch.base_objects = Some(objects);
        self.fetch.base_stored_bytes = Some(stored);
        self.fetch.base_content_bytes =
            Some(manifest.packs.iter().fold(0, |sum: u64, pack| sum.saturating_add(pack.live)));
        self.fetch.requests = self.fetch.wal_objects + objects;
        self.proof.base_objects_opened = objects;
    }

    /// Adds how long it may take, by what was read to measure it, and by the bytes of WAL a second that a drill replayed.
    pub fn knows_speed(&mut self, sample: Option<Sample>, replayed: Option<u64>) {
        let base = self.fetch.base_content_bytes.unwrap_or(self.fetch.base_bytes);
        self.estimate = Some(estimate(base, self.fetch.wal_bytes, sample, replayed));
    }

    /// Adds the content keys that were met in headers.
    pub fn knows_keys(&mut self, keys: impl IntoIterator<Item = Id128>) {
        self.keys.extend(keys);
        self.keys.sort_unstable();
        self.keys.dedup();
    }
}

/// A place that recovery can stop at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reachable {
    /// The instant, where it is known.
    pub time: Option<Timestamp>,
    /// The position.
    pub lsn: Lsn,
    /// On which branch.
    pub branch: Branch,
    /// What to pass to `--to`.
    pub to: String,
}

/// Which "no" it is, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoKind {
    /// There is no base backup that may be used.
    NoBackup,
    /// The timeline asked for is not there.
    UnknownTimeline,
    /// Two histories have that timeline number, and the target lies in only one of them.
    AmbiguousTimeline,
    /// A timeline's history file is missing.
    MissingHistory,
    /// The target lies before the first base backup on the path is consistent.
    BeforeFirstBackup,
    /// The target lies after the newest WAL on the path.
    AfterNewest,
    /// WAL between a base backup and the target is missing.
    MissingWal,
    /// No such transaction or restore point.
    NotFound,
    /// The transaction is a subtransaction.
    Subtransaction,
    /// WAL on the way was written with `wal_level = minimal`.
    MinimalWal,
}

/// The answer is no: nothing was written, and asking again gives the same answer until the repository changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
pub struct PlanError {
    /// Which "no".
    pub kind: NoKind,
    /// Why, in words.
    pub reason: String,
    /// Where the transaction or restore point is that was asked for, if it was met.
    pub located: Option<Located>,
    /// The nearest place before the target.
    pub before: Option<Reachable>,
    /// The nearest place after the target.
    pub after: Option<Reachable>,
    /// The oldest place that can be reached on this path.
    pub earliest: Option<Reachable>,
    /// The newest place that can be reached on this path, as far as it is known.
    pub newest: Option<Reachable>,
    /// What else may help, a sentence each.
    pub hints: Vec<String>,
    /// The branches there are, where the choice of a timeline matters.
    pub branches: Vec<KnownBranch>,
}

impl PlanError {
    pub(super) fn new(kind: NoKind, reason: impl Into<String>) -> PlanError {
        PlanError {
            kind,
            reason: reason.into(),
            located: None,
            before: None,
            after: None,
            earliest: None,
            newest: None,
            hints: Vec::new(),
            branches: Vec::new(),
        }
    }

    /// Never: only new WAL or another target changes the answer.
    pub fn is_retryable(&self) -> bool {
        match self.kind {
            NoKind::NoBackup
            | NoKind::UnknownTimeline
            | NoKind::AmbiguousTimeline
            | NoKind::MissingHistory
            | NoKind::BeforeFirstBackup
            | NoKind::AfterNewest
            | NoKind::MissingWal
            | NoKind::NotFound
            | NoKind::Subtransaction
            | NoKind::MinimalWal => false,
        }
    }
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        for (word, place) in [("before", &self.before), ("after", &self.after)] {
            if let Some(place) = place {
                write!(f, "; nearest place {word} it: --to {:?}", place.to)?;
            }
        }
        Ok(())
    }
}

fn by_text<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn history_text<S: Serializer>(history: &TimelineHistory, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&history.to_text())
}
