//! Matrix products whose every element is summed in one fixed order.
//!
//! The order: k is cut into blocks of [`K_BLOCK`]; within a block, element (r, j) is one chain of fused
//! multiply-adds, `acc = fma(a[r, p], b[p, j], acc)` from `acc = 0`, p ascending; then `c = acc` (the first block of a
//! product that starts from zero) or `c = before + acc`, where `before` is the [`Start`] or the sum of the blocks before.
//! Rows and columns share loads, never sums: an element depends on its own row of A, its own column of B and k, whatever
//! the number of rows, the tile, the thread or the SIMD level.
//! That is the row rule. A general-purpose GEMM does not give it: such libraries take k blocks from the cache size and
//! switch algorithm at one row.
//!
//! That is the order in f32. A product with a matrix that is packed in bf16 has the order of [`bf16`], which
//! gives the row rule as well.

use std::ptr;

use super::bf16;
use super::micro::{self, Ahead, Tile};
use super::pack::{PANEL_COLUMNS, PANEL_ROWS, PackedLeft, PackedMatrix, assert_extent};
use super::simd::Simd;
use protocol::job::Precision;

/// Length of the blocks of k. A constant of the results' bits, not a tuning parameter: changing it changes every
/// trained model. 256 · 32 columns · 4 bytes = 32 KiB, a panel's block fits the first-level cache.
pub const K_BLOCK: usize = 256;

/// Elements of B from which on it is fetched ahead of its use: 1 MiB, which the second-level cache does not keep beside all
/// else. Changes no bit.
const STREAMED: usize = 1 << 18;

/// What a product is added to.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// Nothing: `c = a·b`.
    Zero,
    /// What C holds: `c += a·b`.
    Kept,
    /// For every row of C the same `[n]`.
    Row(&'a [f32]),
    /// For row r of C the row `tokens[r]` of a table `[V][n]`.
    Table {
        /// `[V][n]`.
        table: &'a [f32],
        /// `[m]`, below V.
        tokens: &'a [u32],
    },
}

/// Rows that go through all panels of B before the next rows do: their block of A, 120 KiB, stays in the second-level
/// cache. Changes no bit.
const ROW_BLOCK: usize = 120;

/// `c[m, n] = start + a[m, k] · b[k, n]`
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `a` | `[m, k]`, rows `lda` apart | in | |
/// | `b` | `[k, n]` packed | in | gives k and n |
/// | `c` | `[m, n]`, rows `ldc` apart | out, in if that is the start | elements between the rows are left alone |
/// | `start` | see [`Start`] | in | |
///
/// Cost: 2·m·n·k FLOPs; B is read once per K_BLOCK and tile row from the second-level cache, A once per panel.
/// Numerics: see the module. Runs on the calling thread; callers split rows over threads.
/// Reference: `chain` in this file's tests.
///
/// # Panics
/// If a slice is shorter than its shape, or a token is not below V.
#[allow(clippy::too_many_arguments)] // the field's order of arguments, known to every reader of a GEMM
pub fn gemm(
    simd: Simd,
    m: usize,
    a: &[f32],
    lda: usize,
    b: &PackedMatrix,
    c: &mut [f32],
    ldc: usize,
    start: Start<'_>,
) {
    assert_extent("gemm", "a", a.len(), m, b.k(), lda);
    assert_extent("gemm", "c", c.len(), m, b.n(), ldc);
    start.check(m, b.n());
    if b.precision() == Precision::Bf16 && b.k() > 0 {
        return bf16::product::product(simd, m, bf16::product::Left::Rows(a, lda), b, c, ldc, start);
    }
    let height = even_height(m, micro::tallest_tile(simd));
    let left = |first_row, p| {
        let rows = height.rows_from(first_row);
        (rows, Left { a: a[first_row * lda + p..].as_ptr(), a_stride: lda, a_is_panel: false })
    };
    if b.k() * b.n() >= STREAMED {
        product::<true>(simd, m, b, c, ldc, start, left);
    } else {
        product::<false>(simd, m, b, c, ldc, start, left);
    }
}

/// `c[m, n] (+)= Σ_k a[k, m] · b[k, n]`: the weight gradient of the k = (step, row) pairs of a shard, in the order
/// they were packed.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `a` | `[k, m]` packed | in | gives m |
/// | `b` | `[k, n]` packed | in | same k |
/// | `c` | `[m, n]`, rows `ldc` apart | out, in if `accumulate` | |
///
/// Cost, numerics and reference as [`gemm`]; the sum over k is the sum rule's, so k must list the rows in shard order.
///
/// # Panics
/// If the two k differ or `c` is shorter than its shape.
pub fn gemm_transposed(
    simd: Simd,
    a: &PackedLeft,
    b: &PackedMatrix,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
) {
    assert!(a.k() == b.k(), "gemm_transposed: a has k = {}, b has k = {}", a.k(), b.k());
    assert_extent("gemm_transposed", "c", c.len(), a.m(), b.n(), ldc);
    let start = if accumulate { Start::Kept } else { Start::Zero };
    assert!(
        a.precision() == b.precision(),
        "gemm_transposed: a is {}, b is {}",
        a.precision(),
        b.precision()
    );
    if b.precision() == Precision::Bf16 && b.k() > 0 {
        return bf16::product::product(simd, a.m(), bf16::product::Left::Packed(a), b, c, ldc, start);
    }
    let tallest = micro::tallest_tile(simd);
    product::<false>(simd, a.m(), b, c, ldc, start, |first_row, p| {
        // A tile stays within its panel of 12 rows; the lower levels take a panel in several tiles.
        let within = first_row % PANEL_ROWS;
        let rows = tallest.min(PANEL_ROWS - within).min(a.m() - first_row);
        let panel = &a.panel(first_row - within)[p * PANEL_ROWS + within..];
        (rows, Left { a: panel.as_ptr(), a_stride: 0, a_is_panel: true })
    });
}

impl<'a> Start<'a> {
    fn check(self, m: usize, n: usize) {
        match self {
            Start::Zero | Start::Kept => {}
            Start::Row(row) => {
                assert!(row.len() >= n, "gemm: the start has {} elements, needs {n}", row.len())
            }
            Start::Table { table, tokens } => {
                assert!(tokens.len() >= m, "gemm: {} tokens, needs {m}", tokens.len());
                let largest = tokens[..m].iter().max().map_or(0, |&token| (token as usize + 1) * n);
                assert!(
                    table.len() >= largest,
                    "gemm: the table has {} elements, needs {largest}",
                    table.len()
                );
            }
        }
    }

    /// What row r starts from, if it is neither zero nor in C.
    #[inline(always)]
    fn row(self, r: usize, n: usize) -> Option<&'a [f32]> {
        match self {
            Start::Zero | Start::Kept => None,
            Start::Row(row) => Some(&row[..n]),
            Start::Table { table, tokens } => Some(&table[tokens[r] as usize * n..][..n]),
        }
    }
}

/// Where the left operand of a tile starts.
struct Left {
    a: *const f32,
    a_stride: usize,
    a_is_panel: bool,
}

/// The loops around the micro-kernel. B is fetched ahead of its use if it `IS_STREAMED`. `left(first_row, p)` tells how
/// many rows the tile at `first_row` has and where its A starts at k = p; the slices behind its pointers hold those rows
/// for all k.
#[inline(always)]
fn product<const IS_STREAMED: bool>(
    simd: Simd,
    m: usize,
    b: &PackedMatrix,
    c: &mut [f32],
    ldc: usize,
    start: Start<'_>,
    left: impl Fn(usize, usize) -> (usize, Left),
) {
    let (k, n) = (b.k(), b.n());
    if n == 0 {
        return;
    }
    if k == 0 && !matches!(start, Start::Kept) {
        for row in 0..m {
            let c = &mut c[row * ldc..][..n];
            match start.row(row, n) {
                Some(start) => c.copy_from_slice(start),
                None => c.fill(0.0),
            }
        }
    }
    // One pointer from which all others come: tiles read and write C through it.
    let c = c.as_mut_ptr();
    for p in (0..k).step_by(K_BLOCK) {
        let depth = K_BLOCK.min(k - p);
        let mut first_of_block = 0;
        while first_of_block < m {
            // What each row of the block is added to, from its first column on.
            let mut before = [ptr::null::<f32>(); ROW_BLOCK + PANEL_ROWS];
            let has_before = p > 0 || !matches!(start, Start::Zero);
            for (at, before) in before.iter_mut().enumerate().take(m - first_of_block) {
                let row = first_of_block + at;
                *before = match start.row(row, n).filter(|_| p == 0) {
                    Some(start) => start.as_ptr(),
                    None => c.wrapping_add(row * ldc).cast_const(),
                };
            }
            // The tiles of a panel share the fetching of the next one.
            let tiles = ROW_BLOCK.min(m - first_of_block).div_ceil(micro::tallest_tile(simd));
            let mut first_row = first_of_block;
            for first_column in (0..n).step_by(PANEL_COLUMNS) {
                let (panel, width) = b.panel(first_column);
                let block = &panel[p * width..][..depth * width];
                let mut ahead = Ahead {
                    // The next panel's part of the same rows; behind the last one, nothing of use.
                    first: block.as_ptr_range().end.wrapping_add((k - depth) * width),
                    len: if IS_STREAMED { block.len().div_ceil(tiles) } else { 0 },
                };
                first_row = first_of_block;
                while first_row < m && first_row < first_of_block + ROW_BLOCK {
                    let (rows, Left { a, a_stride, a_is_panel }) = left(first_row, p);
                    let tile = Tile {
                        k: depth,
                        a,
                        a_stride,
                        a_is_panel,
                        b: block.as_ptr(),
                        width,
                        c: c.wrapping_add(first_row * ldc + first_column),
                        c_stride: ldc,
                        first_column,
                        columns: width.min(n - first_column),
                        before: has_before.then(|| before[first_row - first_of_block..].as_ptr()),
                        ahead,
                    };
                    // SAFETY: `assert_extent` in the callers covers rows first_row..first_row + rows <= m of A and C up
                    // to k and n, p + depth <= k and first_column + columns <= n; `block` has depth · width elements,
                    // each row of `before`, of which the block's rows and a tile more are there, n; C is borrowed
                    // exclusively, so it overlaps neither A nor B, and of the starts only its own rows.
                    unsafe { micro::compute::<IS_STREAMED>(simd, rows, &tile) };
                    first_row += rows;
                    ahead.first = ahead.first.wrapping_add(ahead.len);
                }
            }
            first_of_block = first_row;
        }
    }
}

/// Cuts m rows into the fewest tiles of at most `tallest` rows, and those as equal as they can be: 32 rows are
/// 11 + 11 + 10, not 12 + 12 + 8, because a short tile leaves the multipliers idle.
fn even_height(m: usize, tallest: usize) -> EvenHeight {
    let tiles = m.div_ceil(tallest).max(1);
    EvenHeight { base: m / tiles, taller: m % tiles }
}

struct EvenHeight {
    base: usize,
    /// The first so many tiles have one row more.
    taller: usize,
}

impl EvenHeight {
    fn rows_from(&self, first_row: usize) -> usize {
        self.base + usize::from(first_row < self.taller * (self.base + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Numbers in [-1, 1) from a counter: the tests need variety, not randomness.
    fn numbers(len: usize, salt: u32) -> Vec<f32> {
        (0..len as u32)
            .map(|at| {
                let mixed = (at ^ salt.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
                let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0xc2b2_ae35);
                (mixed ^ (mixed >> 13)) as f32 / 2f32.powi(31) - 1.0
            })
            .collect()
    }

    /// The definition: k blocks of chains. `c` is the starting value when accumulating.
    fn chain(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: Option<&[f32]>) -> Vec<f32> {
        let mut result = vec![0.0; m * n];
        for at in 0..m * n {
            let (row, j) = (at / n, at % n);
            let mut total = c.map(|c| c[at]);
            for block in (0..k).step_by(K_BLOCK) {
                let mut acc = 0.0f32;
                for p in block..k.min(block + K_BLOCK) {
                    acc = a[row * k + p].mul_add(b[p * n + j], acc);
                }
                total = Some(total.map_or(acc, |total| total + acc));
            }
            result[at] = total.unwrap_or(0.0);
        }
        result
    }

    fn transpose(rows: usize, columns: usize, x: &[f32]) -> Vec<f32> {
        (0..rows * columns).map(|at| x[at % rows * columns + at / rows]).collect()
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn every_level_equals_the_chain_bit_for_bit_on_odd_shapes() {
        let mut largest = 0.0f64;
        for m in [1, 7, 13, 33, 150] {
            for n in [1, 16, 33, 65, 150] {
                for k in [1, 7, 255, 256, 257, 600] {
                    let (a, b, c) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * n, 3));
                    let mut packed = PackedMatrix::new(k, n);
                    packed.pack_rows(Simd::detect(), &b, n);
                    let mut left = PackedLeft::new(k, m);
                    let a_transposed = transpose(m, k, &a);
                    left.pack_row_iter(Simd::detect(), a_transposed.chunks(m));
                    for accumulate in [false, true] {
                        let want = chain(m, n, k, &a, &b, accumulate.then_some(&c[..]));
                        for simd in Simd::available() {
                            let start = if accumulate { c.clone() } else { vec![f32::NAN; m * n] };
                            let mut got = start.clone();
                            let start_of_c = if accumulate { Start::Kept } else { Start::Zero };
                            gemm(simd, m, &a, k, &packed, &mut got, n, start_of_c);
                            assert_eq!(bits(&got), bits(&want), "{simd} m {m} n {n} k {k} {accumulate}");
                            let mut got = start;
                            gemm_transposed(simd, &left, &packed, &mut got, n, accumulate);
                            assert_eq!(bits(&got), bits(&want), "{simd} transposed m {m} n {n} k {k}");
                        }
                        for at in 0..m * n {
                            let (row, j) = (at / n, at % n);
                            let dot: f64 =
                                (0..k).map(|p| f64::from(a[row * k + p]) * f64::from(b[p * n + j])).sum();
                            let exact = dot + if accumulate { f64::from(c[at]) } else { 0.0 };
                            largest = largest.max((f64::from(want[at]) - exact).abs() / (k as f64).sqrt());
                        }
                    }
                }
            }
        }
        println!("gemm against f64: largest difference / sqrt(k) {largest:.3e}");
        assert!(largest < 2e-6);
    }

    #[test]
    fn a_product_that_is_fetched_ahead_equals_the_chain_too() {
        let (n, k) = (450, 600);
        assert!(n * k > STREAMED);
        let b = numbers(k * n, 2);
        let mut packed = PackedMatrix::new(k, n);
        packed.pack_rows(Simd::detect(), &b, n);
        for m in [1, 13, 130] {
            let (a, c) = (numbers(m * k, 1), numbers(m * n, 3));
            let want = chain(m, n, k, &a, &b, Some(&c));
            for simd in Simd::available() {
                let mut got = c.clone();
                gemm(simd, m, &a, k, &packed, &mut got, n, Start::Kept);
                assert_eq!(bits(&got), bits(&want), "{simd} m {m}");
            }
        }
    }

    #[test]
    fn a_start_elsewhere_gives_the_bits_of_a_start_in_c() {
        for (m, n, k) in [(1, 3, 5), (13, 65, 300), (30, 150, 150)] {
            let (a, b, table) = (numbers(m * k, 1), numbers(k * n, 2), numbers(4 * n, 3));
            let tokens: Vec<u32> = (0..m as u32).map(|row| row * 7 % 4).collect();
            let mut packed = PackedMatrix::new(k, n);
            packed.pack_rows(Simd::detect(), &b, n);
            for simd in Simd::available() {
                let gathered = tokens.iter().flat_map(|&token| &table[token as usize * n..][..n]);
                let mut want: Vec<f32> = gathered.copied().collect();
                gemm(simd, m, &a, k, &packed, &mut want, n, Start::Kept);
                let mut got = vec![f32::NAN; m * n];
                gemm(simd, m, &a, k, &packed, &mut got, n, Start::Table { table: &table, tokens: &tokens });
                assert_eq!(bits(&got), bits(&want));
                let mut want = table[..n].repeat(m);
                gemm(simd, m, &a, k, &packed, &mut want, n, Start::Kept);
                gemm(simd, m, &a, k, &packed, &mut got, n, Start::Row(&table[..n]));
                assert_eq!(bits(&got), bits(&want));
            }
        }
    }

    #[test]
    #[should_panic(expected = "gemm: the table has 8 elements, needs 12")]
    fn a_token_past_the_table_is_named() {
        let start = Start::Table { table: &[0.0; 8], tokens: &[1, 2] };
        gemm(Simd::PORTABLE, 2, &[0.0; 2], 1, &PackedMatrix::new(1, 4), &mut [0.0; 8], 4, start);
    }

    #[test]
    fn strides_leave_the_elements_between_rows_alone() {
        let (m, n, k, lda, ldc) = (5, 20, 9, 12, 23);
        let (a, b) = (numbers(m * lda, 4), numbers(k * n, 5));
        let mut packed = PackedMatrix::new(k, n);
        packed.pack_rows(Simd::detect(), &b, n);
        let dense: Vec<f32> = a.chunks(lda).flat_map(|row| &row[..k]).copied().collect();
        let want = chain(m, n, k, &dense, &b, None);
        for simd in Simd::available() {
            let mut c = vec![7.0; m * ldc];
            gemm(simd, m, &a, lda, &packed, &mut c, ldc, Start::Zero);
            for (row, want) in c.chunks(ldc).zip(want.chunks(n)) {
                assert_eq!(&row[..n], want);
                assert_eq!(&row[n..], [7.0; 3]);
            }
        }
    }

    #[test]
    fn nan_and_infinity_reach_exactly_the_rows_they_belong_to() {
        let (m, n, k) = (9, 40, 30);
        let mut a = numbers(m * k, 6);
        a[4 * k + 7] = f32::NAN;
        let mut packed = PackedMatrix::new(k, n);
        packed.pack_rows(Simd::detect(), &numbers(k * n, 7), n);
        for simd in Simd::available() {
            let mut c = vec![0.0; m * n];
            gemm(simd, m, &a, k, &packed, &mut c, n, Start::Zero);
            for (row, values) in c.chunks(n).enumerate() {
                assert!(values.iter().all(|value| value.is_nan() == (row == 4)));
            }
        }
    }

    #[test]
    fn an_empty_k_clears_or_keeps() {
        let packed = PackedMatrix::new(0, 3);
        let mut c = vec![1.0; 6];
        gemm(Simd::detect(), 2, &[], 0, &packed, &mut c, 3, Start::Kept);
        assert_eq!(c, [1.0; 6]);
        gemm(Simd::detect(), 2, &[], 0, &packed, &mut c, 3, Start::Zero);
        assert_eq!(c, [0.0; 6]);
        gemm(Simd::detect(), 2, &[], 0, &packed, &mut c, 3, Start::Row(&[1.0, 2.0, 3.0]));
        assert_eq!(c, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    #[should_panic(expected = "gemm: a has 31 elements, needs 32 (1 rows of 32, 32 apart)")]
    fn a_short_operand_is_named() {
        gemm(Simd::PORTABLE, 1, &[0.0; 31], 32, &PackedMatrix::new(32, 4), &mut [0.0; 4], 4, Start::Zero);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn any_grouping_of_rows_gives_the_same_bits(
            cuts in prop::collection::vec(1usize..40, 1..6),
            n in 1usize..100,
            k in 1usize..400,
        ) {
            let m: usize = cuts.iter().sum();
            let (a, b) = (numbers(m * k, 8), numbers(k * n, 9));
            let mut packed = PackedMatrix::new(k, n);
            packed.pack_rows(Simd::detect(), &b, n);
            for simd in Simd::available() {
                let mut whole = vec![f32::NAN; m * n];
                gemm(simd, m, &a, k, &packed, &mut whole, n, Start::Zero);
                let mut first = 0;
                for rows in cuts.iter().copied().chain([0]) {
                    let mut part = vec![f32::NAN; rows * n];
                    gemm(simd, rows, &a[first * k..], k, &packed, &mut part, n, Start::Zero);
                    prop_assert_eq!(bits(&part), bits(&whole[first * n..(first + rows) * n]));
                    first += rows;
                }
                for row in 0..m {
                    let mut alone = vec![f32::NAN; n];
                    gemm(simd, 1, &a[row * k..], k, &packed, &mut alone, n, Start::Zero);
                    prop_assert_eq!(bits(&alone), bits(&whole[row * n..(row + 1) * n]));
                }
            }
        }
    }
}
