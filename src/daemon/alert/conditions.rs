//! What is wrong, from a picture. Pure.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::super::health::{BackupFact, ClusterPicture, Picture, RepositoryFacts, RepositoryPicture, SlotFacts};

/// A slot that may still keep less than this is about to be lost.
const SLOT_LEFT: u64 = 256 << 20;
/// A base backup that is so many times larger or smaller than its elders is odd.
const ODD: u64 = 4;
/// How many elders it is compared with, at least and at most.
const ELDERS: (usize, usize) = (3, 6);
/// Sizes below this are not compared: an empty cluster quadruples in a moment.
const SMALL: u64 = 256 << 20;
/// A base backup is overdue when half of a period has gone by, at least this.
const OVERDUE: Duration = Duration::from_secs(60);

/// From where on a lag is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// WAL that waits longer.
    pub behind: Duration,
    /// More WAL that waits.
    pub behind_bytes: u64,
}

/// Names and lengths are verified daily; so much later they are overdue.
const UNVERIFIED: SignedDuration = SignedDuration::from_hours(3 * 24);

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// The cluster in the configuration.
    pub cluster: String,
    /// What kind of thing.
    pub kind: &'static str,
    /// The repository; empty where it is about the cluster.
    pub about: String,
    /// What is wrong, and what to do.
    pub what: String,
}

/// Everything that is wrong.
pub fn conditions(picture: &Picture, limits: Limits) -> Vec<Condition> {
    let mut found = Vec::new();
    for cluster in &picture.clusters {
        let mut add = |kind, about: &str, what: String| {
            found.push(Condition { cluster: cluster.cluster.clone(), kind, about: about.to_owned(), what });
        };
        if let Some(what) = behind(cluster, limits) {
            add("behind", "", what);
        }
        if let Some((kind, what)) = cluster.slot.as_ref().and_then(slot) {
            add(kind, "", what);
        }
        if let Some(what) = overdue(cluster, picture.at) {
            add("backup-overdue", "", what);
        }
        if let Some(what) = drill_overdue(cluster, picture.at) {
            add("drill-overdue", "", what);
        }
        for repository in &cluster.repositories {
            let name = repository.repository.as_str();
            if let Some(what) = lags(repository, limits) {
                add("repository-behind", name, what);
            }
            let Some(facts) = &repository.facts else { continue };
            if facts.gaps > 0 {
                let words = facts.gap_words.join("; ");
                add(
                    "gap",
                    name,
                    format!(
                        "WAL is missing: {words}. Instants behind it cannot be restored from the base backups before it; see `pgkeep list --gaps`"
                    ),
                );
            }
            if facts.damaged > 0 {
                add("damaged", name, format!("{} objects cannot be used; `pgkeep list` names them", facts.damaged));
            }
            if let Some(what) = odd(&facts.backups) {
                add("backup-size", name, what);
            }
            if let Some(what) = short(facts, picture.at) {
                add("window", name, what);
            }
            if let Some((kind, what)) = verification(facts, picture.at) {
                add(kind, name, what);
            }
            if let Some(drill) = facts.drill.as_ref().filter(|drill| !drill.passed) {
                let why = drill.failure.as_deref().unwrap_or("see `pgkeep drill --report`");
                add("drill-failed", name, format!("the drill of {:.0} failed: {why}", drill.at));
            }
        }
    }
    found
}

fn behind(cluster: &ClusterPicture, limits: Limits) -> Option<String> {
    let Some(stream) = &cluster.stream else {
        let seconds = cluster.not_streaming_seconds?;
        let why = cluster.reason.as_deref().unwrap_or("it is connecting");
        return (seconds > limits.behind.as_secs()).then(|| format!("no WAL has been archived for {seconds} s: {why}"));
    };
    let (bytes, seconds) = (stream.exposure_bytes, stream.exposure_seconds);
    let todo = "Too few repositories hold it; `pgkeep check` says what is wrong with them";
    match () {
        () if seconds > limits.behind.as_secs_f64() => {
            Some(format!("WAL has waited for {seconds:.0} s to become durable, {bytes} bytes in all. {todo}"))
        }
        () if bytes > limits.behind_bytes => Some(format!("{bytes} bytes of WAL are not durable. {todo}")),
        () => None,
    }
}

fn lags(repository: &RepositoryPicture, limits: Limits) -> Option<String> {
    if repository.doing == "refused" {
        let why = repository.reason.as_deref().unwrap_or("it holds something else");
        return Some(format!("nothing is put there: {why}"));
    }
    let (bytes, seconds) = (repository.lag_bytes.unwrap_or(0), repository.lag_seconds.unwrap_or(0));
    let is_behind = seconds > limits.behind.as_secs() || bytes > limits.behind_bytes;
    let why = repository.reason.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
    is_behind.then(|| format!("{seconds} s and {bytes} bytes behind, {}{why}", repository.doing))
}

fn slot(slot: &SlotFacts) -> Option<(&'static str, String)> {
    let status = slot.wal_status.as_deref();
    if !slot.exists || status == Some("lost") {
        let what = "the replication slot is lost: WAL that was not archived yet is gone. `pgkeep run` makes a new one and takes a base backup";
        return Some(("slot-lost", what.to_owned()));
    }
    let left = slot.safe_bytes.filter(|left| *left < SLOT_LEFT);
    (status == Some("unreserved") || left.is_some()).then(|| {
        let left = slot.safe_bytes.map(|left| format!(", after {left} more bytes of WAL")).unwrap_or_default();
        let what = format!("the replication slot is about to be lost{left}: see that the archive catches up, or raise max_slot_wal_keep_size");
        ("slot", what)
    })
}

fn overdue(cluster: &ClusterPicture, at: Timestamp) -> Option<String> {
    let (next, period) = (cluster.backup.next?, Duration::from_secs(cluster.backup.period_seconds?));
    let late = at.duration_since(next);
    let allowed = SignedDuration::try_from((period / 2).max(OVERDUE)).ok()?;
    (late > allowed).then(|| {
        let why = match (&cluster.backup.failed, cluster.backup.running) {
            (Some(why), _) => format!("the last try failed: {why}"),
            (None, true) => "it is under way, and takes long".to_owned(),
            (None, false) => "see the log of `pgkeep run`".to_owned(),
        };
        format!("a base backup was due at {next:.0} and is not there; {why}")
    })
}

/// Compared with the middle one of those before it.
fn odd(backups: &[BackupFact]) -> Option<String> {
    let (newest, elders) = backups.split_first()?;
    let mut sizes: Vec<u64> = elders.iter().take(ELDERS.1).map(|elder| elder.bytes).collect();
    if sizes.len() < ELDERS.0 {
        return None;
    }
    sizes.sort_unstable();
    let middle = *sizes.get(sizes.len() / 2)?;
    let word = match newest.bytes {
        bytes if bytes.max(middle) < SMALL => return None,
        bytes if bytes > middle.saturating_mul(ODD) => "larger",
        bytes if bytes.saturating_mul(ODD) < middle => "smaller",
        _ => return None,
    };
    let (label, bytes) = (newest.label, newest.bytes);
    Some(format!(
        "base backup {label} is much {word} than those before it: {bytes} bytes, where {middle} are usual. Is it the right server?"
    ))
}

/// An archive that is younger than its window is no reason: only one that was once longer.
fn short(facts: &RepositoryFacts, at: Timestamp) -> Option<String> {
    let promised = SignedDuration::from_secs(facts.promised_seconds.filter(|seconds| *seconds > 0)?);
    let begin = at.checked_sub(promised).ok()?;
    let is_old_enough = facts.oldest_backup.is_some_and(|oldest| oldest.start() <= begin);
    match facts.window_from {
        _ if !is_old_enough => None,
        Some(from) if from <= begin => None,
        from => {
            let from =
                from.map_or_else(|| "nothing can be restored".to_owned(), |from| format!("it begins at {from:.0}"));
            Some(format!("every instant since {begin:.0} is promised by `keep`, and {from}"))
        }
    }
}

/// Whether `since`, or where nothing ever happened the oldest base backup, is longer ago than `allowed`.
fn is_long_ago(since: Option<Timestamp>, facts: &RepositoryFacts, allowed: SignedDuration, at: Timestamp) -> bool {
    let since = since.or(facts.oldest_backup.map(|oldest| oldest.start()));
    since.is_some_and(|since| at.duration_since(since) > allowed)
}

fn verification(facts: &RepositoryFacts, at: Timestamp) -> Option<(&'static str, String)> {
    let verified = facts.verified.as_ref();
    if let Some(verified) = verified.filter(|verified| verified.findings > 0) {
        let (count, when) = (verified.findings, verified.at);
        let what = format!(
            "the verification of {when:.0} found {count} things wrong; `pgkeep verify` names them, and `pgkeep verify --repair` \
             brings back what another repository has"
        );
        return Some(("verification-failed", what));
    }
    if is_long_ago(verified.map(|verified| verified.at), facts, UNVERIFIED, at) {
        let last = verified.map_or_else(|| "never".to_owned(), |verified| format!("last at {:.0}", verified.at));
        let what =
            format!("it is to be verified daily, and was {last}; see the log of `pgkeep run`, or run `pgkeep verify`");
        return Some(("verification-overdue", what));
    }
    // Half as long again: reading yields to everything else.
    let within = SignedDuration::from_secs(facts.verify_within_seconds?);
    let whole_since = verified.and_then(|verified| verified.whole_since);
    let allowed = within.checked_add(within / 2)?;
    is_long_ago(whole_since, facts, allowed, at).then(|| {
        let since = whole_since.map_or_else(|| "were never opened".to_owned(), |since| format!("were last opened at {since:.0}"));
        let days = within.as_hours() / 24;
        let what = format!(
            "every object is to be opened within {days} days, and some {since}; raise verify_rate, or run `pgkeep verify --objects`"
        );
        ("verification-overdue", what)
    })
}

/// A drill from any of its repositories will do.
fn drill_overdue(cluster: &ClusterPicture, at: Timestamp) -> Option<String> {
    let all = || cluster.repositories.iter().filter_map(|repository| repository.facts.as_ref());
    let every = SignedDuration::from_secs(all().find_map(|facts| facts.drill_every_seconds)?);
    let allowed = every.checked_add(every / 2)?;
    let last = all().filter_map(|facts| facts.drill.as_ref()).map(|drill| drill.at).max();
    all().all(|facts| is_long_ago(last, facts, allowed, at)).then(|| {
        let last = last.map_or_else(|| "never".to_owned(), |last| format!("last at {last:.0}"));
        let hours = every.as_hours();
        format!("a drill is to be done every {hours} hours, and was {last}; see the log of `pgkeep run`")
    })
}

#[cfg(test)]
pub(in crate::daemon) mod tests {
    use super::*;
    use crate::daemon::health::{DrillFact, StreamPicture, VerifiedFact};
    use crate::daemon::schedule::Scheduled;
    use crate::store::counts::counts;
    use crate::types::{BackupLabel, Lsn};

    const DAY: i64 = 86_400;
    const LIMITS: Limits = Limits { behind: Duration::from_secs(300), behind_bytes: 1_000_000_000 };

    fn day(number: i64) -> Timestamp {
        Timestamp::from_second(number * DAY).unwrap()
    }

    fn backup(number: i64, bytes: u64) -> BackupFact {
        let (started_at, took_seconds) = (day(number), 600.0);
        let label = BackupLabel::at(started_at);
        BackupFact { label, started_at, took_seconds, bytes, stored_bytes: bytes / 10, flagged: false }
    }

    /// Ten days of nightly base backups, of which the window reaches back over seven.
    pub(in crate::daemon) fn good() -> Picture {
        let backups: Vec<BackupFact> = (3..=10).rev().map(|number| backup(number, 5 << 30)).collect();
        let facts = RepositoryFacts {
            repository: "main".to_owned(),
            looked_at: day(10),
            backup_count: backups.len(),
            oldest_backup: backups.last().map(|backup| backup.label),
            backups,
            window_from: Some(day(3)),
            window_to: Some(day(10)),
            promised_seconds: Some(7 * DAY),
            gaps: 0,
            gap_words: Vec::new(),
            damaged: 0,
            verified: Some(VerifiedFact { at: day(10), whole_since: Some(day(5)), unread_objects: 0, findings: 0 }),
            verify_within_seconds: Some(30 * DAY),
            drill: Some(DrillFact { at: day(8), passed: true, failure: None }),
            drill_every_seconds: Some(7 * DAY),
        };
        let repository = RepositoryPicture {
            repository: "main".to_owned(),
            doing: "live",
            reason: None,
            frontier: Some(Lsn::new(1 << 30)),
            lag_bytes: Some(0),
            lag_seconds: Some(0),
            facts: Some(facts),
        };
        let stream = StreamPicture {
            branch: "00000001".to_owned(),
            server_end: Lsn::new(1 << 30),
            received: Lsn::new(1 << 30),
            durable: Lsn::new(1 << 30),
            exposure_bytes: 0,
            exposure_seconds: 0.0,
            latency_seconds: Some((0.1, 0.2)),
        };
        let scheduled = Scheduled { next: Some(day(11)), period_seconds: Some(86_400), ..Scheduled::default() };
        let slot = SlotFacts {
            exists: true,
            wal_status: Some("reserved".to_owned()),
            safe_bytes: Some(10 << 30),
            kept_bytes: Some(1 << 20),
        };
        Picture {
            version: "0",
            started_at: day(1),
            at: day(10) + SignedDuration::from_hours(1),
            memory_bytes: Some(1 << 26),
            store: counts(),
            clusters: vec![ClusterPicture {
                cluster: "main".to_owned(),
                state: "streaming",
                reason: None,
                not_streaming_seconds: None,
                failed_attempts: 2,
                stream: Some(stream),
                repositories: vec![repository],
                backup: scheduled,
                slot: Some(slot),
                slot_unknown: None,
            }],
            alerts: Vec::new(),
        }
    }

    fn kinds(change: impl FnOnce(&mut ClusterPicture)) -> Vec<&'static str> {
        let mut picture = good();
        change(&mut picture.clusters[0]);
        conditions(&picture, LIMITS).into_iter().map(|condition| condition.kind).collect()
    }

    fn facts(of: &mut ClusterPicture) -> &mut RepositoryFacts {
        of.repositories[0].facts.as_mut().unwrap()
    }

    #[test]
    fn all_is_well() {
        assert!(kinds(|_| {}).is_empty(), "{:?}", conditions(&good(), LIMITS));
    }

    #[test]
    fn each_thing_that_is_wrong_is_seen() {
        fn stream(of: &mut ClusterPicture) -> &mut StreamPicture {
            of.stream.as_mut().unwrap()
        }
        fn slot(of: &mut ClusterPicture) -> &mut SlotFacts {
            of.slot.as_mut().unwrap()
        }
        type Change = fn(&mut ClusterPicture);
        fn verified(of: &mut ClusterPicture) -> &mut VerifiedFact {
            facts(of).verified.as_mut().unwrap()
        }
        let cases: [(&str, Change); 23] = [
            ("behind", |of| stream(of).exposure_seconds = 301.0),
            ("behind", |of| stream(of).exposure_bytes = 2_000_000_000),
            ("behind", |of| (of.stream, of.not_streaming_seconds) = (None, Some(301))),
            ("repository-behind", |of| of.repositories[0].lag_seconds = Some(301)),
            ("repository-behind", |of| of.repositories[0].doing = "refused"),
            ("slot-lost", |of| slot(of).exists = false),
            ("slot-lost", |of| slot(of).wal_status = Some("lost".to_owned())),
            ("slot", |of| slot(of).wal_status = Some("unreserved".to_owned())),
            ("slot", |of| slot(of).safe_bytes = Some(1 << 20)),
            ("backup-overdue", |of| of.backup.next = Some(day(9))),
            ("gap", |of| facts(of).gaps = 1),
            ("damaged", |of| facts(of).damaged = 1),
            ("backup-size", |of| facts(of).backups[0].bytes = 1 << 30),
            ("backup-size", |of| facts(of).backups[0].bytes = 30 << 30),
            ("window", |of| facts(of).window_from = Some(day(5))),
            ("verification-failed", |of| verified(of).findings = 1),
            ("verification-overdue", |of| verified(of).at = day(6)),
            ("verification-overdue", |of| facts(of).verified = None),
            ("verification-overdue", |of| verified(of).whole_since = Some(day(-36))),
            ("verification-overdue", |of| facts(of).verify_within_seconds = Some(3 * DAY)),
            ("drill-failed", |of| facts(of).drill.as_mut().unwrap().passed = false),
            ("drill-overdue", |of| facts(of).drill.as_mut().unwrap().at = day(-1)),
            ("drill-overdue", |of| (facts(of).drill, facts(of).drill_every_seconds) = (None, Some(2 * DAY))),
        ];
        for (want, change) in cases {
            assert_eq!(kinds(change), [want]);
        }
    }

    #[test]
    fn what_is_young_or_small_is_not_wrong() {
        assert!(kinds(|of| (of.stream, of.not_streaming_seconds) = (None, Some(10))).is_empty());
        let young = |of: &mut ClusterPicture| {
            facts(of).window_from = Some(day(5));
            facts(of).oldest_backup = Some(BackupLabel::at(day(5)));
        };
        assert!(kinds(young).is_empty());
        assert!(kinds(|of| facts(of).backups.truncate(3)).is_empty());
        // Nobody verifies or drills what is a day old; and drills are done only where it is said how often.
        let new = |of: &mut ClusterPicture| {
            (facts(of).verified, facts(of).drill) = (None, None);
            facts(of).oldest_backup = Some(BackupLabel::at(day(9)));
        };
        assert!(kinds(new).is_empty());
        assert!(kinds(|of| (facts(of).drill, facts(of).drill_every_seconds) = (None, None)).is_empty());
        assert!(
            kinds(|of| (facts(of).drill.as_mut().unwrap().at, facts(of).drill_every_seconds) = (day(-90), None))
                .is_empty()
        );
        assert!(kinds(|of| facts(of).backups.iter_mut().enumerate().for_each(|(n, of)| of.bytes = 1 << n)).is_empty());
    }
}
