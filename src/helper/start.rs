use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use super::Place;

/// A helper that ended is not followed by the next one sooner.
const PAUSE: Duration = Duration::from_secs(1);

/// Why no helper was started.
#[derive(Debug, thiserror::Error)]
pub enum NotStarted {
    /// There is one.
    #[error("a helper runs already")]
    Running,
    /// The last one was started a moment ago.
    #[error("a helper was started a moment ago")]
    TooSoon,
    /// The data directory is another user's, or the helpers' folder is not private.
    #[error("the data directory, or the helpers' folder in its pg_wal, is not ours alone")]
    NotOurs,
    /// A helper lives with a server.
    #[error("no server runs in the data directory")]
    NoServer,
    /// The system would not.
    #[error("could not start a helper: {0}")]
    System(#[from] io::Error),
}

/// Starts the program anew with `arguments`, as a keeper that is to call [`keep`], unless a helper is there. Returns at once:
/// the helper will listen soon. Nothing of this process is handed on but its environment: no file that is open here, no
/// terminal, no process group.
pub fn start<S: AsRef<OsStr>>(place: &Place, arguments: &[S]) -> Result<(), NotStarted> {
    if !place.has_server() {
        return Err(NotStarted::NoServer);
    }
    if !place.make_folder()? {
        return Err(NotStarted::NotOurs);
    }
    match fs::metadata(place.lock()).and_then(|lock| lock.modified()) {
        Ok(last) if SystemTime::now().duration_since(last).is_ok_and(|age| age < PAUSE) => {
            return Err(NotStarted::TooSoon);
        }
        _ => {}
    }
    lock(place)?; // and released: the helper takes it itself
    let log = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(place.log())?;
    close_on_exec();
    let mut keeper = Command::new(std::env::current_exe()?);
    keeper.args(arguments).current_dir(place.data());
    keeper.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?;
    Ok(())
}

/// The keeper's whole life: in a session of its own, it runs the helper (`arguments`) and waits until it has ended, however
/// that was.
pub fn keep<S: AsRef<OsStr>>(arguments: &[S]) -> io::Result<()> {
    // Fails where we lead a group already, started by hand: then nobody's signals are ours to escape.
    let _ = rustix::process::setsid();
    Command::new(std::env::current_exe()?).args(arguments).status().map(drop)
}

/// What the server left open in us is not for whoever we start: it would hold the server's pipes and ports.
pub fn close_on_exec() {
    close_fds::set_fds_cloexec_threadsafe(3, &[]);
}

/// Takes the lock of a kind of helper; it is held as long as the file is open.
pub(super) fn lock(place: &Place) -> Result<File, NotStarted> {
    let file = OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(place.lock())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(NotStarted::Running),
        Err(fs::TryLockError::Error(error)) => Err(error.into()),
    }
}
