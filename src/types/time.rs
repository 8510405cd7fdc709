use std::fmt;

use jiff::Timestamp;

/// Seconds between the Unix epoch and PostgreSQL's (2000-01-01 00:00:00 UTC).
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

/// PostgreSQL's `TimestampTz` as WAL and wire carry it: microseconds since 2000-01-01 00:00:00 UTC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PgTimestamp(i64);

impl PgTimestamp {
    /// From the number in a record or message.
    pub const fn new(micros: i64) -> PgTimestamp {
        PgTimestamp(micros)
    }

    /// Microseconds since 2000-01-01 00:00:00 UTC.
    pub const fn micros(self) -> i64 {
        self.0
    }

    /// The instant; beyond jiff's range (years -9999 to 9999) the nearest end of it, so that garbage cannot panic.
    pub fn to_timestamp(self) -> Timestamp {
        let micros = self.0.saturating_add(POSTGRES_EPOCH_SECONDS * 1_000_000);
        let nearest = if micros < 0 { Timestamp::MIN } else { Timestamp::MAX };
        Timestamp::from_microsecond(micros).unwrap_or(nearest)
    }

    /// The last microsecond not after `instant`, which is how a target between two microseconds is understood.
    pub fn from_timestamp(instant: Timestamp) -> PgTimestamp {
        let floor = instant.as_nanosecond().div_euclid(1000) - i128::from(POSTGRES_EPOCH_SECONDS) * 1_000_000;
        PgTimestamp(i64::try_from(floor).unwrap_or(if floor < 0 { i64::MIN } else { i64::MAX }))
    }
}

impl fmt::Display for PgTimestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.6}", self.to_timestamp())
    }
}

impl fmt::Debug for PgTimestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for PgTimestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for PgTimestamp {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <Timestamp as serde::Deserialize>::deserialize(deserializer).map(PgTimestamp::from_timestamp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_epoch_is_postgresqls() {
        assert_eq!(PgTimestamp::new(0).to_string(), "2000-01-01T00:00:00.000000Z");
        assert_eq!(PgTimestamp::from_timestamp("1999-12-31T23:59:59.9999995Z".parse().unwrap()).micros(), -1);
    }

    proptest! {
        #[test]
        fn any_number_has_an_instant(micros in any::<i64>()) {
            let _ = PgTimestamp::new(micros).to_timestamp();
        }

        #[test]
        fn instants_of_this_age_survive(micros in -1_000_000_000_000_000i64..4_000_000_000_000_000) {
            let time = PgTimestamp::new(micros);
            prop_assert_eq!(PgTimestamp::from_timestamp(time.to_timestamp()), time);
            let json = serde_json::to_string(&time).unwrap();
            prop_assert_eq!(serde_json::from_str::<PgTimestamp>(&json).unwrap(), time);
        }
    }
}
