//! The LSTM, gates in PyTorch's order i, f, g, o:
//! `c_t = clip(f·c_{t-1} + i·g)`, `m_t = o·tanh(c_t)`, `h_t = W_hr m_t`, with
//! `i = σ(x_i + y_i + p_i·c_{t-1})`, `f = σ(x_f + y_f + forget_bias + p_f·c_{t-1})`, `g = tanh(x_g + y_g)`,
//! `o = σ(x_o + y_o + p_o·c_t)`. Without peepholes p = 0, without a projection h = m.

use super::activation::RecurrentActivation;
use super::algebra::{add, add_outer_product, add_transposed_product, affine, parts};
use super::cell::{SequenceGradient, State, Trace};
use super::parameters::{Peepholes, Recurrent};

/// Options. Whether a run has peepholes and a projection is seen from the weights it is given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lstm {
    /// σ of the gates i, f, o.
    pub recurrent_activation: RecurrentActivation,
    /// Added to f's sum at every step; the stored biases do not contain it.
    pub forget_bias: f64,
    /// Diagonal weights from the cell state to the gates.
    pub peepholes: bool,
    /// Largest size of a cell state; the gradient outside is zero.
    pub cell_clip: Option<f64>,
    /// Width of h where it is not `H`.
    pub projection: Option<usize>,
}

/// The gates of one step, or their gradients: `[H]` each.
struct Gates {
    i: Vec<f64>,
    f: Vec<f64>,
    g: Vec<f64>,
    o: Vec<f64>,
}

impl Lstm {
    /// As PyTorch's: sigmoid gates and none of the options.
    pub const PLAIN: Lstm = Lstm {
        recurrent_activation: RecurrentActivation::Sigmoid,
        forget_bias: 0.0,
        peepholes: false,
        cell_clip: None,
        projection: None,
    };
}

/// Runs over `x` `[T][4·H]`; `weight_hh` is `[4·H, R]`, `weight_hr` `[R, H]`, a peephole `[H]`.
pub fn lstm_forward(options: Lstm, x: &[f64], weights: &Recurrent<&[f64]>, start: &State) -> Trace {
    let hidden = start.c.len();
    let (mut gates, mut h, mut c) = (Vec::new(), start.h.clone(), start.c.clone());
    let mut end = start.clone();
    for x in x.chunks_exact(4 * hidden) {
        let y = affine(weights.weight_hh, weights.bias_hh, &end.h);
        let pre: Vec<f64> = x.iter().zip(y).map(|(x, y)| x + y).collect();
        let [pre_i, pre_f, pre_g, pre_o] = parts(&pre);
        let sigma = |x: f64| options.recurrent_activation.value(x);
        let mut now = Gates::zeros(hidden);
        let mut m = vec![0.0; hidden];
        for j in 0..hidden {
            let (p, c) = (weights.peepholes_of(j), &mut end.c[j]);
            now.i[j] = sigma(pre_i[j] + p.i * *c);
            now.f[j] = sigma(pre_f[j] + options.forget_bias + p.f * *c);
            now.g[j] = libm::tanh(pre_g[j]);
            let unclipped = now.f[j] * *c + now.i[j] * now.g[j];
            *c = options.cell_clip.map_or(unclipped, |limit| unclipped.clamp(-limit, limit));
            now.o[j] = sigma(pre_o[j] + p.o * *c);
            m[j] = now.o[j] * libm::tanh(*c);
        }
        end.h = match weights.weight_hr {
            Some(weight_hr) => affine(weight_hr, &vec![0.0; start.h.len()], &m),
            None => m,
        };
        gates.extend(now.in_order());
        h.extend(&end.h);
        c.extend(&end.c);
    }
    Trace { gates, h, c, end }
}

/// The gradient, given that of every output (`d_out` `[T][R]`) and that of the end beside it.
pub fn lstm_backward(
    options: Lstm,
    trace: &Trace,
    weights: &Recurrent<&[f64]>,
    d_out: &[f64],
    d_end: &State,
) -> SequenceGradient {
    let (hidden, width) = (d_end.c.len(), d_end.h.len());
    let mut d_gates = vec![0.0; trace.gates.len()];
    let mut carry = d_end.clone();
    let mut recurrent = weights.zeros();
    for t in (0..d_out.len() / width).rev() {
        let now = t * 4 * hidden..(t + 1) * 4 * hidden;
        let [i, f, g, o] = parts(&trace.gates[now.clone()]);
        let (c_previous, c) = (&trace.c[t * hidden..], &trace.c[(t + 1) * hidden..]);

        let mut d_h = carry.h;
        add(&mut d_h, &d_out[t * width..(t + 1) * width]);
        let d_m = match (weights.weight_hr, &mut recurrent.weight_hr) {
            (Some(weight_hr), Some(d_weight_hr)) => {
                let m: Vec<f64> = (0..hidden).map(|j| o[j] * libm::tanh(c[j])).collect();
                add_outer_product(&d_h, &m, d_weight_hr);
                let mut d_m = vec![0.0; hidden];
                add_transposed_product(weight_hr, &d_h, &mut d_m);
                d_m
            }
            _ => d_h,
        };

        let slope = |y: f64| options.recurrent_activation.slope(y);
        let mut d = Gates::zeros(hidden);
        for j in 0..hidden {
            let (p, tanh_c) = (weights.peepholes_of(j), libm::tanh(c[j]));
            d.o[j] = d_m[j] * tanh_c * slope(o[j]);
            let d_c = carry.c[j] + d_m[j] * o[j] * (1.0 - tanh_c * tanh_c) + d.o[j] * p.o;
            let unclipped = f[j] * c_previous[j] + i[j] * g[j];
            let outside = options.cell_clip.is_some_and(|limit| unclipped.abs() > limit);
            let d_unclipped = if outside { 0.0 } else { d_c };
            d.i[j] = d_unclipped * g[j] * slope(i[j]);
            d.f[j] = d_unclipped * c_previous[j] * slope(f[j]);
            d.g[j] = d_unclipped * i[j] * (1.0 - g[j] * g[j]);
            carry.c[j] = d_unclipped * f[j] + d.i[j] * p.i + d.f[j] * p.f;
            if let Some(Peepholes { i: d_i, f: d_f, o: d_o }) = &mut recurrent.peepholes {
                d_i[j] += d.i[j] * c_previous[j];
                d_f[j] += d.f[j] * c_previous[j];
                d_o[j] += d.o[j] * c[j];
            }
        }
        let d_pre = d.in_order();
        carry.h = vec![0.0; width];
        add_transposed_product(weights.weight_hh, &d_pre, &mut carry.h);
        add_outer_product(&d_pre, &trace.h[t * width..(t + 1) * width], &mut recurrent.weight_hh);
        add(&mut recurrent.bias_hh, &d_pre);
        d_gates[now].copy_from_slice(&d_pre);
    }
    SequenceGradient { d_x: d_gates.clone(), d_y: d_gates, d_start: carry, recurrent }
}

impl Gates {
    fn zeros(hidden: usize) -> Self {
        let zeros = vec![0.0; hidden];
        Self { i: zeros.clone(), f: zeros.clone(), g: zeros.clone(), o: zeros }
    }

    /// `[4·H]`.
    fn in_order(&self) -> Vec<f64> {
        let Self { i, f, g, o } = self;
        [&i[..], f, g, o].concat()
    }
}
