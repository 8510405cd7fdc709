use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::*;

const PATIENCE: Patience = Patience { silence: Duration::from_secs(10), answer: Duration::from_secs(20) };
/// Looks around often, and stays.
const RULES: Rules = Rules {
    idle: Duration::from_secs(3600),
    age: Duration::from_secs(3600),
    look: Duration::from_millis(10),
    finish: Duration::from_secs(10),
};

/// A data directory with a server in it, as far as a helper can see, and a configuration.
struct Rig {
    dir: TempDir,
    place: Place,
    call: Call,
    asked: Arc<AtomicU32>,
}

/// Answers with what was asked; `slow` hangs, `panic` does, `whole` is not for it, after `leave` it wants to.
struct Echo(Arc<AtomicU32>, AtomicBool);

#[async_trait]
impl Serve for Echo {
    async fn answer(&self, request: &str) -> Option<Answer> {
        self.0.fetch_add(1, Ordering::SeqCst);
        match request {
            "slow" => std::future::pending().await,
            "panic" => panic!("as it was told to"),
            "whole" => None,
            "leave" => {
                self.1.store(true, Ordering::SeqCst);
                Some(Answer { code: 0, text: String::new() })
            }
            _ => Some(Answer { code: 7, text: request.to_owned() }),
        }
    }

    fn wants_to_leave(&self) -> bool {
        self.1.load(Ordering::SeqCst)
    }
}

impl Rig {
    fn new() -> Rig {
        let dir = tempfile::Builder::new().prefix("pgh").tempdir_in("/tmp").unwrap();
        let data = dir.path().join("data");
        fs::create_dir_all(data.join("pg_wal")).unwrap();
        fs::write(data.join("postmaster.pid"), "1\n").unwrap();
        let configuration = dir.path().join("pgkeep.toml");
        fs::write(&configuration, "").unwrap();
        let call = Call { configuration, options: vec!["-q".into()] };
        Rig { place: Place::new(data, "echo"), dir, call, asked: Arc::default() }
    }

    fn helper(&self, rules: Rules) -> JoinHandle<Result<Left, HelperError>> {
        let (place, call, asked) = (self.place.clone(), self.call.clone(), Arc::clone(&self.asked));
        let fingerprint = call.fingerprint(&place).unwrap();
        tokio::spawn(async move {
            serve(&place, &call, fingerprint, rules, Arc::new(Echo(asked, AtomicBool::new(false)))).await
        })
    }

    async fn ask(&self, request: &str) -> Result<Answer, NoAnswer> {
        self.ask_with(request, PATIENCE).await
    }

    async fn ask_with(&self, request: &str, patience: Patience) -> Result<Answer, NoAnswer> {
        let (place, call, request) = (self.place.clone(), self.call.clone(), request.to_owned());
        let asking =
            move || call.fingerprint(&place).map(|fingerprint| ask(&place, &fingerprint, &request, patience)).unwrap();
        tokio::task::spawn_blocking(asking).await.unwrap()
    }

    async fn listens(&self) {
        until("a socket", || self.place.socket().exists()).await;
    }
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is() {
        assert!(Instant::now() < end, "waited for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn left(helper: JoinHandle<Result<Left, HelperError>>) -> Left {
    tokio::time::timeout(Duration::from_secs(20), helper).await.expect("it did not leave").unwrap().unwrap()
}

#[tokio::test]
async fn what_is_asked_is_answered_and_one_helper_is_enough() {
    let rig = Rig::new();
    assert!(matches!(rig.ask("x").await, Err(NoAnswer::NoHelper)));
    let helper = rig.helper(RULES);
    rig.listens().await;
    for request in ["pg_wal/000000010000000000000001", "two words", ""] {
        assert_eq!(rig.ask(request).await.unwrap(), Answer { code: 7, text: request.to_owned() });
    }
    let long = "x".repeat(MAX_REQUEST);
    assert_eq!(rig.ask(&long).await.unwrap().text, long);
    assert!(matches!(rig.ask("a\nb").await, Err(NoAnswer::Request)));
    assert!(matches!(rig.ask("whole").await, Err(NoAnswer::NotForMe)));
    let second = rig.helper(RULES).await.unwrap();
    assert!(matches!(second, Err(HelperError::NotStarted(NotStarted::Running))), "{second:?}");
    assert_eq!(rig.ask("still there").await.unwrap().code, 7);
    assert_eq!(fs::read_to_string(rig.place.lock()).unwrap().trim(), std::process::id().to_string());
    assert!(!helper.is_finished());
}

#[tokio::test]
async fn another_call_is_not_answered_and_a_changed_configuration_ends_it() {
    let mut rig = Rig::new();
    let helper = rig.helper(RULES);
    rig.listens().await;
    rig.call.options.push("-v".into());
    assert!(matches!(rig.ask("x").await, Err(NoAnswer::NotForMe)));
    rig.call.options.pop();
    let other = rig.dir.path().join("other.toml");
    fs::write(&other, "").unwrap();
    let own = std::mem::replace(&mut rig.call.configuration, other);
    assert!(matches!(rig.ask("x").await, Err(NoAnswer::NotForMe)));
    rig.call.configuration = own;
    assert_eq!(rig.ask("x").await.unwrap().text, "x");
    assert_eq!(rig.asked.load(Ordering::SeqCst), 1, "what is not for it is not looked at");
    // What nobody may read is changed, too.
    fs::set_permissions(&rig.call.configuration, fs::Permissions::from_mode(0o0)).unwrap();
    assert!(rig.ask("x").await.is_err());
    assert_eq!(left(helper).await, Left::Changed);
}

/// Nothing keeps a helper where it is of no use.
#[tokio::test]
async fn it_leaves_when_its_world_does() {
    type Change = fn(&Rig);
    let cases: [(&str, Left, Change); 5] = [
        ("the data directory is removed", Left::Changed, |rig| fs::remove_dir_all(rig.place.data()).unwrap()),
        ("it is moved away", Left::Changed, |rig| fs::rename(rig.place.data(), rig.dir.path().join("old")).unwrap()),
        ("its socket is removed", Left::Changed, |rig| fs::remove_file(rig.place.socket()).unwrap()),
        ("its socket is replaced", Left::Changed, |rig| {
            fs::remove_file(rig.place.socket()).unwrap();
            drop(StdListener::bind(rig.place.socket()).unwrap());
        }),
        ("the server has stopped", Left::NoServer, |rig| {
            fs::remove_file(rig.place.data().join("postmaster.pid")).unwrap()
        }),
    ];
    for (what, want, change) in cases {
        let rig = Rig::new();
        let helper = rig.helper(RULES);
        rig.listens().await;
        rig.ask("x").await.unwrap();
        change(&rig);
        assert_eq!(left(helper).await, want, "{what}");
    }
    let rig = Rig::new();
    assert_eq!(left(rig.helper(Rules { idle: Duration::from_millis(30), ..RULES })).await, Left::Idle);
    assert!(!rig.place.socket().exists());
    assert_eq!(left(rig.helper(Rules { age: Duration::ZERO, ..RULES })).await, Left::Old);
    let helper = rig.helper(RULES);
    rig.listens().await;
    assert_eq!(rig.ask("leave").await.unwrap().code, 0, "it answers first");
    assert_eq!(left(helper).await, Left::Done);
}

#[tokio::test]
async fn a_panic_is_no_answer_and_ends_it() {
    let rig = Rig::new();
    let helper = rig.helper(RULES);
    rig.listens().await;
    assert!(matches!(rig.ask("panic").await, Err(NoAnswer::BrokeOff)));
    assert_eq!(left(helper).await, Left::Panicked);
}

/// A helper that hangs is waited for once.
#[tokio::test]
async fn silence_has_an_end() {
    let rig = Rig::new();
    assert!(rig.place.make_folder().unwrap());
    let hanging = StdListener::bind(rig.place.socket()).unwrap();
    let patience = Patience { silence: Duration::from_millis(50), ..PATIENCE };
    assert!(matches!(rig.ask_with("x", patience).await, Err(NoAnswer::Silent)));
    assert!(matches!(rig.ask_with("x", patience).await, Err(NoAnswer::NoHelper)));
    drop(hanging);
    // One that says it works is given up at the end, too.
    let helper = rig.helper(RULES);
    rig.listens().await;
    let patience = Patience { answer: Duration::from_millis(1500), ..PATIENCE };
    assert!(matches!(rig.ask_with("slow", patience).await, Err(NoAnswer::Silent)));
    assert_eq!(left(helper).await, Left::Changed);
}

#[tokio::test]
async fn a_folder_that_others_may_write_to_is_not_used() {
    let rig = Rig::new();
    let helper = rig.helper(RULES);
    rig.listens().await;
    fs::set_permissions(rig.place.folder(), fs::Permissions::from_mode(0o770)).unwrap();
    assert!(matches!(rig.ask("x").await, Err(NoAnswer::NotPrivate)));
    assert!(matches!(start(&rig.place, &["--version"]), Err(NotStarted::NotOurs)));
    helper.abort();
}

#[test]
fn without_a_server_none_is_started() {
    let rig = Rig::new();
    fs::remove_file(rig.place.data().join("postmaster.pid")).unwrap();
    assert!(matches!(start(&rig.place, &["--version"]), Err(NotStarted::NoServer)));
    assert!(!rig.place.folder().exists());
}

/// A change of content, of time or of the file behind the name is seen.
#[test]
fn a_file_is_known_by_more_than_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let identity = |path: &Path| FileIdentity::of(path).unwrap();
    fs::write(&path, "abc").unwrap();
    let first = identity(&path);
    assert_eq!(identity(&path), first);
    assert_eq!(first.len(), 3);
    let other = dir.path().join("other");
    fs::write(&other, "abc").unwrap();
    assert_ne!(identity(&other), first);
    fs::rename(&other, &path).unwrap();
    let second = identity(&path);
    assert_ne!(second, first);
    fs::write(&path, "abcd").unwrap();
    assert_ne!(identity(&path), second);
}
