//! The job: what is computed (`[job]`), how long and from which data (`[run]`), by whom (`[fleet]`).
//!
//! Values come from `default.toml`, then the preset, then a file, then settings in the order in which they are
//! given; a later one wins. The merged table
//! is checked against the known keys before it is read, so a misspelt key is named and never ignored.

mod check;
mod merge;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use std::fmt;

use crate::cell::{Activation, Cell, CellOptions, RecurrentActivation, Reset};

pub use merge::{Difference, differences, presets};

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

/// What the operands of matrix products are rounded to. Sums, parameters and everything else are f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Nothing.
    #[default]
    F32,
    /// bfloat16: the range of f32, 8 bits of mantissa.
    Bf16,
    /// What NVIDIA's tensor cores make of f32: its range, 11 bits of mantissa. GPUs only.
    Tf32,
}

impl Precision {
    /// What is of which precision.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "products of bf16, all else f32",
            Self::Tf32 => "products of tf32, all else f32",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Tf32 => "tf32",
        })
    }
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
    pub precision: Precision,
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
    pub checkpoint_steps: u64,
    pub keep_checkpoints: u32,
    pub digest_steps: u64,
    pub sample_chars: u32,
    pub sample_temperature: f64,
}

/// How shards are dealt to workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Balance {
    /// As many to each as to any other, within one.
    Even,
    /// In proportion to measured speed.
    Speed,
}

/// The keys that say who computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "default.toml documents each key")]
pub struct FleetSpec {
    pub workers: u32,
    pub threads: u32,
    pub balance: Balance,
    pub park_timeout_seconds: u32,
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

impl JobFile {
    /// The file as TOML, all keys resolved.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a job of plain values can be written as TOML")
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Problem;

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
