//! Sums over the (step, run) pairs of each shard, and along the tree over the shards.
//!
//! The pairs of a shard are taken step by step, in a step run by run: an order that depends on the shard alone. Pairs
//! beyond a run's end are among them; what they add is zero.

use cubecl::prelude::*;
use protocol::job::Precision;

use super::buffer::{Buffer, UNITS, cubes};
use super::gemm::Matrix;
use super::precision::{rounded, tensor_depth};
use super::tensor;

/// Rows and columns of a cube's tile of a weight gradient.
const TILE: usize = 64;
/// Pairs of a tile.
const DEPTH: usize = 16;
/// Rows and columns of a unit's numbers.
const MICRO: usize = 4;
/// Elements of an operand's tile that a unit fetches.
const FETCHES: usize = TILE * DEPTH / UNITS as usize;

/// Words that describe a shard in [`ShardTable`]: its first run, its runs, the steps of the longest.
pub(super) const WORDS: usize = 3;

/// Where the pairs of a batch's shards lie.
#[derive(Debug, Clone)]
pub struct ShardTable {
    /// `[shards][3]`
    words: Buffer,
    shards: usize,
    /// Runs in all, `Nr`: pair (t, run) is row `t·Nr + run` of whatever is stored by step.
    runs: usize,
}

impl ShardTable {
    /// Of a table on the device: for each shard its first run, the number of its runs, the steps of the longest.
    ///
    /// # Panics
    /// The buffer has not three words for each shard.
    pub fn new(words: Buffer, runs: usize) -> Self {
        assert!(words.len().is_multiple_of(WORDS), "ShardTable: {} words", words.len());
        Self { shards: words.len() / WORDS, words, runs }
    }

    /// Number of shards.
    pub fn shards(&self) -> usize {
        self.shards
    }

    pub(super) fn words(&self) -> &Buffer {
        &self.words
    }

    pub(super) fn runs(&self) -> usize {
        self.runs
    }
}

/// Where the sums of all shards go: the sum of shard s begins at `s·stride + at`.
#[derive(Debug, Clone, Copy)]
pub struct Partials<'a> {
    /// `[shards][stride]`
    pub buffer: &'a Buffer,
    /// Distance between shards.
    pub stride: usize,
    /// Where in a shard's part.
    pub at: usize,
}

#[cube]
pub(super) fn pair_row(pair: usize, first: usize, own: usize, runs: usize) -> usize {
    pair / own * runs + first + pair % own
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn products_kernel(
    table: &Array<u32>,
    d: &Array<f32>,
    x: &Array<f32>,
    out: &mut Array<f32>,
    m: usize,
    n: usize,
    runs: usize,
    d_at: usize,
    d_stride: usize,
    x_at: usize,
    x_stride: usize,
    out_at: usize,
    out_stride: usize,
    #[comptime] precision: Precision,
) {
    let shard = CUBE_POS_Z as usize;
    let first = table[shard * WORDS] as usize;
    let own = table[shard * WORDS + 1] as usize;
    let pairs = own * table[shard * WORDS + 2] as usize;
    let unit = UNIT_POS as usize;
    let (row, column) = (unit / 16 * MICRO, unit % 16 * MICRO);
    let (first_row, first_column) = (CUBE_POS_Y as usize * TILE, CUBE_POS_X as usize * TILE);
    let mut left = SharedMemory::<f32>::new(TILE * DEPTH);
    let mut right = SharedMemory::<f32>::new(TILE * DEPTH);
    let mut sums = Array::<f32>::new(MICRO * MICRO);
    #[unroll]
    for i in 0..MICRO * MICRO {
        sums[i] = 0.0;
    }
    let tiles = (pairs + (DEPTH - 1)) / DEPTH;
    for tile in 0..tiles {
        #[unroll]
        for fetch in 0..FETCHES {
            let at = unit + fetch * (UNITS as usize);
            let (p, s) = (at / TILE, at % TILE);
            let pair = tile * DEPTH + p;
            let is_pair = pair < pairs;
            let storage = select(is_pair, pair_row(pair, first, own, runs), 0);
            let has_row = is_pair && first_row + s < m;
            let from = select(has_row, d_at + storage * d_stride + first_row + s, 0);
            left[p * TILE + s] = select(has_row, rounded(d[from], precision), 0.0);
            let has_column = is_pair && first_column + s < n;
            let from = select(has_column, x_at + storage * x_stride + first_column + s, 0);
            right[p * TILE + s] = select(has_column, rounded(x[from], precision), 0.0);
        }
        sync_cube();
        for k in 0..DEPTH {
            #[unroll]
            for i in 0..MICRO {
                let l = left[k * TILE + row + i];
                #[unroll]
                for j in 0..MICRO {
                    sums[i * MICRO + j] = fma(l, right[k * TILE + column + j], sums[i * MICRO + j]);
                }
            }
        }
        sync_cube();
    }
    let start = shard * out_stride + out_at;
    #[unroll]
    for i in 0..MICRO {
        #[unroll]
        for j in 0..MICRO {
            let (r, s) = (first_row + row + i, first_column + column + j);
            if r < m && s < n {
                out[start + r * n + s] = sums[i * MICRO + j];
            }
        }
    }
}

/// The gradient of a weight `[m][n]` of every shard: `Σ d[pair][r] · x[pair][s]`, with operands of this precision.
///
/// Numerics: from 0, one fused multiply-add for each pair, in order; on tensor cores their sums, in the same order.
pub fn products<R: Runtime>(
    client: &ComputeClient<R>,
    precision: Precision,
    table: &ShardTable,
    (m, n): (usize, usize),
    d: Matrix<'_>,
    x: Matrix<'_>,
    into: Partials<'_>,
) {
    if let Some(depth) = tensor_depth(client, precision) {
        // SAFETY: the table's runs and steps lie within what is stored by step.
        unsafe { tensor::products(client, (precision, depth), table, (m, n), d, x, into) }
        return;
    }
    let cubes = CubeCount::Static(n.div_ceil(TILE) as u32, m.div_ceil(TILE) as u32, table.shards as u32);
    // SAFETY: rows and columns beyond the operands' edges are read at index 0 or not written; the table's runs and steps
    // lie within what is stored by step.
    unsafe {
        products_kernel::launch_unchecked::<R>(
            client,
            cubes,
            CubeDim::new_1d(UNITS),
            table.words.arg(),
            d.buffer.arg(),
            x.buffer.arg(),
            into.buffer.arg(),
            m,
            n,
            table.runs,
            d.at,
            d.stride,
            x.at,
            x.stride,
            into.at,
            into.stride,
            precision,
        );
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn column_kernel(
    table: &Array<u32>,
    d: &Array<f32>,
    x: &Array<f32>,
    out: &mut Array<f32>,
    shards: usize,
    width: usize,
    runs: usize,
    d_at: usize,
    d_stride: usize,
    x_at: usize,
    x_stride: usize,
    out_at: usize,
    out_stride: usize,
    #[comptime] multiplies: bool,
) {
    if ABSOLUTE_POS < shards * width {
        let (shard, column) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
        let first = table[shard * WORDS] as usize;
        let own = table[shard * WORDS + 1] as usize;
        let pairs = own * table[shard * WORDS + 2] as usize;
        let sum = RuntimeCell::<f32>::new(0.0);
        for pair in 0..pairs {
            let storage = pair_row(pair, first, own, runs);
            let d = d[d_at + storage * d_stride + column];
            if comptime!(multiplies) {
                sum.store(fma(d, x[x_at + storage * x_stride + column], sum.read()));
            } else {
                sum.store(sum.read() + d);
            }
        }
        out[shard * out_stride + out_at + column] = sum.read();
    }
}

/// The gradient of a bias `[width]` of every shard, `Σ d[pair]`; with `x` that of weights which multiply element by
/// element, `Σ d[pair] · x[pair]`.
///
/// Numerics: from 0, in order.
pub fn column_sums<R: Runtime>(
    client: &ComputeClient<R>,
    table: &ShardTable,
    width: usize,
    d: Matrix<'_>,
    x: Option<Matrix<'_>>,
    into: Partials<'_>,
) {
    let factor = x.unwrap_or(d);
    // SAFETY: each unit reads one column of the pairs of its shard and writes one number.
    unsafe {
        column_kernel::launch_unchecked::<R>(
            client,
            cubes(table.shards * width),
            CubeDim::new_1d(UNITS),
            table.words.arg(),
            d.buffer.arg(),
            factor.buffer.arg(),
            into.buffer.arg(),
            table.shards,
            width,
            table.runs,
            d.at,
            d.stride,
            factor.at,
            factor.stride,
            into.at,
            into.stride,
            x.is_some(),
        );
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn token_kernel(
    table: &Array<u32>,
    tokens: &Array<u32>,
    d: &Array<f32>,
    out: &mut Array<f32>,
    shards: usize,
    width: usize,
    vocabulary: usize,
    runs: usize,
    d_stride: usize,
    out_at: usize,
    out_stride: usize,
    #[comptime] token_major: bool,
) {
    let each = width * vocabulary;
    if ABSOLUTE_POS < shards * each {
        let (shard, at) = (ABSOLUTE_POS / each, ABSOLUTE_POS % each);
        let (token, column) = (at / width, at % width);
        let first = table[shard * WORDS] as usize;
        let own = table[shard * WORDS + 1] as usize;
        let pairs = own * table[shard * WORDS + 2] as usize;
        let sum = RuntimeCell::<f32>::new(0.0);
        for pair in 0..pairs {
            let storage = pair_row(pair, first, own, runs);
            if tokens[storage] as usize == token {
                sum.store(sum.read() + d[storage * d_stride + column]);
            }
        }
        let start = shard * out_stride + out_at;
        if comptime!(token_major) {
            out[start + token * width + column] = sum.read();
        } else {
            out[start + column * vocabulary + token] = sum.read();
        }
    }
}

/// How the gradient of a table of tokens lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenOrder {
    /// `[tokens][width]`: an embedding.
    Rows,
    /// `[width][tokens]`: weights of a one-hot input.
    Columns,
}

/// The gradient of a table of tokens of every shard: each token's `Σ d[pair]` over the pairs that read it.
///
/// Numerics: from 0, in order.
#[allow(clippy::too_many_arguments)]
pub fn token_sums<R: Runtime>(
    client: &ComputeClient<R>,
    table: &ShardTable,
    tokens: &Buffer,
    (vocabulary, width): (usize, usize),
    order: TokenOrder,
    d: &Buffer,
    d_stride: usize,
    into: Partials<'_>,
) {
    // SAFETY: each unit reads one column of the pairs of its shard and writes one number.
    unsafe {
        token_kernel::launch_unchecked::<R>(
            client,
            cubes(table.shards * vocabulary * width),
            CubeDim::new_1d(UNITS),
            table.words.arg(),
            tokens.arg(),
            d.arg(),
            into.buffer.arg(),
            table.shards,
            width,
            vocabulary,
            table.runs,
            d_stride,
            into.at,
            into.stride,
            order == TokenOrder::Rows,
        );
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn tree_kernel(
    additions: &Array<u32>,
    partials: &mut Array<f32>,
    out: &mut Array<f32>,
    count: usize,
    len: usize,
    first: usize,
    stride: usize,
    out_at: usize,
) {
    if ABSOLUTE_POS < len {
        for addition in 0..count {
            let sum = additions[2 * addition] as usize * stride + ABSOLUTE_POS;
            let addend = additions[2 * addition + 1] as usize * stride + ABSOLUTE_POS;
            partials[sum] = partials[sum] + partials[addend];
        }
        out[out_at + ABSOLUTE_POS] = partials[first * stride + ABSOLUTE_POS];
    }
}

/// Adds the first `len` floats of the shards' parts along a tree, and writes its root to `out_at ..` of `out`.
///
/// `additions` are pairs of positions among the shards, in the order in which they are done; the sum of each is in the
/// place of its first.  `root` is where the last sum is.
pub fn tree_sum<R: Runtime>(
    client: &ComputeClient<R>,
    additions: &Buffer,
    root: usize,
    partials: Partials<'_>,
    len: usize,
    out: &Buffer,
    out_at: usize,
) {
    // SAFETY: each unit has its own column of the parts and writes one number of `out`.
    unsafe {
        tree_kernel::launch_unchecked::<R>(
            client,
            cubes(len),
            CubeDim::new_1d(UNITS),
            additions.arg(),
            partials.buffer.arg(),
            out.arg(),
            additions.len() / 2,
            len,
            root,
            partials.stride,
            out_at,
        );
    }
}
