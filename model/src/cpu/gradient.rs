//! Weight gradients: for each shard, sums over its (step, row) pairs in that order.
//!
//! A shard's rows may lie in several blocks; they are read in row order, so the sums do not depend on the blocks.

use std::ops::Range;

use kernels::cpu::input::{embedding_gradient, scatter_add_rows};
use kernels::cpu::reduce::{column_sum, product_column_sum};
use kernels::{PackedLeft, PackedMatrix, Simd, gemm_transposed};
use protocol::cell::{Cell, Reset};
use protocol::layout::{DirectionRanges, Head, Input, LayerShape, ModelShape, Part, StateLayout};

use super::block::{Network, RowBlock};
use super::weights::reads_one_hot;

/// Room for packed operands, kept from task to task.
pub(super) struct Scratch {
    left: PackedLeft,
    right: PackedMatrix,
    /// Gradient of a one-hot input's weights, `[V][G·H]`.
    table: Vec<f32>,
    /// The most bytes that were in use at a time.
    #[cfg(test)]
    pub(super) most_bytes: usize,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            left: PackedLeft::new(0, 0),
            right: PackedMatrix::new(0, 0),
            table: Vec::new(),
            #[cfg(test)]
            most_bytes: 0,
        }
    }
}

/// One bucket's gradient for one shard.
pub(super) struct GradientTask<'a> {
    pub(super) network: Network<'a>,
    pub(super) layout: &'a StateLayout,
    pub(super) blocks: &'a [RowBlock],
    pub(super) part: Part,
    /// Rows of the shard, counted from the batch's first.
    pub(super) rows: Range<usize>,
}

/// The step of a row, which lies at a place of its block.
#[derive(Clone, Copy)]
struct Pair<'a> {
    block: &'a RowBlock,
    /// Counted from the block's first.
    row: usize,
    place: usize,
}

impl<'a> GradientTask<'a> {
    /// Computes the sums; `gradient` is the bucket's range of the flat gradient and is overwritten.
    pub(super) fn run(&self, scratch: &mut Scratch, gradient: &mut [f32]) {
        match self.part {
            Part::Head => self.head(scratch, gradient),
            Part::Layer(layer) => {
                let directions = self.layout.layer(layer);
                let start = directions[0].weight_ih.start;
                for (at, ranges) in directions.iter().enumerate() {
                    let gradients = Gradients { start, bucket: &mut *gradient };
                    self.direction(scratch, layer, at, ranges, gradients);
                }
            }
            Part::Embedding => self.embedding(gradient),
        }
    }

    fn simd(&self) -> Simd {
        self.network.simd
    }

    fn shape(&self) -> &'a ModelShape {
        self.network.shape
    }

    /// Steps of the longest row.
    fn seq_len(&self) -> usize {
        self.blocks.iter().map(|block| block.runs.seq_len()).max().unwrap_or(0)
    }

    /// All (step, row) pairs of the shard in the order of every sum: step by step, and in a step row by row.
    fn pairs(&self) -> impl Iterator<Item = Pair<'a>> + use<'a> {
        self.pairs_of(0..self.seq_len())
    }

    /// Those of some steps.
    fn pairs_of(&self, steps: Range<usize>) -> impl Iterator<Item = Pair<'a>> + use<'a> {
        let blocks = self.blocks;
        let rows = self.rows.clone();
        steps.flat_map(move |t| {
            let rows = rows.clone();
            blocks.iter().flat_map(move |block| {
                let pair = move |row| Some(Pair { block, row, place: block.runs.place(t, row)? });
                rows_within(block, &rows).filter_map(pair)
            })
        })
    }

    /// All rows of the shard, with their blocks.
    fn rows(&self) -> impl Iterator<Item = (&'a RowBlock, usize)> + use<'a> {
        let rows = self.rows.clone();
        self.blocks.iter().flat_map(move |block| rows_within(block, &rows).map(move |row| (block, row)))
    }

    fn head(&self, scratch: &mut Scratch, gradient: &mut [f32]) {
        let (shape, network) = (self.shape(), self.network);
        let (classes, width) = (shape.classes, shape.output_width());
        let (d_weight, d_bias) = gradient.split_at_mut(self.layout.head().0.len());
        // Where the final state is read there is one target a row.
        let is_final = shape.head == Head::Final;
        let targets = || {
            let pairs = self.pairs_of(0..if is_final { 1 } else { self.seq_len() });
            pairs.map(move |pair| (pair.block, if is_final { pair.row } else { pair.place }))
        };
        let count = targets().count();
        let d = || targets().map(|(block, target)| block.d_logits(classes, target));
        scratch.pack_left((count, classes), d());
        let features = targets().map(move |(block, target)| block.features(&network, target));
        scratch.product(self.simd(), (count, width), features, d_weight);
        column_sum(self.simd(), d(), d_bias);
    }

    fn direction(
        &self,
        scratch: &mut Scratch,
        layer: usize,
        at: usize,
        ranges: &DirectionRanges,
        mut gradients: Gradients<'_>,
    ) {
        let (simd, shape, network) = (self.simd(), self.shape(), self.network);
        let of_layer = shape.layer(layer);
        let LayerShape { input_size, hidden_size, output_size, .. } = of_layer;
        let gates = of_layer.gate_size();
        let count = self.pairs().count();
        let pairs = || self.pairs().map(move |pair| pair.of_direction(layer, at));
        let d_pre = || pairs().map(move |pair| row(&pair.work().d_pre, gates, pair.own));
        let h_before = || pairs().map(move |pair| row(&pair.trace().h, output_size, pair.before()));

        let is_one_hot = reads_one_hot(shape, layer);
        let is_split = shape.cell == Cell::Gru;
        if !(is_one_hot && is_split) {
            scratch.pack_left((count, gates), d_pre());
        }
        let d_weight_ih = gradients.of(&ranges.weight_ih);
        if is_one_hot {
            let tokens = pairs().map(|pair| pair.block.token(pair.place));
            scratch.scatter(simd, gates, tokens.zip(d_pre()), d_weight_ih);
        } else {
            let x = pairs().map(move |pair| pair.block.input(&network, layer, pair.place));
            scratch.product(simd, (count, input_size), x, d_weight_ih);
        }
        column_sum(simd, d_pre(), gradients.of(&ranges.bias_ih));

        if !is_split {
            scratch.product(simd, (count, output_size), h_before(), gradients.of(&ranges.weight_hh));
            // Both parts of the gates are plainly added: their gradients are the same.
            gradients.copy(&ranges.bias_ih, &ranges.bias_hh);
        } else {
            let d_h_part = || pairs().map(move |pair| row(&pair.work().d_h_part, gates, pair.own));
            column_sum(simd, d_h_part(), gradients.of(&ranges.bias_hh));
            let d_weight_hh = gradients.of(&ranges.weight_hh);
            if shape.options.reset == Reset::After {
                scratch.pack_left((count, gates), d_h_part());
                scratch.product(simd, (count, hidden_size), h_before(), d_weight_hh);
            } else {
                // r and z have multiplied h, n has multiplied the reset h.
                let (of_gates, of_candidate) = d_weight_hh.split_at_mut(2 * hidden_size * hidden_size);
                scratch.pack_left((count, 2 * hidden_size), d_h_part().map(|d| &d[..2 * hidden_size]));
                scratch.product(simd, (count, hidden_size), h_before(), of_gates);
                let reset = pairs()
                    .map(move |pair| &row(&pair.work().gates, 4 * hidden_size, pair.own)[3 * hidden_size..]);
                scratch.pack_left((count, hidden_size), d_h_part().map(|d| &d[2 * hidden_size..]));
                scratch.product(simd, (count, hidden_size), reset, of_candidate);
            }
        }

        if let Some(weight_hr) = &ranges.weight_hr {
            let d = pairs().map(move |pair| row(&pair.work().d_projected, output_size, pair.own));
            scratch.pack_left((count, output_size), d);
            let projected = pairs().map(move |pair| row(&pair.work().unprojected, hidden_size, pair.own));
            scratch.product(simd, (count, hidden_size), projected, gradients.of(weight_hr));
        }
        if let Some([of_i, of_f, of_o]) = &ranges.peepholes {
            let gate = |gate: usize| d_pre().map(move |d| row(d, hidden_size, gate));
            let c_before = || pairs().map(move |pair| row(&pair.trace().c, hidden_size, pair.before()));
            let c_after = pairs().map(move |pair| row(&pair.trace().c, hidden_size, pair.after()));
            product_column_sum(simd, gate(Gate::I as usize).zip(c_before()), gradients.of(of_i));
            product_column_sum(simd, gate(Gate::F as usize).zip(c_before()), gradients.of(of_f));
            product_column_sum(simd, gate(Gate::O as usize).zip(c_after), gradients.of(of_o));
        }
        let starts = || {
            self.rows().flat_map(move |(block, row)| {
                block.runs.fresh(row).map(move |run| (block.direction_of(layer, at).1, run))
            })
        };
        if let Some(initial_h) = &ranges.initial_h {
            let d = starts().map(move |(work, run)| row(&work.d_h, output_size, run));
            column_sum(simd, d, gradients.of(initial_h));
        }
        if let Some(initial_c) = &ranges.initial_c {
            let d = starts().map(move |(work, run)| row(&work.d_c, hidden_size, run));
            column_sum(simd, d, gradients.of(initial_c));
        }
    }

    fn embedding(&self, gradient: &mut [f32]) {
        let width = self.shape().input.size();
        let rows = self
            .pairs()
            .map(move |Pair { block, place, .. }| (block.token(place), block.d_embedded(width, place)));
        embedding_gradient(self.simd(), rows, width, gradient);
    }
}

/// The LSTM's gates by their places in a row of gates.
#[derive(Clone, Copy)]
enum Gate {
    I = 0,
    F = 1,
    O = 3,
}

/// The tensors' parts of a bucket.
struct Gradients<'a> {
    /// Where the bucket lies in the flat gradient.
    start: usize,
    bucket: &'a mut [f32],
}

impl Gradients<'_> {
    fn of(&mut self, range: &Range<usize>) -> &mut [f32] {
        &mut self.bucket[range.start - self.start..range.end - self.start]
    }

    fn copy(&mut self, from: &Range<usize>, to: &Range<usize>) {
        let start = self.start;
        self.bucket.copy_within(from.start - start..from.end - start, to.start - start);
    }
}

impl<'a> Pair<'a> {
    /// The pair as a direction of a layer stores it.
    fn of_direction(self, layer: usize, at: usize) -> DirectionPair<'a> {
        let runs = &self.block.runs;
        let own = if at == 1 { runs.mirrored(self.place) } else { self.place };
        DirectionPair { block: self.block, place: self.place, layer, at, own }
    }
}

/// The step of a row in one direction of a layer.
#[derive(Clone, Copy)]
struct DirectionPair<'a> {
    block: &'a RowBlock,
    /// In the forward direction.
    place: usize,
    layer: usize,
    at: usize,
    /// In this direction.
    own: usize,
}

impl<'a> DirectionPair<'a> {
    fn trace(&self) -> &'a super::direction::Trace {
        self.block.direction_of(self.layer, self.at).0
    }

    fn work(&self) -> &'a super::direction::Workspace {
        self.block.direction_of(self.layer, self.at).1
    }

    /// Of the state before it, among the runs' starts followed by all places.
    fn before(&self) -> usize {
        self.block.runs.state_before(self.own)
    }

    /// The same of the state after it.
    fn after(&self) -> usize {
        self.block.runs.len() + self.own
    }
}

/// Row `at` of rows of equal width.
fn row(values: &[f32], width: usize, at: usize) -> &[f32] {
    &values[at * width..][..width]
}

/// The rows of a block that are among these of the batch, counted from the block's first.
fn rows_within(block: &RowBlock, rows: &Range<usize>) -> Range<usize> {
    let start = rows.start.max(block.rows.start);
    let end = rows.end.min(block.rows.end).max(start);
    start - block.rows.start..end - block.rows.start
}

impl Scratch {
    /// The most bytes of the room for a shard of `rows` rows of `seq_len` steps.
    pub(super) fn bytes_of(shape: &ModelShape, seq_len: usize, rows: usize) -> usize {
        let pairs = seq_len * rows;
        let head_pairs = if shape.head == Head::EveryStep { pairs } else { rows };
        let layers = || shape.layers().enumerate();
        let lefts = layers().map(|(_, layer)| PackedLeft::bytes_of(pairs, layer.gate_size()));
        let left = lefts.max().unwrap_or(0).max(PackedLeft::bytes_of(head_pairs, shape.classes));
        let rights = layers().map(|(index, layer)| {
            let input = if reads_one_hot(shape, index) { 0 } else { layer.input_size };
            let unprojected = if shape.options.projection.is_some() { layer.hidden_size } else { 0 };
            PackedMatrix::bytes_of(pairs, input.max(layer.output_size).max(unprojected))
        });
        let right = rights.max().unwrap_or(0).max(PackedMatrix::bytes_of(head_pairs, shape.output_width()));
        let table = match shape.input {
            Input::OneHot(width) => width * shape.layer(0).gate_size(),
            Input::Embedding { .. } | Input::Bytes(_) => 0,
        };
        left + right + size_of::<f32>() * table
    }

    /// Packs the left operand of the products that follow: `pairs` rows of `outputs` numbers.
    fn pack_left<'a>(&mut self, (pairs, outputs): (usize, usize), d: impl Iterator<Item = &'a [f32]>) {
        if (self.left.k(), self.left.m()) != (pairs, outputs) {
            self.left.reset(pairs, outputs);
        }
        self.left.pack_row_iter(d);
    }

    /// `d_weight[outputs][inputs] = Σ_pairs d ⊗ x`, where d was packed before.
    fn product<'a>(
        &mut self,
        simd: Simd,
        (pairs, inputs): (usize, usize),
        x: impl Iterator<Item = &'a [f32]>,
        d_weight: &mut [f32],
    ) {
        if (self.right.k(), self.right.n()) != (pairs, inputs) {
            self.right.reset(pairs, inputs);
        }
        self.right.pack_row_iter(x);
        #[cfg(test)]
        {
            let packed =
                PackedLeft::bytes_of(self.left.k(), self.left.m()) + PackedMatrix::bytes_of(pairs, inputs);
            self.most_bytes = self.most_bytes.max(packed + 4 * self.table.len());
        }
        gemm_transposed(simd, &self.left, &self.right, d_weight, inputs, false);
    }

    /// The same for a one-hot input, which needs no product.
    fn scatter<'a>(
        &mut self,
        simd: Simd,
        gates: usize,
        rows: impl Iterator<Item = (u32, &'a [f32])>,
        d_weight: &mut [f32],
    ) {
        self.table.resize(d_weight.len(), 0.0);
        scatter_add_rows(simd, rows, gates, &mut self.table, d_weight);
    }
}
