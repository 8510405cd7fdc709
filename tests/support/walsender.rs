//! A scripted walsender: behaves, or misbehaves as it is told, over pipes in memory. It writes WAL that is valid.
//!
//! Bytes by hand and not the `pgwire` crate: that one forms messages, and what matters here is messages that are not.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgkeep::pg::Dial;
use pgkeep::types::{Lsn, SystemId};
use tokio::io::{AsyncWriteExt, DuplexStream, WriteHalf, duplex, split};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::server_wire::{self as wire, Said};

pub const SYSTEM: u64 = 7_312_345_678_901_234_567;
const PAGE: u64 = 8192;
pub const SEGMENT: u64 = 1 << 20;

/// Pages of valid WAL from `start` on, each with one record that fills it; `salt` is what it says.
#[derive(Debug, Clone)]
pub struct Wal {
    pub start: Lsn,
    pub bytes: Vec<u8>,
    /// Where the last record begins.
    prev: u64,
}

impl Wal {
    pub fn new(start: Lsn) -> Wal {
        Wal { start, bytes: Vec::new(), prev: 0x28 }
    }

    pub fn end(&self) -> Lsn {
        self.start.advance(self.bytes.len() as u64)
    }

    pub fn write(&mut self, pages: u64, timeline: u32, salt: u8) {
        for _ in 0..pages {
            let at = self.end().get();
            let long = at.is_multiple_of(SEGMENT);
            self.bytes.extend(0xD116u16.to_le_bytes());
            self.bytes.extend(if long { 2u16 } else { 0 }.to_le_bytes());
            self.bytes.extend(timeline.to_le_bytes());
            self.bytes.extend(at.to_le_bytes());
            self.bytes.extend([0; 8]);
            if long {
                self.bytes.extend(SYSTEM.to_le_bytes());
                self.bytes.extend((SEGMENT as u32).to_le_bytes());
                self.bytes.extend((PAGE as u32).to_le_bytes());
            }
            let start = self.end().get();
            let len = (PAGE - start % PAGE) as usize;
            // A record without a meaning (XLOG_NOOP): its header, and one piece of data that fills the page.
            let mut body = vec![254];
            body.extend(((len - 24 - 5) as u32).to_le_bytes());
            body.resize(len - 24, salt);
            let mut head = (len as u32).to_le_bytes().to_vec();
            head.extend([0; 4]);
            head.extend(self.prev.to_le_bytes());
            head.extend([0x20, 0, 0, 0]);
            let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &head);
            head.extend(crc.to_le_bytes());
            self.bytes.extend(head);
            self.bytes.extend(body);
            self.prev = start;
        }
    }

    /// The same up to `fork`, the start of a page that is not a segment's first.
    pub fn fork(&self, fork: Lsn) -> Wal {
        let bytes = self.bytes[..(fork.get() - self.start.get()) as usize].to_vec();
        let before = fork.get() - PAGE;
        let prev = before + if before.is_multiple_of(SEGMENT) { 40 } else { 24 };
        Wal { start: self.start, bytes, prev }
    }

    pub fn from(&self, at: Lsn) -> &[u8] {
        let offset = at.get().saturating_sub(self.start.get()) as usize;
        self.bytes.get(offset..).unwrap_or_default()
    }
}

/// What the server does to the next who streams from the slot, or asks who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Well,
    /// Bytes that are no message.
    Garbage,
    /// Messages of no length, and of two gigabytes.
    NoLength,
    Huge,
    /// WAL messages that end before their own head does, and of a kind that does not exist.
    Short,
    UnknownKind,
    /// Half a message, and then nothing.
    CutInAMessage,
    /// The same bytes again; bytes from further on; a position that overflows.
    Backwards,
    Ahead,
    Overflow,
    /// Not a word.
    Silent,
    /// An error when the copy has begun, and one in its middle.
    ErrorAfterCopyBoth,
    ErrorInTheMiddle,
    /// The end of the copy without a reason, or with one that makes no sense.
    EndsWithoutAWord,
    EndsForAnOlderTimeline,
    EndsWithNonsense,
    /// Keepalives by the hundred, each asking for an answer and telling of an end that is far away.
    Pesters,
    /// Answers to questions that make no sense.
    NonsenseIdentity,
    NonsenseSegmentSize,
    NonsenseHistory,
    AnotherSystem,
}

pub struct State {
    pub mood: Mood,
    pub timeline: u32,
    /// Where the first timeline was left.
    pub fork: Lsn,
    /// Of both timelines.
    pub wal: [Wal; 2],
    pub slot: Option<Lsn>,
    /// Sessions that streamed while it was not well.
    pub misbehaved: u32,
    /// Of each status, what was reported as flushed; and how much had been sent in order by then.
    pub flushed: Vec<(Lsn, Lsn)>,
    /// Every session is cut when this changes.
    generation: u64,
}

/// See the module. Clones are the same one.
#[derive(Clone)]
pub struct Walsender(Arc<Mutex<State>>);

impl std::fmt::Debug for Walsender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Walsender")
    }
}

impl Dial for Walsender {
    fn dial(&self) -> io::Result<DuplexStream> {
        let (ours, theirs) = duplex(1 << 16);
        let server = self.clone();
        tokio::spawn(async move {
            // A cut connection is nothing that a server complains of.
            let _ = server.serve(theirs).await;
        });
        Ok(ours)
    }
}

type Writer = WriteHalf<DuplexStream>;

impl Walsender {
    pub fn new(start: Lsn) -> Walsender {
        let wal = Wal::new(start);
        Walsender(Arc::new(Mutex::new(State {
            mood: Mood::Well,
            timeline: 1,
            fork: Lsn::ZERO,
            wal: [wal.clone(), wal],
            slot: None,
            misbehaved: 0,
            flushed: Vec::new(),
            generation: 0,
        })))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another mood, and all connections are cut.
    pub fn set(&self, mood: Mood) {
        let mut state = self.state();
        state.mood = mood;
        state.misbehaved = 0;
        state.generation += 1;
    }

    pub fn write(&self, pages: u64, salt: u8) -> Lsn {
        let mut state = self.state();
        let timeline = state.timeline;
        let wal = &mut state.wal[timeline as usize - 1];
        wal.write(pages, timeline, salt);
        wal.end()
    }

    /// The second timeline begins at `fork`, whatever was sent of the first.
    pub fn promote(&self, fork: Lsn) {
        let mut state = self.state();
        state.wal[1] = state.wal[0].fork(fork);
        (state.timeline, state.fork) = (2, fork);
    }

    async fn serve(self, pipe: DuplexStream) -> io::Result<()> {
        let generation = self.state().generation;
        let (mut read, mut write) = split(pipe);
        wire::startup(&mut read).await?;
        write.write_all(&wire::welcome("17.4")).await?;
        let (sender, mut inbox) = mpsc::unbounded_channel();
        let sent = Arc::new(Mutex::new(Lsn::ZERO));
        let heard = Arc::clone(&sent);
        let state = self.clone();
        let listening = async move {
            loop {
                let said = match wire::said(&mut read).await {
                    Ok(said) => said,
                    Err(error) => return Err::<(), io::Error>(error),
                };
                match said {
                    Said::Status { flush, .. } => {
                        let sent = *heard.lock().unwrap_or_else(PoisonError::into_inner);
                        let mut state = state.state();
                        let flush = Lsn::new(flush);
                        state.flushed.push((flush, sent));
                        if flush > Lsn::ZERO && state.slot.is_some_and(|slot| slot < flush) {
                            state.slot = Some(flush);
                        }
                    }
                    said => drop(sender.send(said)),
                }
            }
        };
        let speaking = async {
            while let Some(said) = inbox.recv().await {
                if let Said::Query(sql) = said {
                    self.answer(&sql, &mut write, &mut inbox, &sent).await?;
                }
            }
            Ok::<(), io::Error>(())
        };
        tokio::select! {
            biased;
            ended = listening => ended,
            ended = speaking => ended,
            () = self.is_cut(generation) => Ok(()),
        }
    }

    async fn is_cut(&self, generation: u64) {
        while self.state().generation == generation {
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn answer(
        &self,
        sql: &str,
        write: &mut Writer,
        inbox: &mut mpsc::UnboundedReceiver<Said>,
        sent: &Mutex<Lsn>,
    ) -> io::Result<()> {
        let word = sql.split(' ').next().unwrap_or_default();
        if word == "START_REPLICATION" {
            return self.start(sql, write, inbox, sent).await;
        }
        let answer = {
            let mut state = self.state();
            let mood = state.mood;
            let mut odd = |is: Mood| {
                let odd = mood == is;
                state.misbehaved += u32::from(odd);
                odd
            };
            match word {
                "IDENTIFY_SYSTEM" if odd(Mood::NonsenseIdentity) => wire::answer(Some(&[Some("x"), Some("-1"), None])),
                "IDENTIFY_SYSTEM" => {
                    let system = if odd(Mood::AnotherSystem) { SystemId::new(1) } else { SystemId::new(SYSTEM) };
                    let end = state.wal[state.timeline as usize - 1].end().to_string();
                    let (system, timeline) = (system.to_string(), state.timeline.to_string());
                    wire::answer(Some(&[Some(&system), Some(&timeline), Some(&end), None]))
                }
                "SHOW" if odd(Mood::NonsenseSegmentSize) => wire::answer(Some(&[Some("many")])),
                "SHOW" => wire::answer(Some(&[Some("1MB")])),
                "TIMELINE_HISTORY" if odd(Mood::NonsenseHistory) => {
                    wire::answer(Some(&[Some("00000002.history"), Some("7\tnowhere\tno reason\n")]))
                }
                "TIMELINE_HISTORY" => {
                    let text = format!("1\t{}\tno recovery target specified\n", state.fork);
                    wire::answer(Some(&[Some("00000002.history"), Some(&text)]))
                }
                "CREATE_REPLICATION_SLOT" => {
                    state.slot = Some(state.wal[0].start);
                    wire::answer(Some(&[Some("pgkeep"), Some("0/0"), None, None]))
                }
                "SELECT" if sql.contains("pg_is_in_recovery") => wire::answer(Some(&[Some("f")])),
                _ => match state.slot {
                    None => wire::answer(None),
                    Some(slot) => wire::answer(Some(&[Some(&slot.to_string()), Some("reserved"), Some("f"), None])),
                },
            }
        };
        write.write_all(&answer).await
    }

    async fn start(
        &self,
        sql: &str,
        write: &mut Writer,
        inbox: &mut mpsc::UnboundedReceiver<Said>,
        sent: &Mutex<Lsn>,
    ) -> io::Result<()> {
        let words: Vec<&str> = sql.split(' ').collect();
        let after = |word: &str| words.iter().position(|w| *w == word).and_then(|at| words.get(at + 1).copied());
        let mut at: Lsn = after("PHYSICAL").and_then(|text| text.parse().ok()).unwrap_or(Lsn::ZERO);
        let timeline: u32 = after("TIMELINE").and_then(|text| text.parse().ok()).unwrap_or(1);
        let mark = |to: Lsn| *sent.lock().unwrap_or_else(PoisonError::into_inner) = to;
        write.write_all(&wire::copy_both()).await?;
        let mood = self.state().mood;
        mark(at);
        let some = self.state().wal[timeline as usize - 1].from(at).iter().copied().take(30_000).collect::<Vec<_>>();
        let first = wire::wal(at.get(), at.get() + some.len() as u64, &some);
        let lost = wire::error("ERROR", "XX000", "could not read from WAL segment");
        let misbehaviour = match mood {
            Mood::Well
            | Mood::NonsenseIdentity
            | Mood::NonsenseSegmentSize
            | Mood::NonsenseHistory
            | Mood::AnotherSystem => None,
            Mood::Garbage => Some((vec![0xFF; 300], false)),
            Mood::NoLength => Some((b"d\0\0\0\0".to_vec(), false)),
            Mood::Huge => Some((b"d\x7f\xff\xff\xffw".to_vec(), false)),
            Mood::Short => Some((wire::message(b'd', b"w\0\0\0"), false)),
            Mood::UnknownKind => Some((wire::message(b'd', &[b'?'; 40]), false)),
            Mood::CutInAMessage => Some((first[..first.len() / 2].to_vec(), true)),
            Mood::Backwards => Some(([first.clone(), first].concat(), false)),
            Mood::Ahead => Some((wire::wal(at.get() + 8 * PAGE, at.get() + 9 * PAGE, &some), false)),
            Mood::Overflow => Some((wire::wal(u64::MAX - 7, u64::MAX, &some), false)),
            Mood::Silent => Some((Vec::new(), false)),
            Mood::ErrorAfterCopyBoth => Some(([lost, wire::ready()].concat(), false)),
            Mood::ErrorInTheMiddle => Some(([first, lost, wire::ready()].concat(), false)),
            Mood::EndsWithoutAWord => Some(([first, wire::copy_done(), wire::ready()].concat(), false)),
            Mood::EndsForAnOlderTimeline => {
                Some(([wire::copy_done(), wire::timeline_ended(1, "0/300000")].concat(), false))
            }
            Mood::EndsWithNonsense => Some(([wire::copy_done(), wire::timeline_ended(2, "here")].concat(), false)),
            Mood::Pesters => Some(((0..300).flat_map(|_| wire::keepalive(u64::MAX / 2, true)).collect(), false)),
        };
        if let Some((bytes, closes)) = misbehaviour {
            write.write_all(&bytes).await?;
            if matches!(mood, Mood::CutInAMessage | Mood::Backwards | Mood::ErrorInTheMiddle | Mood::EndsWithoutAWord) {
                mark(at.advance(some.len() as u64));
            }
            self.state().misbehaved += 1;
            if closes {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            // Nothing more is said to this client, whatever it says.
            while self.state().mood == mood {
                sleep(Duration::from_millis(50)).await;
            }
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        loop {
            let (bytes, ended) = {
                let state = self.state();
                let (end, over) = match state.timeline > timeline {
                    true => (state.fork, true),
                    false => (state.wal[timeline as usize - 1].end(), false),
                };
                let to = at.advance(100_000).min(end).max(at);
                let len = to.bytes_since(at).unwrap_or(0) as usize;
                let bytes = state.wal[timeline as usize - 1].from(at).iter().copied().take(len).collect::<Vec<_>>();
                (bytes, over && at >= end)
            };
            if ended {
                let fork = self.state().fork.to_string();
                write.write_all(&wire::copy_done()).await?;
                while inbox.recv().await.ok_or(io::ErrorKind::BrokenPipe)? != Said::CopyDone {}
                return write.write_all(&wire::timeline_ended(2, &fork)).await;
            }
            if !bytes.is_empty() {
                let next = at.advance(bytes.len() as u64);
                mark(next);
                write.write_all(&wire::wal(at.get(), next.get(), &bytes)).await?;
                at = next;
            }
            match inbox.try_recv() {
                Ok(Said::CopyDone) => {
                    let over = [wire::copy_done(), wire::complete("COPY 0"), wire::ready()].concat();
                    return write.write_all(&over).await;
                }
                Err(mpsc::error::TryRecvError::Disconnected) => return Err(io::ErrorKind::BrokenPipe.into()),
                _ if bytes.is_empty() => sleep(Duration::from_millis(20)).await,
                _ => {}
            }
        }
    }
}
