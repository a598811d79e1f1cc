//! The GEMM's inner loops: one tile of C, kept in registers over one block of k.
//!
//! Every path computes, for each element of the tile, `acc = 0; for p in 0..k { acc = fma(a[p], b[p], acc) }`, then
//! `c = acc` or `c = before + acc`. How many rows and columns a tile has changes no element's bits.

use super::pack::PANEL_ROWS;
use super::simd::{Simd, SimdLevel};

/// One tile's operands. The pointers were checked by the driver in `gemm.rs`.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Length of this block of k.
    pub k: usize,
    /// First element of A. Rows `a_stride` apart and k contiguous, or a panel of `PackedLeft`.
    pub a: *const f32,
    /// Elements from row to row of A; unused for a panel.
    pub a_stride: usize,
    /// Whether A is a panel `[k][12]` of `PackedLeft`.
    pub a_is_panel: bool,
    /// First element of the panel's block `[k][width]` of B.
    pub b: *const f32,
    /// 16 or 32.
    pub width: usize,
    /// First element of the tile of C.
    pub c: *mut f32,
    /// Elements from row to row of C.
    pub c_stride: usize,
    /// Columns of C that exist, 1 to `width`.
    pub columns: usize,
    /// Column of C at which the tile begins.
    pub first_column: usize,
    /// What is added: for each row of the tile where the whole row begins. Without it C is overwritten.
    pub before: Option<*const *const f32>,
    /// What to fetch meanwhile for the tiles behind this one, where they read so much that this is worth it.
    pub ahead: Ahead,
}

/// A part of B that is to be in the second-level cache when tiles come to it. The hardware fetches ahead too, but no further
/// than a page, and where B comes from the third-level cache each page begins with a wait. A hint: changes no bit, and a
/// level may ignore it.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Where it begins. Nothing is read, so it need not be readable.
    pub first: *const f32,
    /// Its length in elements.
    pub len: usize,
}

/// Rows of the tallest tile of a level.
pub(super) fn tallest_tile(simd: Simd) -> usize {
    match simd.level() {
        SimdLevel::Amx | SimdLevel::Avx512 => 12,
        SimdLevel::Avx2 => 6,
        SimdLevel::Portable => 4,
    }
}

/// Computes `rows` (1 to [`tallest_tile`]) rows of a tile, fetching `tile.ahead` meanwhile if it `IS_STREAMED`.
///
/// # Safety
/// `tile.a` must be readable at every (row, p) of the tile, `tile.b` for `k · width` elements, `tile.before` at every
/// (row, column), and `tile.c` writable there; C overlaps neither A nor B.
pub(super) unsafe fn compute<const IS_STREAMED: bool>(simd: Simd, rows: usize, tile: &Tile) {
    debug_assert!(1 <= rows && rows <= tallest_tile(simd));
    debug_assert!(tile.width == 16 || tile.width == 32);
    debug_assert!(1 <= tile.columns && tile.columns <= tile.width);
    match simd.level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: these levels are only built where avx512f was detected; the pointers are the caller's promise.
        SimdLevel::Amx | SimdLevel::Avx512 => unsafe { x86::avx512::<IS_STREAMED>(rows, tile) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this level is only built where avx2 and fma were detected; the pointers are the caller's promise.
        SimdLevel::Avx2 => unsafe { x86::avx2(rows, tile) },
        // SAFETY: the pointers are the caller's promise.
        _ => unsafe { portable(rows, tile) },
    }
}

/// Element (row, p) of A.
///
/// # Safety
/// As for [`compute`].
#[inline(always)]
unsafe fn left<const PANEL: bool>(tile: &Tile, row: usize, p: usize) -> *const f32 {
    // SAFETY: the caller promises that (row, p) lies in A.
    unsafe { if PANEL { tile.a.add(p * PANEL_ROWS + row) } else { tile.a.add(row * tile.a_stride + p) } }
}

/// Plain Rust: the definition of the result, and the path of other architectures.
///
/// # Safety
/// As for [`compute`].
unsafe fn portable(rows: usize, tile: &Tile) {
    const COLUMNS: usize = 16;
    for first in (0..tile.columns).step_by(COLUMNS) {
        let columns = COLUMNS.min(tile.columns - first);
        let mut acc = [[0.0f32; COLUMNS]; 4];
        for p in 0..tile.k {
            // SAFETY: p < k and first + 16 <= width, so the sixteen floats lie in the panel's block of B.
            let b = unsafe { &*tile.b.add(p * tile.width + first).cast::<[f32; COLUMNS]>() };
            for row in 0..rows {
                // SAFETY: row and p lie in the tile.
                let a = unsafe {
                    if tile.a_is_panel { *left::<true>(tile, row, p) } else { *left::<false>(tile, row, p) }
                };
                for j in 0..COLUMNS {
                    acc[row][j] = a.mul_add(b[j], acc[row][j]);
                }
            }
        }
        for row in 0..rows {
            for j in 0..columns {
                // SAFETY: row < rows and first + j < tile.columns, so the element lies in the tile of C.
                unsafe {
                    let value = match tile.before {
                        Some(before) => *(*before.add(row)).add(tile.first_column + first + j) + acc[row][j],
                        None => acc[row][j],
                    };
                    *tile.c.add(row * tile.c_stride + first + j) = value;
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::pack::PANEL_ROWS;
    use super::{Ahead, Tile};
    use std::arch::asm;
    use std::arch::x86_64::*;

    /// Calls `$function::<rows, ..$constants>(tile)` with `rows` turned into a constant.
    macro_rules! by_rows {
        ($rows:expr, [$($count:literal)*], $function:ident, $constants:tt, $tile:expr) => {
            match $rows {
                // SAFETY: the caller has the target features and promises the pointers.
                $($count => unsafe { with_rows!($function, $count, $constants)($tile) },)*
                other => unreachable!("no micro-kernel of {other} rows"),
            }
        };
    }

    /// A macro of its own, because one cannot repeat its constants for each number of rows.
    macro_rules! with_rows {
        ($function:ident, $count:literal, [$($constant:tt),*]) => { $function::<$count, $($constant),*> };
    }

    /// # Safety
    /// As for [`super::compute`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512<const IS_STREAMED: bool>(rows: usize, tile: &Tile) {
        match (tile.width, tile.a_is_panel) {
            (32, false) => {
                by_rows!(rows, [1 2 3 4 5 6 7 8 9 10 11 12], avx512_tile, [2, false, IS_STREAMED], tile)
            }
            (32, true) => by_rows!(rows, [1 2 3 4 5 6 7 8 9 10 11 12], avx512_tile, [2, true, false], tile),
            (_, false) => by_rows!(rows, [1 2 3 4 5 6 7 8 9 10 11 12], avx512_tile, [1, false, false], tile),
            (_, true) => by_rows!(rows, [1 2 3 4 5 6 7 8 9 10 11 12], avx512_tile, [1, true, false], tile),
        }
    }

    /// Steps of k between two advances of the pointers: within them every address is a register and a constant.
    const UNROLL: usize = 4;

    /// Where a tile reads A: one pointer for three rows, which reach from it at the scales that an address can have
    /// (0, 1 and 2 strides), so that no instruction of the inner loop computes an address. A panel needs only one.
    #[derive(Clone, Copy)]
    struct LeftRows<const PANEL: bool> {
        firsts: [*const f32; 4],
        stride: usize,
    }

    impl<const PANEL: bool> LeftRows<PANEL> {
        #[inline(always)]
        fn of(tile: &Tile) -> Self {
            let first = |third: usize| tile.a.wrapping_add(if PANEL { 0 } else { 3 * third * tile.a_stride });
            Self { firsts: std::array::from_fn(first), stride: tile.a_stride }
        }

        /// Element (row, ahead) from where the pointers stand.
        #[inline(always)]
        fn at(&self, row: usize, ahead: usize) -> *const f32 {
            if PANEL {
                self.firsts[0].wrapping_add(ahead * PANEL_ROWS + row)
            } else {
                self.firsts[row / 3].wrapping_add(row % 3 * self.stride + ahead)
            }
        }

        /// Moves on by so many steps of k.
        #[inline(always)]
        #[allow(clippy::pointers_in_nomem_asm_block)] // there is no instruction in it
        fn advance(&mut self, steps: usize) {
            let elements = if PANEL { steps * PANEL_ROWS } else { steps };
            for first in &mut self.firsts {
                *first = first.wrapping_add(elements);
            }
            let [a, b, c, d] = &mut self.firsts;
            // SAFETY: no instruction. It only hides where the pointers came from: the compiler would otherwise replace
            // them by one pointer and eleven additions in every step, which take the multipliers' issue slots.
            unsafe {
                asm!(
                    "/* {} {} {} {} */",
                    inout(reg) * a,
                    inout(reg) * b,
                    inout(reg) * c,
                    inout(reg) * d,
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
        }
    }

    /// Asks the memory for what the tile is added to, and for the room where it goes: they come while the loop computes.
    /// The room is asked for as one's own, for it may lie in another core's cache, written there.
    ///
    /// # Safety
    /// As for [`super::compute`].
    #[inline(always)]
    unsafe fn prefetch_outputs<const ROWS: usize, const LINES: usize>(tile: &Tile) {
        for row in 0..ROWS {
            let c = tile.c.wrapping_add(row * tile.c_stride).cast_const();
            for line in 0..LINES {
                // SAFETY: a prefetch reads nothing that the program could see, from any address.
                unsafe {
                    asm!("prefetchw [{}]", in(reg) c.wrapping_add(16 * line), options(nostack, preserves_flags));
                }
            }
            if let Some(before) = tile.before {
                // SAFETY: the caller promises a pointer for every row of the tile.
                let before = unsafe { (*before.add(row)).wrapping_add(tile.first_column) };
                if before != c {
                    for line in 0..LINES {
                        // SAFETY: a prefetch reads nothing that the program could see, from any address.
                        unsafe { _mm_prefetch::<_MM_HINT_T0>(before.wrapping_add(16 * line).cast()) };
                    }
                }
            }
        }
    }

    /// `ROWS` × (16 · `VECTORS`) accumulators: at most 24 of the 32 registers.
    ///
    /// # Safety
    /// As for [`super::compute`].
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512_tile<
        const ROWS: usize,
        const VECTORS: usize,
        const PANEL: bool,
        const IS_STREAMED: bool,
    >(
        tile: &Tile,
    ) {
        // SAFETY: the caller's promise.
        unsafe { prefetch_outputs::<ROWS, VECTORS>(tile) };
        let mut acc = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        let (mut left, mut b) = (LeftRows::<PANEL>::of(tile), tile.b);
        let rounds = tile.k / UNROLL;
        let Ahead { first: mut next, len } = tile.ahead;
        let each_round = if IS_STREAMED { len.div_ceil(rounds.max(1)) } else { 0 };
        for _ in 0..rounds {
            if IS_STREAMED {
                // Two lines, which overlap those of the next round where a round has fewer.
                for line in 0..2 {
                    _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(16 * line).cast());
                }
                next = next.wrapping_add(each_round);
            }
            for ahead in 0..UNROLL {
                // SAFETY: UNROLL steps of k are left, and 16 · VECTORS is the panel's width.
                unsafe { avx512_step(&left, ahead, b.wrapping_add(ahead * 16 * VECTORS), &mut acc) };
            }
            left.advance(UNROLL);
            b = b.wrapping_add(UNROLL * 16 * VECTORS);
        }
        for _ in 0..tile.k % UNROLL {
            // SAFETY: a step of k is left, and 16 · VECTORS is the panel's width.
            unsafe { avx512_step(&left, 0, b, &mut acc) };
            left.advance(1);
            b = b.wrapping_add(16 * VECTORS);
        }
        for vector in 0..VECTORS {
            let columns = tile.columns.saturating_sub(16 * vector).min(16);
            let mask = ((1u32 << columns) - 1) as __mmask16;
            for row in 0..ROWS {
                // SAFETY: the mask leaves only columns below tile.columns, which lie in the tile of C; masked-off
                // lanes are not accessed.
                unsafe {
                    let c = tile.c.wrapping_add(row * tile.c_stride + 16 * vector);
                    let mut value = acc[row][vector];
                    if let Some(before) = tile.before {
                        let before = (*before.add(row)).wrapping_add(tile.first_column + 16 * vector);
                        value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, before), value);
                    }
                    _mm512_mask_storeu_ps(c, mask, value);
                }
            }
        }
    }

    /// One step of k, `ahead` of where `left` stands.
    ///
    /// # Safety
    /// A is readable at every row of this step, B for 16 · VECTORS elements.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512_step<const ROWS: usize, const VECTORS: usize, const PANEL: bool>(
        left: &LeftRows<PANEL>,
        ahead: usize,
        b: *const f32,
        acc: &mut [[__m512; VECTORS]; ROWS],
    ) {
        let mut row_of_b = [_mm512_setzero_ps(); VECTORS];
        for vector in 0..VECTORS {
            // SAFETY: the caller's promise.
            row_of_b[vector] = unsafe { _mm512_loadu_ps(b.add(16 * vector)) };
        }
        for row in 0..ROWS {
            // SAFETY: the caller's promise.
            let a = unsafe { _mm512_set1_ps(*left.at(row, ahead)) };
            for vector in 0..VECTORS {
                acc[row][vector] = _mm512_fmadd_ps(a, row_of_b[vector], acc[row][vector]);
            }
        }
    }

    /// Takes the panel in halves of 16 columns: 6 rows × 2 registers of 8 leave 4 of the 16 registers free.
    ///
    /// # Safety
    /// As for [`super::compute`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(rows: usize, tile: &Tile) {
        for first in (0..tile.columns).step_by(16) {
            let half = Tile {
                b: tile.b.wrapping_add(first),
                c: tile.c.wrapping_add(first),
                first_column: tile.first_column + first,
                columns: (tile.columns - first).min(16),
                ..*tile
            };
            match tile.a_is_panel {
                false => by_rows!(rows, [1 2 3 4 5 6], avx2_tile, [2, false], &half),
                true => by_rows!(rows, [1 2 3 4 5 6], avx2_tile, [2, true], &half),
            }
        }
    }

    /// # Safety
    /// As for [`super::compute`], except that B is read for 16 columns only.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_tile<const ROWS: usize, const VECTORS: usize, const PANEL: bool>(tile: &Tile) {
        const { assert!(VECTORS == 2) };
        // SAFETY: the caller's promise.
        unsafe { prefetch_outputs::<ROWS, 1>(tile) };
        let mut acc = [[_mm256_setzero_ps(); VECTORS]; ROWS];
        let (mut left, mut b) = (LeftRows::<PANEL>::of(tile), tile.b);
        for _ in 0..tile.k / UNROLL {
            for ahead in 0..UNROLL {
                // SAFETY: UNROLL steps of k are left, and sixteen columns of the panel start at b.
                unsafe { avx2_step(&left, ahead, b.wrapping_add(ahead * tile.width), &mut acc) };
            }
            left.advance(UNROLL);
            b = b.wrapping_add(UNROLL * tile.width);
        }
        for _ in 0..tile.k % UNROLL {
            // SAFETY: a step of k is left, and sixteen columns of the panel start at b.
            unsafe { avx2_step(&left, 0, b, &mut acc) };
            left.advance(1);
            b = b.wrapping_add(tile.width);
        }
        for row in 0..ROWS {
            let c = tile.c.wrapping_add(row * tile.c_stride);
            if tile.columns == 16 {
                for vector in 0..2 {
                    // SAFETY: all sixteen columns of this row of C exist.
                    unsafe {
                        let mut value = acc[row][vector];
                        if let Some(before) = tile.before {
                            let before = (*before.add(row)).add(tile.first_column + 8 * vector);
                            value = _mm256_add_ps(_mm256_loadu_ps(before), value);
                        }
                        _mm256_storeu_ps(c.add(8 * vector), value);
                    }
                }
            } else {
                let mut values = [0.0f32; 16];
                // SAFETY: the array holds two registers.
                unsafe {
                    _mm256_storeu_ps(values.as_mut_ptr(), acc[row][0]);
                    _mm256_storeu_ps(values.as_mut_ptr().add(8), acc[row][1]);
                }
                for j in 0..tile.columns {
                    // SAFETY: j < tile.columns, so the element lies in the tile of C.
                    unsafe {
                        *c.add(j) = match tile.before {
                            Some(before) => *(*before.add(row)).add(tile.first_column + j) + values[j],
                            None => values[j],
                        };
                    }
                }
            }
        }
    }

    /// One step of k, `ahead` of where `left` stands.
    ///
    /// # Safety
    /// A is readable at every row of this step, B for 16 elements.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_step<const ROWS: usize, const VECTORS: usize, const PANEL: bool>(
        left: &LeftRows<PANEL>,
        ahead: usize,
        b: *const f32,
        acc: &mut [[__m256; VECTORS]; ROWS],
    ) {
        // SAFETY: the caller's promise.
        let row_of_b = unsafe { [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))] };
        for row in 0..ROWS {
            // SAFETY: the caller's promise.
            let a = unsafe { _mm256_set1_ps(*left.at(row, ahead)) };
            acc[row][0] = _mm256_fmadd_ps(a, row_of_b[0], acc[row][0]);
            acc[row][1] = _mm256_fmadd_ps(a, row_of_b[1], acc[row][1]);
        }
    }
}
