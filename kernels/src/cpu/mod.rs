//! The CPU kernels: exact in their order of operations, vectorised, free of allocation.

mod activation;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
pub mod bf16;
#[cfg(test)]
mod cell_tests;
pub mod dropout;
pub mod gemm;
pub mod gru;
pub mod input;
pub mod lstm;
pub mod math;
mod micro;
pub mod optimizer;
pub mod pack;
pub mod reduce;
pub mod rnn;
pub mod roofline;
pub mod sequence;
pub mod simd;
pub mod softmax;
