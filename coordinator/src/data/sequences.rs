//! Lines of a text as rows of their own lengths, whichever task reads them.
//!
//! Training rows are dealt by [`Buckets`], those of like length together. An evaluation reads the rows that are held
//! out by length, and its last batch ends where they do. Rows travel as long as they are; only where the job pads them
//! in front, padding travels and is read.

use std::ops::Range;
use std::sync::Arc;

use protocol::batch::{Batch, DataShape, Inputs};
use protocol::job::{JobSpec, MOST_STEPS, Pad, RunSpec};
use protocol::layout::{Head, ModelShape};
use protocol::problem::Problem;
use protocol::schedule::Work;

use super::buckets::Buckets;
use super::padding::{last, pad_sequences};
use super::vocabulary::PADDING_TOKEN;
use super::{BatchCut, DataFacts, Dataset, grouped, schedule, shard_batches};

/// What a task reads from a text of lines.
pub(super) struct Sequences {
    /// What people know the text as.
    pub(super) name: String,
    /// Hex sha256 of the text.
    pub(super) digest: String,
    /// The character of each token, ascending; the first is [`PADDING`](super::vocabulary::PADDING) where the job pads
    /// in front.
    pub(super) vocabulary: Vec<char>,
    /// The label of each class, ascending; where there are none, the characters are the classes.
    pub(super) labels: Option<Vec<String>>,
    /// The token before which the state becomes the initial state.
    pub(super) reset_token: Option<u16>,
    /// Characters of all lines.
    pub(super) characters: u64,
    /// All rows, in the order of the text.
    pub(super) rows: Vec<Row>,
    /// Rows to learn from.
    pub(super) train: Vec<u32>,
    /// Rows that are held out.
    pub(super) validation: Vec<u32>,
}

/// A line as the network reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    /// The line's number in the text, from 1.
    pub(super) line: u64,
    /// One token for each step; in task `chars` one more, the last target.
    pub(super) tokens: Box<[u16]>,
    /// Its class, in task `classify`.
    pub(super) label: u16,
}

/// The lines of a text that are not empty, numbered from 1, without their ends: `\n` or `\r\n`.
pub(super) fn numbered_lines(text: &str) -> impl Iterator<Item = (u64, &str)> + Clone {
    let lines =
        (1..).zip(text.split('\n')).map(|(number, line)| (number, line.strip_suffix('\r').unwrap_or(line)));
    lines.filter(|(_, line)| !line.is_empty())
}

/// The rows of lines, cut for one job.
#[derive(Clone)]
pub(super) struct SequenceDataset {
    shared: Arc<Shared>,
    /// Each handle has its own, since it remembers the order of the epoch it was last asked for.
    buckets: Buckets,
}

struct Shared {
    shape: DataShape,
    facts: DataFacts,
    cut: BatchCut,
    pad: Pad,
    rows: Vec<Row>,
    /// By length.
    validation: Vec<u32>,
}

impl SequenceDataset {
    /// Cuts the rows for this job.
    ///
    /// # Errors
    /// A line is too long for any network, or the rows to learn from are fewer than a batch.
    pub(super) fn new(sequences: Sequences, job: &JobSpec, run: &RunSpec) -> Result<Self, Problem> {
        let Sequences { name, digest, vocabulary, labels, reset_token, characters, mut rows, train, .. } =
            sequences;
        let mut validation = sequences.validation;
        if train.len() < job.batch_size as usize {
            return Err(too_few(&name, train.len(), job));
        }
        let classes = labels.as_ref().map_or(vocabulary.len(), Vec::len);
        let model = ModelShape { reset_token, ..ModelShape::of(job, vocabulary.len(), classes) };
        let targets = targets(model.head);
        if job.text.max_len > 0 {
            for row in &mut rows {
                row.tokens = last(&row.tokens, job.text.max_len as usize + targets).into();
            }
        }
        let steps = |row: &Row| row.tokens.len() - targets;
        let longest = rows.iter().max_by_key(|row| steps(row)).expect("a batch has rows");
        if steps(longest) > MOST_STEPS as usize {
            return Err(too_long(&name, longest, steps(longest)));
        }
        let seq_len = match (job.text.pad, job.text.max_len) {
            (Pad::Pre, max_len) if max_len > 0 => max_len as usize,
            _ => steps(longest),
        };

        validation.sort_by_key(|&row| steps(&rows[row as usize]));
        let train_samples = train.len() as u64;
        let validation_samples = validation.len() as u64;
        let buckets = Buckets::new(job, train, |row| steps(&rows[row as usize]));
        let (steps_per_epoch, batch_size) = (buckets.steps_per_epoch(), u64::from(job.batch_size));
        let facts = DataFacts {
            name: format!(
                "{name}, {} lines, {} characters, {} distinct",
                grouped(rows.len() as u64),
                grouped(characters),
                vocabulary.len() - usize::from(job.text.pad == Pad::Pre)
            ),
            digest,
            vocabulary: Some(vocabulary),
            labels,
            sample_unit: "lines",
            train_samples,
            skipped_per_epoch: train_samples - steps_per_epoch * batch_size,
            validation_samples,
        };
        let schedule = schedule(run, steps_per_epoch, validation_samples.div_ceil(batch_size));
        let shape = DataShape { model, seq_len, schedule };
        let (cut, pad) = (BatchCut::new(job), job.text.pad);
        Ok(Self { shared: Arc::new(Shared { shape, facts, cut, pad, rows, validation }), buckets })
    }
}

impl Dataset for SequenceDataset {
    fn shape(&self) -> &DataShape {
        &self.shared.shape
    }

    fn batch(&mut self, work: Work, shards: Range<u32>) -> Batch {
        let Shared { shape, cut, validation, .. } = &*self.shared;
        let slots = cut.slots_of(shards.clone());
        let (filled, rows) = match work {
            Work::Train { epoch, index, .. } => {
                assert!(index < shape.schedule.steps_per_epoch, "{work:?} is not in {:?}", shape.schedule);
                let mut rows = Vec::new();
                for shard in shards.clone() {
                    rows.extend(self.buckets.rows(epoch, index, shard));
                }
                (cut.batch_size, rows)
            }
            Work::Evaluate { index, .. } => {
                let (filled, samples) = cut.in_order(validation.len(), index, slots.clone());
                (filled, validation[samples].to_vec())
            }
        };
        let rows: Vec<&Row> = rows.iter().map(|&row| &self.shared.rows[row as usize]).collect();
        let steps = |row: &Row| row.tokens.len() - targets(shape.model.head);
        let padding = |row: &Row| match self.shared.pad {
            Pad::Pre => shape.seq_len - steps(row),
            Pad::Post => 0,
        };
        Batch {
            work,
            first_slot: slots.start,
            shards: shard_batches(*cut, shards, filled),
            sample_ids: rows.iter().map(|row| row.line).collect(),
            lengths: rows.iter().map(|row| (padding(row) + steps(row)) as u32).collect(),
            paddings: rows.iter().map(|row| padding(row) as u32).collect(),
            inputs: self.shared.inputs(&rows),
        }
    }

    fn facts(&self) -> &DataFacts {
        &self.shared.facts
    }

    fn handle(&self) -> Box<dyn Dataset> {
        Box::new(self.clone())
    }
}

impl Shared {
    fn inputs(&self, rows: &[&Row]) -> Inputs {
        let head = self.shape.model.head;
        let sequences = rows.iter().map(|row| &row.tokens[..]);
        let tokens = match self.pad {
            Pad::Pre => pad_sequences(sequences, self.shape.seq_len + targets(head), Pad::Pre, PADDING_TOKEN),
            Pad::Post => sequences.flatten().copied().collect(),
        };
        match head {
            Head::EveryStep => Inputs::Tokens(tokens),
            Head::Final => {
                Inputs::LabelledTokens { tokens, labels: rows.iter().map(|row| row.label).collect() }
            }
        }
    }
}

/// Tokens of a row besides those that are read.
fn targets(head: Head) -> usize {
    match head {
        Head::EveryStep => 1,
        Head::Final => 0,
    }
}

fn too_few(name: &str, lines: usize, job: &JobSpec) -> Problem {
    Problem::usage(format!(
        "the training part of {name} has {} lines, one step of batch_size {} reads {}",
        grouped(lines as u64),
        job.batch_size,
        grouped(job.batch_size.into())
    ))
    .hint("choose a smaller batch_size, or give more lines")
}

fn too_long(name: &str, row: &Row, steps: usize) -> Problem {
    Problem::usage(format!(
        "line {} of {name} has {} steps, the most supported is {}",
        row.line,
        grouped(steps as u64),
        grouped(MOST_STEPS.into())
    ))
    .hint("keep the last steps of long lines with --set text.max_len=STEPS, or break them up")
}

#[cfg(test)]
mod tests {
    use super::super::testing::{job_with, run};
    use super::super::{lines, text};
    use super::*;
    use protocol::random::mix64;

    /// Lines of unlike lengths, each with its number.
    fn text_of(lines: u64) -> String {
        let line = |line: u64| format!("{line}{}\n", "x".repeat((mix64(line) % 31) as usize));
        (0..lines).map(line).collect()
    }

    fn open(text: &str, settings: &[(&str, &str)]) -> SequenceDataset {
        let sizes = [("mode", "lines"), ("batch_size", "7"), ("shards", "3"), ("validation_fraction", "0.2")];
        let job = job_with("char-lstm", &[&sizes, settings].concat());
        SequenceDataset::new(lines::read("text", text.as_bytes(), &job).unwrap(), &job, &run("x")).unwrap()
    }

    fn train(epoch: u64, index: u64) -> Work {
        Work::Train { step: 0, epoch, index }
    }

    #[test]
    fn an_epoch_reads_each_line_at_most_once_and_any_split_gives_the_same_rows() {
        for pad in ["post", "pre"] {
            let mut data = open(&text_of(1000), &[("pad", pad)]);
            assert_eq!((data.facts().train_samples, data.facts().skipped_per_epoch), (800, 2));
            let mut used = Vec::new();
            for index in 0..data.shape().schedule.steps_per_epoch {
                let whole = data.batch(train(1, index), 0..3);
                for cut in 1..3 {
                    // Another handle, asked for another epoch in between, gives the same rows.
                    let mut other = data.handle();
                    other.batch(train(0, index), 0..1);
                    let parts = [data.batch(train(1, index), 0..cut), other.batch(train(1, index), cut..3)];
                    assert_eq!(parts[1].first_slot as usize, parts[0].rows());
                    let tokens = |batch: &Batch| {
                        let Inputs::Tokens(tokens) = &batch.inputs else { panic!("lines give tokens") };
                        tokens.clone()
                    };
                    assert_eq!(parts.each_ref().map(tokens).concat(), tokens(&whole));
                    assert_eq!(parts.each_ref().map(|part| part.lengths.clone()).concat(), whole.lengths);
                    assert_eq!(parts.each_ref().map(|part| part.paddings.clone()).concat(), whole.paddings);
                    assert_eq!(parts.map(|part| part.sample_ids).concat(), whole.sample_ids);
                }
                used.extend(whole.sample_ids);
            }
            used.sort_unstable();
            used.dedup();
            assert_eq!(used.len(), 798);
            assert!(used.iter().all(|line| (1..=800).contains(line)));
        }
    }

    #[test]
    fn an_evaluation_reads_every_line_that_is_held_out_by_length() {
        let mut data = open(&text_of(1000), &[]);
        let schedule = data.shape().schedule;
        assert_eq!((schedule.evaluation_batches, data.facts().validation_samples), (29, 200));
        let (mut used, mut lengths) = (Vec::new(), Vec::new());
        for index in 0..29 {
            let batch = data.batch(Work::Evaluate { step: 3, index }, 0..3);
            used.extend(batch.sample_ids);
            lengths.extend(batch.lengths);
        }
        assert!(lengths.is_sorted());
        used.sort_unstable();
        assert_eq!(used, (801..=1000).collect::<Vec<u64>>());
        // 200 = 28 · 7 + 4: slots 0..4 of the last batch are filled.
        let last = data.batch(Work::Evaluate { step: 3, index: 28 }, 1..3);
        let rows: Vec<_> = last.shards.iter().map(|shard| (shard.shard, shard.rows.clone())).collect();
        assert_eq!(rows, [(1, 0..2), (2, 2..2)]);
    }

    /// The share of padding in batches of rows of these lengths, if the shorter ones were filled up.
    fn padding_share(batches: impl Iterator<Item = Vec<u32>>) -> f64 {
        let (mut padding, mut steps) = (0, 0);
        for lengths in batches {
            let longest = lengths.iter().max().unwrap();
            padding += lengths.iter().map(|length| longest - length).sum::<u32>();
            steps += lengths.len() as u32 * longest;
        }
        f64::from(padding) / f64::from(steps)
    }

    #[test]
    fn lines_of_a_real_text_meet_others_of_like_length() {
        let settings = [("batch_size", "32"), ("shards", "8"), ("max_len", "200")];
        let mut data = open(text::EMBEDDED_TEXT, &settings);
        let lengths: Vec<u32> = data.shared.rows.iter().map(|row| row.tokens.len() as u32 - 1).collect();
        let in_order = padding_share(lengths.chunks(32).map(<[u32]>::to_vec));
        let steps = 0..data.shape().schedule.steps_per_epoch;
        let dealt = padding_share(steps.map(|index| data.batch(train(0, index), 0..8).lengths));
        println!("{}: filled up, padding would be {:.1} %", data.facts().name, 100.0 * dealt);
        println!("in the order of the text: {:.1} %", 100.0 * in_order);
        assert!(dealt < 0.2 && dealt < in_order / 2.0, "{dealt} {in_order}");
    }

    #[test]
    fn too_few_lines_to_hold_any_out_are_no_evaluation() {
        let data = open(&text_of(14), &[("validation_fraction", "0.05")]);
        assert_eq!((data.facts().validation_samples, data.shape().schedule.evaluation_batches), (1, 1));
        let all = open(&text_of(14), &[("validation_fraction", "1e-17")]);
        assert_eq!((all.facts().validation_samples, all.shape().schedule.evaluation_batches), (0, 0));
    }
}
