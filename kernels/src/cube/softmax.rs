//! Softmax cross-entropy, forward and backward in one pass, one cube for each target.

use cubecl::prelude::*;

use super::buffer::Buffer;
use super::math::exp;

/// Units of a cube; class j is unit j mod 32's.
const LANES: usize = 32;

/// The target of a row of logits that has none: no loss, no gradient.
pub const NO_TARGET: u32 = u32::MAX;

/// Floats of a target's result: Σ e^(x - max), max - x_target, and 1 if the target's is the first largest logit.
pub const RESULT: usize = 3;

/// The fixed tree over the lanes: half on half.
#[cube]
fn fold(lanes: &mut SharedMemory<f32>, #[comptime] takes_max: bool) {
    let unit = UNIT_POS as usize;
    #[unroll]
    for level in 0..5usize {
        let half = comptime!(LANES >> (level + 1));
        sync_cube();
        if unit < half {
            let (a, b) = (lanes[unit], lanes[unit + half]);
            if comptime!(takes_max) {
                lanes[unit] = select(b > a, b, a);
            } else {
                lanes[unit] = a + b;
            }
        }
    }
    sync_cube();
}

#[cube(launch_unchecked)]
fn cross_entropy_kernel(
    targets: &Array<u32>,
    logits: &mut Array<f32>,
    results: &mut Array<f32>,
    classes: usize,
    count: usize,
    #[comptime] backward: bool,
) {
    // Cubes beyond the last target, if any, do its work once more without writing.
    let is_target = CUBE_POS < count;
    let row = select(is_target, CUBE_POS, count - 1);
    let target = targets[row];
    let has_target = target != NO_TARGET;
    let class = select(has_target, target, 0u32) as usize;
    let start = row * classes;
    let unit = UNIT_POS as usize;
    let mut lanes = SharedMemory::<f32>::new(LANES);
    let mut earlier = SharedMemory::<f32>::new(LANES);
    let rounds = (classes + (LANES - 1)) / LANES;

    let largest = RuntimeCell::<f32>::new(logits[start]);
    for round in 0..rounds {
        let j = round * LANES + unit;
        if j < classes {
            let x = logits[start + j];
            let before = largest.read();
            largest.store(select(x > before, x, before));
        }
    }
    lanes[unit] = largest.read();
    fold(&mut lanes, true);
    let max = lanes[0];
    let target_logit = logits[start + class];
    sync_cube();

    // Whether an earlier class is as large.
    let found = RuntimeCell::<f32>::new(0.0);
    let sum = RuntimeCell::<f32>::new(0.0);
    for round in 0..rounds {
        let j = round * LANES + unit;
        if j < classes {
            let x = logits[start + j];
            if j < class && x == max {
                found.store(1.0);
            }
            let e = exp(x - max);
            sum.store(fma(e, 1.0, sum.read()));
            if comptime!(backward) {
                if is_target {
                    logits[start + j] = e;
                }
            }
        }
    }
    lanes[unit] = sum.read();
    earlier[unit] = found.read();
    fold(&mut lanes, false);
    fold(&mut earlier, true);
    let total = lanes[0];
    if unit == 0 && is_target {
        let is_first = has_target && target_logit == max && earlier[0] == 0.0;
        results[RESULT * row] = total;
        results[RESULT * row + 1] = max - target_logit;
        results[RESULT * row + 2] = select(is_first, 1.0, 0.0);
    }
    if comptime!(backward) {
        let inverse = 1.0 / total;
        for round in 0..rounds {
            let j = round * LANES + unit;
            if j < classes && is_target {
                // Fused, and not left to a compiler's choice.
                let e = logits[start + j];
                let gradient = select(j == class, fma(e, inverse, -1.0), e * inverse);
                logits[start + j] = select(has_target, gradient, 0.0);
            }
        }
    }
}

/// What the loss of every target is made of, and with `backward` its gradient in place of the logits.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `classes` | `V` | in | |
/// | `targets` | `[n]`, below V or [`NO_TARGET`] | in | |
/// | `logits` | `[n][V]` | in and out | the gradient of the summed loss, with `backward` |
/// | `results` | `[n][3]` | out | [`RESULT`]; the loss is `ln` of the first plus the second, for whoever has f64 |
///
/// Numerics: the row rule; Σ runs in 32 lanes joined by a fixed tree. A NaN among the logits comes out in the results.
pub fn cross_entropy<R: Runtime>(
    client: &ComputeClient<R>,
    classes: usize,
    targets: &Buffer,
    logits: &Buffer,
    results: &Buffer,
    backward: bool,
) {
    let count = targets.len();
    assert!(
        logits.len() >= count * classes && results.len() >= RESULT * count && count > 0,
        "cross_entropy: {count} targets, {} logits",
        logits.len()
    );
    let wide = count.min(65_535) as u32;
    let cubes = CubeCount::Static(wide, (count as u32).div_ceil(wide), 1);
    // SAFETY: every cube reads and writes the row of one target.
    unsafe {
        cross_entropy_kernel::launch_unchecked::<R>(
            client,
            cubes,
            CubeDim::new_1d(LANES as u32),
            targets.arg(),
            logits.arg(),
            results.arg(),
            classes,
            count,
            backward,
        );
    }
}
