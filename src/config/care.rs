//! `verify_within`, `verify_rate` and `drill`: how what is kept is proved to be whole.

use std::num::NonZeroU64;
use std::path::PathBuf;

use jiff::SignedDuration;
use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::check::Checker;
use super::error::nearest;
use super::keep::span;

/// What `drill` may say.
pub const DRILL_SETTINGS: &[&str] = &["scratch", "every", "max_bytes", "bindir", "user", "database", "assertions"];
/// What `verify_within` and `every` may be.
const SPAN: (SignedDuration, SignedDuration) = (SignedDuration::from_hours(24), SignedDuration::from_hours(366 * 24));
/// More assertions belong into a function.
const ASSERTIONS: usize = 100;

/// How much is read when, in the background.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verify {
    /// Everything is opened once within so long; `None`: names, lengths and records alone.
    pub within: Option<SignedDuration>,
    /// Bytes a second at most.
    pub rate: NonZeroU64,
}

/// How drills are done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drill {
    /// Where, absolute.
    pub scratch: PathBuf,
    /// How often `pgkeep run` does one; `None`: only by hand.
    pub every: Option<SignedDuration>,
    /// Bytes of disk space at most.
    pub max_bytes: Option<u64>,
    /// The server's programs; `None`: those that are found.
    pub bindir: Option<PathBuf>,
    /// A superuser of the cluster.
    pub user: String,
    /// The database in which assertions are asked.
    pub database: String,
    /// SQL that has to be true.
    pub assertions: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenDrill {
    scratch: Option<Spanned<String>>,
    every: Option<Spanned<String>>,
    max_bytes: Option<Spanned<String>>,
    bindir: Option<Spanned<String>>,
    user: Option<Spanned<String>>,
    database: Option<Spanned<String>>,
    assertions: Option<Spanned<Vec<Spanned<String>>>>,
}

/// Names in `drill` that are not settings: where, and what to say.
pub(super) fn unknown(cluster: &str, written: &DeTable<'_>, found: &mut impl FnMut(usize, String)) {
    for (name, value) in written.iter().filter(|(name, _)| name.get_ref().as_ref() == "drill") {
        let DeValue::Table(drill) = value.get_ref() else {
            let what = "drill is a table: drill = { scratch = \"/var/tmp/pgkeep-drill\", every = \"7d\" }".to_owned();
            found(name.span().start, what);
            continue;
        };
        for name in drill.keys().filter(|name| !DRILL_SETTINGS.contains(&name.get_ref().as_ref())) {
            let start = format!("unknown setting {:?} in drill of [cluster.{cluster}]", name.get_ref());
            let near = nearest(name.get_ref(), DRILL_SETTINGS.iter().copied());
            found(
                name.span().start,
                match near {
                    Some(known) => format!("{start}; did you mean {known:?}?"),
                    None => format!("{start}; there are {}", DRILL_SETTINGS.join(", ")),
                },
            );
        }
    }
}

/// A number of bytes: `200GB`, `500 MB`.
fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at_checked(text.find(|c: char| !c.is_ascii_digit())?)?;
    let unit = match unit.trim_start() {
        "kB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit).filter(|bytes| *bytes > 0)
}

impl Checker<'_> {
    /// A span of a day to a year.
    fn days(&mut self, setting: &str, written: &Spanned<String>) -> Option<SignedDuration> {
        let found = span(written.get_ref()).filter(|span| (SPAN.0..=SPAN.1).contains(span));
        if found.is_none() {
            let what = format!(
                "{setting} = {:?} is not a span of 1 day to 366 days, such as \"7d\" or \"4w\"",
                written.get_ref()
            );
            self.at(written, what);
        }
        found
    }

    pub(super) fn verify(&mut self, within: Option<Spanned<String>>, rate: Option<Spanned<String>>) -> Option<Verify> {
        let within = match &within {
            None => Some(Some(SignedDuration::from_hours(30 * 24))),
            Some(text) if text.get_ref() == "off" => Some(None),
            Some(text) => self.days("verify_within", text).map(Some),
        };
        let rate = self.rate("verify_rate", rate)?;
        let rate = rate.or(NonZeroU64::new(20_000_000))?; // the default of the reference
        Some(Verify { within: within?, rate })
    }

    pub(super) fn drill(&mut self, cluster: &str, written: Option<Spanned<WrittenDrill>>) -> Option<Option<Drill>> {
        let Some(written) = written else { return Some(None) };
        let at = written.span().start;
        let WrittenDrill { scratch, every, max_bytes, bindir, user, database, assertions } = written.into_inner();
        let Some(scratch) = scratch else {
            let what = format!(
                "drill of [cluster.{cluster}] needs scratch, a directory of its own, such as \"/var/tmp/pgkeep-drill\""
            );
            self.problem(Some(at), what);
            return None;
        };
        let scratch = self.path("scratch", scratch);
        let every = match &every {
            None => Some(None),
            Some(text) => self.days("every", text).map(Some),
        };
        let max_bytes = match &max_bytes {
            None => Some(None),
            Some(text) => match bytes(text.get_ref()) {
                Some(bytes) => Some(Some(bytes)),
                None => {
                    let what =
                        format!("max_bytes = {:?} is not a size such as \"200GB\" (kB, MB, GB or TB)", text.get_ref());
                    self.at(text, what);
                    None
                }
            },
        };
        let bindir = match bindir {
            None => Some(None),
            Some(path) => self.path("bindir", path).map(Some),
        };
        let mut name = |setting: &str, written: Option<Spanned<String>>| {
            let Some(written) = written else { return Some("postgres".to_owned()) };
            if (1..=63).contains(&written.get_ref().len()) && !written.get_ref().contains(['\0', '\n']) {
                return Some(written.into_inner());
            }
            let what = format!("{setting} = {:?} is no name of PostgreSQL's: 1 to 63 bytes", written.get_ref());
            self.at(&written, what);
            None
        };
        let (user, database) = (name("user", user), name("database", database));
        let mut all_good = true;
        let assertions = assertions.map(Spanned::into_inner).unwrap_or_default();
        if assertions.len() > ASSERTIONS {
            self.problem(Some(at), format!("drill of [cluster.{cluster}] has more than {ASSERTIONS} assertions"));
            all_good = false;
        }
        for assertion in assertions.iter().filter(|assertion| assertion.get_ref().trim().is_empty()) {
            self.at(assertion, "an assertion is empty: write SQL that returns true".to_owned());
            all_good = false;
        }
        let assertions = all_good.then(|| assertions.into_iter().map(Spanned::into_inner).collect());
        Some(Some(Drill {
            scratch: scratch?,
            every: every?,
            max_bytes: max_bytes?,
            bindir: bindir?,
            user: user?,
            database: database?,
            assertions: assertions?,
        }))
    }
}
