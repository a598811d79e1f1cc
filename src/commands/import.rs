//! `lockstep import`: a run that starts from the weights of another program.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use protocol::problem::{Exit, Problem};

use super::print;
use crate::args::JobArgs;
use crate::warm_start::{ArrayArgs, WarmStart};

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// A safetensors file with PyTorch's names (docs/pytorch.md) or a .npz file with TensorFlow's (docs/cells.md); also a
    /// checkpoint or a run directory
    file: PathBuf,
    #[command(flatten)]
    arrays: ArrayArgs,
    #[command(flatten)]
    job: JobArgs,
}

pub(crate) fn run(args: &ImportArgs) -> Result<Exit, Problem> {
    let mut config = args.job.config()?;
    config.init_from = Some(Arc::new(WarmStart::new(args.file.clone(), args.arrays)));
    let run_dir = config.run_dir.clone();
    for notice in coordinator::create(config)? {
        print(&format!("{notice}\n"))?;
    }
    print(&format!("{} holds them as the state at step 0\n", run_dir.display()))?;
    Ok(Exit::Done)
}
