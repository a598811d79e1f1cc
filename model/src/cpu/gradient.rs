//! Weight gradients: for each shard, sums over its (step, row) pairs in that order.
//!
//! A shard's rows may lie in several blocks; they are read in row order, so the sums do not depend on the blocks.

use std::ops::Range;

use kernels::cpu::input::scatter_add_rows;
use kernels::cpu::reduce::column_sum;
use kernels::{PackedLeft, PackedMatrix, Simd, gemm_transposed};
use protocol::cell::Cell;
use protocol::layout::{Head, Input, ModelShape, StateLayout};

use super::block::RowBlock;

/// Room for packed operands, kept from task to task.
pub(super) struct Scratch {
    left: PackedLeft,
    right: PackedMatrix,
    /// Gradient of a one-hot input's weights, `[V][G·H]`.
    table: Vec<f32>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { left: PackedLeft::new(0, 0), right: PackedMatrix::new(0, 0), table: Vec::new() }
    }
}

/// One bucket's gradient for one shard.
pub(super) struct GradientTask<'a> {
    /// The layer, or `None` for the head.
    pub(super) layer: Option<usize>,
    /// Rows of the shard, counted from the batch's first.
    pub(super) rows: Range<usize>,
    /// The bucket's range of the flat gradient; overwritten.
    pub(super) gradient: &'a mut [f32],
}

impl GradientTask<'_> {
    /// Computes the sums.
    pub(super) fn run(self, simd: Simd, layout: &StateLayout, blocks: &[RowBlock], scratch: &mut Scratch) {
        match self.layer {
            Some(layer) => self.layer(simd, layout, layer, blocks, scratch),
            None => self.head(simd, layout, blocks, scratch),
        }
    }

    fn head(self, simd: Simd, layout: &StateLayout, blocks: &[RowBlock], scratch: &mut Scratch) {
        let (shape, seq_len) = (&layout.shape, seq_len(blocks));
        // Logits of the final state are stored as one step, and read the output of the last one.
        let (steps, shift) = match shape.head {
            Head::EveryStep => (seq_len, 0),
            Head::Final => (1, seq_len - 1),
        };
        let (d_weight, d_bias) = self.gradient.split_at_mut(layout.head().0.len());
        let pairs = || pairs(blocks, 0..steps, self.rows.clone());
        let d = || pairs().map(|(block, t, row)| block.d_logits(shape.classes, t, row));
        let (hidden, last) = (shape.hidden_sizes[0], shape.num_layers() - 1);
        let output = pairs().map(|(block, t, row)| block.output(last, hidden, t + shift, row));
        let pair_count = steps * self.rows.len();
        scratch.pack_left((pair_count, shape.classes), d());
        scratch.product(simd, (pair_count, hidden), output, d_weight);
        column_sum(simd, d(), d_bias);
    }

    fn layer(
        self,
        simd: Simd,
        layout: &StateLayout,
        layer: usize,
        blocks: &[RowBlock],
        scratch: &mut Scratch,
    ) {
        let (shape, ranges, seq_len) = (&layout.shape, layout.layer(layer)[0].clone(), seq_len(blocks));
        let (hidden, gates) = (shape.hidden_sizes[0], shape.cell.gates() * shape.hidden_sizes[0]);
        let (d_weight_ih, rest) = self.gradient.split_at_mut(ranges.weight_ih.len());
        let (d_weight_hh, rest) = rest.split_at_mut(ranges.weight_hh.len());
        let (d_bias_ih, d_bias_hh) = rest.split_at_mut(ranges.bias_ih.len());
        let (width, pair_count) = (shape.layer(layer).input_size, seq_len * self.rows.len());
        let pairs = || pairs(blocks, 0..seq_len, self.rows.clone());
        let d_pre = || pairs().map(|(block, t, row)| block.d_pre(layer, gates, t, row));

        let is_one_hot = layer == 0 && matches!(shape.input, Input::OneHot(_));
        let is_split = shape.cell == Cell::Gru;
        if !(is_one_hot && is_split) {
            scratch.pack_left((pair_count, gates), d_pre());
        }
        match (layer, shape.input) {
            (0, Input::OneHot(_)) => {
                let tokens = pairs().map(|(block, t, row)| block.token(t, row));
                scratch.scatter(simd, gates, tokens.zip(d_pre()), d_weight_ih);
            }
            (0, Input::Bytes(_)) => {
                let x = pairs().map(|(block, t, row)| block.dense(width, t, row));
                scratch.product(simd, (pair_count, width), x, d_weight_ih);
            }
            _ => {
                let x = pairs().map(|(block, t, row)| block.output(layer - 1, hidden, t, row));
                scratch.product(simd, (pair_count, width), x, d_weight_ih);
            }
        }
        column_sum(simd, d_pre(), d_bias_ih);

        let h = pairs().map(|(block, t, row)| block.h_before(layer, hidden, t, row));
        if is_split {
            let d_h_part = || pairs().map(|(block, t, row)| block.d_h_part(layer, gates, t, row));
            scratch.pack_left((pair_count, gates), d_h_part());
            column_sum(simd, d_h_part(), d_bias_hh);
        } else {
            // Both parts of the gates are plainly added: their gradients are the same.
            d_bias_hh.copy_from_slice(d_bias_ih);
        }
        scratch.product(simd, (pair_count, hidden), h, d_weight_hh);
    }
}

impl Scratch {
    /// The most bytes of the room for a shard of `rows` rows.
    pub(super) fn bytes_of(shape: &ModelShape, seq_len: usize, rows: usize) -> usize {
        let (hidden, gates) = (shape.hidden_sizes[0], shape.cell.gates() * shape.hidden_sizes[0]);
        let pairs = seq_len * rows;
        let head_pairs = if shape.head == Head::EveryStep { pairs } else { rows };
        let left = PackedLeft::bytes_of(pairs, gates).max(PackedLeft::bytes_of(head_pairs, shape.classes));
        let (dense, table) = match shape.input {
            Input::OneHot(width) => (hidden, width * gates),
            Input::Embedding { size, .. } => (hidden.max(size), 0),
            Input::Bytes(width) => (hidden.max(width), 0),
        };
        left + PackedMatrix::bytes_of(pairs, dense) + size_of::<f32>() * table
    }

    /// Bytes that are in use.
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        let Self { left, right, table } = self;
        PackedLeft::bytes_of(left.k(), left.m())
            + PackedMatrix::bytes_of(right.k(), right.n())
            + 4 * table.len()
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

fn seq_len(blocks: &[RowBlock]) -> usize {
    blocks.first().map_or(0, RowBlock::seq_len)
}

/// All (step, row) pairs of a shard in the order of every sum: step by step, and in a step row by row.
fn pairs(
    blocks: &[RowBlock],
    steps: Range<usize>,
    rows: Range<usize>,
) -> impl Iterator<Item = (&RowBlock, usize, usize)> {
    steps.flat_map(move |t| {
        let rows = rows.clone();
        blocks.iter().flat_map(move |block| {
            let start = rows.start.max(block.rows.start);
            let end = rows.end.min(block.rows.end).max(start);
            (start..end).map(move |row| (block, t, row - block.rows.start))
        })
    })
}
