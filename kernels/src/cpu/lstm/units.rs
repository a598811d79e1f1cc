//! One step of the LSTM, unit by unit: what stands between its products.

use super::{LstmOptions, Peepholes};
use crate::cpu::activation::{gate, gate_slope};
use crate::cpu::math::tanh;
use crate::cpu::sequence::parts_mut;
use crate::cpu::simd::{Simd, map_units, simd_kernel, with_constants};
use protocol::cell::RecurrentActivation;

/// Weights of one unit's peepholes.
#[derive(Clone, Copy)]
struct Peephole {
    i: f32,
    f: f32,
    o: f32,
}

/// What a backward step reads, `[rows][H]`.
#[derive(Clone, Copy)]
pub(super) struct CellsBackward<'a> {
    pub(super) c_previous: &'a [f32],
    pub(super) c: &'a [f32],
    /// The whole gradient of m.
    pub(super) d_m: &'a [f32],
}

/// Activates the gates `[rows][4·H]` and computes c and m, `[rows][H]`.
pub(super) fn forward_units(
    simd: Simd,
    hidden: usize,
    options: LstmOptions<'_>,
    gates: &mut [f32],
    c_previous: &[f32],
    c: &mut [f32],
    m: &mut [f32],
) {
    let LstmOptions { recurrent_activation, cell_clip, peepholes } = options;
    let hard = recurrent_activation == RecurrentActivation::HardSigmoid;
    let limit = cell_clip.unwrap_or(f32::INFINITY);
    with_constants!(forward_rows[hard, cell_clip.is_some()](
        simd, hidden, limit, peepholes, gates, c_previous, c, m
    ));
}

/// Turns the gates `[rows][4·H]` into their gradients, and the gradient of c after the step into that of c before it.
pub(super) fn backward_units(
    simd: Simd,
    hidden: usize,
    options: LstmOptions<'_>,
    cells: CellsBackward<'_>,
    gates: &mut [f32],
    d_c: &mut [f32],
) {
    let LstmOptions { recurrent_activation, cell_clip, peepholes } = options;
    let hard = recurrent_activation == RecurrentActivation::HardSigmoid;
    let limit = cell_clip.unwrap_or(f32::INFINITY);
    with_constants!(backward_rows[hard, cell_clip.is_some()](
        simd, hidden, limit, peepholes, cells, gates, d_c
    ));
}

simd_kernel! {
    fn forward_rows<const HARD: bool, const CLIP: bool>(
        simd: Simd,
        hidden: usize,
        limit: f32,
        peepholes: Option<Peepholes<'_>>,
        gates: &mut [f32],
        c_previous: &[f32],
        c: &mut [f32],
        m: &mut [f32],
    ) {
        for (row, gates) in gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [i, f, g, o] = parts_mut(gates);
            let c_previous = &c_previous[units.clone()];
            let inout = [i, f, g, o, &mut c[units.clone()], &mut m[units]];
            match peepholes {
                None => {
                    map_units([c_previous], inout, #[inline(always)] |[c_previous], inout| {
                        forward_unit::<HARD, CLIP>(limit, c_previous, None, inout)
                    });
                }
                Some(Peepholes { i, f, o }) => {
                    let input = [c_previous, i, f, o];
                    map_units(input, inout, #[inline(always)] |[c_previous, i, f, o], inout| {
                        forward_unit::<HARD, CLIP>(limit, c_previous, Some(Peephole { i, f, o }), inout)
                    });
                }
            }
        }
    }
}

#[inline(always)]
fn forward_unit<const HARD: bool, const CLIP: bool>(
    limit: f32,
    c_previous: f32,
    peephole: Option<Peephole>,
    [i, f, g, o, _, _]: [f32; 6],
) -> [f32; 6] {
    let (i, f) = match peephole {
        None => (i, f),
        Some(p) => (p.i.mul_add(c_previous, i), p.f.mul_add(c_previous, f)),
    };
    let (i, f, g) = (gate::<HARD>(i), gate::<HARD>(f), tanh(g));
    let c = f.mul_add(c_previous, i * g);
    let c = if CLIP { clip(c, limit) } else { c };
    let o = gate::<HARD>(peephole.map_or(o, |p| p.o.mul_add(c, o)));
    [i, f, g, o, c, o * tanh(c)]
}

/// Selects, which keep a NaN.
#[inline(always)]
fn clip(c: f32, limit: f32) -> f32 {
    let c = if c > limit { limit } else { c };
    if c < -limit { -limit } else { c }
}

simd_kernel! {
    fn backward_rows<const HARD: bool, const CLIP: bool>(
        simd: Simd,
        hidden: usize,
        limit: f32,
        peepholes: Option<Peepholes<'_>>,
        cells: CellsBackward<'_>,
        gates: &mut [f32],
        d_c: &mut [f32],
    ) {
        for (row, gates) in gates.chunks_exact_mut(4 * hidden).enumerate() {
            let units = row * hidden..(row + 1) * hidden;
            let [c_previous, c, d_m] =
                [cells.c_previous, cells.c, cells.d_m].map(|cells| &cells[units.clone()]);
            let [i, f, g, o] = parts_mut(gates);
            let inout = [i, f, g, o, &mut d_c[units]];
            match peepholes {
                None => {
                    let input = [c_previous, c, d_m];
                    map_units(input, inout, #[inline(always)] |input, inout| {
                        backward_unit::<HARD, CLIP>(limit, None, input, inout)
                    });
                }
                Some(p) => {
                    let input = [c_previous, c, d_m, p.i, p.f, p.o];
                    map_units(input, inout, #[inline(always)] |input, inout| {
                        let [c_previous, c, d_m, p_i, p_f, p_o] = input;
                        let peephole = Some(Peephole { i: p_i, f: p_f, o: p_o });
                        backward_unit::<HARD, CLIP>(limit, peephole, [c_previous, c, d_m], inout)
                    });
                }
            }
        }
    }
}

#[inline(always)]
fn backward_unit<const HARD: bool, const CLIP: bool>(
    limit: f32,
    peephole: Option<Peephole>,
    [c_previous, c, d_m]: [f32; 3],
    [i, f, g, o, d_c]: [f32; 5],
) -> [f32; 5] {
    let tanh_c = tanh(c);
    let d_o = d_m * tanh_c * gate_slope::<HARD>(o);
    let mut d_c = (d_m * o).mul_add((-tanh_c).mul_add(tanh_c, 1.0), d_c);
    if let Some(p) = peephole {
        d_c = p.o.mul_add(d_o, d_c);
    }
    if CLIP {
        // By the forward pass's own operations, so by its own bits.
        let unclipped = f.mul_add(c_previous, i * g);
        d_c = if unclipped.abs() > limit { 0.0 } else { d_c };
    }
    let d_i = d_c * g * gate_slope::<HARD>(i);
    let d_f = d_c * c_previous * gate_slope::<HARD>(f);
    let d_g = d_c * i * (-g).mul_add(g, 1.0);
    let mut d_c_previous = d_c * f;
    if let Some(p) = peephole {
        d_c_previous = p.f.mul_add(d_f, p.i.mul_add(d_i, d_c_previous));
    }
    [d_i, d_f, d_g, d_o, d_c_previous]
}
