//! The GRU through all steps, forward and backward, with the reset gate before or after the product with `W_hn`.
//!
//! Equations and the order of operations of a unit are those of [`crate::cpu::gru`]. With the reset before the product a
//! step has two products, one behind the other: both are in the kernel, and where cubes share the units each has a launch.

use std::ops::Range;

use cubecl::prelude::*;
use protocol::cell::{RecurrentActivation, Reset};
use protocol::job::Precision;

use super::buffer::Buffer;
use super::math::tanh;
use super::precision::rounded;
use super::rows::Extent;
use super::sequence::{
    Item, Plan, backward_column, before, clear, fetch, forward_column, gate, gate_slope, hold, is_hard, item,
    multiply, multiply_from_zero, own, share,
};

/// Threads for each unit.
const GATES: usize = 3;

/// What forward and backward share.
#[derive(Debug, Clone, Copy)]
pub struct GruSequence<'a> {
    /// Steps and runs.
    pub extent: Extent,
    /// Units, `H`.
    pub hidden: usize,
    /// Where the reset gate acts.
    pub reset: Reset,
    /// What r and z do to their sums.
    pub recurrent_activation: RecurrentActivation,
    /// Of the operands of products. The weights that the kernels are given are rounded already.
    pub precision: Precision,
    /// How it is cut.
    pub plan: Plan,
    /// Steps of each run, `[Nr]`, at least 1.
    pub lengths: &'a Buffer,
    /// `[T][Nr][4·H]`
    pub gates: &'a Buffer,
    /// `[T + 1][Nr][H]`, the start of every run first.
    pub h: &'a Buffer,
}

/// What a kernel is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Options {
    hard: bool,
    /// The reset acts after the product.
    after: bool,
    /// Of a step with two products: which of its halves a launch does.
    first_half: bool,
    second_half: bool,
}

impl GruSequence<'_> {
    /// The halves of a step that launches do, in order.
    fn halves(&self) -> &'static [(bool, bool)] {
        match self.plan.whole || self.reset == Reset::After {
            true => &[(true, true)],
            false => &[(true, false), (false, true)],
        }
    }

    fn options(&self, (first_half, second_half): (bool, bool)) -> Options {
        let (hard, after) = (is_hard(self.recurrent_activation), self.reset == Reset::After);
        Options { hard, after, first_half, second_half }
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn forward_kernel(
    pre: &Array<f32>,
    weight: &Array<f32>,
    bias_hn: &Array<f32>,
    lengths: &Array<u32>,
    h: &mut Array<f32>,
    gates: &mut Array<f32>,
    runs: usize,
    first_step: usize,
    last_step: usize,
    #[comptime] hidden: usize,
    #[comptime] options: Options,
    #[comptime] precision: Precision,
    #[comptime] plan: Plan,
) {
    let own = own(GATES, hidden, plan);
    let column = forward_column(own, GATES, hidden);
    let is_candidate = own.gate == 2;

    let mut state = SharedMemory::<f32>::new(comptime!(plan.rows * hidden));
    // What is multiplied in place of h where the reset comes first.
    let mut reset = SharedMemory::<f32>::new(comptime!(if options.after { 1 } else { plan.rows * hidden }));
    let mut exchange = SharedMemory::<f32>::new(comptime!(plan.rows * 3 * plan.units));
    let mut cached = SharedMemory::<f32>::new(comptime!((plan.shared * 3 * plan.units).max(1)));
    let mut held = Array::<f32>::new(comptime!(plan.registers.max(1)));
    let mut sums = Array::<f32>::new(comptime!(plan.rows_of_a_thread()));
    hold(weight, column, &mut held, &mut cached, plan);
    fetch(h, first_step * runs * hidden, hidden, hidden, runs, &mut state, 0usize, hidden, precision, plan);
    if comptime!(!options.first_half) {
        let at = first_step * runs * comptime!(4 * hidden) + comptime!(3 * hidden);
        fetch(gates, at, comptime!(4 * hidden), hidden, runs, &mut reset, 0usize, hidden, precision, plan);
    }
    sync_cube();

    for t in first_step..last_step {
        if comptime!(options.first_half) {
            #[unroll]
            for r in 0..comptime!(plan.rows_of_a_thread()) {
                let run = own.first_run + r;
                let is_there = own.is_unit && run < runs;
                let x = pre[select(is_there, (t * runs + run) * comptime!(3 * hidden) + column.at, 0)];
                if comptime!(options.after) {
                    // The reset acts on the product and its bias: x comes later.
                    let bias = bias_hn[select(own.is_unit && is_candidate, own.unit, 0)];
                    sums[r] = select(is_candidate, bias, x);
                } else {
                    sums[r] = x;
                }
            }
            multiply(
                &state,
                own.first_row * hidden,
                hidden,
                weight,
                column,
                &held,
                &cached,
                &mut sums,
                hidden,
                plan,
            );
            share(&sums, own, &mut exchange, GATES, plan);
        }
        if comptime!(!options.after && options.first_half) {
            #[unroll]
            for part in 0..comptime!(plan.parts(GATES)) {
                let item = item(part, runs, GATES, hidden, plan);
                if item.is_there {
                    let Item { r, run, unit, sum, .. } = item;
                    let reset_gate = gate(exchange[sum], options.hard);
                    let z = gate(exchange[sum + plan.units], options.hard);
                    let place = t * runs + run;
                    let h_before = before(&state, r * hidden + unit, h, place * hidden + unit, precision);
                    let in_its_place = reset_gate * h_before;
                    let gates_at = place * comptime!(4 * hidden) + unit;
                    gates[gates_at] = reset_gate;
                    gates[gates_at + hidden] = z;
                    gates[gates_at + comptime!(3 * hidden)] = in_its_place;
                    reset[r * hidden + unit] = rounded(in_its_place, precision);
                }
            }
            sync_cube();
        }
        if comptime!(!options.after && options.second_half) {
            #[unroll]
            for r in 0..comptime!(plan.rows_of_a_thread()) {
                let run = own.first_run + r;
                let is_there = own.is_unit && run < runs;
                sums[r] = pre[select(is_there, (t * runs + run) * comptime!(3 * hidden) + column.at, 0)];
            }
            // Only the candidate's sums are read; all threads come along, for the barriers.
            multiply(
                &reset,
                own.first_row * hidden,
                hidden,
                weight,
                column,
                &held,
                &cached,
                &mut sums,
                hidden,
                plan,
            );
            share(&sums, own, &mut exchange, GATES, plan);
        }
        if comptime!(options.second_half) {
            #[unroll]
            for part in 0..comptime!(plan.parts(GATES)) {
                let item = item(part, runs, GATES, hidden, plan);
                if item.is_there {
                    let Item { r, run, unit, sum, .. } = item;
                    let place = t * runs + run;
                    let gates_at = place * comptime!(4 * hidden) + unit;
                    let h_previous = before(&state, r * hidden + unit, h, place * hidden + unit, precision);
                    let last = exchange[sum + comptime!(2 * plan.units)];
                    let z = RuntimeCell::<f32>::new(0.0);
                    let n = RuntimeCell::<f32>::new(0.0);
                    if comptime!(options.after) {
                        let reset_gate = gate(exchange[sum], options.hard);
                        z.store(gate(exchange[sum + plan.units], options.hard));
                        let x_n = pre[place * comptime!(3 * hidden) + comptime!(2 * hidden) + unit];
                        n.store(tanh(fma(reset_gate, last, x_n)));
                        gates[gates_at] = reset_gate;
                        gates[gates_at + hidden] = z.read();
                        gates[gates_at + comptime!(3 * hidden)] = last;
                    } else {
                        z.store(gates[gates_at + hidden]);
                        n.store(tanh(last));
                    }
                    gates[gates_at + comptime!(2 * hidden)] = n.read();
                    let new = fma(z.read(), h_previous, (1.0 - z.read()) * n.read());
                    // After its end a run keeps its last state.
                    let kept = select(t < lengths[run] as usize, new, h_previous);
                    h[(place + runs) * hidden + unit] = kept;
                    if comptime!(plan.whole) {
                        state[r * hidden + unit] = rounded(kept, precision);
                    }
                }
            }
            sync_cube();
        }
    }
}

/// Through all steps, from the input's part of the gates and the start of every run.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `pre` | `[T][Nr][3·H]` | in | with all biases but `bias_hn` |
/// | `weight_hh_t` | `[H][3·H]` | in | |
/// | `bias_hn` | `[H]` | in | where the reset acts after the product |
/// | `sequence.h` | `[T + 1][Nr][H]` | in and out | the start of every run first; repeats after a run's end |
/// | `sequence.gates` | | out | r, z, n, and what the reset acts on, or has made |
pub fn gru_forward<R: Runtime>(
    client: &ComputeClient<R>,
    sequence: GruSequence<'_>,
    pre: &Buffer,
    weight_hh_t: &Buffer,
    bias_hn: Option<&Buffer>,
) {
    let GruSequence { extent, hidden, precision, plan, lengths, gates, h, .. } = sequence;
    for steps in plan.launches(extent.steps) {
        for &half in sequence.halves() {
            // SAFETY: every thread reads and writes the places of runs and units that are there, in the first `extent` of
            // all.
            unsafe {
                forward_kernel::launch_unchecked::<R>(
                    client,
                    plan.cubes(extent.runs, hidden),
                    plan.threads(GATES),
                    pre.arg(),
                    weight_hh_t.arg(),
                    bias_hn.unwrap_or(weight_hh_t).arg(),
                    lengths.arg(),
                    h.arg(),
                    gates.arg(),
                    extent.runs,
                    steps.start,
                    steps.end,
                    hidden,
                    sequence.options(half),
                    precision,
                    plan,
                );
            }
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
    gates: &mut Array<f32>,
    d_start: &mut Array<f32>,
    runs: usize,
    steps: usize,
    first_step: usize,
    last_step: usize,
    #[comptime] hidden: usize,
    #[comptime] options: Options,
    #[comptime] precision: Precision,
    #[comptime] plan: Plan,
) {
    let own = own(GATES, hidden, plan);
    let column = backward_column(own, hidden);

    // Gradients of what is multiplied with the weights: of the step after those of r and z, and of n where the reset acts
    // after the product; where it acts before, that of this step's n.
    let mut tile = SharedMemory::<f32>::new(comptime!(plan.rows * 3 * hidden));
    let mut exchange = SharedMemory::<f32>::new(comptime!(plan.rows * 3 * plan.units));
    let mut cached = SharedMemory::<f32>::new(comptime!((plan.shared * 3 * plan.units).max(1)));
    let mut held = Array::<f32>::new(comptime!(plan.registers.max(1)));
    let mut sums = Array::<f32>::new(comptime!(plan.rows_of_a_thread()));
    hold(weight, column, &mut held, &mut cached, plan);
    clear(&mut tile, comptime!(3 * hidden), plan);
    sync_cube();
    if comptime!(options.first_half) {
        // Beyond the last step there is nothing: zeros.
        let has_after = last_step < steps;
        let at = last_step * runs * comptime!(4 * hidden);
        let two = select(has_after, comptime!(2 * hidden), 0);
        fetch(
            gates,
            at,
            comptime!(4 * hidden),
            two,
            runs,
            &mut tile,
            0usize,
            comptime!(3 * hidden),
            precision,
            plan,
        );
        if comptime!(options.after) {
            // Behind r and z stands n, but what is multiplied is the one after it.
            let (at, one) = (at + comptime!(3 * hidden), select(has_after, hidden, 0));
            let (tile_at, stride) = comptime!((2 * hidden, 3 * hidden));
            fetch(gates, at, comptime!(4 * hidden), one, runs, &mut tile, tile_at, stride, precision, plan);
        }
    } else {
        // This step's n, which the first half has left.
        let at = first_step * runs * comptime!(4 * hidden) + comptime!(2 * hidden);
        let (tile_at, stride) = comptime!((2 * hidden, 3 * hidden));
        fetch(gates, at, comptime!(4 * hidden), hidden, runs, &mut tile, tile_at, stride, precision, plan);
    }
    sync_cube();

    // To the start it is one round more; where a launch does one step, that is a launch without any.
    let to_start = if comptime!(plan.whole) { first_step == 0 } else { last_step == 0 };
    let rounds = last_step - first_step + select(to_start, 1, 0);
    for round in 0..rounds {
        let is_start = first_step + round == last_step;
        if comptime!(options.first_half) {
            let at = own.first_row * comptime!(3 * hidden) + own.gate * hidden;
            multiply_from_zero(
                &tile,
                at,
                comptime!(3 * hidden),
                weight,
                column,
                &held,
                &cached,
                &mut sums,
                hidden,
                plan,
            );
            share(&sums, own, &mut exchange, GATES, plan);
            #[unroll]
            for part in 0..comptime!(plan.parts(GATES)) {
                let item = item(part, runs, GATES, hidden, plan);
                if item.is_there {
                    let Item { r, run, unit, sum, .. } = item;
                    let from_gates = RuntimeCell::<f32>::new(exchange[sum] + exchange[sum + plan.units]);
                    if comptime!(options.after) {
                        from_gates.store(from_gates.read() + exchange[sum + comptime!(2 * plan.units)]);
                    }
                    let start_at = run * hidden + unit;
                    if is_start {
                        d_start[start_at] = from_gates.read() + d_start[start_at];
                    } else {
                        let t = last_step - 1 - round;
                        let place = t * runs + run;
                        let length = lengths[run] as usize;
                        // Beyond a run's end nothing comes back.
                        let carried = select(t + 1 >= length, 0.0, from_gates.read() + d_start[start_at]);
                        let runs_on = t < length;
                        let gates_at = place * comptime!(4 * hidden) + unit;
                        let r_gate = gates[gates_at];
                        let z = gates[gates_at + hidden];
                        let n = gates[gates_at + comptime!(2 * hidden)];
                        let q = gates[gates_at + comptime!(3 * hidden)];
                        let d_h = d_out[place * hidden + unit] + carried;
                        let d_n = select(runs_on, d_h * (1.0 - z) * fma(-n, n, 1.0), 0.0);
                        let d_z = d_h * (h[place * hidden + unit] - n) * gate_slope(z, options.hard);
                        let d_z = select(runs_on, d_z, 0.0);
                        d_start[start_at] = select(runs_on, d_h * z, 0.0);
                        gates[gates_at + hidden] = d_z;
                        gates[gates_at + comptime!(2 * hidden)] = d_n;
                        let tile_at = r * comptime!(3 * hidden) + unit;
                        if comptime!(options.after) {
                            let d_r = select(runs_on, d_n * q * gate_slope(r_gate, options.hard), 0.0);
                            let d_q = select(runs_on, d_n * r_gate, 0.0);
                            gates[gates_at] = d_r;
                            gates[gates_at + comptime!(3 * hidden)] = d_q;
                            if comptime!(plan.whole) {
                                tile[tile_at] = rounded(d_r, precision);
                                tile[tile_at + hidden] = rounded(d_z, precision);
                                tile[tile_at + comptime!(2 * hidden)] = rounded(d_q, precision);
                            }
                        } else if comptime!(plan.whole) {
                            tile[tile_at + hidden] = rounded(d_z, precision);
                            tile[tile_at + comptime!(2 * hidden)] = rounded(d_n, precision);
                        }
                    }
                }
            }
            sync_cube();
        }
        if comptime!(!options.after && options.second_half) {
            // Only the candidate's sums are read; all threads come along, for the barriers.
            let at = own.first_row * comptime!(3 * hidden) + comptime!(2 * hidden);
            multiply_from_zero(
                &tile,
                at,
                comptime!(3 * hidden),
                weight,
                column,
                &held,
                &cached,
                &mut sums,
                hidden,
                plan,
            );
            share(&sums, own, &mut exchange, GATES, plan);
            #[unroll]
            for part in 0..comptime!(plan.parts(GATES)) {
                let item = item(part, runs, GATES, hidden, plan);
                if item.is_there && !is_start {
                    let Item { r, run, unit, sum, .. } = item;
                    let d_reset = exchange[sum + comptime!(2 * plan.units)];
                    let t = last_step - 1 - round;
                    let place = t * runs + run;
                    let runs_on = t < lengths[run] as usize;
                    let gates_at = place * comptime!(4 * hidden) + unit;
                    let r_gate = gates[gates_at];
                    let h_previous = h[place * hidden + unit];
                    let d_r = select(runs_on, d_reset * h_previous * gate_slope(r_gate, options.hard), 0.0);
                    let start_at = run * hidden + unit;
                    let on_to_h = fma(d_reset, r_gate, d_start[start_at]);
                    d_start[start_at] = select(runs_on, on_to_h, 0.0);
                    gates[gates_at] = d_r;
                    let made = gates[gates_at + comptime!(3 * hidden)];
                    gates[gates_at + comptime!(3 * hidden)] = select(runs_on, made, 0.0);
                    if comptime!(plan.whole) {
                        tile[r * comptime!(3 * hidden) + unit] = rounded(d_r, precision);
                    }
                }
            }
            sync_cube();
        }
    }
}

/// Back through all steps.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `d_out` | `[T][Nr][H]` | in | gradient of h after each step, from above |
/// | `weight_hh` | `[3·H][H]` | in | |
/// | `sequence.gates` | | in and out | gradients of the sums of r, z and n; behind them, where the reset acts after the product, that of the product with its bias, else what was multiplied in place of h. Zeros after a run's end |
/// | `d_start` | `[Nr][H]` | out | gradient of the start of every run |
pub fn gru_backward<R: Runtime>(
    client: &ComputeClient<R>,
    sequence: GruSequence<'_>,
    d_out: &Buffer,
    weight_hh: &Buffer,
    d_start: &Buffer,
) {
    let GruSequence { extent, hidden, precision, plan, lengths, gates, h, .. } = sequence;
    for steps in plan.launches_back(extent.steps) {
        let Range { start, end } = steps;
        // On the way to the start there is no second half.
        let halves = if end == 0 { &sequence.halves()[..1] } else { sequence.halves() };
        for &half in halves {
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
                    gates.arg(),
                    d_start.arg(),
                    extent.runs,
                    extent.steps,
                    start,
                    end,
                    hidden,
                    sequence.options(half),
                    precision,
                    plan,
                );
            }
        }
    }
}
