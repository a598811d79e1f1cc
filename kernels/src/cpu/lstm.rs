//! The LSTM over a block of rows, gates in PyTorch's order i, f, g, o.
//!
//! `c_t = clip(f·c_{t-1} + i·g)`, `m_t = o·tanh(c_t)`, `h_t = W_hr m_t`, with `i = σ(pre_i + p_i·c_{t-1})`,
//! `f = σ(pre_f + p_f·c_{t-1})`, `g = tanh(pre_g)`, `o = σ(pre_o + p_o·c_t)`, where
//! `pre_t = (W_ih x_t + b_ih + b_hh) + W_hh h_{t-1}` and the part in brackets is computed for all steps before, a forget
//! bias included. Plain: no clip, no peepholes p, and h = m without a projection W_hr.

mod units;

use super::gemm::{Start, gemm};
use super::pack::PackedMatrix;
use super::reduce::tree_add;
use super::sequence::{Check, InputPart, SequenceShape};
use super::simd::Simd;
use protocol::cell::RecurrentActivation;
use units::{CellsBackward, backward_units, forward_units};

/// What both directions need to know of the cell.
#[derive(Clone, Copy, Debug)]
pub struct LstmOptions<'a> {
    /// σ of the gates i, f, o.
    pub recurrent_activation: RecurrentActivation,
    /// Largest size of a cell state; the gradient of what was cut off is zero. A NaN comes through.
    pub cell_clip: Option<f32>,
    /// Diagonal weights from the cell state to the gates.
    pub peepholes: Option<Peepholes<'a>>,
}

/// Diagonal weights, `[H]` each: i and f see `c_{t-1}`, o sees `c_t`.
#[derive(Clone, Copy, Debug)]
pub struct Peepholes<'a> {
    /// To the input gate.
    pub i: &'a [f32],
    /// To the forget gate.
    pub f: &'a [f32],
    /// To the output gate.
    pub o: &'a [f32],
}

impl LstmOptions<'_> {
    fn check(&self, check: &Check, hidden: usize) {
        if let Some(Peepholes { i, f, o }) = self.peepholes {
            check.vector("the peephole of i", i, hidden);
            check.vector("the peephole of f", f, hidden);
            check.vector("the peephole of o", o, hidden);
        }
    }
}

/// Arguments of [`lstm_forward`].
#[derive(Debug)]
pub struct LstmForward<'a> {
    /// The block.
    pub shape: SequenceShape<'a>,
    /// The cell.
    pub options: LstmOptions<'a>,
    /// `[R, 4·H]` (k, n): `pack_columns` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// From m to h; without it R is H.
    pub projection: Option<LstmProjection<'a>>,
    /// Where the input's part is.
    pub input: InputPart<'a>,
    /// `[N][4·H]`, written: activated gates.
    pub gates: &'a mut [f32],
    /// `[rows + N][R]`, the starts given.
    pub h: &'a mut [f32],
    /// `[rows + N][H]`, the starts given.
    pub c: &'a mut [f32],
}

/// The projection on the way forward.
#[derive(Debug)]
pub struct LstmProjection<'a> {
    /// `[H, R]` (k, n): `pack_columns` of `weight_hr`.
    pub weight_hr: &'a PackedMatrix,
    /// `[N][H]`, written: `o·tanh(c)`, kept for the gradient of `weight_hr`.
    pub m: &'a mut [f32],
}

/// Runs the block through all steps.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[R, 4·H]` packed by columns | in | shared by all blocks |
/// | `weight_hr` | `[H, R]` packed by columns | in | shared by all blocks |
/// | `input` | see [`InputPart`] | in | `W_ih x + b_ih + b_hh`, or where it is |
/// | `gates` | `[N][4·H]` | out | i, f, g, o activated, kept for backward; in too if the input's part is there |
/// | `m` | `[N][H]` | out | |
/// | `h` | `[rows + N][R]` | starts in, rest out | the rest is the layer's output |
/// | `c` | `[rows + N][H]` | starts in, rest out | kept for backward |
///
/// Cost: N · (8·H·R FLOPs + 3 sigmoid and 2 tanh per unit), 2·H·R more for a projection. Numerics: the row rule;
/// `part + acc` per k block; c is one fused multiply-add, `fma(f, c, i·g)`, a peephole another onto its sum.
/// Reference: `oracle::lstm::lstm_forward`.
pub fn lstm_forward(simd: Simd, args: LstmForward<'_>) {
    let LstmForward { shape, options, weight_hh, mut projection, input, gates, h, c } = args;
    let SequenceShape { hidden_size: hidden, output_size: output, .. } = shape;
    let check = match &projection {
        Some(_) => shape.check("lstm_forward"),
        None => shape.check_unprojected("lstm_forward"),
    };
    if let Some(LstmProjection { weight_hr, m }) = &projection {
        check.weight("weight_hr", weight_hr, hidden, output);
        check.steps("m", m, hidden);
    }
    options.check(&check, hidden);
    input.check(&check, 4 * hidden);
    check.weight("weight_hh", weight_hh, output, 4 * hidden);
    check.steps("gates", gates, 4 * hidden);
    check.states("h", h, output);
    check.states("c", c, hidden);
    for step in shape.forward() {
        let gates = &mut gates[step.range(4 * hidden)];
        let (h_before, h_after) = step.split(h, output);
        let (c_before, c_after) = step.split(c, hidden);
        gemm(simd, step.rows, h_before, output, weight_hh, gates, 4 * hidden, input.start(step));
        match &mut projection {
            None => forward_units(simd, hidden, options, gates, c_before, c_after, h_after),
            Some(LstmProjection { weight_hr, m }) => {
                let m = &mut m[step.range(hidden)];
                forward_units(simd, hidden, options, gates, c_before, c_after, m);
                gemm(simd, step.rows, m, hidden, weight_hr, h_after, output, Start::Zero);
            }
        }
    }
}

/// Arguments of [`lstm_backward`].
#[derive(Debug)]
pub struct LstmBackward<'a> {
    /// The block.
    pub shape: SequenceShape<'a>,
    /// The cell.
    pub options: LstmOptions<'a>,
    /// `[4·H, R]` (k, n): `pack_rows` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// From h back to m, where the forward pass had one.
    pub projection: Option<LstmProjectionBackward<'a>>,
    /// `[N][4·H]`: activated gates in, as the forward pass left them; their gradients out.
    pub gates: &'a mut [f32],
    /// `[rows + N][H]`, as the forward pass left it.
    pub c: &'a [f32],
    /// `[N][R]`.
    pub d_out: &'a [f32],
    /// `[rows][R]`, the carry of h.
    pub d_h: &'a mut [f32],
    /// `[rows][H]`, the carry of c.
    pub d_c: &'a mut [f32],
}

/// The projection on the way back.
#[derive(Debug)]
pub struct LstmProjectionBackward<'a> {
    /// `[R, H]` (k, n): `pack_rows` of `weight_hr`.
    pub weight_hr: &'a PackedMatrix,
    /// `[N][R]`, written: the whole gradient of h, for the gradient of `weight_hr`.
    pub d_projected: &'a mut [f32],
    /// `[rows][H]`, scratch.
    pub d_m: &'a mut [f32],
}

/// Back through time. With `d_h += d_out_t`, `d_m = W_hrᵀ d_h`:
/// `d_o = d_m·tanh(c_t)·σ'(o)`, `d_c += d_m·o·(1 - tanh²c_t) + p_o·d_o`, 0 where c was clipped, `d_i = d_c·g·σ'(i)`,
/// `d_f = d_c·c_{t-1}·σ'(f)`, `d_g = d_c·i·(1-g²)`, then `d_c = d_c·f + p_i·d_i + p_f·d_f` and `d_h = W_hhᵀ d_gates_t`.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[4·H, R]` packed by rows | in | |
/// | `weight_hr` | `[R, H]` packed by rows | in | |
/// | `gates` | `[N][4·H]` | in and out | in: as left by [`lstm_forward`]; out: their gradients before activation: of W_ih x, W_hh h and both biases alike, and with c of the peepholes |
/// | `c` | as left by [`lstm_forward`] | in | tanh(c) is computed again: one tanh against a third stored array; so is c before the clip |
/// | `d_out` | `[N][R]` | in | from the layer above or the head, for every step |
/// | `d_projected` | `[N][R]` | out | with m: of W_hr |
/// | `d_h`, `d_c` | `[rows][R]`, `[rows][H]` | in and out | in: gradients of each row's final state beside `d_out` (zeros if none); out: of its start |
///
/// Cost: N · (8·H·R FLOPs + 1 tanh per unit), 2·H·R more for a projection. Reference: `oracle::lstm::lstm_backward`.
pub fn lstm_backward(simd: Simd, args: LstmBackward<'_>) {
    let LstmBackward { shape, options, weight_hh, mut projection, gates, c, d_out, d_h, d_c } = args;
    let SequenceShape { hidden_size: hidden, output_size: output, .. } = shape;
    let check = match &projection {
        Some(_) => shape.check("lstm_backward"),
        None => shape.check_unprojected("lstm_backward"),
    };
    if let Some(LstmProjectionBackward { weight_hr, d_projected, d_m }) = &projection {
        check.weight("weight_hr", weight_hr, output, hidden);
        check.steps("d_projected", d_projected, output);
        check.carry("d_m", d_m, hidden);
    }
    options.check(&check, hidden);
    check.weight("weight_hh", weight_hh, 4 * hidden, output);
    check.steps("gates", gates, 4 * hidden);
    check.states("c", c, hidden);
    check.steps("d_out", d_out, output);
    check.carry("d_h", d_h, output);
    check.carry("d_c", d_c, hidden);
    for step in shape.backward() {
        let d_h = &mut d_h[step.carry(output)];
        tree_add(simd, d_h, &d_out[step.range(output)]);
        let d_m = match &mut projection {
            None => &*d_h,
            Some(LstmProjectionBackward { weight_hr, d_projected, d_m }) => {
                let d_m = &mut d_m[step.carry(hidden)];
                d_projected[step.range(output)].copy_from_slice(d_h);
                gemm(simd, step.rows, d_h, output, weight_hr, d_m, hidden, Start::Zero);
                d_m
            }
        };
        let cells = CellsBackward { c_previous: &c[step.before(hidden)], c: &c[step.after(hidden)], d_m };
        let gates = &mut gates[step.range(4 * hidden)];
        backward_units(simd, hidden, options, cells, gates, &mut d_c[step.carry(hidden)]);
        gemm(simd, step.rows, gates, 4 * hidden, weight_hh, d_h, output, Start::Zero);
    }
}

#[cfg(test)]
mod tests {
    use super::super::cell_tests::*;
    use super::super::reduce::product_column_sum;
    use super::super::sequence::tests::{numbers, widen};
    use super::*;
    use crate::oracle::algebra::{affine, parts};
    use crate::oracle::cell::{State, Trace};
    use crate::oracle::lstm as oracle;
    use crate::oracle::parameters::{self, Recurrent};
    use std::collections::BTreeMap;

    #[derive(Clone, Copy, Debug)]
    struct Lstm {
        recurrent_activation: RecurrentActivation,
        cell_clip: Option<f32>,
        has_peepholes: bool,
        projection: Option<usize>,
    }

    const PLAIN: Lstm = Lstm {
        recurrent_activation: RecurrentActivation::Sigmoid,
        cell_clip: None,
        has_peepholes: false,
        projection: None,
    };

    /// All combinations, the plain cell first. The clip lies where it cuts off about a third of the cells.
    fn cells() -> Vec<Lstm> {
        let mut cells = Vec::new();
        for recurrent_activation in [RecurrentActivation::Sigmoid, RecurrentActivation::HardSigmoid] {
            for has_peepholes in [false, true] {
                for cell_clip in [None, Some(0.7)] {
                    for projection in [None, Some(1), Some(5)] {
                        cells.push(Lstm { recurrent_activation, cell_clip, has_peepholes, projection });
                    }
                }
            }
        }
        cells
    }

    impl Lstm {
        fn parameters(&self, block: &Block) -> Recurrent<Vec<f32>> {
            let (hidden, output) = (block.hidden, block.output);
            let of = |rows: usize, columns: usize, salt| {
                numbers(rows * columns, 1.5 / (columns as f32).sqrt(), salt)
            };
            Recurrent {
                weight_hh: of(4 * hidden, output, 1),
                bias_hh: vec![0.0; 4 * hidden],
                weight_hr: self.projection.map(|_| of(output, hidden, 8)),
                peepholes: self.has_peepholes.then(|| parameters::Peepholes {
                    i: of(hidden, 1, 9),
                    f: of(hidden, 1, 10),
                    o: of(hidden, 1, 11),
                }),
            }
        }

        fn options<'a>(&self, parameters: &'a Recurrent<Vec<f32>>) -> LstmOptions<'a> {
            LstmOptions {
                recurrent_activation: self.recurrent_activation,
                cell_clip: self.cell_clip,
                peepholes: parameters.peepholes.as_ref().map(|p| Peepholes { i: &p.i, f: &p.f, o: &p.o }),
            }
        }

        /// Whether a sum of a hard gate or a cell state lies near a corner.
        fn is_near_a_corner(&self, x: &[f64], weights: &Recurrent<&[f64]>, trace: &Trace) -> bool {
            let (output, hidden) = (trace.end.h.len(), trace.end.c.len());
            let is_hard = self.recurrent_activation == RecurrentActivation::HardSigmoid;
            x.chunks(4 * hidden).enumerate().any(|(t, x)| {
                let sums = affine(weights.weight_hh, x, &trace.h[t * output..(t + 1) * output]);
                let [sum_i, sum_f, _, sum_o] = parts(&sums);
                let [i, f, g, _] = parts(&trace.gates[4 * t * hidden..4 * (t + 1) * hidden]);
                let (c_previous, c) = (&trace.c[t * hidden..], &trace.c[(t + 1) * hidden..]);
                (0..hidden).any(|j| {
                    let p = weights.peepholes_of(j);
                    let gates = [
                        sum_i[j] + p.i * c_previous[j],
                        sum_f[j] + p.f * c_previous[j],
                        sum_o[j] + p.o * c[j],
                    ];
                    let unclipped = f[j] * c_previous[j] + i[j] * g[j];
                    (is_hard && gates.iter().any(|sum| is_near(sum.abs(), 2.5)))
                        || self.cell_clip.is_some_and(|limit| is_near(unclipped.abs(), f64::from(limit)))
                })
            })
        }
    }

    impl TestedCell for Lstm {
        fn projection(&self) -> Option<usize> {
            self.projection
        }

        fn inputs(&self, block: &Block) -> Vec<Tensor> {
            let (hidden, output) = (block.hidden, block.output);
            let of =
                |name, layout, width, scale, salt| Tensor::numbers(block, name, layout, width, scale, salt);
            vec![
                of("x", Layout::Steps, 4 * hidden, input_scale(self.recurrent_activation), 2),
                of("d_out", Layout::Steps, output, 1.0, 5),
                of("h0", Layout::Carry, output, 1.0, 3),
                of("c0", Layout::Carry, hidden, 2.0, 4),
                of("d_h", Layout::Carry, output, 1.0, 6),
                of("d_c", Layout::Carry, hidden, 1.0, 7),
            ]
        }

        fn run(&self, simd: Simd, block: &Block, inputs: &[Tensor]) -> Vec<Tensor> {
            let [x, d_out, h0, c0, d_h, d_c] = inputs else { panic!("inputs") };
            let (shape, hidden, output) = (block.shape(), block.hidden, block.output);
            let parameters = self.parameters(block);
            let options = self.options(&parameters);
            let (mut weight_hh, mut weight_hr) =
                (PackedMatrix::new(output, 4 * hidden), PackedMatrix::new(hidden, output));
            weight_hh.pack_columns(Simd::detect(), &parameters.weight_hh, output);
            if let Some(values) = &parameters.weight_hr {
                weight_hr.pack_columns(Simd::detect(), values, hidden);
            }
            let mut gates = x.named("gates");
            let (mut h, mut c) = (Tensor::started(block, "h", h0), Tensor::started(block, "c", c0));
            let mut m = Tensor::unset(block, "m", Layout::Steps, hidden);
            lstm_forward(
                simd,
                LstmForward {
                    shape,
                    options,
                    weight_hh: &weight_hh,
                    projection: self
                        .projection
                        .map(|_| LstmProjection { weight_hr: &weight_hr, m: &mut m.values }),
                    input: InputPart::InPlace,
                    gates: &mut gates.values,
                    h: &mut h.values,
                    c: &mut c.values,
                },
            );
            weight_hh.reshape(4 * hidden, output);
            weight_hh.pack_rows(Simd::detect(), &parameters.weight_hh, output);
            weight_hr.reshape(output, hidden);
            if let Some(values) = &parameters.weight_hr {
                weight_hr.pack_rows(Simd::detect(), values, hidden);
            }
            let mut d_gates = gates.named("d_gates");
            let mut d_projected = Tensor::unset(block, "d_projected", Layout::Steps, output);
            let (mut d_h, mut d_c) = (d_h.named("d_h0"), d_c.named("d_c0"));
            let mut d_m = vec![f32::NAN; shape.rows() * hidden];
            lstm_backward(
                simd,
                LstmBackward {
                    shape,
                    options,
                    weight_hh: &weight_hh,
                    projection: self.projection.map(|_| LstmProjectionBackward {
                        weight_hr: &weight_hr,
                        d_projected: &mut d_projected.values,
                        d_m: &mut d_m,
                    }),
                    gates: &mut d_gates.values,
                    c: &c.values,
                    d_out: &d_out.values,
                    d_h: &mut d_h.values,
                    d_c: &mut d_c.values,
                },
            );
            let mut outputs = vec![gates, h, c, d_gates, d_h, d_c];
            if self.projection.is_some() {
                outputs.extend([m, d_projected]);
            }
            outputs
        }

        fn weight_gradients(&self, block: &Block, outputs: &BTreeMap<&str, Vec<f32>>) -> Named {
            let (hidden, output) = (block.hidden, block.output);
            let (d_gates, c) = (&outputs["d_gates"], &outputs["c"]);
            let mut gradients = vec![("weight_hh", outer_sum(d_gates, 4 * hidden, &outputs["h"], output))];
            if self.projection.is_some() {
                let weight_hr = outer_sum(&outputs["d_projected"], output, &outputs["m"], hidden);
                gradients.push(("weight_hr", weight_hr));
            }
            if self.has_peepholes {
                let peephole = |gate: usize, c: &[f32]| {
                    let d = d_gates.chunks(4 * hidden).map(|d| &d[gate * hidden..][..hidden]);
                    let mut sum = vec![f32::NAN; hidden];
                    product_column_sum(Simd::detect(), d.zip(c.chunks(hidden)), &mut sum);
                    widen(&sum)
                };
                let [i, f, o] = [0, 1, 3];
                gradients.push(("peephole_i", peephole(i, c)));
                gradients.push(("peephole_f", peephole(f, c)));
                gradients.push(("peephole_o", peephole(o, &c[hidden..])));
            }
            gradients
        }

        fn oracle(&self, block: &Block, inputs: &[Vec<f64>]) -> Option<Named> {
            let [x, d_out, h0, c0, d_h, d_c] = inputs else { panic!("inputs") };
            let parameters = self.parameters(block).map(|values| widen(values));
            let weights = slices(&parameters);
            let options = oracle::Lstm {
                recurrent_activation: oracle_gate(self.recurrent_activation),
                forget_bias: 0.0,
                peepholes: self.has_peepholes,
                cell_clip: self.cell_clip.map(f64::from),
                projection: self.projection,
            };
            let start = State { h: h0.clone(), c: c0.clone() };
            let trace = oracle::lstm_forward(options, x, &weights, &start);
            if self.is_near_a_corner(x, &weights, &trace) {
                return None;
            }
            let d_end = State { h: d_h.clone(), c: d_c.clone() };
            let gradient = oracle::lstm_backward(options, &trace, &weights, d_out, &d_end);
            let mut wants = vec![
                ("gates", trace.gates),
                ("h", trace.h),
                ("c", trace.c),
                ("d_gates", gradient.d_x),
                ("d_h0", gradient.d_start.h),
                ("d_c0", gradient.d_start.c),
                ("weight_hh", gradient.recurrent.weight_hh),
            ];
            wants.extend(gradient.recurrent.weight_hr.map(|values| ("weight_hr", values)));
            if let Some(parameters::Peepholes { i, f, o }) = gradient.recurrent.peepholes {
                wants.extend([("peephole_i", i), ("peephole_f", f), ("peephole_o", o)]);
            }
            Some(wants)
        }
    }

    #[test]
    fn equals_the_oracle_at_every_level() {
        assert_follows_the_oracle("lstm", &[(&PLAIN as &dyn TestedCell, odd_blocks())]);
    }

    #[test]
    fn every_combination_of_options_equals_the_oracle_at_every_level() {
        let cells = cells();
        let cases: Vec<_> = cells.iter().map(|cell| (cell as &dyn TestedCell, mixed_blocks())).collect();
        assert_follows_the_oracle("lstm, all options", &cases);
    }

    #[test]
    fn a_row_alone_has_the_bits_of_the_row_in_company() {
        let cells = cells();
        assert_rows_are_alone(&cells.iter().map(|cell| cell as &dyn TestedCell).collect::<Vec<_>>());
    }

    /// The cell states that a block leaves, of starts that hold a NaN.
    fn cells_after(cell_clip: Option<f32>) -> Vec<f32> {
        let (cell, block) = (Lstm { cell_clip, ..PLAIN }, Block::new(&[4, 4, 2], 7));
        let mut inputs = cell.inputs(&block);
        inputs[3].values[0] = f32::NAN;
        let outputs = cell.run(Simd::detect(), &block, &inputs);
        outputs.into_iter().find(|output| output.name == "c").unwrap().values.split_off(4 * 7)
    }

    #[test]
    fn a_clip_cuts_off_what_is_outside_and_neither_a_nan_nor_what_is_inside() {
        let clipped = cells_after(Some(0.7));
        assert!(clipped[0].is_nan());
        assert!(clipped.contains(&0.7) && clipped.contains(&-0.7));
        assert!(!clipped.iter().any(|c| c.abs() > 0.7));
        let free = cells_after(None);
        assert!(free.iter().any(|c| c.abs() > 0.7));
        assert_eq!(bits_of(&cells_after(Some(1e3))), bits_of(&free));
    }

    /// A NaN's own bits are not promised.
    fn bits_of(x: &[f32]) -> Vec<Option<u32>> {
        x.iter().map(|x| (!x.is_nan()).then_some(x.to_bits())).collect()
    }
}
