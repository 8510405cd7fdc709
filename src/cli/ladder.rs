//! The durability ladder of a cluster, as another process than `pgkeep run` can know it: how far the server is, what it has
//! sent and was told, and what the repositories hold themselves.
//!
//! The server is asked first: what a repository holds later may be more, so that nothing is shown as durable that was not.
//! What only `pgkeep run` knows, how long it took lately from arrival to durable, is in its log; the server measures a lag of
//! its own for the newest report. A server that does not answer hides nothing else.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::standing::Standing;
use super::{CliError, open, output};
use crate::config::ClusterConfig;
use crate::pg::{ConnectOptions, PgError, Row, Session, quote_literal};
use crate::types::{Branch, Lsn};

/// A person waits, and the server may be what was lost.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// For everything that is asked of it.
const DEADLINE: Duration = Duration::from_secs(5);

/// What the server says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct ServerSide {
    /// The end of what it has flushed itself (of a standby: received).
    pub end: Option<Lsn>,
    /// When it said so, by its clock.
    pub asked_at: Option<Timestamp>,
    /// How it counts us: `async`, `sync`, `potential`, `quorum`; `null` where nobody streams from our slot, or this role may
    /// not see it.
    pub sync_state: Option<String>,
    /// What it has sent us.
    pub sent: Option<Lsn>,
    /// What we have told it to have received; in synchronous mode that is what is durable.
    pub written: Option<Lsn>,
    /// What we have told it to be durable.
    pub flushed: Option<Lsn>,
    /// How long the newest report came after its own flush, in milliseconds, as it measured.
    pub flush_lag_ms: Option<u64>,
}

/// The rungs of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Ladder {
    /// Its name in the configuration.
    pub cluster: String,
    /// `null`: it does not answer, or does not say.
    pub server: Option<ServerSide>,
    /// Why it does not.
    pub server_is_away: Option<String>,
    pub synchronous: bool,
    /// The best repository's end of WAL without a hole.
    pub durable_in_one: Option<Lsn>,
    /// How many repositories must hold what is acknowledged.
    pub needed: usize,
    /// What so many hold; `null` where fewer answer.
    pub durable: Option<Lsn>,
    /// The server's end less that.
    pub behind_bytes: Option<u64>,
    /// How much older the newest commit that is durable is than the server's answer: what is missing is not older. 0 where
    /// nothing is missing.
    pub behind_seconds_at_most: Option<u64>,
}

/// Asks the server of a cluster.
pub(super) async fn ask(config: &ClusterConfig) -> Result<ServerSide, String> {
    let asked = tokio::time::timeout(DEADLINE, answer(config));
    match asked.await {
        Ok(Ok(side)) => Ok(side),
        Ok(Err(error)) => Err(error.sentence()),
        Err(_) => Err(format!("no answer within {} s", DEADLINE.as_secs())),
    }
}

async fn answer(config: &ClusterConfig) -> Result<ServerSide, CliError> {
    let source = open::source(config)?;
    let connect = ConnectOptions { timeout: CONNECT_TIMEOUT, ..source.connect };
    let asked: Result<Vec<Row>, PgError> = async {
        let mut session = Session::connect(&source.conninfo, &connect).await?;
        let sql = format!(
            "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_receive_lsn() \
             ELSE pg_catalog.pg_current_wal_flush_lsn() END, \
             (extract(epoch FROM pg_catalog.clock_timestamp()) * 1000000)::int8, \
             r.sync_state, r.sent_lsn, r.write_lsn, r.flush_lsn, (extract(epoch FROM r.flush_lag) * 1000)::int8 \
             FROM (VALUES ({})) AS ours(slot) LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = ours.slot \
             LEFT JOIN pg_catalog.pg_stat_replication r ON r.pid = s.active_pid",
            quote_literal(&source.slot)
        );
        let rows = session.query(&sql).await;
        session.close().await;
        rows
    }
    .await;
    let rows = asked.map_err(open::server_error)?;
    Ok(rows.first().map(read).unwrap_or_default())
}

fn read(row: &Row) -> ServerSide {
    let lsn = |column: usize| row.get(column).and_then(|lsn| lsn.parse().ok());
    let number = |column: usize| row.get(column).and_then(|text| text.parse::<i64>().ok());
    ServerSide {
        end: lsn(0),
        asked_at: number(1).and_then(|micros| Timestamp::from_microsecond(micros).ok()),
        sync_state: row.get(2).map(str::to_owned),
        sent: lsn(3),
        written: lsn(4),
        flushed: lsn(5),
        flush_lag_ms: number(6).and_then(|ms| u64::try_from(ms).ok()),
    }
}

/// Puts both together. `held`: what the cluster's repositories that answer hold of it.
pub(super) fn ladder(config: &ClusterConfig, server: Result<ServerSide, String>, held: &[&Standing]) -> Ladder {
    let (server, server_is_away) = match server {
        Ok(server) => (Some(server), None),
        Err(why) => (None, Some(why)),
    };
    let mut ends: Vec<((Branch, Lsn), Option<Timestamp>)> =
        held.iter().filter_map(|standing| Some((standing.frontier?, standing.as_of))).collect();
    ends.sort_unstable_by_key(|end| std::cmp::Reverse(end.0));
    let enough = config.acknowledge.checked_sub(1).and_then(|at| ends.get(at)).copied();
    let end = server.as_ref().and_then(|server| server.end);
    let behind_bytes = end.zip(enough).map(|(end, ((_, held), _))| end.bytes_since(held).unwrap_or(0));
    let seconds = || {
        let (asked, newest) = server.as_ref()?.asked_at.zip(enough?.1)?;
        Some(u64::try_from(asked.duration_since(newest).as_secs()).unwrap_or(0))
    };
    Ladder {
        cluster: config.name.to_string(),
        behind_seconds_at_most: if behind_bytes == Some(0) { Some(0) } else { behind_bytes.and_then(|_| seconds()) },
        server,
        server_is_away,
        synchronous: config.synchronous,
        durable_in_one: ends.first().map(|((_, held), _)| *held),
        needed: config.acknowledge,
        durable: enough.map(|((_, held), _)| held),
        behind_bytes,
    }
}

impl Ladder {
    /// For a person.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("Cluster {}: what is safe", self.cluster)];
        let mut rung = |name: &str, at: Option<Lsn>, remark: String| {
            if let Some(at) = at {
                lines.push(format!("  {name:<16} {at}{}{remark}", if remark.is_empty() { "" } else { "  " }));
            }
        };
        match (&self.server, &self.server_is_away) {
            (Some(server), _) => {
                rung("Server", server.end, String::new());
                let counts = server.sync_state.as_deref().map(|state| format!("the server counts pgkeep as {state}"));
                rung("Sent", server.sent, counts.unwrap_or_default());
                let written = server.written.filter(|_| !self.synchronous); // else it says the same as the next one
                rung("Received", written, String::new());
                let lag = server.flush_lag_ms.map(|ms| format!("{ms} ms after the server's own flush, lately"));
                rung("Acknowledged", server.flushed, lag.unwrap_or_default());
                if server.sent.is_none() {
                    lines.push("  Nobody streams from the slot, or this role may not see who does.".to_owned());
                }
            }
            (None, Some(why)) => {
                lines.push(format!("  The server does not answer, so what it has beyond is not known: {why}"))
            }
            (None, None) => {}
        }
        let mut rung = |name: String, at: Option<Lsn>, remark: String| match at {
            Some(at) => lines.push(format!("  {name:<16} {at}{}{remark}", if remark.is_empty() { "" } else { "  " })),
            None => lines.push(format!("  {name:<16} too few repositories that answer hold anything")),
        };
        let behind = match (self.behind_bytes, self.behind_seconds_at_most) {
            (Some(0), _) => "all that the server had flushed".to_owned(),
            (Some(bytes), Some(seconds)) => {
                format!("{} and at most {seconds} s behind the server", output::bytes(bytes))
            }
            (Some(bytes), None) => format!("{} behind the server", output::bytes(bytes)),
            (None, _) => String::new(),
        };
        if self.needed > 1 {
            rung("Durable in one".to_owned(), self.durable_in_one, String::new());
        }
        let name = if self.needed > 1 { format!("Durable in {}", self.needed) } else { "Durable".to_owned() };
        rung(name, self.durable, behind);
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{SegmentSize, TimelineId};

    fn config(settings: &str) -> ClusterConfig {
        let text = format!(
            "[repository.a]\npath = \"/a\"\nkey_file = \"/k\"\n[repository.b]\npath = \"/b\"\nkey_file = \"/k\"\n\
             [cluster.main]\nconninfo = \"host=/x\"\nrepositories = [\"a\", \"b\"]\n{settings}\n"
        );
        crate::config::Config::parse(&text, std::path::Path::new("/pgkeep.toml")).unwrap().clusters.remove(0)
    }

    fn at(repository: &str, lsn: u64, second: i64) -> Standing {
        Standing {
            repository: repository.to_owned(),
            frontier: Some((Branch::first(TimelineId::FIRST), Lsn::new(lsn))),
            as_of: Timestamp::from_second(second).ok(),
            segment_size: SegmentSize::new(1 << 20),
        }
    }

    fn server(end: u64) -> Result<ServerSide, String> {
        let asked_at = Timestamp::from_second(1000).ok();
        let (sent, flushed) = (Some(Lsn::new(end)), Some(Lsn::new(end - 9)));
        Ok(ServerSide { end: Some(Lsn::new(end)), asked_at, sent, flushed, ..ServerSide::default() })
    }

    #[test]
    fn what_enough_repositories_hold_is_what_counts() {
        let (one, other) = (at("a", 500, 999), at("b", 400, 990));
        let all = ladder(&config("acknowledge = 2"), server(500), &[&one, &other]);
        assert_eq!((all.durable_in_one, all.durable), (Some(Lsn::new(500)), Some(Lsn::new(400))));
        assert_eq!((all.behind_bytes, all.behind_seconds_at_most), (Some(100), Some(10)));
        assert!(
            all.lines().iter().any(|line| line.contains("Durable in 2     0/190  100 bytes and at most 10 s behind"))
        );
        let any = ladder(&config("acknowledge = 1"), server(500), &[&one, &other]);
        assert_eq!(
            (any.durable, any.behind_bytes, any.behind_seconds_at_most),
            (Some(Lsn::new(500)), Some(0), Some(0))
        );
        // A repository that was read later may hold more than the server had.
        assert_eq!(ladder(&config("acknowledge = 1"), server(450), &[&one]).behind_bytes, Some(0));
        let few = ladder(&config("acknowledge = 2"), server(500), &[&one]);
        assert_eq!((few.durable, few.behind_bytes), (None, None), "one of two says nothing of two");
        assert!(few.lines().iter().any(|line| line.contains("too few")));
    }

    #[test]
    fn a_server_that_does_not_answer_hides_nothing_else() {
        let held = at("a", 500, 999);
        let lost = ladder(&config("acknowledge = 1"), Err("connection refused".to_owned()), &[&held]);
        let text = lost.lines().join("\n");
        assert!(text.contains("connection refused") && text.contains("0/1F4"), "{text}");
        assert_eq!(lost.behind_bytes, None, "nobody knows what the server had");
    }
}
