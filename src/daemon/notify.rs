//! What the service manager is told, by sd_notify(3)'s protocol: a datagram to the socket that `$NOTIFY_SOCKET` names.
//!
//! Without that variable nothing is done. A manager that does not listen holds nobody up: the socket does not block.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The way to the service manager.
#[derive(Debug)]
pub struct Manager {
    to: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Manager {
    /// As the environment says; without it, a way to nobody.
    pub fn from_environment() -> Manager {
        let to = std::env::var_os("NOTIFY_SOCKET").and_then(|name| {
            let address = match name.as_bytes() {
                [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
                _ => SocketAddr::from_pathname(&name),
            };
            let socket = UnixDatagram::unbound().ok()?;
            socket.set_nonblocking(true).ok()?;
            Some((socket, address.ok()?))
        });
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|micros| is_ours && *micros > 0).map(Duration::from_micros);
        Manager { to, watchdog }
    }

    /// `READY=1`, `STOPPING=1`, `STATUS=…`: one assignment a line.
    pub fn tell(&self, state: &str) {
        if let Some((socket, address)) = &self.to
            && let Err(error) = socket.send_to_addr(state.as_bytes(), address)
        {
            tracing::debug!("the service manager was not told {state:?}: {error}");
        }
    }

    /// Says that we are alive, as often as the manager wants to hear it. Ends at once where it does not.
    pub async fn keep_alive(&self) {
        let Some(watchdog) = self.watchdog else { return };
        loop {
            self.tell("WATCHDOG=1");
            tokio::time::sleep(watchdog / 3).await;
        }
    }
}
