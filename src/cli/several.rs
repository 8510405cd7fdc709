//! A cluster's repositories, as far as they answer.
//!
//! One that is away is no reason not to use the others, and is said. One that answers and is not what the configuration
//! says (another key, another format) is a mistake, and is said as an error.

use std::time::Duration;

use super::{CliError, Exit, open};
use crate::catalog::Repository;
use crate::config::RepositoryConfig;

/// One that takes longer to open is away.
const OPEN_DEADLINE: Duration = Duration::from_secs(60);

/// A repository that does not answer.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Away {
    /// Its name in the configuration.
    pub repository: String,
    /// Why, in words.
    pub why: String,
}

/// What became of opening several repositories.
#[derive(Debug, Default)]
pub struct Several {
    /// Those that answer, in the configuration's order, and whether each is beside us.
    pub open: Vec<(Repository, bool)>,
    /// Those that do not.
    pub away: Vec<Away>,
}

/// Opens a repository; the inner error: it is away.
pub async fn open_one(config: &RepositoryConfig) -> Result<Result<Repository, Away>, CliError> {
    let away = |why: String| Away { repository: config.name.clone(), why };
    match tokio::time::timeout(OPEN_DEADLINE, open::repository(config)).await {
        Ok(Ok(repository)) => Ok(Ok(repository)),
        Ok(Err(error)) if error.exit() == Exit::Failed => Ok(Err(away(error.sentence()))),
        Ok(Err(error)) => Err(error),
        Err(_) => Ok(Err(away(format!("it gave no answer within {} s", OPEN_DEADLINE.as_secs())))),
    }
}

/// Opens several at the same time.
///
/// # Errors
/// When none answers: all of them are named. A mistake in the configuration of any of them.
pub async fn open_all(configs: &[&RepositoryConfig]) -> Result<Several, CliError> {
    if let [only] = configs {
        // Nothing to fall back on: its own error says best what is wrong.
        return Ok(Several { open: vec![(open::repository(only).await?, only.place.is_local())], away: Vec::new() });
    }
    let opened = futures_util::future::join_all(configs.iter().map(|config| open_one(config))).await;
    let mut several = Several::default();
    for (config, opened) in configs.iter().zip(opened) {
        match opened? {
            Ok(repository) => several.open.push((repository, config.place.is_local())),
            Err(away) => several.away.push(away),
        }
    }
    if several.open.is_empty() {
        return Err(CliError::failed(none_answers(&several.away)));
    }
    Ok(several)
}

/// Why there is nothing to go on with.
pub fn none_answers(away: &[Away]) -> anyhow::Error {
    match away {
        [only] => anyhow::anyhow!("{}", only.why),
        several => {
            let each: Vec<String> = several.iter().map(|away| format!("{}: {}", away.repository, away.why)).collect();
            anyhow::anyhow!("no repository answers; {}", each.join("; "))
        }
    }
}
