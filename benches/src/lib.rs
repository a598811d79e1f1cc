//! Benchmarks of Lockstep, and of its peers on the same work.
//!
//! | what | where | measures |
//! |---|---|---|
//! | [`workload`] | here | a preset with random batches of the right shape, and its count of operations |
//! | [`trainer`] | here | whole training steps on the CPU device, without a fleet around it |
//! | [`summary`] | here | the numbers that every measurement reports |
//! | `lockstep-step` | `src/bin` | one process, one preset, one JSON line |
//! | `torch_step.py`, `compare.py` | `peers` | the same in PyTorch; both in turn, and the ratio of their times |
//! | `lockstep-all-reduce` | `src/bin` | one of two processes that sum, ours or bare sockets |
//! | `gloo_all_reduce.py`, `compare-all-reduce` | `peers`, here | the same with gloo; all in turn, and their ratios |
//! | `cells`, `step`, `gemm_peers` | `benches` | criterion: kernels, steps, our GEMM beside another |
//!
//! A time of one process on a shared machine says little. What is reported of a comparison is the median of the
//! ratios of pairs that ran one after the other, which is `peers/compare.py`'s work.
#![forbid(unsafe_code)]

pub mod summary;
pub mod trainer;
pub mod workload;
