//! `pgkeep check`: everything that must be right, one line each.
//!
//! Facts are gathered here and in the files beside; [`judge`] says what they mean. Nothing is changed, but for small
//! objects that are put into each repository and removed again, and, where a bucket's server behaves otherwise than was
//! remembered, a note of that.

mod facts;
mod judge;
mod synchronous;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use jiff::Timestamp;
use serde::Serialize;

use self::judge::{Archive, Item, Server, State};
use super::standing::{Standing, lags};
use super::{CliError, Context, Exit, bucket, open, place};
use crate::catalog::Repository;
use crate::config::{AlertWay, ClusterConfig, Config, Place, RepositoryConfig};
use crate::daemon::alert::send::{send, test_notice};
use crate::store::Store;

/// How long everything about one repository, or one server, may take. A person waits.
const DEADLINE: Duration = Duration::from_secs(60);

/// `pgkeep check`: everything that must be right, one line each.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Exit code 0: all is well, or worth a warning. 1: something is not ok; its line says why and what to do.

Example:
  pgkeep check
  pgkeep check --cluster main --json
  pgkeep check --alerts")]
pub struct Args {
    /// Send a test through each [alert.NAME] instead, and say which took it
    #[arg(long)]
    pub alerts: bool,
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.config()?;
    if args.alerts {
        return Ok(alerts(context, &config).await.tell(context));
    }
    let clusters = match (config.clusters.is_empty(), context.cluster_name()) {
        (true, None) => Vec::new(),
        (_, name) => config.clusters(name)?,
    };
    let wanted = match (context.repository_name(), context.cluster_name()) {
        (Some(name), _) => vec![config.repository(Some(name))?],
        (None, None) => config.repositories.iter().collect(),
        (None, Some(_)) => {
            let names: BTreeSet<&str> =
                clusters.iter().flat_map(|cluster| &cluster.repositories).map(String::as_str).collect();
            config.repositories.iter().filter(|place| names.contains(place.name.as_str())).collect()
        }
    };
    let mut report = Report::default();
    let file = config.file.display().to_string();
    report.add(context, "pgkeep".to_owned(), vec![Item::ok("configuration", file)]);
    let mut opened = Vec::new();
    for place in wanted {
        let (repository, items) = within_deadline("repository", repository(place)).await;
        report.add(context, format!("repository {}", place.name), items);
        opened.extend(repository.map(|repository| (place.name.clone(), repository)));
    }
    for cluster in clusters {
        let places = config.repositories_of(cluster)?;
        // With --repository that one alone; else all that receive the cluster.
        let looked_at = |place: &&&RepositoryConfig| context.repository_name().is_none_or(|name| place.name == name);
        let places: Vec<&RepositoryConfig> = places.iter().filter(looked_at).copied().collect();
        let of = format!("cluster {}", cluster.name);
        let (server, mut items) = within_deadline("connection", self::server(cluster, &places)).await;
        let several = cluster.repositories.len() > 1 && context.repository_name().is_none();
        if several {
            items.push(judge::acknowledge(answering(&opened, &places), places.len(), cluster.acknowledge));
        }
        report.add(context, of.clone(), items);
        let (held, items) =
            within_deadline("archived", self::archives(cluster, &places, &opened, server.as_ref())).await;
        report.add(context, of.clone(), items);
        for (name, archive) in held {
            let of = if several { format!("{of} in repository {name}") } else { of.clone() };
            report.add(context, of, judge::archive(&archive, server.as_ref(), Timestamp::now()));
        }
    }
    Ok(report.tell(context))
}

/// A test through each channel, all at once.
async fn alerts(context: &Context, config: &Config) -> Report {
    let test = test_notice("a test by `pgkeep check --alerts`; nothing is wrong");
    let sent = config.alerts.iter().map(|channel| send(&channel.way, &test));
    let mut report = Report::default();
    for (channel, sent) in config.alerts.iter().zip(join_all(sent).await) {
        let way = match &channel.way {
            AlertWay::Webhook { url, .. } => format!("webhook {url}"),
            AlertWay::Heartbeat { url, .. } => format!("heartbeat {url}"),
            AlertWay::Command(command) => format!("command {}", command.first().map_or("", String::as_str)),
        };
        let todo = "is it reachable from here, and is its URL or program right?";
        let item = match sent {
            Ok(()) => Item::ok("test", format!("{way} took it")),
            Err(error) => Item::not_ok("test", error.to_string(), todo),
        };
        report.add(context, format!("alert {}", channel.name), vec![item]);
    }
    if config.alerts.is_empty() {
        let item = Item::warn("alerts", "there are none", "write [alert.NAME] with webhook, command or heartbeat");
        report.add(context, "pgkeep".to_owned(), vec![item]);
    }
    report
}

/// What hangs is not ok either.
async fn within_deadline<T: Default>(item: &'static str, work: impl Future<Output = (T, Vec<Item>)>) -> (T, Vec<Item>) {
    tokio::time::timeout(DEADLINE, work).await.unwrap_or_else(|_| {
        let found = format!("no answer within {} s", DEADLINE.as_secs());
        (T::default(), vec![Item::not_ok(item, found, "is the file system or the network hanging?")])
    })
}

async fn repository(config: &RepositoryConfig) -> (Option<Repository>, Vec<Item>) {
    let mut items = Vec::new();
    items.push(match &config.place {
        Place::Directory(path) => match place::data_directory_around(path, None) {
            None => Item::ok("place", config.place.to_string()),
            Some(data) => inside(path, &data),
        },
        Place::S3(_) | Place::Google(_) | Place::Azure(_) => Item::ok("place", config.place.to_string()),
    });
    let not_ok = |item, error: CliError| {
        let text = error.to_string();
        let (found, todo) = text.split_once("hint: ").unwrap_or((text.as_str(), ""));
        Item::not_ok(item, found.trim().trim_end_matches(';'), todo)
    };
    let key = match open::key(&config.key, &config.name).await {
        Ok(key) => key,
        Err(error) => {
            items.push(not_ok("key", error));
            return (None, items);
        }
    };
    // First where it is and whether that answers, then whether the key fits.
    let (store, found_out) = match store_of(&config.place).await {
        Ok(store) => store,
        Err(error) => {
            items.push(not_ok("store", error));
            return (None, items);
        }
    };
    let own = key.own_recipient();
    let repository = match Repository::open(&config.name, store, key).await.map_err(open::repository_error) {
        Ok(repository) => repository,
        Err(error) => {
            items.push(not_ok("key", error));
            items.extend(found_out);
            return (None, items);
        }
    };
    let can = match repository.can_read() {
        true => "opens the repository",
        false => "opens the repository for writing only; restoring needs a key file with an identity",
    };
    items.push(Item::ok("key", format!("{} {can}", config.key.origin)));
    items.push(facts::key_age(&repository, own.as_ref()).await);
    items.extend(facts::write_read_delete(&repository).await);
    items.extend(found_out);
    (Some(repository), items)
}

/// The store, and what was found out about it. A bucket is used as its server behaves now.
async fn store_of(place: &Place) -> Result<(Arc<dyn Store>, Vec<Item>), CliError> {
    let Place::S3(s3) = place else { return Ok((open::store(place).await?, Vec::new())) };
    let bucket = bucket::with_remembered(bucket::s3(s3).await?).await.map_err(open::store_error)?;
    let (bucket, items) = facts::bucket(bucket).await;
    Ok((open::with_limits(bucket), items))
}

fn inside(path: &Path, data: &Path) -> Item {
    let (path, data) = (path.display(), data.display());
    let found = format!("{path} lies inside {data}, a data directory of PostgreSQL: it would be lost together with it");
    Item::not_ok("place", found, "move the repository to another disk, or better to another host")
}

/// How many of these repositories could be opened.
fn answering(opened: &[(String, Repository)], places: &[&RepositoryConfig]) -> usize {
    places.iter().filter(|place| opened.iter().any(|(name, _)| *name == place.name)).count()
}

async fn server(config: &ClusterConfig, places: &[&RepositoryConfig]) -> (Option<Server>, Vec<Item>) {
    let mut items = Vec::new();
    let Some((server, ours)) = facts::server(config, &mut items).await else { return (None, items) };
    items.extend(judge::server(&server, &ours));
    let data = server.settings.get("data_directory").map(Path::new).filter(|_| !ours_is_remote(config));
    for place in places {
        if let Place::Directory(path) = &place.place {
            items.extend(place::data_directory_around(path, data).map(|data| inside(path, &data)));
        }
    }
    (Some(server), items)
}

/// What each repository that answers holds of the cluster, and how far it is behind the best one.
async fn archives(
    config: &ClusterConfig,
    places: &[&RepositoryConfig],
    opened: &[(String, Repository)],
    server: Option<&Server>,
) -> (Vec<(String, Archive)>, Vec<Item>) {
    let (mut held, mut items) = (Vec::new(), Vec::new());
    for place in places {
        let Some((name, repository)) = opened.iter().find(|(name, _)| *name == place.name) else { continue };
        let known = server.and_then(|server| Some((server, facts::source(config).ok()?)));
        match facts::archive(repository, &config.name_in_repository, known).await {
            Ok(archive) => held.push((name.clone(), archive)),
            Err(error) => items.push(Item::not_ok("archived", error.to_string(), "")),
        }
    }
    let standing = |(name, archive): &(String, Archive)| {
        let nothing =
            Standing { repository: name.clone(), frontier: None, as_of: None, segment_size: archive.segment_size };
        archive.standing.clone().unwrap_or(nothing)
    };
    let standings: Vec<Standing> = held.iter().map(standing).collect();
    for ((_, archive), lag) in held.iter_mut().zip(lags(&standings)) {
        archive.behind = lag;
    }
    (held, items)
}

fn ours_is_remote(config: &ClusterConfig) -> bool {
    open::source(config).map_or(true, |source| source.conninfo.is_remote())
}

/// All items, in the order in which they are shown.
#[derive(Debug, Default, Serialize)]
struct Report {
    ok: bool,
    warnings: usize,
    not_ok: usize,
    items: Vec<Line>,
}

#[derive(Debug, Serialize)]
struct Line {
    /// `pgkeep`, `repository NAME` or `cluster NAME`.
    of: String,
    #[serde(flatten)]
    item: Item,
}

impl Report {
    /// Shows items as they are found: some take a while.
    fn add(&mut self, context: &Context, of: String, items: Vec<Item>) {
        for item in items {
            context.output.line(format!("{:<6}  {of}: {}: {}", item.state.word(), item.item, item.found));
            if let Some(todo) = &item.todo {
                context.output.line(format!("        -> {todo}"));
            }
            self.items.push(Line { of: of.clone(), item });
        }
    }

    fn tell(mut self, context: &Context) -> Exit {
        let count = |state| self.items.iter().filter(|line| line.item.state == state).count();
        (self.warnings, self.not_ok) = (count(State::Warn), count(State::NotOk));
        self.ok = self.not_ok == 0;
        context.output.document(&self);
        match (self.not_ok, self.warnings) {
            (0, 0) => context.output.line("\nAll is well."),
            (0, some) => context.output.line(format!("\nNothing is wrong; warnings: {some}.")),
            (some, _) => context.output.line(format!("\nNot ok: {some}.")),
        }
        if self.ok { Exit::Done } else { Exit::No }
    }
}
