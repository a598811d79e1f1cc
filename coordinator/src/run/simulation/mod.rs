//! A run under a simulated network and clock: whatever is killed, cut off, stopped or added, it ends with the state of an
//! undisturbed run.
//!
//! Real are the coordinator's [`Run`](super::Run) with membership, records and checkpoints on a disk in memory, its
//! feeders, the data set, and each message's bytes. Simulated are the clock, the network, the disk's speed, the
//! supervisor, and the workers: [`worker`] follows `worker::session`, `trainer` and `train` as a machine of states over a
//! replica of a few numbers, because the real ones wait on sockets in threads of their own.
//!
//! - [`dice`]: all that is random, from one seed.
//! - [`replica`]: what the workers compute, and what it comes to.
//! - [`script`]: faults and their times; how a failing script is made shorter.
//! - [`network`]: connections, their delays and their ends.
//! - [`worker`]: a worker's session.
//! - [`host`]: the coordinator's process.
//! - [`world`]: what happens, in the order of time.
//! - [`oracle`]: what must hold while a run is under way and in the end.

mod dice;
mod host;
mod network;
mod oracle;
mod replica;
mod script;
mod tests;
mod worker;
mod world;
