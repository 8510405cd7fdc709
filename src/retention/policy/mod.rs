//! What may be expired: from what a repository holds, a policy and a time to a decision. Pure: no store, no clock.
//!
//! What always holds (P5):
//! - Every instant of the window that can be restored before can be restored after: on every branch of which WAL was put
//!   within the window, and on the one that `latest` means, the newest sound base backup before the window begins stays,
//!   and all WAL from its start on, across all forks on the way.
//! - A base backup that stays has the WAL that makes it consistent, and everything that its manifest names.
//! - Flagged and incomplete base backups keep nothing else from going. Where no sound one is left, nothing goes.
//! - What is not understood stays: names, manifests that do not open, branches whose history is missing.
//!
//! When in doubt the decision is to keep, with the reason in [`Decision::blocked`]. A clock that is late keeps more; the
//! caller hands in the earlier one of its own and the store's.

mod objects;
mod promise;
mod wal;

#[cfg(test)]
mod model;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::catalog::inventory::Run;
use crate::catalog::layout::{PackName, PartName};
use crate::catalog::records::BackupInfo;
use crate::catalog::retention::{Held, WalRange};
use crate::catalog::survey::Survey;
use crate::plan::Path;
use crate::plan::chain::{Chain, latest_path};
use crate::types::{BackupLabel, Branch, Lsn};

pub use objects::{Garbage, freed_by};
pub use promise::Promise;

/// The server's clock and the archiver's may be apart by so much.
pub const CLOCK_SKEW: SignedDuration = SignedDuration::from_hours(1);
/// WAL that is younger than a base backup that is being taken, less this, stays: its start may lie at an older checkpoint.
pub const BEFORE_A_START: SignedDuration = SignedDuration::from_hours(24);
/// A base backup that has put nothing for so long, by the store's clock, is not coming any more.
pub const GIVE_UP_AFTER: SignedDuration = SignedDuration::from_hours(3 * 24);
/// What no record knows goes when it is older than this by the store's clock.
pub const LEFTOVER_AFTER: SignedDuration = SignedDuration::from_hours(7 * 24);
/// A lease protects for so long after its last beat: recovery goes on after the restore has ended.
pub const LEASE_LASTS: SignedDuration = SignedDuration::from_hours(24);

/// What is to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Back to here every instant stays restorable.
    pub window: SignedDuration,
    /// The newest base backup of each of the last so many days that have one (UTC).
    pub daily: u32,
    /// The same of weeks, which begin on Monday.
    pub weekly: u32,
    /// The same of months.
    pub monthly: u32,
    /// The same of years.
    pub yearly: u32,
    /// The newest so many, however old.
    pub at_least: u32,
}

/// Why a base backup stays.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case", tag = "rule")]
pub enum Keep {
    /// It ended within the window.
    Window,
    /// Every instant of the window on this branch is reached from it.
    WindowBase {
        /// The branch.
        branch: Branch,
    },
    /// It is the newest of its day.
    Daily {
        /// The day, `2026-11-20`.
        slot: String,
    },
    /// It is the newest of its week.
    Weekly {
        /// The week, `2026-W47`.
        slot: String,
    },
    /// It is the newest of its month.
    Monthly {
        /// The month, `2026-11`.
        slot: String,
    },
    /// It is the newest of its year.
    Yearly {
        /// The year.
        slot: String,
    },
    /// It is among the newest.
    AtLeast {
        /// From 1.
        place: u32,
    },
    /// The newest sound one always stays.
    Newest,
    /// A hold says so.
    Hold {
        /// The hold's name.
        hold: BackupLabel,
        /// Its reason.
        reason: String,
    },
    /// It is being restored.
    Lease {
        /// The lease's name.
        lease: String,
    },
    /// A base backup that is being taken may reference its blocks.
    ParentOf {
        /// Which is being taken.
        backup: BackupLabel,
    },
    /// There is no sound base backup at all, so nothing goes.
    NothingSound,
    /// Something that matters is not understood, so nothing goes.
    NotUnderstood,
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Keep::Window => f.write_str("it was taken within the window"),
            Keep::WindowBase { branch } => write!(f, "the window on branch {branch} is reached from it"),
            Keep::Daily { slot } => write!(f, "daily: the newest of {slot}"),
            Keep::Weekly { slot } => write!(f, "weekly: the newest of {slot}"),
            Keep::Monthly { slot } => write!(f, "monthly: the newest of {slot}"),
            Keep::Yearly { slot } => write!(f, "yearly: the newest of {slot}"),
            Keep::AtLeast { place: 1 } => f.write_str("at_least: it is the newest"),
            Keep::AtLeast { place } => write!(f, "at_least: it is number {place} of the newest"),
            Keep::Newest => f.write_str("the newest sound base backup always stays"),
            Keep::Hold { hold, reason } => write!(f, "hold {hold}: {reason}"),
            Keep::Lease { lease } => write!(f, "it is being restored (lease {lease})"),
            Keep::ParentOf { backup } => write!(f, "base backup {backup}, which is being taken, may use its blocks"),
            Keep::NothingSound => f.write_str("no base backup is sound, so nothing goes"),
            Keep::NotUnderstood => f.write_str("something is not understood, so nothing goes"),
        }
    }
}

/// What is decided about a base backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Which.
    pub label: BackupLabel,
    /// Why it keeps nothing else from going, if it does not.
    pub unsound: Option<String>,
    /// Why it stays. Empty: it goes.
    pub keeps: Vec<Keep>,
}

/// Packs and pieces of which no record knows why they are there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leftover {
    /// The base backup that they would belong to.
    pub label: BackupLabel,
    /// How many.
    pub objects: u64,
    /// Their length.
    pub bytes: u64,
    /// When the newest was put, by the store's clock.
    pub newest: Timestamp,
    /// It is old enough to go.
    pub goes: bool,
}

/// WAL that goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WalGoes {
    /// Where.
    #[serde(flatten)]
    pub range: WalRange,
    /// How many objects.
    pub objects: u64,
    /// Their length.
    pub bytes: u64,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The time that was handed in.
    pub now: Timestamp,
    /// Where the window begins.
    pub window_from: Timestamp,
    /// All complete base backups, oldest first.
    pub backups: Vec<Verdict>,
    /// Base backups that are not coming any more: to be given up.
    pub give_up: Vec<BackupLabel>,
    /// Those that are being taken.
    pub open: Vec<BackupLabel>,
    /// WAL that is needed, in whole segments, whether or not it is there.
    pub needed_wal: BTreeMap<Branch, Vec<Run>>,
    /// WAL that goes.
    pub wal: Vec<WalGoes>,
    /// What the base backups that go leave to nobody, and leftovers.
    pub garbage: Garbage,
    /// What no record knows.
    pub leftovers: Vec<Leftover>,
    /// Why less goes than might.
    pub blocked: Vec<String>,
    /// What can be restored now.
    pub before: Vec<Promise>,
    /// What can be restored afterwards.
    pub after: Vec<Promise>,
}

impl Decision {
    /// The base backups that go.
    pub fn goes(&self) -> BTreeSet<BackupLabel> {
        self.backups.iter().filter(|verdict| verdict.keeps.is_empty()).map(|verdict| verdict.label).collect()
    }

    /// Bytes that are freed.
    pub fn frees(&self) -> u64 {
        self.garbage.bytes + self.wal.iter().map(|wal| wal.bytes).sum::<u64>()
    }

    /// Nothing goes.
    pub fn is_empty(&self) -> bool {
        self.goes().is_empty() && self.wal.is_empty() && self.garbage.is_empty() && self.give_up.is_empty()
    }
}

/// What is found out before anything is decided.
struct Facts<'a> {
    survey: &'a Survey,
    now: Timestamp,
    /// Instants from here on are promised: the window's beginning, and a little for clocks.
    from: Timestamp,
    /// Sound base backups, oldest first.
    sound: Vec<&'a BackupInfo>,
    /// Of those that are so only on the way to another branch, that way: a child that forked off in the segment in which the
    /// base backup ends has the bytes that its own branch lacks.
    elsewhere: BTreeMap<BackupLabel, Path>,
    /// The ends of histories of which the window holds something, with the way there.
    tips: Vec<Path>,
    /// Base backups that are being taken.
    open: BTreeSet<BackupLabel>,
    blocked: Vec<String>,
    /// No WAL goes.
    keep_all_wal: bool,
}

/// Decides. `now` is the earlier one of our clock and the store's.
pub fn decide(survey: &Survey, policy: &Policy, now: Timestamp) -> Decision {
    let back = |from: Timestamp, by: SignedDuration| from.checked_sub(by).unwrap_or(Timestamp::MIN);
    let window_from = back(now, policy.window);
    let (open, give_up) = begun(survey, now);
    let mut facts = Facts {
        survey,
        now,
        from: back(window_from, CLOCK_SKEW),
        sound: Vec::new(),
        elsewhere: BTreeMap::new(),
        tips: Vec::new(),
        open,
        blocked: Vec::new(),
        keep_all_wal: false,
    };
    let unsound = facts.judge_backups();
    facts.find_tips();
    let mut keeps = facts.keeps(policy);
    let mut needs = wal::Needs::default();
    facts.window(&mut keeps, &mut needs);
    facts.holds(&mut keeps, &mut needs);
    facts.leases(&mut keeps, &mut needs);
    let verdicts = survey.inventory.backups.iter().map(|backup| {
        let (label, keeps) = (backup.label, keeps.remove(&backup.label).unwrap_or_default());
        Verdict { label, unsound: unsound.get(&label).cloned(), keeps: keeps.into_iter().collect() }
    });
    let backups: Vec<Verdict> = verdicts.collect();
    let stays: BTreeSet<BackupLabel> =
        backups.iter().filter(|verdict| !verdict.keeps.is_empty()).map(|verdict| verdict.label).collect();
    for backup in survey.inventory.backups.iter().filter(|backup| stays.contains(&backup.label)) {
        needs.backup(&survey.inventory, backup);
        if let Some(path) = facts.elsewhere.get(&backup.label) {
            needs.way(path, backup.start, Some(backup.stop), backup.segment_size);
        }
    }
    let needed_wal = needs.finish(survey.inventory.segment_size);
    let wal = facts.wal_that_goes(&needed_wal);
    let goes: BTreeSet<BackupLabel> =
        backups.iter().filter(|verdict| verdict.keeps.is_empty()).map(|verdict| verdict.label).collect();
    let leftovers = objects::leftovers(survey, &facts.open, now);
    let mut garbage = freed_by(survey, &goes, &facts.open);
    garbage.add_leftovers(survey, &leftovers);
    if !survey.unreadable.is_empty() {
        facts.blocked.push(format!(
            "{} does not open, so nobody knows what it names: no pack and no piece of a table goes; mend it from another \
             repository, or move it away",
            survey.unreadable.join(", ")
        ));
        garbage = Garbage::default();
    }
    let before = promise::promises(&survey.inventory, &facts.sound, &facts.tips);
    let after = promise::after(&facts, &stays, &wal);
    Decision {
        now,
        window_from,
        backups,
        give_up,
        open: facts.open.into_iter().collect(),
        needed_wal,
        wal,
        garbage,
        leftovers,
        blocked: facts.blocked,
        before,
        after,
    }
}

/// Base backups that were begun and are neither complete nor given up: those that may be coming, and those that are not.
fn begun(survey: &Survey, now: Timestamp) -> (BTreeSet<BackupLabel>, Vec<BackupLabel>) {
    // The manifests of these were removed by expiry; their starts go last.
    let removed: BTreeSet<BackupLabel> =
        survey.expiries.iter().filter(|plan| plan.going).flat_map(|plan| plan.expiry.backups.iter().copied()).collect();
    let (mut open, mut give_up) = (BTreeSet::new(), Vec::new());
    let oldest = now.as_second().saturating_sub(GIVE_UP_AFTER.as_secs());
    for (label, started) in &survey.starts {
        let known = survey.manifests.contains_key(label)
            || survey.tombstones.contains_key(label)
            || removed.contains(label)
            || survey.unreadable.iter().any(|name| name.contains(&format!("/{label}/")));
        match started.newest >= oldest {
            _ if known => {}
            true => drop(open.insert(*label)),
            false => give_up.push(*label),
        }
    }
    (open, give_up)
}

type Keeps = BTreeMap<BackupLabel, BTreeSet<Keep>>;

fn keep(keeps: &mut Keeps, label: BackupLabel, why: Keep) {
    keeps.entry(label).or_default().insert(why);
}

impl<'a> Facts<'a> {
    /// Which base backups are sound; of the others, why not.
    fn judge_backups(&mut self) -> BTreeMap<BackupLabel, String> {
        let inventory = &self.survey.inventory;
        let mut unsound = BTreeMap::new();
        for backup in &inventory.backups {
            let missing = self.survey.manifests.get(&backup.label).map(|references| references.missing.clone());
            let why = match (&backup.flagged, missing, Path::of(inventory, backup.branch)) {
                (Some(why), ..) => Some(format!("it is flagged: {why}")),
                (None, None, _) => Some("what it names is not known".to_owned()),
                (None, Some(Some(object)), _) => Some(format!("{object}, which it names, is not there")),
                (None, Some(None), path) => {
                    let built = match path {
                        Some(path) => Chain::build(inventory, backup, &path).map(|_| None),
                        None => Err(format!("the history file of branch {} is missing", backup.branch)),
                    };
                    let built = built.or_else(|why| self.builds_elsewhere(backup).map(Some).ok_or(why));
                    built.map(|elsewhere| self.elsewhere.extend(elsewhere.map(|path| (backup.label, path)))).err()
                }
            };
            match why {
                Some(why) => drop(unsound.insert(backup.label, why)),
                None => self.sound.push(backup),
            }
        }
        unsound
    }

    fn builds_elsewhere(&self, backup: &BackupInfo) -> Option<Path> {
        let inventory = &self.survey.inventory;
        let paths = inventory.branches.keys().filter_map(|branch| Path::of(inventory, *branch));
        let mut paths = paths.filter(|path| leads(path, backup));
        paths.find(|path| Chain::build(inventory, backup, path).is_ok())
    }

    /// The ends of histories of which instants within the window are promised.
    fn find_tips(&mut self) {
        let inventory = &self.survey.inventory;
        let newest = |branch: &Branch| {
            let objects = self.survey.wal.get(branch).map_or(&[][..], Vec::as_slice);
            objects.iter().map(|object| object.put_at).max()
        };
        let branches: Vec<Branch> = self.survey.wal.keys().copied().filter(|branch| newest(branch).is_some()).collect();
        let from = self.from.as_second();
        let mut tips: BTreeSet<Branch> =
            branches.iter().copied().filter(|branch| newest(branch).is_some_and(|newest| newest >= from)).collect();
        tips.extend(branches.iter().copied().max_by_key(|branch| (newest(branch), *branch)));
        // What `latest` means stays, however long nothing came.
        if let Some(base) = inventory.backups.last() {
            match latest_path(inventory, base.branch) {
                Ok((path, rivals)) => {
                    let with_wal = |branch: &Branch| branches.contains(branch);
                    // The newest timeline, and where none of its WAL is there yet, the one before it, to its own end: their base
                    // backups may differ.
                    tips.insert(path.tip);
                    let on_path = path.branches().into_iter().rev().map(|(branch, ..)| branch);
                    tips.extend(on_path.into_iter().find(with_wal));
                    tips.extend(rivals.into_iter().filter(with_wal));
                }
                Err(_) => {
                    self.keep_all_wal = true;
                    self.blocked.push("the history file of the newest timeline is missing: no WAL goes".to_owned());
                }
            }
        }
        for tip in tips {
            match Path::of(inventory, tip) {
                Some(path) => self.tips.push(path),
                None => {
                    self.keep_all_wal = true;
                    self.blocked.push(format!("the history file of branch {tip} is missing: no WAL goes"));
                }
            }
        }
    }

    /// What does not depend on WAL.
    fn keeps(&mut self, policy: &Policy) -> Keeps {
        let mut keeps = Keeps::new();
        let backups = &self.survey.inventory.backups;
        if self.sound.is_empty() || self.keep_all_wal {
            let why = if self.sound.is_empty() { Keep::NothingSound } else { Keep::NotUnderstood };
            backups.iter().for_each(|backup| keep(&mut keeps, backup.label, why.clone()));
            if self.sound.is_empty() && !backups.is_empty() {
                self.blocked.push("no base backup is sound: nothing goes".to_owned());
            }
            self.keep_all_wal = true;
        }
        if let Some(newest) = self.sound.last() {
            keep(&mut keeps, newest.label, Keep::Newest);
        }
        for backup in backups.iter().filter(|backup| backup.stopped_at > self.from) {
            keep(&mut keeps, backup.label, Keep::Window);
        }
        type Why = fn(String) -> Keep;
        let rules: [(u32, &str, Why); 4] = [
            (policy.daily, "%Y-%m-%d", |slot| Keep::Daily { slot }),
            (policy.weekly, "%G-W%V", |slot| Keep::Weekly { slot }),
            (policy.monthly, "%Y-%m", |slot| Keep::Monthly { slot }),
            (policy.yearly, "%Y", |slot| Keep::Yearly { slot }),
        ];
        for (count, format, why) in rules {
            let (mut last, mut left) = (None, count);
            for backup in self.sound.iter().rev() {
                let slot = backup.label.start().strftime(format).to_string();
                if left == 0 {
                    break;
                }
                if last.as_ref() != Some(&slot) {
                    keep(&mut keeps, backup.label, why(slot.clone()));
                    (last, left) = (Some(slot), left - 1);
                }
            }
        }
        for (place, backup) in (1..=policy.at_least).zip(self.sound.iter().rev()) {
            keep(&mut keeps, backup.label, Keep::AtLeast { place });
        }
        for label in &self.open {
            let parents = self.survey.starts.get(label).and_then(|started| started.parents.clone());
            // Of one that does not open nobody knows its parents.
            let parents = parents.unwrap_or_else(|| backups.iter().map(|backup| backup.label).collect());
            for parent in parents {
                keep(&mut keeps, parent, Keep::ParentOf { backup: *label });
            }
        }
        keeps
    }

    /// The newest base backup on the way to a tip that is consistent there and ended by then.
    fn base(&self, path: &Path, by: Timestamp) -> Option<&'a BackupInfo> {
        let on_the_way = self.sound.iter().copied().filter(|backup| leads(path, backup) && backup.stopped_at <= by);
        let mut on_the_way: Vec<&BackupInfo> = on_the_way.collect();
        on_the_way.sort_by_key(|backup| (backup.stopped_at, backup.label));
        on_the_way.into_iter().rev().find(|backup| Chain::build(&self.survey.inventory, backup, path).is_ok())
    }

    /// The oldest one.
    fn oldest(&self, path: &Path) -> Option<&'a BackupInfo> {
        let on_the_way = self.sound.iter().copied().filter(|backup| leads(path, backup));
        let mut on_the_way: Vec<&BackupInfo> = on_the_way.collect();
        on_the_way.sort_by_key(|backup| (backup.stopped_at, backup.label));
        on_the_way.into_iter().find(|backup| Chain::build(&self.survey.inventory, backup, path).is_ok())
    }

    /// Every instant of the window.
    fn window(&mut self, keeps: &mut Keeps, needs: &mut wal::Needs) {
        for path in &self.tips {
            match self.base(path, self.from).or_else(|| self.oldest(path)) {
                Some(base) => {
                    keep(keeps, base.label, Keep::WindowBase { branch: path.tip });
                    needs.way(path, base.start, None, base.segment_size);
                }
                // One may be on its way.
                None => {
                    if let Some(size) = self.survey.inventory.segment_size {
                        needs.way(path, Lsn::ZERO, None, size);
                    }
                }
            }
        }
    }

    fn holds(&mut self, keeps: &mut Keeps, needs: &mut wal::Needs) {
        let inventory = &self.survey.inventory;
        for hold in self.survey.holds.iter().filter(|hold| hold.is_in_force(self.now)) {
            let Some(record) = &hold.record else {
                self.keep_all_wal = true;
                self.blocked
                    .push(format!("hold {} does not open, so nobody knows what it holds: nothing goes", hold.name));
                inventory.backups.iter().for_each(|backup| keep(keeps, backup.label, Keep::NotUnderstood));
                continue;
            };
            let why = || Keep::Hold { hold: hold.name, reason: record.reason.clone() };
            let instant = match record.held {
                Held::Backup(label) => {
                    keep(keeps, label, why());
                    continue;
                }
                Held::Time(instant) => instant,
            };
            let early = instant.checked_sub(CLOCK_SKEW).unwrap_or(Timestamp::MIN);
            let late = instant.checked_add(CLOCK_SKEW).unwrap_or(Timestamp::MAX);
            for path in &self.tips {
                let Some(base) = self.base(path, early) else { continue };
                keep(keeps, base.label, why());
                // What lies behind the end of a base backup that began later is younger than the instant.
                let behind = inventory.backups.iter().filter(|backup| leads(path, backup) && backup.started_at >= late);
                needs.way(path, base.start, behind.map(|backup| backup.stop).min(), base.segment_size);
            }
        }
    }

    fn leases(&mut self, keeps: &mut Keeps, needs: &mut wal::Needs) {
        let inventory = &self.survey.inventory;
        for lease in &self.survey.leases {
            if self.now.duration_since(lease.beat_at) > LEASE_LASTS {
                continue;
            }
            let Some(record) = &lease.record else {
                self.keep_all_wal = true;
                self.blocked
                    .push(format!("lease {} does not open: nothing goes until it is a day old", lease.name.name()));
                inventory.backups.iter().for_each(|backup| keep(keeps, backup.label, Keep::NotUnderstood));
                continue;
            };
            if let Some(label) = record.backup {
                keep(keeps, label, Keep::Lease { lease: lease.name.name().to_owned() });
            }
            record.wal.iter().for_each(|range| needs.range(*range));
        }
    }
}

/// Can a base backup be the beginning of the way to a tip?
fn leads(path: &Path, backup: &BackupInfo) -> bool {
    path.contains(backup.branch) && path.history.left_at(backup.timeline).is_none_or(|left| backup.stop <= left)
}

/// Packs or pieces by name.
pub type Named = (Vec<PackName>, Vec<PartName>);
