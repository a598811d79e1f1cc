//! What a device can do at most: multiply-adds in registers, and copies.

use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::bf16;
use protocol::job::Precision;

use super::precision::tensor_depth;
use super::tensor::{ALIGNMENT, SIDE, WARP};

/// Units of a cube.
const UNITS: u32 = 256;
/// Vulkan and CUDA launch so many cubes in a row; then comes the next row.
const CUBES_OF_A_ROW: usize = 65_535;
/// Sums of multiply-adds that each unit keeps at once, so that none waits for the one before it.
const CHAINS: usize = 16;
/// The same of a warp on tensor cores.
const TENSOR_CHAINS: usize = 4;
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

/// Each warp does `16 · 4 · rounds` products of `[16][depth]` and `[depth][16]` on tensor cores, into four sums.
///
/// | arg | shape | dtype | in/out | notes |
/// |---|---|---|---|---|
/// | `factors` | `[2]` | f32 | in | so that no compiler knows the result |
/// | `out` | `[warps][4][16][16]` | f32 | out | the sums |
/// | `rounds` | | u32 | in | |
#[cube(launch_unchecked)]
fn tensor_kernel<E: Float>(
    factors: &Array<f32>,
    out: &mut Array<f32>,
    rounds: u32,
    #[comptime] depth: usize,
) {
    let mut operand = SharedMemory::<E>::new_aligned(comptime!(SIDE * depth), ALIGNMENT);
    let unit = UNIT_POS as usize;
    if unit < comptime!(SIDE * depth) {
        operand[unit] = E::cast_from(factors[unit % 2]);
    }
    sync_cube();
    let all = operand.slice(0, comptime!(SIDE * depth));
    let (a, row) = (MatrixIdent::A, MatrixLayout::RowMajor);
    let a = Matrix::<E>::from_slice(a, SIDE, SIDE, depth, row, &all, depth as u32);
    let (b, column) = (MatrixIdent::B, MatrixLayout::ColMajor);
    let b = Matrix::<E>::from_slice(b, SIDE, SIDE, depth, column, &all, depth as u32);
    let mut sums = Sequence::<Matrix<f32>>::new();
    #[unroll]
    for _ in 0..TENSOR_CHAINS {
        let (sum, any) = (MatrixIdent::Accumulator, MatrixLayout::Undefined);
        sums.push(Matrix::<f32>::from_value(sum, SIDE, SIDE, depth, any, 0.0));
    }
    for _ in 0..rounds {
        #[unroll]
        for _ in 0..DEPTH {
            #[unroll]
            for chain in 0..TENSOR_CHAINS {
                cmma::execute(&a, &b, sums.index(chain), sums.index(chain));
            }
        }
    }
    let warp = (CUBE_POS_X * (UNITS / WARP as u32) + UNIT_POS / WARP as u32) as usize;
    #[unroll]
    for chain in 0..TENSOR_CHAINS {
        let first = (warp * TENSOR_CHAINS + chain) * comptime!(SIDE * SIDE);
        let row = MatrixLayout::RowMajor;
        let mut sums_of_chain = out.slice_mut(first, first + comptime!(SIDE * SIDE));
        cmma::store(&mut sums_of_chain, sums.index(chain), SIDE as u32, row);
    }
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

/// Launches multiply-adds on so many cubes: on tensor cores if the device has them for operands of this precision. Gives their
/// floating-point operations.
pub fn multiply_add<R: Runtime>(
    client: &ComputeClient<R>,
    precision: Precision,
    cubes: u32,
    rounds: u32,
) -> u64 {
    if let Some(depth) = tensor_depth(client, precision) {
        return tensor_multiply_add(client, precision, depth, cubes, rounds);
    }
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

fn tensor_multiply_add<R: Runtime>(
    client: &ComputeClient<R>,
    precision: Precision,
    depth: usize,
    cubes: u32,
    rounds: u32,
) -> u64 {
    let sums = cubes as usize * (UNITS as usize / WARP) * TENSOR_CHAINS * SIDE * SIDE;
    let factors = client.create_from_slice(f32::as_bytes(&[0.999, 1e-3]));
    let out = client.empty(sums * size_of::<f32>());
    let launch = match precision {
        Precision::Bf16 => tensor_kernel::launch_unchecked::<bf16, R>,
        Precision::F32 | Precision::Tf32 => tensor_kernel::launch_unchecked::<tf32, R>,
    };
    // SAFETY: `factors` has two floats, `out` one for each number of the sums.
    unsafe {
        let (factors, out) = (ArrayArg::from_raw_parts(factors, 2), ArrayArg::from_raw_parts(out, sums));
        launch(client, CubeCount::Static(cubes, 1, 1), CubeDim::new_1d(UNITS), factors, out, rounds, depth);
    }
    2 * (sums * depth * DEPTH) as u64 * u64::from(rounds)
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
        assert_eq!(multiply_add(&client, Precision::Bf16, 3, 5), 2 * 3 * 256 * 16 * 16 * 5);
        block_on(client.sync()).unwrap();
    }

    /// On tensor cores, as the host's processor runs them.
    #[cfg(feature = "cuda")]
    #[test]
    fn tensor_cores_add_up_what_they_are_said_to() {
        use crate::cube::emulated::skips;
        use crate::cube::source::{Launches, SourceDevice, SourceRuntime};
        if skips() {
            return;
        }
        abort_on_device_panic();
        let device = SourceDevice { launches: Launches::Emulated { order: 1 }, ..SourceDevice::default() };
        let client = SourceRuntime::client(&device);
        for (precision, depth) in [(Precision::Bf16, 16), (Precision::Tf32, 8)] {
            let flop = 2 * (2 * 8 * 4 * 256) * depth * 16 * 3;
            assert_eq!(multiply_add(&client, precision, 2, 3), flop);
        }
        block_on(client.sync()).unwrap();
    }
}
