//! The LSTM over a block of rows, gates in PyTorch's order i, f, g, o.
//!
//! `c_t = clip(f·c_{t-1} + i·g)`, `m_t = o·tanh(c_t)`, `h_t = W_hr m_t`, with `i = σ(pre_i + p_i·c_{t-1})`,
//! `f = σ(pre_f + p_f·c_{t-1})`, `g = tanh(pre_g)`, `o = σ(pre_o + p_o·c_t)`, where
//! `pre_t = (W_ih x_t + b_ih + b_hh) + W_hh h_{t-1}` and the part in brackets is computed for all steps before, a forget
//! bias included. Plain: no clip, no peepholes p, and h = m without a projection W_hr.

mod units;

use super::gemm::gemm;
use super::pack::PackedMatrix;
use super::reduce::tree_add;
use super::sequence::{Check, SequenceShape};
use super::simd::Simd;
use protocol::cell::RecurrentActivation;
use units::{CellsBackward, backward_units, forward_units};

/// What both directions need to know of the cell.
#[derive(Clone, Copy, Debug)]
pub struct LstmOptions<'a> {
    /// σ of the gates i, f, o.
    pub recurrent_activation: RecurrentActivation,
    /// Largest size of a cell state; the gradient of what was cut off is zero. A NaN comes through.
    pub cell_clip: Option<f32>,
    /// Diagonal weights from the cell state to the gates.
    pub peepholes: Option<Peepholes<'a>>,
}

/// Diagonal weights, `[H]` each: i and f see `c_{t-1}`, o sees `c_t`.
#[derive(Clone, Copy, Debug)]
pub struct Peepholes<'a> {
    /// To the input gate.
    pub i: &'a [f32],
    /// To the forget gate.
    pub f: &'a [f32],
    /// To the output gate.
    pub o: &'a [f32],
}

impl LstmOptions<'_> {
    fn check(&self, check: &Check, hidden: usize) {
        if let Some(Peepholes { i, f, o }) = self.peepholes {
            check.vector("the peephole of i", i, hidden);
            check.vector("the peephole of f", f, hidden);
            check.vector("the peephole of o", o, hidden);
        }
    }
}

/// Arguments of [`lstm_forward`].
#[derive(Debug)]
pub struct LstmForward<'a> {
    /// The block.
    pub shape: SequenceShape<'a>,
    /// The cell.
    pub options: LstmOptions<'a>,
    /// `[R, 4·H]` (k, n): `pack_columns` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// From m to h; without it R is H.
    pub projection: Option<LstmProjection<'a>>,
    /// `[N][4·H]`: input part in, activated gates out.
    pub gates: &'a mut [f32],
    /// `[rows + N][R]`, the starts given.
    pub h: &'a mut [f32],
    /// `[rows + N][H]`, the starts given.
    pub c: &'a mut [f32],
}

/// The projection on the way forward.
#[derive(Debug)]
pub struct LstmProjection<'a> {
    /// `[H, R]` (k, n): `pack_columns` of `weight_hr`.
    pub weight_hr: &'a PackedMatrix,
    /// `[N][H]`, written: `o·tanh(c)`, kept for the gradient of `weight_hr`.
    pub m: &'a mut [f32],
}

/// Runs the block through all steps.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[R, 4·H]` packed by columns | in | shared by all blocks |
/// | `weight_hr` | `[H, R]` packed by columns | in | shared by all blocks |
/// | `gates` | `[N][4·H]` | in and out | in: `W_ih x + b_ih + b_hh`; out: i, f, g, o activated, kept for backward |
/// | `m` | `[N][H]` | out | |
/// | `h` | `[rows + N][R]` | starts in, rest out | the rest is the layer's output |
/// | `c` | `[rows + N][H]` | starts in, rest out | kept for backward |
///
/// Cost: N · (8·H·R FLOPs + 3 sigmoid and 2 tanh per unit), 2·H·R more for a projection. Numerics: the row rule;
/// `part + acc` per k block; c is one fused multiply-add, `fma(f, c, i·g)`, a peephole another onto its sum.
/// Reference: `oracle::lstm::lstm_forward`.
pub fn lstm_forward(simd: Simd, args: LstmForward<'_>) {
    let LstmForward { shape, options, weight_hh, mut projection, gates, h, c } = args;
    let SequenceShape { hidden_size: hidden, output_size: output, .. } = shape;
    let check = match &projection {
        Some(_) => shape.check("lstm_forward"),
        None => shape.check_unprojected("lstm_forward"),
    };
    if let Some(LstmProjection { weight_hr, m }) = &projection {
        check.weight("weight_hr", weight_hr, hidden, output);
        check.steps("m", m, hidden);
    }
    options.check(&check, hidden);
    check.weight("weight_hh", weight_hh, output, 4 * hidden);
    check.steps("gates", gates, 4 * hidden);
    check.states("h", h, output);
    check.states("c", c, hidden);
    for step in shape.forward() {
        let gates = &mut gates[step.range(4 * hidden)];
        let (h_before, h_after) = step.split(h, output);
        let (c_before, c_after) = step.split(c, hidden);
        gemm(simd, step.rows, h_before, output, weight_hh, gates, 4 * hidden, true);
        match &mut projection {
            None => forward_units(simd, hidden, options, gates, c_before, c_after, h_after),
            Some(LstmProjection { weight_hr, m }) => {
                let m = &mut m[step.range(hidden)];
                forward_units(simd, hidden, options, gates, c_before, c_after, m);
                gemm(simd, step.rows, m, hidden, weight_hr, h_after, output, false);
            }
        }
    }
}

/// Arguments of [`lstm_backward`].
#[derive(Debug)]
pub struct LstmBackward<'a> {
    /// The block.
    pub shape: SequenceShape<'a>,
    /// The cell.
    pub options: LstmOptions<'a>,
    /// `[4·H, R]` (k, n): `pack_rows` of `weight_hh`.
    pub weight_hh: &'a PackedMatrix,
    /// From h back to m, where the forward pass had one.
    pub projection: Option<LstmProjectionBackward<'a>>,
    /// `[N][4·H]`, activated, as the forward pass left it.
    pub gates: &'a [f32],
    /// `[rows + N][H]`, as the forward pass left it.
    pub c: &'a [f32],
    /// `[N][R]`.
    pub d_out: &'a [f32],
    /// `[N][4·H]`, written.
    pub d_gates: &'a mut [f32],
    /// `[rows][R]`, the carry of h.
    pub d_h: &'a mut [f32],
    /// `[rows][H]`, the carry of c.
    pub d_c: &'a mut [f32],
}

/// The projection on the way back.
#[derive(Debug)]
pub struct LstmProjectionBackward<'a> {
    /// `[R, H]` (k, n): `pack_rows` of `weight_hr`.
    pub weight_hr: &'a PackedMatrix,
    /// `[N][R]`, written: the whole gradient of h, for the gradient of `weight_hr`.
    pub d_projected: &'a mut [f32],
    /// `[rows][H]`, scratch.
    pub d_m: &'a mut [f32],
}

/// Back through time. With `d_h += d_out_t`, `d_m = W_hrᵀ d_h`:
/// `d_o = d_m·tanh(c_t)·σ'(o)`, `d_c += d_m·o·(1 - tanh²c_t) + p_o·d_o`, 0 where c was clipped, `d_i = d_c·g·σ'(i)`,
/// `d_f = d_c·c_{t-1}·σ'(f)`, `d_g = d_c·i·(1-g²)`, then `d_c = d_c·f + p_i·d_i + p_f·d_f` and `d_h = W_hhᵀ d_gates_t`.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `weight_hh` | `[4·H, R]` packed by rows | in | |
/// | `weight_hr` | `[R, H]` packed by rows | in | |
/// | `gates`, `c` | as left by [`lstm_forward`] | in | tanh(c) is computed again: one tanh against a third stored array; so is c before the clip |
/// | `d_out` | `[N][R]` | in | from the layer above or the head, for every step |
/// | `d_gates` | `[N][4·H]` | out | before activation: of W_ih x, W_hh h and both biases alike, and with c of the peepholes |
/// | `d_projected` | `[N][R]` | out | with m: of W_hr |
/// | `d_h`, `d_c` | `[rows][R]`, `[rows][H]` | in and out | in: gradients of each row's final state beside `d_out` (zeros if none); out: of its start |
///
/// Cost: N · (8·H·R FLOPs + 1 tanh per unit), 2·H·R more for a projection. Reference: `oracle::lstm::lstm_backward`.
pub fn lstm_backward(simd: Simd, args: LstmBackward<'_>) {
    let LstmBackward { shape, options, weight_hh, mut projection, gates, c, d_out, d_gates, d_h, d_c } = args;
    let SequenceShape { hidden_size: hidden, output_size: output, .. } = shape;
    let check = match &projection {
        Some(_) => shape.check("lstm_backward"),
        None => shape.check_unprojected("lstm_backward"),
    };
    if let Some(LstmProjectionBackward { weight_hr, d_projected, d_m }) = &projection {
        check.weight("weight_hr", weight_hr, output, hidden);
        check.steps("d_projected", d_projected, output);
        check.carry("d_m", d_m, hidden);
    }
    options.check(&check, hidden);
    check.weight("weight_hh", weight_hh, 4 * hidden, output);
    check.steps("gates", gates, 4 * hidden);
    check.states("c", c, hidden);
    check.steps("d_out", d_out, output);
    check.steps("d_gates", d_gates, 4 * hidden);
    check.carry("d_h", d_h, output);
    check.carry("d_c", d_c, hidden);
    for step in shape.backward() {
        let d_h = &mut d_h[step.carry(output)];
        tree_add(simd, d_h, &d_out[step.range(output)]);
        let d_m = match &mut projection {
            None => &*d_h,
            Some(LstmProjectionBackward { weight_hr, d_projected, d_m }) => {
                let d_m = &mut d_m[step.carry(hidden)];
                d_projected[step.range(output)].copy_from_slice(d_h);
                gemm(simd, step.rows, d_h, output, weight_hr, d_m, hidden, false);
                d_m
            }
        };
        let cells = CellsBackward {
            gates: &gates[step.range(4 * hidden)],
            c_previous: &c[step.before(hidden)],
            c: &c[step.after(hidden)],
            d_m,
        };
        let d_gates = &mut d_gates[step.range(4 * hidden)];
        backward_units(simd, hidden, options, cells, d_gates, &mut d_c[step.carry(hidden)]);
        gemm(simd, step.rows, d_gates, 4 * hidden, weight_hh, d_h, output, false);
    }
}
