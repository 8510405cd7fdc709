//! Sending a notice, and the tasks that do it.
//!
//! Bounds: everything about one notice ends within [`DEADLINE`]; one at a time for each channel; of an answer only its status
//! is read. A URL is never shown beyond its host. No proxy is asked, and no redirection followed.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, USER_AGENT};
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::Active;
use super::channel::{Notice, State, Told};
use crate::config::{AlertConfig, AlertUrl, AlertWay, WebhookFormat};

/// A notice that is not taken within so long has failed.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often a channel looks whether something is due by its own clock.
const TICK: Duration = Duration::from_secs(5);

/// Why a notice was not sent. Holds nothing of a URL but its host.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No connection, or none that could be trusted.
    #[error("cannot reach {at}: {why}")]
    Connection {
        /// Scheme and host.
        at: String,
        /// In words.
        why: String,
    },
    /// It answered, and not with a 2xx.
    #[error("{at} answered {status}")]
    Refused {
        /// Scheme and host.
        at: String,
        /// The HTTP status.
        status: u16,
    },
    /// The command could not be run, or said no.
    #[error("the command {program} {why}")]
    Command {
        /// The program alone: arguments may be secret.
        program: String,
        /// In words.
        why: String,
    },
    /// Nothing happened in time.
    #[error("{at} took no notice within {} s", DEADLINE.as_secs())]
    TimedOut {
        /// Scheme and host, or the program.
        at: String,
    },
}

impl SendError {
    /// Whether another try may help: whoever tells a channel tries again in any case, ever more rarely.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Connection { .. } | Self::TimedOut { .. } | Self::Command { .. } => true,
            Self::Refused { status, .. } => *status == 429 || *status >= 500,
        }
    }
}

/// Sends one notice; to a heartbeat, a ping.
///
/// # Errors
/// [`SendError`].
pub async fn send(way: &AlertWay, notice: &Notice) -> Result<(), SendError> {
    let (at, sent): (String, futures_util::future::BoxFuture<'_, Result<(), SendError>>) = match way {
        AlertWay::Webhook { url, format } => {
            (url.to_string(), Box::pin(request(url, Method::POST, body(*format, notice))))
        }
        AlertWay::Command(command) => (command.first().cloned().unwrap_or_default(), Box::pin(run(command, notice))),
        AlertWay::Heartbeat { url, .. } => (url.to_string(), Box::pin(request(url, Method::GET, String::new()))),
    };
    tokio::time::timeout(DEADLINE, sent).await.unwrap_or(Err(SendError::TimedOut { at }))
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn json(notice: &Notice) -> serde_json::Value {
    let mut value = serde_json::to_value(notice).unwrap_or_default(); // invariant: plain values
    if let Some(object) = value.as_object_mut() {
        object.insert("host".to_owned(), host_name().into());
        object.insert("text".to_owned(), sentence(notice).into());
    }
    value
}

/// One line for a person.
fn sentence(notice: &Notice) -> String {
    let Active { cluster, kind, about, what, since } = &notice.alert;
    let of = match about.as_str() {
        "" => format!("cluster {cluster}"),
        about => format!("cluster {cluster}, repository {about}"),
    };
    match notice.state {
        State::Raised => format!("pgkeep: {kind}, {of}: {what}"),
        State::Still => format!("pgkeep: still {kind}, {of}, since {since:.0}: {what}"),
        State::Resolved => format!("pgkeep: resolved: {kind}, {of} (it was: {what})"),
        State::Test => format!("pgkeep: {what}"),
    }
}

fn body(format: WebhookFormat, notice: &Notice) -> String {
    match format {
        WebhookFormat::Json => json(notice).to_string(),
        WebhookFormat::Slack => serde_json::json!({ "text": sentence(notice) }).to_string(),
    }
}

async fn run(command: &[String], notice: &Notice) -> Result<(), SendError> {
    let Some((program, arguments)) = command.split_first() else { return Ok(()) };
    let failed = |why: String| SendError::Command { program: program.clone(), why };
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(format!("cannot be started: {error}")))?;
    if let Some(mut input) = child.stdin.take() {
        // One that does not read is as good: its exit code counts.
        let _ = input.write_all(format!("{}\n", json(notice)).as_bytes()).await;
    }
    let status = child.wait().await.map_err(|error| failed(error.to_string()))?;
    if status.success() { Ok(()) } else { Err(failed(format!("ended with {status}"))) }
}

async fn request(url: &AlertUrl, method: Method, body: String) -> Result<(), SendError> {
    let at = url.to_string();
    let failed = |why: String| SendError::Connection { at: at.clone(), why };
    let uri: Uri = url.expose().parse().map_err(|_| failed("it is no URL".to_owned()))?;
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = uri.port_u16().unwrap_or(if url.is_tls() { 443 } else { 80 });
    let tcp = TcpStream::connect((host.as_str(), port)).await.map_err(|error| failed(error.to_string()))?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, url.host())
        .header(USER_AGENT, concat!("pgkeep/", env!("CARGO_PKG_VERSION")))
        .header(CONTENT_TYPE, "application/json");
    if let Some((user, _)) = uri.authority().and_then(|authority| authority.as_str().rsplit_once('@')) {
        request = request.header(AUTHORIZATION, format!("Basic {}", STANDARD.encode(user)));
    }
    let request = request.body(body).map_err(|_| failed("no request can be made of it".to_owned()))?;
    let status = match url.is_tls() {
        false => exchange(tcp, request).await,
        true => {
            let name = ServerName::try_from(host).map_err(|_| failed("its host is no name".to_owned()))?;
            let config = Arc::new(tls().map_err(&failed)?);
            let stream = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await;
            exchange(stream.map_err(|error| failed(error.to_string()))?, request).await
        }
    };
    match status.map_err(|error| failed(error.to_string()))? {
        200..=299 => Ok(()),
        status => Err(SendError::Refused { at: at.clone(), status }),
    }
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<String>,
) -> Result<u16, hyper::Error> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with this function at the latest.
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    Ok(sender.send_request(request).await?.status().as_u16())
}

fn tls() -> Result<rustls::ClientConfig, String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| error.to_string())?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// The channels of a configuration, each with its task. Dropping it ends them.
#[derive(Debug, Default)]
pub struct Channels {
    running: BTreeMap<String, (AlertConfig, AbortOnDropHandle<()>)>,
    told: BTreeMap<String, Arc<Mutex<Told>>>,
}

impl Channels {
    /// Runs these channels from here on. One that stays as it is goes on; one that changes keeps what it has told.
    pub fn run(&mut self, wanted: &[AlertConfig], active: &watch::Receiver<Arc<Vec<Active>>>) {
        self.running.retain(|_, (running, _)| wanted.contains(running));
        self.told.retain(|name, _| wanted.iter().any(|channel| channel.name == *name));
        for channel in wanted {
            if self.running.contains_key(&channel.name) {
                continue;
            }
            let told = Arc::clone(self.told.entry(channel.name.clone()).or_default());
            let task = tokio::spawn(tell(channel.clone(), told, active.clone()));
            self.running.insert(channel.name.clone(), (channel.clone(), AbortOnDropHandle::new(task)));
        }
    }
}

async fn tell(channel: AlertConfig, told: Arc<Mutex<Told>>, mut active: watch::Receiver<Arc<Vec<Active>>>) {
    let begin = Instant::now();
    if let AlertWay::Heartbeat { every, .. } = channel.way {
        beat(&channel, every, active).await;
        return;
    }
    let lock = || told.lock().unwrap_or_else(PoisonError::into_inner); // one value
    loop {
        let now = Arc::clone(&active.borrow_and_update());
        let notice = lock().next(&now, &channel, begin.elapsed(), Timestamp::now());
        if let Some(notice) = notice {
            match send(&channel.way, &notice).await {
                Ok(()) => lock().sent(&notice, begin.elapsed()),
                Err(error) => {
                    let pause = lock().failed(begin.elapsed());
                    let name = &channel.name;
                    tracing::warn!("[alert.{name}] was not told, another try in {} s: {error}", pause.as_secs());
                }
            }
            continue;
        }
        let wait = TICK.min(lock().wait(begin.elapsed()));
        tokio::select! {
            changed = active.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn beat(channel: &AlertConfig, every: Duration, active: watch::Receiver<Arc<Vec<Active>>>) {
    loop {
        let is_well = active.borrow().is_empty();
        let ping = test_notice("all is well");
        if is_well && let Err(error) = send(&channel.way, &ping).await {
            tracing::warn!("[alert.{}] was not pinged: {error}", channel.name);
        }
        tokio::time::sleep(every).await;
        if active.has_changed().is_err() {
            return;
        }
    }
}

/// What `pgkeep check --alerts` sends.
pub fn test_notice(what: &str) -> Notice {
    let (at, nobody) = (Timestamp::now(), String::new);
    let alert = Active { cluster: nobody(), kind: "test", about: nobody(), what: what.to_owned(), since: at };
    Notice { state: State::Test, alert, at }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(state: State) -> Notice {
        let (cluster, about) = ("main".to_owned(), "far".to_owned());
        let (since, at) = (Timestamp::UNIX_EPOCH, Timestamp::UNIX_EPOCH);
        Notice { state, alert: Active { cluster, kind: "gap", about, what: "\"x\" is missing".to_owned(), since }, at }
    }

    #[test]
    fn what_is_sent_is_json() {
        for state in [State::Raised, State::Still, State::Resolved, State::Test] {
            for format in [WebhookFormat::Json, WebhookFormat::Slack] {
                let value: serde_json::Value = serde_json::from_str(&body(format, &notice(state))).unwrap();
                assert!(value["text"].as_str().unwrap().contains("\"x\" is missing"), "{value}");
            }
        }
        let value = json(&notice(State::Resolved));
        assert_eq!((value["state"].as_str(), value["kind"].as_str()), (Some("resolved"), Some("gap")));
    }

    #[tokio::test]
    async fn a_command_gets_the_notice_and_its_exit_code_counts() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("said");
        let way = |script: String| AlertWay::Command(vec!["/bin/sh".to_owned(), "-c".to_owned(), script]);
        send(&way(format!("cat > {}", file.display())), &notice(State::Raised)).await.unwrap();
        let said: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        assert_eq!(said["state"].as_str(), Some("raised"));
        let error = send(&way("exit 3; # secret".to_owned()), &notice(State::Raised)).await.unwrap_err();
        assert!(error.to_string().contains("exit status: 3") && !error.to_string().contains("secret"), "{error}");
        assert!(send(&AlertWay::Command(vec!["/nonexistent".to_owned()]), &notice(State::Raised)).await.is_err());
    }

    /// Nobody answers: the deadline ends it, whatever the channel.
    #[tokio::test(start_paused = true)]
    async fn what_hangs_ends_at_the_deadline() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = AlertUrl::new(&format!("http://{}/secret", listener.local_addr().unwrap())).unwrap();
        let way = AlertWay::Webhook { url, format: WebhookFormat::Json };
        let error = send(&way, &notice(State::Raised)).await.unwrap_err();
        assert!(matches!(error, SendError::TimedOut { .. }) && !error.to_string().contains("secret"), "{error}");
        assert!(error.is_retryable());
    }
}
