//! The server as the archiver meets it: who it is, which histories it knows, what its slot keeps.

use bytes::Bytes;

use super::ArchiveError;
use super::resume::ServerState;
use crate::pg::{ConnInfo, ConnectOptions, PgError, Replication, ServerErrorKind, Session, quote_literal};
use crate::types::{Lineage, Lsn, SegmentSize, SystemId, TimelineHistory, TimelineId};

/// Where WAL comes from.
#[derive(Debug, Clone)]
pub struct Source {
    /// libpq's words.
    pub conninfo: ConnInfo,
    /// Names us to the server; `synchronous_standby_names` matches it.
    pub connect: ConnectOptions,
    /// The physical slot that keeps WAL for us.
    pub slot: String,
}

/// A connection to the server and what it said of itself.
#[derive(Debug)]
pub struct Connected {
    /// A walsender session, idle.
    pub replication: Replication,
    /// The cluster's identity.
    pub system: SystemId,
    /// Its segment size.
    pub size: SegmentSize,
    /// `server_version_num`.
    pub version: u32,
    /// The history of the timeline that it is on.
    pub history: TimelineHistory,
    /// How far it had flushed (or replayed) WAL when it was asked.
    pub flushed: Lsn,
    /// What the slot keeps.
    pub slot: SlotState,
    /// The history files of the server's path, oldest first: what is archived before any WAL of those timelines.
    pub histories: Vec<(TimelineId, Bytes)>,
}

impl Source {
    /// Connects and asks the server who it is. Changes nothing there.
    pub async fn connect(&self) -> Result<Connected, ArchiveError> {
        let mut replication = Replication::connect(&self.conninfo, &self.connect).await?;
        let identity = replication.identify_system().await?;
        let size = replication.segment_size().await?;
        let version = replication.server_version_num();
        let (history, histories) = histories(&mut replication, identity.timeline).await?;
        let slot = self.slot(&mut replication, version).await?;
        Ok(Connected {
            system: identity.system,
            size,
            version,
            history,
            flushed: identity.flushed,
            slot,
            histories,
            replication,
        })
    }

    /// What the slot keeps, as far as the server tells.
    async fn slot(&self, replication: &mut Replication, version: u32) -> Result<SlotState, ArchiveError> {
        match self.slot_by_sql().await {
            Ok(None) => Ok(SlotState::Missing),
            // While somebody streams from it, it is theirs to make anew.
            Ok(Some(slot)) if slot.lost && !slot.active => Ok(SlotState::Lost),
            Ok(Some(slot)) => Ok(slot.restart_lsn.map_or(SlotState::Unknown, SlotState::BeginsAt)),
            // A role that may only replicate cannot ask by SQL.
            Err(error) if version >= 150_000 => {
                tracing::debug!(%error, "pg_replication_slots cannot be read; asking the walsender");
                Ok(match replication.read_slot(&self.slot).await? {
                    None => SlotState::Missing,
                    Some(slot) => slot.restart_lsn.map_or(SlotState::Lost, SlotState::BeginsAt),
                })
            }
            Err(error) => {
                tracing::debug!(%error, "pg_replication_slots cannot be read, and this server tells nothing else");
                Ok(SlotState::Unknown)
            }
        }
    }

    /// Makes the slot where it is missing, and anew where it keeps nothing any more: what it lost shows as a gap when the
    /// stream begins.
    pub async fn make_slot(&self, connected: &mut Connected) -> Result<(), ArchiveError> {
        let replication = &mut connected.replication;
        match connected.slot {
            SlotState::BeginsAt(_) => return Ok(()),
            SlotState::Lost => {
                tracing::warn!(slot = %self.slot, "the slot keeps no WAL any more (invalidated); it is made anew");
                replication.drop_slot(&self.slot).await?;
            }
            SlotState::Missing | SlotState::Unknown => {}
        }
        match replication.create_slot(&self.slot).await {
            Ok(()) => tracing::info!(slot = %self.slot, "the replication slot was made"),
            Err(error) if error.server_kind() == Some(ServerErrorKind::AlreadyExists) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        connected.slot = self.slot(&mut connected.replication, connected.version).await?;
        Ok(())
    }

    /// Is the server a standby? `None` where it does not say.
    pub async fn is_standby(&self) -> Option<bool> {
        let mut session = Session::connect(&self.conninfo, &self.connect).await.ok()?;
        let rows = session.query("SELECT pg_catalog.pg_is_in_recovery()").await;
        session.close().await;
        Some(rows.ok()?.first()?.get(0)? == "t")
    }

    /// The slot's row in `pg_replication_slots`; `None` where there is none.
    pub async fn slot_by_sql(&self) -> Result<Option<SlotRow>, PgError> {
        let mut session = Session::connect(&self.conninfo, &self.connect).await?;
        let sql = format!(
            "SELECT restart_lsn, wal_status, active, active_pid FROM pg_catalog.pg_replication_slots \
             WHERE slot_name = {} AND slot_type = 'physical'",
            quote_literal(&self.slot)
        );
        let rows = session.query(&sql).await;
        session.close().await;
        let Some(row) = rows?.into_iter().next() else { return Ok(None) };
        Ok(Some(SlotRow {
            restart_lsn: row.get(0).and_then(|lsn| lsn.parse().ok()),
            lost: matches!(row.get(1), Some("lost" | "unreserved")),
            active: row.get(2) == Some("t"),
            active_pid: row.get(3).and_then(|pid| pid.parse().ok()),
        }))
    }
}

impl Connected {
    /// What [`super::resume`] decides by.
    pub fn state(&self) -> ServerState {
        let slot_begins_at = match self.slot {
            SlotState::BeginsAt(at) => Some(at),
            SlotState::Missing | SlotState::Lost | SlotState::Unknown => None,
        };
        let (history, flushed, lineage) = (self.history.clone(), self.flushed, Lineage::default());
        ServerState { history, flushed, slot_begins_at, lineage, differs_from: None }
    }
}

/// What a slot keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    /// There is none of this name.
    Missing,
    /// It was invalidated: it streams, and keeps nothing.
    Lost,
    /// It is there (or may be); where it begins is not known.
    Unknown,
    /// It keeps WAL from here on.
    BeginsAt(Lsn),
}

/// What `pg_replication_slots` says of a slot.
#[derive(Debug, Clone, Copy)]
pub struct SlotRow {
    /// Where it begins to keep WAL; `None` before the first reservation and after an invalidation.
    pub restart_lsn: Option<Lsn>,
    /// It keeps nothing any more, whatever it streams (`wal_status` lost or unreserved).
    pub lost: bool,
    /// Somebody streams from it.
    pub active: bool,
    /// Who.
    pub active_pid: Option<i32>,
}

/// The history of the server's timeline, and the files of it and of its ancestors. An ancestor's file that the server
/// has lost is derived from its descendant's.
async fn histories(
    replication: &mut Replication,
    timeline: TimelineId,
) -> Result<(TimelineHistory, Vec<(TimelineId, Bytes)>), ArchiveError> {
    let Some(text) = replication.timeline_history(timeline).await? else {
        return Ok((TimelineHistory::root(timeline), Vec::new()));
    };
    let history =
        TimelineHistory::parse(timeline, &text).map_err(|source| ArchiveError::History { timeline, source })?;
    let mut files = Vec::new();
    for ancestor in history.ancestors().iter().map(|entry| entry.timeline) {
        let file = match replication.timeline_history(ancestor).await? {
            Some(file) => Some(file),
            None => history.ancestor_history(ancestor).map(|derived| Bytes::from(derived.to_text())),
        };
        files.extend(file.filter(|file| !file.is_empty()).map(|file| (ancestor, file)));
    }
    files.push((timeline, text));
    Ok((history, files))
}
