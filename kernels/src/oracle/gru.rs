//! The GRU of one row, reset after the product, gates in PyTorch's order r, z, n:
//! `r, z = σ(x + y)`, `n = tanh(x_n + r·y_n)`, `h_t = (1 - z)·n + z·h_{t-1}`, with `x = W_ih input_t + b_ih` and
//! `y = W_hh h_{t-1} + b_hh`.

use super::sequence::{SequenceGradient, add_product, add_transposed_product, sigmoid};

/// What the forward pass of one row leaves for the backward pass.
#[derive(Clone, Debug)]
pub struct GruTrace {
    /// `[T][4·H]`: r, z, n and q = y_n, the recurrent part of n before the reset.
    pub gates: Vec<f64>,
    /// `[T + 1][H]`, the initial state first.
    pub h: Vec<f64>,
}

/// Runs one row: `x` is `[T][3·H]`, `weight_hh` `[3·H, H]`, `bias_hh` `[3·H]`, `h0` `[H]`.
pub fn gru_forward(x: &[f64], weight_hh: &[f64], bias_hh: &[f64], h0: &[f64]) -> GruTrace {
    let hidden = h0.len();
    let mut trace = GruTrace { gates: Vec::new(), h: h0.to_vec() };
    for x in x.chunks_exact(3 * hidden) {
        let h_previous = trace.h[trace.h.len() - hidden..].to_vec();
        let mut y = bias_hh.to_vec();
        add_product(weight_hh, &h_previous, &mut y);
        let ([x_r, x_z, x_n], [y_r, y_z, y_n]) = (split(x), split(&y));
        let r: Vec<f64> = (0..hidden).map(|j| sigmoid(x_r[j] + y_r[j])).collect();
        let z: Vec<f64> = (0..hidden).map(|j| sigmoid(x_z[j] + y_z[j])).collect();
        let n: Vec<f64> = (0..hidden).map(|j| libm::tanh(x_n[j] + r[j] * y_n[j])).collect();
        trace.h.extend((0..hidden).map(|j| (1.0 - z[j]) * n[j] + z[j] * h_previous[j]));
        for part in [&r[..], &z, &n, y_n] {
            trace.gates.extend(part);
        }
    }
    trace
}

/// The gradient, given that of every output (`d_out` `[T][H]`) and that of the final state beside it (`d_h` `[H]`).
pub fn gru_backward(trace: &GruTrace, weight_hh: &[f64], d_out: &[f64], d_h: &[f64]) -> SequenceGradient {
    let hidden = d_h.len();
    let steps = d_out.len() / hidden;
    let mut d_x = vec![0.0; steps * 3 * hidden];
    let mut d_y = vec![0.0; steps * 3 * hidden];
    let mut carry = d_h.to_vec();
    for t in (0..steps).rev() {
        let now = t * 3 * hidden..(t + 1) * 3 * hidden;
        let gates = &trace.gates[t * 4 * hidden..];
        let h_previous = &trace.h[t * hidden..];
        for j in 0..hidden {
            let [r, z, n, q] = [0, 1, 2, 3].map(|gate| gates[gate * hidden + j]);
            let d_h = d_out[t * hidden + j] + carry[j];
            let d_n = d_h * (1.0 - z) * (1.0 - n * n);
            let d_z = d_h * (h_previous[j] - n) * z * (1.0 - z);
            let d_r = d_n * q * r * (1.0 - r);
            for (gate, (to_x, to_y)) in [(d_r, d_r), (d_z, d_z), (d_n, d_n * r)].into_iter().enumerate() {
                d_x[now.start + gate * hidden + j] = to_x;
                d_y[now.start + gate * hidden + j] = to_y;
            }
            carry[j] = d_h * z;
        }
        add_transposed_product(weight_hh, &d_y[now], &mut carry);
    }
    SequenceGradient { d_x, d_h: d_y, d_h0: carry, d_c0: Vec::new() }
}

fn split(parts: &[f64]) -> [&[f64]; 3] {
    let hidden = parts.len() / 3;
    [0, 1, 2].map(|gate| &parts[gate * hidden..(gate + 1) * hidden])
}
