//! The plain recurrent unit: `h_t = φ(x + y)`, φ = tanh or relu.

use super::activation::Activation;
use super::algebra::{add, add_outer_product, add_transposed_product, affine};
use super::cell::{SequenceGradient, State, Trace};
use super::parameters::Recurrent;

/// Options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rnn {
    /// φ.
    pub activation: Activation,
}

/// Runs over `x` `[T][H]`; `weight_hh` is `[H, H]`.
pub fn rnn_forward(options: Rnn, x: &[f64], weights: &Recurrent<&[f64]>, start: &State) -> Trace {
    let hidden = start.h.len();
    let mut h = start.h.clone();
    for x in x.chunks_exact(hidden) {
        let y = affine(weights.weight_hh, weights.bias_hh, &h[h.len() - hidden..]);
        h.extend(x.iter().zip(y).map(|(x, y)| options.activation.value(x + y)));
    }
    let end = State::of_h(h[h.len() - hidden..].to_vec());
    Trace { gates: Vec::new(), h, c: Vec::new(), end }
}

/// The gradient, given that of every output (`d_out` `[T][H]`) and that of the end beside it.
pub fn rnn_backward(
    options: Rnn,
    trace: &Trace,
    weights: &Recurrent<&[f64]>,
    d_out: &[f64],
    d_end: &State,
) -> SequenceGradient {
    let hidden = d_end.h.len();
    let mut d_pre = vec![0.0; d_out.len()];
    let mut carry = d_end.h.clone();
    let mut recurrent = weights.zeros();
    for t in (0..d_out.len() / hidden).rev() {
        let now = t * hidden..(t + 1) * hidden;
        let (h_previous, h) = (&trace.h[now.clone()], &trace.h[(t + 1) * hidden..]);
        for j in 0..hidden {
            d_pre[now.start + j] = (d_out[now.start + j] + carry[j]) * options.activation.slope(h[j]);
        }
        let d_pre = &d_pre[now];
        carry.fill(0.0);
        add_transposed_product(weights.weight_hh, d_pre, &mut carry);
        add_outer_product(d_pre, h_previous, &mut recurrent.weight_hh);
        add(&mut recurrent.bias_hh, d_pre);
    }
    SequenceGradient { d_x: d_pre.clone(), d_y: d_pre, d_start: State::of_h(carry), recurrent }
}
