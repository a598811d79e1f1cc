//! The plain recurrent network through all steps, forward and backward; equations as [`crate::cpu::rnn`].

use cubecl::prelude::*;
use protocol::cell::Activation;
use protocol::job::Precision;

use super::buffer::Buffer;
use super::math::{relu, tanh};
use super::precision::rounded;
use super::rows::Extent;
use super::sequence::{
    Own, Plan, backward_column, before, clear, fetch, forward_column, hold, multiply, multiply_from_zero, own,
};

/// Threads for each unit.
const GATES: usize = 1;

/// What forward and backward share.
#[derive(Debug, Clone, Copy)]
pub struct RnnSequence<'a> {
    /// Steps and runs.
    pub extent: Extent,
    /// Units, `H`.
    pub hidden: usize,
    /// What a unit does to its sum.
    pub activation: Activation,
    /// Of the operands of products. The weights that the kernels are given are rounded already.
    pub precision: Precision,
    /// How it is cut.
    pub plan: Plan,
    /// Steps of each run, `[Nr]`, at least 1.
    pub lengths: &'a Buffer,
    /// `[T + 1][Nr][H]`, the start of every run first.
    pub h: &'a Buffer,
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn forward_kernel(
    pre: &Array<f32>,
    weight: &Array<f32>,
    lengths: &Array<u32>,
    h: &mut Array<f32>,
    runs: usize,
    first_step: usize,
    last_step: usize,
    #[comptime] hidden: usize,
    #[comptime] is_relu: bool,
    #[comptime] precision: Precision,
    #[comptime] plan: Plan,
) {
    let own = own(GATES, hidden, plan);
    let column = forward_column(own, GATES, hidden);
    let Own { unit, is_unit, first_row, first_run, .. } = own;
    let mut state = SharedMemory::<f32>::new(comptime!(plan.rows * hidden));
    let mut cached = SharedMemory::<f32>::new(comptime!((plan.shared * plan.units).max(1)));
    let mut held = Array::<f32>::new(comptime!(plan.registers.max(1)));
    let mut sums = Array::<f32>::new(comptime!(plan.rows_of_a_thread()));
    hold(weight, column, &mut held, &mut cached, plan);
    fetch(h, first_step * runs * hidden, hidden, hidden, runs, &mut state, 0usize, hidden, precision, plan);
    sync_cube();
    for t in first_step..last_step {
        #[unroll]
        for r in 0..comptime!(plan.rows_of_a_thread()) {
            let run = first_run + r;
            let is_there = is_unit && run < runs;
            sums[r] = pre[select(is_there, (t * runs + run) * hidden + unit, 0)];
        }
        multiply(&state, first_row * hidden, hidden, weight, column, &held, &cached, &mut sums, hidden, plan);
        sync_cube();
        #[unroll]
        for r in 0..comptime!(plan.rows_of_a_thread()) {
            let run = first_run + r;
            if is_unit && run < runs {
                let new = if comptime!(is_relu) { relu(sums[r]) } else { tanh(sums[r]) };
                // After its end a run keeps its last state.
                let state_at = (first_row + r) * hidden + unit;
                let h_before = before(&state, state_at, h, (t * runs + run) * hidden + unit, precision);
                let kept = select(t < lengths[run] as usize, new, h_before);
                h[((t + 1) * runs + run) * hidden + unit] = kept;
                if comptime!(plan.whole) {
                    state[state_at] = rounded(kept, precision);
                }
            }
        }
        sync_cube();
    }
}

/// Through all steps, from the input's part of the sums `[T][Nr][H]`, with all biases, and the start of every run.
/// `weight_hh_t` is `[H][H]`, k first; h repeats after a run's end.
pub fn rnn_forward<R: Runtime>(
    client: &ComputeClient<R>,
    sequence: RnnSequence<'_>,
    pre: &Buffer,
    weight_hh_t: &Buffer,
) {
    let RnnSequence { extent, hidden, activation, precision, plan, lengths, h } = sequence;
    for steps in plan.launches(extent.steps) {
        // SAFETY: every thread reads and writes the places of runs and units that are there, in the first `extent` of all.
        unsafe {
            forward_kernel::launch_unchecked::<R>(
                client,
                plan.cubes(extent.runs, hidden),
                plan.threads(GATES),
                pre.arg(),
                weight_hh_t.arg(),
                lengths.arg(),
                h.arg(),
                extent.runs,
                steps.start,
                steps.end,
                hidden,
                activation == Activation::Relu,
                precision,
                plan,
            );
        }
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn backward_kernel(
    d_out: &Array<f32>,
    weight: &Array<f32>,
    lengths: &Array<u32>,
    h: &Array<f32>,
    d_pre: &mut Array<f32>,
    d_start: &mut Array<f32>,
    runs: usize,
    steps: usize,
    first_step: usize,
    last_step: usize,
    #[comptime] hidden: usize,
    #[comptime] is_relu: bool,
    #[comptime] precision: Precision,
    #[comptime] plan: Plan,
) {
    let own = own(GATES, hidden, plan);
    let column = backward_column(own, hidden);
    let Own { unit, is_unit, first_row, first_run, .. } = own;
    // Of the step after: the gradients of the sums.
    let mut tile = SharedMemory::<f32>::new(comptime!(plan.rows * hidden));
    let mut cached = SharedMemory::<f32>::new(comptime!((plan.shared * plan.units).max(1)));
    let mut held = Array::<f32>::new(comptime!(plan.registers.max(1)));
    let mut sums = Array::<f32>::new(comptime!(plan.rows_of_a_thread()));
    hold(weight, column, &mut held, &mut cached, plan);
    clear(&mut tile, hidden, plan);
    // Beyond the last step there is nothing: zeros.
    let width = select(last_step < steps, hidden, 0);
    fetch(d_pre, last_step * runs * hidden, hidden, width, runs, &mut tile, 0usize, hidden, precision, plan);
    sync_cube();
    // To the start it is one round more; where a launch does one step, that is a launch without any.
    let to_start = if comptime!(plan.whole) { first_step == 0 } else { last_step == 0 };
    let rounds = last_step - first_step + select(to_start, 1, 0);
    for round in 0..rounds {
        multiply_from_zero(
            &tile,
            first_row * hidden,
            hidden,
            weight,
            column,
            &held,
            &cached,
            &mut sums,
            hidden,
            plan,
        );
        sync_cube();
        #[unroll]
        for r in 0..comptime!(plan.rows_of_a_thread()) {
            let run = first_run + r;
            if is_unit && run < runs {
                if first_step + round == last_step {
                    d_start[run * hidden + unit] = sums[r];
                } else {
                    let t = last_step - 1 - round;
                    let place = (t * runs + run) * hidden + unit;
                    let y = h[place + runs * hidden];
                    let slope = if comptime!(is_relu) { select(y > 0.0, 1.0, 0.0) } else { fma(-y, y, 1.0) };
                    let d = (d_out[place] + sums[r]) * slope;
                    let d = select(t < lengths[run] as usize, d, 0.0);
                    d_pre[place] = d;
                    if comptime!(plan.whole) {
                        tile[(first_row + r) * hidden + unit] = rounded(d, precision);
                    }
                }
            }
        }
        sync_cube();
    }
}

/// Back through all steps: from the gradient of h after each step `[T][Nr][H]` to those of the sums `[T][Nr][H]`, zeros
/// after a run's end, and of the start of every run `[Nr][H]`. `weight_hh` is `[H][H]`, PyTorch's.
pub fn rnn_backward<R: Runtime>(
    client: &ComputeClient<R>,
    sequence: RnnSequence<'_>,
    d_out: &Buffer,
    weight_hh: &Buffer,
    d_pre: &Buffer,
    d_start: &Buffer,
) {
    let RnnSequence { extent, hidden, activation, precision, plan, lengths, h } = sequence;
    for steps in plan.launches_back(extent.steps) {
        // SAFETY: as in the forward pass.
        unsafe {
            backward_kernel::launch_unchecked::<R>(
                client,
                plan.cubes(extent.runs, hidden),
                plan.threads(GATES),
                d_out.arg(),
                weight_hh.arg(),
                lengths.arg(),
                h.arg(),
                d_pre.arg(),
                d_start.arg(),
                extent.runs,
                extent.steps,
                steps.start,
                steps.end,
                hidden,
                activation == Activation::Relu,
                precision,
                plan,
            );
        }
    }
}
