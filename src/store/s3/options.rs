//! What an [`S3Store`](super::S3Store) is told, and the client that follows from it.

use std::fmt;
use std::time::Duration;

use aws_sdk_s3::Config;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation, SharedHttpClient,
    StalledStreamProtectionConfig,
};
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, Connector};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use secrecy::{ExposeSecret as _, SecretString};

use super::super::{BoxError, Op, StoreError};
use super::probe::{PutChecksum, Verdict};

/// A bucket, how to reach it, and what is asked of it.
#[derive(Clone)]
pub struct S3Options {
    /// The bucket.
    pub bucket: String,
    /// Before every key; without a slash at either end, perhaps empty.
    pub prefix: String,
    /// `None`: as the usual AWS configuration says; `us-east-1` where there is an endpoint, because those servers take any.
    pub region: Option<String>,
    /// `None`: Amazon's own.
    pub endpoint: Option<String>,
    /// The bucket in the path instead of the host name. `None`: where there is an endpoint.
    pub path_style: Option<bool>,
    /// What a put carries for the server to check.
    pub checksum: Checksum,
    /// For some keys, another storage class than the bucket's.
    pub storage_class: Option<StorageRule>,
    /// Server-side encryption with this KMS key.
    pub kms_key: Option<String>,
    /// What is put is locked against deletion.
    pub object_lock: Option<LockRule>,
    /// Who we are.
    pub credentials: S3Credentials,
    /// PEM certificates to trust besides the system's.
    pub ca_pem: Option<Vec<u8>>,
    /// What [`probe`](super::S3Store::probe) found earlier. Without it nothing is taken for granted.
    pub verdict: Option<Verdict>,
    /// How long one request may take.
    pub deadlines: Deadlines,
}

impl S3Options {
    /// A bucket of Amazon's, with the usual credentials and nothing special asked.
    pub fn new(bucket: impl Into<String>, prefix: impl Into<String>) -> S3Options {
        S3Options {
            bucket: bucket.into(),
            prefix: prefix.into(),
            region: None,
            endpoint: None,
            path_style: None,
            checksum: Checksum::Auto,
            storage_class: None,
            kms_key: None,
            object_lock: None,
            credentials: S3Credentials::Chain,
            ca_pem: None,
            verdict: None,
            deadlines: Deadlines::default(),
        }
    }

    /// A client with no connections yet, for this endpoint.
    pub(super) fn connections(&self, tls: &TlsContext) -> SharedHttpClient {
        let endpoint = self.endpoint.as_deref().unwrap_or_default();
        let host = endpoint.split_once("://").map_or("", |(_, host)| host);
        // No proxy leads back to this machine.
        let is_here = ["127.", "localhost", "[::1]"].iter().any(|here| host.starts_with(here));
        connections((!endpoint.starts_with("http://")).then_some(tls), !is_here)
    }

    /// The checksum that puts carry.
    pub(super) fn put_checksum(&self) -> PutChecksum {
        match self.checksum {
            Checksum::Auto => self.verdict.as_ref().map_or(PutChecksum::Crc32c, |verdict| verdict.checksum),
            Checksum::Crc32c => PutChecksum::Crc32c,
            Checksum::Sha256 => PutChecksum::Sha256,
            Checksum::None => PutChecksum::None,
        }
    }
}

impl fmt::Debug for S3Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Options")
            .field("bucket", &self.bucket)
            .field("prefix", &self.prefix)
            .field("credentials", &self.credentials)
            .field("verdict", &self.verdict)
            .finish_non_exhaustive()
    }
}

/// What a put carries for the server to check.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Checksum {
    /// What the server was found to take; CRC-32C before anybody looked.
    #[default]
    Auto,
    /// CRC-32C.
    Crc32c,
    /// SHA-256.
    Sha256,
    /// Nothing, but CRC-32C where objects are locked: S3 demands one there.
    None,
}

/// Which keys get a storage class of their own.
#[derive(Debug, Clone)]
pub struct StorageRule {
    /// As the server calls it: `STANDARD_IA`.
    pub class: String,
    /// By key, without the prefix.
    pub applies: fn(&str) -> bool,
}

/// How long objects are locked, and which are not.
#[derive(Debug, Clone)]
pub struct LockRule {
    /// Who may still delete.
    pub mode: LockMode,
    /// From the moment of the put, by our clock.
    pub days: u16,
    /// Keys, without the prefix, of what is soon deleted again and never locked.
    pub short_lived: fn(&str) -> bool,
}

/// Who may delete a locked object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Who has a special permission.
    Governance,
    /// Nobody.
    Compliance,
}

/// Who we are.
#[derive(Clone)]
pub enum S3Credentials {
    /// As every AWS tool finds them: environment, profile, web identity, container, instance.
    Chain,
    /// These.
    Static {
        /// The access key's id.
        access_key: SecretString,
        /// Its secret.
        secret_key: SecretString,
        /// Of temporary credentials.
        session_token: Option<SecretString>,
    },
}

impl fmt::Debug for S3Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            S3Credentials::Chain => "Chain",
            S3Credentials::Static { .. } => "Static(…)",
        })
    }
}

/// How long one request may take. A little less than an attempt of [`RetryPolicy`](super::super::retry::RetryPolicy), so
/// that it is we who give up, and know that the connection is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// To connect.
    pub connect: Duration,
    /// For a request that moves no bytes.
    pub request: Duration,
    /// The slowest usable store; every request gets the time for its bytes on top.
    pub slowest_bytes_per_second: u64,
    /// A body of which nothing arrives or leaves for so long is given up.
    pub stalled: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines {
            connect: Duration::from_secs(10),
            request: Duration::from_secs(28),
            slowest_bytes_per_second: 1 << 20,
            stalled: Duration::from_secs(20),
        }
    }
}

impl Deadlines {
    /// Of one request that moves `bytes`.
    pub(super) fn of(&self, bytes: u64) -> Duration {
        self.request + Duration::from_secs(bytes / self.slowest_bytes_per_second.max(1))
    }
}

/// The client's configuration, all but the connections: those are [`connections`].
pub(super) async fn config(options: &S3Options, at: &str, tls: &TlsContext) -> Result<Config, StoreError> {
    let version = BehaviorVersion::v2026_01_12();
    let region = match (&options.region, &options.endpoint) {
        (Some(region), _) => Some(Region::new(region.clone())),
        (None, Some(_)) => Some(Region::from_static("us-east-1")),
        (None, None) => None,
    };
    let mut builder = match &options.credentials {
        S3Credentials::Chain => {
            let mut loader = aws_config::defaults(version).http_client(connections(Some(tls), true));
            if let Some(region) = region.clone() {
                loader = loader.region(region);
            }
            aws_sdk_s3::config::Builder::from(&loader.load().await)
        }
        S3Credentials::Static { access_key, secret_key, session_token } => {
            let credentials = Credentials::new(
                access_key.expose_secret(),
                secret_key.expose_secret(),
                session_token.as_ref().map(|token| token.expose_secret().to_owned()),
                None,
                "pgkeep",
            );
            let mut builder = Config::builder().behavior_version(version).credentials_provider(credentials);
            if region.is_none() {
                let chain = aws_config::default_provider::region::DefaultRegionChain::builder().build();
                builder.set_region(chain.region().await);
            }
            builder
        }
    };
    if let Some(region) = region {
        builder.set_region(Some(region));
    }
    if let Some(endpoint) = &options.endpoint {
        builder.set_endpoint_url(Some(endpoint.clone()));
    }
    let deadlines = &options.deadlines;
    let stalled = StalledStreamProtectionConfig::enabled()
        .upload_enabled(true)
        .download_enabled(true)
        .grace_period(deadlines.stalled)
        .build();
    let config = builder
        .force_path_style(options.path_style.unwrap_or(options.endpoint.is_some()))
        // Trying again is `Retry`'s, alone. Attempts multiply otherwise, and nobody keeps the budget.
        .retry_config(RetryConfig::disabled())
        .timeout_config(TimeoutConfig::builder().connect_timeout(deadlines.connect).build())
        .stalled_stream_protection(stalled)
        // We compute what a put carries; what is read is verified by its seal.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .http_client(options.connections(tls))
        .build();
    if config.region().is_none() {
        return Err(StoreError::Denied {
            op: Op::Open,
            at: at.to_owned(),
            source: "no region is known".into(),
            hint: "set region in this repository's section, or AWS_REGION, or region in ~/.aws/config".into(),
        });
    }
    Ok(config)
}

/// The certificates to trust.
pub(super) fn tls(options: &S3Options, at: &str) -> Result<TlsContext, StoreError> {
    let refused = |source: BoxError| {
        let hint = "look at ca_file: it has to hold certificates in PEM".into();
        StoreError::Denied { op: Op::Open, at: at.to_owned(), source, hint }
    };
    let mut trust = TrustStore::default();
    if let Some(pem) = &options.ca_pem {
        // The client below takes its certificates unseen, and panics over bad ones at the first connection.
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|error| refused(error.to_string().into()))?;
            roots.add(certificate).map_err(|error| refused(error.into()))?;
        }
        if roots.is_empty() {
            return Err(refused("it holds no certificate".into()));
        }
        trust = trust.with_pem_certificate(pem.clone());
    }
    TlsContext::builder().with_trust_store(trust).build().map_err(|error| refused(error.into()))
}

/// A client with no connections yet, through the environment's `proxies` or not. Without `tls` it speaks plain HTTP alone, and does
/// not ask the system for certificates.
fn connections(tls: Option<&TlsContext>, proxies: bool) -> SharedHttpClient {
    let tls = tls.cloned();
    Builder::new().build_with_connector_fn(move |settings, components| {
        // Short: what lies between us and the server forgets idle connections without a word.
        let mut builder = Connector::builder().pool_idle_timeout(Duration::from_secs(30));
        builder.set_connector_settings(settings.cloned());
        if let Some(components) = components {
            builder.set_sleep_impl(components.sleep_impl());
        }
        let builder = builder.proxy_config(if proxies { ProxyConfig::from_env() } else { ProxyConfig::disabled() });
        match &tls {
            Some(tls) => builder.tls_provider(Provider::Rustls(CryptoMode::AwsLc)).tls_context(tls.clone()).build(),
            None => builder.build_http(),
        }
    })
}
