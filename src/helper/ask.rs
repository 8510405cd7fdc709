use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::protocol::{Heard, MAX_TEXT, read_answer, write_request};
use super::{Answer, FileIdentity, Fingerprint, Place};

/// How long a hook waits.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For any sign of life: a helper that works says so once a second.
    pub silence: Duration,
    /// For the answer.
    pub answer: Duration,
}

impl Patience {
    /// With the usual silence.
    pub fn of(answer: Duration) -> Patience {
        Patience { silence: Duration::from_secs(5), answer }
    }
}

/// Why there is no answer. The hook does the work without one.
#[derive(Debug, thiserror::Error)]
pub enum NoAnswer {
    /// Nobody listens: another helper may be started.
    #[error("no helper is there")]
    NoHelper,
    /// The folder is not ours alone.
    #[error("the helper's folder is not private")]
    NotPrivate,
    /// The request is none that can be said in a line.
    #[error("the request does not fit into a line")]
    Request,
    /// Another binary, configuration, user, environment or data directory; or it is leaving.
    #[error("the helper is not for this call")]
    NotForMe,
    /// It gave no sign of life, or no answer, for so long. It is not asked again: its socket was removed.
    #[error("the helper was silent")]
    Silent,
    /// It ended, or what it said is no answer.
    #[error("the helper broke off")]
    BrokeOff,
}

/// Asks the helper at `place`. What it holds ready is answered in well under a millisecond.
pub fn ask(place: &Place, fingerprint: &Fingerprint, request: &str, patience: Patience) -> Result<Answer, NoAnswer> {
    match place.is_private() {
        Ok(true) => {}
        Ok(false) => return Err(NoAnswer::NotPrivate),
        Err(_) => return Err(NoAnswer::NoHelper),
    }
    let line = write_request(&fingerprint.to_string(), request).ok_or(NoAnswer::Request)?;
    let socket = place.socket();
    let identity = FileIdentity::of(&socket).map_err(|_| NoAnswer::NoHelper)?;
    let mut stream = UnixStream::connect(&socket).map_err(|_| NoAnswer::NoHelper)?;
    let until = Instant::now() + patience.answer;
    match converse(&mut stream, line.as_bytes(), patience.silence, until) {
        Ok(Heard::Answer(answer)) => Ok(answer),
        Ok(Heard::NotForMe) => Err(NoAnswer::NotForMe),
        Ok(Heard::Part | Heard::Nonsense) => Err(NoAnswer::BrokeOff),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            // So that the next calls do not wait for it in their turn. One that wakes up sees that it is gone, and leaves.
            if FileIdentity::of(&socket).is_ok_and(|now| now == identity) {
                let _ = fs::remove_file(&socket); // then they wait
            }
            Err(NoAnswer::Silent)
        }
        Err(_) => Err(NoAnswer::BrokeOff),
    }
}

/// Says the line and hears the answer to its end.
fn converse(stream: &mut UnixStream, line: &[u8], silence: Duration, until: Instant) -> io::Result<Heard> {
    stream.set_write_timeout(Some(silence))?;
    stream.write_all(line)?;
    let mut said = Vec::with_capacity(256);
    let mut buffer = [0; 4096];
    loop {
        let left = until.saturating_duration_since(Instant::now()).min(silence);
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let len = match stream.read(&mut buffer) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        said.extend_from_slice(buffer.get(..len).unwrap_or_default());
        match read_answer(&said) {
            // Beats say nothing but that it lives.
            Heard::Part if len > 0 && said.iter().all(|byte| *byte == b'.') => said.clear(),
            Heard::Part if len > 0 && said.len() <= 2 * MAX_TEXT => {}
            heard => return Ok(heard),
        }
    }
}
