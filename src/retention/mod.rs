//! Retention: what a policy asks for stays, the rest goes, and nothing goes that anybody may still need (P5).
//!
//! ```text
//! policy (pure): what a repository holds + what is to be kept + now -> what goes
//! sweep (acts):  records it, and removes it by and by, in an order in which a crash is never a lie
//! due (pure):    when `pgkeep run` does it
//! ```
//!
//! There is no lock: whoever takes a base backup puts its `start` and then reads what is condemned; whoever expires puts what
//! is condemned and then reads the starts. So one of the two sees the other, whatever the order.

pub mod due;
pub mod policy;
pub mod sweep;

pub use policy::{Decision, Keep, Policy, decide};
pub use sweep::{Swept, look, sweep};
