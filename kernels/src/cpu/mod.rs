//! The CPU kernels: exact in their order of operations, vectorised, free of allocation.

pub mod gemm;
pub mod math;
mod micro;
pub mod pack;
pub mod simd;
