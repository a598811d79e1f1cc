//! Softmax cross-entropy, forward and backward in one pass over the logits.
//!
//! For one row with target y: `loss = ln Σ_j e^{x_j - max} + (max - x_y)`, `d_x_j = e^{x_j - max} / Σ - [j = y]`.
//! Losses and gradients are those of the **sum** over rows; the division by the weight comes after all reductions.

use super::math::exp;
use super::simd::{LANES, simd_kernel};

simd_kernel! {
    /// Loss, hit and gradient of every row.
    ///
    /// | arg | shape | in/out | notes |
    /// |---|---|---|---|
    /// | `classes` | `V` | in | |
    /// | `targets` | `[n]`, below V | in | |
    /// | `logits` | `[n][V]` | in and out | the gradient of the summed loss takes their place |
    /// | `loss` | `[n]` f64 | out | nats; NaN or infinite if a logit was |
    /// | `correct` | `[n]` | out | the first largest logit is the target's |
    ///
    /// Cost: three sweeps over a row, one exp per logit. Numerics: the row rule; Σ runs in 16 lanes (class j in lane
    /// j mod 16) joined by a fixed tree; the logarithm is `libm::log` in f64. Reference:
    /// `oracle::head::cross_entropy`.
    ///
    /// # Panics
    /// If a slice has another length than its shape, or a target is not below V.
    pub fn softmax_cross_entropy(
        simd: Simd,
        classes: usize,
        targets: &[u32],
        logits: &mut [f32],
        loss: &mut [f64],
        correct: &mut [bool],
    ) {
        check("softmax_cross_entropy", classes, targets.len(), logits.len(), loss.len(), correct.len());
        for (at, row) in logits.chunks_exact_mut(classes).enumerate() {
            let target = targets[at] as usize;
            let max = row_max(row);
            correct[at] = is_first_max(row, target, max);
            let target_logit = row[target];
            let mut lanes = [0.0f32; LANES];
            let (blocks, rest) = row.as_chunks_mut::<LANES>();
            for block in blocks {
                *block = exp_block(*block, max);
                add_lanes(&mut lanes, block);
            }
            if !rest.is_empty() {
                let e = exp_block(padded(rest), max);
                rest.copy_from_slice(&e[..rest.len()]);
                add_lanes(&mut lanes, &e);
            }
            let total = fold_lanes(lanes, sum);
            loss[at] = row_loss(total, max, target_logit);
            let inverse = 1.0 / total;
            for e in row.iter_mut() {
                *e *= inverse;
            }
            row[target] -= 1.0;
        }
    }
}

simd_kernel! {
    /// Loss and hit of every row, with the bits of [`softmax_cross_entropy`], for evaluation: `logits` stay as they
    /// are. Arguments, cost and panics as there.
    pub fn softmax_cross_entropy_forward(
        simd: Simd,
        classes: usize,
        targets: &[u32],
        logits: &[f32],
        loss: &mut [f64],
        correct: &mut [bool],
    ) {
        check("softmax_cross_entropy_forward", classes, targets.len(), logits.len(), loss.len(), correct.len());
        for (at, row) in logits.chunks_exact(classes).enumerate() {
            let target = targets[at] as usize;
            let max = row_max(row);
            correct[at] = is_first_max(row, target, max);
            let mut lanes = [0.0f32; LANES];
            let (blocks, rest) = row.as_chunks::<LANES>();
            for block in blocks {
                add_lanes(&mut lanes, &exp_block(*block, max));
            }
            if !rest.is_empty() {
                add_lanes(&mut lanes, &exp_block(padded(rest), max));
            }
            loss[at] = row_loss(fold_lanes(lanes, sum), max, row[target]);
        }
    }
}

/// The largest logit; a NaN is passed over here and comes back through its exponential.
#[inline(always)]
fn row_max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = row.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], block[lane]);
        }
    }
    for lane in 0..rest.len() {
        lanes[lane] = larger(lanes[lane], rest[lane]);
    }
    fold_lanes(lanes, larger)
}

#[inline(always)]
fn is_first_max(row: &[f32], target: usize, max: f32) -> bool {
    row[target] == max && !row[..target].contains(&max)
}

#[inline(always)]
fn exp_block(x: [f32; LANES], max: f32) -> [f32; LANES] {
    let mut e = [0.0; LANES];
    for lane in 0..LANES {
        e[lane] = exp(x[lane] - max);
    }
    e
}

/// The last classes of a row, and behind them numbers whose exponential is zero, which changes no sum.
#[inline(always)]
fn padded(rest: &[f32]) -> [f32; LANES] {
    let mut x = [f32::NEG_INFINITY; LANES];
    x[..rest.len()].copy_from_slice(rest);
    x
}

#[inline(always)]
fn add_lanes(lanes: &mut [f32; LANES], e: &[f32; LANES]) {
    for lane in 0..LANES {
        lanes[lane] += e[lane];
    }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

#[inline(always)]
fn sum(a: f32, b: f32) -> f32 {
    a + b
}

/// `((l0 + l8) + (l4 + l12)) + …`, with `join` for `+`. Four loops of constant length, which vectorise; one loop that
/// halves its length does not.
#[inline(always)]
fn fold_lanes(lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let (mut eight, mut four) = ([0.0; 8], [0.0; 4]);
    for lane in 0..8 {
        eight[lane] = join(lanes[lane], lanes[lane + 8]);
    }
    for lane in 0..4 {
        four[lane] = join(eight[lane], eight[lane + 4]);
    }
    join(join(four[0], four[2]), join(four[1], four[3]))
}

#[inline(always)]
fn row_loss(sum: f32, max: f32, target_logit: f32) -> f64 {
    libm::log(f64::from(sum)) + (f64::from(max) - f64::from(target_logit))
}

fn check(kernel: &str, classes: usize, targets: usize, logits: usize, loss: usize, correct: usize) {
    assert!(classes > 0, "{kernel}: no classes");
    assert!(
        logits == targets * classes,
        "{kernel}: logits has {logits} elements, expected {} ({targets} rows · {classes} classes)",
        targets * classes
    );
    assert!(
        loss == targets && correct == targets,
        "{kernel}: loss has {loss} and correct {correct} elements, expected {targets}"
    );
}

#[cfg(test)]
mod tests {
    use super::super::sequence::tests::{bits, numbers};
    use super::super::simd::Simd;
    use super::*;

    struct Run {
        d_logits: Vec<f32>,
        loss: Vec<f64>,
        correct: Vec<bool>,
    }

    fn run(simd: Simd, classes: usize, targets: &[u32], logits: &[f32]) -> Run {
        let n = targets.len();
        let mut all = Run { d_logits: logits.to_vec(), loss: vec![f64::NAN; n], correct: vec![false; n] };
        softmax_cross_entropy(simd, classes, targets, &mut all.d_logits, &mut all.loss, &mut all.correct);
        let (mut loss, mut correct) = (vec![f64::NAN; n], vec![false; n]);
        softmax_cross_entropy_forward(simd, classes, targets, logits, &mut loss, &mut correct);
        assert!(
            loss.iter().zip(&all.loss).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
        );
        assert_eq!(correct, all.correct);
        all
    }

    #[test]
    fn equals_f64_at_every_level_and_forward_alone_gives_the_same_loss() {
        let mut largest = [0.0f64; 2];
        for classes in [1, 2, 10, 16, 17, 65, 150] {
            for n in [1, 7, 33] {
                let logits = numbers(n * classes, 6.0, 1);
                let targets: Vec<u32> = (0..n).map(|row| (row * 7 % classes) as u32).collect();
                let got = run(Simd::detect(), classes, &targets, &logits);
                for simd in Simd::available() {
                    let other = run(simd, classes, &targets, &logits);
                    assert_eq!(bits(&other.d_logits), bits(&got.d_logits));
                    assert_eq!((other.loss, other.correct), (got.loss.clone(), got.correct.clone()));
                }
                for row in 0..n {
                    let x: Vec<f64> =
                        logits[row * classes..(row + 1) * classes].iter().map(|x| f64::from(*x)).collect();
                    let target = targets[row] as usize;
                    let sum: f64 = x.iter().map(|x| libm::exp(*x)).sum();
                    largest[0] = largest[0].max((got.loss[row] - (libm::log(sum) - x[target])).abs());
                    for j in 0..classes {
                        let want = libm::exp(x[j]) / sum - if j == target { 1.0 } else { 0.0 };
                        largest[1] =
                            largest[1].max((f64::from(got.d_logits[row * classes + j]) - want).abs());
                    }
                    let best = (0..classes).rev().max_by(|a, b| x[*a].total_cmp(&x[*b])).unwrap();
                    assert_eq!(got.correct[row], best == target);
                }
            }
        }
        println!("softmax against f64: loss {:.2e}, d_logits {:.2e}", largest[0], largest[1]);
        assert!(largest[0] < 1e-6 && largest[1] < 5e-7);
    }

    #[test]
    fn the_first_of_equal_maxima_is_the_prediction() {
        let correct = |target| run(Simd::detect(), 3, &[target], &[1.0, 2.0, 2.0]).correct[0];
        assert_eq!([0, 1, 2].map(correct), [false, true, false]);
    }

    #[test]
    fn large_logits_do_not_overflow_and_bad_ones_are_seen() {
        for simd in Simd::available() {
            let good = run(simd, 3, &[0, 1], &[1e30, -1e30, 0.0, -200.0, 0.0, 200.0]);
            assert_eq!(good.loss, [0.0, 200.0]);
            for bad in [f32::NAN, f32::INFINITY] {
                for at in 0..20 {
                    let mut logits = vec![0.5; 20];
                    logits[at] = bad;
                    let run = run(simd, 20, &[3], &logits);
                    assert!(!run.loss[0].is_finite() && run.d_logits.iter().all(|d| d.is_nan()));
                    assert!(!run.correct[0] || bad.is_infinite() && at == 3);
                }
            }
            assert!(run(simd, 2, &[1], &[0.0, f32::NEG_INFINITY]).loss[0].is_infinite());
            assert!(run(simd, 2, &[1], &[f32::NEG_INFINITY; 2]).loss[0].is_nan());
        }
    }
}
