//! Operands in tiles of bf16. What lies beyond the last k is zero; beyond the last row or column it is never looked at.

use super::super::simd::{Simd, SimdLevel, simd_kernel};
use super::{DEPTH, TILE, Tile, rounded};

/// Tiles of an operand with so many rows or columns.
pub(crate) fn tiles_of(k: usize, width: usize) -> usize {
    width.div_ceil(TILE) * k.div_ceil(DEPTH)
}

/// Packs up to [`DEPTH`] rows of B, steps `depth_tile · DEPTH..` of k, into tiles `[panel][k / DEPTH]`.
pub(crate) fn pack_right(simd: Simd, rows: &[&[f32]], k: usize, depth_tile: usize, tiles: &mut [Tile]) {
    interleave(simd, rows, k, depth_tile, tiles, |_| ());
}

/// The same of A, which is used transposed: its columns become the rows of left tiles.
pub(crate) fn pack_left(simd: Simd, rows: &[&[f32]], k: usize, depth_tile: usize, tiles: &mut [Tile]) {
    interleave(simd, rows, k, depth_tile, tiles, |tile| transpose(simd, tile));
}

/// Packs the transpose of `b`, row-major `[n, k]` with rows `ldb` apart, into right tiles `[panel][k / DEPTH]`.
pub(crate) fn pack_columns(simd: Simd, n: usize, k: usize, b: &[f32], ldb: usize, tiles: &mut [Tile]) {
    let panels = tiles.chunks_exact_mut(k.div_ceil(DEPTH).max(1));
    for (first, panel) in (0..n).step_by(TILE).zip(panels) {
        pack_rows(simd, TILE.min(n - first), k, &b[first * ldb..], ldb, panel);
        panel.iter_mut().for_each(|tile| transpose(simd, tile));
    }
}

/// Packs up to [`TILE`] rows, `lda` apart, each with its k elements, into left tiles `[k / DEPTH]`.
pub(crate) fn pack_rows(simd: Simd, rows: usize, k: usize, a: &[f32], lda: usize, tiles: &mut [Tile]) {
    match simd.level() {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        // SAFETY: this level is only built where avx512f, avx512bw and avx512bf16 were detected.
        SimdLevel::Amx => unsafe { x86::pack_rows(rows, k, a, lda, tiles) },
        _ => rounded_rows(simd, rows, k, a, lda, tiles),
    }
}

simd_kernel! {
    fn rounded_rows(simd: Simd, rows: usize, k: usize, a: &[f32], lda: usize, tiles: &mut [Tile]) {
        each_row(rows, k, a, lda, tiles, |values| {
            let mut pairs = [0; TILE];
            for (pair, [low, high]) in pairs.iter_mut().zip(values.as_chunks().0) {
                *pair = joined(*low, *high);
            }
            pairs
        });
    }
}

/// Makes the pairs of neighbours of each row.
#[inline(always)]
fn each_row(
    rows: usize,
    k: usize,
    a: &[f32],
    lda: usize,
    tiles: &mut [Tile],
    pairs: impl Fn(&[f32; DEPTH]) -> [u32; TILE],
) {
    for row in 0..rows {
        let (whole, rest) = a[row * lda..][..k].as_chunks::<DEPTH>();
        for (tile, values) in tiles.iter_mut().zip(whole) {
            tile.0[row] = pairs(values);
        }
        if !rest.is_empty() {
            let mut values = [0.0; DEPTH];
            values[..rest.len()].copy_from_slice(rest);
            tiles[whole.len()].0[row] = pairs(&values);
        }
    }
}

/// Makes a tile `[pair][column]` of pairs of rows for every sixteen columns. Then each goes through `finish`.
fn interleave(
    simd: Simd,
    rows: &[&[f32]],
    k: usize,
    depth_tile: usize,
    tiles: &mut [Tile],
    finish: impl Fn(&mut Tile),
) {
    let depth_tiles = k.div_ceil(DEPTH);
    for (panel, first) in (0..rows[0].len()).step_by(TILE).enumerate() {
        let tile = &mut tiles[panel * depth_tiles + depth_tile];
        match simd.level() {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            // SAFETY: as in `pack_rows`.
            SimdLevel::Amx => unsafe { x86::interleave(rows, first, tile) },
            _ => rounded_columns(simd, rows, first, tile),
        }
        finish(tile);
    }
}

simd_kernel! {
    fn rounded_columns(simd: Simd, rows: &[&[f32]], first: usize, tile: &mut Tile) {
        each_pair_of_rows(rows, first, tile, |low, high| {
            let mut pairs = [0; TILE];
            for j in 0..TILE {
                pairs[j] = joined(low[j], high[j]);
            }
            pairs
        });
    }
}

/// Makes the pairs of sixteen columns, from `first` on, of up to [`DEPTH`] rows.
#[inline(always)]
fn each_pair_of_rows(
    rows: &[&[f32]],
    first: usize,
    tile: &mut Tile,
    pairs: impl Fn(&[f32; TILE], &[f32; TILE]) -> [u32; TILE],
) {
    let columns = |row: usize| {
        let mut values = [0.0; TILE];
        if let Some(row) = rows.get(row) {
            // A copy of a constant length is a move, any other is a call.
            match row[first..].first_chunk::<TILE>() {
                Some(all) => values = *all,
                None => values[..row.len() - first].copy_from_slice(&row[first..]),
            }
        }
        values
    };
    for (pair, into) in tile.0.iter_mut().enumerate() {
        *into = pairs(&columns(2 * pair), &columns(2 * pair + 1));
    }
}

/// A pair of rounded numbers.
#[inline(always)]
fn joined(low: f32, high: f32) -> u32 {
    u32::from(rounded(low)) | u32::from(rounded(high)) << 16
}

/// Exchanges rows and columns.
fn transpose(simd: Simd, tile: &mut Tile) {
    match simd.level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: these levels are only built where avx512f was detected.
        SimdLevel::Amx | SimdLevel::Avx512 => unsafe { x86::transpose(tile) },
        _ => {
            for row in 1..TILE {
                for column in 0..row {
                    let other = tile.0[column][row];
                    tile.0[column][row] = std::mem::replace(&mut tile.0[row][column], other);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{DEPTH, TILE, Tile, each_pair_of_rows, each_row};
    use std::arch::x86_64::*;

    /// The processor rounds as [`rounded`](super::rounded) does.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn pack_rows(rows: usize, k: usize, a: &[f32], lda: usize, tiles: &mut [Tile]) {
        each_row(rows, k, a, lda, tiles, |values: &[f32; DEPTH]| {
            let [low, high] =
                [0, 1].map(|half| load(values[half * TILE..].first_chunk().expect("two halves")));
            words(bits(_mm512_cvtne2ps_pbh(high, low)))
        });
    }

    /// As [`pack_rows`], of pairs of rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn interleave(rows: &[&[f32]], first: usize, tile: &mut Tile) {
        // Place 2j takes the j-th of the lower half, place 2j + 1 that of the upper.
        const PLACES: [u16; DEPTH] = {
            let (mut places, mut at) = ([0; DEPTH], 0);
            while at < DEPTH {
                places[at] = (at / 2 + at % 2 * TILE) as u16;
                at += 1;
            }
            places
        };
        // SAFETY: an array of 32 half words.
        let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
        each_pair_of_rows(rows, first, tile, |low, high| {
            words(_mm512_permutexvar_epi16(places, bits(_mm512_cvtne2ps_pbh(load(high), load(low)))))
        });
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(values: &[f32; TILE]) -> __m512 {
        // SAFETY: an array of sixteen floats.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn bits(pairs: __m512bh) -> __m512i {
        // SAFETY: both are 512 bits of any value.
        unsafe { std::mem::transmute(pairs) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn words(bits: __m512i) -> [u32; TILE] {
        let mut words = [0; TILE];
        // SAFETY: an array of sixteen words.
        unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), bits) };
        words
    }

    /// Four rounds of exchanges between neighbours: words, pairs of words, then blocks of four twice.
    #[target_feature(enable = "avx512f")]
    pub(super) fn transpose(tile: &mut Tile) {
        let mut rows = [_mm512_setzero_si512(); TILE];
        for (row, words) in rows.iter_mut().zip(&tile.0) {
            // SAFETY: an array of sixteen words.
            *row = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
        }
        let mut next = rows;
        for at in (0..TILE).step_by(2) {
            next[at] = _mm512_unpacklo_epi32(rows[at], rows[at + 1]);
            next[at + 1] = _mm512_unpackhi_epi32(rows[at], rows[at + 1]);
        }
        for at in (0..TILE).step_by(4) {
            rows[at] = _mm512_unpacklo_epi64(next[at], next[at + 2]);
            rows[at + 1] = _mm512_unpackhi_epi64(next[at], next[at + 2]);
            rows[at + 2] = _mm512_unpacklo_epi64(next[at + 1], next[at + 3]);
            rows[at + 3] = _mm512_unpackhi_epi64(next[at + 1], next[at + 3]);
        }
        // Now row 4·g + i has, in block b, word 4·b + i of the rows 4·g..4·g + 4.
        for i in 0..4 {
            let [a, b, c, d] = [rows[i], rows[4 + i], rows[8 + i], rows[12 + i]];
            let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
            next[i] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
            next[8 + i] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
            next[4 + i] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
            next[12 + i] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
        }
        for (row, words) in next.iter().zip(&mut tile.0) {
            // SAFETY: an array of sixteen words.
            unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), *row) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_rounds_alike() {
        let mixed = |at: usize| f32::from_bits((at as u32).wrapping_mul(0x9e37_79b9));
        let values: Vec<f32> = (0..40 * 1000).map(mixed).filter(|x| !x.is_nan()).take(39 * 1000).collect();
        for rows in values.chunks(39 * 25) {
            let all = |simd| {
                let mut tiles = vec![Tile([[0; TILE]; TILE]); 4 * 3];
                pack_rows(simd, TILE, 39, rows, 39, &mut tiles);
                let (by_row, rest) = tiles.split_at_mut(3);
                let rows: Vec<&[f32]> = rows.chunks(39).collect();
                pack_right(simd, &rows, 25, 0, rest);
                pack_left(simd, &rows, 25, 0, &mut rest[3..]);
                (by_row.to_vec(), rest.to_vec())
            };
            let want = all(Simd::PORTABLE);
            assert!(Simd::available().into_iter().all(|simd| all(simd) == want));
        }
    }

    #[test]
    fn a_tile_is_transposed_at_every_level() {
        let word = |row, column| (100 * row + column) as u32;
        let tile = Tile(std::array::from_fn(|row| std::array::from_fn(|column| word(row, column))));
        for simd in Simd::available() {
            let mut turned = tile;
            transpose(simd, &mut turned);
            for row in 0..TILE {
                for column in 0..TILE {
                    assert_eq!(turned.0[row][column], word(column, row), "{simd} {row} {column}");
                }
            }
        }
    }
}
