//! The file as written. Names are checked first, by hand, so that a misspelt one is answered with the right one; serde
//! then reads the values, with their places for the messages of `check`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::alert::{WrittenAlert, WrittenDaemon};
use super::care::{self, WrittenDrill};
use super::error::nearest;
use super::keep::{self, WrittenKeep, WrittenKeepIn};
use super::{ConfigError, Problem};

/// A setting of the file, as reference and template show it.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// As it is written.
    pub name: &'static str,
    /// What it holds when the file does not say; `None`: there is none.
    pub default: Option<&'static str>,
}

const fn setting(name: &'static str) -> Setting {
    Setting { name, default: None }
}

const fn with_default(name: &'static str, default: &'static str) -> Setting {
    Setting { name, default: Some(default) }
}

/// Every setting of `[repository.NAME]`.
pub const REPOSITORY_SETTINGS: &[Setting] = &[
    setting("path"),
    setting("url"),
    setting("endpoint"),
    setting("region"),
    setting("path_style"),
    with_default("checksum", "auto"),
    setting("storage_class"),
    setting("kms_key"),
    setting("object_lock"),
    setting("object_lock_days"),
    setting("access_key_file"),
    setting("secret_key_file"),
    setting("session_token_file"),
    setting("ca_file"),
    setting("account"),
    setting("credentials_file"),
    setting("key_file"),
    setting("key_env"),
    setting("key_command"),
    setting("passphrase_file"),
];

/// Every setting of `[cluster.NAME]`.
pub const CLUSTER_SETTINGS: &[Setting] = &[
    setting("conninfo"),
    setting("repositories"),
    setting("acknowledge"),
    setting("name_in_repository"),
    with_default("slot", "pgkeep"),
    with_default("application_name", "pgkeep"),
    with_default("max_delay", "1s"),
    with_default("synchronous", "false"),
    with_default("range_interval", "25ms"),
    with_default("shutdown_deadline", "10s"),
    setting("fill_rate"),
    with_default("index", "true"),
    setting("keep"),
    setting("keep_in"),
    with_default("verify_within", "30d"),
    with_default("verify_rate", "20MB/s"),
    setting("drill"),
    setting("backup"),
    with_default("backup_time_zone", "UTC"),
    setting("backup_every"),
    setting("restore_within"),
];

/// Every setting of `[alert.NAME]`.
pub const ALERT_SETTINGS: &[Setting] = &[
    setting("webhook"),
    with_default("format", "json"),
    setting("command"),
    setting("heartbeat"),
    with_default("every", "1m"),
    setting("quiet"),
    with_default("quiet_time_zone", "UTC"),
    setting("repeat"),
];

/// Every setting of `[daemon]`, which has no name of its own.
pub const DAEMON_SETTINGS: &[Setting] = &[
    setting("listen"),
    with_default("behind", "5m"),
    with_default("behind_bytes", "1GB"),
    with_default("refresh", "10m"),
];

/// The sections that have names, each with what it may hold.
const SECTIONS: [(&str, &[Setting]); 3] =
    [("repository", REPOSITORY_SETTINGS), ("cluster", CLUSTER_SETTINGS), ("alert", ALERT_SETTINGS)];

/// No `Debug`: a conninfo may hold a password.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    #[serde(default)]
    pub repository: BTreeMap<Spanned<String>, Repository>,
    #[serde(default)]
    pub cluster: BTreeMap<Spanned<String>, Cluster>,
    #[serde(default)]
    pub alert: BTreeMap<Spanned<String>, WrittenAlert>,
    #[serde(default)]
    pub daemon: WrittenDaemon,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Repository {
    pub path: Option<Spanned<String>>,
    pub url: Option<Spanned<String>>,
    pub endpoint: Option<Spanned<String>>,
    pub region: Option<Spanned<String>>,
    pub path_style: Option<Spanned<bool>>,
    pub checksum: Option<Spanned<String>>,
    pub storage_class: Option<Spanned<String>>,
    pub kms_key: Option<Spanned<String>>,
    pub object_lock: Option<Spanned<String>>,
    pub object_lock_days: Option<Spanned<i64>>,
    pub access_key_file: Option<Spanned<String>>,
    pub secret_key_file: Option<Spanned<String>>,
    pub session_token_file: Option<Spanned<String>>,
    pub ca_file: Option<Spanned<String>>,
    pub account: Option<Spanned<String>>,
    pub credentials_file: Option<Spanned<String>>,
    pub key_file: Option<Spanned<String>>,
    pub key_env: Option<Spanned<String>>,
    pub key_command: Option<Spanned<String>>,
    pub passphrase_file: Option<Spanned<String>>,
}

/// The part of a [`Repository`] that says where it is.
pub(super) struct PlaceSettings {
    pub path: Option<Spanned<String>>,
    pub url: Option<Spanned<String>>,
    pub endpoint: Option<Spanned<String>>,
    pub s3: S3Settings,
    pub cloud: CloudSettings,
}

/// What goes with `s3://` alone.
pub(super) struct S3Settings {
    pub region: Option<Spanned<String>>,
    pub path_style: Option<Spanned<bool>>,
    pub checksum: Option<Spanned<String>>,
    pub storage_class: Option<Spanned<String>>,
    pub kms_key: Option<Spanned<String>>,
    pub object_lock: Option<Spanned<String>>,
    pub object_lock_days: Option<Spanned<i64>>,
    pub access_key_file: Option<Spanned<String>>,
    pub secret_key_file: Option<Spanned<String>>,
    pub session_token_file: Option<Spanned<String>>,
    pub ca_file: Option<Spanned<String>>,
}

/// What goes with the other clouds.
pub(super) struct CloudSettings {
    pub account: Option<Spanned<String>>,
    pub credentials_file: Option<Spanned<String>>,
}

/// The part of a [`Repository`] that says where its key is.
pub(super) struct KeySettings {
    pub key_file: Option<Spanned<String>>,
    pub key_env: Option<Spanned<String>>,
    pub key_command: Option<Spanned<String>>,
    pub passphrase_file: Option<Spanned<String>>,
}

fn offset<T>(value: &Option<Spanned<T>>) -> Option<usize> {
    value.as_ref().map(|value| value.span().start)
}

impl S3Settings {
    /// Those that are there, with their offsets.
    pub fn written(&self) -> impl Iterator<Item = (&'static str, usize)> {
        let all = [
            ("region", offset(&self.region)),
            ("path_style", offset(&self.path_style)),
            ("checksum", offset(&self.checksum)),
            ("storage_class", offset(&self.storage_class)),
            ("kms_key", offset(&self.kms_key)),
            ("object_lock", offset(&self.object_lock)),
            ("object_lock_days", offset(&self.object_lock_days)),
            ("access_key_file", offset(&self.access_key_file)),
            ("secret_key_file", offset(&self.secret_key_file)),
            ("session_token_file", offset(&self.session_token_file)),
            ("ca_file", offset(&self.ca_file)),
        ];
        all.into_iter().filter_map(|(name, offset)| Some((name, offset?)))
    }
}

impl CloudSettings {
    /// Those that are there, with their offsets.
    pub fn written(&self) -> impl Iterator<Item = (&'static str, usize)> {
        let all = [("account", offset(&self.account)), ("credentials_file", offset(&self.credentials_file))];
        all.into_iter().filter_map(|(name, offset)| Some((name, offset?)))
    }
}

impl Repository {
    /// Where it is, and where its key is.
    pub fn split(self) -> (PlaceSettings, KeySettings) {
        let Repository { path, url, endpoint, region, path_style, checksum, storage_class, kms_key, .. } = self;
        let Repository { object_lock, object_lock_days, access_key_file, secret_key_file, .. } = self;
        let Repository { session_token_file, ca_file, account, credentials_file, .. } = self;
        let Repository { key_file, key_env, key_command, passphrase_file, .. } = self;
        let s3 = S3Settings {
            region,
            path_style,
            checksum,
            storage_class,
            kms_key,
            object_lock,
            object_lock_days,
            access_key_file,
            secret_key_file,
            session_token_file,
            ca_file,
        };
        let cloud = CloudSettings { account, credentials_file };
        let place = PlaceSettings { path, url, endpoint, s3, cloud };
        (place, KeySettings { key_file, key_env, key_command, passphrase_file })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Cluster {
    pub conninfo: Option<Spanned<String>>,
    pub repositories: Option<Spanned<Vec<Spanned<String>>>>,
    pub acknowledge: Option<Spanned<i64>>,
    pub name_in_repository: Option<Spanned<String>>,
    pub slot: Option<Spanned<String>>,
    pub application_name: Option<Spanned<String>>,
    pub max_delay: Option<Spanned<String>>,
    pub synchronous: Option<bool>,
    pub range_interval: Option<Spanned<String>>,
    pub shutdown_deadline: Option<Spanned<String>>,
    pub fill_rate: Option<Spanned<String>>,
    pub index: Option<bool>,
    pub keep: Option<Spanned<WrittenKeep>>,
    pub keep_in: Option<WrittenKeepIn>,
    pub verify_within: Option<Spanned<String>>,
    pub verify_rate: Option<Spanned<String>>,
    pub drill: Option<Spanned<WrittenDrill>>,
    pub backup: Option<Spanned<String>>,
    pub backup_time_zone: Option<Spanned<String>>,
    pub backup_every: Option<Spanned<String>>,
    pub restore_within: Option<Spanned<String>>,
}

/// Line of a byte offset, from 1.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

pub(super) fn read(text: &str, file: &Path) -> Result<File, ConfigError> {
    // Only toml's own sentence goes into the message, never the source line: it may hold a password.
    let broken = |error: toml::de::Error| ConfigError::Invalid {
        problems: vec![Problem {
            file: file.to_owned(),
            line: error.span().map(|span| line_of(text, span.start)),
            what: error.message().trim_end().replace('\n', ", "),
        }],
    };
    let document = DeTable::parse(text).map_err(broken)?;
    let mut problems = Vec::new();
    let mut found = |offset: usize, what: String| {
        problems.push(Problem { file: file.to_owned(), line: Some(line_of(text, offset)), what });
    };
    for (section, value) in document.get_ref() {
        if section.get_ref() == "daemon" {
            match value.get_ref() {
                DeValue::Table(written) => unknown_in_daemon(written, &mut found),
                _ => found(section.span().start, "daemon is a section: write [daemon]".to_owned()),
            }
            continue;
        }
        let Some((_, settings)) = SECTIONS.iter().find(|(name, _)| *name == section.get_ref().as_ref()) else {
            found(section.span().start, unknown_section(section.get_ref()));
            continue;
        };
        let name = section.get_ref();
        let DeValue::Table(entries) = value.get_ref() else {
            found(section.span().start, format!("{name} is a section: write [{name}.NAME]"));
            continue;
        };
        for (entry, value) in entries {
            let DeValue::Table(written) = value.get_ref() else {
                let setting = entry.get_ref();
                found(entry.span().start, format!("[{name}] needs a name: write {setting} below [{name}.main]"));
                continue;
            };
            for setting in written.keys() {
                if !settings.iter().any(|known| known.name == setting.get_ref().as_ref()) {
                    found(setting.span().start, unknown_setting(name, entry.get_ref(), settings, setting.get_ref()));
                }
            }
            if name.as_ref() == "cluster" {
                keep::unknown(entry.get_ref(), written, &mut found);
                care::unknown(entry.get_ref(), written, &mut found);
            }
        }
    }
    if !problems.is_empty() {
        problems.sort_by_key(|problem| problem.line);
        return Err(ConfigError::Invalid { problems });
    }
    toml::from_str(text).map_err(broken)
}

fn unknown_section(name: &str) -> String {
    match nearest(name, SECTIONS.iter().map(|(name, _)| *name).chain(["daemon"])) {
        Some("daemon") => format!("unknown section {name:?}; did you mean [daemon]?"),
        Some(section) => format!("unknown section {name:?}; did you mean [{section}.NAME]?"),
        None => {
            format!("unknown section {name:?}; there are [repository.NAME], [cluster.NAME], [alert.NAME] and [daemon]")
        }
    }
}

fn unknown_in_daemon(written: &DeTable<'_>, found: &mut impl FnMut(usize, String)) {
    let is_known = |name: &str| DAEMON_SETTINGS.iter().any(|known| known.name == name);
    for name in written.keys().filter(|name| !is_known(name.get_ref())) {
        let start = format!("unknown setting {:?} in [daemon]", name.get_ref());
        found(
            name.span().start,
            match nearest(name.get_ref(), DAEMON_SETTINGS.iter().map(|known| known.name)) {
                Some(known) => format!("{start}; did you mean {known:?}?"),
                None => {
                    let names: Vec<_> = DAEMON_SETTINGS.iter().map(|known| known.name).collect();
                    format!("{start}; there are {}", names.join(", "))
                }
            },
        );
    }
}

fn unknown_setting(section: &str, entry: &str, settings: &[Setting], name: &str) -> String {
    let start = format!("unknown setting {name:?} in [{section}.{entry}]");
    let elsewhere = SECTIONS.iter().find(|(_, settings)| settings.iter().any(|known| known.name == name));
    if let Some((other, _)) = elsewhere {
        return format!("{start}; it belongs into [{other}.NAME]");
    }
    match nearest(name, settings.iter().map(|known| known.name)) {
        Some(known) => format!("{start}; did you mean {known:?}?"),
        None => {
            let names: Vec<_> = settings.iter().map(|known| known.name).collect();
            format!("{start}; there are {}", names.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lists above and the structs must name the same settings: serde's own message is the judge.
    #[test]
    fn the_lists_are_what_serde_reads() {
        for (section, settings) in SECTIONS.into_iter().chain([("daemon", DAEMON_SETTINGS)]) {
            let message = match section {
                "repository" => toml::from_str::<Repository>("zzz = 1").err(),
                "alert" => toml::from_str::<WrittenAlert>("zzz = 1").err(),
                "daemon" => toml::from_str::<WrittenDaemon>("zzz = 1").err(),
                _ => toml::from_str::<Cluster>("zzz = 1").err(),
            };
            let message = message.unwrap().message().to_owned();
            let (_, expected) = message.split_once("expected one of ").unwrap();
            let fields: Vec<_> = expected.split(", ").map(|name| name.trim_matches('`').to_owned()).collect();
            let listed: Vec<_> = settings.iter().map(|setting| setting.name.to_owned()).collect();
            assert_eq!(fields, listed);
        }
    }
}
