//! What can go wrong below a key, sorted by what the caller does next.

use std::fmt;
use std::time::Duration;

use super::Key;

/// The cause under an error, from whichever library met it.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// What was being done, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// Opening or creating the store itself.
    Open,
    /// [`Store::put_new`](super::Store::put_new).
    Put,
    /// [`Store::get`](super::Store::get).
    Get,
    /// [`Store::head`](super::Store::head).
    Head,
    /// [`Store::list`](super::Store::list).
    List,
    /// [`Store::sync`](super::Store::sync).
    Sync,
    /// [`Store::delete`](super::Store::delete).
    Delete,
    /// [`Store::open_tail`](super::Store::open_tail).
    OpenTail,
    /// [`Tail::append`](super::Tail::append).
    Append,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::Open => "open",
            Op::Put => "write",
            Op::Get => "read",
            Op::Head => "look at",
            Op::List => "list",
            Op::Sync => "sync",
            Op::Delete => "delete",
            Op::OpenTail => "create tail",
            Op::Append => "append to",
        })
    }
}

/// Why a store did not do what it was asked. `at` is a key or prefix, with the path before it where there is one.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// An answer, not a fault: readers ask on purpose.
    #[error("no object at {key}")]
    NotFound {
        /// What was asked for.
        key: Key,
    },
    /// `put_new` met other bytes under this key, or `open_tail` met any.
    #[error("{key} already holds different content; hint: do two servers or two archivers write here?")]
    Conflict {
        /// The name that is taken.
        key: Key,
    },
    /// A fault that may pass by itself: an I/O error, throttling, a 5xx answer, a reset connection.
    #[error("could not {op} {at}: the store did not answer as it should: {source}")]
    Unavailable {
        /// What was tried.
        op: Op,
        /// On what.
        at: String,
        /// The cause.
        source: BoxError,
    },
    /// No answer within the deadline. What was asked for may still have happened, or happen later.
    #[error("could not {op} {at}: no answer within {after:?}")]
    TimedOut {
        /// What was tried.
        op: Op,
        /// On what.
        at: String,
        /// The deadline that passed.
        after: Duration,
    },
    /// No space, or a quota is used up. Nothing was kept of what was being written.
    #[error("could not {op} {at}: no space left ({source}); hint: free space, raise the quota, or run `pgkeep expire`")]
    Full {
        /// What was tried.
        op: Op,
        /// On what.
        at: String,
        /// The cause: ENOSPC or EDQUOT.
        source: BoxError,
    },
    /// The file system is mounted read-only.
    #[error(
        "could not {op} {at}: the file system is read-only; hint: remount it read-write, and look for disk errors in the kernel's log"
    )]
    ReadOnly {
        /// What was tried.
        op: Op,
        /// On what.
        at: String,
    },
    /// The store knows us and says no.
    #[error("could not {op} {at}: {source}; hint: {hint}")]
    Denied {
        /// What was tried.
        op: Op,
        /// On what.
        at: String,
        /// The cause.
        source: BoxError,
        /// What a person can do.
        hint: String,
    },
    /// The store itself is not there, or not the one that was opened. It is never made anew: an unmounted repository
    /// would otherwise be continued on the disk below its mount point.
    #[error(
        "{store} is not there: {reason}; hint: is it mounted, is its name right? a new repository is made by `pgkeep init` only"
    )]
    Vanished {
        /// [`Store::describe`](super::Store::describe).
        store: String,
        /// What was seen in its place.
        reason: String,
    },
    /// Something lies there that no store of ours leaves behind: a symbolic link, a device, a tail cut from outside.
    #[error("{at} is damaged: {detail}")]
    Damaged {
        /// Where.
        at: String,
        /// What was found.
        detail: String,
    },
    /// The store cannot do this at all.
    #[error("could not {op} {at}: {reason}")]
    Unsupported {
        /// What was tried.
        op: Op,
        /// On what.
        at: String,
        /// What is missing, and what to use instead.
        reason: String,
    },
    /// More bytes than an object may have; see [`MAX_BODY`](super::MAX_BODY) and [`MAX_READ`](super::MAX_READ).
    #[error("could not {op} {at}: {len} bytes are more than the {limit} that one call moves")]
    TooLarge {
        /// What was tried.
        op: Op,
        /// On what.
        at: String,
        /// How many bytes there were.
        len: u64,
        /// How many there may be.
        limit: u64,
    },
    /// An earlier append to this tail failed, or was dropped before it was done: what its end holds is not known.
    /// Open another tail.
    #[error("{key} takes no more appends since one failed ({reason}); a new tail has to be opened")]
    TailClosed {
        /// The tail.
        key: Key,
        /// The first failure.
        reason: String,
    },
}

impl StoreError {
    /// Whether asking again, later, may succeed though the request stays as it is. What runs unattended goes on trying
    /// (slowly, and saying so). No `_` arm: whoever adds a variant decides here.
    pub fn is_retryable(&self) -> bool {
        match self {
            // Space comes back by expiry, a mount by itself; giving up would make a person's visit necessary.
            Self::Unavailable { .. } | Self::TimedOut { .. } | Self::Full { .. } | Self::Vanished { .. } => true,
            Self::NotFound { .. }
            | Self::Conflict { .. }
            | Self::ReadOnly { .. }
            | Self::Denied { .. }
            | Self::Damaged { .. }
            | Self::Unsupported { .. }
            | Self::TooLarge { .. }
            | Self::TailClosed { .. } => false,
        }
    }

    /// Whether asking again within seconds is worth it: what the [`Retry`](super::retry::Retry) decorator asks.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::TimedOut { .. } => true,
            // Retryable, but nobody frees a disk within seconds; whoever waits wants to read the message now.
            Self::Full { .. }
            | Self::Vanished { .. }
            | Self::NotFound { .. }
            | Self::Conflict { .. }
            | Self::ReadOnly { .. }
            | Self::Denied { .. }
            | Self::Damaged { .. }
            | Self::Unsupported { .. }
            | Self::TooLarge { .. }
            | Self::TailClosed { .. } => false,
        }
    }

    /// The answer "there is no such object", which many callers treat as a value.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}
