//! Packed operands of the GEMM: the copies whose layout the micro-kernels stream through.
//!
//! Both formats are the same at every SIMD level. Packing moves numbers and computes none.

use std::slice;

/// Columns of a full panel of [`PackedMatrix`].
pub const PANEL_COLUMNS: usize = 32;
/// Rows of a panel of [`PackedLeft`], and the tallest tile of the micro-kernels.
pub const PANEL_ROWS: usize = 12;
/// The granule of a panel's width: one AVX-512 register of f32.
const GRANULE: usize = 16;

/// One cache line, so that no vector load of a panel straddles two.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f32; GRANULE]);

/// The right-hand side `B[k, n]` of a product, in panels of 32 columns.
///
/// Layout `[panel][k][width]`: width is 32, of the last panel 16 if that is enough; missing columns are zeros.
/// Repacking a matrix of the same or a smaller size allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct PackedMatrix {
    k: usize,
    n: usize,
    lines: Vec<Line>,
}

impl PackedMatrix {
    /// Zeros of shape `[k, n]`.
    pub fn new(k: usize, n: usize) -> PackedMatrix {
        let mut packed = PackedMatrix::default();
        packed.reset(k, n);
        packed
    }

    /// Zeros of shape `[k, n]` in the memory already held, if it is enough.
    pub fn reset(&mut self, k: usize, n: usize) {
        (self.k, self.n) = (k, n);
        self.lines.clear();
        self.lines.resize(k * n.div_ceil(GRANULE), Line([0.0; GRANULE]));
    }

    /// Bytes of a matrix of shape `[k, n]`, with the padding.
    pub fn bytes_of(k: usize, n: usize) -> usize {
        k * n.div_ceil(GRANULE) * size_of::<Line>()
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
    pub fn pack_rows(&mut self, b: &[f32], ldb: usize) {
        assert_extent("pack_rows", "b", b.len(), self.k, self.n, ldb);
        for p in 0..self.k {
            self.set_row(p, &b[p * ldb..][..self.n]);
        }
    }

    /// Fills from `rows`, which yields the k rows of B, each of n elements.
    pub fn pack_row_iter<'a>(&mut self, rows: impl Iterator<Item = &'a [f32]>) {
        let mut count = 0;
        for row in rows {
            assert!(count < self.k, "pack_row_iter: more than k = {} rows", self.k);
            assert!(row.len() == self.n, "pack_row_iter: row has {} elements, needs {}", row.len(), self.n);
            self.set_row(count, row);
            count += 1;
        }
        assert!(count == self.k, "pack_row_iter: {count} rows, needs k = {}", self.k);
    }

    /// Fills from the transpose: `b` is row-major `[n, k]` with `ldb` elements from row to row, as PyTorch stores
    /// weights.
    pub fn pack_columns(&mut self, b: &[f32], ldb: usize) {
        assert_extent("pack_columns", "b", b.len(), self.n, self.k, ldb);
        let k = self.k;
        for first_column in (0..self.n).step_by(PANEL_COLUMNS) {
            let columns = PANEL_COLUMNS.min(self.n - first_column);
            let (start, width) = self.panel_place(first_column);
            let panel = &mut as_floats_mut(&mut self.lines)[start..start + k * width];
            // Sixteen k at a time: the block of the panel being written stays in the first-level cache.
            for p0 in (0..k).step_by(GRANULE) {
                let depth = GRANULE.min(k - p0);
                for j in 0..columns {
                    let source = &b[(first_column + j) * ldb + p0..][..depth];
                    for (p, value) in source.iter().enumerate() {
                        panel[(p0 + p) * width + j] = *value;
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

    fn set_row(&mut self, p: usize, row: &[f32]) {
        let (panels, rest) = row.as_chunks::<PANEL_COLUMNS>();
        let data = as_floats_mut(&mut self.lines);
        for (panel, values) in panels.iter().enumerate() {
            let start = (panel * self.k + p) * PANEL_COLUMNS;
            data[start..start + PANEL_COLUMNS].copy_from_slice(values);
        }
        if !rest.is_empty() {
            let (start, width) = self.panel_place(panels.len() * PANEL_COLUMNS);
            as_floats_mut(&mut self.lines)[start + p * width..][..rest.len()].copy_from_slice(rest);
        }
    }

    fn panel_place(&self, first_column: usize) -> (usize, usize) {
        let width = if self.n - first_column > GRANULE { PANEL_COLUMNS } else { GRANULE };
        (first_column * self.k, width)
    }
}

/// The transposed left-hand side of a weight gradient: `A[k, m]`, used as `Aᵀ`, in panels of 12 of its columns.
///
/// Layout `[panel][k][12]`; missing columns of the last panel are zeros. Repacking a matrix of the same or a smaller
/// size allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct PackedLeft {
    k: usize,
    m: usize,
    data: Vec<f32>,
}

impl PackedLeft {
    /// Zeros of shape `[k, m]`.
    pub fn new(k: usize, m: usize) -> PackedLeft {
        let mut packed = PackedLeft::default();
        packed.reset(k, m);
        packed
    }

    /// Zeros of shape `[k, m]` in the memory already held, if it is enough.
    pub fn reset(&mut self, k: usize, m: usize) {
        (self.k, self.m) = (k, m);
        self.data.clear();
        self.data.resize(k * m.next_multiple_of(PANEL_ROWS), 0.0);
    }

    /// Bytes of a matrix of shape `[k, m]`, with the padding.
    pub fn bytes_of(k: usize, m: usize) -> usize {
        k * m.next_multiple_of(PANEL_ROWS) * size_of::<f32>()
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
    pub fn pack_row_iter<'a>(&mut self, rows: impl Iterator<Item = &'a [f32]>) {
        let stride = self.k * PANEL_ROWS;
        let mut count = 0;
        for row in rows {
            assert!(count < self.k, "pack_row_iter: more than k = {} rows", self.k);
            assert!(row.len() == self.m, "pack_row_iter: row has {} elements, needs {}", row.len(), self.m);
            // Whole panels apart from the rest: a copy of a constant length is three moves, any other is a call.
            let (panels, rest) = row.as_chunks::<PANEL_ROWS>();
            let mut start = count * PANEL_ROWS;
            for values in panels {
                self.data[start..start + PANEL_ROWS].copy_from_slice(values);
                start += stride;
            }
            if !rest.is_empty() {
                self.data[start..start + rest.len()].copy_from_slice(rest);
            }
            count += 1;
        }
        assert!(count == self.k, "pack_row_iter: {count} rows, needs k = {}", self.k);
    }

    /// The panel that starts at column `first` (a multiple of 12) of A: elements `[k][12]`.
    pub(crate) fn panel(&self, first: usize) -> &[f32] {
        &self.data[first * self.k..][..self.k * PANEL_ROWS]
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

fn as_floats(lines: &[Line]) -> &[f32] {
    // SAFETY: `Line` is repr(C) around [f32; 16], its size 64 equals that of 16 f32 (no padding), and its alignment
    // is larger; the length counts exactly the floats of the slice, whose lifetime is kept.
    unsafe { slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * GRANULE) }
}

fn as_floats_mut(lines: &mut [Line]) -> &mut [f32] {
    // SAFETY: as in `as_floats`; the exclusive borrow is passed on.
    unsafe { slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * GRANULE) }
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
            by_rows.pack_rows(&rows, n);
            let mut by_columns = PackedMatrix::new(k, n);
            by_columns.pack_columns(&columns, k);
            let mut by_iterator = PackedMatrix::new(k, n);
            by_iterator.pack_row_iter(rows.chunks(n));
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
        let (right_start, left_start) = (right.lines.as_ptr(), left.data.as_ptr());
        right.reset(50, 64);
        left.reset(60, 58);
        assert_eq!((right.lines.as_ptr(), left.data.as_ptr()), (right_start, left_start));
    }

    #[test]
    #[should_panic(expected = "pack_rows: b has 5 elements, needs 6 (2 rows of 3, 3 apart)")]
    fn a_short_source_is_named() {
        PackedMatrix::new(2, 3).pack_rows(&[0.0; 5], 3);
    }
}
