//! PostgreSQL from outside: connections, replication commands, the WAL stream.
//!
//! One connection mechanism serves SQL sessions ([`Session`]) and physical replication sessions ([`Replication`]), so
//! that a conninfo means one thing: what libpq means by it ([`ConnInfo`]).
//!
//! What always holds: every wait on the network has a deadline; a command that was given up in the middle leaves its
//! connection unusable, never out of step; passwords appear in no message, log line or `Debug` output. Nothing here
//! writes to disk; after a crash the server notices the closed connection.

mod base_backup;
mod connect;
mod connection;
pub mod conninfo;
pub mod control_file;
mod error;
pub mod instance;
mod query;
pub mod relations;
mod replication;
mod segment_digest;
pub mod tar;
mod tls;
mod wire;

pub use base_backup::{BackupEvent, BaseBackup, BaseBackupOptions, CheckpointSpeed, Tablespace};
pub use connect::{ConnectOptions, Dial};
pub(crate) use connection::Connection;
pub use conninfo::ConnInfo;
pub use error::{PgError, ServerError, ServerErrorKind};
pub use query::Session;
pub use replication::{Replication, SlotPosition, Started, StreamEvent, SystemIdentity, TimelineEnd, WalStream};
pub use segment_digest::segment_digest;
pub(crate) use wire::{Message, quote_label};
pub use wire::{Row, Status, quote_ident, quote_literal};
