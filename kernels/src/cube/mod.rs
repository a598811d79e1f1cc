//! Kernels for GPUs, written once in cubecl and generic over its runtimes: CUDA, and wgpu, which runs everywhere.
//!
//! The rows of these kernels are *runs*, unbroken sequences that start from one state, and everything is stored step by
//! step: `[T][Nr][w]`, T the steps of the longest run and Nr the runs. What lies beyond a run's end is some number that
//! nobody reads, or a gradient of zero.
//!
//! Both rules hold on every device, so equal devices give equal bits however rows and shards are spread. Numbers come out
//! of `fma`, the four operations and the square root, in a fixed order: no float atomics, no autotuning, no function of a
//! driver's library.
//!
//! | module | topic |
//! |---|---|
//! | [`buffer`] | memory of a device |
//! | [`math`] | exp, sigmoid, tanh |
//! | [`gemm`], [`rows`], [`output`], [`softmax`] | what is around the recurrent kernels on the way to the loss |
//! | `precision`, `tensor` | operands of fewer bits, and tensor cores |
//! | [`sequence`], [`rnn`], [`lstm`], [`gru`] | whole sequences in one launch, or one step after the other |
//! | [`shards`], [`elements`] | what happens to gradients |
//! | [`roofline`] | what a device can do at most |
//! | [`guard`] | a kernel that cannot be made ends the process |
//! | `vulkan` | with feature `wgpu`: the devices that wgpu finds |
//! | `source` | with feature `cuda`: the CUDA C++ of every launch, without a GPU |
//! | `emulated` | with feature `cuda`: the same, run by the host's processor |
#![allow(missing_docs, unreachable_pub)] // of what #[cube] generates
#![allow(clippy::manual_div_ceil, clippy::collapsible_if)] // the language of kernels knows neither `div_ceil` nor chains

pub mod buffer;
pub mod elements;
#[cfg(feature = "cuda")]
pub mod emulated;
pub mod gemm;
pub mod gru;
pub mod guard;
pub mod lstm;
pub mod math;
pub mod output;
mod precision;
pub mod rnn;
pub mod roofline;
pub mod rows;
pub mod sequence;
pub mod shards;
pub mod softmax;
#[cfg(feature = "cuda")]
pub mod source;
mod tensor;
#[cfg(feature = "wgpu")]
pub mod vulkan;

#[cfg(all(test, feature = "wgpu"))]
mod parity;
#[cfg(all(test, feature = "wgpu"))]
mod tests;
