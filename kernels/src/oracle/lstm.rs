//! The LSTM of one row, gates in PyTorch's order i, f, g, o:
//! `c_t = f·c_{t-1} + i·g`, `h_t = o·tanh(c_t)`, with i, f, o = σ(pre), g = tanh(pre),
//! `pre = x_t + W_hh h_{t-1} + b_hh` and `x_t = W_ih input_t + b_ih`.

use super::sequence::{SequenceGradient, add_product, add_transposed_product, sigmoid};

/// What the forward pass of one row leaves for the backward pass.
#[derive(Clone, Debug)]
pub struct LstmTrace {
    /// `[T][4·H]`: the activated gates i, f, g, o.
    pub gates: Vec<f64>,
    /// `[T + 1][H]`, the initial state first.
    pub h: Vec<f64>,
    /// `[T + 1][H]`, the initial state first.
    pub c: Vec<f64>,
}

/// Runs one row: `x` is `[T][4·H]`, `weight_hh` `[4·H, H]`, `bias_hh` `[4·H]`, `h0` and `c0` `[H]`.
pub fn lstm_forward(x: &[f64], weight_hh: &[f64], bias_hh: &[f64], h0: &[f64], c0: &[f64]) -> LstmTrace {
    let hidden = h0.len();
    let mut trace = LstmTrace { gates: Vec::new(), h: h0.to_vec(), c: c0.to_vec() };
    for x in x.chunks_exact(4 * hidden) {
        let mut pre = bias_hh.to_vec();
        add_product(weight_hh, &trace.h[trace.h.len() - hidden..], &mut pre);
        let pre: Vec<f64> = pre.iter().zip(x).map(|(pre, x)| pre + x).collect();
        let gates: Vec<f64> = (0..4 * hidden)
            .map(|at| if at / hidden == CANDIDATE { libm::tanh(pre[at]) } else { sigmoid(pre[at]) })
            .collect();
        let [i, f, g, o] = split(&gates);
        for j in 0..hidden {
            let c_previous = trace.c[trace.c.len() - hidden];
            let c = f[j] * c_previous + i[j] * g[j];
            trace.c.push(c);
            trace.h.push(o[j] * libm::tanh(c));
        }
        trace.gates.extend(gates);
    }
    trace
}

/// The gradient, given that of every output (`d_out` `[T][H]`) and those of the final state (`d_h`, `d_c` `[H]`).
pub fn lstm_backward(
    trace: &LstmTrace,
    weight_hh: &[f64],
    d_out: &[f64],
    d_h: &[f64],
    d_c: &[f64],
) -> SequenceGradient {
    let hidden = d_h.len();
    let mut d_gates = vec![0.0; trace.gates.len()];
    let (mut carry_h, mut carry_c) = (d_h.to_vec(), d_c.to_vec());
    for t in (0..d_out.len() / hidden).rev() {
        let now = t * 4 * hidden..(t + 1) * 4 * hidden;
        let [i, f, g, o] = split(&trace.gates[now.clone()]);
        let (c_previous, c) = (&trace.c[t * hidden..], &trace.c[(t + 1) * hidden..]);
        for j in 0..hidden {
            let tanh_c = libm::tanh(c[j]);
            let d_h = d_out[t * hidden + j] + carry_h[j];
            let d_c = carry_c[j] + d_h * o[j] * (1.0 - tanh_c * tanh_c);
            let gradients = [
                d_c * g[j] * i[j] * (1.0 - i[j]),
                d_c * c_previous[j] * f[j] * (1.0 - f[j]),
                d_c * i[j] * (1.0 - g[j] * g[j]),
                d_h * tanh_c * o[j] * (1.0 - o[j]),
            ];
            for (gate, gradient) in gradients.into_iter().enumerate() {
                d_gates[now.start + gate * hidden + j] = gradient;
            }
            carry_c[j] = d_c * f[j];
        }
        carry_h.fill(0.0);
        add_transposed_product(weight_hh, &d_gates[now], &mut carry_h);
    }
    SequenceGradient { d_x: d_gates.clone(), d_h: d_gates, d_h0: carry_h, d_c0: carry_c }
}

/// The place of g in the order i, f, g, o.
const CANDIDATE: usize = 2;

fn split(gates: &[f64]) -> [&[f64]; 4] {
    let hidden = gates.len() / 4;
    [0, 1, 2, 3].map(|gate| &gates[gate * hidden..(gate + 1) * hidden])
}
