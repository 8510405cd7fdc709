//! Physical replication: the commands of a walsender and the stream of WAL.
//!
//! What always holds: [`WalStream::next`] and [`WalStream::send_status`] may be dropped at any await; no event is lost,
//! none comes twice, and the connection stays in step. Events come in the order sent. A server that says nothing for
//! long is asked, and one that does not answer is given up, so a dead connection never looks like a quiet server.
//! What is acknowledged is the caller's business: nothing here reports a position that it was not given.
//! Protocol: <https://www.postgresql.org/docs/current/protocol-replication.html>

use std::time::Duration;

use bytes::Bytes;
use postgres_protocol::message::frontend;
use tokio::time::{Instant, timeout_at};

use super::connect::{ConnectOptions, Purpose, connect};
use super::connection::Connection;
use super::conninfo::ConnInfo;
use super::error::{PgError, ServerError, ServerErrorKind};
use super::wire::{Message, Row, Status, WalMessage, quote_ident};
use crate::types::{Lsn, PgTimestamp, SegmentSize, SystemId, TimelineId};

/// What `IDENTIFY_SYSTEM` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SystemIdentity {
    /// The cluster's identity, shared with its standbys and restores.
    pub system: SystemId,
    /// The timeline the server is on.
    pub timeline: TimelineId,
    /// On a primary the end of the WAL it has flushed, on a standby of what it has received or replayed.
    pub flushed: Lsn,
}

/// From where a slot keeps WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotPosition {
    /// First position that is kept; `None` for a slot that reserves nothing yet.
    pub restart_lsn: Option<Lsn>,
    /// The timeline of that position.
    pub restart_timeline: Option<TimelineId>,
}

/// Where a timeline was left, and for which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimelineEnd {
    /// The timeline to go on with.
    pub next: TimelineId,
    /// First position that is the next timeline's. May be less than what was received.
    pub begins_at: Lsn,
}

/// What became of [`Replication::start`].
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one per stream, moved once")]
pub enum Started {
    /// WAL comes.
    Streaming(WalStream),
    /// The asked position is exactly where the timeline was left: there is nothing to stream on it.
    TimelineEnded(Replication, TimelineEnd),
}

/// What comes out of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamEvent {
    /// WAL, at most 128 KiB. `data` shares the receive buffer of 1 MiB: what is kept long should be copied.
    Wal {
        /// Position of the first byte of `data`.
        start: Lsn,
        /// How far the server itself has flushed.
        server_end: Lsn,
        /// The server's clock.
        sent_at: PgTimestamp,
        /// The bytes.
        data: Bytes,
    },
    /// A sign of life.
    Keepalive {
        /// How far the server itself has sent or flushed.
        server_end: Lsn,
        /// The server's clock.
        sent_at: PgTimestamp,
        /// The server wants a status now; a server that shuts down waits for it.
        reply_requested: bool,
    },
    /// This timeline is complete; see [`WalStream::into_replication`]. Comes again when asked again.
    TimelineEnded(TimelineEnd),
    /// The server shuts down in order, and we have acknowledged all of its WAL. Comes again when asked again.
    ServerStopped,
}

/// A physical walsender session between commands. A command that was dropped before its answer leaves it unusable.
pub struct Replication {
    connection: Connection,
}

impl std::fmt::Debug for Replication {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Replication({})", self.connection.server())
    }
}

impl Replication {
    /// Connects to the first host that will do. The role needs `REPLICATION`, and pg_hba.conf a line for it.
    pub async fn connect(info: &ConnInfo, options: &ConnectOptions) -> Result<Replication, PgError> {
        Ok(Replication { connection: connect(info, options, Purpose::Replication).await? })
    }

    /// `server_version_num`, 150018 for 15.18.
    pub fn server_version_num(&self) -> u32 {
        self.connection.server_version_num()
    }

    /// Where this session ended up, for messages: host and port, or the socket's path.
    pub fn server(&self) -> &str {
        self.connection.server()
    }

    /// Who the server is. Always the first command: up to 14 `START_REPLICATION` may insist on it.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, PgError> {
        let row = self.one_row("IDENTIFY_SYSTEM").await?;
        let system = self.column(&row, 0)?;
        let timeline = self.timeline_column(&row, 1)?;
        let flushed = self.column(&row, 2)?;
        Ok(SystemIdentity { system, timeline, flushed })
    }

    /// The value of a setting, as `SHOW` writes it.
    pub async fn show(&mut self, setting: &str) -> Result<String, PgError> {
        // A walsender's SHOW knows identifiers joined by dots, and its scanner folds case.
        if setting.is_empty() || !setting.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.') {
            return Err(PgError::Settings { reason: format!("{setting:?} is not the name of a PostgreSQL setting") });
        }
        let row = self.one_row(&format!("SHOW {setting}")).await?;
        self.column(&row, 0)
    }

    /// The size of this cluster's WAL segments.
    pub async fn segment_size(&mut self) -> Result<SegmentSize, PgError> {
        let text = self.show("wal_segment_size").await?;
        parse_size(&text)
            .and_then(SegmentSize::new)
            .ok_or_else(|| self.connection.protocol(format!("wal_segment_size is {text:?}")))
    }

    /// Creates a physical slot that keeps WAL from the redo position of the last checkpoint on.
    /// One of this name that exists already is an error ([`ServerErrorKind::AlreadyExists`]).
    pub async fn create_slot(&mut self, name: &str) -> Result<(), PgError> {
        // The bare option: 13 and 14 do not know the one in parentheses.
        let command = format!("CREATE_REPLICATION_SLOT {} PHYSICAL RESERVE_WAL", quote_ident(name));
        self.connection.query(&command).await.map(drop)
    }

    /// Drops a slot. One that is not there is an error ([`ServerErrorKind::NoSuchObject`]), so is one in use.
    pub async fn drop_slot(&mut self, name: &str) -> Result<(), PgError> {
        self.connection.query(&format!("DROP_REPLICATION_SLOT {}", quote_ident(name))).await.map(drop)
    }

    /// Where a physical slot stands; `None` if there is no such slot. 15 and later; earlier servers answer 0A000 or a
    /// syntax error, and the answer has to come from `pg_replication_slots`.
    pub async fn read_slot(&mut self, name: &str) -> Result<Option<SlotPosition>, PgError> {
        let row = self.one_row(&format!("READ_REPLICATION_SLOT {}", quote_ident(name))).await?;
        if row.bytes(0).is_none() {
            return Ok(None);
        }
        let restart_lsn = if row.bytes(1).is_some() { Some(self.column(&row, 1)?) } else { None };
        let restart_timeline = if row.bytes(2).is_some() { Some(self.timeline_column(&row, 2)?) } else { None };
        Ok(Some(SlotPosition { restart_lsn, restart_timeline }))
    }

    /// The bytes of a timeline's history file. `None`: the first timeline, which has none, or the server lacks the file.
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<Option<Bytes>, PgError> {
        if timeline == TimelineId::FIRST {
            return Ok(None);
        }
        match self.one_row(&format!("TIMELINE_HISTORY {}", timeline.get())).await {
            // The bytes as in the file in all versions, though 13 calls them bytea.
            Ok(row) => match row.bytes(1) {
                Some(content) => Ok(Some(Bytes::copy_from_slice(content))),
                None => Err(self.connection.protocol("a history without content".to_owned())),
            },
            Err(error) if error.server_kind() == Some(ServerErrorKind::FileMissing) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Starts streaming `timeline` from `at`, which should be the start of a segment. The server does not compare `at`
    /// with the slot: WAL that is gone (58P01), or not written yet, is an error of the stream's first event.
    pub async fn start(mut self, slot: Option<&str>, at: Lsn, timeline: TimelineId) -> Result<Started, PgError> {
        let slot = slot.map(|name| format!("SLOT {} ", quote_ident(name))).unwrap_or_default();
        let command = format!("START_REPLICATION {slot}PHYSICAL {at} TIMELINE {}", timeline.get());
        self.connection.send_query(&command).await?;
        let timeout = self.connection.timeout();
        let first = loop {
            match self.connection.receive(timeout).await? {
                Message::Notice(_) => {}
                other => break other,
            }
        };
        match first {
            Message::CopyBoth => Ok(Started::Streaming(WalStream::new(self.connection, timeline))),
            Message::RowDescription => {
                let rows = self.connection.rest(Vec::new(), None).await?;
                let end = match rows.first() {
                    Some(row) => self.timeline_end(row, timeline)?,
                    None => return Err(self.connection.protocol("a timeline's end without a row".to_owned())),
                };
                Ok(Started::TimelineEnded(self, end))
            }
            Message::Error(error) => match self.connection.rest(Vec::new(), Some(error)).await {
                Err(error) => Err(error),
                Ok(_) => Err(self.connection.protocol("an error that was none".to_owned())),
            },
            other => Err(self.connection.unexpected(&other)),
        }
    }

    /// Takes leave of the server. Dropping does as well, less politely.
    pub async fn close(self) {
        self.connection.close().await;
    }

    /// The connection itself, for commands that answer with a copy (`BASE_BACKUP`).
    pub(crate) fn into_connection(self) -> Connection {
        self.connection
    }

    /// Back from [`Self::into_connection`], once the answer was read up to ReadyForQuery.
    pub(crate) fn from_connection(connection: Connection) -> Replication {
        Replication { connection }
    }

    async fn one_row(&mut self, command: &str) -> Result<Row, PgError> {
        let rows = self.connection.query(command).await?;
        rows.into_iter().next().ok_or_else(|| self.connection.protocol("no row".to_owned()))
    }

    fn column<T: std::str::FromStr>(&self, row: &Row, index: usize) -> Result<T, PgError> {
        let value = row.get(index).and_then(|text| text.parse().ok());
        value.ok_or_else(|| self.connection.protocol(format!("column {index} is {:?}", row.get(index))))
    }

    fn timeline_column(&self, row: &Row, index: usize) -> Result<TimelineId, PgError> {
        let number: u32 = self.column(row, index)?;
        TimelineId::new(number).ok_or_else(|| self.connection.protocol("timeline 0".to_owned()))
    }

    fn timeline_end(&self, row: &Row, timeline: TimelineId) -> Result<TimelineEnd, PgError> {
        let end = TimelineEnd { next: self.timeline_column(row, 0)?, begins_at: self.column(row, 1)? };
        if end.next <= timeline {
            return Err(self.connection.protocol(format!("timeline {timeline} is followed by {}", end.next)));
        }
        Ok(end)
    }
}

#[derive(Debug)]
enum Phase {
    Copying,
    /// The server ended the copy; its reason comes as an ordinary answer, of which this much was read.
    Ending {
        row: Option<Row>,
        error: Option<ServerError>,
    },
    /// Ready for the next command.
    TimelineEnded(TimelineEnd),
    Stopped,
    Failed,
}

/// WAL as it comes. Dropping it closes the connection; the slot keeps what was not acknowledged.
pub struct WalStream {
    replication: Replication,
    timeline: TimelineId,
    phase: Phase,
    /// What was last reported: a question for a sign of life repeats it.
    status: Status,
    /// Since when nothing was there to read, over all calls.
    quiet_since: Option<Instant>,
    /// When a sign of life was asked for; `None` once anything came.
    asked_at: Option<Instant>,
}

impl std::fmt::Debug for WalStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WalStream({}, timeline {}, {:?})", self.replication.server(), self.timeline, self.phase)
    }
}

impl WalStream {
    fn new(mut connection: Connection, timeline: TimelineId) -> WalStream {
        connection.set_doing(&format!("streaming WAL of timeline {timeline}"));
        WalStream {
            replication: Replication { connection },
            timeline,
            phase: Phase::Copying,
            status: Status::default(),
            quiet_since: None,
            asked_at: None,
        }
    }

    /// Where the WAL comes from, for messages.
    pub fn server(&self) -> &str {
        self.replication.server()
    }

    /// `server_version_num` of the server.
    pub fn server_version_num(&self) -> u32 {
        self.replication.server_version_num()
    }

    /// The next event. Cancel safe. Waits as long as the server gives signs of life: after half the options' `timeout`
    /// in silence it is asked for one, and a whole `timeout` after that it is given up.
    pub async fn next(&mut self) -> Result<StreamEvent, PgError> {
        let result = self.next_event().await;
        if result.is_err() {
            self.phase = Phase::Failed;
            self.replication.connection.give_up();
        }
        result
    }

    async fn next_event(&mut self) -> Result<StreamEvent, PgError> {
        loop {
            match &self.phase {
                Phase::Copying | Phase::Ending { .. } => {}
                Phase::TimelineEnded(end) => return Ok(StreamEvent::TimelineEnded(*end)),
                Phase::Stopped => return Ok(StreamEvent::ServerStopped),
                Phase::Failed => return Err(self.replication.connection.closed()),
            }
            match self.replication.connection.take()? {
                Some(message) => {
                    (self.quiet_since, self.asked_at) = (None, None);
                    if let Some(event) = self.step(message)? {
                        return Ok(event);
                    }
                }
                None => self.wait().await?,
            }
        }
    }

    /// One message further; no await between taking it and being done with it.
    fn step(&mut self, message: Message) -> Result<Option<StreamEvent>, PgError> {
        let connection = &mut self.replication.connection;
        if matches!(message, Message::Notice(_)) {
            return Ok(None);
        }
        match &mut self.phase {
            Phase::Copying => match message {
                Message::CopyData(payload) => {
                    let message = WalMessage::parse(payload).map_err(|error| connection.protocol(error.to_string()))?;
                    return Ok(Some(match message {
                        WalMessage::Wal { start, server_end, sent_at, data } => {
                            StreamEvent::Wal { start, server_end, sent_at, data }
                        }
                        WalMessage::Keepalive { server_end, sent_at, reply_requested } => {
                            StreamEvent::Keepalive { server_end, sent_at, reply_requested }
                        }
                    }));
                }
                Message::CopyDone => {
                    frontend::copy_done(connection.out());
                    self.phase = Phase::Ending { row: None, error: None };
                }
                // COPY 0 without CopyDone: all is sent and acknowledged, and the server goes.
                Message::CommandComplete => {
                    self.phase = Phase::Stopped;
                    return Ok(Some(StreamEvent::ServerStopped));
                }
                // Right after CopyBoth (position in the future, WAL removed) or any time later (slot invalidated).
                other => return Err(connection.unexpected(&other)),
            },
            Phase::Ending { row, error } => match message {
                Message::CopyData(_) | Message::RowDescription => {}
                Message::DataRow(first) => *row = Some(first),
                // Two of them, START_STREAMING and START_REPLICATION, when the timeline ended; one when the server goes.
                Message::CommandComplete if row.is_none() && error.is_none() => {
                    self.phase = Phase::Stopped;
                    return Ok(Some(StreamEvent::ServerStopped));
                }
                Message::CommandComplete => {}
                Message::Error(new) if connection.is_broken() => return Err(PgError::Server(Box::new(new))),
                Message::Error(new) => *error = Some(new),
                Message::ReadyForQuery => {
                    if let Some(error) = error.take() {
                        return Err(PgError::Server(Box::new(error)));
                    }
                    let Some(row) = row.take() else {
                        return Err(connection.protocol("the copy ended without a word".to_owned()));
                    };
                    let end = self.replication.timeline_end(&row, self.timeline)?;
                    self.phase = Phase::TimelineEnded(end);
                    return Ok(Some(StreamEvent::TimelineEnded(end)));
                }
                other => return Err(connection.unexpected(&other)),
            },
            Phase::TimelineEnded(_) | Phase::Stopped | Phase::Failed => return Err(connection.unexpected(&message)),
        }
        Ok(None)
    }

    /// Waits for bytes; asks a server that is silent for long, and gives up one that does not answer.
    async fn wait(&mut self) -> Result<(), PgError> {
        let timeout = self.replication.connection.timeout();
        let quiet_since = *self.quiet_since.get_or_insert_with(Instant::now);
        let deadline = match self.asked_at {
            Some(asked_at) => asked_at + timeout,
            None => quiet_since + timeout / 2,
        };
        // Reading is tried before the clock is looked at: what came while nobody called counts.
        let read = timeout_at(deadline, self.replication.connection.fill()).await;
        match (read, self.asked_at) {
            (Ok(result), _) => result,
            (Err(_), Some(_)) => Err(self.replication.connection.timed_out(timeout)),
            (Err(_), None) => {
                if matches!(self.phase, Phase::Copying) {
                    let question = Status { reply_requested: true, ..self.status };
                    question.write_to(now(), self.replication.connection.out());
                }
                self.asked_at = Some(Instant::now());
                Ok(())
            }
        }
    }

    /// Reports positions. Cancel safe: the message is sent whole or waits for the next call of anything here. While the
    /// socket is full, WAL is read ahead (bounded), so a server that is stuck sending cannot block us; the deadline is
    /// the options' `timeout`. After the stream's end it does nothing.
    pub async fn send_status(&mut self, status: Status) -> Result<(), PgError> {
        match self.phase {
            Phase::Copying => {}
            // The server has stopped listening to positions; the event that says so waits in `next`.
            Phase::Ending { .. } | Phase::TimelineEnded(_) | Phase::Stopped => return Ok(()),
            Phase::Failed => return Err(self.replication.connection.closed()),
        }
        self.status = Status { reply_requested: false, ..status };
        status.write_to(now(), self.replication.connection.out());
        let timeout = self.replication.connection.timeout();
        let sent = self.replication.connection.flush(timeout).await;
        if sent.is_err() {
            self.phase = Phase::Failed;
        }
        sent
    }

    /// Ends the stream in order and gives the session back; WAL on its way is thrown away. Deadline: `timeout`.
    pub async fn stop(mut self) -> Result<Replication, PgError> {
        match self.phase {
            Phase::Copying => {}
            Phase::TimelineEnded(_) => return Ok(self.replication),
            Phase::Ending { .. } => {
                let timeout = self.replication.connection.timeout();
                let ended = tokio::time::timeout(timeout, self.next()).await;
                ended.map_err(|_| self.replication.connection.timed_out(timeout))??;
                return self.into_replication();
            }
            Phase::Stopped | Phase::Failed => return Err(self.replication.connection.closed()),
        }
        let connection = &mut self.replication.connection;
        connection.set_doing("ending the WAL stream");
        frontend::copy_done(connection.out());
        let timeout = connection.timeout();
        let deadline = Instant::now() + timeout;
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        connection.flush(timeout).await?;
        loop {
            match connection.receive(left(deadline)).await? {
                Message::CopyData(_) | Message::Notice(_) => {}
                Message::CopyDone => break,
                Message::CommandComplete => return Err(connection.closed()), // the server goes: COPY 0
                other => return Err(connection.unexpected(&other)),
            }
        }
        connection.rest(Vec::new(), None).await?;
        Ok(self.replication)
    }

    /// The session, after [`StreamEvent::TimelineEnded`]; ready for the next command.
    pub fn into_replication(mut self) -> Result<Replication, PgError> {
        match self.phase {
            Phase::TimelineEnded(_) => Ok(self.replication),
            Phase::Stopped | Phase::Failed => Err(self.replication.connection.closed()),
            Phase::Copying | Phase::Ending { .. } => {
                Err(self.replication.connection.protocol("the stream has not ended".to_owned()))
            }
        }
    }
}

/// Our clock. The server only shows it (`pg_stat_replication.reply_time`).
fn now() -> PgTimestamp {
    PgTimestamp::from_timestamp(jiff::Timestamp::now())
}

/// Bytes of a size as `SHOW` writes it: `16MB`, `1GB`, `1048576` or `1048576B`.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// How long a server may think about an ordinary command before it is given up, unless the options say otherwise.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
