//! One step of the GRU with the reset after the product, unit by unit.

use crate::cpu::activation::{gate, gate_slope};
use crate::cpu::math::tanh;
use crate::cpu::sequence::{parts, parts_mut};
use crate::cpu::simd::{map_units, simd_kernel};

simd_kernel! {
    /// From the part x, in the places of r, z and n, and the part y `[rows][3·H]` to the gates and h.
    pub(super) fn after_forward<const HARD: bool>(
        simd: Simd,
        hidden: usize,
        h_part: &[f32],
        bias_hh: &[f32],
        h_previous: &[f32],
        gates: &mut [f32],
        h: &mut [f32],
    ) {
        let [b_r, b_z, b_n] = parts(bias_hh);
        for (row, gates) in gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [y_r, y_z, y_n] = parts(&h_part[3 * units.start..3 * units.end]);
            let [r, z, n, q] = parts_mut(gates);
            let input = [y_r, y_z, y_n, b_r, b_z, b_n, &h_previous[units.clone()]];
            map_units(input, [r, z, n, q, &mut h[units]], forward_unit::<HARD>);
        }
    }
}

#[inline(always)]
fn forward_unit<const HARD: bool>(
    [y_r, y_z, y_n, b_r, b_z, b_n, h_previous]: [f32; 7],
    [x_r, x_z, x_n, _, _]: [f32; 5],
) -> [f32; 5] {
    let r = gate::<HARD>(x_r + (y_r + b_r));
    let z = gate::<HARD>(x_z + (y_z + b_z));
    let q = y_n + b_n;
    let n = tanh(r.mul_add(q, x_n));
    [r, z, n, q, z.mul_add(h_previous, (1.0 - z) * n)]
}

simd_kernel! {
    /// From the gradient of h after the step (`d_h` and `d_out`) to those of x and y, and to the part of the gradient of
    /// h before it that no product brings. The gates r, z, n, q give way to d_r, d_z, d_n and, for y, d_n·r.
    pub(super) fn after_backward<const HARD: bool>(
        simd: Simd,
        hidden: usize,
        h_previous: &[f32],
        d_out: &[f32],
        gates: &mut [f32],
        d_h_part: &mut [f32],
        d_h: &mut [f32],
    ) {
        let rows = gates.chunks_exact_mut(4 * hidden).zip(d_h_part.chunks_exact_mut(3 * hidden));
        for (row, (gates, d_h_part)) in rows.enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [r, z, n, q] = parts_mut(gates);
            let [to_h_r, to_h_z, to_h_n] = parts_mut(d_h_part);
            let input = [&h_previous[units.clone()], &d_out[units.clone()]];
            let inout = [r, z, n, q, to_h_r, to_h_z, to_h_n, &mut d_h[units]];
            map_units(input, inout, backward_unit::<HARD>);
        }
    }
}

#[inline(always)]
fn backward_unit<const HARD: bool>(
    [h_previous, d_out]: [f32; 2],
    [r, z, n, q, _, _, _, d_h]: [f32; 8],
) -> [f32; 8] {
    let d_h = d_out + d_h;
    let d_n = d_h * (1.0 - z) * (-n).mul_add(n, 1.0);
    let d_z = d_h * (h_previous - n) * gate_slope::<HARD>(z);
    let d_r = d_n * q * gate_slope::<HARD>(r);
    [d_r, d_z, d_n, d_n * r, d_r, d_z, d_n * r, d_h * z]
}
