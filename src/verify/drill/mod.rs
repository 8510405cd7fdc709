//! A restore that nobody needed, done to prove that it works: into scratch space, started, looked at, removed.
//!
//! What always holds:
//! - The server that is started archives nothing, listens to nobody but us, has no replication slots, follows no publisher and
//!   loads no library that could have jobs of its own; its configuration is ours, not the one in the backup.
//! - Nothing outside of the scratch directory is written, and nothing in it that is not ours is touched.
//! - Afterwards, whatever happened, all of it is gone. What a killed drill left, its server too, the next one removes.
//!
//! Bounds: the disk space that was asked for before the first byte, [`RECOVERY_DEADLINE`], [`TOOL_DEADLINE`], 128 MB of shared memory.
//! Cancellation: the server is stopped and the directory emptied; there is no result then.

mod error;
mod examine;
pub mod pick;
pub mod scratch;
mod settings;
mod tool;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

pub use error::DrillError;
pub use scratch::Scratch;

use crate::catalog::verification::{DrillCheck, Outcome, Phase};
use crate::pg::instance::Installation;
use crate::restore::{Action, Moved, Resolved, Sources, place, restore};
use examine::{Examined, Subject, examine};

/// The longest recovery.
pub const RECOVERY_DEADLINE: Duration = Duration::from_secs(24 * 3600);
/// The longest look with one tool.
pub const TOOL_DEADLINE: Duration = Duration::from_secs(12 * 3600);

/// What a drill is done with.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The server's programs, of the base backup's major.
    pub installation: Installation,
    /// Whom to connect as: a superuser of the cluster.
    pub user: String,
    /// Where assertions are asked.
    pub database: String,
    /// SQL that has to return one row with one column that is true.
    pub assertions: Vec<String>,
}

/// What was seen.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// What was looked at.
    pub checks: Vec<DrillCheck>,
    /// Where the time went.
    pub phases: Vec<Phase>,
}

impl Seen {
    /// Adds something that was looked at.
    pub fn check(&mut self, check: &str, outcome: Outcome, found: impl Into<String>) {
        self.checks.push(DrillCheck { check: check.to_owned(), outcome, found: found.into() });
    }

    /// Adds a part that is over.
    pub fn phase(&mut self, phase: &str, since: Instant, bytes: u64) {
        self.phases.push(Phase { phase: phase.to_owned(), seconds: since.elapsed().as_secs_f64(), bytes });
    }

    /// [`Outcome::Failed`] where anything did.
    pub fn verdict(&self) -> Outcome {
        let failed = self.checks.iter().any(|check| check.outcome == Outcome::Failed);
        if failed { Outcome::Failed } else { Outcome::Passed }
    }
}

/// The programs that a base backup of this `server_version_num` needs: those in `bindir`, or those that are found.
///
/// # Errors
/// [`DrillError::Major`] naming the major that is needed; [`DrillError::Server`] where the directory holds none.
pub fn installation(server_version: u32, bindir: Option<&std::path::Path>) -> Result<Installation, DrillError> {
    let needed = server_version / 10_000;
    let found = match bindir {
        Some(bindir) => Installation::at(bindir)?,
        None => Installation::find(Some(needed)).map_err(|_| DrillError::NoMajor { needed })?,
    };
    if found.major != needed {
        let (found, at) = (found.version, found.bindir);
        return Err(DrillError::Major { needed, found, at });
    }
    Ok(found)
}

/// Restores into `scratch` and looks at what came out. What is wrong with it stands in what was seen; `scratch` is not emptied.
///
/// # Errors
/// [`DrillError::Stopped`]; what has nothing to do with the archive, such as a full disk.
pub async fn drill(
    sources: &Arc<Sources>,
    resolved: &Resolved,
    scratch: &Scratch,
    setup: Setup,
    restore_command: &str,
    progress: &(dyn Fn(u64) + Sync),
    stop: &CancellationToken,
) -> Result<Seen, DrillError> {
    let plan = &resolved.plan;
    let mut seen = Seen::default();
    let data = scratch.data();
    let spaces = scratch.tablespaces()?;
    let moved: Vec<Moved> = plan
        .base
        .tablespaces
        .iter()
        .map(|space| Moved { old: space.oid.to_string(), new: spaces.join(space.oid.to_string()) })
        .collect();
    let destination = place::look(&data, &moved, &plan.base)?;
    let begun = Instant::now();
    let restoring = restore(sources, resolved, &destination, Action::Pause, restore_command, progress);
    let restored = tokio::select! {
        biased;
        () = stop.cancelled() => return Err(DrillError::Stopped),
        restored = restoring => restored,
    };
    match restored {
        Ok(restored) => {
            seen.phase("restore", begun, restored.bytes);
            seen.check("restore", Outcome::Passed, format!("{} files, {} bytes", restored.files, restored.bytes));
        }
        // What may go better at the next try says nothing about the archive: a full disk, a repository that does not answer.
        Err(error) if error.is_retryable() => return Err(error.into()),
        Err(error) => {
            seen.phase("restore", begun, 0);
            seen.check("restore", Outcome::Failed, error.to_string());
            return Ok(seen);
        }
    }
    let subject = Subject {
        dir: scratch.dir().to_owned(),
        data,
        setup,
        stop_at: plan.stop,
        last_included: plan.last_included,
        wal_bytes: plan.fetch.wal_bytes,
        segment_size: plan.base.segment_size,
    };
    let stopping = stop.clone();
    let examined = tokio::task::spawn_blocking(move || examine(&subject, &stopping)).await;
    let Examined { checks, phases } = examined.map_err(|error| DrillError::Task(error.to_string()))??;
    seen.checks.extend(checks);
    seen.phases.extend(phases);
    Ok(seen)
}
