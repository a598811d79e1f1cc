//! Matrix products with sums in f32: the row rule and the sum rule by construction.
//!
//! In f32, and where a device has no tensor cores, each number has one accumulator, and k runs upwards.
//! A cube computes a tile of 64 × 64 numbers from tiles of its operands in shared memory; a unit has 4 × 4 of them in
//! registers. A tile that reaches beyond an operand reads zeros there, which changes no sum.

use cubecl::prelude::*;

use protocol::job::Precision;

use super::buffer::Buffer;
use super::precision::{rounded, tensor_depth};
use super::tensor;

/// Rows and columns of a cube's tile.
const TILE: usize = 64;
/// k's of a tile.
const DEPTH: usize = 16;
/// Distance of two k's of a tile. More than its rows: threads that store neighbouring k's of one row would else meet in one
/// bank of shared memory. A multiple of 4: threads load four numbers at once.
const PITCH: usize = TILE + 4;
/// Rows and columns of a unit's numbers.
const MICRO: usize = 4;
/// Units of a cube: 16 × 16.
const UNITS: usize = 256;
/// Elements of an operand's tile that a unit fetches.
const FETCHES: usize = TILE * DEPTH / UNITS;

/// What a product is added to.
#[derive(Debug, Clone, Copy)]
pub enum Start<'a> {
    /// Nothing.
    Zero,
    /// The same row `[n]`, from this place of the buffer on.
    Row(&'a Buffer, usize),
}

/// A matrix inside a buffer: element (i, j) at `at + i·stride + j`.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// Where it lies.
    pub buffer: &'a Buffer,
    /// Its first element.
    pub at: usize,
    /// Distance between rows.
    pub stride: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix whose rows of this width lie without gaps from the buffer's start on.
    pub fn dense(buffer: &'a Buffer, width: usize) -> Self {
        Self { buffer, at: 0, stride: width }
    }
}

#[cube]
fn multiply(
    left: &SharedMemory<f32>,
    right: &SharedMemory<f32>,
    sums: &mut Array<f32>,
    row: usize,
    column: usize,
) {
    for k in 0..DEPTH {
        #[unroll]
        for i in 0..MICRO {
            let l = left[k * PITCH + row + i];
            #[unroll]
            for j in 0..MICRO {
                sums[i * MICRO + j] = fma(l, right[k * PITCH + column + j], sums[i * MICRO + j]);
            }
        }
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn product_kernel(
    a: &Array<f32>,
    b: &Array<f32>,
    start: &Array<f32>,
    c: &mut Array<f32>,
    m: usize,
    n: usize,
    k: usize,
    a_at: usize,
    a_stride: usize,
    b_at: usize,
    b_stride: usize,
    start_at: usize,
    c_stride: usize,
    #[comptime] b_is_transposed: bool,
    #[comptime] starts_with_row: bool,
    #[comptime] precision: Precision,
) {
    let unit = UNIT_POS as usize;
    let (row, column) = (unit / 16 * MICRO, unit % 16 * MICRO);
    let (first_row, first_column) = (CUBE_POS_Y as usize * TILE, CUBE_POS_X as usize * TILE);
    let mut left = SharedMemory::<f32>::new(PITCH * DEPTH);
    let mut right = SharedMemory::<f32>::new(PITCH * DEPTH);
    let mut sums = Array::<f32>::new(MICRO * MICRO);
    #[unroll]
    for j in 0..MICRO {
        let s = first_column + column + j;
        #[unroll]
        for i in 0..MICRO {
            sums[i * MICRO + j] = 0.0;
        }
        if comptime!(starts_with_row) {
            // Rows beyond the last start with it too, and are not written.
            let value = select(s < n, start[select(s < n, start_at + s, 0)], 0.0);
            #[unroll]
            for i in 0..MICRO {
                sums[i * MICRO + j] = value;
            }
        }
    }
    let tiles = (k + (DEPTH - 1)) / DEPTH;
    for tile in 0..tiles {
        let first_k = tile * DEPTH;
        #[unroll]
        for fetch in 0..FETCHES {
            let at = unit + fetch * UNITS;
            // Neighbouring units fetch neighbouring k's of a row of a.
            let (r, p) = (at / DEPTH, at % DEPTH);
            let is_inside = first_row + r < m && first_k + p < k;
            let from = select(is_inside, a_at + (first_row + r) * a_stride + first_k + p, 0);
            left[p * PITCH + r] = select(is_inside, rounded(a[from], precision), 0.0);
            if comptime!(b_is_transposed) {
                let is_inside = first_column + r < n && first_k + p < k;
                let from = select(is_inside, b_at + (first_column + r) * b_stride + first_k + p, 0);
                right[p * PITCH + r] = select(is_inside, rounded(b[from], precision), 0.0);
            } else {
                let (p, s) = (at / TILE, at % TILE);
                let is_inside = first_column + s < n && first_k + p < k;
                let from = select(is_inside, b_at + (first_k + p) * b_stride + first_column + s, 0);
                right[p * PITCH + s] = select(is_inside, rounded(b[from], precision), 0.0);
            }
        }
        sync_cube();
        multiply(&left, &right, &mut sums, row, column);
        sync_cube();
    }
    #[unroll]
    for i in 0..MICRO {
        #[unroll]
        for j in 0..MICRO {
            let (r, s) = (first_row + row + i, first_column + column + j);
            if r < m && s < n {
                c[r * c_stride + s] = sums[i * MICRO + j];
            }
        }
    }
}

/// Shape of a product: rows and columns of the result, length of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of a and of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Columns of a.
    pub k: usize,
}

/// The right operand.
#[derive(Debug, Clone, Copy)]
pub enum Right<'a> {
    /// `[k][n]`
    Plain(Matrix<'a>),
    /// `[n][k]`
    Transposed(Matrix<'a>),
}

/// `c[m][n] = start + a[m][k] · b`, c's rows `c_stride` apart, with operands of this precision.
///
/// Numerics: from the start, one fused multiply-add for each k, k upwards; on tensor cores their sums, to which the start is
/// added.
#[allow(clippy::too_many_arguments)]
pub fn product<R: Runtime>(
    client: &ComputeClient<R>,
    precision: Precision,
    shape: Shape,
    a: Matrix<'_>,
    b: Right<'_>,
    start: Start<'_>,
    c: &Buffer,
    c_stride: usize,
) {
    let Shape { m, n, k } = shape;
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        a.at + (m - 1) * a.stride + k <= a.buffer.len() && (m - 1) * c_stride + n <= c.len(),
        "product {shape:?}: a has {} floats, c {}",
        a.buffer.len(),
        c.len()
    );
    if let Some(depth) = tensor_depth(client, precision) {
        // SAFETY: the assertions above and the callers' shapes keep the matrices inside the buffers.
        unsafe { tensor::product(client, (precision, depth), shape, a, b, start, c, c_stride) }
        return;
    }
    let (b, b_is_transposed) = match b {
        Right::Plain(b) => (b, false),
        Right::Transposed(b) => (b, true),
    };
    let (row, row_at) = match start {
        Start::Row(row, at) => (row, at),
        Start::Zero => (b.buffer, 0),
    };
    let cubes = CubeCount::Static(n.div_ceil(TILE) as u32, m.div_ceil(TILE) as u32, 1);
    // SAFETY: as above; everything beyond the matrices' edges is replaced by index 0 or not written.
    unsafe {
        product_kernel::launch_unchecked::<R>(
            client,
            cubes,
            CubeDim::new_1d(UNITS as u32),
            a.buffer.arg(),
            b.buffer.arg(),
            row.arg(),
            c.arg(),
            m,
            n,
            k,
            a.at,
            a.stride,
            b.at,
            b.stride,
            row_at,
            c_stride,
            b_is_transposed,
            matches!(start, Start::Row(..)),
            precision,
        );
    }
}
