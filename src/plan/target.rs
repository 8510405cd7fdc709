//! What a person typed after `--to`, understood once.
//!
//! A time always becomes one instant: with an offset or a zone in the text, by `--tz`, or not at all. What can be
//! read in two ways (no zone, an hour that a clock change repeats) is refused with both readings spelled out, because
//! the difference between them is an hour of somebody's data.

use std::fmt;

use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};
use jiff::{Span, Timestamp};
use serde::Serialize;

use crate::types::Lsn;

/// Where recovery is asked to stop, and how it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Target {
    /// What was meant.
    pub point: Point,
    /// Stop before the point instead of after it (`recovery_target_inclusive = off`). Only for time, LSN and xid.
    pub exclusive: bool,
    /// The text as typed.
    pub given: String,
}

/// The place itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "value")]
pub enum Point {
    /// The state as of an instant, by the commit times in the WAL.
    Time(Timestamp),
    /// A position in the WAL.
    Lsn(Lsn),
    /// The end of one transaction, commit or abort, by its 32-bit number.
    Xid(u32),
    /// A restore point made by `pg_create_restore_point`.
    Name(String),
    /// As soon as the base backup is consistent.
    Immediate,
    /// The last whole record that is archived.
    Latest,
}

/// What the reading of a text depends on besides the text. Handed in, so that nothing here knows a clock.
#[derive(Debug, Clone)]
pub struct Reading {
    /// The current time, for `10 minutes ago`.
    pub now: Timestamp,
    /// The zone of the person who asks: only to spell out what a time without zone could mean.
    pub local: TimeZone,
    /// The zone given by `--tz`: a time without zone is read in it.
    pub tz: Option<TimeZone>,
}

/// Why a text is no target. Nothing was read or changed; asking again with the same text gives the same answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// A time that could be local or UTC.
    #[error(
        "{text:?} has no time zone: as local time it is {local}, as UTC it is {utc}; write one of these, or say --tz"
    )]
    NoZone {
        /// As typed.
        text: String,
        /// Read as local time, with offset and UTC beside it.
        local: String,
        /// Read as UTC, with the local form beside it.
        utc: String,
    },
    /// The hour that is repeated when clocks are set back.
    #[error("{text:?} happened twice in {zone}: {first} and {second}; write the one that is meant, with its offset")]
    Twice {
        /// As typed.
        text: String,
        /// The zone in which it did.
        zone: String,
        /// The earlier instant.
        first: String,
        /// The later instant.
        second: String,
    },
    /// The hour that is left out when clocks are set forward.
    #[error(
        "{text:?} never happened in {zone}, where the clocks were set forward: before that it would be {before}, after it {after}"
    )]
    Never {
        /// As typed.
        text: String,
        /// The zone in which it did not.
        zone: String,
        /// With the offset before the change.
        before: String,
        /// With the offset after the change.
        after: String,
    },
    /// `CET` is an offset to PostgreSQL, a zone with summer time to the zone database, and `IST` three countries.
    #[error(
        "{zone:?} is not understood as a time zone: give an offset such as +01:00, UTC, or a full name such as Europe/Berlin{hint}"
    )]
    Zone {
        /// The zone's text.
        zone: String,
        /// What else may be wrong; empty, or begins with a separator.
        hint: &'static str,
    },
    /// Exclusive makes no difference there, and the server ignores it: better to say so than to let someone rely on it.
    #[error("--exclusive means nothing for {0}: it is for a time, an LSN or a transaction id")]
    Exclusive(String),
    /// Everything else.
    #[error(
        "{text:?} is not a target: {why}; a target is a time (2026-11-20T10:00:00+01:00, `10 minutes ago`), an LSN (0/3000060), xid:1234, name:before-release, immediate or latest"
    )]
    Unknown {
        /// As typed, shortened.
        text: String,
        /// What is wrong.
        why: String,
    },
}

impl TargetError {
    /// Never: the text has to change.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoZone { .. }
            | Self::Twice { .. }
            | Self::Never { .. }
            | Self::Zone { .. }
            | Self::Exclusive(_)
            | Self::Unknown { .. } => false,
        }
    }

    fn unknown(text: &str, why: impl Into<String>) -> TargetError {
        TargetError::Unknown { text: text.chars().take(80).collect(), why: why.into() }
    }
}

/// Longest name of a restore point: the record has 64 bytes for it, one of them for the end.
const NAME_MAX: usize = 63;
/// The first transaction id that a transaction can have; the ones below mean "none", "bootstrap" and "frozen".
const FIRST_XID: u32 = 3;

impl Target {
    /// Reads the argument of `--to`.
    pub fn parse(text: &str, exclusive: bool, reading: &Reading) -> Result<Target, TargetError> {
        let given = text.trim();
        let point = Point::parse(given, reading)?;
        if exclusive && !matches!(point, Point::Time(_) | Point::Lsn(_) | Point::Xid(_)) {
            return Err(TargetError::Exclusive(given.to_owned()));
        }
        Ok(Target { point, exclusive, given: given.to_owned() })
    }

    /// The last archived record.
    pub fn latest() -> Target {
        Target { point: Point::Latest, exclusive: false, given: "latest".to_owned() }
    }
}

impl Point {
    fn parse(text: &str, reading: &Reading) -> Result<Point, TargetError> {
        if text.is_empty() {
            return Err(TargetError::unknown(text, "it is empty"));
        }
        match text.to_ascii_lowercase().as_str() {
            "immediate" => return Ok(Point::Immediate),
            "latest" => return Ok(Point::Latest),
            "now" => return Err(TargetError::unknown(text, "what is archived ends a little before now: say `latest`")),
            _ => {}
        }
        if let Some(name) = text.strip_prefix("name:") {
            return restore_point(text, name).map(Point::Name);
        }
        if let Some(digits) = text.strip_prefix("xid:") {
            return xid(text, digits.trim());
        }
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return xid(text, text);
        }
        if let Ok(lsn) = text.parse::<Lsn>() {
            let none = || TargetError::unknown(text, "0/0 is PostgreSQL's way to write that there is no position");
            return if lsn == Lsn::ZERO { Err(none()) } else { Ok(Point::Lsn(lsn)) };
        }
        if text.to_ascii_lowercase().ends_with("ago") {
            return ago(text, reading).map(Point::Time);
        }
        instant(text, reading).map(Point::Time)
    }
}

fn restore_point(text: &str, name: &str) -> Result<String, TargetError> {
    match name.len() {
        0 => Err(TargetError::unknown(text, "the restore point has no name")),
        1..=NAME_MAX => Ok(name.to_owned()),
        _ => Err(TargetError::unknown(text, format!("a restore point's name has at most {NAME_MAX} bytes"))),
    }
}

/// Takes `pg_current_xact_id()`'s 64 bits too, as the server does: WAL records and `recovery_target_xid` know the lower 32.
fn xid(text: &str, digits: &str) -> Result<Point, TargetError> {
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let number = plain.then(|| digits.parse::<u64>().ok()).flatten();
    let number = number.ok_or_else(|| TargetError::unknown(text, "a transaction id is a decimal number"))?;
    let xid = (number & u64::from(u32::MAX)) as u32; // invariant: masked to 32 bits
    if xid < FIRST_XID {
        return Err(TargetError::unknown(text, "transaction ids begin at 3"));
    }
    Ok(Point::Xid(xid))
}

fn ago(text: &str, reading: &Reading) -> Result<Timestamp, TargetError> {
    let error = |why: String| TargetError::unknown(text, why);
    let span: Span = text.parse().map_err(|e| error(format!("{e}")))?;
    let zone = reading.tz.as_ref().unwrap_or(&reading.local); // `1 day ago` is a day of the calendar there
    let then = reading.now.to_zoned(zone.clone()).checked_add(span).map_err(|e| error(format!("{e}")))?;
    Ok(then.timestamp())
}

fn instant(text: &str, reading: &Reading) -> Result<Timestamp, TargetError> {
    if text.contains('[') {
        // RFC 9557, what jiff and java.time print; it checks that offset and zone agree.
        let zoned = text.parse::<jiff::Zoned>().map_err(|e| TargetError::unknown(text, e.to_string()))?;
        return Ok(zoned.timestamp());
    }
    let (civil, rest) = split_zone(text);
    let no_time = |e: jiff::Error| TargetError::unknown(text, format!("it does not read as a time ({e})"));
    let civil: DateTime = civil.parse().map_err(no_time)?;
    match rest {
        "" => match &reading.tz {
            Some(zone) => in_zone(text, civil, zone),
            None => Err(no_zone(text, civil, &reading.local)),
        },
        zone => in_zone(text, civil, &parse_zone(zone)?),
    }
}

/// Date and time of day, and what follows them. The two may be parted by `T` or a space, as PostgreSQL and RFC 3339 do.
fn split_zone(text: &str) -> (&str, &str) {
    let part_of_time = |c: char| c.is_ascii_digit() || matches!(c, ':' | '.' | ',');
    let date = text.find(|c: char| !c.is_ascii_digit() && c != '-').unwrap_or(text.len());
    let after_date = &text[date..];
    let gap = after_date.len() - after_date.trim_start_matches(['T', 't', ' ']).len();
    let time = &after_date[gap..];
    let end = time.find(|c| !part_of_time(c)).unwrap_or(time.len());
    let cut = if end == 0 { date } else { date + gap + end };
    (text[..cut].trim(), text[cut..].trim())
}

/// A zone as `--tz` or a timestamp gives it: `UTC`, `Z`, an offset, or a full name.
pub fn parse_zone(text: &str) -> Result<TimeZone, TargetError> {
    if matches!(text.to_ascii_uppercase().as_str(), "Z" | "UTC" | "GMT") {
        return Ok(TimeZone::UTC);
    }
    let error = |hint| TargetError::Zone { zone: text.chars().take(80).collect(), hint };
    if text.starts_with(['+', '-']) {
        return offset(text).map(TimeZone::fixed).ok_or_else(|| error(""));
    }
    if !text.contains('/') {
        return Err(error(""));
    }
    TimeZone::get(text).map_err(|_| error(" (is the package tzdata installed?)"))
}

/// `+01`, `+0530`, `+05:30`, `-00:44:30`. Signs are those of ISO 8601: east of Greenwich is plus.
fn offset(text: &str) -> Option<Offset> {
    let (sign, digits) = match text.split_at_checked(1)? {
        ("+", digits) => (1, digits),
        ("-", digits) => (-1, digits),
        _ => return None,
    };
    let parts: Vec<&str> = match digits.len() {
        4 if !digits.contains(':') => vec![digits.get(..2)?, digits.get(2..)?],
        _ => digits.split(':').collect(),
    };
    let number = |part: &&str| {
        let plain = (1..=2).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| part.parse::<i32>().ok()).flatten()
    };
    let numbers: Vec<i32> = parts.iter().map(number).collect::<Option<_>>()?;
    let (hours, minutes, seconds) = match numbers[..] {
        [h] => (h, 0, 0),
        [h, m] => (h, m, 0),
        [h, m, s] => (h, m, s),
        _ => return None,
    };
    // PostgreSQL knows none beyond these, and a slip of the finger should not move a target by days.
    let sane = hours <= 15 && minutes < 60 && seconds < 60;
    sane.then(|| Offset::from_seconds(sign * (hours * 3600 + minutes * 60 + seconds)).ok()).flatten()
}

fn in_zone(text: &str, civil: DateTime, zone: &TimeZone) -> Result<Timestamp, TargetError> {
    let at = |offset: Offset| offset.to_timestamp(civil).map_err(|e| TargetError::unknown(text, e.to_string()));
    let both = |offset: Offset| Ok::<_, TargetError>(show_in(at(offset)?, offset));
    let (text_owned, name) = (text.to_owned(), zone_name(zone));
    match zone.to_ambiguous_timestamp(civil).offset() {
        AmbiguousOffset::Unambiguous { offset } => at(offset),
        AmbiguousOffset::Fold { before, after } => {
            Err(TargetError::Twice { text: text_owned, zone: name, first: both(before)?, second: both(after)? })
        }
        AmbiguousOffset::Gap { before, after } => {
            Err(TargetError::Never { text: text_owned, zone: name, before: both(before)?, after: both(after)? })
        }
    }
}

fn zone_name(zone: &TimeZone) -> String {
    zone.iana_name().unwrap_or("that zone").to_owned()
}

fn no_zone(text: &str, civil: DateTime, local: &TimeZone) -> TargetError {
    let as_utc = match Offset::UTC.to_timestamp(civil) {
        Ok(instant) => instant,
        Err(e) => return TargetError::unknown(text, e.to_string()),
    };
    match in_zone(text, civil, local) {
        Ok(as_local) => {
            TargetError::NoZone { text: text.to_owned(), local: show(as_local, local), utc: show(as_utc, local) }
        }
        Err(two_readings) => two_readings,
    }
}

/// An instant as people should see it: with its offset in `zone`, and in UTC beside it.
pub fn show(instant: Timestamp, zone: &TimeZone) -> String {
    show_in(instant, zone.to_offset(instant))
}

fn show_in(instant: Timestamp, offset: Offset) -> String {
    if offset == Offset::UTC {
        return format!("{}+00:00", offset.to_datetime(instant));
    }
    format!("{} ({instant})", instant.display_with_offset(offset))
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.point {
            Point::Time(instant) if instant.to_string() == self.given => write!(f, "time {instant}")?,
            Point::Time(instant) => write!(f, "time {instant} (given as {:?})", self.given)?,
            Point::Lsn(lsn) => write!(f, "LSN {lsn}")?,
            Point::Xid(xid) if self.given.trim_start_matches("xid:").trim() == xid.to_string() => {
                write!(f, "transaction {xid}")?;
            }
            Point::Xid(xid) => write!(f, "transaction {xid} (given as {:?}; WAL knows the lower 32 bits)", self.given)?,
            Point::Name(name) => write!(f, "restore point {name:?}")?,
            Point::Immediate => f.write_str("the base backup's own end (immediate)")?,
            Point::Latest => f.write_str("the last archived record (latest)")?,
        }
        if self.exclusive { f.write_str(", exclusive") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reading(tz: Option<&str>) -> Reading {
        Reading {
            now: "2026-11-20T12:00:00Z".parse().unwrap(),
            local: TimeZone::fixed(jiff::tz::offset(1)),
            tz: tz.map(|zone| parse_zone(zone).unwrap()),
        }
    }

    fn parse(text: &str) -> Result<Point, TargetError> {
        Target::parse(text, false, &reading(None)).map(|target| target.point)
    }

    #[test]
    fn every_way_to_write_an_instant() {
        let cases = [
            ("2026-11-20T10:00:00Z", "2026-11-20T10:00:00Z"),
            ("2026-11-20t10:00:00z", "2026-11-20T10:00:00Z"),
            ("2026-11-20 10:00:00.123+01", "2026-11-20T09:00:00.123Z"),
            ("2026-11-20 10:00:00.123456 +05:30", "2026-11-20T04:30:00.123456Z"),
            ("2026-11-20 10:00+0530", "2026-11-20T04:30:00Z"),
            ("2026-11-20 10:00:00 -00:44:30", "2026-11-20T10:44:30Z"),
            ("2026-11-20 10:00:00 UTC", "2026-11-20T10:00:00Z"),
            ("2026-11-20 10:00:00 Europe/Berlin", "2026-11-20T09:00:00Z"),
            ("2026-07-20 10:00:00 Europe/Berlin", "2026-07-20T08:00:00Z"),
            ("2026-11-20T10:00:00+01:00[Europe/Berlin]", "2026-11-20T09:00:00Z"),
            ("2026-11-20 UTC", "2026-11-20T00:00:00Z"),
            ("10 minutes ago", "2026-11-20T11:50:00Z"),
            ("90s ago", "2026-11-20T11:58:30Z"),
            ("1h 30m ago", "2026-11-20T10:30:00Z"),
            ("1 day ago", "2026-11-19T12:00:00Z"),
        ];
        for (text, instant) in cases {
            assert_eq!(parse(text), Ok(Point::Time(instant.parse().unwrap())), "{text}");
        }
    }

    #[test]
    fn places_that_are_no_times() {
        let cases = [
            ("0/3000060", Point::Lsn(Lsn::new(0x300_0060))),
            ("16/b374d848", Point::Lsn(Lsn::new(0x16_B374_D848))),
            ("xid:1234", Point::Xid(1234)),
            ("1234", Point::Xid(1234)),
            ("4294968530", Point::Xid(1234)),
            ("name:before-release", Point::Name("before-release".to_owned())),
            ("name:0/3000060", Point::Name("0/3000060".to_owned())),
            ("immediate", Point::Immediate),
            (" Latest ", Point::Latest),
        ];
        for (text, point) in cases {
            assert_eq!(parse(text), Ok(point), "{text}");
        }
    }

    #[test]
    fn what_is_no_target_gets_a_sentence() {
        let long = format!("name:{}", "x".repeat(64));
        for bad in [
            "",
            "yesterday",
            "now",
            "name:",
            &long,
            "xid:",
            "xid:-5",
            "xid:2",
            "0",
            "0/0",
            "0/G",
            "99999999999999999999",
            "2026-13-20T10:00:00Z",
            "2026-11-20T25:00:00Z",
            "2026-11-20 10:00:00 +99",
            "2026-11-20 10:00:00+1:2:3:4",
            "-10 minutes ago",
            "ago",
            "minutes ago",
            "2026-11-20T10:00:00+05:00[Europe/Berlin]",
            "before-release",
        ] {
            let error = parse(bad).expect_err(bad);
            assert!(matches!(error, TargetError::Unknown { .. } | TargetError::Zone { .. }), "{bad}: {error}");
            assert!(!error.is_retryable());
        }
        for zone in ["CET", "IST", "Mars/Olympus"] {
            let text = format!("2026-11-20 10:00:00 {zone}");
            assert!(matches!(parse(&text), Err(TargetError::Zone { .. })), "{zone}");
        }
    }

    #[test]
    fn a_time_without_zone_is_refused_with_both_readings() {
        let message = parse("2026-11-20 10:00:00").unwrap_err().to_string();
        for part in [
            "2026-11-20T10:00:00+01:00 (2026-11-20T09:00:00Z)",
            "2026-11-20T11:00:00+01:00 (2026-11-20T10:00:00Z)",
            "--tz",
        ] {
            assert!(message.contains(part), "{message}");
        }
        let with = |tz| Target::parse("2026-11-20 10:00:00", false, &reading(Some(tz))).unwrap().point;
        assert_eq!(with("UTC"), Point::Time("2026-11-20T10:00:00Z".parse().unwrap()));
        assert_eq!(with("Europe/Berlin"), Point::Time("2026-11-20T09:00:00Z".parse().unwrap()));
        // A zone in the text counts more than --tz.
        let both = Target::parse("2026-11-20 10:00:00+02", false, &reading(Some("UTC"))).unwrap();
        assert_eq!(both.point, Point::Time("2026-11-20T08:00:00Z".parse().unwrap()));
    }

    #[test]
    fn an_hour_that_happened_twice_or_never_is_refused() {
        let twice = parse("2026-10-25 02:30:00 Europe/Berlin").unwrap_err();
        assert!(matches!(twice, TargetError::Twice { .. }), "{twice}");
        let message = twice.to_string();
        assert!(message.contains("2026-10-25T00:30:00Z") && message.contains("2026-10-25T01:30:00Z"), "{message}");
        let never = parse("2026-03-29 02:30:00 Europe/Berlin").unwrap_err();
        assert!(matches!(never, TargetError::Never { .. }), "{never}");
    }

    #[test]
    fn exclusive_only_where_it_means_something() {
        let parse = |text| Target::parse(text, true, &reading(None));
        assert!(["2026-11-20T10:00:00Z", "0/5", "7"].into_iter().all(|text| parse(text).is_ok()));
        assert!(
            ["name:x", "latest", "immediate"]
                .into_iter()
                .all(|text| matches!(parse(text), Err(TargetError::Exclusive(_))))
        );
    }

    #[test]
    fn the_echo_says_the_utc_instant_and_what_was_typed() {
        let echo = |text| Target::parse(text, false, &reading(None)).unwrap().to_string();
        assert_eq!(echo("2026-11-20 10:00+01"), r#"time 2026-11-20T09:00:00Z (given as "2026-11-20 10:00+01")"#);
        assert_eq!(echo("xid:7"), "transaction 7");
        assert!(echo("4294968530").contains("1234"));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn no_text_like_a_time_panics(text in "[0-9]{1,5}-[0-9]{1,3}[-T ][0-9:. ]{0,12}[-+A-Za-z/\\[\\]0-9: ]{0,16}") {
            let _ = parse(&text);
        }

        #[test]
        fn an_instant_reads_back(micros in -30_000_000_000_000_000i64..200_000_000_000_000_000) {
            let instant = Timestamp::from_microsecond(micros).unwrap();
            prop_assert_eq!(parse(&instant.to_string()), Ok(Point::Time(instant)));
        }
    }
}
