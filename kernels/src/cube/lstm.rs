//! The LSTM through all steps, forward and backward.
//!
//! Equations, options and the order of operations of a unit are those of [`crate::cpu::lstm`]. A projection is a product
//! of its own between two launches.

use cubecl::prelude::*;
use protocol::cell::CellOptions;
use protocol::job::Precision;

use super::buffer::Buffer;
use super::gemm::{Matrix, Right, Shape, Start, product};
use super::math::tanh;
use super::precision::rounded;
use super::rows::Extent;
use super::sequence::{
    Item, Plan, backward_column, before, clear, fetch, forward_column, gate, gate_slope, hold, is_hard, item,
    multiply, multiply_from_zero, own, share,
};

/// The options that a kernel is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Options {
    hard: bool,
    peepholes: bool,
    clips: bool,
    /// What is projected goes to one buffer, h comes from another.
    projects: bool,
}

impl Options {
    fn of(options: &CellOptions) -> Self {
        Self {
            hard: is_hard(options.recurrent_activation),
            peepholes: options.peepholes,
            clips: options.cell_clip.is_some(),
            projects: options.projection.is_some(),
        }
    }
}

/// Threads for each unit.
const GATES: usize = 4;

/// What forward and backward share.
#[derive(Debug, Clone, Copy)]
pub struct LstmSequence<'a> {
    /// Steps and runs.
    pub extent: Extent,
    /// Units, `H`.
    pub hidden: usize,
    /// Width of h, `R`.
    pub output: usize,
    /// Of the cell.
    pub options: &'a CellOptions,
    /// Of the operands of products. The weights that the kernels are given are rounded already.
    pub precision: Precision,
    /// How it is cut.
    pub plan: Plan,
    /// Steps of each run, `[Nr]`, at least 1.
    pub lengths: &'a Buffer,
    /// To i, f and o: `[3][H]`, if the cell has them.
    pub peepholes: Option<&'a Buffer>,
    /// `[T][Nr][4·H]`
    pub gates: &'a Buffer,
    /// `[T + 1][Nr][H]`, the start of every run first.
    pub c: &'a Buffer,
}

/// A projection of what an LSTM's units put out.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a> {
    /// `[R][H]`
    pub weight_hr: &'a Buffer,
    /// What is projected, `[T][Nr][H]`.
    pub m: &'a Buffer,
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn forward_kernel(
    pre: &Array<f32>,
    weight: &Array<f32>,
    lengths: &Array<u32>,
    peepholes: &Array<f32>,
    h: &mut Array<f32>,
    c: &mut Array<f32>,
    gates: &mut Array<f32>,
    m: &mut Array<f32>,
    runs: usize,
    first_step: usize,
    last_step: usize,
    clip: f32,
    #[comptime] hidden: usize,
    #[comptime] output: usize,
    #[comptime] options: Options,
    #[comptime] precision: Precision,
    #[comptime] plan: Plan,
) {
    let own = own(GATES, hidden, plan);
    let column = forward_column(own, GATES, hidden);

    let mut state = SharedMemory::<f32>::new(comptime!(plan.rows * output));
    let mut exchange = SharedMemory::<f32>::new(comptime!(plan.rows * 4 * plan.units));
    let mut cached = SharedMemory::<f32>::new(comptime!((plan.shared * 4 * plan.units).max(1)));
    let mut held = Array::<f32>::new(comptime!(plan.registers.max(1)));
    let mut sums = Array::<f32>::new(comptime!(plan.rows_of_a_thread()));
    hold(weight, column, &mut held, &mut cached, plan);
    fetch(h, first_step * runs * output, output, output, runs, &mut state, 0usize, output, precision, plan);
    sync_cube();

    for t in first_step..last_step {
        #[unroll]
        for r in 0..comptime!(plan.rows_of_a_thread()) {
            let run = own.first_run + r;
            let is_there = own.is_unit && run < runs;
            let from = select(is_there, (t * runs + run) * comptime!(4 * hidden) + column.at, 0);
            sums[r] = pre[from];
        }
        multiply(
            &state,
            own.first_row * output,
            output,
            weight,
            column,
            &held,
            &cached,
            &mut sums,
            output,
            plan,
        );
        share(&sums, own, &mut exchange, GATES, plan);
        #[unroll]
        for part in 0..comptime!(plan.parts(GATES)) {
            let item = item(part, runs, GATES, hidden, plan);
            if item.is_there {
                let Item { r, run, unit, sum, .. } = item;
                let place = t * runs + run;
                let before_at = place * hidden + unit;
                let after = (place + runs) * hidden + unit;
                let c_previous = c[before_at];
                let sum_i = exchange[sum];
                let sum_f = exchange[sum + plan.units];
                let sum_o = exchange[sum + comptime!(3 * plan.units)];
                let g = tanh(exchange[sum + comptime!(2 * plan.units)]);
                let i = RuntimeCell::<f32>::new(sum_i);
                let f = RuntimeCell::<f32>::new(sum_f);
                if comptime!(options.peepholes) {
                    i.store(fma(peepholes[unit], c_previous, sum_i));
                    f.store(fma(peepholes[hidden + unit], c_previous, sum_f));
                }
                let i = gate(i.read(), options.hard);
                let f = gate(f.read(), options.hard);
                let c_new = RuntimeCell::<f32>::new(fma(f, c_previous, i * g));
                if comptime!(options.clips) {
                    let upper = select(c_new.read() > clip, clip, c_new.read());
                    c_new.store(select(upper < -clip, -clip, upper));
                }
                let o = RuntimeCell::<f32>::new(sum_o);
                if comptime!(options.peepholes) {
                    o.store(fma(peepholes[comptime!(2 * hidden) + unit], c_new.read(), sum_o));
                }
                let o = gate(o.read(), options.hard);
                let put_out = o * tanh(c_new.read());
                // After its end a run keeps its last state.
                let runs_on = t < lengths[run] as usize;
                c[after] = select(runs_on, c_new.read(), c_previous);
                let gates_at = place * comptime!(4 * hidden) + unit;
                gates[gates_at] = i;
                gates[gates_at + hidden] = f;
                gates[gates_at + comptime!(2 * hidden)] = g;
                gates[gates_at + comptime!(3 * hidden)] = o;
                if comptime!(options.projects) {
                    m[before_at] = put_out;
                } else {
                    let h_before = before(&state, r * output + unit, h, before_at, precision);
                    let kept = select(runs_on, put_out, h_before);
                    h[after] = kept;
                    if comptime!(plan.whole) {
                        state[r * output + unit] = rounded(kept, precision);
                    }
                }
            }
        }
        sync_cube();
    }
}

/// Through all steps, from the input's part of the gates and the start of every run.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `pre` | `[T][Nr][4·H]` | in | with all biases |
/// | `weight_hh_t` | `[R][4·H]` | in | |
/// | `h` | `[T + 1][Nr][R]` | in and out | the start of every run first; repeats after a run's end |
/// | `sequence.c` | `[T + 1][Nr][H]` | in and out | the same |
/// | `sequence.gates` | | out | i, f, g, o |
pub fn lstm_forward<R: Runtime>(
    client: &ComputeClient<R>,
    sequence: LstmSequence<'_>,
    pre: &Buffer,
    weight_hh_t: &Buffer,
    projection: Option<Projection<'_>>,
    h: &Buffer,
) {
    let LstmSequence { extent, hidden, output, options, precision, plan, lengths, peepholes, gates, c } =
        sequence;
    for steps in plan.launches(extent.steps) {
        let m = projection.map_or(gates, |projection| projection.m);
        // SAFETY: every thread reads and writes the places of runs and units that are there, in the first `extent` of all.
        unsafe {
            forward_kernel::launch_unchecked::<R>(
                client,
                plan.cubes(extent.runs, hidden),
                plan.threads(GATES),
                pre.arg(),
                weight_hh_t.arg(),
                lengths.arg(),
                peepholes.unwrap_or(pre).arg(),
                h.arg(),
                c.arg(),
                gates.arg(),
                m.arg(),
                extent.runs,
                steps.start,
                steps.end,
                options.cell_clip.unwrap_or(0.0),
                hidden,
                output,
                Options::of(options),
                precision,
                plan,
            );
        }
        if let Some(Projection { weight_hr, m }) = projection {
            let t = steps.start;
            let shape = Shape { m: extent.runs, n: output, k: hidden };
            let m = Matrix { buffer: m, at: t * extent.runs * hidden, stride: hidden };
            let weight = Right::Transposed(Matrix::dense(weight_hr, hidden));
            let projected = Buffer::new(client, extent.runs * output);
            product(client, precision, shape, m, weight, Start::Zero, &projected, output);
            go_on_or_keep(client, extent, output, t, lengths, &projected, h);
        }
    }
}

#[cube(launch_unchecked)]
fn keep_kernel(
    lengths: &Array<u32>,
    new: &Array<f32>,
    h: &mut Array<f32>,
    runs: usize,
    width: usize,
    t: usize,
) {
    if ABSOLUTE_POS < runs * width {
        let runs_on = t < lengths[ABSOLUTE_POS / width] as usize;
        let before = t * runs * width + ABSOLUTE_POS;
        h[before + runs * width] = select(runs_on, new[ABSOLUTE_POS], h[before]);
    }
}

/// Writes h after step t: what is new, or after a run's end its last.
fn go_on_or_keep<R: Runtime>(
    client: &ComputeClient<R>,
    extent: Extent,
    width: usize,
    t: usize,
    lengths: &Buffer,
    new: &Buffer,
    h: &Buffer,
) {
    // SAFETY: one element for each unit.
    unsafe {
        keep_kernel::launch_unchecked::<R>(
            client,
            super::buffer::cubes(extent.runs * width),
            CubeDim::new_1d(super::buffer::UNITS),
            lengths.arg(),
            new.arg(),
            h.arg(),
            extent.runs,
            width,
            t,
        );
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn backward_kernel(
    d_out: &Array<f32>,
    weight: &Array<f32>,
    lengths: &Array<u32>,
    peepholes: &Array<f32>,
    c: &Array<f32>,
    gates: &mut Array<f32>,
    d_start_h: &mut Array<f32>,
    d_start_c: &mut Array<f32>,
    runs: usize,
    steps: usize,
    first_step: usize,
    last_step: usize,
    clip: f32,
    #[comptime] hidden: usize,
    #[comptime] options: Options,
    #[comptime] precision: Precision,
    #[comptime] plan: Plan,
) {
    let own = own(GATES, hidden, plan);
    let column = backward_column(own, hidden);

    // Of the step after: the gradients of all gates.
    let mut tile = SharedMemory::<f32>::new(comptime!(plan.rows * 4 * hidden));
    let mut exchange = SharedMemory::<f32>::new(comptime!(plan.rows * 4 * plan.units));
    let mut cached = SharedMemory::<f32>::new(comptime!((plan.shared * 4 * plan.units).max(1)));
    let mut held = Array::<f32>::new(comptime!(plan.registers.max(1)));
    let mut sums = Array::<f32>::new(comptime!(plan.rows_of_a_thread()));
    if comptime!(!options.projects) {
        hold(weight, column, &mut held, &mut cached, plan);
        // Beyond the last step there is nothing: zeros, from wherever they are read.
        let width = select(last_step < steps, comptime!(4 * hidden), 0);
        clear(&mut tile, comptime!(4 * hidden), plan);
        fetch(
            gates,
            last_step * runs * comptime!(4 * hidden),
            comptime!(4 * hidden),
            width,
            runs,
            &mut tile,
            0usize,
            comptime!(4 * hidden),
            precision,
            plan,
        );
        sync_cube();
    }

    // To the start it is one round more; where a launch does one step, that is a launch without any.
    let to_start = if comptime!(plan.whole) { first_step == 0 } else { last_step == 0 };
    let rounds = last_step - first_step + select(to_start, 1, 0);
    for round in 0..rounds {
        if comptime!(!options.projects) {
            let at = own.first_row * comptime!(4 * hidden) + own.gate * hidden;
            multiply_from_zero(
                &tile,
                at,
                comptime!(4 * hidden),
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
        #[unroll]
        for part in 0..comptime!(plan.parts(GATES)) {
            let item = item(part, runs, GATES, hidden, plan);
            if item.is_there {
                let Item { r, run, unit, sum, .. } = item;
                let carried = RuntimeCell::<f32>::new(0.0);
                if comptime!(!options.projects) {
                    let (s0, s1) = (exchange[sum], exchange[sum + plan.units]);
                    let s2 = exchange[sum + comptime!(2 * plan.units)];
                    let s3 = exchange[sum + comptime!(3 * plan.units)];
                    carried.store(((s0 + s1) + s2) + s3);
                }
                let start_at = run * hidden + unit;
                if first_step + round == last_step {
                    if comptime!(!options.projects) {
                        d_start_h[start_at] = carried.read();
                    }
                } else {
                    let t = last_step - 1 - round;
                    let place = t * runs + run;
                    let runs_on = t < lengths[run] as usize;
                    let gates_at = place * comptime!(4 * hidden) + unit;
                    let i = gates[gates_at];
                    let f = gates[gates_at + hidden];
                    let g = gates[gates_at + comptime!(2 * hidden)];
                    let o = gates[gates_at + comptime!(3 * hidden)];
                    let c_previous = c[place * hidden + unit];
                    let tanh_c = tanh(c[(place + runs) * hidden + unit]);
                    // Beyond a run's end nothing comes back.
                    let is_last = t + 1 >= lengths[run] as usize;
                    let carried_c = select(is_last, 0.0, d_start_c[start_at]);
                    let d_m = d_out[place * hidden + unit] + carried.read();
                    let d_o = d_m * tanh_c * gate_slope(o, options.hard);
                    let d_c = RuntimeCell::<f32>::new(fma(d_m * o, fma(-tanh_c, tanh_c, 1.0), carried_c));
                    if comptime!(options.peepholes) {
                        d_c.store(fma(peepholes[comptime!(2 * hidden) + unit], d_o, d_c.read()));
                    }
                    if comptime!(options.clips) {
                        let unclipped = fma(f, c_previous, i * g);
                        let is_clipped = unclipped > clip || unclipped < -clip;
                        d_c.store(select(is_clipped, 0.0, d_c.read()));
                    }
                    let d_c = d_c.read();
                    let d_i = d_c * g * gate_slope(i, options.hard);
                    let d_f = d_c * c_previous * gate_slope(f, options.hard);
                    let d_g = d_c * i * fma(-g, g, 1.0);
                    let d_c_previous = RuntimeCell::<f32>::new(d_c * f);
                    if comptime!(options.peepholes) {
                        let of_i = fma(peepholes[unit], d_i, d_c_previous.read());
                        d_c_previous.store(fma(peepholes[hidden + unit], d_f, of_i));
                    }
                    d_start_c[start_at] = select(runs_on, d_c_previous.read(), 0.0);
                    let d_i = select(runs_on, d_i, 0.0);
                    let d_f = select(runs_on, d_f, 0.0);
                    let d_g = select(runs_on, d_g, 0.0);
                    let d_o = select(runs_on, d_o, 0.0);
                    gates[gates_at] = d_i;
                    gates[gates_at + hidden] = d_f;
                    gates[gates_at + comptime!(2 * hidden)] = d_g;
                    gates[gates_at + comptime!(3 * hidden)] = d_o;
                    if comptime!(plan.whole) {
                        let tile_at = r * comptime!(4 * hidden) + unit;
                        tile[tile_at] = rounded(d_i, precision);
                        tile[tile_at + hidden] = rounded(d_f, precision);
                        tile[tile_at + comptime!(2 * hidden)] = rounded(d_g, precision);
                        tile[tile_at + comptime!(3 * hidden)] = rounded(d_o, precision);
                    }
                }
            }
        }
        sync_cube();
    }
}

/// Where a projected LSTM's backward pass finds its weights, and where it leaves the gradient of h.
#[derive(Debug, Clone, Copy)]
pub struct ProjectionBackward<'a> {
    /// `[R][H]`
    pub weight_hr: &'a Buffer,
    /// Gradient of h after each step, `[T][Nr][R]`.
    pub d_projected: &'a Buffer,
}

/// Back through all steps.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `d_out` | `[T][Nr][R]` | in | gradient of h after each step, from above |
/// | `weight_hh` | `[4·H][R]` | in | |
/// | `sequence.gates` | | in and out | the gradients of their sums take their place; zeros after a run's end |
/// | `d_start_h`, `d_start_c` | `[Nr][R]`, `[Nr][H]` | out | gradient of the start of every run |
pub fn lstm_backward<R: Runtime>(
    client: &ComputeClient<R>,
    sequence: LstmSequence<'_>,
    d_out: &Buffer,
    weight_hh: &Buffer,
    projection: Option<ProjectionBackward<'_>>,
    d_start_h: &Buffer,
    d_start_c: &Buffer,
) {
    let LstmSequence { extent, hidden, options, precision, plan, lengths, peepholes, gates, c, .. } =
        sequence;
    let launch = |d_out: &Buffer, steps: std::ops::Range<usize>| {
        // SAFETY: as in the forward pass.
        unsafe {
            backward_kernel::launch_unchecked::<R>(
                client,
                plan.cubes(extent.runs, hidden),
                plan.threads(GATES),
                d_out.arg(),
                weight_hh.arg(),
                lengths.arg(),
                peepholes.unwrap_or(weight_hh).arg(),
                c.arg(),
                gates.arg(),
                d_start_h.arg(),
                d_start_c.arg(),
                extent.runs,
                extent.steps,
                steps.start,
                steps.end,
                options.cell_clip.unwrap_or(0.0),
                hidden,
                Options::of(options),
                precision,
                plan,
            );
        }
    };
    let Some(projection) = projection else {
        plan.launches_back(extent.steps).for_each(|steps| launch(d_out, steps));
        return;
    };
    projected_backward(client, sequence, d_out, weight_hh, projection, d_start_h, &launch);
}

/// Step by step: the gradient of h, of what was projected to it, of the gates.
fn projected_backward<R: Runtime>(
    client: &ComputeClient<R>,
    sequence: LstmSequence<'_>,
    d_out: &Buffer,
    weight_hh: &Buffer,
    ProjectionBackward { weight_hr, d_projected }: ProjectionBackward<'_>,
    d_start_h: &Buffer,
    launch: &dyn Fn(&Buffer, std::ops::Range<usize>),
) {
    let LstmSequence { extent: Extent { steps, runs }, hidden, output, precision, lengths, gates, .. } =
        sequence;
    let d_m = Buffer::new(client, steps * runs * hidden);
    for t in (0..steps).rev() {
        let carried = |into: &Buffer, t: usize| {
            let d = Matrix { buffer: gates, at: t * runs * 4 * hidden, stride: 4 * hidden };
            let weight = Right::Plain(Matrix::dense(weight_hh, output));
            product(
                client,
                precision,
                Shape { m: runs, n: output, k: 4 * hidden },
                d,
                weight,
                Start::Zero,
                into,
                output,
            );
        };
        let from_after = Buffer::new(client, runs * output);
        let has_after = t + 1 < steps;
        if has_after {
            carried(&from_after, t + 1);
        }
        // SAFETY: one element for each unit.
        unsafe {
            join_kernel::launch_unchecked::<R>(
                client,
                super::buffer::cubes(runs * output),
                CubeDim::new_1d(super::buffer::UNITS),
                lengths.arg(),
                d_out.arg(),
                from_after.arg(),
                d_projected.arg(),
                runs,
                output,
                t,
                has_after,
            );
        }
        let d = Matrix { buffer: d_projected, at: t * runs * output, stride: output };
        let weight = Right::Plain(Matrix::dense(weight_hr, hidden));
        let of_step = Buffer::new(client, runs * hidden);
        let shape = Shape { m: runs, n: hidden, k: output };
        product(client, precision, shape, d, weight, Start::Zero, &of_step, hidden);
        super::elements::copy(client, &of_step, 0..runs * hidden, &d_m, t * runs * hidden);
        launch(&d_m, t..t + 1);
        if t == 0 {
            carried(d_start_h, 0);
        }
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn join_kernel(
    lengths: &Array<u32>,
    d_out: &Array<f32>,
    from_after: &Array<f32>,
    d_h: &mut Array<f32>,
    runs: usize,
    width: usize,
    t: usize,
    #[comptime] has_after: bool,
) {
    if ABSOLUTE_POS < runs * width {
        let runs_on = t < lengths[ABSOLUTE_POS / width] as usize;
        let at = t * runs * width + ABSOLUTE_POS;
        let d = RuntimeCell::<f32>::new(d_out[at]);
        if comptime!(has_after) {
            d.store(d.read() + from_after[ABSOLUTE_POS]);
        }
        d_h[at] = select(runs_on, d.read(), 0.0);
    }
}
