//! exp, sigmoid, tanh and their piecewise linear relatives: the operations of [`crate::cpu::math`], one by one.
//!
//! No driver's library has a say in the bits: polynomials in explicit `fma`, and nothing that a compiler may contract or
//! reassociate. A device whose `fma` rounds once, and which keeps denormals, returns the CPU's bits.
#![allow(clippy::excessive_precision)] // 0.693359375 is exact, its shortest f32 spelling is not

use cubecl::prelude::*;

/// 1.5 · 2^23: adding it leaves the nearest integer in the low bits of the sum.
const SHIFT: f32 = 12_582_912.0;
const SHIFT_BITS: i32 = 0x4b40_0000;
const LOG2_E: f32 = std::f32::consts::LOG2_E;
const LN2_UPPER: f32 = 0.693_359_375;
const LN2_LOWER: f32 = -2.121_944_4e-4;
const LAST_DECAY: f32 = 87.6;
/// 0.5 - 2.5 · 0.2, with the 0.2 of f32: -2^-27.
const BELOW_HALF: f32 = -7.450_580_6e-9;

/// `e^x`.
#[cube]
pub fn exp(x: f32) -> f32 {
    let x = select(x > 89.0, 89.0, x);
    let x = select(x < -104.0, -104.0, x);
    let shifted = fma(x, LOG2_E, SHIFT);
    let power = i32::reinterpret(shifted) - SHIFT_BITS;
    // Not `shifted - SHIFT`, which a compiler may take for `x · LOG2_E`.
    let n = f32::cast_from(power);
    let r = without_power(n, x);
    let p = fma(1.987_569_1e-4_f32, r, 1.398_199_9e-3);
    let p = fma(p, r, 8.333_452e-3);
    let p = fma(p, r, 4.166_579_6e-2);
    let p = fma(p, r, 1.666_666_5e-1);
    let p = fma(p, r, 5.000_000_1e-1);
    let p = fma(r * r, p, r) + 1.0;
    let half = power >> 1;
    p * power_of_two(half) * power_of_two(power - half)
}

/// `1 / (1 + e^-x)`.
#[cube]
pub fn sigmoid(x: f32) -> f32 {
    let magnitude = x.abs();
    let (s, q) = decay(magnitude);
    let decayed = fma(s, q, s);
    let decayed = select(magnitude > LAST_DECAY, 0.0, decayed);
    let reciprocal = reciprocal(1.0 + decayed);
    select(x >= 0.0, fma(-decayed, reciprocal, 1.0), decayed * reciprocal)
}

/// `tanh x`.
#[cube]
pub fn tanh(x: f32) -> f32 {
    let magnitude = x.abs();
    let (s, q) = decay(magnitude + magnitude);
    let reciprocal = reciprocal(fma(s, q, 1.0 + s));
    let near_zero = fma(-s, q, 1.0 - s) * reciprocal;
    let near_one = fma(-2.0 * fma(s, q, s), reciprocal, 1.0);
    let result = select(magnitude < 0.625, near_zero, near_one);
    let sign = u32::reinterpret(x) & 0x8000_0000_u32;
    f32::reinterpret((u32::reinterpret(result) & 0x7fff_ffff_u32) | sign)
}

/// `(s, q)` with `e^-m = s·(1 + q)` and s a power of two, for m ≥ 0.
#[cube]
fn decay(m: f32) -> (f32, f32) {
    let m = select(m > LAST_DECAY, LAST_DECAY, m);
    let shifted = fma(m, -LOG2_E, SHIFT);
    let power = i32::reinterpret(shifted) - SHIFT_BITS;
    let n = f32::cast_from(power);
    let r = without_power(n, -m);
    let p = fma(1.388_251_7e-3_f32, r, 8.366_547e-3);
    let p = fma(p, r, 4.166_720_1e-2);
    let p = fma(p, r, 1.666_654_3e-1);
    let p = fma(p, r, 4.999_999_8e-1);
    let q = fma(r * r, p, r);
    (power_of_two(power), q)
}

/// `x - n·ln 2`, with ln 2 in two parts.
#[cube]
fn without_power(n: f32, x: f32) -> f32 {
    let r = fma(n, -LN2_UPPER, x);
    // Changes nothing. A compiler whose `fma` is a product and a sum (Mesa's lavapipe) would add up the two parts first.
    let r = select(n == 0.0, x, r);
    fma(n, -LN2_LOWER, r)
}

/// `1 / d` for d in [1, 2].
#[cube]
fn reciprocal(d: f32) -> f32 {
    let r = fma(fma(d, 32.0 / 99.0, -144.0 / 99.0), d, 210.0 / 99.0);
    let r = fma(fma(-d, r, 1.0), r, r);
    fma(fma(-d, r, 1.0), r, r)
}

/// Keras 2: `clip(0.2·x + 0.5, 0, 1)`.
#[cube]
pub fn hard_sigmoid(x: f32) -> f32 {
    // From -1.25 down, x + 2.5 is exact where the line is not cut, and the sum is of the same three numbers: an `fma` that rounds
    // once returns the same bits, and one that rounds the product too does not lose them where the line reaches zero.
    let is_low = x < -1.25;
    let from = select(is_low, x + 2.5, x);
    let rest = select(is_low, BELOW_HALF, 0.5);
    let line = fma(from, 0.2, rest);
    let line = select(line > 1.0, 1.0, line);
    select(line < 0.0, 0.0, line)
}

/// `max(x, 0)`, +0 for -0.
#[cube]
pub fn relu(x: f32) -> f32 {
    select(x <= 0.0, 0.0, x)
}

#[cube]
fn power_of_two(n: i32) -> f32 {
    f32::reinterpret((n + 127) << 23)
}

#[cfg(all(test, feature = "wgpu"))]
mod tests {
    use super::*;
    use crate::cpu::math as cpu;
    use crate::cube::buffer::Buffer;
    use crate::cube::guard::abort_on_device_panic;
    use cubecl::wgpu::{WgpuDevice, WgpuRuntime};

    #[cube(launch)]
    fn map_all(x: &Array<f32>, outputs: &mut Array<f32>) {
        let j = ABSOLUTE_POS;
        let count = x.len();
        if j < count {
            outputs[j] = exp(x[j]);
            outputs[count + j] = sigmoid(x[j]);
            outputs[2 * count + j] = tanh(x[j]);
            outputs[3 * count + j] = hard_sigmoid(x[j]);
            outputs[4 * count + j] = relu(x[j]);
        }
    }

    #[test]
    fn follows_the_cpu() {
        let mut x: Vec<f32> = (0..200_001).map(|j| 100.0 * (2.0 * j as f32 / 200_000.0 - 1.0)).collect();
        x.extend((0..200).flat_map(|j| {
            let x = libm::exp2(-0.7 * f64::from(j)) as f32;
            [x, -x]
        }));
        x.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30, -1e30, 0.0, -0.0]);
        abort_on_device_panic();
        let client = WgpuRuntime::client(&WgpuDevice::Cpu);
        let input = Buffer::from_floats(&client, &x);
        let output = Buffer::from_floats(&client, &vec![f32::NAN; 5 * x.len()]);
        let cubes = CubeCount::Static(x.len().div_ceil(256) as u32, 1, 1);
        map_all::launch::<WgpuRuntime>(&client, cubes, CubeDim::new_1d(256), input.arg(), output.arg());
        let output = output.read_floats(&client, 0..output.len()).unwrap();
        type F = fn(f32) -> f32;
        let functions: [(&str, F); 5] = [
            ("exp", cpu::exp),
            ("sigmoid", cpu::sigmoid),
            ("tanh", cpu::tanh),
            ("hard_sigmoid", cpu::hard_sigmoid),
            ("relu", cpu::relu),
        ];
        for (at, (name, f)) in functions.into_iter().enumerate() {
            let (mut differ, mut worst) = (0, 0.0f32);
            for (&x, &got) in x.iter().zip(&output[at * x.len()..]) {
                let want = f(x);
                if want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan() {
                    continue;
                }
                differ += 1;
                // A device may take denormals for zeros, and rounds otherwise on the way to them.
                if want.abs() >= 1e-37 || got.abs() >= 1e-37 {
                    let error = ((got - want) / want).abs();
                    assert!(error < 5e-7, "{name}({x:e}) = {got:e}, the CPU {want:e}");
                    worst = worst.max(error);
                }
            }
            println!("{name}: {differ} of {} differ, largest relative difference {worst:.2e}", x.len());
        }
    }
}
