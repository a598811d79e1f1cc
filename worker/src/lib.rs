//! A worker: a stateless process that trains its shards and holds a replica of the training state.
//!
//! In reading order:
//!
//! - [`session`]: a worker's life, from the connection to the goodbye.
//! - `trainer`: device and state, and how they take part in a generation.
//! - [`train`]: the step loop, on one screen.
//! - [`replica`]: the replicated state.
//! - [`collective`]: sums and gathers across workers; TCP.
//! - [`sums_exchange`]: what a step counts, of all shards, to everybody.
//! - [`feed`]: batches in; [`outbox`]: messages out; `reports`: those that may have to be told again.
//! - `trace`: what the training thread is doing and did last.
//! - [`footprint`]: the bytes that all this takes.
//! - [`metrics`]: the worker's own metrics.
#![forbid(unsafe_code)]

mod abort;
pub mod collective;
mod connection;
pub mod feed;
pub mod footprint;
pub mod metrics;
pub mod outbox;
pub mod replica;
mod reports;
pub mod session;
pub mod sums_exchange;
mod trace;
pub mod train;
mod trainer;

pub use session::{Config, run};
