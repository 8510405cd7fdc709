use std::path::Path;

use super::ConfigError;

/// What `pgkeep init` knows when it writes a configuration file.
#[derive(Debug, Clone, Copy)]
pub struct Template<'a> {
    /// For `[cluster.NAME]`.
    pub cluster: &'a str,
    /// As the user gave it; written as it is. A password in it ends up in the file.
    pub conninfo: &'a str,
    /// The slot's name.
    pub slot: &'a str,
    /// For `[repository.NAME]`.
    pub repository: &'a str,
    /// Where the repository is.
    pub place: NewPlace<'a>,
    /// The key file, absolute.
    pub key_file: &'a Path,
    /// The key there only writes.
    pub write_only: bool,
}

/// Where `pgkeep init` makes a repository.
#[derive(Debug, Clone, Copy)]
pub enum NewPlace<'a> {
    /// A directory, absolute.
    Directory(&'a Path),
    /// A bucket by its URL, and the settings that were given with it, by name.
    Bucket(&'a str, &'a [(&'static str, toml::Value)]),
}

impl NewPlace<'_> {
    fn lines(&self) -> String {
        let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
        match self {
            NewPlace::Directory(path) => format!(
                "# The directory that holds the sealed objects. It must not lie inside a data directory of PostgreSQL.\n\
                 path = {}",
                quoted(&path.to_string_lossy())
            ),
            NewPlace::Bucket(url, settings) => {
                let mut lines = format!(
                    "# The bucket that holds the sealed objects. Its credentials come from the environment, as other tools of the\n\
                     # provider find them, or from files: docs/object-stores.md.\n\
                     url = {}",
                    quoted(url)
                );
                settings.iter().for_each(|(name, value)| lines.push_str(&format!("\n{name} = {value}")));
                lines
            }
        }
    }
}

impl Template<'_> {
    /// A configuration file with every setting that is usually touched, commented. It reads back: that is checked here.
    pub fn render(&self, file: &Path) -> Result<String, ConfigError> {
        let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let text = format!(
            r#"# pgkeep.toml, written by `pgkeep init`. Every setting: docs/reference/configuration.md
# Lines that begin with `# name =` show a default.

[repository.{repository}]
{place}
{about_key}
key_file = {key_file}

[cluster.{cluster}]
# How to reach the server, in libpq's words. The role needs REPLICATION.
conninfo = {conninfo}
repositories = [{repository_name}]
# The replication slot that makes the server keep the WAL that is not in the repository yet.
slot = {slot}
# What synchronous_standby_names matches.
# application_name = "pgkeep"
# How long a byte of WAL may wait before it is sealed: what a lost server can cost. 10ms to 10m.
# max_delay = "1s"
# true: put WAL at once and report it as written, flushed and applied, for synchronous commit.
# synchronous = false
# How long a stopping PostgreSQL may wait for the repository. 1s to 5m.
# shutdown_deadline = "10s"
"#,
            repository = self.repository,
            cluster = self.cluster,
            place = self.place.lines(),
            about_key = match self.write_only {
                false =>
                    "# Opens everything in the repository. Keep a copy of it elsewhere: without it no backup can be read, by anybody.",
                true =>
                    "# Archives and takes backups, and cannot read a row. Restoring needs a key file with an identity.",
            },
            key_file = quoted(&self.key_file.to_string_lossy()),
            conninfo = quoted(self.conninfo),
            repository_name = quoted(self.repository),
            slot = quoted(self.slot),
        );
        super::Config::parse(&text, file).map(|_| text)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CLUSTER_SETTINGS, Config};
    use super::*;
    use secrecy::ExposeSecret;

    const FILE: &str = "/etc/pgkeep/pgkeep.toml";

    fn template<'a>(conninfo: &'a str, path: &'a Path) -> Template<'a> {
        Template {
            cluster: "main",
            conninfo,
            slot: "pgkeep",
            repository: "main",
            place: NewPlace::Directory(path),
            key_file: Path::new("/etc/pgkeep/main.key"),
            write_only: false,
        }
    }

    #[test]
    fn what_is_rendered_reads_back() {
        let conninfo = r#"host=/run/postgresql user='o''brien "q" \ ' password=x"#;
        let path = Path::new("/srv/with \"quotes\" and \\");
        let config =
            Config::parse(&template(conninfo, path).render(Path::new(FILE)).unwrap(), Path::new(FILE)).unwrap();
        assert_eq!(config.clusters[0].conninfo.expose_secret(), conninfo);
        assert_eq!(config.repositories[0].place.to_string(), path.to_string_lossy());
    }

    #[test]
    fn a_bucket_reads_back_with_its_settings() {
        let settings = [
            ("endpoint", toml::Value::String("http://127.0.0.1:9000".into())),
            ("path_style", toml::Value::Boolean(true)),
        ];
        let place = NewPlace::Bucket("s3://bucket/pre/fix", &settings);
        let template = Template { place, ..template("host=/run/postgresql", Path::new("/")) };
        let config = Config::parse(&template.render(Path::new(FILE)).unwrap(), Path::new(FILE)).unwrap();
        let crate::config::Place::S3(place) = &config.repositories[0].place else { panic!() };
        assert_eq!((place.bucket.as_str(), place.prefix.as_str(), place.path_style), ("bucket", "pre/fix", Some(true)));
        assert_eq!(place.endpoint.as_deref(), Some("http://127.0.0.1:9000"));
        let gone = NewPlace::Bucket("s4://bucket", &[]);
        let error = Template { place: gone, ..template }.render(Path::new(FILE)).unwrap_err();
        assert!(error.to_string().contains("s3://"), "{error}");
    }

    /// A default that is shown must be the default: uncommenting the lines changes nothing.
    #[test]
    fn the_defaults_shown_are_the_defaults() {
        let text = template("host=/run/postgresql", Path::new("/srv/pgkeep")).render(Path::new(FILE)).unwrap();
        let shown = |line: &&str| CLUSTER_SETTINGS.iter().any(|s| line.starts_with(&format!("# {} = ", s.name)));
        assert_eq!(text.lines().filter(shown).count(), 4);
        let uncommented: Vec<_> =
            text.lines().map(|line| if shown(&line) { line.trim_start_matches("# ") } else { line }).collect();
        let all = |text: &str| {
            let cluster = Config::parse(text, Path::new(FILE)).unwrap().clusters.remove(0);
            (cluster.application_name, cluster.max_delay, cluster.synchronous, cluster.shutdown_deadline)
        };
        assert_eq!(all(&uncommented.join("\n")), all(&text));
    }

    #[test]
    fn a_name_that_no_file_can_hold_is_refused() {
        let bad = Template { slot: "Bad Slot", ..template("host=/run/postgresql", Path::new("/srv/pgkeep")) };
        assert!(bad.render(Path::new(FILE)).unwrap_err().to_string().contains("slot"));
    }
}
