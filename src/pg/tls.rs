//! TLS as `sslmode` means it, and what channel binding needs of the server's certificate.
//!
//! Where libpq (OpenSSL) and rustls judge a certificate differently, libpq's judgement counts: self-signed certificates
//! that are their own authority (`openssl req -x509`), certificates of version 1 (`openssl x509 -req`), and names that
//! stand in the common name because there is no alternative name. Every handshake's signature is checked in every mode.

use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{
    CryptoProvider, verify_tls12_signature, verify_tls13_signature, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::Digest as _;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

use super::conninfo::{RootCert, SslMode, TlsSettings};
use super::error::PgError;

pub(super) type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;

/// Wraps a TCP connection on which the server has agreed to TLS. `name`: the host as in the conninfo.
pub(super) async fn handshake(
    tcp: TcpStream,
    settings: &TlsSettings,
    name: &str,
    server: &str,
) -> Result<TlsStream, PgError> {
    let failed = |reason: String| PgError::Tls { server: server.to_owned(), reason };
    let config = client_config(settings, name).map_err(failed)?;
    // A name that is none (underscores, for one) is no reason to stop: our verifier looks at the conninfo's own text.
    let peer = || tcp.peer_addr().map(|address| ServerName::from(address.ip()));
    let server_name = match ServerName::try_from(name.to_owned()) {
        Ok(server_name) => server_name,
        Err(_) => peer().map_err(|error| failed(error.to_string()))?,
    };
    let stream = TlsConnector::from(Arc::new(config)).connect(server_name, tcp).await;
    stream.map_err(|error| failed(explain(&error)))
}

fn explain(error: &std::io::Error) -> String {
    let text = error.to_string();
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer)) => {
            "the server's certificate is not signed by any certificate in sslrootcert".to_owned()
        }
        Some(rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other))) => other.to_string(),
        Some(rustls::Error::InvalidCertificate(
            rustls::CertificateError::Expired | rustls::CertificateError::ExpiredContext { .. },
        )) => "the server's certificate has expired".to_owned(),
        _ => text,
    }
}

fn client_config(settings: &TlsSettings, name: &str) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions: &[_] = match settings.versions {
        (13, _) => &[&rustls::version::TLS13],
        (_, 12) => &[&rustls::version::TLS12],
        _ => &[&rustls::version::TLS13, &rustls::version::TLS12],
    };
    let verifier = Verifier {
        trust: trust(settings)?,
        name: name.to_owned(),
        full: settings.mode == SslMode::VerifyFull,
        provider: provider.clone(),
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(|error| error.to_string())?
        .dangerous() // the verifier is ours; see the module's head
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match client_certificate(settings)? {
        Some((chain, key)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| format!("sslcert and sslkey do not go together: {error}"))?,
        None => builder.with_no_client_auth(),
    };
    config.enable_sni = settings.sni;
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(config)
}

/// Our certificate and key, if both named files exist or have to.
#[allow(clippy::type_complexity, reason = "it is what rustls takes")]
fn client_certificate(
    settings: &TlsSettings,
) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>, String> {
    let Some((cert, key, needed)) = &settings.cert else { return Ok(None) };
    if !needed && !cert.exists() {
        return Ok(None);
    }
    let chain = read_certificates(cert, "sslcert")?;
    let metadata = std::fs::metadata(key).map_err(|error| format!("sslkey {}: {error}", key.display()))?;
    // As in libpq: nobody else may read it, but for a key of root's that a group may read.
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.permissions().mode() & forbidden != 0 {
        return Err(format!("sslkey {} can be read by others; chmod 0600 (0640 if root owns it)", key.display()));
    }
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| format!("sslkey {}: {error}; an unencrypted key in PEM is needed", key.display()))?;
    Ok(Some((chain, key)))
}

fn read_certificates(path: &Path, what: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let failed = |error: rustls::pki_types::pem::Error| format!("{what} {}: {error}", path.display());
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(failed)?.collect();
    let all = all.map_err(failed)?;
    if all.is_empty() {
        return Err(format!("{what} {} holds no certificate in PEM", path.display()));
    }
    Ok(all)
}

/// Whom to believe.
#[derive(Debug)]
enum Trust {
    /// sslmode=require and below without a root certificate: encryption only.
    Anybody,
    Roots {
        store: RootCertStore,
        certificates: Vec<CertificateDer<'static>>,
    },
}

/// libpq checks certificates whenever there is a file of roots, whatever `sslmode` says, and insists on the file from
/// verify-ca up.
fn trust(settings: &TlsSettings) -> Result<Trust, String> {
    let certificates = match &settings.root {
        RootCert::System => {
            let found = rustls_native_certs::load_native_certs();
            if found.certs.is_empty() {
                return Err("sslrootcert=system, but the system has no trusted certificates".to_owned());
            }
            found.certs
        }
        RootCert::File(path) if path.exists() => read_certificates(path, "sslrootcert")?,
        RootCert::File(_) | RootCert::Nowhere if settings.mode < SslMode::VerifyCa => return Ok(Trust::Anybody),
        RootCert::File(path) => {
            return Err(format!(
                "the root certificate file {} does not exist; provide it, use sslrootcert=system, or choose sslmode=require, which does not check who answers",
                path.display()
            ));
        }
        RootCert::Nowhere => return Err("no home directory to look for root.crt in; set sslrootcert".to_owned()),
    };
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(certificates.iter().cloned()); // the others are still compared as they are
    Ok(Trust::Roots { store, certificates })
}

/// Judges the server's certificate as libpq would.
#[derive(Debug)]
struct Verifier {
    trust: Trust,
    /// The host as in the conninfo.
    name: String,
    full: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn check_chain(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let Trust::Roots { store, certificates } = &self.trust else { return Ok(()) };
        let strict = ParsedCertificate::try_from(certificate).and_then(|parsed| {
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&parsed, store, intermediates, now, algorithms)
        });
        match strict {
            // The two that OpenSSL takes and webpki does not: a server certificate that may sign others, and version 1.
            Err(rustls::Error::InvalidCertificate(rustls::CertificateError::Other(_))) => {
                signed_directly(certificate, certificates, now).map_err(other)
            }
            result => result,
        }
    }
}

/// Whether one of `roots` is this certificate or signed it, and it is valid now.
fn signed_directly(
    certificate: &CertificateDer<'_>,
    roots: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), String> {
    let parsed = parse(certificate)?;
    let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let valid = |parsed: &X509Certificate<'_>| {
        let validity = parsed.validity();
        (validity.not_before.timestamp()..=validity.not_after.timestamp()).contains(&seconds)
    };
    if !valid(&parsed) {
        return Err("the server's certificate has expired or is not valid yet".to_owned());
    }
    let trusted = roots.iter().any(|root| {
        root == certificate
            || parse(root).is_ok_and(|root| {
                valid(&root)
                    && root.subject().as_raw() == parsed.issuer().as_raw()
                    && (root.is_ca() || root.version() == x509_parser::x509::X509Version::V1)
                    && parsed.verify_signature(Some(root.public_key())).is_ok()
            })
    });
    trusted.then_some(()).ok_or_else(|| {
        "the server's certificate is not in sslrootcert, nor directly signed by a certificate there".to_owned()
    })
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    let parsed = X509Certificate::from_der(certificate.as_ref());
    parsed.map(|(_, parsed)| parsed).map_err(|error| format!("the server's certificate cannot be read: {error}"))
}

/// Whether the certificate is for `host`: by its alternative names, and by its common name only where it has none.
fn check_name(certificate: &CertificateDer<'_>, host: &str) -> Result<(), String> {
    let parsed = parse(certificate)?;
    let address = host.parse::<IpAddr>().ok();
    let mut names = Vec::new();
    let alternatives = parsed.subject_alternative_name().ok().flatten();
    for name in alternatives.iter().flat_map(|extension| &extension.value.general_names) {
        match name {
            GeneralName::DNSName(name) => names.push((*name).to_owned()),
            GeneralName::IPAddress(bytes) => {
                let bytes: &[u8] = bytes;
                let ip = <[u8; 4]>::try_from(bytes).map(IpAddr::from).or(<[u8; 16]>::try_from(bytes).map(IpAddr::from));
                names.extend(ip.map(|ip| ip.to_string()));
            }
            _ => {}
        }
    }
    if names.is_empty() {
        names.extend(parsed.subject().iter_common_name().filter_map(|name| name.as_str().ok()).map(str::to_owned));
    }
    let fits = |name: &String| match (address, name.parse::<IpAddr>().ok()) {
        (Some(wanted), Some(given)) => wanted == given,
        (None, None) => name_fits(name, host),
        _ => false,
    };
    if names.iter().any(fits) {
        return Ok(());
    }
    let names = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
    Err(format!("the server's certificate is for {names}, not for {host}"))
}

/// A wildcard stands for one whole first label, and never for all of a name.
fn name_fits(pattern: &str, host: &str) -> bool {
    if pattern.eq_ignore_ascii_case(host) {
        return true;
    }
    let Some(suffix) = pattern.strip_prefix("*.").filter(|suffix| suffix.contains('.')) else { return false };
    host.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest.eq_ignore_ascii_case(suffix))
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

fn other(reason: String) -> rustls::Error {
    rustls::Error::InvalidCertificate(rustls::CertificateError::Other(rustls::OtherError(Arc::new(Refused(reason)))))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check_chain(end_entity, intermediates, now)?;
        if self.full {
            check_name(end_entity, &self.name).map_err(other)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        // A certificate of version 1 is not even parsed there; its key is all that this needs.
        if ParsedCertificate::try_from(cert).is_ok() {
            return verify_tls13_signature(message, cert, dss, algorithms);
        }
        let parsed = parse(cert).map_err(other)?;
        let key = SubjectPublicKeyInfoDer::from(parsed.public_key().raw);
        verify_tls13_signature_with_raw_key(message, &key, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The `tls-server-end-point` of RFC 5929: the hash of the server's certificate by its signature's hash function, SHA-256
/// for MD5 and SHA-1. `None` where the RFC defines none (Ed25519), as in libpq.
pub(super) fn end_point(stream: &TlsStream) -> Option<Vec<u8>> {
    let (_, session) = stream.get_ref();
    end_point_of(session.peer_certificates()?.first()?)
}

fn end_point_of(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let parsed = parse(certificate).ok()?;
    let algorithm = &parsed.signature_algorithm;
    let oid = algorithm.algorithm.to_id_string();
    let hash = match oid.as_str() {
        // RSASSA-PSS names its hash in its parameters; SHA-1 if it names none.
        "1.2.840.113549.1.1.10" => {
            let parameters = algorithm.parameters.as_ref()?;
            let parsed = x509_parser::signature_algorithm::RsaSsaPssParams::try_from(parameters).ok()?;
            parsed.hash_algorithm_oid().to_id_string()
        }
        _ => oid,
    };
    let bytes: &[u8] = certificate.as_ref();
    match hash.as_str() {
        // MD5 and SHA-1 with RSA, SHA-1 with DSA and ECDSA, SHA-1; SHA-256 with RSA, ECDSA, DSA, SHA-256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.10040.4.3"
        | "1.2.840.10045.4.1"
        | "1.3.14.3.2.26"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.3.2"
        | "2.16.840.1.101.3.4.3.2"
        | "2.16.840.1.101.3.4.2.1" => Some(sha2::Sha256::digest(bytes).to_vec()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" | "2.16.840.1.101.3.4.2.2" => {
            Some(sha2::Sha384::digest(bytes).to_vec())
        }
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" | "2.16.840.1.101.3.4.2.3" => {
            Some(sha2::Sha512::digest(bytes).to_vec())
        }
        "1.2.840.113549.1.1.14" | "1.2.840.10045.4.3.1" | "2.16.840.1.101.3.4.2.4" => {
            Some(sha2::Sha224::digest(bytes).to_vec())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519,
    };

    use super::*;

    fn params(names: &[&str], common_name: &str, authority: bool) -> CertificateParams {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        if authority {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        params
    }

    fn verifier(root: &CertificateDer<'static>) -> Verifier {
        let mut store = RootCertStore::empty();
        store.add(root.clone()).unwrap();
        Verifier {
            trust: Trust::Roots { store, certificates: vec![root.clone()] },
            name: "db".to_owned(),
            full: false,
            provider: Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
        }
    }

    #[test]
    fn chains_as_openssl_judges_them() {
        let (root_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let root_params = params(&[], "root", true);
        let root = root_params.self_signed(&root_key).unwrap();
        let issuer = Issuer::from_params(&root_params, &root_key);
        let leaf = params(&["db"], "db", false).signed_by(&key, &issuer).unwrap();
        let may_sign = params(&["db"], "db", true).signed_by(&key, &issuer).unwrap();
        let own = params(&["db"], "db", true).self_signed(&key).unwrap();
        // Claims the root as its issuer, signed by another key.
        let forged_issuer = Issuer::from_params(&root_params, &key);
        let forged = params(&["db"], "db", true).signed_by(&key, &forged_issuer).unwrap();
        let mut old = params(&["db"], "db", true);
        old.not_after = rcgen::date_time_ymd(2001, 1, 1);
        let old = old.self_signed(&key).unwrap();
        for (name, root, certificate, good) in [
            ("signed by the root", &root, &leaf, true),
            ("signed by the root, may sign itself", &root, &may_sign, true),
            ("its own authority, which is the root", &own, &own, true),
            ("its own authority, unknown", &root, &own, false),
            ("forged", &root, &forged, false),
            ("expired", &old, &old, false),
        ] {
            let checked = verifier(root.der()).check_chain(certificate.der(), &[], UnixTime::now());
            assert_eq!(checked.is_ok(), good, "{name}: {checked:?}");
        }
    }

    #[test]
    fn names_as_libpq_compares_them() {
        let key = KeyPair::generate().unwrap();
        for (names, common_name, host, fits) in [
            (&["db.example"][..], "x", "db.example", true),
            (&["db.example"], "x", "DB.Example", true),
            (&["db.example"], "other", "other", false), // the common name counts only where there is no other
            (&[], "db.example", "db.example", true),
            (&[], "db.example", "example", false),
            (&["*.example.org"], "x", "db.example.org", true),
            (&["*.example.org"], "x", "a.db.example.org", false),
            (&["*.example.org"], "x", "example.org", false),
            (&["*.org"], "x", "example.org", false),
            (&["127.0.0.1", "::1"], "x", "127.0.0.1", true),
            (&["127.0.0.1", "::1"], "x", "0:0:0:0:0:0:0:1", true),
            (&["127.0.0.1"], "x", "127.0.0.2", false),
            (&[], "127.0.0.1", "127.0.0.1", true),
        ] {
            let certificate = params(names, common_name, false).self_signed(&key).unwrap();
            assert_eq!(check_name(certificate.der(), host).is_ok(), fits, "{names:?} {common_name} {host}");
        }
    }

    #[test]
    fn channel_binding_hashes_as_the_signature_does() {
        let length = |algorithm| {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let certificate = params(&["db"], "db", false).self_signed(&key).unwrap();
            end_point_of(certificate.der()).map(|hash| hash.len())
        };
        assert_eq!(length(&rcgen::PKCS_ECDSA_P256_SHA256), Some(32));
        assert_eq!(length(&PKCS_ECDSA_P384_SHA384), Some(48));
        assert_eq!(length(&PKCS_ED25519), None);
    }
}
