use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::ConfigError;

/// Names the configuration file when `--config` does not.
pub const ENVIRONMENT_VARIABLE: &str = "PGKEEP_CONFIG";

/// Where the file is sought, in this order, when neither `--config` nor the environment names one.
pub const SOUGHT: [&str; 2] = ["./pgkeep.toml", "/etc/pgkeep/pgkeep.toml"];

/// The configuration file: `option` (`--config`), else `environment` (`$PGKEEP_CONFIG`), else the first usual place that
/// exists. A file that was named is taken even if it is missing, so that the message speaks of that one.
pub fn locate(
    option: Option<&Path>,
    environment: Option<OsString>,
    exists: impl Fn(&Path) -> bool,
) -> Result<PathBuf, ConfigError> {
    if let Some(path) = option {
        return Ok(path.to_owned());
    }
    if let Some(path) = environment.filter(|path| !path.is_empty()) {
        return Ok(PathBuf::from(path));
    }
    SOUGHT.iter().map(PathBuf::from).find(|path| exists(path)).ok_or(ConfigError::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_place_wins() {
        let all = |_: &Path| true;
        let named = || Some(OsString::from("/env.toml"));
        assert_eq!(locate(Some(Path::new("/o.toml")), named(), all).unwrap(), Path::new("/o.toml"));
        assert_eq!(locate(None, named(), all).unwrap(), Path::new("/env.toml"));
        assert_eq!(locate(None, Some(OsString::new()), all).unwrap(), Path::new("./pgkeep.toml"));
        let only_etc = |path: &Path| path.starts_with("/etc");
        assert_eq!(locate(None, None, only_etc).unwrap(), Path::new("/etc/pgkeep/pgkeep.toml"));
        let message = locate(None, None, |_| false).unwrap_err().to_string();
        for place in ["--config", "$PGKEEP_CONFIG", SOUGHT[0], SOUGHT[1]] {
            assert!(message.contains(place), "{place} is missing from {message:?}");
        }
    }
}
