//! A preset with random data of the right shape: what to measure, without files.

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
        let schedule = Schedule { steps_per_epoch: u64::MAX, evaluation_batches: 0, total_steps: u64::MAX };
        let data = DataShape { model, seq_len, schedule };
        let layout = StateLayout::new(data.model.clone(), job.batch_size as usize);
        let batches = (0..BATCHES).map(|index| random_batch(&job, &data, index)).collect();
        Ok(Self { job, data, layout, batches })
    }

    /// The batch of a training step.
    pub fn batch(&self, step: u64) -> &Batch {
        &self.batches[(step % BATCHES) as usize]
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
}
