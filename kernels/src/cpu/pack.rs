//! Packed operands of the GEMM: the copies whose layout the micro-kernels stream through.
//!
//! Both formats are the same at every SIMD level. Packing moves numbers and computes none, but that operands in bf16 are
//! rounded here; [`bf16`] has their format.

use super::bf16::{self, DEPTH, Tile};
use super::simd::{Simd, simd_kernel};
use protocol::job::Precision;
use std::slice;

/// Columns of a full panel of [`PackedMatrix`].
pub const PANEL_COLUMNS: usize = 32;
/// Rows of a panel of [`PackedLeft`], and the tallest tile of the micro-kernels.
pub const PANEL_ROWS: usize = 12;
/// Elements of a column that are written in one go: 32 columns of them are 16 KiB.
const COLUMN_BLOCK: usize = 128;
/// The granule of a panel's width: one AVX-512 register of f32.
const GRANULE: usize = 16;

/// One cache line, so that no vector load of a panel straddles two.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f32; GRANULE]);

/// The right-hand side `B[k, n]` of a product.
///
/// Layout in f32, in panels of 32 columns: `[panel][k][width]`; width is 32, of the last panel 16 if that is enough. In bf16,
/// in panels of 16: [`bf16::Tile`]s `[panel][k / 32]`. Missing columns are never looked at. Repacking a matrix of the same or
/// a smaller size allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct PackedMatrix {
    precision: Precision,
    k: usize,
    n: usize,
    lines: Vec<Line>,
}

impl PackedMatrix {
    /// Zeros of shape `[k, n]`, in f32.
    pub fn new(k: usize, n: usize) -> PackedMatrix {
        PackedMatrix::with_precision(Precision::F32, k, n)
    }

    /// Zeros of shape `[k, n]`.
    pub fn with_precision(precision: Precision, k: usize, n: usize) -> PackedMatrix {
        let mut packed = PackedMatrix { precision, ..PackedMatrix::default() };
        packed.reshape(k, n);
        packed
    }

    /// Makes it `[k, n]`, in the memory already held if that is enough. Its elements are not specified until it is packed.
    pub fn reshape(&mut self, k: usize, n: usize) {
        (self.k, self.n) = (k, n);
        grow(&mut self.lines, PackedMatrix::bytes_of(self.precision, k, n));
    }

    /// Bytes that it holds.
    pub fn held_bytes(&self) -> usize {
        self.lines.capacity() * size_of::<Line>()
    }

    /// Bytes of a matrix of shape `[k, n]`, with the padding.
    pub fn bytes_of(precision: Precision, k: usize, n: usize) -> usize {
        match precision {
            Precision::F32 | Precision::Tf32 => k * n.div_ceil(GRANULE) * size_of::<Line>(),
            Precision::Bf16 => bf16::pack::tiles_of(k, n) * size_of::<Tile>(),
        }
    }

    /// What its elements are rounded to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Rows: the length of each dot product.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns, without the padding.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Fills from `b`, row-major `[k, n]` with `ldb` elements from row to row.
    pub fn pack_rows(&mut self, simd: Simd, b: &[f32], ldb: usize) {
        assert_extent("pack_rows", "b", b.len(), self.k, self.n, ldb);
        let (k, n) = (self.k, self.n);
        self.pack_row_iter(simd, (0..k).map(|p| &b[p * ldb..][..n]));
    }

    /// Fills from `rows`, which yields the k rows of B, each of n elements.
    pub fn pack_row_iter<'a>(&mut self, simd: Simd, rows: impl Iterator<Item = &'a [f32]>) {
        let (k, n) = (self.k, self.n);
        match self.precision {
            Precision::F32 | Precision::Tf32 => for_bursts::<BURST>(rows, k, n, |first, burst| {
                pack_burst::<PANEL_COLUMNS>(simd, burst, k, first, as_floats_mut(&mut self.lines));
            }),
            Precision::Bf16 => for_bursts::<DEPTH>(rows, k, n, |first, burst| {
                bf16::pack::pack_right(simd, burst, k, first / DEPTH, as_tiles_mut(&mut self.lines));
            }),
        }
    }

    /// Fills from the transpose: `b` is row-major `[n, k]` with `ldb` elements from row to row, as PyTorch stores
    /// weights.
    pub fn pack_columns(&mut self, simd: Simd, b: &[f32], ldb: usize) {
        assert_extent("pack_columns", "b", b.len(), self.n, self.k, ldb);
        let k = self.k;
        if self.precision == Precision::Bf16 {
            bf16::pack::pack_columns(simd, self.n, k, b, ldb, as_tiles_mut(&mut self.lines));
            return;
        }
        for first_column in (0..self.n).step_by(PANEL_COLUMNS) {
            let columns = PANEL_COLUMNS.min(self.n - first_column);
            let (start, width) = self.panel_place(first_column);
            let panel = &mut as_floats_mut(&mut self.lines)[start..start + k * width];
            // A block of the panel stays in the first-level cache while the columns are written into it.
            for p0 in (0..k).step_by(COLUMN_BLOCK) {
                let block = &mut panel[p0 * width..][..COLUMN_BLOCK.min(k - p0) * width];
                for j in 0..columns {
                    let source = &b[(first_column + j) * ldb + p0..];
                    for (row, value) in block.chunks_exact_mut(width).zip(source) {
                        row[j] = *value;
                    }
                }
            }
        }
    }

    /// The panel that starts at `first_column` (a multiple of 32): its elements `[k][width]`, and the width.
    pub(crate) fn panel(&self, first_column: usize) -> (&[f32], usize) {
        let (start, width) = self.panel_place(first_column);
        (&as_floats(&self.lines)[start..start + self.k * width], width)
    }

    /// Its tiles, in bf16.
    pub(crate) fn tiles(&self) -> &[Tile] {
        as_tiles(&self.lines)
    }

    fn panel_place(&self, first_column: usize) -> (usize, usize) {
        (first_column * self.k, panel_width(self.n - first_column))
    }
}

/// Width of the panel of a [`PackedMatrix`] that has so many columns left.
#[inline(always)]
fn panel_width(columns: usize) -> usize {
    if columns > GRANULE { PANEL_COLUMNS } else { GRANULE }
}

/// The transposed left-hand side of a weight gradient: `A[k, m]`, used as `Aᵀ`.
///
/// Layout in f32, in panels of 12 of its columns: `[panel][k][12]`. In bf16, in panels of 16: [`bf16::Tile`]s
/// `[panel][k / 32]`. Missing columns of the last panel are never looked at. Repacking a matrix of the same or a smaller size
/// allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct PackedLeft {
    precision: Precision,
    k: usize,
    m: usize,
    lines: Vec<Line>,
}

impl PackedLeft {
    /// Zeros of shape `[k, m]`, in f32.
    pub fn new(k: usize, m: usize) -> PackedLeft {
        PackedLeft::with_precision(Precision::F32, k, m)
    }

    /// Zeros of shape `[k, m]`.
    pub fn with_precision(precision: Precision, k: usize, m: usize) -> PackedLeft {
        let mut packed = PackedLeft { precision, ..PackedLeft::default() };
        packed.reshape(k, m);
        packed
    }

    /// Makes it `[k, m]`, in the memory already held if that is enough. Its elements are not specified until it is packed.
    pub fn reshape(&mut self, k: usize, m: usize) {
        (self.k, self.m) = (k, m);
        grow(&mut self.lines, PackedLeft::bytes_of(self.precision, k, m));
    }

    /// Bytes that it holds.
    pub fn held_bytes(&self) -> usize {
        self.lines.capacity() * size_of::<Line>()
    }

    /// Bytes of a matrix of shape `[k, m]`, with the padding.
    pub fn bytes_of(precision: Precision, k: usize, m: usize) -> usize {
        let bytes = match precision {
            Precision::F32 | Precision::Tf32 => k * m.next_multiple_of(PANEL_ROWS) * size_of::<f32>(),
            Precision::Bf16 => bf16::pack::tiles_of(k, m) * size_of::<Tile>(),
        };
        bytes.next_multiple_of(size_of::<Line>())
    }

    /// What its elements are rounded to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The number of rows summed over.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Rows of the product.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Fills from `rows`, which yields k rows of m elements each, in the order of the sum.
    pub fn pack_row_iter<'a>(&mut self, simd: Simd, rows: impl Iterator<Item = &'a [f32]>) {
        let (k, m) = (self.k, self.m);
        match self.precision {
            Precision::F32 | Precision::Tf32 => for_bursts::<BURST>(rows, k, m, |first, burst| {
                pack_burst::<PANEL_ROWS>(simd, burst, k, first, as_floats_mut(&mut self.lines));
            }),
            Precision::Bf16 => for_bursts::<DEPTH>(rows, k, m, |first, burst| {
                bf16::pack::pack_left(simd, burst, k, first / DEPTH, as_tiles_mut(&mut self.lines));
            }),
        }
    }

    /// The panel that starts at column `first` (a multiple of 12) of A: elements `[k][12]`.
    pub(crate) fn panel(&self, first: usize) -> &[f32] {
        &as_floats(&self.lines)[first * self.k..][..self.k * PANEL_ROWS]
    }

    /// Its tiles, in bf16.
    pub(crate) fn tiles(&self) -> &[Tile] {
        as_tiles(&self.lines)
    }
}

/// Rows of f32 that are packed together: what they write to a panel is adjacent, so that each panel's cache lines and page are
/// visited once for all of them.
const BURST: usize = 8;

/// Takes `k` rows of `width` elements, at most `BURST` at a time: `pack(first, rows)`. The rows of the next burst are
/// asked of the memory meanwhile.
#[inline(always)]
fn for_bursts<'a, const BURST: usize>(
    mut rows: impl Iterator<Item = &'a [f32]>,
    k: usize,
    width: usize,
    mut pack: impl FnMut(usize, &[&'a [f32]]),
) {
    let mut next = || {
        let (mut burst, mut count): ([&[f32]; BURST], usize) = ([&[]; BURST], 0);
        for row in rows.by_ref().take(BURST) {
            assert!(row.len() == width, "pack_row_iter: row has {} elements, needs {width}", row.len());
            prefetch(row);
            burst[count] = row;
            count += 1;
        }
        (burst, count)
    };
    let (mut packed, mut ahead) = (0, next());
    while ahead.1 > 0 {
        let (burst, count) = ahead;
        ahead = next();
        assert!(packed + count <= k, "pack_row_iter: more than k = {k} rows");
        pack(packed, &burst[..count]);
        packed += count;
    }
    assert!(packed == k, "pack_row_iter: {packed} rows, needs k = {k}");
}

/// Asks the memory for a row.
#[inline(always)]
fn prefetch(row: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in row.chunks(GRANULE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program could see, from any address; every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}

simd_kernel! {
    /// Writes rows of equal length to the places `first..` of panels `[k][PANEL]`; of the last panel, if all of it is
    /// in the granule of a [`PackedMatrix`], to `[k][GRANULE]`.
    fn pack_burst<const PANEL: usize>(
        simd: Simd,
        rows: &[&[f32]],
        k: usize,
        first: usize,
        panels: &mut [f32],
    ) {
        let n = rows[0].len();
        for first_column in (0..n / PANEL * PANEL).step_by(PANEL) {
            let panel = &mut panels[first_column * k + first * PANEL..];
            for (into, row) in panel.chunks_exact_mut(PANEL).zip(rows) {
                // A copy of a constant length is a few moves, any other is a call.
                into.copy_from_slice(&row[first_column..first_column + PANEL]);
            }
        }
        let (last, columns) = (n / PANEL * PANEL, n % PANEL);
        if columns > 0 {
            let width = if PANEL == PANEL_COLUMNS { panel_width(columns) } else { PANEL };
            let panel = &mut panels[last * k + first * width..];
            for (into, row) in panel.chunks_exact_mut(width).zip(rows) {
                into[..columns].copy_from_slice(&row[last..]);
            }
        }
    }
}

/// Asserts that `rows` rows of `columns` elements, `stride` apart, lie within `len` elements.
pub(crate) fn assert_extent(
    function: &str,
    name: &str,
    len: usize,
    rows: usize,
    columns: usize,
    stride: usize,
) {
    assert!(
        columns <= stride || rows <= 1,
        "{function}: {name} has rows of {columns} elements only {stride} apart"
    );
    let needs = if rows == 0 || columns == 0 { 0 } else { (rows - 1) * stride + columns };
    assert!(
        len >= needs,
        "{function}: {name} has {len} elements, needs {needs} ({rows} rows of {columns}, {stride} apart)"
    );
}

/// Makes room for so many bytes.
fn grow(lines: &mut Vec<Line>, bytes: usize) {
    let count = bytes / size_of::<Line>();
    if lines.len() < count {
        lines.reserve_exact(count - lines.len());
        lines.resize(count, Line([0.0; GRANULE]));
    }
}

fn as_floats(lines: &[Line]) -> &[f32] {
    // SAFETY: `Line` is repr(C) around [f32; 16], its size 64 equals that of 16 f32 (no padding), and its alignment
    // is larger; the length counts exactly the floats of the slice, whose lifetime is kept.
    unsafe { slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * GRANULE) }
}

fn as_floats_mut(lines: &mut [Line]) -> &mut [f32] {
    // SAFETY: as in `as_floats`; the exclusive borrow is passed on.
    unsafe { slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * GRANULE) }
}

fn as_tiles(lines: &[Line]) -> &[Tile] {
    let count = lines.len() / (size_of::<Tile>() / size_of::<Line>());
    // SAFETY: a `Tile` is sixteen rows of 64 bytes without padding, of the same alignment; all bits are words; the whole
    // tiles lie within the slice, whose lifetime is kept.
    unsafe { slice::from_raw_parts(lines.as_ptr().cast(), count) }
}

fn as_tiles_mut(lines: &mut [Line]) -> &mut [Tile] {
    let count = lines.len() / (size_of::<Tile>() / size_of::<Line>());
    // SAFETY: as in `as_tiles`, and all bits are floats; the exclusive borrow is passed on.
    unsafe { slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), count) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(p: usize, j: usize) -> f32 {
        (1 + p * 1000 + j) as f32
    }

    #[test]
    fn rows_columns_and_iterator_pack_to_the_same_panels() {
        for (k, n) in [(1, 1), (3, 16), (17, 17), (33, 32), (40, 150), (5, 65)] {
            let rows: Vec<f32> = (0..k * n).map(|at| element(at / n, at % n)).collect();
            let columns: Vec<f32> = (0..k * n).map(|at| element(at % k, at / k)).collect();
            let mut by_rows = PackedMatrix::new(k, n);
            by_rows.pack_rows(Simd::PORTABLE, &rows, n);
            let mut by_columns = PackedMatrix::new(k, n);
            by_columns.pack_columns(Simd::PORTABLE, &columns, k);
            let mut by_iterator = PackedMatrix::new(k, n);
            by_iterator.pack_row_iter(Simd::detect(), rows.chunks(n));
            assert_eq!(as_floats(&by_rows.lines), as_floats(&by_columns.lines));
            assert_eq!(as_floats(&by_rows.lines), as_floats(&by_iterator.lines));
            for first in (0..n).step_by(PANEL_COLUMNS) {
                let (panel, width) = by_rows.panel(first);
                for (at, value) in panel.iter().enumerate() {
                    let (p, j) = (at / width, first + at % width);
                    assert_eq!(*value, if j < n { element(p, j) } else { 0.0 });
                }
            }
        }
    }

    #[test]
    fn repacking_the_same_shape_keeps_the_memory() {
        let mut right = PackedMatrix::new(70, 50);
        let mut left = PackedLeft::new(70, 50);
        let (right_start, left_start) = (right.lines.as_ptr(), left.lines.as_ptr());
        right.reshape(50, 64);
        left.reshape(60, 58);
        assert_eq!((right.lines.as_ptr(), left.lines.as_ptr()), (right_start, left_start));
    }

    #[test]
    #[should_panic(expected = "pack_rows: b has 5 elements, needs 6 (2 rows of 3, 3 apart)")]
    fn a_short_source_is_named() {
        PackedMatrix::new(2, 3).pack_rows(Simd::PORTABLE, &[0.0; 5], 3);
    }
}
