//! A preset with random data of the right shape: what to measure, without files.

use std::ops::Range;

use model::cost::Flop;
use protocol::batch::{Batch, DataShape, Inputs, ShardBatch};
use protocol::job::{JobFile, JobSpec, Task};
use protocol::layout::{Head, Input, ModelShape, StateLayout};
use protocol::problem::Problem;
use protocol::random::{Purpose, Stream};
use protocol::schedule::{Schedule, Work};
use protocol::slots::slots_of;

/// Tokens of the text that the presets are measured with: tinyshakespeare's.
const VOCABULARY: usize = 65;
/// MNIST: rows of an image, bytes of a row, classes.
const IMAGE: (usize, usize, usize) = (28, 28, 10);
/// Different batches, taken in turn: one alone would soon be known by heart, and its gradients would vanish.
const BATCHES: u64 = 32;
/// So many steps that no measurement sees the end of an epoch.
const STEPS: u64 = 1 << 40;

/// A job, the data shape it meets, and batches for it.
#[derive(Debug, Clone)]
pub struct Workload {
    /// What is computed.
    pub job: JobSpec,
    /// What the data looks like.
    pub data: DataShape,
    /// Where every number of the state lies.
    pub layout: StateLayout,
    /// Random batches of all shards; the same numbers in every process.
    pub batches: Vec<Batch>,
}

impl Workload {
    /// A preset with `KEY=VALUE` settings, on random data of tinyshakespeare's or MNIST's shape.
    ///
    /// # Errors
    /// An unknown preset or key, or a value that does not fit.
    pub fn new(preset: &str, settings: &[(String, String)]) -> Result<Self, Problem> {
        let job = JobFile::resolve(preset, None, settings)?.job;
        let (input_size, classes, seq_len) = match job.task {
            Task::Chars => (VOCABULARY, VOCABULARY, job.seq_len as usize),
            Task::Classify => (VOCABULARY, IMAGE.2, job.seq_len as usize),
            Task::Rows => (IMAGE.1, IMAGE.2, IMAGE.0),
        };
        let model = ModelShape::of(&job, input_size, classes);
        let schedule = Schedule { steps_per_epoch: STEPS, evaluation_batches: 0, total_steps: STEPS };
        let data = DataShape { model, seq_len, schedule };
        let layout = StateLayout::new(data.model.clone(), job.batch_size as usize);
        let batches = (0..BATCHES).map(|index| random_batch(&job, &data, index)).collect();
        Ok(Self { job, data, layout, batches })
    }

    /// The batch of a training step.
    pub fn batch(&self, step: u64) -> &Batch {
        &self.batches[(step % BATCHES) as usize]
    }

    /// The rows of these shards of the batch of a training step, as a worker gets them.
    pub fn part(&self, step: u64, shards: Range<u32>) -> Batch {
        let whole = self.batch(step);
        let slots = slots_of(self.job.batch_size, self.job.shards, shards.clone());
        let rows = slots.start as usize..slots.end as usize;
        // All rows are equally long.
        fn cut<T: Copy>(values: &[T], of: usize, rows: &Range<usize>) -> Vec<T> {
            let width = values.len() / of;
            values[rows.start * width..rows.end * width].to_vec()
        }
        let of = whole.rows();
        let inputs = match &whole.inputs {
            Inputs::Tokens(tokens) => Inputs::Tokens(cut(tokens, of, &rows)),
            Inputs::LabelledTokens { tokens, labels } => {
                Inputs::LabelledTokens { tokens: cut(tokens, of, &rows), labels: cut(labels, of, &rows) }
            }
            Inputs::Bytes { bytes, labels } => {
                Inputs::Bytes { bytes: cut(bytes, of, &rows), labels: cut(labels, of, &rows) }
            }
        };
        let shards = &whole.shards[shards.start as usize..shards.end as usize];
        Batch {
            work: Work::Train { step, epoch: 0, index: step },
            first_slot: slots.start,
            shards: shards
                .iter()
                .map(|&ShardBatch { shard, rows: Range { start, end } }| ShardBatch {
                    shard,
                    rows: start - rows.start..end - rows.start,
                })
                .collect(),
            sample_ids: whole.sample_ids[rows.clone()].to_vec(),
            lengths: whole.lengths[rows.clone()].to_vec(),
            paddings: whole.paddings[rows].to_vec(),
            inputs,
        }
    }

    /// Floating-point operations of one training step, in units of 10⁹, as [`Flop`] counts them.
    pub fn gflop_per_step(&self) -> f64 {
        Flop::of_batch(&self.layout, self.data.seq_len).step() / 1e9
    }
}

/// The `index`-th batch: every slot filled, every shard present.
fn random_batch(job: &JobSpec, data: &DataShape, index: u64) -> Batch {
    let rows = job.batch_size as usize;
    let (seq_len, model) = (data.seq_len, &data.model);
    let mut random = Stream::new(1, Purpose::Digits, [index as u32, 0]);
    let mut draw = |count: usize, below: usize| -> Vec<u16> {
        (0..count).map(|_| random.below(below as u32) as u16).collect()
    };
    let inputs = match (model.input, model.head) {
        (Input::OneHot(tokens) | Input::Embedding { tokens, .. }, Head::EveryStep) => {
            Inputs::Tokens(draw(rows * (seq_len + 1), tokens))
        }
        (Input::OneHot(tokens) | Input::Embedding { tokens, .. }, Head::Final) => {
            Inputs::LabelledTokens { tokens: draw(rows * seq_len, tokens), labels: draw(rows, model.classes) }
        }
        (Input::Bytes(width), _) => Inputs::Bytes {
            bytes: draw(rows * seq_len * width, 256).into_iter().map(|byte| byte as u8).collect(),
            labels: draw(rows, model.classes),
        },
    };
    let shards = (0..job.shards)
        .map(|shard| {
            let slots = slots_of(job.batch_size, job.shards, shard..shard + 1);
            ShardBatch { shard, rows: slots.start as usize..slots.end as usize }
        })
        .collect();
    let sample_ids = (0..rows as u64).map(|row| index * rows as u64 + row).collect();
    Batch {
        work: Work::Train { step: index, epoch: 0, index },
        first_slot: 0,
        shards,
        sample_ids,
        lengths: vec![seq_len as u32; rows],
        paddings: vec![0; rows],
        inputs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_fill_every_slot_and_differ() {
        let workload = Workload::new("char-lstm", &[("shards".to_owned(), "7".to_owned())]).unwrap();
        let [first, second] = [workload.batch(0), workload.batch(1)];
        assert_eq!(first.rows(), 64);
        assert_eq!(first.shards.last().unwrap().rows.end, 64);
        assert_ne!(first.inputs, second.inputs);
        assert_eq!(workload.batch(0), workload.batch(BATCHES));
    }

    #[test]
    fn parts_are_batches_that_travel_and_together_the_whole() {
        for preset in ["char-lstm", "mnist-rnn", "classify-text"] {
            let workload = Workload::new(preset, &[("shards".to_owned(), "7".to_owned())]).unwrap();
            assert_eq!(workload.part(2, 0..7), *workload.batch(2), "{preset}");
            let [first, second] = [workload.part(2, 0..3), workload.part(2, 3..7)];
            assert_eq!((second.shard_range(), second.shards[0].rows.start), (3..7, 0));
            assert_eq!(second.first_slot as usize, first.rows());
            assert_eq!(
                [first.sample_ids.clone(), second.sample_ids.clone()].concat(),
                workload.batch(2).sample_ids
            );
            for part in [first, second] {
                assert_eq!(Batch::from_bytes(&part.to_bytes(), &workload.data), Some(part), "{preset}");
            }
        }
    }
}
