//! The CPU device: the embedded default, and the reference for every other one.
//!
//! Rows are the parallelism. The rows of all shards are cut into blocks, one task each; a task runs its rows through
//! all layers, steps and back ([`block`]) without meeting another task. Rows may differ in length and their state may be
//! reset in the middle; [`runs`] says where their steps lie, [`direction`] runs one direction of a layer over them. Then
//! the weight gradients are summed per shard ([`gradient`]), whatever blocks its rows were in. Weights are packed once
//! per step ([`weights`]). A trained network is read one step at a time by a block of one row ([`reader`]). What all
//! this takes is known before ([`footprint`], [`speed`]).

mod block;
mod direction;
pub mod footprint;
mod gradient;
mod pairs;
mod reader;
mod runs;
pub mod speed;
mod weights;

use std::ops::Range;
use std::sync::Arc;

use kernels::Simd;
use kernels::cpu::optimizer::{AdamOptions, AdamStep, SgdStep, adam_update, scale, sgd_update, squared_norm};
use kernels::cpu::reduce;
use protocol::batch::{Batch, DataShape};
use protocol::job::{JobSpec, Precision};
use protocol::layout::{ModelShape, Part, StateLayout};
use protocol::sums::{StepSums, row_hash};
use protocol::tree::TreeNode;
use rayon::prelude::*;

use crate::device::{Backend, Device, DeviceError, Pass, Result, StepInput, Update, UpdateRule};
use crate::rows::{BatchRows, row_starts};
use block::{Dropout, Network, RowBlock};
use gradient::{Gradient, Scratch};
use pairs::ShardPairs;
use weights::Weights;

pub use reader::CpuReader;

/// Changes whenever a change of the code changes a bit of any result.
const NUMERICS_VERSION: u32 = 2;

/// Rows of a block where its recurrent weights stay in the second-level cache from step to step: few, so that the
/// block's own trace does too.
const CACHED_BLOCK_ROWS: usize = 8;

/// Rows of a block where they do not: many, because each step streams all weights once per block.
const STREAMED_BLOCK_ROWS: usize = 64;

/// Rows of a block where products are of bf16: what AMX multiplies at a time.
const BF16_BLOCK_ROWS: usize = 32;

/// Recurrent weights up to this size count as cached.
const CACHED_WEIGHT_BYTES: usize = 1 << 20;

/// Elementwise work is cut into pieces of this many floats.
const ELEMENTS_PER_TASK: usize = 1 << 16;

/// Opens CPU devices.
#[derive(Debug, Clone, Copy)]
pub struct CpuBackend {
    simd: Simd,
    threads: usize,
}

impl CpuBackend {
    /// A backend with this many threads, at least 1.
    pub fn new(simd: Simd, threads: usize) -> Self {
        Self { simd, threads: threads.max(1) }
    }
}

impl Backend for CpuBackend {
    type Device = CpuDevice;

    fn describe(&self) -> String {
        format!("cpu ({})", self.simd)
    }

    fn bits(&self) -> String {
        format!("cpu numerics {NUMERICS_VERSION}")
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn has(&self, precision: Precision) -> bool {
        precision != Precision::Tf32
    }

    fn open(&self, layout: &StateLayout, job: &JobSpec, _: &DataShape, recompute: bool) -> Result<CpuDevice> {
        if !self.has(job.precision) {
            return Err(DeviceError(format!("precision is {}, which only GPUs have", job.precision)));
        }
        CpuDevice::new(self.simd, self.threads, layout.clone(), job, recompute)
    }
}

/// A CPU with its own threads.
pub struct CpuDevice {
    simd: Simd,
    pool: rayon::ThreadPool,
    layout: StateLayout,
    seed: u64,
    keep_probs: Arc<[f32]>,
    variational: bool,
    /// Gates are computed again in the backward pass, which runs layer by layer as the buckets are asked for.
    recompute: bool,
    weights: Weights,
    blocks: Vec<RowBlock>,
    /// Where the rows of the last batch begin.
    row_starts: Vec<usize>,
    /// Dropout of the last training step.
    dropout: Option<Dropout>,
    /// Shards of the job.
    shards: u32,
    /// The last batch of a training step, as sums go over it.
    pairs: ShardPairs,
    sums: Vec<StepSums>,
    /// One per thread.
    scratch: Vec<std::sync::Mutex<Scratch>>,
}

impl CpuDevice {
    /// A device for one job, with this many threads, at least 1. With `recompute` it keeps only h and c of the forward
    /// pass, in all layers but one, and computes the gates again for the backward pass: the same bits, less memory.
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn new(
        simd: Simd,
        threads: usize,
        layout: StateLayout,
        job: &JobSpec,
        recompute: bool,
    ) -> Result<Self> {
        assert!(threads > 0, "CpuDevice: threads is 0, expected at least 1");
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("compute-{i}"))
            .build()
            .map_err(|error| DeviceError(format!("cannot start {threads} threads: {error}")))?;
        let precision = layout.shape.precision;
        Ok(Self {
            simd,
            pool,
            weights: Weights::new(&layout, true),
            layout,
            seed: job.seed,
            keep_probs: job.layer_keep_probs().into(),
            variational: job.variational_dropout,
            recompute,
            blocks: Vec::new(),
            row_starts: Vec::new(),
            dropout: None,
            shards: job.shards,
            pairs: ShardPairs::default(),
            sums: Vec::new(),
            scratch: (0..threads).map(|_| Scratch::new(precision).into()).collect(),
        })
    }

    /// Rows that a block should have.
    fn block_rows(shape: &ModelShape) -> usize {
        let weights = shape.layers().map(|layer| layer.gate_size() * layer.output_size).max().unwrap_or(0);
        match shape.precision {
            Precision::F32 | Precision::Tf32 if 4 * weights <= CACHED_WEIGHT_BYTES => CACHED_BLOCK_ROWS,
            Precision::F32 | Precision::Tf32 => STREAMED_BLOCK_ROWS,
            Precision::Bf16 => BF16_BLOCK_ROWS,
        }
    }

    /// Makes as many blocks as rows need, of nearly equal size, equally many for each thread.
    fn cut(&mut self, rows: usize) {
        let block_rows = Self::block_rows(&self.layout.shape);
        let threads = self.pool.current_num_threads();
        let count = rows.div_ceil(block_rows).next_multiple_of(threads).min(rows);
        self.blocks.resize_with(count, RowBlock::default);
        for (index, block) in self.blocks.iter_mut().enumerate() {
            block.rows = index * rows / count..(index + 1) * rows / count;
        }
    }

    /// Computes the gradients of some buckets in one go.
    fn finish(&mut self, buckets: Range<usize>, nodes: &[TreeNode], sums: &mut [Vec<f32>]) {
        let dropout = self.dropout.as_ref();
        let Self { simd, pool, layout, blocks, scratch, recompute, pairs, shards, weights, .. } = self;
        let network = Network { simd: *simd, shape: &layout.shape, weights, dropout };
        pool.install(|| {
            for part in buckets.clone().map(|bucket| layout.part(bucket)) {
                if let (Part::Layer(layer), true) = (part, *recompute) {
                    blocks.par_iter_mut().for_each(|block| block.layer_backward(&network, layer));
                }
            }
            let gradient = Gradient { network, layout, blocks, pairs, shards: *shards };
            let tasks = gradient.tasks(buckets, nodes, sums, rayon::current_num_threads());
            tasks.into_par_iter().with_max_len(1).for_each(|task| {
                let thread = rayon::current_thread_index().unwrap_or(0);
                let mut scratch = scratch[thread].lock().expect("a kernel panicked");
                gradient.run(task, &mut scratch);
            });
        });
    }

    /// Adds up the rows' losses per shard, in row order.
    fn add_up(&mut self, batch: &Batch) {
        self.sums.clear();
        let mut rows = self.blocks.iter().flat_map(|block| block.row_results(self.layout.shape.head));
        for shard in &batch.shards {
            let mut sums = StepSums { rows: shard.rows.len() as u64, ..StepSums::default() };
            for (row, result) in shard.rows.clone().zip(&mut rows) {
                sums.loss += result.loss;
                sums.weight += result.weight;
                sums.correct += result.correct;
                sums.row_hash = sums.row_hash.wrapping_add(row_hash(batch.sample_ids[row]));
            }
            sums.non_finite = !sums.loss.is_finite();
            self.sums.push(sums);
        }
    }
}

impl Device for CpuDevice {
    type Buffer = Vec<f32>;
    type Reader = CpuReader;

    fn zeros(&self, len: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn import(&self, buffer: &mut Vec<f32>, at: usize, values: &[f32]) -> Result<()> {
        buffer[at..at + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn export(&self, buffer: &Vec<f32>, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        into.copy_from_slice(&buffer[range]);
        Ok(())
    }

    fn host<'a>(&self, buffer: &'a Vec<f32>) -> Option<&'a [f32]> {
        Some(buffer)
    }

    fn host_mut<'a>(&self, buffer: &'a mut Vec<f32>) -> Option<&'a mut [f32]> {
        Some(buffer)
    }

    fn step(
        &mut self,
        pass: Pass,
        parameters: &Vec<f32>,
        batch: &Batch,
        state_in: &Vec<f32>,
        state_out: &mut Vec<f32>,
    ) -> Result<()> {
        self.cut(batch.rows());
        row_starts(batch, self.layout.shape.input.size(), &mut self.row_starts);
        let backward = pass != Pass::Evaluate;
        self.dropout = match pass {
            Pass::Train { step } if self.keep_probs.iter().any(|&keep_prob| keep_prob < 1.0) => {
                Some(Dropout {
                    keep: self.keep_probs.clone(),
                    variational: self.variational,
                    seed: self.seed,
                    step,
                    first_slot: batch.first_slot,
                })
            }
            _ => None,
        };
        let (layout, recompute) = (&self.layout, self.recompute);
        let shape = &layout.shape;
        let (weights, blocks) = (&mut self.weights, &mut self.blocks);
        let rows = BatchRows { batch, starts: &self.row_starts };
        let dropout = self.dropout.as_ref();
        let simd = self.simd;
        let state_size = shape.state_size();
        let first = batch.first_slot as usize * state_size;
        let state_in = &state_in[first..first + batch.rows() * state_size];
        self.pool.install(|| {
            weights.pack(simd, layout, parameters, backward);
            let network = Network { simd, shape, weights, dropout };
            blocks.par_iter_mut().for_each(|block| {
                block.take(&network, &rows, recompute);
                block.load_state(&network, &state_in[block.rows.start * state_size..]);
                block.forward(&network, backward);
                if backward {
                    block.head_backward(&network);
                }
                if backward && !recompute {
                    // At once, while the block's numbers are in the cache.
                    for layer in (0..shape.num_layers()).rev() {
                        block.layer_backward(&network, layer);
                    }
                }
            });
        });
        if backward {
            self.pairs.take(batch, &self.blocks);
        }
        for block in &mut self.blocks {
            let start = first + block.rows.start * state_size;
            block.store_state(shape, &mut state_out[start..]);
        }
        self.add_up(batch);
        Ok(())
    }

    fn reader(&mut self, parameters: &Vec<f32>) -> Result<CpuReader> {
        if self.layout.shape.bidirectional {
            return Err(DeviceError(
                "a bidirectional network reads whole rows, not one step at a time".to_owned(),
            ));
        }
        Ok(self.pool.install(|| CpuReader::new(self.simd, &self.layout, parameters)))
    }

    fn read(&mut self, reader: &mut CpuReader, input: StepInput<'_>, logits: &mut [f32]) -> Result<()> {
        reader.read(self.simd, &self.layout.shape, input, logits);
        Ok(())
    }

    fn finish_buckets(
        &mut self,
        buckets: Range<usize>,
        nodes: &[TreeNode],
        sums: &mut [Vec<f32>],
    ) -> Result<()> {
        assert_eq!(nodes.len(), sums.len(), "finish_buckets: one buffer for each node");
        if self.recompute {
            // A layer's gates lie where those of the layer above lay.
            buckets.for_each(|bucket| self.finish(bucket..bucket + 1, nodes, sums));
        } else {
            self.finish(buckets, nodes, sums);
        }
        Ok(())
    }

    fn read_sums(&mut self) -> Result<&[StepSums]> {
        Ok(&self.sums)
    }

    fn tree_add(&self, destination: &mut Vec<f32>, source: &Vec<f32>, range: Range<usize>) -> Result<()> {
        let (destination, source) = (&mut destination[range.clone()], &source[range]);
        self.pool.install(|| {
            destination
                .par_chunks_mut(ELEMENTS_PER_TASK)
                .zip(source.par_chunks(ELEMENTS_PER_TASK))
                .for_each(|(destination, source)| reduce::tree_add(self.simd, destination, source));
        });
        Ok(())
    }

    fn clip_shard(&self, partial: &mut Vec<f32>, weight: u64, clip_norm: f64) -> Result<()> {
        let norm = self.mean_norm(partial, weight)?;
        if norm > clip_norm {
            scale(self.simd, (clip_norm / norm) as f32, partial);
        }
        Ok(())
    }

    fn mean_norm(&self, gradient: &Vec<f32>, weight: u64) -> Result<f64> {
        let squares = self.pool.install(|| squared_norm(self.simd, gradient));
        Ok(squares.sqrt() / weight as f64)
    }

    fn update(
        &mut self,
        update: &Update,
        norm: f64,
        gradient: &Vec<f32>,
        parameters: &mut Vec<f32>,
        first_moment: &mut Vec<f32>,
        second_moment: &mut Vec<f32>,
    ) -> Result<()> {
        let simd = self.simd;
        let lr = update.learning_rate;
        let gradient_scale = update.gradient_scale(norm);
        let parts = parameters
            .par_chunks_mut(ELEMENTS_PER_TASK)
            .zip(gradient.par_chunks(ELEMENTS_PER_TASK))
            .zip(first_moment.par_chunks_mut(ELEMENTS_PER_TASK))
            .zip(second_moment.par_chunks_mut(ELEMENTS_PER_TASK));
        match update.rule {
            UpdateRule::Adam { updates_done, beta1, beta2, epsilon, placement } => {
                let options = AdamOptions { lr, beta1, beta2, epsilon, placement };
                let step = AdamStep::new(options, updates_done + 1, gradient_scale);
                self.pool.install(|| {
                    parts.for_each(|(((w, g), m), v)| adam_update(simd, &step, w, g, m, v));
                });
            }
            UpdateRule::Sgd { momentum } => {
                let step = SgdStep { gradient_scale, learning_rate: lr as f32, momentum: momentum as f32 };
                self.pool.install(|| {
                    parts.for_each(|(((w, g), velocity), _)| sgd_update(simd, &step, w, g, velocity));
                });
            }
        }
        Ok(())
    }

    fn digest(&self, buffer: &Vec<f32>, at: usize) -> Result<u64> {
        Ok(reduce::digest(self.simd, buffer, at as u64))
    }
}
