//! A batch on its way through the network and back, on the device.
//!
//! Everything is stored step by step over the batch's runs, `[T][Nr][w]`; what lies beyond a run's end is some number
//! that nobody reads, or a gradient of zero.

use cubecl::prelude::*;
use kernels::cube::buffer::Buffer;
use kernels::cube::gemm::{Matrix, Right, Shape, Start, product};
use kernels::cube::output::{Dropout, OutputPart, output, output_gradient};
use kernels::cube::rows::{
    Extent, StatePart, TokenTable, end_gradients, ends, scaled_bytes, starts, token_rows, turn,
};
use kernels::cube::softmax::{RESULT, cross_entropy};
use protocol::layout::{Head, Input, LayerShape, StateLayout};

use super::direction::{Direction, DirectionWork, gate_width};
use super::tables::Tables;
use super::weights::Weights;
use crate::network::{has_droppable_output, input_has_gradient, reads_one_hot};

/// What a pass computes with.
pub(super) struct Network<'a, R: Runtime> {
    pub(super) client: &'a ComputeClient<R>,
    pub(super) layout: &'a StateLayout,
    /// `[P]`
    pub(super) parameters: &'a Buffer,
    pub(super) weights: &'a Weights,
    /// Of each layer's output, if the pass drops any.
    pub(super) dropout: &'a [Option<Dropout>],
}

/// Room for a batch between its forward pass and the gradients of the weights.
pub(super) struct Work {
    extent: Extent,
    rows: usize,
    /// Dense input of the first layer, `[T][Nr][I]`; empty where it is one-hot.
    dense: Buffer,
    layers: Vec<LayerWork>,
    /// Where the final state is read: `[rows][D·R]`, and its gradient.
    features: Buffer,
    d_features: Buffer,
    /// `[T·Nr or rows][V]`; after the forward pass of a training step the gradient of the logits.
    logits: Buffer,
    /// `[T·Nr or rows][3]`
    pub(super) results: Buffer,
    /// The input's part of the gates `[T][Nr][G·H]` of the direction under way.
    pre: Buffer,
    /// Gradient of the output of the layer under way, then of its input: `[T][Nr][w]`.
    d_out: Buffer,
    d_input: Buffer,
    /// The second direction's part of the gradient of the input, in its own order of steps.
    d_turned: Buffer,
    /// Gradient of one direction's output, `[T][Nr][R]`.
    d_h: Buffer,
}

struct LayerWork {
    shape: LayerShape,
    directions: Vec<DirectionWork>,
    /// What the layer reads, turned round: `[T][Nr][I]`, where it has a second direction and a dense input.
    turned: Buffer,
    /// Its output `[T][Nr][D·R]`, where that is not its only h as it lies.
    output: Option<Buffer>,
}

impl Work {
    /// Room for batches of this extent. `drops`: whether training drops any layer's output.
    pub(super) fn new<R: Runtime>(
        client: &ComputeClient<R>,
        layout: &StateLayout,
        (extent, rows): (Extent, usize),
        backward: bool,
        drops: bool,
    ) -> Self {
        let shape = &layout.shape;
        let room = |per_place: usize| Buffer::new(client, extent.places() * per_place);
        let if_backward = |per_place: usize| room(if backward { per_place } else { 0 });
        let targets = match shape.head {
            Head::EveryStep => extent.places(),
            Head::Final => rows,
        };
        let features = if shape.head == Head::Final { rows * shape.output_width() } else { 0 };
        let layers = shape.layers().enumerate().map(|(index, layer)| {
            let is_dense = !reads_one_hot(shape, index);
            let copies = layer.directions == 2 || drops && has_droppable_output(shape, index);
            LayerWork {
                shape: layer,
                directions: (0..layer.directions)
                    .map(|_| DirectionWork::new(client, shape, &layer, extent, backward))
                    .collect(),
                turned: room(if layer.directions == 2 && is_dense { layer.input_size } else { 0 }),
                output: copies.then(|| room(layer.width())),
            }
        });
        let widest = |of: fn(&LayerShape) -> usize| shape.layers().map(|layer| of(&layer)).max().unwrap_or(0);
        let with_gradient = (0..shape.num_layers()).filter(|&index| input_has_gradient(shape, index));
        let widest_input = with_gradient.map(|index| shape.layer(index).input_size).max().unwrap_or(0);
        let gradient = widest_input.max(shape.output_width());
        Self {
            extent,
            rows,
            dense: room(if reads_one_hot(shape, 0) { 0 } else { shape.input.size() }),
            layers: layers.collect(),
            features: Buffer::new(client, features),
            d_features: Buffer::new(client, if backward { features } else { 0 }),
            logits: Buffer::new(client, targets * shape.classes),
            results: Buffer::new(client, RESULT * targets),
            pre: room(widest(|layer| layer.gate_size())),
            d_out: if_backward(gradient),
            d_input: if_backward(gradient),
            d_turned: if_backward(if shape.bidirectional { widest_input } else { 0 }),
            d_h: if_backward(widest(|layer| layer.output_size)),
        }
    }

    /// Whether it has just the room that a batch needs.
    pub(super) fn fits(&self, tables: &Tables) -> bool {
        self.extent == tables.extent && self.rows == tables.rows
    }

    /// Sets h and c before the first step of every run: the state of its slot in `state`, or the initial state.
    pub(super) fn load_state<R: Runtime>(
        &mut self,
        network: &Network<'_, R>,
        tables: &Tables,
        state: &Buffer,
    ) {
        let state_size = network.layout.shape.state_size();
        let mut at = 0;
        for (index, layer) in self.layers.iter().enumerate() {
            for (work, weights) in layer.directions.iter().zip(&network.weights.layers[index]) {
                for ((values, width), initial) in work.states(&layer.shape).into_iter().zip(&weights.initial)
                {
                    if width > 0 {
                        let part = StatePart { at, width, state_size };
                        starts(network.client, &tables.starts, part, state, initial, values);
                        at += width;
                    }
                }
            }
        }
    }

    /// Writes h and c after the last step of every row to its slot of `state`, the first of which is `first_slot`.
    pub(super) fn store_state<R: Runtime>(
        &self,
        network: &Network<'_, R>,
        tables: &Tables,
        first_slot: usize,
        state: &Buffer,
    ) {
        let state_size = network.layout.shape.state_size();
        if state_size == 0 {
            return;
        }
        let mut at = 0;
        for layer in &self.layers {
            for work in &layer.directions {
                for (values, width) in work.states(&layer.shape).into_iter().filter(|(_, width)| *width > 0) {
                    let part = StatePart { at, width, state_size };
                    let end = self.extent.places() * width;
                    ends(network.client, &tables.final_runs[0], part, (values, end), first_slot, state);
                    at += width;
                }
            }
        }
    }

    /// Makes the state after the last step that before the first; for runs of one length.
    pub(super) fn go_on<R: Runtime>(&self, client: &ComputeClient<R>) {
        for layer in &self.layers {
            for work in &layer.directions {
                for (values, width) in work.states(&layer.shape) {
                    let (start, one) = (self.extent.places() * width, self.extent.runs * width);
                    let end = Buffer::new(client, one);
                    // Through another buffer: a kernel must not read and write the same one.
                    kernels::cube::elements::copy(client, values, start..start + one, &end, 0);
                    kernels::cube::elements::copy(client, &end, 0..one, values, 0);
                }
            }
        }
    }

    /// Through all layers and steps to the loss. With `backward` the logits are replaced by their gradient.
    pub(super) fn forward<R: Runtime>(&mut self, network: &Network<'_, R>, tables: &Tables, backward: bool) {
        self.project(network, tables);
        let classes = network.layout.shape.classes;
        cross_entropy(network.client, classes, &tables.targets, &self.logits, &self.results, backward);
    }

    /// Through all layers and steps to the logits, which are `[T·Nr or rows][V]`.
    pub(super) fn project<R: Runtime>(&mut self, network: &Network<'_, R>, tables: &Tables) -> &Buffer {
        let Network { client, layout, parameters, .. } = *network;
        let shape = &layout.shape;
        match shape.input {
            Input::OneHot(_) => {}
            Input::Embedding { size, .. } => {
                let at = layout.embedding().expect("it has a table").start;
                let table = TokenTable { buffer: parameters, at, token_stride: size, column_stride: 1 };
                token_rows(client, self.extent, tables.tokens_of(0), table, size, None, &self.dense);
            }
            Input::Bytes(_) => scaled_bytes(client, &tables.bytes, &self.dense),
        }
        for index in 0..shape.num_layers() {
            self.layer_forward(network, tables, index);
        }
        let last = shape.num_layers() - 1;
        let width = shape.output_width();
        if shape.head == Head::Final {
            let layer = &self.layers[last];
            let size = layer.shape.output_size;
            for (at, work) in layer.directions.iter().enumerate() {
                let part = StatePart { at: at * size, width: size, state_size: width };
                let end = self.extent.places() * size;
                ends(client, &tables.final_runs[at], part, (&work.h, end), 0, &self.features);
            }
        }
        let (weight, bias) = layout.head();
        let weight = Matrix { buffer: parameters, at: weight.start, stride: width };
        let product_shape = Shape { m: self.targets(shape.head), n: shape.classes, k: width };
        product(
            client,
            shape.precision,
            product_shape,
            self.head_input(shape.head),
            Right::Transposed(weight),
            Start::Row(parameters, bias.start),
            &self.logits,
            shape.classes,
        );
        &self.logits
    }

    fn targets(&self, head: Head) -> usize {
        match head {
            Head::EveryStep => self.extent.places(),
            Head::Final => self.rows,
        }
    }

    /// What the head reads, `[T·Nr or rows][D·R]`.
    pub(super) fn head_input(&self, head: Head) -> Matrix<'_> {
        match head {
            Head::EveryStep => self.output(self.layers.len() - 1),
            Head::Final => {
                let layer = &self.layers[self.layers.len() - 1].shape;
                Matrix::dense(&self.features, layer.width())
            }
        }
    }

    /// Gradient of the logits, after a forward pass with a backward one.
    pub(super) fn d_logits(&self, classes: usize) -> Matrix<'_> {
        Matrix::dense(&self.logits, classes)
    }

    /// A layer's output, `[T·Nr][D·R]`.
    fn output(&self, index: usize) -> Matrix<'_> {
        let LayerWork { shape, directions, output, .. } = &self.layers[index];
        match output {
            Some(output) => Matrix::dense(output, shape.width()),
            // The first of h's T + 1 is the start.
            None => Matrix {
                buffer: &directions[0].h,
                at: self.extent.runs * shape.output_size,
                stride: shape.output_size,
            },
        }
    }

    /// What a direction of a layer reads, `[T·Nr][I]`, in its own order of steps; not for a one-hot input.
    pub(super) fn input(&self, index: usize, direction: usize) -> Matrix<'_> {
        let layer = &self.layers[index];
        match (direction, index) {
            (1, _) => Matrix::dense(&layer.turned, layer.shape.input_size),
            (_, 0) => Matrix::dense(&self.dense, layer.shape.input_size),
            _ => self.output(index - 1),
        }
    }

    /// What a direction of a layer has left.
    pub(super) fn direction(&self, index: usize, direction: usize) -> &DirectionWork {
        &self.layers[index].directions[direction]
    }

    /// Gradient of the embedded input `[T·Nr][I]`, after the backward pass.
    pub(super) fn d_embedded(&self) -> &Buffer {
        &self.d_out
    }

    fn layer_forward<R: Runtime>(&mut self, network: &Network<'_, R>, tables: &Tables, index: usize) {
        let Network { client, layout, parameters, weights, dropout } = *network;
        let (shape, layer) = (&layout.shape, layout.shape.layer(index));
        let gates = layer.gate_size();
        for at in 0..layer.directions {
            let (ranges, own) = (&layout.layer(index)[at], &weights.layers[index][at]);
            if reads_one_hot(shape, index) {
                let weight = ranges.weight_ih.start;
                let table = TokenTable {
                    buffer: parameters,
                    at: weight,
                    token_stride: 1,
                    column_stride: layer.input_size,
                };
                let tokens = tables.tokens_of(at);
                token_rows(client, self.extent, tokens, table, gates, Some(&own.bias), &self.pre);
            } else {
                if at == 1 {
                    let x = self.input(index, 0);
                    let turned = &self.layers[index].turned;
                    turn(client, self.extent, &tables.lengths, layer.input_size, x.buffer, turned, false);
                }
                let weight =
                    Matrix { buffer: parameters, at: ranges.weight_ih.start, stride: layer.input_size };
                let product_shape = Shape { m: self.extent.places(), n: gates, k: layer.input_size };
                let x = self.input(index, at);
                let start = Start::Row(&own.bias, 0);
                product(
                    client,
                    shape.precision,
                    product_shape,
                    x,
                    Right::Transposed(weight),
                    start,
                    &self.pre,
                    gates,
                );
            }
            let direction = Direction { client, shape, layer, weights: own, lengths: &tables.lengths };
            direction.forward(self.extent, &self.pre, &self.layers[index].directions[at]);
        }
        let LayerWork { directions, output: into, .. } = &self.layers[index];
        let Some(into) = into else { return };
        for (direction, work) in directions.iter().enumerate() {
            let part = OutputPart { direction, size: layer.output_size, width: layer.width() };
            output(client, self.extent, part, tables.runs(), dropout[index].as_ref(), &work.h, into);
        }
    }

    /// Back through the head and all layers, to the gradients of their gates.
    pub(super) fn backward<R: Runtime>(&mut self, network: &Network<'_, R>, tables: &Tables) {
        let Network { client, layout, parameters, .. } = *network;
        let shape = &layout.shape;
        let width = shape.output_width();
        let weight = Matrix { buffer: parameters, at: layout.head().0.start, stride: width };
        let product_shape = Shape { m: self.targets(shape.head), n: width, k: shape.classes };
        let into = match shape.head {
            Head::EveryStep => &self.d_out,
            Head::Final => &self.d_features,
        };
        let d_logits = self.d_logits(shape.classes);
        let (precision, right) = (shape.precision, Right::Plain(weight));
        product(client, precision, product_shape, d_logits, right, Start::Zero, into, width);
        for index in (0..shape.num_layers()).rev() {
            self.layer_backward(network, tables, index);
        }
    }

    fn layer_backward<R: Runtime>(&mut self, network: &Network<'_, R>, tables: &Tables, index: usize) {
        let Network { client, layout, parameters, weights, dropout } = *network;
        let (shape, layer) = (&layout.shape, layout.shape.layer(index));
        let (size, width, extent) = (layer.output_size, layer.width(), self.extent);
        for at in 0..layer.directions {
            let part = OutputPart { direction: at, size, width };
            let is_final = index + 1 == shape.num_layers() && shape.head == Head::Final;
            let d_h = if is_final {
                let rows = &tables.final_rows[at];
                let from = (at * size, width);
                end_gradients(client, extent, rows, &tables.lengths, &self.d_features, from, size, &self.d_h);
                &self.d_h
            } else if self.layers[index].output.is_some() {
                output_gradient(
                    client,
                    extent,
                    part,
                    tables.runs(),
                    dropout[index].as_ref(),
                    &self.d_out,
                    &self.d_h,
                );
                &self.d_h
            } else {
                &self.d_out
            };
            let own = &weights.layers[index][at];
            let direction = Direction { client, shape, layer, weights: own, lengths: &tables.lengths };
            direction.backward(extent, d_h, &self.layers[index].directions[at]);
        }
        if !input_has_gradient(shape, index) {
            return;
        }
        for at in 0..layer.directions {
            let weight_ih = layout.layer(index)[at].weight_ih.start;
            let weight = Matrix { buffer: parameters, at: weight_ih, stride: layer.input_size };
            let product_shape = Shape { m: extent.places(), n: layer.input_size, k: layer.gate_size() };
            let work = &self.layers[index].directions[at];
            let d = Matrix::dense(work.d_gates(), gate_width(&layer, shape.cell));
            let into = if at == 0 { &self.d_input } else { &self.d_turned };
            let (precision, right) = (shape.precision, Right::Plain(weight));
            product(client, precision, product_shape, d, right, Start::Zero, into, layer.input_size);
            if at == 1 {
                turn(client, extent, &tables.lengths, layer.input_size, into, &self.d_input, true);
            }
        }
        std::mem::swap(&mut self.d_out, &mut self.d_input);
    }
}
