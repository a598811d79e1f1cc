//! The run's certificate with its key: from a file that nobody else can read.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use protocol::problem::Problem;
use transport::Tls;
use worker::collective::Choice;

use crate::secret::{self, Kind};

pub(crate) const FILE: Kind = Kind {
    name: "certificate file",
    content: "certificate",
    hint: "`lockstep cert FILE` makes one; give every process of the run a copy of it",
    limit_bytes: 65_536,
};

/// Whether what the processes of a run say to each other is encrypted.
#[derive(Debug, Args)]
pub(crate) struct TlsArg {
    /// Encrypt with this file of `lockstep cert`, the same for every process of the run
    #[arg(long, value_name = "FILE", env = "LOCKSTEP_TLS")]
    tls: Option<PathBuf>,
}

impl TlsArg {
    pub(crate) fn resolve(&self) -> Result<Option<Tls>, Problem> {
        self.tls.as_deref().map(read).transpose()
    }

    /// The same option as words of a command line.
    pub(crate) fn to_words(&self) -> Vec<OsString> {
        self.tls.iter().flat_map(|path| ["--tls".into(), path.clone().into_os_string()]).collect()
    }

    /// How gradients travel where this was chosen: NCCL encrypts nothing.
    pub(crate) fn restrict(&self, chosen: Choice) -> Result<Choice, Problem> {
        match chosen {
            _ if self.tls.is_none() => Ok(chosen),
            Choice::Auto | Choice::Tcp => Ok(Choice::Tcp),
            Choice::Nccl => Err(Problem::usage("--collective nccl encrypts nothing, and --tls asks for it")
                .hint("leave one of them out; with --tls gradients travel by tcp")),
        }
    }
}

fn read(path: &Path) -> Result<Tls, Problem> {
    transport::available()?;
    Tls::from_pem(&secret::read(path, FILE)?, &format!("the certificate file {}", path.display()))
}
