//! Plans and refusals in words, for the person who has to decide. Times with their offset, and in UTC beside it.

use std::fmt::Write as _;

use jiff::tz::TimeZone;

use super::estimate::Estimate;
use super::outcome::{PlanError, Proof, Reachable, RestorePlan, Stop};
use super::search::{Located, TransactionEnd};
use super::target::{Point, show};
use crate::types::PgTimestamp;

/// A plan, a line each.
pub fn plan(plan: &RestorePlan, zone: &TimeZone) -> Vec<String> {
    let mut lines = vec![format!("target    {}", plan.target)];
    if let Point::Time(instant) = plan.target.point {
        lines.push(format!("          {}", show(instant, zone)));
    }
    lines.extend(plan.located.as_ref().map(|located| format!("found     {}", located_in_words(located, zone))));
    lines.push(format!(
        "base      {}, consistent at {} on branch {}, stopped {}",
        plan.base.label,
        plan.base.stop,
        plan.base.branch,
        show(plan.base.stopped_at, zone)
    ));
    lines.push(match plan.stop {
        Stop::At(stop) if stop.inclusive => format!("stop      after the record at {}", stop.record),
        Stop::At(stop) => format!("stop      before the record at {}", stop.record),
        Stop::Immediate => "stop      as soon as the base backup is consistent".to_owned(),
    });
    lines.push(match &plan.last_included {
        Some(commit) => format!("included  up to {}", transaction(commit, zone)),
        None => "included  what the base backup holds; no commit follows before the stop".to_owned(),
    });
    lines.push(match &plan.first_excluded {
        Some(commit) => format!("excluded  from {}", transaction(commit, zone)),
        None => "excluded  no commit that is archived shortly behind it".to_owned(),
    });
    let mut way = format!("timeline  {}", plan.target_timeline.get());
    for part in &plan.path {
        if let Some(to) = part.to {
            let _ = write!(way, ", from {} at {to}", part.branch);
        }
    }
    lines.push(way);
    for need in &plan.wal {
        let (branch, from, to, segments) = (need.branch, need.from, need.to, need.segments);
        lines.push(format!("wal       branch {branch} from {from} to {to}, {}", count(segments, "segment")));
    }
    let fetch = &plan.fetch;
    lines.push(format!(
        "fetch     base {}, WAL {} ({} stored), {}",
        size(fetch.base_stored_bytes.unwrap_or(fetch.base_bytes)),
        size(fetch.wal_bytes),
        size(fetch.wal_stored_bytes),
        count(fetch.requests, "object") + if fetch.base_objects.is_none() { " and the base's" } else { "" },
    ));
    if !plan.keys.is_empty() {
        lines.push(format!(
            "keys      {}, and the key of the repository opens them",
            count(plan.keys.len() as u64, "content key")
        ));
    }
    lines.push(format!("checked   {}", checked(&plan.proof)));
    lines.extend(plan.estimate.as_ref().map(|estimate| format!("estimate  {}", estimated(estimate))));
    lines.extend(bounds(plan.earliest.as_ref(), plan.newest.as_ref(), zone));
    lines.extend(plan.warnings.iter().map(|warning| format!("warning   {warning}")));
    lines
}

/// A refusal, a line each.
pub fn refusal(error: &PlanError, zone: &TimeZone) -> Vec<String> {
    let mut lines = vec![format!("no        {}", error.reason)];
    lines.extend(error.located.as_ref().map(|located| format!("found     {}", located_in_words(located, zone))));
    for (word, place) in [("before", &error.before), ("after", &error.after)] {
        if let Some(place) = place {
            lines.push(format!("{word:<9} {}: --to {}", reachable(place, zone), quoted(&place.to)));
        }
    }
    lines.extend(bounds(error.earliest.as_ref(), error.newest.as_ref(), zone));
    lines.extend(error.hints.iter().map(|hint| format!("hint      {hint}")));
    lines
}

fn bounds(earliest: Option<&Reachable>, newest: Option<&Reachable>, zone: &TimeZone) -> Vec<String> {
    let line = |word: &str, place: &Reachable| format!("{word:<9} {}", reachable(place, zone));
    let mut lines = Vec::new();
    lines.extend(earliest.map(|place| line("earliest", place)));
    lines.extend(newest.map(|place| line("newest", place)));
    lines
}

fn reachable(place: &Reachable, zone: &TimeZone) -> String {
    let time = place.time.map(|time| show(time, zone)).unwrap_or_else(|| "time not known".to_owned());
    format!("{time}, LSN {} on branch {}", place.lsn, place.branch)
}

fn transaction(end: &TransactionEnd, zone: &TimeZone) -> String {
    format!("transaction {} of {}, LSN {}", end.xid, show_pg(end.time, zone), end.lsn)
}

fn located_in_words(located: &Located, zone: &TimeZone) -> String {
    match located {
        Located::Transaction(end) => {
            let what = if end.aborted { "was rolled back" } else { "committed" };
            format!("transaction {} {what} at {}, LSN {}", end.xid, show_pg(end.time, zone), end.lsn)
        }
        Located::RestorePoint { name, time, lsn } => {
            format!("restore point {name:?} was made at {}, LSN {lsn}", show_pg(*time, zone))
        }
    }
}

/// What was seen to be there.
fn checked(proof: &Proof) -> String {
    let mut text = format!("every record of {} of WAL", size(proof.wal_bytes_checked));
    if proof.base_objects_opened > 0 {
        let _ = write!(text, "; {} of the base, which open", count(proof.base_objects_opened, "object"));
    }
    for history in &proof.histories {
        let how = if history.is_there { "is there" } else { "is lost, and a descendant's tells what it said" };
        let _ = write!(text, "; the history file of {} {how}", history.branch);
    }
    text
}

/// An estimate, and by what.
fn estimated(estimate: &Estimate) -> String {
    let by = match &estimate.measured {
        Some(sample) => format!("measured now, over {}", size(sample.bytes)),
        None => "assumed".to_owned(),
    };
    let replay = estimate.replay_bytes_per_second.min(estimate.read_bytes_per_second);
    let why = match (replay < estimate.replay_bytes_per_second, estimate.replay_measured) {
        (true, _) => "as it is read",
        (false, true) => "as in the last drill",
        (false, false) => "assumed of a server",
    };
    format!(
        "about {}, and no more than an estimate: {} of base at {}/s ({by}), then {} of WAL at {}/s ({why})",
        about(u64::try_from(estimate.total.as_millis().div_ceil(1000)).unwrap_or(u64::MAX)),
        size(estimate.base_bytes),
        size(estimate.read_bytes_per_second),
        size(estimate.wal_bytes),
        size(replay),
    )
}

/// Seconds, minutes or hours: no more digits than an estimate has.
fn about(seconds: u64) -> String {
    match seconds {
        0..=1 => "a second".to_owned(),
        2..=119 => format!("{seconds} seconds"),
        120..=7199 => format!("{} minutes", seconds.div_ceil(60)),
        _ => format!("{} hours", seconds.div_ceil(3600)),
    }
}

fn show_pg(time: PgTimestamp, zone: &TimeZone) -> String {
    show(time.to_timestamp(), zone)
}

fn quoted(text: &str) -> String {
    if text.contains(' ') { format!("{text:?}") } else { text.to_owned() }
}

fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Bytes with the unit that leaves one to three digits before the point.
fn size(bytes: u64) -> String {
    let (mut value, mut units) = (bytes as f64, ["kB", "MB", "GB", "TB", "PB"].into_iter());
    let mut unit = "bytes";
    while value >= 999.5 {
        let Some(next) = units.next() else { break };
        (value, unit) = (value / 1000.0, next);
    }
    if unit == "bytes" || value >= 99.5 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}
