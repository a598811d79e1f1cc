//! The plain recurrent unit over a block of rows.
//!
//! `h_t = φ(pre_t + W_hh h_{t-1})`, φ = tanh or relu, where `pre_t = W_ih x_t + b_ih + b_hh` is computed for all steps
//! before.

use super::activation::{unit, unit_slope};
use super::gemm::{Start, gemm};
use super::pack::PackedMatrix;
use super::sequence::{InputPart, SequenceShape};
use super::simd::{Simd, map_units, simd_kernel, with_constants};
use protocol::cell::Activation;

/// Arguments of [`rnn_forward`].
#[derive(Debug)]
pub struct RnnForward<'a> {
    /// The block.
    pub shape: SequenceShape<'a>,
    /// φ.
    pub activation: Activation,
    /// `[H, H]` (k, n): `pack_columns` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// Where the input's part is.
    pub input: InputPart<'a>,
    /// `[N][H]`, overwritten.
    pub pre: &'a mut [f32],
    /// `[rows + N][H]`, the starts given.
    pub h: &'a mut [f32],
}

/// Runs the block through all steps.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[H, H]` packed by columns | in | shared by all blocks |
/// | `input` | see [`InputPart`] | in | `W_ih x + b_ih + b_hh`, or where it is |
/// | `pre` | `[N][H]` | out | the full pre-activation, not needed again; in too if the input's part is there |
/// | `h` | `[rows + N][H]` | starts in, rest out | kept for backward; the rest is the layer's output |
///
/// Cost: N · (2·H² FLOPs + one φ per unit). Numerics: the row rule; `pre + acc` per k block, tanh within 2.5e-7.
/// Reference: `oracle::rnn::rnn_forward`.
pub fn rnn_forward(simd: Simd, args: RnnForward<'_>) {
    let RnnForward { shape, activation, weight_hh, input, pre, h } = args;
    let hidden = shape.hidden_size;
    let check = shape.check_unprojected("rnn_forward");
    check.weight("weight_hh", weight_hh, hidden, hidden);
    input.check(&check, hidden);
    check.steps("pre", pre, hidden);
    check.states("h", h, hidden);
    let relu = activation == Activation::Relu;
    for step in shape.forward() {
        let pre = &mut pre[step.range(hidden)];
        let (h_before, h_after) = step.split(h, hidden);
        gemm(simd, step.rows, h_before, hidden, weight_hh, pre, hidden, input.start(step));
        with_constants!(forward_units[relu](simd, pre, h_after));
    }
}

/// Arguments of [`rnn_backward`].
#[derive(Debug)]
pub struct RnnBackward<'a> {
    /// The block.
    pub shape: SequenceShape<'a>,
    /// φ.
    pub activation: Activation,
    /// `[H, H]` (k, n): `pack_rows` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// `[rows + N][H]`, as the forward pass left it.
    pub h: &'a [f32],
    /// `[N][H]`.
    pub d_out: &'a [f32],
    /// `[N][H]`, written.
    pub d_pre: &'a mut [f32],
    /// `[rows][H]`, the carry.
    pub d_h: &'a mut [f32],
}

/// Back through time: `d_pre_t = (d_out_t + d_h) · φ'(h_t)`, `d_h = W_hhᵀ d_pre_t`; φ' is `1 - h²`, or 1 where h > 0.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[H, H]` packed by rows | in | |
/// | `h` | as left by [`rnn_forward`] | in | |
/// | `d_out` | `[N][H]` | in | from the layer above or the head, for every step |
/// | `d_pre` | `[N][H]` | out | of W_ih x and W_hh h and both biases alike |
/// | `d_h` | `[rows][H]` | in and out | in: gradient of each row's final state beside `d_out` (zeros if none); out: of its start |
///
/// Cost and numerics as the forward pass. Reference: `oracle::rnn::rnn_backward`.
pub fn rnn_backward(simd: Simd, args: RnnBackward<'_>) {
    let RnnBackward { shape, activation, weight_hh, h, d_out, d_pre, d_h } = args;
    let hidden = shape.hidden_size;
    let check = shape.check_unprojected("rnn_backward");
    check.weight("weight_hh", weight_hh, hidden, hidden);
    check.states("h", h, hidden);
    check.steps("d_out", d_out, hidden);
    check.steps("d_pre", d_pre, hidden);
    check.carry("d_h", d_h, hidden);
    let relu = activation == Activation::Relu;
    for step in shape.backward() {
        let (h, d_out) = (&h[step.after(hidden)], &d_out[step.range(hidden)]);
        let (d_pre, d_h) = (&mut d_pre[step.range(hidden)], &mut d_h[step.carry(hidden)]);
        with_constants!(backward_units[relu](simd, h, d_out, d_h, d_pre));
        gemm(simd, step.rows, d_pre, hidden, weight_hh, d_h, hidden, Start::Zero);
    }
}

simd_kernel! {
    fn forward_units<const RELU: bool>(simd: Simd, pre: &[f32], h: &mut [f32]) {
        map_units([pre], [h], forward_unit::<RELU>);
    }
}

#[inline(always)]
fn forward_unit<const RELU: bool>([pre]: [f32; 1], _: [f32; 1]) -> [f32; 1] {
    [unit::<RELU>(pre)]
}

simd_kernel! {
    fn backward_units<const RELU: bool>(
        simd: Simd,
        h: &[f32],
        d_out: &[f32],
        d_h: &[f32],
        d_pre: &mut [f32],
    ) {
        map_units([h, d_out, d_h], [d_pre], backward_unit::<RELU>);
    }
}

#[inline(always)]
fn backward_unit<const RELU: bool>([h, d_out, d_h]: [f32; 3], _: [f32; 1]) -> [f32; 1] {
    [(d_out + d_h) * unit_slope::<RELU>(h)]
}
#[cfg(test)]
mod tests {
    use super::super::cell_tests::*;
    use super::super::sequence::tests::{numbers, widen};
    use super::*;
    use crate::oracle::activation;
    use crate::oracle::algebra::affine;
    use crate::oracle::cell::State;
    use crate::oracle::parameters::Recurrent;
    use crate::oracle::rnn as oracle;
    use std::collections::BTreeMap;

    #[derive(Debug)]
    struct Rnn(Activation);

    fn weight(hidden: usize) -> Vec<f32> {
        numbers(hidden * hidden, 1.5 / (hidden as f32).sqrt(), 1)
    }

    impl TestedCell for Rnn {
        fn inputs(&self, block: &Block) -> Vec<Tensor> {
            let of = |name, layout, salt| Tensor::numbers(block, name, layout, block.hidden, 1.0, salt);
            vec![
                of("pre", Layout::Steps, 2),
                of("d_out", Layout::Steps, 4),
                of("h0", Layout::Carry, 3),
                of("d_h", Layout::Carry, 5),
            ]
        }

        fn run(&self, simd: Simd, block: &Block, inputs: &[Tensor]) -> Vec<Tensor> {
            let [pre, d_out, h0, d_h] = inputs else { panic!("inputs") };
            let (shape, hidden, activation) = (block.shape(), block.hidden, self.0);
            let weight = weight(hidden);
            let mut packed = PackedMatrix::new(hidden, hidden);
            packed.pack_columns(Simd::detect(), &weight, hidden);
            let mut pre = pre.clone();
            let mut h = Tensor::started(block, "h", h0);
            let (pre, states) = (&mut pre.values, &mut h.values);
            let input = InputPart::InPlace;
            rnn_forward(simd, RnnForward { shape, activation, weight_hh: &packed, input, pre, h: states });
            packed.pack_rows(Simd::detect(), &weight, hidden);
            let mut d_pre = Tensor::unset(block, "d_pre", Layout::Steps, hidden);
            let mut d_h = d_h.named("d_h0");
            rnn_backward(
                simd,
                RnnBackward {
                    shape,
                    activation,
                    weight_hh: &packed,
                    h: &h.values,
                    d_out: &d_out.values,
                    d_pre: &mut d_pre.values,
                    d_h: &mut d_h.values,
                },
            );
            vec![h, d_pre, d_h]
        }

        fn weight_gradients(&self, block: &Block, outputs: &BTreeMap<&str, Vec<f32>>) -> Named {
            let hidden = block.hidden;
            vec![("weight_hh", outer_sum(&outputs["d_pre"], hidden, &outputs["h"], hidden))]
        }

        fn oracle(&self, block: &Block, inputs: &[Vec<f64>]) -> Option<Named> {
            let [pre, d_out, h0, d_h] = inputs else { panic!("inputs") };
            let hidden = block.hidden;
            let (weight, bias) = (widen(&weight(hidden)), vec![0.0; hidden]);
            let weights = Recurrent::plain(&weight[..], &bias[..]);
            let activation = match self.0 {
                Activation::Tanh => activation::Activation::Tanh,
                Activation::Relu => activation::Activation::Relu,
            };
            let options = oracle::Rnn { activation };
            let trace = oracle::rnn_forward(options, pre, &weights, &State::of_h(h0.clone()));
            if self.0 == Activation::Relu {
                for (pre, h) in pre.chunks(hidden).zip(trace.h.chunks(hidden)) {
                    if affine(&weight, pre, h).iter().any(|sum| is_near(*sum, 0.0)) {
                        return None;
                    }
                }
            }
            let gradient = oracle::rnn_backward(options, &trace, &weights, d_out, &State::of_h(d_h.clone()));
            Some(vec![
                ("h", trace.h),
                ("d_pre", gradient.d_x),
                ("d_h0", gradient.d_start.h),
                ("weight_hh", gradient.recurrent.weight_hh),
            ])
        }
    }

    #[test]
    fn equals_the_oracle_at_every_level() {
        let cases: [(&dyn TestedCell, _); 2] =
            [(&Rnn(Activation::Tanh), odd_blocks()), (&Rnn(Activation::Relu), odd_blocks())];
        assert_follows_the_oracle("rnn", &cases);
    }

    #[test]
    fn a_row_alone_has_the_bits_of_the_row_in_company() {
        assert_rows_are_alone(&[&Rnn(Activation::Tanh), &Rnn(Activation::Relu)]);
    }

    #[test]
    fn relu_lets_a_nan_through() {
        let (mut pre, mut h) = ([f32::NAN, -1.0], [0.0, 0.0, 9.0, 9.0]);
        let shape = SequenceShape { active: &[1], hidden_size: 2, output_size: 2 };
        let (activation, weight_hh) = (Activation::Relu, &PackedMatrix::new(2, 2));
        let args =
            RnnForward { shape, activation, weight_hh, input: InputPart::InPlace, pre: &mut pre, h: &mut h };
        rnn_forward(Simd::detect(), args);
        assert!(h[2].is_nan() && h[3] == 0.0, "{h:?}");
    }
}
