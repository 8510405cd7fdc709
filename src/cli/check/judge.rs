//! What is right and what is not, from facts that were gathered. Pure.
//!
//! `not ok` is what keeps pgkeep from protecting the cluster, or what it must not be run with; `warn` is what a person
//! should know and may have meant.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::cli::output;
use crate::cli::standing::{Lag, Standing};
use crate::store::s3::Finding;
use crate::types::{BackupLabel, Lsn, SegmentSize, SystemId};

/// Clocks may differ by this much without a word: a network's round trip, a second's granularity.
const SKEW: SignedDuration = SignedDuration::from_secs(5);
/// From here on a clock is wrong: times in plans and in retention would mislead.
const WRONG_CLOCK: SignedDuration = SignedDuration::from_secs(120);
/// A base backup that is older makes a restore replay for long.
const OLD_BACKUP: SignedDuration = SignedDuration::from_hours(7 * 24);
/// Archived this much behind the server, with somebody streaming: something does not keep up.
const LARGE_LAG: u64 = 1 << 30;
/// Versions of PostgreSQL that are tested.
const MAJORS: std::ops::RangeInclusive<u32> = 13..=18;
/// Streaming, and a base backup beside it.
const SENDERS_NEEDED: i64 = 2;

/// How an item stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum State {
    Ok,
    Warn,
    NotOk,
}

impl State {
    pub(super) fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warn => "warn",
            State::NotOk => "not ok",
        }
    }
}

/// One thing that must be right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Item {
    /// What was looked at; stays the same from version to version.
    pub item: &'static str,
    pub state: State,
    /// What was found, and why it matters where it is not ok.
    pub found: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub todo: Option<String>,
}

impl Item {
    pub(super) fn ok(item: &'static str, found: impl Into<String>) -> Item {
        Item { item, state: State::Ok, found: found.into(), todo: None }
    }

    pub(super) fn warn(item: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Item {
        Item { item, state: State::Warn, found: found.into(), todo: Some(todo.into()) }
    }

    pub(super) fn not_ok(item: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Item {
        let todo = Some(todo.into()).filter(|todo| !todo.is_empty());
        Item { item, state: State::NotOk, found: found.into(), todo }
    }
}

/// What the configuration says of the cluster.
#[derive(Debug, Clone)]
pub(super) struct Ours {
    pub application_name: String,
    pub slot: String,
    pub synchronous: bool,
}

/// What the server says of itself.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub version: u32,
    pub system: SystemId,
    pub flushed: Lsn,
    pub segment_size: SegmentSize,
    /// Settings by name, as text.
    pub settings: BTreeMap<String, String>,
    /// `None`: SQL is not allowed to this role.
    pub sql: Option<Sql>,
    /// Where the slot begins to keep WAL, by the walsender: all that is known of it without SQL (15 and later).
    pub slot_by_walsender: Option<Option<Lsn>>,
}

/// What only SQL tells.
#[derive(Debug, Clone)]
pub(super) struct Sql {
    /// The server's clock less ours.
    pub clock_ahead: SignedDuration,
    /// Walsenders in use, without the one that counts them.
    pub senders_used: i64,
    pub slot: Option<Slot>,
    /// It is a standby.
    pub standby: bool,
    /// How the server counts us among its standbys; `None`: nobody of our name streams.
    pub counted: Option<Counted>,
    /// Roles and databases that set `synchronous_commit` to `off` or `local` for themselves.
    pub not_waiting: i64,
}

/// A row of `pg_stat_replication`; `None` in it: this role may not see that.
#[derive(Debug, Clone, Default)]
pub(super) struct Counted {
    pub state: Option<String>,
    pub sync_state: Option<String>,
}

/// A row of `pg_replication_slots`.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub physical: bool,
    pub restart_lsn: Option<Lsn>,
    pub wal_status: Option<String>,
    pub safe_wal_size: Option<i64>,
    /// Process and application_name of who streams from it.
    pub active: Option<(i32, Option<String>)>,
}

/// What the repository holds of the cluster.
#[derive(Debug, Clone, Default)]
pub(super) struct Archive {
    /// System identifiers under the cluster's name.
    pub systems: Vec<SystemId>,
    pub segment_size: Option<SegmentSize>,
    /// How far it is.
    pub standing: Option<Standing>,
    /// How far it is behind the best repository, if another one is further.
    pub behind: Option<Lag>,
    pub newest_backup: Option<(BackupLabel, Timestamp)>,
    pub unfinished_backups: usize,
    /// Sentences: holes behind the newest base backup.
    pub gaps: Vec<String>,
    /// And those between the oldest one and the newest.
    pub older_gaps: Vec<String>,
    pub damaged: usize,
}

impl Server {
    pub(super) fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str)
    }

    fn number(&self, name: &str) -> Option<i64> {
        self.setting(name)?.parse().ok()
    }
}

fn size(bytes: u64) -> String {
    output::bytes(bytes)
}

/// What was found out about a bucket's server.
pub(super) fn store(findings: Vec<Finding>) -> Vec<Item> {
    let item = |finding: Finding| match finding.good {
        true => Item::ok("store", finding.text),
        false => Item { item: "store", state: State::Warn, found: finding.text, todo: None },
    };
    findings.into_iter().map(item).collect()
}

/// A clock against ours.
pub(super) fn clock(item: &'static str, whose: &str, ahead: SignedDuration) -> Item {
    let away = Duration::try_from(ahead.abs()).unwrap_or(Duration::MAX);
    let found = match ahead.is_negative() {
        _ if ahead.abs() < SignedDuration::from_secs(1) => format!("{whose} and this host agree"),
        true => format!("{whose} is {} behind this host's clock", output::duration(away)),
        false => format!("{whose} is {} ahead of this host's clock", output::duration(away)),
    };
    let todo = "set the clocks by NTP: times in plans and ages of objects are taken from them";
    match ahead.abs() {
        away if away <= SKEW => Item::ok(item, found),
        away if away <= WRONG_CLOCK => Item::warn(item, found, todo),
        _ => Item::not_ok(item, found, todo),
    }
}

/// Everything about the server itself.
pub(super) fn server(server: &Server, ours: &Ours) -> Vec<Item> {
    let mut items = vec![version(server.version)];
    items.extend(wal_level(server));
    items.extend(senders(server, ours));
    items.push(slot(server, ours));
    items.extend(full_page_writes(server));
    items.push(super::synchronous::judge(server, ours));
    items.extend(server.sql.as_ref().map(|sql| clock("clock of server", "the server's clock", sql.clock_ahead)));
    items
}

fn version(version: u32) -> Item {
    let (major, minor) = (version / 10_000, version % 10_000);
    let found = format!("PostgreSQL {major}.{minor}");
    match major {
        major if MAJORS.contains(&major) => Item::ok("version", found),
        major if major < *MAJORS.start() => {
            Item::not_ok("version", format!("{found} is not supported"), "13 is the oldest version that pgkeep reads")
        }
        _ => Item::warn("version", format!("{found} is newer than this pgkeep knows"), "look for a newer pgkeep"),
    }
}

fn wal_level(server: &Server) -> Option<Item> {
    let level = server.setting("wal_level")?;
    Some(match level {
        "minimal" => Item::not_ok(
            "wal_level",
            "minimal: the WAL does not hold what a restore needs",
            "ALTER SYSTEM SET wal_level = 'replica'; then restart the server",
        ),
        level => Item::ok("wal_level", level),
    })
}

fn senders(server: &Server, ours: &Ours) -> Option<Item> {
    let max = server.number("max_wal_senders")?;
    let Some(sql) = &server.sql else {
        return Some(match max {
            max if max < SENDERS_NEEDED => too_few(format!("{max} in all")),
            max => Item::ok("max_wal_senders", format!("{max}; how many are in use cannot be seen without SQL")),
        });
    };
    let we_stream = sql.slot.as_ref().is_some_and(|slot| is_ours(slot, ours));
    let needed = if we_stream { SENDERS_NEEDED - 1 } else { SENDERS_NEEDED };
    let free = max - sql.senders_used;
    let found = format!("{free} of {max} are free");
    Some(if free < needed { too_few(found) } else { Item::ok("max_wal_senders", found) })
}

fn too_few(found: String) -> Item {
    let found = format!("{found}: streaming takes one, a base backup another");
    Item::not_ok("max_wal_senders", found, "ALTER SYSTEM SET max_wal_senders = 10; then restart the server")
}

fn is_ours(slot: &Slot, ours: &Ours) -> bool {
    matches!(&slot.active, Some((_, Some(name))) if *name == ours.application_name)
}

fn slot(server: &Server, ours: &Ours) -> Item {
    const ITEM: &str = "slot";
    let name = &ours.slot;
    let absent = || {
        let found = format!("{name} is not there: the server may remove WAL that is not archived");
        Item::not_ok(ITEM, found, "`pgkeep run` makes it, `pgkeep init` too")
    };
    let Some(sql) = &server.sql else {
        return match server.slot_by_walsender {
            Some(Some(lsn)) => {
                Item::ok(ITEM, format!("{name} keeps {} of WAL; more cannot be seen without SQL", behind(server, lsn)))
            }
            Some(None) => absent(),
            None => {
                Item::warn(ITEM, format!("whether {name} is there cannot be seen without SQL"), "allow SQL to the role")
            }
        };
    };
    let Some(slot) = &sql.slot else { return absent() };
    if !slot.physical {
        return Item::not_ok(ITEM, format!("{name} is a logical slot"), "name another one with `slot = ...`");
    }
    let status = slot.wal_status.as_deref().unwrap_or("unknown");
    if matches!(status, "lost" | "unreserved") {
        return Item::not_ok(
            ITEM,
            format!("{name} is {status}: it was invalidated, and the server keeps no WAL for it"),
            "`pgkeep run` makes it anew and names the gap; take a base backup then; raise max_slot_wal_keep_size",
        );
    }
    let keeps = match slot.restart_lsn {
        Some(lsn) => format!("{name} is {status} and keeps {} of WAL", behind(server, lsn)),
        None => return Item::warn(ITEM, format!("{name} keeps no WAL yet"), "start `pgkeep run`"),
    };
    if let Some(safe) = slot.safe_wal_size
        && safe < i64::try_from(server.segment_size.bytes().saturating_mul(4)).unwrap_or(i64::MAX)
    {
        let left = size(u64::try_from(safe).unwrap_or(0));
        return Item::not_ok(
            ITEM,
            format!("{keeps}; after {left} more it is lost"),
            "see that `pgkeep run` streams; raise max_slot_wal_keep_size",
        );
    }
    match &slot.active {
        None => Item::warn(ITEM, format!("{keeps}; nobody streams from it"), "start `pgkeep run`"),
        Some((pid, _)) if is_ours(slot, ours) => Item::ok(ITEM, format!("{keeps}; pgkeep streams (process {pid})")),
        Some((pid, other)) => Item::warn(
            ITEM,
            format!("{keeps}; {} streams from it (process {pid})", other.as_deref().unwrap_or("somebody")),
            "is it meant to? A slot serves one archiver",
        ),
    }
}

fn behind(server: &Server, lsn: Lsn) -> String {
    size(server.flushed.bytes_since(lsn).unwrap_or(0))
}

fn full_page_writes(server: &Server) -> Option<Item> {
    let value = server.setting("full_page_writes")?;
    Some(match value {
        "off" => Item::warn(
            "full_page_writes",
            "off: a crash can tear pages, and base backups of a standby fail",
            "ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf();",
        ),
        value => Item::ok("full_page_writes", value),
    })
}

/// How many of a cluster's repositories answer, against how many must hold WAL before it is acknowledged.
pub(super) fn acknowledge(answering: usize, of: usize, needed: usize) -> Item {
    const ITEM: &str = "acknowledge";
    let found = format!("{answering} of {of} repositories answer, {needed} must hold WAL");
    match answering {
        few if few < needed => Item::not_ok(
            ITEM,
            format!("{found}: nothing is acknowledged, and the server keeps its WAL"),
            "see what is wrong with the repositories that do not answer, before the server's disk is full",
        ),
        some if some < of => Item::warn(ITEM, found, "those that are away are filled up when they come back"),
        _ => Item::ok(ITEM, found),
    }
}

/// What the repository holds against what the server is.
pub(super) fn archive(archive: &Archive, server: Option<&Server>, now: Timestamp) -> Vec<Item> {
    let mut items = Vec::new();
    if let Some(server) = server {
        items.push(identity(archive, server.system));
        items.extend(segment_size(archive, server.segment_size));
        items.push(lag(archive, server));
    }
    items.push(match archive.gaps.as_slice() {
        [] => Item::ok("WAL", "no gap behind the newest base backup"),
        gaps => Item::not_ok(
            "WAL",
            format!("{}: instants behind cannot be restored from the base backups before", gaps.join("; ")),
            "`pgkeep run` takes a base backup by itself when it finds one; without it: `pgkeep backup`",
        ),
    });
    if !archive.older_gaps.is_empty() {
        items.push(Item::warn(
            "older WAL",
            format!(
                "{}: instants behind, up to the next base backup, cannot be restored",
                archive.older_gaps.join("; ")
            ),
            "nothing brings it back; `pgkeep list --gaps` shows it until the base backups before it are gone",
        ));
    }
    if archive.damaged > 0 {
        let found = output::count(archive.damaged as u64, "object");
        items.push(Item::not_ok("objects", format!("{found} cannot be used"), "`pgkeep list` names them and says why"));
    }
    items.push(backup(archive, now));
    items
}

fn identity(archive: &Archive, system: SystemId) -> Item {
    const ITEM: &str = "system identifier";
    match archive.systems.first() {
        None => Item::ok(ITEM, format!("{system}; nothing is archived under this name yet")),
        Some(_) if archive.systems.contains(&system) => Item::ok(ITEM, format!("{system}, as in the repository")),
        Some(other) => Item::not_ok(
            ITEM,
            format!("the server has {system}, the repository holds {other} under this name"),
            "is this the right server? After initdb or pg_upgrade give the cluster a new name (name_in_repository)",
        ),
    }
}

fn segment_size(archive: &Archive, of_server: SegmentSize) -> Option<Item> {
    let archived = archive.segment_size?;
    Some(match archived == of_server {
        true => Item::ok("segment size", format!("{of_server}, as in the repository")),
        false => Item::not_ok(
            "segment size",
            format!("the server has {of_server}, the repository {archived}"),
            "after a change by pg_resetwal give the cluster a new name (name_in_repository)",
        ),
    })
}

fn lag(archive: &Archive, server: &Server) -> Item {
    const ITEM: &str = "archived";
    let frontier = archive.standing.as_ref().and_then(|standing| standing.frontier);
    let Some((_, frontier)) = frontier else {
        return Item::warn(ITEM, "nothing yet", "start `pgkeep run`");
    };
    let behind = archive.behind.as_ref().map(|behind| format!("; {}", behind.text())).unwrap_or_default();
    match server.flushed.bytes_since(frontier) {
        None => Item::not_ok(
            ITEM,
            format!("up to {frontier}, and the server has written only up to {}", server.flushed),
            "was the server rolled back to an older copy? `pgkeep run` will not mix the two; archive it under another name",
        ),
        Some(lag) if lag > LARGE_LAG => Item::warn(
            ITEM,
            format!("up to {frontier}, {} behind the server{behind}", size(lag)),
            "does `pgkeep run` stream? Is the repository too slow?",
        ),
        Some(lag) if archive.behind.as_ref().is_some_and(|behind| behind.lacks_segments) => Item::warn(
            ITEM,
            format!("up to {frontier}, {} behind the server{behind}: it is being filled up, or away", size(lag)),
            "`pgkeep run` fills it up from the other one; its log says why if it does not",
        ),
        Some(lag) => Item::ok(ITEM, format!("up to {frontier}, {} behind the server{behind}", size(lag))),
    }
}

fn backup(archive: &Archive, now: Timestamp) -> Item {
    const ITEM: &str = "base backup";
    let Some((label, at)) = &archive.newest_backup else {
        let found = match archive.unfinished_backups {
            0 => "none yet: nothing can be restored".to_owned(),
            some => format!("none is complete ({some} unfinished): nothing can be restored"),
        };
        return Item::warn(ITEM, found, "`pgkeep backup`");
    };
    let age = now.duration_since(*at);
    let shown = output::duration(Duration::try_from(age).unwrap_or(Duration::ZERO));
    match age {
        age if age > OLD_BACKUP => Item::warn(
            ITEM,
            format!("the newest, {label}, is {shown} old: a restore replays that much"),
            "`pgkeep backup`",
        ),
        _ => Item::ok(ITEM, format!("{label}, {shown} old")),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    pub(in crate::cli::check) fn ours() -> Ours {
        Ours { application_name: "pgkeep".to_owned(), slot: "pgkeep".to_owned(), synchronous: false }
    }

    fn good_slot() -> Slot {
        Slot {
            physical: true,
            restart_lsn: Some(Lsn::new(5 * GIB)),
            wal_status: Some("reserved".to_owned()),
            safe_wal_size: None,
            active: Some((77, Some("pgkeep".to_owned()))),
        }
    }

    pub(in crate::cli::check) fn good() -> Server {
        let settings = [
            ("wal_level", "replica"),
            ("max_wal_senders", "10"),
            ("full_page_writes", "on"),
            ("synchronous_standby_names", ""),
            ("synchronous_commit", "on"),
        ];
        Server {
            version: 150_018,
            system: SystemId::new(7),
            flushed: Lsn::new(5 * GIB + 100),
            segment_size: SegmentSize::new(16 << 20).unwrap(),
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            sql: Some(Sql {
                clock_ahead: SignedDuration::ZERO,
                senders_used: 1,
                slot: Some(good_slot()),
                standby: false,
                counted: Some(Counted { state: Some("streaming".to_owned()), sync_state: Some("async".to_owned()) }),
                not_waiting: 0,
            }),
            slot_by_walsender: None,
        }
    }

    fn changed(change: impl FnOnce(&mut Server)) -> Vec<Item> {
        let mut facts = good();
        change(&mut facts);
        server(&facts, &ours())
    }

    fn set(name: &'static str, value: &'static str) -> Vec<Item> {
        changed(|server| drop(server.settings.insert(name.to_owned(), value.to_owned())))
    }

    fn with_slot(change: impl FnOnce(&mut Slot)) -> Vec<Item> {
        changed(|server| change(server.sql.as_mut().unwrap().slot.as_mut().unwrap()))
    }

    #[track_caller]
    fn state_of(items: &[Item], item: &str) -> State {
        items.iter().find(|found| found.item == item).unwrap_or_else(|| panic!("no item {item}: {items:?}")).state
    }

    #[test]
    fn a_good_server_is_ok_throughout() {
        let items = server(&good(), &ours());
        assert!(items.iter().all(|item| item.state == State::Ok), "{items:?}");
        let archive_items = archive(
            &Archive { standing: up_to(5 * GIB), systems: vec![SystemId::new(7)], ..Archive::default() },
            Some(&good()),
            Timestamp::UNIX_EPOCH,
        );
        assert_eq!(state_of(&archive_items, "archived"), State::Ok);
    }

    #[test]
    fn each_thing_that_is_wrong_is_seen() {
        let cases = [
            ("version", State::NotOk, changed(|server| server.version = 120_022)),
            ("version", State::Warn, changed(|server| server.version = 200_001)),
            ("wal_level", State::NotOk, set("wal_level", "minimal")),
            ("max_wal_senders", State::NotOk, set("max_wal_senders", "1")),
            ("full_page_writes", State::Warn, set("full_page_writes", "off")),
            ("slot", State::NotOk, changed(|server| server.sql.as_mut().unwrap().slot = None)),
            ("slot", State::NotOk, with_slot(|slot| slot.physical = false)),
            ("slot", State::NotOk, with_slot(|slot| slot.wal_status = Some("lost".to_owned()))),
            ("slot", State::NotOk, with_slot(|slot| slot.safe_wal_size = Some(1 << 20))),
            ("slot", State::Warn, with_slot(|slot| slot.active = None)),
            ("slot", State::Warn, with_slot(|slot| slot.active = Some((7, Some("pg_receivewal".to_owned()))))),
            ("clock of server", State::NotOk, {
                changed(|server| server.sql.as_mut().unwrap().clock_ahead = SignedDuration::from_secs(-600))
            }),
        ];
        for (item, want, items) in cases {
            assert_eq!(state_of(&items, item), want, "{item}: {items:?}");
            let todo = items.iter().find(|found| found.item == item).and_then(|found| found.todo.as_deref());
            assert!(todo.is_some_and(|todo| !todo.is_empty()), "{item}: what is to be done?");
        }
    }

    #[test]
    fn without_sql_what_the_walsender_tells_has_to_do() {
        let blind = |slot| changed(|server| (server.sql, server.slot_by_walsender) = (None, slot));
        assert_eq!(state_of(&blind(Some(Some(Lsn::new(GIB)))), "slot"), State::Ok);
        assert_eq!(state_of(&blind(Some(None)), "slot"), State::NotOk);
        assert_eq!(state_of(&blind(None), "slot"), State::Warn);
        assert_eq!(state_of(&blind(None), "max_wal_senders"), State::Ok);
    }

    fn up_to(lsn: u64) -> Option<Standing> {
        let branch = crate::types::Branch::first(crate::types::TimelineId::FIRST);
        let (repository, frontier) = ("second".to_owned(), Some((branch, Lsn::new(lsn))));
        Some(Standing { repository, frontier, as_of: None, segment_size: SegmentSize::new(1 << 20) })
    }

    #[test]
    fn whether_enough_repositories_answer() {
        let states =
            [(3, State::Ok), (2, State::Warn), (1, State::NotOk)].map(|(n, want)| (acknowledge(n, 3, 2).state, want));
        assert!(states.iter().all(|(got, want)| got == want), "{states:?}");
    }

    #[test]
    fn what_is_archived_is_held_against_the_server() {
        let at = |archive: &Archive| archive_items(archive);
        fn archive_items(held: &Archive) -> Vec<Item> {
            archive(held, Some(&good()), Timestamp::from_second(30 * 86_400).unwrap())
        }
        let label = BackupLabel::at(Timestamp::UNIX_EPOCH);
        let old = Archive { newest_backup: Some((label, Timestamp::UNIX_EPOCH)), ..Archive::default() };
        let empty = at(&Archive::default());
        assert_eq!(state_of(&empty, "archived"), State::Warn);
        assert_eq!(state_of(&empty, "base backup"), State::Warn);
        assert_eq!(state_of(&empty, "system identifier"), State::Ok);
        assert_eq!(state_of(&at(&old), "base backup"), State::Warn);
        let foreign = Archive { systems: vec![SystemId::new(8)], ..Archive::default() };
        assert_eq!(state_of(&at(&foreign), "system identifier"), State::NotOk);
        let ahead = Archive { standing: up_to(6 * GIB), ..Archive::default() };
        assert_eq!(state_of(&at(&ahead), "archived"), State::NotOk);
        let far = Archive { standing: up_to(GIB), ..Archive::default() };
        assert_eq!(state_of(&at(&far), "archived"), State::Warn);
        let lag = |lacks_segments| Lag { best: "main".to_owned(), bytes: 9, seconds: Some(3), lacks_segments };
        let near = |lag| Archive { standing: up_to(5 * GIB), behind: Some(lag), ..Archive::default() };
        assert_eq!(state_of(&at(&near(lag(false))), "archived"), State::Ok);
        assert_eq!(state_of(&at(&near(lag(true))), "archived"), State::Warn);
        assert!(at(&near(lag(true))).iter().any(|item| item.found.contains("9 bytes and 3 s behind main")));
        let resized = Archive { segment_size: SegmentSize::new(1 << 20), ..Archive::default() };
        assert_eq!(state_of(&at(&resized), "segment size"), State::NotOk);
        let gap = Archive { gaps: vec!["a gap".to_owned()], damaged: 2, ..Archive::default() };
        assert_eq!((state_of(&at(&gap), "WAL"), state_of(&at(&gap), "objects")), (State::NotOk, State::NotOk));
    }
}
