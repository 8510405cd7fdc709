//! Between which instants every one can be restored, before and after.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::Serialize;

use super::{Facts, WalGoes, leads};
use crate::catalog::inventory::{ClusterInventory, Run};
use crate::catalog::records::BackupInfo;
use crate::catalog::survey::condensed;
use crate::plan::Path;
use crate::plan::chain::Chain;
use crate::types::{BackupLabel, Branch, Lsn};

/// On one branch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Promise {
    /// The branch whose end is meant.
    pub branch: Branch,
    /// The base backup from which the whole of it is reached; `None`: from none.
    pub base: Option<BackupLabel>,
    /// When that one is consistent.
    pub from_time: Option<Timestamp>,
    /// Where that is.
    pub from: Option<Lsn>,
    /// First byte that is not there.
    pub to: Option<Lsn>,
}

/// On the way to each tip: from the oldest base backup from which the WAL goes on to the end without a hole.
pub(super) fn promises(inventory: &ClusterInventory, sound: &[&BackupInfo], tips: &[Path]) -> Vec<Promise> {
    let promise = |path: &Path| {
        let mut best: Option<Chain> = None;
        // Newest first: one before a hole that was stepped over is not needed to know.
        for backup in sound.iter().rev().filter(|backup| leads(path, backup)) {
            let Ok(chain) = Chain::build(inventory, backup, path) else { continue };
            match &best {
                Some(known) if chain.held_to < known.held_to => break,
                _ => best = Some(chain),
            }
        }
        let base = best.as_ref().map(|chain| &chain.base);
        Promise {
            branch: path.tip,
            base: base.map(|base| base.label),
            from_time: base.map(|base| base.stopped_at),
            from: base.map(|base| base.stop),
            to: best.as_ref().map(|chain| chain.held_to),
        }
    };
    tips.iter().map(promise).collect()
}

/// The same, once everything is gone that goes.
pub(super) fn after(facts: &Facts<'_>, stays: &BTreeSet<BackupLabel>, wal: &[WalGoes]) -> Vec<Promise> {
    let inventory = without(facts, wal);
    let sound: Vec<&BackupInfo> = facts.sound.iter().copied().filter(|backup| stays.contains(&backup.label)).collect();
    promises(&inventory, &sound, &facts.tips)
}

fn without(facts: &Facts<'_>, wal: &[WalGoes]) -> ClusterInventory {
    let mut inventory = facts.survey.inventory.clone();
    let Some(size) = inventory.segment_size else { return inventory };
    let mut goes: BTreeMap<Branch, Vec<Run>> = BTreeMap::new();
    for one in wal {
        goes.entry(one.range.branch).or_default().push(Run { from: one.range.from, to: one.range.to });
    }
    for (branch, goes) in goes {
        let Some(known) = inventory.branches.get_mut(&branch) else { continue };
        let mut left = Vec::new();
        for run in known.runs(size) {
            let mut at = run.from;
            for gone in goes.iter().filter(|gone| gone.from < run.to && run.from < gone.to) {
                left.push(Run { from: at, to: gone.from.max(at) });
                at = gone.to.max(at);
            }
            left.push(Run { from: at.min(run.to), to: run.to });
        }
        known.pieces = condensed(left.into_iter().filter(|run| run.from < run.to), size);
    }
    inventory
}
