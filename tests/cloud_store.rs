//! The store for Google's and Azure's clouds over real HTTP: against a server in this process that answers as Google's XML
//! interface is documented. It is our reading of the documentation, not the service: it shows that what we send is well
//! formed and that answers are understood, errors above all.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use pgkeep::store::cloud::{CloudOptions, CloudService, CloudStore};
use pgkeep::store::{Key, ListRequest, Store, StoreError, conformance};

const BUCKET: &str = "archive";
/// Names on a page: fewer than are asked for.
const PAGE: usize = 5;

#[derive(Default)]
struct Google {
    objects: Mutex<BTreeMap<String, Bytes>>,
    /// Every request is answered with this status and code.
    refusal: Mutex<Option<(u16, &'static str)>>,
}

struct Once(Option<Bytes>);

impl Body for Once {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.0.as_ref().map_or(0, Bytes::len) as u64)
    }
}

fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.bytes());
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let digits = [rest.next().unwrap(), rest.next().unwrap()];
                bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap());
            }
            b'+' => bytes.push(b' '),
            byte => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).unwrap()
}

fn answer(status: u16, body: impl Into<Bytes>) -> Response<Once> {
    let body = body.into();
    Response::builder()
        .status(status)
        .header("content-length", body.len()) // of a HEAD's answer too
        .header("etag", "\"1\"")
        .header("x-goog-generation", "1")
        .header("last-modified", "Fri, 20 Nov 2026 03:15:00 GMT")
        .body(Once(Some(body)))
        .unwrap()
}

fn error(status: u16, code: &str) -> Response<Once> {
    answer(status, format!("<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code></Error>"))
}

impl Google {
    async fn serve(&self, request: Request<Incoming>) -> Response<Once> {
        let (parts, mut incoming) = request.into_parts();
        let mut body = BytesMut::new();
        while let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut incoming).poll_frame(context)).await {
            let Ok(frame) = frame else { return error(400, "IncompleteBody") };
            body.extend(frame.into_data().ok());
        }
        if let Some((status, code)) = *self.refusal.lock().unwrap() {
            return error(status, code);
        }
        let path = parts.uri.path().trim_start_matches('/').to_owned();
        let (bucket, key) = path.split_once('/').unwrap_or((&path, ""));
        if bucket != BUCKET {
            return error(404, "NoSuchBucket");
        }
        let query: BTreeMap<String, String> = parts
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(name, value)| (name.to_owned(), decoded(value)))
            .collect();
        let key = decoded(key);
        if key.is_empty() {
            return self.list(&query);
        }
        let mut objects = self.objects.lock().unwrap();
        match parts.method {
            Method::PUT => {
                assert_eq!(parts.headers.get("x-goog-if-generation-match").unwrap(), "0", "every put is a creation");
                if objects.contains_key(&key) {
                    return error(412, "PreconditionFailed");
                }
                objects.insert(key, body.freeze());
                answer(200, "")
            }
            Method::DELETE => match objects.remove(&key) {
                Some(_) => answer(204, ""),
                None => error(404, "NoSuchKey"),
            },
            Method::HEAD | Method::GET => {
                let Some(object) = objects.get(&key).cloned() else {
                    let is_head = parts.method == Method::HEAD;
                    return if is_head { answer(404, "") } else { error(404, "NoSuchKey") };
                };
                let range = parts.headers.get("range").map(|range| range.to_str().unwrap().to_owned());
                let Some(range) = range else { return answer(200, object) };
                let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                let (from, to) = (from.parse::<usize>().unwrap(), to.parse::<usize>().unwrap());
                if from >= object.len() {
                    return error(416, "InvalidRange");
                }
                let to = to.min(object.len() - 1);
                let mut answer = answer(206, object.slice(from..=to));
                let shown = format!("bytes {from}-{to}/{}", object.len());
                answer.headers_mut().insert("content-range", shown.parse().unwrap());
                answer
            }
            other => panic!("{other} is never sent"),
        }
    }

    fn list(&self, query: &BTreeMap<String, String>) -> Response<Once> {
        let get = |name: &str| query.get(name).cloned().unwrap_or_default();
        let (prefix, delimiter) = (get("prefix"), get("delimiter"));
        let after = get("start-after").max(get("continuation-token"));
        let mut names: BTreeMap<String, Option<usize>> = BTreeMap::new();
        for (name, object) in self.objects.lock().unwrap().iter() {
            let Some(rest) = name.strip_prefix(&prefix).filter(|_| *name > after) else { continue };
            match rest.find('/').filter(|_| !delimiter.is_empty()) {
                Some(slash) => names.insert(name[..prefix.len() + slash + 1].to_owned(), None),
                None => names.insert(name.clone(), Some(object.len())),
            };
        }
        // A folder that was shown ends the page behind all that is in it.
        let most = get("max-keys").parse::<usize>().unwrap().min(PAGE);
        let more = names.len() > most;
        let page: Vec<_> = names.into_iter().take(most).collect();
        let mut xml = String::from("<?xml version='1.0' encoding='UTF-8'?><ListBucketResult>");
        for (name, len) in &page {
            match len {
                None => xml.push_str(&format!("<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>")),
                Some(len) => xml.push_str(&format!(
                    "<Contents><Key>{name}</Key><Size>{len}</Size><ETag>\"1\"</ETag>\
                     <LastModified>2026-11-20T03:15:00.123Z</LastModified></Contents>"
                )),
            }
        }
        if let (true, Some((last, _))) = (more, page.last()) {
            let token = if last.ends_with('/') { format!("{last}~~~~~~~~") } else { last.clone() };
            xml.push_str(&format!("<NextContinuationToken>{token}</NextContinuationToken>"));
        }
        xml.push_str("</ListBucketResult>");
        answer(200, xml)
    }
}

async fn start() -> (SocketAddr, Arc<Google>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, google) = (listener.local_addr().unwrap(), Arc::new(Google::default()));
    let served = google.clone();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let google = served.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let google = google.clone();
                    async move { Ok::<_, Infallible>(google.serve(request).await) }
                });
                let _ = http1::Builder::new().serve_connection(TokioIo::new(connection), service).await;
            });
        }
    });
    (address, google)
}

fn open(address: SocketAddr, bucket: &str, prefix: &str) -> CloudStore {
    // What the library takes for an emulator's key: no token is asked for.
    let key = r#"{"private_key":"","private_key_id":"","client_email":"","disable_oauth":true}"#;
    let options = CloudOptions {
        bucket: bucket.into(),
        prefix: prefix.into(),
        endpoint: Some(format!("http://{address}")),
        service: CloudService::Google { credentials: Some(key.into()) },
    };
    CloudStore::open(options).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_promises_of_a_store() -> Result<(), conformance::Broken> {
    let (address, google) = start().await;
    let number = AtomicUsize::new(0);
    conformance::run(async || {
        let prefix = format!("run/{}", number.fetch_add(1, Ordering::Relaxed));
        Ok(Arc::new(open(address, BUCKET, &prefix)) as Arc<dyn Store>)
    })
    .await?;
    assert!(!google.objects.lock().unwrap().is_empty(), "something was spoken to");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_a_cloud_bucket_that_is_not_there_is_no_missing_object() {
    let (address, _google) = start().await;
    let store = open(address, "no-such-bucket", "");
    let key = Key::new("a").unwrap();
    let errors = [
        store.get(&key, None).await.map(drop).unwrap_err(),
        store.get(&key, Some(0..5)).await.map(drop).unwrap_err(),
        store.head(&key).await.map(drop).unwrap_err(),
        store.sync(&key).await.unwrap_err(),
        store.list(&ListRequest::flat("")).await.map(drop).unwrap_err(),
        store.put_new(&key, b"x"[..].into()).await.map(drop).unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, StoreError::Vanished { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_sorted_by_what_the_caller_does_next() {
    let (address, google) = start().await;
    let store = open(address, BUCKET, "p");
    let key = Key::new("a").unwrap();
    for (status, code, transient) in [
        (403, "AccessDenied", false),
        (401, "AuthenticationRequired", false),
        (503, "SlowDown", true),
        (500, "InternalError", true),
    ] {
        *google.refusal.lock().unwrap() = Some((status, code));
        for error in [
            store.get(&key, None).await.map(drop).unwrap_err(),
            store.list(&ListRequest::flat("")).await.map(drop).unwrap_err(),
            store.put_new(&key, b"x"[..].into()).await.map(drop).unwrap_err(),
        ] {
            assert_eq!(error.is_transient(), transient, "{status}: {error}");
            assert_eq!(matches!(error, StoreError::Denied { .. }), !transient, "{status}: {error}");
        }
    }
    *google.refusal.lock().unwrap() = None;
    // Nobody listens there: a fault that may pass.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = listener.local_addr().unwrap();
    drop(listener);
    let error = open(nobody, BUCKET, "").head(&key).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
}
