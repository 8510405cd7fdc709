//! Notes what the relations of a server are called, for who reads an index later.
//!
//! Nothing depends on it: where it fails, numbers are shown instead of names.

use crate::catalog::CatalogError;
use crate::catalog::relations::{DatabaseNames, RelationNames};
use crate::pg::relations::relations;
use crate::pg::{ConnInfo, ConnectOptions, PgError};
use crate::types::BackupLabel;

/// Why no names were noted.
#[derive(Debug, thiserror::Error)]
pub enum NamesError {
    /// The server.
    #[error(transparent)]
    Server(#[from] PgError),
    /// The repository.
    #[error(transparent)]
    Repository(#[from] CatalogError),
}

impl NamesError {
    /// May another attempt succeed?
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Server(error) => error.is_retryable(),
            Self::Repository(error) => error.is_retryable(),
        }
    }
}

/// Asks the server for the names of its relations; `label` is the moment by our clock.
///
/// # Errors
/// What the server says.
pub async fn names_of(
    conninfo: &ConnInfo,
    connect: &ConnectOptions,
    label: BackupLabel,
) -> Result<RelationNames, NamesError> {
    let all = relations(conninfo, connect).await?;
    let databases = all.databases.into_iter().map(|database| DatabaseNames {
        oid: database.oid,
        name: database.name,
        relations: database
            .relations
            .into_iter()
            .map(|r| (r.oid, r.file, r.tablespace, r.schema, r.name, r.kind))
            .collect(),
        left_out: database.left_out,
    });
    Ok(RelationNames { label, lsn: all.lsn, databases: databases.collect() })
}
