//! `pgkeep key list`: keys, their age, and for whom they are wrapped.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::super::output::{count, time};
use super::super::several::Away;
use super::{CliError, Context, Exit, ListArgs, open, opened, wanted};
use crate::catalog::Repository;
use crate::seal::{KeyFile, Recipient};
use crate::types::Id128;

#[derive(Debug, Serialize)]
struct Document {
    repositories: Vec<Line>,
    /// Repositories that do not answer.
    away: Vec<Away>,
}

#[derive(Debug, Serialize)]
struct Line {
    repository: String,
    realm: Id128,
    meta_key: Id128,
    /// When the repository was made: the meta key is as old, or older.
    created_at: Timestamp,
    /// The key file in use opens data, and not only what an archiver reads back.
    can_read: bool,
    content_keys: u64,
    /// By the day for which they were made.
    by_day: BTreeMap<String, u64>,
    /// Opened with this key file; only with --open.
    opened: Option<u64>,
    /// The list in force; 0: there is none, the key file says it.
    list: u32,
    rotated_at: Option<Timestamp>,
    recipients: Vec<RecipientLine>,
}

#[derive(Debug, Serialize)]
struct RecipientLine {
    recipient: String,
    name: Option<String>,
    /// Content keys are wrapped for it since.
    since: Timestamp,
    /// Envelopes that were made for it alone, of keys that were there before or meanwhile.
    added_envelopes: u64,
    /// It is that of the key file in use.
    ours: bool,
}

pub(super) async fn run(context: &Context, args: ListArgs) -> Result<Exit, CliError> {
    let config = context.config()?;
    let several = opened(context).await?;
    let mut document = Document { repositories: Vec::new(), away: several.away };
    for (repository, _) in &several.open {
        let place = wanted(context, &config)?.into_iter().find(|place| place.name == repository.name());
        let Some(place) = place else { continue }; // invariant: it was opened by that name
        let key = open::key(&place.key, &place.name).await?;
        let line = line(repository, &key, args.open).await?;
        show(context, &line, &place.key.origin.to_string());
        document.repositories.push(line);
    }
    context.output.document(&document);
    for realm in differing(&document.repositories) {
        context.output.line(format!(
            "The repositories of realm {realm} seal for different recipients: what one of them writes is copied to the others. \
             Say `pgkeep key add-recipient` again, without --repository, for whom all shall have."
        ));
    }
    for away in &document.away {
        context.output.line(format!("Repository {} is left out: {}", away.repository, away.why));
    }
    Ok(if document.away.is_empty() { Exit::Done } else { Exit::Failed })
}

async fn line(repository: &Repository, key: &KeyFile, try_them: bool) -> Result<Line, CliError> {
    let list = repository.recipients().await.map_err(open::repository_error)?;
    let created_at = repository.format().created_at;
    let known: Vec<(Recipient, Option<String>, Timestamp)> = match &list {
        Some(list) => list.recipients.iter().map(|k| (k.recipient.clone(), k.name.clone(), k.added_at)).collect(),
        None => key.recipient_list().iter().map(|recipient| (recipient.clone(), None, created_at)).collect(),
    };
    let recipients: Vec<Recipient> = known.iter().map(|(recipient, ..)| recipient.clone()).collect();
    let counts = repository.count_keys(&recipients).await.map_err(open::repository_error)?;
    let opened = match try_them && repository.can_read() {
        true => Some(repository.try_keys().await.map_err(open::repository_error)?.1),
        false => None,
    };
    let own = key.own_recipient();
    let recipients = known.into_iter().map(|(recipient, name, since)| RecipientLine {
        added_envelopes: counts.copies.get(&recipient.to_string()).copied().unwrap_or(0),
        ours: own.as_ref() == Some(&recipient),
        recipient: recipient.to_string(),
        name,
        since,
    });
    Ok(Line {
        repository: repository.name().to_owned(),
        realm: repository.realm(),
        meta_key: repository.meta_key().id(),
        created_at,
        can_read: repository.can_read(),
        content_keys: counts.content.values().sum(),
        by_day: counts.content.iter().map(|(day, keys)| (day_text(*day), *keys)).collect(),
        opened,
        list: list.as_ref().map_or(0, |list| list.number),
        rotated_at: list.as_ref().and_then(|list| list.rotated_at),
        recipients: recipients.collect(),
    })
}

/// Realms of which repositories have different recipients.
fn differing(lines: &[Line]) -> Vec<Id128> {
    let mut realms: BTreeMap<Id128, Vec<Vec<&str>>> = BTreeMap::new();
    for line in lines {
        let mut recipients: Vec<&str> = line.recipients.iter().map(|known| known.recipient.as_str()).collect();
        recipients.sort_unstable();
        realms.entry(line.realm).or_default().push(recipients);
    }
    realms.retain(|_, lists| lists.windows(2).any(|pair| pair.first() != pair.last()));
    realms.into_keys().collect()
}

/// A day by its number since 1970-01-01.
fn day_text(day: u32) -> String {
    let moment = Timestamp::from_second(i64::from(day) * 86_400);
    moment.map_or_else(|_| format!("day {day}"), |moment| moment.strftime("%Y-%m-%d").to_string())
}

/// `12 days old`.
pub(in crate::cli) fn age(since: Timestamp, now: Timestamp) -> String {
    let days = now.duration_since(since).max(SignedDuration::ZERO).as_hours() / 24;
    format!("{} old", count(u64::try_from(days).unwrap_or(0), "day"))
}

fn show(context: &Context, line: &Line, origin: &str) {
    let (output, now) = (&context.output, Timestamp::now());
    output.line(format!("Repository {}, realm {}", line.repository, line.realm));
    let can =
        if line.can_read { "reads and writes" } else { "writes only: restoring needs a key file with an identity" };
    output.line(format!("  Key file      {origin}: {can}"));
    let since = age(line.created_at, now);
    output.line(format!("  Meta key      {}, {since} at least", line.meta_key));
    let mut days = line.by_day.keys();
    let span = match (days.next(), days.next_back()) {
        (Some(first), Some(last)) => format!(", of {first} to {last}"),
        (Some(only), None) => format!(", of {only}"),
        _ => String::new(),
    };
    let opened = line.opened.map(|opened| format!("; this key file opens {opened}")).unwrap_or_default();
    output.line(format!("  Content keys  {}{span}{opened}", line.content_keys));
    if let Some(at) = line.rotated_at {
        output.line(format!("  Exchanged     {}", time(at)));
    }
    match line.list {
        0 => output.line("  Recipients    as the key file says"),
        list => output.line(format!("  Recipients    list {list}")),
    }
    for known in &line.recipients {
        let ours = if known.ours { " (this key file)" } else { "" };
        let name = known.name.as_ref().map(|name| format!(" {name:?}")).unwrap_or_default();
        let added = match known.added_envelopes {
            0 => String::new(),
            added => format!(", {added} opened to it afterwards"),
        };
        output.line(format!("    {}{ours}{name}, since {}{added}", known.recipient, time(known.since)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_and_ages_are_told_as_people_do() {
        assert_eq!(day_text(20_000), "2024-10-04");
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!(age(at(0), at(86_400 * 3 + 5)), "3 days old");
        assert_eq!(age(at(86_400), at(0)), "0 days old", "a clock that went back");
    }
}
