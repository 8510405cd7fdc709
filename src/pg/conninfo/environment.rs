//! Where settings come from that the conninfo leaves out: `PG*` variables, service files, the home directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Host, PgError, bad};

/// libpq's keywords, with the variable that stands in for each.
const KEYWORDS: &[(&str, &str)] = &[
    ("application_name", "PGAPPNAME"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("client_encoding", "PGCLIENTENCODING"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("dbname", "PGDATABASE"),
    ("fallback_application_name", ""),
    ("gssdelegation", "PGGSSDELEGATION"),
    ("gssencmode", "PGGSSENCMODE"),
    ("gsslib", "PGGSSLIB"),
    ("host", "PGHOST"),
    ("hostaddr", "PGHOSTADDR"),
    ("keepalives", ""),
    ("keepalives_count", ""),
    ("keepalives_idle", ""),
    ("keepalives_interval", ""),
    ("krbsrvname", "PGKRBSRVNAME"),
    ("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    ("max_protocol_version", "PGMAXPROTOCOLVERSION"),
    ("min_protocol_version", "PGMINPROTOCOLVERSION"),
    ("oauth_client_id", ""),
    ("oauth_client_secret", ""),
    ("oauth_issuer", ""),
    ("oauth_scope", ""),
    ("options", "PGOPTIONS"),
    ("passfile", "PGPASSFILE"),
    ("password", "PGPASSWORD"),
    ("port", "PGPORT"),
    ("replication", ""),
    ("require_auth", "PGREQUIREAUTH"),
    ("requirepeer", "PGREQUIREPEER"),
    ("requiressl", "PGREQUIRESSL"),
    ("scram_client_key", ""),
    ("scram_server_key", ""),
    ("service", "PGSERVICE"),
    ("servicefile", "PGSERVICEFILE"),
    ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    ("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    ("sslcert", "PGSSLCERT"),
    ("sslcertmode", "PGSSLCERTMODE"),
    ("sslcompression", "PGSSLCOMPRESSION"),
    ("sslcrl", "PGSSLCRL"),
    ("sslcrldir", "PGSSLCRLDIR"),
    ("sslkey", "PGSSLKEY"),
    ("sslkeylogfile", ""),
    ("sslmode", "PGSSLMODE"),
    ("sslnegotiation", "PGSSLNEGOTIATION"),
    ("sslpassword", ""),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslsni", "PGSSLSNI"),
    ("target_session_attrs", "PGTARGETSESSIONATTRS"),
    ("tcp_user_timeout", ""),
    ("user", "PGUSER"),
];

/// Directories where servers put their sockets: Debian's and Red Hat's, then PostgreSQL's own default.
const SOCKET_DIRECTORIES: [&str; 3] = ["/var/run/postgresql", "/run/postgresql", "/tmp"];

pub(super) fn is_keyword(word: &str) -> bool {
    KEYWORDS.iter().any(|(keyword, _)| *keyword == word)
}

/// The password file calls a default socket `localhost`.
pub(super) fn is_default_socket_directory(directory: &str) -> bool {
    SOCKET_DIRECTORIES.contains(&directory)
}

/// What surrounds a conninfo. `Debug` is left out: variables may hold a password.
#[derive(Clone, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
    home: Option<PathBuf>,
    user: Option<String>,
}

impl Environment {
    /// This process's: its `PG*` variables, home directory and operating-system user.
    pub fn of_process() -> Environment {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name.starts_with("PG"))
            .collect();
        let uid = rustix::process::geteuid().as_raw();
        // libpq asks the system's user database by the effective user; a file suffices where it is one.
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let mut entries = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let entry = entries.find(|fields| fields.get(2).and_then(|field| field.parse().ok()) == Some(uid));
        let field = |index: usize| entry.as_ref().and_then(|fields| fields.get(index)).map(|text| (*text).to_owned());
        Environment {
            variables,
            home: std::env::var_os("HOME")
                .filter(|home| !home.is_empty())
                .map(PathBuf::from)
                .or_else(|| field(5).map(PathBuf::from)),
            user: field(0).or_else(|| std::env::var("USER").ok()),
        }
    }

    /// One made up, so that nothing of this machine leaks into a result.
    pub fn new(
        variables: impl IntoIterator<Item = (String, String)>,
        home: Option<PathBuf>,
        user: Option<String>,
    ) -> Environment {
        Environment { variables: variables.into_iter().collect(), home, user }
    }

    pub(super) fn user(&self) -> Option<String> {
        self.user.clone()
    }

    pub(super) fn in_home(&self, name: &str) -> Option<PathBuf> {
        self.home.as_ref().map(|home| home.join(name))
    }

    fn variable(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The directory that holds a socket for `port`, else the first that exists.
    pub(super) fn default_socket_directory(&self, port: u16) -> String {
        let with_socket = SOCKET_DIRECTORIES.iter().find(|place| Path::new(&Host::socket_path(place, port)).exists());
        let existing = || SOCKET_DIRECTORIES.iter().find(|place| Path::new(place).is_dir());
        with_socket.or_else(existing).map_or("/tmp", |place| place).to_owned()
    }

    /// Adds what `settings` leaves out: first from the service it names, then from variables.
    pub(super) fn complete(&self, settings: &mut BTreeMap<String, String>) -> Result<(), PgError> {
        let service = settings.get("service").map(String::as_str).or(self.variable("PGSERVICE"));
        if let Some(service) = service.filter(|name| !name.is_empty()).map(str::to_owned) {
            for (keyword, value) in self.service(&service, settings.get("servicefile").map(String::as_str))? {
                settings.entry(keyword).or_insert(value);
            }
        }
        for (keyword, variable) in KEYWORDS.iter().filter(|(_, variable)| !variable.is_empty()) {
            if let Some(value) = self.variables.get(*variable) {
                settings.entry((*keyword).to_owned()).or_insert_with(|| value.clone());
            }
        }
        Ok(())
    }

    fn service(&self, name: &str, file: Option<&str>) -> Result<Vec<(String, String)>, PgError> {
        let named = file.filter(|file| !file.is_empty()).or(self.variable("PGSERVICEFILE")).map(PathBuf::from);
        let own = named.clone().or_else(|| self.in_home(".pg_service.conf"));
        let folder = self.variable("PGSYSCONFDIR").unwrap_or("/etc/postgresql-common");
        for path in own.into_iter().chain([Path::new(folder).join("pg_service.conf")]) {
            match std::fs::read_to_string(&path) {
                Ok(text) => {
                    if let Some(settings) = read_service(&text, name, &path)? {
                        return Ok(settings);
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.as_ref() != Some(&path) => {}
                Err(error) => return Err(bad(format!("cannot read the service file {}: {error}", path.display()))),
            }
        }
        Err(bad(format!("no service file defines the service {name:?}")))
    }
}

/// The settings of section `name`, or `None` if there is no such section.
fn read_service(text: &str, name: &str, path: &Path) -> Result<Option<Vec<(String, String)>>, PgError> {
    let mut found: Option<Vec<(String, String)>> = None;
    for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(section) = line.strip_prefix('[') {
            if found.is_some() {
                break; // the first section of a name counts
            }
            if section.strip_suffix(']') == Some(name) {
                found = Some(Vec::new());
            }
            continue;
        }
        let Some(settings) = &mut found else { continue };
        let pair = line.split_once('=').filter(|(keyword, _)| is_keyword(keyword) && *keyword != "service");
        let Some((keyword, value)) = pair else {
            return Err(bad(format!("{} line {number} is not a connection setting", path.display())));
        };
        if !settings.iter().any(|(known, _)| known == keyword) {
            settings.push((keyword.to_owned(), value.to_owned()));
        }
    }
    Ok(found)
}
