//! Inverted dropout of a layer's output, with masks that are computed and never stored.
//!
//! Unit j of a row is kept iff word j mod 4 of `philox4x32_10(seed, [step, row, position, j / 4])` is below
//! keep · 2³². The mask is thereby a function of the unit's coordinates: backward draws it again, and neither the shard,
//! the thread nor the device enters it.

use super::simd::{LANES, Simd, simd_kernel};
use protocol::random::{Purpose, dropout_counter, keep_threshold, key};

/// The coordinates of one row's mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskStream {
    /// The job's seed.
    pub seed: u64,
    /// Training step.
    pub step: u64,
    /// Global row of the batch.
    pub row: u32,
    /// `t·L·D + layer·D + direction`.
    pub position: u32,
}

/// `y_j = x_j / keep` where kept, 0 elsewhere.
///
/// | arg | shape | in/out | notes |
/// |---|---|---|---|
/// | `keep` | | in | probability of keeping, in (0, 1]; 1 copies |
/// | `stream` | | in | |
/// | `x` | `[H]` | in | one row; the recurrent state is carried on undropped |
/// | `y` | `[H]` | out | |
///
/// Cost: 10 Philox rounds per 4 units, sixteen blocks side by side. Numerics: one product with the f32 `1 / keep`.
/// Reference: `protocol::random::philox4x32_10`, unit by unit, in the tests.
pub fn dropout_forward(simd: Simd, keep: f32, stream: MaskStream, x: &[f32], y: &mut [f32]) {
    assert!(x.len() == y.len(), "dropout_forward: x has {} elements, y {}", x.len(), y.len());
    y.copy_from_slice(x);
    dropout_backward(simd, keep, stream, y);
}

/// `d_j = d_j / keep` where kept, 0 elsewhere: turns the gradient of the dropped output, in place, into that of the
/// output. Arguments as [`dropout_forward`].
pub fn dropout_backward(simd: Simd, keep: f32, stream: MaskStream, d: &mut [f32]) {
    assert!(keep > 0.0 && keep <= 1.0, "dropout: keep is {keep}, expected a number in (0, 1]");
    if keep < 1.0 {
        mask_in_place(simd, stream, keep_threshold(keep), 1.0 / keep, d);
    }
}

/// Units whose words are drawn together: 16 counters of 4 words.
const BLOCK: usize = 4 * LANES;

simd_kernel! {
    fn mask_in_place(simd: Simd, stream: MaskStream, threshold: u32, scale: f32, values: &mut [f32]) {
        let key = key(stream.seed, Purpose::Dropout);
        let first = dropout_counter(stream.step, stream.row, stream.position, 0);
        let mut start = 0;
        while start + BLOCK <= values.len() {
            let words = sixteen_blocks(key, first, (start / 4) as u32);
            let values = &mut values[start..start + BLOCK];
            for j in 0..BLOCK {
                values[j] = if words[j] < threshold { values[j] * scale } else { 0.0 };
            }
            start += BLOCK;
        }
        if start < values.len() {
            let words = sixteen_blocks(key, first, (start / 4) as u32);
            for (value, word) in values[start..].iter_mut().zip(words) {
                *value = if word < threshold { *value * scale } else { 0.0 };
            }
        }
    }
}

/// The words of unit blocks `unit_block .. unit_block + 16`: `philox4x32_10` with the counters side by side, so that
/// each line below is one vector instruction.
#[inline(always)]
fn sixteen_blocks(key: [u32; 2], first: [u32; 4], unit_block: u32) -> [u32; BLOCK] {
    let [mut k0, mut k1] = key;
    let [mut c0, mut c1, mut c2, mut c3] = first.map(|word| [word; LANES]);
    for lane in 0..LANES {
        c3[lane] = unit_block.wrapping_add(lane as u32);
    }
    for _ in 0..10 {
        for lane in 0..LANES {
            let p0 = u64::from(c0[lane]) * 0xD251_1F53;
            let p1 = u64::from(c2[lane]) * 0xCD9E_8D57;
            let next0 = (p1 >> 32) as u32 ^ c1[lane] ^ k0;
            let next2 = (p0 >> 32) as u32 ^ c3[lane] ^ k1;
            c0[lane] = next0;
            c1[lane] = p1 as u32;
            c2[lane] = next2;
            c3[lane] = p0 as u32;
        }
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    let mut words = [0; BLOCK];
    for lane in 0..LANES {
        words[4 * lane] = c0[lane];
        words[4 * lane + 1] = c1[lane];
        words[4 * lane + 2] = c2[lane];
        words[4 * lane + 3] = c3[lane];
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::random::philox4x32_10;

    fn stream(row: u32) -> MaskStream {
        MaskStream { seed: 0x0123_4567_89ab_cdef, step: 70_000, row, position: 11 }
    }

    #[test]
    fn every_unit_follows_the_protocols_stream() {
        for hidden in [1, 3, 7, 33, 64, 65, 150, 512] {
            for keep in [0.1f32, 0.5, 0.8, 0.999] {
                let x: Vec<f32> = (0..hidden).map(|j| 1.0 + j as f32).collect();
                let MaskStream { seed, step, row, position } = stream(hidden as u32);
                let want: Vec<f32> = (0..hidden)
                    .map(|j| {
                        let counter = dropout_counter(step, row, position, j as u32 / 4);
                        let word = philox4x32_10(key(seed, Purpose::Dropout), counter)[j % 4];
                        if word < keep_threshold(keep) { x[j] * (1.0 / keep) } else { 0.0 }
                    })
                    .collect();
                for simd in Simd::available() {
                    let mut y = vec![f32::NAN; hidden];
                    dropout_forward(simd, keep, stream(hidden as u32), &x, &mut y);
                    assert_eq!(y, want);
                    let mut d = x.clone();
                    dropout_backward(simd, keep, stream(hidden as u32), &mut d);
                    assert_eq!(d, want);
                }
            }
        }
    }

    #[test]
    fn keeps_the_asked_share_and_the_mean() {
        let mut y = vec![1.0; 150];
        let (mut kept, mut sum) = (0, 0.0f64);
        for row in 0..2000 {
            y.fill(1.0);
            dropout_backward(Simd::detect(), 0.8, stream(row), &mut y);
            kept += y.iter().filter(|y| **y > 0.0).count();
            sum += y.iter().map(|y| f64::from(*y)).sum::<f64>();
        }
        let share = kept as f64 / 300_000.0;
        println!("dropout: kept {share:.4} of 0.8, mean {:.4}", sum / 300_000.0);
        // Five standard deviations of 300,000 draws.
        assert!((share - 0.8).abs() < 0.0037 && (sum / 300_000.0 - 1.0).abs() < 0.0046);
    }

    #[test]
    fn keep_one_copies() {
        let x = [1.0, -2.0, f32::MAX];
        let mut y = [0.0; 3];
        dropout_forward(Simd::detect(), 1.0, stream(0), &x, &mut y);
        assert_eq!(y, x);
    }
}
