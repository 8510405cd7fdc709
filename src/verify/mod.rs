//! Verification that remembers, and drills.
//!
//! ```text
//! survey (catalog) ─► continuity, cost (pure) ─► findings ──────────────┐
//!        └──────────► order (pure: what to read next) ─► objects ─► known (pure) ─► a result in the repository
//! plan, restore ─► drill: a server on scratch space, looked at, removed ─► a result in the repository
//! ```
//!
//! What always holds: what is said to be whole since a day was read and opened on that day or later. A finding stays until its
//! object was found whole, or is gone. Nothing is repaired that was not asked for, and nothing is ever replaced.
//! Crash, cancellation: what was read since the last result ([`LEG`] ago at most) is read again.

pub mod continuity;
mod cost;
pub mod drill;
mod known;
pub mod objects;
mod order;
pub mod repair;
#[cfg(test)]
mod sample;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use continuity::{Continuity, continuity};
pub use objects::{Manner, NoTurn, Turn};
pub use order::Wanted;

use crate::catalog::layout::{ClusterObject, Name, Object};
use crate::catalog::survey::Survey;
use crate::catalog::verification::{Fault, Finding, Row, Verification};
use crate::catalog::{CatalogError, Repository};
use crate::types::ClusterId;
use continuity::finding;
use known::Known;
use objects::Read;
use order::Coverage;

/// What was read is recorded so often while it goes on.
const LEG: Duration = Duration::from_secs(15 * 60);
/// Findings in a result.
const FINDINGS: usize = 1000;
/// A second look at what seems to be wrong by the listings: they may have been taken while something was on its way.
const AGAIN_AFTER: Duration = Duration::from_secs(3);

/// What a verification is to do.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Open objects, so many; `None`: names, lengths and records alone.
    pub objects: Option<Wanted>,
}

/// What a verification came to.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Objects that are there: WAL, indexes, packs, pieces.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Base backups that are complete.
    pub backups: u64,
    /// Objects that were opened now.
    pub read_objects: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Objects that nobody has found whole so far.
    pub unread_objects: u64,
    /// Their bytes.
    pub unread_bytes: u64,
    /// Since when every other object was found whole.
    pub whole_since: Option<Timestamp>,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// How many more there are.
    pub more_findings: u64,
    /// What a person should know, and what is no damage.
    pub remarks: Vec<String>,
    /// Why less was read than was to be.
    pub unfinished: Option<String>,
    /// Damage was brought back.
    pub repaired: Vec<repair::Repaired>,
}

/// What is known while a verification goes on.
struct State {
    known: Known,
    /// By name.
    findings: BTreeMap<String, Finding>,
}

fn row_of(finding: &Finding, survey: &Survey) -> Option<(Row, u64, u64)> {
    match Name::parse(&finding.object).ok()?.object {
        Object::Of(_, object) => Row::of(&object, survey.inventory.segment_size),
        _ => None,
    }
}

/// Whether an object is still listed, under whatever name.
fn is_listed(survey: &Survey, finding: &Finding) -> bool {
    let Ok(Name { object: Object::Of(_, object), .. }) = Name::parse(&finding.object) else { return false };
    match &object {
        ClusterObject::Pack(name) => !survey.places_of_pack(*name).is_empty(),
        ClusterObject::Part(name) => !survey.places_of_part(*name).is_empty(),
        ClusterObject::Index(branch, from, to) => {
            survey.indexes.iter().any(|index| (index.branch, index.from, index.to) == (*branch, *from, *to))
        }
        ClusterObject::Wal(branch, range) => {
            let Some(size) = survey.inventory.segment_size else { return false };
            let Some(segment) = range.segment.number(size) else { return false };
            let objects = survey.wal.get(branch).map(Vec::as_slice).unwrap_or_default();
            let first = objects.partition_point(|object| object.segment < segment);
            let of = objects.iter().skip(first).take_while(|object| object.segment == segment);
            of.into_iter().any(|object| (object.from, object.to) == (range.from(), range.to()))
        }
        _ => false, // the open segment's: gone, or seen anew
    }
}

/// Verifies a cluster in a repository, and records the result there.
///
/// # Errors
/// What the store says, and no more is known than before. A result that cannot be recorded is said in a remark.
pub async fn verify(
    repository: &Repository,
    cluster: &ClusterId,
    options: Options,
    manner: Manner<'_>,
    stop: &CancellationToken,
) -> Result<(Survey, Report), CatalogError> {
    let began_at = repository.now();
    let mut survey = repository.survey(cluster).await?;
    let earlier = repository.newest_verification(cluster).await?;
    let Continuity { mut findings, mut remarks } = continuity(&survey, began_at);
    if !findings.is_empty() {
        // What is wrong twice is wrong.
        tokio::time::sleep(AGAIN_AFTER).await;
        survey = repository.survey(cluster).await?;
        let first: BTreeSet<String> = findings.into_iter().map(|finding| finding.object).collect();
        Continuity { findings, remarks } = continuity(&survey, began_at);
        findings.retain(|finding| first.contains(&finding.object));
    }
    let mut state = State { known: Known::default(), findings: BTreeMap::new() };
    let mut noticed = BTreeMap::new();
    for earlier in earlier.iter() {
        state.known = Known::of(&earlier.rows);
        for finding in &earlier.findings {
            noticed.insert(finding.object.clone(), finding.noticed_at);
            // Damage that was seen by opening, which listings do not show.
            if finding.fault == Fault::Damaged && row_of(finding, &survey).is_some() && is_listed(&survey, finding) {
                state.findings.insert(finding.object.clone(), finding.clone());
            }
        }
    }
    state.findings.extend(findings.into_iter().map(|finding| (finding.object.clone(), finding)));
    let all = order::items(&survey);
    state.known.within(&order::bounds(&survey, &all));
    let mut run = Run { repository, cluster, survey: &survey, all: &all, began_at, read: (0, 0), remarks };
    let mut unfinished = None;
    if let Some(wanted) = options.objects {
        let failed = |finding: &Finding| Some((row_of(finding, &survey)?, finding.noticed_at.as_second()));
        let failed = state.findings.values().filter_map(failed).map(|((row, from, _), at)| ((row, from), at)).collect();
        let chosen = order::choose(&survey, &all, &state.known, &failed, began_at.as_second(), wanted);
        let mut rest = chosen.as_slice();
        while !rest.is_empty() && unfinished.is_none() {
            let done = objects::read(repository, cluster, &survey, rest, manner, Instant::now() + LEG, stop).await;
            rest = rest.get(done.len()..).unwrap_or_default();
            unfinished = run.take(&mut state, done);
            if stop.is_cancelled() {
                unfinished = unfinished.or(Some("it was stopped".to_owned()));
            }
            if !rest.is_empty() && unfinished.is_none() {
                run.record(&mut state, &noticed).await; // a kill costs no more than a leg
            }
        }
    }
    let (verification, coverage) = run.record(&mut state, &noticed).await;
    let report = Report {
        objects: coverage.objects,
        bytes: coverage.bytes,
        backups: survey.inventory.backups.len() as u64,
        read_objects: verification.read_objects,
        read_bytes: verification.read_bytes,
        unread_objects: coverage.unread_objects,
        unread_bytes: coverage.unread_bytes,
        whole_since: verification.oldest_read,
        findings: verification.findings,
        more_findings: verification.more_findings,
        remarks: run.remarks,
        unfinished,
        repaired: Vec::new(),
    };
    Ok((survey, report))
}

struct Run<'a> {
    repository: &'a Repository,
    cluster: &'a ClusterId,
    survey: &'a Survey,
    all: &'a [order::Item],
    began_at: Timestamp,
    /// Objects and bytes.
    read: (u64, u64),
    remarks: Vec<String>,
}

impl Run<'_> {
    /// Notes what became of objects; why reading cannot go on.
    fn take(&mut self, state: &mut State, done: Vec<(order::Item, Read)>) -> Option<String> {
        let mut found = Vec::new();
        let mut unfinished = None;
        for (item, read) in done {
            let place = item.place(self.survey);
            let object = item.names(self.survey, self.cluster).first().map(|(name, _)| name.object.to_string());
            let object = object.unwrap_or_default();
            match read {
                Read::Whole(damaged) => {
                    if let Some((row, from, to)) = place {
                        state.known.whole(row, from, to, self.began_at.as_second());
                    }
                    state.findings.retain(|name, finding| *name != object || finding.fault != Fault::Damaged);
                    for (name, error) in damaged {
                        self.remarks.push(format!("{name} is damaged, and another copy of it is whole: {error}"));
                    }
                }
                Read::Damaged(_, error) => {
                    if let Some((row, from, to)) = place {
                        state.known.forget(row, from, to);
                    }
                    found.push(finding(Fault::Damaged, object, error.to_string(), self.repository.now()));
                }
                Read::Gone => continue,
                Read::Closed(error) => {
                    unfinished = Some(format!("{object} cannot be opened here: {error}"));
                    break;
                }
                Read::Failed(error) => {
                    unfinished = Some(error.to_string());
                    break;
                }
            }
            self.read = (self.read.0 + 1, self.read.1 + item.len(self.survey));
        }
        cost::cost(self.survey, &mut found);
        state.findings.extend(found.into_iter().map(|finding| (finding.object.clone(), finding)));
        unfinished
    }

    /// Puts the result as it is now.
    async fn record(&mut self, state: &mut State, noticed: &BTreeMap<String, Timestamp>) -> (Verification, Coverage) {
        state.known.condense();
        let coverage = order::coverage(self.survey, self.all, &state.known);
        let mut findings: Vec<Finding> = state.findings.values().cloned().collect();
        for finding in &mut findings {
            finding.noticed_at = noticed.get(&finding.object).copied().unwrap_or(finding.noticed_at);
        }
        let more_findings = findings.len().saturating_sub(FINDINGS) as u64;
        findings.truncate(FINDINGS);
        let oldest = coverage.oldest_read.and_then(|at| Timestamp::from_second(at).ok());
        let verification = Verification {
            writer: self.repository.writer(),
            began_at: self.began_at,
            ended_at: self.repository.now(),
            objects: coverage.objects,
            bytes: coverage.bytes,
            read_objects: self.read.0,
            read_bytes: self.read.1,
            unread_objects: coverage.unread_objects,
            unread_bytes: coverage.unread_bytes,
            oldest_read: oldest,
            findings,
            more_findings,
            rows: state.known.rows(),
        };
        if let Err(error) = self.repository.put_verification(self.cluster, &verification).await {
            let remark = format!("the result is not remembered: {error}");
            if !self.remarks.contains(&remark) {
                self.remarks.push(remark);
            }
        }
        (verification, coverage)
    }
}

/// Records that these findings are repaired: they are not told any more, and their objects are read at the next occasion.
///
/// # Errors
/// What the store says.
pub async fn forget(
    repository: &Repository,
    cluster: &ClusterId,
    repaired: &[repair::Repaired],
) -> Result<(), CatalogError> {
    if repaired.is_empty() {
        return Ok(());
    }
    let Some(mut result) = repository.newest_verification(cluster).await? else { return Ok(()) };
    result.findings.retain(|finding| !repaired.iter().any(|done| done.object == finding.object));
    repository.put_verification(cluster, &result).await.map(drop)
}
