//! exp, sigmoid, tanh and their piecewise linear relatives of one f32, written so that a loop over them becomes vector code.
//!
//! No branch, no table, no library call: selects and polynomials in `mul_add`, so every SIMD level returns the same
//! bits. NaN stays NaN, also where the argument is clamped. The coefficients of `exp` are those of Cephes (`expf.c`,
//! S. Moshier), rounded to f32.
#![allow(clippy::excessive_precision)] // 0.693359375 is exact, its shortest f32 spelling is not

/// 1.5 · 2^23: adding it leaves the nearest integer in the low bits of the sum.
const SHIFT: f32 = 12_582_912.0;
/// ln 2 in two parts; the upper has 9 significant bits, so that n · upper is exact.
const LN2_UPPER: f32 = 0.693_359_375;
const LN2_LOWER: f32 = -2.121_944_4e-4;

/// `e^x`. Relative error below 1e-7 wherever the result is a normal number; overflows to infinity, underflows
/// through the denormals to zero.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Beyond these the result is infinity or zero. Written as selects, which keep a NaN (`f32::clamp` would too,
    // `min` and `max` would not).
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };

    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(-LN2_UPPER, x);
    let r = n.mul_add(-LN2_LOWER, r);

    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 5.000_000_1e-1);
    let p = (r * r).mul_add(p, r) + 1.0;

    // 2^n in two factors, because n reaches from -150 to 128 and one exponent field does not.
    let n = (shifted.to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32);
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `1 / (1 + e^-x)`. Relative error below 2.5e-7 for x > -87; below that the result is 0 or within 1e-38 of it.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    let magnitude = x.abs();
    let (s, q) = decay(magnitude);
    let decayed = s.mul_add(q, s);
    let decayed = if magnitude > LAST_DECAY { 0.0 } else { decayed };
    let reciprocal = reciprocal(1.0 + decayed);
    // Near 1 the error is that of the last rounding only, which the slope 1 - σ needs.
    if x >= 0.0 { (-decayed).mul_add(reciprocal, 1.0) } else { decayed * reciprocal }
}

/// `tanh x = (1 - e^-2|x|) / (1 + e^-2|x|)`, signed. Relative error below 2.5e-7 everywhere; odd, and ±1 beyond |x| = 9.02.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let magnitude = x.abs();
    let (s, q) = decay(magnitude + magnitude);
    let reciprocal = reciprocal(s.mul_add(q, 1.0 + s));
    // Near zero s is 1 and the numerator -q: nothing cancels.
    let near_zero = (-s).mul_add(q, 1.0 - s) * reciprocal;
    // Near 1 the error is that of the last rounding only, which the slope 1 - tanh² needs.
    let near_one = (-2.0 * s.mul_add(q, s)).mul_add(reciprocal, 1.0);
    let result = if magnitude < 0.625 { near_zero } else { near_one };
    result.copysign(x)
}

/// The last m that [`decay`] takes as it is: from there on `e^-m` is below 1e-38.
const LAST_DECAY: f32 = 87.6;

/// `(s, q)` with `e^-m = s·(1 + q)` and s a power of two, for m ≥ 0: q is accurate where the whole is near 1.
#[inline(always)]
fn decay(m: f32) -> (f32, f32) {
    let m = if m > LAST_DECAY { LAST_DECAY } else { m };
    let shifted = m.mul_add(-std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(-LN2_UPPER, -m);
    let r = n.mul_add(-LN2_LOWER, r);
    // (e^r - 1 - r) / r², minimax on |r| ≤ ln 2 / 2 for the relative error of q: 1.4e-8.
    let mut p = 1.388_251_7e-3_f32;
    p = p.mul_add(r, 8.366_547e-3);
    p = p.mul_add(r, 4.166_720_1e-2);
    p = p.mul_add(r, 1.666_654_3e-1);
    p = p.mul_add(r, 4.999_999_8e-1);
    let q = (r * r).mul_add(p, r);
    (power_of_two((shifted.to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32)), q)
}

/// `1 / d` for d in [1, 2], within 1.2e-7 and exact at both ends. A division takes longer than all of this: the vector
/// units divide at a sixteenth of their rate.
#[inline(always)]
fn reciprocal(d: f32) -> f32 {
    // The quadratic with the least relative error, 1/99; each of Newton's steps squares it.
    let mut r = d.mul_add(32.0 / 99.0, -144.0 / 99.0).mul_add(d, 210.0 / 99.0);
    for _ in 0..2 {
        r = (-d).mul_add(r, 1.0).mul_add(r, r);
    }
    r
}

/// Keras 2: `clip(0.2·x + 0.5, 0, 1)`. One rounding before the clip.
#[inline(always)]
pub fn hard_sigmoid(x: f32) -> f32 {
    let line = x.mul_add(0.2, 0.5);
    let line = if line > 1.0 { 1.0 } else { line };
    if line < 0.0 { 0.0 } else { line }
}

/// `max(x, 0)`, +0 for -0.
#[inline(always)]
pub fn relu(x: f32) -> f32 {
    if x <= 0.0 { 0.0 } else { x }
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Simd, simd_kernel};

    simd_kernel! {
        fn map_all(simd: Simd, x: &[f32], outputs: &mut [Vec<f32>; 5]) {
            for j in 0..x.len() {
                outputs[0][j] = exp(x[j]);
                outputs[1][j] = sigmoid(x[j]);
                outputs[2][j] = tanh(x[j]);
                outputs[3][j] = hard_sigmoid(x[j]);
                outputs[4][j] = relu(x[j]);
            }
        }
    }

    /// Linear over [-bound, bound] and logarithmic down to the denormals.
    fn grid(bound: f32) -> Vec<f32> {
        let count = 400_000;
        let linear = (0..=count).map(|j| bound * (2.0 * j as f32 / count as f32 - 1.0));
        let tiny = (0..2000).flat_map(|j| {
            let x = libm::exp2(-0.07 * f64::from(j)) as f32;
            [x, -x]
        });
        linear.chain(tiny).filter(|x| x.abs() <= bound).collect()
    }

    fn largest_relative_error(name: &str, bound: f32, f: fn(f32) -> f32, reference: fn(f64) -> f64) -> f64 {
        let error = |x: f32| {
            let want = reference(f64::from(x));
            if want == 0.0 { f64::from(f(x)).abs() } else { ((f64::from(f(x)) - want) / want).abs() }
        };
        let worst = grid(bound).into_iter().max_by(|a, b| error(*a).total_cmp(&error(*b))).unwrap();
        println!("{name}: largest relative error {:.3e} at {worst}", error(worst));
        error(worst)
    }

    #[test]
    fn errors_stay_within_the_documented_bounds() {
        assert!(largest_relative_error("exp", 87.0, exp, libm::exp) < 1e-7);
        assert!(largest_relative_error("sigmoid", 87.0, sigmoid, |x| 1.0 / (1.0 + libm::exp(-x))) < 2.5e-7);
        assert!(largest_relative_error("tanh", 20.0, tanh, libm::tanh) < 2.5e-7);
        // Up to where the line comes near its zero at -2.5.
        let line = |x: f64| (0.2 * x + 0.5).clamp(0.0, 1.0);
        assert!(largest_relative_error("hard_sigmoid", 2.0, hard_sigmoid, line) < 2.5e-7);
    }

    #[test]
    fn the_reciprocal_is_as_good_as_its_last_rounding() {
        assert_eq!((reciprocal(1.0), reciprocal(2.0)), (1.0, 0.5));
        let error = |d: f32| (f64::from(reciprocal(d)) * f64::from(d) - 1.0).abs();
        let worst = (0..=1 << 20).map(|j| error(1.0 + j as f32 / (1 << 20) as f32)).fold(0.0, f64::max);
        println!("reciprocal: largest relative error {worst:.3e}");
        assert!(worst < 1.2e-7);
    }

    #[test]
    fn special_values_follow_the_limits() {
        let inf = f32::INFINITY;
        let denormal = f32::from_bits(1);
        type Case = (&'static str, fn(f32) -> f32, f32, f32);
        let cases: [Case; 33] = [
            ("exp", exp, 0.0, 1.0),
            ("exp", exp, -0.0, 1.0),
            ("exp", exp, inf, inf),
            ("exp", exp, -inf, 0.0),
            ("exp", exp, 88.8, inf),
            ("exp", exp, -105.0, 0.0),
            ("exp", exp, f32::MAX, inf),
            ("exp", exp, f32::MIN, 0.0),
            ("exp", exp, denormal, 1.0),
            ("sigmoid", sigmoid, 0.0, 0.5),
            ("sigmoid", sigmoid, inf, 1.0),
            ("sigmoid", sigmoid, -inf, 0.0),
            ("sigmoid", sigmoid, f32::MIN, 0.0),
            ("tanh", tanh, 0.0, 0.0),
            ("tanh", tanh, inf, 1.0),
            ("tanh", tanh, -inf, -1.0),
            ("tanh", tanh, f32::MAX, 1.0),
            ("tanh", tanh, 1e-40, 1e-40),
            ("tanh", tanh, denormal, denormal),
            ("tanh", tanh, f32::MIN_POSITIVE, f32::MIN_POSITIVE),
            ("hard_sigmoid", hard_sigmoid, 0.0, 0.5),
            ("hard_sigmoid", hard_sigmoid, 1.0, 0.7),
            ("hard_sigmoid", hard_sigmoid, -1.25, 0.25),
            ("hard_sigmoid", hard_sigmoid, 2.6, 1.0),
            ("hard_sigmoid", hard_sigmoid, -2.6, 0.0),
            ("hard_sigmoid", hard_sigmoid, inf, 1.0),
            ("hard_sigmoid", hard_sigmoid, -inf, 0.0),
            ("relu", relu, 1.5, 1.5),
            ("relu", relu, -1.5, 0.0),
            ("relu", relu, -0.0, 0.0),
            ("relu", relu, denormal, denormal),
            ("relu", relu, inf, inf),
            ("relu", relu, -inf, 0.0),
        ];
        for (name, f, x, want) in cases {
            assert_eq!(f(x).to_bits(), want.to_bits(), "{name}({x:e}) = {:e}, expected {want:e}", f(x));
        }
        assert_eq!(tanh(-0.0).to_bits(), (-0.0f32).to_bits(), "tanh keeps the sign of zero");
        for f in [exp, sigmoid, tanh, hard_sigmoid, relu] {
            assert!(f(f32::NAN).is_nan() && f(-f32::NAN).is_nan());
        }
        // Denormal results carry few bits; they are within one unit of the last place.
        for x in [-88.0f32, -95.0, -100.0, -103.0] {
            let want = libm::exp(f64::from(x));
            assert!((f64::from(exp(x)) - want).abs() <= f64::from(denormal), "exp({x})");
        }
    }

    #[test]
    fn every_level_returns_the_same_bits() {
        let x: Vec<f32> =
            grid(100.0).into_iter().chain([f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30]).collect();
        let results: Vec<[Vec<u32>; 5]> = Simd::available()
            .into_iter()
            .map(|simd| {
                let mut outputs = [(); 5].map(|()| vec![f32::NAN; x.len()]);
                map_all(simd, &x, &mut outputs);
                outputs.map(|output| output.iter().map(|value| value.to_bits()).collect())
            })
            .collect();
        assert!(results.iter().all(|result| *result == results[0]));
    }
}
