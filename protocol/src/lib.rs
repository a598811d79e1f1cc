//! The vocabulary that all parts of Lockstep share: what a run is, how its work is cut and ordered, and what travels.
//!
//! Nothing here touches tensors, files, sockets or clocks; but for the nonces of the handshake everything is a pure
//! function or a type. In reading order:
//!
//! - [`job`]: what is computed, how long, by whom; presets and merging.
//! - [`cell`]: the recurrent cells and their options.
//! - [`layout`]: names, shapes and places of the training state; the buckets of the gradient.
//! - [`slots`]: which rows belong to which shard, which shards to which worker.
//! - [`tree`]: the fixed tree along which shards are added, and covers of ranges.
//! - [`sums`]: what a step counts besides gradients.
//! - [`control`]: the few numbers that decide how a run goes on.
//! - [`schedule`]: the order of work.
//! - [`learning_rate`](mod@learning_rate): the step size of each step.
//! - [`random`]: counter-based random streams.
//! - [`batch`]: the rows of one piece of work.
//! - [`activity`]: what a worker is doing, and did last.
//! - [`message`], [`frame`], [`handshake`]: what travels between processes.
//! - [`problem`]: what a user is told when something goes wrong.
#![forbid(unsafe_code)]

pub mod activity;
pub mod batch;
pub mod cell;
pub mod control;
pub mod frame;
pub mod handshake;
pub mod job;
pub mod layout;
pub mod learning_rate;
pub mod message;
pub mod problem;
pub mod random;
pub mod schedule;
pub mod slots;
pub mod sums;
pub mod tree;
