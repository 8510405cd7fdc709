//! From a conninfo to a session that is logged in: hosts in turn, TLS, authentication, role.
//!
//! What always holds: each attempt on an address ends within `connect_timeout` (or the options' `timeout`), from the
//! first packet to ReadyForQuery; a password goes out in clear only over TLS or a Unix socket; nothing that the server
//! sent before TLS is believed after it. Dropping [`connect`] closes whatever it had opened.
//! Source: `fe-connect.c`, `fe-auth.c`, <https://www.postgresql.org/docs/current/protocol-flow.html>

use std::fmt::Debug;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use postgres_protocol::message::frontend;
use secrecy::{ExposeSecret as _, SecretString};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::connection::{Connection, Socket};
use super::conninfo::{
    AuthMethod, ChannelBinding, ConnInfo, Host, Keepalive, PasswordFor, Place, SslMode, TargetSessionAttrs,
};
use super::error::{PgError, ServerErrorKind};
use super::tls;
use super::wire::{Authentication, Message};

/// Addresses tried per host name, at most (P8).
const MAX_ADDRESSES: usize = 16;

/// What a session needs besides where it goes.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// Name shown in `pg_stat_replication`, and matched by `synchronous_standby_names`; the conninfo's comes before it.
    pub application_name: String,
    /// Settings for this session, `("wal_sender_timeout", "60s")`.
    pub gucs: Vec<(String, String)>,
    /// Deadline of connecting to one address (unless the conninfo has `connect_timeout`) and of each command.
    pub timeout: Duration,
    /// What opens a way to the server in place of a socket, wherever the conninfo points; for simulations.
    pub dial: Option<Arc<dyn Dial>>,
}

/// Opens ways to a server that is no process: what a simulation puts in the place of the network.
pub trait Dial: Send + Sync + Debug {
    /// A new way. The server has the other end; startup and login follow as on any socket.
    fn dial(&self) -> std::io::Result<DuplexStream>;
}

impl Default for ConnectOptions {
    fn default() -> ConnectOptions {
        ConnectOptions {
            application_name: "pgkeep".to_owned(),
            gucs: Vec::new(),
            timeout: super::replication::DEFAULT_TIMEOUT,
            dial: None,
        }
    }
}

/// What kind of session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Sql,
    /// A physical walsender, which is of no database and speaks no SQL.
    Replication,
}

/// Connects to the first host that will do.
pub(super) async fn connect(
    info: &ConnInfo,
    options: &ConnectOptions,
    purpose: Purpose,
) -> Result<Connection, PgError> {
    let mut failures = Vec::new();
    let hosts = ordered(&info.hosts, info.shuffle_hosts);
    // prefer-standby goes round twice: first for a standby, then for anything.
    let passes: &[TargetSessionAttrs] = match info.target {
        TargetSessionAttrs::PreferStandby => &[TargetSessionAttrs::Standby, TargetSessionAttrs::Any],
        _ => std::slice::from_ref(&info.target),
    };
    for (pass, wanted) in passes.iter().enumerate() {
        if pass > 0 {
            failures.clear(); // the second round says all that the first said
        }
        for host in &hosts {
            match try_host(info, options, purpose, host, *wanted).await {
                Ok(connection) => return Ok(connection),
                Err(more) => {
                    let stop = more.iter().any(ends_the_search);
                    failures.extend(more);
                    if stop {
                        return Err(one_or_all(failures));
                    }
                }
            }
        }
    }
    Err(one_or_all(failures))
}

/// As in libpq a server that answered with an error is not a reason to ask another, unless it only starts up.
fn ends_the_search(error: &PgError) -> bool {
    match error {
        PgError::Server(error) => {
            !matches!(error.kind(), ServerErrorKind::NotReadyYet | ServerErrorKind::OutOfResources)
        }
        PgError::Settings { .. } | PgError::Authentication { .. } => true,
        _ => false,
    }
}

fn one_or_all(mut failures: Vec<PgError>) -> PgError {
    match failures.pop() {
        Some(only) if failures.is_empty() => only,
        Some(last) => {
            failures.push(last);
            PgError::NoHost { failures }
        }
        None => PgError::Settings { reason: "no host to connect to".to_owned() },
    }
}

fn ordered(hosts: &[Host], shuffle: bool) -> Vec<Host> {
    let mut hosts = hosts.to_vec();
    if shuffle {
        for last in (1..hosts.len()).rev() {
            // Without randomness the order stays: spreading load is a kindness, not a promise.
            let random = getrandom::u32().unwrap_or(u32::MAX) as usize;
            hosts.swap(last, random % (last + 1));
        }
    }
    hosts
}

/// Whether an attempt is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encryption {
    Plain,
    /// TLS if the server has it.
    TlsIfOffered,
    Tls,
}

fn ladder(mode: SslMode) -> &'static [Encryption] {
    match mode {
        SslMode::Disable => &[Encryption::Plain],
        SslMode::Allow => &[Encryption::Plain, Encryption::Tls],
        SslMode::Prefer => &[Encryption::TlsIfOffered, Encryption::Plain],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Encryption::Tls],
    }
}

async fn try_host(
    info: &ConnInfo,
    options: &ConnectOptions,
    purpose: Purpose,
    host: &Host,
    wanted: TargetSessionAttrs,
) -> Result<Connection, Vec<PgError>> {
    let within = info.connect_timeout.unwrap_or(options.timeout);
    let attempt = Attempt { info, options, purpose, host };
    let limited = async |target: Target<'_>, encryption| {
        let shown = target.to_string();
        match timeout(within, attempt.run(target, encryption, wanted)).await {
            Ok(result) => result,
            Err(_) => Err(PgError::Timeout { server: shown, doing: "connecting".to_owned(), after: within }),
        }
    };
    match &host.place {
        Place::Unix(directory) => {
            limited(Target::Unix { directory, port: host.port }, Encryption::Plain).await.map_err(|error| vec![error])
        }
        Place::Tcp { name, address } => {
            let addresses = match address {
                Some(address) => vec![SocketAddr::new(*address, host.port)],
                None => look_up(name, host, within).await.map_err(|error| vec![error])?,
            };
            let mut failures = Vec::new();
            for address in addresses {
                let target = Target::Tcp { name, address };
                for (index, encryption) in ladder(info.tls.mode).iter().enumerate() {
                    match limited(target, *encryption).await {
                        Ok(connection) => return Ok(connection),
                        Err(error) => {
                            let again = index == 0 && other_encryption_may_do(&error);
                            failures.push(error);
                            if !again {
                                break;
                            }
                        }
                    }
                }
                if failures.iter().any(ends_the_search) {
                    break;
                }
            }
            Err(failures)
        }
    }
}

/// The server, or TLS, said no to this way; a wrong password stays wrong the other way.
fn other_encryption_may_do(error: &PgError) -> bool {
    match error {
        PgError::Tls { .. } => true,
        PgError::Server(error) => error.sqlstate == "28000",
        _ => false,
    }
}

async fn look_up(name: &str, host: &Host, within: Duration) -> Result<Vec<SocketAddr>, PgError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, host.port)]);
    }
    let server = host.to_string();
    match timeout(within, tokio::net::lookup_host((name, host.port))).await {
        Ok(Ok(found)) => {
            let addresses: Vec<_> = found.take(MAX_ADDRESSES).collect();
            if addresses.is_empty() {
                let source = std::io::Error::other("the name has no address");
                return Err(PgError::Unreachable { server, source });
            }
            Ok(addresses)
        }
        Ok(Err(source)) => Err(PgError::Unreachable { server, source }),
        Err(_) => Err(PgError::Timeout { server, doing: "looking up its name".to_owned(), after: within }),
    }
}

/// One place to connect to.
#[derive(Debug, Clone, Copy)]
enum Target<'a> {
    Unix { directory: &'a str, port: u16 },
    Tcp { name: &'a str, address: SocketAddr },
}

impl std::fmt::Display for Target<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Unix { directory, port } => f.write_str(&Host::socket_path(directory, *port)),
            Target::Tcp { name, address } if address.ip().to_string() == *name => write!(f, "{address}"),
            Target::Tcp { name, address } => write!(f, "{name}:{} ({})", address.port(), address.ip()),
        }
    }
}

#[derive(Clone, Copy)]
struct Attempt<'a> {
    info: &'a ConnInfo,
    options: &'a ConnectOptions,
    purpose: Purpose,
    host: &'a Host,
}

/// A connected socket, and what authentication has to know of it.
struct Opened {
    socket: Box<dyn Socket>,
    /// A password may go out in clear.
    private: bool,
    tls: bool,
    end_point: Option<Vec<u8>>,
}

impl Attempt<'_> {
    /// From the first packet to a session of the wanted role.
    async fn run(
        self,
        target: Target<'_>,
        encryption: Encryption,
        wanted: TargetSessionAttrs,
    ) -> Result<Connection, PgError> {
        let server = target.to_string();
        let opened = match (&self.options.dial, target) {
            (Some(dial), _) => open_simulated(dial.as_ref(), &server)?,
            (None, Target::Unix { directory, port }) => open_unix(directory, port, &server).await?,
            (None, Target::Tcp { name, address }) => self.open_tcp(name, address, encryption, &server).await?,
        };
        let Opened { socket, private, tls, end_point } = opened;
        let mut connection = Connection::new(socket, server, self.options.timeout);
        self.log_in(&mut connection, Login { private, tls, end_point }).await?;
        if has_role(&mut connection, wanted, self.purpose).await? {
            return Ok(connection);
        }
        let server = connection.server().to_owned();
        connection.close().await;
        Err(PgError::WrongRole { server, wanted: wanted.word() })
    }

    async fn open_tcp(
        self,
        name: &str,
        address: SocketAddr,
        encryption: Encryption,
        server: &str,
    ) -> Result<Opened, PgError> {
        let unreachable = |source| PgError::Unreachable { server: server.to_owned(), source };
        let mut tcp = TcpStream::connect(address).await.map_err(unreachable)?;
        prepare(&tcp, self.info.keepalive).map_err(unreachable)?;
        let settings = &self.info.tls;
        let wants_tls = encryption != Encryption::Plain;
        if wants_tls && (settings.direct || offers_tls(&mut tcp, server).await?) {
            let stream = tls::handshake(tcp, settings, name, server).await?;
            let (_, session) = stream.get_ref();
            if settings.direct && session.alpn_protocol() != Some(b"postgresql") {
                let reason = "the server does not know sslnegotiation=direct (PostgreSQL 17 and later do)".to_owned();
                return Err(PgError::Tls { server: server.to_owned(), reason });
            }
            let end_point = tls::end_point(&stream);
            return Ok(Opened { socket: Box::new(stream), private: true, tls: true, end_point });
        }
        if encryption == Encryption::Tls {
            let reason = "the server has no TLS (ssl = off), but sslmode wants it".to_owned();
            return Err(PgError::Tls { server: server.to_owned(), reason });
        }
        Ok(Opened { socket: Box::new(tcp), private: false, tls: false, end_point: None })
    }

    async fn log_in(self, connection: &mut Connection, login: Login) -> Result<(), PgError> {
        let options = server_options(self.info.options.as_deref(), &self.options.gucs);
        let application = self.info.application_name().unwrap_or(&self.options.application_name);
        let mut parameters = vec![("user", self.info.user.as_str()), ("application_name", application)];
        match self.purpose {
            Purpose::Sql => parameters.extend([("database", self.info.database.as_str()), ("client_encoding", "UTF8")]),
            Purpose::Replication => parameters.extend([("database", "replication"), ("replication", "true")]),
        }
        if !options.is_empty() {
            parameters.push(("options", &options));
        }
        frontend::startup_message(parameters, connection.out())
            .map_err(|_| PgError::Settings { reason: "a connection setting contains a zero byte".to_owned() })?;
        self.authenticate(connection, login).await?;
        let within = self.info.connect_timeout.unwrap_or(self.options.timeout);
        loop {
            match connection.receive(within).await? {
                Message::ReadyForQuery => return Ok(()),
                Message::Notice(_) => {}
                other => return Err(connection.unexpected(&other)),
            }
        }
    }

    async fn authenticate(self, connection: &mut Connection, login: Login) -> Result<(), PgError> {
        let within = self.info.connect_timeout.unwrap_or(self.options.timeout);
        let refuse = |connection: &Connection, reason: String| {
            Err(PgError::Authentication { server: connection.server().to_owned(), reason })
        };
        let mut scram: Option<Scram> = None;
        let mut used = AuthMethod::None;
        loop {
            let request = match connection.receive(within).await? {
                Message::Authentication(request) => request,
                Message::Notice(_) => continue,
                Message::Error(mut error) => {
                    if let (AuthMethod::Password | AuthMethod::Md5 | AuthMethod::Scram, Some(path)) =
                        (used, self.password().1)
                        && error.kind() == ServerErrorKind::AuthenticationFailed
                    {
                        error.hint = Some(format!("the password came from {}", path.display()));
                    }
                    return Err(PgError::Server(Box::new(error)));
                }
                other => return Err(connection.unexpected(&other)),
            };
            match request {
                Authentication::Ok => {
                    let bound = scram.as_ref().is_some_and(|scram| scram.bound);
                    if scram.as_ref().is_some_and(|scram| !scram.finished) {
                        return refuse(
                            connection,
                            "it let us in without proving that it knows the password".to_owned(),
                        );
                    }
                    if self.info.channel_binding == ChannelBinding::Require && !bound {
                        return refuse(connection, "channel_binding=require, but it let us in without".to_owned());
                    }
                    return match self.allowed(used) {
                        Ok(()) => Ok(()),
                        Err(reason) => refuse(connection, reason),
                    };
                }
                Authentication::Cleartext | Authentication::Md5 { .. }
                    if self.info.channel_binding == ChannelBinding::Require =>
                {
                    return refuse(
                        connection,
                        "channel_binding=require needs SCRAM over TLS, it asks for less".to_owned(),
                    );
                }
                Authentication::Cleartext => {
                    used = AuthMethod::Password;
                    if !login.private {
                        return refuse(
                            connection,
                            "it wants the password in clear over an unencrypted connection; use sslmode=require, or scram-sha-256 in pg_hba.conf"
                                .to_owned(),
                        );
                    }
                    let password = self.password_or_refuse(connection, used)?;
                    self.send(connection, |out| frontend::password_message(password.expose_secret().as_bytes(), out))?;
                }
                Authentication::Md5 { salt } => {
                    used = AuthMethod::Md5;
                    let password = self.password_or_refuse(connection, used)?;
                    let hash = md5_hash(self.info.user.as_bytes(), password.expose_secret().as_bytes(), salt);
                    self.send(connection, |out| frontend::password_message(hash.as_bytes(), out))?;
                }
                Authentication::Sasl(mechanisms) => {
                    used = AuthMethod::Scram;
                    let (mechanism, binding, bound) = match choose(&mechanisms, self.info.channel_binding, &login) {
                        Ok(choice) => choice,
                        Err(reason) => return refuse(connection, reason),
                    };
                    let password = self.password_or_refuse(connection, used)?;
                    let exchange = ScramSha256::new(password.expose_secret().as_bytes(), binding);
                    self.send(connection, |out| frontend::sasl_initial_response(mechanism, exchange.message(), out))?;
                    scram = Some(Scram { exchange, bound, finished: false });
                }
                Authentication::SaslContinue(data) => match &mut scram {
                    Some(scram) => {
                        if let Err(error) = scram.exchange.update(&data) {
                            return refuse(connection, format!("SCRAM: {error}"));
                        }
                        let message = scram.exchange.message().to_vec();
                        self.send(connection, |out| frontend::sasl_response(&message, out))?;
                    }
                    _ => return Err(connection.protocol("SCRAM out of turn".to_owned())),
                },
                Authentication::SaslFinal(data) => match &mut scram {
                    Some(scram) => match scram.exchange.finish(&data) {
                        Ok(()) => scram.finished = true,
                        Err(error) => {
                            return refuse(
                                connection,
                                format!("it does not know the password itself (SCRAM: {error})"),
                            );
                        }
                    },
                    None => return Err(connection.protocol("SCRAM out of turn".to_owned())),
                },
                Authentication::Other(method) => {
                    return refuse(
                        connection,
                        format!("it asks for {method}, which is not built in; use scram-sha-256 or a certificate"),
                    );
                }
            }
        }
    }

    fn password(&self) -> (Option<SecretString>, Option<&std::path::Path>) {
        let purpose = match self.purpose {
            Purpose::Sql => PasswordFor::Sql,
            Purpose::Replication => PasswordFor::Replication,
        };
        self.info.password(self.host, purpose)
    }

    fn password_or_refuse(&self, connection: &Connection, method: AuthMethod) -> Result<SecretString, PgError> {
        let refused = |reason| PgError::Authentication { server: connection.server().to_owned(), reason };
        self.allowed(method).map_err(refused)?;
        match self.password() {
            (Some(password), _) if !password.expose_secret().is_empty() => Ok(password),
            (_, Some(path)) => Err(refused(format!(
                "it asks for a password, and neither the conninfo nor PGPASSWORD nor {} has one for {}",
                path.display(),
                self.info.user
            ))),
            (_, None) => Err(refused(format!(
                "it asks for a password of {}; put it into a password file (PGPASSFILE, ~/.pgpass) or PGPASSWORD",
                self.info.user
            ))),
        }
    }

    /// What `require_auth` says to a method, before anything is sent by it.
    fn allowed(&self, method: AuthMethod) -> Result<(), String> {
        match &self.info.require_auth {
            Some(allowed) if !allowed.contains(&method) => {
                Err(format!("require_auth does not allow {method:?}, which it asks for"))
            }
            _ => Ok(()),
        }
    }

    fn send(
        &self,
        connection: &mut Connection,
        write: impl FnOnce(&mut BytesMut) -> std::io::Result<()>,
    ) -> Result<(), PgError> {
        write(connection.out())
            .map_err(|_| PgError::Settings { reason: "the password contains a zero byte".to_owned() })
    }
}

struct Login {
    private: bool,
    tls: bool,
    end_point: Option<Vec<u8>>,
}

struct Scram {
    exchange: ScramSha256,
    bound: bool,
    finished: bool,
}

/// Which mechanism, with which binding, and whether it binds.
fn choose(
    mechanisms: &[String],
    wanted: ChannelBinding,
    login: &Login,
) -> Result<(&'static str, sasl::ChannelBinding, bool), String> {
    let offers = |name: &str| mechanisms.iter().any(|mechanism| mechanism == name);
    let end_point = login.end_point.clone().filter(|_| login.tls && wanted != ChannelBinding::Disable);
    if let (true, Some(end_point)) = (offers(SCRAM_SHA_256_PLUS), end_point.clone()) {
        return Ok((SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(end_point), true));
    }
    if wanted == ChannelBinding::Require {
        return Err(if login.tls {
            "channel_binding=require, but it does not offer SCRAM-SHA-256-PLUS for this certificate".to_owned()
        } else {
            "channel_binding=require, but the connection is not encrypted; use sslmode=require".to_owned()
        });
    }
    if !offers(SCRAM_SHA_256) {
        return Err(format!("it offers {}, of which none is built in", mechanisms.join(", ")));
    }
    // "We could, the server cannot" lets the server notice somebody in the middle who took PLUS out of its offer.
    let could = end_point.is_some() && !offers(SCRAM_SHA_256_PLUS);
    let binding = if could { sasl::ChannelBinding::unrequested() } else { sasl::ChannelBinding::unsupported() };
    Ok((SCRAM_SHA_256, binding, false))
}

fn open_simulated(dial: &dyn Dial, server: &str) -> Result<Opened, PgError> {
    let socket = dial.dial().map_err(|source| PgError::Unreachable { server: server.to_owned(), source })?;
    Ok(Opened { socket: Box::new(socket), private: true, tls: false, end_point: None })
}

async fn open_unix(directory: &str, port: u16, server: &str) -> Result<Opened, PgError> {
    let path = Host::socket_path(directory, port);
    let opened = match path.strip_prefix('@') {
        Some(name) => {
            use std::os::linux::net::SocketAddrExt as _;
            let connected = std::os::unix::net::SocketAddr::from_abstract_name(name)
                .and_then(|address| std::os::unix::net::UnixStream::connect_addr(&address));
            connected.and_then(|stream| {
                stream.set_nonblocking(true)?;
                UnixStream::from_std(stream)
            })
        }
        None => UnixStream::connect(&path).await,
    };
    let socket = opened.map_err(|source| PgError::Unreachable { server: server.to_owned(), source })?;
    Ok(Opened { socket: Box::new(socket), private: true, tls: false, end_point: None })
}

/// Sees to it that a dead peer is noticed and that a status is not held back.
fn prepare(tcp: &TcpStream, keepalive: Keepalive) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(tcp);
    if keepalive.on {
        let probes = TcpKeepalive::new()
            .with_time(keepalive.idle)
            .with_interval(keepalive.interval)
            .with_retries(keepalive.count);
        socket.set_tcp_keepalive(&probes)?;
    }
    socket.set_tcp_user_timeout(keepalive.user_timeout)
}

/// Asks for TLS. Exactly one byte is read: whatever else arrived before the handshake is not of the server.
async fn offers_tls(tcp: &mut TcpStream, server: &str) -> Result<bool, PgError> {
    let lost = |source| PgError::Lost { server: server.to_owned(), doing: "asking for TLS".to_owned(), source };
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    tcp.write_all(&request).await.map_err(lost)?;
    match tcp.read_u8().await {
        Ok(b'S') => Ok(true),
        Ok(b'N') => Ok(false),
        // An error this early (too many clients, out of memory) cannot be trusted, and is not shown.
        Ok(b'E') => Err(PgError::Closed { server: server.to_owned(), doing: "asking for TLS".to_owned() }),
        Ok(other) => Err(PgError::Protocol {
            server: server.to_owned(),
            reason: format!("{:?} where TLS was asked for; is this PostgreSQL?", char::from(other)),
        }),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(PgError::Closed { server: server.to_owned(), doing: "asking for TLS".to_owned() })
        }
        Err(error) => Err(lost(error)),
    }
}

/// The `options` of the startup packet: the conninfo's, then ours. The server splits it at white space.
fn server_options(given: Option<&str>, gucs: &[(String, String)]) -> String {
    let mut options = given.unwrap_or_default().to_owned();
    for (name, value) in gucs {
        if !options.is_empty() {
            options.push(' ');
        }
        options.push_str("-c ");
        for c in format!("{name}={value}").chars() {
            if c.is_ascii_whitespace() || c == '\x0b' || c == '\\' {
                options.push('\\');
            }
            options.push(c);
        }
    }
    options
}

/// Whether the server is what `target_session_attrs` wants. From 14 on it says so at login; older ones are asked.
async fn has_role(connection: &mut Connection, wanted: TargetSessionAttrs, purpose: Purpose) -> Result<bool, PgError> {
    let (needs_standby, needs_read_only) = match wanted {
        TargetSessionAttrs::Any | TargetSessionAttrs::PreferStandby => return Ok(true),
        TargetSessionAttrs::ReadWrite => (None, Some(false)),
        TargetSessionAttrs::ReadOnly => (None, Some(true)),
        TargetSessionAttrs::Primary => (Some(false), None),
        TargetSessionAttrs::Standby => (Some(true), None),
    };
    let reported = |connection: &Connection, name: &str| connection.parameter(name).map(|value| value == "on");
    let (standby, read_only) =
        match (reported(connection, "in_hot_standby"), reported(connection, "default_transaction_read_only")) {
            (Some(standby), Some(read_only)) => (standby, standby || read_only),
            // 13: SQL can ask. A walsender has only SHOW, whose transaction_read_only is on in recovery.
            _ => {
                let yes = |rows: Vec<super::wire::Row>| {
                    rows.first().and_then(|row| row.get(0)).is_some_and(|value| matches!(value, "on" | "t"))
                };
                let read_only = yes(connection.query("SHOW transaction_read_only").await?);
                let standby = match purpose {
                    Purpose::Sql => yes(connection.query("SELECT pg_catalog.pg_is_in_recovery()").await?),
                    Purpose::Replication => read_only,
                };
                (standby, read_only)
            }
        };
    Ok(needs_standby.is_none_or(|needed| needed == standby) && needs_read_only.is_none_or(|needed| needed == read_only))
}
