//! pgkeep keeps every committed PostgreSQL transaction, and proves it.
//!
//! The data's way:
//!
//! ```text
//!             write side                     what both share                      read side
//!  PostgreSQL ──► pg ──► wal ──► archive ─┐                       ┌─► plan (pure) ──► restore ──► PostgreSQL
//!                  └────► backup ─────────┴─► catalog ─► seal ─► store ◄─┘
//! ```
//!
//! The two sides meet only in [`catalog`]. Restoring never needs the source server; archiving never needs the planner.
//! Decisions are pure values; the code that acts on them decides nothing. Who may import whom is a table in
//! `tests/architecture.rs`, and `docs/architecture.md` tells the same with words.

pub mod archive;
pub mod backup;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod copy;
pub mod daemon;
mod direct;
pub mod helper;
pub mod pg;
pub mod plan;
pub mod restore;
pub mod retention;
pub mod seal;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;
pub mod types;
pub mod verify;
pub mod wal;
