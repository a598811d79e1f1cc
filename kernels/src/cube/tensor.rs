//! Matrix products on tensor cores: operands rounded to bf16 or tf32, sums in f32.
//!
//! A cube computes a tile of 128 × 64 numbers from tiles of its operands in shared memory; each of its eight warps has
//! 32 × 32 of them, as four sums of 16 × 16. While they are multiplied the next tiles travel. The sums of a number run along k
//! upwards, a tensor core's depth at a time, from zero: in what order and with what roundings a tensor core adds those up is its
//! own affair, but nothing of other rows and columns comes in, so that both rules hold.

use cubecl::cmma::{self, Matrix as Fragment, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;
use half::bf16;
use protocol::job::Precision;

use super::buffer::Buffer;
use super::gemm::{Matrix, Right, Shape, Start};
use super::shards::{Partials, ShardTable, WORDS, pair_row};

/// Rows and columns of a cube's tile.
const ROWS: usize = 128;
const COLUMNS: usize = 64;
/// k's of a tile.
const DEPTH: usize = 32;
/// What lies between two rows of a tile, so that units that read or write neighbouring rows meet in no bank.
const GAP: usize = 8;
/// Units that fetch neighbours in memory: the least that memory gives at a time.
const NEIGHBOURS: usize = 8;
/// Units of a cube, and warps.
const UNITS: usize = 256;
pub(super) const WARP: usize = 32;
const WARPS: usize = UNITS / WARP;
/// Rows and columns of a tensor core's product.
pub(super) const SIDE: usize = 16;
/// Distance between rows of a sum on its way out.
const OUT_PITCH: usize = SIDE + 4;
/// Bytes to which a tensor core wants its operands aligned.
pub(super) const ALIGNMENT: usize = 32;

/// How operands lie, and where a product starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Form {
    precision: Precision,
    /// Length of the sums that a tensor core adds up at a time.
    depth: usize,
    /// k is the (step, run) pairs of a shard, and both operands have a row for each: otherwise a has a row for each number of
    /// the result.
    by_pairs: bool,
    /// The right operand has a row for each column of the result.
    b_is_transposed: bool,
    starts_with_row: bool,
}

/// An operand `[lines][k]`, or with `across` `[k][lines]`, as a cube finds it.
#[derive(CubeType, Clone, Copy)]
struct Operand {
    at: usize,
    stride: usize,
    /// The first line of the cube's tile, and how many there are in all.
    first: usize,
    lines: usize,
}

/// The k's of a product: how many, and the pairs of a shard if they are those.
#[derive(CubeType, Clone, Copy)]
struct Depth {
    k: usize,
    first_run: usize,
    own_runs: usize,
    runs: usize,
}

/// A tile's rows as they lie in memory, which are k's of an operand `across`, else lines; and the width of such a row.
const fn extent(lines: usize, across: bool) -> (usize, usize) {
    if across { (DEPTH, lines) } else { (lines, DEPTH) }
}

/// Numbers of a tile with what lies between its rows.
const fn tile_len(lines: usize, across: bool) -> usize {
    let (rows, width) = extent(lines, across);
    rows * (width + GAP)
}

/// Fetches a unit's part of a tile of so many lines, from `first_k` on: of each 32nd row in memory each eighth number. Zeros
/// beyond the edges.
#[cube]
#[allow(clippy::too_many_arguments)]
fn fetch(
    from: &Array<f32>,
    operand: Operand,
    depth: Depth,
    first_k: usize,
    into: &mut Array<f32>,
    #[comptime] lines: usize,
    #[comptime] across: bool,
    #[comptime] by_pairs: bool,
) {
    let (rows, width) = comptime!(extent(lines, across));
    let (first_row, row_end) =
        if comptime!(across) { (first_k, depth.k) } else { (operand.first, operand.lines) };
    let (first_column, column_end) =
        if comptime!(across) { (operand.first, operand.lines) } else { (first_k, depth.k) };
    let column = first_column + UNIT_POS as usize % NEIGHBOURS;
    #[unroll]
    for part in 0..comptime!(rows * NEIGHBOURS / UNITS) {
        let row = first_row + UNIT_POS as usize / NEIGHBOURS + part * comptime!(UNITS / NEIGHBOURS);
        let is_there = row < row_end;
        let row = if comptime!(by_pairs) {
            pair_row(select(is_there, row, 0), depth.first_run, depth.own_runs, depth.runs)
        } else {
            row
        };
        let first = operand.at + row * operand.stride + column;
        #[unroll]
        for next in 0..comptime!(width / NEIGHBOURS) {
            let value = RuntimeCell::<f32>::new(0.0);
            if is_there && column + next * NEIGHBOURS < column_end {
                value.store(from[first + next * NEIGHBOURS]);
            }
            into[part * comptime!(width / NEIGHBOURS) + next] = value.read();
        }
    }
}

/// Rounds what was fetched and puts it into the tile.
#[cube]
fn put<E: Float>(
    from: &Array<f32>,
    tile: &mut SharedMemory<E>,
    #[comptime] lines: usize,
    #[comptime] across: bool,
) {
    let (rows, width) = comptime!(extent(lines, across));
    #[unroll]
    for part in 0..comptime!(rows * NEIGHBOURS / UNITS) {
        let row = UNIT_POS as usize / NEIGHBOURS + part * comptime!(UNITS / NEIGHBOURS);
        #[unroll]
        for next in 0..comptime!(width / NEIGHBOURS) {
            let column = UNIT_POS as usize % NEIGHBOURS + next * NEIGHBOURS;
            let value = from[part * comptime!(width / NEIGHBOURS) + next];
            tile[row * comptime!(width + GAP) + column] = E::cast_from(value);
        }
    }
}

/// The 16 lines from `line` on of a tile, of the k's from `k` on.
#[cube]
fn fragment<E: Float>(
    tile: &SharedMemory<E>,
    line: usize,
    #[comptime] k: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] lines: usize,
    #[comptime] across: bool,
    #[comptime] depth: usize,
) -> Fragment<E> {
    let pitch = comptime!(extent(lines, across).1 + GAP);
    let start = if comptime!(across) { k * pitch + line } else { line * pitch + k };
    // A has a row for each line, B a column.
    let layout = comptime!(if across == (ident == MatrixIdent::A) {
        MatrixLayout::ColMajor
    } else {
        MatrixLayout::RowMajor
    });
    let end = start + comptime!(if across { (depth - 1) * pitch + SIDE } else { (SIDE - 1) * pitch + depth });
    Fragment::<E>::from_slice(ident, SIDE, SIDE, depth, layout, &tile.slice(start, end), pitch as u32)
}

/// 16 × 16 sums of zero.
#[cube]
fn zeros(#[comptime] depth: usize) -> Fragment<f32> {
    Fragment::<f32>::from_value(MatrixIdent::Accumulator, SIDE, SIDE, depth, MatrixLayout::Undefined, 0.0)
}

/// Writes 16 × 16 sums that begin at this row and column of the result.
#[cube]
#[allow(clippy::too_many_arguments)]
fn write(
    sums: &Fragment<f32>,
    row: usize,
    column: usize,
    m: usize,
    n: usize,
    start: &Array<f32>,
    start_at: usize,
    c: &mut Array<f32>,
    c_at: usize,
    c_stride: usize,
    out: &mut SharedMemory<f32>,
    #[comptime] starts_with_row: bool,
) {
    let unit = UNIT_POS as usize;
    let first = unit / WARP * comptime!(SIDE * OUT_PITCH);
    let end = first + comptime!(SIDE * OUT_PITCH);
    cmma::store(&mut out.slice_mut(first, end), sums, OUT_PITCH as u32, MatrixLayout::RowMajor);
    sync_cube();
    #[unroll]
    for part in 0..comptime!(SIDE * SIDE / WARP) {
        let at = unit % WARP + part * WARP;
        let (r, s) = (row + at / SIDE, column + at % SIDE);
        if r < m && s < n {
            let sum = RuntimeCell::<f32>::new(out[first + at / SIDE * OUT_PITCH + at % SIDE]);
            if comptime!(starts_with_row) {
                sum.store(start[start_at + s] + sum.read());
            }
            c[c_at + r * c_stride + s] = sum.read();
        }
    }
    sync_cube();
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn tensor_kernel<E: Float>(
    table: &Array<u32>,
    a: &Array<f32>,
    b: &Array<f32>,
    start: &Array<f32>,
    c: &mut Array<f32>,
    m: usize,
    n: usize,
    k: usize,
    runs: usize,
    a_at: usize,
    a_stride: usize,
    b_at: usize,
    b_stride: usize,
    start_at: usize,
    c_at: usize,
    c_stride: usize,
    c_shard_stride: usize,
    #[comptime] form: Form,
) {
    let by_pairs = comptime!(form.by_pairs);
    let (first_row, first_column) = (CUBE_POS_Y as usize * ROWS, CUBE_POS_X as usize * COLUMNS);
    let shard = CUBE_POS_Z as usize;
    let depth = if comptime!(by_pairs) {
        let first_run = table[shard * WORDS] as usize;
        let own_runs = table[shard * WORDS + 1] as usize;
        let k = own_runs * table[shard * WORDS + 2] as usize;
        // A shard may have none.
        Depth { k, first_run, own_runs: select(own_runs > 0, own_runs, 1), runs }
    } else {
        Depth { k, first_run: 0usize.runtime(), own_runs: 1usize.runtime(), runs }
    };
    let left_operand = Operand { at: a_at, stride: a_stride, first: first_row, lines: m };
    let right_operand = Operand { at: b_at, stride: b_stride, first: first_column, lines: n };
    let (left_across, right_across) = comptime!((form.by_pairs, !form.b_is_transposed));

    let mut left = SharedMemory::<E>::new_aligned(comptime!(tile_len(ROWS, left_across)), ALIGNMENT);
    let mut right = SharedMemory::<E>::new_aligned(comptime!(tile_len(COLUMNS, right_across)), ALIGNMENT);
    let mut out = SharedMemory::<f32>::new_aligned(comptime!(WARPS * SIDE * OUT_PITCH), ALIGNMENT);
    let mut next_left = Array::<f32>::new(comptime!(ROWS * DEPTH / UNITS));
    let mut next_right = Array::<f32>::new(comptime!(COLUMNS * DEPTH / UNITS));
    let warp = UNIT_POS as usize / WARP;
    let (row, column) = (warp % 4 * comptime!(2 * SIDE), warp / 4 * comptime!(2 * SIDE));
    let (sums00, sums01) = (zeros(form.depth), zeros(form.depth));
    let (sums10, sums11) = (zeros(form.depth), zeros(form.depth));

    fetch(a, left_operand, depth, 0, &mut next_left, ROWS, left_across, by_pairs);
    fetch(b, right_operand, depth, 0, &mut next_right, COLUMNS, right_across, by_pairs);
    let tiles = (depth.k + (DEPTH - 1)) / DEPTH;
    for tile in 0..tiles {
        put::<E>(&next_left, &mut left, ROWS, left_across);
        put::<E>(&next_right, &mut right, COLUMNS, right_across);
        sync_cube();
        // Behind the last tile these are zeros.
        let next_k = (tile + 1) * DEPTH;
        fetch(a, left_operand, depth, next_k, &mut next_left, ROWS, left_across, by_pairs);
        fetch(b, right_operand, depth, next_k, &mut next_right, COLUMNS, right_across, by_pairs);
        #[unroll]
        for part in 0..comptime!(DEPTH / form.depth) {
            let k = comptime!(part * form.depth);
            let (a_ident, b_ident) = comptime!((MatrixIdent::A, MatrixIdent::B));
            let a0 = fragment::<E>(&left, row, k, a_ident, ROWS, left_across, form.depth);
            let a1 = fragment::<E>(&left, row + SIDE, k, a_ident, ROWS, left_across, form.depth);
            let b0 = fragment::<E>(&right, column, k, b_ident, COLUMNS, right_across, form.depth);
            let b1 = fragment::<E>(&right, column + SIDE, k, b_ident, COLUMNS, right_across, form.depth);
            cmma::execute(&a0, &b0, &sums00, &sums00);
            cmma::execute(&a0, &b1, &sums01, &sums01);
            cmma::execute(&a1, &b0, &sums10, &sums10);
            cmma::execute(&a1, &b1, &sums11, &sums11);
        }
        sync_cube();
    }

    let (row, column, c_at) = (first_row + row, first_column + column, shard * c_shard_stride + c_at);
    let starts = comptime!(form.starts_with_row);
    write(&sums00, row, column, m, n, start, start_at, c, c_at, c_stride, &mut out, starts);
    write(&sums01, row, column + SIDE, m, n, start, start_at, c, c_at, c_stride, &mut out, starts);
    write(&sums10, row + SIDE, column, m, n, start, start_at, c, c_at, c_stride, &mut out, starts);
    write(&sums11, row + SIDE, column + SIDE, m, n, start, start_at, c, c_at, c_stride, &mut out, starts);
}

/// The arguments of a launch besides its operands.
struct Launch<'a> {
    table: &'a Buffer,
    shape: Shape,
    runs: usize,
    start: (&'a Buffer, usize),
    into: &'a Buffer,
    c_at: usize,
    c_stride: usize,
    c_shard_stride: usize,
    shards: usize,
    form: Form,
}

/// # Safety
/// The matrices lie in their buffers.
unsafe fn launch<R: Runtime>(client: &ComputeClient<R>, a: Matrix<'_>, b: Matrix<'_>, launch: Launch<'_>) {
    let Launch { table, shape: Shape { m, n, k }, runs, start, into, .. } = launch;
    let cubes = CubeCount::Static(n.div_ceil(COLUMNS) as u32, m.div_ceil(ROWS) as u32, launch.shards as u32);
    let launch_of = match launch.form.precision {
        Precision::Bf16 => tensor_kernel::launch_unchecked::<bf16, R>,
        Precision::F32 | Precision::Tf32 => tensor_kernel::launch_unchecked::<tf32, R>,
    };
    // SAFETY: the kernel reads and writes inside the matrices only: beyond their edges index 0 is read and nothing written.
    unsafe {
        launch_of(
            client,
            cubes,
            CubeDim::new_1d(UNITS as u32),
            table.arg(),
            a.buffer.arg(),
            b.buffer.arg(),
            start.0.arg(),
            into.arg(),
            m,
            n,
            k,
            runs,
            a.at,
            a.stride,
            b.at,
            b.stride,
            start.1,
            launch.c_at,
            launch.c_stride,
            launch.c_shard_stride,
            launch.form,
        );
    }
}

/// [`gemm::product`](super::gemm::product) on tensor cores that add up `depth` numbers at a time.
///
/// # Safety
/// The matrices lie in their buffers.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn product<R: Runtime>(
    client: &ComputeClient<R>,
    (precision, depth): (Precision, usize),
    shape: Shape,
    a: Matrix<'_>,
    b: Right<'_>,
    start: Start<'_>,
    c: &Buffer,
    c_stride: usize,
) {
    let (b, b_is_transposed) = match b {
        Right::Plain(b) => (b, false),
        Right::Transposed(b) => (b, true),
    };
    let starts_with_row = matches!(start, Start::Row(..));
    let start = match start {
        Start::Row(row, at) => (row, at),
        Start::Zero => (b.buffer, 0),
    };
    let form = Form { precision, depth, by_pairs: false, b_is_transposed, starts_with_row };
    let product = Launch {
        table: a.buffer,
        shape,
        runs: 1,
        start,
        into: c,
        c_at: 0,
        c_stride,
        c_shard_stride: 0,
        shards: 1,
        form,
    };
    // SAFETY: as promised.
    unsafe { launch(client, a, b, product) }
}

/// [`shards::products`](super::shards::products) on tensor cores that add up `depth` numbers at a time.
///
/// # Safety
/// The matrices lie in their buffers, and the shards' pairs in the matrices.
pub(super) unsafe fn products<R: Runtime>(
    client: &ComputeClient<R>,
    (precision, depth): (Precision, usize),
    table: &ShardTable,
    (m, n): (usize, usize),
    d: Matrix<'_>,
    x: Matrix<'_>,
    into: Partials<'_>,
) {
    let products = Launch {
        table: table.words(),
        shape: Shape { m, n, k: 0 },
        runs: table.runs(),
        start: (x.buffer, 0),
        into: into.buffer,
        c_at: into.at,
        c_stride: n,
        c_shard_stride: into.stride,
        shards: table.shards(),
        form: Form { precision, depth, by_pairs: true, b_is_transposed: false, starts_with_row: false },
    };
    // SAFETY: as promised.
    unsafe { launch(client, d, x, products) }
}
