//! How many bytes a worker will hold besides its device's own, before it is started.

use std::ops::Range;

use protocol::batch::DataShape;
use protocol::job::JobSpec;
use protocol::layout::{Input, StateLayout};
use protocol::slots::slots_of;
use protocol::tree;

use crate::feed::BATCHES_AHEAD;
use crate::train::summed_nodes;

/// Program, threads and connections of a worker that has no job yet. Measured.
const BARE_BYTES: usize = 8 << 20;

/// The most bytes that the worker of these shards holds, in a fleet of `world_size`, besides `device_bytes`.
pub fn worker_bytes(
    layout: &StateLayout,
    job: &JobSpec,
    data: &DataShape,
    shards: Range<u32>,
    world_size: u32,
    device_bytes: usize,
) -> usize {
    let float = size_of::<f32>();
    let (parameters, recurrent) = (layout.parameters(), layout.recurrent());
    // Parameters, gradient and two moments; the state before and after.
    let replica = 4 * parameters + 2 * recurrent;
    let sums = summed_nodes(job, shards.clone()).len() * parameters;
    // Values of the own nodes on their way out, of the others' nodes for the own part of the sum, and the sum.
    let own_nodes = tree::cover(job.shards, shards.clone()).len();
    let other_nodes = world_size.saturating_sub(1) as usize * own_nodes;
    let sum = if world_size > 1 { parameters } else { 0 };
    let collective = own_nodes * parameters + other_nodes * parameters / world_size.max(1) as usize + sum;
    let evaluation = 2 * recurrent;
    // The state as it is sent to be written: whole, and in frames.
    let image = 2 * layout.image_bytes() + float * parameters.max(recurrent);

    let rows = slots_of(job.batch_size, job.shards, shards).len();
    let row = match layout.shape.input {
        Input::OneHot(_) | Input::Embedding { .. } => size_of::<u16>() * (data.seq_len + 1),
        Input::Bytes(width) => data.seq_len * width,
    };
    let batches = BATCHES_AHEAD as usize * rows * (row + size_of::<u64>() + 2 * size_of::<u32>());
    BARE_BYTES + device_bytes + float * (replica + sums + collective + evaluation) + image + batches
}
