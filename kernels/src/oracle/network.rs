//! A whole network in f64: stacked recurrent layers, a linear head, the summed cross-entropy, its gradient, the global
//! clip and Adam.
//!
//! Parameters are one flat slice in PyTorch's order: per layer `weight_ih [G·H, in]`, `weight_hh [G·H, H]`,
//! `bias_ih [G·H]`, `bias_hh [G·H]`; then `head.weight [V, H]`, `head.bias [V]`.

use super::gru::{GruTrace, gru_backward, gru_forward};
use super::lstm::{LstmTrace, lstm_backward, lstm_forward};
use super::rnn::{RnnTrace, rnn_backward, rnn_forward};
use super::sequence::{SequenceGradient, add, add_outer_product, add_product, add_transposed_product};
use std::ops::Range;

/// The recurrent cell of every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// tanh RNN, one gate.
    Rnn,
    /// LSTM, gates i, f, g, o.
    Lstm,
    /// GRU with the reset after the product, gates r, z, n.
    Gru,
}

/// Which hidden states of the last layer the head sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// One prediction per step: targets are `[rows][T]`.
    EveryStep,
    /// One prediction per row, from the state after the last step: targets are `[rows]`.
    Final,
}

/// The input of a batch.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// `[rows][T]` token ids below `input_size`: one-hot vectors.
    Tokens(&'a [u32]),
    /// `[rows][T][input_size]`.
    Dense(&'a [f64]),
}

/// The architecture.
#[derive(Clone, Debug)]
pub struct Network {
    /// The cell of every layer.
    pub cell: Cell,
    /// Number of stacked layers, at least 1.
    pub num_layers: usize,
    /// Width of the input, or number of distinct tokens.
    pub input_size: usize,
    /// Width of every layer.
    pub hidden_size: usize,
    /// Number of classes.
    pub classes: usize,
    /// Where the head sits.
    pub head: Head,
}

/// What one batch yields.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The sum, not the mean, of the predictions' cross-entropies, in nats.
    pub loss_sum: f64,
    /// Predictions whose first largest logit is the target's.
    pub correct: usize,
    /// `[P]`: the gradient of `loss_sum`.
    pub gradient: Vec<f64>,
    /// `[rows][state]`: per layer h, then (LSTM) c, after the last step.
    pub final_state: Vec<f64>,
}

impl Cell {
    /// Gates, `G`.
    pub fn gates(self) -> usize {
        match self {
            Cell::Rnn => 1,
            Cell::Lstm => 4,
            Cell::Gru => 3,
        }
    }
}

/// Where one layer's tensors lie in the flat slice.
struct LayerPlace {
    weight_ih: Range<usize>,
    weight_hh: Range<usize>,
    bias_ih: Range<usize>,
    bias_hh: Range<usize>,
}

enum Trace {
    Rnn(RnnTrace),
    Lstm(LstmTrace),
    Gru(GruTrace),
}

impl Network {
    /// Number of parameters, `P`.
    pub fn parameter_count(&self) -> usize {
        self.places().2.end
    }

    /// Elements of one row's recurrent state.
    pub fn state_size(&self) -> usize {
        self.num_layers * self.layer_state_size()
    }

    /// Forward and backward over `rows` rows of `seq_len` steps from `initial_state` (`[rows][state]`, laid out as
    /// [`Outcome::final_state`]).
    pub fn forward_backward(
        &self,
        params: &[f64],
        input: Input<'_>,
        targets: &[u32],
        rows: usize,
        seq_len: usize,
        initial_state: &[f64],
    ) -> Outcome {
        assert_eq!(params.len(), self.parameter_count());
        assert_eq!(initial_state.len(), rows * self.state_size());
        let mut outcome =
            Outcome { loss_sum: 0.0, correct: 0, gradient: vec![0.0; params.len()], final_state: Vec::new() };
        let predictions = targets.len() / rows;
        for row in 0..rows {
            let inputs = self.dense_row(input, row, seq_len);
            let targets = &targets[row * predictions..(row + 1) * predictions];
            let state = &initial_state[row * self.state_size()..(row + 1) * self.state_size()];
            self.row(params, inputs, targets, state, &mut outcome);
        }
        outcome
    }

    fn row(&self, params: &[f64], inputs: Vec<f64>, targets: &[u32], state: &[f64], outcome: &mut Outcome) {
        let hidden = self.hidden_size;
        let (layers, head_weight, head_bias) = self.places();
        let seq_len = inputs.len() / self.input_size;

        let mut layer_inputs = vec![inputs];
        let mut traces = Vec::new();
        for (place, state) in layers.iter().zip(state.chunks_exact(self.layer_state_size())) {
            let trace = self.layer_forward(params, place, &layer_inputs[traces.len()], state);
            layer_inputs.push(trace.h()[hidden..].to_vec());
            outcome.final_state.extend(&trace.h()[seq_len * hidden..]);
            if let Trace::Lstm(trace) = &trace {
                outcome.final_state.extend(&trace.c[seq_len * hidden..]);
            }
            traces.push(trace);
        }

        let mut d_out = vec![0.0; seq_len * hidden];
        for (prediction, &target) in targets.iter().enumerate() {
            let t = match self.head {
                Head::EveryStep => prediction,
                Head::Final => seq_len - 1,
            };
            let now = t * hidden..(t + 1) * hidden;
            let output = &layer_inputs[self.num_layers][now.clone()];
            let mut logits = params[head_bias.clone()].to_vec();
            add_product(&params[head_weight.clone()], output, &mut logits);
            let d_logits = cross_entropy(&logits, target as usize, outcome);
            add_outer_product(&d_logits, output, &mut outcome.gradient[head_weight.clone()]);
            add(&mut outcome.gradient[head_bias.clone()], &d_logits);
            add_transposed_product(&params[head_weight.clone()], &d_logits, &mut d_out[now]);
        }

        for (layer, place) in layers.iter().enumerate().rev() {
            let zeros = vec![0.0; hidden];
            let weight_hh = &params[place.weight_hh.clone()];
            let gradient = match &traces[layer] {
                Trace::Rnn(trace) => rnn_backward(trace, weight_hh, &d_out, &zeros),
                Trace::Lstm(trace) => lstm_backward(trace, weight_hh, &d_out, &zeros, &zeros),
                Trace::Gru(trace) => gru_backward(trace, weight_hh, &d_out, &zeros),
            };
            let inputs = &layer_inputs[layer];
            d_out = self.layer_backward(
                params,
                place,
                inputs,
                traces[layer].h(),
                &gradient,
                &mut outcome.gradient,
            );
        }
    }

    fn layer_forward(&self, params: &[f64], place: &LayerPlace, inputs: &[f64], state: &[f64]) -> Trace {
        let bias_ih = &params[place.bias_ih.clone()];
        let width = place.weight_ih.len() / bias_ih.len();
        let mut x = Vec::new();
        for input in inputs.chunks_exact(width) {
            let mut part = bias_ih.to_vec();
            add_product(&params[place.weight_ih.clone()], input, &mut part);
            x.extend(part);
        }
        let (weight_hh, bias_hh) = (&params[place.weight_hh.clone()], &params[place.bias_hh.clone()]);
        let (h0, c0) = state.split_at(self.hidden_size);
        match self.cell {
            Cell::Rnn => Trace::Rnn(rnn_forward(&x, weight_hh, bias_hh, h0)),
            Cell::Lstm => Trace::Lstm(lstm_forward(&x, weight_hh, bias_hh, h0, c0)),
            Cell::Gru => Trace::Gru(gru_forward(&x, weight_hh, bias_hh, h0)),
        }
    }

    /// Adds the layer's weight gradients; returns that of its inputs, `[T][in]`.
    fn layer_backward(
        &self,
        params: &[f64],
        place: &LayerPlace,
        inputs: &[f64],
        h: &[f64],
        gradient: &SequenceGradient,
        total: &mut [f64],
    ) -> Vec<f64> {
        let gates = self.cell.gates() * self.hidden_size;
        let width = place.weight_ih.len() / gates;
        let mut d_inputs = vec![0.0; inputs.len()];
        for (t, (d_x, d_h)) in
            gradient.d_x.chunks_exact(gates).zip(gradient.d_h.chunks_exact(gates)).enumerate()
        {
            let now = t * width..(t + 1) * width;
            let h_previous = &h[t * self.hidden_size..(t + 1) * self.hidden_size];
            add_outer_product(d_x, &inputs[now.clone()], &mut total[place.weight_ih.clone()]);
            add_outer_product(d_h, h_previous, &mut total[place.weight_hh.clone()]);
            add(&mut total[place.bias_ih.clone()], d_x);
            add(&mut total[place.bias_hh.clone()], d_h);
            add_transposed_product(&params[place.weight_ih.clone()], d_x, &mut d_inputs[now]);
        }
        d_inputs
    }

    fn dense_row(&self, input: Input<'_>, row: usize, seq_len: usize) -> Vec<f64> {
        match input {
            Input::Dense(values) => {
                let len = seq_len * self.input_size;
                values[row * len..(row + 1) * len].to_vec()
            }
            Input::Tokens(tokens) => {
                let mut one_hot = vec![0.0; seq_len * self.input_size];
                for t in 0..seq_len {
                    one_hot[t * self.input_size + tokens[row * seq_len + t] as usize] = 1.0;
                }
                one_hot
            }
        }
    }

    fn layer_state_size(&self) -> usize {
        match self.cell {
            Cell::Rnn | Cell::Gru => self.hidden_size,
            Cell::Lstm => 2 * self.hidden_size,
        }
    }

    /// The layers' tensors, `head.weight` and `head.bias`.
    fn places(&self) -> (Vec<LayerPlace>, Range<usize>, Range<usize>) {
        let mut end = 0;
        let mut next = |len: usize| {
            end += len;
            end - len..end
        };
        let gates = self.cell.gates() * self.hidden_size;
        let layers = (0..self.num_layers)
            .map(|layer| LayerPlace {
                weight_ih: next(gates * if layer == 0 { self.input_size } else { self.hidden_size }),
                weight_hh: next(gates * self.hidden_size),
                bias_ih: next(gates),
                bias_hh: next(gates),
            })
            .collect();
        (layers, next(self.classes * self.hidden_size), next(self.classes))
    }
}

impl Trace {
    fn h(&self) -> &[f64] {
        match self {
            Trace::Rnn(trace) => &trace.h,
            Trace::Lstm(trace) => &trace.h,
            Trace::Gru(trace) => &trace.h,
        }
    }
}

/// Adds the loss and the hit of one prediction to `outcome`; returns `softmax(logits) - onehot(target)`.
fn cross_entropy(logits: &[f64], target: usize, outcome: &mut Outcome) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| libm::exp(logit - max)).sum();
    outcome.loss_sum += libm::log(sum) + max - logits[target];
    outcome.correct += usize::from(logits.iter().position(|logit| *logit == max) == Some(target));
    let mut d_logits: Vec<f64> = logits.iter().map(|logit| libm::exp(logit - max) / sum).collect();
    d_logits[target] -= 1.0;
    d_logits
}

/// `g · c / max(norm, c)` over the whole gradient; returns the norm before.
pub fn clip_by_global_norm(gradient: &mut [f64], clip_norm: f64) -> f64 {
    let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
    for g in gradient {
        *g *= clip_norm / norm.max(clip_norm);
    }
    norm
}

/// Adam with PyTorch's ε, outside the bias correction of v: step `step` counts from 1.
#[derive(Clone, Copy, Debug)]
pub struct Adam {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the corrected root.
    pub epsilon: f64,
}

/// One Adam step, element by element.
pub fn adam(options: Adam, step: u64, params: &mut [f64], gradient: &[f64], m: &mut [f64], v: &mut [f64]) {
    let Adam { lr, beta1, beta2, epsilon } = options;
    let correction1 = 1.0 - libm::pow(beta1, step as f64);
    let correction2 = 1.0 - libm::pow(beta2, step as f64);
    for j in 0..params.len() {
        m[j] = beta1 * m[j] + (1.0 - beta1) * gradient[j];
        v[j] = beta2 * v[j] + (1.0 - beta2) * gradient[j] * gradient[j];
        params[j] -= lr * (m[j] / correction1) / ((v[j] / correction2).sqrt() + epsilon);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, scale: f64, salt: u64) -> Vec<f64> {
        (0..len as u64)
            .map(|at| {
                let bits = protocol::random::mix64(at ^ (salt << 32));
                scale * ((bits >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
            })
            .collect()
    }

    #[test]
    fn gradients_equal_central_differences() {
        let (rows, seq_len) = (2, 3);
        let mut largest = 0.0f64;
        for cell in [Cell::Rnn, Cell::Lstm, Cell::Gru] {
            for (head, num_layers) in [(Head::EveryStep, 2), (Head::Final, 1), (Head::Final, 3)] {
                for one_hot in [false, true] {
                    let network =
                        Network { cell, num_layers, input_size: 3, hidden_size: 4, classes: 5, head };
                    let params = numbers(network.parameter_count(), 0.8, 1);
                    let state = numbers(rows * network.state_size(), 0.5, 2);
                    let dense = numbers(rows * seq_len * 3, 1.0, 3);
                    let input =
                        if one_hot { Input::Tokens(&[0, 2, 1, 1, 0, 0]) } else { Input::Dense(&dense) };
                    let targets: &[u32] = match head {
                        Head::EveryStep => &[4, 0, 2, 1, 1, 3],
                        Head::Final => &[3, 0],
                    };
                    let run = |params: &[f64]| {
                        network.forward_backward(params, input, targets, rows, seq_len, &state)
                    };
                    let got = run(&params).gradient;
                    let scale = got.iter().fold(0.0f64, |scale, g| scale.max(g.abs()));
                    for at in 0..params.len() {
                        let moved = |by: f64| {
                            let mut params = params.clone();
                            params[at] += by;
                            run(&params).loss_sum
                        };
                        // Fourth order: the error of the plain central difference would hide a small fault.
                        let step = 1e-3;
                        let near = moved(step) - moved(-step);
                        let far = moved(2.0 * step) - moved(-2.0 * step);
                        let want = (8.0 * near - far) / (12.0 * step);
                        largest = largest.max((got[at] - want).abs() / scale);
                    }
                }
            }
        }
        println!("oracle against finite differences: largest relative error {largest:.3e}");
        assert!(largest <= 1e-7);
    }

    #[test]
    fn windows_with_carried_state_equal_one_long_run() {
        for cell in [Cell::Rnn, Cell::Lstm, Cell::Gru] {
            let network = Network {
                cell,
                num_layers: 2,
                input_size: 3,
                hidden_size: 4,
                classes: 5,
                head: Head::EveryStep,
            };
            let params = numbers(network.parameter_count(), 0.8, 4);
            let state = vec![0.0; network.state_size()];
            let (tokens, targets) = ([0, 2, 1, 1, 2, 0], [4, 0, 2, 1, 1, 3]);
            let whole = network.forward_backward(&params, Input::Tokens(&tokens), &targets, 1, 6, &state);
            let first =
                network.forward_backward(&params, Input::Tokens(&tokens[..2]), &targets[..2], 1, 2, &state);
            let second = network.forward_backward(
                &params,
                Input::Tokens(&tokens[2..]),
                &targets[2..],
                1,
                4,
                &first.final_state,
            );
            assert!((first.loss_sum + second.loss_sum - whole.loss_sum).abs() < 1e-12);
            assert_eq!(second.final_state, whole.final_state);
        }
    }

    #[test]
    fn clip_scales_to_the_norm_and_leaves_short_gradients() {
        let mut gradient = [3.0, 4.0];
        assert_eq!(clip_by_global_norm(&mut gradient, 2.5), 5.0);
        assert_eq!(gradient, [1.5, 2.0]);
        assert_eq!(clip_by_global_norm(&mut gradient, 5.0), 2.5);
        assert_eq!(gradient, [1.5, 2.0]);
    }

    #[test]
    fn the_first_adam_step_moves_by_the_learning_rate() {
        let options = Adam { lr: 0.01, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
        let (mut params, mut m, mut v) = ([1.0, 1.0], [0.0; 2], [0.0; 2]);
        adam(options, 1, &mut params, &[5.0, -0.25], &mut m, &mut v);
        assert!((params[0] - 0.99).abs() < 1e-9 && (params[1] - 1.01).abs() < 1e-9);
    }
}
