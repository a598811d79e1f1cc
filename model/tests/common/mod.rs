//! What the boundary tests share.
//!
//! - [`setup`]: jobs, random batches and the state a run starts with.
//! - [`fleet`]: a training step by hand, on one device or on several.
//! - [`compare`]: bits, and largest differences.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]

mod compare;
mod fleet;
mod setup;

pub(crate) use compare::{Largest, bits, distance, widen};
pub(crate) use fleet::{Fleet, Outcome, OutcomeBits, on};
pub(crate) use setup::{CELLS, Setup, Sizes, State, TASKS};
