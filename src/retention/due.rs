//! When `pgkeep run` expires. Pure: times in, a time out.

use std::time::Duration;

/// After the start: not while everything else begins, too.
const AFTER_START: Duration = Duration::from_secs(10 * 60);
/// From one to the next.
const EVERY: Duration = Duration::from_secs(24 * 3600);
/// After one that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(3600);

/// How the last one ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Last {
    /// There was none since the start.
    None,
    /// It did what there was to do.
    Done,
    /// It could not; another try may help.
    Failed,
}

/// How long to wait for the next one. `share` is a number of 0 to 255 that differs from host to host, so that two that
/// start together do not expire together; nothing depends on it.
pub fn wait(last: Last, share: u8) -> Duration {
    let (pause, spread) = match last {
        Last::None => (AFTER_START, AFTER_START),
        Last::Done => (EVERY, Duration::from_secs(600)),
        Last::Failed => (AFTER_FAILURE, Duration::from_secs(600)),
    };
    pause + spread * u32::from(share) / 256
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_a_day_and_sooner_after_a_failure() {
        for share in [0, 128, 255] {
            assert!(wait(Last::None, share) < Duration::from_secs(1200));
            assert!((EVERY..EVERY + Duration::from_secs(600)).contains(&wait(Last::Done, share)));
            assert!(wait(Last::Failed, share) < Duration::from_secs(4300));
        }
        assert_ne!(wait(Last::None, 0), wait(Last::None, 255));
    }
}
