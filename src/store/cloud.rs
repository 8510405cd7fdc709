//! Google Cloud Storage and Azure Blob, through the `object_store` crate.
//!
//! What always holds: objects are created with the service's own condition (`x-goog-if-generation-match: 0`,
//! `If-None-Match: *`) in one request, so of two who create one name exactly one wins. The crate's multipart uploads cannot
//! carry that condition, and both services take bodies of [`MAX_BODY`] in one request: so there are no uploads in parts,
//! and nothing to clean up after a crash. The crate tries nothing again; [`super::retry`] does.
//! Names are listed in the order of their bytes. An account that lists in another order (Azure with a hierarchical
//! namespace) is refused rather than misread.
//! Crash, cancellation: as for every store; what a dropped request was doing is done whole or not at all.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use jiff::Timestamp;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::Path;
use object_store::{
    ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, RetryConfig,
};
use secrecy::{ExposeSecret, SecretString};

use super::key::is_part;
use super::{
    Body, Created, Key, ListRequest, Listing, MAX_BODY, MAX_READ, ObjectMeta, Op, Shown, Store, StoreError, Tail,
};

/// The end of any request, whatever it moves: as long as the whole budget of [`super::retry`], which ends most earlier.
const REQUEST: Duration = Duration::from_secs(300);
/// A service that does not even accept a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Most names that one request asks for: what Google gives; Azure would give 5000.
const MAX_KEYS: usize = 1000;
/// What Google and Azure say of an object that is not there.
const NO_OBJECT: [&str; 2] = ["NoSuchKey", "BlobNotFound"];
/// What of a service's answer goes into a message.
const MAX_MESSAGE: usize = 600;

/// Where a bucket or container is, and how it is opened.
#[derive(Clone)]
pub struct CloudOptions {
    /// The bucket or container.
    pub bucket: String,
    /// Everything lies below this folder; empty: at the bucket's root. No `/` at either end.
    pub prefix: String,
    /// `http://host:port` or `https://…` instead of the service's own address.
    pub endpoint: Option<String>,
    /// Whose it is.
    pub service: CloudService,
}

/// Whose bucket it is, and what opens it.
#[derive(Clone)]
pub enum CloudService {
    /// `gs://`
    Google {
        /// A service account as JSON. `None`: as the environment and the machine say.
        credentials: Option<SecretString>,
    },
    /// `az://`
    Azure {
        /// The storage account. `None`: as the environment says.
        account: Option<String>,
        /// An access key. `None`: as the environment and the machine say.
        access_key: Option<SecretString>,
    },
}

impl CloudService {
    fn scheme(&self) -> &'static str {
        match self {
            CloudService::Google { .. } => "gs",
            CloudService::Azure { .. } => "az",
        }
    }
}

/// A bucket of Google's or a container of Azure's.
#[derive(Clone)]
pub struct CloudStore {
    objects: Arc<dyn ObjectStore>,
    pages: Arc<dyn PaginatedListStore>,
    /// Empty, or with a `/` at its end.
    prefix: String,
    place: String,
}

impl fmt::Debug for CloudStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CloudStore({})", self.place)
    }
}

impl CloudStore {
    /// Makes ready to speak to the service. Sends nothing: whether the bucket is there shows at the first request.
    ///
    /// # Errors
    /// [`StoreError::Denied`] where credentials are missing or are not what the service gives out.
    pub fn open(options: CloudOptions) -> Result<CloudStore, StoreError> {
        let CloudOptions { bucket, prefix, endpoint, service } = options;
        let slash = if prefix.is_empty() { "" } else { "/" };
        let place = format!("{}://{bucket}{slash}{prefix}", service.scheme());
        // Plain HTTP only where somebody wrote it down.
        let plain = endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
        let client = ClientOptions::new().with_timeout(REQUEST).with_connect_timeout(CONNECT).with_allow_http(plain);
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let refused = |error: object_store::Error| StoreError::Denied {
            op: Op::Open,
            at: place.clone(),
            source: message(&error).into(),
            hint: "does credentials_file hold what the service gave out? without it the environment has to name it"
                .into(),
        };
        let (objects, pages): (Arc<dyn ObjectStore>, Arc<dyn PaginatedListStore>) = match service {
            CloudService::Google { credentials } => {
                let mut builder = GoogleCloudStorageBuilder::from_env()
                    .with_bucket_name(bucket)
                    .with_client_options(client)
                    .with_retry(retry);
                if let Some(endpoint) = &endpoint {
                    builder = builder.with_base_url(endpoint);
                }
                if let Some(json) = credentials {
                    builder = builder.with_service_account_key(json.expose_secret());
                }
                let store = Arc::new(builder.build().map_err(refused)?);
                (store.clone(), store)
            }
            CloudService::Azure { account, access_key } => {
                let mut builder = MicrosoftAzureBuilder::from_env()
                    .with_container_name(bucket)
                    .with_client_options(client)
                    .with_retry(retry);
                if let Some(endpoint) = endpoint {
                    builder = builder.with_endpoint(endpoint);
                }
                if let Some(account) = account {
                    builder = builder.with_account(account);
                }
                if let Some(key) = access_key {
                    builder = builder.with_access_key(key.expose_secret().trim());
                }
                let store = Arc::new(builder.build().map_err(refused)?);
                (store.clone(), store)
            }
        };
        Ok(CloudStore { objects, pages, prefix: format!("{prefix}{slash}"), place })
    }

    fn path(&self, op: Op, key: &Key) -> Result<Path, StoreError> {
        Path::parse(format!("{}{key}", self.prefix)).map_err(|error| {
            let reason = format!("the name does not suit the service: {error}");
            StoreError::Unsupported { op, at: self.at(key.as_str()), reason }
        })
    }

    fn at(&self, name: &str) -> String {
        format!("{name} in {}", self.place)
    }

    fn gone(&self) -> StoreError {
        let reason = "the service says that there is no such bucket or container".into();
        StoreError::Vanished { store: self.place.clone(), reason }
    }

    /// What the crate met, in our words; `key` is what was asked for, if it was an object.
    fn error(&self, op: Op, name: &str, key: Option<&Key>, error: &object_store::Error) -> StoreError {
        use object_store::Error;
        let at = self.at(name);
        let text = message(error);
        let no_bucket = ["NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"];
        // Of a listing the crate says "generic", whatever the service said.
        let status = match error {
            Error::NotFound { .. } => Some(404),
            Error::PermissionDenied { .. } => Some(403),
            Error::Unauthenticated { .. } => Some(401),
            _ => status(&text),
        };
        match (status, key) {
            // P7: a bucket that is gone is not an object that is missing.
            (Some(404), _) if no_bucket.iter().any(|code| text.contains(code)) => self.gone(),
            (Some(404), Some(key)) => StoreError::NotFound { key: key.clone() },
            (Some(404), None) => self.gone(),
            (Some(403), _) => StoreError::Denied {
                op,
                at,
                source: text.into(),
                hint: "the account is known and may not do this; it must list, read, create and delete objects".into(),
            },
            (Some(401), _) => StoreError::Denied {
                op,
                at,
                source: text.into(),
                hint: "the service does not accept these credentials; are they of this account, and still valid?"
                    .into(),
            },
            _ => match error {
                Error::NotSupported { .. } | Error::NotImplemented { .. } | Error::InvalidPath { .. } => {
                    StoreError::Unsupported { op, at, reason: text }
                }
                _ => StoreError::Unavailable { op, at, source: text.into() },
            },
        }
    }

    /// What a 404 means that does not say what is missing: an answer to HEAD has no body, and one may come from something
    /// between us and the service. P7: an object is missing when the bucket is there and does not list it.
    async fn missing(&self, op: Op, key: &Key) -> StoreError {
        let options = PaginatedListOptions { max_keys: Some(1), ..PaginatedListOptions::default() };
        let name = format!("{}{key}", self.prefix);
        match self.pages.list_paginated(Some(&name), options).await {
            Ok(page) if page.result.objects.iter().any(|meta| meta.location.as_ref() == name) => {
                let source = "the service said 404 of an object that it lists".into();
                StoreError::Unavailable { op, at: self.at(key.as_str()), source }
            }
            Ok(_) => StoreError::NotFound { key: key.clone() },
            Err(error) => self.error(Op::List, "", None, &error),
        }
    }

    /// Reads the object if it is as long as `body`, and compares.
    async fn holds(&self, key: &Key, body: &Body) -> Result<bool, StoreError> {
        if self.head(key).await?.len != body.len() {
            return Ok(false);
        }
        Ok(body.same_as(&self.get(key, None).await?))
    }

    /// The next names as the service lists them: objects and folders in one order, below our own prefix.
    fn names(&self, listed: object_store::ListResult) -> Vec<Named> {
        let below = |path: &Path| path.as_ref().strip_prefix(&self.prefix).map(str::to_owned);
        let folders = listed.common_prefixes.iter().filter_map(below);
        let mut names: Vec<Named> = folders.map(|name| Named { name: format!("{name}/"), meta: None }).collect();
        names.extend(listed.objects.iter().filter_map(|meta| {
            let name = below(&meta.location)?;
            Some(Named { name, meta: Some((meta.size, moment(meta))) })
        }));
        names.sort_by(|a, b| a.name.cmp(&b.name)); // two lists of one page, each in order, become one
        names
    }
}

/// A name as listed; `meta` of an object, `None` of a folder.
struct Named {
    name: String,
    meta: Option<(u64, Timestamp)>,
}

/// When it was created. To the second: a header is not more exact, and a listing must say the same.
fn moment(meta: &object_store::ObjectMeta) -> Timestamp {
    Timestamp::from_second(meta.last_modified.timestamp()).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// The chain of causes without what is said twice, cut: an answer may be a page of XML. The crate leaves out the URL where it
/// holds a signature.
fn message(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(MAX_MESSAGE) {
        Some((cut, _)) => format!("{}…", text.get(..cut).unwrap_or_default()),
        None => text,
    }
}

/// The HTTP status that a message of the crate names.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

/// Whether any key can begin so. What cannot is answered without asking: services take offence at a zero byte.
fn may_begin_a_key(prefix: &str) -> bool {
    let mut parts = prefix.rsplit('/');
    let last = parts.next().unwrap_or_default();
    parts.all(is_part) && (last.is_empty() || is_part(last))
}

#[async_trait]
impl Store for CloudStore {
    fn describe(&self) -> String {
        self.place.clone()
    }

    fn appends(&self) -> bool {
        false
    }

    async fn put_new(&self, key: &Key, body: Body) -> Result<Created, StoreError> {
        if body.len() > MAX_BODY {
            let (at, len) = (self.at(key.as_str()), body.len());
            return Err(StoreError::TooLarge { op: Op::Put, at, len, limit: MAX_BODY });
        }
        let path = self.path(Op::Put, key)?;
        let payload: PutPayload = body.chunks().iter().filter(|chunk| !chunk.is_empty()).cloned().collect();
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.objects.put_opts(&path, payload, options).await {
            Ok(_) => Ok(Created::New),
            // Azure says the same of what is being deleted or is locked: what is there decides.
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                match self.holds(key, &body).await {
                    Ok(true) => Ok(Created::AlreadyThere),
                    Ok(false) => Err(StoreError::Conflict { key: key.clone() }),
                    Err(StoreError::NotFound { .. }) => {
                        let source = "it was there, and gone when it was looked at".into();
                        Err(StoreError::Unavailable { op: Op::Put, at: self.at(key.as_str()), source })
                    }
                    Err(error) => Err(error),
                }
            }
            // Nothing that is put can be missing: it is the bucket.
            Err(error) => Err(self.error(Op::Put, key.as_str(), None, &error)),
        }
    }

    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let path = self.path(Op::Get, key)?;
        let too_large = |len| StoreError::TooLarge { op: Op::Get, at: self.at(key.as_str()), len, limit: MAX_READ };
        if range.as_ref().is_some_and(|range| range.start >= range.end) {
            return self.head(key).await.map(|_| Bytes::new());
        }
        let wanted = range.clone().map(GetRange::Bounded);
        let options = GetOptions { range: wanted, ..GetOptions::default() };
        let got = match self.objects.get_opts(&path, options).await {
            Ok(got) => got,
            Err(error) => {
                let says_what = |text: &str| NO_OBJECT.iter().any(|code| text.contains(code));
                let is_bare = !says_what(&message(&error));
                let error = self.error(Op::Get, key.as_str(), Some(key), &error);
                if error.is_not_found() && is_bare {
                    return Err(self.missing(Op::Get, key).await);
                }
                let Some(range) = range.filter(|_| error.is_transient()) else { return Err(error) };
                // A range that begins behind the end is an error to them, and no bytes to us.
                return match self.head(key).await {
                    Ok(meta) if range.start >= meta.len => Ok(Bytes::new()),
                    _ => Err(error),
                };
            }
        };
        let len = got.range.end.saturating_sub(got.range.start);
        if len > MAX_READ {
            return Err(too_large(len));
        }
        let mut bytes = BytesMut::with_capacity(usize::try_from(len).unwrap_or(0));
        let mut stream = got.into_stream();
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| self.error(Op::Get, key.as_str(), Some(key), &error))?;
            if (bytes.len() + chunk.len()) as u64 > MAX_READ {
                return Err(too_large((bytes.len() + chunk.len()) as u64));
            }
            bytes.extend_from_slice(&chunk);
        }
        if bytes.len() as u64 != len {
            let source = format!("{} bytes came, {len} were announced", bytes.len()).into();
            return Err(StoreError::Unavailable { op: Op::Get, at: self.at(key.as_str()), source });
        }
        Ok(bytes.freeze())
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, StoreError> {
        match self.objects.head(&self.path(Op::Head, key)?).await {
            Ok(meta) => Ok(ObjectMeta { key: key.clone(), len: meta.size, modified: moment(&meta) }),
            Err(error) => {
                let error = self.error(Op::Head, key.as_str(), Some(key), &error);
                Err(if error.is_not_found() { self.missing(Op::Head, key).await } else { error })
            }
        }
    }

    async fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        let (mut listing, limit) = (Listing::default(), request.page());
        if !may_begin_a_key(&request.prefix) {
            return Ok(listing);
        }
        let prefix = format!("{}{}", self.prefix, request.prefix);
        let offset = request.after.as_ref().map(|after| format!("{}{after}", self.prefix));
        let (mut token, mut before, mut last): (Option<String>, _, _) = (None, String::new(), String::new());
        loop {
            let options = PaginatedListOptions {
                offset: offset.clone(),
                delimiter: request.delimited.then_some("/".into()),
                // One more than wanted tells whether there are more; another may be the folder that was shown last.
                max_keys: Some((limit + 2).min(MAX_KEYS)),
                page_token: token.clone(),
                ..PaginatedListOptions::default()
            };
            let asked = (!prefix.is_empty()).then_some(prefix.as_str());
            let page = self.pages.list_paginated(asked, options).await;
            let page = page.map_err(|error| self.error(Op::List, &request.prefix, None, &error))?;
            for Named { name, meta } in self.names(page.result) {
                if name < before {
                    let at = self.at(&request.prefix);
                    let reason = format!(
                        "{name:?} is listed behind {before:?}: this account does not list names in the order of their \
                         bytes; use one without a hierarchical namespace"
                    );
                    return Err(StoreError::Unsupported { op: Op::List, at, reason });
                }
                before.clone_from(&name);
                let Some(shown) = request.shown(&name) else { continue };
                if shown.name() == last {
                    continue;
                }
                let valid = match shown {
                    Shown::Folder(folder) => may_begin_a_key(folder),
                    Shown::Object(name) => Key::new(name).is_ok(),
                };
                if !valid {
                    continue; // somebody else's
                }
                if listing.objects.len() + listing.folders.len() == limit {
                    listing.next = Some(last);
                    return Ok(listing);
                }
                last = shown.name().to_owned();
                match (shown, meta) {
                    (Shown::Folder(folder), _) => listing.folders.push(folder.to_owned()),
                    (Shown::Object(name), Some((len, modified))) => {
                        if let Ok(key) = Key::new(name) {
                            listing.objects.push(ObjectMeta { key, len, modified });
                        }
                    }
                    (Shown::Object(_), None) => {}
                }
            }
            if page.page_token.is_some() && page.page_token == token {
                let source = "the same page is announced as the next one".into();
                return Err(StoreError::Unavailable { op: Op::List, at: self.at(&request.prefix), source });
            }
            token = page.page_token;
            if token.is_none() {
                return Ok(listing);
            }
        }
    }

    /// What either service has answered is durable: it is there or not.
    async fn sync(&self, key: &Key) -> Result<(), StoreError> {
        self.head(key).await.map(drop)
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        match self.objects.delete(&self.path(Op::Delete, key)?).await {
            Ok(()) => Ok(()),
            Err(error) => match self.error(Op::Delete, key.as_str(), Some(key), &error) {
                StoreError::NotFound { .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    async fn open_tail(&self, key: &Key, _capacity: u64) -> Result<Box<dyn Tail>, StoreError> {
        let reason = "an object store cannot append to an object; ranges are put instead".into();
        Err(StoreError::Unsupported { op: Op::OpenTail, at: self.at(key.as_str()), reason })
    }
}

#[cfg(test)]
mod tests;
