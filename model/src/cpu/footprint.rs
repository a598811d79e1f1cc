//! How many bytes a CPU device will hold, before it is opened.

use protocol::job::JobSpec;
use protocol::layout::StateLayout;
use protocol::slots::{slots, slots_of};
use protocol::tree;
use std::ops::Range;

use super::block::RowBlock;
use super::gradient::Scratch;
use super::weights::Weights;
use crate::network::has_droppable_output;

/// The bytes of a device that trains the rows of some shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Weights in the forms that kernels read.
    pub weights: usize,
    /// Rows on their way through all steps and back.
    pub blocks: usize,
    /// Room for packed operands and sums of the weight gradients, of all threads.
    pub scratch: usize,
}

impl Footprint {
    /// The footprint of a device with this many threads and these shards of the job, over rows of `seq_len` steps.
    /// `recompute`: as for [`CpuDevice::new`](super::CpuDevice::new).
    pub fn of(
        layout: &StateLayout,
        job: &JobSpec,
        seq_len: usize,
        shards: Range<u32>,
        threads: usize,
        recompute: bool,
    ) -> Self {
        let shape = &layout.shape;
        let rows = slots_of(job.batch_size, job.shards, shards.clone()).len();
        let largest = shards.clone().map(|shard| slots(job.batch_size, job.shards, shard).len()).max();
        let levels = tree::cover(job.shards, shards).iter().map(|node| node.level).max().unwrap_or(0);
        let keep_probs = job.layer_keep_probs();
        let drops = |layer: usize| keep_probs[layer] < 1.0 && has_droppable_output(shape, layer);
        Self {
            weights: Weights::bytes_of(layout),
            blocks: RowBlock::bytes_of(shape, seq_len, rows, drops, recompute),
            scratch: threads * Scratch::bytes_of(shape, largest.unwrap_or(0) * seq_len, levels, threads),
        }
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.weights + self.blocks + self.scratch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::CpuDevice;
    use crate::device::{Device, Pass};
    use crate::init::initial_parameters;
    use kernels::Simd;
    use protocol::batch::{Batch, Inputs, ShardBatch};
    use protocol::job::{JobFile, Task};
    use protocol::schedule::Work;

    struct Trained {
        device: CpuDevice,
        shards: Range<u32>,
        /// Bytes that one thread's room holds.
        scratch: usize,
    }

    /// A device after a training step of the shards 1.. of all.
    fn trained(job: &JobSpec, layout: &StateLayout, seq_len: usize, recompute: bool) -> Trained {
        let shards = 1..job.shards;
        let slots_here = slots_of(job.batch_size, job.shards, shards.clone());
        let rows = slots_here.len();
        let at = |slot: u32| (slot - slots_here.start) as usize;
        let inputs = match job.task {
            Task::Chars => Inputs::Tokens(vec![1; rows * (seq_len + 1)]),
            Task::Classify => {
                Inputs::LabelledTokens { tokens: vec![1; rows * seq_len], labels: vec![1; rows] }
            }
            Task::Rows => Inputs::Bytes {
                bytes: vec![9; rows * seq_len * layout.shape.input.size()],
                labels: vec![1; rows],
            },
        };
        let batch = Batch {
            work: Work::Train { step: 0, epoch: 0, index: 0 },
            first_slot: slots_here.start,
            shards: shards
                .clone()
                .map(|shard| {
                    let slots = slots(job.batch_size, job.shards, shard);
                    ShardBatch { shard, rows: at(slots.start)..at(slots.end) }
                })
                .collect(),
            sample_ids: vec![0; rows],
            lengths: vec![seq_len as u32; rows],
            paddings: vec![0; rows],
            inputs,
        };
        // One thread: which one takes which shard is left to chance.
        let mut device = CpuDevice::new(Simd::detect(), 1, layout.clone(), job, recompute).unwrap();
        let parameters = initial_parameters(layout, job);
        let state = vec![0.0; layout.recurrent()];
        device.step(Pass::Train { step: 0 }, &parameters, &batch, &state, &mut state.clone()).unwrap();
        let nodes = tree::cover(job.shards, shards.clone());
        let mut sums = vec![vec![0.0; layout.parameters()]; nodes.len()];
        device.finish_buckets(0..layout.buckets().len(), &nodes, &mut sums).unwrap();
        let scratch = device.scratch[0].lock().unwrap().held_bytes();
        Trained { device, shards, scratch }
    }

    /// One setting more for each kind of buffer.
    const OPTIONS: [&[(&str, &str)]; 11] = [
        &[],
        &[("reset_at", "x")],
        &[("keep_prob", "0.8")],
        &[("keep_probs", "[0.5, 1, 0.9]"), ("variational_dropout", "true")],
        &[("hidden_sizes", "[21, 9, 40]")],
        &[("cell", "lstm"), ("projection", "8"), ("peepholes", "true"), ("initial_state", "learnt")],
        &[("cell", "gru"), ("reset", "before")],
        &[("task", "classify"), ("bidirectional", "true"), ("embedding_size", "5")],
        &[("task", "rows"), ("bidirectional", "true"), ("keep_prob", "0.8")],
        &[("embedding_size", "30")],
        &[("precision", "bf16")],
    ];

    /// An embedding, a reset, or dropout of the last layer's output, of images.
    const REFUSED: usize = 18;

    #[test]
    fn every_buffer_is_counted() {
        let mut refused = 0;
        for task in ["chars", "rows"] {
            for cell in ["rnn", "lstm", "gru"] {
                for options in OPTIONS {
                    for recompute in [false, true] {
                        let sizes = [
                            ("task", task),
                            ("cell", cell),
                            ("num_layers", "3"),
                            ("hidden_size", "21"),
                            ("batch_size", "40"),
                            ("shards", "7"),
                        ];
                        let settings: Vec<(String, String)> = sizes
                            .iter()
                            .chain(options)
                            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                            .collect();
                        // Not every option goes with every task.
                        let Ok(JobFile { job, .. }) = JobFile::resolve("char-lstm", None, &settings) else {
                            refused += 1;
                            continue;
                        };
                        let (mut layout, seq_len) = (StateLayout::of(&job, 13, 11), 6);
                        // The text of ones, when all of it is separators.
                        layout.shape.reset_token = (!job.text.reset_at.is_empty()).then_some(1);
                        let Trained { mut device, shards, scratch } =
                            trained(&job, &layout, seq_len, recompute);
                        let foretold = Footprint::of(&layout, &job, seq_len, shards, 1, recompute);
                        assert_eq!(foretold.weights, device.weights.held_bytes(), "{settings:?}");
                        let blocks: usize = device.blocks.iter_mut().map(RowBlock::held_bytes).sum();
                        assert_eq!(foretold.blocks, blocks, "{settings:?} {recompute}");
                        // The largest operands need not meet in one product.
                        assert!((scratch..=2 * scratch).contains(&foretold.scratch), "{settings:?}");
                    }
                }
            }
        }
        assert_eq!(refused, REFUSED, "of 120 combinations");
    }
}
