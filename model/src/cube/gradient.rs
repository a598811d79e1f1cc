//! Weight gradients: sums over each shard's pairs, then along the tree.

use std::ops::Range;

use cubecl::prelude::*;
use kernels::cube::buffer::Buffer;
use kernels::cube::gemm::Matrix;
use kernels::cube::rows::keep_fresh;
use kernels::cube::shards::{Partials, TokenOrder, column_sums, products, token_sums, tree_sum};
use protocol::cell::{Cell, Reset};
use protocol::layout::{DirectionRanges, Head, Part};
use protocol::tree::{self, TreeNode};

use super::direction::gate_width;
use super::tables::Tables;
use super::work::{Network, Work};
use crate::network::reads_one_hot;

/// What gradients are computed from.
pub(super) struct Gradient<'a, R: Runtime> {
    pub(super) network: Network<'a, R>,
    pub(super) work: &'a Work,
    pub(super) tables: &'a Tables,
}

/// The nodes that a fleet's gradients are summed for, as additions among a batch's shards.
pub(super) struct NodeSums {
    nodes: Vec<TreeNode>,
    first_shard: u32,
    /// For each node: the additions below it, and the position of its first shard.
    sums: Vec<(Buffer, usize)>,
}

impl NodeSums {
    /// Of nodes over the shards of a batch that begins with `first_shard`.
    pub(super) fn new<R: Runtime>(
        client: &ComputeClient<R>,
        shards: u32,
        nodes: &[TreeNode],
        first_shard: u32,
    ) -> Self {
        let of_node = |node: &TreeNode| {
            let range = node.range(shards);
            let additions: Vec<u32> = tree::subtree(shards, range.clone())
                .into_iter()
                .flat_map(|addition| [addition.left - first_shard, addition.right - first_shard])
                .collect();
            (Buffer::from_words(client, &additions), (range.start - first_shard) as usize)
        };
        Self { nodes: nodes.to_vec(), first_shard, sums: nodes.iter().map(of_node).collect() }
    }

    /// Whether it is that of these nodes.
    pub(super) fn is_of(&self, nodes: &[TreeNode], first_shard: u32) -> bool {
        self.nodes == nodes && self.first_shard == first_shard
    }

    /// Adds the shards' parts of a bucket up for every node, and writes the sums to its place in the flat gradients.
    pub(super) fn add_up<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        partials: Partials<'_>,
        bucket: &Range<usize>,
        into: &[Buffer],
    ) {
        for ((additions, root), into) in self.sums.iter().zip(into) {
            tree_sum(client, additions, *root, partials, bucket.len(), into, bucket.start);
        }
    }
}

impl<R: Runtime> Gradient<'_, R> {
    /// The gradient of one bucket of every shard, `[shards][len of the bucket]` at the stride of `into`.
    pub(super) fn of_bucket(&self, bucket: usize, into: Partials<'_>) {
        match self.network.layout.part(bucket) {
            Part::Head => self.head(into),
            Part::Layer(layer) => {
                let directions = self.network.layout.layer(layer);
                let start = directions[0].weight_ih.start;
                for (at, ranges) in directions.iter().enumerate() {
                    self.direction(layer, at, ranges, &|range| Partials { at: range.start - start, ..into });
                }
            }
            Part::Embedding => {
                let (tokens, shape) = (self.tables.tokens_of(0), &self.network.layout.shape);
                let size = (shape.input.tokens().expect("tokens are embedded"), shape.input.size());
                let d = self.work.d_embedded();
                let pairs = &self.tables.pairs;
                token_sums(self.network.client, pairs, tokens, size, TokenOrder::Rows, d, size.1, into);
            }
        }
    }

    fn head(&self, into: Partials<'_>) {
        let (client, shape) = (self.network.client, &self.network.layout.shape);
        let table = match shape.head {
            Head::EveryStep => &self.tables.pairs,
            Head::Final => &self.tables.shard_rows,
        };
        let (classes, width) = (shape.classes, shape.output_width());
        let d = self.work.d_logits(classes);
        products(client, shape.precision, table, (classes, width), d, self.work.head_input(shape.head), into);
        column_sums(client, table, classes, d, None, Partials { at: classes * width, ..into });
    }

    /// Everything of one direction; `place` says where a tensor's gradient goes.
    fn direction<'p>(
        &self,
        index: usize,
        at: usize,
        ranges: &DirectionRanges,
        place: &dyn Fn(&Range<usize>) -> Partials<'p>,
    ) {
        let (client, shape) = (self.network.client, &self.network.layout.shape);
        let (pairs, work) = (&self.tables.pairs, self.work.direction(index, at));
        let layer = shape.layer(index);
        let (gates, hidden, output) = (layer.gate_size(), layer.hidden_size, layer.output_size);
        let d = Matrix::dense(work.d_gates(), gate_width(&layer, shape.cell));
        let beside = |at: usize| Matrix { at, ..d };

        if reads_one_hot(shape, index) {
            let (tokens, size) = (self.tables.tokens_of(at), (layer.input_size, gates));
            let into = place(&ranges.weight_ih);
            token_sums(client, pairs, tokens, size, TokenOrder::Columns, d.buffer, d.stride, into);
        } else {
            let x = self.work.input(index, at);
            products(
                client,
                shape.precision,
                pairs,
                (gates, layer.input_size),
                d,
                x,
                place(&ranges.weight_ih),
            );
        }
        column_sums(client, pairs, gates, d, None, place(&ranges.bias_ih));

        // h before each step: the first of the T + 1 is the start. It enters a GRU's candidate through the reset gate:
        // after the product, the gradient of the product is another one and stands behind the others; before it, there
        // stands what was multiplied in place of h.
        let h = Matrix::dense(&work.h, output);
        let weight_hh = |rows: Range<usize>, d: Matrix<'_>, h: Matrix<'_>| {
            let range = ranges.weight_hh.start + rows.start * output..ranges.weight_hh.end;
            products(client, shape.precision, pairs, (rows.len(), output), d, h, place(&range));
        };
        let bias_hh = |rows: Range<usize>, d: Matrix<'_>| {
            let range = ranges.bias_hh.start + rows.start..ranges.bias_hh.end;
            column_sums(client, pairs, rows.len(), d, None, place(&range));
        };
        let candidate = 2 * hidden;
        match (shape.cell, shape.options.reset) {
            (Cell::Gru, Reset::After) => {
                weight_hh(0..candidate, d, h);
                weight_hh(candidate..gates, beside(gates), h);
                bias_hh(0..candidate, d);
                bias_hh(candidate..gates, beside(gates));
            }
            (Cell::Gru, Reset::Before) => {
                weight_hh(0..candidate, d, h);
                weight_hh(candidate..gates, beside(candidate), beside(gates));
                bias_hh(0..gates, d);
            }
            _ => {
                weight_hh(0..gates, d, h);
                bias_hh(0..gates, d);
            }
        }

        if let (Some(weight_hr), Some(projection)) = (&ranges.weight_hr, work.projection()) {
            let (m, d_projected) = (Matrix::dense(projection.0, hidden), Matrix::dense(projection.1, output));
            products(client, shape.precision, pairs, (output, hidden), d_projected, m, place(weight_hr));
        }
        // i and f have seen the c before the step, o the one after it.
        for (gate, range) in [0, 1, 3].into_iter().zip(ranges.peepholes.iter().flatten()) {
            let after = if gate == 3 { self.tables.extent.runs * hidden } else { 0 };
            let c = Matrix { buffer: &work.c, at: after, stride: hidden };
            column_sums(client, pairs, hidden, beside(gate * hidden), Some(c), place(range));
        }
        let starts = [(&ranges.initial_h, &work.d_start_h), (&ranges.initial_c, &work.d_start_c)];
        for (range, d_start) in starts {
            if let Some(range) = range {
                keep_fresh(client, &self.tables.starts, range.len(), d_start);
                let d_start = Matrix::dense(d_start, range.len());
                column_sums(client, &self.tables.shard_runs, range.len(), d_start, None, place(range));
            }
        }
    }
}
