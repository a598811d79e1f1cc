//! The command line's words, and what they mean for the libraries.

use std::ffi::OsString;
use std::net::{SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};
use coordinator::InitialParameters;
use kernels::Simd;
use kernels::cpu::simd::SimdError;
use protocol::handshake::Token;
use protocol::job::{JobFile, MOST_THREADS, presets};
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
use crate::warm_start::{ArrayArgs, WarmStart};

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

/// What is to be computed, and where it is written.
#[derive(Debug, Clone, Args)]
pub(crate) struct JobArgs {
    /// char-lstm, char-gru, char-lstm-512, mnist-rnn, mnist-lstm, mnist-gru or classify-text
    #[arg(default_value = "char-lstm")]
    preset: String,
    /// Data: embedded, tinyshakespeare, mnist, or the path of a file of text or labelled lines, or of a folder with the MNIST files
    #[arg(long, value_name = "DATA")]
    data: Option<String>,
    /// The one folder of tinyshakespeare and mnist [default: LOCKSTEP_DATA_DIR, then the user's cache]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where the run is written; an existing run of the same job goes on [default: runs/PRESET, or runs/PRESET-DATA]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Stop after this many steps
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Stop after this many passes over the data
    #[arg(long, value_name = "N")]
    epochs: Option<u64>,
    /// Seed of initial parameters, sample order and dropout
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Parts of every batch: the largest fleet that can share the work
    #[arg(long, value_name = "N")]
    shards: Option<u32>,
    /// Change any key of the job, e.g. hidden_size=256 (may be repeated)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// A job file in TOML, laid over the preset
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Delete what the run directory holds and start over
    #[arg(long)]
    fresh: bool,
}

/// A job, who computes it, and what is shown of it on the way.
#[derive(Debug, Clone, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Number of workers
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// Show JSON lines
    #[arg(long)]
    json: bool,
    /// Serve status and metrics for this many seconds after the end, for a last scrape
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub(crate) linger: u64,
    /// When asked to stop, finish the step and write the state within this many seconds, or stop without
    #[arg(long, value_name = "SECONDS", default_value_t = 25, value_parser = clap::value_parser!(u64).range(..=86_400))]
    drain_timeout: u64,
}

impl JobArgs {
    /// The job file that these options mean, for so many workers if that is said.
    fn resolve(&self, workers: Option<u32>) -> Result<JobFile, Problem> {
        let text = self.config.as_deref().map(read_job_file).transpose()?;
        let mut settings = settings_of(&self.settings)?;
        // Whoever asks for a number of steps means that number, whatever number of epochs the preset has.
        let epochs = self.epochs.or(self.steps.map(|_| 0));
        let options = [
            ("run.data", self.data.as_ref().map(|data| toml::Value::String(data.clone()).to_string())),
            ("run.epochs", epochs.map(|n| n.to_string())),
            ("run.steps", self.steps.map(|n| n.to_string())),
            ("job.seed", self.seed.map(|n| n.to_string())),
            ("job.shards", self.shards.map(|n| n.to_string())),
            ("fleet.workers", workers.map(|n| n.to_string())),
        ];
        settings.extend(options.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))));
        JobFile::resolve(&self.preset, text.as_deref(), &settings)
    }

    /// A coordinator of this job that nobody can reach yet.
    pub(crate) fn config(&self) -> Result<coordinator::Config, Problem> {
        self.config_for(None)
    }

    fn config_for(&self, workers: Option<u32>) -> Result<coordinator::Config, Problem> {
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        Ok(coordinator::Config {
            preset: self.preset.clone(),
            file: self.resolve(workers)?,
            run_dir: self.run_dir(),
            fresh: self.fresh,
            init_from: None,
            change_learning_rate: None,
            forecast: None,
            data_dir: self.data_dir.clone(),
            listen: nowhere,
            http: nowhere,
            token: Token::new(""),
            tls: None,
            ready_file: None,
            linger: Duration::ZERO,
            drain_timeout: Duration::ZERO,
            json: false,
            build: BUILD.to_owned(),
        })
    }

    fn run_dir(&self) -> PathBuf {
        let name = match self.data.as_deref().and_then(|data| Path::new(data).file_stem()) {
            // Runs of one preset over other data are other runs.
            Some(data) if data != "embedded" => format!("{}-{}", self.preset, data.display()),
            _ => self.preset.clone(),
        };
        self.run_dir.clone().unwrap_or_else(|| Path::new("runs").join(name))
    }

    fn to_words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec![self.preset.clone().into()];
        let mut push =
            |name: &str, value: Option<OsString>| words.extend(value.map(|value| word(name, value)));
        push("--data", self.data.clone().map(Into::into));
        push("--data-dir", self.data_dir.clone().map(Into::into));
        push("--run-dir", self.run_dir.clone().map(Into::into));
        push("--config", self.config.clone().map(Into::into));
        for (name, number) in [("--steps", self.steps), ("--epochs", self.epochs), ("--seed", self.seed)] {
            push(name, number.map(|n| n.to_string().into()));
        }
        push("--shards", self.shards.map(|n| n.to_string().into()));
        for setting in &self.settings {
            push("--set", Some(setting.into()));
        }
        words.extend(self.fresh.then(|| "--fresh".into()));
        words
    }
}

impl RunArgs {
    /// The job file that these options mean.
    pub(crate) fn resolve(&self) -> Result<JobFile, Problem> {
        self.job.resolve(self.workers)
    }

    /// A coordinator of this run that nobody can reach yet.
    fn config(&self) -> Result<coordinator::Config, Problem> {
        let linger = Duration::from_secs(self.linger);
        let drain_timeout = Duration::from_secs(self.drain_timeout);
        Ok(coordinator::Config {
            json: self.json,
            linger,
            drain_timeout,
            ..self.job.config_for(self.workers)?
        })
    }

    /// The same options as words of a command line.
    pub(crate) fn to_words(&self) -> Vec<OsString> {
        let mut words = self.job.to_words();
        words.extend(self.workers.map(|workers| word("--workers", workers.to_string())));
        words.push(word("--linger", self.linger.to_string()));
        words.push(word("--drain-timeout", self.drain_timeout.to_string()));
        words.extend(self.json.then(|| "--json".into()));
        words
    }

    /// The same for a run that has begun.
    pub(crate) fn to_words_again(&self) -> Vec<OsString> {
        let job = JobArgs { fresh: false, ..self.job.clone() };
        Self { job, ..self.clone() }.to_words()
    }
}

/// `--name=value`, in one word so that a value may begin with a dash.
fn word(name: &str, value: impl Into<OsString>) -> OsString {
    let mut word = OsString::from(name);
    word.push("=");
    word.push(value.into());
    word
}

/// What a run starts or goes on from, besides its seed and its newest checkpoint.
#[derive(Debug, Clone, Args)]
pub(crate) struct StartArgs {
    /// Start from the parameters of another run, of a checkpoint, or of a file from PyTorch or TensorFlow, see import
    #[arg(long, value_name = "RUN|FILE")]
    init_from: Option<PathBuf>,
    #[command(flatten)]
    arrays: ArrayArgs,
    /// Go on from the newest checkpoint with another learning rate; an event of the run
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    change_learning_rate: Option<f64>,
}

impl StartArgs {
    /// The same options as words of a command line.
    pub(crate) fn to_words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        if let Some(path) = &self.init_from {
            words.push(word("--init-from", path));
        }
        words.extend(self.arrays.to_words().into_iter().map(OsString::from));
        if let Some(rate) = self.change_learning_rate {
            words.push(word("--change-learning-rate", rate.to_string()));
        }
        words
    }

    fn init_from(&self) -> Result<Option<Arc<dyn InitialParameters>>, Problem> {
        match &self.init_from {
            Some(path) => Ok(Some(Arc::new(WarmStart::new(path.clone(), self.arrays)))),
            None if self.arrays.is_empty() => Ok(None),
            None => Err(Problem::usage(
                "--gates and --forget-bias are about a file to start from, but none is named",
            )
            .hint("give --init-from FILE.npz with them")),
        }
    }
}

fn read_job_file(path: &Path) -> Result<String, Problem> {
    std::fs::read_to_string(path).map_err(|error| {
        let presets: Vec<String> = presets().into_iter().map(|(name, _)| name).collect();
        Problem::usage(format!("cannot read the job file {}: {error}", path.display()))
            .hint(format!("--config takes a TOML file; presets are named without it: {}", presets.join(", ")))
    })
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

/// The keys and values of `--set`.
pub(crate) fn settings_of(words: &[String]) -> Result<Vec<(String, String)>, Problem> {
    let parse = |word: &String| {
        let (key, value) = word.split_once('=').ok_or_else(|| {
            Problem::usage(format!("--set {word} has no '='")).hint("write --set KEY=VALUE")
        })?;
        Ok((key.trim().to_owned(), value.to_owned()))
    };
    words.iter().map(parse).collect()
}

/// Which instructions compute.
#[derive(Debug, Args)]
pub(crate) struct SimdArg {
    /// Vector instructions: avx512, avx2 or portable [default: the best there is; the bits are the same]
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

    fn train(words: &str) -> TrainArgs {
        let cli = Cli::try_parse_from(["lockstep", "train"].into_iter().chain(words.split_whitespace()));
        match cli.unwrap().command {
            Command::Train(args) => args,
            other => panic!("{other:?}"),
        }
    }

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
    fn no_argument_means_the_default_preset() {
        let args = train("");
        assert_eq!(args.job.job.run_dir(), Path::new("runs/char-lstm"));
        for (words, dir) in [
            ("mnist-rnn --data embedded", "runs/mnist-rnn"),
            ("mnist-rnn --data mnist", "runs/mnist-rnn-mnist"),
            ("--data /texts/war.txt", "runs/char-lstm-war"),
            ("--data ..", "runs/char-lstm"),
            ("--data mnist --run-dir x", "x"),
        ] {
            assert_eq!(train(words).job.job.run_dir(), Path::new(dir));
        }
        assert_eq!(args.job.resolve().unwrap(), JobFile::resolve("char-lstm", None, &[]).unwrap());
    }

    #[test]
    fn a_number_of_steps_is_not_cut_by_the_presets_epochs() {
        let run = train("mnist-gru --steps 200").job.resolve().unwrap().run;
        assert_eq!((run.steps, run.epochs), (200, 0));
        let run = train("mnist-gru --steps 200 --epochs 3").job.resolve().unwrap().run;
        assert_eq!((run.steps, run.epochs), (200, 3));
    }

    #[test]
    fn options_survive_the_way_to_the_coordinator() {
        let words = "mnist-rnn --data x=y.txt --data-dir=-d --run-dir=-r=s --steps 3 --epochs 4 --seed 5 --shards 6 \
                     --workers 7 --set clip=none --set hidden_size=9 --fresh --json --linger 2 --drain-timeout 3 \
                     --init-from=-a --change-learning-rate=-1e-5";
        let TrainArgs { job: args, start, .. } = train(words);
        let words = args.to_words().into_iter().chain(start.to_words());
        let again: Vec<OsString> =
            ["lockstep".into(), "coordinator".into()].into_iter().chain(words).collect();
        let Command::Coordinator(copy) = Cli::try_parse_from(again).unwrap().command else { panic!() };
        assert_eq!(format!("{:?}", copy.job), format!("{args:?}"));
        assert_eq!(format!("{:?}", copy.start), format!("{start:?}"));
        assert_eq!(copy.job.resolve().unwrap().run.data, "x=y.txt");
        assert_eq!(copy.job.job.run_dir(), Path::new("-r=s"));
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

    #[test]
    fn a_setting_without_a_value_is_refused() {
        let problem = train("--set hidden_size").job.resolve().unwrap_err();
        assert_eq!(problem.sentence, "--set hidden_size has no '='");
    }
}
