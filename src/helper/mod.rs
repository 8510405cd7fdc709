//! A process that outlives the call: what the hooks ask instead of opening repositories for every segment.
//!
//! A hook ([`ask`]) says one line on a Unix socket below `pg_wal` and waits for the answer; the helper ([`serve`]) holds keys,
//! connections and what it did ahead. What the line and the answer mean is the caller's: this room carries them.
//!
//! What always holds:
//! - A helper is nobody's dependency. Whatever does not fit (no socket, another binary, configuration, user, environment or data
//!   directory, silence, an answer cut short) is [`NoAnswer`], and the hook does the work without it.
//! - An answer is whole or none, and comes from a helper with the hook's own [`Fingerprint`].
//! - One helper of a kind per data directory, by a file lock that ends with the process.
//! - A helper leaves by itself: idle, old, without a server, when its data directory, binary, configuration or socket is
//!   not what it was.
//! - It is a child of a keeper that does nothing but wait for it and exits 0: where PostgreSQL is process 1 (containers) it
//!   adopts orphans, and takes one that was killed for a crash of its own. And it asks to be the first to go when memory runs
//!   out, before the server.
//!
//! Crash: the lock is free, and the socket left behind refuses; the next call works without it and starts another.
//! What lies on disk: `pg_wal/.pgkeep/`, mode 0700, with a socket, a lock file and a short log per kind. PostgreSQL leaves unknown
//! names in `pg_wal` alone, base backups skip what is in it.

mod ask;
mod fingerprint;
mod place;
mod protocol;
mod serve;
mod start;

#[cfg(test)]
mod tests;

pub use ask::{NoAnswer, Patience, ask};
pub use fingerprint::{Call, FileIdentity, Fingerprint};
pub use place::Place;
pub use protocol::{Answer, MAX_REQUEST, MAX_TEXT};
pub use serve::{HelperError, Left, Rules, Serve, serve};
pub use start::{NotStarted, close_on_exec, keep, start};
