//! `listen`: `/metrics`, `/livez`, `/readyz`, `/status.json`. Reading alone: nothing can be changed here.
//!
//! A task of its own: what it costs, it costs who asks. Bounds: [`CONNECTIONS`] at a time (more wait to be accepted), one
//! request on each, headers within [`HEADERS`], everything within [`DEADLINE`]; bodies are not read. An address that cannot be
//! had is said and tried again: archiving does not depend on it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::health::{Watched, metrics};

/// At the same time.
const CONNECTIONS: usize = 16;
/// For the headers of a request.
const HEADERS: Duration = Duration::from_secs(5);
/// For a connection, from its beginning to its end.
const DEADLINE: Duration = Duration::from_secs(20);
/// After an address could not be had.
const AGAIN: Duration = Duration::from_secs(10);

/// Serves at the address that `listen` says, until nobody says any more.
pub async fn serve(mut listen: watch::Receiver<Option<SocketAddr>>, watched: Watched) {
    loop {
        let address = *listen.borrow_and_update();
        let changed = match address {
            None => listen.changed().await,
            Some(address) => tokio::select! {
                changed = listen.changed() => changed,
                () = at(address, &watched) => Ok(()),
            },
        };
        if changed.is_err() {
            return;
        }
    }
}

/// Returns when another try may help.
async fn at(address: SocketAddr, watched: &Watched) {
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => {
            let pause = AGAIN.as_secs();
            tracing::error!("cannot listen at {address}, no metrics are served, another try in {pause} s: {error}");
            tokio::time::sleep(AGAIN).await;
            return;
        }
    };
    let shown = listener.local_addr().unwrap_or(address);
    tracing::info!("metrics and health at http://{shown}/metrics, /livez, /readyz, /status.json");
    let (room, mut connections) = (Arc::new(Semaphore::new(CONNECTIONS)), JoinSet::new());
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return }; // invariant: it is never closed
        while connections.try_join_next().is_some() {} // those that ended
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, most likely: they come back.
                tracing::debug!("no connection accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let watched = watched.clone();
        connections.spawn(async move {
            let _ = tokio::time::timeout(DEADLINE, connection(stream, watched)).await;
            drop(permit);
        });
    }
}

async fn connection(stream: TcpStream, watched: Watched) {
    let answering = service_fn(move |request: Request<Incoming>| {
        let response = answer(request.method(), request.uri().path(), &watched);
        async move { Ok::<_, Infallible>(response) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .keep_alive(false)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), answering);
    if let Err(error) = served.await {
        tracing::debug!("a connection for metrics ended: {error}");
    }
}

fn answer(method: &Method, path: &str, watched: &Watched) -> Response<String> {
    const TEXT: &str = "text/plain; charset=utf-8";
    if !matches!(*method, Method::GET | Method::HEAD) {
        return response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET\n".to_owned());
    }
    let picture = || watched.picture(Timestamp::now());
    match path {
        "/metrics" => response(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics(&picture())),
        "/livez" => response(StatusCode::OK, TEXT, "alive\n".to_owned()),
        "/readyz" if watched.is_ready() => response(StatusCode::OK, TEXT, "ready\n".to_owned()),
        "/readyz" => {
            let waits = picture().clusters.into_iter().filter(|cluster| cluster.stream.is_none());
            let lines: Vec<String> = waits.map(|of| format!("{} is {}\n", of.cluster, of.state)).collect();
            response(StatusCode::SERVICE_UNAVAILABLE, TEXT, lines.concat())
        }
        "/status.json" => match serde_json::to_string(&picture()) {
            Ok(json) => response(StatusCode::OK, "application/json", json + "\n"),
            Err(error) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n")),
        },
        _ => response(StatusCode::NOT_FOUND, TEXT, "there are /metrics, /livez, /readyz and /status.json\n".to_owned()),
    }
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
