//! `lockstep inspect`: the newest checkpoint of a run, with its hashes.

use clap::Args;
use protocol::problem::{Exit, Problem};

use super::{RunArg, print};

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    run: RunArg,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &InspectArgs) -> Result<Exit, Problem> {
    let inspection = coordinator::store::inspect::inspect(&args.run.resolve("lockstep inspect RUN_DIR")?)?;
    print(&if args.json { format!("{}\n", inspection.to_json()) } else { inspection.to_string() })?;
    Ok(Exit::Done)
}
