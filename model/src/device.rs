//! The seam between training and whatever computes: one step of a network on a device.
//!
//! A device takes whole steps, not operations: what is fused, in which order layers run and where weights live is
//! its own affair. Buffers are opaque, so that nothing above this line can touch a float on the host by accident.
//! A call may only *enqueue* work; the calls that hand results to the host ([`Device::read_sums`],
//! [`Device::export`], [`Device::mean_norm`], [`Device::digest`]) wait for what they need.

use std::fmt;
use std::ops::Range;

use protocol::batch::{Batch, DataShape};
use protocol::job::{Clip, EpsilonPlacement, JobSpec, Optimizer, Precision};
use protocol::layout::StateLayout;
use protocol::sums::StepSums;
use protocol::tree::TreeNode;

/// What a device was asked to do and could not.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

/// Result of a device call.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// What a pass over a batch is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Forward with dropout, backward; `step` steps were done before, which keys the masks.
    Train {
        /// Steps done.
        step: u64,
    },
    /// Forward only, without dropout; no gradients.
    Evaluate,
}

/// What a row reads at one time step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepInput<'a> {
    /// A token id, below the width of the one-hot input.
    Token(u32),
    /// `[I]`, to be divided by 255.
    Bytes(&'a [u8]),
}

/// The numbers of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Summed weight of the batch: what the summed gradient is divided by.
    pub weight: u64,
    /// The norm to which the mean gradient is clipped, if it is clipped here.
    pub clip_norm: Option<f64>,
    /// Step size.
    pub learning_rate: f64,
    /// What turns the gradient into a step.
    pub rule: UpdateRule,
}

/// An optimizer with its numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum UpdateRule {
    /// Adam.
    Adam {
        /// Updates done before this one; the bias correction uses `updates_done + 1`.
        updates_done: u64,
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Keeps the quotient finite.
        epsilon: f64,
        /// Where it is added.
        placement: EpsilonPlacement,
    },
    /// Gradient descent. The velocity is in the first moment; the second is not touched.
    Sgd {
        /// Share of the velocity that stays.
        momentum: f64,
    },
}

impl Update {
    /// The update of a job after `updates_done` updates, for a batch of this weight.
    pub fn new(job: &JobSpec, updates_done: u64, weight: u64, learning_rate: f64) -> Self {
        let JobSpec { beta1, beta2, epsilon, epsilon_placement: placement, momentum, .. } = *job;
        let rule = match job.optimizer {
            Optimizer::Adam => UpdateRule::Adam { updates_done, beta1, beta2, epsilon, placement },
            Optimizer::Sgd => UpdateRule::Sgd { momentum },
        };
        let clip_norm = (job.clip == Clip::Global).then_some(job.clip_norm);
        Self { weight, clip_norm, learning_rate, rule }
    }

    /// What the summed gradient is multiplied with, given the norm of its mean: the division by the weight, and the clip.
    pub fn gradient_scale(&self, norm: f64) -> f32 {
        let clip = self.clip_norm.map_or(1.0, |clip_norm| clip_norm / norm.max(clip_norm));
        (clip / self.weight as f64) as f32
    }
}

/// A kind of device that can be opened once the job is known.
pub trait Backend: Send {
    /// What it opens.
    type Device: Device;

    /// What it is, for people: `cpu (AVX-512)`.
    fn describe(&self) -> String;

    /// Everything the device's bits depend on. Backends with equal words give equal bits; a fleet with different
    /// words is refused. Every CPU path gives the same word.
    fn bits(&self) -> String;

    /// Threads that compute.
    fn threads(&self) -> usize;

    /// Whether it multiplies operands of this precision.
    fn has(&self, precision: Precision) -> bool;

    /// Opens the device for one job. With `recompute` it keeps little of the forward pass and computes it again for
    /// the backward pass: the same bits, less memory.
    ///
    /// # Errors
    /// The device has no room, is not there, or has not the job's precision.
    fn open(
        &self,
        layout: &StateLayout,
        job: &JobSpec,
        data: &DataShape,
        recompute: bool,
    ) -> Result<Self::Device>;
}

/// Something that trains: a CPU with some threads, or one GPU.
///
/// Every method keeps the row rule (a number of one row does not depend on which rows share the call) and the sum
/// rule (sums across rows are taken per shard, in row order), so equal calls give equal bits however shards are
/// spread over devices.
pub trait Device: Send {
    /// A flat f32 buffer on the device.
    type Buffer: Send;

    /// A trained network on its way along one row, see [`reader`](Self::reader).
    type Reader: Send;

    /// A buffer of `len` zeros.
    fn zeros(&self, len: usize) -> Result<Self::Buffer>;

    /// Copies `values` to `at ..` of the buffer.
    fn import(&self, buffer: &mut Self::Buffer, at: usize, values: &[f32]) -> Result<()>;

    /// Copies a range of the buffer to the host.
    fn export(&self, buffer: &Self::Buffer, range: Range<usize>, into: &mut [f32]) -> Result<()>;

    /// The numbers of the buffer, where its memory is the host's: a network can then take them from there without a
    /// copy. `None` where it is not.
    fn host<'a>(&self, _buffer: &'a Self::Buffer) -> Option<&'a [f32]> {
        None
    }

    /// As [`host`](Self::host), for a network that puts numbers there.
    fn host_mut<'a>(&self, _buffer: &'a mut Self::Buffer) -> Option<&'a mut [f32]> {
        None
    }

    /// The device's memory as NCCL sees it, where that is a CUDA device's. `None` where it is not.
    fn cuda(&self) -> Option<&dyn CudaMemory<Self::Buffer>> {
        None
    }

    /// Runs the network over the rows of a batch.
    ///
    /// | argument | shape | in/out |
    /// |---|---|---|
    /// | `parameters` | `[P]` | in |
    /// | `batch` | its rows lie in slots `first_slot ..` | in |
    /// | `state_in` | `[B, state_size]` by slot, only the batch's slots are read, and none where the batch begins a pass over the data | in; not changed, so that an aborted step can run again |
    /// | `state_out` | as `state_in` | out: only the batch's slots are written |
    ///
    /// For [`Pass::Train`] the gradients' row sums are left inside the device for
    /// [`finish_buckets`](Self::finish_buckets).
    fn step(
        &mut self,
        pass: Pass,
        parameters: &Self::Buffer,
        batch: &Batch,
        state_in: &Self::Buffer,
        state_out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Begins to read one row with these parameters `[P]`, from the network's initial state. The weights are prepared
    /// here, once; later changes of the buffer do not reach the reader.
    ///
    /// # Errors
    /// The network is bidirectional: it cannot say anything before a row's end.
    fn reader(&mut self, parameters: &Self::Buffer) -> Result<Self::Reader>;

    /// Reads one time step, without dropout. `logits` `[V]` becomes the head's output for the state after it, with
    /// the bits that [`step`](Self::step) computes in an evaluation; where the head reads the final state only, those
    /// after the last step are the network's answer.
    ///
    /// The input must fit the network: a token below the number of tokens, or as many bytes as the input is wide.
    fn read(&mut self, reader: &mut Self::Reader, input: StepInput<'_>, logits: &mut [f32]) -> Result<()>;

    /// Completes some buckets (see [`StateLayout::buckets`](protocol::layout::StateLayout::buckets)) of the last
    /// training step: `sums[i][range of the bucket]` becomes the gradient of the *sum* of the losses of the shards below
    /// `nodes[i]`, added along the tree; these are shards of the batch. Buckets must be finished in order, each once: one
    /// at a time if it is to travel while the next is computed, else all together, which keeps all threads busy.
    fn finish_buckets(
        &mut self,
        buckets: Range<usize>,
        nodes: &[TreeNode],
        sums: &mut [Self::Buffer],
    ) -> Result<()>;

    /// The sums of each shard of the last step, in the batch's order.
    fn read_sums(&mut self) -> Result<&[StepSums]>;

    /// `destination[range] += source[range]`: one addition of the tree.
    fn tree_add(
        &self,
        destination: &mut Self::Buffer,
        source: &Self::Buffer,
        range: Range<usize>,
    ) -> Result<()>;

    /// Some additions of a tree, one after another: for each `(left, right)`, `nodes[left][range] += nodes[right][range]`.
    /// What remains of the right node is not specified.
    fn tree_sum(
        &self,
        nodes: &mut [Self::Buffer],
        additions: &[(usize, usize)],
        range: Range<usize>,
    ) -> Result<()> {
        additions.iter().try_for_each(|&(left, right)| {
            let [left, right] =
                nodes.get_disjoint_mut([left, right]).expect("an addition has two distinct operands");
            self.tree_add(left, right, range.clone())
        })
    }

    /// `destination[range] = source[range]`.
    fn copy(&self, destination: &mut Self::Buffer, source: &Self::Buffer, range: Range<usize>) -> Result<()> {
        let mut values = vec![0.0; range.len()];
        self.export(source, range.clone(), &mut values)?;
        self.import(destination, range.start, &values)
    }

    /// Clips one shard's summed gradient as a mean: `G ← n · clip(G / n, clip_norm)` with `n` its weight.
    fn clip_shard(&self, gradient: &mut Self::Buffer, weight: u64, clip_norm: f64) -> Result<()>;

    /// Norm of the mean gradient `gradient / weight`; not finite if any of its numbers is not.
    fn mean_norm(&self, gradient: &Self::Buffer, weight: u64) -> Result<f64>;

    /// Divides the summed gradient by the weight, clips it by `norm` (from [`mean_norm`](Self::mean_norm)) and
    /// updates the parameters and what the update's rule keeps in the moments.
    fn update(
        &mut self,
        update: &Update,
        norm: f64,
        gradient: &Self::Buffer,
        parameters: &mut Self::Buffer,
        first_moment: &mut Self::Buffer,
        second_moment: &mut Self::Buffer,
    ) -> Result<()>;

    /// A 64-bit digest of a buffer that lies at `at` of the state image, keyed by position: digests of the parts
    /// add up (wrapping) to the digest of the whole.
    fn digest(&self, buffer: &Self::Buffer, at: usize) -> Result<u64>;
}

/// Memory of a CUDA device, for what reads and writes it on a stream of its own.
///
/// A device enqueues its work on streams that nobody else sees. So whoever uses its memory beside it calls
/// [`synchronize`](Self::synchronize) before, and waits for its own stream before the device's next call that touches
/// the same numbers.
pub trait CudaMemory<Buffer> {
    /// Position of the device among those that CUDA shows this process. Buffers belong to its *primary* context.
    fn ordinal(&self) -> usize;

    /// Address of a buffer's first number in the device's memory. The numbers lie one after another, and stay there until
    /// the buffer is dropped.
    fn address(&self, buffer: &Buffer) -> Result<u64>;

    /// Waits until everything that was enqueued by any call has run.
    fn synchronize(&self) -> Result<()>;
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Train { step } => write!(f, "training step {step}"),
            Self::Evaluate => f.write_str("evaluation"),
        }
    }
}
