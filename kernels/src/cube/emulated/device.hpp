// What CUDA C++ finds on a GPU, for one kernel on a CPU: the kernel's text comes between this file and grid.hpp. Nothing but
// what cubecl writes for our kernels is here: another kernel does not compile.
#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <type_traits>
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
// What a thread has done that it must not, if it is of the kind that a thread notices.
extern const char *fault;
}  // namespace gpu

struct __nv_bfloat16 {
    unsigned short bits;

    __nv_bfloat16() = default;
    // To the nearest, of two the even one.
    explicit __nv_bfloat16(float x) {
        unsigned all;
        memcpy(&all, &x, sizeof all);
        bits = x != x ? 0x7FFF : (all + 0x7FFF + (all >> 16 & 1)) >> 16;
    }

    operator float() const {
        unsigned all = (unsigned)bits << 16;
        float x;
        memcpy(&x, &all, sizeof x);
        return x;
    }
};

// Tensor cores. Each thread of a warp keeps both operands and its share of the sums. In what order a GPU adds, and with what
// roundings, nobody has said; here k runs upwards.
namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

namespace precision {
struct tf32;
}

// To the nearest, of two the one away from zero.
static inline float __float_to_tf32(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    if (x == x) bits = (bits + 0x1000) & 0xFFFFE000;
    memcpy(&x, &bits, sizeof x);
    return x;
}

template <class T>
struct element {
    using type = T;
};

template <>
struct element<precision::tf32> {
    using type = float;
};

constexpr int SIDE = 16, WARP = 32, SHARE = SIDE * SIDE / WARP;

// a by rows, b by columns.
template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
    float at[SIDE][K];
};

template <int M, int N, int K>
struct fragment<accumulator, M, N, K, float> {
    float at[SHARE];
};

template <class T>
static void check_place(const T *place, unsigned stride) {
    if ((size_t)place % 32 != 0 || stride * sizeof(T) % 16 != 0) gpu::fault = "a tensor core's operand is not aligned";
}

template <int K>
static void fill_fragment(fragment<accumulator, SIDE, SIDE, K, float> &sums, float value) {
    for (float &at : sums.at) at = value;
}

template <class Use, int K, class T, class Layout>
static void load_matrix_sync(fragment<Use, SIDE, SIDE, K, T, Layout> &to, const typename element<T>::type *from,
                             unsigned stride) {
    constexpr bool along_k = std::is_same<Use, matrix_a>::value == std::is_same<Layout, row_major>::value;
    check_place(from, stride);
    for (int line = 0; line < SIDE; line++)
        for (int k = 0; k < K; k++) to.at[line][k] = from[along_k ? line * stride + k : k * stride + line];
}

template <int K, class T, class A, class B>
static void mma_sync(fragment<accumulator, SIDE, SIDE, K, float> &to, const fragment<matrix_a, SIDE, SIDE, K, T, A> &a,
                     const fragment<matrix_b, SIDE, SIDE, K, T, B> &b,
                     const fragment<accumulator, SIDE, SIDE, K, float> &sums) {
    for (int i = 0; i < SHARE; i++) {
        int at = threadIdx.x % WARP * SHARE + i;
        float sum = sums.at[i];
        for (int k = 0; k < K; k++) sum = fmaf(a.at[at / SIDE][k], b.at[at % SIDE][k], sum);
        to.at[i] = sum;
    }
}

template <int K>
static void store_matrix_sync(float *to, const fragment<accumulator, SIDE, SIDE, K, float> &sums, unsigned stride,
                              layout_t layout) {
    check_place(to, stride);
    for (int i = 0; i < SHARE; i++) {
        int at = threadIdx.x % WARP * SHARE + i, row = at / SIDE, column = at % SIDE;
        to[layout == mem_row_major ? row * stride + column : column * stride + row] = sums.at[i];
    }
}

}  // namespace wmma
}  // namespace nvcuda
