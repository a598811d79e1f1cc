//! `lockstep diff`: whether two runs hold the same bits, and where they part.

use std::path::PathBuf;

use clap::Args;
use coordinator::store::diff::diff;
use protocol::problem::{Exit, Problem};

use super::print;

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// A run directory, or a checkpoint file
    a: PathBuf,
    /// Another one
    b: PathBuf,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

/// Like the program of this name: 0 for equal, 1 for different, 2 for any trouble.
pub(crate) fn run(args: &DiffArgs) -> Result<Exit, Problem> {
    compare(args).map_err(|problem| Problem { exit: Exit::Usage, ..problem })
}

fn compare(args: &DiffArgs) -> Result<Exit, Problem> {
    let diff = diff(&args.a, &args.b)?;
    print(&if args.json { format!("{}\n", diff.to_json()) } else { diff.to_string() })?;
    Ok(if diff.bit_equal { Exit::Done } else { Exit::Failed })
}
