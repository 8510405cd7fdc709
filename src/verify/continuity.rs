//! Whether everything is there that was promised, by names, lengths and records. Pure: from a survey to findings.
//!
//! Every manifest that opens is asked for its packs and pieces and their lengths; the WAL of every branch from the oldest base
//! backup on for holes; every branch for its history. What was recorded as a gap is known and is no finding, nor is what expiry
//! took. Without a base backup nothing is promised.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::cost::cost;
use crate::catalog::inventory::Place;
use crate::catalog::layout::{ClusterObject, Object};
use crate::catalog::survey::Survey;
use crate::catalog::verification::{Fault, Finding, segment_object};
use crate::plan::holes;
use crate::types::BackupLabel;

/// No sealed object is shorter than its header and its trailer.
const SHORTEST: u64 = 96 + 8;

/// What listings and records tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Continuity {
    /// What is wrong, by name.
    pub findings: Vec<Finding>,
    /// What a person should know, and what is no damage.
    pub remarks: Vec<String>,
}

/// A finding that costs nothing yet.
pub(super) fn finding(fault: Fault, object: String, why: impl Into<String>, noticed_at: Timestamp) -> Finding {
    let (hole, backups, instants) = (None, Vec::new(), Vec::new());
    Finding { fault, object, why: why.into(), noticed_at, hole, backups, instants }
}

/// Judges a survey; `now` is by our clock.
pub fn continuity(survey: &Survey, now: Timestamp) -> Continuity {
    let inventory = &survey.inventory;
    let cluster = &inventory.id;
    // One for each object, whoever needs it.
    let mut found: BTreeMap<String, Finding> = BTreeMap::new();
    let mut remarks = Vec::new();
    for references in survey.manifests.values() {
        for absent in &references.absent {
            let object = Object::Of(cluster.clone(), absent.object.clone()).to_string();
            let (fault, why) = match absent.found.as_slice() {
                [] => (Fault::Missing, format!("it is not there; manifests say that it has {} bytes", absent.len)),
                [other, ..] => {
                    (Fault::Length, format!("it has {other} bytes, and manifests say that it has {}", absent.len))
                }
            };
            found.entry(object.clone()).or_insert_with(|| finding(fault, object, why, now));
        }
    }
    for name in &survey.unreadable {
        let why = "this manifest does not open; what it names is kept";
        let label: Option<BackupLabel> = name.rsplit('/').nth(1).and_then(|label| label.parse().ok());
        let mut one = finding(Fault::Damaged, name.clone(), why, now);
        one.backups.extend(label);
        found.insert(name.clone(), one);
    }
    for damaged in &inventory.damaged {
        let object = damaged.name.clone();
        found.entry(object.clone()).or_insert_with(|| finding(Fault::Damaged, object, damaged.reason.clone(), now));
    }
    for name in &survey.odd {
        let why = "this record of expiry does not open; nothing more is expired as long as it is there";
        found.entry(name.clone()).or_insert_with(|| finding(Fault::Damaged, name.clone(), why, now));
    }
    for (branch, known) in &inventory.branches {
        if !known.pieces.is_empty() && inventory.path_of(*branch).is_none() {
            let object = Object::Of(cluster.clone(), ClusterObject::History(*branch)).to_string();
            let why = format!("the history file of branch {branch} is not there, so its WAL belongs nowhere");
            found.entry(object.clone()).or_insert_with(|| finding(Fault::Missing, object, why, now));
        }
    }
    if let Some(size) = inventory.segment_size {
        for (branch, objects) in &survey.wal {
            for short in objects.iter().filter(|object| object.place == Place::Wal && object.len < SHORTEST) {
                let Some(name) = short.name(cluster, *branch, size) else { continue };
                let why = format!("it has {} bytes: no object is so short", short.len);
                found.entry(name.to_string()).or_insert_with(|| finding(Fault::Length, name.to_string(), why, now));
            }
        }
        for hole in holes(inventory) {
            if hole.reason.is_some() {
                remarks.push(format!("{hole}; that is recorded, and known"));
                continue;
            }
            let object = segment_object(cluster, hole.branch, hole.from, size);
            let object = object.unwrap_or_else(|| format!("{cluster}/wal/{}/", hole.branch));
            let mut one = finding(Fault::Hole, object.clone(), hole.to_string(), now);
            one.hole = Some((hole.branch, hole.from, hole.to));
            found.insert(object, one);
        }
    } else {
        remarks.push("there is no base backup, so nothing is promised and no WAL was looked at".to_owned());
    }
    if let Some(first) = inventory.unknown.first() {
        let count = inventory.unknown.len();
        remarks.push(format!("{count} objects of unknown names were left alone; the first is {first}"));
    }
    let mut findings: Vec<Finding> = found.into_values().collect();
    cost(survey, &mut findings);
    Continuity { findings, remarks }
}

#[cfg(test)]
mod tests;
