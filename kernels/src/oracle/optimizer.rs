//! The global clip, Adam and SGD with momentum, element by element.

/// Adam.
#[derive(Clone, Copy, Debug)]
pub struct Adam {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Keeps the quotient finite.
    pub epsilon: f64,
    /// Where ε is added.
    pub placement: EpsilonPlacement,
}

/// Where Adam's ε is added: to the root of the second moment after or before its bias is corrected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EpsilonPlacement {
    /// PyTorch: `lr · m̂ / (sqrt(v̂) + ε)`.
    AfterCorrection,
    /// TensorFlow's "epsilon hat": `lr · sqrt(1 - β2^t) / (1 - β1^t) · m / (sqrt(v) + ε)`.
    BeforeCorrection,
}

/// Stochastic gradient descent.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// Share of the velocity that stays; 0 for plain descent.
    pub momentum: f64,
}

/// `g · c / max(norm, c)` over the whole gradient; returns the norm before.
pub fn clip_by_global_norm(gradient: &mut [f64], clip_norm: f64) -> f64 {
    let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
    for g in gradient {
        *g *= clip_norm / norm.max(clip_norm);
    }
    norm
}

/// One Adam step; `step` counts from 1.
pub fn adam(options: Adam, step: u64, params: &mut [f64], gradient: &[f64], m: &mut [f64], v: &mut [f64]) {
    let Adam { lr, beta1, beta2, epsilon, placement } = options;
    let correction1 = 1.0 - libm::pow(beta1, step as f64);
    let correction2 = 1.0 - libm::pow(beta2, step as f64);
    for j in 0..params.len() {
        m[j] = beta1 * m[j] + (1.0 - beta1) * gradient[j];
        v[j] = beta2 * v[j] + (1.0 - beta2) * gradient[j] * gradient[j];
        params[j] -= match placement {
            EpsilonPlacement::AfterCorrection => {
                lr * (m[j] / correction1) / ((v[j] / correction2).sqrt() + epsilon)
            }
            EpsilonPlacement::BeforeCorrection => {
                lr * correction2.sqrt() / correction1 * m[j] / (v[j].sqrt() + epsilon)
            }
        };
    }
}

/// One step of `velocity = momentum · velocity + gradient`, `params -= lr · velocity`, as PyTorch's and TensorFlow's.
pub fn sgd(options: Sgd, params: &mut [f64], gradient: &[f64], velocity: &mut [f64]) {
    for j in 0..params.len() {
        velocity[j] = options.momentum * velocity[j] + gradient[j];
        params[j] -= options.lr * velocity[j];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        for placement in [EpsilonPlacement::AfterCorrection, EpsilonPlacement::BeforeCorrection] {
            let options = Adam { lr: 0.01, beta1: 0.9, beta2: 0.999, epsilon: 1e-10, placement };
            let (mut params, mut m, mut v) = ([1.0, 1.0], [0.0; 2], [0.0; 2]);
            adam(options, 1, &mut params, &[5.0, -0.25], &mut m, &mut v);
            assert!((params[0] - 0.99).abs() < 1e-9 && (params[1] - 1.01).abs() < 1e-9);
        }
    }

    #[test]
    fn a_steady_gradient_makes_sgd_faster_until_momentum_is_used_up() {
        let (mut params, mut velocity) = ([0.0], [0.0]);
        for want in [-1.0, -2.5, -4.25] {
            sgd(Sgd { lr: 1.0, momentum: 0.5 }, &mut params, &[1.0], &mut velocity);
            assert_eq!(params[0], want);
        }
    }
}
