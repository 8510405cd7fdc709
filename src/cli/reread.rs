//! SIGHUP: the configuration is read again, and what changed is said.

use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::CliError;
use crate::config::{Changes, Config};

/// From here on SIGHUP does not end the process.
pub(super) fn on_hangup() -> Result<Signal, CliError> {
    signal(SignalKind::hangup()).map_err(|error| CliError::failed(error).context("listen for signals"))
}

/// Reads again whenever it is asked to, until it is dropped. What does not hold together changes nothing.
pub(super) async fn reread(mut hangup: Signal, current: &watch::Sender<Arc<Config>>) {
    while hangup.recv().await.is_some() {
        let old = Arc::clone(&current.borrow());
        let file = old.file.display();
        let (next, Changes { taken, need_restart }) = match Config::load(&old.file) {
            Ok(read) => old.reread(&read),
            Err(error) => {
                tracing::error!("{file} was read again and stays as it was before: {error}");
                continue;
            }
        };
        match taken.as_slice() {
            [] => tracing::info!("{file} was read again: nothing to take from it"),
            taken => tracing::info!("{file} was read again, from now on it counts: {}", taken.join("; ")),
        }
        if !need_restart.is_empty() {
            tracing::warn!("{file} was read again, and this needs a restart: {}", need_restart.join("; "));
        }
        current.send_replace(Arc::new(next));
    }
}
