//! Data sets: where they lie, how they are read, and which rows they give to each piece of work.
//!
//! In reading order:
//!
//! - [`locate`]: from the name or path in `[run] data` to files, or to the data that is compiled in.
//! - [`file`]: a file's bytes, unpacked and bounded, and their digest.
//! - [`text`]: task `chars` over any UTF-8 text; the embedded text.
//! - [`lines`]: task `chars` over each line of a text; [`labelled`]: task `classify`. [`fields`]: embedded labelled lines.
//! - [`sequences`]: the rows of both; [`buckets`]: which of them share a batch; [`padding`]: rows of one length.
//! - [`tokenizer`], [`vocabulary`]: the characters of a text as tokens and back.
//! - [`images`]: task `rows` over any labelled images.
//! - [`idx`]: the file format of MNIST.
//! - [`digits`]: the embedded digits, drawn when they are opened.
//! - [`known`]: the data sets that go by a name, and whether they are what they should be.
//! - [`fetch`](mod@fetch): getting them from where they are published.

mod buckets;
mod digits;
pub mod fetch;
mod fields;
mod file;
#[doc(hidden)]
pub mod fuzzing;
mod idx;
mod images;
pub mod known;
mod labelled;
mod lines;
pub mod locate;
mod padding;
mod sequences;
mod text;
mod tokenizer;
pub mod vocabulary;

use std::ops::Range;
use std::path::Path;

use protocol::batch::{Batch, DataShape, ShardBatch};
use protocol::job::{JobSpec, RunSpec, Task, TextMode};
use protocol::problem::Problem;
use protocol::schedule::{Schedule, Work};
use protocol::slots;

use images::RowsDataset;
use locate::{Places, Source};
use sequences::SequenceDataset;
use text::TextDataset;

pub use text::EMBEDDED_TEXT_VERSION;

/// A data set, cut for one job: a pure function from work and shards to rows.
pub trait Dataset: Send {
    /// What workers learn about it.
    fn shape(&self) -> &DataShape;

    /// The rows of `shards` in this piece of work, which must be one of the schedule's; `shards` is not empty.
    ///
    /// Costs a copy of the rows, whatever came before; only the first call of another epoch also shuffles the samples
    /// (or, of lines, the steps and the samples of a pool), once per [`handle`](Self::handle). The windows of a text
    /// are never shuffled.
    fn batch(&mut self, work: Work, shards: Range<u32>) -> Batch;

    /// What people and resumed runs learn about it.
    fn facts(&self) -> &DataFacts;

    /// Another handle on the same data. The content is shared, not copied.
    fn handle(&self) -> Box<dyn Dataset>;
}

/// What people and resumed runs learn about a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFacts {
    /// For people: `embedded text v1, 412,345 characters, 87 distinct`.
    pub name: String,
    /// Hex sha256 of the content, training and validation: equal whether a file was gzipped or not.
    pub digest: String,
    /// Tasks `chars` and `classify`: the character of each token, ascending.
    pub vocabulary: Option<Vec<char>>,
    /// Task `classify`: the label of each class, ascending.
    pub labels: Option<Vec<String>>,
    /// What is counted below: `characters`, `lines` or `images`.
    pub sample_unit: &'static str,
    /// Samples to learn from: training images or lines, or characters of the training part that are predicted.
    pub train_samples: u64,
    /// Of these, how many an epoch leaves out because they do not fill a batch.
    pub skipped_per_epoch: u64,
    /// Samples that each evaluation predicts.
    pub validation_samples: u64,
}

/// Opens the data that `run.data` names, for this job.
///
/// `data_dir` is the folder given on the command line: named data is then looked for there only, otherwise in
/// `LOCKSTEP_DATA_DIR` and the user's cache.
///
/// # Errors
/// Data that is missing, of the other task, damaged, or too small for the job's batch.
pub fn open(job: &JobSpec, run: &RunSpec, data_dir: Option<&Path>) -> Result<Box<dyn Dataset>, Problem> {
    open_in(job, run, &Places::of_process(data_dir))
}

/// [`open`] with the places to look in as a parameter.
///
/// # Errors
/// As [`open`].
pub fn open_in(job: &JobSpec, run: &RunSpec, places: &Places) -> Result<Box<dyn Dataset>, Problem> {
    Ok(match locate::locate(job.task, &run.data, places)? {
        Source::EmbeddedText => {
            let name = format!("embedded text v{EMBEDDED_TEXT_VERSION}");
            open_text(&name, text::EMBEDDED_TEXT.as_bytes(), job, run)?
        }
        Source::EmbeddedFields => {
            let name = format!("embedded fields v{}", fields::EMBEDDED_FIELDS_VERSION);
            open_text(&name, fields::text().as_bytes(), job, run)?
        }
        Source::EmbeddedDigits => {
            let name = format!("embedded digits v{}", digits::EMBEDDED_DIGITS_VERSION);
            let (train, test) = (digits::train(), digits::test());
            Box::new(RowsDataset::new(&name, train, test, job, run)?)
        }
        Source::Text { name, path, sha256 } => {
            let bytes = file::read(&path, file::LIMIT_BYTES)?;
            if let Some(expected) = sha256 {
                file::verify(&path, &bytes, expected)?;
            }
            open_text(&name, &bytes, job, run)?
        }
        Source::Images { name, train, test } => {
            let (train, test) = (idx::read(&train)?, idx::read(&test)?);
            Box::new(RowsDataset::new(&name, train, test, job, run)?)
        }
    })
}

/// Opens a text, which people know as `name`, as the job reads it.
fn open_text(name: &str, bytes: &[u8], job: &JobSpec, run: &RunSpec) -> Result<Box<dyn Dataset>, Problem> {
    let sequences = match (job.task, job.text.mode) {
        (Task::Classify, _) => labelled::read(name, bytes, job)?,
        (_, TextMode::Lines) => lines::read(name, bytes, job)?,
        (_, TextMode::Stream) => return Ok(Box::new(TextDataset::new(name, bytes, job, run)?)),
    };
    Ok(Box::new(SequenceDataset::new(sequences, job, run)?))
}

/// The lengths of a run over a data set whose epoch has `steps_per_epoch` steps.
fn schedule(run: &RunSpec, steps_per_epoch: u64, evaluation_batches: u64) -> Schedule {
    let of_epochs = (run.epochs > 0).then(|| run.epochs.saturating_mul(steps_per_epoch));
    let of_steps = (run.steps > 0).then_some(run.steps);
    let total_steps = of_epochs.into_iter().chain(of_steps).min();
    Schedule {
        steps_per_epoch,
        evaluation_batches,
        total_steps: total_steps.expect("a checked job has epochs or steps"),
    }
}

/// The shards of a batch, in order, where the global batch has rows in the slots `0 .. filled` only.
fn shard_batches(job: BatchCut, shards: Range<u32>, filled: u32) -> Vec<ShardBatch> {
    let first_slot = job.slots_of(shards.clone()).start.min(filled);
    shards
        .map(|shard| {
            let slots = slots::slots(job.batch_size, job.shards, shard);
            let row = |slot: u32| (slot.min(filled) - first_slot) as usize;
            ShardBatch { shard, rows: row(slots.start)..row(slots.end) }
        })
        .collect()
}

/// How a job cuts the global batch.
#[derive(Debug, Clone, Copy)]
struct BatchCut {
    batch_size: u32,
    shards: u32,
}

impl BatchCut {
    fn new(job: &JobSpec) -> Self {
        Self { batch_size: job.batch_size, shards: job.shards }
    }

    fn slots_of(self, shards: Range<u32>) -> Range<u32> {
        assert!(!shards.is_empty() && shards.end <= self.shards, "shards {shards:?} of {}", self.shards);
        slots::slots_of(self.batch_size, self.shards, shards)
    }

    /// Which of `samples` samples that are read in order fill these slots in batch `index`, and how many slots of the
    /// whole batch are filled: the last batch ends where the samples do.
    fn in_order(self, samples: usize, index: u64, slots: Range<u32>) -> (u32, Range<usize>) {
        let first = index as usize * self.batch_size as usize;
        assert!(first < samples, "batch {index} of {samples} samples");
        let filled = (samples - first).min(self.batch_size as usize) as u32;
        let sample = |slot: u32| first + slot.min(filled) as usize;
        (filled, sample(slots.start)..sample(slots.end))
    }
}

/// A number with its digits in groups of three: `1,115,394`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_at_the_nearer_of_its_two_limits() {
        let run = |epochs, steps| {
            let mut run = testing::run("embedded");
            (run.epochs, run.steps) = (epochs, steps);
            schedule(&run, 7, 2).total_steps
        };
        assert_eq!([run(3, 0), run(0, 5), run(3, 5), run(3, 50)], [21, 5, 5, 21]);
        assert_eq!(run(u64::MAX, 9), 9);
    }

    #[test]
    fn shards_past_the_last_filled_slot_have_no_rows() {
        let cut = BatchCut { batch_size: 10, shards: 4 };
        let rows = |shards, filled| -> Vec<Range<usize>> {
            shard_batches(cut, shards, filled).into_iter().map(|shard| shard.rows).collect()
        };
        assert_eq!(rows(0..4, 10), [0..2, 2..5, 5..7, 7..10]);
        assert_eq!(rows(1..4, 6), [0..3, 3..4, 4..4]);
        assert_eq!(rows(3..4, 6), [0..0]);
    }

    #[test]
    fn the_last_batch_ends_where_the_samples_do() {
        let cut = BatchCut { batch_size: 10, shards: 4 };
        assert_eq!(cut.in_order(25, 1, 2..7), (10, 12..17));
        assert_eq!(cut.in_order(25, 2, 0..10), (5, 20..25));
        assert_eq!(cut.in_order(25, 2, 2..7), (5, 22..25));
        assert_eq!(cut.in_order(25, 2, 7..10), (5, 25..25));
    }

    #[test]
    fn digits_are_grouped_by_three() {
        assert_eq!([0, 999, 1000, 1_115_394].map(grouped), ["0", "999", "1,000", "1,115,394"]);
    }

    #[test]
    fn every_embedded_data_set_fits_its_preset() {
        for (preset, unit) in
            [("char-lstm", "characters"), ("mnist-rnn", "images"), ("classify-text", "lines")]
        {
            let job = testing::job(preset, &[]);
            let mut data = open_in(&job, &testing::run("embedded"), &Places::default()).unwrap();
            let facts = data.facts().clone();
            assert_eq!(facts.sample_unit, unit);
            assert!(facts.name.starts_with("embedded "), "{}", facts.name);
            let schedule = data.shape().schedule;
            assert!(schedule.steps_per_epoch >= 20 && schedule.evaluation_batches > 0, "{schedule:?}");
            for work in [Work::Train { step: 0, epoch: 0, index: 0 }, Work::Evaluate { step: 9, index: 0 }] {
                let batch = data.batch(work, 0..job.shards);
                assert_eq!(batch.rows(), job.batch_size as usize);
                assert_eq!(data.handle().batch(work, 0..job.shards), batch);
                assert_eq!(Batch::from_bytes(&batch.to_bytes(), data.shape()).as_ref(), Some(&batch));
            }
        }
    }
}

/// What the tests of all data sets share.
#[cfg(test)]
mod testing {
    use super::*;
    use protocol::job::JobFile;

    /// A preset's job with a few numbers changed.
    pub(super) fn job(preset: &str, settings: &[(&str, u32)]) -> JobSpec {
        let values: Vec<String> = settings.iter().map(|(_, value)| value.to_string()).collect();
        let settings: Vec<_> =
            settings.iter().zip(&values).map(|((key, _), value)| (*key, value.as_str())).collect();
        job_with(preset, &settings)
    }

    /// A preset's job with a few keys changed.
    pub(super) fn job_with(preset: &str, settings: &[(&str, &str)]) -> JobSpec {
        let settings: Vec<_> =
            settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        JobFile::resolve(preset, None, &settings).unwrap().job
    }

    /// One epoch over `data`.
    pub(super) fn run(data: &str) -> RunSpec {
        RunSpec { data: data.to_owned(), epochs: 1, ..JobFile::resolve("char-lstm", None, &[]).unwrap().run }
    }

    /// The problem of something that should not have worked: its sentence and its hint.
    pub(super) fn refusal<T>(result: Result<T, Problem>) -> (String, String) {
        let problem = result.err().expect("a problem");
        (problem.sentence, problem.hint.unwrap_or_default())
    }

    /// The folder of real data, if this machine has one; else says so.
    pub(super) fn real_data() -> Option<Places> {
        let places = Places::of_process(None);
        if places.lockstep_data_dir.is_none() {
            println!("skipped: LOCKSTEP_DATA_DIR is not set");
            return None;
        }
        Some(Places { cache_dir: None, ..places })
    }
}
