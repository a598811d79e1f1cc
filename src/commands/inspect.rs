//! `lockstep inspect`: the newest checkpoint of a run, with its hashes; and whether the run used the rows it should.

use std::path::PathBuf;

use clap::Args;
use coordinator::audit::{Audit, audit_run};
use coordinator::store::inspect::{Inspection, inspect};
use protocol::problem::{Exit, Problem};
use serde::Serialize;

use super::{RunArg, print};

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    run: RunArg,
    /// As one JSON object
    #[arg(long)]
    json: bool,
    /// Compute from the data which rows every step must have used, and compare
    #[arg(long)]
    audit: bool,
    /// Where the run's data lies now [default: where the run was told]
    #[arg(long, value_name = "DATA", requires = "audit")]
    data: Option<String>,
    /// Folder in which tinyshakespeare and mnist are looked for
    #[arg(long, value_name = "DIR", requires = "audit")]
    data_dir: Option<PathBuf>,
}

#[derive(Serialize)]
struct Audited<'a> {
    #[serde(flatten)]
    inspection: &'a Inspection,
    audit: &'a Audit,
}

pub(crate) fn run(args: &InspectArgs) -> Result<Exit, Problem> {
    let run_dir = args.run.resolve("lockstep inspect RUN_DIR")?;
    let inspection = inspect(&run_dir)?;
    if !args.audit {
        print(&if args.json { format!("{}\n", inspection.to_json()) } else { inspection.to_string() })?;
        return Ok(Exit::Done);
    }
    let audit = audit_run(&run_dir, args.data.as_deref(), args.data_dir.as_deref())?;
    if args.json {
        let audited = Audited { inspection: &inspection, audit: &audit };
        let json = serde_json::to_string_pretty(&audited).expect("plain values can be written as JSON");
        print(&format!("{json}\n"))?;
    } else {
        print(&format!("{inspection}\n"))?;
    }
    audit.verdict()?;
    if !args.json {
        print(&format!("{audit}\n"))?;
    }
    Ok(Exit::Done)
}
