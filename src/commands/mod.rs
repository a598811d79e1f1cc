//! The commands besides training: what a run has left, and what is around the program itself. Each file has its words
//! and what it does.

pub(crate) mod completions;
pub(crate) mod doctor;
pub(crate) mod inspect;
pub(crate) mod man;

use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use clap::Args;
use protocol::problem::Problem;

/// Writes to standard output. A reader that has seen enough, such as `head`, is no failure.
pub(crate) fn print(text: &str) -> Result<(), Problem> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Problem::failed(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

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
