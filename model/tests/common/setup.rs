//! Jobs, random batches and the state a run starts with.

use std::ops::Range;

use model::init::initial_parameters;
use protocol::batch::{Batch, DataShape, Inputs, ShardBatch};
use protocol::cell::Cell;
use protocol::job::{JobFile, JobSpec, Pad, Task, TextMode};
use protocol::layout::{Input, ModelShape, StateLayout};
use protocol::random::{Purpose, Stream};
use protocol::schedule::{Schedule, Work};
use protocol::slots::{shards_of_rank, slots_of};

pub(crate) const CELLS: [Cell; 3] = [Cell::Rnn, Cell::Lstm, Cell::Gru];
pub(crate) const TASKS: [Task; 2] = [Task::Chars, Task::Rows];

/// Width of the random data: tokens of text, bytes of an image row.
pub(crate) const INPUT_WIDTH: usize = 13;
/// Classes of the random images; those of a text are its tokens.
const IMAGE_CLASSES: usize = 5;

/// The sizes of a test network and its batch. The rest of the job is the default's, changed by `settings`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) cell: Cell,
    pub(crate) task: Task,
    pub(crate) num_layers: usize,
    pub(crate) hidden_size: usize,
    pub(crate) seq_len: usize,
    pub(crate) batch_size: usize,
    pub(crate) shards: u32,
}

/// A job with all that follows from it.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) job: JobSpec,
    pub(crate) data: DataShape,
    pub(crate) layout: StateLayout,
}

impl Setup {
    /// A job on the random data of [`Setup::batch`].
    pub(crate) fn new(sizes: Sizes, settings: &[(&str, &str)]) -> Self {
        let classes = if sizes.task == Task::Chars { INPUT_WIDTH } else { IMAGE_CLASSES };
        Self::with_data(sizes, INPUT_WIDTH, classes, settings)
    }

    /// A job on data of these widths. Nobody reads the output of a single layer whose final state is classified: there
    /// `keep_prob` is left out.
    pub(crate) fn with_data(sizes: Sizes, width: usize, classes: usize, settings: &[(&str, &str)]) -> Self {
        let Sizes { cell, num_layers, hidden_size, seq_len, batch_size, shards, .. } = sizes;
        let words = [
            ("task", format!("{:?}", sizes.task).to_lowercase()),
            ("cell", format!("{cell:?}").to_lowercase()),
            ("num_layers", num_layers.to_string()),
            ("hidden_size", hidden_size.to_string()),
            ("seq_len", seq_len.to_string()),
            ("batch_size", batch_size.to_string()),
            ("shards", shards.to_string()),
            ("learning_rate", "0.001".to_owned()),
        ];
        let settings: Vec<(String, String)> = words
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .chain(settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())))
            .filter(|(key, _)| key != "keep_prob" || sizes.task == Task::Chars || num_layers > 1)
            .collect();
        let job = JobFile::resolve("char-lstm", None, &settings).unwrap().job;
        let model = ModelShape::of(&job, width, classes);
        let schedule = Schedule { steps_per_epoch: 100, evaluation_batches: 1, total_steps: 100 };
        let layout = StateLayout::new(model.clone(), batch_size);
        Self { job, data: DataShape { model, seq_len, schedule }, layout }
    }

    /// The same network, which starts anew before it reads this token.
    pub(crate) fn with_reset_token(mut self, token: u16) -> Self {
        self.layout.shape.reset_token = Some(token);
        self.data.model.reset_token = Some(token);
        self
    }

    /// The random batch of all shards for a training step in the middle of an epoch.
    pub(crate) fn batch(&self, step: u64) -> Batch {
        let work = Work::Train { step, epoch: 0, index: step + 1 };
        self.random_batch(work, step, self.job.batch_size as usize)
    }

    /// An evaluation batch in which only the first `filled` slots have a row.
    pub(crate) fn evaluation_batch(&self, filled: usize) -> Batch {
        self.random_batch(Work::Evaluate { step: 0, index: 0 }, 1000, filled)
    }

    fn random_batch(&self, work: Work, name: u64, filled: usize) -> Batch {
        let (seq_len, model) = (self.data.seq_len, &self.data.model);
        let mut random = Stream::new(77, Purpose::Digits, [name as u32, 0]);
        let mut draw = |count: usize, below: usize| -> Vec<u16> {
            (0..count).map(|_| random.below(below as u32) as u16).collect()
        };
        let is_even = !self.has_lines() || self.job.text.pad == Pad::Pre;
        let lengths: Vec<u32> = match is_even {
            true => vec![seq_len as u32; filled],
            false => draw(filled, seq_len).into_iter().map(|length| u32::from(length) + 1).collect(),
        };
        let paddings: Vec<u32> = match self.has_lines() && is_even {
            true => draw(filled, seq_len).into_iter().map(u32::from).collect(),
            false => vec![0; filled],
        };
        let steps: usize = lengths.iter().map(|&length| length as usize).sum();
        let inputs = match (self.job.task, model.input) {
            (Task::Chars, Input::OneHot(tokens) | Input::Embedding { tokens, .. }) => {
                Inputs::Tokens(draw(steps + filled, tokens))
            }
            (_, Input::OneHot(tokens) | Input::Embedding { tokens, .. }) => {
                Inputs::LabelledTokens { tokens: draw(steps, tokens), labels: draw(filled, model.classes) }
            }
            (_, Input::Bytes(width)) => Inputs::Bytes {
                bytes: draw(steps * width, 256).into_iter().map(|byte| byte as u8).collect(),
                labels: draw(filled, model.classes),
            },
        };
        let sample_ids = (0..filled as u64).map(|row| 1000 * name + row).collect();
        Batch { lengths, paddings, ..self.batch_of(work, sample_ids, inputs) }
    }

    /// Whether rows are lines, which may be shorter than others.
    fn has_lines(&self) -> bool {
        let Self { job, .. } = self;
        job.task == Task::Classify || job.task == Task::Chars && job.text.mode == TextMode::Lines
    }

    /// The batch of all shards whose rows, of T steps each, fill the first slots with these inputs.
    pub(crate) fn batch_of(&self, work: Work, sample_ids: Vec<u64>, inputs: Inputs) -> Batch {
        let filled = sample_ids.len();
        let shards = (0..self.job.shards)
            .map(|shard| {
                let slots = slots_of(self.job.batch_size, self.job.shards, shard..shard + 1);
                ShardBatch { shard, rows: filled.min(slots.start as usize)..filled.min(slots.end as usize) }
            })
            .collect();
        let (lengths, paddings) = (vec![self.data.seq_len as u32; filled], vec![0; filled]);
        Batch { work, first_slot: 0, shards, sample_ids, lengths, paddings, inputs }
    }

    /// The part of a batch of all shards that a worker with `shards` reads.
    pub(crate) fn part(&self, batch: &Batch, shards: Range<u32>) -> Batch {
        let of = &batch.shards[shards.start as usize..shards.end as usize];
        let rows = of[0].rows.start..of[of.len() - 1].rows.end;
        let steps_of = |rows: Range<usize>| batch.lengths[rows].iter().map(|&length| length as usize).sum();
        let (before, steps): (usize, usize) = (steps_of(0..rows.start), steps_of(rows.clone()));
        let inputs = match &batch.inputs {
            Inputs::Tokens(tokens) => {
                Inputs::Tokens(tokens[before + rows.start..][..steps + rows.len()].to_vec())
            }
            Inputs::LabelledTokens { tokens, labels } => Inputs::LabelledTokens {
                tokens: tokens[before..][..steps].to_vec(),
                labels: labels[rows.clone()].to_vec(),
            },
            Inputs::Bytes { bytes, labels } => {
                let width = self.data.model.input.size();
                Inputs::Bytes {
                    bytes: bytes[before * width..][..steps * width].to_vec(),
                    labels: labels[rows.clone()].to_vec(),
                }
            }
        };
        let counted = |shard: &ShardBatch| ShardBatch {
            shard: shard.shard,
            rows: shard.rows.start - rows.start..shard.rows.end - rows.start,
        };
        Batch {
            work: batch.work,
            first_slot: slots_of(self.job.batch_size, self.job.shards, shards).start,
            shards: of.iter().map(counted).collect(),
            sample_ids: batch.sample_ids[rows.clone()].to_vec(),
            lengths: batch.lengths[rows.clone()].to_vec(),
            paddings: batch.paddings[rows].to_vec(),
            inputs,
        }
    }

    /// The training state before the first step; the recurrent state is random if `carried`, else zero.
    pub(crate) fn start(&self, carried: bool) -> State {
        let parameters = initial_parameters(&self.layout, &self.job);
        let zeros = vec![0.0; parameters.len()];
        let mut recurrent = vec![0.0; self.layout.recurrent()];
        if carried {
            let mut random = Stream::new(78, Purpose::Digits, [0, 0]);
            recurrent.fill_with(|| 1.6 * random.unit_f32() - 0.8);
        }
        State { parameters, first_moment: zeros.clone(), second_moment: zeros, recurrent }
    }

    /// The shards cut for `workers` workers.
    pub(crate) fn split(&self, workers: u32) -> Vec<Range<u32>> {
        (0..workers).map(|rank| shards_of_rank(self.job.shards, workers, rank)).collect()
    }
}

/// The floats of a training state, on the host.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct State {
    pub(crate) parameters: Vec<f32>,
    pub(crate) first_moment: Vec<f32>,
    pub(crate) second_moment: Vec<f32>,
    pub(crate) recurrent: Vec<f32>,
}
