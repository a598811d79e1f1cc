//! The most that a core can multiply and add: what the rates of kernels are held against.

use std::hint::black_box;

use super::bf16::tile;
use super::simd::{Simd, SimdLevel};
use protocol::job::Precision;

/// Independent chains of multiply-adds. A chain's next link waits for the last one, four or five cycles on the cores
/// that are common now, which start two links a cycle: ten chains would do.
const CHAINS: usize = 12;

/// The two factors of each link `acc ← acc · 0.5 + 1`: the chains stay near 2, where no number is special.
const FACTORS: [f32; 2] = [0.5, 1.0];

/// Does multiply-adds in registers, `rounds` of them in each of 12 independent chains of vectors, and gives the number
/// of floating-point operations that this was. A multiply-add counts as two. Those of bf16 are AMX's, in 6 chains of tiles,
/// where the level has it, and else no others than those of f32.
///
/// No operand is in memory. (The portable level on x86-64 is the exception, because there each multiply-add is a call.)
pub fn multiply_add(simd: Simd, precision: Precision, rounds: u64) -> u64 {
    if precision == Precision::Bf16 && simd.level() == SimdLevel::Amx {
        return tile::multiply_add(simd, rounds);
    }
    let (lanes, value) = match simd.level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Simd::new` checked avx512f before it built these levels.
        SimdLevel::Amx | SimdLevel::Avx512 => (16, unsafe { x86::avx512(rounds) }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Simd::new` checked avx2 and fma before it built this level.
        SimdLevel::Avx2 => (8, unsafe { x86::avx2(rounds) }),
        _ => (PORTABLE_LANES, portable(rounds)),
    };
    // Nobody needs the value, but nothing may be left out on that ground.
    black_box(value);
    2 * rounds * (CHAINS * lanes) as u64
}

/// One 128-bit register, which every 64-bit target has.
const PORTABLE_LANES: usize = 4;

fn portable(rounds: u64) -> f32 {
    let [factor, summand] = black_box(FACTORS);
    let mut chains = starts().map(|start| [start; PORTABLE_LANES]);
    for _ in 0..rounds {
        chains = chains.map(|chain| chain.map(|acc| acc.mul_add(factor, summand)));
    }
    chains.as_flattened().iter().sum()
}

/// Another start for each chain: equal ones would be computed once.
fn starts() -> [f32; CHAINS] {
    black_box(std::array::from_fn(|chain| chain as f32))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{FACTORS, starts};

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512(rounds: u64) -> f32 {
        let [factor, summand] = black_box(FACTORS).map(|value| _mm512_set1_ps(value));
        let mut chains = starts().map(|start| _mm512_set1_ps(start));
        for _ in 0..rounds {
            for chain in &mut chains {
                *chain = _mm512_fmadd_ps(*chain, factor, summand);
            }
        }
        chains.into_iter().map(|chain| _mm512_reduce_add_ps(chain)).sum()
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2(rounds: u64) -> f32 {
        let [factor, summand] = black_box(FACTORS).map(|value| _mm256_set1_ps(value));
        let mut chains = starts().map(|start| _mm256_set1_ps(start));
        for _ in 0..rounds {
            for chain in &mut chains {
                *chain = _mm256_fmadd_ps(*chain, factor, summand);
            }
        }
        // One lane stands for the others, which must be computed all the same.
        black_box(chains).into_iter().map(|chain| _mm256_cvtss_f32(chain)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_level_counts_two_operations_for_each_lane_of_each_chain() {
        for simd in Simd::available() {
            let lanes = match simd.level() {
                SimdLevel::Amx | SimdLevel::Avx512 => 16,
                SimdLevel::Avx2 => 8,
                SimdLevel::Portable => 4,
            };
            assert_eq!(multiply_add(simd, Precision::F32, 1000), 2 * 1000 * 12 * lanes, "{simd}");
            let of_bf16 = match simd.level() {
                SimdLevel::Amx => 2 * 1000 * 6 * 16 * 16 * 32,
                _ => 2 * 1000 * 12 * lanes,
            };
            assert_eq!(multiply_add(simd, Precision::Bf16, 1000), of_bf16, "{simd}");
        }
    }

    #[test]
    fn the_chains_are_computed() {
        // Each ends at the fixed point of acc · 0.5 + 1.
        let total = 2.0 * (CHAINS * PORTABLE_LANES) as f32;
        assert_eq!(portable(64), total);
        #[cfg(target_arch = "x86_64")]
        for simd in Simd::available() {
            match simd.level() {
                // SAFETY: the level is available.
                SimdLevel::Amx | SimdLevel::Avx512 => {
                    // SAFETY: these levels are available.
                    let sum = unsafe { x86::avx512(64) };
                    assert_eq!(sum, 2.0 * (CHAINS * 16) as f32);
                }
                // SAFETY: the level is available.
                SimdLevel::Avx2 => assert_eq!(unsafe { x86::avx2(64) }, 2.0 * CHAINS as f32),
                SimdLevel::Portable => {}
            }
        }
    }
}
