//! The same mathematics again, naive and in f64: what every kernel is compared with.
//!
//! One row at a time, one loop per equation, nothing fused, no order of summation worth relying on. The oracle itself
//! is checked by central finite differences (`network`).

pub mod gru;
pub mod lstm;
pub mod network;
pub mod rnn;
pub mod sequence;
