//! Runs a program to its end, or until it is to stop.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::DrillError;

/// Between two looks.
const POLL: Duration = Duration::from_millis(20);
/// What is kept of an output.
const KEPT: u64 = 64 << 10;

/// How a program ended.
#[derive(Debug, Clone)]
pub(super) struct Ran {
    pub success: bool,
    /// The beginning of standard output, without white space at its ends.
    pub out: String,
    /// Of standard error.
    pub err: String,
}

impl Ran {
    /// What it said, in short.
    pub fn said(&self) -> String {
        let said = if self.err.is_empty() { &self.out } else { &self.err };
        let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).take(5).collect();
        if lines.is_empty() { "it said nothing".to_owned() } else { lines.join("; ") }
    }
}

/// Runs it. Output goes through files: a pipe that nobody reads blocks.
pub(super) fn run(mut command: Command, deadline: Duration, stop: &CancellationToken) -> Result<Ran, DrillError> {
    let program = command.get_program().to_owned();
    let io = |source| DrillError::io("run", Path::new(&program), source);
    let (mut out, mut err) = (tempfile::tempfile().map_err(io)?, tempfile::tempfile().map_err(io)?);
    command.stdin(Stdio::null()).stdout(out.try_clone().map_err(io)?).stderr(err.try_clone().map_err(io)?);
    let mut child = command.spawn().map_err(io)?;
    let since = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().map_err(io)? {
            break status;
        }
        if stop.is_cancelled() || since.elapsed() > deadline {
            child.kill().and_then(|()| child.wait()).map_err(io)?;
            if stop.is_cancelled() {
                return Err(DrillError::Stopped);
            }
            let err = format!("it took longer than {} s", deadline.as_secs());
            return Ok(Ran { success: false, out: String::new(), err });
        }
        std::thread::sleep(POLL);
    };
    Ok(Ran { success: status.success(), out: kept(&mut out).map_err(io)?, err: kept(&mut err).map_err(io)? })
}

fn kept(file: &mut File) -> std::io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(KEPT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_ends_by_itself_or_is_ended() {
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let stop = CancellationToken::new();
        let ran = run(shell("echo yes; echo no >&2"), Duration::from_secs(20), &stop).unwrap();
        assert_eq!((ran.success, ran.out.as_str(), ran.err.as_str()), (true, "yes", "no"));
        let ran = run(shell("exec sleep 60"), Duration::from_millis(50), &stop).unwrap();
        assert!(!ran.success && ran.said().contains("longer"), "{ran:?}");
        stop.cancel();
        let stopped = run(shell("exec sleep 60"), Duration::from_secs(60), &stop);
        assert!(matches!(stopped, Err(DrillError::Stopped)), "{stopped:?}");
    }
}
