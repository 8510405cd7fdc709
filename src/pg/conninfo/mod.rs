//! What a conninfo means: libpq's keywords and URIs, service files, `PG*` variables, defaults.
//!
//! What always holds: a [`ConnInfo`] is complete and checked; connecting looks up only what may change (names, the
//! password file, certificates). What libpq would obey and we cannot (GSSAPI, revocation lists, …) is refused, not ignored.
//! Source: <https://www.postgresql.org/docs/current/libpq-connect.html>, `fe-connect.c`.

mod environment;
mod passfile;
mod text;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use secrecy::SecretString;

pub use environment::Environment;

use super::error::PgError;

/// Where and how to connect. `Debug` and [`ConnInfo::describe`] show no secret.
#[derive(Clone)]
pub struct ConnInfo {
    pub(super) hosts: Vec<Host>,
    pub(super) user: String,
    pub(super) database: String,
    pub(super) options: Option<String>,
    pub(super) tls: TlsSettings,
    pub(super) channel_binding: ChannelBinding,
    /// `None`: whatever the server asks for.
    pub(super) require_auth: Option<Vec<AuthMethod>>,
    pub(super) target: TargetSessionAttrs,
    pub(super) shuffle_hosts: bool,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) keepalive: Keepalive,
    application_name: Option<String>,
    password: Option<SecretString>,
    passfile: Option<PathBuf>,
}

/// One of the hosts of a conninfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) place: Place,
    pub(super) port: u16,
}

/// Where a host is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// Directory of a Unix socket; `@…` is Linux's abstract namespace.
    Unix(String),
    /// A name to look up, or the address that `hostaddr` gives for it. The name is what certificates are checked for.
    Tcp { name: String, address: Option<IpAddr> },
}

impl Host {
    /// The path of the socket.
    pub(super) fn socket_path(directory: &str, port: u16) -> String {
        format!("{directory}/.s.PGSQL.{port}")
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Unix(directory) => f.write_str(&Host::socket_path(directory, self.port)),
            Place::Tcp { name, .. } if name.contains(':') => write!(f, "[{name}]:{}", self.port),
            Place::Tcp { name, .. } => write!(f, "{name}:{}", self.port),
        }
    }
}

/// `sslmode`, from nothing to everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Where trusted certificates come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RootCert {
    /// A file of certificates. The default one need not exist below verify-ca.
    File(PathBuf),
    /// The operating system's.
    System,
    /// No file named and no home directory.
    Nowhere,
}

/// Everything of a conninfo that concerns TLS.
#[derive(Debug, Clone)]
pub(super) struct TlsSettings {
    pub(super) mode: SslMode,
    /// TLS from the first byte, without asking (17 and later).
    pub(super) direct: bool,
    pub(super) root: RootCert,
    /// Our certificate and key. `true`: named by the user, so they have to exist.
    pub(super) cert: Option<(PathBuf, PathBuf, bool)>,
    pub(super) sni: bool,
    /// Oldest and newest version: 12 or 13 for 1.2 and 1.3.
    pub(super) versions: (u8, u8),
}

/// `channel_binding`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChannelBinding {
    Disable,
    Prefer,
    Require,
}

/// A word of `require_auth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AuthMethod {
    Password,
    Md5,
    Gss,
    Sspi,
    Scram,
    None,
}

impl AuthMethod {
    const ALL: [(AuthMethod, &str); 6] = [
        (AuthMethod::Password, "password"),
        (AuthMethod::Md5, "md5"),
        (AuthMethod::Gss, "gss"),
        (AuthMethod::Sspi, "sspi"),
        (AuthMethod::Scram, "scram-sha-256"),
        (AuthMethod::None, "none"),
    ];
}

/// `target_session_attrs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TargetSessionAttrs {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

impl TargetSessionAttrs {
    const ALL: [(TargetSessionAttrs, &str); 6] = [
        (TargetSessionAttrs::Any, "any"),
        (TargetSessionAttrs::ReadWrite, "read-write"),
        (TargetSessionAttrs::ReadOnly, "read-only"),
        (TargetSessionAttrs::Primary, "primary"),
        (TargetSessionAttrs::Standby, "standby"),
        (TargetSessionAttrs::PreferStandby, "prefer-standby"),
    ];

    /// The word in the conninfo.
    pub(super) fn word(self) -> &'static str {
        Self::ALL.iter().find(|(value, _)| *value == self).map_or("any", |(_, word)| word)
    }
}

/// How soon a dead peer is noticed. libpq leaves these to the system, which is two hours for an idle connection; an
/// archiver is to notice within a minute, so unless the conninfo says otherwise: 30 s idle, 3 probes 10 s apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Keepalive {
    pub(super) on: bool,
    pub(super) idle: Duration,
    pub(super) interval: Duration,
    pub(super) count: u32,
    /// How long sent bytes may stay unconfirmed; `None` leaves it to the system.
    pub(super) user_timeout: Option<Duration>,
}

/// Who asks for a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PasswordFor {
    Sql,
    /// The password file calls this database `replication`.
    Replication,
}

impl ConnInfo {
    /// Reads `text` (keywords and values, or a URI), completed by a service file, the variables of `environment` and
    /// libpq's defaults, in this order of precedence.
    pub fn resolve(text: &str, environment: &Environment) -> Result<ConnInfo, PgError> {
        let mut settings = text::parse(text)?;
        environment.complete(&mut settings)?;
        build(&Settings(settings), environment)
    }

    /// `application_name` if the conninfo, the service or `PGAPPNAME` names one; it comes before ours.
    pub fn application_name(&self) -> Option<&str> {
        self.application_name.as_deref()
    }

    /// The role to log in as.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database of SQL sessions.
    pub fn database(&self) -> &str {
        &self.database
    }

    /// The same, for SQL in another database.
    #[must_use]
    pub fn with_database(&self, database: &str) -> ConnInfo {
        ConnInfo { database: database.to_owned(), ..self.clone() }
    }

    /// Where this points, for messages: hosts with ports, and the user.
    pub fn describe(&self) -> String {
        let hosts: Vec<_> = self.hosts.iter().map(ToString::to_string).collect();
        format!("{} as {}", hosts.join(", "), self.user)
    }

    /// Whether any host is reached over the network rather than a Unix socket.
    pub fn is_remote(&self) -> bool {
        self.hosts.iter().any(|host| matches!(host.place, Place::Tcp { .. }))
    }

    /// The password for `host`, and the file it came from if it came from one.
    pub(super) fn password(&self, host: &Host, purpose: PasswordFor) -> (Option<SecretString>, Option<&Path>) {
        if let Some(password) = &self.password {
            return (Some(password.clone()), None);
        }
        let Some(path) = &self.passfile else { return (None, None) };
        let Some(lines) = passfile::read(path) else { return (None, None) };
        let name = match &host.place {
            Place::Unix(directory) if environment::is_default_socket_directory(directory) => "localhost".to_owned(),
            Place::Unix(directory) => directory.clone(),
            Place::Tcp { name, .. } => name.clone(),
        };
        let find = |database: &str| passfile::find(&lines, &name, host.port, database, &self.user);
        let password = match purpose {
            PasswordFor::Sql => find(&self.database),
            // One conninfo means one thing: a line for the database itself serves replication too.
            PasswordFor::Replication => find("replication").or_else(|| find(&self.database)),
        };
        (password, Some(path))
    }
}

impl FromStr for ConnInfo {
    type Err = PgError;

    /// [`ConnInfo::resolve`] with this process's environment.
    fn from_str(text: &str) -> Result<Self, PgError> {
        ConnInfo::resolve(text, &Environment::of_process())
    }
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnInfo({}, {:?}, target {})", self.describe(), self.tls.mode, self.target.word())
    }
}

fn bad(reason: impl Into<String>) -> PgError {
    PgError::Settings { reason: reason.into() }
}

/// Settings by keyword. An empty value is no value, as in libpq.
struct Settings(BTreeMap<String, String>);

impl Settings {
    fn get(&self, keyword: &str) -> Option<&str> {
        self.0.get(keyword).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn number(&self, keyword: &str) -> Result<Option<i64>, PgError> {
        self.get(keyword)
            .map(|text| {
                text.trim()
                    .parse::<i32>()
                    .map(i64::from)
                    .map_err(|_| bad(format!("{keyword} is {text:?}, which is not a whole number")))
            })
            .transpose()
    }

    fn flag(&self, keyword: &str, default: bool) -> Result<bool, PgError> {
        Ok(self.number(keyword)?.map_or(default, |number| number != 0))
    }

    fn word<T: Copy>(&self, keyword: &str, words: &[(T, &str)], default: T) -> Result<T, PgError> {
        let Some(text) = self.get(keyword) else { return Ok(default) };
        words.iter().find(|(_, word)| *word == text).map(|(value, _)| *value).ok_or_else(|| {
            let known: Vec<_> = words.iter().map(|(_, word)| *word).collect();
            bad(format!("{keyword} is {text:?}; it can be {}", known.join(", ")))
        })
    }

    fn path(&self, keyword: &str) -> Option<PathBuf> {
        self.get(keyword).map(PathBuf::from)
    }
}

fn build(settings: &Settings, environment: &Environment) -> Result<ConnInfo, PgError> {
    refuse_what_we_cannot(settings)?;
    let user = match settings.get("user") {
        Some(user) => user.to_owned(),
        None => environment.user().ok_or_else(|| bad("no user: add user=… to the conninfo, or set PGUSER"))?,
    };
    let database = settings.get("dbname").unwrap_or(&user).to_owned();
    let target = settings.word(
        "target_session_attrs",
        &TargetSessionAttrs::ALL.map(|(value, word)| (value, word)),
        TargetSessionAttrs::Any,
    )?;
    let channel_binding = settings.word(
        "channel_binding",
        &[
            (ChannelBinding::Disable, "disable"),
            (ChannelBinding::Prefer, "prefer"),
            (ChannelBinding::Require, "require"),
        ],
        ChannelBinding::Prefer,
    )?;
    let seconds = |keyword: &str, default: u64| -> Result<Duration, PgError> {
        let number = settings.number(keyword)?.filter(|number| *number > 0);
        Ok(Duration::from_secs(number.and_then(|number| u64::try_from(number).ok()).unwrap_or(default)))
    };
    Ok(ConnInfo {
        hosts: hosts(settings, environment)?,
        options: settings.get("options").map(str::to_owned),
        tls: tls(settings, environment)?,
        channel_binding,
        require_auth: require_auth(settings)?,
        target,
        shuffle_hosts: settings.word("load_balance_hosts", &[(false, "disable"), (true, "random")], false)?,
        // 0, negative and absent mean that libpq waits for ever; we then wait for the options' timeout. 1 is taken for 2.
        connect_timeout: settings
            .number("connect_timeout")?
            .and_then(|number| u64::try_from(number).ok())
            .filter(|number| *number > 0)
            .map(|number| Duration::from_secs(number.max(2))),
        keepalive: Keepalive {
            on: settings.flag("keepalives", true)?,
            idle: seconds("keepalives_idle", 30)?,
            interval: seconds("keepalives_interval", 10)?,
            count: settings
                .number("keepalives_count")?
                .and_then(|number| u32::try_from(number).ok())
                .filter(|number| *number > 0)
                .unwrap_or(3),
            user_timeout: match settings.number("tcp_user_timeout")? {
                None => Some(Duration::from_secs(60)),
                Some(millis) => u64::try_from(millis).ok().filter(|millis| *millis > 0).map(Duration::from_millis),
            },
        },
        application_name: settings
            .get("application_name")
            .or(settings.get("fallback_application_name"))
            .map(str::to_owned),
        password: settings.get("password").map(SecretString::from),
        passfile: settings.path("passfile").or_else(|| environment.in_home(".pgpass")),
        user,
        database,
    })
}

/// Words that libpq obeys and we cannot: silence would be a false promise.
fn refuse_what_we_cannot(settings: &Settings) -> Result<(), PgError> {
    for (keyword, instead) in [
        ("sslcrl", "check certificates for revocation outside of pgkeep"),
        ("sslcrldir", "check certificates for revocation outside of pgkeep"),
        ("sslpassword", "decrypt the key file; its permissions protect it"),
        ("requirepeer", "the permissions of the socket's directory protect it"),
        ("oauth_issuer", "use a password or a certificate"),
        ("scram_client_key", "use a password"),
        ("scram_server_key", "use a password"),
        ("sslkeylogfile", "TLS secrets are not written to files"),
    ] {
        if settings.get(keyword).is_some() {
            return Err(bad(format!("{keyword} is not supported; {instead}")));
        }
    }
    if settings.get("gssencmode") == Some("require") {
        return Err(bad("gssencmode=require is not supported; use sslmode"));
    }
    if settings.get("replication").is_some_and(|value| !matches!(value, "0" | "off" | "no" | "false")) {
        return Err(bad("leave out replication=…; pgkeep opens replication sessions by itself"));
    }
    match settings.get("min_protocol_version") {
        None | Some("3.0") => Ok(()),
        Some(other) => Err(bad(format!("min_protocol_version={other} is not supported, only 3.0"))),
    }
}

fn hosts(settings: &Settings, environment: &Environment) -> Result<Vec<Host>, PgError> {
    let list = |keyword: &str| settings.get(keyword).map(|text| text.split(',').collect::<Vec<_>>());
    let (names, addresses) = (list("host"), list("hostaddr"));
    let count = addresses.as_ref().or(names.as_ref()).map_or(1, Vec::len);
    if let (Some(names), Some(addresses)) = (&names, &addresses)
        && names.len() != addresses.len()
    {
        return Err(bad(format!("{} hosts, but {} values of hostaddr", names.len(), addresses.len())));
    }
    let ports = list("port").unwrap_or_else(|| vec![""]);
    if ports.len() != 1 && ports.len() != count {
        return Err(bad(format!("{} ports for {count} hosts; give one for all, or one for each", ports.len())));
    }
    let mut hosts = Vec::with_capacity(count);
    for index in 0..count {
        let item = |list: &Option<Vec<&str>>| {
            list.as_ref().and_then(|list| list.get(index).copied()).unwrap_or("").trim().to_owned()
        };
        let port = match ports.get(index).or(ports.first()).map_or("", |port| port.trim()) {
            "" => 5432,
            text => text
                .parse::<u16>()
                .ok()
                .filter(|port| *port > 0)
                .ok_or_else(|| bad(format!("port is {text:?}; it can be 1 to 65535")))?,
        };
        let (name, address) = (item(&names), item(&addresses));
        let place = if !address.is_empty() {
            let parsed =
                address.parse().map_err(|_| bad(format!("hostaddr is {address:?}, which is not an IP address")))?;
            Place::Tcp { name: if name.is_empty() { address } else { name }, address: Some(parsed) }
        } else if name.is_empty() {
            Place::Unix(environment.default_socket_directory(port))
        } else if name.starts_with('/') || name.starts_with('@') {
            Place::Unix(name)
        } else {
            Place::Tcp { name, address: None }
        };
        hosts.push(Host { place, port });
    }
    Ok(hosts)
}

fn tls(settings: &Settings, environment: &Environment) -> Result<TlsSettings, PgError> {
    let system = settings.get("sslrootcert") == Some("system");
    let default = match settings.get("requiressl") {
        _ if system => SslMode::VerifyFull,
        Some("1") => SslMode::Require,
        _ => SslMode::Prefer,
    };
    let mode = settings.word(
        "sslmode",
        &[
            (SslMode::Disable, "disable"),
            (SslMode::Allow, "allow"),
            (SslMode::Prefer, "prefer"),
            (SslMode::Require, "require"),
            (SslMode::VerifyCa, "verify-ca"),
            (SslMode::VerifyFull, "verify-full"),
        ],
        default,
    )?;
    if system && mode != SslMode::VerifyFull {
        return Err(bad(
            "sslrootcert=system needs sslmode=verify-full: anybody can have a certificate of those authorities",
        ));
    }
    let direct = settings.word("sslnegotiation", &[(false, "postgres"), (true, "direct")], false)?;
    if direct && mode < SslMode::Require {
        return Err(bad("sslnegotiation=direct needs sslmode=require or more"));
    }
    let root = match settings.path("sslrootcert") {
        _ if system => RootCert::System,
        Some(path) => RootCert::File(path),
        None => environment.in_home(".postgresql/root.crt").map_or(RootCert::Nowhere, RootCert::File),
    };
    let offer = settings.word("sslcertmode", &[(0, "disable"), (1, "allow"), (2, "require")], 1)?;
    let cert = settings.path("sslcert").map(|path| (path, true));
    let cert = cert.or_else(|| environment.in_home(".postgresql/postgresql.crt").map(|path| (path, offer == 2)));
    let key = settings.path("sslkey").or_else(|| environment.in_home(".postgresql/postgresql.key"));
    let version = |keyword: &str, default: u8| match settings.get(keyword) {
        None => Ok(default),
        Some("TLSv1" | "TLSv1.1" | "TLSv1.2") => Ok(12), // 1.0 and 1.1 as lower bounds are met by 1.2
        Some("TLSv1.3") => Ok(13),
        Some(text) => Err(bad(format!("{keyword} is {text:?}; it can be TLSv1.2 or TLSv1.3"))),
    };
    let versions = (version("ssl_min_protocol_version", 12)?, version("ssl_max_protocol_version", 13)?);
    if matches!(settings.get("ssl_max_protocol_version"), Some("TLSv1" | "TLSv1.1")) || versions.0 > versions.1 {
        return Err(bad(
            "ssl_min_protocol_version and ssl_max_protocol_version leave no version; 1.2 and 1.3 are built in",
        ));
    }
    Ok(TlsSettings {
        mode,
        direct,
        root,
        cert: match (cert, key) {
            (Some((cert, named)), Some(key)) if offer > 0 => Some((cert, key, named)),
            _ => None,
        },
        sni: settings.flag("sslsni", true)?,
        versions,
    })
}

fn require_auth(settings: &Settings) -> Result<Option<Vec<AuthMethod>>, PgError> {
    let Some(text) = settings.get("require_auth") else { return Ok(None) };
    let words: Vec<&str> = text.split(',').map(str::trim).collect();
    let negated = words.iter().filter(|word| word.starts_with('!')).count();
    if negated != 0 && negated != words.len() {
        return Err(bad(format!("require_auth is {text:?}: either every method has a `!` or none")));
    }
    let mut named = Vec::new();
    for word in words {
        let word = word.trim_start_matches('!');
        let method = AuthMethod::ALL.iter().find(|(_, name)| *name == word);
        named.push(method.ok_or_else(|| bad(format!("require_auth names {word:?}, which is not a method")))?.0);
    }
    let all = AuthMethod::ALL.iter().map(|(method, _)| *method);
    Ok(Some(if negated > 0 { all.filter(|method| !named.contains(method)).collect() } else { named }))
}

#[cfg(test)]
mod tests;
