//! The LSTM over a block of rows, gates in PyTorch's order i, f, g, o.
//!
//! `i, f, o = σ(pre)`, `g = tanh(pre)`, `c_t = f·c_{t-1} + i·g`, `h_t = o·tanh(c_t)`, where
//! `pre_t = (W_ih x_t + b_ih + b_hh) + W_hh h_{t-1}` and the part in brackets is computed for all steps before.

use super::gemm::gemm;
use super::math::{sigmoid, tanh};
use super::pack::PackedMatrix;
use super::sequence::SequenceShape;
use super::simd::{Simd, map_units, simd_kernel};

/// Arguments of [`lstm_forward`].
#[derive(Debug)]
pub struct LstmForward<'a> {
    /// The block.
    pub shape: SequenceShape,
    /// `[H, 4·H]` (k, n): `pack_columns` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// `[T][rows][4·H]`: input part in, activated gates out.
    pub gates: &'a mut [f32],
    /// `[T + 1][rows][H]`, the first step given.
    pub h: &'a mut [f32],
    /// `[T + 1][rows][H]`, the first step given.
    pub c: &'a mut [f32],
}

/// Runs the block through all steps.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[H, 4·H]` packed by columns | in | shared by all blocks |
/// | `gates` | `[T][rows][4·H]` | in and out | in: `W_ih x + b_ih + b_hh`; out: i, f, g, o activated, kept for backward |
/// | `h` | `[T + 1][rows][H]` | `h[0]` in, rest out | `h[1..]` is the layer's output |
/// | `c` | `[T + 1][rows][H]` | `c[0]` in, rest out | kept for backward |
///
/// Cost: T · rows · (8·H² FLOPs + 3 sigmoid and 2 tanh per unit). Numerics: the row rule; `part + acc` per k block;
/// c is one fused multiply-add, `fma(f, c, i·g)`. Reference: `oracle::lstm::lstm_forward`.
pub fn lstm_forward(simd: Simd, args: LstmForward<'_>) {
    let LstmForward { shape, weight_hh, gates, h, c } = args;
    shape.check_weight("lstm_forward", weight_hh, 1, 4);
    shape.check("lstm_forward", "gates", gates.len(), shape.seq_len, 4);
    shape.check("lstm_forward", "h", h.len(), shape.seq_len + 1, 1);
    shape.check("lstm_forward", "c", c.len(), shape.seq_len + 1, 1);
    let (step, hidden) = (shape.step(1), shape.hidden_size);
    for t in 0..shape.seq_len {
        let gates = &mut gates[t * 4 * step..(t + 1) * 4 * step];
        let (h_past, h_future) = h.split_at_mut((t + 1) * step);
        let (c_past, c_future) = c.split_at_mut((t + 1) * step);
        gemm(simd, shape.rows, &h_past[t * step..], hidden, weight_hh, gates, 4 * hidden, true);
        forward_units(simd, hidden, gates, &c_past[t * step..], &mut c_future[..step], &mut h_future[..step]);
    }
}

/// Arguments of [`lstm_backward`].
#[derive(Debug)]
pub struct LstmBackward<'a> {
    /// The block.
    pub shape: SequenceShape,
    /// `[4·H, H]` (k, n): `pack_rows` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// `[T][rows][4·H]`, activated, as the forward pass left it.
    pub gates: &'a [f32],
    /// `[T + 1][rows][H]`, as the forward pass left it.
    pub c: &'a [f32],
    /// `[T][rows][H]`.
    pub d_out: &'a [f32],
    /// `[T][rows][4·H]`, written.
    pub d_gates: &'a mut [f32],
    /// `[rows][H]`, the carry of h.
    pub d_h: &'a mut [f32],
    /// `[rows][H]`, the carry of c.
    pub d_c: &'a mut [f32],
}

/// Back through time. With `d_h += d_out_t` and `d_c += d_h·o·(1 - tanh²c_t)`:
/// `d_i = d_c·g·i(1-i)`, `d_f = d_c·c_{t-1}·f(1-f)`, `d_g = d_c·i·(1-g²)`, `d_o = d_h·tanh(c_t)·o(1-o)`,
/// then `d_c = d_c·f` and `d_h = W_hhᵀ d_gates_t`.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[4·H, H]` packed by rows | in | |
/// | `gates`, `c` | as left by [`lstm_forward`] | in | tanh(c) is computed again: one tanh against a third stored array |
/// | `d_out` | `[T][rows][H]` | in | from the layer above or the head, for every step |
/// | `d_gates` | `[T][rows][4·H]` | out | before activation: of W_ih x, W_hh h and both biases alike |
/// | `d_h`, `d_c` | `[rows][H]` | in and out | in: gradients of the final state beside `d_out` (zeros if none); out: of `h[0]`, `c[0]` |
///
/// Cost: T · rows · (8·H² FLOPs + 1 tanh per unit). Reference: `oracle::lstm::lstm_backward`.
pub fn lstm_backward(simd: Simd, args: LstmBackward<'_>) {
    let LstmBackward { shape, weight_hh, gates, c, d_out, d_gates, d_h, d_c } = args;
    shape.check_weight("lstm_backward", weight_hh, 4, 1);
    shape.check("lstm_backward", "gates", gates.len(), shape.seq_len, 4);
    shape.check("lstm_backward", "c", c.len(), shape.seq_len + 1, 1);
    shape.check("lstm_backward", "d_out", d_out.len(), shape.seq_len, 1);
    shape.check("lstm_backward", "d_gates", d_gates.len(), shape.seq_len, 4);
    shape.check("lstm_backward", "d_h", d_h.len(), 1, 1);
    shape.check("lstm_backward", "d_c", d_c.len(), 1, 1);
    let (step, hidden) = (shape.step(1), shape.hidden_size);
    for t in (0..shape.seq_len).rev() {
        let now = t * step..(t + 1) * step;
        let now_gates = t * 4 * step..(t + 1) * 4 * step;
        let d_gates = &mut d_gates[now_gates.clone()];
        let c = &c[t * step..(t + 2) * step];
        backward_units(simd, hidden, &gates[now_gates], c, &d_out[now], d_h, d_gates, d_c);
        gemm(simd, shape.rows, d_gates, 4 * hidden, weight_hh, d_h, hidden, false);
    }
}

simd_kernel! {
    fn forward_units(
        simd: Simd,
        hidden: usize,
        gates: &mut [f32],
        c_previous: &[f32],
        c: &mut [f32],
        h: &mut [f32],
    ) {
        for (row, gates) in gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let (i, rest) = gates.split_at_mut(hidden);
            let (f, rest) = rest.split_at_mut(hidden);
            let (g, o) = rest.split_at_mut(hidden);
            let (c, h) = (&mut c[units.clone()], &mut h[units.clone()]);
            map_units([&c_previous[units]], [i, f, g, o, c, h], forward_unit);
        }
    }
}

#[inline(always)]
fn forward_unit([c_previous]: [f32; 1], [i, f, g, o, _, _]: [f32; 6]) -> [f32; 6] {
    let (i, f, g, o) = (sigmoid(i), sigmoid(f), tanh(g), sigmoid(o));
    let c = f.mul_add(c_previous, i * g);
    [i, f, g, o, c, o * tanh(c)]
}

simd_kernel! {
    /// `c` holds two steps, c_{t-1} and c_t.
    fn backward_units(
        simd: Simd,
        hidden: usize,
        gates: &[f32],
        c: &[f32],
        d_out: &[f32],
        d_h: &[f32],
        d_gates: &mut [f32],
        d_c: &mut [f32],
    ) {
        let (c_previous, c) = c.split_at(c.len() / 2);
        for (row, d_gates) in d_gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let gates = &gates[4 * units.start..4 * units.end];
            let (i, rest) = gates.split_at(hidden);
            let (f, rest) = rest.split_at(hidden);
            let (g, o) = rest.split_at(hidden);
            let (d_i, rest) = d_gates.split_at_mut(hidden);
            let (d_f, rest) = rest.split_at_mut(hidden);
            let (d_g, d_o) = rest.split_at_mut(hidden);
            let cells = [&c_previous[units.clone()], &c[units.clone()]];
            let input = [i, f, g, o, cells[0], cells[1], &d_out[units.clone()], &d_h[units.clone()]];
            map_units(input, [d_i, d_f, d_g, d_o, &mut d_c[units]], backward_unit);
        }
    }
}

#[inline(always)]
fn backward_unit([i, f, g, o, c_previous, c, d_out, d_h]: [f32; 8], [_, _, _, _, d_c]: [f32; 5]) -> [f32; 5] {
    let tanh_c = tanh(c);
    let d_h = d_out + d_h;
    let d_c = (d_h * o).mul_add((-tanh_c).mul_add(tanh_c, 1.0), d_c);
    let d_i = d_c * g * (i * (1.0 - i));
    let d_f = d_c * c_previous * (f * (1.0 - f));
    let d_g = d_c * i * (-g).mul_add(g, 1.0);
    let d_o = d_h * tanh_c * (o * (1.0 - o));
    [d_i, d_f, d_g, d_o, d_c * f]
}

#[cfg(test)]
mod tests {
    use super::super::sequence::tests::{bits, distance, numbers, odd_shapes, row_of, widen};
    use super::*;
    use crate::oracle::cell::State;
    use crate::oracle::lstm as oracle;
    use crate::oracle::parameters::Recurrent;

    struct Batch {
        x: Vec<f32>,
        h0: Vec<f32>,
        c0: Vec<f32>,
        d_out: Vec<f32>,
        d_h: Vec<f32>,
        d_c: Vec<f32>,
    }

    struct Run {
        gates: Vec<f32>,
        h: Vec<f32>,
        c: Vec<f32>,
        d_gates: Vec<f32>,
        d_h: Vec<f32>,
        d_c: Vec<f32>,
    }

    impl Run {
        /// The tensors, with their widths in H.
        fn tensors(&self) -> [(&[f32], usize); 6] {
            let Run { gates, h, c, d_gates, d_h, d_c } = self;
            [(gates, 4), (h, 1), (c, 1), (d_gates, 4), (d_h, 1), (d_c, 1)]
        }
    }

    fn batch(shape: SequenceShape) -> Batch {
        let (step, steps) = (shape.step(1), shape.seq_len);
        Batch {
            x: numbers(steps * 4 * step, 2.0, 2),
            h0: numbers(step, 1.0, 3),
            c0: numbers(step, 2.0, 4),
            d_out: numbers(steps * step, 1.0, 5),
            d_h: numbers(step, 1.0, 6),
            d_c: numbers(step, 1.0, 7),
        }
    }

    fn weight(hidden: usize) -> Vec<f32> {
        numbers(4 * hidden * hidden, 1.5 / (hidden as f32).sqrt(), 1)
    }

    fn run(simd: Simd, shape: SequenceShape, batch: &Batch) -> Run {
        let (hidden, step) = (shape.hidden_size, shape.step(1));
        let weight = weight(hidden);
        let mut packed = PackedMatrix::new(hidden, 4 * hidden);
        packed.pack_columns(&weight, hidden);
        let mut gates = batch.x.clone();
        let mut h = vec![f32::NAN; (shape.seq_len + 1) * step];
        let mut c = h.clone();
        h[..step].copy_from_slice(&batch.h0);
        c[..step].copy_from_slice(&batch.c0);
        lstm_forward(
            simd,
            LstmForward { shape, weight_hh: &packed, gates: &mut gates, h: &mut h, c: &mut c },
        );
        packed.reset(4 * hidden, hidden);
        packed.pack_rows(&weight, hidden);
        let mut d_gates = vec![f32::NAN; gates.len()];
        let (mut d_h, mut d_c) = (batch.d_h.clone(), batch.d_c.clone());
        lstm_backward(
            simd,
            LstmBackward {
                shape,
                weight_hh: &packed,
                gates: &gates,
                c: &c,
                d_out: &batch.d_out,
                d_gates: &mut d_gates,
                d_h: &mut d_h,
                d_c: &mut d_c,
            },
        );
        Run { gates, h, c, d_gates, d_h, d_c }
    }

    #[test]
    fn equals_the_oracle_at_every_level() {
        let mut largest = [0.0f64; 6];
        for shape in odd_shapes() {
            let hidden = shape.hidden_size;
            let batch = batch(shape);
            let got = run(Simd::detect(), shape, &batch);
            for simd in Simd::available() {
                for (other, got) in run(simd, shape, &batch).tensors().iter().zip(got.tensors()) {
                    assert_eq!(bits(other.0), bits(got.0), "{simd} {shape:?}");
                }
            }
            let (weight, bias) = (widen(&weight(hidden)), vec![0.0; 4 * hidden]);
            let (options, weights) = (oracle::Lstm::PLAIN, Recurrent::plain(&weight[..], &bias[..]));
            for row in 0..shape.rows {
                let of = |x: &[f32], width: usize| row_of(x, shape.rows, row, width * hidden);
                let start = State { h: of(&batch.h0, 1), c: of(&batch.c0, 1) };
                let d_end = State { h: of(&batch.d_h, 1), c: of(&batch.d_c, 1) };
                let trace = oracle::lstm_forward(options, &of(&batch.x, 4), &weights, &start);
                let gradient = oracle::lstm_backward(options, &trace, &weights, &of(&batch.d_out, 1), &d_end);
                let State { h: d_h0, c: d_c0 } = &gradient.d_start;
                let wants = [&trace.gates, &trace.h, &trace.c, &gradient.d_x, d_h0, d_c0];
                for (at, ((got, width), want)) in got.tensors().into_iter().zip(wants).enumerate() {
                    largest[at] = largest[at].max(distance(&of(got, width), want));
                }
            }
        }
        println!(
            "lstm against the oracle: gates, h, c, d_gates, d_h0, d_c0 {:?}",
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
                x: of(&all.x, 4),
                h0: of(&all.h0, 1),
                c0: of(&all.c0, 1),
                d_out: of(&all.d_out, 1),
                d_h: of(&all.d_h, 1),
                d_c: of(&all.d_c, 1),
            };
            for (got, (whole, width)) in
                run(Simd::detect(), one, &batch).tensors().iter().zip(whole.tensors())
            {
                assert_eq!(bits(got.0), bits(&of(whole, width)));
            }
        }
    }
}
