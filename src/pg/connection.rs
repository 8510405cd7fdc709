//! A connection that is logged in: messages out, messages in, both with deadlines.
//!
//! What always holds: while we write we also read, so a server that is stuck sending to us cannot block us; what was to be
//! written and what was read but not taken stay in buffers here, so [`Connection::receive`] and [`Connection::flush`] may
//! be dropped at any await and called again. A command whose answer was not read to its end leaves the connection
//! `Busy`: the next command is refused instead of being given the old answer.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::error::{PgError, ServerError};
use super::wire::{FrameReader, Message, Row};

/// While a write is blocked at most this much is read ahead, in bytes; then the server has to wait for us (P8).
const READ_AHEAD: usize = 8 << 20;

/// Rows of one answer, at most; every query of ours has few (P8).
const MAX_ROWS: usize = 1 << 20;

/// Whatever carries the protocol: TCP, Unix socket, TLS.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The server waits for a command.
    Ready,
    /// An answer is being read.
    Busy,
    /// Nothing more will come of it.
    Broken,
}

/// One session with a server.
pub(crate) struct Connection {
    socket: Box<dyn Socket>,
    reader: FrameReader,
    out: BytesMut,
    /// Written, but perhaps still in the TLS layer's buffer.
    unflushed: bool,
    /// Why writing failed. Reading goes on: the server's last words may say more.
    write_error: Option<io::Error>,
    ended: bool,
    state: State,
    server: String,
    doing: String,
    parameters: BTreeMap<String, String>,
    timeout: Duration,
}

impl Connection {
    /// Wraps a fresh socket, before the startup message. `timeout` is the deadline of each command.
    pub(crate) fn new(socket: Box<dyn Socket>, server: String, timeout: Duration) -> Connection {
        Connection {
            socket,
            reader: FrameReader::default(),
            out: BytesMut::new(),
            unflushed: false,
            write_error: None,
            ended: false,
            state: State::Busy,
            server,
            doing: "the login".to_owned(),
            parameters: BTreeMap::new(),
            timeout,
        }
    }

    /// Host and port, or the socket's path, for messages.
    pub(crate) fn server(&self) -> &str {
        &self.server
    }

    /// Deadline of an ordinary command.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// What the server reported about itself, `server_version` for one; always the newest value.
    pub(crate) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// `server_version_num` as the server would say it (150018); 0 if it reported nothing we understand.
    pub(crate) fn server_version_num(&self) -> u32 {
        self.parameter("server_version").map_or(0, version_num)
    }

    /// Says what is being done, for messages.
    pub(crate) fn set_doing(&mut self, doing: &str) {
        doing.clone_into(&mut self.doing);
    }

    /// Room for messages to send; nothing goes out before [`Self::flush`] or [`Self::receive`].
    pub(crate) fn out(&mut self) -> &mut BytesMut {
        &mut self.out
    }

    /// Sends a simple query or a replication command. Refused while an earlier answer was not read to its end.
    pub(crate) async fn send_query(&mut self, sql: &str) -> Result<(), PgError> {
        if self.state != State::Ready {
            return Err(PgError::Closed { server: self.server.clone(), doing: self.doing.clone() });
        }
        self.doing = sql.chars().take(100).collect();
        frontend::query(sql, &mut self.out).map_err(|error| self.protocol(error.to_string()))?;
        self.state = State::Busy;
        self.flush(self.timeout).await
    }

    /// Sends what waits to be sent. While the socket is full, reads ahead. May be dropped and called again.
    pub(crate) async fn flush(&mut self, within: Duration) -> Result<(), PgError> {
        let sent = tokio::time::timeout(within, poll_fn(|context| self.poll_flush(context))).await;
        if sent.is_err() {
            return Err(self.timed_out(within));
        }
        Ok(()) // a failed write shows when reading: the server's reason comes first
    }

    /// The next message within `within`. A server error is a message here. Dropping this loses nothing.
    /// Changes of settings are kept and not shown.
    pub(crate) async fn receive(&mut self, within: Duration) -> Result<Message, PgError> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(message) = self.take()? {
                return Ok(message);
            }
            match timeout_at(deadline, self.fill()).await {
                Ok(result) => result?,
                Err(_) => return Err(self.timed_out(within)),
            }
        }
    }

    /// The next message that has already arrived.
    pub(crate) fn take(&mut self) -> Result<Option<Message>, PgError> {
        loop {
            let message = match self.reader.next() {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(None),
                Err(error) => {
                    self.state = State::Broken;
                    return Err(self.protocol(error.to_string()));
                }
            };
            match message {
                Message::ParameterStatus { name, value } => {
                    self.parameters.insert(name, value);
                }
                Message::Ignored => {}
                Message::Error(mut error) => {
                    if matches!(error.severity.as_str(), "FATAL" | "PANIC") {
                        self.state = State::Broken;
                    }
                    self.sign(&mut error);
                    return Ok(Some(Message::Error(error)));
                }
                Message::Notice(mut notice) => {
                    self.sign(&mut notice);
                    tracing::debug!(%notice, "notice from the server");
                    return Ok(Some(Message::Notice(notice)));
                }
                Message::ReadyForQuery => {
                    if self.state == State::Busy {
                        self.state = State::Ready;
                    }
                    return Ok(Some(Message::ReadyForQuery));
                }
                other => return Ok(Some(other)),
            }
        }
    }

    /// Waits for more bytes, without a deadline of its own. Dropping this loses nothing.
    pub(crate) async fn fill(&mut self) -> Result<(), PgError> {
        if self.state == State::Broken {
            return Err(self.closed());
        }
        match poll_fn(|context| self.poll_fill(context)).await {
            Ok(0) => {
                self.state = State::Broken;
                Err(self.closed())
            }
            Ok(_) => Ok(()),
            Err(source) => {
                self.state = State::Broken;
                Err(PgError::Lost { server: self.server.clone(), doing: self.doing.clone(), source })
            }
        }
    }

    /// Runs a query or command and reads its answer to the end. The rows of its last result set.
    pub(crate) async fn query(&mut self, sql: &str) -> Result<Vec<Row>, PgError> {
        self.send_query(sql).await?;
        self.rest(Vec::new(), None).await
    }

    /// Reads an answer to its end (ReadyForQuery), with the deadline of a command, after `rows` or `error` was read of it.
    pub(crate) async fn rest(
        &mut self,
        mut rows: Vec<Row>,
        mut error: Option<ServerError>,
    ) -> Result<Vec<Row>, PgError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            if self.state == State::Broken {
                // FATAL: no ReadyForQuery will follow, and nothing better than this error.
                if let Some(error) = error {
                    return Err(PgError::Server(Box::new(error)));
                }
            }
            match self.receive(deadline.saturating_duration_since(Instant::now())).await? {
                Message::RowDescription => rows.clear(),
                Message::DataRow(_) if rows.len() >= MAX_ROWS => {
                    self.state = State::Broken;
                    return Err(self.protocol(format!("more than {MAX_ROWS} rows")));
                }
                Message::DataRow(row) => rows.push(row),
                Message::Error(new) => error = Some(error.unwrap_or(new)), // the first says the cause
                Message::ReadyForQuery => {
                    return match error {
                        Some(error) => Err(PgError::Server(Box::new(error))),
                        None => Ok(rows),
                    };
                }
                Message::CommandComplete | Message::EmptyQuery | Message::Notice(_) => {}
                other => {
                    self.state = State::Broken;
                    return Err(self.unexpected(&other));
                }
            }
        }
    }

    /// Takes leave of the server, so that it need not wonder. Failure to do so does not matter.
    pub(crate) async fn close(mut self) {
        if self.state != State::Broken {
            frontend::terminate(&mut self.out);
            let _ = self.flush(Duration::from_secs(1)).await;
            let _ = tokio::time::timeout(Duration::from_secs(1), self.socket.shutdown()).await;
        }
    }

    /// Bytes read ahead.
    #[cfg(test)]
    pub(crate) fn buffered(&self) -> usize {
        self.reader.buffered()
    }

    /// Nothing more will come: the server sent FATAL, closed the connection or missed a deadline.
    pub(crate) fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    /// Never to be used again.
    pub(crate) fn give_up(&mut self) {
        self.state = State::Broken;
    }

    pub(crate) fn protocol(&self, reason: String) -> PgError {
        PgError::Protocol { server: self.server.clone(), reason: format!("{reason} (while {})", self.doing) }
    }

    pub(crate) fn unexpected(&self, message: &Message) -> PgError {
        match message {
            Message::Error(error) => PgError::Server(Box::new(error.clone())),
            other => self.protocol(format!("{} out of turn", other.name())),
        }
    }

    pub(crate) fn timed_out(&mut self, after: Duration) -> PgError {
        self.state = State::Broken;
        PgError::Timeout { server: self.server.clone(), doing: self.doing.clone(), after }
    }

    pub(crate) fn closed(&mut self) -> PgError {
        match self.write_error.take() {
            Some(source) => PgError::Lost { server: self.server.clone(), doing: self.doing.clone(), source },
            None => PgError::Closed { server: self.server.clone(), doing: self.doing.clone() },
        }
    }

    fn sign(&self, error: &mut ServerError) {
        self.server.clone_into(&mut error.server);
        self.doing.clone_into(&mut error.doing);
    }

    /// Writes as much as goes. Ready when nothing is left to write, or writing failed for good.
    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while !self.out.is_empty() && self.write_error.is_none() {
            let written = match pin!(self.socket.write(&self.out)).poll(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0)) => Err(io::Error::from(io::ErrorKind::WriteZero)),
                Poll::Ready(result) => result,
            };
            match written {
                Ok(count) => {
                    self.out.advance(count);
                    self.unflushed = true;
                }
                Err(error) => self.write_error = Some(error),
            }
        }
        if self.unflushed && self.write_error.is_none() {
            match pin!(self.socket.flush()).poll(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => self.write_error = Some(error),
            }
            self.unflushed = false;
        }
        if self.write_error.is_some() {
            self.out.clear();
        }
        Poll::Ready(())
    }

    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Ok(0));
        }
        let read = pin!(self.socket.read_buf(self.reader.space())).poll(context);
        if let Poll::Ready(Ok(0)) = read {
            self.ended = true;
        }
        read
    }

    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let _ = self.poll_write(context); // registers for more; what matters here is what comes in
        self.poll_read(context)
    }

    fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.poll_write(context).is_ready() {
                return Poll::Ready(());
            }
            // The socket is full: the server does not read, perhaps because we do not.
            if self.reader.buffered() >= READ_AHEAD {
                return Poll::Pending;
            }
            match self.poll_read(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(()), // shows again when receiving
                Poll::Ready(Ok(_)) => {}
            }
        }
    }
}

/// The number of a version as in `server_version`: `15.18 (Debian …)` is 150018, `18beta1` 180000.
fn version_num(version: &str) -> u32 {
    let mut parts = version.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
    let major = parts.next().unwrap_or(0);
    // `18beta1`: what follows a letter is no minor.
    let minor =
        if version.trim_start_matches(|c: char| c.is_ascii_digit()).starts_with('.') { parts.next() } else { None };
    major.saturating_mul(10_000).saturating_add(minor.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_servers_write_them() {
        for (text, number) in [
            ("15.18", 150_018),
            ("15.18 (Debian 15.18-0+deb12u1)", 150_018),
            ("13.23", 130_023),
            ("18beta1", 180_000),
            ("18devel", 180_000),
            ("", 0),
            ("99999999999999.1", 1),
        ] {
            assert_eq!(version_num(text), number, "{text:?}");
        }
    }
}
