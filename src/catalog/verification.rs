//! What verifications and drills leave in a repository: results that are remembered.
//!
//! What always holds: each result of a verification carries the whole compact picture, as stretches of rows of objects and not
//! as names, so the newest one that opens tells everything and older ones are superseded. They are bound to their repository: a
//! copy elsewhere says nothing there. `docs/format.md` lists the fields.
//! Crash: a result is there or not; without it what was read is read again. Two verifications at a time do the same work twice.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::CatalogError;
use super::layout::{ClusterObject, Name, Object, PartKind, RangeName, folder};
use super::records::Record;
use super::repository::Repository;
use crate::types::{BackupLabel, Branch, ClusterId, Id128, Lsn, ParseError, SegmentSize};

/// Results of verifications that stay: the newest tells all, the others what was seen when.
const VERIFICATIONS_STAY: usize = 50;
/// Results of drills that stay.
const DRILLS_STAY: usize = 1000;

/// Objects that lie one after the other, by position or number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Row {
    /// `wal/<branch>`: complete segments, by position.
    Wal(Branch),
    /// `index/<branch>`: indexes, by position.
    Index(Branch),
    /// `pack/<label>`: packs that this backup wrote, by number.
    Packs(BackupLabel),
    /// `files/<label>`, `tags/<label>`, `server-manifest/<label>`: pieces that this backup wrote, by number.
    Parts(BackupLabel, PartKind),
}

impl Row {
    /// The row of an object, and its stretch there; `None` for what is not remembered.
    pub fn of(object: &ClusterObject, size: Option<SegmentSize>) -> Option<(Row, u64, u64)> {
        match object {
            ClusterObject::Wal(branch, range) => {
                let start = range.segment.number(size?)?.start(size?).get();
                Some((Row::Wal(*branch), start + u64::from(range.from()), start + u64::from(range.to())))
            }
            ClusterObject::Index(branch, from, to) => Some((Row::Index(*branch), from.get(), to.get())),
            ClusterObject::Pack(pack) => {
                Some((Row::Packs(pack.label), u64::from(pack.number), u64::from(pack.number) + 1))
            }
            ClusterObject::Part(part) => {
                Some((Row::Parts(part.label, part.kind), u64::from(part.number), u64::from(part.number) + 1))
            }
            _ => None,
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Row::Wal(branch) => write!(f, "wal/{branch}"),
            Row::Index(branch) => write!(f, "index/{branch}"),
            Row::Packs(label) => write!(f, "pack/{label}"),
            Row::Parts(label, kind) => write!(f, "{}/{label}", kind.stem()),
        }
    }
}

impl FromStr for Row {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parts = text.split_once('/').and_then(|(kind, of)| match kind {
            "wal" => Some(Row::Wal(of.parse().ok()?)),
            "index" => Some(Row::Index(of.parse().ok()?)),
            "pack" => Some(Row::Packs(of.parse().ok()?)),
            stem => Some(Row::Parts(of.parse().ok()?, PartKind::of_stem(stem)?)),
        });
        parts.ok_or_else(|| ParseError::new("a row of objects such as wal/00000001", text))
    }
}

crate::types::serde_by_text!(Row);

/// Stretches of a row in which every object was found whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadRow {
    /// Which.
    pub row: Row,
    /// First position or number, the first after it, and when the reading began, in seconds since 1970.
    pub read: Vec<(u64, u64, i64)>,
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// It is not there.
    Missing,
    /// It is there, and not as long as it was.
    Length,
    /// It is there, and does not open or contradicts itself.
    Damaged,
    /// WAL is missing, and nobody recorded why.
    Hole,
    /// A newer version's word.
    #[serde(other)]
    Other,
}

/// Instants that cannot be restored: bytes `[from, to)` of a branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// The branch.
    pub branch: Branch,
    /// The first position that cannot be reached.
    pub from: Lsn,
    /// The first one that can be reached again, or the end of what is archived.
    pub to: Lsn,
    /// When that WAL was put, by the store's clock: about the time of the first instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_about: Option<Timestamp>,
    /// About the time of the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_about: Option<Timestamp>,
}

/// Something that was found to be wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What.
    pub fault: Fault,
    /// The object's full name; of a hole its branch's folder.
    pub object: String,
    /// In words.
    pub why: String,
    /// When it was found first, by our clock.
    pub noticed_at: Timestamp,
    /// The missing bytes, of a hole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hole: Option<(Branch, Lsn, Lsn)>,
    /// Base backups that cannot be restored.
    #[serde(default)]
    pub backups: Vec<BackupLabel>,
    /// Instants that cannot be restored, with all else whole.
    #[serde(default)]
    pub instants: Vec<Lost>,
}

/// What a verification found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verification {
    /// The run of pgkeep that verified.
    pub writer: Id128,
    /// When it began, by our clock: what it read counts from then.
    pub began_at: Timestamp,
    /// When it was over.
    pub ended_at: Timestamp,
    /// Objects that are there: WAL, indexes, packs, pieces.
    pub objects: u64,
    /// Their length.
    pub bytes: u64,
    /// Objects that this run opened.
    pub read_objects: u64,
    /// Their length.
    pub read_bytes: u64,
    /// Objects that nobody has found whole so far.
    pub unread_objects: u64,
    /// Their length.
    pub unread_bytes: u64,
    /// Since when every other one was found whole; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_read: Option<Timestamp>,
    /// What is wrong, of this run and of earlier ones where it was not looked at again.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// How many more there are.
    #[serde(default)]
    pub more_findings: u64,
    /// What was found whole, and when.
    #[serde(default)]
    pub rows: Vec<ReadRow>,
}

impl Record for Verification {
    const NAME: &'static str = "verification";
}

/// How something ended that a drill looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// As it should be.
    Passed,
    /// Not as it should be.
    Failed,
    /// It was not looked at; why stands beside it.
    Skipped,
    /// A newer version's word.
    #[serde(other)]
    Other,
}

/// Something that a drill looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillCheck {
    /// What: `recovery`, `stop`, `commit`, `amcheck`, `assertion 1`, `checksums`.
    pub check: String,
    /// How it ended.
    pub outcome: Outcome,
    /// What was found, in words.
    pub found: String,
}

/// A part of a drill.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// Which: `plan`, `restore`, `recovery`, `promote`, `amcheck`, `assertions`, `checksums`.
    pub phase: String,
    /// How long it took.
    pub seconds: f64,
    /// Bytes of the base backup (`restore`) or of WAL (`recovery`); 0 where nothing is counted.
    pub bytes: u64,
}

/// How a drill went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Drill {
    /// The run of pgkeep that did it.
    pub writer: Id128,
    /// When it began, by our clock.
    pub began_at: Timestamp,
    /// When it was over.
    pub ended_at: Timestamp,
    /// The target as it was given or drawn.
    pub target: String,
    /// What it was drawn by, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The base backup; absent where no plan was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupLabel>,
    /// The branch that recovery followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<Branch>,
    /// The record at which recovery was to stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<Lsn>,
    /// The server that was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// [`Outcome::Passed`] or [`Outcome::Failed`].
    pub verdict: Outcome,
    /// What was looked at, in that order.
    #[serde(default)]
    pub checks: Vec<DrillCheck>,
    /// Where the time went.
    #[serde(default)]
    pub phases: Vec<Phase>,
}

impl Record for Drill {
    const NAME: &'static str = "drill";
}

impl Drill {
    /// The first thing that failed.
    pub fn failure(&self) -> Option<&DrillCheck> {
        self.checks.iter().find(|check| check.outcome == Outcome::Failed)
    }

    /// Bytes a second of a phase, where it was long enough to tell.
    pub fn rate(&self, phase: &str) -> Option<u64> {
        let phase = self.phases.iter().find(|known| known.phase == phase)?;
        let rate = phase.bytes as f64 / phase.seconds;
        (phase.bytes >= 64 << 20 && rate.is_finite() && rate >= 1.0).then_some(rate as u64) // saturates
    }
}

impl Repository {
    /// Records the result of a verification, and removes what is superseded, as far as the store lets us.
    ///
    /// # Errors
    /// What the store says.
    pub async fn put_verification(
        &self,
        cluster: &ClusterId,
        result: &Verification,
    ) -> Result<BackupLabel, CatalogError> {
        let name = self.put_by_second(cluster, ClusterObject::Verification, result).await?;
        self.prune(cluster, &folder::verifications(cluster), VERIFICATIONS_STAY).await?;
        Ok(name)
    }

    /// The newest result of a verification that opens; `None`: there is none.
    ///
    /// # Errors
    /// What the store says.
    pub async fn newest_verification(&self, cluster: &ClusterId) -> Result<Option<Verification>, CatalogError> {
        for name in self.results(&folder::verifications(cluster)).await?.into_iter().rev() {
            match self.get_record(cluster, ClusterObject::Verification(name)).await {
                Ok(result) => return Ok(Some(result)),
                Err(error) if error.is_damage() || error.is_not_found() => {
                    tracing::warn!(%error, "a result of a verification is left out; the one before it counts");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Records how a drill went, and removes the oldest of very many.
    ///
    /// # Errors
    /// What the store says.
    pub async fn put_drill(&self, cluster: &ClusterId, drill: &Drill) -> Result<BackupLabel, CatalogError> {
        let name = self.put_by_second(cluster, ClusterObject::Drill, drill).await?;
        self.prune(cluster, &folder::drills(cluster), DRILLS_STAY).await?;
        Ok(name)
    }

    /// The newest drills, `most` at most, newest first. What does not open is left out.
    ///
    /// # Errors
    /// What the store says.
    pub async fn drills(&self, cluster: &ClusterId, most: usize) -> Result<Vec<(BackupLabel, Drill)>, CatalogError> {
        let mut drills = Vec::new();
        for name in self.results(&folder::drills(cluster)).await?.into_iter().rev().take(most) {
            match self.get_record(cluster, ClusterObject::Drill(name)).await {
                Ok(drill) => drills.push((name, drill)),
                Err(error) if error.is_damage() || error.is_not_found() => {
                    tracing::warn!(%error, "the result of a drill is left out");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(drills)
    }

    /// The names of results, oldest first.
    async fn results(&self, folder: &str) -> Result<Vec<BackupLabel>, CatalogError> {
        let named = |key: &str| match Name::parse(key).ok()?.object {
            Object::Of(_, ClusterObject::Verification(name) | ClusterObject::Drill(name)) => Some(name),
            _ => None,
        };
        let listed = self.list_under(folder).await?;
        let mut names: Vec<BackupLabel> = listed.iter().filter_map(|meta| named(meta.key.as_str())).collect();
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    /// Removes the oldest results, so that `stay` are left. What the store keeps stays.
    async fn prune(&self, cluster: &ClusterId, folder: &str, stay: usize) -> Result<(), CatalogError> {
        let names = self.results(folder).await?;
        let is_drill = folder == folder::drills(cluster);
        for name in names.iter().take(names.len().saturating_sub(stay)) {
            let object = if is_drill { ClusterObject::Drill(*name) } else { ClusterObject::Verification(*name) };
            self.delete_all_copies(cluster, object).await?;
        }
        Ok(())
    }
}

/// The name of the complete segment's object, for messages about WAL that is missing.
pub fn segment_object(cluster: &ClusterId, branch: Branch, at: Lsn, size: SegmentSize) -> Option<String> {
    let segment = super::layout::SegmentName::new(branch.timeline, at.segment(size), size)?;
    let range = RangeName::new(segment, 0, u32::try_from(size.bytes()).ok()?)?;
    Some(Object::Of(cluster.clone(), ClusterObject::Wal(branch, range)).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_read_back_as_written() {
        for text in [
            "wal/00000001",
            "wal/00000002.1",
            "index/00000001",
            "pack/20261120T031500Z",
            "files/20261120T031500Z",
            "tags/20261120T031500Z",
            "server-manifest/20261120T031500Z",
        ] {
            assert_eq!(text.parse::<Row>().unwrap().to_string(), text);
        }
        for text in ["wal", "wal/", "pack/00000001", "other/20261120T031500Z", "files/x"] {
            assert!(text.parse::<Row>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_drill_tells_its_rates_where_there_was_enough() {
        let phase = |phase: &str, seconds, bytes| Phase { phase: phase.to_owned(), seconds, bytes };
        let drill = Drill {
            writer: Id128::new([0; 16]),
            began_at: Timestamp::UNIX_EPOCH,
            ended_at: Timestamp::UNIX_EPOCH,
            target: "latest".to_owned(),
            seed: None,
            backup: None,
            branch: None,
            stop: None,
            server: None,
            verdict: Outcome::Passed,
            checks: Vec::new(),
            phases: vec![phase("restore", 2.0, 200_000_000), phase("recovery", 0.0, 200_000_000), phase("x", 1.0, 5)],
        };
        assert_eq!(drill.rate("restore"), Some(100_000_000));
        assert_eq!((drill.rate("recovery"), drill.rate("x"), drill.rate("none")), (None, None, None));
    }
}
