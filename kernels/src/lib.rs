//! Lockstep's numeric kernels: buffers in, buffers out, no files, no processes, no async.
//!
//! Two rules make the bits of a training run independent of the machines that compute it:
//! - **Row rule**: a number of one row depends on that row and the weights only. Its dot products run in a fixed k
//!   order that no tile, row count, thread, cache size or SIMD level changes.
//! - **Sum rule**: sums across rows are taken in the row order given; sums across shards are the caller's tree.
//!
//! Neither is a property of one compilation: AMX, AVX-512, AVX2 and portable code return the same bits, because every number
//! is made by the same sequence of exactly rounded operations. (What kind of NaN comes out of a NaN is not promised.)
//!
//! Shape letters, used in every doc comment: `B` batch rows, `T` time steps, `N` (step, row) pairs of a block, `I` input
//! width, `H` units, `R` width of h (`H`, or what an LSTM projects to), `G` gates of the cell (RNN 1, LSTM 4, GRU 3), `L`
//! layers, `V` classes, `P` parameters, `S` shards.
//! All matrices are row-major; weights have PyTorch's shapes and gate orders (LSTM `i, f, g, o`; GRU `r, z, n`).
//!
//! Reading order of [`cpu`]:
//! 1. [`cpu::simd`], [`cpu::math`]: the levels and how one text is compiled for each; exp, sigmoid, tanh.
//! 2. [`cpu::pack`], `micro`, [`cpu::gemm`]: matrix products in one fixed order; `bf16`: those of bf16 operands in another.
//! 3. [`cpu::sequence`], `activation`, [`cpu::rnn`], [`cpu::lstm`], [`cpu::gru`]: how rows of different lengths are
//!    packed, and the fused sequence kernels; [`cpu::input`] before them, [`cpu::dropout`] and [`cpu::softmax`] behind.
//! 4. [`cpu::reduce`], [`cpu::optimizer`]: what happens to gradients.
//! 5. [`cpu::roofline`]: what the rates of all of these are held against.
//!
//! `cube`, with the features `cuda` or `wgpu`, has kernels for GPUs.
//!
//! [`oracle`] is the same mathematics, naive and in f64, which the tests of all of these compare with.

pub mod cpu;
#[cfg(feature = "cube")]
pub mod cube;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod nccl;
pub mod oracle;

pub use cpu::gemm::{Start, gemm, gemm_transposed};
pub use cpu::pack::{PackedLeft, PackedMatrix};
pub use cpu::sequence::SequenceShape;
pub use cpu::simd::{Simd, SimdLevel};
