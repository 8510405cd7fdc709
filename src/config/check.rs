//! From the file as written to a [`Config`]: ranges, references, places. All problems are found in one go.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::SignedDuration;
use secrecy::SecretString;
use toml::Spanned;

use super::error::nearest;
use super::file::{self, File, line_of};
use super::place::place;
use super::schedule::WrittenSchedule;
use super::{ClusterConfig, Config, ConfigError, KeyOrigin, KeySource, Problem, RepositoryConfig};
use crate::types::ClusterName;

/// What `max_delay` may be.
const MAX_DELAY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(600));
/// What `range_interval` may be.
const RANGE_INTERVAL: (Duration, Duration) = (Duration::ZERO, Duration::from_secs(10));
/// What `shutdown_deadline` may be.
const SHUTDOWN_DEADLINE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// The least that `fill_rate` may be, in bytes a second.
const LEAST_RATE: u64 = 100_000;

pub(super) fn check(written: File, text: &str, file: &Path) -> Result<Config, ConfigError> {
    let mut checker = Checker { text, file, problems: Vec::new() };
    let names: Vec<String> = written.repository.keys().map(|name| name.get_ref().clone()).collect();
    let repositories: Vec<_> =
        written.repository.into_iter().filter_map(|(name, repository)| checker.repository(&name, repository)).collect();
    let clusters: Vec<_> =
        written.cluster.into_iter().filter_map(|(name, cluster)| checker.cluster(&name, cluster, &names)).collect();
    if names.is_empty() {
        checker.problem(None, "there is no [repository.NAME]: pgkeep needs a place to keep things".to_owned());
    }
    let alerts: Vec<_> = written.alert.into_iter().filter_map(|(name, alert)| checker.alert(&name, alert)).collect();
    let daemon = checker.daemon(written.daemon);
    checker.pairs(&repositories, &clusters);
    if let (true, Some(daemon)) = (checker.problems.is_empty(), daemon) {
        return Ok(Config { file: file.to_owned(), clusters, repositories, alerts, daemon });
    }
    checker.problems.sort_by_key(|problem| problem.line);
    Err(ConfigError::Invalid { problems: checker.problems })
}

pub(super) struct Checker<'a> {
    text: &'a str,
    file: &'a Path,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    pub(super) fn problem(&mut self, offset: Option<usize>, what: String) {
        let line = offset.map(|offset| line_of(self.text, offset));
        self.problems.push(Problem { file: self.file.to_owned(), line, what });
    }

    pub(super) fn at<T>(&mut self, value: &Spanned<T>, what: String) {
        self.problem(Some(value.span().start), what);
    }

    /// Relative to the folder of the file, so that it means the same wherever pgkeep is started.
    pub(super) fn path(&mut self, setting: &str, value: Spanned<String>) -> Option<PathBuf> {
        if value.get_ref().is_empty() {
            self.at(&value, format!("{setting} is empty"));
            return None;
        }
        let folder = self.file.parent().unwrap_or(Path::new("/"));
        Some(folder.join(value.into_inner()))
    }

    fn repository(&mut self, name: &Spanned<String>, written: file::Repository) -> Option<RepositoryConfig> {
        if name.get_ref().parse::<ClusterName>().is_err() {
            let what = format!("{:?} is no name for a repository: a-z, 0-9, _ and -, at most 63", name.get_ref());
            self.at(name, what);
        }
        let label = format!("[repository.{}]", name.get_ref());
        let (where_it_is, key) = written.split();
        let place = place(self, name, &label, where_it_is);
        let key = self.key(name, &label, key);
        Some(RepositoryConfig { name: name.get_ref().clone(), place: place?, key: key? })
    }

    fn key(&mut self, name: &Spanned<String>, label: &str, written: file::KeySettings) -> Option<KeySource> {
        let file::KeySettings { key_file: file, key_env: environment, key_command: command, passphrase_file } = written;
        let has_passphrase = passphrase_file.is_some();
        let passphrase_file = passphrase_file.map(|path| self.path("passphrase_file", path));
        let origin = match (file, environment, command) {
            (Some(path), None, None) => self.path("key_file", path).map(KeyOrigin::File),
            (None, Some(variable), None) => {
                let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
                if variable.get_ref().is_empty() || !variable.get_ref().bytes().all(fits) {
                    let what = "key_env is the name of an environment variable, not the key itself".to_owned();
                    self.at(&variable, what);
                    return None;
                }
                Some(KeyOrigin::Environment(variable.into_inner()))
            }
            (None, None, Some(command)) if command.get_ref().trim().is_empty() => {
                self.at(&command, "key_command is empty".to_owned());
                None
            }
            (None, None, Some(command)) => Some(KeyOrigin::Command(command.into_inner())),
            (None, None, None) => {
                let beside = if has_passphrase { " beside passphrase_file, which only opens it" } else { "" };
                self.at(name, format!("{label} needs its key: one of key_file, key_env, key_command{beside}"));
                None
            }
            _ => {
                self.at(name, format!("{label} has several keys: leave one of key_file, key_env, key_command"));
                None
            }
        };
        let passphrase_file = match passphrase_file {
            Some(path) => Some(path?),
            None => None,
        };
        Some(KeySource { origin: origin?, passphrase_file })
    }

    fn cluster(
        &mut self,
        name: &Spanned<String>,
        written: file::Cluster,
        repositories: &[String],
    ) -> Option<ClusterConfig> {
        let label = format!("[cluster.{}]", name.get_ref());
        let parsed = self.cluster_name(name);
        let name_in_repository = match written.name_in_repository {
            Some(name) => self.cluster_name(&name),
            None => parsed.clone(),
        };
        let conninfo = match written.conninfo {
            Some(conninfo) => Some(SecretString::from(conninfo.into_inner())),
            None => {
                self.at(name, format!("{label} needs conninfo, how to reach the server"));
                None
            }
        };
        let receivers = self.receivers(name, &label, written.repositories, repositories);
        let acknowledge = self.acknowledge(written.acknowledge, receivers.as_deref());
        let slot = self.text("slot", written.slot, "a slot name: a-z, 0-9 and _, at most 63", |text| {
            text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        });
        let application_name = self.text(
            "application_name",
            written.application_name,
            "an application name: printable ASCII, at most 63",
            |text| text.bytes().all(|b| (b' '..=b'~').contains(&b)),
        );
        let max_delay = self.duration("max_delay", written.max_delay, Duration::from_secs(1), MAX_DELAY);
        let range_interval =
            self.duration("range_interval", written.range_interval, Duration::from_millis(25), RANGE_INTERVAL);
        let shutdown_deadline =
            self.duration("shutdown_deadline", written.shutdown_deadline, Duration::from_secs(10), SHUTDOWN_DEADLINE);
        let fill_rate = self.rate("fill_rate", written.fill_rate);
        let keep =
            self.policies(name.get_ref(), written.keep, written.keep_in, receivers.as_deref().unwrap_or_default());
        let verify = self.verify(written.verify_within, written.verify_rate);
        let drill = self.drill(name.get_ref(), written.drill);
        let (backup, backup_time_zone) = (written.backup, written.backup_time_zone);
        let (backup_every, restore_within) = (written.backup_every, written.restore_within);
        let schedule =
            self.schedule(&label, WrittenSchedule { backup, backup_time_zone, backup_every, restore_within });
        Some(ClusterConfig {
            name: parsed?,
            conninfo: conninfo?,
            repositories: receivers?,
            acknowledge: acknowledge?,
            name_in_repository: name_in_repository?,
            slot: slot?,
            application_name: application_name?,
            max_delay: max_delay?,
            synchronous: written.synchronous.unwrap_or(false),
            range_interval: range_interval?,
            shutdown_deadline: shutdown_deadline?,
            fill_rate: fill_rate?,
            index: written.index.unwrap_or(true),
            keep: keep?,
            verify: verify?,
            drill: drill?,
            schedule: schedule?,
        })
    }

    fn cluster_name(&mut self, name: &Spanned<String>) -> Option<ClusterName> {
        name.get_ref().parse().map_err(|error: crate::types::ParseError| self.at(name, error.to_string())).ok()
    }

    fn receivers(
        &mut self,
        cluster: &Spanned<String>,
        label: &str,
        written: Option<Spanned<Vec<Spanned<String>>>>,
        repositories: &[String],
    ) -> Option<Vec<String>> {
        let example = repositories.first().map_or("main", String::as_str);
        let Some(written) = written else {
            self.at(cluster, format!("{label} needs repositories, such as repositories = [{example:?}]"));
            return None;
        };
        if written.get_ref().is_empty() {
            self.at(&written, format!("repositories in {label} is empty; write at least one: [{example:?}]"));
            return None;
        }
        let mut found: Vec<String> = Vec::new();
        let mut all_good = true;
        for name in written.get_ref() {
            // What is no name may be a password that slipped in: it is not shown.
            let start = match name.get_ref().parse::<ClusterName>() {
                Ok(name) => format!("there is no [repository.{name}]"),
                Err(_) => format!("{label} lists something that is no name of a repository"),
            };
            let what = if found.contains(name.get_ref()) {
                format!("{label} names repository {:?} twice", name.get_ref())
            } else if repositories.contains(name.get_ref()) {
                found.push(name.get_ref().clone());
                continue;
            } else {
                match nearest(name.get_ref(), repositories.iter().map(String::as_str)) {
                    Some(near) => format!("{start}; did you mean {near:?}?"),
                    None => format!("{start}; there are: {}", repositories.join(", ")),
                }
            };
            self.at(name, what);
            all_good = false;
        }
        all_good.then_some(found)
    }

    /// Default: all of them.
    fn acknowledge(&mut self, written: Option<Spanned<i64>>, receivers: Option<&[String]>) -> Option<usize> {
        let receivers = receivers?.len();
        let Some(written) = written else { return Some(receivers) };
        match usize::try_from(*written.get_ref()).ok().filter(|needed| (1..=receivers).contains(needed)) {
            Some(needed) => Some(needed),
            None => {
                let range = if receivers == 1 {
                    "with one repository it can only be 1".to_owned()
                } else {
                    format!("with {receivers} repositories it is 1 to {receivers}")
                };
                self.at(&written, format!("acknowledge is {}; {range}", written.get_ref()));
                None
            }
        }
    }

    fn text(
        &mut self,
        setting: &str,
        written: Option<Spanned<String>>,
        expected: &str,
        fits: impl Fn(&str) -> bool,
    ) -> Option<String> {
        let Some(written) = written else {
            return Some("pgkeep".to_owned());
        };
        let text = written.get_ref();
        if (1..=63).contains(&text.len()) && fits(text) {
            return Some(written.into_inner());
        }
        let what = format!("{setting} = {text:?} is not {expected}");
        self.at(&written, what);
        None
    }

    fn duration(
        &mut self,
        setting: &str,
        written: Option<Spanned<String>>,
        default: Duration,
        (least, most): (Duration, Duration),
    ) -> Option<Duration> {
        let Some(written) = written else {
            return Some(default);
        };
        let range = format!("{} to {}", show_duration(least), show_duration(most));
        let parsed =
            written.get_ref().parse::<SignedDuration>().ok().and_then(|parsed| Duration::try_from(parsed).ok());
        let what = match parsed {
            Some(parsed) if (least..=most).contains(&parsed) => return Some(parsed),
            Some(_) => format!("{setting} = {:?} is out of range: {range}", written.get_ref()),
            None => {
                format!(
                    "{setting} = {:?} is not a duration such as \"500ms\", \"1s\" or \"5m\" ({range})",
                    written.get_ref()
                )
            }
        };
        self.at(&written, what);
        None
    }

    /// Bytes a second; the inner `None`: no limit.
    pub(super) fn rate(&mut self, setting: &str, written: Option<Spanned<String>>) -> Option<Option<NonZeroU64>> {
        let Some(written) = written else { return Some(None) };
        if let Some(rate) = bytes_a_second(written.get_ref()) {
            return Some(Some(rate));
        }
        let what = format!(
            "{setting} = {:?} is not a rate such as \"50MB/s\" (a whole number with kB/s, MB/s or GB/s, at least 100kB/s)",
            written.get_ref()
        );
        self.at(&written, what);
        None
    }

    /// What two sections must not have in common.
    fn pairs(&mut self, repositories: &[RepositoryConfig], clusters: &[ClusterConfig]) {
        for (at, one) in repositories.iter().enumerate() {
            if let Some(other) = repositories.iter().skip(at + 1).find(|other| other.place == one.place) {
                let what = format!("repositories {} and {} are the same place: {}", one.name, other.name, one.place);
                self.problem(None, what);
            }
        }
        for (at, one) in clusters.iter().enumerate() {
            for other in clusters.iter().skip(at + 1) {
                let shared = one.repositories.iter().find(|name| other.repositories.contains(name));
                if let Some(shared) = shared.filter(|_| one.name_in_repository == other.name_in_repository) {
                    let what = format!(
                        "clusters {} and {} would both be called {} in repository {shared}: choose another name_in_repository",
                        one.name, other.name, one.name_in_repository
                    );
                    self.problem(None, what);
                }
            }
        }
    }
}

/// `50MB/s`. Less than [`LEAST_RATE`] is taken for a mistake: WAL would come faster than it could ever be filled up.
fn bytes_a_second(text: &str) -> Option<NonZeroU64> {
    let (number, unit) = text.split_at_checked(text.find(|c: char| !c.is_ascii_digit())?)?;
    let unit = match unit.trim_start() {
        "kB/s" => 1000,
        "MB/s" => 1_000_000,
        "GB/s" => 1_000_000_000,
        _ => return None,
    };
    let rate = number.parse::<u64>().ok()?.checked_mul(unit)?;
    NonZeroU64::new(rate).filter(|rate| rate.get() >= LEAST_RATE)
}

fn show_duration(duration: Duration) -> String {
    match SignedDuration::try_from(duration) {
        Ok(duration) => format!("{duration:#}"),
        Err(_) => format!("{duration:?}"),
    }
}
