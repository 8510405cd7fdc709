//! SQL over the simple query protocol, all values as text.

use super::connect::{ConnectOptions, Purpose, connect};
use super::connection::Connection;
use super::conninfo::ConnInfo;
use super::error::PgError;
use super::wire::Row;

/// A session that speaks SQL.
///
/// A query that was dropped before its answer leaves the session unusable: the next one is told that it is closed.
pub struct Session {
    connection: Connection,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({})", self.connection.server())
    }
}

impl Session {
    /// Connects to the first host that will do, to the database of `info`.
    pub async fn connect(info: &ConnInfo, options: &ConnectOptions) -> Result<Session, PgError> {
        Ok(Session { connection: connect(info, options, Purpose::Sql).await? })
    }

    /// Runs `sql` and returns the rows of its last result set. Deadline: the options' `timeout`.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Row>, PgError> {
        self.connection.query(sql).await
    }

    /// `server_version_num`, 150018 for 15.18.
    pub fn server_version_num(&self) -> u32 {
        self.connection.server_version_num()
    }

    /// Where this session ended up, for messages: host and port, or the socket's path.
    pub fn server(&self) -> &str {
        self.connection.server()
    }

    /// Takes leave of the server. Dropping the session does as well, less politely.
    pub async fn close(self) {
        self.connection.close().await;
    }
}
