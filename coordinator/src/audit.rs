//! Proof that a run has used the rows that its job and data prescribe: the journal's ledger against the data set.
//!
//! Each step's line of the ledger is a sum over the rows that were handed to the kernels, wherever they ran. What it
//! must be follows from job and data alone, so whoever has the data can check it, years later and on any machine.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use protocol::batch::Batch;
use protocol::job::RunSpec;
use protocol::problem::Problem;
use protocol::schedule::Work;
use protocol::sums::row_hash;
use serde::Serialize;

use crate::data::{self, Dataset, grouped};
use crate::store::journal::{LedgerLine, Replay};
use crate::store::load::newest_of_run;
use crate::store::run_dir::{StoredRun, journal_path};

/// What came out of an audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// Steps that were checked: all up to the ledger's last, or the newest checkpoint's if that is later.
    pub steps: u64,
    /// Rows that they must have used.
    pub rows: u64,
    /// Steps whose line is missing or another.
    pub bad_steps: u64,
    /// The first of them.
    pub first_bad: Option<BadStep>,
}

/// A step that did not use the rows that it must have used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BadStep {
    /// Steps done, this one included.
    pub step: u64,
    /// What follows from job and data.
    pub expected: LedgerLine,
    /// What the journal has; `None` if it has no line for the step.
    pub found: Option<LedgerLine>,
}

/// Audits the run in a directory. `data` is where its data lies now, if it is not where the run was told;
/// `data_dir` is searched for named data.
///
/// # Errors
/// It is not a run with a checkpoint, its checkpoint or the data is of another run, or something cannot be read.
/// What the audit finds is no error: see [`Audit::verdict`].
pub fn audit_run(run_dir: &Path, data: Option<&str>, data_dir: Option<&Path>) -> Result<Audit, Problem> {
    let newest = newest_of_run(run_dir)?;
    let stored = StoredRun::of(run_dir)?;
    stored.identity().check(&newest.file, newest.checkpoint.identity())?;
    let settings = stored.settings(run_dir)?;
    let settings = RunSpec { data: data.map_or(settings.data, str::to_owned), ..settings };
    let mut dataset = data::open(&stored.job, &settings, data_dir)?;
    let (found, expected) = (&dataset.facts().digest, &stored.data_digest);
    if found != expected {
        return Err(Problem::usage(format!(
            "the data '{}' has digest {found}, {} was trained on {expected}",
            settings.data,
            run_dir.display()
        ))
        .hint("name the run's own data with --data, or the folder in which it is with --data-dir"));
    }
    let ledger = Replay::read(&journal_path(run_dir))?.ledger;
    let step = newest.checkpoint.image.progress().step;
    Ok(audit(&ledger, step, stored.job.shards, &mut *dataset))
}

/// Checks every step of a ledger, and that it reaches the step of the newest checkpoint, without a gap. `data` is cut
/// into `shards` shards.
pub fn audit(
    ledger: &BTreeMap<u64, LedgerLine>,
    checkpoint_step: u64,
    shards: u32,
    data: &mut dyn Dataset,
) -> Audit {
    let last = ledger.last_key_value().map_or(0, |(&step, _)| step).max(checkpoint_step);
    let mut audit = Audit { steps: last, rows: 0, bad_steps: 0, first_bad: None };
    for step in 1..=last {
        let (expected, found) = (prescribed(step, shards, data), ledger.get(&step).copied());
        audit.rows += expected.rows;
        if found != Some(expected) {
            audit.bad_steps += 1;
            audit.first_bad.get_or_insert(BadStep { step, expected, found });
        }
    }
    audit
}

/// The line of the ledger that follows from job and data.
fn prescribed(step: u64, shards: u32, data: &mut dyn Dataset) -> LedgerLine {
    let (epoch, index) = data.shape().schedule.position(step - 1);
    let Batch { sample_ids, .. } = data.batch(Work::Train { step: step - 1, epoch, index }, 0..shards);
    LedgerLine {
        rows: sample_ids.len() as u64,
        row_hash: sample_ids.into_iter().map(row_hash).fold(0, u64::wrapping_add),
    }
}

impl Audit {
    /// Nothing, if every step used its rows.
    ///
    /// # Errors
    /// Otherwise a sentence with the first step that did not.
    pub fn verdict(&self) -> Result<(), Problem> {
        let Some(bad) = &self.first_bad else {
            return Ok(());
        };
        let (bad_steps, steps) = (grouped(self.bad_steps), grouped(self.steps));
        let are = if self.bad_steps == 1 { "is" } else { "are" };
        Err(Problem::failed(format!("audit: {bad}; {bad_steps} of {steps} steps {are} bad"))
            .hint("this run is not what its job and data prescribe: train it again, with --fresh"))
    }
}

/// What is said of a run that passes.
impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (steps, rows) = (grouped(self.steps), grouped(self.rows));
        write!(
            f,
            "audit: {steps} steps, {rows} rows: each step used exactly the rows that job and data prescribe"
        )
    }
}

impl fmt::Display for BadStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |line: LedgerLine| format!("{} rows with hash {:016x}", line.rows, line.row_hash);
        let (step, expected) = (self.step, line(self.expected));
        let Some(found) = self.found else {
            return write!(f, "the journal has no line for step {step}, which must have used {expected}");
        };
        let what = match found.rows.cmp(&self.expected.rows) {
            std::cmp::Ordering::Less => "rows were dropped",
            std::cmp::Ordering::Equal => "rows were repeated or exchanged",
            std::cmp::Ordering::Greater => "rows were added",
        };
        write!(f, "step {step} used {}, it must have used {expected}: {what}", line(found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::locate::Places;
    use protocol::job::JobFile;

    /// Embedded data, cut small: a text, lines, images and labelled lines.
    fn data_sets() -> [Box<dyn Dataset>; 4] {
        let cases = [
            ("char-gru", "seq_len", "5000"),
            ("char-gru", "mode", "lines"),
            ("mnist-rnn", "train_samples", "64"),
            ("classify-text", "validation_fraction", "0.98"),
        ];
        cases.map(|(preset, key, value)| {
            let settings = [("batch_size", "5"), ("shards", "3"), (key, value)]
                .map(|(key, value)| (key.to_owned(), value.to_owned()));
            let JobFile { job, run, .. } = JobFile::resolve(preset, None, &settings).unwrap();
            data::open_in(&job, &run, &Places::default()).unwrap()
        })
    }

    /// The ledger of a run that did what it should, from batches that were cut among three workers.
    fn ledger(steps: u64, data: &mut dyn Dataset) -> BTreeMap<u64, LedgerLine> {
        let schedule = data.shape().schedule;
        let step = |step: u64| {
            let (epoch, index) = schedule.position(step);
            let mut line = LedgerLine::default();
            for shard in 0..3 {
                let batch = data.batch(Work::Train { step, epoch, index }, shard..shard + 1);
                for id in batch.sample_ids {
                    line.rows += 1;
                    line.row_hash = line.row_hash.wrapping_add(row_hash(id));
                }
            }
            (step + 1, line)
        };
        (0..steps).map(step).collect()
    }

    #[test]
    fn a_run_of_several_epochs_passes() {
        for mut data in data_sets() {
            let steps = data.shape().schedule.steps_per_epoch * 2 + 3;
            let audit = audit(&ledger(steps, &mut *data), steps, 3, &mut *data);
            assert_eq!(audit, Audit { steps, rows: 5 * steps, bad_steps: 0, first_bad: None });
            assert_eq!(audit.verdict(), Ok(()));
        }
    }

    #[test]
    fn every_change_of_a_line_is_found_and_named() {
        type Change = fn(&mut BTreeMap<u64, LedgerLine>);
        let cases: [(Change, u64, &str); 8] = [
            (|ledger| ledger.get_mut(&7).unwrap().rows -= 1, 1, "step 7 used 4 rows"),
            (|ledger| ledger.get_mut(&7).unwrap().rows -= 1, 1, ": rows were dropped; 1 of 20 steps is bad"),
            (|ledger| ledger.get_mut(&7).unwrap().rows += 1, 1, ": rows were added; 1 of"),
            (|ledger| ledger.get_mut(&20).unwrap().row_hash ^= 1, 1, "step 20 used 5 rows"),
            (
                |ledger| ledger.get_mut(&1).unwrap().row_hash ^= 1 << 63,
                1,
                ": rows were repeated or exchanged;",
            ),
            (
                |ledger| ledger.retain(|&step, _| step != 9),
                1,
                "the journal has no line for step 9, which must",
            ),
            (|ledger| ledger.retain(|&step, _| step <= 18), 2, "no line for step 19"),
            (
                |ledger| {
                    let (a, b) = (ledger[&3], ledger[&4]);
                    ledger.extend([(3, b), (4, a)]);
                },
                2,
                "step 3 used 5 rows",
            ),
        ];
        for mut data in data_sets() {
            for (change, bad_steps, part) in cases {
                let mut ledger = ledger(20, &mut *data);
                change(&mut ledger);
                let audit = audit(&ledger, 20, 3, &mut *data);
                assert_eq!((audit.steps, audit.bad_steps), (20, bad_steps));
                let problem = audit.verdict().unwrap_err();
                assert!(problem.sentence.contains(part), "'{problem}' does not say '{part}'");
            }
        }
    }

    #[test]
    fn what_is_said_has_both_sums() {
        let [mut data, ..] = data_sets();
        let mut ledger = ledger(1, &mut *data);
        let expected = ledger[&1].row_hash;
        ledger.insert(1, LedgerLine { rows: 4, row_hash: 255 });
        let sentence = audit(&ledger, 1, 3, &mut *data).verdict().unwrap_err().sentence;
        assert_eq!(
            sentence,
            format!(
                "audit: step 1 used 4 rows with hash 00000000000000ff, it must have used 5 rows with hash \
                 {expected:016x}: rows were dropped; 1 of 1 steps is bad"
            )
        );
    }
}
