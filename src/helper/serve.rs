use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::protocol::{BEAT, MAX_LINE, NOT_FOR_ME, read_request};
use super::start::lock;
use super::{Answer, Call, FileIdentity, Fingerprint, NotStarted, Place};

/// PostgreSQL runs one archive_command and one restore_command at a time.
const CONNECTIONS: usize = 16;
/// A hook says its line at once.
const LINE: Duration = Duration::from_secs(5);
/// How often a helper that works says so.
const BEATS: Duration = Duration::from_secs(1);
/// An answer is small; a hook that does not take it is gone.
const WRITE: Duration = Duration::from_secs(5);

/// What a helper does with a request.
#[async_trait]
pub trait Serve: Send + Sync + 'static {
    /// The answer; `None`: the hook shall do it itself. May be dropped at any await: the hook went away.
    async fn answer(&self, request: &str) -> Option<Answer>;

    /// Is there a reason of its own to leave, once nobody waits? A later process may do better, or nothing is left to do.
    fn wants_to_leave(&self) -> bool {
        false
    }
}

/// When a helper leaves.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// After so long without a request.
    pub idle: Duration,
    /// At this age, when idle for a moment: keys and credentials are read anew by the next one.
    pub age: Duration,
    /// How often it looks around.
    pub look: Duration,
    /// What is being answered may take so long when it leaves.
    pub finish: Duration,
}

impl Rules {
    /// With what is usual for the rest.
    pub fn of(idle: Duration) -> Rules {
        let (age, look) = (Duration::from_secs(3600), Duration::from_secs(1));
        Rules { idle, age, look, finish: Duration::from_secs(30) }
    }
}

/// Why a helper left. Each is an end in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Nobody asked for long enough.
    Idle,
    /// It is old enough.
    Old,
    /// The server has stopped.
    NoServer,
    /// The data directory, the binary, the configuration or the socket is not what it was.
    Changed,
    /// It wanted to: [`Serve::wants_to_leave`].
    Done,
    /// A request was answered by a panic. What it left behind is not trusted.
    Panicked,
}

/// Why a helper cannot work.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// There is one, or its place cannot be had.
    #[error(transparent)]
    NotStarted(#[from] NotStarted),
    /// The socket, or something it has to look at.
    #[error("{what}: {source}")]
    System {
        /// What it was about.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl HelperError {
    /// The hooks start another one anyway.
    pub fn is_retryable(&self) -> bool {
        true
    }
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> HelperError {
    move |source| HelperError::System { what, source }
}

/// Answers requests of this call at `place` until there is a reason to leave. `fingerprint` was taken before the service read
/// anything. The process is ours alone: it is made the first to go when memory runs out.
pub async fn serve(
    place: &Place,
    call: &Call,
    fingerprint: Fingerprint,
    rules: Rules,
    service: Arc<dyn Serve>,
) -> Result<Left, HelperError> {
    if !place.make_folder().map_err(system("the helpers' folder"))? {
        return Err(NotStarted::NotOurs.into());
    }
    let mut lock = lock(place)?;
    lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(system("the lock file"))?;
    // Not there on other systems; where it is, raising it is always allowed.
    let _ = fs::write("/proc/self/oom_score_adj", "500");
    let socket = place.socket();
    match fs::remove_file(&socket) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(system("the socket that was left behind")(error)),
    }
    let listener = UnixListener::bind(&socket).map_err(system("listen"))?;
    let watched = Watched::new(place, &call.configuration).map_err(system("look around"))?;
    let left = match call.fingerprint(place) {
        Ok(now) if now == fingerprint => listen(&listener, fingerprint, &watched, rules, &service).await,
        _ => Left::Changed,
    };
    // Who comes from now on finds nobody, and starts another one when this process has ended.
    if watched.has_socket() {
        let _ = fs::remove_file(&socket); // it refuses anyway
    }
    drop(listener);
    drop(lock);
    Ok(left)
}

async fn listen(
    listener: &UnixListener,
    fingerprint: Fingerprint,
    watched: &Watched,
    rules: Rules,
    service: &Arc<dyn Serve>,
) -> Left {
    let fingerprint: Arc<str> = fingerprint.to_string().into();
    let (began, mut last) = (Instant::now(), Instant::now());
    let mut look = interval(rules.look);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut conversations = JoinSet::new();
    let left = loop {
        tokio::select! {
            accepted = listener.accept(), if conversations.len() < CONNECTIONS => {
                // A hook that went away before it was heard; or out of files, which passes.
                let Ok((stream, _)) = accepted else { continue };
                conversations.spawn(converse(stream, Arc::clone(&fingerprint), Arc::clone(service)));
            }
            Some(ended) = conversations.join_next() => match ended {
                Ok(_) if conversations.is_empty() && service.wants_to_leave() => break Left::Done,
                Ok(Ok(Told::Answered)) => last = Instant::now(),
                // Perhaps it is us who are not what is wanted any more.
                Ok(_) if !watched.is_unchanged() => break Left::Changed,
                Ok(_) => {}
                Err(_) => break Left::Panicked,
            },
            _ = look.tick() => {
                if !watched.is_unchanged() {
                    break Left::Changed;
                }
                if conversations.is_empty() {
                    if service.wants_to_leave() {
                        break Left::Done;
                    }
                    if !watched.place.has_server() {
                        break Left::NoServer;
                    }
                    if last.elapsed() >= rules.idle {
                        break Left::Idle;
                    }
                    if began.elapsed() >= rules.age {
                        break Left::Old;
                    }
                }
            }
        }
    };
    let finish = async { while conversations.join_next().await.is_some() {} };
    let _ = timeout(rules.finish, finish).await; // who is cut off does it itself
    left
}

enum Told {
    Answered,
    NotForMe,
}

/// One hook.
async fn converse(stream: UnixStream, fingerprint: Arc<str>, service: Arc<dyn Serve>) -> io::Result<Told> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader.take(MAX_LINE as u64));
    let mut line = String::new();
    timeout(LINE, reader.read_line(&mut line)).await??;
    let request = line.strip_suffix('\n').and_then(read_request);
    let Some((_, request)) = request.filter(|(theirs, _)| **theirs == *fingerprint) else {
        timeout(WRITE, writer.write_all(NOT_FOR_ME)).await??;
        return Ok(Told::NotForMe);
    };
    let mut answer = service.answer(request);
    let mut beats = interval(BEATS);
    beats.tick().await; // the first is now
    let answer = loop {
        tokio::select! {
            biased;
            answer = &mut answer => break answer,
            // A hook that is gone ends the work that was for it.
            _ = beats.tick() => timeout(WRITE, writer.write_all(BEAT)).await??,
        }
    };
    let Some(answer) = answer else {
        timeout(WRITE, writer.write_all(NOT_FOR_ME)).await??;
        return Ok(Told::NotForMe);
    };
    timeout(WRITE, writer.write_all(&answer.to_bytes())).await??;
    Ok(Told::Answered)
}

/// What must stay as it is.
struct Watched {
    place: Place,
    /// The data directory's own path: what we run in follows it when it is renamed.
    data: PathBuf,
    directory: (u64, u64),
    socket: FileIdentity,
    files: Vec<(PathBuf, FileIdentity)>,
}

impl Watched {
    fn new(place: &Place, configuration: &Path) -> io::Result<Watched> {
        let data = fs::canonicalize(place.data())?;
        let directory = inode(&data)?;
        let program = std::env::current_exe()?;
        let files = [program, configuration.to_owned()].into_iter();
        let files = files.map(|path| FileIdentity::of(&path).map(|identity| (path, identity)));
        Ok(Watched {
            place: place.clone(),
            data,
            directory,
            socket: FileIdentity::of(&place.socket())?,
            files: files.collect::<io::Result<_>>()?,
        })
    }

    fn has_socket(&self) -> bool {
        FileIdentity::of(&self.place.socket()).is_ok_and(|now| now == self.socket)
    }

    fn is_unchanged(&self) -> bool {
        self.has_socket()
            && inode(&self.data).is_ok_and(|now| now == self.directory)
            && self.files.iter().all(|(path, then)| FileIdentity::of(path).is_ok_and(|now| now == *then))
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}
