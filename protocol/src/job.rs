//! The job: what is computed (`[job]`), how long and from which data (`[run]`), by whom (`[fleet]`).
//!
//! Values come from `default.toml`, then the preset, then a file, then settings in the order in which they are
//! given; a later one wins. The merged table
//! is checked against the known keys before it is read, so a misspelt key is named and never ignored.

use std::fmt;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::cell::Cell;
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
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// Uniform within √(6 / (I + H + G·H)) over the joint kernel; biases zero, but 1 for the LSTM's forget gate
    /// and the GRU's r and z gates. Head: uniform within √(6 / (H + V)), bias zero.
    Glorot,
    /// Everything uniform within 1 / √H.
    Pytorch,
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
    pub batch_size: u32,
    pub seq_len: u32,
    pub shards: u32,
    pub seed: u64,
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub clip: Clip,
    pub clip_norm: f64,
    pub keep_prob: f64,
    pub init: Init,
    pub validation_fraction: f64,
    pub train_samples: u32,
    /// Left out where it is empty: a run without it is the run it was before the key was known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub init_from: String,
}

/// The keys that say how long a run is and where its data lies.
#[derive(Debug, Clone, PartialEq, Encode, Decode, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "default.toml documents each key")]
pub struct RunSpec {
    pub data: String,
    pub epochs: u64,
    pub steps: u64,
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
        let file: Self = merged.try_into().map_err(|error: toml::de::Error| {
            Problem::usage(format!("the job is not usable: {}", error.message()))
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
            ("workers", self.fleet.workers),
        ];
        for (key, value) in positive {
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
        let unit = |key: &str, value: f64, closed: bool| {
            if value > 0.0 && (value < 1.0 || closed && value == 1.0) {
                return Ok(());
            }
            let range = if closed { "(0, 1]" } else { "(0, 1)" };
            Err(Problem::usage(format!("{key} is {value}, it must lie in {range}")))
        };
        // As the kernels take it: what is above 0 must be so there too.
        unit("keep_prob", f64::from(job.keep_prob as f32), true)?;
        unit("validation_fraction", job.validation_fraction, false)?;
        unit("beta1", job.beta1, false)?;
        unit("beta2", job.beta2, false)?;
        for (key, value) in [
            ("learning_rate", job.learning_rate),
            ("clip_norm", job.clip_norm),
            ("epsilon", job.epsilon),
            ("sample_temperature", self.run.sample_temperature),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Problem::usage(format!("{key} is {value}, it must be a number above 0")));
            }
        }
        let limits = [
            ("num_layers", job.num_layers, 64),
            ("hidden_size", job.hidden_size, 16_384),
            ("batch_size", job.batch_size, 65_536),
            ("seq_len", job.seq_len, 65_536),
            ("shards", job.shards, 16_384),
            ("sample_chars", self.run.sample_chars, 10_000),
            ("workers", self.fleet.workers, WORKER_LIMIT as u32),
            ("threads", self.fleet.threads, MOST_THREADS as u32),
        ];
        for (key, value, most) in limits {
            if value > most {
                return Err(Problem::usage(format!("{key} is {value}, the most supported is {most}")));
            }
        }
        let is_sha256 = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !job.init_from.is_empty() && !is_sha256(&job.init_from) {
            return Err(Problem::usage(format!(
                "init_from is '{}', it must be the sha256 of parameters",
                job.init_from
            ))
            .hint("it is never set by hand: give --init-from RUN|FILE"));
        }
        if self.run.epochs == 0 && self.run.steps == 0 {
            return Err(Problem::usage("epochs and steps are both 0: there is nothing to do")
                .hint("give --epochs or --steps"));
        }
        Ok(())
    }
}

impl JobSpec {
    /// The layers, for people: `2 × lstm 128`.
    pub fn network(&self) -> String {
        format!("{} × {} {}", self.num_layers, self.cell, self.hidden_size)
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
    let table = |section: &S| Table::try_from(section).expect("a section of plain values is a TOML table");
    let (here, there) = (table(here), table(there));
    let shown = |section: &Table, key: &str| section.get(key).map_or("unset".to_owned(), Value::to_string);
    // A key that is left out where it is empty may be on one side only.
    let only_there = there.keys().filter(|key| !here.contains_key(*key));
    here.keys()
        .chain(only_there)
        .filter(|key| here.get(*key) != there.get(*key))
        .map(|key| Difference { key: key.clone(), here: shown(&here, key), there: shown(&there, key) })
        .collect()
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

/// Copies `from` over `into`, whose keys are all that are known.
fn merge(into: &mut Table, from: Table, origin: &str) -> Result<(), Problem> {
    for (section, values) in from {
        let sections: Vec<String> = into.keys().cloned().collect();
        let Some(Value::Table(target)) = into.get_mut(&section) else {
            return Err(unknown("section", &section, sections.iter().map(String::as_str), origin));
        };
        let Value::Table(values) = values else {
            return Err(Problem::usage(format!("{section} in {origin} is a value, it must be a section"))
                .hint(format!("write [{section}] and the keys below it")));
        };
        for (key, value) in values {
            let Some(old) = target.get(&key) else {
                return Err(unknown("key", &key, target.keys().map(String::as_str), origin));
            };
            let value = match (old, value) {
                (Value::Float(_), Value::Integer(number)) => Value::Float(number as f64),
                (_, value) => value,
            };
            if value.type_str() != old.type_str() {
                return Err(Problem::usage(format!(
                    "{section}.{key} in {origin} is the {} {value}, it must be of type {}",
                    value.type_str(),
                    old.type_str()
                )));
            }
            target.insert(key, value);
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

/// A `KEY=VALUE` setting as a table with one key. A value that is not TOML is taken as a string.
fn setting(defaults: &Table, key: &str, value: &str) -> Result<Table, Problem> {
    let sections = || defaults.iter().filter_map(|(name, keys)| Some((name, keys.as_table()?)));
    let (section, key) = match key.split_once('.') {
        Some((section, key)) => (section.to_owned(), key),
        None => match sections().find(|(_, keys)| keys.contains_key(key)) {
            Some((section, _)) => (section.clone(), key),
            None => {
                let known: Vec<&str> =
                    sections().flat_map(|(_, keys)| keys.keys().map(String::as_str)).collect();
                return Err(unknown("key", key, known.into_iter(), &format!("{key}={value}")));
            }
        },
    };
    let parsed = format!("value = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(value.to_owned()));
    Ok(Table::from_iter([(section, Value::Table(Table::from_iter([(key.to_owned(), parsed)])))]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(settings: &[(&str, &str)]) -> Result<JobFile, Problem> {
        let owned: Vec<_> = settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        JobFile::resolve("char-lstm", None, &owned)
    }

    #[test]
    fn every_preset_resolves() {
        let names: Vec<String> = presets().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), 6);
        for name in names {
            JobFile::resolve(&name, None, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        let mnist = JobFile::resolve("mnist-gru", None, &[]).unwrap().job;
        assert_eq!((mnist.task, mnist.cell, mnist.hidden_size), (Task::Rows, Cell::Gru, 150));
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
            ([("jobb.seed", "3")], "unknown section 'jobb' in jobb.seed=3", "did you mean 'job'?"),
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
