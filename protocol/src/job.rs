//! The job: what is computed (`[job]`), how long and from which data (`[run]`), by whom (`[fleet]`).
//!
//! Values come from `default.toml`, then the preset, then a file, then settings in the order in which they are
//! given; a later one wins. The merged table
//! is checked against the known keys before it is read, so a misspelt key is named and never ignored.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::cell::{Activation, Cell, CellOptions, RecurrentActivation, Reset};
use crate::message::WORKER_LIMIT;
use crate::problem::{Problem, nearest};

const DEFAULTS: &str = include_str!("default.toml");
const PRESETS: &str = include_str!("presets.toml");

/// Most threads of one worker.
pub const MOST_THREADS: u64 = 1024;

/// What the network learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Predict the next character of a text at every step.
    Chars,
    /// Name the class of an image that is read row by row.
    Rows,
    /// Name the class of a line of text.
    Classify,
}

/// How the rows of a batch are cut from a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TextMode {
    /// Windows of one long text.
    Stream,
    /// Each line is a sequence of its own.
    Lines,
}

/// What the last character of a window has to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Targets {
    /// The character after it in the text.
    Shift,
    /// The first character of its window, as many tutorials have it.
    Wrap,
}

/// Where lines that are shorter than the longest are filled up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pad {
    /// In front, with a token of its own that is read like any other: Keras' `pad_sequences` without a mask.
    Pre,
    /// Behind; what is there is never read, a line ends where it ends.
    Post,
}

/// Where a row starts that does not go on from a carried state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitialState {
    /// Zeros.
    Zero,
    /// A parameter for each layer, direction and part of the state.
    Learnt,
}

/// What turns gradients into steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// Adam.
    Adam,
    /// Gradient descent, with momentum if that is not 0.
    Sgd,
}

/// Where Adam's ε is added: to the root of the second moment after or before its bias is corrected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EpsilonPlacement {
    /// PyTorch: `lr · m̂ / (sqrt(v̂) + ε)`.
    AfterCorrection,
    /// TensorFlow's "epsilon hat": `lr · sqrt(1 - β2^t) / (1 - β1^t) · m / (sqrt(v) + ε)`.
    BeforeCorrection,
}

/// How the learning rate changes from step to step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Not at all.
    Constant,
    /// By a factor after every so many epochs.
    Step,
    /// Along half a cosine to its last value.
    Cosine,
}

/// What happens to a step whose loss or gradient is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// The run ends in the state before it.
    Fail,
    /// Its update and its recurrent state are left out, and the run goes on.
    Skip,
}

/// Where gradients are clipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clip {
    /// The all-reduced mean gradient, by its norm over all tensors.
    Global,
    /// Each shard's mean gradient, before it is all-reduced: Σ n_s · clip(G_s / n_s) / N.
    Shard,
    /// Nowhere.
    None,
}

/// How parameters start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Uniform within √(6 / (I + R + G·H)) over the joint kernel of input and recurrent weights, and within
    /// √(6 / (in + out)) for other matrices; biases zero, but such that the LSTM's forget gate and the GRU's r and z
    /// gates start with 1 in their sums. Peepholes: within √(3 / H). Embedding: within 0.05.
    Glorot,
    /// Everything uniform within 1 / √H; the head within 1 / √in, the embedding normal with deviation 1.
    Pytorch,
    /// Recurrent weights orthogonal, gate by gate, times the scale (1); the rest as `Glorot`.
    Orthogonal,
    /// Matrices normal with the scale (0.1) as deviation, drawn again beyond two deviations; biases as `Glorot`.
    TruncatedNormal,
    /// Matrices uniform within the scale (0.05); biases as `Glorot`.
    Uniform,
    /// Matrices normal with the scale (1) as deviation; biases as `Glorot`.
    Normal,
}

/// How the head's parameters start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadInit {
    /// As the job's [`Init`] says.
    Same,
    /// Normal with deviation 0.1, drawn again beyond two deviations, bias zero: the char-RNN tutorials'.
    TruncatedNormal,
}

/// Where the rows of the tasks over text come from: `[job.text]`.
#[derive(Debug, Clone, PartialEq, Encode, Decode, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "default.toml documents each key")]
pub struct TextSpec {
    pub mode: TextMode,
    pub targets: Targets,
    pub reset_at: String,
    pub max_len: u32,
    pub pad: Pad,
}

/// The keys that change the result. Two runs with equal `JobSpec` and equal data end in equal bits.
#[derive(Debug, Clone, PartialEq, Encode, Decode, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "default.toml documents each key for users and developers alike")]
pub struct JobSpec {
    pub task: Task,
    pub cell: Cell,
    pub num_layers: u32,
    pub hidden_size: u32,
    pub hidden_sizes: Vec<u32>,
    pub bidirectional: bool,
    pub embedding_size: u32,
    pub activation: Activation,
    pub recurrent_activation: RecurrentActivation,
    pub forget_bias: f64,
    pub peepholes: bool,
    pub cell_clip: f64,
    pub projection: u32,
    pub reset: Reset,
    pub initial_state: InitialState,
    pub carry_state: bool,
    pub batch_size: u32,
    pub seq_len: u32,
    pub shards: u32,
    pub seed: u64,
    pub init: Init,
    pub init_scale: f64,
    pub head_init: HeadInit,
    pub optimizer: Optimizer,
    pub learning_rate: f64,
    pub decay: Decay,
    pub decay_epochs: u32,
    pub decay_factor: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub epsilon_placement: EpsilonPlacement,
    pub momentum: f64,
    pub clip: Clip,
    pub clip_norm: f64,
    pub keep_prob: f64,
    pub keep_probs: Vec<f64>,
    pub variational_dropout: bool,
    pub non_finite: NonFinite,
    pub skip_limit: u64,
    pub divergence_factor: f64,
    pub patience: u64,
    pub validation_fraction: f64,
    pub train_samples: u32,
    pub validation_samples: u32,
    /// Left out where it is empty: a run without it is the run it was before the key was known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub init_from: String,
    pub text: TextSpec,
}

/// The keys that say how long a run is and where its data lies.
#[derive(Debug, Clone, PartialEq, Encode, Decode, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "default.toml documents each key")]
pub struct RunSpec {
    pub data: String,
    pub epochs: u64,
    pub steps: u64,
    pub recompute: bool,
    pub checkpoint_seconds: u64,
    pub digest_steps: u64,
    pub sample_chars: u32,
    pub sample_temperature: f64,
}

/// The keys that say who computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "default.toml documents each key")]
pub struct FleetSpec {
    pub workers: u32,
    pub threads: u32,
}

/// The whole of a job file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobFile {
    /// What is computed.
    pub job: JobSpec,
    /// How long and from which data.
    pub run: RunSpec,
    /// By whom.
    pub fleet: FleetSpec,
}

/// Names of the presets with a line about each.
pub fn presets() -> Vec<(String, String)> {
    let about = |preset: &Value| preset["about"].as_str().unwrap_or_default().to_owned();
    parse_embedded(PRESETS).iter().map(|(name, preset)| (name.clone(), about(preset))).collect()
}

impl JobFile {
    /// Merges the defaults, the preset, a job file's text and `KEY=VALUE` settings.
    ///
    /// A key of a setting may be bare (`hidden_size`) or carry its section (`job.hidden_size`).
    ///
    /// # Errors
    /// An unknown preset, section or key, a value of the wrong kind or out of range.
    pub fn resolve(preset: &str, file: Option<&str>, settings: &[(String, String)]) -> Result<Self, Problem> {
        let defaults = parse_embedded(DEFAULTS);
        let mut merged = defaults.clone();
        merge(&mut merged, preset_table(preset)?, &format!("preset {preset}"))?;
        if let Some(text) = file {
            let table = text.parse::<Table>().map_err(|error| {
                Problem::usage(format!("the job file is not valid TOML: {}", error.message()))
            })?;
            merge(&mut merged, table, "the job file")?;
        }
        for (key, value) in settings {
            merge(&mut merged, setting(&defaults, key, value)?, &format!("{key}={value}"))?;
        }
        let file: Self = serde_path_to_error::deserialize(merged).map_err(|error| {
            let (key, cause) = (error.path().to_string(), error.into_inner());
            Problem::usage(format!("{key} is not usable: {}", cause.message()))
        })?;
        file.check()?;
        Ok(file)
    }

    /// The file as TOML, all keys resolved.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a job of plain values can be written as TOML")
    }

    fn check(&self) -> Result<(), Problem> {
        let job = &self.job;
        let positive = [
            ("num_layers", job.num_layers),
            ("hidden_size", job.hidden_size),
            ("batch_size", job.batch_size),
            ("seq_len", job.seq_len),
            ("shards", job.shards),
            ("decay_epochs", job.decay_epochs),
            ("workers", self.fleet.workers),
        ];
        let of_layers = job.hidden_sizes.iter().map(|&size| ("hidden_sizes", size));
        for (key, value) in positive.into_iter().chain(of_layers.clone()) {
            if value == 0 {
                return Err(Problem::usage(format!("{key} is 0, it must be at least 1")));
            }
        }
        if job.shards > job.batch_size {
            return Err(Problem::usage(format!(
                "shards is {} but batch_size is {}: a shard would have no row",
                job.shards, job.batch_size
            ))
            .hint(format!("choose --shards {} or less", job.batch_size)));
        }
        for (key, count) in [("hidden_sizes", job.hidden_sizes.len()), ("keep_probs", job.keep_probs.len())] {
            if count > 0 && count != job.num_layers as usize {
                return Err(Problem::usage(format!(
                    "{key} has {count} numbers but num_layers is {}",
                    job.num_layers
                ))
                .hint(format!("give one number for each layer, or set num_layers = {count}")));
            }
        }
        let unit = |key: &str, value: f64, closed: bool| {
            if value > 0.0 && (value < 1.0 || closed && value == 1.0) {
                return Ok(());
            }
            let range = if closed { "(0, 1]" } else { "(0, 1)" };
            Err(Problem::usage(format!("{key} is {value}, it must lie in {range}")))
        };
        // As the kernels take it: what is above 0 must be so there too.
        unit("keep_prob", f64::from(job.keep_prob as f32), true)?;
        for keep_prob in &job.keep_probs {
            unit("a number of keep_probs", f64::from(*keep_prob as f32), true)?;
        }
        unit("validation_fraction", job.validation_fraction, false)?;
        unit("beta1", f64::from(job.beta1 as f32), false)?;
        unit("beta2", f64::from(job.beta2 as f32), false)?;
        unit("decay_factor", job.decay_factor, true)?;
        for (key, value) in [
            ("learning_rate", job.learning_rate),
            ("clip_norm", job.clip_norm),
            ("epsilon", job.epsilon),
            ("sample_temperature", self.run.sample_temperature),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Problem::usage(format!("{key} is {value}, it must be a number above 0")));
            }
            // Above 0 as the kernels take it, in 32 bits.
            if !(value as f32 > 0.0 && (value as f32).is_finite()) {
                return Err(Problem::usage(format!("{key} is {value:e}, which has no 32-bit number"))
                    .hint("choose a number between 1e-38 and 1e38"));
            }
        }
        for (key, value) in [("cell_clip", job.cell_clip), ("init_scale", job.init_scale)] {
            let is_usable = |value: f64| value >= 0.0 && value.is_finite();
            // As the kernels take it: what is above 0 must be so there too.
            if !is_usable(value)
                || !is_usable(f64::from(value as f32))
                || (value > 0.0 && value as f32 == 0.0)
            {
                return Err(Problem::usage(format!("{key} is {value}, it must be 0 or a number above it")));
            }
        }
        if !(job.forget_bias as f32).is_finite() {
            return Err(Problem::usage(format!("forget_bias is {}, it must be a number", job.forget_bias)));
        }
        if job.skip_limit == 0 {
            return Err(Problem::usage("skip_limit is 0, it must be at least 1")
                .hint("non_finite = \"fail\" ends the run at the first step that is not finite"));
        }
        if !(job.divergence_factor == 0.0 || job.divergence_factor > 1.0) {
            return Err(Problem::usage(format!(
                "divergence_factor is {}, it must be 0 or above 1",
                job.divergence_factor
            )));
        }
        if !(0.0..1.0).contains(&(job.momentum as f32)) {
            return Err(Problem::usage(format!("momentum is {}, it must lie in [0, 1)", job.momentum)));
        }
        let limits = [
            ("num_layers", job.num_layers, 64),
            ("hidden_size", job.hidden_size, 16_384),
            ("projection", job.projection, 16_384),
            ("embedding_size", job.embedding_size, 16_384),
            ("batch_size", job.batch_size, 65_536),
            ("seq_len", job.seq_len, MOST_STEPS),
            ("text.max_len", job.text.max_len, MOST_STEPS),
            ("shards", job.shards, 16_384),
            ("sample_chars", self.run.sample_chars, 10_000),
            ("workers", self.fleet.workers, WORKER_LIMIT as u32),
            ("threads", self.fleet.threads, MOST_THREADS as u32),
        ];
        let of_layers = of_layers.map(|(key, value)| (key, value, 16_384));
        for (key, value, most) in limits.into_iter().chain(of_layers) {
            if value > most {
                return Err(Problem::usage(format!("{key} is {value}, the most supported is {most}")));
            }
        }
        job.check_combinations()?;
        let is_sha256 = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !job.init_from.is_empty() && !is_sha256(&job.init_from) {
            return Err(Problem::usage(format!(
                "init_from is '{}', it must be the sha256 of parameters",
                job.init_from
            ))
            .hint("it is never set by hand: give --init-from RUN|FILE"));
        }
        if self.run.checkpoint_seconds == 0 {
            return Err(Problem::usage("checkpoint_seconds is 0, it must be at least 1"));
        }
        if self.run.epochs == 0 && self.run.steps == 0 {
            return Err(Problem::usage("epochs and steps are both 0: there is nothing to do")
                .hint("give --epochs or --steps"));
        }
        Ok(())
    }
}

/// Most time steps of a row.
pub const MOST_STEPS: u32 = 65_536;

impl JobSpec {
    /// The layers, for people: `2 × lstm 128`, `2 × bidirectional gru 64, 32`.
    pub fn network(&self) -> String {
        let direction = if self.bidirectional { "bidirectional " } else { "" };
        let widths = match &self.hidden_sizes[..] {
            [] => self.hidden_size.to_string(),
            sizes => sizes.iter().map(u32::to_string).collect::<Vec<_>>().join(", "),
        };
        format!("{} × {direction}{} {widths}", self.num_layers, self.cell)
    }

    /// Units of each layer, from the input upwards.
    pub fn layer_sizes(&self) -> Vec<usize> {
        match &self.hidden_sizes[..] {
            [] => vec![self.hidden_size as usize; self.num_layers as usize],
            sizes => sizes.iter().map(|&size| size as usize).collect(),
        }
    }

    /// The probability that a unit of a layer's output is kept, for each layer.
    pub fn layer_keep_probs(&self) -> Vec<f32> {
        match &self.keep_probs[..] {
            [] => vec![self.keep_prob as f32; self.num_layers as usize],
            keep_probs => keep_probs.iter().map(|&keep_prob| keep_prob as f32).collect(),
        }
    }

    /// The character before which the state becomes the initial state: what a stream is told to reset at, or the one
    /// that every line begins with. Lines that begin with padding are read from there on.
    pub fn reset_character(&self) -> Option<char> {
        match (self.task, self.text.mode, self.text.pad) {
            (Task::Chars, TextMode::Stream, _) => self.text.reset_at.chars().next(),
            (Task::Chars, TextMode::Lines, Pad::Post) => Some('\n'),
            _ => None,
        }
    }

    /// The cell's options as kernels take them.
    pub fn cell_options(&self) -> CellOptions {
        CellOptions {
            activation: self.activation,
            recurrent_activation: self.recurrent_activation,
            reset: self.reset,
            forget_bias: self.forget_bias as f32,
            peepholes: self.peepholes,
            cell_clip: (self.cell_clip > 0.0).then_some(self.cell_clip as f32),
            projection: (self.projection > 0).then_some(self.projection as usize),
        }
    }

    /// What is set must mean something in this job. (Numbers that another key switches on, such as `decay_factor`, may
    /// be there beforehand.)
    fn check_combinations(&self) -> Result<(), Problem> {
        let (is_rnn, is_lstm, is_gru) =
            (self.cell == Cell::Rnn, self.cell == Cell::Lstm, self.cell == Cell::Gru);
        let (is_chars, is_rows) = (self.task == Task::Chars, self.task == Task::Rows);
        let is_lines = is_chars && self.text.mode == TextMode::Lines;
        let is_stream = is_chars && !is_lines;
        let needs_cell =
            |key, is_set, cells: &'static str, has_it| (key, is_set, has_it, format!("cell {cells}"));
        let needs = |key, is_set, what: &str, has_it| (key, is_set, has_it, what.to_owned());
        let conditions = [
            needs_cell("activation", self.activation != Activation::Tanh, "\"rnn\"", is_rnn),
            needs_cell(
                "recurrent_activation",
                self.recurrent_activation != RecurrentActivation::Sigmoid,
                "\"lstm\" or \"gru\"",
                !is_rnn,
            ),
            needs_cell("forget_bias", self.forget_bias != 0.0, "\"lstm\"", is_lstm),
            needs_cell("peepholes", self.peepholes, "\"lstm\"", is_lstm),
            needs_cell("cell_clip", self.cell_clip != 0.0, "\"lstm\"", is_lstm),
            needs_cell("projection", self.projection != 0, "\"lstm\"", is_lstm),
            needs_cell("reset", self.reset != Reset::After, "\"gru\"", is_gru),
            needs("bidirectional", self.bidirectional, "task \"rows\" or \"classify\"", !is_chars),
            needs("embedding_size", self.embedding_size != 0, "task \"chars\" or \"classify\"", !is_rows),
            needs("carry_state", !self.carry_state, "task \"chars\" and text.mode \"stream\"", is_stream),
            needs("momentum", self.momentum != 0.0, "optimizer \"sgd\"", self.optimizer == Optimizer::Sgd),
            needs(
                "epsilon_placement",
                self.epsilon_placement != EpsilonPlacement::AfterCorrection,
                "optimizer \"adam\"",
                self.optimizer == Optimizer::Adam,
            ),
            needs(
                "init_scale",
                self.init_scale != 0.0,
                "an init other than \"glorot\" and \"pytorch\"",
                !matches!(self.init, Init::Glorot | Init::Pytorch),
            ),
            needs(
                "variational_dropout",
                self.variational_dropout,
                "a keep_prob below 1",
                self.layer_keep_probs().iter().any(|&keep_prob| keep_prob < 1.0),
            ),
            needs("text.mode", self.text.mode == TextMode::Lines, "task \"chars\"", is_chars),
            needs(
                "text.targets",
                self.text.targets == Targets::Wrap,
                "task \"chars\" and text.mode \"stream\"",
                is_stream,
            ),
            needs(
                "text.reset_at",
                !self.text.reset_at.is_empty(),
                "task \"chars\" and text.mode \"stream\"",
                is_stream,
            ),
            needs(
                "text.max_len",
                self.text.max_len != 0,
                "text.mode \"lines\" or task \"classify\"",
                !is_rows && !is_stream,
            ),
            needs(
                "text.pad",
                self.text.pad == Pad::Pre,
                "text.mode \"lines\" or task \"classify\"",
                !is_rows && !is_stream,
            ),
            needs("validation_samples", self.validation_samples != 0, "task \"rows\"", is_rows),
            needs("train_samples", self.train_samples != 0, "task \"rows\"", is_rows),
        ];
        for (key, is_set, has_it, what) in conditions {
            if is_set && !has_it {
                return Err(Problem::usage(format!("{key} is set, but it means something for {what} only"))
                    .hint(format!("leave out {key}, or choose {what}")));
            }
        }
        if self.task != Task::Chars
            && self.layer_keep_probs().last().is_some_and(|&keep_prob| keep_prob < 1.0)
        {
            // Of stacked layers one keep_prob means those whose output is read.
            if self.num_layers == 1 || !self.keep_probs.is_empty() {
                let key =
                    if self.keep_probs.is_empty() { "keep_prob" } else { "the last number of keep_probs" };
                return Err(Problem::usage(format!(
                    "{key} is below 1, but where the final state is classified nobody reads the last layer's output"
                ))
                .hint("leave it at 1; the outputs of the layers below can be dropped"));
            }
        }
        if self.text.reset_at.chars().count() > 1 {
            return Err(Problem::usage(format!(
                "text.reset_at is {:?}, it must be one character",
                self.text.reset_at
            ))
            .hint(r#"write --set 'text.reset_at="\n"'"#));
        }
        if is_rows && self.patience > 0 && self.validation_samples == 0 {
            return Err(Problem::usage("patience is set, but the test images are never used to stop early")
                .hint("hold training images out with --set validation_samples=5000"));
        }
        Ok(())
    }
}

/// A key in which two of one section differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The key.
    pub key: String,
    /// Our value, as TOML.
    pub here: String,
    /// The other one.
    pub there: String,
}

/// `hidden_size: 128 there, 256 here`
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} there, {} here", self.key, self.there, self.here)
    }
}

/// The keys in which two sections, both `[job]` or both `[run]`, differ.
pub fn differences<S: Serialize>(here: &S, there: &S) -> Vec<Difference> {
    let values = |section: &S| {
        let table = Table::try_from(section).expect("a section of plain values is a TOML table");
        dotted("", &table)
    };
    let (here, there) = (values(here), values(there));
    let shown = |section: &BTreeMap<String, Value>, key: &str| {
        section.get(key).map_or("unset".to_owned(), Value::to_string)
    };
    // A key that is left out where it is empty may be on one side only.
    let keys: BTreeSet<&String> = here.keys().chain(there.keys()).collect();
    keys.into_iter()
        .filter(|key| here.get(*key) != there.get(*key))
        .map(|key| Difference { key: key.clone(), here: shown(&here, key), there: shown(&there, key) })
        .collect()
}

/// The values of a table and the tables in it, by dotted key.
fn dotted(prefix: &str, table: &Table) -> BTreeMap<String, Value> {
    let mut values = BTreeMap::new();
    for (key, value) in table {
        match value {
            Value::Table(table) => values.append(&mut dotted(&format!("{prefix}{key}."), table)),
            value => drop(values.insert(format!("{prefix}{key}"), value.clone())),
        }
    }
    values
}

fn parse_embedded(text: &str) -> Table {
    text.parse().expect("the embedded TOML is valid: a test reads it")
}

fn preset_table(name: &str) -> Result<Table, Problem> {
    let mut presets = parse_embedded(PRESETS);
    let Some(Value::Table(mut preset)) = presets.remove(name) else {
        let known: Vec<&str> = presets.keys().map(String::as_str).collect();
        let meant = nearest(name, known.iter().copied()).map(|n| format!("did you mean '{n}'? "));
        return Err(Problem::usage(format!("unknown preset '{name}'")).hint(format!(
            "{}known presets: {}",
            meant.unwrap_or_default(),
            known.join(", ")
        )));
    };
    preset.remove("about");
    Ok(preset)
}

/// Copies `from` over `into`, whose sections and keys are all that are known.
fn merge(into: &mut Table, from: Table, origin: &str) -> Result<(), Problem> {
    for (section, values) in from {
        let sections: Vec<String> = into.keys().cloned().collect();
        let Some(target) = into.get_mut(&section) else {
            return Err(unknown("section", &section, sections.iter().map(String::as_str), origin));
        };
        merge_value(target, values, &section, origin)?;
    }
    Ok(())
}

/// Replaces one value, or the keys of one table, by `value`; `path` is its dotted key.
fn merge_value(target: &mut Value, value: Value, path: &str, origin: &str) -> Result<(), Problem> {
    match (target, value) {
        (Value::Table(target), Value::Table(values)) => {
            for (key, value) in values {
                let known: Vec<String> = target.keys().cloned().collect();
                let Some(old) = target.get_mut(&key) else {
                    return Err(unknown("key", &key, known.iter().map(String::as_str), origin));
                };
                merge_value(old, value, &format!("{path}.{key}"), origin)?;
            }
        }
        (Value::Table(_), _) => {
            return Err(Problem::usage(format!("{path} in {origin} is a value, it must be a section"))
                .hint(format!("write [{path}] and the keys below it")));
        }
        (target @ Value::Float(_), Value::Integer(number)) => *target = Value::Float(number as f64),
        (target, value) if value.type_str() == target.type_str() => *target = value,
        (target, value) => {
            return Err(Problem::usage(format!(
                "{path} in {origin} is the {} {value}, it must be of type {}",
                value.type_str(),
                target.type_str()
            )));
        }
    }
    Ok(())
}

fn unknown<'a>(kind: &str, name: &str, known: impl Iterator<Item = &'a str>, origin: &str) -> Problem {
    let known: Vec<&str> = known.collect();
    let problem = Problem::usage(format!("unknown {kind} '{name}' in {origin}"));
    match nearest(name, known.iter().copied()) {
        Some(meant) => problem.hint(format!("did you mean '{meant}'?")),
        None => problem.hint(format!("known: {}", known.join(", "))),
    }
}

/// A `KEY=VALUE` setting as a table with one key. The key may leave out the sections it is in. A value that is not
/// TOML is taken as a string.
fn setting(defaults: &Table, key: &str, value: &str) -> Result<Table, Problem> {
    let known = dotted("", defaults);
    let is_meant =
        |path: &&String| *path == key || path.strip_suffix(key).is_some_and(|rest| rest.ends_with('.'));
    let Some(path) = known.keys().find(is_meant) else {
        let segments = key.split('.').count();
        let names = known.keys().map(|path| match path.rmatch_indices('.').nth(segments - 1) {
            Some((dot, _)) => &path[dot + 1..],
            None => path,
        });
        return Err(unknown("key", key, names, &format!("{key}={value}")));
    };
    let parsed = format!("value = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(value.to_owned()));
    let nested = path
        .rsplit('.')
        .fold(parsed, |value, name| Value::Table(Table::from_iter([(name.to_owned(), value)])));
    let Value::Table(table) = nested else { unreachable!("a path has a name") };
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(settings: &[(&str, &str)]) -> Result<JobFile, Problem> {
        let owned: Vec<_> = settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        JobFile::resolve(
            if settings.iter().any(|(key, _)| *key == "peepholes") { "char-gru" } else { "char-lstm" },
            None,
            &owned,
        )
    }

    #[test]
    fn every_preset_resolves() {
        let names: Vec<String> = presets().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), 7);
        for name in names {
            JobFile::resolve(&name, None, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        let mnist = JobFile::resolve("mnist-gru", None, &[]).unwrap().job;
        assert_eq!((mnist.task, mnist.cell, mnist.hidden_size), (Task::Rows, Cell::Gru, 150));
    }

    #[test]
    fn a_nested_key_is_set_with_any_of_its_sections_left_out() {
        for key in ["job.text.mode", "text.mode", "mode"] {
            assert_eq!(with(&[(key, "lines")]).unwrap().job.text.mode, TextMode::Lines, "{key}");
        }
        let file = "[job.text]\nmode = \"lines\"\npad = \"pre\"";
        let job = JobFile::resolve("char-lstm", Some(file), &[]).unwrap().job;
        assert_eq!((job.text.mode, job.text.pad, job.text.max_len), (TextMode::Lines, Pad::Pre, 0));
        let base = with(&[]).unwrap().job;
        let differences: Vec<String> = differences(&job, &base).iter().map(Difference::to_string).collect();
        assert_eq!(
            differences,
            ["text.mode: \"stream\" there, \"lines\" here", "text.pad: \"post\" there, \"pre\" here"]
        );
    }

    #[test]
    fn a_later_source_wins() {
        let file = "[job]\nhidden_size = 64\nseed = 3\n[run]\nepochs = 2";
        let set = [("hidden_size".to_owned(), "32".to_owned()), ("run.data".to_owned(), "x.txt".to_owned())];
        let job = JobFile::resolve("char-gru", Some(file), &set).unwrap();
        assert_eq!((job.job.hidden_size, job.job.seed, job.run.epochs), (32, 3, 2));
        assert_eq!((job.job.cell, job.run.data.as_str()), (Cell::Gru, "x.txt"));
        assert_eq!(JobFile::resolve("char-gru", Some(&job.to_toml()), &[]).unwrap(), job);
    }

    #[test]
    fn mistakes_are_named_with_a_hint() {
        let cases = [
            (
                [("hiden_size", "3")],
                "unknown key 'hiden_size' in hiden_size=3",
                "did you mean 'hidden_size'?",
            ),
            ([("jobb.seed", "3")], "unknown key 'jobb.seed' in jobb.seed=3", "did you mean 'job.seed'?"),
            (
                [("text.mod", "lines")],
                "unknown key 'text.mod' in text.mod=lines",
                "did you mean 'text.mode'?",
            ),
            (
                [("peepholes", "true")],
                "peepholes is set, but it means something for cell \"lstm\" only",
                "leave out peepholes, or choose cell \"lstm\"",
            ),
            (
                [("hidden_sizes", "[3]")],
                "hidden_sizes has 1 numbers but num_layers is 2",
                "give one number for each layer, or set num_layers = 1",
            ),
            ([("keep_probs", "[0.5, 0]")], "a number of keep_probs is 0, it must lie in (0, 1]", ""),
            ([("cell_clip", "-1")], "cell_clip is -1, it must be 0 or a number above it", ""),
            (
                [("text.reset_at", "ab")],
                "text.reset_at is \"ab\", it must be one character",
                r#"write --set 'text.reset_at="\n"'"#,
            ),
            ([("seed", "x")], "job.seed in seed=x is the string \"x\", it must be of type integer", ""),
            (
                [("shards", "65")],
                "shards is 65 but batch_size is 64: a shard would have no row",
                "choose --shards 64 or less",
            ),
            (
                [("init_from", "runs/a")],
                "init_from is 'runs/a', it must be the sha256 of parameters",
                "it is never set by hand: give --init-from RUN|FILE",
            ),
            (
                [("skip_limit", "0")],
                "skip_limit is 0, it must be at least 1",
                "non_finite = \"fail\" ends the run at the first step that is not finite",
            ),
            ([("keep_prob", "0")], "keep_prob is 0, it must lie in (0, 1]", ""),
            ([("hidden_size", "0")], "hidden_size is 0, it must be at least 1", ""),
            ([("sample_chars", "10001")], "sample_chars is 10001, the most supported is 10000", ""),
            ([("sample_temperature", "0")], "sample_temperature is 0, it must be a number above 0", ""),
            (
                [("epochs", "0")],
                "epochs and steps are both 0: there is nothing to do",
                "give --epochs or --steps",
            ),
        ];
        for (settings, sentence, hint) in cases {
            let problem = with(&settings).unwrap_err();
            assert_eq!(problem.sentence, sentence);
            assert_eq!(problem.hint.unwrap_or_default(), hint);
        }
        let problem = JobFile::resolve("char-lsmt", None, &[]).unwrap_err();
        assert_eq!(problem.sentence, "unknown preset 'char-lsmt'");
        assert!(problem.hint.unwrap().starts_with("did you mean 'char-lstm'?"));
    }

    #[test]
    fn differences_name_the_keys() {
        let (a, b) = (with(&[]).unwrap().job, with(&[("seed", "2"), ("clip", "none")]).unwrap().job);
        let named = |here: &JobSpec, there: &JobSpec| -> Vec<String> {
            differences(here, there).iter().map(ToString::to_string).collect()
        };
        assert_eq!(named(&a, &a), [""; 0]);
        assert_eq!(named(&b, &a), ["clip: \"global\" there, \"none\" here", "seed: 1 there, 2 here"]);
        let warm = with(&[("init_from", &"ab".repeat(32))]).unwrap().job;
        let hash = format!("\"{}\"", warm.init_from);
        assert_eq!(named(&warm, &a), [format!("init_from: unset there, {hash} here")]);
        assert_eq!(named(&a, &warm), [format!("init_from: {hash} there, unset here")]);
    }
}
