//! `lockstep cert`: what the processes of a run need to encrypt what they say to each other.

use std::path::PathBuf;

use clap::Args;
use protocol::problem::{Exit, Problem};

use super::print;
use crate::secret;
use crate::tls::FILE;

#[derive(Debug, Args)]
pub(crate) struct CertArgs {
    /// Where to write it, readable by its owner only
    #[arg(value_name = "FILE", default_value = "lockstep.pem")]
    file: PathBuf,
}

pub(crate) fn run(CertArgs { file }: &CertArgs) -> Result<Exit, Problem> {
    let text = transport::new_certificate()?;
    let shown = file.display();
    if !secret::make(file, &text, FILE, "lockstep cert FILE")? {
        return Err(Problem::usage(format!("{shown} exists already")).hint(
            "runs that use it would no longer find each other: choose another name, or delete it first",
        ));
    }
    print(&format!(
        "made {shown}: a certificate with its key; give every process of the run --tls and a copy of it\n"
    ))?;
    Ok(Exit::Done)
}
