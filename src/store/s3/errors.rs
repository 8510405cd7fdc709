//! What an S3 server's refusal means to us, and what a person can do about it.
//!
//! Sorted by what the caller does next, as [`StoreError`] is. An answer that no S3 server gives (a proxy's page, a body
//! that does not parse) is a fault and never "there is no such object": P7.

use std::error::Error;
use std::time::Duration;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::super::{Op, StoreError};

/// A request that was not answered with success.
#[derive(Debug)]
pub(super) enum Failed {
    /// The server answered, and said no.
    Refused(Refusal),
    /// No answer, or none that can be read.
    Fault(Fault),
    /// We waited so long.
    Late(Duration),
}

/// The words of the server.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// As the protocol names it; empty where the answer had no body.
    pub(super) code: String,
    pub(super) message: String,
}

/// What went wrong before an answer.
#[derive(Debug)]
pub(super) struct Fault {
    /// The causes, outermost first.
    text: String,
    /// A person has to do something.
    hint: Option<&'static str>,
}

impl Failed {
    /// Sorts what the SDK says.
    pub(super) fn from_sdk<E>(error: SdkError<E, HttpResponse>) -> Failed
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        match error {
            SdkError::ServiceError(answer) => {
                let status = answer.raw().status().as_u16();
                let meta = answer.err().meta();
                let (code, message) = (meta.code().unwrap_or_default(), meta.message().unwrap_or_default());
                // "200 OK" and an error in the body: a copy or an upload that broke after the headers were out.
                let status = if status < 300 { 500 } else { status };
                Failed::Refused(Refusal { status, code: code.to_owned(), message: message.to_owned() })
            }
            SdkError::ResponseError(answer) => {
                let status = answer.raw().status().as_u16();
                Failed::fault(format!("the answer ({status}) cannot be read"), &SdkError::<E>::ResponseError(answer))
            }
            other => Failed::fault(String::new(), &other),
        }
    }

    fn fault(begin: String, error: &(dyn Error + 'static)) -> Failed {
        let mut parts = if begin.is_empty() { Vec::new() } else { vec![begin] };
        let mut cause = if parts.is_empty() { Some(error) } else { error.source() };
        while let Some(this) = cause {
            let text = this.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            if parts.last().is_none_or(|last| !last.contains(&text)) {
                parts.push(text);
            }
            cause = this.source();
        }
        let text = parts.join(": ");
        let hint = if text.contains("invalid peer certificate") {
            Some("name the certificate that signed the server's with ca_file")
        } else if text.contains("the credential provider was not enabled") {
            Some(
                "set access_key_file and secret_key_file, or what AWS tools read: AWS_ACCESS_KEY_ID and \
                 AWS_SECRET_ACCESS_KEY, ~/.aws/credentials, a role",
            )
        } else if text.contains("the credentials provider was not properly configured") {
            Some("look at ~/.aws/config, ~/.aws/credentials and the AWS_ variables of the environment")
        } else {
            None
        };
        Failed::Fault(Fault { text, hint })
    }

    /// A body that broke off.
    pub(super) fn broken(text: impl Into<String>) -> Failed {
        Failed::Fault(Fault { text: text.into(), hint: None })
    }

    /// The server's code, if it gave one.
    pub(super) fn code(&self) -> &str {
        match self {
            Failed::Refused(refusal) => &refusal.code,
            Failed::Fault(_) | Failed::Late(_) => "",
        }
    }

    /// The status, 0 without an answer.
    pub(super) fn status(&self) -> u16 {
        match self {
            Failed::Refused(refusal) => refusal.status,
            Failed::Fault(_) | Failed::Late(_) => 0,
        }
    }

    /// The key is taken: the answer to a conditional create.
    pub(super) fn is_taken(&self) -> bool {
        self.status() == 412
    }

    /// "There is no such object", from a server that says so in words.
    pub(super) fn is_no_key(&self) -> bool {
        self.status() == 404 && self.code() == "NoSuchKey"
    }

    /// The server does not know this operation or this header.
    pub(super) fn is_not_implemented(&self) -> bool {
        matches!(self.status(), 405 | 501) || matches!(self.code(), "NotImplemented" | "MethodNotAllowed")
    }

    /// Trying again may help.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Failed::Refused(refusal) => refusal.meaning() == Meaning::Passing,
            Failed::Fault(fault) => fault.hint.is_none(),
            Failed::Late(_) => true,
        }
    }

    /// As an error of `op` on `at`; `store` is what the whole store is called.
    pub(super) fn into_error(self, op: Op, at: &str, store: &str) -> StoreError {
        let at = at.to_owned();
        match self {
            Failed::Late(after) => StoreError::TimedOut { op, at, after },
            Failed::Fault(Fault { text, hint: None }) => StoreError::Unavailable { op, at, source: text.into() },
            Failed::Fault(Fault { text, hint: Some(hint) }) => {
                StoreError::Denied { op, at, source: text.into(), hint: hint.into() }
            }
            Failed::Refused(refusal) => {
                let source = refusal.to_string().into();
                match refusal.meaning() {
                    Meaning::Passing => StoreError::Unavailable { op, at, source },
                    Meaning::NoBucket => {
                        let reason = "the server knows no such bucket (NoSuchBucket)".into();
                        StoreError::Vanished { store: store.to_owned(), reason }
                    }
                    Meaning::Full => StoreError::Full { op, at, source },
                    Meaning::Unknown => {
                        StoreError::Unsupported { op, at, reason: format!("the server cannot do this: {refusal}") }
                    }
                    Meaning::Denied(hint) => StoreError::Denied { op, at, source, hint: hint.into() },
                }
            }
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.status)?;
        if !self.code.is_empty() {
            write!(f, " {}", self.code)?;
        }
        match self.message.as_str() {
            "" => Ok(()),
            // A server may send a page; a person reads a sentence.
            message => write!(f, ": {}", message.chars().take(300).collect::<String>()),
        }
    }
}

/// What a refusal comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    Passing,
    NoBucket,
    Full,
    Unknown,
    /// Somebody has to do something: what.
    Denied(&'static str),
}

impl Refusal {
    fn meaning(&self) -> Meaning {
        match self.code.as_str() {
            "NoSuchBucket" => return Meaning::NoBucket,
            "QuotaExceeded" | "InsufficientCapacity" | "InsufficientStorage" | "XMinioStorageFull" => {
                return Meaning::Full;
            }
            "RequestTimeTooSkewed" | "RequestInTheFuture" => {
                return Meaning::Denied("set the clock of this machine, or of the server: they are minutes apart");
            }
            "InvalidAccessKeyId" | "NotSignedUp" => {
                return Meaning::Denied(
                    "the server does not know this access key; look at access_key_file or the AWS credentials in use",
                );
            }
            "SignatureDoesNotMatch" => {
                return Meaning::Denied(
                    "the secret does not belong to the access key (look at secret_key_file), or a proxy changes requests on the way",
                );
            }
            "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "InvalidToken" => {
                return Meaning::Denied("the temporary credentials have expired or are damaged; get new ones");
            }
            "AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException" => {
                return Meaning::Denied("the bucket is in another region; set region in this repository's section");
            }
            "InvalidStorageClass" => {
                return Meaning::Denied(
                    "the server does not know this storage_class; leave it away, or use one of the server's",
                );
            }
            "InvalidObjectState" => {
                return Meaning::Denied(
                    "the object lies in an archive tier; restore it there first, and use a storage_class that can be read at once",
                );
            }
            "ObjectLockConfigurationNotFoundError" | "InvalidRetentionPeriod" => {
                return Meaning::Denied(
                    "the bucket was made without object lock; leave object_lock away, or make one with it",
                );
            }
            "InvalidBucketName" => return Meaning::Denied("look at the name of the bucket in url"),
            // What arrived was not what we sent: the network's doing.
            "BadDigest"
            | "InvalidDigest"
            | "XAmzContentChecksumMismatch"
            | "XAmzContentSHA256Mismatch"
            | "IncompleteBody"
            | "RequestTimeout"
            | "NoSuchUpload"
            | "InvalidPart"
            | "OperationAborted"
            | "ConditionalRequestConflict"
            | "SlowDown"
            | "SlowDownRead"
            | "SlowDownWrite"
            | "ServiceUnavailable"
            | "Throttling"
            | "ThrottlingException"
            | "RequestLimitExceeded"
            | "TooManyRequests"
            | "InternalError" => {
                return Meaning::Passing;
            }
            "NotImplemented" | "MethodNotAllowed" => return Meaning::Unknown,
            code if code.starts_with("KMS.") => {
                return Meaning::Denied("look at kms_key: the server cannot use that key");
            }
            _ => {}
        }
        match self.status {
            507 => Meaning::Full,
            501 | 405 => Meaning::Unknown,
            301 | 302 | 307 | 308 => Meaning::Denied("the bucket is elsewhere; look at region and endpoint"),
            401 | 403 => Meaning::Denied(
                "these credentials may not do this; they need s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket, \
                 s3:AbortMultipartUpload and s3:ListBucketMultipartUploads here, and s3:PutObjectRetention for object_lock",
            ),
            408 | 409 | 425 | 429 => Meaning::Passing,
            // Not NoSuchKey: whoever asks for an object has looked for that. Something between us and the server.
            404 => Meaning::Passing,
            status if status >= 500 => Meaning::Passing,
            _ if self.message.to_ascii_lowercase().contains("missing object lock") => {
                Meaning::Denied("the bucket was made without object lock; leave object_lock away, or make one with it")
            }
            _ => Meaning::Denied("the server does not take such a request; `pgkeep check` tells what it can do"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(status: u16, code: &str) -> StoreError {
        let refusal = Refusal { status, code: code.into(), message: "words".into() };
        Failed::Refused(refusal).into_error(Op::Put, "s3://b/k", "s3://b")
    }

    #[test]
    fn what_passes_is_tried_again_and_what_does_not_says_what_to_do() {
        for (status, code) in [
            (500, "InternalError"),
            (503, "SlowDown"),
            (502, ""),
            (429, ""),
            (409, "ConditionalRequestConflict"),
            (400, "BadDigest"),
            (400, "RequestTimeout"),
            (404, "NoSuchUpload"),
            (404, ""),
        ] {
            assert!(error(status, code).is_transient(), "{status} {code}");
        }
        for (status, code, word) in [
            (403, "SignatureDoesNotMatch", "secret_key_file"),
            (403, "InvalidAccessKeyId", "access_key_file"),
            (403, "RequestTimeTooSkewed", "clock"),
            (403, "AccessDenied", "s3:PutObject"),
            (400, "ExpiredToken", "expired"),
            (400, "AuthorizationHeaderMalformed", "region"),
            (301, "PermanentRedirect", "region"),
            (400, "InvalidStorageClass", "storage_class"),
            (400, "KMS.NotFoundException", "kms_key"),
            (400, "InvalidArgument", "pgkeep check"),
        ] {
            let error = error(status, code);
            assert!(matches!(&error, StoreError::Denied { hint, .. } if hint.contains(word)), "{error}");
            assert!(!error.is_retryable());
        }
        assert!(matches!(error(404, "NoSuchBucket"), StoreError::Vanished { store, .. } if store == "s3://b"));
        assert!(matches!(error(507, ""), StoreError::Full { .. }));
        assert!(matches!(error(403, "QuotaExceeded"), StoreError::Full { .. }));
        assert!(matches!(error(501, "NotImplemented"), StoreError::Unsupported { .. }));
        // A page of a proxy is no answer about an object.
        assert!(!Failed::Refused(Refusal { status: 404, code: String::new(), message: String::new() }).is_no_key());
    }
}
