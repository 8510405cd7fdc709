//! The whole archiver with clock, randomness, stores and server replaced, on one thread, by seed. See `docs/architecture.md`.
//!
//! What is real: everything in `archive`, the catalog, sealing, the client's side of the protocol. What is not: the clock
//! (tokio's, paused), the network ([`server`] over pipes), the stores ([`depot`], in memory), threads.
//! What must always be true is said in [`world`] and [`judge`].

mod depot;
mod history;
mod judge;
mod server;
mod trace;
#[path = "../../../tests/support/server_wire.rs"]
mod wire;
mod world;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use world::{Outcome, run};

use crate::archive::probe::Bug;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")))
}

fn how_to_replay(seed: u64) -> String {
    format!("PGKEEP_SIM_SEED={seed} cargo test --lib archive::tests::simulation::one_seed -- --nocapture")
}

#[track_caller]
fn must_hold(seed: u64) -> Outcome {
    let outcome = run(seed, None, false);
    if let Some(violation) = &outcome.violation {
        panic!("seed {seed}: {violation}\nto see what happened: {}", how_to_replay(seed));
    }
    outcome
}

/// `PGKEEP_SIM_SEED`: that one, with all that happens. It happens twice, and must be the same.
#[test]
fn one_seed() {
    let seed = number("PGKEEP_SIM_SEED").unwrap_or(1);
    let shown = number("PGKEEP_SIM_SEED").is_some();
    let first = run(seed, None, shown);
    assert_eq!(first.violation, None, "seed {seed}");
    assert!(first.steps > 50, "{first:?}");
    assert_eq!(first.digest, run(seed, None, false).digest, "seed {seed} is not the same twice");
}

/// Runs seeds on as many threads as there are processors, until one fails.
#[track_caller]
fn seeds(first: u64, count: u64, told_every: Option<u64>) {
    let next = AtomicU64::new(first);
    let failed = AtomicBool::new(false);
    let (lives, timelines, most) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let done = seed - first;
            if done >= count {
                return;
            }
            // A panic is a failure of this seed, and has to name it.
            let outcome = std::panic::catch_unwind(|| must_hold(seed)).inspect_err(|_| {
                failed.store(true, Ordering::Relaxed);
                eprintln!("FAILED: seed {seed}\nreplay: {}", how_to_replay(seed));
            });
            let Ok(outcome) = outcome else { return };
            lives.fetch_add(outcome.lives, Ordering::Relaxed);
            timelines.fetch_add(outcome.timelines as u64, Ordering::Relaxed);
            most.fetch_max(outcome.steps, Ordering::Relaxed);
            if told_every.is_some_and(|every| done > 0 && done.is_multiple_of(every)) {
                let per_second = done as f64 / began.elapsed().as_secs_f64();
                eprintln!("{done} of {count} seeds, {per_second:.0} a second");
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    assert!(!failed.load(Ordering::Relaxed), "a seed failed; it is named above");
    let (lives, timelines) = (lives.into_inner(), timelines.into_inner());
    eprintln!(
        "{count} seeds from {first} on in {:.1} s: {lives} lives of the archiver, {timelines} timelines, at most {} steps",
        began.elapsed().as_secs_f64(),
        most.into_inner()
    );
    // Seeds in which nothing befalls anybody show nothing.
    assert!(count < 100 || (lives > count + count / 2 && timelines > count + count / 3));
}

/// `PGKEEP_SIM_SEEDS` of them (2,000 where it is not set: some six hundredths of a second each), from `PGKEEP_SIM_FIRST` on (`testenv/simulate.sh`).
#[test]
fn p1_p6_p8_what_is_acknowledged_is_restorable_whatever_befalls() {
    let count = number("PGKEEP_SIM_SEEDS");
    seeds(number("PGKEEP_SIM_FIRST").unwrap_or(1), count.unwrap_or(2000), count.map(|count| (count / 50).max(100)));
}

/// What a seed brings does not depend on the moment, the machine or what ran before it.
#[test]
fn a_seed_is_the_same_twice() {
    for seed in 1..=12 {
        let (one, other) = (run(seed, None, false), run(seed, None, false));
        assert_eq!((one.digest, one.steps), (other.digest, other.steps), "seed {seed}");
    }
}

/// A simulation that finds nothing where there is something is worth nothing.
#[test]
fn planted_bugs_are_found() {
    for (bug, within, said) in [
        (Bug::AcknowledgeOnSend, 20, "is acknowledged"),
        (Bug::FrontierOverAHole, 200, "is acknowledged"),
        (Bug::ForgetTheLastRange, 200, ""),
    ] {
        let found = (1..=within).find_map(|seed| Some((seed, run(seed, Some(bug), false).violation?)));
        let (seed, violation) = found.unwrap_or_else(|| panic!("{bug:?} was not found within {within} seeds"));
        assert!(violation.contains(said), "{bug:?}, seed {seed}: {violation}");
        eprintln!("{bug:?} was found by seed {seed}: {violation}");
        assert_eq!(run(seed, None, false).violation, None, "without the bug seed {seed} holds");
    }
}
