//! Work that takes long goes to a thread where it holds nobody up.
//!
//! In a simulation it is done on the spot, so that the order of all that happens is the same every time.

use tokio::task::JoinError;

#[cfg(test)]
thread_local! {
    /// Work of this thread's runtime is done on the spot.
    pub(crate) static ON_THE_SPOT: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs `work`; an error is its panic. Dropping this does not stop what has begun.
pub(crate) async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    #[cfg(test)]
    if ON_THE_SPOT.get() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}
