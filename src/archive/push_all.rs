//! `wal push` into several repositories at once: success when as many hold the file as are needed.
//!
//! What always holds: a repository counts only when its own push has succeeded. Cancellation: as in [`super::push`].

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, timeout_at};

/// When enough repositories hold the file, the others get this much longer: what they miss is filled up by `pgkeep run`.
const LINGER: Duration = Duration::from_secs(5);

/// What became of a file in each repository, in their order; `None` where there was no answer in time.
#[derive(Debug)]
pub struct PushedAll<T, E> {
    /// One for each.
    pub answers: Vec<Option<Result<T, E>>>,
    /// As many hold it as are needed.
    pub is_held: bool,
}

/// Runs all `pushes`, for `within` at most; `needed` of them must succeed.
pub async fn push_all<T, E>(
    pushes: impl IntoIterator<Item = impl Future<Output = Result<T, E>>>,
    needed: usize,
    within: Duration,
) -> PushedAll<T, E> {
    let mut pending: FuturesUnordered<_> =
        pushes.into_iter().enumerate().map(|(index, push)| async move { (index, push.await) }).collect();
    let mut answers: Vec<Option<Result<T, E>>> = (0..pending.len()).map(|_| None).collect();
    let (mut until, mut held) = (Instant::now() + within, 0);
    while let Ok(Some((index, answer))) = timeout_at(until, pending.next()).await {
        held += usize::from(answer.is_ok());
        if held >= needed {
            until = until.min(Instant::now() + LINGER);
        }
        if let Some(slot) = answers.get_mut(index) {
            *slot = Some(answer);
        }
    }
    PushedAll { answers, is_held: held >= needed }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn after(seconds: u64, answer: Result<(), &'static str>) -> Result<(), &'static str> {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        answer
    }

    #[tokio::test(start_paused = true)]
    async fn enough_is_enough_and_the_rest_gets_a_little_longer() {
        let began = Instant::now();
        let done =
            push_all([after(1, Ok(())), after(3, Ok(())), after(3600, Ok(()))], 1, Duration::from_secs(60)).await;
        assert!(done.is_held && done.answers == [Some(Ok(())), Some(Ok(())), None]);
        assert!(began.elapsed() < Duration::from_secs(9));
    }

    #[tokio::test(start_paused = true)]
    async fn too_few_is_no_success() {
        let within = Duration::from_secs(60);
        let done = push_all([after(1, Ok(())), after(2, Err("no"))], 2, within).await;
        assert!(!done.is_held && done.answers == [Some(Ok(())), Some(Err("no"))]);
        let began = Instant::now();
        let done = push_all([after(1, Ok(())), after(3600, Ok(()))], 2, within).await;
        assert!(!done.is_held && done.answers == [Some(Ok(())), None]);
        assert!(began.elapsed() <= within + Duration::from_secs(1));
    }
}
