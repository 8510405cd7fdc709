//! The stream against a scripted peer: what a real server does too rarely to wait for. The clock is tokio's, paused.

use bytes::{BufMut as _, BytesMut};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use super::*;

const TIMEOUT: Duration = Duration::from_secs(30);

fn stream(buffer: usize) -> (WalStream, DuplexStream) {
    let (ours, theirs) = duplex(buffer);
    let connection = Connection::new(Box::new(ours), "peer".to_owned(), TIMEOUT);
    (WalStream::new(connection, TimelineId::FIRST), theirs)
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    bytes.extend((body.len() as u32 + 4).to_be_bytes());
    bytes.extend(body);
    bytes
}

fn wal(start: u64, data: &[u8]) -> Vec<u8> {
    let mut body = BytesMut::new();
    body.put_u8(b'w');
    for number in [start, start + data.len() as u64, 0] {
        body.put_u64(number);
    }
    body.extend_from_slice(data);
    message(b'd', &body)
}

fn keepalive(ask: bool) -> Vec<u8> {
    let mut body = BytesMut::new();
    body.put_u8(b'k');
    body.put_u64(1);
    body.put_i64(0);
    body.put_u8(u8::from(ask));
    message(b'd', &body)
}

fn end_of_timeline() -> Vec<u8> {
    [
        message(b'c', b""),
        message(b'T', b"\0\0"),
        message(b'D', b"\0\x02\0\0\0\x012\0\0\0\x040/AB"),
        message(b'C', b"START_STREAMING\0"),
        message(b'S', b"in_hot_standby\0off\0"),
        message(b'N', b"SLOG\0C00000\0Mremark\0\0"),
        message(b'C', b"START_REPLICATION\0"),
        message(b'S', b"in_hot_standby\0off\0"),
        message(b'Z', b"I"),
    ]
    .concat()
}

const END: TimelineEnd = TimelineEnd { next: TimelineId::new(2).unwrap(), begins_at: Lsn::new(0xAB) };

#[test]
fn sizes_as_servers_show_them() {
    for (text, bytes) in [
        ("16MB", Some(16 << 20)),
        ("1GB", Some(1 << 30)),
        ("1024kB", Some(1 << 20)),
        ("1048576", Some(1 << 20)),
        ("", None),
        ("MB", None),
        ("1TB", None),
        ("99999999999999999999MB", None),
        ("18446744073709551615GB", None),
    ] {
        assert_eq!(parse_size(text), bytes, "{text:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_asked_once_and_then_given_up() {
    let (mut stream, mut peer) = stream(1 << 16);
    stream.send_status(Status { flush: Lsn::new(7), ..Status::default() }).await.unwrap();
    let mut status = [0; 39];
    peer.read_exact(&mut status).await.unwrap();
    let begin = Instant::now();
    let watcher = tokio::spawn(async move {
        let mut question = [0; 39];
        peer.read_exact(&mut question).await.unwrap();
        // Same positions as before, and a reply is asked for.
        (question[6..30] == status[6..30], question[38], Instant::now(), peer)
    });
    // Called in slices, as in a loop with a ticker: the clock goes on over all calls.
    let error = loop {
        match tokio::time::timeout(Duration::from_secs(1), stream.next()).await {
            Ok(result) => break result.unwrap_err(),
            Err(_) => assert!(begin.elapsed() < 2 * TIMEOUT),
        }
    };
    assert!(matches!(error, PgError::Timeout { .. }), "{error}");
    let (same, asked, at, _peer) = watcher.await.unwrap();
    assert!(same && asked == 1);
    assert_eq!((at - begin).as_secs(), TIMEOUT.as_secs() / 2);
    assert!(begin.elapsed() >= TIMEOUT + TIMEOUT / 2 && begin.elapsed() < 2 * TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn a_quiet_server_that_answers_is_kept_for_ever() {
    let (mut stream, mut peer) = stream(1 << 16);
    tokio::spawn(async move {
        let mut question = [0; 39];
        while peer.read_exact(&mut question).await.is_ok() {
            tokio::time::sleep(Duration::from_secs(20)).await;
            peer.write_all(&keepalive(false)).await.unwrap();
        }
    });
    for _ in 0..50 {
        assert!(matches!(stream.next().await, Ok(StreamEvent::Keepalive { .. })));
    }
}

#[tokio::test(start_paused = true)]
async fn a_long_pause_of_ours_is_not_the_servers_silence() {
    let (mut stream, mut peer) = stream(1 << 16);
    assert!(tokio::time::timeout(Duration::from_secs(20), stream.next()).await.is_err()); // asked meanwhile
    peer.write_all(&keepalive(false)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(matches!(stream.next().await, Ok(StreamEvent::Keepalive { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_status_gets_through_to_a_server_that_first_wants_to_be_rid_of_its_wal() {
    let (mut stream, mut peer) = stream(16); // "socket buffers" of 16 bytes, both ways
    let data = vec![5; 100_000];
    let sent = wal(0, &data);
    let server = tokio::spawn(async move {
        peer.write_all(&sent).await.unwrap(); // does not read before all is written
        let mut status = [0; 39];
        peer.read_exact(&mut status).await.unwrap();
        peer
    });
    stream.send_status(Status::default()).await.unwrap();
    let _peer = server.await.unwrap();
    match stream.next().await.unwrap() {
        StreamEvent::Wal { data: received, .. } => assert_eq!(received, data),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_status_to_a_server_that_never_reads_ends_in_a_timeout_and_bounded_memory() {
    let (mut stream, mut peer) = stream(16);
    tokio::spawn(async move { while peer.write_all(&wal(0, &[0; 100_000])).await.is_ok() {} });
    let begin = Instant::now();
    let error = stream.send_status(Status::default()).await.unwrap_err();
    assert!(matches!(error, PgError::Timeout { .. }), "{error}");
    assert_eq!(begin.elapsed().as_secs(), TIMEOUT.as_secs());
    assert!(stream.replication.connection.buffered() < 10 << 20);
    assert!(stream.next().await.is_err());
}

#[tokio::test]
async fn a_stop_throws_away_what_is_on_its_way() {
    let (stream, mut peer) = stream(1 << 20);
    let answer = [
        wal(0, b"late"),
        message(b'c', b""),
        message(b'C', b"COPY 0\0"),
        message(b'C', b"START_REPLICATION\0"),
        message(b'Z', b"I"),
    ];
    peer.write_all(&answer.concat()).await.unwrap();
    stream.stop().await.unwrap();
    let mut done = [0; 5];
    peer.read_exact(&mut done).await.unwrap();
    assert_eq!(&done, b"c\0\0\0\x04");
}

#[tokio::test]
async fn ends_of_a_stream() {
    let answers: [(&str, Vec<u8>, Result<StreamEvent, &str>); 7] = [
        ("timeline", end_of_timeline(), Ok(StreamEvent::TimelineEnded(END))),
        ("shutdown", message(b'C', b"COPY 0\0"), Ok(StreamEvent::ServerStopped)),
        (
            "shutdown after CopyDone",
            [message(b'c', b""), message(b'C', b"COPY 0\0")].concat(),
            Ok(StreamEvent::ServerStopped),
        ),
        ("error", message(b'E', b"SERROR\0C58P01\0Mremoved\0\0"), Err("58P01")),
        (
            "error after CopyDone",
            [message(b'c', b""), message(b'E', b"SERROR\0CXX001\0Mbad\0\0"), message(b'Z', b"I")].concat(),
            Err("XX001"),
        ),
        ("nothing", Vec::new(), Err("closed the connection")),
        ("no stream message", message(b'd', b"x"), Err("unexpected answer")),
    ];
    for (name, bytes, want) in answers {
        let (mut stream, mut peer) = stream(1 << 20);
        peer.write_all(&bytes).await.unwrap();
        drop(peer);
        match (stream.next().await, want) {
            (Ok(event), want) => assert_eq!(Ok(event), want, "{name}"),
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{name}: {error}"),
            (Err(error), Ok(_)) => panic!("{name}: {error}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// `next` and `send_status`, dropped at any moment, lose no event and give none twice.
    #[test]
    fn next_and_send_status_are_cancel_safe(lengths in proptest::collection::vec(0usize..400, 0..30), buffer in 8usize..200) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let (mut stream, peer) = stream(buffer);
            let mut bytes = Vec::new();
            let mut at = 0;
            for length in &lengths {
                bytes.extend(wal(at, &vec![1; *length]));
                at += *length as u64;
            }
            bytes.extend(end_of_timeline());
            let (mut incoming, mut outgoing) = tokio::io::split(peer);
            let reader = tokio::spawn(async move {
                let mut all = Vec::new();
                incoming.read_to_end(&mut all).await.unwrap();
                all
            });
            let writer = tokio::spawn(async move {
                for piece in bytes.chunks(7) {
                    outgoing.write_all(piece).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                outgoing
            });
            let (mut seen, mut sent) = (Vec::new(), 0);
            loop {
                sent += 1;
                let status = Status { flush: Lsn::new(sent), ..Status::default() };
                let _ = tokio::time::timeout(Duration::ZERO, stream.send_status(status)).await;
                match tokio::time::timeout(Duration::from_millis(2), stream.next()).await {
                    Err(_) => {}
                    Ok(Ok(StreamEvent::Wal { start, data, .. })) => seen.push((start.get(), data.len())),
                    Ok(Ok(StreamEvent::TimelineEnded(end))) => break assert_eq!(end, END),
                    Ok(other) => panic!("{other:?}"),
                }
            }
            let mut at = 0;
            let want: Vec<_> = lengths.iter().map(|length| { at += *length as u64; (at - *length as u64, *length) }).collect();
            assert_eq!(seen, want);
            // Whole messages arrived, each once and in order, and CopyDone after them.
            stream.replication.connection.flush(TIMEOUT).await.unwrap();
            let _outgoing = writer.await.unwrap();
            drop(stream);
            let mut all = &reader.await.unwrap()[..];
            let mut last = 0;
            while let [b'd', rest @ ..] = all {
                let flush = u64::from_be_bytes(rest[13..21].try_into().unwrap());
                assert!(flush > last);
                last = flush;
                all = &rest[38..];
            }
            assert_eq!(all, b"c\0\0\0\x04");
        });
    }
}
