//! What happens to flat buffers element by element: copies, sums, the norm, the optimizers, the digest.

use cubecl::prelude::*;
use protocol::job::Precision;
use std::ops::Range;

use super::buffer::{Buffer, Result, UNITS, cubes};
use super::precision::rounded;
use crate::cpu::optimizer::{AdamStep, SgdStep};

/// Elements whose squares, or digests, a cube adds up.
const BLOCK: usize = 4096;

#[cube(launch_unchecked)]
fn copy_kernel(from: &Array<u32>, to: &mut Array<u32>, from_at: usize, to_at: usize, len: usize) {
    if ABSOLUTE_POS < len {
        to[to_at + ABSOLUTE_POS] = from[from_at + ABSOLUTE_POS];
    }
}

/// Copies words to `to_at ..` of another buffer.
pub fn copy<R: Runtime>(
    client: &ComputeClient<R>,
    from: &Buffer,
    range: Range<usize>,
    to: &Buffer,
    to_at: usize,
) {
    assert!(
        range.end <= from.len() && to_at + range.len() <= to.len(),
        "copy: {range:?} of {} words to {to_at} of {}",
        from.len(),
        to.len()
    );
    if range.is_empty() {
        return;
    }
    // SAFETY: both ranges lie inside their buffers, as asserted.
    unsafe {
        copy_kernel::launch_unchecked::<R>(
            client,
            cubes(range.len()),
            CubeDim::new_1d(UNITS),
            from.arg(),
            to.arg(),
            range.start,
            to_at,
            range.len(),
        );
    }
}

#[cube(launch_unchecked)]
fn pick_kernel(
    from: &Array<f32>,
    first: &Array<u32>,
    second: &Array<u32>,
    constant: &Array<f32>,
    to: &mut Array<f32>,
    len: usize,
    #[comptime] precision: Precision,
    #[comptime] adds: bool,
) {
    if ABSOLUTE_POS < len {
        let value = from[first[ABSOLUTE_POS] as usize];
        if comptime!(adds) {
            // No second one is the index u32::MAX.
            let index = second[ABSOLUTE_POS];
            let is_there = index != u32::MAX;
            let addend = from[select(is_there, index, 0u32) as usize];
            to[ABSOLUTE_POS] = value + select(is_there, addend, 0.0) + constant[ABSOLUTE_POS];
        } else {
            to[ABSOLUTE_POS] = rounded(value, precision);
        }
    }
}

/// `to[i] = from[indices[i]]`, rounded.
pub fn pick<R: Runtime>(
    client: &ComputeClient<R>,
    precision: Precision,
    from: &Buffer,
    indices: &Buffer,
    to: &Buffer,
) {
    pick_kernel_of(client, from, (indices, indices, from), to, precision, false);
}

/// `to[i] = from[first[i]] + from[second[i]] + constant[i]`; where `second[i]` is [`u32::MAX`] there is none.
pub fn pick_sums<R: Runtime>(
    client: &ComputeClient<R>,
    from: &Buffer,
    first: &Buffer,
    second: &Buffer,
    constant: &Buffer,
    to: &Buffer,
) {
    pick_kernel_of(client, from, (first, second, constant), to, Precision::F32, true);
}

fn pick_kernel_of<R: Runtime>(
    client: &ComputeClient<R>,
    from: &Buffer,
    (first, second, constant): (&Buffer, &Buffer, &Buffer),
    to: &Buffer,
    precision: Precision,
    adds: bool,
) {
    assert_eq!(first.len(), to.len(), "pick: one index for each element");
    if to.is_empty() {
        return;
    }
    // SAFETY: the indices are the caller's and lie inside `from`.
    unsafe {
        pick_kernel::launch_unchecked::<R>(
            client,
            cubes(to.len()),
            CubeDim::new_1d(UNITS),
            from.arg(),
            first.arg(),
            second.arg(),
            constant.arg(),
            to.arg(),
            to.len(),
            precision,
            adds,
        );
    }
}

#[cube(launch_unchecked)]
fn add_kernel(sum: &mut Array<f32>, addend: &Array<f32>, at: usize, len: usize) {
    if ABSOLUTE_POS < len {
        sum[at + ABSOLUTE_POS] = sum[at + ABSOLUTE_POS] + addend[at + ABSOLUTE_POS];
    }
}

/// `sum[range] += addend[range]`.
pub fn add<R: Runtime>(client: &ComputeClient<R>, sum: &Buffer, addend: &Buffer, range: Range<usize>) {
    assert!(range.end <= sum.len().min(addend.len()), "add: {range:?} of {} floats", sum.len());
    if range.is_empty() {
        return;
    }
    // SAFETY: the range lies inside both buffers, as asserted.
    unsafe {
        add_kernel::launch_unchecked::<R>(
            client,
            cubes(range.len()),
            CubeDim::new_1d(UNITS),
            sum.arg(),
            addend.arg(),
            range.start,
            range.len(),
        );
    }
}

#[cube(launch_unchecked)]
fn scale_kernel(values: &mut Array<f32>, factor: f32, len: usize) {
    if ABSOLUTE_POS < len {
        values[ABSOLUTE_POS] = values[ABSOLUTE_POS] * factor;
    }
}

/// `values *= factor`.
pub fn scale<R: Runtime>(client: &ComputeClient<R>, values: &Buffer, factor: f32) {
    // SAFETY: every unit has its own element.
    unsafe {
        scale_kernel::launch_unchecked::<R>(
            client,
            cubes(values.len()),
            CubeDim::new_1d(UNITS),
            values.arg(),
            factor,
            values.len(),
        );
    }
}

#[cube(launch_unchecked)]
fn squares_kernel(values: &Array<f32>, sums: &mut Array<f32>, len: usize) {
    let mut shared = SharedMemory::<f32>::new(UNITS as usize);
    let unit = UNIT_POS as usize;
    let sum = RuntimeCell::<f32>::new(0.0);
    for each in 0..BLOCK / (UNITS as usize) {
        let at = CUBE_POS * BLOCK + each * (UNITS as usize) + unit;
        let is_inside = at < len;
        let value = select(is_inside, values[select(is_inside, at, 0)], 0.0);
        sum.store(fma(value, value, sum.read()));
    }
    shared[unit] = sum.read();
    sync_cube();
    #[unroll]
    for level in 0..8usize {
        let half = comptime!((UNITS as usize) >> (level + 1));
        if unit < half {
            shared[unit] = shared[unit] + shared[unit + half];
        }
        sync_cube();
    }
    // Of more cubes than the first dimension holds, the last few may have nothing to do.
    if unit == 0 && CUBE_POS * BLOCK < len {
        sums[CUBE_POS] = shared[0];
    }
}

/// `Σ values²`, waiting for it.
///
/// Numerics: blocks of 4096 elements in f32, each 256 sums of 16 joined by a fixed tree; the blocks in f64, in order.
///
/// # Errors
/// The device failed.
pub fn squared_norm<R: Runtime>(client: &ComputeClient<R>, values: &Buffer) -> Result<f64> {
    let blocks = values.len().div_ceil(BLOCK);
    let sums = Buffer::new(client, blocks);
    // SAFETY: elements beyond the end are read at index 0; one number for each cube.
    unsafe {
        squares_kernel::launch_unchecked::<R>(
            client,
            cubes(blocks * UNITS as usize),
            CubeDim::new_1d(UNITS),
            values.arg(),
            sums.arg(),
            values.len(),
        );
    }
    Ok(sums.read_floats(client, 0..blocks)?.into_iter().map(f64::from).sum())
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn adam_kernel(
    gradient: &Array<f32>,
    parameters: &mut Array<f32>,
    first: &mut Array<f32>,
    second: &mut Array<f32>,
    numbers: &Array<f32>,
    len: usize,
) {
    if ABSOLUTE_POS < len {
        let at = ABSOLUTE_POS;
        let g = gradient[at] * numbers[0];
        let m = fma(numbers[1], first[at], numbers[2] * g);
        let v = fma(numbers[3], second[at], numbers[4] * (g * g));
        let denominator = fma(v.sqrt(), numbers[6], numbers[7]);
        parameters[at] = fma(-numbers[5], m / denominator, parameters[at]);
        first[at] = m;
        second[at] = v;
    }
}

/// One Adam step, element by element, as [`crate::cpu::optimizer::adam_update`].
pub fn adam<R: Runtime>(
    client: &ComputeClient<R>,
    step: &AdamStep,
    gradient: &Buffer,
    parameters: &Buffer,
    first: &Buffer,
    second: &Buffer,
) {
    let AdamStep { gradient_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, .. } = *step;
    let AdamStep { step_size, root_correction, epsilon, .. } = *step;
    let numbers =
        [gradient_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, epsilon];
    let numbers = Buffer::from_floats(client, &numbers);
    // SAFETY: every unit has its own element of the four buffers, which are equally long.
    unsafe {
        adam_kernel::launch_unchecked::<R>(
            client,
            cubes(parameters.len()),
            CubeDim::new_1d(UNITS),
            gradient.arg(),
            parameters.arg(),
            first.arg(),
            second.arg(),
            numbers.arg(),
            parameters.len(),
        );
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn sgd_kernel(
    gradient: &Array<f32>,
    parameters: &mut Array<f32>,
    velocity: &mut Array<f32>,
    scale: f32,
    learning_rate: f32,
    momentum: f32,
    len: usize,
) {
    if ABSOLUTE_POS < len {
        let at = ABSOLUTE_POS;
        let v = fma(momentum, velocity[at], gradient[at] * scale);
        velocity[at] = v;
        parameters[at] = fma(-learning_rate, v, parameters[at]);
    }
}

/// One step of gradient descent, element by element, as [`crate::cpu::optimizer::sgd_update`].
pub fn sgd<R: Runtime>(
    client: &ComputeClient<R>,
    step: &SgdStep,
    gradient: &Buffer,
    parameters: &Buffer,
    velocity: &Buffer,
) {
    // SAFETY: every unit has its own element of the three buffers, which are equally long.
    unsafe {
        sgd_kernel::launch_unchecked::<R>(
            client,
            cubes(parameters.len()),
            CubeDim::new_1d(UNITS),
            gradient.arg(),
            parameters.arg(),
            velocity.arg(),
            step.gradient_scale,
            step.learning_rate,
            step.momentum,
            parameters.len(),
        );
    }
}

/// Low word of the low, then of the high half of a 64-bit product, from halves.
#[cube]
fn multiply_wide(low: u32, high: u32, #[comptime] by_low: u32, #[comptime] by_high: u32) -> (u32, u32) {
    let product = low * by_low;
    (product, u32::mul_hi(low, by_low) + low * by_high + high * by_low)
}

/// `word ^ (word >> shift)` of a 64-bit word in halves, for a shift below 32.
#[cube]
fn shift_in(low: u32, high: u32, #[comptime] shift: u32) -> (u32, u32) {
    (low ^ ((low >> shift) | (high << comptime!(32 - shift))), high ^ (high >> shift))
}

/// `protocol::random::mix64` of a word in halves.
#[cube]
fn mix64(low: u32, high: u32) -> (u32, u32) {
    let sum = low + 0x7F4A_7C15u32;
    let carry = select(sum < low, 1u32, 0u32);
    let (low, high) = shift_in(sum, high + 0x9E37_79B9u32 + carry, 30u32);
    let (low, high) = multiply_wide(low, high, 0x1CE4_E5B9u32, 0xBF58_476Du32);
    let (low, high) = shift_in(low, high, 27u32);
    let (low, high) = multiply_wide(low, high, 0x1331_11EBu32, 0x94D0_49BBu32);
    shift_in(low, high, 31u32)
}

#[cube(launch_unchecked)]
fn digest_kernel(values: &Array<u32>, sums: &mut Array<u32>, start_index: u32, len: usize) {
    let mut lows = SharedMemory::<u32>::new(UNITS as usize);
    let mut highs = SharedMemory::<u32>::new(UNITS as usize);
    let unit = UNIT_POS as usize;
    let low = RuntimeCell::<u32>::new(0u32);
    let high = RuntimeCell::<u32>::new(0u32);
    for each in 0..BLOCK / (UNITS as usize) {
        let at = CUBE_POS * BLOCK + each * (UNITS as usize) + unit;
        if at < len {
            let (l, h) = mix64(values[at], start_index + at as u32);
            let sum = low.read() + l;
            high.store(high.read() + h + select(sum < l, 1u32, 0u32));
            low.store(sum);
        }
    }
    lows[unit] = low.read();
    highs[unit] = high.read();
    sync_cube();
    #[unroll]
    for level in 0..8usize {
        let half = comptime!((UNITS as usize) >> (level + 1));
        if unit < half {
            let sum = lows[unit] + lows[unit + half];
            highs[unit] = highs[unit] + highs[unit + half] + select(sum < lows[unit], 1u32, 0u32);
            lows[unit] = sum;
        }
        sync_cube();
    }
    if unit == 0 && CUBE_POS * BLOCK < len {
        sums[2 * CUBE_POS] = lows[0];
        sums[2 * CUBE_POS + 1] = highs[0];
    }
}

/// The digest of a buffer whose first element has this index, as [`crate::cpu::reduce::digest`], waiting for it.
///
/// # Errors
/// The device failed.
pub fn digest<R: Runtime>(client: &ComputeClient<R>, values: &Buffer, start_index: u64) -> Result<u64> {
    let blocks = values.len().div_ceil(BLOCK);
    let sums = Buffer::new(client, 2 * blocks);
    // SAFETY: elements beyond the end are not read; two words for each cube.
    unsafe {
        digest_kernel::launch_unchecked::<R>(
            client,
            cubes(blocks * UNITS as usize),
            CubeDim::new_1d(UNITS),
            values.arg(),
            sums.arg(),
            start_index as u32,
            values.len(),
        );
    }
    let halves = sums.read_words(client, 0..2 * blocks)?;
    let words = halves.chunks_exact(2).map(|half| u64::from(half[1]) << 32 | u64::from(half[0]));
    Ok(words.fold(0, u64::wrapping_add))
}
