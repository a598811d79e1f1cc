//! A block of C with f32 multiply-adds, in AMX's order: what processors without AMX do.
//!
//! AMX makes every number below the normal ones zero. To do so after each multiply-add would take more time than the
//! multiply-adds. But most tiles have no numbers that small that their products could come near: see [`may_underflow`].

use super::super::simd::{Simd, SimdLevel, simd_kernel};
use super::tile::Block;
use super::{TILE, Tile, flushed, flushed_multiply_add, lower, upper};
use std::cell::RefCell;

/// A tile as f32: of each of its rows the lower numbers of the pairs, then the upper ones.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Floats {
    values: [[[f32; TILE]; 2]; TILE],
    /// The least biased exponent of those that are not zero.
    least_exponent: u32,
}

thread_local! {
    /// A block's operands as f32: left and right, each of two halves.
    static FLOATS: RefCell<[[Vec<Floats>; 2]; 2]> = RefCell::default();
}

/// Adds the products of `ROWS` rows of left tiles, from a first one on, and sixteen columns.
type AddProducts<const ROWS: usize> = unsafe fn(&[Floats], usize, &[Floats], &mut [[f32; TILE]; ROWS]);

/// Computes a block.
///
/// # Safety
/// As for [`Tiles::compute`](super::tile::Tiles::compute).
pub(super) unsafe fn compute(simd: Simd, block: &Block<'_>) {
    FLOATS.with_borrow_mut(|[left, right]| {
        for (floats, tiles) in left.iter_mut().zip(block.left).chain(right.iter_mut().zip(block.right)) {
            as_floats(simd, tiles, floats);
        }
        // SAFETY: the levels are only built where their instructions were detected; the pointers are the caller's promise.
        unsafe {
            match simd.level() {
                #[cfg(target_arch = "x86_64")]
                SimdLevel::Amx | SimdLevel::Avx512 => by_rows(block, left, right, x86::avx512),
                #[cfg(target_arch = "x86_64")]
                SimdLevel::Avx2 => by_rows(block, left, right, x86::avx2),
                _ => by_rows(block, left, right, portable),
            }
        }
    });
}

/// # Safety
/// As for [`compute`], and this process may execute `add`.
unsafe fn by_rows<const ROWS: usize>(
    block: &Block<'_>,
    left: &[Vec<Floats>; 2],
    right: &[Vec<Floats>; 2],
    add: AddProducts<ROWS>,
) {
    for first_column in (0..block.columns).step_by(TILE) {
        let columns = TILE.min(block.columns - first_column);
        for first_row in (0..block.rows).step_by(ROWS) {
            let mut acc = [[0.0; TILE]; ROWS];
            let rows = ROWS.min(block.rows - first_row);
            for (row, acc) in acc[..rows].iter_mut().enumerate() {
                let start = block.start.wrapping_add((first_row + row) * block.start_stride + first_column);
                // SAFETY: row and column lie in the block.
                unsafe { copy(start, acc.as_mut_ptr(), columns) };
            }
            let (left, right) = (&left[first_row / TILE], &right[first_column / TILE]);
            // SAFETY: the caller's promise.
            unsafe { add(left, first_row % TILE, right, &mut acc) };
            for (row, acc) in acc[..rows].iter().enumerate() {
                let c = block.c.wrapping_add((first_row + row) * block.c_stride + first_column);
                // SAFETY: row and column lie in the block.
                unsafe { copy(acc.as_ptr(), c, columns) };
            }
        }
    }
}

/// Copies up to [`TILE`] elements.
///
/// # Safety
/// `from` is readable and `to` writable for so many, and they do not overlap.
#[inline(always)]
unsafe fn copy(from: *const f32, to: *mut f32, count: usize) {
    // SAFETY: the caller's promise. A copy of a constant length is a few moves, any other is a call.
    unsafe {
        match count {
            TILE => from.copy_to_nonoverlapping(to, TILE),
            _ => from.copy_to_nonoverlapping(to, count),
        }
    }
}

simd_kernel! {
    /// Makes `floats` of `tiles`.
    fn as_floats(simd: Simd, tiles: &[Tile], floats: &mut Vec<Floats>) {
        floats.resize(tiles.len(), Floats { values: [[[0.0; TILE]; 2]; TILE], least_exponent: 0 });
        for (tile, floats) in tiles.iter().zip(floats) {
            let mut least = [u32::MAX; TILE];
            for (pairs, [even, odd]) in tile.0.iter().zip(&mut floats.values) {
                for j in 0..TILE {
                    (even[j], odd[j]) = (lower(pairs[j]), upper(pairs[j]));
                    // Without an exponent it is zero, and then the largest number here.
                    let one = (even[j].to_bits() >> 23 & 0xff).wrapping_sub(1);
                    let other = (odd[j].to_bits() >> 23 & 0xff).wrapping_sub(1);
                    least[j] = least[j].min(one).min(other);
                }
            }
            floats.least_exponent = least.into_iter().fold(u32::MAX, u32::min).saturating_add(1);
        }
    }
}

/// Whether a sum of products of numbers with at least these exponents may be below the normal numbers without being zero.
/// A number of 8 bits is a multiple of 2^(exponent - 127 - 7). So are all sums of products one of the product of two such
/// powers, rounded or not.
#[inline(always)]
fn may_underflow(left: &Floats, right: &Floats) -> bool {
    const LEAST: u32 = 2 * (127 + 7) - 126;
    left.least_exponent.saturating_add(right.least_exponent) < LEAST
}

/// Plain Rust: the definition of the result, and the path of other architectures.
fn portable(left: &[Floats], first_row: usize, right: &[Floats], acc: &mut [[f32; TILE]; 1]) {
    let [acc] = acc;
    *acc = acc.map(flushed);
    for (left, right) in left.iter().zip(right) {
        let mut sums = [0.0f32; TILE];
        if may_underflow(left, right) {
            [sums] = sums_of_any(left, first_row, right);
        } else {
            let ([a_even, a_odd], mut odd) = (&left.values[first_row], [0.0f32; TILE]);
            for (pair, [b_even, b_odd]) in right.values.iter().enumerate() {
                for j in 0..TILE {
                    sums[j] = a_even[pair].mul_add(b_even[j], sums[j]);
                    odd[j] = a_odd[pair].mul_add(b_odd[j], odd[j]);
                }
            }
            for j in 0..TILE {
                sums[j] += odd[j];
            }
        }
        for j in 0..TILE {
            acc[j] = flushed(acc[j] + sums[j]);
        }
    }
}

/// The two chains of each element, added, whatever the numbers.
#[cold]
#[inline(never)]
fn sums_of_any<const ROWS: usize>(left: &Floats, first_row: usize, right: &Floats) -> [[f32; TILE]; ROWS] {
    std::array::from_fn(|row| {
        std::array::from_fn(|j| {
            let [even, odd] = [0, 1].map(|half| {
                let products = left.values[first_row + row][half].iter().zip(&right.values);
                products.fold(0.0, |acc, (a, b)| flushed_multiply_add(*a, b[half][j], acc))
            });
            flushed(even + odd)
        })
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Floats, TILE, may_underflow, sums_of_any};
    use std::arch::x86_64::*;

    /// A function of one level: `ROWS` rows and `LANES` columns at a time, of which two chains and the sum are registers.
    macro_rules! add_products {
        (
            $name:ident, $features:literal, $rows:literal rows of $lanes:literal,
            $zero:ident, $load:ident, $store:ident, $splat:ident, $add:ident, $multiply_add:ident, $flushed:ident
        ) => {
            #[target_feature(enable = $features)]
            pub(super) fn $name(
                left: &[Floats],
                first_row: usize,
                right: &[Floats],
                acc: &mut [[f32; TILE]; $rows],
            ) {
                const ROWS: usize = $rows;
                assert!(first_row + ROWS <= TILE);
                for first in (0..TILE).step_by($lanes) {
                    let mut c = [$zero(); ROWS];
                    for row in 0..ROWS {
                        // SAFETY: so many floats from `first` on are in the array.
                        c[row] = $flushed(unsafe { $load(acc[row].as_ptr().add(first)) });
                    }
                    for (left, right) in left.iter().zip(right) {
                        if may_underflow(left, right) {
                            let sums = sums_of_any::<ROWS>(left, first_row, right);
                            for row in 0..ROWS {
                                // SAFETY: so many floats from `first` on are in the array.
                                let sum = unsafe { $load(sums[row].as_ptr().add(first)) };
                                c[row] = $flushed($add(c[row], sum));
                            }
                            continue;
                        }
                        let (mut even, mut odd) = ([$zero(); ROWS], [$zero(); ROWS]);
                        for pair in 0..TILE {
                            let [b_even, b_odd] = &right.values[pair];
                            // SAFETY: so many floats from `first` on are in the arrays.
                            let (b_even, b_odd) = unsafe {
                                ($load(b_even.as_ptr().add(first)), $load(b_odd.as_ptr().add(first)))
                            };
                            for row in 0..ROWS {
                                let [a_even, a_odd] = &left.values[first_row + row];
                                even[row] = $multiply_add($splat(a_even[pair]), b_even, even[row]);
                                odd[row] = $multiply_add($splat(a_odd[pair]), b_odd, odd[row]);
                            }
                        }
                        for row in 0..ROWS {
                            c[row] = $flushed($add(c[row], $add(even[row], odd[row])));
                        }
                    }
                    for row in 0..ROWS {
                        // SAFETY: so many floats from `first` on are in the array.
                        unsafe { $store(acc[row].as_mut_ptr().add(first), c[row]) };
                    }
                }
            }
        };
    }

    add_products!(
        avx512, "avx512f", 8 rows of 16,
        _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_add_ps, _mm512_fmadd_ps, flushed_512
    );

    add_products!(
        avx2, "avx2,fma", 4 rows of 8,
        _mm256_setzero_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_add_ps, _mm256_fmadd_ps, flushed_256
    );

    const EXPONENT: i32 = 0x7f80_0000;

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn flushed_512(x: __m512) -> __m512 {
        let x = _mm512_castps_si512(x);
        let is_below_normal = _mm512_testn_epi32_mask(x, _mm512_set1_epi32(EXPONENT));
        _mm512_castsi512_ps(_mm512_mask_and_epi32(x, is_below_normal, x, _mm512_set1_epi32(i32::MIN)))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn flushed_256(x: __m256) -> __m256 {
        let x = _mm256_castps_si256(x);
        let exponent = _mm256_and_si256(x, _mm256_set1_epi32(EXPONENT));
        let is_below_normal = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
        // All but the sign.
        let away = _mm256_srli_epi32::<1>(is_below_normal);
        _mm256_castsi256_ps(_mm256_andnot_si256(away, x))
    }
}
