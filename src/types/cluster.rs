use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use super::ParseError;

/// PostgreSQL's system identifier: made by initdb, shared by a primary, its standbys and every restore of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemId(u64);

impl SystemId {
    /// The number that `IDENTIFY_SYSTEM` and `pg_controldata` show.
    pub const fn new(number: u64) -> SystemId {
        SystemId(number)
    }

    /// The number itself.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SystemId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let canonical = !text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit());
        let number = canonical.then(|| text.parse().ok()).flatten();
        number.map(SystemId).ok_or_else(|| ParseError::new("a system identifier such as 7312345678901234567", text))
    }
}

super::serde_by_text!(SystemId);

/// The name of a cluster in the configuration and in a repository: `[a-z0-9][a-z0-9_-]{0,62}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterName(String);

impl ClusterName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let fits = (1..=63).contains(&text.len()) && text.bytes().all(|b| letter(b) || b == b'_' || b == b'-');
        if fits && letter(text.as_bytes()[0]) && !matches!(text, "format" | "keys") {
            return Ok(ClusterName(text.to_owned()));
        }
        Err(ParseError::new("a cluster name (a-z, 0-9, _ and -, at most 63; `format` and `keys` are taken)", text))
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

super::serde_by_text!(ClusterName);

/// Where a cluster lies in a repository: `<cluster>/<system id>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId {
    /// Its name in the repository.
    pub name: ClusterName,
    /// Its identity.
    pub system: SystemId,
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.name, self.system)
    }
}

/// The name of a base backup: its start in UTC, to the second, `20261120T031500Z`. Sorting by name sorts by time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupLabel(Timestamp);

impl BackupLabel {
    /// The label of a backup that starts at `start`; what is below a second is dropped.
    pub fn at(start: Timestamp) -> BackupLabel {
        BackupLabel(Timestamp::from_second(start.as_second()).unwrap_or(start))
    }

    /// The start, to the second.
    pub const fn start(self) -> Timestamp {
        self.0
    }
}

impl fmt::Display for BackupLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.strftime("%Y%m%dT%H%M%SZ"))
    }
}

impl fmt::Debug for BackupLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for BackupLabel {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::new("a backup label such as 20261120T031500Z", text);
        let civil = DateTime::strptime("%Y%m%dT%H%M%SZ", text).map_err(|_| error())?;
        let label = BackupLabel(civil.to_zoned(TimeZone::UTC).map_err(|_| error())?.timestamp());
        (label.to_string() == text).then_some(label).ok_or_else(error)
    }
}

super::serde_by_text!(BackupLabel);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_read_back_as_written_and_only_so() {
        let label = BackupLabel::at("2026-11-20T03:15:00.987Z".parse().unwrap());
        assert_eq!(label.to_string(), "20261120T031500Z");
        assert_eq!("20261120T031500Z".parse(), Ok(label));
        for bad in ["", "20261120", "20261120T031500", "20261320T031500Z", "2026-11-20T03:15:00Z", "20261120T31500Z"] {
            assert!(bad.parse::<BackupLabel>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn cluster_names_are_safe_in_a_path() {
        assert!(["main", "a", "0-x_y"].into_iter().all(|name| name.parse::<ClusterName>().is_ok()));
        let bad = ["", ".", "..", "Main", "a/b", "-a", "ä", "keys", "format"];
        assert!(bad.into_iter().all(|name| name.parse::<ClusterName>().is_err()));
        assert!("a".repeat(64).parse::<ClusterName>().is_err());
    }
}
