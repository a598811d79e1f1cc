//! One direction of one layer: what it keeps, and which kernels it calls.
//!
//! A direction that reads backwards is the same kernels on runs that were turned round.

use cubecl::prelude::*;
use kernels::cube::buffer::Buffer;
use kernels::cube::gru::{GruSequence, gru_backward, gru_forward};
use kernels::cube::lstm::{LstmSequence, Projection, ProjectionBackward, lstm_backward, lstm_forward};
use kernels::cube::rnn::{RnnSequence, rnn_backward, rnn_forward};
use kernels::cube::rows::Extent;
use kernels::cube::sequence::{Limits, Needs, Plan};
use protocol::cell::Cell;
use protocol::layout::{LayerShape, ModelShape};

use super::weights::DirectionWeights;

/// What a direction keeps between its forward pass and the gradients of its weights.
pub(super) struct DirectionWork {
    /// `[T + 1][Nr][R]`, the start of every run first.
    pub(super) h: Buffer,
    /// LSTM: `[T + 1][Nr][H]`
    pub(super) c: Buffer,
    /// The gates, then the gradients of their sums, `[T][Nr][gate_width]`.
    gates: Buffer,
    /// LSTM with a projection: what is projected, `[T][Nr][H]`, and the gradient of h, `[T][Nr][R]`.
    projection: Option<(Buffer, Buffer)>,
    /// Gradient of each run's start, `[Nr][R]` and `[Nr][H]`.
    pub(super) d_start_h: Buffer,
    pub(super) d_start_c: Buffer,
}

/// Floats of a step's gates: `G·H`, and `H` more for what a GRU's reset gate has made.
pub(super) fn gate_width(layer: &LayerShape, cell: Cell) -> usize {
    layer.gate_size() + if cell == Cell::Gru { layer.hidden_size } else { 0 }
}

impl DirectionWork {
    pub(super) fn new<R: Runtime>(
        client: &ComputeClient<R>,
        shape: &ModelShape,
        layer: &LayerShape,
        extent: Extent,
        backward: bool,
    ) -> Self {
        let room = |per_place: usize| Buffer::new(client, extent.places() * per_place);
        let states = |width: usize| Buffer::new(client, (extent.places() + extent.runs) * width);
        let starts = |width: usize| Buffer::new(client, if backward { extent.runs * width } else { 0 });
        let is_projected = shape.cell == Cell::Lstm && shape.options.projection.is_some();
        Self {
            h: states(layer.output_size),
            c: states(layer.cell_size),
            gates: room(gate_width(layer, shape.cell)),
            projection: is_projected.then(|| (room(layer.hidden_size), room(layer.output_size))),
            d_start_h: starts(layer.output_size),
            d_start_c: starts(layer.cell_size),
        }
    }

    /// h and c, and the width of each; 0 where the cell has none.
    pub(super) fn states(&self, layer: &LayerShape) -> [(&Buffer, usize); 2] {
        [(&self.h, layer.output_size), (&self.c, layer.cell_size)]
    }

    /// The gradients of the gates' sums, `[T][Nr][gate_width]`, after the backward pass.
    pub(super) fn d_gates(&self) -> &Buffer {
        &self.gates
    }

    /// What was projected, and the gradient of what it was projected to.
    pub(super) fn projection(&self) -> Option<(&Buffer, &Buffer)> {
        self.projection.as_ref().map(|(m, d_projected)| (m, d_projected))
    }
}

/// A direction as its kernels see it.
pub(super) struct Direction<'a, R: Runtime> {
    pub(super) client: &'a ComputeClient<R>,
    pub(super) shape: &'a ModelShape,
    pub(super) layer: LayerShape,
    pub(super) weights: &'a DirectionWeights,
    /// Steps of each run, `[Nr]`.
    pub(super) lengths: &'a Buffer,
}

impl<R: Runtime> Direction<'_, R> {
    fn plan(&self, extent: Extent) -> Plan {
        let LayerShape { hidden_size, output_size, .. } = self.layer;
        let needs = Needs::of(self.shape.cell, self.shape.options.reset, hidden_size, output_size);
        Plan::choose(needs, extent.runs, Limits::of(self.client))
    }

    fn rnn<'w>(&'w self, extent: Extent, work: &'w DirectionWork) -> RnnSequence<'w> {
        RnnSequence {
            extent,
            hidden: self.layer.hidden_size,
            activation: self.shape.options.activation,
            precision: self.shape.precision,
            plan: self.plan(extent),
            lengths: self.lengths,
            h: &work.h,
        }
    }

    fn lstm<'w>(&'w self, extent: Extent, work: &'w DirectionWork) -> LstmSequence<'w> {
        LstmSequence {
            extent,
            hidden: self.layer.hidden_size,
            output: self.layer.output_size,
            options: &self.shape.options,
            precision: self.shape.precision,
            plan: self.plan(extent),
            lengths: self.lengths,
            peepholes: self.weights.peepholes.as_ref(),
            gates: &work.gates,
            c: &work.c,
        }
    }

    fn gru<'w>(&'w self, extent: Extent, work: &'w DirectionWork) -> GruSequence<'w> {
        GruSequence {
            extent,
            hidden: self.layer.hidden_size,
            reset: self.shape.options.reset,
            recurrent_activation: self.shape.options.recurrent_activation,
            precision: self.shape.precision,
            plan: self.plan(extent),
            lengths: self.lengths,
            gates: &work.gates,
            h: &work.h,
        }
    }

    /// Through all steps, from the input's part of the gates `[T][Nr][G·H]` and the start of every run.
    pub(super) fn forward(&self, extent: Extent, pre: &Buffer, work: &DirectionWork) {
        let (client, weight) = (self.client, &self.weights.weight_hh_t);
        match self.shape.cell {
            Cell::Rnn => rnn_forward(client, self.rnn(extent, work), pre, weight),
            Cell::Lstm => {
                let weights = self.weights.projection.as_ref();
                let projection = weights.zip(work.projection.as_ref());
                let projection = projection.map(|(weight_hr, (m, _))| Projection { weight_hr, m });
                lstm_forward(client, self.lstm(extent, work), pre, weight, projection, &work.h);
            }
            Cell::Gru => {
                gru_forward(client, self.gru(extent, work), pre, weight, self.weights.bias_hn.as_ref())
            }
        }
    }

    /// Back through all steps, from the gradient of h after each, `[T][Nr][R]`.
    pub(super) fn backward(&self, extent: Extent, d_out: &Buffer, work: &DirectionWork) {
        let (client, weight) = (self.client, &self.weights.weight_hh);
        let DirectionWork { gates, projection, d_start_h, d_start_c, .. } = work;
        match self.shape.cell {
            Cell::Rnn => rnn_backward(client, self.rnn(extent, work), d_out, weight, gates, d_start_h),
            Cell::Lstm => {
                let projection = self.weights.projection.as_ref().zip(projection.as_ref());
                let projection = projection
                    .map(|(weight_hr, (_, d_projected))| ProjectionBackward { weight_hr, d_projected });
                let sequence = self.lstm(extent, work);
                lstm_backward(client, sequence, d_out, weight, projection, d_start_h, d_start_c);
            }
            Cell::Gru => gru_backward(client, self.gru(extent, work), d_out, weight, d_start_h),
        }
    }
}
