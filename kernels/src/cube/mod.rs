//! Kernels for GPUs, written once in cubecl and generic over its runtimes.
//!
//! | module | topic |
//! |---|---|
//! | [`roofline`] | what a device can do at most |
//! | [`guard`] | a kernel that cannot be made ends the process |
//! | `source` | with feature `cuda`: the CUDA C++ of every launch, without a GPU |

pub mod guard;
pub mod roofline;
#[cfg(feature = "cuda")]
pub mod source;
