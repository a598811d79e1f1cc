//! A row of a case on the CPU: what a device's kernels are held against.

use super::case::{Case, Data, Row, RowResult};
use crate::cpu::gru::{GruBackward, GruForward, GruWeights, gru_backward, gru_forward};
use crate::cpu::lstm::{
    LstmBackward, LstmForward, LstmOptions, LstmProjection, LstmProjectionBackward, Peepholes, lstm_backward,
    lstm_forward,
};
use crate::cpu::pack::PackedMatrix;
use crate::cpu::rnn::{RnnBackward, RnnForward, rnn_backward, rnn_forward};
use crate::cpu::sequence::tests::widen;
use crate::cpu::sequence::{InputPart, SequenceShape};
use crate::cpu::simd::Simd;
use protocol::cell::{Cell, Reset};
use protocol::job::Precision;

/// A weight `[n, k]` as both passes want it.
struct Packed {
    forward: PackedMatrix,
    backward: PackedMatrix,
}

impl Packed {
    fn new(precision: Precision, weight: &[f32], k: usize) -> Self {
        let n = weight.len() / k;
        let room = |k, n| PackedMatrix::with_precision(precision, k, n);
        let (mut forward, mut backward) = (room(k, n), room(n, k));
        forward.pack_columns(Simd::detect(), weight, k);
        backward.pack_rows(Simd::detect(), weight, k);
        Self { forward, backward }
    }
}

impl Case {
    /// One row by the CPU's kernels, as a block of its own.
    pub(super) fn on_cpu(&self, data: &Data, row: usize) -> RowResult {
        let row = &data.rows[row];
        let active = vec![1; row.length];
        let shape = SequenceShape { active: &active, hidden_size: self.hidden, output_size: self.output() };
        let tensors = match self.cell {
            Cell::Rnn => self.rnn_on_cpu(data, row, shape),
            Cell::Lstm => self.lstm_on_cpu(data, row, shape),
            Cell::Gru => self.gru_on_cpu(data, row, shape),
        };
        let mut result = tensors.iter().map(|(name, values)| (*name, widen(values))).collect();
        self.sum_projections(&mut result);
        result
    }

    fn rnn_on_cpu(&self, data: &Data, row: &Row, shape: SequenceShape<'_>) -> Tensors {
        let (simd, hidden, activation) = (Simd::detect(), self.hidden, self.options.activation);
        let Packed { forward, backward } = &Packed::new(self.precision, &data.weights.weight_hh, hidden);
        let (mut pre, mut h) = (with_biases(&row.x, &data.weights.bias_hh), started(&row.h0, row.length));
        rnn_forward(
            simd,
            RnnForward {
                shape,
                activation,
                weight_hh: forward,
                input: InputPart::InPlace,
                pre: &mut pre,
                h: &mut h,
            },
        );
        let (mut d_pre, mut d_h) = (unwritten(row.length * hidden), vec![0.0; hidden]);
        rnn_backward(
            simd,
            RnnBackward {
                shape,
                activation,
                weight_hh: backward,
                h: &h,
                d_out: &row.d_out,
                d_pre: &mut d_pre,
                d_h: &mut d_h,
            },
        );
        vec![("h", h), ("d_gates", d_pre), ("d_start_h", d_h)]
    }

    fn lstm_on_cpu(&self, data: &Data, row: &Row, shape: SequenceShape<'_>) -> Tensors {
        let (simd, hidden, output, length) = (Simd::detect(), self.hidden, self.output(), row.length);
        let weights = &data.weights;
        let options = LstmOptions {
            recurrent_activation: self.options.recurrent_activation,
            cell_clip: self.options.cell_clip,
            peepholes: weights.peepholes.as_ref().map(|p| Peepholes { i: &p.i, f: &p.f, o: &p.o }),
        };
        let weight_hh = Packed::new(self.precision, &weights.weight_hh, output);
        let weight_hr = weights.weight_hr.as_ref().map(|weight| Packed::new(self.precision, weight, hidden));
        let weight_hr = weight_hr.as_ref();
        let mut gates = with_biases(&row.x, &weights.bias_hh);
        let (mut h, mut c) = (started(&row.h0, length), started(&row.c0, length));
        let mut m = unwritten(length * hidden);
        lstm_forward(
            simd,
            LstmForward {
                shape,
                options,
                weight_hh: &weight_hh.forward,
                projection: weight_hr
                    .map(|weight_hr| LstmProjection { weight_hr: &weight_hr.forward, m: &mut m }),
                input: InputPart::InPlace,
                gates: &mut gates,
                h: &mut h,
                c: &mut c,
            },
        );
        let mut d_gates = gates.clone();
        let (mut d_h, mut d_c) = (vec![0.0; output], vec![0.0; hidden]);
        let (mut d_projected, mut d_m) = (unwritten(length * output), unwritten(hidden));
        lstm_backward(
            simd,
            LstmBackward {
                shape,
                options,
                weight_hh: &weight_hh.backward,
                projection: weight_hr.map(|weight_hr| LstmProjectionBackward {
                    weight_hr: &weight_hr.backward,
                    d_projected: &mut d_projected,
                    d_m: &mut d_m,
                }),
                gates: &mut d_gates,
                c: &c,
                d_out: &row.d_out,
                d_h: &mut d_h,
                d_c: &mut d_c,
            },
        );
        let mut tensors = vec![("gates", gates), ("h", h), ("c", c)];
        tensors.extend([("d_gates", d_gates), ("d_start_h", d_h), ("d_start_c", d_c)]);
        if weight_hr.is_some() {
            tensors.extend([("m", m), ("d_projected", d_projected)]);
        }
        tensors
    }

    fn gru_on_cpu(&self, data: &Data, row: &Row, shape: SequenceShape<'_>) -> Tensors {
        let (simd, hidden) = (Simd::detect(), self.hidden);
        let recurrent_activation = self.options.recurrent_activation;
        let weight_hh = &data.weights.weight_hh;
        let all = Packed::new(self.precision, weight_hh, hidden);
        let [gates, candidate] = {
            let (gates, candidate) = weight_hh.split_at(2 * hidden * hidden);
            [gates, candidate].map(|weight| Packed::new(self.precision, weight, hidden))
        };
        let of = |pass: fn(&Packed) -> &PackedMatrix| match self.options.reset {
            Reset::After => GruWeights::After(pass(&all)),
            Reset::Before => GruWeights::Before { gates: pass(&gates), candidate: pass(&candidate) },
        };
        // x in the places of r, z and n; what the reset acts on, or has made, comes behind them.
        let x = row.x.chunks(3 * hidden);
        let mut gates: Vec<f32> = x.flat_map(|x| [x, &unwritten(hidden)].concat()).collect();
        let (mut h, mut h_part) = (started(&row.h0, row.length), unwritten(3 * hidden));
        gru_forward(
            simd,
            GruForward {
                shape,
                recurrent_activation,
                weight_hh: of(|weight| &weight.forward),
                bias_hh: &data.weights.bias_hh,
                h_part: &mut h_part,
                gates: &mut gates,
                h: &mut h,
            },
        );
        let (mut d_gates, mut d_h) = (gates.clone(), vec![0.0; hidden]);
        gru_backward(
            simd,
            GruBackward {
                shape,
                recurrent_activation,
                weight_hh: of(|weight| &weight.backward),
                gates: &mut d_gates,
                h: &h,
                d_out: &row.d_out,
                d_h: &mut d_h,
                d_h_part: &mut h_part,
            },
        );
        vec![("gates", gates), ("h", h), ("d_gates", d_gates), ("d_start_h", d_h)]
    }
}

/// What the kernels leave of a row.
type Tensors = Vec<(&'static str, Vec<f32>)>;

/// `x` `[T][G·H]` with the biases `[G·H]`.
fn with_biases(x: &[f32], biases: &[f32]) -> Vec<f32> {
    x.chunks(biases.len()).flat_map(|x| x.iter().zip(biases).map(|(x, bias)| x + bias)).collect()
}

/// The states `[T + 1][w]` of which only the start is known.
fn started(start: &[f32], steps: usize) -> Vec<f32> {
    [start, &unwritten(steps * start.len())].concat()
}

/// NaN, to be written.
fn unwritten(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}
