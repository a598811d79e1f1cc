//! The same mathematics again, naive and in f64: what every kernel is compared with.
//!
//! One row at a time, one loop per equation, nothing fused, no order of summation worth relying on. The oracle itself
//! is checked by central finite differences, against PyTorch and TensorFlow, and by loops unrolled by hand
//! (`kernels/tests`).
//!
//! Reading order, from the inside out:
//! 1. [`algebra`], [`activation`]: products of a matrix and a vector; the pointwise functions and their slopes.
//! 2. [`cell`], [`rnn`], [`lstm`], [`gru`]: one cell over one unbroken run of steps.
//! 3. [`parameters`], [`direction`]: one direction of one layer over one row: weights, learnt initial states, resets.
//! 4. [`layer`], [`stack`]: both directions and a dropout mask; layers on top of each other, lengths.
//! 5. [`head`], [`network`]: predictions and their loss; a batch of rows from input to gradient.
//! 6. [`optimizer`]: what happens to gradients.

pub mod activation;
pub mod algebra;
pub mod cell;
pub mod direction;
pub mod gru;
pub mod head;
pub mod layer;
pub mod lstm;
pub mod network;
pub mod optimizer;
pub mod parameters;
pub mod rnn;
pub mod stack;
