//! How many bytes blocks hold: foretold, and (for the test that compares the two) counted.

use protocol::layout::{Head, Input, LayerShape, ModelShape};

use super::RowBlock;
#[cfg(test)]
use super::{LayerWork, Room};
use crate::cpu::direction::{Trace, Workspace};
use crate::network::{input_has_gradient, reads_one_hot};

impl RowBlock {
    /// The most bytes of blocks of `rows` rows of `seq_len` steps in all, however they are cut, after a training step.
    /// `drops`: which layers' outputs are dropped. Where the state is reset in the middle, every step might be a run.
    pub(in crate::cpu) fn bytes_of(
        shape: &ModelShape,
        seq_len: usize,
        rows: usize,
        drops: impl Fn(usize) -> bool,
        recompute: bool,
    ) -> usize {
        let steps = seq_len * rows;
        let runs = if shape.reset_token.is_some() { steps } else { rows };
        let copied = |layer: usize| shape.bidirectional || drops(layer);
        let traces: usize =
            shape.layers().map(|layer| layer.directions * Trace::floats(&layer, runs, steps)).sum();
        let work = |(index, layer): (usize, LayerShape)| {
            let input = if index > 0 && copied(index - 1) { steps * layer.input_size } else { 0 };
            (input, Workspace::sizes(shape, &layer, runs, steps).map(|size| layer.directions * size))
        };
        // Where all layers share one workspace, each of its buffers grows to what the largest layer needs.
        let works = shape.layers().enumerate().map(work);
        let join = |a: usize, b: usize| if recompute { a.max(b) } else { a + b };
        let (input, sizes) = works.fold((0, [0; Workspace::BUFFERS]), |(input, sizes), of_layer| {
            let both = |at: usize| join(sizes[at], of_layer.1[at]);
            (join(input, of_layer.0), std::array::from_fn(both))
        });
        let works = input + sizes.iter().sum::<usize>();
        let last = shape.num_layers() - 1;
        let (targets, features, d_features) = match shape.head {
            Head::EveryStep => (steps, if copied(last) { steps * shape.output_width() } else { 0 }, 0),
            Head::Final => (rows, rows * shape.output_width(), rows * shape.output_width()),
        };
        let (tokens, dense) = match shape.input {
            Input::OneHot(_) => (steps, 0),
            Input::Embedding { size, .. } => (steps, steps * size),
            Input::Bytes(width) => (0, steps * width),
        };
        // The gradient of a layer's output gives way to that of its input.
        let gradients = shape.layers().enumerate().map(|(index, layer)| {
            let input = if input_has_gradient(shape, index) { layer.input_size } else { 0 };
            steps * layer.width().max(input)
        });
        let d_out = gradients.max().unwrap_or(0);
        let room = if shape.bidirectional {
            let dense = |(index, layer): (usize, LayerShape)| {
                if reads_one_hot(shape, index) { 0 } else { steps * layer.input_size }
            };
            let input = shape.layers().enumerate().map(dense).max().unwrap_or(0);
            let d_out = shape.layers().map(|layer| steps * layer.output_size).max().unwrap_or(0);
            input + d_out + if matches!(shape.input, Input::OneHot(_)) { steps } else { 0 }
        } else {
            0
        };
        let words = traces + works + tokens + dense + features + d_features + d_out + room;
        let words = words + targets * (1 + shape.classes);
        size_of::<f32>() * words + targets * (size_of::<f64>() + size_of::<bool>())
    }

    /// Bytes that this block holds, its small tables of places left out.
    #[cfg(test)]
    pub(in crate::cpu) fn held_bytes(&mut self) -> usize {
        let Self { tokens, dense, traces, works, features, targets, logits, losses, correct, .. } = self;
        let Self { d_out, d_features, room, .. } = self;
        let traces: usize = traces.iter().flatten().map(Trace::held_floats).sum();
        let work = |work: &mut LayerWork| {
            work.input.capacity() + work.directions.iter_mut().map(Workspace::held_floats).sum::<usize>()
        };
        let works: usize = works.iter_mut().map(work).sum();
        let Room { tokens: room_tokens, input, d_out: room_d_out } = room;
        let floats = [dense, features, logits, d_out, d_features, input, room_d_out].map(|f| f.capacity());
        let words = [tokens, targets, room_tokens].map(|words| words.capacity());
        let words = floats.iter().chain(&words).sum::<usize>() + traces + works;
        4 * words + 8 * losses.capacity() + correct.capacity()
    }
}
