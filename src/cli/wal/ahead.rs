//! `wal fetch` with a helper: the hook's short way, and the helper itself.
//!
//! What always holds: the hook believes a helper two things, "this file is it", which it then renames itself, and "not
//! there", which the helper says by the same rules as the whole command. Whatever else comes, or does not come, the hook does
//! the whole work without it, and nothing of what went wrong with a helper becomes an exit code. The hook renames, not the
//! helper: one that wakes up late can then change nothing under a server that went on.
//!
//! Crash of the helper: the hook does the work, and starts another one. Its spool stays until then.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use clap::Parser;
use tokio::sync::OnceCell;

use super::Role;
use super::fetch::{self, Configured};
use super::quick::{FETCH, Plain};
use crate::cli::{Cli, CliError, Command, Context, logging};
use crate::config::RepositoryConfig;
use crate::helper::{self, Answer, Call, Patience, Place, Rules, Serve};
use crate::restore::fetch::ahead::Bounds;
use crate::restore::fetch::prefetch::Prefetch;
use crate::restore::fetch::spool::{Spool, Staged};
use crate::restore::fetch::{FetchError, Local, Way, local};
use crate::types::ClusterName;

const KIND: &str = "fetch";
/// What a helper answers.
const SERVED: u8 = 0;
const NOT_THERE: u8 = 1;
/// A helper that nobody asks any more leaves, and its spool with it. Longer than a segment takes to replay.
const IDLE: Duration = Duration::from_secs(60);
/// How often it looks whether recovery goes on.
const LOOK: Duration = Duration::from_millis(500);
/// Files that were named to a hook and may not be renamed yet.
const HANDED_OUT: usize = 2;

/// A call of the hook for which a helper may work: as `restore` writes it.
struct Request {
    plain: Plain,
    name: String,
    dest: PathBuf,
}

impl Request {
    /// `None`: anything out of the ordinary, which the whole command understands.
    fn read(args: &[OsString]) -> Option<Request> {
        let plain = Plain::read(args, "fetch", &FETCH)?;
        let [name, dest] = plain.words.as_slice() else { return None };
        let (name, dest) = (name.to_str()?.to_owned(), PathBuf::from(dest));
        let is_ordinary = plain.named.is_empty() && dest.parent() == Some(Path::new("pg_wal"));
        is_ordinary.then_some(Request { plain, name, dest })
    }

    fn place() -> Place {
        Place::new("", KIND)
    }

    /// The command line of the helper that begins behind this file, or of who waits for it.
    fn command<'a>(&'a self, role: &'a str) -> Vec<&'a OsStr> {
        let rest = [OsStr::new("--helper"), OsStr::new(role), OsStr::new(&self.name), self.dest.as_os_str()];
        self.plain.command("fetch", &rest)
    }

    /// The short way: no runtime, no configuration, no key. `None`: the whole command has to answer.
    fn ask(&self) -> Option<u8> {
        if !is_in_recovery() {
            return None; // a person tries it by hand
        }
        let place = Self::place();
        let fingerprint = self.plain.call()?.fingerprint(&place).ok()?;
        let answer = helper::ask(&place, &fingerprint, &self.name, Patience::of(fetch::DEADLINE)).ok()?;
        match answer.code {
            SERVED => fs::rename(staged_at(&place, &answer.text)?, &self.dest).ok().map(|()| SERVED),
            NOT_THERE => Some(NOT_THERE),
            _ => None,
        }
    }
}

/// What the helper calls a staged file: spool and file, below its folder. Not a path: its own may be another one than the hook's.
fn name_of(staged: &Path) -> Option<String> {
    let (spool, file) = (staged.parent()?.file_name()?, staged.file_name()?);
    Some(format!("{}/{}", spool.to_str()?, file.to_str()?))
}

/// Where the file is that the helper calls so; `None`: it is no name of a file in a spool.
fn staged_at(place: &Place, name: &str) -> Option<PathBuf> {
    let (spool, file) = name.split_once('/')?;
    let is_plain = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains('/');
    (is_plain(spool) && is_plain(file)).then(|| place.folder().join(spool).join(file))
}

/// PostgreSQL runs the hook in the data directory.
fn is_in_recovery() -> bool {
    ["recovery.signal", "standby.signal"].into_iter().any(|signal| Path::new(signal).exists())
}

/// The exit code, where it can be had without the whole command. Also runs the processes that only [`after`] starts.
pub fn quick(args: &[OsString]) -> Option<u8> {
    let answer = || {
        let request = Request::read(args)?;
        match request.plain.role {
            None => request.ask(),
            Some(Role::Keep) => Some(u8::from(helper::keep(&request.command("serve")).is_err())),
            Some(Role::Serve) => Some(u8::from(!help(args, &request))),
        }
    };
    catch_unwind(AssertUnwindSafe(answer)).ok().flatten() // a panic is an answer of the whole command
}

/// After the whole command: where it served a segment, a helper opens what follows it for the next calls.
pub fn after(args: &[OsString], code: u8) {
    let begin = AssertUnwindSafe(|| {
        let Some(request) = Request::read(args) else { return };
        if code != SERVED || request.plain.role.is_some() || request.name.len() != 24 || !is_in_recovery() {
            return;
        }
        // Without one the next call takes longer.
        if let Err(error) = helper::start(&Request::place(), &request.command("keep")) {
            tracing::debug!(%error, "no helper");
        }
    });
    let _ = catch_unwind(begin);
}

// ---- the helper

/// The helper's whole life.
fn help(args: &[OsString], request: &Request) -> bool {
    let Some(call) = request.plain.call() else { return false };
    let Ok(Cli { global, command }) = Cli::try_parse_from(args) else { return false };
    let context = Context::new(global);
    logging::start(&context, &command);
    let Command::Wal(super::Wal { hook: super::Command::Fetch(args) }) = command else { return false };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let Ok(runtime) = runtime else { return false };
    let result = runtime.block_on(work(&context, args, call));
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let Err(error) = &result {
        tracing::warn!("the helper of wal fetch ends: {error}");
    }
    result.is_ok()
}

async fn work(context: &Context, args: fetch::Args, call: Call) -> Result<(), CliError> {
    let place = Request::place();
    // Before the configuration is read: what is read then is at least as new as what the hooks are compared with.
    let Ok(fingerprint) = call.fingerprint(&place) else { return Ok(()) };
    let config = context.config()?;
    let (configs, cluster) = fetch::asked(&config, context, &args)?;
    let Some(local) = local(Path::new("")).map_err(fetch::fetch_error)? else { return Ok(()) };
    let places = Arc::new(Remembering { configs: configs.into_iter().cloned().collect() });
    let way = fetch::way(&args);
    let fetcher = Arc::new(Fetcher {
        place: place.clone(),
        make: Make { places, cluster, local, way },
        prefetch: OnceCell::new(),
        handed_out: Mutex::default(),
    });
    let serving = helper::serve(&place, &call, fingerprint, Rules::of(IDLE), Arc::clone(&fetcher) as Arc<dyn Serve>);
    tokio::select! {
        left = serving => left.map(drop).map_err(CliError::failed),
        () = fetcher.begin(&args.name) => {
            // Recovery has ended: nobody will ask any more.
            let _ = fs::remove_file(place.socket());
            Ok(())
        }
    }
}

/// The repositories of the configuration. [`Prefetch`] keeps those that it has opened.
struct Remembering {
    configs: Vec<RepositoryConfig>,
}

#[async_trait]
impl crate::restore::fetch::Places for Remembering {
    fn names(&self) -> Vec<String> {
        self.configs.iter().map(|config| config.name.clone()).collect()
    }

    async fn open(&self, index: usize) -> Result<crate::catalog::Repository, FetchError> {
        Configured { configs: self.configs.iter().collect() }.open(index).await
    }
}

struct Make {
    places: Arc<Remembering>,
    cluster: Option<ClusterName>,
    local: Local,
    way: Way,
}

struct Fetcher {
    place: Place,
    make: Make,
    /// Made when the place is ours alone.
    prefetch: OnceCell<Prefetch>,
    handed_out: Mutex<Vec<Staged>>,
}

impl Fetcher {
    /// Only the helper that holds the lock may make a spool: it removes those that were left.
    async fn prefetch(&self) -> Result<&Prefetch, FetchError> {
        let make = async || {
            let Make { places, cluster, local, way } = &self.make;
            let spool = Spool::create(&self.place.folder())?;
            Ok(Prefetch::new(Arc::clone(places) as _, cluster.clone(), *local, way.clone(), spool, Bounds::USUAL))
        };
        self.prefetch.get_or_try_init(make).await
    }

    fn holds_the_lock(&self) -> bool {
        let holder = fs::read_to_string(self.place.lock()).unwrap_or_default();
        holder.trim() == std::process::id().to_string()
    }

    /// Opens what follows the segment that the hook was served, and returns when recovery has ended.
    async fn begin(&self, name: &str) {
        let mut began = false;
        while is_in_recovery() {
            if !began && self.holds_the_lock() {
                began = true;
                match self.prefetch().await {
                    Ok(prefetch) => prefetch.begin_behind(name),
                    Err(error) => tracing::warn!("nothing is opened ahead: {error}"),
                }
            }
            tokio::time::sleep(if began { LOOK } else { Duration::from_millis(2) }).await;
        }
    }

    /// The name of a file that the hook will rename. Removed if it does not, when others have followed.
    fn hand_out(&self, staged: Staged) -> Option<String> {
        let name = name_of(staged.path())?;
        let mut handed_out = self.handed_out.lock().unwrap_or_else(PoisonError::into_inner); // one push
        if handed_out.len() >= HANDED_OUT {
            handed_out.remove(0);
        }
        handed_out.push(staged);
        Some(name)
    }
}

#[async_trait]
impl Serve for Fetcher {
    async fn answer(&self, request: &str) -> Option<Answer> {
        let answer = async { self.prefetch().await?.answer(request).await }.await;
        match answer {
            Ok(Some(staged)) => {
                let text = self.hand_out(staged)?;
                Some(Answer { code: SERVED, text })
            }
            Ok(None) => Some(Answer { code: NOT_THERE, text: String::new() }),
            Err(error) => {
                tracing::warn!("left to the hook: {error}");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn a_staged_file_is_found_by_its_name_and_nothing_else_is() {
        let data = tempfile::tempdir().unwrap();
        let place = Place::new(data.path(), KIND);
        fs::create_dir_all(place.folder()).unwrap();
        let spool = Spool::create(&place.folder()).unwrap();
        let staged = spool.stage("000000010000000000000001", b"wal").unwrap();
        let found = staged_at(&place, &name_of(staged.path()).unwrap()).unwrap();
        assert_eq!(fs::read(found).unwrap(), b"wal");
        for odd in ["", "/", "a", "a/", "/a", "../a", "a/..", "a/b/c", "./a", "/etc/passwd"] {
            assert_eq!(staged_at(&place, odd), None, "{odd}");
        }
    }

    #[test]
    fn only_what_restore_writes_takes_the_short_way() {
        let of = |line: &str| Request::read(&words(line)).map(|request| (request.plain.options.len(), request.name));
        let name = "000000010000000000000001";
        let dest = "pg_wal/RECOVERYXLOG";
        assert_eq!(of(&format!("pgkeep --config c wal fetch {name} {dest}")), Some((2, name.to_owned())));
        let way = "--config c --cluster m wal fetch --from a,b --path 00000001@0/5,00000002 --until 0/7 --standby";
        assert_eq!(of(&format!("pgkeep {way} {name} {dest}")), Some((11, name.to_owned())));
        for odd in [
            format!("pgkeep --config c wal fetch --no-helper {name} {dest}"),
            format!("pgkeep --config c wal push {name} {dest}"),
            format!("pgkeep --config c wal fetch {name} /tmp/x"),
            format!("pgkeep --config c wal fetch {name} ../pg_wal/x"),
            format!("pgkeep --config c --json wal fetch {name} {dest}"),
            format!("pgkeep --config c wal fetch --until {name} {dest}"),
            format!("pgkeep --config c wal fetch {name}"),
            "pgkeep".to_owned(),
            String::new(),
        ] {
            assert_eq!(of(&odd), None, "{odd}");
        }
    }

    /// What a helper is started with is what the call that starts it had: otherwise it would never be for that call.
    #[test]
    fn a_helper_has_its_callers_options() {
        let call =
            Request::read(&words("pgkeep --config=c wal fetch --from a 000000010000000000000001 pg_wal/x")).unwrap();
        for (word, role) in [("keep", Role::Keep), ("serve", Role::Serve)] {
            let args: Vec<OsString> =
                [OsStr::new("pgkeep")].into_iter().chain(call.command(word)).map(OsString::from).collect();
            let started = Request::read(&args).unwrap();
            assert_eq!((&started.plain.options, &started.name), (&call.plain.options, &call.name));
            assert_eq!(started.plain.role, Some(role));
            assert!(Cli::try_parse_from(&args).is_ok());
        }
    }
}
