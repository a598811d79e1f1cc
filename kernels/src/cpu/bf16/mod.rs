//! Matrix products of bf16 operands, summed in f32 in one fixed order: that of Intel's AMX.
//!
//! Both operands are rounded to bf16 (8 bits of mantissa), to nearest, ties to even; what has no normal f32 becomes zero.
//! k is cut into tiles of [`DEPTH`], the last one filled up with zeros. Within a tile, element (r, j) has two chains of
//! fused multiply-adds from 0, p ascending: one over even p, one over odd p. Then `c = c + (even + odd)`, from c = the
//! [`Start`](super::gemm::Start). Every operation is rounded once, to f32, and results below the normal numbers become zero
//! ([`flushed`]). So the row rule holds here too, and a product that is continued has the bits of one in a single go.
//!
//! The order is AMX's because AMX is what makes bf16 worth its rounding: 16 times the multiply-adds of AVX-512. Everything
//! else computes the same bits with f32 multiply-adds (`multiply_adds.rs`), at some cost. The bf16 instructions of AVX-512
//! add in another order, which AMX cannot follow, at no more than the rate of f32.

mod multiply_adds;
pub(super) mod pack;
pub(super) mod product;
pub(super) mod tile;

/// Rows of a left tile, columns of a right one, and pairs of k of both.
pub(crate) const TILE: usize = 16;

/// Steps of k in a tile: as many pairs as it has rows.
pub const DEPTH: usize = 2 * TILE;

/// Pairs of bf16, the lower p in the lower half. A left tile is `[row][pair]`, a right tile `[pair][column]`: what AMX
/// loads as it lies in memory. No row straddles two cache lines.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Tile(pub(crate) [[u32; TILE]; TILE]);

/// The bf16 next to x, as the upper half of an f32 would hold it.
#[inline(always)]
pub fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let quiet_nan = bits | 0x40_0000;
    let zero = bits & 0x8000_0000;
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    let is_below_normal = bits & 0x7f80_0000 == 0;
    let result = if is_below_normal { zero } else { nearest };
    ((if is_nan { quiet_nan } else { result }) >> 16) as u16
}

/// The f32 of the lower bf16 of a pair.
#[inline(always)]
pub(crate) fn lower(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

/// The f32 of the upper bf16 of a pair.
#[inline(always)]
pub(crate) fn upper(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}

/// x, or the zero of its sign if x is below the normal numbers.
#[inline(always)]
pub(crate) fn flushed(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}

/// `a · b + c` of factors that are bf16, rounded once, and zero if it is below the normal numbers **after** rounding to 24
/// bits with no limit to the exponent: at the smallest normal number alone this is not what [`flushed`] sees.
pub(crate) fn flushed_multiply_add(a: f32, b: f32, c: f32) -> f32 {
    let x = flushed(a.mul_add(b, c));
    if x.abs() == f32::MIN_POSITIVE {
        // Exact where it matters: a·b has 16 bits, and c is a multiple of 2^-149.
        let exact = f64::from(a) * f64::from(b) + f64::from(c);
        let least = f64::from(f32::MIN_POSITIVE) * (1.0 - 2f64.powi(-25));
        if exact.abs() < least {
            return 0f32.copysign(x);
        }
    }
    x
}

#[cfg(test)]
mod product_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_with_ties_to_even_and_flushes() {
        let of = |bits: u32| rounded(f32::from_bits(bits));
        assert_eq!(rounded(1.0), 0x3f80);
        // 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3·2^-8 between 1 + 2^-7 and 1 + 2^-6.
        assert_eq!((of(0x3f80_8000), of(0x3f81_8000)), (0x3f80, 0x3f82));
        assert_eq!((of(0x3f80_8001), of(0x3f80_7fff)), (0x3f81, 0x3f80));
        assert_eq!((of(0x007f_ffff), of(0x807f_ffff), of(0x0080_0000)), (0, 0x8000, 0x0080));
        assert_eq!((rounded(f32::MAX), rounded(f32::NEG_INFINITY)), (0x7f80, 0xff80));
        assert_eq!((of(0x7f80_0001), of(0xffff_ffff)), (0x7fc0, 0xffff));
        for bits in (0..u32::MAX).step_by(9973) {
            let (x, got) = (f32::from_bits(bits), f32::from_bits(u32::from(of(bits)) << 16));
            if x.is_normal() && got.is_finite() {
                assert!((f64::from(got) - f64::from(x)).abs() <= f64::from(x.abs()) / 256.0, "{x:e} {got:e}");
            }
        }
    }

    #[test]
    fn the_smallest_normal_number_is_reached_by_rounding_to_24_bits_only() {
        let power = |exponent: i32| 2f32.powi(exponent);
        let least = f32::MIN_POSITIVE;
        let minus = |factor: f32, exponent: i32| {
            flushed_multiply_add(-factor * power(-75), power(exponent + 75), least)
        };
        assert_eq!((minus(1.5, -152), minus(1.0, -151)), (least, least));
        // IEEE 754's gradual numbers would round these up to the smallest normal one.
        assert_eq!((minus(1.5, -151), minus(1.0, -150), minus(1.0078125, -151)), (0.0, 0.0, 0.0));
        assert_eq!(minus(1.0, -149), 0.0);
        assert_eq!(flushed_multiply_add(2.0, 3.0, 1.0), 7.0);
    }
}
