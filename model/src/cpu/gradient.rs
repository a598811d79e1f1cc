//! Weight gradients: for each shard, sums over its (step, row) pairs in that order, then along the tree over the shards.
//!
//! A task owns some rows of the weights: some gates' rows of `weight_ih` and `weight_hh` with their biases, for example.
//! It sums them for one shard after the other and adds up on the way, so that no shard's gradient of everything is ever
//! stored. How rows are dealt to tasks changes no bit, nor does it matter in which blocks a shard's rows lie.

use std::ops::Range;

use kernels::cpu::gemm::K_BLOCK;
use kernels::cpu::input::{embedding_gradient, table_weight};
use kernels::cpu::reduce::{column_sum, product_column_sum, tree_add};
use kernels::{PackedLeft, PackedMatrix, Simd, gemm_transposed};
use protocol::cell::{Cell, Reset};
use protocol::job::Precision;
use protocol::layout::{DirectionRanges, Head, Input, LayerShape, ModelShape, Part, StateLayout};
use protocol::tree::TreeNode;

use super::block::{Network, RowBlock};
use super::direction::{Trace, Workspace, gate_width, resize_exactly};
use super::pairs::{Pair, ShardPairs};
use crate::network::reads_one_hot;

/// Most weight rows of a task: more would share each packing of what they are multiplied with among more rows, fewer
/// keep the sums in the second-level cache. Changes no bit.
const MOST_ROWS: usize = 264;

/// What gradients are computed from.
#[derive(Clone, Copy)]
pub(super) struct Gradient<'a> {
    pub(super) network: Network<'a>,
    pub(super) layout: &'a StateLayout,
    pub(super) blocks: &'a [RowBlock],
    pub(super) pairs: &'a ShardPairs,
    /// Shards of the job.
    pub(super) shards: u32,
}

/// A piece of one node's gradient.
pub(super) struct Task<'b> {
    node: TreeNode,
    sum: Sum,
    /// Where its parts go, in order. Empty slices stand for parts that it does not have.
    into: [&'b mut [f32]; MOST_PARTS],
}

/// Parts of the largest sum: `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh`.
const MOST_PARTS: usize = 4;

/// What is summed over the pairs of a shard.
enum Sum {
    /// Rows of the head: weight, bias.
    Head(Range<usize>),
    /// Rows of a direction's gates: both weights, both biases.
    Gates(Place, Range<usize>),
    /// Rows of an LSTM's projection.
    Projection(Place, Range<usize>),
    /// An LSTM's peephole to one gate.
    Peephole(Place, Gate),
    /// The initial h, where it is learnt.
    InitialH(Place),
    /// The initial c.
    InitialC(Place),
    /// Rows of the embedding's table.
    Embedding(Range<usize>),
}

/// A direction of a layer.
#[derive(Clone, Copy)]
struct Place {
    layer: usize,
    at: usize,
}

/// The LSTM's gates that have peepholes, by their places in a row of gates.
#[derive(Clone, Copy, PartialEq)]
enum Gate {
    I = 0,
    F = 1,
    O = 3,
}

/// What the gradients are multiplied with, and where their products go.
type Product<'p, 'a, S> = (&'p dyn Fn(&S) -> &'a [f32], &'p mut [f32]);

/// Room of one thread, kept from task to task.
pub(super) struct Scratch {
    left: PackedLeft,
    right: PackedMatrix,
    /// Sums of the nodes under way, at most one for each level of the tree and one more.
    sums: Vec<Vec<f32>>,
}

impl<'a> Gradient<'a> {
    /// Cuts the sums of some buckets over some nodes into tasks, for so many threads. `sums` has the flat gradient of
    /// each node, of which the buckets will be overwritten.
    pub(super) fn tasks<'b>(
        &self,
        buckets: Range<usize>,
        nodes: &[TreeNode],
        sums: &'b mut [Vec<f32>],
        threads: usize,
    ) -> Vec<Task<'b>> {
        let mut tasks = Vec::new();
        let mut rests: Vec<&mut [f32]> = sums.iter_mut().map(Vec::as_mut_slice).collect();
        let ranges = self.layout.buckets();
        for bucket in buckets {
            let range = &ranges[bucket];
            for (&node, rest) in nodes.iter().zip(&mut rests) {
                assert!(
                    self.pairs.holds(node, self.shards),
                    "the gradient of {node:?} needs shards that are elsewhere"
                );
                let tail =
                    rest.split_off_mut(range.start..).expect("each bucket ends where the one before begins");
                let into = &mut tail[..range.len()];
                match self.layout.part(bucket) {
                    Part::Head => self.head_tasks(node, into, threads, &mut tasks),
                    Part::Layer(layer) => self.layer_tasks(node, layer, into, threads, &mut tasks),
                    Part::Embedding => self.embedding_tasks(node, into, threads, &mut tasks),
                }
            }
        }
        tasks
    }

    fn embedding_tasks<'b>(
        &self,
        node: TreeNode,
        mut table: &'b mut [f32],
        threads: usize,
        tasks: &mut Vec<Task<'b>>,
    ) {
        let width = self.shape().input.size();
        // Each task looks at all tokens: no more tasks than threads.
        for rows in cut(0..table.len() / width, threads) {
            let into = [take(&mut table, rows.len() * width)];
            tasks.push(Task::new(node, Sum::Embedding(rows), into));
        }
    }

    fn head_tasks<'b>(
        &self,
        node: TreeNode,
        bucket: &'b mut [f32],
        threads: usize,
        tasks: &mut Vec<Task<'b>>,
    ) {
        let (mut weight, mut bias) = bucket.split_at_mut(self.layout.head().0.len());
        for rows in dealt(0..self.shape().classes, threads) {
            let into =
                [take(&mut weight, rows.len() * self.shape().output_width()), take(&mut bias, rows.len())];
            tasks.push(Task::new(node, Sum::Head(rows), into));
        }
    }

    fn layer_tasks<'b>(
        &self,
        node: TreeNode,
        index: usize,
        bucket: &'b mut [f32],
        threads: usize,
        tasks: &mut Vec<Task<'b>>,
    ) {
        let (directions, layer) = (self.layout.layer(index), self.shape().layer(index));
        let mut tensors = Tensors { start: directions[0].weight_ih.start, rest: bucket };
        for (at, ranges) in directions.iter().enumerate() {
            let place = Place { layer: index, at };
            let DirectionRanges { weight_ih, weight_hh, bias_ih, bias_hh, .. } = ranges;
            let mut into = [weight_ih, weight_hh, bias_ih, bias_hh].map(|range| tensors.next(range));
            let widths = [layer.input_size, layer.output_size, 1, 1];
            for rows in Self::dealt_gates(self.shape(), &layer, threads) {
                let mut widths = widths.iter();
                let into = into.each_mut().map(|rest| take(rest, rows.len() * widths.next().expect("four")));
                tasks.push(Task::new(node, Sum::Gates(place, rows), into));
            }
            if let Some(weight_hr) = &ranges.weight_hr {
                let mut weight = tensors.next(weight_hr);
                for rows in dealt(0..layer.output_size, threads) {
                    let into = [take(&mut weight, rows.len() * layer.hidden_size)];
                    tasks.push(Task::new(node, Sum::Projection(place, rows), into));
                }
            }
            let peepholes = ranges.peepholes.iter().flatten().zip([Gate::I, Gate::F, Gate::O]);
            let initial =
                [(&ranges.initial_h, Sum::InitialH(place)), (&ranges.initial_c, Sum::InitialC(place))];
            let vectors = peepholes
                .map(|(range, gate)| (range, Sum::Peephole(place, gate)))
                .chain(initial.into_iter().filter_map(|(range, sum)| Some((range.as_ref()?, sum))));
            for (range, sum) in vectors {
                tasks.push(Task::new(node, sum, [tensors.next(range)]));
            }
        }
    }

    /// The rows of a direction's gates, dealt so that no task has rows of a GRU's candidate beside others: `h` enters it
    /// in another way.
    fn dealt_gates(shape: &ModelShape, layer: &LayerShape, threads: usize) -> Vec<Range<usize>> {
        let gates = layer.gate_size();
        if shape.cell == Cell::Gru {
            let candidate = 2 * layer.hidden_size;
            dealt(0..candidate, threads).chain(dealt(candidate..gates, threads)).collect()
        } else {
            dealt(0..gates, threads).collect()
        }
    }

    /// Computes a task's sum over all shards below its node.
    pub(super) fn run(&self, task: Task<'_>, scratch: &mut Scratch) {
        let Task { node, sum, into } = task;
        let mut sums = std::mem::take(&mut scratch.sums);
        let len: usize = into.iter().map(|part| part.len()).sum();
        sums.resize_with(sums.len().max(node.level as usize + 1), Vec::new);
        for place in &mut sums[..=node.level as usize] {
            resize_exactly(place, len.max(place.len()));
        }
        self.add_up(node, &mut sums, len, &mut |shard, place| self.of_shard(&sum, shard, scratch, place));
        let mut rest = &sums[0][..len];
        for (at, part) in into.into_iter().enumerate() {
            let (values, behind) = rest.split_at(part.len());
            match &sum {
                Sum::Gates(place, rows) if at == 0 && reads_one_hot(self.shape(), place.layer) => {
                    table_weight(values, rows.len(), part);
                }
                _ => part.copy_from_slice(values),
            }
            rest = behind;
        }
        scratch.sums = sums;
    }

    /// Puts the sum of a node into the first of `sums`; the others are room for the nodes below it.
    fn add_up(
        &self,
        node: TreeNode,
        sums: &mut [Vec<f32>],
        len: usize,
        of_shard: &mut impl FnMut(u32, &mut [f32]),
    ) {
        match node.children(self.shards) {
            None => of_shard(node.index, &mut sums[0][..len]),
            Some((left, right)) => {
                self.add_up(left, sums, len, of_shard);
                if let Some(right) = right {
                    self.add_up(right, &mut sums[1..], len, of_shard);
                    let (sum, rest) = sums.split_at_mut(1);
                    tree_add(self.simd(), &mut sum[0][..len], &rest[0][..len]);
                }
            }
        }
    }

    /// One shard's sum, its parts one behind the other.
    fn of_shard(&self, sum: &Sum, shard: u32, scratch: &mut Scratch, into: &mut [f32]) {
        match sum {
            Sum::Head(rows) => self.head(rows, shard, scratch, into),
            Sum::Gates(place, rows) => self.gates(*place, rows, shard, scratch, into),
            Sum::Projection(place, rows) => {
                let LayerShape { hidden_size, output_size, .. } = self.shape().layer(place.layer);
                let d = |step: &Step<'a>| &row(&step.work.d_projected, output_size, step.own)[rows.clone()];
                let x = |step: &Step<'a>| row(&step.work.unprojected, hidden_size, step.own);
                scratch.products(self.simd(), self.steps(*place, shard), &d, [(&x, into)]);
            }
            Sum::Peephole(place, gate) => {
                let hidden = self.shape().layer(place.layer).hidden_size;
                let products = self.steps(*place, shard).map(|step| {
                    let c = if *gate == Gate::O { step.after() } else { step.before() };
                    (row(step.gates(), hidden, *gate as usize), row(&step.trace.c, hidden, c))
                });
                product_column_sum(self.simd(), products, into);
            }
            Sum::InitialH(place) => {
                let size = self.shape().layer(place.layer).output_size;
                let d = self.starts(*place, shard).map(|(work, run)| row(&work.d_h, size, run));
                column_sum(self.simd(), d, into);
            }
            Sum::InitialC(place) => {
                let size = self.shape().layer(place.layer).hidden_size;
                let d = self.starts(*place, shard).map(|(work, run)| row(&work.d_c, size, run));
                column_sum(self.simd(), d, into);
            }
            Sum::Embedding(rows) => {
                let width = self.shape().input.size();
                let gradients = self.pairs.of_shard(shard).iter().filter_map(|pair| {
                    let (block, place) = (self.block(pair), pair.place as usize);
                    let row = (block.token(place) as usize).checked_sub(rows.start)?;
                    (row < rows.len()).then(|| (row as u32, block.d_embedded(width, place)))
                });
                embedding_gradient(self.simd(), gradients, width, into);
            }
        }
    }

    fn head(&self, rows: &Range<usize>, shard: u32, scratch: &mut Scratch, into: &mut [f32]) {
        let (shape, network) = (self.shape(), self.network);
        let width = shape.output_width();
        // Where the final state is read there is one target a row.
        let is_final = shape.head == Head::Final;
        let pairs = if is_final { self.pairs.first_steps(shard) } else { self.pairs.of_shard(shard) };
        let targets = pairs
            .iter()
            .map(|pair| (self.block(pair), if is_final { pair.row } else { pair.place } as usize));
        let d =
            |&(block, target): &(&'a RowBlock, usize)| &block.d_logits(shape.classes, target)[rows.clone()];
        let features = |&(block, target): &(&'a RowBlock, usize)| block.features(&network, target);
        let (d_weight, d_bias) = into.split_at_mut(rows.len() * width);
        scratch.products(self.simd(), targets.clone(), &d, [(&features, d_weight)]);
        column_sum(self.simd(), targets.map(|target| d(&target)), d_bias);
    }

    /// Some gates' rows of both weights and both biases.
    fn gates(&self, place: Place, rows: &Range<usize>, shard: u32, scratch: &mut Scratch, into: &mut [f32]) {
        let (simd, shape, network) = (self.simd(), self.shape(), self.network);
        let LayerShape { input_size, hidden_size, output_size, .. } = shape.layer(place.layer);
        let steps = || self.steps(place, shard);
        let (d_weight_ih, rest) = into.split_at_mut(rows.len() * input_size);
        let (d_weight_hh, biases) = rest.split_at_mut(rows.len() * output_size);
        let (d_bias_ih, d_bias_hh) = biases.split_at_mut(rows.len());

        // h enters a GRU's candidate through the reset gate. After the product, the gradient of the product is another
        // one and stands behind the others; before it, there stands what was multiplied in place of h.
        let is_candidate = shape.cell == Cell::Gru && rows.start >= 2 * hidden_size;
        let is_reset_after = is_candidate && shape.options.reset == Reset::After;
        let behind = if is_reset_after { hidden_size } else { 0 };
        let d = |step: &Step<'a>| &step.gates()[rows.clone()];
        let d_product = |step: &Step<'a>| &step.gates()[rows.start + behind..rows.end + behind];
        let x = |step: &Step<'a>| step.block.input(&network, place.layer, step.place);
        let h = |step: &Step<'a>| match is_candidate && !is_reset_after {
            true => row(step.gates(), hidden_size, 3),
            false => row(&step.trace.h, output_size, step.before()),
        };
        if reads_one_hot(shape, place.layer) {
            let rows_of_tokens = steps().map(|step| (step.block.token(step.place), d(&step)));
            embedding_gradient(simd, rows_of_tokens, rows.len(), d_weight_ih);
            scratch.products(simd, steps(), &d_product, [(&h, d_weight_hh)]);
        } else if is_reset_after {
            scratch.products(simd, steps(), &d, [(&x, d_weight_ih)]);
            scratch.products(simd, steps(), &d_product, [(&h, d_weight_hh)]);
        } else {
            scratch.products(simd, steps(), &d, [(&x, d_weight_ih), (&h, d_weight_hh)]);
        }
        column_sum(simd, steps().map(|step| d(&step)), d_bias_ih);
        if is_reset_after {
            column_sum(simd, steps().map(|step| d_product(&step)), d_bias_hh);
        } else {
            d_bias_hh.copy_from_slice(d_bias_ih);
        }
    }

    /// The pairs of a shard as a direction stores them.
    fn steps(&self, place: Place, shard: u32) -> impl Iterator<Item = Step<'a>> + Clone + use<'a> {
        let Place { layer, at } = place;
        let (blocks, width) = (self.blocks, gate_width(&self.shape().layer(layer), self.shape().cell));
        self.pairs.of_shard(shard).iter().map(move |pair| {
            let block = &blocks[pair.block as usize];
            let place = pair.place as usize;
            let own = if at == 1 { block.runs.mirrored(place) } else { place };
            let (trace, work) = block.direction_of(layer, at);
            Step { block, trace, work, place, own, width }
        })
    }

    /// The runs of a shard that start from the initial state.
    fn starts(&self, place: Place, shard: u32) -> impl Iterator<Item = (&'a Workspace, usize)> + use<'a> {
        let blocks = self.blocks;
        self.pairs.first_steps(shard).iter().flat_map(move |pair| {
            let block = &blocks[pair.block as usize];
            let work = block.direction_of(place.layer, place.at).1;
            block.runs.fresh(pair.row as usize).map(move |run| (work, run))
        })
    }

    fn block(&self, pair: &Pair) -> &'a RowBlock {
        &self.blocks[pair.block as usize]
    }

    fn simd(&self) -> Simd {
        self.network.simd
    }

    fn shape(&self) -> &'a ModelShape {
        self.network.shape
    }
}

/// The step of a row in one direction of a layer.
#[derive(Clone, Copy)]
struct Step<'a> {
    block: &'a RowBlock,
    trace: &'a Trace,
    work: &'a Workspace,
    /// In the forward direction.
    place: usize,
    /// In this direction.
    own: usize,
    /// Of a row of gates.
    width: usize,
}

impl<'a> Step<'a> {
    /// The gradients of its gates.
    fn gates(&self) -> &'a [f32] {
        row(&self.work.gates, self.width, self.own)
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

impl<'b> Task<'b> {
    fn new<const PARTS: usize>(node: TreeNode, sum: Sum, into: [&'b mut [f32]; PARTS]) -> Self {
        let mut parts = into.into_iter();
        Self { node, sum, into: std::array::from_fn(|_| parts.next().unwrap_or_default()) }
    }
}

impl Scratch {
    pub(super) fn new(precision: Precision) -> Self {
        Self {
            left: PackedLeft::with_precision(precision, 0, 0),
            right: PackedMatrix::with_precision(precision, 0, 0),
            sums: Vec::new(),
        }
    }

    /// The most bytes for tasks over shards of so many pairs at most, whose sums reach so many levels above the leaves.
    pub(super) fn bytes_of(shape: &ModelShape, pairs: usize, levels: u32, threads: usize) -> usize {
        let longest =
            |ranges: &mut dyn Iterator<Item = Range<usize>>| ranges.map(|rows| rows.len()).max().unwrap_or(0);
        let most = |rows: usize| longest(&mut dealt(0..rows, threads));
        // Rows of left operands, widths of right ones, and floats of sums.
        let head = most(shape.classes);
        let (mut rows, mut widest) = (head, shape.output_width());
        let mut sum = head * (shape.output_width() + 1);
        for (index, layer) in shape.layers().enumerate() {
            let gates = longest(&mut Gradient::dealt_gates(shape, &layer, threads).into_iter());
            let input = if reads_one_hot(shape, index) { 0 } else { layer.input_size };
            rows = rows.max(gates);
            widest = widest.max(input).max(layer.output_size);
            sum = sum.max(gates * (layer.input_size + layer.output_size + 2));
            if shape.cell == Cell::Lstm && shape.options.projection.is_some() {
                let projected = most(layer.output_size);
                rows = rows.max(projected);
                widest = widest.max(layer.hidden_size);
                sum = sum.max(projected * layer.hidden_size);
            }
        }
        if let Input::Embedding { tokens, size } = shape.input {
            sum = sum.max(longest(&mut cut(0..tokens, threads)) * size);
        }
        let (k, sums) = (pairs.min(K_BLOCK), levels as usize + 1);
        let packed = |precision| {
            PackedLeft::bytes_of(precision, k, rows) + PackedMatrix::bytes_of(precision, k, widest)
        };
        packed(shape.precision) + sums * size_of::<f32>() * sum
    }

    /// Bytes that are held.
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        let sums: usize = self.sums.iter().map(Vec::capacity).sum();
        self.left.held_bytes() + self.right.held_bytes() + 4 * sums
    }

    /// `into[rows][inputs] = Σ d ⊗ x` over the steps, for each x that has the same d, one block of k after the other.
    /// Operands are packed block by block, so that they stay in the second-level cache however long a shard's rows are.
    fn products<'a, S, const N: usize>(
        &mut self,
        simd: Simd,
        steps: impl Iterator<Item = S>,
        d: &dyn Fn(&S) -> &'a [f32],
        mut products: [Product<'_, 'a, S>; N],
    ) {
        let mut steps = steps.peekable();
        if steps.peek().is_none() {
            products.iter_mut().for_each(|(_, into)| into.fill(0.0));
        }
        let mut is_first = true;
        let mut block: Vec<S> = Vec::with_capacity(K_BLOCK);
        while let Some(first) = steps.peek() {
            let rows = d(first).len();
            block.clear();
            block.extend(steps.by_ref().take(K_BLOCK));
            self.left.reshape(block.len(), rows);
            self.left.pack_row_iter(simd, block.iter().map(d));
            for (x, into) in &mut products {
                let inputs = into.len() / rows;
                self.right.reshape(block.len(), inputs);
                self.right.pack_row_iter(simd, block.iter().map(x));
                gemm_transposed(simd, &self.left, &self.right, into, inputs, !is_first);
            }
            is_first = false;
        }
    }
}

/// Deals rows to tasks: as many as keep all threads busy, of nearly equal size, none above [`MOST_ROWS`].
fn dealt(rows: Range<usize>, threads: usize) -> impl Iterator<Item = Range<usize>> {
    let tasks = rows.len().div_ceil(MOST_ROWS).next_multiple_of(threads);
    cut(rows, tasks)
}

/// So many ranges of nearly equal size, or as many as there are rows.
fn cut(rows: Range<usize>, ranges: usize) -> impl Iterator<Item = Range<usize>> {
    let ranges = ranges.min(rows.len());
    (0..ranges).map(move |at| {
        let bound = |at| rows.start + at * rows.len() / ranges;
        bound(at)..bound(at + 1)
    })
}

/// The tensors of a bucket, taken one after the other.
struct Tensors<'b> {
    /// Where the rest begins in the flat gradient.
    start: usize,
    rest: &'b mut [f32],
}

impl<'b> Tensors<'b> {
    fn next(&mut self, range: &Range<usize>) -> &'b mut [f32] {
        assert_eq!(range.start, self.start, "a layer's tensors lie one behind the other");
        self.start = range.end;
        take(&mut self.rest, range.len())
    }
}

/// The first `len` numbers of the rest.
fn take<'b>(rest: &mut &'b mut [f32], len: usize) -> &'b mut [f32] {
    rest.split_off_mut(..len).expect("a bucket holds all of its tensors")
}

/// Row `at` of rows of equal width.
fn row(values: &[f32], width: usize, at: usize) -> &[f32] {
    &values[at * width..][..width]
}
