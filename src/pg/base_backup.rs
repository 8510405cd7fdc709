//! `BASE_BACKUP`: a whole cluster as tar archives over a replication connection (POSTGRES.md 2).
//!
//! The two dialects, up to 14 and from 15 on, come out as the same events: [`BackupEvent::Started`], then for each
//! tablespace, the base directory last, [`BackupEvent::Archive`] and its data, then the server's manifest, then one of
//! [`BackupEvent::Finished`] and [`BackupEvent::Damaged`]. Links of tablespaces are in the archive of the base directory.
//!
//! What always holds: nothing is finished before the server said ReadyForQuery, and only when every announced archive and
//! the manifest came. The server does not wait for WAL to be archived: that the WAL from start to end is durable is the
//! caller's to see to. While the checkpoint is made there is no deadline, only the connection's keepalive; afterwards a
//! server that is silent for [`BaseBackupOptions::silence`] is given up.
//! Cancellation: [`BaseBackup::next`] may be dropped at any await. Dropping a [`BaseBackup`] closes the connection, which
//! ends the backup on the server; nothing is left there.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::time::{Instant, timeout_at};

use super::{Connection, Message, PgError, Replication, Row, ServerError, quote_label};
use crate::types::{Lsn, TimelineId};

/// First server that has `BASE_BACKUP (…)` and one copy for everything.
const PARENTHESISED: u32 = 150_000;
/// Oldest server that has a manifest.
const OLDEST: u32 = 130_000;
/// What the server takes as `MAX_RATE`, in kB/s.
const MAX_RATES: std::ops::RangeInclusive<u32> = 32..=1_048_576;
/// Longest label a server takes, in bytes.
const MAX_LABEL_BYTES: usize = 1024;
/// Tablespaces of one cluster, at most (P8).
const MAX_TABLESPACES: usize = 1 << 16;
/// Warnings that are kept for the end; each was an event of its own.
const MAX_WARNINGS: usize = 20;
/// data_corrupted: what the server calls a page whose checksum is wrong, after everything was sent.
const DATA_CORRUPTED: &str = "XX001";

/// How the checkpoint is made that a backup begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointSpeed {
    /// At once, as fast as the disks go.
    Fast,
    /// Spread over time, sparing the server: up to `checkpoint_timeout`, while nothing is sent.
    Spread,
}

/// How a base backup is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// Goes into `backup_label`; at most 1024 bytes.
    pub label: String,
    /// The checkpoint at the start.
    pub checkpoint: CheckpointSpeed,
    /// Most kB (1024 bytes) per second that the server sends, 32 to 1048576; `None`: as fast as it goes.
    pub max_rate: Option<u32>,
    /// Should the server check page checksums, where the cluster has them?
    pub verify_checksums: bool,
    /// How long the server may send nothing, once data flows. Not for the checkpoint.
    pub silence: Duration,
}

impl BaseBackupOptions {
    /// A fast checkpoint, no limit, checksums checked, five minutes of silence.
    pub fn new(label: impl Into<String>) -> BaseBackupOptions {
        BaseBackupOptions {
            label: label.into(),
            checkpoint: CheckpointSpeed::Fast,
            max_rate: None,
            verify_checksums: true,
            silence: Duration::from_secs(300),
        }
    }

    /// The command in the server's dialect; the reason if there is none.
    fn command(&self, server_version: u32) -> Result<String, String> {
        if server_version < OLDEST {
            return Err(format!("base backups need PostgreSQL 13 or later, and this server is {server_version}"));
        }
        if self.label.len() > MAX_LABEL_BYTES || self.label.contains(['\0', '\n', '\r']) {
            return Err(format!("a backup's label is one line of at most {MAX_LABEL_BYTES} bytes"));
        }
        if let Some(rate) = self.max_rate.filter(|rate| !MAX_RATES.contains(rate)) {
            let (least, most) = MAX_RATES.into_inner();
            return Err(format!(
                "a rate of {rate} kB/s is not between {least} and {most}, which is what PostgreSQL takes"
            ));
        }
        let mut words = vec![format!("LABEL {}", quote_label(&self.label)), "PROGRESS".to_owned()];
        let new = server_version >= PARENTHESISED;
        match (self.checkpoint, new) {
            (CheckpointSpeed::Fast, true) => words.push("CHECKPOINT 'fast'".to_owned()),
            (CheckpointSpeed::Spread, true) => words.push("CHECKPOINT 'spread'".to_owned()),
            (CheckpointSpeed::Fast, false) => words.push("FAST".to_owned()),
            (CheckpointSpeed::Spread, false) => {}
        }
        // Waiting would be for archive_command, for ever if that fails; what we need is in our own catalogue.
        words.push(if new { "WAIT false" } else { "NOWAIT" }.to_owned());
        words.extend(self.max_rate.map(|rate| format!("MAX_RATE {rate}")));
        if !self.verify_checksums {
            words.push(if new { "VERIFY_CHECKSUMS false" } else { "NOVERIFY_CHECKSUMS" }.to_owned());
        }
        words.push("MANIFEST 'yes'".to_owned());
        words.push("MANIFEST_CHECKSUMS 'CRC32C'".to_owned());
        Ok(if new { format!("BASE_BACKUP ({})", words.join(", ")) } else { format!("BASE_BACKUP {}", words.join(" ")) })
    }
}

/// A tablespace, or the base directory, as the server announces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// `None` for the base directory.
    pub oid: Option<u32>,
    /// Where it lies on the server; `None` for the base directory.
    pub location: Option<String>,
    /// The server's estimate of its size, in bytes.
    pub size_bytes: Option<u64>,
}

/// What comes out of a base backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupEvent {
    /// The checkpoint is made; data follows.
    Started {
        /// Where replay begins: all WAL from the segment of this position on is needed.
        start: Lsn,
        /// The timeline of that position.
        timeline: TimelineId,
        /// Tablespaces in the order announced, the base directory last.
        tablespaces: Vec<Tablespace>,
    },
    /// The archive of a tablespace, or of the base directory (`None`), begins, and the one before is over. Up to 14 it
    /// comes without the zero blocks at its end.
    Archive {
        /// Which.
        tablespace: Option<u32>,
    },
    /// Next bytes of the archive that began last. They share the connection's receive buffer: copy what is kept long.
    Data(Bytes),
    /// Next bytes of the server's `backup_manifest`; all archives are over.
    Manifest(Bytes),
    /// Bytes that the server has sent of all archives, by its own count. 15 and later, about once a second.
    Progress(u64),
    /// Something the server wants to be known: a file that it skipped, a page whose checksum is wrong.
    Warning(String),
    /// The backup is whole.
    Finished {
        /// Recovery has to replay at least up to here.
        end: Lsn,
        /// The timeline of that position.
        timeline: TimelineId,
    },
    /// All files came, but pages on the server have wrong checksums: the server's own files are damaged.
    Damaged {
        /// As in [`BackupEvent::Finished`].
        end: Lsn,
        /// As in [`BackupEvent::Finished`].
        timeline: TimelineId,
        /// What the server says.
        reason: String,
        /// The first of its warnings; those about checksums name file and block.
        warnings: Vec<String>,
    },
}

impl Replication {
    /// Takes a base backup. The command is sent here; what comes of it, the first error too, is in the events.
    pub async fn base_backup(self, options: &BaseBackupOptions) -> Result<BaseBackup, PgError> {
        let version = self.server_version_num();
        let command = options.command(version).map_err(|reason| PgError::Settings { reason })?;
        let mut connection = self.into_connection();
        connection.send_query(&command).await?;
        connection.set_doing("taking a base backup");
        let flow = Flow::new(version >= PARENTHESISED);
        Ok(BaseBackup { connection, flow, silence: options.silence, quiet_since: None })
    }
}

/// A base backup under way.
pub struct BaseBackup {
    connection: Connection,
    flow: Flow,
    silence: Duration,
    /// Since when nothing was there to read, over all calls: a caller that asks in short turns sees the deadline too.
    quiet_since: Option<Instant>,
}

impl std::fmt::Debug for BaseBackup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BaseBackup({}, {:?})", self.connection.server(), self.flow.phase)
    }
}

impl BaseBackup {
    /// The next event; `None` after [`BackupEvent::Finished`] or [`BackupEvent::Damaged`]. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<BackupEvent>, PgError> {
        let result = self.next_event().await;
        if result.is_err() {
            self.flow.phase = Phase::Failed;
            self.connection.give_up();
        }
        result
    }

    /// `server_version_num` of the server.
    pub fn server_version_num(&self) -> u32 {
        self.connection.server_version_num()
    }

    /// The session, for the next command. Before the last event there is nothing to be done with it.
    pub fn into_replication(self) -> Replication {
        Replication::from_connection(self.connection)
    }

    async fn next_event(&mut self) -> Result<Option<BackupEvent>, PgError> {
        loop {
            if let Some(event) = self.flow.events.pop_front() {
                return Ok(Some(event));
            }
            match &self.flow.phase {
                Phase::Finished => return Ok(None),
                Phase::Failed => return Err(self.connection.closed()),
                _ => {}
            }
            // A connection that ended with an error has said its last word: there will be no ReadyForQuery.
            if self.connection.is_broken()
                && let Some(error) = self.flow.error.take()
            {
                return Err(PgError::Server(Box::new(error)));
            }
            match self.connection.take()? {
                Some(message) => {
                    self.quiet_since = None;
                    // No await from here to the queue of events.
                    self.flow.step(message).map_err(|failure| match failure {
                        Failure::Server(error) => PgError::Server(error),
                        Failure::Protocol(reason) => self.connection.protocol(reason),
                    })?;
                }
                None => self.wait().await?,
            }
        }
    }

    async fn wait(&mut self) -> Result<(), PgError> {
        let patience = match (&self.flow.phase, &self.flow.error) {
            // The checkpoint, and then the walk over all files that counts their sizes: as long as they take.
            (Phase::Start { .. } | Phase::Tablespaces { .. }, None) => return self.connection.fill().await,
            (_, Some(_)) => self.connection.timeout(),
            _ => self.silence,
        };
        let since = *self.quiet_since.get_or_insert_with(Instant::now);
        match timeout_at(since + patience, self.connection.fill()).await {
            Ok(result) => result,
            Err(_) => Err(self.connection.timed_out(patience)),
        }
    }
}

/// Messages in, events out. Pure: what a server may send in which order, in both dialects.
struct Flow {
    one_copy: bool,
    phase: Phase,
    /// Known once data flows.
    start: Option<(Lsn, TimelineId)>,
    tablespaces: Vec<Tablespace>,
    /// How many archives have begun.
    archives: usize,
    manifest_came: bool,
    /// The first error; ReadyForQuery follows.
    error: Option<ServerError>,
    /// The first [`MAX_WARNINGS`] warnings.
    warnings: Vec<String>,
    events: VecDeque<BackupEvent>,
}

#[derive(Debug)]
enum Phase {
    /// Before and in the first result set.
    Start {
        row: Option<(Lsn, TimelineId)>,
    },
    /// In the second result set.
    Tablespaces {
        begun: bool,
    },
    /// In a copy.
    Copy(Content),
    /// After a copy.
    Between,
    /// In the last result set.
    End {
        row: Option<(Lsn, TimelineId)>,
    },
    Finished,
    Failed,
}

/// What a copy carries at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Nothing,
    Archive,
    Manifest,
}

#[derive(Debug)]
enum Failure {
    Server(Box<ServerError>),
    Protocol(String),
}

impl Flow {
    fn new(one_copy: bool) -> Flow {
        Flow {
            one_copy,
            phase: Phase::Start { row: None },
            start: None,
            tablespaces: Vec::new(),
            archives: 0,
            manifest_came: false,
            error: None,
            warnings: Vec::new(),
            events: VecDeque::new(),
        }
    }

    fn step(&mut self, message: Message) -> Result<(), Failure> {
        let out_of_turn = |message: &Message| Err(Failure::Protocol(format!("{} out of turn", message.name())));
        match message {
            Message::Notice(notice) => {
                self.notice(&notice);
                return Ok(());
            }
            Message::Error(error) => {
                self.error.get_or_insert(error); // the first says the cause
                return Ok(());
            }
            Message::ReadyForQuery => return self.ready(),
            // Their number differs between the dialects, and they say nothing that the rest does not.
            Message::CommandComplete => return Ok(()),
            // After an error only the end is of interest.
            _ if self.error.is_some() => return Ok(()),
            _ => {}
        }
        match (&mut self.phase, message) {
            (Phase::Start { row }, Message::RowDescription) => {
                if row.is_some() {
                    self.start = *row;
                    self.phase = Phase::Tablespaces { begun: true };
                }
            }
            (Phase::Start { row: row @ None }, Message::DataRow(found)) => *row = Some(position(&found)?),
            (Phase::Tablespaces { begun: true }, Message::DataRow(row)) if self.tablespaces.len() < MAX_TABLESPACES => {
                self.tablespaces.push(tablespace(&row)?);
            }
            (Phase::Tablespaces { .. }, Message::CopyOut) => {
                self.started()?;
                self.begin_copy()?;
            }
            (Phase::Between, Message::CopyOut) if !self.one_copy && !self.manifest_came => self.begin_copy()?,
            (Phase::Copy(content), Message::CopyData(data)) => {
                let content = *content;
                return if self.one_copy { self.tagged(content, data) } else { self.data(content, data) };
            }
            (Phase::Copy(_), Message::CopyDone) => self.phase = Phase::Between,
            (Phase::Between, Message::RowDescription) => {
                self.all_came()?;
                self.phase = Phase::End { row: None };
            }
            (Phase::End { row: row @ None }, Message::DataRow(found)) => *row = Some(position(&found)?),
            (_, message) => return out_of_turn(&message),
        }
        Ok(())
    }

    /// All that was announced is known: the caller can begin.
    fn started(&mut self) -> Result<(), Failure> {
        let protocol = |reason: &str| Err(Failure::Protocol(reason.to_owned()));
        let Some((start, timeline)) = self.start else { return protocol("a backup without a start") };
        let (base, others) = match self.tablespaces.split_last() {
            Some((base, others)) => (base, others),
            None => return protocol("a backup of nothing"),
        };
        if base.oid.is_some() || others.iter().any(|space| space.oid.is_none()) {
            return protocol("the base directory is not the last of the announced tablespaces");
        }
        self.events.push_back(BackupEvent::Started { start, timeline, tablespaces: self.tablespaces.clone() });
        Ok(())
    }

    fn begin_copy(&mut self) -> Result<(), Failure> {
        if self.one_copy {
            self.phase = Phase::Copy(Content::Nothing);
            return Ok(());
        }
        // One copy per announced row, in that order; one more is the manifest.
        match self.tablespaces.get(self.archives) {
            Some(space) => {
                let oid = space.oid;
                self.begin_archive(oid)
            }
            None => {
                self.manifest_came = true;
                self.phase = Phase::Copy(Content::Manifest);
                Ok(())
            }
        }
    }

    fn begin_archive(&mut self, oid: Option<u32>) -> Result<(), Failure> {
        // Both dialects send archives in the order announced.
        if self.manifest_came || self.tablespaces.get(self.archives).map(|space| space.oid) != Some(oid) {
            return Err(Failure::Protocol(format!("archive number {} is not the one announced", self.archives + 1)));
        }
        self.archives += 1;
        self.phase = Phase::Copy(Content::Archive);
        self.events.push_back(BackupEvent::Archive { tablespace: oid });
        Ok(())
    }

    /// From 15 on the first byte of a message says what it is.
    fn tagged(&mut self, content: Content, mut data: Bytes) -> Result<(), Failure> {
        let protocol = |reason: &str| Err(Failure::Protocol(reason.to_owned()));
        if data.is_empty() {
            return protocol("an empty message in a base backup");
        }
        match data.get_u8() {
            b'd' => self.data(content, data),
            b'n' => {
                let name = data.split(|byte| *byte == 0).next().unwrap_or_default();
                let oid = match name {
                    b"base.tar" => None,
                    name => {
                        let oid = name.strip_suffix(b".tar").and_then(|oid| std::str::from_utf8(oid).ok());
                        match oid.and_then(|oid| oid.parse().ok()) {
                            Some(oid) => Some(oid),
                            None => return protocol("an archive that is neither base.tar nor <oid>.tar"),
                        }
                    }
                };
                self.begin_archive(oid)
            }
            b'm' if !self.manifest_came => {
                self.manifest_came = true;
                self.phase = Phase::Copy(Content::Manifest);
                Ok(())
            }
            b'p' if data.len() == 8 => {
                self.events.push_back(BackupEvent::Progress(data.get_u64()));
                Ok(())
            }
            tag => protocol(&format!("a message {:?} of {} bytes in a base backup", char::from(tag), data.len() + 1)),
        }
    }

    fn data(&mut self, content: Content, data: Bytes) -> Result<(), Failure> {
        if data.is_empty() {
            return Ok(());
        }
        self.events.push_back(match content {
            Content::Archive => BackupEvent::Data(data),
            Content::Manifest => BackupEvent::Manifest(data),
            Content::Nothing => return Err(Failure::Protocol("data before the first archive".to_owned())),
        });
        Ok(())
    }

    fn all_came(&self) -> Result<(), Failure> {
        if self.archives == self.tablespaces.len() && self.manifest_came {
            return Ok(());
        }
        Err(Failure::Protocol(format!(
            "the backup ended after {} of {} archives, {} a manifest",
            self.archives,
            self.tablespaces.len(),
            if self.manifest_came { "with" } else { "without" }
        )))
    }

    fn notice(&mut self, notice: &ServerError) {
        if notice.severity != "WARNING" {
            return;
        }
        if self.warnings.len() < MAX_WARNINGS {
            self.warnings.push(notice.message.clone());
        }
        self.events.push_back(BackupEvent::Warning(notice.message.clone()));
    }

    fn ready(&mut self) -> Result<(), Failure> {
        let end = match &self.phase {
            Phase::End { row } => *row,
            _ => None,
        };
        let event = match (self.error.take(), end) {
            (None, Some((end, timeline))) => BackupEvent::Finished { end, timeline },
            // Only now: this very code in the middle of a backup means that there is no backup.
            (Some(error), Some((end, timeline))) if error.sqlstate == DATA_CORRUPTED => BackupEvent::Damaged {
                end,
                timeline,
                reason: error.message,
                warnings: std::mem::take(&mut self.warnings),
            },
            (Some(error), _) => return Err(Failure::Server(Box::new(error))),
            (None, None) => return Err(Failure::Protocol("the backup ended without its end position".to_owned())),
        };
        self.events.push_back(event);
        self.phase = Phase::Finished;
        Ok(())
    }
}

fn position(row: &Row) -> Result<(Lsn, TimelineId), Failure> {
    let lsn = row.get(0).and_then(|text| text.parse().ok());
    let timeline = row.get(1).and_then(|text| text.parse().ok()).and_then(TimelineId::new);
    lsn.zip(timeline).ok_or_else(|| Failure::Protocol(format!("{row:?} is not a position and a timeline")))
}

fn tablespace(row: &Row) -> Result<Tablespace, Failure> {
    let error = || Failure::Protocol(format!("{row:?} is not a tablespace"));
    let number = |index| row.get(index).map(|text| text.parse::<u64>().map_err(|_| error())).transpose();
    let oid = number(0)?.map(u32::try_from).transpose().map_err(|_| error())?;
    // A path in the server's file system need not be UTF-8; it is for people, the link in the archive counts.
    let location = row.bytes(1).map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    Ok(Tablespace { oid, location, size_bytes: number(2)?.map(|kilobytes| kilobytes.saturating_mul(1024)) })
}

#[cfg(test)]
mod tests {
    use super::super::wire::FrameReader;
    use super::*;
    use proptest::prelude::*;

    const SPACE: u32 = 16_400;

    /// A message as the server sends it.
    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        bytes.extend((body.len() as u32 + 4).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn row(columns: &[Option<&str>]) -> Vec<u8> {
        let mut body = (columns.len() as u16).to_be_bytes().to_vec();
        for column in columns {
            body.extend(column.map_or(-1, |text| text.len() as i32).to_be_bytes());
            body.extend(column.unwrap_or_default().as_bytes());
        }
        message(b'D', &body)
    }

    fn error(sqlstate: &str) -> Vec<u8> {
        message(b'E', format!("SERROR\0VERROR\0C{sqlstate}\0Msomething\0\0").as_bytes())
    }

    fn new_result() -> Vec<u8> {
        message(b'T', &[0, 0])
    }

    fn complete() -> Vec<u8> {
        message(b'C', b"SELECT\0")
    }

    fn ready() -> Vec<u8> {
        message(b'Z', b"I")
    }

    fn data(bytes: &[u8]) -> Vec<u8> {
        message(b'd', bytes)
    }

    fn copy_out() -> Vec<u8> {
        message(b'H', &[0, 0, 0])
    }

    fn head() -> Vec<Vec<u8>> {
        vec![
            new_result(),
            row(&[Some("0/2000028"), Some("1")]),
            complete(),
            new_result(),
            row(&[Some("16400"), Some("/srv/space"), Some("7")]),
            row(&[None, None, Some("2048")]),
            complete(),
        ]
    }

    fn end() -> Vec<Vec<u8>> {
        vec![new_result(), row(&[Some("0/2000100"), Some("1")]), complete()]
    }

    /// What 13 and 14 send, up to the last result set.
    fn old_body() -> Vec<Vec<u8>> {
        let done = || message(b'c', b"");
        vec![
            copy_out(),
            data(b"space"),
            done(),
            copy_out(),
            data(b"base"),
            done(),
            copy_out(),
            data(b"manifest"),
            done(),
        ]
    }

    /// What 15 and later send, up to the last result set.
    fn new_body() -> Vec<Vec<u8>> {
        vec![
            copy_out(),
            data(b"n16400.tar\0/srv/space\0"),
            data(b"dspace"),
            data(b"p\0\0\0\0\0\0\0\x05"),
            data(b"nbase.tar\0\0"),
            data(b"dbase"),
            data(b"m"),
            data(b"dmanifest"),
            message(b'c', b""),
        ]
    }

    fn run(one_copy: bool, parts: &[Vec<Vec<u8>>]) -> Result<Vec<BackupEvent>, Failure> {
        let (mut reader, mut flow, mut events) = (FrameReader::default(), Flow::new(one_copy), Vec::new());
        for bytes in parts.iter().flatten() {
            reader.space().extend_from_slice(bytes);
            while let Some(message) = reader.next().expect("a message") {
                flow.step(message)?;
                events.extend(flow.events.drain(..));
            }
        }
        Ok(events)
    }

    fn both() -> [(bool, Vec<Vec<u8>>); 2] {
        [(false, old_body()), (true, new_body())]
    }

    fn timeline() -> TimelineId {
        TimelineId::FIRST
    }

    #[test]
    fn both_dialects_are_the_same_events() {
        for (one_copy, body) in both() {
            let mut events = run(one_copy, &[head(), body, end(), vec![ready()]]).unwrap();
            let progress = events.iter().position(|event| *event == BackupEvent::Progress(5));
            assert_eq!(progress.is_some(), one_copy);
            progress.map(|at| events.remove(at));
            let space =
                Tablespace { oid: Some(SPACE), location: Some("/srv/space".to_owned()), size_bytes: Some(7 << 10) };
            let base = Tablespace { oid: None, location: None, size_bytes: Some(2 << 20) };
            let want = [
                BackupEvent::Started {
                    start: Lsn::new(0x200_0028),
                    timeline: timeline(),
                    tablespaces: vec![space, base],
                },
                BackupEvent::Archive { tablespace: Some(SPACE) },
                BackupEvent::Data(Bytes::from_static(b"space")),
                BackupEvent::Archive { tablespace: None },
                BackupEvent::Data(Bytes::from_static(b"base")),
                BackupEvent::Manifest(Bytes::from_static(b"manifest")),
                BackupEvent::Finished { end: Lsn::new(0x200_0100), timeline: timeline() },
            ];
            assert_eq!(events, want);
        }
    }

    #[test]
    fn pitfall_15_a_checksum_error_counts_as_such_only_after_everything() {
        let warning = message(b'N', b"SWARNING\0VWARNING\0C01000\0Mblock 7 of base/1/2\0\0");
        for (one_copy, body) in both() {
            let events = run(
                one_copy,
                &[head(), vec![warning.clone()], body.clone(), end(), vec![error(DATA_CORRUPTED), ready()]],
            )
            .unwrap();
            let (end, warnings) = (Lsn::new(0x200_0100), vec!["block 7 of base/1/2".to_owned()]);
            let damaged = BackupEvent::Damaged { end, timeline: timeline(), reason: "something".to_owned(), warnings };
            assert_eq!(events.last(), Some(&damaged));

            let middle = run(one_copy, &[head(), body[..2].to_vec(), vec![error(DATA_CORRUPTED), ready()]]);
            assert!(matches!(middle, Err(Failure::Server(_))), "{middle:?}");
            let another = run(one_copy, &[head(), body, super::tests::end(), vec![error("XX000"), ready()]]);
            assert!(matches!(another, Err(Failure::Server(_))), "{another:?}");
        }
    }

    #[test]
    fn an_incomplete_backup_never_finishes() {
        for (one_copy, body) in both() {
            for missing in 0..body.len() {
                let mut short = body.clone();
                short.remove(missing);
                // Contents and progress are not ours to count: the archives are checked by their reader.
                let removed = &body[missing];
                let counted = removed[0] != b'd' || matches!(removed[5], b'n' | b'm') && one_copy;
                let result = run(one_copy, &[head(), short, end(), vec![ready()]]);
                assert!(result.is_err() || !counted, "message {missing} is missing, and nobody noticed");
            }
            assert!(run(one_copy, &[head(), body.clone(), vec![ready()]]).is_err(), "without an end position");
            assert!(run(one_copy, &[head(), vec![ready()]]).is_err());
            assert!(run(one_copy, &[body, end(), vec![ready()]]).is_err(), "without a start");
        }
    }

    #[test]
    fn archives_that_were_not_announced_are_refused() {
        for name in ["n16401.tar\0\0", "nbase.tar\0\0", "n../x.tar\0\0", "nx\0\0"] {
            let mut body = new_body();
            body[1] = data(name.as_bytes());
            assert!(run(true, &[head(), body]).is_err(), "{name}");
        }
        let mut body = old_body();
        body.extend([copy_out(), data(b"more"), message(b'c', b"")]);
        assert!(run(false, &[head(), body]).is_err(), "a copy after the manifest");
    }

    #[test]
    fn the_command_is_in_the_servers_dialect() {
        let mut options = BaseBackupOptions::new("it's");
        assert_eq!(
            options.command(140_000).unwrap(),
            "BASE_BACKUP LABEL 'it''s' PROGRESS FAST NOWAIT MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'"
        );
        assert_eq!(
            options.command(150_000).unwrap(),
            "BASE_BACKUP (LABEL 'it''s', PROGRESS, CHECKPOINT 'fast', WAIT false, MANIFEST 'yes', \
             MANIFEST_CHECKSUMS 'CRC32C')"
        );
        options.checkpoint = CheckpointSpeed::Spread;
        options.max_rate = Some(32);
        options.verify_checksums = false;
        assert_eq!(
            options.command(130_000).unwrap(),
            "BASE_BACKUP LABEL 'it''s' PROGRESS NOWAIT MAX_RATE 32 NOVERIFY_CHECKSUMS MANIFEST 'yes' \
             MANIFEST_CHECKSUMS 'CRC32C'"
        );
        assert!(
            options
                .command(180_000)
                .unwrap()
                .contains("CHECKPOINT 'spread', WAIT false, MAX_RATE 32, VERIFY_CHECKSUMS false")
        );
        assert!(options.command(120_000).is_err());
        for (label, rate) in [("x\ny", None), ("x", Some(31)), ("x", Some(1_048_577))] {
            let options = BaseBackupOptions { max_rate: rate, ..BaseBackupOptions::new(label) };
            assert!(options.command(150_000).is_err());
        }
    }

    proptest! {
        /// Whatever a server, or somebody in its place, sends in whatever order: no panic, no backup made up.
        #[test]
        fn no_order_of_messages_panics(
            one_copy: bool,
            order in prop::collection::vec(0usize..20, 0..30),
            payload in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut pieces = [head(), old_body(), new_body(), end()].concat();
            pieces.extend([ready(), error("XX001"), data(&payload)]);
            let messages: Vec<Vec<u8>> = order.iter().filter_map(|at| pieces.get(at * 2)).cloned().collect();
            let _ = run(one_copy, &[messages]);
            let _ = run(one_copy, &[head(), vec![copy_out(), data(&payload)]]);
        }
    }
}
