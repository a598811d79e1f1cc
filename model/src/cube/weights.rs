//! Weights in the forms that the recurrent kernels read, derived from the flat parameters once per step (once in all for
//! a reader): two or three launches, whatever the network.

use std::ops::Range;

use cubecl::prelude::*;
use kernels::cube::buffer::{ALIGNMENT, Buffer};
use kernels::cube::elements::{pick, pick_sums};
use protocol::cell::{Cell, Reset};
use protocol::job::Precision;
use protocol::layout::{DirectionRanges, LayerShape, ModelShape, StateLayout};

/// No second parameter of a sum.
const NONE: u32 = u32::MAX;

/// Where a network's derived weights come from: made once for each job.
pub(super) struct Recipe {
    precision: Precision,
    /// Of each number of the matrices: its parameter.
    matrix_indices: Buffer,
    /// Of each number of the vectors: its parameter.
    vector_indices: Buffer,
    /// Of each number of the biases: its parameters, and what is added to them.
    bias_indices: [Buffer; 2],
    bias_constants: Buffer,
    /// Per layer, per direction: where its weights are.
    places: Vec<Vec<Places>>,
}

/// The parts of one direction's weights.
struct Places {
    weight_hh_t: Range<usize>,
    weight_hh: Range<usize>,
    projection: Option<Range<usize>>,
    peepholes: Option<Range<usize>>,
    initial: [Option<Range<usize>>; 2],
    bias: Range<usize>,
    bias_hn: Option<Range<usize>>,
}

/// The derived weights of a network.
pub(super) struct Weights {
    /// Operands of products, rounded to the job's precision.
    matrices: Buffer,
    vectors: Buffer,
    biases: Buffer,
    /// Per layer, per direction.
    pub(super) layers: Vec<Vec<DirectionWeights>>,
}

/// The weights of one direction of a layer.
pub(super) struct DirectionWeights {
    /// `[R][G·H]`
    pub(super) weight_hh_t: Buffer,
    /// `[G·H][R]`
    pub(super) weight_hh: Buffer,
    /// An LSTM's projection: `[R][H]`.
    pub(super) projection: Option<Buffer>,
    /// An LSTM's peepholes to i, f and o: `[3][H]`.
    pub(super) peepholes: Option<Buffer>,
    /// h and c of the initial state: `[R]` and `[H]`.
    pub(super) initial: [Buffer; 2],
    /// `[G·H]`: all that is added to the input's part of the gates.
    pub(super) bias: Buffer,
    /// `[H]`: what a GRU's reset gate acts on besides the product with h, where it acts after it.
    pub(super) bias_hn: Option<Buffer>,
}

/// Parts of one buffer on the device, each in its place.
#[derive(Default)]
struct Parts {
    first: Vec<u32>,
    second: Vec<u32>,
    constants: Vec<f32>,
}

/// The parts of each buffer of [`Weights`].
#[derive(Default)]
struct AllParts {
    matrices: Parts,
    vectors: Parts,
    biases: Parts,
}

impl Parts {
    /// Puts a part behind the others; gives its place.
    fn put(&mut self, part: impl IntoIterator<Item = (u32, u32, f32)>) -> Range<usize> {
        let start = self.first.len();
        for (first, second, constant) in part {
            self.first.push(first);
            self.second.push(second);
            self.constants.push(constant);
        }
        let end = self.first.len();
        let padded = end.next_multiple_of(ALIGNMENT);
        self.first.resize(padded, 0);
        self.second.resize(padded, NONE);
        self.constants.resize(padded, 0.0);
        start..end
    }

    /// A part that is parameters as they are.
    fn copy(&mut self, indices: impl IntoIterator<Item = usize>) -> Range<usize> {
        self.put(indices.into_iter().map(|index| (index as u32, NONE, 0.0)))
    }

    /// A part that is a matrix `[rows][columns]` with rows and columns exchanged.
    fn transposed(&mut self, matrix: &Range<usize>, columns: usize) -> Range<usize> {
        let (start, rows) = (matrix.start, matrix.len() / columns);
        self.copy((0..columns).flat_map(|column| (0..rows).map(move |row| start + row * columns + column)))
    }
}

impl Recipe {
    /// The recipe of a network.
    pub(super) fn new<R: Runtime>(client: &ComputeClient<R>, layout: &StateLayout) -> Self {
        let shape = &layout.shape;
        let mut all = AllParts::default();
        let of_layer = |(index, layer): (usize, LayerShape)| {
            let ranges = layout.layer(index).iter();
            ranges.map(|ranges| Places::new(shape, &layer, ranges, &mut all)).collect()
        };
        let places = shape.layers().enumerate().map(of_layer).collect();
        let AllParts { matrices, vectors, biases } = all;
        Self {
            precision: shape.precision,
            matrix_indices: Buffer::from_words(client, &matrices.first),
            vector_indices: Buffer::from_words(client, &vectors.first),
            bias_indices: [&biases.first, &biases.second].map(|indices| Buffer::from_words(client, indices)),
            bias_constants: Buffer::from_floats(client, &biases.constants),
            places,
        }
    }

    /// Room for the derived weights.
    pub(super) fn weights<R: Runtime>(&self, client: &ComputeClient<R>, shape: &ModelShape) -> Weights {
        let room = [&self.matrix_indices, &self.vector_indices, &self.bias_constants];
        let [matrices, vectors, biases] = room.map(|indices| Buffer::new(client, indices.len()));
        let layers = (shape.layers().zip(&self.places))
            .map(|(layer, places)| {
                places
                    .iter()
                    .map(|places| places.weights(client, &layer, [&matrices, &vectors, &biases]))
                    .collect()
            })
            .collect();
        Weights { matrices, vectors, biases, layers }
    }

    /// Derives the weights from the parameters `[P]`.
    pub(super) fn derive<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        parameters: &Buffer,
        weights: &Weights,
    ) {
        pick(client, self.precision, parameters, &self.matrix_indices, &weights.matrices);
        pick(client, Precision::F32, parameters, &self.vector_indices, &weights.vectors);
        let [first, second] = &self.bias_indices;
        pick_sums(client, parameters, first, second, &self.bias_constants, &weights.biases);
    }
}

impl Places {
    fn new(
        shape: &ModelShape,
        layer: &LayerShape,
        ranges: &DirectionRanges,
        AllParts { matrices, vectors, biases }: &mut AllParts,
    ) -> Self {
        let (hidden, output) = (layer.hidden_size, layer.output_size);
        let resets_after = shape.cell == Cell::Gru && shape.options.reset == Reset::After;
        let candidate = 2 * hidden;
        let bias = (0..layer.gate_size()).map(|gate| {
            let index = |range: &Range<usize>| (range.start + gate) as u32;
            let is_in_reset = resets_after && gate >= candidate;
            let is_forget = shape.cell == Cell::Lstm && (hidden..candidate).contains(&gate);
            let second = if is_in_reset { NONE } else { index(&ranges.bias_hh) };
            (index(&ranges.bias_ih), second, if is_forget { shape.options.forget_bias } else { 0.0 })
        });
        Self {
            bias: biases.put(bias),
            bias_hn: resets_after.then(|| vectors.copy(ranges.bias_hh.clone().skip(candidate))),
            weight_hh_t: matrices.transposed(&ranges.weight_hh, output),
            weight_hh: matrices.copy(ranges.weight_hh.clone()),
            projection: ranges.weight_hr.as_ref().map(|weight| matrices.copy(weight.clone())),
            peepholes: (ranges.peepholes.as_ref())
                .map(|peepholes| vectors.copy(peepholes.iter().flat_map(Range::clone))),
            initial: [&ranges.initial_h, &ranges.initial_c]
                .map(|initial| initial.as_ref().map(|range| vectors.copy(range.clone()))),
        }
    }

    fn weights<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        layer: &LayerShape,
        [matrices, vectors, biases]: [&Buffer; 3],
    ) -> DirectionWeights {
        let matrix = |range: &Range<usize>| matrices.part(range.clone());
        let vector = |range: &Range<usize>| vectors.part(range.clone());
        let [initial_h, initial_c] = &self.initial;
        let initial = |range: &Option<Range<usize>>, width| match range {
            Some(range) => vector(range),
            None => Buffer::from_floats(client, &vec![0.0; width]),
        };
        DirectionWeights {
            weight_hh_t: matrix(&self.weight_hh_t),
            weight_hh: matrix(&self.weight_hh),
            projection: self.projection.as_ref().map(matrix),
            peepholes: self.peepholes.as_ref().map(vector),
            initial: [initial(initial_h, layer.output_size), initial(initial_c, layer.cell_size)],
            bias: biases.part(self.bias.clone()),
            bias_hn: self.bias_hn.as_ref().map(vector),
        }
    }
}
