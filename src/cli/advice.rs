//! What to run on the server when it does not let us in or has no room for us. Pure: from its answer to lines of SQL and
//! of `pg_hba.conf`.
//!
//! A server may answer in another language, so SQLSTATE decides; its words only add an address.

use crate::pg::{ConnInfo, PgError, quote_ident};

/// What is missing, and how to add it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Advice {
    /// To run as a superuser on the server.
    pub sql: Vec<String>,
    /// To add to `pg_hba.conf`, before the first line that fits.
    pub hba: Vec<String>,
    /// What else to do: `restart the server`.
    pub then: Option<String>,
}

impl Advice {
    /// As lines for a person.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.sql.is_empty() {
            lines.push("run as a superuser on the server:".to_owned());
            lines.extend(self.sql.iter().map(|sql| format!("  {sql}")));
        }
        if !self.hba.is_empty() {
            lines.push("add to pg_hba.conf, before the lines that are there:".to_owned());
            lines.extend(self.hba.iter().map(|line| format!("  {line}")));
            lines.push("and make it count:".to_owned());
            lines.push("  SELECT pg_reload_conf();".to_owned());
        }
        lines.extend(self.then.clone());
        lines
    }

    /// In one line.
    pub fn text(&self) -> String {
        let mut parts: Vec<String> = Vec::new();
        if !self.sql.is_empty() {
            parts.push(format!("run {}", self.sql.join(" ")));
        }
        if !self.hba.is_empty() {
            parts.push(format!("add to pg_hba.conf: {} (then SELECT pg_reload_conf();)", self.hba.join("; ")));
        }
        parts.extend(self.then.clone());
        parts.join("; ")
    }
}

/// What was tried when the server said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tried {
    /// A walsender session or a command on it.
    Replication,
    /// An SQL session.
    Sql,
}

/// Settings that a cluster needs to be streamed from at all; they count after a restart.
pub const RESTART: &str = "then restart the server: these settings count from its next start";

/// What to do about `error`; empty where the error itself says all that can be said.
pub fn advise(error: &PgError, tried: Tried, conninfo: &ConnInfo) -> Advice {
    let Some(server) = error.server_error() else { return Advice::default() };
    let role = quote_ident(conninfo.user());
    let says = |words: &str| server.message.contains(words);
    let sql = |lines: &[String]| Advice { sql: lines.to_vec(), ..Advice::default() };
    match server.sqlstate.as_str() {
        "42501" if tried == Tried::Replication => sql(&[format!("ALTER ROLE {role} REPLICATION;")]),
        // One SQLSTATE for several reasons, and only words tell them apart: that no entry fits is by far the usual one.
        "28000" if says("does not exist") => sql(&[format!("CREATE ROLE {role} LOGIN REPLICATION PASSWORD '...';")]),
        "28000" if says("not permitted to log in") => sql(&[format!("ALTER ROLE {role} LOGIN;")]),
        "28000" if says("Peer authentication failed") => Advice {
            then: Some(format!("run pgkeep as the operating system's user {role}, or name another role")),
            ..Advice::default()
        },
        "28000" => Advice { hba: vec![hba_line(&server.message, tried, conninfo)], ..Advice::default() },
        "28P01" => Advice {
            then: Some(format!(
                "put the password of {role} into ~/.pgpass (mode 0600) of the user that runs pgkeep, or name another \
                 file with passfile=..."
            )),
            ..Advice::default()
        },
        "53300" if tried == Tried::Replication => Advice {
            sql: vec![
                "ALTER SYSTEM SET wal_level = 'replica';".to_owned(),
                "ALTER SYSTEM SET max_wal_senders = 10;".to_owned(),
            ],
            hba: Vec::new(),
            then: Some(RESTART.to_owned()),
        },
        "53400" | "55000" if tried == Tried::Replication && says("replication slot") => Advice {
            sql: vec![
                "ALTER SYSTEM SET wal_level = 'replica';".to_owned(),
                "ALTER SYSTEM SET max_replication_slots = 10;".to_owned(),
            ],
            hba: Vec::new(),
            then: Some(RESTART.to_owned()),
        },
        "3D000" => Advice { then: Some("add dbname=postgres to the conninfo".to_owned()), ..Advice::default() },
        _ => Advice::default(),
    }
}

/// The line that lets us in: `host "10.0.0.5"` is how the server sees us.
fn hba_line(message: &str, tried: Tried, conninfo: &ConnInfo) -> String {
    let database = match tried {
        Tried::Replication => "replication".to_owned(),
        Tried::Sql => hba_name(conninfo.database()),
    };
    let user = hba_name(conninfo.user());
    let seen_as = message.split_once("host \"").and_then(|(_, rest)| rest.split_once('"')).map(|(address, _)| address);
    match seen_as {
        Some("[local]") => format!("local  {database}  {user}  scram-sha-256"),
        Some(address) => {
            let bits = if address.contains(':') { 128 } else { 32 };
            format!("host  {database}  {user}  {address}/{bits}  scram-sha-256")
        }
        None if conninfo.is_remote() => format!("host  {database}  {user}  ADDRESS-OF-THIS-HOST/32  scram-sha-256"),
        None => format!("local  {database}  {user}  scram-sha-256"),
    }
}

/// A name as `pg_hba.conf` takes it: quoted, where it could be taken for a keyword or falls apart.
fn hba_name(name: &str) -> String {
    let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    let keyword = matches!(name, "all" | "replication" | "sameuser" | "samerole");
    if plain && !keyword && !name.is_empty() { name.to_owned() } else { format!("\"{name}\"") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::ServerError;

    fn refused(sqlstate: &str, message: &str) -> PgError {
        let (sqlstate, message) = (sqlstate.to_owned(), message.to_owned());
        PgError::Server(Box::new(ServerError { sqlstate, message, ..ServerError::default() }))
    }

    fn info(text: &str) -> ConnInfo {
        text.parse().unwrap()
    }

    #[test]
    fn what_the_server_refuses_is_answered_by_what_to_run() {
        let local = info("host=/run/postgresql user=keeper dbname=postgres");
        let remote = info("host=db.example user=Keeper dbname=postgres");
        let no_entry =
            r#"no pg_hba.conf entry for replication connection from host "10.0.0.5", user "Keeper", no encryption"#;
        let cases = [
            (
                refused("42501", "permission denied to start WAL sender"),
                &local,
                "run ALTER ROLE \"keeper\" REPLICATION;",
            ),
            (
                refused("28000", no_entry),
                &remote,
                "add to pg_hba.conf: host  replication  \"Keeper\"  10.0.0.5/32  scram-sha-256 (then SELECT pg_reload_conf();)",
            ),
            (
                refused(
                    "28000",
                    r#"no pg_hba.conf entry for replication connection from host "[local]", user "keeper""#,
                ),
                &local,
                "add to pg_hba.conf: local  replication  keeper  scram-sha-256 (then SELECT pg_reload_conf();)",
            ),
            (
                refused("28000", "kein passender Eintrag"),
                &remote,
                "add to pg_hba.conf: host  replication  \"Keeper\"  ADDRESS-OF-THIS-HOST/32  scram-sha-256 (then SELECT pg_reload_conf();)",
            ),
            (
                refused("28000", r#"role "keeper" does not exist"#),
                &local,
                "run CREATE ROLE \"keeper\" LOGIN REPLICATION PASSWORD '...';",
            ),
        ];
        for (error, conninfo, want) in cases {
            assert_eq!(advise(&error, Tried::Replication, conninfo).text(), want, "{error}");
        }
        let full = advise(&refused("53300", "number of requested standby connections"), Tried::Replication, &local);
        assert!(full.text().contains("max_wal_senders = 10") && full.text().contains("restart"), "{}", full.text());
        assert_eq!(advise(&refused("XX000", "cache lookup failed"), Tried::Sql, &local), Advice::default());
    }

    #[test]
    fn names_that_pg_hba_would_misread_are_quoted() {
        for (name, want) in [("keeper", "keeper"), ("Keeper", "\"Keeper\""), ("all", "\"all\""), ("a b", "\"a b\"")] {
            assert_eq!(hba_name(name), want);
        }
    }
}
