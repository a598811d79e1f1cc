//! One direction of one layer over the runs of a block: what it keeps, where it works, which kernels it calls.
//!
//! A direction that reads backwards is the same kernels over the same runs, with every run's steps in reverse; whoever
//! hands it inputs and takes its outputs turns them round.

use kernels::Simd;
use kernels::cpu::gru::{GruBackward, GruForward, gru_backward, gru_forward};
use kernels::cpu::lstm::{
    LstmBackward, LstmForward, LstmProjection, LstmProjectionBackward, lstm_backward, lstm_forward,
};
use kernels::cpu::rnn::{RnnBackward, RnnForward, rnn_backward, rnn_forward};
use kernels::cpu::sequence::{InputPart, SequenceShape};
use protocol::cell::Cell;
use protocol::layout::{LayerShape, ModelShape};

use super::runs::Runs;
use super::weights::{DirectionWeights, InputWeights};

/// What a direction keeps of the forward pass: its states, the start of every run first.
#[derive(Default)]
pub(super) struct Trace {
    /// `[runs + N][R]`
    pub(super) h: Vec<f32>,
    /// LSTM: `[runs + N][H]`
    pub(super) c: Vec<f32>,
}

/// What lies between a direction's forward pass and the gradients of its weights.
#[derive(Default)]
pub(super) struct Workspace {
    /// The input's part of the gates, then the gates, then their gradients: `[N][gate_width]`.
    pub(super) gates: Vec<f32>,
    /// LSTM with a projection: what is projected, `[N][H]`.
    pub(super) unprojected: Vec<f32>,
    /// LSTM with a projection: gradient of h, `[N][R]`.
    pub(super) d_projected: Vec<f32>,
    /// Gradient of each run's end, then of its start, `[runs][R]`.
    pub(super) d_h: Vec<f32>,
    /// The same of c, `[runs][H]`.
    pub(super) d_c: Vec<f32>,
    /// Room for one step. GRU: the state's part of the gates, or its gradient, `[runs][3·H]`. LSTM with a projection:
    /// gradient of what is projected, `[runs][H]`.
    step: Vec<f32>,
}

/// Floats of a step's gates: `G·H`, and `H` more for what a GRU's reset gate has made.
pub(super) fn gate_width(layer: &LayerShape, cell: Cell) -> usize {
    layer.gate_size() + if cell == Cell::Gru { layer.hidden_size } else { 0 }
}

/// A direction as its kernels see it.
#[derive(Clone, Copy)]
pub(super) struct Direction<'a> {
    pub(super) simd: Simd,
    pub(super) model: &'a ModelShape,
    pub(super) layer: LayerShape,
    pub(super) weights: &'a DirectionWeights,
}

impl Trace {
    /// Makes room for these runs.
    pub(super) fn resize(&mut self, layer: &LayerShape, runs: &Runs) {
        let states = runs.len() + runs.steps();
        resize_exactly(&mut self.h, states * layer.output_size);
        resize_exactly(&mut self.c, states * layer.cell_size);
    }

    /// Floats for so many runs and steps.
    pub(super) fn floats(layer: &LayerShape, runs: usize, steps: usize) -> usize {
        (runs + steps) * layer.state_size()
    }

    /// Floats that are held.
    #[cfg(test)]
    pub(super) fn held_floats(&self) -> usize {
        self.h.capacity() + self.c.capacity()
    }

    /// h and c, and the width of each; c is empty where the cell has none.
    pub(super) fn states(&mut self, layer: &LayerShape) -> [(&mut Vec<f32>, usize); 2] {
        [(&mut self.h, layer.output_size), (&mut self.c, layer.cell_size)]
    }
}

impl Workspace {
    /// Floats of each buffer after a backward pass over so many runs and steps.
    pub(super) fn sizes(
        model: &ModelShape,
        layer: &LayerShape,
        runs: usize,
        steps: usize,
    ) -> [usize; Self::BUFFERS] {
        let hidden = layer.hidden_size;
        let if_projected = |size| if is_projected(model) { size } else { 0 };
        let step = if model.cell == Cell::Gru { 3 * hidden } else { if_projected(hidden) };
        [
            steps * gate_width(layer, model.cell),
            if_projected(steps * hidden),
            if_projected(steps * layer.output_size),
            runs * layer.output_size,
            runs * layer.cell_size,
            runs * step,
        ]
    }

    /// Number of buffers.
    pub(super) const BUFFERS: usize = 6;

    /// The buffers in the order of [`sizes`](Self::sizes).
    fn buffers(&mut self) -> [&mut Vec<f32>; Self::BUFFERS] {
        let Self { gates, unprojected, d_projected, d_h, d_c, step } = self;
        [gates, unprojected, d_projected, d_h, d_c, step]
    }

    /// Makes room for a pass over the runs, forward or both ways.
    fn resize(&mut self, model: &ModelShape, layer: &LayerShape, runs: &Runs, backward: bool) {
        let sizes = Self::sizes(model, layer, runs.len(), runs.steps());
        let is_needed = |at: usize| backward || !(2..5).contains(&at);
        for (at, (buffer, size)) in self.buffers().into_iter().zip(sizes).enumerate() {
            if is_needed(at) {
                resize_exactly(buffer, size);
            }
        }
    }

    /// Floats that are held.
    #[cfg(test)]
    pub(super) fn held_floats(&mut self) -> usize {
        self.buffers().iter().map(|buffer| buffer.capacity()).sum()
    }

    /// The gradient of each run's end is zero, until somebody knows better.
    pub(super) fn clear_carry(&mut self, layer: &LayerShape, runs: &Runs) {
        for (carry, width) in [(&mut self.d_h, layer.output_size), (&mut self.d_c, layer.cell_size)] {
            carry.clear();
            resize_exactly(carry, runs.len() * width);
        }
    }
}

impl<'n> Direction<'n> {
    fn sequence<'a>(&self, runs: &'a Runs) -> SequenceShape<'a> {
        let LayerShape { hidden_size, output_size, .. } = self.layer;
        SequenceShape { active: runs.active(), hidden_size, output_size }
    }

    /// Makes room for a forward pass, and hands out that for the input's part of the gates: the first `G·H` of each row
    /// of `[N][gate_width]`.
    pub(super) fn room_for_input<'w>(&self, runs: &Runs, work: &'w mut Workspace) -> &'w mut [f32] {
        work.resize(self.model, &self.layer, runs, false);
        &mut work.gates
    }

    /// Where a kernel finds the input's part. A GRU adds it behind the product with h, not before: it has it in place.
    pub(super) fn input_part<'a>(&self, tokens: &'a [u32]) -> InputPart<'a>
    where
        'n: 'a,
    {
        match &self.weights.input {
            InputWeights::Table(table) if self.model.cell != Cell::Gru => InputPart::Table { table, tokens },
            _ => InputPart::InPlace,
        }
    }

    /// Through all steps, from the input's part of the gates and the start of every run.
    pub(super) fn forward(&self, runs: &Runs, input: InputPart<'_>, trace: &mut Trace, work: &mut Workspace) {
        let (simd, shape, options) = (self.simd, self.sequence(runs), &self.model.options);
        let Trace { h, c } = trace;
        let Workspace { gates, unprojected, step, .. } = work;
        match self.model.cell {
            Cell::Rnn => {
                let weight_hh = self.weights.hidden.whole();
                let activation = options.activation;
                rnn_forward(simd, RnnForward { shape, activation, weight_hh, input, pre: gates, h });
            }
            Cell::Lstm => {
                let projection = self.weights.projection.as_ref();
                let args = LstmForward {
                    shape,
                    options: self.weights.lstm_options(options),
                    weight_hh: self.weights.hidden.whole(),
                    projection: projection
                        .map(|weights| LstmProjection { weight_hr: &weights.forward, m: unprojected }),
                    input,
                    gates,
                    h,
                    c,
                };
                lstm_forward(simd, args);
            }
            Cell::Gru => {
                let args = GruForward {
                    shape,
                    recurrent_activation: options.recurrent_activation,
                    weight_hh: self.weights.hidden.of_gru(),
                    bias_hh: &self.weights.bias_hh,
                    h_part: step,
                    gates,
                    h,
                };
                gru_forward(simd, args);
            }
        }
    }

    /// Back through all steps; `d_out` is `[N][R]`, the gradients of the runs' ends are in the workspace.
    pub(super) fn backward(&self, runs: &Runs, trace: &Trace, d_out: &[f32], work: &mut Workspace) {
        work.resize(self.model, &self.layer, runs, true);
        let (simd, shape, options) = (self.simd, self.sequence(runs), &self.model.options);
        let Trace { h, c } = trace;
        let Workspace { gates, d_projected, d_h, d_c, step, .. } = work;
        match self.model.cell {
            Cell::Rnn => {
                let weight_hh = self.weights.hidden_backward.whole();
                let activation = options.activation;
                // The sums before the activation are not needed again: their gradients take their place.
                let d_pre = gates;
                rnn_backward(simd, RnnBackward { shape, activation, weight_hh, h, d_out, d_pre, d_h });
            }
            Cell::Lstm => {
                let projection = self.weights.projection.as_ref();
                let args = LstmBackward {
                    shape,
                    options: self.weights.lstm_options(options),
                    weight_hh: self.weights.hidden_backward.whole(),
                    projection: projection.map(|weights| LstmProjectionBackward {
                        weight_hr: &weights.backward,
                        d_projected,
                        d_m: step,
                    }),
                    gates,
                    c,
                    d_out,
                    d_h,
                    d_c,
                };
                lstm_backward(simd, args);
            }
            Cell::Gru => {
                let args = GruBackward {
                    shape,
                    recurrent_activation: options.recurrent_activation,
                    weight_hh: self.weights.hidden_backward.of_gru(),
                    gates,
                    h,
                    d_out,
                    d_h,
                    d_h_part: step,
                };
                gru_backward(simd, args);
            }
        }
    }
}

fn is_projected(model: &ModelShape) -> bool {
    model.cell == Cell::Lstm && model.options.projection.is_some()
}

/// Gives a buffer that is used for several layers just the room that the largest needs.
pub(super) fn resize_exactly<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    buffer.reserve_exact(len.saturating_sub(buffer.len()));
    buffer.resize(len, T::default());
}
