//! The GRU, gates in PyTorch's order r, z, n: `r, z = σ(x + y)`, `h_t = (1 - z)·n + z·h_{t-1}`, and
//! - reset after the product (PyTorch, cuDNN, Keras `reset_after`): `n = tanh(x_n + r·(W_hn h_{t-1} + b_hn))`;
//! - reset before it (TensorFlow, Keras without `reset_after`): `n = tanh(x_n + W_hn (r·h_{t-1}) + b_hn)`.

use super::activation::RecurrentActivation;
use super::algebra::{add, add_outer_product, add_transposed_product, affine, hadamard, parts};
use super::cell::{SequenceGradient, State, Trace};
use super::parameters::Recurrent;

/// Options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gru {
    /// σ of the gates r and z.
    pub recurrent_activation: RecurrentActivation,
    /// Where r acts.
    pub reset: Reset,
}

/// Where the reset gate acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// On the state, before the product with `W_hn`.
    Before,
    /// On the product and its bias.
    After,
}

/// The rows of `weight_hh` or `bias_hh` by gate.
struct ByGate<'a> {
    r: &'a [f64],
    z: &'a [f64],
    n: &'a [f64],
}

impl Gru {
    /// As PyTorch's: sigmoid gates, reset after the product.
    pub const PLAIN: Gru = Gru { recurrent_activation: RecurrentActivation::Sigmoid, reset: Reset::After };
}

/// Runs over `x` `[T][3·H]`; `weight_hh` is `[3·H, H]`.
pub fn gru_forward(options: Gru, x: &[f64], weights: &Recurrent<&[f64]>, start: &State) -> Trace {
    let hidden = start.h.len();
    let (weight, bias) = (by_gate(weights.weight_hh), by_gate(weights.bias_hh));
    let (mut gates, mut h) = (Vec::new(), start.h.clone());
    for x in x.chunks_exact(3 * hidden) {
        let h_previous = h[h.len() - hidden..].to_vec();
        let x = by_gate(x);
        let gate = |x: &[f64], weight: &[f64], bias: &[f64]| -> Vec<f64> {
            let y = affine(weight, bias, &h_previous);
            x.iter().zip(y).map(|(x, y)| options.recurrent_activation.value(x + y)).collect()
        };
        let r = gate(x.r, weight.r, bias.r);
        let z = gate(x.z, weight.z, bias.z);
        let (q, n): (_, Vec<f64>) = match options.reset {
            Reset::After => {
                let q = affine(weight.n, bias.n, &h_previous);
                let n = (0..hidden).map(|j| libm::tanh(x.n[j] + r[j] * q[j])).collect();
                (q, n)
            }
            Reset::Before => {
                let q = affine(weight.n, bias.n, &hadamard(&r, &h_previous));
                let n = (0..hidden).map(|j| libm::tanh(x.n[j] + q[j])).collect();
                (q, n)
            }
        };
        h.extend((0..hidden).map(|j| (1.0 - z[j]) * n[j] + z[j] * h_previous[j]));
        gates.extend([r, z, n, q].concat());
    }
    let end = State::of_h(h[h.len() - hidden..].to_vec());
    Trace { gates, h, c: Vec::new(), end }
}

/// The gradient, given that of every output (`d_out` `[T][H]`) and that of the end beside it.
pub fn gru_backward(
    options: Gru,
    trace: &Trace,
    weights: &Recurrent<&[f64]>,
    d_out: &[f64],
    d_end: &State,
) -> SequenceGradient {
    let hidden = d_end.h.len();
    let weight = by_gate(weights.weight_hh);
    let steps = d_out.len() / hidden;
    let (mut d_x, mut d_y) = (vec![0.0; steps * 3 * hidden], vec![0.0; steps * 3 * hidden]);
    let mut carry = d_end.h.clone();
    let mut recurrent = weights.zeros();
    for t in (0..steps).rev() {
        let now = t * 3 * hidden..(t + 1) * 3 * hidden;
        let [r, z, n, q] = parts(&trace.gates[t * 4 * hidden..(t + 1) * 4 * hidden]);
        let h_previous = &trace.h[t * hidden..(t + 1) * hidden];
        let slope = |y: f64| options.recurrent_activation.slope(y);

        let mut d_h = carry;
        add(&mut d_h, &d_out[t * hidden..(t + 1) * hidden]);
        let d_z: Vec<f64> = (0..hidden).map(|j| d_h[j] * (h_previous[j] - n[j]) * slope(z[j])).collect();
        let d_n: Vec<f64> = (0..hidden).map(|j| d_h[j] * (1.0 - z[j]) * (1.0 - n[j] * n[j])).collect();
        carry = hadamard(&d_h, z);

        // What W_hn multiplied, the gradient of its product, and that of r.
        let (multiplied, d_q, d_r): (_, _, Vec<f64>) = match options.reset {
            Reset::After => {
                let d_q = hadamard(&d_n, r);
                add_transposed_product(weight.n, &d_q, &mut carry);
                (h_previous.to_vec(), d_q, (0..hidden).map(|j| d_n[j] * q[j] * slope(r[j])).collect())
            }
            Reset::Before => {
                let mut d_multiplied = vec![0.0; hidden];
                add_transposed_product(weight.n, &d_n, &mut d_multiplied);
                add(&mut carry, &hadamard(&d_multiplied, r));
                let d_r = (0..hidden).map(|j| d_multiplied[j] * h_previous[j] * slope(r[j])).collect();
                (hadamard(r, h_previous), d_n.clone(), d_r)
            }
        };
        add_transposed_product(weight.r, &d_r, &mut carry);
        add_transposed_product(weight.z, &d_z, &mut carry);

        let (d_gates, d_weight_n) = recurrent.weight_hh.split_at_mut(2 * hidden * hidden);
        add_outer_product(&[&d_r[..], &d_z].concat(), h_previous, d_gates);
        add_outer_product(&d_q, &multiplied, d_weight_n);
        d_x[now.clone()].copy_from_slice(&[&d_r[..], &d_z, &d_n].concat());
        d_y[now.clone()].copy_from_slice(&[&d_r[..], &d_z, &d_q].concat());
        add(&mut recurrent.bias_hh, &d_y[now]);
    }
    SequenceGradient { d_x, d_y, d_start: State::of_h(carry), recurrent }
}

fn by_gate(whole: &[f64]) -> ByGate<'_> {
    let [r, z, n] = parts(whole);
    ByGate { r, z, n }
}
