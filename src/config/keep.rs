//! `keep`: what retention leaves, of a cluster and of its repositories.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Span, SpanRelativeTo};
use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::check::Checker;
use super::error::nearest;

/// What `keep` may say.
pub const KEEP_SETTINGS: &[&str] = &["window", "daily", "weekly", "monthly", "yearly", "at_least"];
/// No policy reaches further: the oldest PostgreSQL that anybody runs is younger.
const LONGEST: SignedDuration = SignedDuration::from_hours(100 * 366 * 24);
/// More slots than this are a mistake.
const MOST: i64 = 10_000;

/// A policy as checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// Back to here every instant stays restorable.
    pub window: SignedDuration,
    /// One base backup of each of so many days.
    pub daily: u32,
    /// Of so many weeks.
    pub weekly: u32,
    /// Of so many months.
    pub monthly: u32,
    /// Of so many years.
    pub yearly: u32,
    /// The newest so many, however old.
    pub at_least: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenKeep {
    window: Option<Spanned<String>>,
    daily: Option<Spanned<i64>>,
    weekly: Option<Spanned<i64>>,
    monthly: Option<Spanned<i64>>,
    yearly: Option<Spanned<i64>>,
    at_least: Option<Spanned<i64>>,
}

/// Of each repository that has one of its own.
pub(super) type WrittenKeepIn = BTreeMap<Spanned<String>, Spanned<WrittenKeep>>;

/// Names in `keep` and `keep_in` that are not settings: where, and what to say.
pub(super) fn unknown(cluster: &str, written: &DeTable<'_>, found: &mut impl FnMut(usize, String)) {
    for (name, value) in written {
        match (name.get_ref().as_ref(), value.get_ref()) {
            ("keep", DeValue::Table(policy)) => unknown_in(&format!("keep of [cluster.{cluster}]"), policy, found),
            ("keep_in", DeValue::Table(policies)) => {
                for (repository, policy) in policies {
                    let place = format!("keep_in.{} of [cluster.{cluster}]", repository.get_ref());
                    match policy.get_ref() {
                        DeValue::Table(policy) => unknown_in(&place, policy, found),
                        _ => found(
                            repository.span().start,
                            format!("{place} is a policy of its own: {{ window = \"90d\", … }}"),
                        ),
                    }
                }
            }
            ("keep" | "keep_in", _) => found(
                name.span().start,
                format!("{} is a table: keep = {{ window = \"7d\", daily = 14 }}", name.get_ref()),
            ),
            _ => {}
        }
    }
}

fn unknown_in(place: &str, policy: &DeTable<'_>, found: &mut impl FnMut(usize, String)) {
    for name in policy.keys().filter(|name| !KEEP_SETTINGS.contains(&name.get_ref().as_ref())) {
        let start = format!("unknown setting {:?} in {place}", name.get_ref());
        found(
            name.span().start,
            match nearest(name.get_ref(), KEEP_SETTINGS.iter().copied()) {
                Some(known) => format!("{start}; did you mean {known:?}?"),
                None => format!("{start}; there are {}", KEEP_SETTINGS.join(", ")),
            },
        );
    }
}

/// A span of days and smaller units: a month has no length of its own.
pub(super) fn span(text: &str) -> Option<SignedDuration> {
    let span: Span = text.parse().ok()?;
    span.to_duration(SpanRelativeTo::days_are_24_hours()).ok().filter(|span| !span.is_negative())
}

impl Checker<'_> {
    /// `label` is what the sentences call it.
    pub(super) fn policy(&mut self, label: &str, at: usize, written: &WrittenKeep) -> Option<Keep> {
        let window = match &written.window {
            None => Some(SignedDuration::ZERO),
            Some(text) => match span(text.get_ref()) {
                Some(window) if window <= LONGEST => Some(window),
                Some(_) => {
                    self.at(text, format!("window = {:?} in {label} is longer than a hundred years", text.get_ref()));
                    None
                }
                None => {
                    let what = format!(
                        "window = {:?} in {label} is not a span such as \"36h\", \"7d\" or \"4w\" (a month has no fixed length: \
                         write days)",
                        text.get_ref()
                    );
                    self.at(text, what);
                    None
                }
            },
        };
        let [daily, weekly, monthly, yearly, at_least] = [
            ("daily", &written.daily, 0),
            ("weekly", &written.weekly, 0),
            ("monthly", &written.monthly, 0),
            ("yearly", &written.yearly, 0),
            ("at_least", &written.at_least, 1),
        ]
        .map(|(name, value, default)| self.slots(label, name, value, default));
        let keep = Keep {
            window: window?,
            daily: daily?,
            weekly: weekly?,
            monthly: monthly?,
            yearly: yearly?,
            at_least: at_least?,
        };
        if written.at_least.as_ref().is_some_and(|at_least| *at_least.get_ref() == 0) {
            let what = format!(
                "at_least = 0 in {label} cannot be had: the newest sound base backup always stays; leave it away, or write 1"
            );
            self.problem(Some(at), what);
            return None;
        }
        let asks =
            !keep.window.is_zero() || [keep.daily, keep.weekly, keep.monthly, keep.yearly].iter().any(|n| *n > 0);
        if !asks && written.at_least.is_none() {
            let what = format!("{label} asks for nothing: write at least one of {}", KEEP_SETTINGS.join(", "));
            self.problem(Some(at), what);
            return None;
        }
        Some(keep)
    }

    fn slots(&mut self, label: &str, name: &str, written: &Option<Spanned<i64>>, default: u32) -> Option<u32> {
        let Some(written) = written else { return Some(default) };
        match u32::try_from(*written.get_ref()).ok().filter(|count| i64::from(*count) <= MOST) {
            Some(count) => Some(count),
            None => {
                let what = format!("{name} = {} in {label} is out of range: 0 to {MOST}", written.get_ref());
                self.at(written, what);
                None
            }
        }
    }

    /// The policy of each repository of a cluster that has one.
    pub(super) fn policies(
        &mut self,
        cluster: &str,
        keep: Option<Spanned<WrittenKeep>>,
        keep_in: Option<WrittenKeepIn>,
        receivers: &[String],
    ) -> Option<BTreeMap<String, Keep>> {
        let mut policies = BTreeMap::new();
        let mut all_good = true;
        if let Some(keep) = keep {
            let label = format!("keep of [cluster.{cluster}]");
            match self.policy(&label, keep.span().start, keep.get_ref()) {
                Some(policy) => policies.extend(receivers.iter().map(|name| (name.clone(), policy))),
                None => all_good = false,
            }
        }
        for (repository, keep) in keep_in.unwrap_or_default() {
            let name = repository.get_ref().clone();
            if !receivers.contains(&name) {
                let near = nearest(&name, receivers.iter().map(String::as_str));
                let near = near.map(|near| format!("; did you mean {near:?}?")).unwrap_or_default();
                self.at(
                    &repository,
                    format!("[cluster.{cluster}] has no repository {name:?} to keep anything in{near}"),
                );
                all_good = false;
                continue;
            }
            let label = format!("keep_in.{name} of [cluster.{cluster}]");
            match self.policy(&label, keep.span().start, keep.get_ref()) {
                Some(policy) => drop(policies.insert(name, policy)),
                None => all_good = false,
            }
        }
        all_good.then_some(policies)
    }
}
