//! What a device can do at most: multiply-adds in registers, and copies.

use cubecl::prelude::*;
use cubecl::server::Handle;

/// Units of a cube.
const UNITS: u32 = 256;
/// Vulkan and CUDA launch so many cubes in a row; then comes the next row.
const CUBES_OF_A_ROW: usize = 65_535;
/// Sums of multiply-adds that each unit keeps at once, so that none waits for the one before it.
const CHAINS: usize = 16;
/// Multiply-adds of each chain between two looks at the number of rounds.
const DEPTH: usize = 16;

/// Each unit does `16 · 16 · rounds` multiply-adds on numbers that it keeps in registers.
///
/// | arg | shape | dtype | in/out | notes |
/// |---|---|---|---|---|
/// | `factors` | `[2]` | f32 | in | so that no compiler knows the result |
/// | `out` | `[units]` | f32 | out | a sum of all chains |
/// | `rounds` | | u32 | in | |
#[cube(launch_unchecked)]
fn multiply_add_kernel(factors: &Array<f32>, out: &mut Array<f32>, rounds: u32) {
    let (factor, term) = (factors[0], factors[1]);
    let mut sums = Array::<f32>::new(comptime!(CHAINS));
    #[unroll]
    for chain in 0..CHAINS {
        sums[chain] = f32::cast_from(ABSOLUTE_POS) + f32::cast_from(chain);
    }
    for _ in 0..rounds {
        #[unroll]
        for _ in 0..DEPTH {
            #[unroll]
            for chain in 0..CHAINS {
                sums[chain] = fma(sums[chain], factor, term);
            }
        }
    }
    let mut sum = sums[0];
    #[unroll]
    for chain in 1..CHAINS {
        sum += sums[chain];
    }
    out[ABSOLUTE_POS] = sum;
}

/// Each unit copies four floats.
///
/// | arg | shape | dtype | in/out |
/// |---|---|---|---|
/// | `from` | `[n / 4]` of four | f32 | in |
/// | `to` | `[n / 4]` of four | f32 | out |
#[cube(launch_unchecked)]
fn copy_kernel(from: &Array<Vector<f32, Const<4>>>, to: &mut Array<Vector<f32, Const<4>>>) {
    if ABSOLUTE_POS < to.len() {
        to[ABSOLUTE_POS] = from[ABSOLUTE_POS];
    }
}

/// Launches the multiply-adds on so many cubes; gives their floating-point operations.
pub fn multiply_add<R: Runtime>(client: &ComputeClient<R>, cubes: u32, rounds: u32) -> u64 {
    let units = u64::from(cubes) * u64::from(UNITS);
    let factors = client.create_from_slice(f32::as_bytes(&[0.999, 1e-3]));
    let out = client.empty(units as usize * size_of::<f32>());
    // SAFETY: `factors` has two floats, `out` one for each unit.
    unsafe {
        let (factors, out) =
            (ArrayArg::from_raw_parts(factors, 2), ArrayArg::from_raw_parts(out, units as usize));
        let count = CubeCount::Static(cubes, 1, 1);
        multiply_add_kernel::launch_unchecked::<R>(
            client,
            count,
            CubeDim::new_1d(UNITS),
            factors,
            out,
            rounds,
        );
    }
    2 * units * (CHAINS * DEPTH) as u64 * u64::from(rounds)
}

/// Launches a copy of the first `len` floats, a multiple of four; gives the bytes that are read and written.
///
/// # Panics
/// `len` is no multiple of four, or a buffer is shorter.
pub fn copy<R: Runtime>(client: &ComputeClient<R>, from: &Handle, to: &Handle, len: usize) -> u64 {
    let bytes = (len * size_of::<f32>()) as u64;
    assert!(len.is_multiple_of(4) && from.size_in_used() >= bytes && to.size_in_used() >= bytes);
    let cubes = (len / 4).div_ceil(UNITS as usize);
    let rows = cubes.div_ceil(CUBES_OF_A_ROW);
    let count = CubeCount::Static(cubes.min(CUBES_OF_A_ROW) as u32, rows as u32, 1);
    // SAFETY: both have at least `len` floats, as checked above; units beyond them do nothing.
    unsafe {
        let [from, to] = [from, to].map(|buffer| ArrayArg::from_raw_parts(buffer.clone(), len));
        copy_kernel::launch_unchecked::<R>(client, count, CubeDim::new_1d(UNITS), from, to);
    }
    2 * bytes
}

#[cfg(all(test, feature = "wgpu"))]
mod tests {
    use cubecl::future::block_on;
    use cubecl::wgpu::{WgpuDevice, WgpuRuntime};

    use super::*;
    use crate::cube::guard::abort_on_device_panic;

    #[test]
    fn a_copy_is_whole_and_multiply_adds_are_done() {
        abort_on_device_panic();
        let client = WgpuRuntime::client(&WgpuDevice::Cpu);
        for len in [4, 1020, 1 << 20] {
            let numbers: Vec<f32> = (0..len).map(|at| at as f32).collect();
            let from = client.create_from_slice(f32::as_bytes(&numbers));
            let to = client.create_from_slice(f32::as_bytes(&vec![f32::NAN; len]));
            assert_eq!(copy(&client, &from, &to, len), 8 * len as u64);
            assert_eq!(f32::from_bytes(&client.read_one(to).unwrap()), numbers);
        }
        assert_eq!(multiply_add(&client, 3, 5), 2 * 3 * 256 * 16 * 16 * 5);
        block_on(client.sync()).unwrap();
    }
}
