//! A block of rows on its way through the network and back, on one thread.
//!
//! Nothing in here looks at another row, so which rows share a block changes no bit.

use std::ops::Range;

use kernels::cpu::dropout::{MaskStream, dropout_backward, dropout_forward};
use kernels::cpu::gru::{GruBackward, GruForward, gru_backward, gru_forward};
use kernels::cpu::input::{broadcast_rows, gather_rows};
use kernels::cpu::lstm::{LstmBackward, LstmForward, lstm_backward, lstm_forward};
use kernels::cpu::rnn::{RnnBackward, RnnForward, rnn_backward, rnn_forward};
use kernels::cpu::sequence::SequenceShape;
use kernels::cpu::softmax::{softmax_cross_entropy, softmax_cross_entropy_forward};
use kernels::{Simd, gemm};
use protocol::cell::Cell;
use protocol::layout::{Head, Input, ModelShape, StateLayout};

use crate::device::StepInput;

use super::weights::{InputWeights, LayerWeights, Weights};

/// What the rows of a block read.
#[derive(Debug, Clone, Copy)]
pub(super) enum BlockInputs<'a> {
    /// `[rows][T + 1]`
    Tokens(&'a [u16]),
    /// `[rows][T][I]` and `[rows]`
    Bytes { bytes: &'a [u8], labels: &'a [u16] },
}

/// The dropout of one training step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dropout {
    pub(super) keep: f32,
    pub(super) seed: u64,
    pub(super) step: u64,
    /// Slot of the batch's first row.
    pub(super) first_slot: u32,
}

/// What one row adds to the sums of its shard.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RowResult {
    pub(super) loss: f64,
    pub(super) weight: u64,
    pub(super) correct: u64,
}

/// Rows and all that is kept of them between forward, backward and the weight gradients. Time-major: `[T][rows][·]`.
#[derive(Default)]
pub(super) struct RowBlock {
    /// The rows, counted from the batch's first.
    pub(super) rows: Range<usize>,
    seq_len: usize,
    layers: Vec<LayerTrace>,
    /// Tokens `[T][rows]` of a one-hot input.
    tokens: Vec<u32>,
    /// Dense input `[T][rows][I]`.
    dense: Vec<f32>,
    /// `[T or 1][rows]`
    targets: Vec<u32>,
    /// `[T or 1][rows][V]`; after the backward pass the gradient of the logits.
    logits: Vec<f32>,
    /// `[T or 1][rows]`
    losses: Vec<f64>,
    correct: Vec<bool>,
    /// Gradient of the output of the layer under way, `[T][rows][H]`.
    d_out: Vec<f32>,
    /// Carries of h and c, `[rows][H]`.
    d_h: Vec<f32>,
    d_c: Vec<f32>,
}

/// One layer's trace.
#[derive(Default)]
struct LayerTrace {
    /// The input's part of the gates, `[T][rows][G·H]`; for RNN and LSTM the gates themselves in the end.
    pre: Vec<f32>,
    /// GRU: r, z, n, q, `[T][rows][4·H]`.
    gates: Vec<f32>,
    /// GRU: scratch `[rows][3·H]`.
    h_part: Vec<f32>,
    /// `[T + 1][rows][H]`
    h: Vec<f32>,
    /// LSTM: `[T + 1][rows][H]`
    c: Vec<f32>,
    /// The output after dropout, `[T][rows][H]`; empty without dropout.
    dropped: Vec<f32>,
    /// Gradient of the input's part of the gates, `[T][rows][G·H]`.
    d_pre: Vec<f32>,
    /// GRU: gradient of the state's part, `[T][rows][3·H]`.
    d_h_part: Vec<f32>,
}

impl RowBlock {
    /// Takes over these rows of a batch. Keeps its memory.
    pub(super) fn resize(&mut self, shape: &ModelShape, seq_len: usize, rows: Range<usize>) {
        let (n, hidden) = (rows.len(), shape.hidden_sizes[0]);
        let (unit, gates) = (n * hidden, shape.cell.gates() * n * hidden);
        let targets = if shape.head == Head::EveryStep { seq_len * n } else { n };
        (self.rows, self.seq_len) = (rows, seq_len);
        self.layers.resize_with(shape.num_layers(), LayerTrace::default);
        for layer in &mut self.layers {
            layer.pre.resize(seq_len * gates, 0.0);
            layer.h.resize((seq_len + 1) * unit, 0.0);
            match shape.cell {
                Cell::Rnn => {}
                Cell::Lstm => layer.c.resize((seq_len + 1) * unit, 0.0),
                Cell::Gru => {
                    layer.gates.resize(seq_len * 4 * unit, 0.0);
                    layer.h_part.resize(3 * unit, 0.0);
                }
            }
        }
        self.targets.resize(targets, 0);
        self.logits.resize(targets * shape.classes, 0.0);
        self.losses.resize(targets, 0.0);
        self.correct.resize(targets, false);
    }

    /// Bytes of blocks of `rows` rows in all, however they are cut, after a training step.
    pub(super) fn bytes_of(shape: &ModelShape, seq_len: usize, rows: usize, has_dropout: bool) -> usize {
        let (unit, steps) = (rows * shape.hidden_sizes[0], seq_len * rows * shape.hidden_sizes[0]);
        let gates = shape.cell.gates() * steps;
        let cell = match shape.cell {
            Cell::Rnn => 0,
            Cell::Lstm => steps + unit,
            Cell::Gru => 4 * steps + 3 * unit + 3 * steps,
        };
        let layers: usize = (0..shape.num_layers())
            .map(|index| {
                let dropped = if has_dropout && drops_output(shape, index) { steps } else { 0 };
                2 * gates + steps + unit + cell + dropped
            })
            .sum();
        let inputs = match shape.input {
            Input::OneHot(_) | Input::Embedding { .. } => seq_len * rows,
            Input::Bytes(width) => seq_len * rows * width,
        };
        let targets = if shape.head == Head::EveryStep { seq_len * rows } else { rows };
        let floats = layers + inputs + targets * (1 + shape.classes) + steps + 2 * unit;
        size_of::<f32>() * floats + targets * (size_of::<f64>() + size_of::<bool>())
    }

    /// Bytes that this block holds.
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        let layer = |layer: &LayerTrace| {
            let LayerTrace { pre, gates, h_part, h, c, dropped, d_pre, d_h_part } = layer;
            [pre, gates, h_part, h, c, dropped, d_pre, d_h_part].into_iter().map(Vec::len).sum::<usize>()
        };
        let Self { layers, tokens, dense, targets, logits, losses, correct, d_out, d_h, d_c, .. } = self;
        let floats: usize = [dense, logits, d_out, d_h, d_c].into_iter().map(Vec::len).sum();
        4 * (layers.iter().map(layer).sum::<usize>() + floats + tokens.len() + targets.len())
            + 8 * losses.len()
            + correct.len()
    }

    /// Number of rows.
    fn len(&self) -> usize {
        self.rows.len()
    }

    /// Time steps, `T`.
    pub(super) fn seq_len(&self) -> usize {
        self.seq_len
    }

    fn sequence(&self, hidden_size: usize) -> SequenceShape {
        SequenceShape { seq_len: self.seq_len, rows: self.len(), hidden_size }
    }

    /// Through all layers and steps to the loss. `state` is `[rows][state_size]`. If a backward pass follows, the
    /// logits are replaced by their gradient.
    #[allow(clippy::too_many_arguments, reason = "what a forward pass is made of; one caller")]
    pub(super) fn forward(
        &mut self,
        simd: Simd,
        layout: &StateLayout,
        weights: &Weights,
        inputs: BlockInputs<'_>,
        state: &[f32],
        dropout: Option<Dropout>,
        backward: bool,
    ) {
        let shape = &layout.shape;
        self.read(shape, inputs);
        self.load_state(shape, state);
        self.layers_forward(simd, shape, weights, dropout);
        self.project_output(simd, shape, weights);
        let Self { logits, targets, losses, correct, .. } = self;
        if backward {
            softmax_cross_entropy(simd, shape.classes, targets, logits, losses, correct);
        } else {
            softmax_cross_entropy_forward(simd, shape.classes, targets, logits, losses, correct);
        }
    }

    /// One step of a block of one row and one step, from the state in which the step before has left it (zeros at
    /// first), without dropout. Gives the logits `[V]`. Once its memory has grown, it allocates nothing.
    pub(super) fn forward_one_step(
        &mut self,
        simd: Simd,
        shape: &ModelShape,
        weights: &Weights,
        input: StepInput<'_>,
    ) -> &[f32] {
        assert!(
            (self.len(), self.seq_len) == (1, 1),
            "forward_one_step: the block has more than one step of one row"
        );
        match (input, shape.input) {
            (StepInput::Token(token), Input::OneHot(_)) => {
                self.tokens.resize(1, 0);
                self.tokens[0] = token;
            }
            (StepInput::Bytes(bytes), Input::Bytes(width)) if bytes.len() == width => {
                self.dense.resize(width, 0.0);
                scale_bytes(bytes, &mut self.dense);
            }
            (input, expected) => panic!("forward_one_step: the input is {input:?}, expected {expected:?}"),
        }
        for layer in &mut self.layers {
            layer.h.copy_within(shape.hidden_sizes[0].., 0);
            if shape.cell == Cell::Lstm {
                layer.c.copy_within(shape.hidden_sizes[0].., 0);
            }
        }
        self.layers_forward(simd, shape, weights, None);
        self.project_output(simd, shape, weights);
        &self.logits
    }

    /// Through all layers, one after the other, each through all steps.
    fn layers_forward(
        &mut self,
        simd: Simd,
        shape: &ModelShape,
        weights: &Weights,
        dropout: Option<Dropout>,
    ) {
        for index in 0..shape.num_layers() {
            self.project_input(simd, shape, &weights.layers[index], index);
            self.layer_forward(simd, shape, &weights.layers[index], index);
            match dropout {
                Some(dropout) if drops_output(shape, index) => self.drop_output(simd, shape, index, dropout),
                _ => self.layers[index].dropped.clear(),
            }
        }
    }

    /// Copies inputs and targets to time-major order.
    fn read(&mut self, shape: &ModelShape, inputs: BlockInputs<'_>) {
        let (n, seq_len) = (self.len(), self.seq_len);
        match inputs {
            BlockInputs::Tokens(tokens) => {
                self.tokens.resize(seq_len * n, 0);
                for (row, tokens) in tokens.chunks_exact(seq_len + 1).enumerate() {
                    for t in 0..seq_len {
                        self.tokens[t * n + row] = u32::from(tokens[t]);
                        self.targets[t * n + row] = u32::from(tokens[t + 1]);
                    }
                }
            }
            BlockInputs::Bytes { bytes, labels } => {
                let width = shape.input.size();
                self.dense.resize(seq_len * n * width, 0.0);
                for (row, bytes) in bytes.chunks_exact(seq_len * width).enumerate() {
                    for (t, bytes) in bytes.chunks_exact(width).enumerate() {
                        let place = &mut self.dense[(t * n + row) * width..][..width];
                        scale_bytes(bytes, place);
                    }
                    self.targets[row] = u32::from(labels[row]);
                }
            }
        }
    }

    /// Sets h and c before the first step; zeros where rows carry no state.
    fn load_state(&mut self, shape: &ModelShape, state: &[f32]) {
        let (n, hidden) = (self.len(), shape.hidden_sizes[0]);
        let (vectors, size) = ((1 + usize::from(shape.cell == Cell::Lstm)), shape.state_size());
        for (index, layer) in self.layers.iter_mut().enumerate() {
            for (vector, place) in [&mut layer.h, &mut layer.c].into_iter().take(vectors).enumerate() {
                if size == 0 {
                    place[..n * hidden].fill(0.0);
                    continue;
                }
                let at = (index * vectors + vector) * hidden;
                for (row, place) in place[..n * hidden].chunks_exact_mut(hidden).enumerate() {
                    place.copy_from_slice(&state[row * size + at..][..hidden]);
                }
            }
        }
    }

    /// Writes h and c after the last step to `[rows][state_size]`.
    pub(super) fn store_state(&self, shape: &ModelShape, state: &mut [f32]) {
        let (n, hidden) = (self.len(), shape.hidden_sizes[0]);
        let (vectors, size) = ((1 + usize::from(shape.cell == Cell::Lstm)), shape.state_size());
        if size == 0 {
            return;
        }
        let last = self.seq_len * n * hidden;
        for (index, layer) in self.layers.iter().enumerate() {
            for (vector, values) in [&layer.h, &layer.c].into_iter().take(vectors).enumerate() {
                let at = (index * vectors + vector) * hidden;
                for (row, values) in values[last..].chunks_exact(hidden).enumerate() {
                    state[row * size + at..][..hidden].copy_from_slice(values);
                }
            }
        }
    }

    /// The input's part of the gates for all steps.
    fn project_input(&mut self, simd: Simd, shape: &ModelShape, weights: &LayerWeights, index: usize) {
        let gates = shape.cell.gates() * shape.hidden_sizes[0];
        let (below, from) = self.layers.split_at_mut(index);
        let pre = &mut from[0].pre;
        match &weights.input {
            InputWeights::Table(table) => {
                gather_rows(table, &self.tokens, pre);
            }
            InputWeights::Dense { forward, .. } => {
                broadcast_rows(&weights.bias, pre);
                let n = self.rows.len();
                let x = below.last().map_or(&self.dense[..], |layer| layer.output(n * shape.hidden_sizes[0]));
                let width = shape.layer(index).input_size;
                gemm(simd, self.seq_len * n, x, width, forward, pre, gates, true);
            }
        }
    }

    fn layer_forward(&mut self, simd: Simd, shape: &ModelShape, weights: &LayerWeights, index: usize) {
        let sequence = self.sequence(shape.hidden_sizes[0]);
        let LayerTrace { pre, gates, h_part, h, c, .. } = &mut self.layers[index];
        let weight_hh = &weights.hidden;
        match shape.cell {
            Cell::Rnn => rnn_forward(simd, RnnForward { shape: sequence, weight_hh, pre, h }),
            Cell::Lstm => lstm_forward(simd, LstmForward { shape: sequence, weight_hh, gates: pre, h, c }),
            Cell::Gru => {
                let bias_hh = &weights.bias_hh;
                gru_forward(
                    simd,
                    GruForward { shape: sequence, weight_hh, bias_hh, x_part: pre, h_part, gates, h },
                );
            }
        }
    }

    fn drop_output(&mut self, simd: Simd, shape: &ModelShape, index: usize, dropout: Dropout) {
        let (n, hidden) = (self.len(), shape.hidden_sizes[0]);
        let (rows, seq_len) = (self.rows.clone(), self.seq_len);
        let LayerTrace { h, dropped, .. } = &mut self.layers[index];
        dropped.resize(seq_len * n * hidden, 0.0);
        let output = h[n * hidden..].chunks_exact(hidden);
        for (at, (x, y)) in output.zip(dropped.chunks_exact_mut(hidden)).enumerate() {
            let stream = mask(shape, dropout, rows.start + at % n, at / n, index);
            dropout_forward(simd, dropout.keep, stream, x, y);
        }
    }

    /// The logits of every target.
    fn project_output(&mut self, simd: Simd, shape: &ModelShape, weights: &Weights) {
        let (unit, classes) = (self.len() * shape.hidden_sizes[0], shape.classes);
        let Self { layers, logits, targets, .. } = self;
        let output = head_input(shape, layers, unit);
        broadcast_rows(&weights.head_bias, logits);
        gemm(simd, targets.len(), output, shape.hidden_sizes[0], &weights.head, logits, classes, true);
    }

    /// Back through head, layers and steps to the gates' gradients.
    pub(super) fn backward(
        &mut self,
        simd: Simd,
        layout: &StateLayout,
        weights: &Weights,
        dropout: Option<Dropout>,
    ) {
        let shape = &layout.shape;
        let (hidden, n, seq_len) = (shape.hidden_sizes[0], self.len(), self.seq_len);
        let unit = n * hidden;
        self.d_out.resize(seq_len * unit, 0.0);
        let first_read = if shape.head == Head::EveryStep { 0 } else { (seq_len - 1) * unit };
        self.d_out[..first_read].fill(0.0);
        let d_read = &mut self.d_out[first_read..];
        gemm(
            simd,
            self.targets.len(),
            &self.logits,
            shape.classes,
            &weights.head_backward,
            d_read,
            hidden,
            false,
        );
        for index in (0..shape.num_layers()).rev() {
            if let Some(dropout) = dropout.filter(|_| drops_output(shape, index)) {
                for (at, d) in self.d_out.chunks_exact_mut(hidden).enumerate() {
                    let stream = mask(shape, dropout, self.rows.start + at % n, at / n, index);
                    dropout_backward(simd, dropout.keep, stream, d);
                }
            }
            self.layer_backward(simd, shape, &weights.layers[index], index);
            if index > 0
                && let InputWeights::Dense { backward, .. } = &weights.layers[index].input
            {
                let gates = shape.cell.gates() * hidden;
                let d_pre = &self.layers[index].d_pre;
                gemm(simd, seq_len * n, d_pre, gates, backward, &mut self.d_out, hidden, false);
            }
        }
    }

    fn layer_backward(&mut self, simd: Simd, shape: &ModelShape, weights: &LayerWeights, index: usize) {
        let sequence = self.sequence(shape.hidden_sizes[0]);
        let unit = self.len() * shape.hidden_sizes[0];
        let Self { layers, d_out, d_h, d_c, seq_len, .. } = self;
        let LayerTrace { pre, gates, h, c, d_pre, d_h_part, .. } = &mut layers[index];
        d_pre.resize(*seq_len * shape.cell.gates() * unit, 0.0);
        for carry in [&mut *d_h, &mut *d_c] {
            carry.clear();
            carry.resize(unit, 0.0);
        }
        let weight_hh = &weights.hidden_backward;
        match shape.cell {
            Cell::Rnn => {
                rnn_backward(simd, RnnBackward { shape: sequence, weight_hh, h, d_out, d_pre, d_h });
            }
            Cell::Lstm => {
                let args = LstmBackward {
                    shape: sequence,
                    weight_hh,
                    gates: pre,
                    c,
                    d_out,
                    d_gates: d_pre,
                    d_h,
                    d_c,
                };
                lstm_backward(simd, args);
            }
            Cell::Gru => {
                d_h_part.resize(*seq_len * 3 * unit, 0.0);
                let args = GruBackward {
                    shape: sequence,
                    weight_hh,
                    gates,
                    h,
                    d_out,
                    d_x_part: d_pre,
                    d_h_part,
                    d_h,
                };
                gru_backward(simd, args);
            }
        }
    }

    /// Loss, weight and hits of each row, summed over its steps in time order.
    pub(super) fn row_results(&self) -> impl Iterator<Item = RowResult> + '_ {
        let n = self.len();
        (0..n).map(move |row| {
            let mut result = RowResult::default();
            for at in (row..self.losses.len()).step_by(n) {
                result.loss += self.losses[at];
                result.weight += 1;
                result.correct += u64::from(self.correct[at]);
            }
            result
        })
    }

    // What the weight gradients read, row by row; `row` counts from the block's first.

    /// Gradient of the logits, `[V]`.
    pub(super) fn d_logits(&self, classes: usize, t: usize, row: usize) -> &[f32] {
        &self.logits[(t * self.len() + row) * classes..][..classes]
    }

    /// Gradient of the input's part of the gates, `[G·H]`.
    pub(super) fn d_pre(&self, layer: usize, gates: usize, t: usize, row: usize) -> &[f32] {
        &self.layers[layer].d_pre[(t * self.len() + row) * gates..][..gates]
    }

    /// GRU: gradient of the state's part of the gates, `[3·H]`.
    pub(super) fn d_h_part(&self, layer: usize, gates: usize, t: usize, row: usize) -> &[f32] {
        &self.layers[layer].d_h_part[(t * self.len() + row) * gates..][..gates]
    }

    /// h before step `t`, `[H]`.
    pub(super) fn h_before(&self, layer: usize, hidden: usize, t: usize, row: usize) -> &[f32] {
        &self.layers[layer].h[(t * self.len() + row) * hidden..][..hidden]
    }

    /// The layer's output at step `t`, after dropout, `[H]`.
    pub(super) fn output(&self, layer: usize, hidden: usize, t: usize, row: usize) -> &[f32] {
        let n = self.len();
        &self.layers[layer].output(n * hidden)[(t * n + row) * hidden..][..hidden]
    }

    /// The dense input at step `t`, `[I]`.
    pub(super) fn dense(&self, width: usize, t: usize, row: usize) -> &[f32] {
        &self.dense[(t * self.len() + row) * width..][..width]
    }

    /// The token at step `t`.
    pub(super) fn token(&self, t: usize, row: usize) -> u32 {
        self.tokens[t * self.len() + row]
    }
}

impl LayerTrace {
    /// `[T][rows][H]`; `unit` is rows · H.
    fn output(&self, unit: usize) -> &[f32] {
        if self.dropped.is_empty() { &self.h[unit..] } else { &self.dropped }
    }
}

/// What the network reads of bytes.
fn scale_bytes(bytes: &[u8], scaled: &mut [f32]) {
    scaled.iter_mut().zip(bytes).for_each(|(x, &byte)| *x = f32::from(byte) / 255.0);
}

/// What the head reads: the last layer's output at all steps, or at the last one.
fn head_input<'a>(shape: &ModelShape, layers: &'a [LayerTrace], unit: usize) -> &'a [f32] {
    let output = layers.last().expect("a network has a layer").output(unit);
    match shape.head {
        Head::EveryStep => output,
        Head::Final => &output[output.len() - unit..],
    }
}

/// Whether dropout applies to a layer's output. Where the head reads the final state, nobody reads the last layer's
/// output: the state is never dropped, neither on its way through time nor for the head.
fn drops_output(shape: &ModelShape, layer: usize) -> bool {
    shape.head == Head::EveryStep || layer + 1 < shape.num_layers()
}

fn mask(shape: &ModelShape, dropout: Dropout, row: usize, t: usize, layer: usize) -> MaskStream {
    MaskStream {
        seed: dropout.seed,
        step: dropout.step,
        row: dropout.first_slot + row as u32,
        position: (t * shape.num_layers() + layer) as u32,
    }
}
