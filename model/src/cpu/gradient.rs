//! Weight gradients: for each shard, sums over its (step, row) pairs in that order.
//!
//! A shard's rows may lie in several blocks; they are read in row order, so the sums do not depend on the blocks.

use std::ops::Range;

use kernels::cpu::input::scatter_add_rows;
use kernels::cpu::reduce::column_sum;
use kernels::{PackedLeft, PackedMatrix, Simd, gemm_transposed};
use protocol::layout::{Head, Input, StateLayout};

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

/// The gradient of one weight, and its bias, for one shard.
pub(super) struct GradientTask<'a> {
    kind: Kind,
    /// Rows of the shard, counted from the batch's first.
    rows: Range<usize>,
    /// `[outputs][inputs]`
    d_weight: &'a mut [f32],
    /// `[outputs]`
    d_bias: &'a mut [f32],
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Head,
    InputWeight { layer: usize },
    HiddenWeight { layer: usize },
}

impl<'a> GradientTask<'a> {
    /// The head's task; `gradient` is its bucket.
    pub(super) fn head(layout: &StateLayout, gradient: &'a mut [f32], rows: Range<usize>) -> Self {
        let (d_weight, d_bias) = gradient.split_at_mut(layout.head().0.len());
        Self { kind: Kind::Head, rows, d_weight, d_bias }
    }

    /// The two tasks of a layer; `gradient` is its bucket.
    pub(super) fn layer(
        layout: &StateLayout,
        layer: usize,
        gradient: &'a mut [f32],
        rows: Range<usize>,
    ) -> [Self; 2] {
        let ranges = layout.layer(layer);
        let (d_weight_ih, rest) = gradient.split_at_mut(ranges.weight_ih.len());
        let (d_weight_hh, rest) = rest.split_at_mut(ranges.weight_hh.len());
        let (d_bias_ih, d_bias_hh) = rest.split_at_mut(ranges.bias_ih.len());
        [
            Self {
                kind: Kind::InputWeight { layer },
                rows: rows.clone(),
                d_weight: d_weight_ih,
                d_bias: d_bias_ih,
            },
            Self { kind: Kind::HiddenWeight { layer }, rows, d_weight: d_weight_hh, d_bias: d_bias_hh },
        ]
    }

    /// Computes the sums; overwrites what was there.
    pub(super) fn run(self, simd: Simd, layout: &StateLayout, blocks: &[RowBlock], scratch: &mut Scratch) {
        let shape = &layout.shape;
        let (hidden, gates, last) =
            (shape.hidden_size, shape.cell.gates() * shape.hidden_size, shape.num_layers - 1);
        let seq_len = blocks.first().map_or(0, RowBlock::seq_len);
        match self.kind {
            Kind::Head => {
                // Logits of the final state are stored as one step, and read the output of the last one.
                let (steps, shift) = match shape.head {
                    Head::EveryStep => (seq_len, 0),
                    Head::Final => (1, seq_len - 1),
                };
                let pairs = || pairs(blocks, 0..steps, self.rows.clone());
                let d = || pairs().map(|(block, t, row)| block.d_logits(shape.classes, t, row));
                let x = pairs().map(|(block, t, row)| block.output(last, hidden, t + shift, row));
                let sizes = (steps * self.rows.len(), shape.classes, hidden);
                product(simd, scratch, sizes, d(), x, self.d_weight);
                column_sum(simd, d(), self.d_bias);
            }
            Kind::InputWeight { layer } => {
                let pairs = || pairs(blocks, 0..seq_len, self.rows.clone());
                let d = || pairs().map(|(block, t, row)| block.d_pre(layer, gates, t, row));
                let width = shape.layer_input_size(layer);
                let sizes = (seq_len * self.rows.len(), gates, width);
                match (layer, shape.input) {
                    (0, Input::OneHot(_)) => {
                        let tokens = pairs().map(|(block, t, row)| block.token(t, row));
                        scratch.table.resize(self.d_weight.len(), 0.0);
                        let table = &mut scratch.table[..self.d_weight.len()];
                        scatter_add_rows(simd, tokens.zip(d()), gates, table, self.d_weight);
                    }
                    (0, Input::Bytes(_)) => {
                        let x = pairs().map(|(block, t, row)| block.dense(width, t, row));
                        product(simd, scratch, sizes, d(), x, self.d_weight);
                    }
                    _ => {
                        let x = pairs().map(|(block, t, row)| block.output(layer - 1, hidden, t, row));
                        product(simd, scratch, sizes, d(), x, self.d_weight);
                    }
                }
                column_sum(simd, d(), self.d_bias);
            }
            Kind::HiddenWeight { layer } => {
                let pairs = || pairs(blocks, 0..seq_len, self.rows.clone());
                let d =
                    || pairs().map(|(block, t, row)| block.d_hidden_part(shape.cell, layer, gates, t, row));
                let x = pairs().map(|(block, t, row)| block.h_before(layer, hidden, t, row));
                product(simd, scratch, (seq_len * self.rows.len(), gates, hidden), d(), x, self.d_weight);
                column_sum(simd, d(), self.d_bias);
            }
        }
    }
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

/// `d_weight[outputs][inputs] = Σ_pairs d ⊗ x`; `sizes` is (pairs, outputs, inputs).
fn product<'a>(
    simd: Simd,
    scratch: &mut Scratch,
    (pairs, outputs, inputs): (usize, usize, usize),
    d: impl Iterator<Item = &'a [f32]>,
    x: impl Iterator<Item = &'a [f32]>,
    d_weight: &mut [f32],
) {
    scratch.left.reset(pairs, outputs);
    scratch.left.pack_row_iter(d);
    scratch.right.reset(pairs, inputs);
    scratch.right.pack_row_iter(x);
    gemm_transposed(simd, &scratch.left, &scratch.right, d_weight, inputs, false);
}
