//! What the relations of a server are called: a picture of `pg_class` of every database that lets us in.
//!
//! Bounded: [`RELATIONS_MAX`] relations of each database, one connection at a time, the options' deadline for each query.
//! Cancellation: nothing is left behind on the server.

use super::connect::ConnectOptions;
use super::conninfo::ConnInfo;
use super::error::PgError;
use super::query::Session;
use super::wire::Row;
use crate::types::Lsn;

/// Relations that are taken of one database.
pub const RELATIONS_MAX: usize = 200_000;

/// A relation that has files, or had none of its own (a partitioned table).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// Its OID.
    pub oid: u32,
    /// The number of its file; 0 where it has none.
    pub file: u32,
    /// OID of its tablespace, never 0.
    pub tablespace: u32,
    /// Its schema; of a TOAST table its owner's.
    pub schema: String,
    /// Its name; of a TOAST table its owner's.
    pub name: String,
    /// `pg_class.relkind`.
    pub kind: char,
}

/// The relations of a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    /// Its OID.
    pub oid: u32,
    /// Its name.
    pub name: String,
    /// Users' relations, by OID.
    pub relations: Vec<Relation>,
    /// Why not all of them are here.
    pub left_out: Option<String>,
}

/// A picture of all databases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Databases {
    /// The server's WAL position before the first catalog was read.
    pub lsn: Lsn,
    /// By OID, templates included.
    pub databases: Vec<Database>,
}

const DATABASES: &str = "SELECT oid, datname, datallowconn, \
    CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() \
    ELSE pg_catalog.pg_current_wal_lsn() END FROM pg_catalog.pg_database ORDER BY oid";

const RELATIONS: &str = "SELECT c.oid, COALESCE(pg_catalog.pg_relation_filenode(c.oid), 0), \
    COALESCE(NULLIF(c.reltablespace, 0), d.dattablespace), n.nspname, COALESCE(o.relname, c.relname), c.relkind \
    FROM pg_catalog.pg_class c \
    JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database() \
    LEFT JOIN pg_catalog.pg_class o ON c.relkind = 't' AND o.reltoastrelid = c.oid \
    JOIN pg_catalog.pg_namespace n ON n.oid = COALESCE(o.relnamespace, c.relnamespace) \
    WHERE c.oid >= 16384 AND c.relpersistence <> 't' AND c.relkind IN ('r', 'i', 'S', 't', 'm', 'p', 'I') \
    ORDER BY c.oid";

/// Asks a server for the names of its relations, in every database that can be connected to.
///
/// # Errors
/// What the server says in the conninfo's own database. Another database that does not let us in is left out, and says so.
pub async fn relations(info: &ConnInfo, options: &ConnectOptions) -> Result<Databases, PgError> {
    let mut session = Session::connect(info, options).await?;
    let rows = session.query(DATABASES).await;
    session.close().await;
    let mut lsn = None;
    let mut databases = Vec::new();
    for row in rows? {
        let (oid, name) = (row.parse(0)?, row.parse::<String>(1)?);
        lsn = lsn.or(row.get(3).and_then(|lsn| lsn.parse().ok()));
        let (relations, left_out) = match row.get(2) {
            Some("t") => match of_database(&info.with_database(&name), options).await {
                Ok((relations, left_out)) => (relations, left_out),
                Err(error) => (Vec::new(), Some(error.to_string())),
            },
            _ => (Vec::new(), Some("it allows no connections".to_owned())),
        };
        databases.push(Database { oid, name, relations, left_out });
    }
    Ok(Databases { lsn: lsn.unwrap_or(Lsn::ZERO), databases })
}

async fn of_database(info: &ConnInfo, options: &ConnectOptions) -> Result<(Vec<Relation>, Option<String>), PgError> {
    let mut session = Session::connect(info, options).await?;
    let rows = session.query(&format!("{RELATIONS} LIMIT {}", RELATIONS_MAX + 1)).await;
    session.close().await;
    let mut relations = rows?.iter().map(relation).collect::<Result<Vec<_>, _>>()?;
    let left_out = (relations.len() > RELATIONS_MAX).then(|| format!("it has more than {RELATIONS_MAX} relations"));
    relations.truncate(RELATIONS_MAX);
    Ok((relations, left_out))
}

fn relation(row: &Row) -> Result<Relation, PgError> {
    Ok(Relation {
        oid: row.parse(0)?,
        file: row.parse(1)?,
        tablespace: row.parse(2)?,
        schema: row.parse(3)?,
        name: row.parse(4)?,
        kind: row.parse(5)?,
    })
}
