//! What the boundary tests share.
//!
//! - [`setup`]: jobs, random batches and the state a run starts with.
//! - [`fleet`]: a training step by hand, on one device or on several.
//! - [`options`]: every option, crossed.
//! - [`reference`](mod@reference): what the f64 oracle says about a batch.
//! - [`compare`]: bits, and largest differences.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]

mod compare;
mod fleet;
mod options;
mod reference;
mod setup;

pub(crate) use compare::{Largest, bits, distance, widen};
pub(crate) use fleet::{Fleet, Outcome, OutcomeBits, Worker, on};
pub(crate) use options::{Combination, combinations, combinations_with, setup};
pub(crate) use reference::{Expected, expected, network};
pub(crate) use setup::{CELLS, Setup, Sizes, State, TASKS};
