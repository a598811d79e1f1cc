//! `lockstep eval`: loss and accuracy of a checkpoint on validation data, with the bits that training records.

use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use coordinator::data::vocabulary::Vocabulary;
use coordinator::data::{self, Dataset};
use coordinator::store::checkpoint::Checkpoint;
use coordinator::store::load::Loaded;
use coordinator::store::run_dir::StoredRun;
use model::device::{Backend, DeviceError};
use model::evaluate::evaluate;
use protocol::job::{JobFile, RunSpec, Task};
use protocol::layout::{ModelShape, Progress};
use protocol::problem::{Exit, Problem};
use protocol::schedule::Work;
use protocol::sums::StepSums;
use serde_json::json;

use super::{CheckpointArg, print};
use crate::args::{SimdArg, cores, thread_count};
use crate::device::{DeviceArg, WithBackend, open};

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Other data of the same kind; its validation part is read [default: the run's]
    #[arg(long, value_name = "DATA")]
    data: Option<String>,
    /// The one folder of tinyshakespeare and mnist [default: LOCKSTEP_DATA_DIR, then the user's cache]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = thread_count())]
    threads: Option<usize>,
    #[command(flatten)]
    device: DeviceArg,
    #[command(flatten)]
    simd: SimdArg,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &EvalArgs) -> Result<Exit, Problem> {
    let (device, simd) = (args.device.resolve()?, args.simd.resolve()?);
    let loaded = args.checkpoint.load("lockstep eval RUN_DIR")?;
    let checkpoint = &loaded.checkpoint;
    let (job, image) = (&checkpoint.job, &checkpoint.image);
    let mut data = data::open(job, &args.run_spec(&loaded)?, args.data_dir.as_deref())?;
    check_fits(checkpoint, &*data)?;

    let threads = args.threads.unwrap_or_else(cores);
    let (sums, seconds) = device
        .run(simd, threads, Evaluating { checkpoint, data: &mut *data })
        .map_err(|error| Problem::failed(error.to_string()))?;

    let facts = data.facts();
    let evaluation = Evaluation {
        checkpoint: loaded.path.display().to_string(),
        progress: image.progress(),
        data: facts.name.clone(),
        is_data_of_run: facts.digest == checkpoint.data_digest,
        task: job.task,
        sums,
        seconds,
    };
    if args.json {
        print(&format!("{}\n", evaluation.to_json()))?;
    } else {
        print(&evaluation.to_string())?;
    }
    Ok(Exit::Done)
}

/// What is to be evaluated; gives the sums, and the seconds that it took.
struct Evaluating<'a> {
    checkpoint: &'a Checkpoint,
    data: &'a mut dyn Dataset,
}

impl WithBackend for Evaluating<'_> {
    type Output = Result<(StepSums, f64), DeviceError>;

    fn with<B: Backend>(self, backend: B) -> Self::Output {
        let Self { checkpoint: Checkpoint { job, image, .. }, data } = self;
        let (mut device, parameters) = open(&backend, job, image, data.shape().seq_len)?;
        let (started, step) = (Instant::now(), image.progress().step);
        let work = (0..data.shape().schedule.evaluation_batches).map(|index| Work::Evaluate { step, index });
        let batches = work.map(|work| data.batch(work, 0..job.shards));
        let sums = evaluate(&mut device, image.layout(), &parameters, batches)?;
        Ok((sums, started.elapsed().as_secs_f64()))
    }
}

impl EvalArgs {
    /// Which data. Nothing else of a `[run]` matters here, so that one of another version is as good when the data are
    /// named.
    fn run_spec(&self, loaded: &Loaded) -> Result<RunSpec, Problem> {
        Ok(match (&loaded.run_dir, &self.data) {
            (_, Some(data)) => {
                RunSpec { data: data.clone(), ..JobFile::resolve("char-lstm", None, &[])?.run }
            }
            (Some(run_dir), None) => StoredRun::of(run_dir)?.settings(run_dir)?,
            (None, None) => {
                return Err(Problem::usage(format!(
                    "{} lies in no run directory, which would say what its data is",
                    loaded.path.display()
                ))
                .hint("name the data with --data"));
            }
        })
    }
}

/// Checks that the network can read the data.
fn check_fits(checkpoint: &Checkpoint, data: &dyn Dataset) -> Result<(), Problem> {
    let (network, facts) = (&checkpoint.image.layout().shape, data.facts());
    let vocabulary = |characters: &mut dyn Iterator<Item = char>| Vocabulary::new(characters);
    let mut differences = Vec::new();
    if let (Some(known), Some(read)) = (&checkpoint.vocabulary, &facts.vocabulary) {
        let (known, read) = (vocabulary(&mut known.chars()), vocabulary(&mut read.iter().copied()));
        let (unknown, unread) = (read.without(&known), known.without(&read));
        if !unknown.is_empty() {
            differences.push(format!("the network has never seen {unknown}"));
        }
        if !unread.is_empty() {
            differences.push(format!("the data lacks {unread}"));
        }
        if differences.is_empty() && known != read {
            differences.push("the characters have another order".to_owned());
        }
    }
    if checkpoint.labels.is_some() && facts.labels.is_some() && checkpoint.labels != facts.labels {
        differences.push("it tells other labels apart".to_owned());
    }
    let shape = &data.shape().model;
    if differences.is_empty() {
        let widths = [
            ("inputs", input_width(network), input_width(shape)),
            ("classes", network.classes, shape.classes),
        ];
        for (what, known, read) in widths {
            if known != read {
                differences.push(format!("the network has {known} {what}, the data {read}"));
            }
        }
    }
    if !differences.is_empty() {
        return Err(Problem::usage(format!(
            "{} does not fit the network: {}",
            facts.name,
            differences.join("; ")
        ))
        .hint("evaluate on the data of the run, or on other data with the same characters and classes"));
    }
    if facts.validation_samples == 0 {
        return Err(Problem::usage(format!(
            "the validation part of {} is shorter than one batch: there is nothing to evaluate",
            facts.name
        )));
    }
    Ok(())
}

/// Different tokens, or bytes of a row.
fn input_width(shape: &ModelShape) -> usize {
    shape.input.tokens().unwrap_or_else(|| shape.input.size())
}

/// What was found.
struct Evaluation {
    checkpoint: String,
    progress: Progress,
    data: String,
    /// It is the data that the network was trained on (its other part).
    is_data_of_run: bool,
    task: Task,
    sums: StepSums,
    seconds: f64,
}

impl Evaluation {
    fn bits_per_char(&self) -> Option<f64> {
        (self.task == Task::Chars).then(|| self.sums.mean_loss() / std::f64::consts::LN_2)
    }

    fn to_json(&self) -> String {
        json!({
            "checkpoint": self.checkpoint,
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "data": self.data,
            "is_data_of_run": self.is_data_of_run,
            "loss": self.sums.mean_loss(),
            "bits_per_char": self.bits_per_char(),
            "accuracy": self.sums.accuracy(),
            "targets": self.sums.weight,
            "seconds": self.seconds,
        })
        .to_string()
    }
}

/// The table for people.
impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.bits_per_char().map(|bits| format!(", {bits:.3} bits per character"));
        let other = if self.is_data_of_run { "" } else { " (not the data of the run)" };
        let rows = [
            ("checkpoint", self.checkpoint.clone()),
            ("step", self.progress.step.to_string()),
            ("epochs done", self.progress.epoch.to_string()),
            ("data", format!("{}{other}", self.data)),
            ("loss", format!("{:.4} nats{}", self.sums.mean_loss(), bits.unwrap_or_default())),
            ("accuracy", format!("{:.2} %", 100.0 * self.sums.accuracy())),
            ("targets", self.sums.weight.to_string()),
            ("seconds", format!("{:.2}", self.seconds)),
        ];
        for (name, value) in rows {
            writeln!(f, "{name:<13}{value}")?;
        }
        Ok(())
    }
}
