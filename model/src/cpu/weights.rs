//! Weights in the forms that the kernels read, derived from the flat parameters once per step (once in all for a
//! reader).

use kernels::cpu::gru::GruWeights;
use kernels::cpu::input::token_table;
use kernels::cpu::lstm::{LstmOptions, Peepholes};
use kernels::{PackedMatrix, Simd};
use protocol::cell::{Cell, CellOptions, Reset};
use protocol::job::Precision;
use protocol::layout::{DirectionRanges, LayerShape, ModelShape, StateLayout};
use rayon::prelude::*;

use crate::network::{input_has_gradient, reads_one_hot};

/// All weights, packed.
pub(super) struct Weights {
    /// `[tokens, I]`, where inputs are rows of a table; else empty.
    pub(super) embedding: Vec<f32>,
    /// Per layer, per direction.
    pub(super) layers: Vec<Vec<DirectionWeights>>,
    /// `[D·R, V]` (k, n)
    pub(super) head: PackedMatrix,
    /// `[V, D·R]` (k, n)
    pub(super) head_backward: PackedMatrix,
    /// `[V]`
    pub(super) head_bias: Vec<f32>,
}

/// The weights of one direction of a layer.
pub(super) struct DirectionWeights {
    pub(super) input: InputWeights,
    pub(super) hidden: HiddenWeights,
    /// Only for the backward pass.
    pub(super) hidden_backward: HiddenWeights,
    /// `[G·H]`: what is added to the input's part: both biases and the forget bias, but only `bias_ih` for the GRU,
    /// whose `bias_hh` stays inside the reset.
    pub(super) bias: Vec<f32>,
    /// `[G·H]`
    pub(super) bias_hh: Vec<f32>,
    /// An LSTM's projection.
    pub(super) projection: Option<Projection>,
    /// An LSTM's peepholes to i, f and o, `[H]` each; else empty.
    peepholes: [Vec<f32>; 3],
    /// h and c of the initial state: `[R]` and `[H]` (empty where the cell has no c).
    pub(super) initial: [Vec<f32>; 2],
}

/// How a layer reads its input.
pub(super) enum InputWeights {
    /// One-hot input: row v is `weight_ih[:, v] + bias`, `[V][G·H]`.
    Table(Vec<f32>),
    /// Dense input.
    Dense {
        /// `[I, G·H]` (k, n)
        forward: PackedMatrix,
        /// `[G·H, I]` (k, n); only where somebody asks for the gradient of the input.
        backward: PackedMatrix,
    },
}

/// The recurrent weights.
pub(super) enum HiddenWeights {
    /// `[R, G·H]` (k, n); for the backward pass `[G·H, R]`.
    Whole(PackedMatrix),
    /// A GRU that resets before the product: `[H, 2·H]` for r and z, `[H, H]` for n; for the backward pass `[2·H, H]`
    /// and `[H, H]`.
    Split { gates: PackedMatrix, candidate: PackedMatrix },
}

/// An LSTM's projection.
pub(super) struct Projection {
    /// `[H, R]` (k, n)
    pub(super) forward: PackedMatrix,
    /// `[R, H]` (k, n)
    pub(super) backward: PackedMatrix,
}

impl Weights {
    /// Room for the weights of a network; for the forms that only the backward pass reads, if there will be one.
    pub(super) fn new(layout: &StateLayout, backward: bool) -> Self {
        let shape = &layout.shape;
        let (room, backward_of) = rooms(shape.precision, backward);
        let width = shape.output_width();
        let layers = shape.layers().enumerate().map(|(index, layer)| {
            (0..layer.directions).map(|_| DirectionWeights::new(shape, index, &layer, backward)).collect()
        });
        Self {
            embedding: vec![0.0; layout.embedding().map_or(0, |table| table.len())],
            layers: layers.collect(),
            head: room(width, shape.classes),
            head_backward: backward_of(shape.classes, width),
            head_bias: vec![0.0; shape.classes],
        }
    }

    /// Bytes of the weights of a network, with those that only the backward pass reads.
    pub(super) fn bytes_of(layout: &StateLayout) -> usize {
        let shape = &layout.shape;
        let layer = |(index, layer): (usize, LayerShape)| {
            layer.directions * DirectionWeights::bytes_of(shape, index, &layer)
        };
        let layers: usize = shape.layers().enumerate().map(layer).sum();
        let floats = shape.classes + layout.embedding().map_or(0, |table| table.len());
        layers + both_ways(shape.precision, shape.output_width(), shape.classes) + size_of::<f32>() * floats
    }

    /// Bytes that these weights hold.
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        let Self { embedding, layers, head, head_backward, head_bias } = self;
        let layers: usize = layers.iter().flatten().map(DirectionWeights::held_bytes).sum();
        layers + packed(head) + packed(head_backward) + 4 * (head_bias.len() + embedding.len())
    }

    /// Packs the parameters; the forms that only the backward pass reads, if it will run (and there is room).
    pub(super) fn pack(&mut self, simd: Simd, layout: &StateLayout, parameters: &[f32], backward: bool) {
        let shape = &layout.shape;
        if let Some(table) = layout.embedding() {
            self.embedding.copy_from_slice(&parameters[table]);
        }
        self.head_bias.copy_from_slice(&parameters[layout.head().1]);
        let (head, head_backward, width) = (&mut self.head, &mut self.head_backward, shape.output_width());
        let layers = &mut self.layers;
        rayon::join(
            || {
                let weight = &parameters[layout.head().0];
                head.pack_columns(simd, weight, width);
                if backward {
                    head_backward.pack_rows(simd, weight, width);
                }
            },
            || {
                layers.par_iter_mut().enumerate().for_each(|(index, directions)| {
                    let ranges = layout.layer(index).par_iter();
                    directions.par_iter_mut().zip(ranges).for_each(|(direction, ranges)| {
                        direction.pack(simd, shape, index, ranges, parameters, backward);
                    });
                });
            },
        );
    }
}

impl DirectionWeights {
    fn new(shape: &ModelShape, index: usize, layer: &LayerShape, backward: bool) -> Self {
        let (room, backward_of) = rooms(shape.precision, backward);
        let (gates, width, hidden) = (layer.gate_size(), layer.output_size, layer.hidden_size);
        let input = match reads_one_hot(shape, index) {
            true => InputWeights::Table(vec![0.0; layer.input_size * gates]),
            false => InputWeights::Dense {
                forward: room(layer.input_size, gates),
                backward: match input_has_gradient(shape, index) {
                    true => backward_of(gates, layer.input_size),
                    false => PackedMatrix::default(),
                },
            },
        };
        let (hidden_weights, hidden_backward) = match is_split(shape) {
            true => (
                HiddenWeights::Split { gates: room(hidden, 2 * hidden), candidate: room(hidden, hidden) },
                HiddenWeights::Split {
                    gates: backward_of(2 * hidden, hidden),
                    candidate: backward_of(hidden, hidden),
                },
            ),
            false => {
                (HiddenWeights::Whole(room(width, gates)), HiddenWeights::Whole(backward_of(gates, width)))
            }
        };
        let has_peepholes = shape.cell == Cell::Lstm && shape.options.peepholes;
        Self {
            input,
            hidden: hidden_weights,
            hidden_backward,
            bias: vec![0.0; gates],
            bias_hh: vec![0.0; gates],
            projection: has_projection(shape)
                .then(|| Projection { forward: room(hidden, width), backward: backward_of(width, hidden) }),
            peepholes: [(); 3].map(|()| vec![0.0; if has_peepholes { hidden } else { 0 }]),
            initial: [vec![0.0; width], vec![0.0; layer.cell_size]],
        }
    }

    fn bytes_of(shape: &ModelShape, index: usize, layer: &LayerShape) -> usize {
        let (gates, width, hidden) = (layer.gate_size(), layer.output_size, layer.hidden_size);
        let both = |k, n| both_ways(shape.precision, k, n);
        let input = match (reads_one_hot(shape, index), input_has_gradient(shape, index)) {
            (true, _) => size_of::<f32>() * layer.input_size * gates,
            (false, true) => both(layer.input_size, gates),
            (false, false) => PackedMatrix::bytes_of(shape.precision, layer.input_size, gates),
        };
        let recurrent = match is_split(shape) {
            true => both(hidden, 2 * hidden) + both(hidden, hidden),
            false => both(width, gates),
        };
        let projection = if has_projection(shape) { both(hidden, width) } else { 0 };
        let peepholes = if shape.cell == Cell::Lstm && shape.options.peepholes { 3 * hidden } else { 0 };
        input + recurrent + projection + size_of::<f32>() * (2 * gates + peepholes + layer.state_size())
    }

    #[cfg(test)]
    fn held_bytes(&self) -> usize {
        let Self { input, hidden, hidden_backward, bias, bias_hh, projection, peepholes, initial } = self;
        let input = match input {
            InputWeights::Table(table) => 4 * table.len(),
            InputWeights::Dense { forward, backward } => packed(forward) + packed(backward),
        };
        let recurrent = |weights: &HiddenWeights| match weights {
            HiddenWeights::Whole(whole) => packed(whole),
            HiddenWeights::Split { gates, candidate } => packed(gates) + packed(candidate),
        };
        let projection = projection.as_ref().map_or(0, |p| packed(&p.forward) + packed(&p.backward));
        let vectors = [bias, bias_hh].into_iter().chain(peepholes).chain(initial);
        input
            + recurrent(hidden)
            + recurrent(hidden_backward)
            + projection
            + 4 * vectors.map(Vec::len).sum::<usize>()
    }

    fn pack(
        &mut self,
        simd: Simd,
        shape: &ModelShape,
        index: usize,
        ranges: &DirectionRanges,
        parameters: &[f32],
        backward: bool,
    ) {
        let layer = shape.layer(index);
        let of = |range: &std::ops::Range<usize>| &parameters[range.clone()];
        let (bias_ih, bias_hh) = (of(&ranges.bias_ih), of(&ranges.bias_hh));
        self.bias_hh.copy_from_slice(bias_hh);
        self.bias.copy_from_slice(bias_ih);
        if shape.cell != Cell::Gru {
            self.bias.iter_mut().zip(bias_hh).for_each(|(sum, b)| *sum += b);
        }
        if shape.cell == Cell::Lstm && shape.options.forget_bias != 0.0 {
            let forget_gate = &mut self.bias[layer.hidden_size..2 * layer.hidden_size];
            forget_gate.iter_mut().for_each(|bias| *bias += shape.options.forget_bias);
        }
        let weight_ih = of(&ranges.weight_ih);
        match &mut self.input {
            InputWeights::Table(table) => token_table(weight_ih, &self.bias, table),
            InputWeights::Dense { forward, backward: into } => {
                forward.pack_columns(simd, weight_ih, layer.input_size);
                if backward && input_has_gradient(shape, index) {
                    into.pack_rows(simd, weight_ih, layer.input_size);
                }
            }
        }
        let weight_hh = of(&ranges.weight_hh);
        self.hidden.pack(simd, weight_hh, layer.output_size, PackedMatrix::pack_columns);
        if backward {
            self.hidden_backward.pack(simd, weight_hh, layer.output_size, PackedMatrix::pack_rows);
        }
        if let (Some(projection), Some(range)) = (&mut self.projection, &ranges.weight_hr) {
            projection.forward.pack_columns(simd, of(range), layer.hidden_size);
            if backward {
                projection.backward.pack_rows(simd, of(range), layer.hidden_size);
            }
        }
        for (own, range) in self.peepholes.iter_mut().zip(ranges.peepholes.iter().flatten()) {
            own.copy_from_slice(of(range));
        }
        for (own, range) in self.initial.iter_mut().zip([&ranges.initial_h, &ranges.initial_c]) {
            if let Some(range) = range {
                own.copy_from_slice(of(range));
            }
        }
    }

    /// The cell's options as the LSTM's kernels take them.
    pub(super) fn lstm_options(&self, options: &CellOptions) -> LstmOptions<'_> {
        let [i, f, o] = &self.peepholes;
        LstmOptions {
            recurrent_activation: options.recurrent_activation,
            cell_clip: options.cell_clip,
            peepholes: options.peepholes.then_some(Peepholes { i, f, o }),
        }
    }
}

impl HiddenWeights {
    /// Packs `weight_hh` `[G·H, width]` in one of the two ways.
    fn pack(
        &mut self,
        simd: Simd,
        weight_hh: &[f32],
        width: usize,
        pack: impl Fn(&mut PackedMatrix, Simd, &[f32], usize),
    ) {
        match self {
            Self::Whole(whole) => pack(whole, simd, weight_hh, width),
            Self::Split { gates, candidate } => {
                let (of_gates, of_candidate) = weight_hh.split_at(2 * width * width);
                pack(gates, simd, of_gates, width);
                pack(candidate, simd, of_candidate, width);
            }
        }
    }

    /// As a cell takes them that multiplies once.
    pub(super) fn whole(&self) -> &PackedMatrix {
        match self {
            Self::Whole(whole) => whole,
            Self::Split { .. } => unreachable!("only a GRU has its weights split"),
        }
    }

    /// As the GRU takes them.
    pub(super) fn of_gru(&self) -> GruWeights<'_> {
        match self {
            Self::Whole(whole) => GruWeights::After(whole),
            Self::Split { gates, candidate } => GruWeights::Before { gates, candidate },
        }
    }
}

fn is_split(shape: &ModelShape) -> bool {
    shape.cell == Cell::Gru && shape.options.reset == Reset::Before
}

fn has_projection(shape: &ModelShape) -> bool {
    shape.cell == Cell::Lstm && shape.options.projection.is_some()
}

/// Bytes of a matrix packed for the forward and for the backward pass.
fn both_ways(precision: Precision, k: usize, n: usize) -> usize {
    PackedMatrix::bytes_of(precision, k, n) + PackedMatrix::bytes_of(precision, n, k)
}

/// What makes matrices, and what makes those that only the backward pass reads: empty ones, if there will be none.
fn rooms(
    precision: Precision,
    backward: bool,
) -> (impl Fn(usize, usize) -> PackedMatrix, impl Fn(usize, usize) -> PackedMatrix) {
    let room = move |k, n| PackedMatrix::with_precision(precision, k, n);
    (room, move |k, n| if backward { room(k, n) } else { PackedMatrix::default() })
}

#[cfg(test)]
fn packed(matrix: &PackedMatrix) -> usize {
    PackedMatrix::bytes_of(matrix.precision(), matrix.k(), matrix.n())
}
