//! The CPU device: the embedded default, and the reference for every other one.
//!
//! Rows are the parallelism. The rows of all shards are cut into blocks, one task each; a task runs its rows through
//! all layers, steps and back ([`block`]) without meeting another task. Then the weight gradients are summed per
//! shard ([`gradient`]), whatever blocks its rows were in. Weights are packed once per step ([`weights`]). A trained
//! network is read one step at a time by a block of one row ([`reader`]). What all this takes is known before
//! ([`footprint`], [`speed`]).

mod block;
pub mod footprint;
mod gradient;
mod reader;
pub mod speed;
mod weights;

use std::ops::Range;

use kernels::Simd;
use kernels::cpu::optimizer::{AdamOptions, AdamStep, EpsilonPlacement, adam_update, scale, squared_norm};
use kernels::cpu::reduce;
use protocol::batch::{Batch, DataShape, Inputs};
use protocol::job::JobSpec;
use protocol::layout::{Input, ModelShape, StateLayout};
use protocol::sums::{StepSums, row_hash};
use rayon::prelude::*;

use crate::device::{Backend, Device, DeviceError, Pass, Result, StepInput, Update};
use block::{BlockInputs, Dropout, RowBlock};
use gradient::{GradientTask, Scratch};
use weights::Weights;

pub use reader::CpuReader;

/// Changes whenever a change of the code changes a bit of any result.
const NUMERICS_VERSION: u32 = 1;

/// Rows of a block where its recurrent weights stay in the second-level cache from step to step: few, so that the
/// block's own trace does too.
const CACHED_BLOCK_ROWS: usize = 16;

/// Rows of a block where they do not: many, because each step streams all weights once per block.
const STREAMED_BLOCK_ROWS: usize = 64;

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
        format!("cpu f32 numerics {NUMERICS_VERSION}")
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn open(&self, layout: &StateLayout, job: &JobSpec, data: &DataShape) -> Result<CpuDevice> {
        CpuDevice::new(self.simd, self.threads, layout.clone(), job, data.seq_len)
    }
}

/// A CPU with its own threads.
pub struct CpuDevice {
    simd: Simd,
    pool: rayon::ThreadPool,
    layout: StateLayout,
    buckets: Vec<Range<usize>>,
    seq_len: usize,
    seed: u64,
    keep_prob: f32,
    weights: Weights,
    blocks: Vec<RowBlock>,
    /// Rows of each shard of the last batch.
    shard_rows: Vec<Range<usize>>,
    sums: Vec<StepSums>,
    /// One per thread.
    scratch: Vec<std::sync::Mutex<Scratch>>,
}

impl CpuDevice {
    /// A device for one job, with this many threads, at least 1.
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn new(
        simd: Simd,
        threads: usize,
        layout: StateLayout,
        job: &JobSpec,
        seq_len: usize,
    ) -> Result<Self> {
        assert!(threads > 0, "CpuDevice: threads is 0, expected at least 1");
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("compute-{i}"))
            .build()
            .map_err(|error| DeviceError(format!("cannot start {threads} threads: {error}")))?;
        Ok(Self {
            simd,
            pool,
            weights: Weights::new(&layout.shape, true),
            buckets: layout.buckets(),
            layout,
            seq_len,
            seed: job.seed,
            keep_prob: job.keep_prob as f32,
            blocks: Vec::new(),
            shard_rows: Vec::new(),
            sums: Vec::new(),
            scratch: (0..threads).map(|_| Default::default()).collect(),
        })
    }

    /// Rows that a block should have.
    fn block_rows(shape: &ModelShape) -> usize {
        let weight_bytes = 4 * shape.cell.gates() * shape.hidden_sizes[0] * shape.hidden_sizes[0];
        if weight_bytes <= CACHED_WEIGHT_BYTES { CACHED_BLOCK_ROWS } else { STREAMED_BLOCK_ROWS }
    }

    /// Cuts the batch's rows into blocks of nearly equal size, equally many for each thread.
    fn cut(&mut self, rows: usize) {
        let block_rows = Self::block_rows(&self.layout.shape);
        let threads = self.pool.current_num_threads();
        let count = rows.div_ceil(block_rows).next_multiple_of(threads).min(rows).max(1);
        self.blocks.resize_with(count, RowBlock::default);
        for (index, block) in self.blocks.iter_mut().enumerate() {
            let (start, end) = (index * rows / count, (index + 1) * rows / count);
            block.resize(&self.layout.shape, self.seq_len, start..end);
        }
    }

    /// Adds up the rows' losses per shard, in row order.
    fn add_up(&mut self, batch: &Batch) {
        self.sums.clear();
        let mut rows = self.blocks.iter().flat_map(RowBlock::row_results);
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

    fn step(
        &mut self,
        pass: Pass,
        parameters: &Vec<f32>,
        batch: &Batch,
        state_in: &Vec<f32>,
        state_out: &mut Vec<f32>,
    ) -> Result<()> {
        self.cut(batch.rows());
        self.shard_rows.clear();
        self.shard_rows.extend(batch.shards.iter().map(|shard| shard.rows.clone()));
        let backward = pass != Pass::Evaluate;
        let dropout = match pass {
            Pass::Train { step } if self.keep_prob < 1.0 => {
                Some(Dropout { keep: self.keep_prob, seed: self.seed, step, first_slot: batch.first_slot })
            }
            _ => None,
        };
        let (simd, layout, seq_len) = (self.simd, &self.layout, self.seq_len);
        let (weights, blocks) = (&mut self.weights, &mut self.blocks);
        let state_size = layout.shape.state_size();
        let first = batch.first_slot as usize * state_size;
        let state_in = &state_in[first..first + batch.rows() * state_size];
        self.pool.install(|| {
            weights.pack(layout, parameters, backward);
            let weights = &*weights;
            blocks.par_iter_mut().for_each(|block| {
                let inputs = block_inputs(batch, &layout.shape.input, seq_len, block.rows.clone());
                let state = &state_in[block.rows.start * state_size..block.rows.end * state_size];
                block.forward(simd, layout, weights, inputs, state, dropout, backward);
                if backward {
                    block.backward(simd, layout, weights, dropout);
                }
            });
        });
        for block in &self.blocks {
            let start = first + block.rows.start * state_size;
            block.store_state(&layout.shape, &mut state_out[start..start + block.rows.len() * state_size]);
        }
        self.add_up(batch);
        Ok(())
    }

    fn reader(&mut self, parameters: &Vec<f32>) -> Result<CpuReader> {
        Ok(self.pool.install(|| CpuReader::new(&self.layout, parameters)))
    }

    fn read(&mut self, reader: &mut CpuReader, input: StepInput<'_>, logits: &mut [f32]) -> Result<()> {
        reader.read(self.simd, &self.layout.shape, input, logits);
        Ok(())
    }

    fn finish_bucket(&mut self, bucket: usize, partials: &mut [Vec<f32>]) -> Result<()> {
        assert_eq!(partials.len(), self.shard_rows.len(), "finish_bucket: one partial per shard of the step");
        let range = self.buckets[bucket].clone();
        let layer = (bucket > 0).then(|| self.layout.shape.num_layers() - bucket);
        let (simd, layout, blocks, scratch) = (self.simd, &self.layout, &self.blocks, &self.scratch);
        self.pool.install(|| {
            partials.par_iter_mut().zip(&self.shard_rows).for_each(|(partial, rows)| {
                let thread = rayon::current_thread_index().unwrap_or(0);
                let mut scratch = scratch[thread].lock().expect("a kernel panicked");
                let task = GradientTask { layer, rows: rows.clone(), gradient: &mut partial[range.clone()] };
                task.run(simd, layout, blocks, &mut scratch);
            });
        });
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
        let clip = update.clip_norm.map_or(1.0, |clip_norm| clip_norm / norm.max(clip_norm));
        let options = AdamOptions {
            lr: update.learning_rate,
            beta1: update.beta1,
            beta2: update.beta2,
            epsilon: update.epsilon,
            placement: EpsilonPlacement::AfterCorrection,
        };
        let step = AdamStep::new(options, update.updates_done + 1, (clip / update.weight as f64) as f32);
        self.pool.install(|| {
            parameters
                .par_chunks_mut(ELEMENTS_PER_TASK)
                .zip(gradient.par_chunks(ELEMENTS_PER_TASK))
                .zip(first_moment.par_chunks_mut(ELEMENTS_PER_TASK))
                .zip(second_moment.par_chunks_mut(ELEMENTS_PER_TASK))
                .for_each(|(((w, g), m), v)| adam_update(self.simd, &step, w, g, m, v));
        });
        Ok(())
    }

    fn digest(&self, buffer: &Vec<f32>, at: usize) -> Result<u64> {
        Ok(reduce::digest(self.simd, buffer, at as u64))
    }
}

/// The part of a batch that a block reads.
fn block_inputs<'a>(batch: &'a Batch, input: &Input, seq_len: usize, rows: Range<usize>) -> BlockInputs<'a> {
    match &batch.inputs {
        Inputs::Tokens(tokens) => {
            BlockInputs::Tokens(&tokens[rows.start * (seq_len + 1)..rows.end * (seq_len + 1)])
        }
        Inputs::LabelledTokens { .. } => todo!(),
        Inputs::Bytes { bytes, labels } => {
            let row = seq_len * input.size();
            BlockInputs::Bytes { bytes: &bytes[rows.start * row..rows.end * row], labels: &labels[rows] }
        }
    }
}
