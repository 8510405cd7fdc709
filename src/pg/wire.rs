//! PostgreSQL's wire protocol 3.0 as values: bytes in, messages out, and the few messages we write ourselves. Pure.
//!
//! A message is cut out of the receive buffer without copying: what a [`Message::CopyData`] holds shares the buffer, and
//! the buffer is freed with its last message. Protocol: <https://www.postgresql.org/docs/current/protocol.html>

use std::str::FromStr;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use fallible_iterator::FallibleIterator as _;
use postgres_protocol::message::backend;

use super::error::{PgError, ServerError};
use crate::types::{Lsn, PgTimestamp};

/// Longest message taken, in bytes. The largest that PostgreSQL sends us are history files and rows of catalog views; a
/// length beyond this is not PostgreSQL speaking (P8: memory stays bounded whatever the other end says).
pub(crate) const MAX_MESSAGE: usize = 64 << 20;

/// Free space that a read finds, in bytes: few system calls per megabyte, and what is left over at its end and has to be
/// copied (at most one WAL message of 128 KiB) is little against it.
const READ_BUFFER: usize = 1 << 20;

/// Below this much free space the buffer is renewed rather than filled further, in bytes.
const READ_LEAST: usize = 64 << 10;

/// What the server sent that is not the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct WireError(pub String);

/// Cuts messages out of a stream of bytes, however the network slices it.
#[derive(Debug, Default)]
pub(crate) struct FrameReader {
    buffer: BytesMut,
}

impl FrameReader {
    /// Where the next read writes to; there is room.
    pub(crate) fn space(&mut self) -> &mut BytesMut {
        let missing = self.missing();
        if self.buffer.capacity() - self.buffer.len() < missing.max(READ_LEAST) {
            self.buffer.reserve(missing.max(READ_BUFFER));
        }
        &mut self.buffer
    }

    /// Bytes that lie here unread.
    pub(crate) fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Bytes that the message at the front still lacks, as far as known; never more than [`MAX_MESSAGE`].
    fn missing(&self) -> usize {
        match self.buffer.get(1..5).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes) {
            Some(length) => (length as usize).min(MAX_MESSAGE).saturating_add(1).saturating_sub(self.buffer.len()),
            None => 0,
        }
    }

    /// The next whole message, or `None` until more bytes are here.
    pub(crate) fn next(&mut self) -> Result<Option<Message>, WireError> {
        let Some(&[tag, a, b, c, d]) = self.buffer.first_chunk::<5>() else { return Ok(None) };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if !(4..=MAX_MESSAGE).contains(&length) {
            return Err(WireError(format!("a message {:?} of {length} bytes; is this PostgreSQL?", char::from(tag))));
        }
        if self.buffer.len() <= length {
            return Ok(None);
        }
        let frame = self.buffer.split_to(length + 1);
        Message::parse(tag, frame).map(Some)
    }
}

/// A message from the server.
pub(crate) enum Message {
    /// A piece of a copy. Shares the receive buffer.
    CopyData(Bytes),
    CopyDone,
    CopyBoth,
    CopyOut,
    CopyIn,
    /// A result set begins.
    RowDescription,
    DataRow(Row),
    CommandComplete,
    EmptyQuery,
    Error(ServerError),
    Notice(ServerError),
    ParameterStatus {
        name: String,
        value: String,
    },
    ReadyForQuery,
    Authentication(Authentication),
    /// What we have no use for (BackendKeyData, NotificationResponse, …).
    Ignored,
}

/// What the server wants to see before it lets us in.
pub(crate) enum Authentication {
    Ok,
    Cleartext,
    Md5 {
        salt: [u8; 4],
    },
    /// SASL mechanisms, in the server's order.
    Sasl(Vec<String>),
    SaslContinue(Bytes),
    SaslFinal(Bytes),
    /// GSSAPI, SSPI, Kerberos, …: not built in.
    Other(&'static str),
}

impl Message {
    /// `frame` is the whole message with its header.
    fn parse(tag: u8, mut frame: BytesMut) -> Result<Message, WireError> {
        match tag {
            // The hot path: nothing is looked at, nothing copied.
            backend::COPY_DATA_TAG => {
                frame.advance(5);
                return Ok(Message::CopyData(frame.freeze()));
            }
            // CopyBothResponse is not known to postgres-protocol.
            b'W' => return Ok(Message::CopyBoth),
            // NegotiateProtocolVersion: we ask for 3.0, which every server has.
            b'v' => return Ok(Message::Ignored),
            _ => {}
        }
        let unreadable = |error: std::io::Error| WireError(format!("message {:?}: {error}", char::from(tag)));
        let parsed = backend::Message::parse(&mut frame).map_err(unreadable)?;
        let Some(parsed) = parsed else { return Err(WireError(format!("message {:?} is cut", char::from(tag)))) };
        Ok(match parsed {
            backend::Message::CopyDone => Message::CopyDone,
            backend::Message::CopyOutResponse(_) => Message::CopyOut,
            backend::Message::CopyInResponse(_) => Message::CopyIn,
            backend::Message::RowDescription(_) => Message::RowDescription,
            backend::Message::DataRow(body) => Message::DataRow(Row::from_body(&body)?),
            backend::Message::CommandComplete(_) => Message::CommandComplete,
            backend::Message::EmptyQueryResponse => Message::EmptyQuery,
            backend::Message::ErrorResponse(body) => Message::Error(error_fields(body.fields())?),
            backend::Message::NoticeResponse(body) => Message::Notice(error_fields(body.fields())?),
            backend::Message::ParameterStatus(body) => Message::ParameterStatus {
                // Not UTF-8 only for settings we do not ask about; no reason to hang up.
                name: body.name().unwrap_or_default().to_owned(),
                value: body.value().unwrap_or_default().to_owned(),
            },
            backend::Message::ReadyForQuery(_) => Message::ReadyForQuery,
            backend::Message::AuthenticationOk => Message::Authentication(Authentication::Ok),
            backend::Message::AuthenticationCleartextPassword => Message::Authentication(Authentication::Cleartext),
            backend::Message::AuthenticationMd5Password(body) => {
                Message::Authentication(Authentication::Md5 { salt: body.salt() })
            }
            backend::Message::AuthenticationSasl(body) => {
                let names = body.mechanisms().map(|name| Ok(name.to_owned())).collect().map_err(unreadable)?;
                Message::Authentication(Authentication::Sasl(names))
            }
            backend::Message::AuthenticationSaslContinue(body) => {
                Message::Authentication(Authentication::SaslContinue(Bytes::copy_from_slice(body.data())))
            }
            backend::Message::AuthenticationSaslFinal(body) => {
                Message::Authentication(Authentication::SaslFinal(Bytes::copy_from_slice(body.data())))
            }
            backend::Message::AuthenticationGss | backend::Message::AuthenticationGssContinue(_) => {
                Message::Authentication(Authentication::Other("GSSAPI"))
            }
            backend::Message::AuthenticationSspi => Message::Authentication(Authentication::Other("SSPI")),
            backend::Message::AuthenticationKerberosV5 => Message::Authentication(Authentication::Other("Kerberos")),
            backend::Message::AuthenticationScmCredential => {
                Message::Authentication(Authentication::Other("SCM credentials"))
            }
            _ => Message::Ignored,
        })
    }

    /// What this is, for an error message.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::CopyData(_) => "CopyData",
            Self::CopyDone => "CopyDone",
            Self::CopyBoth => "CopyBothResponse",
            Self::CopyOut => "CopyOutResponse",
            Self::CopyIn => "CopyInResponse",
            Self::RowDescription => "RowDescription",
            Self::DataRow(_) => "DataRow",
            Self::CommandComplete => "CommandComplete",
            Self::EmptyQuery => "EmptyQueryResponse",
            Self::Error(_) => "ErrorResponse",
            Self::Notice(_) => "NoticeResponse",
            Self::ParameterStatus { .. } => "ParameterStatus",
            Self::ReadyForQuery => "ReadyForQuery",
            Self::Authentication(_) => "an authentication request",
            Self::Ignored => "a message of no concern",
        }
    }
}

fn error_fields(mut fields: backend::ErrorFields<'_>) -> Result<ServerError, WireError> {
    let mut error = ServerError::default();
    while let Some(field) = fields.next().map_err(|error| WireError(format!("an error message: {error}")))? {
        // Before the client's encoding is known, and on a walsender, texts come in the server's encoding.
        let text = String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'S' if error.severity.is_empty() => error.severity = text, // may be translated; 'V' follows and is not
            b'V' => error.severity = text,
            b'C' => error.sqlstate = text,
            b'M' => error.message = text,
            b'D' => error.detail = Some(text),
            b'H' => error.hint = Some(text),
            _ => {}
        }
    }
    Ok(error)
}

/// One row of a result, as the server's text.
#[derive(Debug, Clone)]
pub struct Row {
    columns: Vec<Option<Bytes>>,
}

impl Row {
    fn from_body(body: &backend::DataRowBody) -> Result<Row, WireError> {
        let storage = body.buffer_bytes();
        let columns = body.ranges().map(|range| Ok(range.map(|range| storage.slice(range)))).collect();
        columns.map(|columns| Row { columns }).map_err(|error| WireError(format!("a row: {error}")))
    }

    /// How many columns there are.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// Whether there is no column at all.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// The text of column `index`, from 0. `None`: NULL, not UTF-8, or no such column.
    pub fn get(&self, index: usize) -> Option<&str> {
        self.bytes(index).and_then(|bytes| std::str::from_utf8(bytes).ok())
    }

    /// The bytes of column `index` as sent. `None`: NULL, or no such column.
    pub fn bytes(&self, index: usize) -> Option<&Bytes> {
        self.columns.get(index).and_then(Option::as_ref)
    }

    /// Column `index` as a value; NULL and what does not parse are an error that names the column.
    pub fn parse<T: FromStr>(&self, index: usize) -> Result<T, PgError> {
        self.get(index).and_then(|text| text.parse().ok()).ok_or_else(|| PgError::Protocol {
            server: "the server".to_owned(),
            reason: format!("column {index} is {:?}, not a {}", self.get(index), std::any::type_name::<T>()),
        })
    }
}

/// What a walsender sends within CopyBoth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum WalMessage {
    Wal { start: Lsn, server_end: Lsn, sent_at: PgTimestamp, data: Bytes },
    Keepalive { server_end: Lsn, sent_at: PgTimestamp, reply_requested: bool },
}

impl WalMessage {
    /// Reads the payload of a CopyData. The WAL itself is not copied.
    pub(crate) fn parse(mut payload: Bytes) -> Result<WalMessage, WireError> {
        match payload.first() {
            Some(b'w') if payload.len() >= 25 => {
                payload.advance(1);
                let (start, server_end, sent_at) = (payload.get_u64(), payload.get_u64(), payload.get_i64());
                let sent_at = PgTimestamp::new(sent_at);
                Ok(WalMessage::Wal { start: Lsn::new(start), server_end: Lsn::new(server_end), sent_at, data: payload })
            }
            Some(b'k') if payload.len() >= 18 => {
                payload.advance(1);
                let (server_end, sent_at) = (payload.get_u64(), payload.get_i64());
                Ok(WalMessage::Keepalive {
                    server_end: Lsn::new(server_end),
                    sent_at: PgTimestamp::new(sent_at),
                    reply_requested: payload.get_u8() != 0,
                })
            }
            Some(tag) => Err(WireError(format!("a stream message {:?} of {} bytes", char::from(*tag), payload.len()))),
            None => Err(WireError("an empty stream message".to_owned())),
        }
    }
}

/// What we tell the server about the WAL we received. Positions are "last byte + 1"; 0/0 says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status {
    /// Written: what `synchronous_commit = remote_write` waits for.
    pub write: Lsn,
    /// Durable: what `synchronous_commit = on` waits for, and up to where the slot lets WAL go.
    pub flush: Lsn,
    /// Replayed: what `synchronous_commit = remote_apply` waits for.
    pub apply: Lsn,
    /// Ask for a keepalive at once.
    pub reply_requested: bool,
}

impl Status {
    /// Appends the whole CopyData message; `now` is our clock, which the server only shows.
    pub(crate) fn write_to(&self, now: PgTimestamp, out: &mut BytesMut) {
        const PAYLOAD: u32 = 1 + 8 * 4 + 1;
        out.reserve(1 + 4 + PAYLOAD as usize);
        out.put_u8(b'd');
        out.put_u32(4 + PAYLOAD);
        out.put_u8(b'r');
        out.put_u64(self.write.get());
        out.put_u64(self.flush.get());
        out.put_u64(self.apply.get());
        out.put_i64(now.micros());
        out.put_u8(u8::from(self.reply_requested));
    }
}

/// `name` as an SQL identifier, always quoted.
pub fn quote_ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `text` as an SQL string literal that means the same under every `standard_conforming_strings`. Replication commands
/// know no `E''`; there a backslash stands for itself, see [`quote_label`].
pub fn quote_literal(text: &str) -> String {
    let doubled = text.replace('\'', "''");
    if doubled.contains('\\') { format!("E'{}'", doubled.replace('\\', "\\\\")) } else { format!("'{doubled}'") }
}

/// `text` as a string in a replication command.
pub(crate) fn quote_label(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        bytes.extend((body.len() as u32 + 4).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    /// Feeds `bytes` in pieces cut at `cuts` and shows every message.
    fn read(bytes: &[u8], cuts: &[usize]) -> Result<Vec<String>, WireError> {
        let mut reader = FrameReader::default();
        let mut shown = Vec::new();
        let mut borders: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        borders.extend([0, bytes.len()]);
        borders.sort_unstable();
        for pair in borders.windows(2) {
            let piece = &bytes[pair[0]..pair[1]];
            let space = reader.space();
            assert!(space.capacity() - space.len() >= READ_LEAST);
            space.extend_from_slice(piece);
            while let Some(message) = reader.next()? {
                shown.push(match message {
                    Message::CopyData(data) => format!("data {data:?}"),
                    Message::DataRow(row) => {
                        format!("row {:?}", (0..row.len()).map(|index| row.get(index)).collect::<Vec<_>>())
                    }
                    Message::Error(error) => format!("error {error}"),
                    other => other.name().to_owned(),
                });
            }
        }
        Ok(shown)
    }

    fn a_message() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            vec(any::<u8>(), 0..300).prop_map(|body| message(b'd', &body)),
            Just(message(b'c', b"")),
            Just(message(b'W', b"\0\0\0")),
            Just(message(b'Z', b"I")),
            Just(message(b'C', b"COPY 0\0")),
            Just(message(b'D', b"\0\x02\0\0\0\x01x\xff\xff\xff\xff")),
            Just(message(b'E', b"SFEHLER\0VERROR\0C55006\0Mslot\0\0")),
            Just(message(b'S', b"TimeZone\0UTC\0")),
        ]
    }

    proptest! {
        /// However the network slices the stream, the same messages come out.
        #[test]
        fn slicing_does_not_matter(messages in vec(a_message(), 0..20), cuts in vec(any::<Index>(), 0..40)) {
            let bytes = messages.concat();
            let cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            let whole = read(&bytes, &[]).unwrap();
            prop_assert_eq!(whole.len(), messages.len());
            prop_assert_eq!(read(&bytes, &cuts).unwrap(), whole);
        }

        #[test]
        fn no_bytes_panic(bytes in vec(any::<u8>(), 0..200), tag in any::<u8>(), body in vec(any::<u8>(), 0..60)) {
            let _ = read(&bytes, &[1, 5, 6]);
            let _ = read(&message(tag, &body), &[]);
            let _ = WalMessage::parse(Bytes::from(bytes));
        }

        #[test]
        fn wal_messages_are_read_as_sent(start: u64, end: u64, time: i64, data in vec(any::<u8>(), 0..100), ask: bool) {
            let head = |tag: u8, numbers: &[u64]| {
                let numbers = numbers.iter().flat_map(|number| number.to_be_bytes());
                std::iter::once(tag).chain(numbers).chain(time.to_be_bytes()).collect::<Vec<u8>>()
            };
            let (server_end, sent_at) = (Lsn::new(end), PgTimestamp::new(time));
            let wal = [head(b'w', &[start, end]), data.clone()].concat();
            let want = WalMessage::Wal { start: Lsn::new(start), server_end, sent_at, data: data.into() };
            prop_assert_eq!(WalMessage::parse(wal.into()), Ok(want));
            let keepalive = [head(b'k', &[end]), vec![u8::from(ask)]].concat();
            let want = WalMessage::Keepalive { server_end, sent_at, reply_requested: ask };
            prop_assert_eq!(WalMessage::parse(keepalive.into()), Ok(want));
        }

        #[test]
        fn a_status_is_laid_out_as_the_server_reads_it(write: u64, flush: u64, apply: u64, time: i64, ask: bool) {
            let status = Status {
                write: Lsn::new(write), flush: Lsn::new(flush), apply: Lsn::new(apply), reply_requested: ask,
            };
            let mut out = BytesMut::new();
            status.write_to(PgTimestamp::new(time), &mut out);
            let numbers = [write, flush, apply, time as u64].map(u64::to_be_bytes).concat();
            prop_assert_eq!(out.to_vec(), message(b'd', &[b"r".to_vec(), numbers, vec![u8::from(ask)]].concat()));
        }
    }

    #[test]
    fn lengths_that_postgresql_never_sends_are_refused_before_anything_is_reserved() {
        for length in [0u32, 3, MAX_MESSAGE as u32 + 1, u32::MAX] {
            let mut bytes = vec![b'd'];
            bytes.extend(length.to_be_bytes());
            let mut reader = FrameReader::default();
            reader.space().extend_from_slice(&bytes);
            assert!(reader.space().capacity() < MAX_MESSAGE + (2 << 20));
            assert!(reader.next().is_err(), "{length} was taken");
        }
    }

    #[test]
    fn wal_is_not_copied() {
        let mut reader = FrameReader::default();
        reader.space().extend_from_slice(&message(b'd', &[b"w".to_vec(), vec![0; 24], vec![7; 1000]].concat()));
        let place = reader.space().as_ptr() as usize;
        let Ok(Some(Message::CopyData(payload))) = reader.next() else { panic!("no data") };
        let Ok(WalMessage::Wal { data, .. }) = WalMessage::parse(payload) else { panic!("no WAL") };
        assert_eq!(data.as_ptr() as usize - place, 5 + 25);
    }

    #[test]
    fn quoting() {
        assert_eq!(quote_ident("a\"b"), "\"a\"\"b\"");
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal("a\\'b"), "E'a\\\\''b'");
        assert_eq!(quote_label("a\\'b"), "'a\\''b'");
    }
}
