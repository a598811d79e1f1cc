//! The tanh RNN of one row: `h_t = tanh(x_t + W_hh h_{t-1} + b_hh)`, where `x_t = W_ih input_t + b_ih`.

use super::sequence::{SequenceGradient, add_product, add_transposed_product};

/// What the forward pass of one row leaves for the backward pass.
#[derive(Clone, Debug)]
pub struct RnnTrace {
    /// `[T + 1][H]`, the initial state first.
    pub h: Vec<f64>,
}

/// Runs one row: `x` is `[T][H]`, `weight_hh` `[H, H]`, `bias_hh` and `h0` `[H]`.
pub fn rnn_forward(x: &[f64], weight_hh: &[f64], bias_hh: &[f64], h0: &[f64]) -> RnnTrace {
    let hidden = h0.len();
    let mut h = h0.to_vec();
    for x in x.chunks_exact(hidden) {
        let mut pre = bias_hh.to_vec();
        add_product(weight_hh, &h[h.len() - hidden..], &mut pre);
        h.extend(pre.iter().zip(x).map(|(pre, x)| libm::tanh(pre + x)));
    }
    RnnTrace { h }
}

/// The gradient, given that of every output (`d_out` `[T][H]`) and that of the final state beside it (`d_h` `[H]`).
pub fn rnn_backward(trace: &RnnTrace, weight_hh: &[f64], d_out: &[f64], d_h: &[f64]) -> SequenceGradient {
    let hidden = d_h.len();
    let mut d_pre = vec![0.0; d_out.len()];
    let mut carry = d_h.to_vec();
    for t in (0..d_out.len() / hidden).rev() {
        let now = t * hidden..(t + 1) * hidden;
        let h = &trace.h[(t + 1) * hidden..];
        for j in 0..hidden {
            d_pre[t * hidden + j] = (d_out[t * hidden + j] + carry[j]) * (1.0 - h[j] * h[j]);
        }
        carry.fill(0.0);
        add_transposed_product(weight_hh, &d_pre[now], &mut carry);
    }
    SequenceGradient { d_x: d_pre.clone(), d_h: d_pre, d_h0: carry, d_c0: Vec::new() }
}
