//! The command line's words, and what they mean for the libraries.

mod run;

use std::net::{SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};
use kernels::Simd;
use kernels::cpu::simd::SimdError;
use protocol::job::MOST_THREADS;
use protocol::problem::Problem;
use worker::collective::Choice;

use crate::commands::bench::BenchArgs;
use crate::commands::cert::CertArgs;
use crate::commands::completions::CompletionsArgs;
use crate::commands::data::DataArgs;
use crate::commands::diff::DiffArgs;
use crate::commands::doctor::DoctorArgs;
use crate::commands::eval::EvalArgs;
use crate::commands::export::ExportArgs;
use crate::commands::import::ImportArgs;
use crate::commands::inspect::InspectArgs;
use crate::commands::man::ManArgs;
use crate::commands::sample::SampleArgs;
use crate::device::{Chosen, DeviceArg};
use crate::forecast::Estimate;
use crate::tls::TlsArg;
use crate::token::TokenArgs;
pub(crate) use run::{JobArgs, RunArgs, StartArgs, settings_of};

/// What this binary is: `0.1.0 (revision 1a2b3c4d5e6f, features: cpu)`.
pub(crate) const BUILD: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (revision ",
    env!("LOCKSTEP_REVISION"),
    ", features: ",
    env!("LOCKSTEP_FEATURES"),
    ")"
);

/// Where `lockstep coordinator` listens for workers.
pub(crate) const DEFAULT_LISTEN: &str = "127.0.0.1:7171";

/// Where `lockstep coordinator` serves status and metrics.
pub(crate) const DEFAULT_HTTP: &str = "127.0.0.1:7172";

/// Trains recurrent networks, data-parallel over worker processes: any fleet, the same bits.
#[derive(Debug, Parser)]
#[command(name = "lockstep", version = BUILD, after_help = EXIT_CODES, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 not usable, nothing was started; \
75 stopped on request, the same command goes on; 93 failed, and would fail again. \
Environment: LOCKSTEP_TOKEN (run token), LOCKSTEP_TLS (see --tls), LOCKSTEP_DATA_DIR (real data), LOCKSTEP_LOG (log filter).";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train on this machine: a coordinator and some workers
    Train(TrainArgs),
    /// Coordinate a run whose workers are started elsewhere
    Coordinator(CoordinatorArgs),
    /// Work for a coordinator; needs no data, no configuration and no disk
    Worker(WorkerArgs),
    /// Write text with a trained network
    Sample(SampleArgs),
    /// Evaluate a checkpoint on validation data
    Eval(EvalArgs),
    /// Show the newest checkpoint of a run, with its hashes
    Inspect(InspectArgs),
    /// Say whether two runs hold the same bits, and where they part
    Diff(DiffArgs),
    /// Write the parameters of a run as a safetensors file for PyTorch
    Export(ExportArgs),
    /// Make a run that starts from PyTorch's, TensorFlow's or Keras' weights, without training it
    Import(ImportArgs),
    /// Make the certificate with which the processes of a run encrypt what they say to each other
    Cert(CertArgs),
    /// List, verify or download the data sets that go by a name
    Data(DataArgs),
    /// Look at this machine: what a run would use, and what is in its way
    Doctor(DoctorArgs),
    /// Measure how fast this machine is, and how much of that a training step reaches
    Bench(BenchArgs),
    /// Print completions for a shell
    Completions(CompletionsArgs),
    /// Print the manual page, or write one for each command
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    pub(crate) job: RunArgs,
    #[command(flatten)]
    pub(crate) start: StartArgs,
    /// Threads per worker [default: an equal part of the cores]
    #[arg(long, value_name = "N", value_parser = thread_count())]
    pub(crate) threads: Option<usize>,
    #[command(flatten)]
    pub(crate) device: DeviceArg,
    #[command(flatten)]
    pub(crate) collective: CollectiveArg,
    #[command(flatten)]
    pub(crate) tls: TlsArg,
    /// Where status and metrics are served
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    pub(crate) http: SocketAddr,
}

#[derive(Debug, Args)]
pub(crate) struct CoordinatorArgs {
    #[command(flatten)]
    job: RunArgs,
    #[command(flatten)]
    start: StartArgs,
    /// Where workers connect
    #[arg(long, value_name = "HOST:PORT", default_value = DEFAULT_LISTEN)]
    listen: SocketAddr,
    /// Where status and metrics are served
    #[arg(long, value_name = "HOST:PORT", default_value = DEFAULT_HTTP)]
    http: SocketAddr,
    #[command(flatten)]
    token: TokenArgs,
    #[command(flatten)]
    tls: TlsArg,
    /// Written when both ports are bound, with their addresses
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Stop when standard input ends
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
    /// All workers will be on this machine, with this many threads each
    #[arg(long, value_name = "N", hide = true)]
    local_threads: Option<usize>,
}

impl CoordinatorArgs {
    pub(crate) fn config(&self) -> Result<coordinator::Config, Problem> {
        let (init_from, tls) = (self.start.init_from()?, self.tls.resolve()?);
        // A token file is made for a job that can be used.
        let of_job = self.job.config()?;
        Ok(coordinator::Config {
            init_from,
            change_learning_rate: self.start.change_learning_rate,
            forecast: Some(Arc::new(Estimate::new(self.local_threads))),
            listen: self.listen,
            http: self.http,
            token: self.token.read_or_make()?,
            tls,
            ready_file: self.ready_file.clone(),
            ..of_job
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    /// The coordinator's control port
    #[arg(long, value_name = "HOST:PORT", env = "LOCKSTEP_COORDINATOR")]
    coordinator: String,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = thread_count())]
    threads: Option<usize>,
    #[command(flatten)]
    device: DeviceArg,
    #[command(flatten)]
    collective: CollectiveArg,
    #[command(flatten)]
    simd: SimdArg,
    /// Name for people [default: host name and process id]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Host at which other workers reach this one [default: the address of the control connection]
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
    /// Serve this worker's own metrics here
    #[arg(long, value_name = "HOST:PORT")]
    metrics: Option<SocketAddr>,
    /// Without its coordinator a worker keeps what it holds for so long, then it exits 75 [default: what the run says, 600]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=604_800))]
    park_timeout: Option<u64>,
    #[command(flatten)]
    token: TokenArgs,
    #[command(flatten)]
    tls: TlsArg,
    /// Leave it to the coordinator to say what went wrong
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

impl WorkerArgs {
    pub(crate) fn config(&self) -> Result<worker::Config, Problem> {
        check_address(&self.coordinator)?;
        Ok(worker::Config {
            coordinator: self.coordinator.clone(),
            name: self.name.clone().unwrap_or_else(default_name),
            token: self.token.read()?,
            tls: self.tls.resolve()?,
            advertise: self.advertise.clone(),
            metrics: self.metrics,
            collective: self.tls.restrict(self.collective.resolve()?)?,
            park_timeout: self.park_timeout.map(Duration::from_secs),
            build: BUILD.to_owned(),
        })
    }

    /// What computes; on a CPU, with which instructions and how many threads.
    pub(crate) fn device(&self) -> Result<(Chosen, Simd, usize), Problem> {
        Ok((self.device.resolve()?, self.simd.resolve()?, self.threads.unwrap_or_else(cores)))
    }
}

/// Checks that a worker can look for its coordinator at all: it tries again for as long as nobody answers there.
fn check_address(address: &str) -> Result<(), Problem> {
    let is_port = |port: &str| {
        port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse().is_ok_and(|port: u16| port > 0)
    };
    let is_host = |host: &str| !host.is_empty() && !host.contains(|c: char| c == ':' || c.is_whitespace());
    let is_usable = address.rsplit_once(':').is_some_and(|(host, port)| {
        is_port(port)
            && (is_host(host) && !host.contains(['[', ']']) || address.parse::<SocketAddrV6>().is_ok())
    });
    match is_usable {
        true => Ok(()),
        false => Err(Problem::usage(format!("the coordinator's address '{address}' is not HOST:PORT"))
            .hint("for example 10.0.0.1:7171")),
    }
}

/// Which instructions compute.
#[derive(Debug, Args)]
pub(crate) struct SimdArg {
    /// Vector instructions: amx, avx512, avx2 or portable [default: the best there is; the bits are the same]
    #[arg(long, value_name = "LEVEL")]
    simd: Option<String>,
}

impl SimdArg {
    /// Whether a level was asked for.
    pub(crate) fn is_given(&self) -> bool {
        self.simd.is_some()
    }

    /// The level that was asked for, else the best of this CPU.
    pub(crate) fn resolve(&self) -> Result<Simd, Problem> {
        self.simd.as_deref().map_or_else(
            || Ok(Simd::detect()),
            |level| level.parse().map_err(|e: SimdError| Problem::usage(format!("--simd: {e}"))),
        )
    }
}

/// How gradients travel.
#[derive(Debug, Args)]
pub(crate) struct CollectiveArg {
    /// How gradients travel between workers: auto, tcp or nccl; the bits are the same [auto: nccl between CUDA devices
    /// where all workers have it, else tcp]
    #[arg(long, value_name = "HOW", default_value = "auto")]
    collective: String,
}

impl CollectiveArg {
    pub(crate) fn resolve(&self) -> Result<Choice, Problem> {
        self.collective.parse().map_err(|error| Problem::usage(format!("--collective: {error}")))
    }

    /// The same option as a word of a command line.
    pub(crate) fn to_word(&self) -> String {
        format!("--collective={}", self.collective)
    }
}

/// More threads than any machine has cores would only wait for each other.
pub(crate) fn thread_count() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=MOST_THREADS)
}

/// Host name and process id.
fn default_name() -> String {
    let host = rustix::system::uname();
    format!("{}-{}", host.nodename().to_string_lossy(), std::process::id())
}

/// Cores of this machine.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_names_revision_and_features() {
        let version = Cli::try_parse_from(["lockstep", "--version"]).unwrap_err().to_string();
        assert_eq!(version, Cli::try_parse_from(["lockstep", "-V"]).unwrap_err().to_string());
        assert_eq!(version, format!("lockstep {BUILD}\n"));
        let (revision, features) = BUILD
            .strip_prefix(concat!(env!("CARGO_PKG_VERSION"), " (revision "))
            .and_then(|rest| rest.strip_suffix(')')?.split_once(", features: "))
            .unwrap();
        let is_commit = revision.len() >= 12 && revision.chars().all(|char| char.is_ascii_hexdigit());
        assert!(is_commit || revision == "unknown", "{revision}");
        assert!(features.split(' ').any(|feature| feature == "cpu"), "{features}");
    }

    #[test]
    fn a_coordinator_has_a_host_and_a_port() {
        for address in ["127.0.0.1:1", "node-1.cluster:65535", "[::1]:7171", "[fe80::1%2]:7171"] {
            check_address(address).unwrap();
        }
        for address in [
            "",
            "host",
            "host:",
            ":7171",
            "host:0",
            "host:65536",
            "host:+1",
            "host:http",
            "::1:7171",
            "::1",
            "[::1]",
            "[::1]:0",
            "[host]:1",
            "a b:1",
            "http://host:1",
        ] {
            let problem = check_address(address).unwrap_err();
            let sentence = format!("the coordinator's address '{address}' is not HOST:PORT");
            assert_eq!(problem.sentence, sentence);
            assert_eq!(problem.hint.as_deref(), Some("for example 10.0.0.1:7171"));
        }
    }
}
