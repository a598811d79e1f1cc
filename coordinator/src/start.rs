//! From a configuration to a run under way: open the data, listen, open the run directory, show the job.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use protocol::control::ControlState;
use protocol::frame::FRAME_LIMIT_BYTES;
use protocol::handshake::{SHORTEST_TOKEN, Token};
use protocol::job::{Clip, Decay, JobFile, JobSpec, Optimizer, Pad, Task, TextMode};
use protocol::layout::{Head, Input, Progress, StateLayout};
use protocol::message::Stop;
use protocol::problem::{Exit, Problem};
use protocol::schedule::Schedule;
use protocol::sums::StepSums;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{Receiver, unbounded_channel};
use transport::Tls;

use crate::data::{self, Dataset, grouped};
use crate::early_end::{EarlyEnd, epochs};
use crate::forecast::Forecast;
use crate::http::{self, Pages, Status};
use crate::loss_plot::LossFile;
use crate::membership::membership;
use crate::metrics::Metrics;
use crate::paces::Windows;
use crate::records::{Opening, Records};
use crate::run::{Outcome, Parts, Run, StartState, goodbye};
use crate::screen::{Screen, duration, fixed, quality, quoted, short};
use crate::server;
use crate::store::checkpoint_dir::CheckpointDir;
use crate::store::files::write_atomic;
use crate::store::run_dir::has_job;
use crate::store::state::StateImage;
use crate::warm_start::{FirstState, InitialParameters};

/// A port that is in use may become free within this time.
const BIND_PATIENCE: Duration = Duration::from_secs(2);

/// What a coordinator is told at its start.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of the preset, for people.
    pub preset: String,
    /// The resolved job file.
    pub file: JobFile,
    /// The run directory.
    pub run_dir: PathBuf,
    /// Delete what is in the run directory and start over.
    pub fresh: bool,
    /// What a new run starts from instead of its seed.
    pub init_from: Option<Arc<dyn InitialParameters>>,
    /// The learning rate to go on with.
    pub change_learning_rate: Option<f64>,
    /// What estimates memory and time.
    pub forecast: Option<Arc<dyn Forecast>>,
    /// Where named data sets lie.
    pub data_dir: Option<PathBuf>,
    /// Where workers connect.
    pub listen: SocketAddr,
    /// Where status and metrics are served.
    pub http: SocketAddr,
    /// The run's secret.
    pub token: Token,
    /// The run's certificate, if what its processes say to each other is to be encrypted.
    pub tls: Option<Tls>,
    /// Written, atomically, when both ports are bound: `control=HOST:PORT` and `http=HOST:PORT`, a line
    /// each; once workers train, also `generation=N` and `step=N`, steps done when
    /// it formed.
    pub ready_file: Option<PathBuf>,
    /// How long status and metrics are served after the run's end, for a last scrape. A run that was asked to stop ends
    /// without.
    pub linger: Duration,
    /// A run that is asked to stop has this long to finish its step and to write its last state.
    pub drain_timeout: Duration,
    /// Of so many steps the run directory gets a profile of all workers; 0 for none.
    pub profile_steps: u64,
    /// Show JSON lines.
    pub json: bool,
    /// What this binary is.
    pub build: String,
}

/// Coordinates one run. `signals` brings one value for each signal that asks to stop.
///
/// # Errors
/// Whatever kept the run from starting, or ended it, as a sentence for the user.
pub async fn run(mut config: Config, mut signals: Receiver<()>) -> Result<Exit, Problem> {
    check_token(&config)?;
    config.ready_file.as_deref().map_or(Ok(()), check_ready_file)?;
    let (data, layout) = open_data(&config)?;
    let mut forecast = forecast(&config, &*data, &layout)?;
    let (control, control_address) = bind(config.listen, "workers", "--listen").await?;
    let (pages, http_address) = bind(config.http, "status and metrics", "--http").await?;
    let (records, resumed) = open_records(&mut config, &*data, &layout)?;
    let title = format!("{}: {}", config.preset, config.file.job.network());
    let (plot, numbers) = (records.dir.loss_plot_path(), records.dir.metrics_path());
    let losses = LossFile::open(plot.clone(), &numbers, title, config.file.job.task)?;
    let schedule = data.shape().schedule;
    let mut screen = Screen::new(config.json, config.file.job.task, &schedule);
    let of_job = config.file.job.learning_rate;
    let rate = resumed.as_ref().map_or(of_job, |image| image.control().learning_rate(of_job));
    let mut rows = job_rows(&config, &*data, &layout, rate, control_address, http_address);
    rows.append(&mut forecast);
    screen.job(&config.preset, &config.file, &rows);
    if data.facts().validation_samples == 0 {
        screen.notice(match reads_lines(&config.file.job) {
            true => {
                "no line is held out: there will be no validation loss (hint: a larger validation_fraction, or more \
                 lines)"
            }
            false => {
                "the validation part is shorter than one batch: there will be no validation loss (hint: a smaller \
                 batch_size or seq_len, or a larger validation_fraction)"
            }
        });
    }
    records.notices.iter().for_each(|notice| screen.notice(notice));
    let resumed = resumed.map(|image| StartState {
        step: image.progress().step,
        owes_evaluation: !image.is_whole(),
        control: image.control(),
        image: image.into_bytes(),
    });
    if let Some(path) = &config.ready_file {
        write_atomic(path, ready_text(control_address, http_address).as_bytes())?;
    }
    let metrics = Metrics::new(&config.build);
    let status = Arc::new(Mutex::new(first_status(&config, &records, &schedule)));
    tokio::spawn(http::serve(
        pages,
        Pages { metrics: metrics.clone(), status: status.clone(), loss_plot: plot },
    ));

    let ready = config.ready_file.clone().map(|path| (path, ready_text(control_address, http_address)));
    let parts = Parts {
        decide: membership,
        file: config.file.clone(),
        data,
        layout,
        records,
        resumed,
        metrics,
        losses,
        status,
        screen,
        ready,
        drain_timeout: config.drain_timeout,
        profile_steps: config.profile_steps,
        windows: Windows::OF_A_RUN,
    };
    let started = Instant::now();
    let over = parts.resumed.as_ref().and_then(|start| over(start, &config.file.job, &schedule));
    let outcome = match over {
        Some(stop) => {
            let outcome = already_over(parts, &stop);
            let places = outcome.parts.records.places.len();
            if places > 0 {
                let (arrivals, arrived) = unbounded_channel();
                let accepting =
                    tokio::spawn(server::accept(control, config.token.clone(), config.tls.clone(), arrivals));
                server::send_home(places, goodbye(&outcome.result), arrived).await;
                accepting.abort();
            }
            outcome
        }
        None => {
            let (arrivals, arrived) = unbounded_channel();
            let accepting =
                tokio::spawn(server::accept(control, config.token.clone(), config.tls.clone(), arrivals));
            let outcome = Run::run(parts, arrived, &mut signals).await;
            accepting.abort();
            outcome
        }
    };
    let result = conclude(&config, outcome, started.elapsed());
    if !config.linger.is_zero() && result != Ok(Exit::Requeue) {
        tokio::select! {
            () = tokio::time::sleep(config.linger) => {}
            _ = signals.recv() => {}
        }
    }
    // Nobody listens there any more.
    if let Some(path) = &config.ready_file {
        let _ = std::fs::remove_file(path);
    }
    result
}

/// Makes the run directory with the state of step 0 in it, and trains nothing. Gives what the user should know.
///
/// # Errors
/// Whatever keeps such a run from starting; the directory is already one of a run.
pub fn create(mut config: Config) -> Result<Vec<String>, Problem> {
    if !config.fresh && has_job(&config.run_dir) {
        return Err(Problem::usage(format!("{} is already a run", config.run_dir.display()))
            .hint("give another --run-dir, or --fresh to delete that run"));
    }
    let (data, layout) = open_data(&config)?;
    forecast(&config, &*data, &layout)?;
    let (records, _) = open_records(&mut config, &*data, &layout)?;
    Ok(records.notices)
}

/// The data set, and where every number of the state lies.
fn open_data(config: &Config) -> Result<(Box<dyn Dataset>, StateLayout), Problem> {
    let data = data::open(&config.file.job, &config.file.run, config.data_dir.as_deref())?;
    let layout = StateLayout::new(data.shape().model.clone(), config.file.job.batch_size as usize);
    check_batch_size(&config.file.job, &*data)?;
    check_patience(&config.file.job, data.facts().validation_samples)?;
    Ok((data, layout))
}

/// What is known before the start; nothing if nobody knows.
fn forecast(
    config: &Config,
    data: &dyn Dataset,
    layout: &StateLayout,
) -> Result<Vec<(&'static str, String)>, Problem> {
    match &config.forecast {
        Some(forecast) => forecast.rows(&config.file, data.shape(), layout),
        None => Ok(Vec::new()),
    }
}

/// Opens the run directory. The job becomes the one that is in it.
fn open_records(
    config: &mut Config,
    data: &dyn Dataset,
    layout: &StateLayout,
) -> Result<(Records, Option<StateImage>), Problem> {
    let is_new = config.fresh || !has_job(&config.run_dir);
    let job = &mut config.file.job;
    if config.init_from.is_none() && is_new && !job.init_from.is_empty() {
        return Err(Problem::usage("init_from is set, but there are no parameters to start from")
            .hint("it is never set by hand: give --init-from RUN|FILE"));
    }
    if let Some(rate) = config.change_learning_rate {
        check_learning_rate(rate, job.learning_rate, is_new, &config.run_dir)?;
    }
    let source = config.init_from.as_deref();
    let first = source.map(|source| FirstState::make(source, job, data.facts(), layout)).transpose();
    let first = first.map_err(|problem| match is_new {
        true => problem,
        false => problem.hint("the run that is there has begun: leave out --init-from to go on with it"),
    })?;
    let (records, resumed) = Records::open(Opening {
        path: &config.run_dir,
        fresh: config.fresh,
        file: &config.file,
        facts: data.facts(),
        layout,
        build: &config.build,
        first,
        learning_rate: config.change_learning_rate,
    })?;
    config.file = records.dir.job().clone();
    Ok((records, resumed))
}

/// A learning rate can be changed where there is a state to go on from.
fn check_learning_rate(rate: f64, of_job: f64, is_new: bool, run_dir: &Path) -> Result<(), Problem> {
    let mut changed = ControlState::default();
    changed.change_learning_rate(of_job, rate);
    // The state holds a factor: of extreme rates there may be none.
    let is_usable = |rate: f64| rate > 0.0 && rate.is_finite();
    if !is_usable(rate) || !is_usable(changed.learning_rate(of_job)) {
        return Err(Problem::usage(format!(
            "--change-learning-rate is {rate:e}, it must be a number above 0 and of a usual size"
        ))
        .hint(format!("the job's is {of_job}")));
    }
    if is_new || CheckpointDir::new(run_dir).is_empty()? {
        return Err(Problem::usage(format!(
            "{} has no checkpoint to go on from with another learning rate",
            run_dir.display()
        ))
        .hint(format!("a new run starts with any rate: --set learning_rate={rate}")));
    }
    Ok(())
}

/// A port that other machines can reach needs a secret that nobody can guess.
fn check_token(config: &Config) -> Result<(), Problem> {
    let Config { listen, token, .. } = config;
    if listen.ip().is_loopback() || token.is_strong() {
        return Ok(());
    }
    let weakness = match token.is_empty() {
        true => "there is no run token: anybody could join the run".to_owned(),
        false => format!("the run token has less than {SHORTEST_TOKEN} characters: it can be guessed"),
    };
    Err(Problem::usage(format!("{listen} can be reached from other machines and {weakness}")).hint(
        "give every process the same --token-file (the coordinator makes it if it is not there), or a token from \
         `openssl rand -hex 16` in LOCKSTEP_TOKEN",
    ))
}

/// The ready file is written when much has begun: a path that cannot be meant is refused before.
fn check_ready_file(path: &Path) -> Result<(), Problem> {
    let refuse = |why: &str| {
        Err(Problem::usage(format!("{} cannot be the ready file: {why}", path.display()))
            .hint("--ready-file takes the path of a file in a folder that exists"))
    };
    match path.parent() {
        _ if path.is_dir() => refuse("it is a folder"),
        Some(folder) if folder == Path::new("") || folder.is_dir() => Ok(()),
        _ => refuse("its folder does not exist"),
    }
}

/// What the ready file says when both ports are bound.
fn ready_text(control: SocketAddr, http: SocketAddr) -> String {
    format!("control={control}\nhttp={http}\n")
}

/// Listens; gives the address with the port that was bound.
async fn bind(address: SocketAddr, what: &str, option: &str) -> Result<(TcpListener, SocketAddr), Problem> {
    let refused = |error: std::io::Error| {
        Problem::usage(format!("cannot listen on {address} for {what}: {error}"))
            .hint(format!("choose another address with {option}, or port 0 for any free one"))
    };
    let patience = Instant::now() + BIND_PATIENCE;
    let listener = loop {
        match TcpListener::bind(address).await {
            // Of a coordinator that was killed a moment ago, perhaps.
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < patience => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            bound => break bound.map_err(refused)?,
        }
    };
    let bound = listener.local_addr().map_err(refused)?;
    Ok((listener, bound))
}

/// A worker that holds all shards gets a whole batch in one frame.
fn check_batch_size(job: &JobSpec, data: &dyn Dataset) -> Result<(), Problem> {
    let shape = data.shape();
    let row_bytes = match shape.model.input {
        Input::OneHot(_) | Input::Embedding { .. } => 2 * (shape.seq_len + 1),
        Input::Bytes(width) => shape.seq_len * width + 2,
    };
    // The sample's id, length and padding, and once per shard its number of rows; the headers are small change.
    let bytes = (row_bytes + 16) * job.batch_size as usize + 4 * job.shards as usize + 256;
    if bytes > FRAME_LIMIT_BYTES {
        return Err(Problem::usage(format!(
            "a batch of {} rows is {bytes} bytes, the most that travels at once is {FRAME_LIMIT_BYTES}",
            job.batch_size
        ))
        .hint(match reads_lines(job) {
            true => "choose a smaller batch_size, or keep the last steps of long lines with --set text.max_len=STEPS",
            false => "choose a smaller batch_size or seq_len",
        }));
    }
    Ok(())
}

/// Who waits for a lower validation loss needs one.
fn check_patience(job: &JobSpec, validation_samples: u64) -> Result<(), Problem> {
    if job.patience == 0 || validation_samples > 0 {
        return Ok(());
    }
    let (why, choose) = match reads_lines(job) {
        true => ("no line is held out", "a larger validation_fraction"),
        false => (
            "the validation part is shorter than one batch",
            "a smaller batch_size or seq_len, or a larger validation_fraction",
        ),
    };
    Err(Problem::usage(format!("patience is {}, but {why}: there is no validation loss", job.patience))
        .hint(format!("choose {choose}; or patience = 0")))
}

/// Whether each line of a text is a row of its own length.
fn reads_lines(job: &JobSpec) -> bool {
    match job.task {
        Task::Chars => job.text.mode == TextMode::Lines,
        Task::Rows => false,
        Task::Classify => true,
    }
}

/// What stands in the box above a run.
fn job_rows(
    config: &Config,
    data: &dyn Dataset,
    layout: &StateLayout,
    learning_rate: f64,
    control: SocketAddr,
    http: SocketAddr,
) -> Vec<(&'static str, String)> {
    let (job, facts, shape) = (&config.file.job, data.facts(), data.shape());
    let schedule = shape.schedule;
    let reads = match shape.model.input {
        Input::OneHot(tokens) => format!("one-hot {tokens}"),
        Input::Embedding { tokens, size } => format!("{tokens} learnt vectors of {size}"),
        Input::Bytes(width) => format!("{width} bytes a row"),
    };
    let head = match shape.model.head {
        Head::EveryStep => "head at every step",
        Head::Final if job.bidirectional => "head on both final states",
        Head::Final => "head on the final state",
    };
    let up_to = if reads_lines(job) && job.text.pad == Pad::Post { "up to " } else { "" };
    let clip = match job.clip {
        Clip::Global => format!("clip global norm {}", job.clip_norm),
        Clip::Shard => format!("clip each shard's norm {}", job.clip_norm),
        Clip::None => "no clipping".to_owned(),
    };
    let keep_probs: Vec<String> = match &job.keep_probs[..] {
        [] => vec![job.keep_prob.to_string()],
        keep_probs => keep_probs.iter().map(f64::to_string).collect(),
    };
    let drops = job.layer_keep_probs().iter().any(|&keep_prob| keep_prob < 1.0);
    let dropout = if drops { format!(", keep {}", keep_probs.join(", ")) } else { String::new() };
    let optimizer = optimizer_text(job, learning_rate);
    let patience = match job.patience {
        0 => String::new(),
        patience => format!(", fewer after {} without a lower validation loss", epochs(patience)),
    };
    vec![
        ("data", facts.name.clone()),
        (
            "samples",
            format!(
                "{} {} to train on, {} to validate, {} skipped per epoch",
                grouped(facts.train_samples),
                facts.sample_unit,
                grouped(facts.validation_samples),
                grouped(facts.skipped_per_epoch)
            ),
        ),
        ("network", format!("{}, {reads} → {head}", job.network())),
        ("parameters", grouped(layout.parameters() as u64)),
        (
            "batch",
            format!("{} rows × {up_to}{} steps in {} shards", job.batch_size, shape.seq_len, job.shards),
        ),
        ("training", format!("{optimizer}, {clip}{dropout}, seed {}", job.seed)),
        (
            "length",
            format!(
                "{} steps, {} per epoch{patience}",
                grouped(schedule.total_steps),
                grouped(schedule.steps_per_epoch)
            ),
        ),
        ("precision", format!("{}, exact reduction", job.precision.in_words())),
        ("workers", config.file.fleet.workers.to_string()),
        ("control", control.to_string()),
        ("status", format!("http://{http}/")),
        ("run directory", config.run_dir.display().to_string()),
    ]
}

/// What turns gradients into steps: `SGD 0.1, momentum 0.9, rate times 0.1 after every 10 epochs`.
fn optimizer_text(job: &JobSpec, learning_rate: f64) -> String {
    let rate = match learning_rate == job.learning_rate {
        true => short(learning_rate),
        false => format!("{} (the job's: {})", short(learning_rate), short(job.learning_rate)),
    };
    let optimizer = match job.optimizer {
        Optimizer::Adam => format!("Adam {rate}"),
        Optimizer::Sgd if job.momentum > 0.0 => format!("SGD {rate}, momentum {}", job.momentum),
        Optimizer::Sgd => format!("SGD {rate}"),
    };
    let (factor, length) = (short(job.decay_factor), epochs(job.decay_epochs.into()));
    match job.decay {
        Decay::Constant => optimizer,
        Decay::Step => format!("{optimizer}, rate times {factor} after every {length}"),
        Decay::Cosine => format!("{optimizer}, rate along a cosine to {factor} of it over {length}"),
    }
}

fn first_status(config: &Config, records: &Records, schedule: &Schedule) -> Status {
    let step = records.checkpoint.map_or(0, |stage| stage.step);
    Status {
        run_id: records.run_id.clone(),
        preset: config.preset.clone(),
        phase: "gathering",
        step,
        total_steps: schedule.total_steps,
        epoch: schedule.position(step).0 + 1,
        steps_per_epoch: schedule.steps_per_epoch,
        checkpoint_step: records.checkpoint.map(|stage| stage.step),
        shards: config.file.job.shards,
        ..Status::default()
    }
}

/// Why a run that would go on from this state has ended already, if it has.
fn over(start: &StartState, job: &JobSpec, schedule: &Schedule) -> Option<Stop> {
    if start.owes_evaluation {
        return None;
    }
    let progress = Progress::after(start.step, schedule.steps_per_epoch);
    let finished = (start.step >= schedule.total_steps).then_some(Stop::Finished);
    start.control.early_end(job, progress).or(finished)
}

/// The outcome of a run that was at its end before it began.
fn already_over(mut parts: Parts, stop: &Stop) -> Outcome {
    let (step, control) =
        parts.resumed.as_ref().map_or((0, ControlState::default()), |start| (start.step, start.control));
    let progress = Progress::after(step, parts.data.shape().schedule.steps_per_epoch);
    let early_end = EarlyEnd::of(stop, &parts.file.job, &control, progress);
    let result = early_end.as_ref().map_or(Ok(Exit::Done), EarlyEnd::result);
    let (what, more) = match &early_end {
        Some(end) => (end.sentence.clone(), end.hint),
        None => (format!("{step} steps are done"), "more: --epochs or --steps"),
    };
    // A failure is told in the end.
    if result.is_ok() {
        parts.screen.notice(&format!("nothing to do: {what} ({more}; again from the start: --fresh)"));
    }
    let validation = parts.records.evaluation_at(step);
    Outcome { step, train_loss: None, validation, early_end, result, parts }
}

/// Shows how the run ended and what it wrote.
fn conclude(config: &Config, outcome: Outcome, elapsed: Duration) -> Result<Exit, Problem> {
    let Outcome { mut parts, step, train_loss, validation, early_end, result } = outcome;
    let total_steps = parts.data.shape().schedule.total_steps;
    let saved = parts.records.checkpoint.map_or(0, |stage| stage.step);
    let same = if config.fresh { "the same command without --fresh" } else { "the same command" };
    let elapsed = duration(elapsed.as_secs_f64());
    let sentence = match &result {
        Ok(Exit::Done) => match early_end {
            Some(EarlyEnd { sentence: why, .. }) => {
                format!("done: {step} of {total_steps} steps in {elapsed}: {why}")
            }
            None => format!("done: {step} steps in {elapsed}"),
        },
        Ok(_) if step == saved => {
            format!("stopped after step {step} of {total_steps}; {same} goes on from there")
        }
        Ok(_) if saved > 0 => {
            format!(
                "stopped after step {step} of {total_steps}; {same} goes on from step {saved}, the newest saved"
            )
        }
        Ok(_) => format!("stopped after step {step} of {total_steps}; nothing was saved"),
        Err(_) => format!("failed after step {step} of {total_steps}"),
    };
    let mut rows = Vec::new();
    if let Some(loss) = train_loss {
        rows.push(("train loss", format!("{} nats", fixed(loss, 4))));
    }
    if let Some(sums) = validation.filter(|sums| sums.weight > 0) {
        rows.push(("validation", validation_text(config.file.job.task, &sums)));
    }
    let dir = config.run_dir.display().to_string();
    rows.push(("run directory", dir.clone()));
    let mut next = Vec::new();
    if parts.records.checkpoint.is_some() {
        rows.push(("checkpoint", config.run_dir.join("latest").display().to_string()));
        let commands = ["sample", "inspect"].into_iter();
        let usable = commands.filter(|name| *name != "sample" || config.file.job.task == Task::Chars);
        next.extend(usable.map(|name| format!("lockstep {name} {}", quoted(&dir))));
    }
    rows.push(("metrics", parts.records.dir.metrics_path().display().to_string()));
    match parts.losses.write() {
        Ok(path) => rows.extend(path.map(|path| ("losses", path.display().to_string()))),
        Err(problem) => parts.screen.notice(&problem.to_string()),
    }
    parts.screen.summary(&sentence, &rows, &next);
    result
}

/// The last evaluation, for the summary.
fn validation_text(task: Task, sums: &StepSums) -> String {
    format!("{} nats, {}", fixed(sums.mean_loss(), 4), quality(task, sums))
}
