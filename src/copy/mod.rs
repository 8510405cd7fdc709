//! Copies what can be restored from, from one repository into another.
//!
//! [`plan`] decides, over the pictures of both ([`survey`]); [`copy`] acts and decides nothing but what a fault means.
//!
//! What always holds: what is there already is compared before anything of its branch is copied, and a branch on which
//! the two differ is left alone from there on, with every backup on it, so that histories are never mixed (P6). Damage in
//! the source costs the object that it is in, and is named; the rest is copied. A base backup follows its WAL.
//! Crash, cancellation: [`copy`] may be dropped at any await. Whatever it put is whole; planning again finds what is left.
//! Memory: at most [`AT_ONCE_BYTES`] of segments, and what `catalog::copy` says of backups.

mod error;
pub mod plan;
mod window;

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt};
use serde::Serialize;
use tokio::sync::watch;

pub use error::CopyError;
pub use plan::{CopyPlan, Holding, Selection, Step, plan};
pub use window::ends_of_window;

use crate::catalog::records::WalRangeNote;
use crate::catalog::{CatalogError, Put, Repository};
use crate::types::{BackupLabel, Branch, ClusterId, Lsn, SegmentNumber, SegmentSize};

/// Segments under way at a time hold about so many bytes, and at least one is.
pub const AT_ONCE_BYTES: u64 = 128 << 20;
/// Most segments under way at a time.
const AT_ONCE: u64 = 6;
/// Segments that are compared at a time: of each a few small requests.
const COMPARED_AT_ONCE: usize = 8;

/// What is being done; the newest value counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CopyProgress {
    /// In words.
    pub doing: String,
    /// Bytes of the source's objects that were dealt with.
    pub done: u64,
}

/// Why something was not copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// The source's object does not open, contradicts itself, or is gone.
    Damaged,
    /// The target has something else under the name. It stays.
    Conflict,
    /// The key cannot read it, so it cannot be sealed anew.
    Unreadable,
    /// It would be wrong without what another problem kept away.
    Dependent,
}

/// Something that was not copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Which problem.
    pub kind: ProblemKind,
    /// What was not copied.
    pub what: String,
    /// Why not, in words that name the object.
    pub why: String,
}

/// What copying came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Copied {
    /// Segments that are new in the target, also those that are not complete.
    pub segments: u64,
    /// Base backups that are new in the target.
    pub backups: u64,
    /// Other objects that are: history files, gap records, kept files, indexes, names of relations.
    pub others: u64,
    /// Bytes of the objects that were put.
    pub bytes: u64,
    /// What was there with the same content: segments and backups.
    pub there: u64,
    /// What was not copied.
    pub problems: Vec<Problem>,
}

/// The pictures of both repositories; first, that the target is not another cluster's.
///
/// # Errors
/// [`CopyError::ForeignCluster`]; [`CopyError::SegmentSize`]; what the repositories say.
pub async fn survey(from: &Repository, to: &Repository, cluster: &ClusterId) -> Result<(Holding, Holding), CopyError> {
    if from.format().repository == to.format().repository {
        return Err(CopyError::SameRepository { from: from.name().to_owned(), to: to.name().to_owned() });
    }
    to.check_writable()?;
    let there = to.clusters_named(&cluster.name).await?;
    if let Some(other) = there.first().filter(|_| !there.contains(cluster)) {
        return Err(CopyError::ForeignCluster {
            name: cluster.name.to_string(),
            repository: to.name().to_owned(),
            archived: other.system,
            copied: cluster.system,
        });
    }
    let (source, target) = futures_util::try_join!(picture(from, cluster), picture(to, cluster))?;
    if let (Some(one), Some(other)) = (source.inventory.segment_size, target.inventory.segment_size)
        && one != other
    {
        return Err(CopyError::SegmentSize { one, other });
    }
    Ok((source, target))
}

async fn picture(repository: &Repository, cluster: &ClusterId) -> Result<Holding, CatalogError> {
    // Kept files first: what comes meanwhile is copied the next time.
    let kept = repository.kept_files(cluster).await?;
    let inventory = repository.load(cluster).await?;
    let mut indexes = BTreeMap::new();
    for branch in inventory.branches.keys() {
        let ranges = repository.list_indexes(cluster, *branch).await?;
        indexes.extend(ranges.into_iter().map(|range| ((range.branch, range.from, range.to), range)));
    }
    let names = repository.relation_labels(cluster).await?;
    Ok(Holding { inventory, kept, indexes, names })
}

/// Carries out a plan. What could not be copied, and why, stands in [`Copied::problems`].
///
/// # Errors
/// What the repositories say about themselves, or about nothing in particular: what was copied so far is there, and copying
/// again goes on.
pub async fn copy(
    from: &Repository,
    to: &Repository,
    source: &Holding,
    plan: &CopyPlan,
    progress: &watch::Sender<CopyProgress>,
) -> Result<Copied, CopyError> {
    let mut work = Work {
        from,
        to,
        source,
        cluster: &source.inventory.id,
        progress,
        blocked: BTreeSet::new(),
        missing: BTreeSet::new(),
        done: Copied::default(),
    };
    let is_history = |step: &&Step| matches!(step, Step::History { .. });
    for step in plan.steps.iter().filter(is_history) {
        work.small(step).await?;
    }
    if let Some(size) = source.inventory.segment_size {
        work.compare(&plan.compare, size).await?;
        let mut steps = plan.steps.as_slice();
        while let Some(step) = steps.first() {
            let run = steps.iter().take_while(|step| matches!(step, Step::Segment { .. })).count();
            let (now, rest) = steps.split_at(run.max(1)); // invariant: there is one at least
            steps = rest;
            match step {
                Step::History { .. } => {} // done above
                Step::Segment { .. } => work.segments(now, size).await?,
                Step::Open { branch, segment, bytes } => {
                    work.open((*branch, SegmentNumber::new(*segment), size), *bytes).await?;
                }
                Step::Gap { .. } | Step::File { .. } => work.small(step).await?,
                Step::Index { branch, from, to, bytes } => work.index((*branch, *from, *to), *bytes, size).await?,
                Step::Names { noted } => work.names(*noted).await?,
                Step::Backup { label, branch, bytes } => work.backup(*label, *branch, *bytes).await?,
            }
        }
    }
    Ok(work.done)
}

struct Work<'a> {
    from: &'a Repository,
    to: &'a Repository,
    source: &'a Holding,
    cluster: &'a ClusterId,
    progress: &'a watch::Sender<CopyProgress>,
    /// Branches on which the target has another history.
    blocked: BTreeSet<Branch>,
    /// Segments that could not be copied.
    missing: BTreeSet<(Branch, SegmentNumber)>,
    done: Copied,
}

/// What an error of copying one thing means; `None`: of copying at all.
fn kind_of_problem(error: &CatalogError) -> Option<ProblemKind> {
    match error {
        error if error.is_damage() || error.is_not_found() => Some(ProblemKind::Damaged),
        CatalogError::SegmentSize { .. } | CatalogError::TwoContents { .. } => Some(ProblemKind::Damaged),
        CatalogError::Disagreement { .. } | CatalogError::Taken { .. } => Some(ProblemKind::Conflict),
        CatalogError::Sealed { source, .. } if !source.is_retryable() => Some(ProblemKind::Unreadable),
        _ => None,
    }
}

impl Work<'_> {
    fn says(&self, doing: String) {
        self.progress.send_modify(|progress| progress.doing = doing);
    }

    fn passed(&self, bytes: u64) {
        self.progress.send_modify(|progress| progress.done = progress.done.saturating_add(bytes));
    }

    fn problem(&mut self, kind: ProblemKind, what: String, why: impl ToString) {
        let why = why.to_string();
        match kind {
            ProblemKind::Conflict => tracing::error!("{what} is not copied: {why}"),
            _ => tracing::warn!("{what} is not copied: {why}"),
        }
        self.done.problems.push(Problem { kind, what, why });
    }

    fn segment_name(&self, branch: Branch, segment: SegmentNumber, size: SegmentSize) -> String {
        format!("segment {} of branch {branch}", segment.file_name(branch.timeline, size))
    }

    /// What became of an object, or what kept it from being copied; `None`: it is not there.
    fn settle(
        &mut self,
        what: String,
        branch: Branch,
        result: Result<Put, CatalogError>,
    ) -> Result<Option<Put>, CopyError> {
        match result {
            Ok(Put::Conflict(conflict)) => {
                self.blocked.insert(branch);
                let why = format!(
                    "{} in repository {} has other content than {}; it stays as it is, and nothing more of branch {branch} \
                     is copied",
                    conflict.existing,
                    self.to.name(),
                    conflict.kept
                );
                self.problem(ProblemKind::Conflict, what, why);
                Ok(None)
            }
            Ok(put) => Ok(Some(put)),
            Err(error) => match kind_of_problem(&error) {
                Some(kind) => {
                    if kind == ProblemKind::Conflict {
                        self.blocked.insert(branch);
                    }
                    self.problem(kind, what, error);
                    Ok(None)
                }
                None => Err(error.into()),
            },
        }
    }

    /// History files, gap records, kept files.
    async fn small(&mut self, step: &Step) -> Result<(), CopyError> {
        let (from, to, cluster) = (self.from, self.to, self.cluster);
        let (what, branch, result) = match step {
            Step::History { branch } => {
                let what = format!("the history file of branch {branch}");
                (what, *branch, to.copy_history(from, cluster, *branch).await)
            }
            Step::Gap { branch, from: begin, to: end } => {
                let what = format!("the record of the gap on branch {branch} from {begin} to {end}");
                (what, *branch, to.copy_gap(from, cluster, *branch, (*begin, *end)).await)
            }
            Step::File { branch, file, .. } => {
                let result = match file.parse() {
                    Ok(file) => to.copy_wal_file(from, cluster, *branch, &file).await,
                    Err(_) => return Ok(()), // invariant: it was read from a name
                };
                (format!("the kept file {file}"), *branch, result)
            }
            Step::Segment { .. }
            | Step::Open { .. }
            | Step::Index { .. }
            | Step::Names { .. }
            | Step::Backup { .. } => return Ok(()),
        };
        let is_file = matches!(step, Step::File { .. });
        let was_blocked = self.blocked.contains(&branch);
        let put = self.settle(what, branch, result)?;
        if is_file && !was_blocked {
            self.blocked.remove(&branch); // two such files of one name say nothing about the WAL
        }
        self.done.others += u64::from(put == Some(Put::New));
        self.passed(step.bytes());
        Ok(())
    }

    /// Compares what both have. Nothing is put.
    async fn compare(&mut self, segments: &[(Branch, u64)], size: SegmentSize) -> Result<(), CopyError> {
        let (from, to, cluster) = (self.from, self.to, self.cluster);
        if !segments.is_empty() {
            self.says(format!("comparing {} segments that are there", segments.len()));
        }
        let compared = stream::iter(segments.iter().copied()).map(|(branch, number)| async move {
            let segment = SegmentNumber::new(number);
            (branch, segment, to.copy_segment(from, cluster, branch, segment, size).await)
        });
        let mut compared = compared.buffered(COMPARED_AT_ONCE);
        while let Some((branch, segment, copied)) = compared.next().await {
            let what = self.segment_name(branch, segment, size);
            if self.blocked.contains(&branch) && copied.as_ref().is_ok_and(|copied| is_conflict(&copied.put)) {
                continue; // said once per branch
            }
            let bytes = copied.as_ref().map_or(0, |copied| copied.bytes);
            match self.settle(what, branch, copied.map(|copied| copied.put))? {
                Some(Put::SameContent) => self.done.there += 1,
                Some(_) => (self.done.segments, self.done.bytes) = (self.done.segments + 1, self.done.bytes + bytes),
                None => {} // there, and damaged in the source, or another
            }
        }
        Ok(())
    }

    /// Complete segments, several at a time.
    async fn segments(&mut self, steps: &[Step], size: SegmentSize) -> Result<(), CopyError> {
        let (from, to, cluster) = (self.from, self.to, self.cluster);
        let wanted: Vec<(Branch, SegmentNumber, u64)> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Segment { branch, segment, bytes } => Some((*branch, SegmentNumber::new(*segment), *bytes)),
                _ => None,
            })
            .collect();
        let at_once = usize::try_from((AT_ONCE_BYTES / size.bytes()).clamp(1, AT_ONCE)).unwrap_or(1);
        let blocked = self.blocked.clone();
        let copied = stream::iter(wanted).map(|(branch, segment, bytes)| {
            let left_out = blocked.contains(&branch);
            async move {
                let copied = match left_out {
                    true => None,
                    false => Some(to.copy_segment(from, cluster, branch, segment, size).await),
                };
                (branch, segment, bytes, copied)
            }
        });
        let mut copied = copied.buffered(at_once);
        while let Some((branch, segment, bytes, copied)) = copied.next().await {
            self.passed(bytes);
            let Some(copied) = copied else {
                self.missing.insert((branch, segment));
                continue; // why, was said when the branch was blocked
            };
            let what = self.segment_name(branch, segment, size);
            self.says(what.clone());
            let put_bytes = copied.as_ref().map_or(0, |copied| copied.bytes);
            match self.settle(what, branch, copied.map(|copied| copied.put))? {
                Some(Put::SameContent) => self.done.there += 1,
                Some(_) => {
                    self.done.segments += 1;
                    self.done.bytes += put_bytes;
                }
                None => {
                    self.missing.insert((branch, segment));
                }
            }
            if self.blocked.contains(&branch) {
                break; // planned without conflicts: somebody else writes here. What is left is not copied
            }
        }
        Ok(())
    }

    /// What there is of a segment that is not complete.
    async fn open(
        &mut self,
        (branch, segment, size): (Branch, SegmentNumber, SegmentSize),
        bytes: u64,
    ) -> Result<(), CopyError> {
        self.passed(bytes);
        if self.blocked.contains(&branch) {
            self.missing.insert((branch, segment));
            return Ok(());
        }
        let what = format!("the open {}", self.segment_name(branch, segment, size));
        self.says(what.clone());
        let note = self.source.inventory.branches.get(&branch).and_then(|branch| branch.note_of_newest.clone());
        let like = note.unwrap_or_else(|| WalRangeNote {
            writer: self.to.writer(),
            server_version: 0,
            segment_size: size,
            digest_from: crate::types::Digest::of(b""),
            digest_to: None,
            server_time: None,
            server_end: None,
            durable_to: None,
            conflict: None,
        });
        let at = (branch, segment, size);
        let copied = self.to.copy_open_segment(self.from, self.cluster, at, &like).await;
        let put_bytes = copied.as_ref().map_or(0, |copied| copied.bytes);
        match self.settle(what, branch, copied.map(|copied| copied.put))? {
            Some(Put::SameContent) => self.done.there += 1,
            Some(_) => {
                self.done.segments += 1;
                self.done.bytes += put_bytes;
            }
            None => {
                self.missing.insert((branch, segment));
            }
        }
        Ok(())
    }

    /// An index; one that does not open is left out, because `pgkeep index rebuild` makes it from the WAL.
    async fn index(
        &mut self,
        (branch, from, to): (Branch, Lsn, Lsn),
        bytes: u64,
        size: SegmentSize,
    ) -> Result<(), CopyError> {
        self.passed(bytes);
        let segments = from.segment(size)..=to.segment_before(size);
        let lacks = self.missing.iter().any(|(of, segment)| *of == branch && segments.contains(segment));
        let Some(range) = self.source.indexes.get(&(branch, from, to)) else { return Ok(()) };
        if self.blocked.contains(&branch) || lacks {
            return Ok(());
        }
        match self.to.copy_index(self.from, self.cluster, range).await {
            Ok(is_new) => {
                self.done.others += u64::from(is_new);
                self.done.bytes += if is_new { bytes } else { 0 };
            }
            Err(error) if kind_of_problem(&error).is_some() => {
                tracing::warn!(%branch, %from, %to, %error, "an index is not copied");
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Names of relations; what does not open is left out.
    async fn names(&mut self, label: BackupLabel) -> Result<(), CopyError> {
        match self.to.copy_relations(self.from, self.cluster, label).await {
            Ok(is_new) => self.done.others += u64::from(is_new),
            Err(error) if kind_of_problem(&error).is_some() => {
                tracing::warn!(%label, %error, "names of relations are not copied");
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    async fn backup(&mut self, label: BackupLabel, branch: Branch, bytes: u64) -> Result<(), CopyError> {
        let what = format!("base backup {label}");
        let info = self.source.inventory.backups.iter().find(|backup| backup.label == label);
        let lacks = info.and_then(|info| {
            let size = info.segment_size;
            let (first, last) = (info.start.segment(size), info.stop.segment_before(size));
            let path = self.source.inventory.path_of(branch);
            let on_way =
                |other: Branch| other == branch || path.as_ref().is_some_and(|path| path.contains(other.timeline));
            self.missing.iter().find(|(other, segment)| on_way(*other) && (first..=last).contains(segment))
        });
        if self.blocked.contains(&branch) {
            let why = format!("the target has another history of branch {branch}");
            self.problem(ProblemKind::Dependent, what, why);
            self.passed(bytes);
            return Ok(());
        }
        if let Some((branch, segment)) = lacks.copied() {
            let size = info.map_or(SegmentSize::DEFAULT, |info| info.segment_size);
            let why = format!("it needs {}, which was not copied", self.segment_name(branch, segment, size));
            self.problem(ProblemKind::Dependent, what, why);
            self.passed(bytes);
            return Ok(());
        }
        self.says(what.clone());
        // Objects that it shares come on top of what was planned: more than that is not reported.
        let left = std::sync::atomic::AtomicU64::new(bytes);
        let passed = |len: u64| {
            let take = |left: u64| Some(left.saturating_sub(len));
            let order = std::sync::atomic::Ordering::Relaxed;
            let before = left.fetch_update(order, order, take).unwrap_or(0);
            self.passed(before.min(len));
        };
        let copied = self.to.copy_backup(self.from, self.cluster, label, &passed).await;
        self.passed(left.into_inner());
        match copied {
            Ok(copied) if copied.damaged.is_empty() => {
                match copied.objects {
                    0 => self.done.there += 1,
                    _ => self.done.backups += 1,
                }
                self.done.bytes += copied.bytes;
            }
            Ok(copied) => {
                self.done.bytes += copied.bytes;
                for object in copied.damaged {
                    let why =
                        format!("{}; the rest of it was copied, and it is no backup there without it", object.reason);
                    self.problem(ProblemKind::Damaged, format!("{} of {what}", object.name), why);
                }
            }
            Err(error) => match kind_of_problem(&error) {
                Some(kind) => self.problem(kind, what, error),
                None => return Err(error.into()),
            },
        }
        Ok(())
    }
}

fn is_conflict(put: &Put) -> bool {
    matches!(put, Put::Conflict(_))
}
