use std::fmt;
use std::str::FromStr;

use super::{ParseError, SegmentNumber, SegmentSize};

/// A byte position in the write-ahead log. Text form is PostgreSQL's (`16/B374D848`).
/// Order is only meaningful within one branch; across timelines ask [`super::TimelineHistory`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(u64);

impl Lsn {
    /// PostgreSQL's "no position" (`0/0`): never the position of a record.
    pub const ZERO: Lsn = Lsn(0);

    /// A byte position as the server counts it.
    pub const fn new(byte: u64) -> Lsn {
        Lsn(byte)
    }

    /// The byte position as a number, for arithmetic on pages and for the wire.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// First byte of the segment that holds this position.
    pub const fn segment_start(self, size: SegmentSize) -> Lsn {
        Lsn(self.0 & !(size.bytes() - 1)) // exact: `SegmentSize` only holds powers of two
    }

    /// The segment that holds the byte at this position.
    pub const fn segment(self, size: SegmentSize) -> SegmentNumber {
        SegmentNumber::new(self.0 / size.bytes())
    }

    /// The segment that holds the last byte before this position: what an *end* belongs to.
    pub const fn segment_before(self, size: SegmentSize) -> SegmentNumber {
        SegmentNumber::new(self.0.saturating_sub(1) / size.bytes())
    }

    /// Offset of this position within its segment, in bytes.
    pub const fn segment_offset(self, size: SegmentSize) -> u64 {
        self.0 & (size.bytes() - 1)
    }

    /// The position `bytes` further on; saturates at the end of the log's range.
    #[must_use]
    pub const fn advance(self, bytes: u64) -> Lsn {
        Lsn(self.0.saturating_add(bytes))
    }

    /// Bytes from `earlier` to here; `None` if `earlier` lies ahead, which the caller has to face.
    pub const fn bytes_since(self, earlier: Lsn) -> Option<u64> {
        self.0.checked_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Lsn {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::new("an LSN such as 16/B374D848", text);
        let (high, low) = text.split_once('/').ok_or_else(error)?;
        let half = |digits: &str| {
            let plain = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u64::from_str_radix(digits, 16).ok()).flatten().ok_or_else(error)
        };
        Ok(Lsn(half(high)? << 32 | half(low)?))
    }
}

super::serde_by_text!(Lsn);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_form_is_postgresqls() {
        let cases =
            [("0/0", 0), ("0/1000000", 0x0100_0000), ("16/B374D848", 0x16_B374_D848), ("FFFFFFFF/FFFFFFFF", u64::MAX)];
        for (text, byte) in cases {
            assert_eq!(text.parse(), Ok(Lsn::new(byte)));
            assert_eq!(Lsn::new(byte).to_string(), text);
        }
        assert_eq!("16/b374d848".parse(), Ok(Lsn::new(0x16_B374_D848)));
        for bad in ["", "/", "1", "1/", "/1", "1/+2", "-1/2", "1/2/3", "1/123456789", " 1/2", "G/0"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad:?} was taken");
        }
    }

    proptest! {
        #[test]
        fn a_position_is_its_segment_and_its_offset(byte in any::<u64>(), exponent in 20u32..=30) {
            let size = SegmentSize::new(1 << exponent).unwrap();
            let lsn = Lsn::new(byte);
            prop_assert_eq!(lsn.segment_start(size).advance(lsn.segment_offset(size)), lsn);
            prop_assert_eq!(lsn.segment(size).start(size), lsn.segment_start(size));
            prop_assert_eq!(lsn.to_string().parse(), Ok(lsn));
        }
    }
}
