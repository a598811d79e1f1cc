//! The GRU over a block of rows, gates in PyTorch's order r, z, n.
//!
//! `r, z = σ(x + y)`, `h_t = (1 - z)·n + z·h_{t-1}`, where `x_t = W_ih x_t + b_ih` is computed for all steps before and
//! `y_t = W_hh h_{t-1} + b_hh`. The reset gate acts
//! - after the product (PyTorch): `n = tanh(x_n + r·q)`, q being the n part of y: `b_hn` stays inside the reset;
//! - before it (TensorFlow): `n = tanh(x_n + W_hn (r·h_{t-1}) + b_hn)`, a second product at every step.

mod after;
mod before;

use super::gemm::{Start, gemm};
use super::pack::PackedMatrix;
use super::sequence::{Check, SequenceShape};
use super::simd::{Simd, with_constants};
use after::{after_backward, after_forward};
use before::{candidate_backward, candidate_forward, reset_backward, reset_forward};
use protocol::cell::RecurrentActivation;

/// `weight_hh`, packed as the place of the reset gate asks for: by columns for the forward pass, by rows for the
/// backward pass.
#[derive(Clone, Copy, Debug)]
pub enum GruWeights<'a> {
    /// Reset after the product. (k, n): forward `[H, 3·H]`, backward `[3·H, H]`.
    After(&'a PackedMatrix),
    /// Reset before the product.
    Before {
        /// The rows of r and z. (k, n): forward `[H, 2·H]`, backward `[2·H, H]`.
        gates: &'a PackedMatrix,
        /// The rows of n. `[H, H]`.
        candidate: &'a PackedMatrix,
    },
}

/// Arguments of [`gru_forward`].
#[derive(Debug)]
pub struct GruForward<'a> {
    /// The block.
    pub shape: SequenceShape<'a>,
    /// σ of the gates r and z.
    pub recurrent_activation: RecurrentActivation,
    /// `weight_hh` by columns.
    pub weight_hh: GruWeights<'a>,
    /// `[3·H]`.
    pub bias_hh: &'a [f32],
    /// `[rows][3·H]`, scratch.
    pub h_part: &'a mut [f32],
    /// `[N][4·H]`: input part in, gates out.
    pub gates: &'a mut [f32],
    /// `[rows + N][H]`, the starts given.
    pub h: &'a mut [f32],
}

/// Runs the block through all steps.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | see [`GruWeights`], packed by columns | in | shared by all blocks |
/// | `bias_hh` | `[3·H]` | in | |
/// | `h_part` | `[rows][3·H]` | scratch | |
/// | `gates` | `[N][4·H]` | in and out | in: `W_ih x + b_ih` in the first 3·H of each row; out: r, z, n, and q or, with the reset before the product, `r·h_{t-1}`; kept for backward |
/// | `h` | `[rows + N][H]` | starts in, rest out | kept for backward; the rest is the layer's output |
///
/// Cost: N · (6·H² FLOPs + 2 sigmoid and 1 tanh per unit). Numerics: the row rule; the product is summed first,
/// then `+ b_hh`, then the input part. Reference: `oracle::gru::gru_forward`.
pub fn gru_forward(simd: Simd, args: GruForward<'_>) {
    let GruForward { shape, recurrent_activation, weight_hh, bias_hh, h_part, gates, h } = args;
    let hidden = shape.hidden_size;
    let check = shape.check_unprojected("gru_forward");
    check_weights(&check, weight_hh, |gates| (hidden, gates * hidden));
    check.vector("bias_hh", bias_hh, 3 * hidden);
    check.carry("h_part", h_part, 3 * hidden);
    check.steps("gates", gates, 4 * hidden);
    check.states("h", h, hidden);
    let hard = recurrent_activation == RecurrentActivation::HardSigmoid;
    for step in shape.forward() {
        let (h_before, h_after) = step.split(h, hidden);
        let y = &mut h_part[step.carry(3 * hidden)];
        let gates = &mut gates[step.range(4 * hidden)];
        match weight_hh {
            GruWeights::After(weight) => {
                gemm(simd, step.rows, h_before, hidden, weight, y, 3 * hidden, Start::Zero);
                with_constants!(after_forward[hard](simd, hidden, y, bias_hh, h_before, gates, h_after));
            }
            GruWeights::Before { gates: weight, candidate } => {
                gemm(simd, step.rows, h_before, hidden, weight, y, 3 * hidden, Start::Zero);
                with_constants!(reset_forward[hard](simd, hidden, y, bias_hh, h_before, gates));
                let (reset, y_n) = (&gates[3 * hidden..], &mut y[2 * hidden..]);
                gemm(simd, step.rows, reset, 4 * hidden, candidate, y_n, 3 * hidden, Start::Zero);
                candidate_forward(simd, hidden, y, bias_hh, h_before, gates, h_after);
            }
        }
    }
}

/// Arguments of [`gru_backward`].
#[derive(Debug)]
pub struct GruBackward<'a> {
    /// The block.
    pub shape: SequenceShape<'a>,
    /// σ of the gates r and z.
    pub recurrent_activation: RecurrentActivation,
    /// `weight_hh` by rows.
    pub weight_hh: GruWeights<'a>,
    /// `[N][4·H]`: gates in, as the forward pass left them; their gradients out.
    pub gates: &'a mut [f32],
    /// `[rows + N][H]`, as the forward pass left it.
    pub h: &'a [f32],
    /// `[N][H]`.
    pub d_out: &'a [f32],
    /// `[rows][H]`, the carry.
    pub d_h: &'a mut [f32],
    /// `[rows][3·H]`, scratch.
    pub d_h_part: &'a mut [f32],
}

/// Back through time. With `d_h += d_out_t`: `d_n = d_h·(1-z)·(1-n²)`, `d_z = d_h·(h_{t-1} - n)·σ'(z)`, and
/// - reset after the product: `d_r = d_n·q·σ'(r)`, then `d_h = d_h·z + W_hhᵀ (d_r, d_z, d_n·r)`;
/// - reset before it: with `d_s = W_hnᵀ d_n`, `d_r = d_s·h_{t-1}·σ'(r)`, then
///   `d_h = d_h·z + d_s·r + W_h(r,z)ᵀ (d_r, d_z)`.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | see [`GruWeights`], packed by rows | in | |
/// | `gates` | `[N][4·H]` | in and out | in: as left by [`gru_forward`]; out: d_r, d_z, d_n, which are the gradients of W_ih x and b_ih; and d_n·r, which replaces d_n in those of W_hh h and b_hh, or, with the reset before the product, still `r·h_{t-1}`, which W_hn has multiplied |
/// | `h` | as left by [`gru_forward`] | in | |
/// | `d_out` | `[N][H]` | in | from the layer above or the head, for every step |
/// | `d_h` | `[rows][H]` | in and out | in: gradient of each row's final state beside `d_out` (zeros if none); out: of its start |
/// | `d_h_part` | `[rows][3·H]` | scratch | |
///
/// Cost: N · 6·H² FLOPs. Numerics: the row rule. Reference: `oracle::gru::gru_backward`.
pub fn gru_backward(simd: Simd, args: GruBackward<'_>) {
    let GruBackward { shape, recurrent_activation, weight_hh, gates, h, d_out, d_h, d_h_part } = args;
    let hidden = shape.hidden_size;
    let check = shape.check_unprojected("gru_backward");
    check_weights(&check, weight_hh, |gates| (gates * hidden, hidden));
    check.steps("gates", gates, 4 * hidden);
    check.states("h", h, hidden);
    check.steps("d_out", d_out, hidden);
    check.carry("d_h", d_h, hidden);
    check.carry("d_h_part", d_h_part, 3 * hidden);
    let hard = recurrent_activation == RecurrentActivation::HardSigmoid;
    for step in shape.backward() {
        let (h, d_out) = (&h[step.before(hidden)], &d_out[step.range(hidden)]);
        let gates = &mut gates[step.range(4 * hidden)];
        let d_h = &mut d_h[step.carry(hidden)];
        match weight_hh {
            GruWeights::After(weight) => {
                let d_y = &mut d_h_part[step.carry(3 * hidden)];
                with_constants!(after_backward[hard](simd, hidden, h, d_out, gates, d_y, d_h));
                gemm(simd, step.rows, d_y, 3 * hidden, weight, d_h, hidden, Start::Kept);
            }
            GruWeights::Before { gates: weight, candidate } => {
                let d_reset = &mut d_h_part[step.carry(hidden)];
                with_constants!(candidate_backward[hard](simd, hidden, h, d_out, gates, d_h));
                gemm(
                    simd,
                    step.rows,
                    &gates[2 * hidden..],
                    4 * hidden,
                    candidate,
                    d_reset,
                    hidden,
                    Start::Zero,
                );
                with_constants!(reset_backward[hard](simd, hidden, h, d_reset, gates, d_h));
                gemm(simd, step.rows, gates, 4 * hidden, weight, d_h, hidden, Start::Kept);
            }
        }
    }
}

/// Asserts the packed shapes; `shape_of` gives (k, n) of a number of gates.
fn check_weights(check: &Check, weights: GruWeights<'_>, shape_of: impl Fn(usize) -> (usize, usize)) {
    let check = |name: &str, weight, gates| {
        let (k, n) = shape_of(gates);
        check.weight(name, weight, k, n);
    };
    match weights {
        GruWeights::After(weight) => check("weight_hh", weight, 3),
        GruWeights::Before { gates, candidate } => {
            check("weight_hh of the gates", gates, 2);
            check("weight_hh of the candidate", candidate, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::cell_tests::*;
    use super::super::sequence::tests::{numbers, widen};
    use super::*;
    use crate::oracle::algebra::{affine, hadamard, parts};
    use crate::oracle::cell::State;
    use crate::oracle::gru as oracle;
    use crate::oracle::parameters::Recurrent;
    use protocol::cell::Reset;
    use std::collections::BTreeMap;

    #[derive(Debug)]
    struct Gru {
        recurrent_activation: RecurrentActivation,
        reset: Reset,
    }

    const PLAIN: Gru = Gru { recurrent_activation: RecurrentActivation::Sigmoid, reset: Reset::After };

    /// Plain, and its variants.
    const CELLS: [Gru; 4] = [
        PLAIN,
        Gru { reset: Reset::Before, ..PLAIN },
        Gru { recurrent_activation: RecurrentActivation::HardSigmoid, ..PLAIN },
        Gru { recurrent_activation: RecurrentActivation::HardSigmoid, reset: Reset::Before },
    ];

    fn parameters(hidden: usize) -> Recurrent<Vec<f32>> {
        let weight_hh = numbers(3 * hidden * hidden, 1.5 / (hidden as f32).sqrt(), 1);
        Recurrent::plain(weight_hh, numbers(3 * hidden, 0.5, 6))
    }

    /// The three matrices that `weight_hh` may be packed into: all gates, r and z, n.
    fn packed(
        weight: &[f32],
        hidden: usize,
        pack: impl Fn(&[f32], usize) -> PackedMatrix,
    ) -> [PackedMatrix; 3] {
        let (gates, candidate) = weight.split_at(2 * hidden * hidden);
        [pack(weight, 3), pack(gates, 2), pack(candidate, 1)]
    }

    impl Gru {
        fn weights<'a>(&self, [all, gates, candidate]: &'a [PackedMatrix; 3]) -> GruWeights<'a> {
            match self.reset {
                Reset::After => GruWeights::After(all),
                Reset::Before => GruWeights::Before { gates, candidate },
            }
        }
    }

    impl TestedCell for Gru {
        fn inputs(&self, block: &Block) -> Vec<Tensor> {
            let of = |name, layout, salt| Tensor::numbers(block, name, layout, block.hidden, 1.0, salt);
            vec![
                Tensor::numbers(
                    block,
                    "x",
                    Layout::Steps,
                    3 * block.hidden,
                    input_scale(self.recurrent_activation),
                    2,
                ),
                of("d_out", Layout::Steps, 4),
                of("h0", Layout::Carry, 3),
                of("d_h", Layout::Carry, 5),
            ]
        }

        fn run(&self, simd: Simd, block: &Block, inputs: &[Tensor]) -> Vec<Tensor> {
            let [x, d_out, h0, d_h] = inputs else { panic!("inputs") };
            let (shape, hidden, recurrent_activation) =
                (block.shape(), block.hidden, self.recurrent_activation);
            let Recurrent { weight_hh, bias_hh, .. } = parameters(hidden);
            let forward = packed(&weight_hh, hidden, |rows, gates| {
                let mut packed = PackedMatrix::new(hidden, gates * hidden);
                packed.pack_columns(Simd::detect(), rows, hidden);
                packed
            });
            let mut gates = Tensor::unset(block, "gates", Layout::Steps, 4 * hidden);
            for (gates, x) in gates.values.chunks_mut(4 * hidden).zip(x.values.chunks(3 * hidden)) {
                gates[..3 * hidden].copy_from_slice(x);
            }
            let mut h = Tensor::started(block, "h", h0);
            gru_forward(
                simd,
                GruForward {
                    shape,
                    recurrent_activation,
                    weight_hh: self.weights(&forward),
                    bias_hh: &bias_hh,
                    h_part: &mut vec![f32::NAN; shape.rows() * 3 * hidden],
                    gates: &mut gates.values,
                    h: &mut h.values,
                },
            );
            let backward = packed(&weight_hh, hidden, |rows, gates| {
                let mut packed = PackedMatrix::new(gates * hidden, hidden);
                packed.pack_rows(Simd::detect(), rows, hidden);
                packed
            });
            let mut d_gates = gates.named("d_gates");
            let mut d_h = d_h.named("d_h0");
            gru_backward(
                simd,
                GruBackward {
                    shape,
                    recurrent_activation,
                    weight_hh: self.weights(&backward),
                    gates: &mut d_gates.values,
                    h: &h.values,
                    d_out: &d_out.values,
                    d_h: &mut d_h.values,
                    d_h_part: &mut vec![f32::NAN; shape.rows() * 3 * hidden],
                },
            );
            let mut d_x = Tensor::unset(block, "d_x_part", Layout::Steps, 3 * hidden);
            let mut d_y = d_x.named("d_h_part");
            for (at, d_gates) in d_gates.values.chunks(4 * hidden).enumerate() {
                let [d_r, d_z, d_n, d_nr] = crate::cpu::sequence::parts(d_gates);
                let of_h = if self.reset == Reset::After { d_nr } else { d_n };
                d_x.values[3 * hidden * at..][..3 * hidden].copy_from_slice(&[d_r, d_z, d_n].concat());
                d_y.values[3 * hidden * at..][..3 * hidden].copy_from_slice(&[d_r, d_z, of_h].concat());
            }
            vec![gates, h, d_x, d_y, d_h]
        }

        fn weight_gradients(&self, block: &Block, outputs: &BTreeMap<&str, Vec<f32>>) -> Named {
            let hidden = block.hidden;
            let (d_y, h) = (&outputs["d_h_part"], &outputs["h"]);
            let mut weight_hh = outer_sum(d_y, 3 * hidden, h, hidden);
            if self.reset == Reset::Before {
                // W_hn multiplied r·h, which stands behind r, z and n.
                let part_of = |x: &[f32], width: usize, part: usize| -> Vec<f32> {
                    x.chunks(width * hidden).flat_map(|x| &x[part * hidden..][..hidden]).copied().collect()
                };
                let (d_n, reset) = (part_of(d_y, 3, 2), part_of(&outputs["gates"], 4, 3));
                weight_hh.truncate(2 * hidden * hidden);
                weight_hh.extend(outer_sum(&d_n, hidden, &reset, hidden));
            }
            vec![("weight_hh", weight_hh), ("bias_hh", outer_sum(d_y, 3 * hidden, &vec![1.0; d_y.len()], 1))]
        }

        fn oracle(&self, block: &Block, inputs: &[Vec<f64>]) -> Option<Named> {
            let [x, d_out, h0, d_h] = inputs else { panic!("inputs") };
            let hidden = block.hidden;
            let parameters = parameters(hidden).map(|values| widen(values));
            let weights = slices(&parameters);
            let options = oracle::Gru {
                recurrent_activation: oracle_gate(self.recurrent_activation),
                reset: match self.reset {
                    Reset::After => oracle::Reset::After,
                    Reset::Before => oracle::Reset::Before,
                },
            };
            let mut trace = oracle::gru_forward(options, x, &weights, &State::of_h(h0.clone()));
            for (x, h) in x.chunks(3 * hidden).zip(trace.h.chunks(hidden)) {
                let y = affine(weights.weight_hh, weights.bias_hh, h);
                let sums = x.iter().zip(y).map(|(x, y)| x + y).take(2 * hidden);
                if self.recurrent_activation == RecurrentActivation::HardSigmoid
                    && sums.into_iter().any(|sum| is_near(sum.abs(), 2.5))
                {
                    return None;
                }
            }
            let d_end = State::of_h(d_h.clone());
            let gradient = oracle::gru_backward(options, &trace, &weights, d_out, &d_end);
            if self.reset == Reset::Before {
                // The kernel keeps r·h in place of the product.
                for (gates, h) in trace.gates.chunks_mut(4 * hidden).zip(trace.h.chunks(hidden)) {
                    let [r, _, _, _] = parts(gates);
                    let reset = hadamard(r, h);
                    gates[3 * hidden..].copy_from_slice(&reset);
                }
            }
            Some(vec![
                ("gates", trace.gates),
                ("h", trace.h),
                ("d_x_part", gradient.d_x),
                ("d_h_part", gradient.d_y),
                ("d_h0", gradient.d_start.h),
                ("weight_hh", gradient.recurrent.weight_hh),
                ("bias_hh", gradient.recurrent.bias_hh),
            ])
        }
    }

    #[test]
    fn equals_the_oracle_at_every_level() {
        let cases: Vec<(&dyn TestedCell, _)> = CELLS
            .iter()
            .enumerate()
            .map(|(at, cell)| {
                let blocks = if at == 0 { odd_blocks() } else { mixed_blocks() };
                (cell as &dyn TestedCell, blocks)
            })
            .collect();
        assert_follows_the_oracle("gru", &cases);
    }

    #[test]
    fn a_row_alone_has_the_bits_of_the_row_in_company() {
        assert_rows_are_alone(&CELLS.each_ref().map(|cell| cell as &dyn TestedCell));
    }
}
