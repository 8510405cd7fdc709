use std::io::Write;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{CliError, Exit};

/// A token that SIGTERM or SIGINT fires: finish what must be finished, then return. A second signal ends the process at
/// once, which is as safe as kill -9 is. Commands that do not ask for this keep the system's way: the first signal ends
/// them. Needs the runtime.
pub fn stop_on_signal() -> Result<CancellationToken, CliError> {
    let listen = |kind| signal(kind).map_err(|error| CliError::failed(error).context("listen for signals"));
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let token = CancellationToken::new();
    let stop = token.clone();
    // Lives as long as the runtime: it has nothing to clean up and no end of its own to wait for.
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if stop.is_cancelled() {
                let _ = writeln!(std::io::stderr(), "error: stopped by a second signal"); // nobody may be reading
                std::process::exit(i32::from(Exit::Failed.code()));
            }
            tracing::info!("stopping; a second signal stops at once");
            stop.cancel();
        }
    });
    Ok(token)
}
