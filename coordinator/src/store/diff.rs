//! Whether two runs hold the same bits, and if not, where they part. Reads only, and needs no lock.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use protocol::job::differences;
use protocol::problem::Problem;
use serde::Serialize;

use super::checkpoint::Checkpoint;
use super::checkpoint_dir::CheckpointDir;
use super::journal::Replay;
use super::load::load;
use super::metrics_log;
use super::record_diff::{Parted, PartedStep, RecordDiff, StepRecords, record_diff};
use super::run_dir::{journal_path, metrics_path};
use super::state_diff::{StateDiff, state_diff};

/// Two runs compared.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Diff {
    /// The first.
    pub a: Summary,
    /// The second.
    pub b: Summary,
    /// Their newest states are equal.
    pub bit_equal: bool,
    /// Keys of `[job]` that differ, and `digest of the data`.
    pub job: Vec<Parted>,
    /// What both have recorded of their steps; `None` if there is no such step, as for a checkpoint on its own.
    pub records: Option<RecordDiff>,
    /// Their states after the newest step of which both have a checkpoint, else their newest ones.
    pub states: States,
    /// What could not be read and was left out, in sentences.
    pub notes: Vec<String>,
}

/// One of the two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Its path, as it was given.
    pub path: String,
    /// Steps done in its newest state.
    pub step: u64,
    /// Hash of that state.
    pub state_sha256: String,
}

/// How two states compare.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum States {
    /// Every bit is the same.
    Equal {
        /// Steps done.
        step: u64,
    },
    /// They differ.
    Different {
        /// Steps done in each.
        steps: [u64; 2],
        /// Where.
        difference: Box<StateDiff>,
    },
    /// Their shapes differ.
    Incomparable {
        /// Why, in words.
        reason: String,
    },
}

/// Compares two run directories, or checkpoint files.
///
/// # Errors
/// One of them is neither, has no usable checkpoint, or cannot be read. A journal that cannot is only noted: the states
/// say by themselves whether they are equal.
pub fn diff(a: &Path, b: &Path) -> Result<Diff, Problem> {
    let (a, b) = (Side::read(a)?, Side::read(b)?);
    let newest = States::of(&a.newest, &b.newest);
    let bit_equal = matches!(newest, States::Equal { .. });
    let common = if bit_equal { None } else { Side::newest_common(&a, &b)? };
    let records = a.records.as_ref().zip(b.records.as_ref()).map(|(a, b)| record_diff(a, b));
    let notes = [("A", &a.unread), ("B", &b.unread)].into_iter().filter_map(|(side, unread)| {
        Some(format!("{}: compared without the rows of {side}'s steps", unread.as_ref()?))
    });
    Ok(Diff {
        notes: notes.collect(),
        bit_equal,
        job: job_diff(&a.newest, &b.newest),
        records: records.filter(|records| records.common > 0),
        states: common.map_or(newest, |(a, b)| States::of(&a, &b)),
        a: a.summary(),
        b: b.summary(),
    })
}

impl States {
    fn of(a: &Checkpoint, b: &Checkpoint) -> Self {
        let steps = [a, b].map(|checkpoint| checkpoint.image.progress().step);
        match state_diff(&a.image, &b.image) {
            Ok(None) => Self::Equal { step: steps[0] },
            Ok(Some(difference)) => Self::Different { steps, difference: Box::new(difference) },
            Err(reason) => Self::Incomparable { reason },
        }
    }
}

/// A run or a checkpoint, as read.
struct Side {
    path: String,
    newest: Checkpoint,
    /// The run's, if it is one.
    checkpoints: Option<CheckpointDir>,
    records: Option<StepRecords>,
    /// Why its journal is not among them.
    unread: Option<String>,
}

impl Side {
    fn read(path: &Path) -> Result<Self, Problem> {
        let shown = path.display().to_string();
        let newest = load(path)?.checkpoint;
        if path.is_file() {
            return Ok(Self { path: shown, newest, checkpoints: None, records: None, unread: None });
        }
        let lines = metrics_log::read(&metrics_path(path))?;
        let (ledger, unread) = match Replay::read(&journal_path(path)) {
            Ok(replay) => (replay.ledger, None),
            Err(problem) => (BTreeMap::new(), Some(problem.sentence)),
        };
        let records = Some(StepRecords::new(lines, ledger));
        Ok(Self { path: shown, newest, checkpoints: Some(CheckpointDir::new(path)), records, unread })
    }

    fn summary(&self) -> Summary {
        let image = &self.newest.image;
        Summary { path: self.path.clone(), step: image.progress().step, state_sha256: image.state_sha256() }
    }

    /// The checkpoints of the newest step of which both have a usable one.
    fn newest_common(a: &Self, b: &Self) -> Result<Option<(Checkpoint, Checkpoint)>, Problem> {
        let (steps_a, steps_b) = (a.steps()?, b.steps()?);
        let common = steps_a.into_iter().filter(|step| steps_b.contains(step));
        Ok(common.filter_map(|step| a.at(step).zip(b.at(step))).next())
    }

    /// Steps of which it has a checkpoint, newest first.
    fn steps(&self) -> Result<Vec<u64>, Problem> {
        match &self.checkpoints {
            Some(dir) => dir.steps(),
            None => Ok(vec![self.newest.image.progress().step]),
        }
    }

    /// The state after this step, if it is usable.
    fn at(&self, step: u64) -> Option<Checkpoint> {
        if step == self.newest.image.progress().step {
            return Some(self.newest.clone());
        }
        self.checkpoints.as_ref()?.verified(step).ok()
    }
}

fn job_diff(a: &Checkpoint, b: &Checkpoint) -> Vec<Parted> {
    let keys = differences(&a.job, &b.job).into_iter();
    let mut parted: Vec<Parted> =
        keys.map(|key| Parted { name: key.key, a: key.here, b: key.there }).collect();
    if a.data_digest != b.data_digest {
        let (a, b) = (a.data_digest.clone(), b.data_digest.clone());
        parted.push(Parted { name: "digest of the data".to_owned(), a, b });
    }
    parted
}

impl Diff {
    /// What came out, in a sentence.
    pub fn verdict(&self) -> String {
        if self.bit_equal {
            let Summary { step, state_sha256, .. } = &self.a;
            return format!(
                "bit-equal: both hold the same state after step {step} (state_sha256 {state_sha256})"
            );
        }
        if let Some(RecordDiff { parted: Some(parted), .. }) = &self.records {
            return format!("A and B part at step {}", parted.step);
        }
        match (&self.states, &self.records) {
            (States::Incomparable { .. }, _) => "A and B have states of different shapes".to_owned(),
            (States::Different { steps: [a, b], .. }, None) if a == b => {
                format!("the states after step {a} differ")
            }
            (States::Different { steps: [a, b], .. }, Some(records)) if a == b => {
                let common = records.common;
                format!("the states after step {a} differ, although the records of {common} steps are equal")
            }
            (States::Different { steps: [a, b], .. }, None) => {
                format!("A holds a state after step {a}, B one after step {b}")
            }
            (States::Different { .. }, Some(records)) => as_far_as_it_goes(
                records,
                "by the records: there is no step of which both still have a state",
            ),
            (States::Equal { step }, None) => format!("A and B hold equal states after step {step}"),
            (States::Equal { step }, Some(records)) => {
                as_far_as_it_goes(records, &format!("states compared after step {step}"))
            }
        }
    }

    /// One JSON object on several lines.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain values can be written as JSON")
    }
}

fn as_far_as_it_goes(records: &RecordDiff, how: &str) -> String {
    let [a, b] = records.recorded;
    let (shorter, longer, step) = if a < b { ("A", "B", a) } else { ("B", "A", b) };
    format!("{shorter} is equal to {longer} as far as it goes: step {step} ({how})")
}

impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.verdict())?;
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        if self.bit_equal && self.job.is_empty() {
            return Ok(());
        }
        let recorded = self.records.as_ref().map(|records| records.recorded.map(|steps| steps.to_string()));
        let [recorded_a, recorded_b] = recorded.unwrap_or_default();
        let newest = [&self.a, &self.b].map(|side| format!("after step {}", side.step));
        let rows = [
            ("path", &self.a.path, &self.b.path),
            ("newest state", &newest[0], &newest[1]),
            ("recorded steps", &recorded_a, &recorded_b),
        ];
        let rows = rows.into_iter().map(|(name, a, b)| (name.to_owned(), a, b));
        let parted = self.records.iter().filter_map(|records| records.parted.as_ref());
        let numbers = parted.flat_map(|PartedStep { step, numbers }| {
            numbers.iter().map(move |Parted { name, a, b }| (format!("{name}, step {step}"), a, b))
        });
        let keys = self.job.iter().map(|Parted { name, a, b }| (name.clone(), a, b));
        let known = |(_, a, b): &(String, &String, &String)| !(a.is_empty() && b.is_empty());
        let rows: Vec<_> = rows.chain(keys).chain(numbers).filter(known).collect();
        let names = rows.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
        let firsts = rows.iter().map(|(_, a, _)| a.len()).max().unwrap_or(0);
        writeln!(f, "\n{:<names$}  {:<firsts$}  B", "", "A")?;
        for (name, a, b) in rows {
            writeln!(f, "{name:<names$}  {a:<firsts$}  {b}")?;
        }
        match &self.states {
            States::Equal { .. } => Ok(()),
            States::Different { steps: [a, b], difference } if a == b => {
                write!(f, "\nThe states after step {a}:\n{difference}")
            }
            States::Different { steps: [a, b], difference } => {
                write!(f, "\nThe states after steps {a} (A) and {b} (B):\n{difference}")
            }
            States::Incomparable { reason } => writeln!(f, "\nThe states cannot be compared: {reason}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::journal::{Journal, Record};
    use crate::store::metrics_log::{MetricLine, MetricsLog, SecondsLine, StepLine};
    use crate::store::run_dir::{OpenMode, RunDir};
    use crate::store::state::StateImage;
    use crate::store::testing::{self, KEEP};
    use protocol::sums::StepSums;
    use std::fs;

    /// A run with these steps recorded and these checkpoints.
    fn run(steps: u64, loss: fn(u64) -> f64, checkpoints: &[Checkpoint]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let job = testing::job_file("char-gru", &[]);
        let run = RunDir::open(dir.path(), OpenMode::Resume, &job, "d1").unwrap();
        let (mut journal, _) = Journal::open(&run.journal_path()).unwrap();
        let mut metrics = MetricsLog::open(&run.metrics_path(), u64::MAX).unwrap();
        for step in 1..=steps {
            journal.append(&Record::step(step, &StepSums { rows: 3, ..Default::default() })).unwrap();
            let line = StepLine {
                step,
                epoch: 1,
                train_loss: loss(step),
                grad_norm: 1.0,
                learning_rate: 0.1,
                samples_per_second: 1.0,
                workers: 1,
                skipped: false,
                seconds: SecondsLine::default(),
            };
            metrics.append(&MetricLine::Step(line)).unwrap();
        }
        for checkpoint in checkpoints {
            run.checkpoints().write(checkpoint, KEEP).unwrap();
        }
        dir
    }

    /// No short decimal number equals these.
    fn loss(step: u64) -> f64 {
        1.0 / (step as f64 + 0.3)
    }

    fn flipped(checkpoint: &Checkpoint, float: usize) -> Checkpoint {
        let mut bytes = checkpoint.image.bytes().to_vec();
        bytes[4 * float] ^= 1;
        let image = StateImage::new(checkpoint.image.layout(), bytes).unwrap();
        Checkpoint { image, ..checkpoint.clone() }
    }

    #[test]
    fn equal_states_are_bit_equal() {
        let state = testing::checkpoint(10, 1);
        let a = run(10, loss, std::slice::from_ref(&state));
        let b = run(10, loss, &[testing::checkpoint(5, 0), state.clone()]);
        let diff = diff(a.path(), b.path()).unwrap();
        assert!(diff.bit_equal);
        let hash = state.image.state_sha256();
        let sentence = format!("bit-equal: both hold the same state after step 10 (state_sha256 {hash})");
        assert_eq!(diff.to_string(), format!("{sentence}\n"));
    }

    #[test]
    fn one_bit_of_the_state_is_named_though_all_records_are_equal() {
        let state = testing::checkpoint(10, 1);
        let parameters = state.image.layout().parameters();
        let a = run(10, loss, std::slice::from_ref(&state));
        let b = run(10, loss, &[flipped(&state, parameters + 7)]);
        let diff = diff(a.path(), b.path()).unwrap();
        assert!(!diff.bit_equal && diff.job.is_empty());
        assert_eq!(
            diff.verdict(),
            "the states after step 10 differ, although the records of 10 steps are equal"
        );
        let States::Different { steps: [10, 10], difference } = &diff.states else { panic!("{diff:?}") };
        let first = difference.first.as_ref().unwrap();
        assert_eq!((&*first.tensor, &*first.index), ("adam.first_moment.rnn.weight_ih_l0", &[1, 2][..]));
        assert!(diff.to_string().contains("\n1 of 213 elements differ\n"), "{diff}");
    }

    #[test]
    fn runs_of_different_lengths_are_compared_as_far_as_both_go() {
        let [five, ten] = [5, 10].map(|step| testing::checkpoint(step, 0));
        let fifteen = testing::checkpoint(15, 0);
        let long = run(10, loss, &[five.clone(), ten.clone()]);
        let verdict = |a: &Path, b: &Path| diff(a, b).unwrap().verdict();
        let short = run(5, loss, &[five]);
        let sentence = "B is equal to A as far as it goes: step 5 (states compared after step 5)";
        assert_eq!(verdict(long.path(), short.path()), sentence);
        let sentence = "A is equal to B as far as it goes: step 5 (states compared after step 5)";
        assert_eq!(verdict(short.path(), long.path()), sentence);
        let late = run(15, loss, &[fifteen]);
        assert!(
            verdict(late.path(), long.path())
                .starts_with("B is equal to A as far as it goes: step 10 (by the")
        );
    }

    #[test]
    fn the_step_at_which_runs_part_comes_first() {
        let states = [5, 10].map(|step| testing::checkpoint(step, 1));
        let a = run(10, loss, &states);
        let other = |step| if step < 7 { loss(step) } else { f64::from_bits(loss(step).to_bits() + 1) };
        let b = run(8, other, &[states[0].clone(), testing::checkpoint(8, 2)]);
        let diff = diff(a.path(), b.path()).unwrap();
        assert_eq!(diff.verdict(), "A and B part at step 7");
        assert_eq!(diff.states, States::Equal { step: 5 });
        assert!(diff.to_string().contains("train_loss, step 7  0.136986301369863"), "{diff}");
    }

    #[test]
    fn other_jobs_and_shapes_are_named() {
        let (text, images) = (testing::checkpoint(10, 1), testing::rows_checkpoint(10));
        let a = run(10, loss, &[text]);
        let file = a.path().join("images.safetensors");
        fs::write(&file, images.to_bytes()).unwrap();
        let diff = diff(a.path(), &file).unwrap();
        assert_eq!(diff.verdict(), "A and B have states of different shapes");
        let names: Vec<&str> = diff.job.iter().map(|parted| parted.name.as_str()).collect();
        assert!(names.contains(&"cell") && names.contains(&"digest of the data"), "{names:?}");
        assert!(diff.records.is_none());
        assert!(
            diff.to_string().contains("cannot be compared: rnn.weight_ih_l0 is [6, 5] in A and [2, 28] in B"),
            "{diff}"
        );
    }

    #[test]
    fn a_damaged_journal_is_noted_and_the_states_are_compared() {
        let state = testing::checkpoint(10, 1);
        let [a, b] = [(); 2].map(|()| run(10, loss, std::slice::from_ref(&state)));
        let journal = journal_path(b.path());
        let whole = fs::read_to_string(&journal).unwrap();
        fs::write(&journal, format!("damaged\n{whole}")).unwrap();
        let diff = diff(a.path(), b.path()).unwrap();
        assert!(diff.bit_equal);
        assert_eq!(diff.records.as_ref().unwrap().common, 10, "the metrics are compared");
        let shown = journal.display();
        let note = format!("line 1 of {shown} is damaged: compared without the rows of B's steps");
        assert_eq!(diff.notes, std::slice::from_ref(&note));
        assert!(diff.to_string().ends_with(&format!("\nnote: {note}\n")), "{diff}");
    }

    #[test]
    fn what_cannot_be_compared_is_said() {
        let good = run(10, loss, &[testing::checkpoint(10, 1)]);
        let empty = run(3, loss, &[]);
        let text = good.path().join("notes.txt");
        fs::write(&text, "mine").unwrap();
        let cases = [
            (empty.path().to_owned(), "has no checkpoint yet"),
            (good.path().join("missing"), "there is no directory"),
            (text, "notes.txt is not a usable checkpoint: not a safetensors file"),
        ];
        for (path, part) in cases {
            for (a, b) in [(good.path(), &*path), (&*path, good.path())] {
                let problem = diff(a, b).unwrap_err();
                assert!(problem.sentence.contains(part), "'{problem}' does not say '{part}'");
            }
        }
    }
}
