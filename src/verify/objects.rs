//! Opens objects, one after the other in the order that was decided, no faster than allowed.
//!
//! What always holds: what counts as found whole was read from its first byte to its last and opened. Bounds: so many objects in
//! memory at a time (one has at most 64 MiB and its seals), so many bytes a second, a rest whenever somebody else needs the
//! way. A repository that fails ends the reading; what was read until then counts.
//! Cancellation: nothing is changed here.

use std::num::NonZeroU64;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, StreamExt};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::order::Item;
use crate::catalog::layout::Name;
use crate::catalog::survey::Survey;
use crate::catalog::{CatalogError, Repository};
use crate::types::ClusterId;

/// Whoever reads in the background asks before each object, and is held up while the way is needed.
#[async_trait]
pub trait Turn: Send + Sync {
    /// Returns when an object may be read.
    async fn wait(&self);
}

/// Nobody else is there.
#[derive(Debug, Clone, Copy)]
pub struct NoTurn;

#[async_trait]
impl Turn for NoTurn {
    async fn wait(&self) {}
}

/// How objects are read.
#[derive(Clone, Copy)]
pub struct Manner<'a> {
    /// Objects at a time.
    pub at_once: usize,
    /// Bytes a second at most; `None`: as fast as it goes.
    pub rate: Option<NonZeroU64>,
    /// Asked before each object.
    pub turn: &'a dyn Turn,
    /// Gets bytes as they are done.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

/// What became of an object.
#[derive(Debug)]
pub enum Read {
    /// It is whole, or a copy of it is; with what is wrong with the others.
    Whole(Vec<(Name, CatalogError)>),
    /// Nothing of it opens.
    Damaged(Name, CatalogError),
    /// It went while this was under way: put whole elsewhere, or expired.
    Gone,
    /// This key cannot open it.
    Closed(CatalogError),
    /// The store failed.
    Failed(CatalogError),
}

/// Spreads bytes over time.
struct Pace {
    rate: Option<NonZeroU64>,
    /// When the next object may begin.
    next: tokio::sync::Mutex<Instant>,
}

impl Pace {
    async fn wait(&self, len: u64) {
        let Some(rate) = self.rate else { return };
        let mut next = self.next.lock().await;
        tokio::time::sleep_until(*next).await;
        // What was not used is not saved up.
        let takes = Duration::from_secs_f64(len as f64 / rate.get() as f64);
        *next = (*next).max(Instant::now()) + takes;
    }
}

/// Reads these, until `until` or `stop`; each with what became of it, in that order.
pub async fn read(
    repository: &Repository,
    cluster: &ClusterId,
    survey: &Survey,
    items: &[Item],
    manner: Manner<'_>,
    until: Instant,
    stop: &CancellationToken,
) -> Vec<(Item, Read)> {
    let pace = Pace { rate: manner.rate, next: tokio::sync::Mutex::new(Instant::now()) };
    let pace = &pace;
    let mut reading = stream::iter(items.iter().copied())
        .map(|item| async move {
            let names = item.names(survey, cluster);
            manner.turn.wait().await;
            pace.wait(names.iter().map(|(_, len)| *len).sum()).await;
            (item, one(repository, &names, manner.progress).await)
        })
        .buffered(manner.at_once.max(1));
    let mut done = Vec::new();
    loop {
        let next = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            next = reading.next() => next,
        };
        let Some((item, read)) = next else { break };
        let failed = matches!(read, Read::Failed(_));
        done.push((item, read));
        if failed || Instant::now() >= until {
            break;
        }
    }
    done
}

async fn one(repository: &Repository, names: &[(Name, u64)], progress: &(dyn Fn(u64) + Sync)) -> Read {
    let (mut whole, mut damaged) = (false, Vec::new());
    for (name, len) in names {
        match repository.check_object(name, *len).await {
            Ok(()) => whole = true,
            Err(error) if error.is_not_found() => {}
            Err(error) if error.is_damage() => damaged.push((name.clone(), error)),
            Err(error) if error.is_retryable() => return Read::Failed(error),
            Err(error) => return Read::Closed(error),
        }
        progress(*len);
    }
    match (whole, damaged.is_empty()) {
        (true, _) => Read::Whole(damaged),
        (false, true) => Read::Gone,
        (false, false) => {
            let (name, error) = damaged.swap_remove(0);
            Read::Damaged(name, error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bytes_are_spread_over_time() {
        let pace = Pace { rate: NonZeroU64::new(1000), next: tokio::sync::Mutex::new(Instant::now()) };
        let begun = Instant::now();
        for _ in 0..5 {
            pace.wait(2000).await;
        }
        assert_eq!(begun.elapsed().as_secs(), 8, "the fifth begins when four have had their time");
        tokio::time::sleep(Duration::from_secs(100)).await;
        let begun = Instant::now();
        pace.wait(2000).await;
        pace.wait(2000).await;
        assert_eq!(begun.elapsed().as_secs(), 2, "idle time is not saved up");
    }
}
