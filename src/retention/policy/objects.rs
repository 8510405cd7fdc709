//! Which packs and pieces nobody needs.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use super::{LEFTOVER_AFTER, Leftover};
use crate::catalog::layout::{PackName, PartName};
use crate::catalog::survey::{References, Stored, Survey};
use crate::types::BackupLabel;

/// Packs and pieces that go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Garbage {
    /// Packs, each once.
    pub packs: Vec<PackName>,
    /// Pieces of tables, each once.
    pub parts: Vec<PartName>,
    /// Length of all their objects, copies too.
    pub bytes: u64,
}

impl Garbage {
    /// Nothing.
    pub fn is_empty(&self) -> bool {
        self.packs.is_empty() && self.parts.is_empty()
    }

    pub(super) fn add_leftovers(&mut self, survey: &Survey, leftovers: &[Leftover]) {
        let labels: BTreeSet<BackupLabel> =
            leftovers.iter().filter(|leftover| leftover.goes).map(|leftover| leftover.label).collect();
        if labels.is_empty() {
            return;
        }
        let named = Named::of(survey, |_| true);
        let packs = survey.packs.iter().enumerate().filter(|(at, pack)| {
            labels.contains(&pack.name.label) && !named.packs.contains(first_of(&survey.packs, *at))
        });
        let packs: Vec<&Stored<PackName>> = packs.map(|(_, pack)| pack).collect();
        self.bytes += packs.iter().map(|pack| pack.len).sum::<u64>();
        self.packs.extend(packs.into_iter().map(|pack| pack.name));
        let parts = survey.parts.iter().enumerate().filter(|(at, part)| {
            labels.contains(&part.name.label) && !named.parts.contains(first_of(&survey.parts, *at))
        });
        let parts: Vec<&Stored<PartName>> = parts.map(|(_, part)| part).collect();
        self.bytes += parts.iter().map(|part| part.len).sum::<u64>();
        self.parts.extend(parts.into_iter().map(|part| part.name));
        self.packs.sort();
        self.packs.dedup();
        self.parts.sort();
        self.parts.dedup();
    }
}

/// The place by which an object and its copies are referenced.
fn first_of<N: Ord>(stored: &[Stored<N>], at: usize) -> usize {
    let Some(one) = stored.get(at) else { return at };
    let mut first = at;
    while first.checked_sub(1).and_then(|before| stored.get(before)).is_some_and(|before| before.name == one.name) {
        first -= 1;
    }
    first
}

/// A set of places.
struct Marks(Vec<bool>);

impl Marks {
    fn new(len: usize) -> Marks {
        Marks(vec![false; len])
    }

    fn add(&mut self, places: &[u32]) {
        for place in places {
            if let Some(mark) = self.0.get_mut(*place as usize) {
                *mark = true;
            }
        }
    }

    fn contains(&self, at: usize) -> bool {
        self.0.get(at).copied().unwrap_or(false)
    }
}

/// What manifests name.
struct Named {
    packs: Marks,
    parts: Marks,
}

impl Named {
    fn of(survey: &Survey, whose: impl Fn(BackupLabel) -> bool) -> Named {
        let (packs, parts) = (Marks::new(survey.packs.len()), Marks::new(survey.parts.len()));
        let mut named = Named { packs, parts };
        for (_, References { packs, parts, .. }) in survey.manifests.iter().filter(|(label, _)| whose(**label)) {
            named.packs.add(packs);
            named.parts.add(parts);
        }
        named
    }
}

/// What nobody needs any more once these base backups are gone: what they name, and what they put, and no other manifest
/// names. Nothing that a base backup in `open` put.
pub fn freed_by(survey: &Survey, goes: &BTreeSet<BackupLabel>, open: &BTreeSet<BackupLabel>) -> Garbage {
    if goes.is_empty() {
        return Garbage::default();
    }
    let stays = Named::of(survey, |label| !goes.contains(&label));
    let theirs = Named::of(survey, |label| goes.contains(&label));
    let mut garbage = Garbage::default();
    let is_free = |label: BackupLabel, named: bool, needed: bool| {
        (named || goes.contains(&label)) && !needed && !open.contains(&label)
    };
    let mut first = 0;
    for (at, pack) in survey.packs.iter().enumerate() {
        let is_copy = survey.packs.get(first).is_some_and(|before| before.name == pack.name);
        first = if is_copy { first } else { at };
        if is_free(pack.name.label, theirs.packs.contains(first), stays.packs.contains(first)) {
            garbage.bytes += pack.len;
            if garbage.packs.last() != Some(&pack.name) {
                garbage.packs.push(pack.name);
            }
        }
    }
    first = 0;
    for (at, part) in survey.parts.iter().enumerate() {
        let is_copy = survey.parts.get(first).is_some_and(|before| before.name == part.name);
        first = if is_copy { first } else { at };
        if is_free(part.name.label, theirs.parts.contains(first), stays.parts.contains(first)) {
            garbage.bytes += part.len;
            if garbage.parts.last() != Some(&part.name) {
                garbage.parts.push(part.name);
            }
        }
    }
    garbage
}

/// Packs and pieces of base backups that have neither manifest nor `start`, are not about to go by a record, and are named
/// by no manifest.
pub(super) fn leftovers(survey: &Survey, open: &BTreeSet<BackupLabel>, now: Timestamp) -> Vec<Leftover> {
    let going = survey.expiries.iter().filter(|plan| plan.going);
    let recorded: BTreeSet<BackupLabel> = going.flat_map(|plan| plan.expiry.backups.iter().copied()).collect();
    let unreadable = |label: BackupLabel| survey.unreadable.iter().any(|name| name.contains(&format!("/{label}/")));
    let is_known = |label: BackupLabel| {
        survey.manifests.contains_key(&label)
            || survey.starts.contains_key(&label)
            || open.contains(&label)
            || recorded.contains(&label)
            || unreadable(label)
    };
    let named = Named::of(survey, |_| true);
    let mut found: BTreeMap<BackupLabel, (u64, u64, i64)> = BTreeMap::new();
    let mut note = |label: BackupLabel, len: u64, put_at: i64| {
        let (objects, bytes, newest) = found.entry(label).or_insert((0, 0, i64::MIN));
        (*objects, *bytes, *newest) = (*objects + 1, *bytes + len, put_at.max(*newest));
    };
    let mut known: (Option<BackupLabel>, bool) = (None, false);
    let mut is_known = |label: BackupLabel| {
        if known.0 != Some(label) {
            known = (Some(label), is_known(label));
        }
        known.1
    };
    for (at, pack) in survey.packs.iter().enumerate() {
        if !is_known(pack.name.label) && !named.packs.contains(first_of(&survey.packs, at)) {
            note(pack.name.label, pack.len, pack.put_at);
        }
    }
    for (at, part) in survey.parts.iter().enumerate() {
        if !is_known(part.name.label) && !named.parts.contains(first_of(&survey.parts, at)) {
            note(part.name.label, part.len, part.put_at);
        }
    }
    let oldest = now.as_second().saturating_sub(LEFTOVER_AFTER.as_secs());
    let leftover = |(label, (objects, bytes, newest)): (BackupLabel, (u64, u64, i64))| Leftover {
        label,
        objects,
        bytes,
        newest: Timestamp::from_second(newest).unwrap_or(Timestamp::MAX),
        goes: newest <= oldest,
    };
    found.into_iter().map(leftover).collect()
}
