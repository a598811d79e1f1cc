//! The commands besides training: what a run has left, and what is around the program itself. Each file has its words
//! and what it does.

pub(crate) mod bench;
pub(crate) mod cert;
pub(crate) mod completions;
pub(crate) mod data;
pub(crate) mod diff;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod man;
pub(crate) mod sample;

use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use clap::Args;
use coordinator::store::load::{Loaded, load};
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

/// Writes a line to standard error. That nobody can read it any more is no failure.
pub(crate) fn note(text: &str) {
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
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
        self.run_dir.clone().map_or_else(|| newest_run(usage), Ok)
    }
}

/// Which checkpoint a command uses.
#[derive(Debug, Args)]
pub(crate) struct CheckpointArg {
    /// A run directory, whose newest checkpoint is used, or a checkpoint file [default: the newest run below runs/]
    #[arg(value_name = "RUN_DIR")]
    path: Option<PathBuf>,
}

impl CheckpointArg {
    /// The checkpoint; newer ones that were passed over are named on standard error. `usage` as for
    /// [`RunArg::resolve`].
    pub(crate) fn load(&self, usage: &str) -> Result<Loaded, Problem> {
        let loaded = load(&self.path.clone().map_or_else(|| newest_run(usage), Ok)?)?;
        for skipped in &loaded.skipped {
            note(&format!("note: passed over {skipped}"));
        }
        Ok(loaded)
    }
}

/// The run below `runs/` with the newest checkpoint.
fn newest_run(usage: &str) -> Result<PathBuf, Problem> {
    let newest = std::fs::read_dir("runs").ok().and_then(|entries| {
        entries
            .flatten()
            .filter_map(|entry| {
                Some((entry.path().join("latest").symlink_metadata().ok()?.modified().ok()?, entry.path()))
            })
            .max()
    });
    newest
        .map(|(_, path)| path)
        .ok_or_else(|| Problem::usage("there is no run with a checkpoint below runs/").hint(usage))
}
