//! The global norm, Adam and gradient descent with momentum, over flat f32 buffers.

use super::simd::{LANES, Simd, map_units, simd_kernel};
use protocol::job::EpsilonPlacement;

/// Elements of a leaf of [`squared_norm`]'s tree. A constant of the result's bits.
pub const NORM_BLOCK: usize = 4096;
/// Below this a second thread costs more than it saves.
const PARALLEL_LEN: usize = 64 * NORM_BLOCK;

/// `Σ g²` in f64, for the global norm.
///
/// | arg | shape | in/out |
/// |---|---|---|
/// | `g` | `[P]` | in |
///
/// Cost: one sweep; long buffers are shared among rayon's threads. Numerics: within a block of 4096 elements, element
/// j goes to lane j mod 16 and the lanes are joined by a fixed tree; blocks are joined by `block_tree` over the block
/// index. Which thread sums which block changes no bit. NaN and infinity come through. Reference: the sum in order,
/// in the tests.
pub fn squared_norm(simd: Simd, g: &[f32]) -> f64 {
    block_tree(g, &|block| squared_norm_block(simd, block))
}

/// Joins the blocks' sums: a range of n blocks is (its first 2^k blocks, 2^k the largest power below n) + (the rest).
fn block_tree(g: &[f32], leaf: &(impl Fn(&[f32]) -> f64 + Sync)) -> f64 {
    if g.len() <= NORM_BLOCK {
        return leaf(g);
    }
    let blocks = g.len().div_ceil(NORM_BLOCK);
    let (left, right) = g.split_at(blocks.next_power_of_two() / 2 * NORM_BLOCK);
    if g.len() < PARALLEL_LEN {
        block_tree(left, leaf) + block_tree(right, leaf)
    } else {
        let (left, right) = rayon::join(|| block_tree(left, leaf), || block_tree(right, leaf));
        left + right
    }
}

simd_kernel! {
    /// `Σ g²` of one block of at most [`NORM_BLOCK`] elements.
    fn squared_norm_block(simd: Simd, g: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (blocks, rest) = g.as_chunks::<LANES>();
        for block in blocks {
            for lane in 0..LANES {
                let g = f64::from(block[lane]);
                lanes[lane] = g.mul_add(g, lanes[lane]);
            }
        }
        for lane in 0..rest.len() {
            let g = f64::from(rest[lane]);
            lanes[lane] = g.mul_add(g, lanes[lane]);
        }
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
            half /= 2;
        }
        lanes[0]
    }
}

simd_kernel! {
    /// `x *= factor`, element by element.
    pub fn scale(simd: Simd, factor: f32, x: &mut [f32]) {
        for x in x {
            *x *= factor;
        }
    }
}

/// Adam's options, as a job states them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamOptions {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Keeps the quotient finite.
    pub epsilon: f64,
    /// Where it stands.
    pub placement: EpsilonPlacement,
}

/// The numbers of one Adam step, rounded to f32 once and then used for every element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamStep {
    /// The gradient is multiplied by this first: clip factor over weight.
    pub gradient_scale: f32,
    /// β1.
    pub beta1: f32,
    /// 1 - β1.
    pub one_minus_beta1: f32,
    /// β2.
    pub beta2: f32,
    /// 1 - β2.
    pub one_minus_beta2: f32,
    /// lr / (1 - β1^t).
    pub step_size: f32,
    /// 1 / sqrt(1 - β2^t).
    pub root_correction: f32,
    /// ε, as it is added to the corrected root.
    pub epsilon: f32,
}

impl AdamStep {
    /// The numbers of step `step`, counted from 1. Computed in f64 with `libm::pow`, which is the same code on every
    /// machine.
    pub fn new(options: AdamOptions, step: u64, gradient_scale: f32) -> AdamStep {
        assert!(step > 0, "AdamStep: steps count from 1");
        let AdamOptions { lr, beta1, beta2, epsilon, placement } = options;
        let correction1 = 1.0 - libm::pow(beta1, step as f64);
        let root2 = (1.0 - libm::pow(beta2, step as f64)).sqrt();
        let epsilon = match placement {
            EpsilonPlacement::AfterCorrection => epsilon,
            // m / (sqrt(v) + ε) · root2 = m / (sqrt(v) / root2 + ε / root2)
            EpsilonPlacement::BeforeCorrection => epsilon / root2,
        };
        AdamStep {
            gradient_scale,
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (lr / correction1) as f32,
            root_correction: (1.0 / root2) as f32,
            epsilon: epsilon as f32,
        }
    }
}

simd_kernel! {
    /// One Adam step, element by element: `g = s·grad`, `m = β1·m + (1-β1)·g`, `v = β2·v + (1-β2)·g²`,
    /// `w -= lr/(1-β1^t) · m / (sqrt(v)/sqrt(1-β2^t) + ε)`.
    ///
    /// | arg | shape | in/out | notes |
    /// |---|---|---|---|
    /// | `step` | | in | [`AdamStep::new`] |
    /// | `params`, `m`, `v` | `[P]` | in and out | |
    /// | `grad` | `[P]` | in | the sum; `gradient_scale` makes it the clipped mean |
    ///
    /// Elements are independent: a caller may split the buffers over threads anywhere.
    /// Cost: 28 bytes and one root and one quotient per element. Numerics: each moment is one fused multiply-add.
    /// Reference: `oracle::optimizer::adam`.
    pub fn adam_update(
        simd: Simd,
        step: &AdamStep,
        params: &mut [f32],
        grad: &[f32],
        m: &mut [f32],
        v: &mut [f32],
    ) {
        // A copy, so that no store to the buffers can be thought to change it.
        let step = *step;
        map_units([grad], [params, m, v], move |grad, state| adam_unit(&step, grad, state));
    }
}

#[inline(always)]
fn adam_unit(step: &AdamStep, [grad]: [f32; 1], [w, m, v]: [f32; 3]) -> [f32; 3] {
    let g = grad * step.gradient_scale;
    let m = step.beta1.mul_add(m, step.one_minus_beta1 * g);
    let v = step.beta2.mul_add(v, step.one_minus_beta2 * (g * g));
    let denominator = v.sqrt().mul_add(step.root_correction, step.epsilon);
    [(-step.step_size).mul_add(m / denominator, w), m, v]
}

/// The numbers of one step of gradient descent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdStep {
    /// The gradient is multiplied by this first: clip factor over weight.
    pub gradient_scale: f32,
    /// Learning rate.
    pub learning_rate: f32,
    /// Share of the velocity that stays; 0 for plain descent.
    pub momentum: f32,
}

simd_kernel! {
    /// One step of gradient descent, element by element: `v = momentum·v + s·grad`, `w -= lr·v`.
    ///
    /// | arg | shape | in/out | notes |
    /// |---|---|---|---|
    /// | `params`, `velocity` | `[P]` | in and out | |
    /// | `grad` | `[P]` | in | the sum; `gradient_scale` makes it the clipped mean |
    ///
    /// Elements are independent: a caller may split the buffers over threads anywhere.
    /// Cost: 20 bytes per element. Numerics: velocity and parameter are one fused multiply-add each.
    /// Reference: `oracle::optimizer::sgd`.
    pub fn sgd_update(simd: Simd, step: &SgdStep, params: &mut [f32], grad: &[f32], velocity: &mut [f32]) {
        // A copy, as for Adam.
        let step = *step;
        map_units([grad], [params, velocity], move |grad, state| sgd_unit(&step, grad, state));
    }
}

#[inline(always)]
fn sgd_unit(step: &SgdStep, [grad]: [f32; 1], [w, velocity]: [f32; 2]) -> [f32; 2] {
    let velocity = step.momentum.mul_add(velocity, grad * step.gradient_scale);
    [(-step.learning_rate).mul_add(velocity, w), velocity]
}

#[cfg(test)]
mod tests {
    use super::super::sequence::tests::{bits, distance, numbers, widen};
    use super::*;
    use crate::oracle::optimizer as oracle;

    #[test]
    fn the_norm_has_the_same_bits_on_any_number_of_threads_and_level() {
        for len in [0, 1, 15, 17, 4096, 4097, 50_000, 1_000_003] {
            let g = numbers(len, 1.0, 1);
            let exact: f64 = g.iter().map(|g| f64::from(*g) * f64::from(*g)).sum();
            let got = squared_norm(Simd::detect(), &g);
            assert!((got - exact).abs() <= 1e-12 * exact, "{len}: {got} against {exact}");
            for simd in Simd::available() {
                for threads in [1, 2, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    assert_eq!(pool.install(|| squared_norm(simd, &g)).to_bits(), got.to_bits());
                }
            }
        }
    }

    #[test]
    fn the_norm_shows_a_bad_gradient_wherever_it_is() {
        for at in [0, 4095, 4096, 9_999] {
            let mut g = numbers(10_000, 1.0, 2);
            g[at] = f32::NAN;
            assert!(squared_norm(Simd::detect(), &g).is_nan());
            g[at] = f32::INFINITY;
            assert!(squared_norm(Simd::detect(), &g).is_infinite());
        }
        // The squares of finite f32 do not overflow in f64.
        assert!(squared_norm(Simd::detect(), &[f32::MAX; 100]).is_finite());
    }

    #[test]
    fn adam_follows_the_oracle_for_a_hundred_steps_at_every_level() {
        let len = 333;
        let start = numbers(len, 1.0, 3);
        for placement in [EpsilonPlacement::AfterCorrection, EpsilonPlacement::BeforeCorrection] {
            let options = AdamOptions { lr: 1e-2, beta1: 0.9, beta2: 0.999, epsilon: 1e-3, placement };
            let (mut want, mut want_m, mut want_v) = (widen(&start), vec![0.0; len], vec![0.0; len]);
            let mut runs: Vec<_> = Simd::available()
                .into_iter()
                .map(|simd| (simd, start.clone(), vec![0.0f32; len], vec![0.0f32; len]))
                .collect();
            for step in 1..=100 {
                let grad = numbers(len, 4.0, 100 + step);
                for (simd, params, m, v) in &mut runs {
                    adam_update(*simd, &AdamStep::new(options, step, 0.25), params, &grad, m, v);
                }
                let scaled: Vec<f64> = grad.iter().map(|g| f64::from(*g) * 0.25).collect();
                let options = oracle::Adam {
                    lr: options.lr,
                    beta1: options.beta1,
                    beta2: options.beta2,
                    epsilon: options.epsilon,
                    placement: match placement {
                        EpsilonPlacement::AfterCorrection => oracle::EpsilonPlacement::AfterCorrection,
                        EpsilonPlacement::BeforeCorrection => oracle::EpsilonPlacement::BeforeCorrection,
                    },
                };
                oracle::adam(options, step, &mut want, &scaled, &mut want_m, &mut want_v);
            }
            let (_, params, m, v) = &runs[0];
            let distances =
                [(params, &want), (m, &want_m), (v, &want_v)].map(|(got, want)| distance(&widen(got), want));
            println!("adam against the oracle after 100 steps, {placement:?}: {distances:?}");
            assert!(distances.iter().all(|distance| *distance < 1e-5));
            for (simd, other, other_m, other_v) in &runs {
                let same =
                    bits(other) == bits(params) && bits(other_m) == bits(m) && bits(other_v) == bits(v);
                assert!(same, "{simd} differs");
            }
        }
    }

    #[test]
    fn sgd_follows_the_oracle_for_a_hundred_steps_at_every_level() {
        let len = 333;
        let start = numbers(len, 1.0, 4);
        for momentum in [0.0f32, 0.5] {
            let step = SgdStep { gradient_scale: 0.25, learning_rate: 1e-2, momentum };
            let options =
                oracle::Sgd { lr: f64::from(step.learning_rate), momentum: f64::from(step.momentum) };
            let (mut want, mut want_velocity) = (widen(&start), vec![0.0; len]);
            let mut runs: Vec<_> =
                Simd::available().into_iter().map(|simd| (simd, start.clone(), vec![0.0f32; len])).collect();
            for salt in 1..=100 {
                let grad = numbers(len, 4.0, 200 + salt);
                for (simd, params, velocity) in &mut runs {
                    sgd_update(*simd, &step, params, &grad, velocity);
                }
                let scaled: Vec<f64> = grad.iter().map(|g| f64::from(*g) * 0.25).collect();
                oracle::sgd(options, &mut want, &scaled, &mut want_velocity);
            }
            let (_, params, velocity) = &runs[0];
            let distances = [distance(&widen(params), &want), distance(&widen(velocity), &want_velocity)];
            println!("sgd against the oracle after 100 steps, momentum {momentum}: {distances:?}");
            assert!(distances.iter().all(|distance| *distance < 1e-5));
            for (simd, other, other_velocity) in &runs {
                let same = bits(other) == bits(params) && bits(other_velocity) == bits(velocity);
                assert!(same, "{simd} differs");
            }
        }
    }

    #[test]
    fn scale_reaches_every_element() {
        let mut x = [1.0, 2.0, 3.0];
        scale(Simd::detect(), 0.5, &mut x);
        assert_eq!(x, [0.5, 1.0, 1.5]);
    }
}
