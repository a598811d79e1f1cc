//! One case of the parity cube: a cell, a shape and a layout, its numbers, its run on a device and by the oracle.

use super::super::buffer::{Buffer, synchronize};
use super::super::gru::{GruSequence, gru_backward, gru_forward};
use super::super::lstm::{LstmSequence, Projection, ProjectionBackward, lstm_backward, lstm_forward};
use super::super::rnn::{RnnSequence, rnn_backward, rnn_forward};
use super::super::rows::Extent;
use super::super::sequence::{Limits, Needs, Plan};
use crate::cpu::sequence::tests::{numbers, widen};
use crate::oracle;
use crate::oracle::algebra::{hadamard, parts};
use crate::oracle::cell::State;
use crate::oracle::parameters::{Peepholes, Recurrent};
use cubecl::prelude::{ComputeClient, Runtime};
use half::bf16;
use protocol::cell::{Activation, Cell, CellOptions, RecurrentActivation, Reset};
use protocol::job::Precision;
use std::collections::BTreeMap;

/// Where the weights are, and whether the units are split over cubes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Global,
    Registers,
    Shared,
    /// Some in each.
    Mixed,
    /// Step by step.
    Split,
}

impl Place {
    pub(super) const ALL: [Self; 5] = [Self::Global, Self::Registers, Self::Shared, Self::Mixed, Self::Split];

    /// k's in registers and in shared memory. Few in registers: lavapipe takes seconds to compile a long unrolled loop.
    fn of(self, depth: usize) -> (usize, usize) {
        match self {
            Self::Global | Self::Split => (0, 0),
            Self::Registers => (depth.min(8), 0),
            Self::Shared => (0, depth),
            Self::Mixed => ((depth / 3).min(4), (depth / 3).min(16)),
        }
    }
}

/// How near to the clip a state is not told from one at it.
const CORNER: f64 = 2e-6;

/// A cell with its options.
pub(super) type Kind = (Cell, CellOptions);

#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) cell: Cell,
    pub(super) options: CellOptions,
    pub(super) precision: Precision,
    pub(super) hidden: usize,
    pub(super) rows: usize,
    pub(super) steps: usize,
    pub(super) plan: Plan,
}

/// Numbers of one row: start, inputs, gradients from above.
pub(super) struct Row {
    pub(super) length: usize,
    pub(super) x: Vec<f32>,
    pub(super) h0: Vec<f32>,
    pub(super) c0: Vec<f32>,
    pub(super) d_out: Vec<f32>,
}

pub(super) struct Data {
    pub(super) weights: Recurrent<Vec<f32>>,
    pub(super) rows: Vec<Row>,
}

/// The tensors of one row, up to its length.
pub(super) type RowResult = BTreeMap<&'static str, Vec<f64>>;

impl Data {
    /// `draw` tells data of one case apart.
    pub(super) fn new(case: &Case, draw: u64) -> Self {
        let (hidden, output, gates) = (case.hidden, case.output(), case.cell.gates());
        let scale = |len: usize| 1.0 / (len as f32).sqrt();
        let options = case.options;
        let weights = Recurrent {
            weight_hh: numbers(gates * hidden * output, scale(output), 1),
            bias_hh: numbers(gates * hidden, 0.5, 2),
            weight_hr: options.projection.map(|output| numbers(output * hidden, scale(hidden), 3)),
            // Through peepholes of up to 1 a cell without a clip excites itself, and no f32 follows the oracle: there are
            // 150 rows of 28 steps of which the CPU's d_gates are 8e-6 off and the device's 1.3e-5. With a half both are
            // below 5e-7.
            peepholes: options.peepholes.then(|| Peepholes {
                i: numbers(hidden, 0.5, 4),
                f: numbers(hidden, 0.5, 5),
                o: numbers(hidden, 0.5, 6),
            }),
        };
        // Hard gates are cut off beyond 2.5.
        let hard = options.recurrent_activation == RecurrentActivation::HardSigmoid;
        let reach = if hard && case.cell != Cell::Rnn { 3.0 } else { 1.0 };
        let rows = (0..case.rows as u64)
            .map(|row| {
                let salt = 100 + 10 * row + 100_000 * draw;
                let length = if row == 0 { case.steps } else { 1 + (7 * row as usize + 3) % case.steps };
                Row {
                    length,
                    x: numbers(length * gates * hidden, reach, salt),
                    h0: numbers(output, 1.0, salt + 1),
                    c0: numbers(hidden, 1.0, salt + 2),
                    d_out: numbers(length * output, 1.0, salt + 3),
                }
            })
            .collect();
        Self { weights, rows }
    }
}

impl Case {
    pub(super) fn new(
        (cell, options): Kind,
        hidden: usize,
        rows: usize,
        steps: usize,
        place: Place,
        (tile_rows, units): (usize, usize),
    ) -> Self {
        let whole = place != Place::Split;
        let (registers, shared) = place.of(hidden);
        let units = if whole { hidden } else { units.min(hidden) };
        let groups = if !whole && tile_rows.is_multiple_of(2) { 2 } else { 1 };
        let plan = Plan { rows: tile_rows, units, groups, whole, registers, shared };
        Self { cell, options, precision: Precision::F32, hidden, rows, steps, plan }
    }

    pub(super) fn output(&self) -> usize {
        self.options.projection.unwrap_or(self.hidden)
    }

    /// Whether a cube has room for the plan.
    pub(super) fn fits(&self, limits: Limits) -> bool {
        let needs = Needs::of(self.cell, self.options.reset, self.hidden, self.output());
        let Plan { rows, units, groups, whole, shared, .. } = self.plan;
        let threads = self.cell.gates() * units * groups;
        (needs.can_be_whole || !whole)
            && threads <= limits.threads
            && rows * needs.tile(units) + shared * threads <= limits.shared
    }

    /// Multiplications, roughly.
    pub(super) fn work(&self) -> usize {
        self.rows * self.steps * self.cell.gates() * self.hidden * self.output()
    }

    fn oracle_cell(&self) -> oracle::cell::Cell {
        oracle::cell::Cell::of(self.cell, &self.options)
    }

    /// One row by the oracle.
    pub(super) fn by_oracle(&self, data: &Data, row: usize) -> RowResult {
        let Row { length, x, h0, c0, d_out } = &data.rows[row];
        let (cell, hidden, output) = (self.oracle_cell(), self.hidden, self.output());
        let weights = data.weights.map(|values| widen(values));
        let weights = weights.map(|values| values.clone());
        let weights = Recurrent {
            weight_hh: &weights.weight_hh[..],
            bias_hh: &weights.bias_hh[..],
            weight_hr: weights.weight_hr.as_deref(),
            peepholes: weights.peepholes.as_ref().map(|p| Peepholes {
                i: &p.i[..],
                f: &p.f[..],
                o: &p.o[..],
            }),
        };
        let c0 = if self.cell == Cell::Lstm { widen(c0) } else { Vec::new() };
        let trace = cell.forward(&widen(x), &weights, &State { h: widen(h0), c: c0.clone() });
        let d_end = State { h: vec![0.0; output], c: vec![0.0; c0.len()] };
        let gradient = cell.backward(&trace, &weights, &widen(d_out), &d_end);
        let mut result = RowResult::from([("h", trace.h.clone()), ("d_start_h", gradient.d_start.h)]);
        match self.cell {
            Cell::Rnn => {
                result.insert("d_gates", gradient.d_x);
            }
            Cell::Lstm => {
                if let Some(weight_hr) = gradient.recurrent.weight_hr {
                    let m = (0..*length).flat_map(|t| {
                        let [_, _, _, o] = parts(&trace.gates[4 * t * hidden..4 * (t + 1) * hidden]);
                        let c = &trace.c[(t + 1) * hidden..];
                        (0..hidden).map(|j| o[j] * c[j].tanh()).collect::<Vec<f64>>()
                    });
                    result.insert("m", m.collect());
                    result.insert("d_weight_hr", weight_hr);
                }
                result.insert("gates", trace.gates);
                result.insert("c", trace.c);
                result.insert("d_gates", gradient.d_x);
                result.insert("d_start_c", gradient.d_start.c);
            }
            Cell::Gru => {
                let (mut gates, mut d_gates) = (trace.gates, Vec::new());
                for t in 0..*length {
                    let gates = &mut gates[4 * t * hidden..4 * (t + 1) * hidden];
                    let part = 3 * t * hidden;
                    d_gates.extend(&gradient.d_x[part..part + 3 * hidden]);
                    if self.options.reset == Reset::Before {
                        let [r, _, _, _] = parts(gates);
                        let reset = hadamard(r, &trace.h[t * hidden..(t + 1) * hidden]);
                        gates[3 * hidden..].copy_from_slice(&reset);
                        d_gates.extend(reset);
                    } else {
                        d_gates.extend(&gradient.d_y[part + 2 * hidden..part + 3 * hidden]);
                    }
                }
                result.insert("gates", gates);
                result.insert("d_gates", d_gates);
            }
        }
        result
    }

    /// Whether an operand of a product was rounded up on the device and down in the reference.
    pub(super) fn is_rounded_otherwise(&self, got: &RowResult, want: &RowResult) -> bool {
        let is_operand = |name: &str| name == "h" || name == "m" || name.starts_with("d_gates");
        // What a GRU's reset gate has made stands behind its gates.
        let is_made =
            |name: &str, at: usize| name == "gates" && self.cell == Cell::Gru && at / self.hidden % 4 == 3;
        self.precision == Precision::Bf16
            && got.iter().any(|(name, got)| {
                got.iter().zip(&want[name]).enumerate().any(|(at, (got, want))| {
                    let [got, want] = [got, want].map(|x| bf16::from_f64(*x));
                    (is_operand(name) || is_made(name, at)) && got != want
                })
            })
    }

    /// Whether a value fell to one side of a corner on the device and to the other in the reference: slopes differ then.
    pub(super) fn is_at_another_side(&self, got: &RowResult, want: &RowResult) -> bool {
        let differ = |name: &str, side: &dyn Fn(usize, f64) -> u8| {
            got.get(name).is_some_and(|got| {
                got.iter().zip(&want[name]).enumerate().any(|(at, (a, b))| side(at, *a) != side(at, *b))
            })
        };
        let hidden = self.hidden;
        let relu = self.cell == Cell::Rnn && self.options.activation == Activation::Relu;
        let hard =
            self.cell != Cell::Rnn && self.options.recurrent_activation == RecurrentActivation::HardSigmoid;
        // Parts of the gates that are no gates: the LSTM's g, the GRU's n and what stands behind it.
        let is_gate = |at: usize| match (self.cell, at / hidden % 4) {
            (Cell::Lstm, part) => part != 2,
            (_, part) => part < 2,
        };
        let clip = if self.cell == Cell::Lstm { self.options.cell_clip } else { None };
        (relu && differ("h", &|_, y| u8::from(y > 0.0)))
            || (hard
                && differ("gates", &|at, y| {
                    if is_gate(at) { u8::from(y > 0.0) + u8::from(y >= 1.0) } else { 0 }
                }))
            || clip.is_some_and(|limit| {
                // A state at the limit does not tell whether it was cut off. Exactly there is no corner: a state cut off
                // before and kept by saturated gates, 1 and 0 to the bit, is there on both sides.
                let near = |c: f64| {
                    let distance = (c.abs() - f64::from(limit)).abs();
                    distance > 0.0 && distance < CORNER
                };
                differ("c", &|_, c| u8::from(c.abs() >= f64::from(limit)))
                    || unclipped(want, hidden).into_iter().any(near)
            })
    }

    /// Forward and backward over some rows in one launch each.
    pub(super) fn run<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        data: &Data,
        rows: &[usize],
    ) -> Vec<RowResult> {
        let (hidden, output, gates) = (self.hidden, self.output(), self.cell.gates() * self.hidden);
        let rows: Vec<&Row> = rows.iter().map(|row| &data.rows[*row]).collect();
        let steps = rows.iter().map(|row| row.length).max().unwrap();
        let extent = Extent { steps, runs: rows.len() };
        let floats = |values: &[f32]| Buffer::from_floats(client, values);
        let unwritten = |len: usize| floats(&vec![f32::NAN; len]);
        // [steps][rows][width] of rows' own [length][width]; numbers beyond that must not be seen.
        let by_steps = |width: usize, of: &dyn Fn(&Row) -> &[f32]| {
            let mut all = vec![7.0; steps * rows.len() * width];
            for (at, row) in rows.iter().enumerate() {
                for (t, values) in of(row).chunks(width).enumerate() {
                    all[(t * rows.len() + at) * width..][..width].copy_from_slice(values);
                }
            }
            all
        };
        let states = |width: usize, of: &dyn Fn(&Row) -> &[f32]| {
            let mut all = vec![f32::NAN; (steps + 1) * rows.len() * width];
            for (at, row) in rows.iter().enumerate() {
                all[at * width..][..width].copy_from_slice(of(row));
            }
            floats(&all)
        };
        let weights = &data.weights;
        let lengths: Vec<u32> = rows.iter().map(|row| row.length as u32).collect();
        let lengths = &Buffer::from_words(client, &lengths);
        let rounded: Vec<f32> = match self.precision {
            Precision::Bf16 => weights.weight_hh.iter().map(|x| bf16::from_f32(*x).into()).collect(),
            _ => weights.weight_hh.clone(),
        };
        let weight_hh = &floats(&rounded);
        let weight_hh_t = &floats(&transposed(&rounded, output));
        let mut pre = by_steps(gates, &|row| &row.x);
        let in_reset = self.cell == Cell::Gru && self.options.reset == Reset::After;
        for row in pre.chunks_mut(gates) {
            let until = if in_reset { 2 * hidden } else { gates };
            row.iter_mut().zip(&weights.bias_hh).take(until).for_each(|(x, bias)| *x += bias);
        }
        let pre = &floats(&pre);
        let (h, c) = (&states(output, &|row| &row.h0), &states(hidden, &|row| &row.c0));
        let d_out = &floats(&by_steps(output, &|row| &row.d_out));
        let d_start_h = &unwritten(rows.len() * output);
        let mut outputs: Vec<(&'static str, usize, Vec<f32>)> = Vec::new();
        let mut keep = |name, width, buffer: &Buffer| {
            outputs.push((name, width, buffer.read_floats(client, 0..buffer.len()).unwrap()));
        };
        let all_steps = |width: usize| unwritten(steps * rows.len() * width);
        let (precision, plan) = (self.precision, self.plan);
        match self.cell {
            Cell::Rnn => {
                let activation = self.options.activation;
                let sequence = RnnSequence { extent, hidden, activation, precision, plan, lengths, h };
                let d_pre = &all_steps(hidden);
                rnn_forward(client, sequence, pre, weight_hh_t);
                rnn_backward(client, sequence, d_out, weight_hh, d_pre, d_start_h);
                keep("d_gates", hidden, d_pre);
            }
            Cell::Lstm => {
                let peepholes =
                    weights.peepholes.as_ref().map(|p| floats(&[&p.i[..], &p.f[..], &p.o[..]].concat()));
                let weight_hr = weights.weight_hr.as_ref().map(|weight| floats(weight));
                let (gates, m, d_projected) =
                    (&all_steps(4 * hidden), &all_steps(hidden), &all_steps(output));
                let sequence = LstmSequence {
                    extent,
                    hidden,
                    output,
                    options: &self.options,
                    precision,
                    plan,
                    lengths,
                    peepholes: peepholes.as_ref(),
                    gates,
                    c,
                };
                let projection = weight_hr.as_ref().map(|weight_hr| Projection { weight_hr, m });
                lstm_forward(client, sequence, pre, weight_hh_t, projection, h);
                keep("gates", 4 * hidden, gates);
                let projection =
                    weight_hr.as_ref().map(|weight_hr| ProjectionBackward { weight_hr, d_projected });
                let d_start_c = &unwritten(rows.len() * hidden);
                lstm_backward(client, sequence, d_out, weight_hh, projection, d_start_h, d_start_c);
                keep("c", hidden, c);
                keep("d_gates", 4 * hidden, gates);
                keep("d_start_c", hidden, d_start_c);
                if weight_hr.is_some() {
                    keep("m", hidden, m);
                    keep("d_projected", output, d_projected);
                }
            }
            Cell::Gru => {
                let CellOptions { recurrent_activation, reset, .. } = self.options;
                let bias_hn = in_reset.then(|| floats(&weights.bias_hh[2 * hidden..]));
                let gates = &all_steps(4 * hidden);
                let sequence = GruSequence {
                    extent,
                    hidden,
                    reset,
                    recurrent_activation,
                    precision,
                    plan,
                    lengths,
                    gates,
                    h,
                };
                gru_forward(client, sequence, pre, weight_hh_t, bias_hn.as_ref());
                keep("gates", 4 * hidden, gates);
                gru_backward(client, sequence, d_out, weight_hh, d_start_h);
                keep("d_gates", 4 * hidden, gates);
            }
        }
        keep("h", output, h);
        keep("d_start_h", output, d_start_h);
        synchronize(client).unwrap();
        let mut results: Vec<RowResult> =
            rows.iter().enumerate().map(|(at, row)| one_row(&outputs, rows.len(), at, row.length)).collect();
        results.iter_mut().for_each(|result| self.sum_projections(result));
        results
    }

    /// Puts the gradient of `weight_hr` in the place of those of what was projected.
    pub(super) fn sum_projections(&self, result: &mut RowResult) {
        if let (Some(d_projected), Some(m)) = (result.remove("d_projected"), result.get("m")) {
            let mut sum = vec![0.0; self.output() * self.hidden];
            for (d, m) in d_projected.chunks(self.output()).zip(m.chunks(self.hidden)) {
                oracle::algebra::add_outer_product(d, m, &mut sum);
            }
            result.insert("d_weight_hr", sum);
        }
    }
}

/// Row `at`'s part of the outputs. What lies beyond its length must be as promised.
fn one_row(outputs: &[(&'static str, usize, Vec<f32>)], rows: usize, at: usize, length: usize) -> RowResult {
    let mut result = RowResult::new();
    for (name, width, all) in outputs {
        let vectors: Vec<&[f32]> =
            all.chunks(rows * width).map(|step| &step[at * width..][..*width]).collect();
        let is_state = *name == "h" || *name == "c";
        let until = if name.starts_with("d_start") { 1 } else { length + usize::from(is_state) };
        let (own, beyond) = vectors.split_at(until);
        let expected = if is_state { own[length].to_vec() } else { vec![0.0; *width] };
        // What the forward pass leaves beyond the end of gates and m is not promised.
        let is_promised = is_state || name.starts_with("d_");
        assert!(
            !is_promised || beyond.iter().all(|vector| *vector == expected),
            "{name} beyond the length {length}"
        );
        result.insert(name, own.iter().flat_map(|vector| widen(vector)).collect());
    }
    result
}

/// An LSTM's cell states before the clip.
fn unclipped(result: &RowResult, hidden: usize) -> Vec<f64> {
    let states = result["gates"].chunks(4 * hidden).zip(result["c"].chunks(hidden));
    let of_step = |(gates, c): (&[f64], &[f64])| -> Vec<f64> {
        let [i, f, g, _] = parts(gates);
        (0..hidden).map(|j| f[j] * c[j] + i[j] * g[j]).collect()
    };
    states.flat_map(of_step).collect()
}

fn transposed(matrix: &[f32], columns: usize) -> Vec<f32> {
    let rows = matrix.len() / columns;
    (0..columns).flat_map(|column| (0..rows).map(move |row| matrix[row * columns + column])).collect()
}
