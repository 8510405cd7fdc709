//! `backup`, `backup_every`, `restore_within`: when base backups are taken, of a cluster.

use std::fmt;
use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp};
use toml::Spanned;

use super::check::Checker;

/// What `backup_every` may be. Seconds are for trials.
const EVERY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(366 * 86_400));
/// What `restore_within` may be.
const WITHIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30 * 86_400));

/// When base backups of a cluster are taken without being asked for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Schedule {
    /// By the clock.
    pub when: Option<When>,
    /// When a restore would take longer than this.
    pub restore_within: Option<Duration>,
}

/// By the clock.
#[derive(Debug, Clone, PartialEq)]
pub enum When {
    /// At these times of a clock on a wall.
    Cron(CronTimes),
    /// So long after the one before.
    Every(Duration),
}

/// A cron expression in a time zone.
#[derive(Clone, PartialEq)]
pub struct CronTimes {
    cron: Box<Cron>,
    zone: TimeZone,
}

impl Schedule {
    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.when.is_none() && self.restore_within.is_none()
    }
}

impl CronTimes {
    /// Five fields as in crontab(5), in a zone. Why not, in words that fit behind the expression.
    ///
    /// # Errors
    /// What does not parse, and what never comes.
    pub fn new(text: &str, zone: TimeZone) -> Result<CronTimes, String> {
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(text).map_err(|error| {
            format!("is not five fields as in crontab (minute, hour, day, month, weekday): {error}")
        })?;
        let times = CronTimes { cron: Box::new(cron), zone };
        // Any start will do: what comes at all comes within the years that a leap day may take.
        match times.after(Timestamp::UNIX_EPOCH) {
            Some(_) => Ok(times),
            None => Err("never comes".to_owned()),
        }
    }

    /// The first of its times behind `at`.
    pub fn after(&self, at: Timestamp) -> Option<Timestamp> {
        let from = at.to_zoned(self.zone.clone());
        self.cron.find_next_occurrence(&from, false).ok().map(|next| next.timestamp())
    }
}

impl fmt::Debug for CronTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for CronTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.cron.as_str(), self.zone.iana_name().unwrap_or("UTC"))
    }
}

/// What the file says of it.
pub(super) struct WrittenSchedule {
    pub backup: Option<Spanned<String>>,
    pub backup_time_zone: Option<Spanned<String>>,
    pub backup_every: Option<Spanned<String>>,
    pub restore_within: Option<Spanned<String>>,
}

impl Checker<'_> {
    pub(super) fn schedule(&mut self, label: &str, written: WrittenSchedule) -> Option<Schedule> {
        let WrittenSchedule { backup, backup_time_zone, backup_every, restore_within } = written;
        let zone = match &backup_time_zone {
            Some(written) => self.zone("backup_time_zone", written),
            None => Some(TimeZone::UTC),
        };
        let when = match (backup, backup_every) {
            (None, None) => Some(None),
            (Some(_), Some(every)) => {
                self.at(&every, format!("{label} has backup and backup_every: leave one of them"));
                None
            }
            (Some(backup), None) => match CronTimes::new(backup.get_ref(), zone.clone().unwrap_or(TimeZone::UTC)) {
                Ok(times) => Some(Some(When::Cron(times))),
                Err(why) => {
                    self.at(&backup, format!("backup = {:?} in {label} {why}", backup.get_ref()));
                    None
                }
            },
            (None, Some(every)) => self.span("backup_every", &every, EVERY).map(|every| Some(When::Every(every))),
        };
        if let (Some(zone), Some(None | Some(When::Every(_)))) = (&backup_time_zone, &when) {
            self.at(zone, format!("backup_time_zone in {label} goes with backup = \"0 3 * * *\", which is not there"));
            return None;
        }
        let restore_within = match restore_within {
            Some(written) => Some(self.span("restore_within", &written, WITHIN)?),
            None => None,
        };
        zone?;
        Some(Schedule { when: when?, restore_within })
    }

    pub(super) fn zone(&mut self, setting: &str, written: &Spanned<String>) -> Option<TimeZone> {
        match TimeZone::get(written.get_ref()) {
            Ok(zone) => Some(zone),
            Err(_) => {
                let what = format!(
                    "{setting} = {:?} is no time zone such as \"Europe/Berlin\" that this machine knows",
                    written.get_ref()
                );
                self.at(written, what);
                None
            }
        }
    }

    /// A length of time that may be written in days and weeks.
    pub(super) fn span(
        &mut self,
        setting: &str,
        written: &Spanned<String>,
        (least, most): (Duration, Duration),
    ) -> Option<Duration> {
        let of = |text: &str| -> Option<Duration> {
            let span: Span = text.parse().ok()?;
            let length: SignedDuration = span.to_duration(SpanRelativeTo::days_are_24_hours()).ok()?;
            Duration::try_from(length).ok()
        };
        let show =
            |length: Duration| SignedDuration::try_from(length).map_or_else(|_| String::new(), |l| format!("{l:#}"));
        let range = format!("{} to {}", show(least), show(most));
        let what = match of(written.get_ref()) {
            Some(length) if (least..=most).contains(&length) => return Some(length),
            Some(_) => format!("{setting} = {:?} is out of range: {range}", written.get_ref()),
            None => format!(
                "{setting} = {:?} is not a span such as \"30m\", \"24h\" or \"7d\" ({range})",
                written.get_ref()
            ),
        };
        self.at(written, what);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_follow_the_clock_on_the_wall() {
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        let times = CronTimes::new("30 2 * * *", berlin).unwrap();
        let next = |at: &str| times.after(at.parse().unwrap()).unwrap().to_string();
        assert_eq!(next("2026-01-10T00:00:00Z"), "2026-01-10T01:30:00Z");
        assert_eq!(next("2026-07-10T00:00:00Z"), "2026-07-10T00:30:00Z");
        // The clock goes from 2:00 to 3:00 on 2026-03-29, and from 3:00 to 2:00 on 2026-10-25: once on each day.
        for (from, to) in
            [("2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z"), ("2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z")]
        {
            let (mut at, to, mut count) = (from.parse::<Timestamp>().unwrap(), to.parse::<Timestamp>().unwrap(), 0);
            while let Some(next) = times.after(at).filter(|next| *next < to) {
                (at, count) = (next, count + 1);
            }
            assert_eq!(count, 2, "{from}");
        }
    }

    #[test]
    fn what_never_comes_is_refused() {
        for text in ["0 0 30 2 *", "61 * * * *", "0 3 * *", "0 0 3 * * *", "", "at three"] {
            assert!(CronTimes::new(text, TimeZone::UTC).is_err(), "{text:?}");
        }
        assert!(CronTimes::new("0 0 29 2 *", TimeZone::UTC).is_ok(), "every four years is a time, too");
    }
}
