//! Whether faults are found, and the order changes the result of a race only.

use super::super::source::{Architecture, KernelSource};
use super::*;

/// Threads of a cube.
const THREADS: u32 = 64;
/// Cubes.
const CUBES: u32 = 2;
/// Floats of each of the two buffers: one for each thread.
const LEN: usize = (THREADS * CUBES) as usize;

/// Runs the body of a kernel `(const float* in, float* out)` with an array `shared` of as many floats as a cube has threads,
/// in three orders. Both arguments hold 0, 1, 2 and so on; or they are the same.
fn run(body: &str, overlap: bool) -> Result<Vec<Vec<f32>>, String> {
    let text = format!(
        "extern \"C\" __global__ void __launch_bounds__({THREADS})body (
             const float* __restrict__ in, float* out, const __grid_constant__ uint3 numbers
         ) {{
             extern __shared__ __align__(4) unsigned char dynamic_shared_mem[];
             float* shared = reinterpret_cast<float*>(dynamic_shared_mem);
             unsigned thread = threadIdx.x, all = blockIdx.x * blockDim.x + thread;
             {body}
         }}"
    );
    let kernel = Kernel::of(&KernelSource {
        architecture: Architecture::Sm90,
        entry: "body".to_owned(),
        id: String::new(),
        units: THREADS,
        shared_bytes: 4 * THREADS as usize,
        text,
    });
    let run = |order| {
        let mut memory = FencedMemory::default();
        let [input, mut output] = [(); 2].map(|()| {
            let handle = memory.alloc(4 * LEN as u64).unwrap();
            let mut place = memory.get(&handle);
            for (bytes, value) in place.bytes_mut().chunks_exact_mut(4).zip(0u16..) {
                bytes.copy_from_slice(&f32::from(value).to_ne_bytes());
            }
            place
        });
        if overlap {
            output = input;
        }
        // SAFETY: it has two buffers and three numbers of 32 bits.
        unsafe {
            kernel.run([CUBES, 1, 1], &[input, output], &[7 | 8 << 32, 9], &mut Stacks::new(), order)?;
        }
        let floats = output.bytes().chunks_exact(4);
        Ok(floats.map(|bytes| f32::from_ne_bytes(bytes.try_into().unwrap())).collect())
    };
    (0..3).map(run).collect()
}

#[test]
fn threads_of_a_cube_wait_for_each_other_and_numbers_arrive() {
    if skips() {
        return;
    }
    let reverse = "shared[thread] = in[all];
                   __syncthreads();
                   float other = shared[blockDim.x - 1 - thread];
                   __syncthreads();
                   shared[thread] = fma(other, 2.0f, (float)numbers.z);
                   __syncthreads();
                   out[all] = shared[thread];";
    let first = [63.0, 62.0].map(|value| 2.0 * value + 9.0);
    for result in run(reverse, false).unwrap() {
        assert_eq!(result[..2], first);
        assert_eq!(result[LEN - 1], 2.0 * f32::from(THREADS as u16) + 9.0);
    }
}

#[test]
fn another_order_of_threads_shows_a_race() {
    if skips() {
        return;
    }
    let races = [
        ("a missing barrier", "shared[thread] = in[all]; out[all] = shared[(thread + 1) % blockDim.x];"),
        ("who is last", "out[0] = in[all];"),
        ("another cube's number", "out[all] = out[(all + blockDim.x) % (2 * blockDim.x)] + 1;"),
    ];
    for (name, body) in races {
        let results = run(body, false).unwrap();
        assert!(results.iter().any(|result| *result != results[0]), "{name} is not seen");
    }
}

#[test]
fn what_a_kernel_must_not_do_is_a_fault() {
    if skips() {
        return;
    }
    for (body, fault) in [
        ("if (thread < 7) __syncthreads();", "some threads of a cube have ended, others wait for them"),
        (
            "if (thread < 7) {\n__syncthreads();\n} else {\n__syncthreads();\n}",
            "threads of a cube wait at different places",
        ),
        ("shared[blockDim.x + 3] = 1;", "it has written beyond its shared memory"),
        ("out[2 * blockDim.x] = 1;", "it has written beside its argument 1"),
        ("((float*)in)[-1] = 1;", "it has written beside its argument 0"),
    ] {
        assert_eq!(run(body, false).unwrap_err(), fault, "{body}");
    }
    let promise = "it may write to what it promises not to change";
    assert_eq!(run("out[all] = in[all];", true).unwrap_err(), promise);
    // What nobody has written is no number.
    for body in ["out[all] = shared[thread];", "out[all] = in[all + 2 * blockDim.x];"] {
        assert!(run(body, false).unwrap().concat().iter().all(|value| value.is_nan()), "{body}");
    }
}
