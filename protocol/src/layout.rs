//! Where every number of the training state lies.
//!
//! Parameters, gradients and the optimizer's two moments are one flat f32 buffer each, in PyTorch's order, shapes
//! and names. The recurrent state is one f32 buffer `[batch_size, state_size]` by slot. Packed forms that kernels
//! want are derived from these and never travel.

use bincode::{Decode, Encode};
use std::ops::Range;

use crate::cell::{Cell, CellOptions};
use crate::control::ControlState;
use crate::job::{InitialState, JobSpec, Precision, Task, TextMode};

/// What a row reads at each time step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Input {
    /// A token id, as the one-hot vector of this width.
    OneHot(usize),
    /// A token id, as a row of a table that is learnt.
    Embedding {
        /// Rows of the table.
        tokens: usize,
        /// Width of a row.
        size: usize,
    },
    /// This many bytes, each divided by 255.
    Bytes(usize),
}

impl Input {
    /// Width of the input vector, `I`.
    pub fn size(self) -> usize {
        match self {
            Self::OneHot(size) | Self::Embedding { size, .. } | Self::Bytes(size) => size,
        }
    }

    /// Number of tokens, where tokens are read.
    pub fn tokens(self) -> Option<usize> {
        match self {
            Self::OneHot(tokens) | Self::Embedding { tokens, .. } => Some(tokens),
            Self::Bytes(_) => None,
        }
    }
}

/// Where the head reads the last layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Head {
    /// Logits at every time step; the target of step t is token t + 1 of the row.
    EveryStep,
    /// Logits from the state after the last step, both directions' side by side; the target is the row's label.
    Final,
}

/// The network: stacked layers of one cell, and a linear head.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct ModelShape {
    /// The cell of every layer.
    pub cell: Cell,
    /// Its options.
    pub options: CellOptions,
    /// Units of each layer and direction, from the input upwards.
    pub hidden_sizes: Vec<usize>,
    /// Whether each layer has a second direction, which reads a row from its last step to its first.
    pub bidirectional: bool,
    /// What a row reads at each time step.
    pub input: Input,
    /// Number of classes, `V`.
    pub classes: usize,
    /// Where the head reads.
    pub head: Head,
    /// Where a row starts that does not go on from a carried state.
    pub initial_state: InitialState,
    /// Whether a slot's state goes on from one piece of work of an epoch to the next.
    pub carries_state: bool,
    /// The token before which the state becomes the initial state.
    pub reset_token: Option<u16>,
    /// What the operands of its matrix products are rounded to.
    pub precision: Precision,
}

/// One layer of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerShape {
    /// Gates of the cell, `G`.
    pub gates: usize,
    /// Width of the input, `I`.
    pub input_size: usize,
    /// Units of each direction, `H`.
    pub hidden_size: usize,
    /// Width of each direction's output, `R`: `H`, or what an LSTM projects to.
    pub output_size: usize,
    /// Width of each direction's c; 0 where the cell has none.
    pub cell_size: usize,
    /// 1, or 2 if it is bidirectional, `D`.
    pub directions: usize,
}

impl LayerShape {
    /// Width of all gates of a direction, `G·H`.
    pub fn gate_size(&self) -> usize {
        self.gates * self.hidden_size
    }

    /// Width of the layer's output, `D·R`.
    pub fn width(&self) -> usize {
        self.directions * self.output_size
    }

    /// Floats that a direction carries from step to step: h, then c.
    pub fn state_size(&self) -> usize {
        self.output_size + self.cell_size
    }
}

impl ModelShape {
    /// The network that a job means over inputs of width `input_size` (or so many tokens) and this many classes,
    /// which only the data knows. The data also knows the [`reset_token`](Self::reset_token).
    pub fn of(job: &JobSpec, input_size: usize, classes: usize) -> Self {
        let tokens = match job.embedding_size {
            0 => Input::OneHot(input_size),
            size => Input::Embedding { tokens: input_size, size: size as usize },
        };
        let (input, head) = match job.task {
            Task::Chars => (tokens, Head::EveryStep),
            Task::Rows => (Input::Bytes(input_size), Head::Final),
            Task::Classify => (tokens, Head::Final),
        };
        Self {
            cell: job.cell,
            options: job.cell_options(),
            hidden_sizes: job.layer_sizes(),
            bidirectional: job.bidirectional,
            input,
            classes,
            head,
            initial_state: job.initial_state,
            carries_state: job.task == Task::Chars && job.text.mode == TextMode::Stream && job.carry_state,
            reset_token: None,
            precision: job.precision,
        }
    }

    /// Number of stacked layers, `L`.
    pub fn num_layers(&self) -> usize {
        self.hidden_sizes.len()
    }

    /// A layer, counted from the input.
    pub fn layer(&self, layer: usize) -> LayerShape {
        let directions = 1 + usize::from(self.bidirectional);
        let output_size = |hidden_size: usize| match (self.cell, self.options.projection) {
            (Cell::Lstm, Some(width)) => width,
            _ => hidden_size,
        };
        let hidden_size = self.hidden_sizes[layer];
        LayerShape {
            gates: self.cell.gates(),
            input_size: match layer {
                0 => self.input.size(),
                _ => directions * output_size(self.hidden_sizes[layer - 1]),
            },
            hidden_size,
            output_size: output_size(hidden_size),
            cell_size: if self.cell == Cell::Lstm { hidden_size } else { 0 },
            directions,
        }
    }

    /// All layers, from the input upwards.
    pub fn layers(&self) -> impl DoubleEndedIterator<Item = LayerShape> + ExactSizeIterator + '_ {
        (0..self.num_layers()).map(|layer| self.layer(layer))
    }

    /// Width of the last layer's output, which the head reads.
    pub fn output_width(&self) -> usize {
        self.layer(self.num_layers() - 1).width()
    }

    /// Floats of recurrent state per slot that are carried from one piece of work to the next: per layer, per
    /// direction: h, then c for the LSTM. None where rows are independent samples.
    pub fn state_size(&self) -> usize {
        match self.carries_state {
            true => self.layers().map(|layer| layer.directions * layer.state_size()).sum(),
            false => 0,
        }
    }
}

/// One named tensor of the flat parameter buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// PyTorch's name where PyTorch has one, e.g. `rnn.weight_ih_l0_reverse`; else e.g. `rnn.peephole_i_l0`,
    /// `rnn.initial_h_l0`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Its place in the flat buffer, in floats.
    pub range: Range<usize>,
}

/// The tensors of one direction of one layer as places in the flat buffer, one behind the other in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectionRanges {
    /// `[G·H, I]`
    pub weight_ih: Range<usize>,
    /// `[G·H, R]`
    pub weight_hh: Range<usize>,
    /// `[G·H]`
    pub bias_ih: Range<usize>,
    /// `[G·H]`
    pub bias_hh: Range<usize>,
    /// `[R, H]`: an LSTM's projection.
    pub weight_hr: Option<Range<usize>>,
    /// `[H]` each, to the gates i, f and o: an LSTM's peepholes.
    pub peepholes: Option<[Range<usize>; 3]>,
    /// `[R]`, where the initial state is learnt.
    pub initial_h: Option<Range<usize>>,
    /// `[H]`, where it is learnt and the cell has a c.
    pub initial_c: Option<Range<usize>>,
}

/// Names, shapes and places of the whole training state.
#[derive(Debug, Clone, PartialEq)]
pub struct StateLayout {
    /// The network this is the layout of.
    pub shape: ModelShape,
    /// Slots of the global batch, `B`.
    pub batch_size: usize,
    /// All parameter tensors in the order of the flat buffer, without gaps: the embedding's table, the layers from
    /// the input upwards, the head.
    pub tensors: Vec<Tensor>,
    /// `[tokens, I]`
    embedding: Option<Range<usize>>,
    /// Per layer, per direction.
    layers: Vec<Vec<DirectionRanges>>,
    head: (Range<usize>, Range<usize>),
}

impl StateLayout {
    /// The layout of [`ModelShape::of`] this job.
    pub fn of(job: &JobSpec, input_size: usize, classes: usize) -> Self {
        Self::new(ModelShape::of(job, input_size, classes), job.batch_size as usize)
    }

    /// The layout of a network trained with `batch_size` slots.
    pub fn new(shape: ModelShape, batch_size: usize) -> Self {
        let mut tensors: Vec<Tensor> = Vec::new();
        let mut place = |name: String, shape: &[usize]| {
            let start = tensors.last().map_or(0, |tensor| tensor.range.end);
            let range = start..start + shape.iter().product::<usize>();
            tensors.push(Tensor { name, shape: shape.to_vec(), range: range.clone() });
            range
        };
        let embedding = match shape.input {
            Input::Embedding { tokens, size } => Some(place("embedding.weight".into(), &[tokens, size])),
            Input::OneHot(_) | Input::Bytes(_) => None,
        };
        let mut layers = Vec::new();
        for (at, layer) in shape.layers().enumerate() {
            let suffixes = [format!("_l{at}"), format!("_l{at}_reverse")];
            let directions = suffixes[..layer.directions].iter();
            layers.push(
                directions.map(|suffix| DirectionRanges::place(&shape, &layer, suffix, &mut place)).collect(),
            );
        }
        let width = shape.output_width();
        let weight = place("head.weight".into(), &[shape.classes, width]);
        let head = (weight, place("head.bias".into(), &[shape.classes]));
        Self { shape, batch_size, tensors, embedding, layers, head }
    }

    /// Number of parameters, `P`.
    pub fn parameters(&self) -> usize {
        self.head.1.end
    }

    /// The place of `embedding.weight` `[tokens, I]`, where there is one.
    pub fn embedding(&self) -> Option<Range<usize>> {
        self.embedding.clone()
    }

    /// The places of a layer's tensors, for each direction.
    pub fn layer(&self, layer: usize) -> &[DirectionRanges] {
        &self.layers[layer]
    }

    /// The places of `head.weight` `[V, D·R]` and `head.bias` `[V]`.
    pub fn head(&self) -> (Range<usize>, Range<usize>) {
        self.head.clone()
    }

    /// The buckets of the flat gradient in the order in which the backward pass finishes them: the head, then the
    /// layers from the last to the first, then the embedding if there is one. Each is one contiguous range, so it
    /// can travel while the next one is computed.
    pub fn buckets(&self) -> Vec<Range<usize>> {
        let (weight, bias) = self.head();
        let layers = self.layers.iter().rev().map(|directions| {
            let (first, last) = (&directions[0], &directions[directions.len() - 1]);
            first.weight_ih.start..last.end()
        });
        std::iter::once(weight.start..bias.end).chain(layers).chain(self.embedding()).collect()
    }

    /// What a bucket is.
    pub fn part(&self, bucket: usize) -> Part {
        match bucket {
            0 => Part::Head,
            _ if bucket <= self.layers.len() => Part::Layer(self.layers.len() - bucket),
            _ => Part::Embedding,
        }
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

/// A part of a network whose gradient is one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The head.
    Head,
    /// A layer with all its directions.
    Layer(usize),
    /// The embedding's table.
    Embedding,
}

impl DirectionRanges {
    /// Puts a direction's tensors behind the others; their names end in `suffix`.
    fn place(
        shape: &ModelShape,
        layer: &LayerShape,
        suffix: &str,
        place: &mut impl FnMut(String, &[usize]) -> Range<usize>,
    ) -> Self {
        let LayerShape { hidden_size, output_size, cell_size, .. } = *layer;
        let gates = layer.gate_size();
        let is_lstm = shape.cell == Cell::Lstm;
        let is_learnt = shape.initial_state == InitialState::Learnt;
        let mut place = |name: &str, shape: &[usize]| place(format!("rnn.{name}{suffix}"), shape);
        Self {
            weight_ih: place("weight_ih", &[gates, layer.input_size]),
            weight_hh: place("weight_hh", &[gates, output_size]),
            bias_ih: place("bias_ih", &[gates]),
            bias_hh: place("bias_hh", &[gates]),
            weight_hr: shape
                .options
                .projection
                .filter(|_| is_lstm)
                .map(|width| place("weight_hr", &[width, hidden_size])),
            peepholes: (is_lstm && shape.options.peepholes)
                .then(|| ["peephole_i", "peephole_f", "peephole_o"].map(|name| place(name, &[hidden_size]))),
            initial_h: is_learnt.then(|| place("initial_h", &[output_size])),
            initial_c: (is_learnt && is_lstm).then(|| place("initial_c", &[cell_size])),
        }
    }

    /// Where the last of the tensors ends.
    fn end(&self) -> usize {
        let optional = [&self.weight_hr, &self.initial_h, &self.initial_c];
        let peephole = self.peepholes.as_ref().map(|[_, _, o]| o.end);
        let ends = optional.into_iter().flatten().map(|range| range.end).chain(peephole);
        ends.fold(self.bias_hh.end, usize::max)
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
    use crate::job::JobFile;

    fn layout(settings: &[(&str, &str)]) -> StateLayout {
        let settings: Vec<_> = settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        StateLayout::of(&JobFile::resolve("char-lstm", None, &settings).unwrap().job, 65, 65)
    }

    fn char_lstm() -> StateLayout {
        layout(&[])
    }

    /// Everything that adds a tensor, in one network.
    fn rich() -> StateLayout {
        layout(&[
            ("task", "classify"),
            ("bidirectional", "true"),
            ("hidden_sizes", "[4, 6]"),
            ("projection", "3"),
            ("peepholes", "true"),
            ("embedding_size", "5"),
            ("initial_state", "learnt"),
        ])
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
        assert_eq!(char_lstm().buckets()[0], char_lstm().head().0.start..240_321);
        for layout in [char_lstm(), rich()] {
            let mut buckets = layout.buckets();
            buckets.sort_by_key(|bucket| bucket.start);
            let mut end = 0;
            for bucket in buckets {
                assert_eq!(bucket.start, end);
                end = bucket.end;
            }
            assert_eq!(end, layout.parameters());
        }
        let parts: Vec<Part> = (0..rich().buckets().len()).map(|bucket| rich().part(bucket)).collect();
        assert_eq!(parts, [Part::Head, Part::Layer(1), Part::Layer(0), Part::Embedding]);
    }

    #[test]
    fn every_option_has_its_tensors_without_gaps() {
        let layout = rich();
        assert_eq!(
            (layout.tensors[0].name.as_str(), &layout.tensors[0].shape[..]),
            ("embedding.weight", &[65, 5][..])
        );
        let names: Vec<&str> = layout.tensors[11..21].iter().map(|t| t.name.as_str()).collect();
        let of_reverse = [
            "weight_ih",
            "weight_hh",
            "bias_ih",
            "bias_hh",
            "weight_hr",
            "peephole_i",
            "peephole_f",
            "peephole_o",
            "initial_h",
            "initial_c",
        ];
        assert_eq!(names, of_reverse.map(|name| format!("rnn.{name}_l0_reverse")));
        let shape_of = |name: &str| &layout.tensors.iter().find(|t| t.name == name).unwrap().shape[..];
        assert_eq!(shape_of("rnn.weight_ih_l0"), [16, 5]);
        assert_eq!(shape_of("rnn.weight_ih_l1_reverse"), [24, 6]);
        assert_eq!(shape_of("rnn.weight_hr_l1"), [3, 6]);
        assert_eq!(shape_of("head.weight"), [65, 6]);
        assert_eq!(layout.layer(1)[1].initial_c.clone().unwrap().end, layout.head().0.start);
        let mut end = 0;
        for tensor in &layout.tensors {
            assert_eq!(tensor.range.start, end, "{}", tensor.name);
            end = tensor.range.end;
        }
        assert_eq!(end, layout.parameters());
        assert_eq!(layout.shape.state_size(), 0);
    }

    #[test]
    fn progress_comes_back_from_bytes() {
        let progress = Progress::after(17, 5);
        assert_eq!((progress.epoch, progress.cursor), (3, 2));
        assert_eq!(Progress::from_bytes(&progress.to_bytes()), progress);
    }
}
