//! The head of one row: what it sees of the recurrent layers, its predictions, and their gradient.

use super::algebra::{add, add_outer_product, add_transposed_product, affine};
use super::cell::State;
use super::stack::{Stack, StackTrace};

/// In the place of a target: the step has none, it is padding that is read.
pub const NO_TARGET: u32 = u32::MAX;

/// What the head sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// One prediction per valid step that has a target, from the last layer's outputs: targets are `[rows][T]`.
    EveryStep,
    /// One prediction per row, from the last layer's final h, both directions' side by side: targets are `[rows]`. No
    /// mask falls on it.
    Final,
}

/// What one prediction is worth.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// `-ln softmax(logits)[target]`, in nats.
    pub loss: f64,
    /// Whether the first largest logit is the target's.
    pub correct: bool,
    /// The loss's gradient, `softmax(logits) - onehot(target)`.
    pub d_logits: Vec<f64>,
}

/// The predictions of one row and the gradient of their summed loss.
#[derive(Clone, Debug)]
pub struct HeadGradient {
    /// In the order of the targets.
    pub predictions: Vec<Prediction>,
    /// `[V, D·R]`.
    pub d_weight: Vec<f64>,
    /// `[V]`.
    pub d_bias: Vec<f64>,
    /// `[T][D·R]`: of the stack's outputs.
    pub d_outputs: Vec<f64>,
    /// `[state]`: of the stack's final state.
    pub d_final_state: Vec<f64>,
}

/// The predictions of a row of `length` valid steps: `weight` is `[V, D·R]`, `bias` `[V]`.
pub fn head_forward_backward(
    head: Head,
    (weight, bias): (&[f64], &[f64]),
    stack: &Stack,
    (trace, length): (&StackTrace, usize),
    targets: &[u32],
) -> HeadGradient {
    let width = stack.output_size();
    let mut d_states = stack.by_layer(&vec![0.0; stack.state_size()]);
    let last = stack.layers.len() - 1;
    let mut all = HeadGradient {
        predictions: Vec::new(),
        d_weight: vec![0.0; weight.len()],
        d_bias: vec![0.0; bias.len()],
        d_outputs: vec![0.0; trace.outputs.len()],
        d_final_state: Vec::new(),
    };
    let mut predict = |features: &[f64], target: u32| {
        let prediction = cross_entropy(&affine(weight, bias, features), target as usize);
        let mut d_features = vec![0.0; width];
        add_transposed_product(weight, &prediction.d_logits, &mut d_features);
        add_outer_product(&prediction.d_logits, features, &mut all.d_weight);
        add(&mut all.d_bias, &prediction.d_logits);
        all.predictions.push(prediction);
        d_features
    };
    match head {
        Head::EveryStep => {
            let steps = trace.outputs.chunks_exact(width).zip(all.d_outputs.chunks_exact_mut(width));
            for ((features, d_features), &target) in steps.zip(targets).take(length) {
                if target != NO_TARGET {
                    d_features.copy_from_slice(&predict(features, target));
                }
            }
        }
        Head::Final => {
            let states = &stack.by_layer(&trace.final_state)[last];
            let features: Vec<f64> = states.iter().flat_map(|state| &state.h).copied().collect();
            let d_features = predict(&features, targets[0]);
            for (state, d_h) in d_states[last].iter_mut().zip(d_features.chunks_exact(width / states.len())) {
                state.h.copy_from_slice(d_h);
            }
        }
    }
    all.d_final_state = d_states.iter().flatten().flat_map(State::flat).collect();
    all
}

/// The cross-entropy of the softmax of `logits` `[V]` against a class.
pub fn cross_entropy(logits: &[f64], target: usize) -> Prediction {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| libm::exp(logit - max)).sum();
    let mut d_logits: Vec<f64> = logits.iter().map(|logit| libm::exp(logit - max) / sum).collect();
    d_logits[target] -= 1.0;
    Prediction {
        loss: libm::log(sum) + max - logits[target],
        correct: logits.iter().position(|logit| *logit == max) == Some(target),
        d_logits,
    }
}
