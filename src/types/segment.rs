use std::fmt;

use super::{Lsn, ParseError, TimelineId};

/// The size of a cluster's WAL segments: a power of two from 1 MiB to 1 GiB, fixed by initdb.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SegmentSize(u64);

impl SegmentSize {
    /// 16 MiB, what initdb chooses unless told otherwise.
    pub const DEFAULT: SegmentSize = SegmentSize(16 << 20);

    /// `None` unless `bytes` is a size that PostgreSQL accepts.
    pub const fn new(bytes: u64) -> Option<SegmentSize> {
        if bytes.is_power_of_two() && bytes >= 1 << 20 && bytes <= 1 << 30 { Some(SegmentSize(bytes)) } else { None }
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// How many segments share the middle eight digits of their names.
    pub const fn per_log(self) -> u64 {
        (1 << 32) / self.0
    }
}

impl fmt::Display for SegmentSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0 >> 20)
    }
}

impl serde::Serialize for SegmentSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> serde::Deserialize<'de> for SegmentSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = <u64 as serde::Deserialize>::deserialize(deserializer)?;
        SegmentSize::new(bytes).ok_or_else(|| serde::de::Error::custom(format!("{bytes} is not a WAL segment size")))
    }
}

/// The number of a segment, counted from the start of the log: position / segment size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentNumber(u64);

impl SegmentNumber {
    /// The `number`-th segment, counted from 0.
    pub const fn new(number: u64) -> SegmentNumber {
        SegmentNumber(number)
    }

    /// The number itself.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// First byte of the segment.
    pub const fn start(self, size: SegmentSize) -> Lsn {
        Lsn::new(self.0.saturating_mul(size.bytes()))
    }

    /// First byte after the segment.
    pub const fn end(self, size: SegmentSize) -> Lsn {
        self.start(size).advance(size.bytes())
    }

    /// The segment after this one.
    #[must_use]
    pub const fn next(self) -> SegmentNumber {
        SegmentNumber(self.0 + 1)
    }

    /// PostgreSQL's file name: timeline, log, segment within the log, eight upper-case hex digits each.
    pub fn file_name(self, timeline: TimelineId, size: SegmentSize) -> String {
        format!("{timeline}{:08X}{:08X}", self.0 / size.per_log(), self.0 % size.per_log())
    }

    /// Reads a segment's file name. `None` for any other name, and for a last part that this segment size cannot have.
    pub fn from_file_name(name: &str, size: SegmentSize) -> Option<(TimelineId, SegmentNumber)> {
        if name.len() != 24 || !is_upper_hex(name) {
            return None;
        }
        let part = |at: usize| u64::from_str_radix(&name[at..at + 8], 16).ok();
        let (log, within) = (part(8)?, part(16)?);
        let timeline = TimelineId::new(u32::from_str_radix(&name[..8], 16).ok()?)?;
        (within < size.per_log()).then(|| (timeline, SegmentNumber(log * size.per_log() + within)))
    }
}

fn is_upper_hex(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b))
}

/// A name that PostgreSQL hands to `archive_command` or asks `restore_command` for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalFileName {
    /// `000000010000000000000003`: timeline, and the 16 digits whose meaning depends on the segment size.
    Segment(String),
    /// `000000010000000000000003.partial`: the open segment of a timeline that was left.
    Partial(String),
    /// `000000010000000000000003.00000028.backup`: where a base backup began and ended.
    BackupHistory(String),
    /// `00000002.history`.
    History(TimelineId),
}

impl std::str::FromStr for WalFileName {
    type Err = ParseError;

    fn from_str(name: &str) -> Result<Self, ParseError> {
        let error = || ParseError::new("a WAL file name such as 000000010000000000000003 or 00000002.history", name);
        let segment = |digits: &str| digits.len() == 24 && is_upper_hex(digits) && !digits.starts_with("00000000");
        if segment(name) {
            return Ok(Self::Segment(name.to_owned()));
        }
        let (stem, extension) = name.split_once('.').ok_or_else(error)?;
        match extension {
            "partial" if segment(stem) => Ok(Self::Partial(name.to_owned())),
            "history" => stem.parse().map(Self::History).map_err(|_| error()),
            _ => match extension.split_once('.') {
                Some((offset, "backup")) if segment(stem) && offset.len() == 8 && is_upper_hex(offset) => {
                    Ok(Self::BackupHistory(name.to_owned()))
                }
                _ => Err(error()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_names() {
        let cases = [
            // byte         MiB  segment of timeline 1 that holds it
            ("0/FFFFFF", 16, "000000010000000000000000"), // last byte belongs to its own segment
            ("0/1000000", 16, "000000010000000000000001"),
            ("0/FFFFFFFF", 16, "0000000100000000000000FF"), // last before the log number carries
            ("1/0", 16, "000000010000000100000000"),
            ("0/100000", 1, "000000010000000000000001"),
            ("0/FFFFFFFF", 1, "000000010000000000000FFF"),
            ("1/0", 1024, "000000010000000100000000"), // only four segments per log number
            ("0/C0000000", 1024, "000000010000000000000003"),
        ];
        for (at, mib, want) in cases {
            let size = SegmentSize::new(mib << 20).unwrap();
            let segment = at.parse::<Lsn>().unwrap().segment(size);
            assert_eq!(segment.file_name(TimelineId::FIRST, size), want, "at {at}, {mib} MiB");
            assert_eq!(SegmentNumber::from_file_name(want, size), Some((TimelineId::FIRST, segment)));
        }
    }

    #[test]
    fn names_that_are_none() {
        let size = SegmentSize::DEFAULT;
        for bad in [
            "",
            "00000001000000000000000",
            "00000001000000000000010G",
            "000000010000000000000100",
            "0000000100000000000000ff",
            "000000000000000000000001",
        ] {
            assert_eq!(SegmentNumber::from_file_name(bad, size), None, "{bad:?} was taken");
        }
    }

    #[test]
    fn file_names_of_the_hooks() {
        use WalFileName::*;
        let segment = "000000010000000000000003";
        let cases = [
            (segment.to_owned(), Some(Segment(segment.to_owned()))),
            (format!("{segment}.partial"), Some(Partial(format!("{segment}.partial")))),
            (format!("{segment}.00000028.backup"), Some(BackupHistory(format!("{segment}.00000028.backup")))),
            ("0000000A.history".to_owned(), Some(History(TimelineId::new(10).unwrap()))),
            ("A.history".to_owned(), None),
            ("00000000.history".to_owned(), None),
            (format!("{segment}.backup"), None),
            ("../00000002.history".to_owned(), None),
            ("RECOVERYXLOG".to_owned(), None),
        ];
        for (name, want) in cases {
            assert_eq!(name.parse::<WalFileName>().ok(), want, "{name}");
        }
    }

    #[test]
    fn only_sizes_postgresql_takes() {
        assert!([0, 1, 512 << 10, 3 << 20, 2 << 30].into_iter().all(|bytes| SegmentSize::new(bytes).is_none()));
        assert!((20..=30).all(|exponent| SegmentSize::new(1 << exponent).is_some()));
    }
}
