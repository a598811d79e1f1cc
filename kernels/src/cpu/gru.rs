//! The GRU over a block of rows, reset after the product, gates in PyTorch's order r, z, n.
//!
//! `r, z = σ(x + y)`, `n = tanh(x_n + r·q)`, `h_t = (1 - z)·n + z·h_{t-1}`, where `x_t = W_ih x_t + b_ih` is computed
//! for all steps before, `y_t = W_hh h_{t-1} + b_hh`, and q is the n part of y: `b_hn` stays inside the reset.

use super::gemm::gemm;
use super::math::{sigmoid, tanh};
use super::pack::PackedMatrix;
use super::sequence::SequenceShape;
use super::simd::{Simd, map_units, simd_kernel};

/// Arguments of [`gru_forward`].
#[derive(Debug)]
pub struct GruForward<'a> {
    /// The block.
    pub shape: SequenceShape,
    /// `[H, 3·H]` (k, n): `pack_columns` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// `[3·H]`.
    pub bias_hh: &'a [f32],
    /// `[T][rows][3·H]`.
    pub x_part: &'a [f32],
    /// `[rows][3·H]`, scratch.
    pub h_part: &'a mut [f32],
    /// `[T][rows][4·H]`, written.
    pub gates: &'a mut [f32],
    /// `[T + 1][rows][H]`, the first step given.
    pub h: &'a mut [f32],
}

/// Runs the block through all steps.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[H, 3·H]` packed by columns | in | shared by all blocks |
/// | `bias_hh` | `[3·H]` | in | |
/// | `x_part` | `[T][rows][3·H]` | in | `W_ih x + b_ih` |
/// | `h_part` | `[rows][3·H]` | scratch | |
/// | `gates` | `[T][rows][4·H]` | out | r, z, n, q; kept for backward |
/// | `h` | `[T + 1][rows][H]` | `h[0]` in, rest out | kept for backward; `h[1..]` is the layer's output |
///
/// Cost: T · rows · (6·H² FLOPs + 2 sigmoid and 1 tanh per unit). Numerics: the row rule; the product is summed first,
/// then `+ b_hh`, then `+ x_part`. Reference: `oracle::gru::gru_forward`.
pub fn gru_forward(simd: Simd, args: GruForward<'_>) {
    let GruForward { shape, weight_hh, bias_hh, x_part, h_part, gates, h } = args;
    shape.check_weight("gru_forward", weight_hh, 1, 3);
    SequenceShape { rows: 1, ..shape }.check("gru_forward", "bias_hh", bias_hh.len(), 1, 3);
    shape.check("gru_forward", "x_part", x_part.len(), shape.seq_len, 3);
    shape.check("gru_forward", "h_part", h_part.len(), 1, 3);
    shape.check("gru_forward", "gates", gates.len(), shape.seq_len, 4);
    shape.check("gru_forward", "h", h.len(), shape.seq_len + 1, 1);
    let (step, hidden) = (shape.step(1), shape.hidden_size);
    for t in 0..shape.seq_len {
        let (h_past, h_future) = h.split_at_mut((t + 1) * step);
        let h_past = &h_past[t * step..];
        gemm(simd, shape.rows, h_past, hidden, weight_hh, h_part, 3 * hidden, false);
        let x_part = &x_part[t * 3 * step..(t + 1) * 3 * step];
        let gates = &mut gates[t * 4 * step..(t + 1) * 4 * step];
        forward_units(simd, hidden, x_part, h_part, bias_hh, h_past, gates, &mut h_future[..step]);
    }
}

/// Arguments of [`gru_backward`].
#[derive(Debug)]
pub struct GruBackward<'a> {
    /// The block.
    pub shape: SequenceShape,
    /// `[3·H, H]` (k, n): `pack_rows` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// `[T][rows][4·H]`, as the forward pass left it.
    pub gates: &'a [f32],
    /// `[T + 1][rows][H]`, as the forward pass left it.
    pub h: &'a [f32],
    /// `[T][rows][H]`.
    pub d_out: &'a [f32],
    /// `[T][rows][3·H]`, written.
    pub d_x_part: &'a mut [f32],
    /// `[T][rows][3·H]`, written.
    pub d_h_part: &'a mut [f32],
    /// `[rows][H]`, the carry.
    pub d_h: &'a mut [f32],
}

/// Back through time. With `d_h += d_out_t`:
/// `d_n = d_h·(1-z)·(1-n²)`, `d_z = d_h·(h_{t-1} - n)·z(1-z)`, `d_r = d_n·q·r(1-r)`; `d_x_part = (d_r, d_z, d_n)`,
/// `d_h_part = (d_r, d_z, d_n·r)`, then `d_h = d_h·z + W_hhᵀ d_h_part`.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[3·H, H]` packed by rows | in | |
/// | `gates`, `h` | as left by [`gru_forward`] | in | |
/// | `d_out` | `[T][rows][H]` | in | from the layer above or the head, for every step |
/// | `d_x_part` | `[T][rows][3·H]` | out | of W_ih x and b_ih |
/// | `d_h_part` | `[T][rows][3·H]` | out | of W_hh h and b_hh |
/// | `d_h` | `[rows][H]` | in and out | in: gradient of the final state beside `d_out` (zeros if none); out: of `h[0]` |
///
/// Cost: T · rows · 6·H² FLOPs. Numerics: the row rule. Reference: `oracle::gru::gru_backward`.
pub fn gru_backward(simd: Simd, args: GruBackward<'_>) {
    let GruBackward { shape, weight_hh, gates, h, d_out, d_x_part, d_h_part, d_h } = args;
    shape.check_weight("gru_backward", weight_hh, 3, 1);
    shape.check("gru_backward", "gates", gates.len(), shape.seq_len, 4);
    shape.check("gru_backward", "h", h.len(), shape.seq_len + 1, 1);
    shape.check("gru_backward", "d_out", d_out.len(), shape.seq_len, 1);
    shape.check("gru_backward", "d_x_part", d_x_part.len(), shape.seq_len, 3);
    shape.check("gru_backward", "d_h_part", d_h_part.len(), shape.seq_len, 3);
    shape.check("gru_backward", "d_h", d_h.len(), 1, 1);
    let (step, hidden) = (shape.step(1), shape.hidden_size);
    for t in (0..shape.seq_len).rev() {
        let now = t * step..(t + 1) * step;
        let d_x_part = &mut d_x_part[t * 3 * step..(t + 1) * 3 * step];
        let d_h_part = &mut d_h_part[t * 3 * step..(t + 1) * 3 * step];
        let gates = &gates[t * 4 * step..(t + 1) * 4 * step];
        backward_units(simd, hidden, gates, &h[now.clone()], &d_out[now], d_x_part, d_h_part, d_h);
        gemm(simd, shape.rows, d_h_part, 3 * hidden, weight_hh, d_h, hidden, true);
    }
}

simd_kernel! {
    fn forward_units(
        simd: Simd,
        hidden: usize,
        x_part: &[f32],
        h_part: &[f32],
        bias_hh: &[f32],
        h_previous: &[f32],
        gates: &mut [f32],
        h: &mut [f32],
    ) {
        let [b_r, b_z, b_n] = thirds(bias_hh);
        for (row, gates) in gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [x_r, x_z, x_n] = thirds(&x_part[3 * units.start..3 * units.end]);
            let [y_r, y_z, y_n] = thirds(&h_part[3 * units.start..3 * units.end]);
            let (r, rest) = gates.split_at_mut(hidden);
            let (z, rest) = rest.split_at_mut(hidden);
            let (n, q) = rest.split_at_mut(hidden);
            let input = [x_r, x_z, x_n, y_r, y_z, y_n, b_r, b_z, b_n, &h_previous[units.clone()]];
            map_units(input, [r, z, n, q, &mut h[units]], forward_unit);
        }
    }
}

#[inline(always)]
fn forward_unit(
    [x_r, x_z, x_n, y_r, y_z, y_n, b_r, b_z, b_n, h_previous]: [f32; 10],
    _: [f32; 5],
) -> [f32; 5] {
    let r = sigmoid(x_r + (y_r + b_r));
    let z = sigmoid(x_z + (y_z + b_z));
    let q = y_n + b_n;
    let n = tanh(r.mul_add(q, x_n));
    [r, z, n, q, z.mul_add(h_previous, (1.0 - z) * n)]
}

simd_kernel! {
    fn backward_units(
        simd: Simd,
        hidden: usize,
        gates: &[f32],
        h_previous: &[f32],
        d_out: &[f32],
        d_x_part: &mut [f32],
        d_h_part: &mut [f32],
        d_h: &mut [f32],
    ) {
        let parts = d_x_part.chunks_exact_mut(3 * hidden).zip(d_h_part.chunks_exact_mut(3 * hidden));
        for (row, (d_x_part, d_h_part)) in parts.enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let gates = &gates[4 * units.start..4 * units.end];
            let (r, rest) = gates.split_at(hidden);
            let (z, rest) = rest.split_at(hidden);
            let (n, q) = rest.split_at(hidden);
            let (to_x_r, rest) = d_x_part.split_at_mut(hidden);
            let (to_x_z, to_x_n) = rest.split_at_mut(hidden);
            let (to_h_r, rest) = d_h_part.split_at_mut(hidden);
            let (to_h_z, to_h_n) = rest.split_at_mut(hidden);
            let input = [r, z, n, q, &h_previous[units.clone()], &d_out[units.clone()]];
            let output = [to_x_r, to_x_z, to_x_n, to_h_r, to_h_z, to_h_n, &mut d_h[units]];
            map_units(input, output, backward_unit);
        }
    }
}

#[inline(always)]
fn backward_unit([r, z, n, q, h_previous, d_out]: [f32; 6], [_, _, _, _, _, _, d_h]: [f32; 7]) -> [f32; 7] {
    let d_h = d_out + d_h;
    let d_n = d_h * (1.0 - z) * (-n).mul_add(n, 1.0);
    let d_z = d_h * (h_previous - n) * (z * (1.0 - z));
    let d_r = d_n * q * (r * (1.0 - r));
    [d_r, d_z, d_n, d_r, d_z, d_n * r, d_h * z]
}

#[inline(always)]
fn thirds(parts: &[f32]) -> [&[f32]; 3] {
    let (first, rest) = parts.split_at(parts.len() / 3);
    let (second, third) = rest.split_at(parts.len() / 3);
    [first, second, third]
}

#[cfg(test)]
mod tests {
    use super::super::sequence::tests::{bits, distance, numbers, odd_shapes, row_of, widen};
    use super::*;
    use crate::oracle::cell::State;
    use crate::oracle::gru as oracle;
    use crate::oracle::parameters::Recurrent;

    struct Batch {
        x: Vec<f32>,
        h0: Vec<f32>,
        d_out: Vec<f32>,
        d_h: Vec<f32>,
    }

    struct Run {
        gates: Vec<f32>,
        h: Vec<f32>,
        d_x_part: Vec<f32>,
        d_h_part: Vec<f32>,
        d_h: Vec<f32>,
    }

    impl Run {
        /// The tensors, with their widths in H.
        fn tensors(&self) -> [(&[f32], usize); 5] {
            let Run { gates, h, d_x_part, d_h_part, d_h } = self;
            [(gates, 4), (h, 1), (d_x_part, 3), (d_h_part, 3), (d_h, 1)]
        }
    }

    fn batch(shape: SequenceShape) -> Batch {
        let (step, steps) = (shape.step(1), shape.seq_len);
        Batch {
            x: numbers(steps * 3 * step, 2.0, 2),
            h0: numbers(step, 1.0, 3),
            d_out: numbers(steps * step, 1.0, 4),
            d_h: numbers(step, 1.0, 5),
        }
    }

    fn parameters(hidden: usize) -> (Vec<f32>, Vec<f32>) {
        let weight = numbers(3 * hidden * hidden, 1.5 / (hidden as f32).sqrt(), 1);
        (weight, numbers(3 * hidden, 0.5, 6))
    }

    fn run(simd: Simd, shape: SequenceShape, batch: &Batch) -> Run {
        let (hidden, step) = (shape.hidden_size, shape.step(1));
        let (weight, bias_hh) = parameters(hidden);
        let mut packed = PackedMatrix::new(hidden, 3 * hidden);
        packed.pack_columns(&weight, hidden);
        let mut gates = vec![f32::NAN; shape.seq_len * 4 * step];
        let mut h = vec![f32::NAN; (shape.seq_len + 1) * step];
        h[..step].copy_from_slice(&batch.h0);
        gru_forward(
            simd,
            GruForward {
                shape,
                weight_hh: &packed,
                bias_hh: &bias_hh,
                x_part: &batch.x,
                h_part: &mut vec![f32::NAN; 3 * step],
                gates: &mut gates,
                h: &mut h,
            },
        );
        packed.reset(3 * hidden, hidden);
        packed.pack_rows(&weight, hidden);
        let mut d_x_part = vec![f32::NAN; shape.seq_len * 3 * step];
        let mut d_h_part = d_x_part.clone();
        let mut d_h = batch.d_h.clone();
        gru_backward(
            simd,
            GruBackward {
                shape,
                weight_hh: &packed,
                gates: &gates,
                h: &h,
                d_out: &batch.d_out,
                d_x_part: &mut d_x_part,
                d_h_part: &mut d_h_part,
                d_h: &mut d_h,
            },
        );
        Run { gates, h, d_x_part, d_h_part, d_h }
    }

    #[test]
    fn equals_the_oracle_at_every_level() {
        let mut largest = [0.0f64; 5];
        for shape in odd_shapes() {
            let hidden = shape.hidden_size;
            let batch = batch(shape);
            let got = run(Simd::detect(), shape, &batch);
            for simd in Simd::available() {
                for (other, got) in run(simd, shape, &batch).tensors().iter().zip(got.tensors()) {
                    assert_eq!(bits(other.0), bits(got.0), "{simd} {shape:?}");
                }
            }
            let (weight, bias) = parameters(hidden);
            let (weight, bias) = (widen(&weight), widen(&bias));
            let (options, weights) = (oracle::Gru::PLAIN, Recurrent::plain(&weight[..], &bias[..]));
            for row in 0..shape.rows {
                let of = |x: &[f32], width: usize| row_of(x, shape.rows, row, width * hidden);
                let (start, d_end) = (State::of_h(of(&batch.h0, 1)), State::of_h(of(&batch.d_h, 1)));
                let trace = oracle::gru_forward(options, &of(&batch.x, 3), &weights, &start);
                let gradient = oracle::gru_backward(options, &trace, &weights, &of(&batch.d_out, 1), &d_end);
                let wants = [&trace.gates, &trace.h, &gradient.d_x, &gradient.d_y, &gradient.d_start.h];
                for (at, ((got, width), want)) in got.tensors().into_iter().zip(wants).enumerate() {
                    largest[at] = largest[at].max(distance(&of(got, width), want));
                }
            }
        }
        println!(
            "gru against the oracle: gates, h, d_x_part, d_h_part, d_h0 {:?}",
            largest.map(|distance| format!("{distance:.2e}"))
        );
        assert!(largest.iter().all(|distance| *distance <= 1e-5));
    }

    #[test]
    fn a_row_alone_has_the_bits_of_the_row_in_company() {
        let shape = SequenceShape { seq_len: 4, rows: 9, hidden_size: 33 };
        let one = SequenceShape { rows: 1, ..shape };
        let all = batch(shape);
        let whole = run(Simd::detect(), shape, &all);
        for row in 0..shape.rows {
            let of = |x: &[f32], width: usize| -> Vec<f32> {
                let (step, alone) = (shape.step(width), one.step(width));
                x.chunks_exact(step).flat_map(|x| &x[row * alone..(row + 1) * alone]).copied().collect()
            };
            let batch = Batch {
                x: of(&all.x, 3),
                h0: of(&all.h0, 1),
                d_out: of(&all.d_out, 1),
                d_h: of(&all.d_h, 1),
            };
            for (got, (whole, width)) in
                run(Simd::detect(), one, &batch).tensors().iter().zip(whole.tensors())
            {
                assert_eq!(bits(got.0), bits(&of(whole, width)));
            }
        }
    }
}
