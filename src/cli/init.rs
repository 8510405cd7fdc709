//! `pgkeep init`: from nothing to a configuration, a key, a repository and a slot. Again is safe.
//!
//! What always holds: nothing that exists is changed; whatever does not fit is found before the first byte is written.
//! Order: key, repository, configuration, slot. Each is durable before the next begins and is recognised by the next run,
//! so a run that was cut off anywhere is continued by typing it again. A configuration that is there names things that
//! are there.

use std::fs::{self, File, Permissions};
use std::io::{BufRead, IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::ExposeSecret;
use serde::Serialize;

use super::advice::{Advice, Tried, advise};
use super::{CliError, Context, Exit, bucket, open, place};
use crate::archive::Source;
use crate::catalog::{CatalogError, Repository};
use crate::config::{self, ClusterConfig, Config, KeyOrigin, KeySource, NewPlace, Place, RepositoryConfig, Template};
use crate::pg::{ConnInfo, ConnectOptions, PgError, Replication, ServerErrorKind, Session};
use crate::seal::{KeyFile, Recipient};
use crate::store::fs::FsStore;
use crate::store::s3::S3Store;
use crate::store::{ListRequest, Store, StoreError};
use crate::types::{ClusterName, SystemId};

/// What the only cluster and the only repository are called unless `--cluster` and `--repository` say otherwise.
const DEFAULT_NAME: &str = "main";
/// A person waits: shorter than the daemon's deadline.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What may lie in a directory that is to become a repository, or whose making was cut off.
const HARMLESS: &[&str] = &[".pgkeep-tmp", "lost+found", "format", "keys"];

/// `pgkeep init`: from nothing to a configuration, a key, a repository and a slot. Again is safe.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Writes the configuration file (--config, else $PGKEEP_CONFIG, else ./pgkeep.toml) and a key that only its owner can \
read, creates the repository and the replication slot, and prints the SQL and the pg_hba.conf line that are missing. \
What exists already is kept; running it again is safe.

With --write-only the host gets a key that archives, resumes, takes base backups and expires, and cannot read what it \
wrote. Take the identity file away from it: restoring needs that one.

A bucket has to be there already; credentials are found as the provider's other tools find them, or in the files that \
are named. What its server can do is found out, and said.

Examples:
  pgkeep init --pg 'host=/run/postgresql user=postgres' --repo /srv/pgkeep
  pgkeep init --pg 'host=/run/postgresql user=postgres' --repo /srv/pgkeep --write-only
  pgkeep init --pg 'host=/run/postgresql user=postgres' --repo s3://bucket/prefix --region eu-central-1
  pgkeep init --pg 'host=/run/postgresql user=postgres' --repo s3://bucket --endpoint https://minio.example:9000")]
pub struct Args {
    /// How to reach the server, in libpq's words: `host=/run/postgresql user=postgres`, or a postgresql:// URI
    #[arg(long, value_name = "CONNINFO")]
    pub pg: String,
    /// The directory of the repository, which is created; or a bucket: s3://BUCKET/PREFIX, gs://… or az://…
    #[arg(long, value_name = "PATH-OR-URL")]
    pub repo: String,
    /// How a bucket is reached
    #[command(flatten)]
    pub bucket: BucketArgs,
    /// The physical replication slot
    #[arg(long, value_name = "NAME", default_value = "pgkeep")]
    pub slot: String,
    /// Where the key goes [default: NAME.key beside the configuration file]
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Make a key that archives and takes backups and cannot read a row; the one that reads goes into --identity-file
    #[arg(long)]
    pub write_only: bool,
    /// With --write-only: seal for this age recipient, whose identity was made elsewhere, so that it never is on this host;
    /// may be said several times
    #[arg(long, value_name = "RECIPIENT", requires = "write_only")]
    pub recipient: Vec<Recipient>,
    /// With --write-only: where the key file that reads goes [default: NAME.identity.key beside the configuration file]
    #[arg(long, value_name = "FILE", requires = "write_only", conflicts_with = "recipient")]
    pub identity_file: Option<PathBuf>,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
}

/// What kind of key is to be made.
enum KeyWish {
    /// One that reads and writes.
    Whole,
    /// One that writes, and one that reads in this file.
    Split(PathBuf),
    /// One that writes, for these.
    WriteFor(Vec<Recipient>),
}

/// How a bucket is reached: what `init` writes into the file.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct BucketArgs {
    /// The address of a server that is not the provider's own [default: $AWS_ENDPOINT_URL, for s3://]
    #[arg(long, value_name = "URL", help_heading = "Buckets")]
    pub endpoint: Option<String>,
    /// The region, for s3:// [default: $AWS_REGION]
    #[arg(long, value_name = "NAME", help_heading = "Buckets")]
    pub region: Option<String>,
    /// The bucket in the path instead of the host name, for s3:// [default: with an endpoint]
    #[arg(long, help_heading = "Buckets")]
    pub path_style: bool,
    /// A file with the access key's id, for s3://
    #[arg(long, value_name = "FILE", help_heading = "Buckets", requires = "secret_key_file")]
    pub access_key_file: Option<PathBuf>,
    /// A file with the secret of the access key, for s3://
    #[arg(long, value_name = "FILE", help_heading = "Buckets", requires = "access_key_file")]
    pub secret_key_file: Option<PathBuf>,
    /// A file with certificates to trust besides the system's, for s3://
    #[arg(long, value_name = "FILE", help_heading = "Buckets")]
    pub ca_file: Option<PathBuf>,
    /// The storage account, for az://
    #[arg(long, value_name = "NAME", help_heading = "Buckets")]
    pub account: Option<String>,
    /// A service account's JSON, for gs://; a file with the access key, for az://
    #[arg(long, value_name = "FILE", help_heading = "Buckets")]
    pub credentials_file: Option<PathBuf>,
}

impl BucketArgs {
    /// The settings as they are written. What does not go with the kind of bucket is found when they are read back.
    fn settings(&self, url: &str) -> Result<Vec<(&'static str, toml::Value)>, CliError> {
        let is_s3 = url.starts_with("s3://");
        let environment = |name: &str| std::env::var(name).ok().filter(|value| is_s3 && !value.is_empty());
        let endpoint = || environment("AWS_ENDPOINT_URL_S3").or_else(|| environment("AWS_ENDPOINT_URL"));
        let region = || environment("AWS_REGION").or_else(|| environment("AWS_DEFAULT_REGION"));
        let file = |path: &Option<PathBuf>| match path {
            None => Ok(None),
            Some(path) => match std::path::absolute(path) {
                Ok(path) => Ok(Some(path.to_string_lossy().into_owned())),
                Err(error) => Err(CliError::usage(error).context(format!("find {}", path.display()))),
            },
        };
        let texts = [
            ("endpoint", self.endpoint.clone().or_else(endpoint)),
            ("region", self.region.clone().or_else(region)),
            ("access_key_file", file(&self.access_key_file)?),
            ("secret_key_file", file(&self.secret_key_file)?),
            ("ca_file", file(&self.ca_file)?),
            ("account", self.account.clone()),
            ("credentials_file", file(&self.credentials_file)?),
        ];
        let texts = texts.into_iter().filter_map(|(name, text)| Some((name, toml::Value::String(text?))));
        let path_style = self.path_style.then_some(("path_style", toml::Value::Boolean(true)));
        Ok(texts.chain(path_style).collect())
    }

    fn is_empty(&self) -> bool {
        let BucketArgs {
            endpoint, region, access_key_file, secret_key_file, ca_file, account, credentials_file, ..
        } = self;
        let files = [access_key_file, secret_key_file, ca_file, credentials_file];
        let texts = [endpoint, region, account];
        !self.path_style && files.iter().all(|file| file.is_none()) && texts.iter().all(|text| text.is_none())
    }
}

/// Runs the command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let wish = Wish::new(context, &args)?;
    let found = look(&wish).await?;
    if !args.yes && std::io::stdin().is_terminal() && !context.output.is_json() && !agreed(context, &wish, &found)? {
        context.output.note("nothing was changed");
        return Ok(Exit::No);
    }

    let mut done = Done::new(&wish, &found);
    let key = match found.key {
        Some(key) => key,
        None => make_key(&wish).await?,
    };
    let (store, findings) = make_place(&wish.place.place).await?;
    done.store = findings;
    let repository = Repository::create(&wish.repository, store, &key).await.map_err(open::repository_error)?;
    if !found.config_exists {
        let mode = if wish.conninfo_text.contains("password") { 0o600 } else { 0o644 };
        write_new(&wish.file, wish.config_text.as_bytes(), mode)?;
    }
    done.slot(slot(&wish, &repository, found.server).await?);
    Ok(done.tell(context))
}

/// What is to be there in the end.
struct Wish {
    file: PathBuf,
    key_file: PathBuf,
    repository: String,
    conninfo_text: String,
    conninfo: ConnInfo,
    slot: String,
    config_text: String,
    cluster: ClusterConfig,
    place: RepositoryConfig,
    key: KeyWish,
}

impl Wish {
    /// Everything that can be refused by looking at the command line alone.
    fn new(context: &Context, args: &Args) -> Result<Wish, CliError> {
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|e| CliError::usage(e).context(format!("find {}", path.display())))
        };
        let environment = std::env::var_os(config::ENVIRONMENT_VARIABLE).filter(|value| !value.is_empty());
        let named = context.global.config.clone().or_else(|| environment.map(PathBuf::from));
        let file = absolute(&named.unwrap_or_else(|| PathBuf::from("pgkeep.toml")))?;
        let repository = context.repository_name().unwrap_or(DEFAULT_NAME).to_owned();
        let beside = || file.with_file_name(format!("{repository}.key"));
        let key_file = absolute(&args.key_file.clone().unwrap_or_else(beside))?;
        let identity_beside = || file.with_file_name(format!("{repository}.identity.key"));
        let key = match (args.write_only, args.recipient.as_slice()) {
            (false, _) => KeyWish::Whole,
            (true, []) => KeyWish::Split(absolute(&args.identity_file.clone().unwrap_or_else(identity_beside))?),
            (true, recipients) => KeyWish::WriteFor(recipients.to_vec()),
        };
        let directory = absolute(Path::new(&args.repo))?;
        let settings = args.bucket.settings(&args.repo)?;
        let new_place = match args.repo.contains("://") {
            true => NewPlace::Bucket(&args.repo, &settings),
            false if args.bucket.is_empty() => NewPlace::Directory(&directory),
            false => {
                let sentence =
                    format!("{} is a directory, and endpoint, region and the like are for buckets", args.repo);
                return Err(
                    CliError::usage(anyhow::Error::msg(sentence)).hint("a bucket is written s3://BUCKET/PREFIX")
                );
            }
        };
        let template = Template {
            cluster: context.cluster_name().unwrap_or(DEFAULT_NAME),
            conninfo: &args.pg,
            slot: &args.slot,
            repository: &repository,
            place: new_place,
            key_file: &key_file,
            write_only: args.write_only,
        };
        let config_text = template.render(&file)?;
        let config = Config::parse(&config_text, &file)?;
        let cluster = config.cluster(None)?.clone();
        let place = config.repository(None)?.clone();
        let conninfo = open::source(&cluster)?.conninfo;
        Ok(Wish {
            file,
            key_file,
            repository,
            conninfo_text: args.pg.clone(),
            conninfo,
            slot: args.slot.clone(),
            config_text,
            cluster,
            place,
            key,
        })
    }

    fn connect(&self) -> ConnectOptions {
        let application_name = self.cluster.application_name.clone();
        ConnectOptions { application_name, timeout: CONNECT_TIMEOUT, ..ConnectOptions::default() }
    }
}

/// What is there already, and the server's answer.
struct Found {
    config_exists: bool,
    key: Option<KeyFile>,
    repository_exists: bool,
    server: Server,
}

/// The server as far as it let us in.
struct Server {
    replication: Result<(Replication, SystemId), PgError>,
    sql_refused: Option<PgError>,
}

/// Looks at everything and changes nothing; refuses what does not fit.
async fn look(wish: &Wish) -> Result<Found, CliError> {
    let config_exists = same_configuration(wish)?;
    let key = existing_key(&wish.key_file, &wish.repository).await?;
    if key.as_ref().is_some_and(KeyFile::can_read) && !matches!(wish.key, KeyWish::Whole) {
        let sentence =
            format!("{} is there and reads, and --write-only asks for one that does not", wish.key_file.display());
        return Err(refused(sentence).hint(
            "nothing was changed; move that key file to where backups are restored, and say --write-only --recipient with its \
             recipient and another --key-file, for a new repository",
        ));
    }
    let (server, data_directory) = server(wish).await;
    let there = match &wish.place.place {
        Place::Directory(path) => {
            refuse_data_directory(path, data_directory.as_deref())?;
            directory(path)?
        }
        place => in_bucket(place).await?,
    };
    let repository_exists = match there {
        There::Nothing => false,
        There::Repository if key.is_none() => {
            let (place, key_file) = (&wish.place.place, wish.key_file.display());
            return Err(refused(format!("{place} is a repository already, and there is no key at {key_file}")).hint(
                "a new key would not open it: put the key that was made with it there, or name it with --key-file",
            ));
        }
        There::Repository => true,
    };
    if let (true, Some(key)) = (repository_exists, &key) {
        let store = open::store(&wish.place.place).await?;
        match (Repository::open(&wish.repository, store, key.clone()).await, &server.replication) {
            (Ok(repository), Ok((_, system))) => refuse_foreign(wish, &repository, *system).await?,
            // Cut off while it was made: it is completed, not opened.
            (Ok(_), Err(_)) | (Err(CatalogError::NoMetaKey { .. }), _) => {}
            (Err(error), _) => return Err(open::repository_error(error)),
        }
    }
    Ok(Found { config_exists, key, repository_exists, server })
}

fn refused(sentence: String) -> CliError {
    CliError::refused(anyhow::Error::msg(sentence))
}

/// A configuration that is there says what we would write, or is refused.
fn same_configuration(wish: &Wish) -> Result<bool, CliError> {
    if !wish.file.try_exists().map_err(|error| failed("look at", &wish.file, error))? {
        return Ok(false);
    }
    let there = Config::load(&wish.file)?;
    let file = wish.file.display();
    let add = || format!("add these lines to it, and run the same command again:\n{}", wish.config_text);
    let Some(place) = there.repositories.iter().find(|place| place.name == wish.repository) else {
        let refusal = refused(format!("{file} is there and has no repository {:?}", wish.repository));
        if !there.clusters.iter().any(|cluster| cluster.name == wish.cluster.name) {
            return Err(refusal.hint(add()));
        }
        // A second repository: the cluster is there already.
        let from = wish.config_text.find("[repository.").unwrap_or_default();
        let section = wish.config_text.get(from..).and_then(|text| text.split("[cluster.").next()).unwrap_or_default();
        let (repository, cluster) = (&wish.repository, &wish.cluster.name);
        return Err(refusal.hint(format!(
            "add these lines to it, put {repository:?} into the repositories of [cluster.{cluster}] if it shall receive the \
             cluster's WAL, and run the same command again:\n{section}"
        )));
    };
    let Some(cluster) = there.clusters.iter().find(|cluster| cluster.name == wish.cluster.name) else {
        return Err(refused(format!("{file} is there and has no cluster {:?}", wish.cluster.name.as_str())).hint(add()));
    };
    let same_server = cluster.conninfo.expose_secret() == wish.conninfo_text;
    let differences = [
        (place.place != wish.place.place).then(|| format!("path of repository {} ({})", place.name, place.place)),
        (place.key != wish.place.key).then(|| format!("key of repository {} ({})", place.name, place.key.origin)),
        (!same_server).then(|| format!("conninfo of cluster {}", cluster.name)),
        (cluster.slot != wish.slot).then(|| format!("slot of cluster {} ({})", cluster.name, cluster.slot)),
    ];
    let differences: Vec<String> = differences.into_iter().flatten().collect();
    if differences.is_empty() {
        return Ok(true);
    }
    Err(refused(format!("{file} is there and says something else: {}", differences.join(", ")))
        .hint("nothing was changed; change the file, or name another one with --config"))
}

async fn existing_key(path: &Path, repository: &str) -> Result<Option<KeyFile>, CliError> {
    if !path.try_exists().map_err(|error| failed("look at", path, error))? {
        return Ok(None);
    }
    let source = KeySource { origin: KeyOrigin::File(path.to_owned()), passphrase_file: None };
    open::key(&source, repository).await.map(Some)
}

/// What lies where the repository shall be.
enum There {
    /// Nothing, or what a first run that was cut off left.
    Nothing,
    /// A repository.
    Repository,
}

fn directory(path: &Path) -> Result<There, CliError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(There::Nothing),
        Err(error) => return Err(CliError::usage(error).context(format!("look into {}", path.display()))),
    };
    if path.join("format/0001.json").try_exists().map_err(|error| failed("look into", path, error))? {
        return Ok(There::Repository);
    }
    for entry in entries {
        let name = entry.map_err(|error| failed("look into", path, error))?.file_name();
        if !HARMLESS.iter().any(|harmless| name == *harmless) {
            let (path, name) = (path.display(), name.to_string_lossy().into_owned());
            return Err(refused(format!("{path} is not empty and is no repository: it holds {name:?}"))
                .hint("nothing was changed; name a directory that is empty or not there yet"));
        }
    }
    Ok(There::Nothing)
}

/// The same below a prefix. The first request to the bucket: whoever cannot reach it is told here, before anything is made.
async fn in_bucket(place: &Place) -> Result<There, CliError> {
    let store: std::sync::Arc<dyn Store> = match place {
        Place::S3(place) => open::with_limits(bucket::s3(place).await?),
        place => open::store(place).await?,
    };
    let reached = |error: StoreError| bucket_error(place, error);
    let format = store.list(&ListRequest::flat("format/0001.json")).await.map_err(reached)?;
    if !format.objects.is_empty() {
        return Ok(There::Repository);
    }
    let listed = store.list(&ListRequest::delimited("")).await.map_err(reached)?;
    let folders = listed.folders.iter().map(|folder| folder.trim_end_matches('/'));
    let mut names = folders.chain(listed.objects.iter().map(|object| object.key.as_str()));
    match names.find(|name| !HARMLESS.contains(name)) {
        None => Ok(There::Nothing),
        Some(name) => Err(refused(format!("{place} is not empty and is no repository: it holds {name:?}"))
            .hint("nothing was changed; name a prefix under which nothing lies, such as s3://BUCKET/pgkeep")),
    }
}

/// What keeps `init` from a bucket, with what to do about it.
fn bucket_error(place: &Place, error: StoreError) -> CliError {
    match error {
        StoreError::Vanished { .. } => CliError::usage(anyhow::anyhow!("there is no bucket for {place}"))
            .hint("pgkeep does not make buckets: make it first, and look at its name, the endpoint and the region"),
        error => open::store_error(error),
    }
}

/// Makes a directory; finds out what a bucket's server does, and what is to be said of that.
async fn make_place(place: &Place) -> Result<(std::sync::Arc<dyn Store>, Vec<Finding>), CliError> {
    match place {
        Place::Directory(path) => {
            let store = FsStore::create(path).await.map_err(open::store_error)?;
            Ok((open::with_limits(store), Vec::new()))
        }
        Place::S3(s3) => {
            let reached = |error: StoreError| bucket_error(place, error);
            let bucket: S3Store = bucket::with_remembered(bucket::s3(s3).await?).await.map_err(reached)?;
            let probed = bucket::probe(&bucket).await.map_err(reached)?;
            let findings = probed.verdict.in_words(probed.bucket.options());
            let findings = findings.into_iter().map(|finding| Finding { good: finding.good, text: finding.text });
            Ok((open::with_limits(probed.bucket), findings.collect()))
        }
        Place::Google(_) | Place::Azure(_) => Ok((open::store(place).await?, Vec::new())),
    }
}

/// What was found out about a store, for a person.
#[derive(Serialize)]
struct Finding {
    good: bool,
    text: String,
}

fn refuse_data_directory(directory: &Path, of_server: Option<&Path>) -> Result<(), CliError> {
    match place::data_directory_around(directory, of_server) {
        None => Ok(()),
        Some(data) => {
            let sentence = format!(
                "{} lies inside {}, a data directory of PostgreSQL: it would be lost together with what it protects",
                directory.display(),
                data.display()
            );
            Err(refused(sentence).hint("put the repository on another disk, or better on another host"))
        }
    }
}

/// Connects both ways, and asks where the data directory is if that can matter.
async fn server(wish: &Wish) -> (Server, Option<PathBuf>) {
    let options = wish.connect();
    let mut data_directory = None;
    let sql_refused = match Session::connect(&wish.conninfo, &options).await {
        Ok(mut session) => {
            // A role that may not know is told so: then the file system alone has to do.
            if let Ok(rows) = session.query("SHOW data_directory").await {
                data_directory = rows.first().and_then(|row| row.get(0).map(PathBuf::from));
            }
            session.close().await;
            None
        }
        Err(error) => Some(error),
    };
    let identify = async {
        let mut replication = Replication::connect(&wish.conninfo, &options).await?;
        let system = replication.identify_system().await?.system;
        Ok((replication, system))
    };
    (Server { replication: identify.await, sql_refused }, data_directory.filter(|_| !wish.conninfo.is_remote()))
}

async fn refuse_foreign(wish: &Wish, repository: &Repository, system: SystemId) -> Result<(), CliError> {
    let name: &ClusterName = &wish.cluster.name_in_repository;
    let there = repository.clusters_named(name).await.map_err(open::repository_error)?;
    match there.first() {
        Some(first) if there.iter().all(|id| id.system != system) => Err(refused(format!(
            "cluster {name} in {} has the system identifier {}, but the server at {} has {system}",
            wish.place.place,
            first.system,
            wish.conninfo.describe()
        ))
        .hint("is this the right server? Give another cluster another name with --cluster")),
        _ => Ok(()),
    }
}

fn agreed(context: &Context, wish: &Wish, found: &Found) -> Result<bool, CliError> {
    let word = |there: bool| if there { "keep " } else { "write" };
    context.output.note(format!("{} the key         {}", word(found.key.is_some()), wish.key_file.display()));
    if let (KeyWish::Split(path), None) = (&wish.key, &found.key) {
        context.output.note(format!("{} the identity    {}", word(path.exists()), path.display()));
    }
    context.output.note(format!("{} the repository  {}", word(found.repository_exists), wish.place.place));
    context.output.note(format!("{} the settings    {}", word(found.config_exists), wish.file.display()));
    context.output.note(format!("make  the slot        {:?} on {}", wish.slot, wish.conninfo.describe()));
    let _ = std::io::stderr().write_all(b"Go on? [Y/n] "); // nobody may be reading
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(CliError::failed)?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "" | "y" | "yes"))
}

async fn make_key(wish: &Wish) -> Result<KeyFile, CliError> {
    let key = match &wish.key {
        KeyWish::Whole => KeyFile::generate().map_err(CliError::failed)?,
        KeyWish::WriteFor(recipients) => KeyFile::generate_for(recipients.clone()).map_err(CliError::failed)?,
        // The one that reads is durable before anything can be sealed that only it opens. A run that was cut off here left it.
        KeyWish::Split(path) => match existing_key(path, &wish.repository).await? {
            Some(whole) if whole.can_read() => whole.write_only(),
            Some(_) => return Err(refused(format!("{} is there and is no key that reads", path.display()))),
            None => {
                let whole = KeyFile::generate().map_err(CliError::failed)?;
                write_new(path, whole.render().expose_secret().as_bytes(), 0o600)?;
                whole.write_only()
            }
        },
    };
    write_new(&wish.key_file, key.render().expose_secret().as_bytes(), 0o600)?;
    Ok(key)
}

/// A file that is there whole or not at all, durably, and never replaces another. Made with mode 0600 from the start.
pub(super) fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CliError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(folder)?;
        let mut file = tempfile::Builder::new().prefix(".pgkeep").tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().set_permissions(Permissions::from_mode(mode))?;
        file.as_file().sync_all()?;
        file.persist_noclobber(path).map_err(|error| error.error)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            refused(format!("{} is there already, and is not replaced", path.display()))
        }
        _ => failed("write", path, error),
    })
}

fn failed(doing: &str, path: &Path, error: std::io::Error) -> CliError {
    CliError::failed(error).context(format!("{doing} {}", path.display()))
}

/// What came of the server's part.
struct Slot {
    state: SlotState,
    system: Option<SystemId>,
    /// What was not allowed, in the order in which it was tried.
    missing: Vec<Missing>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum SlotState {
    Made,
    Kept,
    Missing,
}

#[derive(Serialize)]
struct Missing {
    what: &'static str,
    error: String,
    advice: Advice,
    /// Without it nothing can be archived.
    needed: bool,
}

async fn slot(wish: &Wish, repository: &Repository, server: Server) -> Result<Slot, CliError> {
    let missing = |what, tried, error: &PgError, needed| Missing {
        what,
        error: error.to_string(),
        advice: advise(error, tried, &wish.conninfo),
        needed,
    };
    let mut slot = Slot { state: SlotState::Missing, system: None, missing: Vec::new() };
    slot.missing.extend(server.sql_refused.as_ref().map(|error| missing("SQL", Tried::Sql, error, false)));
    let (mut replication, system) = match server.replication {
        Ok(connected) => connected,
        Err(error) => {
            slot.missing.push(missing("replication", Tried::Replication, &error, true));
            return Ok(slot);
        }
    };
    slot.system = Some(system);
    refuse_foreign(wish, repository, system).await?;
    let source = Source { conninfo: wish.conninfo.clone(), connect: wish.connect(), slot: wish.slot.clone() };
    if let Ok(Some(_)) = source.slot_by_sql().await {
        slot.state = SlotState::Kept;
        return Ok(slot);
    }
    match replication.create_slot(&wish.slot).await {
        Ok(()) => slot.state = SlotState::Made,
        Err(error) if error.server_kind() == Some(ServerErrorKind::AlreadyExists) => {
            // By SQL it was not there as a physical one; without SQL it is taken to be.
            if server.sql_refused.is_none() {
                return Err(refused(format!("the slot {:?} on the server is a logical one", wish.slot))
                    .hint("name another slot with --slot"));
            }
            slot.state = SlotState::Kept;
        }
        Err(error) => slot.missing.push(missing("the slot", Tried::Replication, &error, true)),
    }
    replication.close().await;
    Ok(slot)
}

#[derive(Serialize)]
struct Done {
    config: PathBuf,
    config_made: bool,
    key_file: PathBuf,
    key_made: bool,
    /// The key file that reads, of a key that only writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    identity_file: Option<PathBuf>,
    /// The key only writes.
    write_only: bool,
    repository: String,
    repository_made: bool,
    /// What was found out about the store.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    store: Vec<Finding>,
    slot: String,
    slot_state: SlotState,
    system: Option<SystemId>,
    missing: Vec<Missing>,
}

impl Done {
    fn new(wish: &Wish, found: &Found) -> Done {
        Done {
            config: wish.file.clone(),
            config_made: !found.config_exists,
            key_file: wish.key_file.clone(),
            key_made: found.key.is_none(),
            identity_file: match (&wish.key, &found.key) {
                (KeyWish::Split(path), None) => Some(path.clone()),
                _ => None,
            },
            write_only: found.key.as_ref().map_or(!matches!(wish.key, KeyWish::Whole), |key| !key.can_read()),
            repository: wish.place.place.to_string(),
            repository_made: !found.repository_exists,
            store: Vec::new(),
            slot: wish.slot.clone(),
            slot_state: SlotState::Missing,
            system: None,
            missing: Vec::new(),
        }
    }

    fn slot(&mut self, slot: Slot) {
        (self.slot_state, self.system, self.missing) = (slot.state, slot.system, slot.missing);
    }

    fn tell(&self, context: &Context) -> Exit {
        let output = &context.output;
        output.document(self);
        let word = |made: bool| if made { "made" } else { "kept" };
        output.line(format!("{}  key            {}", word(self.key_made), self.key_file.display()));
        output.line(format!("{}  repository     {}", word(self.repository_made), self.repository));
        for Finding { good, text } in &self.store {
            output.line(format!("{}  {text}", if *good { "     " } else { "weak " }));
        }
        output.line(format!("{}  configuration  {}", word(self.config_made), self.config.display()));
        match (self.slot_state, self.system) {
            (SlotState::Missing, _) => output.line(format!("not   slot           {} is not there yet", self.slot)),
            (state, Some(system)) => output.line(format!(
                "{}  slot           {} on the cluster with system identifier {system}",
                word(state == SlotState::Made),
                self.slot
            )),
            (state, None) => output.line(format!("{}  slot           {}", word(state == SlotState::Made), self.slot)),
        }
        if let (true, Some(identity)) = (self.key_made, &self.identity_file) {
            output.line(format!(
                "made  identity       {}\n\n\
                 Take that file away from this host, now, and keep copies of it: restoring needs it, and nothing else does.\n\
                 {} archives and takes backups with what it knows, and cannot read a row.",
                identity.display(),
                self.key_file.display()
            ));
        } else if self.key_made && self.write_only {
            output.line(format!(
                "\n{} archives and takes backups, and cannot read a row. To restore, put the identity's line\n\
                 (AGE-SECRET-KEY-1…) into a copy of it, elsewhere. Keep a copy of both: without them nobody can read any of it.",
                self.key_file.display()
            ));
        } else if self.key_made {
            output.line(format!(
                "\nKeep a copy of {} somewhere else, now. Whoever has it and the repository can read everything;\n\
                 without it nobody can read any of it, you included, and nobody can make another.",
                self.key_file.display()
            ));
        }
        for missing in &self.missing {
            let weight = if missing.needed { "" } else { " (pgkeep works without, and sees less)" };
            output.line(format!("\nThe server does not allow {} yet{weight}:\n  {}", missing.what, missing.error));
            for line in missing.advice.lines() {
                output.line(format!("  {line}"));
            }
        }
        if self.slot_state == SlotState::Missing {
            output.line("\nThen run the same command again: what is there is kept.");
            return Exit::Failed;
        }
        output.line("\nNext: pgkeep check");
        Exit::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_private_from_its_first_moment_and_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/main.key");
        write_new(&path, b"secret", 0o600).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = write_new(&path, b"another", 0o600).unwrap_err();
        assert_eq!(error.exit(), Exit::Refused, "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"secret");
        assert_eq!(fs::read_dir(dir.path().join("new")).unwrap().count(), 1, "no temporary is left");
    }

    #[test]
    fn a_directory_is_taken_only_when_it_is_empty_or_ours() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(directory(&dir.path().join("absent")), Ok(There::Nothing)));
        assert!(matches!(directory(dir.path()), Ok(There::Nothing)));
        fs::create_dir(dir.path().join(".pgkeep-tmp")).unwrap();
        fs::create_dir(dir.path().join("format")).unwrap();
        assert!(matches!(directory(dir.path()), Ok(There::Nothing)), "cut off before the first object");
        fs::write(dir.path().join("photo.jpg"), b"").unwrap();
        let Err(error) = directory(dir.path()) else { panic!("a stranger's directory") };
        assert!(error.exit() == Exit::Refused && error.to_string().contains("photo.jpg"), "{error}");
        fs::write(dir.path().join("format/0001.json"), b"{}").unwrap();
        assert!(matches!(directory(dir.path()), Ok(There::Repository)));
    }
}
