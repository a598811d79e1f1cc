//! The options of a run: its job, who computes it, and what it starts from.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use coordinator::InitialParameters;
use protocol::handshake::Token;
use protocol::job::{JobFile, presets};
use protocol::problem::Problem;

use super::BUILD;
use crate::warm_start::{ArrayArgs, WarmStart};

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
    /// Write how the workers' time goes in this many steps, as a trace for ui.perfetto.dev: profile.json in the run directory
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=10_000), hide_default_value = true)]
    profile: u64,
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
            profile_steps: 0,
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
    pub(super) fn config(&self) -> Result<coordinator::Config, Problem> {
        let linger = Duration::from_secs(self.linger);
        let drain_timeout = Duration::from_secs(self.drain_timeout);
        Ok(coordinator::Config {
            json: self.json,
            linger,
            drain_timeout,
            profile_steps: self.profile,
            ..self.job.config_for(self.workers)?
        })
    }

    /// The same options as words of a command line.
    pub(crate) fn to_words(&self) -> Vec<OsString> {
        let mut words = self.job.to_words();
        words.extend(self.workers.map(|workers| word("--workers", workers.to_string())));
        words.push(word("--linger", self.linger.to_string()));
        words.push(word("--drain-timeout", self.drain_timeout.to_string()));
        words.push(word("--profile", self.profile.to_string()));
        words.extend(self.json.then(|| "--json".into()));
        words
    }

    /// The same for a run that has begun; its profile is over.
    pub(crate) fn to_words_again(&self) -> Vec<OsString> {
        let job = JobArgs { fresh: false, ..self.job.clone() };
        Self { job, profile: 0, ..self.clone() }.to_words()
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
    pub(super) change_learning_rate: Option<f64>,
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

    pub(super) fn init_from(&self) -> Result<Option<Arc<dyn InitialParameters>>, Problem> {
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Cli, Command, TrainArgs};
    use super::*;

    fn train(words: &str) -> TrainArgs {
        let cli = Cli::try_parse_from(["lockstep", "train"].into_iter().chain(words.split_whitespace()));
        match cli.unwrap().command {
            Command::Train(args) => args,
            other => panic!("{other:?}"),
        }
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
                     --workers 7 --set clip=none --set hidden_size=9 --fresh --json --linger 2 --drain-timeout 3 --profile 4 \
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
    fn a_setting_without_a_value_is_refused() {
        let problem = train("--set hidden_size").job.resolve().unwrap_err();
        assert_eq!(problem.sentence, "--set hidden_size has no '='");
    }
}
