//! The tanh RNN over a block of rows.
//!
//! `h_t = tanh(pre_t + W_hh h_{t-1})`, where `pre_t = W_ih x_t + b_ih + b_hh` is computed for all steps before.

use super::gemm::gemm;
use super::math::tanh;
use super::pack::PackedMatrix;
use super::sequence::SequenceShape;
use super::simd::{Simd, map_units, simd_kernel};

/// Arguments of [`rnn_forward`].
#[derive(Debug)]
pub struct RnnForward<'a> {
    /// The block.
    pub shape: SequenceShape,
    /// `[H, H]` (k, n): `pack_columns` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// `[T][rows][H]`, overwritten.
    pub pre: &'a mut [f32],
    /// `[T + 1][rows][H]`, the first step given.
    pub h: &'a mut [f32],
}

/// Runs the block through all steps.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[H, H]` packed by columns | in | shared by all blocks |
/// | `pre` | `[T][rows][H]` | in | `W_ih x + b_ih + b_hh`; holds the full pre-activation afterwards, not needed again |
/// | `h` | `[T + 1][rows][H]` | `h[0]` in, rest out | kept for backward; `h[1..]` is the layer's output |
///
/// Cost: T · rows · (2·H² FLOPs + one tanh per unit). Numerics: the row rule; `pre + acc` per k block, tanh within
/// 2.5e-7. Reference: `oracle::rnn::rnn_forward`.
pub fn rnn_forward(simd: Simd, args: RnnForward<'_>) {
    let RnnForward { shape, weight_hh, pre, h } = args;
    shape.check_weight("rnn_forward", weight_hh, 1, 1);
    shape.check("rnn_forward", "pre", pre.len(), shape.seq_len, 1);
    shape.check("rnn_forward", "h", h.len(), shape.seq_len + 1, 1);
    let (step, hidden) = (shape.step(1), shape.hidden_size);
    for t in 0..shape.seq_len {
        let pre = &mut pre[t * step..(t + 1) * step];
        let (past, future) = h.split_at_mut((t + 1) * step);
        gemm(simd, shape.rows, &past[t * step..], hidden, weight_hh, pre, hidden, true);
        forward_units(simd, pre, &mut future[..step]);
    }
}

/// Arguments of [`rnn_backward`].
#[derive(Debug)]
pub struct RnnBackward<'a> {
    /// The block.
    pub shape: SequenceShape,
    /// `[H, H]` (k, n): `pack_rows` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// `[T + 1][rows][H]`, as the forward pass left it.
    pub h: &'a [f32],
    /// `[T][rows][H]`.
    pub d_out: &'a [f32],
    /// `[T][rows][H]`, written.
    pub d_pre: &'a mut [f32],
    /// `[rows][H]`, the carry.
    pub d_h: &'a mut [f32],
}

/// Back through time: `d_pre_t = (d_out_t + d_h) · (1 - h_t²)`, `d_h = W_hhᵀ d_pre_t`.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[H, H]` packed by rows | in | |
/// | `h` | `[T + 1][rows][H]` | in | |
/// | `d_out` | `[T][rows][H]` | in | from the layer above or the head, for every step |
/// | `d_pre` | `[T][rows][H]` | out | of W_ih x and W_hh h and both biases alike |
/// | `d_h` | `[rows][H]` | in and out | in: gradient of the final state beside `d_out` (zeros if none); out: of `h[0]` |
///
/// Cost and numerics as the forward pass. Reference: `oracle::rnn::rnn_backward`.
pub fn rnn_backward(simd: Simd, args: RnnBackward<'_>) {
    let RnnBackward { shape, weight_hh, h, d_out, d_pre, d_h } = args;
    shape.check_weight("rnn_backward", weight_hh, 1, 1);
    shape.check("rnn_backward", "h", h.len(), shape.seq_len + 1, 1);
    shape.check("rnn_backward", "d_out", d_out.len(), shape.seq_len, 1);
    shape.check("rnn_backward", "d_pre", d_pre.len(), shape.seq_len, 1);
    shape.check("rnn_backward", "d_h", d_h.len(), 1, 1);
    let (step, hidden) = (shape.step(1), shape.hidden_size);
    for t in (0..shape.seq_len).rev() {
        let now = t * step..(t + 1) * step;
        let d_pre = &mut d_pre[now.clone()];
        backward_units(simd, &h[(t + 1) * step..(t + 2) * step], &d_out[now], d_h, d_pre);
        gemm(simd, shape.rows, d_pre, hidden, weight_hh, d_h, hidden, false);
    }
}

simd_kernel! {
    fn forward_units(simd: Simd, pre: &[f32], h: &mut [f32]) {
        map_units([pre], [h], forward_unit);
    }
}

#[inline(always)]
fn forward_unit([pre]: [f32; 1], _: [f32; 1]) -> [f32; 1] {
    [tanh(pre)]
}

simd_kernel! {
    fn backward_units(simd: Simd, h: &[f32], d_out: &[f32], d_h: &[f32], d_pre: &mut [f32]) {
        map_units([h, d_out, d_h], [d_pre], backward_unit);
    }
}

#[inline(always)]
fn backward_unit([h, d_out, d_h]: [f32; 3], _: [f32; 1]) -> [f32; 1] {
    [(d_out + d_h) * (-h).mul_add(h, 1.0)]
}

#[cfg(test)]
mod tests {
    use super::super::sequence::tests::{bits, distance, numbers, odd_shapes, row_of, widen};
    use super::*;
    use crate::oracle::activation::Activation;
    use crate::oracle::cell::State;
    use crate::oracle::parameters::Recurrent;
    use crate::oracle::rnn as oracle;

    struct Run {
        h: Vec<f32>,
        d_pre: Vec<f32>,
        d_h: Vec<f32>,
    }

    fn weight(hidden: usize) -> Vec<f32> {
        numbers(hidden * hidden, 1.5 / (hidden as f32).sqrt(), 1)
    }

    fn run(simd: Simd, shape: SequenceShape, pre: &[f32], h0: &[f32], d_out: &[f32], d_h: &[f32]) -> Run {
        let SequenceShape { seq_len, hidden_size, .. } = shape;
        let weight = weight(hidden_size);
        let mut packed = PackedMatrix::new(hidden_size, hidden_size);
        packed.pack_columns(&weight, hidden_size);
        let mut h = vec![f32::NAN; (seq_len + 1) * shape.step(1)];
        h[..shape.step(1)].copy_from_slice(h0);
        rnn_forward(simd, RnnForward { shape, weight_hh: &packed, pre: &mut pre.to_vec(), h: &mut h });
        packed.pack_rows(&weight, hidden_size);
        let mut d_pre = vec![f32::NAN; seq_len * shape.step(1)];
        let mut d_h = d_h.to_vec();
        let args = RnnBackward { shape, weight_hh: &packed, h: &h, d_out, d_pre: &mut d_pre, d_h: &mut d_h };
        rnn_backward(simd, args);
        Run { h, d_pre, d_h }
    }

    #[test]
    fn equals_the_oracle_at_every_level() {
        let mut largest = [0.0f64; 3];
        for shape in odd_shapes() {
            let SequenceShape { seq_len, rows, hidden_size } = shape;
            let step = shape.step(1);
            let (pre, h0) = (numbers(seq_len * step, 1.0, 2), numbers(step, 1.0, 3));
            let (d_out, d_h) = (numbers(seq_len * step, 1.0, 4), numbers(step, 1.0, 5));
            let got = run(Simd::detect(), shape, &pre, &h0, &d_out, &d_h);
            for simd in Simd::available() {
                let other = run(simd, shape, &pre, &h0, &d_out, &d_h);
                assert_eq!(bits(&other.h), bits(&got.h), "{simd} {shape:?}");
                assert_eq!(bits(&other.d_pre), bits(&got.d_pre), "{simd} {shape:?}");
                assert_eq!(bits(&other.d_h), bits(&got.d_h), "{simd} {shape:?}");
            }
            let (weight, bias) = (widen(&weight(hidden_size)), vec![0.0; hidden_size]);
            let (options, weights) =
                (oracle::Rnn { activation: Activation::Tanh }, Recurrent::plain(&weight[..], &bias[..]));
            for row in 0..rows {
                let of = |x: &[f32]| row_of(x, rows, row, hidden_size);
                let trace = oracle::rnn_forward(options, &of(&pre), &weights, &State::of_h(of(&h0)));
                let want =
                    oracle::rnn_backward(options, &trace, &weights, &of(&d_out), &State::of_h(of(&d_h)));
                let pairs = [(&got.h, &trace.h), (&got.d_pre, &want.d_x), (&got.d_h, &want.d_start.h)];
                for (largest, (got, want)) in largest.iter_mut().zip(pairs) {
                    *largest = largest.max(distance(&of(got), want));
                }
            }
        }
        println!(
            "rnn against the oracle: h {:.2e}, d_pre {:.2e}, d_h0 {:.2e}",
            largest[0], largest[1], largest[2]
        );
        assert!(largest.iter().all(|distance| *distance <= 1e-5));
    }

    #[test]
    fn a_row_alone_has_the_bits_of_the_row_in_company() {
        let shape = SequenceShape { seq_len: 4, rows: 9, hidden_size: 33 };
        let one = SequenceShape { rows: 1, ..shape };
        let (step, alone) = (shape.step(1), one.step(1));
        let (pre, h0) = (numbers(4 * step, 1.0, 2), numbers(step, 1.0, 3));
        let (d_out, d_h) = (numbers(4 * step, 1.0, 4), numbers(step, 1.0, 5));
        let whole = run(Simd::detect(), shape, &pre, &h0, &d_out, &d_h);
        for row in 0..shape.rows {
            let of = |x: &[f32]| -> Vec<f32> {
                x.chunks_exact(step).flat_map(|x| &x[row * alone..(row + 1) * alone]).copied().collect()
            };
            let got = run(Simd::detect(), one, &of(&pre), &of(&h0), &of(&d_out), &of(&d_h));
            assert_eq!(bits(&got.h), bits(&of(&whole.h)));
            assert_eq!(bits(&got.d_pre), bits(&of(&whole.d_pre)));
            assert_eq!(bits(&got.d_h), bits(&of(&whole.d_h)));
        }
    }
}
