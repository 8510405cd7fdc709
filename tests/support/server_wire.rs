//! The server's side of PostgreSQL's protocol, as much of it as a walsender needs: messages as bytes, and what a client says.
//! Knows nothing of pgkeep: the simulation inside of the crate (`src/archive/tests/simulation`) reads this file too.
#![allow(dead_code)]

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// A message of any kind.
pub fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(5 + body.len());
    bytes.push(tag);
    bytes.extend((body.len() as u32 + 4).to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn text(tag: u8, texts: &[&str]) -> Vec<u8> {
    let body: Vec<u8> = texts.iter().flat_map(|text| text.bytes().chain([0])).collect();
    message(tag, &body)
}

/// "You are in", without a password, from a server of this version.
pub fn welcome(version: &str) -> Vec<u8> {
    [message(b'R', &[0; 4]), text(b'S', &["server_version", version]), ready()].concat()
}

pub fn ready() -> Vec<u8> {
    message(b'Z', b"I")
}

pub fn complete(what: &str) -> Vec<u8> {
    text(b'C', &[what])
}

/// A result of one row, all columns as text, or of none; up to "ready".
pub fn answer(row: Option<&[Option<&str>]>) -> Vec<u8> {
    [result(row), complete("SELECT 1"), ready()].concat()
}

/// The same, without its end.
pub fn result(row: Option<&[Option<&str>]>) -> Vec<u8> {
    let columns = row.map_or(0, <[_]>::len) as u16;
    let mut head = columns.to_be_bytes().to_vec();
    for _ in 0..columns {
        head.extend(b"c\0");
        head.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 25, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);
    }
    let mut bytes = message(b'T', &head);
    if let Some(row) = row {
        let mut body = columns.to_be_bytes().to_vec();
        for value in row {
            match value {
                Some(value) => {
                    body.extend((value.len() as u32).to_be_bytes());
                    body.extend(value.bytes());
                }
                None => body.extend(u32::MAX.to_be_bytes()),
            }
        }
        bytes.extend(message(b'D', &body));
    }
    bytes
}

/// An error that ends a command; "ready" does not follow by itself.
pub fn error(severity: &str, code: &str, reason: &str) -> Vec<u8> {
    let mut body = Vec::new();
    for (field, value) in [(b'S', severity), (b'V', severity), (b'C', code), (b'M', reason)] {
        body.push(field);
        body.extend(value.bytes().chain([0]));
    }
    body.push(0);
    message(b'E', &body)
}

pub fn copy_both() -> Vec<u8> {
    message(b'W', &[0, 0, 0])
}

pub fn copy_done() -> Vec<u8> {
    message(b'c', &[])
}

/// WAL that begins at `start`, of a server that has flushed up to `end`.
pub fn wal(start: u64, end: u64, data: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(25 + data.len());
    body.push(b'w');
    for number in [start, end, 0] {
        body.extend(number.to_be_bytes());
    }
    body.extend_from_slice(data);
    message(b'd', &body)
}

pub fn keepalive(end: u64, reply: bool) -> Vec<u8> {
    let mut body = vec![b'k'];
    body.extend(end.to_be_bytes());
    body.extend(0u64.to_be_bytes());
    body.push(u8::from(reply));
    message(b'd', &body)
}

/// What follows the copy where a timeline was left: the next one, and where it begins.
pub fn timeline_ended(next: u32, begins_at: &str) -> Vec<u8> {
    let next = next.to_string();
    let row = result(Some(&[Some(&next), Some(begins_at)]));
    [row, complete("START_STREAMING"), complete("START_REPLICATION"), ready()].concat()
}

/// What a client says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    Query(String),
    Status { write: u64, flush: u64, apply: u64, reply: bool },
    CopyDone,
    Terminate,
    Other(u8),
}

/// The startup packet's parameters, by turns name and value. A request for TLS has no place here.
pub async fn startup<S: AsyncRead + Unpin>(socket: &mut S) -> io::Result<Vec<String>> {
    let len = socket.read_u32().await? as usize;
    let mut body = vec![0; len.saturating_sub(4).min(10_000)];
    socket.read_exact(&mut body).await?;
    let parameters = body.get(4..).unwrap_or_default().split(|byte| *byte == 0);
    Ok(parameters.map(|text| String::from_utf8_lossy(text).into_owned()).collect())
}

/// The next message of a client that has been let in. Not to be dropped halfway.
pub async fn said<S: AsyncRead + Unpin>(socket: &mut S) -> io::Result<Said> {
    let tag = socket.read_u8().await?;
    let len = socket.read_u32().await? as usize;
    let mut body = vec![0; len.saturating_sub(4).min(1 << 20)];
    socket.read_exact(&mut body).await?;
    let number = |at: usize| u64::from_be_bytes(body[at..at + 8].try_into().unwrap_or_default());
    Ok(match tag {
        b'Q' => Said::Query(String::from_utf8_lossy(&body).trim_end_matches('\0').to_owned()),
        b'd' if body.first() == Some(&b'r') && body.len() == 34 => {
            Said::Status { write: number(1), flush: number(9), apply: number(17), reply: body[33] != 0 }
        }
        b'c' => Said::CopyDone,
        b'X' => Said::Terminate,
        other => Said::Other(other),
    })
}
