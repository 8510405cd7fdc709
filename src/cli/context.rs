use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::args::Global;
use super::logging::Collected;
use super::output::Output;
use crate::cli::CliError;
use crate::config::{self, Config};

/// What every command is given.
#[derive(Debug)]
pub struct Context {
    /// The options every command has.
    pub global: Global,
    /// Where results and progress go.
    pub output: Output,
    /// What a helper logs, until a hook takes it to its own stderr.
    pub log: Collected,
    config: OnceLock<Arc<Config>>,
}

impl Context {
    pub(super) fn new(global: Global) -> Context {
        let output = Output::new(global.json, global.quiet);
        Context { global, output, log: Collected::default(), config: OnceLock::new() }
    }

    /// The configuration, read at the first call: `init` and `demo` work without one.
    pub fn config(&self) -> Result<Arc<Config>, CliError> {
        if let Some(config) = self.config.get() {
            return Ok(Arc::clone(config));
        }
        let loaded = Arc::new(Config::load(&self.config_file()?)?);
        Ok(Arc::clone(self.config.get_or_init(|| loaded)))
    }

    /// The configuration file that `--config`, the environment or the usual places name.
    pub fn config_file(&self) -> Result<PathBuf, CliError> {
        let environment = std::env::var_os(config::ENVIRONMENT_VARIABLE);
        Ok(config::locate(self.global.config.as_deref(), environment, Path::exists)?)
    }

    /// `--cluster`, if given.
    pub fn cluster_name(&self) -> Option<&str> {
        self.global.cluster.as_deref()
    }

    /// `--repository`, if given.
    pub fn repository_name(&self) -> Option<&str> {
        self.global.repository.as_deref()
    }
}
