//! Where every number of the training state lies.
//!
//! Parameters, gradients and the optimizer's two moments are one flat f32 buffer each, in PyTorch's order, shapes
//! and names. The recurrent state is one f32 buffer `[batch_size, state_size]` by slot. Packed forms that kernels
//! want are derived from these and never travel.

use bincode::{Decode, Encode};
use std::ops::Range;

use crate::cell::Cell;
use crate::control::ControlState;
use crate::job::{JobSpec, Task};

/// What a row reads at each time step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Input {
    /// A token id, as the one-hot vector of this width.
    OneHot(usize),
    /// This many bytes, each divided by 255.
    Bytes(usize),
}

impl Input {
    /// Width of the input vector, `I`.
    pub fn size(self) -> usize {
        match self {
            Self::OneHot(size) | Self::Bytes(size) => size,
        }
    }
}

/// Where the head reads the last layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Head {
    /// Logits at every time step; the target of step t is token t + 1 of the row.
    EveryStep,
    /// Logits from the state after the last step; the target is the row's label.
    Final,
}

/// The network: stacked layers of one cell, and a linear head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct ModelShape {
    /// The cell of every layer.
    pub cell: Cell,
    /// Number of stacked layers, `L`.
    pub num_layers: usize,
    /// Width of every layer, `H`.
    pub hidden_size: usize,
    /// What a row reads at each time step.
    pub input: Input,
    /// Number of classes, `V`.
    pub classes: usize,
    /// Where the head reads.
    pub head: Head,
}

impl ModelShape {
    /// The network that a job means over inputs of width `input_size` and this many classes, which only the data
    /// knows.
    pub fn of(job: &JobSpec, input_size: usize, classes: usize) -> Self {
        let (input, head) = match job.task {
            Task::Chars => (Input::OneHot(input_size), Head::EveryStep),
            Task::Rows => (Input::Bytes(input_size), Head::Final),
        };
        Self {
            cell: job.cell,
            num_layers: job.num_layers as usize,
            hidden_size: job.hidden_size as usize,
            input,
            classes,
            head,
        }
    }

    /// Width of the input of `layer`.
    pub fn layer_input_size(&self, layer: usize) -> usize {
        if layer == 0 { self.input.size() } else { self.hidden_size }
    }

    /// Floats of recurrent state per slot that are carried from step to step: for each layer h, then c for the
    /// LSTM. None where the head reads the final state only: such rows are independent samples.
    pub fn state_size(&self) -> usize {
        match self.head {
            Head::EveryStep => self.num_layers * self.cell.state_vectors() * self.hidden_size,
            Head::Final => 0,
        }
    }
}

/// One named tensor of the flat parameter buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// PyTorch's name, e.g. `rnn.weight_ih_l0`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Its place in the flat buffer, in floats.
    pub range: Range<usize>,
}

/// The tensors of one layer as places in the flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRanges {
    /// `[G·H, I]`
    pub weight_ih: Range<usize>,
    /// `[G·H, H]`
    pub weight_hh: Range<usize>,
    /// `[G·H]`
    pub bias_ih: Range<usize>,
    /// `[G·H]`
    pub bias_hh: Range<usize>,
}

/// Names, shapes and places of the whole training state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateLayout {
    /// The network this is the layout of.
    pub shape: ModelShape,
    /// Slots of the global batch, `B`.
    pub batch_size: usize,
    /// All parameter tensors in the order of the flat buffer, without gaps.
    pub tensors: Vec<Tensor>,
}

impl StateLayout {
    /// The layout of [`ModelShape::of`] this job.
    pub fn of(job: &JobSpec, input_size: usize, classes: usize) -> Self {
        Self::new(ModelShape::of(job, input_size, classes), job.batch_size as usize)
    }

    /// The layout of a network trained with `batch_size` slots.
    pub fn new(shape: ModelShape, batch_size: usize) -> Self {
        let mut tensors: Vec<Tensor> = Vec::new();
        let mut push = |name: String, shape: &[usize]| {
            let start = tensors.last().map_or(0, |t| t.range.end);
            let len = shape.iter().product::<usize>();
            tensors.push(Tensor { name, shape: shape.to_vec(), range: start..start + len });
        };
        let (hidden, gates) = (shape.hidden_size, shape.cell.gates() * shape.hidden_size);
        for layer in 0..shape.num_layers {
            push(format!("rnn.weight_ih_l{layer}"), &[gates, shape.layer_input_size(layer)]);
            push(format!("rnn.weight_hh_l{layer}"), &[gates, hidden]);
            push(format!("rnn.bias_ih_l{layer}"), &[gates]);
            push(format!("rnn.bias_hh_l{layer}"), &[gates]);
        }
        push("head.weight".into(), &[shape.classes, hidden]);
        push("head.bias".into(), &[shape.classes]);
        Self { shape, batch_size, tensors }
    }

    /// Number of parameters, `P`.
    pub fn parameters(&self) -> usize {
        self.tensors.last().map_or(0, |t| t.range.end)
    }

    /// The places of a layer's tensors.
    pub fn layer(&self, layer: usize) -> LayerRanges {
        let range = |i: usize| self.tensors[4 * layer + i].range.clone();
        LayerRanges { weight_ih: range(0), weight_hh: range(1), bias_ih: range(2), bias_hh: range(3) }
    }

    /// The places of `head.weight` and `head.bias`.
    pub fn head(&self) -> (Range<usize>, Range<usize>) {
        let start = 4 * self.shape.num_layers;
        (self.tensors[start].range.clone(), self.tensors[start + 1].range.clone())
    }

    /// The buckets of the flat gradient in the order in which the backward pass finishes them: the head, then the
    /// layers from the last to the first. Each is one contiguous range, so it can travel while the next one is
    /// computed.
    pub fn buckets(&self) -> Vec<Range<usize>> {
        let (weight, bias) = self.head();
        let layers = (0..self.shape.num_layers).rev().map(|layer| {
            let ranges = self.layer(layer);
            ranges.weight_ih.start..ranges.bias_hh.end
        });
        std::iter::once(weight.start..bias.end).chain(layers).collect()
    }

    /// Floats of recurrent state of all slots.
    pub fn recurrent(&self) -> usize {
        self.batch_size * self.shape.state_size()
    }

    /// The parts of a state image, in floats: parameters, first moment, second moment, recurrent state by slot.
    pub fn image_ranges(&self) -> [Range<usize>; 4] {
        let p = self.parameters();
        [0..p, p..2 * p, 2 * p..3 * p, 3 * p..3 * p + self.recurrent()]
    }

    /// Size of a state image in bytes: all floats, then [`Progress`], then [`ControlState`].
    pub fn image_bytes(&self) -> usize {
        4 * (3 * self.parameters() + self.recurrent()) + Progress::BYTES + ControlState::BYTES
    }
}

/// How far a run is. Part of the state and of its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Whole epochs done.
    pub epoch: u64,
    /// Steps done of the running epoch.
    pub cursor: u64,
}

impl Progress {
    /// Size of [`to_bytes`](Self::to_bytes).
    pub const BYTES: usize = 3 * 8;

    /// The progress after `step` steps.
    pub fn after(step: u64, steps_per_epoch: u64) -> Self {
        Self { step, epoch: step / steps_per_epoch, cursor: step % steps_per_epoch }
    }

    /// Three little-endian 64-bit words.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        for (place, word) in bytes.chunks_exact_mut(8).zip([self.step, self.epoch, self.cursor]) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The inverse of [`to_bytes`](Self::to_bytes).
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| bytes[8 * i + b]));
        Self { step: word(0), epoch: word(1), cursor: word(2) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn char_lstm() -> StateLayout {
        let shape = ModelShape {
            cell: Cell::Lstm,
            num_layers: 2,
            hidden_size: 128,
            input: Input::OneHot(65),
            classes: 65,
            head: Head::EveryStep,
        };
        StateLayout::new(shape, 64)
    }

    #[test]
    fn tensors_are_pytorchs_in_its_order() {
        let layout = char_lstm();
        let names: Vec<&str> = layout.tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(
            names[..5],
            ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0", "rnn.weight_ih_l1"]
        );
        assert_eq!(names[8..], ["head.weight", "head.bias"]);
        assert_eq!(layout.tensors[0].shape, [512, 65]);
        // What PyTorch counts for LSTM(65, 128, 2) and Linear(128, 65).
        assert_eq!(layout.parameters(), 240_321);
        assert_eq!(layout.shape.state_size(), 512);
    }

    #[test]
    fn buckets_cover_the_flat_buffer_once() {
        let mut buckets = char_lstm().buckets();
        assert_eq!(buckets[0], char_lstm().head().0.start..240_321);
        buckets.sort_by_key(|b| b.start);
        let mut end = 0;
        for bucket in buckets {
            assert_eq!(bucket.start, end);
            end = bucket.end;
        }
        assert_eq!(end, 240_321);
    }

    #[test]
    fn progress_comes_back_from_bytes() {
        let progress = Progress::after(17, 5);
        assert_eq!((progress.epoch, progress.cursor), (3, 2));
        assert_eq!(Progress::from_bytes(&progress.to_bytes()), progress);
    }
}
