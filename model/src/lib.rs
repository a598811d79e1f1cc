//! Recurrent networks on a device: what a training step computes, without ranks, sockets or files.
//!
//! In reading order:
//!
//! - [`device`]: the seam: one step of a network on a device, behind opaque buffers.
//! - [`init`]: initial parameters.
//! - [`cpu`]: the CPU device, built from the kernels of the `kernels` crate.
#![forbid(unsafe_code)]

pub mod cpu;
pub mod device;
pub mod init;
