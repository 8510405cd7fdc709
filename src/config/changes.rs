//! What another reading of the file changes while `pgkeep run` goes on. Pure.
//!
//! Taken at once: when base backups are taken, what retention keeps, `[daemon]`, `[alert.NAME]`. Where WAL comes from and
//! goes to, and how, is decided when the archiver starts: of that is told what needs a restart, and the old values stay.

use secrecy::ExposeSecret;

use super::{ClusterConfig, Config, RepositoryConfig};

/// What differs between two readings.
#[derive(Debug, Clone, PartialEq)]
pub struct Changes {
    /// What is taken at once, in words; without values, which may be secret.
    pub taken: Vec<String>,
    /// What is not, before a restart.
    pub need_restart: Vec<String>,
}

impl Config {
    /// What goes on from here: the old configuration with what may change taken from `read`; and what differs.
    pub fn reread(&self, read: &Config) -> (Config, Changes) {
        let mut next = self.clone();
        let mut changes = Changes { taken: Vec::new(), need_restart: Vec::new() };
        if self.daemon != read.daemon {
            changes.taken.push("[daemon]".to_owned());
            next.daemon = read.daemon.clone();
        }
        if self.alerts != read.alerts {
            changes.taken.push("[alert.NAME]".to_owned());
            next.alerts = read.alerts.clone();
        }
        for cluster in &mut next.clusters {
            let Some(new) = read.clusters.iter().find(|new| new.name == cluster.name) else {
                changes.need_restart.push(format!("[cluster.{}] is gone", cluster.name));
                continue;
            };
            if cluster.schedule != new.schedule {
                changes.taken.push(format!("when base backups of [cluster.{}] are taken", cluster.name));
                cluster.schedule = new.schedule.clone();
            }
            if cluster.keep != new.keep {
                // A policy for a repository that only a restart brings would be for nobody.
                changes.taken.push(format!("what [cluster.{}] keeps", cluster.name));
                let known = |name: &String| cluster.repositories.contains(name);
                cluster.keep =
                    new.keep.iter().filter(|(name, _)| known(name)).map(|(name, keep)| (name.clone(), *keep)).collect();
            }
            let fixed = fixed(cluster, new);
            if !fixed.is_empty() {
                changes.need_restart.push(format!("{} of [cluster.{}]", fixed.join(", "), cluster.name));
            }
        }
        for new in &read.clusters {
            if !self.clusters.iter().any(|cluster| cluster.name == new.name) {
                changes.need_restart.push(format!("[cluster.{}] is new", new.name));
            }
        }
        let is_same =
            |one: &RepositoryConfig, other: &RepositoryConfig| one.place == other.place && one.key == other.key;
        for one in &self.repositories {
            match read.repositories.iter().find(|other| other.name == one.name) {
                None => changes.need_restart.push(format!("[repository.{}] is gone", one.name)),
                Some(other) if !is_same(one, other) => changes.need_restart.push(format!("[repository.{}]", one.name)),
                Some(_) => {}
            }
        }
        for new in &read.repositories {
            if !self.repositories.iter().any(|one| one.name == new.name) {
                changes.need_restart.push(format!("[repository.{}] is new", new.name));
            }
        }
        (next, changes)
    }
}

/// The settings of a cluster that differ and are not taken.
fn fixed(one: &ClusterConfig, other: &ClusterConfig) -> Vec<&'static str> {
    let differs = [
        ("conninfo", one.conninfo.expose_secret() != other.conninfo.expose_secret()),
        ("repositories", one.repositories != other.repositories),
        ("acknowledge", one.acknowledge != other.acknowledge),
        ("name_in_repository", one.name_in_repository != other.name_in_repository),
        ("slot", one.slot != other.slot),
        ("application_name", one.application_name != other.application_name),
        ("max_delay", one.max_delay != other.max_delay),
        ("synchronous", one.synchronous != other.synchronous),
        ("range_interval", one.range_interval != other.range_interval),
        ("shutdown_deadline", one.shutdown_deadline != other.shutdown_deadline),
        ("fill_rate", one.fill_rate != other.fill_rate),
        ("index", one.index != other.index),
        ("verify_within or verify_rate", one.verify != other.verify),
        ("drill", one.drill != other.drill),
    ];
    differs.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const GOOD: &str = "[repository.main]\npath = \"/r\"\nkey_file = \"k\"\n\
         [cluster.main]\nconninfo = \"host=a password=hunter2\"\nrepositories = [\"main\"]\n";

    fn read(text: &str) -> Config {
        Config::parse(text, Path::new("/etc/pgkeep/pgkeep.toml")).unwrap()
    }

    #[test]
    fn what_may_change_is_taken_and_the_rest_is_told() {
        let old = read(GOOD);
        let (same, none) = old.reread(&read(GOOD));
        assert!(none.taken.is_empty() && none.need_restart.is_empty() && same.clusters.len() == 1, "{none:?}");
        let text = GOOD.replace("host=a password=hunter2", "host=b password=hunter3")
            + "slot = \"other\"\nbackup_every = \"24h\"\nkeep = { daily = 3 }\n\
               [daemon]\nlisten = \"127.0.0.1:1\"\n[alert.ops]\ncommand = [\"x\"]\n\
               [repository.spare]\npath = \"/s\"\nkey_file = \"k\"\n";
        let (next, changes) = old.reread(&read(&text));
        assert_eq!(changes.taken.len(), 4, "{changes:?}");
        assert_eq!(changes.need_restart, ["conninfo, slot of [cluster.main]", "[repository.spare] is new"]);
        let cluster = &next.clusters[0];
        assert!(cluster.slot == "pgkeep" && cluster.schedule.when.is_some() && cluster.keep["main"].daily == 3);
        assert!(next.daemon.listen.is_some() && next.alerts.len() == 1 && next.repositories.len() == 1);
        assert!(!format!("{changes:?}").contains("hunter"));
        let (_, gone) = next.reread(&read("[repository.main]\npath = \"/t\"\nkey_file = \"k\"\n"));
        assert_eq!(gone.need_restart, ["[cluster.main] is gone", "[repository.main]"]);
    }
}
