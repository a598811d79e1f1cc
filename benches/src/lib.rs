//! What measures Lockstep: the commands `lockstep bench` are thin around this.
//!
//! | module | measures |
//! |---|---|
//! | [`roofline`] | what the machine can do at most: multiply-adds in registers, a large product beside them, memory |
//! | [`step`] | whole training steps of real workers |
//! | [`kernel_rates`] | each kernel alone |
//! | `device_rates` | with the features cuda and wgpu: the same on a GPU |
//! | [`fleet`] | real workers in this process, with batches from memory |
//! | [`trainer`] | the calls of the step loop on one device, without a worker around it |
//! | [`workload`] | a preset with random batches of the right shape, and its count of operations |
//! | [`together`] | work that threads begin at the same moment |
//! | [`summary`] | the numbers that every measurement reports |
//!
//! Besides: `lockstep-all-reduce` (`src/bin`) has the collective alone, `examples/one_step` is for counting instructions,
//! `peers` are the same workloads in other frameworks. The programs `compare`, `compare-all-reduce` and `sweep` run ours
//! and theirs in turn.
//!
//! A time of one process on a shared machine says little. What is reported of a comparison is the median of the
//! ratios of pairs that ran one after the other.
#![forbid(unsafe_code)]

#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod device_kernels;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub mod device_rates;
pub mod fleet;
pub mod kernel_rates;
pub mod roofline;
pub mod step;
pub mod summary;
pub mod together;
pub mod trainer;
pub mod workload;
