//! Sums over rows and over shards, and the digest of a buffer.

use super::simd::{Simd, simd_kernel};
use protocol::random::mix64;

simd_kernel! {
    /// `dst += src`, element by element: one edge of the tree over the shards. The order of the edges is the caller's.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn tree_add(simd: Simd, dst: &mut [f32], src: &[f32]) {
        assert!(dst.len() == src.len(), "tree_add: dst has {} elements, src {}", dst.len(), src.len());
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst += src;
        }
    }
}

/// The bias gradient of a shard: `d_b[j] = Σ_rows d[row][j]`.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `rows` | k rows of `[G·H]` | in | in the order of the sum: the (step, row) pairs of one shard |
/// | `d_b` | `[G·H]` | out | |
///
/// Cost: one sweep over the rows. Numerics: the sum rule; from 0, one row after the other.
pub fn column_sum<'a>(simd: Simd, rows: impl Iterator<Item = &'a [f32]>, d_b: &mut [f32]) {
    d_b.fill(0.0);
    for row in rows {
        tree_add(simd, d_b, row);
    }
}

/// The gradient of weights that multiply element by element: `out[j] = Σ_rows a[row][j]·b[row][j]`.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `rows` | k pairs of rows of `[H]` | in | in the order of the sum: the (step, row) pairs of one shard |
/// | `out` | `[H]` | out | |
///
/// Cost: one sweep over both. Numerics: the sum rule; from 0, one fused multiply-add per row, in order.
pub fn product_column_sum<'a>(
    simd: Simd,
    rows: impl Iterator<Item = (&'a [f32], &'a [f32])>,
    out: &mut [f32],
) {
    out.fill(0.0);
    for (a, b) in rows {
        add_product(simd, out, a, b);
    }
}

simd_kernel! {
    /// `dst += a·b`, element by element.
    fn add_product(simd: Simd, dst: &mut [f32], a: &[f32], b: &[f32]) {
        assert!(a.len() == dst.len() && b.len() == dst.len(), "product_column_sum: rows differ from {}", dst.len());
        for j in 0..dst.len() {
            dst[j] = a[j].mul_add(b[j], dst[j]);
        }
    }
}

simd_kernel! {
    /// A 64-bit digest of a range of a buffer: `Σ mix64(index · 2³² ^ bits(value))`, wrapping, where index counts from
    /// `start_index`.
    ///
    /// The digest of a whole is the wrapping sum of the digests of its ranges, in any order, so ranges may be digested
    /// by different threads. It notices a changed bit, a moved element, +0 against -0; it is no protection against
    /// intent. Positions count modulo 2³².
    ///
    /// Cost: two 64-bit products per element, vectorised where the CPU has them (AVX-512).
    pub fn digest(simd: Simd, values: &[f32], start_index: u64) -> u64 {
        let mut sum = 0u64;
        for (at, value) in values.iter().enumerate() {
            let index = start_index.wrapping_add(at as u64);
            sum = sum.wrapping_add(mix64((index << 32) ^ u64::from(value.to_bits())));
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::super::sequence::tests::numbers;
    use super::*;

    #[test]
    fn column_sum_adds_in_row_order_at_every_level() {
        let (rows, width) = (37, 33);
        let d = numbers(rows * width, 1.0, 1);
        for simd in Simd::available() {
            let mut got = vec![f32::NAN; width];
            column_sum(simd, d.chunks(width), &mut got);
            for j in 0..width {
                let want = (0..rows).fold(0.0f32, |sum, row| sum + d[row * width + j]);
                assert_eq!(got[j].to_bits(), want.to_bits());
            }
        }
    }

    #[test]
    fn product_column_sum_fuses_in_row_order_at_every_level() {
        let (rows, width) = (37, 33);
        let (a, b) = (numbers(rows * width, 1.0, 4), numbers(rows * width, 1.0, 5));
        for simd in Simd::available() {
            let mut got = vec![f32::NAN; width];
            product_column_sum(simd, a.chunks(width).zip(b.chunks(width)), &mut got);
            for j in 0..width {
                let want =
                    (0..rows).map(|row| row * width + j).fold(0.0f32, |sum, at| a[at].mul_add(b[at], sum));
                assert_eq!(got[j].to_bits(), want.to_bits());
            }
        }
    }

    #[test]
    fn digests_of_ranges_add_up_to_the_digest_of_the_whole() {
        let x = numbers(1000, 1.0, 2);
        let whole = digest(Simd::detect(), &x, 5);
        for simd in Simd::available() {
            for cut in [0, 1, 17, 500, 999, 1000] {
                let parts = digest(simd, &x[cut..], 5 + cut as u64).wrapping_add(digest(simd, &x[..cut], 5));
                assert_eq!(parts, whole);
            }
        }
    }

    #[test]
    fn the_digest_notices_a_bit_a_place_and_a_sign_of_zero() {
        let x = numbers(100, 1.0, 3);
        let before = digest(Simd::detect(), &x, 0);
        let mut flipped = x.clone();
        flipped[40] = f32::from_bits(flipped[40].to_bits() ^ 1);
        let mut swapped = x.clone();
        swapped.swap(3, 90);
        for changed in [flipped, swapped] {
            assert_ne!(digest(Simd::detect(), &changed, 0), before);
        }
        assert_ne!(digest(Simd::detect(), &x, 1), before);
        assert_ne!(digest(Simd::detect(), &[0.0], 0), digest(Simd::detect(), &[-0.0], 0));
    }
}
