//! What a run directory holds, summed up for people and for programs. Reads only, and needs no lock: a run that is
//! going on can be inspected.

use std::fmt;
use std::path::Path;

use protocol::job::JobSpec;
use protocol::problem::Problem;
use serde::Serialize;

use super::checkpoint_dir::Newest;
use super::journal::Replay;
use super::load::newest_of_run;
use super::run_dir::journal_path;
use crate::data::grouped;

/// The newest usable checkpoint of a run and what is known about it. Losses are in nats; `None` is unknown or not
/// finite.
///
/// Only `parameter_sha256` and `state_sha256` have `sha256` in their names: they are what two runs are compared by.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// The directory, as it was given.
    pub run_dir: String,
    /// The checkpoint's path relative to it.
    pub checkpoint: String,
    /// Steps done.
    pub step: u64,
    /// Whole epochs done.
    pub epoch: u64,
    /// Mean training loss of the running epoch so far, or of the one that has just ended.
    pub train_loss: Option<f64>,
    /// Mean validation loss of the last evaluation.
    pub val_loss: Option<f64>,
    /// Fraction of the validation targets that the network ranked first then.
    pub val_accuracy: Option<f64>,
    /// Hash of the flat parameter buffer, computed from the checkpoint's tensors.
    pub parameter_sha256: String,
    /// Hash of the whole training state, computed from the checkpoint.
    pub state_sha256: String,
    /// What the run is computed with, as far as its bits depend on it.
    pub bits: Option<String>,
    /// Number of parameters.
    pub parameters: usize,
    /// What is computed.
    pub job: JobSpec,
    /// The parameter tensors in the order of the flat buffer.
    pub tensors: Vec<TensorLine>,
    /// What was changed or went wrong on the way, in the order of steps.
    pub events: Vec<EventLine>,
    /// A sentence for each newer checkpoint that was passed over.
    pub skipped_checkpoints: Vec<String>,
    /// A sentence for what else could not be read.
    pub notes: Vec<String>,
}

/// One parameter tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TensorLine {
    /// PyTorch's name.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

/// Something that happened to the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EventLine {
    /// Steps done when it did.
    pub step: u64,
    /// What it was.
    pub text: String,
}

/// Reads the newest usable checkpoint of a run directory, and the journal.
///
/// # Errors
/// It is not a run directory, has no checkpoint yet, or all its checkpoints are damaged. A damaged journal only
/// leaves the validation unknown.
pub fn inspect(run_dir: &Path) -> Result<Inspection, Problem> {
    let newest = newest_of_run(run_dir)?;
    let (replay, notes) = match Replay::read(&journal_path(run_dir)) {
        Ok(replay) => (replay, Vec::new()),
        Err(problem) => (Replay::default(), vec![problem.sentence]),
    };
    Ok(Inspection::of(run_dir, newest, &replay, notes))
}

impl Inspection {
    fn of(run_dir: &Path, newest: Newest, replay: &Replay, notes: Vec<String>) -> Self {
        let Newest { checkpoint, file, skipped } = newest;
        let image = &checkpoint.image;
        let progress = image.progress();
        let validation = replay.evaluation_at(progress.step);
        let finite = |value: f64| value.is_finite().then_some(value);
        let tensor = |tensor: &protocol::layout::Tensor| TensorLine {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
        };
        Self {
            run_dir: run_dir.display().to_string(),
            checkpoint: file,
            step: progress.step,
            epoch: progress.epoch,
            train_loss: image.control().epoch.mean_loss().and_then(finite),
            val_loss: validation.and_then(|sums| sums.mean_loss()).and_then(finite),
            val_accuracy: validation.and_then(|sums| sums.accuracy()),
            parameter_sha256: image.parameter_sha256(),
            state_sha256: image.state_sha256(),
            bits: replay.bits.clone(),
            parameters: image.layout().parameters(),
            tensors: image.layout().tensors.iter().map(tensor).collect(),
            job: checkpoint.job,
            events: events(replay),
            skipped_checkpoints: skipped,
            notes,
        }
    }

    /// One JSON object on several lines.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain values can be written as JSON")
    }
}

fn events(replay: &Replay) -> Vec<EventLine> {
    let rates = replay.learning_rates.iter().map(|(&step, rate)| (step, format!("learning rate {rate}")));
    let mut events: Vec<_> =
        rates.chain(replay.events.iter().cloned()).map(|(step, text)| EventLine { step, text }).collect();
    events.sort_by_key(|event| event.step);
    events
}

/// The table for people.
impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |value: Option<f64>| value.map_or("unknown".to_owned(), |value| format!("{value:.4}"));
        let network = format!("{}, {} parameters", self.job.network(), grouped(self.parameters as u64));
        let rows = [
            ("run", self.run_dir.clone()),
            ("checkpoint", self.checkpoint.clone()),
            ("network", network),
            ("precision", self.job.precision.in_words().to_owned()),
            ("computed with", self.bits.clone().unwrap_or("unknown".to_owned())),
            ("step", self.step.to_string()),
            ("epochs done", self.epoch.to_string()),
            ("train loss", number(self.train_loss)),
            ("val loss", number(self.val_loss)),
            ("val accuracy", number(self.val_accuracy)),
            ("parameter sha256", self.parameter_sha256.clone()),
            ("state sha256", self.state_sha256.clone()),
        ];
        for (name, value) in rows {
            writeln!(f, "{name:<18}{value}")?;
        }
        let width = self.tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0);
        writeln!(f, "\n{:<width$}  shape", "tensor")?;
        for TensorLine { name, shape } in &self.tensors {
            writeln!(f, "{name:<width$}  {shape:?}")?;
        }
        for EventLine { step, text } in &self.events {
            writeln!(f, "\nafter step {step}: {text}")?;
        }
        for skipped in &self.skipped_checkpoints {
            writeln!(f, "\nskipped: {skipped}")?;
        }
        for note in &self.notes {
            writeln!(f, "\nnote: {note}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::journal::{Journal, Record};
    use crate::store::run_dir::{OpenMode, RunDir};
    use crate::store::testing::{self, KEEP};
    use protocol::sums::StepSums;
    use std::fs;

    /// A run with checkpoints after steps 5 and 10, and these records.
    fn run(records: &[Record]) -> (tempfile::TempDir, RunDir) {
        let dir = tempfile::tempdir().unwrap();
        let job = testing::job_file("char-gru", &[]);
        let run = RunDir::open(dir.path(), OpenMode::Resume, &job, "d1").unwrap();
        for step in [5, 10] {
            run.checkpoints().write(&testing::checkpoint(step, step), KEEP).unwrap();
        }
        let (mut journal, _) = Journal::open(&run.journal_path()).unwrap();
        for record in records {
            journal.append(record).unwrap();
        }
        (dir, run)
    }

    fn evaluation(step: u64, loss: f64) -> Record {
        Record::evaluation(step, &StepSums { loss, weight: 8, correct: 2, ..Default::default() })
    }

    #[test]
    fn the_json_has_the_promised_keys_and_the_hashes_of_the_state() {
        let (dir, _run) = run(&[evaluation(5, 16.0), evaluation(10, 12.0), evaluation(15, 8.0)]);
        let inspection = inspect(dir.path()).unwrap();
        let json: serde_json::Value = serde_json::from_str(&inspection.to_json()).unwrap();
        let keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let expected = [
            "bits",
            "checkpoint",
            "epoch",
            "events",
            "job",
            "notes",
            "parameter_sha256",
            "parameters",
            "run_dir",
            "skipped_checkpoints",
            "state_sha256",
            "step",
            "tensors",
            "train_loss",
            "val_accuracy",
            "val_loss",
        ];
        assert_eq!(keys, expected);
        let image = testing::checkpoint(10, 10).image;
        assert_eq!(json["parameter_sha256"], image.parameter_sha256());
        assert_eq!(json["state_sha256"], image.state_sha256());
        assert_eq!((json["step"].as_u64(), json["epoch"].as_u64()), (Some(10), Some(2)));
        assert_eq!(json["train_loss"].as_f64(), Some((10.0 + 10.0 / 3.0) / 10.0));
        assert_eq!((json["val_loss"].as_f64(), json["val_accuracy"].as_f64()), (Some(1.5), Some(0.25)));
        assert_eq!(json["checkpoint"], "checkpoints/step-00000010.safetensors");
        assert_eq!(json["parameters"], image.layout().parameters());
        assert_eq!(json["job"]["cell"], "gru");
        assert_eq!(json["tensors"][0], serde_json::json!({"name": "rnn.weight_ih_l0", "shape": [6, 5]}));
        assert_eq!(keys_with("sha256", &json), 2);
    }

    /// Keys anywhere in a value that contain `part`.
    fn keys_with(part: &str, json: &serde_json::Value) -> usize {
        match json {
            serde_json::Value::Object(map) => {
                map.iter().map(|(key, value)| usize::from(key.contains(part)) + keys_with(part, value)).sum()
            }
            serde_json::Value::Array(items) => items.iter().map(|item| keys_with(part, item)).sum(),
            _ => 0,
        }
    }

    #[test]
    fn the_validation_is_the_last_one_of_the_state_after_rewinds() {
        let rewind = Record::Rewind { to_step: 5 };
        let cases = [
            (vec![], None),
            (vec![evaluation(5, 16.0)], Some(2.0)),
            (vec![evaluation(15, 16.0)], None),
            (vec![evaluation(5, 16.0), evaluation(10, 8.0), rewind.clone()], Some(2.0)),
            (vec![evaluation(10, 8.0), rewind, evaluation(10, 4.0)], Some(0.5)),
            (vec![evaluation(10, f64::INFINITY)], None),
        ];
        for (records, expected) in cases {
            let (dir, _run) = run(&records);
            assert_eq!(inspect(dir.path()).unwrap().val_loss, expected, "{records:?}");
        }
    }

    #[test]
    fn changes_on_the_way_are_shown_in_the_order_of_steps() {
        let rate = |step, rate: &str| Record::LearningRate { step, learning_rate: rate.to_owned() };
        let done = |step| Record::step(step, &StepSums::default());
        let event = Record::Event { text: "epochs: 2 there, 3 here".to_owned() };
        let rewind = Record::Rewind { to_step: 8 };
        let (dir, _run) = run(&[rate(5, "0.0005"), done(6), event, rate(8, "0.1"), rate(9, "7"), rewind]);
        let inspection = inspect(dir.path()).unwrap();
        let shown: Vec<_> = inspection.events.iter().map(|e| format!("{} {}", e.step, e.text)).collect();
        assert_eq!(shown, ["5 learning rate 0.0005", "6 epochs: 2 there, 3 here", "8 learning rate 0.1"]);
        assert!(inspection.to_string().contains("\nafter step 5: learning rate 0.0005\n"));
    }

    #[test]
    fn a_damaged_newest_checkpoint_is_said() {
        let (dir, _run) = run(&[]);
        fs::write(dir.path().join("checkpoints/step-00000010.safetensors"), "x").unwrap();
        let inspection = inspect(dir.path()).unwrap();
        assert_eq!((inspection.step, inspection.skipped_checkpoints.len()), (5, 1));
        assert_eq!(inspection.state_sha256, testing::checkpoint(5, 5).image.state_sha256());
        assert!(
            inspection.to_string().contains("skipped: checkpoints/step-00000010.safetensors: it has 1 bytes")
        );
    }

    #[test]
    fn a_damaged_journal_leaves_the_rest_readable() {
        let (dir, run) = run(&[evaluation(5, 16.0), evaluation(10, 12.0)]);
        let mut bytes = fs::read(run.journal_path()).unwrap();
        bytes[0] ^= 1;
        fs::write(run.journal_path(), &bytes).unwrap();
        let inspection = inspect(dir.path()).unwrap();
        assert_eq!((inspection.step, inspection.val_loss), (10, None));
        assert!(inspection.notes[0].starts_with("line 1 of "), "{:?}", inspection.notes);
    }

    #[test]
    fn the_table_is_for_people() {
        let generation = Record::Generation {
            generation: 1,
            members: vec![],
            reason: "first".to_owned(),
            bits: Some("cpu 1".to_owned()),
        };
        let (dir, _run) = run(&[generation, evaluation(10, 12.0)]);
        let table = inspect(dir.path()).unwrap().to_string();
        for line in [
            "network           1 × gru 2, 69 parameters",
            "precision         f32",
            "computed with     cpu 1",
            "step              10",
            "train loss        1.3333",
            "val accuracy      0.2500",
            "tensor            shape",
            "rnn.weight_ih_l0  [6, 5]",
        ] {
            assert!(table.lines().any(|found| found == line), "no line '{line}' in\n{table}");
        }
    }

    #[test]
    fn what_cannot_be_inspected_is_said_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let job = testing::job_file("char-gru", &[]);
        let cases = [("missing", "there is no directory "), ("empty", "is not a run directory")];
        fs::create_dir(dir.path().join("empty")).unwrap();
        for (name, reason) in cases {
            let problem = inspect(&dir.path().join(name)).unwrap_err();
            assert!(problem.sentence.contains(reason) && problem.hint.is_some(), "{problem}");
        }
        let path = dir.path().join("new");
        let _run = RunDir::open(&path, OpenMode::Resume, &job, "d1").unwrap();
        let problem = inspect(&path).unwrap_err();
        assert!(problem.sentence.ends_with("has no checkpoint yet") && problem.hint.is_some(), "{problem}");
    }
}
