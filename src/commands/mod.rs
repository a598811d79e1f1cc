//! The commands that read what a run has left: each file has its words and what it does.

pub(crate) mod data;
pub(crate) mod inspect;

use std::path::PathBuf;

use clap::Args;
use protocol::problem::Problem;

/// Which run a command reads.
#[derive(Debug, Args)]
pub(crate) struct RunArg {
    /// The run directory [default: the newest below runs/]
    run_dir: Option<PathBuf>,
}

impl RunArg {
    /// The directory. `usage` is how the command is given one: `lockstep inspect RUN_DIR`.
    pub(crate) fn resolve(&self, usage: &str) -> Result<PathBuf, Problem> {
        if let Some(dir) = &self.run_dir {
            return Ok(dir.clone());
        }
        let newest = std::fs::read_dir("runs").ok().and_then(|entries| {
            entries
                .flatten()
                .filter_map(|entry| {
                    Some((
                        entry.path().join("latest").symlink_metadata().ok()?.modified().ok()?,
                        entry.path(),
                    ))
                })
                .max()
        });
        newest
            .map(|(_, path)| path)
            .ok_or_else(|| Problem::usage("there is no run with a checkpoint below runs/").hint(usage))
    }
}
