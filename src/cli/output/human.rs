//! Numbers and times as people read them.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::{Offset, TimeZone};

/// A size in powers of ten with three digits: `999 bytes`, `1.23 GB`. PostgreSQL's tools count in powers of two; disks
/// and bills do not.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if bytes < 1000 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut unit = UNITS.iter();
    let mut name = unit.next().copied().unwrap_or_default();
    // 999.5 would be shown as 1000: it is 1.00 of the next unit.
    while value >= 999.5 {
        let Some(next) = unit.next() else { break };
        (value, name) = (value / 1000.0, next);
    }
    let decimals = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.decimals$} {name}")
}

/// A speed: `12.3 MB/s`. Nothing was measured in no time.
pub fn bytes_per_second(bytes_done: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    let speed = if seconds > 0.0 { bytes_done as f64 / seconds } else { 0.0 };
    format!("{}/s", bytes(speed as u64)) // saturates
}

/// A duration with the two units that matter: `340 ms`, `3.2 s`, `2 min 05 s`, `1 h 02 min`, `3 d 04 h`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 if duration.subsec_millis() == 0 && !duration.is_zero() => format!("{} µs", duration.subsec_micros()),
        0 => format!("{} ms", duration.subsec_millis()),
        1..60 => {
            let tenths = duration.as_millis() / 100;
            format!("{}.{} s", tenths / 10, tenths % 10)
        }
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// A count with its noun: `1 file`, `12,345 files`.
pub fn count(number: u64, noun: &str) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    format!("{grouped} {noun}{}", if number == 1 { "" } else { "s" })
}

/// An instant in the zone of this machine, with its offset and UTC beside it.
pub fn time(instant: Timestamp) -> String {
    time_in(instant, &TimeZone::system())
}

/// An instant in `zone`: `2026-11-20 15:03:00.25+01:00 (2026-11-20 14:03:00.25 UTC)`; only UTC where that is the zone's
/// own time. Microseconds at most: what is below them PostgreSQL does not know.
pub fn time_in(instant: Timestamp, zone: &TimeZone) -> String {
    let civil = |offset: Offset| {
        let civil = offset.to_datetime(instant);
        let whole = civil.strftime("%Y-%m-%d %H:%M:%S").to_string();
        match civil.subsec_nanosecond() / 1000 {
            0 => whole,
            micros => format!("{whole}.{}", format!("{micros:06}").trim_end_matches('0')),
        }
    };
    let (utc, offset) = (civil(Offset::UTC), zone.to_offset(instant));
    match offset.seconds() {
        0 => format!("{utc} UTC"),
        seconds => {
            let (sign, away) = (if seconds < 0 { '-' } else { '+' }, seconds.unsigned_abs());
            let mut shown = format!("{sign}{:02}:{:02}", away / 3600, away / 60 % 60);
            if away % 60 != 0 {
                shown.push_str(&format!(":{:02}", away % 60)); // zones of the 19th century
            }
            format!("{}{shown} ({utc} UTC)", civil(offset))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let cases = [
            (0, "0 bytes"),
            (999, "999 bytes"),
            (1000, "1.00 kB"),
            (16 << 20, "16.8 MB"),
            (999_499, "999 kB"),
            (999_500, "1.00 MB"),
            (9_994_999, "9.99 MB"),
            (9_995_000, "10.0 MB"), // never "9.100" or "10.00"
            (3_000_000_000_000, "3.00 TB"),
            (u64::MAX, "18.4 EB"),
        ];
        for (number, want) in cases {
            assert_eq!(bytes(number), want);
        }
        assert_eq!(bytes_per_second(50_000_000, Duration::from_secs(2)), "25.0 MB/s");
        assert_eq!(bytes_per_second(5, Duration::ZERO), "0 bytes/s");
    }

    #[test]
    fn durations() {
        let cases = [
            (0, "0 ms"),
            (340, "340 ms"),
            (3_290, "3.2 s"),
            (59_999, "59.9 s"), // never "60.0 s"
            (125_000, "2 min 05 s"),
            (3_720_000, "1 h 02 min"),
            (273_600_000, "3 d 04 h"),
        ];
        for (millis, want) in cases {
            assert_eq!(duration(Duration::from_millis(millis)), want);
        }
        assert_eq!(duration(Duration::from_micros(70)), "70 µs");
    }

    #[test]
    fn counts() {
        assert_eq!(count(1, "file"), "1 file");
        assert_eq!(count(0, "file"), "0 files");
        assert_eq!(count(1_234_567, "file"), "1,234,567 files");
        assert_eq!(count(123, "file"), "123 files");
    }

    #[test]
    fn times_carry_their_offset_and_utc() {
        let instant: Timestamp = "2026-11-20T14:03:00.25Z".parse().unwrap();
        let zone = |hours: i8| TimeZone::fixed(jiff::tz::offset(hours));
        assert_eq!(time_in(instant, &TimeZone::UTC), "2026-11-20 14:03:00.25 UTC");
        assert_eq!(time_in(instant, &zone(1)), "2026-11-20 15:03:00.25+01:00 (2026-11-20 14:03:00.25 UTC)");
        let half = TimeZone::fixed(Offset::from_seconds(-(3 * 3600 + 1800)).unwrap());
        assert_eq!(time_in(instant, &half), "2026-11-20 10:33:00.25-03:30 (2026-11-20 14:03:00.25 UTC)");
    }
}
