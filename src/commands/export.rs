//! `lockstep export`: the parameters of a run for other programs.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use coordinator::store::files::write_atomic;
use coordinator::store::torch::to_torch;
use protocol::problem::{Exit, Problem};

use super::CheckpointArg;

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// For which program
    #[arg(long, value_enum, default_value_t = Program::Torch)]
    to: Program,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace the file if it is there
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Program {
    /// A safetensors file with PyTorch's names, see docs/pytorch.md
    Torch,
}

pub(crate) fn run(args: &ExportArgs) -> Result<Exit, Problem> {
    let out = args.out.display();
    let checkpoint = args.checkpoint.load("lockstep export RUN_DIR --out FILE")?.checkpoint;
    if args.out.is_dir() || args.out.file_name().is_none() {
        return Err(
            Problem::usage(format!("{out} is a folder")).hint("name a file in it: --out FILE.safetensors")
        );
    }
    if args.out.exists() && !args.force {
        return Err(Problem::usage(format!("{out} is there already"))
            .hint("name another --out FILE, or give --force"));
    }
    let Program::Torch = args.to;
    write_atomic(&args.out, &to_torch(&checkpoint))?;
    let parameters = checkpoint.image.layout().parameters();
    let step = checkpoint.image.progress().step;
    println!("{out}: {parameters} parameters after {step} steps, under PyTorch's names");
    Ok(Exit::Done)
}
