use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use super::ParseError;

/// The number of a timeline, from 1. Text form is the eight hex digits of file names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimelineId(NonZeroU32);

impl TimelineId {
    /// The timeline that initdb makes.
    pub const FIRST: TimelineId = TimelineId(NonZeroU32::MIN);

    /// `None` for 0, which PostgreSQL never uses.
    pub const fn new(number: u32) -> Option<TimelineId> {
        match NonZeroU32::new(number) {
            Some(number) => Some(TimelineId(number)),
            None => None,
        }
    }

    /// The number, as settings and functions of PostgreSQL write it.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}", self.0)
    }
}

impl FromStr for TimelineId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let plain = text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
        plain
            .then(|| u32::from_str_radix(text, 16).ok().and_then(TimelineId::new))
            .flatten()
            .ok_or_else(|| ParseError::new("a timeline in eight hex digits such as 00000002", text))
    }
}

super::serde_by_text!(TimelineId);

/// One history of a timeline: `00000002`, or `00000002.1` where a second server wrote other bytes under that number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Branch {
    /// The timeline's number, which is in the names and page headers of its WAL.
    pub timeline: TimelineId,
    /// 0 for the first history seen under this number.
    pub ordinal: u16,
}

impl Branch {
    /// The first (and usually only) history of a timeline.
    pub const fn first(timeline: TimelineId) -> Branch {
        Branch { timeline, ordinal: 0 }
    }
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ordinal {
            0 => write!(f, "{}", self.timeline),
            ordinal => write!(f, "{}.{ordinal}", self.timeline),
        }
    }
}

impl FromStr for Branch {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::new("a branch such as 00000002 or 00000002.1", text);
        let Some((timeline, ordinal)) = text.split_once('.') else {
            return text.parse().map(Branch::first).map_err(|_| error());
        };
        let canonical = ordinal.bytes().all(|b| b.is_ascii_digit()) && !ordinal.starts_with('0');
        let ordinal = canonical.then(|| ordinal.parse().ok()).flatten().ok_or_else(error)?;
        Ok(Branch { timeline: timeline.parse().map_err(|_| error())?, ordinal })
    }
}

super::serde_by_text!(Branch);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_read_back_as_written_and_only_so() {
        let two = TimelineId::new(2).unwrap();
        for (text, branch) in [("00000002", Branch::first(two)), ("00000002.1", Branch { timeline: two, ordinal: 1 })] {
            assert_eq!(text.parse(), Ok(branch));
            assert_eq!(branch.to_string(), text);
        }
        for bad in [
            "",
            "2",
            "00000002.",
            "00000002.0",
            "00000002.01",
            "00000002.70000",
            "00000000",
            "0000000a",
            "00000002.1.1",
        ] {
            assert!(bad.parse::<Branch>().is_err(), "{bad:?} was taken");
        }
    }
}
