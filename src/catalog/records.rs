//! What pgkeep writes down about WAL and base backups: records (objects of JSON) and notes (JSON in a sealed footer).
//!
//! All of it is sealed under the meta key, so an archiver that cannot read a row can read its own records.
//! A reader ignores fields that it does not know, unless the record names them in its `critical` list: then it refuses
//! the record with a sentence, because understanding only the rest would be misunderstanding it.
//! `docs/format.md` lists every field.

use bytes::Bytes;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::layout::{PackName, PartName};
use crate::types::{BackupLabel, Branch, Digest, Id128, Lsn, PgTimestamp, SegmentSize, SystemId, TimelineId};

/// Why a record's plaintext is not understood.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It opened, so a pgkeep wrote it; but it is not JSON of this shape.
    #[error("it is not a {record} record as this version of pgkeep knows it")]
    Shape {
        /// What it should be: [`Record::NAME`].
        record: &'static str,
        /// Where JSON and shape part.
        source: serde_json::Error,
    },
    /// It is a record of another kind.
    #[error("it is a {found:?} record, not a {expected} record")]
    Other {
        /// What was sought.
        expected: &'static str,
        /// What it says it is.
        found: String,
    },
    /// A newer version wrote something that must not be ignored.
    #[error(
        "it says {field:?}, which this version of pgkeep does not understand and must not ignore; use a newer pgkeep"
    )]
    Critical {
        /// The field's name.
        field: String,
    },
}

/// Something that is written as a JSON object under a name of its own.
pub trait Record: Serialize + DeserializeOwned {
    /// The value of the field `record`.
    const NAME: &'static str;
    /// Fields that may stand in `critical`, because this version acts on them.
    const UNDERSTOOD: &'static [&'static str] = &[];
}

#[derive(Deserialize)]
struct Head {
    record: String,
    #[serde(default)]
    critical: Vec<String>,
}

#[derive(Serialize)]
struct Tagged<'a, T> {
    record: &'static str,
    #[serde(flatten)]
    fields: &'a T,
}

/// The JSON of a record: its fields, and `record` with its name.
pub fn to_json<T: Record>(record: &T) -> Result<Vec<u8>, RecordError> {
    let tagged = Tagged { record: T::NAME, fields: record };
    serde_json::to_vec(&tagged).map_err(|source| RecordError::Shape { record: T::NAME, source })
}

/// Reads a record; refuses one of another kind and one with a critical field that is not understood.
pub fn from_json<T: Record>(json: &[u8]) -> Result<T, RecordError> {
    let shape = |source| RecordError::Shape { record: T::NAME, source };
    let head: Head = serde_json::from_slice(json).map_err(shape)?;
    if head.record != T::NAME {
        return Err(RecordError::Other { expected: T::NAME, found: head.record });
    }
    if let Some(field) = head.critical.into_iter().find(|field| !T::UNDERSTOOD.contains(&field.as_str())) {
        return Err(RecordError::Critical { field });
    }
    serde_json::from_slice(json).map_err(shape)
}

/// The note of a WAL range (in its footer) or of a tail (in its prelude).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalRangeNote {
    /// The run of pgkeep that wrote it.
    pub writer: Id128,
    /// `server_version_num`; 0 where `wal push` could not tell.
    pub server_version: u32,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
    /// Digest of the segment's bytes `[0, from)`: what came before these bytes, for this writer.
    pub digest_from: Digest,
    /// Digest of the segment's bytes `[0, to)`. A tail has none: nobody knew its end when it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest_to: Option<Digest>,
    /// The server's clock when the last of these bytes was sent. `wal push` does not know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_time: Option<PgTimestamp>,
    /// How far the server's WAL reached at that time. `wal push` does not know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_end: Option<Lsn>,
    /// How far the repository was known to hold the branch without a hole when this was cut: what is missing behind that was
    /// under way with it, and nobody had been told that it is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durable_to: Option<Lsn>,
    /// Only in an object under `conflict/`: what it could not stand beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflict: Option<ConflictNote>,
}

impl Record for WalRangeNote {
    const NAME: &'static str = "wal";
}

/// The note of a history file, or of a kept `.partial` or `.backup` file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileNote {
    /// The run of pgkeep that wrote it.
    pub writer: Id128,
    /// Digest of the file's bytes.
    pub digest: Digest,
    /// Of a history file: those of its ancestors that are not their timeline's first history.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ancestors: Vec<Branch>,
    /// Only in an object under `conflict/`: what it could not stand beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflict: Option<ConflictNote>,
}

impl Record for FileNote {
    const NAME: &'static str = "file";
}

/// Two contents wanted one name. Stands in the note of the one that came second, under `conflict/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConflictNote {
    /// The name that was taken, in full.
    pub name: String,
    /// Digest of the content that was there first.
    pub theirs: Digest,
    /// Digest of the content kept here.
    pub ours: Digest,
    /// Who wrote what was there first.
    pub their_writer: Id128,
    /// When it was noticed, by our clock.
    pub noticed_at: Timestamp,
}

/// Why WAL is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GapReason {
    /// The slot was gone or invalidated, and the server had recycled what it would have kept.
    SlotLost,
    /// The server no longer had it.
    Recycled,
    /// A primary that was failed over wrote it, and nobody streamed it.
    Failover,
    /// The history file of a timeline is missing, so its WAL belongs nowhere.
    MissingHistory,
    /// The server's bytes differ from what is archived from here on.
    Differs,
    /// Retention removed it: no policy asked for it any more.
    Expired,
    /// Nothing is missing: the server's WAL came damaged and is archived as it came. Recovery stops at its beginning.
    Damaged,
    /// A newer version's reason.
    #[serde(other)]
    Other,
}

/// WAL that should be there and is not. Recovery never runs across one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapRecord {
    /// The history that lacks it.
    pub branch: Branch,
    /// First missing byte.
    pub from: Lsn,
    /// First byte after the gap: where archiving went on.
    pub to: Lsn,
    /// Why.
    pub reason: GapReason,
    /// When it was noticed, by our clock.
    pub noticed_at: Timestamp,
    /// The run of pgkeep that noticed.
    pub writer: Id128,
}

impl Record for GapRecord {
    const NAME: &'static str = "gap";
}

/// A base backup was begun. It pins the packs of its parents until its manifest or tombstone is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupStart {
    /// Its name.
    pub label: BackupLabel,
    /// The run of pgkeep that takes it.
    pub writer: Id128,
    /// When, by our clock.
    pub started_at: Timestamp,
    /// Backups whose packs it may reference.
    #[serde(default)]
    pub parents: Vec<BackupLabel>,
}

impl Record for BackupStart {
    const NAME: &'static str = "backup-start";
}

/// A tablespace other than `pg_default` and `pg_global`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespaceInfo {
    /// Its oid: the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Where the link pointed on the server.
    pub location: String,
}

/// The server's settings that a standby must not have smaller (POSTGRES.md 9.5), as `pg_control` had them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerParameters {
    /// `max_connections`
    pub max_connections: u32,
    /// `max_worker_processes`
    pub max_worker_processes: u32,
    /// `max_wal_senders`
    pub max_wal_senders: u32,
    /// `max_prepared_transactions`
    pub max_prepared_transactions: u32,
    /// `max_locks_per_transaction`
    pub max_locks_per_transaction: u32,
}

/// A complete base backup, without its tables: what lists and plans need. Stands in the manifest and in its footer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupInfo {
    /// Its name.
    pub label: BackupLabel,
    /// The server's system identifier.
    pub system: SystemId,
    /// The history its WAL belongs to.
    pub branch: Branch,
    /// The timeline of its checkpoint.
    pub timeline: TimelineId,
    /// Where recovery starts: WAL is needed from the first byte of this position's segment.
    pub start: Lsn,
    /// Where the backup is consistent: WAL is needed up to here at least.
    pub stop: Lsn,
    /// When it started, by our clock.
    pub started_at: Timestamp,
    /// When it stopped, by our clock.
    pub stopped_at: Timestamp,
    /// `server_version_num`
    pub server_version: u32,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
    /// Size of all its files.
    pub bytes: u64,
    /// What it added to the repository, sealed.
    pub stored_bytes: u64,
    /// Number of its files.
    pub files: u64,
    /// Its tablespaces.
    #[serde(default)]
    pub tablespaces: Vec<TablespaceInfo>,
    /// Why it should not be used unless asked for by name: failed page checksums.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flagged: Option<String>,
    /// Settings that a restore must not go below.
    #[serde(default)]
    pub parameters: ServerParameters,
}

impl Record for BackupInfo {
    const NAME: &'static str = "backup";
}

/// A pack as its manifest knows it: enough to read any of its frames with one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackRef {
    /// Its name, and the backup that wrote it.
    pub pack: PackName,
    /// Length of the object, in bytes.
    pub len: u64,
    /// The object's header.
    #[serde(with = "base64_text")]
    pub header: Bytes,
    /// Bytes of plaintext it holds.
    pub plaintext_len: u64,
    /// Bytes of plaintext that this backup uses.
    pub live: u64,
}

/// A piece of a table as its manifest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartRef {
    /// Its name, and the backup that wrote it.
    pub part: PartName,
    /// Length of the object, in bytes.
    pub len: u64,
    /// Files (of a file table) or blocks (of tags) in it.
    pub entries: u64,
}

/// The note of a pack or a piece of a table that was sealed anew from another realm's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedNote {
    /// The realm it came from.
    pub realm: Id128,
    /// The header of the object there, which no other object has.
    #[serde(with = "base64_text")]
    pub header: Bytes,
}

impl Record for CopiedNote {
    const NAME: &'static str = "copied";
}

/// The record that makes a base backup exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What lists and plans need.
    pub backup: BackupInfo,
    /// Every pack it uses, its own and others'.
    pub packs: Vec<PackRef>,
    /// The file table, in order of path within a piece.
    pub tables: Vec<PartRef>,
    /// The block tags, which a child compares with.
    #[serde(default)]
    pub tags: Vec<PartRef>,
    /// PostgreSQL's `backup_manifest`, in pieces to be joined.
    #[serde(default)]
    pub server_manifest: Vec<PartRef>,
    /// Backups it was compared with. It does not need them: every pack is named above.
    #[serde(default)]
    pub parents: Vec<BackupLabel>,
}

impl Record for Manifest {
    const NAME: &'static str = "manifest";
}

/// Bytes as base64 text.
mod base64_text {
    use base64::prelude::{BASE64_STANDARD, Engine};
    use bytes::Bytes;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&base64::display::Base64Display::new(bytes, &BASE64_STANDARD))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text.as_bytes()).map(Bytes::from).map_err(D::Error::custom)
    }
}
