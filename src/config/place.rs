//! Where a repository's objects are: a directory, or a bucket and how to reach it.

use std::fmt;
use std::path::PathBuf;

use toml::Spanned;

use super::check::Checker;
use super::error::nearest;
use super::file;

/// Where a repository's objects are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A directory, absolute.
    Directory(PathBuf),
    /// `s3://`: Amazon's S3, or a server that speaks it.
    S3(Box<S3Place>),
    /// `gs://`: Google Cloud Storage.
    Google(CloudPlace),
    /// `az://`: Azure Blob Storage; the bucket is a container.
    Azure(CloudPlace),
}

/// A bucket that is reached by the S3 protocol.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct S3Place {
    /// The bucket.
    pub bucket: String,
    /// Before every key; without a slash at either end, perhaps empty.
    pub prefix: String,
    /// `None`: as the usual AWS configuration says.
    pub region: Option<String>,
    /// `None`: Amazon's own.
    pub endpoint: Option<String>,
    /// The bucket in the path instead of the host name. `None`: where there is an `endpoint`.
    pub path_style: Option<bool>,
    /// What a put carries for the server to check.
    pub checksum: Checksum,
    /// For the packs of base backups.
    pub storage_class: Option<String>,
    /// Server-side encryption with this KMS key, on top of our own.
    pub kms_key: Option<String>,
    /// Objects that are kept long are locked.
    pub object_lock: Option<ObjectLock>,
    /// Instead of the usual AWS chain.
    pub credentials: Option<S3Credentials>,
    /// PEM certificates to trust besides the system's.
    pub ca_file: Option<PathBuf>,
}

/// Files that hold credentials, each with one line of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Credentials {
    /// The access key's id.
    pub access_key_file: PathBuf,
    /// Its secret.
    pub secret_key_file: PathBuf,
    /// Of temporary credentials.
    pub session_token_file: Option<PathBuf>,
}

/// What a put carries for the server to check what arrives. What is read is always verified by our own seal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Checksum {
    /// What the server was found to take.
    #[default]
    Auto,
    /// CRC-32C.
    Crc32c,
    /// SHA-256: slow on processors without instructions for it.
    Sha256,
    /// Nothing.
    None,
}

/// How objects that are kept long are locked against deletion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectLock {
    /// Who may still delete.
    pub mode: LockMode,
    /// From the moment of the put.
    pub days: u16,
}

/// Who may delete a locked object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Who has a special permission.
    Governance,
    /// Nobody.
    Compliance,
}

/// A bucket or container of another cloud.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CloudPlace {
    /// The bucket or container.
    pub bucket: String,
    /// Before every key; without a slash at either end, perhaps empty.
    pub prefix: String,
    /// `None`: the cloud's own.
    pub endpoint: Option<String>,
    /// Azure's storage account. `None`: as the environment says.
    pub account: Option<String>,
    /// Google's service account as JSON, or Azure's access key. `None`: as the environment says.
    pub credentials_file: Option<PathBuf>,
}

impl Place {
    /// Is it beside us, so that reading costs neither money nor a network?
    pub fn is_local(&self) -> bool {
        matches!(self, Place::Directory(_))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = |f: &mut fmt::Formatter<'_>, scheme: &str, bucket: &str, prefix: &str| {
            let slash = if prefix.is_empty() { "" } else { "/" };
            write!(f, "{scheme}://{bucket}{slash}{prefix}")
        };
        match self {
            Place::Directory(path) => path.display().fmt(f),
            Place::S3(place) => url(f, "s3", &place.bucket, &place.prefix),
            Place::Google(place) => url(f, "gs", &place.bucket, &place.prefix),
            Place::Azure(place) => url(f, "az", &place.bucket, &place.prefix),
        }
    }
}

/// The place and the settings of its kind; what belongs to another kind is a problem.
pub(super) fn place(
    checker: &mut Checker<'_>,
    name: &Spanned<String>,
    label: &str,
    written: file::PlaceSettings,
) -> Option<Place> {
    let file::PlaceSettings { path, url, mut s3, mut cloud, endpoint } = written;
    let kinds = "s3://bucket/prefix, gs://bucket/prefix or az://container/prefix";
    let (place, takes): (Option<Place>, &[&str]) = match (path, url) {
        (Some(path), None) => {
            if let Some(endpoint) = &endpoint {
                checker.at(endpoint, format!("endpoint does not go with path in {label}: it is for url"));
            }
            (checker.path("path", path).map(Place::Directory), &[])
        }
        (Some(_), Some(url)) => {
            checker.at(&url, format!("{label} has both path and url: a repository is in one place"));
            return None;
        }
        (None, None) => {
            checker.at(name, format!("{label} needs path, the directory that holds it, or url, such as {kinds}"));
            return None;
        }
        (None, Some(url)) => {
            let (scheme, rest) = url.get_ref().split_once("://").unwrap_or(("", ""));
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let prefix = prefix.trim_end_matches('/');
            let strange = |c: char| c.is_whitespace() || c.is_control() || "?#@\\".contains(c);
            let is_bad = bucket.is_empty() || rest.contains(strange) || prefix.split('/').any(|part| part == "..");
            if is_bad || (!prefix.is_empty() && prefix.split('/').any(str::is_empty)) {
                checker.at(&url, format!("url is not a place such as {kinds}"));
                return None;
            }
            let (bucket, prefix) = (bucket.to_owned(), prefix.to_owned());
            let endpoint = endpoint.map(Spanned::into_inner);
            match scheme {
                "s3" => (s3_place(checker, label, bucket, prefix, endpoint, &mut s3), S3),
                "gs" | "az" => {
                    let is_azure = scheme == "az";
                    if let Some(account) = cloud.account.as_ref().filter(|_| !is_azure) {
                        checker.at(account, format!("account is for az://; it does not belong into {label}"));
                    }
                    let credentials_file =
                        cloud.credentials_file.take().map(|path| checker.path("credentials_file", path));
                    let place = CloudPlace {
                        bucket,
                        prefix,
                        endpoint,
                        account: cloud.account.take().map(Spanned::into_inner),
                        credentials_file: flattened(credentials_file)?,
                    };
                    (Some(if is_azure { Place::Azure(place) } else { Place::Google(place) }), CLOUD)
                }
                other => {
                    let what = match nearest(other, ["s3", "gs", "az"]) {
                        Some(known) if !other.is_empty() => {
                            format!("{other}:// is no kind of place; did you mean {known}://?")
                        }
                        _ => format!("url is not a place such as {kinds}"),
                    };
                    checker.at(&url, what);
                    return None;
                }
            }
        }
    };
    let mut left = Vec::new();
    if takes != S3 {
        left.extend(s3.written());
    }
    if takes != CLOUD {
        left.extend(cloud.written());
    }
    for (setting, offset) in left {
        checker.problem(Some(offset), format!("{setting} does not go with the kind of place of {label}"));
    }
    place
}

const S3: &[&str] = &["s3"];
const CLOUD: &[&str] = &["cloud"];

/// `Some(None)` stands for a value that was a problem.
fn flattened<T>(value: Option<Option<T>>) -> Option<Option<T>> {
    match value {
        None => Some(None),
        Some(None) => None,
        Some(Some(value)) => Some(Some(value)),
    }
}

fn s3_place(
    checker: &mut Checker<'_>,
    label: &str,
    bucket: String,
    prefix: String,
    endpoint: Option<String>,
    written: &mut file::S3Settings,
) -> Option<Place> {
    let checksum = match written.checksum.take() {
        None => Checksum::Auto,
        Some(text) => match text.get_ref().as_str() {
            "auto" => Checksum::Auto,
            "crc32c" => Checksum::Crc32c,
            "sha256" => Checksum::Sha256,
            "none" => Checksum::None,
            other => {
                checker.at(&text, format!("checksum = {other:?} is not one of auto, crc32c, sha256, none"));
                return None;
            }
        },
    };
    let object_lock = match (written.object_lock.take(), written.object_lock_days.take()) {
        (None, None) => None,
        (Some(mode), Some(days)) => {
            let mode = match mode.get_ref().as_str() {
                "governance" => LockMode::Governance,
                "compliance" => LockMode::Compliance,
                other => {
                    checker.at(&mode, format!("object_lock = {other:?} is not one of governance, compliance"));
                    return None;
                }
            };
            match u16::try_from(*days.get_ref()).ok().filter(|days| (1..=36_500).contains(days)) {
                Some(days) => Some(ObjectLock { mode, days }),
                None => {
                    checker.at(&days, format!("object_lock_days = {} is out of range: 1 to 36500", days.get_ref()));
                    return None;
                }
            }
        }
        (Some(mode), None) => {
            checker.at(&mode, format!("object_lock in {label} needs object_lock_days"));
            return None;
        }
        (None, Some(days)) => {
            checker.at(&days, format!("object_lock_days in {label} needs object_lock: governance or compliance"));
            return None;
        }
    };
    let session_token_file =
        flattened(written.session_token_file.take().map(|path| checker.path("session_token_file", path)))?;
    let credentials = match (written.access_key_file.take(), written.secret_key_file.take()) {
        (Some(access), Some(secret)) => Some(S3Credentials {
            access_key_file: checker.path("access_key_file", access)?,
            secret_key_file: checker.path("secret_key_file", secret)?,
            session_token_file,
        }),
        (None, None) if session_token_file.is_none() => None,
        (one, other) => {
            let what = format!("{label} needs access_key_file and secret_key_file together");
            match one.or(other) {
                Some(written) => checker.at(&written, what),
                None => checker.problem(None, what),
            }
            return None;
        }
    };
    let ca_file = flattened(written.ca_file.take().map(|path| checker.path("ca_file", path)))?;
    Some(Place::S3(Box::new(S3Place {
        bucket,
        prefix,
        region: written.region.take().map(Spanned::into_inner),
        endpoint,
        path_style: written.path_style.take().map(Spanned::into_inner),
        checksum,
        storage_class: written.storage_class.take().map(Spanned::into_inner),
        kms_key: written.kms_key.take().map(Spanned::into_inner),
        object_lock,
        credentials,
        ca_file,
    })))
}
