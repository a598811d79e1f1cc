//! One step of the GRU with the reset before the product, unit by unit: a half on each side of the product with `W_hn`.

use crate::cpu::activation::{gate, gate_slope};
use crate::cpu::math::tanh;
use crate::cpu::sequence::{parts, parts_mut};
use crate::cpu::simd::{map_units, simd_kernel};

simd_kernel! {
    /// From the r and z of x and y `[rows][3·H]` to r, z and `r·h_{t-1}`.
    pub(super) fn reset_forward<const HARD: bool>(
        simd: Simd,
        hidden: usize,
        x_part: &[f32],
        h_part: &[f32],
        bias_hh: &[f32],
        h_previous: &[f32],
        gates: &mut [f32],
    ) {
        let [b_r, b_z, _] = parts(bias_hh);
        for (row, gates) in gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [x_r, x_z, _] = parts(&x_part[3 * units.start..3 * units.end]);
            let [y_r, y_z, _] = parts(&h_part[3 * units.start..3 * units.end]);
            let [r, z, _, reset] = parts_mut(gates);
            let input = [x_r, x_z, y_r, y_z, b_r, b_z, &h_previous[units]];
            map_units(input, [r, z, reset], reset_forward_unit::<HARD>);
        }
    }
}

#[inline(always)]
fn reset_forward_unit<const HARD: bool>(
    [x_r, x_z, y_r, y_z, b_r, b_z, h_previous]: [f32; 7],
    _: [f32; 3],
) -> [f32; 3] {
    let r = gate::<HARD>(x_r + (y_r + b_r));
    let z = gate::<HARD>(x_z + (y_z + b_z));
    [r, z, r * h_previous]
}

simd_kernel! {
    /// From z and the n of x and y to n and h.
    pub(super) fn candidate_forward(
        simd: Simd,
        hidden: usize,
        x_part: &[f32],
        h_part: &[f32],
        bias_hh: &[f32],
        h_previous: &[f32],
        gates: &mut [f32],
        h: &mut [f32],
    ) {
        let [_, _, b_n] = parts(bias_hh);
        for (row, gates) in gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [_, _, x_n] = parts(&x_part[3 * units.start..3 * units.end]);
            let [_, _, y_n] = parts(&h_part[3 * units.start..3 * units.end]);
            let [_, z, n, _] = parts_mut(gates);
            map_units(
                [x_n, y_n, b_n, z, &h_previous[units.clone()]],
                [n, &mut h[units]],
                candidate_forward_unit,
            );
        }
    }
}

#[inline(always)]
fn candidate_forward_unit([x_n, y_n, b_n, z, h_previous]: [f32; 5], _: [f32; 2]) -> [f32; 2] {
    let n = tanh(x_n + (y_n + b_n));
    [n, z.mul_add(h_previous, (1.0 - z) * n)]
}

simd_kernel! {
    /// From the gradient of h after the step (`d_h` and `d_out`) to those of z and n, and to the part `d_h·z` of the
    /// gradient of h before it.
    pub(super) fn candidate_backward<const HARD: bool>(
        simd: Simd,
        hidden: usize,
        gates: &[f32],
        h_previous: &[f32],
        d_out: &[f32],
        d_x_part: &mut [f32],
        d_h_part: &mut [f32],
        d_h: &mut [f32],
    ) {
        let d_parts = d_x_part.chunks_exact_mut(3 * hidden).zip(d_h_part.chunks_exact_mut(3 * hidden));
        for (row, (d_x_part, d_h_part)) in d_parts.enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [_, z, n, _] = parts(&gates[4 * units.start..4 * units.end]);
            let [_, to_x_z, to_x_n] = parts_mut(d_x_part);
            let [_, to_h_z, to_h_n] = parts_mut(d_h_part);
            let input = [z, n, &h_previous[units.clone()], &d_out[units.clone()]];
            let output = [to_x_z, to_x_n, to_h_z, to_h_n, &mut d_h[units]];
            map_units(input, output, candidate_backward_unit::<HARD>);
        }
    }
}

#[inline(always)]
fn candidate_backward_unit<const HARD: bool>(
    [z, n, h_previous, d_out]: [f32; 4],
    [_, _, _, _, d_h]: [f32; 5],
) -> [f32; 5] {
    let d_h = d_out + d_h;
    let d_n = d_h * (1.0 - z) * (-n).mul_add(n, 1.0);
    let d_z = d_h * (h_previous - n) * gate_slope::<HARD>(z);
    [d_z, d_n, d_z, d_n, d_h * z]
}

simd_kernel! {
    /// From the gradient of `r·h_{t-1}` `[rows][H]` to that of r, and on to h.
    pub(super) fn reset_backward<const HARD: bool>(
        simd: Simd,
        hidden: usize,
        gates: &[f32],
        h_previous: &[f32],
        d_reset: &[f32],
        d_x_part: &mut [f32],
        d_h_part: &mut [f32],
        d_h: &mut [f32],
    ) {
        let d_parts = d_x_part.chunks_exact_mut(3 * hidden).zip(d_h_part.chunks_exact_mut(3 * hidden));
        for (row, (d_x_part, d_h_part)) in d_parts.enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [r, _, _, _] = parts(&gates[4 * units.start..4 * units.end]);
            let [to_x_r, _, _] = parts_mut(d_x_part);
            let [to_h_r, _, _] = parts_mut(d_h_part);
            let input = [r, &h_previous[units.clone()], &d_reset[units.clone()]];
            map_units(input, [to_x_r, to_h_r, &mut d_h[units]], reset_backward_unit::<HARD>);
        }
    }
}

#[inline(always)]
fn reset_backward_unit<const HARD: bool>(
    [r, h_previous, d_reset]: [f32; 3],
    [_, _, d_h]: [f32; 3],
) -> [f32; 3] {
    let d_r = d_reset * h_previous * gate_slope::<HARD>(r);
    [d_r, d_r, d_reset.mul_add(r, d_h)]
}
