//! Lockstep's numeric kernels: buffers in, buffers out, no files, no processes, no async.
//!
//! Two rules make the bits of a training run independent of the machines that compute it:
//! - **Row rule**: a number of one row depends on that row and the weights only. Its dot products run in a fixed k
//!   order that no tile, row count, thread, cache size or SIMD level changes.
//! - **Sum rule**: sums across rows are taken in the row order given, sums across shards are the caller's tree.
//!
//! Shape letters, used in every doc comment: `B` batch rows, `T` time steps, `I` input width, `H` hidden width,
//! `G` gates of the cell (RNN 1, LSTM 4, GRU 3), `L` layers, `V` classes, `P` parameters, `S` shards.
//! All matrices are row-major; weights have PyTorch's shapes and gate orders (LSTM `i, f, g, o`; GRU `r, z, n`).

pub mod cpu;

pub use cpu::gemm::{gemm, gemm_transposed};
pub use cpu::pack::{PackedLeft, PackedMatrix};
pub use cpu::simd::{Simd, SimdLevel};
