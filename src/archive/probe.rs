//! What the simulation needs of the archiver's inside: to see how much a stream holds, to make its memory small, and to
//! plant bugs that it has to find. Outside of tests each of these is a constant, and nothing of it is left.

/// A bug that the simulation must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bug {
    /// What was received counts as durable.
    AcknowledgeOnSend,
    /// A frontier steps over a hole.
    FrontierOverAHole,
    /// At a change of timeline the parent counts as whole although its last bytes are not there.
    ForgetTheLastRange,
}

#[cfg(not(test))]
pub(super) use real::*;
#[cfg(test)]
pub(super) use simulated::*;

#[cfg(not(test))]
mod real {
    use super::Bug;

    #[inline(always)]
    pub const fn planted(_: Bug) -> bool {
        false
    }

    #[inline(always)]
    pub const fn held(_: u64) {}

    #[inline(always)]
    pub const fn memory(bytes: u64) -> u64 {
        bytes
    }
}

#[cfg(test)]
mod simulated {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
        static MEMORY: Cell<Option<u64>> = const { Cell::new(None) };
        static HELD: Cell<u64> = const { Cell::new(0) };
    }

    pub fn planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }

    pub fn held(bytes: u64) {
        HELD.set(HELD.get().max(bytes));
    }

    pub fn memory(bytes: u64) -> u64 {
        MEMORY.get().unwrap_or(bytes)
    }

    /// For what runs on this thread from now on.
    pub fn begin(bug: Option<Bug>, memory: Option<u64>) {
        PLANTED.set(bug);
        MEMORY.set(memory);
        HELD.set(0);
    }

    /// The most that was held since.
    pub fn most_held() -> u64 {
        HELD.get()
    }
}
