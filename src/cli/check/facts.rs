//! What a server and a repository say of themselves. Judges nothing, but for what could not be asked at all.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};

use super::judge::{self, Archive, Counted, Item, Ours, Server, Slot, Sql};
use crate::archive::{Source, served_path};
use crate::catalog::inventory::Hole;
use crate::catalog::{CatalogError, Repository};
use crate::cli::advice::{Tried, advise};
use crate::cli::output::count;
use crate::cli::standing::{Standing, missing};
use crate::cli::{self, CliError, bucket, open};
use crate::config::ClusterConfig;
use crate::pg::{ConnectOptions, PgError, Replication, Row, Session, quote_literal};
use crate::seal::Recipient;
use crate::store::s3::S3Store;
use crate::store::{Key, StoreError};
use crate::types::{ClusterId, ClusterName, Lsn};

/// A person waits: shorter than the daemon's deadline.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What is asked of a server.
const SETTINGS: &[&str] = &[
    "wal_level",
    "max_wal_senders",
    "full_page_writes",
    "synchronous_standby_names",
    "synchronous_commit",
    "data_directory",
];
/// The trial object's name begins so, at the repository's root. No object of the catalog can be called this: nothing
/// reads it, and one that a crash leaves behind harms nothing.
const TRIAL: &str = "check~";

/// Puts, reads and removes a small object, and compares the store's clock with ours.
pub(super) async fn write_read_delete(repository: &Repository) -> Vec<Item> {
    if let Err(error) = repository.check_writable() {
        return vec![Item::not_ok("write", error.to_string(), "")];
    }
    match trial(repository).await {
        Ok(ahead) => vec![
            Item::ok("write", "an object was written, read and removed"),
            judge::clock("clock of store", "its clock", ahead),
        ],
        Err((doing, error)) => {
            // A bucket's refusals say what to do.
            let is_bucket = repository.store().describe().contains("://");
            let todo =
                "is it full, mounted read-only, or owned by another user? pgkeep must run as the user that owns it";
            let todo = if is_bucket { "" } else { todo };
            vec![Item::not_ok("write", format!("cannot {doing} an object: {error}"), todo)]
        }
    }
}

/// How old keys are, and for how many they are wrapped. `own` is the recipient of the key file in use.
pub(super) async fn key_age(repository: &Repository, own: Option<&Recipient>) -> Item {
    let asked = futures_util::future::try_join(repository.recipients(), repository.count_keys(&[])).await;
    let (list, counts) = match asked {
        Ok(asked) => asked,
        Err(error) => return Item::warn("key age", error.to_string(), "`pgkeep key list` shows the keys"),
    };
    let age = cli::key::age(repository.format().created_at, Timestamp::now());
    let keys = count(counts.content.values().sum(), "content key");
    let found = match &list {
        None => format!("the meta key is {age} at least; {keys}"),
        Some(list) => {
            let recipients = count(list.recipients.len() as u64, "recipient");
            format!("the meta key is {age} at least; {keys} for {recipients}")
        }
    };
    match (&list, own) {
        (Some(list), Some(own)) if list.recipients.iter().all(|known| known.recipient != *own) => Item::warn(
            "key age",
            format!("this key file is no recipient any more: it cannot read what is archived from now on; {found}"),
            "put another key file here, or make this one a recipient: pgkeep key add-recipient",
        ),
        _ => Item::ok("key age", found),
    }
}

/// Finds out what a bucket's server does, and says so. Gives the bucket, with that.
pub(super) async fn bucket(bucket: S3Store) -> (S3Store, Vec<Item>) {
    let probed = match bucket::probe(&bucket).await {
        Ok(probed) => probed,
        Err(error) => {
            let found = format!("cannot find out what it does: {error}");
            return (bucket, vec![Item::not_ok("store", found, "")]);
        }
    };
    let mut items = Vec::new();
    if let Some(known) = probed.differs_from {
        items.push(Item::warn(
            "store",
            format!("it behaves otherwise than on {}", known.probed_at.strftime("%Y-%m-%d")),
            "was it exchanged, or its software? pgkeep remembers what it does now; restart what runs",
        ));
    }
    items.extend(judge::store(probed.verdict.in_words(probed.bucket.options())));
    (probed.bucket, items)
}

async fn trial(repository: &Repository) -> Result<SignedDuration, (&'static str, String)> {
    let text = |doing: &'static str| move |error: StoreError| (doing, error.to_string());
    let store = repository.store().as_ref();
    let key = Key::new(format!("{TRIAL}{}", repository.writer())) // of this run alone
        .map_err(|error| ("name", error.to_string()))?;
    let content = Bytes::from_static(b"written by pgkeep check; may be removed");
    let before = Timestamp::now();
    store.put_new(&key, content.clone().into()).await.map_err(text("write"))?;
    let tried = async {
        let read = store.get(&key, None).await.map_err(text("read"))?;
        if read != content {
            return Err(("read", "other bytes came back than were written".to_owned()));
        }
        store.head(&key).await.map(|meta| meta.modified).map_err(text("read"))
    };
    let tried = tried.await;
    store.delete(&key).await.map_err(text("remove"))?;
    // What lies between asking and answering is nobody's skew.
    let (modified, after) = (tried?, Timestamp::now());
    Ok(outside(modified, before, after))
}

/// How far `moment` lies outside of `[from, to]`.
fn outside(moment: Timestamp, from: Timestamp, to: Timestamp) -> SignedDuration {
    match () {
        () if moment < from => moment.duration_since(from),
        () if moment > to => moment.duration_since(to),
        () => SignedDuration::ZERO,
    }
}

/// Where the cluster's WAL comes from.
pub(super) fn source(config: &ClusterConfig) -> Result<Source, CliError> {
    let source = open::source(config)?;
    Ok(Source { connect: ConnectOptions { timeout: CONNECT_TIMEOUT, ..source.connect }, ..source })
}

/// Connects both ways and asks. What refuses is an item already; `None` when nothing more can be known.
pub(super) async fn server(config: &ClusterConfig, items: &mut Vec<Item>) -> Option<(Server, Ours)> {
    let source = match source(config) {
        Ok(source) => source,
        Err(error) => {
            items.push(Item::not_ok("connection", error.to_string(), ""));
            return None;
        }
    };
    let not_ok = |item, tried, error: &PgError| {
        let advice = advise(error, tried, &source.conninfo).text();
        Item::not_ok(item, error.to_string(), advice)
    };
    let application_name = source.conninfo.application_name().unwrap_or(&config.application_name).to_owned();
    let ours = Ours { application_name, slot: config.slot.clone(), synchronous: config.synchronous };
    let mut server = match by_walsender(&source).await {
        Ok(server) => {
            items.push(Item::ok("replication", format!("{} accepts it", source.conninfo.describe())));
            server
        }
        Err(error) => {
            items.push(not_ok("replication", Tried::Replication, &error));
            return None;
        }
    };
    match by_sql(&source, &ours.application_name).await {
        Ok((sql, settings)) => {
            items.push(Item::ok("SQL", format!("database {}", source.conninfo.database())));
            server.sql = Some(sql);
            server.settings.extend(settings);
        }
        Err(error) => {
            let advice = advise(&error, Tried::Sql, &source.conninfo).text();
            let todo = if advice.is_empty() { "pgkeep archives without it, and sees less".to_owned() } else { advice };
            items.push(Item::warn("SQL", error.to_string(), todo));
        }
    }
    Some((server, ours))
}

async fn by_walsender(source: &Source) -> Result<Server, PgError> {
    let mut replication = Replication::connect(&source.conninfo, &source.connect).await?;
    let identity = replication.identify_system().await?;
    let segment_size = replication.segment_size().await?;
    let version = replication.server_version_num();
    let mut settings = BTreeMap::new();
    for name in SETTINGS {
        // A role that may not know a setting is told so: it is left out.
        match replication.show(name).await {
            Ok(value) => drop(settings.insert((*name).to_owned(), value)),
            Err(error) if error.server_error().is_some() => {}
            Err(error) => return Err(error),
        }
    }
    let slot_by_walsender = match version {
        150_000.. => match replication.read_slot(&source.slot).await {
            Ok(slot) => Some(slot.and_then(|slot| slot.restart_lsn)),
            Err(error) if error.server_error().is_some() => None,
            Err(error) => return Err(error),
        },
        _ => None,
    };
    replication.close().await;
    Ok(Server {
        version,
        system: identity.system,
        flushed: identity.flushed,
        segment_size,
        settings,
        sql: None,
        slot_by_walsender,
    })
}

async fn by_sql(source: &Source, us: &str) -> Result<(Sql, BTreeMap<String, String>), PgError> {
    let mut session = Session::connect(&source.conninfo, &source.connect).await?;
    let before = Timestamp::now();
    let clock = session.query("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::int8").await?;
    let after = Timestamp::now();
    let micros = clock.first().and_then(|row| row.get(0)?.parse::<i64>().ok());
    let server_clock = micros.and_then(|micros| Timestamp::from_microsecond(micros).ok());
    let clock_ahead = server_clock.map_or(SignedDuration::ZERO, |clock| outside(clock, before, after));

    let names: Vec<String> = SETTINGS.iter().map(|name| quote_literal(name)).collect();
    let sql = format!("SELECT name, setting FROM pg_catalog.pg_settings WHERE name IN ({})", names.join(", "));
    let rows = session.query(&sql).await?;
    let settings = rows.iter().filter_map(|row| Some((row.get(0)?.to_owned(), row.get(1)?.to_owned()))).collect();

    let used = session.query("SELECT count(*) FROM pg_catalog.pg_stat_replication").await?;
    let senders_used = used.first().and_then(|row| row.get(0)?.parse().ok()).unwrap_or(0);

    let rows = session
        .query(&format!(
            "SELECT s.slot_type, s.restart_lsn, s.wal_status, s.safe_wal_size, s.active_pid, r.application_name \
             FROM pg_catalog.pg_replication_slots s LEFT JOIN pg_catalog.pg_stat_replication r ON r.pid = s.active_pid \
             WHERE s.slot_name = {}",
            quote_literal(&source.slot)
        ))
        .await?;
    let slot = rows.first().map(|row| Slot {
        physical: row.get(0) == Some("physical"),
        restart_lsn: row.get(1).and_then(|lsn| lsn.parse().ok()),
        wal_status: row.get(2).map(str::to_owned),
        safe_wal_size: row.get(3).and_then(|size| size.parse().ok()),
        active: row.get(4).and_then(|pid| pid.parse().ok()).map(|pid| (pid, row.get(5).map(str::to_owned))),
    });
    // Ours may stream without a slot that we know of; of several the best counts.
    let rows = session
        .query(&format!(
            "SELECT state, sync_state FROM pg_catalog.pg_stat_replication WHERE lower(application_name) = lower({}) \
             AND (state IS NULL OR state IN ('streaming', 'catchup')) ORDER BY sync_state IN ('sync', 'quorum') DESC NULLS LAST, sync_state = 'potential' DESC NULLS LAST LIMIT 1",
            quote_literal(us)
        ))
        .await?;
    let text = |row: &Row, column| row.get(column).map(str::to_owned);
    let counted = rows.first().map(|row| Counted { state: text(row, 0), sync_state: text(row, 1) });
    let rows = session
        .query(
            "SELECT pg_catalog.pg_is_in_recovery(), (SELECT count(*) FROM pg_catalog.pg_db_role_setting s \
             WHERE s.setconfig && ARRAY['synchronous_commit=off', 'synchronous_commit=local'])",
        )
        .await?;
    let standby = rows.first().is_some_and(|row| row.get(0) == Some("t"));
    let not_waiting = rows.first().and_then(|row| row.get(1)?.parse().ok()).unwrap_or(0);
    session.close().await;
    Ok((Sql { clock_ahead, senders_used, slot, standby, counted, not_waiting }, settings))
}

/// What the repository holds of the cluster; of the server's own system identifier and history, if the server is known.
pub(super) async fn archive(
    repository: &Repository,
    name: &ClusterName,
    server: Option<(&Server, Source)>,
) -> Result<Archive, CatalogError> {
    let ids = repository.clusters_named(name).await?;
    let systems = ids.iter().map(|id| id.system).collect();
    let wanted = match &server {
        Some((server, _)) => ids.iter().find(|id| id.system == server.system),
        None => ids.last(),
    };
    let Some(id) = wanted else { return Ok(Archive { systems, ..Archive::default() }) };
    let id: &ClusterId = id;
    let (inventory, holes) = missing(repository, id).await?;
    let served = match server {
        // One history can only be the server's, or nobody's here.
        Some((_, source)) if inventory.branches.len() > 1 => match served_path(&source, repository, name).await {
            Ok(served) => Some(served),
            Err(error) => {
                tracing::warn!(
                    repository = repository.name(),
                    "cannot tell which of the archived histories is the server's: {error}"
                );
                None
            }
        },
        _ => None,
    };
    let standing = match &served {
        Some(served) => Standing::on(repository.name(), &inventory, served),
        None => Standing::of(repository.name(), &inventory),
    };
    let newest = inventory.backups.iter().rev().find(|backup| backup.flagged.is_none());
    let since = newest.map_or(Lsn::ZERO, |backup| backup.start);
    let (behind, before): (Vec<Hole>, Vec<Hole>) = holes.into_iter().partition(|hole| hole.to > since);
    let sentences = |holes: Vec<Hole>| holes.iter().map(Hole::to_string).collect();
    Ok(Archive {
        systems,
        segment_size: inventory.segment_size,
        standing: Some(standing),
        behind: None,
        newest_backup: newest.map(|backup| (backup.label, backup.stopped_at)),
        unfinished_backups: inventory.unfinished_backups.len(),
        gaps: sentences(behind),
        older_gaps: sentences(before),
        damaged: inventory.damaged.len(),
    })
}
