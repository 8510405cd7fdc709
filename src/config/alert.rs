//! `[daemon]` and `[alert.NAME]`: what `pgkeep run` shows, whom it tells, and from when on.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::Time;
use jiff::tz::TimeZone;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use toml::Spanned;

use super::check::Checker;
use crate::types::ClusterName;

/// What a span of the daemon may be.
const SPAN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30 * 86_400));
const MINUTE: Duration = Duration::from_secs(60);

/// `[daemon]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonConfig {
    /// Where metrics and health are served; `None`: nowhere.
    pub listen: Option<SocketAddr>,
    /// WAL that waits longer is an alert.
    pub behind: Duration,
    /// More bytes of WAL that wait are an alert.
    pub behind_bytes: u64,
    /// How often what lies in the repositories is looked at.
    pub refresh: Duration,
}

impl Default for DaemonConfig {
    fn default() -> DaemonConfig {
        DaemonConfig {
            listen: None,
            behind: Duration::from_secs(300),
            behind_bytes: 1_000_000_000,
            refresh: Duration::from_secs(600),
        }
    }
}

/// `[alert.NAME]`: a channel.
#[derive(Debug, Clone, PartialEq)]
pub struct AlertConfig {
    /// Its name in the file.
    pub name: String,
    /// The way.
    pub way: AlertWay,
    /// Nothing is told in these hours; what is still so afterwards is told then.
    pub quiet: Option<QuietTimes>,
    /// What is still so is told again after this; `None`: once.
    pub repeat: Option<Duration>,
}

/// How a channel is reached.
#[derive(Debug, Clone, PartialEq)]
pub enum AlertWay {
    /// A POST.
    Webhook {
        /// Where to.
        url: AlertUrl,
        /// What it holds.
        format: WebhookFormat,
    },
    /// A program and its arguments; it gets JSON on standard input.
    Command(Vec<String>),
    /// A GET while all is well.
    Heartbeat {
        /// Where to.
        url: AlertUrl,
        /// How often.
        every: Duration,
    },
}

/// What a webhook reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WebhookFormat {
    /// pgkeep's own document.
    Json,
    /// What Slack and Mattermost read.
    Slack,
}

/// A URL whose path may hold a secret: shown is its scheme, host and port alone.
#[derive(Clone)]
pub struct AlertUrl(SecretString);

impl AlertUrl {
    /// `None` unless it is http or https and names a host.
    pub fn new(text: &str) -> Option<AlertUrl> {
        let url = AlertUrl(SecretString::from(text.to_owned()));
        let plain = text.bytes().all(|b| b.is_ascii_graphic());
        (plain && !url.host().is_empty()).then_some(url)
    }

    /// All of it.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    /// Is it https?
    pub fn is_tls(&self) -> bool {
        self.expose().starts_with("https://")
    }

    /// Host and port as written, without a user.
    pub fn host(&self) -> &str {
        let rest = self.expose().strip_prefix("https://").or_else(|| self.expose().strip_prefix("http://"));
        let authority = rest.and_then(|rest| rest.split(['/', '?', '#']).next()).unwrap_or_default();
        authority.rsplit('@').next().unwrap_or_default()
    }
}

impl PartialEq for AlertUrl {
    fn eq(&self, other: &AlertUrl) -> bool {
        self.expose() == other.expose()
    }
}

impl fmt::Display for AlertUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}/…", if self.is_tls() { "https" } else { "http" }, self.host())
    }
}

impl fmt::Debug for AlertUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Hours of each day, in a zone; they may go over midnight.
#[derive(Debug, Clone, PartialEq)]
pub struct QuietTimes {
    from: Time,
    to: Time,
    zone: TimeZone,
}

impl QuietTimes {
    /// `22:00-06:30`.
    pub fn new(text: &str, zone: TimeZone) -> Option<QuietTimes> {
        let time = |text: &str| -> Option<Time> { Time::strptime("%H:%M", text.trim()).ok() };
        let (from, to) = text.split_once('-')?;
        let (from, to) = (time(from)?, time(to)?);
        (from != to).then_some(QuietTimes { from, to, zone })
    }

    /// Does this moment lie in them?
    pub fn hold(&self, at: Timestamp) -> bool {
        let time = at.to_zoned(self.zone.clone()).time();
        match self.from < self.to {
            true => self.from <= time && time < self.to,
            false => self.from <= time || time < self.to,
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenDaemon {
    pub listen: Option<Spanned<String>>,
    pub behind: Option<Spanned<String>>,
    pub behind_bytes: Option<Spanned<String>>,
    pub refresh: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenAlert {
    pub webhook: Option<Spanned<String>>,
    pub format: Option<Spanned<String>>,
    pub command: Option<Spanned<Vec<String>>>,
    pub heartbeat: Option<Spanned<String>>,
    pub every: Option<Spanned<String>>,
    pub quiet: Option<Spanned<String>>,
    pub quiet_time_zone: Option<Spanned<String>>,
    pub repeat: Option<Spanned<String>>,
}

impl Checker<'_> {
    pub(super) fn daemon(&mut self, written: WrittenDaemon) -> Option<DaemonConfig> {
        let default = DaemonConfig::default();
        let listen = match written.listen {
            None => Some(None),
            Some(text) => match text.get_ref().parse::<SocketAddr>() {
                Ok(address) => Some(Some(address)),
                Err(_) => {
                    let what =
                        format!("listen = {:?} is not an address and port such as \"127.0.0.1:9187\"", text.get_ref());
                    self.at(&text, what);
                    None
                }
            },
        };
        let mut span = |setting, written: Option<Spanned<String>>, default| match written {
            None => Some(default),
            Some(written) => self.span(setting, &written, SPAN),
        };
        let (behind, refresh) =
            (span("behind", written.behind, default.behind), span("refresh", written.refresh, default.refresh));
        let behind_bytes = match written.behind_bytes {
            None => Some(default.behind_bytes),
            Some(text) => match bytes(text.get_ref()) {
                Some(bytes) => Some(bytes),
                None => {
                    let what =
                        format!("behind_bytes = {:?} is not a size such as \"500MB\" or \"2GB\"", text.get_ref());
                    self.at(&text, what);
                    None
                }
            },
        };
        Some(DaemonConfig { listen: listen?, behind: behind?, behind_bytes: behind_bytes?, refresh: refresh? })
    }

    pub(super) fn alert(&mut self, name: &Spanned<String>, written: WrittenAlert) -> Option<AlertConfig> {
        let label = format!("[alert.{}]", name.get_ref());
        if name.get_ref().parse::<ClusterName>().is_err() {
            let what = format!("{:?} is no name for a channel: a-z, 0-9, _ and -, at most 63", name.get_ref());
            self.at(name, what);
        }
        let WrittenAlert { webhook, format, command, heartbeat, every, quiet, quiet_time_zone, repeat } = written;
        let format = match &format {
            None => Some(WebhookFormat::Json),
            Some(text) => match text.get_ref().as_str() {
                _ if webhook.is_none() => {
                    self.at(text, format!("format in {label} goes with webhook, which is not there"));
                    None
                }
                "json" => Some(WebhookFormat::Json),
                "slack" => Some(WebhookFormat::Slack),
                other => {
                    self.at(text, format!("format = {other:?} in {label} is neither \"json\" nor \"slack\""));
                    None
                }
            },
        };
        if let (Some(every), None) = (&every, &heartbeat) {
            self.at(every, format!("every in {label} goes with heartbeat, which is not there"));
        }
        let way = match (webhook, command, heartbeat) {
            (Some(url), None, None) => {
                self.url(&label, "webhook", &url).zip(format).map(|(url, format)| AlertWay::Webhook { url, format })
            }
            (None, Some(command), None) => match command.get_ref().first() {
                Some(program) if !program.is_empty() => Some(AlertWay::Command(command.into_inner())),
                _ => {
                    self.at(
                        &command,
                        format!("command in {label} is empty: write [\"/path/to/program\", \"argument\"]"),
                    );
                    None
                }
            },
            (None, None, Some(url)) => {
                let every = match &every {
                    None => Some(MINUTE),
                    Some(every) => self.span("every", every, SPAN),
                };
                for (setting, written) in [("quiet", &quiet), ("repeat", &repeat)] {
                    if let Some(written) = written {
                        self.at(written, format!("{setting} in {label} has no meaning for a heartbeat"));
                    }
                }
                self.url(&label, "heartbeat", &url).zip(every).map(|(url, every)| AlertWay::Heartbeat { url, every })
            }
            _ => {
                self.at(name, format!("{label} needs one of webhook, command, heartbeat, and one alone"));
                None
            }
        };
        let zone = match &quiet_time_zone {
            Some(zone) if quiet.is_none() => {
                self.at(zone, format!("quiet_time_zone in {label} goes with quiet, which is not there"));
                None
            }
            Some(zone) => self.zone("quiet_time_zone", zone),
            None => Some(TimeZone::UTC),
        };
        let quiet = match quiet {
            None => Some(None),
            Some(text) => match QuietTimes::new(text.get_ref(), zone.clone()?) {
                Some(times) => Some(Some(times)),
                None => {
                    let what = format!("quiet = {:?} in {label} is not hours such as \"22:00-06:00\"", text.get_ref());
                    self.at(&text, what);
                    None
                }
            },
        };
        let repeat = match repeat {
            None => Some(None),
            Some(text) => self.span("repeat", &text, (MINUTE, SPAN.1)).map(Some),
        };
        zone?;
        Some(AlertConfig { name: name.get_ref().clone(), way: way?, quiet: quiet?, repeat: repeat? })
    }

    /// The message never shows what was written: it may hold a secret.
    fn url(&mut self, label: &str, setting: &str, written: &Spanned<String>) -> Option<AlertUrl> {
        let url = AlertUrl::new(written.get_ref());
        if url.is_none() {
            self.at(
                written,
                format!("{setting} in {label} is not a URL that begins with https:// or http:// and names a host"),
            );
        }
        url
    }
}

/// `500MB`.
fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at_checked(text.find(|c: char| !c.is_ascii_digit())?)?;
    let unit = match unit.trim_start() {
        "kB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_shows_its_host_alone() {
        let url = AlertUrl::new("https://user:word@hooks.example:8443/services/T0/secret?key=1").unwrap();
        assert_eq!((url.to_string().as_str(), url.host()), ("https://hooks.example:8443/…", "hooks.example:8443"));
        assert!(!format!("{url:?} {url}").contains("secret") && !format!("{url:?}").contains("word"));
        for text in ["hooks.example/x", "ftp://x/y", "https:///path", "https://", "http://a b/"] {
            assert!(AlertUrl::new(text).is_none(), "{text}");
        }
    }

    #[test]
    fn quiet_times_go_over_midnight() {
        let at = |text: &str| format!("2026-07-01T{text}:00Z").parse::<Timestamp>().unwrap();
        let berlin = QuietTimes::new("22:00-06:00", TimeZone::get("Europe/Berlin").unwrap()).unwrap(); // UTC+2 in July
        let quiet = |text: &str| berlin.hold(at(text));
        assert_eq!(["19:59", "20:00", "23:30", "03:59", "04:00"].map(quiet), [false, true, true, true, false]);
        let noon = QuietTimes::new("11:00-13:30", TimeZone::UTC).unwrap();
        assert!(noon.hold(at("13:29")) && !noon.hold(at("13:30")) && !noon.hold(at("10:59")));
        for text in ["22-06", "22:00", "25:00-06:00", "06:00-06:00"] {
            assert!(QuietTimes::new(text, TimeZone::UTC).is_none(), "{text}");
        }
    }
}
