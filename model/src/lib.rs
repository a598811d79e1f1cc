//! Recurrent networks on a device: what a training step computes, without ranks, sockets or files.
//!
//! In reading order:
//!
//! - [`device`]: the seam: one step of a network on a device, behind opaque buffers.
//! - [`init`]: initial parameters.
//! - [`cpu`]: the CPU device, built from the kernels of the `kernels` crate.
//! - [`cost`]: the floating-point operations of a step.
//! - [`sample`]: text from a trained network.
//! - [`evaluate`](mod@evaluate): the sums of a trained network over validation data, on one device.
#![forbid(unsafe_code)]

pub mod cost;
pub mod cpu;
#[cfg(feature = "cube")]
pub mod cube;
pub mod device;
pub mod evaluate;
pub mod init;
mod network;
mod rows;
pub mod sample;
