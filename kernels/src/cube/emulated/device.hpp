// What CUDA C++ finds on a GPU, for one kernel on a CPU: the kernel's text comes between this file and grid.hpp. Nothing but
// what cubecl writes for our kernels is here: another kernel does not compile.
#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <utility>

#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __syncthreads() gpu::wait(__LINE__)

struct uint3 {
    unsigned x, y, z;
};

static uint3 threadIdx, blockIdx, blockDim, gridDim;

static inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }

namespace gpu {
// Waits until all threads of the cube are there, at the same line.
void wait(int line);
}  // namespace gpu
