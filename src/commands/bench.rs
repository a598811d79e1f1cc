//! `lockstep bench`: how fast this machine is, and how much of that training reaches. The measuring is in `benches`.

mod kernels;
mod roofline;
mod step;

use std::time::Instant;

use clap::{Args, Subcommand};
use protocol::problem::{Exit, Problem};

use kernels::KernelsArgs;
use roofline::RooflineArgs;
use step::StepArgs;

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Multiply-adds in registers, the product of two 1024 x 1024 matrices beside them, and memory
    Roofline(RooflineArgs),
    /// Whole training steps, with batches from memory
    Step(StepArgs),
    /// Each kernel of a training step alone, on one thread
    Kernels(KernelsArgs),
}

pub(crate) fn run(args: &BenchArgs) -> Result<Exit, Problem> {
    let started = Instant::now();
    match &args.what {
        What::Roofline(args) => roofline::run(args),
        What::Step(args) => step::run(args, started),
        What::Kernels(args) => kernels::run(args),
    }
}

/// To four decimals.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// `1 thread`, `2 threads`.
fn counted(count: usize, of: &str) -> String {
    if count == 1 { format!("1 {of}") } else { format!("{count} {of}s") }
}
