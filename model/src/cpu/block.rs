//! A block of rows on its way through the network and back, on one thread.
//!
//! Nothing in here looks at another row, so which rows share a block changes no bit. The order of everything that is
//! stored by step is that of the block's [`Runs`]: `N` places, all steps of all rows without gaps.

mod backward;
mod bytes;

use std::ops::Range;
use std::sync::Arc;

use kernels::cpu::dropout::{MaskStream, dropout_backward};
use kernels::cpu::input::gather_rows;
use kernels::cpu::softmax::{softmax_cross_entropy, softmax_cross_entropy_forward};
use kernels::{Simd, Start, gemm};
use protocol::batch::Inputs;
use protocol::cell::Cell;
use protocol::layout::{Head, Input, LayerShape, ModelShape};

use crate::device::StepInput;
use crate::network::has_droppable_output;
use crate::rows::BatchRows;

use super::direction::{Direction, Trace, Workspace, gate_width, resize_exactly};
use super::runs::Runs;
use super::weights::{InputWeights, Weights};

/// What is the same for all blocks of a pass.
#[derive(Clone, Copy)]
pub(super) struct Network<'a> {
    pub(super) simd: Simd,
    pub(super) shape: &'a ModelShape,
    pub(super) weights: &'a Weights,
    pub(super) dropout: Option<&'a Dropout>,
}

/// The dropout of one training step.
#[derive(Debug, Clone)]
pub(super) struct Dropout {
    /// Probability that a unit of each layer's output is kept.
    pub(super) keep: Arc<[f32]>,
    /// One mask for all steps of a row.
    pub(super) variational: bool,
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

/// Rows and all that is kept of them between forward, backward and the weight gradients.
#[derive(Default)]
pub(super) struct RowBlock {
    /// The rows, counted from the batch's first.
    pub(super) rows: Range<usize>,
    pub(super) runs: Runs,
    /// Steps of each row, from its first on, that have no target.
    paddings: Vec<usize>,
    /// Tokens `[N]`, where tokens are read.
    tokens: Vec<u32>,
    /// Dense input of the first layer, `[N][I]`.
    dense: Vec<f32>,
    /// Per layer, per direction.
    traces: Vec<Vec<Trace>>,
    /// One for each layer, or one in all where the backward pass computes again what the forward pass did.
    works: Vec<LayerWork>,
    /// What the head reads where that is not the last layer's h as it lies: `[N or rows][D·R]`.
    features: Vec<f32>,
    /// `[N or rows]`
    targets: Vec<u32>,
    /// `[N or rows][V]`; after the forward pass of a training step the gradient of the logits.
    logits: Vec<f32>,
    /// `[N or rows]`
    losses: Vec<f64>,
    correct: Vec<bool>,
    /// Gradient of the output of the layer under way `[N][D·R]`, in the end of the embedded input.
    d_out: Vec<f32>,
    /// Head on the final state: gradient of what it read, `[rows][D·R]`.
    d_features: Vec<f32>,
    room: Room,
}

/// What a layer works on.
#[derive(Default)]
struct LayerWork {
    /// What it reads where that is not the h of the layer below as it lies: `[N][I]`.
    input: Vec<f32>,
    directions: Vec<Workspace>,
}

/// Room for what a direction that reads backwards takes and gives, turned round.
#[derive(Default)]
struct Room {
    /// Tokens `[N]`, or floats `[N][I]` that are read or their gradient.
    tokens: Vec<u32>,
    input: Vec<f32>,
    /// `[N][R]`: gradient of one direction's output.
    d_out: Vec<f32>,
}

impl RowBlock {
    /// Reads its rows of a batch. Keeps its memory. `recompute`: gates are not kept for the backward pass.
    pub(super) fn take(&mut self, network: &Network<'_>, batch: &BatchRows<'_>, recompute: bool) {
        let (shape, rows) = (network.shape, self.rows.clone());
        let goes_on = shape.carries_state && !batch.batch.begins_pass();
        self.runs.of_batch(batch, rows.clone(), goes_on, shape.reset_token);
        self.paddings.clear();
        self.paddings.extend(batch.batch.paddings[rows].iter().map(|&padding| padding as usize));
        self.resize(shape, if recompute { 1 } else { shape.num_layers() });
        self.read(network, batch);
    }

    /// Makes room for the forward pass over the runs.
    fn resize(&mut self, shape: &ModelShape, works: usize) {
        self.traces.resize_with(shape.num_layers(), Vec::new);
        for (traces, layer) in self.traces.iter_mut().zip(shape.layers()) {
            traces.resize_with(layer.directions, Trace::default);
            traces.iter_mut().for_each(|trace| trace.resize(&layer, &self.runs));
        }
        self.works.resize_with(works, LayerWork::default);
        for work in &mut self.works {
            work.directions.resize_with(1 + usize::from(shape.bidirectional), Workspace::default);
        }
        let targets = match shape.head {
            Head::EveryStep => self.runs.steps(),
            Head::Final => self.rows.len(),
        };
        resize_exactly(&mut self.targets, targets);
        resize_exactly(&mut self.logits, targets * shape.classes);
        resize_exactly(&mut self.losses, targets);
        resize_exactly(&mut self.correct, targets);
    }

    /// Number of rows.
    fn len(&self) -> usize {
        self.rows.len()
    }

    /// Copies inputs and targets to their places.
    fn read(&mut self, network: &Network<'_>, batch: &BatchRows<'_>) {
        let (shape, steps) = (network.shape, self.runs.steps());
        match &batch.batch.inputs {
            Inputs::Tokens(_) | Inputs::LabelledTokens { .. } => resize_exactly(&mut self.tokens, steps),
            Inputs::Bytes { .. } => resize_exactly(&mut self.dense, steps * shape.input.size()),
        }
        for at in 0..self.rows.len() {
            let row = self.rows.start + at;
            match &batch.batch.inputs {
                Inputs::Tokens(_) => {
                    let tokens = batch.tokens(row);
                    for (t, place) in self.runs.places_of(at).enumerate() {
                        self.tokens[place] = u32::from(tokens[t]);
                        self.targets[place] = u32::from(tokens[t + 1]);
                    }
                }
                Inputs::LabelledTokens { labels, .. } => {
                    for (place, &token) in self.runs.places_of(at).zip(batch.tokens(row)) {
                        self.tokens[place] = u32::from(token);
                    }
                    self.targets[at] = u32::from(labels[row]);
                }
                Inputs::Bytes { bytes, labels } => {
                    let width = shape.input.size();
                    let steps = bytes[batch.starts[row]..].chunks_exact(width);
                    for (place, bytes) in self.runs.places_of(at).zip(steps) {
                        scale_bytes(bytes, &mut self.dense[place * width..][..width]);
                    }
                    self.targets[at] = u32::from(labels[row]);
                }
            }
        }
        self.embed(network);
    }

    /// Looks the tokens up, where they are embedded.
    fn embed(&mut self, network: &Network<'_>) {
        if let Input::Embedding { size, .. } = network.shape.input {
            resize_exactly(&mut self.dense, self.tokens.len() * size);
            gather_rows(&network.weights.embedding, size, &self.tokens, &mut self.dense, size);
        }
    }

    /// Sets h and c before the first step of every run: the row's part of `state`, which begins
    /// with `[rows][state_size]`, or the initial state.
    pub(super) fn load_state(&mut self, network: &Network<'_>, state: &[f32]) {
        let (shape, size) = (network.shape, network.shape.state_size());
        let mut at = 0;
        for (index, layer) in shape.layers().enumerate() {
            let weights = &network.weights.layers[index];
            for (trace, weights) in self.traces[index].iter_mut().zip(weights) {
                for ((values, width), initial) in trace.states(&layer).into_iter().zip(&weights.initial) {
                    if width == 0 {
                        continue;
                    }
                    for (run, start) in self.runs.iter().zip(values.chunks_exact_mut(width)) {
                        start.copy_from_slice(match run.is_fed {
                            true => &state[run.row * size + at..][..width],
                            false => initial,
                        });
                    }
                    at += width;
                }
            }
        }
    }

    /// Writes h and c after the last step to the first `[rows][state_size]` of `state`.
    pub(super) fn store_state(&mut self, shape: &ModelShape, state: &mut [f32]) {
        let size = shape.state_size();
        if size == 0 {
            return;
        }
        let mut at = 0;
        for (index, layer) in shape.layers().enumerate() {
            for trace in &mut self.traces[index] {
                for (values, width) in trace.states(&layer) {
                    for row in 0..self.rows.len() {
                        let last = self.runs.places_of(row).next_back().expect("a row has a step");
                        let values = &values[(self.runs.len() + last) * width..][..width];
                        state[row * size + at..][..width].copy_from_slice(values);
                    }
                    at += width;
                }
            }
        }
    }

    /// Through all layers and steps to the loss. If a backward pass follows, the logits are replaced by their gradient.
    pub(super) fn forward(&mut self, network: &Network<'_>, backward: bool) {
        for layer in 0..network.shape.num_layers() {
            self.layer_forward(network, layer);
        }
        self.project_output(network);
        let Self { logits, targets, losses, correct, .. } = self;
        let (simd, classes) = (network.simd, network.shape.classes);
        if backward {
            softmax_cross_entropy(simd, classes, targets, logits, losses, correct);
            if network.shape.head == Head::EveryStep {
                self.forget_padding(classes);
            }
        } else {
            softmax_cross_entropy_forward(simd, classes, targets, logits, losses, correct);
        }
    }

    /// Padding has no target, so its logits have no gradient.
    fn forget_padding(&mut self, classes: usize) {
        for (row, &padding) in self.paddings.iter().enumerate() {
            for place in self.runs.places_of(row).take(padding) {
                self.logits[place * classes..][..classes].fill(0.0);
            }
        }
    }

    /// Makes the block one row of one step, in the initial state.
    pub(super) fn begin_reading(&mut self, network: &Network<'_>) {
        self.rows = 0..1;
        self.runs.of_one_step();
        self.resize(network.shape, network.shape.num_layers());
        self.load_state(network, &[]);
    }

    /// One step of a block of one row, without dropout, from the state in which the step before has left it. Gives the
    /// logits `[V]`. Once its memory has grown, it allocates nothing.
    pub(super) fn read_step(&mut self, network: &Network<'_>, input: StepInput<'_>) -> &[f32] {
        match (input, network.shape.input) {
            (StepInput::Token(token), Input::OneHot(_) | Input::Embedding { .. }) => {
                resize_exactly(&mut self.tokens, 1);
                self.tokens[0] = token;
                self.embed(network);
            }
            (StepInput::Bytes(bytes), Input::Bytes(width)) if bytes.len() == width => {
                resize_exactly(&mut self.dense, width);
                scale_bytes(bytes, &mut self.dense);
            }
            (input, expected) => panic!("read_step: the input is {input:?}, expected {expected:?}"),
        }
        for layer in 0..network.shape.num_layers() {
            self.layer_forward(network, layer);
        }
        self.project_output(network);
        // The state after this step is the next one's start.
        for (index, layer) in network.shape.layers().enumerate() {
            for trace in &mut self.traces[index] {
                for (values, width) in trace.states(&layer) {
                    values.copy_within(width.., 0);
                }
            }
        }
        &self.logits
    }

    /// What works for a layer.
    fn work_of(&self, layer: usize) -> usize {
        layer.min(self.works.len() - 1)
    }

    /// Whether a layer's output is written out for whoever reads it.
    fn copies_output(network: &Network<'_>, layer: usize) -> bool {
        network.shape.bidirectional || drops_output(network, layer)
    }

    /// What a layer reads, `[N][I]`; empty where its input is one-hot.
    fn input_of(&self, network: &Network<'_>, layer: usize) -> &[f32] {
        match layer {
            0 => &self.dense,
            _ if Self::copies_output(network, layer - 1) => &self.works[self.work_of(layer)].input,
            _ => self.output_as_it_lies(network.shape, layer - 1),
        }
    }

    /// The only direction's h of all steps, `[N][R]`.
    fn output_as_it_lies(&self, shape: &ModelShape, layer: usize) -> &[f32] {
        &self.traces[layer][0].h[self.runs.len() * shape.layer(layer).output_size..]
    }

    /// One layer through all steps.
    fn layer_forward(&mut self, network: &Network<'_>, index: usize) {
        let work = self.work_of(index);
        let mut layer_work = std::mem::take(&mut self.works[work]);
        if index > 0 && Self::copies_output(network, index - 1) {
            self.write_output(network, index - 1, &mut layer_work.input);
        }
        let LayerWork { input, directions } = &mut layer_work;
        for (at, work) in directions.iter_mut().enumerate() {
            let direction = Self::direction(network, index, at);
            let pre = direction.room_for_input(&self.runs, work);
            let input =
                if index > 0 && Self::copies_output(network, index - 1) { Some(&input[..]) } else { None };
            self.project_input(network, index, at, input, pre);
            let tokens = if at == 1 { &self.room.tokens } else { &self.tokens };
            let input = direction.input_part(tokens);
            direction.forward(&self.runs, input, &mut self.traces[index][at], work);
        }
        self.works[work] = layer_work;
    }

    fn direction<'a>(network: &Network<'a>, layer: usize, at: usize) -> Direction<'a> {
        let Network { simd, shape, weights, .. } = *network;
        Direction { simd, model: shape, layer: shape.layer(layer), weights: &weights.layers[layer][at] }
    }

    /// The input's part of a direction's gates for all steps, unless the kernel takes it from a table: then the tokens
    /// that a direction reads backwards. `copied` is what the layer reads if it was written out.
    fn project_input(
        &mut self,
        network: &Network<'_>,
        index: usize,
        at: usize,
        copied: Option<&[f32]>,
        pre: &mut [f32],
    ) {
        let (layer, weights) = (network.shape.layer(index), &network.weights.layers[index][at]);
        let (gates, stride) = (layer.gate_size(), gate_width(&layer, network.shape.cell));
        let mut room = std::mem::take(&mut self.room);
        let reads_backwards = at == 1;
        match &weights.input {
            InputWeights::Table(table) => {
                if reads_backwards {
                    let mirrored = (0..self.tokens.len()).map(|place| self.tokens[self.runs.mirrored(place)]);
                    resize_exactly(&mut room.tokens, mirrored.len());
                    room.tokens.iter_mut().zip(mirrored).for_each(|(own, token)| *own = token);
                }
                if network.shape.cell == Cell::Gru {
                    let tokens = if reads_backwards { &room.tokens } else { &self.tokens };
                    gather_rows(table, gates, tokens, pre, stride);
                }
            }
            InputWeights::Dense { forward, .. } => {
                let width = layer.input_size;
                let mut x = copied.unwrap_or_else(|| match index {
                    0 => &self.dense,
                    _ => self.output_as_it_lies(network.shape, index - 1),
                });
                if reads_backwards {
                    resize_exactly(&mut room.input, x.len());
                    for (place, row) in room.input.chunks_exact_mut(width).enumerate() {
                        row.copy_from_slice(&x[self.runs.mirrored(place) * width..][..width]);
                    }
                    x = &room.input;
                }
                let start = Start::Row(&weights.bias);
                gemm(network.simd, self.runs.steps(), x, width, forward, pre, stride, start);
            }
        }
        self.room = room;
    }

    /// A layer's output, both directions side by side, behind its dropout: `[N][D·R]`.
    fn write_output(&self, network: &Network<'_>, index: usize, into: &mut Vec<f32>) {
        let layer = network.shape.layer(index);
        let (width, output_size) = (layer.width(), layer.output_size);
        resize_exactly(into, self.runs.steps() * width);
        for (place, row) in into.chunks_exact_mut(width).enumerate() {
            for (at, part) in row.chunks_exact_mut(output_size).enumerate() {
                part.copy_from_slice(self.output(&layer, index, at, place));
            }
        }
        self.drop(network, index, into);
    }

    /// A direction's h after the step at this place of the forward direction, `[R]`.
    fn output(&self, layer: &LayerShape, index: usize, at: usize, place: usize) -> &[f32] {
        let place = if at == 1 { self.runs.mirrored(place) } else { place };
        &self.traces[index][at].h[(self.runs.len() + place) * layer.output_size..][..layer.output_size]
    }

    /// Drops units of a layer's output, or of its gradient: both are multiplied by the same mask.
    fn drop(&self, network: &Network<'_>, index: usize, values: &mut [f32]) {
        let Some(dropout) = network.dropout.filter(|_| drops_output(network, index)) else { return };
        let layer = network.shape.layer(index);
        for (place, t, row) in self.runs.placed() {
            let t = if dropout.variational { 0 } else { t };
            let units = &mut values[place * layer.width()..][..layer.width()];
            for (at, units) in units.chunks_exact_mut(layer.output_size).enumerate() {
                let position = (t * network.shape.num_layers() + index) * layer.directions + at;
                let stream = MaskStream {
                    seed: dropout.seed,
                    step: dropout.step,
                    row: dropout.first_slot + (self.rows.start + row) as u32,
                    position: position as u32,
                };
                dropout_backward(network.simd, dropout.keep[index], stream, units);
            }
        }
    }

    /// The logits of every target.
    fn project_output(&mut self, network: &Network<'_>) {
        let (shape, last) = (network.shape, network.shape.num_layers() - 1);
        let mut features = std::mem::take(&mut self.features);
        match shape.head {
            Head::EveryStep if Self::copies_output(network, last) => {
                self.write_output(network, last, &mut features);
            }
            Head::EveryStep => {}
            Head::Final => {
                let layer = shape.layer(last);
                resize_exactly(&mut features, self.len() * layer.width());
                for (row, features) in features.chunks_exact_mut(layer.width()).enumerate() {
                    for (at, part) in features.chunks_exact_mut(layer.output_size).enumerate() {
                        part.copy_from_slice(self.output(&layer, last, at, self.last_read(row, at)));
                    }
                }
            }
        }
        self.features = features;
        let mut logits = std::mem::take(&mut self.logits);
        let start = Start::Row(&network.weights.head_bias);
        let (x, width) = (self.head_input(network), shape.output_width());
        let targets = self.targets.len();
        gemm(network.simd, targets, x, width, &network.weights.head, &mut logits, shape.classes, start);
        self.logits = logits;
    }

    /// What the head reads, `[N or rows][D·R]`.
    fn head_input(&self, network: &Network<'_>) -> &[f32] {
        let last = network.shape.num_layers() - 1;
        match network.shape.head {
            Head::EveryStep if !Self::copies_output(network, last) => {
                self.output_as_it_lies(network.shape, last)
            }
            _ => &self.features,
        }
    }

    /// The place, in the forward direction, of the step that a direction reads last.
    fn last_read(&self, row: usize, at: usize) -> usize {
        let mut places = self.runs.places_of(row);
        let last = if at == 1 { places.next() } else { places.next_back() };
        last.expect("a row has a step")
    }

    /// Loss, weight and hits of each row, summed over its steps in time order.
    pub(super) fn row_results(&self, head: Head) -> impl Iterator<Item = RowResult> + '_ {
        (0..self.len()).map(move |row| {
            let mut result = RowResult::default();
            let mut add = |at: usize| {
                result.loss += self.losses[at];
                result.weight += 1;
                result.correct += u64::from(self.correct[at]);
            };
            match head {
                Head::EveryStep => self.runs.places_of(row).skip(self.paddings[row]).for_each(&mut add),
                Head::Final => add(row),
            }
            result
        })
    }

    // What the weight gradients read. A place is one of the forward direction, `row` counts from the block's first.

    /// Gradient of the logits, `[V]`, of the target at this place or of this row.
    pub(super) fn d_logits(&self, classes: usize, target: usize) -> &[f32] {
        &self.logits[target * classes..][..classes]
    }

    /// What the head has read for this target, `[D·R]`.
    pub(super) fn features(&self, network: &Network<'_>, target: usize) -> &[f32] {
        let width = network.shape.output_width();
        &self.head_input(network)[target * width..][..width]
    }

    /// What a layer has read at this place, `[I]`.
    pub(super) fn input(&self, network: &Network<'_>, layer: usize, place: usize) -> &[f32] {
        let width = network.shape.layer(layer).input_size;
        &self.input_of(network, layer)[place * width..][..width]
    }

    /// The token at this place.
    pub(super) fn token(&self, place: usize) -> u32 {
        self.tokens[place]
    }

    /// The trace and the workspace of a direction.
    pub(super) fn direction_of(&self, layer: usize, at: usize) -> (&Trace, &Workspace) {
        (&self.traces[layer][at], &self.works[self.work_of(layer)].directions[at])
    }

    /// Gradient of the embedded input at this place, `[I]`, after the backward pass of all layers.
    pub(super) fn d_embedded(&self, width: usize, place: usize) -> &[f32] {
        &self.d_out[place * width..][..width]
    }
}

/// What the network reads of bytes.
fn scale_bytes(bytes: &[u8], scaled: &mut [f32]) {
    scaled.iter_mut().zip(bytes).for_each(|(x, &byte)| *x = f32::from(byte) / 255.0);
}

/// Whether dropout applies to a layer's output.
fn drops_output(network: &Network<'_>, layer: usize) -> bool {
    network.dropout.is_some_and(|dropout| dropout.keep[layer] < 1.0)
        && has_droppable_output(network.shape, layer)
}
