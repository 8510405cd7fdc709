//! What was done and decided: events, numbered per writer and chained by digest.
//!
//! What always holds: an event is created and never replaced; the next number of a writer is taken by creating it. Each event
//! names the digest of the same writer's one before, and the newest events of other writers that its writer saw
//! ([`HEADS`] at most), so whoever removes or changes one leaves a name that fits nothing. Only the newest events are named by
//! nobody in the repository: their heads belong outside of it, and every writer logs them. [`verify`] compares.
//! An event tells of an action and is no part of it: one that cannot be put is said in the log, and nothing else comes of it.
//! Events are few and small; nobody removes them. They are bound to their repository and not copied.
//!
//! Crash: an event is there whole or not at all. Cancellation: likewise.

pub mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::CatalogError;
use super::kinds::kind_of;
use super::layout::{ClusterObject, Name, Object, folder};
use super::records::{self, GapReason, GapRecord, Record};
use super::repository::{Repository, name_of};
use super::retention::Held;
use crate::seal::{Recipient, SealError};
use crate::store::StoreError;
use crate::types::{BackupLabel, Branch, ClusterId, Digest, Id128, Lsn, ParseError, SystemId};

/// Heads of other writers that one event names, at most.
pub const HEADS: usize = 16;
/// Events that are read at the same time.
const AT_ONCE: usize = 16;
/// How often the next number is sought when somebody else took it.
const TRIES: usize = 5;
/// A repository that does not take an event within so long goes without it.
const DEADLINE: Duration = Duration::from_secs(30);

/// An event by its place and content: what is kept outside to know later that nothing was removed or changed.
/// As text `<writer>:<number>:<digest>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventHead {
    /// Whose.
    pub writer: Id128,
    /// Which, from 1.
    pub number: u32,
    /// Of its plaintext.
    pub digest: Digest,
}

impl fmt::Display for EventHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.writer, self.number, self.digest)
    }
}

impl FromStr for EventHead {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parts = || {
            let mut parts = text.trim().split(':');
            let head = EventHead {
                writer: parts.next()?.parse().ok()?,
                number: parts.next()?.parse().ok().filter(|number| *number > 0)?,
                digest: parts.next()?.parse().ok()?,
            };
            parts.next().is_none().then_some(head)
        };
        parts().ok_or_else(|| ParseError::new("an event's head, WRITER:NUMBER:DIGEST as the log shows it", text))
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Happened {
    /// The first event of a cluster in a repository.
    ClusterCreated {
        /// The server's system identifier.
        system: SystemId,
    },
    /// WAL comes in; whoever streamed before does not any more.
    StreamBegan {
        /// The history that is streamed.
        branch: Branch,
        /// From where on.
        at: Lsn,
    },
    /// No WAL comes in any more.
    StreamEnded {
        /// The history that was streamed.
        branch: Branch,
        /// Up to where it was durable in as many repositories as are needed.
        durable: Lsn,
        /// Why.
        reason: String,
    },
    /// WAL is missing or damaged.
    Gap {
        /// Of which history.
        branch: Branch,
        /// First byte.
        from: Lsn,
        /// First byte after it.
        to: Lsn,
        /// Why, as the gap's record says it.
        reason: GapReason,
    },
    /// Bytes came that another content stood in the way of.
    Conflict {
        /// The object under `conflict/` that keeps them.
        object: String,
    },
    /// A base backup is complete.
    BackupFinished {
        /// Its name.
        label: BackupLabel,
        /// Of its files.
        bytes: u64,
        /// What it added to the repository.
        stored_bytes: u64,
        /// Why it should not be used unless asked for by name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        flagged: Option<String>,
    },
    /// A base backup came to nothing.
    BackupFailed {
        /// Why.
        reason: String,
    },
    /// Expiry recorded or removed something.
    Expired {
        /// Base backups that are condemned from now on.
        condemned: Vec<BackupLabel>,
        /// Base backups whose manifests were removed.
        removed: Vec<BackupLabel>,
        /// Base backups that were given up.
        given_up: Vec<BackupLabel>,
        /// Objects that were removed.
        objects: u64,
        /// Their bytes.
        bytes: u64,
    },
    /// Something is not to be expired.
    HoldAdded {
        /// The hold's name.
        hold: BackupLabel,
        /// What it holds.
        held: Held,
        /// Why.
        reason: String,
        /// Until when; absent: until it is released.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<Timestamp>,
    },
    /// A hold is over.
    HoldReleased {
        /// The hold's name.
        hold: BackupLabel,
    },
    /// Content is sealed for another one, too.
    RecipientAdded {
        /// Who.
        recipient: Recipient,
        /// The list that says so.
        list: u32,
    },
    /// Content is not sealed for this one any more.
    RecipientRemoved {
        /// Who.
        recipient: Recipient,
        /// The list that says so.
        list: u32,
    },
    /// Content keys were exchanged.
    KeysRotated {
        /// The list that says so.
        list: u32,
    },
    /// Somebody began to restore.
    RestoreBegun {
        /// The target, as it was typed.
        target: String,
        /// The base backup.
        backup: BackupLabel,
    },
    /// What had to be read is there; the server recovers when it is started.
    RestoreFinished {
        /// The base backup.
        backup: BackupLabel,
        /// Of its files.
        bytes: u64,
    },
    /// A restore came to nothing.
    RestoreFailed {
        /// The base backup.
        backup: BackupLabel,
        /// Why.
        reason: String,
    },
    /// A drill is over.
    Drilled {
        /// The target as it was given or drawn.
        target: String,
        /// It found everything as it should be.
        passed: bool,
        /// What it found to be wrong.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<String>,
    },
    /// An object that was missing or damaged is there again.
    Repaired {
        /// Its name.
        object: String,
        /// The repository that still had it, by its name in the configuration.
        from: String,
    },
    /// Objects were copied here from another repository.
    Copied {
        /// The other repository, by its name in the configuration.
        from: String,
        /// Base backups that were copied or found to be there.
        backups: u64,
        /// Bytes that were put.
        bytes: u64,
    },
    /// A newer version's.
    #[serde(other)]
    Other,
}

/// An event as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Whose; also in its name.
    pub writer: Id128,
    /// From 1; also in its name.
    pub number: u32,
    /// When, by the writer's clock.
    pub at: Timestamp,
    /// Digest of the same writer's one before; absent in its first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Digest>,
    /// The newest events of other writers that this one saw.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub heads: Vec<EventHead>,
    /// What happened.
    pub event: Happened,
}

impl Record for EventRecord {
    const NAME: &'static str = "event";
}

/// An event as it is in a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// By its name.
    pub writer: Id128,
    /// By its name.
    pub number: u32,
    /// What it holds.
    pub content: Content,
}

/// What an event holds, or why that is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// It opened.
    Opened {
        /// Of its plaintext.
        digest: Digest,
        /// What it says.
        record: Box<EventRecord>,
    },
    /// It was sealed for another name.
    OfAnotherName,
    /// Two copies of it hold different things.
    TwoContents,
    /// It does not open, or is no event: why.
    Unreadable(String),
}

/// Every event's name, and when its newest copy was put, by the store's clock.
type Names = BTreeMap<(Id128, u32), Timestamp>;

impl Repository {
    /// Notes what happened, and logs the head. Where that fails, or takes too long, it is said in the log.
    pub async fn note_event(&self, cluster: &ClusterId, event: Happened) {
        let repository = self.name();
        match tokio::time::timeout(DEADLINE, self.append_event(cluster, event.clone())).await {
            Ok(Ok(head)) => tracing::info!(%cluster, repository, %head, "event: {event}"),
            // Whoever may only read leaves no trace, and is not kept from reading.
            Ok(Err(CatalogError::Store {
                source: StoreError::Denied { .. } | StoreError::ReadOnly { .. }, ..
            })) => {
                tracing::info!(%cluster, repository, "not noted among the events, the repository may only be read: {event}");
            }
            Ok(Err(error)) => tracing::warn!(%cluster, repository, %error, "not noted among the events: {event}"),
            Err(_) => {
                let seconds = DEADLINE.as_secs();
                tracing::warn!(%cluster, repository, "not noted among the events within {seconds} s: {event}");
            }
        }
    }

    /// The next event of this writer; its head. Costs a listing of the events and up to [`HEADS`] + 2 requests.
    ///
    /// # Errors
    /// What the store says.
    pub async fn append_event(&self, cluster: &ClusterId, event: Happened) -> Result<EventHead, CatalogError> {
        let writer = self.writer();
        for _ in 0..TRIES {
            let names = self.event_names(cluster).await?.0;
            let last = names.range((writer, 0)..=(writer, u32::MAX)).next_back().map(|((_, number), _)| *number);
            let previous = match last {
                Some(number) => match self.read_event(cluster, writer, number).await? {
                    Some(Listed { content: Content::Opened { digest, .. }, .. }) => Some(digest),
                    _ => None, // its own fault shows without this one's help
                },
                None => None,
            };
            let number = last.unwrap_or(0).saturating_add(1);
            let heads = self.newest_heads(cluster, &names).await?;
            let record = EventRecord { writer, number, at: self.now(), previous, heads, event: event.clone() };
            let object = ClusterObject::Event(writer, number);
            let json =
                records::to_json(&record).map_err(|source| self.record(&name_of(cluster, object.clone()), source))?;
            match self.put_record(cluster, object, &record).await {
                Ok(_) => return Ok(EventHead { writer, number, digest: Digest::of(&json) }),
                Err(CatalogError::Taken { .. }) => {} // another task of ours, in this moment
                Err(error) => return Err(error),
            }
        }
        Err(self.taken(&name_of(cluster, ClusterObject::Event(writer, 1))))
    }

    /// The newest events of other writers, newest first.
    async fn newest_heads(&self, cluster: &ClusterId, names: &Names) -> Result<Vec<EventHead>, CatalogError> {
        let own = self.writer();
        let mut heads: BTreeMap<Id128, (u32, Timestamp)> = BTreeMap::new();
        for ((writer, number), put_at) in names.iter().filter(|((writer, _), _)| *writer != own) {
            heads.insert(*writer, (*number, *put_at)); // ascending: the last one stays
        }
        let mut newest: Vec<(Timestamp, Id128, u32)> =
            heads.into_iter().map(|(writer, (number, put_at))| (put_at, writer, number)).collect();
        newest.sort_unstable_by(|a, b| b.cmp(a));
        newest.truncate(HEADS);
        let mut read =
            stream::iter(newest).map(|(_, writer, number)| self.read_event(cluster, writer, number)).buffered(AT_ONCE);
        let mut heads = Vec::new();
        while let Some(listed) = read.next().await {
            if let Some(Listed { writer, number, content: Content::Opened { digest, .. } }) = listed? {
                heads.push(EventHead { writer, number, digest });
            }
        }
        Ok(heads)
    }

    /// Whether there is any event of this cluster.
    ///
    /// # Errors
    /// What the store says.
    pub async fn has_events(&self, cluster: &ClusterId) -> Result<bool, CatalogError> {
        Ok(!self.event_names(cluster).await?.0.is_empty())
    }

    /// What is to be told of gaps and conflicts that are not among `known`, which they are added to: gaps that this
    /// run recorded, expiry's aside, and all conflicts.
    ///
    /// # Errors
    /// What the store says.
    pub async fn newly_noticed(
        &self,
        cluster: &ClusterId,
        known: &mut BTreeSet<String>,
    ) -> Result<Vec<Happened>, CatalogError> {
        let (gaps, conflicts) = (folder::gaps(cluster), folder::conflicts(cluster));
        let (gaps, conflicts) = futures_util::try_join!(self.list_under(&gaps), self.list_under(&conflicts))?;
        let mut noticed = Vec::new();
        for meta in gaps.into_iter().chain(conflicts) {
            let Ok(Name { object: Object::Of(_, object), .. }) = Name::parse(meta.key.as_str()) else { continue };
            let name = name_of(cluster, object.clone()).to_string();
            if known.contains(&name) {
                continue;
            }
            if let ClusterObject::Gap(branch, from, to) = object {
                match self.get_record::<GapRecord>(cluster, object).await {
                    Ok(gap) if gap.writer == self.writer() && gap.reason != GapReason::Expired => {
                        noticed.push(Happened::Gap { branch, from, to, reason: gap.reason });
                    }
                    Err(error) if !error.is_damage() && !error.is_not_found() => return Err(error),
                    Ok(_) | Err(_) => {} // another run's, which told it; or not to be read, which `check` tells
                }
            } else {
                noticed.push(Happened::Conflict { object: name.clone() });
            }
            known.insert(name);
        }
        Ok(noticed)
    }

    /// Every event, by writer and number; and names in their folder that are not understood.
    ///
    /// # Errors
    /// What the store says. What does not open is in the list.
    pub async fn events(&self, cluster: &ClusterId) -> Result<(Vec<Listed>, Vec<String>), CatalogError> {
        let (names, unknown) = self.event_names(cluster).await?;
        let mut read = stream::iter(names.into_keys())
            .map(|(writer, number)| self.read_event(cluster, writer, number))
            .buffered(AT_ONCE);
        let mut events = Vec::new();
        while let Some(listed) = read.next().await {
            events.extend(listed?);
        }
        drop(read);
        Ok((events, unknown))
    }

    async fn event_names(&self, cluster: &ClusterId) -> Result<(Names, Vec<String>), CatalogError> {
        let (mut names, mut unknown) = (Names::new(), BTreeSet::new());
        for meta in self.list_under(&folder::events(cluster)).await? {
            match Name::parse(meta.key.as_str()).map(|name| name.object) {
                Ok(Object::Of(_, ClusterObject::Event(writer, number))) => {
                    let put_at = names.entry((writer, number)).or_insert(meta.modified);
                    *put_at = meta.modified.max(*put_at);
                }
                _ => {
                    unknown.insert(meta.key.to_string());
                }
            }
        }
        Ok((names, unknown.into_iter().collect()))
    }

    /// `None`: it is not there any more.
    async fn read_event(
        &self,
        cluster: &ClusterId,
        writer: Id128,
        number: u32,
    ) -> Result<Option<Listed>, CatalogError> {
        let object = ClusterObject::Event(writer, number);
        let kind = kind_of(&object);
        let opened = self.get_object(&name_of(cluster, object), kind).await;
        let content = match opened {
            Ok(opened) => match records::from_json::<EventRecord>(&opened.plaintext) {
                Ok(record) => Content::Opened { digest: Digest::of(&opened.plaintext), record: Box::new(record) },
                Err(error) => Content::Unreadable(error.to_string()),
            },
            Err(error) if error.is_not_found() => return Ok(None),
            Err(CatalogError::TwoContents { .. }) => Content::TwoContents,
            Err(CatalogError::Sealed { source: SealError::NotThisObject { .. }, .. }) => Content::OfAnotherName,
            Err(error) if error.is_damage() => Content::Unreadable(error.to_string()),
            Err(error) => return Err(error),
        };
        Ok(Some(Listed { writer, number, content }))
    }
}

impl fmt::Display for Happened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |labels: &[BackupLabel]| labels.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Happened::ClusterCreated { system } => write!(f, "the first event here of the cluster {system}"),
            Happened::StreamBegan { branch, at } => write!(f, "WAL of {branch} comes in from {at} on"),
            Happened::StreamEnded { branch, durable, reason } => {
                write!(f, "WAL of {branch} comes in no more, it is durable up to {durable}: {reason}")
            }
            Happened::Gap { branch, from, to, reason } => {
                let reason = serde_json::to_value(reason).unwrap_or_default();
                write!(f, "gap in {branch} from {from} to {to} ({})", reason.as_str().unwrap_or("?"))
            }
            Happened::Conflict { object } => write!(f, "other content than was there is kept as {object}"),
            Happened::BackupFinished { label, bytes, stored_bytes, flagged } => {
                write!(f, "base backup {label} is complete: {bytes} bytes, {stored_bytes} stored")?;
                flagged.as_ref().map_or(Ok(()), |why| write!(f, "; FLAGGED: {why}"))
            }
            Happened::BackupFailed { reason } => write!(f, "a base backup failed: {reason}"),
            Happened::Expired { condemned, removed, given_up, objects, bytes } => {
                write!(f, "expired: {objects} objects of {bytes} bytes removed")?;
                for (what, labels) in [("condemned", condemned), ("manifests removed", removed), ("given up", given_up)]
                {
                    if !labels.is_empty() {
                        write!(f, "; {what}: {}", list(labels))?;
                    }
                }
                Ok(())
            }
            Happened::HoldAdded { hold, held, reason, until } => {
                let until = until.map(|until| format!(" until {until}")).unwrap_or_default();
                match held {
                    Held::Backup(label) => write!(f, "hold {hold} on base backup {label}{until}: {reason}"),
                    Held::Time(instant) => write!(f, "hold {hold} on the instant {instant}{until}: {reason}"),
                }
            }
            Happened::HoldReleased { hold } => write!(f, "hold {hold} is released"),
            Happened::RecipientAdded { recipient, list } => {
                write!(f, "content is sealed for {recipient}, too (list {list})")
            }
            Happened::RecipientRemoved { recipient, list } => {
                write!(f, "content is not sealed for {recipient} any more (list {list})")
            }
            Happened::KeysRotated { list } => write!(f, "content keys are exchanged (list {list})"),
            Happened::RestoreBegun { target, backup } => write!(f, "a restore to {target} from {backup} began"),
            Happened::RestoreFinished { backup, bytes } => {
                write!(f, "a restore from {backup} has its {bytes} bytes of files")
            }
            Happened::RestoreFailed { backup, reason } => write!(f, "a restore from {backup} failed: {reason}"),
            Happened::Drilled { target, passed: true, .. } => write!(f, "a drill to {target} passed"),
            Happened::Drilled { target, failure, .. } => {
                write!(f, "a drill to {target} FAILED: {}", failure.as_deref().unwrap_or("see `pgkeep drill --report`"))
            }
            Happened::Repaired { object, from } => write!(f, "{object} is repaired from repository {from}"),
            Happened::Copied { from, backups, bytes } => {
                write!(f, "copied from repository {from}: {backups} base backups, {bytes} bytes")
            }
            Happened::Other => f.write_str("something that this version of pgkeep does not know"),
        }
    }
}
