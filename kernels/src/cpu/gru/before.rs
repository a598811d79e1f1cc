//! One step of the GRU with the reset before the product, unit by unit: a half on each side of the product with `W_hn`.

use crate::cpu::activation::{gate, gate_slope};
use crate::cpu::math::tanh;
use crate::cpu::sequence::{parts, parts_mut};
use crate::cpu::simd::{map_units, simd_kernel};

simd_kernel! {
    /// From the r and z of x, in their places, and of y `[rows][3·H]` to r, z and `r·h_{t-1}`.
    pub(super) fn reset_forward<const HARD: bool>(
        simd: Simd,
        hidden: usize,
        h_part: &[f32],
        bias_hh: &[f32],
        h_previous: &[f32],
        gates: &mut [f32],
    ) {
        let [b_r, b_z, _] = parts(bias_hh);
        for (row, gates) in gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [y_r, y_z, _] = parts(&h_part[3 * units.start..3 * units.end]);
            let [r, z, _, reset] = parts_mut(gates);
            map_units([y_r, y_z, b_r, b_z, &h_previous[units]], [r, z, reset], reset_forward_unit::<HARD>);
        }
    }
}

#[inline(always)]
fn reset_forward_unit<const HARD: bool>(
    [y_r, y_z, b_r, b_z, h_previous]: [f32; 5],
    [x_r, x_z, _]: [f32; 3],
) -> [f32; 3] {
    let r = gate::<HARD>(x_r + (y_r + b_r));
    let z = gate::<HARD>(x_z + (y_z + b_z));
    [r, z, r * h_previous]
}

simd_kernel! {
    /// From z and the n of x, in its place, and of y to n and h.
    pub(super) fn candidate_forward(
        simd: Simd,
        hidden: usize,
        h_part: &[f32],
        bias_hh: &[f32],
        h_previous: &[f32],
        gates: &mut [f32],
        h: &mut [f32],
    ) {
        let [_, _, b_n] = parts(bias_hh);
        for (row, gates) in gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [_, _, y_n] = parts(&h_part[3 * units.start..3 * units.end]);
            let [_, z, n, _] = parts_mut(gates);
            map_units([y_n, b_n, z, &h_previous[units.clone()]], [n, &mut h[units]], candidate_forward_unit);
        }
    }
}

#[inline(always)]
fn candidate_forward_unit([y_n, b_n, z, h_previous]: [f32; 4], [x_n, _]: [f32; 2]) -> [f32; 2] {
    let n = tanh(x_n + (y_n + b_n));
    [n, z.mul_add(h_previous, (1.0 - z) * n)]
}

simd_kernel! {
    /// From the gradient of h after the step (`d_h` and `d_out`) to those of z and n, which take their places, and to the
    /// part `d_h·z` of the gradient of h before it.
    pub(super) fn candidate_backward<const HARD: bool>(
        simd: Simd,
        hidden: usize,
        h_previous: &[f32],
        d_out: &[f32],
        gates: &mut [f32],
        d_h: &mut [f32],
    ) {
        for (row, gates) in gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [_, z, n, _] = parts_mut(gates);
            let input = [&h_previous[units.clone()], &d_out[units.clone()]];
            map_units(input, [z, n, &mut d_h[units]], candidate_backward_unit::<HARD>);
        }
    }
}

#[inline(always)]
fn candidate_backward_unit<const HARD: bool>(
    [h_previous, d_out]: [f32; 2],
    [z, n, d_h]: [f32; 3],
) -> [f32; 3] {
    let d_h = d_out + d_h;
    let d_n = d_h * (1.0 - z) * (-n).mul_add(n, 1.0);
    let d_z = d_h * (h_previous - n) * gate_slope::<HARD>(z);
    [d_z, d_n, d_h * z]
}

simd_kernel! {
    /// From the gradient of `r·h_{t-1}` `[rows][H]` to that of r, which takes its place, and on to h.
    pub(super) fn reset_backward<const HARD: bool>(
        simd: Simd,
        hidden: usize,
        h_previous: &[f32],
        d_reset: &[f32],
        gates: &mut [f32],
        d_h: &mut [f32],
    ) {
        for (row, gates) in gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [r, _, _, _] = parts_mut(gates);
            let input = [&h_previous[units.clone()], &d_reset[units.clone()]];
            map_units(input, [r, &mut d_h[units]], reset_backward_unit::<HARD>);
        }
    }
}

#[inline(always)]
fn reset_backward_unit<const HARD: bool>([h_previous, d_reset]: [f32; 2], [r, d_h]: [f32; 2]) -> [f32; 2] {
    [d_reset * h_previous * gate_slope::<HARD>(r), d_reset.mul_add(r, d_h)]
}
